"""
The Llama, and every smaller Llama inside it (LLaMaFlex, ICLR 2025).

A Llama is nanoGPT's model with four parts exchanged: RMSNorm for LayerNorm, rotated queries and
keys (RoPE) for learned positions, a key-value head for several query heads (GQA), a gated MLP
(SwiGLU). Names and layout are Meta's, so Meta's raw weights load with strict=True.

An elastic Llama also runs at smaller sizes. A smaller size is a slice, a corner of every matrix
(of wq and wo, a corner for each KV group):

                first channels   the rest
               +----------------+--------+
               | ############## |        |   first heads, or neurons
               +----------------+        |
               |                         |   the rest
               +-------------------------+

Six things differ from a plain Llama. Their places are marked `# <-- n` below.

  1. elastic width    the residual stream is its first `dim` channels, everywhere
  2. elastic MLP      a layer runs its first `ffn_dim` neurons
  3. elastic heads    a layer runs the first query heads of every KV group. All KV heads stay,
                      but in MHA, where a KV head goes with its query head
  4. elastic depth    only the layers that are kept run
  5. gates            multipliers in [0, 1] on all units; with --teach soft a router gets its
                      gradient through them (by default it compares losses: router.py)
  6. modulation       a factor on the outputs of attention and MLP that depends on the slice

Slices save time: the blocks of a slice with a share c of the parameters take about c times as long.
Every slice runs, but it is a good model only if the first units are the best ones. importance.py
sorts them. router.py chooses the slice for a budget, and has the modulation.

  paper          here                 paper          here
  H              dim                  N_A            n_heads (query heads)
  D              ffn_dim              N, lambda      layers (indices kept)
  b_j            budget               y              gates (as marginals of the choices)

Try it:
  python -c "from model import *; print(Llama(LlamaConfig())(torch.zeros(1, 8).long())[0].shape)"
"""
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# the shape of a Llama, and the shape of a slice


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of one transformer, as params.json has it. The default is the demo's shape.

    n_heads, n_kv_heads and ffn_dim may be tuples with a value per layer (a heterogeneous slice).
    """
    dim: int = 128                          # channels of the residual stream
    n_layers: int = 8
    n_heads: int | tuple[int, ...] = 8      # query heads
    n_kv_heads: int | tuple[int, ...] = 4   # as many as query heads: plain multi-head attention
    head_dim: int = 16                      # a slice keeps it, while dim and n_heads shrink
    ffn_dim: int | tuple[int, ...] = 384    # neurons of the MLP
    vocab_size: int = 1280
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 1.0                # 1: plain RoPE, 8: Llama 3.1, 32: Llama 3.2
    tied: bool = False                      # True: the output matrix is the embedding
    context: int = 128                      # the window that it was trained on

    def per_layer(self, name: str) -> tuple[int, ...]:
        """n_heads, n_kv_heads or ffn_dim as one value per layer."""
        value = getattr(self, name)
        if isinstance(value, (tuple, list)):
            return tuple(value)
        return (value,) * self.n_layers


@dataclass(frozen=True)
class SubNet:
    """A slice of a Llama: how many units of each kind run, and which layers.

    LLaMaFlex has the same sizes in every layer (`uniform`). search/ and flextron/ have others.
    """
    dim: int                  # channels
    layers: tuple[int, ...]   # indices of the layers kept, ascending
    n_heads: tuple[int, ...]  # query heads of each kept layer, over all KV groups
    ffn_dim: tuple[int, ...]  # neurons of each kept layer

    def __post_init__(self):
        # Tuples have a hash. JSON and the methods below give lists.
        for name in ("layers", "n_heads", "ffn_dim"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)  # a frozen dataclass allows no other way

    @classmethod
    def full(cls, config: LlamaConfig) -> "SubNet":
        """The whole network."""
        layers = range(config.n_layers)
        n_heads = config.per_layer("n_heads")
        ffn_dim = config.per_layer("ffn_dim")
        return cls(config.dim, layers, n_heads, ffn_dim)

    @classmethod
    def uniform(cls, dim: int, layers, n_heads: int, ffn_dim: int) -> "SubNet":
        """The same number of heads and neurons in every kept layer. layers: in any order."""
        layers = sorted(int(layer) for layer in layers)
        n = len(layers)
        return cls(dim, layers, [n_heads] * n, [ffn_dim] * n)

    def config(self, full: LlamaConfig) -> LlamaConfig:
        """The shape of this slice of `full` as a Llama of its own (what export.py writes)."""
        # With KV groups all KV heads stay, because a slice has a query head in every group.
        # In MHA a KV head belongs to one query head and goes with it.
        # Both ways the slice has the smaller of the two numbers.
        all_kv_heads = full.per_layer("n_kv_heads")
        n_kv_heads = []
        for layer, n_heads in zip(self.layers, self.n_heads):
            n_kv_heads.append(min(n_heads, all_kv_heads[layer]))
        return replace(
            full,
            dim=self.dim,
            n_layers=len(self.layers),
            n_heads=one_if_equal(self.n_heads),
            n_kv_heads=one_if_equal(n_kv_heads),
            ffn_dim=one_if_equal(self.ffn_dim),
        )


def one_if_equal(sizes) -> int | tuple[int, ...]:
    """(8, 8, 8) gives 8. (8, 4, 8) stays."""
    if len(set(sizes)) == 1:
        return sizes[0]
    return tuple(sizes)


# -----------------------------------------------------------------------------
# what a forward pass may get besides tokens: gates, and a cache


class Gates(NamedTuple):
    """Multipliers in [0, 1] on the units of the full network.

    Hard gates are one for the first units and zero for the rest. The full network then computes
    what the slice of the first units computes. Soft gates lie between, so the loss has a gradient.

    Programs run the full network under gates. A slice under gates uses those of the units that it
    has, and tests hold the two together. A block takes the gates of its layer, and None for no
    gate. flextron/ has a gate per token for heads and neurons, (B, T, units).
    """
    dim: Tensor      # (dim,)               for the whole network: the residual stream is one
    n_heads: Tensor  # (n_layers, n_heads)  in the order of wq's heads, group after group
    ffn_dim: Tensor  # (n_layers, ffn_dim)
    layers: Tensor   # (n_layers,)          on the two outputs of a block

    def of_layer(self, i: int) -> "Gates":
        """The gates of layer i: (dim,), (n_heads,), (ffn_dim,), ()."""
        return Gates(self.dim, self.n_heads[i], self.ffn_dim[i], self.layers[i])


NO_GATES = Gates(None, None, None, None)


class KVCache:
    """Keys and values of the tokens so far, (B, n_kv_heads, max_len, head_dim) for each layer.

    The cache believes its length. Whoever lowers it makes the cache forget the newest tokens: the
    next ones are written over them. sample.py does so with tokens that were drafted and refused.
    """

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0   # tokens that all layers have seen; Llama.forward counts them. A tensor
                          # (B,) on the CPU where the rows of a batch have seen different numbers
        self.layers = {}  # layer -> (keys, values)

    @property
    def ragged(self) -> bool:
        """Have the rows of the batch seen different numbers of tokens?"""
        return isinstance(self.length, Tensor)

    def positions(self, T: int, device) -> Tensor:
        """Where T new tokens of a ragged batch stand, (B, T)."""
        places = self.length[:, None] + torch.arange(T)
        return places.to(device)

    def end(self, T: int) -> int:
        """The length of the longest row with T new tokens."""
        return T + (int(self.length.max()) if self.ragged else self.length)

    def mask(self, T: int, device) -> Tensor:
        """What T new tokens of a ragged batch may see, each its own row up to itself: (B, 1, T, S)."""
        places = self.positions(T, device)[..., None]          # B, T, 1
        seen = torch.arange(self.end(T), device=device) <= places
        return seen[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v of T new tokens in place. Returns those of all tokens so far."""
        B, n_kv_heads, T, head_dim = k.shape
        end = self.end(T)
        assert end <= self.max_len, f"KV cache of {self.max_len} tokens asked to hold {end}"
        if layer not in self.layers:
            # Zeros, because a short row has a gap behind its end. Attention gives what lies there
            # the weight 0, and 0 times what memory held before could be NaN.
            shape = (B, n_kv_heads, self.max_len, head_dim)
            keys = k.new_zeros(shape)
            values = v.new_zeros(shape)
            self.layers[layer] = (keys, values)
        keys, values = self.layers[layer]
        if self.ragged:
            rows = torch.arange(B, device=k.device)[:, None]
            places = self.positions(T, k.device)
            keys[rows, :, places] = k.transpose(1, 2)    # B, T, n_kv_heads, head_dim
            values[rows, :, places] = v.transpose(1, 2)
        else:
            keys[:, :, self.length:end] = k
            values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]


