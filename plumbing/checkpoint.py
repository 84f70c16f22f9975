"""
Raw Llama folders, as Meta publishes them: params.json, consolidated.00.pth ..., tokenizer.model.

Every checkpoint of this project is one: the dense base, the trained supernet (the full model) and every
export. So whatever reads a raw Llama reads them, and whatever we can read we can make elastic: Llama 1, 2, 3,
3.1, 3.2 (text) and 3.3, in one file or in the shards of a model-parallel run.

Nothing here is ever half-written: a file goes to a temporary name, is fsynced and renamed; a new folder
is filled beside its place and then renamed into it. Nothing here runs code from a file: every load is
weights_only.

Look at one, or at a params.json alone:  python checkpoint.py out/base [--verify]
"""
import argparse
import contextlib
import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from model import Llama, LlamaConfig, SubNet
from plumbing.params import PARAMS, family, params_json, published_tying, read_config
from space import Space, n_params
from plumbing.files import atomic_write
from plumbing.errors import fail

WEIGHTS, TOKENIZER, RESUME = "consolidated.00.pth", "tokenizer.model", "resume.pt"

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


def shard_paths(folder) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth ... of a folder, none of them missing in between."""
    paths = sorted(Path(folder).glob("consolidated.[0-9][0-9].pth"))
    for i, path in enumerate(paths or [Path(folder) / WEIGHTS]):
        if path.name != f"consolidated.{i:02d}.pth" or not path.is_file():
            fail(f"{folder} has no consolidated.{i:02d}.pth; expected all shards of one Llama from {WEIGHTS} on; copy "
                 "it from its source")
    return paths


def merge_axis(name: str, shard_rows: int, vocab_size: int) -> int | None:
    """The axis along which a tensor was cut into shards; None: every shard has all of it.

    A linear layer is cut along its outputs, or, if its outputs are summed over the shards (wo, w2), its inputs. Llama 3
    cuts the embeddings by token, Llama 1 and 2, whose shards have a row for every token, by channel."""
    if "norm" in name:
        return None
    if name.startswith("tok_embeddings"):
        return 1 if shard_rows == vocab_size else 0
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def open_shards(folder, config: LlamaConfig) -> tuple[list[dict], dict[str, int | None], LlamaConfig]:
    """The shards of a folder, memory-mapped, checked against its shape and against each other; the axis by which each
    tensor is to be merged; and the config, which now knows whether embeddings and output are tied."""
    paths = shard_paths(folder)
    shards = [load_tensors(path) for path in paths]
    for path, shard in zip(paths, shards):
        if not isinstance(shard, dict) or not all(torch.is_tensor(t) for t in shard.values()):
            fail(f"{path} holds something else than tensors by name; expected a Llama's state dict in Meta's names")
        shard.pop("rope.freqs", None)  # Llama 1 and 2 carry it; it is a function of the shape
        for name, t in shard.items():
            if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                fail(f"{path}: {name} is {t.dtype}, a quantised model?; expected float32, bfloat16 or float16; take "
                     "the original weights")
    if all("tok_embeddings.weight" in shard for shard in shards) and all(
            same(shard.get("output.weight"), shard["tok_embeddings.weight"]) for shard in shards):
        config = replace(config, tied=True)
        for shard in shards:
            shard["output.weight"] = shard["tok_embeddings.weight"]
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}
    axes: dict[str, int | None] = {}
    for name in sorted(expected.keys() | {name for shard in shards for name in shard}):
        parts, want, n = [shard.get(name) for shard in shards], expected.get(name), len(shards)
        first = None if parts[0] is None else tuple(parts[0].shape)
        axis = axes[name] = None if n == 1 or first is None else merge_axis(
            "tok_embeddings" if config.tied and name == "output.weight" else name, first[0], config.vocab_size)
        for path, t in zip(paths[1:], parts[1:]):
            kind = lambda t: None if t is None else (t.dtype, *(d for i, d in enumerate(t.shape) if i != axis))
            if kind(t) != kind(parts[0]) or (axis is None and t is not None and not same(t, parts[0])):
                fail(f"{path} and {paths[0].name} are of two models: their {name} differ; expected shards of one; copy "
                     "them again from one source")
        found = first if axis is None else (*first[:axis], sum(t.size(axis) for t in parts), *first[axis + 1:])
        if found != want:
            missing = (f"; {want[axis] // first[axis]} shards make one model, {n} are here"
                       if axis is not None and want and want[axis] % first[axis] == 0 else "")
            fail(f"{paths[0]} does not fit {PARAMS}: {name} is {found or 'missing'}"
                 f"{f' in {n} shards' if n > 1 else ''}, expected {want or 'no such tensor'}{missing}; the files must "
                 "come from one model")
    return shards, axes, config


def same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Equal, without reading what is one storage anyway. A tensor that is missing is no other."""
    return a is None or a.data_ptr() == b.data_ptr() or (
        a.shape == b.shape and torch.equal(a[:1], b[:1]) and torch.equal(a, b))


