"""train.py on bad days: killed, asked to stop, out of room, with losses that are not finite, with other rates."""
import copy
import json
import shutil
import signal
import subprocess

import pytest
import torch

import plumbing.checkpoint as checkpoint
import train
from plumbing.checkpoint import load_tensors
from tests.helpers import files_of
from tests.miniature import RUN, TINY
from tests.processes import ROOT, environment_of, run, started

LONG = TINY + ["--base-steps", "8", "--steps", "20", "--save-every", "2", "--eval-every", "3"]

KILLS = """
import os, random, signal, sys, threading, train
import plumbing.progress as progress
out, kills, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
rng, killed, where = random.Random(0), 0, []
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def trap(kind, delay, n):
    # die after a while, during the n-th step or evaluation, or at the n-th fsync or rename of a save
    if kind == "time":
        return threading.Timer(delay, die).start()
    owner, name = {"step": (train, "train_step"), "eval": (progress, "evaluate"), "fsync": (os, "fsync"),
                   "rename": (os, "replace")}[kind]
    call, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == n and kind in ("step", "eval"):
            threading.Timer(delay / 50, die).start()
        elif len(calls) == n:
            rng.random() < 0.5 and call(*args, **kwargs)
            die()
        return call(*args, **kwargs)
    setattr(owner, name, counted)

for attempt in range(300):
    kind, delay, n = rng.choice(["time", "step", "eval", "fsync", "rename"]), rng.uniform(0, 1), rng.randint(1, 9)
    pid = os.fork()
    if pid == 0:
        if killed < kills:
            trap(kind, delay, n)
        train.main(flags + ["--out", out, "--resume"])
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(status):
        if killed < kills and os.WEXITSTATUS(status) == 0:
            continue  # it was faster than its trap
        print(killed, *where)
        sys.exit(os.WEXITSTATUS(status))
    killed, where = killed + 1, where + [kind]
"""


def losses(folder) -> dict[int, list]:
    """step -> losses, the last time it ran."""
    return {r["step"]: r["loss"] for r in map(json.loads, open(folder / "log.jsonl")) if "loss" in r}


