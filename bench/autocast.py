"""
What bf16 products save in a training step, and what they do to its loss: train.py's elastic step
in fp32 and in bf16, side by side in one process, from the same weights, on the same tokens, with
the same slices and rates.

    python -m bench.autocast                                              a random Llama of dim 512
    python -m bench.autocast --llama out/smollm2 --data data/novels       a real one, with --laptop's settings

Both take turns. The time is the median over the steps of bf16's over fp32's of the same step, the
first left out. A processor without avx512_bf16 or amx takes many times as long in bf16.
"""
import argparse
import json
import statistics
import sys

import torch

from bench.slices import add_shape, shape_of
from bench.steps import BUDGETS, OurStep, RandomTokens, flags_of, fresh_llama
from data.shards import Shards
from plumbing.checkpoint import load_llama
from plumbing.errors import Parser, fail, run_main
from plumbing.latency import seconds
from plumbing.parallel import AUTOCASTS, autocast_is, device_of
from train import set_rates


def make_steps(args: argparse.Namespace, device) -> dict[str, OurStep]:
    """A step per precision, each with a copy of the Llama."""
    made = {}
    for name in AUTOCASTS:
        budgets = BUDGETS
        if args.llama:
            flags = flags_of(args, "--llama", args.llama, "--laptop")
            model = load_llama(args.llama, device)
            shards = Shards(args.data, "train", args.seq_len, model.config.vocab_size, 0)
            budgets = flags.budgets
        else:
            flags = flags_of(args)
            config = shape_of(args)
            model = fresh_llama(config, device)
            shards = RandomTokens(config.vocab_size, args.seq_len)
        made[name] = OurStep(model, shards, flags, device, budgets, 0.0)
    return made


def measure(steps: dict[str, OurStep], n: int, device) -> list[dict]:
    """A row per step i: the mean loss over its budgets and the seconds, of each precision."""
    rows = []
    for i in range(n):
        row = dict(step=i)
        for name, step in steps.items():
            set_rates(step.optimizers, i, step.args)
            with autocast_is(name):
                row[f"{name} seconds"] = seconds(lambda: step(i), device)
            row[name] = statistics.mean(step.losses)
        rows.append(row)
    return rows


def main(argv=None) -> None:
    """Prints the table on stderr, with --json also one JSON line on stdout."""
    p = Parser("python -m bench.autocast", __doc__)
    p.add_argument("--llama", help="a raw Llama folder (default: random weights of this shape)")
    p.add_argument("--data", help="with --llama: a folder of shards in its tokens")
    p.add_argument("--micro-batch", type=int, default=4, help="sequences per forward")
    add_shape(p)
    p.set_defaults(rounds=10)
    args = p.parse_args(argv)
    if (args.llama is None) != (args.data is None):
        fail("--llama or --data found alone; "
             "expected both: a Llama, and shards in its tokens from data/prepare.py")
    shape_of(args)
    device = device_of(args.device)
    rows = measure(make_steps(args, device), args.rounds, device)

    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.batch} x "
          f"{args.seq_len} tokens per budget and step", file=sys.stderr)
    print(f"{'step':>4} {'fp32':>8} {'bf16':>8} {'bf16 - fp32':>12}", file=sys.stderr)
    for row in rows:
        fp32, bf16 = (row[name] for name in AUTOCASTS)
        print(f"{row['step']:4} {fp32:8.4f} {bf16:8.4f} {bf16 - fp32:+12.4f}", file=sys.stderr)
    timed = rows[1:] or rows
    ratio = statistics.median(row["bfloat16 seconds"] / row["float32 seconds"] for row in timed)
    print(f"a step in bf16 takes {ratio:.2f} times as long as in fp32", file=sys.stderr)
    if args.json:
        print(json.dumps(dict(device=args.device, ratio=ratio, rows=rows)))


if __name__ == "__main__":
    run_main(main)