def load_llama(folder, device="cpu", dtype: torch.dtype | None = torch.float32) -> Llama:
    """A raw Llama folder as a model; dtype None: as in the file. Built on the meta device and given tensors that are
    read, merged and converted one by one: memory holds the weights once. Output and embeddings that are equal (or an
    output that is missing) make the model tied."""
    axes, config = open_shards(folder, read_config(folder))[1:]
    with torch.device("meta"):
        model = Llama(config)
    state, layer_of = {}, lambda name: ".".join(name.split(".")[:2])
    for layer in dict.fromkeys(map(layer_of, axes)):
        shards = [load_tensors(path) for path in shard_paths(folder)]  # anew: what was read of them is let go
        for name in (name for name in axes if layer_of(name) == layer):
            if config.tied and name == "output.weight":
                continue
            parts = [shard[name] for shard in shards]
            whole = parts[0] if axes[name] is None else torch.cat(parts, dim=axes[name])
            state[name] = whole.to(device, dtype or whole.dtype)
    if config.tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie()
    return model.requires_grad_(True)


def save_tensors(path, state: dict) -> None:
    """torch.save, atomically. Through a file object: given a path it would write the file's name inside. OSError if the
    disk is full."""
    with atomic_write(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as error:  # torch's writer covers what stopped it with a complaint of its own
            raise (error.__context__ if isinstance(error.__context__, OSError) else error)


def save_llama(folder, config: LlamaConfig, state: dict, tokenizer=None) -> None:
    """Writes params.json, consolidated.00.pth and, if given, a copy of the tokenizer.model. Views are cloned: they
    would drag the whole tensor they were cut from into the file."""
    folder = Path(folder)
    alone = lambda t: t if t.untyped_storage().nbytes() == t.nbytes and t.is_contiguous() else t.clone(
        memory_format=torch.contiguous_format)
    tensors = {name: alone(t.detach().cpu()) for name, t in state.items()}
    if config.tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]  # stored once
    save_tensors(folder / WEIGHTS, tensors)
    with atomic_write(folder / PARAMS) as f:
        f.write((json.dumps(params_json(config), indent=2) + "\n").encode())
    source = None if tokenizer is None else Path(tokenizer).resolve()
    if source and source.is_file() and source != (folder / TOKENIZER).resolve():
        with atomic_write(folder / TOKENIZER) as f:
            f.write(source.read_bytes())


def resume_state(folder, settings: dict, steps: int, resume: bool, override=(), mend="choose another --out"):
    """What resume.pt in `folder` holds, None without one. A run with other settings (but those in `override`), or one
    that has not come to its last step and is not to be resumed, is left alone: fail()."""
    path = Path(folder) / RESUME
    for half in Path(folder).glob(".*.tmp") if resume else ():  # of a process that was killed while it wrote
        half.unlink(missing_ok=True)
    if not path.exists():
        return None
    state = load_tensors(path)
    then, now = state["settings"], json.loads(json.dumps(settings))
    keys = sorted(then.keys() | now.keys())
    differ = [f"{k} {then.get(k)} -> {now.get(k)}" for k in keys if then.get(k) != now.get(k)]
    if differ and not {k for k in keys if then.get(k) != now.get(k)} <= set(override):
        fail(f"{folder} holds a run with other settings: {', '.join(differ)}; {mend}, or delete it")
    if state["step"] > steps:
        fail(f"{folder} is at step {state['step']} already, {steps} were asked for; ask for more, or {mend}")
    if state["step"] < steps and not resume:
        fail(f"{folder} holds a run that stopped at step {state['step']} of {steps}; go on with --resume, or delete it")
    return state


