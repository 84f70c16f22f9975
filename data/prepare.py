"""Text -> token shards: read documents, split them, train or copy a tokenizer, encode, write.

A document is a file (.txt .md .py), a line of a .jsonl (its "text") or a topic of Python's manual.
A hash of its path decides between train and val, so more text never moves one to the other side.
Fewer than 20 documents are too few for that: val is the last 5 % of the tokens then. No --input:
the running Python's standard library. The folder appears whole or not at all.

    python data/prepare.py                                          # -> data/pystdlib, CPU, 10 s
    python data/prepare.py --input book.txt notes/ --vocab-size 2048            # -> data/book
    python data/prepare.py --input web.jsonl.gz --tokenizer llama3/tokenizer.model --out data/web
"""
import argparse
import gzip
import json
import os
import re
import sys
import sysconfig
import tempfile
import zlib
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Iterable, Iterator
import numpy as np
from tqdm import tqdm
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data.tokenizer as bpe
from data.shards import write_shard

KINDS = (".txt", ".md", ".py", ".jsonl")             # each may have .gz behind it
# Of the standard library: no tests, no tables made by machines, nothing of one machine's setup.
NO_PROSE = re.compile(r"\..*|tests?|idle_test|test_.*|(site|dist)-packages|__pycache__|encodings"
                      r"|config-.*|_sysconfigdata.*|sitecustomize\.py")
OURS = re.compile(r"tokenizer\.model|(train|val)_\d{6}\.bin")
SAMPLE, BLOCK = 1_500_000, 4096                      # characters that train a tokenizer, in blocks

# ------------------------------------------------------- documents
def find_files(root: Path, skip: re.Pattern) -> list[tuple[str, Path]]:
    """(relative posix path, path) of the usable files: the same order on every machine."""
    base, paths = (root.parent, [root]) if root.is_file() else (root, root.rglob("*"))
    found = [(path.relative_to(base).as_posix(), path) for path in paths if path.is_file()]
    found = sorted((key, path) for key, path in found if key.removesuffix(".gz").endswith(KINDS)
                   and not any(skip.fullmatch(part) for part in key.split("/")))
    what = "found no text" if root.exists() else "no such file or folder"
    return found or bpe.fail(f"{root}: {what}, expected --input {' '.join(KINDS)} (or .gz)")

