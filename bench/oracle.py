"""
How good is the router's choice? With the weights frozen, every member of F(b) can be evaluated: the oracle.

    python train.py --freeze-backbone --out out/frozen     trains the router alone, on the sorted base
    python tests/oracle.py --model out/frozen              ranks its choice among all members of F(b), by held-out loss

Prints for each trained budget the rank of route(b), the losses of the best member, of the choice, of a uniform shrink,
and the mean and worst of F(b). Works on a trained supernet too (there the weights favour what was trained).
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.checkpoint import load_llama, load_tensors
from data.shards import Shards  # noqa: E402
from router import FLEX, load_router  # noqa: E402
from eval import evaluate


def oracle(folder, data, windows: int = 128) -> list[dict]:
    """A row per trained budget under 1, with every member of F(b) evaluated without modulation."""
    model = load_llama(folder)
    router, flex = load_router(folder, model.config), load_tensors(Path(folder) / FLEX)
    val = Shards(data, "val", flex["seq_len"], model.config.vocab_size).windows(windows)
    rows = []
    for budget in sorted(b for b in flex["budgets"] if b < 1):
        members = [router.space.subnet(router.space.members[m]) for m in router.space.feasible(budget)]
        losses = {subnet: evaluate(model, val, subnet)[0] for subnet in members}
        ranking = sorted(members, key=losses.get)
        choice = router.route(budget)
        rows.append(dict(budget=budget, members=len(members), rank=ranking.index(choice) + 1, choice=losses[choice],
                         best=losses[ranking[0]], uniform=losses[router.space.uniform(budget)],
                         mean=sum(losses.values()) / len(losses), worst=losses[ranking[-1]],
                         sizes=router.space.sizes(choice), best_sizes=router.space.sizes(ranking[0]),
                         ranking=[(router.space.sizes(s), round(losses[s], 3)) for s in ranking]))
    return rows


def main(argv=None) -> None:
    """Prints one JSON object per budget."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="out/frozen")
    p.add_argument("--data", default="data/pystdlib")
    p.add_argument("--windows", type=int, default=128)
    p.add_argument("--all", action="store_true", help="print every member, best first")
    args = p.parse_args(argv)
    for row in oracle(args.model, args.data, args.windows):
        ranking = row.pop("ranking")
        print(json.dumps(row))
        for i, (sizes, loss) in enumerate(ranking if args.all else ()):
            dim, heads, ffn, layers = sizes
            print(f"{row['budget']:.2f} {i + 1:3d} {loss:.3f} dim {dim} heads {heads} ffn {ffn} layers {layers}")


if __name__ == "__main__":
    main()
