"""model.py: the Llama against an independent one, slices against masks, RoPE against complex numbers, the cache."""
import json
import math

import pytest
import torch

from model import Gates, KVCache, LlamaConfig, Llama, SubNet, apply_rope, rope_frequencies
from router import Modulation
from tests.helpers import GQA, MHA, SHAPES, close, hard_gates, random_llama, subnets, tokens_for


def reference_logits(state: dict, c: LlamaConfig, tokens: torch.Tensor) -> torch.Tensor:
    """A Llama written a second time from Meta's description, one head at a time, complex RoPE, in float64; reads a raw
    state dict and knows nothing of slices."""
    w = {k: v.detach().double() for k, v in state.items()}
    f = torch.tensor([c.rope_theta ** (-2 * j / c.head_dim) for j in range(c.head_dim // 2)], dtype=torch.float64)
    for j, x in enumerate(f.tolist()):
        wave = 2 * math.pi / x
        if c.rope_factor != 1 and wave > 8192:
            f[j] = x / c.rope_factor
        elif c.rope_factor != 1 and wave >= 8192 / 4:
            s = (8192 / wave - 1) / 3
            f[j] = (1 - s) * x / c.rope_factor + s * x
    T = tokens.size(1)
    turn = torch.polar(torch.ones(T, len(f), dtype=torch.float64), torch.outer(torch.arange(T).double(), f))

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

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
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[p + "attention.wo.weight"].T
        y = norm(x, w[p + "ffn_norm.weight"])
        gate = y @ w[p + "feed_forward.w1.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_an_independent_llama(shape):
    """Catches wrong RoPE pairing, a missing norm weight, GQA heads reading the wrong KV head, a missing causal mask."""
    model, tokens = random_llama(SHAPES[shape]), tokens_for(SHAPES[shape])
    assert close(model(tokens)[0].double(), reference_logits(model.state_dict(), model.config, tokens))


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
        assert not close(model(tokens, factors=factors)[0], sliced, 1e-2), "the slice computes what the full model does"


@pytest.mark.parametrize("name", ["all", "per layer"])
def test_sliced_gradients_equal_masked_gradients(name):
    """Catches a slice whose backward reaches other weights than the masked pass, or loses some."""
    config = GQA
    grads = []
    for sliced in (True, False):
        model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)[name]
        kwargs = dict(subnet=subnet) if sliced else dict(gates=hard_gates(config, subnet))
        model(tokens, tokens, **kwargs)[1].backward()
        grads.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
    for n in grads[0]:
        assert torch.allclose(*[g[n] for g in grads], rtol=1e-4, atol=1e-6), n


def test_straight_through_gates_leave_the_slice_alone():
    """Catches gates of a sliced pass that are taken in another order than the weights they belong to: their gradient
    must be that of the masked pass, where every gate has its unit."""
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
    """Catches pairs (j, j + half) taken for Meta's (2j, 2j+1), and scaling that is skipped or linear everywhere."""
    config = LlamaConfig(head_dim=64, rope_factor=factor)
    f, T = rope_frequencies(config), 16384
    plain = rope_frequencies(LlamaConfig(head_dim=64))
    waves = 2 * math.pi / plain
    assert torch.equal(f[waves < 2048], plain[waves < 2048])
    assert torch.allclose(f[waves > 8192], plain[waves > 8192] / factor)
    angle = torch.outer(torch.arange(T).float(), f)
    x = torch.randn(1, T, 2, 64)
    turned = torch.view_as_complex(x.view(1, T, 2, 32, 2)) * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    got = apply_rope(x, angle.cos()[:, None], angle.sin()[:, None])
    assert torch.allclose(got, torch.view_as_real(turned).flatten(-2), atol=1e-5)


@pytest.mark.parametrize("shape", ["gqa", "mha"])
@pytest.mark.parametrize("chunks", [[17], [1] * 17, [5, 1, 1, 7, 3]])
def test_cache_equals_recomputation(shape, chunks):
    """Catches positions that restart at zero, and a mask aligned to the wrong corner when a chunk follows others."""
    config = SHAPES[shape]
    model, tokens, subnet = random_llama(config), tokens_for(config), subnets(config)["all"]
    whole, cache, at, parts = model(tokens, subnet=subnet)[0], KVCache(17), 0, []
    for n in chunks:
        parts.append(model(tokens[:, at:at + n], subnet=subnet, cache=cache)[0])
        at += n
    assert close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_from_state_takes_the_tensors_themselves(shape):
    """Catches weights that are copied, tied embeddings that are two tensors, parameters that do not train or stay on
    the meta device, and a state dict that lacks a tensor or has one too many."""
    config = SHAPES[shape]
    source = random_llama(config)
    state = {name: w.detach().clone() for name, w in source.state_dict().items()}
    model, tokens = Llama.from_state(config, state), tokens_for(config)
    assert torch.equal(model(tokens)[0], source(tokens)[0])
    assert (model.output.weight is model.tok_embeddings.weight) == config.tied
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    name = "layers.2.attention.wo.weight"
    assert model.layers[2].attention.wo.weight.data_ptr() == state[name].data_ptr()
    assert Llama.from_state(config, {n: w.bfloat16() for n, w in state.items()}).norm.weight.dtype == torch.bfloat16
    for wrong in ({n: w for n, w in state.items() if n != name}, state | {"more": state[name]},
                  state | {name: state[name][:-1]}):
        with pytest.raises(RuntimeError):
            Llama.from_state(config, wrong)


def test_modulation_is_one_at_full_and_knows_every_axis():
    """Invariant 3. Catches a modulated full network, and an embedding that cannot tell two axes or depth apart."""
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
    """Catches SubNets that cannot be dictionary keys or do not survive JSON, which turns tuples into lists."""
    for subnet in subnets(MHA).values():
        again = SubNet(**json.loads(json.dumps(vars(subnet))))
        assert again == subnet and hash(again) == hash(subnet)
