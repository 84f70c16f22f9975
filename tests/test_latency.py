"""latency.py: a table of times, interpolated; F(b) by latency; export.py --latency."""
import dataclasses
import functools
import json
import re
import shutil

import numpy as np
import pytest
import torch

import export
import plumbing.latency as timing
from bench import latency as command
from plumbing.checkpoint import save_tensors
from plumbing.family import open_family, router_state
from plumbing.latency import LATENCY_FILE, Latency, fractions, load_latency, measure_latency, save_table, some
from model import SubNet
from plumbing.params import read_config
from space import Space
from tests.helpers import GQA, make_supernet, odd_choices, one_line_error, random_llama, random_router


def invented(subnet: SubNet, n_layers: int = 4) -> float:
    """A machine's time for a slice, in ms: sums of a fixed part and of every layer's parts, linear
    in each width."""
    d = subnet.dim
    return 3 + 0.05 * d + sum(0.4 + 0.02 * d + (0.11 + 0.001 * d) * h + (0.013 + 0.0002 * d) * f
                              for h, f in zip(subnet.n_heads, subnet.ffn_dim))


@pytest.fixture
def machine(monkeypatch):
    """Replaces the clock: a call takes what invented() says of the slice it runs."""
    class Model(torch.nn.Module):
        config = GQA
        tok_embeddings = torch.nn.Embedding(4, 4)
        def forward(self, x, subnet=None):
            Model.ms = invented(subnet or SubNet.full(self.config))
    def seconds(run, device):
        run()
        return Model.ms / 1000
    monkeypatch.setattr(timing, "seconds", seconds)
    return Model()


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    """A supernet's folder without a table of latencies. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("latency") / "flex"
    make_supernet(folder, GQA)
    return folder


@pytest.fixture
def flex(supernet, tmp_path, monkeypatch):
    """A copy of the supernet's folder. The batch that is timed has two windows."""
    shutil.copytree(supernet, tmp_path / "flex")
    batch_for = timing.batch_for
    for module in (timing, command):
        monkeypatch.setattr(module, "batch_for", lambda model, tokens=None: batch_for(model, tokens)[:2])
    return tmp_path / "flex"


@pytest.mark.parametrize("n_layers", [4, 5])
def test_the_table_is_the_machine(machine, n_layers):
    """Catches a layer counted twice, a fixed part that scales with depth, an axis looked up in
    another's column, and an interpolation that is off between grid points: on a machine whose times
    are linear the table is exact."""
    config = dataclasses.replace(GQA, n_layers=n_layers)
    machine.config = config
    table = json.loads(json.dumps(measure_latency(machine, odd_choices(config), rounds=2)))
    found, full = Latency(table, n_layers), invented(SubNet.full(config))
    assert (table["full_ms"] == pytest.approx(full) and table["threads"] >= 1 and table["hardware"]
            and table["torch"])
    for subnet in (SubNet.full(config), SubNet.uniform(33, [0, 2], 4, 41), SubNet.uniform(25, [1], 6, 79),
                   SubNet(48, (0, 1, 3), (2, 8, 4), (20, 80, 47))):
        assert found(subnet) == pytest.approx(invented(subnet) / full, rel=1e-6), subnet
    space = Space(config, odd_choices(config), [2, 0, 3, 1, 4][:n_layers])
    of = found.of_members(space)
    for row in range(0, len(space.members), 17):
        assert of[row].item() == pytest.approx(found(space.subnet(space.members[row])), rel=1e-9)


def test_noise_never_makes_a_larger_slice_faster(machine, monkeypatch):
    """Catches a table that a router could be fooled by: a wide layer that was timed in a quiet moment."""
    rng, quiet = np.random.default_rng(0), timing.seconds
    monkeypatch.setattr(timing, "seconds", lambda run, device: quiet(run, device) * rng.uniform(0.6, 1.4))
    table = measure_latency(machine, odd_choices(GQA), rounds=1)
    for kind in ("heads", "neurons"):
        assert all(row == sorted(row) and max(row) <= 0 for row in table[kind])


