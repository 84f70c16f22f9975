"""
What did training add? The loss of every budget's slice before it: cut from the sorted base, with no
training at all.

    python -m bench.before --model out/flex --base out/base
    python -m bench.before --budgets 1.0 0.8 0.6 0.4 --json

The slices are those that the trained router picks, and the held-out windows are those of the
family's own table.
"""
import json

from bench.alone import open_with_base
from data.shards import Shards
from eval import evaluate, sizes_of
from plumbing.errors import Parser, run_main


def losses_before(family, base, val, budgets: list[float]) -> list[dict]:
    """A row per budget: its slice, and the loss of that slice of the sorted base. val: windows (x,
    y), each (n, T)."""
    rows = []
    for budget in budgets:
        subnet = family.router.route(budget)
        row = dict(budget=budget) | sizes_of(base, subnet)
        row["loss"] = evaluate(base, val, subnet)[0]
        row["tokens"] = val[1].numel()
        rows.append(row)
    return rows


def main(argv=None) -> None:
    """Prints a line per budget, with --json one JSON object instead."""
    p = Parser("python -m bench.before", __doc__)
    p.add_argument("--model", default="out/flex", help="a family, with its resume.pt")
    p.add_argument("--base", default="out/base", help="the Llama that it was trained from")
    p.add_argument("--budgets", type=float, nargs="+", help="default: those of train.py's table")
    p.add_argument("--data", help="folder of shards, its val split (default: the one trained on)")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = p.parse_args(argv)
    family, base = open_with_base(args.model, args.base)
    saved = family.saved
    shards = Shards(args.data or saved["data"], "val", saved["seq_len"], base.config.vocab_size)
    val = shards.windows(saved["eval_windows"])
    rows = losses_before(family, base, val, args.budgets or family.default_budgets())
    if args.json:
        print(json.dumps(dict(model=str(args.model), context=saved["seq_len"], rows=rows)))
        return
    print(f"{'budget':>6} {'got':>6} {'loss':>7}   "
          f"(before training; nats on {val[1].numel():,} held-out tokens)")
    for row in rows:
        print(f"{row['budget']:6.2f} {row['got']:6.3f} {row['loss']:7.3f}")


if __name__ == "__main__":
    run_main(main)
