"""
Two small routers in every layer, before its attention and before its MLP (Flextron, ICML 2024).

A router is told the target t, the share of the full model's cost that a forward may take. It gives
logits over the sizes of its layer:

    static     target                              -> one size for all tokens
    dynamic    target, hidden state of this token  -> a size for this token alone (the paper says
                                                      "input-adaptive")

In training a size is drawn with Gumbel noise, as in router.py:

    y = softmax((kappa * logits + g) / tau)     kappa 1 -> 10: signal to noise
                                                tau 1 -> 0.056: softness

The forward takes the largest entry of y. The gradient flows through all of y (straight-through).
"""
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LlamaConfig
from space import random_generator

ELASTIC = ("n_heads", "ffn_dim")  # the axes that are elastic here: query heads and MLP neurons

# -----------------------------------------------------------------------------
# a choice


class Noise(NamedTuple):
    """The Gumbel noise of a training pass: a function of `parts` alone.

    parts: seed, step, target, micro-batch."""
    tau: float
    kappa: float
    parts: tuple

    def gumbel(self, axis: str, layer: int, shape) -> torch.Tensor:
        """-log(-log(u)) with u uniform in (0, 1), in fp32."""
        generator = random_generator(*self.parts, axis, layer)
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        u = u.clamp(1e-12, 1 - 1e-12)
        return -(-u.log()).log().float()


class Pick(NamedTuple):
    """What a router chose in a pass, among K sizes.

    gate and soft have T = 1 where a sequence shares one choice (static routers in training)."""
    axis: str                    # n_heads or ffn_dim
    choice: torch.Tensor         # (B, T) index of the size
    gate: torch.Tensor           # (B, T, K) one-hot; in training with the gradient of `soft`
    soft: torch.Tensor           # (B, T, K) the Gumbel-softmax
    probabilities: torch.Tensor  # ([B, T,] K) what it was drawn from


# -----------------------------------------------------------------------------
# the routers


class Routers(nn.Module):
    """The routers of all layers: (target[, hidden state]) -> hidden layer -> logits over sizes.

    Weights are stacked over layers. sizes: per axis, what there is to choose from."""

    def __init__(self, config: LlamaConfig, sizes: dict, dynamic: bool, seed: int = 0):
        super().__init__()
        self.dynamic = dynamic
        self.w = nn.ParameterDict()
        L = config.n_layers
        W = max(16, min(128, config.dim // 8))  # hidden size of a router
        # The last layer is zero: all sizes are equally likely at the start.
        scales = dict(target=4.0, bias=2.0, out=0.0, out_bias=0.0, state=config.dim ** -0.5)
        generator = random_generator("routers", seed)
        for axis in ELASTIC:
            K = len(sizes[axis])
            shapes = dict(target=(L, W), bias=(L, W), out=(L, W, K), out_bias=(L, K))
            if dynamic:
                shapes["state"] = (L, config.dim, W)
            for name, shape in shapes.items():
                random = torch.randn(shape, generator=generator)
                self.w[f"{axis}_{name}"] = nn.Parameter(random * scales[name])

    def weight(self, axis: str, name: str, layer: int) -> torch.Tensor:
        """A tensor of one layer's router."""
        return self.w[f"{axis}_{name}"][layer]

    def forward(self, axis: str, layer: int, target: float, x: torch.Tensor | None = None):
        """Logits: (K,) if static, (B, T, K) of hidden states x (B, T, dim) if dynamic.

        The hidden state is detached: the Llama does not learn to please its routers."""
        h = target * self.weight(axis, "target", layer)
        h = h + self.weight(axis, "bias", layer)
        if self.dynamic:
            h = h + x.detach() @ self.weight(axis, "state", layer)
        logits = F.silu(h) @ self.weight(axis, "out", layer)
        logits = logits + self.weight(axis, "out_bias", layer)
        return logits.float()
