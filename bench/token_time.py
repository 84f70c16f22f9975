"""
Does the time fall with what the tokens take? And does a static slice take the time it was asked to take?

    python tests/token_time.py                           a random Llama: every token draws its sizes, ever smaller ones
    python tests/token_time.py --model out/flextron      static routers: --latency asked, and the time measured

Times are fractions of the full model's right before, medians over rounds (latency.py: fractions).
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.checkpoint import load_llama
from flextron.deployed import deploy, load_flextron
from plumbing.latency import batch_for, fractions
from model import Llama, LlamaConfig  # noqa: E402
from flextron.network import KINDS, Flextron, Pick, costs_of, parameters_of, sizes_for, total
from plumbing.errors import fail


class Drawn(Flextron):
    """Routers replaced by dice: size k is drawn with a probability that rises or falls with k, for every token."""
    slope = 0.0

    def pick(self, kind, layer, target, x, noise, price):
        (B, T, _), K = x.shape, len(self.sizes[kind])
        p = (self.slope * torch.linspace(-1, 1, K)).softmax(0)
        generator = torch.Generator().manual_seed(2 * layer + KINDS.index(kind))
        choice = torch.multinomial(p, B * T, replacement=True, generator=generator).view(B, T)
        hard = torch.nn.functional.one_hot(choice, K).float()
        return Pick(choice, hard, hard, hard)


def per_token(config: LlamaConfig, rounds: int) -> list[tuple[float, float, float]]:
    """(mean cost in parameters, time by segments, time masked), over that of the full model."""
    model, sizes = Llama(config).init_weights(), sizes_for(config)
    model.requires_grad_(False)
    costs = costs_of(config, sizes, parameters_of(config, True))
    x, runs, got = batch_for(model, 256), {"full": lambda: model(batch_for(model, 256))}, {}
    for slope in (6.0, 2.0, 0.0, -2.0, -6.0):
        drawn = Drawn(model, sizes, True, costs)
        drawn.slope = slope
        got[slope] = total(drawn.shares_of(drawn(x)[2]), costs)
        runs[slope, "segments"] = lambda d=drawn: d(x)
        runs[slope, "masked"] = lambda d=drawn: d(x, masked=True)
    took = fractions(runs, x.device, rounds)
    return [(got[slope], took[slope, "segments"], took[slope, "masked"]) for slope in got]


def main(argv=None) -> None:
    """Prints a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a folder of flextron.py with static routers")
    p.add_argument("--latency", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5])
    p.add_argument("--dim", type=int, default=512)
    p.add_argument("--rounds", type=int, default=9)
    args = p.parse_args(argv)
    if args.model is None:
        config = LlamaConfig(dim=args.dim, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=args.dim // 8,
                             ffn_dim=3 * args.dim, vocab_size=1280, context=256)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, 4 x 256 tokens, dim {args.dim}\n"
              f"{'mean cost':>9} {'segments':>9} {'masked':>7}   (time over the full model's)")
        for got, segments, masked in per_token(config, args.rounds):
            print(f"{got:9.3f} {segments:9.3f} {masked:7.3f}")
        return
    model = load_llama(args.model)
    flextron = load_flextron(args.model, model)
    if flextron is None or flextron.dynamic:
        fail(f"{args.model} has no static routers; expected a folder of python flextron.py --router static")
    x, asked = batch_for(model), args.latency
    slices = {a: deploy(flextron, args.model, a, "latency").subnet for a in asked}
    runs = {"full": lambda: model(x)} | {a: (lambda s=slices[a]: model(x, subnet=s)) for a in asked}
    took = fractions(runs, x.device, args.rounds)
    print(f"{'asked':>6} {'measured':>8} {'measured / asked':>16}")
    for a in asked:
        print(f"{a:6.2f} {took[a]:8.3f} {took[a] / a:16.3f}")


if __name__ == "__main__":
    main()
