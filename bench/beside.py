"""
What does transformers take for the same? The full model and slices of it as Llamas of their own, in
nanoFlex and in transformers, with the same weights, side by side in one process.

    python -m bench.beside                       a random Llama of dim 512 on this machine
    python -m bench.beside --model out/flex      a folder (supernet or plain Llama)

    forward     a batch, no gradient, its loss
    fwd+bwd     the same with gradients
    prefill     a prompt into a KV cache
    decode      as many tokens as the prompt has, one by one
    generate    prompt and tokens by what users call: sample.generate(), and model.generate()

A row is the median over the rounds of our time over theirs in the same round: under 1 we are
faster. Weights are fp32, on a GPU bf16 for text; passes run under train.py's autocast. The losses
must agree, or nothing is printed. Needs transformers.
"""
import argparse
import importlib.util
import json
import statistics
import sys
from typing import NamedTuple

import torch

from bench.slices import add_shape, median_ratio, opened
from bench.speed import native_llama, one_turn
from model import Llama, SubNet
from plumbing.errors import Parser, fail, run_main
from plumbing.hf import hf_tensor, model_config
from plumbing.latency import seconds
from plumbing.parallel import autocast, device_of
from sample import generate
from space import cost

KINDS = ("forward", "fwd+bwd", "prefill", "decode", "generate")


class Pair(NamedTuple):
    """One Llama twice, on the same weights."""
    ours: Llama
    theirs: torch.nn.Module


def in_transformers(model: Llama) -> torch.nn.Module:
    """A Llama as transformers has it; its weights are copies."""
    from transformers import AutoConfig, AutoModelForCausalLM
    c = model.config
    dtype = model.norm.weight.dtype
    settings = model_config(c, dtype, 1, 2)
    settings["max_position_embeddings"] = 1 << 20  # or it warns of a text that is longer than the context
    config = AutoConfig.for_model(**settings)
    with model.norm.weight.device:
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    state = {}
    for name, weight in model.state_dict().items():
        name, weight = hf_tensor(name, weight.detach().clone(), c.head_dim)
        state[name] = weight
    theirs.load_state_dict(state)
    return theirs


def pair_of(model: Llama, subnet: SubNet, device, dtype: torch.dtype | None) -> Pair:
    """A slice as a Llama of its own, here and there. dtype None: as it is deployed on the device."""
    ours = native_llama(model, subnet, device, dtype)
    return Pair(ours, in_transformers(ours))


# -----------------------------------------------------------------------------
# what takes time: a function for each side


def loss_of(model, tokens):
    """The mean cross-entropy of tokens (batch, T), each but the first of its row given those before."""
    if isinstance(model, Llama):
        return model(tokens[:, :-1], tokens[:, 1:])[1]
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def run_passes(model, tokens, device) -> dict[str, float]:
    """Seconds of a forward, and of a forward and backward."""
    def forward():
        with torch.no_grad(), autocast(device):
            loss_of(model, tokens)

    def both():
        model.zero_grad(set_to_none=True)
        with autocast(device):
            loss = loss_of(model, tokens)
        loss.backward()

    return {"forward": seconds(forward, device), "fwd+bwd": seconds(both, device)}


def their_turn(model, tokens, prompt: int, device) -> tuple[float, float]:
    """one_turn() of bench/speed.py, in transformers."""
    from transformers import DynamicCache
    cache = DynamicCache(config=model.config)

    def read():
        model(input_ids=tokens[:, :prompt], past_key_values=cache, use_cache=True)

    def write():
        for i in range(prompt, tokens.size(1)):
            model(input_ids=tokens[:, i:i + 1], past_key_values=cache, use_cache=True)

    return seconds(read, device), seconds(write, device)


