"""train.py on bad days: killed, asked to stop, out of room, with losses that are not finite,
with other rates."""
import copy
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import plumbing.checkpoint as checkpoint
import plumbing.run as running
import train
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from plumbing.errors import run_main
from plumbing.family import open_family
from plumbing.parallel import Stop
from plumbing.run import Run
from tests.helpers import files_of, one_line_error
from tests.miniature import RUN, TINY, bytes_of
from tests.processes import ROOT, environment_of, run, started

pytestmark = pytest.mark.usefixtures("small_base")
LONG = [*TINY, "--base-steps", "12", "--steps", "16", "--save-every", "2", "--eval-every", "3"]

# A base smaller than the demo's.
SMALL = (
    "\nimport functools, sys, train\n"
    "train.LlamaConfig = functools.partial(train.LlamaConfig, dim=32, n_layers=3, n_heads=4, "
    "n_kv_heads=2, head_dim=8, ffn_dim=48)\n")

STRAIGHT = SMALL + """
train.main(sys.argv[1:])
"""

# Every attempt goes on where the last one was killed: at a place of its own, `when` the n-th call
# of a function begins or has ended. A save is three to five files, each an fsync, a rename and an
# fsync of the folder.
KILLS = SMALL + """
import os, signal
import plumbing.progress as progress

OWNERS = dict(train_step=train, evaluate=progress, fsync=os, replace=os)
PLACES = [
    ("replace", 1, "before"), ("replace", 1, "after"), ("fsync", 1, "before"), ("replace", 2, "before"),
    ("fsync", 4, "before"), ("replace", 3, "after"), ("fsync", 6, "before"), ("train_step", 1, "after"),
    ("evaluate", 1, "before"), ("replace", 1, "before"), ("replace", 1, "after"), ("replace", 2, "before"),
    ("replace", 2, "after"), ("replace", 3, "before"), ("replace", 4, "before"), ("replace", 4, "after"),
    ("train_step", 1, "before"), ("train_step", 2, "after"), ("evaluate", 2, "after"), ("fsync", 8, "before"),
]

def trap(name, n, when):
    # kill -9 at the n-th call of a function
    owner = OWNERS[name]
    call = getattr(owner, name)
    calls = []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) < n:
            return call(*args, **kwargs)
        if when == "after":
            call(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, counted)

def attempt(place) -> int:
    # the status with which a run ends that goes on from what is there
    pid = os.fork()
    if pid == 0:
        if place:
            trap(*place)
        train.main([*sys.argv[1:], "--resume"])
        os._exit(0)
    return os.waitpid(pid, 0)[1]

for place in PLACES:
    status = attempt(place)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (place, status)
assert attempt(None) == 0
print(len(PLACES), "kills")
"""


def losses(folder) -> dict[int, list]:
    """step -> losses, the last time it ran."""
    return {r["step"]: r["loss"] for r in map(json.loads, open(folder / "log.jsonl")) if "loss" in r}


def test_killed_twenty_times(demo, tmp_path):
    """Invariants 5 and 7. Catches a file that is half-written, state that a checkpoint forgets, and
    files of two steps that are taken for one: kill -9 in steps, evaluations and saves must leave no
    trace in what comes out."""
    root, flags = demo
    flags = [*flags[:2], *LONG]
    straight = run("-c", STRAIGHT, *flags, "--out", tmp_path / "a/flex")
    assert straight.returncode == 0, straight.stderr[-2000:]
    killed = run("-c", KILLS, *flags, "--out", tmp_path / "b/flex")
    assert killed.returncode == 0 and killed.stdout.endswith("20 kills\n"), killed.stderr[-2000:]
    for stage in ("base", "flex"):
        a, b = tmp_path / "a" / stage, tmp_path / "b" / stage
        for name in set(RUN) & {p.name for p in a.iterdir()}:
            assert (a / name).read_bytes() == (b / name).read_bytes(), (stage, name)
        assert losses(a) == losses(b)
    assert not [name for name in files_of(tmp_path / "b/flex") if name.endswith(".tmp")], "left behind"


