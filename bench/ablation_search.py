"""
What is each half of `python -m search` worth? This is the table that the paper lacks.

    python -m bench.ablation_search                        out/base at .9 to .5, three seeds
    python -m bench.ablation_search --supernet out/flex    the trained family beside it, for scale

It takes half an hour on one core. Columns, each a loss on held-out text that neither search nor
calibration saw:

    random units     the sizes of `top units`; which heads and neurons is drawn at random
    top units        the best ones by score, the same ratio in all layers: where the search starts
    search           evolution alone
    reformation      of `top units`, no search
    search + ref.    both: what `python -m search` does

Seeds draw the random units, the evolution, and the training windows for fitness and calibration.
The report text is one. A column without randomness of its own (top units, reformation) varies with the
windows alone. search/README.md has the numbers.
"""
import argparse
import statistics
import time

from eval import evaluate
from model import Llama
from plumbing.checkpoint import load_llama
from plumbing.errors import Parser, check_at_least_one, run_main
from plumbing.family import open_family
from search.candidates import Bounds, Candidate, cut_out
from search.evolution import disjoint_windows, evolve
from search.reform import reform_, unit_scores
from space import cost, random_generator

COLUMNS = ("random units", "top units", "search", "reformation", "search + ref.")

# -----------------------------------------------------------------------------
# one budget, one seed


def before_and_after(model: Llama, c: Candidate, calibration, report, batch: int):
    """(loss as cut out, loss reformed, CPU seconds of the reformation)."""
    layers = c.subnet(model.config).layers
    small = cut_out(model, c)
    raw, _ = evaluate(small, report)
    began = time.process_time()
    reform_(small, model, layers, calibration, batch)
    seconds = time.process_time() - began
    reformed, _ = evaluate(small, report)
    return raw, reformed, seconds


def measure(model: Llama, budget: float, seed: int, args) -> dict:
    """loss: by column. costs: of the start and of what was found. What the search took."""
    config = model.config
    fitness, calibration, report = disjoint_windows(args, config, seed)
    batch = max(1, 4096 // calibration.size(1))

    # search
    began = time.process_time()
    scores = unit_scores(model, calibration, batch)
    bounds = Bounds.from_scores(config, budget, scores)
    state = evolve(model, bounds, fitness, args.generations, args.population, seed)
    seconds = time.process_time() - began

    # three candidates
    start = bounds.start()
    rng = random_generator(seed, "random units")
    random = bounds.scrambled(start, rng)
    _, found = state["parents"][0]

    # their losses
    loss = {}
    loss["random units"], _ = evaluate(cut_out(model, random), report)
    raw, reformed, _ = before_and_after(model, start, calibration, report, batch)
    loss["top units"] = raw
    loss["reformation"] = reformed
    raw, reformed, more = before_and_after(model, found, calibration, report, batch)
    loss["search"] = raw
    loss["search + ref."] = reformed

    return dict(
        loss=loss,
        costs=[cost(config, c.subnet(config)) for c in (start, found)],
        candidates=len(state["losses"]),
        layers=found.layers.sum().item(),
        seconds=seconds + more,
    )


# -----------------------------------------------------------------------------
# the table


def parse_args(argv=None) -> argparse.Namespace:
    """The command line."""
    p = Parser("python -m bench.ablation_search", __doc__)
    add = p.add_argument
    add("--llama", default="out/base", help="raw Llama folder to make smaller")
    add("--supernet", help="folder of a trained supernet: a column of its losses")
    add("--data", default="data/pystdlib", help="folder of shards")
    add("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--generations", type=int, default=8)
    add("--population", type=int, default=40, help="candidates per generation")
    add("--fitness-windows", type=int, default=16, help="training windows that rank candidates")
    add("--calibration-windows", type=int, default=128, help="others, for score and reformation")
    add("--report-windows", type=int, default=128, help="validation windows, of all losses")
    add("--seq-len", type=int, help="tokens per window (default: the context, 2048 at most)")
    args = p.parse_args(argv)
    check_at_least_one(args, "generations", "population", "fitness_windows", "calibration_windows",
                       "report_windows", "seq_len")
    return args


def cells(results: list[dict], trained: str) -> list[str]:
    """A row of the table: mean and (smallest to largest) over the seeds."""
    row = []
    for column in COLUMNS:
        values = [result["loss"][column] for result in results]
        row.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    costs = []
    spent = []
    for result in results:
        costs += result["costs"]
        spent.append(f"{result['candidates']}, {result['layers']}, {result['seconds']:.0f}")
    row.append(trained)
    row.append(f"{min(costs):.4f} to {max(costs):.4f}")
    row.append("; ".join(spent))
    return row


def main(argv=None) -> None:
    """Prints the table, a row per budget."""
    args = parse_args(argv)
    model = load_llama(args.llama).requires_grad_(False)
    family = open_family(args.supernet) if args.supernet else None
    _, _, report = disjoint_windows(args, model.config, seed=0)  # the same at every seed

    # the dense model, and its time
    evaluate(model, report)                                  # warm
    began = time.process_time()
    dense, _ = evaluate(model, report)
    seconds = time.process_time() - began
    n_windows, T = report[0].shape
    ms = 1000 * seconds / n_windows
    print(f"dense {dense:.4f} on {n_windows * T:,} held-out tokens, {ms:.2f} CPU ms a window | "
          f"{args.generations} generations of {args.population}, {args.fitness_windows} fitness "
          f"windows, {args.calibration_windows} for calibration, seeds {args.seeds}")

    # the table
    more = ("supernet (its cost)", "costs", "candidates, layers, CPU s of each search")
    print(" | ".join(("budget", *COLUMNS, *more)))
    for budget in args.budgets:
        results = [measure(model, budget, seed, args) for seed in args.seeds]
        trained = "-"
        if family:
            member = family.member(budget)
            loss, _ = evaluate(member.model, report, member.subnet, member.factors)
            got = cost(family.model.config, member.subnet)
            trained = f"{loss:.3f} ({got:.3f})"
        row = cells(results, trained)
        print(f"{budget:.2f} | " + " | ".join(row), flush=True)


if __name__ == "__main__":
    run_main(main)
