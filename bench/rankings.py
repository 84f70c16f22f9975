"""
Which score ranks the units of a Llama best? The loss of slices that are cut along one axis alone, on
text that the ranking has not seen, before any training.

    python -m bench.rankings --llama out/smollm2 --data data/novels --text data/wikitext
    python -m bench.rankings --llama out/smollm2 --data data/novels --axes n_layers --shares 0.9 0.8

Scores of channels, heads and neurons:
    activation   importance.py's: how large a unit's activation is
    weighted     that, times the norm of the weights which read it: how much of it leaves the unit
    fisher       sum over windows of (dL/dg)^2, g a factor on the unit that is 1: Taylor's estimate of
                 what the loss says to its absence. Costs a backward
Orders of layers:
    logits       importance.py's: the layer whose absence moves the logits least goes first, again and
                 again, on a few windows spread over the text
    first        the same on as many windows from the beginning of the text
    loss         the same by the loss instead of the logits
    once         by the loss, all layers judged once with all others there
    influence    1 - cos(input, output)
"""
import json
import time

import torch

from data.shards import Shards
from eval import evaluate
from importance import (activation_scores, layers_by_influence, layers_by_logits, listened_to, sort_,
                        unit_orders, with_layers)
from model import Llama, SubNet
from plumbing.checkpoint import load_llama
from plumbing.errors import Parser, run_main
from space import AXES, n_params

UNITS = ("activation", "weighted", "fisher")
DEPTHS = ("logits", "first", "loss", "once", "influence")

# -----------------------------------------------------------------------------
# scores of channels, heads and neurons: lists as importance.py's activation_scores has them


def column_norms(*weights: torch.Tensor) -> torch.Tensor:
    """The norm of what reads each unit: over all rows of some matrices, (units,)."""
    squares = [weight.detach().float().square().sum(0) for weight in weights]
    return torch.stack(squares).sum(0).sqrt()


def weighted_scores(model: Llama, windows: torch.Tensor, batch: int) -> dict:
    """The activation's size, times the norm of the weights that read it."""
    scores = activation_scores(model, windows, batch)
    head_dim = model.config.head_dim
    readers = dict(dim=[], n_heads=[], ffn_dim=[])
    for block in model.layers:
        attention, mlp = block.attention, block.feed_forward
        readers["dim"].append(
            column_norms(attention.wq.weight, attention.wk.weight, attention.wv.weight))
        readers["dim"].append(column_norms(mlp.w1.weight, mlp.w3.weight))
        of_heads = column_norms(attention.wo.weight).unflatten(0, (-1, head_dim))
        readers["n_heads"].append(of_heads.norm(dim=-1))
        readers["ffn_dim"].append(column_norms(mlp.w2.weight))
    readers["dim"].append(column_norms(model.output.weight))
    return {axis: [a * norm for a, norm in zip(scores[axis], readers[axis])] for axis in scores}