def test_killed_twenty_times(demo, tmp_path):
    """Invariants 5 and 7. Catches a file that is half-written, state that a checkpoint forgets, and files of two steps
    that are taken for one: kill -9 in steps, evaluations and saves must leave no trace in what comes out."""
    root, flags = demo
    flags = [*flags[:2], *LONG]
    straight = run("-c", "import sys, train; train.main(sys.argv[1:])", *flags, "--out", tmp_path / "a/flex")
    assert straight.returncode == 0, straight.stderr[-2000:]
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    done = run(script, tmp_path / "b/flex", 20, *flags, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, *where = done.stdout.splitlines()[-1].split()
    assert int(killed) >= 20 and len(set(where)) >= 4, done.stdout
    for stage in ("base", "flex"):
        a, b = tmp_path / "a" / stage, tmp_path / "b" / stage
        for name in set(RUN) & {p.name for p in a.iterdir()}:
            assert (a / name).read_bytes() == (b / name).read_bytes(), (stage, name)
        assert losses(a) == losses(b)
    assert not [name for name in files_of(tmp_path / "b/flex") if name.endswith(".tmp")], "left behind"


@pytest.mark.parametrize("ranks", [0, 2])
def test_asked_to_stop(demo, tmp_path, ranks):
    """Catches a signal that loses the step, ends with a traceback, or leaves ranks waiting for each other; and a
    command that does not go on where it stopped."""
    root, flags = demo
    shutil.copytree(root / "out/base", tmp_path / "base")
    argv = [str(ROOT / "train.py"), *flags, "--steps", "1500", "--log-every", "1", "--save-every", "10000",
            "--eval-every", "10000", "--llama", str(tmp_path / "base"), "--out", str(tmp_path / "flex")]
    process = subprocess.Popen(started(*argv, ranks=ranks), stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env=environment_of())
    for line in process.stderr:
        if line.startswith("step     3/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(timeout=60) == (1 if ranks else 0), said[-2000:]  # torchrun itself ends so, with a traceback
    assert ranks or "Traceback" not in said, said[-2000:]
    assert "stopped at step" in said and "--resume" in said, said[-2000:]
    state = load_tensors(tmp_path / "flex/resume.pt")
    assert 3 < state["step"] < 1500 and f"stopped at step {state['step']} " in said


def test_a_bad_step_is_skipped(demo, tmp_path, monkeypatch, capsys):
    """Catches NaN in the weights or in Adam's moments, and a run that skips for ever."""
    root, flags = demo
    flags = flags + ["--llama", str(root / "out/base"), "--out", str(tmp_path / "flex")]
    step, weights = train.train_step, []

    def poisoned(bad):
        def inner(wrapped, model, router, shards, n, *rest, **more):
            weights.append(copy.deepcopy(model.state_dict()))
            result = step(wrapped, model, router, shards, n, *rest, **more)
            if n in bad:
                next(model.parameters()).grad[0, 0] = float("nan") if n % 2 else float("inf")
            return result
        return inner

    monkeypatch.setattr(train, "train_step", poisoned({1, 2, 4}))
    train.main(flags)
    said = capsys.readouterr().err
    assert said.count("| skipped:") == 3 and "(2 in a row)" in said and "(3 in a row)" not in said
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(weights, weights[1:])]
    assert same == [False, True, True, False, True]
    assert [r["bad"] for r in map(json.loads, open(tmp_path / "flex/log.jsonl")) if "loss" in r] == [0, 1, 2, 0, 1, 0]
    assert all(w.isfinite().all() for w in load_tensors(tmp_path / "flex/resume.pt")["model"].values())
    shutil.rmtree(tmp_path / "flex")
    monkeypatch.setattr(train, "train_step", poisoned({3, 4, 5}))
    with pytest.raises(SystemExit) as stop:
        train.main(flags + ["--max-bad-steps", "2"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1 and "2 steps in a row" in errors[0] and "--resume" in errors[0]
    assert load_tensors(tmp_path / "flex/resume.pt")["step"] == 3


def test_a_full_disk_keeps_the_last_checkpoint(demo, tmp_path, monkeypatch, capsys):
    """Catches a checkpoint that is lost because the next one has no room."""
    root, flags = demo
    flags = flags + ["--llama", str(root / "out/base"), "--out", str(tmp_path / "flex")]
    write, calls = checkpoint.atomic_write, []

    def full(path):
        calls.append(path)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return write(path)

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1 and "No space left" in errors[0] and "--resume" in errors[0]
    state = load_tensors(tmp_path / "flex/resume.pt")
    assert state["step"] == 3 and len(calls) == 6
    monkeypatch.setattr(checkpoint, "atomic_write", write)
    train.main(flags + ["--resume"])
    for name in RUN:
        assert (tmp_path / "flex" / name).read_bytes() == (root / "out/flex" / name).read_bytes() or name == "resume.pt"


def test_override(demo, tmp_path, capsys):
    """Catches a rate that the optimizer's state brings back, steps that cannot be added to a finished run, and settings
    that change what the run is."""
    root, flags = demo
    shutil.copytree(root / "out", tmp_path / "out")
    flags = flags + ["--out", str(tmp_path / "out/flex"), "--resume"]
    changed = ["--steps", "8", "--lr", "7e-4"]
    for wrong in (changed, ["--override", "--seq-len", "16"], ["--override", "--seed", "3", *changed]):
        with pytest.raises(SystemExit) as stop:
            train.main(flags + wrong)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert stop.value.code == 2 and len(errors) == 1 and "other settings" in errors[0]
    with pytest.raises(SystemExit):
        train.main(flags + ["--override", "--steps", "4"])
    assert "at step 6 already" in capsys.readouterr().err.splitlines()[-1]
    train.main(flags + ["--override", *changed])
    state = load_tensors(tmp_path / "out/flex/resume.pt")
    assert state["step"] == 8 and state["settings"]["lr"] == 7e-4
    assert {group["peak"] for group in state["optimizers"][0]["param_groups"]} == {7e-4}
    assert sorted(losses(tmp_path / "out/flex")) == list(range(8))
