"""router.py: costs, what a budget may choose, the Gumbel-softmax, gates and both modes, each against the slow sum."""
import argparse
import dataclasses
import functools
import itertools
import math
import re

import pytest
import torch

from plumbing.checkpoint import load_tensors, save_tensors
from model import Llama, SubNet
from optimizer import lr_factor, schedule
from router import Router, load_router, restore_router, router_state
from space import AXES, Space, choices_for, cost, n_params, random_generator
from tests.helpers import GQA, MHA, SHAPES, hard_gates, odd_choices, one_line_error, random_llama, random_router, \
    subnets, tokens_for

BOTH = {"gqa": GQA, "mha": MHA}
FEW = {"dim": [32, 48], "n_heads": [2, 4, 8], "ffn_dim": [40, 80], "n_layers": [3, 4]}
EMBEDDINGS = ("tok_embeddings", "output")
BUDGETS = [0.45, 0.5, 0.6, 0.7, 0.77, 0.8, 0.9, 0.97]


@functools.lru_cache(maxsize=None)
def meta_llama(config) -> Llama:
    """A Llama of this shape, without memory."""
    with torch.device("meta"):
        return Llama(config)


@functools.lru_cache(maxsize=None)
def slow_cost(config, subnet) -> float:
    """Numbers in the exported state dict, counted one tensor at a time, over those of the full one."""
    count = lambda state: sum(w.numel() for name, w in state.items() if not name.startswith(EMBEDDINGS))
    return count(meta_llama(config).slices(subnet)) / count(meta_llama(config).state_dict())


def every_subnet(router) -> list[tuple[tuple[int, ...], SubNet]]:
    """(index on each axis, SubNet) of all combinations of choices, the slow and obvious way."""
    return [(index, SubNet.uniform(sizes[0], router.space.layer_order[:sizes[3]], sizes[1], sizes[2]))
            for index in itertools.product(*(range(len(router.space.choices[axis])) for axis in AXES))
            for sizes in [[router.space.choices[axis][i] for axis, i in zip(AXES, index)]]]


def feasible(router, budget) -> list[tuple[tuple[int, ...], SubNet]]:
    """F(b) by enumeration."""
    return [(index, s) for index, s in every_subnet(router)
            if budget - router.space.delta < slow_cost(router.space.config, s) <= budget]


def joint(router, members, budget, kappa) -> torch.Tensor:
    """Unnormalised log-probability of each member: the sum of its axes' scaled logits, added one at a time."""
    z = [part.tolist() for part in router.space.split(router.logits(budget))]
    return torch.tensor([sum(kappa * z[a][i] for a, i in enumerate(index)) for index, _ in members])


# -----------------------------------------------------------------------------
# cost and choices


@pytest.mark.parametrize("shape", SHAPES)
def test_cost_is_what_the_slice_holds(shape):
    """Catches a cost that counts embeddings, forgets norms, or keeps the KV heads of MHA: a budget would buy
    another size."""
    config = SHAPES[shape]
    for subnet in [*subnets(config).values(), *(s for _, s in every_subnet(random_router(config))[::7])]:
        assert math.isclose(cost(config, subnet), slow_cost(config, subnet), rel_tol=1e-12)
    for subnet in subnets(config).values():  # and in a Llama built in that shape
        state = meta_llama(subnet.config(config)).state_dict()
        assert n_params(config, subnet) == sum(w.numel() for n, w in state.items() if not n.startswith(EMBEDDINGS))
    assert cost(config, SubNet.full(config)) == 1


def test_choices_are_slices_of_the_shape():
    """Catches choices that cut a KV group, exceed the model, or leave the full size out, and defaults that do
    any of it."""
    for config in (GQA, MHA, dataclasses.replace(GQA, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
                                                 ffn_dim=14336)):
        choices = choices_for(config)
        assert choices == choices_for(config, choices)
        smallest = SubNet.uniform(choices["dim"][0], range(choices["n_layers"][0]), choices["n_heads"][0],
                                  choices["ffn_dim"][0])
        assert cost(config, smallest) < 0.3 and max(len(c) for c in choices.values()) < 20
    assert choices_for(GQA, {"dim": [40, 32, 40]}) == choices_for(GQA) | {"dim": [32, 40, 48]}
    for axis, wrong in [("dim", 49), ("dim", 0), ("n_heads", 3), ("ffn_dim", -1), ("n_layers", 5)]:
        with pytest.raises(ValueError, match=f"{axis} {wrong} "):
            choices_for(GQA, {axis: [48 if axis == "dim" else 4, wrong]})
    with pytest.raises(ValueError):
        choices_for(dataclasses.replace(GQA, ffn_dim=(80, 80, 80, 40)))


