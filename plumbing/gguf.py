"""
GGUF files, for llama.cpp, Ollama and what builds on them: the weights, the shape and the tokenizer
of a Llama in one file.

    python export.py --budget 0.5 --format gguf                    out/flex-0.50.gguf
    python export.py --budget 0.5 --format gguf --dtype q8_0       about a byte a weight
    llama-cli -m out/flex-0.50.gguf -p "def main("

The package `gguf` writes the header; it is needed for this format alone (pip install gguf). Four
facts worth knowing. llama.cpp turns the same pairs of channels as Meta, (2j, 2j + 1), so wq and wk
stay as they are. A Llama whose layers differ in heads or neurons has an architecture of its own,
`deci`: the same arithmetic, and lists in the place of numbers. Scaled RoPE is a tensor: for each
frequency the number that divides it. And llama.cpp knows the patterns of tokenizers by names; no
file can bring another one.
"""
import contextlib
import math
import os
from pathlib import Path
from typing import Iterable, Iterator

import regex
import tiktoken
import torch

from data.tokenizer import PATTERNS, is_unused
from model import Llama, LlamaConfig, rope_frequencies
from plumbing.errors import fail, note
from plumbing.files import atomic_write
from plumbing.hf import merges_of, pad_token, readable_tokenizer, spell
from plumbing.parallel import bar
from plumbing.params import PER_LAYER, max_positions

Q8_0 = "q8_0"  # a dtype that torch has not: 32 weights of a row share a scale, and have a byte each
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", Q8_0: "Q8_0"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type: what most matrices are
BLOCK = 32  # weights of a row that share a scale
BITS = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5}  # a weight; Q8_0: 34 bytes a block

# -----------------------------------------------------------------------------
# before anything is written


def check(config: LlamaConfig, tokenizer: Path, out: Path) -> tiktoken.Encoding | None:
    """fail() without the package, or where `out` is something else. Returns the tokenizer to write
    into it; None, and a note on stderr, where there is none."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        fail("--format gguf needs the package gguf, which is not installed; pip install gguf")
    if out.exists() and not is_gguf(out):
        fail(f"{out} exists and is no GGUF file; expected a new name or an earlier export; "
             "choose another --out")
    without = f"{out} gets no tokenizer: llama.cpp runs it on token ids alone, and Ollama not at all"
    enc = readable_tokenizer(config, tokenizer, without)
    if enc is not None and pre_tokenizer(enc._pat_str) is None:
        note(f"{tokenizer} cuts text in a way that llama.cpp has no name for; {without}")
        return None
    return enc


def is_gguf(path: Path) -> bool:
    """Is there a GGUF file at this path?"""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


# -----------------------------------------------------------------------------
# tensors


NAMES = {"attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
         "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up",
         "feed_forward.w2": "ffn_down", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
ROPE = "rope_freqs.weight"  # the one tensor that is no weight
OUTSIDE = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
           "output.weight": "output.weight", ROPE: ROPE}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of Meta's."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def rope_divisors(config: LlamaConfig) -> torch.Tensor:
    """What divides each frequency of plain RoPE where RoPE is scaled, (head_dim/2,)."""
    plain = LlamaConfig(head_dim=config.head_dim, rope_theta=config.rope_theta)
    return rope_frequencies(plain) / rope_frequencies(config)


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file, by Meta's name, with its shape [out, in]. Tied: no output."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}
    if config.tied:
        del shapes["output.weight"]
    if config.rope_factor != 1:
        shapes[ROPE] = (config.head_dim // 2,)
    return shapes


def kind_of(shape: tuple[int, ...], dtype) -> str:
    """How a tensor is stored: F32, F16, BF16 or Q8_0.

    Vectors are few and matter, so they stay in fp32. A matrix whose rows Q8_0's blocks do not fill
    is F16."""
    if len(shape) == 1:
        return "F32"
    if dtype == Q8_0 and shape[1] % BLOCK:
        return "F16"
    return KINDS[dtype]


def kinds_of(shapes: dict[str, tuple[int, ...]], dtype) -> dict[str, str]:
    """kind_of() every tensor. A note on stderr says where Q8_0 was not to be had."""
    kinds = {name: kind_of(shape, dtype) for name, shape in shapes.items()}
    odd = set()
    for name, shape in shapes.items():
        if dtype == Q8_0 and kinds[name] == "F16":
            odd.add(f"{name.split('.')[-2]} ({shape[1]})")
    if odd:
        note(f"float16 in the place of q8_0 where a row is no multiple of {BLOCK}: {', '.join(sorted(odd))}")
    return kinds


def tensor_bytes(config: LlamaConfig, dtype) -> int:
    """Bytes of all tensors of the file."""
    total = 0
    for shape in shapes_of(config).values():
        total += int(math.prod(shape) * BITS[kind_of(shape, dtype)] / 8)
    return total


def encoded(weight: torch.Tensor, kind: str):
    """A tensor's bytes as they stand in the file, as a NumPy array."""
    weight = weight.detach().cpu().contiguous()
    if kind == "Q8_0":
        import gguf
        return gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    dtype = next(dtype for dtype, name in KINDS.items() if name == kind)
    return weight.to(dtype).view(torch.uint8).numpy()  # NumPy has no bfloat16, but bytes


# -----------------------------------------------------------------------------
# tokenizer


