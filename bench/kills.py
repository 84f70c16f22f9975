"""
Does a killed program end as one that nobody touched?

    python -m bench.kills                               30 kills of each program: an hour on one core
    python -m bench.kills --kills 5 --programs train    some of one
    python -m bench.kills --signal int                  Ctrl-C in place of kill -9; term: SIGTERM

Every program runs once undisturbed, in the small world of fuzz.py. Then it runs in a fresh copy of that
world, kill -9 ends it at a random moment, and the command that mends it runs to its end: the same one,
with --resume where there is one. What counts as a fault:

    differs      a file is not, bit for bit, what it is after the undisturbed run (a .pt file: its
                 contents, for a pickle also remembers which of two equal texts are one object)
    left behind  a file is there that is not there after the undisturbed run, or one is missing
    half         something that appears all at once was there after the kill, and was not whole
    failed       the command that mends it did not end with status 0, or printed something else
    badly        it was Ctrl-C or SIGTERM, and the program did not end with a line that says what is
                 kept, and status 130, 143 or 2

Times are never the same: of latency.json all but the times is compared. The moments are drawn within
what the undisturbed run took; a run that ends before its moment was not killed, and is drawn again.
"""
import contextlib
import functools
import importlib.util
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

import train
from bench import fuzz
from model import LlamaConfig
from plumbing.errors import Parser, check_at_least_one, check_range, fail, run_main
from plumbing.state import LOG

DIFFERS, LEFT, HALF, FAILED, BADLY = "differs", "left behind", "half", "failed", "badly"
FAULTS = (DIFFERS, LEFT, HALF, FAILED, BADLY)
SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}
LAST_WORDS = ("interrupted: ", "error: ", "stopped at step ")  # how the last line begins, after a signal
TIMES = {"fixed", "layer", "heads", "neurons", "full_ms", "rounds"}  # in latency.json

# -----------------------------------------------------------------------------
# the programs


class Program(NamedTuple):
    """A command. mend: what is added to it after a kill. out: what it makes; whole: all at once?"""
    command: str
    mend: str
    out: str
    whole: bool


SAVES = "--save-every 2 --log-every 1"
PROGRAMS = {
    "train": Program(f"train --data data --base-steps 4 --steps 4 --eval-every 3 --budgets 1.0 0.6 {SAVES} "
                     f"{fuzz.TINY} --out new/flex", "--resume", "new", False),
    "train --llama": Program("train --llama llama --data data --steps 6 --eval-every 4 --budgets 1.0 0.6 "
                             f"{SAVES} {fuzz.TINY} --out new", "--resume", "new", False),
    "prepare": Program("data.prepare --input text --vocab-size 600 --shard-tokens 1000 --out new",
                       "", "new", True),
    "llama": Program("data.llama hf --out new", "", "new", True),
    "export": Program("export --model flex --budget 0.6 --out new", "", "new", True),
    "export hf": Program("export --model flex --budget 0.6 --format hf --out new", "", "new", True),
    "export gguf": Program("export --model flex --budget 0.6 --format gguf --out new.gguf",
                           "", "new.gguf", True),
    "search": Program(f"{fuzz.SEARCH} --generations 3 --population 4 --out new", "--resume", "new", False),
    "flextron": Program(f"flextron.__main__ --llama llama --data data --elastic-steps 2 --router-steps 2 "
                        f"--joint-steps 2 --samples 1 --router dynamic {SAVES} {fuzz.TINY} --out new",
                        "--resume", "new", False),
    "eval": Program(f"{fuzz.EVAL} --model flex --latency 0.9 --plot new.png --json", "", "new.png", True),
    "latency": Program(fuzz.LATENCY, "", "flex/latency.json", True)}
if importlib.util.find_spec("gguf") is None:
    del PROGRAMS["export gguf"]
if importlib.util.find_spec("matplotlib") is None:
    del PROGRAMS["eval"]


@contextlib.contextmanager
def small_demo():
    """Meanwhile the demo's base has the shape of the small world's Llama."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
    shape = {name: getattr(fuzz.CONFIG, name) for name in names}
    demo = train.LlamaConfig
    train.LlamaConfig = functools.partial(LlamaConfig, **shape)
    try:
        yield
    finally:
        train.LlamaConfig = demo


# -----------------------------------------------------------------------------
# what is there, and is it the same?


def contents(folder: Path) -> dict:
    """Path in a folder -> what the file holds, in a form that == compares."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != LOG:  # which has the steps of the killed run too, and times
            found[path.relative_to(folder).as_posix()] = content_of(path)
    return found


def content_of(path: Path):
    """What a file holds: its bytes; of a .pt file plain values and the bytes of its tensors; of
    latency.json all but the times."""
    if path.name == "latency.json":
        table = json.loads(path.read_text())
        return {key: value for key, value in table.items() if key not in TIMES}
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    return path.read_bytes()


