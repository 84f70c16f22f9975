"""
Does the time fall with what tokens take? And does a static slice take the time that it was asked to take?

    python -m bench.token_time                        a random Llama whose tokens draw ever smaller sizes
    python -m bench.token_time --model out/flextron   static routers: --latency asked, the time measured

Times are fractions of the full model's right before, medians over rounds (plumbing/latency.py: fractions).
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from flextron.network import Flextron, costs_of, parameter_cost, sizes_for, total_cost
from flextron.routers import ELASTIC, Pick
from model import Llama, LlamaConfig, SubNet
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import open_family
from plumbing.latency import batch_for, fractions

SLOPES = (6.0, 2.0, 0.0, -2.0, -6.0)  # of the dice: from nearly all of the network to nearly nothing

# -----------------------------------------------------------------------------
# every token draws its sizes


class Dice(Flextron):
    """Dice in place of routers: size k is drawn with a probability that rises or falls with k."""
    slope = 0.0

    def pick(self, axis, layer, target, x, noise, price) -> Pick:
        B, T, _ = x.shape
        K = len(self.sizes[axis])
        p = (self.slope * torch.linspace(-1, 1, K)).softmax(0)
        generator = torch.Generator().manual_seed(2 * layer + ELASTIC.index(axis))
        choice = torch.multinomial(p, B * T, replacement=True, generator=generator).view(B, T)
        hard = F.one_hot(choice, K).float()
        return Pick(axis, choice, hard, hard, hard)


class Row(NamedTuple):
    """Fractions of the full model's: mean cost in parameters, time by segments, time under masks."""
    cost: float
    segments: float
    masked: float


def run_of(network, tokens: torch.Tensor, **how):
    """A call without arguments: the network on these tokens."""
    return lambda: network(tokens, **how)


@torch.no_grad()
def per_token(config: LlamaConfig, rounds: int) -> list[Row]:
    """A row per slope, of a random Llama."""
    model = Llama(config).init_weights()
    sizes = sizes_for(config)
    costs = costs_of(config, sizes, parameter_cost(config, dynamic=True))
    tokens = batch_for(model, 256)
    runs = dict(full=run_of(model, tokens))
    got = {}
    for slope in SLOPES:
        dice = Dice(model, sizes, True, costs)
        dice.slope = slope
        picks = dice(tokens)[2]
        got[slope] = total_cost(dice.shares_of(picks), costs)
        runs[slope, "segments"] = run_of(dice, tokens)
        runs[slope, "masked"] = run_of(dice, tokens, masked=True)
    took = fractions(runs, tokens.device, rounds)
    rows = []
    for slope in SLOPES:
        rows.append(Row(got[slope], took[slope, "segments"], took[slope, "masked"]))
    return rows


def show_per_token(dim: int, rounds: int) -> None:
    """Prints a line per slope."""
    config = LlamaConfig(
        dim=dim,
        n_layers=6,
        n_heads=8,
        n_kv_heads=4,
        head_dim=dim // 8,
        ffn_dim=3 * dim,
        vocab_size=1280,
        context=256,
    )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, 4 x 256 tokens, dim {dim}")
    print(f"{'mean cost':>9} {'segments':>9} {'masked':>7}   (time over the full model's)")
    for row in per_token(config, rounds):
        print(f"{row.cost:9.3f} {row.segments:9.3f} {row.masked:7.3f}")


# -----------------------------------------------------------------------------
# static routers held to a time


def static_slices(folder, latencies: list[float]) -> tuple[Llama, dict[float, SubNet]]:
    """The Llama of a folder with static routers, and its slice at each latency; fail() for another folder."""
    family = open_family(folder)
    if family.flextron is None or family.flextron.dynamic:
        fail(f"{folder} has no static routers; expected a folder of python -m flextron --router static")
    slices = {}
    for latency in latencies:
        slices[latency] = family.member(latency, unit="latency").subnet
    return family.model, slices


def show_static(folder, latencies: list[float], rounds: int) -> None:
    """Prints a line per latency: asked, measured."""
    model, slices = static_slices(folder, latencies)
    tokens = batch_for(model)
    runs = dict(full=run_of(model, tokens))
    for latency, subnet in slices.items():
        runs[latency] = run_of(model, tokens, subnet=subnet)
    took = fractions(runs, tokens.device, rounds)
    print(f"{'asked':>6} {'measured':>8} {'measured / asked':>16}")
    for latency in latencies:
        measured = took[latency]
        print(f"{latency:6.2f} {measured:8.3f} {measured / latency:16.3f}")


def main(argv=None) -> None:
    """Prints a table."""
    p = Parser("python -m bench.token_time", __doc__)
    p.add_argument("--model",
                   help="a folder of python -m flextron with static routers (default: a random Llama)")
    p.add_argument("--latency", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5],
                   help="of --model's slices: fractions of the full model's time")
    p.add_argument("--dim", type=int, default=512, help="of the random Llama; a multiple of 16")
    p.add_argument("--rounds", type=int, default=9, help="timings of each call, of which the median counts")
    args = p.parse_args(argv)
    check_at_least_one(args, "dim", "rounds")
    if args.model is None:
        show_per_token(args.dim, args.rounds)
    else:
        show_static(args.model, args.latency, args.rounds)


if __name__ == "__main__":
    run_main(main)
