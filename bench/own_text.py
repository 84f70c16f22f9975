"""
Text that a Llama wrote: what it can be trained on when there is no other (LLM-QAT: Liu et al. 2023).

    python -m bench.own_text --model out/smollm2 --tokens 240000 --out own.jsonl
    python data/prepare.py --input own.jsonl --tokenizer out/smollm2/tokenizer.model --out data/own

Every document begins at BOS and is drawn token by token at temperature 1 from the whole vocabulary,
up to --length tokens or to the end that the model puts. A line of the file is a document.
"""
import argparse
import json
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from model import LAST, KVCache, Llama
from plumbing.checkpoint import TOKENIZER, load_llama
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.files import atomic_write
from plumbing.parallel import bar, default_device, device_of
from plumbing.params import max_positions
from sample import probabilities


@torch.no_grad()
def write_texts(model: Llama, bos: int, n: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """n texts at once, (n, length) token ids, each drawn from the model after BOS. They go on behind an end."""
    cache = KVCache(length)
    tokens = torch.full((n, 1), bos, device=generator.device)
    columns = []
    for _ in range(length):
        logits, _ = model(tokens, cache=cache, at=LAST)                     # n, vocab
        p = probabilities(logits, temperature=1, top_k=0)
        tokens = torch.multinomial(p, 1, generator=generator)               # n, 1
        columns.append(tokens)
    return torch.cat(columns, 1)


def up_to_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids before the first that ends a document."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[:place]
    return ids


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python -m bench.own_text", __doc__)
    p.add_argument("--model", default="out/base", help="a plain Llama folder with its tokenizer")
    p.add_argument("--tokens", type=int, default=240_000, help="of all documents, at least")
    p.add_argument("--length", type=int, default=256, help="tokens of a document, at most")
    p.add_argument("--batch", type=int, default=64, help="documents at once")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="own.jsonl")
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    args = p.parse_args(argv)
    check_at_least_one(args, "tokens", "length", "batch")
    return args


def main(argv=None) -> None:
    """Writes the file and says what is in it."""
    args = parse_args(argv)
    device = device_of(args.device)
    model = load_llama(args.model, device)
    longest = max_positions(model.config)
    if args.length > longest:
        fail(f"--length {args.length} is longer than the window of {args.model}, {longest}; expected at most that")
    tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, model.config.vocab_size)
    settings = tokenizer.settings
    bos = tokenizer.encode_single_token(settings.bos)
    ends = {tokenizer.encode_single_token(name) for name in (settings.bos, *settings.eos)}
    generator = torch.Generator(device=device).manual_seed(args.seed)

    documents = []
    written = 0
    with bar(name="tokens", total=args.tokens) as progress:
        while written < args.tokens:
            before = written
            for row in write_texts(model, bos, args.batch, args.length, generator).tolist():
                ids = up_to_end(row, ends)
                documents.append(tokenizer.decode(ids))
                written += len(ids)
                progress.update(len(ids))
            if written == before:
                fail(f"{args.model} ends each of {args.batch} texts before its first token; expected a Llama that "
                     "writes; choose another --model")
    with atomic_write(args.out) as file:
        for text in documents:
            file.write((json.dumps(dict(text=text)) + "\n").encode())
    print(f"{args.out}: {len(documents):,} documents, {written:,} tokens")


if __name__ == "__main__":
    run_main(main, "nothing was written")
