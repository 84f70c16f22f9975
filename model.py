"""
The Llama, and every smaller Llama inside it (LLaMaFlex, ICLR 2025).

Plain Llama 3 in Meta's names and layout, so raw weights load with strict=True. Six places differ from
the plain model; each is marked `# <-- n` below:

  1. elastic width    the residual stream is its first `dim` channels, everywhere
  2. elastic MLP      the first `ffn_dim` neurons of a layer
  3. elastic heads    the first query heads of every KV group (all KV heads stay)
  4. elastic depth    only the layers that are kept are called
  5. gates            multipliers in [0, 1] through which a router gets its gradient (soft, full width)
  6. modulation       a factor per block and sub-block that knows which slice is running (router.py: Modulation)

1-4 are real slices: the blocks of a `SubNet` of cost c take about c times the time. They are only good models
after importance.py has sorted the units, so that the first k are the best k.

  paper          here                 paper          here
  H              dim                  N_A            n_heads (query heads)
  D              ffn_dim              N, lambda      layers (indices kept)
  b_j            budget               y              gates (as marginals of the choices)

Try it:  python -c "from model import *; print(Llama(LlamaConfig())(torch.zeros(1, 8, dtype=torch.long))[0].shape)"
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# shapes


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of one transformer, as params.json has it. The default is the demo's shape.

    n_heads, n_kv_heads and ffn_dim may be tuples with a value per layer (a heterogeneous slice).
    rope_factor 1 is plain RoPE, 8 Llama 3.1, 32 Llama 3.2. context is the window it was trained on.
    """
    dim: int = 128
    n_layers: int = 8
    n_heads: int | tuple[int, ...] = 8
    n_kv_heads: int | tuple[int, ...] = 4
    head_dim: int = 16
    ffn_dim: int | tuple[int, ...] = 384
    vocab_size: int = 1280
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 1.0
    tied: bool = False
    context: int = 128

    def per_layer(self, name: str) -> tuple[int, ...]:
        """n_heads, n_kv_heads or ffn_dim as one value per layer."""
        value = getattr(self, name)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * self.n_layers


