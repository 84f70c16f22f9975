"""eval.py: the loss on a file is the slow sum over its tokens, and --json is what scripts can read."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench.speed as speed
import eval as evaluation
import export
import sample
from bench.speed import Peak
from data.heldout import text_windows
from data.shards import write_shard
from data.tokenizer import BOS, load_tokenizer
from model import LlamaConfig, SubNet
from plumbing.checkpoint import load_llama, save_llama
from plumbing.family import Member, open_family
from plumbing.tables import loss_table
from space import n_params
from tests.helpers import (
    GQA,
    MHA,
    SHAPES,
    deployed,
    export_at,
    make_supernet,
    one_line_error,
    random_llama,
)

TEXT = ("the dog sat on the cake: def ate(mat): return cat <|eot_id|> naïve 日本 🐈\n"
        "  and [line] for line in argv")
KEYS = {"budget", "got", "params", "params_total", "dim", "layers", "n_heads", "ffn_dim", "loss", "tokens"}


def slow_loss(model, tokens: list[int], context: int, subnet=None, factors=None) -> tuple[float, int]:
    """One target at a time: what stands before it in its window, one forward, float64 log-softmax. -> (mean,
    targets)."""
    total, n = 0.0, 0
    with torch.no_grad():
        for target in range(1, len(tokens)):
            start = (target - 1) // context * context  # windows of context + 1 tokens that share one
            logits = model(torch.tensor([tokens[start:target]]),
                           subnet=subnet, factors=factors)[0][0, -1].double()
            total, n = total - logits.log_softmax(-1)[tokens[target]].item(), n + 1
    return total / n, n


def tokens_of(folder, text: str) -> list[int]:
    """[BOS] + ids; special tokens that are spelled in a text are plain text."""
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    return [tokenizer.encode_single_token(BOS), *tokenizer.encode(text, disallowed_special=())]


def score(capsys, *argv) -> dict:
    """eval.py --json in this process: the last line of stdout, which is its only one; the table
    is on stderr."""
    capsys.readouterr()
    evaluation.main([str(a) for a in (*argv, "--json")])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "budget" in err and "loss" in err
    return json.loads(out.splitlines()[-1])


def test_loss_on_a_file_is_the_slow_sum(tmp_path, capsys):
    """Catches a missing BOS, windows that do not share a token or see each other, a dropped rest, a mean of
    means, and rows that are not in the order asked or whose sizes are not those that ran."""
    model, router = make_supernet(tmp_path / "flex", GQA)
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    tokens = tokens_of(tmp_path / "flex", TEXT)
    assert len(tokens) > 40 and (len(tokens) - 1) % 16, "this text has no rest"
    result = score(capsys, "--model", tmp_path / "flex", "--text", tmp_path / "text",
                   "--budgets", 0.6, 1, 0.5, "--batch", 2)
    assert (result["model"], result["context"]) == (str(tmp_path / "flex"), 16), "flex.pt says the context"
    assert [row["budget"] for row in result["rows"]] == [0.6, 1, 0.5]
    for row in result["rows"]:
        subnet, factors = deployed(router, row["budget"])
        loss, n = slow_loss(model, tokens, 16, subnet, factors)
        assert abs(row["loss"] - loss) < 1e-4 * loss and row["tokens"] == n == len(tokens) - 1
        assert KEYS <= set(row) and row["got"] <= row["budget"]
        assert (row["dim"], row["n_heads"], row["ffn_dim"], row["layers"]) == (
            subnet.dim, subnet.n_heads[0], subnet.ffn_dim[0], list(subnet.layers))
    assert len({row["loss"] for row in result["rows"]}) == 3


def test_any_context(tmp_path):
    """Catches a file shorter than one window that is not scored, targets lost where windows meet,
    and a rest that counts as much as all windows before it."""
    model, _ = make_supernet(tmp_path, GQA)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    tokens = tokens_of(tmp_path, "the cat sat on it")
    for end in (2, 6, 11, len(tokens)):  # one target; exactly one window of 5, exactly two, some
        text = tokenizer.decode(tokens[1:end])
        (tmp_path / "text").write_text(text, encoding="utf-8")
        ids = tokens_of(tmp_path, text)
        for context in (1, 5, 1000):
            pairs = text_windows(tmp_path / "text", tokenizer, context)
            row = evaluation.mean_loss(Member(model, model.full), pairs, 2)
            loss, n = slow_loss(model, ids, context)
            assert abs(row["loss"] - loss) < 1e-4 * loss and row["tokens"] == n == len(ids) - 1


def test_line_ends_are_scored_as_they_are(tmp_path, capsys):
    """Catches a text mode that turns \\r\\n into \\n: the tokens of the file are those of its bytes."""
    model, _ = make_supernet(tmp_path, GQA)
    (tmp_path / "text").write_bytes(b"the cat\r\nsat on\r\n")
    row = score(capsys, "--model", tmp_path, "--text", tmp_path / "text", "--budgets", 1)["rows"][0]
    assert row["tokens"] == len(tokens_of(tmp_path, "the cat\r\nsat on\r\n")) - 1


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_export_scores_as_the_supernet_does(tmp_path, capsys, shape):
    """Catches an evaluation that forgets the modulation, or counts parameters of another model
    than it ran."""
    make_supernet(tmp_path / "flex", SHAPES[shape])
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    ask = lambda model, *rest: score(capsys, "--model", model, "--text", tmp_path / "text", "--seq-len", 16,
                                     *rest)["rows"][0]
    flex = ask(tmp_path / "flex", "--budgets", 0.5)
    slim = ask(export_at(tmp_path / "flex", 0.5, tmp_path / "slim")[0])
    assert slim["budget"] == slim["got"] == 1 and abs(slim["loss"] - flex["loss"]) < 1e-4 * flex["loss"]
    assert all(slim[k] == flex[k] for k in ("params", "params_total", "dim", "n_heads", "ffn_dim", "tokens"))
    everything = sum(p.numel() for p in load_llama(tmp_path / "slim").parameters())
    assert slim["params_total"] == everything


def test_shards_are_scored_without_text(tmp_path, capsys):
    """Catches windows of another split, and a table that is not the model's own budgets by default."""
    model, router = make_supernet(tmp_path, MHA)
    ids = np.random.default_rng(0).integers(0, 560, 65)
    (write_shard(tmp_path / "val_000000.bin", ids, 560),
     write_shard(tmp_path / "train_000000.bin", ids[::-1], 560))
    rows = score(capsys, "--model", tmp_path, "--data", tmp_path, "--seq-len", 16, "--batch", 3)["rows"]
    assert [r["budget"] for r in rows] == [
        1.0, 0.9, 0.8, 0.7, 0.6, 0.5], "down to the smallest that was trained"
    for row in rows[::3]:
        loss, n = slow_loss(model, ids.tolist(), 16, *deployed(router, row["budget"]))
        assert abs(row["loss"] - loss) < 1e-4 * loss and row["tokens"] == n == 64
    few = score(capsys, "--model", tmp_path, "--data", tmp_path, "--seq-len", 16, "--windows", 2,
                "--budgets", 1)
    assert few["rows"][0]["tokens"] == 32


