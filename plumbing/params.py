"""
params.json <-> LlamaConfig: what Meta's files say of a Llama's shape, what they leave out, and which Llama it is.

    python -c "from params import *; print(family(read_config('Llama-3.1-8B')))"

Meta never writes head_dim, the MLP's width, the RoPE factor, tying or the context: the first two follow from a formula,
the factor from the model that has this shape. Our own files say all of it.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

from model import LlamaConfig
from plumbing.errors import fail

PARAMS = "params.json"


def meta_ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's formula for the MLP width: 2/3 of 4 dim, times the multiplier, rounded up to multiple_of."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def read_config(folder) -> LlamaConfig:
    """params.json -> LlamaConfig. Keys that Meta leaves out get Meta's defaults; vocab_size -1 (Llama 1, 2) is 32000.
    head_dim, ffn_dim, rope_factor and context are keys of our own files and need no formula. A RoPE factor other than
    that of the published model of this shape can be given by a key rope_factor."""
    path = Path(folder) / PARAMS
    if not path.is_file():
        fail(f"{folder} is no Llama folder: it has no {PARAMS}; expected a raw Llama folder (params.json, "
             f"consolidated.00.pth, tokenizer.model); python train.py makes one in out/base")
    try:
        p = json.loads(path.read_text(encoding="utf-8"))
        p = p.get("model", p)
        foreign = [key for key in p if p[key] and re.match("vision_|quantization_args|lora_args", key)]
        if foreign:
            fail(f"{path} has {', '.join(foreign)}: a vision, quantised or LoRA model; expected a plain text Llama in "
                 "bf16, fp16 or fp32; take the original weights of a text model")
        listed = lambda v: tuple(v) if isinstance(v, list) else v
        dim, n_layers, n_heads = p["dim"], p["n_layers"], listed(p["n_heads"])
        scaled = 32.0 if (dim, n_layers) in {(2048, 16), (3072, 28)} else 8.0  # Llama 3.2 text, else 3.1 and 3.3
        config = LlamaConfig(
            dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=listed(p.get("n_kv_heads")) or n_heads,
            head_dim=p.get("head_dim") or dim // n_heads,
            ffn_dim=listed(p.get("ffn_dim")) or
            meta_ffn_dim(dim, p.get("ffn_dim_multiplier"), p.get("multiple_of", 256)),
            vocab_size=p["vocab_size"] if p.get("vocab_size", -1) > 0 else 32000,
            norm_eps=float(p.get("norm_eps", 1e-5)), rope_theta=float(p.get("rope_theta", 10000.0)),
            rope_factor=float(p.get("rope_factor", scaled)) if p.get("use_scaled_rope") else 1.0,
            context=p.get("context") or (8192 if p.get("vocab_size") == 128256 else  # Llama 3, 2, 1
                                         2048 if p.get("norm_eps") == 1e-6 else 4096))
        sizes = [config.dim, config.n_layers, config.head_dim, config.vocab_size, config.context]
        for name in ("n_heads", "n_kv_heads", "ffn_dim"):
            sizes += config.per_layer(name)
            if len(config.per_layer(name)) != n_layers:
                raise ValueError(f"{name} has {len(config.per_layer(name))} values for {n_layers} layers")
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("a size is not a positive integer")
        if config.head_dim % 2:
            raise ValueError(f"heads of {config.head_dim} channels cannot be rotated in pairs")
        if any(h % kv for h, kv in zip(config.per_layer("n_heads"), config.per_layer("n_kv_heads"))):
            raise ValueError(f"{n_heads} query heads do not divide among {config.n_kv_heads} KV heads")
        return config
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        fail(f"{path} is not the params.json of a Llama ({type(error).__name__}: {error}); expected JSON with dim, "
             "n_layers, n_heads, vocab_size; copy it again from its source")


def published_tying(config: LlamaConfig) -> LlamaConfig:
    """The config, tied if it is one of Llama 3.2's small ones: their params.json does not say it, their weights do."""
    return replace(config, tied=config.tied or (config.vocab_size, config.rope_factor) == (128256, 32))


def params_json(config: LlamaConfig) -> dict:
    """LlamaConfig -> the dictionary of params.json. head_dim and ffn_dim are always there; multiple_of and
    ffn_dim_multiplier are chosen so that Meta's formula gives the same ffn_dim."""
    p = dict(dim=config.dim, n_layers=config.n_layers, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads,
             vocab_size=config.vocab_size, norm_eps=config.norm_eps, rope_theta=config.rope_theta,
             use_scaled_rope=config.rope_factor != 1.0, head_dim=config.head_dim, ffn_dim=config.ffn_dim,
             context=config.context)
    if config.rope_factor != 1.0:
        p["rope_factor"] = config.rope_factor
    if isinstance(config.ffn_dim, int):
        multiple = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if config.ffn_dim % m == 0)
        # Aim at the middle of the interval that rounds up to ffn_dim.
        multiplier = (config.ffn_dim - (multiple - 1) / 2 + (0.5 if multiple == 1 else 0)) / int(8 * config.dim / 3)
        p |= dict(multiple_of=multiple, ffn_dim_multiplier=round(multiplier, 6))
    return p


FAMILIES = {  # (dim, n_layers, vocab_size, rope_factor) -> name; what is left is told from norm_eps
    (4096, 32, 128256, 1): "Llama 3 8B", (8192, 80, 128256, 1): "Llama 3 70B", (4096, 32, 128256, 8): "Llama 3.1 8B",
    (8192, 80, 128256, 8): "Llama 3.1 or 3.3 70B", (16384, 126, 128256, 8): "Llama 3.1 405B",
    (2048, 16, 128256, 32): "Llama 3.2 1B", (3072, 28, 128256, 32): "Llama 3.2 3B",
    (4096, 32, 32000, 1): "7B", (5120, 40, 32000, 1): "13B", (6656, 60, 32000, 1): "30B", (8192, 80, 32000, 1): "65B"}


def family(c: LlamaConfig) -> str:
    """The published model of this shape."""
    name = FAMILIES.get((c.dim, c.n_layers, c.vocab_size, int(c.rope_factor)), "none of Meta's")
    if c.vocab_size != 32000 or name not in FAMILIES.values():
        return name
    return f"Llama 1 {name}" if c.norm_eps == 1e-6 else f"Llama 2 {'70B' if name == '65B' else name}"
