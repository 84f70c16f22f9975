"""
How do the router's choices move while it learns? What log.jsonl has of them, as a picture and a
table.

    python -m bench.choices --run out/flex                          the table
    python -m bench.choices --run out/flex --plot choices.png       and the picture, which needs matplotlib

For every budget under 1, over windows of the run: the mean size of the slices drawn on each axis,
as a share of the full size, and max p, the probability of the likeliest slice. At 1 the router has
decided.
"""
import json
from pathlib import Path

from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.params import read_config
from plumbing.pictures import check_picture, write_picture
from plumbing.state import LOG
from space import AXES

COLUMNS = [*AXES, "max_p"]


def read_log(folder) -> dict[int, dict]:
    """The steps of log.jsonl by number. A step that ran twice, after a crash, counts once: the last
    time."""
    path = Path(folder) / LOG
    if not path.is_file():
        fail(f"{path} does not exist; expected the folder of a run: python train.py --out {folder}")
    steps = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            fail(f"{path}:{number}: found {line[:40]!r}, "
                 "expected a JSON object, as train.py writes them; remove that line")
        if "sizes" in record:
            steps[record["step"]] = record
    if not steps:
        fail(f"{path} tells no sizes of what was drawn; expected the log of a run by today's train.py; "
             "train again")
    return steps


def windows(folder, n: int) -> list[dict]:
    """A row per window and budget under 1: budget, step (the window's middle), and the means of
    COLUMNS over the window's steps."""
    config = read_config(folder)
    full = (config.dim, config.n_heads, config.ffn_dim, config.n_layers)
    steps = read_log(folder)
    length = max(steps) + 1
    rows = []
    for k in range(n):
        first = k * length // n
        last = (k + 1) * length // n
        found = {}  # budget -> the rows of its draws
        for step in range(first, last):
            record = steps.get(step)
            if record is None:
                continue
            for budget, sizes, max_p in zip(record["budget"], record["sizes"], record["max_p"]):
                if budget < 1:
                    shares = [size / whole for size, whole in zip(sizes, full)]
                    found.setdefault(budget, []).append([*shares, max_p])
        for budget, draws in sorted(found.items()):
            means = [sum(column) / len(draws) for column in zip(*draws)]
            rows.append(dict(budget=budget, step=(first + last) // 2, **dict(zip(COLUMNS, means))))
    return rows


def text_table(rows: list[dict]) -> str:
    """windows() to read."""
    lines = [f"{'budget':>6} {'step':>7}" + "".join(f"{name:>10}" for name in COLUMNS)]
    for row in sorted(rows, key=lambda row: (-row["budget"], row["step"])):
        lines.append(f"{row['budget']:6.2f} {row['step']:7,}"
                     + "".join(f"{row[name]:10.3f}" for name in COLUMNS))
    return "\n".join(lines)


def plot(path, rows: list[dict]) -> None:
    """A panel per budget, a line per column of the table."""
    from matplotlib.figure import Figure

    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    figure = Figure(figsize=(3.2 * len(budgets), 2.8), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets):
        here = [row for row in rows if row["budget"] == budget]
        steps = [row["step"] for row in here]
        for name in COLUMNS:
            style = dict(color="black", linestyle=":", label="max p") if name == "max_p" else dict(label=name)
            panel.plot(steps, [row[name] for row in here], linewidth=1.2, **style)
        panel.set(title=f"budget {budget:g}", xlabel="step", ylim=(0, 1.05))
    panels[0].set_ylabel("share of the full size")
    panels[-1].legend(fontsize="x-small")

    write_picture(figure, path)


def main(argv=None) -> None:
    """The command line."""
    p = Parser("python -m bench.choices", __doc__)
    p.add_argument("--run", default="out/flex", help="folder of a run of train.py")
    p.add_argument("--windows", type=int, default=10,
                   help="rows per budget; the picture has ten times as many points")
    p.add_argument("--plot", help="picture to write: .png, .svg or .pdf")
    args = p.parse_args(argv)
    check_at_least_one(args, "windows")
    check_picture(args.plot)
    print(text_table(windows(args.run, args.windows)))
    if args.plot:
        plot(args.plot, windows(args.run, 10 * args.windows))


if __name__ == "__main__":
    run_main(main)
