"""
How long a run will take, said before it starts: the FLOPs of its steps, over those that this
machine does in a second.
"""
import argparse
import time

import torch

from model import LlamaConfig, SubNet
from plumbing.errors import note
from plumbing.parallel import AUTOCASTS, WORLD, autocast, autocast_is, say
from plumbing.settings import SMALL
from space import n_params

DAYS = 3    # a run on a CPU that takes longer is most likely not what was meant
LONG = 300  # seconds from which on a faster precision is worth a word,
MUCH = 1.5  # and how much faster


def train_flops(config: LlamaConfig, seq_len: int, share: float = 1.0) -> float:
    """FLOPs of a training pass per token when a share of the blocks runs.

    6 for each parameter (2 forward, 4 backward); none for the look-up in tok_embeddings. Causal
    attention adds 6 * layers * heads * head_dim * seq_len."""
    blocks = n_params(config, SubNet.full(config))
    n_heads = sum(config.per_layer("n_heads"))
    attention = n_heads * config.head_dim * seq_len
    output = config.vocab_size * config.dim
    return 6 * (share * (blocks + attention) + output)


def run_flops(config: LlamaConfig, args: argparse.Namespace) -> float:
    """FLOPs of the elastic steps of a run, over all ranks: slices that cost all of their budget, as
    many passes that teach the router as are expected, and the forwards of --kd's teacher."""
    several = len(args.budgets) > 1 and args.router in ("constrained", "penalty")
    # Between router_start and teach_end; soft passes get fewer on the way (train.py: schedule).
    teach = args.teach_prob * max(0.0, args.teach_end - args.router_start) if several else 0.0
    if args.teach == "soft":
        teach /= 2
    drawn = [(1 + min(args.budgets)) / 2] * args.extra_budgets  # uniform between these two
    flops = 0.0
    for budget in [*args.budgets, *drawn]:
        sliced = train_flops(config, args.seq_len, budget)
        flops += sliced
        if budget < 1 and args.teach == "soft":
            flops += teach * (train_flops(config, args.seq_len) - sliced)
        if budget < 1 and args.teach == "pairs":
            flops += teach * sliced / 3  # a forward of the other slice
        if args.kd > 0 and budget < 1:
            flops += train_flops(config, args.seq_len) / 3  # a forward
    return flops * args.batch_tokens * args.steps


def machine_flops(device: torch.device, size: int | None = None, rounds: int = 5) -> float:
    """FLOP/s of a matrix product on this device now, in training's precision: the best of some
    rounds, one at least and about a second at most."""
    if size is None:
        size = 8192 if device.type == "cuda" else 1024  # a GPU takes longer to begin than to multiply 1024
    a = torch.ones(size, size, device=device)
    best = float("inf")
    with autocast(device):
        begin = time.perf_counter()
        for _ in range(rounds):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # .item() waits for a GPU
            best = min(best, time.perf_counter() - start)
            if time.perf_counter() - begin > 1:
                break
    return 2 * size ** 3 / best


def readable(seconds: float) -> str:
    """1 day, 2.3 hours: one unit, as people say it."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return (f"{seconds / length:.2g} {unit}" if seconds < 10 * length
                    else f"{seconds / length:,.0f} {unit}")
    return f"{seconds:.0f} seconds"


def say_duration(config: LlamaConfig, args: argparse.Namespace, device: torch.device, done: int = 0) -> None:
    """A line of what is ahead after `done` steps; on a CPU a second one with the flag that helps, if
    one does."""
    left = args.steps - done
    if left <= 0:
        return
    speed = machine_flops(device)
    seconds = expected_seconds(config, args, speed) * left / args.steps
    passes = len(args.budgets) + args.extra_budgets
    where = device.type if WORLD == 1 else f"{WORLD} {device.type} ranks"
    say(f"{left:,} steps of {passes} x {args.batch_tokens:,} tokens: {readable(seconds)} at "
        f"least, at what this {where} multiplies now")
    large = n_params(config, SubNet.full(config)) >= SMALL
    if device.type == "cpu" and seconds > DAYS * 86400 and large and not args.laptop:
        note("the defaults from 100M parameters on are the paper's, made for many GPUs; on a CPU, "
             "--laptop trains on 225k tokens: somewhat over an hour for 135M parameters")
    if device.type == "cpu" and (args.autocast == "bfloat16" or seconds > LONG):
        say_the_faster(args.autocast, device)


def say_the_faster(chosen: str, device: torch.device) -> None:
    """A line on a CPU that multiplies much faster in the other precision than the chosen one.

    Products of 256 tell it in no time, even on a processor that takes a hundred times as long."""
    speeds = {}
    for name in AUTOCASTS:
        with autocast_is(name):
            speeds[name] = machine_flops(device, size=256)
    bf16, fp32 = speeds["bfloat16"], speeds["float32"]
    found = f"multiplies at {bf16 / 1e9:.1f} GFLOP/s here, float32 at {fp32 / 1e9:.1f}"
    if chosen == "bfloat16" and bf16 < fp32:
        note(f"--autocast bfloat16 {found}; it wants a processor with avx512_bf16 or amx; "
             "on this one leave it out")
    if chosen == "float32" and bf16 > MUCH * fp32:
        note(f"--autocast bfloat16 {found}: this processor trains faster with it")


def expected_seconds(config: LlamaConfig, args: argparse.Namespace, speed: float) -> float:
    """What the elastic steps take at least, in seconds, on ranks that multiply with `speed` FLOP/s:
    a machine never does better than its matrix product. Toys take longer, for what is not
    multiplication."""
    return run_flops(config, args) / (speed * WORLD)
