"""
The tables of RESULTS.md and the picture of README.md, from the runs of results.sh.

    python -m bench.results --collect out/results    reads the runs into assets/results.json first
    python -m bench.results                          prints the tables as Markdown, draws family.png

A cell over several seeds is their mean (smallest to largest). Losses are nats per token on the same
held-out text. Runs that are not there are left out; bash bench/results.sh makes them.
"""
import json
import statistics
import sys
from pathlib import Path

from plumbing.duration import train_flops
from plumbing.errors import Parser, fail, run_main
from plumbing.files import atomic_write
from plumbing.params import PARAMS, read_config

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SEEDS = (0, 1, 2)
TRAINED = (1.0, 0.8, 0.6, 0.4)
FREE = (0.95, 0.9, 0.85, 0.75, 0.7, 0.55, 0.5, 0.45)  # budgets that no run trained
SPEEDS = ("prefill", "decode", "memory")
BEFORE = "before"  # the run that is none: slices of the sorted, untrained base (bench/before.py)

# -----------------------------------------------------------------------------
# reading the runs


def spent(folder: Path) -> dict:
    """What a run's log says it took: optimizer steps, tokens, training FLOPs (those of a teacher
    included), seconds.

    The seconds are those of its median step, times the steps, since other programs slow some."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    header, *records = [json.loads(line) for line in lines]
    steps = {r["step"]: r for r in records if "loss" in r}.values()  # a resumed run repeats some
    settings = header["settings"]
    config = read_config(folder)

    passes = 0
    flops = 0.0
    for record in steps:
        others = record.get("other", [None] * len(record["got"]))
        budgets = record.get("budget", [])
        if settings.get("kd"):                # a forward of the base at every budget under 1
            flops += sum(budget < 1 for budget in budgets) * train_flops(config, settings["seq_len"]) / 3
        for soft, got, other in zip(record["soft"], record["got"], others):
            share = 1.0 if soft else got  # a soft pass runs everything
            flops += train_flops(config, settings["seq_len"], share)
            if other is not None:         # the second slice of a pair: a forward
                flops += train_flops(config, settings["seq_len"], other) / 3
            passes += 1

    median = statistics.median(r.get("seconds", 0) for r in steps)
    seconds = median * len(steps)
    return dict(
        steps=len(steps),
        tokens=passes * settings["batch_tokens"],
        flops=settings["batch_tokens"] * flops,
        seconds=round(seconds, 1),
        autocast=settings.get("autocast"),
        commit=header["commit"],
        torch=header["torch"],
        device=header["device"])


def last_object(path: Path) -> dict:
    """The JSON object on a file's last line."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def rows_of(found: dict) -> list[dict]:
    """The rows of eval.py's object, without what no table shows."""
    keep = ("budget", "got", "params", "dim", "n_heads", "ffn_dim", "layers", "loss")
    rows = []
    for found_row in found["rows"]:
        row = {key: found_row[key] for key in keep}
        row["loss"] = round(row["loss"], 5)
        rows.append(row)
    return rows


def collect(folder) -> dict:
    """All finished runs in a folder of results.sh: name -> what it took and its rows."""
    runs = {}
    for path in sorted(Path(folder).glob("*.json")):
        trained = path.with_suffix("")
        if path.stem != BEFORE and not (trained / PARAMS).exists():
            continue
        found = last_object(path)
        run = {} if path.stem == BEFORE else spent(trained)
        run["context"] = found["context"]
        run["trained"] = found.get("trained", [])
        run["tokens_scored"] = found["rows"][0]["tokens"]
        run["rows"] = rows_of(found)
        speed = path.with_suffix(".speed")
        if speed.exists():
            timed = {row["budget"]: row["speed"] for row in last_object(speed)["rows"]}
            for row in run["rows"]:
                if row["budget"] in timed:
                    row["speed"] = {key: round(value, 3) for key, value in timed[row["budget"]].items()}
        runs[path.stem] = run
    if not runs:
        fail(f"{folder} holds no finished run; expected what results.sh leaves; "
             "run: bash bench/results.sh")
    return runs


