"""
Does drafting pay? The speed of speculative decoding over plain decoding, draft by draft and K by K,
beside what theory makes of the acceptance and the cost.

    python -m bench.speculative                        a random Llama of dim 512
    python -m bench.speculative --model out/flex       a family, on held-out text of its data
    python -m bench.speculative --model out/flex --log out/drafts.jsonl      goes on where it stopped

    cost      a forward of the draft on one token over one of the target
    verify    a forward of the target on K + 1 tokens over one on a single token
    theory    tokens a round / (K cost + 1): Leviathan et al. 2023, Theorem 3.8, where verify is 1
    ours      tokens a round / (K cost + verify)
    speed     the time of plain decoding over that of speculative decoding, of the same prompts

Times are taken in turn with plain decoding's, and medians over rounds count (plumbing/latency.py).
The random Llama has later units that weigh less, as a ranking leaves them: each axis falls from 1 to
--tail. So its slices are often right, without training. How often is that number's affair: look at
its costs and at how speed follows theory, and not at its acceptance.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench.slices import add_shape, shape_of
from data.shards import Shards
from model import KVCache, Llama
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import Member, open_family
from plumbing.latency import fractions
from plumbing.parallel import autocast, device_of
from plumbing.speculation import Tally, speedup
from sample import generate, speculate
from space import Space, cost

TEMPERATURES = {"greedy": 0.0, "sampled": 0.8}


class Row(NamedTuple):
    """What was measured for one draft and one K."""
    draft: float
    mode: str           # greedy or sampled
    k: int
    acceptance: float
    tokens: float       # a round's
    cost: float
    verify: float
    theory: float
    ours: float
    speed: float


# -----------------------------------------------------------------------------
# what is measured


@torch.no_grad()
def faded(model: Llama, space: Space, tail: float) -> Llama:
    """The model with later units that weigh less, in place: channels, neurons, query heads of a KV
    group, and layers in the order of `space` fall from 1 to tail, geometrically."""
    def weights(n: int) -> torch.Tensor:
        return tail ** torch.linspace(0, 1, n)

    channels = weights(model.config.dim)
    model.tok_embeddings.weight.mul_(channels)
    model.output.weight.mul_(5)  # logits as wide as a trained model's
    of_layers = weights(model.config.n_layers)
    for place, layer in enumerate(space.layer_order):
        block = model.layers[layer]
        attention = block.attention
        in_group = attention.n_heads // attention.groups
        heads = weights(in_group).repeat(attention.groups)
        wo = attention.wo.weight
        wo.mul_(heads.repeat_interleave(attention.head_dim))
        w2 = block.feed_forward.w2.weight
        w2.mul_(weights(w2.size(1)))
        for w in (wo, w2):
            w.mul_(channels[:, None] * of_layers[place])
    return model


def opened(args: argparse.Namespace, device) -> tuple[dict[float, Member], list[list[int]]]:
    """(the target at 1.0 and the drafts, prompts), of a family or of a random Llama."""
    n = args.prompt_tokens
    if args.model is None:
        space = Space(shape_of(args))
        model = faded(Llama(space.config).init_weights(), space, args.tail).to(device)
        members = {1.0: Member(model, model.full)}
        for budget in args.drafts:
            members[budget] = Member(model, space.uniform(budget))
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(space.config.vocab_size, (args.batch, n), generator=generator)
        return members, prompts.tolist()

    family = open_family(args.model, device)
    members = {budget: family.slice_member(budget) for budget in (1.0, *args.drafts)}
    data = args.data or family.saved.get("data")
    if data is None:
        fail(f"{args.model} does not say which text it is for; expected a supernet, or --data DIR")
    val = Shards(data, "val", n, family.model.config.vocab_size)
    prompts, _ = val.windows(args.batch)
    return members, prompts.tolist()


@torch.no_grad()
def costs_of(members: dict[float, Member], ks: list[int], length: int, rounds: int,
             device) -> tuple[dict[float, float], dict[int, float]]:
    """(cost of each draft, verify of each K), behind `length` cached tokens, batch 1."""
    def forward(member: Member, T: int):
        """A forward of a member on T tokens behind the cached ones, to be timed."""
        cache = KVCache(length + max(ks) + 1)
        tokens = torch.zeros(1, length, dtype=torch.long, device=device)
        arguments = dict(subnet=member.subnet, factors=member.factors, cache=cache)
        member.model(tokens, **arguments)

        def run():
            cache.length = length  # what the last run read is forgotten
            member.model(tokens[:, :T], **arguments)
        return run

    target = members[1.0]
    runs = {"full": forward(target, 1)}
    for budget in members:
        runs["draft", budget] = forward(members[budget], 1)
    for k in ks:
        runs["verify", k] = forward(target, k + 1)
    took = fractions(runs, device, max(rounds, 9))  # short ones: a few more
    cost_of = {budget: took["draft", budget] for budget in members}
    return cost_of, {k: took["verify", k] for k in ks}


def measure(members, draft: float, mode: str, prompts: list[list[int]], cost_of, verify,
            args: argparse.Namespace, device) -> list[Row]:
    """A row for each K. Prompts are continued one at a time."""
    how = dict(temperature=TEMPERATURES[mode], top_k=args.top_k)
    target = members[1.0]
    tallies = {}

    def plain() -> None:
        for prompt in prompts:
            list(generate(target.model, prompt, args.tokens, target.subnet, target.factors, **how))

    def drafted(k: int):
        def run() -> None:
            tallies[k] = Tally(cost_of[draft])
            for prompt in prompts:
                generator = torch.Generator(device=device).manual_seed(0)
                list(speculate(target, members[draft], [prompt], args.tokens, tallies[k], k,
                               generator=generator, **how))
        return run

    runs = {"full": plain}
    for k in args.k:
        runs[k] = drafted(k)
    took = fractions(runs, device, args.rounds)

    rows = []
    for k in args.k:
        tally = tallies[k]
        acceptance = tally.acceptance()
        theory = speedup(acceptance, cost_of[draft], k)
        a_round = theory * (k * cost_of[draft] + 1)
        ours = a_round / (k * cost_of[draft] + verify[k])
        rows.append(Row(draft, mode, k, acceptance, tally.tokens / tally.rounds, cost_of[draft],
                        verify[k], theory, ours, 1 / took[k]))
    return rows


# -----------------------------------------------------------------------------
# what is printed


def say(rows: list[Row]) -> None:
    """A line per K."""
    for r in rows:
        print(f"{r.draft:6.2f} {r.mode:>8} {r.k:3d} {r.acceptance:8.2f} {r.tokens:7.2f} {r.cost:6.2f} "
              f"{r.verify:7.2f} {r.theory:7.2f} {r.ours:6.2f} {r.speed:6.2f}", flush=True)


def verdict(rows: list[Row]) -> str:
    """Did anything pay?"""
    best = max(rows, key=lambda row: row.speed)
    if best.speed > 1:
        return (f"the fastest: {best.draft:g} drafts {best.k} tokens, {best.mode}, "
                f"{best.speed:.2f} times plain decoding")
    promised = max(rows, key=lambda row: row.theory)
    return (f"drafting does not pay here: at best {best.speed:.2f} times plain decoding; theory says "
            f"{promised.theory:.2f}, without what Python takes for each forward")


def measured_before(log: str | None, settings: dict) -> list[Row]:
    """The rows of a log that were measured with these settings."""
    if log is None or not Path(log).is_file():
        return []
    found = []
    for line in Path(log).read_text(encoding="utf-8").splitlines():
        saved = json.loads(line)
        if saved["settings"] == settings:
            found += [Row(*row) for row in saved["rows"]]
    return found


def parse_args(argv=None) -> argparse.Namespace:
    """The flags."""
    p = Parser("python -m bench.speculative", __doc__)
    p.add_argument("--model", help="a supernet (default: random weights of the shape below)")
    p.add_argument("--data", help="of --model: its val split gives prompts (default: its own)")
    p.add_argument("--drafts", type=float, nargs="+", default=[0.8, 0.6, 0.4], help="their budgets")
    p.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 7, 8], help="drafted tokens")
    p.add_argument("--modes", choices=list(TEMPERATURES), nargs="+", default=list(TEMPERATURES),
                   help="temperature 0, or 0.8")
    p.add_argument("--top-k", type=int, default=50)
    p.add_argument("--tokens", type=int, default=64, help="written to each prompt")
    p.add_argument("--prompt-tokens", type=int, default=16)
    p.add_argument("--tail", type=float, default=0.02, help="weight of a random Llama's last units")
    p.add_argument("--log", help="file of JSON lines: what is in it is not measured again")
    add_shape(p)
    p.set_defaults(rounds=3, batch=2)
    args = p.parse_args(argv)
    check_at_least_one(args, "rounds", "batch", "tokens", "prompt_tokens")
    if min(args.k) < 1 or not 0 < args.tail <= 1 or not all(0 < b < 1 for b in args.drafts):
        fail(f"--k {min(args.k)} --tail {args.tail:g} --drafts {args.drafts}: expected 1 or more, a "
             "number in (0, 1], and budgets between 0 and 1")
    return args


def main(argv=None) -> None:
    """Prints a line for each draft, mode and K, and a verdict."""
    args = parse_args(argv)
    device = device_of(args.device)
    members, prompts = opened(args, device)
    config = members[1.0].model.config
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; dim {config.dim}, "
          f"{config.n_layers} layers; {len(prompts)} prompts of {args.prompt_tokens} tokens, one at a "
          f"time, {args.tokens} new ones each; medians over {args.rounds} rounds")
    print("drafts: " + ", ".join(f"{b:g} has {cost(config, members[b].subnet):.3f}" for b in args.drafts))
    print(f"{'draft':>6} {'':>8} {'K':>3} {'accepted':>8} {'a round':>7} {'cost':>6} {'verify':>7} "
          f"{'theory':>7} {'ours':>6} {'speed':>6}   (times plain decoding)")

    settings = {key: value for key, value in vars(args).items() if key not in ("log", "drafts", "modes")}
    rows = measured_before(args.log, settings)
    say(rows)
    done = {(row.draft, row.mode) for row in rows}
    todo = [(b, mode) for b in args.drafts for mode in args.modes if (b, mode) not in done]
    with torch.no_grad(), autocast(device):
        if todo:
            length = args.prompt_tokens + args.tokens // 2
            cost_of, verify = costs_of(members, args.k, length, args.rounds, device)
        for draft, mode in tqdm(todo, "drafts", leave=False, disable=None):
            found = measure(members, draft, mode, prompts, cost_of, verify, args, device)
            say(found)
            rows += found
            if args.log:
                Path(args.log).parent.mkdir(parents=True, exist_ok=True)
                with open(args.log, "a", encoding="utf-8") as f:
                    f.write(json.dumps(dict(settings=settings, rows=found)) + "\n")
    print(verdict(rows), file=sys.stdout)


if __name__ == "__main__":
    run_main(main)
