"""
What slices weigh, and the budget that buys one of a given weight.

    python export.py --model out/flex --dry-run        a table of sizes
    python export.py --params 4.0B                     the largest slice under four billion parameters
    python export.py --memory 6GB --context 8192       the largest whose weights and KV cache fit

A budget counts parameters without embeddings (the paper's #Params). People have a number of
parameters in all, or a number of bytes. Both are found by asking the router at every thousandth.
"""
import argparse
import re
import sys
from pathlib import Path

from model import LlamaConfig, SubNet
from plumbing.errors import fail
from plumbing.family import FLEX, Family
from plumbing.gguf import Q8_0, tensor_bytes
from plumbing.hf import model_class
from plumbing.latency import LATENCY_FILE, load_latency
from plumbing.tables import legend, mark, spread
from space import cost, n_params

DRY_RUN_BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)

# -----------------------------------------------------------------------------
# what a slice weighs


def weight_bytes(config: LlamaConfig, subnet: SubNet, dtype) -> int:
    """Bytes of all weights of a slice, embeddings included. dtype: torch's, or q8_0, which not every
    matrix fits."""
    if dtype == Q8_0:
        return tensor_bytes(subnet.config(config), Q8_0)
    return n_params(config, subnet, embeddings=True) * dtype.itemsize


def cache_bytes(config: LlamaConfig, subnet: SubNet, dtype, context: int) -> int:
    """Bytes of the keys and values of `context` tokens, batch 1. dtype: theirs; with weights in
    q8_0 they are float16."""
    itemsize = 2 if dtype == Q8_0 else dtype.itemsize
    kv_heads = sum(subnet.config(config).per_layer("n_kv_heads"))
    return 2 * kv_heads * config.head_dim * context * itemsize


# -----------------------------------------------------------------------------
# who runs it well


def quantisations(shape: LlamaConfig) -> str:
    """llama.cpp's quantisations that all matrices of a shape fit, so that none falls back to
    another: "Q8_0" (Q4_0 too), "Q8_0,K" (the K-quants too), or "-".

    They cut every row into blocks, of 32 numbers or, for the K-quants, of 256. A row is as long as
    the width, the MLP, or all heads together."""
    rows = [shape.dim, *shape.per_layer("ffn_dim")]
    for n_heads in shape.per_layer("n_heads"):
        rows.append(n_heads * shape.head_dim)
    if all(row % 256 == 0 for row in rows):
        return "Q8_0,K"
    return "Q8_0" if all(row % 32 == 0 for row in rows) else "-"


def parallel_degrees(shape: LlamaConfig) -> str:
    """How many GPUs tensor parallelism can cut every layer into: those of 2, 4 and 8 that divide
    query heads, KV heads and neurons; "-" if none does."""
    to_share = []
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        to_share += shape.per_layer(name)
    degrees = [str(n) for n in (2, 4, 8) if all(size % n == 0 for size in to_share)]
    return ",".join(degrees) or "-"


def class_of_transformers(shape: LlamaConfig) -> str:
    """Llama or Mistral (plumbing/hf.py); "-" where layers differ, which neither can say."""
    if any(isinstance(getattr(shape, name), tuple) for name in ("n_heads", "n_kv_heads", "ffn_dim")):
        return "-"
    return model_class(shape).capitalize()


# -----------------------------------------------------------------------------
# from a weight to a budget


def amount(text: str) -> float:
    """4.0B -> 4e9; 6GB -> 6e9, 6GiB -> 6 * 2^30. Anything else: fail()."""
    found = re.fullmatch(r"([\d.]+) ?([KMGBT]?)(iB|B)?", text.strip(), re.I)
    try:
        unit = found[2].upper() or " "
        if unit == "B":  # billions are as many as gigas
            unit = "G"
        base = 1024 if (found[3] or "").lower() == "ib" else 1000
        return float(found[1]) * base ** " KMGT".index(unit)
    except (TypeError, ValueError):
        fail(f"{text} found; expected a number with a unit, such as --params 4.0B, or --memory 6GB or 6GiB")


def largest(family: Family, size, limit: float, what: str) -> float:
    """The budget whose slice is the largest with size(slice) <= limit; fail() if none is. what: the
    unit, for that."""
    router = family.router
    best = None
    smallest = None
    weights = {}  # many budgets buy the same slice
    for i in range(1000, 0, -1):
        budget = i / 1000
        if budget < router.space.costs.min():
            break
        subnet = router.route(budget)
        if subnet not in weights:
            weights[subnet] = size(subnet)
        weight = weights[subnet]
        smallest = weight if smallest is None else min(smallest, weight)
        share = cost(router.space.config, subnet)
        if weight <= limit and (best is None or share > best[0]):
            best = (share, budget)
    if best is None:
        fail(f"no sub-network fits into {limit:,.0f} {what}; the smallest takes {smallest:,}; ask for more")
    return best[1]


def budgets_asked(family: Family, args: argparse.Namespace, dtype, context: int) -> tuple[list, str]:
    """(budgets, unit) of export.py's flags --budget, --latency, --params, --memory; fail() where
    there is none."""
    if args.latency:
        return args.latency, "latency"
    if args.budget:
        return args.budget, "params"
    plain = family.router is None and family.flextron is None
    if args.params or args.memory:
        if family.router is None:
            fail(f"{family.folder} has no {FLEX}, so no sizes to find one among; expected a supernet's "
                 "folder, made by train.py, or --budget or --latency where the flextron folder made it")
        return [budget_of_weight(family, args, dtype, context)], "params"
    if plain:
        return [1.0], "params"
    if not args.dry_run:
        fail("no size asked for; expected --budget 0.5, --latency 0.6, "
             "--params 4B or --memory 6GB; see --dry-run")
    smallest = family.router.space.costs.min() if family.router else 1.0
    return [b for b in DRY_RUN_BUDGETS if b >= smallest], "params"


