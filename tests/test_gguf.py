"""gguf.py: what we write says what our model computes, read back with the package's own reader and
run from what the file alone says; and llama.cpp agrees, where it is installed."""
import dataclasses
import json
import os
import signal
import sys
import weakref

import pytest
import regex
import torch

import export as exporting
import plumbing.gguf as ours
from bench import big_export
from data.tokenizer import (
    GPT2_PATTERN,
    PATTERN,
    PATTERNS,
    SPECIALS,
    Settings,
    encode_document,
    load_tokenizer,
    save_settings,
    save_tokenizer,
    train_bpe,
)
from export import folded
from model import LlamaConfig
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from plumbing.hf import spell
from plumbing.sizes import weight_bytes
from tests.helpers import (
    GQA,
    MHA,
    SHAPES,
    close,
    deployed,
    export_at,
    files_of,
    make_supernet,
    one_line_error,
    random_llama,
    tokens_for,
)
from tests.processes import ROOT, run
from tests.test_hf import HARD_TEXT


def installed(name: str) -> bool:
    return __import__("importlib.util").util.find_spec(name) is not None


needs_gguf = pytest.mark.skipif(not installed("gguf"), reason="gguf is not installed: pip install gguf")
# Uniform ones are `llama`, the others `deci`.
UNEVEN = {
    "heads and neurons": dataclasses.replace(GQA, n_heads=(8, 2, 6, 4), ffn_dim=(80, 13, 41, 64)),
    "neurons": dataclasses.replace(GQA, ffn_dim=(80, 13, 41, 64)),
    "heads of mha, tied, rope 8": dataclasses.replace(
        MHA, n_heads=(6, 2, 5, 3), n_kv_heads=(6, 2, 5, 3), tied=True, rope_factor=8.0)}
WRITTEN = {**SHAPES, "rope 32, tied": dataclasses.replace(GQA, rope_factor=32.0, tied=True),
           "odd width": dataclasses.replace(GQA, dim=50),
           "blocks of 32": dataclasses.replace(GQA, dim=64, ffn_dim=96), **UNEVEN}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}


def raw_llama(folder, config: LlamaConfig):
    """A random Llama in a raw folder, with a tokenizer of its vocabulary (560)."""
    config = dataclasses.replace(config, vocab_size=560)
    model = random_llama(config)
    text = "".join(HARD_TEXT) + "the cat sat on the mat and the dog ate the cake" * 3
    folder.mkdir(parents=True)
    save_tokenizer(folder / "tokenizer.model", train_bpe([text], 560))
    save_llama(folder, config, model.state_dict())
    return model


def exported(tmp_path, config: LlamaConfig, *flags):
    """(a random Llama, the reader of its GGUF file): written by the command line."""
    import gguf
    model = raw_llama(tmp_path / "raw", config)
    exporting.main(["--model", str(tmp_path / "raw"), "--format", "gguf", *flags])
    return model, gguf.GGUFReader(tmp_path / "raw-1.00.gguf")


def metadata(reader) -> dict:
    """key -> value."""
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(reader) -> dict[str, torch.Tensor]:
    """name -> values, as llama.cpp sees them: Q8_0 is a scale times whole numbers."""
    import gguf
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def their_name(name: str) -> str:
    """llama.cpp's name of a tensor, from its list of names."""
    for a, b in [("layers.", "blk."), ("attention.wq", "attn_q"), ("attention.wk", "attn_k"),
                 ("attention.wv", "attn_v"), ("attention.wo", "attn_output"), ("feed_forward.w1", "ffn_gate"),
                 ("feed_forward.w2", "ffn_down"), ("feed_forward.w3", "ffn_up"),
                 ("attention_norm", "attn_norm"), ("tok_embeddings", "token_embd")]:
        name = name.replace(a, b)
    return "output_norm.weight" if name == "norm.weight" else name


# -----------------------------------------------------------------------------
# what the file says, read by others


