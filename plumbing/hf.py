"""
Hugging Face folders, written without their packages: what transformers, vLLM, llama.cpp's converter
and lm-eval read.

    python export.py --budget 0.5 --format hf

config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json: five
files, three facts worth knowing. Their RoPE pairs channel j with j + head_dim/2, Meta's 2j with 2j
+ 1, so the rows of wq and wk are permuted. A Llama whose heads do not divide its width is refused
by transformers since 5.4; Mistral's class without its sliding window is the same arithmetic and
takes it. And there must be no params.json or tokenizer.model beside them: other readers would
mistake the folder for Meta's.
"""
import json
import struct
import sys
from pathlib import Path

import tiktoken
import torch

from data.tokenizer import BOS, END, PATTERN, load_tokenizer
from model import LlamaConfig
from plumbing.errors import fail
from plumbing.files import atomic_write
from plumbing.params import max_positions

FILES = {"config.json", "generation_config.json", "model*.safetensors*", "tokenizer*.json"}
SHARD_BYTES = 5_000_000_000
DTYPES = {torch.float32: ("float32", "F32"), torch.bfloat16: ("bfloat16", "BF16"), torch.float16: ("float16", "F16")}

# -----------------------------------------------------------------------------
# config.json


def check(config: LlamaConfig, tokenizer: Path, out: Path) -> tiktoken.Encoding | None:
    """Refuses, with fail(), what this format cannot hold. Returns the tokenizer to write with it;
    None, and a note on stderr, where there is none that could be written."""
    if any(isinstance(getattr(config, name), tuple) for name in ("n_heads", "n_kv_heads", "ffn_dim")):
        fail("this Llama has another number of heads or neurons in every layer; --format hf has one number for all "
             "layers, no runtime that reads it could load the rest; use --format llama")
    if not tokenizer.is_file() or tokenizer.read_bytes()[:1] == b"\n":
        print(f"note: {tokenizer} is missing or a SentencePiece model; {out} gets no tokenizer: copy that of the "
              "original Hugging Face model into it", file=sys.stderr)
        return None
    return load_tokenizer(tokenizer, config.vocab_size)


def model_config(c: LlamaConfig, dtype: torch.dtype, bos: int, eos: int) -> dict:
    """config.json. The RoPE settings stand there twice: readers before transformers 5 look for
    rope_theta and rope_scaling, those after it for rope_parameters, and each ignores the
    other's."""
    kind = "llama" if c.dim % c.n_heads == 0 else "mistral"
    scaling = None
    if c.rope_factor != 1:
        scaling = dict(rope_type="llama3", factor=c.rope_factor, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=8192)
    rope = scaling or dict(rope_type="default")
    config = dict(
        architectures=["LlamaForCausalLM" if kind == "llama" else "MistralForCausalLM"], model_type=kind,
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, vocab_size=c.vocab_size,
        max_position_embeddings=max_positions(c), rms_norm_eps=c.norm_eps, hidden_act="silu",
        tie_word_embeddings=c.tied, attention_bias=False, mlp_bias=False, attention_dropout=0.0, bos_token_id=bos,
        eos_token_id=eos, torch_dtype=DTYPES[dtype][0], initializer_range=0.02, use_cache=True, rope_theta=c.rope_theta,
        rope_scaling=scaling, rope_parameters=rope | dict(rope_theta=c.rope_theta))
    if kind == "mistral":
        config["sliding_window"] = None
    return config


# -----------------------------------------------------------------------------
# weights


NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
         "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
         "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}
OUTSIDE = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}