def test_budgets_under_all_trained_ones_are_marked(tmp_path, capsys):
    """Catches a size that no step prepared and that is offered like any other: in every
    program's table or on its stderr, once for a budget, with what trains further down; and a
    warning where training was."""
    model, router = make_supernet(tmp_path / "flex", GQA)     # trained at 1 and 0.5
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    flags = ["--model", str(tmp_path / "flex")]
    mend = "python train.py --budgets 1 0.5 0.4"

    def said(main, *more) -> str:
        capsys.readouterr()
        main([*flags, *map(str, more)])
        out, err = capsys.readouterr()
        assert (err.count("is under 0.5, the smallest budget")
                == err.count("python train.py --budgets 1 0.5 ") <= 1)
        return out + err

    text = said(evaluation.main, "--text", tmp_path / "text", "--seq-len", 16, "--budgets", 1, 0.7, 0.5, 0.4)
    assert mend in text and "; * trained, ! under all that were)" in text
    assert all(cell in text for cell in ("  1.00* ", "  0.70  ", "  0.50* ", "  0.40! "))
    text = said(evaluation.main, "--text", tmp_path / "text", "--seq-len", 16, "--budgets", 0.7, 0.5)
    assert "note: " not in text and "; * trained)" in text
    text = said(export.main, "--dry-run", "--budget", 0.5, 0.4)
    assert mend in text and "  0.500* " in text and "  0.400! " in text and "(* trained, ! under" in text
    assert mend in said(export.main, "--budget", 0.4, "--out", tmp_path / "small")
    assert mend in said(sample.main, "--budget", 0.4, "--max-new-tokens", 1)
    assert "note: " not in said(sample.main, "--budget", 0.5, "--max-new-tokens", 1)
    few = n_params(model.config, router.route(0.2), embeddings=True)
    assert "is under 0.5, the smallest budget" in said(
        export.main, "--params", few, "--out", tmp_path / "few")


