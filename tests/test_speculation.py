"""Speculative decoding in sample.py: the text is the target's, whatever drafts it. And
sizes that change mid-text."""
import dataclasses
import itertools

import pytest
import torch

import sample
from data.tokenizer import BOS, load_tokenizer
from model import KVCache, SubNet
from plumbing.checkpoint import save_llama
from plumbing.family import Member, open_family
from plumbing.speculation import Reader, Tally, best_k, holds, params_per_token, speedup
from sample import generate, speculate, verify
from tests.helpers import GQA, MHA, SHAPES, close, make_supernet, one_line_error, random_llama, subnets

LONG = dataclasses.replace(GQA, context=256)


def factors_for(config, seed: int = 1) -> torch.Tensor:
    """Those of a modulation, far from 1."""
    return 1 + 0.3 * torch.randn(config.n_layers, 2, generator=torch.Generator().manual_seed(seed))


def members_of(config) -> dict[str, Member]:
    """Every slice of subnets() as a member of one Llama, with factors but for the full one; a slice
    that is often right, as those of a trained family are; and another Llama."""
    model = random_llama(config)
    nearly = SubNet.uniform(config.dim, range(config.n_layers), config.n_heads, config.ffn_dim - 4)
    members = {"full": Member(model, SubNet.full(config)), "nearly full": Member(model, nearly)}
    for name, subnet in subnets(config).items():
        if name != "full":
            members[name] = Member(model, subnet, factors_for(config))
    other = random_llama(config, seed=7)
    return members | {"another model": Member(other, other.full)}


def prompts_for(config, n: int, seed: int = 3) -> list[list[int]]:
    """n prompts of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + 5 * i % 9 for i in range(n)]
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def written(target: Member, draft: Member, prompts, n: int, k: int | None = None, tally=None,
            **how) -> list[list[int]]:
    """What speculate() yields, text by text."""
    texts = [[] for _ in prompts]
    for came in speculate(target, draft, prompts, n, tally or Tally(0.4), k, **how):
        for text, new in zip(texts, came):
            text += new
    return texts


def plain(target: Member, prompts, n: int, **how) -> list[list[int]]:
    """What generate() yields, one prompt at a time."""
    return [list(generate(target.model, prompt, n, target.subnet, target.factors, **how))
            for prompt in prompts]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Pearson's statistic of counts against probabilities p of the same shape, as standard
    deviations from its mean. What has no probability must not have come."""
    assert counts[p == 0].sum() == 0
    counts, p = counts[p > 0].double(), p[p > 0].double()
    expected = counts.sum() * p / p.sum()
    statistic = ((counts - expected).square() / expected).sum()
    freedom = len(p) - 1
    return ((statistic - freedom) / (2 * freedom) ** 0.5).item()


