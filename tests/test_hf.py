"""hf.py: what we write, transformers reads, and computes the same; and a Hugging Face Llama becomes
one of ours."""
import base64
import dataclasses
import json
import os
import random

import pytest
import torch

import export as exporting
import plumbing.hf as hf
from plumbing.checkpoint import load_llama, save_llama, save_tensors
from model import LlamaConfig
from plumbing.params import params_json
from sample import generate
from tests.helpers import (
    GQA,
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
from tests.processes import run
from data.tokenizer import (
    BOS,
    DIGITS_PATTERN,
    END,
    PATTERNS,
    Settings,
    encode_document,
    load_tokenizer,
    save_settings,
    save_tokenizer,
    train_bpe,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
needs_transformers = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("transformers") is None,
    reason="transformers is not installed: pip install -r requirements-interop.txt")

# llama where the heads divide the width, mistral where they do not
READ = {"gqa": GQA, "mha": SHAPES["mha"], "tied": SHAPES["tied"], "rope 8": SHAPES["scaled rope"],
        "rope 32": dataclasses.replace(GQA, rope_factor=32.0), "wide heads": SHAPES["wide heads"],
        "mistral": dataclasses.replace(GQA, dim=50), "mistral tied rope 8": dataclasses.replace(
            GQA, dim=50, tied=True, rope_factor=8.0)}
HARD_TEXT = ["", "def main(argv):\n    return [x for x in argv if x != '']\n",
             "naïve café 漢字かな交じり文 한국어 🤷🏽‍♀️👩‍👩‍👧 ∑∫√",
             "1 12 123 1234 12345 3.14159 0x1F", "a" + " " * 50 + "b\t\t\n\n\n  c   \n",
             "I'm you'Re they'LL it's 'sup", "<|begin_of_text|>x<|eot_id|>",
             "\r\n\r\n  mixed\r line ends\n", "\x00\x7f\u200b\ufeff", "aaaa" * 40]


def written(folder, config: LlamaConfig, dtype=torch.float32):
    """A random Llama as a Hugging Face folder, with a tokenizer of its vocabulary (560)."""
    model = random_llama(dataclasses.replace(config, vocab_size=560))
    text = "".join(HARD_TEXT) + "the cat sat on the mat and the dog ate the cake" * 3
    save_tokenizer(folder.parent / "tokenizer.model", train_bpe([text], 560))
    enc = load_tokenizer(folder.parent / "tokenizer.model")
    weights = ((name, w.detach().to(dtype)) for name, w in model.state_dict().items())
    hf.save_hf(folder, model.config, weights, dtype, enc)
    return model, enc


def their_llama(folder):
    """A folder as transformers loads it, in the dtype of its files (the keyword has had two names)."""
    import transformers
    keyword = "torch_dtype" if transformers.__version__ < "4.56" else "dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{keyword: "auto"}).eval()


@needs_transformers
@pytest.mark.parametrize("shape", READ)
def test_transformers_computes_the_same(tmp_path, shape):
    """Catches rows of wq and wk in Meta's order, a RoPE factor that only some readers see, a tied
    head left random, a width that heads do not divide and is refused: logits to 1e-4, and the
    greedy text."""
    model, _ = written(tmp_path / "hf", READ[shape])
    theirs = their_llama(tmp_path / "hf")
    assert type(theirs).__name__ == ("MistralForCausalLM" if "mistral" in shape else "LlamaForCausalLM")
    tokens = tokens_for(model.config, 3, 31)
    with torch.no_grad():
        assert close(theirs(tokens).logits, model(tokens)[0], 1e-4)
    prompt = tokens[:1, :5]
    said = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
                           eos_token_id=None, pad_token_id=0)
    assert said[0, 5:].tolist() == list(generate(model, prompt[0].tolist(), 20, temperature=0))


@needs_transformers
def test_assisted_generation_takes_our_pair(tmp_path):
    """Catches two exports that transformers does not take together, a window or a vocabulary
    of their own, and a text that is not the larger one's: greedy, with the smaller one as
    the assistant."""
    model, router = make_supernet(tmp_path / "flex", dataclasses.replace(GQA, context=64))
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "1.0", "0.5", "--format", "hf"])
    target, draft = their_llama(tmp_path / "flex-1.00-hf"), their_llama(tmp_path / "flex-0.50-hf")
    asked = []
    forward = draft.forward
    draft.forward = lambda *args, **how: asked.append(1) or forward(*args, **how)
    prompt = tokens_for(model.config, 1, 5)
    said = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
                           eos_token_id=None, pad_token_id=0, assistant_model=draft)
    assert said[0, 5:].tolist() == list(generate(model, prompt[0].tolist(), 40, temperature=0))
    assert len(asked) > 10, "nobody drafted"