# -----------------------------------------------------------------------------
# rotary positions


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """f_j = theta^(-2j / head_dim), (head_dim/2,), in radians per position.

    rope_factor > 1 is Llama 3.1's extension of a model trained on 8192 positions: waves longer
    than 8192 are slowed by the factor, waves shorter than a quarter of it are not, and between
    the two is a linear blend.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    exponents = exponents / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    if config.rope_factor == 1.0:
        return frequencies
    waves = 8192 * frequencies / (2 * math.pi)  # how many of them the 8192 positions hold
    keep = ((waves - 1) / 3).clamp(0, 1)        # 4 waves or more: as it was; 1 or less: slowed
    slowed = (1 - keep) * frequencies / config.rope_factor
    return keep * frequencies + slowed


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair of a head's channels by an angle, position * f_j for pair j, in fp32.

    x: (B, T, heads, head_dim); cos, sin: ([B,] T, 1, head_dim/2). Meta's pairs are neighbours:
    (x0 x1) (x2 x3) (x4 x5) ... Attention then depends on the distance between two tokens alone.
    """
    pairs = x.float().unflatten(-1, (-1, 2))   # B, T, heads, head_dim/2, 2
    a, b = pairs.unbind(-1)                    # B, T, heads, head_dim/2
    turned_a = a * cos - b * sin
    turned_b = a * sin + b * cos
    pairs = torch.stack((turned_a, turned_b), dim=-1)
    return pairs.flatten(-2).type_as(x)        # B, T, heads, head_dim