# -----------------------------------------------------------------------------
# greedy


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, None])
def test_greedy_text_for_every_k_and_draft(k):
    """Catches a token that is accepted though the target would say another, a bonus that is dropped
    or said twice, a cache that keeps what was refused, rows that are accepted together: every
    member drafts for a slice, and another model does, alone and in a batch. None: the K that pays
    changes on the way. A draft that is the target itself gives K + 1 tokens a round."""
    members = members_of(LONG)
    prompts = prompts_for(LONG, 3)
    want = plain(members["heads"], prompts, 12, temperature=0)
    for name, draft in members.items():
        assert written(members["heads"], draft, prompts, 12, k, temperature=0) == want, name
        tally = Tally(0.4)
        assert written(members["heads"], draft, prompts[1:2], 12, k, tally, temperature=0) == want[1:2], name
        if name == "heads" and k is not None:
            assert tally.rounds == -(-12 // (k + 1)) and tally.acceptance() == 1


@pytest.mark.parametrize("window", [12, 13, 1])
def test_the_window_moves_as_in_plain_text(window):
    """Catches a draft that runs past the window's end, a window that moves one token late, and a
    move that one row's cache alone takes part in. One prompt is longer than the window."""
    members = members_of(GQA)
    prompts = prompts_for(GQA, 3) + [list(range(30))]
    want = plain(members["full"], prompts, 40, temperature=0, window=window)
    assert want != plain(members["full"], prompts, 40, temperature=0)
    for k, draft in [(1, "neurons"), (5, "nearly full"), (None, "full")]:
        assert written(members["full"], members[draft], prompts, 40, k, temperature=0, window=window) == want


# -----------------------------------------------------------------------------
# sampled


def test_the_rule_is_exact():
    """Catches an acceptance by another quotient, a refused token that is drawn again from p, from
    q, or from |p - q|, a bonus from the wrong place, and tokens accepted behind a refused one:
    frequencies against p, acceptance against the sum of min(p, q)."""
    N, K, V = 60_000, 3, 7
    generator = torch.Generator().manual_seed(4)
    p = torch.rand(K + 1, V, generator=generator) ** 2
    q = torch.rand(K, V, generator=generator) ** 2
    p[0, 3] = q[0, 5] = q[1, 0] = 0  # as top-k leaves them
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    drafted = torch.stack([torch.multinomial(q[i], N, replacement=True, generator=generator)
                           for i in range(K)], 1)
    accepted, following = verify(drafted, p.expand(N, -1, -1), q.expand(N, -1, -1), generator)
    came = torch.cat([drafted, torch.zeros(N, 1, dtype=torch.long)], 1)
    came[torch.arange(N), accepted] = following
    for i in range(K + 1):
        reached = accepted >= i
        counts = came[reached, i].bincount(minlength=V)
        assert abs(chi_square(counts, p[i])) < 4, i
        if i < K:
            chance = torch.minimum(p[i], q[i]).sum().item()
            share = (accepted[reached] > i).float().mean().item()
            assert abs(share - chance) < 4 * (chance * (1 - chance) / reached.sum().item()) ** 0.5, i
            assert chance < 0.9, "p and q are too alike to tell"


def test_equal_probabilities_are_always_accepted(monkeypatch):
    """Catches a residual that is nothing over nothing: a draft with the target's probabilities
    but for their rounding."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2000, 2, 5, generator=generator).softmax(-1)
    q = p[:, :1] * (1 + 1e-7)
    drafted = torch.multinomial(q[:, 0], 1, generator=generator)
    accepted, following = verify(drafted, p, q, generator)
    assert accepted.float().mean() > 0.99 and (following >= 0).all()
    # q is p, and yet the token is refused, by a random number that is 1.
    q = torch.zeros(1, 1, 5)
    q[0, 0, 2] = 1
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(shape))
    accepted, following = verify(torch.tensor([[2]]), q.expand(1, 2, 5), q, generator)
    assert accepted.item() == 0 and following.item() == 2


@pytest.mark.parametrize("k,temperature,top_k", [(1, 1.0, 0), (2, 0.9, 4), (5, 2.0, 0)])
def test_sampled_text_has_the_targets_distribution(k, temperature, top_k):
    """Catches temperature or top-k on one of the two alone, and contexts that slip: all
    texts of three tokens over a vocabulary of five, counted in a batch of 4,000, against
    their exact probabilities."""
    config = dataclasses.replace(GQA, dim=24, n_layers=2, vocab_size=5)
    model = random_llama(config)
    target = Member(model, model.full)
    draft = Member(model, SubNet.uniform(16, [1], 2, 30), factors_for(config))
    prompt, n, N = [3, 1, 4], 3, 4000

    texts = torch.tensor(list(itertools.product(range(5), repeat=n)))               # 125, n
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], 1))[0][:, 2:-1]
    if top_k:
        kept = logits.argsort(-1, descending=True).argsort(-1) < top_k
        logits = logits.masked_fill(~kept, -torch.inf)
    p = (logits / temperature).softmax(-1).gather(-1, texts[..., None])[..., 0].prod(-1)

    tally = Tally(0.4)
    generator = torch.Generator().manual_seed(11)
    got = torch.tensor(written(target, draft, [prompt] * N, n, k, tally, temperature=temperature, top_k=top_k,
                               generator=generator))
    counts = (got @ torch.tensor([25, 5, 1])).bincount(minlength=125)
    assert counts.sum() == N and abs(chi_square(counts, p)) < 4
    assert 0.2 < tally.acceptance() < 0.98, "a draft that is always right, or never"


def test_the_seed_decides_the_drafted_text(tmp_path, capsys):
    """Catches draws from the global stream, and a K that goes by the clock: the same
    command, the same text."""
    make_supernet(tmp_path, LONG)

    def said(seed, *more):
        torch.rand(3)
        sample.main(["--model", str(tmp_path), "--draft", "0.5", "--temperature", "1", "--device", "cpu",
                     "--seed", str(seed), "--max-new-tokens", "40", *more])
        return capsys.readouterr().out
    assert said(5) == said(5) != said(6)
    assert said(5) != said(5, "--draft-tokens", "4")


# -----------------------------------------------------------------------------
# caches


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["full", "all", "per layer"])
def test_texts_of_unequal_length_are_read_as_alone(shape, name):
    """Catches a row at another's positions, a query that sees the gap behind a short row
    or a token of its own future, keys written over a neighbour's, and a cache that
    believes in tokens taken back."""
    config = SHAPES[shape]
    model, subnet = random_llama(config), subnets(config)[name]
    member = Member(model, subnet, factors_for(config))

    def alone(text, n):
        with torch.no_grad():
            return model(torch.tensor([text]), subnet=subnet, factors=member.factors)[0][0, -n:]

    texts = prompts_for(config, 5)
    reader = Reader(member, len(texts), 40)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for n in (1, 1, 3, 2, 1, 4):
            got = reader.read(texts, n if n <= min(map(len, texts)) else 1)
            for row, text in enumerate(texts):
                assert close(got[row], alone(text, got.size(1)), 1e-5), (row, n)
            for row in range(len(texts)):
                # Each text loses 0 to 2 of its last tokens and goes on with 1 to 4 others.
                lost, new = (torch.randint(3, (1,), generator=generator),
                             torch.randint(1, 5, (1,), generator=generator))
                texts[row] = texts[row][:max(1, len(texts[row]) - lost.item())]
                reader.seen[row] = min(reader.seen[row], len(texts[row]))
                texts[row] += torch.randint(config.vocab_size, (new.item(),), generator=generator).tolist()


@pytest.mark.parametrize("texts", [1, 4])
def test_caches_after_a_rollback_are_those_of_the_text(monkeypatch, texts):
    """Catches a rollback that is off by one, or that one of the two caches leaves out: after every
    round, keys and values against those of a forward of the text so far."""
    members = members_of(LONG)
    target, draft = members["full"], members["nearly full"]
    prompts = prompts_for(LONG, texts, seed=6)
    readers = []
    monkeypatch.setattr(sample, "Reader", lambda *args: readers.append(Reader(*args)) or readers[-1])
    read = [list(prompt) for prompt in prompts]
    lengths = set()
    for came in speculate(target, draft, prompts, 30, Tally(0.4), 4, temperature=0):
        for row, new in enumerate(came):
            read[row] += new
        lengths.add(tuple(map(len, came)))
        for reader, member in zip(readers, (target, draft)):
            for row, text in enumerate(read):
                assert len(text) - 2 <= reader.seen[row] <= len(text) - 1
                fresh = KVCache(len(text))
                with torch.no_grad():
                    member.model(torch.tensor([text]), subnet=member.subnet, factors=member.factors,
                                 cache=fresh)
                for layer, pair in fresh.layers.items():
                    for ours, theirs in zip(reader.cache.layers[layer], pair):
                        seen = reader.seen[row]
                        assert close(ours[row, :, :seen], theirs[0, :, :seen], 1e-5), (row, layer)
    assert len(lengths) > 1, "all rounds are alike"


def test_what_memory_held_is_not_read(monkeypatch):
    """Catches a cache whose unwritten places hold NaN: a row that is shorter than its
    neighbours has such places."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    members = members_of(LONG)
    prompts = [[5], list(range(20))]
    assert written(members["full"], members["all"], prompts, 9, 2, temperature=0) == plain(
        members["full"], prompts, 9, temperature=0)


# -----------------------------------------------------------------------------
# how many to draft


def test_speedup_and_the_best_k():
    """Catches a formula with k in the place of k + 1, and a K that is best for plain decoding's cost."""
    for a, c, k in itertools.product((0.1, 0.5, 0.8), (0.05, 0.4), (1, 2, 5)):
        assert speedup(a, c, k) == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + 1)))
    assert speedup(1.0, 0.25, 4) == pytest.approx(5 / 2)
    # A round by chance, many times: tokens that come of it, and what it takes.
    generator = torch.Generator().manual_seed(0)
    run = (torch.rand(20_000, 4, generator=generator) < 0.7).long().cumprod(-1).sum(-1) + 1
    assert run.float().mean().item() / (1 + 4 * 0.3) == pytest.approx(speedup(0.7, 0.3, 4), rel=0.02)
    for cost in (0.1, 0.4):
        for acceptance in (0.1, 0.5, 0.7, 0.84, 1.0):
            best = best_k(acceptance, cost)
            assert all(speedup(acceptance, cost, best) >= speedup(acceptance, cost, k) for k in range(1, 9))
    assert [best_k(a, 0.4) for a in (0.1, 0.7, 0.84, 1.0)] == [1, 2, 3, 8]


