"""
How good is the router's choice? With the weights frozen, every member of F(b) can be evaluated: the
oracle.

    python train.py --llama out/base --freeze-backbone --out out/frozen     the router alone learns
    python -m bench.oracle --model out/frozen                               ranks its choice

Prints for each trained budget the rank of route(b) by held-out loss, and the losses of the choice,
of the best member, of a uniform shrink, and the mean and worst of F(b). Works on a trained family
too; there the weights favour what was trained.
"""
import json

from data.shards import Shards
from eval import evaluate
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import FLEX, open_family


def oracle(folder, data, windows: int = 128) -> list[dict]:
    """A row per trained budget under 1. Every member of F(b) is evaluated without modulation, on
    `windows` windows of the val split of `data`. "ranking" lists all members, best first: [(sizes,
    loss), ...]."""
    family = open_family(folder)
    model = family.model
    router = family.router
    if router is None:
        fail(f"{folder} has no {FLEX}; expected a family as train.py leaves it")
    space = router.space
    val = Shards(data, "val", family.saved["seq_len"], model.config.vocab_size).windows(windows)

    rows = []
    for budget in sorted(b for b in router.budgets if b < 1):
        # Every member of F(b), by loss.
        members = [space.subnet(space.members[m]) for m in space.feasible(budget)]
        losses = {subnet: evaluate(model, val, subnet)[0] for subnet in members}
        ranking = sorted(members, key=losses.get)

        # The router's choice among them.
        choice = router.route(budget)
        best = ranking[0]
        worst = ranking[-1]
        every = [(space.sizes(subnet), round(losses[subnet], 3)) for subnet in ranking]
        rows.append(dict(
            budget=budget,
            members=len(members),
            rank=ranking.index(choice) + 1,
            choice=losses[choice],
            best=losses[best],
            uniform=losses[space.uniform(budget)],
            mean=sum(losses.values()) / len(losses),
            worst=losses[worst],
            sizes=space.sizes(choice),
            best_sizes=space.sizes(best),
            ranking=every))
    return rows


def main(argv=None) -> None:
    """Prints one JSON object per budget."""
    p = Parser("python -m bench.oracle", __doc__)
    p.add_argument("--model", default="out/frozen")
    p.add_argument("--data", default="data/pystdlib")
    p.add_argument("--windows", type=int, default=128)
    p.add_argument("--all", action="store_true", help="print every member, best first")
    args = p.parse_args(argv)
    check_at_least_one(args, "windows")
    for row in oracle(args.model, args.data, args.windows):
        ranking = row.pop("ranking")
        print(json.dumps(row))
        if args.all:
            for place, ((dim, heads, ffn, layers), loss) in enumerate(ranking, 1):
                print(f"{row['budget']:.2f} {place:3d} {loss:.3f} "
                      f"dim {dim} heads {heads} ffn {ffn} layers {layers}")


if __name__ == "__main__":
    run_main(main)
