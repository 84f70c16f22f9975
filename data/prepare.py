"""
Text -> token shards: read documents, split them, train or copy a tokenizer, encode, write.

A document is a file (.txt .md .py), a line of a .jsonl (its "text") or a topic of Python's manual. A
hash of its path decides between train and val, so more text never moves one to the other side. Fewer
than 20 documents are too few for that: the last 5 % of the tokens are val then. Without --input the
text is the running Python's standard library. The folder appears whole or not at all.

    python data/prepare.py                                          # -> data/pystdlib, CPU, 10 s
    python data/prepare.py --input book.txt notes/ --vocab-size 2048            # -> data/book
    python data/prepare.py --input web.jsonl.gz --tokenizer llama3/tokenizer.model --out data/web
"""
import gzip
import json
import os
import re
import sys
import sysconfig
import zlib
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
from tqdm import tqdm

# For `python data/prepare.py`, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.shards import Shards, write_shard
from data.tokenizer import (SETTINGS, TOKENIZER, check_same_tokenizer, copy_tokenizer,
                            encode_document, load_tokenizer, same_tokenizer, save_tokenizer,
                            train_bpe)
from plumbing.errors import Parser, fail, run_main
from plumbing.files import new_folder, only_holds
from plumbing.parallel import rank0_first
from plumbing.params import read_config
from plumbing.tensors import refuse_another_kind

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # each may have .gz behind it
HIDDEN = re.compile(r"\..*")
# Left out of the standard library: tests, tables made by machines, the setup of one machine.
NO_PROSE = re.compile(r"\..*|tests?|idle_test|test_.*|(site|dist)-packages|__pycache__|encodings"
                      r"|config-.*|_sysconfigdata.*|sitecustomize\.py")
SIX_DIGITS = "[0-9]" * 6
DATA_FILES = {TOKENIZER, SETTINGS, f"train_{SIX_DIGITS}.bin", f"val_{SIX_DIGITS}.bin"}
SAMPLE = 1_500_000  # characters that train a tokenizer
BLOCK = 4096  # they are taken in blocks of this size
TRAIN, VAL = 0, 1  # the two sides


# -----------------------------------------------------------------------------
# documents


def find_files(root: Path, skip: re.Pattern) -> list[tuple[str, Path]]:
    """(relative posix path, path) of the usable files: the same order on every machine.

    A file is left out if `skip` matches a part of its path. No usable file: fail()."""
    if root.is_file():
        base, paths = root.parent, [root]
    else:
        base, paths = root, root.rglob("*")
    found = []
    for path in paths:
        key = path.relative_to(base).as_posix()
        usable = key.removesuffix(".gz").endswith(TEXT_SUFFIXES)
        skipped = any(skip.fullmatch(part) for part in key.split("/"))
        if usable and not skipped and path.is_file():
            found.append((key, path))
    if not found:
        what = "found no text" if root.exists() else "no such file or folder"
        fail(f"{root}: {what}, expected --input {' '.join(TEXT_SUFFIXES)} (or .gz)")
    return sorted(found)


def read_file(key: str, path: Path) -> Iterator[tuple[str, str]]:
    """(key, text) of each document in a file; UnicodeDecodeError if it is not UTF-8."""
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as file:
        if key == "pydoc_data/topics.py":  # English, kept as the values of a dict
            from pydoc_data.topics import topics
            for name in sorted(topics):
                yield f"{key}:{name}", topics[name]
        elif path.name.removesuffix(".gz").endswith(".jsonl"):
            for number, line in enumerate(file, 1):
                yield f"{key}:{number}", text_of_line(line, f"{path}:{number}")
        else:
            yield key, file.read().decode("utf-8")


def text_of_line(line: bytes, where: str) -> str:
    """The "text" of a line of JSON; "" of a blank line. Anything else: fail()."""
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        fail(f"{where}: found {line[:40]!r}, expected JSON with a string "
             '"text": mend or delete that line')
    return text


def documents(files: list[tuple[str, Path]], skipped: set) -> Iterator[tuple[str, str]]:
    """(key, text) of all documents that are not blank. Files that are not UTF-8 go to `skipped`."""
    for key, path in files:
        try:
            for document_key, text in read_file(key, path):
                if text.strip():
                    yield document_key, text
        except UnicodeDecodeError:
            skipped.add(path)
        except (OSError, EOFError, zlib.error) as error:
            fail(f"{path}: cannot read it ({error}): copy it again, or leave it out of --input")


