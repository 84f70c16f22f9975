"""
What each budget is worth: the loss on held-out text; the paper's six tasks, speed and a picture
where asked for.

    python eval.py                                     the loss table of out/flex
    python eval.py --model out/flex-0.50               an export
    python eval.py --budgets 1.0 0.55 --text book.txt  the loss on a file, at sizes never trained
    python eval.py --tasks piqa winogrande --limit 100 the first rows of two tasks; all: all six
    python eval.py --speed                             tokens/s and memory over the full model's
    python eval.py --plot flex.png --base out/base     a picture, with a dense Llama as a line
    torchrun --nproc_per_node=8 eval.py --tasks all    eight GPUs share the rows: the same numbers
    python eval.py --json                              one JSON object as the last line of stdout

Without --text the held-out windows are those of training's table, which flex.pt remembers. A folder
of the flextron folder's is evaluated too: mean widths per layer, and with --text a drawing of what
each token took.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data.heldout import shard_windows, text_windows
from data.tokenizer import load_tokenizer, same_tokenizer
from model import Llama, SubNet
from plumbing.checkpoint import TOKENIZER, load_llama
from plumbing.errors import Parser, check_at_least_one, fail, run_main
from plumbing.family import Family, Member, open_family
from plumbing.parallel import (
    AUTOCASTS,
    RANK,
    WORLD,
    autocast,
    autocast_is,
    bar,
    default_device,
    finish,
    setup,
)
from plumbing.params import max_positions
from plumbing.pictures import check_picture
from plumbing.tables import say_results, say_speed, say_widths
from space import cost, n_params

TOKENS = 4096  # in one forward

# -----------------------------------------------------------------------------
# the loss


@torch.no_grad()
def evaluate(model, windows, subnet: SubNet | None = None, factors=None,
             batch=None) -> tuple[float, float]:
    """(mean cross-entropy in nats, forward tokens/s) of a slice on windows (x, y), each (n, T).

    The ranks share the windows: rank r takes every WORLD-th, from the r-th on. batch: windows per
    forward."""
    x, y = windows
    n, T = y.shape
    batch = batch or max(1, TOKENS // T)
    device = model.tok_embeddings.weight.device
    if dist.is_initialized():
        x = x[RANK::WORLD]
        y = y[RANK::WORLD]
    if factors is not None:
        factors = factors.to(device)
    total = torch.zeros(1, dtype=torch.float64, device=device)
    start = time.perf_counter()
    # As many rounds on all ranks: a sharded model gathers its weights in every forward.
    rounds = -(-n // (batch * WORLD))
    for i in bar(range(rounds), "loss"):
        tokens = x[i * batch:(i + 1) * batch]
        targets = y[i * batch:(i + 1) * batch]
        scored = targets.numel()
        if scored == 0:  # no windows left for this rank: it runs one that counts as nothing
            tokens = windows[0][:1]
            targets = windows[1][:1]
        with autocast(device):
            loss = model(tokens.to(device), targets.to(device), subnet=subnet, factors=factors)[1]
        total += loss.double() * scored
    if dist.is_initialized():
        dist.all_reduce(total)
    loss = total.item() / (n * T)
    seconds = time.perf_counter() - start
    return loss, n * T / seconds


def mean_loss(member: Member, pairs, batch: int | None) -> dict:
    """The mean cross-entropy in nats over pairs of windows (x, y), and the tokens scored."""
    total = 0.0
    tokens = 0
    for pair in pairs:
        n = pair[1].numel()
        total += evaluate(member.model, pair, member.subnet, member.factors, batch)[0] * n
        tokens += n
    return dict(loss=total / tokens, tokens=tokens)


# -----------------------------------------------------------------------------
# a row per budget


def sizes_of(model: Llama, subnet: SubNet) -> dict:
    """The sizes of a slice: one number where all layers agree, else a list."""
    row = dict(got=round(cost(model.config, subnet), 6), params=n_params(model.config, subnet),
               params_total=n_params(model.config, subnet, embeddings=True), dim=subnet.dim,
               layers=list(subnet.layers))
    for name in ("n_heads", "ffn_dim"):
        sizes = getattr(subnet, name)
        row[name] = sizes[0] if len(set(sizes)) == 1 else list(sizes)
    return row


def row_of(family: Family | None, member: Member, budget: float, pairs, tasks: dict, args) -> dict:
    """All that is known of one budget: its sizes, and loss and task metrics where asked for.
    family: None for --base."""
    measured = {}
    if pairs:
        measured |= mean_loss(member, pairs, args.batch)
    if tasks:
        from tasks.report import measure_tasks
        measured |= measure_tasks(member.model, tasks, member.subnet, member.factors, args.batch,
                                  f"{budget:.2f}")
    if family is not None and family.flextron:  # its sizes are means over the tokens just measured
        from flextron.deployed import row_of_flextron
        return row_of_flextron(member.model, budget, measured)
    return dict(budget=budget) | sizes_of(member.model, member.subnet) | measured


# -----------------------------------------------------------------------------
# from the flags to the tables


def load_base(args: argparse.Namespace, vocab_size: int, device) -> Llama | None:
    """--base as a model; it reads the tokens of the other one, so its tokenizer must be the
    same."""
    if not args.base:
        return None
    base = load_llama(args.base, device)
    has_one = [(Path(folder) / TOKENIZER).is_file() for folder in (args.model, args.base)]
    same = has_one[0] == has_one[1] and same_tokenizer(args.model, args.base)
    if base.config.vocab_size != vocab_size or not same:
        fail(f"--base {args.base} has another tokenizer than {args.model}; expected a dense Llama "
             "with the same one")
    return base


def heldout(args: argparse.Namespace, family: Family, tokenizer, context: int) -> list:
    """The windows to score, as pairs (x, y); none if only tasks were asked for."""
    if args.text:
        return text_windows(args.text, tokenizer, context)
    if args.tasks and not args.data:
        return []
    data = args.data or family.saved.get("data", "data/pystdlib")
    n = args.windows or family.saved.get("eval_windows", 128)
    return shard_windows(args.model, data, n, context, family.model.config.vocab_size)


def run(args: argparse.Namespace, device) -> dict:
    """Loads, measures, prints the tables on stderr; returns what --json prints."""
    questions = {}
    tasks = {}
    if args.tasks:  # read before a model is loaded: a bad row is found at once
        from tasks.report import encode_tasks, load_questions
        questions = load_questions(args.tasks, args.task_dir, args.limit)

    # what runs at each budget
    family = open_family(args.model, device)
    config = family.model.config
    unit = "latency" if args.latency else "params"
    budgets = args.budgets or args.latency
    if not budgets:
        budgets = family.default_budgets()
        unit = family.flextron.unit if family.flextron else unit
    if args.speed and family.flextron:
        fail(f"--speed measures the slices of train.py's families, {args.model} is of the flextron "
             f"folder; for those: python -m bench.token_time --model {args.model}")
    members = [family.member(budget, unit) for budget in budgets]
    base = load_base(args, config.vocab_size, device)

    # what they are measured on
    context = args.seq_len or family.saved.get("seq_len") or config.context
    window = args.seq_len or max_positions(config)
    tokenizer = None
    if args.text or args.tasks:
        tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, config.vocab_size)
    pairs = heldout(args, family, tokenizer, context)
    if questions:
        tasks = encode_tasks(questions, tokenizer, window)

    rows = []
    for budget, member in zip(budgets, members):
        rows.append(row_of(family, member, budget, pairs, tasks, args))
    trained = family.trained_budgets(unit)
    result = dict(model=str(args.model), context=context, trained=trained, rows=rows)
    if base:
        row = row_of(None, Member(base, base.full), 1.0, pairs, tasks, args)
        result["base"] = row | dict(base=str(args.base))
    if family.flextron:
        first_window = pairs[0][0][0].tolist() if args.text else None
        say_widths(members, rows, first_window, tokenizer)
    say_results(result, trained, tasks, window)
    if args.speed:
        say_speed(result, members, trained, window, args.batch or 8, device)
    return result


# -----------------------------------------------------------------------------
# the command line


def parse_args(argv) -> argparse.Namespace:
    """The flags, checked as far as they can be before anything is loaded."""
    p = Parser("python eval.py", __doc__)
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budgets", type=float, nargs="+",
                     help="default: tenths and what was trained on a supernet, 1.0 on a plain Llama")
    ask.add_argument("--latency", type=float, nargs="+",
                     help="instead: fractions of the full model's time")
    p.add_argument("--base", help="a plain Llama to compare with; same tokenizer")
    text = p.add_mutually_exclusive_group()
    text.add_argument("--text", help="a text file to score instead of the validation shards")
    text.add_argument("--data", help="folder of shards, its val split (default: the one trained on, "
                      "or data/pystdlib)")
    p.add_argument("--windows", type=int, help="validation windows (default: training's, or 128)")
    p.add_argument("--seq-len", type=int,
                   help="tokens per window (default: training's, or the model's context)")
    p.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="benchmarks: arc_easy "
                   "lambada_openai piqa winogrande hellaswag mmlu, or all; the loss then needs --text "
                   "or --data")
    p.add_argument("--task-dir", default="data/tasks", help="the files of the tasks, a folder each")
    p.add_argument("--limit", type=int, help="the first rows of a task only (of mmlu: per subject)")
    p.add_argument("--batch", type=int, help="windows or questions per forward (default: what "
                   f"makes {TOKENS} tokens)")
    p.add_argument("--speed", action="store_true", help="also prefill, decode and memory, as "
                   "ratios to the full model")
    p.add_argument("--plot", help="a picture to write: loss or accuracy against parameters; .png, "
                   ".svg or .pdf")
    p.add_argument("--device", choices=["cpu", "cuda"], default=default_device())
    p.add_argument("--autocast", choices=AUTOCASTS, help="what matrix products run in (default: "
                   "bfloat16 on CUDA, float32 on the CPU)")
    p.add_argument("--json", action="store_true", help="one JSON object as stdout's last line")
    args = p.parse_args(argv)
    check_at_least_one(args, "batch", "windows", "seq_len", "limit")
    if args.plot and args.text and Path(args.plot).resolve() == Path(args.text).resolve():
        fail(f"--plot {args.plot} is the text that is scored; choose another place")
    check_picture(args.plot)
    return args


def main(argv=None) -> None:
    """Prints tables on stderr, and with --json the same as one JSON line on stdout."""
    args = parse_args(argv)
    device = setup(args.device)
    with autocast_is(args.autocast):
        result = run(args, device)
    if args.json and RANK == 0:
        # JSON has no NaN.
        print(json.dumps(json.loads(json.dumps(result), parse_constant=lambda name: None)), flush=True)
    # The picture comes last: what was measured is out, whatever becomes of it.
    if args.plot and RANK == 0:
        from bench.plot import plot
        plot(args.plot, result["rows"], result.get("base"), result["trained"] or [1.0],
             result["model"])
    finish()


if __name__ == "__main__":
    run_main(main, "nothing was written")
