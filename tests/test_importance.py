"""importance.py: sorting changes nothing, and the scores are those of the slow and obvious computation."""
import pytest
import torch

from importance import activation_scores, layers_by_influence, layers_by_logits, rank, sort_
from model import SubNet
from tests.helpers import GQA, SHAPES, close, random_llama, tokens_for


@pytest.mark.parametrize("shape", SHAPES)
def test_sorting_changes_nothing(shape):
    """Invariant 1. Catches a tensor that is left out of the permutation, a head whose rows move without its columns,
    tied embeddings permuted twice."""
    model, tokens = random_llama(SHAPES[shape]), tokens_for(SHAPES[shape])
    before, old = model(tokens)[0], {k: v.clone() for k, v in model.state_dict().items()}
    sort_(model, rank(model, tokens))
    assert close(model(tokens)[0], before)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, old[k])]
    assert len(moved) == len(old), f"never moved: {set(old) - set(moved)}"


def test_first_are_the_best():
    """Catches an ascending sort: after sorting, scores must fall from first to last (heads: inside each group)."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    sort_(model, rank(model, tokens))
    scores = activation_scores(model, tokens)

    def falls(s):
        return bool((s[..., 1:] <= s[..., :-1] * (1 + 1e-4)).all())

    assert falls(torch.stack(scores["dim"]).sum(0)) and all(falls(s) for s in scores["ffn_dim"])
    assert all(falls(s.view(GQA.n_kv_heads, -1)) for s in scores["n_heads"])


@pytest.mark.parametrize("units", ["activation", "random", "reversed"])
def test_heads_stay_with_their_kv_group(units):
    """Catches a ranking over all heads at once: head h would read another group's keys."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    for order in rank(model, tokens, units=units)["n_heads"]:
        assert [h // 4 for h in order.tolist()] == [0] * 4 + [1] * 4


def test_yardsticks_for_the_ranking():
    """Catches a reversed order that is not, a random one that seeds do not move, and layers that follow either."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    orders = rank(model, tokens)
    worst_first = rank(model, tokens, units="reversed")
    assert worst_first["dim"].tolist() == orders["dim"].tolist()[::-1]
    assert all(a.tolist() == b.tolist()[::-1] for a, b in zip(orders["ffn_dim"], worst_first["ffn_dim"]))
    one, again, two = (rank(model, tokens, units="random", seed=seed) for seed in (1, 1, 2))
    assert one["dim"].tolist() == again["dim"].tolist() != two["dim"].tolist() != orders["dim"].tolist()
    assert one["ffn_dim"][0].tolist() != one["ffn_dim"][1].tolist()
    assert orders["layers"] == worst_first["layers"] == one["layers"]


def test_scores_are_the_formula():
    """Catches a mean and a square in the wrong order, and batches that are averaged instead of summed."""
    model, tokens = random_llama(GQA), tokens_for(GQA, batch=5)
    got, want = activation_scores(model, tokens, batch=2), torch.zeros(GQA.ffn_dim)
    seen = []
    handle = model.layers[2].feed_forward.neurons.register_forward_hook(lambda m, i, o: seen.append(o))
    for row in tokens:
        model(row[None])
    handle.remove()
    for n in range(GQA.ffn_dim):
        want[n] = sum((sum(abs(v) for v in s[0, :, n].tolist()) / 17) ** 2 for s in seen) ** 0.5
    assert torch.allclose(got["ffn_dim"][2], want, rtol=1e-4)
    assert [len(got[axis]) for axis in ("dim", "n_heads", "ffn_dim")] == [9, 4, 4]
    assert not any(module._forward_hooks for module in model.modules()), "something still listens"


def test_layer_orders_find_the_layer_that_does_nothing():
    """Catches reversed layer orders: a layer whose output projections are nearly zero must come last in both."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    with torch.no_grad():
        for w in (model.layers[1].attention.wo.weight, model.layers[1].feed_forward.w2.weight):
            w.mul_(1e-3)
    for order in (layers_by_logits(model, tokens), layers_by_influence(model, tokens)):
        assert order[-1] == 1 and sorted(order) == [0, 1, 2, 3]


def test_layer_order_is_the_greedy_one():
    """Catches a greedy removal that never recomputes: the second layer to go is judged without the first."""
    model, tokens = random_llama(GQA), tokens_for(GQA)
    order, kept = layers_by_logits(model, tokens), [0, 1, 2, 3]
    full = model(tokens)[0]
    for gone in order[:0:-1]:
        damage = {}
        for i in kept:
            subnet = SubNet.uniform(GQA.dim, [j for j in kept if j != i], GQA.n_heads, GQA.ffn_dim)
            damage[i] = (model(tokens, subnet=subnet)[0] - full).square().sum().item()
        assert gone == min(kept, key=damage.get)
        kept.remove(gone)