def test_a_time_that_buys_less_than_was_trained(tmp_path, capsys):
    """Catches a slice found by its time that is under all trained ones, without a word; and a
    warning at the smallest trained slice itself, which costs less than its budget."""
    model, router = make_supernet(tmp_path, GQA)              # trained at 1 and 0.5
    family = open_family(tmp_path)
    for subnet, warned in ((router.route(0.5), 0), (model.full, 0), (router.route(0.2), 1)):
        family.note_small(subnet)
        assert capsys.readouterr().err.count("is under 0.5, the smallest budget") == warned


def test_per_layer_shapes_are_listed(tmp_path, capsys):
    """Catches a table that takes the first layer's size for all."""
    make_supernet(tmp_path, GQA)
    config = dataclasses.replace(GQA, vocab_size=560, n_heads=(8, 2, 4, 6), ffn_dim=(80, 13, 40, 7))
    save_llama(tmp_path / "odd", config, random_llama(config).state_dict(), tmp_path / "tokenizer.model")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    row = score(capsys, "--model", tmp_path / "odd", "--text", tmp_path / "text")["rows"][0]
    assert (row["n_heads"] == [8, 2, 4, 6] and row["ffn_dim"] == [80, 13, 40, 7]
            and row["layers"] == [0, 1, 2, 3])


def test_base_is_scored_on_the_same_tokens(folders, capsys, monkeypatch):
    """Catches a dense Llama compared on other windows, or the supernet's weights under its name."""
    monkeypatch.chdir(folders)
    result = score(capsys, "--model", "flex", "--base", "dense", "--text", "good", "--budgets", 1, 0.5)
    dense = score(capsys, "--model", "dense", "--text", "good", "--seq-len", 16)["rows"][0]
    assert (result["base"]["loss"] == pytest.approx(dense["loss"])
            and result["base"]["params"] == dense["params"])
    assert len({row["loss"] for row in result["rows"]} | {dense["loss"]}) == 3 and len(result["rows"]) == 2


def test_table_of_losses():
    """Catches columns that changed places, a star at a size in place of a trained budget, a
    perplexity of another base, sizes of the first layer for all."""
    rows = [dict(budget=0.8, got=0.75, dim=40, n_heads=4, ffn_dim=[13, 80, 40], layers=[0, 2, 3],
                 params=12345, params_total=23456, loss=2.5, tokens=64),
            dict(budget=0.75, got=0.7, dim=32, n_heads=2, ffn_dim=20, layers=[0, 2],
                 params=1234, params_total=3456, loss=1000.0, tokens=64)]
    header, first, second = loss_table(rows, 16, [0.75, 1.0]).splitlines()
    names = ["budget", "got", "dim", "heads", "ffn", "layers", "parameters", "with", "emb.", "loss", "ppl"]
    assert header.split()[:11] == names and "(64 tokens, windows of 16; * trained)" in header
    assert first.split() == ["0.80", "0.750", "40", "4", "13-80", "3", "12,345", "23,456", "2.500", "12.18"]
    assert second.split() == ["0.75*", "0.700", "32", "2", "20", "2", "1,234", "3,456", "1000.000", "inf"]
    base, = loss_table([rows[0] | dict(base="out/base")], 16, []).splitlines()[1:]
    assert base.split()[:2] == ["base", "0.750"]


