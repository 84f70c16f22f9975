"""
params.json <-> LlamaConfig: what Meta's files say of a Llama's shape, what they leave out, and
which Llama it is.

    python -c "from plumbing.params import *; print(published_name(read_config('Llama-3.1-8B')))"

Meta never writes head_dim, the MLP's width, the RoPE factor, tying or the context, and for Llama 1,
2 and Code Llama not even the vocabulary: the first two follow from a formula, the factor and the
context from the model that has this shape, the vocabulary from the weights. Our own files say all
of it.
"""
from dataclasses import replace
from pathlib import Path

import torch

from model import LlamaConfig
from plumbing.errors import fail
from plumbing.files import read_json
from plumbing.tensors import RAW, another_kind, how_to_mend, load_tensors, refuse_another_kind, shard_paths

PARAMS = "params.json"
LARGEST = 100_000_000  # of any size: channels, neurons, tokens, positions
MOST_LAYERS = 1000
# What a Llama still computes something with; published: 1e-6 and 1e-5, 1e4 to 1e6, 8 and 32.
RANGES = dict(norm_eps=(1e-12, 0.1), rope_theta=(1, 1e12), rope_factor=(1, 1e6))
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


FOREIGN = {  # how a key begins that only another architecture has -> what that has
    "vision": "eyes", "quant": "quantised weights", "lora": "LoRA's adapters", "moe": "experts",
    "num_experts": "experts", "n_experts": "experts", "use_qk_norm": "norms on queries and keys",
    "qk_norm": "norms on queries and keys", "sliding_window": "attention to a window",
    "attention_chunk": "attention in chunks", "attn_temperature": "attention of a changing temperature",
    "nope_layer": "layers without positions", "hidden_dim": "Mistral's keys", "ffn_exp": "Llama 4's keys",
    "qkv_bias": "biases", "attention_bias": "biases", "mlp_bias": "biases", "use_bias": "biases",
    "yarn": "another RoPE", "q_lora_rank": "latent attention", "kv_lora_rank": "latent attention"}
LLAMAS_OWN = {"rope_high_freq_factor": 4, "rope_low_freq_factor": 1}  # other values mean another RoPE


def read_config(folder) -> LlamaConfig:
    """params.json -> LlamaConfig; fail() if it is missing, damaged, or of a model that is no plain
    text Llama. What it leaves out is read off the weights, if they are there."""
    path = Path(folder) / PARAMS
    if not path.is_file():
        refuse_another_kind(folder)
        fail(f"{folder} is no Llama folder: it has no {PARAMS}; expected {RAW}; "
             "python train.py makes one in out/base")
    try:
        p = read_json(path)
        p = p.get("model", p)
        check_architecture(path, p)
        if not says_vocabulary(p):
            p = p | told_by_weights(folder, p["dim"])
        config = config_of(p)
        check_shape(config)
        return config
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        fail(f"{path} is not the params.json of a Llama ({type(error).__name__}: {error}); expected JSON "
             "with dim, n_layers, n_heads, vocab_size; copy it again from its source")


def check_architecture(path: Path, p: dict) -> None:
    """fail() if a key says that this is no plain text Llama. A key without a value says nothing."""
    found = []
    for key, value in p.items():
        has = [what for start, what in FOREIGN.items() if key.startswith(start)]
        if has and value:
            found.append(f"{key} ({has[0]})")
        if value and LLAMAS_OWN.get(key, value) != value:
            found.append(f"{key} {value} (another RoPE)")
    if found:
        mend = "take the original weights of a text Llama"
        if another_kind(path.parent):  # Mistral publishes both in one folder
            mend = how_to_mend(path.parent)
        fail(f"{path} has {', '.join(found)}: another architecture; expected a plain text Llama in bf16, "
             f"fp16 or fp32; {mend}")


def says_vocabulary(p: dict) -> bool:
    """Does a params.json say the size of the vocabulary? Llama 1's and 2's say -1, Code Llama's
    nothing."""
    size = given(p, "vocab_size", -1)
    return type(size) is not int or size not in (-1, 0)


