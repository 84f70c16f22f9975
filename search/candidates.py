"""
What search.py searches among: smaller Llamas inside a Llama, each of which meets the budget.

A `SubNet` says how many heads and neurons each kept layer has; a `Candidate` also says which ones. It becomes a SubNet
by sorting: a copy of the model with what is kept first. So it runs, is cut and is written as any other slice.

A budget is met by repair, never by rejection: whatever mutation or crossover made, `Bounds.repaired` takes it to the
budget from below, to the last neuron (with one size for all layers: to the last neuron in each).
"""
import copy
import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

from export import fold
from importance import sort_
from model import Llama, LlamaConfig, SubNet
from space import cost, kv_groups, n_params, random_generator
from plumbing.errors import fail

# -----------------------------------------------------------------------------
# a candidate


class Candidate(NamedTuple):
    """What is kept, as masks over the whole network. Layers that are left out remember theirs."""
    layers: torch.Tensor   # (n_layers,) bool
    heads: torch.Tensor    # (n_layers, n_heads) bool, group-major as the rows of wq, as many in each KV group
    neurons: torch.Tensor  # (n_layers, ffn_dim) bool

    def key(self) -> str:
        """A name for the network this is: what left-out layers remember does not count."""
        masks = self.layers, self.heads[self.layers], self.neurons[self.layers]
        return hashlib.blake2b(b"".join(m.numpy().tobytes() for m in masks), digest_size=12).hexdigest()

    def subnet(self, config: LlamaConfig) -> SubNet:
        """Its shape."""
        return SubNet(config.dim, self.layers.nonzero()[:, 0].tolist(), self.heads[self.layers].sum(1).tolist(),
                      self.neurons[self.layers].sum(1).tolist())


def arranged(model: Llama, c: Candidate) -> Llama:
    """A copy of the model, sorted so that what the candidate keeps comes first: its SubNet is a slice of that."""
    first = lambda kept: (~kept).byte().argsort(stable=True)
    groups = lambda kept: kept.view(kv_groups(model.config), -1)
    heads = [(first_in + torch.arange(len(first_in))[:, None] * first_in.size(1)).flatten()
             for first_in in (torch.stack([first(row) for row in groups(kept)]) for kept in c.heads)]
    model = copy.deepcopy(model)
    sort_(model, dict(dim=torch.arange(model.config.dim), n_heads=heads, ffn_dim=[first(kept) for kept in c.neurons]))
    return model


def slim(model: Llama, c: Candidate) -> Llama:
    """The candidate as a Llama of its own."""
    subnet = c.subnet(model.config)
    with torch.device("meta"):
        small = Llama(subnet.config(model.config))
    small.load_state_dict(fold(arranged(model, c), subnet, None, model.norm.weight.dtype), assign=True)
    small.tie()
    return small


# -----------------------------------------------------------------------------
# the budget


def fewest(config: LlamaConfig) -> tuple[int, int, int]:
    """The fewest layers, query heads and neurons that a candidate has: half, one per KV group, a tenth."""
    return (config.n_layers + 1) // 2, kv_groups(config), -(-config.ffn_dim // 10)


def check_budget(config: LlamaConfig, budget: float) -> None:
    """fail() where no candidate meets the budget."""
    layers, heads, neurons = fewest(config)
    smallest = cost(config, SubNet.uniform(config.dim, range(layers), heads, neurons))
    if not smallest <= budget <= 1:
        fail(f"budget {budget:g} found; expected a fraction of the full model between its smallest sub-network, "
             f"{smallest:.4f} ({layers} layers, {heads} heads, {neurons} neurons), and 1; try --budget "
             f"{max(0.5, smallest + 5e-5):.4f}")


