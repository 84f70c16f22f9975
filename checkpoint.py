"""
Raw Llama folders, as Meta publishes them: params.json, consolidated.00.pth, tokenizer.model.

Every checkpoint of this project is one: the dense base, the trained supernet (the full model) and every
export. So whatever reads a raw Llama reads them, and whatever we can read we can make elastic.

Nothing here is ever half-written: a file goes to a temporary name, is fsynced and renamed; a new folder
is filled beside its place and then renamed into it. Nothing here runs code from a file: every load is
weights_only.

Look at one:  python checkpoint.py out/base
"""
import contextlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import torch

from model import Llama, LlamaConfig
from tokenizer import atomic_write, fail

WEIGHTS, PARAMS, TOKENIZER, RESUME = "consolidated.00.pth", "params.json", "tokenizer.model", "resume.pt"

# -----------------------------------------------------------------------------
# params.json


def meta_ffn_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's formula for the MLP width: 2/3 of 4 dim, times the multiplier, rounded up to multiple_of."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def read_config(folder) -> LlamaConfig:
    """params.json -> LlamaConfig. Keys that Meta leaves out get Meta's defaults; vocab_size -1 (Llama 1, 2) is 32000.
    head_dim, ffn_dim, rope_factor and context are keys of our own files and need no formula."""
    path = Path(folder) / PARAMS
    if not path.is_file():
        fail(f"{folder} is no Llama folder: it has no {PARAMS}; expected a raw Llama folder (params.json, "
             f"consolidated.00.pth, tokenizer.model); python train.py makes one in out/base")
    try:
        p = json.loads(path.read_text(encoding="utf-8"))
        p = p.get("model", p)
        listed = lambda v: tuple(v) if isinstance(v, list) else v
        dim, n_layers, n_heads = p["dim"], p["n_layers"], listed(p["n_heads"])
        scaled = 32.0 if (dim, n_layers) in {(2048, 16), (3072, 28)} else 8.0  # Llama 3.2 text, else 3.1 and 3.3
        config = LlamaConfig(
            dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=listed(p.get("n_kv_heads")) or n_heads,
            head_dim=p.get("head_dim") or dim // n_heads,
            ffn_dim=listed(p.get("ffn_dim")) or
            meta_ffn_dim(dim, p.get("ffn_dim_multiplier"), p.get("multiple_of", 256)),
            vocab_size=p["vocab_size"] if p.get("vocab_size", -1) > 0 else 32000,
            norm_eps=p.get("norm_eps", 1e-5), rope_theta=float(p.get("rope_theta", 10000.0)),
            rope_factor=float(p.get("rope_factor", scaled)) if p.get("use_scaled_rope") else 1.0,
            context=p.get("context", 2048))
        sizes = [config.dim, config.n_layers, config.head_dim, config.vocab_size, config.context]
        for name in ("n_heads", "n_kv_heads", "ffn_dim"):
            sizes += config.per_layer(name)
            if len(config.per_layer(name)) != n_layers:
                raise ValueError(f"{name} has {len(config.per_layer(name))} values for {n_layers} layers")
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("a size is not a positive integer")
        if any(h % kv for h, kv in zip(config.per_layer("n_heads"), config.per_layer("n_kv_heads"))):
            raise ValueError(f"{n_heads} query heads do not divide among {config.n_kv_heads} KV heads")
        return config
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        fail(f"{path} is not the params.json of a Llama ({type(error).__name__}: {error}); expected JSON with dim, "
             "n_layers, n_heads, vocab_size; copy it again from its source")


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


# -----------------------------------------------------------------------------
# weights


