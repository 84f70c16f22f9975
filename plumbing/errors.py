"""
A user's mistake, in one line: what was found, where, what was expected, and the command that mends
it.

Every program of this project ends such a mistake with fail(): one line on stderr, exit status 2, no
traceback. What we ourselves can get wrong is an assert.
"""
import argparse
import os
import signal
import sys
from typing import Callable, NoReturn


def fail(message: str) -> NoReturn:
    """Prints the message as one line on stderr, from one rank only. Raises SystemExit(2)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", " ".join(message.splitlines()), file=sys.stderr, flush=True)
    raise SystemExit(2)


def note(message: str) -> None:
    """Prints what a user should know, though nothing is wrong: a line on stderr, from one rank only."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("note:", " ".join(message.splitlines()), file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes in one line. command: how the program is started, such as "python
    train.py"."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=command, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; {self.prog} --help lists the flags")


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Each of these flags is 1 or more, or was not given (None); else fail()."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')} {value} found; expected 1 or more")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program as Ctrl-C does."""


def terminate(number, frame) -> NoReturn:
    """The handler of SIGTERM."""
    raise Terminated


def run_main(main: Callable, kept: str = "nothing half-written is left") -> None:
    """Runs a program. Ctrl-C and SIGTERM end it in one line, with the status that shells give them,
    130 and 143. A reader that closes the pipe it prints into ends it without a word (141). kept:
    what is there then, or how to go on."""
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13)
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"interrupted: {kept}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
