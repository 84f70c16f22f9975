"""
A Llama from elsewhere -> a raw Llama folder, which train.py, eval.py and all else here read.

    python data/llama.py Llama-3.2-1B --out out/llama        a Hugging Face folder
    python data/llama.py smollm2.gguf --out out/smollm2      a GGUF file: pip install gguf

Three things are translated, and each is refused by name where it is more than a Llama:

    the shape      config.json, or a GGUF file's header -> params.json
    the weights    one tensor at a time, memory-mapped  -> consolidated.00.pth
    the tokenizer  byte-level BPE                       -> tokenizer.model, tokenizer_settings.json

Weights keep their dtype; quantised ones become float32, the numbers their own runtime computes with.
A tokenizer is kept only if it gives the ids of its source: see "the tokenizer" below. Without one a
model still trains, on shards of ids.

Nothing of a source is executed, and every length in it is checked before it is believed.
"""
import json
import math
import mmap
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
import tiktoken
import torch

# For `python data/llama.py`, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.tokenizer import (BOS, GPT2_PATTERN, DIGITS_PATTERN, PADDING, PATTERNS, SETTINGS, STOPS,
                            TOKENIZER, Settings, encode_text, llama3_settings, load_tokenizer,
                            save_ranks, save_settings, unused_names)
from model import Llama, LlamaConfig, rope_frequencies
from plumbing.checkpoint import LLAMA_FILES, check_target, save_llama
from plumbing.errors import Parser, fail, note
from plumbing.files import new_folder, nothing_half_written
from plumbing.hf import LETTERS, NAMES, OUTSIDE
from plumbing.params import PARAMS, check_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "expected a plain text Llama; take another model"
DAMAGED = "it is cut short or damaged; copy it again from its source"
MAX_SIZE = 100_000_000  # of channels, neurons, tokens, positions; 10,000 layers
SCALED_FROM = 8192  # positions that Llama 3's scaled RoPE starts from


class Stored(NamedTuple):
    """A tensor in a file: where its bytes are, and what they mean.

    kind: its dtype in torch, or the number of a GGUF quantisation."""
    file: mmap.mmap
    kind: torch.dtype | int
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class Source(NamedTuple):
    """A Llama from elsewhere. tensors: by Meta's names. halves: are the rows of wq and wk in Hugging
    Face's order? tokenizer: None, with a reason, where it is no byte-level BPE."""
    config: LlamaConfig
    tensors: dict[str, Stored]
    halves: bool
    tokenizer: "Bpe | None"
    reason: str


class NoTokenizer(Exception):
    """Why a tokenizer is left out, in a few words."""


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read where they are touched. Writing to them would not reach the file."""
    if not path.is_file():
        fail(f"{path} is missing: copy it from its source")
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            fail(f"{path} is empty: {DAMAGED}")


def read_json(path: Path) -> dict:
    """A file that holds a JSON object, or fail()."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except FileNotFoundError:
        fail(f"{path} is missing: copy it from its source")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: expected a JSON object, found something else ({error}): {DAMAGED}")


def checked(config: LlamaConfig, path: Path) -> LlamaConfig:
    """The config, if its sizes make a model; else fail()."""
    try:
        sizes = [config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim,
                 config.ffn_dim, config.vocab_size, config.context]
        if not all(type(size) is int for size in sizes):
            raise ValueError(f"a size is no whole number: {sizes}")
        if max(*sizes, 10_000 * config.n_layers) > MAX_SIZE:
            raise ValueError(f"a size of {max(sizes)}")
        check_shape(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        fail(f"{path} is not the shape of a Llama ({error}): {PLAIN}")
    if not all(math.isfinite(x) and x > 0 for x in (config.norm_eps, config.rope_theta)):
        fail(f"{path}: norm_eps {config.norm_eps}, rope_theta {config.rope_theta}: {PLAIN}")
    return config


# -----------------------------------------------------------------------------
# Hugging Face: config.json

# Keys whose value, if it has one, means another arithmetic.
FOREIGN = {
    "attention_bias": "biases", "mlp_bias": "biases", "qkv_bias": "biases", "use_bias": "biases",
    "num_local_experts": "experts", "num_experts": "experts", "n_routed_experts": "experts",
    "use_qk_norm": "norms of q and k", "qk_norm": "norms of q and k", "qk_layernorm": "norms of q and k",
    "quantization_config": "quantised weights", "vision_config": "a part that sees",
    "no_rope_layers": "layers without RoPE", "attention_multiplier": "a scale of its own",
    "residual_multiplier": "a scale of its own", "embedding_multiplier": "a scale of its own",
    "logits_scaling": "a scale of its own", "final_logit_softcapping": "capped logits"}


def hf_config(path: Path, c: dict) -> LlamaConfig:
    """config.json -> LlamaConfig. What is no Llama by it is refused by name."""
    architectures = c.get("architectures")
    kinds = [*(architectures if isinstance(architectures, list) else []), c.get("model_type")]
    if kinds[0] not in ("LlamaForCausalLM", "MistralForCausalLM", "llama", "mistral"):
        fail(f"{path} is of a {kinds[0]}, expected LlamaForCausalLM or MistralForCausalLM: {PLAIN}")
    for key, what in FOREIGN.items():
        if c.get(key):
            fail(f"{path} has {key} {str(c[key])[:40]!r}: {what}: {PLAIN}")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):
        fail(f"{path} has hidden_act {c['hidden_act']!r}, expected silu: {PLAIN}")
    try:
        theta, factor = hf_rope(path, c)
        context = c.get("max_position_embeddings", 2048)
        default_window = 4096 if "mistral" in str(kinds[0]).lower() else None
        window = c.get("sliding_window", default_window)
        if window is not None and window < context:
            fail(f"{path} has sliding_window {window}, less than its {context} positions: {PLAIN}")
        heads = c["num_attention_heads"]
        return checked(LlamaConfig(
            dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=heads,
            n_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            ffn_dim=c["intermediate_size"], vocab_size=c["vocab_size"],
            norm_eps=float(c.get("rms_norm_eps", 1e-6)), rope_theta=theta, rope_factor=factor,
            tied=bool(c.get("tie_word_embeddings", False)), context=window_of(context, factor)), path)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        fail(f"{path} is not the config.json of a Llama ({type(error).__name__}: {error}): {DAMAGED}")


