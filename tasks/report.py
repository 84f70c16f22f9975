"""
The tasks in eval.py: names -> questions -> what a model scores on them -> the table.

    python eval.py --tasks piqa winogrande --limit 100      # the first rows of two tasks
    python eval.py --tasks all --json                       # all six, every metric of them
"""
import statistics

from model import Llama
from plumbing.errors import fail
from plumbing.parallel import bar, rank0_first, say
from plumbing.tables import row_label
from tasks.likelihood import Request, requests_of, score
from tasks.metrics import task_metrics
from tasks.questions import TASKS, Question, load_task

# -----------------------------------------------------------------------------
# before the first budget


def load_questions(names: list[str], folder, limit: int | None = None) -> dict[str, list[Question]]:
    """task -> its questions, from folder/task, the first `limit` only (of MMLU, of each subject).

    "all" is all six; a name given twice counts once. An unknown name, a missing or a damaged file:
    fail(). It needs no model, so it may run before one is loaded."""
    for name in names:
        if name not in TASKS and name != "all":
            fail(f"--tasks {name} found; expected some of {' '.join(TASKS)}, or all")
    if "all" in names:
        names = TASKS
    return {name: load_task(name, folder, limit) for name in dict.fromkeys(names)}


Encoded = tuple[list[Question], list[Request]]  # the questions of a task, and each as tokens


def encode_tasks(questions: dict[str, list[Question]], tokenizer, window: int) -> dict[str, Encoded]:
    """task -> (its questions, their requests): tokenised once, for all budgets.

    window: how many tokens the model reads at most. What a reader of the numbers must know is said:
    contexts that were cut, subjects of MMLU that are missing."""
    encoded = {}
    for name, asked in questions.items():
        requests = list(bar(requests_of(asked, tokenizer, window), f"{name}: tokens", len(asked)))
        encoded[name] = asked, requests
        subjects = {question.group for question in asked}
        if name == "mmlu" and len(subjects) != 57:
            say(f"mmlu: {len(subjects)} subjects of 57 are there; published figures are over all of "
                "them")
        cut = sum(request.cut for request in requests)
        if cut:
            say(f"{name}: {cut:,} of {len(asked):,} contexts lost their beginning to the window of "
                f"{window} tokens")
    return encoded


# -----------------------------------------------------------------------------
# a budget


def measure_tasks(model: Llama, tasks: dict[str, Encoded], subnet, factors, batch: int | None,
                  label: str) -> dict:
    """What a model scores, as keys of a budget's row: tasks, computed, average.

    tasks: of encode_tasks(). subnet, factors: what runs. batch: questions a forward, None: as many
    as fit. label: of the progress bars. All ranks must call it; they share the work."""
    metrics = {}
    computed = {}
    for name, (questions, requests) in tasks.items():
        scores, tokens = score(model, requests, subnet, factors, batch, f"{label} {name}")
        computed[name] = tokens
        metrics[name] = rank0_first(lambda: task_metrics(name, questions, scores))
    average = statistics.mean(metrics[name][TASKS[name].metric] for name in tasks)
    return dict(tasks=metrics, computed=computed, average=average)


# -----------------------------------------------------------------------------
# after the last one


def task_table(rows: list[dict], trained: list[float]) -> str:
    """The metric that the paper shows of each task, +- its standard error, and their average.

    rows: one a budget, with budget, got, params and what measure_tasks() found. trained: the budgets
    that training ran, which get a star."""
    names = list(rows[0]["tasks"])
    head = f"{'budget':>7} {'got':>6} {'parameters':>14}"
    for name in names:
        head += f" {name:>14}"
    lines = [f"{head} {'average':>8}"]
    for row in rows:
        line = f"{row_label(row, trained)} {row['got']:6.3f} {row['params']:14,}"
        for name in names:
            found = row["tasks"][name]
            metric = TASKS[name].metric
            cell = f"{found[metric]:.4f}±{found[metric + '_stderr']:.4f}"
            line += f" {cell:>14}"
        lines.append(f"{line} {row['average']:8.4f}")
    return "\n".join(lines)


def computed_tokens(rows: list[dict], tasks: dict[str, Encoded]) -> dict[str, tuple[int, int]]:
    """task -> (tokens computed for a budget, tokens that a forward for every choice would take).

    Every budget computes as many; those of the first row are taken."""
    counts = {}
    for name, (_, requests) in tasks.items():
        alone = 0
        for request in requests:
            for row_read, _ in request.choices:
                alone += len(request.rows[row_read])
        counts[name] = rows[0]["computed"][name], alone
    return counts


def computed_lines(counts: dict[str, tuple[int, int]]) -> list[str]:
    """What sharing saved, a line a task; counts: of computed_tokens()."""
    lines = []
    for name, (computed, alone) in counts.items():
        lines.append(f"{name}: {computed:,} tokens computed a budget; one forward for every choice "
                     f"would take {alone:,} ({alone / computed:.1f} times)")
    return lines
