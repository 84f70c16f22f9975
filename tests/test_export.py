"""export.py: an export computes what the supernet computes at that budget, and holds nothing else."""
import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import export as exporting
import plumbing.sizes as sizes
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from plumbing.family import open_family
from plumbing.lazy import open_lazily
from plumbing.sizes import (
    amount,
    class_of_transformers,
    default_folder,
    largest,
    parallel_degrees,
    quantisations,
)
from router import Router
from export import fold
from model import Llama, SubNet
from space import cost
from tests.helpers import (
    GQA,
    WHOLE,
    cut_into,
    MHA,
    SHAPES,
    close,
    deployed,
    export_at,
    files_of,
    make_supernet,
    one_line_error,
    random_llama,
    random_router,
    subnets,
    tokens_for,
)
from tests.processes import ROOT, run
from tests.test_model import reference_logits

EXPORTED = {"gqa": GQA, "mha": MHA, "tied": SHAPES["tied"], "tied mha": dataclasses.replace(MHA, tied=True),
            "scaled rope": dataclasses.replace(GQA, rope_factor=32.0)}


@pytest.mark.parametrize("shape", EXPORTED)
@pytest.mark.parametrize("budget", [1.0, 0.77, 0.5])
def test_export_computes_what_the_supernet_does(tmp_path, shape, budget):
    """Invariant 2. Catches modulation that is not folded, folded twice, into the wrong layer or
    channel, heads cut across groups, and traces of the supernet: the export is read by a Llama that
    knows nothing of slices."""
    model, router = make_supernet(tmp_path / "flex", EXPORTED[shape])
    before = files_of(tmp_path / "flex")
    out, subnet = export_at(tmp_path / "flex", budget)
    assert out == tmp_path / f"flex-{budget:.2f}"
    assert subnet == router.route(budget) and cost(model.config, subnet) <= budget
    slim, tokens = load_llama(out), tokens_for(model.config)
    factors = deployed(router, budget)[1]
    assert (factors is None) == (budget == 1)
    want = model(tokens, subnet=subnet, factors=factors)[0]
    assert close(slim(tokens)[0], want)
    assert slim.config == subnet.config(model.config) and slim.config.tied == model.config.tied
    raw = load_tensors(out / "consolidated.00.pth")
    assert close(reference_logits(raw, slim.config, tokens), want.double())
    if budget < 1:
        assert not close(model(tokens, subnet=subnet)[0], want, 1e-2), "this modulation does nothing"
    assert files_of(tmp_path / "flex") == before


def test_a_budget_is_walked_once(tmp_path, monkeypatch):
    """Catches an export that asks the router again and again for the same budget."""
    make_supernet(tmp_path / "flex", GQA)
    route, asked = Router.route, []
    monkeypatch.setattr(Router, "route", lambda self, *args: asked.append(args[0]) or route(self, *args))
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.7"])
    assert asked == [0.7]


def test_no_trace_of_router_or_modulation(tmp_path):
    """Catches flex.pt copied along, or tensors that only the supernet has: other readers would
    refuse the export."""
    make_supernet(tmp_path / "flex", GQA)
    out, *_ = export_at(tmp_path / "flex", 0.6)
    files = files_of(out)
    assert set(files) == {"params.json", "consolidated.00.pth", "tokenizer.model"}
    assert set(load_tensors(out / "consolidated.00.pth")) == set(load_llama(out).state_dict())
    for word in (b"router", b"modulation", b"gate", b"flex", b"seen", b"choices"):
        assert not any(word in content for content in files.values()), word
    assert files["tokenizer.model"] == files_of(tmp_path / "flex")["tokenizer.model"]


