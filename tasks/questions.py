"""
The paper's six benchmark tasks: rows of a public file -> questions.

LLaMaFlex Sec. 4 reports ARC-easy, LAMBADA, PIQA, WinoGrande, MMLU (5-shot) and HellaSwag (10-shot).
Everyone compares by the numbers of EleutherAI's lm-evaluation-harness. Prompts and few-shot draws here
are its own; so are the token borders (likelihood.py), the metrics and their errors (metrics.py).

A question is a list of (context, continuation), one for each choice. The model scores
log p(continuation | context). Its answer is the choice with the largest sum (acc), or with the largest
sum per character (acc_norm).

    python -m tasks.download                  downloads what has a public address to data/tasks
    data/tasks/piqa/valid.jsonl               files keep the names they were published under; or the
    data/tasks/piqa/validation.jsonl          rows of Hugging Face's data set, a JSON object a line
    python eval.py --tasks piqa --limit 100   the first 100 questions of one task
"""
import random
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from plumbing.errors import fail
from tasks.rows import DOWNLOAD, LETTERS, Row, read_jsonl, read_mmlu_csv


class Question(NamedTuple):
    """One row of a task."""
    pairs: list[tuple[str, str]]  # (context, continuation) of each choice
    lengths: list[int]            # characters of each choice: acc_norm divides by them
    gold: int                     # index of the right choice
    where: str                    # file:line
    group: str = ""               # MMLU's subject


def plain_question(context: str, choices: list[str], gold: int, row: Row) -> Question:
    """One context for all choices; each choice follows it behind a blank."""
    pairs = [(context, " " + choice) for choice in choices]
    lengths = [len(choice) for choice in choices]
    return Question(pairs, lengths, gold, row.where)