# -----------------------------------------------------------------------------
# constrained: nothing outside the budget, more budget buys more


@pytest.mark.parametrize("shape", BOTH)
@pytest.mark.parametrize("seed,trained", [(0, []), (1, []), (2, []), (3, [0.4, 0.6, 0.8, 1.0]), (4, [0.3, 0.7, 1.0])])
def test_constrained_never_exceeds_the_budget(shape, seed, trained):
    """Invariant 4. Catches a route over budget at budgets never trained, an unstable one, or one that shrinks as the
    budget grows by delta."""
    router = random_router(BOTH[shape], seed=seed)
    router.budgets = trained
    smallest = router.space.costs.min().item()
    grid = [smallest, *(smallest + (1 - smallest) * i / 120 for i in range(121)), *router.space.costs[::9].tolist()]
    grid = sorted(min(b, 1.0) for b in grid)
    torch.manual_seed(seed)
    costs = {b: slow_cost(router.space.config, router.route(b)) for b in grid}
    torch.rand(7)
    assert all(c <= b for b, c in costs.items())
    assert [slow_cost(router.space.config, router.route(b)) for b in grid] == [costs[b] for b in grid]
    for b1, b2 in itertools.combinations(grid, 2):
        assert b2 < b1 + router.space.delta or costs[b2] >= costs[b1], (b1, b2)
    full = SubNet.full(router.space.config)
    assert router.route(1.0) == full and router.route(1 - 1e-9) != full
    assert len(set(router.route(b) for b in grid)) > 10, "the budget does not matter"


def test_between_trained_budgets():
    """Catches an interpolated budget that combines sizes which never ran together, though others between its trained
    neighbours, or nearer to those, fit; a trained budget that is bent; an empty set that is argmaxed."""
    bent, near = 0, 0
    for seed in range(6):
        router = random_router(GQA, seed=seed)
        free = {b / 100: router.route(b / 100) for b in range(15, 100)}
        router.budgets = [0.4, 0.6, 0.8, 1.0]
        for b, without in free.items():
            got = router.route(b)
            smaller, larger = [t for t in router.budgets if t < b], [t for t in router.budgets if t > b]
            if b in router.budgets or not smaller:
                assert got == without
                continue
            ends = [router.space.sizes(router.route(t)) for t in (smaller[-1], larger[0])]
            full = router.space.sizes(router.space.full)
            off = {s: sum(max(min(e) - x, x - max(e), 0) / n for n, x, *e in zip(full, router.space.sizes(s), *ends))
                   for _, s in feasible(router, b)}
            if not off:  # nothing within delta: the largest that fits
                assert got == without
                continue
            assert off[got] <= min(off.values()) + 1e-9
            assert got == without or off[without] > off[got] - 1e-9
            bent, near = bent + (got != without), near + (off[got] > 0 and got != without)
    assert bent > 10 and near > 3


@pytest.mark.parametrize("mode", ["constrained", "uniform", "random"])
def test_route_is_the_best_of_the_feasible(mode):
    """Catches an argmax over another set than F(b), and an F(b) that is empty where a sub-network fits."""
    router = random_router(GQA, mode)
    for b in BUDGETS:
        members = feasible(router, b)
        space = router.space
        assert {space.subnet(space.members[m]) for m in space.feasible(b)} == {s for _, s in members}
        assert len(members) > 3 * (b < 0.7)
        assert router.route(b) in {s for _, s in members}
        if mode == "constrained":
            best = joint(router, members, b, 1.0)
            assert best[[s for _, s in members].index(router.route(b))] >= best.max() - 1e-5
        if mode == "uniform":
            full = [getattr(GQA, axis) for axis in AXES]
            spread = lambda s: max(f := [x / y for x, y in zip(router.space.sizes(s), full)]) - min(f)
            assert spread(router.route(b)) <= min(spread(s) for _, s in members) + 1e-6
    # Nothing within delta: the largest that fits.
    few = Router(Space(GQA, {"dim": [24, 48], "n_heads": [8], "ffn_dim": [80], "n_layers": [4]}), mode)
    assert few.route(0.9) == SubNet.uniform(24, range(4), 8, 80) == few.sample(0.9, 0, 1.0, 1.0).subnet


