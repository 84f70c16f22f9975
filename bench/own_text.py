"""
Text that a Llama wrote: what it can be trained on when there is no other (LLM-QAT: Liu et al. 2023).

    python -m bench.own_text --model out/smollm2 --tokens 240000 --out data/own

Every document begins at BOS and is drawn token by token at temperature 1 from the whole vocabulary,
up to --length tokens or to the end that the model puts. The documents become token shards, like those
that data/prepare.py makes of text. The tokenizer only says which tokens begin and end a document.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from data.prepare import DATA_FILES, SHARD_TOKENS, VAL_FRACTION, write_split
from data.tokenizer import TOKENIZER, copy_tokenizer, load_tokenizer
from model import LAST, KVCache, Llama
from plumbing.checkpoint import load_llama
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.files import new_folder
from plumbing.parallel import bar, default_device, device_of
from plumbing.params import max_positions
from sample import probabilities


@torch.no_grad()
def write_texts(model: Llama, bos: int, n: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """n texts at once, (n, length) token ids, each drawn from the model after BOS. They go on
    behind an end."""
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


def begin_and_end(args: argparse.Namespace, vocab_size: int) -> tuple[int, set[int]]:
    """(the token before a document, those that end one): of the model's tokenizer, or --bos for both."""
    if args.bos is not None:
        if not 0 <= args.bos < vocab_size:
            fail(f"--bos {args.bos} found; expected an id below the vocabulary of {vocab_size}")
        return args.bos, {args.bos}
    path = Path(args.model) / TOKENIZER
    if not path.is_file():
        fail(f"{path} does not exist; expected it, or the id before every document; give --bos")
    tokenizer = load_tokenizer(path, vocab_size)
    settings = tokenizer.settings
    ends = {tokenizer.encode_single_token(name) for name in (settings.bos, *settings.eos)}
    return tokenizer.encode_single_token(settings.bos), ends


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python -m bench.own_text", __doc__)
    p.add_argument("--model", default="out/base", help="a plain Llama folder")
    p.add_argument("--tokens", type=int, default=240_000, help="of all documents, at least")
    p.add_argument("--length", type=int,
                   help="tokens of a document behind its BOS, at most (default: 256, or a smaller window)")
    p.add_argument("--batch", type=int, default=64, help="documents at once")
    p.add_argument("--bos", type=int, help="id that begins and ends documents (default: the tokenizer's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("data/own"), help="folder of shards")
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    args = p.parse_args(argv)
    check_at_least_one(args, "tokens", "length", "batch")
    return args


def write_documents(model: Llama, args: argparse.Namespace, bos: int, ends: set[int]) -> list[np.ndarray]:
    """The token ids of documents, BOS first, of at least args.tokens tokens in all."""
    generator = torch.Generator(device=args.device).manual_seed(args.seed)
    documents = []
    written = 0
    with bar(name="tokens", total=args.tokens) as progress:
        while written < args.tokens:
            before = written
            for row in write_texts(model, bos, args.batch, args.length, generator).tolist():
                ids = up_to_end(row, ends)
                if ids:
                    documents.append(np.array([bos, *ids]))
                    written += 1 + len(ids)
                    progress.update(1 + len(ids))
            if written == before:
                fail(f"{args.model} ends each of {args.batch} texts before its first token; "
                     "expected a Llama that writes; choose another --model")
    return documents


def main(argv=None) -> None:
    """Writes the folder and says what is in it."""
    args = parse_args(argv)
    model = load_llama(args.model, device_of(args.device))
    vocab_size = model.config.vocab_size
    longest = max_positions(model.config)
    if args.length is None:
        args.length = min(256, longest)
    if args.length > longest:
        fail(f"--length {args.length} is longer than the window of {args.model}, {longest}; "
             "expected at most that")
    bos, ends = begin_and_end(args, vocab_size)

    with new_folder(args.out, DATA_FILES) as new:  # a folder of something else is refused before the work
        documents = write_documents(model, args, bos, ends)
        if (Path(args.model) / TOKENIZER).is_file():
            copy_tokenizer(Path(args.model) / TOKENIZER, new)
        if len(documents) < 2:
            fail(f"one document came to {args.tokens:,} tokens; expected two, one of them to validate on; "
                 "ask for more --tokens, or a smaller --length")
        n_val = max(1, round(VAL_FRACTION * len(documents)))
        n_val_tokens = write_split(new / "val", documents[:n_val], vocab_size, SHARD_TOKENS)
        n_train_tokens = write_split(new / "train", documents[n_val:], vocab_size, SHARD_TOKENS)
    print(f"{args.out}: {len(documents):,} documents, {n_train_tokens:,} train, {n_val_tokens:,} val tokens")


if __name__ == "__main__":
    run_main(main, "nothing was written")
