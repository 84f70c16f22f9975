"""
What there is to choose from, and what it costs.

A slice of LLaMaFlex has one shape in all of its layers. Four sizes name it, one per axis:
width, query heads, MLP neurons, depth. A Space is the table of all combinations with their exact
costs: 500 members for the demo, 6732 for a Llama of 8B.

The cost of a member is its share of the full model's non-embedding parameters (the paper's
#Params). A budget b bounds the cost. The members that b can buy are

    F(b) = {member : b - delta < cost(member) <= b}

    smallest                b - delta          b                          full
    --o--o---oo-o-o--oo-o-oo----(--x-xx--x--x--]--o-oo--o---o-o----o-------o-->  cost
      cheaper: wastes budget       F(b)           dearer: never chosen

A large Llama has hundreds of them. A short run does not learn that the dearer ones are better, so
F(b) is then only the dearest: all over b - near, and at least ENOUGH.

Try it:
    python -c "from space import *; s = Space(LlamaConfig()); print(s.members[s.feasible(0.5)])"
"""
import hashlib
import itertools
import math

import torch

from model import Gates, LlamaConfig, SubNet
from plumbing.errors import fail  # a user's mistake: one line on stderr, exit status 2

# The order of every table and vector below. Here n_layers is a number; which layers a slice keeps
# is SubNet.layers, the first of layer_order.
AXES = ("dim", "n_heads", "ffn_dim", "n_layers")

ENOUGH = 16  # members of F(b): with fewer near the budget, cheaper ones are added


def random_generator(*parts) -> torch.Generator:
    """A generator whose stream is a function of its arguments (seed, step, budget ...) alone."""
    text = repr(parts)
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    seed = int.from_bytes(digest, "big")
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# what a slice costs


def n_params(config: LlamaConfig, subnet: SubNet, embeddings: bool = False) -> int:
    """Parameters of a slice, without tok_embeddings and output (the paper's #Params) or with."""
    shape = subnet.config(config)
    n_heads = shape.per_layer("n_heads")
    n_kv_heads = shape.per_layer("n_kv_heads")
    ffn_dim = shape.per_layer("ffn_dim")
    total = shape.dim                            # the final norm
    for layer in range(shape.n_layers):
        heads = n_heads[layer] + n_kv_heads[layer]
        attention = 2 * shape.head_dim * heads   # wq and wo, wk and wv
        mlp = 3 * ffn_dim[layer]                 # w1, w2, w3
        norms = 2
        total += shape.dim * (attention + mlp + norms)
    if embeddings:
        tables = 1 if shape.tied else 2
        total += tables * shape.vocab_size * shape.dim
    return total


def cost(config: LlamaConfig, subnet: SubNet) -> float:
    """n_params of the slice as a fraction of the full model's: what a budget bounds."""
    whole = SubNet.full(config)
    return n_params(config, subnet) / n_params(config, whole)


# -----------------------------------------------------------------------------
# the sizes on offer


def kv_groups(config: LlamaConfig) -> int:
    """Groups that query heads cannot leave: one per KV head. In MHA a KV head goes with its query
    head, so all heads are one group."""
    if config.n_heads > config.n_kv_heads:
        return config.n_kv_heads
    return 1


def steps_down(full: int, smallest: float, unit: int) -> range:
    """Sizes from `full` down to the fraction `smallest` of it, in at most 12 equal steps, each a
    multiple of `unit`."""
    to_drop = full * (1 - smallest)
    units_per_step = math.ceil(to_drop / (12 * unit))
    step = unit * max(1, units_per_step)
    end = int(full * smallest)
    return range(full, end - 1, -step)


def head_step(config: LlamaConfig) -> int:
    """Numbers of query heads on offer are multiples of this: one in every KV group.

    MHA has no groups. There a large Llama moves in eights, if that leaves four choices, else in
    fours or twos: so many GPUs of tensor parallelism can share the heads of every slice."""
    groups = kv_groups(config)
    if groups > 1 or config.dim < 1024:
        return groups
    for step in (8, 4, 2):
        if config.n_heads % step == 0 and config.n_heads >= 4 * step:
            return step
    return 1


def default_choices(config: LlamaConfig) -> dict[str, range]:
    """Width from all to half, MLP from all to a quarter, heads per KV group from all to one (in
    MHA: to a quarter or less), depth from all to half. Width and MLP move in multiples of 256; in a
    small Llama, of head_dim."""
    unit = config.head_dim
    if config.dim >= 1024:
        unit = 256
    step = head_step(config)
    half = (config.n_layers + 1) // 2
    return dict(dim=steps_down(config.dim, 0.5, unit),
                n_heads=range(step, config.n_heads + 1, step),
                ffn_dim=steps_down(config.ffn_dim, 0.25, unit),
                n_layers=range(half, config.n_layers + 1))