@pytest.mark.parametrize("ranks", [0, 2])
def test_asked_to_stop(odd_start, tmp_path, ranks):
    """Catches a signal that loses the step, ends with a traceback, or leaves ranks waiting for each
    other; and a command that does not go on where it stopped."""
    _, flags = odd_start
    argv = [str(ROOT / "train.py"), *flags, "--steps", "1500", "--log-every", "1", "--save-every", "10000",
            "--eval-every", "10000", "--out", str(tmp_path / "flex")]
    process = subprocess.Popen(started(*argv, ranks=ranks), stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env=environment_of())
    for line in process.stderr:
        if line.startswith("step     3/"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    # torchrun itself ends so, with a traceback
    assert process.wait(timeout=60) == (1 if ranks else 143), said[-2000:]
    assert ranks or "Traceback" not in said, said[-2000:]
    assert "stopped at step" in said and "--resume" in said, said[-2000:]
    state = load_tensors(tmp_path / "flex/resume.pt")
    assert 3 < state["step"] < 1500 and f"stopped at step {state['step']} " in said


def test_a_signal_in_the_last_step_of_the_base(demo, tmp_path, monkeypatch, capsys):
    """Catches Ctrl-C that ends nothing, because the stage was at its end anyway and the next one
    begins; and a status that a script takes for success."""
    root, flags = demo
    flags = [*flags, "--out", str(tmp_path / "out/flex")]
    step = train.train_step

    def signalled(wrapped, model, router, shards, n, *rest, **more):
        if router is None and n == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(wrapped, model, router, shards, n, *rest, **more)

    monkeypatch.setattr(train, "train_step", signalled)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 130 and "stopped at step 8 of 8" in said and "--resume" in said
    assert not (tmp_path / "out/flex").exists(), "the family was begun"
    monkeypatch.setattr(train, "train_step", step)
    train.main([*flags, "--resume"])
    assert bytes_of(tmp_path / "out/flex") == bytes_of(root / "out/flex")


@pytest.mark.skipif(os.name != "posix", reason="pipes of Unix")
def test_a_pipe_in_place_of_the_log_is_not_waited_for(odd_start, tmp_path, capsys):
    """Catches a run that waits for ever, without a word, for somebody to read its log."""
    _, flags = odd_start
    (tmp_path / "flex").mkdir()
    os.mkfifo(tmp_path / "flex/log.jsonl")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train.main(flags + ["--out", str(tmp_path / "flex")]))
    assert stop.value.code == 2 and "log.jsonl cannot be used" in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_to_one_rank_stops_all(tmp_path, monkeypatch):
    """Catches a rank that goes on alone, and waits for ever, when another one was asked to stop."""
    run_of_one = Run(tmp_path, 7, torch.device("cpu"), {})
    run_of_one.stop = Stop()
    for others, stops in ((0.0, False), (0.25, True)):  # the share of ranks that were asked
        monkeypatch.setattr(running, "mean_over_ranks", lambda wished: wished + others)
        assert run_of_one.asked_to_stop() == stops


def test_what_is_due(tmp_path):
    """Catches a last step that is neither evaluated nor saved, and a resumed run that repeats what
    it has just read."""
    for start, due in ((0, [3, 6, 7]), (3, [6, 7]), (4, [6, 7])):
        run_of_seven = Run(tmp_path, 7, torch.device("cpu"), {}, start=start)
        assert [step for step in range(start, 8) if run_of_seven.due(step, 3)] == due


