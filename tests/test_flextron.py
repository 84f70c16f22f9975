"""The flextron folder: routers, per-token execution, what a target buys, the three stages."""
import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import flextron.__main__ as training
import plumbing.run
import sample
from bench import flextron_oracle, token_time
from data.shards import write_shard
from data.tokenizer import save_tokenizer, train_bpe
from flextron.deployed import Deployed, deploy, flextron_state, picture, restore_flextron
from flextron.network import Flextron, costs_of, parameter_cost, sizes_for, spend_the_rest, total_cost
from flextron.routers import ELASTIC, Noise
from flextron.segments import attend, feed
from flextron.stages import Surrogate, noise_of, random_subnet, train_step
from model import KVCache, LlamaConfig, SubNet
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from plumbing.family import open_family
from space import cost, n_params, random_generator
from tests.helpers import (GQA, MHA, SHAPES, close, files_of, hard_gates, make_supernet, one_line_error,
                           random_llama, tokens_for)

SMALL = dataclasses.replace(GQA, n_layers=2)
NOISE = Noise(0.7, 2.0, (0, 5, 0.6))


def random_flextron(config: LlamaConfig, dynamic: bool = True, seed: int = 0,
                    spread: float = 3.0) -> Flextron:
    """Random Llama, random routers with strong opinions (a spread of 1: weaker ones), odd sizes, no
    prices yet."""
    heads = sizes_for(config)["n_heads"]
    sizes = dict(n_heads=heads, ffn_dim=[13, 37, 60, config.ffn_dim])
    costs = costs_of(config, sizes, parameter_cost(config, dynamic))
    flextron = Flextron(random_llama(config, seed), sizes, dynamic, costs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flextron.routers.parameters():
            scale = spread if p.dim() < 3 else spread / p.size(-2) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return flextron


def slow_router(f, axis, layer, target, state):
    """A router's logits (K,) for one hidden state (dim,)."""
    w = {name: f.routers.w[f"{axis}_{name}"][layer] for name in ("target", "bias", "out", "out_bias")}
    h = w["bias"] + target * w["target"]
    if f.dynamic:
        h = h + f.routers.w[f"{axis}_state"][layer].T @ state.detach()
    h = h * torch.sigmoid(h)
    return w["out"].T @ h + w["out_bias"]


def slow_draw(f, axis, layer, target, x, noise):
    """(gate, soft, probabilities) for hidden states x (B, T, dim), each (B, T or 1, K): token by token, or
    sequence by sequence. The gate is a one-hot with the gradient of the softmax."""
    B, T, _ = x.shape
    K = len(f.sizes[axis])
    choosers = T if f.dynamic else 1
    generator = random_generator(*noise.parts, axis, layer)
    uniform = torch.rand(B, choosers, K, generator=generator, dtype=torch.float64)
    gates, softs, probabilities = [], [], []
    for b in range(B):
        for t in range(choosers):
            logits = noise.kappa * slow_router(f, axis, layer, target, x[b, t])
            noisy = logits - (-uniform[b, t].log()).log().float()
            powers = (noisy / noise.tau).exp()
            soft = powers / powers.sum()
            hard = torch.zeros(K)
            hard[noisy.argmax()] = 1
            gates.append(hard + (soft - soft.detach()))
            softs.append(soft)
            probabilities.append(logits.exp() / logits.exp().sum())
    return [torch.stack(rows).view(B, choosers, K) for rows in (gates, softs, probabilities)]


def slow_pass(f, tokens, target, noise):
    """A training pass, every unit under its own gate: (logits, expected cost, soft choices of all
    routers in a row)."""
    model = f.model
    config = model.config
    layers = range(config.n_layers)
    cos, sin = model.rope(0, tokens.size(1), tokens.device)
    x = model.tok_embeddings(tokens)
    expected = 1
    softs = []
    for layer, block in enumerate(model.layers):
        for axis in ELASTIC:
            # which units each size keeps, and what a layer of this size saves
            kept = []
            saved = []
            for size in f.sizes[axis]:
                sizes = dict(n_heads=config.n_heads, ffn_dim=config.ffn_dim) | {axis: size}
                subnet = SubNet.uniform(config.dim, layers, **sizes)
                kept.append(getattr(hard_gates(config, subnet), axis)[layer])
                saved.append((cost(config, subnet) - 1) / config.n_layers)
            # draw, and run under the gates
            h = block.attention_norm(x) if axis == "n_heads" else block.ffn_norm(x)
            gate, soft, probabilities = slow_draw(f, axis, layer, target, h, noise)
            units = gate @ torch.stack(kept)
            if axis == "n_heads":
                x = x + block.attention(h, cos, sin, config.n_heads, units)
            else:
                x = x + block.feed_forward(h, config.ffn_dim, units)
            expected = expected + (probabilities @ torch.tensor(saved)).mean()
            softs.append(soft)
    return model.output(model.norm(x)), expected, torch.cat(softs, -1)


def slow_feed(mlp, x, choice, sizes):
    """Token by token, unit by unit."""
    out = torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            f = sizes[choice[b, t]]
            h = torch.nn.functional.silu(mlp.w1.weight[:f] @ x[b, t]) * (mlp.w3.weight[:f] @ x[b, t])
            out[b, t] = mlp.w2.weight[:, :f] @ h
    return out


def assert_same(a, b):
    """Two checkpoints, to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


# ---- per-token execution


@pytest.mark.parametrize("shape", ["gqa", "mha", "wide heads"])
def test_segments_are_the_mask(shape):
    """Catches a segment on the wrong rows, heads or neurons, and a sum that is not put back where
    it came from."""
    f = random_flextron(SHAPES[shape])
    x = tokens_for(f.model.config)
    with torch.no_grad():
        logits, _, picks = f(x, target=0.6)
        masked = f(x, target=0.6, masked=True)[0]
        loss, masked_loss = f(x, x, 0.6)[1], f(x, x, 0.6, masked=True)[1]
    for axis in ELASTIC:
        chosen = torch.cat([pick.choice.flatten() for pick in picks if pick.axis == axis])
        assert len(chosen.unique()) > 1, f"{axis}: one choice proves little"
    assert close(logits, masked) and abs(loss - masked_loss) < 1e-5


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_segments_are_the_slow_way(config):
    """Catches an attention or MLP that agrees with the masked one because both are wrong: token by
    token, the layer that each token chose is run as a slice of its own on the whole sequence, and
    only that token's row is kept."""
    model = random_llama(config)
    block = model.layers[1]
    x = torch.randn(2, 11, config.dim, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)

    neurons = [13, 37, config.ffn_dim]
    choice = torch.randint(len(neurons), (2, 11), generator=generator)
    with torch.no_grad():
        got = feed(block.feed_forward, x, choice, neurons)
        want = slow_feed(block.feed_forward, x, choice, neurons)
    assert close(got, want)

    heads = sizes_for(config)["n_heads"]
    choice = torch.randint(len(heads), (2, 11), generator=generator)
    cos, sin = model.rope(0, 11, x.device)
    with torch.no_grad():
        got = attend(block.attention, x, choice, heads, cos, sin)
        rows = torch.stack([block.attention(x, cos, sin, n) for n in heads])         # K, B, T, dim
    want = rows.gather(0, choice[None, ..., None].expand(1, *x.shape))[0]
    assert close(got, want)


def test_one_choice_for_all_is_a_subnet():
    """Catches a static network, as exported, that is not what its routers choose."""
    for config in (GQA, MHA):
        f = random_flextron(config, dynamic=False)
        subnet = f.route(0.6)

        def pick_of_subnet(axis, layer, target, h, noise, price):
            k = f.sizes[axis].index(getattr(subnet, axis)[layer])
            return SimpleNamespace(axis=axis, choice=torch.full(h.shape[:2], k))

        f.pick = pick_of_subnet
        x = tokens_for(config)
        with torch.no_grad():
            assert close(f(x, target=0.6)[0], f.model(x, subnet=subnet)[0])
        assert len(set(subnet.n_heads)) > 1 or len(set(subnet.ffn_dim)) > 1, (
            "every layer alike: proves little")


def test_a_token_alone():
    """Catches a choice, or a result, that depends on what else is in the batch or comes later in the text."""
    f = random_flextron(GQA)
    x = tokens_for(GQA, 5, 21)
    with torch.no_grad():
        logits, _, picks = f(x, target=0.6)
        for b in range(5):
            alone, _, own = f(x[b:b + 1], target=0.6)
            assert all(torch.equal(p.choice[b], o.choice[0]) for p, o in zip(picks, own))
            assert close(alone[0], logits[b])
        short, _, own = f(x[:, :9], target=0.6)
        assert all(torch.equal(p.choice[:, :9], o.choice) for p, o in zip(picks, own))
        assert close(short, logits[:, :9])


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_the_cache_is_complete(config):
    """Catches keys and values that a narrow token did not leave for later ones, and positions off
    by the cache's."""
    f = random_flextron(config)
    x = tokens_for(config, 2, 15)
    cache = KVCache(15)
    with torch.no_grad():
        whole = f(x, target=0.6)[0]
        parts = [f(x[:, a:b], target=0.6, cache=cache)[0] for a, b in ((0, 6), (6, 7), (7, 12), (12, 15))]
    assert close(torch.cat(parts, 1), whole)


def test_work_is_saved(monkeypatch):
    """Catches segments that run on everybody: the multiply-adds of MLP matmuls are those that the
    tokens chose."""
    f = random_flextron(GQA)
    work = []
    linear = torch.nn.functional.linear

    def counted(a, w, bias=None):
        work.append(a.numel() // a.size(-1) * w.numel())
        return linear(a, w, bias)

    h = torch.randn(3, 17, GQA.dim)
    choice = torch.randint(4, (3, 17), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("flextron.segments.F.linear", counted)
    feed(f.model.layers[0].feed_forward, h, choice, f.sizes["ffn_dim"])
    chosen = torch.tensor(f.sizes["ffn_dim"])[choice].sum().item()
    assert sum(work) == 3 * GQA.dim * chosen < 3 * GQA.dim * GQA.ffn_dim * choice.numel()


# ---- routers and targets


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_draw_is_the_slow_one(dynamic):
    """Catches noise that is missing, mirrored or of another scale, a temperature that divides or
    multiplies the wrong thing, a router that does not hear the target, another layer's router,
    gates that are not exactly 0 or 1."""
    f = random_flextron(SMALL, dynamic, spread=1.0)
    x = torch.randn(3, 5, SMALL.dim, generator=torch.Generator().manual_seed(6))
    for axis in ELASTIC:
        for layer in range(SMALL.n_layers):
            pick = f.pick(axis, layer, 0.6, x, NOISE, 0.0)
            gate, soft, probabilities = slow_draw(f, axis, layer, 0.6, x, NOISE)
            assert pick.axis == axis
            assert torch.equal(pick.choice, gate.argmax(-1).expand(3, 5))
            assert close(pick.gate, gate.round(), 1e-6) and pick.gate.requires_grad
            assert close(pick.soft, soft)
            assert close(pick.probabilities.expand_as(probabilities), probabilities)


def test_draws_follow_their_probabilities():
    """Catches noise that is missing, mirrored or of another scale than the logits, and noise that
    tokens share: tokens in one state draw each size as often as softmax(kappa * logits) says, each
    token (or sequence) for itself."""
    state = torch.randn(SMALL.dim, generator=torch.Generator().manual_seed(6))
    for dynamic in (False, True):
        f = random_flextron(SMALL, dynamic, spread=0.7)
        x = state.expand(60, 50, SMALL.dim) if dynamic else state.expand(3000, 2, SMALL.dim)
        for axis in ELASTIC:
            noise = Noise(0.5, 0.6, (3, 1))
            choice = f.pick(axis, 1, 0.6, x, noise, 0.0).choice
            K = len(f.sizes[axis])
            drawn = choice.flatten().bincount(minlength=K) / choice.numel()
            want = (0.6 * slow_router(f, axis, 1, 0.6, state)).softmax(-1)
            assert want.min() > 0.02 and want.max() - want.min() > 0.1, "alike: proves little"
            assert (drawn - want).abs().max() < 0.035, (dynamic, axis, drawn, want)
            assert len(choice[:, 0].unique()) == K, "sequences draw for themselves"
            assert (len(choice[0].unique()) > 1) == dynamic, "tokens do if routers are dynamic"


def test_noise_fades_from_the_routers_first_step():
    """Catches tau and kappa that move while there are no routers, or end elsewhere, and noise that
    micro-batches, targets or steps share."""
    args = SimpleNamespace(elastic_steps=4, router_steps=5, joint_steps=6, tau_end=0.01, kappa_end=9.0,
                           seed=3)
    first, middle, last = (noise_of(step, 0.6, 0, args) for step in (4, 9, 14))
    assert (first.tau, first.kappa) == (1, 1)
    assert (middle.tau, middle.kappa) == pytest.approx((0.1, 5))
    assert (last.tau, last.kappa) == pytest.approx((0.01, 9))
    others = [noise_of(9, 0.6, 1, args), noise_of(9, 0.4, 0, args), noise_of(10, 0.6, 0, args),
              noise_of(9, 0.6, 0, SimpleNamespace(**vars(args) | dict(seed=4)))]
    drawn = middle.gumbel("ffn_dim", 1, (2, 3))
    assert not any(torch.equal(drawn, other.gumbel("ffn_dim", 1, (2, 3))) for other in others)


def test_noise_is_a_function_of_its_parts():
    """Catches noise from global state (a resumed run would differ), and the same noise in every
    layer or step."""
    torch.manual_seed(1)
    a = NOISE.gumbel("ffn_dim", 1, (2, 3))
    torch.manual_seed(2)
    assert torch.equal(a, NOISE.gumbel("ffn_dim", 1, (2, 3)))
    others = [NOISE.gumbel("ffn_dim", 2, (2, 3)), NOISE.gumbel("n_heads", 1, (2, 3)),
              NOISE._replace(parts=(0, 6, 0.6)).gumbel("ffn_dim", 1, (2, 3))]
    assert not any(torch.equal(a, other) for other in others)
    many = NOISE.gumbel("ffn_dim", 0, (20000,))
    assert abs(many.mean() - 0.5772) < 0.03 and abs(many.var() - torch.pi ** 2 / 6) < 0.08


def test_no_noise_at_evaluation():
    """Catches Gumbel noise in what is deployed."""
    for dynamic in (False, True):
        f, x = random_flextron(GQA, dynamic), tokens_for(GQA)
        with torch.no_grad():
            first = Deployed(f, 0.6)(x)[0]
            torch.manual_seed(99)
            assert torch.equal(first, Deployed(f, 0.6)(x)[0])


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_static_meets_every_target(config):
    """Catches a SubNet over its target, costs that do not add up, and a price that stops far below
    the target."""
    f = random_flextron(config, dynamic=False)
    for target in [f.smallest(), 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, 1.0]:
        if target >= f.smallest():
            subnet = f.route(target)
            got = total_cost(f.shares(target), f.costs)
            assert abs(got - cost(config, subnet)) < 1e-6 and got <= target + 1e-6, target
            assert target in (1.0, f.smallest()) or got > target - 0.04, (target, got)
    assert f.route(1.0) == SubNet.full(config)


def test_dynamic_meets_its_target_on_its_text():
    """Catches a price that was measured on something else than what is run; and a target of 1 with
    a router."""
    f, text = random_flextron(GQA), tokens_for(GQA, 4, 16, seed=9)
    f.calibrate(text, [0.8, 0.5])
    for target in (0.8, 0.5):
        with torch.no_grad():
            deployed = Deployed(f, target)
            deployed(text)
        assert target - 0.03 < deployed.got() <= target + 1e-6
        widths = deployed.widths()
        for axis in ELASTIC:
            assert all(min(f.sizes[axis]) <= width <= max(f.sizes[axis]) for width in widths[axis])
    assert torch.equal(Deployed(f, 1.0)(text)[0], f.model(text)[0])
    assert Deployed(f, 1.0).got() == pytest.approx(1)


def test_cost_is_counted_over_tokens():
    """Catches a mean over calls, whatever their length, and the expected cost in place of what ran."""
    f = random_flextron(SMALL)
    network = Deployed(f, 0.6)
    whole = n_params(SMALL, SubNet.full(SMALL))
    kept = []
    with torch.no_grad():
        for text in (tokens_for(SMALL, 1, 5), tokens_for(SMALL, 3, 12, seed=2)):
            network(text)
            for row in range(text.numel()):
                left_out = 0
                for pick in network.picks:
                    size = f.sizes[pick.axis][pick.choice.flatten()[row]]
                    if pick.axis == "n_heads":
                        left_out += 2 * SMALL.dim * SMALL.head_dim * (SMALL.n_heads - size)
                    else:
                        left_out += 3 * SMALL.dim * (SMALL.ffn_dim - size)
                kept.append(1 - left_out / whole)
    assert network.got() == pytest.approx(sum(kept) / 41, abs=1e-5)


def test_expected_shares_are_linear_between_targets():
    """Catches weights that are mirrored, or taken from the wrong neighbours, where a target was
    not calibrated."""
    f = random_flextron(SMALL)
    low = {axis: torch.rand(SMALL.n_layers, len(f.sizes[axis])) for axis in ELASTIC}
    high = {axis: torch.rand(SMALL.n_layers, len(f.sizes[axis])) for axis in ELASTIC}
    f.calibrated = [dict(target=0.5, price=7.0, shares=low), dict(target=0.7, price=3.0, shares=high)]
    assert f.price(0.55) == pytest.approx(6) and f.price(0.9) == 3
    for axis in ELASTIC:
        full = torch.zeros_like(low[axis])
        full[:, -1] = 1
        assert close(f.shares(0.5)[axis], low[axis])
        assert close(f.shares(0.55)[axis], 0.75 * low[axis] + 0.25 * high[axis])
        assert close(f.shares(0.9)[axis], high[axis] / 3 + full * 2 / 3)


def test_the_rest_buys_the_most_worth_per_cost():
    """Catches the largest gain whatever it costs, an axis or a layer that is left out, a cost over
    the target."""
    costs = dict(n_heads=torch.tensor([-0.4, 0.0]), ffn_dim=torch.tensor([-0.3, -0.2, 0.0]))
    worth = dict(n_heads=torch.tensor([[0.0, 1.0], [0.0, 0.1]]),
                 ffn_dim=torch.tensor([[0.0, 0.5, 0.6], [0.0, 0.2, 0.9]]))
    for target, heads, neurons in ((-0.35, [0, 0], [0, 0]), (-0.2, [0, 0], [1, 1]), (0.0, [0, 0], [1, 2]),
                                   (0.9, [1, 0], [2, 2])):
        choice = dict(n_heads=torch.tensor([0, 0]), ffn_dim=torch.tensor([0, 0]))
        spend_the_rest(choice, worth, costs, target + 1e-6)
        assert choice["n_heads"].tolist() == heads, target
        assert choice["ffn_dim"].tolist() == neurons, target


def test_kv_heads_stay_when_tokens_choose():
    """Catches a cost that counts the keys and values of MHA as saved, which later tokens need."""
    f = random_flextron(MHA, dynamic=True)
    static = costs_of(MHA, f.sizes, parameter_cost(MHA, False))
    for k, heads in enumerate(f.sizes["n_heads"]):
        matrix = MHA.dim * MHA.head_dim * (6 - heads) / n_params(MHA, SubNet.full(MHA))
        assert static["n_heads"][k].item() == pytest.approx(-4 * matrix), "wq, wk, wv and wo"
        assert f.costs["n_heads"][k].item() == pytest.approx(-2 * matrix), "wq and wo"
    sizes = f.sizes | dict(n_heads=[2, 8])  # GQA: no slice drops a KV head
    dynamic = costs_of(GQA, sizes, parameter_cost(GQA, True))
    static = costs_of(GQA, sizes, parameter_cost(GQA, False))
    assert torch.equal(dynamic["n_heads"], static["n_heads"])


def test_a_target_in_another_currency():
    """Catches --budget on routers trained by latency that ignores the difference: what is asked is
    in parameters."""
    for dynamic in (False, True):
        f = random_flextron(GQA, dynamic)
        params = f.costs
        f.costs = {axis: saved * 0.7 for axis, saved in params.items()}  # this machine saves less
        f.unit = "latency"
        f.calibrate(tokens_for(GQA, 4, 16, seed=9), [0.8, 0.7])
        target = f.target_for(0.75, params, "params")
        assert target > 0.75 and 0.6 < total_cost(f.shares(target), params) <= 0.75 + 1e-6


# ---- a step of each stage


STEPS = SimpleNamespace(elastic_steps=3, router_steps=4, joint_steps=3, batch_tokens=21, seq_len=7,
                        micro_batch=2, samples=2, targets=[0.9, 0.3], penalty=0.7, tau_end=0.5,
                        kappa_end=3.0, seed=11, teach="gates", threshold=100.0)


def shards_of(config: LlamaConfig) -> SimpleNamespace:
    """Random rows, others in every step."""
    def batch(step, rows, start, stop):
        tokens = tokens_for(config, rows, 8, seed=step)[start:stop]
        return tokens[:, :-1], tokens[:, 1:]
    return SimpleNamespace(batch=batch)


def micro_batches(shards, step: int, i: int) -> list[tuple]:
    """The i-th pass of a step as STEPS cuts its three rows: two micro-batches (x, y, share of the pass)."""
    x, y = shards.batch(step, 9, 3 * i, 3 * i + 3)
    return [(x[:2], y[:2], 2 / 3), (x[2:], y[2:], 1 / 3)]


def noise_in_steps(step: int, target: float, part: int) -> Noise:
    """The noise that STEPS asks for."""
    t = (step - 3) / 6
    return Noise(0.5 ** t, 1 + 2 * t, (11, step, target, part))


def slow_losses(logits, y):
    """-log p of every target."""
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    B, T = y.shape
    losses = [-p[b, t, y[b, t]].log() for b in range(B) for t in range(T)]
    return torch.stack(losses).view(B, T)


def assert_gradients(f, total) -> None:
    """The gradients that a step left are those of `total`. Where there is none, the step left none."""
    named = dict(f.named_parameters())
    got = {name: p.grad for name, p in named.items()}
    learning = [p for p in named.values() if p.requires_grad]
    want = iter(torch.autograd.grad(total, learning, allow_unused=True))
    for name, p in named.items():
        gradient = next(want) if p.requires_grad else None
        if gradient is None:
            assert got[name] is None, name
        else:
            assert close(got[name], gradient, 1e-4), name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gates_step_is_its_loss(dynamic):
    """Catches a latency loss of the wrong sign, of one side only, or not relative to the target;
    its gradient, or that of the loss, cut off from a router; sums for means over targets and
    micro-batches; a Llama that is frozen in the wrong stage; passes that share their tokens."""
    f = random_flextron(SMALL, dynamic, spread=1.0)
    shards = shards_of(SMALL)
    for step, targets in ((5, [0.9, 0.3]), (8, [0.9, 0.3, 1.0])):
        f.zero_grad()
        result = train_step(f, None, shards, step, STEPS, torch.device("cpu"))
        total = 0
        costs = []
        for i, target in enumerate(targets):
            cost_of_target = 0
            for part, (x, y, share) in enumerate(micro_batches(shards, step, i)):
                if target == 1:
                    logits, expected = f.model(x)[0], torch.tensor(1.0)
                else:
                    logits, expected, _ = slow_pass(f, x, target, noise_in_steps(step, target, part))
                loss = slow_losses(logits, y).mean() + 0.7 * abs(expected / target - 1)
                total = total + loss * share / len(targets)
                cost_of_target += expected.item() * share
            costs.append(cost_of_target)
        assert costs[0] < 0.9 and costs[1] > 0.3, "both sides of a target"
        assert result["cost"] == pytest.approx(costs[:2]) and result["updated"]
        assert_gradients(f, total)
        assert all(p.grad.abs().sum() > 0 for p in f.routers.parameters())
        assert (f.model.layers[0].attention.wq.weight.grad is None) == (step == 5)


class KnownSurrogate:
    """An S whose function is known. It keeps the pairs that it is shown."""
    error = 0.0

    def __init__(self, width: int):
        self.weight = torch.randn(width, generator=torch.Generator().manual_seed(8))
        self.pairs = []

    def __call__(self, x):
        return (x @ self.weight) ** 2

    def observe(self, x, y, step):
        assert not x.requires_grad
        self.pairs.append((x, y))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_surrogate_step_is_its_loss(dynamic):
    """Catches an S that is shown the loss in place of its excess over the full model's, or the
    excess with the wrong sign, summed, or of other rows; a latency loss of the wrong sign or of one
    side; S's gradient cut off from a router; sums for means; routers that follow a bad S."""
    f = random_flextron(SMALL, dynamic, spread=1.0)
    shards = shards_of(SMALL)
    surrogate = KnownSurrogate(sum(SMALL.n_layers * len(sizes) for sizes in f.sizes.values()))
    args = SimpleNamespace(**vars(STEPS) | dict(teach="surrogate"))
    result = train_step(f, surrogate, shards, 5, args, torch.device("cpu"))
    total = 0
    pairs = iter(surrogate.pairs)
    for i, target in enumerate(args.targets):
        mean_excess = 0
        for part, (x, y, share) in enumerate(micro_batches(shards, 5, i)):
            logits, expected, soft = slow_pass(f, x, target, noise_in_steps(5, target, part))
            excess = slow_losses(logits, y) - slow_losses(f.model(x)[0], y)
            rows = excess if dynamic else torch.stack([sequence.mean() for sequence in excess])
            shown, shown_excess = next(pairs)
            assert close(shown, soft.flatten(0, 1)) and close(shown_excess, rows.flatten(), 1e-4)
            loss = surrogate(soft.flatten(0, 1)).mean() + 0.7 * abs(expected / target - 1)
            total = total + loss * share / 2
            mean_excess += excess.mean().item() * share
        assert result["loss"][i] == pytest.approx(mean_excess, rel=1e-4)
    assert result["updated"]
    assert_gradients(f, total)
    f.zero_grad()
    surrogate.error = 100.1
    assert not train_step(f, surrogate, shards, 5, args, torch.device("cpu"))["updated"]
    assert all(p.grad is None for p in f.parameters())


def test_elastic_step_is_its_loss():
    """Catches a sum for the mean over passes, SubNets that are alike in every layer, pass or step,
    a router that moves."""
    f = random_flextron(SMALL)
    shards = shards_of(SMALL)
    train_step(f, None, shards, 2, STEPS, torch.device("cpu"))
    total = 0
    for i, subnet in enumerate([SubNet.full(SMALL), random_subnet(f, 11, 2, 1), random_subnet(f, 11, 2, 2)]):
        for x, y, share in micro_batches(shards, 2, i):
            total = total + slow_losses(f.model(x, subnet=subnet)[0], y).mean() * share / 3
    assert_gradients(f, total)
    drawn = [random_subnet(f, 11, step, 1) for step in range(40)]
    for axis in ELASTIC:
        taken = [getattr(subnet, axis) for subnet in drawn]
        assert {size for sizes in taken for size in sizes} == set(f.sizes[axis])
        assert any(len(set(sizes)) > 1 for sizes in taken) and len(set(taken)) > 5


def test_rates_and_decay():
    """Catches decay of norms or routers, none of matrices, and routers whose rate does not begin
    where they do."""
    f = random_flextron(SMALL)
    args = SimpleNamespace(elastic_steps=10, router_steps=10, joint_steps=20, warmup=0.1, lr=1e-3,
                           router_lr=1e-2, weight_decay=0.2)
    for_llama, for_routers = training.make_optimizers(f, args)
    decay = {}
    for group in (*for_llama.param_groups, *for_routers.param_groups):
        for p in group["params"]:
            decay[p] = group["weight_decay"]
    for name, p in f.named_parameters():
        matrix = name.startswith("model.") and "norm" not in name
        assert decay[p] == (0.2 if matrix else 0), name
    rates = []
    for step in (0, 3, 9, 10, 13, 39):
        training.set_rates(for_llama, for_routers, step, args)
        rates.append((for_llama.param_groups[1]["lr"], for_routers.param_groups[0]["lr"]))
    llama, routers = zip(*rates)
    assert llama[:2] == pytest.approx((1e-3 / 4, 1e-3)) and llama[5] == pytest.approx(1e-4, rel=0.05)
    assert (routers[:5] == pytest.approx((0, 0, 0, 1e-2 / 4, 1e-2))
            and routers[5] == pytest.approx(1e-3, rel=0.05))


# ---- folders, stages, mistakes


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Shards, a base, and a static and a dynamic folder of a few steps each."""
    root = tmp_path_factory.mktemp("flextron")
    config = dataclasses.replace(SMALL, vocab_size=560)
    text = ("the cat sat on the mat and the dog ate the cake; "
            "def main(argv): return [line for line in argv]\n") * 3
    (root / "data").mkdir()
    save_tokenizer(root / "data/tokenizer.model", train_bpe([text], 560))
    for split, n in (("train", 6000), ("val", 700)):
        tokens = torch.randint(300, (n,), generator=random_generator(split)).cumsum(0) % 300
        write_shard(root / f"data/{split}_000000.bin", tokens.numpy(), 560)
    save_llama(root / "base", config, random_llama(config).state_dict(), root / "data/tokenizer.model")
    flags = ["--llama", str(root / "base"), "--data", str(root / "data"), "--targets", "0.7", "0.5",
             *("--elastic-steps 2 --router-steps 2 --joint-steps 2 --samples 2 --batch-tokens 64 "
               "--micro-batch 3 --seq-len 16 --eval-windows 3 --calibration-windows 4 --teach surrogate "
               "--threshold 100 --device cpu").split()]
    for kind in ("static", "dynamic"):
        training.main(flags + ["--router", kind, "--out", str(root / kind)])
    return root, flags


def test_folder_round_trip(desk):
    """Catches routers, prices or sizes that a folder forgets, and a folder that is no plain Llama
    any more."""
    root, _ = desk
    for kind in ("static", "dynamic"):
        f = open_family(root / kind).flextron
        model = f.model
        x = tokens_for(model.config)
        again = restore_flextron(model, flextron_state(f))
        with torch.no_grad():
            for target in (0.7, 0.6, 0.5):
                assert torch.equal(Deployed(f, target)(x)[0], Deployed(again, target)(x)[0])
            assert torch.equal(Deployed(f, 1.0)(x)[0], model(x)[0])
        assert f.dynamic == (kind == "dynamic")
        measured = [row["target"] for row in f.calibrated]
        assert measured == ([0.5, 0.6, 0.7, 0.85] if f.dynamic else []), (
            "the targets and halfway between them")
    assert open_family(root / "base").flextron is None


def logged(folder, key: str) -> dict:
    """step -> what log.jsonl has under a key."""
    records = [json.loads(line) for line in open(folder / "log.jsonl")]
    return {record["step"]: record[key] for record in records if key in record}


def test_killed_and_resumed(desk, tmp_path, monkeypatch):
    """Catches state that resume.pt forgets: moments, the surrogate and its pairs, prices. Stopped
    every third step."""
    root, flags = desk
    whole = root / "dynamic"
    flags = flags + ["--router", "dynamic"]

    class Impatient(plumbing.run.Stop):
        asked = 0

        @property
        def wished(self):
            self.asked += 1
            return self.asked > 3

        @wished.setter
        def wished(self, value):
            pass
    monkeypatch.setattr(plumbing.run, "Stop", Impatient)
    for starts in range(1, 11):
        try:
            training.main(flags + ["--out", str(tmp_path / "b"), "--resume"])
            break
        except SystemExit as left:
            assert left.code == 143  # as after SIGTERM
    assert starts == 3, "twice it was stopped, at the last step too"
    a, b = files_of(whole), files_of(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:
        if name not in ("log.jsonl", "resume.pt"):
            assert a[name] == b[name], name
    # resume.pt is a pickle, which also remembers which strings are one object
    assert_same(load_tensors(whole / "resume.pt"), load_tensors(tmp_path / "b/resume.pt"))
    for key in ("loss", "error"):
        assert logged(whole, key) == logged(tmp_path / "b", key)
    costs = logged(whole, "cost").values()
    state = load_tensors(whole / "flextron.pt")
    assert costs and all(len(of) == len(state["targets"]) for of in costs), (
        "one number a target, of all micro-batches")


def test_stages_train_what_they_should(desk, tmp_path):
    """Catches a Llama that moves while it is frozen, routers that move before their stage, and
    routers that follow a surrogate whose error is over the threshold."""
    root, flags = desk

    def after(*more):
        training.main(flags + ["--out", str(tmp_path / "o"), *more])
        state = load_tensors(tmp_path / "o/resume.pt")
        model = {name: tensor.clone() for name, tensor in state["model"].items()}
        routers = {name: tensor.clone() for name, tensor in state["flextron"]["routers"].items()}
        shutil.rmtree(tmp_path / "o")
        return dict(model=model, routers=routers, updates=state["updates"])

    def same(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    elastic = after("--router-steps", "0", "--joint-steps", "0")
    frozen = after("--joint-steps", "0", "--elastic-steps", "0")
    waited = after("--joint-steps", "0", "--elastic-steps", "0", "--threshold", "1e-9")
    nothing = after("--joint-steps", "0", "--elastic-steps", "0", "--router-steps", "0")
    assert frozen["updates"] == 2 and waited["updates"] == 0
    assert same(frozen["model"], nothing["model"]) and not same(frozen["routers"], nothing["routers"])
    assert same(elastic["routers"], nothing["routers"]) and not same(elastic["model"], nothing["model"])
    assert same(waited["routers"], nothing["routers"])


def test_where_it_starts(desk, tmp_path):
    """Catches a family of train.py that is sorted again, which would undo what its prefixes have
    learned, and a plain Llama that is not sorted at all."""
    root, flags = desk
    config = dataclasses.replace(GQA, vocab_size=560)
    make_supernet(tmp_path / "flex", GQA)
    save_llama(tmp_path / "plain", config, random_llama(config).state_dict(), root / "data/tokenizer.model")
    shutil.copy(root / "data/tokenizer.model", tmp_path / "flex/tokenizer.model")
    none = ["--elastic-steps", "0", "--router-steps", "0", "--joint-steps", "0"]
    for start in ("flex", "plain"):
        training.main(flags + none + ["--llama", str(tmp_path / start), "--out", str(tmp_path / "o" / start)])
        before, after = load_llama(tmp_path / start), load_llama(tmp_path / "o" / start)
        x = tokens_for(config)
        same = torch.equal(before.layers[1].feed_forward.w1.weight, after.layers[1].feed_forward.w1.weight)
        assert same == (start == "flex") and close(after(x)[0], before(x)[0])


def test_targets_in_time(desk, tmp_path, monkeypatch):
    """Catches --cost latency that prices sizes by parameters, or whose folder loses the table it
    was trained with."""
    root, flags = desk

    def flat(model, choices, rounds=1, tokens=None):
        return dict(dim=[48], n_heads=[2, 8], ffn_dim=[8, 80], fixed=[0.2], layer=[0.4], heads=[[-0.24, 0.0]],
                    neurons=[[-0.12, 0.0]], hardware="a machine whose heads are slow", threads=1, torch="",
                    device="cpu")

    monkeypatch.setattr("plumbing.latency.measure_latency", flat)
    training.main(flags + ["--cost", "latency", "--out", str(tmp_path / "o"), "--targets", "0.6"])
    f = open_family(tmp_path / "o").flextron
    assert f.unit == "latency" and (tmp_path / "o/latency.json").is_file()
    assert torch.allclose(f.costs["n_heads"], torch.tensor([-0.24, -0.16, -0.08, 0.0]))
    by_time = deploy(f, tmp_path / "o", 0.6, "latency").subnet
    by_size = deploy(f, tmp_path / "o", 0.6, "params").subnet

    def time_of(subnet):
        layers = zip(subnet.n_heads, subnet.ffn_dim)
        return 0.2 + sum(0.4 - 0.04 * (8 - heads) - 0.12 * (80 - neurons) / 72 for heads, neurons in layers)

    assert 0.5 < time_of(by_time) <= 0.6 + 1e-6 and cost(f.model.config, by_size) <= 0.6 < time_of(by_size)


def test_surrogate_learns_what_it_is_shown():
    """Catches pairs that are shuffled against each other, or not the latest, and an error measured
    on pairs already learned."""
    s, generator = Surrogate(6, 0), torch.Generator().manual_seed(0)
    s.KEEP = 240
    w = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.4, -0.6])
    for step in range(60):
        x = torch.rand(24, 6, generator=generator).softmax(-1)
        s.observe(x, x @ w, step)
    assert s.error < 0.01 and len(s.y) == 240 and close(s.x[-24:], x) and close(s.y, s.x @ w)
    x = torch.rand(50, 6, generator=generator).softmax(-1)
    assert (s(x) - x @ w).abs().mean() < 0.02
    s.observe(x, x @ w + 10, 61)
    assert s.error > 0.9


def test_surrogate_error_is_a_running_mean(monkeypatch):
    """Catches an error of single pairs in place of a batch's mean, one that forgets earlier
    batches, or hardly hears of new ones."""
    s = Surrogate(6, 0)
    monkeypatch.setattr(s, "ROUNDS", 0)  # S stays as it is
    errors = []
    for step, off in enumerate((1.0, 3.0, -2.0)):
        x = torch.rand(4, 6)
        with torch.no_grad():
            s.observe(x, s(x) + off + torch.tensor([5.0, -5.0, 9.0, -9.0]), step)
        errors.append(s.error)
    assert errors == pytest.approx([1, 0.9 * 1 + 0.1 * 3, 0.9 * 1.2 + 0.1 * 2], rel=1e-4)


def test_eval_and_sample(desk, capsys, tmp_path):
    """Catches an eval without widths or picture, a sample that does not run at a budget."""
    root, _ = desk
    (tmp_path / "t.txt").write_text("the cat sat on the mat and the dog ate")
    for kind in ("static", "dynamic"):
        capsys.readouterr()
        evaluation.main(["--model", str(root / kind), "--budgets", "1.0", "0.6", "--json", "--text",
                         str(tmp_path / "t.txt"), "--device", "cpu"])
        out, err = capsys.readouterr()
        rows = json.loads(out.splitlines()[-1])["rows"]
        assert [r["budget"] for r in rows] == [1.0, 0.6] and rows[0]["got"] == 1 and rows[1]["got"] < 0.75
        assert len(rows[1]["n_heads"]) == len(rows[1]["ffn_dim"]) == SMALL.n_layers
        assert ("cat" in err) == (kind == "dynamic")
        sample.main(["--model", str(root / kind), "--budget", "0.6", "--max-new-tokens", "4",
                     "--device", "cpu"])


def test_mistakes_end_in_one_line(desk, capsys, tmp_path):
    """Catches a traceback, or a run that begins, for what a user can get wrong."""
    root, flags = desk
    new = ["--out", str(tmp_path / "x")]
    mistakes = [
        (["--targets", "1.2"], ["1.2", "--targets 0.8"]),
        (["--targets", "0.05"], ["0.05", "smallest"]),
        (["--ffn-dim-choices", "99999"], ["99999"]),
        (["--n-heads-choices", "3"], ["n_heads 3"]),
        (["--llama", str(tmp_path)], ["params.json"]),
        (["--out", str(root / "base")], ["starts from"]),
        (["--data", str(tmp_path / "x")], ["data that training starts from"]),
        (["--override"], ["--resume"]),
        (["--router-lr", "-1"], ["--router-lr"]),
        (["--lr", "inf"], ["--lr inf"]),
        (["--micro-batch", "0"], ["--micro-batch 0", "1 or more"]),
        (["--batch-tokens", "63"], ["--seq-len"]),
        (["--colour", "red"], ["--colour", "python -m flextron --help"]),
        (["--seed", "7", "--out", str(root / "static")], ["other settings"]),
        (["--lr", "7", "--out", str(root / "static")], ["other settings"]),
    ]
    for wrong, words in mistakes:
        with one_line_error(capsys, *words):
            last_line_only(capsys, flags + new + wrong)
    for kind, asked in (("static", 0.01), ("dynamic", 0.2), ("static", 1.5)):
        f = open_family(root / kind).flextron
        with one_line_error(capsys, str(asked)):
            deploy(f, root / kind, asked)
    (tmp_path / "bad").mkdir()
    for name, content in files_of(root / "dynamic").items():
        (tmp_path / "bad" / name).write_bytes(content)
    state = load_tensors(root / "dynamic/flextron.pt")
    torch.save({**state, "sizes": {"n_heads": [8], "ffn_dim": [80]}}, tmp_path / "bad/flextron.pt")
    with one_line_error(capsys, "flextron.pt", "take both from one folder"):
        open_family(tmp_path / "bad")
    sizes = state["sizes"]
    for wrong in (dict(sizes=sizes | dict(ffn_dim=[0.5, *sizes["ffn_dim"][1:]])),
                  dict(sizes=sizes | dict(ffn_dim=sizes["ffn_dim"][::-1])),
                  dict(calibrated=torch.zeros(4, 4)), dict(targets=[]), dict(targets=[0.8, float("nan")]),
                  dict(targets=[[0.8]]),
                  dict(routers={name: weight.to(torch.int8) for name, weight in state["routers"].items()})):
        torch.save({**state, **wrong}, tmp_path / "bad/flextron.pt")
        with one_line_error(capsys, "flextron.pt", "take both from one folder"):
            open_family(tmp_path / "bad")
    (tmp_path / "bad/flextron.pt").unlink()
    (tmp_path / "bad/flextron.pt").symlink_to("nowhere")
    # no plain Llama, though it looks like one
    with one_line_error(capsys, "flextron.pt is a link that leads nowhere"):
        open_family(tmp_path / "bad")
    with one_line_error(capsys, "no static routers", "python -m flextron --router static"):
        token_time.main(["--model", str(root / "dynamic")])
    with one_line_error(capsys, "flextron.pt", "python -m flextron"):
        flextron_oracle.main(["--model", str(root / "base")])


def test_bad_steps_end_the_run(desk, capsys, tmp_path, monkeypatch):
    """Catches a run that goes on for ever with a loss that is not finite, weights that such
    a step has moved, a state that is saved after one; and a command line in the message that
    is refused."""
    root, flags = desk
    flags = flags + ["--out", str(tmp_path / "o"), "--save-every", "2", "--max-bad-steps", "4"]
    step_of = training.train_step

    def broken(flextron, surrogate, shards, step, *rest):
        result = step_of(flextron, surrogate, shards, step, *rest)
        if step >= 1:
            result["loss"][0] = float("nan")
        return result

    monkeypatch.setattr(training, "train_step", broken)
    monkeypatch.setattr(sys, "argv", [str(training.__file__), *flags])
    again = f"python -m flextron {' '.join(flags)} --resume --override --lr 0.0005 --router-lr 0.005"
    with one_line_error(capsys, "4 steps in a row, up to step 4,", "no checkpoint was written", again):
        last_line_only(capsys, flags)
    assert not (tmp_path / "o/resume.pt").exists(), "after a bad step nothing is saved"
    with one_line_error(capsys, "4 steps in a row, up to step 4,"):
        last_line_only(capsys, flags + ["--resume"])
    monkeypatch.setattr(training, "train_step", step_of)
    training.main(again.split()[3:])
    state = load_tensors(tmp_path / "o/resume.pt")
    assert (state["step"], state["settings"]["lr"]) == (6, 5e-4)


def last_line_only(capsys, flags: list[str]) -> None:
    """A run that ends with fail(): drops its lines of progress before the last one."""
    try:
        training.main(flags)
    finally:
        print(capsys.readouterr().err.splitlines()[-1], file=sys.stderr)


def test_a_picture_of_what_tokens_took():
    """Catches a bar under the wrong character: after a line break, a long line, a token of
    several characters."""

    class Pieces:
        texts = [b"ab", b"\n", b"c", b"def", b"<|end|>", b"\t"]

        def decode_single_token_bytes(self, token):
            return self.texts[token]

    class Network:
        flextron = SimpleNamespace(costs=dict(ffn_dim=torch.tensor([-0.3, -0.2, 0.0])))
        tok_embeddings = torch.nn.Embedding(6, 1)
        picks = [SimpleNamespace(axis="ffn_dim", choice=torch.tensor([[2, 0, 0, 1, 2, 2]]))] * 2

        def __call__(self, tokens):
            assert tokens.tolist() == [[0, 1, 2, 3, 4, 5]]

    drawn = picture(Network(), list(range(6)), Pieces(), columns=3)
    assert drawn == "ab\n██\ncde\n▁▃▃\nf \n▃█"