def choices_for(config: LlamaConfig, asked: dict | None = None) -> dict[str, list[int]]:
    """The sizes to choose from on each axis, ascending, the full one among them.

    asked: axis -> sizes, in place of the default. ValueError: a size that no slice can have."""
    for axis in AXES:
        size = getattr(config, axis)
        if not isinstance(size, int):
            raise ValueError("this Llama has another shape in every layer; expected a uniform one, "
                             "such as its source")
    offered = default_choices(config)
    if asked:
        offered.update(asked)
    choices = {}
    for axis in AXES:
        full = getattr(config, axis)
        for size in offered[axis]:
            check_size(config, axis, size)
        choices[axis] = sorted({*offered[axis], full})
    return choices


def check_size(config: LlamaConfig, axis: str, size: int) -> None:
    """Raises ValueError if this Llama has no slice of this size."""
    full = getattr(config, axis)
    multiple = 1
    if axis == "n_heads":
        multiple = kv_groups(config)
    fits = type(size) is int and 0 < size <= full
    if not fits or size % multiple != 0:
        flag = axis.replace("_", "-")
        raise ValueError(f"{axis} {size} does not fit this Llama; expected sizes up to {full} "
                         f"in multiples of {multiple}; change --{flag}-choices")


# -----------------------------------------------------------------------------
# the table of members


