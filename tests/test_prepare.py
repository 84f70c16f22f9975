"""data/prepare.py on small text: what is read, how it is split, and what an accident leaves."""
import argparse
import gzip
import json
import os
import subprocess
import sys
import sysconfig
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from data import prepare as module
from data.prepare import HIDDEN, NO_PROSE, Skipped, documents, find_files, held_out, open_data, prepare
from data.shards import Shards, read_shard
from data.tokenizer import BOS, load_tokenizer, save_tokenizer, train_bpe
from test_tokenizer import one_line

ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"part{k % 3}/file{k:02d}.txt" for k in range(60)]


def drawn(name: str, fraction: float = 0.05) -> bool:
    """Is a document of this path drawn to val?"""
    return int(blake2b(name.encode()).hexdigest()[:12], 16) < fraction * 16**12


@pytest.fixture
def corpus(tmp_path):
    """60 short text files; each holds its own name, so that tokens tell where they come from."""
    for name in NAMES:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n" + f"the quick brown fox of {name} jumps over the dog.\n" * 5)
    return tmp_path / "corpus"


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "given.model", train_bpe(["the quick brown fox jumps over"], 520))
    return tmp_path / "given.model"


def texts(out: Path, split: str) -> list[str]:
    """The documents of a split, in order, decoded from its shards."""
    enc = load_tokenizer(out / "tokenizer.model")
    tokens = np.concatenate([read_shard(p) for p in sorted(out.glob(f"{split}_*.bin"))])
    return enc.decode(tokens.tolist()).split(BOS)[1:]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_two_runs_are_identical_and_the_splits_disjoint(corpus, tmp_path, capsys):
    """Catches: an order or split that depends on the disk, the hash seed or an earlier folder; a
    script with imports that only work from the project's root, or flags that reach nothing."""
    a = prepare([corpus], tmp_path / "a", vocab_size=600)
    command = [sys.executable, ROOT / "data/prepare.py", "--input", "corpus", "--vocab-size", "600"]
    script = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    assert sorted(contents(a)) == ["tokenizer.model", "train_000000.bin", "val_000000.bin"]
    assert contents(a) == contents(tmp_path / "data/corpus")
    train, val = texts(a, "train"), texts(a, "val")
    assert val and sorted(train + val) == [(corpus / name).read_text() for name in sorted(NAMES)]
    assert train == [(corpus / n).read_text() for n in sorted(NAMES) if not drawn(n)]
    n_tokens = sum(len(read_shard(path)) for path in a.glob("*.bin")) - len(NAMES)  # without the BOS of each
    n_bytes = sum((corpus / name).stat().st_size for name in NAMES)
    out = capsys.readouterr().out
    assert "60 documents" in out and f"{n_bytes / n_tokens:.2f} bytes per token" in out
    assert load_tokenizer(a / "tokenizer.model").n_vocab == 600


def test_the_tokenizer_is_trained_on_train_text_only(corpus, tmp_path):
    """Catches: validation text that leaks into the vocabulary."""
    of_val = [name for name in NAMES if drawn(name)]
    for name in of_val:
        (corpus / name).write_text(f"{name} zyzzyva " * 9)
    out = prepare([corpus], tmp_path / "out", vocab_size=600)
    assert of_val and not any(b"zz" in t for t in load_tokenizer(out / "tokenizer.model")._mergeable_ranks)


