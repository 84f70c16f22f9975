"""
What a slice costs to run, side by side in one process: sliced, masked, and exported, against the full model.

    python bench.py                          a random Llama of dim 512 on this machine
    python bench.py --model out/flex         a folder (supernet or plain Llama)
    python bench.py --cut depth              whole layers go, instead of a share of every axis
    python bench.py --device cuda --dim 2048 --layers 16 --heads 32 --kv-heads 8 --ffn-dim 8192 --vocab-size 128256

All variants take turns in every round, so a busy machine slows them alike; a row is the median over rounds of its
time divided by the full model's in the same round. Then the same for generating text, with the KV cache and without.
"""
import argparse
import json
import statistics
import sys

import torch

from plumbing.checkpoint import load_llama
from plumbing.latency import seconds
from model import Gates, Llama, LlamaConfig, SubNet
from router import load_router
from sample import generate
from bench.speed import slim
from space import AXES, Space, cost
from plumbing.errors import fail
from plumbing.parallel import autocast, device_of


# which sizes a slice of random weights has to choose from
CUTS = {"all": lambda c: {}, "width": lambda c: {"n_layers": [c.n_layers]},
        "depth": lambda c: {axis: [getattr(c, axis)] for axis in AXES} | {"n_layers": range(1, c.n_layers + 1)}}


def prefix_gates(space: Space, subnet: SubNet, device) -> Gates:
    """The slice as hard gates on the full network: what masking costs instead of slicing."""
    chosen = torch.cat([torch.tensor([float(c == size) for c in space.choices[axis]])
                        for axis, size in zip(AXES, space.sizes(subnet))])
    return space.gates(chosen.to(device))


def variants(model: Llama, space: Space, route, budgets, device) -> dict[tuple, dict]:
    """(budget, way) -> the model to call and its arguments."""
    calls = {(1.0, "full"): dict(model=model, kwargs={})}
    for b in sorted((b for b in budgets if b < 1), reverse=True):
        subnet = route(b)
        calls[b, "sliced"] = dict(model=model, kwargs=dict(subnet=subnet), subnet=subnet)
        calls[b, "masked"] = dict(model=model, kwargs=dict(gates=prefix_gates(space, subnet, device)), subnet=subnet)
        calls[b, "exported"] = dict(model=slim(model, subnet, device, torch.float32), kwargs={}, subnet=subnet)
    return calls


def measure(calls: dict, tokens, rounds: int, device) -> dict[tuple, dict]:
    """Median over rounds of each variant's time over the full model's in that round, forward and forward+backward."""
    def forward(call):
        with torch.no_grad(), autocast(device):
            call["model"](tokens, tokens, **call["kwargs"])

    def both(call):
        call["model"].zero_grad(set_to_none=True)
        with autocast(device):
            loss = call["model"](tokens, tokens, **call["kwargs"])[1]
        loss.backward()

    times = {key: dict(forward=[], both=[]) for key in calls}
    for r in range(rounds + 1):  # round 0 warms up
        for kind, run in (("forward", forward), ("both", both)):
            for key, call in calls.items():
                took = seconds(lambda: run(call), device)
                if r:
                    times[key][kind].append(took)
    full = times[1.0, "full"]
    return {key: {kind: statistics.median(t / f for t, f in zip(times[key][kind], full[kind])) for kind in full}
            | dict(ms=1000 * statistics.median(times[key]["both"])) for key in calls}


def generation(model: Llama, calls: dict, tokens, rounds: int, device) -> dict[float, dict]:
    """Per budget: time per token with the KV cache over the full model's, and time without the cache over that with it;
    half of tokens (T,) is the prompt, as many are generated."""
    prompt = tokens[:len(tokens) // 2].tolist()
    n = len(tokens) - len(prompt)

    @torch.no_grad()
    def recompute(subnet):
        text = list(prompt)
        for _ in range(n):
            with autocast(device):
                text.append(model(torch.tensor([text], device=device), subnet=subnet)[0][0, -1].argmax().item())

    def cached(subnet):
        with autocast(device):
            list(generate(model, prompt, n, subnet, temperature=0))

    subnets = {b: call.get("subnet", model.full) for (b, way), call in calls.items() if way in ("full", "sliced")}
    times = {(b, run): [] for b in subnets for run in (cached, recompute)}
    for r in range(rounds + 1):  # round 0 warms up
        for (b, run), took in times.items():
            took.append(seconds(lambda: run(subnets[b]), device))
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(a[1:], b[1:]))
    return {b: dict(cached=ratio(times[b, cached], times[1.0, cached]),
                    recomputed=ratio(times[b, recompute], times[b, cached])) for b in subnets}


