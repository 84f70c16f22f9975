"""router.py and space.py: costs, what a budget may choose, the Gumbel-softmax, gates, both modes.

Each is held against the slow and obvious way: sums over all members, one at a time."""
import argparse
import dataclasses
import functools
import itertools
import math
import re

import pytest
import torch

from model import LlamaConfig, Llama, SubNet
from plumbing.checkpoint import load_tensors, save_tensors
from plumbing.family import Family, restore_router, router_state
from router import Choice, Router, lesson
from space import AXES, Space, choices_for, cost, n_params, random_generator
from tests.helpers import (GQA, MHA, SHAPES, hard_gates, odd_choices, one_line_error, random_llama,
                           random_router, subnets, tokens_for)
from train import lr_factor, schedule

BOTH = {"gqa": GQA, "mha": MHA}
FEW = {"dim": [32, 48], "n_heads": [2, 4, 8], "ffn_dim": [40, 80], "n_layers": [3, 4]}
EMBEDDINGS = ("tok_embeddings", "output")
BUDGETS = [0.45, 0.5, 0.6, 0.7, 0.77, 0.8, 0.9, 0.97]


@functools.lru_cache(maxsize=None)
def meta_llama(config) -> Llama:
    """A Llama of this shape, without memory."""
    with torch.device("meta"):
        return Llama(config)


def count(state) -> int:
    """Numbers in a state dict, one tensor at a time, without the embeddings."""
    total = 0
    for name, w in state.items():
        if not name.startswith(EMBEDDINGS):
            total += w.numel()
    return total


@functools.lru_cache(maxsize=None)
def slow_cost(config, subnet) -> float:
    """Numbers in the slice's state dict over those of the full one."""
    model = meta_llama(config)
    return count(model.slices(subnet)) / count(model.state_dict())


@functools.lru_cache(maxsize=None)
def every_subnet(space) -> list[tuple[tuple[int, ...], SubNet]]:
    """(index on each axis, SubNet) of all combinations of choices."""
    indices = [range(len(space.choices[axis])) for axis in AXES]
    found = []
    for index in itertools.product(*indices):
        sizes = [space.choices[axis][i] for axis, i in zip(AXES, index)]
        dim, n_heads, ffn_dim, n_layers = sizes
        subnet = SubNet.uniform(dim, space.layer_order[:n_layers], n_heads, ffn_dim)
        found.append((index, subnet))
    return found


def feasible(router, budget) -> list[tuple[tuple[int, ...], SubNet]]:
    """F(b) by enumeration: one by one, the dearest first, as long as it is near or there are few."""
    space = router.space
    costs = {}
    for index, subnet in every_subnet(space):
        c = slow_cost(space.config, subnet)
        if budget - space.delta < c <= budget:
            costs[index, subnet] = c
    found = set()
    for member, c in sorted(costs.items(), key=lambda item: -item[1]):
        if c > budget - space.near or len(found) < 16:
            found.add(member)
    return [member for member in costs if member in found]  # in the order of the table


def joint(router, members, budget, kappa) -> torch.Tensor:
    """Logit of each member: the sum of its axes' scaled logits, added one at a time."""
    z = [part.tolist() for part in router.space.split(router.logits(budget))]
    sums = []
    for index, _ in members:
        total = 0.0
        for a, i in enumerate(index):
            total += kappa * z[a][i]
        sums.append(total)
    return torch.tensor(sums)


def neighbours(router, budget) -> tuple[list[float], list[float]]:
    """Trained budgets under this one, and over it."""
    smaller = [b for b in router.budgets if b < budget]
    larger = [b for b in router.budgets if b > budget]
    return smaller, larger


# -----------------------------------------------------------------------------
# cost and choices


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_is_what_the_slice_holds(shape):
    """Catches a cost that counts embeddings, forgets norms, or keeps the KV heads of MHA: a budget
    would buy another size."""
    config = SHAPES[shape]
    some = [subnet for _, subnet in every_subnet(random_router(config).space)[::7]]
    for subnet in [*subnets(config).values(), *some]:
        assert math.isclose(cost(config, subnet), slow_cost(config, subnet), rel_tol=1e-12)
    for subnet in subnets(config).values():  # and a Llama that is built in the slice's shape
        state = meta_llama(subnet.config(config)).state_dict()
        assert n_params(config, subnet) == count(state)
        with_embeddings = dict(meta_llama(subnet.config(config)).named_parameters())  # tied: once
        everything = sum(w.numel() for w in with_embeddings.values())
        assert n_params(config, subnet, embeddings=True) == everything
    assert cost(config, SubNet.full(config)) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_is_the_cost_of_each_row(shape):
    """Catches a second formula for the cost that drifts from the first: the table has its own."""
    config = SHAPES[shape]
    space = random_router(config).space
    assert len(space.members) == math.prod(len(choices) for choices in space.choices.values())
    for row, sizes in enumerate(space.members.tolist()):
        subnet = space.subnet(sizes)
        assert list(space.sizes(subnet)) == sizes
        assert math.isclose(space.costs[row].item(), cost(config, subnet), rel_tol=1e-12)
        chosen = [float(size == choice) for axis, size in zip(AXES, sizes)
                  for choice in space.choices[axis]]
        assert space.onehot[row].tolist() == chosen