@pytest.mark.parametrize("budget", [0, -0.5, 1.0001, 30, math.nan, math.inf, 0.001])
def test_budgets_that_cannot_be(capsys, budget):
    """Catches a traceback, or the smallest sub-network served as if it met the budget."""
    router = random_router(GQA)
    for call in (router.route, router.deploy, lambda b: router.sample(b, 0, 1.0, 1.0)):
        with one_line_error(capsys, f"{budget:g}"):
            call(budget)
    smallest = router.space.costs.min().item()
    with one_line_error(capsys, f"{smallest:.4f}") as said:
        router.route(smallest - 1e-9)
    assert router.route(float(re.search(r"--budget ([\d.]+)", said[0])[1])), "the budget it names must do"


# -----------------------------------------------------------------------------
# Gumbel-softmax


def test_sampling_follows_the_softmax():
    """Catches noise that is not Gumbel, a kappa that scales the noise too, or axes drawn apart: frequencies
    over F(b) must be softmax(kappa * z)."""
    router, budget, kappa, draws = random_router(GQA, choices=FEW), 0.72, 1.7, 1500
    router.space.delta = 0.2
    members = feasible(router, budget)
    p = joint(router, members, budget, kappa).softmax(0)
    assert len(members) >= 5 and p.max() < 0.7 and (p * draws > 5).sum() >= 5, "a test of nothing"
    names, counts = [s for _, s in members], torch.zeros(len(members))
    for step in range(draws):
        choice = router.sample(budget, step, tau=0.3, kappa=kappa)
        counts[names.index(choice.subnet)] += 1
    chi2, freedom = ((counts - p * draws) ** 2 / (p * draws)).sum().item(), len(members) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    assert math.isclose(choice.max_p, p.max().item(), rel_tol=1e-4)


def test_penalty_mode_samples_every_axis_alone():
    """Catches one noise shared by all axes or logits of one axis used for another."""
    router, draws = random_router(GQA, "penalty", choices=FEW), 1200
    counts = [torch.zeros(len(FEW[axis])) for axis in AXES]
    pairs = torch.zeros(len(FEW["dim"]), len(FEW["ffn_dim"]))
    for step in range(draws):
        sizes = router.space.sizes(router.sample(0.6, step, 0.5, 1.5).subnet)
        index = [router.space.choices[axis].index(size) for axis, size in zip(AXES, sizes)]
        for a, i in enumerate(index):
            counts[a][i] += 1
        pairs[index[0], index[2]] += 1
    for a, z in enumerate(router.space.split(router.logits(0.6))):
        p = (1.5 * z).softmax(0)
        assert ((counts[a] / draws - p).abs() < 4 * (p * (1 - p) / draws).sqrt() + 1e-3).all(), AXES[a]
    product = counts[0][:, None] * counts[2] / draws
    assert ((pairs - product).abs() < 4 * product.sqrt() + 2).all()


def gumbel(router, budget, step, n) -> list[float]:
    """The noise that sample() draws: -log(-log u), u from the generator of (seed, step, budget)."""
    u = torch.rand(n, generator=random_generator(router.seed, step, budget), dtype=torch.float64)
    return [-math.log(-math.log(x)) for x in u.tolist()]


@pytest.mark.parametrize("mode", ["constrained", "penalty"])
def test_marginals_are_the_slow_enumeration(mode):
    """Catches marginals of another distribution than the one that was sampled, or concatenated in another order."""
    router, kappa = random_router(MHA, mode), 2.5
    for step, b in enumerate(BUDGETS):
        sharp = router.sample(b, step, tau=1e-4, kappa=kappa)  # tau -> 0: the one-hot of the sampled choices
        sizes = dict(zip(AXES, router.space.sizes(sharp.subnet)))
        onehot = [float(size == sizes[axis]) for axis in AXES for size in router.space.choices[axis]]
        assert torch.allclose(sharp.marginals, torch.tensor(onehot), atol=1e-3)
        soft = router.sample(b, step, tau=0.7, kappa=kappa)
        assert soft.subnet == sharp.subnet, "tau must not change the sample"
        for y in router.space.split(soft.marginals):
            assert math.isclose(y.sum().item(), 1, rel_tol=1e-5) and (y >= 0).all()
        if mode == "constrained":  # one noise per member, in the order of the enumeration
            members = feasible(router, b)
            z = joint(router, members, b, kappa) + torch.tensor(gumbel(router, b, step, len(members)))
            p, slow = (z / 0.7).softmax(0).tolist(), []
            for a, axis in enumerate(AXES):
                for k in range(len(router.space.choices[axis])):
                    slow.append(sum(q for q, (index, _) in zip(p, members) if index[a] == k))
        else:
            noise, slow, z, at = gumbel(router, b, step, len(onehot)), [], router.logits(b).tolist(), 0
            for axis in AXES:
                n = len(router.space.choices[axis])
                e = [math.exp((kappa * z[i] + noise[i]) / 0.7) for i in range(at, at + n)]
                slow, at = slow + [x / sum(e) for x in e], at + n
        assert torch.allclose(soft.marginals, torch.tensor(slow), atol=1e-4)