@torch.no_grad()
def run_text(model, tokens, device) -> dict[str, float]:
    """Seconds of prefill, decode and generate; the first half of tokens (batch, T) is the prompt.
    generate writes one text."""
    prompt = tokens.size(1) // 2
    new = tokens.size(1) - prompt
    if isinstance(model, Llama):
        read, write = one_turn(model, tokens, prompt, device)
        text = seconds(lambda: list(generate(model, tokens[0, :prompt].tolist(), new, temperature=0)), device)
    else:
        read, write = their_turn(model, tokens, prompt, device)
        settings = dict(do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        ids = tokens[:1, :prompt]
        mask = torch.ones_like(ids)
        text = seconds(lambda: model.generate(ids, attention_mask=mask, **settings), device)
    return {"prefill": read, "decode": write, "generate": text}


# -----------------------------------------------------------------------------
# in turns


def check_same(pair: Pair, tokens, tolerance: float) -> None:
    """Both must compute the same, or the comparison is of nothing."""
    with torch.no_grad():
        ours, theirs = (loss_of(model, tokens).item() for model in pair)
    assert abs(ours / theirs - 1) < tolerance, f"losses differ: {ours} here, {theirs} in transformers"


def compare(pairs: dict, run, tokens, rounds: int, device) -> dict:
    """key of a pair -> {kind: (our time over theirs, our seconds)}, medians over the rounds. run:
    run_passes or run_text."""
    times = {key: ([], []) for key in pairs}
    for r in range(rounds + 1):
        for key, pair in pairs.items():
            for side, model in enumerate(pair):
                took = run(model, tokens, device)
                if r > 0:  # round 0 warms up
                    times[key][side].append(took)

    rows = {}
    for key, (ours, theirs) in times.items():
        rows[key] = {}
        for kind in ours[0]:
            mine = [took[kind] for took in ours]
            ratio = median_ratio(mine, [took[kind] for took in theirs])
            rows[key][kind] = (ratio, statistics.median(mine))
    return rows


def rows_beside(model: Llama, subnets: dict, run, tokens, rounds: int, device) -> list[dict]:
    """A row per budget of subnets {budget: SubNet}: budget, cost, and of every kind our time over
    theirs, and our tokens/s."""
    dtype = None if run is run_text else torch.float32
    pairs = {budget: pair_of(model, subnet, device, dtype) for budget, subnet in subnets.items()}
    for pair in pairs.values():
        check_same(pair, tokens, 1e-4 if pair.ours.norm.weight.dtype == torch.float32 else 1e-2)
    written = tokens.size(1) - tokens.size(1) // 2
    amounts = {"forward": tokens.numel(), "fwd+bwd": tokens.numel(),
               "prefill": tokens.numel() - len(tokens) * written, "decode": len(tokens) * written,
               "generate": written}
    rows = []
    for budget, found in compare(pairs, run, tokens, rounds, device).items():
        row = dict(budget=budget, cost=cost(model.config, subnets[budget]))
        for kind, (ratio, took) in found.items():
            row[kind] = ratio
            row[f"{kind} tok/s"] = amounts[kind] / took
        rows.append(row)
    return rows


def needs_transformers() -> None:
    """fail() where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        fail("transformers is not installed, and nothing can be put beside it: pip install transformers")


def main(argv=None) -> None:
    """Prints the table on stderr, with --json also one JSON line on stdout."""
    p = Parser("python -m bench.beside", __doc__)
    p.add_argument("--model", help="a folder to measure (default: random weights of this shape)")
    p.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4])
    add_shape(p)
    args = p.parse_args(argv)
    needs_transformers()
    device = device_of(args.device)
    model, _, route = opened(argparse.Namespace(**vars(args), cut="all"), device)
    subnets = {budget: route(budget) if budget < 1 else model.full for budget in args.budgets}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (args.batch, args.seq_len), generator=generator)
    tokens = tokens.to(device)
    rows = rows_beside(model, subnets, run_passes, tokens, args.rounds, device)
    for row, more in zip(rows, rows_beside(model, subnets, run_text, tokens, args.rounds, device)):
        row |= more

    import transformers
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; {args.batch} x {args.seq_len} tokens, dim {model.config.dim}; our "
          "time over theirs (our tokens/s)", file=sys.stderr)
    print(f"{'budget':>7} {'cost':>6} " + " ".join(f"{kind:>17}" for kind in KINDS), file=sys.stderr)
    for row in rows:
        cells = [f"{row[kind]:8.3f} {row[kind + ' tok/s']:8,.0f}" for kind in KINDS]
        print(f"{row['budget']:7.2f} {row['cost']:6.3f} " + " ".join(cells), file=sys.stderr)
    if args.json:
        print(json.dumps(dict(device=args.device, rows=rows)))


if __name__ == "__main__":
    run_main(main)