@pytest.mark.parametrize("shape", ["gqa", "mha", "tied"])
@pytest.mark.parametrize("name", ["per layer", "all", "heads"])
def test_fold_of_any_subnet(tmp_path, shape, name):
    """Catches a slice with another shape in every layer whose lists are lost, reordered or
    taken for uniform in params.json, and factors indexed by the new number of a layer instead
    of the old."""
    config = SHAPES[shape]
    model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)[name]
    factors = 1 + 0.5 * torch.randn(config.n_layers, 2, generator=torch.Generator().manual_seed(5))
    save_llama(tmp_path, subnet.config(config), fold(model, subnet, factors))
    slim, want = load_llama(tmp_path), model(tokens, subnet=subnet, factors=factors)[0]
    assert (slim.config.per_layer("n_heads") == subnet.n_heads
            and slim.config.per_layer("ffn_dim") == subnet.ffn_dim)
    assert close(slim(tokens)[0], want)
    assert close(reference_logits(load_tensors(tmp_path / "consolidated.00.pth"), slim.config, tokens),
                 want.double())


def test_fold_leaves_the_model_alone():
    """Catches folding in place: slices are views, and the next budget would be folded on top. And a
    state dict of views, which hold on to the whole supernet and change with it."""
    model, subnet = random_llama(GQA), SubNet.full(GQA)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = fold(model, subnet, torch.full((4, 2), 3.0))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, first[k]) for k, v in fold(model, subnet, torch.full((4, 2), 3.0)).items())
    assert not torch.equal(first["layers.2.attention.wo.weight"], before["layers.2.attention.wo.weight"])
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for name, w in fold(model, subnets(GQA)["all"]).items():
        assert w.untyped_storage().data_ptr() not in theirs, name
        assert w.is_contiguous() and w.untyped_storage().nbytes() == w.nbytes, name


def test_bfloat16_rounds_once(tmp_path):
    """Catches weights rounded to bf16 before the factors are folded in, and again after."""
    model, router = make_supernet(tmp_path / "flex", GQA)
    out, subnet = export_at(tmp_path / "flex", 0.5, dtype=torch.bfloat16)
    factors, twice, got = deployed(router, 0.5)[1], 0, load_tensors(out / "consolidated.00.pth")
    for name, w in model.slices(subnet).items():
        w = w.detach()
        for new, old in enumerate(subnet.layers):
            if name == f"layers.{new}.attention.wo.weight":
                w = w * factors[old, 0]
                twice += (model.slices(subnet)[name].bfloat16() * factors[old, 0].bfloat16()
                          != w.bfloat16()).sum()
            if name == f"layers.{new}.feed_forward.w2.weight":
                w = w * factors[old, 1]
        assert got[name].dtype == torch.bfloat16 and torch.equal(got[name], w.bfloat16()), name
    assert twice > 0, "a test of nothing: rounding twice gives the same"
    bytes16 = (out / "consolidated.00.pth").stat().st_size
    assert bytes16 < 0.7 * (export_at(tmp_path / "flex", 0.5)[0] / "consolidated.00.pth").stat().st_size


def test_a_bfloat16_supernet_is_folded_in_fp32(tmp_path):
    """Catches factors multiplied in the dtype of the supernet's file, where the product is rounded
    once more than the export asks for, and an export whose dtype is not the supernet's where none
    is asked for."""
    make_supernet(tmp_path / "flex", GQA)
    weights = tmp_path / "flex" / "consolidated.00.pth"
    torch.save({name: w.bfloat16() for name, w in torch.load(weights, weights_only=True).items()}, weights)
    model = load_llama(tmp_path / "flex")  # bf16 values, in fp32
    for flags, dtype in [([], torch.bfloat16), (["--dtype", "float32"], torch.float32)]:
        out = tmp_path / str(dtype)
        exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.5", "--out", str(out), *flags])
        subnet, factors = deployed(open_family(tmp_path / "flex").router, 0.5)
        got = load_tensors(out / "consolidated.00.pth")
        for name, w in model.slices(subnet).items():
            old = subnet.layers[int(name.split(".")[1])] if name.startswith("layers") else None
            factor = 1.0
            if name.endswith("wo.weight"):
                factor = factors[old, 0]
            if name.endswith("w2.weight"):
                factor = factors[old, 1]
            assert got[name].dtype == dtype and torch.equal(got[name], (w.detach() * factor).to(dtype)), name