@dataclass
class Bounds:
    """What candidates are made of, and how they are made to meet the budget."""
    config: LlamaConfig
    budget: float
    heads: torch.Tensor         # (n_layers, n_heads), (n_layers, ffn_dim): places by score, inside the KV group or
    neurons: torch.Tensor       # layer, 0 for the worst
    uniform: bool = False       # one size for all layers

    def __post_init__(self):
        c = self.config
        self.groups, self.limit = kv_groups(c), int(self.budget * n_params(c, SubNet.full(c)) * (1 + 1e-12))
        self.in_group = c.n_heads // self.groups
        self.fewest_layers, _, self.fewest_neurons = fewest(c)

    @classmethod
    def of(cls, model: Llama, budget: float, scores, uniform: bool = False) -> "Bounds":
        """From the scores of heads and neurons."""
        places = lambda s: s.argsort(dim=-1, stable=True).argsort(dim=-1)
        heads = places(scores[0].unflatten(1, (kv_groups(model.config), -1))).flatten(1)
        return cls(model.config, budget, heads, places(scores[1]), uniform)

    def ranges(self) -> tuple[int, int]:
        """The fewest heads per KV group and neurons that a mutation draws: lines through the paper's .8 and .4 at 80 %,
        .6 and .1 at 50 %. (To meet the budget there may be fewer.)"""
        least = max(self.fewest_neurons, round((2 * self.budget - 1.2) * self.config.ffn_dim))
        return max(1, int((2 * self.budget + 0.8) / 3 * self.in_group)), least

    # sizes: per layer, is it kept (n_layers,), heads in each KV group (n_layers,), neurons (n_layers,): int64

    def left(self, layers, heads) -> int:
        """Neurons that the budget leaves room for, over all kept layers, beside these heads."""
        c = self.config
        q = heads[layers] * self.groups
        attention = (2 * c.dim * c.head_dim * (q + q.clamp(max=c.n_kv_heads))).sum().item()
        return (self.limit - c.dim - attention - 2 * c.dim * int(layers.sum())) // (3 * c.dim)

    def afford(self, layers, heads, rng) -> None:
        """In place: drops heads, then layers, until the budget leaves room for the fewest neurons; or adds heads, then
        layers, until all neurons together reach it."""
        def pick(mask):
            which = mask.nonzero()[:, 0]
            return which[torch.randint(len(which), (), generator=rng)]

        while layers.sum() < self.fewest_layers:
            layers[pick(~layers)] = True
        while self.left(layers, heads) < self.fewest_neurons * layers.sum():
            if (droppable := layers & (heads > 1)).any():
                heads[heads > 1 if self.uniform else pick(droppable)] -= 1
            else:
                layers[pick(layers)] = False
        while self.left(layers, heads) > self.config.ffn_dim * layers.sum():
            then = layers.clone(), heads.clone()
            if (growing := layers & (heads < self.in_group)).any():
                heads[heads < self.in_group if self.uniform else pick(growing)] += 1
            elif not layers.all():
                layers[pick(~layers)] = True
            else:
                break
            if self.left(layers, heads) < self.fewest_neurons * layers.sum():  # too large a step: stay below the budget
                layers[:], heads[:] = then
                break

    def share(self, neurons, total: int) -> torch.Tensor:
        """Neurons per kept layer (n,) scaled by one factor, within bounds, so that they add up to `total`."""
        low, high, n = self.fewest_neurons, self.config.ffn_dim, len(neurons)
        total = min(total, high * n)
        if self.uniform:
            return torch.full_like(neurons, total // n)
        least, most = 0.0, high / neurons.min().item()
        for _ in range(60):  # bisection for the factor
            factor = (least + most) / 2
            scaled = (neurons.double() * factor).clamp(low, high)
            least, most = (factor, most) if scaled.sum() < total else (least, factor)
        sizes = scaled.floor().long()
        for i in (scaled - sizes).argsort(descending=True, stable=True).tolist() * 2:  # what rounding left over
            sizes[i] += min(1, high - sizes[i].item(), max(0, total - sizes.sum().item()))
        return sizes

    def repaired(self, c: Candidate, rng, heads=None, neurons=None) -> Candidate:
        """The candidate of these sizes (default: its own), changed as little as meets the budget. Where a layer gets
        larger it takes the best units that are out, smaller it lets go of the worst that are in."""
        layers = c.layers.clone()
        heads = (c.heads.sum(1) // self.groups if heads is None else heads).clone()
        neurons = (c.neurons.sum(1) if neurons is None else neurons).clone()
        if self.uniform:
            heads[:] = heads[torch.randint(len(heads), (), generator=rng)]
        self.afford(layers, heads, rng)
        neurons[layers] = self.share(neurons[layers], self.left(layers, heads))
        rows = [resized(kept.view(self.groups, -1), place.view(self.groups, -1), n)
                for kept, place, n in zip(c.heads, self.heads, heads.tolist())]
        return Candidate(layers, torch.stack(rows).flatten(1),
                         torch.stack([resized(*row) for row in zip(c.neurons, self.neurons, neurons.tolist())]))

    def start(self) -> Candidate:
        """The best units at the same ratio in all layers: heads as near to the budget as whole ones get, neurons to
        meet it."""
        c = self.config
        whole = Candidate(torch.ones(c.n_layers, dtype=torch.bool), torch.ones_like(self.heads, dtype=torch.bool),
                          torch.ones_like(self.neurons, dtype=torch.bool))
        heads = torch.full((c.n_layers,), max(1, int(self.budget * self.in_group + 0.5)))
        return self.repaired(whole, random_generator("start"), heads)

    def scrambled(self, c: Candidate, rng) -> Candidate:
        """The sizes of a candidate with units drawn at random: what the score is worth."""
        shuffled = lambda kept: kept.gather(-1, torch.rand(kept.shape, generator=rng).argsort(dim=-1))
        heads = shuffled(c.heads.unflatten(1, (self.groups, -1))).flatten(1)
        return Candidate(c.layers, heads, shuffled(c.neurons))


# -----------------------------------------------------------------------------
# masks


SWAPPED = 0.1  # share of the units that swapped() exchanges, of those kept or those dropped, whichever are fewer


def resized(kept: torch.Tensor, place: torch.Tensor, n: int) -> torch.Tensor:
    """A mask (..., units) with n units: those that are in, best first, then those that are out, best first."""
    best = (place + kept * place.size(-1)).topk(n, dim=-1).indices
    return torch.zeros_like(kept).scatter(-1, best, True)


def swapped(kept: torch.Tensor, rng) -> torch.Tensor:
    """A mask (units,) with a share of the kept ones exchanged for as many of the others, all drawn at random."""
    kept, inside, outside = kept.clone(), kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
    fewer = min(len(inside), len(outside))
    n = min(fewer, max(1, round(SWAPPED * fewer)))
    kept[inside[torch.randperm(len(inside), generator=rng)[:n]]] = False
    kept[outside[torch.randperm(len(outside), generator=rng)[:n]]] = True
    return kept
