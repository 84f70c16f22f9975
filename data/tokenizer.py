"""
The tokenizer: `tokenizer.model` in Llama 3's format <-> text, and a small trainer for it.

Byte-pair encoding. A regular expression (PATTERN) cuts a text into pre-tokens, roughly words; no token
crosses their borders. A pre-token starts as its UTF-8 bytes. The adjacent pair with the lowest rank is
merged, again and again, until no pair is in the table (`tiktoken` does this part). Training fills the
table: the most frequent pair gets the next rank.

The file has a line "base64(token) rank" for each token, ranks 0..n-1. 256 special tokens follow, ids
n..n+255; they are not in the file.

    python data/prepare.py                   # trains one on this Python's standard library (CPU, 10 s)
"""
import base64
import heapq
from collections import Counter, defaultdict
from pathlib import Path
from typing import Iterable

import numpy as np
import regex
import tiktoken

from plumbing.errors import fail
from plumbing.files import atomic_write

TOKENIZER = "tokenizer.model"  # its name in every folder: a Llama's, a family's, a data folder

# Contractions | words with one leading blank or mark | up to 3 digits | marks | line ends | blanks
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Llama 3's special tokens, in the order of their ids.
BOS = "<|begin_of_text|>"
END = "<|end_of_text|>"
_RESERVED = [f"<|reserved_special_token_{k}|>" for k in range(248)]
SPECIALS = [BOS, END, *_RESERVED[:2], "<|finetune_right_pad_id|>", _RESERVED[2],
            "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
            "<|python_tag|>", *_RESERVED[3:]]
MEND = "copy Llama 3's again, or train: `python data/prepare.py`"


# -----------------------------------------------------------------------------
# the file


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> tiktoken.Encoding:
    """tokenizer.model -> Encoding, whose n_vocab is the ranks + 256.

    fail() if the file is no tokenizer, or not one of vocab_size tokens."""
    path = Path(path)
    ranks = read_ranks(path)
    n_vocab = len(ranks) + len(SPECIALS)
    if vocab_size is not None and vocab_size != n_vocab:
        fail(f"{path}: {n_vocab} tokens, the model in {path.parent} has {vocab_size}: {MEND}")
    special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding(str(path), pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special_ids)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The table token -> rank of a tokenizer.model, or fail()."""
    if not path.is_file():
        fail(f"no {TOKENIZER} at {path}: {MEND}")
    data = path.read_bytes()
    if data[:1] == b"\x0a":  # opens a protobuf, and no line of base64
        fail(f"{path} is a SentencePiece model (Llama 1/2), expected Llama 3's text: {MEND}")
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"{path}:{number}: expected 'base64 rank', found {line[:40]!r}: {MEND}")
    # With a rank or a byte missing, tiktoken loads the table and panics later, inside some text.
    n_bytes = sum(len(token) == 1 for token in ranks)
    if n_bytes < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        fail(f"{path}: expected ranks 0..n-1 and all 256 bytes, found a table with gaps: {MEND}")
    return ranks


def save_tokenizer(path: str | Path, ranks: list[bytes]) -> None:
    """Writes tokens in rank order as tokenizer.model; the special tokens are implied."""
    with atomic_write(path) as file:
        for rank, token in enumerate(ranks):
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def same_tokenizer(a: str | Path, b: str | Path) -> bool:
    """Do two folders hold the same tokenizer.model? True where one of them holds none."""
    first = Path(a) / TOKENIZER
    second = Path(b) / TOKENIZER
    if not first.is_file() or not second.is_file():
        return True
    return first.read_bytes() == second.read_bytes()


def check_same_tokenizer(model_folder: str | Path, data_folder: str | Path) -> None:
    """fail() if the shards of a data folder were made with another tokenizer than the model's."""
    if not same_tokenizer(model_folder, data_folder):
        own = Path(model_folder) / TOKENIZER
        fail(f"{data_folder} was made with another tokenizer than {own}; name the model's own data "
             f"with --data, or make it: python data/prepare.py --input TEXT --tokenizer {own} "
             "--out data/NAME")


# -----------------------------------------------------------------------------
# text -> ids


def encode_document(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """[BOS] + the ids of a text, (n,) uint32.

    "<|eot_id|>" in a text is plain text: only code emits special tokens."""
    bos = np.array([enc.encode_single_token(BOS)], np.uint32)
    try:
        return np.concatenate([bos, enc.encode_to_numpy(text, disallowed_special=())])
    except ValueError:
        pass  # half a surrogate pair (from JSON), or about a million blanks in a row
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    pieces = regex.findall(r"(?s).*?\s{10000}|.+", text)  # cut behind every 10,000 blanks
    ids = [enc.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([bos, *ids])


# -----------------------------------------------------------------------------
# training


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The vocab_size - 256 tokens in rank order: first the 256 bytes, then one for each merge.

    Among pairs that are equally frequent the lowest ranks win: the text alone decides.
    Too little text: fail()."""
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    table = PairTable(counts)
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < vocab_size - len(SPECIALS):
        pair = table.commonest()
        if pair is None:
            fail(f"too little text for --vocab-size {vocab_size}: add some, or {len(ranks) + 256}")
        left, right = pair
        table.merge(pair, chr(len(ranks)))
        ranks.append(ranks[ord(left)] + ranks[ord(right)])
    return ranks


class PairTable:
    """How often each pair of adjacent tokens occurs, kept up to date while pairs are merged.

    A pre-token is held as a string with one character a token, chr(rank). So str.replace merges
    a pair, and the order of strings is the order of ranks."""

    def __init__(self, counts: Counter):
        self.words = []  # the different pre-tokens
        for piece in counts:
            self.words.append(piece.encode("utf-8", "replace").decode("latin-1"))
        self.counts = list(counts.values())  # how often each word occurs
        self.pairs = Counter()  # pair -> how often it occurs
        self.where = defaultdict(set)  # pair -> the words that may hold it
        self.heap = []  # (-count, pair): the commonest on top; old counts stay in it
        for w in range(len(self.words)):
            self.count(w, +1)

    def count(self, w: int, sign: int) -> None:
        """Adds the pairs of word w to the table (sign 1), or takes them out (sign -1)."""
        word = self.words[w]
        for i in range(len(word) - 1):
            pair = word[i:i + 2]
            self.pairs[pair] += sign * self.counts[w]
            self.where[pair].add(w)
            heapq.heappush(self.heap, (-self.pairs[pair], pair))

    def commonest(self) -> str | None:
        """The most frequent pair; None if no pair is left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            if count == 0:
                return None
            if -count == self.pairs[pair]:  # else an old count: the heap holds a newer one too
                return pair
        return None

    def merge(self, pair: str, token: str) -> None:
        """Makes one token of a pair wherever it occurs. Only words that hold it are counted again."""
        for w in self.where.pop(pair):
            self.count(w, -1)
            self.words[w] = self.words[w].replace(pair, token)
            self.count(w, +1)