class Runs:
    """Look-ups in results.json by name and budget."""

    def __init__(self, runs: dict):
        if "router-0" not in runs:
            fail(f"no run router-0 among {len(runs)}, which the others are compared with; "
                 "bash bench/results.sh router-0")
        self.runs = runs
        self.budgets = [row["budget"] for row in runs["router-0"]["rows"]]

    def row(self, name: str, budget: float) -> dict:
        """A run's row at a budget."""
        return next(row for row in self.runs[name]["rows"] if row["budget"] == budget)

    def instead(self, name: str, budget: float) -> float:
        """The budget that stands for this one: where whole layers buy nothing, the next that was trained."""
        trained = self.runs[self.seeds(name)[0]].get("trained", TRAINED)
        return min(b for b in trained if b >= budget)

    def seeds(self, name: str) -> list[str]:
        """The runs of a row over seeds that are there, or the one run of that name."""
        names = [name, *(f"{name}-{seed}" for seed in SEEDS)]
        return [n for n in names if n in self.runs]

    def values(self, name: str, budget: float = 1.0, key: str = "loss") -> list[float]:
        """A column at a budget, one value a seed that has it."""
        found = []
        for n in self.seeds(name):
            found += [row[key] for row in self.runs[n]["rows"] if row["budget"] == budget]
        return found

    def cell(self, name: str, budget: float = 1.0, key: str = "loss") -> str:
        """The same as mean and range."""
        return cell(self.values(name, budget, key))

    def free(self, name: str) -> list[float]:
        """Mean loss of every seed over the budgets that were not trained."""
        means = []
        for n in self.seeds(name):
            means.append(statistics.mean(self.row(n, b)["loss"] for b in FREE))
        return means

    def at(self, name: str, got: float) -> float:
        """The loss of a run at a cost, linear between the neighbours that it has."""
        rows = self.runs[name]["rows"]
        points = sorted({(row["got"], row["loss"]) for row in rows})
        smaller = [point for point in points if point[0] <= got]
        larger = [point for point in points if point[0] >= got]
        x, a = smaller[-1] if smaller else points[0]
        y, b = larger[0] if larger else points[-1]
        if x == y:
            return a
        return a + (b - a) * (got - x) / (y - x)


# -----------------------------------------------------------------------------
# cells


def cell(values: list[float], digits: int = 3) -> str:
    """Mean and range; a dash for no values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    low = f"{min(values):.{digits}f}"
    high = f"{max(values):.{digits}f}"
    return mean if low == mean == high else f"{mean} ({low} to {high})"


def asked(budget: float) -> str:
    """A budget, with a star if it was trained."""
    return f"{budget:.2f}*" if budget in TRAINED else f"{budget:.2f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_cells(row: dict) -> list[str]:
    """Prefill, decode and memory of a row, over the full model's."""
    speed = row.get("speed")
    if speed is None:
        return ["-"] * len(SPEEDS)
    return [f"{speed[key]:.2f}" for key in SPEEDS]


# -----------------------------------------------------------------------------
# tables


def family_table(r: Runs) -> str:
    """Every budget of the family. What training started from, parameters and speed are seed 0's."""
    rows = []
    for b in r.budgets:
        row = r.row("router-0", b)
        sizes = [r.cell("router", b, "got"), f"{row['params']:,}"]
        losses = [r.cell(BEFORE, b), r.cell("router", b)]
        rows.append([asked(b), *sizes, *losses, *speed_cells(row)])
    head = ["budget", "got", "parameters", "loss before training", "loss"]
    return markdown([*head, *SPEEDS], rows)


# How a model trained alone: prefix of the runs' names -> what it read.
ALONE = {
    "same": "alone, own tokens",
    "whole": "alone, all tokens",
    "scratch": "from scratch"}


def alone_table(r: Runs) -> str:
    """The trained members of the family of seed 0, and models of their shapes that trained
    alone."""
    rows = []
    for b in TRAINED:
        params = r.row("router-0", b)["params"]
        alone = [r.cell(f"{kind}-{b:.2f}") for kind in ALONE]
        rows.append([f"{params:,}", r.cell("router-0", b), *alone])
    return markdown(["parameters", "family", *ALONE.values()], rows)


