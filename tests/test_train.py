"""train.py: one process against two, a run against its continuation, every gradient
against the obvious one."""
import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import plumbing.progress as progress
import train
from data.shards import Shards
from importance import sort_
from model import Llama, LlamaConfig
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from plumbing.family import open_family
from space import AXES, cost
from tests.helpers import close, files_of, one_line_error
from tests.miniature import TINY, bytes_of, gradients, log, parts
from tests.processes import run

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_base")


# -----------------------------------------------------------------------------
# the gradient of one step


def assert_close(got: dict, want: dict, tolerance: float = 1e-4, router_tolerance: float = 1e-3) -> None:
    """The same gradients, tensor by tensor; those of the router as one vector,
    because some of them cancel."""
    assert got.keys() == want.keys()
    llama = [n for n in want if n.startswith(("layers", "tok", "norm", "output"))]
    rest = sorted(want.keys() - set(llama))
    groups = [([n], tolerance) for n in llama]
    if rest:
        groups.append((rest, router_tolerance))
    for names, allowed in groups:
        a, b = (torch.cat([g[n].flatten() for n in names]) for g in (got, want))
        assert (a - b).norm() <= allowed * b.norm(), names


def test_dense_step_is_the_plain_loop(random_start):
    """Catches a loss divided twice, targets off by one, or a router that interferes with a dense run."""
    model, _, shards, args = parts(*random_start, budgets=(1.0,))
    args.modulation = "scalar"
    result = train.train_step(model, model, None, shards, 3, args, CPU)
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    x, y = shards.batch(3, 8, 0, 8)
    loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    loss.backward()
    assert_close(got, {n: p.grad for n, p in model.named_parameters()})
    assert result["passes"][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def logit_of(router, budget: float, subnet) -> torch.Tensor:
    """The sum of the logits of a slice's choices, one for each axis."""
    total = 0
    for axis, size, z in zip(AXES, router.space.sizes(subnet), router.space.split(router.logits(budget))):
        total = total + z[router.space.choices[axis].index(size)]
    return total


def slow_gradients(model, router, shards, step: int, args, passes: list[dict],
                   teacher=None) -> tuple[dict, list]:
    """The gradients of the mean loss over budgets, all in one obvious graph; and the
    cross-entropies. passes: what the step says of its own, which are soft and which are pairs."""
    tau, kappa, _ = train.schedule(step, args)
    budgets = sorted(args.budgets)
    n = len(budgets)
    total = 0
    entropies = []
    for i, (budget, one) in enumerate(zip(budgets, passes)):
        x, y = shards.batch(step, 8 * n, 8 * i, 8 * i + 8)
        choice = router.sample(budget, step, tau, kappa, args.penalty)
        how = {}
        if budget < 1 and args.modulation != "none":
            how["factors"] = router.modulation(choice.subnet)
        if one["soft"]:
            how["gates"] = router.space.gates(choice.marginals)
        else:
            how["subnet"] = choice.subnet
        logits = model(x, **how)[0]
        entropy = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss = entropy
        if teacher is not None and budget < 1:
            p = teacher(x)[0].softmax(-1)
            q = logits.softmax(-1)
            kl = (p * (p / q).log()).sum(-1).mean()
            loss = (1 - args.kd) * entropy + args.kd * kl
        if choice.penalty is not None:
            loss = loss + choice.penalty
        if one["other"] is not None:
            with torch.no_grad():
                factors = None if args.modulation == "none" else router.modulation(choice.other)
                logits = model(x, subnet=choice.other, factors=factors)[0]
                worse = F.cross_entropy(logits.flatten(0, 1), y.flatten()) - entropy
            likelier = logit_of(router, budget, choice.other) - logit_of(router, budget, choice.subnet)
            loss = loss + worse * kappa * likelier / 2
        total = total + loss / n
        entropies.append(entropy.item())
    total.backward()
    return gradients(model, router), entropies


@pytest.mark.parametrize("router_mode,changes", [
    ("constrained", dict(teach_prob=0.0)), ("constrained", dict(teach_prob=1.0)),
    ("constrained", dict(teach_prob=0.6, kd=0.3)), ("penalty", dict(teach_prob=0.0, penalty=0.7)),
    ("constrained", dict(teach_prob=1.0, modulation="none")), ("constrained", dict(teach="pairs", kd=0.3)),
    ("constrained", dict(teach="pairs", modulation="none")), ("penalty", dict(teach="pairs", penalty=0.7))])
def test_elastic_step_is_the_sum_of_its_budgets(random_start, router_mode, changes):
    """Catches budgets that share tokens, lose their weight in the mean, or gates and modulation
    whose gradient does not reach the router; distillation at b = 1; a penalty that counts n times:
    the obvious graph, all in one, must give the same gradients."""
    root, flags = random_start
    changes = dict(steps=1000) | changes  # so step 3 is an early one: teach_prob is the share of soft passes
    model, router, shards, args = parts(root, [*flags, "--router", router_mode], (0.5, 1.0, 0.8), **changes)
    other_model, other_router = copy.deepcopy(model), copy.deepcopy(router)
    teacher = None
    if args.kd > 0:
        teacher = Llama(model.config).init_weights(3).requires_grad_(False)
    result = train.train_step(model, model, router, shards, 3, args, CPU, teacher)
    passes = result["passes"]
    assert [p["budget"] for p in passes] == [0.5, 0.8, 1.0]
    taught = [p["soft"] if args.teach == "soft" else p["other"] is not None for p in passes]
    if args.teach_prob in (0.0, 1.0):
        assert taught == [args.teach_prob > 0, args.teach_prob > 0, False]
    want, entropies = slow_gradients(other_model, other_router, shards, 3, args, passes, teacher)
    got = gradients(model, router)
    assert any(n.startswith("axes") for n in got) == (any(taught) or router_mode == "penalty")
    assert_close(got, want)
    assert [p["loss"] for p in passes] == pytest.approx(entropies, rel=1e-5)


def test_a_slice_is_not_compared_with_itself(random_start):
    """Catches a forward that can teach nothing: a router that is certain draws one slice twice."""
    model, router, shards, args = parts(*random_start, teach="pairs", steps=1000)
    with torch.no_grad():
        router.axes["ffn_dim"][2].bias[0] += 100
        for axis in AXES[:2] + AXES[3:]:
            router.axes[axis][2].bias[-1] += 100
    result = train.train_step(model, model, router, shards, 3, args, CPU)
    assert result["passes"][0]["max_p"] > 0.99
    assert [p["other"] for p in result["passes"]] == [None, None]


def test_soft_passes_are_drawn_for_every_budget(random_start):
    """Catches one draw for all budgets or for all steps, and a share of soft passes that
    is not the schedule's."""
    _, _, _, args = parts(*random_start, (1.0, 0.8, 0.6), teach_prob=0.5, steps=10 ** 6)
    drawn = []

    def no_pass(*_, space=None, **__):
        drawn.append(space is not None)
        return torch.zeros(())

    model, router, shards, _ = parts(*random_start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_pass", no_pass)
        patch.setattr(train.Handover, "backward", lambda *_: None)
        for step in range(100):
            train.train_step(model, model, router, shards, step, args, CPU)
    small, large, full = drawn[::3], drawn[1::3], drawn[2::3]
    assert not any(full)
    assert 30 < sum(small) < 70 and 30 < sum(large) < 70
    assert 30 < sum(a != b for a, b in zip(small, large)) < 70


def test_budgets_of_a_step(random_start):
    """Catches extra budgets that are all one, the same in every step, or outside of the trained
    ones; b = 1 that is not the last, where gradients meet."""
    _, flags = random_start
    args = train.parse_args([*flags, "--budgets", "1.0", "0.6", "0.8", "--extra-budgets", "2"])
    drawn = []
    for step in range(50):
        *extra, small, large, full = train.budgets_of_step(step, args)
        assert (small, large, full) == (0.6, 0.8, 1.0)
        drawn += extra
    assert len(set(drawn)) == 100
    assert 0.6 <= min(drawn) < 0.65 and 0.95 < max(drawn) < 1
    assert train.budgets_of_step(7, args)[:2] == drawn[14:16]


def test_every_tensor_gets_a_gradient(random_start):
    """Invariant 6. Catches an axis whose gate is dropped, and a modulation branch that is never used."""
    model, router, shards, args = parts(*random_start, teach_prob=1.0)
    train.train_step(model, model, router, shards, 0, args, CPU)
    for m in (model, router):
        for n, p in m.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, n


def test_accumulation_changes_nothing(random_start):
    """Catches micro-batches that are summed without their share, or a router graph
    walked once per micro-batch."""
    grads = []
    losses = []
    for micro in (64, 3, 1):
        model, router, shards, args = parts(*random_start, micro_batch=micro)
        result = train.train_step(model, model, router, shards, 0, args, CPU)
        assert result["passes"][0]["soft"]
        grads.append(gradients(model, router))
        losses.append([p["loss"] for p in result["passes"]])
    for other, loss in zip(grads[1:], losses[1:]):
        assert_close(other, grads[0])
        assert loss == pytest.approx(losses[0], rel=1e-5)


def test_distillation_is_its_formula(random_start):
    """Catches a reversed KL, a KL averaged over the vocabulary, and the mixed loss under the
    name of cross-entropy."""
    model, _, shards, _ = parts(*random_start)
    teacher = Llama(model.config).init_weights(3)
    x, y = shards.batch(0, 2, 0, 2)
    p, q = teacher(x)[0].softmax(-1), model(x)[0].softmax(-1)
    kl = sum((p[b, t] * (p[b, t] / q[b, t]).log()).sum() for b in range(2) for t in range(32)) / 64
    ce = -sum(q[b, t, y[b, t]].log() for b in range(2) for t in range(32)) / 64
    got, logged = train.pass_loss(model, x, y, teacher, 0.3)
    assert abs(got - (0.7 * ce + 0.3 * kl)) < 1e-4 and abs(logged - ce) < 1e-4


# -----------------------------------------------------------------------------
# bf16, as every run on a GPU


def bf16(device=None):
    """What plumbing.parallel.autocast is on a GPU, on the CPU."""
    return torch.autocast("cpu", torch.bfloat16)


def test_bf16_step_keeps_fp32_what_must_be(random_start, monkeypatch):
    """Catches a step on a GPU that runs in fp32; weights, gradients, gates, factors, logits or
    losses that are rounded to bf16; a cast that cuts a gradient. The fp32 step is the oracle, to
    the precision of bf16."""
    seen = {}
    steps = []
    for cast in (None, bf16):
        model, router, shards, args = parts(*random_start, (1.0, 0.8, 0.5), teach_prob=0.5, kd=0.3,
                                            steps=1000)
        teacher = Llama(model.config).init_weights(3).requires_grad_(False)
        losses = []
        if cast:
            monkeypatch.setattr(train, "autocast", cast)
            loss_of = train.pass_loss
            gates_of = router.space.gates

            def pass_loss(*rest, **more):
                if more["factors"] is not None:
                    seen["factors"] = more["factors"]
                losses.extend(loss_of(*rest, **more))
                return losses[-2:]

            def gates(marginals):
                seen["marginals"] = marginals
                return gates_of(marginals)

            monkeypatch.setattr(train, "pass_loss", pass_loss)
            monkeypatch.setattr(router.space, "gates", gates)
            block = model.layers[0]
            block.feed_forward.neurons.register_forward_hook(lambda *call: seen.update(neurons=call[2]))
            block.register_forward_hook(lambda *call: seen.update(stream=call[2]))
            entropy, divergence = F.cross_entropy, F.kl_div

            def cross_entropy(logits, *rest, **more):
                seen["logits"] = logits
                return entropy(logits, *rest, **more)

            def kl_div(here, teachers, **more):
                seen.update(log_p=here, teacher=teachers)
                return divergence(here, teachers, **more)

            monkeypatch.setattr(F, "cross_entropy", cross_entropy)
            monkeypatch.setattr(F, "kl_div", kl_div)
        result = train.train_step(model, model, router, shards, 1, args, CPU, teacher)
        assert [p["soft"] for p in result["passes"]] == [True, False, False]
        steps.append((gradients(model, router), result["passes"], losses))
    (want, exact, _), (got, rounded, losses) = steps

    # What runs in which precision.
    assert seen.pop("neurons").dtype == torch.bfloat16
    assert {name: t.dtype for name, t in seen.items()} == dict.fromkeys(
        ("factors", "marginals", "stream", "logits", "log_p", "teacher"), torch.float32)
    assert {loss.dtype for loss in losses} == {torch.float32}
    for m in (model, router):
        assert {p.dtype for p in m.parameters()} == {p.grad.dtype for p in m.parameters()} == {torch.float32}

    # The same slices, losses and gradients, but for the rounding.
    for a, b in zip(rounded, exact):
        assert a["subnet"] == b["subnet"] and a["max_p"] == b["max_p"]
        assert 0 < abs(a["loss"] - b["loss"]) < 0.01 * b["loss"]
    assert_close(got, want, 0.05, 0.05)


# -----------------------------------------------------------------------------
# a family's run, watched


@pytest.fixture(scope="module")
def watched(random_start, tmp_path_factory):
    """What a run with distillation did: the windows that ranked, the orders they gave, every step,
    every pass's teacher, every evaluation, and the rows of the table."""
    _, flags = random_start
    out = tmp_path_factory.mktemp("watched") / "flex"
    did = SimpleNamespace(out=out, ranked=[], steps=[], teachers=[], evaluated=[], rows=[])
    rank = train.rank
    train_step = train.train_step
    run_pass = train.run_pass
    evaluate = progress.evaluate
    table = progress.before_after_table

    def watched_rank(model, windows, *rest):
        orders = rank(model, windows, *rest)
        did.ranked.append((windows, orders))
        return orders

    def watched_step(wrapped, model, router, shards, *rest):
        layer_order = list(router.space.layer_order)
        weights = copy.deepcopy(model.state_dict())
        result = train_step(wrapped, model, router, shards, *rest)
        subnets = [p["subnet"] for p in result["passes"]]
        splits = {path.name.split("_")[0] for path in shards.paths}
        did.steps.append(SimpleNamespace(layer_order=layer_order, weights=weights, subnets=subnets,
                                         splits=splits, model=model))
        return result

    def watched_pass(*rest, teacher=None, **more):
        did.teachers.append((teacher, teacher and copy.deepcopy(teacher.state_dict())))
        return run_pass(*rest, teacher=teacher, **more)

    def watched_evaluate(model, windows, *rest):
        did.evaluated.append(windows)
        return evaluate(model, windows, *rest)

    def watched_table(rows, *rest):
        did.rows += rows
        return table(rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "rank", watched_rank)
        patch.setattr(train, "train_step", watched_step)
        patch.setattr(train, "run_pass", watched_pass)
        patch.setattr(progress, "evaluate", watched_evaluate)
        patch.setattr(progress, "before_after_table", watched_table)
        train.main([*flags, "--kd", "0.3", "--calibration-windows", "6", "--modulation-lr", "0.05",
                    "--out", str(out)])
    return did


def test_every_split_has_its_role(watched, random_start):
    """Catches units that are ranked on validation text, a loss of training text in the table,
    training on the text that judges it."""
    root, _ = random_start
    train_windows = Shards(root / "data", "train", 32, 600).windows(6)
    val_windows = Shards(root / "data", "val", 32, 600).windows(8)
    (ranked, _), = watched.ranked
    assert torch.equal(ranked, train_windows[0])
    assert all(step.splits == {"train"} for step in watched.steps)
    # Validation at steps 3 and 6 of four budgets, a warm-up, seven rows before and after.
    assert len(watched.evaluated) == 2 * 4 + 1 + 2 * 7
    for x, y in watched.evaluated:
        assert torch.equal(x, val_windows[0]) and torch.equal(y, val_windows[1])


def test_layers_are_kept_in_the_order_of_the_ranking(watched):
    """Catches a router that keeps the first layers, whatever the ranking says: in training, in
    flex.pt, in the table."""
    (_, orders), = watched.ranked
    order = orders["layers"]
    assert sorted(order[:2]) != [0, 1] and sorted(order[:3]) != [0, 1, 2], "this order proves nothing"
    subnets = [row["layers"] for row in watched.rows]
    for step in watched.steps:
        assert step.layer_order == order
        subnets += [subnet.layers for subnet in step.subnets]
    assert {len(layers) for layers in subnets} == {2, 3, 4}
    for layers in subnets:
        assert sorted(layers) == sorted(order[:len(layers)])
    assert open_family(watched.out).router.space.layer_order == order


def test_the_teacher_is_the_frozen_base(watched, random_start):
    """Catches distillation at b = 1, and a teacher that is the model in training or moves with it."""
    root, _ = random_start
    base = load_llama(root / "llama").state_dict()
    assert len(watched.teachers) == 6 * 4
    for i, (teacher, weights) in enumerate(watched.teachers):
        if i % 4 == 3:  # passes go from the smallest budget to the largest
            assert teacher is None
        else:
            assert all(torch.equal(weights[name], w) for name, w in base.items())
            assert not any(p.requires_grad for p in teacher.parameters())
            assert teacher is not watched.steps[0].model
    first, last = (watched.steps[i].weights["layers.0.attention.wq.weight"] for i in (0, -1))
    assert not torch.equal(first, last), "nothing moved, so this proves nothing"


def test_the_family_starts_as_its_base_sorted(watched, random_start):
    """Catches a run that trains the unsorted Llama, or sorts it twice."""
    root, _ = random_start
    (_, orders), = watched.ranked
    want = load_llama(root / "llama")
    sort_(want, orders)
    for name, w in want.state_dict().items():
        assert torch.equal(watched.steps[0].weights[name], w), name


def test_before_and_after(watched, random_start):
    """Catches a "before" of the unsorted base or of the trained weights, one under the family's
    modulation, an "after" or a validation without it, and two columns that changed places."""
    root, _ = random_start
    (_, orders), = watched.ranked
    base = load_llama(root / "llama")
    sort_(base, orders)
    family = open_family(watched.out)
    x, y = Shards(root / "data", "val", 32, 600).windows(8)
    assert [row["budget"] for row in watched.rows] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    for row in watched.rows:
        member = family.member(row["budget"])
        with torch.no_grad():
            before = base(x, y, subnet=member.subnet)[1].item()
            after = family.model(x, y, subnet=member.subnet, factors=member.factors)[1].item()
        assert row["before"] == pytest.approx(before, rel=1e-5)
        assert row["loss"] == pytest.approx(after, rel=1e-5)
        assert row["got"] == cost(base.config, member.subnet) <= row["budget"]
    last = log(watched.out, "val")[-1]
    for row in watched.rows:
        if str(row["budget"]) in last:
            assert last[str(row["budget"])] == pytest.approx(row["loss"], rel=1e-5)
    assert list(last) == ["1.0", "0.8", "0.6", "0.4"]
    lines = progress.before_after_table(watched.rows, [1.0, 0.4], 256).splitlines()[1:]
    for line, row in zip(lines, watched.rows):
        assert f"{row['before']:7.3f} {row['loss']:7.3f}" in line
        assert ("*" in line) == (row["budget"] in (1.0, 0.4))


def test_the_router_waits_for_its_start(random_start, tmp_path, monkeypatch):
    """Catches a loop that forgets when the router begins: a penalty would teach it from the first step on."""
    _, flags = random_start
    train_step = train.train_step
    moved = []

    def watched_step(wrapped, model, router, *rest):
        signals = (router.axes["dim"][2].bias, router.modulation.out)
        moved.append([p.detach().clone() for p in signals])
        return train_step(wrapped, model, router, *rest)

    monkeypatch.setattr(train, "train_step", watched_step)
    train.main([*flags, "--router", "penalty", "--router-start", "0.5", "--teach-end", "0.9",
                "--out", str(tmp_path / "flex")])
    for part, begins in ((0, 3), (1, 0)):
        same = [torch.equal(a[part], b[part]) for a, b in zip(moved, moved[1:])]
        assert same == [step < begins for step in range(5)]


def test_a_run_under_bf16(random_start, tmp_path, monkeypatch, watched):
    """Catches a ranking that does not survive autocast, as it runs on a GPU, or runs without it;
    weights that are rounded on the way to the file; an evaluation in fp32."""
    _, flags = random_start
    ranked = []
    evaluated = []
    rank = train.rank

    def watched_rank(*rest):
        orders = rank(*rest)
        ranked.append((torch.is_autocast_enabled("cpu"), orders))
        return orders

    def bf16_of_evaluation(device):
        evaluated.append(device)
        return bf16()

    monkeypatch.setattr(train, "rank", watched_rank)
    monkeypatch.setattr(train, "autocast", bf16)
    monkeypatch.setattr(evaluation, "autocast", bf16_of_evaluation)
    train.main([*flags, "--kd", "0.3", "--calibration-windows", "6", "--steps", "1", "--eval-windows", "2",
                "--budgets", "1.0", "0.5", "--out", str(tmp_path / "flex")])
    assert evaluated
    (cast, orders), = ranked
    assert cast
    # Nearly the ranking of fp32: units whose scores are close may change places.
    (_, exact), = watched.ranked
    assert orders["layers"] == exact["layers"]
    assert sorted(orders["dim"].tolist()) == list(range(48))
    best, exact_best = (set(o["dim"][:24].tolist()) for o in (orders, exact))
    assert len(best & exact_best) > 18
    state = load_tensors(tmp_path / "flex/resume.pt")
    assert {w.dtype for w in state["model"].values()} == {torch.float32}
    rounded = [(w - w.bfloat16()).abs().max() == 0
               for name, w in state["model"].items() if "norm" not in name]
    assert not any(rounded)


# -----------------------------------------------------------------------------
# whole runs


def refused(flags, capsys) -> str:
    """What a run that must be refused says: one line that begins with error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


def test_same_seed_same_run(demo, tmp_path):
    """Invariant 5. Catches randomness from global state: a second run must give the
    same bytes, base included."""
    root, flags = demo
    torch.manual_seed(999)
    torch.rand(17)
    train.main([*flags, "--out", str(tmp_path / "out/flex")])
    assert bytes_of(tmp_path / "out/flex") == bytes_of(root / "out/flex")


def test_base_and_family_have_settings_of_their_own(demo):
    """Catches a base that is trained with the family's rate, steps or budgets, and a family
    with those of the base."""
    root, _ = demo
    for stage, steps, peak, budgets in (("base", 8, 3e-3, [1.0]), ("flex", 6, 2e-3, [0.4, 0.6, 0.8, 1.0])):
        records = [json.loads(line) for line in open(root / "out" / stage / "log.jsonl")]
        records = [record for record in records if "loss" in record]
        assert [record["step"] for record in records] == list(range(steps))
        assert max(record["lr"] for record in records) == peak
        assert all(record["budget"] == budgets for record in records)
        assert all(("router" in record["norms"]) == (stage == "flex") for record in records)


def test_resume_is_the_run_that_never_stopped(demo, tmp_path, monkeypatch, capsys):
    """Catches a resumed run that replays batches, forgets the optimizer, or starts the schedules again."""
    root, flags = demo
    flags = [*flags, "--out", str(tmp_path / "out/flex")]
    shutil.copytree(root / "out/base", tmp_path / "out/base")
    step = train.train_step

    def dies(*args, **kwargs):
        if args[4] == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(train, "train_step", step)
    assert load_tensors(tmp_path / "out/flex/resume.pt")["step"] == 3
    assert "--resume" in refused(flags, capsys)  # without --resume it would be trained over
    train.main([*flags, "--resume"])
    assert bytes_of(tmp_path / "out/flex") == bytes_of(root / "out/flex")
    records = [json.loads(line) for line in open(tmp_path / "out/flex/log.jsonl")]
    assert [record["step"] for record in records if "val" in record] == [3, 6], (
        "step 3 was evaluated before it stopped")
    assert [record["step"] for record in records if "loss" in record] == [0, 1, 2, 3, 3, 4, 5]


def test_second_run_trains_nothing_again(demo, capsys):
    """Catches a demo that trains its base again, or takes a base made with other settings for its
    own; a run that writes over another one's checkpoint, or resumes it with other settings."""
    root, flags = demo
    flags = [*flags, "--out", str(root / "out/flex")]
    weights = root / "out/base/consolidated.00.pth"
    written = weights.read_bytes()
    before = bytes_of(root / "out/flex")
    train.main(flags)
    said = capsys.readouterr().err
    assert "not trained again" in said and "at step 6" in said and "after" in said
    for changed in (["--base-steps", "9"], ["--base-lr", "1e-4"], ["--steps", "7"],
                    ["--lr", "1e-5", "--resume"]):
        assert "other settings" in refused(flags + changed, capsys)
    assert weights.read_bytes() == written
    assert bytes_of(root / "out/flex") == before


def test_a_base_whose_weights_lag_behind_its_state(demo, tmp_path):
    """Catches a family made from the weights of the save before the last: a power cut came between
    the state and what follows from it."""
    root, flags = demo
    shutil.copytree(root / "out/base", tmp_path / "out/base")
    base = load_llama(root / "out/base")
    older = {name: weight + 0.01 for name, weight in base.state_dict().items()}
    save_llama(tmp_path / "out/base", base.config, older)
    train.main([*flags, "--out", str(tmp_path / "out/flex"), "--resume"])
    assert bytes_of(tmp_path / "out/flex") == bytes_of(root / "out/flex")
    weights = "out/base/consolidated.00.pth"
    assert (tmp_path / weights).read_bytes() == (root / weights).read_bytes()


def test_a_run_without_its_state_is_left_alone(demo, tmp_path, capsys):
    """Catches a finished family that a second command trains over, after its resume.pt was deleted."""
    root, flags = demo
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out/flex/resume.pt").unlink()
    before = files_of(tmp_path / "out/flex")
    for extra in ([], ["--resume"]):
        assert "a run without its resume.pt" in refused(
            [*flags, "--out", str(tmp_path / "out/flex"), *extra], capsys)
    assert files_of(tmp_path / "out/flex") == before


def test_full_network_is_a_plain_llama(demo):
    """Invariant 3: out/flex read as a plain Llama is the b = 1 model, and every export
    of it obeys its budget."""
    root, _ = demo
    family = open_family(root / "out/flex")
    model, router = family.model, family.router
    assert family.member(1.0) == (model, model.full, None)
    for b in (0.2, 0.35, 0.4, 0.55, 0.8, 0.97):
        got = cost(model.config, router.route(b))
        assert got <= b
        if b in router.budgets:  # between them the largest slice that training prepared may be smaller
            assert b - 0.05 < got


@pytest.mark.parametrize("extra", [
    "--router uniform --units-by random --seed 4", "--router random --units-by reversed --depth-by influence",
    "--extra-budgets 1 --teach-prob 1 --modulation none", "--freeze-backbone"])
def test_every_mode_runs_to_its_table(random_start, tmp_path, extra, capsys, monkeypatch):
    """Catches a mode that crashes at its first save or table; a flag that does not reach the
    ranking; frozen weights that move."""
    root, flags = random_start
    asked = []
    rank = train.rank

    def watched_rank(model, windows, *rest):
        asked.append(rest)
        return rank(model, windows, *rest)

    monkeypatch.setattr(train, "rank", watched_rank)
    flags = [*flags, "--out", str(tmp_path / "flex"), "--steps", "3", *extra.split()]
    train.main(flags)
    err = capsys.readouterr().err
    assert "after" in err and len([line for line in err.splitlines() if "*" in line and "." in line]) >= 4
    args = train.parse_args(flags)
    assert asked == [(args.depth_by, args.units_by, args.seed)]
    records = [json.loads(line) for line in open(tmp_path / "flex/log.jsonl")]
    assert [r["step"] for r in records if "loss" in r] == list(range(3)) and "argv" in records[0]
    a, b = load_llama(root / "llama"), load_llama(tmp_path / "flex")
    x = torch.arange(32)[None]
    assert close(b(x)[0], a(x)[0], 1e-5) == (extra == "--freeze-backbone")


# -----------------------------------------------------------------------------
# flags and mistakes


@pytest.mark.parametrize("flag", ["--lr", "--base-lr", "--router-lr", "--modulation-lr", "--clip",
                                  "--penalty", "--kappa-end", "--weight-decay"])
def test_nothing_is_infinite(capsys, flag):
    """Catches a rate that makes every weight infinite with its first step."""
    for value in ("inf", "nan", "1e999"):
        with one_line_error(capsys, flag):
            train.parse_args([flag, value])


def test_settings_of_the_demo_and_of_the_paper(tmp_path):
    """Catches the demo's settings for a large Llama, a router's rate that does not know the steps,
    a modulation that takes it, more than 8192 tokens in a forward, a teacher for the demo or none
    for a Llama from elsewhere, and a penalty whose soft passes end before it does."""
    args = train.parse_args([])
    assert (args.steps, args.batch_tokens, args.seq_len, args.micro_batch) == (900, 512, 128, 64)
    assert args.lr == 2e-3 and args.router_lr == pytest.approx(1e-3 / 2 ** 0.6) and args.modulation_lr == 1e-3
    assert args.teach_end == 0.45 and train.parse_args(["--steps", "450"]).router_lr == 1e-3
    assert train.parse_args(["--router", "penalty"]).teach_end == 1
    assert args.kd == 0 and train.parse_args(["--kd", "0.3"]).kd == 0.3
    shape = dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, multiple_of=1024, ffn_dim_multiplier=1.3,
                 vocab_size=128256, norm_eps=1e-5, rope_theta=500000.0)
    (tmp_path / "params.json").write_text(json.dumps(shape))
    args = train.parse_args(["--llama", str(tmp_path)])
    assert (args.steps, args.batch_tokens, args.seq_len, args.micro_batch) == (28800, 128 * 4096, 4096, 2)
    assert args.kd == 0.5 and train.parse_args(["--llama", str(tmp_path), "--kd", "0"]).kd == 0
    assert (args.lr == 4e-5 and args.router_lr == pytest.approx(1e-3 / 64 ** 0.6)
            and args.modulation_lr == 1e-3)
    args = train.parse_args(["--llama", str(tmp_path), "--router-lr", "0.01", "--budgets", "0.5", "1", "0.5"])
    assert args.router_lr == 0.01 and args.modulation_lr == 1e-3 and args.budgets == [1.0, 0.5]
    assert train.parse_args(["--modulation-lr", "0.3"]).modulation_lr == 0.3


@pytest.mark.parametrize("extra,words", [
    (["--budgets", "1.0", "1.2"], "--budgets"), (["--budgets", "0.5"], "1.0"),
    (["--budgets", "1.0", "0.01"], "smallest"), (["--batch-tokens", "250"], "--batch-tokens"),
    (["--data", "nowhere"], "nowhere"), (["--llama", "nowhere"], "nowhere"),
    (["--dim-choices", "4096"], "4096"),
    (["--router", "magic"], "magic"), (["--log-every", "0"], "--log-every"),
    (["--micro-batch", "-5"], "--micro-batch"),
    (["--calibration-windows", "0"], "--calibration-windows"), (["--tau-end", "0"], "--tau-end"),
    (["--lr", "-1"], "--lr -1"), (["--steps", "-1"], "--steps -1"),
    (["--steps", "1" + "0" * 400], "--steps 1000"),
    (["--budgets", "1.0", "--extra-budgets", "1"], "--extra-budgets 1"), (["--seed", str(2 ** 64)], "--seed"),
    (["--override"], "--resume"), (["--ranks", "2"], "--dry-run"),
    (["--data", ""], "empty text found for data"),
    (["--kd", "5"], "--kd"), (["--lr", "nan"], "--lr"), (["--teach-end", "0.05"], "--teach-end"),
    (["--seq-len", "10000000", "--batch-tokens", "10000000"], "tokens")])
def test_bad_input_is_one_line(random_start, tmp_path, extra, words, capsys):
    """Catches tracebacks, second lines, and folders left behind by a run that could not start."""
    _, flags = random_start
    assert words in refused([*flags, "--out", str(tmp_path / "flex"), *extra], capsys)
    assert not (tmp_path / "flex").exists()


def test_the_llama_it_starts_from_is_safe(random_start, tmp_path, capsys):
    """Catches an elastic run that is told to write over its own starting point, and
    an --out that is a file."""
    root, flags = random_start
    before = (root / "llama/consolidated.00.pth").read_bytes()
    file = tmp_path / "file"
    file.write_text("mine")
    for out, words in ((root / "llama", "starts from"), (file, "file"),
                       (root / "data", "data that training starts from")):
        assert words in refused([*flags, "--out", str(out)], capsys)
    for name in ("mine", "hf"):  # Llamas that no run has written
        shutil.copytree(root / "odd", tmp_path / name)
    (tmp_path / "hf/params.json").rename(tmp_path / "hf/config.json")
    others = files_of(tmp_path)
    for name, words in (("mine", "a Llama that no run has written"), ("hf", "a Hugging Face folder")):
        assert words in refused([*flags, "--out", str(tmp_path / name)], capsys)
    assert files_of(tmp_path) == others
    (tmp_path / "new/flex.pt").mkdir(parents=True)
    assert "flex.pt is no file" in refused([*flags, "--out", str(tmp_path / "new")], capsys)
    assert (root / "llama/consolidated.00.pth").read_bytes() == before
    assert file.read_text() == "mine"


def test_demo_shape_is_what_the_readme_says():
    """Catches a demo that grows past two cores: 1.6M non-embedding parameters in 8 layers."""
    c = LlamaConfig()
    assert (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.ffn_dim) == (128, 8, 8, 4, 384)


def test_a_llama_2_trains_on_shards_made_elsewhere(random_start, tmp_path, capsys, monkeypatch):
    """Catches a SentencePiece tokenizer that stops a run which needs no text, or is lost on the
    way; where text has to be tokenised, one line."""
    root, _ = random_start
    shutil.copytree(root / "llama", tmp_path / "llama")
    shutil.copytree(root / "data", tmp_path / "data")
    (tmp_path / "data/tokenizer.model").unlink()
    (tmp_path / "llama/tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    flags = [*TINY, "--steps", "1", "--llama", str(tmp_path / "llama")]
    train.main([*flags, "--out", str(tmp_path / "flex"), "--data", str(tmp_path / "data")])
    assert ((tmp_path / "flex/tokenizer.model").read_bytes()
            == (tmp_path / "llama/tokenizer.model").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.prepare.sysconfig.get_path", lambda name: str(root / "text"))
    assert "SentencePiece" in refused([*flags, "--out", str(tmp_path / "other")], capsys)
    assert not (tmp_path / "other").exists() and not any(tmp_path.glob("data/pystdlib*"))


def test_a_real_llama_leaves_the_demo_its_corpus(random_start, tmp_path, monkeypatch):
    """Catches data/pystdlib made with a Llama's own large tokenizer, which the demo
    then takes for its own."""
    root, _ = random_start
    made = []

    def copies(inputs, folder, tokenizer):
        made.append(folder)
        shutil.copytree(root / "data", folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.prepare.prepare", copies)
    for _ in range(2):
        args = train.parse_args([*TINY, "--llama", str(root / "llama")])
        folder, *_ = train.open_data(args)
        assert folder == "data/pystdlib-llama" and made == [folder]


# -----------------------------------------------------------------------------
# several processes

GRADIENTS = """
import sys, torch, train
from pathlib import Path
from tests.miniature import parts, gradients
root, out, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
device = train.setup("cpu")
model, router, shards, args = parts(root, flags, (1.0, 0.8, 0.5), teach_prob=0.5, steps=1000)
wrapped = torch.nn.parallel.DistributedDataParallel(model) if train.WORLD > 1 else model
for step in range(2):  # twice: a reducer that was left unfinished complains at the second step
    model.zero_grad(), router.zero_grad()
    result = train.train_step(wrapped, model, router, shards, step, args, device)
if train.RANK == 0:
    losses = [p["loss"] for p in result["passes"]]
    torch.save((gradients(model, router), losses), out)
"""


def test_ranks_agree(random_start, tmp_path):
    """Invariant 5. Catches gradients summed instead of averaged, budgets that a skipped layer keeps
    from synchronising, router gradients that stay on their rank, ranks that draw different slices,
    the loss of one rank for that of all."""
    root, flags = random_start
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    found = []
    for ranks in (0, 2):
        done = run(script, root, tmp_path / "out.pt", *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(tmp_path / "out.pt", weights_only=True))
    (one, one_losses), (two, two_losses) = found
    assert any(name.startswith("axes") for name in one)
    # The router less exactly: its softmax subtracts what the gates' gradients have in common.
    assert_close(two, one, 1e-5, 1e-4)
    assert two_losses == pytest.approx(one_losses, rel=1e-5)


MAIN = """
import sys, train
from tests.miniature import SMALL_CONFIG
train.LlamaConfig = SMALL_CONFIG
train.main(sys.argv[1:])
"""


def test_torchrun_agrees_with_one_process(demo, tmp_path):
    """Invariant 5, the whole run: base, ranking, router and all, on two processes."""
    root, flags = demo
    done = run("-c", MAIN, *flags, "--out", tmp_path / "out/flex", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("base", "flex"):
        ours, theirs = (log(folder / "out" / stage, "loss") for folder in (root, tmp_path))
        for a, b in zip(ours[:5], theirs[:5]):
            assert a == pytest.approx(b, abs=1e-4), stage
    ours, theirs = (log(folder / "out/flex", "val")[-1] for folder in (root, tmp_path))
    assert ours == pytest.approx(theirs, abs=0.05)