def task_file(folder: Path, *names: str) -> Path:
    """The first of the names that exists in the folder of a task; none does: fail()."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    task = folder.name
    wanted = " or ".join([str(folder / names[0]), *names[1:]])
    fail(f"{wanted} is missing; {task} comes from {TASKS[task].source}; "
         f"{DOWNLOAD} {task} --out {folder.parent} downloads it")


# -----------------------------------------------------------------------------
# zero-shot tasks


def arc_easy(folder: Path) -> Iterator[Question]:
    """Three to five choices, labelled with letters or digits."""
    for row in read_jsonl(task_file(folder, "ARC-Easy-Test.jsonl", "test.jsonl")):
        if isinstance(row.get("question"), dict):
            row = arc_columns(row)
        context = f"Question: {row.text('question')}\nAnswer:"
        columns = row.get("choices")
        columns = Row(row.where, columns if isinstance(columns, dict) else {})
        choices = columns.strings("text")
        labels = columns.strings("label")
        answer = row.get("answerKey")
        if answer not in labels or len(labels) != len(choices):
            row.bad(f"found the answerKey {answer!r} and the labels {labels} of {len(choices)} "
                    "choices, expected one of as many labels")
        yield plain_question(context, choices, labels.index(answer), row)


def arc_columns(row: Row) -> Row:
    """A row as published, in Hugging Face's form.

    published     {question: {stem, choices: [{text, label}, ...]}, answerKey}
    Hugging Face  {question, choices: {text: [...], label: [...]}, answerKey}"""
    published = row["question"]
    options = published.get("choices")
    if not isinstance(options, list):
        options = []
    options = [option for option in options if isinstance(option, dict)]
    columns = dict(text=[option.get("text") for option in options],
                   label=[option.get("label") for option in options])
    return Row(row.where, dict(row, question=published.get("stem"), choices=columns))


def lambada_openai(folder: Path) -> Iterator[Question]:
    """The last word of a passage. The one choice is right if each of its tokens is the likeliest."""
    for row in read_jsonl(task_file(folder, "lambada_test.jsonl", "test.jsonl")):
        context, _, word = row.text("text").rpartition(" ")
        yield plain_question(context, [word], 0, row)


def piqa(folder: Path) -> Iterator[Question]:
    """Two ways to reach a goal. As published, the answers are in a file of their own."""
    path = task_file(folder, "valid.jsonl", "validation.jsonl", "dev.jsonl")
    rows = list(read_jsonl(path))
    if rows and "label" not in rows[0]:
        labels = task_file(folder, f"{path.stem}-labels.lst")
        add_piqa_labels(rows, path, labels)
    for row in rows:
        context = f"Question: {row.text('goal')}\nAnswer:"
        choices = [row.text("sol1"), row.text("sol2")]
        yield plain_question(context, choices, row.index("label", 2), row)


def add_piqa_labels(rows: list[Row], path: Path, labels: Path) -> None:
    """Gives each row its label, a line of the other file."""
    lines = labels.read_text(encoding="utf-8", errors="replace").split()  # a letter is no label
    if len(lines) != len(rows):
        fail(f"{labels}:{len(lines)}: ends here, but {path} has {len(rows)} rows; expected as many "
             f"labels; download both again: {DOWNLOAD} piqa")
    for number, (row, line) in enumerate(zip(rows, lines), 1):
        label = Row(f"{labels}:{number}", dict(label=line))
        row["label"] = label.index("label", 2)


def winogrande(folder: Path) -> Iterator[Question]:
    """Two fillings of a blank. The text behind the blank is scored, the same after either filling.

    So the choice is in the context here, and the continuation is the same for both."""
    for row in read_jsonl(task_file(folder, "dev.jsonl", "validation.jsonl")):
        before, blank, after = row.text("sentence").partition("_")
        if not blank:
            row.bad(f"found no blank in {row['sentence'][:60]!r}, expected a '_'")
        options = [row.text("option1"), row.text("option2")]
        pairs = [(before + option, " " + after.strip()) for option in options]
        lengths = [len(option) for option in options]
        yield Question(pairs, lengths, row.index("answer", 2, first=1), row.where)


# -----------------------------------------------------------------------------
# few-shot tasks


def hellaswag(folder: Path) -> Iterator[Question]:
    """Ten-shot: four endings of a scene.

    One generator draws the shots of all rows in order, from the whole of train. So they do not
    depend on who scores which row."""
    path = task_file(folder, "hellaswag_train.jsonl", "train.jsonl")
    train = list(read_jsonl(path))
    if len(train) < 11:
        fail(f"{path}:{len(train)}: ends here, expected 11 rows or more to draw ten shots from")
    shots = []
    for row in train:
        query, endings, gold = scene(row)
        shots.append(f"{query} {endings[gold]}\n\n")
    generator = random.Random(1234)
    for row in read_jsonl(task_file(folder, "hellaswag_val.jsonl", "validation.jsonl")):
        drawn = draw_shots(generator, train, row)
        query, endings, gold = scene(row)
        context = "".join(shots[i] for i in drawn) + query
        yield plain_question(context, endings, gold, row)


def draw_shots(generator: random.Random, train: list[Row], row: Row) -> list[int]:
    """Ten rows of train, by index. Eleven are drawn, for the row itself may be among them."""
    drawn = generator.sample(range(len(train)), 11)
    drawn = [i for i in drawn if train[i] != row][:10]
    if len(drawn) < 10:  # the row is in train more than once
        others = [i for i in range(len(train)) if train[i] != row]
        drawn = generator.sample(others, 10)
    return drawn


def scene(row: Row) -> tuple[str, list[str], int]:
    """(query, endings, index of the right one) of a row of HellaSwag."""
    start = row.text("ctx_a")
    more = row.text("ctx_b").capitalize()
    query = f"{row.text('activity_label')}: {start} {more}"
    endings = row.strings("endings")
    if len(endings) != 4:
        row.bad_field("endings", "four strings")  # with one that is lost, the label counts another
    gold = row.index("label", len(endings))
    return without_marks(query), [without_marks(ending) for ending in endings], gold


def without_marks(text: str) -> str:
    """Text without WikiHow's marks, cleaned as the harness does it (each double blank once)."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def mmlu(folder: Path) -> Iterator[Question]:
    """Five-shot: four choices in 57 subjects, each with five answered examples.

    The letter is scored."""
    examples = mmlu_subjects(folder, "dev")
    for subject, rows in mmlu_subjects(folder, "test").items():
        n_examples = len(examples.get(subject, []))
        if n_examples < 5:
            fail(f"{folder}: found {n_examples} dev rows of {subject}, expected 5; "
                 f"{DOWNLOAD} mmlu downloads them")
        topic = subject.replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {topic}."
        shots = []
        for row in examples[subject][:5]:
            prompt = mmlu_prompt(row)
            shots.append(f"{prompt} {LETTERS[row.index('answer', 4)]}")
        for row in rows:
            context = "\n\n".join([header, *shots, mmlu_prompt(row)])
            question = plain_question(context, list(LETTERS), row.index("answer", 4), row)
            yield question._replace(group=subject)