def test_ranks_share_the_windows(monkeypatch):
    """Catches a rank that scores the inputs of some windows against the targets of others, windows
    scored twice, and a rank without windows that counts one. Four ranks in turn: the sum of what
    they send is the loss of one process."""
    model = random_llama(GQA)
    windows = torch.randint(97, (9, 9), generator=torch.Generator().manual_seed(1))
    pair = (windows[:, :-1], windows[:, 1:])
    whole = evaluation.evaluate(model, pair, batch=2)[0]
    assert whole == pytest.approx(model(*pair)[1].item(), rel=1e-5)
    sent = []
    monkeypatch.setattr(evaluation, "WORLD", 4)
    monkeypatch.setattr(evaluation.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluation.dist, "all_reduce", lambda total: sent.append(total.item()))
    for rank in range(4):
        monkeypatch.setattr(evaluation, "RANK", rank)
        evaluation.evaluate(model, pair, batch=2)
    assert sum(sent) / 72 == pytest.approx(whole, rel=1e-5)


def test_speed_is_a_ratio_to_the_full_model(tmp_path, capsys, monkeypatch):
    """Catches the supernet's memory under the name of a slice, a slice that is masked, not cut, and
    a full model that is not measured when it was not asked for. The work of the matrix products
    stands for the time, and the weights alone, counted by hand, are the smallest part of a peak."""
    def work(run, device) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    monkeypatch.setattr(speed, "seconds", work)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    config = LlamaConfig(dim=128, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=512, context=32)
    make_supernet(tmp_path, config)
    (tmp_path / "text").write_text("the cat", encoding="utf-8")
    result = score(capsys, "--model", tmp_path, "--text", tmp_path / "text", "--speed", "--batch", 2,
                   "--budgets", 0.4)
    small, = result["rows"]
    full = result["speed"]
    assert (full["prompt"], full["new"]) == (24, 8)
    # Two operations per weight that multiplies and token, and a little more in attention.
    # Embeddings do not multiply.
    whole_size = n_params(load_llama(tmp_path).config, SubNet.full(config), embeddings=True)
    multiplied = small["params_total"] - 560 * small["dim"]
    whole_multiplied = whole_size - 560 * config.dim
    for part in ("prefill", "decode"):
        assert small["speed"][part] == pytest.approx(whole_multiplied / multiplied, rel=0.1)
        assert full[part] == pytest.approx(1 / (2 * whole_multiplied), rel=0.2)  # tokens "per second"
    peak = small["speed"]["memory"] * full["memory"]
    for size, most in ((small["params_total"], peak), (whole_size, full["memory"])):
        assert 4 * size < most < 1.6 * 4 * size, "fp32, a KV cache and activations of 32 tokens"


def test_peak_counts_what_is_alive_at_a_time():
    """Catches views counted twice, tensors that stay counted when they are gone, and a sum in place
    of a peak."""
    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        c = b.view(10, 100)
        del b
        d = c * 2
        del a, c
        assert peak.now == 4000 and peak.most == 12000
        del d
    assert peak.now == 0
    weight = torch.zeros(500)
    with Peak([weight]) as peak:
        a = weight.view(5, 100)[:2] + 0
    assert peak.now == peak.most == 2000 + 800 and a.shape == (2, 100)


