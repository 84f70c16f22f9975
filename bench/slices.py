"""
What a slice costs to run, side by side in one process: sliced, masked, and exported, against the
full model.

    python -m bench.slices                        a random Llama of dim 512 on this machine
    python -m bench.slices --model out/flex       a folder (supernet or plain Llama)
    python -m bench.slices --cut depth            whole layers go, instead of a share of every axis
    python -m bench.slices --device cuda --dim 2048 --heads 32 --kv-heads 8 --ffn-dim 8192

    sliced      the full model's forward, told which SubNet to run
    masked      the full model's forward with ones and zeros as gates: what masking costs instead
    exported    the slice as a Llama of its own

All ways take turns in every round, so a busy machine slows them alike. A row is the median over the
rounds of its time divided by the full model's in the same round. Then the same for generating text,
with the KV cache and without.
"""
import argparse
import json
import statistics
import sys
from typing import Callable, NamedTuple

import torch

from bench.speed import native_llama
from model import LAST, Gates, Llama, LlamaConfig, SubNet
from plumbing.errors import Parser, fail, run_main
from plumbing.family import open_family
from plumbing.latency import seconds
from plumbing.parallel import autocast, default_device, device_of
from sample import generate
from space import AXES, Space, cost

CUTS = ("all", "width", "depth")


class Variant(NamedTuple):
    """One way to run a slice: model(tokens, targets, **arguments)."""
    model: Llama
    subnet: SubNet
    arguments: dict


# -----------------------------------------------------------------------------
# what is compared


def choices_of_cut(cut: str, config: LlamaConfig) -> dict:
    """The sizes that may be chosen from where one of CUTS shrinks, for Space(config, ...)."""
    if cut == "width":
        return {"n_layers": [config.n_layers]}
    if cut == "depth":
        whole = {axis: [getattr(config, axis)] for axis in AXES}
        return whole | {"n_layers": range(1, config.n_layers + 1)}
    return {}


def prefix_gates(space: Space, subnet: SubNet, device) -> Gates:
    """The slice as hard gates on the full network."""
    chosen = []
    for axis, size in zip(AXES, space.sizes(subnet)):
        chosen += [float(choice == size) for choice in space.choices[axis]]
    return space.gates(torch.tensor(chosen, device=device))


def variants(model: Llama, space: Space, route: Callable, budgets, device) -> dict:
    """(budget, way) -> the Variant. The full model is (1.0, "full"). route: budget -> SubNet."""
    found = {(1.0, "full"): Variant(model, model.full, {})}
    for budget in sorted(budgets, reverse=True):
        if budget >= 1:
            continue
        subnet = route(budget)
        gates = prefix_gates(space, subnet, device)
        native = native_llama(model, subnet, device, torch.float32)
        found[budget, "sliced"] = Variant(model, subnet, dict(subnet=subnet))
        found[budget, "masked"] = Variant(model, subnet, dict(gates=gates))
        found[budget, "exported"] = Variant(native, subnet, {})
    return found


# -----------------------------------------------------------------------------
# timing


def time_variants(found: dict, tokens: torch.Tensor, rounds: int, device) -> dict:
    """For each variant its time over the full model's in the same round, the median over the
    rounds: `forward`, and `both` for forward and backward; and `ms` of both. tokens: (batch, T)."""
    def forward(variant: Variant):
        with torch.no_grad(), autocast(device):
            variant.model(tokens, tokens, **variant.arguments)

    def both(variant: Variant):
        variant.model.zero_grad(set_to_none=True)
        with autocast(device):
            loss = variant.model(tokens, tokens, **variant.arguments)[1]
        loss.backward()

    kinds = {"forward": forward, "both": both}
    times = {key: {kind: [] for kind in kinds} for key in found}
    for r in range(rounds + 1):
        for kind, run in kinds.items():
            for key, variant in found.items():
                took = seconds(lambda: run(variant), device)
                if r > 0:  # round 0 warms up
                    times[key][kind].append(took)

    full = times[1.0, "full"]
    rows = {}
    for key in found:
        took = times[key]
        rows[key] = dict(forward=median_ratio(took["forward"], full["forward"]),
                         both=median_ratio(took["both"], full["both"]),
                         ms=1000 * statistics.median(took["both"]))
    return rows


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios, round by round."""
    return statistics.median(time / other for time, other in zip(times, others))


def time_generation(model: Llama, found: dict, tokens: torch.Tensor, rounds: int, device) -> dict:
    """For each budget: `cached`, the time to generate with the KV cache over the full model's, and
    `recomputed`, the time without the cache over that with it. Half of tokens (T,) is the prompt,
    as many are generated."""
    prompt = tokens[:len(tokens) // 2].tolist()
    new = len(tokens) - len(prompt)

    def cached(subnet: SubNet):
        with autocast(device):
            list(generate(model, prompt, new, subnet, temperature=0))

    @torch.no_grad()
    def recomputed(subnet: SubNet):
        text = list(prompt)
        for _ in range(new):
            with autocast(device):
                logits = model(torch.tensor([text], device=device), subnet=subnet, at=LAST)[0]
            text.append(logits[0].argmax().item())

    subnets = {}
    for (budget, way), variant in found.items():
        if way in ("full", "sliced"):
            subnets[budget] = variant.subnet
    times = {(budget, run): [] for budget in subnets for run in (cached, recomputed)}
    for r in range(rounds + 1):
        for (budget, run), took in times.items():
            passed = seconds(lambda: run(subnets[budget]), device)
            if r > 0:  # round 0 warms up
                took.append(passed)

    rows = {}
    for budget in subnets:
        took = times[budget, cached]
        rows[budget] = dict(cached=median_ratio(took, times[1.0, cached]),
                            recomputed=median_ratio(times[budget, recomputed], took))
    return rows


# -----------------------------------------------------------------------------
# the command line


def add_shape(p: argparse.ArgumentParser) -> None:
    """Flags of a Llama's shape, of the machine and of the measurement."""
    p.add_argument("--dim", type=int, default=512)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--head-dim", type=int, default=64)
    p.add_argument("--ffn-dim", type=int, default=1536)
    p.add_argument("--vocab-size", type=int, default=1280)
    p.add_argument("--batch", type=int, default=4, help="sequences")
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", choices=["cpu", "cuda"],
                   default=default_device())
    p.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")


