"""
Do the tests bite? Plants the bugs of bench/bugs.py one at a time and runs the tests that concern
them.

    python -m bench.mutants                      all of them, two at a time
    python -m bench.mutants router.py search     those in these files and folders
    python -m bench.mutants --list               what they are

Every bug goes into a copy of the tree, and pytest stops at the first test that fails: that test has
killed it. A bug that no test of its file sees has SURVIVED, and so one like it may live in the code
today. A run that exceeds the limit is stopped, and the bug is killed by the clock: it made an
endless loop or ranks that wait for each other.

The same tests run first on the copy as it is. Were they to fail there, they would kill everything.
"""
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bench.bugs import BUGS, Bug, files_of_tests
from plumbing.errors import Parser, check_at_least_one, fail, run_main

ROOT = Path(__file__).resolve().parent.parent
SURVIVED = "SURVIVED"
CLOCK = "the clock"

# -----------------------------------------------------------------------------
# one bug


class Result(NamedTuple):
    """What became of a bug."""
    file: str
    bug: Bug
    killer: str     # the test that failed first; SURVIVED; CLOCK
    seconds: float


def copy_of_the_tree(folder) -> Path:
    """The working tree in a new folder, without what is hidden or was made by a run."""
    made = shutil.ignore_patterns(".*", "__pycache__", "out", "*.bin")
    tree = Path(folder) / "tree"
    shutil.copytree(ROOT, tree, ignore=made)
    return tree


def planted(text: str, bug: Bug, file: str) -> str:
    """The text of a file with the bug in it. fail(): the list no longer fits the code."""
    found = text.count(bug.old)
    if found != 1:
        fail(f"{file}: the text of the bug {bug.breaks!r} was found {found} times, expected once; mend its "
             "entry in bench/bugs.py")
    return text.replace(bug.old, bug.new)


def first_failure(tree: Path, tests: list[str], limit: float) -> str | None:
    """Runs test files in a tree until one fails: the name of that test; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return CLOCK
    finally:
        stop_all(process)
    if process.returncode == 0:
        return None
    failure = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
    assert failure, f"pytest ended with status {process.returncode} and names no test:\n{said[-2000:]}"
    return failure[1]


def stop_all(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended
    process.communicate()


def kill(file: str, bug: Bug, tree: Path, limit: float) -> Result:
    """Plants a bug in the tree, looks for a test that sees it, and takes it out again."""
    path = tree / file
    sound = path.read_text()
    start = time.monotonic()
    path.write_text(planted(sound, bug, file))
    try:
        killer = first_failure(tree, files_of_tests(file), limit)
    finally:
        path.write_text(sound)
    return Result(file, bug, killer or SURVIVED, time.monotonic() - start)


# -----------------------------------------------------------------------------
# all of them


def chosen(paths: list[str]) -> list[tuple[str, Bug]]:
    """(file, bug) of the files and folders asked for; of all, if none is."""
    pairs = [(file, bug) for file, bugs in BUGS.items() for bug in bugs]
    if not paths:
        return pairs
    asked = [path.rstrip("/") for path in paths]
    found = [(file, bug) for file, bug in pairs
             if any(file == path or file.startswith(path + "/") for path in asked)]
    if not found:
        fail(f"no bug is in {' '.join(paths)}; expected files or folders of {' '.join(BUGS)}")
    return found


def kill_all(pairs: list[tuple[str, Bug]], jobs: int, limit: float) -> list[Result]:
    """A result per bug, in order; `jobs` at a time, each in a tree of its own."""
    for file, bug in pairs:
        planted((ROOT / file).read_text(), bug, file)

    with tempfile.TemporaryDirectory() as folder:
        trees = queue.SimpleQueue()
        for job in range(jobs):
            trees.put(copy_of_the_tree(Path(folder) / str(job)))

        def work(pair: tuple[str, Bug]) -> Result:
            tree = trees.get()
            try:
                return kill(*pair, tree, limit)
            finally:
                trees.put(tree)

        def sound(test: str) -> None:
            tree = trees.get()
            failed = first_failure(tree, [test], 10 * limit)
            trees.put(tree)
            if failed:
                fail(f"{failed} fails without any bug; expected tests that pass; python -m pytest {test}")

        with ThreadPoolExecutor(jobs) as pool:
            tests = sorted({test for file, _ in pairs for test in files_of_tests(file)})
            list(tqdm(pool.map(sound, tests), "without a bug", len(tests), disable=None))
            return list(tqdm(pool.map(work, pairs), "with a bug", len(pairs), disable=None))


def fate(result: Result) -> str:
    """One cell: which test has killed the bug, or why none did."""
    if result.killer == SURVIVED and result.bug.equivalent:
        return f"nobody can tell: {result.bug.equivalent}"
    return result.killer.removeprefix("tests/").replace(".py::", ": ")


def table(results: list[Result]) -> str:
    """A row per bug."""
    lines = ["| file | what is broken | killed by |", "|---|---|---|"]
    for result in results:
        lines.append(f"| `{result.file}` | {result.bug.breaks} | {fate(result)} |")
    return "\n".join(lines)


def summary(results: list[Result]) -> str:
    """A row per file, and the sums."""
    lines = ["| file | bugs | killed | nobody can tell | survived | tests that killed |",
             "|---|---|---|---|---|---|"]
    for file in [*dict.fromkeys(r.file for r in results), "all"]:
        of_file = [r for r in results if file in (r.file, "all")]
        killers = [r.killer for r in of_file if r.killer != SURVIVED]
        alive = [r for r in of_file if r.killer == SURVIVED]
        equivalent = sum(bool(r.bug.equivalent) for r in alive)
        name = f"`{file}`" if file != "all" else file
        lines.append(f"| {name} | {len(of_file)} | {len(killers)} | {equivalent} | {len(alive) - equivalent} "
                     f"| {len(set(killers))} |")
    return "\n".join(lines)


def main(argv=None) -> None:
    """Prints both tables; exit status 1 if a bug has survived."""
    p = Parser("python -m bench.mutants", __doc__)
    p.add_argument("paths", nargs="*", help="files and folders with bugs, such as router.py search")
    p.add_argument("--jobs", type=int, default=2, help="bugs at a time, one core each")
    p.add_argument("--limit", type=float, default=240, help="seconds for the tests of one bug")
    p.add_argument("--list", action="store_true", help="print the bugs, run nothing")
    args = p.parse_args(argv)
    check_at_least_one(args, "jobs", "limit")
    pairs = chosen(args.paths)
    if args.list:
        for file, bug in pairs:
            print(f"{file}: {bug.breaks}")
        return
    start = time.monotonic()
    results = kill_all(pairs, args.jobs, args.limit)
    print(summary(results), table(results), sep="\n\n")
    print(f"{(time.monotonic() - start) / 60:.0f} minutes with {args.jobs} at a time", file=sys.stderr)
    if any(r.killer == SURVIVED and not r.bug.equivalent for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main, "nothing was written")
