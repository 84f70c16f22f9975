"""
The tables of RESULTS.md and the picture of README.md, from the runs of results.sh.

    python results.py --collect out/results    reads the runs into assets/results.json, and then as below
    python results.py                          the tables as Markdown, and assets/family.png, from assets/results.json

A cell over several seeds is their mean (smallest to largest); losses are nats per token on the same held-out text.
Runs that are not there are left out; results.sh makes them.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

from plumbing.params import PARAMS, read_config
from space import train_flops
from plumbing.files import atomic_write
from plumbing.errors import fail

ASSETS = Path(__file__).resolve().parent / "assets"
SEEDS, TRAINED = (0, 1, 2), (1.0, 0.8, 0.6, 0.4)
INSTEAD = {("depth", 0.6): 0.65}  # whole layers buy nothing at .6
FREE = (0.95, 0.9, 0.85, 0.75, 0.7, 0.55, 0.5, 0.45)  # budgets that no run trained

# -----------------------------------------------------------------------------
# reading the runs


def spent(folder: Path) -> dict:
    """What a run's log says it took: optimizer steps, tokens, training FLOPs (a soft pass runs everything), seconds:
    those of its median step, times the steps, since other programs slow some of them."""
    header, *records = [json.loads(line) for line in open(folder / "log.jsonl", encoding="utf-8")]
    steps = {r["step"]: r for r in records if "loss" in r}.values()  # a resumed run repeats some
    config, settings = read_config(folder), header["settings"]
    ran = [1.0 if soft else got for r in steps for soft, got in zip(r["soft"], r["got"])]
    flops = settings["batch_tokens"] * sum(train_flops(config, settings["seq_len"], share) for share in ran)
    return dict(steps=len(steps), tokens=len(ran) * settings["batch_tokens"], flops=flops,
                seconds=round(statistics.median(r.get("seconds", 0) for r in steps) * len(steps), 1),
                commit=header["commit"], torch=header["torch"], device=header["device"])


def collect(folder) -> dict:
    """All finished runs of a folder of results.sh: name -> what it took and its rows of eval.py."""
    keep = ("budget", "got", "params", "dim", "n_heads", "ffn_dim", "layers", "loss")
    runs = {}
    for path in sorted(Path(folder).glob("*.json")):
        if (path.with_suffix("") / PARAMS).exists():
            found = json.loads(path.read_text().splitlines()[-1])
            runs[path.stem] = spent(path.with_suffix("")) | dict(
                context=found["context"], tokens_scored=found["rows"][0]["tokens"],
                rows=[{k: round(row[k], 5) if k == "loss" else row[k] for k in keep} for row in found["rows"]])
            if (speed := path.with_suffix(".speed")).exists():
                for row, timed in zip(runs[path.stem]["rows"], json.loads(speed.read_text().splitlines()[-1])["rows"]):
                    row["speed"] = {k: round(v, 3) for k, v in timed["speed"].items()}
    return runs or fail(f"{folder} holds no finished run; expected what results.sh leaves; run: bash results.sh")


# -----------------------------------------------------------------------------
# tables


class Runs:
    """Look-ups in results.json by name and budget."""

    def __init__(self, runs: dict):
        if "router-0" not in runs:
            fail(f"no run router-0 among {len(runs)}, which the others are compared with; bash results.sh router-0")
        self.runs = runs
        self.budgets = [row["budget"] for row in runs["router-0"]["rows"]]

    def row(self, name: str, budget: float) -> dict:
        return next(row for row in self.runs[name]["rows"] if row["budget"] == budget)

    def seeds(self, name: str) -> list[str]:
        """The runs of a row over seeds that are there, or the one run of that name."""
        return [n for n in (name, *(f"{name}-{s}" for s in SEEDS)) if n in self.runs]

    def values(self, name: str, budget: float = 1.0, key: str = "loss") -> list[float]:
        return [self.row(n, budget)[key] for n in self.seeds(name)]

    def free(self, name: str) -> list[float]:
        """Mean loss of every seed over the budgets that were not trained."""
        return [statistics.mean(self.row(n, b)["loss"] for b in FREE) for n in self.seeds(name)]

    def at(self, name: str, got: float) -> float:
        """The loss of a run at a cost, linear between the neighbours that it has."""
        points = sorted({(row["got"], row["loss"]) for row in self.runs[name]["rows"]})
        below, above = [p for p in points if p[0] <= got][-1:] or points[:1], [p for p in points if p[0] >= got][:1]
        (x, a), (y, b) = below[0], (above or points[-1:])[0]
        return a if x == y else a + (b - a) * (got - x) / (y - x)


def cell(values: list[float], digits: int = 3) -> str:
    """Mean and range."""
    if not values:
        return "-"
    text = [f"{v:.{digits}f}" for v in (statistics.mean(values), min(values), max(values))]
    return text[0] if len(set(text)) == 1 else f"{text[0]} ({text[1]} to {text[2]})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def family_table(r: Runs) -> str:
    """Row 1: every budget of the family; sizes are seed 0's."""
    return markdown(["budget", "got", "parameters", "loss"],
                    [[f"{b:.2f}" + "*" * (b in TRAINED), cell(r.values("router", b, "got")),
                      f"{r.row('router-0', b)['params']:,}", cell(r.values("router", b))] for b in r.budgets])