def their_logits(reader, tokens: torch.Tensor) -> torch.Tensor:
    """llama.cpp's llama and deci, from the description of its graph, head by head in float64: sizes
    from the keys, neighbours as RoPE's pairs, frequencies divided by rope_freqs, embeddings where
    there is no output."""
    arch, m = metadata(reader)["general.architecture"], metadata(reader)
    w = {name: t.double() for name, t in tensors(reader).items()}
    L, d = m[f"{arch}.block_count"], m[f"{arch}.attention.key_length"]
    assert d == m[f"{arch}.attention.value_length"] == m[f"{arch}.rope.dimension_count"]

    def of_layer(key, i):
        value = m[f"{arch}.{key}"]
        assert isinstance(value, list) == (arch == "deci")
        return value[i] if arch == "deci" else value

    T = tokens.size(1)
    f = m[f"{arch}.rope.freq_base"] ** (-torch.arange(0, d, 2).double() / d) / w.get("rope_freqs.weight", 1)
    turn = torch.polar(torch.ones(T, d // 2).double(), torch.outer(torch.arange(T).double(), f))

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True)
                    + m[f"{arch}.attention.layer_norm_rms_epsilon"]).sqrt() * weight

    def rotate(x):
        return torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    x = w["token_embd.weight"][tokens]
    for i in range(L):
        p, H, K = f"blk.{i}.", of_layer("attention.head_count", i), of_layer("attention.head_count_kv", i)
        h = norm(x, w[p + "attn_norm.weight"])
        q, k, v = (h @ w[f"{p}attn_{n}.weight"].T for n in "qkv")
        assert q.size(-1) == H * d and k.size(-1) == v.size(-1) == K * d
        heads = []
        for n in range(H):
            kv = n // (H // K)
            qn, kn, vn = q[..., n * d:n * d + d], k[..., kv * d:kv * d + d], v[..., kv * d:kv * d + d]
            scores = rotate(qn) @ rotate(kn).transpose(1, 2) / d ** 0.5
            heads.append(scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1) @ vn)
        x = x + torch.cat(heads, -1) @ w[p + "attn_output.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate, up = h @ w[p + "ffn_gate.weight"].T, h @ w[p + "ffn_up.weight"].T
        assert up.size(-1) == of_layer("feed_forward_length", i)
        x = x + (torch.nn.functional.silu(gate) * up) @ w[p + "ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T


@needs_gguf
@pytest.mark.parametrize("shape", WRITTEN)
def test_their_arithmetic_gives_the_same(tmp_path, shape):
    """Catches rows of wq and wk in Hugging Face's order, RoPE's divisors upside down or left
    out, tensors under each other's names, one number of heads for layers that differ, a wrong
    base or epsilon."""
    config = dataclasses.replace(WRITTEN[shape], norm_eps=1e-2, rope_theta=30_000.0)
    model, reader = exported(tmp_path, config)
    tokens = tokens_for(model.config, 2, 200)
    assert close(model(tokens)[0].double(), their_logits(reader, tokens))
    names = {t.name for t in reader.tensors}
    assert (("output.weight" in names) != config.tied
            and ("rope_freqs.weight" in names) == (config.rope_factor != 1))


@needs_gguf
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["odd width", "tied", "blocks of 32", "heads and neurons"])
def test_every_tensor_is_ours(tmp_path, shape, dtype, capsys):
    """Catches values rounded to another dtype or twice, norms that are not in fp32, a matrix that
    Q8_0 cannot hold stored as if it could, holes or overlaps between tensors: bit for bit, Q8_0
    within half a step of its block."""
    model, reader = exported(tmp_path, WRITTEN[shape], "--dtype", dtype)
    found = {t.name: t for t in reader.tensors}
    ends = sorted((t.data_offset, t.data_offset + t.n_bytes) for t in reader.tensors)
    assert all(0 <= b[0] - a[1] < 32 and b[0] % 32 == 0 for a, b in zip(ends, ends[1:]))
    size = (tmp_path / "raw-1.00.gguf").stat().st_size
    assert 0 <= size - ends[-1][1] < 32 and size % 32 == 0
    values, seen = tensors(reader), 0
    for name, w in model.state_dict().items():
        if model.config.tied and name == "output.weight":
            continue
        kind = "F32" if w.dim() == 1 else DTYPES[dtype]
        if kind == "Q8_0" and w.size(-1) % 32:
            kind = "F16"
        their = found[their_name(name)]
        assert their.tensor_type.name == kind, name
        assert list(their.shape) == list(w.shape)[::-1], name
        got, seen = values[their.name], seen + 1
        if kind == "Q8_0":
            blocks = w.unflatten(-1, (-1, 32))
            step = blocks.abs().amax(-1, keepdim=True) / 127
            far = (got.unflatten(-1, (-1, 32)) - blocks).abs()
            assert (far <= step * (0.5 + 127 * 2 ** -11) + 1e-7).all(), name  # the scale itself is fp16
        else:
            torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            assert torch.equal(got.float(), w.to(torch_dtype).float()), name
    assert seen == len(found)
    err = capsys.readouterr().err
    assert ("w2" in err and "float16" in err) == (dtype == "q8_0" and shape != "blocks of 32"), err


@needs_gguf
@pytest.mark.parametrize("shape", ["gqa", "scaled rope", "tied", *UNEVEN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_metadata(tmp_path, shape, dtype):
    """Catches keys under the other architecture's name, a window that is not the model's, lists for
    uniform layers and numbers for uneven ones, a file type that is another's."""
    model, reader = exported(tmp_path, WRITTEN[shape], "--dtype", dtype)
    m, c = metadata(reader), model.config
    arch = "deci" if shape in UNEVEN else "llama"
    many = (lambda name: list(c.per_layer(name))) if shape in UNEVEN else (lambda name: getattr(c, name))
    wanted = {"general.architecture": arch, "general.name": "raw-1.00", "general.type": "model",
              "general.file_type": {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}[dtype],
              f"{arch}.context_length": 32 if c.rope_factor == 1 else 131072,
              f"{arch}.embedding_length": c.dim, f"{arch}.block_count": 4,
              f"{arch}.feed_forward_length": many("ffn_dim"),
              f"{arch}.attention.head_count": many("n_heads"),
              f"{arch}.attention.head_count_kv": many("n_kv_heads"),
              f"{arch}.attention.key_length": c.head_dim, f"{arch}.attention.value_length": c.head_dim,
              f"{arch}.rope.dimension_count": c.head_dim, f"{arch}.rope.freq_base": 500000.0,
              f"{arch}.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), f"{arch}.vocab_size": 560}
    if dtype == "q8_0":
        wanted["general.quantization_version"] = 2
    assert {key: value for key, value in m.items() if "tokenizer" not in key} == wanted


@needs_gguf
@pytest.mark.parametrize("shape", ["gqa", "tied", "mha"])
def test_an_export_is_the_supernet(tmp_path, shape):
    """Invariant 2, for files. Catches modulation that is not folded, a slice that is not the
    budget's, another default name, and the first export's tensors in the second."""
    import gguf
    model, router = make_supernet(tmp_path / "flex", SHAPES[shape])
    tokens = tokens_for(model.config)
    for budget in (1.0, 0.6):
        exporting.main(["--model", str(tmp_path / "flex"), "--format", "gguf", "--budget", str(budget)])
        subnet, factors = deployed(router, budget)
        want = model(tokens, subnet=subnet, factors=factors)[0]
        reader = gguf.GGUFReader(tmp_path / f"flex-{budget:.2f}.gguf")
        assert close(their_logits(reader, tokens), want.double())
    folder, _ = export_at(tmp_path / "flex", 0.6)
    raw, found = load_tensors(folder / "consolidated.00.pth"), tensors(reader)
    assert all(torch.equal(found[their_name(name)], w) for name, w in raw.items()
               if their_name(name) in found)
    assert {p.name for p in tmp_path.iterdir()} == {"flex", "flex-1.00.gguf", "flex-0.60.gguf", "flex-0.60"}


@needs_gguf
def test_bf16_is_rounded_once(tmp_path):
    """Catches factors folded in the dtype of a bf16 supernet's file, and norms that lose what the
    file has."""
    import gguf
    model, router = make_supernet(tmp_path / "flex", GQA)
    exporting.main(["--model", str(tmp_path / "flex"), "--format", "gguf", "--budget", "0.5",
                    "--dtype", "bfloat16"])
    found = tensors(gguf.GGUFReader(tmp_path / "flex-0.50.gguf"))
    subnet, factors = deployed(router, 0.5)
    for new, old in enumerate(subnet.layers):
        w = model.layers[old].slices(
            subnet.dim, subnet.n_heads[0], subnet.ffn_dim[0])["attention.wo.weight"].detach()
        assert torch.equal(found[f"blk.{new}.attn_output.weight"], (w * factors[old, 0]).bfloat16().float())
        w = model.layers[old].attention_norm.weight[:subnet.dim]
        assert torch.equal(found[f"blk.{new}.attn_norm.weight"], w)


@needs_gguf
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, ours.Q8_0])
@pytest.mark.parametrize("dim", [64, 56])  # 56: no multiple of Q8_0's blocks
def test_the_bytes_of_a_file_are_known_before(tmp_path, dtype, dim):
    """Catches q8_0 counted where a matrix does not fit it, and vectors counted as matrices."""
    import gguf
    config = dataclasses.replace(GQA, dim=dim, ffn_dim=96)
    model = random_llama(config)
    ours.save_gguf(tmp_path / "x.gguf", config, folded(model, model.full), dtype, None)
    written = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors)
    assert ours.tensor_bytes(config, dtype) == written
    if dtype == ours.Q8_0:
        assert weight_bytes(config, model.full, dtype) == written


@needs_gguf
def test_one_tensor_at_a_time(tmp_path):
    """Catches a writer that collects the weights: at most one of them is alive while the next is made."""
    config = dataclasses.replace(GQA, vocab_size=560)
    model, alive, most = random_llama(config), [], []

    def weights():
        for name, w in folded(model, model.full):
            w = w.clone()
            alive.append(weakref.ref(w))
            yield name, w
            del w
            most.append(sum(reference() is not None for reference in alive))

    ours.save_gguf(tmp_path / "x.gguf", config, weights(), torch.float16, None)
    assert len(most) == 39 and max(most) == 1


# -----------------------------------------------------------------------------
# llama.cpp itself: pip install xllamacpp


needs_llama_cpp = pytest.mark.skipif(
    not (installed("gguf") and installed("xllamacpp")), reason="pip install gguf xllamacpp")


class LlamaCpp:
    """llama.cpp's server over a file, in this process."""

    def __init__(self, path, draft=None):
        from xllamacpp import CommonParams, Server, common_speculative_type, ggml_type, llama_flash_attn_type
        params = CommonParams()
        params.model.path = str(path)
        params.n_ctx = 512
        params.n_parallel = params.cpuparams.n_threads = 1
        params.warmup = False
        params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if draft is not None:
            params.speculative.types = [common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            params.speculative.draft.mparams.path = str(draft)
            params.speculative.draft.n_max = 4
            params.speculative.draft.p_min = 0
        self.server = Server(params)

    def log_probs(self, prompt: str | list[int], n: int) -> torch.Tensor:
        """log p of every token, (n,), behind a prompt: text, or ids as they are. The bias makes it
        say "a", for half a character would not be said at all; the probabilities are from before
        the bias."""
        said = self.server.handle_completions(dict(
            prompt=prompt, n_predict=1, n_probs=n, temperature=0, cache_prompt=False,
            logit_bias=[["a", 1000]]))
        found = torch.full((n,), float("nan"))
        for token in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


@needs_llama_cpp
def test_llama_cpp_drafts_with_our_pair(tmp_path):
    """Catches two exports that llama.cpp does not take together, and a text that is not the larger
    one's: greedy."""
    model, _ = make_supernet(tmp_path / "flex", dataclasses.replace(GQA, context=128))
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "1.0", "0.5", "--format", "gguf"])
    prompt = tokens_for(model.config, 1, 5)[0].tolist()
    said = []
    for draft in (None, tmp_path / "flex-0.50.gguf"):
        server = LlamaCpp(tmp_path / "flex-1.00.gguf", draft).server
        said.append(server.handle_completions(dict(
            prompt=prompt, n_predict=40, temperature=0, cache_prompt=False, ignore_eos=True)))
    plain, drafted = said
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    assert drafted["timings"]["draft_n"] > 20 and "draft_n" not in plain["timings"]


