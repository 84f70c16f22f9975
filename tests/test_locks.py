"""locks.py: one writer per folder, and nothing left of those that were killed."""
import os
import subprocess
import sys

import pytest

import train
from plumbing.files import atomic_write, new_folder
from plumbing.locks import LOCK, locked, one_writer
from tests.helpers import files_of, one_line_error
from tests.processes import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="flock is of Unix")
# Holds something, says so, and is killed there.
HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from plumbing.files import atomic_write, new_folder
from plumbing.locks import one_writer
kind, path = sys.argv[2:]
if kind == "file":
    with atomic_write(path) as file:
        file.write(b"half")
        file.flush()
        print("ready", flush=True)
        time.sleep(60)
else:
    with (one_writer(path) if kind == "run" else new_folder(path, {"a"})) as temporary:
        print("ready", flush=True)
        time.sleep(60)
"""


def held(kind: str, path) -> subprocess.Popen:
    """A process of its own that is writing there."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), kind, str(path)],
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def killed(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_into_a_folder_ends(tmp_path, capsys):
    """Catches two runs whose lines and checkpoints interleave, a lock that a killed process leaves,
    and one that stays when its run has ended."""
    process = held("run", tmp_path / "flex")
    try:
        with one_line_error(capsys, f"another process writes to {tmp_path / 'flex'}", "--out"), one_writer(
                tmp_path / "other", tmp_path / "flex"):
            raise AssertionError("the body must not run")
        assert not (tmp_path / "other").exists(), "made, and left empty"
    finally:
        killed(process)
    assert (tmp_path / "flex" / LOCK).exists()  # what kill -9 leaves: nobody holds it
    (tmp_path / "flex/.resume.pt.77.tmp").write_bytes(b"half")
    with one_writer(tmp_path / "flex"):
        assert os.listdir(tmp_path / "flex") == [LOCK]
        (tmp_path / "flex/resume.pt").write_bytes(b"whole")
    assert files_of(tmp_path) == {"flex/resume.pt": b"whole"}


def test_train_holds_the_lock(odd_start, tmp_path, capsys):
    """Catches a program that locks nothing: another run into its folder is refused before it
    reads a thing."""
    _, flags = odd_start
    with one_writer(tmp_path / "flex"), pytest.raises(SystemExit) as stop:
        train.main(flags + ["--out", str(tmp_path / "flex")])
    assert stop.value.code == 2 and "another process writes to" in capsys.readouterr().err.splitlines()[-1]


def test_a_second_export_into_a_folder_ends(tmp_path, capsys):
    """Catches two exports that rename over one another, gigabytes that a killed one leaves, and a
    folder that was moved aside and never came back."""
    process = held("folder", tmp_path / "slim")
    try:
        with one_line_error(capsys, "another process writes to"), new_folder(tmp_path / "slim", {"a"}):
            raise AssertionError("the body must not run")
    finally:
        killed(process)
    (tmp_path / f".slim.old-{process.pid}").mkdir()
    (tmp_path / f".slim.old-{process.pid}/a").write_bytes(b"before")
    (tmp_path / ".slim.new-1").mkdir()  # of a process whose number another one has now
    with pytest.raises(KeyError), new_folder(tmp_path / "slim", {"a"}):
        raise KeyError
    assert files_of(tmp_path) == {"slim/a": b"before"}
    with new_folder(tmp_path / "slim", {"a"}) as temporary:
        (temporary / "a").write_bytes(b"after")
    assert files_of(tmp_path) == {"slim/a": b"after"} and os.listdir(tmp_path) == ["slim"]


def test_half_a_file_goes_when_its_writer_is_dead(tmp_path):
    """Catches a writer that removes what another one is writing, and halves that stay for ever."""
    process = held("file", tmp_path / "x.gguf")
    half = tmp_path / f".x.gguf.{process.pid}.tmp"
    try:
        with atomic_write(tmp_path / "x.gguf") as file:
            file.write(b"second")
        assert half.exists()
    finally:
        killed(process)
    with atomic_write(tmp_path / "x.gguf") as file:
        file.write(b"third")
    assert files_of(tmp_path) == {"x.gguf": b"third"}


def test_a_pipe_in_place_of_a_lock_is_not_waited_for(tmp_path):
    """Catches a program that hangs, without a word, where a pipe has the name of its lock, or of
    half a file."""
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(OSError), one_writer(tmp_path):
        raise AssertionError("the body must not run")
    os.unlink(tmp_path / LOCK)
    os.mkfifo(tmp_path / ".x.7.tmp")
    with one_writer(tmp_path):
        assert (tmp_path / LOCK).is_file()


def test_a_lock_file_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Catches two holders: the second opened the file of the first, who removed it and went, and a
    third made another one. Who locks a file that is no longer there tries again."""
    path = tmp_path / LOCK
    take, seen = __import__("plumbing.locks").locks.take, []

    def late(file):
        if not seen:
            path.unlink()  # the first holder goes
            path.touch()   # the third comes
        seen.append(file.fileno())
        return take(file)

    monkeypatch.setattr("plumbing.locks.take", late)
    with locked(path, "here"):
        assert len(seen) == 2 and os.path.exists(path)
    assert not path.exists()