# What a user does first. Prints what it got; what goes to stderr is a warning.
SNIPPET = """
import json, sys
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
transformers.utils.logging.disable_progress_bar()
folder, short, long = sys.argv[1:]
tok = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
one = tok(short, return_tensors="pt")
alone = model.generate(**one, max_new_tokens=6, do_sample=False)
batch = tok([short, long], return_tensors="pt", padding=True)
together = model.generate(**batch, max_new_tokens=6, do_sample=False)
writer = pipeline("text-generation", model=folder)
texts = [said[0]["generated_text"] for said in writer([short, long], max_new_tokens=6, batch_size=2)]
chat = None
if tok.chat_template:
    chat = tok.apply_chat_template([dict(role="user", content="hi")], tokenize=False)
print(json.dumps(dict(
    prompt=one["input_ids"][0].tolist(), new=alone[0, one["input_ids"].size(1):].tolist(),
    new_in_batch=together[0, batch["input_ids"].size(1):].tolist(), texts=texts, chat=chat,
    stops=model.generation_config.eos_token_id, pad=tok.pad_token, length=len(tok))))
"""
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def random_ranks(n: int) -> list[bytes]:
    """A table of n tokens: the bytes, then random pairs of what is there."""
    rng = random.Random(0)
    table = dict.fromkeys(bytes([b]) for b in range(256))
    tokens = list(table)
    while len(tokens) < n:
        token = rng.choice(tokens) + rng.choice(tokens[:256])
        if len(token) <= 6 and token not in table:
            table[token] = None
            tokens.append(token)
    return tokens


def usual(folder) -> dict:
    """The snippet's answer. It must say nothing on stderr; transformers 4 names the device there."""
    done = run("-c", SNIPPET, folder, "the cat sat", "a dog ran after the cat and a rat", HF_HUB_OFFLINE="1",
               TOKENIZERS_PARALLELISM="false")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.replace("Device set to use cpu\n", "") == "", done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_transformers
@pytest.mark.parametrize("kind", ["llama", "mistral", "large vocabulary", "specials of its own"])
def test_the_usual_snippet_without_a_warning(tmp_path, kind, capsys):
    """Catches token_type_ids that generate() refuses, a pad token that is guessed, padding behind a
    text that is to go on, the false alarm of a wrong regular expression (it takes 100,000 tokens),
    a stop token left out, a template that does not travel."""
    config = dataclasses.replace(GQA, dim=50 if kind == "mistral" else 48, rope_factor=8.0)
    folder = tmp_path / "raw"
    ranks = random_ranks(100_100 if kind == "large vocabulary" else 304)
    config = dataclasses.replace(config, vocab_size=len(ranks) + 256)
    model = random_llama(config)
    save_llama(folder, config, model.state_dict())
    save_tokenizer(folder / "tokenizer.model", ranks)
    names = [END, "<|eom_id|>", "<|eot_id|>"]
    pad = "<|finetune_right_pad_id|>"
    if kind == "specials of its own":
        names = with_settings(folder, ranks)
        pad = names[0]
    exporting.main(["--model", str(folder), "--format", "hf", "--out", str(tmp_path / "hf")])
    assert ("4.48" in capsys.readouterr().err) == (kind == "mistral")
    said, enc = usual(tmp_path / "hf"), load_tokenizer(folder / "tokenizer.model")
    prompt = encode_document(enc, "the cat sat").tolist()
    stops = [enc._special_tokens[name] for name in names]
    want = list(generate(model, prompt, 6, temperature=0))
    ends = [i + 1 for i, token in enumerate(want) if token in stops]
    want = want[:min(ends, default=6)]
    assert said["prompt"] == prompt and said["stops"] == stops and said["pad"] == pad
    assert said["new"] == want and said["new_in_batch"][:len(want)] == want
    assert said["length"] == config.vocab_size and all(said["texts"])
    assert said["chat"] == ("<|one|><user>hi<|two|>" if kind == "specials of its own" else None)


