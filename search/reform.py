"""
What some windows of text say about a Llama's weights, by linear algebra alone.

Two of the three parts of "Search for Efficient Large Language Models" (Shen et al., NeurIPS 2024):
how much each unit is worth, and, once units are gone, which weights make up for them. The third
part, the search, is search/evolution.py; `python -m search` runs all three.

Both look at the inputs X (tokens, inputs) of a linear layer through its Gram matrix G = X^T X.

  score        Phi_ij = W_ij^2 / [(2 G)^-1]_jj
               This is what the layer's output loses with W_ij, if the rest of its row adapts.
                 neuron = its rows of w1 and w3 + its column of w2
                 head   = its rows of wq + its columns of wo
               wk and wv belong to all heads of a KV group, so they cannot tell them apart. In MHA a
               KV head goes with its query head, and the two count.

  reformation  min over W_S of ||X_S W_S^T - Y||^2
               Only wo and w2 have inputs that can be gone. One set S of kept inputs serves all
               rows, so the paper's ADMM has a closed form, and converges to it
               (tests/test_search.py).

Both parts go through the model by halves of layers: attention, MLP, attention ... Memory holds the
hidden states of all windows at one place, and the Grams of that half. The largest Gram, of w2's
inputs, is (ffn_dim, ffn_dim): 0.5 GB for a 7B.
"""
import contextlib

import torch
from torch import nn

from model import Block, Llama
from plumbing.errors import fail
from plumbing.parallel import autocast, bar

HALVES = ("attention", "feed_forward")  # of a layer, in the order they run
DAMP = 0.01  # the share of its own diagonal added to every Gram: a singular one can be inverted too

# -----------------------------------------------------------------------------
# walking through the model


def run_half(block: Block, half: str, x: torch.Tensor, rope: tuple) -> torch.Tensor:
    """What a half of a layer adds to the stream x (B, T, dim). rope: (cos, sin)."""
    cos, sin = rope
    with autocast(x.device):  # here and no further: Grams are fp32
        if half == "attention":
            h = block.attention_norm(x)
            return block.attention(h, cos, sin, block.attention.n_heads)
        h = block.ffn_norm(x)
        return block.feed_forward(h, block.feed_forward.w1.out_features)


def advance_(block: Block, half: str, stream: torch.Tensor, batch: int, rope: tuple) -> None:
    """In place: the stream (S, T, dim) after this half of the layer."""
    for part in stream.split(batch):                         # views
        part += run_half(block, half, part, rope)


def listening_points(block: Block, half: str) -> dict[str, nn.Module]:
    """The modules whose outputs are the inputs of a half's linear layers.

    "in": of the first ones (wq, wk, wv or w1, w3). "out": of the last one (wo or w2)."""
    if half == "attention":
        return {"in": block.attention_norm, "out": block.attention.heads}
    return {"in": block.ffn_norm, "out": block.feed_forward.neurons}


@contextlib.contextmanager
def heard(modules: dict[str, nn.Module]):
    """Yields a dict that always holds each module's latest output, as (tokens, units) in fp32."""
    latest = {}

    def listen(name: str):
        def hook(_module, _inputs, output):
            latest[name] = output.flatten(0, -2).float()
        return modules[name].register_forward_hook(hook)

    hooks = [listen(name) for name in modules]
    try:
        yield latest
    finally:
        for hook in hooks:
            hook.remove()


def check_finite(gram: torch.Tensor, layer: int, half: str) -> None:
    """A Gram with NaN or infinity in it ends the program: no inverse, damped or not, mends it."""
    if not gram.isfinite().all():
        fail(f"layer {layer}, {half}: the activations on the calibration text are not finite; "
             "expected a Llama whose weights are; python eval.py --model tells its loss")


# -----------------------------------------------------------------------------
# the score


