"""
One writer per folder: two runs into one place end the second one, in one line.

    with one_writer("out/flex"):        until here ends, or the process does, however it dies
        ...

A lock is a file that the kernel locks for an open descriptor (flock), so a process that is killed
leaves no lock behind, whatever process has its number now. What such a process left half-written
is removed by the next one that writes there.
"""
import contextlib
import errno
import os
import shutil
from pathlib import Path

from plumbing.errors import fail
from plumbing.parallel import RANK

try:
    import fcntl
except ImportError:  # not a Unix: nobody is kept out
    fcntl = None

LOCK = ".lock"
NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some network disks


@contextlib.contextmanager
def one_writer(*folders):
    """The first rank alone writes to these folders, which are made, or fail(). A folder that stays
    empty goes again."""
    with contextlib.ExitStack() as stack:
        for folder in map(Path, folders if RANK == 0 else ()):
            new = not folder.exists()
            make_folder(folder)
            if new:
                stack.callback(remove_if_empty, folder)
            stack.enter_context(locked(folder / LOCK, str(folder)))
            for half in folder.glob(".*.tmp"):  # atomic_write's
                remove_if_dead(half)
        yield


@contextlib.contextmanager
def locked(path: Path, what: str):
    """Holds the lock file `path`, which is removed afterwards; fail() if somebody else does. what:
    the place that it stands for."""
    file = open_locked(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()  # gives the lock back


def without_waiting(path, flags: int) -> int:
    """open()'s opener: a pipe under this name, which nobody reads, is an OSError and not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def open_locked(path: Path, what: str):
    """The lock file, open and locked."""
    while True:
        file = open(path, "a", opener=without_waiting)
        if not take(file):
            file.close()
            fail(f"another process writes to {what}; wait until it ends, or choose another --out")
        # Whoever held it before may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def take(file) -> bool:
    """Locks an open file until it is closed; False if another process, or descriptor, holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    return True


def remove_if_dead(half: Path) -> None:
    """Removes a half-written file that no process is writing. (A writer takes its file.)"""
    with contextlib.suppress(OSError), open(half, "ab", opener=without_waiting) as file:
        if fcntl and take(file):
            half.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """rmdir, where nothing is in the way."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def make_folder(path) -> None:
    """mkdir -p of a folder that can be written to, or fail()."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        fail(f"{path} cannot be made a folder ({error.strerror}); choose another --out")


def remove_leftovers(path: Path) -> None:
    """Removes what dead writers of the folder `path` left beside it, and puts back a folder that one
    had moved aside. For the holder of its lock."""
    olds = sorted(path.parent.glob(f".{path.name}.old-*"))
    if olds and not path.exists():
        os.replace(olds.pop(), path)
    for half in [*olds, *path.parent.glob(f".{path.name}.new-*")]:
        shutil.rmtree(half, ignore_errors=True)
