"""
Which channels, heads, neurons and layers matter, and the sorting that puts the best first.

A slice of the Llama (model.py) has the first units of each kind. So before any training, train.py
asks here how much each unit does on a little text (rank), and permutes the weights so that the
first units are the best ones (sort_). The model computes the same as before, and its slices are
good models to start from.

The score is the size of a unit's activation x, in fp32. LLaMaFlex Sec. 2.3 names it; the formula is
that of Minitron (arXiv 2407.14679), the same authors' earlier pruning:

    A = sqrt( sum over windows ( mean over positions |x| )^2 )

    |x|        the size, because a negative activation is not a small one
    mean       one window of text gives one number: how active the unit is there
    square     a window with much activity counts more than two with half of it each
    sum        over the calibration windows; the root changes the scale and no order

    neurons    x is the input of w2
    heads      x is the input of wo, taken as its L2 norm over head_dim. Heads are ranked inside
               their KV group and never leave it, because they are trained on its keys
    channels   x is the output of a norm. A is summed over all 2 n_layers + 1 norms, because the
               residual stream is one and has one order in the whole network
    layers     take away, again and again, the layer whose absence changes the logits least:
               sum (full - without)^2 / sum full^2, added up over batches of windows. The first
               to go is the worst. LLaMaFlex does not say how it orders layers. Block influence,
               1 - cos(input, output), is the cheap way; the two differ by .001 to .012 nats in the
               demo

    python train.py --units-by random --depth-by influence     another ranking than the default
    python -m pytest -q tests/test_importance.py               sorting changes nothing
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama, SubNet
from plumbing.parallel import bar, share, sum_over_ranks
from plumbing.rows import local, own_rows, whole
from space import random_generator

# -----------------------------------------------------------------------------
# scores of channels, heads and neurons


def listen(hook, modules, model: Llama, windows: Tensor, batch: int) -> None:
    """Runs the model on this rank's share of windows (S, T). Calls hook(module, x, y) every time one
    of the modules has run, with its input and output, (B, T, ...)."""
    mine, count = share(windows)
    counted = 0  # windows of a batch that are scored: share() may add one, for all ranks to run as many

    def call(module, inputs, output):
        hook(module, inputs[0][:counted], output[:counted])

    handles = [module.register_forward_hook(call) for module in modules]
    try:
        for tokens in bar(mine.split(batch), "ranking"):
            counted = min(len(tokens), count)
            count -= counted
            model.states(tokens)
    finally:
        for handle in handles:
            handle.remove()


def accumulate(total: Tensor | None, x: Tensor) -> Tensor:
    """Adds (mean over positions |x|)^2 of each window. x: (B, T, units). Returns (units,), fp32."""
    size = x.detach().float().abs()        # B, T, units
    activity = size.mean(1)                # B, units
    squares = activity.square().sum(0)     # units
    if total is None:
        return squares
    return total + squares


def listened_to(model: Llama) -> tuple[list, list, list]:
    """(norms, heads, neurons): the modules whose outputs are the activations x, from the first layer
    to the last. There are two norms a layer, and a last one."""
    norms, heads, neurons = [], [], []
    for block in model.layers:
        norms += [block.attention_norm, block.ffn_norm]
        heads.append(block.attention.heads)
        neurons.append(block.feed_forward.neurons)
    norms.append(model.norm)
    return norms, heads, neurons


@torch.no_grad()
def activation_scores(model: Llama, windows: Tensor, batch: int = 8) -> dict[str, list[Tensor]]:
    """A of every unit, from calibration windows (S, T), `batch` of them at a time.

    Returns lists: "dim" has (dim,) per norm, "n_heads" and "ffn_dim" have (units,) per layer.
    """
    norms, heads, neurons = listened_to(model)

    # every module adds up its own sum while the model runs
    head_dim = model.config.head_dim
    sums = {}

    def add(module, _, x):
        if module in heads:
            x = x.float().unflatten(-1, (-1, head_dim))   # B, T, n_heads, head_dim
            x = x.norm(dim=-1)                            # B, T, n_heads
        sums[module] = accumulate(sums.get(module), x)

    listen(add, norms + heads + neurons, model, windows, batch)
    scores = {module: sum_over_ranks(total).sqrt() for module, total in sums.items()}
    return dict(
        dim=[scores[module] for module in norms],
        n_heads=[scores[module] for module in heads],
        ffn_dim=[scores[module] for module in neurons],
    )


# -----------------------------------------------------------------------------
# orders of layers


def with_layers(model: Llama, layers: list[int]) -> SubNet:
    """The slice that has these layers only, each in full."""
    full = model.full
    n_heads = [full.n_heads[layer] for layer in layers]
    ffn_dim = [full.ffn_dim[layer] for layer in layers]
    return SubNet(full.dim, layers, n_heads, ffn_dim)


# The sum of the squares of all logits needs none of them: |W x|^2 = x' (W' W) x. Both products are in
# fp32, also where forwards run in bf16.


def gram_of(output: Tensor) -> Tensor:
    """W' W of the output matrix W, (vocab_size, dim) -> (dim, dim)."""
    output = output.float()
    with torch.autocast(output.device.type, enabled=False):
        return output.T @ output


