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

LARGEST = 1_000_000_000  # no flag asks for more of anything
SEEDS = 2**63 - 1        # but a seed may be as large as a generator takes it

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
        super().__init__(prog=command, description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):
        """The flags. An empty text (--out "$UNSET") names no place: fail(). Only a prompt may be one."""
        found = super().parse_args(args, namespace)
        for name, value in vars(found).items():
            texts = value if isinstance(value, list) else [value]
            if "" in texts and name != "prompt":
                self.error(f"an empty text found for {name.replace('_', '-')}; "
                           "expected one that says something")
        return found

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; {self.prog} --help lists the flags")


def check_range(args: argparse.Namespace, lowest: float, *names: str, highest: float = LARGEST) -> None:
    """Each of these flags, or each number of a flag with several, is between the two, or was not
    given (None); else fail(). NaN is never between."""
    for name in names:
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        for number in values:
            if number is not None and not lowest <= number <= highest:
                fail(f"--{name.replace('_', '-')} {str(number)[:20]} found; expected {lowest:g} or more, and "
                     f"at most {highest:g}")


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Each of these flags is 1 or more, or was not given (None); else fail()."""
    check_range(args, 1, *names)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a program as Ctrl-C does."""


def terminate(number, frame) -> NoReturn:
    """The handler of SIGTERM."""
    raise Terminated


def run_main(main: Callable, kept: str = "nothing half-written is left") -> None:
    """Runs a program. Ctrl-C and SIGTERM end it in one line, with the status that shells give them,
    130 and 143. A reader that closes the pipe it prints into ends it without a word (141). kept:
    what is there then, or how to go on.

    A file that cannot be opened, read or written ends it in one line too, wherever that was found."""
    signal.signal(signal.SIGTERM, terminate)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name of a file may have letters that no terminal prints
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13)
    except OSError as error:
        where = str(error.filename)[:200] if error.filename else "a file"
        fail(f"{where} cannot be used ({error.strerror or error}); {kept}; mend it, or name another one")
    except KeyboardInterrupt as stop:
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"interrupted: {kept}", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