@pytest.mark.parametrize("mode", ["constrained", "penalty", "random"])
def test_a_sample_is_a_function_of_seed_step_and_budget(mode):
    """Invariant 5. Catches draws from the global stream, or from one that earlier calls have moved: a resumed run, or
    another rank, would take other slices."""
    def draw(router, order, noise):
        torch.manual_seed(noise)
        got = {}
        for step, b in order:
            torch.rand(noise + 1)
            choice = router.sample(b, step, 0.5, 0.3)
            y = None if choice.marginals is None else choice.marginals.tolist()
            penalty = None if choice.penalty is None else choice.penalty.item()
            got[step, b] = (choice.subnet, y, penalty, choice.max_p)
        return got

    order = [(step, b) for step in range(12) for b in (0.5, 0.6, 0.8)]
    once = draw(random_router(GQA, mode), order, 0)
    assert draw(random_router(GQA, mode), order[::-1], 5) == once
    for b in (0.5, 0.6):
        assert mode == "random" or len({once[step, b][0] for step in range(12)}) > 2, "every step draws the same"
    other = random_router(GQA, mode)
    other.seed = 1
    assert draw(other, order, 0) != once
    before = torch.random.get_rng_state()
    other.sample(0.5, 3, 0.5, 2.0), other.route(0.5)
    assert torch.equal(torch.random.get_rng_state(), before), "the global stream was moved"


def test_schedule_ends():
    """Catches a temperature that never arrives, or a kappa that falls: the last step is where the router must
    be sharp."""
    args = argparse.Namespace(steps=51, tau_end=0.0561, kappa_end=10.0, soft_prob=0.5, router_start=0.2, soft_end=0.6)
    taus, kappas, softs = zip(*(schedule(step, args) for step in range(51)))
    assert softs[:10] == (0,) * 10 and softs[10] == 0.5 and math.isclose(softs[20], 0.25) and not any(softs[30:])
    assert all(a > b for a, b in zip(softs[10:31], softs[11:31]))
    assert (taus[0], kappas[0]) == (1, 1) and math.isclose(taus[-1], 0.0561) and math.isclose(kappas[-1], 10)
    ratios, steps = [a / b for a, b in zip(taus, taus[1:])], [b - a for a, b in zip(kappas, kappas[1:])]
    assert max(ratios) - min(ratios) < 1e-9 and min(ratios) > 1 and max(steps) - min(steps) < 1e-9 and min(steps) > 0
    args.steps, args.router_start = 1, 0.0
    assert schedule(0, args) == (1, 1, args.soft_prob)
    rates = [lr_factor(step, 50, 0.1, 0.2) for step in range(50)]
    assert rates[:10] == [0] * 10 and rates[10] == 0.2 and rates[14] == 1 == max(rates) and 0.1 < rates[-1] < 0.11


# -----------------------------------------------------------------------------
# gates


def slow_gates(router, marginals) -> list[torch.Tensor]:
    """g_i = sum over choices k of y_k * [choice k keeps unit i], with the units kept taken from hard_gates()."""
    c, y = router.space.config, router.space.split(marginals)
    full = dict(zip(AXES, router.space.sizes(router.space.full)))
    gates = []
    for a, (axis, field) in enumerate(zip(AXES, ("dim", "n_heads", "ffn_dim", "layers"))):
        total = 0
        for k, size in enumerate(router.space.choices[axis]):
            s = full | {axis: size}
            subnet = SubNet.uniform(s["dim"], router.space.layer_order[:s["n_layers"]], s["n_heads"], s["ffn_dim"])
            total = total + y[a][k] * getattr(hard_gates(c, subnet), field)
        gates.append(total)
    return gates


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_gates_are_the_slow_sum(shape):
    """Catches gates in another order than the units: heads that are not group-major, layers not in the order of their
    rank, a cumulative sum from the wrong end."""
    router = random_router(SHAPES[shape])
    marginals = router.sample(0.6, 3, 0.8, 1.0).marginals.detach()
    marginals = marginals + 0.01 * torch.rand(marginals.shape, generator=torch.Generator().manual_seed(0))
    got = router.space.gates(marginals)
    assert [g.shape for g in got] == [g.shape for g in hard_gates(router.space.config, router.space.full)]
    for g, slow in zip((got.dim, got.n_heads, got.ffn_dim, got.layers), slow_gates(router, marginals)):
        assert torch.allclose(g, slow, atol=1e-6) and len(g.unique()) > 1