def is_val(key: str, fraction: float) -> bool:
    """Is the document held out? About this fraction of all is."""
    digest = blake2b(os.fsencode(key)).hexdigest()
    return int(digest[:12], 16) < fraction * 16**12


def blocks_of(texts: Iterable[str]) -> Iterator[str]:
    """All texts, cut into blocks of BLOCK characters."""
    for text in texts:
        for at in range(0, len(text), BLOCK):
            yield text[at:at + BLOCK]


class Corpus:
    """The documents of some files, each of them on one side, TRAIN or VAL.

    The first pass, here, finds every mistake in the text before any work is done on it."""

    def __init__(self, files: list[tuple[str, Path]], val_fraction: float):
        self.files = files
        self.val_fraction = val_fraction
        self.skipped = set()  # files that are not UTF-8
        self.n_documents = 0
        self.n_chars = 0
        self.n_bytes = 0
        sides = set()
        for key, text in tqdm(documents(files, self.skipped), "reading", disable=None):
            self.n_documents += 1
            self.n_chars += len(text)
            self.n_bytes += len(text.encode("utf-8", "replace"))
            sides.add(self.side(key))
        if self.n_documents == 0:
            fail(f"{files[0][1]} ({len(files)} files): found no text: give an --input in UTF-8")
        # Few documents: to draw among them would be a lottery. The last tokens are val instead.
        self.few = self.n_documents < 20 or len(sides) < 2

    def side(self, key: str) -> int:
        """The side that a document is drawn to."""
        return VAL if is_val(key, self.val_fraction) else TRAIN

    def before_val(self, n: int) -> int:
        """Where val begins in n characters or tokens, if there are few documents."""
        return int(n * (1 - self.val_fraction))

    def texts(self, side: int) -> Iterator[str]:
        """The documents of a side; all of them if there are few."""
        every = documents(self.files, self.skipped)
        for key, text in tqdm(every, total=self.n_documents, disable=None):
            if self.few or self.side(key) == side:
                yield text

    def train_blocks(self) -> Iterator[str]:
        """Train's text in blocks, every k-th, from all over it: about SAMPLE characters."""
        texts = self.texts(TRAIN)
        if self.few:
            whole = "".join(texts)
            texts = [whole[:self.before_val(self.n_chars)]]
        k = -(-self.n_chars // SAMPLE)  # rounded up
        return islice(blocks_of(texts), 0, None, k)

    def tokens(self, enc) -> tuple[Iterable[np.ndarray], Iterable[np.ndarray]]:
        """The tokens of train and of val, as arrays one behind the other."""
        train = (encode_document(enc, text) for text in self.texts(TRAIN))
        if self.few:
            tokens = np.concatenate(list(train))
            cut = self.before_val(len(tokens))
            return [tokens[:cut]], [tokens[cut:]]
        val = (encode_document(enc, text) for text in self.texts(VAL))
        return train, val


# -----------------------------------------------------------------------------
# a data folder


def write_split(stem: Path, arrays: Iterable[np.ndarray], vocab_size: int, size: int) -> int:
    """Writes {stem}_000000.bin ... of `size` tokens each, the last one of what is left.

    Returns the number of tokens in all."""
    waiting = []  # arrays that fill no shard yet
    n_waiting = 0
    total = 0
    shard = 0
    for ids in arrays:
        waiting.append(ids)
        n_waiting += len(ids)
        total += len(ids)
        while n_waiting >= size:
            tokens = np.concatenate(waiting)
            write_shard(f"{stem}_{shard:06d}.bin", tokens[:size], vocab_size)
            waiting = [tokens[size:]]
            n_waiting -= size
            shard += 1
    if n_waiting > 0:
        tokens = np.concatenate(waiting)
        write_shard(f"{stem}_{shard:06d}.bin", tokens, vocab_size)
    return total


def prepare(inputs=(), out=None, tokenizer=None, vocab_size: int = 1280,
            val_fraction: float = 0.05, shard_tokens: int = 100_000_000) -> Path:
    """Makes a data folder: tokenizer.model, train_*.bin, val_*.bin; returns its path.

    The arguments are the flags below, None or () their defaults. A user's mistake: fail()."""
    if out is None:
        name = Path(inputs[0]).resolve().name.split(".")[0] if inputs else "pystdlib"
        out = f"data/{name}"
    out = Path(out).absolute()
    if out.exists() and not only_holds(out, DATA_FILES):  # said before the work, not after it
        fail(f"{out}: found other files, expected a data folder or nothing: give another --out")
    if vocab_size < 512 or not 0 < val_fraction < 1 or not 0 < shard_tokens < 2**31:
        fail("expected --vocab-size >= 512, 0 < --val-fraction < 1, 0 < --shard-tokens < 2**31")

    if tokenizer:
        refuse_another_kind(tokenizer)  # a Hugging Face folder, its tokenizer.json, a GGUF file

    files = []
    for root in inputs:
        files += find_files(Path(root), HIDDEN)
    if not inputs:
        files = find_files(Path(sysconfig.get_path("stdlib")), NO_PROSE)
    corpus = Corpus(files, val_fraction)

    with new_folder(out, DATA_FILES) as new:
        if tokenizer:
            enc = load_tokenizer(tokenizer)
            copy_tokenizer(tokenizer, new)
        else:
            ranks = train_bpe(corpus.train_blocks(), vocab_size)
            save_tokenizer(new / TOKENIZER, ranks)
            enc = load_tokenizer(new / TOKENIZER)
        train, val = corpus.tokens(enc)
        n_train = write_split(new / "train", train, enc.n_vocab, shard_tokens)
        n_val = write_split(new / "val", val, enc.n_vocab, shard_tokens)

    n_documents = corpus.n_documents
    rule = f" (few documents: the last {val_fraction:.0%} of the tokens)" if corpus.few else ""
    bytes_per_token = corpus.n_bytes / (n_train + n_val - n_documents)  # without the BOS of each
    print(f"{out}: {n_documents:,} documents, {len(corpus.skipped)} skipped (not UTF-8), "
          f"{n_train:,} train, {n_val:,} val tokens{rule}, {bytes_per_token:.2f} bytes per token")
    return out


# -----------------------------------------------------------------------------
# the data of a training run


def open_data(args) -> tuple[str, Shards, Shards]:
    """(folder, train, val) of a run; args: llama, data, seq_len, seed.

    Without --data the text is the Python standard library. Its tokenizer is the Llama's own; without
    a Llama it is one trained on that text. Data of another tokenizer than the Llama's: fail()."""
    if args.data is None:
        folder = stdlib_folder(args.llama)
        own = tokenizer_of(args.llama)

        def make_once():
            if not Path(folder).exists():
                prepare((), folder, tokenizer=own)

        rank0_first(make_once)  # all ranks ask: one that looked later than rank 0 would not wait
    else:
        folder = args.data
    if args.llama:
        check_same_tokenizer(args.llama, folder)
        vocab_size = read_config(args.llama).vocab_size
    else:
        vocab_size = load_tokenizer(Path(folder) / TOKENIZER).n_vocab
    if tokenizer_of(folder):
        load_tokenizer(Path(folder) / TOKENIZER, vocab_size)  # fail() if it has another size
    train = Shards(folder, "train", args.seq_len, vocab_size, args.seed)
    val = Shards(folder, "val", args.seq_len, vocab_size, args.seed)
    return folder, train, val


def tokenizer_of(folder) -> Path | None:
    """The tokenizer.model of a folder; None if it has none, or if there is no folder."""
    if folder and (Path(folder) / TOKENIZER).is_file():
        return Path(folder) / TOKENIZER
    return None


def stdlib_folder(llama) -> str:
    """Where the standard library goes: a folder of its own for a Llama with another tokenizer."""
    folder = "data/pystdlib"
    if tokenizer_of(llama) is None:
        return folder
    if Path(folder).exists() and same_tokenizer(llama, folder):
        return folder
    return f"{folder}-{Path(llama).resolve().name}"


# -----------------------------------------------------------------------------
# the command line


def main(argv=None) -> None:
    """Text in, a data folder out."""
    parser = Parser("python data/prepare.py", __doc__)
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
        where = error.filename or args.out or "the disk"
        fail(f"{where}: {error.strerror or error}; nothing was kept")


if __name__ == "__main__":
    run_main(main)
