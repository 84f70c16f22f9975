"""
What does a program do with a damaged file, a foreign one, or a flag that makes no sense? It ends with
one line and status 2, or it works; nothing else.

    python -m bench.fuzz                                  3,000 cases: half an hour on one core
    python -m bench.fuzz --seed 7 --cases 100             others
    python -m bench.fuzz --cases 1 --first 30 --show      one of them again, with all that it printed

A case is a function of (seed, number). It has a copy of a small world of its own: text, shards, a
Llama, a family, a flextron folder, tasks, a Hugging Face folder and a GGUF file. One to three things
in it are damaged, or one to three flags get other values, and one command runs in a process of its
own, which is forked after everything was imported, and has 20 seconds of a core (five minutes on
the clock: the machine may be busy) and 8 GB. What is counted:

    refused      one line on stderr that begins with "error:", status 2
    accepted     status 0: look these through (--accepted FILE)
    traceback    any other end
    hang         still running after 20 seconds of a core, or five minutes
    leftover     a temporary file or a lock is left, however it ended
    code run     something in a file was executed
"""
import contextlib
import gzip
import importlib.util
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

# Imported here, before any fork: a case costs a second, and importing torch costs two.
import bench.latency  # noqa: F401
import data.llama  # noqa: F401
import data.prepare  # noqa: F401
import eval  # noqa: F401
import export  # noqa: F401
import flextron.__main__  # noqa: F401
import plumbing.describe  # noqa: F401
import plumbing.latency
import sample  # noqa: F401
import search.__main__  # noqa: F401
import tasks.report  # noqa: F401
import train  # noqa: F401
from model import Llama, LlamaConfig
from plumbing.checkpoint import save_llama
from plumbing.errors import Parser, check_at_least_one, check_range, run_main

SECONDS = 20  # of a core
WAIT = 300    # on the clock
BEGUN = "-" * 8  # printed when the program begins
MEMORY = 8 << 30  # bytes
CANARY = "CODE_RAN"  # a folder that only code inside a damaged file would make
REFUSED, ACCEPTED, TRACEBACK, HANG, LEFTOVER, CODE, BROKEN = (
    "refused", "accepted", "traceback", "hang", "leftover", "code run", "the fuzzer itself failed")
BAD = (TRACEBACK, HANG, LEFTOVER, CODE, BROKEN)

# -----------------------------------------------------------------------------
# the world, and the commands that run in it

CONFIG = LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64,
                     vocab_size=600, context=32)
TINY = "--seq-len 32 --batch-tokens 64 --eval-windows 2 --calibration-windows 2 --device cpu"
TRAIN = f"train --llama llama --data data --steps 1 --budgets 1.0 0.6 {TINY}"
FLEXTRON = ("flextron.__main__ --llama llama --data data --elastic-steps 1 --router-steps 1 "
            f"--joint-steps 1 --samples 1 {TINY}")
SEARCH = ("search.__main__ --llama llama --data data --budget 0.7 --generations 1 --population 2 "
          "--fitness-windows 1 --calibration-windows 1 --report-windows 1 --seq-len 16 --device cpu")
LATENCY = "bench.latency --model flex --rounds 1 --slices 1 --seq-len 8 --device cpu"
EVAL = "eval --data data --windows 2 --device cpu"

# What makes the world, in this order. The Llama comes after the first one: it needs a tokenizer.
WORLD = ["data.prepare --input text --vocab-size 600 --out data",
         f"{TRAIN} --out flex",
         f"{FLEXTRON} --out nested",
         f"{SEARCH} --out found",
         "export --model llama --format hf --out hf",
         "export --model llama --format gguf --out llama.gguf",
         LATENCY]

# What is damaged: the files that a command reads.
LLAMA = ["llama/params.json", "llama/consolidated.00.pth", "llama/tokenizer.model"]
FAMILY = ["flex/params.json", "flex/consolidated.00.pth", "flex/tokenizer.model", "flex/flex.pt"]
SHARDS = ["data/train_000000.bin", "data/val_000000.bin", "data/tokenizer.model"]
TASKS = ["piqa/valid.jsonl", "piqa/valid-labels.lst", "winogrande/dev.jsonl", "mmlu/test/a_test.csv",
         "mmlu/dev/a_dev.csv", "lambada_openai/lambada_test.jsonl",
         "arc_easy/ARC-Easy-Test.jsonl", "hellaswag/hellaswag_val.jsonl",
         "hellaswag/hellaswag_train.jsonl"]
