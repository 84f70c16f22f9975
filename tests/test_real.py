"""real.sh, real.py and what they call: every run that is named can start, and the tables say what
the runs were."""
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys

import pytest
import torch

import plumbing.settings
import search.__main__ as search
from bench import own_text, quantised, real
from data.heldout import text_windows
from data.shards import Shards
from data.tokenizer import load_tokenizer
from eval import mean_loss
from model import LlamaConfig
from plumbing.family import Member
from tests.helpers import GQA, one_line_error, random_llama
from tests.processes import ROOT
from tests.test_gguf import needs_gguf, raw_llama

SMOL = LlamaConfig(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536,
                   vocab_size=49152, tied=True)
NO_TRAINING = ("base", "cut")
ZEROS = """
import sys
import gguf
source, out, kind = sys.argv[1:]
assert kind == "Q4_0"
data = bytearray(open(source, "rb").read())
start = gguf.GGUFReader(source).data_offset
data[start:] = bytes(len(data) - start)
open(out, "wb").write(data)
"""


def test_every_run_has_flags_that_exist_and_a_place_in_the_table(monkeypatch):
    """Catches a run whose flags train.py or search refuse, two runs of one name, and one that no
    table can name."""
    done = subprocess.run(["bash", str(ROOT / "bench/real.sh"), "--list"], cwd="/",
                          capture_output=True, text=True)
    monkeypatch.setattr(plumbing.settings, "read_config", lambda folder: SMOL)
    runs = {words[0]: words[1:] for words in map(shlex.split, done.stdout.splitlines())}
    assert len(runs) == len(done.stdout.splitlines()) > 12
    for name, flags in runs.items():
        kind = name.split("-")[0]
        assert kind in {*real.WHAT, real.QUANTISED}
        if kind == real.QUANTISED:
            quantised.parse_args(["--text", "x", *flags])
        elif kind == "search":
            search.parse_args(["--llama", "x", "--data", "x", *flags])
        elif kind not in NO_TRAINING:
            args = plumbing.settings.parse_args(["--llama", "x", "--laptop", *flags])
            assert args.steps == (440 if kind in ("all", "long") else 110)
        else:
            assert not flags
    assert {name.split("-")[0] for name in runs} == {*real.WHAT, real.QUANTISED}


def fake(budgets: list[float], trained=(1.0, 0.6), loss: float = 3.0) -> dict:
    """What eval.py --json prints of a family; the loss rises by one from 1.0 to 0."""
    rows = []
    for b in budgets:
        task = dict(acc=b / 2, acc_norm=0.1, perplexity=9.0, n=200)
        rows.append(dict(budget=b, got=b - 0.01, params=int(1e6 * b), dim=8, n_heads=2, ffn_dim=16,
                         layers=[0, 1], loss=loss + 1 - b, tokens=1000,
                         tasks=dict(hellaswag=task, lambada_openai=task)))
    return dict(trained=list(trained), rows=rows)