# -----------------------------------------------------------------------------
# layers


class RMSNorm(nn.Module):
    """x / rms(x), in fp32 and back in x's dtype, times weight; over the channels that exist."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x, gate=None):
        """x: (B, T, d) with d <= dim; gate: (dim,) or None. Returns (B, T, d)."""
        d = x.size(-1)  # <-- 1. elastic width: a slice has d channels, and its mean divides by d
        weight = self.weight[:d]
        x32 = x.float()
        squares = x32.square()
        if gate is None:
            mean_square = squares.mean(-1, keepdim=True)  # B, T, 1
        else:
            # <-- 5. gates. In a slice the mean is over the channels that the slice has.
            # Here the mean is a weighted one: a channel counts as much as its gate says.
            # The result is gated too, so the matrices behind the norm see a closed channel as 0.
            # With gates of 1 and 0, sum and width are those of the slice: hard gates equal slicing.
            gate = gate[:d]
            mean_square = (squares * gate).sum(-1, keepdim=True) / gate.sum()
            weight = weight * gate
        normed = x32 * torch.rsqrt(mean_square + self.eps)
        return normed.type_as(x) * weight


class Attention(nn.Module):
    """Causal grouped-query attention. A slice has the first query heads of every KV group."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        assert n_heads % n_kv_heads == 0, (
            f"{n_heads} query heads do not divide among {n_kv_heads} KV heads")
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.head_dim = head_dim
        # A KV group is a KV head with its query heads. In MHA that would be groups of one head,
        # which cannot shrink. There all heads are one group, and KV heads go with query heads.
        self.groups = n_kv_heads if n_heads > n_kv_heads else 1
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.heads = nn.Identity()  # the input of wo: importance.py listens here

    def slices(self, dim: int, n_heads: int) -> dict[str, Tensor]:
        """wq, wk, wv, wo of the slice with `dim` channels and n_heads query heads in all.

        With 8 query heads in two KV groups, a slice of 4 has two of each group:

             wq's rows      | KV 0: q0 q1 q2 q3 | KV 1: q4 q5 q6 q7 |    head h uses KV head h // 4
             kept           | KV 0: q0 q1       | KV 1: q4 q5       |
             in the slice   | KV 0: q0 q1       | KV 1: q2 q3       |    head h uses KV head h // 2
        """
        groups = self.groups
        head_dim = self.head_dim
        assert 0 < n_heads <= self.n_heads and n_heads % groups == 0, (
            f"{n_heads} of {self.n_heads} heads in {groups} groups")

        # <-- 3. elastic heads: the first of each group, not the first of all
        in_group = n_heads // groups

        # wq makes the query heads. Split its rows by group and head, cut, and join them again.
        wq = self.wq.weight[:, :dim]
        wq = wq.unflatten(0, (groups, -1, head_dim))   # groups, heads, head_dim, dim
        wq = wq[:, :in_group].flatten(0, 2)            # n_heads * head_dim, dim

        # wk and wv keep all KV heads. In MHA they keep as many as there are query heads.
        kv_rows = min(n_heads, self.n_kv_heads) * head_dim
        wk = self.wk.weight[:kv_rows, :dim]
        wv = self.wv.weight[:kv_rows, :dim]

        # wo reads the query heads. Its columns are cut as wq's rows are.
        wo = self.wo.weight[:dim]
        wo = wo.unflatten(1, (groups, -1, head_dim))   # dim, groups, heads, head_dim
        wo = wo[:, :, :in_group].flatten(1, 3)         # dim, n_heads * head_dim
        return dict(wq=wq, wk=wk, wv=wv, wo=wo)

    def forward(self, x, cos, sin, n_heads, gate=None, cache=None, layer=0):
        """x: (B, T, d); gate: None or ([B, T,] n_heads of the full layer); layer: where in the
        cache this layer has its place. Runs n_heads query heads. Returns (B, T, d)."""
        B, T, C = x.shape
        wq, wk, wv, wo = self.slices(C, n_heads).values()

        # queries, keys and values of the slice's heads
        q = F.linear(x, wq)
        k = F.linear(x, wk)
        v = F.linear(x, wv)
        q = q.view(B, T, -1, self.head_dim)   # B, T, n_heads, head_dim
        k = k.view(B, T, -1, self.head_dim)   # B, T, n_kv_heads, head_dim
        v = v.view(B, T, -1, self.head_dim)   # B, T, n_kv_heads, head_dim

        # positions: in queries and keys only
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        q = q.transpose(1, 2)                 # B, n_heads, T, head_dim
        k = k.transpose(1, 2)                 # B, n_kv_heads, T, head_dim
        v = v.transpose(1, 2)                 # B, n_kv_heads, T, head_dim

        # generation: keys and values of earlier tokens come from the cache, S in all
        if cache is not None:
            k, v = cache.append(layer, k, v)  # B, n_kv_heads, S, head_dim
        S = k.size(2)

        # causal mask: none for a single query, which sees all keys. is_causal aligns query 0 with
        # key 0, so it is right only if queries start where keys do. Else the last query must see
        # all keys, as here, where two tokens come after three that are cached:
        #     x x x x .
        #     x x x x x
        mask = None
        if T not in (1, S):
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device)
            mask = mask.tril(S - T)
        # rows that are not equally long: a query sees its own row, up to its own place
        if cache is not None and cache.ragged:
            mask = cache.mask(T, x.device)    # B, 1, T, S

        # attention: enable_gqa gives each KV head to the query heads of its group
        y = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            enable_gqa=True,
        )
        y = y.transpose(1, 2)                 # B, T, n_heads, head_dim

        # <-- 5. gates: one per head, cut from the full layer's as the heads are
        if gate is not None:
            in_group = n_heads // self.groups
            gate = gate.unflatten(-1, (self.groups, -1))
            gate = gate[..., :in_group].flatten(-2)
            gate = gate[..., None]            # [B, T,] n_heads, 1
            y = y * gate.type_as(y)

        # the heads side by side, mixed back into the channels
        y = self.heads(y.flatten(2))          # B, T, n_heads * head_dim
        return F.linear(y, wo)                # B, T, d


