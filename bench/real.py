"""
The table of a real Llama in RESULTS.md, from the runs of real.sh.

    python -m bench.real --collect out/real     reads the runs into assets/real.json first
    python -m bench.real                        prints the tables as Markdown, draws real.png

A row is a model of some size. "Exp.": the budget was trained. "Inter.": it lies between trained ones, and
no step ran it; "under": it is smaller than all of them.
"""
import json
import math
import sys
from pathlib import Path

from bench import quantised
from bench.results import ASSETS, last_object, points, save_runs, spent
from plumbing.checkpoint import RESUME
from plumbing.errors import Parser, fail, run_main
from plumbing.files import atomic_write
from plumbing.state import LOG
from tasks.questions import TASKS

WHAT = {
    "base": "the base, untouched",
    "family": "**the family**",
    "long": "the family, four times the tokens",
    "plain": "the family without a teacher",
    "depth": "layers alone",
    "width": "width alone",
    "cut": "the family's slice, no training",
    "own": "it alone, on its own tokens",
    "all": "it alone, on all tokens",
    "search": "search, no training",
    "text": "it alone, on as many of other text",
    "written": "it alone, on as many that the base wrote"}
CURVES = ("family", "long")  # runs whose losses are shown as they fall
MMLU = "mmlu"            # asked of some only
QUANTISED = "quantised"  # sizes in encodings: a table of its own

# -----------------------------------------------------------------------------
# reading the runs


def losses_by_tokens(folder: Path) -> dict[str, dict]:
    """Of a run's log: budget -> {tokens that training has read for all budgets: held-out loss}."""
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    header, *records = [json.loads(line) for line in lines]
    settings = header["settings"]
    a_step = settings["batch_tokens"] * len(settings["budgets"])
    curves = {}
    for record in records:
        for budget, loss in record.get("val", {}).items():
            curves.setdefault(budget, {})[str(record["step"] * a_step)] = round(loss, 4)
    return curves


def collect(folder) -> dict:
    """All finished runs in a folder of real.sh: name -> its rows and, if it trained, what it took."""
    runs = {}
    for path in sorted(Path(folder).glob("*.json")):
        if path.stem.partition("-")[0] not in (*WHAT, QUANTISED):
            continue  # real.json of a part
        if path.stem == QUANTISED:
            found = last_object(path)
            runs[QUANTISED] = dict(tokens=found["tokens"], rows=found["rows"])
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found, heldout, *more = map(json.loads, lines)  # judge() in real.sh
        mmlu = {row["budget"]: row["tasks"] for answers in more for row in answers["rows"]}
        trained = path.with_suffix("")
        run = dict(trained=found["trained"], rows=[])
        if (trained / LOG).exists() and (trained / RESUME).exists() and not path.stem.startswith("search"):
            run |= spent(trained)
            run["losses"] = losses_by_tokens(trained)
        for row, other in zip(found["rows"], heldout["rows"]):
            kept = {key: row[key] for key in ("budget", "got", "params", "dim", "n_heads", "ffn_dim")}
            kept |= dict(n_layers=len(row["layers"]), loss=round(row["loss"], 5), tokens=row["tokens"],
                         heldout=round(other["loss"], 5), heldout_tokens=other["tokens"])
            answers = row["tasks"] | mmlu.get(row["budget"], {})
            kept["tasks"] = {name: [round(metrics[TASKS[name].metric], 5), metrics["n"]]
                             for name, metrics in answers.items()}
            run["rows"].append(kept)
        runs[path.stem] = run
    if "base" not in runs:
        fail(f"{folder} holds no base.json; expected what real.sh leaves; run: bash bench/real.sh")
    return runs


# -----------------------------------------------------------------------------
# the tables


def kind_of(name: str, run: dict, budget: float) -> str:
    """Exp., Inter. or under; nothing for what has one size."""
    if len(run["rows"]) == 1:
        return ""
    if budget in run["trained"]:
        return "Exp."
    return "Inter." if budget > min(run["trained"]) else "under"


def table(runs: dict) -> str:
    """A row per model and size, the largest first; at one size in WHAT's order. The average is that of the
    tasks that all were asked: MMLU's questions are long."""
    names = list(runs["base"]["rows"][0]["tasks"])
    common = [name for name in names if name != MMLU]
    head = ["parameters [share]", "model", "", "held out", "WikiText-2", *common, "average"]
    if MMLU in names:
        head.append(MMLU)
    full = runs["base"]["rows"][0]["params"]
    order = list(WHAT)
    lines = []
    for name, run in runs.items():
        what, _, size = name.partition("-")
        if what == QUANTISED:
            continue
        for row in run["rows"]:
            asked = float(size or round(row["budget"], 1))  # own-0.60 has one size, and runs at 1.0
            shares = [row["tasks"][name][0] for name in common]
            cells = [f"{row['params'] / 1e6:.1f}M [{row['params'] / full:.3f}]", WHAT[what],
                     kind_of(name, run, row["budget"]), f"{row['heldout']:.3f}",
                     f"{math.exp(row['loss']):.2f}",
                     *(f"{share:.3f}" for share in shares), f"{sum(shares) / len(shares):.3f}"]
            if MMLU in names:
                cells.append(f"{row['tasks'][MMLU][0]:.3f}" if MMLU in row["tasks"] else "-")
            lines.append((-asked, order.index(what), "| " + " | ".join(cells) + " |"))
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                      *(line for *_, line in sorted(lines))])


