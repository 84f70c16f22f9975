"""
The router: from a budget to a slice.

LLaMaFlex Sec. 3. A budget b goes through one embedding, and then through one small MLP per axis, to
logits over the sizes that this axis offers (space.py). Two verbs lead from a budget to a slice:

    sample    in training. Noise makes the choice random. What the router learns from comes with
              it: a second choice to compare with, and a distribution over the choices.
    route     in use. The best slice for b, without noise: always the same.

sample is a Gumbel-softmax, with noise g = -log(-log u), u uniform in (0, 1). It draws the choice
with the largest kappa * logit + g, and the distribution is

    y = softmax((kappa * logits + g) / tau)

    kappa  says how much the logits count against the noise. Logits of 1 and 0 draw the first choice
           in 73 % of all steps at kappa 1, and in 99.995 % at kappa 10.
    tau    says how soft y is; it never changes which choice is drawn. Noisy logits of 1.2 and 0.4
           give y = (.69, .31) at tau 1, and (.9997, .0003) at tau 0.1.

In training kappa rises from 1 to 10, and tau falls from 1 to 0.056 (train.py: schedule).

There are two ways to learn (--teach). With `pairs`, the default, two slices are drawn and read the
same tokens, and the better one gets likelier: y and tau have no part in it. With `soft`, the
paper's, the gradient goes through y.

There are two ways to keep to the budget (--router):

    penalty      the paper's. Every axis chooses alone. A term |E[cost] / b - 1| in the loss pulls
                 the mean cost to b; the choice may still end over b, or far under it.
    constrained  ours, the default. One softmax over F(b), the members that fit (space.py). The
                 logit of a member is the sum of its axes' logits. No choice can exceed its budget,
                 not even at a budget that was never trained.

Two baselines have no router: `uniform` shrinks all axes alike, `random` takes any member of F(b).

The router is tiny and stays on the CPU, so asking for a slice never waits for a GPU. It hands the
modulation factors to the model, a short vector, and gets their gradient; with `soft` the
distribution too.

Try it:
    python -c "from router import *; print(Router(Space(LlamaConfig())).route(0.5))"
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LlamaConfig, SubNet
from space import AXES, Space, random_generator

# -----------------------------------------------------------------------------
# policy-aware modulation: every block is told which slice is running


class Modulation(nn.Module):
    """A factor on the output of attention and of the MLP in every block: the paper's policy-aware
    modulation, where the policy is the slice. s = 1 + f(e(c)) - f(e(c_full)).

        c   three fractions of the full sizes: width, depth, and heads (attention) or neurons (MLP)
        e   a sinusoidal embedding of each fraction, of size 16 (the paper's). Its frequencies are
            low, 1 to 10 radians per unit: a size between two trained ones gets a factor between
            theirs
        f   an MLP with one hidden layer of 128 (the paper's). Its last layer starts at zero. It has
            no bias, which would cancel in the difference

    s is exactly 1 at the full network. It is constant for a slice, so export.py folds it into the
    weights wo and w2.
    """
    SIZE = 16
    HIDDEN = 128

    def __init__(self, config: LlamaConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.full = SubNet.full(config)
        frequencies = torch.logspace(0, 1, self.SIZE // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

        # Two small networks side by side: the first gives attention's factors, the second the
        # MLP's.
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(2, self.HIDDEN, 3 * self.SIZE, generator=generator)
        bias = torch.zeros(2, self.HIDDEN)
        out = torch.zeros(2, config.n_layers, self.HIDDEN)
        self.hidden = nn.Parameter(hidden / self.SIZE)
        self.bias = nn.Parameter(bias)
        self.out = nn.Parameter(out)

    def f(self, subnet: SubNet) -> torch.Tensor:
        """f(e(c)) of the n kept layers, (n, 2): attention, MLP."""
        # c: the three fractions of every sub-block.
        config = self.config
        full_heads = config.per_layer("n_heads")
        full_neurons = config.per_layer("ffn_dim")
        width = subnet.dim / config.dim
        depth = len(subnet.layers) / config.n_layers
        attention = []
        mlp = []
        for i, layer in enumerate(subnet.layers):
            heads = subnet.n_heads[i] / full_heads[layer]
            neurons = subnet.ffn_dim[i] / full_neurons[layer]
            attention.append([width, depth, heads])
            mlp.append([width, depth, neurons])
        c = torch.tensor([attention, mlp]).to(self.out)    # 2, n, 3

        # e: sine and cosine of each fraction at SIZE/2 frequencies.
        angle = c[..., None] * self.frequencies            # 2, n, 3, SIZE/2
        waves = (angle.sin(), angle.cos())
        e = torch.cat(waves, dim=-1).flatten(2)            # 2, n, 3 * SIZE

        # f: all blocks share the hidden layer; each has a last layer of its own.
        h = e @ self.hidden.transpose(1, 2)                # 2, n, HIDDEN
        h = F.silu(h + self.bias[:, None])
        out = self.out[:, list(subnet.layers)]             # 2, n, HIDDEN
        return (h * out).sum(-1).T                         # n, 2

    def forward(self, subnet: SubNet) -> torch.Tensor:
        """The factors of a slice, (n_layers, 2); rows of layers that are not kept are 1."""
        ones = torch.ones(self.config.n_layers, 2).to(self.out)
        if subnet == self.full:
            return ones
        layers = list(subnet.layers)
        here = self.f(subnet)                              # n, 2
        at_full = self.f(self.full)[layers]                # n, 2
        rows = torch.tensor(layers, device=ones.device)
        return ones.index_add(0, rows, here - at_full)


# -----------------------------------------------------------------------------
# the router


class Choice(NamedTuple):
    """The router's answer in training. K is the number of choices on all axes together."""
    subnet: SubNet
    marginals: torch.Tensor | None = None  # (K,) y of the axes, end to end; None: nothing to choose
    other: SubNet | None = None            # a second draw; None: nothing to choose
    log_ratio: torch.Tensor | None = None  # () log p(other) - log p(subnet), without noise
    penalty: torch.Tensor | None = None    # () to add to the loss; None: nothing to add
    max_p: float = 1.0                     # the largest probability, without noise; 1: decided


def gumbel_noise(n: int, generator: torch.Generator) -> torch.Tensor:
    """n numbers g = -log(-log u), u uniform in (0, 1): argmax(z + g) is a draw from softmax(z)."""
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    u = u.clamp(1e-12, 1 - 1e-12)  # log 0 is infinite
    g = -(-u.log()).log()
    return g.float()


def lesson(choice: Choice, loss: float, other_loss: float) -> torch.Tensor:
    """What to add to the loss so that the better one of the two slices of a choice gets likelier, ().

    Its gradient is half the difference of the losses times that of log_ratio. In the mean over draws
    that is the gradient of the expected loss: the score function, each draw the baseline of the other
    (Kool, van Hoof and Welling 2019)."""
    return (other_loss - loss) / 2 * choice.log_ratio


class Router(nn.Module):
    """Budget -> SubNet of a Space.

    mode: constrained, penalty, uniform or random. budgets: those that training asks for."""
    WIDTH = 128  # of the embedding and of each MLP's hidden layer (the paper's)

    def __init__(self, space: Space, mode: str = "constrained", seed: int = 0, budgets=()):
        super().__init__()
        self.space = space
        self.mode = mode
        self.seed = seed
        self.budgets = sorted(budgets)

        # One embedding of the budget, then two layers per axis.
        self.embed = nn.Linear(1, self.WIDTH)
        self.axes = nn.ModuleDict()
        for axis in AXES:
            n_choices = len(space.choices[axis])
            self.axes[axis] = nn.Sequential(
                nn.Linear(self.WIDTH, self.WIDTH),
                nn.SiLU(),
                nn.Linear(self.WIDTH, n_choices))
        self.init_weights()

        self.modulation = Modulation(space.config, seed)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Last layers (axes.*.2) and biases at zero: all choices start equally likely."""
        generator = random_generator("router", self.seed)
        for name, p in self.named_parameters():
            if p.dim() == 1 or ".2." in name:
                p.zero_()
            else:
                w = torch.randn(p.shape, generator=generator)
                fan_in = p.size(1)
                p.copy_(w / fan_in ** 0.5)

    def logits(self, budget: float) -> torch.Tensor:
        """Logits over the choices of all axes, end to end in the order of AXES: (K,)."""
        b = torch.tensor([float(budget)])
        e = F.silu(self.embed(b))               # WIDTH
        per_axis = [self.axes[axis](e) for axis in AXES]
        return torch.cat(per_axis)              # K

    # In training: sample.

    def sample(self, budget: float, step: int, tau: float, kappa: float,
               penalty: float = 1.0) -> Choice:
        """A random slice for one training step: a function of (seed, step, budget) and the weights.

        penalty: the weight of Choice.penalty. fail(): a budget that nothing fits."""
        # At b = 1 there is nothing to choose. The baselines have nothing to learn.
        if budget == 1:
            return Choice(self.space.full)
        if self.mode in ("uniform", "random"):
            return Choice(self.route(budget))

        # Every training pass runs the slice that was drawn, and trains the Llama. There are two ways
        # in which a loss can teach the router what to draw (--teach); train.py chooses:
        #
        #   pairs  a second slice is drawn, and reads the same tokens. lesson() makes the better one
        #          of the two likelier.
        #   soft   the paper's kind. The pass runs the full width under gates made of y (marginals;
        #          Space.gates), and its gradient goes through the Gumbel-softmax.
        #
        # Half of one slice and half of another is no slice. On a trained Llama this mixture is better
        # than both, so the gradient there leads to the middle, and says little about the ends
        # (RESULTS.md, section 7). The difference of two losses is what it is. It costs a forward of
        # a slice where a soft pass costs the full width, and nothing once both draws are the same.
        #
        # Straight-through gates on the slice itself, of value 1 and with the gradient of y, teach
        # nothing. A gate of 1 is a scale. The weights beside it are trained until no other scale
        # would be better, and a unit outside of the slice has no gradient at all.
        rows = self.space.feasible(budget)
        z = kappa * self.logits(budget)               # K
        generator = random_generator(self.seed, step, budget)
        if self.mode == "constrained":
            return self.sample_constrained(z, tau, generator, rows)
        return self.sample_penalty(z, tau, generator, budget, penalty)

    def sample_constrained(self, z: torch.Tensor, tau: float, generator: torch.Generator,
                           rows: torch.Tensor) -> Choice:
        """One softmax over F(b), the members in these rows. z: kappa * logits, (K,)."""
        space = self.space

        # The joint logit of a member is the sum of its axes' logits.
        onehot = space.onehot[rows]                   # F(b), K
        z = onehot @ z                                # F(b)

        # Noise. The largest logit after it is the slice drawn.
        noisy = z + gumbel_noise(len(z), generator)
        row = rows[noisy.argmax()]
        subnet = space.subnet(space.members[row])

        # The joint softmax over F(b), soft by tau: how nearly each member was drawn.
        y = (noisy / tau).softmax(0)                  # F(b)

        # Its marginals: a choice gets the sum of y over the members that made it.
        marginals = y @ onehot                        # K

        # A second draw, by noise of its own.
        second = z + gumbel_noise(len(z), generator)
        other = space.subnet(space.members[rows[second.argmax()]])
        log_ratio = z[second.argmax()] - z[noisy.argmax()]

        # For the log: is the router still undecided? Noise has no part in that.
        p = z.softmax(0)
        return Choice(subnet, marginals, other, log_ratio, max_p=p.max().item())

    def sample_penalty(self, z: torch.Tensor, tau: float, generator: torch.Generator,
                       budget: float, weight: float) -> Choice:
        """One softmax per axis, and a penalty with this weight. z: kappa * logits, (K,)."""
        space = self.space

        # Noise. The largest logit of each axis after it names the slice drawn.
        noisy = z + gumbel_noise(len(z), generator)   # K
        subnet = space.best_per_axis(noisy)

        # The softmax of each axis, soft by tau: these are the marginals already.
        marginals = []
        for axis in space.split(noisy):
            y = (axis / tau).softmax(0)
            marginals.append(y)
        marginals = torch.cat(marginals)              # K

        # A second draw, by noise of its own.
        second = z + gumbel_noise(len(z), generator)  # K
        other = space.best_per_axis(second)
        log_ratio = torch.zeros(())
        for first, then, logits in zip(*map(space.split, (noisy, second, z))):
            log_ratio = log_ratio + logits[then.argmax()] - logits[first.argmax()]

        # The probability of every member, without noise: the product of its choices'.
        log_p = [axis.log_softmax(0) for axis in space.split(z)]
        log_p = space.onehot @ torch.cat(log_p)       # M
        p = log_p.exp()

        # The penalty: how far the mean cost is from the budget, as a share of it.
        mean_cost = p @ space.costs.float()
        off = (mean_cost / budget - 1).abs()
        return Choice(subnet, marginals, other, log_ratio, weight * off, p.max().item())

    # In use: route.

    @torch.no_grad()
    def route(self, budget: float, costs: torch.Tensor | None = None) -> SubNet:
        """The slice that runs at a budget: no noise, always the same. fail(): nothing fits.

        costs: (M,), what the budget bounds in place of parameters (plumbing/latency.py)."""
        space = self.space

        # At b = 1 there is nothing to choose. The baselines do not ask the router.
        if budget == 1:
            return space.full
        if self.mode == "uniform":
            return space.uniform(budget, costs)
        if self.mode == "random":
            return space.random(budget, self.seed, costs)

        # A budget that nothing fits ends here, whichever router is asked.
        rows = space.feasible(budget, costs)

        # The paper's router ignores what fits: it takes the best choice of every axis, alone.
        if self.mode == "penalty":
            assert costs is None, "a penalty router's choice is bounded by nothing"
            return space.best_per_axis(self.logits(budget))

        # The router was trained on budgets of parameters. With other costs, its budget is the mean
        # size of what fits.
        fits = space.costs <= budget
        if costs is not None:
            fits = costs <= budget
            sizes = space.costs[rows]
            budget = sizes.mean().item()

        # Our router takes the best member of F(b).
        rows = self.near_trained(budget, rows, fits)
        best = self.best_row(budget, rows)
        return space.subnet(space.members[best])

    def best_row(self, budget: float, rows: torch.Tensor) -> torch.Tensor:
        """That of these rows of the table whose member has the largest logit at this budget: ()."""
        onehot = self.space.onehot[rows]
        z = onehot @ self.logits(budget)
        return rows[z.argmax()]

    def near_trained(self, budget: float, rows: torch.Tensor, fits: torch.Tensor) -> torch.Tensor:
        """Those of these rows whose sizes training has prepared, or that are nearest to them.

            at a trained budget     all rows
            between two of them     sizes between those of the two trained slices, on every axis
            under the smallest      sizes no larger than the smallest trained slice's

        fits: (M,), the members that cost no more than was asked. If none of the rows has such sizes,
        but some that fits has, it is the largest of these: less than was asked, and prepared.

        Where no step ran, the logits are interpolated or extrapolated. They may combine sizes that
        never ran together: between trained budgets such a slice was seen to be 0.1 nats worse than
        a smaller one, under them up to 0.6 nats worse than the best that fits."""
        smaller = [b for b in self.budgets if b < budget]
        larger = [b for b in self.budgets if b > budget]
        if budget in self.budgets or not larger:
            return rows

        space = self.space

        # The slices of the trained neighbours span a range of sizes on every axis.
        neighbours = smaller[-1:] + larger[:1]
        ends = []
        for neighbour in neighbours:
            best = self.best_row(neighbour, space.feasible(neighbour))
            ends.append(space.members[best])
        ends = torch.stack(ends)                      # 1 or 2, 4
        lowest = ends.amin(0) if smaller else torch.zeros_like(ends[0])
        highest = ends.amax(0)

        # How far a member is outside: fractions of the full sizes, summed over the axes.
        below = (lowest - space.members).clamp(min=0)
        above = (space.members - highest).clamp(min=0)
        outside = below + above                       # M, 4
        full = torch.tensor(space.sizes(space.full))
        fractions = outside.double() / full
        distance = fractions.sum(1)                   # M

        # Nothing in F(b) is inside: the largest that is, if there is one.
        nearest = distance[rows].min()
        inside = fits & (distance == 0)
        if nearest > 0 and inside.any():
            sizes = space.costs.masked_fill(~inside, -1)
            return sizes.argmax()[None]
        return rows[distance[rows] <= nearest + 1e-9]

    @torch.no_grad()
    def factors(self, subnet: SubNet) -> torch.Tensor | None:
        """The modulation factors of a slice in use, (n_layers, 2). None at the full network: it is
        never modulated, so it stays a plain Llama."""
        if subnet == self.space.full:
            return None
        return self.modulation(subnet)
