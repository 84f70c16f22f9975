"""
The paper's six benchmark tasks: rows of a public file -> questions -> requests in tokens -> metrics.

LLaMaFlex Sec. 4 reports ARC-easy, LAMBADA, PIQA, WinoGrande, MMLU (5-shot) and HellaSwag (10-shot). Everyone compares
by the numbers of EleutherAI's lm-evaluation-harness; prompts, few-shot draws, token borders, metrics and standard
errors here are its own, so a number of `python eval.py --tasks` is the number it prints for the same model and files.

A question is a list of (context, continuation), one a choice. The model scores log p(continuation | context); the
answer is the choice with the largest sum (acc), or the largest sum per character (acc_norm).

    python data/tasks.py                      downloads what has a public address to data/tasks
    data/tasks/piqa/valid.jsonl               files keep the names they were published under; or the rows of the
    data/tasks/piqa/validation.jsonl          Hugging Face data set of that name, a JSON object a line
"""
import csv
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np

from data.tokenizer import encode_document
from plumbing.errors import fail

LETTERS = "ABCD"


class Question(NamedTuple):
    """One row of a task. pairs: (context, continuation) of each choice; lengths: the characters of each choice, which
    acc_norm divides by; gold: the index of the answer; where: file:line; group: MMLU's subject."""
    pairs: list[tuple[str, str]]
    lengths: list[int]
    gold: int
    where: str
    group: str = ""


# -----------------------------------------------------------------------------
# files


class Row(dict):
    """A row that knows its place in a file, and complains of what it lacks."""

    def __init__(self, where: str, fields: dict):
        super().__init__(fields)
        self.where = where

    def bad(self, what: str):
        fail(f"{self.where}: {what}; mend that row, or download the file again: python data/tasks.py")

    def text(self, name: str) -> str:
        """A field that must be a string."""
        if not isinstance(self.get(name), str):
            self.bad(f"found {json.dumps(self.get(name))[:60]} as {name!r}, expected a string")
        return self[name]

    def strings(self, name: str, at_least: int = 2) -> list[str]:
        """A field that must be a list of strings."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) < at_least or not all(isinstance(v, str) for v in value):
            self.bad(f"found {json.dumps(value)[:60]} as {name!r}, expected a list of {at_least} strings or more")
        return value

    def index(self, name: str, n: int, first: int = 0) -> int:
        """A field that must count one of n choices, 3 or "3"; from 0."""
        value = self.get(name)
        if not re.fullmatch(r"\d+", str(value)) or not first <= int(value) < first + n or isinstance(value, bool):
            self.bad(f"found {json.dumps(value)[:60]} as {name!r}, expected {first} to {first + n - 1}")
        return int(value) - first


def jsonl(path: Path) -> Iterator[Row]:
    """The rows of a file with a JSON object a line."""
    with open(path, "rb") as file:  # bytes: text may hold line ends that only Unicode knows
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield Row(f"{path}:{number}", dict(json.loads(line.decode("utf-8"))))
            except (ValueError, TypeError):
                fail(f"{path}:{number}: found {line[:40]!r}, expected a JSON object in UTF-8; mend that line, or "
                     "download the file again: python data/tasks.py")


def table(path: Path) -> Iterator[Row]:
    """The rows of one of MMLU's files: question, A, B, C, D, letter; no header, line ends inside quotes."""
    data, line = path.read_bytes(), 1
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8"), newline=None))
        for cells in reader:
            row, line = Row(f"{path}:{line}", {}), reader.line_num + 1  # a row may have several lines
            if cells and (len(cells) != 6 or cells[5] not in list(LETTERS)):
                row.bad(f"found {len(cells)} columns that end in {cells[-1][:20]!r}, expected a question, four choices "
                        "and a letter A to D")
            if cells:
                row.update(question=cells[0], choices=cells[1:5], answer=LETTERS.index(cells[5]))
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        line = data.count(b"\n", 0, error.start) + 1 if isinstance(error, UnicodeDecodeError) else line
        fail(f"{path}:{line}: cannot read it ({error}); expected CSV in UTF-8; download it: python data/tasks.py")