def hf_rope(path: Path, c: dict) -> tuple[float, float]:
    """(theta, factor) of RoPE. It stands in rope_parameters since transformers 5, in rope_theta and
    rope_scaling before, and in a file for both in both."""
    said = set()
    for rope in (c.get("rope_parameters"), c.get("rope_scaling")):
        if not rope:
            continue
        theta = float(rope.get("rope_theta", c.get("rope_theta", 10000.0)))
        said.add((theta, llama3_factor(path, rope)))
    if len(said) > 1:
        fail(f"{path}: rope_parameters and rope_scaling contradict each other: {DAMAGED}")
    partial = [c.get("partial_rotary_factor"), (c.get("rope_parameters") or {}).get("partial_rotary_factor")]
    if any(p not in (None, 1, 1.0) for p in partial):
        fail(f"{path} has partial_rotary_factor, RoPE on a part of each head: {PLAIN}")
    return said.pop() if said else (float(c.get("rope_theta", 10000.0)), 1.0)


def llama3_factor(path: Path, rope: dict) -> float:
    """The factor of Llama 3's scaled RoPE; 1 for plain RoPE. Any other kind: fail()."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return 1.0
    ends = (rope.get("low_freq_factor"), rope.get("high_freq_factor"),
            rope.get("original_max_position_embeddings"))
    if kind != "llama3" or ends != (1, 4, SCALED_FROM):
        fail(f"{path} scales RoPE by {str(rope)[:120]}, expected none, or llama3 with "
             f"low_freq_factor 1, high_freq_factor 4, {SCALED_FROM} positions: {PLAIN}")
    return float(rope["factor"])


def window_of(positions: int, factor: float) -> int:
    """The window a Llama was trained on. Scaled RoPE reads further; Llama 3's was trained on
    8,192."""
    return min(positions, SCALED_FROM) if factor != 1 else positions


# -----------------------------------------------------------------------------
# Hugging Face: the weights
#
# A .safetensors file: the length N of a header in 8 bytes, little-endian; the header, JSON with
# {name: {dtype, shape, data_offsets}}; the tensors' bytes, one behind the other.

SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER = 100_000_000


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; nothing of their bytes is read. A header that lies: fail()."""
    file = map_file(path)
    try:
        (length,) = struct.unpack_from("<Q", file)
        if length > min(MAX_HEADER, len(file) - 8):
            raise ValueError(f"a header of {length} bytes in a file of {len(file)}")
        header = json.loads(file[8:8 + length])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            tensors[name] = stored_tensor(file, 8 + length, name, entry)
        check_bytes(tensors, 8 + length, len(file))
        return tensors
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path} is no .safetensors file that can be trusted ({error}): {DAMAGED}")


def stored_tensor(file: mmap.mmap, start: int, name: str, entry: dict) -> Stored:
    """One entry of the header. ValueError if it contradicts itself."""
    shape = entry["shape"]
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: shape {shape}, offsets {begin}, {end}")
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"{name} is {entry['dtype']}, expected F32, BF16 or F16; quantised?")
    dtype = SAFETENSORS[entry["dtype"]]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name}: {end - begin} bytes for {entry['dtype']} of shape {shape}")
    return Stored(file, dtype, tuple(shape), start + begin, end - begin)


def check_bytes(tensors: dict[str, Stored], start: int, size: int) -> None:
    """ValueError unless the tensors fill the bytes from `start` to the end, each byte once."""
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if t.start != start or t.start + t.n_bytes > size:
            raise ValueError(f"{name} is at bytes {t.start} to {t.start + t.n_bytes}, expected at "
                             f"{start}, in a file of {size}")
        start += t.n_bytes
    if start != size:
        raise ValueError(f"{size - start} bytes at its end belong to no tensor")


