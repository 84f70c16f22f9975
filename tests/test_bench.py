"""bench/: what is compared is the same computation; what is printed is what was measured."""
import argparse
import ast
import dataclasses
import json

import pytest
import torch

from bench import (
    alone,
    autocast,
    before,
    beside,
    big_export,
    gpu,
    latency,
    loss,
    mutants,
    oracle,
    slices,
    speculative,
    speed,
    steps,
    take_over,
)
from bench.bugs import BUGS, Bug, files_of_tests
from eval import evaluate
from importance import rank, sort_
from model import Llama, LlamaConfig, SubNet
from plumbing.checkpoint import RESUME, load_llama, save_llama, save_tensors
from plumbing.family import FLEX, Member, open_family, router_state
from plumbing.latency import LATENCY_FILE
from space import Space, cost
from tests.helpers import (
    GQA,
    SHAPES,
    close,
    make_supernet,
    one_line_error,
    random_llama,
    random_router,
    subnets,
    tokens_for,
)
from tests.processes import ROOT, output_of

SHAPE = ("--dim 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --ffn-dim 64 --seq-len 16 "
         "--vocab-size 99").split()
SMALL = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=64, vocab_size=99)


# -----------------------------------------------------------------------------
# steps


def test_the_plain_loop_is_the_same_llama():
    """Catches a baseline that is slower, or faster, because it computes something else."""
    config = dataclasses.replace(GQA, rope_factor=8.0)
    ours = random_llama(config)
    plain = steps.PlainLlama(config, 17)
    x = tokens_for(config)
    names = dict(embed="tok_embeddings", out="output", blocks="layers")
    names |= dict(norm1="attention_norm", norm2="ffn_norm")
    names |= {w: f"attention.{w}" for w in ("wq", "wk", "wv", "wo")}
    names |= {w: f"feed_forward.{w}" for w in ("w1", "w2", "w3")}
    theirs = {}
    for name, _ in plain.named_parameters():
        theirs[name] = ".".join(names.get(part, part) for part in name.split("."))
    state = ours.state_dict()
    plain.load_state_dict({name: state[theirs[name]] for name in theirs})
    assert sorted(theirs.values()) == sorted(state)
    losses = [plain(x, x), ours(x, x)[1]]
    for loss in losses:
        loss.backward()
    assert close(*losses)
    grads = dict(ours.named_parameters())
    assert all(close(p.grad, grads[theirs[name]].grad) for name, p in plain.named_parameters())


def test_every_step_learns_and_is_counted():
    """Catches a step that leaves its gradients or weights alone, and soft passes counted as sliced."""
    flags = steps.parse_args(["--batch-tokens", "64", "--seq-len", "16", "--device", "cpu", "--lr", "1e-2"])
    given = (steps.RandomTokens(99, 16), flags, torch.device("cpu"))

    def ours(budgets, soft):
        return steps.OurStep(steps.fresh_llama(SMALL, given[-1]), *given, budgets, soft)
    compared = dict(
        plain=steps.plain_step(SMALL, *given),
        dense=ours([1.0], 0.0),
        sliced=ours([1.0, 0.5], 0.0),
        soft=ours([1.0, 0.5], 1.0))
    for name, step in compared.items():
        losses = [step(0) for _ in range(25)]
        assert losses[-1] < losses[0] - 0.1, name
    assert compared["dense"].costs[-1] == compared["soft"].costs[-1] == 1
    assert 0.6 < compared["sliced"].costs[-1] <= 0.75