class FeedForward(nn.Module):
    """SwiGLU, w2(silu(w1 x) * w3 x). A neuron is a row of w1, a row of w3 and a column of w2."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)
        self.neurons = nn.Identity()  # the input of w2: importance.py listens here

    def slices(self, dim: int, ffn_dim: int) -> dict[str, Tensor]:
        """w1, w2, w3 of the first ffn_dim neurons on the first dim channels."""
        assert 0 < ffn_dim <= self.w1.out_features, f"{ffn_dim} of {self.w1.out_features} neurons"
        return dict(  # <-- 2. elastic MLP
            w1=self.w1.weight[:ffn_dim, :dim],
            w2=self.w2.weight[:dim, :ffn_dim],
            w3=self.w3.weight[:ffn_dim, :dim],
        )

    def forward(self, x, ffn_dim, gate=None):
        """x: (B, T, d); gate: None or ([B, T,] ffn_dim of the full layer). Returns (B, T, d)."""
        w1, w2, w3 = self.slices(x.size(-1), ffn_dim).values()
        h = F.silu(F.linear(x, w1))
        h = h * F.linear(x, w3)               # B, T, ffn_dim
        if gate is not None:  # <-- 5. gates: one per neuron
            gate = gate[..., :ffn_dim]
            h = h * gate.type_as(h)
        h = self.neurons(h)
        return F.linear(h, w2)                # B, T, d


class Block(nn.Module):
    """Attention and MLP. Each reads the residual stream through a norm, and adds to the stream.

    The stream itself is never gated: its readers are, in their norms.
    """

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        n_heads = config.per_layer("n_heads")[layer]
        n_kv_heads = config.per_layer("n_kv_heads")[layer]
        ffn_dim = config.per_layer("ffn_dim")[layer]
        self.attention = Attention(config.dim, n_heads, n_kv_heads, config.head_dim)
        self.feed_forward = FeedForward(config.dim, ffn_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def slices(self, dim: int, n_heads: int, ffn_dim: int) -> dict[str, Tensor]:
        """This layer's tensors in the slice, under their names inside the layer."""
        state = {}
        attention = self.attention.slices(dim, n_heads)
        for name, weight in attention.items():
            state[f"attention.{name}.weight"] = weight
        feed_forward = self.feed_forward.slices(dim, ffn_dim)
        for name, weight in feed_forward.items():
            state[f"feed_forward.{name}.weight"] = weight
        state["attention_norm.weight"] = self.attention_norm.weight[:dim]
        state["ffn_norm.weight"] = self.ffn_norm.weight[:dim]
        return state

    def forward(self, x, cos, sin, n_heads, ffn_dim,
                gates=NO_GATES, factors=(None, None), cache=None):
        """x: (B, T, d); gates: this layer's; factors: this layer's two. Returns (B, T, d)."""
        # attention
        h = self.attention_norm(x, gates.dim)
        y = self.attention(h, cos, sin, n_heads, gates.n_heads, cache, self.layer)
        y = self.scaled(y, gates.layers, factors[0])
        x = x + y
        # MLP
        h = self.ffn_norm(x, gates.dim)
        y = self.feed_forward(h, ffn_dim, gates.ffn_dim)
        y = self.scaled(y, gates.layers, factors[1])
        return x + y

    @staticmethod
    def scaled(y, gate, factor):
        """An output of attention or MLP times two scalars, the layer's gate and its factor."""
        # A gate of 0 leaves nothing to add to the stream: the layer is as good as not there.
        if gate is not None:    # <-- 5. gates
            y = y.float() * gate
        # A factor is one number for a slice, so export.py can multiply it into wo and w2.
        # It is close to 1: the product is in fp32, because bf16 rounds 1.002 to 1.
        if factor is not None:  # <-- 6. modulation
            y = y.float() * factor
        return y