@dataclass(frozen=True)
class SubNet:
    """A slice of a Llama: `dim` channels, the layers kept (ascending), and for each kept layer its query
    heads (over all KV groups) and MLP neurons. Uniform is the normal case (LLaMaFlex)."""
    dim: int
    layers: tuple[int, ...]
    n_heads: tuple[int, ...]
    ffn_dim: tuple[int, ...]

    def __post_init__(self):  # JSON has lists: SubNet(**json.loads(json.dumps(vars(subnet)))) == subnet
        for name in ("layers", "n_heads", "ffn_dim"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def full(cls, config: LlamaConfig) -> "SubNet":
        """The whole network."""
        return cls(config.dim, tuple(range(config.n_layers)), config.per_layer("n_heads"), config.per_layer("ffn_dim"))

    @classmethod
    def uniform(cls, dim: int, layers, n_heads: int, ffn_dim: int) -> "SubNet":
        """The same number of heads and neurons in every kept layer."""
        layers = tuple(sorted(int(i) for i in layers))
        return cls(dim, layers, (n_heads,) * len(layers), (ffn_dim,) * len(layers))

    def config(self, full: LlamaConfig) -> LlamaConfig:
        """The shape of this slice of `full` as a Llama of its own (what export.py writes)."""
        flat = lambda v: v[0] if len(set(v)) == 1 else tuple(v)
        # All KV heads stay (a slice has a query head in every group), except in MHA, where a KV head belongs to
        # one query head and goes with it: either way the smaller of the two numbers.
        kv = [min(h, full.per_layer("n_kv_heads")[i]) for i, h in zip(self.layers, self.n_heads)]
        return replace(full, dim=self.dim, n_layers=len(self.layers), n_heads=flat(self.n_heads),
                       n_kv_heads=flat(kv), ffn_dim=flat(self.ffn_dim))


class Gates(NamedTuple):
    """Multipliers in [0, 1] on the full network's units; None is one. Ones, then zeros: the function of the slice.
    Sliced passes take their part. Attention and FeedForward also take a gate per token, (B, T, units)."""
    dim: torch.Tensor      # (dim,)                one order of channels for the whole network
    n_heads: torch.Tensor  # (n_layers, n_heads)   group-major, as the heads of wq
    ffn_dim: torch.Tensor  # (n_layers, ffn_dim)
    layers: torch.Tensor   # (n_layers,)           on the block's two outputs


NO_GATES = Gates(None, None, None, None)

class KVCache:
    """Keys and values of the tokens so far, (B, n_kv_heads, max_len, head_dim) per layer, filled in place."""

    def __init__(self, max_len: int):
        self.max_len, self.length, self.layers = max_len, 0, {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds k, v of T new tokens, returns those of all tokens so far."""
        B, n_kv, T, hd = k.shape
        end = self.length + T
        assert end <= self.max_len, f"KV cache of {self.max_len} tokens asked to hold {end}"
        if layer not in self.layers:
            self.layers[layer] = (k.new_empty(B, n_kv, self.max_len, hd), v.new_empty(B, n_kv, self.max_len, hd))
        K, V = self.layers[layer]
        K[:, :, self.length:end], V[:, :, self.length:end] = k, v
        return K[:, :, :end], V[:, :, :end]


# -----------------------------------------------------------------------------
# rotary positions


def rope_frequencies(config: LlamaConfig) -> torch.Tensor:
    """f_j = theta^(-2j/head_dim), (head_dim/2,) radians per position; with rope_factor > 1 the long waves
    are slowed as Llama 3.1 does: waves longer than the old context 8192 by the factor, those shorter than
    a quarter of it not at all, and a linear blend between."""
    f = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    if config.rope_factor == 1.0:
        return f
    waves_in_context = 8192 * f / (2 * math.pi)
    keep = ((waves_in_context - 1) / 3).clamp(0, 1)  # 1: short wave, untouched; 0: long wave, divided
    return keep * f + (1 - keep) * f / config.rope_factor


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates Meta's interleaved pairs (x0 x1)(x2 x3)... x: (B, T, heads, head_dim), cos, sin: (T, 1, head_dim/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


# -----------------------------------------------------------------------------
# layers


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32, over the channels that exist."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x, gate=None):
        """x: (B, T, d) with d <= dim; gate: (dim,) or None."""
        d = x.size(-1)  # <-- 1. elastic width: the mean is over the channels that exist
        x32, weight = x.float(), self.weight[:d]
        if gate is None:
            mean_square = x32.square().mean(-1, keepdim=True)
        else:  # <-- 5. gates: a weighted mean, so hard gates divide by the active width and equal slicing
            gate = gate[:d]
            mean_square = (x32.square() * gate).sum(-1, keepdim=True) / gate.sum()
            weight = weight * gate
        return (x32 * torch.rsqrt(mean_square + self.eps)).type_as(x) * weight


class Attention(nn.Module):
    """Causal grouped-query attention with the first query heads of every KV group."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        assert n_heads % n_kv_heads == 0, f"{n_heads} query heads do not divide among {n_kv_heads} KV heads"
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.groups = n_kv_heads if n_heads > n_kv_heads else 1  # MHA: one group that holds all heads
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.heads = nn.Identity()  # the input of wo: importance.py listens here

    def slices(self, dim: int, n_heads: int) -> dict[str, torch.Tensor]:
        """wq, wk, wv, wo of the slice: the first heads of every group.        # <-- 3. elastic heads

             wq's rows   | KV 0: q0 q1 q2 q3 | KV 1: q0 q1 q2 q3 |     n_heads = 4 of 8, two groups
             kept        | KV 0: q0 q1       | KV 1: q0 q1       |  -> query head h still uses KV head h // 2
        """
        g, hd = self.groups, self.head_dim
        assert 0 < n_heads <= self.n_heads and n_heads % g == 0, f"{n_heads} of {self.n_heads} heads in {g} groups"
        kv = min(n_heads, self.n_kv_heads) * hd
        return dict(wq=self.wq.weight[:, :dim].unflatten(0, (g, -1, hd))[:, :n_heads // g].flatten(0, 2),
                    wk=self.wk.weight[:kv, :dim], wv=self.wv.weight[:kv, :dim],
                    wo=self.wo.weight[:dim].unflatten(1, (g, -1, hd))[:, :, :n_heads // g].flatten(1, 3))

    def forward(self, x, cos, sin, n_heads, gate=None, cache=None, layer=0):
        """x: (B, T, d); gate: ([B, T,] n_heads of the full layer) or None; layer: this one's place in the cache."""
        B, T, C = x.shape
        w = self.slices(C, n_heads)
        q = apply_rope(F.linear(x, w["wq"]).unflatten(-1, (-1, self.head_dim)), cos, sin)  # B, T, n_heads, head_dim
        k = apply_rope(F.linear(x, w["wk"]).unflatten(-1, (-1, self.head_dim)), cos, sin)  # B, T, n_kv, head_dim
        v = F.linear(x, w["wv"]).unflatten(-1, (-1, self.head_dim))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                  # B, heads, T, head_dim
        if cache is not None:
            k, v = cache.append(layer, k, v)
        S = k.size(2)
        # is_causal aligns the mask's corner at the top left: right only when queries start where keys do.
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S and T > 1, enable_gqa=True)
        y = y.transpose(1, 2)                                                              # B, T, n_heads, head_dim
        if gate is not None:  # <-- 5. gates
            g = self.groups
            y = y * gate.unflatten(-1, (g, -1))[..., :n_heads // g].flatten(-2)[..., None].type_as(y)
        return F.linear(self.heads(y.flatten(2)), w["wo"])                                 # B, T, dim


class FeedForward(nn.Module):
    """SwiGLU with the first ffn_dim neurons."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)
        self.neurons = nn.Identity()  # the input of w2: importance.py listens here

    def slices(self, dim: int, ffn_dim: int) -> dict[str, torch.Tensor]:
        """w1, w2, w3 of the first ffn_dim neurons.                           # <-- 2. elastic MLP"""
        assert 0 < ffn_dim <= self.w1.out_features, f"{ffn_dim} of {self.w1.out_features} neurons"
        return dict(w1=self.w1.weight[:ffn_dim, :dim], w2=self.w2.weight[:dim, :ffn_dim],
                    w3=self.w3.weight[:ffn_dim, :dim])

    def forward(self, x, ffn_dim, gate=None):
        w = self.slices(x.size(-1), ffn_dim)
        h = F.silu(F.linear(x, w["w1"])) * F.linear(x, w["w3"])  # B, T, ffn_dim
        if gate is not None:  # <-- 5. gates
            h = h * gate[..., :ffn_dim].type_as(h)
        return F.linear(self.neurons(h), w["w2"])                # B, T, dim


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, which itself is never gated."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention = Attention(config.dim, config.per_layer("n_heads")[layer],
                                   config.per_layer("n_kv_heads")[layer], config.head_dim)
        self.feed_forward = FeedForward(config.dim, config.per_layer("ffn_dim")[layer])
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def slices(self, dim: int, n_heads: int, ffn_dim: int) -> dict[str, torch.Tensor]:
        """This layer's tensors in the slice, under their names inside the layer."""
        return ({f"attention.{k}.weight": w for k, w in self.attention.slices(dim, n_heads).items()}
                | {f"feed_forward.{k}.weight": w for k, w in self.feed_forward.slices(dim, ffn_dim).items()}
                | {f"{k}.weight": getattr(self, k).weight[:dim] for k in ("attention_norm", "ffn_norm")})

    def forward(self, x, cos, sin, n_heads, ffn_dim, gates=NO_GATES, factors=(None, None), cache=None):
        """x: (B, T, d); gates and factors: this layer's; None is one."""
        y = self.attention(self.attention_norm(x, gates.dim), cos, sin, n_heads, gates.n_heads, cache, self.layer)
        x = x + self.scaled(y, gates.layers, factors[0])
        y = self.feed_forward(self.ffn_norm(x, gates.dim), ffn_dim, gates.ffn_dim)
        return x + self.scaled(y, gates.layers, factors[1])

    @staticmethod
    def scaled(y, gate, factor):
        """A sub-block's output times the layer's gate and its modulation factor, in fp32 (bf16 rounds 1.002 to 1)."""
        y = y if gate is None else y.float() * gate          # <-- 5. gates (depth)
        if factor is not None and factor.dim():              # one per channel: those of the slice
            factor = factor[:y.size(-1)]
        return y if factor is None else y.float() * factor   # <-- 6. modulation


# -----------------------------------------------------------------------------
# the model


class Llama(nn.Module):
    """A Llama whose forward takes the SubNet to run. State dict: Meta's names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.full = config, SubNet.full(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()
        self._rope = None
        self.activation_checkpointing = False  # True: backward recomputes a block instead of keeping what it made

    def tie(self) -> None:
        """Tied embeddings are one tensor under two names; assigning a state dict separates them."""
        if self.config.tied:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "Llama":
        """GPT-2's scheme: normal(0.02), the two projections into the residual stream smaller by sqrt(2 n_layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                smaller = math.sqrt(2 * self.config.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 1
                p.copy_(torch.randn(p.shape, generator=generator) * (0.02 / smaller))
        return self

    def rope(self, start: int, end: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions start..end-1, each (end - start, 1, head_dim/2), from a table that grows."""
        if self._rope is None or self._rope[0].size(0) < end or self._rope[0].device != device:
            length = max(2 * end, self.config.context)  # twice: generation asks for one more each time
            angle = torch.outer(torch.arange(length).float(), rope_frequencies(self.config))
            self._rope = tuple(t.to(device)[:, None] for t in (angle.cos(), angle.sin()))
        return self._rope[0][start:end], self._rope[1][start:end]

    def forward(self, tokens, targets=None, subnet=None, gates=None, factors=None, cache=None):
        """Runs the slice `subnet` (default: all of it) on tokens (B, T).

        gates: Gates or None. factors: (n_layers, 2[, dim]) from router.py's Modulation, or None. cache: KVCache.
        Returns (logits (B, T, vocab) in fp32, mean cross-entropy in nats if targets (B, T) are given, else None).
        """
        B, T = tokens.shape
        subnet = self.full if subnet is None else subnet
        start = 0 if cache is None else cache.length
        cos, sin = self.rope(start, start + T, tokens.device)
        x = self.tok_embeddings(tokens)[..., :subnet.dim]  # B, T, dim  # <-- 1. elastic width
        for i, n_heads, ffn_dim in zip(subnet.layers, subnet.n_heads, subnet.ffn_dim):  # <-- 4. elastic depth
            g = NO_GATES if gates is None else Gates(gates.dim, gates.n_heads[i], gates.ffn_dim[i], gates.layers[i])
            args = (x, cos, sin, n_heads, ffn_dim, g, (None, None) if factors is None else factors[i], cache)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.layers[i], *args, use_reentrant=False)
            else:
                x = self.layers[i](*args)
        if cache is not None:
            cache.length += T
        x = self.norm(x, None if gates is None else gates.dim)
        logits = F.linear(x, self.output.weight[:, :subnet.dim]).float()
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def slices(self, subnet: SubNet) -> dict[str, torch.Tensor]:
        """The state dict of `subnet` as a Llama of its own, layers renumbered. Views: clone before saving."""
        state = {"tok_embeddings.weight": self.tok_embeddings.weight[:, :subnet.dim],
                 "norm.weight": self.norm.weight[:subnet.dim], "output.weight": self.output.weight[:, :subnet.dim]}
        for new, (old, n_heads, ffn_dim) in enumerate(zip(subnet.layers, subnet.n_heads, subnet.ffn_dim)):
            layer = self.layers[old].slices(subnet.dim, n_heads, ffn_dim)
            state |= {f"layers.{new}.{name}": w for name, w in layer.items()}
        return state
