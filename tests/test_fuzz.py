"""bench/fuzz.py: a short part of it, and that it counts what it says."""
import os
import pickle
import random
import signal
import sys
import time
import types

import pytest

from bench import fuzz
from plumbing.errors import fail
from tests.processes import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def test_forty_cases_end_well():
    """Catches a traceback, endless work, a leftover, or code that runs, where a file is damaged or
    a flag makes no sense."""
    done = run("-m", "bench.fuzz", "--seed", "18", "--cases", "40")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = done.stdout.splitlines()[-1]
    assert "0 traceback, 0 hang, 0 leftover, 0 code run" in counts
    refused, accepted = (int(counts.split(f" {kind}")[0].split()[-1]) for kind in ("refused", "accepted"))
    assert refused >= 20 and accepted >= 1 and refused + accepted == 40


def endless() -> None:
    while True:
        pass


def two_errors() -> None:
    print("error: one", file=sys.stderr)
    fail("two")


ENDS = {
    "works": (lambda: None, fuzz.ACCEPTED),
    "refuses": (lambda: fail("a user's mistake"), fuzz.REFUSED),
    "refuses twice": (two_errors, fuzz.TRACEBACK),
    "refuses without a word": (lambda: sys.exit(2), fuzz.TRACEBACK),
    "stumbles": (lambda: [][0], fuzz.TRACEBACK),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), fuzz.TRACEBACK),
    "takes all memory": (lambda: bytearray(9 << 30), fuzz.TRACEBACK),
    "never ends": (lambda: time.sleep(60), fuzz.HANG),
    "works for ever": (endless, fuzz.HANG),
    "leaves something": (lambda: open(".new.json.7.tmp", "w").close(), fuzz.LEFTOVER),
    "runs code": (lambda: os.mkdir(fuzz.CANARY), fuzz.CODE)}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_case_counts_as(tmp_path, monkeypatch, end):
    """Catches a fuzzer that finds nothing because it does not look."""
    main, kind = ENDS[end]
    monkeypatch.setitem(sys.modules, "program", types.SimpleNamespace(main=main))
    monkeypatch.setattr(fuzz, "SECONDS", 1 if end == "works for ever" else 20)
    found = fuzz.run_in(tmp_path, [], ["program"], "seed", 1 if end == "never ends" else 60)
    assert fuzz.kind_of(found, tmp_path) == kind, found


def test_code_in_a_file_would_be_noticed(tmp_path, monkeypatch):
    """Catches a canary that no code could make."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(fuzz.Code()))
    assert (tmp_path / fuzz.CANARY).is_dir()


def test_the_same_number_is_the_same_case():
    """Catches a case that cannot be looked at again."""
    words = "eval --model flex".split()
    drawn = {fuzz.change_flags(random.Random("3 4"), words)[1] for _ in range(5)}
    others = {fuzz.change_flags(random.Random(f"3 {n}"), words)[1] for n in range(20)}
    assert len(drawn) == 1 and len(others) > 10
