"""
From a budget to a slice: choices per axis, their cost, and a small router that learns which to take.

LLaMaFlex Sec. 3: a scalar budget b goes through one embedding and one two-layer MLP per axis (width, heads, MLP,
depth) to logits over that axis' choices. Gumbel noise makes the choice random, and its gradient smooth:

    y = softmax((kappa * logits + g) / tau)       kappa 1 -> 10: signal to noise;   tau 1 -> 0.056: softness

Two ways to meet the budget:
    penalty      (the paper) axes independent, loss + lambda * |E[cost] / b - 1|; may end over or under b
    constrained  (ours, default) all combinations of choices are a few thousand, so their exact costs are a table.
                 F(b) = {a : b - delta < cost(a) <= b}; the logit of a member is the sum of its axes' logits;
                 softmax over F(b) only. Nothing outside the budget can be chosen, at budgets never trained either.
Two baselines without a router: `uniform` (all axes shrink alike) and `random` (any member of F(b)).

The router is tiny and lives on the CPU, so asking for a slice never waits for a GPU. What it gives to the model and
what comes back as gradient is one short vector: the marginals y of all axes, then the modulation factors.
"""
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from checkpoint import load_tensors
from model import Gates, LlamaConfig, Modulation, SubNet
from tokenizer import fail

AXES = ("dim", "n_heads", "ffn_dim", "n_layers")
FLEX = "flex.pt"