def find(folder: Path, *names: str) -> Path:
    """The first of the names that exists in the folder of a task."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    fail(f"{' or '.join([str(folder / names[0]), *names[1:]])} is missing; {folder.name} comes from "
         f"{TASKS[folder.name].source}; python data/tasks.py {folder.name} --out {folder.parent} downloads it")


# -----------------------------------------------------------------------------
# rows -> questions


def arc_easy(folder: Path) -> Iterator[Question]:
    """Zero-shot; three to five choices, labelled with letters or digits."""
    for row in jsonl(find(folder, "ARC-Easy-Test.jsonl", "test.jsonl")):
        if isinstance(row.get("question"), dict):  # as published; Hugging Face has the columns side by side
            stem = row["question"]
            options = stem.get("choices") if isinstance(stem.get("choices"), list) else []
            columns = {k: [c.get(k) for c in options if isinstance(c, dict)] for k in ("text", "label")}
            row = Row(row.where, dict(row, question=stem.get("stem"), choices=columns))
        columns = Row(row.where, row["choices"] if isinstance(row.get("choices"), dict) else {})
        context = f"Question: {row.text('question')}\nAnswer:"
        choices, labels = columns.strings("text"), columns.strings("label")
        if row.get("answerKey") not in labels or len(labels) != len(choices):
            row.bad(f"found the answerKey {row.get('answerKey')!r} and the labels {labels} of {len(choices)} choices, "
                    "expected one of as many labels")
        yield Question([(context, " " + c) for c in choices], [len(c) for c in choices],
                       labels.index(row["answerKey"]), row.where)


def lambada_openai(folder: Path) -> Iterator[Question]:
    """Zero-shot: the last word of a passage. The one choice is right if every token of it is the most likely one."""
    for row in jsonl(find(folder, "lambada_test.jsonl", "test.jsonl")):
        context, blank, word = row.text("text").rpartition(" ")
        yield Question([(context, " " + word)], [len(word)], 0, row.where)


def piqa(folder: Path) -> Iterator[Question]:
    """Zero-shot: two ways to reach a goal. As published, the answers are in a file of their own."""
    path = find(folder, "valid.jsonl", "validation.jsonl", "dev.jsonl")
    rows = list(jsonl(path))
    if rows and "label" not in rows[0]:
        labels = find(folder, f"{path.stem}-labels.lst")
        lines = labels.read_text().split()
        if len(lines) != len(rows):
            fail(f"{labels}:{len(lines)}: ends here, but {path} has {len(rows)} rows; expected as many labels; "
                 "download both again: python data/tasks.py piqa")
        for row, label, number in zip(rows, lines, range(1, len(lines) + 1)):
            row["label"] = Row(f"{labels}:{number}", dict(label=label)).index("label", 2)
    for row in rows:
        context, choices = f"Question: {row.text('goal')}\nAnswer:", [row.text("sol1"), row.text("sol2")]
        yield Question([(context, " " + c) for c in choices], [len(c) for c in choices], row.index("label", 2),
                       row.where)


def winogrande(folder: Path) -> Iterator[Question]:
    """Zero-shot: two fillings of a blank. What follows it is scored, the same text after either: the choice is in the
    context."""
    for row in jsonl(find(folder, "dev.jsonl", "validation.jsonl")):
        before, blank, after = row.text("sentence").partition("_")
        if not blank:
            row.bad(f"found no blank in {row['sentence'][:60]!r}, expected a '_'")
        options = [row.text("option1"), row.text("option2")]
        yield Question([(before + option, " " + after.strip()) for option in options], [len(o) for o in options],
                       row.index("answer", 2, first=1), row.where)


def hellaswag(folder: Path) -> Iterator[Question]:
    """Ten-shot: four endings of a scene. One generator draws the shots of all rows in order, from the whole of train;
    so they do not depend on who scores which row. Eleven are drawn, lest the row itself be among them."""
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))  # WikiHow's marks
        return text.replace("  ", " ")

    def parts(row: Row) -> tuple[str, list[str], int]:
        context = f"{row.text('activity_label')}: {row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
        endings = row.strings("endings")
        return clean(context), [clean(e) for e in endings], row.index("label", len(endings))

    path = find(folder, "hellaswag_train.jsonl", "train.jsonl")
    train, shots, draw = list(jsonl(path)), [], random.Random(1234)
    if len(train) < 11:
        fail(f"{path}:{len(train)}: ends here, expected 11 rows or more to draw ten shots from")
    for row in train:
        query, endings, gold = parts(row)
        shots.append(f"{query} {endings[gold]}\n\n")
    for row in jsonl(find(folder, "hellaswag_val.jsonl", "validation.jsonl")):
        drawn = [i for i in draw.sample(range(len(train)), 11) if train[i] != row][:10]
        if len(drawn) < 10:  # the row is in train more than once
            drawn = draw.sample([i for i in range(len(train)) if train[i] != row], 10)
        query, endings, gold = parts(row)
        context = "".join(shots[i] for i in drawn) + query
        yield Question([(context, " " + e) for e in endings], [len(e) for e in endings], gold, row.where)


def mmlu(folder: Path) -> Iterator[Question]:
    """Five-shot: four choices in 57 subjects, each with five answered examples. The letter is scored."""
    def ask(row: Row) -> str:
        choices = row.strings("choices", 4)
        if len(choices) != 4:
            row.bad(f"found {len(choices)} choices, expected four")
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices)]
        return "\n".join([row.text("question").strip(), *lines, "Answer:"])

    def split(name: str) -> dict[str, list[Row]]:
        found = sorted((folder / name).glob(f"*_{name}.csv"))
        if found:
            return {path.name.removesuffix(f"_{name}.csv"): list(table(path)) for path in found}
        rows: dict[str, list[Row]] = {}
        for row in jsonl(find(folder, f"{name}.jsonl", f"{name}/SUBJECT_{name}.csv")):
            rows.setdefault(row.text("subject"), []).append(row)
        return rows

    dev = split("dev")
    for subject, rows in split("test").items():
        if len(dev.get(subject, [])) < 5:
            fail(f"{folder}: found {len(dev.get(subject, []))} dev rows of {subject}, expected 5; "
                 "python data/tasks.py mmlu downloads them")
        header = "The following are multiple choice questions (with answers) about " + subject.replace("_", " ")
        shots = [f"{ask(row)} {LETTERS[row.index('answer', 4)]}" for row in dev[subject][:5]]
        for row in rows:
            context = "\n\n".join([header + ".", *shots, ask(row)])
            yield Question([(context, " " + letter) for letter in LETTERS], [1] * 4, row.index("answer", 4), row.where,
                           subject)


class Task(NamedTuple):
    """How to read a task, the metric that the paper's table shows, and where its files come from."""
    questions: Callable[[Path], Iterator[Question]]
    metric: str
    source: str
    normed: bool = True  # acc_norm means something