def hf_tensor(name: str, w: torch.Tensor, head_dim: int) -> tuple[str, torch.Tensor]:
    """A tensor of Meta's as Hugging Face has it: name, and for wq and wk the rows of a head
    reordered from pairs (2j, 2j + 1) to halves."""
    if name in OUTSIDE:
        return OUTSIDE[name], w
    _, layer, rest = name.split(".", 2)
    rest = rest.removesuffix(".weight")
    if rest in ("attention.wq", "attention.wk"):
        w = w.view(-1, head_dim // 2, 2, w.size(1)).transpose(1, 2).reshape(w.shape)
    return f"model.layers.{layer}.{NAMES[rest]}.weight", w


def write_safetensors(path: Path, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """One .safetensors file: the length of a JSON header, the header, the tensors' bytes one after
    the other."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, w in tensors:
        header[name] = dict(dtype=DTYPES[w.dtype][1], shape=list(w.shape), data_offsets=[end, end + w.nbytes])
        end += w.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, w in tensors:
            f.write(w.contiguous().flatten().view(torch.uint8).numpy().data)


def write_weights(folder: Path, config: LlamaConfig, state: dict, limit: int = SHARD_BYTES) -> None:
    """model.safetensors, or, above `limit` bytes, as many of them as it takes and an index. Tied:
    stored once."""
    tensors = [hf_tensor(name, w, config.head_dim) for name, w in state.items()
               if not (config.tied and name == "output.weight")]
    files = [[]]
    size = 0
    for name, w in tensors:
        if files[-1] and size + w.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append((name, w))
        size += w.nbytes
    if len(files) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    where = {}
    for i, content in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / file, content)
        for name, _ in content:
            where[name] = file
    total = sum(w.nbytes for _, w in tensors)
    write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=total), weight_map=where))


# -----------------------------------------------------------------------------
# tokenizer


def byte_letters() -> list[str]:
    """GPT-2's alphabet: a printable character for every byte; those that print stand for
    themselves."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in prints else chr(next(others)) for b in range(256)]


LETTERS = byte_letters()


def spell(token: bytes) -> str:
    """A token in GPT-2's alphabet."""
    return "".join(LETTERS[b] for b in token)


def merges_of(ranks: dict[bytes, int]) -> list[str]:
    """Every split of a token into two tokens, in the order of the ranks: what merged into it."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in splits if a in ranks and b in ranks]
        known.sort(key=lambda split: (ranks[split[0]], ranks[split[1]]))
        merges += [f"{spell(a)} {spell(b)}" for a, b in known]
    return merges


def tokenizer_json(enc: tiktoken.Encoding) -> dict:
    """tokenizer.json of a tiktoken encoding: the same ids for every text, and BOS in front.

    BOS stands in the template, where llama.cpp and lm-eval look for it."""
    ranks = enc._mergeable_ranks
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bos = {"id": BOS, "type_id": 0}
    template = dict(
        type="TemplateProcessing", single=[{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        pair=[{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": bos | dict(type_id=1)}, {"Sequence": {"id": "B", "type_id": 1}}],
        special_tokens={BOS: dict(id=BOS, ids=[enc._special_tokens[BOS]], tokens=[BOS])})
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    split = dict(type="Split", pattern=dict(Regex=PATTERN), behavior="Isolated", invert=False)
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=text) | special for text, i in enc._special_tokens.items()], normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level | dict(use_regex=False)]),
        post_processor=dict(type="Sequence", processors=[
            byte_level | dict(trim_offsets=False, use_regex=True), template]),
        decoder=byte_level | dict(use_regex=True),
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=True,
                   vocab={spell(token): rank for token, rank in ranks.items()}, merges=merges_of(ranks)))


# -----------------------------------------------------------------------------
# the folder


def write_json(path: Path, content: dict) -> None:
    """Atomically, as UTF-8."""
    with atomic_write(path) as f:
        f.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def save_hf(folder, config: LlamaConfig, state: dict, enc: tiktoken.Encoding | None) -> None:
    """Fills `folder` with a Hugging Face model. state: Meta's names; enc: its tokenizer, None for a
    Llama without."""
    folder = Path(folder)
    dtype = state["norm.weight"].dtype
    special = {} if enc is None else enc._special_tokens
    bos = special.get(BOS, 1)  # without a tokenizer: Llama 1 and 2's
    eos = special.get(END, 2)
    write_json(folder / "config.json", model_config(config, dtype, bos, eos))
    write_json(folder / "generation_config.json", dict(bos_token_id=bos, eos_token_id=eos, do_sample=False))
    write_weights(folder, config, state)
    if enc is not None:
        write_json(folder / "tokenizer.json", tokenizer_json(enc))
        write_json(folder / "tokenizer_config.json", dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=BOS, eos_token=END, clean_up_tokenization_spaces=False,
            model_max_length=max_positions(config)))
