"""
A Llama from elsewhere -> a raw Llama folder, which train.py, eval.py and all else here read.

    python data/llama.py Llama-3.2-1B --out out/llama        a Hugging Face folder
    python data/llama.py smollm2.gguf --out out/smollm2      a GGUF file: pip install gguf

A GGUF file in parts is named by its first: NAME-00001-of-00003.gguf; the others lie beside it.

Three things are translated, and each is refused by name where it is more than a Llama:

    the shape      config.json, or a GGUF file's header -> params.json
    the weights    one tensor at a time, memory-mapped  -> consolidated.00.pth
    the tokenizer  byte-level BPE                       -> tokenizer.model, tokenizer_settings.json

Weights keep their dtype; quantised ones become float32, the numbers their own runtime computes
with. A tokenizer is kept only if it gives the ids of its source: see data/llama_tokenizer.py, which
translates it. Without one a model still trains, on shards of ids.

Nothing of a source is executed, and every length in it is checked before it is believed.
"""
import json
import math
import mmap
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# For `python data/llama.py`, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.llama_tokenizer import (Bpe, NoTokenizer, gguf_tokenizer, hf_tokenizer, save_tokenizer_of,
                                  tokenizer_or_reason)
from model import Llama, LlamaConfig, one_if_equal, rope_frequencies
from plumbing.checkpoint import LLAMA_FILES, check_target, save_llama
from plumbing.errors import Parser, fail, note, run_main
from plumbing.files import DAMAGED, new_folder, nothing_half_written, read_json
from plumbing.hf import NAMES, OUTSIDE
from plumbing.parallel import bar
from plumbing.params import PARAMS, check_shape
from plumbing.tables import spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "expected a plain text Llama; take another model"
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
    """A Llama from elsewhere. tensors: by Meta's names. halves: are the rows of wq and wk in
    Hugging Face's order? tokenizer: None, with a reason, where it is no byte-level BPE."""
    config: LlamaConfig
    tensors: dict[str, Stored]
    halves: bool
    tokenizer: Bpe | None
    reason: str


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read where they are touched. Writing to them would not reach the file."""
    if not path.is_file():
        fail(f"{path} is missing: copy it from its source")
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            fail(f"{path} is empty: {DAMAGED}")


def checked(config: LlamaConfig, path: Path) -> LlamaConfig:
    """The config, if its sizes make a model; else fail()."""
    try:
        check_shape(config)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        fail(f"{path} is not the shape of a Llama ({error}): {PLAIN}")
    return config


def number(value, key: str) -> float:
    """The number under a key, as a float. ValueError for anything else: a text, 10**400."""
    if type(value) not in (int, float):
        raise ValueError(f"{key} is {str(value)[:40]!r}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key} is a number of {len(str(value))} digits")


# -----------------------------------------------------------------------------
# Hugging Face: config.json

# Keys whose value, if it has one, means another arithmetic.
FOREIGN = {
    "attention_bias": "biases", "mlp_bias": "biases", "qkv_bias": "biases", "use_bias": "biases",
    "num_local_experts": "experts", "num_experts": "experts", "n_routed_experts": "experts",
    "use_qk_norm": "norms of q and k", "qk_norm": "norms of q and k",
    "qk_layernorm": "norms of q and k",
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
            norm_eps=number(c.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
            rope_theta=theta, rope_factor=factor,
            tied=bool(c.get("tie_word_embeddings", False)),
            context=window_of(context, factor)), path)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        fail(f"{path} is not the config.json of a Llama ({type(error).__name__}: {error}): "
             f"{DAMAGED}")


def hf_rope(path: Path, c: dict) -> tuple[float, float]:
    """(theta, factor) of RoPE. It stands in rope_parameters since transformers 5, in rope_theta and
    rope_scaling before, and in a file for both in both."""
    plain_theta = c.get("rope_theta", 10000.0)
    said = set()
    for rope in (c.get("rope_parameters"), c.get("rope_scaling")):
        if not rope:
            continue
        theta = rope.get("rope_theta", plain_theta)
        said.add((number(theta, "rope_theta"), llama3_factor(path, rope)))
    if len(said) > 1:
        fail(f"{path}: rope_parameters and rope_scaling contradict each other: {DAMAGED}")
    partial = [c.get("partial_rotary_factor"),
               (c.get("rope_parameters") or {}).get("partial_rotary_factor")]
    if any(p not in (None, 1, 1.0) for p in partial):
        fail(f"{path} has partial_rotary_factor, RoPE on a part of each head: {PLAIN}")
    return said.pop() if said else (number(plain_theta, "rope_theta"), 1.0)


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
    factor = number(rope["factor"], "the factor of RoPE")
    if not 1 <= factor < math.inf:
        raise ValueError(f"the factor of RoPE is {factor}, expected 1 or more")
    return factor


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
    """The tensors of model.safetensors, or of all files of an index, or of all
    model*.safetensors."""
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
            fail(f"{folder} has no model*.safetensors: copy them from its source (other formats, "
                 "such as pytorch_model.bin, can run code when they are read)")
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


def meta_names(n_layers: int, of_layer: dict[str, str], outside: dict[str, str],
               prefix: str) -> dict:
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


def renamed(path: Path, config: LlamaConfig, tensors: dict[str, Stored],
            names: dict) -> dict[str, Stored]:
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

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
           12: "d"}
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
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
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
    except (struct.error, ValueError, KeyError, TypeError, ZeroDivisionError,
            OverflowError) as error:
        fail(f"{path} is no GGUF file that can be read ({type(error).__name__}: "
             f"{str(error)[:120]}): {DAMAGED}")


def gguf_package():
    """The package gguf, which knows the quantisations."""
    try:
        import gguf
        return gguf
    except ImportError:
        fail("reading a GGUF file needs a package: pip install gguf")


def read_parts(path: Path) -> tuple[dict, dict[str, Stored]]:
    """A GGUF file, or all parts of one. The first part has the values, each has some tensors."""
    values, tensors = read_gguf(path)
    count = values.get("split.count", 1)
    if type(count) is not int:
        fail(f"{path} has the split.count {str(count)[:40]!r}, expected a number: {DAMAGED}")
    if count <= 1:
        return values, tensors
    match = re.fullmatch(rf"(.*)-\d{{5}}-of-{count:05d}\.gguf", path.name)
    name = match[1] if match else "NAME"
    if path.name != f"{name}-00001-of-{count:05d}.gguf" or values.get("split.no") != 0:
        fail(f"{path} is one of {count} parts, which are found by their names: expected the first, "
             f"{name}-00001-of-{count:05d}.gguf")
    for i in range(1, count):
        part = path.with_name(f"{name}-{i + 1:05d}-of-{count:05d}.gguf")
        said, more = read_gguf(part)
        if (said.get("split.no"), said.get("split.count")) != (i, count):
            fail(f"{part} does not say that it is part {i + 1} of {count}: {DAMAGED}")
        twice = tensors.keys() & more.keys()
        if twice:
            fail(f"{part}: {min(twice)} is in another part too: {DAMAGED}")
        tensors |= more
    return values, tensors


def open_gguf(path: Path) -> Source:
    """A .gguf file with the arch llama, or deci, whose layers may differ in heads and neurons."""
    values, tensors = read_parts(path)
    frequencies = tensors.pop("rope_freqs.weight", None)
    config = gguf_config(path, values, tied="output.weight" not in tensors)
    if frequencies is not None:
        config = with_factor(path, config, frequencies)
    names = meta_names(config.n_layers, GGUF_NAMES, GGUF_OUTSIDE, "blk")
    tensors = renamed(path, config, tensors, names)
    bpe, reason = tokenizer_or_reason(gguf_tokenizer, path, values)
    return Source(config, tensors, False, bpe, reason)


def gguf_config(path: Path, values: dict, tied: bool) -> LlamaConfig:
    """A GGUF file's values -> LlamaConfig, whose RoPE is not scaled yet."""
    arch = values.get("general.architecture")
    if arch not in ("llama", "deci"):
        fail(f"{path} is of the architecture {str(arch)[:40]!r}, expected llama or deci: {PLAIN}")

    def value(key, *default):
        key = f"{arch}.{key}"
        found = values.get(key, *default) if default else values[key]
        if not isinstance(found, list):
            return found
        # A list: one value for each layer.
        whole = len(found) == values[f"{arch}.block_count"]
        return one_if_equal(found) if whole else tuple(found)

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
            norm_eps=number(value("attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon"),
            rope_theta=number(value("rope.freq_base", 10000.0), "rope.freq_base"), tied=tied,
            context=context), path)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        fail(f"{path} is not the header of a Llama ({type(error).__name__}: {error}): {DAMAGED}")