def test_plot_shows_every_budget(folders, capsys, monkeypatch):
    """Catches trained and interpolated budgets drawn alike, a point or the base left out, no file
    or half of one."""
    figure = pytest.importorskip("matplotlib.figure",
                                 reason="matplotlib is not installed: pip install matplotlib")
    monkeypatch.chdir(folders)
    drawn, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig",
                        lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    rows = score(capsys, "--model", "flex", "--base", "dense", "--text", "good",
                 "--budgets", 0.8, 0.5, 0.6, 1, "--plot", "out.png")
    assert (folders / "out.png").read_bytes().startswith(b"\x89PNG")
    axes, = drawn[0].axes
    points = {kind.get_label(): {tuple(p) for p in kind.get_offsets().tolist()} for kind in axes.collections}
    at = lambda *budgets: {(r["params"], r["loss"]) for r in rows["rows"] if r["budget"] in budgets}
    assert points == {"trained": at(0.5, 1), "interpolated": at(0.6, 0.8)}
    assert rows["base"]["loss"] in [line.get_ydata()[0] for line in axes.lines]


def test_a_picture_that_cannot_be_written(folders, capsys, monkeypatch):
    """Catches an evaluation that loses what it measured over its picture."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    monkeypatch.chdir(folders)
    with pytest.raises(SystemExit) as stop:
        evaluation.main("--model flex --text good --seq-len 16 --json --plot good/out.png".split())
    out, err = capsys.readouterr()
    assert (stop.value.code == 2 and json.loads(out)["rows"][0]["loss"] > 0
            and json.loads(out)["trained"] == [0.5, 1.0])
    assert err.splitlines()[-1].startswith("error: --plot good/out.png cannot be written")


def test_plot_without_matplotlib(folders, capsys, monkeypatch):
    """Catches a traceback at the end of a long evaluation, in place of a line at its start."""
    monkeypatch.chdir(folders)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with one_line_error(capsys, "pip install matplotlib"):
        evaluation.main("--model nowhere --plot out.png".split())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Texts, a supernet and four plain Llamas: its own weights, others, one without tokenizer, one
    with fewer tokens than its tokenizer."""
    path = tmp_path_factory.mktemp("models")
    model, _ = make_supernet(path / "flex", GQA)
    save_llama(path / "plain", model.config, model.state_dict(), path / "flex" / "tokenizer.model")
    save_llama(path / "mute", model.config, model.state_dict())
    save_llama(path / "small", GQA, random_llama(GQA).state_dict(), path / "flex" / "tokenizer.model")
    dense = random_llama(model.config, 5).state_dict()
    save_llama(path / "dense", model.config, dense, path / "flex" / "tokenizer.model")
    for name, content in dict(good=b"the cat", latin1=b"the c\xe9t", empty=b"",
                              pointer=b"version https://git-lfs.x").items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("command,words", [
    ("plain --text good --budgets 0.5", "plain 1.0"), ("plain --text good --budgets 1.0 0.5", "plain"),
    ("flex --text latin1", "latin1 UTF-8 5"), ("flex --text empty", "empty"),
    ("flex --text nowhere", "nowhere"), ("flex --text a.svg --plot a.svg", "a.svg text"),
    ("flex --text pointer", "pointer LFS"), ("flex --text good --data good", "--data not allowed"),
    ("flex --text flex", "flex"), ("flex --text good --budgets 0.01", "0.01"),
    ("flex --text good --budgets 0.5 1.2", "1.2"),
    ("flex --data nowhere", "nowhere"), ("mute --text good", "tokenizer.model"),
    ("small --text good", "small"), ("gone --text good", "gone"),
    ("flex --no-such-flag", "--no-such-flag"), ("flex --text good --seq-len -3", "-3"),
    ("flex --tasks sudoku", "sudoku piqa"), ("flex --tasks piqa --limit 0", "--limit 0"),
    ("flex --tasks piqa", "piqa valid.jsonl data/tasks"), ("flex --text good --plot out.gif", "out.gif .png"),
    ("flex --text good --base small", "small tokenizer"), ("flex --text good --base mute", "mute tokenizer"),
    ("flex --text good --seq-len 0", "0"), ("flex --text good --batch 0", "0")])
def test_mistakes(folders, capsys, monkeypatch, command, words):
    """Catches a traceback, or the full model's loss under the name of a budget that a plain Llama
    does not have."""
    monkeypatch.chdir(folders)
    with one_line_error(capsys, *words.split()):
        evaluation.main(["--json", "--model", *command.split()])