def alone_table(r: Runs) -> str:
    """Row 1: the trained members of the family of seed 0, and models of their shapes that trained alone."""
    kinds = {"same": "alone, own tokens: 450 x 1,024", "small": "1,800 x 256", "scratch": "from scratch: 3,000 x 1,024",
             "large": "alone, all tokens: 450 x 4,096", "whole": "1,800 x 1,024", "high": "at 3e-3"}
    families = {"router-0": "family: 450 x 4 x 1,024", "steps-x4": "family: 1,800 x 4 x 256"}
    return markdown(["parameters", *families.values(), *kinds.values()],
                    [[f"{r.row('router-0', b)['params']:,}", *(cell(r.values(name, b)) for name in families),
                      *(cell(r.values(f"{kind}-{b:.2f}")) for kind in kinds)] for b in TRAINED])


def cost_table(r: Runs) -> str:
    """Row 1: what the family cost and what four models that train alone cost, of seed 0."""
    family, rows = r.runs["router-0"], []
    for name, kind in (("the family", None), ("four alone, each its own tokens", "same"),
                       ("four alone, each all tokens", "whole"),
                       ("four from scratch, each all tokens and the base's", "scratch")):
        names = ["router-0"] if kind is None else [f"{kind}-{b:.2f}-0" for b in TRAINED]
        if all(n in r.runs for n in names):
            total = {k: sum(r.runs[n][k] for n in names) for k in ("tokens", "flops", "seconds")}
            rows.append([name, f"{total['tokens'] / 1e6:.2f}M", f"{total['flops']:.2e}",
                         f"{total['flops'] / family['flops']:.2f}",
                         f"{total['seconds'] / family['seconds']:.2f}" if all(r.runs[n]["seconds"] for n in names)
                         else "-"])
    return markdown(["", "tokens", "FLOPs", "FLOPs over the family's", "time over the family's"], rows)


def budget_table(r: Runs) -> str:
    """Row 2: how near penalty and constrained come, and the loss of both at what the penalty got."""
    rows, seeds = [], [s for s in SEEDS if f"penalty-{s}" in r.runs]
    for b in r.budgets:
        same = [r.at(f"router-{s}", r.row(f"penalty-{s}", b)["got"]) for s in seeds]
        rows.append([f"{b:.2f}" + "*" * (b in TRAINED), cell(r.values("router", b, "got")),
                     cell(r.values("penalty", b, "got")), cell(r.values("penalty", b)), cell(same)])
    off = {name: [r.row(f"{name}-{s}", b)["got"] - b for s in seeds for b in r.budgets]
           for name in ("router", "penalty")}
    mean, over = ({name: of(gaps) for name, gaps in off.items()} for of in (
        lambda gaps: cell([abs(gap) for gap in gaps]), lambda gaps: sum(gap > 1e-9 for gap in gaps)))
    head = ["asked", "constrained got", "penalty got", "penalty's loss", "constrained's loss at that cost"]
    return (f"{markdown(head, rows)}\n\n|got - asked|: constrained {mean['router']}, penalty {mean['penalty']}; "
            f"over what was asked: {over['router']} and {over['penalty']} of {len(off['router'])}.")


def rows_table(r: Runs, names: dict[str, str]) -> str:
    """Rows 3 to 7: a line per run: loss (and what was got) at the trained budgets, and the mean of the others."""
    rows = []
    for name, label in names.items():
        if found := r.seeds(name):
            trained = [INSTEAD.get((name, b), b) for b in TRAINED]
            rows.append([label, str(len(found)), *(f"{cell(r.values(name, b))} [{cell(r.values(name, b, 'got'))}]"
                                                   for b in trained), cell(r.free(name))])
    head = ["", "seeds", *(f"loss at {b:g} [got]" for b in TRAINED), f"mean at {len(FREE)} budgets never trained"]
    return markdown(head, rows)


def speed_table(r: Runs) -> str:
    """Row 8: what a slice costs to run, as an export, over the full model; width and depth alone at similar sizes."""
    rows = []
    for name, label in (("router-0", "router"), ("width-0", "width alone"), ("depth-0", "depth alone")):
        for row in r.runs.get(name, {}).get("rows", ()):
            if "speed" in row and (name == "router-0" or row["budget"] in (0.8, 0.65, 0.4)):
                rows.append([label, f"{row['budget']:.2f}", f"{row['got']:.3f}", f"{row['loss']:.3f}",
                             *(f"{row['speed'][k]:.2f}" for k in ("prefill", "decode", "memory"))])
    return markdown(["", "budget", "got", "loss", "prefill, tokens/s", "decode, tokens/s", "memory"], rows)


