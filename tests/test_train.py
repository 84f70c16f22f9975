"""train.py: one process against two, a run against its continuation, every gradient against the obvious one."""
import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

import train
from plumbing.checkpoint import load_llama, load_tensors
from model import Llama, LlamaConfig
from plumbing.family import open_family
from space import cost
from tests.miniature import bytes_of, gradients, parts
from tests.processes import ROOT, run


def test_dense_step_is_the_plain_loop(demo):
    """Catches a loss divided twice, targets off by one, or a router that interferes with a dense run."""
    model, _, shards, args = parts(*demo, budgets=(1.0,))
    train.train_step(model, model, None, shards, 3, args, torch.device("cpu"))
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    x, y = shards.batch(3, 8, 0, 8)
    F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).backward()
    for n, p in model.named_parameters():
        assert torch.allclose(got[n], p.grad, rtol=1e-4, atol=1e-7), n


def test_elastic_step_is_the_sum_of_its_budgets(demo):
    """Catches budgets that share tokens, lose their weight in the mean, or gates and modulation whose gradient does not
    reach the router: the obvious graph, all in one, must give the same gradients."""
    for soft_prob in (0.0, 1.0):
        model, router, shards, args = parts(*demo, budgets=(0.5, 1.0, 0.8), soft_prob=soft_prob)
        other_model, other_router = copy.deepcopy(model), copy.deepcopy(router)
        train.train_step(model, model, router, shards, 0, args, torch.device("cpu"))
        tau, kappa, _ = train.schedule(0, args)
        total = 0
        for i, b in enumerate((0.5, 0.8, 1.0)):
            x, y = shards.batch(0, 24, 8 * i, 8 * i + 8)
            choice = other_router.sample(b, 0, tau, kappa)
            kwargs = {}
            if b < 1:
                kwargs = dict(factors=other_router.modulation(choice.subnet))
                kwargs |= dict(gates=other_router.space.gates(choice.marginals)) if soft_prob else dict(
                    subnet=choice.subnet)
            total = total + other_model(x, y, **kwargs)[1] / 3
        total.backward()
        want = gradients(other_model, other_router)
        got = gradients(model, router)
        assert want.keys() == got.keys() and (soft_prob > 0) == any(n.startswith("axes") for n in got)
        for n in want:
            assert torch.allclose(got[n], want[n], rtol=2e-3, atol=1e-6), n


def test_every_tensor_gets_a_gradient(demo):
    """Invariant 6. Catches an axis whose gate is dropped, and a modulation branch that is never used."""
    model, router, shards, args = parts(*demo, soft_prob=1.0)
    train.train_step(model, model, router, shards, 0, args, torch.device("cpu"))
    for m in (model, router):
        for n, p in m.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, n


def test_accumulation_changes_nothing(demo):
    """Catches micro-batches that are summed without their share, or a router graph walked once per micro-batch."""
    grads = []
    for micro in (64, 3, 1):
        model, router, shards, args = parts(*demo, micro_batch=micro)
        train.train_step(model, model, router, shards, 1, args, torch.device("cpu"))
        grads.append(gradients(model, router))
    for other in grads[1:]:
        for n, g in grads[0].items():
            assert torch.allclose(g, other[n], rtol=1e-3, atol=1e-6), n


def test_distillation_is_its_formula(demo):
    """Catches a reversed KL, a KL averaged over the vocabulary, distillation at b = 1."""
    model, _, shards, _ = parts(*demo)
    teacher = Llama(model.config).init_weights(3)
    x, y = shards.batch(0, 2, 0, 2)
    p, q = teacher(x)[0].softmax(-1), model(x)[0].softmax(-1)
    kl = sum((p[b, t] * (p[b, t] / q[b, t]).log()).sum() for b in range(2) for t in range(32)) / 64
    ce = -sum(q[b, t, y[b, t]].log() for b in range(2) for t in range(32)) / 64
    got, logged = train.pass_loss(model, x, y, teacher, 0.3)
    assert abs(got - (0.7 * ce + 0.3 * kl)) < 1e-4 and abs(logged - ce) < 1e-4


def test_same_seed_same_run(demo, tmp_path):
    """Invariant 5. Catches randomness from global state: a second run must give the same bytes, base included."""
    root, flags = demo
    torch.manual_seed(999)
    torch.rand(17)
    train.main(flags + ["--out", str(tmp_path / "out/flex")])
    assert bytes_of(tmp_path / "out/flex") == bytes_of(root / "out/flex")


def test_resume_is_the_run_that_never_stopped(demo, tmp_path, monkeypatch, capsys):
    """Catches a resumed run that replays batches, forgets the optimizer, or starts the schedules again."""
    root, flags = demo
    shutil.copytree(root / "out/base", tmp_path / "out/base")
    step = train.train_step

    def dies(*args, **kwargs):
        if args[4] == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags + ["--out", str(tmp_path / "out/flex")])
    monkeypatch.setattr(train, "train_step", step)
    assert load_tensors(tmp_path / "out/flex/resume.pt")["step"] == 3
    with pytest.raises(SystemExit) as stop:  # without --resume it would be trained over
        train.main(flags + ["--out", str(tmp_path / "out/flex")])
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
    train.main(flags + ["--out", str(tmp_path / "out/flex"), "--resume"])
    assert bytes_of(tmp_path / "out/flex") == bytes_of(root / "out/flex")


