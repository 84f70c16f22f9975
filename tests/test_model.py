"""model.py: the Llama against an independent one, slices against masks, RoPE against complex
numbers, the cache, and all of it in bf16."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as elastic
from model import (
    LAST,
    NO_GATES,
    NOWHERE,
    Gates,
    KVCache,
    Llama,
    LlamaConfig,
    SubNet,
    apply_rope,
    rope_frequencies,
)
from router import Modulation
from tests.helpers import GQA, MHA, SHAPES, close, hard_gates, random_llama, subnets, tokens_for


def open_gates(c: LlamaConfig) -> Gates:
    """Gates of one on every unit."""
    return Gates(torch.ones(c.dim), torch.ones(c.n_layers, max(c.per_layer("n_heads"))),
                 torch.ones(c.n_layers, max(c.per_layer("ffn_dim"))), torch.ones(c.n_layers))


def reference_logits(state: dict, c: LlamaConfig, tokens: torch.Tensor, gates: Gates | None = None,
                     factors: torch.Tensor | None = None) -> torch.Tensor:
    """A Llama written a second time from Meta's description, one head at a time, complex RoPE, in
    float64; reads a raw state dict and knows nothing of slices. Every unit is multiplied by its
    gate, every output by its factor."""
    w = {k: v.detach().double() for k, v in state.items()}
    gates = Gates(*[gate.double() for gate in gates or open_gates(c)])
    factors = torch.ones(c.n_layers, 2) if factors is None else factors
    f = torch.tensor([c.rope_theta ** (-2 * j / c.head_dim) for j in range(c.head_dim // 2)],
                     dtype=torch.float64)
    for j, x in enumerate(f.tolist()):
        wave = 2 * math.pi / x
        if c.rope_factor != 1 and wave > 8192:
            f[j] = x / c.rope_factor
        elif c.rope_factor != 1 and wave >= 8192 / 4:
            s = (8192 / wave - 1) / 3
            f[j] = (1 - s) * x / c.rope_factor + s * x
    T = tokens.size(1)
    turn = torch.polar(torch.ones(T, len(f), dtype=torch.float64), torch.outer(torch.arange(T).double(), f))

    def norm(x, weight):  # a channel counts in the mean as much as its gate says
        mean_square = (gates.dim * x.pow(2)).sum(-1, keepdim=True) / gates.dim.sum()
        return gates.dim * weight * x / (mean_square + c.norm_eps).sqrt()

    def rotate(x):  # B, T, head_dim
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def head(weight, h):
        return weight[h * c.head_dim:(h + 1) * c.head_dim].T

    x = w["tok_embeddings.weight"][tokens]
    for i in range(c.n_layers):
        p = f"layers.{i}."
        H, K = c.per_layer("n_heads")[i], c.per_layer("n_kv_heads")[i]
        wq, wk, wv = (w[p + f"attention.{name}.weight"] for name in ("wq", "wk", "wv"))
        y = norm(x, w[p + "attention_norm.weight"])
        heads = []
        for h in range(H):
            kv = h // (H // K)
            q, k, v = y @ head(wq, h), y @ head(wk, kv), y @ head(wv, kv)
            scores = rotate(q) @ rotate(k).transpose(1, 2) / c.head_dim ** 0.5
            scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
            heads.append(gates.n_heads[i, h] * (scores.softmax(-1) @ v))
        y = torch.cat(heads, -1) @ w[p + "attention.wo.weight"].T
        x = x + gates.layers[i] * factors[i, 0] * y
        y = norm(x, w[p + "ffn_norm.weight"])
        gate = y @ w[p + "feed_forward.w1.weight"].T
        neurons = gate * gate.sigmoid() * (y @ w[p + "feed_forward.w3.weight"].T)
        neurons = gates.ffn_dim[i, :neurons.size(-1)] * neurons
        y = neurons @ w[p + "feed_forward.w2.weight"].T
        x = x + gates.layers[i] * factors[i, 1] * y
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_an_independent_llama(shape):
    """Catches wrong RoPE pairing, a missing norm weight, GQA heads reading the wrong KV head, a
    missing causal mask, and a loss that shifts the targets, which are shifted already, or is not
    the mean in nats."""
    model, tokens, targets = (random_llama(SHAPES[shape]), tokens_for(SHAPES[shape]),
                              tokens_for(SHAPES[shape], seed=2))
    want = reference_logits(model.state_dict(), model.config, tokens)
    logits, loss = model(tokens)[0], model(tokens, targets)[1]
    assert close(logits.double(), want)
    p = want.softmax(-1).gather(-1, targets[..., None])
    assert loss.item() == pytest.approx(-p.log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("chunk", [1000, 5])
@pytest.mark.parametrize("distilled", [False, True])
def test_the_loss_in_chunks_is_the_plain_formula(monkeypatch, shape, chunk, distilled):
    """Catches a token that is lost between chunks, a chunk beside another's targets or teacher, a
    KL that is the other way round, a mean of means, and a gradient that misses one of them: to
    1e-6, of a slice, with every weight's."""
    monkeypatch.setattr(elastic, "LOSS_TOKENS", chunk)
    config = SHAPES[shape]
    model, teacher = random_llama(config), random_llama(config, seed=5).requires_grad_(False)
    tokens, targets = tokens_for(config), tokens_for(config, seed=2)  # 51 of them, no multiple of 5
    subnet = subnets(config)["all"]
    weights = [p for _, p in model.named_parameters()]

    logits = model(tokens, subnet=subnet)[0]
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    reference = None
    if distilled:
        log_p = teacher(tokens)[0].log_softmax(-1)
        kl = (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1).mean()
        want = torch.stack([want, kl])
        reference = (teacher.states(tokens), teacher.output.weight)
    no_logits, found = model(tokens, targets, subnet=subnet, reference=reference)
    assert no_logits is None and found.shape == want.shape and close(found, want, 1e-6)
    mix = torch.tensor([0.3, 0.7]) if distilled else torch.tensor(1.0)
    gradients = torch.autograd.grad((found * mix).sum(), weights, allow_unused=True)
    wanted = torch.autograd.grad((want * mix).sum(), weights, allow_unused=True)
    assert sum(g is not None for g in gradients) > 10
    for got, true in zip(gradients, wanted, strict=True):
        assert (got is None) == (true is None) and (true is None or close(got, true, 1e-6))


