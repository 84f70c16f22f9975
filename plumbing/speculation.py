"""
What speculative decoding needs besides its rule (sample.py): texts of unequal length in one batch,
and how many tokens are worth drafting.

    reader = Reader(member, texts=2, longest=100)
    logits = reader.read([[5, 6, 7], [8]])         after the last token of each, (2, 1, vocab)
    logits = reader.read([[5, 6, 7, 9], [8, 4]])   reads the 9 and the 4
    reader.seen[0] = 3                             forgets the 9
"""
import argparse

import torch

from model import KVCache, Llama, LlamaConfig, SubNet
from plumbing.errors import fail, note
from plumbing.family import Family, Member
from space import n_params

MOST_DRAFTED = 8  # tokens in a round, where nobody says how many

# -----------------------------------------------------------------------------
# reading


class Reader:
    """A member that reads a batch of texts, which need not be equally long, into its KV cache.

    seen: how many tokens of each text the cache holds. Lowering it is the rollback: what lies
    behind is written over."""

    def __init__(self, member: Member, texts: int, longest: int):
        self.member = member
        self.device = member.model.tok_embeddings.weight.device
        self.factors = member.factors
        if self.factors is not None:
            self.factors = self.factors.to(self.device)
        self.cache = KVCache(longest)
        self.seen = [0] * texts

    def read(self, texts: list[list[int]], n: int = 1) -> torch.Tensor:
        """Logits (B, n, vocab) after the last n tokens of every text. Reads what the cache lacks,
        n tokens at least."""
        # All rows read T tokens, as many as the one that lacks most. The others read some of their
        # last ones again. A text of fewer tokens has zeros behind it, which its own never see.
        T = max(len(text) - seen for text, seen in zip(texts, self.seen))
        starts = [max(0, len(text) - T) for text in texts]
        rows = [text[start:] for text, start in zip(texts, starts)]
        tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])  # B, T

        # where the rows begin: one number is faster than one for each
        if len(set(starts)) == 1:
            self.cache.length = starts[0]
        else:
            self.cache.length = torch.tensor(starts)

        # where the last n tokens of each row stand
        ends = torch.tensor([len(row) for row in rows])
        last = ends[:, None] + torch.arange(-n, 0)                           # B, n
        batch = torch.arange(len(texts))[:, None]                            # B, 1
        logits, _ = self.member.model(
            tokens.to(self.device),
            subnet=self.member.subnet,
            factors=self.factors,
            cache=self.cache,
            at=(batch, last),
        )
        self.seen = [len(text) for text in texts]
        return logits


def holds(cache: KVCache, member: Member) -> bool:
    """Does a cache hold keys and values of all layers and KV heads of a member? Not of one whose
    tokens take their own width each."""
    if not isinstance(member.model, Llama):
        return False
    kv_heads = member.subnet.config(member.model.config).per_layer("n_kv_heads")
    for layer, n_kv_heads in zip(member.subnet.layers, kv_heads):
        if layer not in cache.layers:
            return False
        keys, _ = cache.layers[layer]  # B, n_kv_heads, max_len, head_dim
        if keys.size(1) != n_kv_heads:
            return False
    return True


# -----------------------------------------------------------------------------
# what drafting costs and brings


def params_per_token(config: LlamaConfig, subnet: SubNet) -> int:
    """Parameters that a token is multiplied by: all but the embeddings, which are looked up."""
    return n_params(config, subnet) + config.vocab_size * subnet.dim


def speedup(acceptance: float, cost: float, k: int) -> float:
    """How many times as fast as plain decoding k drafted tokens a round are (Leviathan et al. 2023,
    Theorem 3.8).

    acceptance: the chance of a drafted token. cost: a forward of the draft over one of the target,
    which is said to take the same time for k + 1 tokens as for one."""
    tokens = sum(acceptance ** i for i in range(k + 1))  # that a round gives (their Equation 1)
    return tokens / (k * cost + 1)