def mmlu_subjects(folder: Path, split: str) -> dict[str, list[Row]]:
    """subject -> its rows: from a csv a subject, as published, or from one file of JSON lines."""
    rows = {}
    paths = sorted((folder / split).glob(f"*_{split}.csv"))
    for path in paths:
        subject = path.name.removesuffix(f"_{split}.csv")
        rows[subject] = list(read_mmlu_csv(path))
    if not paths:
        path = task_file(folder, f"{split}.jsonl", f"{split}/SUBJECT_{split}.csv")
        for row in read_jsonl(path):
            rows.setdefault(row.text("subject"), []).append(row)
    return rows


def mmlu_prompt(row: Row) -> str:
    """A question and its four choices, up to where the letter goes."""
    choices = row.strings("choices", 4)
    if len(choices) != 4:
        row.bad(f"found {len(choices)} choices, expected four")
    lines = [row.text("question").strip()]
    for letter, choice in zip(LETTERS, choices):
        lines.append(f"{letter}. {choice}")
    return "\n".join([*lines, "Answer:"])


# -----------------------------------------------------------------------------
# all six


class Task(NamedTuple):
    """How to read a task, and what is shown of it."""
    questions: Callable[[Path], Iterator[Question]]
    metric: str          # the one in the paper's table
    source: str          # where its files come from
    normed: bool = True  # acc_norm means something: the choices have different lengths


TASKS = {
    "arc_easy": Task(arc_easy, "acc", "ARC-V1-Feb2018.zip of allenai.org/data/arc"),
    "lambada_openai": Task(
        lambada_openai, "acc", "openaipublic.blob.core.windows.net/gpt-2/data", normed=False),
    "piqa": Task(piqa, "acc", "yonatanbisk.com/piqa"),
    "winogrande": Task(
        winogrande, "acc", "winogrande_1.1.zip of winogrande.allenai.org", normed=False),
    "hellaswag": Task(hellaswag, "acc_norm", "github.com/rowanz/hellaswag"),
    "mmlu": Task(mmlu, "acc", "data.tar of github.com/hendrycks/test", normed=False),
}


def load_task(name: str, folder, limit: int | None = None) -> list[Question]:
    """The questions of a task from folder/name, the first `limit` only (of MMLU, of each subject).

    All rows are read, so a bad one is always found. No rows, or a bad one: fail()."""
    path = Path(folder) / name
    questions = []
    seen = Counter()  # questions of each subject so far
    for question in TASKS[name].questions(path):
        seen[question.group] += 1
        if limit is None or seen[question.group] <= limit:
            questions.append(question)
    if not questions:
        fail(f"{path}: the files of {name} hold no rows; {DOWNLOAD} {name} downloads them")
    return questions
