"""
What a slice costs in time: measured on this machine for a grid of widths, interpolated between them (Flextron's
look-up table of latencies).

    python latency.py --model out/flex            measures, writes out/flex/latency.json, checks it on fresh slices
    python export.py --latency 0.6                the slice whose forward takes at most 0.6 of the full model's time

A layer's time is that of its attention plus that of its MLP, and layers run one after the other, so the table holds
sums and not products: for a few widths d of the residual stream

    latency(slice) = fixed(d) + sum over its layers ( layer(d) + heads(d, n_heads) + neurons(d, ffn_dim) )

where heads and neurons are what a smaller attention or MLP saves (<= 0). Everything is a fraction of the full model's
time, taken right before: what else the machine does slows both alike. The median over rounds is kept; round 0 warms up.
"""
import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from plumbing.checkpoint import load_llama
from model import Llama, SubNet
from plumbing.parallel import autocast, device_of, rank0_first
from space import Space, choices_for, random_generator
from plumbing.files import atomic_write
from plumbing.errors import fail

TABLE = "latency.json"

# -----------------------------------------------------------------------------
# measuring


def hardware(device: torch.device) -> dict:
    """What a time depends on besides the model."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    return dict(hardware=name, cores=os.cpu_count(), threads=torch.get_num_threads(), device=device.type,
                torch=torch.__version__, python=platform.python_version())


def seconds(run, device: torch.device) -> float:
    """Of one call. On one CPU thread, of that thread alone: when the machine ran something else, that is not ours."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


@torch.no_grad()
def fractions(runs: dict, device: torch.device, rounds: int) -> dict:
    """Each call's time over that of runs["full"] right before it, the median over rounds; and under "full" its ms."""
    full, ratios = [], {key: [] for key in runs if key != "full"}
    for r in range(rounds + 1):
        for key in ratios:
            with autocast(device):
                reference, took = seconds(runs["full"], device), seconds(runs[key], device)
            if r:
                full.append(reference)
                ratios[key].append(took / reference)
    return {key: statistics.median(of) for key, of in ratios.items()} | {"full": 1000 * statistics.median(full)}


def some(sizes, n: int) -> list[int]:
    """At most n of the sizes, evenly spread, the ends among them, ascending."""
    sizes = sorted(set(sizes))
    return [sizes[round(i * (len(sizes) - 1) / (n - 1))] for i in range(n)] if len(sizes) > n else sizes


