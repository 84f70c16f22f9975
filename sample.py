"""
Text from any Llama folder, at any budget of a supernet: one checkpoint, a family of speeds.

    python sample.py                                       the full model of out/flex
    python sample.py --budget 0.5 --prompt "def main("     the same file, half the parameters
    python sample.py --model out/flex-0.50                 the export of that slice: the same text
    python sample.py --model out/flex --latency 0.6        by measured time
    python sample.py --budget 1.0 --draft 0.4              the whole model's text, drafted by a slice
    python sample.py --budget 1.0:64,0.5                   64 tokens from the whole model, then half

A slice drafts, the whole verifies (speculative decoding: Leviathan et al. 2023, Chen et al. 2023).
A small model is often right, and a large one reads several tokens in about the time of one. So the
draft writes a few tokens, one after the other, and the target reads them all in one forward:

    text so far         def main(
    the draft writes             a   r   g   s   )        one small forward each
    the target reads             ok  ok  ok  no           one large forward in all
    text now            def main(a   r   g   v            v: the target's own choice

Every round gives at least one token. The rule that says ok (`verify`) keeps the distribution that
of the target, whatever the draft is: a bad draft costs time and changes nothing else. A family has
its drafts inside it: one set of weights, and a second KV cache.
"""
import argparse
import codecs
import sys
import time
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F

from data.tokenizer import encode_document, load_tokenizer
from model import LAST, KVCache
from plumbing.checkpoint import TOKENIZER
from plumbing.errors import Parser, check_at_least_one, fail, note, run_main
from plumbing.family import Member, open_family
from plumbing.parallel import default_device, device_of
from plumbing.params import max_positions
from plumbing.speculation import (
    MOST_DRAFTED,
    Reader,
    Tally,
    holds,
    members_asked,
    sizes_in_turn,
)

COLDEST = 1e-6  # a temperature under it is 0: fp32 has no room for logits over it

# -----------------------------------------------------------------------------
# token by token


