"""
A picture of a family: loss, or average accuracy on the tasks, against parameters.

    python eval.py --plot flex.png                      needs matplotlib
    python eval.py --plot flex.png --base out/base      with a dense Llama as a dashed line
"""
from plumbing.pictures import write_picture


def plot(path: str, rows: list[dict], base: dict | None, trained, title: str) -> None:
    """Draws eval.py's rows into `path` (.png, .svg or .pdf). Budgets in `trained` are filled
    points, others hollow. base: the row of a dense Llama, or None."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    key = "loss"
    name = "loss (nats)"
    if "average" in rows[0]:
        key = "average"
        name = "average accuracy"

    # The family: a line, and a point for every budget.
    rows = sorted(rows, key=lambda row: row["params"])
    sizes = [row["params"] for row in rows]
    axes.plot(sizes, [row[key] for row in rows], color="tab:blue", linewidth=1)
    for kind, colour in (("trained", "tab:blue"), ("interpolated", "white")):
        filled = kind == "trained"
        points = [row for row in rows if (row["budget"] in trained) == filled]
        sizes = [row["params"] for row in points]
        axes.scatter(sizes, [row[key] for row in points], label=kind if points else None, zorder=3,
                     edgecolors="tab:blue", facecolors=colour)

    # The dense Llama: a line across.
    if base:
        label = f"dense, {base['params']:,} parameters"
        axes.axhline(base[key], color="tab:gray", linestyle="--", label=label)

    axes.set(xlabel="parameters without embeddings", ylabel=name, title=title)
    axes.legend()
    write_picture(figure, path)