def budget_of_weight(family: Family, args: argparse.Namespace, dtype, context: int) -> float:
    """The budget of --params or --memory."""
    config = family.model.config

    def total_params(subnet: SubNet) -> int:
        return n_params(config, subnet, embeddings=True)

    def total_bytes(subnet: SubNet) -> int:
        return weight_bytes(config, subnet, dtype) + cache_bytes(config, subnet, dtype, context)

    if args.params:
        return largest(family, total_params, amount(args.params), "parameters")
    what = f"bytes of weights ({str(dtype).removeprefix('torch.')}) and KV cache ({context:,} tokens)"
    return largest(family, total_bytes, amount(args.memory), what)


# -----------------------------------------------------------------------------
# what an export is called, and what is said of it


def default_folder(folder, budget: float, unit: str, format: str) -> Path:
    """out/flex -> out/flex-0.50, out/flex-0.50-hf, out/flex-0.50.gguf, out/flex-latency-0.50."""
    stem = Path(folder)
    if stem.name in ("", ".."):  # . and .. have no name of their own
        stem = stem.resolve()
    number = f"{budget:.2f}" if budget == round(budget, 2) else f"{budget:g}"
    if unit == "latency":
        number = f"latency-{number}"
    suffix = {"hf": "-hf", "gguf": ".gguf"}.get(format, "")
    return stem.with_name(f"{stem.name}-{number}{suffix}")


def asked_of(family: Family, budget: float, subnet: SubNet, unit: str) -> str:
    """How a report says what was asked for."""
    if unit == "params":
        return f"asked {budget:.3f}, "
    if family.router is None and family.flextron is None:
        return "asked for all of its time, "  # its only size
    took = load_latency(family.folder, family.model)(subnet)
    return (f"asked for {budget:.3f} of the full model's time, "
            f"{took:.3f} by {family.folder / LATENCY_FILE}\n")


def sizes_table(full: LlamaConfig, budgets: list[float], subnets: list[SubNet], dtype,
                context: int, trained: list[float] = ()) -> str:
    """What slices would be: a line per budget, its mark (tables.py), and what the last three columns
    mean."""
    lines = [f"{'budget':>8} {'got':>6} {'dim':>6} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>15} "
             f"{'with embeddings':>16} {'weights, GB':>12} {f'KV of {context:,} tokens, GB':>27} "
             f"{'quants':>7} {'TP':>6} {'HF':>8}"]
    for budget, s in zip(budgets, subnets):
        shape = s.config(full)
        weights = weight_bytes(full, s, dtype) / 1e9
        cache = cache_bytes(full, s, dtype, context) / 1e9
        lines.append(f"{budget:7.3f}{mark(budget, trained)} {cost(full, s):6.3f} {s.dim:6d} "
                     f"{spread(s.n_heads):>5} {spread(s.ffn_dim):>6} {len(s.layers):6d} "
                     f"{n_params(full, s):15,} {n_params(full, s, embeddings=True):16,} "
                     f"{weights:12.3f} {cache:27.3f} {quantisations(shape):>7} {parallel_degrees(shape):>6} "
                     f"{class_of_transformers(shape):>8}")
    marks = legend(budgets, trained)
    if marks:
        lines.append(f"({marks.removeprefix('; ')})")
    lines.append("(quants: llama.cpp's that every matrix fits: Q8_0 and Q4_0, rows in multiples of 32; "
                 "K, of 256. TP: how many GPUs\ncan share heads, KV heads and neurons. HF: the class of "
                 "transformers; - where layers differ, for --format gguf)")
    return "\n".join(lines)


def report(out: Path, full: LlamaConfig, subnet: SubNet, asked: str, dtype) -> str:
    """What an export wrote. asked: how the sentence about the budget begins. dtype: torch's, or
    q8_0."""
    written = sum(file.stat().st_size for file in out.iterdir()) if out.is_dir() else out.stat().st_size
    return (f"{out}: dim {subnet.dim}, {spread(subnet.n_heads)} heads of {full.head_dim}, "
            f"ffn {spread(subnet.ffn_dim)}, layers {len(subnet.layers)} of {full.n_layers} "
            f"({' '.join(map(str, subnet.layers))})\n"
            f"{asked}got {cost(full, subnet):.3f} of the non-embedding parameters: "
            f"{n_params(full, subnet):,}\n"
            f"{n_params(full, subnet, embeddings=True):,} parameters with embeddings, {written:,} bytes "
            f"({str(dtype).removeprefix('torch.')})")


def note_readers(full: LlamaConfig, subnet: SubNet) -> None:
    """Says on stderr who will not read a folder in Meta's layout, where somebody will not."""
    if len(set(subnet.n_heads)) > 1 or len(set(subnet.ffn_dim)) > 1:
        print("note: layers of several shapes; nanoFlex loads this folder; "
              "for other programs use --format gguf",
              file=sys.stderr)
    elif subnet.dim != subnet.n_heads[0] * full.head_dim:
        print(f"note: {subnet.n_heads[0]} heads of {full.head_dim} do not make {subnet.dim} channels; "
              "nanoFlex loads this folder, Meta's own code takes heads of another size; --format hf is read "
              "everywhere",
              file=sys.stderr)
