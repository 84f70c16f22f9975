"""
A user's mistake, in one line: what was found, where, what was expected, and the command that mends
it.

Every program of this project ends such a mistake with fail(): one line on stderr, exit status 2, no
traceback. What we ourselves can get wrong is an assert.
"""
import argparse
import os
import sys
from typing import NoReturn


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
