"""
How likely a model finds the choices of a question: questions -> requests -> log-likelihoods.

The choices of a question share most of their tokens: ten shots of HellaSwag are a thousand, an ending
is twenty. The shared ones go through the model once and stay in the KV cache, and each choice gets a
copy. Attention is causal, so the sums are those of one forward for each choice; only the work
differs. MMLU's four letters need one row between them.

    python eval.py --tasks hellaswag --limit 100       # says how many tokens it computed
"""
from typing import Callable, Iterator, NamedTuple

import torch
import torch.distributed as dist

from data.tokenizer import encode_document
from model import NOWHERE, KVCache, Llama
from plumbing.errors import fail
from plumbing.parallel import RANK, WORLD, autocast, bar
from tasks.questions import Question

FORWARD_TOKENS = 4096  # in one forward at most: its logits take 2 GB with Llama 3's vocabulary
Tokens = list[int]

# -----------------------------------------------------------------------------
# questions -> requests


class Request(NamedTuple):
    """A question in tokens.

    rows: the distinct inputs of the model. choices: for each choice the row that it reads, and the
    tokens that the last positions of that row should predict. prefix: how many first tokens all
    rows share, and none of which has to predict a target. cut: the context did not fit the window."""
    rows: list[Tokens]
    choices: list[tuple[int, Tokens]]
    prefix: int
    cut: bool


def requests_of(questions: list[Question], tokenizer, window: int) -> Iterator[Request]:
    """Each question in tokens, for a model that reads `window` tokens at most."""
    for question in questions:
        yield request_of(question, tokenizer, window)


def request_of(question: Question, tokenizer, window: int) -> Request:
    """BOS, context and continuation of each choice, cut at the left to fit the window.

    A continuation that does not fit alone: fail()."""
    encoded = {}  # the choices share their context: each text is encoded once

    def encode(text: str) -> Tokens:
        if text not in encoded:
            encoded[text] = encode_document(tokenizer, text).tolist()
        return encoded[text]

    rows = []
    choices = []
    cut = False
    for context, continuation in question.pairs:
        first, targets = pair_tokens(encode, context, continuation)
        if not 0 < len(targets) <= window:
            fail(f"{question.where}: {continuation[:60]!r} has {len(targets)} tokens, expected 1 to "
                 f"{window}, the model's window; mend that row, or give another --seq-len")
        whole = first + targets
        row = whole[-(window + 1):-1]  # the last token is predicted, never read
        if len(row) + 1 < len(whole):
            cut = True
        if row not in rows:
            rows.append(row)
        choices.append((rows.index(row), targets))
    return Request(rows, choices, shared_prefix(rows, choices), cut)


def pair_tokens(encode: Callable[[str], Tokens], context: str, continuation: str):
    """(tokens of the context, tokens of the continuation) as they are in the text of both.

    Blanks at the context's end belong to the continuation: a word's token begins with its blank."""
    first = encode(context.rstrip())
    whole = encode(context + continuation)
    return first, whole[len(first):]


def shared_prefix(rows: list[Tokens], choices: list[tuple[int, Tokens]]) -> int:
    """How many first tokens all rows share, and none of which has to predict a target."""
    unused = min(len(rows[row]) - len(targets) for row, targets in choices)
    for at in range(unused):
        if any(row[at] != rows[0][at] for row in rows):
            return at
    return unused


# -----------------------------------------------------------------------------
# batches


def rows_of(requests: list[Request]) -> list[Tokens]:
    """All rows of a batch, those of one request side by side."""
    return [row for request in requests for row in request.rows]


def shortest_prefix(requests: list[Request]) -> int:
    """Where all requests of a batch are cut, so that both parts of it are rectangles."""
    return min(request.prefix for request in requests)


def longest_row(request: Request) -> int:
    """In tokens."""
    return max(map(len, request.rows))


def tokens_computed(requests: list[Request]) -> int:
    """Tokens that go through the model for a batch: the prefix once for each request, then the rest
    of each row, padded."""
    prefix = shortest_prefix(requests)
    rest = max(map(longest_row, requests)) - prefix
    return len(requests) * prefix + len(rows_of(requests)) * rest


def tokens_unshared(requests: list[Request]) -> int:
    """Tokens of all rows: what scoring takes that shares no prefix, and pads nothing."""
    return sum(map(len, rows_of(requests)))


def fits(requests: list[Request], batch: int | None) -> bool:
    """May these requests go through the model together?

    `batch` of them may. Without a batch: what is computed stays under FORWARD_TOKENS, and under 1.5
    times what the requests would need alone. In a large batch the common prefix is short and the
    padding long, so where choices share little, as in PIQA, it could cost more than it saves: it
    stays under what nothing shared would take, too (but for 5 %, or no two questions would fit)."""
    if batch is not None:
        return len(requests) <= batch
    alone = sum(tokens_computed([request]) for request in requests)
    most = max(1.05 * alone, min(1.5 * alone, tokens_unshared(requests)))
    return tokens_computed(requests) <= min(FORWARD_TOKENS, most)