def test_fractions_are_of_the_same_round(monkeypatch):
    """Catches times of one moment divided by those of another: a machine that slows down by and by
    must not matter."""
    now, full, half = [1.0], lambda: 1.0, lambda: 0.5

    def seconds(run, device):
        now[0] *= 1.5 if run is full else 1.0  # every round is slower than the one before
        return run() * now[0]
    monkeypatch.setattr(timing, "seconds", seconds)
    found = fractions({"full": full, "half": half}, torch.device("cpu"), 5)
    assert found["half"] == pytest.approx(0.5) and found["full"] == pytest.approx(1000 * 1.5 ** 4)


@pytest.mark.parametrize("noise, rounds", [(0.0, 9), (1.0, 31)])
def test_rounds_end_when_the_medians_stand_still(monkeypatch, noise, rounds):
    """Catches a quarter of an hour of rounds that change nothing, and rounds that end while they do."""
    generator = np.random.default_rng(0)
    monkeypatch.setattr(timing, "seconds", lambda run, device: run() * (1 + noise * generator.random()))
    runs = {"full": lambda: 1.0, "a": lambda: 0.5, "b": lambda: 0.7, "c": lambda: 0.2}
    assert fractions(runs, torch.device("cpu"), 31)["rounds"] == rounds


def test_a_slow_model_is_not_measured_for_hours(monkeypatch):
    """Catches a limit that nothing keeps, and a first round of half an hour that is thrown away."""
    now = [0.0]

    def seconds(run, device):
        now[0] += run()
        return run()

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    found = fractions({"full": lambda: 300.0, "a": lambda: 270.0, "b": lambda: 240.0},
                      torch.device("cpu"), 31)
    assert (found["rounds"], found["a"], found["b"]) == (2, 0.9, 0.8) and now[0] == 2 * (600 + 270 + 240)


def test_some():
    """Catches a grid without its ends."""
    assert some(range(1, 33), 4) == [1, 11, 22, 32] and some([8, 4], 4) == [4, 8]
    assert some(range(9), 9) == list(range(9))


def slow_route(router, costs, asked):
    """F(b) by latency, member by member: the best by the sum of its axes' logits at the mean size
    of what fits, among those between the sizes at trained neighbours, if any."""
    space = router.space
    fits = [m for m in range(len(costs)) if asked - space.delta < costs[m] <= asked] or [
        max((m for m in range(len(costs)) if costs[m] <= asked), key=lambda m: costs[m])]
    dearest_first = sorted(fits, key=lambda m: -costs[m])
    fits = sorted(m for i, m in enumerate(dearest_first) if i < 16 or costs[m] > asked - space.near)
    b = sum(space.costs[m].item() for m in fits) / len(fits)
    fits = router.near_trained(b, torch.tensor(fits), costs <= asked).tolist()
    logits = dict(zip(("dim", "n_heads", "ffn_dim", "n_layers"), space.split(router.logits(b))))
    worth = lambda m: sum(logits[axis][space.choices[axis].index(size)].item()
                          for axis, size in zip(logits, space.members[m].tolist()))
    return space.subnet(space.members[max(fits, key=worth)])


def test_routing_by_latency(machine):
    """Catches --latency that is answered with a budget, that goes over, or that asks the router at
    another budget."""
    found, router = (Latency(measure_latency(machine, odd_choices(GQA), rounds=1), GQA.n_layers),
                     random_router(GQA))
    router.budgets, over = [0.4, 0.8, 1.0], 0
    with torch.no_grad():
        for asked in (0.95, 0.8, 0.65, 0.5, 0.4):
            costs = found.costs(router.space, asked)
            subnet = router.route(asked, costs)
            assert subnet == slow_route(router, costs, asked) and found(subnet) <= asked + 1e-9
            over += router.route(asked) != subnet
    assert over and router.route(1.0, found.of_members(router.space)) == SubNet.full(GQA)


