"""train.py's optimizers, rates and clips, against a table of names, AdamW by hand, and the
schedules in words."""
import argparse
import copy
import math

import pytest
import torch

import train
from router import Router
from tests.helpers import GQA, random_llama, random_router

BETAS = (0.9, 0.95)
EPS = 1e-8


def settings(**changes) -> argparse.Namespace:
    """The flags that optimizers read; no two numbers are alike."""
    values = dict(steps=40, lr=1e-3, router_lr=3e-2, modulation_lr=7e-3, weight_decay=0.3, warmup=0.1,
                  router_start=0.25, shard="ddp", clip=0.5)
    return argparse.Namespace(**(values | changes))


def family() -> tuple[torch.nn.Module, Router]:
    """A Llama and a router, all weights random."""
    return random_llama(GQA), random_router(GQA)


def part_of(name: str, of_router: bool) -> str:
    """The part that a parameter belongs to, by its name."""
    if not of_router:
        return "llama"
    return "modulation" if name.startswith("modulation.") else "router"


def named(model, router) -> list[tuple[str, str, torch.nn.Parameter]]:
    """(part, name, parameter) of everything that trains."""
    found = [(part_of(name, False), name, p) for name, p in model.named_parameters()]
    return found + [(part_of(name, True), name, p) for name, p in router.named_parameters()]


def wanted_settings(part: str, name: str, args) -> tuple[float, float, float]:
    """(peak, start, weight decay) that a parameter must have. Only the Llama's matrices are decayed."""
    if part == "router":
        return args.router_lr, args.router_start, 0.0
    if part == "modulation":
        return args.modulation_lr, 0.0, 0.0
    decay = 0.0 if "norm" in name else args.weight_decay
    return args.lr, 0.0, decay


def group_of(optimizers, p) -> dict:
    """The one group that a parameter is in."""
    found = [g for optimizer in optimizers for g in optimizer.param_groups
             if any(q is p for q in g["params"])]
    assert len(found) == 1
    return found[0]


