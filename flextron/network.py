"""
A Llama with a router before every attention and every MLP (Flextron, ICML 2024).

Query heads and MLP neurons are elastic, layer by layer. The residual stream and the depth are not.
Every token takes its own sizes; # is what is computed for it:

                      layer 0          layer 1          layer 2
                   heads neurons    heads neurons    heads neurons
    token "def"    [##]  [####]     [##]  [##  ]     [# ]  [####]
    token " "      [# ]  [#   ]     [# ]  [#   ]     [# ]  [#   ]
    token "main"   [##]  [####]     [# ]  [### ]     [##]  [##  ]

routers.py chooses, segments.py runs what was chosen. This file: sizes, their costs, targets.

How a target t is met: a router's logits say what a choice is worth, and the choice is

    argmax over k of   worth_k - price * cost_k

with one price for the whole network: the smallest that brings the (mean) cost down to t. The price
of static routers follows from their logits. The price of dynamic ones is measured on calibration text
and kept, so a token's choice depends on nothing but this token's past. At target 1 the full network
runs, without a router.
"""
import math
from dataclasses import replace
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from flextron.routers import ELASTIC, Noise, Pick, Routers
from flextron.segments import attend, feed
from model import Llama, LlamaConfig, SubNet, losses_in_chunks
from plumbing.latency import some
from space import choices_for, cost, kv_groups, n_params

# -----------------------------------------------------------------------------
# sizes, and what they cost


def sizes_for(config: LlamaConfig, asked: dict | None = None) -> dict[str, list[int]]:
    """Sizes per axis, ascending, the full one last. asked: sizes that replace an axis.

    Default: an eighth, a quarter, a half, three quarters and all of the neurons; at most four
    numbers of heads. ValueError: a size that does not fit."""
    for axis in ELASTIC:
        if not isinstance(getattr(config, axis), int):
            raise ValueError("this Llama has another shape in every layer; expected a uniform one, "
                             "such as its source")
    unit = 256 if config.dim >= 1024 else config.head_dim
    neurons = []
    for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4):
        size = max(1, round(config.ffn_dim * part / unit)) * unit
        if size < config.ffn_dim:
            neurons.append(size)
    groups = kv_groups(config)
    heads = some(range(groups, config.n_heads + 1, groups), 4)
    wanted = dict(n_heads=heads, ffn_dim=neurons)
    wanted |= asked or {}
    choices = choices_for(config, wanted)
    return {axis: choices[axis] for axis in ELASTIC}


def timed_sizes(config: LlamaConfig, sizes: dict) -> dict[str, list[int]]:
    """The sizes that a table of latencies has to cover: these ones, at one width."""
    return choices_for(config, sizes | dict(dim=[config.dim]))


def parameter_cost(config: LlamaConfig, dynamic: bool) -> Callable[[SubNet], float]:
    """SubNet -> its cost in parameters, a fraction of the full model's.

    With dynamic routers all KV heads count, in MHA too, where a static slice drops them."""
    full = n_params(config, SubNet.full(config))

    def cost_of(subnet: SubNet) -> float:
        kept = 0
        if dynamic:
            own = subnet.config(config)
            left_out = sum(config.per_layer("n_kv_heads")) - sum(own.per_layer("n_kv_heads"))
            kept = 2 * config.head_dim * config.dim * left_out  # wk and wv
        return cost(config, subnet) + kept / full

    return cost_of


def costs_of(config: LlamaConfig, sizes: dict, cost_of: Callable) -> dict[str, torch.Tensor]:
    """Per axis (K,): what a layer of each size saves, a fraction (<= 0) of the full model.

    cost_of: SubNet -> fraction. Costs add up over layers: cost_of(subnet) = 1 + the sum of the
    entries of its layers."""
    full = SubNet.full(config)
    L = config.n_layers
    costs = {}
    for axis in ELASTIC:
        saved = []
        for size in sizes[axis]:
            narrow = replace(full, **{axis: (size,) * L})  # this size in every layer
            saved.append((cost_of(narrow) - cost_of(full)) / L)
        costs[axis] = torch.tensor(saved)
    return costs


def total_cost(shares: dict, costs: dict) -> float:
    """Cost of a network in which a layer takes size k with share (L, K), per axis."""
    saved = 0.0
    for axis in ELASTIC:
        saved += (shares[axis] @ costs[axis].to(shares[axis])).sum().item()
    return 1 + saved


# -----------------------------------------------------------------------------
# meeting a target


