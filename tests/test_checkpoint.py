"""checkpoint.py: what is written is read back, Meta's own folders are understood,
damaged ones end in one line."""
import contextlib
import dataclasses
import io
import json
import os
import shutil
import weakref

import pytest
import torch

import eval as evaluation
import export as exporting
import flextron.__main__ as flextron
import sample
import search.__main__ as search
import train
from bench import latency
from data import prepare
from plumbing import checkpoint, describe
from plumbing.checkpoint import (
    check_target, load_llama, load_tensors, matrix_dtype, save_llama, save_one_by_one, save_tensors)
from plumbing.files import atomic_write, check_out, new_folder
from model import LlamaConfig
from plumbing.params import meta_ffn_dim, params_json, published_name, read_config
from tests.helpers import (
    GQA, MHA, SHAPES, WHOLE, close, cut_into, files_of, one_line_error, random_llama, tokens_for)
from tests.processes import run

UNEVEN = dataclasses.replace(GQA, n_heads=(8, 2, 6, 4), n_kv_heads=(2, 2, 1, 4), ffn_dim=(80, 13, 41, 7))
WRITTEN = SHAPES | {"rope 32": dataclasses.replace(GQA, rope_factor=32.0),
                    "tied mha": dataclasses.replace(MHA, tied=True),
                    "per layer": UNEVEN, "one list": dataclasses.replace(GQA, n_heads=(8, 2, 6, 4))}


