"""
A smaller Llama without training: "Search for Efficient Large Language Models" (Shen et al., NeurIPS 2024).

    python search.py --budget 0.8                        out/base -> out/search-0.80, a plain Llama folder
    python search.py --llama Llama-2-7B --data data/web --budget 0.5 --population 100 --generations 50
    python search.py --budget 0.8 --uniform              one size for all layers, so that export.py --format hf works
    python search.py --budget 0.8 --resume               goes on after a kill

  score        one pass over calibration windows tells what each head and neuron is worth      reform.py: unit_scores
  start        at the same ratio everywhere, the best ones                                      start
  evolution    which layers, how many heads and neurons in each, and which ones: mutants, crossovers and fresh mutants
               of the start, ranked by their loss on a few windows                              evolve
  reformation  least squares: wo and w2 make up for what is gone                                reform.py: reform_

Every candidate meets the budget, to the last neuron: it is repaired, never rejected. Ours where the paper is silent or
its choice does no good: whole heads, as many in each KV group (no runtime loads heads with dims cut out); any set of
layers, not a tail; a mask mutation that swaps a fixed share of units (a random subset as printed does not overlap
enough below a ratio of .88). As in the paper, the hidden size and the embeddings stay.
"""
import argparse
import hashlib
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from search.candidates import Bounds, Candidate, arranged, check_budget, slim, swapped
from plumbing.checkpoint import (
    RESUME,
    TOKENIZER,
    WEIGHTS,
    load_llama,
    resume_state,
    save_llama,
    save_tensors,
)
from data.shards import Shards
from model import Llama
from plumbing.parallel import WORLD, device_of, say
from plumbing.params import PARAMS, read_config
from search.reform import reform_, unit_scores
from space import cost, random_generator
from plumbing.errors import fail
from eval import evaluate

MUTANT, FRESH = dict(depth=0.1, ratio=0.3, mask=0.1), dict(depth=0.1, ratio=0.3, mask=0.6)  # the paper's chances

# -----------------------------------------------------------------------------
# evolution