HF = ["hf/config.json", "hf/model.safetensors", "hf/tokenizer.json", "hf/tokenizer_config.json"]
TEXT = ["text/a.txt", "text/b.jsonl", "text/c.md.gz"]
COMMANDS = {  # name -> (command, files)
    "train": (f"{TRAIN} --out new", LLAMA + SHARDS),
    "train --resume": (f"{TRAIN} --out flex --resume", ["flex/resume.pt", *LLAMA, *SHARDS]),
    "train --dry-run": ("train --llama llama --dry-run --device cpu", ["llama/params.json"]),
    "eval": (f"{EVAL} --model flex --json", FAMILY + SHARDS[1:]),
    "eval --text": ("eval --model llama --text text/a.txt --seq-len 16", LLAMA + ["text/a.txt"]),
    "eval --latency": (f"{EVAL} --model flex --latency 0.9", ["flex/latency.json"]),
    "eval --tasks": ("eval --model llama --tasks all --task-dir tasks --limit 1 --seq-len 32",
                     [f"tasks/{name}" for name in TASKS]),
    "eval flextron": (f"{EVAL} --model nested", ["nested/flextron.pt"]),
    "export": ("export --model flex --budget 0.6 --out new", FAMILY),
    "export hf": ("export --model flex --budget 0.6 --format hf --out new", FAMILY),
    "export gguf": ("export --model flex --budget 0.6 --format gguf --out new.gguf", FAMILY),
    "export --dry-run": ("export --model flex --dry-run", FAMILY),
    "export --latency": ("export --model flex --latency 0.9 --out new", ["flex/latency.json"]),
    "sample": ("sample --model flex --budget 0.6 --max-new-tokens 4 --device cpu", FAMILY),
    "prepare": ("data.prepare --input text --vocab-size 600 --out new", TEXT),
    "prepare --tokenizer": ("data.prepare --input text --tokenizer llama/tokenizer.model --out new",
                            ["llama/tokenizer.model"]),
    "llama hf": ("data.llama hf --out new", HF),
    "llama gguf": ("data.llama llama.gguf --out new", ["llama.gguf"]),
    "describe": ("plumbing.describe llama", LLAMA),
    "search": (f"{SEARCH} --out new", LLAMA + SHARDS),
    "search --resume": (f"{SEARCH} --out found --resume", ["found/resume.pt"]),
    "flextron": (f"{FLEXTRON} --out new", LLAMA + SHARDS),
    "flextron --resume": (f"{FLEXTRON} --out nested --resume", ["nested/resume.pt"]),
    "latency": (LATENCY, FAMILY)}
if importlib.util.find_spec("gguf") is None:
    WORLD = [command for command in WORLD if "gguf" not in command]
    COMMANDS = {name: case for name, case in COMMANDS.items() if "gguf" not in name}


def make_world(folder: Path) -> None:
    """Fills a folder with what the commands read."""
    make_text(folder / "text")
    make_tasks(folder / "tasks")
    for command in WORLD:
        if command == WORLD[1]:
            state = Llama(CONFIG).init_weights(0).state_dict()
            save_llama(folder / "llama", CONFIG, state, folder / "data/tokenizer.model")
        end = run_in(folder, [], command.split(), None)
        assert end.status == 0, f"{command}: {end.err}"


def make_text(folder: Path) -> None:
    """Three files of a few words, over and over."""
    rng = random.Random(0)
    words = "the a cat dog fox hen sees eats finds mat tree house river under behind".split()
    sentences = []
    for n in range(200):
        sentences.append(f"{' '.join(rng.choices(words, k=7))} in {n} steps.\n")
    lines = [json.dumps(dict(text=sentence * 9)) + "\n" for sentence in sentences]
    folder.mkdir()
    (folder / "a.txt").write_text("".join(sentences))
    (folder / "b.jsonl").write_text("".join(lines))
    (folder / "c.md.gz").write_bytes(gzip.compress("".join(reversed(sentences)).encode()))


