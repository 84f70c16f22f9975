"""importance.py: sorting changes nothing, and the scores are those of the slow and obvious
computation, in fp32 and in bf16."""
import contextlib
import io
import re

import pytest
import torch

from importance import (
    activation_scores,
    gram_of,
    layers_by_influence,
    layers_by_logits,
    rank,
    sort_,
    squared_logits,
)
from model import Llama, LlamaConfig, RMSNorm, SubNet
from tests.helpers import GQA, MHA, SHAPES, close, random_llama, tokens_for


@pytest.mark.parametrize("shape", SHAPES)
def test_sorting_changes_nothing(shape):
    """Invariant 1. Catches a tensor that is left out of the permutation, a head whose rows move
    without its columns, tied embeddings permuted twice."""
    model, tokens = random_llama(SHAPES[shape]), tokens_for(SHAPES[shape])
    before, old = model(tokens)[0], {k: v.clone() for k, v in model.state_dict().items()}
    sort_(model, rank(model, tokens))
    assert close(model(tokens)[0], before)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, old[k])]
    assert len(moved) == len(old), f"never moved: {set(old) - set(moved)}"


@pytest.mark.parametrize("config", [GQA, MHA])
def test_first_are_the_best(config):
    """Catches an ascending sort, and heads of an MHA that stay where they are: after sorting,
    scores must fall from first to last (heads: inside each group; in an MHA: all)."""
    model, tokens = random_llama(config), tokens_for(config)
    sort_(model, rank(model, tokens))
    scores = activation_scores(model, tokens)

    def falls(s):
        return bool((s[..., 1:] <= s[..., :-1] * (1 + 1e-4)).all())

    groups = 1 if config is MHA else config.n_kv_heads
    assert falls(torch.stack(scores["dim"]).sum(0)) and all(falls(s) for s in scores["ffn_dim"])
    assert all(falls(s.view(groups, -1)) for s in scores["n_heads"])


@pytest.mark.parametrize("units", ["activation", "random", "reversed"])
def test_heads_stay_with_their_kv_group(units):
    """Catches a ranking over all heads at once: head h would read another group's keys."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    for order in rank(model, tokens, units=units)["n_heads"]:
        assert [h // 4 for h in order.tolist()] == [0] * 4 + [1] * 4


def test_yardsticks_for_the_ranking():
    """Catches a reversed order that is not, a random one that seeds do not move, and layers
    that follow either."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    orders = rank(model, tokens)
    worst_first = rank(model, tokens, units="reversed")
    assert worst_first["dim"].tolist() == orders["dim"].tolist()[::-1]
    assert all(a.tolist() == b.tolist()[::-1] for a, b in zip(orders["ffn_dim"], worst_first["ffn_dim"]))
    one, again, two = (rank(model, tokens, units="random", seed=seed) for seed in (1, 1, 2))
    assert one["dim"].tolist() == again["dim"].tolist() != two["dim"].tolist() != orders["dim"].tolist()
    assert one["ffn_dim"][0].tolist() != one["ffn_dim"][1].tolist()
    assert orders["layers"] == worst_first["layers"] == one["layers"]


# -----------------------------------------------------------------------------
# scores of channels, heads and neurons