def test_the_tally():
    """Catches tokens behind a refused one that count as refused, and a report that keeps
    silent where nothing pays."""
    tally = Tally(0.5)
    tally.add(4, 4, 5)
    tally.add(4, 1, 2)
    tally.add(4, 0, 1)
    assert (tally.rounds, tally.tokens, tally.judged, tally.accepted) == (3, 8, 4 + 2 + 1, 5)
    assert tally.acceptance() == 5 / 7
    tally = Tally(0.1)
    assert tally.k() == best_k(0.8, 0.1)
    for _ in range(200):
        tally.add(8, 8, 9)
    assert tally.k() == 8


def test_the_report(capsys):
    """Catches figures of another run, and a draft that cannot pay without a word about it."""
    def said(accepted, asked, cost):
        tally = Tally(cost)
        for _ in range(50):
            tally.add(asked or 2, accepted, accepted + 1)
        return tally.report(asked), capsys.readouterr().err
    line, err = said(2, None, 0.4)
    assert "0.40 of the parameters" in line and "1.00 accepted, 3.00 tokens a verification, 8 drafted" in line
    assert err == ""
    line, err = said(0, None, 0.4)
    assert "0.00 accepted, 1.00 tokens" in line and "cannot pay" in err and "leave out --draft" in err
    line, err = said(1, 6, 0.45)
    assert ("0.50 accepted, 2.00 tokens" in line and "6 drafted tokens cannot pay" in err
            and "--draft-tokens 1" in err)


