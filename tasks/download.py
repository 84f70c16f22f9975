"""
The files of the benchmark tasks, from where their authors put them: https, standard library.

    python -m tasks.download                        # all six -> data/tasks, 920 MB pass through
    python -m tasks.download piqa lambada_openai --out elsewhere

A download that was cut goes on where it stopped. Size and SHA-256 are checked where they are known
(WinoGrande's archive was packed anew more than once). The files that eval.py reads are kept, archives
are not. Whoever has the files already, or Hugging Face's rows as JSON lines, puts them there by hand:
questions.py says under which names.
"""
import hashlib
import http.client
import lzma
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from tqdm import tqdm

from plumbing.errors import Parser, fail, run_main
from plumbing.files import atomic_write
from plumbing.locks import one_writer

MEND = "run it again to go on, or put the file there by hand"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
MOST = 1_000_000_000  # bytes of a file whose size is not known, and of one inside an archive
# What zipfile and tarfile raise where an archive is damaged, or packed in a way that they cannot read.
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError,
           ValueError, KeyError, RuntimeError)
AI2 = "https://storage.googleapis.com/ai2-mosaic/public/"


class Source(NamedTuple):
    """A file on the net.

    members: the wanted files of an archive, pattern inside it -> name here. A name that is "" or ends
    in / keeps the file's own. None: the file is no archive, we want the file itself."""
    url: str
    size: int | None  # bytes; None: not known
    sha256: str | None
    members: dict[str, str] | None = None


