"""
Every token takes its own width: the routers of Flextron (ICML 2024), and a forward that saves what they do not choose.

Elastic are the MLP neurons and the query heads, layer by layer; the residual stream and the depth are not. Before every
attention and every MLP stands a router, told the target t, the share of the full model's cost that a forward may take:

    static     target                          -> sizes, the same for all tokens: a SubNet with a shape per layer
    dynamic    target, this token's hidden state -> sizes for this token alone ("input-adaptive")

Widths are nested, so the output is a sum over segments of neurons, or of heads, and a token takes the first few:

    neurons    0 ...... 48 ...... 96 .......... 192          sizes 48, 96, 192
    token 0    [  seg 0  ][  seg 1 ][   segment 2  ]         segment k is one matmul over the tokens that reach it;
    token 1    [  seg 0  ]                                   sorted by their choice, they are the first n_k rows
    token 2    [  seg 0  ][  seg 1 ]

Keys and values are computed for all tokens, whatever they chose: the tokens to come look at all of them.

How a target is met: a router's logits z say what a choice is worth, and the choice is argmax_k z_k - price * cost_k,
with one price for the whole network, the smallest that brings the (mean) cost down to the target. The static router's
follows from its logits; the dynamic one's is measured on calibration text and kept: a token's choice depends on nothing
but that token's past. At target 1 there is no router: it is the full network.
"""
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.latency import some
from model import Llama, LlamaConfig, SubNet, apply_rope
from space import choices_for, cost, kv_groups, n_params, random_generator

KINDS = ("n_heads", "ffn_dim")

# -----------------------------------------------------------------------------
# sizes, and what they cost


def sizes_for(config: LlamaConfig, asked: dict | None = None) -> dict[str, list[int]]:
    """Sizes per kind, ascending, the full one last. Default: an eighth, a quarter, a half, three quarters and all of
    the neurons; at most four numbers of heads. ValueError: a size that does not fit."""
    if any(not isinstance(getattr(config, kind), int) for kind in KINDS):
        raise ValueError("this Llama has another shape in every layer; expected a uniform one, such as its source")
    unit, full = 256 if config.dim >= 1024 else config.head_dim, config.ffn_dim
    parts = {max(1, round(full * part / unit)) * unit for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4)}
    groups = kv_groups(config)
    default = {"n_heads": some(range(groups, config.n_heads + 1, groups), 4), "ffn_dim": [p for p in parts if p < full]}
    return {kind: choices_for(config, default | (asked or {}))[kind] for kind in KINDS}


def timed_sizes(config: LlamaConfig, sizes: dict) -> dict[str, list[int]]:
    """What a table of latencies has to cover: the width never changes."""
    return choices_for(config, sizes | dict(dim=[config.dim]))


def parameters_of(config: LlamaConfig, dynamic: bool):
    """SubNet -> cost in parameters. With a dynamic router all KV heads are computed, in MHA too."""
    def measure(subnet: SubNet) -> float:
        s = subnet.config(config)
        left_out = sum(config.per_layer("n_kv_heads")) - sum(s.per_layer("n_kv_heads"))
        kept = 2 * config.head_dim * config.dim * left_out if dynamic else 0
        return cost(config, subnet) + kept / n_params(config, SubNet.full(config))
    return measure


def costs_of(config: LlamaConfig, sizes: dict, measure) -> dict[str, torch.Tensor]:
    """Per kind (K,): what a layer of each size saves, as a fraction (<= 0) of the full model. Costs add up over layers:
    measure(SubNet) = 1 + the sum of its sizes' costs."""
    full, L = SubNet.full(config), config.n_layers
    of = lambda kind, size: (measure(replace(full, **{kind: (size,) * L})) - measure(full)) / L
    return {kind: torch.tensor([of(kind, size) for size in sizes[kind]]) for kind in KINDS}


def total(shares: dict, costs: dict) -> float:
    """Cost of a network whose layers take size k with share (L, K)."""
    return 1 + sum((shares[kind] @ costs[kind].to(shares[kind])).sum().item() for kind in KINDS)


def cheapest_price(mean_cost, target: float, rounds: int) -> float:
    """The smallest price, of either sign, with mean_cost(price) <= target, by bisection of its asinh."""
    low, high = -16.0, 16.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_cost(math.sinh(middle)) <= target else (middle, high)
    return math.sinh(high)


# -----------------------------------------------------------------------------
# segments: work for the tokens that chose it


