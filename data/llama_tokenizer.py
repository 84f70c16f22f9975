"""
The tokenizer of a Llama from elsewhere -> tokenizer.model and tokenizer_settings.json, which
data/tokenizer.py reads. data/llama.py calls it.

    in    a Hugging Face folder: tokenizer.json, tokenizer_config.json, generation_config.json,
          config.json, chat_template.jinja; or the keys tokenizer.* of a GGUF file
    out   tokenizer.model: every token's bytes, under the id that the model knows it by
          tokenizer_settings.json: the pattern, special tokens, BOS, ends, chat template; not
          written where tokenizer.model in Llama 3's form says all of it

Byte-level BPE is a list of merges, and tiktoken has none: it merges any two tokens that make a
third, the lowest id first. That gives the same ids for every text if

    the ids grow along the list of merges, and
    every token is what the list makes of its own letters.

Both are checked for all tokens (the proof: check_merges); and on a hard text, tiktoken's ids are
compared with those of a plain BPE over the source's own list.

A tokenizer that fails is left out, with a reason (NoTokenizer), and so is one that is more than
tokenizer.model can say: SentencePiece and WordPiece, a normalizer, dropout, words outside of the
merges, cuts into pre-tokens that no one pattern here makes, other ids than the model's rows. Files
that are damaged end the program: fail().
A chat template that is no text is left out alone: no_template.
"""
import math
from pathlib import Path
from typing import NamedTuple

import regex
import tiktoken

from data.tokenizer import (BOS, DIGITS_PATTERN, GPT2_PATTERN, PADDING, PATTERNS, SETTINGS, STOPS,
                            TOKENIZER, Settings, encode_text, llama3_settings, load_tokenizer,
                            save_ranks, save_settings, unused_names)
from plumbing.errors import fail
from plumbing.files import DAMAGED, read_json
from plumbing.hf import LETTERS


class NoTokenizer(Exception):
    """Why a tokenizer is left out, in a few words."""


class Bpe(NamedTuple):
    """A byte-level BPE. vocab: token in GPT-2's letters -> id. steps: regular expressions, each of
    which cuts what the one before it left. whole: is a pre-token that is a token never merged?
    no_template: why the source's chat template is left out; "" where it is not."""
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    steps: list[str]
    whole: bool
    special: dict[str, int]
    bos: str
    eos: list[str]
    chat_template: str | None
    no_template: str


def tokenizer_or_reason(read, *where) -> tuple[Bpe | None, str]:
    """(tokenizer, ""), or (None, why there is none)."""
    try:
        return read(*where), ""
    except NoTokenizer as reason:
        return None, str(reason)


# -----------------------------------------------------------------------------
# Hugging Face: tokenizer.json and the files beside it


