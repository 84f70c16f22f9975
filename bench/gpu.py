"""
Everything that wants a GPU, in one command of at most nine minutes: tests in bf16, training steps
with their MFU and their memory beside the plan, slices beside Llamas of their own, text beside
transformers.

    bash bench/gpu.sh                                    one GPU: out/gpu/gpu.json and gpu.md
    bash bench/gpu.sh --parts tests steps-1B             some parts
    bash bench/gpu.sh --device cpu --toy                 does it run at all? Toys, no GPU

Every part runs in a process of its own and prints a row as soon as it is measured. A part that
fails or runs out of its time keeps its rows, is reported, and leaves the others alone. The time
that a part does not take goes to those behind it. Compiled steps come last: nobody knows before how
long a GPU's first compilation takes.
"""
import argparse
import functools
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch

from bench.beside import rows_beside, run_passes, run_text
from bench.slices import time_variants, variants
from bench.speed import peak_memory, speeds
from bench.steps import flags_of, fresh_llama, make_step, mfu, time_steps
from model import LlamaConfig
from plumbing.errors import Parser, check_range, fail, note, run_main
from plumbing.files import atomic_write
from plumbing.memory import plan
from plumbing.parallel import default_device, device_of
from space import Space, cost

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (1.0, 0.8, 0.6, 0.4)
ROUNDS = 5


class Size(NamedTuple):
    """What is measured: a Llama, and the tokens of a budget and step."""
    config: LlamaConfig
    seq_len: int
    batch: int        # sequences per budget and step
    micro_batch: int  # sequences per forward


SIZES = {
    "100M": Size(LlamaConfig(dim=768, n_layers=12, n_heads=12, n_kv_heads=4, head_dim=64, ffn_dim=2048,
                             vocab_size=32000), seq_len=2048, batch=16, micro_batch=4),
    "1B": Size(LlamaConfig(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192,
                           vocab_size=128256, rope_factor=32.0, tied=True),
               seq_len=2048, batch=8, micro_batch=2),
}
TOY = Size(LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=64, vocab_size=99),
           seq_len=16, batch=2, micro_batch=1)

# -----------------------------------------------------------------------------
# the parts: each yields its rows


def tests(args) -> Iterator[dict]:
    """tests/test_gpu.py on this device: one row."""
    words = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "-k", args.device,
             "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    said = done.stdout.strip().splitlines()[-1].strip("= ")
    yield dict(tests=said)
    if done.returncode:
        raise RuntimeError(said)


def steps(args, size: str, compiled: bool = False, checkpointing: bool = False) -> Iterator[dict]:
    """A dense and an elastic training step, each alone on the device: tokens/s, MFU, and the peak of
    memory beside the plan."""
    config, seq_len, batch, micro_batch = size_of(args, size)
    device = device_of(args.device)
    words = argparse.Namespace(batch=batch, seq_len=seq_len, micro_batch=micro_batch, device=args.device)
    more = [flag for flag, on in (("--compile", compiled), ("--activation-checkpointing", checkpointing))
            if on]
    flags = flags_of(words, *more)
    for name in ("dense", "elastic"):
        step = make_step(name, config, flags, device)
        peak = peak_memory(step.model, lambda: [step(0), step(1)], device)
        planned = plan(config, step.args, 1, flags.autocast == "bfloat16")[0]["total"]
        speed, costs = time_steps({name: step}, flags, device, ROUNDS)
        per_second = statistics.median(speed[name])
        yield dict(size=size, compile=compiled, checkpointing=checkpointing, step=name, cost=costs[name],
                   tokens_per_second=per_second,
                   mfu=mfu(config, seq_len, per_second, device_name(device), costs[name]),
                   peak=peak, planned=planned)
        del step
        gc.collect()  # compiled blocks hold themselves


def slices(args, size: str) -> Iterator[dict]:
    """Forward, and forward with backward, of each budget's slice in the supernet and as a Llama of its
    own: times over the full model's."""
    config, seq_len, _, micro_batch = size_of(args, size)
    device = device_of(args.device)
    model = fresh_llama(config, device)
    space = Space(config)
    found = variants(model, space, space.uniform, BUDGETS, device)
    rows = time_variants(found, random_tokens(config, micro_batch, seq_len, device), ROUNDS, device)
    for (budget, way), row in rows.items():
        yield dict(size=size, budget=budget, way=way, cost=cost(config, found[budget, way].subnet)) | row