def test_the_table_says_what_the_runs_were(tmp_path, capsys):
    """Catches a budget that nobody trained among those that were, a perplexity that is a loss, a
    metric that the paper does not show, and rows under another size."""
    (tmp_path / "real").mkdir()
    runs = {"base": fake([1.0], [], 2.5), "family": fake([1.0, 0.8, 0.6, 0.5]),
            "own-0.60": fake([1.0], [1.0], 4.0)}
    runs["own-0.60"]["rows"][0] |= dict(params=600_000, got=1.0)
    for name, found in runs.items():
        heldout = dict(rows=[dict(loss=row["loss"] + 7, tokens=500) for row in found["rows"]])
        printed = [found, heldout]
        if name == "family":  # MMLU at some of its sizes
            answers = dict(mmlu=dict(acc=0.26, acc_macro=0.4, n=228))
            printed.append(dict(rows=[dict(budget=0.6, tasks=answers)]))
        (tmp_path / f"real/{name}.json").write_text("".join(json.dumps(line) + "\n" for line in printed))
    log = [dict(settings=dict(seq_len=4, batch_tokens=8, budgets=[1.0, 0.6]),
                commit="c0ffee", torch="2", device="cpu"),
           dict(step=5, val={"1.0": 3.1, "0.6": 3.9}), dict(step=10, val={"1.0": 3.0, "0.6": 3.4})]
    (tmp_path / "real/family").mkdir()
    (tmp_path / "real/family/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    curves = real.losses_by_tokens(tmp_path / "real/family")
    assert curves == {"1.0": {"80": 3.1, "160": 3.0}, "0.6": {"80": 3.9, "160": 3.4}}
    (tmp_path / "real/family/log.jsonl").unlink()  # a family without a log took nothing that is known
    runs = real.collect(tmp_path / "real")
    runs["family"]["losses"] = curves
    assert runs["family"]["rows"][2]["tasks"]["mmlu"] == [0.26, 228]
    runs["base"]["rows"][0]["tasks"]["mmlu"] = [0.31, 228]
    rows = [dict(budget=1.0, kind="q8_0", params=5, bytes=2_000_000, bits=8.5, loss=3.25)]
    runs["quantised"] = dict(tokens=9, rows=rows)
    runs["family"] |= dict(steps=10, tokens=160, flops=6e9, seconds=7200, autocast="bfloat16",
                            commit="c0ffee")
    (tmp_path / "real.json").write_text(json.dumps(runs))
    real.main(["--assets", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("Held out: nats on 500 tokens. WikiText-2: perplexity on 1,000. "
                        "Tasks: hellaswag 200 rows, lambada_openai 200 rows, mmlu 228 rows")
    body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:10]]
    assert [(row[0], row[1], row[2]) for row in body] == [
        ("1.0M [1.000]", "the base, untouched", ""), ("1.0M [1.000]", "**the family**", "Exp."),
        ("0.8M [0.800]", "**the family**", "Inter."), ("0.6M [0.600]", "**the family**", "Exp."),
        ("0.6M [0.600]", "it alone, on its own tokens", ""), ("0.5M [0.500]", "**the family**", "under")]
    assert body[3][3:5] == ["10.400", f"{math.exp(3.4):.2f}"]
    # acc_norm of HellaSwag, acc of LAMBADA, their mean, and MMLU, which is in no mean
    assert body[3][5:] == ["0.100", "0.300", "0.200", "0.260"]
    assert body[0][8] == "0.310" and body[2][8] == "-"
    assert "| 0.6 | 3.900 | 3.400 |" in lines
    assert "| 2.0 | 1 | q8_0 | 8.50 | **3.250** |" in lines
    assert lines[-1] == "| family | 10 | 160 | 6.0e+09 | 2.0 | bfloat16 | c0ffee |"


def test_the_picture(tmp_path):
    """Catches a picture that lacks a series, or is not drawn."""
    pytest.importorskip("matplotlib")
    row = dict(params=100, heldout=3.0)
    whole = dict(rows=[row, dict(params=50, heldout=4.0)])
    runs = {"base": dict(rows=[row]), "family": whole, "cut-0.60": dict(rows=[dict(params=60, heldout=5.0)])}
    runs |= {"depth": dict(rows=[dict(params=90, heldout=4.5)]),
             "own-0.60": dict(rows=[dict(params=60, heldout=4.2)])}
    pictures = set()
    for left_out in [None, *runs]:
        real.draw({name: run for name, run in runs.items() if name != left_out}, tmp_path / "real.png")
        pictures.add((tmp_path / "real.png").read_bytes())
    assert len(pictures) == 6 and all(p.startswith(b"\x89PNG") for p in pictures)
    assert real.rows_of(runs, "own") == [dict(params=60, loss=4.2)]


def committed() -> dict:
    """assets/real.json."""
    return json.loads((ROOT / "assets/real.json").read_text())


def test_the_page_has_the_tables():
    """Catches a number in RESULTS.md that the committed runs do not say."""
    runs = committed()
    page = (ROOT / "RESULTS.md").read_text()
    curves = [real.curve_table(runs[name]) for name in real.CURVES if name in runs]
    for made in (real.table(runs), *curves, real.cost_table(runs)):
        assert made in page
    if real.QUANTISED in runs:
        assert quantised.table(runs[real.QUANTISED]["rows"]) in page


def test_readme_says_what_the_runs_say():
    """Catches a figure of README's walk that the committed runs do not say."""
    runs = committed()
    page = (ROOT / "README.md").read_text()
    last = {budget: curve[max(curve, key=int)] for budget, curve in runs["family"]["losses"].items()}
    rows = {float(words[0].strip("*")): words for words in map(str.split, page.splitlines())
            if len(words) == 10 and words[2] == "576"}
    for budget, loss in last.items():
        assert rows[float(budget)][8] == f"{loss:.3f}"
        cut = "base" if budget == "1.0" else f"cut-{float(budget):.2f}"
        if cut in runs:
            assert rows[float(budget)][7] == f"{runs[cut]['rows'][0]['heldout']:.3f}"
    found = {row["budget"]: row["loss"] for row in runs["family"]["rows"]}
    base = runs["base"]["rows"][0]["loss"]
    said = " ".join(page.split())
    assert (f"the base has {base:.3f} and the family {found[1.0]:.3f}, {found[0.8]:.3f} and "
            f"{found[0.6]:.3f} at 1, .8") in said


def test_the_tables_of_a_part_are_no_run(tmp_path):
    """Catches a second part that takes the first one's real.json, beside the runs, for one of them."""
    rows = json.dumps(fake([1.0], []))
    heldout = json.dumps(dict(rows=[dict(loss=3.0, tokens=5)]))
    (tmp_path / "base.json").write_text(f"{rows}\n{heldout}\n")
    for _ in range(2):
        real.main(["--collect", str(tmp_path), "--assets", str(tmp_path)])
    assert list(json.loads((tmp_path / "real.json").read_text())) == ["base"]


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
    done = subprocess.run(["bash", str(ROOT / "bench/real.sh"), words],
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and f"no run begins with {words}" in done.stderr


# -----------------------------------------------------------------------------
# text that the Llama wrote


def test_own_text_is_drawn_as_without_a_cache():
    """Catches rows that read each other's text, a position that is off by one, and numbers drawn in
    another order."""
    model = random_llama(GQA)
    found = own_text.write_texts(model, 3, 4, 7, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    texts = torch.full((4, 1), 3)
    for _ in range(7):
        p = model(texts)[0][:, -1].softmax(-1)
        texts = torch.cat([texts, torch.multinomial(p, 1, generator=generator)], 1)
    assert found.tolist() == texts[:, 1:].tolist()
    assert len({tuple(row) for row in found.tolist()}) == 4


def test_a_document_ends_where_the_model_ends_it():
    """Catches an end inside a document."""
    assert own_text.up_to_end([5, 6, 0, 7, 1], {0, 1}) == [5, 6]
    assert own_text.up_to_end([0, 5], {0, 1}) == []
    assert own_text.up_to_end([5, 6], {0, 1}) == [5, 6]


def test_own_text_is_what_a_run_reads(tmp_path, capsys):
    """Catches fewer tokens than asked for, documents without their beginning or past their end, and shards of
    another vocabulary."""
    raw_llama(tmp_path / "llama", GQA)
    enc = load_tokenizer(tmp_path / "llama/tokenizer.model", 560)
    bos = enc.encode_single_token(enc.settings.bos)
    argv = ["--model", str(tmp_path / "llama"), "--tokens", "900", "--length", "20", "--batch", "8"]
    own_text.main([*argv, "--out", str(tmp_path / "own")])
    said = capsys.readouterr().out
    train, val = (Shards(tmp_path / "own", split, 5, 560) for split in ("train", "val"))
    assert train.n_tokens + val.n_tokens >= 900
    assert f" {train.n_tokens:,} train, {val.n_tokens:,} val tokens" in said

    ends = {enc.encode_single_token(name) for name in enc.settings.eos} - {bos}
    for split in (train, val):
        tokens = split.tokens[0].tolist()
        assert tokens[0] == bos and not ends & set(tokens)
        places = [i for i, token in enumerate(tokens) if token == bos] + [len(tokens)]
        assert all(2 <= after - at <= 21 for at, after in zip(places, places[1:]))

    # The same seed, the same text; without the tokenizer too
    own_text.main([*argv, "--out", str(tmp_path / "again")])
    assert Shards(tmp_path / "again", "train", 5, 560).fingerprint() == train.fingerprint()
    (tmp_path / "llama/tokenizer.model").unlink()
    with one_line_error(capsys, "tokenizer.model does not exist", "--bos"):
        own_text.main([*argv, "--out", str(tmp_path / "own")])
    own_text.main([*argv, "--bos", str(bos), "--out", str(tmp_path / "ids")])
    assert Shards(tmp_path / "ids", "train", 5, 560).tokens[0][0] == bos
    assert not (tmp_path / "ids/tokenizer.model").exists()
    with one_line_error(capsys, "--bos 560", "below the vocabulary"):
        own_text.main([*argv, "--bos", "560", "--out", str(tmp_path / "own")])
    with one_line_error(capsys, "--length 9000", "the window"):
        own_text.main([*argv, "--length", "9000"])
    with one_line_error(capsys, "one document", "expected two"):
        own_text.main([*argv, "--bos", str(bos), "--tokens", "5", "--batch", "1",
                       "--out", str(tmp_path / "one")])
    assert not (tmp_path / "one").exists()


def test_a_llama_that_writes_nothing_is_a_line(tmp_path, capsys, monkeypatch):
    """Catches a program that never ends, and one that works first and refuses its folder afterwards."""
    raw_llama(tmp_path / "llama", GQA)
    bos = load_tokenizer(tmp_path / "llama/tokenizer.model", 560).encode_single_token("<|begin_of_text|>")
    monkeypatch.setattr(own_text, "write_texts",
                        lambda model, bos, n, length, generator: torch.full((n, 5), bos))
    argv = ["--model", str(tmp_path / "llama"), "--length", "5", "--out"]
    with one_line_error(capsys, "before its first token"):
        own_text.main([*argv, str(tmp_path / "own")])
    assert not (tmp_path / "own").exists()
    with one_line_error(capsys, "holds other things"):
        own_text.main([*argv, str(tmp_path)])


# -----------------------------------------------------------------------------
# sizes in encodings


@needs_gguf
def test_encodings_are_scored_as_the_file_holds_them(tmp_path, capsys):
    """Catches a loss of the weights before they were rounded, another slice's, and bytes of another file."""
    wide = dataclasses.replace(GQA, dim=64, ffn_dim=96)
    model = raw_llama(tmp_path / "llama", wide)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ate the cake " * 9)
    fake = tmp_path / "quantize"  # what llama.cpp's program would do, but all tensors become 0
    fake.write_text(f"#!{sys.executable}\n" + ZEROS)
    fake.chmod(0o755)
    argv = ["--model", str(tmp_path / "llama"), "--budgets", "1.0", "--seq-len", "32",
            "--text", str(text), "--json"]
    quantised.main([*argv, "--kinds", "f16", "q8_0", "q4_0", "--llama-quantize", str(fake)])
    *table, last = capsys.readouterr().out.splitlines()
    half, byte, none = json.loads(last)["rows"]

    tokenizer = load_tokenizer(tmp_path / "llama/tokenizer.model", 560)
    pairs = text_windows(text, tokenizer, 32)
    exact = mean_loss(Member(model, model.full), pairs, None)["loss"]
    state = {name: w.half().float() if w.dim() > 1 else w for name, w in model.state_dict().items()}
    model.load_state_dict(state)
    assert half["loss"] == pytest.approx(mean_loss(Member(model, model.full), pairs, None)["loss"],
                                         abs=2e-5) != exact
    assert 1e-5 < abs(byte["loss"] - half["loss"]) < 0.1
    assert none["loss"] == pytest.approx(math.log(560), abs=1e-4)
    assert byte["bytes"] < 0.7 * half["bytes"] and none["bytes"] == half["bytes"]
    assert half["bits"] == pytest.approx(8 * half["bytes"] / sum(w.numel() for w in model.parameters()),
                                         abs=0.01)
    assert len(table) == 5 and table[2].startswith(f"| {byte['bytes'] / 1e6:.1f} | 1 | q8_0 |")


def test_what_nothing_smaller_beats():
    """Catches a row in bold that a smaller file beats, or one that is not though none does."""
    rows = [dict(bytes=b, loss=x)
            for b, x in ((30, 2.0), (10, 3.0), (20, 3.5), (40, 2.0), (25, 2.5), (10, 3.2))]
    found = {(row["bytes"], row["loss"]): row["best"] for row in quantised.smallest_first(rows)}
    assert found == {(10, 3.0): True, (10, 3.2): False, (20, 3.5): False,
                     (25, 2.5): True, (30, 2.0): True, (40, 2.0): False}


@needs_gguf
@pytest.mark.parametrize("program, expected", [("nowhere", "does not start"), ("false", "made no q4_0")])
def test_a_quantiser_that_fails_is_a_line(tmp_path, capsys, program, expected):
    """Catches a traceback, and a figure of a file that is not there."""
    raw_llama(tmp_path / "llama", GQA)
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    with one_line_error(capsys, expected, "q4_0"):
        quantised.main(["--model", str(tmp_path / "llama"), "--budgets", "1.0", "--kinds", "q4_0",
                        "--text", str(tmp_path / "text.txt"), "--llama-quantize", program])


@needs_gguf
def test_sizes_that_a_model_has_not_are_refused_first(tmp_path, capsys, monkeypatch):
    """Catches minutes of work before a size that does not exist, and a plain Llama asked for .8."""
    raw_llama(tmp_path / "llama", GQA)
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    argv = ["--model", str(tmp_path / "llama"), "--text", str(tmp_path / "text.txt"), "--kinds", "f16"]
    quantised.main(argv)
    assert capsys.readouterr().out.count("| f16 |") == 1
    monkeypatch.setattr(quantised, "measure", lambda *_: pytest.fail("it was measured"))
    with one_line_error(capsys, "its only budget is 1.0"):
        quantised.main([*argv, "--budgets", "1.0", "0.8"])
    with one_line_error(capsys, "--seq-len 0"):
        quantised.main([*argv, "--seq-len", "0"])


def test_what_is_missing_is_said_before_anything_runs(tmp_path):
    """Catches a script that trains for hours and then finds no text to judge with."""
    environment = os.environ | {"OUT": str(tmp_path / "out"), "LLAMA": str(tmp_path),
                                "DATA": str(tmp_path / "none")}
    done = subprocess.run(["bash", str(ROOT / "bench/real.sh")], capture_output=True, text=True,
                          env=environment)
    assert (done.returncode == 2 and done.stderr.count("\n") == 1
            and f"error: {tmp_path / 'none'}" in done.stderr)
    assert not (tmp_path / "out").exists()
