"""
From a budget to a slice: a small router that learns which member of a Space to take.

LLaMaFlex Sec. 3: a scalar budget b goes through one embedding and one two-layer MLP per axis (width, heads, MLP,
depth) to logits over that axis' choices. Gumbel noise makes the choice random, and its gradient smooth:

    y = softmax((kappa * logits + g) / tau)       kappa 1 -> 10: signal to noise;   tau 1 -> 0.056: softness

A pass either runs the slice drawn, which trains the Llama, or runs softly, the full width under gates made of y, which
trains the router (space.py: Space.gates; train.py: train_step says why).

Two ways to meet the budget:
    penalty      (the paper) axes independent, loss + lambda * |E[cost] / b - 1|; may end over or under b
    constrained  (ours, default) one softmax over F(b), the combinations that fit (space.py); the logit of a member is
                 the sum of its axes' logits. Nothing over the budget can be chosen, at budgets never trained either.
Two baselines without a router: `uniform` (all axes shrink alike) and `random` (any member of F(b)).

Policy-aware modulation, the other thing that flex.pt adds to a plain Llama, tells every block which slice is running.

The router is tiny and lives on the CPU, so asking for a slice never waits for a GPU. What it gives to the model and
what comes back as gradient is one short vector: the marginals y of all axes, then the modulation factors.
"""
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.checkpoint import load_tensors
from model import LlamaConfig, SubNet
from space import AXES, Space, random_generator
from plumbing.errors import fail

FLEX = "flex.pt"

# -----------------------------------------------------------------------------
# policy-aware modulation