def deployed(args, size: str) -> Iterator[dict]:
    """Prefill and decode of every budget: over the full model's; then beside transformers, and the full
    model's training pass too."""
    config, seq_len, _, _ = size_of(args, size)
    device = device_of(args.device)
    model = fresh_llama(config, device)
    space = Space(config)
    subnets = {budget: space.uniform(budget) if budget < 1 else model.full for budget in BUDGETS}
    rows, full = speeds(model, list(subnets.values()), seq_len, 8, device)
    for budget, row in zip(subnets, rows):
        per_second = {f"{kind} tok/s": row[kind] * full[kind] for kind in ("prefill", "decode")}
        yield dict(size=size, budget=budget, cost=cost(config, subnets[budget]), batch=full["batch"],
                   prompt=full["prompt"], new=full["new"]) | row | per_second
    if importlib.util.find_spec("transformers") is None:
        note("transformers is not installed, and nothing is put beside it: pip install transformers")
        return
    for batch in (1, 8):
        text = random_tokens(config, batch, min(256, seq_len), device)
        for row in rows_beside(model, subnets, run_text, text, ROUNDS, device):
            yield dict(size=size, batch=batch, tokens=text.size(1)) | row
    text = random_tokens(config, 2, seq_len, device)
    for row in rows_beside(model, {1.0: model.full}, run_passes, text, ROUNDS, device):
        yield dict(size=size, batch=2, tokens=seq_len) | row


# The parts in their order, with the seconds that each may hope for: 540 in all.
PARTS: dict[str, tuple[int, Callable]] = {
    "tests": (65, tests),
    "steps-100M": (35, functools.partial(steps, size="100M")),
    "steps-100M-checkpointing": (30, functools.partial(steps, size="100M", checkpointing=True)),
    "steps-1B": (45, functools.partial(steps, size="1B")),
    "steps-1B-checkpointing": (45, functools.partial(steps, size="1B", checkpointing=True)),
    "slices": (40, functools.partial(slices, size="1B")),
    "deployed": (70, functools.partial(deployed, size="1B")),
    "steps-100M-compile": (55, functools.partial(steps, size="100M", compiled=True)),
    "steps-1B-compile": (60, functools.partial(steps, size="1B", compiled=True)),
    "steps-100M-compile-checkpointing": (
        45, functools.partial(steps, size="100M", compiled=True, checkpointing=True)),
    "steps-1B-compile-checkpointing": (
        50, functools.partial(steps, size="1B", compiled=True, checkpointing=True)),
}


def size_of(args, size: str) -> Size:
    """One of SIZES, or the toy."""
    return TOY if args.toy else SIZES[size]


def random_tokens(config: LlamaConfig, batch: int, seq_len: int, device) -> torch.Tensor:
    """(batch, seq_len) ids on the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, seq_len), generator=generator).to(device)


def device_name(device: torch.device) -> str:
    """As PEAK of bench/steps.py knows a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -----------------------------------------------------------------------------
# parts in processes of their own


def run_part(name: str, args, limit: float, folder: Path) -> dict:
    """What became of a part: its rows, its seconds, and, if it did not come to its end, why. What it
    printed besides lies in NAME.log."""
    words = [sys.executable, "-m", "bench.gpu", "--part", name, "--device", args.device]
    if args.toy:
        words.append("--toy")
    start = time.monotonic()
    log, out = folder / f"{name}.log", folder / f"{name}.jsonl"
    with open(log, "wb") as stderr, open(out, "wb") as stdout:
        # A session of its own: what it started (compilers, pytest) ends with it.
        process = subprocess.Popen(words, cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True)
        error = None
        try:
            if process.wait(timeout=limit):
                error = f"ended with status {process.returncode}: {last_line(log)}"
        except subprocess.TimeoutExpired:
            error = f"stopped after its {limit:.0f} seconds"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    rows = [json.loads(line) for line in out.read_text().splitlines()
            if line.startswith("{") and line.endswith("}")]
    return dict(part=name, seconds=time.monotonic() - start, error=error, rows=rows)


def last_line(path: Path) -> str:
    """The last words of a log, which say what went wrong."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def run_parts(names: list[str], args, folder: Path) -> list[dict]:
    """All parts, one after the other, in args.minutes."""
    end = time.monotonic() + 60 * args.minutes
    done = []
    for i, name in enumerate(names):
        left = end - time.monotonic()
        hoped = [PARTS[other][0] for other in names[i:]]
        limit = left * hoped[0] / sum(hoped)
        print(f"{name}: at most {limit:.0f} s", file=sys.stderr)
        done.append(run_part(name, args, limit, folder))
        if done[-1]["error"]:
            print(f"{name}: {done[-1]['error']}", file=sys.stderr)
    return done


# -----------------------------------------------------------------------------
# the tables


def table(rows: list[dict], columns: dict[str, Callable]) -> list[str]:
    """Lines of a markdown table: column -> row -> cell."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell(row)) for cell in columns.values()) + " |")
    return [*lines, ""]


