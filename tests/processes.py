"""Processes for the tests that need some.

To import torch takes two seconds, and a test with four ranks would take them five times (torchrun
imports it too). So one process, the server, imports it once, and every process of a test is forked
from there. It has not imported the project: a child reads RANK and WORLD_SIZE as if torchrun had
started it.
"""
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "pytest", "numpy", "tiktoken", "tqdm", "torch", "torch._dynamo", "torch.utils.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.optim", "torch.distributed.tensor"])


def environment_of(**more: str) -> dict[str, str]:
    """The environment of a test's process: one thread, and the project can be imported."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def child(words: list[str], cwd: str, environment: dict, out: str, err: str) -> None:
    """What a forked process does: `python words...`, with its output in two files."""
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(ROOT))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(*command, cwd=ROOT, ranks: int = 0, timeout: int = 300, **environment) -> subprocess.CompletedProcess:
    """python script.py args... (or -c code, or -m module), alone or as so many ranks; output as text.

    As torchrun does, it ends all ranks when one has failed."""
    words = [str(word) for word in command]
    environments = [environment_of(**environment)]
    if ranks:
        address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks),
                       LOCAL_WORLD_SIZE=str(ranks))
        environments = [environment_of(RANK=str(rank), LOCAL_RANK=str(rank), **address, **environment)
                        for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch(), err.touch()
        processes = [SERVER.Process(target=child, args=(words, str(cwd), e, str(out), str(err)))
                     for e in environments]
        for process in processes:
            process.start()
        alive, status = {process.sentinel: process for process in processes}, 0
        while alive and status == 0:
            ended = multiprocessing.connection.wait(alive, timeout)
            for sentinel in ended:
                status = status or alive.pop(sentinel).exitcode
            if not ended:
                status = 124
        for process in alive.values():
            process.kill()
        for process in processes:
            process.join()
        if status == 124:
            raise subprocess.TimeoutExpired(words, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


def output_of(*command) -> str:
    """What a command prints; it must succeed."""
    done = run(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_afresh(*command, cwd=ROOT, ranks: int = 0, timeout: int = 300,
               **environment) -> subprocess.CompletedProcess:
    """The same in a new interpreter or under torchrun, as a user starts it."""
    return subprocess.run(started(*command, ranks=ranks), cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env=environment_of(**environment))


def started(*command, ranks: int = 0) -> list[str]:
    """The words that start a script as a user does: with python, or with torchrun."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return start + [str(word) for word in command]