def test_mfu():
    """Catches FLOPs counted by hand otherwise: 6 per weight that multiplies, attention on half
    its square."""
    c = LlamaConfig(dim=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=6, ffn_dim=16, vocab_size=10)
    T = 5
    norms = 7 * 8
    blocks = 3 * (8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 16) + norms
    # layers, heads, q k and p v of the causal half, multiply and add
    scores = 3 * 2 * (2 * 6 * T * T / 2) * 2
    flops = 6 * blocks + 3 * scores / T
    output = 6 * 8 * 10
    card = "NVIDIA H100 80GB HBM3"
    assert steps.mfu(c, T, 1e12, card) == pytest.approx((flops + output) * 1e12 / 989e12)
    # A slice runs a share of the blocks, and all of the output.
    assert steps.mfu(c, T, 1e12, card, 0.25) == pytest.approx((flops / 4 + output) * 1e12 / 989e12)
    assert steps.mfu(c, T, 1e12, "cpu") is None


def test_tokens_of_all_budgets_count(monkeypatch):
    """Catches an elastic step of four passes that is credited with the tokens of one, and warm-up
    that counts."""
    flags = steps.parse_args(["--batch-tokens", "32", "--seq-len", "16", "--device", "cpu"])
    took = iter([100.0] * 2 * 4 + [2.0, 4.0, 8.0, 16.0])

    def seconds(run, device):
        run()
        return next(took)
    monkeypatch.setattr(steps, "seconds", seconds)
    speeds, costs = steps.measure_steps(SMALL, flags, torch.device("cpu"), 1)
    assert speeds == {"plain": [16], "dense": [8], "elastic": [16], "soft .25": [8]}
    assert costs["plain"] == costs["dense"] == 1 and costs["elastic"] < 1


def test_two_precisions_on_the_same_tokens(demo_data, tmp_path, capsys, monkeypatch):
    """Catches a bf16 step that runs in fp32, other tokens or slices for the two, and a time upside
    down: the first step starts from the same weights, so its losses differ by rounding alone."""
    took = iter([9.0, 9.0, 1.0, 4.0, 2.0, 4.0, 1.0, 3.0])

    def seconds(run, device):
        run()
        return next(took)
    monkeypatch.setattr(autocast, "seconds", seconds)
    llama = dataclasses.replace(SMALL, vocab_size=560)
    save_llama(tmp_path / "llama", llama, random_llama(llama).state_dict())
    flags = ["--llama", str(tmp_path / "llama"), "--data", str(demo_data), "--batch", "2", "--seq-len", "16"]
    autocast.main([*flags, "--rounds", "4", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ratio"] == 3 and [row["step"] for row in found["rows"]] == [0, 1, 2, 3]
    differences = [row["bfloat16"] - row["float32"] for row in found["rows"]]
    assert all(0 < abs(difference) < 0.01 for difference in differences), differences
    assert found["rows"][3]["float32"] != found["rows"][0]["float32"]
    with one_line_error(capsys, "--data"):
        autocast.main(["--llama", str(tmp_path / "llama")])


# -----------------------------------------------------------------------------
# everything that wants a GPU


def test_the_parts_of_a_gpu_run_on_toys(tmp_path, capsys):
    """Catches a part that fails, a row that is lost, a table that leaves one out."""
    parts = ["steps-100M-checkpointing", "slices"]
    gpu.main(["--device", "cpu", "--toy", "--minutes", "60", "--out", str(tmp_path), "--parts", *parts])
    capsys.readouterr()
    found = json.loads((tmp_path / "gpu.json").read_text())
    stepped, sliced = found["parts"]
    assert stepped["error"] is None and sliced["error"] is None
    dense, elastic = stepped["rows"]
    assert dense["step"] == "dense" and dense["cost"] == 1 and elastic["cost"] < 1 and dense["checkpointing"]
    assert 0.8 < dense["planned"] / dense["peak"] < 1.2 and dense["tokens_per_second"] > 0
    ways = {(row["budget"], row["way"]) for row in sliced["rows"]}
    assert ways == {(1.0, "full")} | {(b, way) for b in (0.8, 0.6, 0.4)
                                      for way in ("sliced", "masked", "exported")}
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("| 100M | `--activation-checkpointing` |") == 2 and page.count("| 1B |") == 10


# In place of a part: it prints a row and half of another, then fails, or works for ever.
ROWS = "import sys, time; print('{\"size\": 1}'); print('{\"si', end='', flush=True); "
FAILS = ROWS + "sys.exit('no such kernel')"
HANGS = ROWS + "time.sleep(60)"


def test_a_part_that_fails_is_reported_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    """Catches a failed part that stops those behind it or goes unsaid, rows that are lost with it,
    a part that takes the others' time, and an exit status that says all is well."""
    started = {}
    popen = gpu.subprocess.Popen

    def child(words, **how):
        name = words[words.index("--part") + 1]
        started[name] = popen([words[0], "-c", FAILS if name == "tests" else HANGS], **how)
        return started[name]
    monkeypatch.setattr(gpu.subprocess, "Popen", child)
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cpu", "--toy", "--out", str(tmp_path), "--minutes", "0.1",
                  "--parts", "tests", "slices", "deployed"])
    assert stop.value.code == 1 and list(started) == ["tests", "slices", "deployed"]
    assert all(process.poll() is not None for process in started.values()), "a part works on"
    failed, first, second = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "status 1: no such kernel" in failed["error"]
    for part in (first, second):
        assert "stopped after its" in part["error"]
    assert all(part["rows"] == [{"size": 1}] for part in (failed, first, second))
    # 6 seconds for parts of 65, 40 and 70: what the first one leaves goes to the others
    assert (1 < first["seconds"] < second["seconds"]
            and sum(part["seconds"] for part in (failed, first, second)) < 8)
    assert "no such kernel" in capsys.readouterr().out