class Space:
    """All combinations of choices as a table with a row per member.

    M is the number of members, K the number of choices on all axes together. One row of it:

                          dim     n_heads   ffn_dim   n_layers
        choices           32 48 | 2 4 8   | 40 80   | 3 4         K = 9, M = 2 * 3 * 2 * 2 = 24
        members (M, 4)    32    |   4     |    80   |   4
        onehot  (M, K)     1  0 | 0 1 0   |  0  1   | 0 1
        costs   (M,)      0.561           cost() of the row, in fp64

    Vectors over choices, such as the router's logits, are laid out as onehot: the axes end to end.
    layer_order: which layers to keep, best first (default: the first layers)."""

    def __init__(self, config: LlamaConfig, choices: dict | None = None,
                 layer_order: list[int] | None = None, delta: float = 0.05, near: float = 0.02):
        self.config = config
        self.delta = delta
        self.near = near
        self.full = SubNet.full(config)
        self.choices = choices_for(config, choices)
        if layer_order is None:
            layer_order = list(range(config.n_layers))

        # Every combination of one size per axis; the last axis changes fastest.
        sizes = [self.choices[axis] for axis in AXES]
        combinations = list(itertools.product(*sizes))
        self.members = torch.tensor(combinations)               # M, 4

        # The same rows as ones and zeros: onehot @ vector adds up what each member chose.
        columns = []
        for i, axis in enumerate(AXES):
            size = self.members[:, i, None]                     # M, 1
            chosen = size == torch.tensor(self.choices[axis])   # M, choices of the axis
            columns.append(chosen)
        self.onehot = torch.cat(columns, dim=1).float()         # M, K

        # Which units each choice keeps.
        self.order_layers(layer_order)

        # n_params() of every row at once. All KV heads stay, but in MHA they go with their heads.
        dim, heads, neurons, layers = self.members.double().T   # M each
        kv_heads = heads.clamp(max=config.n_kv_heads)
        attention = 2 * config.head_dim * (heads + kv_heads)
        mlp = 3 * neurons
        norms = 2
        per_layer = dim * (attention + mlp + norms)
        final_norm = dim
        params = layers * per_layer + final_norm
        self.costs = params / n_params(config, self.full)       # M

    def order_layers(self, layer_order: list[int]) -> None:
        """Sets the order in which layers are kept, and the masks: (choices, units) per axis, 1
        where a choice keeps a unit. ValueError: not every layer once.

        A choice of size k keeps the units whose threshold is below k. A query head's threshold is
        its place in the KV group, times the groups, so every group loses equally many:

            wq's heads        | q0 q1 q2 q3 | q4 q5 q6 q7 |      8 heads in 2 groups
            threshold         |  0  2  4  6 |  0  2  4  6 |
            mask, 4 heads     |  1  1  0  0 |  1  1  0  0 |
        """
        c = self.config
        # Plain ints: True and 0.0 are equal to one, and name no layer.
        if sorted(map(repr, layer_order)) != sorted(map(repr, range(c.n_layers))):
            raise ValueError(f"layer_order is {str(layer_order)[:60]}, "
                             f"expected 0 to {c.n_layers - 1}, each once")
        self.layer_order = list(layer_order)
        groups = kv_groups(c)
        heads_per_group = c.n_heads // groups
        place_in_group = torch.arange(c.n_heads) % heads_per_group
        threshold = dict(
            dim=torch.arange(c.dim),
            n_heads=place_in_group * groups,
            ffn_dim=torch.arange(c.ffn_dim),
            n_layers=torch.tensor(self.layer_order).argsort())  # the inverse permutation
        self.masks = []
        for axis in AXES:
            sizes = torch.tensor(self.choices[axis])
            kept = threshold[axis] < sizes[:, None]  # choices, units
            self.masks.append(kept.float())

    def subnet(self, sizes) -> SubNet:
        """(dim, n_heads, ffn_dim, n_layers) -> SubNet: the best layers, the first units of each."""
        dim, n_heads, ffn_dim, n_layers = (int(size) for size in sizes)
        layers = self.layer_order[:n_layers]
        return SubNet.uniform(dim, layers, n_heads, ffn_dim)

    def sizes(self, subnet: SubNet) -> tuple[int, int, int, int]:
        """Inverse of subnet()."""
        n_heads = subnet.n_heads[0]  # as in every other layer
        ffn_dim = subnet.ffn_dim[0]
        return subnet.dim, n_heads, ffn_dim, len(subnet.layers)

    # What fits a budget, and two ways to take a member of it without a router.

    def feasible(self, budget: float, costs: torch.Tensor | None = None) -> torch.Tensor:
        """F(b) as rows of the table, never empty. fail(): a budget outside (0, 1], or one that is
        under the smallest member.

        costs: (M,), what the budget bounds in place of parameters, such as measured times
        (plumbing/latency.py)."""
        if not 0 < budget <= 1:
            fail(f"budget {budget:g} found, expected a fraction of the full model in (0, 1]; "
                 "try --budget 0.5")

        # b = 1 asks for the full network, and for nothing close to it.
        if budget == 1:
            return self.costs.argmax()[None]
        if costs is None:
            costs = self.costs

        # Not even the smallest member fits: an error.
        fits = costs <= budget
        if not fits.any():
            smallest = costs.min().item()
            enough = smallest + 5e-5  # still enough when rounded to four digits
            fail(f"budget {budget:g} is below the smallest slice, {smallest:.4f} of the full "
                 f"model; ask for --budget {enough:.4f} or more, or train with smaller choices")

        # A gap in the table is wider than delta: take the largest that fits.
        close = costs > budget - self.delta
        in_budget = fits & close
        if not in_budget.any():
            costs_that_fit = costs.masked_fill(~fits, -1)
            return costs_that_fit.argmax()[None]

        # The dearest of those within delta: all within near, and cheaper ones up to ENOUGH.
        rows = in_budget.nonzero()[:, 0]
        n_near = int((costs[rows] > budget - self.near).sum())
        dearest_first = costs[rows].argsort(descending=True, stable=True)
        kept = dearest_first[:max(n_near, ENOUGH)]
        return rows[kept].sort().values

    def uniform(self, budget: float, costs: torch.Tensor | None = None) -> SubNet:
        """The member of F(b) that shrinks all axes most alike, in fractions of the full sizes."""
        rows = self.feasible(budget, costs)
        members = self.members[rows]                    # F(b), 4
        full = torch.tensor(self.sizes(self.full))
        fractions = members / full
        spread = fractions.amax(1) - fractions.amin(1)  # F(b)
        best = spread.argmin()
        return self.subnet(members[best])

    def random(self, budget: float, seed: int, costs: torch.Tensor | None = None) -> SubNet:
        """Any member of F(b): a function of (seed, budget)."""
        rows = self.feasible(budget, costs)
        generator = random_generator(seed, budget)
        place = torch.randint(len(rows), (), generator=generator)
        row = rows[place]
        return self.subnet(self.members[row])

    def best_per_axis(self, scores: torch.Tensor) -> SubNet:
        """scores (K,) -> the best choice of each axis, alone: no budget bounds the combination."""
        sizes = []
        for axis, score in zip(AXES, self.split(scores)):
            best = score.argmax()
            sizes.append(self.choices[axis][best])
        return self.subnet(sizes)

    # Vectors over the choices of all axes.

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector (K,), axis by axis."""
        lengths = [len(self.choices[axis]) for axis in AXES]
        return list(vector.split(lengths))

    def gates(self, marginals: torch.Tensor) -> Gates:
        """Marginals y (K,) -> gates: g_i = the sum of y_k over the choices k that keep unit i.

            dim is 32 or 48, y = .3, .7   ->   channels 0 to 31: gate 1, channels 32 to 47: gate .7
        """
        # One vector per axis: (choices,) @ (choices, units).
        gates = []
        for y, mask in zip(self.split(marginals), self.masks):
            mask = mask.to(y.device)
            gates.append(y @ mask)
        dim, n_heads, ffn_dim, layers = gates
        # Heads and neurons are gated alike in all layers: (n_layers, units) without a copy.
        L = self.config.n_layers
        n_heads = n_heads.expand(L, -1)
        ffn_dim = ffn_dim.expand(L, -1)
        return Gates(dim, n_heads, ffn_dim, layers)
