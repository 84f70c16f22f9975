"""
Hugging Face folders, written without their packages: what transformers, vLLM, llama.cpp's converter
and lm-eval read.

    python export.py --budget 0.5 --format hf

config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json: five
files, four facts worth knowing. Their RoPE pairs channel j with j + head_dim/2, Meta's 2j with 2j
+ 1, so the rows of wq and wk are permuted. A Llama whose heads do not divide its width is refused
by transformers since 5.4; Mistral's class without its sliding window is the same arithmetic and
takes it. There must be no params.json or tokenizer.model beside them: other readers would mistake
the folder for Meta's. And a chat model that is not told all of its stop tokens never stops.
"""
import json
import os
import struct
from pathlib import Path
from typing import Iterable

import tiktoken
import torch

from data.tokenizer import load_tokenizer
from model import LlamaConfig
from plumbing.errors import fail, note
from plumbing.files import atomic_write
from plumbing.params import max_positions

FILES = {"config.json", "generation_config.json", "model*.safetensors*", "tokenizer*.json"}
SHARD_BYTES = 5_000_000_000
DTYPES = {torch.float32: ("float32", "F32"), torch.bfloat16: ("bfloat16", "BF16"),
          torch.float16: ("float16", "F16")}
PAD = "<|finetune_right_pad_id|>"  # Llama 3's token for padding; other tokenizers pad with their first end

# transformers 4.57 and some of 5 warn of a wrong regular expression in every local folder with more
# than 100,000 tokens, unless config.json names a version after the models that had it.
TRANSFORMERS_VERSION = "5.0.0"

# -----------------------------------------------------------------------------
# config.json


def check(config: LlamaConfig, tokenizer: Path, out: Path) -> tiktoken.Encoding | None:
    """Refuses, with fail(), what this format cannot hold. Returns the tokenizer to write with it;
    None, and a note on stderr, where there is none that could be written."""
    if any(isinstance(getattr(config, name), tuple) for name in ("n_heads", "n_kv_heads", "ffn_dim")):
        fail("this Llama has another number of heads or neurons in every layer; --format hf has one number "
             "for all layers, no runtime that reads it could load the rest; "
             "use --format gguf or --format llama")
    if model_class(config) == "mistral" and config.rope_factor != 1:
        note(f"{config.n_heads} heads do not divide {config.dim} channels, so this is a Mistral to "
             "transformers, which ignores a Mistral's scaled RoPE before its version 4.48; "
             "use that or a newer one")
    return readable_tokenizer(config, tokenizer,
                              f"{out} gets no tokenizer: copy that of the original Hugging Face "
                              "model into it")


def readable_tokenizer(config: LlamaConfig, tokenizer: Path, without: str) -> tiktoken.Encoding | None:
    """The tokenizer of a folder; None, and a note on stderr that ends in `without`, where there is
    none that other programs' formats could hold."""
    if not tokenizer.is_file() or tokenizer.read_bytes()[:1] == b"\n":
        note(f"{tokenizer} is missing or a SentencePiece model; {without}")
        return None
    return load_tokenizer(tokenizer, config.vocab_size)


def read_template(path: str) -> str:
    """The text of a chat template, or fail()."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(2, "no such file")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--chat-template {path} cannot be read as text ({error}); expected a Jinja file, such as the "
             "chat_template.jinja of a Hugging Face model")


def with_template(enc: tiktoken.Encoding | None, template: str | None) -> tiktoken.Encoding | None:
    """The tokenizer with this chat template; with its own where template is None."""
    if template is None:
        return enc
    if enc is None:
        fail("--chat-template has no tokenizer to go with; copy both from the original model")
    enc.settings = enc.settings._replace(chat_template=template)
    return enc


def model_class(c: LlamaConfig) -> str:
    """The model_type that transformers takes for this shape: llama, or mistral where the heads do
    not divide the width."""
    return "llama" if c.dim % c.n_heads == 0 else "mistral"


def model_config(c: LlamaConfig, dtype: torch.dtype, bos: int, eos: int) -> dict:
    """config.json. The RoPE settings stand there twice: readers before transformers 5 look for
    rope_theta and rope_scaling, those after it for rope_parameters, and each ignores the
    other's."""
    kind = model_class(c)
    scaling = None
    if c.rope_factor != 1:
        scaling = dict(rope_type="llama3", factor=c.rope_factor, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=8192)
    rope = scaling or dict(rope_type="default")
    config = dict(
        architectures=["LlamaForCausalLM" if kind == "llama" else "MistralForCausalLM"], model_type=kind,
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        vocab_size=c.vocab_size, max_position_embeddings=max_positions(c), rms_norm_eps=c.norm_eps,
        hidden_act="silu", tie_word_embeddings=c.tied, attention_bias=False, mlp_bias=False,
        attention_dropout=0.0, bos_token_id=bos, eos_token_id=eos, torch_dtype=DTYPES[dtype][0],
        initializer_range=0.02, use_cache=True, rope_theta=c.rope_theta, rope_scaling=scaling,
        rope_parameters=rope | dict(rope_theta=c.rope_theta), transformers_version=TRANSFORMERS_VERSION)
    if kind == "mistral":
        config["sliding_window"] = None
    return config