TASKS = {"arc_easy": Task(arc_easy, "acc", "ARC-V1-Feb2018.zip of allenai.org/data/arc"),
         "lambada_openai": Task(lambada_openai, "acc", "openaipublic.blob.core.windows.net/gpt-2/data", False),
         "piqa": Task(piqa, "acc", "yonatanbisk.com/piqa"),
         "winogrande": Task(winogrande, "acc", "winogrande_1.1.zip of winogrande.allenai.org", False),
         "hellaswag": Task(hellaswag, "acc_norm", "github.com/rowanz/hellaswag"),
         "mmlu": Task(mmlu, "acc", "data.tar of github.com/hendrycks/test", False)}


def load_task(name: str, folder, limit: int | None = None) -> list[Question]:
    """The questions of a task from folder/name, the first `limit` only; of MMLU, of each subject."""
    seen: dict[str, int] = {}
    questions = []
    for question in TASKS[name].questions(Path(folder) / name):  # all rows are read, so a bad one is always found
        seen[question.group] = seen.get(question.group, 0) + 1
        if limit is None or seen[question.group] <= limit:
            questions.append(question)
    return questions or fail(f"{Path(folder) / name}: the files of {name} hold no rows; python data/tasks.py {name} "
                             "downloads them")


# -----------------------------------------------------------------------------
# questions -> requests in tokens


class Request(NamedTuple):
    """A question in tokens. rows: the distinct inputs of the model (MMLU's letters share one); choices: for each
    choice the row it reads and the tokens that the row's last positions should predict; prefix: how many first tokens
    all rows share, and none of them needs to predict from; cut: the context was longer than the window."""
    rows: list[list[int]]
    choices: list[tuple[int, list[int]]]
    prefix: int
    cut: bool


