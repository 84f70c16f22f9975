"""search.py, candidates.py, reform.py: against slow and obvious versions, and through kills."""
import json
import shutil

import pytest
import torch

import search.candidates as candidates
import plumbing.checkpoint as checkpoint
import eval as evaluation
import export
import search.reform as reform
import sample
import search.__main__ as search
from search.candidates import Bounds, Candidate, arranged, resized, slim, swapped
from plumbing.checkpoint import load_llama, save_llama
from data.shards import Shards, write_shard
from model import Gates, LlamaConfig, SubNet
from search.reform import admm, correction, reform_, unit_scores
from space import cost, kv_groups, n_params, random_generator
from tests.helpers import GQA, MHA, SHAPES, close, files_of, one_line_error, random_llama, run, tokens_for
from data.tokenizer import save_tokenizer, train_bpe

FEW = ["--generations", "3", "--population", "10", "--fitness-windows", "3", "--calibration-windows", "6",
       "--report-windows", "4", "--device", "cpu"]


def bounds_for(config: LlamaConfig, budget: float, uniform: bool = False, seed: int = 0) -> Bounds:
    """Bounds with scores drawn at random."""
    g = torch.Generator().manual_seed(seed)
    scores = (torch.rand(config.n_layers, config.n_heads, generator=g),
              torch.rand(config.n_layers, config.ffn_dim, generator=g))
    return Bounds.of(random_llama(config), budget, scores, uniform)


def some(config: LlamaConfig, budget: float, uniform: bool = False, seed: int = 0) -> Candidate:
    """A candidate far from the start: two mutants of it, crossed, without one layer at least."""
    bounds, rng = bounds_for(config, budget, uniform, seed), random_generator(seed)
    a, b = (search.mutated(bounds, bounds.start(), rng, depth=1, ratio=1, mask=1) for _ in range(2))
    return search.crossed(bounds, a, b, rng)


# -----------------------------------------------------------------------------
# candidates


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_sliced_and_written_are_the_same(shape, tmp_path):
    """Invariant 2. Catches a gather that takes other units than the masks say, heads that leave their KV group, layers
    numbered anew in the sort, and a params.json whose lists are not the folder's shapes."""
    config, tokens = SHAPES[shape], tokens_for(SHAPES[shape])
    model = random_llama(config)
    for seed in range(3):
        c = some(config, 0.55, seed=seed)
        masked = model(tokens, gates=Gates(torch.ones(config.dim), *(m.float() for m in (
            c.heads, c.neurons, c.layers))))[0]
        small = slim(model, c)
        save_llama(tmp_path, small.config, small.state_dict())
        assert c.layers.sum() < config.n_layers or len(set(c.subnet(config).ffn_dim)) > 1
        assert close(arranged(model, c)(tokens, subnet=c.subnet(config))[0], masked)
        assert close(small(tokens)[0], masked) and torch.equal(load_llama(tmp_path)(tokens)[0], small(tokens)[0])
        assert sum(p.numel() for name, p in small.named_parameters() if "embed" not in name and "output" not in name
                   ) == n_params(config, c.subnet(config))