def test_export_again_gives_the_same_bytes(tmp_path):
    """Catches an export that depends on what is there already, on the folder's name or on the hour."""
    make_supernet(tmp_path / "flex", MHA)
    out, *_ = export_at(tmp_path / "flex", 0.6)
    first = files_of(out)
    export_at(tmp_path / "flex", 0.8, out)
    assert files_of(out) != first
    assert export_at(tmp_path / "flex", 0.6, out)[0] == out and files_of(out) == first
    assert files_of(export_at(tmp_path / "flex", 0.6, tmp_path / "deep" / "other")[0]) == first
    assert {p.name for p in tmp_path.iterdir()} == {
        "flex", "flex-0.60", "deep"}, "temporary folders left behind"


def test_mistakes_write_nothing(tmp_path, capsys):
    """Catches a traceback, a half-written folder, or a user's files replaced by an export."""
    model, router = make_supernet(tmp_path / "flex", GQA)
    plain, full = tmp_path / "plain", tmp_path / "full"
    save_llama(plain, model.config, model.state_dict())
    full.mkdir()
    (full / "params.json").write_text("mine"), (full / "notes.txt").write_text("mine too")
    before = files_of(tmp_path)
    asked = lambda *extra: ["--model", str(tmp_path / "flex"), *map(str, extra)]
    for argv, words in [(["--model", str(plain), "--budget", "0.5"], ["plain", "flex.pt", "train.py"]),
                        (["--model", str(tmp_path / "nowhere"), "--budget", "0.5"], ["nowhere"]),
                        (asked("--budget", "0.01"), [f"{router.space.costs.min():.4f}"]),
                        (asked("--budget", "1.5"), ["1.5"]),
                        (asked("--budget", "0"), ["budget 0"]), (asked("--budget", "nan"), ["nan"]),
                        (asked("--budget", "half"), ["half"]), (asked(), ["--budget"]),
                        (asked("--budget", "0.5", "--dtype", "int3"), ["int3"]),
                        (asked("--budget", "0.5", "--out", full), [str(full), "--out"]),
                        (asked("--budget", "0.5", "--out", tmp_path / "flex"), ["flex"]),
                        (asked("--budget", "0.5", "--out", full / "notes.txt"), ["notes.txt"])]:
        with one_line_error(capsys, *words):
            exporting.main(argv)
        assert files_of(tmp_path) == before, argv
    assert {p.name for p in tmp_path.iterdir()} == {"flex", "plain", "full"}


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_what_it_prints_is_true(tmp_path, capsys, shape):
    """Catches sizes of the full model, or of what was asked, printed for what was written."""
    make_supernet(tmp_path / "flex", EXPORTED[shape])
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.55", "--out", str(tmp_path / "slim")])
    text, slim = capsys.readouterr().out, load_llama(tmp_path / "slim")
    number = lambda pattern: [x.replace(",", "") for x in re.search(pattern, text).groups()]
    c, everything = slim.config, sum(p.numel() for p in slim.parameters())
    inner = everything - sum(
        {id(p): p.numel() for p in (slim.output.weight, slim.tok_embeddings.weight)}.values())
    full = load_llama(tmp_path / "flex")
    inner_full = sum(p.numel() for n, p in full.named_parameters()
                     if not n.startswith(("tok_embeddings", "output")))
    assert number(r"dim (\d+), (\d+) heads of (\d+), ffn (\d+), layers (\d+) of (\d+)") == [
        str(x) for x in (c.dim, c.n_heads, c.head_dim, c.ffn_dim, c.n_layers, 4)]
    assert number(r"asked ([\d.]+), got ([\d.]+) of the non-embedding parameters: ([\d,]+)") == [
        "0.550", f"{inner / inner_full:.3f}", str(inner)]
    assert number(r"([\d,]+) parameters with embeddings, ([\d,]+) bytes") == [
        str(everything), str(sum(map(len, files_of(tmp_path / "slim").values())))]
    kept = [int(i) for i in re.search(r"\(([\d ]+)\)", text)[1].split()]
    rows = load_tensors(tmp_path / "slim" / "consolidated.00.pth")
    for new, old in enumerate(kept):  # the layers it names are the layers it took
        assert torch.equal(rows[f"layers.{new}.ffn_norm.weight"], full.layers[old].ffn_norm.weight[:c.dim])