# What is compared by its cost: label -> prefix of the runs' names.
COSTS = {
    "four alone, each its own tokens": "same",
    "four alone, each all tokens": "whole",
    "four from scratch": "scratch"}


def cost_table(r: Runs) -> str:
    """What the family cost and what four models that train alone cost, of seed 0."""
    compared = {"the family": ["router-0"]}
    for label, kind in COSTS.items():
        compared[label] = [f"{kind}-{b:.2f}-0" for b in TRAINED]

    family = r.runs["router-0"]
    # The machine is shared: the family's time is that of its median seed.
    time_of_family = statistics.median(r.runs[name]["seconds"] for name in r.seeds("router"))
    rows = []
    for label, names in compared.items():
        if not all(name in r.runs for name in names):
            continue
        runs = [r.runs[name] for name in names]
        tokens = sum(run["tokens"] for run in runs)
        flops = sum(run["flops"] for run in runs)
        seconds = [run["seconds"] for run in runs]
        time = "-"
        if label == "the family":
            time = "1.00"
        elif all(seconds):
            time = f"{sum(seconds) / time_of_family:.2f}"
        over = f"{flops / family['flops']:.2f}"
        rows.append([label, f"{tokens / 1e6:.2f}M", f"{flops:.2e}", over, time])
    head = ["", "tokens", "FLOPs", "FLOPs over the family's", "time over the family's"]
    return markdown(head, rows)


def penalty_table(r: Runs) -> str:
    """How near the penalty comes, and the loss of both at what it got. Budgets that got one slice
    from every seed share a row. Nothing without its runs."""
    seeds = [seed for seed in SEEDS if f"penalty-{seed}" in r.runs]
    if not seeds:
        return ""
    lines = {}  # cells without the budget -> its budgets
    for b in r.budgets:
        same = []
        for seed in seeds:
            got = r.row(f"penalty-{seed}", b)["got"]
            same.append(r.at(f"router-{seed}", got))
        cells = (r.cell("penalty", b, "got"), r.cell("penalty", b), cell(same))
        lines.setdefault(cells, []).append(b)
    rows = []
    for cells, budgets in lines.items():
        label = asked(budgets[0])
        if len(budgets) > 1:
            label += f" to {asked(budgets[-1])}"
        rows.append([label, *cells])

    # How far off each is, over all budgets and seeds.
    means, over = {}, {}
    for name in ("router", "penalty"):
        gaps = []
        for seed in seeds:
            gaps += [r.row(f"{name}-{seed}", b)["got"] - b for b in r.budgets]
        means[name] = cell([abs(gap) for gap in gaps])
        over[name] = sum(gap > 1e-9 for gap in gaps)
    head = ["asked", "penalty got", "penalty's loss", "constrained's loss at that cost"]
    n = len(seeds) * len(r.budgets)
    gaps = f"|got - asked|: constrained {means['router']}, penalty {means['penalty']}"
    over = f"over what was asked: {over['router']} and {over['penalty']} of {n}"
    return f"{markdown(head, rows)}\n\n{gaps}; {over}."


# Heads of the columns that compare whole families.
LOSSES = [f"loss at {b:g} [got]" for b in TRAINED] + [f"mean at {len(FREE)} budgets never trained"]

# What chooses the slices that are trained: prefix of the runs' names -> label.
CHOOSERS = {
    "router": "router (default)",
    "uniform": "uniform shrink",
    "random": "a random member",
    "frozen": "router alone, weights frozen",
    "width": "width, heads, MLP",
    "depth": "depth alone",
    "soft": "router, from soft passes"}