def hf_tokenizer(folder: Path, config: dict) -> Bpe:
    """tokenizer.json and the files beside it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NoTokenizer("it has no tokenizer.json")
    t = read_json(path)
    beside = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        beside[name] = read_json(folder / name) if (folder / name).is_file() else {}
    try:
        model = t["model"]
        kind = model.get("type", "BPE")
        if kind != "BPE" or model.get("byte_fallback"):
            raise NoTokenizer(f"it is {'a ' + kind if kind != 'BPE' else 'SentencePiece'}, "
                              "not byte-level BPE")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise NoTokenizer(f"it has {key} {model[key]!r}")
        if t.get("normalizer"):
            raise NoTokenizer("it changes texts before it cuts them "
                              f"({t['normalizer'].get('type')})")
        special = {}
        for token in t.get("added_tokens") or []:
            text = str(token["content"])
            if not token.get("special") and not is_marker(text):
                raise NoTokenizer(f"it has words of its own, such as {text[:40]!r}")
            special[text] = token["id"]
        vocab = {token: i for token, i in model["vocab"].items() if token not in special}
        if not all(type(i) is int for i in (*vocab.values(), *special.values())):
            raise ValueError("an id is no number")
        if model.get("unk_token") and not set(LETTERS) <= vocab.keys():
            raise NoTokenizer("it has a token for bytes that are no tokens")
        bos, eos = hf_ends(t, beside, config, special)
        template, no_template = hf_template(folder, beside["tokenizer_config.json"])
        return Bpe(vocab, pairs_in(model["merges"]), hf_steps(t.get("pre_tokenizer")),
                   bool(model.get("ignore_merges")), special, bos, eos, template,
                   no_template)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        fail(f"{path} is not the tokenizer.json of a BPE, it lacks vocab, merges or more "
             f"({type(error).__name__}: {error}): {DAMAGED}")


def is_marker(text: str) -> bool:
    """<|im_start|>, [INST]: not to be met in a text?"""
    return regex.fullmatch(r"<.+>|\[.+\]", text) is not None


def pairs_in(merges: list) -> list[tuple[str, str]]:
    """["a b", ...] or [["a", "b"], ...] -> [(a, b), ...]. ValueError for anything else."""
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((str(left), str(right)))
    return pairs


def parts_of(whole: dict | None, key: str) -> list[dict]:
    """The parts of a Sequence, under this key; anything else is its only part."""
    if whole and key in whole and whole.get("type") != "Sequence":
        raise NoTokenizer(f"its {key} are in something of the kind {str(whole.get('type'))[:40]}")
    return (whole or {}).get(key, [whole or {}])


def hf_steps(pre_tokenizer: dict | None) -> list[str]:
    """The regular expressions that cut a text, one after the other."""
    steps = []
    last = None
    for part in parts_of(pre_tokenizer, "pretokenizers"):
        last = part.get("type")
        if last == "Digits":
            steps.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif last == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            pattern = part["pattern"]
            steps.append(str(pattern["Regex"]) if "Regex" in pattern
                         else regex.escape(pattern["String"]))
        elif last == "ByteLevel" and not part.get("add_prefix_space"):
            if part.get("use_regex", True):
                steps.append(GPT2_PATTERN)
        else:
            raise NoTokenizer(f"its pre-tokenizer has a part of the kind {last}")
    if last != "ByteLevel":
        raise NoTokenizer("its pre-tokenizer is not byte-level")
    return steps


def hf_ends(t: dict, beside: dict, config: dict, special: dict) -> tuple[str, list[str]]:
    """(the token in front of a text, those that end one)."""
    said = beside["tokenizer_config.json"]
    starts = []
    for part in parts_of(t.get("post_processor"), "processors"):
        if part.get("type") == "TemplateProcessing":
            first = part["single"][0]
            starts += [first["SpecialToken"]["id"]] if "SpecialToken" in first else []
    starts += [text_of(said.get("bos_token")), name_of(config.get("bos_token_id"), special)]

    stops = []
    for source in (config, beside["generation_config.json"]):
        ids = source.get("eos_token_id")
        stops += [name_of(i, special) for i in (ids if isinstance(ids, list) else [ids])]
    stops.append(text_of(said.get("eos_token")))
    eos = list(dict.fromkeys(name for name in stops if name in special))
    return first_of(starts + eos, special), eos


def name_of(i, special: dict) -> str | None:
    """The name of the special token with this id. A file may say anything."""
    for name, known in special.items():
        if type(i) is int and i == known:
            return name
    return None


def text_of(token) -> str | None:
    """A token of tokenizer_config.json: a text, or an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def hf_template(folder: Path, said: dict) -> tuple[str | None, str]:
    """(chat template, ""), or (None, why it is left out; "" if there is none). said:
    tokenizer_config.json."""
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        for entry in template:
            if isinstance(entry, dict) and entry.get("name") == "default":
                template = entry.get("template")
                break
    template, reason = readable_template(template, "chat_template in tokenizer_config.json")
    file = folder / "chat_template.jinja"
    if template is None and file.is_file():
        try:
            return file.read_text(encoding="utf-8"), ""
        except UnicodeDecodeError:
            return None, f"{file.name} is not UTF-8"
    return template, reason