def test_choices_are_slices_of_the_shape():
    """Catches choices that cut a KV group, exceed the model, or leave the full size out, and
    defaults that do any of it."""
    llama_8b = dataclasses.replace(GQA, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8,
                                   head_dim=128, ffn_dim=14336)
    for config in (GQA, MHA, llama_8b):
        choices = choices_for(config)
        assert choices == choices_for(config, choices)
        assert max(len(sizes) for sizes in choices.values()) < 20
        smallest = {axis: choices[axis][0] for axis in AXES}
        layers = range(smallest["n_layers"])
        subnet = SubNet.uniform(smallest["dim"], layers, smallest["n_heads"], smallest["ffn_dim"])
        assert cost(config, subnet) < 0.3
    # The docstring's ranges. README.md says how many members that makes.
    choices = choices_for(llama_8b)
    assert choices["dim"] == list(range(2048, 4097, 256))       # from a half
    assert choices["n_heads"] == [8, 16, 24, 32]                # from one in each of the 8 groups
    assert choices["ffn_dim"] == list(range(4096, 14337, 1024))  # from a quarter, in whole steps
    assert choices["n_layers"] == list(range(16, 33))           # from a half
    assert len(Space(llama_8b).members) == 6732
    llama2_7b = dataclasses.replace(llama_8b, n_kv_heads=32, ffn_dim=11008)
    for heads, kv_heads, dim, want in [(32, 32, 4096, [8, 16, 24, 32]), (40, 40, 5120, [8, 16, 24, 32, 40]),
                                       (52, 52, 6656, list(range(4, 53, 4))), (16, 16, 1024, [4, 8, 12, 16]),
                                       (12, 12, 1536, [2, 4, 6, 8, 10, 12]),
                                       (14, 14, 1792, list(range(2, 15, 2))),
                                       (6, 6, 1024, list(range(1, 7))), (32, 32, 512, list(range(1, 33))),
                                       (24, 8, 3072, [8, 16, 24])]:
        config = dataclasses.replace(llama2_7b, n_heads=heads, n_kv_heads=kv_heads, dim=dim)
        assert choices_for(config)["n_heads"] == want  # MHA: in steps that 8, 4 or 2 GPUs share
    asked = choices_for(GQA, {"dim": [40, 32, 40]})
    assert asked == choices_for(GQA) | {"dim": [32, 40, 48]}


@pytest.mark.parametrize("axis,right,wrong", [("dim", 48, 49), ("dim", 48, 0), ("n_heads", 4, 3),
                                              ("ffn_dim", 4, -1), ("n_layers", 4, 5)])
def test_choices_that_cannot_be(axis, right, wrong):
    """Catches a size that no slice can have and that is found out only when it runs."""
    with pytest.raises(ValueError, match=f"{axis} {wrong} "):
        choices_for(GQA, {axis: [right, wrong]})
    with pytest.raises(ValueError, match="uniform"):
        choices_for(dataclasses.replace(GQA, ffn_dim=(80, 80, 80, 40)))


ORDER = [2, 0, 3, 1]                                            # best layer first
FIRST = {1: {2}, 2: {0, 2}, 3: {0, 2, 3}, 4: {0, 1, 2, 3}}      # depth -> the layers that it keeps


