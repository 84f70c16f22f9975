"""
Flextron (ICML 2024): one Llama whose MLPs and heads are elastic, with a router in front of each of them.

    python flextron.py                                        from out/base into out/flextron, static routers
    python flextron.py --router dynamic --out out/dynamic     every token takes its own width
    python flextron.py --cost latency                         targets are fractions of the measured time
    python flextron.py --llama out/flex --elastic-steps 0     routers for a family that train.py made elastic
    python eval.py --model out/dynamic --text flextron.py     what each token took

Three stages, on text of their own:

    elastic   the full model and a few SubNets, each layer's sizes drawn at random; losses summed (Eq. 5)
    routers   the Llama is frozen, the routers learn (--teach, below)
    joint     the full model and every target, drawn by the routers; Llama and routers learn together

A target t is a bound on the mean cost: the loss has lambda * |E[cost] / t - 1| (the latency loss; E over what a router
draws from), and what is deployed is held to it by a price (pertoken.py). What teaches the routers in the second stage:

    surrogate  (the paper) a small network S learns, from pairs seen, how the language model's loss follows from what
               the routers put out; routers descend S + the latency loss, only while S's error on new pairs is under
               --threshold; then S is thrown away. A pair costs one forward of what was chosen, and no backward.
    gates      (LLaMaFlex's way) the gradient of the loss itself, through straight-through gates on the full width.
               Dearer a step, and better in our runs (RESULTS.md): the default

The loss S learns is the excess over the full model's on the same tokens: from batch to batch the loss itself moves by
more than a router can change. Unknown in the paper, and chosen here: threshold, number of sizes, noise, learning rates.
"""
import argparse
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn

from plumbing.checkpoint import (
    RESUME,
    TOKENIZER,
    load_llama,
    resume_state,
    save_llama,
    save_tensors,
)
from flextron.deployed import FLEXTRON, Deployed, flextron_state, restore_flextron
from importance import rank, sort_
from plumbing.latency import load_latency
from model import SubNet
from optimizer import lr_factor
from plumbing.parallel import WORLD, Stop, say, setup
from plumbing.params import read_config
from flextron.network import KINDS, Flextron, costs_of, parameters_of, sizes_for, timed_sizes
from router import FLEX
from plumbing.settings import SMALL
from space import n_params
from flextron.stages import Surrogate, stage_of, train_step
from plumbing.errors import fail
from eval import evaluate
from train import git_commit, make_folder, open_data, resume_command

# -----------------------------------------------------------------------------
# the loop


def grid_of(targets: list[float]) -> list[float]:
    """The targets, halfway between neighbours, and halfway to 1: where the dynamic router's price is measured."""
    ends = sorted({*targets, 1.0})
    return ends[:-1] + [(a + b) / 2 for a, b in zip(ends, ends[1:])]


def save(flextron: Flextron, optimizers, surrogate, step: int, updates: int, settings: dict, args) -> None:
    """resume.pt first: it suffices alone."""
    out, state = Path(args.out), {k: t.detach().cpu() for k, t in flextron.model.state_dict().items()}
    flex = flextron_state(flextron, targets=args.targets, seq_len=args.seq_len, data=settings["data"],
                          eval_windows=args.eval_windows)
    homes = [Path(folder) / TOKENIZER for folder in (args.llama, settings["data"])]
    try:
        save_tensors(out / RESUME, dict(model=state, flextron=flex, optimizers=[o.state_dict() for o in optimizers],
                                        surrogate=surrogate.state(), step=step, updates=updates, settings=settings))
        save_llama(out, flextron.model.config, state, next((path for path in homes if path.is_file()), None))
        save_tensors(out / FLEXTRON, flex)
    except OSError as error:
        fail(f"{out} at step {step} cannot be written ({error.strerror or error}); the last checkpoint there is "
             f"whole; make room, then:  {resume_command()}")


