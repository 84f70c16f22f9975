"""The READMEs: every command in them runs, with the files they name standing in as tiny ones, and few steps for many."""
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest

import data.prepare
import tasks.download
from model import LlamaConfig
from plumbing.checkpoint import save_llama
from tests.helpers import random_llama
from tests.processes import ROOT, run
from tests.tiny_tasks import rows_of_tasks, write_raw

PAGES = ("README.md", "search/README.md", "flextron/README.md", "tasks/README.md", "bench/README.md", "RESULTS.md")
FEW_CANDIDATES = "--generations 1 --population 4 --fitness-windows 2 --calibration-windows 4 --report-windows 2"
TINY_SHAPE = "--dim 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --ffn-dim 64 --seq-len 16 --rounds 1"
FEWER = {
    "train": "--base-steps 3 --steps 2 --eval-windows 4 --calibration-windows 4 --batch-tokens 128 --seq-len 16",
    "eval": "--windows 4",
    "sample": "--max-new-tokens 5",
    "search": FEW_CANDIDATES,
    "flextron": "--elastic-steps 2 --router-steps 2 --joint-steps 2 --eval-windows 4 --calibration-windows 4 "
                "--batch-tokens 64 --seq-len 16",
    "bench.slices": TINY_SHAPE,
    "bench.steps": TINY_SHAPE + " --device cpu",
    "bench.oracle": "--windows 2",
    "bench.latency": "--rounds 1",
    "bench.results": "--assets .",
    "bench.big_export": "--scale 16",
    "bench.token_time": "--dim 64 --rounds 1 --latency 0.9",
    "bench.flextron_oracle": "--windows 4",
    "bench.ablation_search": FEW_CANDIDATES + " --budgets 0.6 --seeds 0",
}
PROGRAMS = {
    "train", "export", "eval", "sample", "data.prepare", "search", "flextron", "tasks.download", "plumbing.describe",
    "bench.slices", "bench.steps", "bench.oracle", "bench.latency", "bench.results", "bench.big_export",
    "bench.token_time", "bench.flextron_oracle", "bench.ablation_search", "bench.alone", "bench.before",
}


def commands() -> list[list[str]]:
    """Every `python ...` and `torchrun ...` line of the pages' sh blocks, as words, in order."""
    text = "".join((ROOT / page).read_text() for page in PAGES).replace("\\\n", " ")
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            line = re.sub(r"^.*pip install -r requirements.txt && ", "", line)
            if line.startswith(("python ", "torchrun ")):
                found.append(shlex.split(line, comments=True))
    return found


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """(the module that a command runs, its arguments)."""
    if words[1] == "-m":
        return words[2], words[3:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py").replace("/", "."), words[at + 1:]


def main_of(program: str):
    """The main() of a module, or of a folder that runs with python -m."""
    folder = program in ("search", "flextron")
    return importlib.import_module(f"{program}.__main__" if folder else program).main


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the pages' reader has: some text, and a Llama 3.1 (a very small one)."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "notes").mkdir()
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("bench/*.py")])
    prose = "".join(path.read_text() for path in sources)
    for i in range(30):
        (desk / "notes" / f"{i}.md").write_text(prose[i * 5000:(i + 1) * 5000])
    (desk / "book.txt").write_text(prose)
    shutil.copy(ROOT / "assets/results.json", desk)
    with gzip.open(desk / "web.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": prose[i * 100:i * 100 + 900]}) + "\n" for i in range(40))
    write_raw(desk / "data/tasks", rows_of_tasks(12, long=20))
    data.prepare.prepare([str(desk / "notes")], str(desk / "data/pystdlib"), vocab_size=600)
    llama = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=32, vocab_size=600)
    save_llama(desk / "Llama-3.1-8B", llama, random_llama(llama).state_dict(), desk / "data/pystdlib/tokenizer.model")
    return desk


def test_every_command_runs(desk, monkeypatch):
    """Catches a page that names a flag, a file or a default that the code no longer has, and a program on no page."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(tasks.download, "get", lambda source, folder: None)  # they are there
    ran = set()
    for words in commands():
        program, args = program_of(words)
        if program == "pytest":
            continue
        if program != "train" or "--resume" not in args:
            args = args + shlex.split(FEWER.get(program, ""))
        if "--tasks" in args:  # an answer must fit in the window, and this family learned windows of 16 tokens
            args += ["--seq-len", "128"]
        if "--memory" in args:  # the pages' sizes are those of a real model
            args[args.index("--memory") + 1] = "10MB"
        if "--plot" in args and importlib.util.find_spec("matplotlib") is None:
            at = args.index("--plot")
            args = args[:at] + args[at + 2:]
        if words[0] == "torchrun":
            done = run(ROOT / f"{program}.py", *args, cwd=desk, ranks=2)
            assert done.returncode == 0, (words, done.stderr[-2000:])
        else:
            monkeypatch.setattr(sys, "argv", [program, *args])
            main_of(program)(args)
        ran.add(program)
    assert ran == PROGRAMS


def test_the_install_and_test_lines():
    """Catches a README whose one-liners lost the environment, the install, or the command itself."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python "
    assert start + "train.py" in lines and any(line.startswith(start + "-m pytest") for line in lines)


def test_every_file_has_a_place():
    """Catches a page that names a file that is gone, and a program or a chapter that no page names."""
    front = (ROOT / "README.md").read_text()
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in front, path
        lines = len(path.read_text().splitlines())
        row = next(line for line in front.splitlines() if line.startswith("|") and f"`{path.name}`" in line)
        said = [int(number) for number in re.findall(r"\b\d{2,4}\b", row)]
        assert any(abs(number / lines - 1) < 0.1 for number in said), f"{path.name} has {lines} lines, README says {said}"
    for folder in ("search", "flextron", "tasks", "bench"):
        page = (ROOT / folder / "README.md").read_text()
        for path in (ROOT / folder).glob("[!_]*.py"):
            assert path.name in page or f"{folder}.{path.stem}" in page, path
    for page in PAGES:
        folder = (ROOT / page).parent
        for name in re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / page).read_text()):
            assert (folder / name).is_file() or (ROOT / name).is_file(), (page, name)


def test_no_old_command_is_left():
    """Catches a docstring or a message that names a program as it was called before it moved into a folder."""
    moved = ("bench", "bench_train", "results", "flextron", "search", "latency", "checkpoint", "tasks", "data/tasks",
             "tests/\\w+", "tokenizer", "params", "hf", "parallel", "speed", "likelihood", "pertoken", "stages")
    old = re.compile(r"(?:python |torchrun .*)(?:" + "|".join(moved) + r")\.py\b|bash results\.sh")
    for path in [*ROOT.rglob("*.py"), *ROOT.rglob("*.md"), *ROOT.rglob("*.sh")]:
        if ".venv" in str(path) or path.parent.name == "tests":
            continue
        assert not old.findall(path.read_text()), path
