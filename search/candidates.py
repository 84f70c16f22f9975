"""
What the search chooses among: smaller Llamas inside a Llama, each of which meets the budget.

A `SubNet` says how many heads and neurons each kept layer has. A `Candidate` also says which ones.
A candidate becomes a slice by sorting: arranged() copies the model and puts first what is kept.
So a candidate runs, is cut out and is written as any other slice.

A candidate meets its budget by repair, never by rejection. A mutation or a crossover may make
anything. Bounds.repaired() then takes it to the budget from below, to the last neuron. With one
size for all layers, neurons come in multiples that runtimes like (neuron_unit below), and the
budget is met from below to the last multiple in each layer.

The ranges of sizes are those of Shen et al., "Search for Efficient Large Language Models" (NeurIPS
2024). `python -m search` runs it all.
"""
import copy
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from export import fold
from importance import sort_
from model import Llama, LlamaConfig, SubNet
from plumbing.checkpoint import matrix_dtype
from plumbing.errors import fail
from space import cost, kv_groups, n_params, random_generator

# -----------------------------------------------------------------------------
# a candidate


class Candidate(NamedTuple):
    """What is kept, as masks over the whole network.

    All KV groups of a layer keep equally many heads. A left-out layer remembers its masks."""
    layers: torch.Tensor   # (n_layers,) bool
    heads: torch.Tensor    # (n_layers, n_heads) bool, group-major as the rows of wq
    neurons: torch.Tensor  # (n_layers, ffn_dim) bool

    def key(self) -> str:
        """A name for the network that this is. What left-out layers remember does not count."""
        heads = self.heads[self.layers]
        neurons = self.neurons[self.layers]
        digest = hashlib.blake2b(digest_size=12)
        for mask in (self.layers, heads, neurons):
            digest.update(mask.numpy().tobytes())
        return digest.hexdigest()

    def subnet(self, config: LlamaConfig) -> SubNet:
        """The candidate's shape."""
        layers = self.layers.nonzero()[:, 0]                 # indices of the kept ones
        n_heads = self.heads[self.layers].sum(1)             # per kept layer
        n_neurons = self.neurons[self.layers].sum(1)
        return SubNet(config.dim, layers.tolist(), n_heads.tolist(), n_neurons.tolist())


def kept_first(kept: torch.Tensor) -> torch.Tensor:
    """The order of units (..., units) that puts the kept ones first and changes nothing else."""
    return (~kept).byte().argsort(dim=-1, stable=True)


def arranged(model: Llama, c: Candidate) -> Llama:
    """A copy of the model, sorted: what the candidate keeps comes first, its SubNet is a slice."""
    config = model.config
    groups = kv_groups(config)
    in_group = config.n_heads // groups
    first_heads = torch.arange(groups)[:, None] * in_group   # groups, 1: where each group begins
    channels = torch.arange(config.dim)                      # the stream stays as it is
    head_orders = []
    neuron_orders = []
    for heads, neurons in zip(c.heads, c.neurons):
        inside = kept_first(heads.view(groups, in_group))    # groups, in_group
        head_orders.append((first_heads + inside).flatten())
        neuron_orders.append(kept_first(neurons))
    copied = copy.deepcopy(model)
    sort_(copied, {"dim": channels, "n_heads": head_orders, "ffn_dim": neuron_orders})
    return copied


def cut_out(model: Llama, c: Candidate) -> Llama:
    """The candidate as a Llama of its own, in the model's dtype."""
    subnet = c.subnet(model.config)
    dtype = matrix_dtype(model)
    state = fold(arranged(model, c), subnet, dtype=dtype)
    return Llama.from_state(subnet.config(model.config), state)


# -----------------------------------------------------------------------------
# the budget


def neuron_unit(config: LlamaConfig) -> int:
    """Neurons come in multiples of this where all layers have one size: llama.cpp's K-quants take
    rows in multiples of 256, its Q8_0 and Q4_0 of 32. The larger, if a layer holds eight of it;
    in toys, 1."""
    for unit in (256, 32):
        if config.ffn_dim >= 8 * unit:
            return unit
    return 1


