"""
Tables of budgets for the eye: what eval.py and train.py print. A row is a dictionary, as --json has
it.
"""
import math

from plumbing.parallel import rank0_first, say


def mark(budget: float, trained: list[float]) -> str:
    """* for a budget that was trained, ! for one under all of those, a blank between them."""
    if budget in trained:
        return "*"
    return "!" if trained and budget < min(trained) else " "


def legend(budgets: list[float], trained: list[float]) -> str:
    """What the marks of a table mean, for the end of its headline; "" where nothing was trained."""
    text = "; * trained" if trained else ""
    if any(mark(budget, trained) == "!" for budget in budgets):
        text += ", ! under all that were"
    return text


def row_label(row: dict, trained: list[float]) -> str:
    """The first column: the budget and its mark; "base" for a row of --base."""
    if row.get("base"):
        return f"{'base':>6} "
    return f"{row['budget']:6.2f}{mark(row['budget'], trained)}"


def spread(sizes) -> str:
    """A size, or the range of those of the layers. Means over tokens are no whole numbers: they are
    rounded."""
    if isinstance(sizes, int):
        return str(sizes)
    if isinstance(sizes, float):
        return f"{sizes:.0f}"
    if len(set(sizes)) == 1:
        return spread(sizes[0])
    return f"{spread(min(sizes))}-{spread(max(sizes))}"


def loss_table(rows: list[dict], context: int, trained: list[float]) -> str:
    """Sizes and loss, a line a budget."""
    lines = [f"{'budget':>7} {'got':>6} {'dim':>5} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>14} "
             f"{'with emb.':>14} {'loss':>7} {'ppl':>8}   ({rows[0]['tokens']:,} tokens, windows of {context}"
             f"{legend([row.get('budget', 1.0) for row in rows], trained)})"]
    for r in rows:
        lines.append(f"{row_label(r, trained)} {r['got']:6.3f} {r['dim']:5d} {spread(r['n_heads']):>5} "
                     f"{spread(r['ffn_dim']):>6} {len(r['layers']):6d} {r['params']:14,} "
                     f"{r['params_total']:14,} {r['loss']:7.3f} {perplexity(r['loss']):8.2f}")
    return "\n".join(lines)


def perplexity(loss: float) -> float:
    """e to the loss in nats; infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def before_after_table(rows: list[dict], trained: list[float], tokens: int) -> str:
    """The family at the end of its training. A row also has `before`, the loss of the same slice of
    the sorted base, and `speed` in forward tokens/s; tokens: how many were scored."""
    lines = [f"{'budget':>7} {'got':>6} {'dim':>5} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>14} "
             f"{'before':>7} {'after':>7} {'tok/s':>9}   "
             f"(* trained; loss in nats on {tokens:,} held-out tokens)"]
    for r in rows:
        lines.append(f"{row_label(r, trained)} {r['got']:6.3f} {r['dim']:5d} {spread(r['n_heads']):>5} "
                     f"{spread(r['ffn_dim']):>6} {len(r['layers']):6d} {r['params']:14,} "
                     f"{r['before']:7.3f} {r['loss']:7.3f} {r['speed']:9,.0f}")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# what eval.py prints, beside the loss, of what other folders measure: each is imported where it is
# asked for


def say_results(result: dict, trained: list[float], tasks: dict, window: int) -> None:
    """The tables of loss and of the tasks. Adds to the result what the tasks took."""
    rows = list(result["rows"])
    if "base" in result:
        rows.append(result["base"])
    if "loss" in rows[0]:
        say(loss_table(rows, result["context"], trained))
    if tasks:
        from tasks.report import computed_lines, computed_tokens, task_table
        result["window"] = window
        result["computed"] = computed_tokens(rows, tasks)
        say(task_table(rows, trained))
        say("\n".join(computed_lines(result["computed"])))


def say_speed(result: dict, members: list, trained: list[float], window: int, batch: int, device) -> None:
    """Measures speed and memory on the first rank, adds them to the rows, prints their table."""
    from bench.speed import speed_table, speeds
    model = members[0].model
    subnets = [member.subnet for member in members]
    ratios, result["speed"] = rank0_first(lambda: speeds(model, subnets, window, batch, device))
    for row, ratio in zip(result["rows"], ratios):
        row["speed"] = ratio
    say(speed_table(result["rows"], result["speed"], trained))


def say_widths(members: list, rows: list[dict], window: list[int] | None, tokenizer) -> None:
    """The mean widths of every layer of a flextron folder's members; with a window of a text, what
    its tokens took."""
    from flextron.deployed import widths_table
    networks = [member.model for member in members]
    say(widths_table(networks, rows, window, tokenizer))
