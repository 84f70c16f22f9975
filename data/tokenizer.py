"""
The tokenizer: `tokenizer.model` in Llama 3's format <-> text, and a small trainer for it.

Byte-pair encoding. A regular expression (PATTERN) cuts a text into pre-tokens, roughly words; no token
crosses their borders. A pre-token starts as its UTF-8 bytes. The adjacent pair with the lowest rank is
merged, again and again, until no pair is in the table (`tiktoken` does this part). Training fills the
table: the most frequent pair gets the next rank.

The file has a line "base64(token) rank" for each token, ranks 0..n-1. 256 special tokens follow, ids
n..n+255; they are not in the file.

Other Llamas have other patterns and special tokens: tokenizer_settings.json beside the file says them
(Settings below; data/llama_tokenizer.py writes it). The ranks are then the ids that the model knows
the tokens by, and the special tokens lie wherever they leave room.

    python data/prepare.py                   # trains one on this Python's standard library (CPU, 10 s)
"""
import base64
import heapq
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Container, Iterable, NamedTuple

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from plumbing.errors import fail, note
from plumbing.files import atomic_write, is_there

TOKENIZER = "tokenizer.model"  # its name in every folder: a Llama's, a family's, a data folder
SETTINGS = "tokenizer_settings.json"  # beside it, where the tokenizer is not of Llama 3's form

# Contractions | words with one leading blank or mark | up to 3 digits | marks | line ends | blanks
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# The patterns of other Llamas. GPT-2's: numbers of any length.
GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                r"|\s+(?!\S)|\s+")
# SmolLM's: single digits are cut out, then GPT-2's cuts what lies between them. So the blanks before
# a digit are blanks at an end.
DIGITS_PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?![^\s\p{N}])|\s+")
# Qwen's: Llama 3's with single digits. Mistral's (tekken): words are cut where capitals begin.
QWEN_PATTERN = PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {  # llama.cpp's names for them, tokenizer.ggml.pre of a GGUF file
    "llama-bpe": PATTERN, "gpt-2": GPT2_PATTERN, "smollm": DIGITS_PATTERN, "qwen2": QWEN_PATTERN,
    "tekken": TEKKEN_PATTERN}

# Llama 3's special tokens, in the order of their ids.
BOS = "<|begin_of_text|>"
END = "<|end_of_text|>"
_RESERVED = [f"<|reserved_special_token_{k}|>" for k in range(248)]
SPECIALS = [BOS, END, *_RESERVED[:2], "<|finetune_right_pad_id|>", _RESERVED[2],
            "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
            "<|python_tag|>", *_RESERVED[3:]]
STOPS = [END, "<|eom_id|>", "<|eot_id|>"]  # what ends a text or a turn
MEND = "copy Llama 3's again, or train: `python data/prepare.py`"
MEND_SETTINGS = "copy it from its source, or make the folder again: python data/llama.py SOURCE --out DIR"
PADDING = 1024  # so many rows more than tokens a model may have: its vocabulary was rounded up


# -----------------------------------------------------------------------------
# the files


class Settings(NamedTuple):
    """What tokenizer.model does not say.

    pattern: the regular expression that cuts a text into pre-tokens. special_tokens: name -> id.
    bos: the special token in front of every document. eos: those that end a text or a turn.
    chat_template: Jinja, as Hugging Face has it, or None."""
    pattern: str
    special_tokens: dict[str, int]
    bos: str
    eos: list[str]
    chat_template: str | None = None


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> tiktoken.Encoding:
    """tokenizer.model, and the settings beside it -> Encoding with n_vocab ids.

    Its attribute `settings` holds the Settings, `absent` the bytes that are no tokens. vocab_size:
    the model's rows; rows above the tokens (at most 1,023) get names, <|unused_ID|>. fail() if the
    file is no tokenizer, or not one of vocab_size tokens."""
    path = Path(path)
    ranks = read_ranks(path)
    settings = settings_of(path, ranks)
    n_vocab = len(ranks) + len(settings.special_tokens)
    if vocab_size is not None and not 0 <= vocab_size - n_vocab < PADDING:
        fail(f"{path}: {n_vocab} tokens, the model in {path.parent} has {vocab_size}: {MEND}")
    unused = range(n_vocab, vocab_size or n_vocab)
    settings.special_tokens.update(unused_names(unused, settings.special_tokens))
    try:
        enc = tiktoken.Encoding(str(path), pat_str=settings.pattern, mergeable_ranks=ranks,
                                special_tokens=settings.special_tokens)
    except ValueError as error:
        fail(f"{path.with_name(SETTINGS)}: its pattern is no regular expression ({error}): {MEND_SETTINGS}")
    enc.settings = settings
    enc.absent = bytes(b for b in range(256) if bytes([b]) not in ranks)
    return enc


def unused_names(ids: Iterable[int], taken: Container[str] = ()) -> dict[str, int]:
    """Names for ids that are no tokens: <|unused_ID|>, in more brackets where a token has that
    name."""
    names = {}
    for i in ids:
        name = f"<|unused_{i}|>"
        while name in taken:
            name = f"<{name}>"
        names[name] = i
    return names