def curve_table(run: dict) -> str:
    """Held-out loss of a family's budgets as training goes on."""
    curves = run["losses"]
    tokens = sorted({int(n) for curve in curves.values() for n in curve})
    lines = ["| budget | " + " | ".join(f"{n:,} tokens" for n in tokens) + " |",
             "|---" * (len(tokens) + 1) + "|"]
    for budget, curve in curves.items():
        lines.append(f"| {budget} | "
                     + " | ".join(f"{curve.get(str(n), math.nan):.3f}" for n in tokens) + " |")
    return "\n".join(lines)


def cost_table(runs: dict) -> str:
    """What each training took."""
    lines = ["| run | steps | tokens | FLOPs | hours | products in | commit |", "|---" * 7 + "|"]
    for name, run in runs.items():
        if "flops" in run:
            lines.append(f"| {name} | {run['steps']} | {run['tokens']:,} | {run['flops']:.1e} "
                         f"| {run['seconds'] / 3600:.1f} | {run['autocast']} | {run['commit']} |")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# the picture


SERIES = {"cut": ("cut out, not trained", "#555555", "--"), "width": ("width alone", "#2e7d32", "-"),
          "depth": ("layers alone", "#ef6c00", "-"), "family": ("one run, every size", "#1565c0", "-"),
          "long": ("the same on four times the tokens", "#64b5f6", "-")}
ALONE = {"own": ("its own share of the tokens, alone", "#c62828", "s"),
         "all": ("all tokens, alone", "#6a1b9a", "D")}


def rows_of(runs: dict, what: str) -> list[dict]:
    """The rows of a model in all sizes, as the picture wants them."""
    rows = []
    for name, run in runs.items():
        if name.partition("-")[0] == what:
            rows += [dict(params=row["params"], loss=row["heldout"]) for row in run["rows"]]
    return rows


def draw(runs: dict, path: Path) -> None:
    """Held-out loss against parameters. What is not there is left out. ImportError: no matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    whole = rows_of(runs, "base")
    for what, (label, colour, dashes) in SERIES.items():
        rows = rows_of(runs, what)
        if rows:
            start = whole if what == "cut" else []  # the cut of everything is the base
            axes.plot(*points(rows + start), color=colour, linestyle=dashes,
                      linewidth=2.5 if what == "family" else 1.6, marker="o", label=label)
    for what, (label, colour, marker) in ALONE.items():
        rows = rows_of(runs, what)
        if rows:
            axes.scatter(*points(rows), s=48, zorder=3, color=colour, marker=marker, label=label)
    axes.set_xlabel("parameters without embeddings, millions", fontsize=12)
    axes.set_ylabel("loss on held-out text (nats)", fontsize=12)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def main(argv=None) -> None:
    """Prints the tables and draws the picture; collects first if asked to."""
    p = Parser("python -m bench.real", __doc__)
    p.add_argument("--collect", help="a folder of real.sh's runs to read into real.json")
    p.add_argument("--assets", default=str(ASSETS), help="where real.json is")
    args = p.parse_args(argv)
    path = Path(args.assets) / "real.json"
    if args.collect:
        save_runs(path, collect(args.collect))
    if not path.exists():
        fail(f"{path} is not there; expected the runs of real.sh in it; run: bash bench/real.sh")
    runs = json.loads(path.read_text(encoding="utf-8"))
    rows = runs["base"]["rows"][0]
    print(f"Held out: nats on {rows['heldout_tokens']:,} tokens. "
          f"WikiText-2: perplexity on {rows['tokens']:,}. Tasks: "
          + ", ".join(f"{name} {n} rows" for name, (_, n) in rows["tasks"].items()) + "\n")
    print(table(runs))
    for name in CURVES:
        if name in runs:
            print("\n" + curve_table(runs[name]))
    if QUANTISED in runs:
        print("\n" + quantised.table(runs[QUANTISED]["rows"]))
    print("\n" + cost_table(runs))
    picture = path.with_suffix(".png")
    try:
        draw(runs, picture)
    except ImportError:
        print(f"{picture} was not drawn: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