@torch.no_grad()
def generate(model, prompt: list[int], n: int, subnet=None, factors=None, temperature: float = 0.8,
             top_k: int = 0, seed: int = 0, window: int | None = None,
             generator: torch.Generator | None = None,
             cache: KVCache | None = None) -> Iterator[int]:
    """Yields n token ids after `prompt`. temperature 0: the likeliest token always. top_k 0: all
    tokens may come. window: the oldest tokens are forgotten, so that never more are read at once.
    generator: gives the random numbers, in place of a seed. cache: empty, or of another member,
    which has read all of the prompt but its last token; it is as long as the window.

    The prompt goes through the model once. After it every step feeds one token, the rest is in the
    KV cache."""
    device = model.tok_embeddings.weight.device
    if generator is None:
        generator = torch.Generator(device=device).manual_seed(seed)
    if factors is not None:
        factors = factors.to(device)
    if cache is None:
        longest = len(prompt) + n
        cache = KVCache(min(window or longest, longest))
    longest = cache.max_len
    read = list(prompt)  # all tokens so far
    tokens = read        # those that the cache has not seen
    if cache.length > 0:
        tokens = read[-1:]
    for _ in range(n):
        # The window is full: its later half is read again, from position 0 on.
        if cache.length + len(tokens) > longest:
            tokens = read[-max(1, longest // 2):]
            cache.length = 0
        x = torch.tensor([tokens], device=device)  # 1, T
        logits, _ = model(x, subnet=subnet, factors=factors, cache=cache, at=LAST)
        token = pick(logits[0], temperature, top_k, generator).item()
        tokens = [token]
        read.append(token)
        yield token


def probabilities(logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """What tokens are drawn from, logits (..., vocab) -> (..., vocab). Temperature 0 is the limit:
    the likeliest token has it all."""
    if temperature < COLDEST:
        best = logits.argmax(-1)
        return F.one_hot(best, logits.size(-1)).float()
    if top_k:
        k = min(top_k, logits.size(-1))
        least = logits.topk(k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    highest = logits.amax(-1, keepdim=True)
    return ((logits - highest) / temperature).softmax(-1)


def pick(logits: torch.Tensor, temperature: float, top_k: int, generator) -> torch.Tensor:
    """One token id () from logits (vocab,)."""
    p = probabilities(logits, temperature, top_k)
    return torch.multinomial(p, 1, generator=generator)[0]


# -----------------------------------------------------------------------------
# a slice drafts, the whole verifies


def verify(drafted: torch.Tensor, p: torch.Tensor, q: torch.Tensor,
           generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact rule (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2).

    drafted (B, K): tokens drawn from q (B, K, vocab), the draft's probabilities. p (B, K + 1,
    vocab): the target's. Returns (how many are accepted (B,), the token that follows them (B,)).
    Accepted tokens and that one together are distributed as if drawn from p one by one."""
    B, K = drafted.shape

    # Accept a token with probability min(1, p / q), and none behind the first that is refused.
    p_drafted = p[:, :K].gather(-1, drafted[..., None])[..., 0]       # B, K
    q_drafted = q.gather(-1, drafted[..., None])[..., 0]              # B, K
    u = torch.rand(B, K, generator=generator, device=p.device)
    ok = (u < p_drafted / q_drafted).long()
    accepted = ok.cumprod(-1).sum(-1)                                 # B

    # In its place comes a token of what q gave too little: max(0, p - q), over its sum. Behind the
    # last token nothing was drafted. There q is 0, and what comes is drawn from p: the bonus.
    q = F.pad(q, (0, 0, 0, 1))                                        # B, K + 1, vocab
    row = torch.arange(B, device=p.device)
    p = p[row, accepted]                                              # B, vocab
    rest = (p - q[row, accepted]).clamp(min=0)
    # Where p and q are equal, rounding may refuse a token and leave nothing: draw from p then.
    total = rest.sum(-1, keepdim=True)
    rest = torch.where(total > 0, rest / total, p)
    following = torch.multinomial(rest, 1, generator=generator)[:, 0]
    return accepted, following


@torch.no_grad()
def speculate(target: Member, draft: Member, prompts: list[list[int]], n: int, tally: Tally,
              draft_tokens: int | None = None, temperature: float = 0.8, top_k: int = 0,
              generator: torch.Generator | None = None,
              window: int | None = None) -> Iterator[list[list[int]]]:
    """Yields the next tokens of every prompt, round by round, until each has n: what generate()
    draws from the target. draft_tokens: a round's (None: what pays, by the tally so far).

    The texts of a batch are accepted one by one. One that is complete waits for the others."""
    longest = max(len(prompt) for prompt in prompts) + n
    longest = min(window or longest, longest)
    most = draft_tokens or MOST_DRAFTED
    large = Reader(target, len(prompts), longest + most)
    small = Reader(draft, len(prompts), longest + most)
    texts = [list(prompt) for prompt in prompts]
    left = [n] * len(prompts)
    while max(left) > 0:
        # The window is full: its later half is read again, from position 0 on.
        for row, text in enumerate(texts):
            if len(text) > longest:
                texts[row] = text[-max(1, longest // 2):]
                large.seen[row] = 0
                small.seen[row] = 0

        # 1. The draft writes K tokens, one after the other.
        K = draft_tokens or tally.k()
        ahead = [list(text) for text in texts]
        drafted = []
        q = []
        for _ in range(K):
            logits = small.read(ahead)[:, 0]                           # B, vocab
            q.append(probabilities(logits, temperature, top_k))
            token = torch.multinomial(q[-1], 1, generator=generator)   # B, 1
            drafted.append(token)
            for text, new in zip(ahead, token[:, 0].tolist()):
                text.append(new)

        # 2. The target reads them at once. It also says what comes behind the last of them.
        logits = large.read(ahead, K + 1)                              # B, K + 1, vocab
        p = probabilities(logits, temperature, top_k)
        accepted, following = verify(torch.cat(drafted, 1), p, torch.stack(q, 1), generator)

        # 3. Each text goes on, up to its last token or to the end of the window.
        came = []
        for row, text in enumerate(texts):
            kept = accepted[row].item()
            new = ahead[row][len(text):][:kept] + [following[row].item()]
            new = new[:min(left[row], longest + 1 - len(text))]
            if new:
                tally.add(K, kept, len(new))
            text += new
            left[row] -= len(new)
            came.append(new)
            # Both caches forget what was refused. The last token was drawn and not read so far.
            for reader in (large, small):
                reader.seen[row] = min(reader.seen[row], len(text) - 1)
        yield came


# -----------------------------------------------------------------------------
# from members to text


def speak(parts: list[tuple[Member, int | None]], draft: Member | None, prompt: list[int], n: int,
          window: int, tally: Tally, args: argparse.Namespace) -> Iterator[int]:
    """Yields n token ids after `prompt`. parts: members that take turns, and how many tokens each of
    them gives (None: the rest)."""
    device = parts[0][0].model.tok_embeddings.weight.device
    generator = torch.Generator(device=device).manual_seed(args.seed)
    how = dict(temperature=args.temperature, top_k=args.top_k, generator=generator)
    cache = KVCache(min(window, len(prompt) + n))
    read = list(prompt)
    for member, count in parts:
        count = min(count or n, n)
        n -= count
        if draft is not None:
            rounds = speculate(member, draft, [read], count, tally, args.draft_tokens,
                               window=window, **how)
            tokens = (token for (new,) in rounds for token in new)
        else:
            # The next member reads the text so far, unless it goes on with the last one's cache.
            if not (args.take_over and holds(cache, member)):
                if args.take_over and cache.length > 0:
                    note("the next member has layers or KV heads that the cache lacks: it reads the "
                         "text again")
                cache = KVCache(cache.max_len)
            tokens = generate(member.model, read, count, member.subnet, member.factors,
                              cache=cache, **how)
        for token in tokens:
            read.append(token)
            yield token


def stream(tokens: Iterator[int], tokenizer, ends: tuple[int, ...]) -> int:
    """Prints tokens as text until one of `ends` comes; returns how many came.

    A token may end inside a UTF-8 character: it is printed when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    n = 0
    for token in tokens:
        n += 1
        if token in ends:
            break
        print(decoder.decode(tokenizer.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return n


def fit(prompt: list[int], n: int, window: int, beyond: bool) -> tuple[list[int], int]:
    """(prompt, how many new tokens) of which a window holds all; with `beyond`, as many new ones as
    asked. Says on stderr if the start of the prompt had to go."""
    if len(prompt) >= window:
        kept = max(1, window // 2)
        note(f"the prompt's {len(prompt):,} tokens do not fit into the window of {window:,}: its "
             f"last {kept:,} are read")
        prompt = prompt[-kept:]
    if not beyond:
        n = min(n, window - len(prompt))
    return prompt, n


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python sample.py", __doc__)
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budget", type=sizes_in_turn, default="1.0",
                     help="fraction of the full model's non-embedding parameters; 1.0:64,0.5: "
                     "64 tokens at 1.0, the others at 0.5")
    ask.add_argument("--latency", type=float,
                     help="instead: fraction of the full model's time on this machine")
    p.add_argument("--draft", type=float, help="budget of a smaller member that drafts")
    p.add_argument("--draft-tokens", type=int, help="drafted before each verification (default: "
                   "what pays by the acceptance so far, if time goes with parameters)")
    p.add_argument("--take-over", action="store_true", help="the next member goes on with the KV "
                   "cache of the one before, where it has the layers; else it reads the text again")
    p.add_argument("--prompt", default="def", help="text to go on from")
    p.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="sample among the k likeliest; 0: all")
    p.add_argument("--max-new-tokens", type=int, default=200)
    p.add_argument("--beyond", action="store_true", help="go on behind the window that the model "
                   "was trained on, by forgetting the oldest tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    args = p.parse_args(argv)
    if not 0 <= args.temperature < float("inf") or args.top_k < 0 or args.max_new_tokens < 1:
        fail(f"--temperature {args.temperature:g} --top-k {args.top_k} --max-new-tokens "
             f"{args.max_new_tokens}: expected 0 or more, 0 or more, and 1 or more")
    check_at_least_one(args, "draft_tokens")
    if args.draft_tokens and args.draft is None:
        fail(f"--draft-tokens {args.draft_tokens} found without a draft; expected --draft 0.4 too")
    if args.take_over and args.draft is not None:
        fail("--take-over found with --draft, whose two caches are read again; leave one of them out")
    return args


def main(argv=None) -> None:
    """Streams text to stdout, tokens/s to stderr."""
    args = parse_args(argv)
    family = open_family(args.model, device_of(args.device))
    parts, draft, tally = members_asked(family, args)
    tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, family.model.config.vocab_size)
    settings = tokenizer.settings
    window = max_positions(family.model.config)
    prompt = encode_document(tokenizer, args.prompt).tolist()
    prompt, n_new = fit(prompt, args.max_new_tokens, window, args.beyond)

    print(args.prompt, end="", flush=True)
    start = time.perf_counter()
    tokens = speak(parts, draft, prompt, n_new, window, tally, args)
    # A document ends with the BOS of the next one in our data, with a token of its own in Meta's.
    ends = {tokenizer.encode_single_token(name) for name in (settings.bos, *settings.eos)}
    n = stream(tokens, tokenizer, ends)
    print(f"{n} tokens, {n / (time.perf_counter() - start):.1f} tok/s", file=sys.stderr)
    if draft is not None:
        print(tally.report(args.draft_tokens), file=sys.stderr)
    if n == n_new < args.max_new_tokens:
        note(f"stopped where the window of {window:,} tokens ends; --beyond goes on")


if __name__ == "__main__":
    run_main(main, "nothing was written")