def test_no_more_logits_than_a_chunk(monkeypatch):
    """Catches logits of a whole batch, in the forward or kept for the backward, with a teacher and
    without, where only a loss is wanted; and any where none are."""
    monkeypatch.setattr(elastic, "LOSS_TOKENS", 8)
    V = 1009
    config = dataclasses.replace(GQA, vocab_size=V)
    model, teacher = random_llama(config), random_llama(config, seed=5)
    tokens = tokens_for(config, batch=3)  # 3 x 17
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for t in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(t, torch.Tensor) and t.dim() and t.size(-1) == V and t.shape != (config.dim, V):
                    largest.append(t.numel() // V)
            return made

    kept = []
    reference = (teacher.states(tokens).detach(), teacher.output.weight.detach())
    with Largest():
        for given in (None, reference):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
                loss = model(tokens, tokens, reference=given)[1]
            loss.sum().backward()
    assert 0 < max(largest) <= 8
    assert not [shape for shape in kept if shape and shape[-1] == V and shape != (config.dim, V)]
    largest.clear()
    with Largest(), torch.no_grad():
        model(tokens, cache=KVCache(20), at=NOWHERE)
        model.states(tokens)
        assert max(largest, default=0) == 0
        model(tokens, at=LAST)
        assert max(largest) == 3


def test_logits_at_some_positions():
    """Catches an index into the wrong axis."""
    model, tokens = random_llama(GQA), tokens_for(GQA, batch=3)
    every = model(tokens)[0]
    assert close(model(tokens, at=LAST)[0], every[:, -1])
    assert model(tokens, at=NOWHERE)[0].shape == (0, tokens.size(1), GQA.vocab_size)
    rows, positions = [2, 0, 2], [1, 5, 0]
    found = model(tokens, at=(rows, positions))[0]
    assert close(found, torch.stack([every[r, t] for r, t in zip(rows, positions)]))


@pytest.mark.parametrize("shape", ["gqa", "mha"])
def test_soft_gates_equal_an_independent_llama(shape):
    """Catches what gates of 0 and 1 cannot show: a gate that is squared, applied twice, to the
    stream or to one output of a block only, a mean in a norm that weighs channels otherwise, and a
    gradient that misses one of a gate's places."""
    config, generator = SHAPES[shape], torch.Generator().manual_seed(3)
    model, tokens, targets = random_llama(config), tokens_for(config), tokens_for(config, seed=2)
    gates = Gates(*[torch.rand(gate.shape, generator=generator).requires_grad_()
                    for gate in open_gates(config)])
    factors = (1 + 0.3 * torch.randn(config.n_layers, 2, generator=generator)).requires_grad_()
    want = reference_logits(model.state_dict(), config, tokens, gates, factors)
    want_loss = F.cross_entropy(want.flatten(0, 1), targets.flatten())
    logits = model(tokens, gates=gates, factors=factors)[0]
    loss = model(tokens, targets, gates=gates, factors=factors)[1]
    assert close(logits.double(), want)
    learned = [*gates, factors]
    for got, true in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(want_loss, learned)):
        assert close(got, true, 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", subnets(GQA))
def test_sliced_equals_masked_equals_cut_and_read_by_another(shape, name):
    """Invariant 2. Catches a norm that divides by the full width, heads cut across groups, a wrong axis."""
    config = SHAPES[shape]
    model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)[name]
    factors = 1 + 0.3 * torch.randn(config.n_layers, 2)
    sliced = model(tokens, subnet=subnet, factors=factors)[0]
    masked = model(tokens, gates=hard_gates(config, subnet), factors=factors)[0]
    state = {k: v.clone() for k, v in model.slices(subnet).items()}
    for new, old in enumerate(subnet.layers):  # the factors, folded by hand
        state[f"layers.{new}.attention.wo.weight"] *= factors[old, 0]
        state[f"layers.{new}.feed_forward.w2.weight"] *= factors[old, 1]
    native = Llama.from_state(subnet.config(config), state)
    assert close(masked, sliced) and close(native(tokens)[0], sliced)
    assert close(reference_logits(state, subnet.config(config), tokens), sliced.double())
    if name != "full":
        assert not close(model(tokens, factors=factors)[0], sliced, 1e-2), (
            "the slice computes what the full model does")