def test_everything_kept_is_the_model():
    """Catches a candidate of cost 1 that is not the whole network, or is another function."""
    for config in (GQA, MHA):
        model, c = random_llama(config), bounds_for(config, 1.0).start()
        assert c.subnet(config) == SubNet.full(config)
        assert torch.equal(slim(model, c)(tokens_for(config))[0], model(tokens_for(config))[0])
        mutant = search.mutated(bounds_for(config, 1.0), c, random_generator(1), depth=1, ratio=1, mask=1)
        assert mutant.subnet(config) == SubNet.full(config)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_every_candidate_meets_the_budget(config, uniform):
    """Catches a repair that goes over, that leaves room for one more neuron (uniform: in each layer), that empties a
    layer, a KV group or the network, and one that makes groups or, if uniform, layers unlike."""
    full, groups = n_params(config, SubNet.full(config)), kv_groups(config)
    budgets = [0.185 if config is GQA else 0.16, 0.3, 0.5, 0.7, 0.813, 0.9, 0.97, 0.999, 1.0]
    for budget in budgets:
        bounds, rng = bounds_for(config, budget, uniform), random_generator(budget)
        made = [bounds.start()]
        for k in range(12):
            made.append(search.mutated(bounds, made[k // 2], rng, depth=0.7, ratio=0.5, mask=0.5))
            made.append(search.crossed(bounds, made[-1], made[k // 2], rng))
        for c in made:
            subnet = c.subnet(config)
            room = bounds.limit - n_params(config, subnet)
            neuron = 3 * config.dim * (len(subnet.layers) if uniform else 1)
            # With all neurons in and heads that are a step too large for what is left, no neuron can fill the room.
            stuck = all(f == config.ffn_dim for f in subnet.ffn_dim)
            assert 0 <= room and (room < neuron or stuck), (budget, subnet, room / full)
            assert not stuck or room < max(n_params(config, SubNet.full(config)) / config.n_layers, neuron)
            assert len(subnet.layers) >= 2 and min(subnet.ffn_dim) >= 8 and min(subnet.n_heads) >= groups
            assert (c.heads.unflatten(1, (groups, -1)).sum(-1).diff(dim=1) == 0).all()
            assert not uniform or len(set(subnet.ffn_dim)) == len(set(subnet.n_heads)) == 1


def test_the_start_is_the_best_units_at_one_ratio():
    """Catches a start that takes the worst units, or ranks heads over all KV groups at once."""
    config, g = GQA, torch.Generator().manual_seed(3)
    scores = torch.rand(4, 8, generator=g), torch.rand(4, 80, generator=g)
    bounds = Bounds.of(random_llama(config), 0.5, scores)
    c = bounds.start()
    for layer in range(4):
        kept, s = c.neurons[layer], scores[1][layer]
        assert s[kept].min() > s[~kept].max()
        for group in (slice(0, 4), slice(4, 8)):
            kept, s = c.heads[layer][group], scores[0][layer][group]
            assert kept.sum() == 2 and s[kept].min() > s[~kept].max()
            assert sorted(bounds.heads[layer][group].tolist()) == [0, 1, 2, 3]  # or kept ones could rank under others
    assert c.layers.all() and max(c.neurons.sum(1)) - min(c.neurons.sum(1)) <= 1


def test_resized_and_swapped():
    """Catches a resize that throws out a mutation's units before it has to, and a swap that changes how many are kept
    or, with few kept or nearly all, nothing."""
    kept, place = torch.tensor([True, False, True, False, True, False]), torch.tensor([0, 5, 1, 4, 3, 2])
    units = lambda n: resized(kept, place, n).nonzero()[:, 0].tolist()
    assert [units(n) for n in (1, 2, 3, 4, 5)] == [[4], [2, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    for n, most in ((40, 4), (60, 4), (95, 1), (1, 1), (100, 0)):
        before = torch.arange(100) < n
        after = swapped(before, random_generator(n))
        assert after.sum() == n and (before & ~after).sum() == most


def test_what_left_out_layers_remember_is_no_part_of_the_name():
    """Catches a cache that takes one network for two, or two for one."""
    c = some(GQA, 0.5, seed=1)
    out = (~c.layers).nonzero()[:, 0]
    assert len(out)
    neurons = c.neurons.clone()
    neurons[out[0]] ^= True
    assert c._replace(neurons=neurons).key() == c.key()
    neurons[c.layers.nonzero()[0, 0]] ^= True
    assert c._replace(neurons=neurons).key() != c.key()


# -----------------------------------------------------------------------------
# score


def inputs_of(model, tokens) -> dict:
    """The inputs of every listening point (tokens, units), in fp64, from one ordinary forward."""
    seen, hooks = {}, []
    for i, block in enumerate(model.layers):
        for name, module in (("attn", block.attention_norm), ("wo", block.attention.heads), ("mlp", block.ffn_norm),
                             ("w2", block.feed_forward.neurons)):
            hooks.append(module.register_forward_hook(
                lambda _m, _i, y, key=(i, name): seen.update({key: y.detach().double().flatten(0, 1)})))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_scores_are_the_formula(config):
    """Catches the diagonal of G for that of its inverse, W before the square, rows for columns, wk of a group counted
    for its query heads, a last batch that is left out."""
    model, tokens = random_llama(config), tokens_for(config, batch=7)
    heads, neurons = unit_scores(model, tokens, batch=3)
    seen = inputs_of(model, tokens)

    def phi(weight, x):
        gram = x.T @ x
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        inverse = torch.linalg.inv(2 * gram)
        return torch.stack([torch.stack([w ** 2 / inverse[j, j] for j, w in enumerate(row)])
                            for row in weight.detach().double()])

    i, hd = 2, config.head_dim
    a, f = model.layers[i].attention, model.layers[i].feed_forward
    w1, w3, w2 = phi(f.w1.weight, seen[i, "mlp"]), phi(f.w3.weight, seen[i, "mlp"]), phi(f.w2.weight, seen[i, "w2"])
    want = torch.stack([w1[n].sum() + w3[n].sum() + w2[:, n].sum() for n in range(config.ffn_dim)])
    assert close(neurons[i].double(), want, 1e-4)
    wq, wk, wv = (phi(w.weight, seen[i, "attn"]) for w in (a.wq, a.wk, a.wv))
    wo = phi(a.wo.weight, seen[i, "wo"])
    for h in range(config.n_heads):
        rows = slice(h * hd, (h + 1) * hd)
        want = wq[rows].sum() + wo[:, rows].sum()
        if config is MHA:
            want = want + wk[rows].sum() + wv[rows].sum()
        assert close(heads[i, h].double(), want, 1e-4)


def test_a_singular_gram_is_damped_and_a_broken_one_named(capsys):
    """Catches a score or a reformation that fails on fewer tokens than neurons, or on neurons that never fire; and
    weights that are not finite and pass for a result."""
    model, tokens = random_llama(GQA), tokens_for(GQA, batch=2, length=5)      # 10 tokens, 80 neurons
    with torch.no_grad():
        model.layers[1].feed_forward.w3.weight[:7] = 0
    heads, neurons = unit_scores(model, tokens, 1)
    assert heads.isfinite().all() and neurons.isfinite().all() and neurons[1, 7:].mean() > neurons[1, :7].mean()
    c = some(GQA, 0.6)
    small = slim(model, c)
    assert all(after <= before for before, after in reform_(small, model, c.subnet(GQA).layers, tokens, 1))
    assert all(p.isfinite().all() for p in small.parameters())
    indefinite = torch.ones(3, 3) - 0.5 * torch.eye(3)                          # as rounding could leave it
    assert reform.inverse_diagonal(indefinite).isfinite().all()
    with torch.no_grad():
        model.layers[2].attention.wo.weight[3, 3] = float("nan")
    with one_line_error(capsys, "layer 2, feed_forward", "not finite"):
        unit_scores(model, tokens, 1)


def test_grams_are_fp32_where_forwards_are_not(monkeypatch):
    """Catches a Gram made under autocast: with 8 bits, sums of thousands of tokens lose what tells units apart."""
    seen, half = [], lambda device: torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(reform, "autocast", half)
    for name in ("inverse_diagonal", "correction"):
        monkeypatch.setattr(reform, name, lambda *args, call=getattr(reform, name): (seen.extend(args), call(*args))[1])
    model, tokens, c = random_llama(GQA), tokens_for(GQA), some(GQA, 0.6)
    unit_scores(model, tokens, 2)
    reform_(slim(model, c), model, c.subnet(GQA).layers, tokens, 2)
    tensors = [t for t in seen if torch.is_tensor(t)]
    assert len(tensors) >= 20 and all(t.dtype == torch.float32 for t in tensors)
    assert all(not torch.equal(t, t.bfloat16().float()) for t in tensors)


# -----------------------------------------------------------------------------
# reformation


def test_the_closed_form_is_the_minimum():
    """Catches a wrong damping, a transposed residual, a scale that is not taken out again: against least squares on the
    tokens themselves, with the ridge as rows of its own."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=g, dtype=torch.float64) @ torch.randn(12, 12, generator=g, dtype=torch.float64)
    w, y = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 12), (200, 5)))
    gram = x.T @ x
    rows = torch.cat([x, (0.01 * gram.diagonal()).sqrt().diag()])
    want = torch.linalg.lstsq(rows, torch.cat([y - x @ w.T, torch.zeros(12, 5, dtype=torch.float64)])).solution.T
    assert close(correction(gram, (y - x @ w.T).T @ x), want, 1e-9)
    assert not correction(gram, torch.zeros(5, 12, dtype=torch.float64)).any()


def test_the_papers_admm_comes_to_the_closed_form():
    """Catches a mask with its polarity the wrong way round, a target of zeros (the released code has both), and a
    closed form that is not the problem's: after enough iterations both are the same to 1e-6."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 24, generator=g, dtype=torch.float64) * (0.2 + torch.rand(24, generator=g)) + 0.3
    w, kept = torch.randn(7, 24, generator=g, dtype=torch.float64), torch.rand(24, generator=g) < 0.6
    gram = x.T @ x
    w_kept = torch.zeros_like(w)
    w_kept[:, kept] = w[:, kept] + correction(gram[kept][:, kept], w[:, ~kept] @ gram[~kept][:, kept])
    far, near, there = (close(admm(w, gram * 1e-2, kept, iterations=n), w_kept, 1e-6) for n in (1, 30, 3000))
    assert there and not far
    error = lambda v: (x @ (v - w).T).square().sum()
    assert error(w_kept) < error(w * kept)
    assert error(admm(w, gram * 1e-2, kept, iterations=30)) < error(w * kept)


def stream_before_norm(model, tokens) -> torch.Tensor:
    """The residual stream that the final norm reads."""
    seen = []
    hook = model.norm.register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0].detach().double()))
    model(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("shape", ["gqa", "mha", "tied"])
def test_reformation_never_raises_the_error(shape):
    """Catches a weight reformed on inputs from before its predecessors were, an error that is not that of the streams,
    and a step that makes things worse: at each weight the squared error must fall, and the last one is that of the
    whole models side by side."""
    config = SHAPES[shape]
    model, tokens = random_llama(config), tokens_for(config, batch=40, length=20)
    for seed in range(4):
        c = some(config, 0.6, seed=seed)
        small, layers = slim(model, c), c.subnet(config).layers
        before = {name: p.clone() for name, p in small.named_parameters()}
        errors = reform_(small, model, layers, tokens, batch=7)
        assert len(errors) == 2 * len(layers) and all(a <= b * (1 + 1e-6) + 1e-10 for b, a in errors)
        changed = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
        may_change = {f"layers.{i}.{w}.weight" for i in range(len(layers)) for w in ("attention.wo", "feed_forward.w2")}
        assert changed <= may_change and len(changed) >= len(may_change) - 1  # with all heads layer 0's wo stays
        if layers[-1] == config.n_layers - 1:
            want, have = stream_before_norm(model, tokens), stream_before_norm(small, tokens)
            assert abs(((want - have).square().sum() / want.square().sum()).item() / errors[-1][1] - 1) < 1e-4
            raw = stream_before_norm(slim(model, c), tokens)
            assert (want - have).square().sum() < (want - raw).square().sum()


def test_the_first_reformed_weight_is_least_squares():
    """Catches another target than the dense stream at that point: layer 0's wo, by explicit least squares."""
    model, tokens = random_llama(GQA), tokens_for(GQA, batch=30)
    c = bounds_for(GQA, 0.5).start()
    small, x = slim(model, c), inputs_of(model, tokens)
    columns = (c.heads[0].nonzero() * 8 + torch.arange(8)).flatten()
    inputs, y = x[0, "wo"][:, columns], x[0, "wo"] @ model.layers[0].attention.wo.weight.detach().double().T
    old = small.layers[0].attention.wo.weight.detach().double().clone()
    gram = inputs.T @ inputs
    want = old + (y - inputs @ old.T).T @ inputs @ torch.linalg.inv(gram + 0.01 * gram.diagonal().diag())
    reform_(small, model, range(4), tokens, batch=4)
    assert not close(old, want, 1e-2) and close(small.layers[0].attention.wo.weight.detach().double(), want, 1e-4)


def test_reforming_the_whole_model_changes_nothing():
    """S = all is the identity. Catches a ridge that pulls towards zero instead of towards the weights."""
    model = random_llama(GQA)
    small = slim(model, bounds_for(GQA, 1.0).start())
    reform_(small, model, range(4), tokens_for(GQA, batch=20), batch=3)
    for name, p in small.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


# -----------------------------------------------------------------------------
# evolution


def evolved(monkeypatch, loss_of, **kwargs):
    """A search whose candidates' losses are made up; (state, subnets evaluated, in order)."""
    tried = []

    def fake(model, windows, subnet):
        tried.append(subnet)
        return loss_of(subnet, len(tried)), 0.0
    monkeypatch.setattr(search, "evaluate", fake)
    monkeypatch.setattr(search, "arranged", lambda model, c: model)
    kwargs = dict(generations=6, population=20, seed=0) | kwargs
    return search.evolve(random_llama(GQA), bounds_for(GQA, 0.6), None, **kwargs), tried


def test_evolution_finds_what_is_better(monkeypatch):
    """Catches a search that keeps the worst, forgets the best, or never moves: with a loss that wants neurons in layer
    3 and few layers it must come close, and its best never gets worse."""
    best, loss = [], lambda s, n: len(s.layers) - dict(zip(s.layers, s.ffn_dim)).get(3, 0) / 80
    state, tried = evolved(monkeypatch, loss, save=lambda state: best.append(state["parents"][0][0]))
    assert best == sorted(best, reverse=True) and best[-1] < loss(tried[0], 1) - 1
    assert best[-1] == min(loss(s, 0) for s in tried)


def test_nan_loses_and_nothing_is_tried_twice(monkeypatch):
    """Catches a NaN that sorts first and breeds, and a cache that is never asked."""
    state, tried = evolved(monkeypatch, lambda s, n: float("nan") if n % 3 else 1 + 1 / n)
    assert [loss for loss, _ in state["parents"]] == sorted(loss for loss, _ in state["parents"])
    assert all(loss < 2 for loss, _ in state["parents"])
    assert len(tried) == len(state["losses"]) and len({c.key() for _, c in state["parents"]}) == 2


def test_the_seed_decides(monkeypatch):
    """Invariant 5. Catches a draw from the global generator, and a seed that does nothing."""
    loss = lambda s, n: sum(f * (i + 1) for i, f in zip(s.layers, s.ffn_dim)) / 1000
    first, tried = evolved(monkeypatch, loss)
    torch.rand(3)
    assert evolved(monkeypatch, loss)[1] == tried and evolved(monkeypatch, loss, seed=1)[1] != tried


# -----------------------------------------------------------------------------
# the program


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A small Llama's folder, and text for it."""
    desk = tmp_path_factory.mktemp("search")
    config = LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=560,
                         context=16)
    text = "the cat sat on the mat and the dog ate the cake; def main(argv): return [line for line in argv]\n" * 3
    save_tokenizer(desk / "base/tokenizer.model", train_bpe([text], 560))
    save_llama(desk / "base", config, random_llama(config).state_dict())
    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 700), ("val", 200)):
        write_shard(desk / f"data/{split}_000000.bin", torch.randint(560, (n,), generator=g).numpy(), 560)
    shutil.copy(desk / "base/tokenizer.model", desk / "data/tokenizer.model")
    return desk


def flags(desk, out, budget=0.6) -> list[str]:
    """search.py's command line on the desk."""
    return ["--llama", str(desk / "base"), "--data", str(desk / "data"), "--budget", str(budget), "--out", str(out),
            *FEW]


def test_windows_are_disjoint(desk):
    """Catches a search judged on what it was fitted to: fitness, calibration and report share no window."""
    shards = Shards(desk / "data", "train", 16, 560)
    for seed in range(3):
        fitness, calibration, report = search.disjoint_windows(desk / "data", 16, 560, seed, 20, len(shards) - 20, 5)
        rows = [tuple(row.tolist()) for part in (fitness[0], calibration, report[0]) for row in part]
        assert len(set(rows)) == len(rows) == len(shards) + 5
        assert torch.equal(fitness[0][:, 1:], fitness[1][:, :-1])


def test_a_folder_that_the_other_programs_read(desk, tmp_path, capsys):
    """Catches a heterogeneous folder that eval.py, sample.py or export.py stumble over, a loss in the table that is not
    that of the folder, a cost over the budget, and --no-reform that reforms."""
    losses = {}
    for name, more in (("reformed", []), ("raw", ["--no-reform"])):
        search.main([*flags(desk, tmp_path / name), *more])
        said = capsys.readouterr().err
        table = {line.split()[0]: line.split()[1:] for line in said.splitlines() if len(line.split()) == 3}
        evaluation.main(["--model", str(tmp_path / name), "--data", str(desk / "data"), "--windows", "4", "--json"])
        row = json.loads(capsys.readouterr().out)["rows"][0]
        assert f"{row['loss']:.4f}" == table["reformed" if name == "reformed" else "searched"][1]
        full = n_params(load_llama(desk / "base").config, SubNet.full(load_llama(desk / "base").config))
        got = row["params"] / full
        assert 0.6 - 3 * 32 / full < got <= 0.6 and table["searched"][0] == f"{got:.4f}"
        assert len(row["layers"]) == load_llama(tmp_path / name).config.n_layers and isinstance(row["ffn_dim"], list)
        losses[name] = row["loss"]
    assert losses["reformed"] != losses["raw"] and "reformed" not in table
    sample.main(["--model", str(tmp_path / "raw"), "--max-new-tokens", "3"])
    export.main(["--model", str(tmp_path / "raw"), "--budget", "1", "--out", str(tmp_path / "copy")])
    tokens = tokens_for(load_llama(desk / "base").config)
    assert torch.equal(load_llama(tmp_path / "copy")(tokens)[0], load_llama(tmp_path / "raw")(tokens)[0])
    with one_line_error(capsys, "another number of heads", "--format llama"):
        export.main(["--model", str(tmp_path / "raw"), "--format", "hf"])


def test_uniform_goes_to_hugging_face(desk, tmp_path):
    """Catches --uniform that is not: --format hf must take it."""
    search.main([*flags(desk, tmp_path / "u"), "--uniform"])
    config = load_llama(tmp_path / "u").config
    assert isinstance(config.ffn_dim, int) and isinstance(config.n_heads, int)
    export.main(["--model", str(tmp_path / "u"), "--format", "hf", "--out", str(tmp_path / "hf")])
    assert json.loads((tmp_path / "hf/config.json").read_text())["intermediate_size"] == config.ffn_dim


def test_bf16_stays_bf16(desk, tmp_path):
    """Catches a bf16 Llama that is written twice as large, or that the reformation cannot add to."""
    model = load_llama(desk / "base", dtype=torch.bfloat16)
    save_llama(tmp_path / "base", model.config, model.state_dict(), desk / "base/tokenizer.model")
    search.main([*flags(desk, tmp_path / "out"), "--llama", str(tmp_path / "base")])
    small = load_llama(tmp_path / "out", dtype=None)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in small.parameters())


KILLS = """
import os, signal, sys, search
real, die = search.save_tensors, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
for n, where in (1, "inside"), (2, "after"):
    pid, calls = os.fork(), []
    if pid == 0:
        def save(*args):
            calls.append(1)
            if len(calls) == n and where == "inside":
                os.fsync = die
            real(*args)
            if len(calls) == n:
                die()
        search.save_tensors = save
        search.main(sys.argv[1:])
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""


def test_killed_and_resumed_is_the_same_search(desk, tmp_path, capsys):
    """Catches state that is half-written or forgotten: killed before its first save was whole, and after its second,
    a search must end with the very files of one that ran straight."""
    search.main(flags(desk, tmp_path / "a"))
    (tmp_path / "kills.py").write_text(KILLS)
    killed = run(tmp_path / "kills.py", *flags(desk, tmp_path / "b"), "--resume")
    assert killed.returncode == 0, killed.stderr[-1000:]
    assert not (tmp_path / "b/params.json").exists()
    with one_line_error(capsys, "stopped at step 2 of 3", "--resume"):
        search.main(flags(desk, tmp_path / "b"))
    with one_line_error(capsys, "budget 0.6 -> 0.7", "choose another --out"):
        search.main([*flags(desk, tmp_path / "b", 0.7), "--resume"])
    search.main([*flags(desk, tmp_path / "b"), "--resume"])
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_users_mistakes_end_in_one_line(desk, tmp_path, capsys):
    """Catches a traceback, or a folder begun, for what a user can get wrong."""
    out = tmp_path / "out"
    for budget in (0.01, 1.2, float("nan"), -1):
        with one_line_error(capsys, "smallest sub-network, 0.", "try --budget 0.5"):
            search.main(flags(desk, out, budget))
    with one_line_error(capsys, "43 training windows of 16", "--calibration-windows", "prepare.py"):
        search.main([*flags(desk, out), "--calibration-windows", "41"])
    with one_line_error(capsys, "--population 0", "1 or more"):
        search.main([*flags(desk, out), "--population", "0"])
    with one_line_error(capsys, "choose another --out"):
        search.main(flags(desk, desk / "base"))
    other = tmp_path / "other"
    shutil.copytree(desk / "base", other)
    with one_line_error(capsys, "not from an earlier search"):
        search.main(flags(desk, other))
    with one_line_error(capsys, "no Llama folder"):
        search.main([*flags(desk, out), "--llama", str(tmp_path / "nothing")])
    shutil.copytree(desk / "data", tmp_path / "data")
    (tmp_path / "data/tokenizer.model").write_bytes(b"another")
    with one_line_error(capsys, "another tokenizer"):
        search.main([*flags(desk, out), "--data", str(tmp_path / "data")])
    model = load_llama(desk / "base")
    c = some(model.config, 0.6)
    small = slim(model, c)
    save_llama(tmp_path / "mixed", small.config, small.state_dict())
    with one_line_error(capsys, "another shape in every layer"):
        search.main([*flags(desk, out), "--llama", str(tmp_path / "mixed")])
    assert not out.exists()


def test_a_full_disk_ends_in_one_line(desk, tmp_path, capsys, monkeypatch):
    """Catches a traceback, or a folder that looks whole, when a generation's state cannot be written."""
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint.torch, "save", full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        search.main(flags(desk, tmp_path / "full"))
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert not files_of(tmp_path / "full")