def readable_template(template, where: str) -> tuple[str | None, str]:
    """(chat template, ""), or (None, why it is left out; "" if there is none)."""
    if template is None:
        return None, ""
    if not isinstance(template, str):
        return None, f"{where} is no text, nor a list with one named default"
    if not is_unicode(template):
        return None, f"{where} is no Unicode: half of a surrogate pair"
    return template, ""


def is_unicode(text: str) -> bool:
    """Can it be written? JSON may hold half of a surrogate pair, \\ud800, UTF-8 may not."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def first_of(names: list, special: dict) -> str:
    """The first of the names that is a special token."""
    for name in names:
        if name in special:
            return name
    raise NoTokenizer("no special token begins a text")


# -----------------------------------------------------------------------------
# GGUF: the keys tokenizer.*

# llama.cpp's names of pre-tokenizers -> their regular expressions; and those of them that never
# merge a pre-token that is a token.
GGUF_STEPS = {name: [pattern] for name, pattern in PATTERNS.items()}
GGUF_STEPS |= dict.fromkeys(("smollm", "starcoder", "refact"), [r"\p{N}", GPT2_PATTERN])
GGUF_STEPS |= dict.fromkeys(("llama3", "llama-v3"), [PATTERNS["llama-bpe"]])
GGUF_WHOLE = {"llama-bpe", "llama3", "llama-v3", "tekken"}
NORMAL = 1  # of tokenizer.ggml.token_type; the others: unknown, control, user-defined, unused, byte
USER_DEFINED = 4


def gguf_tokenizer(path: Path, values: dict) -> Bpe:
    """The values tokenizer.* of a GGUF file."""

    def value(key, default=None):
        return values.get(f"tokenizer.ggml.{key}", default)

    if value("model") != "gpt2":
        raise NoTokenizer(f"it is {str(value('model'))[:40]!r} (SentencePiece?), not byte-level "
                          "BPE")
    pre = str(value("pre", "default"))
    if pre not in GGUF_STEPS:
        raise NoTokenizer(f"its pre-tokenizer {pre[:40]!r} is not one of {', '.join(GGUF_STEPS)}")
    try:
        tokens = [str(token) for token in value("tokens")]
        types = value("token_type", [NORMAL] * len(tokens))
        bos = value("bos_token_id")
        stops = [value(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        vocab = {}
        special = {}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == USER_DEFINED and not is_marker(token):
                raise NoTokenizer(f"it has words of its own, such as {token[:40]!r}")
            if kind == NORMAL and i not in (bos, *stops):
                vocab[token] = i
            else:
                special[token] = i
        if len(vocab) + len(special) < len(tokens):
            raise NoTokenizer("two of its tokens have one name")
        name_of = {i: name for name, i in special.items()}
        eos = list(dict.fromkeys(name_of[i] for i in stops if i in name_of))
        template, no_template = readable_template(values.get("tokenizer.chat_template"),
                                                  "tokenizer.chat_template")
        return Bpe(vocab, pairs_in(value("merges")), GGUF_STEPS[pre], pre in GGUF_WHOLE, special,
                   first_of([name_of.get(bos), *eos], special), eos, template, no_template)
    except (TypeError, ValueError, AttributeError) as error:
        fail(f"{path}: its tokenizer lacks tokens, merges or more ({error}): {DAMAGED}")


# -----------------------------------------------------------------------------
# what is written


def save_tokenizer_of(bpe: Bpe, folder: Path, vocab_size: int) -> int:
    """Writes tokenizer.model, and its settings where it is not of Llama 3's form. Returns how many
    ids of the hard text were compared. NoTokenizer, and no file: it would give other ids."""
    ranks = {bytes_of(token): i for token, i in bpe.vocab.items()}
    check_merges(bpe)
    settings = settings_of(bpe, ranks, vocab_size)
    try:
        tiktoken.Encoding("its pattern alone", pat_str=settings.pattern, mergeable_ranks={b"a": 0},
                          special_tokens={})
    except ValueError as error:
        raise NoTokenizer(f"tiktoken cannot read its pattern ({error})")
    save_ranks(folder / TOKENIZER, ranks)
    if not is_llama3s(settings, ranks, vocab_size):
        save_settings(folder / SETTINGS, settings)
    try:
        enc = load_tokenizer(folder / TOKENIZER, vocab_size)
        ours = encode_text(enc, HARD_TEXT).tolist()
        theirs = plain_bpe(bpe, HARD_TEXT)
        if ours != theirs:
            pairs = zip(ours + [-1], theirs + [-1])
            at = next(i for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise NoTokenizer(f"token {at} of a hard text is {ours[at:at + 1]}, "
                              f"its own {theirs[at:at + 1]}")
        return len(ours)
    except NoTokenizer:
        (folder / TOKENIZER).unlink()
        (folder / SETTINGS).unlink(missing_ok=True)
        raise


def settings_of(bpe: Bpe, ranks: dict[bytes, int], vocab_size: int) -> Settings:
    """The settings of a BPE, whose ids are 0..vocab_size-1: rows without a token get a name,
    special tokens without a row are left out."""
    special = {name: i for name, i in bpe.special.items() if i < vocab_size}
    ids = [*ranks.values(), *special.values()]
    if not ranks or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise NoTokenizer(f"it has other ids than the model's {vocab_size} rows")
    if len(set(ids)) < len(ids):
        raise NoTokenizer("two tokens have one id")
    if bpe.bos not in special or not set(bpe.eos) <= special.keys():
        raise NoTokenizer("the model has no row for the token that begins or ends a text")
    for name in special:
        if not is_unicode(name):
            raise NoTokenizer(f"its special token {name[:40]!r} is no Unicode")
    taken = special.keys() | bpe.vocab.keys()
    special |= unused_names(set(range(vocab_size)) - set(ids), taken)
    special = dict(sorted(special.items(), key=lambda item: item[1]))
    return Settings(one_pattern(bpe.steps), special, bpe.bos, bpe.eos, bpe.chat_template)


def one_pattern(steps: list[str]) -> str:
    """One regular expression that cuts as the steps do one after the other, for those steps that
    Llamas have."""
    if len(steps) == 1:
        return steps[0]
    if steps == [r"\p{N}", GPT2_PATTERN]:
        return DIGITS_PATTERN
    raise NoTokenizer(f"its pre-tokenizer cuts in {len(steps)} steps that are not known as one")


def is_llama3s(settings: Settings, ranks: dict[bytes, int], vocab_size: int) -> bool:
    """Does tokenizer.model alone say all of it?"""
    llama3 = llama3_settings(len(ranks))
    n_vocab = len(ranks) + len(llama3.special_tokens)
    llama3.special_tokens.update(unused_names(range(n_vocab, vocab_size)))  # as load_tokenizer does
    all_bytes = all(bytes([b]) in ranks for b in range(256))
    same = settings[:2] == llama3[:2] and settings.bos == BOS and set(settings.eos) <= set(STOPS)
    return same and all_bytes and vocab_size - n_vocab < PADDING and settings.chat_template is None


BYTES = {letter: b for b, letter in enumerate(LETTERS)}


def bytes_of(token: str) -> bytes:
    """A token in GPT-2's letters -> its bytes."""
    if not token or not all(letter in BYTES for letter in token):
        raise NoTokenizer(f"its token {token[:40]!r} is not spelled in GPT-2's letters")
    return bytes(BYTES[letter] for letter in token)