def test_the_whole_fits_in_nine_minutes(capsys):
    """Catches parts that hope for more time than there is, and a Llama of a billion parameters on a CPU."""
    assert (sum(seconds for seconds, _ in gpu.PARTS.values())
            == 540 == 60 * gpu.parse_args(["--device", "cuda"]).minutes)
    with one_line_error(capsys, "--toy"):
        gpu.main(["--device", "cpu"])


def test_our_time_over_theirs(capsys, monkeypatch):
    """Catches a time upside down or of another kind, and a traceback where transformers is not installed."""
    times = {"ours": dict(forward=1.0, both=2.0), "theirs": dict(forward=4.0, both=6.0)}
    pairs = {0.6: beside.Pair("ours", "theirs")}
    rows = beside.compare(pairs, lambda model, tokens, device: times[model], None, 3, torch.device("cpu"))
    assert rows == {0.6: {"forward": (0.25, 1.0), "both": (1 / 3, 2.0)}}
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: None)
    with one_line_error(capsys, "pip install transformers"):
        beside.main(SHAPE)


def test_beside_transformers(capsys):
    """Catches weights that lose their place on the way to transformers, a budget or a kind left
    out, and a comparison of two different Llamas."""
    pytest.importorskip("transformers")
    config = dataclasses.replace(SMALL, tied=True, rope_factor=32.0)
    x = tokens_for(config, length=16)
    device = torch.device("cpu")
    pairs = {budget: beside.pair_of(random_llama(config), Space(config).uniform(budget), device, None)
             for budget in (1.0, 0.6)}
    for pair in pairs.values():
        beside.check_same(pair, x, 1e-5)
        for run, kinds in ((beside.run_passes, beside.KINDS[:2]), (beside.run_text, beside.KINDS[2:])):
            for model in pair:
                assert tuple(run(model, x, device)) == kinds
    with pytest.raises(AssertionError, match="losses differ"):
        beside.check_same(beside.Pair(pairs[1.0].ours, pairs[0.6].theirs), x, 1e-5)
    beside.main([*SHAPE, "--rounds", "1", "--json", "--device", "cpu", "--budgets", "1.0", "0.6"])
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [row["budget"] for row in found] == [1.0, 0.6]
    assert all(row[kind] > 0 and row[f"{kind} tok/s"] > 0 for row in found for kind in beside.KINDS)


# -----------------------------------------------------------------------------
# slices and speed


