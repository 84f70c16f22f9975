"""shard.py: however the Llama lies on the ranks, it is the same run; a checkpoint of one kind goes on as another."""
import pytest
import torch

from plumbing.checkpoint import load_tensors
from tests.miniature import gradients, log, parts
from tests.processes import ROOT, run, run_afresh



@pytest.fixture(scope="module")
def alone(odd_start, tmp_path_factory):
    """(root of the demo, folder of a run of one process, its flags)."""
    root, flags = odd_start
    flags = [*flags, "--batch-tokens", "384"]  # 12 sequences: 1, 2, 3 and 4 ranks take equally many
    folder = tmp_path_factory.mktemp("alone") / "flex"
    done = run(ROOT / "train.py", *flags, "--out", folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, folder, flags


# 4 ranks, and 2 of zero1, come below.
@pytest.mark.parametrize("ranks,kind", [(2, "ddp"), (3, "zero1"), (3, "fsdp")])
def test_every_way_is_the_same_run(alone, tmp_path, ranks, kind):
    """Invariant 5. Catches a reducer that waits for a skipped layer, moments that are lost with their rank, sums taken
    for means, a rank that draws another slice, and a checkpoint that holds one rank's part."""
    _, folder, flags = alone
    done = run(ROOT / "train.py", *flags, "--shard", kind, "--out", tmp_path / "flex", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(log(folder, "loss")[:5], log(tmp_path / "flex", "loss")):
        assert all(abs(x - y) < 1e-4 for x, y in zip(a, b)), (a, b)
    one, two = (log(f, "val")[-1] for f in (folder, tmp_path / "flex"))
    assert all(abs(one[b] - two[b]) < 0.05 for b in one)
    one, two = (load_tensors(f / "resume.pt") for f in (folder, tmp_path / "flex"))
    assert one["model"].keys() == two["model"].keys()
    assert all(w.shape == two["model"][k].shape for k, w in one["model"].items())
    shapes = lambda s: [{k: {n: getattr(t, "shape", t) for n, t in of.items()} for k, of in o["state"].items()}
                        for o in s["optimizers"]]
    assert shapes(one) == shapes(two)


DIES = """
import os, sys, train
step = train.train_step
def dies(*args, **kwargs):
    if args[4] == 4:
        os._exit(1)
    return step(*args, **kwargs)
train.train_step = dies
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("first,then", [((2, "fsdp"), (0, "ddp")), ((2, "zero1"), (4, "fsdp")),
                                        ((0, "ddp"), (2, "zero1"))])
def test_resumed_another_way(alone, tmp_path, first, then):
    """Catches a checkpoint that only the ranks which wrote it can read, and moments given to other parameters."""
    _, folder, flags = alone
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    done = run(script, *flags, "--shard", first[1], "--out", tmp_path / "flex", ranks=first[0])
    assert done.returncode != 0 and load_tensors(tmp_path / "flex/resume.pt")["step"] == 3
    done = run(ROOT / "train.py", *flags, "--shard", then[1], "--out", tmp_path / "flex", "--resume", ranks=then[0])
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(log(folder, "loss"), log(tmp_path / "flex", "loss")):
        assert all(abs(x - y) < 5e-4 for x, y in zip(a, b)), (a, b)


GRADIENTS = """
import sys, torch, train
import model as elastic
from pathlib import Path
from plumbing.sharding import shard, whole
from tests.miniature import parts
root, out, kind, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
device = train.setup(train.parse_args(flags).device)
elastic.LOSS_TOKENS = 20  # several chunks of logits, the last one shorter
model, router, shards, args = parts(root, flags, budgets=(1.0, 0.8, 0.5), teach_prob=1.0, teach_end=1.0)
wrapped = shard(model, kind, device)
for step in range(3):  # a reducer that was left unfinished complains at the second step
    model.zero_grad(), router.zero_grad()
    train.train_step(wrapped, model, router, shards, step, args, device)
grads = {n: whole(p.grad) for m in (model, router) for n, p in m.named_parameters() if p.grad is not None}
if train.RANK == 0:
    torch.save(grads, out)
train.finish()
"""


@pytest.mark.parametrize("ranks,kind", [(3, "fsdp"), (4, "ddp")])
def test_gradients_agree(alone, tmp_path, ranks, kind):
    """Invariant 5, before clipping, with the slices of one process: gradients summed instead of averaged, or those of a
    skipped layer taken from an earlier pass."""
    root, _, flags = alone
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    grads = []
    for n in (0, ranks):
        done = run(script, root, tmp_path / f"{n}.pt", kind, *flags, ranks=n)
        assert done.returncode == 0, done.stderr[-2000:]
        grads.append(torch.load(tmp_path / f"{n}.pt", weights_only=True))
    assert grads[0].keys() == grads[1].keys()
    llama = [n for n in grads[0] if n.startswith(("layers", "tok", "norm", "output"))]
    assert len(llama) == 9 * 3 + 3 and any(n.startswith("axes") for n in grads[0])
    # wq's gradients are tiny, what is left when a softmax cancels: hold them to the rounding of the largest
    rounding = torch.finfo(torch.float32).eps * max(grads[0][n].norm() for n in llama)
    for names, tolerance in [([n], 1e-5) for n in llama] + [(sorted(grads[0].keys() - set(llama)), 1e-3)]:
        one, two = (torch.cat([g[n].flatten() for n in names]) for g in grads)
        assert (one - two).norm() <= tolerance * one.norm() + rounding, (names, (one - two).norm(), one.norm())


def test_a_rank_that_dies_takes_the_others_along(alone, tmp_path):
    """Catches ranks that wait for a dead one for ever."""
    _, _, flags = alone
    script = tmp_path / "dies.py"
    script.write_text(DIES.replace("args[4] == 4", "args[4] == 4 and train.RANK == 1"))
    done = run_afresh(script, *flags, "--out", tmp_path / "flex", ranks=2, timeout=60)
    assert done.returncode != 0 and load_tensors(tmp_path / "flex/resume.pt")["step"] == 3


APART = """
import sys, train
from router import Router
sample = Router.sample
def apart(self, budget, step, *rest):
    return sample(self, budget, step + 1000 * (train.RANK == 1 and step == 2), *rest)
Router.sample = apart
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_that_draw_apart_end_at_once(alone, tmp_path, kind):
    """Catches ranks that run different slices: under fsdp they wait for one another for ever, under ddp nobody
    notices. The error names the step and the ranks."""
    _, _, flags = alone
    script = tmp_path / "apart.py"
    script.write_text(APART)
    done = run_afresh(script, *flags, "--shard", kind, "--out", tmp_path / "flex", ranks=2, timeout=60)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [errors[0]] and "at step 2 the ranks 1 drew other slices than rank 0" in errors[0]


def test_activation_checkpointing_changes_nothing(alone):
    """Catches a recomputation under other gates or another slice."""
    root, _, flags = alone
    import train
    grads = []
    for flag in ([], ["--activation-checkpointing"]):
        model, router, shards, args = parts(root, [*map(str, flags), *flag], teach_prob=0.5)
        model.activation_checkpointing = args.activation_checkpointing
        for step in range(2):
            train.train_step(model, model, router, shards, step, args, torch.device("cpu"))
        grads.append(gradients(model, router))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())