def test_a_bad_step_is_skipped(odd_start, tmp_path, monkeypatch, capsys):
    """Catches NaN in the weights or in Adam's moments, and a run that skips for ever."""
    _, flags = odd_start
    flags = flags + ["--out", str(tmp_path / "flex")]
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
    assert [r["bad"] for r in map(json.loads, open(tmp_path / "flex/log.jsonl"))
            if "loss" in r] == [0, 1, 2, 0, 1, 0]
    assert all(w.isfinite().all() for w in load_tensors(tmp_path / "flex/resume.pt")["model"].values())
    shutil.rmtree(tmp_path / "flex")
    monkeypatch.setattr(train, "train_step", poisoned({3, 4, 5}))
    with pytest.raises(SystemExit) as stop:
        train.main(flags + ["--max-bad-steps", "2"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert (stop.value.code == 2 and len(errors) == 1 and "2 steps in a row" in errors[0]
            and "--resume" in errors[0])
    assert load_tensors(tmp_path / "flex/resume.pt")["step"] == 3


@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_a_diverged_run_keeps_its_last_good_checkpoint(odd_start, tmp_path, monkeypatch, capsys, what):
    """Catches a good checkpoint that is replaced after steps that were not finite, or by weights
    that are no numbers; a message that promises another state; a run that ends so and ends well;
    and a mending command that does not mend."""
    _, flags = odd_start
    flags = flags + ["--out", str(tmp_path / "flex"), "--save-every", "2"]
    step = train.train_step

    def diverged(wrapped, model, router, shards, n, *rest, **more):
        result = step(wrapped, model, router, shards, n, *rest, **more)
        weight = next(model.parameters())
        if n >= 3 and what == "gradients":
            weight.grad[0, 0] = float("nan")
        if n == 3 and what == "weights":  # the step itself is finite
            weight.data[:] = float("inf")
        return result

    monkeypatch.setattr(train, "train_step", diverged)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    said = capsys.readouterr().err
    error = said.splitlines()[-1]
    assert stop.value.code == 2 and said.count("error") == 1
    assert ("not saved at its last step" in error and "the checkpoint of step 2" in error
            and "--override --lr" in error)
    assert "step     4/6 | not saved: " in said and ("NaN or infinity" in said) == (what == "weights")
    assert load_tensors(tmp_path / "flex/resume.pt")["step"] == 2
    monkeypatch.setattr(train, "train_step", step)
    train.main(flags + ["--resume", "--override", "--lr", "1e-4"])
    assert load_tensors(tmp_path / "flex/resume.pt")["step"] == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full: Linux has one")
def test_a_full_disk_costs_the_log_alone(odd_start, tmp_path, capsys):
    """Catches a run of weeks that dies at a line of its log, one that says so at every step,
    and other weights."""
    root, flags = odd_start
    (tmp_path / "full").mkdir()
    (tmp_path / "full/log.jsonl").symlink_to("/dev/full")
    said = {}
    for name in ("full", "free"):
        train.main(flags + ["--out", str(tmp_path / name)])
        said[name] = capsys.readouterr().err
    assert (said["full"].count("log.jsonl cannot be written (No space left") == 1
            and "note" not in said["free"])
    weights = [load_tensors(tmp_path / name / "resume.pt")["model"] for name in said]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_full_disk_keeps_the_last_checkpoint(demo, tmp_path, monkeypatch, capsys):
    """Catches a checkpoint that is lost because the next one has no room."""
    root, flags = demo
    # as the demo's
    flags = flags + ["--llama", str(root / "out/base"), "--kd", "0", "--out", str(tmp_path / "flex")]
    write, calls = checkpoint.atomic_write, []

    def full(path):
        calls.append(path)
        if len(calls) > 4:  # resume.pt, weights, params.json, flex.pt
            raise OSError(28, "No space left on device")
        return write(path)

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert (stop.value.code == 2 and len(errors) == 1 and "No space left" in errors[0]
            and "--resume" in errors[0])
    state = load_tensors(tmp_path / "flex/resume.pt")
    assert state["step"] == 3 and len(calls) == 5
    monkeypatch.setattr(checkpoint, "atomic_write", write)
    train.main(flags + ["--resume"])
    for name in RUN:
        assert ((tmp_path / "flex" / name).read_bytes() == (root / "out/flex" / name).read_bytes()
                or name == "resume.pt")


def test_what_a_run_is_made_of(odd_start, tmp_path, monkeypatch, capsys):
    """Catches a run that goes on from another Llama or on other text under the same path, and one
    that is refused because its folders were moved."""
    root, flags = odd_start
    at = {flag: flags[flags.index(flag) + 1] for flag in ("--llama", "--data")}
    shutil.copytree(at["--llama"], tmp_path / "llama")
    shutil.copytree(at["--data"], tmp_path / "data")

    def with_paths(llama, data) -> list[str]:
        new = {at["--llama"]: str(llama), at["--data"]: str(data)}
        return [new.get(word, word) for word in flags] + [
            "--out", str(tmp_path / "flex"), "--save-every", "2"]

    step = train.train_step

    def crashes(*args, **more):
        if args[4] == 3:
            raise KeyError("a crash")
        return step(*args, **more)

    monkeypatch.setattr(train, "train_step", crashes)
    with pytest.raises(KeyError):
        train.main(with_paths(tmp_path / "llama", tmp_path / "data"))
    monkeypatch.setattr(train, "train_step", step)
    # Moved, and named by another path.
    (tmp_path / "moved").mkdir()
    for name in ("llama", "data"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path)
    # Another Llama, other text.
    shutil.copytree("moved/llama", "other")
    state = load_llama("other").state_dict()
    state["layers.0.attention.wq.weight"][0, 0] += 1
    save_llama("other", load_llama("other").config, state)
    shutil.copytree("moved/data", "text")
    shard = Path("text/train_000000.bin")
    tokens = bytearray(shard.read_bytes())
    tokens[len(tokens) // 4 * 2] ^= 1  # one of them, somewhere
    shard.write_bytes(tokens)
    shutil.copytree("moved/data", "held")
    shard = Path("held/val_000000.bin")
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    for llama, data, what in (("other", "moved/data", "llama_fingerprint"),
                              ("moved/llama", "text", "fingerprint"),
                              ("moved/llama", "held", "val_fingerprint")):
        with pytest.raises(SystemExit):
            train.main(with_paths(llama, data) + ["--resume"])
        assert f"other settings: {what} " in capsys.readouterr().err
    train.main(with_paths("moved/llama", "moved/data") + ["--resume"])
    assert load_tensors("flex/resume.pt")["step"] == 6


RESUME_DAMAGES = {
    "of something else": lambda s: {"model": s},
    "no step": lambda s: s.pop("step"),
    "a tensor for the settings": lambda s: s.update(settings=torch.ones(3)),
    "a tensor among the settings": lambda s: s["settings"].update(lr=torch.ones(0)),
    "a step that is half": lambda s: s.update(step=5.5),
    "a step before the first": lambda s: s.update(step=-1),
    "true for a step": lambda s: s.update(step=True),
    "a weight of whole numbers": lambda s: s["model"].update(
        {"norm.weight": s["model"]["norm.weight"].to(torch.int8)}),
    "a weight in bf16": lambda s: s["model"].update({"norm.weight": s["model"]["norm.weight"].bfloat16()}),
    "moments of whole numbers": lambda s: s["optimizers"][0]["state"][0].update(
        exp_avg=torch.ones(3, dtype=torch.int8)),
    "a router in bf16": lambda s: s["flex"]["router"].update(
        {name: weight.bfloat16() for name, weight in s["flex"]["router"].items()}),
    "a weight that is a list": lambda s: s["model"].update({"norm.weight": [1.0]}),
    "a weight less": lambda s: s["model"].pop("norm.weight"),
    "no router": lambda s: s.update(flex=None),
    "moments of one optimizer": lambda s: s["optimizers"].pop(),
    "moments that are text": lambda s: s["optimizers"][0].update(state="none")}


@pytest.mark.parametrize("damage", RESUME_DAMAGES)
def test_a_state_that_is_none(demo, tmp_path, capsys, damage):
    """Catches a traceback where resume.pt is of something else, and a run that goes on with half
    of a state."""
    root, flags = demo
    shutil.copytree(root / "out", tmp_path / "out")
    path = tmp_path / "out/flex/resume.pt"
    state = torch.load(path, weights_only=True)
    changed = RESUME_DAMAGES[damage](state)
    torch.save(changed if damage == "of something else" else state, path)
    before = files_of(tmp_path / "out/flex")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", str(tmp_path / "out/flex"), "--resume"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and str(path) in errors[0] and "delete it" in errors[0]
    after = files_of(tmp_path / "out/flex")
    assert all(after[name] == content for name, content in before.items() if name != "log.jsonl")


def test_routers_of_another_save(odd_start, tmp_path, capsys):
    """Catches weights that run with the router of another step, as after a crash between the two
    files; --resume writes both again."""
    _, flags = odd_start
    flags = flags + ["--out", str(tmp_path / "flex")]
    train.main(flags)
    before = {name: (tmp_path / "flex" / name).read_bytes() for name in RUN if name != "resume.pt"}
    model = load_llama(tmp_path / "flex")
    save_llama(tmp_path / "flex", model.config, {n: w * 1.01 for n, w in model.state_dict().items()})
    with one_line_error(capsys, "flex.pt was saved with other weights", "--resume"):
        open_family(tmp_path / "flex")
    train.main(flags + ["--resume"])
    open_family(tmp_path / "flex")
    assert before == {name: (tmp_path / "flex" / name).read_bytes() for name in before}


def test_a_state_that_leads_nowhere(demo, tmp_path, capsys):
    """Catches a run that starts at step 0, over what it would have gone on from, because the disk
    that its state is on is not mounted."""
    root, flags = demo
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out/flex/resume.pt").unlink()
    (tmp_path / "out/flex/resume.pt").symlink_to("/not/mounted/resume.pt")
    before = files_of(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", str(tmp_path / "out/flex"), "--resume"])
    assert (stop.value.code == 2
            and "resume.pt is a link that leads nowhere" in capsys.readouterr().err.splitlines()[-1])
    assert files_of(tmp_path) == before


def test_override(demo, tmp_path, capsys):
    """Catches a rate that the optimizer's state brings back, steps that cannot be added to a
    finished run, and settings that change what the run is."""
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
