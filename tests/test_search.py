"""The search folder: against slow and obvious versions, and through kills."""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import export
import plumbing.checkpoint as checkpoint
import sample
import search.__main__ as search
import search.candidates as candidates
import search.evolution as evolution
import search.reform as reform
from data.shards import Shards, write_shard
from data.tokenizer import save_tokenizer, train_bpe
from model import Gates, LlamaConfig, SubNet
from plumbing.checkpoint import load_llama, load_tensors, save_llama, save_tensors
from search.candidates import Bounds, Candidate, arranged, check_budget, cut_out, resized, swapped
from search.evolution import crossed, disjoint_windows, mutated
from search.reform import DAMP, correction, reform_, unit_scores
from space import cost, kv_groups, n_params, random_generator
from tests.helpers import (
    GQA,
    MHA,
    SHAPES,
    close,
    files_of,
    one_line_error,
    random_llama,
    tokens_for,
)
from tests.processes import run

FEW = ["--generations", "3", "--population", "10", "--fitness-windows", "3", "--calibration-windows", "6",
       "--report-windows", "4", "--device", "cpu"]


def bounds_for(config: LlamaConfig, budget: float, uniform: bool = False, seed: int = 0) -> Bounds:
    """Bounds with scores drawn at random."""
    g = torch.Generator().manual_seed(seed)
    of_heads = torch.rand(config.n_layers, config.n_heads, generator=g)
    of_neurons = torch.rand(config.n_layers, config.ffn_dim, generator=g)
    return Bounds.from_scores(config, budget, (of_heads, of_neurons), uniform)


def some(config: LlamaConfig, budget: float, uniform: bool = False, seed: int = 0) -> Candidate:
    """A candidate far from the start: two mutants of it, crossed, without one layer at least."""
    bounds = bounds_for(config, budget, uniform, seed)
    rng = random_generator(seed)
    a = mutated(bounds, bounds.start(), rng, depth=1, ratio=1, mask=1)
    b = mutated(bounds, bounds.start(), rng, depth=1, ratio=1, mask=1)
    return crossed(bounds, a, b, rng)


# -----------------------------------------------------------------------------
# candidates


def inner_sizes(model) -> list[int]:
    """Numbers in each tensor that is no embedding: what a budget counts."""
    return [p.numel() for name, p in model.named_parameters() if "embed" not in name and "output" not in name]


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_sliced_and_written_are_the_same(shape, tmp_path):
    """Invariant 2. Catches a gather that takes other units than the masks say, heads that leave
    their KV group, layers numbered anew in the sort, a params.json whose lists are not the folder's
    shapes, and more parameters than the budget has."""
    config = SHAPES[shape]
    tokens = tokens_for(config)
    model = random_llama(config)
    full = sum(inner_sizes(model))
    for seed in range(2):
        c = some(config, 0.55, seed=seed)
        subnet = c.subnet(config)
        assert c.layers.sum() < config.n_layers or len(set(subnet.ffn_dim)) > 1
        gates = Gates(torch.ones(config.dim), c.heads.float(), c.neurons.float(), c.layers.float())
        masked, _ = model(tokens, gates=gates)
        sliced, _ = arranged(model, c)(tokens, subnet=subnet)
        assert close(sliced, masked)
        small = cut_out(model, c)
        written, _ = small(tokens)
        assert close(written, masked)
        save_llama(tmp_path, small.config, small.state_dict())
        assert torch.equal(load_llama(tmp_path)(tokens)[0], written)
        got = sum(inner_sizes(small))
        assert got == n_params(config, subnet)
        assert 0.55 * full - 3 * config.dim < got <= 0.55 * full