# -----------------------------------------------------------------------------
# what pushes the router


def expected_cost(router, budget, kappa=1.0) -> float:
    """Mean cost without noise, product of the axes' softmaxes, one member at a time."""
    p = [(kappa * z).softmax(0).tolist() for z in router.space.split(router.logits(budget))]
    return sum(math.prod(p[a][i] for a, i in enumerate(index)) * slow_cost(router.space.config, s)
               for index, s in every_subnet(router))


@pytest.mark.parametrize("kappa", [1.0, 3.0])
def test_penalty_is_the_slow_sum(kappa):
    """Catches a penalty of the noisy or the sampled cost, one without 1/b, or one that forgets kappa or its
    weight."""
    router = random_router(GQA, "penalty", choices=FEW)
    for step, b in enumerate((0.4, 0.6, 0.9)):
        p = [(kappa * z).softmax(0).tolist() for z in router.space.split(router.logits(b))]
        mean = expected_cost(router, b, kappa)
        choice = router.sample(b, step, 0.4, kappa, penalty=2.5)
        assert math.isclose(choice.penalty.item(), 2.5 * abs(mean / b - 1), rel_tol=1e-4)
        assert math.isclose(choice.max_p, math.prod(max(q) for q in p), rel_tol=1e-4)
    assert random_router(GQA).sample(0.6, 0, 1.0, 1.0).penalty is None


@pytest.mark.parametrize("start", [-2.0, 2.0])
def test_the_penalty_alone_moves_the_cost_to_the_budget(start):
    """Invariant 6. Catches a budget term with the wrong sign: from above the cost must fall, from below it must
    rise."""
    router, b = random_router(GQA, "penalty", choices=FEW), 0.6
    with torch.no_grad():
        for axis in AXES:  # start < 0: prefers the small choices
            router.axes[axis][2].bias.copy_(start * torch.arange(len(FEW[axis])))
    costs, optimizer = [expected_cost(router, b)], torch.optim.SGD(router.parameters(), lr=0.01)
    for step in range(6):
        optimizer.zero_grad()
        router.sample(b, step, 1.0, 1.0).penalty.backward()
        optimizer.step()
        costs.append(expected_cost(router, b))
    assert (costs[0] > b) == (start > 0) and abs(costs[0] - b) > 0.1
    assert all(abs(y - b) < abs(x - b) for x, y in zip(costs, costs[1:])) and (costs[-1] < costs[0]) == (start > 0)


@pytest.mark.parametrize("mode", ["constrained", "penalty"])
def test_every_tensor_gets_a_gradient(mode):
    """Invariant 6. Catches a graph that is cut between the loss and an axis, the embedding or the modulation."""
    router, model, tokens = random_router(GQA, mode), random_llama(GQA), tokens_for(GQA)
    choice = router.sample(0.7, 0, 0.8, 1.0)
    gates, factors = router.space.gates(choice.marginals), router.modulation(choice.subnet)
    model(tokens, tokens, gates=gates, factors=factors)[1].backward()
    for name, p in router.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0 and p.grad.isfinite().all(), name