def fisher_scores(model: Llama, windows: torch.Tensor, targets: torch.Tensor) -> dict:
    """The sum over windows of the squared gradient of factors on all units. A channel has one factor
    in all norms."""
    config = model.config
    norms, heads, neurons = listened_to(model)
    factors = dict(
        dim=[torch.ones(config.dim)],
        n_heads=[torch.ones(n) for n in config.per_layer("n_heads")],
        ffn_dim=[torch.ones(n) for n in config.per_layer("ffn_dim")])
    every = [f.requires_grad_() for axis in factors.values() for f in axis]
    where = {module: factors["dim"][0] for module in norms}
    where |= dict(zip(heads, factors["n_heads"])) | dict(zip(neurons, factors["ffn_dim"]))

    def multiply(module, inputs, x):
        factor = where[module]
        return x * factor.repeat_interleave(x.size(-1) // len(factor))

    handles = [module.register_forward_hook(multiply) for module in where]
    sums = [torch.zeros_like(f) for f in every]
    model.requires_grad_(False)
    for x, y in zip(windows, targets):
        loss = model(x[None], y[None])[1]
        for total, gradient in zip(sums, torch.autograd.grad(loss, every)):
            total += gradient.square()
    for handle in handles:
        handle.remove()
    n = config.n_layers
    return dict(dim=sums[:1], n_heads=sums[1:1 + n], ffn_dim=sums[1 + n:])


# -----------------------------------------------------------------------------
# orders of layers


@torch.no_grad()
def layers_by_loss(model: Llama, x: torch.Tensor, y: torch.Tensor, again: bool) -> list[int]:
    """Layers, best first. The one whose absence costs least goes; again: then the rest is judged
    without it."""
    kept = list(range(model.config.n_layers))
    removed = []
    while len(kept) > 1:
        loss = {}
        for layer in kept:
            rest = [other for other in kept if other != layer]
            loss[layer] = model(x, y, subnet=with_layers(model, rest))[1].item()
        if not again:
            return sorted(kept, key=loss.get, reverse=True)
        worst = min(kept, key=loss.get)
        kept.remove(worst)
        removed.insert(0, worst)
    return kept + removed


def order_of_layers(model: Llama, by: str, x: torch.Tensor, y: torch.Tensor, few: int) -> list[int]:
    """Layers, best first, from calibration windows x, y (S, T); `few` of them where many passes
    read them."""
    batch = max(1, 4096 // x.size(1))
    spread = [k * len(x) // few for k in range(few)]
    if by == "influence":
        return layers_by_influence(model, x, batch)
    if by in ("logits", "first"):
        return layers_by_logits(model, x[spread] if by == "logits" else x[:few], batch)
    return layers_by_loss(model, x[spread], y[spread], again=by == "loss")


# -----------------------------------------------------------------------------
# slices of one axis


def cut(model: Llama, axis: str, share: float, layers: list[int]) -> SubNet:
    """The slice that keeps a share of one axis' units, and all of the others: whole heads of every
    group, channels and neurons in steps of 32."""
    full = model.full
    n = model.config.n_layers
    if axis == "n_layers":
        return with_layers(model, sorted(layers[:max(1, round(share * n))]))
    size = getattr(model.config, axis)
    step = model.config.n_kv_heads if axis == "n_heads" else 32
    kept = max(step, round(share * size / step) * step)
    sizes = dict(dim=full.dim, n_heads=full.n_heads[0], ffn_dim=full.ffn_dim[0]) | {axis: kept}
    return SubNet.uniform(sizes["dim"], range(n), sizes["n_heads"], sizes["ffn_dim"])


def main(argv=None) -> None:
    """One JSON object per order and share, and the seconds that each order took."""
    p = Parser("python -m bench.rankings", __doc__)
    p.add_argument("--llama", required=True, help="a raw Llama, untrained by us")
    p.add_argument("--data", required=True, help="shards: the train split ranks")
    p.add_argument("--text", help="shards: the val split judges (default: --data)")
    p.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    p.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.75, 0.5], help="kept of an axis")
    p.add_argument("--depths", nargs="+", choices=DEPTHS, default=list(DEPTHS))
    p.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--windows", type=int, default=32, help="of calibration")
    p.add_argument("--few", type=int, default=8, help="of them, for orders of layers that take many passes")
    p.add_argument("--eval-windows", type=int, default=16)
    args = p.parse_args(argv)

    vocabulary = load_llama(args.llama).config.vocab_size
    train = Shards(args.data, "train", args.seq_len, vocabulary)
    x, y = train.windows(args.windows)
    val = Shards(args.text or args.data, "val", args.seq_len, vocabulary).windows(args.eval_windows)
    of_units = [axis for axis in AXES if axis != "n_layers" and axis in args.axes]
    orders = [(by, of_units) for by in args.units if of_units]
    orders += [(by, ["n_layers"]) for by in args.depths if "n_layers" in args.axes]
    for by, axes in orders:
        model = load_llama(args.llama)  # sorted in another order than the last one was
        layers = list(range(model.config.n_layers))
        start = time.process_time()
        if by in DEPTHS:
            layers = order_of_layers(model, by, x, y, args.few)
        else:
            batch = max(1, 4096 // args.seq_len)
            if by == "fisher":
                scores = fisher_scores(model, x, y)
            else:
                scores = (weighted_scores if by == "weighted" else activation_scores)(model, x, batch)
            sort_(model, unit_orders(model, scores))
        seconds = time.process_time() - start
        full = n_params(model.config, model.full)
        for axis in axes:
            for share in args.shares:
                subnet = cut(model, axis, share, layers)
                row = dict(by=by, axis=axis, share=share, cost=n_params(model.config, subnet) / full,
                           loss=evaluate(model, val, subnet)[0], seconds=round(seconds, 1))
                if axis == "n_layers":
                    row["order"] = layers
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_main(main)
