"""bench/choices.py: what a run's log says of the router's choices, against means by hand."""
import json

import pytest

from bench import choices
from plumbing.checkpoint import save_llama
from tests.helpers import GQA, one_line_error, random_llama


def record(step: int, sizes: dict, max_p: float = 0.5) -> str:
    """A line of log.jsonl: what the budgets of a step drew."""
    return json.dumps(dict(step=step, budget=list(sizes), sizes=list(sizes.values()),
                           max_p=[max_p] * len(sizes)))


@pytest.fixture
def run(tmp_path):
    """A run of four steps whose last but one ran twice."""
    save_llama(tmp_path, GQA, random_llama(GQA).state_dict())
    d, h, f, n = GQA.dim, GQA.n_heads, GQA.ffn_dim, GQA.n_layers
    full = [d, h, f, n]
    lines = [
        json.dumps(dict(argv=["train.py"], settings={})),
        record(0, {0.5: [d // 2, h, f, n], 1.0: full}, 0.1),
        record(1, {0.5: [d, h, f // 2, n], 1.0: full}, 0.3),
        json.dumps(dict(step=2, val={"0.5": 3.0})),
        record(2, {0.5: [d, h // 2, f, n], 1.0: full}, 0.9),
        record(2, {0.5: [d, h, f, n], 1.0: full}, 0.6),
        record(3, {0.5: [d, h, f, n // 2], 1.0: full}, 0.8),
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_means_of_a_window(run):
    """Catches a step that ran twice and counts twice, budget 1 among the rows, an axis under
    another's name."""
    rows = choices.windows(run, 2)
    assert [(row["budget"], row["step"]) for row in rows] == [(0.5, 1), (0.5, 3)]
    first, second = rows
    half_dim = (1 + GQA.dim // 2 / GQA.dim) / 2
    half_ffn = (1 + GQA.ffn_dim // 2 / GQA.ffn_dim) / 2
    half_depth = (1 + GQA.n_layers // 2 / GQA.n_layers) / 2
    expected = dict(dim=half_dim, n_heads=1, ffn_dim=half_ffn, n_layers=1, max_p=0.2)
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    expected = dict(dim=1, n_heads=1, ffn_dim=1, n_layers=half_depth, max_p=0.7)
    assert {name: second[name] for name in expected} == pytest.approx(expected)


def test_the_log_of_a_run_is_read(demo, capsys):
    """Catches train.py and this program with different words for the sizes."""
    root, _ = demo
    choices.main(["--run", str(root / "out/flex"), "--windows", "1"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["budget", "step", *choices.COLUMNS] and rows
    for row in rows:
        budget, _, *shares = map(float, row.split())
        assert budget < 1 and all(0 < share <= 1 for share in shares)


def test_a_picture_has_a_line_for_every_column(run, monkeypatch, capsys):
    """Catches an axis left out, and a budget's line in another's panel."""
    figure = pytest.importorskip("matplotlib.figure",
                                 reason="matplotlib is not installed: pip install matplotlib")
    drawn, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    choices.main(["--run", str(run), "--windows", "1", "--plot", str(run / "out.png")])
    assert (run / "out.png").read_bytes().startswith(b"\x89PNG")
    panel, = drawn[0].axes
    assert len(panel.lines) == len(choices.COLUMNS) and panel.get_title() == "budget 0.5"
    rows = choices.windows(run, 10)
    assert panel.lines[-1].get_ydata().tolist() == [row["max_p"] for row in rows]


@pytest.mark.parametrize("text, word", [
    (None, "does not exist"), ('{"step": 1}\n', "no sizes"), ('{"step": 1}\n{"st', ":2: found")])
def test_a_folder_without_choices(tmp_path, text, word, capsys):
    """Catches a traceback where there is no log, or one of a run that drew nothing."""
    if text:
        (tmp_path / "log.jsonl").write_text(text)
    with one_line_error(capsys, "log.jsonl", word):
        choices.read_log(tmp_path)