def flags_said(row: dict) -> str:
    """The flags of a step, as a cell."""
    said = [flag for flag, key in (("--compile", "compile"), ("--activation-checkpointing", "checkpointing"))
            if row[key]]
    return " ".join(f"`{flag}`" for flag in said)


def over_dense(rows: list[dict]) -> Callable:
    """row -> its tokens/s over those of the dense step with the same flags, as a cell."""
    dense = {(row["size"], flags_said(row)): row["tokens_per_second"]
             for row in rows if row["step"] == "dense"}
    return lambda row: f"{row['tokens_per_second'] / dense[row['size'], flags_said(row)]:.2f}"


# Of the rows that have the key: caption, key, columns.
TABLES = (
    ("Slices, time over the full model's", "way", ("size", "budget", "way", "cost", "forward", "both")),
    ("As deployed, over the full model", "memory",
     ("size", "budget", "cost", "batch", "prefill", "decode", "memory", "prefill tok/s", "decode tok/s")),
    ("Text, our time over transformers'", "generate",
     ("size", "budget", "cost", "batch", "tokens", "prefill", "decode", "generate", "decode tok/s")),
    ("A pass, our time over transformers'", "fwd+bwd",
     ("size", "budget", "cost", "batch", "tokens", "forward", "fwd+bwd", "fwd+bwd tok/s")),
)


def report(result: dict) -> str:
    """gpu.md: what was measured, and which parts did not come to their end."""
    lines = [f"{result['device']}, torch {result['torch']}; `bash bench/gpu.sh{result['flags']}`", ""]
    rows = [row for part in result["parts"] for row in part["rows"]]
    for row in rows:
        if "tests" in row:
            lines += [f"Tests: {row['tests']}", ""]
    stepped = [row for row in rows if "step" in row]
    if stepped:
        lines += ["Training steps:", ""]
        lines += table(stepped, {
            "size": lambda row: row["size"],
            "flags": flags_said,
            "step": lambda row: row["step"],
            "mean cost": lambda row: f"{row['cost']:.3f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
            "over dense": over_dense(stepped),
            "MFU": lambda row: f"{row['mfu']:.1%}" if row["mfu"] else "-",
            "peak GB": lambda row: f"{row['peak'] / 1e9:.2f}",
            "planned over peak": lambda row: f"{row['planned'] / row['peak']:.2f}"})
    for caption, key, columns in TABLES:
        found = [row for row in rows if key in row]
        if found:
            lines += [caption + ":", ""]
            lines += table(found, {column: functools.partial(cell_of, column) for column in columns})
    for part in result["parts"]:
        lines.append(f"- {part['part']}: {part['seconds']:.0f} s"
                     + (f", {part['error']}" if part["error"] else ""))
    return "\n".join(lines) + "\n"


def cell_of(column: str, row: dict) -> str:
    """A value as a cell: three digits of a ratio, none of tokens/s."""
    value = row[column]
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


# -----------------------------------------------------------------------------
# the command line


def parse_args(argv) -> argparse.Namespace:
    """The flags."""
    p = Parser("bash bench/gpu.sh", __doc__)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                   help=f"which ones: {' '.join(PARTS)} (default: all)")
    p.add_argument("--minutes", type=float, default=9.0, help="for all of them")
    p.add_argument("--out", default="out/gpu", help="folder of gpu.json, gpu.md and the parts' logs")
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    p.add_argument("--toy", action="store_true", help="toys in place of 100M and 1B parameters")
    p.add_argument("--part", choices=PARTS, help="one of them in this process: its rows on stdout")
    args = p.parse_args(argv)
    check_range(args, 0.1, "minutes", highest=1000)
    if args.device == "cpu" and not args.toy:
        fail("a Llama of 1B parameters on a CPU takes hours; expected a GPU, or --toy")
    return args


def main(argv=None) -> None:
    """Runs the parts and writes the two files; exit status 1 if one of them did not come to its end."""
    args = parse_args(argv)
    if args.part:
        for row in PARTS[args.part][1](args):
            print(json.dumps(row), flush=True)
        return
    device = device_of(args.device)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    said = "" if args.parts == list(PARTS) else f" --parts {' '.join(args.parts)}"
    result = dict(device=device_name(device), torch=torch.__version__,
                  flags=said + (" --toy" if args.toy else ""),
                  parts=run_parts(args.parts, args, folder))
    for name, text in (("gpu.json", json.dumps(result, indent=1) + "\n"), ("gpu.md", report(result))):
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    print(report(result))
    if any(part["error"] for part in result["parts"]):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
