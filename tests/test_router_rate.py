"""The default rate of the router, at the lengths of the demo and of the paper: noise must not
decide, a signal must.

A run of the router alone, with train.py's schedule, optimizer, rates and clip. In place of two
slices' losses every lesson gets random numbers."""
import math

import pytest
import torch

import train
from model import Llama, LlamaConfig
from plumbing.settings import parse_args
from router import Router, lesson
from space import Space, random_generator

TINY = LlamaConfig(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8, vocab_size=8)


def decisions(steps: int, budgets: list[float], signal: float = 0.0, until: float = 1.0, seed: int = 0,
              rate: float | None = None, teach: str = "pairs") -> list[float]:
    """max p over F(b) at every step in which the router learns, until a share of them has passed;
    the largest over budgets.

    signal: what every axis costs on which a slice is not the best one, beside noise of 1."""
    flags = ["--steps", str(steps)] + (["--router-lr", str(rate)] if rate else [])
    args = parse_args(flags)
    space = Space(LlamaConfig())
    router = Router(space, "constrained", seed, [*budgets, 1.0])
    llama = Llama(TINY)
    optimizers = train.make_optimizers(llama, router, args)
    generator = random_generator("noise", seed)
    n_choices = space.onehot.size(1)
    best = {}
    for budget in budgets:
        rows = space.feasible(budget)
        row = rows[torch.randint(len(rows), (), generator=generator)]
        best[budget] = space.members[row].tolist()

    def loss_of(subnet, budget):
        off = sum(a != b for a, b in zip(space.sizes(subnet), best[budget]))
        return signal * off

    first = math.ceil(args.router_start * (steps - 1))
    last = math.floor(args.teach_end * (steps - 1))
    found = []
    for step in range(first, first + round(until * (last - first))):
        train.set_rates(optimizers, step, args)
        for optimizer in optimizers:
            optimizer.zero_grad()  # to None: a step without a lesson leaves the router where it is
        tau, kappa, share = train.schedule(step, args)
        largest = 0.0
        for budget in budgets:
            choice = router.sample(budget, step, tau, kappa)
            largest = max(largest, choice.max_p)
            if train.uniform_draw(seed, step, "teach", budget) >= share:
                continue
            if teach == "soft":
                noise = torch.randn(n_choices, generator=generator)
                choice.marginals.backward(noise / len(budgets))
            elif choice.other != choice.subnet:
                noise = torch.randn((), generator=generator).item()
                taught = lesson(choice, loss_of(choice.subnet, budget), loss_of(choice.other, budget) + noise)
                (taught / len(budgets)).backward()
        found.append(largest)
        train.clip_gradients(llama, router, args.clip)
        for optimizer in optimizers:
            optimizer.step()
    return found


@pytest.mark.parametrize("steps,budgets", [(450, [0.4, 0.6, 0.8]), (5000, [0.6]), (28800, [0.4])])
def test_noise_decides_nothing_in_the_first_half(steps, budgets):
    """Catches a rate that does not fall, or too slowly, with the length of the run."""
    assert max(decisions(steps, budgets, until=0.5)) < 0.9


@pytest.mark.parametrize("teach", ["soft", "pairs"])
def test_the_papers_rate_is_decided_by_noise(teach):
    """The test above can fail: at 4e-2 the choice is made in the first steps of 28,800, by noise."""
    assert max(decisions(28800, [0.4], until=0.06, rate=4e-2, teach=teach)) > 0.99


@pytest.mark.parametrize("steps,budgets", [(450, [0.4, 0.6, 0.8]), (5000, [0.6])])
def test_a_signal_has_decided_by_the_end(steps, budgets):
    """Catches a rate that falls too fast with the length of the run: a signal as large as the noise
    is over .9."""
    assert decisions(steps, budgets, signal=1.0)[-1] > 0.9


# What a share of each axis costs that a slice leaves out, somewhat as on SmolLM2-135M: channels and heads
# are dear, neurons and layers cheap (RESULTS.md, section 1).
SMOL = LlamaConfig(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=8)
PRICES = torch.tensor([4.0, 3.0, 1.0, 1.0])


def regrets(steps: int, budgets: list[float], seed: int) -> list[float]:
    """How much worse than the best member the router's choice is at each budget, 1: as much as the mean."""
    args = parse_args(["--steps", str(steps), "--seed", str(seed)])
    space = Space(SMOL)
    router = Router(space, "constrained", seed, [*budgets, 1.0])
    llama = Llama(TINY)
    optimizers = train.make_optimizers(llama, router, args)
    full = torch.tensor(space.sizes(space.full))

    def loss(subnet) -> float:
        return (PRICES * (1 - torch.tensor(space.sizes(subnet)) / full)).sum().item()

    for step in range(steps):
        train.set_rates(optimizers, step, args)
        for optimizer in optimizers:
            optimizer.zero_grad()
        tau, kappa, share = train.schedule(step, args)
        for budget in budgets:
            choice = router.sample(budget, step, tau, kappa)
            if train.how_it_teaches(choice, budget, step, share, args) == (False, True):
                (lesson(choice, loss(choice.subnet), loss(choice.other)) / 4).backward()
        train.clip_gradients(llama, router, args.clip)
        for optimizer in optimizers:
            optimizer.step()

    found = []
    for budget in budgets:
        members = [space.subnet(space.members[row]) for row in space.feasible(budget)]
        losses = torch.tensor([loss(member) for member in members])
        found.append(((loss(router.route(budget)) - losses.min()) / (losses.mean() - losses.min())).item())
    return found


def test_a_hundred_steps_are_enough_for_every_budget():
    """Catches lessons that end before the smallest budget has had its own: the axes that a larger one
    prefers decide there, and together they leave it a slice that nobody compared."""
    worst = [max(of_budget) for of_budget in zip(*(regrets(110, [0.9, 0.8, 0.6], seed) for seed in range(6)))]
    assert max(worst) < 0.15
