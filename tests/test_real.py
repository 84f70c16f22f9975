"""real.sh and real.py: every run that is named can start, and the table says what the runs were."""
import json
import math
import os
import shlex
import subprocess

import pytest

import plumbing.settings
import search.__main__ as search
from bench import real
from model import LlamaConfig
from tests.helpers import one_line_error
from tests.processes import ROOT

SMOL = LlamaConfig(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=49152, tied=True)
NO_TRAINING = ("base", "cut")


def test_every_run_has_flags_that_exist_and_a_place_in_the_table(monkeypatch):
    """Catches a run whose flags train.py or search refuse, two runs of one name, and one that no table can name."""
    done = subprocess.run(["bash", str(ROOT / "bench/real.sh"), "--list"], cwd="/", capture_output=True, text=True)
    monkeypatch.setattr(plumbing.settings, "read_config", lambda folder: SMOL)
    runs = {words[0]: words[1:] for words in map(shlex.split, done.stdout.splitlines())}
    assert len(runs) == len(done.stdout.splitlines()) > 12
    for name, flags in runs.items():
        kind = name.split("-")[0]
        assert kind in real.WHAT
        if kind == "search":
            search.parse_args(["--llama", "x", "--data", "x", *flags])
        elif kind not in NO_TRAINING:
            args = plumbing.settings.parse_args(["--llama", "x", "--laptop", *flags])
            assert args.steps == (440 if kind == "all" else 110)
        else:
            assert not flags
    assert {name.split("-")[0] for name in runs} == {*real.WHAT}


def fake(budgets: list[float], trained=(1.0, 0.6), loss: float = 3.0) -> dict:
    """What eval.py --json prints of a family; the loss rises by one from 1.0 to 0."""
    rows = []
    for b in budgets:
        task = dict(acc=b / 2, acc_norm=0.1, perplexity=9.0, n=200)
        rows.append(dict(budget=b, got=b - 0.01, params=int(1e6 * b), dim=8, n_heads=2, ffn_dim=16, layers=[0, 1],
                         loss=loss + 1 - b, tokens=1000, tasks=dict(hellaswag=task, lambada_openai=task)))
    return dict(trained=list(trained), rows=rows)


def test_the_table_says_what_the_runs_were(tmp_path, capsys):
    """Catches a budget that nobody trained among those that were, a perplexity that is a loss, a metric that the paper
    does not show, and rows under another size."""
    (tmp_path / "real").mkdir()
    runs = {"base": fake([1.0], [], 2.5), "family": fake([1.0, 0.8, 0.6, 0.5]), "own-0.60": fake([1.0], [1.0], 4.0)}
    runs["own-0.60"]["rows"][0] |= dict(params=600_000, got=1.0)
    for name, found in runs.items():
        (tmp_path / f"real/{name}.json").write_text("\n" + json.dumps(found) + "\n")
    log = [dict(settings=dict(seq_len=4, batch_tokens=8, budgets=[1.0, 0.6]), commit="c0ffee", torch="2", device="cpu"),
           dict(step=5, val={"1.0": 3.1, "0.6": 3.9}), dict(step=10, val={"1.0": 3.0, "0.6": 3.4})]
    (tmp_path / "real/family").mkdir()
    (tmp_path / "real/family/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    curves = real.losses_by_tokens(tmp_path / "real/family")
    assert curves == {"1.0": {"80": 3.1, "160": 3.0}, "0.6": {"80": 3.9, "160": 3.4}}
    (tmp_path / "real/family/log.jsonl").unlink()  # a family without a log took nothing that is known
    runs = real.collect(tmp_path / "real")
    runs["family"]["losses"] = curves
    (tmp_path / "real.json").write_text(json.dumps(runs))
    real.main(["--assets", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "WikiText-2: perplexity on 1,000 tokens. Tasks: hellaswag 200 rows, lambada_openai 200 rows"
    body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:10]]
    assert [(row[0], row[1], row[2]) for row in body] == [
        ("1.0M [1.000]", "the base, untouched", ""), ("1.0M [1.000]", "**the family**", "Exp."),
        ("0.8M [0.800]", "**the family**", "Inter."), ("0.6M [0.600]", "**the family**", "Exp."),
        ("0.6M [0.600]", "it alone, on its own tokens", ""), ("0.5M [0.500]", "**the family**", "under")]
    assert body[3][3] == f"{math.exp(3.4):.2f}"
    assert body[3][4:] == ["0.100", "0.300", "0.200"]  # acc_norm of HellaSwag, acc of LAMBADA
    assert "| 0.6 | 3.900 | 3.400 |" in lines


def test_nothing_to_show_is_a_line(tmp_path, capsys):
    """Catches a traceback where a run is missing."""
    with one_line_error(capsys, "real.json is not there", "bash bench/real.sh"):
        real.main(["--assets", str(tmp_path)])
    with one_line_error(capsys, "holds no base.json", "bash bench/real.sh"):
        real.main(["--collect", str(tmp_path), "--assets", str(tmp_path)])


@pytest.mark.parametrize("words", ["nobody", "--lits"])
def test_a_run_that_is_none(words):
    """Catches a typing error that starts hours of work."""
    environment = os.environ | {"OUT": "/nonexistent"}
    done = subprocess.run(["bash", str(ROOT / "bench/real.sh"), words], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"no run begins with {words}" in done.stderr
