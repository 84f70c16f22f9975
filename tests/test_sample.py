"""sample.py: the cache changes nothing, the seed decides, and bytes become whole characters."""
import dataclasses

import pytest
import torch

import sample
from plumbing.checkpoint import load_llama, save_llama
from sample import generate, pick, probabilities
from tests.helpers import (
    GQA,
    MHA,
    SHAPES,
    deployed,
    export_at,
    make_supernet,
    one_line_error,
    random_llama,
    subnets,
)
from data.tokenizer import BOS, load_tokenizer

PROMPT = [3, 1, 4, 1, 5]


def text_of(capsys, *argv) -> str:
    """What sample.py prints on stdout; its speed goes to stderr."""
    capsys.readouterr()
    sample.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert "tok/s" in err and "tok/s" not in out
    return out


@pytest.mark.parametrize("shape", ["gqa", "mha", "scaled rope"])
@pytest.mark.parametrize("name", ["full", "all", "per layer"])
def test_greedy_with_cache_equals_recomputation(shape, name):
    """Catches a cache at the wrong positions, one that is shared between layers, and factors lost after the
    prompt."""
    # the text is longer than the context: RoPE's table grows
    config = dataclasses.replace(SHAPES[shape], context=8)
    model, subnet = random_llama(config), subnets(config)[name]
    factors = 1 + 0.3 * torch.randn(config.n_layers, 2, generator=torch.Generator().manual_seed(1))
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(20):
            tokens.append(
                model(torch.tensor([tokens]), subnet=subnet, factors=factors)[0][0, -1].argmax().item())
    assert list(generate(model, PROMPT, 20, subnet, factors, temperature=0)) == tokens[len(PROMPT):]
    assert len(set(tokens)) > 5, "it only repeats itself: a test of little"


def test_beyond_the_window_the_oldest_tokens_are_forgotten():
    """Catches positions that run past the window, a token that is lost or read twice where it moves
    on, and a seed that starts again: recomputed from the tokens that a window of 12 holds."""
    model = random_llama(GQA)
    tokens, start = list(PROMPT), 0
    with torch.no_grad():
        for _ in range(40):
            if len(tokens) - start > 12:
                start = len(tokens) - 6
            tokens.append(model(torch.tensor([tokens[start:]]))[0][0, -1].argmax().item())
    assert list(generate(model, PROMPT, 40, temperature=0, window=12)) == tokens[len(PROMPT):]
    assert (list(generate(model, PROMPT, 7, temperature=0, window=12))
            == list(generate(model, PROMPT, 7, temperature=0)))


def test_the_window_ends_the_text(tmp_path, capsys):
    """Catches text from positions that no training has seen, a stop without a word, a prompt that
    is cut without one, and --beyond that stops. The window is 32 tokens, BOS included."""
    make_supernet(tmp_path, dataclasses.replace(GQA, context=32))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    prompt = "the cat sat on the mat"
    n = 1 + len(tokenizer.encode(prompt))

    def said(*more) -> tuple[int, str]:
        capsys.readouterr()
        sample.main(["--model", str(tmp_path), "--prompt", prompt, "--temperature", "0",
                     "--device", "cpu", *more])
        err = capsys.readouterr().err
        return int(err.split()[err.split().index("tokens,") - 1]), err

    found, err = said()
    assert found == 32 - n and "the window of 32 tokens ends; --beyond" in err
    found, err = said("--max-new-tokens", str(32 - n))
    assert found == 32 - n and "note" not in err
    found, err = said("--max-new-tokens", "90", "--beyond")
    assert found == 90 and "note" not in err
    prompt = "the cat " * 40
    found, err = said("--max-new-tokens", "5")
    assert found == 5 and "its last 16 are read" in err
    # Scaled RoPE reads far beyond the window of the first training.
    make_supernet(tmp_path, dataclasses.replace(GQA, context=32, rope_factor=8.0))
    found, err = said("--max-new-tokens", "5")
    assert found == 5 and "note" not in err


def test_sampling_follows_the_softmax():
    """Catches a temperature that multiplies, a top-k that keeps k + 1 or samples outside it."""
    model = random_llama(GQA)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]))[0][0, -1]
    for temperature, top_k in [(1.0, 0), (2.0, 0), (0.5, 4), (1.0, 1000)]:
        draws = [pick(logits, temperature, top_k, torch.Generator().manual_seed(seed)).item()
                 for seed in range(250)]
        said = [next(generate(model, PROMPT, 1, None, None, temperature, top_k, seed)) for seed in range(5)]
        assert said == draws[:5] and len(set(said)) > 1
        kept = logits.sort(descending=True).indices[:top_k] if top_k else torch.arange(len(logits))
        p = torch.zeros(len(logits)).index_copy(0, kept, (logits[kept] / temperature).softmax(0))
        counts = torch.tensor(draws).bincount(minlength=len(logits))
        assert counts[p == 0].sum() == 0
        assert ((counts / 250 - p).abs() < 4.5 * (p * (1 - p) / 250).sqrt() + 4e-3).all(), (
            temperature, top_k)
    best = logits.argmax().item()
    for cold in (0, 1e-46, 1e-9, 1e-5):  # 1e-46 is 0 in fp32, and 0 / 0 no number
        assert probabilities(logits, cold, 0)[best] == 1
    one = {next(generate(model, PROMPT, 1, None, None, 1.0, 1, seed)) for seed in range(5)}
    assert one == {logits.argmax().item()}


