"""
Raw Llama folders, as Meta publishes them: params.json, consolidated.00.pth ..., tokenizer.model.

Every checkpoint of this project is one: the dense base, the trained supernet (the full model) and
every export. So whatever reads a raw Llama reads them, and whatever we can read we can make
elastic: Llama 1, 2, 3, 3.1, 3.2 (text) and 3.3, in one file or in the shards of a model-parallel
run.

Nothing here is ever half-written (files.py), and nothing here runs code from a file: every load is
weights_only.
"""
import contextlib
import io
import json
import math
import pickle
import sys
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from data.tokenizer import SETTINGS, TOKENIZER, copy_tokenizer
from model import Llama, LlamaConfig
from plumbing.errors import fail, note
from plumbing.files import atomic_write, is_there
from plumbing.parallel import bar, sum_over_ranks
from plumbing.params import PARAMS, params_json, read_config
from plumbing.rows import ALL, is_split, local, merged, own_rows
from plumbing.tensors import WEIGHTS, load_tensors, shard_paths

RESUME = "resume.pt"  # a folder that has one is a run's (state.py)
LLAMA_FILES = {PARAMS, WEIGHTS, TOKENIZER, SETTINGS}  # what an export in Meta's layout holds
ROUNDING = 1e-2  # a step of bf16 is .4 to .8 %

# -----------------------------------------------------------------------------
# one file of tensors; plumbing/tensors.py opens it


@contextlib.contextmanager
def torch_file(path):
    """Yields a file for torch to write, that appears whole. OSError if the disk is full,
    KeyboardInterrupt after a signal.

    A file object: given a path, torch.save would write the file's name inside."""
    with atomic_write(path) as file:
        try:
            yield file
        except RuntimeError as error:  # torch's writer covers what stopped it with a complaint of its own
            cause = error.__context__
            raise cause if isinstance(cause, (OSError, KeyboardInterrupt)) else error


def save_tensors(path, state: dict) -> None:
    """torch.save, atomically. OSError if the disk is full."""
    with torch_file(path) as file:
        torch.save(state, file)


STORAGES = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage,
            torch.float16: torch.HalfStorage, torch.float64: torch.DoubleStorage}


class Stored(NamedTuple):
    """A tensor that is in a file already: the number of its record there, and what it looks like."""
    record: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def strides(self) -> tuple[int, ...]:
        """Of a contiguous tensor."""
        return tuple(math.prod(self.shape[i + 1:]) for i in range(len(self.shape)))


class Record(NamedTuple):
    """The numbers of a stored tensor, which are no part of a pickle."""
    tensor: Stored


class StoredPickler(pickle.Pickler):
    """Pickles Stored in the way of torch.save, as a tensor around a record."""

    def reducer_override(self, value):
        if not isinstance(value, Stored):
            return NotImplemented
        return torch._utils._rebuild_tensor_v2, (
            Record(value), 0, value.shape, value.strides(), False, OrderedDict())

    def persistent_id(self, value):
        if isinstance(value, Record):
            stored = value.tensor
            return "storage", STORAGES[stored.dtype], stored.record, "cpu", math.prod(stored.shape)


def save_one_by_one(path, tensors, same: dict[str, str]) -> None:
    """save_tensors() for (name, tensor) of which one exists at a time: its numbers are written before
    the next one is asked for.

    same: a name -> the name of the tensor that it is, too. torch.save wants all tensors at once; this
    is its format, by its own writer, with the dictionary behind the numbers."""
    stored = {}
    with torch_file(path) as file, torch.serialization._open_zipfile_writer(file) as writer:
        for name, t in tensors:
            if name in same:
                stored[name] = None  # its place in the dictionary
                continue
            t = compact(t.detach().cpu())
            stored[name] = Stored(str(len(stored)), t.dtype, tuple(t.shape))
            writer.write_record(f"data/{stored[name].record}", t.untyped_storage(), t.nbytes)
        for name, other in same.items():
            stored[name] = stored[other]
        content = io.BytesIO()
        StoredPickler(content, protocol=2).dump(stored)
        for name, record in (("data.pkl", content.getvalue()), ("byteorder", sys.byteorder.encode())):
            writer.write_record(name, record, len(record))


# -----------------------------------------------------------------------------
# shards: the parts of a model-parallel run


def merge_axis(name: str, shard_rows: int, vocab_size: int) -> int | None:
    """The axis along which a tensor was cut into shards; None: every shard has all of it.

    A linear layer is cut along its outputs, or, if its outputs are summed over the shards (wo, w2),
    its inputs. Llama 3 cuts the embeddings by token, Llama 1 and 2, whose shards have a row for
    every token, by channel."""
    if "norm" in name:
        return None
    if name.startswith("tok_embeddings"):
        return 1 if shard_rows == vocab_size else 0
    if name.endswith(("wo.weight", "w2.weight")):
        return 1
    return 0


