"""
The starting points of models that train alone: what a family is compared with.

    python -m bench.alone --model out/flex --base out/base --out out/alone

For every trained budget of the family in --model, two plain Llamas of the very shape that its
router chose:
    OUT/cut-0.60        the slice of the base, sorted and not trained further
    OUT/scratch-0.60    the same shape with fresh weights
Each then trains by itself:  python train.py --llama OUT/cut-0.60 --budgets 1.0 ...
"""
from pathlib import Path

from export import fold
from importance import sort_
from model import Llama, LlamaConfig
from plumbing.checkpoint import (LLAMA_FILES, RESUME, TOKENIZER, load_llama, load_tensors,
                                 save_llama)
from plumbing.errors import Parser, fail, run_main
from plumbing.family import FLEX, Family, open_family
from plumbing.files import new_folder


def open_with_base(folder, base_folder) -> tuple[Family, Llama]:
    """A family, and the base that it was trained from with its units sorted as they were before the
    first step."""
    family = open_family(folder)
    resume = Path(folder) / RESUME
    if family.router is None or not resume.exists():
        fail(f"{folder} has no {FLEX} or no {RESUME}; expected a family as train.py leaves it")
    base = load_llama(base_folder)
    if base.full != family.model.full:
        fail(f"{base_folder} has another shape than {folder}; expected the Llama that {folder} was "
             "trained from; name it with --base")
    sort_(base, load_tensors(resume)["orders"])
    return family, base


def write(out: Path, config: LlamaConfig, state: dict, tokenizer: Path) -> None:
    """A plain Llama's folder, in place of an earlier one."""
    with new_folder(out, may_replace=LLAMA_FILES) as temporary:
        save_llama(temporary, config, state, tokenizer)
    print(f"{out}: dim {config.dim}, heads {config.n_heads}, ffn {config.ffn_dim}, "
          f"layers {config.n_layers}")


def main(argv=None) -> None:
    """Writes two folders per trained budget."""
    p = Parser("python -m bench.alone", __doc__)
    p.add_argument("--model", default="out/flex", help="a family, with its resume.pt")
    p.add_argument("--base", default="out/base", help="the Llama that it was trained from")
    p.add_argument("--out", default="out/alone")
    p.add_argument("--seed", type=int, default=0, help="of the fresh weights")
    args = p.parse_args(argv)
    family, base = open_with_base(args.model, args.base)
    tokenizer = Path(args.base) / TOKENIZER
    for budget in family.router.budgets:
        subnet = family.router.route(budget)
        config = subnet.config(base.config)
        fresh = Llama(config).init_weights(args.seed)
        write(Path(args.out) / f"cut-{budget:.2f}", config, fold(base, subnet), tokenizer)
        write(Path(args.out) / f"scratch-{budget:.2f}", config, fold(fresh, fresh.full), tokenizer)


if __name__ == "__main__":
    run_main(main)