def with_settings(folder, ranks: list[bytes], pattern: str = DIGITS_PATTERN) -> list[str]:
    """Another pattern, special tokens in front of the ranks and behind them, a template. Returns
    the stop tokens."""
    special = {"<|zero|>": 0, "<|one|>": 1, "<|two|>": 2}
    special |= {f"<|behind{i}|>": 3 + len(ranks) + i for i in range(253)}
    lines = [f"{base64.b64encode(token).decode()} {3 + rank}" for rank, token in enumerate(ranks)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    stops = ["<|two|>", "<|behind7|>"]
    save_settings(folder / "tokenizer_settings.json", Settings(pattern, special, "<|one|>", stops, TEMPLATE))
    return stops


@needs_transformers
@pytest.mark.parametrize("name", PATTERNS)
def test_ids_of_other_tokenizers(tmp_path, name):
    """Catches Llama 3's pattern or BOS for a tokenizer that has its own, and special tokens that
    get other ids because they lie in front of the ranks."""
    from transformers import AutoTokenizer
    config = dataclasses.replace(GQA, vocab_size=560)
    save_llama(tmp_path / "raw", config, random_llama(config).state_dict())
    text = "".join(HARD_TEXT) + "the cat sat on the mat and the dog ate the cake" * 3
    with_settings(tmp_path / "raw", train_bpe([text], 560), PATTERNS[name])
    exporting.main(["--model", str(tmp_path / "raw"), "--format", "hf", "--out", str(tmp_path / "hf")])
    theirs, enc = (AutoTokenizer.from_pretrained(tmp_path / "hf"),
                   load_tokenizer(tmp_path / "raw/tokenizer.model"))
    for text in HARD_TEXT:
        assert theirs.encode(text) == encode_document(enc, text).tolist() or "<|" in text, text
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    for special, i in enc._special_tokens.items():
        assert (theirs.convert_tokens_to_ids(special) == i
                and theirs.encode(special, add_special_tokens=False) == [i])


def test_chat_templates(tmp_path, capsys):
    """Catches a template of the command line that loses to the tokenizer's own, and one with no
    tokenizer beside it."""
    make_supernet(tmp_path / "flex", GQA)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    argv = ["--model", str(tmp_path / "flex"), "--budget", "0.6", "--format", "hf",
            "--out", str(tmp_path / "hf")]
    exporting.main(argv)
    assert "chat_template" not in json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    exporting.main([*argv, "--chat-template", str(tmp_path / "chat.jinja")])
    assert json.loads((tmp_path / "hf/tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    before = files_of(tmp_path / "hf")
    (tmp_path / "flex/tokenizer.model").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        exporting.main([*argv, "--chat-template", str(tmp_path / "chat.jinja")])
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and error.startswith("error: --chat-template") and "tokenizer" in error
    assert files_of(tmp_path / "hf") == before


@needs_transformers
def test_long_positions(tmp_path):
    """Catches scaled RoPE that agrees on the first positions only: one head, positions up to 9,000."""
    config = dataclasses.replace(GQA, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, rope_factor=8.0)
    model, _ = written(tmp_path / "hf", config)
    theirs = their_llama(tmp_path / "hf")
    tokens = tokens_for(model.config, 1, 9000)
    with torch.no_grad():
        assert close(theirs(tokens).logits[:, -50:], model(tokens)[0][:, -50:], 1e-3)


@needs_transformers
def test_token_ids_are_tiktokens(tmp_path):
    """Catches merges in another order, another pattern, special tokens read out of a text, a BOS
    that is not added."""
    from transformers import AutoTokenizer
    _, enc = written(tmp_path / "hf", GQA)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in HARD_TEXT:
        if "<|" in text:  # they read special tokens in a text, on purpose: chat templates need it
            want = enc.encode(text, allowed_special="all")
        else:
            want = enc.encode(text, disallowed_special=())
            assert [enc._special_tokens[BOS], *want] == encode_document(enc, text).tolist()
        assert theirs.encode(text) == [enc._special_tokens[BOS], *want], text
        assert theirs.decode(theirs.encode(text, add_special_tokens=False)) == text
    assert (theirs.bos_token, theirs.eos_token) == (BOS, END) and len(theirs) == enc.n_vocab == 560


@needs_transformers
@pytest.mark.parametrize("shape", ["gqa", "tied", "mha"])
def test_an_export_is_the_supernet(tmp_path, shape):
    """Invariant 2, the independent reader. Catches modulation that is not folded into what others read."""
    model, router = make_supernet(tmp_path / "flex", SHAPES[shape])
    for budget in (1.0, 0.6):
        out, subnet = export_at(tmp_path / "flex", budget, format="hf")
        assert out == tmp_path / f"flex-{budget:.2f}-hf"
        theirs, tokens = their_llama(out), tokens_for(model.config)
        with torch.no_grad():
            want = model(tokens, subnet=subnet, factors=deployed(router, budget)[1])[0]
            assert close(theirs(tokens).logits, want, 1e-4)


@needs_transformers
def test_shards_and_dtypes(tmp_path, monkeypatch):
    """Catches an index that names the wrong file, and bf16 written as something else."""
    monkeypatch.setattr(hf.write_weights, "__defaults__", (20_000,))
    model, _ = written(tmp_path / "hf", SHAPES["tied"], torch.bfloat16)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "hf").glob("*.safetensors")}
    assert (set(index["weight_map"].values()) == files and len(files) > 3
            and "lm_head.weight" not in index["weight_map"])
    theirs = their_llama(tmp_path / "hf")
    state = theirs.state_dict()
    assert state["lm_head.weight"].dtype == torch.bfloat16
    for name, w in model.state_dict().items():
        name, w = hf.hf_tensor(name, w.detach().bfloat16(), 8)
        assert torch.equal(state[name], w), name


# -----------------------------------------------------------------------------
# without transformers


def their_logits(folder, tokens: torch.Tensor) -> torch.Tensor:
    """Their Llama from the description in transformers' modeling_llama.py, in float64: rotated
    halves, Llama 3's scaling by wavelength, everything as config.json says it. Both ways to say
    RoPE must agree."""
    c = json.loads((folder / "config.json").read_text())
    w = {name: t.double() for name, t in read_safetensors(folder / "model.safetensors").items()}
    assert c["sliding_window"] is None if c["model_type"] == "mistral" else "sliding_window" not in c
    H, K, d, T = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], tokens.size(1)
    rope, old = c["rope_parameters"], c["rope_scaling"]
    assert (rope["rope_theta"] == c["rope_theta"]
            and (old or dict(rope_type="default")).items() <= rope.items())

    f = rope["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        waves = rope["original_max_position_embeddings"] * f / (2 * torch.pi)
        smooth = (waves - low) / (high - low)
        blend = (1 - smooth) * f / rope["factor"] + smooth * f
        f = torch.where(waves < low, f / rope["factor"], torch.where(waves > high, f, blend))
    angles = torch.outer(torch.arange(T).double(), f).repeat(1, 2)  # T, d: both halves

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * weight

    def turn(x):
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))  # B, heads, T, d
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        scores = turn(q) @ turn(k).transpose(2, 3) / d ** 0.5
        scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        y = (torch.nn.functional.silu(h @ w[p + "mlp.gate_proj.weight"].T)
             * (h @ w[p + "mlp.up_proj.weight"].T))
        x = x + y @ w[p + "mlp.down_proj.weight"].T
    assert ("lm_head.weight" in w) != c["tie_word_embeddings"]
    output = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ output.T


