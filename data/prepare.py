"""
Text -> token shards: read documents, split them, train or copy a tokenizer, encode, write.

A document is a file (.txt .md .py), a line of a .jsonl (its "text") or a topic of Python's manual. A
hash of its path decides between train and val, so more text does not move one to the other side.
Equal documents are on one side. Where few or uneven documents are drawn to a share of the bytes that
is far from --val-fraction, the hash gives only the order, and val is filled until its share is right.
Fewer than 20 documents are too few for that too: the last 5 % of the tokens are val then.

Without --input the text is the running Python's standard library. What is not read is counted and
named. The folder appears whole or not at all.

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
from array import array
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
from plumbing.tensors import POINTER, refuse_another_kind

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # each may have .gz behind it
HIDDEN = re.compile(r"\..*")
# Left out of the standard library: tests, tables made by machines, the setup of one machine.
NO_PROSE = re.compile(r"\..*|tests?|idle_test|test_.*|(site|dist)-packages|__pycache__|encodings"
                      r"|config-.*|_sysconfigdata.*|sitecustomize\.py")
SIX_DIGITS = "[0-9]" * 6
DATA_FILES = {TOKENIZER, SETTINGS, f"train_{SIX_DIGITS}.bin", f"val_{SIX_DIGITS}.bin"}
EQUAL_BY_CHANCE = 64  # bytes: shorter documents are not compared
VAL_FRACTION = 0.05  # of the text
SHARD_TOKENS = 100_000_000  # in a shard, at most
SAMPLE = 1_500_000  # characters that train a tokenizer
BLOCK = 4096  # they are taken in blocks of this size
TRAIN, VAL, AGAIN = 0, 1, 2  # the two sides; and what is on one of them already


# -----------------------------------------------------------------------------
# documents


class Skipped(dict):
    """What was not read, and why: reason -> paths."""

    def add(self, reason: str, path) -> None:
        """One more."""
        self.setdefault(reason, []).append(str(path))

    def __str__(self) -> str:
        """2 not UTF-8 (a.txt, b.txt), 5 links to folders (x, y, z ...)"""
        reasons = []
        for reason, paths in self.items():
            more = " ..." if len(paths) > 3 else ""
            reasons.append(f"{len(paths)} {reason} ({', '.join(paths[:3])}{more})")
        return ", ".join(reasons) or "none"


def find_files(root: Path, skip: re.Pattern, skipped: Skipped) -> list[tuple[str, Path]]:
    """(relative posix path, path) of the usable files: the same order on every machine.

    A file is left out if `skip` matches a part of its path. No usable file: fail()."""
    if root.is_file():
        base, paths = root.parent, [root]
    else:
        base, paths = root, files_under(root, skip, skipped)
    found = []
    for path in paths:
        key = path.relative_to(base).as_posix()
        usable = key.removesuffix(".gz").endswith(TEXT_SUFFIXES)
        if not usable or any(skip.fullmatch(part) for part in key.split("/")):
            continue
        if path.is_file():
            found.append((key, path))
        else:
            skipped.add("links to nothing or pipes", path)
    if not found:
        what = "found no text" if root.exists() else "no such file or folder"
        without = f" (skipped: {skipped})" if skipped else ""
        fail(f"{root}: {what}{without}, expected --input {' '.join(TEXT_SUFFIXES)} (or .gz)")
    return sorted(found)


def files_under(root: Path, skip: re.Pattern, skipped: Skipped) -> Iterator[Path]:
    """All files below a folder, but for folders that `skip` matches. Links to folders are not
    followed: they may lead in a circle, or to the same text again."""
    def unreadable(error: OSError) -> None:
        skipped.add("unreadable folders", error.filename)

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not skip.fullmatch(name)]
        for name in folders:
            if Path(folder, name).is_symlink():
                skipped.add("links to folders", Path(folder, name))
        for name in names:
            yield Path(folder, name)


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
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        fail(f"{where}: found {line[:40]!r}, expected JSON with a string "
             '"text": mend or delete that line')
    return text


def documents(files: list[tuple[str, Path]], skipped: Skipped) -> Iterator[tuple[str, str]]:
    """(key, text) of all documents that are not blank. Files that are not UTF-8 go to `skipped`."""
    for key, path in files:
        try:
            for document_key, text in read_file(key, path):
                if text.startswith(POINTER.decode()):
                    skipped.add("pointers of Git LFS", path)
                elif text.strip():
                    yield document_key, text
        except UnicodeDecodeError:
            skipped.add("not UTF-8", path)
        except (OSError, EOFError, zlib.error) as error:
            fail(f"{path}: cannot read it ({error}): copy it again, or leave it out of --input")


def hash_of(data: bytes) -> int:
    """48 bits."""
    return int(blake2b(data).hexdigest()[:12], 16)


def held_out(hashes: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are val's, a bool each. hashes: 48 bits each; sizes: in bytes.

    About this fraction of all hashes is drawn. If that is less than half of the fraction in bytes,
    or more than twice, val is filled in the order of the hashes instead."""
    wanted = fraction * sizes.sum()
    drawn = hashes < fraction * 2**48
    if wanted / 2 <= sizes[drawn].sum() <= 2 * wanted:
        return drawn
    drawn[:] = False
    filled = 0
    for i in np.argsort(hashes, kind="stable"):
        if filled + sizes[i] <= wanted:
            drawn[i] = True
            filled += sizes[i]
        elif filled >= wanted / 2:  # near enough; else a smaller document may fit
            break
    return drawn


def blocks_of(texts: Iterable[str]) -> Iterator[str]:
    """All texts, cut into blocks of BLOCK characters."""
    for text in texts:
        for at in range(0, len(text), BLOCK):
            yield text[at:at + BLOCK]