def feed(mlp, x: torch.Tensor, choice: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The MLP with sizes[choice] neurons for each token. x: (B, T, dim), choice: (B, T)."""
    order = choice.flatten().argsort(descending=True, stable=True)                # B*T, wide tokens first
    rows, out = x.flatten(0, 1)[order], torch.zeros_like(x.flatten(0, 1))
    reach = [int((choice >= k).sum()) for k in range(len(sizes))]
    for n, a, b in zip(reach, [0, *sizes], sizes):
        if n:
            h = F.silu(F.linear(rows[:n], mlp.w1.weight[a:b])) * F.linear(rows[:n], mlp.w3.weight[a:b])  # n, b - a
            out[:n] += F.linear(h, mlp.w2.weight[:, a:b])
    return torch.zeros_like(out).index_add_(0, order, out).view_as(x)


def attend(attention, x, choice, sizes, cos, sin, cache=None, layer=0) -> torch.Tensor:
    """Attention with sizes[choice] query heads for each token; keys and values for all. x: (B, T, dim), choice: (B, T).

    Queries of a sequence are sorted by choice; a segment of heads runs on as many rows of each sequence as the one with
    most tokens there needs, the others' surplus rows are dropped."""
    B, T, C = x.shape
    g, hd = attention.groups, attention.head_dim
    split = lambda w: F.linear(x, w).unflatten(-1, (-1, hd))
    keys = apply_rope(split(attention.wk.weight), cos, sin).transpose(1, 2)       # B, n_kv, T, hd
    values = split(attention.wv.weight).transpose(1, 2)
    if cache is not None:
        keys, values = cache.append(layer, keys, values)
    S = keys.size(2)
    order = choice.argsort(dim=1, descending=True, stable=True)                   # B, T
    rows, chosen = x.gather(1, order[..., None].expand(B, T, C)), choice.gather(1, order)
    past = torch.arange(S, device=x.device) <= (S - T + order)[..., None]         # B, T, S: a query's own past
    wq, wo = attention.wq.weight.unflatten(0, (g, -1, hd)), attention.wo.weight.unflatten(1, (g, -1, hd))
    out, own = torch.zeros_like(x), attention.n_heads == attention.n_kv_heads     # own: MHA, a KV head for each head
    for k, (a, b) in enumerate(zip([0, *sizes], sizes)):
        n = int((chosen >= k).sum(1).max())
        if n == 0:
            break
        of_kv = slice(a, b) if own else slice(None)
        a, b = a // g, b // g                                                     # heads a..b of every group
        q = F.linear(rows[:, :n], wq[:, a:b].flatten(0, 2)).unflatten(-1, (-1, hd))
        q = apply_rope(q, cos[order[:, :n]], sin[order[:, :n]]).transpose(1, 2)   # B, g * (b - a), n, hd
        y = F.scaled_dot_product_attention(q, keys[:, of_kv], values[:, of_kv], attn_mask=past[:, None, :n],
                                           enable_gqa=True)
        y = F.linear(y.transpose(1, 2).flatten(2), wo[:, :, a:b].flatten(1))      # B, n, dim
        out[:, :n] += y * (chosen[:, :n, None] >= k)
    return torch.zeros_like(out).scatter_(1, order[..., None].expand(B, T, C), out)


# -----------------------------------------------------------------------------
# routers


class Noise(NamedTuple):
    """Gumbel noise of a training pass, a function of `parts` (seed, step, target ...) alone."""
    tau: float
    kappa: float
    parts: tuple

    def gumbel(self, kind: str, layer: int, shape) -> torch.Tensor:
        u = torch.rand(shape, generator=random_generator(*self.parts, kind, layer), dtype=torch.float64)
        return -(-u.clamp(1e-12, 1 - 1e-12).log()).log().float()


class Pick(NamedTuple):
    """What a router chose for a pass. K sizes; T is 1 where a sequence shares one choice (static, in training)."""
    choice: torch.Tensor   # (B, T) index of the size
    gate: torch.Tensor     # (B, T, K) one-hot; in training straight-through, with the gradient of `soft`
    soft: torch.Tensor     # (B, T, K) the Gumbel-softmax
    p: torch.Tensor        # ([B, T,] K) what it draws from


class Routers(nn.Module):
    """Two routers per layer, (target[, hidden state]) -> hidden layer -> logits over sizes; stacked over layers."""

    def __init__(self, config: LlamaConfig, sizes: dict, dynamic: bool, seed: int = 0):
        super().__init__()
        self.dynamic, L, W = dynamic, config.n_layers, max(16, min(128, config.dim // 8))
        generator, self.w = random_generator("routers", seed), nn.ParameterDict()
        for kind in KINDS:
            K = len(sizes[kind])
            shapes = dict(target=(L, W), bias=(L, W), out=(L, W, K), out_bias=(L, K)) | (
                dict(state=(L, config.dim, W)) if dynamic else {})
            for name, shape in shapes.items():  # last layers zero: all sizes are equally likely at the start
                random = torch.randn(shape, generator=generator)
                scale = {"target": 4.0, "bias": 2.0, "state": config.dim ** -0.5}.get(name, 0.0)
                self.w[f"{kind}_{name}"] = nn.Parameter(random * scale)

    def forward(self, kind: str, layer: int, target: float, x: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (K,), or for hidden states x (B, T, dim), if dynamic, (B, T, K). The state is detached: the network
        does not learn to please its routers."""
        w = lambda name: self.w[f"{kind}_{name}"][layer]
        h = target * w("target") + w("bias")
        if self.dynamic:
            h = h + x.detach() @ w("state")
        return (F.silu(h) @ w("out") + w("out_bias")).float()


class Flextron(nn.Module):
    """A Llama with routers. costs: per kind (K,), in the currency of its targets (`unit`: params or latency)."""

    def __init__(self, model: Llama, sizes: dict, dynamic: bool, costs: dict, unit: str = "params", seed: int = 0):
        super().__init__()
        self.model, self.sizes, self.dynamic, self.costs = model, sizes, dynamic, costs
        self.unit, self.seed = unit, seed
        self.routers = Routers(model.config, sizes, dynamic, seed)
        self.calibrated: list[dict] = []  # dynamic: rows of target, price, shares {kind: (L, K)}, by rising target
        g, c = kv_groups(model.config), model.config
        rank = {"n_heads": torch.arange(c.n_heads) % (c.n_heads // g) * g, "ffn_dim": torch.arange(c.ffn_dim)}
        self.masks = {kind: (rank[kind] < torch.tensor(sizes[kind])[:, None]).float() for kind in KINDS}  # K, units

    def to(self, device):
        """Masks and costs come along."""
        for of in (self.masks, self.costs):
            of.update({kind: t.to(device) for kind, t in of.items()})
        return super().to(device)

    def pick(self, kind: str, layer: int, target: float, x: torch.Tensor, noise: Noise | None, price: float) -> Pick:
        """The router's choice for normed hidden states x (B, T, dim). Without noise: always the same."""
        (B, T, _), K = x.shape, len(self.sizes[kind])
        if noise is None:
            assert self.dynamic, "static routers are deployed as one SubNet: route()"
            z = self.routers(kind, layer, target, x) - price * self.costs[kind]
            choice = (z.argmax(-1) if target < 1 else torch.tensor(K - 1, device=x.device)).expand(B, T)
            hard = F.one_hot(choice, K).float()
            return Pick(choice, hard, hard, hard)
        z = noise.kappa * self.routers(kind, layer, target, x)
        noisy = z + noise.gumbel(kind, layer, (B, T if self.dynamic else 1, K)).to(x.device)
        choice, soft = noisy.argmax(-1), (noisy / noise.tau).softmax(-1)
        gate = F.one_hot(choice, K) + soft - soft.detach()
        return Pick(choice.expand(B, T), gate, soft, z.softmax(-1))

    def forward(self, tokens, targets=None, target: float = 1.0, noise: Noise | None = None, masked: bool = False,
                cache=None, price: float | None = None):
        """tokens (B, T) -> (logits, mean cross-entropy or None, picks: 2 n_layers, attention and MLP in turn).

        masked: full width under gates, which lets gradients through to the routers; else segments, the same function
        at the cost of what was chosen. noise: a training pass. price: of a choice, default that of the target."""
        m, T, start = self.model, tokens.size(1), 0 if cache is None else cache.length
        cos, sin = m.rope(start, start + T, tokens.device)
        price = self.price(target) if price is None and noise is None else price
        x, picks = m.tok_embeddings(tokens), []
        for i, block in enumerate(m.layers):
            h = block.attention_norm(x)
            picks.append(pick := self.pick("n_heads", i, target, h, noise, price))
            if masked:
                gate = pick.gate @ self.masks["n_heads"]
                x = x + block.attention(h, cos, sin, m.config.n_heads, gate, cache, i)
            else:
                x = x + attend(block.attention, h, pick.choice, self.sizes["n_heads"], cos, sin, cache, i)
            h = block.ffn_norm(x)
            picks.append(pick := self.pick("ffn_dim", i, target, h, noise, price))
            if masked:
                x = x + block.feed_forward(h, m.config.ffn_dim, pick.gate @ self.masks["ffn_dim"])
            else:
                x = x + feed(block.feed_forward, h, pick.choice, self.sizes["ffn_dim"])
        if cache is not None:
            cache.length += T
        logits = m.output(m.norm(x)).float()
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten()), picks

    def mean_cost(self, picks: list[Pick]) -> torch.Tensor:
        """() the expected cost of a pass, of what its routers draw from."""
        return 1 + sum((pick.p * self.costs[KINDS[i % 2]]).sum(-1).mean() for i, pick in enumerate(picks))

    def shares_of(self, picks: list[Pick]) -> dict[str, torch.Tensor]:
        """How often each size was chosen, per kind (L, K)."""
        return {kind: torch.stack([pick.gate.detach().float().flatten(0, 1).mean(0).cpu() for pick in picks[i::2]])
                for i, kind in enumerate(KINDS)}

    # ---- what is deployed at a target

    @torch.no_grad()
    def route(self, target: float) -> SubNet:
        """The static router's SubNet: cost <= target, no noise."""
        if target == 1:
            return self.model.full
        L, costs = range(self.model.config.n_layers), {kind: c.double().cpu() for kind, c in self.costs.items()}
        z = {kind: torch.stack([self.routers(kind, i, target) for i in L]).double().cpu() for kind in KINDS}
        at = lambda price: {kind: (z[kind] - price * costs[kind]).argmax(1) for kind in KINDS}
        spent = lambda k: 1 + sum(costs[kind][k[kind]].sum().item() for kind in KINDS)
        best = at(cheapest_price(lambda price: spent(at(price)), target + 1e-9, 50))
        # One price for all leaves room, up to a step of several layers at once: fill it, best worth per cost first.
        while upgrades := [((z[kind][i, k] - z[kind][i, now]) / extra, kind, i, k) for kind in KINDS for i in L
                           for now in [best[kind][i].item()] for k in range(now + 1, len(self.sizes[kind]))
                           if 0 < (extra := (costs[kind][k] - costs[kind][now]).item()) <= target + 1e-9 - spent(best)]:
            _, kind, i, k = max(upgrades)
            best[kind][i] = k
        return SubNet(self.model.config.dim, L, *([self.sizes[kind][k] for k in best[kind].tolist()] for kind in KINDS))

    @torch.no_grad()
    def calibrate(self, windows: torch.Tensor, targets, rounds: int = 14) -> None:
        """Measures the dynamic router's prices on text (S, T): the mean cost over its tokens meets each target."""
        if not self.dynamic:
            return
        share = lambda target, price: self.shares_of(self(windows, target=target, price=price)[2])
        rows = []
        for target in sorted(set(targets) - {1.0}):
            spent = lambda price: total(share(target, price), {kind: c.cpu() for kind, c in self.costs.items()})
            price = cheapest_price(spent, target, rounds)
            shares = {kind: s.tolist() for kind, s in share(target, price).items()}
            rows.append(dict(target=target, price=price, shares=shares))
        self.calibrated = rows

    def price(self, target: float) -> float:
        """Of the dynamic router's choices, linear between calibrated targets."""
        rows = self.calibrated
        return float(np.interp(target, [r["target"] for r in rows], [r["price"] for r in rows])) if rows else 0.0

    def shares(self, target: float) -> dict[str, torch.Tensor]:
        """What a target gets, per kind (L, K): static exactly, dynamic as calibrated, linear between targets."""
        full = {kind: F.one_hot(torch.full((self.model.config.n_layers,), len(self.sizes[kind]) - 1)) for kind in KINDS}
        if not self.dynamic:
            subnet = self.route(target)
            return {kind: torch.tensor([[float(size == own) for size in self.sizes[kind]]
                                        for own in getattr(subnet, kind)]) for kind in KINDS}
        rows = [*self.calibrated, dict(target=1.0, shares=full)]
        high = next(i for i, r in enumerate(rows) if r["target"] >= target)
        low = max(0, high - 1) if rows[high]["target"] > target else high
        span = rows[high]["target"] - rows[low]["target"]
        w = (target - rows[low]["target"]) / span if span else 0.0
        of = lambda i, kind: torch.as_tensor(rows[i]["shares"][kind]).float()
        return {kind: (1 - w) * of(low, kind) + w * of(high, kind) for kind in KINDS}

    def smallest(self) -> float:
        """The smallest target: that of the smallest SubNet, or the smallest calibrated one."""
        if self.dynamic:
            return self.calibrated[0]["target"] if self.calibrated else 1.0
        return 1 + sum(self.model.config.n_layers * c[0].item() for c in self.costs.values())

    def target_for(self, asked: float, costs: dict, unit: str) -> float:
        """The target whose network costs at most `asked` in another currency: the largest in thousandths."""
        if unit == self.unit or asked == 1:
            return asked
        grid = [self.smallest(), *(i / 1000 for i in range(math.ceil(1000 * self.smallest()), 1001))]
        fits = lambda i: total(self.shares(grid[i]), costs) <= asked
        low, high = 0, len(grid) - 1
        while low < high:  # costs rise with the target
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return grid[low]