def test_second_run_trains_nothing_again(demo, capsys):
    """Catches a demo that trains its base again, or takes a base made with other settings for its own."""
    root, flags = demo
    base, before = (root / "out/base/consolidated.00.pth").stat().st_mtime_ns, bytes_of(root / "out/flex")
    train.main(flags + ["--out", str(root / "out/flex")])
    assert (root / "out/base/consolidated.00.pth").stat().st_mtime_ns == base and bytes_of(root / "out/flex") == before
    said = capsys.readouterr().err
    assert "not trained again" in said and "at step 6" in said and "after" in said
    for changed in (["--base-steps", "9"], ["--base-lr", "1e-4"]):
        with pytest.raises(SystemExit) as stop:
            train.main(flags + changed + ["--out", str(root / "out/flex")])
        assert stop.value.code == 2 and "other settings" in capsys.readouterr().err


def test_full_network_is_a_plain_llama(demo):
    """Invariant 3: out/flex read as a plain Llama is the b = 1 model, and every export of it obeys its budget."""
    root, _ = demo
    family = open_family(root / "out/flex")
    model, router = family.model, family.router
    assert family.member(1.0) == (model, model.full, None)
    for b in (0.2, 0.35, 0.4, 0.55, 0.8, 0.97):
        assert b - 0.05 < cost(model.config, router.route(b)) <= b


@pytest.mark.parametrize("extra", [
    ["--router", "penalty"], ["--router", "uniform"], ["--router", "random"], ["--kd", "0.5"], ["--freeze-backbone"],
    ["--extra-budgets", "1", "--soft-prob", "1"], ["--modulation", "none"],
    ["--units-by", "random"], ["--units-by", "reversed"]])
def test_every_mode_runs_to_its_table(demo, tmp_path, extra, capsys):
    """Catches a mode that crashes at its first save or table; frozen weights that move."""
    root, flags = demo
    train.main(flags + ["--llama", str(root / "out/base"), "--out", str(tmp_path / "flex"), *extra])
    err = capsys.readouterr().err
    assert "after" in err and len([line for line in err.splitlines() if "*" in line and "." in line]) >= 4
    records = [json.loads(line) for line in open(tmp_path / "flex/log.jsonl")]
    assert [r["step"] for r in records if "loss" in r] == list(range(6)) and "argv" in records[0]
    a, b = load_llama(root / "out/base"), load_llama(tmp_path / "flex")
    x = torch.arange(32)[None]
    assert torch.allclose(a(x)[0], b(x)[0], atol=1e-4) == (extra == ["--freeze-backbone"])


@pytest.mark.parametrize("extra,words", [
    (["--budgets", "1.0", "1.2"], "--budgets"), (["--budgets", "0.5"], "1.0"),
    (["--budgets", "1.0", "0.01"], "smallest"), (["--batch-tokens", "250"], "--batch-tokens"),
    (["--data", "nowhere"], "nowhere"), (["--llama", "nowhere"], "nowhere"), (["--dim-choices", "4096"], "4096"),
    (["--router", "magic"], "magic"), (["--log-every", "0"], "--log-every"),
    (["--micro-batch", "-5"], "--micro-batch"),
    (["--calibration-windows", "0"], "--calibration-windows"), (["--tau-end", "0"], "--tau-end"),
    (["--kd", "5"], "--kd"), (["--lr", "nan"], "--lr"), (["--soft-end", "0.05"], "--soft-end"),
    (["--seq-len", "10000000", "--batch-tokens", "10000000"], "tokens")])
def test_bad_input_is_one_line(demo, tmp_path, extra, words, capsys):
    """Catches tracebacks, second lines, and folders left behind by a run that could not start."""
    root, flags = demo
    with pytest.raises(SystemExit) as stop:
        train.main(flags + ["--llama", str(root / "out/base"), "--out", str(tmp_path / "flex")] + extra)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "flex").exists()


def test_the_llama_it_starts_from_is_safe(demo, capsys):
    """Catches an elastic run that is told to write over its own starting point, and an --out that is a file."""
    root, flags = demo
    before = (root / "out/base/consolidated.00.pth").read_bytes()
    (root / "file").write_text("mine")
    for out, words in ((root / "out/base", "starts from"), (root / "file", "file")):
        (root / "out/base/resume.pt").rename(root / "aside")
        with pytest.raises(SystemExit) as stop:
            train.main(flags + ["--llama", str(root / "out/base"), "--out", str(out)])
        (root / "aside").rename(root / "out/base/resume.pt")
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert (root / "out/base/consolidated.00.pth").read_bytes() == before and (root / "file").read_text() == "mine"