def with_factor(path: Path, config: LlamaConfig, stored: Stored) -> LlamaConfig:
    """The config with scaled RoPE: llama.cpp stores what each frequency is divided by, from 1 for
    the fastest to the factor for the slowest."""
    plain = rope_frequencies(config)
    if stored.shape == plain.shape:
        divisors = tensor_of(stored).float()
        factor = round(divisors.max().item(), 4)
        scaled = replace(config, rope_factor=factor, context=window_of(config.context, factor))
        same = torch.allclose(plain / divisors, rope_frequencies(scaled), rtol=1e-4)
        if same and 1 <= factor < math.inf:
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
    flat = torch.frombuffer(t.file, dtype=t.kind, count=math.prod(t.shape), offset=t.start)
    return flat.view(t.shape)


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
        fail(f"quantised as {kind.name}, which the package gguf cannot read: take a Q8_0 or F16 "
             "file")
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
    for name, t in bar(source.tensors.items(), "reading", unit="tensor"):
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
    fail(f"{path} {found}: expected a Hugging Face folder (config.json, model*.safetensors) or a "
         ".gguf file")


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
                if source.tokenizer.no_template:
                    said += f"; no chat template: {source.tokenizer.no_template}"
            except NoTokenizer as error:
                reason = str(error)
        state = state_of(source, dtype)
        save_llama(temporary, source.config, state)
    if reason:
        note(f"the tokenizer is left out: {reason}. The weights are whole; text needs shards of "
             "ids that its own tokenizer made (data/shards.py: write_shard), for --data")
    c = source.config
    numbers = sum(w.numel() for w in state.values())
    dtypes = "/".join(sorted({str(w.dtype).removeprefix("torch.") for w in state.values()}))
    return (f"{out}: {numbers:,} parameters in {dtypes}, {c.n_layers} layers, dim {c.dim}, "
            f"{spread(c.n_heads)} heads, {spread(c.n_kv_heads)} KV heads, "
            f"{spread(c.ffn_dim)} neurons, {c.vocab_size:,} tokens{said}")


def main(argv=None) -> None:
    """A Llama from elsewhere in, a raw Llama folder out."""
    parser = Parser("python data/llama.py", __doc__)
    parser.add_argument("source", help="a Hugging Face folder, or a .gguf file")
    parser.add_argument("--out", required=True, metavar="DIR", help="the raw Llama folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES),
                        help="default: the source's; float32 if it is quantised")
    args = parser.parse_args(argv)
    with nothing_half_written(args.out):
        print(convert(Path(args.source), Path(args.out), DTYPES.get(args.dtype)))


if __name__ == "__main__":
    run_main(main)