@needs_llama_cpp
@pytest.mark.parametrize("shape", WRITTEN)
def test_llama_cpp_computes_the_same(tmp_path, shape):
    """Catches a file that the package's reader takes and llama.cpp does not, keys that it
    understands in another way, and another tokenizer: log-probabilities behind ids and
    behind text."""
    model, _ = exported(tmp_path, dataclasses.replace(WRITTEN[shape], context=128))
    theirs = LlamaCpp(tmp_path / "raw-1.00.gguf")
    V = model.config.vocab_size
    enc = load_tokenizer(tmp_path / "raw/tokenizer.model", V)
    text = "the cat's 12345 naïve mats\n\n  def x(日本): 🐈"
    for prompt in (tokens_for(model.config)[0].tolist(), text):
        ids = prompt if isinstance(prompt, list) else encode_document(enc, prompt).tolist()
        with torch.no_grad():
            want = model(torch.tensor([ids]))[0][0, -1].log_softmax(-1)
        assert (theirs.log_probs(prompt, V) - want).abs().max() < 2e-6 * want.abs().max()


@needs_llama_cpp
@pytest.mark.parametrize("dtype, within", [("float16", 3e-3), ("bfloat16", 3e-2), ("q8_0", 3e-2)])
@pytest.mark.parametrize("shape", ["blocks of 32", "heads and neurons"])
def test_llama_cpp_computes_about_the_same_in_fewer_bits(tmp_path, shape, dtype, within):
    """Catches a dtype that llama.cpp does not compute with, and scales of blocks that it reads in
    another way."""
    model, _ = exported(tmp_path, WRITTEN[shape], "--dtype", dtype)
    tokens = tokens_for(model.config)[:1]
    with torch.no_grad():
        want = model(tokens)[0][0, -1].log_softmax(-1)
    found = LlamaCpp(tmp_path / "raw-1.00.gguf").log_probs(tokens[0].tolist(), model.config.vocab_size)
    difference = (found - want).abs().max()
    assert difference < within * want.abs().max()