def test_every_kind_of_input(tmp_path, tokenizer):
    """Catches: a suffix that is not read, gzip that is not unpacked, wrong documents of jsonl."""
    lines = "\n".join(json.dumps({"text": f"line {k} é", "id": k}) for k in range(3)) + "\n\n"
    folder = tmp_path / "in"
    (folder / ".hidden").mkdir(parents=True)
    for name, data in {"a.txt": b"plain", "b.md": b"# mark\r\n", "c.py": b"x = 1\n",
                       "d.jsonl": lines.encode(), "e.jsonl.gz": gzip.compress(b'{"text": "zipped"}'),
                       "f.txt.gz": gzip.compress(b"packed"),
                       "g.csv": b"not read", ".hidden/h.txt": b"not read", "i.txt": b" \n",
                       "j.txt": b"\xff\xfe not UTF-8"}.items():
        (folder / name).write_bytes(data)
    skipped = Skipped()
    docs = list(documents(find_files(folder, HIDDEN, skipped), skipped))
    assert docs == [("a.txt", "plain"), ("b.md", "# mark\r\n"), ("c.py", "x = 1\n"),
                    ("d.jsonl:1", "line 0 é"), ("d.jsonl:2", "line 1 é"), ("d.jsonl:3", "line 2 é"),
                    ("e.jsonl.gz:1", "zipped"), ("f.txt.gz", "packed")]
    assert skipped == {"not UTF-8": [str(folder / "j.txt")]}


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of Unix")
def test_what_is_not_read_is_named(corpus, tmp_path, tokenizer, monkeypatch, capsys):
    """Catches: a folder that cannot be opened, or a link to one, that is passed over without a word; a pipe
    that is waited for; a pointer of Git LFS that is taken for text."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.txt").write_text("not read")
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "circle").symlink_to(corpus)
    (corpus / "nowhere.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(corpus / "pipe.txt")
    for k in range(4):
        (corpus / f"latin{k}.txt").write_bytes(b"\xe9")
    (corpus / "lfs.txt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214\nsize 2471\n")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("part1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    prepare([corpus], tmp_path / "out", tokenizer)
    said = capsys.readouterr().out
    assert "40 documents" in said and f"1 unreadable folders ({corpus / 'part1'})" in said
    links, files, latin = ([str(corpus / name) for name in names.split()] for names in (
        "circle link", "nowhere.txt pipe.txt", "latin0.txt latin1.txt latin2.txt"))
    assert any(f"2 links to folders ({a}, {b})" in said for a, b in (links, links[::-1]))
    assert any(f"2 links to nothing or pipes ({a}, {b})" in said for a, b in (files, files[::-1]))
    assert f"1 pointers of Git LFS ({corpus / 'lfs.txt'})" in said
    assert f"4 not UTF-8 ({', '.join(latin)} ...)" in said


def test_val_has_its_share_of_the_bytes():
    """Catches: 60 documents of which val gets 0.2 % or 31 % of the text."""
    low, high = 2**40, 2**47
    # Drawn as the hashes say, where that gives from half to twice the share.
    hashes = np.array([low] * 3 + [high] * 97)
    assert held_out(hashes, np.ones(100), 0.05).tolist() == [True] * 3 + [False] * 97
    # Too much: the first does not fit, the next three do, and then it is enough.
    hashes = np.array([low, low + 1, low + 2, low + 3, high, high + 1])
    sizes = np.array([60, 2, 1, 1, 35, 1])
    assert held_out(hashes, sizes, 0.05).tolist() == [False, True, True, True, False, False]
    # Too little: val is filled in the order of the hashes, not of the files.
    hashes = np.array([high + 1, high, high + 2] * 20 + [high - 1])
    sizes = np.array([1] * 60 + [0])
    assert held_out(hashes, sizes, 0.05).nonzero()[0].tolist() == [1, 4, 7, 60]
    generator = np.random.default_rng(0)
    for _ in range(50):
        hashes = generator.integers(2**48, size=60)
        sizes = generator.pareto(1.0, 60) + 1
        share = sizes[held_out(hashes, sizes, 0.1)].sum() / sizes.sum()
        assert 0.05 <= share <= 0.2


def test_equal_documents_are_on_one_side(corpus, tmp_path, tokenizer):
    """Catches: a text that is trained on and held out, under two names; of a few documents, the
    last one that is the first one again."""
    for name in NAMES:
        (corpus / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / "again" / name).write_text((corpus / name).read_text())
    out = prepare([corpus], tmp_path / "out", tokenizer)
    train, val = texts(out, "train"), texts(out, "val")
    assert len(train) + len(val) == 120 and val and not set(train) & set(val)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    once = prepare([tmp_path / "a.txt"], tmp_path / "once", tokenizer)
    twice = prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "twice", tokenizer)
    assert contents(once) == contents(twice)
    # Two short ones of one name are two: "Yes." is nobody's copy.
    for folder, text in (("c", "the fox"), ("d", "the dog")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
    both = prepare([tmp_path / "c/x.txt", tmp_path / "d/x.txt"], tmp_path / "both", tokenizer,
                   val_fraction=0.3)
    assert "".join(
        texts(both, "train") + [load_tokenizer(tokenizer).decode(read_shard(both / "val_000000.bin"))]
    ).count("the ") == 2


def test_few_documents(tmp_path, tokenizer, capsys):
    """Catches: a single book that is all train or all val."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    out = prepare([tmp_path / "book.txt"], tmp_path / "out", tokenizer, val_fraction=0.05)
    train, val = (read_shard(out / f"{split}_000000.bin") for split in ("train", "val"))
    assert len(val) == pytest.approx(0.05 * (len(train) + len(val)), abs=1)
    assert load_tokenizer(tokenizer).decode([*train[1:], *val]) == (tmp_path / "book.txt").read_text()
    assert "few documents: the last 5.0%" in capsys.readouterr().out