def slice_and_gate(space, depth) -> tuple[set[int], set[int]]:
    """The layers of the slice of this depth, and those whose gates its choice opens."""
    subnet = space.subnet((48, 8, 80, depth))
    row = space.members.tolist().index([48, 8, 80, depth])
    gate = space.gates(space.onehot[row]).layers
    return set(subnet.layers), set(gate.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
def test_the_order_of_layers_is_obeyed(late):
    """Catches an order that never reaches the slices or the gates, and gates of the order for gates
    of its inverse. Training makes the space first, and orders its layers later."""
    choices = FEW | {"n_layers": [1, 2, 3, 4]}
    space = Space(GQA, choices, None if late else ORDER)
    router = Router(space)
    if late:
        for depth in FIRST:
            first = set(range(depth))
            assert slice_and_gate(space, depth) == (first, first)
        router.space.order_layers(ORDER)
    for depth, layers in FIRST.items():
        assert slice_and_gate(space, depth) == (layers, layers)
    depths = set()
    for step, budget in enumerate(3 * BUDGETS):
        for subnet in (router.route(budget), router.sample(budget, step, 1.0, 1.0).subnet):
            assert set(subnet.layers) == FIRST[len(subnet.layers)]
            depths.add(len(subnet.layers))
    assert {2, 3} <= depths, "a test of nothing"


def test_both_ends_of_what_a_budget_buys():
    """Catches a slice of exactly the budget that does not fit, one of exactly b - delta that does,
    and anything but the full network at b = 1."""
    space = Space(GQA, FEW, delta=0.25)
    costs = torch.full((len(space.members),), 0.125, dtype=torch.float64)
    costs[3], costs[5], costs[7], costs[9] = 0.5, 0.625, 0.75, 0.875
    assert space.feasible(0.75, costs).tolist() == [5, 7]
    full = space.members.tolist().index([48, 8, 80, 4])
    assert (space.costs > 0.75).sum() > 1
    assert space.feasible(1.0).tolist() == [full]


def test_of_many_members_a_budget_buys_the_dearest():
    """Catches a budget of a large Llama that goes unused though there are many ways to spend it, a
    choice that is narrowed where there are few, and members of equal cost that change places."""
    space = Space(GQA, FEW, delta=0.25, near=0.125)
    # near is its lower end, and outside
    costs = torch.full((len(space.members),), 0.625, dtype=torch.float64)
    costs[20:] = 0.75
    assert len(costs) == 24 and space.feasible(0.75, costs).tolist() == [*range(12), *range(20, 24)]  # 16
    costs[3:] = 0.75
    assert space.feasible(0.75, costs).tolist() == [*range(3, 24)], "all that are near"
    costs[10:] = 1
    assert space.feasible(0.75, costs).tolist() == [*range(10)], "all where there are few"
    demo = Space(LlamaConfig())
    for b in (0.9, 0.8, 0.6, 0.4):
        assert demo.costs[demo.feasible(b)].min() > b - 0.05


# -----------------------------------------------------------------------------
# the router's networks


def test_logits_are_the_slow_network():
    """Catches a nonlinearity or a bias that is left out, and axes in another order."""
    router = random_router(GQA)
    state = {name: p.detach().double() for name, p in router.named_parameters()}

    def silu(x):
        return x / (1 + (-x).exp())

    for b in BUDGETS:
        e = silu(state["embed.weight"][:, 0] * b + state["embed.bias"])
        expected = []
        for axis in AXES:
            h = silu(state[f"axes.{axis}.0.weight"] @ e + state[f"axes.{axis}.0.bias"])
            expected.append(state[f"axes.{axis}.2.weight"] @ h + state[f"axes.{axis}.2.bias"])
        assert torch.allclose(router.logits(b).double(), torch.cat(expected), atol=1e-5)


def test_an_untrained_router_prefers_nothing():
    """Catches a start that favours some choices, one that cannot learn to tell budgets apart, and
    one that is the same for every seed."""
    router, other = (Router(Space(GQA, FEW), seed=seed) for seed in (0, 1))
    for b in BUDGETS:
        assert not router.logits(b).any()
    assert not torch.equal(router.embed.weight, other.embed.weight)
    router.logits(0.4)[0].backward()
    at_small = router.axes["dim"][2].weight.grad[0].clone()
    router.zero_grad()
    router.logits(0.9)[0].backward()
    at_large = router.axes["dim"][2].weight.grad[0]
    assert at_small.abs().max() > 0
    assert not torch.allclose(at_small, at_large, rtol=0.01)


def slow_f(modulation, config, part, width, depth, inside, layer) -> float:
    """f(e(c)) of one sub-block, number by number. part: 0 for attention, 1 for the MLP."""
    e = []
    for fraction in (width, depth, inside):
        angles = [fraction * 10 ** (k / 7) for k in range(8)]   # 1 to 10 radians per unit
        e += [math.sin(angle) for angle in angles]
        e += [math.cos(angle) for angle in angles]
    total = 0.0
    hidden = modulation.hidden[part].tolist()
    bias = modulation.bias[part].tolist()
    out = modulation.out[part, layer].tolist()
    for row, shift, weight in zip(hidden, bias, out):
        h = shift + sum(a * b for a, b in zip(row, e))
        total += weight * h / (1 + math.exp(-h))
    return total


def test_modulation_is_the_slow_network():
    """Catches frequencies with nothing between two sizes, a fraction that is left out or goes to
    the other sub-block, a layer's factor on another layer, and factors that jump at b = 1."""
    modulation = random_router(GQA).modulation
    for name in ("all", "per layer", "depth"):
        subnet = subnets(GQA)[name]
        factors = modulation(subnet)
        for i, layer in enumerate(subnet.layers):
            insides = (subnet.n_heads[i] / 8, subnet.ffn_dim[i] / 80)
            for part, inside in enumerate(insides):
                here = slow_f(modulation, GQA, part, subnet.dim / 48, len(subnet.layers) / 4, inside, layer)
                at_full = slow_f(modulation, GQA, part, 1, 1, 1, layer)
                assert math.isclose(factors[layer, part].item(), 1 + here - at_full, abs_tol=1e-4)
    untrained = Router(Space(GQA, FEW)).modulation
    assert torch.equal(untrained(subnets(GQA)["all"]), torch.ones(4, 2))


# -----------------------------------------------------------------------------
# constrained: nothing outside the budget, more budget buys more


@pytest.mark.parametrize("shape", BOTH)
@pytest.mark.parametrize("seed,trained", [(0, []), (3, [0.4, 0.6, 0.8, 1.0]), (4, [0.3, 0.7, 1.0])])
def test_constrained_never_exceeds_the_budget(shape, seed, trained):
    """Catches a route over budget at budgets never trained, an unstable one, or one that shrinks as
    the budget grows by delta."""
    router = random_router(BOTH[shape], seed=seed)
    router.budgets = trained
    config = router.space.config
    smallest = router.space.costs.min().item()
    even = [smallest + (1 - smallest) * i / 60 for i in range(61)]
    exact = router.space.costs[::17].tolist()
    grid = sorted(min(b, 1.0) for b in [smallest, *even, *exact])

    # Never over budget.
    torch.manual_seed(seed)
    slices = {b: router.route(b) for b in grid}
    costs = {b: slow_cost(config, subnet) for b, subnet in slices.items()}
    for b, c in costs.items():
        assert c <= b

    # The same again, wherever the global stream is.
    torch.rand(7)
    for b in grid:
        assert router.route(b) == slices[b]

    # More budget, a larger slice; inside delta it may dip.
    for b1, b2 in itertools.combinations(grid, 2):
        assert b2 < b1 + router.space.delta or costs[b2] >= costs[b1], (b1, b2)

    # The full network at b = 1 alone.
    full = SubNet.full(config)
    assert router.route(1.0) == full
    assert router.route(1 - 1e-9) != full
    assert len(set(slices.values())) > 10, "the budget does not matter"


def outside(router, ends, subnet) -> float:
    """How far the sizes of a slice lie outside those of two others, or over those of one: fractions,
    summed over axes."""
    space = router.space
    total = 0.0
    for axis, x, *sizes in zip(AXES, space.sizes(subnet), *[space.sizes(end) for end in ends]):
        lowest = min(sizes) if len(sizes) == 2 else 0
        off = max(lowest - x, x - max(sizes), 0)
        total += off / getattr(space.config, axis)
    return total


def test_budgets_that_no_step_ran():
    """Catches an interpolated budget that combines sizes which never ran together, though others
    between its trained neighbours, or nearer to those, fit; one under the smallest trained budget
    that takes more on an axis than the smallest trained slice, though others fit; a trained budget
    that is bent; an empty set that is argmaxed."""
    bent = dict(between=0, under=0)
    smaller_one = dict(between=0, under=0)
    for seed in range(4):
        router = random_router(GQA, seed=seed)
        free = {b / 100: router.route(b / 100) for b in range(16, 100, 2)}
        router.budgets = [0.4, 0.6, 0.8, 1.0]
        trained = {b: router.route(b) for b in router.budgets}
        for b, without in free.items():
            got = router.route(b)
            smaller, larger = neighbours(router, b)
            members = [subnet for _, subnet in feasible(router, b)]
            if b in router.budgets:
                assert got == without
                continue
            members = members or [without]  # the largest that fits
            where = "between" if smaller else "under"
            ends = [trained[end] for end in smaller[-1:] + larger[:1]]
            off = {subnet: outside(router, ends, subnet) for subnet in members}
            bent[where] += got != without
            if min(off.values()) > 0:
                # Nothing in F(b) is prepared: the largest that is and fits, if any.
                space = router.space
                inside = {}
                for member in space.members:
                    subnet = space.subnet(member)
                    if cost(GQA, subnet) <= b and outside(router, ends, subnet) == 0:
                        inside[subnet] = cost(GQA, subnet)
                assert inside or where == "under"
                if inside:
                    assert inside[got] == max(inside.values())
                    smaller_one[where] += 1
                    continue
            assert off[got] <= min(off.values()) + 1e-9
            assert got == without or off[without] > off[got] + 1e-9
    assert min(bent.values()) > 10 and smaller_one["between"] > 3, "a test of nothing"


def test_trained_budgets_in_any_order():
    """Catches neighbours that are looked for in the order of the command line."""
    space = Space(GQA, odd_choices(GQA), delta=0.3)
    trained = [1.0, 0.4, 0.8, 0.6]
    for seed in range(3):
        state = random_router(GQA, seed=seed).state_dict()
        routes = []
        for budgets in (trained, sorted(trained)):
            router = Router(space, budgets=budgets)
            router.load_state_dict(state)
            routes.append([router.route(b) for b in (0.45, 0.5, 0.7, 0.9)])
        assert routes[0] == routes[1]


def test_the_full_network_is_not_sampled():
    """Catches gates, or a penalty, at b = 1, where nothing is to be chosen, and baselines that draw
    as a router does."""
    for mode in ("constrained", "penalty", "uniform", "random"):
        router = random_router(GQA, mode)
        assert router.sample(1.0, 0, 1.0, 1.0) == Choice(SubNet.full(GQA))
        assert router.route(1.0) == SubNet.full(GQA)
    for mode in ("uniform", "random"):
        router = random_router(GQA, mode)
        for step in range(3):
            assert router.sample(0.6, step, 1.0, 1.0) == Choice(router.route(0.6))


def test_a_budget_is_walked_once(monkeypatch):
    """Catches a route that asks itself: each question costs one look into the table, and one for
    each trained neighbour."""
    router = random_router(GQA)
    router.budgets = [0.4, 0.6, 0.8, 1.0]
    asked = []
    look_up = router.space.feasible

    def noted(budget, costs=None):
        asked.append(budget)
        return look_up(budget, costs)

    monkeypatch.setattr(router.space, "feasible", noted)
    for b, expected in [(0.6, [0.6]), (0.7, [0.7, 0.6, 0.8]), (0.3, [0.3, 0.4])]:
        asked.clear()
        router.route(b)
        assert asked == expected


@pytest.mark.parametrize("mode", ["constrained", "uniform", "random"])
def test_route_is_the_best_of_the_feasible(mode):
    """Catches an argmax over another set than F(b), and an F(b) that is empty where a sub-network
    fits."""
    router = random_router(GQA, mode)
    space = router.space
    for b in BUDGETS:
        members = feasible(router, b)
        fits = [subnet for _, subnet in members]
        assert {space.subnet(space.members[row]) for row in space.feasible(b)} == set(fits)
        assert b >= 0.7 or len(fits) > 3
        got = router.route(b)
        assert got in fits
        if mode == "constrained":
            logits = joint(router, members, b, 1.0)
            assert logits[fits.index(got)] >= logits.max() - 1e-5
        if mode == "uniform":
            assert spread(space, got) <= min(spread(space, subnet) for subnet in fits) + 1e-6
    # Nothing within delta: the largest that fits.
    choices = {"dim": [24, 48], "n_heads": [8], "ffn_dim": [80], "n_layers": [4]}
    few = Router(Space(GQA, choices), mode)
    largest = SubNet.uniform(24, range(4), 8, 80)
    assert few.route(0.9) == largest
    assert few.sample(0.9, 0, 1.0, 1.0).subnet == largest


def spread(space, subnet) -> float:
    """The largest fraction of a full size that the slice has, less the smallest."""
    full = [getattr(space.config, axis) for axis in AXES]
    fractions = [size / whole for size, whole in zip(space.sizes(subnet), full)]
    return max(fractions) - min(fractions)


def test_penalty_routes_every_axis_alone():
    """Catches noise in a route, and a penalty router that is bounded by F(b)."""
    over = 0
    for seed, b in itertools.product(range(6), BUDGETS):
        router = random_router(GQA, "penalty", seed=seed)
        space = router.space
        got = router.route(b)
        best = []
        for axis, z in zip(AXES, space.split(router.logits(b))):
            ranked = sorted(zip(z.tolist(), space.choices[axis]))
            best.append(ranked[-1][1])
        assert list(space.sizes(got)) == best
        over += cost(GQA, got) > b
    assert over > 0, "a test of nothing"


@pytest.mark.parametrize("mode", ["constrained", "penalty", "uniform", "random"])
@pytest.mark.parametrize("budget", [0, -0.5, 1.0001, 30, math.nan, math.inf, 0.001])
def test_budgets_that_cannot_be(capsys, budget, mode):
    """Catches a traceback, or the smallest sub-network served as if it met the budget."""
    router = random_router(GQA, mode)
    with one_line_error(capsys, f"{budget:g}"):
        router.route(budget)
    with one_line_error(capsys, f"{budget:g}"):
        router.sample(budget, 0, 1.0, 1.0)


def test_the_budget_named_in_the_error_does(capsys):
    """Catches an error that names a budget which is refused again, by rounding."""
    router = random_router(GQA)
    smallest = router.space.costs.min().item()
    with one_line_error(capsys, f"{smallest:.4f}") as said:
        router.route(smallest - 1e-9)
    named = re.search(r"--budget ([\d.]+)", said[0])[1]
    assert router.route(float(named))


# -----------------------------------------------------------------------------
# Gumbel-softmax


def test_sampling_follows_the_softmax():
    """Catches noise that is not Gumbel, a kappa that scales the noise too, or axes drawn apart:
    frequencies over F(b) must be softmax(kappa * z)."""
    router = random_router(GQA, choices=FEW)
    router.space.delta = 0.2
    budget = 0.72
    kappa = 1.7
    draws = 1000
    members = feasible(router, budget)
    names = [subnet for _, subnet in members]
    p = joint(router, members, budget, kappa).softmax(0)
    expected = p * draws
    assert len(members) >= 5 and p.max() < 0.7 and (expected > 5).sum() >= 5, "a test of nothing"
    counts = torch.zeros(2, len(members))  # of the first draw, of the second
    same = 0
    for step in range(draws):
        with torch.no_grad():
            choice = router.sample(budget, step, tau=0.3, kappa=kappa)
        counts[0, names.index(choice.subnet)] += 1
        counts[1, names.index(choice.other)] += 1
        same += choice.subnet == choice.other
    chi2 = ((counts - expected) ** 2 / expected).sum(1)
    freedom = len(members) - 1
    assert (chi2 < freedom + 4 * math.sqrt(2 * freedom)).all()
    alike = p.square().sum().item() * draws  # of two independent draws
    assert abs(same - alike) < 4 * math.sqrt(alike)
    assert math.isclose(choice.max_p, p.max().item(), rel_tol=1e-4)


@pytest.mark.parametrize("mode", ["constrained", "penalty"])
def test_lessons_are_the_gradient_of_the_expected_loss(mode):
    """Catches a lesson with the wrong sign or scale, a log ratio of other draws or with their noise
    in it: the mean over draws must be the gradient of sum p(slice) loss(slice), which is known
    here, in every logit."""
    router = random_router(GQA, mode, choices=FEW)
    space = router.space
    space.delta = 0.2
    budget, kappa, draws = 0.72, 1.3, 3000
    losses = {}
    generator = torch.Generator().manual_seed(3)
    for member in space.members:
        losses[space.subnet(member)] = torch.randn((), generator=generator).item()
    rows = space.feasible(budget) if mode == "constrained" else torch.arange(len(space.members))
    z = router.logits(budget).detach().requires_grad_()
    p = (space.onehot[rows] @ (kappa * z)).softmax(0)
    expected = sum(q * losses[space.subnet(space.members[row])] for q, row in zip(p, rows))
    want = torch.autograd.grad(expected, z)[0]
    router.logits = lambda budget: z
    found = []
    for step in range(draws):
        choice = router.sample(budget, step, 0.5, kappa)
        taught = lesson(choice, losses[choice.subnet], losses[choice.other])
        found.append(torch.autograd.grad(taught, z)[0])
    found = torch.stack(found)
    deviation = found.std(0) / math.sqrt(draws)
    assert (want.abs() > 4 * deviation).sum() >= 4, "a test of nothing"
    assert ((found.mean(0) - want).abs() < 4 * deviation + 1e-6).all()


def test_penalty_mode_samples_every_axis_alone():
    """Catches one noise shared by all axes or logits of one axis used for another."""
    router = random_router(GQA, "penalty", choices=FEW)
    space = router.space
    draws = 800
    counts = [torch.zeros(len(FEW[axis])) for axis in AXES]
    pairs = torch.zeros(len(FEW["dim"]), len(FEW["ffn_dim"]))
    for step in range(draws):
        with torch.no_grad():
            choice = router.sample(0.6, step, 0.5, 1.5)
        sizes = space.sizes(choice.subnet)
        index = [space.choices[axis].index(size) for axis, size in zip(AXES, sizes)]
        for a, i in enumerate(index):
            counts[a][i] += 1
        pairs[index[0], index[2]] += 1
    # Each axis by itself follows its softmax.
    for a, z in enumerate(space.split(router.logits(0.6))):
        p = (1.5 * z).softmax(0)
        deviation = (p * (1 - p) / draws).sqrt()
        assert ((counts[a] / draws - p).abs() < 4 * deviation + 1e-3).all(), AXES[a]
    # Two axes are independent.
    product = counts[0][:, None] * counts[2] / draws
    assert ((pairs - product).abs() < 4 * product.sqrt() + 2).all()


def gumbel(router, budget, step, n) -> list[float]:
    """The noise that sample() draws: -log(-log u), u from the generator of (seed, step, budget)."""
    generator = random_generator(router.seed, step, budget)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return [-math.log(-math.log(x)) for x in u.tolist()]


def slow_joint_marginals(router, budget, step, tau, kappa) -> list[float]:
    """One noise per member, in the order of the enumeration; then sums of the softmax over F(b)."""
    members = feasible(router, budget)
    noise = torch.tensor(gumbel(router, budget, step, len(members)))
    noisy = joint(router, members, budget, kappa) + noise
    p = (noisy / tau).softmax(0).tolist()
    marginals = []
    for a, axis in enumerate(AXES):
        for k in range(len(router.space.choices[axis])):
            took = [q for q, (index, _) in zip(p, members) if index[a] == k]
            marginals.append(sum(took))
    return marginals


def slow_axis_marginals(router, budget, step, tau, kappa) -> list[float]:
    """One noise per choice, all axes end to end; then a softmax per axis."""
    z = router.logits(budget).tolist()
    noise = gumbel(router, budget, step, len(z))
    marginals = []
    start = 0
    for axis in AXES:
        end = start + len(router.space.choices[axis])
        e = [math.exp((kappa * z[i] + noise[i]) / tau) for i in range(start, end)]
        marginals += [x / sum(e) for x in e]
        start = end
    return marginals


@pytest.mark.parametrize("mode,slow", [("constrained", slow_joint_marginals),
                                       ("penalty", slow_axis_marginals)])
def test_marginals_are_the_slow_enumeration(mode, slow):
    """Catches marginals of another distribution than the one that was sampled, or concatenated in
    another order."""
    router = random_router(MHA, mode)
    space = router.space
    kappa = 2.5
    for step, b in enumerate(BUDGETS):
        # tau -> 0: the one-hot of the choices drawn.
        sharp = router.sample(b, step, tau=1e-4, kappa=kappa)
        onehot = [float(size == choice) for axis, size in zip(AXES, space.sizes(sharp.subnet))
                  for choice in space.choices[axis]]
        assert torch.allclose(sharp.marginals, torch.tensor(onehot), atol=1e-3)
        # Another tau: softer, of the same draw.
        soft = router.sample(b, step, tau=0.7, kappa=kappa)
        assert soft.subnet == sharp.subnet, "tau must not change the sample"
        for y in space.split(soft.marginals):
            assert math.isclose(y.sum().item(), 1, rel_tol=1e-5)
            assert (y >= 0).all()
        expected = torch.tensor(slow(router, b, step, 0.7, kappa))
        assert torch.allclose(soft.marginals, expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["constrained", "penalty", "random"])
def test_a_sample_is_a_function_of_seed_step_and_budget(mode):
    """Catches draws from the global stream, or from one that earlier calls have moved: a resumed
    run, or another rank, would take other slices."""
    def draw(router, order, noise):
        torch.manual_seed(noise)
        got = {}
        for step, b in order:
            torch.rand(noise + 1)
            choice = router.sample(b, step, 0.5, 0.3)
            y = None if choice.marginals is None else choice.marginals.tolist()
            penalty = None if choice.penalty is None else choice.penalty.item()
            got[step, b] = (choice.subnet, choice.other, y, penalty, choice.max_p)
        return got

    order = [(step, b) for step in range(12) for b in (0.5, 0.6, 0.8)]
    once = draw(random_router(GQA, mode), order, 0)
    assert draw(random_router(GQA, mode), order[::-1], 5) == once
    for b in (0.5, 0.6):
        drawn = {once[step, b][0] for step in range(12)}
        assert mode == "random" or len(drawn) > 2, "every step draws the same"
    other = random_router(GQA, mode)
    other.seed = 1
    assert draw(other, order, 0) != once
    before = torch.random.get_rng_state()
    other.sample(0.5, 3, 0.5, 2.0)
    other.route(0.5)
    assert torch.equal(torch.random.get_rng_state(), before), "the global stream was moved"


def test_schedule_ends():
    """Catches a temperature that never arrives, or a kappa that falls: the last step is where the
    router must be sharp."""
    args = argparse.Namespace(steps=51, tau_end=0.0561, kappa_end=10.0, teach_prob=0.5,
                              router_start=0.2, teach_end=0.6, teach="pairs")
    # Pairs: none before the router starts, none after their end, as many all the way between.
    assert [schedule(step, args)[2] for step in range(51)] == [0] * 10 + [0.5] * 20 + [0] * 21
    args.teach = "soft"
    taus, kappas, softs = zip(*(schedule(step, args) for step in range(51)))

    # Soft passes: none before the router starts, none after their end, ever fewer between.
    assert softs[:10] == (0,) * 10 and not any(softs[30:])
    assert softs[10] == 0.5 and math.isclose(softs[20], 0.25)
    assert all(a > b for a, b in zip(softs[10:31], softs[11:31]))

    # tau falls by equal ratios, kappa rises by equal steps; both reach their end.
    assert (taus[0], kappas[0]) == (1, 1)
    assert math.isclose(taus[-1], 0.0561) and math.isclose(kappas[-1], 10)
    ratios = [a / b for a, b in zip(taus, taus[1:])]
    assert max(ratios) - min(ratios) < 1e-9 and min(ratios) > 1
    steps = [b - a for a, b in zip(kappas, kappas[1:])]
    assert max(steps) - min(steps) < 1e-9 and min(steps) > 0

    # A run of one step has no end to arrive at.
    args.steps = 1
    args.router_start = 0.0
    assert schedule(0, args) == (1, 1, args.teach_prob)

    # The learning rate: zero before the start, a warm-up, a decay to a tenth.
    rates = [lr_factor(step, 50, 0.1, 0.2) for step in range(50)]
    assert rates[:10] == [0] * 10
    assert rates[10] == 0.2 and rates[14] == 1 == max(rates)
    assert 0.1 < rates[-1] < 0.11


# -----------------------------------------------------------------------------
# gates


def slow_gates(router, marginals) -> list[torch.Tensor]:
    """g_i = sum over choices k of y_k * [choice k keeps unit i]; the units kept: hard_gates()."""
    space = router.space
    y = space.split(marginals)
    gates = []
    for a, (axis, field) in enumerate(zip(AXES, ("dim", "n_heads", "ffn_dim", "layers"))):
        total = 0
        for k, size in enumerate(space.choices[axis]):
            sizes = [getattr(space.config, other) for other in AXES]
            sizes[a] = size
            dim, n_heads, ffn_dim, n_layers = sizes
            subnet = SubNet.uniform(dim, space.layer_order[:n_layers], n_heads, ffn_dim)
            kept = getattr(hard_gates(space.config, subnet), field)
            total = total + y[a][k] * kept
        gates.append(total)
    return gates


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_gates_are_the_slow_sum(shape):
    """Catches gates in another order than the units: heads that are not group-major, layers not in
    the order of their rank, a cumulative sum from the wrong end."""
    router = random_router(SHAPES[shape])
    space = router.space
    marginals = router.sample(0.6, 3, 0.8, 1.0).marginals.detach()
    noise = torch.rand(marginals.shape, generator=torch.Generator().manual_seed(0))
    marginals = marginals + 0.01 * noise
    got = space.gates(marginals)
    hard = hard_gates(space.config, space.full)
    assert [g.shape for g in got] == [g.shape for g in hard]
    for g, slow in zip(got, slow_gates(router, marginals)):
        assert torch.allclose(g, slow, atol=1e-6)
        assert len(g.unique()) > 1


# -----------------------------------------------------------------------------
# what pushes the router


def probabilities(router, budget, kappa=1.0) -> list[list[float]]:
    """The softmax of each axis, without noise."""
    parts = router.space.split(router.logits(budget))
    return [(kappa * z).softmax(0).tolist() for z in parts]


def expected_cost(router, budget, kappa=1.0) -> float:
    """Mean cost without noise, the product of the axes' softmaxes, one member at a time."""
    p = probabilities(router, budget, kappa)
    total = 0.0
    for index, subnet in every_subnet(router.space):
        of_member = math.prod(p[a][i] for a, i in enumerate(index))
        total += of_member * slow_cost(router.space.config, subnet)
    return total


def expected_sizes(router, budget) -> list[float]:
    """Mean size on each axis, without noise."""
    sizes = []
    for axis, p in zip(AXES, probabilities(router, budget)):
        mean = sum(q * size for q, size in zip(p, router.space.choices[axis]))
        sizes.append(mean)
    return sizes


@pytest.mark.parametrize("kappa", [1.0, 3.0])
def test_penalty_is_the_slow_sum(kappa):
    """Catches a penalty of the noisy or the sampled cost, one without 1/b, or one that forgets
    kappa or its weight."""
    router = random_router(GQA, "penalty", choices=FEW)
    for step, b in enumerate((0.4, 0.6, 0.9)):
        choice = router.sample(b, step, 0.4, kappa, penalty=2.5)
        off = abs(expected_cost(router, b, kappa) / b - 1)
        assert math.isclose(choice.penalty.item(), 2.5 * off, rel_tol=1e-4)
        largest = math.prod(max(p) for p in probabilities(router, b, kappa))
        assert math.isclose(choice.max_p, largest, rel_tol=1e-4)
    assert random_router(GQA).sample(0.6, 0, 1.0, 1.0).penalty is None


@pytest.mark.parametrize("start", [-2.0, 2.0])
def test_the_penalty_alone_moves_the_cost_to_the_budget(start):
    """Catches a budget term with the wrong sign: from above the cost must fall, from below it must
    rise."""
    router = random_router(GQA, "penalty", choices=FEW)
    b = 0.6
    with torch.no_grad():
        for axis in AXES:  # start < 0: prefers the small choices
            slope = start * torch.arange(len(FEW[axis]))
            router.axes[axis][2].bias.copy_(slope)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.01)
    costs = [expected_cost(router, b)]
    for step in range(6):
        optimizer.zero_grad()
        router.sample(b, step, 1.0, 1.0).penalty.backward()
        optimizer.step()
        costs.append(expected_cost(router, b))
    assert (costs[0] > b) == (start > 0) and abs(costs[0] - b) > 0.1
    assert (costs[-1] < costs[0]) == (start > 0)
    for before, after in zip(costs, costs[1:]):
        assert abs(after - b) < abs(before - b)