def fewest(config: LlamaConfig, uniform: bool = False) -> tuple[int, int, int]:
    """The fewest layers, heads and neurons of a candidate: half, one per KV group, a tenth.

    uniform: one size for all layers, so neurons are a multiple of neuron_unit()."""
    layers = (config.n_layers + 1) // 2
    heads = kv_groups(config)
    unit = neuron_unit(config) if uniform else 1
    neurons = -(-config.ffn_dim // (10 * unit)) * unit       # rounded up
    return layers, heads, neurons


def check_budget(config: LlamaConfig, budget: float, uniform: bool = False) -> None:
    """fail() where no candidate meets the budget."""
    layers, heads, neurons = fewest(config, uniform)
    subnet = SubNet.uniform(config.dim, range(layers), heads, neurons)
    smallest = cost(config, subnet)
    possible = max(0.5, smallest + 5e-5)                     # it is printed with four digits
    if not smallest <= budget <= 1:                          # NaN too
        fail(f"budget {budget:g} found; expected a fraction of the full model between its smallest "
             f"sub-network, {smallest:.4f} ({layers} layers, {heads} heads, {neurons} neurons), "
             f"and 1; try --budget {possible:.4f}")


def places(scores: torch.Tensor) -> torch.Tensor:
    """The place of every unit in the order of its scores (..., units): 0 for the worst."""
    worst_first = scores.argsort(dim=-1, stable=True)
    return worst_first.argsort(dim=-1)                       # the inverse permutation


def pick(mask: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """The index of one of the True entries of a mask (n,), drawn at random."""
    indices = mask.nonzero()[:, 0]
    i = torch.randint(len(indices), (), generator=rng)
    return indices[i]


@dataclass
class Bounds:
    """What candidates are made of, and how they are made to meet the budget.

    Its methods describe sizes by three tensors (n_layers,):
      layers   bool: is it kept?
      heads    int64: how many query heads in each KV group
      neurons  int64: how many neurons"""
    config: LlamaConfig
    budget: float
    heads: torch.Tensor         # (n_layers, n_heads): places by score inside the KV group
    neurons: torch.Tensor       # (n_layers, ffn_dim): places by score inside the layer
    uniform: bool = False       # one size for all layers

    def __post_init__(self):
        full = n_params(self.config, SubNet.full(self.config))
        self.limit = int(self.budget * full * (1 + 1e-12))   # parameters
        self.groups = kv_groups(self.config)
        self.in_group = self.config.n_heads // self.groups   # query heads in each KV group
        self.fewest_layers, _, self.fewest_neurons = fewest(self.config, self.uniform)

    @classmethod
    def from_scores(cls, config: LlamaConfig, budget: float, scores, uniform=False) -> "Bounds":
        """scores: of heads (n_layers, n_heads) and neurons (n_layers, ffn_dim), larger is better."""
        of_heads, of_neurons = scores
        of_heads = of_heads.unflatten(1, (kv_groups(config), -1))   # n_layers, groups, in_group
        heads = places(of_heads).flatten(1)                         # n_layers, n_heads
        neurons = places(of_neurons)
        return cls(config, budget, heads, neurons, uniform)

    def fewest_drawn(self) -> tuple[int, int]:
        """The fewest heads per KV group, and neurons, that a mutation draws.

        The paper's ratios begin at .8 (attention) and .4 (MLP) for 80 %, at .6 and .1 for 50 %.
        Ours pass through these: for attention on a straight line, for the MLP on a steeper one that
        ends at the tenth of fewest_neurons. To meet the budget there may be fewer."""
        of_heads = (2 * self.budget + 0.8) / 3
        of_neurons = 2 * self.budget - 1.2
        heads = int(of_heads * self.in_group)
        neurons = round(of_neurons * self.config.ffn_dim)
        return max(1, heads), max(self.fewest_neurons, neurons)

    # ---- is there room?

    def room(self, layers, heads) -> int:
        """Neurons that the budget leaves room for, in all kept layers together."""
        c = self.config
        queries = heads[layers] * self.groups                # query heads of each kept layer
        keys = queries.clamp(max=c.n_kv_heads)               # MHA: a KV head per query head
        n_heads = (queries + keys).sum().item()
        n_norms = 1 + 2 * layers.sum().item()
        spent = 2 * c.dim * c.head_dim * n_heads + c.dim * n_norms
        return (self.limit - spent) // (3 * c.dim)

    def too_large(self, layers, heads) -> bool:
        """Are even the fewest neurons in every kept layer too many?"""
        least = self.fewest_neurons * layers.sum().item()
        return self.room(layers, heads) < least

    def too_small(self, layers, heads) -> bool:
        """Would all neurons of every kept layer leave some of the budget unused?"""
        most = self.config.ffn_dim * layers.sum().item()
        return self.room(layers, heads) > most

    # ---- sizes that meet the budget

    def shrink_(self, layers, heads, rng) -> None:
        """In place: each KV group of one layer (uniform: of all) loses a head, or else a layer goes."""
        droppable = layers & (heads > 1)
        if not droppable.any():
            layers[pick(layers, rng)] = False
        elif self.uniform:
            heads[heads > 1] -= 1
        else:
            heads[pick(droppable, rng)] -= 1

    def grow_(self, layers, heads, rng) -> bool:
        """In place, the other way round. False: everything is kept already."""
        growing = layers & (heads < self.in_group)
        if growing.any() and self.uniform:
            heads[heads < self.in_group] += 1
        elif growing.any():
            heads[pick(growing, rng)] += 1
        elif not layers.all():
            layers[pick(~layers, rng)] = True
        else:
            return False
        return True

    def afford_(self, layers, heads, rng) -> None:
        """In place: changes layers and heads until the neurons can do the rest."""
        while layers.sum() < self.fewest_layers:
            layers[pick(~layers, rng)] = True
        while self.too_large(layers, heads):
            self.shrink_(layers, heads, rng)
        while self.too_small(layers, heads):
            layers_before = layers.clone()
            heads_before = heads.clone()
            if not self.grow_(layers, heads, rng):
                break
            if self.too_large(layers, heads):                # one step too far
                layers.copy_(layers_before)
                heads.copy_(heads_before)
                break

    def share(self, neurons: torch.Tensor, total: int) -> torch.Tensor:
        """Neurons per kept layer (n,), scaled by one factor and clamped, that add up to `total`."""
        low = self.fewest_neurons
        high = self.config.ffn_dim
        total = min(total, high * len(neurons))
        if self.uniform:
            size = total // len(neurons)
            if size < high:                                  # all of them are what the source has
                size -= size % neuron_unit(self.config)
            return torch.full_like(neurons, size)
        # Bisection for the factor: the sum grows with it.
        least = 0.0
        most = high / neurons.min().item()
        for _ in range(60):
            factor = (least + most) / 2
            scaled = (neurons.double() * factor).clamp(low, high)
            if scaled.sum() < total:
                least = factor
            else:
                most = factor
        # Rounding down leaves some neurons over: one each, to the layers that lost most by it.
        sizes = scaled.floor().long()
        order = (scaled - sizes).argsort(descending=True, stable=True).tolist()
        for i in order + order:
            if sizes[i] < high and sizes.sum() < total:
                sizes[i] += 1
        return sizes

    # ---- candidates

    def repaired(self, c: Candidate, rng, heads=None, neurons=None) -> Candidate:
        """The candidate, changed as little as meets the budget.

        heads, neurons: the sizes to start from (default: the candidate's own). A layer that grows
        takes the best units that are out. One that shrinks drops the worst that are in."""
        layers = c.layers.clone()
        if heads is None:
            heads = c.heads.sum(1) // self.groups
        if neurons is None:
            neurons = c.neurons.sum(1)
        heads = heads.clone()
        neurons = neurons.clone()
        if self.uniform:                                     # all layers as one of them
            i = torch.randint(len(heads), (), generator=rng)
            heads[:] = heads[i].item()
        # sizes first
        self.afford_(layers, heads, rng)
        neurons[layers] = self.share(neurons[layers], self.room(layers, heads))
        # then the units
        head_rows = []
        neuron_rows = []
        for i in range(len(layers)):
            kept = c.heads[i].view(self.groups, -1)          # groups, in_group
            place = self.heads[i].view(self.groups, -1)
            row = resized(kept, place, heads[i].item())
            head_rows.append(row.flatten())
            row = resized(c.neurons[i], self.neurons[i], neurons[i].item())
            neuron_rows.append(row)
        return Candidate(layers, torch.stack(head_rows), torch.stack(neuron_rows))

    def start(self) -> Candidate:
        """The best units at the same ratio in all layers.

        Heads come as near to the budget as whole ones can, neurons do the rest."""
        n_layers = self.config.n_layers
        whole = Candidate(torch.ones(n_layers, dtype=torch.bool),
                          torch.ones_like(self.heads, dtype=torch.bool),
                          torch.ones_like(self.neurons, dtype=torch.bool))
        nearest = int(self.budget * self.in_group + 0.5)
        heads = torch.full((n_layers,), max(1, nearest))
        return self.repaired(whole, random_generator("start"), heads)

    def scrambled(self, c: Candidate, rng) -> Candidate:
        """The sizes of a candidate with units drawn at random: what is the score worth?"""
        in_groups = c.heads.unflatten(1, (self.groups, -1))  # n_layers, groups, in_group
        heads = shuffled(in_groups, rng).flatten(1)
        neurons = shuffled(c.neurons, rng)
        return Candidate(c.layers, heads, neurons)


# -----------------------------------------------------------------------------
# masks

SWAPPED = 0.1  # swapped() exchanges this share of the kept or dropped units, whichever are fewer


def resized(kept: torch.Tensor, place: torch.Tensor, n: int) -> torch.Tensor:
    """A mask (..., units) with n units: the best of those that are in, then of those that are out.

    place: 0 for the worst unit."""
    units = place.size(-1)
    rank = torch.where(kept, place + units, place)           # all inside before all outside
    best = rank.topk(n, dim=-1).indices
    nothing = torch.zeros_like(kept)
    return nothing.scatter(-1, best, True)


def swapped(kept: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A mask (units,) with a share of its units exchanged for as many others, drawn at random."""
    inside = kept.nonzero()[:, 0]
    outside = (~kept).nonzero()[:, 0]
    fewer = min(len(inside), len(outside))
    n = max(1, round(SWAPPED * fewer))
    n = min(n, fewer)                                        # none, if one side is empty
    leave = torch.randperm(len(inside), generator=rng)[:n]
    enter = torch.randperm(len(outside), generator=rng)[:n]
    kept = kept.clone()
    kept[inside[leave]] = False
    kept[outside[enter]] = True
    return kept


def shuffled(kept: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A mask (..., units) with as many units in every row, others."""
    order = torch.rand(kept.shape, generator=rng).argsort(dim=-1)
    return kept.gather(-1, order)
