"""data/tokenizer.py against a slow trainer, against tiktoken, and against broken files."""
import base64
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

import data.tokenizer as bpe
from plumbing.errors import fail

ROOT = Path(__file__).resolve().parent.parent
TEXT = Path(bpe.__file__).read_text(encoding="utf-8") + "naïve café, 東京東京 🙂🙂 aaaa aaa aaaaa 1234\r\n"
HARD = ["def f(x):\n\treturn x  # ok\n", "🙂👩‍👩‍👧 flags 🇯🇵", "東京は日本の首都です。", "1234567 3.14 ١٢٣", " " * 77 + "x",
        "don't WE'LL I'm", "a\r\nb\r\n\r\n  c", "<|eot_id|> and <|begin_of_text|>", "", "\x00\x7fé\u0301"]


@pytest.fixture(scope="module")
def enc(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    bpe.save_tokenizer(path, bpe.train_bpe([TEXT], 700))
    return bpe.load_tokenizer(path)


def one_line(capsys) -> str:
    """What went to stderr, which must be a single line that begins with "error: "."""
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def slow_bpe(text: str, n_ranks: int) -> list[bytes]:
    """The definition: recount all pairs of all pre-tokens before every merge."""
    words = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(bpe.PATTERN, text)]
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < n_ranks:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda p: (-pairs[p], ranks.index(p[0]), ranks.index(p[1])))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
        ranks.append(best[0] + best[1])
    return ranks


def test_trainer_equals_the_definition():
    """Catches: a pair count not updated after a merge, a stale heap entry, another tie-break."""
    assert bpe.train_bpe([TEXT], 256 + 340) == slow_bpe(TEXT, 340)


def test_a_long_word_costs_no_more_than_short_ones(monkeypatch):
    """Catches: a text without blanks, such as DNA, that is read again whole at every merge."""
    text = "".join("ACGT"[int(x)] for x in np.random.default_rng(0).integers(4, size=4000))
    read = []
    pairs_of = bpe.pairs_of

    def counting(word):
        read.append(len(word))
        return pairs_of(word)

    monkeypatch.setattr(bpe, "pairs_of", counting)
    assert bpe.train_bpe([text], 256 + 300) == slow_bpe(text, 300)
    assert sum(read) < 20 * len(text)


def test_runs_of_blanks_are_cut():
    """Catches: runs that are cut where no run is too long, a piece that is lost."""
    text = "a" + " " * 25 + "b" + " " * 9 + "c" + " " * 10
    pieces = ["a" + " " * 10, " " * 10, " " * 5 + "b" + " " * 9 + "c" + " " * 10, ""]
    assert bpe.short_of_blanks(text, 10) == pieces


def test_trained_ranks_are_what_tiktoken_merges(enc):
    """Catches: a rank that tiktoken never emits or merges in another order than the trainer."""
    words = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(bpe.PATTERN, TEXT)]
    merged = [token for word in words for token in merge_by_rank(word, enc._mergeable_ranks)]
    ids = enc.encode(TEXT, disallowed_special=())
    assert [enc.decode_single_token_bytes(i) for i in ids] == merged
    assert all(enc.encode_single_token(token) == rank for token, rank in enc._mergeable_ranks.items())