def add_shape(p: argparse.ArgumentParser) -> None:
    """Flags of a Llama's shape, of the machine and of the measurement."""
    shape = dict(dim=512, layers=6, heads=8, kv_heads=4, head_dim=64, ffn_dim=1536, vocab_size=1280)
    for flag, default in shape.items():
        p.add_argument(f"--{flag.replace('_', '-')}", type=int, default=default)
    p.add_argument("--batch", type=int, default=4, help="sequences")
    p.add_argument("--seq-len", type=int, default=256)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", action="store_true")


def shape_of(args: argparse.Namespace) -> LlamaConfig:
    """The Llama that the flags describe."""
    sizes = (args.rounds, args.batch, args.dim, args.layers, args.heads, args.kv_heads, args.ffn_dim, args.vocab_size)
    if min(sizes) < 1 or args.seq_len < 2 or args.heads % args.kv_heads or args.head_dim < 2 or args.head_dim % 2:
        fail("a size under 1, an odd --head-dim, or heads that do not divide among KV heads; expected a Llama's shape, "
             "as in --help")
    return LlamaConfig(dim=args.dim, n_layers=args.layers, n_heads=args.heads, n_kv_heads=args.kv_heads,
                       head_dim=args.head_dim, ffn_dim=args.ffn_dim, vocab_size=args.vocab_size)


def main(argv=None) -> None:
    """Prints the table on stderr, with --json also one JSON line on stdout."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python bench.py --help lists the flags")
    p.add_argument("--model", help="a folder to measure (default: random weights of the shape below)")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    p.add_argument("--cut", choices=list(CUTS), default="all", help="what shrinks, of random weights or a plain Llama")
    add_shape(p)
    args = p.parse_args(argv)
    config, device = shape_of(args), device_of(args.device)
    if args.model:
        model, router = load_llama(args.model, device), None
        router = load_router(args.model, model.config)
    else:
        model, router = Llama(config).init_weights().to(device), None
    if router and args.cut != "all":
        fail(f"--cut {args.cut} found; {args.model} has a router, which chooses what to cut; leave --cut out")
    try:
        space = router.space if router else Space(model.config, CUTS[args.cut](model.config))
    except ValueError as error:
        fail(str(error))
    route = router.route if router else space.uniform  # nobody has learned what to cut: shrink all axes alike
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.seq_len),
                           generator=torch.Generator().manual_seed(0)).to(device)
    calls = variants(model, space, route, args.budgets, device)
    rows = measure(calls, tokens, args.rounds, device)
    ms = rows[1.0, "full"]["ms"]
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.batch} x {args.seq_len} "
          f"tokens, dim {model.config.dim}; full model {ms:.0f} ms forward+backward, {tokens.numel() / ms * 1000:,.0f} "
          f"tok/s\n{'budget':>7} {'cost':>6} {'way':>9} {'forward':>8} {'fwd+bwd':>8}   (time over the full model's)",
          file=sys.stderr)
    table = []
    for (b, way), row in rows.items():
        c = cost(model.config, calls[b, way].get("subnet", model.full))
        table.append(dict(budget=b, cost=c, way=way, forward=row["forward"], both=row["both"]))
        print(f"{b:7.2f} {c:6.3f} {way:>9} {row['forward']:8.3f} {row['both']:8.3f}", file=sys.stderr)
    text = generation(model, calls, tokens[0], args.rounds, device)
    print(f"\n{'budget':>7} {'generate':>9} (time over the full model's)   {'without KV cache':>17} (over with it)",
          file=sys.stderr)
    for b, row in text.items():
        print(f"{b:7.2f} {row['cached']:9.3f} {'':29} {row['recomputed']:17.2f}", file=sys.stderr)
    if args.json:
        generated = [dict(budget=b, **row) for b, row in text.items()]
        print(json.dumps(dict(device=args.device, rows=table, generation=generated)))


if __name__ == "__main__":
    main()
