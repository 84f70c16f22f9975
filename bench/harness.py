"""
The lm-evaluation-harness on a Hugging Face export, on the files that eval.py --tasks reads: its
numbers, to put beside ours. Needs requirements-interop.txt; nothing is downloaded.

    python export.py --model out/flex --budget 0.8 --format hf --out out/flex-0.80-hf
    python -m bench.harness out/flex-0.80-hf --tasks piqa winogrande
    python eval.py --model out/flex --budgets 0.8 --tasks piqa winogrande

The tasks are the harness's own, and so is the evaluator. Only the address of their data is replaced:
the published files, rewritten as rows of Hugging Face's data sets into a folder that is removed
afterwards.
"""
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from plumbing.errors import Parser, fail, run_main
from tasks.questions import (TASKS, add_piqa_labels, arc_columns, load_task, mmlu_subjects,
                             task_file)
from tasks.rows import Row, read_jsonl

# The names of a task's files, by split: as published, and as Hugging Face has them.
FILES = {
    "arc_easy": dict(test=("ARC-Easy-Test.jsonl", "test.jsonl")),
    "lambada_openai": dict(test=("lambada_test.jsonl", "test.jsonl")),
    "piqa": dict(validation=("valid.jsonl", "validation.jsonl", "dev.jsonl")),
    "winogrande": dict(validation=("dev.jsonl", "validation.jsonl")),
    "hellaswag": dict(validation=("hellaswag_val.jsonl", "validation.jsonl"),
                      train=("hellaswag_train.jsonl", "train.jsonl")),
}
SHOTS = {"hellaswag": 10}


def published_rows(task: str, split: str, folder: Path) -> list[Row]:
    """The rows of a split as Hugging Face's data set has them."""
    path = task_file(folder, *FILES[task][split])
    rows = list(read_jsonl(path))
    if task == "piqa" and "label" not in rows[0]:
        add_piqa_labels(rows, path, task_file(folder, f"{path.stem}-labels.lst"))
        for row in rows:
            row["label"] = int(row["label"])
    if task == "arc_easy" and isinstance(rows[0]["question"], dict):
        rows = [arc_columns(row) for row in rows]
    if task == "hellaswag":
        for row in rows:
            row["label"] = str(row["label"])
    return rows


def write_jsonl(path: Path, rows: list[Row]) -> str:
    """A JSON object a line; returns the path as text."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
    return str(path)


def local_task(task: str, splits: dict[str, str], **more) -> dict:
    """The harness's own task on local files: split -> path."""
    return dict(task=task, dataset_path="json", dataset_name=None,
                dataset_kwargs=dict(data_files=splits), **more)


def local_tasks(names: list[str], task_dir: Path, into: Path) -> list[dict]:
    """The configurations of some tasks, their rows written below `into`."""
    found = []
    for name in names:
        if name == "mmlu":
            found.append(local_mmlu(task_dir / name, into))
            continue
        splits = {}
        for split in FILES[name]:
            rows = published_rows(name, split, task_dir / name)
            splits[split] = write_jsonl(into / f"{name}_{split}.jsonl", rows)
        # The harness opens every split that a task names, also where nothing is drawn from it.
        scored = next(iter(splits.values()))
        every = dict(train=scored, validation=scored) | splits
        shots = dict(num_fewshot=SHOTS[name]) if name in SHOTS else {}
        found.append(local_task(name, every, **shots))
    # Members of a group are looked up by name among the harness's own; single tasks are not.
    return [dict(group="local", task=found)]


def local_mmlu(folder: Path, into: Path) -> dict:
    """The group of MMLU's subjects, each weighted by its rows."""
    tests, examples = mmlu_subjects(folder, "test"), mmlu_subjects(folder, "dev")
    subjects = []
    for subject, rows in tests.items():
        splits = dict(test=write_jsonl(into / f"mmlu_{subject}_test.jsonl", rows),
                      dev=write_jsonl(into / f"mmlu_{subject}_dev.jsonl", examples[subject]))
        subjects.append(local_task(f"mmlu_{subject}", splits, num_fewshot=5))
    total = dict(metric="acc", aggregation="mean", weight_by_size=True)
    return dict(group="mmlu_subjects", task=subjects, aggregate_metric_list=[total])


def harness_results(folder: str, tasks: list[dict], window: int | None = None, batch: int = 8,
                    limit: int | None = None, samples: bool = False, device: str = "cpu") -> dict:
    """What the harness says of a Hugging Face folder, in fp32. window: tokens, in place of the
    model's own."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["DISABLE_MULTIPROC"] = "1"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=folder, device=device, dtype="float32", batch_size=batch,
                 max_length=window)
    return simple_evaluate(model=model, tasks=tasks, limit=limit, log_samples=samples)


def figures(results: dict, names: list[str]) -> dict[str, dict[str, float]]:
    """task -> metric -> value, under the names that eval.py --json has."""
    found = {}
    for name in names:
        values = results["results"]["local::mmlu_subjects" if name == "mmlu" else name]
        found[name] = {key.split(",")[0]: value for key, value in values.items()
                       if key.endswith(",none") and isinstance(value, float)}
    return found


def main(argv=None) -> None:
    """One JSON object as the last line of stdout: the figures, seconds, and peak memory in bytes."""
    p = Parser("python -m bench.harness", __doc__)
    p.add_argument("model", help="a folder that export.py --format hf wrote")
    p.add_argument("--tasks", nargs="+", choices=[*TASKS, "all"], default=["all"])
    p.add_argument("--task-dir", default="data/tasks", help="the files of the tasks, a folder each")
    p.add_argument("--limit", type=int, help="the first rows of a task only")
    p.add_argument("--seq-len", type=int, help="tokens per window (default: the model's context)")
    p.add_argument("--batch", type=int, default=8, help="requests per forward")
    args = p.parse_args(argv)
    names = list(TASKS) if "all" in args.tasks else args.tasks
    if not Path(args.model, "config.json").is_file():
        fail(f"{args.model} has no config.json; expected a folder of python export.py --format hf")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        fail("the lm-evaluation-harness is not installed; pip install -r requirements-interop.txt")
    task_dir = Path(args.task_dir)
    for name in names:
        load_task(name, task_dir, limit=1)  # a missing file is found before the model is loaded

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as into:
        os.environ["HF_HOME"] = into
        tasks = local_tasks(names, task_dir, Path(into))
        results = harness_results(args.model, tasks, args.seq_len, args.batch, args.limit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if sys.platform == "darwin":
        peak //= 1024  # bytes there, kilobytes elsewhere
    print(json.dumps(dict(model=args.model, tasks=figures(results, names),
                          seconds=round(time.perf_counter() - start, 1), memory=peak)))


if __name__ == "__main__":
    run_main(main)