def merge_by_rank(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    while True:
        options = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        if not options or min(options)[0] == 1 << 30:
            return parts
        i = min(options)[1]
        parts = parts[:i] + [parts[i] + parts[i + 1]] + parts[i + 2:]


def test_training_does_not_depend_on_the_hash_seed():
    """Catches: ties broken by the order of a set or dict of strings."""
    code = ("import hashlib, data.tokenizer as b; t = open(b.__file__, encoding='utf-8').read();"
            "print(hashlib.sha1(repr(b.train_bpe([t], 600)).encode()).hexdigest())")
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env={"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert len(runs[0]) == 41 and runs[0] == runs[1]


def test_special_ids_follow_the_ranks_in_llama3_order(enc):
    """Catches: specials shifted by one, or reserved numbers that do not skip the named ones."""
    n = len(enc._mergeable_ranks)
    special = enc.encode_single_token
    assert n == 700 - 256 and enc.n_vocab == 700
    for name, offset in {"begin_of_text": 0, "end_of_text": 1, "reserved_special_token_0": 2,
                         "reserved_special_token_1": 3, "finetune_right_pad_id": 4,
                         "reserved_special_token_2": 5, "start_header_id": 6, "end_header_id": 7,
                         "eom_id": 8, "eot_id": 9, "python_tag": 10,
                         "reserved_special_token_3": 11, "reserved_special_token_247": 255}.items():
        assert special(f"<|{name}|>") == n + offset, name
    assert len(set(bpe.SPECIALS)) == 256


@pytest.mark.parametrize("text", HARD)
def test_round_trip(enc, text):
    """Catches: lost bytes, CRLF changed, special-token strings turned into control tokens."""
    ids = bpe.encode_document(enc, text)
    assert ids.dtype == np.uint32 and ids[0] == enc.encode_single_token(bpe.BOS)
    assert (ids[1:] < len(enc._mergeable_ranks)).all()
    assert ids[1:].tolist() == enc.encode_ordinary(text)
    assert enc.decode(ids[1:]) == text


def test_text_that_breaks_the_regex_engine(enc):
    """Catches: a crash on a million blanks in a row, and on half a surrogate pair from JSON."""
    text = "a" + " " * 1_200_000 + "b\n"
    assert enc.decode(bpe.encode_document(enc, text)[1:]) == text
    assert enc.decode(bpe.encode_document(enc, "x\ud800y")[1:]) == "x\ufffdy"


def test_pattern_is_llama3s():
    """Catches: GPT-2's rules (numbers of any length, other contractions and line ends)."""
    assert regex.findall(bpe.PATTERN, "I'LL pay 12345 (now)!\n\n  x") == [
        "I", "'LL", " pay", " ", "123", "45", " (", "now", ")!\n\n", " ", " x"]


TABLE = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))


@pytest.mark.parametrize("data, said", [
    (None, "no tokenizer.model at"), (b"\x0a\x0e\x0a\x05<unk>", "SentencePiece"),
    (TABLE + b"not base64! 256\n", ":257:"), (TABLE + b"YWI=\n", ":257:"),
    (TABLE + b"YWI= 300\n", "expected ranks"), (TABLE + b"YWI= 3\n", "expected ranks"),
    (TABLE[:35], "expected ranks"), (b"", "expected ranks")])
def test_a_file_that_is_no_tokenizer(tmp_path, capsys, data, said):
    """Catches: a traceback, or a table with holes that panics later inside tiktoken."""
    path = tmp_path / "tokenizer.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        bpe.load_tokenizer(path)
    assert stop.value.code == 2
    line = one_line(capsys)
    assert said in line and str(path) in line and "python data/prepare.py" in line


# -----------------------------------------------------------------------------
# settings beside it


OTHER = dict(pattern=r"\p{L}+|\P{L}", special_tokens={"<|a|>": 0, "<|b|>": 257, "<|c|>": 1}, bos="<|b|>",
             eos=["<|c|>"], chat_template=None)


def other_tokenizer(folder: Path, absent: bytes = b"", **changes) -> Path:
    """A tokenizer of 255 or fewer bytes, special tokens around them, ids 0..n-1; changes: to the settings."""
    kept = [b for b in range(255) if b not in absent]
    ids = {bytes([b]): 2 + i for i, b in enumerate(kept)}
    special = {"<|a|>": 0, "<|b|>": 2 + len(ids), "<|c|>": 1}
    bpe.save_ranks(folder / bpe.TOKENIZER, ids)
    settings = OTHER | dict(special_tokens=special) | changes
    (folder / bpe.SETTINGS).write_text(json.dumps(
        {key: value for key, value in settings.items() if value is not ...}))
    return folder / bpe.TOKENIZER