# -----------------------------------------------------------------------------
# the loss: logits are the largest tensor of all, so no more than a chunk of them exists

LOSS_TOKENS = 1024  # in a chunk: its logits take half a GB with Llama 3's vocabulary


def token_losses(x, output, targets, reference=None):
    """Losses of n tokens in nats, by their logits. x: (n, dim), normed; output: (vocab_size, dim).

    Cross-entropy with targets (n,): (n,). With the reference (states, output matrix) of a teacher:
    (2, n), the second being KL(teacher || here)."""
    logits = F.linear(x, output).float()  # n, vocab_size
    ce = F.cross_entropy(logits, targets, reduction="none")
    if reference is None:
        return ce
    with torch.no_grad():
        teacher = F.linear(*reference).float().log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), teacher, reduction="none", log_target=True)
    return torch.stack([ce, kl.sum(-1)])


def losses_in_chunks(x, output, targets, reference=None):
    """token_losses() of states (B, T, dim), chunk by chunk: (B, T), or (2, B, T).

    A chunk's logits are made, used and forgotten; the backward makes them again."""
    n = targets.numel()
    x = x.flatten(0, 1)  # n, dim
    parts = []
    for start in range(0, n, LOSS_TOKENS):
        rows = slice(start, start + LOSS_TOKENS)
        args = [x[rows], output, targets.flatten()[rows]]
        if reference is not None:
            states, matrix = reference
            args.append((states.flatten(0, 1)[rows], matrix))
        if n > LOSS_TOKENS and torch.is_grad_enabled():
            parts.append(checkpoint(token_losses, *args, use_reentrant=False))
        else:
            parts.append(token_losses(*args))
    losses = torch.cat(parts, dim=-1)
    return losses.unflatten(-1, targets.shape)