# -----------------------------------------------------------------------------
# other ways to say a size


def sizes_of(text: str) -> list[list[float]]:
    """The rows of the table that --dry-run prints."""
    # below them: what columns mean
    rows = [line.split() for line in text.splitlines()[1:] if line.startswith(" ")]
    return [[float(x.strip("*!").replace(",", "")) for x in row[:10]] for row in rows]


def test_amounts():
    """Catches thousands taken for 1024s, and units that are dropped."""
    for text, want in [("4.0B", 4e9), ("350M", 3.5e8), ("6GB", 6e9), ("6GiB", 6 * 2**30),
                       ("1.5T", 1.5e12), ("12", 12), ("800k", 8e5), ("2 GB".replace(" ", ""), 2e9),
                       ("3MiB", 3 * 2**20)]:
        assert amount(text) == pytest.approx(want), text


@pytest.mark.parametrize("shape", ["gqa", "mha", "tied"])
def test_params_and_memory_are_never_exceeded(tmp_path, capsys, monkeypatch, shape):
    """Catches a limit that leaves out the embeddings or the cache, counts the wrong dtype, or takes
    less than fits."""
    model, router = make_supernet(tmp_path / "flex", SHAPES[shape])
    routes = {i / 1000: router.route(i / 1000) for i in range(1000, 0, -1)
              if i / 1000 >= router.space.costs.min()}
    every = list(dict.fromkeys(routes.values()))  # each slice once
    # All commands below ask the same router for the same thousand budgets: they get what it said above.
    monkeypatch.setattr(Router, "route", lambda self, budget, costs=None: routes[budget])
    limits = [(70_000, "float32"), (120_000, "bfloat16")]
    if shape == "gqa":
        limits.append((10**9, "float32"))  # all of it fits
    for k, (limit, dtype) in enumerate(limits):
        for flag, extra in (("--params", []), ("--memory", ["--context", "500"])):
            def size(subnet):
                slim = subnet.config(model.config)
                n = sum(w.numel() for name, w in model.slices(subnet).items()
                        if not (slim.tied and name == "output.weight"))
                kv = sum(2 * 500 * h * slim.head_dim for h in slim.per_layer("n_kv_heads"))
                return n if flag == "--params" else (n + kv) * (4 if dtype == "float32" else 2)

            bound = limit if flag == "--params" else 4 * limit
            best = max((s for s in every if size(s) <= bound), key=lambda s: cost(model.config, s))
            out = tmp_path / f"slim{k}{flag}"
            exporting.main(["--model", str(tmp_path / "flex"), flag, f"{bound / 1000}K", *extra,
                            "--dtype", dtype, "--out", str(out)])
            got = load_llama(out).config
            assert cost(model.config, best) == pytest.approx(cost_of_config(model.config, got))
    with one_line_error(capsys, "parameters", "smallest"):
        exporting.main(["--model", str(tmp_path / "flex"), "--params", "1K"])


def test_a_llama_of_one_size_has_no_latency(tmp_path, capsys, monkeypatch):
    """Catches half an hour of timing, or a traceback, for a Llama whose only size is 1."""
    save_llama(tmp_path / "llama", GQA, random_llama(GQA).state_dict())
    monkeypatch.setattr(sizes, "load_latency", lambda *_: pytest.fail("it was measured"))
    exporting.main(["--model", str(tmp_path / "llama"), "--latency", "1.0"])
    assert "asked for all of its time, got 1.000" in capsys.readouterr().out


