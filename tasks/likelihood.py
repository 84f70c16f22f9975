"""
How likely a model finds the choices of a question: requests (tasks.py) -> log-likelihoods.

The choices of a question share most of their tokens: ten shots of HellaSwag are a thousand, an ending is twenty. What
they share goes through the model once and stays in the KV cache, of which each choice gets a copy. The sums are those
of one forward per choice, since attention is causal; only the work differs. MMLU's letters need one row for all four.

Try it:  python eval.py --tasks hellaswag --limit 100      (says how many tokens it computed)
"""
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import KVCache, Llama
from plumbing.parallel import RANK, WORLD, autocast
from tasks.questions import Request

TOKENS = 4096  # in one forward: its logits take 2 GB with Llama 3's vocabulary


def computed(requests: list[Request]) -> int:
    """Tokens that go through the model for a batch: the prefix once a request, the rest of each row, padded."""
    prefix, rows = min(r.prefix for r in requests), [row for r in requests for row in r.rows]
    return len(requests) * prefix + len(rows) * (max(map(len, rows)) - prefix)


def batches_of(requests: list[Request], batch: int | None) -> list[list[int]]:
    """Indices of the requests, the longest first: if memory runs out, it does so at once. `batch` of them at a time; by
    default as many as keep what is computed under TOKENS, and under 1.5 times what they would need alone."""
    alone, batches = [computed([r]) for r in requests], []
    for i in sorted(range(len(requests)), key=lambda i: (-max(map(len, requests[i].rows)), -requests[i].prefix)):
        more = batches[-1] + [i] if batches else []
        if more and (len(more) <= batch if batch else computed([requests[i] for i in more]) <= min(
                TOKENS, 1.5 * sum(alone[i] for i in more))):
            batches[-1] = more
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def log_likelihoods(model: Llama, requests: list[Request], subnet=None, factors=None):
    """For each request, for each choice: (log p of its tokens in nats, was each of them the argmax); and the number of
    tokens that went through the model.

        prefix  BOS what all choices of a question share |         one row a question -> KV cache, copied per row
        rest                                             | first choice  PAD PAD          padding comes last: causal
                                                         | the second choice PAD          attention never sees it

    All requests of a batch are cut at the shortest of their prefixes, so both parts are rectangles.
    """
    device = model.tok_embeddings.weight.device
    prefix, rows = min(r.prefix for r in requests), [row for r in requests for row in r.rows]
    longest, cache = max(map(len, rows)), None
    run = lambda tokens: model(tokens.to(device), subnet=subnet, factors=factors, cache=cache)[0]
    with autocast(device):
        if prefix:
            cache = KVCache(longest)
            run(torch.tensor([r.rows[0][:prefix] for r in requests]))
            copies = torch.tensor([len(r.rows) for r in requests], device=device)
            cache.layers = {i: tuple(t.repeat_interleave(copies, 0) for t in kv) for i, kv in cache.layers.items()}
        logits = run(torch.tensor([row[prefix:] + [0] * (longest - len(row)) for row in rows]))  # rows, rest, vocab
    wanted, owner, first = [], [], 0  # (row, position, token) of every target; the choice it belongs to
    for r in requests:
        for row, targets in r.choices:
            start = len(r.rows[row]) - len(targets) - prefix
            wanted += [(first + row, start + i, token) for i, token in enumerate(targets)]
            owner.append(len(targets))
        first += len(r.rows)
    at, position, token = torch.tensor(wanted, device=device).T
    logits = logits[at, position]                                                                # targets, vocab
    log_p = logits.log_softmax(-1).gather(1, token[:, None])[:, 0].double().cpu().split(owner)
    greedy = (logits.argmax(-1) == token).cpu().split(owner)
    answers = iter([(p.sum().item(), g.all().item()) for p, g in zip(log_p, greedy)])
    return [[next(answers) for _ in r.choices] for r in requests], computed(requests)


def score(model: Llama, requests: list[Request], subnet=None, factors=None, batch: int | None = None, name=""):
    """log_likelihoods() of all requests in their order, and tokens computed; batches are shared among the ranks, which
    all get all of it."""
    batches, found, total = batches_of(requests, batch), {}, 0
    factors = None if factors is None else factors.to(model.tok_embeddings.weight.device)
    with tqdm(total=len(requests), desc=name, unit="row", leave=False, disable=None if RANK == 0 else True) as bar:
        for i, indices in enumerate(batches):
            if i % WORLD == RANK:
                answers, tokens = log_likelihoods(model, [requests[i] for i in indices], subnet, factors)
                found |= dict(zip(indices, answers))
                total += tokens
            bar.update(len(indices))
    parts = [(found, total)] * WORLD
    if dist.is_initialized():
        dist.all_gather_object(parts, (found, total))
    found = {i: answer for part, _ in parts for i, answer in part.items()}
    return [found[i] for i in range(len(requests))], sum(tokens for _, tokens in parts)
