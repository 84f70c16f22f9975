"""shard.py: however the Llama lies on the ranks, it is the same run; a checkpoint of one
kind goes on as another."""
import dataclasses

import pytest
import torch

from plumbing.checkpoint import load_tensors, save_tensors
from plumbing.state import with_all_parts
from tests.helpers import MHA, WHOLE, cut_into, one_line_error
from tests.miniature import gradients, log, parts
from tests.processes import ROOT, run, run_afresh


def state_of(folder) -> dict:
    """The state of a run, with the parts of all ranks."""
    return with_all_parts(folder, load_tensors(folder / "resume.pt"))


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
    """Invariant 5. Catches a reducer that waits for a skipped layer, moments that are lost with
    their rank, sums taken for means, a rank that draws another slice, and a checkpoint that
    holds one rank's part."""
    _, folder, flags = alone
    done = run(ROOT / "train.py", *flags, "--shard", kind, "--out", tmp_path / "flex", ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(log(folder, "loss")[:5], log(tmp_path / "flex", "loss")):
        assert all(abs(x - y) < 1e-4 for x, y in zip(a, b)), (a, b)
    one, two = (log(f, "val")[-1] for f in (folder, tmp_path / "flex"))
    assert all(abs(one[b] - two[b]) < 0.05 for b in one)
    one, two = (state_of(f) for f in (folder, tmp_path / "flex"))
    assert one["model"].keys() == two["model"].keys()
    assert all(w.shape == two["model"][k].shape for k, w in one["model"].items())
    shapes = lambda s: [{k: {n: getattr(t, "shape", t) for n, t in of.items()}
                         for k, of in o["state"].items()} for o in s["optimizers"]]
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
    """Catches a checkpoint that only the ranks which wrote it can read, and moments
    given to other parameters."""
    _, folder, flags = alone
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    done = run(script, *flags, "--shard", first[1], "--out", tmp_path / "flex", ranks=first[0])
    assert done.returncode != 0 and load_tensors(tmp_path / "flex/resume.pt")["step"] == 3
    done = run(ROOT / "train.py", *flags, "--shard", then[1], "--out", tmp_path / "flex", "--resume",
               ranks=then[0])
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(log(folder, "loss"), log(tmp_path / "flex", "loss")):
        assert all(abs(x - y) < 5e-4 for x, y in zip(a, b)), (a, b)


GRADIENTS = """
import contextlib, sys, torch, train
import model as elastic
from pathlib import Path
from plumbing.rows import whole
from plumbing.sharding import gathered, load_on_ranks, shard
from tests.miniature import parts
root, out, kind, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
device = train.setup(train.parse_args(flags).device)
elastic.LOSS_TOKENS = 20  # several chunks of logits, the last one shorter
model, router, shards, args = parts(root, flags, budgets=(1.0, 0.8, 0.5), teach_prob=1.0, teach_end=1.0)
wrapped = shard(model, kind, device)
teacher = load_on_ranks(root / "llama", kind, device).requires_grad_(False) if args.kd else None
with gathered(teacher):
    for step in range(3):  # a reducer that was left unfinished complains at the second step
        model.zero_grad(), router.zero_grad()
        train.train_step(wrapped, model, router, shards, step, args, device, teacher)
grads = {n: whole(p.grad) for m in (model, router) for n, p in m.named_parameters() if p.grad is not None}
if train.RANK == 0:
    torch.save(grads, out)
train.finish()
"""


@pytest.mark.parametrize("ranks,kind,kd", [(3, "fsdp", 0), (4, "ddp", 0), (2, "fsdp", 0.5)])
def test_gradients_agree(alone, tmp_path, ranks, kind, kd):
    """Invariant 5, before clipping, with the slices of one process: gradients summed
    instead of averaged, those of a skipped layer taken from an earlier pass, or a teacher
    of which a rank has a part only."""
    root, _, flags = alone
    flags = [*flags, "--kd", kd]
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
        assert (one - two).norm() <= tolerance * one.norm() + rounding, (
            names, (one - two).norm(), one.norm())


STATES = """
import copy, sys, train
from pathlib import Path
from plumbing.sharding import load_model_state, load_optimizer_state, model_state, optimizer_state, shard
from plumbing.state import resume_state, save_state
from tests.helpers import WHOLE, random_llama
out, kind, *sources = sys.argv[1:]
device = train.setup("cpu")
args = train.parse_args(["--device", "cpu", "--shard", kind, "--batch-tokens", "1536"])


def save(folder, model, optimizers):
    moments = [optimizer_state(optimizer) for optimizer in optimizers]
    state = dict(model=model_state(model), optimizers=moments, step=7, settings={})
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_state(folder, state)


def new(seed):
    model = random_llama(WHOLE, seed)
    shard(model, kind, device)
    return model, train.make_optimizers(model, None, args)


if not sources:
    model, optimizers = new(seed=3)
    for p in model.parameters():
        p.grad = 0.5 * p.detach()  # number by number the same, however they are split
    for optimizer in optimizers:
        optimizer.step()
    save(out, model, optimizers)
for source in sources:
    model, optimizers = new(seed=4)
    state = resume_state(source, {}, 7, resume=True)
    load_model_state(model, state["model"])
    for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
        load_optimizer_state(optimizer, moments)
    save(Path(out) / Path(source).name, model, optimizers)
train.finish()
"""
WAYS = [(0, "ddp"), *((ranks, kind) for ranks in (2, 3, 4) for kind in ("ddp", "zero1", "fsdp"))]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """The script, and a folder with the state of one run as every way of sharding writes it."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "states.py").write_text(STATES)
    for ranks, kind in WAYS:
        done = run(folder / "states.py", folder / f"{kind}-{ranks}", kind, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "states.py", folder


def numbers_of(state: dict) -> dict:
    """Every tensor of a state, whole, under the path to it."""
    found = {("model", name): t[:] for name, t in state["model"].items()}
    for k, optimizer in enumerate(state["optimizers"]):
        for i, moments in optimizer["state"].items():
            for name, t in moments.items():
                found[k, i, name] = t[:] if t.shape else t
    return found


@pytest.mark.parametrize("ranks,kind", WAYS)
def test_every_way_goes_on_from_every_other(states, tmp_path, ranks, kind):
    """The whole matrix of kinds and numbers of ranks, to the bit. Catches rows that are joined in
    another order or cut at another place, moments of another parameter, and a rank that writes
    nothing, or what is another's."""
    script, folder = states
    sources = [folder / f"{k}-{n}" for n, k in WAYS]
    done = run(script, tmp_path, kind, *sources, ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    want = numbers_of(state_of(folder / "ddp-0"))
    assert len(want) == 39 + 3 * 39  # weights; two moments and a counter for each
    for source in sources:
        for state in (state_of(source), state_of(tmp_path / source.name)):
            found = numbers_of(state)
            assert found.keys() == want.keys()
            assert all(torch.equal(t, found[path]) for path, t in want.items()), source


@pytest.mark.parametrize("ranks,kind", WAYS)
def test_every_rank_writes_its_part_alone(states, ranks, kind):
    """Catches a rank 0 that gathers what the others have, and ranks that all write everything."""
    _, folder = states
    whole = (folder / "ddp-0/resume.pt").stat().st_size
    sizes = [path.stat().st_size for path in sorted((folder / f"{kind}-{ranks}").rglob("*.pt"))]
    assert len(sizes) == (1 if kind == "ddp" else ranks)
    # of the largest
    share = {"ddp": 1, "zero1": 1 / 3 + 2 / 3 / max(1, ranks), "fsdp": 1 / max(1, ranks)}[kind]
    assert max(sizes) < 1.25 * share * whole + 30_000, (sizes, whole)


BAD_DAYS = """
import os, sys, torch, train
import plumbing.state as states
from pathlib import Path
from plumbing.checkpoint import load_tensors
from plumbing.parallel import RANK
from plumbing.run import NotFinite, write_checkpoint
from plumbing.state import save_state, with_all_parts
folder, last = Path(sys.argv[1]), sys.argv[2]
train.setup("cpu")


def state(step, value):
    rows = torch.full((3, 2), float(value)) + RANK
    return dict(model={"w": rows}, optimizers=[], step=step)


def there():
    torch.distributed.barrier()  # rank 0 writes last
    found = with_all_parts(folder, load_tensors(folder / "resume.pt"))
    return found["step"], found["model"]["w"][:].tolist()


save_state(folder, state(1, 10))
first = there()
save_tensors = states.save_tensors


def full(path, content):
    if RANK == 1:
        raise OSError(28, "No space left on device")
    save_tensors(path, content)


states.save_tensors = full
try:
    save_state(folder, state(2, 20))
    raise AssertionError("no error")
except OSError:
    assert there() == first
states.save_tensors = save_tensors
bad = state(3, 30)
bad["model"]["w"][1, 1] = float("nan") if RANK == 1 else 0
try:
    write_checkpoint(folder, bad, iter(()), None, None, "", None)
    raise AssertionError("no error")
except NotFinite as error:
    assert "such as w," in str(error) and there() == first
save_state(folder, state(4, 40))
assert there() == (4, [[40.0] * 2] * 3 + [[41.0] * 2] * 3)
assert len(list(folder.glob("resume-*"))) == 1


def dies(path, content):
    if path.name == "resume.pt":
        os._exit(9)
    save_tensors(path, content)


if last == "dies":  # the others have written their parts already
    states.save_tensors = dies
save_state(folder, state(5, 50))
train.finish()
"""


@pytest.mark.parametrize("last", ["lives", "dies"])
def test_a_good_state_in_parts_is_replaced_by_a_whole_one(tmp_path, capsys, last):
    """Catches parts of two saves that are taken for one: a rank that is out of room, or has a
    weight that is no number, is told to all; one that dies between the parts and resume.pt leaves
    the last state; and a folder of parts that stays for ever."""
    (tmp_path / "bad_days.py").write_text(BAD_DAYS)
    (tmp_path / "out").mkdir()
    done = run(tmp_path / "bad_days.py", tmp_path / "out", last, ranks=2, timeout=60)
    assert (done.returncode == 0) == (last == "lives"), done.stderr[-2000:]
    state = state_of(tmp_path / "out")
    step, value = (5, 50.0) if last == "lives" else (4, 40.0)
    assert (state["step"] == step
            and state["model"]["w"][:].flatten().tolist() == [value] * 6 + [value + 1] * 6)
    part = next((tmp_path / "out" / load_tensors(tmp_path / "out/resume.pt")["parts"]["folder"]).iterdir())
    save_tensors(part, load_tensors(part) | dict(step=3))
    with one_line_error(capsys, str(part), "of step 3", "delete it"):
        state_of(tmp_path / "out")
    part.unlink()
    with one_line_error(capsys, str(part), "missing"):
        state_of(tmp_path / "out")


PRECISE = """
import sys, torch
import plumbing.parallel
plumbing.parallel.autocast = lambda device: torch.autocast("cpu", torch.bfloat16)  # as on a GPU
import train
from plumbing.rows import whole
from plumbing.sharding import gathered, shard
from tests.helpers import WHOLE, random_llama, tokens_for
kind, out = sys.argv[1:]
device = train.setup("cpu")
model = random_llama(WHOLE)
wrapped = shard(model, kind, device)
with gathered(model):  # outside of autocast, as around the steps
    pass
seen = set()


def see(norm, inputs, x):
    seen.add((inputs[0].dtype, norm.weight.dtype))


for block in model.layers:
    block.ffn_norm.register_forward_hook(see)
tokens = tokens_for(WHOLE, batch=4)
for _ in range(2):  # gradients add up in fp32
    with plumbing.parallel.autocast(device):
        loss = wrapped(tokens[train.RANK::2], tokens[train.RANK::2])[1]
    loss.backward()
grads = {name: whole(p.grad) for name, p in model.named_parameters()}
if train.RANK == 0:
    torch.save(dict(grads=grads, seen=[list(map(str, pair)) for pair in seen]), out)
train.finish()
"""


def test_weights_are_gathered_in_autocasts_dtype(tmp_path):
    """Catches fp32 where bf16 would do, a residual stream in bf16, gradients that are added up in
    bf16, and ones that differ by more than bf16 rounds from those of ddp."""
    (tmp_path / "precise.py").write_text(PRECISE)
    found = {}
    for kind in ("ddp", "fsdp"):
        done = run(tmp_path / "precise.py", kind, tmp_path / f"{kind}.pt", ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
        found[kind] = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
    assert found["ddp"]["seen"] == [["torch.float32", "torch.float32"]]
    assert found["fsdp"]["seen"] == [["torch.float32", "torch.bfloat16"]]
    for name, g in found["ddp"]["grads"].items():
        other = found["fsdp"]["grads"][name]
        assert other.dtype == torch.float32
        assert (other - g).norm() < 0.06 * g.norm(), (name, (other - g).norm() / g.norm())


SPLIT = """
import sys, torch, train
from importance import rank, sort_
from eval import evaluate
from plumbing.parallel import RANK, setup
from plumbing.rows import local
from plumbing.sharding import gathered, load_on_ranks, whole_weights
from tests.helpers import subnets, tokens_for
folder, out = sys.argv[1:]
model = load_on_ranks(folder, "fsdp", setup("cpu"))
kept = sum(local(p).numel() for p in model.parameters())
windows = tokens_for(model.config, batch=5, length=9)
with gathered(model):
    orders = [rank(model, windows, by) for by in ("logits", "influence")]
sort_(model, orders[0])
slices = subnets(model.config)
losses = [evaluate(model, (windows[:, :-1], windows[:, 1:]), slices[name])[0] for name in ("full", "all")]
state = dict(whole_weights(model))
if RANK == 0:
    torch.save(dict(orders=orders, losses=losses, state=state, kept=kept), out)
train.finish()
"""


@pytest.mark.parametrize("config,files,llama2,ranks", [
    (WHOLE, 2, False, 3), (dataclasses.replace(WHOLE, tied=True), 1, False, 2), (MHA, 2, True, 4)])
def test_a_split_llama_is_ranked_and_sorted_as_a_whole_one(tmp_path, config, files, llama2, ranks):
    """Catches rows of another rank, or of another file; tied weights that part; windows that count
    twice, or for nothing, where ranks have not equally many; a part that is sorted as if it were
    all; a rank that keeps it all."""
    cut_into(tmp_path / "llama", files, llama2, config)
    (tmp_path / "split.py").write_text(SPLIT)
    found = []
    for n in (0, ranks):
        done = run(tmp_path / "split.py", tmp_path / "llama", tmp_path / f"{n}.pt", ranks=n)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / f"{n}.pt", weights_only=True))
    one, many = found
    for a, b in zip(one["orders"], many["orders"]):
        assert a["layers"] == b["layers"] and torch.equal(a["dim"], b["dim"])
        for axis in ("n_heads", "ffn_dim"):
            assert all(torch.equal(x, y) for x, y in zip(a[axis], b[axis], strict=True))
    assert one["losses"] == pytest.approx(many["losses"], abs=1e-5)
    assert one["state"].keys() == many["state"].keys()
    assert all(torch.equal(w, many["state"][name]) for name, w in one["state"].items())
    assert many["kept"] < 1.1 * one["kept"] / ranks


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
    """Catches ranks that run different slices: under fsdp they wait for one another for ever, under
    ddp nobody notices. The error names the step and the ranks."""
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