# -----------------------------------------------------------------------------
# weights


NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
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


def write_weights(folder: Path, config: LlamaConfig, weights: Iterable[tuple[str, torch.Tensor]],
                  limit: int = SHARD_BYTES) -> None:
    """model.safetensors, or, above `limit` bytes, as many of them as it takes and an index. Tied:
    stored once. The weights are taken one by one, and memory holds one file of them."""
    files, content, size = [], [], 0  # files: the names in each of those that are written

    def write_file() -> None:
        write_safetensors(folder / f"part-{len(files)}", content)
        files.append([name for name, _ in content])
        content.clear()

    total = 0
    for name, w in weights:
        if config.tied and name == "output.weight":
            continue
        name, w = hf_tensor(name, w, config.head_dim)
        if content and size + w.nbytes > limit:
            write_file()
            size = 0
        # A view would keep all of what it was cut from until the file is written.
        content.append((name, w.clone(memory_format=torch.contiguous_format)))
        size += w.nbytes
        total += w.nbytes
    write_file()

    # How many files there are is known now, and is a part of their names.
    if len(files) == 1:
        os.replace(folder / "part-0", folder / "model.safetensors")
        return
    where = {}
    for i, names in enumerate(files):
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        for name in names:
            where[name] = file
    write_json(folder / "model.safetensors.index.json",
               dict(metadata=dict(total_size=total), weight_map=where))


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


def vocabulary(enc: tiktoken.Encoding) -> dict[str, int]:
    """token -> id, as model.vocab of tokenizer.json has it.

    Special tokens are a list of their own, and get the ids behind the vocabulary, in order. Those
    that lie before or among the other tokens must stand in the vocabulary too."""
    vocab = {spell(token): rank for token, rank in enc._mergeable_ranks.items()}
    last = max(vocab.values())
    for name, i in enc._special_tokens.items():
        if i < last:
            vocab[name] = i
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def tokenizer_json(enc: tiktoken.Encoding) -> dict:
    """tokenizer.json of a tokenizer (of load_tokenizer): the same ids for every text, and BOS in
    front.

    BOS stands in the template, where llama.cpp and lm-eval look for it."""
    name = enc.settings.bos
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    bos = {"id": name, "type_id": 0}
    template = dict(
        type="TemplateProcessing", single=[{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        pair=[{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": bos | dict(type_id=1)}, {"Sequence": {"id": "B", "type_id": 1}}],
        special_tokens={name: dict(id=name, ids=[enc._special_tokens[name]], tokens=[name])})
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    split = dict(type="Split", pattern=dict(Regex=enc._pat_str), behavior="Isolated", invert=False)
    by_id = sorted(enc._special_tokens.items(), key=lambda item: item[1])
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[dict(id=i, content=text) | special for text, i in by_id], normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level | dict(use_regex=False)]),
        post_processor=dict(type="Sequence", processors=[
            byte_level | dict(trim_offsets=False, use_regex=True), template]),
        decoder=byte_level | dict(use_regex=True),
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=True,
                   vocab=vocabulary(enc), merges=merges_of(enc._mergeable_ranks)))


def pad_token(enc: tiktoken.Encoding) -> str:
    """What fills up the shorter texts of a batch."""
    return PAD if PAD in enc._special_tokens else enc.settings.eos[0]


def tokenizer_config(enc: tiktoken.Encoding, config: LlamaConfig) -> dict:
    """tokenizer_config.json.

    model_input_names: transformers 4 would also give the model token_type_ids, which a Llama does
    not take. padding_side: what is generated stands behind the text, so padding stands before it."""
    content = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=enc.settings.bos, eos_token=enc.settings.eos[0],
        pad_token=pad_token(enc), padding_side="left", model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False, model_max_length=max_positions(config))
    if enc.settings.chat_template is not None:
        content["chat_template"] = enc.settings.chat_template
    return content


# -----------------------------------------------------------------------------
# the folder


def write_json(path: Path, content: dict) -> None:
    """Atomically, as UTF-8."""
    with atomic_write(path) as f:
        f.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def save_hf(folder, config: LlamaConfig, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype,
            enc: tiktoken.Encoding | None) -> None:
    """Fills `folder` with a Hugging Face model. weights: Meta's names, and tensors of this dtype, taken
    one by one; enc: its tokenizer, None for a Llama without."""
    folder = Path(folder)
    bos = 1  # without a tokenizer: Llama 1 and 2's
    ends = [2]
    pad = None
    if enc is not None:
        bos = enc._special_tokens[enc.settings.bos]
        ends = [enc._special_tokens[name] for name in enc.settings.eos]
        pad = enc._special_tokens[pad_token(enc)]
    generation = dict(bos_token_id=bos, eos_token_id=ends if len(ends) > 1 else ends[0], do_sample=False,
                      transformers_version=TRANSFORMERS_VERSION)
    if pad is not None:
        generation["pad_token_id"] = pad
    write_json(folder / "config.json", model_config(config, dtype, bos, ends[0]))
    write_json(folder / "generation_config.json", generation)
    write_weights(folder, config, weights)
    if enc is not None:
        write_json(folder / "tokenizer.json", tokenizer_json(enc))
        write_json(folder / "tokenizer_config.json", tokenizer_config(enc, config))