def pair_tokens(encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both. Blanks at the context's end belong to the continuation: a word's token begins with its blank."""
    bare = context.rstrip()
    first = encode(bare)
    return first, encode(context + continuation)[len(first):]


def requests_of(questions: list[Question], tokenizer, window: int) -> Iterator[Request]:
    """Each question in tokens, BOS in front, the context cut at its left to fit the window (tokens of input)."""
    memory: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in memory:
            memory[text] = encode_document(tokenizer, text).tolist()
        return memory[text]

    for question in questions:
        memory.clear()  # the choices of one question share their context, no more
        rows, choices, cut = [], [], False
        for context, continuation in question.pairs:
            first, targets = pair_tokens(encode, context, continuation)
            if not 0 < len(targets) <= window:
                fail(f"{question.where}: {continuation[:60]!r} has {len(targets)} tokens, expected 1 to {window}, the "
                     "model's window; mend that row, or give another --seq-len")
            tokens = (first + targets)[-(window + 1):]
            cut |= len(tokens) < len(first + targets)
            if tokens[:-1] not in rows:
                rows.append(tokens[:-1])
            choices.append((rows.index(tokens[:-1]), targets))
        unused = min(len(rows[row]) - len(targets) for row, targets in choices)
        same = (i for i, column in enumerate(zip(*rows)) if len(set(column)) > 1)
        yield Request(rows, choices, min(unused, next(same, unused)), cut)


# -----------------------------------------------------------------------------
# log-likelihoods -> metrics


def mean_stderr(values) -> tuple[float, float]:
    """(mean, standard error of it: sample standard deviation / sqrt(n)); one value has none: nan."""
    values = np.asarray(values, dtype=float)
    return values.mean().item(), values.std(ddof=1).item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def perplexity_stderr(logs: np.ndarray, samples: int = 100_000) -> float:
    """The spread of the perplexity over resamples of the rows, with the draws of the harness: those of Python's
    generator, seeded 0, 1, ... for a thousand resamples each. NumPy's runs through the same numbers, faster."""
    if len(logs) < 2:
        return math.nan
    found = []
    for seed in range(samples // 1000):
        uniform = np.random.RandomState([seed]).random_sample((1000, len(logs)))
        found.append(np.exp(-logs[(uniform * len(logs)).astype(int)].mean(1)))
    return np.concatenate(found).std(ddof=1).item()


def metrics(name: str, questions: list[Question], scores: list[list[tuple[float, bool]]]) -> dict:
    """Metrics of a task as the harness prints them. scores: for each question, for each choice, the log-likelihood in
    nats and whether every token of it was the most likely one."""
    lls = [np.array([ll for ll, _ in score]) for score in scores]
    if name == "lambada_openai":
        logs = np.array([ll[0] for ll in lls])
        acc, stderr = mean_stderr([score[0][1] for score in scores])
        return dict(acc=acc, acc_stderr=stderr, perplexity=float(np.exp(-logs.mean())),
                    perplexity_stderr=perplexity_stderr(logs), n=len(questions))
    hits = np.array([ll.argmax() == q.gold for ll, q in zip(lls, questions)])  # of equal ones the first wins
    acc, stderr = mean_stderr(hits)
    found = dict(acc=acc, acc_stderr=stderr, n=len(questions))
    if name == "mmlu":
        groups = np.array([q.group for q in questions])
        found |= over_subjects({g: hits[groups == g] for g in dict.fromkeys(groups.tolist())})
    if TASKS[name].normed:
        with np.errstate(divide="ignore", invalid="ignore"):  # a choice may be empty
            best = [(ll / np.array(q.lengths, dtype=float)).argmax() for ll, q in zip(lls, questions)]
        found["acc_norm"], found["acc_norm_stderr"] = mean_stderr([b == q.gold for b, q in zip(best, questions)])
    return found


def over_subjects(hits: dict[str, np.ndarray]) -> dict:
    """MMLU's: the error of the mean over all rows is that of the pooled variance within subjects; macro is the mean
    over subjects, each as much as any other."""
    n = np.array([len(h) for h in hits.values()])
    means, errors = np.array([mean_stderr(h) for h in hits.values()]).T
    pooled = ((n - 1) * n * errors ** 2).sum() / (n.sum() - len(n)) if n.min() > 1 else math.nan
    return dict(acc_stderr=math.sqrt(pooled / n.sum()), acc_macro=means.mean().item(),
                acc_macro_stderr=math.sqrt((errors ** 2).sum()) / len(n), subjects=dict(zip(hits, means.tolist())))