def clock_of(*times: float):
    """In place of seconds: these times, one a call, which a machine that slows down makes 1, 3 and
    7 times as long. The round before them warms up."""
    calls = [1e6 for _ in times]
    for slower in (1, 3, 7):
        calls += [time * slower for time in times]
    left = iter(calls)
    return lambda run, device: next(left)


def test_times_are_ratios_of_the_same_round(monkeypatch):
    """Catches a slice's time over its own, over another kind of pass, over another round, or upside
    down, and a first round that counts."""
    model = random_llama(SMALL)
    found = slices.variants(model, Space(SMALL), Space(SMALL).uniform, [1.0, 0.6], torch.device("cpu"))
    x = tokens_for(SMALL)
    # forward of full, sliced, masked, exported; then forward and backward
    monkeypatch.setattr(slices, "seconds", clock_of(2, 1, 3, 0.5, 8, 2, 10, 1))
    rows = slices.time_variants(found, x, 3, torch.device("cpu"))
    assert [row["forward"] for row in rows.values()] == [1, 0.5, 1.5, 0.25]
    assert [row["both"] for row in rows.values()] == [1, 0.25, 1.25, 0.125]
    assert rows[1.0, "full"]["ms"] == 1000 * 8 * 3
    # cached, recomputed of the full model; of the slice
    monkeypatch.setattr(slices, "seconds", clock_of(2, 16, 1, 4))
    rows = slices.time_generation(model, found, x[0], 3, torch.device("cpu"))
    assert rows == {1.0: dict(cached=1, recomputed=8), 0.6: dict(cached=0.5, recomputed=4)}


def test_speed_over_the_full_model(monkeypatch):
    """Catches a ratio upside down, decode that repeats prefill, and tokens/s of another batch or length."""
    model = random_llama(GQA)
    small = Space(GQA).uniform(0.5)
    # memory's turns first
    slower = iter([1, 1, *(turn for turn in range(1, 8) for size in ("full", "small"))])

    def one_turn(native, tokens, prompt, device):
        now = next(slower)
        return (8 * now, 6 * now) if native.config.dim == GQA.dim else (2 * now, 4 * now)
    monkeypatch.setattr(speed, "one_turn", one_turn)
    (row,), full = speed.speeds(model, [small], 64, 3, torch.device("cpu"))
    assert row["prefill"] == 4 and row["decode"] == 1.5 and row["memory"] < 1
    assert (full["prompt"], full["new"], full["batch"]) == (48, 16, 3)
    assert full["prefill"] == 3 * 48 / (8 * 4) and full["decode"] == 3 * 16 / (6 * 4)