def cheapest_price(cost_at: Callable[[float], float], target: float, rounds: int) -> float:
    """The smallest price, of either sign, with cost_at(price) <= target: bisection of its asinh."""
    low = -16.0
    high = 16.0
    for _ in range(rounds):
        middle = (low + high) / 2
        if cost_at(math.sinh(middle)) <= target:
            high = middle
        else:
            low = middle
    return math.sinh(high)


def cost_of_choice(choice: dict, costs: dict) -> float:
    """Cost of a network whose layers take the sizes choice[axis] (L,)."""
    saved = 0.0
    for axis in ELASTIC:
        saved += costs[axis][choice[axis]].sum().item()
    return 1 + saved


def spend_the_rest(choice: dict, worth: dict, costs: dict, target: float) -> None:
    """Enlarges single layers while the cost stays within the target, best worth per cost first.

    choice: per axis (L,), changed in place. worth: per axis (L, K). costs: per axis (K,).
    One price for all layers leaves room: at the next lower price several layers grow at once."""
    while True:
        room = target - cost_of_choice(choice, costs)
        fitting = []
        for axis in ELASTIC:
            for layer in range(len(choice[axis])):
                now = choice[axis][layer].item()
                fitting += enlargements(axis, layer, now, worth[axis][layer], costs[axis], room)
        if not fitting:
            return
        _, axis, layer, k = max(fitting)
        choice[axis][layer] = k


def enlargements(axis: str, layer: int, now: int, worth: torch.Tensor, costs: torch.Tensor,
                 room: float) -> list[tuple]:
    """(worth per cost, axis, layer, k) of every larger size k of a layer that fits in the room.

    now: the size it has. worth, costs: (K,) of its sizes."""
    found = []
    for k in range(now + 1, len(costs)):
        extra = (costs[k] - costs[now]).item()
        if 0 < extra <= room:
            gain = (worth[k] - worth[now]).item()
            found.append((gain / extra, axis, layer, k))
    return found


# -----------------------------------------------------------------------------
# the network