@pytest.mark.parametrize("mode", ["constrained", "penalty"])
def test_every_tensor_gets_a_gradient(mode):
    """Catches a graph that is cut between the loss and an axis, the embedding or the modulation."""
    router = random_router(GQA, mode)
    model = random_llama(GQA)
    tokens = tokens_for(GQA)
    choice = router.sample(0.7, 0, 0.8, 1.0)
    gates = router.space.gates(choice.marginals)
    factors = router.modulation(choice.subnet)
    loss = model(tokens, tokens, gates=gates, factors=factors)[1]
    loss.backward()
    for name, p in router.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_cross_entropy_alone_buys_a_larger_slice():
    """Catches a gate gradient with the wrong sign: where the full model is the best, CE must raise
    the cost on every axis."""
    router = random_router(GQA, "penalty", choices=FEW)
    space = router.space
    model = random_llama(GQA)
    tokens = tokens_for(GQA, 8, 32)
    b = 0.6
    with torch.no_grad():
        model.output.weight.mul_(4)            # sure of itself
        targets = model(tokens)[0].argmax(-1)  # and always right, when all of it runs
        for axis in AXES:                      # the router prefers nothing
            router.axes[axis][2].weight.zero_()
            router.axes[axis][2].bias.zero_()
        smallest = space.subnet(space.members[0])
        loss_full = model(tokens, targets)[1]
        loss_smallest = model(tokens, targets, subnet=smallest)[1]
    assert loss_full < loss_smallest - 0.5
    cost_before = expected_cost(router, b)
    sizes_before = expected_sizes(router, b)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.02)
    for step in range(6):
        choice = router.sample(b, step, 1.0, 1.0, penalty=0.0)
        optimizer.zero_grad()
        loss = model(tokens, targets, gates=space.gates(choice.marginals))[1]
        loss.backward()
        optimizer.step()
    assert expected_cost(router, b) > cost_before + 0.01
    for axis, after, before in zip(AXES, expected_sizes(router, b), sizes_before):
        assert after > before, axis


