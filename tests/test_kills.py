"""bench/kills.py: a short part of it, and that it notices what it says."""
import os
import signal
import sys
import time
import types

import pytest
import torch

from bench import fuzz, kills
from tests.processes import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and signals")


@pytest.mark.parametrize("n, how, programs", [(2, [], list(kills.PROGRAMS)),
                                              (1, ["--signal", "int"], ["export", "prepare", "llama"])])
def test_killed_programs_end_as_others_do(n, how, programs):
    """Catches a state that a checkpoint forgets, half a file, what a killed program leaves for
    ever, and Ctrl-C that ends in a traceback or is taken for success."""
    done = run("-m", "bench.kills", "--seed", "18", "--kills", str(n), *how, "--programs", *programs,
               timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == programs
    assert all(int(row[2]) == n and set(map(int, row[3:])) == {0} for row in rows)


def test_what_is_a_fault(tmp_path):
    """Catches a comparison that finds nothing because it does not look: another byte, another
    tensor, a file more, one less; times that are compared."""
    def world(name: str, **changes):
        folder = tmp_path / name
        (folder / "new").mkdir(parents=True)
        files = {"a.txt": b"a", "latency.json": b'{"dim": [1], "full_ms": 3}',
                 "log.jsonl": name.encode()} | changes
        for file, content in files.items():
            if content is not None:
                (folder / "new" / file).write_bytes(content)
        torch.save(dict(step=1, w=torch.ones(3)), folder / "new/resume.pt")
        return kills.contents(folder)

    whole = world("whole")
    assert kills.faults_of(whole, world("same", **{"latency.json": b'{"dim": [1], "full_ms": 4}'})) == {}
    assert kills.faults_of(whole, world("byte", **{"a.txt": b"b"})) == {kills.DIFFERS: ["new/a.txt"]}
    assert kills.faults_of(whole, world("grid", **{"latency.json": b'{"dim": [2]}'})) == {
        kills.DIFFERS: ["new/latency.json"]}
    assert kills.faults_of(whole, world("more", **{".x.tmp": b""})) == {kills.LEFT: ["new/.x.tmp"]}
    assert kills.faults_of(whole, world("less", **{"a.txt": None})) == {kills.LEFT: ["new/a.txt"]}
    torch.save(dict(step=1, w=torch.ones(3) * 2), tmp_path / "same/new/resume.pt")
    assert kills.faults_of(whole, kills.contents(tmp_path / "same")) == {kills.DIFFERS: ["new/resume.pt"]}


def test_half_of_what_appears_all_at_once():
    """Catches half a folder that is taken for a whole one; what was there before is whole too."""
    program = kills.Program("export", "", "new", True)
    expected = {"llama/x": 0, "new/a": 1, "new/b": 2}
    for found, halves in (({"llama/x": 0}, []), (expected, []), ({"new/a": 1}, ["new/b"]),
                          ({"new/a": 1, "new/b": 3}, ["new/b"]), ({"new/a": 0, "new/b": 2}, [])):
        assert kills.halves_of(program, {"new/a": 0}, expected, found) == halves
    assert kills.halves_of(program._replace(whole=False), {}, expected, {"new/a": 7}) == []


def test_a_moment_in_time(tmp_path, monkeypatch):
    """Catches a signal that is not sent, or not to the program, and an end that is taken for a good one."""
    def sleeps():
        time.sleep(30)

    def stumbles():
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            [][0]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for main, number, status, badly in (
                (sleeps, signal.SIGKILL, None, True), (sleeps, signal.SIGINT, 130, False),
                (sleeps, signal.SIGTERM, 143, False), (stumbles, signal.SIGINT, 1, True)):
            monkeypatch.setitem(sys.modules, "program", types.SimpleNamespace(main=main))
            end = fuzz.run_in(tmp_path, [], ["program"], None, 0.5, number)
            assert (end.status, kills.ends_badly(end)) == (status, badly), end
    finally:
        signal.signal(signal.SIGINT, before)
