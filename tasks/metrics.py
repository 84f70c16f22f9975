"""
Log-likelihoods -> metrics of a task, as EleutherAI's lm-evaluation-harness prints them.

    acc           the choice with the largest sum of log p is the right one
    acc_norm      the same with the sum divided by the characters of the choice
    perplexity    LAMBADA: exp(-mean log p of the last word); the unit is the word, not its tokens
    acc_macro     MMLU: the mean over subjects, each as much as any other (acc: over all questions)
    *_stderr      standard errors: sample standard deviation / sqrt(n), unless a docstring says more
"""
import math

import numpy as np

from tasks.questions import TASKS, Question


def task_metrics(name: str, questions: list[Question], scores: list) -> dict:
    """The metrics of a task, and n, the number of its questions.

    scores: for each question, for each choice, the log-likelihood in nats and whether every token
    of it was the most likely one."""
    sums = [np.array([log_p for log_p, _ in score]) for score in scores]
    if name == "lambada_openai":
        return lambada_metrics(sums, scores)
    hits = []
    for question, choices in zip(questions, sums):
        best = choices.argmax()  # of equal ones the first wins
        hits.append(best == question.gold)
    acc, stderr = mean_stderr(hits)
    found = dict(acc=acc, acc_stderr=stderr, n=len(questions))
    if name == "mmlu":
        subjects = {}
        for question, hit in zip(questions, hits):
            subjects.setdefault(question.group, []).append(hit)
        found.update(over_subjects(subjects))
    if TASKS[name].normed:
        acc_norm, stderr = mean_stderr(normed_hits(questions, sums))
        found.update(acc_norm=acc_norm, acc_norm_stderr=stderr)
    return found


def normed_hits(questions: list[Question], sums: list[np.ndarray]) -> list[bool]:
    """Is the choice with the largest sum per character the right one?"""
    hits = []
    for question, choices in zip(questions, sums):
        lengths = np.array(question.lengths, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):  # a choice may be empty
            best = (choices / lengths).argmax()
        hits.append(best == question.gold)
    return hits


def lambada_metrics(sums: list[np.ndarray], scores: list) -> dict:
    """Is every token of the word the most likely one (acc)? And the word's perplexity."""
    greedy = [score[0][1] for score in scores]  # of the one choice
    acc, stderr = mean_stderr(greedy)
    logs = np.array([choices[0] for choices in sums])
    perplexity = float(np.exp(-logs.mean()))
    return dict(acc=acc, acc_stderr=stderr, perplexity=perplexity,
                perplexity_stderr=perplexity_stderr(logs), n=len(scores))


def mean_stderr(values) -> tuple[float, float]:
    """(mean, standard error of it: sample standard deviation / sqrt(n)); one value has none: nan."""
    values = np.asarray(values, dtype=float)
    mean = values.mean().item()
    if len(values) < 2:
        return mean, math.nan
    return mean, values.std(ddof=1).item() / math.sqrt(len(values))


def perplexity_stderr(logs: np.ndarray, samples: int = 100_000) -> float:
    """The spread of the perplexity over resamples of the rows, with the draws of the harness.

    Those are the draws of Python's generator, seeded 0, 1, ... for a thousand resamples each.
    NumPy's generator runs through the same numbers, faster."""
    n = len(logs)
    if n < 2:
        return math.nan
    found = []
    for seed in range(samples // 1000):
        uniform = np.random.RandomState([seed]).random_sample((1000, n))
        rows = (uniform * n).astype(int)
        found.append(np.exp(-logs[rows].mean(1)))
    return np.concatenate(found).std(ddof=1).item()


def over_subjects(hits: dict[str, list[bool]]) -> dict:
    """MMLU's figures from the hits of each subject.

    The error of the mean over all questions is that of the pooled variance within subjects."""
    sizes = np.array([len(some) for some in hits.values()])
    stats = [mean_stderr(some) for some in hits.values()]
    means, errors = np.array(stats).T
    within = math.nan  # a subject with one question has no variance
    if sizes.min() > 1:
        squares = (sizes - 1) * sizes * errors ** 2
        within = squares.sum() / (sizes.sum() - len(sizes))
    macro_stderr = math.sqrt((errors ** 2).sum()) / len(sizes)
    return dict(
        acc_stderr=math.sqrt(within / sizes.sum()),
        acc_macro=means.mean().item(),
        acc_macro_stderr=macro_stderr,
        subjects=dict(zip(hits, means.tolist())))
