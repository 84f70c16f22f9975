"""errors.py: how a program ends that does not end by itself."""
import argparse
import ast
import os
import signal
import subprocess
import sys

import pytest

from plumbing.errors import Parser, check_range, run_main
from tests.helpers import one_line_error
from tests.processes import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of Unix")
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
sys.path.insert(0, sys.argv[1])
from plumbing.errors import run_main

def main():
    print("ready", flush=True)
    if sys.argv[2] == "prints":
        for _ in range(100_000):
            print("a line")
    time.sleep(60)

run_main(main, "go on with --resume")
"""


def started(what: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(ROOT), what], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line(number, status):
    """Catches a traceback where a user wanted to stop, and a status that a script takes for success."""
    process = started("sleeps")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (status, "interrupted: go on with --resume\n")


def test_a_reader_that_leaves_ends_it_without_a_word():
    """Catches `python ... | head -1` that ends in a traceback, or in the interpreter's own complaint."""
    process = started("prints")
    process.stdout.close()
    process.wait(timeout=20)
    assert (process.returncode, process.stderr.read()) == (141, "")
    process.stderr.close()


def test_a_file_that_cannot_be_used_ends_in_one_line(tmp_path, capsys):
    """Catches a traceback where a path is a folder, too long, or not ours to write to, wherever
    that is found."""
    for path in (tmp_path, tmp_path / ("x" * 300), tmp_path / "missing/place"):
        with one_line_error(capsys, str(path)[:190], "all is kept"):
            run_main(lambda: open(path, "w"), "all is kept")


def test_numbers_have_a_range(capsys):
    """Catches NaN, which is neither below nor above, a number without end, and one of a list that
    is not looked at."""
    args = argparse.Namespace(lr=float("nan"), n=10 ** 400, budgets=[0.5, 2.0], steps=None)
    for name, words in (("lr", "--lr nan"), ("n", "--n 1000"), ("budgets", "--budgets 2.0")):
        with one_line_error(capsys, words, "0 or more, and at most 1"):
            check_range(args, 0, "steps", name, highest=1)
    check_range(args, 0, "steps", "budgets", highest=2)


def test_an_empty_text_is_no_place(capsys):
    """Catches --out "$UNSET" that writes where nobody meant to, or takes the default without a
    word; a prompt may be empty."""
    parser = Parser("python x.py", "")
    parser.add_argument("--out", default="out/x")
    parser.add_argument("--input", nargs="+", default=[])
    parser.add_argument("--prompt")
    for words, name in ((["--out", ""], "out"), (["--input", "a", ""], "input")):
        with one_line_error(capsys, f"an empty text found for {name}", "python x.py --help"):
            parser.parse_args(words)
    assert parser.parse_args(["--prompt", ""]).prompt == ""


def test_every_program_ends_so():
    """Catches a program that runs its main() by itself."""
    n = 0
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0].startswith(".") or path.parent.name == "tests":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                n += 1
                assert [ast.unparse(line).split("(main")[0] for line in node.body] == ["run_main"], path
    assert n > 20