def test_names_of_folders():
    """Catches two budgets that share a folder, where the second export would replace the first."""
    for budget, unit, format, name in [(0.5, "params", "llama", "flex-0.50"),
                                       (0.555, "params", "llama", "flex-0.555"),
                                       (0.556, "params", "hf", "flex-0.556-hf"),
                                       (0.5, "latency", "llama", "flex-latency-0.50")]:
        assert default_folder("out/flex", budget, unit, format) == Path("out") / name


def test_the_largest_slice_need_not_have_the_largest_budget(monkeypatch):
    """Catches the first budget whose slice fits taken for that of the largest slice: a router may
    buy less with more."""
    small, large = SubNet.uniform(32, [0, 2], 4, 33), SubNet.uniform(40, [0, 2], 4, 60)
    monkeypatch.setattr(Router, "route", lambda self, budget: large if 0.6 < budget < 0.7 else small)
    family = SimpleNamespace(router=random_router(GQA))
    assert 0.6 < largest(family, lambda subnet: subnet.dim, 40, "channels") < 0.7
    assert largest(family, lambda subnet: subnet.dim, 39, "channels") == 1.0


def cost_of_config(full, slim) -> float:
    """cost() of an export, from its shape."""
    return cost(full, SubNet.uniform(slim.dim, range(slim.n_layers), slim.n_heads, slim.ffn_dim))


def test_dry_run_writes_nothing_and_tells_the_truth(tmp_path, capsys):
    """Catches a dry run that writes, and sizes other than those that an export then has."""
    make_supernet(tmp_path / "flex", GQA)
    before = files_of(tmp_path)
    asked = ["--model", str(tmp_path / "flex"), "--context", "100", "--dry-run"]
    exporting.main(asked)
    assert len(sizes_of(capsys.readouterr().out)) >= 4
    exporting.main(asked + ["--budget", "0.8", "0.5"])
    rows = sizes_of(capsys.readouterr().out)
    assert files_of(tmp_path) == before and [row[0] for row in rows] == [0.8, 0.5]
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.8", "0.5"])
    for row, name in zip(rows, ("flex-0.80", "flex-0.50")):
        slim = load_llama(tmp_path / name)
        total, c = sum(p.numel() for p in slim.parameters()), slim.config
        assert row[2:6] == [c.dim, c.n_heads, c.ffn_dim, c.n_layers] and row[7] == total
        assert row[8] == pytest.approx(4 * total / 1e9, abs=5e-4)
        assert row[9] == pytest.approx(2 * 4 * 100 * c.n_layers * c.n_kv_heads * c.head_dim / 1e9, abs=5e-4)


def divides(sizes, n: int) -> bool:
    """Does n divide every one of these sizes?"""
    return not any(size % n for size in sizes)


@pytest.mark.parametrize("head_dim,n_heads,n_kv_heads", [
    (8, 8, 2), (16, 16, 16), (32, 8, 8), (64, 12, 4), (2, 3, 1)])