def shape_of(args: argparse.Namespace) -> LlamaConfig:
    """The Llama that the flags describe, or fail()."""
    sizes = (args.rounds, args.batch, args.dim, args.layers, args.heads, args.kv_heads,
             args.ffn_dim, args.vocab_size)
    uneven_heads = min(sizes) > 0 and args.heads % args.kv_heads
    odd_head_dim = args.head_dim < 2 or args.head_dim % 2
    if min(sizes) < 1 or args.seq_len < 2 or uneven_heads or odd_head_dim:
        fail("a size under 1, an odd --head-dim, or heads that do not divide among KV heads; "
             "expected a Llama's shape, as in --help")
    return LlamaConfig(dim=args.dim, n_layers=args.layers,
                       n_heads=args.heads, n_kv_heads=args.kv_heads, head_dim=args.head_dim,
                       ffn_dim=args.ffn_dim, vocab_size=args.vocab_size)


def opened(args: argparse.Namespace, device) -> tuple[Llama, Space, Callable]:
    """(the Llama to measure, what there is to choose from, budget -> SubNet)."""
    config = shape_of(args)
    router = None
    if args.model:
        family = open_family(args.model, device)
        model = family.model
        router = family.router
    else:
        model = Llama(config).init_weights().to(device)
    if router:
        if args.cut != "all":
            fail(f"--cut {args.cut} found; {args.model} has a router, which chooses what to cut; "
                 "leave --cut out")
        return model, router.space, router.route
    try:
        space = Space(model.config, choices_of_cut(args.cut, model.config))
    except ValueError as error:
        fail(str(error))
    return model, space, space.uniform  # nobody has learned what to cut: all axes shrink alike


def say_times(rows: dict, found: dict, config: LlamaConfig) -> list[dict]:
    """Prints the first table on stderr; returns its rows for --json."""
    print(" budget   cost       way  forward  fwd+bwd   (time over the full model's)",
          file=sys.stderr)
    table = []
    for (budget, way), row in rows.items():
        got = cost(config, found[budget, way].subnet)
        forward, both = row["forward"], row["both"]
        print(f"{budget:7.2f} {got:6.3f} {way:>9} {forward:8.3f} {both:8.3f}", file=sys.stderr)
        table.append(dict(budget=budget, cost=got, way=way, forward=forward, both=both))
    return table


def say_generation(rows: dict) -> list[dict]:
    """Prints the second table on stderr; returns its rows for --json."""
    print("\n budget  generate (time over the full model's)    without KV cache (over with it)",
          file=sys.stderr)
    for budget, row in rows.items():
        print(f"{budget:7.2f} {row['cached']:9.3f} {'':29} {row['recomputed']:17.2f}",
              file=sys.stderr)
    return [dict(budget=budget, **row) for budget, row in rows.items()]


def main(argv=None) -> None:
    """Prints the tables on stderr, with --json also one JSON line on stdout."""
    p = Parser("python -m bench.slices", __doc__)
    p.add_argument("--model", help="a folder to measure (default: random weights of this shape)")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    p.add_argument("--cut", choices=CUTS, default="all",
                   help="what shrinks, of random weights or a plain Llama")
    add_shape(p)
    args = p.parse_args(argv)

    # What is compared.
    device = device_of(args.device)
    model, space, route = opened(args, device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.seq_len), generator=generator)
    tokens = tokens.to(device)
    found = variants(model, space, route, args.budgets, device)

    # One forward, and forward with backward.
    rows = time_variants(found, tokens, args.rounds, device)
    ms = rows[1.0, "full"]["ms"]
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"{args.batch} x {args.seq_len} tokens, dim {model.config.dim}; "
          f"full model {ms:.0f} ms forward+backward, {tokens.numel() / ms * 1000:,.0f} tok/s",
          file=sys.stderr)
    table = say_times(rows, found, model.config)

    # Text, token by token.
    text = time_generation(model, found, tokens[0], args.rounds, device)
    generated = say_generation(text)
    if args.json:
        print(json.dumps(dict(device=args.device, rows=table, generation=generated)))


if __name__ == "__main__":
    run_main(main)