def batches_of(requests: list[Request], batch: int | None) -> list[list[int]]:
    """Indices of the requests, the longest first: if memory runs out, it does so at once."""
    def size(i: int) -> tuple[int, int]:
        return longest_row(requests[i]), requests[i].prefix

    batches = []
    for i in sorted(range(len(requests)), key=size, reverse=True):
        together = [requests[j] for j in batches[-1]] if batches else []
        together.append(requests[i])
        if batches and fits(together, batch):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


# -----------------------------------------------------------------------------
# log-likelihoods


def logits_at(model: Llama, requests: list[Request], subnet, factors, at) -> torch.Tensor:
    """Logits of a batch at n places, (n, vocab). at: (rows, positions behind the prefix), n each.

        prefix  BOS, what the choices of a question share |     one row a question -> KV cache, copied
        rest                                              | first choice  PAD PAD      causal attention
                                                          | the second choice PAD      never sees the PADs
    """
    device = model.tok_embeddings.weight.device
    prefix = shortest_prefix(requests)
    rows = rows_of(requests)
    longest = max(map(len, rows))
    padded = [row[prefix:] + [0] * (longest - len(row)) for row in rows]
    rest = torch.tensor(padded).to(device)  # (rows, rest)
    cache = None
    with autocast(device):
        if prefix > 0:
            # The prefix of each request once; then its keys and values once for each row.
            shared = [request.rows[0][:prefix] for request in requests]
            shared = torch.tensor(shared).to(device)  # (requests, prefix)
            cache = KVCache(longest)
            model(shared, subnet=subnet, factors=factors, cache=cache, at=NOWHERE)
            copies = torch.tensor([len(request.rows) for request in requests], device=device)
            for layer, (keys, values) in list(cache.layers.items()):
                keys = keys.repeat_interleave(copies, 0)  # (rows, ...)
                values = values.repeat_interleave(copies, 0)
                cache.layers[layer] = keys, values
        logits, _ = model(rest, subnet=subnet, factors=factors, cache=cache, at=at)
    return logits


@torch.no_grad()
def log_likelihoods(model: Llama, requests: list[Request], subnet=None, factors=None):
    """For each request, for each choice: (log p of its tokens in nats, was each of them the argmax)."""
    # Where each target is predicted, and how many targets each choice has.
    prefix = shortest_prefix(requests)
    rows = []
    positions = []
    targets = []
    sizes = []
    first = 0  # row of the batch with which a request begins
    for request in requests:
        for row, tokens in request.choices:
            start = len(request.rows[row]) - len(tokens) - prefix
            rows += [first + row] * len(tokens)
            positions += range(start, start + len(tokens))
            targets += tokens
            sizes.append(len(tokens))
        first += len(request.rows)
    # Each target's log p, and whether it is the most likely token there.
    logits = logits_at(model, requests, subnet, factors, (rows, positions))  # (targets, vocab)
    targets = torch.tensor(targets, device=logits.device)  # (targets,)
    greedy = logits.argmax(-1) == targets  # (targets,)
    log_p = logits.log_softmax(-1)
    log_p = log_p.gather(1, targets[:, None])[:, 0]  # (targets,)
    # Over the targets of each choice: the sum, and all.
    sums = [part.sum().item() for part in log_p.double().cpu().split(sizes)]
    hits = [part.all().item() for part in greedy.cpu().split(sizes)]
    answers = iter(zip(sums, hits))
    return [[next(answers) for _ in request.choices] for request in requests]


def score(model: Llama, requests: list[Request], subnet=None, factors=None, batch: int | None = None,
          name: str = ""):
    """(log_likelihoods() of all requests in their order, number of tokens computed).

    subnet, factors: what runs. batch: requests a forward, None: as many as fit(). The batches are
    shared among the ranks; all ranks get all answers."""
    if factors is not None:
        factors = factors.to(model.tok_embeddings.weight.device)
    answers = {}  # index of a request -> its answer
    computed = 0
    with bar(name=name, total=len(requests), unit="row") as progress:
        for number, indices in enumerate(batches_of(requests, batch)):
            if number % WORLD == RANK:
                some = [requests[i] for i in indices]
                found = log_likelihoods(model, some, subnet, factors)
                answers.update(zip(indices, found))
                computed += tokens_computed(some)
            progress.update(len(indices))
    if dist.is_initialized():
        parts = [None] * WORLD
        dist.all_gather_object(parts, (answers, computed))
        answers = {i: answer for part, _ in parts for i, answer in part.items()}
        computed = sum(tokens for _, tokens in parts)
    return [answers[i] for i in range(len(requests))], computed
