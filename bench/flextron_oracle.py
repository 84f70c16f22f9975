"""
What Flextron's routers have to beat, and what they could know. The weights stay frozen.

    python -m bench.flextron_oracle --model out/elastic

1. At every target: the best SubNet with one size for all layers. A router has to beat it.
2. Every token's loss under a narrow and a wide uniform SubNet. The difference is the token's gain from
   width. How much of the gain's variance can a router know? A linear fit says it from the narrow
   network's hidden states, before the MLPs of the first and the middle layer, on text that the fit has
   not seen.
3. The loss if half of the tokens run wide: drawn blindly, picked by that fit, or with hindsight. The
   mixture is ideal: every token attends to the keys and values of its own network.
"""
import argparse
from typing import NamedTuple

import torch

from data.shards import Shards
from eval import evaluate
from model import Llama, SubNet, losses_in_chunks
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import FLEXTRON, Family, open_family
from space import cost

# -----------------------------------------------------------------------------
# 1. one size for all layers


def uniform(model: Llama, windows, heads: list[int], target: float) -> tuple[float, SubNet]:
    """(loss, SubNet) of the best slice of cost <= target with the same heads and neurons in every layer."""
    config = model.config
    found = []
    for n_heads in heads:
        widest = None  # of those that fit: costs rise with the neurons
        for neurons in range(8, config.ffn_dim + 1, 8):
            subnet = uniform_subnet(model, n_heads, neurons)
            if cost(config, subnet) <= target + 5e-4:
                widest = subnet
        if widest is not None:
            found.append((evaluate(model, windows, widest)[0], widest))
    if not found:
        fail(f"--targets {target:g} found; no slice with the same sizes in every layer costs that "
             "little; ask for more")
    return min(found, key=lambda row: row[0])


def uniform_subnet(model: Llama, n_heads: int, ffn_dim: int) -> SubNet:
    """All channels and layers, with these heads and neurons in each."""
    return SubNet.uniform(model.config.dim, range(model.config.n_layers), n_heads, ffn_dim)


# -----------------------------------------------------------------------------
# 2. what a token gains from width


class Tokens(NamedTuple):
    """Text, token by token, in fp64."""
    states: torch.Tensor  # (tokens, 2 dim + 1) hidden states of the narrow network, and 1
    narrow: torch.Tensor  # (tokens,) losses in nats
    wide: torch.Tensor    # (tokens,)


@torch.no_grad()
def collect(model: Llama, windows, narrow: SubNet, wide: SubNet) -> Tokens:
    """States and losses of all tokens of the windows (x, y)."""
    batches = []
    for x, y in zip(windows[0].split(16), windows[1].split(16)):
        batches.append(collect_batch(model, x, y, narrow, wide))
    return Tokens(
        torch.cat([batch.states for batch in batches]),
        torch.cat([batch.narrow for batch in batches]),
        torch.cat([batch.wide for batch in batches]),
    )


def collect_batch(model: Llama, x, y, narrow: SubNet, wide: SubNet) -> Tokens:
    """The same for one batch (B, T)."""
    seen = []

    def listen(_module, _inputs, h):
        seen.append(h.flatten(0, 1))  # B*T, dim

    middle = model.config.n_layers // 2
    hooks = [model.layers[i].ffn_norm.register_forward_hook(listen) for i in (0, middle)]
    narrow_losses = token_losses(model, x, y, narrow)
    for hook in hooks:
        hook.remove()
    wide_losses = token_losses(model, x, y, wide)
    states = torch.cat([*seen, torch.ones(y.numel(), 1)], 1)
    return Tokens(states.double(), narrow_losses.double(), wide_losses.double())


def token_losses(model: Llama, x: torch.Tensor, y: torch.Tensor, subnet: SubNet) -> torch.Tensor:
    """Cross-entropy of every token in nats, (B*T,)."""
    states = model.states(x, subnet)
    output = model.output.weight[:, :subnet.dim]
    return losses_in_chunks(states, output, y).flatten()


def fit_gain(tokens: Tokens) -> torch.Tensor:
    """(2 dim + 1,) ridge regression of the gain on the states."""
    x = tokens.states
    gain = tokens.narrow - tokens.wide
    ridge = len(x) * 1e-3 * torch.eye(x.size(1))
    fit = torch.linalg.lstsq(x.T @ x + ridge, x.T @ gain[:, None])
    return fit.solution[:, 0]


# -----------------------------------------------------------------------------
# 3. half of the tokens wide


def half_wide(tokens: Tokens, by: torch.Tensor) -> float:
    """The mean loss if the half of the tokens with the largest `by` runs wide."""
    n = len(by)
    gain = tokens.narrow - tokens.wide
    chosen = by.argsort(descending=True)[:n // 2]
    return ((tokens.narrow.sum() - gain[chosen].sum()) / n).item()


# -----------------------------------------------------------------------------
# the command line


def parse_args(argv) -> argparse.Namespace:
    """The flags."""
    p = Parser("python -m bench.flextron_oracle", __doc__)
    p.add_argument("--model", default="out/elastic", help="a folder of the flextron folder's")
    p.add_argument("--data", help="folder of shards (default: the one trained on)")
    p.add_argument("--windows", type=int, default=400, help="of training text, for the fit")
    p.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.563, 0.376])
    args = p.parse_args(argv)
    check_at_least_one(args, "windows")
    return args


def open_flextron(folder) -> Family:
    """A folder that holds a Flextron, or fail()."""
    family = open_family(folder)
    if family.flextron is None:
        fail(f"{folder} has no {FLEXTRON}; expected a folder of python -m flextron")
    return family


def main(argv=None) -> None:
    """Prints the uniform slices, the share of variance told, and the losses of the mixtures."""
    args = parse_args(argv)
    family = open_flextron(args.model)
    model = family.model
    config = model.config
    sizes = family.flextron.sizes
    data = args.data or family.saved["data"]
    seq_len = family.saved["seq_len"]
    train = Shards(data, "train", seq_len, config.vocab_size).windows(args.windows)
    val = Shards(data, "val", seq_len, config.vocab_size).windows(family.saved["eval_windows"])

    for target in args.targets:
        loss, subnet = uniform(model, val, sizes["n_heads"], target)
        print(f"uniform at {target:g}: {loss:.3f}, cost {cost(config, subnet):.3f}, "
              f"{subnet.n_heads[0]} heads, ffn {subnet.ffn_dim[0]}")

    narrow = uniform_subnet(model, sizes["n_heads"][0], sizes["ffn_dim"][1])
    wide = uniform_subnet(model, config.n_heads, sizes["ffn_dim"][-2])
    fit = fit_gain(collect(model, train, narrow, wide))
    tokens = collect(model, val, narrow, wide)
    gain = tokens.narrow - tokens.wide
    told = tokens.states @ fit
    explained = 1 - (gain - told).square().mean() / gain.var()
    print(f"narrow (cost {cost(config, narrow):.3f}) {tokens.narrow.mean():.3f}, "
          f"wide ({cost(config, wide):.3f}) {tokens.wide.mean():.3f}; "
          f"gain {gain.mean():.3f}, its standard deviation over tokens {gain.std():.3f}, "
          f"told by the hidden state: {explained:.1%} of the variance")
    blindly = tokens.narrow.mean() - gain.mean() / 2
    by_fit = half_wide(tokens, told)
    by_hindsight = half_wide(tokens, gain)
    print(f"half of the tokens wide: drawn blindly {blindly:.3f}, by the fit {by_fit:.3f}, "
          f"by hindsight {by_hindsight:.3f}")


if __name__ == "__main__":
    run_main(main)
