"""--compile: the same gradients, from a bounded number of graphs."""
import shutil

import pytest
import torch

from model import Gates
from plumbing.sharding import compile_blocks, compiled_graphs
from space import Space
from tests.helpers import GQA, close, random_llama, tokens_for
from tests.miniature import log
from tests.processes import ROOT, run

NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"),
                                    reason="torch.compile needs a C++ compiler on CPUs")


def step(model, space: Space, i: int, generator) -> dict:
    """Gradients of a random slice, at every fifth step under soft gates, at every
    fourth of the full network."""
    draw = lambda n: torch.randint(n, (), generator=generator)
    subnet = space.full if i % 4 == 0 or i % 5 == 0 else space.subnet(space.members[draw(len(space.members))])
    factors = (torch.rand(GQA.n_layers, 2, generator=generator).requires_grad_()
               if subnet != space.full else None)
    soft = [g.detach().requires_grad_()
            for g in space.gates(torch.rand(space.onehot.size(1), generator=generator))]
    x = tokens_for(GQA, seed=i)
    model.zero_grad()
    model(x, x, subnet=subnet, gates=Gates(*soft) if i % 5 == 0 else None, factors=factors)[1].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend,steps", [("eager", 60), pytest.param("inductor", 4, marks=NEEDS_COMPILER)])
def test_the_same_gradients_from_few_graphs(backend, steps):
    """Catches a graph that remembers the sizes or the layer it was made for, and one
    graph per size or layer."""
    torch._dynamo.reset()
    plain, compiled, before = random_llama(GQA), random_llama(GQA), compiled_graphs()
    compile_blocks(compiled, backend)
    generators, graphs = [torch.Generator().manual_seed(0) for _ in range(2)], []
    for i in range(steps):
        want, got = (step(m, Space(GQA), i, g) for m, g in zip((plain, compiled), generators))
        assert want.keys() == got.keys()
        assert all(close(got[n], want[n]) for n in want), i
        graphs.append(compiled_graphs() - before)
    assert (6 if steps == 60 else 1) <= graphs[-1] <= 24, "uncompiled, or a graph per size"
    assert (steps < 60 or graphs[-1] - graphs[steps // 2] <= 2), graphs


COMPILED = """
import functools, sys, train
train.show_family = lambda *args: None
train.compile_blocks = functools.partial(train.compile_blocks, backend="eager")
train.main(sys.argv[1:])
"""


def test_a_compiled_run_is_the_same_run(odd_start, tmp_path):
    """Catches blocks compiled after they were sharded, a block recomputed under another slice or
    other gates, a teacher that changes, and a count that nobody prints."""
    flags = [*odd_start[1], "--shard", "fsdp", "--activation-checkpointing", "--kd", "0.5",
             "--budgets", "1.0", "0.6", "--steps", "4", "--eval-every", "100"]
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    plain = run(ROOT / "train.py", *flags, "--out", tmp_path / "plain", ranks=2)
    compiled = run(script, *flags, "--compile", "--out", tmp_path / "compiled", ranks=2)
    assert plain.returncode == compiled.returncode == 0, compiled.stderr[-2000:]
    for one, two in zip(log(tmp_path / "plain", "loss"), log(tmp_path / "compiled", "loss"), strict=True):
        assert all(abs(x - y) < 1e-4 for x, y in zip(one, two)), (one, two)
    counts = [int(line.split()[-2]) for line in compiled.stderr.splitlines() if line.endswith(" graphs")]
    assert counts and 0 < counts[-1] < 40 and not plain.stderr.count(" graphs")
