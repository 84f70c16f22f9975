"""
Files of tensors, opened: one file, the shards of a raw Llama folder, and what to say where a folder
holds a Llama of another kind.

Every load is memory-mapped and weights_only: nothing here runs code from a file.
"""
import pickle
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import NoReturn

import torch

from plumbing.errors import fail

WEIGHTS = "consolidated.00.pth"
RAW = "a raw Llama folder (params.json, consolidated.00.pth, tokenizer.model)"

# -----------------------------------------------------------------------------
# one file


def load_tensors(path) -> dict:
    """A .pt or .pth file as a dictionary, on the CPU, memory-mapped, running no code of its own.
    Damaged: fail()."""
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
            fail(f"{folder} has no consolidated.{i:02d}.pth; expected all shards of one Llama from {WEIGHTS} on; copy "
                 "it from its source")
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