def random_gradients(model, router, seed: int) -> None:
    """Fills every .grad, each part at a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = dict(llama=1.0, router=0.01, modulation=0.0001)
    for part, _, p in named(model, router):
        p.grad = torch.randn(p.shape, generator=generator) * scale[part]


def test_every_parameter_has_the_settings_of_its_part():
    """Catches decay on norms, router or modulation, a rate of another part, a start that is given
    to the Llama or kept from the router, a parameter that no optimizer has."""
    model, router = family()
    args = settings()
    optimizers = train.make_optimizers(model, router, args)
    for part, name, p in named(model, router):
        group = group_of(optimizers, p)
        assert (group["peak"], group["start"], group["weight_decay"]) == wanted_settings(
            part, name, args), name


def test_frozen_weights_and_dense_runs():
    """Catches an optimizer for weights that must not move, and a dense run that looks for a router."""
    model, router = family()
    model.requires_grad_(False)
    only, = train.make_optimizers(model, router, settings())
    assert group_of([only], router.embed.weight) and not any(
        p is q for g in only.param_groups for p in g["params"] for q in model.parameters())
    only, = train.make_optimizers(random_llama(GQA), None, settings())
    assert len(only.param_groups) == 2


def slow_rate(step: int, args, start: float) -> float:
    """The share of the peak, in words: nothing before the start, up in equal steps, down along half
    a cosine to a tenth."""
    begin = round(args.steps * start)
    up = round(args.steps * args.warmup)
    if step < begin:
        return 0.0
    if step < begin + up:
        return (step - begin + 1) / up
    angle = math.pi * (step - begin - up) / (args.steps - begin - up)
    highest = 1.0
    lowest = 0.1
    return lowest + (highest - lowest) * (1 + math.cos(angle)) / 2


def test_rates_of_a_run():
    """Catches a warm-up that starts at 0 or jumps, a decay to nothing or to more than a tenth, and
    a router that learns before its start: each part has its rate at every step."""
    model, router = family()
    args = settings()
    optimizers = train.make_optimizers(model, router, args)
    some = [("llama", model.layers[1].attention.wq.weight, 0.0), ("llama", model.norm.weight, 0.0),
            ("router", router.embed.weight, 0.25), ("modulation", router.modulation.out, 0.0)]
    peaks = dict(llama=args.lr, router=args.router_lr, modulation=args.modulation_lr)
    for step in range(args.steps):
        logged = train.set_rates(optimizers, step, args)
        assert logged == pytest.approx(args.lr * slow_rate(step, args, 0.0))
        for part, p, start in some:
            rate = group_of(optimizers, p)["lr"]
            assert rate == pytest.approx(peaks[part] * slow_rate(step, args, start)), (step, part)


@torch.no_grad()
def slow_adamw(p, gradients: list, rates: list, decay: float):
    """The parameter after one AdamW step per gradient, in float64."""
    p = p.double()
    mean = torch.zeros_like(p)
    square = torch.zeros_like(p)
    for t, (gradient, rate) in enumerate(zip(gradients, rates), 1):
        g = gradient.double()
        p = p - rate * decay * p
        mean = BETAS[0] * mean + (1 - BETAS[0]) * g
        square = BETAS[1] * square + (1 - BETAS[1]) * g ** 2
        unbiased_mean = mean / (1 - BETAS[0] ** t)
        unbiased_square = square / (1 - BETAS[1] ** t)
        p = p - rate * unbiased_mean / (unbiased_square.sqrt() + EPS)
    return p


def test_three_steps_are_adamw_by_hand():
    """Catches other betas, decay that is scaled by the gradient (Adam for AdamW), a rate that never
    reaches its group."""
    model, router = family()
    before = [p.detach().clone() for _, _, p in named(model, router)]
    args = settings()
    optimizers = train.make_optimizers(model, router, args)
    gradients = []
    steps = (2, 17, 30)
    for step in steps:
        random_gradients(model, router, step)
        gradients.append([p.grad.clone() for _, _, p in named(model, router)])
        train.set_rates(optimizers, step, args)
        for optimizer in optimizers:
            optimizer.step()
    for i, (part, name, p) in enumerate(named(model, router)):
        peak, start, decay = wanted_settings(part, name, args)
        rates = [peak * slow_rate(step, args, start) for step in steps]
        want = slow_adamw(before[i], [g[i] for g in gradients], rates, decay)
        assert torch.allclose(p.double(), want, rtol=1e-5, atol=1e-6), name


def test_each_part_is_clipped_alone():
    """Catches one clip for all parts, in which the Llama's gradient shrinks the router's; a clip
    that clips nothing; a clip by value; norms that are taken after the clip."""
    model, router = family()
    random_gradients(model, router, 3)
    before = copy.deepcopy([p.grad for _, _, p in named(model, router)])

    def norms() -> dict[str, float]:
        squares = dict(llama=0.0, router=0.0, modulation=0.0)
        for part, _, p in named(model, router):
            squares[part] += p.grad.double().square().sum().item()
        return {part: square ** 0.5 for part, square in squares.items()}

    were = norms()
    clip = 0.5
    assert were["llama"] > clip and were["router"] > clip > were["modulation"] > 0
    assert train.clip_gradients(model, router, clip) == pytest.approx(were)
    for (part, name, p), old in zip(named(model, router), before):
        factor = min(1.0, clip / were[part])
        assert torch.allclose(p.grad, old * factor, rtol=1e-4, atol=0), name


def test_nothing_is_clipped_that_does_not_train():
    """Catches frozen weights, which have no gradient, or a missing router that stop the clip."""
    model, router = family()
    random_gradients(model, router, 3)
    model.requires_grad_(False)
    assert train.clip_gradients(model, router, 1.0).keys() == {"router", "modulation"}
    model.requires_grad_(True)
    assert train.clip_gradients(model, None, 1.0).keys() == {"llama"}


def test_noise_falls_and_soft_passes_end():
    """Catches a temperature that falls linearly, a kappa that falls, soft passes before the
    router's start or after their end: at every step of a run of 21 that starts its router
    at a quarter."""
    args = settings(steps=21, tau_end=0.01, kappa_end=5.0, teach_prob=0.8, router_start=0.25, teach_end=0.75,
                    teach="soft")
    for step in range(21):
        tau, kappa, soft = train.schedule(step, args)
        assert tau == pytest.approx(10 ** (-step / 10))
        assert kappa == pytest.approx(1 + 0.2 * step)
        if step < 5:
            assert soft == 0
        else:
            assert soft == pytest.approx(0.8 * max(0, 15 - step) / 10)
