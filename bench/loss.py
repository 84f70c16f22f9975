"""
What the loss in chunks saves, and what it costs: peak memory and time of a forward and a backward
from the last states to their gradients, beside the plain formula, which makes all logits at once.

    python -m bench.loss                          4,096 tokens, Llama 3's vocabulary, dim 512
    python -m bench.loss --tokens 8192 --kd       with a teacher

Each way runs in processes of its own, in turns; a row is the median over the rounds. Memory is what
the process took beyond states, matrix and their gradients.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model import LOSS_TOKENS, losses_in_chunks
from plumbing.errors import Parser, check_at_least_one, run_main
from space import random_generator

ROOT = Path(__file__).resolve().parent.parent


def plain_losses(x, output, targets, reference=None):
    """losses_in_chunks() by the formula: all logits at once."""
    logits = F.linear(x.flatten(0, 1), output).float()
    ce = F.cross_entropy(logits, targets.flatten(), reduction="none")
    if reference is None:
        return ce
    states, matrix = reference
    with torch.no_grad():
        teacher = F.linear(states.flatten(0, 1), matrix).float().log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True)
    return torch.stack([ce, kl.sum(-1)])


def peak_bytes() -> int:
    """The most memory that this process had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(way: str, args: argparse.Namespace) -> tuple[int, float, float]:
    """(bytes beyond what is there before and after, seconds, the mean loss) of one forward and
    backward, in this process."""
    generator = random_generator("loss")
    x = torch.randn(1, args.tokens, args.dim, generator=generator).requires_grad_()
    output = (torch.randn(args.vocab_size, args.dim, generator=generator) / args.dim ** 0.5).requires_grad_()
    targets = torch.randint(args.vocab_size, (1, args.tokens), generator=generator)
    reference = (x.detach(), output.detach()) if args.kd else None
    losses = plain_losses if way == "plain" else losses_in_chunks
    x.grad, output.grad = torch.zeros_like(x), torch.zeros_like(output)
    before = peak_bytes()
    start = time.perf_counter()
    loss = losses(x, output, targets, reference).mean()
    loss.backward()
    return peak_bytes() - before, time.perf_counter() - start, loss.item()


def main(argv=None) -> None:
    """The table, on stdout."""
    p = Parser("python -m bench.loss", __doc__)
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--vocab-size", type=int, default=128256)
    p.add_argument("--dim", type=int, default=512)
    p.add_argument("--kd", action="store_true", help="with a teacher")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--way", choices=["plain", "chunks"], help="one measurement, in this process")
    args = p.parse_args(argv)
    check_at_least_one(args, "tokens", "vocab_size", "dim", "rounds")
    if args.way:
        print(*measure(args.way, args))
        return

    command = [sys.executable, "-m", "bench.loss", "--tokens", str(args.tokens), "--vocab-size",
               str(args.vocab_size), "--dim", str(args.dim), *(["--kd"] if args.kd else [])]
    found = {"plain": [], "chunks": []}
    for _ in range(args.rounds):
        for way in found:
            done = subprocess.run([*command, "--way", way], cwd=ROOT, capture_output=True,
                                  text=True, check=True)
            found[way].append([float(word) for word in done.stdout.split()])

    print(f"{args.tokens:,} tokens, {args.vocab_size:,} words, dim {args.dim}: logits of all tokens are "
          f"{4 * args.tokens * args.vocab_size / 1e9:.2f} GB, of a chunk of {LOSS_TOKENS:,} "
          f"{4 * min(args.tokens, LOSS_TOKENS) * args.vocab_size / 1e9:.2f}")
    print(f"{'':>8} {'GB':>6} {'time':>6} {'loss':>12}")
    first = statistics.median(seconds for _, seconds, _ in found["plain"])
    for way, rounds in found.items():
        gigabytes, seconds, loss = (statistics.median(column) for column in zip(*rounds))
        print(f"{way:>8} {gigabytes / 1e9:6.2f} {seconds / first:6.2f} {loss:12.7f}")


if __name__ == "__main__":
    run_main(main)