# -----------------------------------------------------------------------------
# the command


def test_the_command_says_the_same_with_a_draft(tmp_path, capsys):
    """Catches a draft whose text is its own, flags that do not arrive, a window that ends
    elsewhere, and a report without its figures."""
    make_supernet(tmp_path, dataclasses.replace(GQA, context=64), seed=1)

    def said(*flags):
        sample.main(["--model", str(tmp_path), "--prompt", "the cat", "--temperature", "0",
                     "--device", "cpu", *flags])
        return capsys.readouterr()
    whole, half = said(), said("--budget", "0.7")
    assert whole.out != half.out and "the window of 64 tokens ends" in whole.err
    for flags in (["--draft", "0.5"], ["--draft", "0.5", "--draft-tokens", "5"], ["--draft", "0.7"]):
        got = said(*flags)
        assert got.out == whole.out and "the window of 64 tokens ends" in got.err
        assert "tok/s" in got.err and "tokens a verification" in got.err and "accepted" in got.err
    assert said("--budget", "0.7", "--draft", "0.4").out == half.out
    assert "5 drafted a time" in said("--draft", "0.5", "--draft-tokens", "5").err
    beyond = ["--beyond", "--max-new-tokens", "150"]
    assert said(*beyond).out == said(*beyond, "--draft", "0.5").out
    assert "150 tokens" in said(*beyond, "--draft", "0.5").err