def test_the_fastest_is_the_least_to_ask_for(machine, capsys):
    """Catches an error that comes too late, or names a latency which is refused again, by rounding."""
    found = Latency(measure_latency(machine, odd_choices(GQA), rounds=1), GQA.n_layers)
    router = random_router(GQA)
    fastest = found.of_members(router.space).min().item()
    with one_line_error(capsys, "fastest", f"{fastest:.4f}") as said:
        found.costs(router.space, fastest - 1e-6)
    named = float(re.search(r"--latency ([\d.]+)", said[0])[1])
    assert found(router.route(named, found.costs(router.space, named))) <= named


def test_export_at_a_latency(flex, tmp_path, monkeypatch, capsys):
    """Catches an export that measures anew each time, forgets where the table came from, or writes
    another slice."""
    flags = ["--model", str(flex)]
    monkeypatch.setattr(timing, "measure_latency", functools.partial(measure_latency, rounds=1))
    export.main(flags + ["--latency", "0.9"])
    table = (flex / LATENCY_FILE).read_bytes()
    measured = json.loads(table)
    assert {"hardware", "threads", "torch", "python", "device", "rounds", "full_ms"} <= measured.keys()
    export.main(flags + ["--latency", "0.9", "--out", str(tmp_path / "again")])
    assert (flex / LATENCY_FILE).read_bytes() == table
    family = open_family(flex)
    model, router, found = family.model, family.router, load_latency(flex, family.model)
    want = router.route(0.9, found.costs(router.space, 0.9))
    for name in ("flex-latency-0.90", "again"):
        assert read_config(tmp_path / name) == dataclasses.replace(want.config(model.config), context=32)
    monkeypatch.setattr(timing, "measure_latency", lambda *_: pytest.fail("measured again"))
    (flex / LATENCY_FILE).write_text(json.dumps(measured | dict(hardware="a calculator")))
    capsys.readouterr()
    export.main(flags + ["--latency", "0.9", "--dry-run"])
    assert "a calculator" in capsys.readouterr().err


def test_timing_a_folder(flex, capsys):
    """Catches a command that prints without writing its table, one of other sizes than the
    router's, and a table that is another model's."""
    command.main(["--model", str(flex), "--rounds", "1", "--slices", "2", "--device", "cpu"])
    assert capsys.readouterr().out.count("%") == 2 and (flex / LATENCY_FILE).is_file()
    table, sizes = json.loads((flex / LATENCY_FILE).read_text()), odd_choices(GQA)
    assert all(min(table[axis]) == min(sizes[axis]) for axis in ("n_heads", "ffn_dim"))
    other = random_llama(dataclasses.replace(GQA, ffn_dim=96))
    with one_line_error(capsys, LATENCY_FILE, "python -m bench.latency"):
        load_latency(flex, other)


def test_a_member_is_what_the_router_says(flex, machine):
    """Catches a member without its factors, a latency that is answered with a budget, and marks on
    budgets that were never trained, or on latencies."""
    family = open_family(flex)
    router = family.router
    budgets = family.default_budgets()
    assert budgets == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    router.budgets = [0.601, 0.3, 1.0]
    assert family.default_budgets() == [1.0, 0.9, 0.8, 0.7, 0.601, 0.6, 0.5, 0.4, 0.3]
    router.budgets = [0.5, 1.0]
    for b in budgets:
        member = family.member(b)
        assert member.subnet == router.route(b)
        if b == 1:
            assert member.factors is None
        else:
            assert torch.equal(member.factors, router.modulation(member.subnet))
    table = measure_latency(machine, router.space.choices, rounds=1)
    save_table(flex / LATENCY_FILE, table)
    found = Latency(table, GQA.n_layers)
    latencies = [0.4, 0.5, 0.65, 0.8]
    wanted = [router.route(asked, found.costs(router.space, asked)) for asked in latencies]
    assert [family.member(asked, "latency").subnet for asked in latencies] == wanted
    assert wanted != [router.route(asked) for asked in latencies]
    assert family.trained_budgets() == [0.5, 1.0]
    assert family.trained_budgets("latency") == []


