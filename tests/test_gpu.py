"""What a GPU does otherwise: bf16 products, and kernels of its own. Without a GPU the same
tests run in bf16 on the CPU.

    python -m pytest -q tests/test_gpu.py -k cuda        what bench/gpu.sh runs
"""
import pytest
import torch

import train
from bench.speed import native_llama
from model import Gates, KVCache
from plumbing import duration
from plumbing.parallel import autocast, autocast_is
from plumbing.sharding import compile_blocks
from space import Space
from tests.helpers import GQA, SHAPES, hard_gates, random_llama, subnets, tokens_for
from tests.miniature import bytes_of, gradients, parts

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IN_BF16 = 0.02  # what a few layers of bf16 products lose, relative, in the 2-norm: one product rounds to .004


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    """Forwards are in bf16 on both. The same bits twice: some of CUDA's backwards add in any
    order, unless told not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with autocast_is("bfloat16"):
        yield torch.device(request.param)
    torch.use_deterministic_algorithms(False)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far a is from b, relative to b, in the 2-norm."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_sliced_equals_masked_equals_exported(device, shape):
    """Catches a slice whose bf16 products are others than those under gates or of its export: the
    loss, and the gradient of a matrix. And bf16 that is none: exactly fp32's."""
    config = SHAPES[shape]
    model = random_llama(config).to(device)
    x = tokens_for(config).to(device)
    for subnet in subnets(config).values():
        gates = Gates(*(gate.to(device) for gate in hard_gates(config, subnet)))
        native = native_llama(model, subnet, device, torch.float32)
        ways = {"sliced": (model, dict(subnet=subnet)), "masked": (model, dict(gates=gates)),
                "exported": (native, {})}
        with torch.no_grad():
            exact = model(x, subnet=subnet)[0]
        for way, (one, given) in ways.items():
            with torch.no_grad(), autocast(device):
                logits = one(x, **given)[0]
            assert 0 < apart(logits, exact) < 2 * IN_BF16, way
        found = []
        for way, (one, given) in ways.items():
            one.zero_grad()
            with autocast(device):
                loss = one(x, x, **given)[1]
            loss.backward()
            found.append((loss.detach(), one.norm.weight.grad[:subnet.dim].clone()))
        for loss, gradient in found[1:]:
            assert apart(loss, found[0][0]) < 0.01 and apart(gradient, found[0][1]) < 4 * IN_BF16


def test_an_export_in_bf16_reads_and_writes(device):
    """Catches a cache of another dtype than the keys, and positions or norms that are rounded: bf16
    weights, token by token, against fp32 weights at once."""
    model = random_llama(GQA).to(device)
    for subnet in subnets(GQA).values():
        whole = native_llama(model, subnet, device, torch.float32)
        half = native_llama(model, subnet, device, torch.bfloat16)
        x = tokens_for(GQA).to(device)
        cache = KVCache(x.size(1))
        with torch.no_grad():
            want = whole(x)[0]
            read = [half(x[:, :9], cache=cache)[0]]
            read += [half(x[:, i:i + 1], cache=cache)[0] for i in range(9, x.size(1))]
        assert 0 < apart(torch.cat(read, 1), want) < 2 * IN_BF16


@pytest.mark.parametrize("teach", ["pairs", "soft"])
def test_a_training_step_in_bf16_is_near_fp32(demo, device, teach):
    """Catches a loss, a distillation or a router's gradient that bf16 spoils: one
    whole step beside fp32's."""
    found = {}
    for name in ("float32", "bfloat16"):
        model, router, shards, args = parts(*demo, teach=teach, teach_prob=1.0, kd=0.5,
                                            device=device.type, autocast=name)
        model.to(device)
        teacher = random_llama(model.config, seed=3).to(device)
        with autocast_is(name):
            rows = train.train_step(model, model, router, shards, 1, args, device, teacher)["passes"]
        found[name] = rows, gradients(model, router)
    (exact, want), (rounded, got) = found["float32"], found["bfloat16"]
    for one, other in zip(exact, rounded, strict=True):
        assert one["subnet"] == other["subnet"] and 0 < abs(one["loss"] - other["loss"]) < 0.02 * one["loss"]
    assert want.keys() == got.keys()
    flat = [torch.cat([g.float().flatten().cpu() for n, g in grads.items()
                       if n not in dict(router.named_parameters())])
            for grads in (got, want)]
    assert apart(*flat) < 4 * IN_BF16


def test_resume_in_bf16_is_bit_for_bit(random_start, device, tmp_path, monkeypatch):
    """Catches a run that, stopped and gone on with, ends in other bits: something of bf16
    that no checkpoint has."""
    root, flags = random_start
    flags = [*flags, "--device", device.type, "--autocast", "bfloat16", "--kd", "0.5", "--save-every", "2"]
    monkeypatch.setattr(duration, "machine_flops", lambda device, size=None: 1e12)
    train.main([*flags, "--out", str(tmp_path / "whole")])
    step = train.train_step

    def stopped(*args):
        if args[4] == 3:
            raise KeyboardInterrupt
        return step(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train.main([*flags, "--out", str(tmp_path / "twice")])
    train.main([*flags, "--out", str(tmp_path / "twice"), "--resume"])
    assert bytes_of(tmp_path / "twice") == bytes_of(tmp_path / "whole")


def test_compiled_blocks_in_bf16(device):
    """Catches a compiled block whose bf16 differs: losses and gradients of slices, beside uncompiled ones."""
    torch._dynamo.reset()
    plain, compiled = random_llama(GQA).to(device), random_llama(GQA).to(device)
    compile_blocks(compiled, "inductor" if device.type == "cuda" else "eager")
    x = tokens_for(GQA).to(device)
    for budget in (1.0, 0.6, 0.8):
        subnet = Space(GQA).uniform(budget)
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            with autocast(device):
                loss = model(x, x, subnet=subnet)[1]
            loss.backward()
            found.append((loss.detach(), model.norm.weight.grad))
        (loss, gradient), (other_loss, other_gradient) = found
        assert apart(other_loss, loss) < 0.01 and apart(other_gradient, gradient) < 2 * IN_BF16