class Modulation(nn.Module):
    """Which slice is running, told to every block: s = 1 + f(e(c)) - f(e(c_full)) on the outputs of attention and MLP.

    c are the fractions (width, heads or neurons, depth) of the slice, e a sinusoidal embedding of size 16 each
    (the paper's size; frequencies of 1 to 10 radians per unit, smooth between neighbouring choices, so that a
    size between two trained ones gets a factor between theirs), f a small MLP whose last layer starts at zero and
    has no bias. s is constant for a slice: export.py folds it into wo and w2. Exactly 1 at the full network.
    per_channel: one factor for each channel of an output, instead of one for all.
    """
    SIZE, HIDDEN = 16, 128

    def __init__(self, config: LlamaConfig, seed: int = 0, per_channel: bool = False):
        super().__init__()
        self.config, self.full = config, SubNet.full(config)
        self.register_buffer("frequencies", torch.logspace(0, 1, self.SIZE // 2), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.Parameter(torch.randn(2, self.HIDDEN, 3 * self.SIZE, generator=generator) / self.SIZE)
        self.bias = nn.Parameter(torch.zeros(2, self.HIDDEN))
        self.out = nn.Parameter(torch.zeros(2, config.n_layers, self.HIDDEN, *[config.dim] * per_channel))

    def f(self, subnet: SubNet) -> torch.Tensor:
        """f(e(c)) of every kept layer, (len(layers), 2[, dim]): attention, MLP."""
        c, layers = self.config, list(subnet.layers)
        n = len(layers)
        width = torch.tensor([[subnet.dim / c.dim] * n, [n / c.n_layers] * n])
        heads = torch.tensor([k / c.per_layer("n_heads")[i] for i, k in zip(layers, subnet.n_heads)])
        neurons = torch.tensor([k / c.per_layer("ffn_dim")[i] for i, k in zip(layers, subnet.ffn_dim)])
        fractions = torch.stack([torch.vstack((width, x)) for x in (heads, neurons)]).to(self.out)  # 2, 3, n
        angle = fractions.transpose(1, 2)[..., None] * self.frequencies                             # 2, n, 3, SIZE/2
        e = torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(2)                                # 2, n, 3 * SIZE
        h = F.silu(e @ self.hidden.transpose(1, 2) + self.bias[:, None])                            # 2, n, HIDDEN
        out = self.out[:, layers]                                                                   # 2, n, HIDDEN, ...
        return (h * out).sum(-1).T if out.dim() == 3 else torch.einsum("knh,knhd->nkd", h, out)

    def forward(self, subnet: SubNet) -> torch.Tensor:
        """The factors of a slice, (n_layers, 2[, dim]); rows of layers that are not kept are 1."""
        ones = torch.ones(self.config.n_layers, 2, *self.out.shape[3:]).to(self.out)
        if subnet == self.full:
            return ones
        layers = list(subnet.layers)
        return ones.index_add(0, torch.tensor(layers, device=ones.device), self.f(subnet) - self.f(self.full)[layers])


# -----------------------------------------------------------------------------
# the router


class Choice(NamedTuple):
    """What the router answers in training. marginals: (sum of choices,), over the axes in the order of AXES, None
    without a router; penalty: () to add to the loss; max_p: the largest noise-free probability."""
    subnet: SubNet
    marginals: torch.Tensor | None = None
    penalty: torch.Tensor | None = None
    max_p: float = 1.0


class Router(nn.Module):
    """Budget -> SubNet of a Space. mode: constrained, penalty, uniform or random. budgets: those that are trained."""
    WIDTH = 128  # embedding and hidden size (the paper's)

    def __init__(self, space: Space, mode: str = "constrained", seed: int = 0, budgets=(), per_channel: bool = False):
        super().__init__()
        self.space, self.mode, self.seed, self.budgets = space, mode, seed, sorted(budgets)
        self.embed = nn.Linear(1, self.WIDTH)
        self.axes = nn.ModuleDict({axis: nn.Sequential(
            nn.Linear(self.WIDTH, self.WIDTH), nn.SiLU(), nn.Linear(self.WIDTH, len(space.choices[axis])))
            for axis in AXES})
        generator = random_generator("router", seed)
        with torch.no_grad():
            for name, p in self.named_parameters():  # last layers zero: uniform over F(b) at the start
                zero = p.dim() == 1 or ".2." in name
                p.copy_(torch.zeros(p.shape) if zero else torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5)
        self.modulation = Modulation(space.config, seed, per_channel)
        self.seen: set[tuple[str, int]] = set()  # sizes that some training step ran

    def logits(self, budget: float) -> torch.Tensor:
        """Logits over the choices of all axes, concatenated in the order of AXES: (sum of choices,)."""
        e = F.silu(self.embed(torch.tensor([float(budget)])))
        return torch.cat([self.axes[axis](e) for axis in AXES])

    def argmax(self, vector: torch.Tensor) -> SubNet:
        """The best choice of every axis alone."""
        best = zip(AXES, self.space.split(vector))
        return self.space.subnet([self.space.choices[axis][z.argmax()] for axis, z in best])

    def sample(self, budget: float, step: int, tau: float, kappa: float, penalty: float = 1.0) -> Choice:
        """A random slice for one training step: a function of (seed, step, budget) and the router's weights."""
        space = self.space
        if budget == 1:
            return Choice(space.full)
        if self.mode in ("uniform", "random"):
            choice = Choice(self.route(budget))
        else:
            rows, z = space.feasible(budget), kappa * self.logits(budget)
            constrained = self.mode == "constrained"
            if constrained:  # the logit of a member is the sum over its axes
                z = space.onehot[rows] @ z
            u = torch.rand(len(z), generator=random_generator(self.seed, step, budget), dtype=torch.float64)
            noisy = z - (-u.clamp(1e-12, 1 - 1e-12).log()).log().float()  # + Gumbel noise
            if constrained:  # one softmax over F(b)
                choice = Choice(space.subnet(space.members[rows[noisy.argmax()]]),
                                (noisy / tau).softmax(0) @ space.onehot[rows], max_p=z.softmax(0).max().item())
            else:            # one softmax per axis; the mean cost, without noise, is pulled to the budget
                p = (space.onehot @ torch.cat([axis.log_softmax(0) for axis in space.split(z)])).exp()
                off = ((p @ space.costs.float()) / budget - 1).abs()
                choice = Choice(self.argmax(noisy), torch.cat([(axis / tau).softmax(0) for axis in space.split(noisy)]),
                                penalty * off, p.max().item())
        self.seen |= set(zip(AXES, space.sizes(choice.subnet)))
        return choice

    @torch.no_grad()
    def route(self, budget: float, costs: torch.Tensor | None = None) -> SubNet:
        """The slice deployed at a budget: no noise, always the same. costs: (M,), what budget bounds in place of
        parameters; the router, which knows parameters alone, is then asked at the mean size of what fits."""
        rows = self.space.feasible(budget, costs)
        if budget == 1:
            return self.space.full
        if self.mode == "uniform":
            return self.space.uniform(budget, costs)
        if self.mode == "random":
            return self.space.random(budget, self.seed, costs)
        if self.mode == "penalty":
            assert costs is None, "a penalty router's choice is bounded by nothing"
            return self.argmax(self.logits(budget))
        budget = budget if costs is None else self.space.costs[rows].mean().item()
        rows = self.between(budget, rows)
        return self.space.subnet(self.space.members[rows[(self.space.onehot[rows] @ self.logits(budget)).argmax()]])

    def between(self, budget: float, rows: torch.Tensor) -> torch.Tensor:
        """At a budget that was not trained, the members with sizes between those of its trained neighbours, or nearest
        to that (distances are sums of fractions over axes). Elsewhere the interpolated logits may combine sizes that
        never ran together, and were seen to: a larger model, 0.1 worse than a smaller one."""
        smaller, larger = [b for b in self.budgets if b < budget], [b for b in self.budgets if b > budget]
        if budget in self.budgets or not smaller or not larger:
            return rows
        ends = torch.tensor([self.space.sizes(self.route(b)) for b in (smaller[-1], larger[0])])
        members = self.space.members[rows]
        outside = (ends.amin(0) - members).clamp(min=0) + (members - ends.amax(0)).clamp(min=0)
        distance = (outside.double() / torch.tensor(self.space.sizes(self.space.full))).sum(1)
        return rows[distance <= distance.min() + 1e-9]

    @torch.no_grad()
    def deploy(self, budget: float, costs: torch.Tensor | None = None) -> tuple[SubNet, torch.Tensor | None]:
        """route(b) and its modulation factors (n_layers, 2[, dim]). A size that no training step ran is not modulated:
        its factors would be guesses."""
        subnet = self.route(budget, costs)
        known = set(zip(AXES, self.space.sizes(subnet))) <= self.seen
        return subnet, self.modulation(subnet) if known and subnet != self.space.full else None


# -----------------------------------------------------------------------------
# flex.pt


def router_state(router: Router, **more) -> dict:
    """All that flex.pt needs to route again, and `more`: tensors and plain types. The plain part goes through JSON: a
    pickle also remembers which equal objects are one object, so two equal runs would give two files."""
    space = router.space
    plain = dict(choices=space.choices, layer_order=space.layer_order, delta=space.delta, mode=router.mode,
                 seed=router.seed, budgets=router.budgets, per_channel=router.modulation.out.dim() == 4,
                 seen=sorted(router.seen), **more)
    return dict(router=dict(router.state_dict()), **json.loads(json.dumps(plain)))


def restore_router(config: LlamaConfig, state: dict) -> Router:
    """Inverse of router_state()."""
    space = Space(config, state["choices"], state["layer_order"], state["delta"])
    router = Router(space, state["mode"], state["seed"], state["budgets"], state["per_channel"])
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
        fail(f"{path} does not fit the Llama beside it ({type(error).__name__}: {str(error).splitlines()[0][:100]}); "
             "expected the flex.pt that train.py wrote with it; take both from one folder")
