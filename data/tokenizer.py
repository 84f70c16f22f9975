"""The tokenizer: `tokenizer.model` in Llama 3's format <-> text, and a small trainer for it.

Byte-pair encoding: a regular expression (PATTERN) cuts text into pre-tokens, roughly words, whose
borders no token crosses. A pre-token starts as its UTF-8 bytes; the adjacent pair whose joint
rank is lowest is merged, until no pair is in the table (`tiktoken` does it). Training fills the
table, `python data/prepare.py`: the most frequent pair gets the next rank. The file: a line
"base64(token) rank" per token, ranks 0..n-1; 256 specials follow, ids n..n+255.
"""
import base64
import heapq
import os
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, NoReturn
import numpy as np
import regex
import tiktoken

# ------------------------------------------------------- two helpers that all files share
def fail(message: str) -> NoReturn:
    """A user's mistake: says what was found, where, what was expected and the command that mends
    it, in one line on stderr, from one rank only. Raises SystemExit(2)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", " ".join(message.splitlines()), file=sys.stderr, flush=True)
    raise SystemExit(2)

@contextmanager
def atomic_write(path: str | Path):
    """Yields a binary file that appears under `path` only once it is whole and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: the rename is atomic
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)                          # there only if something was raised
    folder = os.open(path.parent, os.O_RDONLY)                # the name must survive a crash too
    os.fsync(folder)
    os.close(folder)

# ------------------------------------------------------- Llama 3's format, and its training
# Contractions | words with one leading blank or mark | up to 3 digits | marks | line ends | blanks
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BOS, END = "<|begin_of_text|>", "<|end_of_text|>"
_RESERVED = [f"<|reserved_special_token_{k}|>" for k in range(248)]
SPECIALS = [BOS, END, *_RESERVED[:2], "<|finetune_right_pad_id|>", _RESERVED[2],
            "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
            "<|python_tag|>", *_RESERVED[3:]]

def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> tiktoken.Encoding:
    """-> Encoding, n_vocab = ranks + 256. Not a tokenizer, or not of vocab_size tokens: fail()."""
    path, ranks, mend = Path(path), {}, "copy Llama 3's again, or train: `python data/prepare.py`"
    if not path.is_file():
        fail(f"no tokenizer.model at {path}: {mend}")
    data = path.read_bytes()
    if data[:1] == b"\x0a":                       # opens a protobuf, and no line of base64
        fail(f"{path} is a SentencePiece model (Llama 1/2), expected Llama 3's text: {mend}")
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"{path}:{number}: expected 'base64 rank', found {line[:40]!r}: {mend}")
    # With a rank or a byte missing, tiktoken loads the table and panics later, inside some text.
    if sum(len(t) == 1 for t in ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        fail(f"{path}: expected ranks 0..n-1 and all 256 bytes, found a table with gaps: {mend}")
    if vocab_size not in (None, len(ranks) + 256):
        fail(f"{path}: {len(ranks) + 256} tokens, the model in {path.parent} has {vocab_size}: {mend}")
    return tiktoken.Encoding(str(path), pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={s: len(ranks) + i for i, s in enumerate(SPECIALS)})

def save_tokenizer(path: str | Path, ranks: list[bytes]) -> None:
    """Writes tokens in rank order as tokenizer.model; the specials are implied."""
    with atomic_write(path) as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks))

def encode_document(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """uint32 [BOS] + ids. "<|eot_id|>" in a text is plain text: only code emits special tokens."""
    try:
        parts = [enc.encode_to_numpy(text, disallowed_special=())]
    except ValueError:    # half a surrogate pair (JSON), or about 1e6 blanks in a row: cut there
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts = [enc.encode_to_numpy(part, disallowed_special=())
                 for part in regex.findall(r"(?s).*?\s{10000}|.+", text)]
    return np.concatenate([np.array([enc.encode_single_token(BOS)], np.uint32), *parts])

def train_bpe(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The vocab_size - 256 tokens in rank order: the 256 bytes, then one a merge. Among pairs
    equally frequent the lowest ranks win: the text alone decides. Too little text: fail()."""
    counts = Counter(piece for text in texts for piece in regex.findall(PATTERN, text))
    # A pre-token is a string with one character a token, chr(rank): str.replace merges a pair.
    words = [piece.encode("utf-8", "replace").decode("latin-1") for piece in counts]
    counts, pairs, where = list(counts.values()), Counter(), defaultdict(set)
    ranks, heap = [bytes([b]) for b in range(256)], []        # heap: the commonest pair on top

    def tally(w: int, sign: int):
        for a, b in zip(words[w], words[w][1:]):
            pairs[a + b] += sign * counts[w]
            where[a + b].add(w)                   # the words that may hold the pair
            heapq.heappush(heap, (-pairs[a + b], a + b))

    for w in range(len(words)):
        tally(w, +1)
    while len(ranks) < vocab_size - len(SPECIALS):
        n, pair = heapq.heappop(heap) if heap else (0, "")
        if n == 0:
            fail(f"too little text for --vocab-size {vocab_size}: add some, or {len(ranks) + 256}")
        if -n == pairs[pair]:                     # else stale: the heap holds a newer count too
            for w in where.pop(pair):             # only words that hold the pair are recounted
                tally(w, -1)
                words[w] = words[w].replace(pair, chr(len(ranks)))
                tally(w, +1)
            ranks.append(ranks[ord(pair[0])] + ranks[ord(pair[1])])
    return ranks