def test_a_slice_of_a_slice():
    """Catches KV heads, heads or neurons of another layer where every layer has its own, as in an exported
    heterogeneous slice; one of them is MHA."""
    config = dataclasses.replace(GQA, n_heads=(8, 2, 6, 4), n_kv_heads=(2, 2, 3, 1), ffn_dim=(80, 13, 41, 27))
    model, tokens = random_llama(config), tokens_for(config)
    subnet = SubNet(31, (1, 2, 3), (1, 3, 2), (9, 33, 20))
    slim, state = subnet.config(config), model.slices(subnet)
    assert slim.n_kv_heads == (1, 3, 1)
    sliced = model(tokens, subnet=subnet)[0]
    assert close(Llama.from_state(slim, state)(tokens)[0], sliced)
    assert close(reference_logits(state, slim, tokens), sliced.double())


@pytest.mark.parametrize("name", ["all", "per layer"])
def test_sliced_gradients_equal_masked_gradients(name):
    """Catches a slice whose backward reaches other weights than the masked pass, or loses some."""
    config = GQA
    grads = []
    for sliced in (True, False):
        model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)[name]
        kwargs = dict(subnet=subnet) if sliced else dict(gates=hard_gates(config, subnet))
        model(tokens, tokens, **kwargs)[1].backward()
        grads.append({n: torch.zeros_like(p) if p.grad is None else p.grad
                      for n, p in model.named_parameters()})
    for n in grads[0]:
        assert torch.allclose(*[g[n] for g in grads], rtol=1e-4, atol=1e-6), n