def test_the_seed_decides(tmp_path, capsys):
    """Catches draws from the global stream: the same command must give the same text, another
    seed another."""
    make_supernet(tmp_path, GQA)
    draw = lambda seed: text_of(capsys, "--model", tmp_path, "--max-new-tokens", 20, "--temperature", 1,
                                "--seed", seed, "--device", "cpu")
    torch.manual_seed(1)
    first = draw(5)
    torch.rand(3)
    assert draw(5) == first and len({draw(6), draw(7), first}) == 3


def test_export_and_supernet_say_the_same(tmp_path, capsys):
    """Catches a budget that sample.py ignores, or modulation that only one of the two has."""
    model, router = make_supernet(tmp_path / "flex", MHA)
    said = set()
    for budget in (1.0, 0.8, 0.5):
        slim, *_ = export_at(tmp_path / "flex", budget)
        ids = list(generate(model, PROMPT, 24, *deployed(router, budget), temperature=0))
        assert ids == list(generate(load_llama(slim), PROMPT, 24, temperature=0))
        common = ["--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 16, "--device", "cpu"]
        flex = text_of(capsys, "--model", tmp_path / "flex", "--budget", budget, *common)
        assert flex == text_of(capsys, "--model", slim, *common)
        said.add(flex)
    assert len(said) == 3


def test_main_prints_the_prompt_and_what_follows(tmp_path, capsys):
    """Catches a prompt without BOS, printed twice or not at all, and special tokens of a prompt
    taken as such."""
    model, router = make_supernet(tmp_path, dataclasses.replace(GQA, context=64))
    tokenizer, prompt = load_tokenizer(tmp_path / "tokenizer.model"), "the dog <|begin_of_text|> né"
    bos = tokenizer.encode_single_token(BOS)
    ids = list(generate(model, [bos, *tokenizer.encode(prompt, disallowed_special=())], 12,
                        *deployed(router, 0.6), temperature=1.0, top_k=7, seed=3))
    ids = ids[:ids.index(bos)] if bos in ids else ids
    got = text_of(capsys, "--model", tmp_path, "--budget", 0.6, "--prompt", prompt, "--max-new-tokens", 12,
                  "--seed", 3, "--temperature", 1, "--top-k", 7, "--device", "cpu")
    assert got == prompt + tokenizer.decode(ids) + "\n"
    assert text_of(capsys, "--model", tmp_path, "--prompt", "", "--max-new-tokens", 1, "--device", "cpu")


def test_characters_come_out_whole(tmp_path, capsys, monkeypatch):
    """Catches tokens decoded one at a time: the bytes of é, 日 and 🐈 are tokens of their own here.
    And text after the begin-of-text token, which opens another document."""
    make_supernet(tmp_path, GQA)
    tokenizer, text = load_tokenizer(tmp_path / "tokenizer.model"), "né 日本 🐈‍⬛ ok"
    ids = tokenizer.encode(text)
    assert sum(len(tokenizer.decode_single_token_bytes(i)) < 2 for i in ids) > 15
    bos = tokenizer.encode_single_token(BOS)
    say = lambda ids: (monkeypatch.setattr(sample, "generate", lambda *a, **k: iter(ids)),
                       text_of(capsys, "--model", tmp_path, "--prompt", ">", "--device", "cpu"))[1]
    assert say(ids) == f">{text}\n"
    assert say(ids + [bos] + ids) == f">{text}\n"
    assert say(tokenizer.encode("ok 日")[:-1]) == ">ok \ufffd\n", (
        "cut inside a character: shown as such, no traceback")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A supernet and three plain Llamas: a good one, one without tokenizer, one with fewer tokens than its
    tokenizer."""
    path = tmp_path_factory.mktemp("models")
    model, _ = make_supernet(path / "flex", GQA)
    save_llama(path / "plain", model.config, model.state_dict(), path / "flex" / "tokenizer.model")
    save_llama(path / "mute", model.config, model.state_dict())
    save_llama(path / "small", GQA, random_llama(GQA).state_dict(), path / "flex" / "tokenizer.model")
    return path


@pytest.mark.parametrize("model,flags,word", [
    ("plain", "--budget 0.5", "plain"), ("gone", "", "gone"), ("mute", "", "tokenizer.model"),
    ("small", "", "small"), ("flex", "--budget 0.01", "0.01"), ("flex", "--budget 2", "2"),
    ("flex", "--temperature -1", "-1"), ("flex", "--max-new-tokens 0", "0"),
    ("flex", "--max-new-tokens many", "many"), ("flex", "--top-k -1", "-1")])
def test_mistakes(folders, capsys, model, flags, word):
    """Catches a traceback, or the full model's text under the name of a budget that a plain Llama
    does not have."""
    with one_line_error(capsys, word):
        sample.main(["--model", str(folders / model), "--device", "cpu", *flags.split()])