def test_a_stop_token_inside_a_drafted_run_ends_the_text(tmp_path, capsys, monkeypatch):
    """Catches a text that goes on to the end of its run."""
    make_supernet(tmp_path, GQA)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    ids = tokenizer.encode("ok the cat")
    run = [*ids, tokenizer.encode_single_token(BOS), *ids]
    monkeypatch.setattr(sample, "speculate", lambda *args, **how: iter([[run[:1]], [run[1:]]]))
    sample.main(["--model", str(tmp_path), "--prompt", ">", "--draft", "0.5", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert out == ">ok the cat\n" and f"{len(ids) + 1} tokens," in err


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A supernet and a plain Llama."""
    path = tmp_path_factory.mktemp("models")
    model, _ = make_supernet(path / "flex", GQA)
    save_llama(path / "plain", model.config, model.state_dict(), path / "flex" / "tokenizer.model")
    return path


@pytest.mark.parametrize("model,flags,words", [
    ("flex", "--budget 0.5 --draft 0.9", "--draft 0.9 smaller"), ("flex", "--draft 1.0", "smaller"),
    ("flex", "--budget 1.0:4,0.5 --draft 0.7", "smaller"), ("plain", "--draft 1.0", "smaller"),
    ("plain", "--draft 0.5", "plain Llama"), ("flex", "--draft 0.5 --draft-tokens 0", "--draft-tokens 0"),
    ("flex", "--draft-tokens 3", "--draft 0.4"), ("flex", "--draft 0.01", "0.01"),
    ("flex", "--draft half", "half"),
    ("flex", "--budget 1.0:64", "1.0:64 1.0:64,0.5"), ("flex", "--budget 1.0,0.5", "1.0,0.5"),
    ("flex", "--budget 1.0:0,0.5", "1.0:0,0.5"), ("flex", "--budget 1.0:4,0.01", "0.01"),
    ("plain", "--budget 1.0:4,0.5", "plain"),
    ("flex", "--take-over --budget 1.0:4,0.7 --draft 0.4", "--take-over")])
def test_mistakes(folders, capsys, model, flags, words):
    """Catches a traceback, and a draft that is as large as what it drafts for."""
    with one_line_error(capsys, *words.split()):
        sample.main(["--model", str(folders / model), "--device", "cpu", *flags.split()])


def test_parameters_a_token_takes():
    """Catches an output matrix left out, embeddings counted in, and a tied one counted as nothing:
    the elements of all matrices and norms that a forward uses."""
    for config in (GQA, SHAPES["tied"]):
        model = random_llama(config)
        for subnet in subnets(config).values():
            used = sum(w.numel() for name, w in model.slices(subnet).items() if "embed" not in name)
            assert params_per_token(config, subnet) == used


# -----------------------------------------------------------------------------
# the size changes


def spoken(folder, budgets: str, *flags) -> list[int]:
    """The ids that sample.py's flags give."""
    args = sample.parse_args(["--model", str(folder), "--budget", budgets, "--device", "cpu", *flags])
    family = open_family(folder)
    parts, draft, tally = sample.members_asked(family, args)
    return list(sample.speak(parts, draft, [3, 1, 4, 1, 5], args.max_new_tokens, 200, tally, args))


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_size_changes(tmp_path, temperature):
    """Catches a member that goes on with another's cache, a token that is lost or said twice at the
    change, random numbers that begin again, and counts of the wrong member."""
    make_supernet(tmp_path, LONG)
    family = open_family(tmp_path)
    generator = torch.Generator().manual_seed(3)
    want = []
    for budget, n in ((1.0, 6), (0.5, 9), (0.8, 10)):
        member = family.member(budget)
        want += generate(member.model, [3, 1, 4, 1, 5, *want], n, member.subnet, member.factors,
                         float(temperature), 7, generator=generator)
    flags = ["--temperature", temperature, "--top-k", "7", "--seed", "3", "--max-new-tokens", "25"]
    got = spoken(tmp_path, "1.0:6,0.5:9,0.8", *flags)
    assert got == want and got != spoken(tmp_path, "1.0", *flags)
    assert spoken(tmp_path, "1.0:60,0.5", *flags) == spoken(tmp_path, "1.0", *flags)
    if temperature == "0":
        assert spoken(tmp_path, "1.0:6,0.5:9,0.8", *flags, "--draft", "0.4") == want


def test_a_cache_is_taken_over(tmp_path, capsys):
    """Catches a cache that is taken over without being asked, one that is read again all
    the same, the last token lost, and a cache without some of the layers: against a cache
    that is filled by hand."""
    make_supernet(tmp_path, LONG, seed=1)
    family = open_family(tmp_path)
    flags = ["--temperature", "0", "--max-new-tokens", "25"]
    whole, slim = family.member(1.0), family.member(0.5)
    text = [3, 1, 4, 1, 5, *spoken(tmp_path, "1.0", "--temperature", "0", "--max-new-tokens", "8")]
    cache = KVCache(60)
    with torch.no_grad():
        whole.model(torch.tensor([text[:-1]]), cache=cache)
        assert holds(cache, slim)
        while len(text) < 30:
            logits, _ = slim.model(torch.tensor([text[-1:]]), subnet=slim.subnet, factors=slim.factors,
                                   cache=cache)
            text.append(logits[0, -1].argmax().item())
    assert spoken(tmp_path, "1.0:8,0.5", *flags, "--take-over") == text[5:]
    assert spoken(tmp_path, "1.0:8,0.5", *flags) != text[5:]
    assert capsys.readouterr().err.count("reads the text again") == 0
    assert len(slim.subnet.layers) < len(whole.subnet.layers)
    assert spoken(tmp_path, "0.5:8,1.0", *flags, "--take-over") == spoken(tmp_path, "0.5:8,1.0", *flags)
    assert capsys.readouterr().err.count("reads the text again") == 1


def test_what_a_cache_holds():
    """Catches KV heads of a slice of an MHA Llama, which has fewer, taken for those of the whole."""
    for config in (GQA, MHA):
        model = random_llama(config)
        for name, subnet in subnets(config).items():
            cache = KVCache(4)
            assert not holds(cache, Member(model, subnet))
            with torch.no_grad():
                model(torch.tensor([[1, 2]]), cache=cache)
            fewer = config is MHA and name in ("heads", "all", "per layer")
            assert holds(cache, Member(model, subnet)) != fewer
    assert not holds(cache, Member(lambda *args: None, None))


# -----------------------------------------------------------------------------
# the long one


def test_greedy_text_is_the_targets():
    """Catches what only a long text shows of greedy drafting: 200 tokens on 20 prompts of
    several lengths, K 1 to 6."""
    members = members_of(LONG)
    prompts = prompts_for(LONG, 20)
    want = plain(members["full"], prompts, 200, temperature=0)
    assert min(len(set(text)) for text in want) > 5, "it only repeats itself: a test of little"
    accepted = {}
    for k, name in enumerate(("another model", "all", "depth", "neurons", "nearly full", "full"), 1):
        tally = Tally(0.4)
        assert written(
            members["full"], members[name], prompts, 200, k, tally, temperature=0) == want, (name, k)
        assert tally.tokens == 20 * 200
        accepted[name] = tally.acceptance()
    assert accepted["full"] == 1 and 0.3 < accepted["nearly full"] < 0.9 and accepted["another model"] < 0.1