def plain(value):
    """Nested values with every tensor as (dtype, shape, bytes)."""
    if torch.is_tensor(value):
        return (value.dtype, tuple(value.shape),
                value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def faults_of(expected: dict, found: dict) -> dict[str, list[str]]:
    """Fault -> the files that have it: contents() after the undisturbed run and after a mended one."""
    both = expected.keys() & found.keys()
    faults = {DIFFERS: [name for name in sorted(both) if expected[name] != found[name]],
              LEFT: sorted(expected.keys() ^ found.keys())}
    return {fault: names for fault, names in faults.items() if names}


def halves_of(program: Program, before: dict, expected: dict, found: dict) -> list[str]:
    """The files of program.out after a kill that are neither what they were nor what they become."""
    if not program.whole:
        return []
    mine = [name for name in found if name == program.out or name.startswith(program.out + "/")]
    halves = [name for name in mine if found[name] not in (before.get(name), expected.get(name))]
    missing = [name for name in expected if name.startswith(program.out + "/") and mine and name not in found]
    return halves + missing


# -----------------------------------------------------------------------------
# one program


class Tally(NamedTuple):
    """What came of a program. seconds: of the undisturbed run. faults: fault -> how many kills had
    it."""
    seconds: float
    kills: int
    faults: Counter


def printed(end: fuzz.End) -> str:
    """The line of --json, where it is the result."""
    last = (end.out.splitlines() or [""])[-1]
    return last if last.startswith("{") else ""


def ends_badly(end: fuzz.End) -> bool:
    """After Ctrl-C or SIGTERM: is there more than a line, or less, or another status?"""
    lines = end.err.splitlines() or [""]
    said = lines[-1].startswith(LAST_WORDS)
    return "Traceback" in end.err or not said or end.status not in (130, 143, 2)


def try_program(world: Path, name: str, kills: int, seed: int, number: signal.Signals) -> Tally:
    """Sends a program the signal so many times, and says what was wrong."""
    program = PROGRAMS[name]
    words = program.command.split()
    before = contents(world)
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        folder = Path(temporary) / "straight"
        shutil.copytree(world, folder)
        start = time.monotonic()
        straight = fuzz.run_in(folder, [], words, None)
        seconds = time.monotonic() - start
        assert straight.status == 0, f"{program.command}: {straight.err}"
        expected = contents(folder)
    rng = random.Random(f"{seed} {name}")
    faults = Counter()
    done = 0
    while done < kills:
        moment = rng.uniform(0, seconds)
        with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
            folder = Path(temporary) / "killed"
            shutil.copytree(world, folder)
            killed = fuzz.run_in(folder, [], words, None, moment, number)
            if killed.status == 0 or fuzz.BEGUN not in killed.out:  # it ended before, or had not begun
                continue
            done += 1
            found = {}
            if number != signal.SIGKILL and ends_badly(killed):
                found[BADLY] = [f"status {killed.status}: {killed.err[-300:]}"]
            halves = halves_of(program, before, expected, contents(folder) if program.whole else {})
            if halves:
                found[HALF] = halves
            mended = fuzz.run_in(folder, [], words + program.mend.split(), None)
            if mended.status != 0 or printed(mended) != printed(straight):
                found[FAILED] = [f"status {mended.status}: {mended.err[-300:]}"]
            found |= faults_of(expected, contents(folder))
        faults.update(found.keys())
        for fault, names in found.items():
            print(f"{name}, kill {done} at {moment:.3f} s: {fault}: {', '.join(names)}", flush=True)
    return Tally(seconds, done, faults)


def main(argv=None) -> None:
    """Kills them all, prints a row per program. Status 1 if something was wrong."""
    p = Parser("python -m bench.kills", __doc__)
    p.add_argument("--kills", type=int, default=30, help="of each program")
    p.add_argument("--programs", nargs="+", default=list(PROGRAMS), metavar="NAME",
                   help=f"of {', '.join(PROGRAMS)}")
    p.add_argument("--signal", choices=list(SIGNALS), default="kill")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args(argv)
    check_at_least_one(args, "kills")
    check_range(args, 0, "seed")
    unknown = [name for name in args.programs if name not in PROGRAMS]
    if unknown:
        fail(f"--programs {unknown[0]} found; expected some of {', '.join(PROGRAMS)}")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    wrong = False
    with small_demo(), tempfile.TemporaryDirectory(prefix="kills-world-") as world:
        fuzz.make_world(Path(world))
        print("| program | seconds | kills | " + " | ".join(FAULTS) + " |")
        print("|---" * (3 + len(FAULTS)) + "|", flush=True)
        for name in args.programs:
            tally = try_program(Path(world), name, args.kills, args.seed, SIGNALS[args.signal])
            counts = " | ".join(str(tally.faults[fault]) for fault in FAULTS)
            print(f"| {name} | {tally.seconds:.1f} | {tally.kills} | {counts} |", flush=True)
            wrong = wrong or any(tally.faults.values())
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