def test_straight_through_gates_leave_the_slice_alone():
    """Catches gates of a sliced pass that are taken in another order than the weights they belong
    to: their gradient must be that of the masked pass, where every gate has its unit."""
    config = GQA
    for name in ("all", "per layer"):
        model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)[name]
        grads = []
        for full in (True, False):
            gates = [g.requires_grad_() for g in hard_gates(config, subnet)]
            model(tokens, tokens, subnet=None if full else subnet, gates=Gates(*gates))[1].backward()
            grads.append([g.grad for g in gates])
        for mask, a, b in zip(hard_gates(config, subnet), *grads):
            kept = mask.bool() if mask.dim() == 1 else mask.bool() & torch.tensor(
                [[i in subnet.layers] for i in range(config.n_layers)])
            assert torch.allclose(a[kept], b[kept], rtol=1e-3, atol=1e-6)
            assert b[kept].abs().sum() > 0


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rope_is_the_complex_rotation(factor):
    """Catches pairs (j, j + half) taken for Meta's (2j, 2j+1), and scaling that is skipped or
    linear everywhere."""
    config = LlamaConfig(head_dim=64, rope_factor=factor)
    f, T = rope_frequencies(config), 16384
    plain = rope_frequencies(LlamaConfig(head_dim=64))
    waves = 2 * math.pi / plain
    assert torch.equal(f[waves < 2048], plain[waves < 2048])
    assert torch.allclose(f[waves > 8192], plain[waves > 8192] / factor)
    angle = torch.outer(torch.arange(T).float(), f)
    x = torch.randn(1, T, 2, 64)
    turned = (torch.view_as_complex(x.view(1, T, 2, 32, 2))
              * torch.polar(torch.ones_like(angle), angle)[None, :, None])
    got = apply_rope(x, angle.cos()[:, None], angle.sin()[:, None])
    assert torch.allclose(got, torch.view_as_real(turned).flatten(-2), atol=1e-5)


@pytest.mark.parametrize("shape", ["gqa", "mha"])
@pytest.mark.parametrize("chunks", [[17], [1] * 17, [5, 1, 1, 7, 3]])
def test_cache_equals_recomputation(shape, chunks):
    """Catches positions that restart at zero, a mask aligned to the wrong corner when a chunk
    follows others, and a table of RoPE that does not grow with the text."""
    config = dataclasses.replace(SHAPES[shape], context=4)
    model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)["all"]
    # another model: this one's table would be long already
    whole = random_llama(config)(tokens, subnet=subnet)[0]
    cache, at, parts = KVCache(17), 0, []
    for n in chunks:
        parts.append(model(tokens[:, at:at + n], subnet=subnet, cache=cache)[0])
        at += n
    assert close(torch.cat(parts, 1), whole)


def test_weights_at_the_start():
    """Catches w3 scaled in the place of w2, the root of n_layers for that of 2 n_layers, norms that
    are random, and weights that seeds do not move."""
    config = dataclasses.replace(GQA, n_layers=8)
    model = Llama(config).init_weights(seed=1)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        writes = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        std = 0.02 / 4 if writes else 0.02  # 4 is the root of 2 * 8 layers
        assert p.mean().abs() < 0.2 * std and p.std().item() == pytest.approx(std, rel=0.1), name
    state = model.state_dict()
    again, other = (Llama(config).init_weights(seed=1).state_dict(),
                    Llama(config).init_weights(seed=2).state_dict())
    assert all(torch.equal(w, again[name]) for name, w in state.items())
    assert not any(torch.equal(w, other[name]) for name, w in state.items() if "norm" not in name)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_from_state_takes_the_tensors_themselves(shape):
    """Catches weights that are copied, tied embeddings that are two tensors, parameters that do not
    train or stay on the meta device, and a state dict that lacks a tensor or has one too many."""
    config = SHAPES[shape]
    source = random_llama(config)
    state = {name: w.detach().clone() for name, w in source.state_dict().items()}
    model, tokens = Llama.from_state(config, state), tokens_for(config)
    assert torch.equal(model(tokens)[0], source(tokens)[0])
    assert (model.output.weight is model.tok_embeddings.weight) == config.tied
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    name = "layers.2.attention.wo.weight"
    assert model.layers[2].attention.wo.weight.data_ptr() == state[name].data_ptr()
    assert Llama.from_state(
        config, {n: w.bfloat16() for n, w in state.items()}).norm.weight.dtype == torch.bfloat16
    for wrong in ({n: w for n, w in state.items() if n != name}, state | {"more": state[name]},
                  state | {name: state[name][:-1]}):
        with pytest.raises(RuntimeError):
            Llama.from_state(config, wrong)


