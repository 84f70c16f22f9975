"""duration.py: what a run will take; and --laptop, which it names."""
import pytest
import torch

import train
from plumbing import duration
from plumbing.checkpoint import save_llama
from plumbing.duration import readable, run_flops, train_flops
from plumbing.settings import LAPTOP, parse_args
from tests.helpers import GQA, one_line_error, random_llama


@pytest.mark.parametrize("teach", ["soft", "pairs"])
def test_the_steps_of_a_run_are_counted(teach):
    """Catches a budget, what teaches the router, extra budgets or the teacher left out: against a sum over
    the steps, with the share of passes that teach which train.py has at each."""
    flags = ("--steps 400 --batch-tokens 64 --seq-len 16 --budgets 1 .5 "
             "--teach-prob .6").split() + ["--teach", teach]
    args = parse_args(flags)
    full = train_flops(GQA, 16)
    want = 0.0
    for step in range(args.steps):
        share = train.schedule(step, args)[2]
        half = train_flops(GQA, 16, 0.5)
        taught = full if teach == "soft" else half + half / 3
        want += 64 * (full + share * taught + (1 - share) * half)
    assert run_flops(GQA, args) == pytest.approx(want, rel=2e-3)
    by_kd = run_flops(GQA, parse_args([*flags, "--kd", ".3"])) - run_flops(GQA, args)
    assert by_kd == pytest.approx(400 * 64 * full / 3)
    flags += ["--teach-prob", "0"]
    extra = run_flops(GQA, parse_args([*flags, "--extra-budgets", "2"])) - run_flops(GQA, parse_args(flags))
    assert extra == pytest.approx(2 * 400 * 64 * train_flops(GQA, 16, 0.75))


def test_a_machine_multiplies():
    """Catches a speed that is off by powers: some machine between a watch and a cluster."""
    assert 1e7 < duration.machine_flops(torch.device("cpu"), size=256) < 1e15


@pytest.mark.parametrize("seconds, said", [
    (12, "12 seconds"), (100, "1.7 minutes"), (3000, "50 minutes"), (9000, "2.5 hours"),
    (86400 * 20, "20 days"), (86400 * 3.3, "3.3 days"), (3.2e12, "101,471 years")])
def test_times_are_said_as_people_do(seconds, said):
    assert readable(seconds) == said


@pytest.mark.parametrize("speed, flags, warned", [
    (1e3, [], True), (1e12, [], False), (1e3, ["--laptop"], False)])
def test_a_run_without_a_chance_is_told_of_the_small_one(tmp_path, capsys, monkeypatch, speed, flags, warned):
    """Catches years of work that start without a word, and a warning to who asked for the small
    run already."""
    save_llama(tmp_path / "llama", GQA, random_llama(GQA).state_dict())
    args = parse_args(["--llama", str(tmp_path / "llama"), "--device", "cpu", *flags])
    monkeypatch.setattr(duration, "machine_flops", lambda device, size=None: speed)
    monkeypatch.setattr(duration, "SMALL", 0)
    duration.say_duration(GQA, args, torch.device("cpu"))
    err = capsys.readouterr().err
    took = readable(run_flops(GQA, args) / speed)
    assert f"{args.steps:,} steps of 4 x {args.batch_tokens:,} tokens: {took} at least" in err
    assert ("--laptop" in err) == warned and err.count("\n") == 1 + warned


def test_laptop_is_one_flag(tmp_path, capsys):
    """Catches a setting that --laptop does not set, one that a flag beside it cannot change, and
    the demo with it."""
    save_llama(tmp_path / "llama", GQA, random_llama(GQA).state_dict())
    flags = ["--llama", str(tmp_path / "llama"), "--laptop"]
    args = vars(parse_args(flags))
    assert {name: args[name] for name in LAPTOP} == LAPTOP
    plain = vars(parse_args(flags[:2]))
    assert all(plain[name] != value for name, value in LAPTOP.items()
               if name not in ("lr", "batch_tokens", "save_every"))
    args = vars(parse_args([*flags, "--steps", "7", "--budgets", "1", ".5", "--kd", "0"]))
    assert args["steps"] == 7 and args["budgets"] == [1.0, 0.5] and args["kd"] == 0
    assert args["lr"] == LAPTOP["lr"]
    with one_line_error(capsys, "--laptop", "--llama"):
        parse_args(["--laptop"])