# A pattern can be written in many ways. Two that cut this text in the same way are taken to be one.
CUT_TEST = ("I'm you'Re THEY'LL it's 'sup we'd've 1 12 123 1234567 3.14159e-10 0x1F x86_64 "
            "a1b22c333\r\n\r\n \n\t\n"
            "def f(x):\n    return {'a': [1, 2]}  # done!!\n\n\n   indented\t\ttabs   \n  "
            "2024 was   99 % ... naïve café e\u0301 漢字かな交じり文 한국어 ²³ ½ ٣٤٥ Ⅻ "
            "🤷🏽‍♀️👩‍👩‍👧 ∑∫√\u00a0nbsp\u3000wide.Word-by_word /a/b\\c "
            "$100 #tag @me (a) \"q\"\n.x\r\n,y;  5  55 z    ")


def pre_tokenizer(pattern: str) -> str | None:
    """llama.cpp's name for what cuts text as this pattern does; None if it has no such name."""
    wanted = cut(pattern)
    for name, known in PATTERNS.items():
        if cut(known) == wanted:
            return name
    return None


def cut(pattern: str) -> list[str]:
    """CUT_TEST in the pieces that a pattern finds."""
    return [match.group() for match in regex.finditer(pattern, CUT_TEST)]


def add_tokenizer(writer, enc: tiktoken.Encoding) -> None:
    """The tokenizer: every id's text and type, the merges, and which special token does what."""
    import gguf
    tokens = {rank: spell(token) for token, rank in enc._mergeable_ranks.items()}
    types = {rank: gguf.TokenType.NORMAL for rank in tokens}
    for name, i in enc._special_tokens.items():
        tokens[i] = name
        types[i] = gguf.TokenType.UNUSED if is_unused(name, i) else gguf.TokenType.CONTROL
    ids = range(enc.n_vocab)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer(enc._pat_str))
    writer.add_token_list([tokens[i] for i in ids])
    writer.add_token_types([types[i] for i in ids])
    writer.add_token_merges(merges_of(enc._mergeable_ranks))

    writer.add_bos_token_id(enc._special_tokens[enc.settings.bos])
    writer.add_add_bos_token(True)
    ends = [enc._special_tokens[name] for name in enc.settings.eos]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[-1])  # of a turn
    if len(ends) > 2:
        writer.add_eom_token_id(ends[1])   # of a message in a turn
    writer.add_pad_token_id(enc._special_tokens[pad_token(enc)])
    if enc.settings.chat_template is not None:
        writer.add_chat_template(enc.settings.chat_template)


# -----------------------------------------------------------------------------
# the file


def add_shape(writer, config: LlamaConfig) -> None:
    """What config.json is in other formats. Lists where the layers differ."""
    n_heads, n_kv_heads, ffn_dim = (getattr(config, name) for name in PER_LAYER)
    if uneven(config):
        n_heads, n_kv_heads, ffn_dim = (list(config.per_layer(name)) for name in PER_LAYER)
    writer.add_context_length(max_positions(config))
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(ffn_dim)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)


def uneven(config: LlamaConfig) -> bool:
    """Do the layers differ in heads or neurons?"""
    return any(isinstance(getattr(config, name), tuple) for name in PER_LAYER)


def write_header(path, name: str, config: LlamaConfig, kinds: dict[str, str], dtype,
                 enc: tiktoken.Encoding | None) -> tuple[dict[str, int], int]:
    """Everything but the tensors' bytes. Returns where in the file each of them starts, by Meta's
    name, and where the file ends."""
    import gguf
    writer = gguf.GGUFWriter(path, "deci" if uneven(config) else "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[KINDS[dtype]])
    if dtype == Q8_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    if enc is None:
        writer.add_tokenizer_model("none")  # llama.cpp runs it on ids; without the key it refuses
    else:
        add_tokenizer(writer, enc)

    offsets = {}
    end = 0
    for tensor, shape in shapes_of(config).items():
        kind = gguf.GGMLQuantizationType[kinds[tensor]]
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = torch.Size(shape).numel() // per_block * block_bytes
        writer.add_tensor_info(gguf_name(tensor), shape, None, n_bytes, raw_dtype=kind)
        offsets[tensor] = end
        end = writer.ggml_pad(end + n_bytes, writer.data_alignment)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    start = writer.ggml_pad(os.path.getsize(path), writer.data_alignment)
    return {tensor: start + offset for tensor, offset in offsets.items()}, start + end


def save_gguf(path, config: LlamaConfig, weights: Iterable[tuple[str, torch.Tensor]], dtype,
              enc: tiktoken.Encoding | None) -> None:
    """Writes a GGUF file, whole or not at all. OSError: the disk is full.

    weights: Meta's names and fp32 or narrower tensors, taken one by one, so that memory holds one
    of them. dtype: torch's, or Q8_0, of the matrices. enc: the tokenizer; None for none."""
    path = Path(path)
    kinds = kinds_of(shapes_of(config), dtype)
    with atomic_write(path) as file:
        # The package opens the file a second time, by its temporary name; the tensors follow here.
        starts, end = write_header(file.name, path.stem, config, kinds, dtype, enc)
        for name, weight in bar(with_rope(weights, config), "writing", len(starts), "tensor"):
            file.seek(starts.pop(name))
            file.write(encoded(weight, kinds[name]).data)
        assert not starts, f"no weights for {list(starts)}"
        file.truncate(end)


def with_rope(weights: Iterable[tuple[str, torch.Tensor]],
              config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, and the tensor of scaled RoPE."""
    yield from weights
    if config.rope_factor != 1:
        yield ROPE, rope_divisors(config)
