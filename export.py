"""
Writes the slice a budget buys as a plain Llama folder: no router, no modulation, no trace of the supernet.

    python export.py --budget 0.5                    out/flex -> out/flex-0.50
    python export.py --budget 0.5 --model out/flex-8b --out Llama-3.1-half --dtype bfloat16

What there is to do after training: ask the router for the SubNet, cut its prefix out of every tensor, and multiply the
modulation's factors into the rows of wo and w2 (a factor on a linear layer's output is a factor on its weight).
The result is what the supernet computes at that budget, and a raw Llama folder like the one training started from.
"""
import argparse
from pathlib import Path

import torch

from checkpoint import PARAMS, RESUME, TOKENIZER, WEIGHTS, load_llama, new_folder, save_llama
from model import Llama, LlamaConfig, SubNet
from router import load_router
from space import cost, n_params
from tokenizer import fail

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fold(model: Llama, subnet: SubNet, factors: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> dict:
    """State dict of the slice as a Llama of its own, factors (n_layers, 2) multiplied into wo and w2 in fp32 and
    rounded to dtype once."""
    state = {name: w.detach().float() for name, w in model.slices(subnet).items()}
    if factors is not None:
        for new, old in enumerate(subnet.layers):
            for which, name in enumerate(("attention.wo", "feed_forward.w2")):
                key = f"layers.{new}.{name}.weight"
                state[key] = state[key] * factors[old, which]
    return {name: w.to(dtype) for name, w in state.items()}


def export(folder, budget: float, out=None, dtype: torch.dtype = torch.float32) -> tuple[Path, SubNet, LlamaConfig]:
    """Writes the slice of the supernet in `folder` at `budget` into `out` (default: folder-0.50). Returns where, the
    slice, and the shape it was cut from."""
    model = load_llama(folder)
    router = load_router(folder, model.config)
    if router is None:
        fail(f"{folder} is a plain Llama, it has no flex.pt; expected a folder made by train.py; "
             f"python train.py --llama {folder} makes one")
    subnet, factors = router.deploy(budget)
    out = Path(out or f"{Path(folder)}-{f'{budget:.2f}' if budget == round(budget, 2) else f'{budget:g}'}")
    if (out / RESUME).exists() or ((out / PARAMS).exists() and '"ffn_dim"' not in (out / PARAMS).read_text()):
        fail(f"{out} is a training run or a Llama from elsewhere; expected a new folder or an earlier export; choose "
             "another --out")
    with new_folder(out, may_replace={PARAMS, WEIGHTS, TOKENIZER}) as temporary:
        state = fold(model, subnet, factors, dtype)
        save_llama(temporary, subnet.config(model.config), state, Path(folder) / TOKENIZER)
    return out, subnet, model.config


def main(argv=None) -> None:
    """Exports one budget and says what it got."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python export.py --help lists the flags")
    p.add_argument("--budget", type=float, required=True, help="fraction of the full model's non-embedding parameters")
    p.add_argument("--model", default="out/flex", help="folder of a supernet")
    p.add_argument("--out", help="folder to write (default: the model's name and the budget)")
    p.add_argument("--format", choices=["llama"], default="llama", help="raw Llama folder, Meta's layout")
    p.add_argument("--dtype", choices=list(DTYPES), default="float32")
    args = p.parse_args(argv)
    out, subnet, full = export(args.model, args.budget, args.out, DTYPES[args.dtype])
    got, total = n_params(full, subnet), sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: dim {subnet.dim}, {subnet.n_heads[0]} heads of {full.head_dim}, ffn {subnet.ffn_dim[0]}, layers "
          f"{len(subnet.layers)} of {full.n_layers} ({' '.join(map(str, subnet.layers))})\n"
          f"asked {args.budget:.3f}, got {cost(full, subnet):.3f} of the non-embedding parameters: {got:,}\n"
          f"{n_params(full, subnet, embeddings=True):,} parameters with embeddings, {total:,} bytes")


if __name__ == "__main__":
    main()
