"""--autocast: what it reaches, what it changes, and what a resumed run may not change."""
import json
import traceback

import pytest
import torch

import eval as evaluation
import train
from model import Llama
from plumbing import duration
from plumbing.checkpoint import RESUME, load_tensors, save_llama
from plumbing.parallel import autocast, autocast_is
from plumbing.settings import parse_args
from tests.helpers import GQA, random_llama
from tests.test_memory import SMALL

CPU = torch.device("cpu")


def in_bf16() -> bool:
    """Is the forward that asks in bf16?"""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.fixture
def forwards(monkeypatch):
    """(in bf16?, names of the functions that it was called from, does the Llama train?) of every forward."""
    seen = []
    states = Llama.states

    def recorded(self, *args, **kwargs):
        names = {frame.name for frame in traceback.extract_stack()}
        seen.append((in_bf16(), names, self.norm.weight.requires_grad))
        return states(self, *args, **kwargs)
    monkeypatch.setattr(Llama, "states", recorded)
    monkeypatch.setattr(duration, "machine_flops", lambda device, size=None: 1e12)
    return seen


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_it_reaches_every_forward(random_start, tmp_path, forwards, chosen):
    """Catches a ranking, teacher, second slice, validation or final table in another precision than
    was asked for, and a choice that outlives its run."""
    flags = [*random_start[1], "--out", str(tmp_path / "flex"), "--kd", "0.5", "--router-start", "0",
             "--teach-end", "1"]
    train.main([*flags, "--autocast", chosen])
    assert {bf16 for bf16, _, _ in forwards} == {chosen == "bfloat16"}
    names = set.union(*(names for _, names, _ in forwards))
    assert {"rank", "pass_loss", "loss_of_other", "validate", "show_family"} <= names
    assert any("pass_loss" in names and not trains for _, names, trains in forwards), "no teacher"
    with autocast(CPU):
        assert not in_bf16()


def test_eval_has_it_too(demo, forwards, capsys):
    """Catches a flag of eval.py that changes nothing."""
    losses = {}
    for chosen in ("float32", "bfloat16"):
        forwards.clear()
        evaluation.main(["--model", str(demo[0] / "out/flex"), "--budgets", "0.5", "--device", "cpu",
                         "--json", "--autocast", chosen])
        losses[chosen] = json.loads(capsys.readouterr().out)["rows"][0]["loss"]
        assert {bf16 for bf16, _, _ in forwards} == {chosen == "bfloat16"}
    assert 0 < abs(losses["float32"] - losses["bfloat16"]) < 0.02


def test_the_usual_one():
    """Catches a CPU whose runs repeat no longer bit for bit, a GPU that multiplies in fp32, and a
    choice that stays when what is inside has failed."""
    assert parse_args(["--device", "cpu"]).autocast == "float32"
    assert parse_args(["--device", "cuda"]).autocast == "bfloat16"
    with autocast(CPU):
        assert not in_bf16()
    with pytest.raises(ValueError), autocast_is("bfloat16"):
        with autocast(CPU):
            assert in_bf16()
        raise ValueError
    with autocast(CPU):
        assert not in_bf16()


def refused(capsys, flags) -> str:
    """The error that train.py ends with."""
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_resumed_run_keeps_it(random_start, tmp_path, capsys, monkeypatch):
    """Catches a run that goes on in another precision unasked."""
    monkeypatch.setattr(duration, "machine_flops", lambda device, size=None: 1e12)
    flags = [*random_start[1], "--out", str(tmp_path / "flex")]
    train.main(flags)
    assert load_tensors(tmp_path / "flex" / RESUME)["settings"]["autocast"] == "float32"
    flags += ["--autocast", "bfloat16", "--resume"]
    assert ("holds a run with other settings: autocast float32 -> bfloat16; go on with these by "
            "--resume --override, choose another --out") in refused(capsys, flags)
    train.main([*flags, "--steps", "7", "--override"])


def test_the_base_keeps_it_too(demo, tmp_path, capsys, small_base, monkeypatch):
    """Catches a family in bf16 on a base that was trained in fp32, as if it were the same run."""
    monkeypatch.setattr(duration, "machine_flops", lambda device, size=None: 1e12)
    root, flags = demo
    said = refused(capsys, [*flags, "--out", str(root / "out/other"), "--autocast", "bfloat16"])
    assert "out/base holds a run with other settings: autocast float32 -> bfloat16; go on with these" in said


def test_the_plan_counts_it(tmp_path, capsys):
    """Catches a plan that looks at the device: what bf16 keeps for the backward is less."""
    save_llama(tmp_path, SMALL, random_llama(SMALL).state_dict())
    flags = ["--llama", str(tmp_path), "--dry-run", "--device", "cpu", "--batch-tokens", "1024",
             "--seq-len", "128"]
    activations = {}
    for chosen in ("float32", "bfloat16"):
        train.main([*flags, "--autocast", chosen])
        header, keys, ddp, *_ = capsys.readouterr().out.splitlines()
        assert ("bf16 autocast" in header) == (chosen == "bfloat16")
        activations[chosen] = float(ddp.split()[1 + keys.split()[1:].index("activations")])
    assert 0.5 < activations["bfloat16"] / activations["float32"] < 0.85


@pytest.mark.parametrize("chosen, flops, said", [
    ("bfloat16", (1e9, 80e9), "float32 at 80.0; it wants a processor with avx512_bf16 or amx"),
    ("bfloat16", (150e9, 80e9), None),
    ("float32", (400e9, 80e9), "bfloat16 multiplies at 400.0 GFLOP/s here, float32 at 80.0: this processor"),
    ("float32", (110e9, 80e9), None),      # not worth a word
    ("float32", (1e9, 80e9), None)])
def test_the_faster_precision_is_said(tmp_path, capsys, monkeypatch, chosen, flops, said):
    """Catches a run of weeks in place of hours without a word, one of an hour where twenty minutes
    would do, and a word where nothing is gained."""
    save_llama(tmp_path, GQA, random_llama(GQA).state_dict())
    args = parse_args(["--llama", str(tmp_path), "--device", "cpu", "--autocast", chosen])

    def speed(device, size=None):
        with autocast(device):
            return flops[0] if in_bf16() else flops[1]
    monkeypatch.setattr(duration, "machine_flops", speed)
    monkeypatch.setattr(duration, "LONG", 0)
    with autocast_is(args.autocast):
        duration.say_duration(GQA, args, CPU)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 + (said is not None)
    assert said is None or said in err
    took = duration.readable(duration.run_flops(GQA, args) / flops[chosen == "float32"])
    assert f"{took} at least" in err


def test_a_short_run_is_not_measured_twice(tmp_path, monkeypatch):
    """Catches the demo, which waits for a comparison that saves it nothing."""
    args = parse_args(["--device", "cpu"])
    monkeypatch.setattr(duration, "machine_flops", lambda device: 1e13)
    measured = []
    monkeypatch.setattr(duration, "say_the_faster", lambda *found: measured.append(found))
    duration.say_duration(GQA, args, CPU)
    assert not measured


def test_the_speed_is_that_of_bf16():
    """Catches a speed that was measured in fp32 for a run in bf16."""
    multiplied = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                multiplied.append(args[0].dtype)
            return func(*args, **(kwargs or {}))
    for chosen in ("float32", "bfloat16"):
        with autocast_is(chosen), Watch():
            duration.machine_flops(CPU, size=16, rounds=1)
    assert multiplied == [torch.float32, torch.bfloat16]