def random_generator(*parts) -> torch.Generator:
    """A generator whose stream is a function of its arguments (seed, step, budget ...) alone."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


# -----------------------------------------------------------------------------
# cost and choices


def n_params(config: LlamaConfig, subnet: SubNet) -> int:
    """Parameters of a slice without tok_embeddings and output (the paper's #Params)."""
    c = subnet.config(config)
    total = c.dim  # the final norm
    for h, kv, f in zip(c.per_layer("n_heads"), c.per_layer("n_kv_heads"), c.per_layer("ffn_dim")):
        total += c.dim * (2 * c.head_dim * (h + kv) + 3 * f + 2)
    return total


def cost(config: LlamaConfig, subnet: SubNet) -> float:
    """n_params of the slice as a fraction of the full model's: what a budget bounds."""
    return n_params(config, subnet) / n_params(config, SubNet.full(config))


def choices_for(config: LlamaConfig, asked: dict[str, list[int]] | None = None) -> dict[str, list[int]]:
    """The sizes to choose from on each axis, ascending, the full one among them; `asked` replaces an axis.

    Default: width from all to half, MLP from all to a quarter, heads per KV group from all to one, depth from all to
    half; width and MLP in at most 12 steps of a multiple of 256 (real shapes) or head_dim (toys)."""
    if any(not isinstance(getattr(config, axis), int) for axis in AXES):
        fail("this Llama has another shape in every layer; expected a uniform one, such as the Llama it was cut from")
    unit = 256 if config.dim >= 1024 else config.head_dim
    groups = config.n_kv_heads if config.n_heads > config.n_kv_heads else 1

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
                fail(f"{axis} {size} does not fit this Llama; expected sizes from {unit} to {full}"
                     f"{f' in multiples of its {unit} KV heads' if unit > 1 else ''}; change --{axis.replace('_', '-')}-choices")
    return {axis: sorted({*choices[axis], getattr(config, axis)}) for axis in AXES}


# -----------------------------------------------------------------------------
# the router


@dataclass
class Choice:
    """What the router answers in training. marginals: (sum of choices,), over the axes in the order of AXES, or
    None without a router; penalty: () to add to the loss; max_p: the largest noise-free probability."""
    subnet: SubNet
    marginals: torch.Tensor | None = None
    penalty: torch.Tensor | float = 0.0
    max_p: float = 1.0


class Router(nn.Module):
    """Budget -> SubNet. Holds the modulation too, since both are what flex.pt adds to a plain Llama."""
    WIDTH = 128  # embedding and hidden size (the paper's)

    def __init__(self, config: LlamaConfig, choices: dict, layer_order: list[int], mode: str = "constrained",
                 delta: float = 0.05, seed: int = 0):
        super().__init__()
        self.config, self.mode, self.delta, self.seed = config, mode, delta, seed
        self.choices, self.full = choices, SubNet.full(config)
        self.embed = nn.Linear(1, self.WIDTH)
        self.axes = nn.ModuleDict({axis: nn.Sequential(nn.Linear(self.WIDTH, self.WIDTH), nn.SiLU(),
                                                       nn.Linear(self.WIDTH, len(choices[axis]))) for axis in AXES})
        self.modulation = Modulation(config, seed)
        self.seen: set[tuple[str, int]] = set()  # choices that some training step ran
        generator = random_generator("router", seed)
        with torch.no_grad():  # uniform over F(b) at the start: the last layers are zero
            for name, p in self.named_parameters():
                if not name.startswith("modulation"):
                    last = name.startswith("axes") and ".2." in name
                    p.copy_(torch.zeros(p.shape) if last or p.dim() == 1 else
                            torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5)
        # The table of all members: index of the choice on each axis, (M, 4), and exact cost, (M,).
        self.members = torch.tensor(list(itertools.product(*(range(len(choices[axis])) for axis in AXES))))
        self.order_layers(layer_order)
        self.costs = torch.tensor([cost(config, self.member(m)) for m in range(len(self.members))], dtype=torch.float64)
        self.onehot = torch.cat([nn.functional.one_hot(self.members[:, i], len(choices[axis]))
                                 for i, axis in enumerate(AXES)], dim=1).float()  # M, sum of choices

    def order_layers(self, layer_order: list[int]) -> None:
        """Sets the order in which layers are kept, best first."""
        self.layer_order = list(layer_order)
        self._masks = self.prefix_masks()

    def member(self, m: int) -> SubNet:
        """Row m of the table as a SubNet: the best layers of the order, the first units of every other axis."""
        size = {axis: self.choices[axis][i] for axis, i in zip(AXES, self.members[m].tolist())}
        return SubNet.uniform(size["dim"], self.layer_order[:size["n_layers"]], size["n_heads"], size["ffn_dim"])

    def feasible(self, budget: float) -> torch.Tensor:
        """F(b) as rows of the table; never empty: without a member within delta, the largest that fits. b = 1 is
        the full network."""
        if not 0 < budget <= 1:
            fail(f"budget {budget:g} found, expected a fraction of the full model in (0, 1]; try --budget 0.5")
        if budget == 1:
            return self.costs.argmax()[None]
        fits = self.costs <= budget
        if not fits.any():
            fail(f"budget {budget:g} is below the smallest sub-network, {self.costs.min().item():.4f} of the full model; "
                 f"ask for --budget {self.costs.min().item() + 5e-5:.4f} or more, or train with smaller choices")
        near = (fits & (self.costs > budget - self.delta)).nonzero()[:, 0]
        return near if len(near) else self.costs.masked_fill(~fits, -1).argmax()[None]

    def logits(self, budget: float) -> torch.Tensor:
        """Logits over the choices of all axes, concatenated in the order of AXES: (sum of choices,)."""
        e = nn.functional.silu(self.embed(torch.tensor([float(budget)])))
        return torch.cat([self.axes[axis](e) for axis in AXES])

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A concatenated vector, axis by axis."""
        return list(vector[:self.onehot.size(1)].split([len(self.choices[axis]) for axis in AXES]))

    def baseline(self, budget: float) -> SubNet:
        """`uniform`: the member of F(b) whose fractions of the full size differ least; `random`: any, by the seed."""
        rows = self.feasible(budget)
        if self.mode == "random":
            return self.member(rows[torch.randint(len(rows), (), generator=random_generator(self.seed, budget))])
        full = torch.tensor([getattr(self.config, axis) for axis in AXES])
        sizes = torch.stack([torch.tensor(self.choices[axis])[self.members[rows, i]] for i, axis in enumerate(AXES)], 1)
        fractions = sizes / full
        return self.member(rows[(fractions.amax(1) - fractions.amin(1)).argmin()])

    def sample(self, budget: float, step: int, tau: float, kappa: float, penalty: float = 1.0) -> Choice:
        """A random slice for one training step: a function of (seed, step, budget) and the router's weights."""
        if budget == 1:
            return Choice(self.full)
        if self.mode in ("uniform", "random"):
            return self.saw(Choice(self.baseline(budget)))
        rows, logits = self.feasible(budget), kappa * self.logits(budget)
        constrained = self.mode == "constrained"
        noise = random_generator(self.seed, step, budget)
        uniform = torch.rand(len(rows) if constrained else len(logits), generator=noise, dtype=torch.float64)
        gumbel = -(-uniform.clamp(1e-12, 1 - 1e-12).log()).log().float()
        if constrained:  # one softmax over the members of F(b)
            z = self.onehot[rows] @ logits
            p = ((z + gumbel) / tau).softmax(0)
            chosen, marginals = rows[(z + gumbel).argmax()], p @ self.onehot[rows]
            choice = Choice(self.member(chosen), marginals, 0.0, z.softmax(0).max().item())
        else:            # one softmax per axis; the mean cost without noise is pulled to the budget
            noisy, clean = self.split(logits + gumbel), [z.softmax(0) for z in self.split(logits)]
            chosen = self.index([z.argmax().item() for z in noisy])
            joint = torch.stack([p[self.members[:, i]] for i, p in enumerate(clean)]).prod(0)  # M
            off = ((joint @ self.costs.float()) / budget - 1).abs()
            choice = Choice(self.member(chosen), torch.cat([(z / tau).softmax(0) for z in noisy]), penalty * off,
                            joint.max().item())
        return self.saw(choice)

    def saw(self, choice: Choice) -> Choice:
        """Notes the sizes that training ran."""
        self.seen |= set(zip(AXES, self.sizes(choice.subnet)))
        return choice

    def index(self, choice: list[int]) -> int:
        """Row of the table with these choice indices."""
        return int((self.members == torch.tensor(choice)).all(1).nonzero()[0, 0])

    def sizes(self, subnet: SubNet) -> tuple[int, int, int, int]:
        """(dim, n_heads, ffn_dim, n_layers) of a uniform SubNet."""
        return subnet.dim, subnet.n_heads[0], subnet.ffn_dim[0], len(subnet.layers)

    @torch.no_grad()
    def route(self, budget: float) -> SubNet:
        """The slice deployed at a budget: no noise, always the same."""
        rows = self.feasible(budget)
        if budget == 1:
            return self.full
        if self.mode in ("uniform", "random"):
            return self.baseline(budget)
        logits = self.logits(budget)
        if self.mode == "constrained":
            return self.member(rows[(self.onehot[rows] @ logits).argmax()])
        return self.member(self.index([z.argmax().item() for z in self.split(logits)]))

    @torch.no_grad()
    def deploy(self, budget: float) -> tuple[SubNet, torch.Tensor | None]:
        """route(b) and its modulation factors (n_layers, 2). A size that no training step ran is not modulated:
        its factors would be guesses."""
        subnet = self.route(budget)
        known = set(zip(AXES, self.sizes(subnet))) <= self.seen
        return subnet, self.modulation(subnet) if known and subnet != self.full else None

    # -------------------------------------------------------------------------
    # gates

    def prefix_masks(self) -> list[torch.Tensor]:
        """Per axis (choices, units): 1 where the choice keeps the unit."""
        c = self.config
        in_group = c.n_heads // (c.n_kv_heads if c.n_heads > c.n_kv_heads else 1)
        rank = {"dim": torch.arange(c.dim), "n_heads": torch.arange(c.n_heads) % in_group * (c.n_heads // in_group),
                "ffn_dim": torch.arange(c.ffn_dim), "n_layers": torch.tensor(self.layer_order).argsort()}
        return [(rank[axis] < torch.tensor(self.choices[axis])[:, None]).float() for axis in AXES]

    def gates(self, marginals: torch.Tensor, hard: bool) -> Gates:
        """Marginals -> prefix gates g_i = sum of y_k over the choices k that keep unit i. hard: straight-through for
        a pass that runs the sampled slice: the value is exactly 1, the gradient that of the soft gate."""
        if self._masks[0].device != marginals.device:
            self._masks = [mask.to(marginals.device) for mask in self._masks]
        g = [y @ mask for y, mask in zip(self.split(marginals), self._masks)]
        if hard:
            g = [x - x.detach() + 1 for x in g]
        L = self.config.n_layers
        return Gates(g[0], g[1].expand(L, -1), g[2].expand(L, -1), g[3])


# -----------------------------------------------------------------------------
# flex.pt


def router_state(router: Router, **more) -> dict:
    """All that flex.pt needs to route again, and `more`: tensors and plain types. The plain part goes through JSON: a
    pickle also remembers which equal objects are one object, so two equal runs would give two files."""
    plain = dict(choices=router.choices, layer_order=router.layer_order, mode=router.mode, delta=router.delta,
                 seed=router.seed, seen=sorted(router.seen), **more)
    return dict(router=dict(router.state_dict()), **json.loads(json.dumps(plain)))


def restore_router(config: LlamaConfig, state: dict) -> Router:
    """Inverse of router_state()."""
    router = Router(config, state["choices"], state["layer_order"], state["mode"], state["delta"], state["seed"])
    router.load_state_dict(state["router"], strict=True)
    router.seen = {(axis, size) for axis, size in state["seen"]}
    return router


def load_router(folder, config: LlamaConfig) -> Router | None:
    """The router of a supernet's folder; None for a plain Llama."""
    path = Path(folder) / FLEX
    if not path.exists():
        return None
    try:
        return restore_router(config, load_tensors(path))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        fail(f"{path} does not fit the Llama beside it ({type(error).__name__}: {str(error).splitlines()[0][:100]}); expected "
             "the flex.pt that train.py wrote with it; take both from one folder")
