"""
What a slice costs in time: measured on this machine for a grid of widths, interpolated between them
(Flextron's look-up table of latencies).

    python -m bench.latency --model out/flex    measures, writes out/flex/latency.json, checks it on
                                                fresh slices
    python export.py --latency 0.6              the slice whose forward takes at most 0.6 of the full
                                                model's time

A layer's time is that of its attention plus that of its MLP, and layers run one after the other. So
the table holds sums and not products: for a few widths d of the residual stream

    latency(slice) = fixed(d) + sum over its layers ( layer(d) + heads(d, n_heads) + neurons(d,
    ffn_dim) )

where heads and neurons are what a smaller attention or MLP saves (<= 0). Everything is a fraction
of the full model's time, taken right before: what else the machine does slows both alike. The
median over rounds is kept; round 0 warms up. Rounds end when no median has moved by more than .5 %
in four of them, after 31, or after half an hour.
"""
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

from model import Llama, SubNet
from plumbing.errors import fail
from plumbing.files import atomic_write, read_json
from plumbing.parallel import autocast, bar, rank0_first
from plumbing.tensors import taken_apart
from space import Space, choices_for, random_generator

LATENCY_FILE = "latency.json"
ROUNDS = 31    # at most
LIMIT = 1800   # seconds: the round in which they are over is the last
SLOW = 10      # seconds of a forward from which on round 0 counts too
STILL = 0.005  # a median that moves by less stands still

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
    """Of one call. On one CPU thread, of that thread alone: when the machine ran something else,
    that is not ours."""
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
    """Each call's time over that of runs["full"] right before it, the median over `rounds` at most;
    under "full" its ms, and under "rounds" how many there were."""
    full = []
    ratios = {key: [] for key in runs if key != "full"}
    history = []  # the medians after each round
    start = time.monotonic()
    with bar(name="timing", total=(rounds + 1) * len(ratios), unit="slice") as progress:
        for r in range(rounds + 1):
            # every call, right behind the full model
            for key, values in ratios.items():
                with autocast(device):
                    reference = seconds(runs["full"], device)
                    took = seconds(runs[key], device)
                full.append(reference)
                values.append(took / reference)
                progress.update()

            # round 0 warms up; to a slow model that is nothing, and the round counts
            if r == 0 and reference < SLOW:
                full.clear()
                for values in ratios.values():
                    values.clear()
                continue

            # enough?
            history.append({key: statistics.median(values) for key, values in ratios.items()})
            if stands_still(history) or time.monotonic() - start > LIMIT:
                break
    return history[-1] | dict(full=1000 * statistics.median(full), rounds=len(history))


def stands_still(history: list[dict]) -> bool:
    """Has no median moved in the last four rounds? The first eight are too few to tell."""
    if len(history) < 9:
        return False
    for key in history[-1]:
        last = [medians[key] for medians in history[-5:]]
        if max(last) > min(last) * (1 + STILL):
            return False
    return True


def some(sizes, n: int) -> list[int]:
    """At most n of the sizes, evenly spread, the ends among them, ascending."""
    sizes = sorted(set(sizes))
    if len(sizes) <= n:
        return sizes
    return [sizes[round(i * (len(sizes) - 1) / (n - 1))] for i in range(n)]


