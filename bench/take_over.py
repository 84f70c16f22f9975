"""
What does a KV cache cost that another member has filled? The loss of a member on the second half of
held-out windows, after it has read the first half itself, and after the whole model has read it.

    python -m bench.take_over --model out/flex

    own       sample.py --budget 1.0:64,0.5                 the member reads the text again
    taken     sample.py --budget 1.0:64,0.5 --take-over     it goes on with the whole model's cache
    +-        the standard error of their difference, over windows

Losses are in nats a token.
"""
import torch
import torch.nn.functional as F

from data.shards import Shards
from model import KVCache
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import Member, open_family
from plumbing.parallel import autocast, default_device, device_of
from plumbing.speculation import holds

BATCH = 16  # windows at once


@torch.no_grad()
def losses(reader: Member, writer: Member, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """Mean losses of `writer` on the second half of windows x, y (N, T), after `reader` has read the
    first: (N,). None if the cache lacks something that the writer needs."""
    half = x.size(1) // 2
    found = []
    for tokens, targets in zip(x.split(BATCH), y.split(BATCH)):
        cache = KVCache(x.size(1))
        reader.model(tokens[:, :half], subnet=reader.subnet, factors=reader.factors, cache=cache)
        if not holds(cache, writer):
            return None
        logits, _ = writer.model(tokens[:, half:], subnet=writer.subnet, factors=writer.factors, cache=cache)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, half:].flatten(), reduction="none")
        found.append(loss.view(len(tokens), -1).mean(1))
    return torch.cat(found)


def main(argv=None) -> None:
    """Prints a line per budget."""
    p = Parser("python -m bench.take_over", __doc__)
    p.add_argument("--model", default="out/flex", help="a supernet")
    p.add_argument("--data", help="its val split is read (default: the supernet's own)")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    p.add_argument("--windows", type=int, default=256)
    p.add_argument("--seq-len", type=int, help="(default: the supernet's)")
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    args = p.parse_args(argv)
    check_at_least_one(args, "windows")
    device = device_of(args.device)
    family = open_family(args.model, device)
    data = args.data or family.saved.get("data")
    T = args.seq_len or family.saved.get("seq_len")
    if data is None or T is None:
        fail(f"{args.model} does not say which text it is for; expected a supernet, or --data and --seq-len")
    if T < 2:
        fail(f"--seq-len {T} found; expected 2 or more, a half to read and a half to write")
    x, y = Shards(data, "val", T, family.model.config.vocab_size).windows(args.windows)
    x = x.to(device)
    y = y.to(device)
    whole = family.slice_member(1.0)
    print(f"{len(x)} windows of {T} tokens, loss on the second halves; the whole model's own: "
          f"{losses(whole, whole, x, y).mean():.4f}")
    print(f"{'budget':>6} {'own':>7} {'taken':>7} {'difference':>10} {'+-':>6}")
    with autocast(device):
        for budget in args.budgets:
            member = family.slice_member(budget)
            own = losses(member, member, x, y)
            taken = losses(whole, member, x, y)
            if taken is None:
                print(f"{budget:6.2f} {own.mean():7.4f}   the whole model's cache has other KV heads")
                continue
            difference = taken - own
            error = difference.std() / len(x) ** 0.5
            print(f"{budget:6.2f} {own.mean():7.4f} {taken.mean():7.4f} "
                  f"{difference.mean():+10.4f} {error:6.4f}")


if __name__ == "__main__":
    run_main(main)
