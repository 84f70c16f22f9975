"""
Files and folders that appear whole or not at all.

A file goes to a temporary name, is fsynced and renamed. A new folder is filled beside its place,
then renamed into it. So a reader never sees half of either, and a full disk or a power cut leaves
what was there before.

read_json is for files that others wrote: they may be missing, cut short or something else.
"""
import contextlib
import errno
import glob
import json
import os
import shutil
import signal
from fnmatch import fnmatch
from pathlib import Path

from plumbing.errors import fail
from plumbing.locks import LOCK, locked, remove_if_dead, remove_leftovers, take

DAMAGED = "it is cut short or damaged; copy it again from its source"


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file that appears under `path` only once it is whole and on the disk."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a folder, or a device such as /dev/null, which must stay one
        raise FileExistsError(errno.EEXIST, "it is no file that could be replaced", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: the rename is atomic
    for half in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        remove_if_dead(half)
    try:
        with open(temporary, "wb") as file:
            take(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something was raised
    folder = os.open(path.parent, os.O_RDONLY)  # the name must survive a crash too
    os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def new_folder(path, may_replace: set[str]):
    """Yields a temporary sibling of `path` to fill, then renames it to `path`.

    A folder that is there already is replaced only if it holds nothing but files named in
    may_replace (names or globs); otherwise fail(). One process at a time (locks.py); what killed ones
    left beside it is removed."""
    path = Path(path).resolve()
    if path.exists() and not only_holds(path, may_replace):
        fail(f"{path} exists and holds other things; expected a new folder or an earlier one of the same "
             "kind; choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    with locked(path.with_name(f".{path.name}{LOCK}"), str(path)):
        remove_leftovers(path)
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


def only_holds(folder: Path, names: set[str]) -> bool:
    """Is this a folder in which every file matches one of the names or globs?"""
    return folder.is_dir() and all(
        any(fnmatch(file.name, name) for name in names) for file in folder.iterdir())


@contextlib.contextmanager
def nothing_half_written(what: str):
    """Around a write that is whole or not at all: a full disk, Ctrl-C and SIGTERM end in one line
    that says so."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except OSError as error:
        fail(f"{what} could not be written ({error.strerror or error}); nothing of it was kept; make room, "
             "or choose another --out")
    except KeyboardInterrupt:
        fail(f"{what} was interrupted; nothing of it was kept; run the same command again")
    finally:
        signal.signal(signal.SIGTERM, before)


def check_out(out, **read) -> None:
    """fail() if a program would write into a folder that it reads. read: what it is -> the folder,
    or None."""
    for what, folder in read.items():
        if folder is not None and Path(folder).resolve() == Path(out).resolve():
            fail(f"--out {out} is the {what} that training starts from; choose another --out")


def is_there(path) -> bool:
    """Is there a file of this name? False where there is nothing; a folder, a pipe, or a link that
    leads nowhere (to a disk that is not mounted?): fail(), for nothing was meant by that."""
    path = Path(path)
    if os.path.lexists(path) and not path.is_file():
        what = "a link that leads nowhere" if not path.exists() else "no file"
        fail(f"{path} is {what}; expected a file or nothing; copy it from its source, or remove it")
    return path.is_file()


def read_json(path: Path) -> dict:
    """A file that holds a JSON object, or fail()."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        fail(f"{path} is no file; expected a JSON object in one; copy it from its source")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except FileNotFoundError:
        fail(f"{path} is missing: copy it from its source")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: expected a JSON object, found something else ({error}): {DAMAGED}")