def test_modulation_is_one_at_full_and_knows_every_axis():
    """Invariant 3. Catches a modulated full network, and an embedding that cannot tell two axes or
    depth apart."""
    modulation, config = Modulation(GQA), GQA
    nets, ones = subnets(config), torch.ones(4, 2)
    assert torch.equal(modulation(nets["all"]), ones), "starts as the identity"
    with torch.no_grad():
        modulation.out.normal_()
    assert torch.equal(modulation(SubNet.full(config)), ones)
    swapped = SubNet.uniform(config.dim, range(4), config.n_heads, config.ffn_dim // 2), SubNet.uniform(
        config.dim // 2, range(4), config.n_heads, config.ffn_dim)
    factors = [modulation(s) for s in (*swapped, nets["depth"], nets["heads"])]
    for i, a in enumerate(factors):
        assert not torch.equal(a, ones)
        assert all((a - b).abs().max() > 1e-3 for b in factors[:i])
    assert torch.equal(factors[2][1], ones[1]), "layer 1 is not kept: nothing to modulate"


def test_subnet_is_a_value():
    """Catches SubNets that cannot be dictionary keys or do not survive JSON, which turns tuples
    into lists."""
    for subnet in subnets(MHA).values():
        again = SubNet(**json.loads(json.dumps(vars(subnet))))
        assert again == subnet and hash(again) == hash(subnet)


# -----------------------------------------------------------------------------
# bf16: under autocast as every run on a GPU, and with bf16 weights as an export is deployed


def bf16(x: torch.Tensor) -> torch.Tensor:
    """Rounded to bf16."""
    return x.to(torch.bfloat16)


def bf16_logits(model: Llama, tokens: torch.Tensor, subnet: SubNet, gates: Gates | None = None,
                factors: torch.Tensor | None = None) -> torch.Tensor:
    """The forward with every dtype written out: matrices and attention in bf16, norms and rotations
    in fp32 and rounded at their end, gates of units in bf16, gates of layers and factors in fp32,
    the stream in the weights' dtype or fp32, logits in fp32. The kernels are those of the model, so
    every bit must be the same."""
    c, w = subnet.config(model.config), model.slices(subnet)
    gates = gates or NO_GATES
    T = tokens.size(1)
    positions = torch.arange(T, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(c))[:, None]   # T, 1, head_dim/2
    cos, sin = angles.cos(), angles.sin()

    def linear(x, name):
        return F.linear(bf16(x), bf16(w[name]))

    def norm(x, weight):
        x32 = x.to(torch.float32)
        square = x32 * x32
        if gates.dim is None:
            mean_square = square.mean(-1, keepdim=True)
        else:
            gate = gates.dim[:subnet.dim]
            mean_square = (square * gate).sum(-1, keepdim=True) / gate.sum()
            weight = weight * gate
        return (x32 * torch.rsqrt(mean_square + c.norm_eps)).to(x.dtype) * weight

    def turn(x):
        even, odd = x[..., 0::2].to(torch.float32), x[..., 1::2].to(torch.float32)
        return bf16(torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2))

    def scaled(y, i, branch):
        if gates.layers is not None:
            y = y.to(torch.float32) * gates.layers[i]
        if factors is not None:
            y = y.to(torch.float32) * factors[i, branch]
        return y

    x = w["tok_embeddings.weight"][tokens]
    for new, old in enumerate(subnet.layers):
        p = f"layers.{new}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = (linear(h, f"{p}attention.{name}.weight") for name in ("wq", "wk", "wv"))
        q, k, v = (y.unflatten(-1, (-1, c.head_dim)) for y in (q, k, v))
        q, k, v = turn(q).transpose(1, 2), turn(k).transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        if gates.n_heads is not None:
            y = y * bf16(gates.n_heads[old, heads_of(model.config, subnet.n_heads[new])])[:, None]
        x = x + scaled(linear(y.flatten(2), p + "attention.wo.weight"), old, 0)
        h = norm(x, w[p + "ffn_norm.weight"])
        y = F.silu(linear(h, p + "feed_forward.w1.weight")) * linear(h, p + "feed_forward.w3.weight")
        if gates.ffn_dim is not None:
            y = y * bf16(gates.ffn_dim[old, :subnet.ffn_dim[new]])
        x = x + scaled(linear(y, p + "feed_forward.w2.weight"), old, 1)
    return linear(norm(x, w["norm.weight"]), "output.weight").to(torch.float32)


