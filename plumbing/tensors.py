"""
Files of tensors, opened: one file, the shards of a raw Llama folder, and what to say where a folder
holds a Llama of another kind.

Every load is memory-mapped and weights_only: nothing here runs code from a file.
"""
import contextlib
import functools
import pickle
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import torch

from plumbing.errors import fail

WEIGHTS = "consolidated.00.pth"
SMALL = 256 << 20  # bytes: a file under it is checked for flipped bits whenever it is opened
POINTER = b"version https://git-lfs"
RAW = "a raw Llama folder (params.json, consolidated.00.pth, tokenizer.model)"

# -----------------------------------------------------------------------------
# one file


def load_tensors(path) -> dict:
    """A .pt or .pth file as a dictionary, on the CPU, memory-mapped, running no code of its own.
    Damaged: fail()."""
    path = Path(path)
    if not path.is_file():
        fail(f"{path} is missing; expected a file written by torch.save; "
             "copy it again or make it with python train.py")
    with open(path, "rb") as file:  # OSError where it may not be read
        if file.read(len(POINTER)) == POINTER:
            fail(f"{path} is a pointer of Git LFS, not the file itself; "
                 "expected tensors: fetch it with git lfs pull")
    stat = path.stat()
    if stat.st_size < SMALL:
        check_intact(path, stat.st_mtime_ns)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} in place of a dictionary")
        return content
    except pickle.UnpicklingError:
        fail(f"{path} wants to run code when it is loaded, or is damaged; expected tensors and plain types "
             "only; do not trust it, copy it again from its source")
    except Exception as error:  # torch's reader has no error of its own: it stumbles
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        fail(f"{path} cannot be read, it looks cut short or damaged ({reason}); {path.stat().st_size:,} "
             "bytes found; copy it again from its source")


@functools.lru_cache(maxsize=None)  # a Llama's file is opened for every layer
def check_intact(path: Path, modified: int) -> None:
    """fail() if a bit of a file of torch.save has flipped since: torch, which maps it, does not look
    at its checksums. About a second for a gigabyte. modified: when."""
    if not zipfile.is_zipfile(path):
        return  # of an old torch, or none of torch's: torch.load tells
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # of a damaged directory of the archive
        part = str(error)[:60]
    if part is not None:
        fail(f"{path} is damaged: {part} does not have the checksum that was saved with it; copy it again "
             "from its source")


@contextlib.contextmanager
def taken_apart(path, expected: str):
    """Around what takes a file of ours apart: a file that holds something else, since it is damaged
    or of another program, ends in one line. expected: what it is, and where it comes from."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError,
            ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0][:100]
        fail(f"{path} is damaged, or of something else ({type(error).__name__}: {reason}); "
             f"expected {expected}")


def load_weights(module: torch.nn.Module, state: dict) -> None:
    """module.load_state_dict(state), for a state of the module's own dtypes. torch would round any
    other without a word, int8 to zeros. ValueError for one."""
    for name, own in module.state_dict().items():
        found = state[name].dtype
        if found != own.dtype:
            raise ValueError(f"{name} is {found}, expected {own.dtype}")
    module.load_state_dict(state, strict=True)


# -----------------------------------------------------------------------------
# the shards of a folder: the parts of a model-parallel run


def shard_paths(folder) -> list[Path]:
    """consolidated.00.pth, consolidated.01.pth ... of a folder; fail() if one is missing in
    between."""
    paths = sorted(Path(folder).glob("consolidated.[0-9][0-9].pth"))
    if not paths:
        refuse_another_kind(folder)
    for i, path in enumerate(paths or [Path(folder) / WEIGHTS]):
        if path.name != f"consolidated.{i:02d}.pth" or not path.is_file():
            fail(f"{folder} has no consolidated.{i:02d}.pth; expected all shards of one Llama from {WEIGHTS} "
                 "on; copy it from its source")
    return paths


def fingerprint(folder) -> str:
    """16 hex digits that two folders share only if they hold the same weights and shape, wherever
    they are. Read from the checksums that torch.save leaves in its files, not from the weights."""
    digest = blake2b(digest_size=8)
    digest.update((Path(folder) / "params.json").read_bytes())
    for path in shard_paths(folder):
        try:
            with zipfile.ZipFile(path) as archive:
                for part in archive.infolist():
                    name = part.filename.partition("/")[2]  # in front of it: the name of the file
                    digest.update(f"{name} {part.file_size} {part.CRC}\n".encode())
        except zipfile.BadZipFile:  # torch before 1.6 wrote no checksums
            with open(path, "rb") as file:
                digest.update(f"{path.stat().st_size}".encode() + file.read(1 << 20))
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# Llamas of another kind


def another_kind(path) -> str | None:
    """What a file or folder is in place of a raw Llama folder, if it is one of the two things that
    people have: a Hugging Face folder (or a file of one), or a GGUF file (or a folder with one)."""
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return "a GGUF file"
    folder = folder_of(path)
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        return "a Hugging Face folder"
    if any(folder.glob("*.gguf")):
        return "a folder with a GGUF file"
    return None


def folder_of(path: Path) -> Path:
    """The folder of a config.json, a tokenizer.json or a model.safetensors; any other path as it
    is."""
    if path.suffix in (".json", ".safetensors") and path.is_file():
        return path.parent
    return path


def how_to_mend(path) -> str:
    """What gives a raw Llama folder in place of a Hugging Face folder or a GGUF file."""
    source = folder_of(Path(path))
    if (source / "original" / "params.json").is_file():  # Meta's own repositories have both
        return f"a raw one is in {source / 'original'}"
    name = source.resolve().name
    if another_kind(source) == "a folder with a GGUF file":
        source = min(source.glob("*.gguf"))
    if source.suffix == ".gguf":
        name = source.stem
    return f"python data/llama.py {source} --out out/{name} makes one of it"


def refuse_another_kind(path) -> NoReturn | None:
    """fail() if `path` is a Llama that only data/llama.py reads. Returns if it is not."""
    kind = another_kind(path)
    if kind:
        fail(f"{path} is {kind}; expected {RAW}; {how_to_mend(path)}")
