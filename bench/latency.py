"""
How good is the table of latencies? Measures a folder's table anew, then times fresh random slices
against it.

    python -m bench.latency --model out/flex        writes out/flex/latency.json
    python -m bench.latency --model out/flex --device cuda --seq-len 2048

The table is a sum over layers (plumbing/latency.py), measured on slices whose layers are all alike.
The slices that check it have another shape in every layer.
"""
from pathlib import Path

import torch

from flextron.network import timed_sizes
from model import Llama, SubNet
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import Family, open_family
from plumbing.latency import (LATENCY_FILE, ROUNDS, Latency, batch_for, check_place, fractions,
                              measure_latency, run_slice, save_table)
from plumbing.parallel import default_device, device_of
from space import choices_for, random_generator


def choices_in(family: Family) -> dict[str, list[int]]:
    """The sizes to measure: those that a folder's routers choose from, or the default ones."""
    if family.router:
        return family.router.space.choices
    try:
        if family.flextron:
            return timed_sizes(family.model.config, family.flextron.sizes)
        return choices_for(family.model.config)
    except ValueError as error:
        fail(str(error))


def random_slices(n_layers: int, choices: dict[str, list[int]], n: int) -> list[SubNet]:
    """n SubNets of all layers with sizes drawn for every layer, always the same ones."""
    generator = random_generator("slices")

    def drawn(sizes: list[int]) -> list[int]:
        places = torch.randint(len(sizes), (n_layers,), generator=generator)
        return [sizes[place] for place in places.tolist()]

    slices = []
    for _ in range(n):
        dim = drawn(choices["dim"])[0]
        heads = drawn(choices["n_heads"])
        slices.append(SubNet(dim, range(n_layers), heads, drawn(choices["ffn_dim"])))
    return slices


def time_slices(model: Llama, slices: list[SubNet], rounds: int, seq_len: int | None) -> dict:
    """The measured time of each slice over the full model's, by SubNet."""
    x = batch_for(model, seq_len)
    runs = {"full": lambda: model(x)}
    for subnet in slices:
        runs[subnet] = run_slice(model, x, subnet)
    return fractions(runs, x.device, rounds)


def main(argv=None) -> None:
    """Measures, writes the table, prints a line per slice."""
    p = Parser("python -m bench.latency", __doc__)
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    p.add_argument("--rounds", type=int, default=ROUNDS,
                   help="timings of a slice, at most; the median counts")
    p.add_argument("--seq-len", type=int, help="tokens per window (default: the model's context)")
    p.add_argument("--slices", type=int, default=6, help="random slices to check the table on")
    p.add_argument("--device", choices=["cpu", "cuda"],
                   default=default_device())
    args = p.parse_args(argv)
    check_at_least_one(args, "rounds", "slices", "seq_len")

    # The table.
    check_place(args.model)
    family = open_family(args.model, device_of(args.device))
    model = family.model
    choices = choices_in(family)
    table = measure_latency(model, choices, args.rounds, args.seq_len)
    save_table(Path(args.model) / LATENCY_FILE, table)
    print(f"{table['hardware']}, {table['threads']} threads, torch {table['torch']}; "
          f"{table['batch']} x {table['tokens']} tokens; full model {table['full_ms']:.1f} ms")

    # The check.
    n_layers = model.config.n_layers
    latency = Latency(table, n_layers)
    slices = random_slices(n_layers, choices, args.slices)
    timed = time_slices(model, slices, args.rounds, args.seq_len)
    print(f"{'table':>6} {'timed':>6} {'error':>7}")
    for subnet in slices:
        error = latency(subnet) / timed[subnet] - 1
        heads = sum(subnet.n_heads) / n_layers
        ffn = sum(subnet.ffn_dim) / n_layers
        print(f"{latency(subnet):6.3f} {timed[subnet]:6.3f} {error:+7.1%}   "
              f"dim {subnet.dim}, heads {heads:.1f}, ffn {ffn:.0f} on average")


if __name__ == "__main__":
    run_main(main)
