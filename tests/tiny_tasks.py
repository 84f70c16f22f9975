"""Small files of the six tasks, as published and as Hugging Face's rows, full of what real ones
hold here and there."""
import csv
import json
import random
from pathlib import Path

SUBJECTS = ["anatomy", "high_school_us_history", "world_religions"]
WORDS = (
    "the cat sat on mat and dog ate cake def main argv return line for in a naïve 日本 🐈 it's \"said\" "
    "she, {x} {{braces}} {% if %} 12345 3.14 I'm [sic] don't Über\u2028sep $y_1$ \\frac{1}{2} "
    "<|eot|>x").split(" ")


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def rows_of_tasks(n: int = 32, long: int = 200) -> dict:
    """task -> its rows in Hugging Face's form, n of each (of MMLU in three subjects); the last of
    each is `long` words long. "hellaswag train" and "mmlu dev" hold the examples."""
    rng = random.Random(7)
    say = lambda low=2, high=9: words(rng, low, high)
    arc, lambada, piqa, wino, swag, train = [], [], [], [], [], []
    for i in range(n):
        length = (long, long) if i == n - 1 else (3, 12)
        k = (4, 3, 5, 4)[i % 4]
        labels = "12345"[:k] if i % 3 == 0 else "ABCDE"[:k]
        texts = [say(1, 4) for _ in range(k)]
        if i % 5 == 1:
            texts[2] = texts[1]                                       # two equal choices
        arc.append(dict(id=f"q{i}", question=say(*length) + ["?", " ? ", "\n", ""][i % 4],
                        choices=dict(text=texts, label=list(labels)), answerKey=labels[i % k]))
        lambada.append(dict(text=[
            say(*length) + " cake", "the\n\n" + say() + "  dog", say() + " naïve日本", "Cake",
            say() + " mat.", say() + " "][i % 6 if i < n - 1 else 0]))
        piqa.append(dict(goal=say(*length) + ["", " ", "\n "][i % 3], sol1=say(),
                         sol2=[say(), " " + say(), say() + "  "][i % 3], label=i % 2))
        if i % 7 == 2:
            piqa[-1]["sol2"] = piqa[-1]["sol1"]
        sentences = [f"{say(*length).replace('_', '-')} _ was {say()}.", f"{say()} the_{say()} _ twice",
                     f"_ {say()}"]
        wino.append(dict(sentence=sentences[i % 3 if i < n - 1 else 0], option1=say(1, 2),
                         option2=[say(1, 2), say(1, 2) + " "][i % 2], answer=str(1 + i % 2)))
        swag.append(scene(rng, i, length))
    swag[5]["endings"][2] = "[empty]"                                 # nothing is left of it
    swag[9]["endings"][1] = swag[9]["endings"][0]
    train = [scene(rng, 1000 + i, (3, 8)) for i in range(20)]
    # a row of train, to be no shot of its own
    swag[3] = dict(train[4])
    mmlu = {split: [question(rng, subject, i,
                             (long // 4, long // 4) if split == "test" and i == 10 else (3, 12))
                    for subject in SUBJECTS for i in range(size)]
            for split, size in (("dev", 6), ("test", 11))}
    return {"arc_easy": arc, "lambada_openai": lambada, "piqa": piqa, "winogrande": wino, "hellaswag": swag,
            "hellaswag train": train, "mmlu": mmlu["test"], "mmlu dev": mmlu["dev"]}


def scene(rng: random.Random, i: int, length) -> dict:
    say = lambda low=2, high=9: words(rng, low, high)
    return dict(ind=i, activity_label=["Baking cookies", "[header] How to"][i % 2],
                ctx_a=[say(*length), f"[header] {say(*length)} [title] {say()}  twice   thrice "][i % 2],
                ctx_b=["the man", "", "ÉCOLE of"][i % 3], label=str(i % 4),
                endings=[f"{say()} [title] {say()}", say(1, 2), say(), f" {say()}. "])


def question(rng: random.Random, subject: str, i: int, length) -> dict:
    say = lambda low=2, high=9: words(rng, low, high)
    choices = [say(1, 3), f'"{say(1, 2)}", she said', "one\ntwo, three", [say(1, 2), "None", ""][i % 3]]
    ends = ["\nA second line, with a comma?  ", "?", " {braces} \"q\" "]
    return dict(question=["  ", ""][i % 2] + say(*length) + ends[i % 3], subject=subject, choices=choices,
                answer=(i * 3 + len(subject)) % 4)


def write_jsonl(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows)),
                    encoding="utf-8")


def write_hf(folder, rows: dict) -> None:
    """The rows as Hugging Face's data sets have them."""
    names = {"arc_easy": "arc_easy/test", "lambada_openai": "lambada_openai/test", "piqa": "piqa/validation",
             "winogrande": "winogrande/validation", "hellaswag": "hellaswag/validation",
             "hellaswag train": "hellaswag/train", "mmlu": "mmlu/test", "mmlu dev": "mmlu/dev"}
    for task, name in names.items():
        write_jsonl(Path(folder) / f"{name}.jsonl", rows[task])


def write_raw(folder, rows: dict) -> None:
    """The same rows as their authors published them."""
    folder = Path(folder)
    write_jsonl(folder / "arc_easy/ARC-Easy-Test.jsonl", [
        dict(id=r["id"], answerKey=r["answerKey"], question=dict(
            stem=r["question"],
            choices=[dict(text=t, label=l) for t, l in zip(*r["choices"].values())]))
        for r in rows["arc_easy"]])
    write_jsonl(folder / "lambada_openai/lambada_test.jsonl", rows["lambada_openai"])
    write_jsonl(folder / "piqa/valid.jsonl",
                [{k: v for k, v in r.items() if k != "label"} for r in rows["piqa"]])
    (folder / "piqa/valid-labels.lst").write_text("".join(f"{r['label']}\n" for r in rows["piqa"]))
    write_jsonl(folder / "winogrande/dev.jsonl", rows["winogrande"])
    for split, name in (("", "val"), (" train", "train")):
        write_jsonl(folder / f"hellaswag/hellaswag_{name}.jsonl",
                    [dict(r, label=int(r["label"])) for r in rows["hellaswag" + split]])
    for split, name in (("", "test"), (" dev", "dev")):
        (folder / "mmlu" / name).mkdir(parents=True)
        for subject in SUBJECTS:
            with open(folder / f"mmlu/{name}/{subject}_{name}.csv", "w",
                      encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(
                    [r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in rows["mmlu" + split]
                    if r["subject"] == subject)
