"""
What some windows of text say about a Llama's weights: how much each unit is worth, and, once units are gone, which
weights of those that stay make up for them. The two halves of "Search for Efficient Large Language Models" (Shen et
al., NeurIPS 2024) that are linear algebra; search.py has the third.

Both look at the inputs X (tokens, inputs) of linear layers through their Gram matrix G = X^T X alone:

  score          Phi_ij = W_ij^2 / [(2 G)^-1]_jj: what the layer's output loses with W_ij, if the rest of its row adapts
                 neuron = its rows of w1, w3 + its column of w2      head = its rows of wq + its columns of wo
                 (wk and wv belong to all heads of a KV group, and say nothing about which of them to keep; in MHA,
                 where a KV head goes with its query head, they count)
  reformation    min over W_S of ||X_S W_S^T - Y||^2: only wo and w2 have inputs that can be gone. One set S of kept
                 inputs serves all rows, so the paper's ADMM has a closed form, and converges to it (admm, a test).

Both go through the model sub-block by sub-block: attention, MLP, attention ... Held are the hidden states of the
windows at one place, and the Grams of that sub-block. The largest, of w2's inputs, is ffn_dim^2: 0.5 GB for a 7B.
"""
import contextlib

import torch

from model import Block, Llama
from plumbing.parallel import autocast
from plumbing.errors import fail

DAMP = 0.01  # the share of its own diagonal that is added to every Gram: a singular one can be inverted too

# -----------------------------------------------------------------------------
# walking through the model


def sub_blocks(block: Block) -> dict:
    """A layer's two halves, each a function (x, cos, sin) -> what it adds to the stream, in the order they run."""
    a, f = block.attention, block.feed_forward

    def attention(x, cos, sin):
        with autocast(x.device):  # here and no further: Grams are fp32
            return a(block.attention_norm(x), cos, sin, a.n_heads)

    def feed_forward(x, cos, sin):
        with autocast(x.device):
            return f(block.ffn_norm(x), f.w1.out_features)

    return dict(attention=attention, feed_forward=feed_forward)


def listening_points(block: Block, half: str) -> dict:
    """The modules whose outputs are inputs of a half's linear layers: "in" of the first ones, "out" of wo or w2."""
    if half == "attention":
        return {"in": block.attention_norm, "out": block.attention.heads}
    return {"in": block.ffn_norm, "out": block.feed_forward.neurons}


@contextlib.contextmanager
def heard(modules: dict):
    """Yields a dict that always holds the latest output of each named module, as (tokens, units) in fp32."""
    latest = {}
    hooks = [m.register_forward_hook(lambda _m, _i, y, name=name: latest.update({name: y.flatten(0, -2).float()}))
             for name, m in modules.items()]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def check_finite(gram: torch.Tensor, layer: int, half: str) -> None:
    """A Gram with NaN or infinity in it ends the program: no inverse, damped or not, mends it."""
    if not gram.isfinite().all():
        fail(f"layer {layer}, {half}: the activations on the calibration text are not finite; expected a Llama whose "
             "weights are; python eval.py --model tells its loss")


# -----------------------------------------------------------------------------
# the score