def test_the_end_of_few_documents_trains_no_tokenizer(tmp_path):
    """Catches: the held-out end of a book that leaks into its vocabulary."""
    text = "the quick brown fox jumps over the lazy dog\n" * 50
    end = "zyzzyva " * 12
    assert len(end) < 0.05 * len(text + end)
    (tmp_path / "book.txt").write_text(text + end)
    out = prepare([tmp_path / "book.txt"], tmp_path / "out", vocab_size=540)
    enc = load_tokenizer(out / "tokenizer.model")
    assert enc.n_vocab == 540 and not any(b"zy" in token for token in enc._mergeable_ranks)


def test_shards_of_a_given_size_and_tokenizer(corpus, tmp_path, tokenizer):
    """Catches: tokens lost where shards meet, the given tokenizer changed, stale shards kept."""
    whole = prepare([corpus], tmp_path / "whole", tokenizer)
    small = prepare([corpus], tmp_path / "small", tokenizer, shard_tokens=1000)
    sizes = [len(read_shard(path)) for path in sorted(small.glob("train_*.bin"))]
    assert len(sizes) > 2 and set(sizes[:-1]) == {1000} and texts(small, "train") == texts(whole, "train")
    assert (small / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    prepare([corpus], small, small / "tokenizer.model")            # the folder's own tokenizer
    assert contents(small) == contents(whole)
    assert len(Shards(small, "train", 16, 520)) > 0


def test_an_interrupted_run_leaves_the_old_folder(corpus, tmp_path, tokenizer, monkeypatch):
    """Catches: train shards without val, or a new tokenizer beside old shards, taken for whole."""
    out = prepare([corpus], tmp_path / "out", tokenizer)
    before = contents(out)
    write = module.write_shard

    def stop_at_val(path, *rest):
        if "val_" in str(path):
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(module, "write_shard", stop_at_val)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], folder, vocab_size=600)
    assert contents(out) == before and not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_data_of_a_run(corpus, tmp_path, monkeypatch, capsys):
    """Catches: the demo's data made with a Llama's own tokenizer, or made again when it is there;
    shards whose ids mean other words to the Llama."""
    made = []

    def little(inputs, out, tokenizer):
        made.append((out, tokenizer))
        prepare([corpus], out, tokenizer, vocab_size=600)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "prepare", little)
    args = argparse.Namespace(llama=None, data=None, seq_len=16, seed=3)
    for _ in range(2):
        folder, train, val = open_data(args)
        assert folder == "data/pystdlib" and made == [(folder, None)]
        assert train.vocab_size == 600 and train.seq_len == 16 and val.seed == 3
    assert val.paths[0].name == "val_000000.bin"
    # A Llama with a tokenizer of its own gets its own folder; the demo's stays what it was.
    llama = tmp_path / "own"
    save_tokenizer(llama / "tokenizer.model", train_bpe(["the quick brown fox jumps over"], 520))
    (llama / "params.json").write_text(
        json.dumps(dict(dim=32, n_layers=1, n_heads=2, vocab_size=520, norm_eps=1e-5)))
    args.llama = "own"
    folder, train, _ = open_data(args)
    assert folder == "data/pystdlib-own" and made[1:] == [(folder, Path("own/tokenizer.model"))]
    assert train.vocab_size == 520
    args.data = "data/pystdlib"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        open_data(args)
    assert "another tokenizer than own/tokenizer.model" in one_line(capsys)