def make_tasks(folder: Path) -> None:
    """A few rows of each task."""
    scene = dict(activity_label="Baking", ctx_a="a man", ctx_b="he", label=1,
                 endings=["bakes", "sits", "eats", "runs"])
    options = [dict(text=letter, label=letter) for letter in "ABCD"]
    rows = {
        "piqa/valid.jsonl": dict(goal="to see", sol1="look", sol2="sleep"),
        "winogrande/dev.jsonl": dict(sentence="a cat saw _ .", option1="it", option2="her", answer="1"),
        "lambada_openai/lambada_test.jsonl": dict(text="the cat sat on the mat"),
        "arc_easy/ARC-Easy-Test.jsonl": dict(answerKey="A", question=dict(stem="?", choices=options)),
        "hellaswag/hellaswag_val.jsonl": scene,
        "hellaswag/hellaswag_train.jsonl": scene}
    for name, row in rows.items():
        n = 12 if "train" in name else 2
        write(folder / name, "".join(json.dumps(row | dict(ind=i)) + "\n" for i in range(n)))
    write(folder / "piqa/valid-labels.lst", "0\n1\n")
    for split in ("test", "dev"):
        write(folder / f"mmlu/{split}/a_{split}.csv", "what?,a,b,c,d,A\n" * 5)


def write(path: Path, text: str) -> None:
    """A file, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# -----------------------------------------------------------------------------
# damages: each changes a file of the world, and says how

FOREIGN = {  # what people put where something else belongs
    "a page": b"<!DOCTYPE html><html><body>404</body></html>",
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214\nsize 2471\n",
    "a zip": b"PK\x03\x04" + bytes(60),
    "a gzip": b"\x1f\x8b\x08" + bytes(60),
    "nothing": b"",
    "zeros": bytes(5000),
    "text": b"hello\n",
    "JSON": b"{}",
    "a list": b"[]",
    "null": b"null",
    "NaN": b"NaN",
    "deep JSON": b"[" * 200_000,
    "deep objects": b'{"a":' * 50_000,
    "UTF-16": "{}".encode("utf-16"),
    "latin": b"\xe9\xff\x00"}
NAN, INFINITY = float("nan"), float("inf")
NUMBERS = [0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 2**64, 10**12, 10**400, NAN,
           INFINITY, -INFINITY]
VALUES = [*NUMBERS, True, False, None, "", "x", "é\ud800", "1", [], [1], [[]], [0] * 1000, {},
          {"a": {"b": []}}]


def damage_bytes(rng: random.Random, path: Path) -> str:
    """Any file: cut, flipped, lengthened, replaced by something else."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["cut", "flipped", "zeroed", "doubled", "foreign", "foreign", "foreign", "noise"])
    at = rng.randrange(len(data) + 1)
    if how == "cut":
        data = data[:at]
    elif how == "flipped":
        for _ in range(rng.choice([1, 1, 10])):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "zeroed":
        data[at:at + 100] = bytes(len(data[at:at + 100]))
    elif how == "doubled":
        data = data + data[at:]
    elif how == "noise":
        data[at:] = rng.randbytes(len(data) - at)
    else:
        how = rng.choice(list(FOREIGN))
        data = FOREIGN[how]
    path.write_bytes(data)
    return f"{path}: {how}"


def damage_place(rng: random.Random, path: Path) -> str:
    """Any file: something else under its name."""
    how = rng.choice(["missing", "a folder", "a pipe", "a link to nothing", "a link to itself",
                      "the folder is gone"])
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a link to nothing":
        path.symlink_to("nothing")
    elif how == "a link to itself":
        path.symlink_to(path.name)
    elif how == "the folder is gone" and path.parent.name:
        shutil.rmtree(path.parent)
    return f"{path}: {how}"


def damage_json(rng: random.Random, path: Path) -> str:
    """A JSON file, or JSON lines: a value somewhere inside is another one."""
    lines = path.read_text().splitlines()
    whole = path.suffix == ".json"
    i = 0 if whole else rng.randrange(len(lines))
    content = json.loads(path.read_text() if whole else lines[i])
    said = change_inside(rng, content)
    changed = json.dumps(content)
    path.write_text(changed if whole else "\n".join([*lines[:i], changed, *lines[i + 1:]]) + "\n")
    return f"{path}: {said}"


def random_key(rng: random.Random, content):
    """Of a dictionary, or a place in a list; there is one."""
    return rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))


def change_inside(rng: random.Random, content) -> str:
    """In place: one value of nested dictionaries and lists is changed, or gone. Returns what, and
    how."""
    if not content:
        return "empty"
    key = random_key(rng, content)
    inner = content[key]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
        return f"{key}, {change_inside(rng, inner)}"
    if rng.random() < 0.2:
        del content[key]
        return f"{key} is gone"
    if isinstance(inner, (int, float)) and rng.random() < 0.6:
        content[key] = rng.choice([*NUMBERS, inner + 1, inner - 1, inner * 2, -inner])
    else:
        content[key] = rng.choice(VALUES)
    return f"{key} {str(inner)[:20]!r} -> {str(content[key])[:40]!r}"