class Flextron(nn.Module):
    """A Llama with routers.

    sizes: per axis, K to choose from. costs: per axis (K,), in the currency of the targets.
    unit: the name of that currency, params or latency."""

    def __init__(self, model: Llama, sizes: dict, dynamic: bool, costs: dict, unit: str = "params",
                 seed: int = 0):
        super().__init__()
        self.model = model
        self.sizes = sizes
        self.dynamic = dynamic
        self.costs = costs
        self.unit = unit
        self.seed = seed
        self.routers = Routers(model.config, sizes, dynamic, seed)
        # Of dynamic routers, by rising target: rows of target, price, shares {axis: (L, K)}.
        self.calibrated: list[dict] = []
        # Per axis (K, units), 1 where a size keeps a unit: the units whose place is under the size.
        groups = kv_groups(model.config)
        in_group = model.config.n_heads // groups
        place = dict(
            n_heads=torch.arange(model.config.n_heads) % in_group * groups,
            ffn_dim=torch.arange(model.config.ffn_dim),
        )
        self.masks = {}
        for axis in ELASTIC:
            reach = torch.tensor(sizes[axis])[:, None]
            self.masks[axis] = (place[axis] < reach).float()

    def to(self, device) -> "Flextron":
        """Masks and costs come along."""
        for axis in ELASTIC:
            self.masks[axis] = self.masks[axis].to(device)
            self.costs[axis] = self.costs[axis].to(device)
        return super().to(device)

    # ---- a pass

    def pick(self, axis: str, layer: int, target: float, x: torch.Tensor, noise: Noise | None,
             price: float) -> Pick:
        """A router's choice for normed hidden states x (B, T, dim): drawn by noise, or the best."""
        if noise is None:
            return self.best(axis, layer, target, x, price)
        return self.drawn(axis, layer, target, x, noise)

    def best(self, axis: str, layer: int, target: float, x: torch.Tensor, price: float) -> Pick:
        """A dynamic router's choice in use: always the same for the same token and its past."""
        assert self.dynamic, "static routers are deployed as one SubNet: route()"
        B, T, _ = x.shape
        K = len(self.sizes[axis])
        if target < 1:
            worth = self.routers(axis, layer, target, x)
            choice = (worth - price * self.costs[axis]).argmax(-1)   # B, T
        else:
            choice = torch.full((B, T), K - 1, device=x.device)
        hard = F.one_hot(choice, K).float()
        return Pick(axis, choice, hard, hard, hard)

    def drawn(self, axis: str, layer: int, target: float, x: torch.Tensor, noise: Noise) -> Pick:
        """A router's choice in training: the Gumbel-softmax, straight-through."""
        B, T, _ = x.shape
        K = len(self.sizes[axis])
        choosers = T if self.dynamic else 1  # tokens, or the sequence as a whole
        logits = noise.kappa * self.routers(axis, layer, target, x)
        noisy = logits + noise.gumbel(axis, layer, (B, choosers, K)).to(x.device)
        choice = noisy.argmax(-1)                                    # B, T or 1
        soft = (noisy / noise.tau).softmax(-1)                       # B, T or 1, K
        gate = F.one_hot(choice, K) + soft - soft.detach()           # one_hot, with soft's gradient
        return Pick(axis, choice.expand(B, T), gate, soft, logits.softmax(-1))

    def states(self, tokens, target: float = 1.0, noise: Noise | None = None,
               masked: bool = False, cache=None, price: float | None = None):
        """tokens (B, T) -> (the residual stream at its end, normed (B, T, dim), picks).

        masked: the full width under gates, through which routers get their gradient. Otherwise
        segments: the same function at the cost of what was chosen. noise: of a training pass.
        price: default, the target's. picks: 2 n_layers of them, attention and MLP in turn."""
        model = self.model
        T = tokens.size(1)
        start = 0 if cache is None else cache.length
        cos, sin = model.rope(start, start + T, tokens.device)
        if price is None and noise is None:
            price = self.price(target)
        picks = []
        x = model.tok_embeddings(tokens)                             # B, T, dim
        for i, block in enumerate(model.layers):
            # attention: its router, then as many heads as every token chose
            h = block.attention_norm(x)
            pick = self.pick("n_heads", i, target, h, noise, price)
            picks.append(pick)
            if masked:
                gate = pick.gate @ self.masks["n_heads"]             # B, T or 1, n_heads
                y = block.attention(h, cos, sin, model.config.n_heads, gate, cache, i)
            else:
                sizes = self.sizes["n_heads"]
                y = attend(block.attention, h, pick.choice, sizes, cos, sin, cache, i)
            x = x + y
            # MLP: its router, then as many neurons as every token chose
            h = block.ffn_norm(x)
            pick = self.pick("ffn_dim", i, target, h, noise, price)
            picks.append(pick)
            if masked:
                gate = pick.gate @ self.masks["ffn_dim"]             # B, T or 1, ffn_dim
                y = block.feed_forward(h, model.config.ffn_dim, gate)
            else:
                y = feed(block.feed_forward, h, pick.choice, self.sizes["ffn_dim"])
            x = x + y
        if cache is not None:
            cache.length += T
        return model.norm(x), picks

    def forward(self, tokens, targets=None, target: float = 1.0, noise: Noise | None = None,
                masked: bool = False, cache=None, price: float | None = None, at=None):
        """states(), and then, as Llama.forward: (logits, None, picks), or, with targets (B, T),
        (None, the mean cross-entropy in nats, picks)."""
        x, picks = self.states(tokens, target, noise, masked, cache, price)
        output = self.model.output.weight
        if targets is not None:
            return None, losses_in_chunks(x, output, targets).mean(), picks
        if at is not None:
            x = x[at]
        return F.linear(x, output).float(), None, picks

    def mean_cost(self, picks: list[Pick]) -> torch.Tensor:
        """() the expected cost of a training pass, over what its routers draw from."""
        saved = 0.0
        for pick in picks:
            expected = (pick.probabilities * self.costs[pick.axis]).sum(-1)
            saved = saved + expected.mean()
        return 1 + saved

    def shares_of(self, picks: list[Pick]) -> dict[str, torch.Tensor]:
        """Per axis (L, K): how often each size was chosen in a pass."""
        shares = {axis: [] for axis in ELASTIC}
        for pick in picks:
            gate = pick.gate.detach().float().flatten(0, 1)          # B*T, K
            shares[pick.axis].append(gate.mean(0).cpu())
        return {axis: torch.stack(rows) for axis, rows in shares.items()}

    # ---- static routers at a target

    @torch.no_grad()
    def route(self, target: float) -> SubNet:
        """The SubNet of static routers: cost <= target, no noise."""
        if target == 1:
            return self.model.full
        config = self.model.config
        layers = range(config.n_layers)
        costs = {axis: saved.double().cpu() for axis, saved in self.costs.items()}
        worth = {}
        for axis in ELASTIC:
            logits = torch.stack([self.routers(axis, i, target) for i in layers])
            worth[axis] = logits.double().cpu()                      # L, K

        def choice_at(price: float) -> dict[str, torch.Tensor]:
            return {axis: (worth[axis] - price * costs[axis]).argmax(1) for axis in ELASTIC}

        def cost_at(price: float) -> float:
            return cost_of_choice(choice_at(price), costs)

        bound = target + 1e-9  # rounding must not forbid the smallest SubNet at its own cost
        price = cheapest_price(cost_at, bound, 50)
        choice = choice_at(price)
        spend_the_rest(choice, worth, costs, bound)
        sizes = {}
        for axis in ELASTIC:
            sizes[axis] = [self.sizes[axis][k] for k in choice[axis].tolist()]
        return SubNet(config.dim, layers, **sizes)

    # ---- dynamic routers at a target

    @torch.no_grad()
    def calibrate(self, windows: torch.Tensor, targets, rounds: int = 14) -> None:
        """Measures the prices of dynamic routers: the mean cost on text (S, T) meets each target."""
        if not self.dynamic:
            return
        rows = []
        for target in sorted(set(targets) - {1.0}):
            rows.append(self.calibrated_row(windows, target, rounds))
        self.calibrated = rows

    def calibrated_row(self, windows: torch.Tensor, target: float, rounds: int) -> dict:
        """One target's price, and what its tokens then take."""
        def shares_at(price: float) -> dict[str, torch.Tensor]:
            picks = self(windows, target=target, price=price)[2]
            return self.shares_of(picks)

        def cost_at(price: float) -> float:
            return total_cost(shares_at(price), self.costs)

        price = cheapest_price(cost_at, target, rounds)
        shares = {axis: share.tolist() for axis, share in shares_at(price).items()}
        return dict(target=target, price=price, shares=shares)

    def price(self, target: float) -> float:
        """The price of dynamic routers' choices, linear between calibrated targets."""
        if not self.calibrated:
            return 0.0
        targets = [row["target"] for row in self.calibrated]
        prices = [row["price"] for row in self.calibrated]
        return float(np.interp(target, targets, prices))

    # ---- what a target gets

    def shares(self, target: float) -> dict[str, torch.Tensor]:
        """Per axis (L, K), how often each size is taken: exact if static, as calibrated if dynamic."""
        if self.dynamic:
            return self.calibrated_shares(target)
        subnet = self.route(target)
        shares = {}
        for axis in ELASTIC:
            own = torch.tensor(getattr(subnet, axis))                # L
            shares[axis] = (own[:, None] == torch.tensor(self.sizes[axis])).float()
        return shares

    def calibrated_shares(self, target: float) -> dict[str, torch.Tensor]:
        """Of dynamic routers, linear between calibrated targets and the full model."""
        L = self.model.config.n_layers
        full = {}
        for axis in ELASTIC:
            K = len(self.sizes[axis])
            full[axis] = F.one_hot(torch.full((L,), K - 1), K)
        rows = [*self.calibrated, dict(target=1.0, shares=full)]
        # the rows at or above the target, and below it
        high = next(i for i, row in enumerate(rows) if row["target"] >= target)
        low = high
        if rows[high]["target"] > target:
            low = max(0, high - 1)
        span = rows[high]["target"] - rows[low]["target"]
        w = (target - rows[low]["target"]) / span if span else 0.0
        shares = {}
        for axis in ELASTIC:
            below = torch.as_tensor(rows[low]["shares"][axis]).float()
            above = torch.as_tensor(rows[high]["shares"][axis]).float()
            shares[axis] = (1 - w) * below + w * above
        return shares

    def least_cost(self) -> float:
        """The cost of the smallest SubNet, in the currency of the targets."""
        saved = 0.0
        for axis in ELASTIC:
            saved += self.model.config.n_layers * self.costs[axis][0].item()
        return 1 + saved

    def smallest(self) -> float:
        """The smallest target in use: that of the smallest SubNet, or the first calibrated one."""
        if not self.dynamic:
            return self.least_cost()
        return self.calibrated[0]["target"] if self.calibrated else 1.0

    def target_for(self, asked: float, costs: dict, unit: str) -> float:
        """The largest target, in thousandths, whose network costs at most `asked` in another currency.

        costs: the sizes' costs in that currency. In the targets' own currency it is `asked`."""
        if unit == self.unit or asked == 1:
            return asked
        smallest = self.smallest()
        thousandths = range(math.ceil(1000 * smallest), 1001)
        grid = [smallest, *(i / 1000 for i in thousandths)]
        low = 0
        high = len(grid) - 1
        while low < high:  # costs rise with the target
            middle = (low + high + 1) // 2
            if total_cost(self.shares(grid[middle]), costs) <= asked:
                low = middle
            else:
                high = middle - 1
        return grid[low]