def batch_for(model: Llama, tokens: int | None = None) -> torch.Tensor:
    """The tokens that are timed: windows of the model's context (2,048 at most), about 1,024 tokens or one window."""
    T = tokens or min(model.config.context, 2048)
    return torch.randint(model.config.vocab_size, (max(1, 1024 // T), T), generator=random_generator("latency")).to(
        model.tok_embeddings.weight.device)


def measure(model: Llama, choices: dict | None = None, rounds: int = 31, tokens: int | None = None) -> dict:
    """The table of a model, on its device: prefill of a batch of windows. choices: sizes per axis as choices_for()
    gives them; a few of each are measured."""
    c, device = model.config, model.tok_embeddings.weight.device
    choices, x = choices or choices_for(c), batch_for(model, tokens)
    dims, heads, ffns = some(choices["dim"], 3), some(choices["n_heads"], 4), some(choices["ffn_dim"], 5)
    half, runs = max(1, c.n_layers // 2), {"full": lambda: model(x)}
    for d in dims:
        slices = {("layers", n): (n, c.n_heads, c.ffn_dim) for n in (half, c.n_layers)}
        slices |= {("n_heads", h): (c.n_layers, h, c.ffn_dim) for h in heads}
        slices |= {("ffn_dim", f): (c.n_layers, c.n_heads, f) for f in ffns}
        for key, (n, h, f) in slices.items():
            runs[(d, *key)] = lambda s=SubNet.uniform(d, range(n), h, f): model(x, subnet=s)
    t = fractions(runs, device, rounds)
    rising = lambda row: np.minimum(0, np.maximum.accumulate(row)).tolist()  # a larger slice is never the faster one
    table = dict(dim=dims, n_heads=heads, ffn_dim=ffns, fixed=[], layer=[], heads=[], neurons=[])
    for d in dims:
        whole = t[d, "layers", c.n_layers]
        layer = whole / c.n_layers if c.n_layers == half else (whole - t[d, "layers", half]) / (c.n_layers - half)
        table["layer"].append(layer)
        table["fixed"].append(whole - c.n_layers * layer)
        table["heads"].append(rising([(t[d, "n_heads", h] - t[d, "n_heads", heads[-1]]) / c.n_layers for h in heads]))
        table["neurons"].append(rising([(t[d, "ffn_dim", f] - t[d, "ffn_dim", ffns[-1]]) / c.n_layers for f in ffns]))
    return hardware(device) | dict(batch=len(x), tokens=x.size(1), rounds=rounds, full_ms=t["full"]) | table


# -----------------------------------------------------------------------------
# looking up


class Latency:
    """SubNet -> its time as a fraction of the full model's, interpolated in a table of measure()."""

    def __init__(self, table: dict, n_layers: int):
        self.table, self.n_layers = table, n_layers
        top = np.array([table["dim"][-1]]), np.array([table["n_heads"][-1]]), np.array([table["ffn_dim"][-1]])
        self.full = float(self.fixed(top[0])[0] + n_layers * self.layer(*top)[0])  # 1, but for the noise of one median

    def over_dim(self, rows: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Linear in the width: rows (dims, n), a column per asked width d (n,) -> (n,)."""
        grid = np.array(self.table["dim"], float)
        if len(grid) == 1:
            return rows[0]
        i = np.clip(np.searchsorted(grid, d) - 1, 0, len(grid) - 2)
        w, n = (d - grid[i]) / (grid[i + 1] - grid[i]), np.arange(len(d))
        return (1 - w) * rows[i, n] + w * rows[i + 1, n]

    def fixed(self, d: np.ndarray) -> np.ndarray:
        """Embedding, last norm, output: (n,) widths -> (n,)."""
        return self.over_dim(np.array(self.table["fixed"])[:, None].repeat(len(d), 1), d)

    def layer(self, d: np.ndarray, heads: np.ndarray, ffn: np.ndarray) -> np.ndarray:
        """Layers of widths (n,), heads (n,), neurons (n,) -> (n,)."""
        t = self.table
        by_size = lambda name, grid, sizes: np.array([np.interp(sizes, t[grid], row) for row in t[name]])
        whole = np.array(t["layer"])[:, None].repeat(len(d), 1)
        return self.over_dim(whole + by_size("heads", "n_heads", heads) + by_size("neurons", "ffn_dim", ffn), d)

    def __call__(self, subnet: SubNet) -> float:
        """Of any slice, another shape in every layer included."""
        heads, ffn = np.array(subnet.n_heads, float), np.array(subnet.ffn_dim, float)
        d = np.full(len(heads), float(subnet.dim))
        return float(self.fixed(d[:1])[0] + self.layer(d, heads, ffn).sum()) / self.full

    def of(self, space: Space) -> torch.Tensor:
        """Of every member of a Space, (M,), in place of its costs in parameters."""
        dim, heads, ffn, layers = space.members.double().numpy().T
        return torch.from_numpy((self.fixed(dim) + layers * self.layer(dim, heads, ffn)) / self.full)

    def costs(self, space: Space, asked: float) -> torch.Tensor:
        """of(space), once it is clear that something takes at most `asked`."""
        check_latency(asked, (costs := self.of(space)).min().item())
        return costs


def check_latency(asked: float, smallest: float) -> None:
    """A fraction that something can meet, or fail()."""
    if not 0 < asked <= 1:
        fail(f"latency {asked:g} found, expected a fraction of the full model's time in (0, 1]; try --latency 0.6")
    if asked < smallest:
        fail(f"latency {asked:g} is below the fastest sub-network, {smallest:.4f} of the full model's time; ask for "
             f"--latency {smallest + 5e-5:.4f} or more")


def save_table(path: Path, table: dict) -> None:
    """Writes a table beside its Llama, or one line about why not."""
    try:
        with atomic_write(path) as f:
            f.write((json.dumps(table, indent=1) + "\n").encode())
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error}); copy the Llama into a folder of yours")


def load_latency(folder, model: Llama, choices: dict | None = None) -> Latency:
    """The table in a folder; measured and written there first if there is none."""
    path = Path(folder) / TABLE
    here = hardware(model.tok_embeddings.weight.device)

    def make():
        if not path.is_file():
            print(f"measuring latencies on {here['hardware']}, {here['threads']} threads, into {path}", file=sys.stderr)
            save_table(path, measure(model, choices))

    rank0_first(make)  # one table for all ranks, or they would take different slices
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        found = Latency(table, model.config.n_layers)
        if (table["dim"][-1], table["n_heads"][-1], table["ffn_dim"][-1]) != (
                model.config.dim, model.config.n_heads, model.config.ffn_dim) or not np.isfinite(found.full):
            raise ValueError("another shape")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        fail(f"{path} is no table of latencies of the Llama beside it ({type(error).__name__}: {str(error)[:60]}); "
             f"python latency.py --model {folder} measures it again")
    compared = ("hardware", "device", "threads", "torch")
    differ = [f"{key} {table.get(key)}" for key in compared if table.get(key) != here[key]]
    if differ:
        print(f"note: {path} was measured with {', '.join(differ)}; python latency.py --model {folder} measures here",
              file=sys.stderr)
    return found


def choices_in(folder, model: Llama) -> dict:
    """The sizes to measure: those that the routers in a folder choose from, or the default ones."""
    from flextron.deployed import load_flextron
    from flextron.network import timed_sizes
    from router import load_router
    router, flextron = load_router(folder, model.config), load_flextron(folder, model)
    try:
        return router.space.choices if router else timed_sizes(model.config, flextron.sizes) if flextron else (
            choices_for(model.config))
    except ValueError as error:
        fail(str(error))


def main(argv=None) -> None:
    """Measures a folder's table anew, then times random slices, another shape in every layer, against it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python latency.py --help lists the flags")
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    p.add_argument("--rounds", type=int, default=31, help="timings of each slice, of which the median counts")
    p.add_argument("--seq-len", type=int, help="tokens per window (default: the model's context)")
    p.add_argument("--slices", type=int, default=6, help="random slices to check the table on")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if min(args.rounds, args.slices, 1 if args.seq_len is None else args.seq_len) < 1:
        fail("--rounds, --slices and --seq-len: expected 1 or more")
    model = load_llama(args.model, device_of(args.device))
    choices = choices_in(args.model, model)
    table = measure(model, choices, args.rounds, args.seq_len)
    save_table(Path(args.model) / TABLE, table)
    latency, L, generator = Latency(table, model.config.n_layers), model.config.n_layers, random_generator("slices")
    pick = lambda sizes: [sizes[k] for k in torch.randint(len(sizes), (L,), generator=generator).tolist()]
    subnets = [SubNet(pick(choices["dim"])[0], range(L), pick(choices["n_heads"]), pick(choices["ffn_dim"]))
               for _ in range(args.slices)]
    x = batch_for(model, args.seq_len)
    runs = {"full": lambda: model(x)} | {s: (lambda s=s: model(x, subnet=s)) for s in subnets}
    measured = fractions(runs, x.device, args.rounds)
    print(f"{table['hardware']}, {table['threads']} threads, torch {table['torch']}; {table['batch']} x "
          f"{table['tokens']} tokens; full model {table['full_ms']:.1f} ms\n{'table':>6} {'timed':>6} {'error':>7}")
    for s in subnets:
        print(f"{latency(s):6.3f} {measured[s]:6.3f} {latency(s) / measured[s] - 1:+7.1%}   dim {s.dim}, heads "
              f"{sum(s.n_heads) / L:.1f}, ffn {sum(s.ffn_dim) / L:.0f} on average")


if __name__ == "__main__":
    main()