def is_unused(name: str, i: int) -> bool:
    """Is it a name that unused_names gives this id?"""
    return name.strip("<>") == f"|unused_{i}|"


def read_ranks(path: Path) -> dict[bytes, int]:
    """The table token -> rank of a tokenizer.model, or fail()."""
    if not path.is_file():
        fail(f"no {TOKENIZER} at {path}: {MEND}")
    data = path.read_bytes()
    if is_sentencepiece(path):
        fail(f"{path} is a SentencePiece model (Llama 1/2), expected Llama 3's text: {MEND}")
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            fail(f"{path}:{number}: expected 'base64 rank', found {line[:40]!r}: {MEND}")
    return ranks


def settings_of(path: Path, ranks: dict[bytes, int]) -> Settings:
    """The settings of a tokenizer.model with these ranks: the file beside it, else Llama 3's.

    fail() if the ids of ranks and special tokens are not 0..n-1, each once."""
    if is_there(path.with_name(SETTINGS)):
        settings = read_settings(path.with_name(SETTINGS))
        ids = [*ranks.values(), *settings.special_tokens.values()]
        if not ranks or sorted(ids) != list(range(len(ids))):
            fail(f"{path}: expected the ids 0..n-1, each once, among its ranks and the special tokens of "
                 f"{SETTINGS}: found gaps or doubles: {MEND_SETTINGS}")
        return settings
    # With a rank or a byte missing, tiktoken loads the table and panics later, inside some text.
    n_bytes = sum(len(token) == 1 for token in ranks)
    if n_bytes < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        fail(f"{path}: expected ranks 0..n-1 and all 256 bytes, found a table with gaps: {MEND}")
    return llama3_settings(len(ranks))


def llama3_settings(n_ranks: int) -> Settings:
    """Llama 3's pattern, and its 256 special tokens behind the ranks."""
    special_ids = {name: n_ranks + i for i, name in enumerate(SPECIALS)}
    return Settings(PATTERN, special_ids, BOS, list(STOPS))


def read_settings(path: Path) -> Settings:
    """tokenizer_settings.json, or fail()."""
    try:
        settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
        ids = settings.special_tokens
        names = [settings.bos, *settings.eos]
        if not all(type(i) is int for i in ids.values()) or not all(name in ids for name in names):
            raise ValueError("bos and eos must be among special_tokens, name -> id")
        if not isinstance(settings.pattern, str) or not isinstance(settings.eos, list):
            raise ValueError("pattern must be a text, eos a list")
        if not isinstance(settings.chat_template, str | None):
            raise ValueError("chat_template must be a text or null")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path}: expected pattern, special_tokens, bos, eos, chat_template in JSON, found another "
             f"file ({error}): {MEND_SETTINGS}")
    # Where nothing is said to end a document, the BOS of the next one does.
    return settings._replace(eos=settings.eos or [settings.bos])


def save_settings(path: str | Path, settings: Settings) -> None:
    """Writes tokenizer_settings.json."""
    with atomic_write(path) as file:
        text = json.dumps(settings._asdict(), indent=1, ensure_ascii=False)
        file.write((text + "\n").encode())


def tokenizer_settings(path: str | Path) -> Settings:
    """The settings of the tokenizer.model at `path`; Llama 3's where no file says others."""
    path = Path(path)
    return settings_of(path, read_ranks(path))


def is_sentencepiece(path: Path) -> bool:
    """Is it the tokenizer of a Llama 1 or 2? A protobuf opens with this byte, and no line of base64."""
    return path.read_bytes()[:1] == b"\x0a"


def check_tokenizer(path: str | Path) -> None:
    """fail() if a tokenizer.model is damaged. One of SentencePiece cannot be told."""
    if not is_sentencepiece(Path(path)):
        tokenizer_settings(path)


def copy_tokenizer(source: str | Path, folder: str | Path) -> None:
    """Copies the tokenizer.model at `source`, and its settings, into a folder.

    A folder that held another tokenizer keeps nothing of it. Damaged: fail()."""
    source = Path(source).resolve()
    folder = Path(folder)
    if source.parent == folder.resolve():
        return
    check_tokenizer(source)
    settings = source.with_name(SETTINGS)
    if is_there(settings):
        with atomic_write(folder / SETTINGS) as file:
            file.write(settings.read_bytes())
    else:
        (folder / SETTINGS).unlink(missing_ok=True)
    with atomic_write(folder / TOKENIZER) as file:
        file.write(source.read_bytes())


def save_tokenizer(path: str | Path, ranks: list[bytes]) -> None:
    """Writes tokens in rank order as tokenizer.model; the special tokens are implied."""
    save_ranks(path, {token: rank for rank, token in enumerate(ranks)})


def save_ranks(path: str | Path, ranks: dict[bytes, int]) -> None:
    """Writes a table token -> rank as tokenizer.model, in the order of the ranks."""
    with atomic_write(path) as file:
        for token in sorted(ranks, key=ranks.get):
            file.write(base64.b64encode(token) + b" %d\n" % ranks[token])