def test_settings_say_what_the_file_does_not(tmp_path):
    """Catches Llama 3's BOS or pattern in front of another model's text, ids that are shifted, and
    bytes that are no tokens: dropped, however many, before the merges."""
    path = other_tokenizer(tmp_path, absent=b"x\xe6")
    enc = bpe.load_tokenizer(path, 256)
    assert enc.settings.bos == "<|b|>" and enc.n_vocab == 256 and enc.absent == b"x\xe6\xff"
    assert bpe.encode_document(enc, "\0a").tolist() == [255, 2, 2 + ord("a")]
    assert bpe.encode_text(enc, "xxaxyx").tolist() == bpe.encode_text(enc, "ay").tolist() == [2 + 97, 2 + 120]
    assert enc.decode(bpe.encode_text(enc, "東").tolist()) == b"\x9d\xb1".decode("utf-8", "replace")
    assert bpe.encode_text(enc, "xxx").tolist() == bpe.encode_text(enc, "").tolist() == []
    assert enc.decode([0, 255, 1]) == "<|a|><|b|><|c|>"
    bpe.copy_tokenizer(path, tmp_path / "copy")
    assert bpe.load_tokenizer(tmp_path / "copy/tokenizer.model").settings == enc.settings
    other_tokenizer(tmp_path / "other")
    assert (not bpe.same_tokenizer(tmp_path, tmp_path / "other")
            and bpe.same_tokenizer(tmp_path, tmp_path / "copy"))
    bpe.save_settings(tmp_path / "copy" / bpe.SETTINGS, enc.settings._replace(chat_template="x", eos=[]))
    assert bpe.same_tokenizer(tmp_path, tmp_path / "copy")
    # A source that names no end: the BOS of the next document is one. Every reader finds some.
    assert bpe.tokenizer_settings(tmp_path / "copy/tokenizer.model").eos == ["<|b|>"]
    bpe.save_settings(tmp_path / "copy" / bpe.SETTINGS, enc.settings._replace(pattern=r"\p{L}|\P{L}"))
    assert not bpe.same_tokenizer(tmp_path, tmp_path / "copy")