def test_other_settings_are_refused(demo, capsys):
    """Catches a run that writes over another one's checkpoint, or resumes it with other settings."""
    root, flags = demo
    before = bytes_of(root / "out/flex")
    for extra in (["--steps", "7"], ["--lr", "1e-5", "--resume"]):
        with pytest.raises(SystemExit) as stop:
            train.main(flags + ["--out", str(root / "out/flex")] + extra)
        assert stop.value.code == 2 and "other settings" in capsys.readouterr().err
    assert bytes_of(root / "out/flex") == before


GRADIENTS = """
import sys, torch, train
from pathlib import Path
from tests.miniature import parts, gradients
root, out, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
args = train.parse_args(flags)
device = train.setup(args.device)
model, router, shards, args = parts(root, flags, budgets=(1.0, 0.8, 0.5))
wrapped = torch.nn.parallel.DistributedDataParallel(model) if train.WORLD > 1 else model
for step in range(2):  # twice: a reducer that was left unfinished complains at the second step
    model.zero_grad(), router.zero_grad()
    result = train.train_step(wrapped, model, router, shards, step, args, device)
if train.RANK == 0:
    torch.save(gradients(model, router), out)
"""


@pytest.mark.parametrize("ranks", [2])
def test_ranks_agree(demo, tmp_path, ranks):
    """Invariant 5. Catches gradients summed instead of averaged, budgets that a skipped layer keeps from synchronising,
    router gradients that stay on their rank, ranks that draw different slices."""
    root, flags = demo
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    grads = []
    for n in (0, ranks):
        done = run(script, root, tmp_path / f"{n}.pt", *flags, ranks=n)
        assert done.returncode == 0, done.stderr[-2000:]
        grads.append(torch.load(tmp_path / f"{n}.pt", weights_only=True))
    assert grads[0].keys() == grads[1].keys()
    llama = [n for n in grads[0] if n.startswith(("layers", "tok", "norm", "output"))]
    # The router as one vector, and less exactly: its softmax subtracts what the gates' gradients have in common.
    for names, tolerance in [([n], 1e-5) for n in llama] + [(sorted(grads[0].keys() - set(llama)), 1e-4)]:
        one, two = (torch.cat([g[n].flatten() for n in names]) for g in grads)
        assert (one - two).norm() <= tolerance * one.norm(), names


def test_torchrun_agrees_with_one_process(demo, tmp_path):
    """Invariant 5, the whole run: base, ranking, router and all, on two processes."""
    root, flags = demo
    done = run(ROOT / "train.py", *flags, "--out", tmp_path / "out/flex", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    read = lambda folder: [json.loads(line) for line in open(folder / "log.jsonl")]
    for stage in ("base", "flex"):
        ours, theirs = [[r["loss"] for r in read(root / "out" / stage) if "loss" in r][:6],
                        [r["loss"] for r in read(tmp_path / "out" / stage) if "loss" in r][:6]]
        for a, b in zip(ours[:5], theirs[:5]):
            assert all(abs(x - y) < 1e-4 for x, y in zip(a, b)), (stage, a, b)
    last = [[r["val"] for r in read(folder / "out/flex") if "val" in r][-1] for folder in (root, tmp_path)]
    assert all(abs(last[0][b] - last[1][b]) < 0.05 for b in last[0])


def test_demo_shape_is_what_the_readme_says():
    """Catches a demo that grows past two cores: 1.6M non-embedding parameters in 8 layers."""
    c = LlamaConfig()
    assert (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.ffn_dim) == (128, 8, 8, 4, 384)


def test_a_llama_2_trains_on_shards_made_elsewhere(demo, tmp_path, capsys, monkeypatch):
    """Catches a SentencePiece tokenizer that stops a run which needs no text, or is lost on the way; where text has to
    be tokenised, one line."""
    root, flags = demo
    for name in ("base", "data"):
        shutil.copytree(root / ("out/base" if name == "base" else "data"), tmp_path / name)
    (tmp_path / "data/tokenizer.model").unlink()
    (tmp_path / "base/tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    flags = TINY + ["--llama", str(tmp_path / "base"), "--out", str(tmp_path / "flex")]
    train.main(flags + ["--data", str(tmp_path / "data")])
    assert (tmp_path / "flex/tokenizer.model").read_bytes() == (tmp_path / "base/tokenizer.model").read_bytes()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(TINY + ["--llama", str(tmp_path / "base"), "--out", str(tmp_path / "other")])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1 and "SentencePiece" in errors[0]
    assert not (tmp_path / "other").exists() and not any(tmp_path.glob("data/pystdlib*"))


def test_a_real_llama_leaves_the_demo_its_corpus(demo, tmp_path, monkeypatch):
    """Catches data/pystdlib made with a Llama's own large tokenizer, which the demo then takes for its own."""
    root, flags = demo
    made = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.prepare.prepare", lambda inputs, folder, tokenizer: made.append(folder) or shutil.copytree(
        root / "data", folder))
    for _ in range(2):
        args = train.parse_args(TINY + ["--llama", str(root / "out/base")])
        folder, *_ = train.open_data(args)
        assert folder == "data/pystdlib-base" and made == [folder]
