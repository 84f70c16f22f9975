"""bench/rankings.py: scores against derivatives by differences, orders of layers against a loop,
cuts of one axis."""
import torch

from bench.rankings import cut, fisher_scores, layers_by_loss, weighted_scores
from importance import activation_scores
from model import SubNet
from space import AXES
from tests.helpers import GQA, random_llama, tokens_for


def slow_fisher(model, x, y, touch) -> float:
    """The sum over windows of (dL/dg)^2 by central differences. touch(g): multiplies a unit by g."""
    step = 1e-2  # losses are fp32
    total = 0.0
    for window, target in zip(x, y):
        losses = []
        for g in (1 + step, 1 - step):
            touch(g)
            losses.append(model(window[None], target[None])[1].item())
            touch(1 / g)
        total += ((losses[0] - losses[1]) / (2 * step)) ** 2
    return total


@torch.no_grad()
def test_fisher_is_the_squared_derivative_of_every_window():
    """Catches a factor on another unit, on some norms only, or one gradient for all windows:
    scaling a unit is scaling the weights behind it."""
    model = random_llama(GQA).double()
    windows = tokens_for(GQA, batch=3)
    x, y = windows[:, :-1], windows[:, 1:]
    with torch.enable_grad():
        scores = fisher_scores(model, x, y)
    head_dim = GQA.head_dim

    def on_neuron(layer, unit):
        return lambda g: model.layers[layer].feed_forward.w2.weight[:, unit].mul_(g)

    def on_head(layer, head):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        return lambda g: model.layers[layer].attention.wo.weight[:, columns].mul_(g)

    def on_channel(channel):
        norms = [norm for block in model.layers for norm in (block.attention_norm, block.ffn_norm)] + [
            model.norm]
        return lambda g: [norm.weight[channel].mul_(g) for norm in norms]

    for layer, unit in ((0, 1), (2, 5), (3, 0)):
        for got, touch in ((scores["ffn_dim"][layer][unit], on_neuron(layer, unit)),
                           (scores["n_heads"][layer][unit], on_head(layer, unit)),
                           (scores["dim"][0][unit], on_channel(unit))):
            want = slow_fisher(model, x, y, touch)
            assert abs(got.item() - want) < 0.02 * want + 1e-9


def test_weighted_scores_know_what_reads_a_unit():
    """Catches the norm of rows in place of columns, and a matrix that is left out."""
    model = random_llama(GQA)
    windows = tokens_for(GQA, batch=2)
    plain = activation_scores(model, windows)
    got = weighted_scores(model, windows, 8)
    block = model.layers[1]
    for unit in (0, 3):
        reads = block.feed_forward.w2.weight[:, unit].norm()
        assert torch.isclose(got["ffn_dim"][1][unit], plain["ffn_dim"][1][unit] * reads)
        columns = slice(unit * GQA.head_dim, (unit + 1) * GQA.head_dim)
        assert torch.isclose(
            got["n_heads"][1][unit],
            plain["n_heads"][1][unit] * block.attention.wo.weight[:, columns].norm())
        readers = [block.attention.wq.weight, block.attention.wk.weight, block.attention.wv.weight]
        reads = torch.cat(readers)[:, unit].norm()
        assert torch.isclose(got["dim"][2][unit], plain["dim"][2][unit] * reads)


@torch.no_grad()
def test_layers_by_loss():
    """Catches layers that are judged once where again was asked, and the best that goes first."""
    model = random_llama(GQA)
    windows = tokens_for(GQA, batch=3)
    x, y = windows[:, :-1], windows[:, 1:]

    def loss(layers):
        return model(x, y, subnet=SubNet.uniform(GQA.dim, layers, GQA.n_heads, GQA.ffn_dim))[1].item()

    alone = {gone: loss([k for k in range(4) if k != gone]) for gone in range(4)}
    assert layers_by_loss(model, x, y, again=False) == sorted(alone, key=alone.get, reverse=True)
    order = layers_by_loss(model, x, y, again=True)
    assert order[-1] == min(alone, key=alone.get)
    rest = order[:-1]
    assert order[-2] == min(rest, key=lambda gone: loss([k for k in sorted(rest) if k != gone]))


def test_a_cut_touches_one_axis():
    """Catches shares of another axis, heads that leave a group without any, and the worst layers kept."""
    model = random_llama(GQA)
    full = model.full
    for axis in AXES:
        subnet = cut(model, axis, 0.5, [3, 0, 2, 1])
        expected = dict(dim=full.dim, n_heads=full.n_heads[0], ffn_dim=full.ffn_dim[0])
        if axis == "n_layers":
            assert subnet.layers == (0, 3)
        else:
            got = dict(dim=subnet.dim, n_heads=subnet.n_heads[0], ffn_dim=subnet.ffn_dim[0])
            assert subnet.layers == full.layers
            assert {name for name in got if got[name] != expected[name]} <= {axis}
            assert got[axis] <= expected[axis]
            assert subnet.n_heads[0] % GQA.n_kv_heads == 0