def make_optimizers(flextron: Flextron, args) -> list:
    """AdamW for the Llama, whose matrices are decayed, and one for the routers."""
    of = lambda matrices: [p for p in flextron.model.parameters() if (p.dim() == 2) == matrices]
    groups = [dict(params=of(True), weight_decay=args.weight_decay), dict(params=of(False), weight_decay=0.0)]
    return [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95)),
            torch.optim.AdamW(flextron.routers.parameters(), lr=args.router_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def train(flextron: Flextron, shards, val, settings: dict, args, device, state=None) -> None:
    """All stages, into args.out. state: what resume.pt held."""
    steps, start, updates = args.elastic_steps + args.router_steps + args.joint_steps, 0, 0
    optimizers = make_optimizers(flextron, args)
    surrogate = Surrogate(flextron.model.config.n_layers * sum(map(len, flextron.sizes.values())), args.seed)
    if state is not None:
        for optimizer, moments in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(moments)
        surrogate.load(state["surrogate"])
        start, updates = state["step"], state["updates"]
    log = open(Path(args.out) / "log.jsonl", "a", encoding="utf-8", buffering=1)
    record = lambda **entry: log.write(json.dumps(entry) + "\n")
    record(argv=sys.argv, settings=settings, start=start, commit=git_commit(), torch=torch.__version__)
    calibration = shards.windows(args.calibration_windows)[0][:max(1, 2048 // args.seq_len)].to(device)
    begin, seconds = args.elastic_steps / max(1, steps), []
    with Stop() as stop, log:
        for step in range(start, steps + 1):
            last = step == steps
            if last or stop.wished or (step > start and step % args.save_every == 0):
                if last or step > args.elastic_steps:
                    flextron.calibrate(calibration, grid_of(args.targets) if last else args.targets)
                save(flextron, optimizers, surrogate, step, updates, settings, args)
            if stop.wished and not last:
                say(f"stopped at step {step} of {steps}, saved in {args.out}; go on with:  {resume_command()}")
                raise SystemExit(0)
            if step > args.elastic_steps and (last or step % args.save_every == 0):
                rows = {t: loss_at(flextron, val, t) for t in [*args.targets, 1.0]}
                record(step=step, val={t: r[0] for t, r in rows.items()}, got={t: r[1] for t, r in rows.items()})
                cells = (f"{t:.2f}->{g:.3f} {v:.3f}" for t, (v, g) in rows.items())
                say(f"step {step:5d}/{steps} | val  |", "  ".join(cells))
            if last:
                return
            # one training step
            clock, stage = time.perf_counter(), stage_of(step, args)
            for optimizer, peak, first in zip(optimizers, (args.lr, args.router_lr), (0.0, begin)):
                optimizer.zero_grad(set_to_none=True)
                for group in optimizer.param_groups:
                    group["lr"] = peak * lr_factor(step, steps, args.warmup, first)
            result = train_step(flextron, surrogate, shards, step, args, device)
            clip = lambda module: nn.utils.clip_grad_norm_(module.parameters(), args.clip).item()
            norms = [clip(flextron.model), clip(flextron.routers)]
            if all(map(math.isfinite, [*norms, *result["loss"]])):
                for optimizer, learns in zip(optimizers, (stage != "routers", result["updated"])):
                    if learns:
                        optimizer.step()
                updates += result["updated"]
            else:
                say(f"step {step:5d}/{steps} | skipped: a loss or gradient is not finite")
            seconds = [*seconds[-20:], time.perf_counter() - clock]
            record(step=step, stage=stage, norms=norms, router_updates=updates, **result)
            if step % args.log_every == 0 or step == steps - 1:
                say(step_line(step, steps, stage, result, sorted(seconds)[len(seconds) // 2], args))


def step_line(step: int, steps: int, stage: str, result: dict, seconds: float, args) -> str:
    """The printed line of a step: losses, and with routers the expected cost at every target."""
    line = f"step {step:5d}/{steps} | {stage:7} | loss " + " ".join(f"{loss:.3f}" for loss in result["loss"])
    if "cost" in result:
        line += " | cost " + " ".join(f"{t:.2f}->{c:.3f}" for t, c in zip(args.targets, result["cost"]))
    if "error" in result:
        line += f" | S's error {result['error']:.3f}{'' if result['updated'] else ', routers wait'}"
    return line + f" | {1000 * seconds:.0f} ms | eta {timedelta(seconds=round((steps - step - 1) * seconds))}"


def loss_at(flextron: Flextron, val, target: float) -> tuple[float, float]:
    """(held-out loss, mean cost) of what is deployed at a target."""
    deployed = Deployed(flextron, target)
    return evaluate(deployed, val)[0], deployed.got()


# -----------------------------------------------------------------------------
# the command line


def parse_args(argv=None) -> argparse.Namespace:
    """Every flag; what can be refused is refused before anything is trained."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python flextron.py --help lists the flags")
    add = p.add_argument
    add("--llama", default="out/base", help="raw Llama folder; one that train.py or flextron.py sorted stays as it is")
    add("--data", help="folder of shards from data/prepare.py (default: the Python standard library)")
    add("--out", default="out/flextron")
    add("--router", choices=["static", "dynamic"], default="static", help="sizes per layer, or per layer and token")
    add("--cost", choices=["params", "latency"], default="params", help="what a target is a fraction of")
    add("--teach", choices=["gates", "surrogate"], default="gates", help="the routers, while the Llama is frozen")
    add("--targets", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="fractions of the full model's cost")
    add("--n-heads-choices", type=int, nargs="+", help="numbers of query heads to choose from")
    add("--ffn-dim-choices", type=int, nargs="+", help="numbers of neurons to choose from")
    add("--elastic-steps", type=int, default=225, help="of random SubNets")
    add("--router-steps", type=int, default=75, help="with the Llama frozen")
    add("--joint-steps", type=int, default=150, help="of Llama and routers together")
    add("--samples", type=int, default=3, help="random SubNets per elastic step, beside the full model")
    add("--batch-tokens", type=int, default=1024, help="per pass")
    add("--micro-batch", type=int, help="sequences per forward (default: 8192 tokens)")
    add("--seq-len", type=int, default=128, help="tokens per sequence")
    add("--lr", type=float, help="Llama's (default: 1e-3, from 100M parameters on 4e-5)")
    add("--router-lr", type=float, default=1e-2)
    add("--warmup", type=float, default=0.1, help="of the learning rates, share of the steps")
    add("--weight-decay", type=float, default=0.1, help="on the Llama's matrices")
    add("--clip", type=float, default=1.0, help="gradient norm, for Llama and routers apart")
    add("--penalty", type=float, default=1.0, help="lambda of the latency loss")
    add("--threshold", type=float, default=0.05, help="nats: routers follow S while its error is smaller")
    add("--tau-end", type=float, default=0.0561, help="temperature at the last step (starts at 1)")
    add("--kappa-end", type=float, default=10.0, help="logit scale at the last step (starts at 1)")
    add("--calibration-windows", type=int, default=64, help="training windows that rank units and set prices")
    add("--eval-windows", type=int, default=128, help="validation windows")
    add("--save-every", type=int, default=150, help="steps between checkpoints")
    add("--log-every", type=int, default=10, help="steps between printed lines")
    add("--seed", type=int, default=0, help="of data order, SubNets, routers and noise")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="go on from --out's resume.pt")
    args = p.parse_args(argv)
    return check(args)


def check(args: argparse.Namespace) -> argparse.Namespace:
    """Ranges, and what follows from other flags."""
    if WORLD > 1:
        fail(f"{WORLD} processes found; flextron.py runs in one: start it with python, not torchrun")
    args.targets = sorted(set(args.targets), reverse=True)
    if not all(0 < t < 1 for t in args.targets):
        fail(f"--targets {' '.join(map(str, args.targets))} found; expected fractions between 0 and 1 (1 is always "
             "trained); try --targets 0.8 0.6 0.4")
    zero = {"seed", "elastic_steps", "router_steps", "joint_steps", "samples", "weight_decay", "penalty", "warmup"}
    args.micro_batch = args.micro_batch or max(1, 8192 // max(1, args.seq_len))
    config = read_config(args.llama)
    args.lr = args.lr or (1e-3 if n_params(config, SubNet.full(config)) < SMALL else 4e-5)
    for name, value in vars(args).items():
        lowest = 0 if name in zero else 1 if type(value) is int else 1e-12
        if type(value) in (int, float) and not lowest <= value < float("inf"):
            fail(f"--{name.replace('_', '-')} {value:g} found; expected {lowest:g} or more")
    if args.batch_tokens % args.seq_len:
        fail(f"--batch-tokens {args.batch_tokens} found; expected whole sequences of --seq-len {args.seq_len}")
    for name in ("data", "llama"):  # one folder, one name: a resumed run compares them
        setattr(args, name, getattr(args, name) and os.path.normpath(getattr(args, name)))
    if Path(args.llama).resolve() == Path(args.out).resolve():
        fail(f"--out {args.out} is the Llama that training starts from; choose another --out")
    return args


def main(argv=None) -> None:
    """data -> rank, sort -> costs -> the three stages -> table."""
    args = parse_args(argv)
    device = setup(args.device)
    say("settings: " + " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
    asked = {"n_heads": args.n_heads_choices, "ffn_dim": args.ffn_dim_choices}
    try:
        sizes = sizes_for(read_config(args.llama), {kind: s for kind, s in asked.items() if s})
    except ValueError as error:
        fail(str(error))
    folder, shards, val = open_data(args)
    val = val.windows(args.eval_windows)
    may_differ = {"resume", "out", "log_every", "save_every", "device"}
    settings = {k: v for k, v in vars(args).items() if k not in may_differ} | dict(
        data=folder, fingerprint=shards.fingerprint())
    steps = args.elastic_steps + args.router_steps + args.joint_steps
    state = resume_state(args.out, settings, steps, args.resume)
    model = load_llama(args.llama, device)
    make_folder(args.out)
    if state is not None:
        say(f"{args.out} is there at step {state['step']} of {steps}: going on from it")
        model.load_state_dict(state["model"])
        flextron = restore_flextron(model, state["flextron"])
    else:
        if not any((Path(args.llama) / name).exists() for name in (FLEX, FLEXTRON)):
            say(f"ranking heads and neurons on {args.calibration_windows} windows")
            sort_(model, rank(model, shards.windows(args.calibration_windows)[0].to(device), "influence"))
        measure = load_latency(args.out, model, timed_sizes(model.config, sizes)) if args.cost == "latency" else (
            parameters_of(model.config, args.router == "dynamic"))
        flextron = Flextron(model, sizes, args.router == "dynamic", costs_of(model.config, sizes, measure), args.cost,
                            args.seed).to(device)
    smallest = 1 + sum(model.config.n_layers * c[0].item() for c in flextron.costs.values())
    if min(args.targets) < smallest:
        fail(f"--targets {min(args.targets):g} found; the smallest sizes cost {smallest:.4f} of the full model; ask "
             "for more, or give smaller ones with --ffn-dim-choices and --n-heads-choices")
    heads, neurons = (" ".join(map(str, sizes[kind])) for kind in KINDS)
    say(f"{args.router} routers of {sum(p.numel() for p in flextron.routers.parameters()):,} parameters choose among "
        f"heads {heads} and neurons {neurons}; cost ({args.cost}) from {smallest:.3f} to 1")
    train(flextron, shards, val, settings, args, device, state)
    say(f"\n{'target':>6} {'got':>6} {'loss':>7}   (nats on {val[1].numel():,} held-out tokens)")
    for target in [1.0, *args.targets]:
        loss, got = loss_at(flextron, val, target)
        say(f"{target:6.2f} {got:6.3f} {loss:7.3f}")
    say(f"\nNext:  python eval.py --model {args.out}\n       python sample.py --model {args.out} --budget 0.6")


if __name__ == "__main__":
    main()