def heads_of(config: LlamaConfig, n_heads: int) -> list[int]:
    """The query heads of a slice: the first of every KV group."""
    group = config.n_heads // config.n_kv_heads
    return [h for h in range(config.n_heads) if h % group < n_heads // config.n_kv_heads]


def soft_gates(config: LlamaConfig, seed: int = 3) -> Gates:
    """Gates as in the middle of a training: anywhere between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return Gates(*[torch.rand(gate.shape, generator=generator) for gate in open_gates(config)])


@pytest.mark.parametrize("name", ["full", "all", "per layer"])
def test_dtypes_under_autocast(name):
    """Catches a stream that is rounded to bf16, gates or factors multiplied in another dtype,
    attention outside of its kernel, queries turned in bf16, and logits or a loss left in bf16."""
    model, tokens, subnet = random_llama(GQA), tokens_for(GQA), subnets(GQA)[name]
    factors = 1 + 0.03 * torch.randn(GQA.n_layers, 2)
    for more in (dict(), dict(factors=factors), dict(gates=soft_gates(GQA)),
                 dict(gates=soft_gates(GQA), factors=factors)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens, subnet=subnet, **more)[0]
            loss = model(tokens, tokens, subnet=subnet, **more)[1]
        assert (logits.dtype, loss.dtype) == (torch.float32, torch.float32)
        assert torch.equal(logits, bf16_logits(model, tokens, subnet, **more)), list(more)


@pytest.mark.parametrize("shape", ["gqa", "mha"])
def test_dtypes_of_bfloat16_weights(shape):
    """Catches a norm whose squares are bf16, or whose result is rounded after its weight instead
    of before, RoPE in bf16, and a cache in another dtype than the keys, in an exported Llama as it
    is deployed."""
    model, tokens = random_llama(SHAPES[shape]).bfloat16(), tokens_for(SHAPES[shape])
    whole, cache = model(tokens)[0], KVCache(17)
    assert torch.equal(whole, bf16_logits(model, tokens, model.full))
    parts = [model(part, cache=cache)[0] for part in tokens.split(6, dim=1)]
    assert all(t.dtype == torch.bfloat16 for layer in cache.layers.values() for t in layer)
    assert close(torch.cat(parts, 1), whole, 0.05)


def test_positions_are_never_rounded():
    """Catches angles in the weights' dtype: in bf16 position 257 is 256."""
    model = random_llama(GQA)
    want = model.rope(0, 600, torch.device("cpu"))
    for got, table in zip(random_llama(GQA).bfloat16().rope(0, 600, torch.device("cpu")), want):
        assert got.dtype == torch.float32 and torch.equal(got, table)
    assert len(want[0].unique(dim=0)) == 600