# -----------------------------------------------------------------------------
# modulation in use


@pytest.mark.parametrize("mode", ["constrained", "penalty", "uniform", "random"])
def test_factors_of_a_slice_in_use(mode):
    """Catches a modulated full network, factors of another slice, or factors that hold a graph."""
    router = random_router(GQA, mode)
    full = router.route(1.0)
    assert full == SubNet.full(GQA)
    assert router.factors(full) is None
    assert torch.equal(router.modulation(full), torch.ones(4, 2))
    for b in BUDGETS:
        subnet = router.route(b)
        factors = router.factors(subnet)
        if subnet == full:  # a penalty router may
            assert factors is None
            continue
        assert factors.shape == (4, 2) and not factors.requires_grad
        assert torch.equal(factors, router.modulation(subnet))
        kept = [layer in subnet.layers for layer in range(4)]
        changed = (factors != 1).any(1)
        assert changed.tolist() == kept


# -----------------------------------------------------------------------------
# flex.pt


@pytest.mark.parametrize("mode", ["constrained", "penalty", "uniform", "random"])
def test_state_round_trip(tmp_path, mode):
    """Catches state that flex.pt loses: another route, another sample or another modulation after a
    resume."""
    router = random_router(MHA, mode, seed=3)
    router.budgets = [0.4, 0.8, 1.0]
    router.space.delta, router.space.near = 0.2, 0.1
    save_tensors(tmp_path / "flex.pt", router_state(router))
    again = restore_router(MHA, load_tensors(tmp_path / "flex.pt"))
    assert again.budgets == router.budgets
    assert again.space.layer_order == router.space.layer_order
    assert again.space.choices == router.space.choices
    assert (again.space.delta, again.space.near) == (0.2, 0.1)
    older = router_state(router)
    del older["near"]  # then a budget bought all within delta
    assert restore_router(MHA, older).space.near == 0.2
    for step, b in enumerate([*BUDGETS, 1.0]):
        subnet = router.route(b)
        assert again.route(b) == subnet
        assert torch.equal(again.modulation(subnet), router.modulation(subnet))
        one = router.sample(b, step, 0.5, 2.0)
        two = again.sample(b, step, 0.5, 2.0)
        assert one.subnet == two.subnet
        assert (one.marginals is None) == (two.marginals is None)
        assert one.marginals is None or torch.equal(one.marginals, two.marginals)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:5000])