def test_a_copy_leaves_nothing_of_another_tokenizer(tmp_path, enc):
    """Catches settings that stay beside a tokenizer.model they do not belong to; and a copy onto itself."""
    other = other_tokenizer(tmp_path / "other")
    bpe.copy_tokenizer(other, tmp_path / "copy")
    bpe.copy_tokenizer(enc.name, tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == [bpe.TOKENIZER]
    before = other.read_bytes()
    bpe.copy_tokenizer(other, tmp_path / "other")
    assert other.read_bytes() == before and (tmp_path / "other" / bpe.SETTINGS).is_file()


def test_no_copy_of_a_damaged_one(tmp_path, enc, capsys):
    """Catches an export that looks whole, with a tokenizer that nothing can read;
    SentencePiece's is passed on."""
    lines = Path(enc.name).read_bytes().splitlines(keepends=True)
    damaged = tmp_path / "damaged" / bpe.TOKENIZER
    damaged.parent.mkdir()
    damaged.write_bytes(b"".join(lines[:5] + lines[6:]))
    with pytest.raises(SystemExit):
        bpe.copy_tokenizer(damaged, tmp_path / "copy")
    assert str(damaged) in one_line(capsys) and not (tmp_path / "copy").exists()
    damaged.write_bytes(b"\x0a\x07 no base64")
    bpe.copy_tokenizer(damaged, tmp_path / "copy")
    assert (tmp_path / "copy" / bpe.TOKENIZER).read_bytes() == damaged.read_bytes()


def test_without_settings_it_is_llama3s(enc):
    """Catches another default: the pattern, the specials behind the ranks, the three
    tokens that end a turn."""
    settings = bpe.tokenizer_settings(enc.name)
    assert (settings == enc.settings and settings.pattern == bpe.PATTERN
            and settings.bos == "<|begin_of_text|>")
    assert settings.eos == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"] and settings.chat_template is None
    assert settings.special_tokens == {name: 444 + i for i, name in enumerate(bpe.SPECIALS)}


def test_more_rows_than_tokens(enc, capsys):
    """Catches a vocabulary that was rounded up refused, ids of it that cannot be printed,
    and any size accepted."""
    padded = bpe.load_tokenizer(enc.name, 704)
    assert padded.n_vocab == 704 and padded.decode([700, 703]) == "<|unused_700|><|unused_703|>"
    assert bpe.load_tokenizer(enc.name, 700).n_vocab == 700
    for size in (699, 700 + 1024):
        with pytest.raises(SystemExit):
            bpe.load_tokenizer(enc.name, size)
        assert f"700 tokens, the model in {Path(enc.name).parent} has {size}" in one_line(capsys)


@pytest.mark.parametrize("changes", [
    dict(pattern="(["), dict(pattern=7), dict(pattern=...),
    dict(special_tokens={"<|b|>": 300, "<|a|>": 0, "<|c|>": 1}), dict(special_tokens={"<|b|>": "257"}),
    dict(special_tokens=[1]), dict(special_tokens={"<|b|>": 2, "<|a|>": 0, "<|c|>": 1}), dict(bos="<|x|>"),
    dict(bos=None), dict(eos="<|c|>"), dict(eos=["<|x|>"]), dict(eos=None), dict(chat_template=7),
    dict(more=1)])
def test_settings_that_are_none(tmp_path, capsys, changes):
    """Catches a traceback, or ids with gaps that panic later."""
    path = other_tokenizer(tmp_path, **changes)
    with pytest.raises(SystemExit) as stop:
        bpe.load_tokenizer(path)
    assert stop.value.code == 2 and str(tmp_path) in one_line(capsys)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_settings_that_are_no_json(tmp_path, capsys, text):
    """Catches a traceback."""
    path = other_tokenizer(tmp_path)
    path.with_name(bpe.SETTINGS).write_text(text)
    with pytest.raises(SystemExit) as stop:
        bpe.load_tokenizer(path)
    assert stop.value.code == 2 and bpe.SETTINGS in one_line(capsys)


def test_too_little_text(capsys):
    """Catches: fewer ranks than asked for, silently, so that ids and specials move."""
    with pytest.raises(SystemExit) as stop:
        bpe.train_bpe(["abc abc"], 1280)
    assert stop.value.code == 2 and "--vocab-size" in one_line(capsys)


def test_two_folders_of_one_tokenizer(tmp_path, capsys):
    """Catches a model that reads the tokens of another tokenizer; a folder of token ids
    alone is taken as it is."""
    folders = {}
    for name, text in dict(model=TEXT, data=TEXT, other=TEXT + "zyx zyx zyx" * 99, ids=None).items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        if text:
            bpe.save_tokenizer(folders[name] / bpe.TOKENIZER, bpe.train_bpe([text], 600))
    assert bpe.same_tokenizer(folders["model"], folders["data"])
    assert not bpe.same_tokenizer(folders["model"], folders["other"])
    assert (bpe.same_tokenizer(folders["model"], folders["ids"])
            and bpe.same_tokenizer(folders["ids"], folders["data"]))
    bpe.check_same_tokenizer(folders["model"], folders["data"])
    assert capsys.readouterr().err == ""
    for model, data in (("model", "ids"), ("ids", "data")):
        bpe.check_same_tokenizer(folders[model], folders[data])
        note = capsys.readouterr().err
        assert (note.startswith(f"note: {folders['ids']} has no tokenizer.model: its ids are taken")
                and note.count("\n") == 1)
    with pytest.raises(SystemExit) as stop:
        bpe.check_same_tokenizer(folders["model"], folders["other"])
    assert stop.value.code == 2
    line = one_line(capsys)
    assert str(folders["other"]) in line
    assert (f"python data/prepare.py --input TEXT --tokenizer {folders['model']}/tokenizer.model "
            "--out data/NAME") in line


def test_fail_speaks_from_one_rank(capsys, monkeypatch):
    """Catches: eight copies of one message under torchrun, or a message of two lines."""
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            fail("two\nlines")
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == lines
