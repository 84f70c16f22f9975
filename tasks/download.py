"""The files of the benchmark tasks, from where their authors put them: https, standard library.

    python data/tasks.py                        # all six -> data/tasks, 920 MB pass through
    python data/tasks.py piqa lambada_openai --out elsewhere

A download that was cut goes on where it stopped. Size and SHA-256 are checked where they are known
(WinoGrande's archive was packed anew more than once). What eval.py reads is kept, archives are not.
Whoever has the files, or Hugging Face's rows as JSON lines, puts them there by hand: see tasks.py.
"""
import argparse
import hashlib
import http.client
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable, Iterator, NamedTuple
from tqdm import tqdm
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.files import atomic_write
from plumbing.errors import fail

class Source(NamedTuple):
    """A file on the net. members: pattern inside the archive -> name here, or folder/, or "" (both
    keep the file's own name); None: the file itself is what we want."""
    url: str
    size: int | None
    sha256: str | None
    members: dict[str, str] | None = None

SWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
AI2 = "https://storage.googleapis.com/ai2-mosaic/public/"
SOURCES = {
    "arc_easy": [Source(
        "https://s3-us-west-2.amazonaws.com/ai2-website/data/ARC-V1-Feb2018.zip", 680841265,
        "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
        {"*/ARC-Easy/ARC-Easy-Test.jsonl": ""})],
    "lambada_openai": [Source(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl", 1819752,
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")],
    "piqa": [Source(
        AI2 + "physicaliqa/physicaliqa-train-dev.zip", 1824009,
        "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
        {"physicaliqa-train-dev/dev.jsonl": "valid.jsonl",
         "physicaliqa-train-dev/dev-labels.lst": "valid-labels.lst"})],
    "winogrande": [Source(AI2 + "winogrande/winogrande_1.1.zip", None, None,
                          {"winogrande_1.1/dev.jsonl": ""})],
    "hellaswag": [
        Source(SWAG + "hellaswag_val.jsonl", 12246618,
               "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
        Source(SWAG + "hellaswag_train.jsonl", 47496131,
               "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d")],
    "mmlu": [Source(
        "https://people.eecs.berkeley.edu/~hendrycks/data.tar", 166184960,
        "bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
        {"data/test/*_test.csv": "test/", "data/dev/*_dev.csv": "dev/"})]}
MEND = "run it again to go on, or put the file there by hand"

# ------------------------------------------------------- one file
def fetch(url: str, part: Path) -> None:
    """Appends to `part` what it lacks of the file at url; what came stays when the line breaks."""
    have, total = part.stat().st_size if part.is_file() else 0, 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            have = have if reply.status == 206 else 0          # 200: all of it, from the start
            total = have + int(reply.headers.get("Content-Length", 0))
            with open(part, "ab" if have else "wb") as file, tqdm(
                    total=total, initial=have, desc=url.rsplit("/")[-1], unit="B", unit_scale=True,
                    disable=None) as bar:
                while block := reply.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:                                  # 416: there is nothing left to ask for
            fail(f"{url}: the server says {error.code} {error.reason}; {MEND}")
    except (OSError, http.client.HTTPException) as error:
        fail(f"{url}: cannot download it ({error}); {part} is kept: {MEND}")
    if part.stat().st_size < total:
        fail(f"{url}: the connection ended early, {part} is kept: {MEND}")

def check(source: Source, part: Path) -> None:
    """Size and hash, where known. A file that is wrong is deleted: going on with it is no use."""
    size = part.stat().st_size
    if source.size is not None and size < source.size:
        fail(f"{part}: {size:,} of {source.size:,} bytes are here: {MEND}")
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if source.size not in (None, size) or source.sha256 not in (None, found):
        part.unlink()
        fail(f"{source.url}: found {size:,} bytes, SHA-256 {found}, expected {source.size} bytes, "
             f"{source.sha256}; it has changed, or came through damaged: {MEND}")

# ------------------------------------------------------- a task
def unpack(archive: Path, kind: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(path, reader of its content) of all files in a .zip or .tar. Writes nothing, so no path in
    an archive can do harm."""
    if kind == ".zip":
        with zipfile.ZipFile(archive) as packed:
            yield from ((name, lambda name=name: packed.read(name)) for name in packed.namelist())
    else:
        with tarfile.open(archive) as packed:
            yield from ((m.name, lambda m=m: packed.extractfile(m).read())
                        for m in packed if m.isfile())

def get(source: Source, folder: Path) -> None:
    """Leaves the files of a source in the folder, whole or not at all."""
    name = source.url.rsplit("/")[-1]
    part, done = folder / f".{name}.part", folder / f".{name}.done"
    if done.exists() or (source.members is None and (folder / name).exists()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    fetch(source.url, part)
    check(source, part)
    if source.members is None:
        part.replace(folder / name)
        return
    found = set()
    try:
        for path, read in unpack(part, Path(name).suffix):
            for pattern, target in source.members.items():
                if fnmatch(path, pattern):
                    target = target + Path(path).name if target.endswith("/") or not target else target
                    with atomic_write(folder / target) as file:
                        file.write(read())
                    found.add(pattern)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        part.unlink()
        fail(f"{source.url}: is no archive that can be read ({error}): {MEND}")
    if found != source.members.keys():
        fail(f"{source.url}: found no {', '.join(source.members.keys() - found)} inside: {MEND}")
    done.touch()
    part.unlink()

def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Downloads the files of the benchmark tasks.")
    parser.error = lambda message: fail(f"{message}: see `python data/tasks.py --help`")
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"default: {' '.join(SOURCES)}")
    parser.add_argument("--out", default="data/tasks", help="a folder a task is made in it")
    args = parser.parse_args(argv)
    for task in args.tasks:
        if task not in SOURCES:
            fail(f"found the task {task!r}, expected one of {' '.join(SOURCES)}")
    for task in args.tasks or SOURCES:
        for source in SOURCES[task]:
            get(source, Path(args.out) / task)
        print(f"{Path(args.out) / task}: complete")

if __name__ == "__main__":
    main()