def a_list(path):
    save_tensors(path, [1])


def no_choices(path):
    state = load_tensors(path)
    del state["choices"]
    save_tensors(path, state)


def one_axis_less(path):
    state = load_tensors(path)
    del state["choices"]["dim"]  # the default's sizes are as many, but others
    save_tensors(path, state)


def in_bf16(path):
    state = load_tensors(path)
    state["router"] = {name: weight.bfloat16() for name, weight in state["router"].items()}
    save_tensors(path, state)


def of_another_llama(path):
    deeper = dataclasses.replace(GQA, n_layers=5)
    choices = odd_choices(GQA) | {"n_heads": [2, 8]}
    save_tensors(path, router_state(random_router(deeper, choices=choices)))


def with_other(**values):
    """A damage: plain values in place of those of the state."""
    def damage(path):
        save_tensors(path, load_tensors(path) | values)
    return damage


@pytest.mark.parametrize("damage", [
    cut_short, a_list, no_choices, one_axis_less, in_bf16, of_another_llama,
    with_other(layer_order=[2, 0, 3]), with_other(layer_order=[2, 0, 3, 3]),
    with_other(layer_order=[2, 0, 3, 4]), with_other(layer_order=[2, 0, 3, True]),
    with_other(budgets=[1.5]), with_other(budgets=["1"]), with_other(budgets=[True])])
def test_a_damaged_flex_pt(tmp_path, capsys, damage):
    """Catches a traceback where a user needs to hear which file does not fit."""
    path = tmp_path / "flex.pt"
    save_tensors(path, router_state(random_router(GQA)))
    model = random_llama(GQA)
    assert Family(tmp_path, model).router is not None
    damage(path)
    with one_line_error(capsys, "flex.pt"):
        Family(tmp_path, model)