def same_tokenizer(a: str | Path, b: str | Path) -> bool:
    """Do two folders hold the same tokenizer? True where one of them holds none.

    Another chat template or another end of a turn makes no other tokenizer."""
    first = Path(a) / TOKENIZER
    second = Path(b) / TOKENIZER
    if not is_there(first) or not is_there(second):
        return True
    if first.read_bytes() != second.read_bytes():
        return False
    if not is_there(first.with_name(SETTINGS)) and not is_there(second.with_name(SETTINGS)):
        return True
    one = tokenizer_settings(first)
    other = tokenizer_settings(second)
    return one[:3] == other[:3]  # pattern, special tokens, BOS


def check_same_tokenizer(model_folder: str | Path, data_folder: str | Path) -> None:
    """fail() if the shards of a data folder were made with another tokenizer than the model's."""
    if not same_tokenizer(model_folder, data_folder):
        own = Path(model_folder) / TOKENIZER
        fail(f"{data_folder} was made with another tokenizer than {own}; name the model's own data "
             f"with --data, or make it: python data/prepare.py --input TEXT --tokenizer {own} "
             "--out data/NAME")
    for folder, other in ((model_folder, data_folder), (data_folder, model_folder)):
        silent = Path(folder).is_dir() and not is_there(Path(folder) / TOKENIZER)
        if silent and is_there(Path(other) / TOKENIZER):
            note(f"{folder} has no {TOKENIZER}: its ids are taken to be those of {Path(other) / TOKENIZER}")


# -----------------------------------------------------------------------------
# text -> ids


def encode_document(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """[BOS] + the ids of a text, (n,) uint32. enc: from load_tokenizer.

    "<|eot_id|>" in a text is plain text: only code emits special tokens."""
    bos = np.array([enc.encode_single_token(enc.settings.bos)], np.uint32)
    return np.concatenate([bos, encode_text(enc, text)])


def encode_text(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ids of a text alone, (n,) uint32."""
    if enc.absent and set(text.encode("utf-8", "replace")) & set(enc.absent):
        return encode_without_absent(enc, text)
    try:
        return enc.encode_to_numpy(text, disallowed_special=())
    except ValueError:
        pass  # half a surrogate pair (from JSON), or about a million blanks in a row
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = [enc.encode_to_numpy(piece, disallowed_special=()) for piece in short_of_blanks(text)]
    return np.concatenate(ids)


def short_of_blanks(text: str, most: int = 10_000) -> list[str]:
    """The text in pieces: cut behind every 10,000 blanks in a row."""
    pieces = []
    start = 0
    for blanks in re.finditer(r"\s+", text):
        for end in range(blanks.start() + most, blanks.end() + 1, most):
            pieces.append(text[start:end])
            start = end
    pieces.append(text[start:])
    return pieces


def encode_without_absent(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """The ids of a text with bytes that are no tokens: Hugging Face's tokenizers drop such bytes
    behind the cut into pre-tokens, before they merge. tiktoken would panic."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = []
    for match in regex.finditer(enc._pat_str, text):
        piece = match.group().encode().translate(None, enc.absent)
        if piece:
            ids += enc._encode_single_piece(piece)
    return np.array(ids, np.uint32)


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
    for _ in tqdm(range(len(ranks), vocab_size - len(SPECIALS)), "tokenizer", unit="merge", disable=None):
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
    a pair, and the order of strings is the order of ranks.

    A merge counts again only what lies around the pair. In a pre-token of a million characters, as
    in Chinese or in DNA, the rest is left alone:

        word    t h e . t h e n          the pair h e, in two places
        old       t h e   t h e n        each with its neighbours
        new       t X     t X n          pairs of old are taken out, pairs of new are added
    """

    def __init__(self, counts: Counter):
        self.words = []  # the different pre-tokens
        for piece in counts:
            self.words.append(piece.encode("utf-8", "replace").decode("latin-1"))
        self.counts = list(counts.values())  # how often each word occurs
        self.pairs = Counter()  # pair -> how often it occurs
        self.where = defaultdict(set)  # pair -> the words that may hold it
        for w, word in enumerate(self.words):
            for pair in pairs_of(word):
                self.pairs[pair] += self.counts[w]
                self.where[pair].add(w)
        self.heap = [(-count, pair) for pair, count in self.pairs.items()]  # old counts stay in it
        heapq.heapify(self.heap)

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
        """Makes one token of a pair wherever it occurs."""
        repeated = re.compile(f"(?:{re.escape(pair)})+")
        changed = set()
        for w in self.where.pop(pair):
            word = self.words[w]
            for place in repeated.finditer(word):
                old = word[max(0, place.start() - 1):place.end() + 1]
                new = old.replace(pair, token)
                for gone in pairs_of(old):
                    self.pairs[gone] -= self.counts[w]
                    changed.add(gone)
                for come in pairs_of(new):
                    self.pairs[come] += self.counts[w]
                    self.where[come].add(w)
                    changed.add(come)
            self.words[w] = word.replace(pair, token)
        for other in changed:
            heapq.heappush(self.heap, (-self.pairs[other], other))


def pairs_of(word: str) -> list[str]:
    """The pairs of adjacent tokens in a word."""
    return [word[i:i + 2] for i in range(len(word) - 1)]