def test_cross_entropy_alone_buys_a_larger_slice():
    """Invariant 6. Catches a gate gradient with the wrong sign: where the full model is the best, CE must raise
    the cost on every axis."""
    router, model = random_router(GQA, "penalty", choices=FEW), random_llama(GQA)
    tokens, b = tokens_for(GQA, 8, 32), 0.6
    with torch.no_grad():
        model.output.weight.mul_(4)                      # sure of itself
        targets = model(tokens)[0].argmax(-1)            # and always right, when all of it runs
        for axis in AXES:
            router.axes[axis][2].weight.zero_(), router.axes[axis][2].bias.zero_()
    size = lambda: [sum(p * k for p, k in zip(z.softmax(0).tolist(), router.space.choices[axis]))
                    for axis, z in zip(AXES, router.space.split(router.logits(b)))]
    before, cost_before, optimizer = size(), expected_cost(router, b), torch.optim.SGD(router.parameters(), lr=0.02)
    smallest = router.space.subnet(router.space.members[0])
    assert model(tokens, targets)[1] < model(tokens, targets, subnet=smallest)[1] - 0.5
    for step in range(6):
        choice = router.sample(b, step, 1.0, 1.0, penalty=0.0)
        optimizer.zero_grad()
        model(tokens, targets, gates=router.space.gates(choice.marginals))[1].backward()
        optimizer.step()
    assert expected_cost(router, b) > cost_before + 0.01
    assert all(x > y for x, y in zip(size(), before)), (before, size())


# -----------------------------------------------------------------------------
# flex.pt and deployment


@pytest.mark.parametrize("mode", ["constrained", "penalty", "uniform", "random"])
def test_state_round_trip(tmp_path, mode):
    """Catches state that flex.pt loses: another route, another sample or another modulation after a resume."""
    router = random_router(MHA, mode, seed=3)
    router.seen -= {("dim", 40), ("n_layers", 2)}
    router.budgets = [0.4, 0.8, 1.0]
    save_tensors(tmp_path / "flex.pt", router_state(router))
    again = restore_router(MHA, load_tensors(tmp_path / "flex.pt"))
    one, two = again.space, router.space
    assert (again.budgets, again.seen) == (router.budgets, router.seen)
    assert (one.layer_order, one.choices) == (two.layer_order, two.choices)
    for step, b in enumerate([*BUDGETS, 1.0]):
        (subnet, factors), (subnet2, factors2) = router.deploy(b), again.deploy(b)
        assert subnet == subnet2 == router.route(b)
        assert (factors is None) == (factors2 is None) and (factors is None or torch.equal(factors, factors2))
        one, two = router.sample(b, step, 0.5, 2.0), again.sample(b, step, 0.5, 2.0)
        assert one.subnet == two.subnet and (one.marginals is None or torch.equal(one.marginals, two.marginals))


FLEX_MISTAKES = {"cut short": lambda s, path: path.write_bytes(path.read_bytes()[:5000]),
                 "a list": lambda s, path: save_tensors(path, [1]),
                 "no choices": lambda s, path: save_tensors(path, {k: v for k, v in s.items() if k != "choices"}),
                 "of another Llama": lambda s, path: save_tensors(path, router_state(random_router(
                     dataclasses.replace(GQA, n_layers=5), choices=odd_choices(GQA) | {"n_heads": [2, 8]})))}


@pytest.mark.parametrize("mistake", FLEX_MISTAKES)
def test_a_damaged_flex_pt(tmp_path, capsys, mistake):
    """Catches a traceback where a user needs to hear which file does not fit."""
    state = router_state(random_router(GQA))
    save_tensors(tmp_path / "flex.pt", state)
    FLEX_MISTAKES[mistake](state, tmp_path / "flex.pt")
    with one_line_error(capsys, "flex.pt"):
        load_router(tmp_path, GQA)


def test_only_what_training_ran_is_modulated():
    """Invariant 3. Catches factors that are guesses, for a size no step has run, and a modulated full network."""
    router = random_router(GQA)
    assert router.deploy(1.0) == (SubNet.full(GQA), None)
    for b in BUDGETS:
        subnet, factors = router.deploy(b)
        assert torch.equal(factors, router.modulation(subnet)) and not torch.equal(factors, torch.ones(4, 2))
        assert not factors.requires_grad
        for pair in zip(AXES, router.space.sizes(subnet)):
            router.seen.remove(pair)
            assert router.deploy(b) == (subnet, None), "the size on this axis was never run"
            router.seen.add(pair)


@pytest.mark.parametrize("mode", ["constrained", "penalty", "uniform", "random"])
def test_sampled_slices_become_known(mode):
    """Catches a mode that trains the modulation of its slices and then deploys them without."""
    router = random_router(GQA, mode)
    router.seen = set()
    ran = {router.sample(b, step, 0.5, 2.0).subnet for step in range(3) for b in (0.6, 0.8)}
    assert router.seen == {pair for subnet in ran for pair in zip(AXES, router.space.sizes(subnet))}
    router.sample(1.0, 3, 0.5, 2.0)
    if mode in ("uniform", "random"):
        assert router.deploy(0.6)[1] is not None
