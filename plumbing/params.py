"""
params.json <-> LlamaConfig: what Meta's files say of a Llama's shape, what they leave out, and
which Llama it is.

    python -c "from plumbing.params import *; print(published_name(read_config('Llama-3.1-8B')))"

Meta never writes head_dim, the MLP's width, the RoPE factor, tying or the context: the first two
follow from a formula, the factor from the model that has this shape. Our own files say all of it.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

from model import LlamaConfig
from plumbing.errors import fail

PARAMS = "params.json"
PER_LAYER = ("n_heads", "n_kv_heads", "ffn_dim")  # lists in a heterogeneous slice's file

# -----------------------------------------------------------------------------
# reading


def meta_ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's formula for the MLP width: 2/3 of 4 dim, times the multiplier, rounded up to
    multiple_of."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def read_config(folder) -> LlamaConfig:
    """params.json -> LlamaConfig; fail() if it is missing, damaged, or of a model that is no plain
    text Llama."""
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
        config = config_of(p)
        check_shape(config)
        return config
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        fail(f"{path} is not the params.json of a Llama ({type(error).__name__}: {error}); expected JSON with dim, "
             "n_layers, n_heads, vocab_size; copy it again from its source")


def config_of(p: dict) -> LlamaConfig:
    """The keys of a params.json as a LlamaConfig. Keys that Meta leaves out get Meta's defaults;
    vocab_size -1 (Llama 1, 2) is 32000. head_dim, ffn_dim, rope_factor and context are keys of our
    own files and need no formula."""
    dim = p["dim"]
    n_layers = p["n_layers"]
    n_heads = listed(p["n_heads"])
    n_kv_heads = listed(p.get("n_kv_heads")) or n_heads
    head_dim = p.get("head_dim") or dim // n_heads
    ffn_dim = listed(p.get("ffn_dim"))
    if not ffn_dim:
        ffn_dim = meta_ffn_dim(dim, p.get("ffn_dim_multiplier"), p.get("multiple_of", 256))
    rope_factor = 1.0
    if p.get("use_scaled_rope"):
        small = (dim, n_layers) in {(2048, 16), (3072, 28)}  # Llama 3.2 text; else 3.1 and 3.3
        rope_factor = float(p.get("rope_factor", 32.0 if small else 8.0))
    context = p.get("context") or published_context(p)
    return LlamaConfig(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, ffn_dim=ffn_dim,
        vocab_size=p["vocab_size"] if p.get("vocab_size", -1) > 0 else 32000,
        norm_eps=float(p.get("norm_eps", 1e-5)), rope_theta=float(p.get("rope_theta", 10000.0)),
        rope_factor=rope_factor, context=context)


def listed(value):
    """JSON's list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def published_context(p: dict) -> int:
    """The window of Llama 3, 1 and 2, told from the vocabulary and norm_eps."""
    if p.get("vocab_size") == 128256:
        return 8192
    return 2048 if p.get("norm_eps") == 1e-6 else 4096


def check_shape(config: LlamaConfig) -> None:
    """ValueError where sizes contradict each other."""
    sizes = [config.dim, config.n_layers, config.head_dim, config.vocab_size, config.context]
    for name in PER_LAYER:
        values = config.per_layer(name)
        if len(values) != config.n_layers:
            raise ValueError(f"{name} has {len(values)} values for {config.n_layers} layers")
        sizes += values
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError("a size is not a positive integer")
    if config.head_dim % 2:
        raise ValueError(f"heads of {config.head_dim} channels cannot be rotated in pairs")
    if any(h % kv for h, kv in zip(config.per_layer("n_heads"), config.per_layer("n_kv_heads"))):
        raise ValueError(f"{config.n_heads} query heads do not divide among {config.n_kv_heads} KV heads")


# -----------------------------------------------------------------------------
# writing


def params_json(config: LlamaConfig) -> dict:
    """LlamaConfig -> the dictionary of params.json. head_dim and ffn_dim are always there;
    multiple_of and ffn_dim_multiplier are chosen so that Meta's formula gives the same ffn_dim."""
    p = dict(dim=config.dim, n_layers=config.n_layers, n_heads=config.n_heads, n_kv_heads=config.n_kv_heads,
             vocab_size=config.vocab_size, norm_eps=config.norm_eps, rope_theta=config.rope_theta,
             use_scaled_rope=config.rope_factor != 1.0, head_dim=config.head_dim, ffn_dim=config.ffn_dim,
             context=config.context)
    if config.rope_factor != 1.0:
        p["rope_factor"] = config.rope_factor
    if isinstance(config.ffn_dim, int):
        multiple = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if config.ffn_dim % m == 0)
        middle = config.ffn_dim - (multiple - 1) / 2  # of the interval that rounds up to ffn_dim
        if multiple == 1:
            middle += 0.5
        p["multiple_of"] = multiple
        p["ffn_dim_multiplier"] = round(middle / int(8 * config.dim / 3), 6)
    return p


# -----------------------------------------------------------------------------
# the models that Meta published


FAMILIES = {  # (dim, n_layers, vocab_size, rope_factor) -> name; what is left is told from norm_eps
    (4096, 32, 128256, 1): "Llama 3 8B", (8192, 80, 128256, 1): "Llama 3 70B", (4096, 32, 128256, 8): "Llama 3.1 8B",
    (8192, 80, 128256, 8): "Llama 3.1 or 3.3 70B", (16384, 126, 128256, 8): "Llama 3.1 405B",
    (2048, 16, 128256, 32): "Llama 3.2 1B", (3072, 28, 128256, 32): "Llama 3.2 3B",
    (4096, 32, 32000, 1): "7B", (5120, 40, 32000, 1): "13B", (6656, 60, 32000, 1): "30B", (8192, 80, 32000, 1): "65B"}


def published_name(c: LlamaConfig) -> str:
    """The published model of this shape."""
    name = FAMILIES.get((c.dim, c.n_layers, c.vocab_size, int(c.rope_factor)), "none of Meta's")
    if c.vocab_size != 32000 or name not in FAMILIES.values():
        return name
    if c.norm_eps == 1e-6:
        return f"Llama 1 {name}"
    return f"Llama 2 {'70B' if name == '65B' else name}"


def published_tying(config: LlamaConfig) -> LlamaConfig:
    """The config, tied if it is one of Llama 3.2's small ones: their params.json does not say it,
    their weights do."""
    small = (config.vocab_size, config.rope_factor) == (128256, 32)
    return replace(config, tied=config.tied or small)


def max_positions(config: LlamaConfig) -> int:
    """The longest text a Llama reads: 131,072 tokens where RoPE is scaled, else the window it was
    trained on."""
    return 131072 if config.rope_factor > 1 else config.context