# -----------------------------------------------------------------------------
# tokenizer


def their_ids(m: dict, text: str) -> list[int]:
    """llama.cpp's byte-level BPE from the keys of a file, the slow and obvious way: the
    earliest merge in the list, the leftmost of them first; a pre-token that is a token stays
    whole with llama-bpe."""
    ids = {token: i for i, token in enumerate(m["tokenizer.ggml.tokens"])}
    order = {tuple(merge.split(" ")): i for i, merge in enumerate(m["tokenizer.ggml.merges"])}
    found = [m["tokenizer.ggml.bos_token_id"]] * m["tokenizer.ggml.add_bos_token"]
    for match in regex.finditer(PATTERNS[m["tokenizer.ggml.pre"]], text):
        piece = spell(match.group().encode())
        parts = list(piece)
        if m["tokenizer.ggml.pre"] == "llama-bpe" and piece in ids:
            parts = [piece]
        while len(parts) > 1:
            rank, at = min((order.get(pair, 10 ** 9), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 10 ** 9:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        found += [ids[part] for part in parts]
    return found


def with_settings(folder, pattern: str, front: int = 0, behind: int = 0,
                  template: str | None = None) -> Settings:
    """Gives a raw folder's tokenizer settings of its own: special tokens before the ranks and behind them."""
    ranks = train_bpe(["".join(HARD_TEXT) + "the cat sat on the mat and the dog ate the cake" * 3], 560)
    special = {f"<|a{i}|>": i for i in range(front)}
    special |= {f"<|b{i}|>": front + len(ranks) + i for i in range(behind)}
    names = list(special)
    settings = Settings(pattern, special, names[1], [names[0], names[2]], template)
    lines = [f"{__import__('base64').b64encode(t).decode()} {front + rank}" for rank, t in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    save_settings(folder / "tokenizer_settings.json", settings)
    return settings


@needs_gguf
def test_a_tokenizer_of_llama_3s_form(tmp_path):
    """Catches merges in another order, tokens under other ids, special tokens that llama.cpp would
    print, a stop token that it does not know, no BOS in front, no template."""
    (tmp_path / "chat.jinja").write_text("{{ bos_token }}{% for m in messages %}é{{ m.content }}{% endfor %}")
    _, reader = exported(tmp_path, GQA, "--chat-template", str(tmp_path / "chat.jinja"))
    m, enc = metadata(reader), load_tokenizer(tmp_path / "raw/tokenizer.model")
    for text in HARD_TEXT:
        assert their_ids(m, text) == encode_document(enc, text).tolist(), text
    tokens, types = m["tokenizer.ggml.tokens"], m["tokenizer.ggml.token_type"]
    assert (m["tokenizer.ggml.model"], m["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert tokens[304:] == SPECIALS and types == [1] * 304 + [3] * 256 and len(tokens) == 560
    roles = {key: tokens[m[f"tokenizer.ggml.{key}_token_id"]]
             for key in ("bos", "eos", "eom", "eot", "padding")}
    assert roles == dict(bos="<|begin_of_text|>", eos="<|end_of_text|>", eom="<|eom_id|>", eot="<|eot_id|>",
                         padding="<|finetune_right_pad_id|>")
    assert m["tokenizer.ggml.add_bos_token"] is True
    assert m["tokenizer.chat_template"] == (tmp_path / "chat.jinja").read_text()


@needs_gguf
@pytest.mark.parametrize("name", PATTERNS)
def test_other_tokenizers(tmp_path, name):
    """Catches Llama 3's pattern, special tokens or ids for a tokenizer that has its own; rows
    without a token."""
    import gguf
    raw_llama(tmp_path / "raw", GQA)
    settings = with_settings(tmp_path / "raw", PATTERNS[name], front=3, behind=50,
                             template="its own {{ bos_token }}")
    exporting.main(["--model", str(tmp_path / "raw"), "--format", "gguf"])
    m = metadata(gguf.GGUFReader(tmp_path / "raw-1.00.gguf"))
    enc = load_tokenizer(tmp_path / "raw/tokenizer.model")
    tokens, types = m["tokenizer.ggml.tokens"], m["tokenizer.ggml.token_type"]
    assert m["tokenizer.ggml.pre"] == name and m["tokenizer.chat_template"] == "its own {{ bos_token }}"
    for text in HARD_TEXT:
        assert their_ids(m, text) == encode_document(enc, text).tolist(), text
    assert all(tokens[i] == text for text, i in settings.special_tokens.items())
    unused = 560 - 3 - 304 - 50
    assert types == [3] * 3 + [1] * 304 + [3] * 50 + [5] * unused and len(set(tokens)) == 560
    assert (m["tokenizer.ggml.bos_token_id"], m["tokenizer.ggml.eos_token_id"]) == (1, 0)
    assert m["tokenizer.ggml.eot_token_id"] == 2 and "tokenizer.ggml.eom_token_id" not in m
    assert m["tokenizer.ggml.padding_token_id"] == 0


def test_names_of_patterns():
    """Catches a pattern that is known by its spelling alone, two that are taken for one, and a name
    for one that llama.cpp has not."""
    assert {pattern: ours.pre_tokenizer(pattern) for pattern in PATTERNS.values()} == {
        pattern: name for name, pattern in PATTERNS.items()}
    spelled = PATTERN.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL]{2})")
    assert spelled != PATTERN and ours.pre_tokenizer(spelled) == "llama-bpe"
    assert ours.pre_tokenizer(GPT2_PATTERN.removesuffix(r"|\s+")) != "smollm"
    for other in (r"\S+|\s+", r"(?s).", PATTERN.replace("{1,3}", "{1,2}"), PATTERN.replace(r"[\r\n]*", "")):
        assert ours.pre_tokenizer(other) is None, other


@needs_gguf
@pytest.mark.parametrize("why", ["missing", "SentencePiece", "pattern"])
def test_without_a_tokenizer(tmp_path, capsys, why):
    """Catches a file that llama.cpp refuses (it wants the key), ids of another tokenizer, and
    silence about it."""
    import gguf
    raw_llama(tmp_path / "raw", GQA)
    path = tmp_path / "raw/tokenizer.model"
    if why == "missing":
        path.unlink()
    elif why == "SentencePiece":
        path.write_bytes(b"\n\x0e\n\x05<unk>")
    else:
        with_settings(tmp_path / "raw", r"\S+|\s+", front=3)
    exporting.main(["--model", str(tmp_path / "raw"), "--format", "gguf"])
    err = capsys.readouterr().err
    assert err.startswith("note: ") and err.count("\n") == 1 and "no tokenizer" in err
    m = metadata(gguf.GGUFReader(tmp_path / "raw-1.00.gguf"))
    assert {key: value for key, value in m.items() if "tokenizer" in key} == {"tokenizer.ggml.model": "none"}


# -----------------------------------------------------------------------------
# the command line


@needs_gguf
def test_what_is_said(tmp_path, capsys):
    """Catches a report of another size than the file's, and files of one byte a weight that have two."""
    make_supernet(tmp_path / "flex", dataclasses.replace(GQA, dim=64, ffn_dim=96))
    sizes = {}
    for dtype in DTYPES:
        out = tmp_path / f"{dtype}.gguf"
        exporting.main(["--model", str(tmp_path / "flex"), "--budget", "1", "--format", "gguf",
                        "--out", str(out), "--dtype", dtype])
        said = capsys.readouterr().out
        sizes[dtype] = out.stat().st_size
        assert said.startswith(f"{out}: dim 64") and f"{sizes[dtype]:,} bytes" in said
    weights = sum(p.numel() for p in load_llama(tmp_path / "flex").parameters() if p.dim() > 1)
    assert sizes["float32"] - sizes["float16"] == 2 * weights and sizes["float16"] == sizes["bfloat16"]
    assert abs(sizes["float16"] - sizes["q8_0"] - weights * (2 - 34 / 32)) < 1000


def test_sizes_in_q8_0(tmp_path, capsys):
    """Catches --memory and --dry-run that take Q8_0 for some other dtype: 34 bytes for 32 weights,
    a float16 cache."""
    make_supernet(tmp_path / "flex", GQA)
    capsys.readouterr()
    argv = ["--model", str(tmp_path / "flex"), "--format", "gguf", "--dtype", "q8_0", "--context", "100"]
    exporting.main([*argv, "--budget", "1", "--dry-run"])
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  1.000"))
    parameters = sum(p.numel() for p in load_llama(tmp_path / "flex").parameters())
    assert float(row[8]) == pytest.approx(parameters * 34 / 32 / 1e9, abs=5e-4)
    assert float(row[9]) == pytest.approx(2 * 2 * 100 * 4 * 2 * 8 / 1e9, abs=5e-4)
    with one_line_error(capsys, "q8_0", "smallest"):
        exporting.main([*argv, "--memory", "1K"])


@needs_gguf
def test_mistakes(tmp_path, capsys, monkeypatch):
    """Catches a file written over something else, q8_0 and templates where they have no place, a
    traceback without the package; nothing is written."""
    make_supernet(tmp_path / "flex", GQA)
    (tmp_path / "letter.gguf").write_text("dear reader")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    before = files_of(tmp_path)
    argv = ["--model", str(tmp_path / "flex"), "--budget", "0.6"]
    for more, words in [
            (["--format", "gguf", "--out", str(tmp_path / "letter.gguf")],
             ["letter.gguf", "no GGUF", "--out"]),
            (["--format", "gguf", "--out", str(tmp_path / "folder.gguf")],
             ["folder.gguf", "no GGUF", "--out"]),
            (["--format", "hf", "--dtype", "q8_0"], ["q8_0", "--format gguf"]),
            (["--dtype", "q8_0"], ["q8_0", "--format gguf"]),
            (["--chat-template", str(tmp_path / "letter.gguf")], ["--chat-template", "--format hf or gguf"]),
            (["--format", "gguf", "--chat-template", "nowhere.jinja"],
             ["nowhere.jinja", "chat_template.jinja"]),
            (["--format", "hf", "--chat-template", str(tmp_path / "latin.jinja")], ["latin.jinja", "text"])]:
        with one_line_error(capsys, *words):
            exporting.main([*argv, *more])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with one_line_error(capsys, "pip install gguf"):
        exporting.main([*argv, "--format", "gguf"])
    assert files_of(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"flex", "letter.gguf", "folder.gguf", "latin.jinja"}


@needs_gguf
@pytest.mark.parametrize("limit", [2000, 60_000])
def test_a_full_disk(tmp_path, limit):
    """Catches a traceback and half a file when there is no room, in the header or among the tensors."""
    make_supernet(tmp_path / "flex", GQA)
    limited = (f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
               "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run("-c", limited, ROOT / "export.py", "--model", tmp_path / "flex", "--budget", "0.9",
               "--format", "gguf")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large" in done.stderr, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"flex"}


@needs_gguf
def test_an_interruption(tmp_path, capsys, monkeypatch):
    """Catches half a file, or the earlier export lost, when SIGTERM comes among the tensors; and an
    earlier export that is not replaced when none comes."""
    make_supernet(tmp_path / "flex", GQA)
    argv = ["--model", str(tmp_path / "flex"), "--format", "gguf", "--out", str(tmp_path / "slim.gguf")]
    exporting.main([*argv, "--budget", "0.8"])
    before, encoded, written = files_of(tmp_path), ours.encoded, []

    def stop(weight, kind):
        written.append(kind)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encoded(weight, kind)

    monkeypatch.setattr(ours, "encoded", stop)
    with one_line_error(capsys, "interrupted"):
        exporting.main([*argv, "--budget", "0.5"])
    assert files_of(tmp_path) == before and len(written) == 5
    monkeypatch.undo()
    exporting.main([*argv, "--budget", "0.5"])
    assert files_of(tmp_path)["slim.gguf"] != before["slim.gguf"]
    assert {p.name for p in tmp_path.iterdir()} == {"flex", "slim.gguf"}


@needs_gguf
def test_a_big_export_in_small(capsys):
    """Catches a program that measures exports and does not know this one."""
    big_export.main(["--format", "gguf", "--scale", "16"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last.keys() == {"source_gb", "seconds", "peak_gb"}
