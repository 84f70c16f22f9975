"""
Writes the slice a budget buys as a plain Llama folder: no router, no modulation, no trace of the
supernet.

    python export.py --budget 0.5                    out/flex -> out/flex-0.50, in Meta's layout
    python export.py --budget 0.5 --format hf        for transformers, vLLM, lm-eval
    python export.py --budget 0.5 --format gguf      one file, for llama.cpp and Ollama
    python export.py --memory 6GB --context 8192     the best slice whose weights and KV cache fit
    python export.py --latency 0.6                   0.6 of the full model's time, measured here
    python export.py --budget 0.8 0.6 0.4 --dry-run  the sizes, and nothing written

There are four things to do after training:

    route    ask the router for the SubNet                             plumbing/family.py
    cut      take its corner out of every tensor                       model.py: slices
    fold     multiply the modulation's factors into wo and w2          below: folded
    write    a folder or a file that appears all at once               plumbing/

The result computes what the supernet computes at that budget. In Meta's layout it is a folder like
the one that training began with.
"""
import argparse
from pathlib import Path
from typing import Iterator

import torch

from model import Llama, SubNet
from plumbing import gguf, hf
from plumbing.checkpoint import LLAMA_FILES, TOKENIZER, check_target, matrix_dtype, save_llama
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import Family, Member, open_family, open_to_cut
from plumbing.files import new_folder, nothing_half_written
from plumbing.sizes import (
    asked_of,
    budgets_asked,
    default_folder,
    note_readers,
    report,
    sizes_table,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "q8_0": gguf.Q8_0}
FILES = {"llama": LLAMA_FILES, "hf": hf.FILES}  # what an earlier export of a format holds

# -----------------------------------------------------------------------------
# cut, fold, write; plumbing/family.py routes


def folded(model: Llama, subnet: SubNet, factors=None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the slice as a Llama of its own, one by one. Some are views of the model.

    factors: (n_layers, 2) of the modulation, for attention and MLP of every layer. A factor on the
    output of a linear layer is a factor on its weight, so it goes into wo and w2, in fp32."""
    scale = {}
    if factors is not None:
        for new, old in enumerate(subnet.layers):
            scale[f"layers.{new}.attention.wo.weight"] = factors[old, 0]
            scale[f"layers.{new}.feed_forward.w2.weight"] = factors[old, 1]
    for name, view in model.slices(subnet).items():
        if model.config.tied and name == "output.weight":
            continue
        weight = view.detach()
        if name in scale:
            weight = weight.float() * scale[name]
        yield name, weight


def fold(model: Llama, subnet: SubNet, factors=None,
         dtype=torch.float32) -> dict[str, torch.Tensor]:
    """State dict of the slice as a Llama of its own: folded(), rounded to dtype once."""
    state = {}
    for name, weight in folded(model, subnet, factors):
        # A view would drag the whole tensor that it was cut from into the file: copy it.
        state[name] = weight.to(dtype).clone(memory_format=torch.contiguous_format)
    if model.config.tied:
        state["output.weight"] = state["tok_embeddings.weight"]  # one tensor under two names
    return state


def export(family: Family, member: Member, out: Path, dtype: torch.dtype, format="llama",
           chat_template: str | None = None) -> None:
    """Writes a member to `out`, a folder or, for gguf, a file, whole or not at all. dtype: torch's,
    or gguf.Q8_0. chat_template: in place of the tokenizer's own. OSError: the disk is full."""
    config = member.subnet.config(family.model.config)
    tokenizer = family.folder / TOKENIZER
    weights = folded(family.model, member.subnet, member.factors)
    if format == "gguf":
        encoding = gguf.check(config, tokenizer, out)
        encoding = hf.with_template(encoding, chat_template)
        gguf.save_gguf(out, config, weights, dtype, encoding)
        return
    check_target(out, family.folder)
    if format == "hf":
        encoding = hf.check(config, tokenizer, out)
        encoding = hf.with_template(encoding, chat_template)
    rounded = ((name, weight.to(dtype)) for name, weight in weights)
    with new_folder(out, may_replace=FILES[format]) as temporary:
        if format == "hf":
            hf.save_hf(temporary, config, rounded, dtype, encoding)
        else:
            save_llama(temporary, config, rounded, tokenizer)


# -----------------------------------------------------------------------------
# the command line


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python export.py", __doc__)
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budget", type=float, nargs="+",
                     help="fractions of the full model's non-embedding parameters")
    ask.add_argument("--latency", type=float, nargs="+",
                     help="instead: fractions of the full model's time, by latency.json; without "
                     "one, the CPU's (for a GPU, python -m bench.latency --device cuda first)")
    ask.add_argument("--params", help="instead: at most so many parameters, embeddings included: 4.0B")
    ask.add_argument("--memory", help="instead: at most so much for weights and KV cache: 6GB")
    p.add_argument("--context", type=int, help="tokens in the KV cache (default: the window)")
    p.add_argument("--model", default="out/flex", help="a supernet, or a plain Llama to convert")
    p.add_argument("--out", help="folder or .gguf to write (default: the model's name and the budget)")
    p.add_argument("--format", choices=[*FILES, "gguf"], default="llama",
                   help="Meta's layout, Hugging Face's, or llama.cpp's one file")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: the supernet's; q8_0: gguf only")
    p.add_argument("--chat-template", help="file with a Jinja template of chats, for hf and gguf "
                   "(default: the tokenizer's own, if it has one)")
    p.add_argument("--dry-run", action="store_true", help="print the sizes, write nothing")
    args = p.parse_args(argv)
    check_at_least_one(args, "context")
    if args.dtype == gguf.Q8_0 and args.format != "gguf":
        fail(f"--dtype {gguf.Q8_0} found with --format {args.format}; it goes with --format gguf")
    if args.chat_template and args.format == "llama":
        fail("--chat-template found with --format llama, which has no place for it; use --format hf or gguf")
    return args


def main(argv=None) -> None:
    """Exports the budgets asked for and says what they got."""
    args = parse_args(argv)
    # In the file's dtype until weights are folded. To measure times, all of it must run.
    family = open_family(args.model, dtype=None) if args.latency else open_to_cut(args.model)
    full = family.model.config
    template = hf.read_template(args.chat_template) if args.chat_template else None
    dtype = DTYPES.get(args.dtype, matrix_dtype(family.model))
    context = args.context or full.context
    budgets, unit = budgets_asked(family, args, dtype, context)
    # All are routed before anything is written: a budget that cannot be had stops here.
    members = [family.slice_member(budget, unit) for budget in budgets]
    if args.dry_run:
        subnets = [member.subnet for member in members]
        trained = family.trained_budgets(unit)
        print(sizes_table(full, budgets, subnets, dtype, context, trained))
        return
    if args.out and len(budgets) > 1:
        fail(f"--out {args.out} is one place for {len(budgets)} budgets; leave --out out: each "
             "gets one of its own")
    for budget, member in zip(budgets, members):
        out = Path(args.out or default_folder(args.model, budget, unit, args.format))
        with nothing_half_written(f"the export at budget {budget:g}"):
            export(family, member, out, dtype, args.format, template)
        asked = asked_of(family, budget, member.subnet, unit)
        print(report(out, full, member.subnet, asked, dtype))
        if args.format == "llama":
            note_readers(full, member.subnet)


if __name__ == "__main__":
    run_main(main)
