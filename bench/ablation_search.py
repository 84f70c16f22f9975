"""
What each half of search.py is worth: the table that the paper lacks.

    python tests/ablation_search.py                        out/base at .9 to .5, three seeds; half an hour on one core
    python tests/ablation_search.py --supernet out/flex    the trained family's losses at these budgets too, for scale

Rows, each a loss on held-out text that neither search nor calibration saw:

    random units       the sizes of `top units`, which heads and neurons drawn at random
    top units          the best ones by score, the same ratio in all layers: where the search starts
    search             evolution alone          reformation     of `top units`, no search
    search + ref.      both: what search.py does

Seeds draw the random units, the evolution, and the training windows for fitness and calibration; the report text is
one. A row without randomness of its own (top units, reformation) varies with the windows alone.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import search.__main__ as search
from search.candidates import Bounds, slim
from plumbing.checkpoint import load_llama
from search.reform import reform_, unit_scores
from router import load_router  # noqa: E402
from space import cost, random_generator  # noqa: E402
from eval import evaluate

ROWS = ("random units", "top units", "search", "reformation", "search + ref.")


def losses(model, budget: float, seed: int, args) -> tuple[dict[str, float], list[float], dict]:
    """(loss per row, costs of what was measured, what was spent) of one budget and seed."""
    context = args.seq_len or min(model.config.context, 2048)
    fitness, calibration, report = search.disjoint_windows(
        args.data, context, model.config.vocab_size, seed, args.fitness_windows, args.calibration_windows,
        args.report_windows)
    batch, began = max(1, 4096 // context), time.process_time()
    bounds = Bounds.of(model, budget, unit_scores(model, calibration, batch))
    start = bounds.start()
    state = search.evolve(model, bounds, fitness, args.generations, args.population, seed)
    found, loss = state["parents"][0][1], {}
    seconds = time.process_time() - began
    random = bounds.scrambled(start, random_generator(seed, "random units"))
    for name, candidate, ref in (("random units", random, None), ("top units", start, "reformation"),
                                 ("search", found, "search + ref.")):
        small = slim(model, candidate)
        loss[name] = evaluate(small, report)[0]
        if ref:
            began = time.process_time()
            reform_(small, model, candidate.subnet(model.config).layers, calibration, batch)
            seconds += (time.process_time() - began) * (name == "search")
            loss[ref] = evaluate(small, report)[0]
    spent = dict(candidates=len(state["losses"]), seconds=seconds, layers=int(found.layers.sum()))
    return loss, [cost(model.config, c.subnet(model.config)) for c in (start, found)], spent


def main(argv=None) -> None:
    """Prints a table, losses as mean and (smallest to largest) over the seeds."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--llama", default="out/base")
    p.add_argument("--supernet", help="folder of a trained supernet: a row of its losses at the same budgets")
    p.add_argument("--data", default="data/pystdlib")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for flag, default in (("generations", 8), ("population", 40), ("fitness-windows", 16),
                          ("calibration-windows", 128), ("report-windows", 128)):
        p.add_argument(f"--{flag}", type=int, default=default)
    p.add_argument("--seq-len", type=int)
    args = p.parse_args(argv)
    model = load_llama(args.llama).requires_grad_(False)
    supernet = None if args.supernet is None else load_llama(args.supernet).requires_grad_(False)
    router = None if supernet is None else load_router(args.supernet, supernet.config)
    report = search.disjoint_windows(args.data, args.seq_len or min(model.config.context, 2048),
                                     model.config.vocab_size, 0, 1, 1, args.report_windows)[2]
    evaluate(model, report)  # warm
    began, dense = time.process_time(), evaluate(model, report)[0]
    ms = 1000 * (time.process_time() - began) / len(report[0])
    print(f"dense {dense:.4f} on {report[1].numel():,} held-out tokens, {ms:.2f} CPU ms a window | {args.generations} "
          f"generations of {args.population}, {args.fitness_windows} fitness windows, {args.calibration_windows} for "
          f"calibration, seeds {args.seeds}")
    print(" | ".join(("budget", *ROWS, "supernet (its cost)", "costs", "candidates, layers, CPU s of each search")))
    for budget in args.budgets:
        got = [losses(model, budget, seed, args) for seed in args.seeds]
        cells = []
        for row in ROWS:
            values = [loss[row] for loss, _, _ in got]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        trained = "-"
        if router:
            subnet, factors = router.deploy(budget)
            trained = f"{evaluate(supernet, report, subnet, factors)[0]:.3f} ({cost(supernet.config, subnet):.3f})"
        costs = [c for _, both, _ in got for c in both]
        spent = [f"{s['candidates']}, {s['layers']}, {s['seconds']:.0f}" for _, _, s in got]
        cells += [trained, f"{min(costs):.4f} to {max(costs):.4f}", "; ".join(spent)]
        print(f"{budget:.2f} | " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