SOURCES = {
    "arc_easy": [Source(
        url="https://s3-us-west-2.amazonaws.com/ai2-website/data/ARC-V1-Feb2018.zip",
        size=680841265,
        sha256="6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
        members={"*/ARC-Easy/ARC-Easy-Test.jsonl": ""})],
    "lambada_openai": [Source(
        url="https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        size=1819752,
        sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")],
    "piqa": [Source(
        url=AI2 + "physicaliqa/physicaliqa-train-dev.zip",
        size=1824009,
        sha256="54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
        members={"physicaliqa-train-dev/dev.jsonl": "valid.jsonl",
                 "physicaliqa-train-dev/dev-labels.lst": "valid-labels.lst"})],
    "winogrande": [Source(
        url=AI2 + "winogrande/winogrande_1.1.zip",
        size=None,
        sha256=None,
        members={"winogrande_1.1/dev.jsonl": ""})],
    "hellaswag": [
        Source(
            url=HELLASWAG + "hellaswag_val.jsonl",
            size=12246618,
            sha256="0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
        Source(
            url=HELLASWAG + "hellaswag_train.jsonl",
            size=47496131,
            sha256="dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d")],
    "mmlu": [Source(
        url="https://people.eecs.berkeley.edu/~hendrycks/data.tar",
        size=166184960,
        sha256="bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b",
        members={"data/test/*_test.csv": "test/", "data/dev/*_dev.csv": "dev/"})],
}

# -----------------------------------------------------------------------------
# one file


def fetch(url: str, part: Path, most: int) -> None:
    """Appends to `part` what it lacks of the file at url; what came stays when the line breaks.
    More than `most` bytes: fail()."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    total = 0
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            if reply.status != 206:  # 200: all of it, from the start
                have = 0
            total = have + (reply.length or 0)
            receive(reply, part, have, total, url.rsplit("/")[-1], most)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing left to ask for
            fail(f"{url}: the server says {error.code} {error.reason}; {MEND}")
    except (OSError, http.client.HTTPException) as error:
        fail(f"{url}: cannot download it ({error}); {part} is kept: {MEND}")
    if part.stat().st_size > most:
        part.unlink()
        fail(f"{url}: found more than {most:,} bytes, expected no more; it is not the file that was "
             f"published: {MEND}")
    if part.stat().st_size < total:
        fail(f"{url}: the connection ended early, {part} is kept: {MEND}")


def receive(reply, part: Path, have: int, total: int, name: str, most: int) -> None:
    """Writes the rest of `total` bytes behind the first `have` that are in `part`, under a bar. It
    ends when `part` has more than `most`."""
    mode = "ab" if have else "wb"
    with open(part, mode) as file, tqdm(total=total, initial=have, desc=name, unit="B",
                                        unit_scale=True, disable=None) as bar:
        while file.tell() <= most:
            block = reply.read(1 << 16)
            if not block:
                break
            file.write(block)
            bar.update(len(block))


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


# -----------------------------------------------------------------------------
# a task


def unpack(archive: Path, kind: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(path, reader of its content) of all files in a .zip or .tar. ValueError: a file is too large.

    It writes nothing, so no path in an archive can do harm."""
    if kind == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                check_size(member.filename, member.file_size)
                yield member.filename, partial(packed.read, member)
    else:
        with tarfile.open(archive) as packed:
            for member in packed:
                if member.isfile():
                    check_size(member.name, member.size)
                    yield member.name, packed.extractfile(member).read


def check_size(name: str, size: int) -> None:
    """ValueError for a file that would fill memory or disk: nothing of the tasks is that large."""
    if size > MOST:
        raise ValueError(f"{name} would take {size:,} bytes")


def get(source: Source, folder: Path) -> None:
    """Leaves the files of a source in the folder, whole or not at all."""
    name = source.url.rsplit("/")[-1]
    part = folder / f".{name}.part"
    done = folder / f".{name}.done"  # stands for an archive that is no longer here: a line a file of it
    if is_here(source, folder / name, done):
        return
    fetch(source.url, part, source.size or MOST)
    check(source, part)
    if source.members is None:
        part.replace(folder / name)
        return
    # An archive that is of no use is deleted: the next download starts afresh.
    try:
        files = wanted_files(source, part)
    except DAMAGED as error:
        part.unlink()
        fail(f"{source.url}: is no archive that can be read ({error}): {MEND}")
    if files is None:
        part.unlink()
        fail(f"{source.url}: found not all of {', '.join(source.members)} inside: {MEND}")
    for target, content in files.items():
        with atomic_write(folder / target) as file:
            file.write(content)
    with atomic_write(done) as file:
        file.write("\n".join(files).encode())
    part.unlink()


def is_here(source: Source, file: Path, done: Path) -> bool:
    """Are all files of a source here? A mark alone is not enough: files may have been deleted."""
    if source.members is None:
        return file.is_file() and source.size in (None, file.stat().st_size)
    if not done.is_file():
        return False
    names = done.read_text().splitlines()
    return names != [] and all((done.parent / name).is_file() for name in names)


def wanted_files(source: Source, archive: Path) -> dict[str, bytes] | None:
    """The wanted files of an archive, by their names here; None if a pattern matches none."""
    kind = Path(source.url).suffix
    files = {}
    found = set()
    for path, read in unpack(archive, kind):
        for pattern, target in source.members.items():
            if not fnmatch(path, pattern):
                continue
            if target == "" or target.endswith("/"):
                target += Path(path).name
            files[target] = read()
            found.add(pattern)
    return files if found == set(source.members) else None


def main(argv=None) -> None:
    """Downloads some tasks, or all."""
    parser = Parser("python -m tasks.download", __doc__)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"default: {' '.join(SOURCES)}")
    parser.add_argument("--out", default="data/tasks", help="a folder a task is made in it")
    args = parser.parse_args(argv)
    for task in args.tasks:
        if task not in SOURCES:
            fail(f"found the task {task!r}, expected one of {' '.join(SOURCES)}")
    for task in args.tasks or SOURCES:
        folder = Path(args.out) / task
        try:
            with one_writer(folder):
                for source in SOURCES[task]:
                    get(source, folder)
        except OSError as error:
            fail(f"{folder}: {error.strerror or error}; "
                 "make room, or choose another --out; what came is kept")
        print(f"{folder}: complete")


if __name__ == "__main__":
    run_main(main, "what came of a download is kept: the same command goes on")