class Code:
    """What a pickle runs when it is loaded by the letter."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


def odd_tensors() -> dict:
    """Tensors and other things that stand where a tensor is expected."""
    ones = torch.ones(4, 4)
    return {"NaN": ones * NAN, "integers": ones.long(), "scalar": torch.tensor(1.0),
            "empty": torch.empty(0), "sparse": ones.to_sparse(), "meta": ones.to("meta"),
            "bool": ones.bool(), "complex": ones.to(torch.complex64), "double": ones.double(),
            "huge": torch.empty(1).expand(2**40), "a list": [1.0], "None": None, "a number": 3,
            "a text": "w", "a dictionary": {}}


TENSOR_DAMAGES = ["tensor", "tensor", "name", "inside", "inside", "inside", "dtype", "shape", "code",
                  "old", "nested", "pickle"]


def damage_tensors(rng: random.Random, path: Path) -> str:
    """A file of torch.save: another tensor, name or value somewhere inside; another format; code."""
    state = torch.load(path, weights_only=True)
    how = rng.choice(TENSOR_DAMAGES)
    weights = tensors_in(state)
    name = rng.choice(list(weights)) if weights else None
    if how == "code":
        state["extra"] = Code()
    elif how == "nested":
        state = {"model": state}
    elif how == "inside" or (name is None and how in ("tensor", "name", "dtype", "shape")):
        how = change_state(rng, state)
    elif how == "name":
        weights[rng.choice([7, "", None, "x" * 1000, "é", (1, 2)])] = torch.ones(2)
    elif how == "tensor":
        how, weights[name] = rng.choice(list(odd_tensors().items()))
        how = f"{name} is {how}"
    elif how == "dtype":
        weights[name] = weights[name].to(rng.choice([torch.float64, torch.bfloat16, torch.int8]))
    elif how == "shape":
        t = weights[name]
        weights[name] = rng.choice([t[:-1], t.flatten(), t[None], torch.cat([t, t])]).clone()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Code()))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how != "old")
    return f"{path}: {how}"


def tensors_in(state: dict) -> dict:
    """The dictionary, of a file or inside it, that holds tensors by name; {} if none does."""
    for content in (state, state.get("model"), state.get("router"), state.get("routers")):
        if isinstance(content, dict) and any(map(torch.is_tensor, content.values())):
            return content
    return {}


def change_state(rng: random.Random, content) -> str:
    """change_inside() for what torch.load gives, where tensors count as values."""
    if not content:
        return "empty"
    key = random_key(rng, content)
    inner = content[key]
    if isinstance(inner, (dict, list)) and inner and rng.random() < 0.75:
        return f"{key}, {change_state(rng, inner)}"
    if rng.random() < 0.3:
        del content[key]
        return f"{key} is gone"
    value = rng.choice([*VALUES, *odd_tensors().values()])
    content[key] = value
    found = list(value.shape) if torch.is_tensor(value) else str(value)[:30]
    return f"{key} is {type(value).__name__} {found}"


def damage_header(rng: random.Random, path: Path) -> str:
    """A binary file: a number near its beginning, where lengths and magic numbers are."""
    data = bytearray(path.read_bytes())
    at = rng.choice([0, 4, 8, 12, 16, 24, *range(0, min(200, len(data)), 4)])
    kind, value = rng.choice([("<I", 0), ("<I", 1), ("<I", 2**31), ("<I", 2**32 - 1), ("<Q", 2**63),
                              ("<Q", 2**40), ("<Q", 0)])
    data[at:at + struct.calcsize(kind)] = struct.pack(kind, value)
    path.write_bytes(data)
    return f"{path}: {value} at byte {at}"


def damage_tokens(rng: random.Random, path: Path) -> str:
    """tokenizer.model, or another file of lines: a line is changed, doubled, gone or moved."""
    lines = path.read_bytes().split(b"\n")
    i = rng.randrange(len(lines))
    word = lines[i].partition(b" ")[0]
    changes = {"gone": [], "doubled": [lines[i]] * 2, "odd": [b"!!! 5"], "rank": [word + b" 999999"],
               "minus": [word + b" -1"], "empty token": [b" 5"], "word": [b"x"],
               "long": [b"QQ==" * 100_000 + b" 5"], "null byte": [b"\0"]}
    how = rng.choice(list(changes))
    path.write_bytes(b"\n".join([*lines[:i], *changes[how], *lines[i + 1:]]))
    return f"{path}: line {i + 1} {how}"


def damage_of(rng: random.Random, path: Path) -> str:
    """A damage that suits the kind of file."""
    kinds = [damage_bytes, damage_place]
    if path.suffix in (".json", ".jsonl"):
        kinds += [damage_json] * 6
    elif path.suffix in (".pt", ".pth"):
        kinds += [damage_tensors] * 6
    elif path.suffix in (".bin", ".safetensors", ".gguf"):
        kinds += [damage_header] * 3
    else:
        kinds += [damage_tokens] * 2
    if not path.is_file():  # an earlier damage took it
        return f"{path}: gone already"
    try:
        return rng.choice(kinds)(rng, path)
    except Exception:
        return f"{path}: damaged already"  # an earlier damage left nothing to take apart


# -----------------------------------------------------------------------------
# flags

# No place outside of the world: what runs here as root could write there.
WORDS = [
    "-1", "0", "1", "2", "7", "0.5", "1.0", "-0.5", "nan", "inf", "-inf", "1e400", "1e-400", "1" * 400,
    "9" * 5000, "999999999999", "1000000007", "", " ", "x", "x" * 300, "é\udce9", ".", "fifo", "text",
    "text/a.txt", "data", "llama", "flex", "hf", "llama.gguf", "missing/place", "6GB", "1e30GB", "0B",
    "4.0.0B", "--", "all"]
LEFT_OUT = {
    "help",
    "compile"}  # starts a C++ compiler, whose half a minute says nothing of us; tests/test_compile.py has it


def flags_of(program: str) -> list:
    """The flags of a program, as argparse has them."""
    found = []

    class Enough(Exception):
        pass

    def look(parser, *_):
        for action in parser._actions:
            if action.option_strings and action.dest not in LEFT_OUT:
                found.append(action)
        raise Enough

    original = Parser.parse_args
    Parser.parse_args = look
    with contextlib.suppress(Enough):
        sys.modules[program].main([])
    Parser.parse_args = original
    return found


def change_flags(rng: random.Random, words: list[str]) -> tuple[list[str], str]:
    """One flag more, or another value for one that is there (the last one counts)."""
    flags = flags_of(words[0])
    if not flags or (words[1:] and not words[1].startswith("-") and rng.random() < 0.3):
        place = rng.choice(WORDS)  # of a folder or file that is named without a flag
        return [words[0], place, *words[2:]], place[:40]
    flag = rng.choice(flags)
    added = [rng.choice(flag.option_strings)]
    if flag.nargs != 0:
        n = rng.choice([1, 1, 1, 2, 3]) if flag.nargs in ("+", "*") else 1
        choices = [str(choice) for choice in flag.choices or []] * 8
        added += [rng.choice(WORDS + choices) for _ in range(n)]
    return words + added, " ".join(word[:40] for word in added)


# -----------------------------------------------------------------------------
# one case


class End(NamedTuple):
    """How a process ended. status: minus the signal's number if one ended it; None: it did not end."""
    status: int | None
    out: str
    err: str


