"""errors.py: how a program ends that does not end by itself."""
import ast
import os
import signal
import subprocess
import sys

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and pipes of Unix")
PROGRAM = """
import sys, time
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
