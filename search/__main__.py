"""
A smaller Llama without training: "Search for Efficient Large Language Models" (NeurIPS 2024).

    python -m search --budget 0.8               out/base -> out/search-0.80, a plain Llama folder
    python -m search --budget 0.8 --uniform     one size for all layers, as Hugging Face needs
    python -m search --budget 0.8 --resume      goes on after a kill
    python -m search --llama Llama-3.1-8B --data data/web --population 100 --generations 50

  score         what is each head and neuron worth? One pass over some text      reform.py
  start         the best ones, at the same ratio in every layer                  candidates.py
  evolution     which layers, how many heads and neurons in each, which ones     evolution.py
  reformation   least squares: wo and w2 make up for what is gone                reform.py

Every candidate meets the budget, to the last neuron (--uniform: to the last multiple of neurons).
The hidden size and the embeddings stay, as in the paper (Shen et al.). search/README.md tells where
we differ from it, and why.
"""
import argparse
import hashlib
from pathlib import Path

import torch

from data.tokenizer import TOKENIZER, check_same_tokenizer
from eval import evaluate
from model import Llama, LlamaConfig, SubNet
from plumbing.checkpoint import (
    RESUME,
    WEIGHTS,
    load_llama,
    matrix_dtype,
    save_llama,
    save_tensors,
)
from plumbing.errors import SEEDS, Parser, check_at_least_one, check_range, fail, run_main
from plumbing.files import check_out as check_apart
from plumbing.locks import one_writer
from plumbing.parallel import WORLD, default_device, device_of, say
from plumbing.params import PARAMS, read_config
from plumbing.state import of_a_run, resume_state
from plumbing.tensors import fingerprint
from search.candidates import Bounds, Candidate, check_budget, cut_out
from search.evolution import disjoint_windows, evolve
from search.reform import reform_, unit_scores
from space import cost

# -----------------------------------------------------------------------------
# the command line


def parse_args(argv=None) -> argparse.Namespace:
    """The command line."""
    p = Parser("python -m search", __doc__)
    add = p.add_argument
    add("--llama", default="out/base", help="raw Llama folder to make smaller")
    add("--budget", type=float, default=0.8, help="fraction of its non-embedding parameters")
    add("--data", default="data/pystdlib", help="folder of shards: train to search, val to report")
    add("--out", help="folder to write (default: out/search-0.80 beside --llama)")
    add("--generations", type=int, default=12, help="the paper: 50")
    add("--population", type=int, default=40, help="candidates per generation (the paper: 100)")
    add("--reform", action=argparse.BooleanOptionalAction, default=True, help="least squares at the end")
    add("--uniform", action="store_true",
        help="one size for all layers, neurons in multiples of 256 (in a small Llama of 32)")
    add("--fitness-windows", type=int, default=16, help="training windows that rank candidates")
    add("--calibration-windows", type=int, default=128, help="others, for score and reformation")
    add("--report-windows", type=int, default=128, help="validation windows of the table at the end")
    add("--seq-len", type=int, help="tokens per window (default: the context, 2048 at most)")
    add("--seed", type=int, default=0)
    add("--device", choices=["cpu", "cuda"], default=default_device())
    add("--resume", action="store_true", help="go on after the last whole generation of a killed search")
    args = p.parse_args(argv)
    check_at_least_one(args, "generations", "population", "fitness_windows", "calibration_windows",
                       "report_windows", "seq_len")
    check_range(args, 0, "seed", highest=SEEDS)
    if not args.out:
        source = Path(args.llama)
        if source.name in ("", ".."):                        # . and .. have no name to replace
            source = source.resolve()
        args.out = str(source.with_name(f"search-{args.budget:.2f}"))
    return args


def check_shape(config: LlamaConfig, source: Path) -> None:
    """fail() for a Llama whose layers differ already."""
    for axis in ("n_heads", "n_kv_heads", "ffn_dim"):
        if not isinstance(getattr(config, axis), int):
            fail(f"{source} has another shape in every layer already; expected a uniform Llama, such "
                 "as its source")


def check_out(out: Path, source: Path) -> None:
    """fail() for a folder that holds a Llama which no search wrote."""
    is_source = out.resolve() == source.resolve()
    holds_llama = (out / PARAMS).exists() or (out / WEIGHTS).exists()
    from_a_search = (out / RESUME).exists()                  # resume_state() looks from which one
    if is_source or (holds_llama and not from_a_search):
        fail(f"{out} holds a Llama that is not from an earlier search; choose another --out")


def check_state(path: Path, state: dict, config: LlamaConfig) -> None:
    """fail() unless a resume.pt holds candidates for this Llama, and losses."""
    with of_a_run(path):
        losses = list(state["losses"].values())
        for loss, masks in state["parents"]:
            Candidate(*masks).subnet(config)
            losses.append(loss)
        if type(state["parents"]) is not list or not all(type(loss) is float for loss in losses):
            raise TypeError("parents are no list of candidates, or losses no numbers")