def behind_router(r: Runs, name: str) -> str:
    """How far a way to choose is behind the router's family of its seed, at the cost that it got. Each
    trained budget but 1 has the mean over seeds. Without a common seed it is a dash."""
    seeds = [seed for seed in SEEDS if f"{name}-{seed}" in r.runs and f"router-{seed}" in r.runs]
    if not seeds:
        return "-"
    cells = []
    for b in TRAINED[1:]:
        gaps = []
        for seed in seeds:
            row = r.row(f"{name}-{seed}", r.instead(name, b))
            gaps.append(row["loss"] - r.at(f"router-{seed}", row["got"]))
        cells.append(f"{statistics.mean(gaps):+.3f}")
    return ", ".join(cells)


def chooser_table(r: Runs) -> str:
    """A line per way to choose: loss and what was got at the trained budgets, the mean of the
    others, and how far behind the router it is at equal cost."""
    rows = []
    for name, label in CHOOSERS.items():
        seeds = len(r.seeds(name))
        if seeds == 0:
            continue
        cells = []
        for b in TRAINED:
            b = r.instead(name, b)
            got = r.cell(name, b, "got")
            cells.append(f"{r.cell(name, b)} [{got}]")
        behind = "" if name == "router" else behind_router(r, name)
        rows.append([label, str(seeds), *cells, cell(r.free(name)), behind])
    return markdown(["", "seeds", *LOSSES, "behind the router at equal cost: .8, .6, .4"], rows)


# One change at a time, of seed 0: run -> (what is changed, to what).
CHANGES = {
    "steps-half": ("steps x tokens", "half as many x twice as many"),
    "steps-double": ("", "twice as many x half as many"),
    "lr-1e-3": ("the Llama's rate", "1e-3"),
    "lr-4e-3": ("", "4e-3"),
    "modulation-none": ("modulation", "none"),
    "router-lr-2e-4": ("router's rate", "2e-4"),
    "router-lr-2e-3": ("", "2e-3"),
    "router-lr-4e-2": ("", "4e-2 (the paper's)"),
    "teach-0": ("passes that teach", "none"),
    "teach-0.25": ("", ".25"),
    "tau-1": ("tau", "stays 1"),
    "kd-0": ("share of KL to the base", "0"),
    "kd-0.5": ("", ".5"),
    "kd-1": ("", "1"),
    "units-random": ("order of units", "at random"),
    "units-reversed": ("", "worst first"),
    "depth-by-influence": ("order of layers", "by block influence")}


def change_table(r: Runs) -> str:
    """The default, and what each change makes of it. What a slice got is shown where the change
    moved it. Nothing if nothing was changed."""
    default = {b: r.row("router-0", b)["got"] for b in TRAINED}

    def cells(name: str) -> list[str]:
        """The columns of a run."""
        found = []
        for b in TRAINED:
            row = r.row(name, b)
            text = f"{row['loss']:.3f}"
            if name == "router-0" or abs(row["got"] - default[b]) >= 5e-4:
                text += f" [{row['got']:.3f}]"
            found.append(text)
        return [*found, cell(r.free(name))]

    rows = [["**default**", "", *cells("router-0")]]
    for name, (what, value) in CHANGES.items():
        if name in r.runs:
            rows.append([what, value, *cells(name)])
    if len(rows) == 1:
        return ""
    return markdown(["change", "to", *LOSSES], rows)


def shape_speed_table(r: Runs) -> str:
    """What slices of width alone and of depth alone cost to run, over the full model, beside the
    router's. Seed 0."""
    budgets = (0.8, 0.6, 0.4)
    rows = []
    labels = {
        "router-0": "router",
        "width-0": "width alone",
        "depth-0": "depth alone"}
    for name, label in labels.items():
        if name not in r.runs:
            continue
        cells = []
        for b in budgets:
            row = r.row(name, r.instead(name, b))
            got = f"[{row['got']:.3f}]"
            loss = f"{row['loss']:.3f}"
            speeds = ", ".join(speed_cells(row))
            cells.append(f"{speeds} {got} {loss}")
        rows.append([label, *cells])
    heads = [f"{', '.join(SPEEDS)} [got] loss at {b:g}" for b in budgets]
    return markdown(["", *heads], rows)


TABLES = {  # in the order of RESULTS.md
    "One family": family_table,
    "Models that train alone": alone_table,
    "What they cost": cost_table,
    "Meeting a budget": penalty_table,
    "What chooses": chooser_table,
    "What their slices cost to run": shape_speed_table,
    "One change at a time": change_table}

