"""results.sh and results.py: every run that is named can start, and the tables say what the runs were."""
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener

import pytest

import plumbing.settings
from bench import results
from data.prepare import prepare
from model import LlamaConfig
from plumbing.duration import train_flops
from plumbing.params import PARAMS, params_json
from tests.helpers import one_line_error
from tests.processes import ROOT, run

TINY = "--base-steps 2 --eval-windows 2 --calibration-windows 2 --seq-len 16"
ALONE = {"same", "whole", "scratch"}


def script(*words: str, **environment) -> subprocess.CompletedProcess:
    """bash bench/results.sh WORDS, started from another folder."""
    command = ["bash", str(ROOT / "bench/results.sh"), *words]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, env=os.environ | environment)


def test_every_run_has_flags_that_exist_and_a_place_in_a_table(monkeypatch):
    """Catches a run whose flags train.py refuses, two runs of one name, and a run that no table shows."""
    monkeypatch.setattr(plumbing.settings, "read_config", lambda folder: LlamaConfig())
    lines = script("--list").stdout.splitlines()
    runs = {words[0]: words[1:] for words in map(shlex.split, lines)}
    assert len(runs) == len(lines) > 55
    shown = {*results.CHOOSERS, *results.CHANGES, "penalty"}
    for name, flags in runs.items():
        plumbing.settings.parse_args(flags)
        kind = name if name in shown else name.rpartition("-")[0]
        assert kind in shown or kind.split("-")[0] in ALONE, name
    for name in shown - {"kd-0"}:  # the demo's default
        assert name in runs or all(f"{name}-{s}" in runs for s in results.SEEDS), name
    assert {*results.ALONE} == ALONE and {*results.COSTS.values()} <= ALONE


def test_what_a_run_took(tmp_path):
    """Catches a soft pass that costs what its slice would, steps of a resumed run that count twice,
    tokens of one budget in place of all, and a step that another program slowed."""
    c = LlamaConfig(dim=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=6, ffn_dim=16, vocab_size=10)
    (tmp_path / PARAMS).write_text(json.dumps(params_json(c)))
    header = dict(settings=dict(seq_len=5, batch_tokens=20), commit="c0ffee", torch="2", device="cpu")
    records = [header]
    for step, seconds in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 50.0)):
        records.append(dict(step=step, loss=[3.0, 2.0], soft=[step == 1, False],
                            got=[0.5, 1.0], seconds=seconds))
    records.append(dict(step=2, val={}))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    took = results.spent(tmp_path)
    half, whole = train_flops(c, 5, 0.5), train_flops(c, 5)
    assert took["steps"] == 3 and took["tokens"] == 3 * 2 * 20 and took["seconds"] == 3 * 3.0
    assert took["flops"] == pytest.approx(20 * (2 * half + 4 * whole))
    assert (took["commit"], took["device"]) == ("c0ffee", "cpu")

    # With a teacher: a forward of the base at every budget under 1.
    header["settings"]["kd"] = 0.5
    for record in records[1:-1]:
        record["budget"] = [0.5, 1.0]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert results.spent(tmp_path)["flops"] == pytest.approx(20 * (2 * half + 5 * whole))


def fake_run(loss: float, over: float = -0.01, at=None) -> dict:
    """A run that gets what was asked + over, or `at` at every budget; its loss rises by one from 1.0 to 0."""
    rows = []
    for b in [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4]:
        got = b + over if at is None else at
        rows.append(dict(budget=b, got=got, params=int(1000 * got), loss=loss + 1 - got))
    return dict(steps=2, tokens=100, flops=6.0, seconds=2.0, rows=rows)


def line_of(table: str, label: str) -> str:
    """The row of a table that begins with a label."""
    return next(line for line in table.splitlines() if line.startswith(f"| {label} |"))


