"""
The evolution of "Search for Efficient Large Language Models" (Shen et al., NeurIPS 2024): which
layers stay, how many heads and neurons each of them has, and which ones.

It begins at the best units by score, at the same ratio in every layer (Bounds.start). Then, again
and again, a generation of candidates is made out of the best so far, and ranked by loss on a few
windows of training text:

    half of it     mutants of a parent
    30 %           crossovers of two parents
    the rest       fresh mutants of the start, with many other units than the score would take

The best tenth of all are the next parents. Every candidate meets the budget (Bounds.repaired).

    python -m search --budget 0.8
"""
import math

import torch
from tqdm import tqdm

from data.shards import Shards
from eval import evaluate
from model import Llama, LlamaConfig
from plumbing.errors import fail
from plumbing.parallel import say
from search.candidates import Bounds, Candidate, arranged, swapped
from space import random_generator

# The paper's chances: of a layer to come or go; per layer, of another number of heads, of another
# number of neurons, and of other units.
MUTANT = dict(depth=0.1, ratio=0.3, mask=0.1)
FRESH = dict(depth=0.1, ratio=0.3, mask=0.6)

# -----------------------------------------------------------------------------
# text


def disjoint_windows(args, config: LlamaConfig, seed: int):
    """(fitness (x, y), calibration x, report (x, y)), each tensor (windows, T).

    args: data, seq_len, fitness_windows, calibration_windows, report_windows of a command line.
    Fitness and calibration get different windows of the train split, in the order that the seed
    draws. The report gets those of the val split. Too few training windows: fail()."""
    T = args.seq_len or min(config.context, 2048)
    train = Shards(args.data, "train", T, config.vocab_size, seed)
    wanted = args.fitness_windows + args.calibration_windows
    if len(train) < wanted:
        fail(f"{args.data} has {len(train):,} training windows of {T} tokens; expected {wanted:,}, "
             "for --fitness-windows and --calibration-windows together; ask for fewer, or give "
             "data/prepare.py more")
    fitness = train.batch(0, wanted, 0, args.fitness_windows)
    calibration, _ = train.batch(0, wanted, args.fitness_windows, wanted)
    val = Shards(args.data, "val", T, config.vocab_size)
    return fitness, calibration, val.windows(args.report_windows)


# -----------------------------------------------------------------------------
# a generation


def chance(p: float, rng: torch.Generator) -> bool:
    """True with probability p."""
    drawn = torch.rand((), generator=rng)
    return drawn.item() < p


def between(low: int, high: int, rng: torch.Generator) -> int:
    """A whole number from low to high, both included."""
    drawn = torch.randint(low, high + 1, (), generator=rng)
    return drawn.item()


def mutated(bounds: Bounds, c: Candidate, rng, depth: float, ratio: float, mask: float):
    """A candidate with some changes, repaired to the budget.

    With probability `depth` one layer comes or goes. In each layer, with probability `ratio` each,
    the number of heads and the number of neurons are drawn anew; with probability `mask` some of
    its units are swapped for others."""
    layers = c.layers.clone()
    heads = c.heads.clone()
    neurons = c.neurons.clone()
    n_heads = heads.sum(1) // bounds.groups                  # n_layers: in each KV group
    n_neurons = neurons.sum(1)                               # n_layers
    fewest_heads, fewest_neurons = bounds.fewest_drawn()
    if chance(depth, rng):
        i = between(0, len(layers) - 1, rng)
        layers[i] = ~layers[i]
    for i in range(len(layers)):
        if chance(ratio, rng):
            n_heads[i] = between(fewest_heads, bounds.in_group, rng)
        if chance(ratio, rng):
            n_neurons[i] = between(fewest_neurons, bounds.config.ffn_dim, rng)
        if chance(mask, rng):
            neurons[i] = swapped(neurons[i], rng)
            groups = heads[i].view(bounds.groups, -1)        # heads never leave their KV group
            heads[i] = torch.cat([swapped(group, rng) for group in groups])
    mutant = Candidate(layers, heads, neurons)
    return bounds.repaired(mutant, rng, n_heads, n_neurons)