def best_k(acceptance: float, cost: float) -> int:
    """The number of drafted tokens, 1 to MOST_DRAFTED, whose speedup() is the largest."""
    return max(range(1, MOST_DRAFTED + 1), key=lambda k: speedup(acceptance, cost, k))


class Tally:
    """What speculative decoding did so far, summed over the batch. cost: as in speedup()."""

    def __init__(self, cost: float):
        self.cost = cost
        self.rounds = 0    # verifications
        self.tokens = 0    # that came of them
        self.judged = 0    # drafted tokens, without those behind a refused one
        self.accepted = 0

    def add(self, drafted: int, accepted: int, tokens: int) -> None:
        """A verification of one text."""
        self.rounds += 1
        self.tokens += tokens
        self.judged += min(drafted, accepted + 1)
        self.accepted += accepted

    def acceptance(self) -> float:
        """The share of the drafted tokens that were accepted, those behind a refused one left out:
        an estimate of the sum of min(p, q)."""
        return self.accepted / max(1, self.judged)

    def k(self) -> int:
        """How many tokens to draft next. Until there is something to go by, as if 4 of 5 tokens had
        been accepted."""
        return best_k((self.accepted + 4) / (self.judged + 5), self.cost)

    def report(self, asked: int | None) -> str:
        """A line of what was measured. asked: the number of drafted tokens, if it was given.
        Notes on stderr if they cannot pay."""
        acceptance = self.acceptance()
        k = asked or self.k()
        best = best_k(acceptance, self.cost)
        pays = speedup(acceptance, self.cost, best) > 1
        advice = f"--draft-tokens {best} would" if pays else "no number would; leave out --draft"
        if speedup(acceptance, self.cost, k) <= 1:
            note(f"{k} drafted tokens cannot pay: a draft with {self.cost:.2f} of the parameters, "
                 f"accepted at {acceptance:.2f}; {advice}")
        return (f"drafted by {self.cost:.2f} of the parameters: {acceptance:.2f} accepted, "
                f"{self.tokens / max(1, self.rounds):.2f} tokens a verification, "
                f"{k} drafted {'a time' if asked else 'at the end'}")


# -----------------------------------------------------------------------------
# the flags of sample.py


def sizes_in_turn(text: str) -> list[tuple[float, int | None]]:
    """1.0:64,0.5 -> [(1.0, 64), (0.5, None)]: 64 tokens at 1.0, all others at 0.5."""
    *first, last = text.split(",")
    found = []
    try:
        for part in first:
            size, tokens = part.split(":")
            found.append((float(size), int(tokens)))
        if any(tokens < 1 for _, tokens in found):
            raise ValueError
        found.append((float(last), None))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} found; expected a fraction such as 0.5, or several with the number of tokens "
            "of all but the last, such as 1.0:64,0.5")
    return found


def members_asked(family: Family, args: argparse.Namespace) -> tuple[list, Member | None, Tally]:
    """The members that --budget or --latency name, [(Member, tokens or None), ...]; that of --draft,
    if any; and a tally for the two. A draft that is not smaller: fail()."""
    asked = args.budget
    unit = "params"
    if args.latency is not None:
        asked = [(args.latency, None)]
        unit = "latency"
    member = family.member if args.draft is None else family.slice_member
    parts = [(member(size, unit), tokens) for size, tokens in asked]
    if args.draft is None:
        return parts, None, Tally(1)

    draft = family.slice_member(args.draft)
    config = family.model.config
    drafts = params_per_token(config, draft.subnet)
    target = min(params_per_token(config, member.subnet) for member, _ in parts)
    if drafts >= target:
        fail(f"--draft {args.draft:g} has {drafts:,} parameters (the table of embeddings left out), "
             f"and what it drafts for {target:,}; expected a smaller member than that; lower --draft")
    return parts, draft, Tally(drafts / target)