def test_mistakes_end_in_one_line(flex, machine, capsys):
    """Catches a traceback for a latency nobody can meet, a table that is no table, a router that no
    latency bounds."""
    flags = ["--model", str(flex), "--dry-run"]
    choices = open_family(flex).router.space.choices
    save_table(flex / LATENCY_FILE, measure_latency(machine, choices, rounds=1))
    for wrong, words in ((["--latency", "0.001"], ["0.001", "fastest"]),
                         (["--latency", "1.5"], ["1.5", "(0, 1]"]),
                         (["--latency", "0.6", "--budget", "0.5"], ["not allowed"])):
        with one_line_error(capsys, *words):
            export.main(flags + wrong)
    measured = (flex / LATENCY_FILE).read_text()
    for name in ("fixed", "layer", "heads", "neurons"):
        for number in (2 ** 64, -1e300, float("nan")):
            table = json.loads(measured)
            row = table[name][-1] if isinstance(table[name][-1], list) else table[name]
            row[0] = number
            (flex / LATENCY_FILE).write_text(json.dumps(table))
            with one_line_error(capsys, LATENCY_FILE, "measures it again"):
                export.main(flags + ["--latency", "0.6"])
    other_grids = (lambda t: t["dim"].pop(0), lambda t: t["n_heads"].sort(reverse=True),
                   lambda t: t["heads"][0].pop(), lambda t: t["neurons"].pop(),
                   lambda t: t["ffn_dim"].insert(0, t["ffn_dim"][0]), lambda t: t["fixed"].append(0.1),
                   lambda t: t["n_heads"].__setitem__(0, 0.5))
    for change in other_grids:  # each would be interpolated, between the wrong sizes
        table = json.loads(measured)
        change(table)
        (flex / LATENCY_FILE).write_text(json.dumps(table))
        with one_line_error(capsys, LATENCY_FILE, "measures it again"):
            export.main(flags + ["--latency", "0.6"])
    (flex / LATENCY_FILE).write_text("{}")
    with one_line_error(capsys, LATENCY_FILE, "measures it again"):
        export.main(flags + ["--latency", "0.6"])
    for content in ('{"a":' * 100_000, "[]", "NaN"):
        (flex / LATENCY_FILE).write_text(content)
        with one_line_error(capsys, LATENCY_FILE):
            export.main(flags + ["--latency", "0.6"])
    (flex / LATENCY_FILE).unlink()
    (flex / LATENCY_FILE).mkdir()  # it would be measured for minutes, and not be written
    with one_line_error(capsys, LATENCY_FILE, "no file"):
        export.main(flags + ["--latency", "0.6"])
    (flex / LATENCY_FILE).rmdir()
    with pytest.MonkeyPatch.context() as patch:  # as on a disk that is read-only
        patch.setattr("plumbing.latency.os.access", lambda path, mode: False)
        patch.setattr("plumbing.latency.measure_latency", None)
        with one_line_error(capsys, "cannot be written to", "copy the Llama"):
            export.main(flags + ["--latency", "0.6"])
        with one_line_error(capsys, "cannot be written to", "copy the Llama"):
            command.main(["--model", str(flex), "--rounds", "1", "--device", "cpu"])
    (flex / LATENCY_FILE).write_text("{}")
    with one_line_error(capsys, "--rounds"):
        command.main(["--model", str(flex), "--rounds", "0"])
    save_tensors(flex / "flex.pt", router_state(random_router(GQA, "penalty"), seq_len=16))
    (flex / LATENCY_FILE).unlink()
    with one_line_error(capsys, "penalty", "latency"):
        export.main(flags + ["--latency", "0.6"])
    assert not (flex / LATENCY_FILE).exists(), "measured before it was refused"