def hf_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of all files of an index, or of all model*.safetensors."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(is_name(file) for file in where.values()):
            fail(f"{index}: expected a weight_map, tensor -> file in this folder: {DAMAGED}")
        names = sorted(set(where.values()))
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
        if not names:
            fail(f"{folder} has no model*.safetensors: copy them from its source (other formats, such as "
                 "pytorch_model.bin, can run code when they are read)")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        fail(f"{folder} has no {missing[0]}, which its index names: copy it from its source")
    tensors = {}
    for name in names:
        content = read_safetensors(folder / name)
        twice = tensors.keys() & content.keys()
        if twice:
            fail(f"{folder / name}: {min(twice)} is in another file too: {DAMAGED}")
        tensors |= content
    return tensors


def is_name(file) -> bool:
    """Is it the name of a file, without a folder?"""
    return isinstance(file, str) and file != "" and Path(file).name == file


def meta_names(n_layers: int, of_layer: dict[str, str], outside: dict[str, str], prefix: str) -> dict:
    """A source's tensor names -> Meta's. of_layer, outside: Meta's -> the source's."""
    names = {theirs: meta for meta, theirs in outside.items()}
    for i in range(n_layers):
        for meta, theirs in of_layer.items():
            names[f"{prefix}.{i}.{theirs}.weight"] = f"layers.{i}.{meta}.weight"
    return names


def open_hf(folder: Path) -> Source:
    """A Hugging Face folder."""
    path = folder / "config.json"
    c = read_json(path)
    config = hf_config(path, c)
    tensors = hf_weights(folder)
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        tensors.pop("lm_head.weight", None)  # transformers takes the embeddings too
    names = meta_names(config.n_layers, NAMES, OUTSIDE, "model.layers")
    tensors = renamed(folder, config, tensors, names)
    bpe, reason = tokenizer_or_reason(hf_tokenizer, folder, c)
    return Source(config, tensors, True, bpe, reason)


def renamed(path: Path, config: LlamaConfig, tensors: dict[str, Stored], names: dict) -> dict[str, Stored]:
    """The tensors under Meta's names, if they are those of a Llama of this shape; else fail()."""
    foreign = [name for name in tensors if name not in names]
    if foreign:
        fail(f"{path}: {foreign[0]} {list(tensors[foreign[0]].shape)} is no tensor of a Llama"
             f"{what_it_means(foreign[0])}: {PLAIN}")
    found = {names[name]: t for name, t in tensors.items()}
    theirs = {meta: name for name, meta in names.items()}
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}
    if config.tied:
        del expected["output.weight"]
    for name, shape in expected.items():
        has = found[name].shape if name in found else "missing"
        if has != shape:
            fail(f"{path}: {theirs[name]} is {has}, its config says {shape}: {DAMAGED}")
    return {name: found[name] for name in expected}


def what_it_means(name: str) -> str:
    """What a tensor that a Llama has not is for."""
    for part, what in {"bias": "biases", "q_norm": "norms of q and k", "k_norm": "norms of q and k",
                       "exp": "experts", "gate_inp": "experts", "lora": "LoRA's adapters"}.items():
        if part in name:
            return f" ({what})"
    return ""


# -----------------------------------------------------------------------------
# GGUF
#
# "GGUF", a version, how many tensors and values; the values, each a key, a type and a value; for
# each tensor a name, its sizes (the last axis first), a type, an offset; the tensors' bytes.

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
GGUF_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
GGUF_NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
GGUF_OUTSIDE = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
                "output.weight": "output.weight"}


class Cursor:
    """Reads a file from its beginning. ValueError where it would read past its end."""

    def __init__(self, file: mmap.mmap):
        self.file = file
        self.at = 0

    def take(self, n: int) -> bytes:
        if n > len(self.file) - self.at:
            raise ValueError(f"{n} bytes at byte {self.at} of {len(self.file)}")
        self.at += n
        return self.file[self.at - n:self.at]

    def number(self, code: str):
        """One number; code: struct's letter."""
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize(code)))
        if code == "f":
            return float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
        return value

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int):
        """A number, a string, or a list of one of them."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind = self.number("I")
        n = self.number("Q")
        if kind == STRING:
            if n > len(self.file) // 8:  # a string takes 8 bytes at least
                raise ValueError(f"{n} strings")
            return [self.string() for _ in range(n)]
        size = struct.calcsize(SCALARS[kind])
        return list(struct.unpack(f"<{n}{SCALARS[kind]}", self.take(n * size)))


def read_gguf(path: Path) -> tuple[dict, dict[str, Stored]]:
    """(values by key, tensors by name) of a file; nothing of the tensors' bytes is read."""
    sizes = gguf_package().GGML_QUANT_SIZES  # type -> (numbers, bytes) of a block
    file = map_file(path)
    cursor = Cursor(file)
    try:
        if cursor.take(4) != b"GGUF" or cursor.number("I") not in (2, 3):
            raise ValueError("expected GGUF of version 2 or 3")
        n_tensors = cursor.number("Q")
        n_values = cursor.number("Q")
        values = {}
        for _ in range(n_values):
            key = cursor.string()
            values[key] = cursor.value(cursor.number("I"))
        infos = {}
        for _ in range(n_tensors):
            name = cursor.string()
            n_axes = cursor.number("I")
            shape = tuple(cursor.number("Q") for _ in range(min(n_axes, 5)))
            infos[name] = (shape[::-1], cursor.number("I"), cursor.number("Q"))
        alignment = values.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        if len(infos) != n_tensors:
            raise ValueError("two tensors of one name")
        tensors = {}
        for name, (shape, kind, offset) in infos.items():
            numbers, n_bytes = sizes[kind]
            if not shape or shape[-1] % numbers:
                raise ValueError(f"{name}: rows of {shape} in blocks of {numbers}")
            size = math.prod(shape) // numbers * n_bytes
            if start + offset + size > len(file):
                raise ValueError(f"{name} ends at byte {start + offset + size} of {len(file)}")
            tensors[name] = Stored(file, GGUF_FLOATS.get(kind, kind), shape, start + offset, size)
        return values, tensors
    except (struct.error, ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError) as error:
        fail(f"{path} is no GGUF file that can be read ({type(error).__name__}: {str(error)[:120]}): {DAMAGED}")