def test_everything_kept_is_the_model():
    """Catches a candidate of cost 1 that is not the whole network, or is another function."""
    for config in (GQA, MHA):
        model = random_llama(config)
        tokens = tokens_for(config)
        bounds = bounds_for(config, 1.0)
        c = bounds.start()
        assert c.subnet(config) == SubNet.full(config)
        assert torch.equal(cut_out(model, c)(tokens)[0], model(tokens)[0])
        mutant = mutated(bounds, c, random_generator(1), depth=1, ratio=1, mask=1)
        assert mutant.subnet(config) == SubNet.full(config)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_every_candidate_meets_the_budget(config, uniform):
    """Catches a repair that goes over, that leaves room for one more neuron (uniform: in each
    layer), that empties a layer, a KV group or the network, and one that makes groups or, if
    uniform, layers unlike."""
    full = n_params(config, SubNet.full(config))
    groups = kv_groups(config)
    nearly_least = 0.185 if config is GQA else 0.16
    for budget in (nearly_least, 0.3, 0.5, 0.7, 0.813, 0.9, 0.97, 0.999, 1.0):
        bounds = bounds_for(config, budget, uniform)
        rng = random_generator(budget)
        made = [bounds.start()]
        for k in range(6):
            made.append(mutated(bounds, made[k // 2], rng, depth=0.7, ratio=0.5, mask=0.5))
            made.append(crossed(bounds, made[-1], made[k // 2], rng))
        for c in made:
            subnet = c.subnet(config)
            room = budget * full - n_params(config, subnet)
            step = 3 * config.dim                            # one neuron
            if uniform:
                step *= len(subnet.layers)
            # With all neurons in, and heads that are too large a step for what is left, none can
            # fill the room.
            if all(f == config.ffn_dim for f in subnet.ffn_dim):
                step = max(full / config.n_layers, step)
            assert -1e-6 < room < step, (budget, subnet, room / full)
            assert len(subnet.layers) >= 2
            assert min(subnet.ffn_dim) >= 8
            assert min(subnet.n_heads) >= groups
            in_groups = c.heads.unflatten(1, (groups, -1)).sum(-1)
            assert (in_groups == in_groups[:, :1]).all()
            if uniform:
                assert len(set(subnet.ffn_dim)) == 1
                assert len(set(subnet.n_heads)) == 1


@pytest.mark.parametrize("ffn_dim,unit", [(255, 1), (256, 32), (300, 32), (2047, 32), (2048, 256),
                                          (2300, 256)])
@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_uniform_neurons_come_in_multiples(config, ffn_dim, unit, capsys):
    """Catches neurons that llama.cpp's quantisations have no block for, a size that is rounded up
    and goes over the budget, one that is rounded down twice or to nothing, and the source's own
    size rounded where it fits."""
    config = dataclasses.replace(config, dim=24, ffn_dim=ffn_dim)
    full = n_params(config, SubNet.full(config))
    least = unit * math.ceil(ffn_dim / 10 / unit)
    smallest = cost(config, SubNet.uniform(24, [0, 1], kv_groups(config), least))
    check_budget(config, smallest, uniform=True)
    with one_line_error(capsys, f"{least} neurons"):
        check_budget(config, smallest - 1e-6, uniform=True)
    sizes = set()
    for budget in (smallest, 0.4, 0.55, 0.7, 0.85, 0.999, 1.0):
        bounds = bounds_for(config, budget, uniform=True)
        rng = random_generator(budget)
        made = [bounds.start()]
        for k in range(5):
            made.append(mutated(bounds, made[k // 2], rng, depth=0.7, ratio=0.5, mask=0.5))
            made.append(crossed(bounds, made[-1], made[k // 2], rng))
        for c in made:
            subnet = c.subnet(config)
            size = subnet.ffn_dim[0]
            assert set(subnet.ffn_dim) == {size} and len(set(subnet.n_heads)) == 1
            assert size >= least and (size % unit == 0 or size == ffn_dim)
            room = budget * full - n_params(config, subnet)
            larger = min(size - size % unit + unit, ffn_dim)
            step = 3 * config.dim * (larger - size) * len(subnet.layers)
            assert room > -1e-6 and (room < step or size == ffn_dim), (budget, subnet)
            sizes.add(size)
    assert len(sizes) > 3 and ffn_dim in sizes
    loose = bounds_for(config, 0.55).start().subnet(config)  # layers that may differ: to the last neuron
    assert 0.55 * full - n_params(config, loose) < 3 * config.dim


def test_half_of_the_layers_is_the_fewest(capsys):
    """Catches a network of one layer where its budget would fit into one, and a smallest budget
    that is not that of half the layers, a head in each KV group and a tenth of the neurons."""
    bounds = bounds_for(GQA, 0.2)
    start = bounds.start()
    for kept in range(4):
        c = start._replace(layers=torch.arange(4) == kept)
        assert bounds.repaired(c, random_generator(kept)).layers.sum() == 2
    smallest = n_params(GQA, SubNet.uniform(48, [0, 1], 2, 8)) / n_params(GQA, SubNet.full(GQA))
    check_budget(GQA, smallest)
    with one_line_error(capsys, f"{smallest:.4f} (2 layers, 2 heads, 8 neurons)"):
        check_budget(GQA, smallest - 1e-6)


def test_a_step_too_far_is_taken_back():
    """Catches a repair that goes over the budget where a head costs more than all neurons of its layer."""
    config = dataclasses.replace(GQA, head_dim=32, ffn_dim=12)
    full = n_params(config, SubNet.full(config))
    for k in range(30, 101, 2):
        for uniform in (False, True):
            bounds = bounds_for(config, k / 100, uniform)
            c = mutated(bounds, bounds.start(), random_generator(k), depth=1, ratio=1, mask=1)
            subnet = c.subnet(config)
            assert n_params(config, subnet) <= k / 100 * full + 1e-6
            assert min(subnet.ffn_dim) >= bounds.fewest_neurons


def test_the_start_is_the_best_units_at_one_ratio():
    """Catches a start that takes the worst units, or ranks heads over all KV groups at once."""
    def are_the_best(kept, scores) -> bool:
        return scores[kept].min() > scores[~kept].max()

    g = torch.Generator().manual_seed(3)
    of_heads = torch.rand(4, 8, generator=g)
    of_neurons = torch.rand(4, 80, generator=g)
    bounds = Bounds.from_scores(GQA, 0.5, (of_heads, of_neurons))
    c = bounds.start()
    for layer in range(4):
        assert are_the_best(c.neurons[layer], of_neurons[layer])
        for group in (slice(0, 4), slice(4, 8)):
            kept = c.heads[layer, group]
            assert kept.sum() == 2
            assert are_the_best(kept, of_heads[layer, group])
            assert sorted(bounds.heads[layer, group].tolist()) == [0, 1, 2, 3]  # places inside the group
    assert c.layers.all()
    sizes = c.neurons.sum(1)
    assert sizes.max() - sizes.min() <= 1


def test_resized_and_swapped():
    """Catches a resize that throws out a mutation's units before it has to, and a swap that changes
    how many are kept or, with few kept or nearly all, nothing."""
    kept = torch.tensor([True, False, True, False, True, False])
    place = torch.tensor([0, 5, 1, 4, 3, 2])
    wanted = {1: [4], 2: [2, 4], 3: [0, 2, 4], 4: [0, 1, 2, 4], 5: [0, 1, 2, 3, 4]}
    for n, units in wanted.items():
        assert resized(kept, place, n).nonzero()[:, 0].tolist() == units
    for n, most in ((40, 4), (60, 4), (95, 1), (1, 1), (100, 0)):
        before = torch.arange(100) < n
        after = swapped(before, random_generator(n))
        assert after.sum() == n
        assert (before & ~after).sum() == most


def test_what_left_out_layers_remember_is_no_part_of_the_name():
    """Catches a cache that takes one network for two, or two for one."""
    c = some(GQA, 0.5, seed=1)
    out = (~c.layers).nonzero()[:, 0]
    assert len(out)
    for part in ("heads", "neurons"):
        masks = getattr(c, part).clone()
        masks[out[0]] ^= True
        assert c._replace(**{part: masks}).key() == c.key()
        masks[c.layers.nonzero()[0, 0]] ^= True
        assert c._replace(**{part: masks}).key() != c.key()
    assert c._replace(layers=c.layers.roll(1)).key() != c.key()


# -----------------------------------------------------------------------------
# score


def inputs_of(model, tokens) -> dict:
    """The inputs of every listening point (tokens, units), in fp64, from one ordinary forward."""
    seen = {}

    def listen(module, key):
        def hook(_module, _inputs, output):
            seen[key] = output.detach().double().flatten(0, 1)
        return module.register_forward_hook(hook)

    hooks = []
    for i, block in enumerate(model.layers):
        hooks.append(listen(block.attention_norm, (i, "attn")))
        hooks.append(listen(block.attention.heads, (i, "wo")))
        hooks.append(listen(block.ffn_norm, (i, "mlp")))
        hooks.append(listen(block.feed_forward.neurons, (i, "w2")))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_scores_are_the_formula(config):
    """Catches the diagonal of G for that of its inverse, W before the square, rows for columns, wk
    of a group counted for its query heads, a last batch that is left out."""
    model = random_llama(config)
    tokens = tokens_for(config, batch=7)
    heads, neurons = unit_scores(model, tokens, batch=3)
    seen = inputs_of(model, tokens)
    i = 2                                                    # any layer

    def phi(linear, point):
        x = seen[i, point]
        gram = x.T @ x
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        inverse = torch.linalg.inv(2 * gram)
        result = linear.weight.detach().double() ** 2
        for j in range(len(gram)):
            result[:, j] /= inverse[j, j]
        return result

    mlp = model.layers[i].feed_forward
    w1 = phi(mlp.w1, "mlp")
    w3 = phi(mlp.w3, "mlp")
    w2 = phi(mlp.w2, "w2")
    for n in range(config.ffn_dim):
        want = w1[n].sum() + w3[n].sum() + w2[:, n].sum()
        assert close(neurons[i, n].double(), want, 1e-4)
    attention = model.layers[i].attention
    wq = phi(attention.wq, "attn")
    wk = phi(attention.wk, "attn")
    wv = phi(attention.wv, "attn")
    wo = phi(attention.wo, "wo")
    for h in range(config.n_heads):
        rows = slice(h * config.head_dim, (h + 1) * config.head_dim)
        want = wq[rows].sum() + wo[:, rows].sum()
        if config is MHA:
            want = want + wk[rows].sum() + wv[rows].sum()
        assert close(heads[i, h].double(), want, 1e-4)


def test_a_singular_gram_is_damped_and_a_broken_one_named(capsys):
    """Catches a score or a reformation that fails on fewer tokens than neurons, or on neurons that
    never fire; and weights that are not finite and pass for a result."""
    model = random_llama(GQA)
    tokens = tokens_for(GQA, batch=2, length=5)              # 10 tokens, 80 neurons
    with torch.no_grad():
        model.layers[1].feed_forward.w3.weight[:7] = 0
    heads, neurons = unit_scores(model, tokens, 1)
    assert heads.isfinite().all()
    assert neurons.isfinite().all()
    assert neurons[1, 7:].mean() > neurons[1, :7].mean()
    c = some(GQA, 0.6)
    small = cut_out(model, c)
    for before, after in reform_(small, model, c.subnet(GQA).layers, tokens, 1):
        assert after <= before
    for p in small.parameters():
        assert p.isfinite().all()
    indefinite = torch.ones(3, 3) - 0.5 * torch.eye(3)       # as rounding could leave it
    assert reform.inverse_diagonal(indefinite).isfinite().all()
    with torch.no_grad():
        model.layers[2].attention.wo.weight[3, 3] = float("nan")
    with one_line_error(capsys, "layer 2, feed_forward", "not finite"):
        unit_scores(model, tokens, 1)


def test_grams_are_fp32_where_forwards_are_not(monkeypatch):
    """Catches a Gram made under autocast: with 8 bits, sums of thousands of tokens lose
    what tells units apart."""
    seen = []

    def half(device):
        return torch.autocast("cpu", torch.bfloat16)

    def watched(function):
        def call(*args):
            seen.extend(args)
            return function(*args)
        return call

    monkeypatch.setattr(reform, "autocast", half)
    monkeypatch.setattr(reform, "inverse_diagonal", watched(reform.inverse_diagonal))
    monkeypatch.setattr(reform, "correction", watched(reform.correction))
    model = random_llama(GQA)
    tokens = tokens_for(GQA)
    c = some(GQA, 0.6)
    unit_scores(model, tokens, 2)
    reform_(cut_out(model, c), model, c.subnet(GQA).layers, tokens, 2)
    tensors = [t for t in seen if torch.is_tensor(t)]
    assert len(tensors) >= 20
    for t in tensors:
        assert t.dtype == torch.float32
        assert not torch.equal(t, t.bfloat16().float())


# -----------------------------------------------------------------------------
# reformation


def test_the_closed_form_is_the_minimum():
    """Catches a wrong damping, a transposed residual, a scale that is not taken out again: against
    least squares on the tokens themselves, with the ridge as rows of its own."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x = normal(200, 12) @ normal(12, 12)
    w = normal(5, 12)
    y = normal(200, 5)
    gap = y - x @ w.T
    gram = x.T @ x
    ridge = (0.01 * gram.diagonal()).sqrt().diag()
    nothing = torch.zeros(12, 5, dtype=torch.float64)
    want = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([gap, nothing])).solution.T
    assert close(correction(gram, gap.T @ x), want, 1e-9)
    assert not correction(gram, nothing.T).any()


def admm(weight, gram, kept, iterations: int, rho: float = 1.0) -> torch.Tensor:
    """The paper's way to the reformed weights (out, n), on the Gram (n, n) of its inputs.

    min over W of ||X W^T - X weight^T||^2, where W is zero on inputs that are not kept (n,): the
    free minimum and the zeros take turns."""
    identity = torch.eye(len(gram), dtype=gram.dtype)
    scale = gram.diagonal().rsqrt()                          # a rho of 1 means something only beside ones
    unit = gram * scale * scale[:, None] + DAMP * identity
    inverse = torch.linalg.inv(unit + rho * identity)
    w = weight / scale
    z = w * kept
    u = torch.zeros_like(w)
    for _ in range(iterations):
        free = (w @ unit + rho * (z - u)) @ inverse
        z = (free + u) * kept
        u = u + free - z
    return z * scale


def test_the_papers_admm_comes_to_the_closed_form():
    """Catches a mask with its polarity the wrong way round, a target of zeros (the released
    code has both), and a closed form that is not the problem's: after enough iterations
    both are the same to 1e-6."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(400, 24, generator=g, dtype=torch.float64)
    x = x * (0.2 + torch.rand(24, generator=g)) + 0.3
    w = torch.randn(7, 24, generator=g, dtype=torch.float64)
    kept = torch.rand(24, generator=g) < 0.6
    gram = x.T @ x
    missing = w[:, ~kept] @ gram[~kept][:, kept]
    want = torch.zeros_like(w)
    want[:, kept] = w[:, kept] + correction(gram[kept][:, kept], missing)
    assert not close(admm(w, gram * 1e-2, kept, iterations=1), want, 1e-6)
    assert close(admm(w, gram * 1e-2, kept, iterations=3000), want, 1e-6)

    def error(v) -> float:
        return (x @ (v - w).T).square().sum().item()

    assert error(want) < error(w * kept)
    assert error(admm(w, gram * 1e-2, kept, iterations=30)) < error(w * kept)


def stream_before_norm(model, tokens) -> torch.Tensor:
    """The residual stream that the final norm reads."""
    seen = []

    def listen(_module, inputs, _output):
        seen.append(inputs[0].detach().double())

    hook = model.norm.register_forward_hook(listen)
    model(tokens)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("shape", ["gqa", "mha", "tied"])
def test_reformation_never_raises_the_error(shape):
    """Catches a weight reformed on inputs from before its predecessors were, an error that is not
    that of the streams, and a step that makes things worse: at each weight the squared error must
    fall, and the last one is that of the whole models side by side."""
    config = SHAPES[shape]
    model = random_llama(config)
    tokens = tokens_for(config, batch=40, length=20)
    for seed in range(4):
        c = some(config, 0.6, seed=seed)
        layers = c.subnet(config).layers
        small = cut_out(model, c)
        raw = {name: p.clone() for name, p in small.named_parameters()}
        errors = reform_(small, model, layers, tokens, batch=7)
        assert len(errors) == 2 * len(layers)
        for before, after in errors:
            assert after <= before * (1 + 1e-6) + 1e-10

        # nothing but wo and w2 changes
        changed = {name for name, p in small.named_parameters() if not torch.equal(p, raw[name])}
        may_change = set()
        for i in range(len(layers)):
            may_change |= {f"layers.{i}.attention.wo.weight", f"layers.{i}.feed_forward.w2.weight"}
        assert changed <= may_change
        assert len(changed) >= len(may_change) - 1           # with all heads layer 0's wo stays

        # the last error is that of whole models
        if layers[-1] == config.n_layers - 1:
            want = stream_before_norm(model, tokens)
            gap = (want - stream_before_norm(small, tokens)).square().sum()
            raw_gap = (want - stream_before_norm(cut_out(model, c), tokens)).square().sum()
            relative = (gap / want.square().sum()).item()
            assert abs(relative / errors[-1][1] - 1) < 1e-4
            assert gap < raw_gap


def test_the_first_reformed_weight_is_least_squares():
    """Catches another target than the dense stream at that point: layer 0's wo, by explicit least squares."""
    def wo_of(llama):
        return llama.layers[0].attention.wo.weight.detach().double().clone()

    model = random_llama(GQA)
    tokens = tokens_for(GQA, batch=30)
    c = bounds_for(GQA, 0.5).start()
    small = cut_out(model, c)
    x = inputs_of(model, tokens)[0, "wo"]
    y = x @ wo_of(model).T
    columns = (c.heads[0].nonzero() * 8 + torch.arange(8)).flatten()
    kept = x[:, columns]
    old = wo_of(small)
    gram = kept.T @ kept
    ridge = 0.01 * gram.diagonal().diag()
    want = old + (y - kept @ old.T).T @ kept @ torch.linalg.inv(gram + ridge)
    reform_(small, model, range(4), tokens, batch=4)
    assert not close(old, want, 1e-2)
    assert close(wo_of(small), want, 1e-4)


def test_reforming_the_whole_model_changes_nothing():
    """S = all is the identity. Catches a ridge that pulls towards zero instead of towards the weights."""
    model = random_llama(GQA)
    small = cut_out(model, bounds_for(GQA, 1.0).start())
    reform_(small, model, range(4), tokens_for(GQA, batch=20), batch=3)
    for name, p in small.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


# -----------------------------------------------------------------------------
# a generation


class Unrepaired(Bounds):
    """Hands out what a mutation or a crossover makes, before the repair: (candidate,
    heads per group, neurons)."""
    first: Candidate

    def repaired(self, c, rng, heads=None, neurons=None):
        return c, heads, neurons

    def start(self) -> Candidate:
        return self.first


WIDE = dataclasses.replace(GQA, n_layers=8, n_heads=20, n_kv_heads=2)


def few_units(config: LlamaConfig, seed: int) -> Candidate:
    """Half of the layers, 2 heads in each KV group and 7 neurons: less than any mutation draws."""
    g = torch.Generator().manual_seed(seed)

    def drawn(units: int, n: int) -> torch.Tensor:
        order = torch.rand(config.n_layers, units, generator=g).argsort(dim=-1)
        return order < n

    groups = kv_groups(config)
    heads = [drawn(config.n_heads // groups, 2) for _ in range(groups)]
    layers = torch.rand(config.n_layers, generator=g).argsort() < config.n_layers // 2
    return Candidate(layers, torch.cat(heads, dim=1), drawn(config.ffn_dim, 7))


def unrepaired(budget: float) -> Unrepaired:
    """Such bounds for the WIDE Llama; the start is few_units() with seed 99."""
    scored = bounds_for(WIDE, budget)
    bounds = Unrepaired(WIDE, budget, scored.heads, scored.neurons)
    bounds.first = few_units(WIDE, 99)
    return bounds


def changes(before: Candidate, made) -> dict[str, torch.Tensor]:
    """What a mutation changed, per layer: bool (n_layers,)."""
    after, heads, neurons = made
    return dict(depth=before.layers != after.layers,
                heads=heads != 2,
                neurons=neurons != 7,
                units=(before.neurons != after.neurons).any(1),
                head_units=(before.heads != after.heads).any(1))


def check_chances(pairs, depth: float, ratio: float, mask: float) -> None:
    """pairs (parent, what was made of it): do the changes come with these chances, to four deviations?"""
    found = [changes(before, made) for before, made in pairs]
    for kind, p in dict(depth=depth, heads=ratio, neurons=ratio, units=mask, head_units=mask).items():
        came = torch.stack([change[kind] for change in found])   # candidates, n_layers
        if kind == "depth":                                      # one layer at most comes or goes
            assert came.sum(1).max() == 1
            came = came.any(1)
        share = came.double().mean().item()
        assert abs(share - p) < 4 * (p * (1 - p) / came.numel()) ** 0.5, (kind, share)


def test_a_generation_has_the_papers_numbers(monkeypatch):
    """Catches chances of mutation, proportions and parents that are not the paper's: of 100, 50
    are mutants (depth .1, ratio .3, mask .1), 30 are crossovers, and 20 are strong mutants of the
    start (ratio .3, mask .6)."""
    bounds = unrepaired(0.8)
    parents = [few_units(WIDE, seed) for seed in range(10)]
    of_parents = []
    of_start = []
    couples = []

    def watched_mutated(bounds, c, *args, **kwargs):
        made = mutated(bounds, c, *args, **kwargs)
        kin = of_start if c is bounds.first else of_parents
        kin.append((c, made))
        return made

    def watched_crossed(bounds, a, b, rng):
        couples.append((a, b))
        return crossed(bounds, a, b, rng)

    monkeypatch.setattr(evolution, "mutated", watched_mutated)
    monkeypatch.setattr(evolution, "crossed", watched_crossed)
    for generation in range(6):
        children = evolution.offspring(bounds, parents, random_generator(generation), 100)
        n = generation + 1
        assert len(children) == 100
        assert (len(of_parents), len(couples), len(of_start)) == (50 * n, 30 * n, 20 * n)
    check_chances(of_parents, depth=0.1, ratio=0.3, mask=0.1)
    check_chances(of_start, depth=0.1, ratio=0.3, mask=0.6)

    # Every parent has its share of the mutants, and of both sides of the crossovers.
    mothers, fathers = zip(*couples)
    for chosen in ([c for c, _ in of_parents], mothers, fathers):
        for parent in parents:
            times = sum(c is parent for c in chosen)
            expected = len(chosen) / 10
            assert abs(times - expected) < 4 * expected ** 0.5


@pytest.mark.parametrize("budget,heads,neurons", [(0.8, 8, 32), (0.5, 6, 8)])
def test_a_mutation_draws_the_papers_ranges(budget, heads, neurons):
    """Catches ranges that are not the paper's: at 80 % from .8 of the heads and .4 of the neurons,
    at 50 % from .6 and .1, and up to all of them. A layer may come as well as go, and a swap leaves
    every count as it was."""
    bounds = unrepaired(budget)
    parent = few_units(WIDE, 0)
    rng = random_generator(budget)
    drawn_heads = []
    drawn_neurons = []
    came = torch.zeros(8)
    went = torch.zeros(8)
    for _ in range(150):
        c, n_heads, n_neurons = mutated(bounds, parent, rng, depth=1, ratio=1, mask=1)
        drawn_heads += n_heads.tolist()
        drawn_neurons += n_neurons.tolist()
        came += c.layers & ~parent.layers
        went += parent.layers & ~c.layers
        assert (c.neurons.sum(1) == 7).all()
        assert (c.heads.unflatten(1, (2, 10)).sum(2) == 2).all()
        # A tenth of the kept units, one at least, in each layer and in each KV group.
        assert ((parent.neurons & ~c.neurons).sum(1) == 1).all()
        assert ((parent.heads & ~c.heads).unflatten(1, (2, 10)).sum(2) == 1).all()
    assert set(drawn_heads) == set(range(heads, 11))
    assert set(drawn_neurons) == set(range(neurons, 81))
    assert (came > 0).sum() == (went > 0).sum() == 4


def test_a_mutations_sizes_are_those_of_the_candidate():
    """Catches a mutation whose sizes are lost on the way to the repair: where the budget allows
    what was drawn, it must come out."""
    bounds = bounds_for(GQA, 0.8)
    start = bounds.start()
    rng = random_generator(0)
    heads = torch.tensor([4, 3, 1, 4])
    neurons = torch.tensor([20, 80, 40, 60])
    c = bounds.repaired(start, rng, heads, neurons)
    assert torch.equal(c.heads.sum(1) // 2, heads)
    kept = c.neurons.sum(1)
    assert kept[0] < kept[2] < kept[3] <= kept[1]
    own = bounds.repaired(c, rng)                            # without any, its own
    assert own.key() == c.key()


def test_a_crossover_takes_every_layer_from_one_parent_or_the_other():
    """Catches a child of one parent alone, a layer with one parent's heads and the other's neurons,
    and a child that is repaired from other sizes than its own."""
    bounds = unrepaired(0.8)
    a = few_units(WIDE, 0)
    b = few_units(WIDE, 1)
    rng = random_generator(0)
    draws = 200
    from_a = torch.zeros(8)

    def same(layer: int, child: Candidate, parent: Candidate) -> bool:
        return all(torch.equal(mine[layer], theirs[layer]) for mine, theirs in zip(child, parent))

    for _ in range(draws):
        child, heads, neurons = crossed(bounds, a, b, rng)
        assert heads is None and neurons is None             # the child's own sizes
        for layer in range(8):
            assert same(layer, child, a) != same(layer, child, b)
            from_a[layer] += same(layer, child, a)
    assert (abs(from_a - draws / 2) < 4 * (draws / 4) ** 0.5).all()


# -----------------------------------------------------------------------------
# evolution


def evolved(monkeypatch, loss_of, **kwargs):
    """A search whose candidates' losses are made up; (state, subnets evaluated, in order)."""
    tried = []

    def fake(model, windows, subnet):
        tried.append(subnet)
        return loss_of(subnet, len(tried)), 0.0

    monkeypatch.setattr(evolution, "evaluate", fake)
    monkeypatch.setattr(evolution, "arranged", lambda model, c: model)
    kwargs = dict(generations=5, population=20, seed=0) | kwargs
    state = evolution.evolve(SimpleNamespace(config=GQA), bounds_for(GQA, 0.6), None, **kwargs)
    return state, tried


def test_evolution_finds_what_is_better(monkeypatch):
    """Catches a search that keeps the worst, forgets the best, or never moves: with a loss that
    wants neurons in layer 3 and few layers it must come close, and its best never gets worse."""
    def loss(s, n=0):
        sizes = dict(zip(s.layers, s.ffn_dim))
        return len(s.layers) - sizes.get(3, 0) / 80

    best = []
    state, tried = evolved(monkeypatch, loss, save=lambda state: best.append(state["parents"][0][0]))
    assert best == sorted(best, reverse=True)
    assert best[-1] < loss(tried[0]) - 1
    assert best[-1] == min(loss(s) for s in tried)


def test_nan_loses_and_nothing_is_tried_twice(monkeypatch):
    """Catches a NaN that sorts first and breeds, and a cache that is never asked."""
    def loss(s, n):
        return float("nan") if n % 3 else 1 + 1 / n

    state, tried = evolved(monkeypatch, loss)
    losses = [loss for loss, _ in state["parents"]]
    assert losses == sorted(losses)
    assert 1 < min(losses) and max(losses) < 2               # no NaN, and nothing in its place
    assert len(tried) == len(state["losses"])
    assert len({c.key() for _, c in state["parents"]}) == 2


def test_the_best_tenth_of_all_are_parents(monkeypatch):
    """Catches more or fewer parents than a tenth, and parents that are forgotten with their
    generation: the paper keeps 10 of 100, the best so far."""
    states = []
    made = []

    def loss(s, n):
        made.append(n % 10 + n / 1000)                       # the best ones come one in ten
        return made[-1]

    def keep(state):
        states.append(([loss for loss, _ in state["parents"]], sorted(made)))

    state, tried = evolved(monkeypatch, loss, generations=2, population=100, save=keep)
    for parents, known in states:
        assert parents == known[:10]
    assert sorted(state["losses"].values()) == sorted(made)
    assert state["parents"][0][0] == made[9] == min(made)    # of the first generation


def test_generations_differ(monkeypatch):
    """Catches a generation that repeats the draws of the one before: of the same two parents its
    candidates must be others."""
    def loss(s, n):
        return float(n)                                      # the first two are the best

    _, two = evolved(monkeypatch, loss, generations=2)
    _, three = evolved(monkeypatch, loss, generations=3)
    assert len(three) > len(two) + 5


def test_the_fitness_is_the_candidates_loss():
    """Catches the loss of the first units for that of the candidate's, and a loss on other windows:
    against the masked model."""
    model = random_llama(GQA)
    x = tokens_for(GQA, batch=5)
    y = tokens_for(GQA, batch=5, seed=2)
    losses = {}
    for seed in range(3):
        c = some(GQA, 0.6, seed=seed)
        gates = Gates(torch.ones(GQA.dim), c.heads.float(), c.neurons.float(), c.layers.float())
        _, want = model(x, y, gates=gates)
        got = evolution.fitness_of(c, model, (x, y), losses)
        assert abs(got - want.item()) < 1e-4
        assert losses[c.key()] == got


def test_the_seed_decides(monkeypatch):
    """Invariant 5. Catches a draw from the global generator, and a seed that does nothing."""
    def loss(s, n):
        return sum(f * (i + 1) for i, f in zip(s.layers, s.ffn_dim)) / 1000

    _, tried = evolved(monkeypatch, loss, generations=2)
    torch.rand(3)
    _, again = evolved(monkeypatch, loss, generations=2)
    _, other = evolved(monkeypatch, loss, generations=2, seed=1)
    assert again == tried
    assert other != tried


# -----------------------------------------------------------------------------
# the program


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A small Llama's folder, and text for it."""
    desk = tmp_path_factory.mktemp("search")
    config = LlamaConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=560,
                         context=16)
    text = ("the cat sat on the mat and the dog ate the cake; "
            "def main(argv): return [line for line in argv]\n") * 3
    save_tokenizer(desk / "base/tokenizer.model", train_bpe([text], 560))
    save_llama(desk / "base", config, random_llama(config).state_dict())
    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 700), ("val", 200)):
        write_shard(desk / f"data/{split}_000000.bin", torch.randint(560, (n,), generator=g).numpy(), 560)
    shutil.copy(desk / "base/tokenizer.model", desk / "data/tokenizer.model")
    return desk


def flags(desk, out, budget=0.6) -> list[str]:
    """The command line of python -m search, on the desk."""
    return ["--llama", str(desk / "base"), "--data", str(desk / "data"), "--budget", str(budget),
            "--out", str(out), *FEW]


def test_windows_are_disjoint(desk):
    """Catches a search judged on what it was fitted to: fitness, calibration and report share no window."""
    config = load_llama(desk / "base").config
    shards = Shards(desk / "data", "train", 16, 560)
    for seed in range(3):
        args = SimpleNamespace(data=desk / "data", seq_len=16, fitness_windows=20,
                               calibration_windows=len(shards) - 20, report_windows=5)
        (x, y), calibration, (report, _) = disjoint_windows(args, config, seed)
        rows = [tuple(row) for row in torch.cat([x, calibration, report]).tolist()]
        assert len(rows) == len(set(rows)) == len(shards) + 5
        assert torch.equal(x[:, 1:], y[:, :-1])


def test_every_part_reads_its_own_windows(desk, tmp_path, monkeypatch):
    """Catches a search that is ranked on the text of its report, a score or reformation on the text
    of the fitness, and a Llama written that is not the best one found."""
    args = search.parse_args(flags(desk, tmp_path / "out"))
    config = load_llama(desk / "base").config
    (fitness, _), calibration, (report, _) = disjoint_windows(args, config, 0)
    seen = {}

    def watched(module, name, windows_of):
        real = getattr(module, name)

        def call(*args):
            seen.setdefault((module.__name__, name), []).append(windows_of(args))
            return real(*args)
        monkeypatch.setattr(module, name, call)

    watched(search, "unit_scores", lambda args: args[1])
    watched(search, "reform_", lambda args: args[3])
    watched(evolution, "evaluate", lambda args: args[1][0])
    watched(search, "evaluate", lambda args: args[1][0])
    watched(search, "cut_out", lambda args: args[1].key())
    search.main(flags(desk, tmp_path / "out"))
    expected = {("search.__main__", "unit_scores"): calibration, ("search.__main__", "reform_"): calibration,
                ("search.evolution", "evaluate"): fitness, ("search.__main__", "evaluate"): report}
    for where, windows in expected.items():
        assert seen[where]
        for x in seen[where]:
            assert torch.equal(x, windows), where
    state = load_tensors(tmp_path / "out/resume.pt")
    best = min(state["losses"], key=state["losses"].get)
    assert seen["search.__main__", "cut_out"][-1] == best


def test_a_left_out_layer_is_made_up_for(desk, tmp_path, monkeypatch):
    """Catches a reformation towards the first layers of the dense model, where others were kept."""
    config = load_llama(desk / "base").config
    bounds = bounds_for(config, 0.6)
    c = bounds.start()._replace(layers=torch.tensor([False, True, True]))
    c = bounds.repaired(c, random_generator(0))
    reformed = []

    def watched(small, model, layers, *args):
        reformed.append(tuple(layers))
        return reform_(small, model, layers, *args)

    monkeypatch.setattr(search, "evolve", lambda *args: dict(parents=[(1.0, c)], losses={}))
    monkeypatch.setattr(search, "reform_", watched)
    search.main(flags(desk, tmp_path / "out"))
    assert reformed == [(1, 2)]
    assert load_llama(tmp_path / "out").config.n_layers == 2


def test_a_folder_that_the_other_programs_read(desk, tmp_path, capsys):
    """Catches a heterogeneous folder that eval.py, sample.py or export.py stumble over, a
    loss in the table that is not that of the folder, a cost over the budget, and
    --no-reform that reforms."""
    config = load_llama(desk / "base").config
    full = n_params(config, SubNet.full(config))
    losses = {}
    for last, more in (("reformed", []), ("searched", ["--no-reform"])):
        out = tmp_path / last
        search.main([*flags(desk, out), *more])
        table = {}
        for line in capsys.readouterr().err.splitlines():
            words = line.split()
            if len(words) == 3:
                table[words[0]] = words[1:]
        assert list(table)[-1] == last
        evaluation.main(["--model", str(out), "--data", str(desk / "data"), "--windows", "4", "--json"])
        row = json.loads(capsys.readouterr().out)["rows"][0]
        got = row["params"] / full
        assert 0.6 - 3 * 32 / full < got <= 0.6
        assert table[last] == [f"{got:.4f}", f"{row['loss']:.4f}"]
        assert len(row["layers"]) == load_llama(out).config.n_layers
        assert isinstance(row["ffn_dim"], list)
        losses[last] = row["loss"]
    assert losses["reformed"] != losses["searched"]

    raw = str(tmp_path / "searched")
    copy = str(tmp_path / "copy")
    sample.main(["--model", raw, "--max-new-tokens", "3"])
    export.main(["--model", raw, "--budget", "1", "--out", copy])
    tokens = tokens_for(config)
    assert torch.equal(load_llama(copy)(tokens)[0], load_llama(raw)(tokens)[0])
    with one_line_error(capsys, "another number of heads", "--format llama"):
        export.main(["--model", raw, "--format", "hf"])


def test_uniform_goes_to_hugging_face(desk, tmp_path, monkeypatch, capsys):
    """Catches --uniform that is not: --format hf must take it; and a budget that only layers
    of several sizes meet."""
    search.main([*flags(desk, tmp_path / "u"), "--uniform"])
    config = load_llama(tmp_path / "u").config
    assert isinstance(config.ffn_dim, int) and isinstance(config.n_heads, int)
    export.main(["--model", str(tmp_path / "u"), "--format", "hf", "--out", str(tmp_path / "hf")])
    assert json.loads((tmp_path / "hf/config.json").read_text())["intermediate_size"] == config.ffn_dim
    full = load_llama(desk / "base").config
    layers, heads, neurons = candidates.fewest(full)
    smallest = cost(full, SubNet.uniform(full.dim, range(layers), heads, neurons))
    monkeypatch.setattr(candidates, "neuron_unit", lambda config: neurons + 1)
    with one_line_error(capsys, "smallest sub-network", f"{neurons + 1} neurons"):
        search.main([*flags(desk, tmp_path / "small", smallest), "--uniform"])


def test_bf16_stays_bf16(desk, tmp_path):
    """Catches a bf16 Llama that is written twice as large, or that the reformation cannot add to."""
    model = load_llama(desk / "base", dtype=torch.bfloat16)
    save_llama(tmp_path / "base", model.config, model.state_dict(), desk / "base/tokenizer.model")
    search.main([*flags(desk, tmp_path / "out"), "--llama", str(tmp_path / "base")])
    small = load_llama(tmp_path / "out", dtype=None)
    for p in small.parameters():
        assert p.dtype == torch.bfloat16
        assert p.isfinite().all()


def test_norms_of_another_dtype(desk, tmp_path):
    """Catches a traceback, or an fp32 Llama written, where a file has bf16 matrices and norms in fp32."""
    shutil.copytree(desk / "base", tmp_path / "base")
    weights = tmp_path / "base/consolidated.00.pth"
    state = {name: w if "norm" in name else w.bfloat16() for name, w in load_tensors(weights).items()}
    torch.save(state, tmp_path / "mixed.pth")
    (tmp_path / "mixed.pth").replace(weights)
    search.main([*flags(desk, tmp_path / "out"), "--llama", str(tmp_path / "base")])
    assert {p.dtype for p in load_llama(tmp_path / "out", dtype=None).parameters()} == {torch.bfloat16}


KILLS = """
import os
import signal
import sys

import search.__main__ as search

real = search.save_tensors


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


for n, where in (1, "inside"), (2, "after"):
    pid = os.fork()
    if pid == 0:
        calls = []

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
    """Catches state that is half-written or forgotten: killed before its first save was whole, and
    after its second, a search must end with the very files of one that ran straight."""
    search.main(flags(desk, tmp_path / "a"))
    (tmp_path / "kills.py").write_text(KILLS)
    killed = run(tmp_path / "kills.py", *flags(desk, tmp_path / "b"), "--resume")
    assert killed.returncode == 0, killed.stderr[-1000:]
    assert not (tmp_path / "b/params.json").exists()
    with one_line_error(capsys, "stopped at step 2 of 3", "--resume"):
        search.main(flags(desk, tmp_path / "b"))
    with one_line_error(capsys, "budget 0.6 -> 0.7", "choose another --out"):
        search.main([*flags(desk, tmp_path / "b", 0.7), "--resume"])
    # Other weights with the same norms; one other token.
    changed = shutil.copytree(desk, tmp_path / "changed")
    state = load_llama(changed / "base").state_dict()
    state["layers.0.attention.wq.weight"][0, 0] += 1
    save_llama(changed / "base", load_llama(changed / "base").config, state)
    with one_line_error(capsys, "other settings: llama_fingerprint "):
        search.main([*flags(changed, tmp_path / "b"), "--resume"])
    shutil.copytree(desk / "base", changed / "base", dirs_exist_ok=True)
    shard = changed / "data/train_000000.bin"
    tokens = bytearray(shard.read_bytes())
    tokens[1024::2] = bytes(byte ^ 1 for byte in tokens[1024::2])
    shard.write_bytes(tokens)
    with one_line_error(capsys, "other settings: fingerprint "):
        search.main([*flags(changed, tmp_path / "b"), "--resume"])
    # A state that is none.
    state = load_tensors(tmp_path / "b/resume.pt")
    for wrong in (dict(parents=torch.zeros(0)), dict(losses={"x": torch.zeros(3)}), dict(losses={"x": 1})):
        save_tensors(tmp_path / "b/resume.pt", state | wrong)
        with one_line_error(capsys, "resume.pt"):
            search.main([*flags(desk, tmp_path / "b"), "--resume"])
    save_tensors(tmp_path / "b/resume.pt", state)
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
    small = cut_out(model, c)
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
