"""
What an export of a real shape takes: a supernet of Llama-3.2-1B's shape with random bf16 weights,
exported at a half.

    python -m bench.big_export                  2.5 GB of weights in a temporary folder
    python -m bench.big_export --format gguf

The weights are made in one process and exported in another, so that the peak is the export's alone.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from model import Llama, LlamaConfig
from plumbing.checkpoint import save_llama, save_tensors
from plumbing.errors import Parser, check_at_least_one, run_main
from plumbing.family import FLEX, router_state
from router import Router
from space import Space

ROOT = Path(__file__).resolve().parent.parent
SHAPE = LlamaConfig(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192,
                    vocab_size=128256, rope_factor=32.0, tied=True, context=8192)

# Runs a script, then prints the most memory that its process had, in kB.
WITH_PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def scaled(n: int) -> LlamaConfig:
    """SHAPE with width, heads, MLP and vocabulary divided by n."""
    return replace(SHAPE, dim=SHAPE.dim // n, n_heads=SHAPE.n_heads // n,
                   n_kv_heads=max(1, SHAPE.n_kv_heads // n),
                   ffn_dim=SHAPE.ffn_dim // n, vocab_size=SHAPE.vocab_size // n)


def make(folder: Path, config: LlamaConfig = SHAPE) -> None:
    """A supernet's folder with random bf16 weights and an untrained router."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        if config.tied and name == "output.weight":
            continue
        if len(shape) > 1:
            state[name] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
        else:  # a norm's
            state[name] = torch.rand(shape, dtype=torch.bfloat16) + 0.5
    save_llama(folder, config, state)
    router = Router(Space(config), budgets=[1.0, 0.5])
    save_tensors(folder / FLEX, router_state(router, seq_len=16))


def run(*command) -> str:
    """stdout of python with these words, in a process of its own that finds this project."""
    words = [sys.executable, *map(str, command)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def main(argv=None) -> None:
    """Makes, exports, prints."""
    p = Parser("python -m bench.big_export", __doc__)
    p.add_argument("--format", choices=["llama", "hf", "gguf"], default="llama")
    p.add_argument("--budget", type=float, default=0.5)
    p.add_argument("--scale", type=int, default=1, help="divide width, MLP and vocabulary by this")
    p.add_argument("--folder", help=argparse.SUPPRESS)  # where the first process makes its weights
    args = p.parse_args(argv)
    check_at_least_one(args, "scale")
    if args.folder:
        make(Path(args.folder), scaled(args.scale))
        return

    with tempfile.TemporaryDirectory() as scratch:
        flex = Path(scratch) / "flex"
        run("-m", "bench.big_export", "--folder", flex, "--scale", args.scale)
        size = sum(file.stat().st_size for file in flex.iterdir()) / 1e9
        start = time.perf_counter()
        said = run("-c", WITH_PEAK, ROOT / "export.py", "--model", flex, "--budget", args.budget,
                   "--format", args.format)
        took = time.perf_counter() - start
    *lines, peak = said.splitlines()
    print("\n".join(lines))
    print(json.dumps(dict(source_gb=round(size, 2), seconds=round(took, 1),
                          peak_gb=round(int(peak) * 1024 / 1e9, 2))))


if __name__ == "__main__":
    run_main(main)