def meta_ffn(dim, multiplier, multiple_of):
    """FeedForward.__init__ of Meta's model.py: hidden_dim is 4 dim there."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def saved(folder, config: LlamaConfig = GQA):
    """A random Llama, written into `folder`."""
    model = random_llama(config)
    save_llama(folder, config, model.state_dict())
    return model


def rewrite(folder, change) -> None:
    """Applies change() to the dictionary of params.json."""
    p = json.loads((folder / "params.json").read_text())
    p = change(p) or p
    (folder / "params.json").write_text(json.dumps(p))


# -----------------------------------------------------------------------------
# round trips


@pytest.mark.parametrize("shape", WRITTEN)
def test_round_trip(tmp_path, shape):
    """Catches a field of the shape that params.json loses, tensors that come back under another name, untied
    tied ones."""
    model = saved(tmp_path, WRITTEN[shape])
    again, tokens = load_llama(tmp_path), tokens_for(GQA)
    assert again.config == model.config and set(files_of(tmp_path)) == {"params.json", "consolidated.00.pth"}
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert (again.output.weight is again.tok_embeddings.weight) == model.config.tied
    assert len(list(again.parameters())) == len(list(model.parameters()))
    assert all(p.requires_grad for p in again.parameters())


def test_a_loaded_model_does_not_write_into_its_file(tmp_path):
    """Catches a memory map that is shared with the file: training would change the
    checkpoint it started from."""
    saved(tmp_path)
    before, model = files_of(tmp_path), load_llama(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert files_of(tmp_path) == before


def test_dtype_and_meaning_of_missing_output(tmp_path):
    """Catches a folder without output.weight (tied), or with rope.freqs (Llama 1, 2), that is
    refused, tied tensors that come apart when they are converted, and an output that is like the
    embeddings in its first row alone."""
    model, tokens = saved(tmp_path, SHAPES["tied"]), tokens_for(GQA)
    state = {k: v for k, v in model.state_dict().items() if k != "output.weight"}
    save_tensors(tmp_path / "consolidated.00.pth", state | {"rope.freqs": torch.ones(4)})
    again = load_llama(tmp_path, dtype=torch.float64)
    assert again.config.tied and again.output.weight is again.tok_embeddings.weight
    assert ({p.dtype for p in again.parameters()} == {torch.float64}
            and close(again(tokens)[0], model(tokens)[0]))
    # Two tensors with the same values, as a checkpoint that was converted and back has them
    output = state["tok_embeddings.weight"].clone()
    save_tensors(tmp_path / "consolidated.00.pth", state | {"output.weight": output})
    assert load_llama(tmp_path).config.tied
    output[-1] += 1
    save_tensors(tmp_path / "consolidated.00.pth", state | {"output.weight": output})
    again = load_llama(tmp_path)
    assert not again.config.tied and torch.equal(again.output.weight, output)


def test_tied_is_stored_once_and_slices_leave_their_storage_behind(tmp_path):
    """Catches a tied matrix written twice, and a view that drags the whole tensor it was
    cut from into the file."""
    size = lambda: (tmp_path / "consolidated.00.pth").stat().st_size
    n = lambda tensors: sum(4 * t.numel() for t in tensors)
    tied = dataclasses.replace(GQA, vocab_size=4000, tied=True)
    model = saved(tmp_path, tied)
    assert n(model.parameters()) <= size() < n(model.parameters()) + 40_000
    for config in (tied, dataclasses.replace(tied, tied=False)):
        model = random_llama(config)
        subnet = dataclasses.replace(model.full, dim=16)
        state = model.slices(subnet)
        save_llama(tmp_path, subnet.config(config), state)
        unique = {k: v for k, v in state.items() if not config.tied or k != "output.weight"}
        assert n(unique.values()) <= size() < n(unique.values()) + 40_000
        assert torch.equal(load_llama(tmp_path).output.weight, state["output.weight"])


# -----------------------------------------------------------------------------
# params.json


# dim, L, heads, kv, vocab, multiplier, multiple_of, theta, scaled -> FFN, vocabulary, RoPE factor
META = {"Llama1-7B": ((4096, 32, 32, None, -1, None, 256, None, None), 11008, 32000, 1),
        "Llama1-30B": ((6656, 60, 52, None, -1, None, 256, None, None), 17920, 32000, 1),
        "Llama1-65B": ((8192, 80, 64, None, -1, None, 256, None, None), 22016, 32000, 1),
        "Llama2-7B": ((4096, 32, 32, None, -1, None, 256, None, None), 11008, 32000, 1),
        "Llama2-13B": ((5120, 40, 40, None, -1, None, 256, None, None), 13824, 32000, 1),
        "Llama2-70B": ((8192, 80, 64, 8, -1, 1.3, 4096, None, None), 28672, 32000, 1),
        "3-8B": ((4096, 32, 32, 8, 128256, 1.3, 1024, 500000, None), 14336, 128256, 1),
        "3.1-8B": ((4096, 32, 32, 8, 128256, 1.3, 1024, 500000, True), 14336, 128256, 8),
        "3-70B": ((8192, 80, 64, 8, 128256, 1.3, 4096, 500000, False), 28672, 128256, 1),
        "3.1-70B": ((8192, 80, 64, 8, 128256, 1.3, 4096, 500000, True), 28672, 128256, 8),
        "3.1-405B": ((16384, 126, 128, 8, 128256, 1.2, 4096, 500000, True), 53248, 128256, 8),
        "3.2-1B": ((2048, 16, 32, 8, 128256, 1.5, 256, 500000, True), 8192, 128256, 32),
        "3.2-3B": ((3072, 28, 24, 8, 128256, 1.0, 256, 500000, True), 8192, 128256, 32)}


@pytest.mark.parametrize("name", META)
def test_metas_params_json(tmp_path, name):
    """Catches a wrong default for a key Meta leaves out, the FFN formula, and 3.2's RoPE
    factor taken for 3.1's."""
    values, ffn_dim, vocab_size, rope_factor = META[name]
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "multiple_of",
            "rope_theta", "use_scaled_rope")
    p = {k: v for k, v in zip(keys, values) if v is not None} | dict(norm_eps=1e-6)
    for content in (p, {"model": p}):
        (tmp_path / "params.json").write_text(json.dumps(content))
        c = read_config(tmp_path)
        assert (c.ffn_dim, c.vocab_size, c.rope_factor) == (ffn_dim, vocab_size, rope_factor)
        assert (c.dim, c.n_layers, c.n_heads, c.n_kv_heads) == (*values[:3], values[3] or values[2])
        assert (c.head_dim, c.norm_eps, c.rope_theta) == (values[0] // values[2], 1e-6, values[7] or 10000)
    # these decide
    rewrite(tmp_path, lambda p: p["model"] | dict(rope_scaling_factor=4, head_dim=80, ffn_dim=77))
    c = read_config(tmp_path)
    assert (c.head_dim, c.ffn_dim, c.rope_factor) == (80, 77, 4 if rope_factor > 1 else 1)
    rewrite(tmp_path, lambda p: p | dict(rope_factor=5, rope_high_freq_factor=4, use_qk_norm=False,
                                         moe_args=None))
    assert read_config(tmp_path).rope_factor == (5 if rope_factor > 1 else 1)


@pytest.mark.parametrize("more,context", [({}, 4096), (dict(norm_eps=1e-6), 2048),
                                          (dict(vocab_size=128256), 8192), (dict(context=300), 300)])
def test_defaults_of_a_short_params_json(tmp_path, more, context):
    """Catches another default than Meta's for a key that is missing: multiple_of is 256,
    norm_eps 1e-5, theta 10000, every query head has its own KV head, and RoPE is not scaled."""
    (tmp_path / "params.json").write_text(json.dumps(dict(dim=4096, n_layers=32, n_heads=32) | more))
    c = read_config(tmp_path)
    assert (c.ffn_dim, c.n_kv_heads, c.head_dim, c.rope_theta, c.rope_factor) == (
        11008, 32, 128, 10000.0, 1.0)
    assert (c.norm_eps, c.vocab_size) == (more.get("norm_eps", 1e-5), more.get("vocab_size", 32000))
    assert c.context == context and not c.tied


# The window of every model, whatever its norm_eps; None: Llama 1's and 2's 7B and 13B have one shape.
WINDOWS = {"Llama1-7B": None, "Llama2-7B": None, "Llama2-13B": None, "Llama1-30B": 2048, "Llama1-65B": 2048,
           "Llama2-70B": 4096} | {name: 8192 for name in META if name.startswith("3")}


@pytest.mark.parametrize("name", META)
def test_window_and_family_do_not_hang_on_norm_eps(tmp_path, name):
    """Catches Llama 1's 65B, whose norm_eps is Llama 2's, taken for a Llama 2, and the early
    Llama 2 chat models, whose norm_eps is Llama 1's, for a Llama 1: shape and weights tell,
    norm_eps only where nothing else does."""
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")
    p = {k: v for k, v in zip(keys, META[name][0]) if v is not None}
    freqs = {1: {"layers.0.attention.inner_attention.rope.freqs": torch.ones(2)},
             2: {"rope.freqs": torch.ones(2)}}
    for norm_eps, by_norm_eps in ((1e-5, 2), (1e-6, 1)):
        (tmp_path / "params.json").write_text(json.dumps(p | dict(norm_eps=norm_eps)))
        for told in (None, 1, 2):
            (tmp_path / "consolidated.00.pth").unlink(missing_ok=True)
            if told:
                embeddings = torch.zeros(32000, 1)  # the channels of one shard of many
                save_tensors(tmp_path / "consolidated.00.pth",
                             freqs[told] | {"tok_embeddings.weight": embeddings})
            c = read_config(tmp_path)
            llama = told or by_norm_eps
            assert c.context == (WINDOWS[name] or {1: 2048, 2: 4096}[llama])
            if p["dim"] in (4096, 5120) and c.vocab_size == 32000:
                assert published_name(c) == f"Llama {llama} {name.split('-')[1]}"
            elif name.startswith("Llama"):
                assert published_name(c) == f"{name[:5]} {name[5]} {name.split('-')[1]}"


@pytest.mark.parametrize("size,dim,n_layers,n_kv_heads", [("7B", 4096, 32, None), ("34B", 8192, 48, 8)])
def test_code_llama(tmp_path, size, dim, n_layers, n_kv_heads):
    """Catches Code Llama, which says no vocab_size, read as a Llama 2."""
    p = dict(dim=dim, n_layers=n_layers, n_heads=dim // 128, ffn_dim_multiplier=1.0, rope_theta=1e6,
             norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps(p | (dict(n_kv_heads=n_kv_heads) if n_kv_heads else {})))
    c = read_config(tmp_path)
    assert published_name(c) == f"Code Llama {size}" and (c.context, c.vocab_size) == (16384, 32000)
    # of many shards
    save_tensors(tmp_path / "consolidated.00.pth", {"tok_embeddings.weight": torch.zeros(32016, 1)})
    c = read_config(tmp_path)
    assert published_name(c) == f"Code Llama {size}" and (c.context, c.vocab_size) == (16384, 32016)


def test_our_params_json_says_all_of_it(tmp_path):
    """Catches a field that is written as a constant, or not at all: every one has an odd value here."""
    odd = LlamaConfig(dim=24, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10, ffn_dim=37, vocab_size=91,
                      norm_eps=3e-4, rope_theta=777.0, rope_factor=5.0, context=55)
    (tmp_path / "params.json").write_text(json.dumps(params_json(odd)))
    assert read_config(tmp_path) == odd
    default = LlamaConfig()
    assert all(value != getattr(default, name) for name, value in vars(odd).items() if name != "tied")


def test_metas_formula_gives_our_ffn_dim():
    """Catches a multiplier that is rounded away: Meta's own code would build another MLP than the
    one in our file; and a width that is rounded where Meta cuts it off."""
    for dim in range(16, 96):
        for multiplier, multiple_of in [(None, 1), (1.3, 1), (1.7, 3), (0.9, 8)]:
            assert meta_ffn_dim(dim, multiplier, multiple_of) == meta_ffn(dim, multiplier, multiple_of)
    for dim in (16, 40, 48, 127, 128, 576, 768, 2048, 3072, 4096, 5120, 8192, 16384):
        some = range(1, 5 * dim, max(1, dim // 61))
        for ffn_dim in {1, 2, 3, 255, 256, 257, 11008, 13824, 14336, 28672, 53248, *some}:
            p = params_json(dataclasses.replace(GQA, dim=dim, ffn_dim=ffn_dim))
            assert (meta_ffn(dim, p["ffn_dim_multiplier"], p["multiple_of"])
                    == ffn_dim == p["ffn_dim"]), (dim, p)


# -----------------------------------------------------------------------------
# a user's mistakes


MARKER = "code_ran"


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def cut(folder, keep: float):
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


def state_change(folder, change):
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    changed = change(state)  # in place, or something else altogether
    torch.save(state if changed is None else changed, path)


PARAMS_MISTAKES = {
    "no params.json": lambda f: (f / "params.json").unlink(), "no folder": shutil.rmtree,
    "broken json": lambda f: (f / "params.json").write_text('{"dim": 48,'),
    "no json": lambda f: (f / "params.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda f: (f / "params.json").write_text("[1, 2]"),
    "missing key": lambda f: rewrite(f, lambda p: p.pop("n_layers") and None),
    "text for a number": lambda f: rewrite(f, lambda p: p | dict(dim="wide")),
    "no heads": lambda f: rewrite(
        f, lambda p: {k: v for k, v in p.items() if k != "head_dim"} | dict(n_heads=0)),
    "odd heads": lambda f: rewrite(f, lambda p: p | dict(head_dim=7)),
    "heads that do not divide": lambda f: rewrite(f, lambda p: p | dict(n_kv_heads=3)),
    "a list too short": lambda f: rewrite(f, lambda p: p | dict(ffn_dim=[80, 80])),
    "text for the layers": lambda f: rewrite(f, lambda p: p | dict(n_layers="4")),
    "true for a size": lambda f: rewrite(f, lambda p: p | dict(vocab_size=True)),
    "NaN for a size": lambda f: rewrite(f, lambda p: p | dict(ffn_dim=float("nan"))),
    "more than a machine holds": lambda f: rewrite(f, lambda p: p | dict(n_layers=10**9)),
    "heads without end": lambda f: rewrite(f, lambda p: p | dict(n_heads=10**12, n_kv_heads=1)),
    "deep": lambda f: (f / "params.json").write_text("[" * 200_000),
    "a folder": lambda f: ((f / "params.json").unlink(), (f / "params.json").mkdir()),
    "a pipe": lambda f: ((f / "params.json").unlink(), os.mkfifo(f / "params.json")),
    "a huge number": lambda f: rewrite(f, lambda p: p | dict(rope_theta=10**400)),
    "no epsilon": lambda f: rewrite(f, lambda p: p | dict(norm_eps=0)),
    **{f"{key} {value!r}": lambda f, key=key, value=value: rewrite(f, lambda p: p | {key: value})
       for key, value in (
           ("ffn_dim", 0), ("ffn_dim", -0.0), ("head_dim", 0), ("n_kv_heads", 0), ("context", 0),
           ("ffn_dim", []), ("rope_theta", True), ("rope_theta", "1e4"), ("rope_theta", 1e308),
           ("norm_eps", 3), ("norm_eps", "1e-5"), ("use_scaled_rope", 1e-320), ("use_scaled_rope", []),
           ("vocab_size", -2))},
    "infinite theta": lambda f: rewrite(f, lambda p: p | dict(rope_theta=float("inf"))),
    **{f"factor {factor}": lambda f, factor=factor: rewrite(f, lambda p: p | dict(
        use_scaled_rope=True, rope_factor=factor)) for factor in (0, 0.5, -8.0, float("nan"), float("inf"))}}
WEIGHTS_MISTAKES = {
    "no weights": lambda f: (f / "consolidated.00.pth").unlink(),
    "empty": lambda f: cut(f, 0), "cut at the start": lambda f: cut(f, 0.01),
    "cut short": lambda f: cut(f, 0.9),
    "text": lambda f: (f / "consolidated.00.pth").write_text("<!DOCTYPE html>\nnot found\n"),
    "other shape": lambda f: rewrite(f, lambda p: p | dict(ffn_dim=72)),
    "other depth": lambda f: rewrite(f, lambda p: p | dict(n_layers=3)),
    "missing tensor": lambda f: state_change(
        f, lambda s: {k: v for k, v in s.items() if "2.ffn_norm" not in k}),
    "no embeddings": lambda f: state_change(f, lambda s: {k: v for k, v in s.items() if "embed" not in k}),
    "extra tensor": lambda f: state_change(f, lambda s: s.update(lora_a=torch.ones(3))),
    "a list": lambda f: state_change(f, lambda s: list(s.values())),
    "one tensor": lambda f: state_change(f, lambda s: s["norm.weight"]),
    "numbers": lambda f: state_change(f, lambda s: {k: 3 for k in s}),
    "nested": lambda f: state_change(f, lambda s: {"model": s, "step": 3})}


@pytest.mark.parametrize("mistake", PARAMS_MISTAKES)
def test_mistakes_in_params(tmp_path, capsys, mistake):
    """Catches a traceback where a user needs one line that names the file; a size of 0 or a false
    that means the default, a true that means 1, and numbers that no Llama computes with."""
    saved(tmp_path / "llama")
    PARAMS_MISTAKES[mistake](tmp_path / "llama")
    with one_line_error(capsys, str(tmp_path / "llama")):
        load_llama(tmp_path / "llama")


@pytest.mark.parametrize("mistake", WEIGHTS_MISTAKES)
def test_mistakes_in_weights(tmp_path, capsys, mistake):
    """Catches a traceback, or random weights where a tensor is missing, for a damaged or foreign file."""
    saved(tmp_path)
    WEIGHTS_MISTAKES[mistake](tmp_path)
    with one_line_error(capsys, "consolidated.00.pth"):
        load_llama(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused(tmp_path, capsys, monkeypatch, zipped):
    """Catches a load that is not weights_only: a checkpoint from the web could run anything."""
    saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    for content in (Evil(), {"tok_embeddings.weight": Evil()}):
        torch.save(content, tmp_path / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)
        with one_line_error(capsys, "consolidated.00.pth"):
            load_llama(tmp_path)
        assert not (tmp_path / MARKER).exists()
    torch.load(tmp_path / "consolidated.00.pth", weights_only=False)
    assert (tmp_path / MARKER).exists(), "the bait is not bait"


# -----------------------------------------------------------------------------
# never half a file


@pytest.mark.skipif(os.name != "posix", reason="pipes of Unix")
def test_a_device_stays_one(tmp_path):
    """Catches `export.py --format gguf --out /dev/null` that makes a file of /dev/null, for root."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no file that could be replaced"), atomic_write(tmp_path / "pipe") as f:
        f.write(b"new")
    assert (tmp_path / "pipe").is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_atomic_write_keeps_the_old_file(tmp_path):
    """Catches a writer that opens the file itself: a crash in the middle would leave half of it."""
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        with atomic_write(path) as f:
            f.write(content)
    for error in (KeyError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as f:
            f.write(b"third, and then")
            f.flush()
            assert path.read_bytes() == b"second"
            raise error
    assert files_of(tmp_path) == {os.path.join("new", "file"): b"second"}


def test_a_signal_while_tensors_are_written(tmp_path, monkeypatch):
    """Catches Ctrl-C that torch's writer turns into a complaint of its own, and so into a traceback."""
    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes > 3:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(checkpoint, "atomic_write", lambda path: contextlib.nullcontext(Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "x.pt", dict(x=torch.ones(3)))


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    """Catches a folder that is filled in place, old files that stay beside new ones, and
    temporary folders left behind."""
    out = tmp_path / "deep" / "out"

    def write(*names, error=None):
        with new_folder(out, {"a", "b"}) as temporary:
            for name in names:
                (temporary / name).write_text(" ".join(names))
                assert not out.exists() or files_of(out) == {"a": b"a b", "b": b"a b"}, "seen half-way"
            if error:
                raise error

    with pytest.raises(KeyError):
        write("a", error=KeyError())
    assert not out.exists()
    write("a", "b")
    with pytest.raises(KeyboardInterrupt):
        write("a", error=KeyboardInterrupt())
    assert files_of(out) == {"a": b"a b", "b": b"a b"}
    write("b")
    assert files_of(out) == {"b": b"b"}
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_new_folder_survives_a_rename_that_fails(tmp_path, monkeypatch):
    """Catches a failing last rename after which neither the old folder nor the new one is there."""
    out, replace = tmp_path / "out", os.replace
    with new_folder(out, {"a"}) as temporary:
        (temporary / "a").write_text("old")

    def no_second(source, target):
        if str(target) == str(out) and ".new" in str(source):
            raise OSError("disk on fire")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", no_second)
    with pytest.raises(OSError), new_folder(out, {"a"}) as temporary:
        (temporary / "a").write_text("new")
    assert files_of(tmp_path) == {os.path.join("out", "a"): b"old"}


def test_new_folder_leaves_other_things_alone(tmp_path, capsys):
    """Catches an export that deletes what a user kept in the folder, or replaces a file."""
    for path in (tmp_path / "folder", tmp_path / "file"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / "thesis.tex").write_text("work of years")
        (tmp_path / "file").write_text("a file")
        before = files_of(tmp_path)
        with one_line_error(capsys, str(path)), new_folder(path, {"a"}):
            raise AssertionError("the body must not run")
        assert files_of(tmp_path) == before and set(os.listdir(tmp_path)) == {"folder", "file"}


def test_where_an_export_may_go(tmp_path, capsys):
    """Catches an export into a folder of Meta's own, a training run, or its source: all have the
    files of an export, so all could be replaced."""
    for name in ("source", "meta", "run", "export"):
        saved(tmp_path / name)
    rewrite(tmp_path / "meta",
            lambda p: {key: p[key] for key in ("dim", "n_layers", "n_heads", "vocab_size")})
    save_tensors(tmp_path / "run" / "resume.pt", dict(step=3))
    for name in ("source", "meta", "run"):
        with one_line_error(capsys, name, "--out"):
            check_target(tmp_path / name, tmp_path / "source")
    check_target(tmp_path / "export", tmp_path / "source")
    check_target(tmp_path / "new", tmp_path / "source")


def test_a_file_is_written_one_tensor_at_a_time(tmp_path):
    """Catches tensors that are all held until the last one is written, a tied one stored twice or
    lost, a view that drags its whole tensor along, another order of names, and numbers that
    torch.load does not find again."""
    alive = []

    def tensors():
        for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
            t = torch.randn(40, 30).to(dtype)
            alive.append(weakref.ref(t))
            assert sum(ref() is not None for ref in alive) <= 2, "the last one and this one"
            yield f"t{i}", t
            torch.manual_seed(i)
        yield "tied", None
        yield "view", torch.arange(12.0).view(3, 4).T[1:3]

    torch.manual_seed(9)
    save_one_by_one(tmp_path / "a.pth", tensors(), {"tied": "t1"})
    found = torch.load(tmp_path / "a.pth", mmap=True, weights_only=True)
    assert list(found) == ["t0", "t1", "t2", "t3", "tied", "view"]
    torch.manual_seed(9)
    alive.clear()
    for name, t in tensors():
        assert name == "tied" or torch.equal(found[name], t) and found[name].dtype == t.dtype
    assert found["tied"].data_ptr() == found["t1"].data_ptr()
    assert (tmp_path / "a.pth").stat().st_size < 4800 + 2 * 2400 + 9600 + 4000
    assert load_tensors(tmp_path / "a.pth").keys() == found.keys()  # its checksums are right
    torch.save(found, tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(torch.equal(t, again[name]) and t.stride() == again[name].stride()
               for name, t in found.items())


def test_writes_are_the_same_bytes(tmp_path):
    """Catches names or times inside the file: the same model under two names must have one hash."""
    for name in ("one", "two"):
        saved(tmp_path / name)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    tensors = load_tensors(tmp_path / "one" / "consolidated.00.pth")
    assert isinstance(tensors, dict) and all(torch.is_tensor(t) for t in tensors.values())


# -----------------------------------------------------------------------------
# shards


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("llama2", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_are_merged(tmp_path, n, llama2, tied):
    """Catches a tensor merged along the wrong axis, in the wrong order, or taken from
    the first shard alone."""
    model = cut_into(tmp_path / "llama", n, llama2, dataclasses.replace(WHOLE, tied=tied))
    if tied and llama2:  # embeddings and output would be cut along different axes: there is one of them
        for i in range(n):
            shard_state(tmp_path / "llama", i, lambda s: {k: v for k, v in s.items() if k != "output.weight"})
    again = load_llama(tmp_path / "llama")
    assert again.config == model.config and again.config.tied == tied
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())


def test_dtype_of_the_file(tmp_path):
    """Catches bf16 weights that are blown up to fp32 where they are only to be copied, and a rounded fp32."""
    model = cut_into(tmp_path / "llama", 2, False, dtype=torch.bfloat16)
    for dtype, want in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        state = load_llama(tmp_path / "llama", dtype=dtype).state_dict()
        assert all(w.dtype == want and torch.equal(w, model.state_dict()[k].bfloat16().to(want))
                   for k, w in state.items())


def test_the_matrices_decide_the_dtype():
    """Catches a dtype read off the norms, which some converters leave in fp32, or off the first matrix."""
    model = random_llama(GQA).bfloat16()
    model.tok_embeddings.weight.data = model.tok_embeddings.weight.data.float()
    model.norm.weight.data = model.norm.weight.data.float()
    model.layers[1].ffn_norm.weight.data = model.layers[1].ffn_norm.weight.data.float()
    model.layers[0].attention.wk.weight.data = model.layers[0].attention.wk.weight.data.float()
    assert matrix_dtype(model) == torch.bfloat16
    assert matrix_dtype(random_llama(GQA)) == torch.float32


def shard_state(folder, i: int, change):
    path = folder / f"consolidated.{i:02d}.pth"
    state = dict(torch.load(path, weights_only=True))
    save_tensors(path, change(state) or state)


SHARD_MISTAKES = {
    "first missing": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    "middle missing": (lambda f: (f / "consolidated.01.pth").unlink(), "consolidated.01.pth"),
    "last missing": (lambda f: (f / "consolidated.03.pth").unlink(), "4 shards"),
    "two models": (lambda f: cut_into(f.parent / "b", 4, False, seed=1) and (
        f.parent / "b/consolidated.02.pth").replace(f / "consolidated.02.pth"), "two models"),
    "two shapes": (lambda f: cut_into(f.parent / "b", 4, False, dataclasses.replace(WHOLE, ffn_dim=40)) and (
        f.parent / "b/consolidated.02.pth").replace(f / "consolidated.02.pth"), "two models"),
    "cut short": (lambda f: (f / "consolidated.02.pth").write_bytes(
        (f / "consolidated.02.pth").read_bytes()[:5000]), "consolidated.02.pth"),
    "two dtypes": (lambda f: shard_state(f, 3, lambda s: {k: v.bfloat16() for k, v in s.items()}),
                   "two models"),
    "int8": (lambda f: shard_state(f, 1, lambda s: {k: v.char() for k, v in s.items()}), "int8"),
    "a tensor less": (lambda f: shard_state(
        f, 2, lambda s: {k: v for k, v in s.items() if "1.ffn_norm" not in k}), "layers.1.ffn_norm"),
    "a tensor more": (lambda f: shard_state(f, 2, lambda s: s | {"lora_a": torch.ones(3)}), "lora_a"),
    "a number as a name": (lambda f: shard_state(f, 2, lambda s: s | {7: torch.ones(3)}), "7"),
    "a state in a state": (lambda f: shard_state(f, 1, lambda s: {"model": s}), "model: dict"),
    "no dictionary": (lambda f: torch.save([1], f / "consolidated.02.pth"),
                      "a list in place of a dictionary"),
    "sparse": (lambda f: shard_state(f, 1, lambda s: s | {"norm.weight": s["norm.weight"].to_sparse()}),
               "no numbers"),
    "meta": (lambda f: shard_state(f, 1, lambda s: s | {"norm.weight": s["norm.weight"].to("meta")}),
             "no numbers"),
    "a pointer": (lambda f: (f / "consolidated.01.pth").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2\n"), "git lfs pull"),
    "a page": (lambda f: (f / "consolidated.01.pth").write_text("<html>404</html>"), "consolidated.01.pth"),
    "a flipped bit": (lambda f: flip(f / "consolidated.01.pth", b"layers"), "checksum"),
    "a flipped bit in the weights": (lambda f: flip(f / "consolidated.01.pth", bytes_of_weights(f, 1)),
                                     "checksum")}


def flip(path, near: bytes) -> None:
    """Flips a bit of the first byte of `near` in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(near)] ^= 4
    path.write_bytes(data)


def bytes_of_weights(folder, i: int) -> bytes:
    """The first bytes of a tensor as its file has them."""
    w = torch.load(folder / f"consolidated.{i:02d}.pth", weights_only=True)["layers.0.attention.wq.weight"]
    return w.flatten()[:8].numpy().tobytes()


@pytest.mark.parametrize("mistake", SHARD_MISTAKES)
def test_mistakes_in_shards(tmp_path, capsys, mistake):
    """Catches shards of two models that make one silent wrong model, and a traceback where one is missing."""
    cut_into(tmp_path / "llama", 4, False)
    change, word = SHARD_MISTAKES[mistake]
    change(tmp_path / "llama")
    with one_line_error(capsys, word, str(tmp_path)):
        load_llama(tmp_path / "llama")


@pytest.mark.parametrize("llama2", [False, True])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("said", [None, -1, 0])
def test_the_vocabulary_is_read_off_the_weights(tmp_path, said, n, llama2):
    """Catches 32,000 rows expected where params.json is silent (Code Llama has 32,016), rows of one
    shard taken for all, and rows of all shards added up where each has every token."""
    whole = cut_into(tmp_path / "llama", n, llama2)
    rewrite(tmp_path / "llama", lambda p: p | dict(vocab_size=said))
    if said is None:
        rewrite(tmp_path / "llama", lambda p: {k: v for k, v in p.items() if k != "vocab_size"})
    assert (read_config(tmp_path / "llama").vocab_size == 96
            == load_llama(tmp_path / "llama").config.vocab_size)
    for i in range(n):  # tied, and stored once: the embeddings tell
        shard_state(tmp_path / "llama", i, lambda s: {k: v for k, v in s.items() if k != "output.weight"})
    again = load_llama(tmp_path / "llama")
    assert again.config.vocab_size == 96 and again.config.tied
    assert torch.equal(again.tok_embeddings.weight, whole.tok_embeddings.weight)


def test_frequencies_of_every_layer_are_dropped(tmp_path):
    """Catches Llama 1, whose layers carry RoPE's frequencies, refused for foreign tensors."""
    model = cut_into(tmp_path / "llama", 2, True)
    for i in range(2):
        shard_state(tmp_path / "llama", i, lambda s: s | {
            f"layers.{layer}.attention.inner_attention.rope.freqs": torch.ones(4) for layer in range(4)})
    state = load_llama(tmp_path / "llama").state_dict()
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("name", ["norm.weight", "layers.2.ffn_norm.weight"])
def test_norms_that_differ_by_rounding(tmp_path, capsys, name):
    """Catches shards refused because their ranks rounded a norm in different ways, another shard's
    taken than the first's, a mean of them, silence, and shards of another model let in."""
    cut_into(tmp_path / "llama", 4, False, dtype=torch.bfloat16)
    first = load_tensors(tmp_path / "llama/consolidated.00.pth")[name].clone()
    first[3] = 0.0

    def step(s, sign):  # a step of bf16, up or down: one bit of the last place
        norm = s[name].clone()
        norm[3] = 0.0
        s[name] = (norm.view(torch.int16) + sign * (norm != 0).short()).view(torch.bfloat16)
        return s

    for i, sign in enumerate((0, 1, -1, 0)):
        shard_state(tmp_path / "llama", i, lambda s: step(s, sign))
    shard_state(tmp_path / "llama", 3, lambda s: s[name].__setitem__(3, 1e-3))  # beside a zero
    capsys.readouterr()
    model = load_llama(tmp_path / "llama")
    assert torch.equal(model.state_dict()[name], first.float())
    said = capsys.readouterr().err
    assert said.startswith("note: 1 tensor") and name in said and "rounding" in said and said.count("\n") == 1
    for damage in (lambda w: w[5] * 1.03, lambda w: -w[5]):
        def change(s):
            s[name][5] = damage(s[name])
        shard_state(tmp_path / "llama", 2, change)
        with one_line_error(capsys, "two models", name):
            load_llama(tmp_path / "llama")


FOREIGN = {"vision_chunk_size": 448, "quantization_args": {"scheme": 8}, "lora_args": {"rank": 16},
           "moe_args": {"experts": 16}, "moe": {"num_experts": 8}, "use_qk_norm": True, "qk_norm": True,
           "sliding_window": 4096, "hidden_dim": 14336, "attention_chunk_size": 8192,
           "nope_layer_interval": 4, "ffn_exp": 4.0, "attention_bias": True, "rope_high_freq_factor": 1,
           "q_lora_rank": 1536}


@pytest.mark.parametrize("key", FOREIGN)
def test_other_kinds_of_llama_are_named(tmp_path, capsys, key):
    """Catches a vision, quantised, LoRA or MoE model, one with norms on queries, or Mistral, loaded
    as if it were a Llama; and one whose file has such a key without a value refused."""
    saved(tmp_path)
    rewrite(tmp_path, lambda p: p | {key: FOREIGN[key]})
    with one_line_error(capsys, key, "text Llama"):
        load_llama(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # Mistral publishes both forms in one folder
    with one_line_error(capsys, key, f"python data/llama.py {tmp_path} --out out/{tmp_path.name}"):
        load_llama(tmp_path)
    for nothing in (None, False):
        rewrite(tmp_path, lambda p: p | {key: nothing})
        load_llama(tmp_path)


# -----------------------------------------------------------------------------
# folders of other kinds


def hugging_face(folder):
    """What marks a Hugging Face folder, and the flag that names it."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return (folder, f"{folder} is a Hugging Face folder",
            f"python data/llama.py {folder} --out out/{folder.name}")


def only_safetensors(folder):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    return (folder, f"{folder} is a Hugging Face folder",
            f"python data/llama.py {folder} --out out/{folder.name}")


def weights_of_hugging_face(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"")
    return path, f"{path} is a Hugging Face folder", f"python data/llama.py {folder} --out out/{folder.name}"


def gguf_file(folder):
    path = folder / "small-Q4_0.gguf"
    path.write_bytes(b"GGUF")
    return path, f"{path} is a GGUF file", f"python data/llama.py {path} --out out/small-Q4_0"


def gguf_folder(folder):
    path = gguf_file(folder)[0]
    return (folder, f"{folder} is a folder with a GGUF file",
            f"python data/llama.py {path} --out out/small-Q4_0")


def with_original(folder):
    """meta-llama's repositories: Hugging Face's files, and Meta's own below."""
    hugging_face(folder)
    saved(folder / "original")
    return folder, f"{folder} is a Hugging Face folder", f"a raw one is in {folder / 'original'}"


def nearly_raw(folder):
    """A params.json beside Hugging Face's weights."""
    saved(folder)
    (folder / "consolidated.00.pth").rename(folder / "consolidated.safetensors")
    return (folder, f"{folder} is a Hugging Face folder",
            f"python data/llama.py {folder} --out out/{folder.name}")


OTHERS = [hugging_face, only_safetensors, weights_of_hugging_face, gguf_file, gguf_folder, with_original,
          nearly_raw]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_llama_of_another_kind_is_named(tmp_path, capsys, kind):
    """Catches "no Llama folder" said to somebody who has one, of Hugging Face's or llama.cpp's
    kind, and a command that would not convert it."""
    folder = tmp_path / "SmolLM2-135M"
    folder.mkdir()
    path, what, mend = kind(folder)
    for look in (load_llama, lambda p: describe.main([str(p)])):
        if kind is nearly_raw and look is not load_llama:
            continue  # params.json alone can be described
        with one_line_error(capsys, what, mend):
            look(path)


PROGRAMS = {  # every flag that names a Llama
    "train": (train.main, ["--llama", "FOLDER"]), "eval": (evaluation.main, ["--model", "FOLDER"]),
    "plan": (train.main, ["--dry-run", "--llama", "FOLDER"]),
    "base": (evaluation.main, ["--model", "RAW", "--base", "FOLDER"]),
    "sample": (sample.main, ["--model", "FOLDER"]),
    "export": (exporting.main, ["--model", "FOLDER"]), "describe": (describe.main, ["FOLDER"]),
    "search": (search.main, ["--llama", "FOLDER"]), "flextron": (flextron.main, ["--llama", "FOLDER"]),
    "latency": (latency.main, ["--model", "FOLDER"]),
    "prepare": (prepare.main, ["--tokenizer", "FOLDER/tokenizer.json"]),
    "prepare, folder": (prepare.main, ["--tokenizer", "FOLDER"])}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_names_a_hugging_face_folder(tmp_path, capsys, monkeypatch, program):
    """Catches a program that looks at something else first, or that writes before it looks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2").mkdir()
    hugging_face(tmp_path / "SmolLM2")
    (tmp_path / "SmolLM2/tokenizer.json").write_text("{}")
    saved(tmp_path / "raw")
    before = files_of(tmp_path)
    main, argv = PROGRAMS[program]
    with one_line_error(capsys, "Hugging Face folder", "python data/llama.py SmolLM2 --out out/SmolLM2"):
        main([word.replace("FOLDER", "SmolLM2").replace("RAW", "raw") for word in argv])
    assert files_of(tmp_path) == before


# -----------------------------------------------------------------------------
# a look at one


@pytest.mark.parametrize("name", META)
def test_every_published_shape_is_known(tmp_path, capsys, name):
    """Catches a size table that names the wrong model, or counts wrong; from params.json alone."""
    values, ffn_dim, vocab_size, rope_factor = META[name]
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "multiple_of",
            "rope_theta", "use_scaled_rope")
    old = name in ("Llama1-7B", "Llama1-30B")
    p = {k: v for k, v in zip(keys, values) if v is not None} | dict(norm_eps=1e-6 if old else 1e-5)
    (tmp_path / "params.json").write_text(json.dumps(p))
    describe.main([str(tmp_path / "params.json")])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    family = {"Llama1": "Llama 1 ", "Llama2": "Llama 2 "}.get(
        name.split("-")[0], f"Llama {name.split('-')[0]} ")
    assert said["family"].startswith(family) and said["family"].split(",")[0].endswith(name.split("-")[1])
    assert ("the weights would tell" in said["family"]) == (name == "Llama1-7B")
    totals = {"3.2-1B": "1,235,814,400", "3.2-3B": "3,212,749,824", "3.1-8B": "8,030,261,248",
              "3-8B": "8,030,261,248", "3.1-70B": "70,553,706,496", "Llama2-7B": "6,738,415,616"}
    assert totals.get(name, "") in said["parameters"]
    assert said["shards"] == "0" and f"ffn {ffn_dim}" in said["shape"] and "cost" in said["sub-networks"]
    assert ("not scaled" if rope_factor == 1 else f"scaled by {rope_factor}") in said["RoPE"]


def test_a_folder_is_described_as_it_is(tmp_path, capsys):
    """Catches a dtype, a number of shards or a tie that is guessed from params.json."""
    cut_into(tmp_path / "llama", 2, False, dataclasses.replace(WHOLE, tied=True), dtype=torch.bfloat16)
    (tmp_path / "llama/tokenizer.model").write_bytes(b"\x0a\x0b")
    describe.main([str(tmp_path / "llama")])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (said["dtype"], said["shards"], said["tied"], said["tokenizer"]) == (
        "bfloat16", "2", "yes", "SentencePiece")
    assert said["family"] == "none of Meta's"


def test_memory_while_merging(tmp_path):
    """Catches shards that are all read before they are merged, or weights that are there twice: the
    peak stays well under two copies."""
    config = LlamaConfig(dim=768, n_layers=8, n_heads=12, n_kv_heads=4, head_dim=64, ffn_dim=2048,
                         vocab_size=8000)
    cut_into(tmp_path / "llama", 4, False, config)
    size = sum(f.stat().st_size for f in (tmp_path / "llama").glob("*.pth"))
    code = ("import resource, sys; from plumbing.checkpoint import load_llama; "
            "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
            "model = load_llama(sys.argv[1]); print(peak() - before)")
    done = run("-c", code, tmp_path / "llama")
    assert done.returncode == 0, done.stderr[-2000:]
    assert size > 2.5e8 and int(done.stdout) < 1.4 * size, int(done.stdout) / size


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(tmp_path, capsys, value, dtype):
    """Catches a folder that diverged and is evaluated, sampled, exported or trained as if
    it had not: one number in one tensor is enough. Large ones are numbers, though their sum
    is none in their dtype."""
    model = random_llama(GQA)
    state = {name: weight.detach().to(dtype) for name, weight in model.state_dict().items()}
    state["layers.2.feed_forward.w1.weight"][:] = 6e4
    save_llama(tmp_path / "good", GQA, state)
    load_llama(tmp_path / "good", dtype=None)
    state["layers.2.feed_forward.w1.weight"][3, 5] = value
    save_llama(tmp_path / "bad", GQA, state)
    for wanted in (torch.float32, None):
        with one_line_error(capsys, "1 of", "layers.2.feed_forward.w1.weight", "NaN or infinite"):
            load_llama(tmp_path / "bad", dtype=wanted)


def test_a_pipe_in_place_of_weights(tmp_path, capsys):
    """Catches a look at a folder that waits for ever: a pipe is opened only when somebody writes into it."""
    save_llama(tmp_path, GQA, random_llama(GQA).state_dict())
    (tmp_path / "consolidated.00.pth").unlink()
    os.mkfifo(tmp_path / "consolidated.00.pth")
    for look in (load_llama, lambda p: describe.main([str(p)])):
        with one_line_error(capsys, "no consolidated.00.pth"):
            look(tmp_path)


def test_nothing_is_written_into_what_is_read(tmp_path, monkeypatch, capsys):
    """Catches a folder under another name for itself, and a neighbour that is refused."""
    (tmp_path / "text").mkdir()
    (tmp_path / "link").symlink_to("text")
    monkeypatch.chdir(tmp_path)
    check_out("other", llama=None, data="text")
    for out in ("text", "./text/", "link", tmp_path / "text"):
        with one_line_error(capsys, "is the data that training starts from"):
            check_out(out, llama=None, data="text")