TABLES = {
    "1. The family": family_table,
    "1. Models that train alone": alone_table,
    "1. What they cost": cost_table,
    "1. More and smaller steps, and a higher rate, the same tokens": {
        "router-0": "450 steps of 1,024 tokens per budget (default)", "steps-x2": "900 of 512",
        "steps-x4": "1,800 of 256",
        "lr-3e-3": "450 of 1,024, the Llama's rate 3e-3 instead of 1e-3"},
    "2. Meeting a budget": budget_table,
    "3. Modulation": {"router-0": "a factor per block and sub-block (default)", "modulation-none": "none",
                      "modulation-channel": "a factor per channel"},
    "4. What chooses, and from what": {
        "router": "router (default)", "uniform": "uniform shrink", "random": "a random member",
        "frozen": "router alone, weights frozen", "width": "width, heads, MLP",
        "depth": "depth alone (.65 in place of .6)"},
    "5. What teaches the router": {
        "router-0": "soft share 1, rate 1.4e-3, kappa to 10, tau to .056 (default)", "soft-0": "soft share 0",
        "soft-0.25": "soft share .25", "router-lr-4e-4": "rate 4e-4 (the paper's x .01)",
        "router-lr-4e-3": "rate 4e-3 (x .1)", "router-lr-4e-2": "rate 4e-2 (x 1)", "kappa-1": "kappa stays 1",
        "tau-1": "tau stays 1"},
    "6. Distillation": {"router-0": "cross-entropy (default)", "kd-0.5": "half, half", "kd-1": "KL to the base alone"},
    "7. Importance": {"router-0": "activation; layers by logits (default)", "units-random": "units at random",
                      "units-reversed": "units worst first", "depth-by-influence": "layers by block influence"},
    "8. What a budget costs to run, over the full model": speed_table}


def draw(r: Runs, path: Path) -> None:
    """Loss against parameters: one elastic run, and every model that trained alone."""
    from matplotlib.figure import Figure
    axes = (figure := Figure(figsize=(7, 5.4), layout="constrained")).add_subplot()
    million = r.runs["router-0"]["tokens"] / 1e6
    for name, colour, label in (("router-0", "tab:blue", f"one elastic run, {million:.1f}M tokens: every size"),
                                ("steps-x4", "tab:cyan", "the same in more, smaller steps")):
        if name not in r.runs:
            continue
        rows = sorted(r.runs[name]["rows"], key=lambda row: row["params"])
        axes.plot([row["params"] / 1e6 for row in rows], [row["loss"] for row in rows], color=colour, label=label)
        for trained, face in ((True, colour), (False, "white")):
            some = [row for row in rows if (row["budget"] in TRAINED) == trained]
            axes.scatter([row["params"] / 1e6 for row in some], [row["loss"] for row in some], s=22, zorder=4,
                         edgecolors=colour, facecolors=face)
    for kind, label, colour, mark in (
            ("same", f"models alone, {million / 4:.1f}M tokens each", "tab:orange", "v"),
            ("whole", f"models alone, {million:.1f}M tokens each", "tab:red", "s"),
            ("scratch", "from scratch, on those tokens and the base's", "tab:gray", "x")):
        four = [r.runs[n]["flops"] for b in TRAINED if (n := f"{kind}-{b:.2f}-0") in r.runs]
        if len(four) == len(TRAINED):
            label += f" (the four of them: {sum(four) / r.runs['router-0']['flops']:.2g} times the run's FLOPs)"
        points = [(r.row(n, 1.0)["params"] / 1e6, r.row(n, 1.0)["loss"])
                  for b in TRAINED for n in r.seeds(f"{kind}-{b:.2f}")]
        if points:
            axes.scatter(*zip(*points), label=label, color=colour, marker=mark, s=22, zorder=2)
    axes.set(xlabel="parameters without embeddings, millions", ylabel="loss on held-out text, nats per token")
    figure.legend(loc="outside lower center", frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def main(argv=None) -> None:
    """Prints all tables; collects first if asked to; draws if matplotlib is there."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python results.py --help lists the flags")
    p.add_argument("--collect", metavar="DIR", help="folder of results.sh's runs to read into results.json first")
    p.add_argument("--assets", type=Path, default=ASSETS, help="folder of results.json and family.png")
    args = p.parse_args(argv)
    path = args.assets / "results.json"
    if args.collect:
        runs = collect(args.collect)
        args.assets.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            lines = [f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]  # a line a run
            file.write(("{" + ",\n".join(lines) + "}\n").encode())
    if not path.is_file():
        fail(f"{path} does not exist; expected the numbers of results.sh's runs; run: bash results.sh")
    runs = Runs(json.loads(path.read_text()))
    for title, table in TABLES.items():
        print(f"## {title}\n\n{table(runs) if callable(table) else rows_table(runs, table)}\n")
    try:
        draw(runs, args.assets / "family.png")
    except ImportError:
        print(f"{args.assets / 'family.png'} was not drawn: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