def crossed(bounds: Bounds, a: Candidate, b: Candidate, rng) -> Candidate:
    """Every layer from one parent or the other, repaired to the budget."""
    drawn = torch.rand(len(a.layers), generator=rng)
    from_a = drawn < 0.5                                     # n_layers
    layers = torch.where(from_a, a.layers, b.layers)
    heads = torch.where(from_a[:, None], a.heads, b.heads)
    neurons = torch.where(from_a[:, None], a.neurons, b.neurons)
    child = Candidate(layers, heads, neurons)
    return bounds.repaired(child, rng)


def offspring(bounds: Bounds, parents: list[Candidate], rng, population: int) -> list[Candidate]:
    """A generation in the paper's proportions."""
    def parent() -> Candidate:
        i = between(0, len(parents) - 1, rng)
        return parents[i]

    n_mutants = population // 2
    n_crossovers = round(0.3 * population)
    children = []
    for _ in range(n_mutants):
        children.append(mutated(bounds, parent(), rng, **MUTANT))
    for _ in range(n_crossovers):
        children.append(crossed(bounds, parent(), parent(), rng))
    while len(children) < population:
        children.append(mutated(bounds, bounds.start(), rng, **FRESH))
    return children


# -----------------------------------------------------------------------------
# the search


def fitness_of(c: Candidate, model: Llama, windows, losses: dict[str, float]) -> float:
    """The candidate's loss on windows (x, y), looked up in `losses`, by key(), or added to it."""
    key = c.key()
    if key not in losses:
        subnet = c.subnet(model.config)
        loss, _ = evaluate(arranged(model, c), windows, subnet)
        if math.isnan(loss):
            loss = math.inf                                  # the worst there is
        losses[key] = loss
    return losses[key]


def survivors(pairs: list[tuple[float, Candidate]], n: int) -> list[tuple[float, Candidate]]:
    """The n different networks of lowest loss among pairs (loss, candidate), best first."""
    different = {}
    for loss, c in pairs:
        if c.key() not in different:                         # one network may be there twice
            different[c.key()] = (loss, c)

    def loss_then_key(pair) -> tuple[float, str]:            # ties too have one order
        loss, c = pair
        return loss, c.key()

    best_first = sorted(different.values(), key=loss_then_key)
    return best_first[:n]


def evolve(model: Llama, bounds: Bounds, windows, generations: int, population: int, seed: int,
           state: dict | None = None, save=None) -> dict:
    """Candidates of ever lower loss on fitness windows (x, y).

    A generation is a function of the seed, its number and its parents. save(state) is called after
    each, and `state` goes on from there. Returns the state after the last one:
      step      its number
      parents   [(loss, Candidate)], best first
      losses    the losses of all candidates tried, by key()"""
    if state is None:
        state = dict(step=0, parents=[], losses={})
    done = state["step"]
    losses = state["losses"]
    parents = [(loss, Candidate(*masks)) for loss, masks in state["parents"]]
    if not parents:
        start = bounds.start()
        loss = fitness_of(start, model, windows, losses)
        parents = [(loss, start)]

    bar = tqdm(
        total=generations * population, initial=done * population,
        unit="", disable=None, leave=False,
    )
    for step in range(done + 1, generations + 1):
        # make a generation
        rng = random_generator(seed, "generation", step)
        candidates = [c for _, c in parents]
        children = offspring(bounds, candidates, rng, population)

        # rank it, together with its parents
        for child in children:
            loss = fitness_of(child, model, windows, losses)
            parents.append((loss, child))
            lowest = min(loss for loss, _ in parents)
            bar.set_postfix_str(f"best {lowest:.4f}", refresh=False)
            bar.update()

        # keep the best tenth
        n = max(2, population // 10)
        parents = survivors(parents, n)
        if save:
            plain = [(loss, tuple(c)) for loss, c in parents]  # a file holds plain types only
            save(dict(step=step, parents=plain, losses=losses))
        loss, best = parents[0]
        n_layers = best.layers.sum().item()
        say(f"generation {step:3d}/{generations} | best {loss:.4f}, {n_layers} layers | "
            f"{len(losses):,} candidates tried")
    bar.close()
    return dict(step=generations, parents=parents, losses=losses)
