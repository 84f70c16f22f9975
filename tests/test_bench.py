"""bench.py and bench_train.py: what they compare is the same computation; what they print is what they measured."""
import dataclasses
import json

import pytest
import torch

import bench.slices as bench
import bench.steps as bench_train
from model import LlamaConfig
from tests.helpers import GQA, close, one_line_error, random_llama, tokens_for

SHAPE = "--dim 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --ffn-dim 64 --seq-len 16 --vocab-size 99".split()


def test_the_plain_loop_is_the_same_llama():
    """Catches a baseline that is slower, or faster, because it computes something else."""
    config = dataclasses.replace(GQA, rope_factor=8.0)
    ours, plain, x = random_llama(config), bench_train.PlainLlama(config, 17), tokens_for(config)
    names = dict(embed="tok_embeddings", out="output", blocks="layers", norm1="attention_norm", norm2="ffn_norm",
                 **{w: f"attention.{w}" for w in ("wq", "wk", "wv", "wo")},
                 **{w: f"feed_forward.{w}" for w in ("w1", "w2", "w3")})
    theirs = {name: ".".join(names.get(part, part) for part in name.split("."))
              for name, _ in plain.named_parameters()}
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
    """Catches a step that leaves its gradients or weights alone, and soft passes that are counted as sliced."""
    flags = bench_train.parse_args(["--batch-tokens", "64", "--seq-len", "16", "--device", "cpu", "--lr", "1e-2"])
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=64, vocab_size=99)
    tokens, device = bench_train.RandomTokens(99, 16), torch.device("cpu")
    given, costs = (config, tokens, flags, device), {}
    for name, step in dict(plain=bench_train.plain_step(*given), dense=bench_train.our_step(*given, [1.0], 0.0),
                           sliced=bench_train.our_step(*given, [1.0, 0.5], 0.0),
                           soft=bench_train.our_step(*given, [1.0, 0.5], 1.0)).items():
        losses = [step(0) for _ in range(25)]
        assert losses[-1] < losses[0] - 0.1, name
        costs[name] = getattr(step, "got", [None])[-1]
    assert costs["dense"] == costs["soft"] == 1 and 0.6 < costs["sliced"] <= 0.75


def test_the_tables(capsys):
    """Catches rows that are missing, ratios of nothing, and MFU on a device that has no known peak."""
    bench.main([*SHAPE, "--rounds", "1", "--json", "--device", "cpu"])
    out = json.loads(capsys.readouterr().out)
    assert [(r["budget"], r["way"]) for r in out["rows"]][:3] == [(1.0, "full"), (0.8, "sliced"), (0.8, "masked")]
    assert [r["budget"] for r in out["generation"]] == [1.0, 0.8, 0.6, 0.4] and out["generation"][0]["cached"] == 1
    assert all(r["recomputed"] > 0 for r in out["generation"])
    bench_train.main([*SHAPE, "--rounds", "1", "--json", "--device", "cpu"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["step"] for r in rows] == ["plain", "dense", "elastic", "soft .25"] and rows[1]["ratio"] == 1
    assert all(r["low"] <= r["ratio"] <= r["high"] and r["mfu"] is None for r in rows)
    for main in (bench.main, bench_train.main):
        with one_line_error(capsys, "heads"):
            main([*SHAPE, "--heads", "3"])


def test_mfu():
    """Catches FLOPs counted by hand otherwise: 6 per weight that multiplies, attention on half its square."""
    c = LlamaConfig(dim=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=16, vocab_size=10)
    T, norms = 5, 7 * 8
    weights = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10 + norms
    scores = 3 * 2 * (2 * 4 * T * T / 2) * 2  # layers, heads, q k and p v of the causal half, multiply and add
    flops = 6 * weights + 3 * scores / T
    assert bench_train.mfu(c, T, 1e12, "NVIDIA H100 80GB HBM3") == pytest.approx(flops * 1e12 / 989e12)
    assert bench_train.mfu(c, T, 1e12, "cpu") is None


@pytest.mark.parametrize("cut", bench.CUTS)
def test_what_shrinks(cut, capsys):
    """Catches a depth-only slice with fewer channels, or a width-only one with fewer layers."""
    c = LlamaConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=64, vocab_size=99)
    space = bench.Space(c, bench.CUTS[cut](c))
    subnet = space.uniform(0.55)
    assert (len(subnet.layers) == 4 or cut != "width") and (subnet.dim == 64) == (cut == "depth")
    flags = ["--layers", "4", "--rounds", "1", "--json", "--device", "cpu", "--cut", cut, "--budgets", "0.55"]
    bench.main([*SHAPE, *flags])
    assert json.loads(capsys.readouterr().out)["rows"][1]["cost"] == pytest.approx(bench.cost(c, subnet))