def told_by_weights(folder, dim: int) -> dict:
    """What Meta's params.json leaves out and the weights beside it tell; {} without weights.

    vocab_size: the rows of the output, or of the embeddings where there is no output, in all shards
    together. rope_in_layers: has every layer a rope.freqs (Llama 1), or the model (Llama 2)? It is
    not there if neither has."""
    if not any(Path(folder).glob("consolidated.*.pth")):
        return {}
    shards = [load_tensors(path) for path in shard_paths(folder)]
    told = {}
    for name in ("tok_embeddings.weight", "output.weight"):
        shapes = [shard[name].shape for shard in shards if torch.is_tensor(shard.get(name))]
        rows = [shape[0] for shape in shapes if len(shape) == 2]
        if rows and shapes[0][1] == dim:             # cut by token
            told["vocab_size"] = sum(rows)
        elif rows:                                   # cut by channel: every shard has all rows
            told["vocab_size"] = rows[0]
    if "layers.0.attention.inner_attention.rope.freqs" in shards[0]:
        told["rope_in_layers"] = True
    elif "rope.freqs" in shards[0]:
        told["rope_in_layers"] = False
    return told


def config_of(p: dict) -> LlamaConfig:
    """The keys of a params.json as a LlamaConfig. Keys that Meta leaves out get Meta's defaults; a
    vocabulary that nothing tells is Llama 1's and 2's, 32000. head_dim, ffn_dim, rope_factor and
    context are keys of our own files and need no formula; rope_scaling_factor is Meta's newer name
    for the factor."""
    dim = p["dim"]
    n_layers = p["n_layers"]
    n_heads = listed(p["n_heads"])
    n_kv_heads = listed(given(p, "n_kv_heads", n_heads))
    head_dim = p.get("head_dim")
    if head_dim is None:
        head_dim = dim // n_heads
    ffn_dim = listed(p.get("ffn_dim"))
    if ffn_dim is None:
        ffn_dim = meta_ffn_dim(dim, p.get("ffn_dim_multiplier"), given(p, "multiple_of", 256))
    rope_factor = 1.0
    scaled = given(p, "use_scaled_rope", False)
    if type(scaled) is not bool:
        raise ValueError(f"use_scaled_rope is {str(scaled)[:40]}, expected true or false")
    if scaled:
        small = (dim, n_layers) in {(2048, 16), (3072, 28)}  # Llama 3.2 text; else 3.1 and 3.3
        said = p.get("rope_factor")
        if said is None:
            said = p.get("rope_scaling_factor")
        if said is None:
            said = 32.0 if small else 8.0
        rope_factor = number("rope_factor", said)
    context = given(p, "context", published_context(p))
    return LlamaConfig(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        ffn_dim=ffn_dim, vocab_size=p["vocab_size"] if says_vocabulary(p) else 32000,
        norm_eps=number("norm_eps", given(p, "norm_eps", 1e-5)),
        rope_theta=number("rope_theta", given(p, "rope_theta", 10000.0)),
        rope_factor=rope_factor, context=context)


def given(p: dict, key: str, default):
    """A key's value; the default only where it has none. (0 is a value, and a wrong one.)"""
    value = p.get(key)
    return default if value is None else value


def number(name: str, value) -> float:
    """A number of params.json as a float; ValueError for true, and for text that looks like one."""
    if type(value) not in (int, float):
        raise ValueError(f"{name} is {str(value)[:40]}, expected a number")
    return float(value)


