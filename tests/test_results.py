"""results.sh and results.py: every run it names can start, and the tables say what the runs were."""
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import bench.results as results
from plumbing.settings import parse_args
from tests.helpers import ROOT, one_line_error

TINY = "--base-steps 2 --eval-windows 2 --calibration-windows 2 --seq-len 16"


def listed() -> dict[str, list[str]]:
    """name -> flags of every run."""
    done = subprocess.run(["bash", "results.sh", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {words[0]: words[1:] for words in map(shlex.split, done.stdout.splitlines())}


def test_every_run_has_flags_that_exist_and_a_place_in_a_table(monkeypatch):
    """Catches a run whose flags train.py refuses, two runs of one name, and a run that no table shows."""
    monkeypatch.setattr("settings.read_config", lambda folder: results.read_config.__globals__["LlamaConfig"]())
    runs = listed()
    shown = {name for table in results.TABLES.values() if isinstance(table, dict) for name in table}
    for name, flags in runs.items():
        parse_args(flags)
        kind = name if name in shown else name.rpartition("-")[0]
        alone = kind.split("-")[0] in ("same", "small", "whole", "large", "high", "scratch")
        assert alone or kind in shown | {"penalty"}, name
    done = subprocess.run(["bash", "results.sh", "--list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert len(runs) == len(done.splitlines())
    for name in shown:
        assert name in runs or all(f"{name}-{s}" in runs for s in results.SEEDS), name


def fake_run(loss: float, got=lambda b: b - 0.01) -> dict:
    """A run whose loss rises by one from 1.0 to 0."""
    at = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4]
    rows = [dict(budget=b, got=got(b), params=int(1000 * got(b)), loss=loss + 1 - got(b)) for b in at]
    return dict(steps=2, tokens=100, flops=6.0, seconds=2.0, rows=rows)


def test_tables_say_what_the_runs_were(tmp_path, capsys):
    """Catches means over the wrong budgets, seeds that are left out, and costs compared at another size."""
    runs = {f"router-{s}": fake_run(2 + s / 10) for s in range(3)} | {"penalty-1": fake_run(2.5, lambda b: b + 0.02)}
    runs |= {"same-0.40-0": fake_run(7.0, lambda b: 1.0), "units-random": fake_run(3)}
    runs |= {f"whole-{b:.2f}-0": fake_run(1) | dict(flops=12.0, seconds=5.0) for b in results.TRAINED}
    r = results.Runs(runs)
    assert r.values("router", 0.4) == [pytest.approx(2.61 + s / 10) for s in range(3)]
    assert results.cell(r.values("router", 0.4)) == "2.710 (2.610 to 2.810)"
    assert {*results.FREE, *results.TRAINED, 0.65} == {*r.budgets}
    assert r.free("units-random") == [pytest.approx(3 + 1.01 - statistics.mean(results.FREE))]
    assert r.at("router-1", 0.5) == pytest.approx(2.6) and r.at("router-1", 0.1) == pytest.approx(2.71)
    assert "8.0" in results.cost_table(r).splitlines()[-1] and "10.0" in results.cost_table(r).splitlines()[-1]
    assert "7.000" in results.alone_table(r) and "2.710 (2.610" in results.family_table(r)
    table = results.budget_table(r)
    assert "penalty 0.020" in table and "constrained 0.010" in table and "0 and 13 of 13" in table
    assert "2.580" in next(line for line in table.splitlines() if line.startswith("| 0.50")), "2.1 + 1 - (.5 + .02)"
    (tmp_path / "results.json").write_text(json.dumps(runs))
    results.main(["--assets", str(tmp_path)])
    assert "units at random" in capsys.readouterr().out


def test_the_picture(tmp_path):
    """Catches a picture that lacks a kind of model, or is not drawn."""
    pytest.importorskip("matplotlib")
    runs = {"router-0": fake_run(2), "whole-0.60-2": fake_run(1, lambda b: 0.6)}
    sizes = []
    for names in (["router-0"], list(runs)):
        results.draw(results.Runs({n: runs[n] for n in names}), tmp_path / "family.png")
        sizes.append((tmp_path / "family.png").read_bytes())
    assert all(s.startswith(b"\x89PNG") for s in sizes) and sizes[0] != sizes[1]


def test_the_page_has_the_tables():
    """Catches a number in RESULTS.md that the committed runs do not say."""
    page, r = (ROOT / "RESULTS.md").read_text(), results.Runs(json.loads((ROOT / "assets/results.json").read_text()))
    for title, table in results.TABLES.items():
        assert (table(r) if callable(table) else results.rows_table(r, table)) in page, title


def test_nothing_there_is_one_line(tmp_path, capsys):
    """Catches a traceback where runs are missing."""
    with one_line_error(capsys, "results.sh"):
        results.main(["--assets", str(tmp_path)])
    with one_line_error(capsys, "no finished run"):
        results.main(["--assets", str(tmp_path), "--collect", str(tmp_path)])


def test_a_page_of_tiny_runs(tmp_path):
    """Catches a script that stops half way, trains twice what is there, or a result that is not the run's."""
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / f"text/{i}.py").write_text((ROOT / "train.py").read_text()[500 * i:500 * i + 3000])
    prepare = ["data/prepare.py", "--input", str(tmp_path / "text"), "--vocab-size", "600"]
    subprocess.run([sys.executable, *prepare, "--out", str(tmp_path / "data")], cwd=ROOT, check=True,
                   capture_output=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # results.sh says `python`
    env = os.environ | dict(PATH=path, OUT=str(tmp_path / "out"), ASSETS=str(tmp_path), STEPS="2", BATCH="32",
                            FLAGS=f"{TINY} --data {tmp_path / 'data'}")
    page = lambda: subprocess.run(["bash", "results.sh", "whole-0.40-1"], cwd=ROOT, env=env, capture_output=True,
                                  text=True)
    done = page()
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out/router-0.log").read_text()[-500:]
    runs = json.loads((tmp_path / "results.json").read_text())
    assert set(runs) == {"router-0", "whole-0.40-1"} and "whole-0.40-1: done" in done.stdout
    assert runs["router-0"]["tokens"] == 2 * 4 * 32 and runs["whole-0.40-1"]["tokens"] == 8 * 32
    small, family = runs["whole-0.40-1"]["rows"][0], runs["router-0"]["rows"]
    assert small["params"] == next(row["params"] for row in family if row["budget"] == 0.4)
    again = page()
    assert again.returncode == 0 and "done" not in again.stdout, "trained twice"