def run_in(folder: Path, damages: list, words: list[str], seed, seconds: float = 600,
           number: int = signal.SIGKILL) -> End:
    """Damages files of the world in `folder`, then runs module words[0] with words[1:], in a process
    of its own, which a signal of this number ends after so many seconds, and kill -9 where it does
    not within five minutes. seed: of the damages; None for a run that takes its time."""
    out = tempfile.TemporaryFile()
    err = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        try:
            os._exit(in_child(folder, damages, words, seed, out.fileno(), err.fileno()))
        finally:
            # a signal came before the program began: what the parent is in the midst of is not ours to end
            os._exit(99)
    status = status_of(child, seconds)
    if status is None and number != signal.SIGKILL:
        os.kill(child, number)
        status = status_of(child, WAIT)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode("utf-8", "replace"))
        file.close()
    return End(status, *texts)


def status_of(child: int, seconds: float) -> int | None:
    """The exit status of a process, None if it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, found = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(found)
        time.sleep(0.001)
    return None


def in_child(folder: Path, damages: list, words: list[str], seed, out: int, err: int) -> int:
    """The forked process: what run_in() says. Returns the exit status, 99 where the fuzzer failed."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout = text_file(1, "strict")
    sys.stderr = text_file(2, "backslashreplace")
    try:
        rng = random.Random(seed)
        for path in damages:
            done = damage_of(rng, Path(path))
            print(done.encode("utf-8", "replace").decode())
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if seed is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))  # ends it by SIGXCPU
    except BaseException:
        traceback.print_exc()
        return 99
    print(BEGUN, flush=True)
    sys.argv = [words[0].replace(".", "/") + ".py", *words[1:]]
    try:
        run_main(sys.modules[words[0]].main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def text_file(number: int, errors: str) -> io.TextIOWrapper:
    """A descriptor as Python opens it for stdout and stderr."""
    file = os.fdopen(number, "wb", closefd=False)
    return io.TextIOWrapper(file, "utf-8", errors, line_buffering=True)


def is_leftover(path: Path) -> bool:
    """Is it what a writer makes on its way, or a lock?"""
    on_its_way = ".new-" in path.name or ".old-" in path.name
    return on_its_way or path.name.endswith((".tmp", ".lock", ".part"))


def kind_of(end: End, folder: Path) -> str:
    """What a case counts as."""
    lines = end.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if (folder / CANARY).exists():
        return CODE
    if end.status == 99:
        return BROKEN
    if end.status is None or end.status == -signal.SIGXCPU:
        return HANG
    if "Traceback (most recent call last)" in end.err or end.status not in (0, 2):
        return TRACEBACK
    if end.status == 2 and (len(errors) != 1 or lines[-1] != errors[0]):
        return TRACEBACK
    if any(map(is_leftover, folder.rglob("*"))):
        return LEFTOVER
    return REFUSED if end.status == 2 else ACCEPTED


class Case(NamedTuple):
    """A case that ran. kind: what it counts as. done: to the world, or to the flags."""
    number: int
    kind: str
    command: str
    done: str
    end: End


def run_case(world: Path, seed: int, number: int) -> Case:
    """The case of this number, in a copy of the world."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(COMMANDS))
    command, reads = COMMANDS[name]
    words = command.split()
    damages = []
    done = []
    if rng.random() < 0.6:
        damages = rng.choices(reads, k=rng.choice([1, 1, 1, 2, 3]))
    else:
        for _ in range(rng.choice([1, 1, 2, 3])):
            words, added = change_flags(rng, words)
            done.append(added)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary) / "world"
        shutil.copytree(world, folder)
        os.mkfifo(folder / "fifo")
        end = run_in(folder, damages, words, f"{seed} {number} damage", WAIT)
        kind = kind_of(end, folder)
    damaged, _, rest = end.out.partition(BEGUN + "\n")
    done += damaged.splitlines()
    return Case(number, kind, name, "; ".join(done), end._replace(out=rest))


# -----------------------------------------------------------------------------
# all of them


def said(case: Case) -> str:
    """A case in a line."""
    last = (case.end.err.splitlines() or [""])[-1]
    return f"{case.number:5d} {case.kind:9} {case.command:20} | {case.done} | {last[:200]}"


def main(argv=None) -> None:
    """Runs the cases, prints the bad ones and the counts."""
    p = Parser("python -m bench.fuzz", __doc__)
    p.add_argument("--cases", type=int, default=3000)
    p.add_argument("--first", type=int, default=0, help="number of the first one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--show", action="store_true", help="all that every case printed")
    p.add_argument("--accepted", help="file for a line about each case that was accepted")
    args = p.parse_args(argv)
    check_at_least_one(args, "cases")
    check_range(args, 0, "first", "seed")
    torch.set_num_threads(1)
    plumbing.latency.LIMIT = 1  # seconds: a table that is measured anew may be a bad one
    counts = Counter()
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-world-"))
        list_of_accepted = args.accepted or os.devnull
        accepted = stack.enter_context(open(list_of_accepted, "w", encoding="utf-8", errors="replace"))
        make_world(Path(world))
        for number in range(args.first, args.first + args.cases):
            case = run_case(Path(world), args.seed, number)
            counts[case.kind] += 1
            if case.kind == ACCEPTED:
                print(said(case), file=accepted, flush=True)
            if case.kind in BAD:
                print(said(case), flush=True)
            if args.show:
                print(said(case), case.end.out, case.end.err, sep="\n")
    found = [f"{counts[kind]} {kind}" for kind in (REFUSED, ACCEPTED, *BAD)]
    print(f"seed {args.seed}, {args.cases} cases: {', '.join(found)}")
    if any(counts[kind] for kind in BAD):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