def gguf_package():
    """The package gguf, which knows the quantisations."""
    try:
        import gguf
        return gguf
    except ImportError:
        fail("reading a GGUF file needs a package: pip install gguf")


def open_gguf(path: Path) -> Source:
    """A .gguf file with the arch llama."""
    values, tensors = read_gguf(path)
    frequencies = tensors.pop("rope_freqs.weight", None)
    config = gguf_config(path, values, tied="output.weight" not in tensors)
    if frequencies is not None:
        config = with_factor(path, config, tensor_of(frequencies))
    names = meta_names(config.n_layers, GGUF_NAMES, GGUF_OUTSIDE, "blk")
    tensors = renamed(path, config, tensors, names)
    bpe, reason = tokenizer_or_reason(gguf_tokenizer, path, values)
    return Source(config, tensors, False, bpe, reason)


def gguf_config(path: Path, values: dict, tied: bool) -> LlamaConfig:
    """A GGUF file's values -> LlamaConfig, whose RoPE is not scaled yet."""
    arch = values.get("general.architecture")
    if arch != "llama":
        fail(f"{path} is of the architecture {str(arch)[:40]!r}, expected llama: {PLAIN}")
    if values.get("split.count", 1) > 1:
        fail(f"{path} is one part of {values['split.count']}: join them with llama-gguf-split --merge")

    def value(key, *default):
        key = f"llama.{key}"
        return values.get(key, *default) if default else values[key]

    try:
        heads = value("attention.head_count")
        head_dim = value("attention.key_length", None) or value("embedding_length") // heads
        context = value("context_length")
        foreign = {
            "experts": value("expert_count", 0),
            "a sliding window": 0 < value("attention.sliding_window", 0) < context,
            "heads of two sizes": value("attention.value_length", head_dim) != head_dim,
            "RoPE on a part of each head": value("rope.dimension_count", head_dim) != head_dim,
            "another scaled RoPE": value("rope.scaling.type", "none") != "none"
            or value("rope.scale_linear", 1) != 1}
        for what, there in foreign.items():
            if there:
                fail(f"{path} has {what}: {PLAIN}")
        return checked(LlamaConfig(
            dim=value("embedding_length"), n_layers=value("block_count"), n_heads=heads,
            n_kv_heads=value("attention.head_count_kv", heads), head_dim=head_dim,
            ffn_dim=value("feed_forward_length"),
            vocab_size=value("vocab_size", None) or len(values["tokenizer.ggml.tokens"]),
            norm_eps=float(value("attention.layer_norm_rms_epsilon")),
            rope_theta=float(value("rope.freq_base", 10000.0)), tied=tied, context=context), path)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        fail(f"{path} is not the header of a Llama ({type(error).__name__}: {error}): {DAMAGED}")


def with_factor(path: Path, config: LlamaConfig, divisors: torch.Tensor) -> LlamaConfig:
    """The config with scaled RoPE: llama.cpp stores what each frequency is divided by, from 1 for
    the fastest to the factor for the slowest."""
    plain = rope_frequencies(config)
    if divisors.shape == plain.shape:
        factor = round(divisors.max().item(), 4)
        scaled = replace(config, rope_factor=factor, context=window_of(config.context, factor))
        if torch.allclose(plain / divisors, rope_frequencies(scaled), rtol=1e-4):
            return scaled
    fail(f"{path} scales RoPE otherwise than Llama 3 (rope_freqs.weight): {PLAIN}")


# -----------------------------------------------------------------------------
# the weights, as Meta's folders have them


def tensor_of(t: Stored) -> torch.Tensor:
    """A tensor of a file: a view of its bytes, or float32 where it is quantised."""
    if isinstance(t.kind, int):
        return dequantised(t)
    if t.start % t.kind.itemsize:  # no address for a number
        data = np.frombuffer(t.file, np.uint8, t.n_bytes, t.start).copy()
        return torch.from_numpy(data).view(t.kind).view(t.shape)
    return torch.frombuffer(t.file, dtype=t.kind, count=math.prod(t.shape), offset=t.start).view(t.shape)