def squared_logits(states: Tensor, gram: Tensor) -> Tensor:
    """The sum of the squares of all logits, (), of states x, (B, T, dim). gram: W' W, (dim, dim)."""
    with torch.autocast(states.device.type, enabled=False):
        return ((states @ gram) * states).sum()


@torch.no_grad()
def layers_by_logits(model: Llama, windows: Tensor, batch: int = 8) -> list[int]:
    """Layers, best first, by what their removal does to the logits on windows (S, T).

    The layer that does least goes, then the rest is judged again. (The criterion of Nemotron
    Elastic, a successor of LLaMaFlex.)
    That is about n_layers^2 / 6 forward passes: what runs before the removed layer is the same with
    and without it, and runs once.
    """
    gram = gram_of(model.output.weight)
    batches = [share(tokens) for tokens in windows.split(batch)]
    full = [model.states(mine)[:count].float() for mine, count in batches]
    kept = list(range(model.config.n_layers))
    removed = []
    passes = sum(range(2, len(kept) + 1)) * len(batches)
    progress = bar(name="ranking layers", total=passes)
    while len(kept) > 1:
        # the damage that each removal does, relative to the full model's logits
        damage = {}
        for (mine, count), before in zip(batches, full):
            size = sum_over_ranks(squared_logits(before, gram))
            x = model.tok_embeddings(mine)
            for i, layer in enumerate(kept):
                # x has passed the layers in front of this one: on without it to the end
                after = model.stream(x, with_layers(model, kept[i + 1:]))
                after = model.norm(after)[:count].float()
                change = sum_over_ranks(squared_logits(after - before, gram))
                damage[layer] = damage.get(layer, 0.0) + (change / size).item()
                x = model.stream(x, with_layers(model, [layer]))
                progress.update()
        worst = min(kept, key=damage.get)
        kept.remove(worst)
        removed.append(worst)
    progress.close()
    removed.reverse()  # the first to go is the worst
    return kept + removed


@torch.no_grad()
def layers_by_influence(model: Llama, windows: Tensor, batch: int = 8) -> list[int]:
    """Layers, best first, by block influence: 1 - cos(input, output), summed over all positions.

    A layer that hardly turns the residual stream does little. One pass over windows (S, T).
    """
    n_layers = model.config.n_layers
    influence = torch.zeros(n_layers, dtype=torch.float64, device=windows.device)

    def add(block, before, after):
        before = before.float()
        after = after.float()
        similar = F.cosine_similarity(before, after, dim=-1)   # B, T
        turned = (1 - similar).sum()
        influence[block.layer] += turned.double()

    listen(add, model.layers, model, windows, batch)
    sum_over_ranks(influence)
    order = influence.argsort(descending=True, stable=True)
    return order.tolist()


# -----------------------------------------------------------------------------
# ranking


def best_first(scores: Tensor) -> Tensor:
    """The order of units from the highest score to the lowest, along the last axis."""
    return scores.argsort(dim=-1, descending=True, stable=True).cpu()


def best_heads_first(scores: Tensor, groups: int) -> Tensor:
    """The order of heads inside each KV group, group after group. scores: (n_heads,)."""
    scores = scores.unflatten(0, (groups, -1))           # groups, heads in a group
    in_group = scores.size(1)
    first = torch.arange(groups)[:, None] * in_group     # a group's first head
    order = first + best_first(scores)                   # groups, heads in a group
    return order.flatten()                               # n_heads


def unit_orders(model: Llama, scores: dict[str, list[Tensor]]) -> dict:
    """The orders of channels, neurons and heads, best first, from their scores: see rank()."""
    orders = {}
    # channels: one order from the sum over all norms
    channels = torch.stack(scores["dim"]).sum(0)
    orders["dim"] = best_first(channels)
    # neurons: an order for each layer
    orders["ffn_dim"] = [best_first(s) for s in scores["ffn_dim"]]
    # heads: an order for each layer, inside the KV groups
    orders["n_heads"] = []
    for block, s in zip(model.layers, scores["n_heads"]):
        order = best_heads_first(s, block.attention.groups)
        orders["n_heads"].append(order)
    return orders