@pytest.mark.parametrize("shape", READ)
def test_their_arithmetic_gives_the_same(tmp_path, shape):
    """Catches rows of wq or wk in Meta's order, tensors under each other's names, and a number of
    config.json that is not the model's: RoPE's theta, factor and limits, norm_eps, KV heads, the
    tie, Mistral's window, the end of a text."""
    # odd; scaled RoPE needs waves as long as its limits
    theta = 3000.0 if READ[shape].rope_factor == 1 else 5e5
    model, enc = written(tmp_path / "hf", dataclasses.replace(READ[shape], norm_eps=2e-2, rope_theta=theta))
    tokens = tokens_for(model.config, 2, 300)
    assert close(model(tokens)[0].double(), their_logits(tmp_path / "hf", tokens), 1e-4)
    c, g = (json.loads((tmp_path / "hf" / name).read_text())
            for name in ("config.json", "generation_config.json"))
    for said in (c, g):
        assert said["bos_token_id"] == enc._special_tokens[BOS] and said["transformers_version"] == "5.0.0"
    assert c["eos_token_id"] == enc._special_tokens[END]
    assert g["eos_token_id"] == [enc._special_tokens[name] for name in (END, "<|eom_id|>", "<|eot_id|>")]
    assert g["pad_token_id"] == enc._special_tokens["<|finetune_right_pad_id|>"]
    assert c["model_type"] == ("mistral" if "mistral" in shape else "llama")
    assert c["vocab_size"] == 560 and c["intermediate_size"] == 80 and c["hidden_size"] == model.config.dim
    assert c["max_position_embeddings"] == (32 if READ[shape].rope_factor == 1 else 131072)


