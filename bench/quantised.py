"""
Is a smaller slice in more bits better than a larger one in fewer? Loss and bytes of every size in
every encoding.

    python -m bench.quantised --model out/flex-smollm2 --text book.txt --llama-quantize llama-quantize

Each slice becomes a GGUF file, as export.py writes it (f16, q8_0) or as llama.cpp's llama-quantize
makes it of the f16 (all others; its log says where a row does not fit and gets more bits). The file
is read back, and the loss is that of the weights as it holds them, in fp32. llama.cpp also rounds
what a layer reads, which is not in this figure.
"""
import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import torch

from data.heldout import text_windows
from data.llama import convert
from data.tokenizer import load_tokenizer
from eval import mean_loss, sizes_of
from export import export
from plumbing.checkpoint import TOKENIZER, load_llama
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import Family, Member, open_to_cut
from plumbing.gguf import Q8_0

OURS = {"f16": torch.float16, Q8_0: Q8_0}  # what export.py writes itself

# -----------------------------------------------------------------------------
# a file, and what it holds


def write_gguf(family: Family, budget: float, kind: str, folder: Path, quantize: str) -> Path:
    """The slice of a budget as a GGUF file of this kind."""
    member = family.slice_member(budget)
    path = folder / f"{kind}.gguf"
    if kind in OURS:
        export(family, member, path, OURS[kind], "gguf")
        return path
    half = folder / "f16.gguf"
    if not half.exists():
        export(family, member, half, torch.float16, "gguf")
    try:
        done = subprocess.run([quantize, half, path, kind.upper()], capture_output=True, text=True)
    except OSError as error:
        fail(f"--llama-quantize {quantize} does not start ({error.strerror}); "
             f"expected llama.cpp's program for {kind}; name it, or ask for --kinds {' '.join(OURS)}")
    if done.returncode or not path.exists():
        fail(f"{quantize} made no {kind} of {half.name}: {' '.join(done.stderr.split())[-200:]}; "
             "expected a kind that it lists")
    return path


def loss_of(path: Path, pairs) -> tuple[float, dict]:
    """The mean loss of a GGUF file's weights, and the sizes of its Llama."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        convert(path, Path(temporary) / "raw")
        model = load_llama(Path(temporary) / "raw")
    return mean_loss(Member(model, model.full), pairs, None)["loss"], sizes_of(model, model.full)


def measure(family: Family, budget: float, kinds: list[str], pairs, quantize: str) -> list[dict]:
    """A row per kind of one slice."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in kinds:
            path = write_gguf(family, budget, kind, Path(temporary), quantize)
            loss, sizes = loss_of(path, pairs)
            size = path.stat().st_size
            rows.append(dict(budget=budget, kind=kind, params=sizes["params"], bytes=size,
                             loss=round(loss, 5), bits=round(8 * size / sizes["params_total"], 2)))
    return rows


# -----------------------------------------------------------------------------
# the table


def smallest_first(rows: list[dict]) -> list[dict]:
    """Rows by bytes, each with best=True if nothing smaller, or as small, is as good."""
    rows = sorted(rows, key=lambda row: (row["bytes"], row["loss"]))
    best = math.inf
    for row in rows:
        row["best"] = row["loss"] < best
        best = min(best, row["loss"])
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, the smallest file first. In bold what nothing smaller beats."""
    lines = ["| MB | budget | encoding | bits a weight | loss |", "|---|---|---|---|---|"]
    for row in smallest_first(rows):
        mark = "**" if row["best"] else ""
        lines.append(f"| {row['bytes'] / 1e6:.1f} | {row['budget']:g} | {row['kind']} | {row['bits']:.2f} "
                     f"| {mark}{row['loss']:.3f}{mark} |")
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python -m bench.quantised", __doc__)
    p.add_argument("--model", default="out/flex", help="a family, or a plain Llama at 1.0")
    p.add_argument("--budgets", type=float, nargs="+",
                   help="(default: 1 .8 .6; of a plain Llama 1)")
    p.add_argument("--kinds", nargs="+", default=["f16", Q8_0, "q5_0", "q4_0"],
                   help="f16, q8_0, or what llama-quantize lists")
    p.add_argument("--llama-quantize", default="llama-quantize", help="llama.cpp's program")
    p.add_argument("--text", required=True, help="a text file to score")
    p.add_argument("--seq-len", type=int, default=1024, help="tokens per window")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = p.parse_args(argv)
    check_at_least_one(args, "seq_len")
    return args


def main(argv=None) -> None:
    """Prints the table."""
    args = parse_args(argv)
    family = open_to_cut(args.model)
    plain = family.router is None and family.flextron is None
    budgets = args.budgets or ([1.0] if plain else [1.0, 0.8, 0.6])
    for budget in budgets:
        family.slice_member(budget)  # what it cannot give is refused before anything is measured
    tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, family.model.config.vocab_size)
    pairs = text_windows(args.text, tokenizer, args.seq_len)
    rows = []
    for budget in budgets:
        rows += measure(family, budget, args.kinds, pairs, args.llama_quantize)
    print(table(rows))
    if args.json:
        print(json.dumps(dict(model=str(args.model), tokens=sum(y.numel() for _, y in pairs), rows=rows)))


if __name__ == "__main__":
    run_main(main, "nothing was written")