# -----------------------------------------------------------------------------
# are the ids those of the source?


def check_merges(bpe: Bpe) -> None:
    """NoTokenizer unless tiktoken's rule gives what the list of merges gives for every text.

    The proof. Let p and q stand side by side while the list is worked off, and let pq be a token.
    No merge has crossed the ends of pq, so inside of it the list did what it does to pq alone. If
    pq alone becomes one token, its last two parts are p and q: the pair is in the list, and no
    other pair that makes pq ever stands in a text. If it does not (all_listed), the pair is in the
    list as well and would make it: then p and q never stand so. Hence both rules see the same
    pairs, and the order of the ids is the order of these pairs in the list."""
    made = [bpe.vocab.get(left + right, -1) for left, right in bpe.merges]
    if -1 in made or made != sorted(made):
        raise NoTokenizer("its ids do not grow along its merges")
    priority = {pair: i for i, pair in reversed(list(enumerate(bpe.merges)))}
    for token in bpe.vocab:
        if not all(letter in bpe.vocab for letter in token):
            raise NoTokenizer(f"its token {token[:40]!r} has a byte that is no token")
        if bpe.whole and all_listed(token, bpe.vocab, priority):
            continue  # both rules know the same ways to it
        if merged(list(token), priority) != [token]:
            raise NoTokenizer(f"its merges never make its token {token[:40]!r}")


