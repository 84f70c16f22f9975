"""tasks/: the numbers of lm-evaluation-harness, request by request and metric by metric.

The harness's own tasks run through its own evaluator on its own Hugging Face model
(bench/harness.py). Needs lm_eval: pip install -r requirements-interop.txt.
"""
import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest

import eval as evaluation
from bench import harness
from data.tokenizer import TOKENIZER, load_tokenizer
from plumbing.family import open_family
from tasks.likelihood import requests_of, score
from tasks.questions import TASKS, load_task
from tests.helpers import GQA, export_at, make_supernet, one_line_error
from tests.tiny_tasks import SUBJECTS, rows_of_tasks, write_raw

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "transformers")),
    reason="lm_eval is not installed: pip install -r requirements-interop.txt")
WINDOW, BUDGET = 960, 0.5


@pytest.fixture(scope="module", params=[None, 150], ids=["window", "short window"])
def both(request, tmp_path_factory):
    """The same slice of a supernet, scored by the harness from its export: (folder, --seq-len, theirs)."""
    path = tmp_path_factory.mktemp("lm_eval")
    write_raw(path / "raw", rows_of_tasks())
    make_supernet(path / "flex", dataclasses.replace(GQA, context=WINDOW))
    export_at(path / "flex", BUDGET, path / "slim", format="hf")
    (path / "rows").mkdir()
    tasks = harness.local_tasks(list(TASKS), path / "raw", path / "rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(path / "home"))
        theirs = harness.harness_results(str(path / "slim"), tasks, request.param, samples=True)
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
    """Catches another prompt, another draw of shots, a token border inside the answer, a missing
    BOS, a window cut at the wrong token, a shared prefix that is not shared: texts equal,
    log-likelihoods to 1e-4, greedy flags equal."""
    samples = both[2]["samples"]
    theirs = [sample for key in ([f"mmlu_{s}" for s in SUBJECTS] if name == "mmlu" else [name])
              for sample in sorted(samples[key], key=lambda sample: sample["doc_id"])]
    questions, requests, scores = ours[name]
    assert len(theirs) == len(questions) == len(scores) >= 30
    assert both[1] is None or sum(r.cut for r in requests) > 0
    for question, answers, sample in zip(questions, scores, theirs):
        assert question.pairs == [tuple(a) for a in sample["arguments"]], question.where
        for (ll, greedy), ((their_ll, their_greedy),) in zip(answers, sample["resps"], strict=True):
            assert (abs(ll - float(their_ll)) < 1e-4 * max(1, abs(ll))
                    and greedy == (str(their_greedy) == "True"))


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_is_the_harness_one(both, capsys, name):
    """Catches another metric, tie-break, length or standard error than theirs, and a command line
    that does not do what its parts do: all of the harness's figures are in --json."""
    path, window, theirs = both
    capsys.readouterr()
    evaluation.main(["--model", str(path / "flex"), "--budgets", str(BUDGET), "--tasks", name, "--task-dir",
                     str(path / "raw"), "--json"] + (["--seq-len", str(window)] if window else []))
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["tasks"][name]
    found = theirs["results"]["local::mmlu_subjects" if name == "mmlu" else name]
    figures = {key.split(",")[0]: value for key, value in found.items() if key.endswith(",none")}
    assert {"acc", "acc_stderr"} <= figures.keys() <= ours.keys()
    for key, value in figures.items():
        assert math.isclose(ours[key], value, rel_tol=1e-4 if "perplexity" in key else 1e-9), (
            key, ours[key], value)
    if name == "mmlu":
        subjects = {s: theirs["results"][f"mmlu_{s}"]["acc,none"] for s in SUBJECTS}
        assert ours["subjects"] == pytest.approx(subjects)
        assert ours["acc_macro"] == pytest.approx(sum(subjects.values()) / 3)


def test_all_subjects_are_introduced_as_the_harness_does():
    """Catches a subject whose name in the harness's header is not that of its file with blanks
    for underscores."""
    import lm_eval.tasks
    import yaml
    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    headers = {path.stem.removeprefix("mmlu_"):
               yaml.safe_load(path.read_text().replace("!function", ""))["description"]
               for path in folder.glob("mmlu_*.yaml")}
    assert len(headers) == 57
    for subject, header in headers.items():
        assert header == ("The following are multiple choice questions (with answers) about "
                          f"{subject.replace('_', ' ')}.\n\n")


def test_the_command_line(both, capsys):
    """Catches a program that gives other figures than the harness, and one that goes on where it cannot."""
    path, window, theirs = both
    names = ["piqa", "arc_easy"]
    capsys.readouterr()
    harness.main([str(path / "slim"), "--tasks", *names, "--task-dir", str(path / "raw"), "--limit", "9",
                  *(["--seq-len", str(window)] if window else [])])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(said["tasks"]) == names and said["seconds"] > 0 and said["memory"] > 2 ** 27
    first = [sample["acc"] for sample in theirs["samples"]["piqa"] if sample["doc_id"] < 9]
    assert said["tasks"]["piqa"]["acc"] == pytest.approx(sum(first) / 9)
    assert said["tasks"]["arc_easy"].keys() >= {"acc", "acc_stderr", "acc_norm"}
    with one_line_error(capsys, "config.json", "--format hf"):
        harness.main([str(path / "raw")])