@torch.no_grad()
def outputs_of(model: Llama, modules: list, windows: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """What each of the modules gives out on all windows, (windows, T, units), as the model has it:
    fp32 or bf16."""
    outputs = {module: [] for module in modules}
    handles = [module.register_forward_hook(lambda m, i, o: outputs[m].append(o)) for module in modules]
    for tokens in windows.split(batch):
        model(tokens)
    for handle in handles:
        handle.remove()
    return [torch.cat(outputs[module]) for module in modules]


def slow_scores(model: Llama, windows: torch.Tensor, batch: int = 8) -> dict[str, torch.Tensor]:
    """A of every unit of every module, (modules, units), from the formula: window by window,
    position by position, in float64."""
    n_heads, head_dim = model.config.n_heads, model.config.head_dim

    def size_of_heads(x):  # n_heads * head_dim
        heads = [x[h * head_dim:(h + 1) * head_dim] for h in range(n_heads)]
        return torch.stack([(head * head).sum().sqrt() for head in heads])

    def scores(modules, size):
        found = []
        for x in outputs_of(model, modules, windows, batch):
            total = 0
            for window in x.double():  # T, units
                activity = sum(size(position) for position in window) / len(window)
                total = total + activity ** 2
            found.append(total ** 0.5)
        return torch.stack(found)

    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    return dict(dim=scores(norms, torch.abs),
                n_heads=scores([block.attention.heads for block in model.layers], size_of_heads),
                ffn_dim=scores([block.feed_forward.neurons for block in model.layers], torch.abs))


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16 weights"])
def test_scores_are_the_formula(precision):
    """Catches a mean and a square in the wrong order, a missing |x|, batches of several sizes that
    are averaged instead of summed, heads of other channels or with another norm, a norm that is
    left out, and sums of bf16 numbers that are made in bf16."""
    model, tokens = random_llama(GQA), tokens_for(GQA, batch=5)
    run_in = contextlib.nullcontext()
    if precision == "autocast":
        run_in = torch.autocast("cpu", torch.bfloat16)
    if precision == "bf16 weights":
        model = model.bfloat16()
    with run_in:
        got, want = activation_scores(model, tokens, batch=2), slow_scores(model, tokens, batch=2)
    assert [len(got[axis]) for axis in ("dim", "n_heads", "ffn_dim")] == [9, 4, 4]
    for axis, scores in want.items():
        assert all(s.dtype == torch.float32 for s in got[axis])
        assert torch.allclose(torch.stack(got[axis]).double(), scores, rtol=1e-5), axis
    assert not any(module._forward_hooks for module in model.modules()), "something still listens"


def test_channels_are_ranked_over_all_norms():
    """Catches a sum over the norms that lacks one (the last, the first, those of the MLPs), or
    that is of squares: the order must be that of all 2 n_layers + 1, and every one of them decides
    about some channel."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    scores = slow_scores(model, tokens)["dim"]  # 2 n_layers + 1, dim
    order = rank(model, tokens)["dim"].tolist()
    assert order == scores.sum(0).argsort(descending=True).tolist()
    others = [scores.square().sum(0), scores.amax(0)]
    others += [scores.sum(0) - scores[left_out] for left_out in range(len(scores))]
    assert len(others) == 2 + 9
    for other in others:
        assert order != other.argsort(descending=True).tolist(), "a test of nothing"


# -----------------------------------------------------------------------------
# orders of layers


def loud_and_quiet() -> tuple[Llama, torch.Tensor]:
    """(model, windows): three windows whose logits are much smaller than those of the other two,
    and layers of several sizes. The embeddings of quiet tokens are nearly all in channel 0, which
    the output hardly reads."""
    config = LlamaConfig(dim=16, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=24,
                         vocab_size=32, context=32)
    model, generator = random_llama(config, seed=23), torch.Generator().manual_seed(23)
    with torch.no_grad():
        model.tok_embeddings.weight[16:, 0] += 6
        model.output.weight[:, 0] *= 0.1
        for block in model.layers:
            size = 0.15 + 1.2 * torch.rand((), generator=generator)
            block.attention.wo.weight.mul_(size)
            block.feed_forward.w2.weight.mul_(size)
    windows = torch.randint(16, (5, 9), generator=generator)
    windows[[0, 1, 4]] += 16
    return model, windows


def slow_order(model: Llama, windows: torch.Tensor, damage, again: bool = True) -> list[int]:
    """Layers, best first: the one whose removal does least damage goes, then the rest is judged without it.

    damage(squares of the logits' changes, squares of the full logits). again False: all are judged
    once, with all others there."""
    full, everything = model(windows)[0], list(range(model.config.n_layers))

    def judged(kept):
        does = {}
        for gone in kept:
            rest = [layer for layer in kept if layer != gone]
            subnet = SubNet.uniform(model.config.dim, rest, model.config.n_heads, model.config.ffn_dim)
            change = model(windows, subnet=subnet)[0] - full
            does[gone] = damage(change.double().square(), full.double().square())
        return does

    if not again:
        return sorted(everything, key=judged(everything).get, reverse=True)
    kept, removed = everything, []
    while len(kept) > 1:
        does = judged(kept)
        worst = min(kept, key=does.get)
        kept = [layer for layer in kept if layer != worst]
        removed.insert(0, worst)
    return kept + removed


BATCHES = [slice(0, 2), slice(2, 4), slice(4, 5)]  # of five windows, two at a time


def relative_damage(change: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The changes over the logits, both squared, of every batch, added up."""
    return sum(change[b].sum() / full[b].sum() for b in BATCHES)


@torch.no_grad()
def test_layers_are_judged_again_after_every_removal():
    """Catches layers that are all judged with all others there: what a layer is worth depends on
    who is still there."""
    model, windows = loud_and_quiet()
    want = slow_order(model, windows, relative_damage)
    assert want != slow_order(model, windows, relative_damage, again=False), "a test of nothing"
    assert layers_by_logits(model, windows, batch=2) == want


@torch.no_grad()
def test_logits_are_squared_in_fp32():
    """Catches an order of layers that bf16 products decide: on a GPU the ranking runs under autocast."""
    states, output = torch.randn(2, 5, 64), torch.randn(300, 64)
    with torch.autocast("cpu", torch.bfloat16):
        gram = gram_of(output)
        found = squared_logits(states, gram)
    exact = (states.double() @ output.double().T).square().sum()
    assert gram.dtype == found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@torch.no_grad()
def test_damage_is_relative_to_the_logits_of_its_batch():
    """Catches damage without its scale, where the batch with the largest logits decides; one scale
    for all batches; a scale that is a mean, so that a last, smaller batch counts less; and the last
    batch for all of them."""
    model, windows = loud_and_quiet()
    others = {
        "no scale": lambda change, full: change.sum(),
        "one scale": lambda change, full: change.sum() / full.sum(),
        "a mean": lambda change, full: sum(change[b].sum() / full[b].mean() for b in BATCHES),
        "the last": lambda change, full: change[4].sum() / full[4].sum()}
    want = slow_order(model, windows, relative_damage)
    for name, damage in others.items():
        assert want != slow_order(model, windows, damage), f"a test of nothing: {name}"
    assert layers_by_logits(model, windows, batch=2) == want


def slow_influence(model: Llama, windows: torch.Tensor) -> list[float]:
    """1 - cos(input, output) of every layer, summed over all positions, in float64."""
    influence = []
    for block in model.layers:
        turned = []

        def add(block, inputs, output):
            for a, b in zip(inputs[0].double().flatten(0, 1), output.double().flatten(0, 1)):
                turned.append(1 - (a @ b) / (a.norm() * b.norm()))

        handle = block.register_forward_hook(add)
        for window in windows:
            model(window[None])
        handle.remove()
        influence.append(sum(turned).item())
    return influence


@pytest.mark.parametrize("precision", ["fp32", "bf16 weights"])
@torch.no_grad()
def test_influence_is_the_formula(precision):
    """Catches another angle than that between a layer's input and output, a sign, batches that are
    forgotten, and cosines in bf16, where layers that turn the stream by little are all equal."""
    model, tokens = random_llama(GQA), tokens_for(GQA, batch=5, seed=3)
    for block, size in zip(model.layers, (0.02, 0.026, 0.028, 0.03)):
        block.attention.wo.weight.mul_(size)
        block.feed_forward.w2.weight.mul_(size)
    if precision == "bf16 weights":
        model = model.bfloat16()
    influence = slow_influence(model, tokens)
    want = sorted(range(4), key=influence.__getitem__, reverse=True)
    of_the_last = slow_influence(model, tokens[4:])
    assert want != sorted(range(4), key=of_the_last.__getitem__, reverse=True), "a test of nothing"
    assert layers_by_influence(model, tokens, batch=2) == want


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_says_how_long_the_ranking_takes(monkeypatch, terminal):
    """Catches minutes of silence on a terminal, a bar that ends before its work or after it, and
    one in a log file."""
    now = iter(range(10 ** 6))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(now)))
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", screen)
    model = random_llama(GQA)  # 4 layers: 4 + 3 + 2 passes
    rank(model, tokens_for(GQA, batch=4, length=2048))
    shown = re.findall(r"ranking layers: .*?(\d+)/(\d+) ", screen.getvalue())
    if terminal:
        assert ("1", "9") in shown and shown[-1] == ("9", "9") and "ranking:" in screen.getvalue()
    else:
        assert screen.getvalue() == ""
