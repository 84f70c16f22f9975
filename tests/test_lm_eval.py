"""tasks/: the numbers of lm-evaluation-harness, request by request and metric by metric.

The harness's own tasks run through its own evaluator on its own Hugging Face model; only the address of their data is
replaced, by local files in the same form. Needs lm_eval: pip install -r requirements-interop.txt.
"""
import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest

import eval as evaluation
from data.tokenizer import TOKENIZER, load_tokenizer
from plumbing.family import open_family
from tasks.likelihood import requests_of, score
from tasks.questions import TASKS, load_task
from tests.helpers import GQA, export_at, make_supernet
from tests.tiny_tasks import SUBJECTS, rows_of_tasks, write_hf, write_jsonl, write_raw

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "transformers")),
    reason="lm_eval is not installed: pip install -r requirements-interop.txt")
WINDOW, BUDGET = 960, 0.5
os.environ.setdefault("HF_HUB_OFFLINE", "1"), os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("DISABLE_MULTIPROC", "1"), os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def their_tasks(folder) -> list[dict]:
    """The harness's configurations, with local files in the place of their data sets."""
    def local(task, **files):
        return dict(task=task, dataset_path="json", dataset_name=None, dataset_kwargs=dict(
            data_files={split: str(folder / f"{name}.jsonl") for split, name in files.items()}))
    found = [local("arc_easy", test="arc_easy/test", validation="arc_easy/test", train="arc_easy/test"),
             local("lambada_openai", test="lambada_openai/test"),
             local("piqa", validation="piqa/validation", train="piqa/validation"),
             local("winogrande", validation="winogrande/validation", train="winogrande/validation"),
             local("hellaswag", validation="hellaswag/validation", train="hellaswag/train") | dict(num_fewshot=10)]
    mmlu = [local(f"mmlu_{s}", test=f"mmlu_{s}_test", dev=f"mmlu_{s}_dev") | dict(num_fewshot=5) for s in SUBJECTS]
    # Only members of a group are looked up by name in the harness's own files, and only groups inside it may aggregate.
    return [dict(group="local", task=found + [dict(group="subjects", task=mmlu, aggregate_metric_list=[
        dict(metric="acc", aggregation="mean", weight_by_size=True)])])]


@pytest.fixture(scope="module", params=[None, 150], ids=["window", "short window"])
def both(request, tmp_path_factory):
    """The same slice of a supernet, scored by the harness from its export: (folder, --seq-len, theirs)."""
    path = tmp_path_factory.mktemp("lm_eval")
    os.environ["HF_HOME"] = str(path / "home")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    rows = rows_of_tasks()
    write_raw(path / "raw", rows), write_hf(path / "hf", rows)
    for split, key in (("test", "mmlu"), ("dev", "mmlu dev")):  # a file a subject, for the harness
        for s in SUBJECTS:
            write_jsonl(path / f"hf/mmlu_{s}_{split}.jsonl", [r for r in rows[key] if r["subject"] == s])
    make_supernet(path / "flex", dataclasses.replace(GQA, context=WINDOW))
    export_at(path / "flex", BUDGET, path / "slim", format="hf")
    model = HFLM(pretrained=str(path / "slim"), device="cpu", dtype="float32", batch_size=8, max_length=request.param)
    assert model.max_length == request.param or WINDOW
    theirs = simple_evaluate(model=model, tasks=their_tasks(path / "hf"), log_samples=True)
    return path, request.param, theirs


@pytest.fixture(scope="module")
def ours(both):
    """task -> (questions, requests, scores) of the same slice, from the supernet."""
    path, window, _ = both
    tokenizer = load_tokenizer(path / "flex" / TOKENIZER)
    member = open_family(path / "flex").member(BUDGET)
    found = {}
    for name in TASKS:
        questions = load_task(name, path / "raw")
        requests = list(requests_of(questions, tokenizer, window or WINDOW))
        found[name] = questions, requests, score(member.model, requests, member.subnet, member.factors)[0]
    return found


@pytest.mark.parametrize("name", TASKS)
def test_every_row_has_the_harness_log_likelihood(both, ours, name):
    """Catches another prompt, another draw of shots, a token border inside the answer, a missing BOS, a window cut at
    the wrong token, a shared prefix that is not shared: texts equal, log-likelihoods to 1e-4, greedy flags equal."""
    samples = both[2]["samples"]
    theirs = [sample for key in ([f"mmlu_{s}" for s in SUBJECTS] if name == "mmlu" else [name])
              for sample in sorted(samples[key], key=lambda sample: sample["doc_id"])]
    questions, requests, scores = ours[name]
    assert len(theirs) == len(questions) == len(scores) >= 30
    assert both[1] is None or sum(r.cut for r in requests) > 0
    for question, answers, sample in zip(questions, scores, theirs):
        assert question.pairs == [tuple(a) for a in sample["arguments"]], question.where
        for (ll, greedy), ((their_ll, their_greedy),) in zip(answers, sample["resps"], strict=True):
            assert abs(ll - float(their_ll)) < 1e-4 * max(1, abs(ll)) and greedy == (str(their_greedy) == "True")


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_is_the_harness_one(both, capsys, name):
    """Catches another metric, tie-break, length or standard error than theirs, and a command line that does not do what
    its parts do: all of the harness's figures are in --json."""
    path, window, theirs = both
    capsys.readouterr()
    evaluation.main(["--model", str(path / "flex"), "--budgets", str(BUDGET), "--tasks", name, "--task-dir",
                     str(path / "raw"), "--json"] + (["--seq-len", str(window)] if window else []))
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["tasks"][name]
    found = theirs["results"]["local::subjects" if name == "mmlu" else name]
    figures = {key.split(",")[0]: value for key, value in found.items() if key.endswith(",none")}
    assert {"acc", "acc_stderr"} <= figures.keys() <= ours.keys()
    for key, value in figures.items():
        assert math.isclose(ours[key], value, rel_tol=1e-4 if "perplexity" in key else 1e-9), (key, ours[key], value)
    if name == "mmlu":
        subjects = {s: theirs["results"][f"mmlu_{s}"]["acc,none"] for s in SUBJECTS}
        assert ours["subjects"] == pytest.approx(subjects)
        assert ours["acc_macro"] == pytest.approx(sum(subjects.values()) / 3)


def test_all_subjects_are_introduced_as_the_harness_does():
    """Catches a subject whose name in the harness's header is not that of its file with blanks for underscores."""
    import lm_eval.tasks
    import yaml
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    headers = {path.stem.removeprefix("mmlu_"): yaml.safe_load(path.read_text().replace("!function", ""))["description"]
               for path in folder.glob("mmlu_*.yaml")}
    assert len(headers) == 57
    for subject, header in headers.items():
        assert header == ("The following are multiple choice questions (with answers) about "
                          f"{subject.replace('_', ' ')}.\n\n")