def all_listed(token: str, vocab: dict, priority: dict) -> bool:
    """Is every way to make the token of two others in the list of merges?"""
    for i in range(1, len(token)):
        left, right = token[:i], token[i:]
        if left in vocab and right in vocab and (left, right) not in priority:
            return False
    return True


def merged(word: list[str], priority: dict[tuple[str, str], int]) -> list[str]:
    """BPE by its definition: the pair that comes first in the list is merged, until none is in
    it."""
    while len(word) > 1:
        pairs = list(zip(word, word[1:]))
        ranks = [priority.get(pair, math.inf) for pair in pairs]
        best = min(ranks)
        if best == math.inf:
            break
        i = ranks.index(best)
        word = word[:i] + [word[i] + word[i + 1]] + word[i + 2:]
    return word


def plain_bpe(bpe: Bpe, text: str) -> list[int]:
    """The ids of a text, by the source's own steps and merges. Bytes that are no tokens are
    dropped."""
    pieces = [text]
    for step in bpe.steps:
        pieces = [part for piece in pieces for part in isolated(step, piece)]
    priority = {pair: i for i, pair in reversed(list(enumerate(bpe.merges)))}
    ids = []
    for piece in pieces:
        word = "".join(LETTERS[b] for b in piece.encode())
        if bpe.whole and word in bpe.vocab:
            ids.append(bpe.vocab[word])
            continue
        known = [letter for letter in word if letter in bpe.vocab]
        ids += [bpe.vocab[token] for token in merged(known, priority)]
    return ids


def isolated(pattern: str, text: str) -> list[str]:
    """A text cut at both ends of every match; what lies between matches is a piece too."""
    pieces = []
    end = 0
    try:
        for match in regex.finditer(pattern, text, timeout=10):
            pieces += [text[end:match.start()], match.group()]
            end = match.end()
    except (regex.error, TimeoutError) as error:
        raise NoTokenizer(f"its pattern is no regular expression that can be used ({error})")
    pieces.append(text[end:])
    return [piece for piece in pieces if piece]


# Everything that tokenizers disagree about.
HARD_TEXT = "\n".join([
    """The quick brown fox's den: they've said "I'LL be there", haven't THEY'RE? It'd cost """
    "$1,234.56",
    "(or 12345678 yen) in 2024, i.e. 3.14% less -- naïve café, Straße, ŒUVRE, İstanbul, don’t, "
    "x²½Ⅷ.",
    "", "\tdef f(x, *args):\n\t\tif x >= 0x1F and  not x != -1e-10:   # 42 ok",
    "        return {'a': [1, 2,  3], 'b': x**2 // 7}   \r\n\r\n    }\r});\n\n",
    "  12  345   6789\n   7",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002 "
    "\u4e2d\u6587\uff0c123\u4e2a",
    "\ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0661\u0662\u0663 e\u0301",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 "
    "\u0e44\u0e17\u0e22",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 "
    "\U0001f937\U0001f3fd\u200d\u2640\ufe0f",
    "\u2211\u222b\u221a \U00020000\ufeff\xa0\u3000\u2003x\u200b"
    "\x00\x01!\x04!\x13a\x14b\x1c\x7f\x85",
    "\U000e0067\U000f0000 http://a.b/c?d=e&f_g#h <|im_start|>user<s>[INST] aaaaaaaaaaaaaaaa ====",
    "!!!??? \\n CamelCase HTTPServer snake_case",
    " " * 77 + "x", "\n" * 9, "\t" * 9, "ab" * 40 + "   "])