def read_safetensors(path) -> dict:
    """The format, read from its description."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + n]), data[8 + n:]
    assert n % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    ends = sorted(tuple(h["data_offsets"]) for h in header.values())
    assert (ends[0][0] == 0 and ends[-1][1] == len(body)
            and all(a[1] == b[0] for a, b in zip(ends, ends[1:]))), "holes"
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return {name: torch.frombuffer(bytearray(body[slice(*h["data_offsets"])]),
                                   dtype=kinds[h["dtype"]]).view(h["shape"])
            for name, h in header.items()}


@pytest.mark.parametrize("dtype", hf.DTYPES)
def test_safetensors_as_described(tmp_path, dtype):
    """Catches holes, offsets that overlap, a header of odd length, bytes of another dtype."""
    model, _ = written(tmp_path / "hf", SHAPES["tied"], dtype)
    found = read_safetensors(tmp_path / "hf/model.safetensors")
    want = dict(hf.hf_tensor(k, v.detach().to(dtype), 8) for k, v in model.state_dict().items())
    assert found.keys() == want.keys() - {"lm_head.weight"}
    assert all(torch.equal(w, want[name]) and w.dtype == dtype for name, w in found.items())


def test_names_no_folder_of_metas(tmp_path):
    """Catches params.json or tokenizer.model in a Hugging Face folder: vLLM and llama.cpp would
    misread it."""
    make_supernet(tmp_path / "flex", GQA)
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.6", "--format", "hf"])
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json"}
    before = files_of(tmp_path / "flex-0.60-hf")
    assert set(before) == names
    # over its own kind
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.6", "--format", "hf"])
    assert files_of(tmp_path / "flex-0.60-hf") == before


def test_another_shape_in_every_layer_is_refused(tmp_path, capsys):
    """Catches a heterogeneous slice written with the first layer's sizes for all; our own format takes it."""
    config = dataclasses.replace(GQA, n_heads=(8, 2, 6, 4), n_kv_heads=(2, 2, 1, 2), ffn_dim=(80, 13, 41, 7))
    save_llama(tmp_path / "uneven", config, random_llama(config).state_dict())
    with one_line_error(capsys, "every layer", "--format llama"):
        export_at(tmp_path / "uneven", format="hf", out=tmp_path / "hf")
    out, *_ = export_at(tmp_path / "uneven", out=tmp_path / "raw")
    assert {p.name for p in tmp_path.iterdir()} == {"uneven", "raw"} and load_llama(out).config == config


# -----------------------------------------------------------------------------
# the other way: a Hugging Face Llama, cut into Meta's shards


def meta_state(state: dict, config: LlamaConfig) -> dict:
    """Hugging Face names and halves -> Meta's names and pairs, row by row, the slow and obvious way."""
    theirs = {v: k for k, v in hf.NAMES.items()}
    outside = {v: k for k, v in hf.OUTSIDE.items()}
    out = {}
    for name, w in state.items():
        if name in outside:
            out[outside[name]] = w
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        rest = theirs[rest.removesuffix(".weight")]
        if rest in ("attention.wq", "attention.wk"):
            half, rows = config.head_dim // 2, torch.empty_like(w)
            for i in range(len(w)):
                head, j = divmod(i, config.head_dim)
                rows[head * config.head_dim + (2 * j if j < half else 2 * (j - half) + 1)] = w[i]
            w = rows
        out[f"layers.{layer}.{rest}.weight"] = w
    return out


def write_shards(folder, config: LlamaConfig, state: dict, n: int, llama2: bool) -> None:
    """Cuts a state dict as Meta's model-parallel code does: outputs, or inputs for wo and w2; Llama
    3's embeddings by token, Llama 2's by channel."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params_json(config)))
    for i in range(n):
        part = {}
        for name, w in state.items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) or (llama2 and "tok_emb" in name) else 0
            part[name] = w if "norm" in name else w.chunk(n, axis)[i].clone()
        if llama2:
            part["rope.freqs"] = torch.ones(4)
        save_tensors(folder / f"consolidated.{i:02d}.pth", part)


@needs_transformers
@pytest.mark.parametrize("n,llama2", [(1, False), (2, True), (2, False), (8, True), (8, False)])
def test_a_hugging_face_llama_becomes_ours(tmp_path, n, llama2):
    """Catches shards merged along the wrong axis, and RoPE rows permuted twice or not at all."""
    from transformers import LlamaConfig as TheirConfig, LlamaForCausalLM
    config = LlamaConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=8, ffn_dim=96, vocab_size=104,
                         rope_theta=10000.0)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(TheirConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=96, vocab_size=104, rms_norm_eps=1e-5, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) / p.size(-1) ** 0.5 + (0.7 if p.dim() == 1 else 0))
    state = {k: v for k, v in theirs.state_dict().items() if "rotary" not in k}
    write_shards(tmp_path / "raw", config, meta_state(state, config), n, llama2)
    model, tokens = load_llama(tmp_path / "raw"), tokens_for(config, 2, 40)
    with torch.no_grad():
        assert close(model(tokens)[0], theirs(tokens).logits, 1e-4)