# -----------------------------------------------------------------------------
# the picture


def points(rows: list[dict]) -> tuple[list[float], list[float]]:
    """(millions of parameters, losses), the smallest first."""
    rows = sorted(rows, key=lambda row: row["params"])
    return [row["params"] / 1e6 for row in rows], [row["loss"] for row in rows]


def write_beside(axes, rows: list[dict], place: int, offset: tuple, text: str, colour: str) -> None:
    """A series' name, `offset` typographic points from its point number `place`."""
    sizes, losses = points(rows)
    axes.annotate(text, (sizes[place], losses[place]), offset, textcoords="offset points",
                  color=colour, fontsize=12, fontweight="bold")


def draw(r: Runs, path: Path) -> None:
    """Loss against parameters, of seed 0: slices of the base before training, the family after one
    run, models that trained alone. What is not there is left out. ImportError: no matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    family = r.runs["router-0"]["rows"]
    gray = "#555555"
    blue = "#1565c0"
    red = "#c62828"

    # (a) The same slices, cut from the sorted base before training.
    if BEFORE in r.runs:
        rows = r.runs[BEFORE]["rows"]
        axes.plot(*points(rows), color=gray, linewidth=2, linestyle="--")
        write_beside(axes, rows, len(rows) // 4, (12, 8), "cut out before training", gray)

    # (b) The family after one run: filled where a budget was trained, hollow where it never was.
    axes.plot(*points(family), color=blue, linewidth=2.5)
    trained = [row for row in family if row["budget"] in TRAINED]
    never = [row for row in family if row["budget"] not in TRAINED]
    # Filled over hollow: two budgets may buy one slice.
    axes.scatter(*points(trained), s=64, zorder=5, color=blue)
    axes.scatter(*points(never), s=64, zorder=4, edgecolors=blue, facecolors="white", linewidths=2)
    write_beside(axes, family, len(family) // 3, (0, -40),
                 "one run, every size\n(hollow: sizes that it never trained)", blue)

    # (c) Separate runs on the same tokens in all.
    names = [f"same-{b:.2f}-0" for b in TRAINED]
    rows = [r.row(name, 1.0) for name in names if name in r.runs]
    if rows:
        axes.scatter(*points(rows), s=64, zorder=3, color=red, marker="s")
        write_beside(axes, rows, 0, (10, 8), "four runs share the tokens", red)

    low, high = axes.get_ylim()
    axes.set_ylim(bottom=low - 0.15 * (high - low))  # room for the lowest name
    axes.set_xlabel("parameters without embeddings, millions", fontsize=12)
    axes.set_ylabel("loss on held-out text (nats)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


# -----------------------------------------------------------------------------
# the command line


def save_runs(path: Path, runs: dict) -> None:
    """results.json or real.json, a line a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, run in runs.items():
        lines.append(f"{json.dumps(name)}: {json.dumps(run)}")
    text = "{" + ",\n".join(lines) + "}\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def main(argv=None) -> None:
    """Prints all tables; collects first if asked to; draws if matplotlib is there."""
    p = Parser("python -m bench.results", __doc__)
    p.add_argument("--collect", metavar="DIR", help="folder of results.sh's runs to read first")
    p.add_argument("--assets", type=Path, default=ASSETS,
                   help="folder of results.json and family.png")
    args = p.parse_args(argv)
    path = args.assets / "results.json"
    if args.collect:
        save_runs(path, collect(args.collect))
    if not path.is_file():
        fail(f"{path} does not exist; expected the numbers of results.sh's runs; "
             "run: bash bench/results.sh")
    runs = Runs(json.loads(path.read_text(encoding="utf-8")))
    for title, table in TABLES.items():
        lines = table(runs)
        if lines:  # else nothing ran that it would show
            print(f"## {title}\n\n{lines}\n")
    picture = args.assets / "family.png"
    try:
        draw(runs, picture)
    except ImportError:
        print(f"{picture} was not drawn: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