def same(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Equal, without reading what is one storage anyway. A tensor that is missing is no other."""
    if a is None or a.data_ptr() == b.data_ptr():
        return True
    return a.shape == b.shape and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


def same_but_for_rounding(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """The same as same(), but for about a step of bf16: some of Meta's shards have norms that their
    ranks rounded each in its own way. A number near zero may be off by as much as a middling
    one."""
    if same(a, b):
        return True
    middling = a.float().abs().mean().item()
    return (a.shape == b.shape
            and torch.allclose(a.float(), b.float(), rtol=ROUNDING, atol=ROUNDING * middling))


def check_tensors(path: Path, shard) -> None:
    """A shard is a dictionary of float tensors by name, or fail()."""
    for name, t in shard.items():
        if not isinstance(name, str) or not torch.is_tensor(t):
            fail(f"{path} holds something else than tensors by name ({str(name)[:40]}: {type(t).__name__}); "
                 "expected a Llama's state dict in Meta's names")
        if t.layout != torch.strided or t.device.type != "cpu":
            fail(f"{path}: {name} has no numbers to read ({t.layout}, {t.device}); expected a dense tensor; "
                 "copy the file again from its source")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            fail(f"{path}: {name} is {t.dtype}, a quantised model?; expected float32, bfloat16 or float16; "
                 "take the original weights")


def open_shards(folder, config: LlamaConfig) -> tuple[list[dict], dict[str, int | None], LlamaConfig]:
    """The shards of a folder, memory-mapped and checked; the axis by which each tensor is to be
    merged; and the config, which now knows whether embeddings and output are tied."""
    paths = shard_paths(folder)
    shards = [load_tensors(path) for path in paths]
    for path, shard in zip(paths, shards):
        drop_frequencies_(shard)
        check_tensors(path, shard)
    if all(is_tied(shard) for shard in shards):
        config = replace(config, tied=True)
        for shard in shards:
            shard["output.weight"] = shard["tok_embeddings.weight"]
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}
    names = set(expected)
    for shard in shards:
        names |= set(shard)
    axes = {}
    for name in sorted(names):
        axes[name] = check_tensor(name, paths, shards, expected.get(name), config)
    note_rounding(paths, shards, axes)
    return shards, axes, config


def drop_frequencies_(shard: dict) -> None:
    """In place: without RoPE's frequencies, a function of the shape. Llama 2 has a `rope.freqs`,
    Llama 1 one in every layer."""
    for name in list(shard):
        if str(name).endswith("rope.freqs"):
            del shard[name]


def note_rounding(paths: list[Path], shards: list[dict], axes: dict[str, int | None]) -> None:
    """Says so where shards disagree, by rounding, in what every shard has whole."""
    rounded = []
    for name, axis in axes.items():
        whole = [shard[name] for shard in shards]
        if axis is None and not all(same(part, whole[0]) for part in whole[1:]):
            rounded.append(name)
    if rounded:
        note(f"{len(rounded)} tensors that all shards of {paths[0].parent} have, such as {rounded[0]}, "
             f"differ by rounding; those of {paths[0].name} are taken")


def is_tied(shard: dict) -> bool:
    """Are output and embeddings equal, or is the output missing?"""
    embeddings = shard.get("tok_embeddings.weight")
    return embeddings is not None and same(shard.get("output.weight"), embeddings)


def check_tensor(name: str, paths: list[Path], shards: list[dict], want: tuple | None, config: LlamaConfig):
    """The axis by which a tensor's parts are to be merged, None if there is nothing to merge.
    fail() unless the parts are of one model and, together, have the shape `want`."""
    parts = [shard.get(name) for shard in shards]
    first = parts[0]
    axis = None
    if len(parts) > 1 and first is not None:
        cut_as = "tok_embeddings" if config.tied and name == "output.weight" else name
        axis = merge_axis(cut_as, first.size(0), config.vocab_size)

    # The parts agree in all but the axis; what every shard has whole is equal.
    for path, part in zip(paths[1:], parts[1:]):
        whole_twice = axis is None and part is not None
        if (kind_of(part, axis) != kind_of(first, axis)
                or (whole_twice and not same_but_for_rounding(part, first))):
            fail(f"{path} and {paths[0].name} are of two models: their {name} differ; expected shards of "
                 "one; copy them again from one source")

    found = None if first is None else list(first.shape)
    if axis is not None:
        found[axis] = sum(part.size(axis) for part in parts)
    found = found and tuple(found)
    if found != want:
        n = len(parts)
        in_shards = f" in {n} shards" if n > 1 else ""
        missing = ""
        if axis is not None and want and want[axis] % first.size(axis) == 0:
            missing = f"; {want[axis] // first.size(axis)} shards make one model, {n} are here"
        fail(f"{paths[0]} does not fit {PARAMS}: {name} is {found or 'missing'}{in_shards}, expected "
             f"{want or 'no such tensor'}{missing}; the files must come from one model")
    return axis


def kind_of(part: torch.Tensor | None, axis: int | None):
    """What parts of one tensor have in common: dtype, and the sizes of all axes but the one that
    was cut."""
    if part is None:
        return None
    return (part.dtype, *(size for i, size in enumerate(part.shape) if i != axis))


# -----------------------------------------------------------------------------
# a Llama


def load_llama(folder, device="cpu", dtype: torch.dtype | None = torch.float32) -> Llama:
    """A raw Llama folder as a model; dtype None: as in the file.

    Tensors are read, merged and converted one by one, so memory holds the weights once. Output and
    embeddings that are equal, or an output that is missing, make the model tied. A weight that is
    NaN or infinite: fail()."""
    _, axes, config = open_shards(folder, read_config(folder))
    state = {}
    for name, weight in read_tensors(folder, axes, config):
        check_finite(weight, name, folder)
        state[name] = weight.to(device, dtype or weight.dtype)
    if config.tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    return Llama.from_state(config, state).requires_grad_(True)


def fill_llama_(model: Llama, folder) -> None:
    """Puts the weights of a raw folder of its shape into a model, in the model's dtype. A model that
    is split over ranks (sharding.py) takes its own rows of every tensor, and reads no others."""
    _, axes, config = open_shards(folder, read_config(folder))
    weights = model.state_dict()
    for name, weight in read_tensors(folder, axes, config,
                                     {name: own_rows(t) for name, t in weights.items()}):
        check_finite(weight, name, folder, on_all_ranks=is_split(weights[name]))
        local(weights[name]).copy_(weight)


def read_tensors(folder, axes: dict[str, int | None], config: LlamaConfig,
                 rows: dict[str, slice] | None = None):
    """Yields (name, tensor) of a raw folder, one by one, merged by their axes from its shards.

    rows: which of them, None: all. Where embeddings and output are tied, the embeddings alone."""
    layers = {}  # a layer's prefix -> the names of its tensors
    for name in axes:
        prefix = ".".join(name.split(".")[:2])
        layers.setdefault(prefix, []).append(name)
    for names in bar(layers.values(), f"reading {folder}"):
        shards = [load_tensors(path) for path in shard_paths(folder)]  # anew: what was read of them is let go
        for name in names:
            if config.tied and name == "output.weight":
                continue
            wanted = rows[name] if rows else ALL
            yield name, merged([shard[name] for shard in shards], axes[name], wanted)


def check_finite(weight: torch.Tensor, name: str, folder, on_all_ranks: bool = False) -> None:
    """Every number of a weight is one, or fail(): a loss would still be printed, and be wrong.
    on_all_ranks: each has rows of its own, and all fail() if one does.

    A sum is NaN or infinite if a part of it is, and takes no longer than reading."""
    counts = torch.tensor([0, weight.numel()])
    if not weight.sum(dtype=torch.float32).isfinite():
        counts[0] = weight.numel() - weight.isfinite().sum()
    if on_all_ranks:
        counts = sum_over_ranks(counts)
    bad, all_of_it = counts.tolist()
    if bad:
        fail(f"{folder}: {bad:,} of {all_of_it:,} numbers in {name} are NaN or infinite; its training "
             "diverged, or the file is damaged: copy it again from its source, "
             "or train again with a lower --lr")


def save_llama(folder, config: LlamaConfig, weights, tokenizer=None) -> None:
    """Writes params.json, consolidated.00.pth and, if there is one at this path, a copy of the
    tokenizer.model, with the settings that belong to it.

    weights: a state dict, or an iterator over its (name, tensor), of which one exists at a time."""
    folder = Path(folder)
    if isinstance(weights, dict):
        weights = weights.items()
    same = {"output.weight": "tok_embeddings.weight"} if config.tied else {}  # stored once
    save_one_by_one(folder / WEIGHTS, weights, same)
    with atomic_write(folder / PARAMS) as file:
        file.write((json.dumps(params_json(config), indent=2) + "\n").encode())
    if tokenizer is not None and is_there(tokenizer):
        copy_tokenizer(tokenizer, folder)


def matrix_dtype(model: Llama) -> torch.dtype:
    """The dtype of a Llama: that of most numbers in its matrices. Norms may have another."""
    numbers = Counter()
    for p in model.parameters():
        if p.dim() == 2:
            numbers[p.dtype] += p.numel()
    return numbers.most_common(1)[0][0]


def compact(t: torch.Tensor) -> torch.Tensor:
    """A tensor with a storage of its own: a view would drag the whole one it was cut from into the
    file."""
    if t.untyped_storage().nbytes() == t.nbytes and t.is_contiguous():
        return t
    return t.clone(memory_format=torch.contiguous_format)


def check_target(out, source) -> None:
    """May an export go into the folder `out`? Not into a run, its source, or a Llama from
    elsewhere: fail()."""
    out = Path(out)
    params = out / PARAMS
    ours = not params.is_file() or '"ffn_dim"' in params.read_text()  # Meta's own has no such key
    if (out / RESUME).exists() or not ours or out.resolve() == Path(source).resolve():
        fail(f"{out} is a training run or a Llama from elsewhere; expected a new folder or an earlier "
             "export; choose another --out")
