"""
What routers have to beat, and what they could know. With the weights frozen:

    python tests/flextron_oracle.py --model out/elastic

First, at every target, the best SubNet with one size for all layers. Then: every token's loss is taken under a narrow
and a wide uniform SubNet; its gain is the difference. How much of the gain's variance do the narrow network's hidden
states tell (linearly, before the MLPs of the first and the middle layer, on text that the fit has not seen), and what
is the loss if half of the tokens run wide: drawn blindly, picked by that fit, or with hindsight? The mixture is ideal:
every token attends to the keys and values of its own network.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.checkpoint import load_llama, load_tensors
from data.shards import Shards  # noqa: E402
from flextron.deployed import FLEXTRON
from model import Llama, SubNet  # noqa: E402
from space import cost  # noqa: E402
from eval import evaluate


@torch.no_grad()
def collect(model: Llama, windows, narrow: SubNet, wide: SubNet):
    """(states (tokens, 2 dim + 1) of the narrow network, losses (tokens,) narrow, and wide)."""
    batches, L = [], model.config.n_layers
    for x, y in zip(windows[0].split(16), windows[1].split(16)):
        seen, losses = [], []
        hooks = [model.layers[i].ffn_norm.register_forward_hook(lambda _m, _x, h: seen.append(h.flatten(0, 1)))
                 for i in (0, L // 2)]
        for subnet in (narrow, wide):
            losses.append(F.cross_entropy(model(x, subnet=subnet)[0].flatten(0, 1), y.flatten(), reduction="none"))
            for hook in hooks:
                hook.remove()
        batches.append((torch.cat([*seen, torch.ones(y.numel(), 1)], 1).double(), *(loss.double() for loss in losses)))
    return [torch.cat(part) for part in zip(*batches)]


def uniform(model: Llama, windows, heads: list[int], target: float) -> tuple[float, SubNet]:
    """(loss, SubNet) of the best slice of cost <= target with the same heads and neurons in every layer."""
    c, found = model.config, []
    for h in heads:
        shapes = [SubNet.uniform(c.dim, range(c.n_layers), h, f) for f in range(8, c.ffn_dim + 1, 8)]
        fits = [subnet for subnet in shapes if cost(c, subnet) <= target + 5e-4]
        found += [(evaluate(model, windows, fits[-1])[0], fits[-1])] if fits else []
    return min(found, key=lambda row: row[0])


def main(argv=None) -> None:
    """Prints the uniform slices, the share of variance told, and the losses of the mixtures."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="out/elastic", help="a folder of flextron.py")
    p.add_argument("--data", help="folder of shards (default: the one trained on)")
    p.add_argument("--windows", type=int, default=400, help="of training text, for the fit")
    p.add_argument("--targets", type=float, nargs="+", default=[0.75, 0.563, 0.376])
    args = p.parse_args(argv)
    model, flex = load_llama(args.model), load_tensors(Path(args.model) / FLEXTRON)
    c, sizes, data = model.config, flex["sizes"], args.data or flex["data"]
    shape = lambda heads, ffn: SubNet.uniform(c.dim, range(c.n_layers), heads, ffn)
    narrow, wide = shape(sizes["n_heads"][0], sizes["ffn_dim"][1]), shape(c.n_heads, sizes["ffn_dim"][-2])
    split = lambda name: Shards(data, name, flex["seq_len"], c.vocab_size)
    x, slim, fat = collect(model, split("train").windows(args.windows), narrow, wide)
    fit = torch.linalg.lstsq(x.T @ x + len(x) * 1e-3 * torch.eye(x.size(1)), x.T @ (slim - fat)[:, None]).solution[:, 0]
    val = split("val").windows(flex["eval_windows"])
    for target in args.targets:
        loss, s = uniform(model, val, sizes["n_heads"], target)
        print(f"uniform at {target:g}: {loss:.3f}, cost {cost(c, s):.3f}, {s.n_heads[0]} heads, ffn {s.ffn_dim[0]}")
    x, slim, fat = collect(model, val, narrow, wide)
    gain, told, half = slim - fat, x @ fit, len(x) // 2
    mixed = lambda by: (slim.sum() - gain[by.argsort(descending=True)[:half]].sum()) / len(slim)
    print(f"narrow (cost {cost(c, narrow):.3f}) {slim.mean():.3f}, wide ({cost(c, wide):.3f}) {fat.mean():.3f}; gain "
          f"{gain.mean():.3f}, its standard deviation over tokens {gain.std():.3f}, told by the hidden state: "
          f"{1 - (gain - told).square().mean() / gain.var():.1%} of the variance\nhalf of the tokens wide: drawn "
          f"blindly {slim.mean() - gain.mean() / 2:.3f}, by the fit {mixed(told):.3f}, by hindsight {mixed(gain):.3f}")


if __name__ == "__main__":
    main()
