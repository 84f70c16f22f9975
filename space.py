"""
What there is to choose from: sizes per axis, all their combinations, and what each of them costs.

A budget is a fraction of the full model's non-embedding parameters (the paper's #Params). The sub-networks of
LLaMaFlex are uniform, so one size per axis names one: width, query heads, MLP neurons, depth. All combinations are a
few thousand, or ten times that: their exact costs are a table, and the members that a budget can buy are a look-up,

    F(b) = {a : b - delta < cost(a) <= b}

    python -c "from space import *; s = Space(LlamaConfig()); print(s.subnet(s.members[s.feasible(0.5)[0]]))"
"""
import hashlib
import itertools
import math

import torch

from model import Gates, LlamaConfig, SubNet
from plumbing.errors import fail

AXES = ("dim", "n_heads", "ffn_dim", "n_layers")


def random_generator(*parts) -> torch.Generator:
    """A generator whose stream is a function of its arguments (seed, step, budget ...) alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


# -----------------------------------------------------------------------------
# cost and choices


def n_params(config: LlamaConfig, subnet: SubNet, embeddings: bool = False) -> int:
    """Parameters of a slice without tok_embeddings and output (the paper's #Params), or with them."""
    c = subnet.config(config)
    total = c.dim  # the final norm
    for h, kv, f in zip(c.per_layer("n_heads"), c.per_layer("n_kv_heads"), c.per_layer("ffn_dim")):
        total += c.dim * (2 * c.head_dim * (h + kv) + 3 * f + 2)
    return total + embeddings * (1 if c.tied else 2) * c.vocab_size * c.dim


def cost(config: LlamaConfig, subnet: SubNet) -> float:
    """n_params of the slice as a fraction of the full model's: what a budget bounds."""
    return n_params(config, subnet) / n_params(config, SubNet.full(config))


def train_flops(config: LlamaConfig, seq_len: int, share: float = 1.0) -> float:
    """FLOPs of a training pass per token when a share of the blocks runs: 6 per parameter (the embedding's look-up is
    none), and 6 * layers * heads * head_dim * T for causal attention."""
    attention = sum(config.per_layer("n_heads")) * config.head_dim * seq_len
    return 6 * (share * (n_params(config, SubNet.full(config)) + attention) + config.vocab_size * config.dim)


def kv_groups(config: LlamaConfig) -> int:
    """Groups that query heads cannot leave: one per KV head; in MHA, where KV heads come along, a single one."""
    return config.n_kv_heads if config.n_heads > config.n_kv_heads else 1


def choices_for(config: LlamaConfig, asked: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    """The sizes to choose from on each axis, ascending, the full one among them; `asked` replaces an axis.

    Default: width from all to half, MLP from all to a quarter, heads per KV group from all to one, depth from all to
    half; width and MLP in at most 12 steps of a multiple of 256 (real shapes) or head_dim (toys). ValueError: a size
    that is no slice of this shape."""
    if any(not isinstance(getattr(config, axis), int) for axis in AXES):
        raise ValueError("this Llama has another shape in every layer; expected a uniform one, such as its source")
    unit = 256 if config.dim >= 1024 else config.head_dim
    groups = kv_groups(config)

    def down_to(full: int, smallest: float) -> range:
        step = unit * max(1, math.ceil(full * (1 - smallest) / (12 * unit)))
        return range(full, int(full * smallest) - 1, -step)

    choices = {"dim": down_to(config.dim, 0.5), "n_heads": range(groups, config.n_heads + 1, groups),
               "ffn_dim": down_to(config.ffn_dim, 0.25),
               "n_layers": range((config.n_layers + 1) // 2, config.n_layers + 1)} | (asked or {})
    for axis in AXES:
        full, unit = getattr(config, axis), groups if axis == "n_heads" else 1
        for size in choices[axis]:
            if not 0 < size <= full or size % unit:
                raise ValueError(f"{axis} {size} does not fit this Llama; expected sizes up to {full} in multiples "
                                 f"of {unit}; change --{axis.replace('_', '-')}-choices")
    return {axis: sorted({*choices[axis], getattr(config, axis)}) for axis in AXES}


# -----------------------------------------------------------------------------
# the table


class Space:
    """All combinations of choices as a table: sizes `members` (M, 4), the same as one-hot choices `onehot`
    (M, sum of choices), and exact `costs` (M,). layer_order: which layers to keep, best first."""

    def __init__(self, config: LlamaConfig, choices: dict | None = None, layer_order: list[int] | None = None,
                 delta: float = 0.05):
        self.config, self.delta, self.full = config, delta, SubNet.full(config)
        self.choices = choices_for(config, choices)
        self.members = torch.tensor(list(itertools.product(*(self.choices[axis] for axis in AXES))))
        self.onehot = torch.cat([self.members[:, i, None] == torch.tensor(self.choices[axis])
                                 for i, axis in enumerate(AXES)], dim=1).float()
        self.order_layers(layer_order or list(range(config.n_layers)))
        dim, heads, ffn, layers = self.members.double().T  # cost() of every row, at once
        per_layer = dim * (2 * config.head_dim * (heads + heads.clamp(max=config.n_kv_heads)) + 3 * ffn + 2)
        self.costs = (layers * per_layer + dim) / n_params(config, self.full)

    def order_layers(self, layer_order: list[int]) -> None:
        """Sets the order in which layers are kept, and the prefix masks: per axis (choices, units), 1 where a
        choice keeps a unit."""
        self.layer_order, c = list(layer_order), self.config
        in_group = c.n_heads // kv_groups(c)
        rank = {"dim": torch.arange(c.dim), "n_heads": torch.arange(c.n_heads) % in_group * kv_groups(c),
                "ffn_dim": torch.arange(c.ffn_dim), "n_layers": torch.tensor(self.layer_order).argsort()}
        self.masks = [(rank[axis] < torch.tensor(self.choices[axis])[:, None]).float() for axis in AXES]

    def subnet(self, sizes) -> SubNet:
        """(dim, n_heads, ffn_dim, n_layers) -> SubNet: the best layers, the first units of every other axis."""
        dim, n_heads, ffn_dim, n_layers = (int(size) for size in sizes)
        return SubNet.uniform(dim, self.layer_order[:n_layers], n_heads, ffn_dim)

    def sizes(self, subnet: SubNet) -> tuple[int, int, int, int]:
        """Inverse of subnet()."""
        return subnet.dim, subnet.n_heads[0], subnet.ffn_dim[0], len(subnet.layers)

    def feasible(self, budget: float, costs: torch.Tensor | None = None) -> torch.Tensor:
        """F(b) as rows of the table; never empty: without a member within delta, the largest that fits. b = 1 is the
        full network. costs: (M,) in another currency than parameters, such as the latencies of latency.py."""
        costs = self.costs if costs is None else costs
        if not 0 < budget <= 1:
            fail(f"budget {budget:g} found, expected a fraction of the full model in (0, 1]; try --budget 0.5")
        if budget == 1:
            return self.costs.argmax()[None]
        fits, smallest = costs <= budget, costs.min().item()
        if not fits.any():
            fail(f"budget {budget:g} is below the smallest sub-network, {smallest:.4f} of the full model; ask for "
                 f"--budget {smallest + 5e-5:.4f} or more, or train with smaller choices")
        near = (fits & (costs > budget - self.delta)).nonzero()[:, 0]
        return near if len(near) else costs.masked_fill(~fits, -1).argmax()[None]

    def uniform(self, budget: float, costs: torch.Tensor | None = None) -> SubNet:
        """A choice without a router: the member of F(b) whose fractions of the full sizes differ least."""
        rows = self.feasible(budget, costs)
        fractions = self.members[rows] / torch.tensor(self.sizes(self.full))
        return self.subnet(self.members[rows[(fractions.amax(1) - fractions.amin(1)).argmin()]])

    def random(self, budget: float, seed: int, costs: torch.Tensor | None = None) -> SubNet:
        """Another: some member of F(b), a function of (seed, budget)."""
        rows = self.feasible(budget, costs)
        return self.subnet(self.members[rows[torch.randint(len(rows), (), generator=random_generator(seed, budget))]])

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector over the choices of all axes, (sum of choices,), axis by axis."""
        return list(vector.split([len(self.choices[axis]) for axis in AXES]))

    def gates(self, marginals: torch.Tensor) -> Gates:
        """Marginals (sum of choices,) -> prefix gates g_i = sum of y_k over the choices k that keep unit i."""
        g = [y @ mask.to(y.device) for y, mask in zip(self.split(marginals), self.masks)]
        L = self.config.n_layers
        return Gates(g[0], g[1].expand(L, -1), g[2].expand(L, -1), g[3])