class Corpus:
    """The documents of some files, each of them on one side, TRAIN or VAL.

    The first pass, here, finds every mistake in the text before any work is done on it."""

    def __init__(self, files: list[tuple[str, Path]], val_fraction: float, skipped: Skipped):
        self.files = files
        self.val_fraction = val_fraction
        self.n_chars = 0
        keys = array("Q")      # the hash of each document's path
        contents = array("Q")  # the hash of its text
        sizes = array("Q")     # its bytes
        for key, text in tqdm(documents(files, skipped), "reading", disable=None):
            data = text.encode("utf-8", "replace")
            long = len(data) > EQUAL_BY_CHANCE
            self.n_chars += len(text)
            keys.append(hash_of(os.fsencode(key)))
            contents.append(hash_of(data) if long else len(keys))  # a number of its own
            sizes.append(len(data))
        if not keys:
            without = f" (skipped: {skipped})" if skipped else ""
            fail(f"{files[0][1]} ({len(files)} files): found no text{without}: give an --input in UTF-8")
        self.decide_sides(np.array(keys), np.array(contents), np.array(sizes))

    def decide_sides(self, keys: np.ndarray, contents: np.ndarray, sizes: np.ndarray) -> None:
        """Sets the side of each document. The path of the first of equal ones decides for all."""
        _, first, kinds = np.unique(contents, return_index=True, return_inverse=True)
        is_val = held_out(keys[first], np.bincount(kinds, sizes), self.val_fraction)
        self.sides = np.where(is_val[kinds], VAL, TRAIN)
        # Few documents: to draw among them would be a lottery. The last tokens are val instead, and
        # of equal documents, which could be on both sides of that border, only the first is read.
        self.few = len(first) < 20 or len(set(self.sides)) < 2
        if self.few:
            self.sides[:] = AGAIN
            self.sides[first] = TRAIN
        self.n_documents = int((self.sides != AGAIN).sum())
        self.n_bytes = int(sizes[self.sides != AGAIN].sum())

    def before_val(self, n: int) -> int:
        """Where val begins in n characters or tokens, if there are few documents."""
        return int(n * (1 - self.val_fraction))

    def texts(self, side: int, what: str) -> Iterator[str]:
        """The documents of a side; of TRAIN all if there are few. what: the name of the bar."""
        every = documents(self.files, Skipped())
        bar = tqdm(every, what, len(self.sides), disable=None)
        for (_, text), its_side in zip(bar, self.sides):
            if its_side == side:
                yield text

    def train_blocks(self) -> Iterator[str]:
        """Train's text in blocks, every k-th, from all over it: about SAMPLE characters."""
        texts = self.texts(TRAIN, "sampling")
        if self.few:
            whole = "".join(texts)
            texts = [whole[:self.before_val(len(whole))]]
        k = -(-self.n_chars // SAMPLE)  # rounded up
        return islice(blocks_of(texts), 0, None, k)

    def tokens(self, enc) -> tuple[Iterable[np.ndarray], Iterable[np.ndarray]]:
        """The tokens of train and of val, as arrays one behind the other."""
        train = (encode_document(enc, text) for text in self.texts(TRAIN, "train"))
        if self.few:
            tokens = np.concatenate(list(train))
            cut = self.before_val(len(tokens))
            return [tokens[:cut]], [tokens[cut:]]
        val = (encode_document(enc, text) for text in self.texts(VAL, "val"))
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
            val_fraction: float = VAL_FRACTION, shard_tokens: int = SHARD_TOKENS) -> Path:
    """Makes a data folder: tokenizer.model, train_*.bin, val_*.bin; returns its path.

    The arguments are the flags below, None or () their defaults. A user's mistake: fail()."""
    if out is None:
        name = Path(inputs[0]).resolve().name.split(".")[0] if inputs else "pystdlib"
        out = f"data/{name}"
    out = Path(out).absolute()
    if out.exists() and not only_holds(out, DATA_FILES):  # said before the work, not after it
        fail(f"{out}: found other files, expected a data folder or nothing: give another --out")
    if not 512 <= vocab_size <= 1_000_000:
        fail(f"--vocab-size {vocab_size} found; expected 512 to 1000000")
    if not 0 < val_fraction < 1:
        fail(f"--val-fraction {val_fraction:g} found; expected more than 0 and less than 1")
    if not 1000 <= shard_tokens < 2**31:
        fail(f"--shard-tokens {shard_tokens} found; expected 1000 to {2**31 - 1}")

    if tokenizer:
        refuse_another_kind(tokenizer)  # a Hugging Face folder, its tokenizer.json, a GGUF file

    files = []
    skipped = Skipped()
    for root in inputs:
        files += find_files(Path(root), HIDDEN, skipped)
    if not inputs:
        files = find_files(Path(sysconfig.get_path("stdlib")), NO_PROSE, skipped)
    corpus = Corpus(files, val_fraction, skipped)

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
    share = f"{n_val / (n_train + n_val):.1%}"
    rule = f"few documents: the last {share} of the tokens" if corpus.few else share
    bytes_per_token = corpus.n_bytes / (n_train + n_val - n_documents)  # without the BOS of each
    print(f"{out}: {n_documents:,} documents, skipped: {skipped}, {n_train:,} train, "
          f"{n_val:,} val tokens ({rule}), {bytes_per_token:.2f} bytes per token")
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
    add("--val-fraction", type=float, default=VAL_FRACTION, help="share of the text held out")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, help="tokens in a shard, at most")
    args = parser.parse_args(argv)
    try:
        prepare(**vars(args))
    except OSError as error:
        where = error.filename or args.out or "the disk"
        fail(f"{where}: {error.strerror or error}; nothing was kept")


if __name__ == "__main__":
    run_main(main)