def inverse_diagonal(gram: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
    """1 / [(2 G)^-1]_jj for every input j, (n,), of a Gram (n, n).

    The Gram is damped by a share of its mean diagonal; if rounding leaves it indefinite all the
    same, by ten times as much, and so on."""
    mean = gram.diagonal().mean().clamp_min(1e-20)
    identity = torch.eye(len(gram), device=gram.device)
    while True:
        damped = gram + damp * mean * identity
        factor, failed = torch.linalg.cholesky_ex(2 * damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            return 1 / inverse.diagonal()
        damp *= 10


def row_scores(linear: nn.Linear, inverse: torch.Tensor) -> torch.Tensor:
    """Phi summed over inputs j: a number per output, (out,). inverse: inverse_diagonal(), (in,)."""
    squares = linear.weight.float().square()                 # out, in
    return squares @ inverse


def column_scores(linear: nn.Linear, inverse: torch.Tensor) -> torch.Tensor:
    """Phi summed over outputs i: a number per input, (in,)."""
    squares = linear.weight.float().square()                 # out, in
    return squares.sum(0) * inverse


def score_half(block: Block, half: str, grams: dict[str, torch.Tensor]) -> torch.Tensor:
    """The score of a half's units, from the Grams of its inputs: (n_heads,) or (ffn_dim,)."""
    inside = inverse_diagonal(grams["in"])
    outside = inverse_diagonal(grams["out"])
    if half == "feed_forward":
        mlp = block.feed_forward
        phi = row_scores(mlp.w1, inside)                     # ffn_dim
        phi = phi + row_scores(mlp.w3, inside)
        return phi + column_scores(mlp.w2, outside)
    attention = block.attention
    phi = row_scores(attention.wq, inside)                   # n_heads * head_dim
    phi = phi + column_scores(attention.wo, outside)
    if attention.n_heads == attention.n_kv_heads:            # MHA
        phi = phi + row_scores(attention.wk, inside)
        phi = phi + row_scores(attention.wv, inside)
    per_head = phi.unflatten(0, (-1, attention.head_dim))    # n_heads, head_dim
    return per_head.sum(1)


@torch.no_grad()
def unit_scores(model: Llama, windows: torch.Tensor, batch: int):
    """The scores of all query heads (n_layers, n_heads) and of all neurons (n_layers, ffn_dim).

    windows: calibration text, (S, T); one forward pass, `batch` windows at a time. Scores are fp32,
    on the CPU. Activations that are not finite: fail()."""
    stream = model.tok_embeddings(windows)                   # S, T, dim
    rope = model.rope(0, windows.size(1), stream.device)
    scores = {half: [] for half in HALVES}
    for layer, block in enumerate(bar(model.layers, "scores", unit="layer")):
        for half in HALVES:
            grams = {}
            with heard(listening_points(block, half)) as latest:
                for part in stream.split(batch):             # views: the stream moves on
                    part += run_half(block, half, part, rope)
                    for name, inputs in latest.items():      # tokens, units
                        grams[name] = grams.get(name, 0) + inputs.T @ inputs
            for gram in grams.values():
                check_finite(gram, layer, half)
            score = score_half(block, half, grams)
            scores[half].append(score.cpu())
    heads = torch.stack(scores["attention"])
    neurons = torch.stack(scores["feed_forward"])
    return heads, neurons


# -----------------------------------------------------------------------------
# the reformation


def correction(gram: torch.Tensor, residual: torch.Tensor, damp: float = DAMP) -> torch.Tensor:
    """What to add to a weight (out, n): residual (G + damp diag G)^-1.

    gram: G of the weight's inputs, (n, n). residual: (target - output)^T inputs, (out, n).
    The ridge pulls towards no change: where there is nothing to mend, nothing changes, and the
    error can only fall. In fp64, with G scaled to a diagonal of ones: an input that is always zero
    does no harm."""
    diagonal = gram.diagonal().double()
    scale = diagonal.clamp_min(1e-30).rsqrt()                # n
    unit = gram.double() * scale * scale[:, None]            # n, n: ones on its diagonal
    identity = torch.eye(len(gram), dtype=unit.dtype, device=unit.device)
    factor = torch.linalg.cholesky(unit + damp * identity)
    scaled = residual.double() * scale                       # out, n
    solved = torch.cholesky_solve(scaled.T, factor).T
    return (solved * scale).type_as(residual)


def least_squares(block: Block, half: str, want, have, batch: int, rope: tuple):
    """(Gram, residual, squared error): what a half's last weight should mend, over all windows.

    want: the stream (S, T, dim) that should come out of this half. have: the one that goes in."""
    gram = 0
    residual = 0
    error = 0.0
    with heard({"out": listening_points(block, half)["out"]}) as latest:
        for target, part in zip(want.split(batch), have.split(batch)):
            output = part + run_half(block, half, part, rope)
            gap = (target - output).flatten(0, 1).float()    # tokens, dim
            inputs = latest["out"]                           # tokens, units
            gram = gram + inputs.T @ inputs
            residual = residual + gap.T @ inputs
            error += gap.square().sum().item()
    return gram, residual, error


def squared_error(want: torch.Tensor, have: torch.Tensor, batch: int) -> tuple[float, float]:
    """(sum of want^2, sum of (want - have)^2) of two streams (S, T, dim)."""
    size = 0.0
    error = 0.0
    for target, part in zip(want.split(batch), have.split(batch)):
        gap = target - part
        size += target.float().square().sum().item()
        error += gap.float().square().sum().item()
    return size, error


@torch.no_grad()
def reform_(small: Llama, model: Llama, layers, windows: torch.Tensor, batch: int,
            damp: float = DAMP) -> list[tuple[float, float]]:
    """Reforms wo, then w2, of every layer of `small` in place, on calibration windows (S, T).

    The target is the stream of the dense `model` at the same place, so what left-out layers did is
    made up for too. The inputs are small's own, with everything before them reformed already, so
    errors do not pile up. layers: which of the model's layers `small` has.

    Returns, per reformed weight, the squared error (before, after) of the stream, relative to the
    square of the dense one. One pass of the dense model over the windows and two of the small one,
    `batch` windows at a time. Activations that are not finite: fail()."""
    want = model.tok_embeddings(windows)                     # S, T, dim: the dense stream
    have = small.tok_embeddings(windows)                     # S, T, dim: the small model's
    rope = model.rope(0, windows.size(1), want.device)
    kept = dict(zip(layers, small.layers))
    errors = []
    for layer, block in enumerate(bar(model.layers, "reformation", unit="layer")):
        for half in HALVES:
            advance_(block, half, want, batch, rope)
            if layer not in kept:
                continue

            # What is missing, and the weight that makes up for it.
            own = kept[layer]
            gram, residual, before = least_squares(own, half, want, have, batch, rope)
            check_finite(gram, layer, half)
            check_finite(residual, layer, half)
            last = own.attention.wo if half == "attention" else own.feed_forward.w2
            last.weight.copy_(last.weight + correction(gram, residual, damp))

            # The small model goes on with it.
            advance_(own, half, have, batch, rope)
            size, after = squared_error(want, have, batch)
            errors.append((before / size, after / size))
    return errors