@pytest.mark.parametrize("dim", [100, 160, 512, 768])
@pytest.mark.parametrize("ffn_dim", [80, 96, 1024, 77])
def test_who_runs_a_shape_well(head_dim, n_heads, n_kv_heads, dim, ffn_dim):
    """Catches a quantisation, a number of GPUs or a class that is named though some matrix does
    not fit it. Measured on the matrices themselves: their rows, and what is left of them when n
    GPUs share outputs."""
    shape = dataclasses.replace(GQA, dim=dim, head_dim=head_dim, n_heads=n_heads, n_kv_heads=n_kv_heads,
                                ffn_dim=ffn_dim)
    with torch.device("meta"):
        model = Llama(shape)
    rows = {p.size(1) for p in model.parameters() if p.dim() == 2}
    want = [name for name, block in (("Q8_0", 32), ("K", 256)) if divides(rows, block)]
    assert quantisations(shape) == (",".join(want) or "-")
    block = model.layers[0]
    to_share = [block.attention.wq.out_features // head_dim, block.attention.wk.out_features // head_dim,
                block.attention.wv.out_features // head_dim, block.feed_forward.w1.out_features]
    assert parallel_degrees(shape) == (",".join(str(n) for n in (2, 4, 8) if divides(to_share, n)) or "-")
    assert class_of_transformers(shape) == ("Mistral" if dim % n_heads else "Llama")


def test_layers_that_differ_must_all_fit():
    """Catches a table that looks at the first layer, or that names a class of transformers for
    layers that differ."""
    even = dataclasses.replace(GQA, dim=512, head_dim=32, n_heads=8, n_kv_heads=8,
                               ffn_dim=(512, 512, 512, 512))
    assert (quantisations(even), parallel_degrees(even)) == ("Q8_0,K", "2,4,8")
    for axis, values, quants, degrees in [("ffn_dim", (512, 512, 96, 512), "Q8_0", "2,4,8"),
                                          ("ffn_dim", (512, 512, 512, 500), "-", "2,4"),
                                          ("n_heads", (8, 8, 8, 24), "Q8_0,K", "2,4,8"),
                                          ("n_heads", (8, 8, 8, 16), "Q8_0,K", "2,4,8"),
                                          ("n_kv_heads", (8, 8, 2, 8), "Q8_0,K", "2")]:
        shape = dataclasses.replace(even, **{axis: values})
        assert (quantisations(shape), parallel_degrees(shape), class_of_transformers(shape)) == (
            quants, degrees, "-")
    shape = dataclasses.replace(even, n_heads=(8, 4, 8, 8), n_kv_heads=(8, 4, 8, 8))
    assert (quantisations(shape), parallel_degrees(shape)) == ("Q8_0", "2,4")


def test_the_dry_run_says_who_runs_a_slice_well(tmp_path, capsys):
    """Catches columns about the full model, or about another slice, in place of what the export has."""
    make_supernet(tmp_path / "flex", dataclasses.replace(GQA, dim=64, head_dim=16, ffn_dim=96))
    rows = {}
    flags = ["--model", str(tmp_path / "flex")]
    exporting.main([*flags, "--dry-run"])
    for line in capsys.readouterr().out.splitlines()[1:]:
        if line.startswith(" "):
            words = line.split()
            rows[words[0].strip("*!")] = words[10:]
    assert len(rows) >= 4
    for budget in ("1.000", "0.500"):
        exporting.main([*flags, "--budget", budget, "--out", str(tmp_path / budget)])
        c = load_llama(tmp_path / budget).config
        assert rows[budget] == [quantisations(c), parallel_degrees(c), class_of_transformers(c)]
    assert rows["1.000"] == ["Q8_0", "2", "Llama"]
    assert len({tuple(row) for row in rows.values()}) > 1


def test_norms_do_not_decide_the_dtype(tmp_path, capsys):
    """Catches an export in fp32, twice as large, of a bf16 Llama whose norms, or whose last norm,
    are in fp32."""
    make_supernet(tmp_path / "flex", GQA)
    weights = tmp_path / "flex" / "consolidated.00.pth"
    state = {name: w if "norm" in name else w.bfloat16()
             for name, w in torch.load(weights, weights_only=True).items()}
    torch.save(state, weights)
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.5"])
    got = load_tensors(tmp_path / "flex-0.50" / "consolidated.00.pth")
    assert ({w.dtype for w in got.values()} == {torch.bfloat16}
            and "bytes (bfloat16)" in capsys.readouterr().out)
    assert torch.equal(got["norm.weight"], state["norm.weight"][:len(got["norm.weight"])].bfloat16())


def test_other_mistakes(tmp_path, capsys):
    """Catches two ways to say a size at once, none at all, nonsense, and one folder for two slices."""
    make_supernet(tmp_path / "flex", GQA)
    make_supernet(tmp_path / "plain", GQA)
    (tmp_path / "plain/flex.pt").unlink()
    before = files_of(tmp_path)
    for argv, word in [([], "--budget"), (["--budget", "0.5", "--params", "1M"], "--params"),
                       (["--params", "many"], "many"),
                       (["--memory", "6 bananas"], "bananas"),
                       (["--budget", "0.5", "0.6", "--out", "x"], "--out"),
                       (["--memory", "6GB", "--context", "0"], "--context"), (["--params", "..B"], "..B"),
                       (["--budget", "0.5", "--out", str(tmp_path / "flex")], "--out"),
                       (["--model", str(tmp_path / "plain"), "--params", "1M"], "supernet"),
                       (["--model", str(tmp_path / "plain"), "--out", str(tmp_path / "plain")], "--out")]:
        with one_line_error(capsys, word):
            exporting.main(["--model", str(tmp_path / "flex"), *argv])
        assert files_of(tmp_path) == before, argv


# -----------------------------------------------------------------------------
# what can go wrong while it writes


@pytest.mark.parametrize("kind", ["llama", "hf"])
def test_a_full_disk(tmp_path, kind):
    """Catches a traceback and half a folder when there is no room (here: a limit on a file's size)."""
    make_supernet(tmp_path / "flex", GQA)
    before = files_of(tmp_path)
    limited = ("import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); "
               "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run("-c", limited, ROOT / "export.py", "--model", tmp_path / "flex", "--budget", "0.9",
               "--format", kind)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large" in done.stderr, done.stderr
    assert files_of(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"flex"}


@pytest.mark.parametrize("kind", ["llama", "hf"])
def test_an_interruption(tmp_path, kind, capsys, monkeypatch):
    """Catches half a folder, or the earlier export lost, when Ctrl-C or SIGTERM comes while files
    are being written."""
    make_supernet(tmp_path / "flex", GQA)
    argv = ["--model", str(tmp_path / "flex"), "--format", kind, "--out", str(tmp_path / "slim")]
    exporting.main([*argv, "--budget", "0.8"])
    before = files_of(tmp_path)

    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    where, what = (exporting.hf, "write_json") if kind == "hf" else (exporting, "save_llama")
    monkeypatch.setattr(where, what, stop)
    with one_line_error(capsys, "interrupted"):
        exporting.main([*argv, "--budget", "0.5"])
    assert files_of(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"flex", "slim"}


def test_an_export_is_evaluated_as_its_supernet(tmp_path, capsys):
    """Catches an export that eval.py and sample.py read as something else: the loss to 1e-4,
    the same text."""
    make_supernet(tmp_path / "flex", GQA)
    exporting.main(["--model", str(tmp_path / "flex"), "--budget", "0.6"])
    (tmp_path / "text.txt").write_text("the cat sat on the mat; def main(argv): return argv\n" * 20)
    losses = []
    for model, budget in (("flex", "0.6"), ("flex-0.60", "1.0")):
        capsys.readouterr()
        evaluation.main(["--model", str(tmp_path / model), "--budgets", budget, "--seq-len", "16", "--json",
                         "--text", str(tmp_path / "text.txt")])
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["loss"])
    assert abs(losses[0] - losses[1]) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_read_lazily_is_what_a_whole_model_gives(tmp_path, tied):
    """Catches another layer's weights, a shard that is left out, another dtype, another order, and
    a model that has memory: its own tensors stay on the meta device."""
    config = dataclasses.replace(WHOLE, tied=tied)
    model = cut_into(tmp_path / "llama", 2, False, config, dtype=torch.bfloat16).bfloat16()
    lazy = open_lazily(tmp_path / "llama")
    assert lazy.config == config and lazy.norm.weight.dtype == torch.bfloat16
    for subnet in subnets(config).values():
        want = model.slices(subnet)
        names = []
        for name, weight in lazy.slices(subnet).items():
            assert torch.equal(weight, want[name]) and weight.dtype == torch.bfloat16
            names.append(name)
        assert all(p.is_meta for p in lazy.parameters())
        assert names == [name for name in want if not (tied and name == "output.weight")]