def test_the_tables(capsys):
    """Catches rows that are missing, ratios of nothing, and MFU on a device that has no known peak."""
    slices.main([*SHAPE, "--rounds", "1", "--json", "--device", "cpu"])
    out = json.loads(capsys.readouterr().out)
    ways = [(r["budget"], r["way"]) for r in out["rows"]]
    assert ways[:3] == [(1.0, "full"), (0.8, "sliced"), (0.8, "masked")]
    assert [r["budget"] for r in out["generation"]] == [1.0, 0.8, 0.6, 0.4]
    assert out["generation"][0]["cached"] == 1
    assert all(r["recomputed"] > 0 for r in out["generation"])
    steps.main([*SHAPE, "--rounds", "1", "--json", "--device", "cpu"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["step"] for r in rows] == ["plain", "dense", "elastic", "soft .25"] and rows[1]["ratio"] == 1
    assert all(r["low"] <= r["ratio"] <= r["high"] and r["mfu"] is None for r in rows)
    for main in (slices.main, steps.main):
        with one_line_error(capsys, "heads"):
            main([*SHAPE, "--heads", "3"])
        with one_line_error(capsys, "python -m bench.", "--help"):
            main(["--rounds", "many"])


@pytest.mark.parametrize("cut", slices.CUTS)
def test_what_shrinks(cut, capsys):
    """Catches a depth-only slice with fewer channels, or a width-only one with fewer layers."""
    c = dataclasses.replace(SMALL, n_layers=4)
    subnet = Space(c, slices.choices_of_cut(cut, c)).uniform(0.55)
    assert (len(subnet.layers) == 4 or cut != "width") and (subnet.dim == 64) == (cut == "depth")
    flags = ["--layers", "4", "--rounds", "1", "--json", "--device", "cpu"]
    slices.main([*SHAPE, *flags, "--cut", cut, "--budgets", "0.55"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[1]["cost"] == pytest.approx(cost(c, subnet))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_runs_the_same_slice(shape):
    """Catches a mask or an export that is timed beside a slice and computes something else, or
    has no gradients."""
    config = SHAPES[shape]
    model = random_llama(config)
    space = Space(config)
    x = tokens_for(config)
    found = slices.variants(model, space, space.uniform, [1.0, 0.6], torch.device("cpu"))
    assert list(found) == [(1.0, "full"), (0.6, "sliced"), (0.6, "masked"), (0.6, "exported")]
    want = found[0.6, "sliced"].model(x, subnet=space.uniform(0.6))[0]
    for way in ("sliced", "masked", "exported"):
        variant = found[0.6, way]
        assert close(variant.model(x, **variant.arguments)[0], want), way
        variant.model(x, x, **variant.arguments)[1].backward()
    assert all(p.grad is not None for p in found[0.6, "exported"].model.parameters())


@pytest.mark.parametrize("kd", [False, True])
def test_the_plain_loss_is_the_one_in_chunks(monkeypatch, kd):
    """Catches two ways that are timed side by side and compute different things."""
    monkeypatch.setattr("model.LOSS_TOKENS", 7)
    args = argparse.Namespace(tokens=20, vocab_size=99, dim=8, kd=kd)
    (_, _, plain), (_, _, chunks) = (loss.measure(way, args) for way in ("plain", "chunks"))
    assert plain == pytest.approx(chunks, rel=1e-6) and plain > 1


def test_a_native_slice_has_the_dtype_of_its_device():
    """Catches a slice that is timed in another dtype than it is deployed in, or that shares the
    model's storage."""
    model = random_llama(GQA)
    subnet = subnets(GQA)["per layer"]
    native = speed.native_llama(model, subnet, torch.device("cpu"))
    assert native.config == subnet.config(GQA)
    assert {p.dtype for p in native.parameters()} == {torch.float32}
    assert not {p.data_ptr() for p in native.parameters()} & {p.data_ptr() for p in model.parameters()}
    native = speed.native_llama(model, subnet, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in native.parameters()} == {torch.bfloat16}


# -----------------------------------------------------------------------------
# before, alone, oracle


@pytest.fixture
def family(tmp_path, demo_data):
    """A base, and a family in flex/ whose router is random and whose weights are other ones."""
    base = random_llama(dataclasses.replace(GQA, vocab_size=560, context=16))
    save_llama(tmp_path / "base", base.config, base.state_dict())
    orders = rank(base, tokens_for(base.config, batch=4))
    other = random_llama(base.config, seed=5)
    router = random_router(base.config)
    router.budgets = [0.5, 1.0]
    router.space.order_layers(orders["layers"])
    save_llama(tmp_path / "flex", base.config, other.state_dict())
    flex = router_state(router, seq_len=16, data=str(demo_data), eval_windows=4)
    save_tensors(tmp_path / "flex" / FLEX, flex)
    save_tensors(tmp_path / "flex" / RESUME, dict(orders=orders))
    return tmp_path


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    """A folder of shards of a little text."""
    from data.prepare import prepare
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for i in range(30):
        lines = (ROOT / "model.py").read_text()[500 * i:500 * i + 2000]
        (folder / f"text/{i}.py").write_text(lines)
    prepare([str(folder / "text")], str(folder / "shards"), vocab_size=560)
    return folder / "shards"


def test_before_and_alone_are_slices_of_the_sorted_base(family, capsys):
    """Catches slices of the trained weights, of the unsorted base, and starting points of another shape."""
    flags = ["--model", str(family / "flex"), "--base", str(family / "base")]
    before.main([*flags, "--budgets", "1.0", "0.7", "0.5", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 16 and [row["budget"] for row in found["rows"]] == [1.0, 0.7, 0.5]

    base = load_llama(family / "base")
    sort_(base, torch.load(family / "flex" / RESUME, weights_only=True)["orders"])
    opened = open_family(family / "flex")
    shards = before.Shards(opened.saved["data"], "val", 16, base.config.vocab_size)
    val = shards.windows(4)
    for row in found["rows"]:
        subnet = opened.router.route(row["budget"])
        assert row["loss"] == evaluate(base, val, subnet)[0] and row["tokens"] == 64
        assert row["layers"] == list(subnet.layers) and row["dim"] == subnet.dim
        assert row["loss"] != evaluate(opened.model, val, subnet)[0]

    alone.main([*flags, "--out", str(family)])
    for budget in (0.5, 1.0):
        cut = load_llama(family / f"cut-{budget:.2f}")
        subnet = opened.router.route(budget)
        assert evaluate(cut, val)[0] == pytest.approx(evaluate(base, val, subnet)[0], rel=1e-5)
        scratch = load_llama(family / f"scratch-{budget:.2f}")
        assert scratch.config == cut.config == subnet.config(base.config)
        assert not close(scratch.output.weight, cut.output.weight)


def test_before_and_alone_need_what_training_left(family, capsys):
    """Catches a traceback for a folder without a resume state, or a base of another shape."""
    with one_line_error(capsys, FLEX, RESUME):
        alone.main(["--model", str(family / "base"), "--base", str(family / "base")])
    other = random_llama(dataclasses.replace(GQA, ffn_dim=96, vocab_size=560))
    save_llama(family / "other", other.config, other.state_dict())
    with one_line_error(capsys, "another shape", "--base"):
        before.main(["--model", str(family / "flex"), "--base", str(family / "other")])


def test_the_oracle_ranks_every_member(family, demo_data, capsys):
    """Catches members that are left out, a rank that is not the choice's, and a best that is not
    the smallest loss."""
    flags = ["--model", str(family / "flex"), "--data", str(demo_data), "--windows", "2"]
    oracle.main([*flags, "--all"])
    first, *members = capsys.readouterr().out.splitlines()
    row = json.loads(first)
    router = open_family(family / "flex").router
    assert row["budget"] == 0.5 and row["members"] == len(members) == len(router.space.feasible(0.5))
    assert row["best"] <= row["choice"] <= row["worst"] and row["best"] <= row["mean"] <= row["worst"]
    dim, heads, ffn, layers = router.space.sizes(router.route(0.5))
    assert members[row["rank"] - 1].endswith(f"dim {dim} heads {heads} ffn {ffn} layers {layers}")
    losses = [float(line.split()[2]) for line in members]
    assert losses == sorted(losses)
    with one_line_error(capsys, FLEX):
        oracle.main(["--model", str(family / "base"), "--data", str(demo_data)])


# -----------------------------------------------------------------------------
# latency, big_export


def test_a_table_is_measured_and_checked(tmp_path, capsys):
    """Catches a command that prints without writing its table, and a check on sizes that the
    folder does not have."""
    _, router = make_supernet(tmp_path / "flex", GQA)
    latency.main(["--model", str(tmp_path / "flex"), "--rounds", "1", "--slices", "3", "--device", "cpu"])
    assert capsys.readouterr().out.count("%") == 3
    assert (tmp_path / "flex" / LATENCY_FILE).is_file()
    choices = router.space.choices
    for subnet in latency.random_slices(4, choices, 3):
        assert subnet.dim in choices["dim"] and len(subnet.layers) == 4
        assert set(subnet.n_heads) <= set(choices["n_heads"])
        assert set(subnet.ffn_dim) <= set(choices["ffn_dim"])
    with one_line_error(capsys, "--rounds"):
        latency.main(["--model", str(tmp_path / "flex"), "--rounds", "0"])


def test_a_big_export_in_small(monkeypatch, capsys):
    """Catches a supernet that export.py cannot read, and a peak that is not the export's."""
    monkeypatch.setattr(big_export, "run", output_of)
    big_export.main(["--scale", "16"])
    *said, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert any("got" in line for line in said)
    assert found["source_gb"] > 0 and found["seconds"] > 0 and 0.05 < found["peak_gb"] < 4


def test_a_process_that_fails_is_not_measured():
    """Catches a peak that is read from an export that failed. The one new interpreter of this file:
    without torch."""
    assert big_export.run("-c", "import sys; print(sys.path[-1])").strip()
    with pytest.raises(AssertionError, match="no such budget"):
        big_export.run("-c", "raise SystemExit('no such budget')")


# -----------------------------------------------------------------------------
# drafts, and caches taken over


def test_what_drafting_brings(tmp_path, monkeypatch, capsys):
    """Catches speed upside down, theory by the budget in place of the measured cost, a log that is
    measured again or that is taken for other settings, and a verdict that praises what is
    slower."""
    def fractions(runs, device, rounds):
        for run in runs.values():
            run()
        costs = {("draft", 0.5): 0.25, ("draft", 1.0): 1.0, ("verify", 1): 1.5, ("verify", 3): 2.0,
                 1: 0.8, 3: 1.25}
        return {key: costs[key] for key in runs if key != "full"}
    monkeypatch.setattr(speculative, "fractions", fractions)
    flags = [*SHAPE, "--drafts", "0.5", "--k", "1", "3", "--batch", "2", "--tokens", "12",
             "--prompt-tokens", "4", "--rounds", "1", "--device", "cpu",
             "--log", str(tmp_path / "new/log.jsonl")]

    def said(*more):
        speculative.main([*flags, *more])
        return capsys.readouterr().out.splitlines()
    first = said()
    rows = [line.split() for line in first if line.startswith("  0.50")]
    assert [row[1:3] for row in rows] == [["greedy", "1"], ["greedy", "3"],
                                          ["sampled", "1"], ["sampled", "3"]]
    for row in rows:
        k, (accepted, a_round, cost_of_draft, verify, theory, ours, speed_of_row) = (
            int(row[2]), map(float, row[3:]))
        tokens = sum(accepted ** i for i in range(k + 1))
        assert cost_of_draft == 0.25 and verify == {1: 1.5, 3: 2.0}[k]
        assert theory == pytest.approx(tokens / (k * 0.25 + 1), abs=0.03)
        assert ours == pytest.approx(tokens / (k * 0.25 + verify), abs=0.03)
        assert speed_of_row == {1: 1.25, 3: 0.8}[k] and 1 <= a_round <= k + 1
    assert "the fastest: 0.5 drafts 1 tokens" in first[-1]
    monkeypatch.setattr(speculative, "measure", None)
    assert said() == first
    with pytest.raises(TypeError):
        said("--tokens", "13")
    slow = [speculative.Row(0.5, "greedy", 1, 0.9, 1.9, 0.5, 1.5, 1.27, 0.9, 0.8)]
    assert "does not pay" in speculative.verdict(slow) and "1.27" in speculative.verdict(slow)


def test_later_units_weigh_less():
    """Catches a fade on the wrong side of a matrix: the slice of a faded Llama is closer to the
    whole, on every axis."""
    config = dataclasses.replace(GQA, dim=64, n_heads=8, head_dim=8)
    tokens = tokens_for(config)
    space = Space(config)
    for subnet in subnets(config).values():
        if subnet == SubNet.full(config):
            continue
        errors = []
        for tail in (1.0, 0.02):
            model = speculative.faded(Llama(config).init_weights(), space, tail)
            whole = model(tokens)[0]
            errors.append(((model(tokens, subnet=subnet)[0] - whole).norm() / whole.norm()).item())
        assert errors[1] < 0.5 * errors[0], subnet


def test_what_a_cache_taken_over_costs():
    """Catches a second half that sees nothing of the first, the wrong one of the two as the reader,
    and a mean over other tokens: against forwards without a cache."""
    model = random_llama(SHAPES["mha"])
    members = {name: Member(model, subnet) for name, subnet in subnets(model.config).items()}
    x, y = tokens_for(model.config, 20, 12), tokens_for(model.config, 20, 12, seed=5)
    whole, slim = members["full"], members["neurons"]
    with torch.no_grad():
        logits = model(x, subnet=slim.subnet)[0][:, 6:].double()
    want = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y[:, 6:], reduction="none").mean(1)
    own = take_over.losses(slim, slim, x, y)
    assert close(own.double(), want)
    taken = take_over.losses(whole, slim, x, y)
    assert taken.shape == (20,) and not close(taken, own, 1e-2)
    assert take_over.losses(whole, members["heads"], x, y) is None


# -----------------------------------------------------------------------------
# planted bugs


def test_every_bug_can_be_planted():
    """Catches a list that has rotted: a bug whose text is no longer in the code, or is there twice;
    one that no Python would compile, that changes nothing, or that no test is named for."""
    assert sum(map(len, BUGS.values())) >= 80
    for file, bugs in BUGS.items():
        text = (ROOT / file).read_text()
        assert len({bug.breaks for bug in bugs}) == len(bugs), file
        for bug in bugs:
            with_bug = mutants.planted(text, bug, file)
            assert with_bug != text, bug
            ast.parse(with_bug, file)
        for test in files_of_tests(file):
            assert (ROOT / test).is_file(), test


def test_bugs_are_killed_or_survive(tmp_path, monkeypatch, capsys):
    """Catches a bug that is run on the sound tree, stays in it for the next one, or is called
    killed because the tests fail anyway; an endless loop that is waited for."""
    (tmp_path / "tests").mkdir()
    code = "def double(x):\n    y = x + x\n    return y\n"
    (tmp_path / "twice.py").write_text(code)
    test = "from twice import double\n\ndef test_two():\n    assert double(2) == 4\n"
    (tmp_path / "tests/test_twice.py").write_text(test)
    bugs = [Bug("x + x", "x + x + 1", "one too many"), Bug("x + x", "x * x", "a square"),
            Bug("x + x", "2 * x", "a product", equivalent="it is the same number"),
            Bug("    y = x", "    while True:\n        pass\n    y = x", "an endless loop")]
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "BUGS", {"twice.py": bugs})
    monkeypatch.setattr(mutants, "files_of_tests", lambda file: ["tests/test_twice.py"])
    with pytest.raises(SystemExit) as stop:
        mutants.main(["--jobs", "2", "--limit", "6"])
    said = capsys.readouterr().out
    short, *rows = [line.strip("| ").split(" | ")[1:]
                    for line in said.splitlines() if line.startswith("| `twice.py`")]
    assert rows == [["one too many", "test_twice: test_two"], ["a square", "SURVIVED"],
                    ["a product", "nobody can tell: it is the same number"], ["an endless loop", "the clock"]]
    assert short == ["4", "2", "1", "1", "2"] and stop.value.code == 1
    assert (tmp_path / "twice.py").read_text() == code
    with one_line_error(capsys, "minus", "0 times"):
        mutants.planted(code, Bug("x - x", "x", "minus"), "twice.py")
    (tmp_path / "twice.py").write_text(code.replace("x + x", "x"))
    monkeypatch.setattr(mutants, "BUGS", {"twice.py": [Bug("y = x", "y = 3", "three")]})
    with one_line_error(capsys, "test_two fails without any bug"):
        mutants.main(["--limit", "6"])