def fingerprint_of_text(*windows: torch.Tensor) -> str:
    """16 hex digits that change with any token that the search reads."""
    digest = hashlib.blake2b(digest_size=8)
    for tokens in windows:
        digest.update(tokens.numpy())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# from a Llama to a smaller one


def search(model: Llama, windows, args, settings: dict, state: dict | None) -> Llama:
    """Score, evolution, reformation; says what came out. Returns the smaller Llama.

    windows: disjoint_windows(). settings: what a resumed search must have in common with this one.
    state: of the search to go on with, or None."""
    fitness, calibration, report = windows
    calibration = calibration.to(model.norm.weight.device)
    n_calibration, T = calibration.shape
    batch = max(1, 4096 // T)
    config = model.config

    def save(state: dict) -> None:
        path = Path(args.out) / RESUME
        save_tensors(path, state | dict(settings=settings))

    # score
    scores = unit_scores(model, calibration, batch)
    passes = n_calibration
    bounds = Bounds.from_scores(config, args.budget, scores, args.uniform)

    # evolution
    state = evolve(
        model, bounds, fitness, args.generations, args.population, args.seed, state, save,
    )
    _, best = state["parents"][0]
    start = bounds.start()

    # What came out, in rows (name, shape, loss). Memory holds one cut-out model at a time.
    loss, _ = evaluate(model, report)
    rows = [("dense", model.full, loss)]
    loss, _ = evaluate(cut_out(model, start), report)
    rows.append(("start", start.subnet(config), loss))
    subnet = best.subnet(config)
    small = cut_out(model, best)
    loss, _ = evaluate(small, report)
    rows.append(("searched", subnet, loss))

    # reformation
    if args.reform:
        errors = reform_(small, model, subnet.layers, calibration, batch)
        passes += 3 * n_calibration                          # one dense, two of the small model
        loss, _ = evaluate(small, report)
        rows.append(("reformed", subnet, loss))
        before, after = errors[-1]
        say("reformed: squared error of the stream on calibration text "
            f"{before:.2g} -> {after:.2g} of its square")

    say_table(config, subnet, rows, report)
    tried = len(state["losses"])
    n_fitness = len(fitness[0])
    say(f"forward passes of a window of {T} tokens: {tried * n_fitness:,} for the fitness of "
        f"{tried:,} candidates, {passes:,} for score and reformation")
    return small


def say_table(config: LlamaConfig, subnet: SubNet, rows: list, report) -> None:
    """The sizes of every layer; the cost and the loss of each row (name, shape, loss)."""
    def spaced(numbers) -> str:
        return " ".join(str(n) for n in numbers)

    layers = spaced(subnet.layers)
    heads = spaced(subnet.n_heads)
    neurons = spaced(subnet.ffn_dim)
    n_tokens = report[1].numel()
    say(f"layers {layers} | heads {heads} | neurons {neurons}")
    say(f"{'':10} {'cost':>7} {'loss':>7}   (nats on {n_tokens:,} held-out tokens)")
    for name, shape, loss in rows:
        got = cost(config, shape)
        say(f"{name:10} {got:7.4f} {loss:7.4f}")


def main(argv=None) -> None:
    """A Llama folder in, a smaller one out."""
    args = parse_args(argv)
    out = Path(args.out)
    source = Path(args.llama)
    # what can be refused before anything is loaded
    if WORLD > 1:
        fail(f"{WORLD} processes found; the search runs in one; start it with python -m search, "
             "not torchrun")
    config = read_config(args.llama)
    check_shape(config, source)
    check_budget(config, args.budget, args.uniform)
    check_out(out, source)
    check_apart(out, data=args.data)
    check_same_tokenizer(source, args.data)
    windows = disjoint_windows(args, config, args.seed)

    # the model, and the state of a search that was killed
    device = device_of(args.device)
    torch.set_float32_matmul_precision("highest")            # Grams in TF32 would have 10 bits
    model = load_llama(source, device, dtype=None).requires_grad_(False)
    model = model.to(matrix_dtype(model))                    # a file may have norms of another dtype
    settings = dict(vars(args))
    # What may differ when a search goes on. The last two are known by their content.
    for free in ("resume", "out", "device", "report_windows", "llama", "data"):
        del settings[free]
    fitness, calibration, _ = windows
    settings["fingerprint"] = fingerprint_of_text(*fitness, calibration)
    settings["llama_fingerprint"] = fingerprint(source)

    # the search
    with one_writer(out):
        state = resume_state(out, settings, args.generations, args.resume)
        if state is not None:
            check_state(out / RESUME, state, config)
        try:
            small = search(model, windows, args, settings, state)
            save_llama(out, small.config, small.state_dict(), source / TOKENIZER)
        except OSError as error:
            reason = error.strerror or error
            fail(f"{out} could not be written ({reason}); make room, and go on with --resume")
    say(f"\nNext:  python eval.py --model {out}\n       python sample.py --model {out}")


if __name__ == "__main__":
    run_main(main, "every whole generation is kept: go on with --resume")