def test_tables_say_what_the_runs_were(tmp_path, capsys):
    """Catches means over the wrong budgets, seeds that are left out, and costs compared at another size."""
    runs = {f"router-{s}": fake_run(2 + s / 10) for s in range(3)}
    runs["penalty-1"] = fake_run(2.5, over=0.02)
    runs["same-0.40-0"] = fake_run(7.0, at=1.0)
    runs["units-random"] = fake_run(3, over=-0.05)
    runs["before"] = dict(rows=[row for row in fake_run(5)["rows"] if row["budget"] != 0.95])
    for b in results.TRAINED:
        runs[f"whole-{b:.2f}-0"] = fake_run(1) | dict(flops=12.0, seconds=5.0)
    runs["router-0"]["seconds"] = 9.0  # another program ran beside it: the median seed's time counts
    r = results.Runs(runs)
    assert r.values("router", 0.4) == [pytest.approx(2.61 + s / 10) for s in range(3)]
    assert r.cell("router", 0.4) == "2.710 (2.610 to 2.810)"
    assert {*results.FREE, *results.TRAINED, 0.65} == {*r.budgets}
    assert r.free("units-random") == [pytest.approx(3 + 1.05 - statistics.mean(results.FREE))]
    assert r.at("router-1", 0.5) == pytest.approx(2.6) and r.at("router-1", 0.1) == pytest.approx(2.71)

    costs = results.cost_table(r).splitlines()[-1]
    assert "| 8.00 |" in costs and "| 10.00 |" in costs
    assert "7.000" in results.alone_table(r)
    family = results.family_table(r)
    assert "| 5.610 | 2.710 (2.610 to 2.810) |" in line_of(family, "0.40*")
    assert "| - | 2.160" in line_of(family, "0.95"), "before was not measured there"

    table = results.penalty_table(r)
    assert "penalty 0.020" in table and "constrained 0.010" in table and "0 and 13 of 13" in table
    assert "2.580" in line_of(table, "0.50"), "2.1 + 1 - (.5 + .02)"
    changes = results.change_table(r)
    assert "| 2.010 [0.990] |" in line_of(changes, "**default**")
    assert "| 3.050 [0.950] |" in line_of(changes, "order of units")

    runs["depth-0"] = fake_run(4) | dict(trained=[1.0, 0.85, 0.65, 0.4])  # whole layers buy nothing at .8
    depth = line_of(results.chooser_table(results.Runs(runs)), "depth alone")
    assert "| 4.160 [0.840] | 4.360 [0.640] |" in depth and depth.endswith("| +2.000, +2.000, +2.000 |")

    (tmp_path / "results.json").write_text(json.dumps(runs))
    results.main(["--assets", str(tmp_path)])
    assert "at random" in capsys.readouterr().out

    runs["uniform-2"] = runs.pop("router-2")
    uniform = line_of(results.chooser_table(results.Runs(runs)), "uniform shrink")
    assert uniform.endswith("| - |"), "no common seed"

    # What did not run has no table.
    few = {"router-0": runs["router-0"]}
    assert results.penalty_table(results.Runs(few)) == results.change_table(results.Runs(few)) == ""
    (tmp_path / "results.json").write_text(json.dumps(few))
    results.main(["--assets", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "## What chooses" in printed and "## One change" not in printed and "penalty" not in printed


def test_a_speed_is_that_of_its_budget(tmp_path):
    """Catches speeds that go to the rows in the order of another evaluation's budgets."""
    keys = dict(got=0.5, params=9, dim=8, n_heads=2, ffn_dim=16, layers=[0], loss=3.0, tokens=5)
    slow, fast = ({key: speed for key in results.SPEEDS} for speed in (1.0, 2.0))
    found = dict(context=16, rows=[keys | dict(budget=b) for b in (1.0, 0.6, 0.8)])
    timed = dict(rows=[dict(budget=1.0, speed=slow), dict(budget=0.8, speed=fast)])
    (tmp_path / "before.json").write_text(json.dumps(found))
    (tmp_path / "before.speed").write_text(json.dumps(timed))
    rows = results.collect(tmp_path)["before"]["rows"]
    assert [row.get("speed") for row in rows] == [slow, None, fast]


def test_budgets_that_got_one_slice_share_a_row():
    """Catches rows that are merged though a seed got another slice, and a budget that is lost."""
    runs = {f"router-{s}": fake_run(2) for s in range(2)}
    runs |= {f"penalty-{s}": fake_run(2, at=0.5) for s in range(2)}
    runs["penalty-1"]["rows"][0] |= dict(got=1.0, loss=1.5)
    table = results.penalty_table(results.Runs(runs)).splitlines()
    assert table[2].startswith("| 1.00* |") and table[3].startswith("| 0.95 to 0.40* |") and table[4] == ""


def test_the_picture(tmp_path):
    """Catches a picture that lacks a series, or is not drawn."""
    pytest.importorskip("matplotlib")
    runs = {"router-0": fake_run(2), "before": fake_run(4), "same-0.60-0": fake_run(3, at=0.6)}
    pictures = set()
    for names in (["router-0"], ["router-0", "before"], ["router-0", "same-0.60-0"], list(runs)):
        results.draw(results.Runs({n: runs[n] for n in names}), tmp_path / "family.png")
        pictures.add((tmp_path / "family.png").read_bytes())
    assert len(pictures) == 4 and all(p.startswith(b"\x89PNG") for p in pictures)


@pytest.mark.parametrize("folder", ["assets", "assets/stories"])
def test_the_page_has_the_tables(folder):
    """Catches a number in RESULTS.md that the committed runs do not say."""
    page = (ROOT / "RESULTS.md").read_text()
    r = results.Runs(json.loads((ROOT / folder / "results.json").read_text()))
    for title, table in results.TABLES.items():
        assert table(r) in page, title


def test_nothing_there_is_one_line(tmp_path, capsys):
    """Catches a traceback where runs are missing."""
    with one_line_error(capsys, "bench/results.sh"):
        results.main(["--assets", str(tmp_path)])
    with one_line_error(capsys, "no finished run", "bench/results.sh"):
        results.main(["--assets", str(tmp_path), "--collect", str(tmp_path)])
    (tmp_path / "results.json").write_text("{}")
    with one_line_error(capsys, "router-0"):
        results.main(["--assets", str(tmp_path)])


PYTHON = """#!{python} -SE
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as line:
    line.send((sys.argv[1:], os.getcwd()))
    status, out, err = line.recv()
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(status)
"""
# eval.py --speed, timed once in place of seven times.
ONE_ROUND = ("import runpy, bench.speed; bench.speed.ROUNDS = 1; "
             "runpy.run_path('eval.py', run_name='__main__')")


@pytest.fixture
def python(tmp_path):
    """(PATH, words): a PATH whose first `python` has this process fork one with torch already
    there; what it was asked to run. A script that starts ten interpreters would import torch ten
    times."""
    folder = tmp_path / "bin"
    folder.mkdir()
    asked = []
    listener = Listener(family="AF_UNIX")

    def serve():
        while True:
            with listener.accept() as line:
                words, cwd = line.recv()
                if not words:
                    return
                asked.append(words)
                if "--speed" in words:
                    words = ["-c", ONE_ROUND, *words[1:]]
                done = run(*words, cwd=cwd)
                line.send((done.returncode, done.stdout, done.stderr))

    (folder / "python").write_text(PYTHON.format(python=sys.executable, address=listener.address))
    (folder / "python").chmod(0o755)
    server = threading.Thread(target=serve)
    server.start()
    yield f"{folder}{os.pathsep}{os.environ['PATH']}", asked
    with Client(listener.address) as line:
        line.send(([], ""))
    server.join()
    listener.close()


def test_a_page_of_tiny_runs(tmp_path, python):
    """Catches a script that stops half way, trains twice what is there, or a result that is not the run's."""
    path, asked = python
    (tmp_path / "text").mkdir()
    source = (ROOT / "train.py").read_text()
    for i in range(30):
        (tmp_path / f"text/{i}.py").write_text(source[500 * i:500 * i + 3000])
    prepare([str(tmp_path / "text")], str(tmp_path / "data"), vocab_size=600)

    environment = dict(PATH=path, OUT=str(tmp_path / "out"), ASSETS=str(tmp_path), STEPS="2", BATCH="32",
                       FLAGS=f"{TINY} --data {tmp_path / 'data'}")
    done = script("whole-0.40-0", **environment)
    log = (tmp_path / "out/router-0.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-500:]
    runs = json.loads((tmp_path / "results.json").read_text())
    assert set(runs) == {"before", "router-0", "whole-0.40-0"} and "whole-0.40-0: done" in done.stdout
    assert runs["router-0"]["tokens"] == 2 * 4 * 32 and runs["whole-0.40-0"]["tokens"] == 8 * 32
    family = runs["router-0"]["rows"]
    small = runs["whole-0.40-0"]["rows"][0]
    assert small["params"] == next(row["params"] for row in family if row["budget"] == 0.4)
    assert [row["params"] for row in runs["before"]["rows"]] == [row["params"] for row in family]
    assert runs["before"]["rows"][0]["loss"] != family[0]["loss"]
    assert family[0]["speed"]["memory"] == 1 and family[-1]["speed"]["memory"] < 1
    first = len(asked)
    again = script("whole-0.40-0", **environment)
    assert again.returncode == 0 and "done" not in again.stdout, "trained twice"
    assert [words[1] for words in asked[first:]] == ["bench.results"], "only the page is made again"
