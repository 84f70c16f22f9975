"""flextron.py and pertoken.py: routers, per-token execution, what a target buys, the three stages."""
import dataclasses
import json
import shutil
import sys

import pytest
import torch

import eval as evaluation
import flextron.__main__ as training
import sample
from plumbing.checkpoint import load_llama, load_tensors, save_llama
from data.shards import write_shard
from flextron.deployed import Deployed, deploy, flextron_state, load_flextron, restore_flextron
from model import KVCache, LlamaConfig, SubNet
from flextron.network import (
    KINDS,
    Flextron,
    Noise,
    attend,
    costs_of,
    feed,
    parameters_of,
    sizes_for,
    total,
)
from space import cost, random_generator
from flextron.stages import Surrogate
from tests.helpers import GQA, MHA, SHAPES, close, files_of, make_supernet, one_line_error, random_llama, tokens_for
from data.tokenizer import save_tokenizer, train_bpe

NOISE = Noise(0.7, 2.0, (0, 5, 0.6))


def random_flextron(config: LlamaConfig, dynamic: bool = True, seed: int = 0, spread: float = 3.0) -> Flextron:
    """Random Llama, random routers with strong opinions (spread 0: as they start), odd sizes; prices measured on
    random text."""
    heads = sizes_for(config)["n_heads"]
    sizes = dict(n_heads=heads, ffn_dim=[13, 37, 60, config.ffn_dim])
    costs = costs_of(config, sizes, parameters_of(config, dynamic))
    flextron = Flextron(random_llama(config, seed), sizes, dynamic, costs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in flextron.routers.parameters() if spread else ():
            p.copy_(torch.randn(p.shape, generator=generator) * (spread if p.dim() < 3 else spread / p.size(-2) ** 0.5))
    flextron.calibrate(tokens_for(config, 4, 16, seed=9), [0.8, 0.6, 0.5])
    return flextron


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
        [assert_same(a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [assert_same(x, y) for x, y in zip(a, b)]
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


# ---- per-token execution


@pytest.mark.parametrize("shape", list(SHAPES))
def test_segments_are_the_mask(shape):
    """Catches a segment on the wrong rows, heads or neurons, and a sum that is not put back where it came from."""
    f = random_flextron(SHAPES[shape])
    x = tokens_for(f.model.config)
    with torch.no_grad():
        logits, loss, picks = f(x, x, 0.6)
        masked, masked_loss, _ = f(x, x, 0.6, masked=True)
    for i, kind in enumerate(KINDS):
        chosen = torch.cat([p.choice.flatten() for p in picks[i::2]])
        assert len(chosen.unique()) > 1, f"{kind}: one choice proves little"
    assert close(logits, masked) and abs(loss - masked_loss) < 1e-5


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_segments_are_the_slow_way(config):
    """Catches an attention or MLP that agrees with the masked one because both are wrong: token by token, the layer
    that each token chose is run as a slice of its own on the whole sequence, and only that token's row is kept."""
    model = random_llama(config)
    x = torch.randn(2, 11, config.dim, generator=torch.Generator().manual_seed(3))
    cos, sin = model.rope(0, 11, x.device)
    generator, block = torch.Generator().manual_seed(4), model.layers[1]
    for sizes, fast, slow in (
            ([13, 37, config.ffn_dim], lambda c, s: feed(block.feed_forward, x, c, s),
             lambda c, s: slow_feed(block.feed_forward, x, c, s)),
            (sizes_for(config)["n_heads"], lambda c, s: attend(block.attention, x, c, s, cos, sin), None)):
        choice = torch.randint(len(sizes), (2, 11), generator=generator)
        with torch.no_grad():
            got = fast(choice, sizes)
            if slow is None:
                rows = torch.stack([block.attention(x, cos, sin, n) for n in sizes])         # K, B, T, dim
                want = rows.gather(0, choice[None, ..., None].expand(1, *x.shape))[0]
            else:
                want = slow(choice, sizes)
        assert close(got, want)


def test_one_choice_for_all_is_a_subnet():
    """Catches a static network, as exported, that is not what its routers choose."""
    for config in (GQA, MHA):
        f = random_flextron(config, dynamic=False)
        subnet, x = f.route(0.6), tokens_for(config)
        with torch.no_grad():
            sliced = f.model(x, subnet=subnet)[0]
            choice = {k: [f.sizes[k].index(s) for s in getattr(subnet, k)] for k in KINDS}
            f.pick = lambda kind, i, target, h, noise, price: type("P", (), dict(choice=torch.full(
                h.shape[:2], choice[kind][i])))
            assert close(f(x, target=0.6)[0], sliced)
        assert len(set(subnet.n_heads)) > 1 or len(set(subnet.ffn_dim)) > 1, "every layer alike: proves little"


def test_a_token_alone():
    """Catches a choice, or a result, that depends on what else is in the batch or comes later in the text."""
    f, x = random_flextron(GQA), tokens_for(GQA, 5, 21)
    with torch.no_grad():
        logits, _, picks = f(x, target=0.6)
        for b in range(5):
            alone, _, own = f(x[b:b + 1], target=0.6)
            assert all(torch.equal(p.choice[b], o.choice[0]) for p, o in zip(picks, own)) and close(alone[0], logits[b])
        short, _, own = f(x[:, :9], target=0.6)
        assert all(torch.equal(p.choice[:, :9], o.choice) for p, o in zip(picks, own)) and close(short, logits[:, :9])


@pytest.mark.parametrize("config", [GQA, MHA], ids=["gqa", "mha"])
def test_the_cache_is_complete(config):
    """Catches keys and values that a narrow token did not leave for later ones, and positions off by the cache's."""
    f, x = random_flextron(config), tokens_for(config, 2, 15)
    with torch.no_grad():
        whole, cache = f(x, target=0.6)[0], KVCache(15)
        parts = [f(x[:, a:b], target=0.6, cache=cache)[0] for a, b in ((0, 6), (6, 7), (7, 12), (12, 15))]
    assert close(torch.cat(parts, 1), whole)


def test_work_is_saved(monkeypatch):
    """Catches segments that run on everybody: the multiply-adds of MLP matmuls are those that the tokens chose."""
    f, x, work = random_flextron(GQA), tokens_for(GQA), []
    linear = torch.nn.functional.linear

    def counted(a, w, bias=None):
        work.append(a.numel() // a.size(-1) * w.numel())
        return linear(a, w, bias)
    h = torch.randn(3, 17, GQA.dim)
    choice = torch.randint(4, (3, 17), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("pertoken.F.linear", counted)
    feed(f.model.layers[0].feed_forward, h, choice, f.sizes["ffn_dim"])
    chosen = torch.tensor(f.sizes["ffn_dim"])[choice].sum().item()
    assert sum(work) == 3 * GQA.dim * chosen < 3 * GQA.dim * GQA.ffn_dim * x.numel()


# ---- routers and targets


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("teach", ["gates", "surrogate"])
def test_gradients_reach_every_router(dynamic, teach):
    """Catches a router, or one of its tensors, that a choice through argmax has cut off from the loss."""
    f, x = random_flextron(GQA, dynamic, spread=1.0), tokens_for(GQA)
    f.model.requires_grad_(False)
    if teach == "gates":
        _, loss, picks = f(x, x, 0.6, NOISE, masked=True)
    else:
        picks = f(x, x, 0.6, NOISE)[2]
        surrogate = Surrogate(sum(p.soft.size(-1) for p in picks), 0)
        loss = surrogate(torch.cat([p.soft for p in picks], -1).flatten(0, 1)).mean()
    loss.backward()
    for name, p in f.routers.named_parameters():
        assert p.grad is not None and all(g.abs().max() > 0 for g in p.grad), name
    assert all(p.grad is None for p in f.model.parameters())


def test_cost_gradient_alone_moves_to_the_target():
    """Catches a latency loss with the wrong sign, or cut off from the routers."""
    for dynamic in (False, True):
        f, x = random_flextron(GQA, dynamic, spread=0), tokens_for(GQA)
        optimizer = torch.optim.AdamW(f.routers.parameters(), lr=2e-2)
        for step in range(40):
            optimizer.zero_grad()
            sum((f.mean_cost(f(x, target=t, noise=NOISE._replace(parts=(step, t)))[2]) / t - 1).abs()
                for t in (0.4, 0.8)).backward()
            optimizer.step()
        for t in (0.4, 0.8):
            assert abs(f.mean_cost(f(x, target=t, noise=NOISE)[2]).item() - t) < 0.06, (dynamic, t)


def test_hard_forward_soft_gradient():
    """Catches gates that are not exactly 0 or 1 in a straight-through pass."""
    f, x = random_flextron(GQA), tokens_for(GQA)
    _, loss, picks = f(x, x, 0.6, NOISE, masked=True)
    run_hard = f(x, x, 0.6, NOISE)[1]
    assert abs(loss - run_hard) < 1e-5
    for pick in picks:
        assert (pick.gate.detach() - pick.gate.detach().round()).abs().max() < 1e-6
        assert torch.equal(pick.gate.argmax(-1).expand_as(pick.choice), pick.choice)


def test_noise_is_a_function_of_its_parts():
    """Catches noise from global state (a resumed run would differ), and the same noise in every layer or step."""
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
    """Catches a SubNet over its target, costs that do not add up, and a price that stops far below the target."""
    f = random_flextron(config, dynamic=False)
    for target in [f.smallest(), 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, 1.0]:
        if target >= f.smallest():
            subnet = f.route(target)
            got = total(f.shares(target), f.costs)
            assert abs(got - cost(config, subnet)) < 1e-6 and got <= target + 1e-6, target
            assert target in (1.0, f.smallest()) or got > target - 0.04, (target, got)
    assert f.route(1.0) == SubNet.full(config)


def test_dynamic_meets_its_target_on_its_text():
    """Catches a price that was measured on something else than what is run; and a target of 1 with a router."""
    f, text = random_flextron(GQA), tokens_for(GQA, 4, 16, seed=9)
    for target in (0.8, 0.6, 0.5):
        with torch.no_grad():
            deployed = Deployed(f, target)
            deployed(text)
        assert target - 0.03 < deployed.got() <= target + 1e-6
        widths = deployed.widths()
        assert all(min(f.sizes[kind]) <= w <= max(f.sizes[kind]) for kind in KINDS for w in widths[kind])
    assert torch.equal(Deployed(f, 1.0)(text)[0], f.model(text)[0]) and Deployed(f, 1.0).got() == pytest.approx(1)


def test_kv_heads_stay_when_tokens_choose():
    """Catches a cost that counts the keys and values of MHA as saved, which later tokens need."""
    f = random_flextron(MHA, dynamic=True)
    static = costs_of(MHA, f.sizes, parameters_of(MHA, False))
    assert (f.costs["n_heads"][:-1] > static["n_heads"][:-1]).all()
    assert torch.equal(costs_of(GQA, f.sizes | dict(n_heads=[2, 8]), parameters_of(GQA, True))["n_heads"],
                       costs_of(GQA, f.sizes | dict(n_heads=[2, 8]), parameters_of(GQA, False))["n_heads"])


def test_a_target_in_another_currency():
    """Catches --budget on routers trained by latency that ignores the difference: what is asked is in parameters."""
    for dynamic in (False, True):
        f = random_flextron(GQA, dynamic)
        params = f.costs
        f.costs, f.unit = {kind: c * 0.7 for kind, c in params.items()}, "latency"  # this machine saves less
        f.calibrate(tokens_for(GQA, 4, 16, seed=9), [0.8, 0.7])
        target = f.target_for(0.75, params, "params")
        assert target > 0.75 and 0.6 < total(f.shares(target), params) <= 0.75 + 1e-6


# ---- folders, stages, mistakes


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Shards, a base, and a static and a dynamic folder of a few steps each."""
    root = tmp_path_factory.mktemp("flextron")
    config = dataclasses.replace(GQA, vocab_size=560)
    text = "the cat sat on the mat and the dog ate the cake; def main(argv): return [line for line in argv]\n" * 3
    (root / "data").mkdir()
    save_tokenizer(root / "data/tokenizer.model", train_bpe([text], 560))
    for split, n in (("train", 6000), ("val", 700)):
        tokens = torch.randint(300, (n,), generator=random_generator(split)).cumsum(0) % 300
        write_shard(root / f"data/{split}_000000.bin", tokens.numpy(), 560)
    save_llama(root / "base", config, random_llama(config).state_dict(), root / "data/tokenizer.model")
    flags = ["--llama", str(root / "base"), "--data", str(root / "data"), "--batch-tokens", "64", "--seq-len", "16",
             "--elastic-steps", "3", "--router-steps", "3", "--joint-steps", "3", "--samples", "2", "--eval-windows",
             "6", "--calibration-windows", "4", "--targets", "0.7", "0.5", "--threshold", "100", "--device", "cpu",
             "--teach", "surrogate"]
    for kind in ("static", "dynamic"):
        training.main(flags + ["--router", kind, "--out", str(root / kind)])
    return root, flags


def test_folder_round_trip(desk):
    """Catches routers, prices or sizes that a folder forgets, and a folder that is no plain Llama any more."""
    root, _ = desk
    for kind in ("static", "dynamic"):
        model = load_llama(root / kind)
        f, x = load_flextron(root / kind, model), tokens_for(model.config)
        again = restore_flextron(model, flextron_state(f))
        with torch.no_grad():
            for target in (0.7, 0.6, 0.5):
                assert torch.equal(Deployed(f, target)(x)[0], Deployed(again, target)(x)[0])
            assert torch.equal(Deployed(f, 1.0)(x)[0], model(x)[0])
        assert f.dynamic == (kind == "dynamic") and bool(f.calibrated) == f.dynamic
    assert load_flextron(root / "base", load_llama(root / "base")) is None


@pytest.mark.parametrize("teach", ["surrogate", "gates"])
def test_killed_and_resumed(desk, tmp_path, monkeypatch, teach):
    """Catches state that resume.pt forgets: moments, the surrogate and its pairs, prices. Stopped every third step."""
    root, flags = desk
    flags = flags + ["--router", "dynamic", "--teach", teach, "--micro-batch", "3"]
    training.main(flags + ["--out", str(tmp_path / "a")])
    stop = training.Stop

    class Impatient(stop):
        asked = 0

        @property
        def wished(self):
            self.asked += 1
            return self.asked > 6

        @wished.setter
        def wished(self, value):
            pass
    monkeypatch.setattr(training, "Stop", Impatient)
    for _ in range(30):
        try:
            training.main(flags + ["--out", str(tmp_path / "b"), "--resume"])
            break
        except SystemExit as left:
            assert left.code == 0
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(a[name] == b[name] for name in a if name not in ("log.jsonl", "resume.pt"))  # a pickle also remembers
    assert_same(*(load_tensors(tmp_path / run / "resume.pt") for run in "ab"))          # which strings are one object
    steps = lambda folder: {r["step"]: r["loss"] for r in map(json.loads, open(folder / "log.jsonl")) if "loss" in r}
    assert steps(tmp_path / "a") == steps(tmp_path / "b")
    costs = [r["cost"] for r in map(json.loads, open(tmp_path / "a/log.jsonl")) if "cost" in r]
    state = load_tensors(tmp_path / "a/flextron.pt")
    assert costs and all(len(of) == len(state["targets"]) for of in costs), "one number a target, of all micro-batches"


def test_stages_train_what_they_should(desk, tmp_path):
    """Catches a Llama that moves while it is frozen, routers that move before their stage, and routers that follow a
    surrogate whose error is over the threshold."""
    root, flags = desk
    def after(*more):
        training.main(flags + ["--out", str(tmp_path / "o"), *more])
        state = load_tensors(tmp_path / "o/resume.pt")
        state = {part: {k: t.clone() for k, t in of.items()} for part, of in (
            ("model", state["model"]), ("routers", state["flextron"]["routers"]))} | dict(updates=state["updates"])
        shutil.rmtree(tmp_path / "o")
        return state
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    elastic = after("--router-steps", "0", "--joint-steps", "0")
    for teach in ("surrogate", "gates"):
        routed = after("--joint-steps", "0", "--teach", teach)
        assert routed["updates"] == 3 and not same(elastic["routers"], routed["routers"])
    frozen = after("--joint-steps", "0", "--elastic-steps", "0")
    waited = after("--joint-steps", "0", "--elastic-steps", "0", "--threshold", "1e-9")
    nothing = after("--joint-steps", "0", "--elastic-steps", "0", "--router-steps", "0")
    assert same(frozen["model"], nothing["model"]) and waited["updates"] == 0
    assert same(waited["routers"], nothing["routers"]) and not same(elastic["model"], nothing["model"])


def test_where_it_starts(desk, tmp_path):
    """Catches a family of train.py that is sorted again, which would undo what its prefixes have learned, and a plain
    Llama that is not sorted at all."""
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
    """Catches --cost latency that prices sizes by parameters, or whose folder loses the table it was trained with."""
    root, flags = desk
    flat = lambda model, choices, rounds=1, tokens=None: dict(
        dim=[48], n_heads=[2, 8], ffn_dim=[8, 80], fixed=[0.2], layer=[0.2], heads=[[-0.12, 0.0]],
        neurons=[[-0.06, 0.0]], hardware="a machine whose heads are slow", threads=1, torch="", device="cpu")
    monkeypatch.setattr("latency.measure", flat)
    training.main(flags + ["--cost", "latency", "--out", str(tmp_path / "o"), "--targets", "0.6"])
    f = load_flextron(tmp_path / "o", load_llama(tmp_path / "o"))
    assert f.unit == "latency" and (tmp_path / "o/latency.json").is_file()
    assert torch.allclose(f.costs["n_heads"], torch.tensor([-0.12, -0.08, -0.04, 0.0]))
    by_time, by_size = (deploy(f, tmp_path / "o", 0.6, unit).subnet for unit in ("latency", "params"))
    time_of = lambda s: 0.2 + sum(0.2 - 0.02 * (8 - h) - 0.06 * (80 - n) / 72 for h, n in zip(s.n_heads, s.ffn_dim))
    assert 0.5 < time_of(by_time) <= 0.6 + 1e-6 and cost(f.model.config, by_size) <= 0.6 < time_of(by_size)


def test_surrogate_learns_what_it_is_shown():
    """Catches pairs that are shuffled against each other, and an error measured on pairs already learned."""
    s, generator = Surrogate(6, 0), torch.Generator().manual_seed(0)
    w = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.4, -0.6])
    for step in range(60):
        x = torch.rand(24, 6, generator=generator).softmax(-1)
        s.observe(x, x @ w, step)
    assert s.error < 0.01 and len(s.y) == 24 * 60
    x = torch.rand(50, 6, generator=generator).softmax(-1)
    assert (s(x) - x @ w).abs().mean() < 0.02
    s.observe(x, x @ w + 10, 61)
    assert s.error > 0.9


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
        assert len(rows[1]["n_heads"]) == len(rows[1]["ffn_dim"]) == GQA.n_layers
        assert ("cat" in err) == (kind == "dynamic")
        sample.main(["--model", str(root / kind), "--budget", "0.6", "--max-new-tokens", "4", "--device", "cpu"])


def test_mistakes_end_in_one_line(desk, capsys, tmp_path):
    """Catches a traceback, or a run that begins, for what a user can get wrong."""
    root, flags = desk
    new = ["--out", str(tmp_path / "x")]
    for wrong, words in ((["--targets", "1.2"], ["1.2", "--targets 0.8"]),
                         (["--targets", "0.05"], ["0.05", "smallest"]),
                         (["--ffn-dim-choices", "99999"], ["99999"]), (["--n-heads-choices", "3"], ["n_heads 3"]),
                         (["--llama", str(tmp_path)], ["params.json"]),
                         (["--out", str(root / "base")], ["starts from"]),
                         (["--router-lr", "-1"], ["--router-lr"]), (["--batch-tokens", "63"], ["--seq-len"]),
                         (["--seed", "7", "--out", str(root / "static")], ["other settings"])):
        with one_line_error(capsys, *words):
            try:
                training.main(flags + new + wrong)
            finally:
                print(capsys.readouterr().err.splitlines()[-1], file=sys.stderr)  # its progress, then the line
    for kind, asked, words in (("static", 0.01, ["0.01"]), ("dynamic", 0.2, ["0.2"]), ("static", 1.5, ["1.5"])):
        f = load_flextron(root / kind, load_llama(root / kind))
        with one_line_error(capsys, *words):
            deploy(f, root / kind, asked)
    (tmp_path / "bad").mkdir()
    for name, content in files_of(root / "dynamic").items():
        (tmp_path / "bad" / name).write_bytes(content)
    state = load_tensors(root / "dynamic/flextron.pt")
    torch.save({**state, "sizes": {"n_heads": [8], "ffn_dim": [80]}}, tmp_path / "bad/flextron.pt")
    with one_line_error(capsys, "flextron.pt", "take both from one folder"):
        load_flextron(tmp_path / "bad", load_llama(tmp_path / "bad"))