def dequantised(t: Stored) -> torch.Tensor:
    """A quantised tensor in float32. In blocks of rows: the package needs room of its own."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(t.kind)
    columns = t.shape[-1]
    rows = np.frombuffer(t.file, np.uint8, t.n_bytes, t.start).reshape(math.prod(t.shape[:-1]), -1)
    out = torch.empty(len(rows), columns)
    try:
        for at in range(0, len(rows), 1024):
            out[at:at + 1024] = torch.from_numpy(gguf.quants.dequantize(rows[at:at + 1024], kind))
    except NotImplementedError:
        fail(f"quantised as {kind.name}, which the package gguf cannot read: take a Q8_0 or F16 file")
    return out.view(t.shape)


def pairs_of(w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of wq or wk (heads * head_dim, dim) from Hugging Face's order to Meta's: RoPE turns
    channels j and j + head_dim/2 there, 2j and 2j + 1 here."""
    heads = w.view(-1, 2, head_dim // 2, w.size(1))  # head, half, j, dim
    return heads.transpose(1, 2).reshape(w.shape)


def state_of(source: Source, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The state dict, in Meta's names and order. dtype None: as in the file; float32 where any
    tensor is quantised."""
    if dtype is None and any(isinstance(t.kind, int) for t in source.tensors.values()):
        dtype = torch.float32
    state = {}
    for name, t in source.tensors.items():
        w = tensor_of(t)
        if source.halves and name.endswith(("attention.wq.weight", "attention.wk.weight")):
            w = pairs_of(w, source.config.head_dim)
        state[name] = w if dtype is None else w.to(dtype)
    matrices = state["tok_embeddings.weight"].dtype
    for name, w in state.items():
        if w.dim() == 1 and torch.equal(w.to(matrices).float(), w.float()):
            state[name] = w.to(matrices)  # GGUF files have all norms in float32
    return state


# -----------------------------------------------------------------------------
# the tokenizer
#
# Byte-level BPE is a list of merges, and tiktoken has none: it merges any two tokens that make a
# third, the lowest id first. That gives the same ids for every text if
#
#     the ids grow along the list of merges, and
#     every token is what the list makes of its own letters.
#
# Both are checked for all tokens; and on a hard text, tiktoken's ids are compared with those of a
# plain BPE over the source's own list. A tokenizer that fails is left out.


class Bpe(NamedTuple):
    """A byte-level BPE. vocab: token in GPT-2's letters -> id. steps: regular expressions, each of
    which cuts what the one before it left. whole: is a pre-token that is a token never merged?"""
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    steps: list[str]
    whole: bool
    special: dict[str, int]
    bos: str
    eos: list[str]
    chat_template: str | None


def tokenizer_or_reason(read, *where) -> tuple[Bpe | None, str]:
    """(tokenizer, ""), or (None, why there is none)."""
    try:
        return read(*where), ""
    except NoTokenizer as reason:
        return None, str(reason)


def hf_tokenizer(folder: Path, config: dict) -> Bpe:
    """tokenizer.json and the files beside it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NoTokenizer("it has no tokenizer.json")
    t = read_json(path)
    beside = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        beside[name] = read_json(folder / name) if (folder / name).is_file() else {}
    try:
        model = t["model"]
        kind = model.get("type", "BPE")
        if kind != "BPE" or model.get("byte_fallback"):
            raise NoTokenizer(f"it is {'a ' + kind if kind != 'BPE' else 'SentencePiece'}, not byte-level BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise NoTokenizer(f"it has {key} {model[key]!r}")
        if t.get("normalizer"):
            raise NoTokenizer(f"it changes texts before it cuts them ({t['normalizer'].get('type')})")
        special = {}
        for token in t.get("added_tokens") or []:
            text = str(token["content"])
            if not token.get("special") and not is_marker(text):
                raise NoTokenizer(f"it has words of its own, such as {text[:40]!r}")
            special[text] = token["id"]
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        if not all(type(i) is int for i in (*vocab.values(), *special.values())):
            raise ValueError("an id is no number")
        if model.get("unk_token") and not set(LETTERS) <= vocab.keys():
            raise NoTokenizer("it has a token for bytes that are no tokens")
        bos, eos, template = hf_ends(t, beside, config, special)
        if template is None and (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return Bpe(vocab, pairs_in(model["merges"]), hf_steps(t.get("pre_tokenizer")),
                   bool(model.get("ignore_merges")), special, bos, eos, template)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        fail(f"{path} is not the tokenizer.json of a BPE, it lacks vocab, merges or more "
             f"({type(error).__name__}: {error}): {DAMAGED}")


def is_marker(text: str) -> bool:
    """<|im_start|>, [INST]: not to be met in a text?"""
    return regex.fullmatch(r"<.+>|\[.+\]", text) is not None


def pairs_in(merges: list) -> list[tuple[str, str]]:
    """["a b", ...] or [["a", "b"], ...] -> [(a, b), ...]. ValueError for anything else."""
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((str(left), str(right)))
    return pairs


def hf_steps(pre_tokenizer: dict | None) -> list[str]:
    """The regular expressions that cut a text, one after the other."""
    steps = []
    last = None
    for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        last = part.get("type")
        if last == "Digits":
            steps.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif last == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            pattern = part["pattern"]
            steps.append(str(pattern["Regex"]) if "Regex" in pattern else regex.escape(pattern["String"]))
        elif last == "ByteLevel" and not part.get("add_prefix_space"):
            if part.get("use_regex", True):
                steps.append(GPT2_PATTERN)
        else:
            raise NoTokenizer(f"its pre-tokenizer has a part of the kind {last}")
    if last != "ByteLevel":
        raise NoTokenizer("its pre-tokenizer is not byte-level")
    return steps


def hf_ends(t: dict, beside: dict, config: dict, special: dict) -> tuple[str, list[str], str | None]:
    """(the token in front of a text, those that end one, chat template)."""
    said = beside["tokenizer_config.json"]
    name_of = {i: name for name, i in special.items()}
    starts = []
    processor = t.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            first = part["single"][0]
            starts += [first["SpecialToken"]["id"]] if "SpecialToken" in first else []
    starts += [text_of(said.get("bos_token")), name_of.get(config.get("bos_token_id"))]

    stops = []
    for source in (config, beside["generation_config.json"]):
        ids = source.get("eos_token_id")
        stops += [name_of.get(i) for i in (ids if isinstance(ids, list) else [ids])]
    stops.append(text_of(said.get("eos_token")))
    eos = list(dict.fromkeys(name for name in stops if name in special))

    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return first_of(starts + eos, special), eos, template


def text_of(token) -> str | None:
    """A token of tokenizer_config.json: a text, or an object with its text."""
    return token.get("content") if isinstance(token, dict) else token


def first_of(names: list, special: dict) -> str:
    """The first of the names that is a special token."""
    for name in names:
        if name in special:
            return name
    raise NoTokenizer("no special token begins a text")


# llama.cpp's names of pre-tokenizers -> their regular expressions; and those of them that never
# merge a pre-token that is a token.
GGUF_STEPS = {name: [pattern] for name, pattern in PATTERNS.items()}
GGUF_STEPS |= dict.fromkeys(("smollm", "starcoder", "refact"), [r"\p{N}", GPT2_PATTERN])
GGUF_STEPS |= dict.fromkeys(("llama3", "llama-v3"), [PATTERNS["llama-bpe"]])
GGUF_WHOLE = {"llama-bpe", "llama3", "llama-v3", "tekken"}
NORMAL = 1  # of tokenizer.ggml.token_type; the others: unknown, control, user-defined, unused, byte
USER_DEFINED = 4


def gguf_tokenizer(path: Path, values: dict) -> Bpe:
    """The values tokenizer.* of a GGUF file."""

    def value(key, default=None):
        return values.get(f"tokenizer.ggml.{key}", default)

    if value("model") != "gpt2":
        raise NoTokenizer(f"it is {str(value('model'))[:40]!r} (SentencePiece?), not byte-level BPE")
    pre = str(value("pre", "default"))
    if pre not in GGUF_STEPS:
        raise NoTokenizer(f"its pre-tokenizer {pre[:40]!r} is not one of {', '.join(GGUF_STEPS)}")
    try:
        tokens = [str(token) for token in value("tokens")]
        types = value("token_type", [NORMAL] * len(tokens))
        bos = value("bos_token_id")
        stops = [value(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        vocab = {}
        special = {}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == USER_DEFINED and not is_marker(token):
                raise NoTokenizer(f"it has words of its own, such as {token[:40]!r}")
            if kind == NORMAL and i not in (bos, *stops):
                vocab[token] = i
            else:
                special[token] = i
        if len(vocab) + len(special) < len(tokens):
            raise NoTokenizer("two of its tokens have one name")
        name_of = {i: name for name, i in special.items()}
        eos = list(dict.fromkeys(name_of[i] for i in stops if i in name_of))
        return Bpe(vocab, pairs_in(value("merges")), GGUF_STEPS[pre], pre in GGUF_WHOLE, special,
                   first_of([name_of.get(bos), *eos], special), eos, values.get("tokenizer.chat_template"))
    except (TypeError, ValueError, AttributeError) as error:
        fail(f"{path}: its tokenizer lacks tokens, merges or more ({error}): {DAMAGED}")


def one_pattern(steps: list[str]) -> str:
    """One regular expression that cuts as the steps do one after the other, for those steps that
    Llamas have."""
    if len(steps) == 1:
        return steps[0]
    if steps == [r"\p{N}", GPT2_PATTERN]:
        return DIGITS_PATTERN
    raise NoTokenizer(f"its pre-tokenizer cuts in {len(steps)} steps that are not known as one")


def save_tokenizer_of(bpe: Bpe, folder: Path, vocab_size: int) -> int:
    """Writes tokenizer.model, and its settings where it is not of Llama 3's form. Returns how many
    ids of the hard text were compared. NoTokenizer, and no file: it would give other ids."""
    ranks = {bytes_of(token): i for token, i in bpe.vocab.items()}
    check_merges(bpe)
    settings = settings_of(bpe, ranks, vocab_size)
    try:
        tiktoken.Encoding("its pattern alone", pat_str=settings.pattern, mergeable_ranks={b"a": 0}, special_tokens={})
    except ValueError as error:
        raise NoTokenizer(f"tiktoken cannot read its pattern ({error})")
    save_ranks(folder / TOKENIZER, ranks)
    if not is_llama3s(settings, ranks, vocab_size):
        save_settings(folder / SETTINGS, settings)
    try:
        enc = load_tokenizer(folder / TOKENIZER, vocab_size)
        ours = encode_text(enc, HARD_TEXT).tolist()
        theirs = plain_bpe(bpe, HARD_TEXT)
        if ours != theirs:
            at = next(i for i, pair in enumerate(zip(ours + [-1], theirs + [-1])) if pair[0] != pair[1])
            raise NoTokenizer(f"token {at} of a hard text is {ours[at:at + 1]}, its own {theirs[at:at + 1]}")
        return len(ours)
    except NoTokenizer:
        (folder / TOKENIZER).unlink()
        (folder / SETTINGS).unlink(missing_ok=True)
        raise


def settings_of(bpe: Bpe, ranks: dict[bytes, int], vocab_size: int) -> Settings:
    """The settings of a BPE, whose ids are 0..vocab_size-1: rows without a token get a name, special
    tokens without a row are left out."""
    special = {name: i for name, i in bpe.special.items() if i < vocab_size}
    ids = [*ranks.values(), *special.values()]
    if not ranks or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise NoTokenizer(f"it has other ids than the model's {vocab_size} rows")
    if len(set(ids)) < len(ids):
        raise NoTokenizer("two tokens have one id")
    if bpe.bos not in special or not set(bpe.eos) <= special.keys():
        raise NoTokenizer("the model has no row for the token that begins or ends a text")
    special |= unused_names(set(range(vocab_size)) - set(ids))
    special = dict(sorted(special.items(), key=lambda item: item[1]))
    return Settings(one_pattern(bpe.steps), special, bpe.bos, bpe.eos, bpe.chat_template)


def is_llama3s(settings: Settings, ranks: dict[bytes, int], vocab_size: int) -> bool:
    """Does tokenizer.model alone say all of it?"""
    llama3 = llama3_settings(len(ranks))
    n_vocab = len(ranks) + len(llama3.special_tokens)
    llama3.special_tokens.update(unused_names(range(n_vocab, vocab_size)))  # as load_tokenizer does
    all_bytes = all(bytes([b]) in ranks for b in range(256))
    same = settings[:2] == llama3[:2] and settings.bos == BOS and set(settings.eos) <= set(STOPS)
    return same and all_bytes and vocab_size - n_vocab < PADDING and settings.chat_template is None


BYTES = {letter: b for b, letter in enumerate(LETTERS)}


def bytes_of(token: str) -> bytes:
    """A token in GPT-2's letters -> its bytes."""
    if not token or not all(letter in BYTES for letter in token):
        raise NoTokenizer(f"its token {token[:40]!r} is not spelled in GPT-2's letters")
    return bytes(BYTES[letter] for letter in token)


def check_merges(bpe: Bpe) -> None:
    """NoTokenizer unless tiktoken's rule gives what the list of merges gives (see above)."""
    made = [bpe.vocab.get(left + right, -1) for left, right in bpe.merges]
    if -1 in made or made != sorted(made):
        raise NoTokenizer("its ids do not grow along its merges")
    priority = {pair: i for i, pair in reversed(list(enumerate(bpe.merges)))}
    for token in bpe.vocab:
        if bpe.whole and all_listed(token, bpe.vocab, priority):
            continue  # both rules know the same ways to it
        if merged(list(token), priority) != [token]:
            raise NoTokenizer(f"its merges never make its token {token[:40]!r}")


def all_listed(token: str, vocab: dict, priority: dict) -> bool:
    """Is every way to make the token of two others in the list of merges?"""
    for i in range(1, len(token)):
        left, right = token[:i], token[i:]
        if left in vocab and right in vocab and (left, right) not in priority:
            return False
    return True


def merged(word: list[str], priority: dict[tuple[str, str], int]) -> list[str]:
    """BPE by its definition: the pair that comes first in the list is merged, until none is in it."""
    while len(word) > 1:
        pairs = list(zip(word, word[1:]))
        ranks = [priority.get(pair, math.inf) for pair in pairs]
        best = min(ranks)
        if best == math.inf:
            break
        i = ranks.index(best)
        word = word[:i] + [word[i] + word[i + 1]] + word[i + 2:]
    return word


def plain_bpe(bpe: Bpe, text: str) -> list[int]:
    """The ids of a text, by the source's own steps and merges. Bytes that are no tokens are
    dropped."""
    pieces = [text]
    for step in bpe.steps:
        pieces = [part for piece in pieces for part in isolated(step, piece)]
    priority = {pair: i for i, pair in reversed(list(enumerate(bpe.merges)))}
    ids = []
    for piece in pieces:
        word = "".join(LETTERS[b] for b in piece.encode())
        if bpe.whole and word in bpe.vocab:
            ids.append(bpe.vocab[word])
            continue
        known = [letter for letter in word if letter in bpe.vocab]
        ids += [bpe.vocab[token] for token in merged(known, priority)]
    return ids


def isolated(pattern: str, text: str) -> list[str]:
    """A text cut at both ends of every match; what lies between matches is a piece too."""
    pieces = []
    end = 0
    try:
        for match in regex.finditer(pattern, text, timeout=10):
            pieces += [text[end:match.start()], match.group()]
            end = match.end()
    except (regex.error, TimeoutError) as error:
        raise NoTokenizer(f"its pattern is no regular expression that can be used ({error})")
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]


# Everything that tokenizers disagree about.
HARD_TEXT = "\n".join([
    """The quick brown fox's den: they've said "I'LL be there", haven't THEY'RE? It'd cost $1,234.56""",
    "(or 12345678 yen) in 2024, i.e. 3.14% less -- naïve café, Straße, ŒUVRE, İstanbul, don’t, x²½Ⅷ.",
    "", "\tdef f(x, *args):\n\t\tif x >= 0x1F and  not x != -1e-10:   # 42 ok",
    "        return {'a': [1, 2,  3], 'b': x**2 // 7}   \r\n\r\n    }\r});\n\n\n  12  345   6789\n   7",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002 \u4e2d\u6587\uff0c123\u4e2a",
    "\ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0661\u0662\u0663 e\u0301",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \U0001f937\U0001f3fd\u200d\u2640\ufe0f",
    "\u2211\u222b\u221a \U00020000\ufeff\xa0\u3000\u2003x\u200b\x00\x01!\x04!\x13a\x14b\x1c\x7f\x85",
    "\U000e0067\U000f0000 http://a.b/c?d=e&f_g#h <|im_start|>user<s>[INST] aaaaaaaaaaaaaaaa ====",
    "!!!??? \\n CamelCase HTTPServer snake_case", " " * 77 + "x", "\n" * 9, "\t" * 9, "ab" * 40 + "   "])


# -----------------------------------------------------------------------------
# the command


def open_source(path: Path) -> Source:
    """A Hugging Face folder or a GGUF file; anything else: fail()."""
    try:
        if (path / "config.json").is_file():
            return open_hf(path)
        if path.is_file():
            with open(path, "rb") as file:
                if path.suffix == ".gguf" or file.read(4) == b"GGUF":
                    return open_gguf(path)
    except OSError as error:
        fail(f"{error.filename or path} cannot be read ({error.strerror}): copy it from its source")
    if (path / PARAMS).is_file():
        fail(f"{path} is a raw Llama folder already: use it as it is")
    found = "is something else" if path.exists() else "does not exist"
    fail(f"{path} {found}: expected a Hugging Face folder (config.json, model*.safetensors) or a .gguf file")


def convert(path: Path, out: Path, dtype: torch.dtype | None = None) -> str:
    """Writes the raw folder `out`, whole or not at all. Returns what it is, in a line."""
    source = open_source(path)
    check_target(out, path)
    said = ""
    with new_folder(out, may_replace=LLAMA_FILES) as temporary:
        reason = source.reason
        if source.tokenizer:
            try:
                n = save_tokenizer_of(source.tokenizer, temporary, source.config.vocab_size)
                said = f"; the tokenizer gives its source's ids on {n:,} tokens of hard text"
            except NoTokenizer as error:
                reason = str(error)
        state = state_of(source, dtype)
        save_llama(temporary, source.config, state)
    if reason:
        note(f"the tokenizer is left out: {reason}. The weights are whole; text needs shards of ids that its own "
             "tokenizer made (data/shards.py: write_shard), for --data")
    c = source.config
    numbers = sum(w.numel() for w in state.values())
    dtypes = "/".join(sorted({str(w.dtype).removeprefix("torch.") for w in state.values()}))
    return (f"{out}: {numbers:,} parameters in {dtypes}, {c.n_layers} layers, dim {c.dim}, {c.n_heads} heads, "
            f"{c.n_kv_heads} KV heads, {c.ffn_dim} neurons, {c.vocab_size:,} tokens{said}")


def main(argv=None) -> None:
    """A Llama from elsewhere in, a raw Llama folder out."""
    parser = Parser("python data/llama.py", __doc__)
    parser.add_argument("source", help="a Hugging Face folder, or a .gguf file")
    parser.add_argument("--out", required=True, metavar="DIR", help="the raw Llama folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the source's; float32 if it is quantised")
    args = parser.parse_args(argv)
    with nothing_half_written(args.out):
        print(convert(Path(args.source), Path(args.out), DTYPES.get(args.dtype)))


if __name__ == "__main__":
    main()