def read_file(key: str, path: Path) -> Iterator[tuple[str, str]]:
    """(key, text) of each document in a file; UnicodeDecodeError if it is not UTF-8."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if key == "pydoc_data/topics.py":            # English, kept as the values of a dict
            from pydoc_data.topics import topics
            yield from ((f"{key}:{name}", topics[name]) for name in sorted(topics))
        elif not path.name.removesuffix(".gz").endswith(".jsonl"):
            yield key, file.read().decode("utf-8")
        else:
            for number, line in enumerate(file, 1):
                try:                                 # + "": whatever is no string raises
                    yield f"{key}:{number}", json.loads(line)["text"] + "" if line.strip() else ""
                except (ValueError, KeyError, TypeError):
                    bpe.fail(f"{path}:{number}: found {line[:40]!r}, expected JSON with a string "
                         '"text": mend or delete that line')

def documents(files: list[tuple[str, Path]], skipped: set) -> Iterator[tuple[str, str]]:
    """(key, text) of all documents that are not blank; files that are not UTF-8: `skipped`."""
    for key, path in files:
        try:
            yield from (doc for doc in read_file(key, path) if doc[1].strip())
        except UnicodeDecodeError:
            skipped.add(path)
        except (OSError, EOFError, zlib.error) as error:
            bpe.fail(f"{path}: cannot read it ({error}): copy it again, or leave it out of --input")

def is_val(key: str, fraction: float) -> bool:
    return int(blake2b(os.fsencode(key)).hexdigest()[:12], 16) < fraction * 16**12

# ------------------------------------------------------- a data folder
def write_split(stem: Path, arrays: Iterable[np.ndarray], vocab_size: int, size: int) -> int:
    """Writes {stem}_000000.bin ... of `size` tokens each; returns the number of tokens in all."""
    held, shard, total = [], 0, 0
    for ids in chain(arrays, [None]):                # None: the end, write what is left
        if ids is not None:
            held.append(ids)
            total += len(ids)
        while total >= (shard + 1) * size or (ids is None and total > shard * size):
            tokens = np.concatenate(held)
            write_shard(f"{stem}_{shard:06d}.bin", tokens[:size], vocab_size)
            held, shard = [tokens[size:]], shard + 1
    return total

def prepare(inputs=(), out=None, tokenizer=None, vocab_size=1280, val_fraction=0.05,
            shard_tokens=100_000_000) -> Path:
    """Makes a data folder: tokenizer.model, train_*.bin, val_*.bin; returns its path. The
    arguments are the flags below, None or () their defaults. A user's mistake: fail()."""
    name = Path(inputs[0]).resolve().name.split(".")[0] if inputs else "pystdlib"
    out, skipped = Path(out or f"data/{name}").absolute(), set()
    if out.exists() and not (out.is_dir() and all(OURS.fullmatch(p.name) for p in out.iterdir())):
        bpe.fail(f"{out}: found other files, expected a data folder or nothing: give another --out")
    if vocab_size < 512 or not 0 < val_fraction < 1 or not 0 < shard_tokens < 2**31:
        bpe.fail("expected --vocab-size >= 512, 0 < --val-fraction < 1, 0 < --shard-tokens < 2**31")
    files = [file for root in inputs for file in find_files(Path(root), re.compile(r"\..*"))]
    files = files or find_files(Path(sysconfig.get_path("stdlib")), NO_PROSE)
    # The first pass finds every mistake in the text before any work is done on it.
    n, chars, size = [0, 0], 0, 0                    # [train, val] documents, characters, bytes
    for key, text in tqdm(documents(files, skipped), "reading", disable=None):
        n[is_val(key, val_fraction)] += 1
        chars, size = chars + len(text), size + len(text.encode("utf-8", "replace"))
    if not size:
        bpe.fail(f"{files[0][1]} ({len(files)} files): found no text: give an --input in UTF-8")
    few = sum(n) < 20 or 0 in n                     # a lottery: the last tokens are val
    def texts(side: int) -> Iterator[str]:
        for key, text in tqdm(documents(files, skipped), total=sum(n), disable=None):
            if few or is_val(key, val_fraction) == side:
                yield text
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temp:
        (new := Path(temp, "new")).mkdir()
        if tokenizer:
            enc = bpe.load_tokenizer(tokenizer)
            (new / "tokenizer.model").write_bytes(Path(tokenizer).read_bytes())
        else:                                        # every k-th block: from all over the text
            train = ["".join(texts(0))[:int(chars * (1 - val_fraction))]] if few else texts(0)
            blocks = (text[at:at + BLOCK] for text in train for at in range(0, len(text), BLOCK))
            ranks = bpe.train_bpe(islice(blocks, 0, None, -(-chars // SAMPLE)), vocab_size)
            bpe.save_tokenizer(new / "tokenizer.model", ranks)
            enc = bpe.load_tokenizer(new / "tokenizer.model")
        sides = [(bpe.encode_document(enc, text) for text in texts(side)) for side in (0, 1)]
        if few:
            tokens = np.concatenate(list(sides[0]))
            sides = [[part] for part in np.split(tokens, [int(len(tokens) * (1 - val_fraction))])]
        train, val = (write_split(new / split, arrays, enc.n_vocab, shard_tokens)
                      for split, arrays in zip(("train", "val"), sides))
        if out.exists():
            out.rename(Path(temp, "old"))            # goes with temp
        new.rename(out)
    rule = f" (few documents: the last {val_fraction:.0%} of the tokens)" * few
    print(f"{out}: {sum(n):,} documents, {len(skipped)} skipped (not UTF-8), {train:,} train, "
          f"{val:,} val tokens{rule}, {size / (train + val - sum(n)):.2f} bytes per token")
    return out

def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Text -> token shards.")
    parser.error = lambda message: bpe.fail(f"{message}: see `python data/prepare.py --help`")
    add = parser.add_argument
    add("--input", dest="inputs", nargs="+", default=[], help="default: this Python's library")
    add("--tokenizer", metavar="tokenizer.model", help="one to copy (default: train one)")
    add("--vocab-size", type=int, default=1280, help="ids of the one trained, 256 are special")
    add("--out", metavar="DIR", help="made or replaced (default: data/NAME of the first input)")
    add("--val-fraction", type=float, default=0.05, help="share of the documents held out")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens in a shard, at most")
    args = parser.parse_args(argv)
    try:
        prepare(**vars(args))
    except OSError as error:
        bpe.fail(f"{error.filename or args.out}: {error.strerror or error}; nothing was kept")

if __name__ == "__main__":
    main()