def listed(value):
    """JSON's list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def published_context(p: dict) -> int:
    """The window of the model that Meta published with these keys."""
    if p.get("vocab_size") == 128256:
        return 8192
    if p.get("rope_theta") == CODE_THETA:
        return 16384
    return 2048 if is_llama_1(p) else 4096


def is_llama_1(p: dict) -> bool:
    """Llama 1 or 2? norm_eps does not tell them apart: Llama 1's 65B has 1e-5, an early Llama 2
    chat model 1e-6. It decides where neither the shape nor the weights do."""
    dim = p["dim"]
    grouped = p.get("n_kv_heads") not in (None, p["n_heads"])
    if grouped:                              # Llama 2's 70B
        return False
    if dim in (6656, 8192):                  # 30B and 65B; Llama 2 has no such model without KV groups
        return True
    if p.get("rope_in_layers") is not None:  # told_by_weights()
        return p["rope_in_layers"]
    return p.get("norm_eps") == 1e-6


def check_shape(config: LlamaConfig) -> None:
    """ValueError where sizes contradict each other, or a number is none to compute with; where they
    are larger than any machine holds, too."""
    if type(config.n_layers) is not int or not 0 < config.n_layers <= MOST_LAYERS:
        raise ValueError(f"a size of {str(config.n_layers)[:40]}, expected 1 to {MOST_LAYERS:,} layers")
    sizes = [config.dim, config.n_layers, config.head_dim, config.vocab_size, config.context]
    for name in PER_LAYER:
        values = config.per_layer(name)
        if len(values) != config.n_layers:
            raise ValueError(f"{name} has {len(values)} values for {config.n_layers} layers")
        sizes += values
    for size in sizes:
        if type(size) is not int or not 0 < size <= LARGEST:
            raise ValueError(f"a size of {str(size)[:40]}, expected a whole number from 1 to {LARGEST:,}")
    if config.head_dim % 2:
        raise ValueError(f"heads of {config.head_dim} channels cannot be rotated in pairs")
    if any(h % kv for h, kv in zip(config.per_layer("n_heads"), config.per_layer("n_kv_heads"))):
        raise ValueError(f"{config.n_heads} query heads do not divide among {config.n_kv_heads} KV heads")
    for name, (lowest, highest) in RANGES.items():
        value = getattr(config, name)
        if not lowest <= value <= highest:
            raise ValueError(f"{name} is {value}, expected {lowest:g} to {highest:g}")


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


FAMILIES = {  # (dim, n_layers, vocab_size, rope_factor) -> name
    (4096, 32, 128256, 1): "Llama 3 8B", (8192, 80, 128256, 1): "Llama 3 70B",
    (4096, 32, 128256, 8): "Llama 3.1 8B", (8192, 80, 128256, 8): "Llama 3.1 or 3.3 70B",
    (16384, 126, 128256, 8): "Llama 3.1 405B",
    (2048, 16, 128256, 32): "Llama 3.2 1B", (3072, 28, 128256, 32): "Llama 3.2 3B",
    (6656, 60, 32000, 1): "Llama 1 30B"}
LLAMAS_1_AND_2 = {(4096, 32): "7B", (5120, 40): "13B"}  # of one shape in both
CODE_LLAMAS = LLAMAS_1_AND_2 | {(8192, 48): "34B"}
CODE_THETA = 1e6


def published_name(c: LlamaConfig) -> str:
    """The published model of this shape. Which Llama a 7B is, its context says."""
    shape = (c.dim, c.n_layers)
    known = FAMILIES.get((*shape, c.vocab_size, int(c.rope_factor)))
    if known or c.rope_factor != 1 or c.vocab_size not in (32000, 32016):
        return known or "none of Meta's"
    if c.rope_theta == CODE_THETA and shape in CODE_LLAMAS:
        return f"Code Llama {CODE_LLAMAS[shape]}"
    if c.vocab_size == 32000 and shape in LLAMAS_1_AND_2:
        return f"Llama {1 if c.context <= 2048 else 2} {LLAMAS_1_AND_2[shape]}"
    if c.vocab_size == 32000 and shape == (8192, 80):
        return "Llama 1 65B" if c.n_kv_heads == c.n_heads else "Llama 2 70B"
    return "none of Meta's"


def published_tying(config: LlamaConfig) -> LlamaConfig:
    """The config, tied if it is one of Llama 3.2's small ones: their params.json does not say it,
    their weights do."""
    small = (config.vocab_size, config.rope_factor) == (128256, 32)
    return replace(config, tied=config.tied or small)


def max_positions(config: LlamaConfig) -> int:
    """The longest text a Llama reads: 131,072 tokens where RoPE is scaled, else the window it was
    trained on."""
    return 131072 if config.rope_factor > 1 else config.context