def inverse_diagonal(gram: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
    """1 / [(2 G)^-1]_jj for every input j, (n,), of a Gram (n, n) damped by a share of its mean diagonal; if rounding
    leaves it indefinite all the same, by ten times as much."""
    mean = gram.diagonal().mean().clamp_min(1e-20)
    while True:
        factor, failed = torch.linalg.cholesky_ex(2 * (gram + damp * mean * torch.eye(len(gram), device=gram.device)))
        if not failed:
            return 1 / torch.cholesky_inverse(factor).diagonal()
        damp *= 10


def score_half(block: Block, half: str, grams: dict) -> torch.Tensor:
    """Phi of a half's units from the Grams of its inputs: (n_heads,) or (ffn_dim,)."""
    inside, outside = inverse_diagonal(grams["in"]), inverse_diagonal(grams["out"])
    rows = lambda w: w.weight.float().square() @ inside                      # sum over j of Phi_ij
    columns = lambda w: w.weight.float().square().sum(0) * outside           # sum over i of Phi_ij
    if half == "feed_forward":
        f = block.feed_forward
        return rows(f.w1) + rows(f.w3) + columns(f.w2)
    a = block.attention
    phi = rows(a.wq) + columns(a.wo)
    if a.n_heads == a.n_kv_heads:
        phi = phi + rows(a.wk) + rows(a.wv)
    return phi.unflatten(0, (-1, a.head_dim)).sum(1)


@torch.no_grad()
def unit_scores(model: Llama, windows: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The score of every query head (n_layers, n_heads) and neuron (n_layers, ffn_dim) on calibration windows (S, T),
    in fp32 on the CPU. One forward pass, `batch` windows at a time."""
    x = model.tok_embeddings(windows)                                        # S, T, dim
    cos, sin = model.rope(0, windows.size(1), x.device)
    scores = {"attention": [], "feed_forward": []}
    for layer, block in enumerate(model.layers):
        for half, run in sub_blocks(block).items():
            grams = {}
            with heard(listening_points(block, half)) as latest:
                for part in x.split(batch):
                    part += run(part, cos, sin)
                    for name, inputs in latest.items():
                        grams[name] = grams.get(name, 0) + inputs.T @ inputs
            for gram in grams.values():
                check_finite(gram, layer, half)
            scores[half].append(score_half(block, half, grams).cpu())
    return torch.stack(scores["attention"]), torch.stack(scores["feed_forward"])


# -----------------------------------------------------------------------------
# the reformation


def correction(gram: torch.Tensor, residual: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
    """What to add to a weight (out, n): residual (G + damp diag G)^-1, for the Gram (n, n) of its inputs and residual =
    (target - output)^T inputs (out, n). The ridge pulls towards no change: nothing to mend, nothing changes; and the
    error can only fall. In fp64, scaled to a diagonal of ones: inputs that are always zero stay harmless."""
    scale = gram.diagonal().double().clamp_min(1e-30).rsqrt()
    unit = gram.double() * scale * scale[:, None]
    factor = torch.linalg.cholesky(unit + damp * torch.eye(len(gram), dtype=unit.dtype, device=unit.device))
    return (torch.cholesky_solve((residual.double() * scale).T, factor).T * scale).type_as(residual)


def admm(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor, damp: float = DAMP, rho: float = 1.0,
         iterations: int = 30) -> torch.Tensor:
    """The paper's way to the same weights, for the test: min over W of ||X W^T - X weight^T||^2 where W is zero on the
    inputs that are not kept (n,) bool, by alternating between the free minimum and the zeros. weight: (out, n)."""
    scale = gram.diagonal().rsqrt()            # a rho of 1 means something only beside a diagonal of ones
    unit = gram * scale * scale[:, None]
    unit = unit + damp * torch.eye(len(gram), dtype=gram.dtype)
    w, inverse = weight / scale, torch.linalg.inv(unit + rho * torch.eye(len(gram), dtype=gram.dtype))
    z, u = w * kept, torch.zeros_like(w)
    for _ in range(iterations):
        free = (w @ unit + rho * (z - u)) @ inverse
        z = (free + u) * kept
        u = u + free - z
    return z * scale


@torch.no_grad()
def reform_(slim: Llama, model: Llama, layers, windows: torch.Tensor, batch: int, damp: float = DAMP) -> list[tuple]:
    """Reforms wo, then w2, of every layer of `slim` in place, so that its stream comes back to the dense `model`'s on
    calibration windows (S, T). layers: which of the model's layers slim has. The inputs are slim's own, with all
    before them reformed; so errors do not pile up, and what left-out layers did is made up for too.

    Returns (squared error before, after) of the stream, relative to the dense one's square, per reformed weight.
    One pass of the dense model over the windows, two of the slim one, `batch` windows at a time."""
    want, have = model.tok_embeddings(windows), slim.tok_embeddings(windows)  # S, T, dim: the stream of either
    cos, sin = model.rope(0, windows.size(1), want.device)
    errors, kept = [], {old: slim.layers[new] for new, old in enumerate(layers)}
    for layer, block in enumerate(model.layers):
        for half, run in sub_blocks(block).items():
            for part in want.split(batch):
                part += run(part, cos, sin)
            if layer not in kept:
                continue
            last = kept[layer].attention.wo if half == "attention" else kept[layer].feed_forward.w2
            run, gram, residual, before = sub_blocks(kept[layer])[half], 0, 0, 0.0
            with heard(dict(out=listening_points(kept[layer], half)["out"])) as latest:
                for target, part in zip(want.split(batch), have.split(batch)):
                    gap = (target - (part + run(part, cos, sin))).flatten(0, 1).float()   # tokens, dim
                    gram = gram + latest["out"].T @ latest["out"]
                    residual = residual + gap.T @ latest["out"]
                    before += gap.square().sum().item()
            check_finite(gram, layer, half)
            check_finite(residual, layer, half)
            last.weight.copy_(last.weight + correction(gram, residual, damp))
            size = after = 0.0
            for target, part in zip(want.split(batch), have.split(batch)):
                part += run(part, cos, sin)
                size += target.float().square().sum().item()
                after += (target - part).float().square().sum().item()
            errors.append((before / size, after / size))
    return errors