def mutated(bounds: Bounds, c: Candidate, rng, depth: float, ratio: float, mask: float) -> Candidate:
    """With probability `depth` one layer comes or goes; in each layer, with probability `ratio` each, the number of
    heads and of neurons is drawn anew, and with probability `mask` some units are swapped."""
    chance = lambda p: torch.rand((), generator=rng).item() < p
    between = lambda low, high: torch.randint(low, high + 1, (), generator=rng)
    layers, heads, neurons = c.layers.clone(), c.heads.clone(), c.neurons.clone()
    if chance(depth):
        layers[between(0, len(layers) - 1)] ^= True
    sizes, (fewest_heads, fewest_neurons) = [heads.sum(1) // bounds.groups, neurons.sum(1)], bounds.ranges()
    for i in range(len(layers)):
        if chance(ratio):
            sizes[0][i] = between(fewest_heads, bounds.in_group)
        if chance(ratio):
            sizes[1][i] = between(fewest_neurons, bounds.config.ffn_dim)
        if chance(mask):
            neurons[i] = swapped(neurons[i], rng)
            heads[i] = torch.cat([swapped(group, rng) for group in heads[i].view(bounds.groups, -1)])
    return bounds.repaired(Candidate(layers, heads, neurons), rng, *sizes)


def crossed(bounds: Bounds, a: Candidate, b: Candidate, rng) -> Candidate:
    """Every layer from one parent or the other."""
    from_a = torch.rand(len(a.layers), generator=rng) < 0.5
    parts = (torch.where(from_a.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(a, b))
    return bounds.repaired(Candidate(*parts), rng)


def offspring(bounds: Bounds, parents: list[Candidate], rng, population: int) -> list[Candidate]:
    """A generation in the paper's proportions: half of it mutants of the parents, 30 % crossovers of two of them, the
    rest mutants of the start, with other units than the score would take."""
    parent = lambda: parents[torch.randint(len(parents), (), generator=rng)]
    mutants, crossovers = population // 2, round(0.3 * population)
    return ([mutated(bounds, parent(), rng, **MUTANT) for _ in range(mutants)]
            + [crossed(bounds, parent(), parent(), rng) for _ in range(crossovers)]
            + [mutated(bounds, bounds.start(), rng, **FRESH) for _ in range(population - mutants - crossovers)])


def evolve(model: Llama, bounds: Bounds, windows, generations: int, population: int, seed: int, state=None, save=None):
    """Candidates of ever lower loss on fitness windows (x, y); a tenth of the population, the best so far, are the
    parents of the next generation. A generation is a function of the seed, its number and its parents.

    Returns the state after the last generation: step, parents [(loss, Candidate)] best first, and the losses of all
    candidates by key(). save(state) is called after each; `state` goes on from there."""
    def loss_of(c: Candidate) -> float:
        if c.key() not in losses:
            loss = evaluate(arranged(model, c), windows, c.subnet(model.config))[0]
            losses[c.key()] = loss if loss == loss else float("inf")  # not a number: the worst there is
        return losses[c.key()]

    state = state or dict(step=0, parents=[], losses={})
    losses, parents = state["losses"], [(loss, Candidate(*c)) for loss, c in state["parents"]]
    parents = parents or [(loss_of(bounds.start()), bounds.start())]
    bar = tqdm(total=generations * population, initial=state["step"] * population, unit="", disable=None, leave=False)
    for step in range(state["step"] + 1, generations + 1):
        children = offspring(bounds, [c for _, c in parents], random_generator(seed, "generation", step), population)
        for child in children:
            parents.append((loss_of(child), child))
            bar.set_postfix_str(f"best {min(loss for loss, _ in parents):.4f}", refresh=False)
            bar.update()
        different = {c.key(): (loss, c) for loss, c in reversed(parents)}.values()
        parents = sorted(different, key=lambda pair: (pair[0], pair[1].key()))[:max(2, population // 10)]
        state = dict(step=step, parents=[(loss, tuple(c)) for loss, c in parents], losses=losses)
        if save:
            save(state)
        best, layers = parents[0][0], int(parents[0][1].layers.sum())
        say(f"generation {step:3d}/{generations} | best {best:.4f}, {layers} layers | {len(losses):,} candidates tried")
    bar.close()
    return dict(step=state["step"], parents=parents, losses=losses)


# -----------------------------------------------------------------------------
# from a folder to a folder


def disjoint_windows(data, context: int, vocab_size: int, seed: int, fitness: int, calibration: int, report: int):
    """(fitness (x, y), calibration x, report (x, y)): the first two are different windows of the train split, in the
    order drawn by the seed, the last is the val split."""
    shards = Shards(data, "train", context, vocab_size, seed)
    if len(shards) < fitness + calibration:
        fail(f"{data} has {len(shards):,} training windows of {context} tokens; expected {fitness + calibration:,}, "
             "for --fitness-windows and --calibration-windows together; ask for fewer, or give data/prepare.py more")
    draw = lambda start, stop: shards.batch(0, fitness + calibration, start, stop)
    return (draw(0, fitness), draw(fitness, fitness + calibration)[0],
            Shards(data, "val", context, vocab_size).windows(report))


def search(model: Llama, windows, args, settings: dict, state: dict | None) -> Llama:
    """Score, evolution, reformation; says what came out. windows: disjoint_windows()."""
    fitness, calibration, report = windows
    batch = max(1, 4096 // calibration.size(1))
    calibration = calibration.to(model.norm.weight.device)
    bounds = Bounds.of(model, args.budget, unit_scores(model, calibration, batch), args.uniform)
    save = lambda state: save_tensors(Path(args.out) / RESUME, state | dict(settings=settings))
    state = evolve(model, bounds, fitness, args.generations, args.population, args.seed, state, save)
    best, config = state["parents"][0][1], model.config
    tried, passes = len(state["losses"]), len(calibration)
    rows = [("dense", 1.0, evaluate(model, report)[0]), ("start", cost(config, bounds.start().subnet(config)), evaluate(
        slim(model, bounds.start()), report)[0])]
    small, subnet = slim(model, best), best.subnet(config)  # only now: it and the start's would be there together
    rows.append(("searched", cost(config, subnet), evaluate(small, report)[0]))
    if args.reform:
        errors = reform_(small, model, subnet.layers, calibration, batch)
        passes *= 4
        rows.append(("reformed", cost(config, subnet), evaluate(small, report)[0]))
        before, after = errors[-1]
        say(f"reformed: squared error of the stream on calibration text {before:.2g} -> {after:.2g} of its square")
    say(f"layers {' '.join(map(str, subnet.layers))} | heads {' '.join(map(str, subnet.n_heads))} | neurons "
        f"{' '.join(map(str, subnet.ffn_dim))}")
    say(f"{'':10} {'cost':>7} {'loss':>7}   (nats on {report[1].numel():,} held-out tokens)")
    for name, got, loss in rows:
        say(f"{name:10} {got:7.4f} {loss:7.4f}")
    say(f"forward passes of a window of {calibration.size(1)} tokens: {tried * len(fitness[0]):,} for the fitness of "
        f"{tried:,} candidates, {passes:,} for score and reformation")
    return small


def parse_args(argv=None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python search.py --help lists the flags")
    add = p.add_argument
    add("--llama", default="out/base", help="raw Llama folder to make smaller")
    add("--budget", type=float, default=0.8, help="fraction of its non-embedding parameters")
    add("--data", default="data/pystdlib", help="folder of shards: train to search and calibrate, val to report")
    add("--out", help="folder to write (default: out/search-0.80 beside --llama)")
    add("--generations", type=int, default=12, help="the paper: 50")
    add("--population", type=int, default=40, help="candidates per generation (the paper: 100)")
    add("--reform", action=argparse.BooleanOptionalAction, default=True, help="least squares on wo and w2 at the end")
    add("--uniform", action="store_true", help="one size for all layers")
    add("--fitness-windows", type=int, default=16, help="training windows that rank candidates")
    add("--calibration-windows", type=int, default=128, help="others, for score and reformation (the paper: 128)")
    add("--report-windows", type=int, default=128, help="validation windows of the table at the end")
    add("--seq-len", type=int, help="tokens per window (default: the model's context, 2048 at most, as in the paper)")
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="go on after the last whole generation of a search that was killed")
    args = p.parse_args(argv)
    for flag in ("generations", "population", "fitness_windows", "calibration_windows", "report_windows", "seq_len"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)} found; expected 1 or more")
    source = Path(args.llama) if Path(args.llama).name not in ("", "..") else Path(args.llama).resolve()
    args.out = args.out or str(source.with_name(f"search-{args.budget:.2f}"))
    return args


def fingerprint(model: Llama, data) -> str:
    """Has the Llama or the text changed since? Trained norms are no other Llama's."""
    norms = torch.cat([p.detach().float().cpu() for name, p in model.named_parameters() if "norm" in name])
    text = b"".join(path.read_bytes()[:4096] for path in sorted(Path(data).glob("train_*.bin")))
    return hashlib.blake2b(norms.numpy().tobytes() + text, digest_size=8).hexdigest()


def main(argv=None) -> None:
    """A Llama folder in, a smaller one out."""
    args = parse_args(argv)
    if WORLD > 1:
        fail(f"{WORLD} processes found; search.py runs in one: start it with python, not torchrun")
    out, source, config = Path(args.out), Path(args.llama), read_config(args.llama)
    if not all(isinstance(getattr(config, axis), int) for axis in ("n_heads", "n_kv_heads", "ffn_dim")):
        fail(f"{source} has another shape in every layer already; expected a uniform Llama, such as its source")
    check_budget(config, args.budget)
    if out.resolve() == source.resolve() or any((out / f).exists() for f in (PARAMS, WEIGHTS)) and not (
            out / RESUME).exists():
        fail(f"{out} holds a Llama that is not from an earlier search; choose another --out")
    own, theirs = source / TOKENIZER, Path(args.data) / TOKENIZER
    if own.is_file() and theirs.is_file() and own.read_bytes() != theirs.read_bytes():
        fail(f"{args.data} was made with another tokenizer than {own}; name the model's own data with --data")
    windows = disjoint_windows(args.data, args.seq_len or min(config.context, 2048), config.vocab_size, args.seed,
                               args.fitness_windows, args.calibration_windows, args.report_windows)
    device = device_of(args.device)
    torch.set_float32_matmul_precision("highest")  # Grams in TF32 would have 10 bits
    model = load_llama(source, device, dtype=None).requires_grad_(False)
    settings = {k: v for k, v in vars(args).items() if k not in ("resume", "out", "device", "report_windows")}
    settings["fingerprint"] = fingerprint(model, args.data)
    state = resume_state(out, settings, args.generations, args.resume)
    try:
        small = search(model, windows, args, settings, state)
        save_llama(out, small.config, small.state_dict(), own)
    except OSError as error:
        fail(f"{out} could not be written ({error.strerror or error}); make room, and go on with --resume")
    say(f"\nNext:  python eval.py --model {out}\n       python sample.py --model {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; every whole generation is kept: go on with --resume")