# -----------------------------------------------------------------------------
# the model

LAST = (slice(None), -1)          # for forward's `at`: the last position of every sequence
NOWHERE = (slice(0), slice(None))  # ... and none at all, where only a cache is filled


class Llama(nn.Module):
    """A Llama whose forward takes the SubNet to run. The state dict has Meta's names."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.full = SubNet.full(config)
        # Zeros, until init_weights or a state dict comes. nn.Embedding's own random numbers would
        # import torch._dynamo on the meta device, a second of every program's start.
        table = torch.zeros(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()
        self._cos = self._sin = None           # of all positions: rope() makes them
        self.activation_checkpointing = False  # True: backward runs a block again to save memory

    @classmethod
    def from_state(cls, config: LlamaConfig, state: dict[str, Tensor]) -> "Llama":
        """A Llama around the tensors of a state dict, in their dtype, for instance a slice's.

        The tensors become its parameters and are not copied. RuntimeError: one is missing, has
        another shape, or does not belong.
        """
        # On the meta device tensors have a shape and no memory: the weights exist once.
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, strict=True, assign=True)
        model.tie()
        return model

    def tie(self) -> None:
        """Makes tied embeddings one tensor under two names. Assigning a state dict parts them."""
        if self.config.tied:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "Llama":
        """GPT-2's scheme: normal(0.02), and / sqrt(2 n_layers) for what writes to the stream."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:  # norms stay at one
                continue
            std = 0.02
            if name.endswith(("wo.weight", "w2.weight")):
                std = 0.02 / math.sqrt(2 * self.config.n_layers)
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        return self

    def rope(self, start: int, end: int, device) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start..end-1, (end - start, 1, head_dim/2) each."""
        too_short = self._cos is None or len(self._cos) < end
        if too_short or self._cos.device != device:
            # Twice what is asked for: generation asks for one more each time.
            length = max(2 * end, self.config.context)
            positions = torch.arange(length).float()
            angles = torch.outer(positions, rope_frequencies(self.config))
            self._cos = angles.cos().to(device)[:, None]
            self._sin = angles.sin().to(device)[:, None]
        return self._cos[start:end], self._sin[start:end]

    def states(self, tokens, subnet=None, gates=None, factors=None, cache=None):
        """The residual stream (B, T, dim) at its end, normed, after the slice `subnet` (default: all
        of it) has read tokens (B, T).

        gates: Gates; factors: (n_layers, 2), from router.py's Modulation; cache: KVCache. Each may
        be None.
        """
        if subnet is None:
            subnet = self.full

        # the residual stream begins with the embeddings, and all that follows has its width
        x = self.tok_embeddings(tokens)
        x = x[..., :subnet.dim]  # B, T, dim  # <-- 1. elastic width

        x = self.stream(x, subnet, gates, factors, cache)

        # a last norm, with the channel gates
        return self.norm(x, None if gates is None else gates.dim)  # <-- 5. gates

    def stream(self, x, subnet, gates=None, factors=None, cache=None):
        """The residual stream x (B, T, dim) after the layers of a slice."""
        # positions go on where the cache ends
        T = x.size(1)
        if cache is None:
            cos, sin = self.rope(0, T, x.device)
        elif cache.ragged:
            places = cache.positions(T, x.device)                   # B, T
            cos, sin = self.rope(0, cache.end(T), x.device)
            cos, sin = cos[places], sin[places]                     # B, T, 1, head_dim/2
        else:
            cos, sin = self.rope(cache.length, cache.end(T), x.device)

        # <-- 4. elastic depth: only the kept layers, each with its own sizes, gates and factors
        for i, n_heads, ffn_dim in zip(subnet.layers, subnet.n_heads, subnet.ffn_dim):
            block = self.layers[i]
            block_gates = NO_GATES
            if gates is not None:
                block_gates = gates.of_layer(i)
            block_factors = (None, None)
            if factors is not None:
                block_factors = factors[i]
            args = (x, cos, sin, n_heads, ffn_dim, block_gates, block_factors, cache)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)

        # every layer has put T tokens behind the cache's end: now the end moves
        if cache is not None:
            cache.length += T
        return x

    def forward(self, tokens, targets=None, subnet=None, gates=None, factors=None, cache=None,
                at=None, reference=None):
        """Runs a slice on tokens (B, T): see states. Returns logits, or a loss.

        Without targets: (logits in fp32, None). The logits are of all positions, (B, T, vocab_size),
        or of those that `at`, an index into (B, T), names.

        With targets (B, T): (None, the mean cross-entropy in nats). With the reference (states,
        output matrix) of another Llama, a teacher, its place is taken by two means, (2,): the
        cross-entropy and KL(teacher || here).
        """
        x = self.states(tokens, subnet, gates, factors, cache)  # B, T, dim
        output = self.output.weight[:, :x.size(-1)]             # <-- 1. elastic width
        if targets is not None:
            losses = losses_in_chunks(x, output, targets, reference)
            return None, losses.mean((-2, -1))
        if at is not None:
            x = x[at]
        return F.linear(x, output).float(), None

    def slices(self, subnet: SubNet) -> dict[str, Tensor]:
        """The state dict of `subnet` as a Llama of its own, layers renumbered.

        Most tensors are views. Clone them before saving, or the file holds the whole network.
        """
        dim = subnet.dim
        state = {
            "tok_embeddings.weight": self.tok_embeddings.weight[:, :dim],
            "norm.weight": self.norm.weight[:dim],
            "output.weight": self.output.weight[:, :dim],
        }
        kept = zip(subnet.layers, subnet.n_heads, subnet.ffn_dim)
        for new, (old, n_heads, ffn_dim) in enumerate(kept):
            layer = self.layers[old].slices(dim, n_heads, ffn_dim)
            for name, weight in layer.items():
                state[f"layers.{new}.{name}"] = weight
        return state
