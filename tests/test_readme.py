"""README.md: every command in it runs, with the files it names standing in as tiny ones, and a few steps for many."""
import gzip
import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest

import bench.slices as bench
import bench.steps as bench_train
import plumbing.checkpoint as checkpoint
import export
import flextron.__main__ as flextron
import plumbing.latency as latency
import bench.results as results
import sample
import search.__main__ as search
import train
import data.prepare
import tasks.download
import eval as evaluation
from plumbing.checkpoint import save_llama
from model import LlamaConfig
from bench import ablation_search, big_export, flextron_oracle, oracle, token_time
from tests.helpers import ROOT, random_llama, run
from tests.tiny_tasks import rows_of_tasks, write_raw

FEW_CANDIDATES = "--generations 1 --population 4 --fitness-windows 2 --calibration-windows 4 --report-windows 2"
FEWER = {"train.py": "--base-steps 3 --steps 2 --eval-windows 4 --calibration-windows 4 --batch-tokens 128 "
                     "--seq-len 16",
         "bench_train.py": "--dim 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --ffn-dim 64 --seq-len 16 "
                           "--rounds 1 --device cpu",
         "bench.py": "--dim 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --ffn-dim 64 --seq-len 16 --rounds 1",
         "sample.py": "--max-new-tokens 5", "eval.py": "--windows 4", "tests/oracle.py": "--windows 2",
         "tests/big_export.py": "--scale 16", "latency.py": "--rounds 1", "results.py": "--assets .",
         "tests/token_time.py": "--dim 64 --rounds 1 --latency 0.9",
         "tests/flextron_oracle.py": "--windows 4", "search.py": FEW_CANDIDATES,
         "tests/ablation_search.py": FEW_CANDIDATES + " --budgets 0.6 --seeds 0",
         "flextron.py": "--elastic-steps 2 --router-steps 2 --joint-steps 2 --eval-windows 4 --calibration-windows 4 "
                        "--batch-tokens 64 --seq-len 16"}
MAINS = {"train.py": train.main, "export.py": export.main, "eval.py": evaluation.main, "sample.py": sample.main,
         "bench.py": bench.main, "bench_train.py": bench_train.main, "data/prepare.py": data.prepare.main,
         "data/tasks.py": data.tasks.main, "checkpoint.py": checkpoint.main, "tests/oracle.py": oracle.main,
         "tests/big_export.py": big_export.main, "latency.py": latency.main, "flextron.py": flextron.main,
         "results.py": results.main,
         "tests/token_time.py": token_time.main, "tests/flextron_oracle.py": flextron_oracle.main,
         "search.py": search.main, "tests/ablation_search.py": ablation_search.main}


def commands() -> list[list[str]]:
    """Every `python ...` and `torchrun ...` line of README's and RESULTS' sh blocks, as words, in order."""
    text = "".join((ROOT / name).read_text() for name in ("README.md", "RESULTS.md")).replace("\\\n", " ")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines = [re.sub(r"^.*pip install -r requirements.txt && ", "", line) for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python", "torchrun"))]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the README's reader has: some text, and a Llama 3.1 (a very small one)."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "notes").mkdir()
    prose = "".join(path.read_text() for path in sorted(ROOT.glob("*.py")))
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
    """Catches a README that names a flag, a file or a default that the code no longer has."""
    monkeypatch.chdir(desk)
    monkeypatch.setattr(data.tasks, "get", lambda source, folder: None)  # they are there
    ran = set()
    for words in commands():
        if words[:3] == ["python", "-m", "pytest"]:
            continue
        script = next(word for word in words if word.endswith(".py"))
        args = words[words.index(script) + 1:]
        if script == "train.py" and "--resume" not in args:
            args += shlex.split(FEWER["train.py"])
        elif script in FEWER:
            args += shlex.split(FEWER[script])
        if "--tasks" in args:  # an answer must fit in the window, and this family learned windows of 16 tokens
            args += ["--seq-len", "128"]
        if "--plot" in args and importlib.util.find_spec("matplotlib") is None:
            at = args.index("--plot")
            args = args[:at] + args[at + 2:]
        if words[0] == "torchrun":
            done = run(ROOT / script, *args, cwd=desk, ranks=2)
            assert done.returncode == 0, (words, done.stderr[-2000:])
        else:
            monkeypatch.setattr(sys, "argv", [script, *args])
            MAINS[script](args)
        ran.add(script)
    assert ran == set(MAINS)


def test_the_install_and_test_lines():
    """Catches a README whose one-liners lost the environment, the install, or the command itself."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && python "
    assert start + "train.py" in lines and any(line.startswith(start + "-m pytest") for line in lines)


def test_files_are_the_ones_that_exist():
    """Catches a file table that names a file that is gone, or leaves one out."""
    text = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]:
        assert f"`{path.relative_to(ROOT)}`" in text, path
    for name in re.findall(r"`((?:data/|tests/)?\w+\.py)`", text):
        assert (ROOT / name).is_file(), name