def yardstick(units: str, scores: Tensor, generator: torch.Generator) -> Tensor:
    """Scores for an order that the real one has to beat: a random one, or the worst first."""
    if units == "random":
        return torch.rand(scores.shape, generator=generator)
    assert units == "reversed", f"units {units!r}; expected activation, random or reversed"
    return -scores


def rank(
    model: Llama,
    windows: Tensor,
    depth: str = "logits",
    units: str = "activation",
    seed: int = 0,
) -> dict:
    """The order of all units, best first, from calibration windows (S, T) that no evaluation sees.

    depth: "logits" or "influence". units: "activation", or a yardstick for it, "random" (drawn by
    seed) or "reversed". Returns indices: "dim" is (dim,), "ffn_dim" and "n_heads" have (units,) per
    layer (heads group after group, and inside their group), "layers" is a list.
    """
    T = windows.size(1)
    batch = max(1, 4096 // T)
    scores = activation_scores(model, windows, batch)
    if units != "activation":
        generator = random_generator("units", seed)
        for axis, of_axis in scores.items():
            scores[axis] = [yardstick(units, s, generator) for s in of_axis]

    orders = unit_orders(model, scores)
    # layers: only a few of the windows for the logits, because n_layers^2 / 6 passes read them
    if depth == "logits":
        few = min(len(windows), max(2, 2048 // T))
        spread = [k * len(windows) // few for k in range(few)]
        orders["layers"] = layers_by_logits(model, windows[spread], batch)
    else:
        assert depth == "influence", f"depth {depth!r}; expected logits or influence"
        orders["layers"] = layers_by_influence(model, windows, batch)
    return orders


# -----------------------------------------------------------------------------
# sorting
#
# Why sorting changes nothing. The units lie between two matrices: rows of one make them, columns
# of the next read them. Here are neurons a b c between w1 and w2, and the same in the order c a b:
#
#          w1           w2                      w1           w2
#      a [.....]     a b c                  c [.....]     c a b
#      b [.....]   [ . . . ]                a [.....]   [ . . . ]
#      c [.....]   [ . . . ]                b [.....]   [ . . . ]
#
# w2 sums over the neurons, and a sum in another order is the same sum, up to rounding. Heads lie
# between wq and wo in this way. Channels lie between all that writes the residual stream and all
# that reads it.


def permute_(weight: Tensor, order: Tensor, axis: int) -> None:
    """Puts the rows (axis 0) or columns (axis 1) of a weight in this order, in place. All ranks must
    ask: a weight that is split over them is put together and split again."""
    order = order.to(weight.device)
    in_order = whole(weight).index_select(axis, order)
    local(weight).copy_(in_order[own_rows(weight)])


@torch.no_grad()
def sort_(model: Llama, orders: dict) -> None:
    """Permutes the model in place so that the first k units are the best k. orders: from rank().

    The model computes the same as before. Layers stay where they are: a slice names those it keeps.
    """
    # channels outside of the blocks
    channels = orders["dim"]
    permute_(model.tok_embeddings.weight, channels, 1)
    if not model.config.tied:  # tied: one tensor, permuted once
        permute_(model.output.weight, channels, 1)
    permute_(model.norm.weight, channels, 0)

    for block, heads, neurons in zip(model.layers, orders["n_heads"], orders["ffn_dim"]):
        attention = block.attention
        mlp = block.feed_forward

        # channels: columns read the residual stream, rows write it
        permute_(block.attention_norm.weight, channels, 0)
        permute_(block.ffn_norm.weight, channels, 0)
        for reader in (attention.wq, attention.wk, attention.wv, mlp.w1, mlp.w3):
            permute_(reader.weight, channels, 1)
        for writer in (attention.wo, mlp.w2):
            permute_(writer.weight, channels, 0)

        # heads: each is head_dim rows of wq and head_dim columns of wo
        first = heads[:, None] * attention.head_dim           # n_heads, 1: a head's first row
        rows = first + torch.arange(attention.head_dim)       # n_heads, head_dim
        rows = rows.flatten()
        permute_(attention.wq.weight, rows, 0)
        permute_(attention.wo.weight, rows, 1)
        if attention.n_heads == attention.n_kv_heads:  # MHA: the KV head goes with its query head
            permute_(attention.wk.weight, rows, 0)
            permute_(attention.wv.weight, rows, 0)

        # neurons: rows of w1 and w3, columns of w2
        permute_(mlp.w1.weight, neurons, 0)
        permute_(mlp.w3.weight, neurons, 0)
        permute_(mlp.w2.weight, neurons, 1)