def load_tensors(path) -> dict:
    """A .pt or .pth file as a dictionary, on the CPU, memory-mapped, running no code of its own."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path} is missing; expected a file written by torch.save; copy it again or make it with python train.py")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        fail(f"{path} wants to run code when it is loaded; expected tensors and plain types only; do not trust it")
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        fail(f"{path} cannot be read, it looks cut short or damaged ({str(error).splitlines()[0][:120]}); "
             f"{path.stat().st_size:,} bytes found; copy it again from its source")


def load_llama(folder, device="cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """A raw Llama folder as a model. Built on the meta device and given the file's tensors, so memory holds the
    weights once. Output and embeddings that are equal (or an output that is missing) make the model tied."""
    config, path = read_config(folder), Path(folder) / WEIGHTS
    if (Path(folder) / "consolidated.01.pth").exists():
        fail(f"{folder} has its weights in several shards; expected {WEIGHTS} alone: Llamas up to 8B come so")
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
        fail(f"{path} holds something else than tensors by name; expected a Llama's state dict in Meta's names")
    state.pop("rope.freqs", None)  # Llama 1 and 2 carry it; it is a function of the shape
    embeddings, output = state.get("tok_embeddings.weight"), state.get("output.weight")
    if embeddings is not None and (output is None or output.data_ptr() == embeddings.data_ptr()
                                   or (output.shape == embeddings.shape and torch.equal(output, embeddings))):
        config = LlamaConfig(**(vars(config) | {"tied": True}))
        state["output.weight"] = embeddings
    with torch.device("meta"):
        model = Llama(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            fail(f"{path} does not fit {PARAMS}: {name} is {found.get(name, 'missing')}, expected "
                 f"{expected.get(name, 'no such tensor')}; the two files must come from one model")
    model.load_state_dict({name: t.to(device, dtype) for name, t in state.items()}, strict=True, assign=True)
    model.tie()
    return model.requires_grad_(True)


def save_tensors(path, state: dict) -> None:
    """torch.save, atomically. Through a file object: given a path it would write the file's name inside."""
    with atomic_write(path) as f:
        torch.save(state, f)


def save_llama(folder, config: LlamaConfig, state: dict, tokenizer=None) -> None:
    """Writes params.json, consolidated.00.pth and, if given, a copy of the tokenizer.model. Tensors are cloned: a
    view would drag the whole tensor it was cut from into the file."""
    folder = Path(folder)
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
    if config.tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]  # stored once
    save_tensors(folder / WEIGHTS, tensors)
    with atomic_write(folder / PARAMS) as f:
        f.write((json.dumps(params_json(config), indent=2) + "\n").encode())
    source = None if tokenizer is None else Path(tokenizer).resolve()
    if source and source.is_file() and source != (folder / TOKENIZER).resolve():
        with atomic_write(folder / TOKENIZER) as f:
            f.write(source.read_bytes())


def resume_state(folder, settings: dict, steps: int, resume: bool, mend="choose another --out") -> dict | None:
    """What resume.pt in `folder` holds, None without one. A run with other settings, or one that has not come to its
    last step and is not to be resumed, is left alone: fail()."""
    path = Path(folder) / RESUME
    if not path.exists():
        return None
    state = load_tensors(path)
    then, now = state["settings"], json.loads(json.dumps(settings))
    keys = sorted(then.keys() | now.keys())
    differ = [f"{k} {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]
    if differ:
        fail(f"{folder} holds a run with other settings: {', '.join(differ)}; {mend}, or delete it")
    if state["step"] < steps and not resume:
        fail(f"{folder} holds a run that stopped at step {state['step']} of {steps}; go on with --resume, or delete it")
    return state


@contextlib.contextmanager
def new_folder(path, may_replace: set[str]):
    """A folder that appears all at once: yields a temporary sibling to fill, then renames it to `path`. A folder
    that is there already is replaced only if it holds nothing but files named in may_replace."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or not {p.name for p in path.iterdir()} <= may_replace):
        fail(f"{path} exists and holds other things; expected a new folder or an earlier one of the same kind; "
             "choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    llama = load_llama(sys.argv[1] if len(sys.argv) > 1 else "out/base")
    total = sum(p.numel() for p in llama.parameters())
    print(json.dumps(params_json(llama.config), indent=2), f"\n{total:,} parameters, tied {llama.config.tied}")