def bad_inputs(tmp_path: Path) -> dict[str, tuple[dict, str]]:
    """What a user can get wrong -> arguments of prepare(), and words the message must hold."""
    for name, data in {"empty.txt": b" \n", "bad.jsonl": b'{"text": "ok"}\n{"text": \n', "a.csv": b"x",
                       "other.jsonl": b'{"text": "ok"}\n\n{"body": "x"}\n', "list.jsonl": b"[1]\n",
                       "number.jsonl": b'{"text": 3}', "good.txt": b"some words " * 99,
                       "deep.jsonl": b"[" * 100_000, "latin.txt": b"\xe9",
                       "cut.txt.gz": gzip.compress(b"many words" * 99)[:30],
                       "zip.txt.gz": b"no gzip"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.doc").write_bytes(b"years of work")
    file = {name: {"inputs": [tmp_path / name]} for name in (
        "none.txt", "empty.txt", "bad.jsonl", "other.jsonl", "list.jsonl", "number.jsonl", "deep.jsonl",
        "folder", "a.csv", "latin.txt", "cut.txt.gz", "zip.txt.gz", "good.txt")}
    good = file["good.txt"]
    return {"missing": (file["none.txt"], "none.txt"), "empty": (file["empty.txt"], "empty.txt"),
            "kind": (file["a.csv"], ".jsonl"), "folder": (file["folder"], "folder"),
            "json": (file["bad.jsonl"], "bad.jsonl:2"), "no text": (file["other.jsonl"], "other.jsonl:3"),
            "list": (file["list.jsonl"], "list.jsonl:1"), "number": (file["number.jsonl"], "number.jsonl:1"),
            "latin-1": (file["latin.txt"], "UTF-8"), "cut gzip": (file["cut.txt.gz"], "cut.txt.gz"),
            "no gzip": (file["zip.txt.gz"], "zip.txt.gz"), "little": (good, "--vocab-size"),
            "tokenizer": (good | {"tokenizer": tmp_path / "no.model"}, "no.model"),
            "vocabulary": (good | {"vocab_size": 300}, "--vocab-size"),
            "fraction": (good | {"val_fraction": 1.5}, "--val-fraction"),
            "no fraction": (good | {"val_fraction": float("nan")}, "--val-fraction"),
            "shards without end": (good | {"shard_tokens": 1}, "--shard-tokens 1"),
            "deep": (file["deep.jsonl"], "deep.jsonl:1"),
            "out": (good | {"out": tmp_path / "mine"}, "--out"),
            "out file": (good | {"out": tmp_path / "good.txt"}, "--out")}


@pytest.mark.parametrize("case", [
    "missing", "empty", "kind", "folder", "json", "no text", "list", "number", "latin-1", "cut gzip",
    "no gzip", "little", "tokenizer", "vocabulary", "fraction", "no fraction", "shards without end",
    "deep", "out", "out file"])
def test_mistakes_end_in_one_line(tmp_path, capsys, case):
    """Catches: a traceback, a message without the place, a user's own folder replaced."""
    arguments, said = bad_inputs(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        prepare(**{"out": tmp_path / "out"} | arguments)
    assert stop.value.code == 2 and said in one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_default_corpus_is_the_standard_library():
    """Catches: tests, tables and site-packages in the corpus; the manual read as Python source."""
    files = find_files(Path(sysconfig.get_path("stdlib")), NO_PROSE, Skipped())
    keys = [key for key, _ in files]
    assert {"argparse.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(keys) and keys == sorted(keys)
    parts = {part for key in keys for part in key.split("/")}
    assert not parts & {"test", "tests", "site-packages", "encodings", "__pycache__"}
    topics = dict(documents([file for file in files if file[0] == "pydoc_data/topics.py"], Skipped()))
    assert len(topics) > 50 and topics["pydoc_data/topics.py:assert"].startswith('The "assert" statement')
