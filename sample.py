"""
Text from any Llama folder, at any budget of a supernet: one checkpoint, a family of speeds.

    python sample.py                                       the full model of out/flex
    python sample.py --budget 0.5 --prompt "def main("     the same file, half the parameters
    python sample.py --model out/flex-0.50                 the export of that slice: the same text
    python sample.py --model out/flextron --latency 0.6    a family of flextron.py, or any supernet, by measured time
"""
import argparse
import codecs
import os
import sys
import time
from pathlib import Path
from typing import Iterator

import torch

from plumbing.checkpoint import TOKENIZER, load_llama
from flextron.deployed import open_flextron
from plumbing.family import slice_at
from model import KVCache, Llama
from plumbing.parallel import device_of
from router import load_router
from data.tokenizer import BOS, END, load_tokenizer
from plumbing.errors import fail


@torch.no_grad()
def generate(model: Llama, prompt: list[int], n: int, subnet=None, factors=None, temperature: float = 0.8,
             top_k: int = 0, seed: int = 0) -> Iterator[int]:
    """Yields n token ids after `prompt`. temperature 0: the likeliest token always. The prompt goes through the model
    once; after it every step feeds one token, the rest is in the KV cache."""
    device = model.tok_embeddings.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    cache, tokens = KVCache(len(prompt) + n), torch.tensor([prompt], device=device)
    for _ in range(n):
        logits = model(tokens, subnet=subnet, factors=factors, cache=cache)[0][0, -1]
        if temperature == 0:
            token = logits.argmax()
        else:
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
            token = torch.multinomial(((logits - logits.max()) / temperature).softmax(-1), 1, generator=generator)[0]
        tokens = token.view(1, 1)
        yield token.item()


def main(argv=None) -> None:
    """Streams text to stdout, tokens/s to stderr."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python sample.py --help lists the flags")
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budget", type=float, default=1.0, help="fraction of the full model's non-embedding parameters")
    ask.add_argument("--latency", type=float, help="instead: fraction of the full model's time on this machine")
    p.add_argument("--prompt", default="def ", help="text to go on from")
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest; 0: all")
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if not 0 <= args.temperature < float("inf") or args.top_k < 0 or args.max_new_tokens < 1:
        fail(f"--temperature {args.temperature:g} --top-k {args.top_k} --max-new-tokens {args.max_new_tokens}: "
             "expected 0 or more, 0 or more, and 1 or more")
    model = load_llama(args.model, device_of(args.device))
    router = load_router(args.model, model.config)
    asked, unit = (args.budget, "params") if args.latency is None else (args.latency, "latency")
    flextron = open_flextron(args.model, model, asked, unit)
    subnet, factors = (None, None) if flextron else slice_at(args.model, model, router, asked, unit)
    factors = None if factors is None else factors.to(args.device)
    tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, model.config.vocab_size)
    bos, end = (tokenizer.encode_single_token(token) for token in (BOS, END))
    decode = codecs.getincrementaldecoder("utf-8")("replace")
    prompt = [bos] + tokenizer.encode(args.prompt, disallowed_special=())
    print(args.prompt, end="", flush=True)
    start, n = time.perf_counter(), 0
    for token in generate(flextron or model, prompt, args.max_new_tokens, subnet, factors, args.temperature,
                          args.top_k, args.seed):
        n += 1
        if token in (bos, end):  # the document ends here: ours with the next one's BOS, Meta's with a token of its own
            break
        # A token may end inside a UTF-8 character: print it when its last byte has come.
        print(decode.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
    print(decode.decode(b"", final=True))
    print(f"{n} tokens, {n / (time.perf_counter() - start):.1f} tok/s", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):  # the reader, or the user, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
