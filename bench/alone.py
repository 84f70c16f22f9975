"""
The starting points of models that train alone: what a family is compared with.

    python tests/alone.py --model out/flex --base out/base --out out/alone

For every trained budget of the family in --model, two plain Llamas of the very shape that its router chose:
    OUT/cut-0.60        the slice of the sorted, untrained base
    OUT/scratch-0.60    the same shape with fresh weights
Each then trains by itself:  python train.py --llama OUT/cut-0.60 --budgets 1.0 ...
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.checkpoint import RESUME, TOKENIZER, load_llama, load_tensors, save_llama
from plumbing.files import new_folder
from export import OURS, fold  # noqa: E402
from importance import sort_  # noqa: E402
from model import Llama  # noqa: E402
from router import FLEX, load_router  # noqa: E402
from plumbing.errors import fail


def main(argv=None) -> None:
    """Writes two folders per trained budget."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python tests/alone.py --help lists the flags")
    p.add_argument("--model", default="out/flex", help="a family, with its resume.pt")
    p.add_argument("--base", default="out/base", help="the Llama that it was trained from")
    p.add_argument("--out", default="out/alone")
    p.add_argument("--seed", type=int, default=0, help="of the fresh weights")
    args = p.parse_args(argv)
    base, tokenizer = load_llama(args.base), Path(args.base) / TOKENIZER
    router = load_router(args.model, base.config)
    if router is None or not (Path(args.model) / RESUME).exists():
        fail(f"{args.model} has no {FLEX} or no {RESUME}; expected a family as train.py leaves it")
    sort_(base, load_tensors(Path(args.model) / RESUME)["orders"])
    for budget in router.budgets:
        subnet = router.route(budget)
        config = subnet.config(base.config)
        fresh = fold(model := Llama(config).init_weights(args.seed), model.full, None)
        for kind, state in (("cut", fold(base, subnet, None)), ("scratch", fresh)):
            out = Path(args.out) / f"{kind}-{budget:.2f}"
            with new_folder(out, may_replace=OURS["llama"]) as temporary:
                save_llama(temporary, config, state, tokenizer)
            print(f"{out}: dim {subnet.dim}, heads {subnet.n_heads[0]}, ffn {subnet.ffn_dim[0]}, "
                  f"layers {subnet.layers}")


if __name__ == "__main__":
    main()
