"""
Text from any Llama folder, at any budget of a supernet: one checkpoint, a family of speeds.

    python sample.py                                       the full model of out/flex
    python sample.py --budget 0.5 --prompt "def main("     the same file, half the parameters
    python sample.py --model out/flex-0.50                 the export of that slice: the same text
    python sample.py --model out/flex --latency 0.6        by measured time
"""
import argparse
import codecs
import sys
import time
from pathlib import Path
from typing import Iterator

import torch

from data.tokenizer import encode_document, load_tokenizer
from model import LAST, KVCache
from plumbing.checkpoint import TOKENIZER
from plumbing.errors import Parser, fail, note, run_main
from plumbing.family import open_family
from plumbing.parallel import default_device, device_of
from plumbing.params import max_positions


@torch.no_grad()
def generate(model, prompt: list[int], n: int, subnet=None, factors=None, temperature: float = 0.8,
             top_k: int = 0, seed: int = 0, window: int | None = None) -> Iterator[int]:
    """Yields n token ids after `prompt`. temperature 0: the likeliest token always. top_k 0: all
    tokens may come. window: the oldest tokens are forgotten, so that never more are read at once.

    The prompt goes through the model once. After it every step feeds one token, the rest is in the
    KV cache."""
    device = model.tok_embeddings.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    if factors is not None:
        factors = factors.to(device)
    longest = min(window or len(prompt) + n, len(prompt) + n)
    cache = KVCache(longest)
    read = list(prompt)  # all tokens so far
    tokens = read        # those that the cache has not seen
    for _ in range(n):
        # The window is full: its later half is read again, from position 0 on.
        if cache.length + len(tokens) > longest:
            tokens = read[-max(1, longest // 2):]
            cache = KVCache(longest)
        x = torch.tensor([tokens], device=device)  # 1, T
        logits, _ = model(x, subnet=subnet, factors=factors, cache=cache, at=LAST)
        token = pick(logits[0], temperature, top_k, generator).item()
        tokens = [token]
        read.append(token)
        yield token


def pick(logits: torch.Tensor, temperature: float, top_k: int, generator) -> torch.Tensor:
    """One token id () from logits (vocab,)."""
    if temperature == 0:
        return logits.argmax()
    if top_k:
        least = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = ((logits - logits.max()) / temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[0]


def stream(tokens: Iterator[int], tokenizer, ends: tuple[int, ...]) -> int:
    """Prints tokens as text until one of `ends` comes; returns how many came.

    A token may end inside a UTF-8 character: it is printed when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    n = 0
    for token in tokens:
        n += 1
        if token in ends:
            break
        print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return n


def fit(prompt: list[int], n: int, window: int, beyond: bool) -> tuple[list[int], int]:
    """(prompt, how many new tokens) of which a window holds all; with `beyond`, as many new ones as
    asked. Says on stderr if the start of the prompt had to go."""
    if len(prompt) >= window:
        kept = max(1, window // 2)
        note(f"the prompt's {len(prompt):,} tokens do not fit into the window of {window:,}: its "
             f"last {kept:,} are read")
        prompt = prompt[-kept:]
    if not beyond:
        n = min(n, window - len(prompt))
    return prompt, n


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python sample.py", __doc__)
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budget", type=float, default=1.0,
                     help="fraction of the full model's non-embedding parameters")
    ask.add_argument("--latency", type=float,
                     help="instead: fraction of the full model's time on this machine")
    p.add_argument("--prompt", default="def", help="text to go on from")
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest; 0: all")
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--beyond", action="store_true", help="go on behind the window that the model "
                   "was trained on, by forgetting the oldest tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    args = p.parse_args(argv)
    if not 0 <= args.temperature < float("inf") or args.top_k < 0 or args.max_new_tokens < 1:
        fail(f"--temperature {args.temperature:g} --top-k {args.top_k} --max-new-tokens "
             f"{args.max_new_tokens}: expected 0 or more, 0 or more, and 1 or more")
    return args


def main(argv=None) -> None:
    """Streams text to stdout, tokens/s to stderr."""
    args = parse_args(argv)
    family = open_family(args.model, device_of(args.device))
    if args.latency is None:
        member = family.member(args.budget)
    else:
        member = family.member(args.latency, unit="latency")
    tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, family.model.config.vocab_size)
    settings = tokenizer.settings
    window = max_positions(family.model.config)
    prompt = encode_document(tokenizer, args.prompt).tolist()
    prompt, n_new = fit(prompt, args.max_new_tokens, window, args.beyond)

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that lacks a character
    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    tokens = generate(member.model, prompt, n_new, member.subnet, member.factors,
                      args.temperature, args.top_k, args.seed, window)
    # A document ends with the BOS of the next one in our data, with a token of its own in Meta's.
    ends = {tokenizer.encode_single_token(name) for name in (settings.bos, *settings.eos)}
    n = stream(tokens, tokenizer, ends)
    print(f"{n} tokens, {n / (time.perf_counter() - start):.1f} tok/s", file=sys.stderr)
    if n == n_new < args.max_new_tokens:
        note(f"stopped where the window of {window:,} tokens ends; --beyond goes on")


if __name__ == "__main__":
    run_main(main, "nothing was written")