@contextlib.contextmanager
def new_folder(path, may_replace: set[str]):
    """A folder that appears all at once: yields a temporary sibling to fill, then renames it to `path`. A folder
    that is there already is replaced only if it holds nothing but files named in may_replace (names or globs)."""
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or not all(
            any(fnmatch(p.name, name) for name in may_replace) for p in path.iterdir())):
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


# -----------------------------------------------------------------------------
# a look at one


def verify(folder) -> None:
    """Compares the md5 of every file with checklist.chk, lines of "md5  name"."""
    path = Path(folder) / "checklist.chk"
    if not path.is_file():
        fail(f"{path} is missing; expected the list of md5 sums that comes with a download; leave --verify out")
    for line in path.read_text().splitlines():
        if len(line.split(maxsplit=1)) < 2:
            fail(f"{path}: found {line[:60]!r}, expected lines of \"md5  name\"; copy it again from its source")
        want, name = line.split(maxsplit=1)
        file = Path(folder) / name.strip().lstrip("*")
        if not file.is_file():
            fail(f"{file} is missing, {path.name} names it; copy it again from its source")
        found = hashlib.md5()
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                found.update(block)
        if found.hexdigest() != want:
            fail(f"{file} has md5 {found.hexdigest()}, {path.name} says {want}; it is damaged: copy it again")


def describe(folder) -> dict[str, str]:
    """What a folder, or a params.json alone, holds: a line per fact."""
    folder = Path(folder).parent if Path(folder).name == PARAMS else Path(folder)
    c, dtype, paths = read_config(folder), "no weights here", sorted(folder.glob("consolidated.*.pth"))
    if paths:
        shards, _, c = open_shards(folder, c)
        dtype = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in shards[0].values()}))
    else:
        c = published_tying(c)
    try:
        costs = Space(c).costs
        slices = f"{len(costs):,} of cost {costs.min():.3f} to {costs.max():.3f}"
    except ValueError as error:
        slices = f"none: {error}"
    spread = lambda v: v if isinstance(v, int) else f"{min(v)} to {max(v)}"
    heads, kv, ffn = spread(c.n_heads), spread(c.n_kv_heads), spread(c.ffn_dim)
    tokenizer = folder / TOKENIZER
    kind = "none" if not tokenizer.is_file() else "SentencePiece" if tokenizer.read_bytes()[:1] == b"\n" else "tiktoken"
    return {"family": family(c), "shape": f"dim {c.dim}, {c.n_layers} layers, {heads} heads of {c.head_dim}, {kv} KV "
            f"heads, ffn {ffn}, vocabulary {c.vocab_size:,}",
            "parameters": f"{n_params(c, SubNet.full(c)):,} without embeddings, "
            f"{n_params(c, SubNet.full(c), embeddings=True):,} in all",
            "dtype": dtype, "shards": str(len(paths)), "tied": "yes" if c.tied else "no", "RoPE": f"theta "
            f"{c.rope_theta:g}, " + ("not scaled" if c.rope_factor == 1 else f"scaled by {c.rope_factor:g}"),
            "tokenizer": kind, "sub-networks": slices}


def main(argv=None) -> None:
    """Prints what a folder holds."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python checkpoint.py --help lists the flags")
    p.add_argument("folder", nargs="?", default="out/base", help="raw Llama folder, or a params.json")
    p.add_argument("--verify", action="store_true", help="compare all files with the md5 sums of checklist.chk")
    args = p.parse_args(argv)
    if args.verify:
        verify(args.folder)
    for key, value in describe(args.folder).items():
        print(f"{key:12} {value}")
    if args.verify:
        print(f"{'md5':12} all as in checklist.chk")


if __name__ == "__main__":
    main()