def batch_for(model: Llama, tokens: int | None = None) -> torch.Tensor:
    """The tokens that are timed: windows of the model's context (2,048 at most), about 1,024 tokens
    or one window."""
    T = tokens or min(model.config.context, 2048)
    shape = (max(1, 1024 // T), T)
    x = torch.randint(model.config.vocab_size, shape, generator=random_generator("latency"))
    return x.to(model.tok_embeddings.weight.device)


def run_slice(model: Llama, x: torch.Tensor, subnet: SubNet):
    """A call without arguments that runs the slice on tokens x (B, T)."""
    return lambda: model(x, subnet=subnet)


def slices_to_time(config, dims: list[int], heads: list[int], ffns: list[int]) -> dict[tuple, SubNet]:
    """(dim, what varies, its value) -> the slice that is timed for it: one axis shrinks at a time,
    at every width."""
    L = config.n_layers
    slices = {}
    for d in dims:
        for n in (max(1, L // 2), L):
            slices[d, "layers", n] = SubNet.uniform(d, range(n), config.n_heads, config.ffn_dim)
        for h in heads:
            slices[d, "n_heads", h] = SubNet.uniform(d, range(L), h, config.ffn_dim)
        for f in ffns:
            slices[d, "ffn_dim", f] = SubNet.uniform(d, range(L), config.n_heads, f)
    return slices


def measure_latency(model: Llama, choices: dict | None = None, rounds: int = ROUNDS,
                    tokens: int | None = None) -> dict:
    """The table of a model, on its device: prefill of a batch of windows. choices: sizes per axis
    as choices_for() gives them; a few of each are measured."""
    c = model.config
    device = model.tok_embeddings.weight.device
    choices = choices or choices_for(c)
    x = batch_for(model, tokens)
    dims = some(choices["dim"], 3)
    heads = some(choices["n_heads"], 4)
    ffns = some(choices["ffn_dim"], 5)

    # Time all slices in turn.
    runs = {"full": lambda: model(x)}
    for key, subnet in slices_to_time(c, dims, heads, ffns).items():
        runs[key] = run_slice(model, x, subnet)
    t = fractions(runs, device, rounds)

    # Take the times of the slices apart: what a layer takes, what everything around the layers
    # takes, what it saves.
    table = dict(dim=dims, n_heads=heads, ffn_dim=ffns, fixed=[], layer=[], heads=[], neurons=[])
    half = max(1, c.n_layers // 2)
    for d in dims:
        whole = t[d, "layers", c.n_layers]
        layer = whole / c.n_layers
        if half != c.n_layers:
            layer = (whole - t[d, "layers", half]) / (c.n_layers - half)
        table["layer"].append(layer)
        table["fixed"].append(whole - c.n_layers * layer)
        table["heads"].append(savings([t[d, "n_heads", h] for h in heads], c.n_layers))
        table["neurons"].append(savings([t[d, "ffn_dim", f] for f in ffns], c.n_layers))
    return hardware(device) | dict(batch=len(x), tokens=x.size(1), rounds=t["rounds"],
                                   full_ms=t["full"]) | table


def savings(times: list[float], n_layers: int) -> list[float]:
    """What a layer saves (<= 0) at each size, by the times at sizes that ascend to the full one. A
    larger slice is never the faster one: where noise says so, the row is made to rise."""
    row = [(time_of_size - times[-1]) / n_layers for time_of_size in times]
    return np.minimum(0, np.maximum.accumulate(row)).tolist()


# -----------------------------------------------------------------------------
# looking up


class Latency:
    """SubNet -> its time as a fraction of the full model's, interpolated in a table of
    measure_latency()."""

    def __init__(self, table: dict, n_layers: int):
        self.table = table
        self.n_layers = n_layers
        d = np.array([table["dim"][-1]])
        heads = np.array([table["n_heads"][-1]])
        ffn = np.array([table["ffn_dim"][-1]])
        # The full model's time: 1, but for the noise of one median.
        self.full = float(self.fixed(d)[0] + n_layers * self.layer(d, heads, ffn)[0])

    def over_dim(self, rows: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Linear in the width: rows (dims, n), a column per asked width d (n,) -> (n,)."""
        grid = np.array(self.table["dim"], float)
        if len(grid) == 1:
            return rows[0]
        i = np.clip(np.searchsorted(grid, d) - 1, 0, len(grid) - 2)
        w = (d - grid[i]) / (grid[i + 1] - grid[i])
        n = np.arange(len(d))
        return (1 - w) * rows[i, n] + w * rows[i + 1, n]

    def fixed(self, d: np.ndarray) -> np.ndarray:
        """Embedding, last norm, output: (n,) widths -> (n,)."""
        return self.over_dim(np.array(self.table["fixed"], float)[:, None].repeat(len(d), 1), d)

    def saved(self, name: str, grid: str, asked: np.ndarray) -> np.ndarray:
        """A table's rows interpolated at sizes (n,) -> (dims, n)."""
        return np.array([np.interp(asked, self.table[grid], row) for row in self.table[name]])

    def layer(self, d: np.ndarray, heads: np.ndarray, ffn: np.ndarray) -> np.ndarray:
        """Layers of widths (n,), heads (n,), neurons (n,) -> (n,)."""
        whole = np.array(self.table["layer"], float)[:, None].repeat(len(d), 1)
        rows = whole + self.saved("heads", "n_heads", heads) + self.saved("neurons", "ffn_dim", ffn)
        return self.over_dim(rows, d)

    def __call__(self, subnet: SubNet) -> float:
        """The time of any slice, another shape in every layer included."""
        heads = np.array(subnet.n_heads, float)
        ffn = np.array(subnet.ffn_dim, float)
        d = np.full(len(heads), float(subnet.dim))
        return float(self.fixed(d[:1])[0] + self.layer(d, heads, ffn).sum()) / self.full

    def of_members(self, space: Space) -> torch.Tensor:
        """The times of all members of a Space, (M,), in place of their costs in parameters."""
        dim, heads, ffn, layers = space.members.double().numpy().T
        times = self.fixed(dim) + layers * self.layer(dim, heads, ffn)
        return torch.from_numpy(times / self.full)

    def costs(self, space: Space, asked: float) -> torch.Tensor:
        """of_members(space), once it is clear that something takes at most `asked`; else fail()."""
        costs = self.of_members(space)
        check_latency(asked, costs.min().item())
        return costs


def check_latency(asked: float, smallest: float) -> None:
    """A fraction that something can meet, or fail()."""
    if not 0 < asked <= 1:
        fail(f"latency {asked:g} found, expected a fraction of the full model's time in (0, 1]; "
             "try --latency 0.6")
    if asked < smallest:
        fail(f"latency {asked:g} is below the fastest sub-network, {smallest:.4f} of the full model's time; "
             f"ask for --latency {smallest + 5e-5:.4f} or more")


def check_grids(table: dict) -> None:
    """ValueError unless sizes ascend and every time has its size: others would be interpolated
    between the wrong ones."""
    sizes = {}
    for axis in ("dim", "n_heads", "ffn_dim"):
        grid = table[axis]
        sizes[axis] = len(grid)
        if not all(type(size) is int and size > 0 for size in grid) or grid != sorted(set(grid)):
            raise ValueError(f"{axis} does not ascend")
    shapes = dict(fixed=["dim"], layer=["dim"], heads=["dim", "n_heads"], neurons=["dim", "ffn_dim"])
    for name, axes in shapes.items():
        if np.shape(table[name]) != tuple(sizes[axis] for axis in axes):
            raise ValueError(f"{name} has other sizes than {' and '.join(axes)}")


def check_place(folder) -> None:
    """fail() where a table cannot be written: said before it is measured, which takes its time."""
    if not os.access(folder, os.W_OK):
        fail(f"{folder} cannot be written to, and its table of latencies belongs there; copy the Llama into "
             "a folder of yours")


def save_table(path: Path, table: dict) -> None:
    """Writes a table beside its Llama, or one line about why not."""
    try:
        with atomic_write(path) as f:
            f.write((json.dumps(table, indent=1) + "\n").encode())
    except OSError as error:
        fail(f"{path} cannot be written ({error.strerror or error}); copy the Llama into a folder of yours")


def load_latency(folder, model: Llama, choices: dict | None = None) -> Latency:
    """The table in a folder; measured and written there first if there is none. Damaged, or of
    another shape: fail()."""
    path = Path(folder) / LATENCY_FILE
    here = hardware(model.tok_embeddings.weight.device)

    def measure_if_missing() -> None:
        if not os.path.lexists(path):
            check_place(folder)
            print(f"measuring latencies on {here['hardware']}, {here['threads']} threads, into {path}: until "
                  f"the medians stand still, {ROUNDS} rounds or {LIMIT // 60} minutes", file=sys.stderr)
            save_table(path, measure_latency(model, choices))

    rank0_first(measure_if_missing)  # one table for all ranks, or they would take different slices
    again = f"python -m bench.latency --model {folder}"
    full = (model.config.dim, model.config.n_heads, model.config.ffn_dim)
    with taken_apart(path, f"a table of latencies of the Llama beside it; {again} measures it again"):
        table = read_json(path)
        latency = Latency(table, model.config.n_layers)
        check_grids(table)
        largest = (table["dim"][-1], table["n_heads"][-1], table["ffn_dim"][-1])
        if largest != full or not np.isfinite(latency.full):
            raise ValueError("another shape")
        for name in ("fixed", "layer", "heads", "neurons"):  # each a share of the full model's time
            if not (np.abs(np.array(table[name], float)) < 100).all():
                raise ValueError(f"{name} is out of range")
    compared = ("hardware", "device", "threads", "torch")
    differ = [f"{key} {table.get(key)}" for key in compared if table.get(key) != here[key]]
    if differ:
        print(f"note: {path} was measured with {', '.join(differ)}; {again} measures here", file=sys.stderr)
    return latency
