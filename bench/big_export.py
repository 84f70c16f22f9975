"""
What an export of a real shape takes: a supernet of Llama-3.2-1B's shape with random bf16 weights, exported at a half.

    python tests/big_export.py [--format hf]      2.5 GB of weights made in a temporary folder; prints seconds, peak GB

Each step runs in a process of its own, so that the peak is the export's alone.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from plumbing.checkpoint import save_llama, save_tensors
from model import Llama, LlamaConfig  # noqa: E402
from router import FLEX, Router, router_state  # noqa: E402
from space import Space  # noqa: E402

SHAPE = LlamaConfig(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192, vocab_size=128256,
                    rope_factor=32.0, tied=True, context=8192)


def make(folder: Path, config: LlamaConfig = SHAPE) -> None:
    """A supernet's folder with random bf16 weights and an untrained router."""
    with torch.device("meta"):
        names = {name: p.shape for name, p in Llama(config).state_dict().items()}
    state = {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 if len(shape) > 1 else torch.rand(
        shape, dtype=torch.bfloat16) + 0.5 for name, shape in names.items() if not config.tied or "output" not in name}
    save_llama(folder, config, state)
    save_tensors(folder / FLEX, router_state(Router(Space(config), budgets=[1.0, 0.5]), seq_len=16))


def measure(*command) -> tuple[float, float, str]:
    """(seconds, peak GB, stdout) of a command in a process of its own."""
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    *said, peak = done.stdout.splitlines()
    return time.perf_counter() - start, int(peak) * 1024 / 1e9, "\n".join(said)


def main(argv=None) -> None:
    """Makes, exports, prints."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--format", choices=["llama", "hf"], default="llama")
    p.add_argument("--budget", type=float, default=0.5)
    p.add_argument("--scale", type=int, default=1, help="divide width, MLP and vocabulary by this")
    p.add_argument("--folder", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.folder:
        n = args.scale
        return make(Path(args.folder), replace(SHAPE, dim=2048 // n, n_heads=32 // n, n_kv_heads=max(1, 8 // n),
                                               ffn_dim=8192 // n, vocab_size=128256 // n))
    with tempfile.TemporaryDirectory() as scratch:
        flex = Path(scratch) / "flex"
        measure(__file__, "--folder", flex, "--scale", args.scale)
        size = sum(f.stat().st_size for f in flex.iterdir()) / 1e9
        seconds, peak, said = measure(ROOT / "export.py", "--model", flex, "--budget", args.budget,
                                      "--format", args.format)
        print(said)
        print(json.dumps(dict(source_gb=round(size, 2), seconds=round(seconds, 1), peak_gb=round(peak, 2))))


if __name__ == "__main__":
    main()
