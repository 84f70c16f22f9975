"""
What each budget is worth: validation loss, the paper's six tasks, speed; of a supernet or of any plain Llama folder.

    python eval.py                                       the loss table of out/flex
    python eval.py --model out/flex-0.50                 an export
    python eval.py --budgets 1.0 0.55 --text book.txt    the loss on a file, at sizes never trained
    python eval.py --tasks piqa winogrande --limit 100   the first rows of two tasks (tasks.py); --tasks all: all six
    python eval.py --speed                               tokens/s and memory of each size over the full model's
    python eval.py --plot flex.png --base out/base       a picture, with a dense Llama as a line
    torchrun --nproc_per_node=8 eval.py --tasks all      eight GPUs share the rows; the numbers are those of one
                                                         (but mean widths of tokens that choose: the first rank's)
    python eval.py --model out/flextron --text book.txt  flextron.py's: mean widths per layer, what each token took
    python eval.py --json                                one JSON object as the last line of stdout

Without --text the held-out windows are those of training's table, which flex.pt remembers.
"""
import argparse
import importlib.util
import io
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.checkpoint import TOKENIZER, load_llama, load_tensors
from data.shards import Shards
from flextron.deployed import FLEXTRON, deploy, load_flextron, row_of_flextron, widths_table
from plumbing.family import slice_at
from tasks.likelihood import TOKENS, score
from model import Llama, SubNet
from plumbing.parallel import RANK, finish, rank0_first, say, setup
from router import FLEX, load_router
from space import cost, n_params
from bench.speed import speeds
from tasks.questions import TASKS, Request, load_task, metrics, requests_of
from plumbing.files import atomic_write
from data.tokenizer import encode_document, load_tokenizer
from plumbing.errors import fail
from train import TABLE_BUDGETS
from eval import evaluate

# -----------------------------------------------------------------------------
# loss


def text_windows(path, tokenizer, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[BOS] + tokens of a file as windows of context + 1 tokens that share one: every token but the first is a target
    once. Two pairs (x, y): the full windows (n, context) and the shorter rest, if there is one."""
    path = Path(path)
    if not path.is_file():
        fail(f"--text {path} is not a file; expected a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")  # not read_text: it would change line ends
    except UnicodeDecodeError as error:
        fail(f"--text {path} is not UTF-8 ({error.reason} at byte {error.start}); expected a UTF-8 text file; "
             f"iconv -t UTF-8 converts it")
    tokens = torch.from_numpy(encode_document(tokenizer, text).astype("int64"))
    if len(tokens) < 2:
        fail(f"--text {path} is empty; expected at least one token of text")
    n = (len(tokens) - 1) // context
    pairs = [(tokens[:n * context].view(n, context), tokens[1:n * context + 1].view(n, context))] if n else []
    rest = tokens[n * context:]
    return pairs + ([(rest[None, :-1], rest[None, 1:])] if len(rest) > 1 else [])


def shard_windows(args, flex: dict, context: int, vocab_size: int):
    """The held-out windows of training's table as one pair (x, y), or those of --data."""
    data, own = args.data or flex.get("data", "data/pystdlib"), Path(args.model) / TOKENIZER
    theirs = Path(data) / TOKENIZER
    if own.is_file() and theirs.is_file() and own.read_bytes() != theirs.read_bytes():
        fail(f"{data} was made with another tokenizer than {own}; name the model's own data with --data")
    return [Shards(data, "val", context, vocab_size).windows(args.windows or flex.get("eval_windows", 128))]


def mean_loss(model: Llama, pairs, subnet, factors, batch: int | None) -> tuple[float, int]:
    """(mean cross-entropy in nats, tokens scored) over pairs of windows (x, y)."""
    counts = [y.numel() for _, y in pairs]
    losses = [evaluate(model, pair, subnet, factors, batch)[0] for pair in pairs]
    return sum(l * n for l, n in zip(losses, counts)) / sum(counts), sum(counts)


# -----------------------------------------------------------------------------
# tasks


def encode_tasks(asked: dict[str, list], tokenizer, window: int) -> dict[str, tuple[list, list[Request]]]:
    """task -> questions, to task -> (questions, their requests): tokenised once, for all budgets."""
    found = {}
    for name, questions in asked.items():
        bar = tqdm(requests_of(questions, tokenizer, window), f"{name}: tokens", len(questions), leave=False,
                   disable=None if RANK == 0 else True)
        found[name] = questions, list(bar)
        subjects, cut = len({q.group for q in questions}), sum(r.cut for r in found[name][1])
        if name == "mmlu" and subjects != 57:
            say(f"mmlu: {subjects} subjects of 57 are there; published figures are over all of them")
        if cut:
            say(f"{name}: {cut:,} of {len(questions):,} contexts lost their beginning to the window of {window} tokens")
    return found


# -----------------------------------------------------------------------------
# tables and a picture


def row_of(model: Llama, budget: float, subnet: SubNet, factors, pairs, tasks: dict, args) -> dict:
    """All that is known of one budget: its sizes, and loss and task metrics where asked for."""
    config, one = model.config, lambda v: v[0] if len(set(v)) == 1 else list(v)
    row = dict(budget=budget, got=round(cost(config, subnet), 6), params=n_params(config, subnet),
               params_total=n_params(config, subnet, embeddings=True), dim=subnet.dim, layers=list(subnet.layers),
               n_heads=one(subnet.n_heads), ffn_dim=one(subnet.ffn_dim))
    return row | measured(model, budget, subnet, factors, pairs, tasks, args)


def measured(model, budget: float, subnet, factors, pairs, tasks: dict, args) -> dict:
    """Loss and task metrics where asked for."""
    row = {}
    if pairs:
        row["loss"], row["tokens"] = mean_loss(model, pairs, subnet, factors, args.batch)
    if tasks:
        row["tasks"], row["computed"] = {}, {}
        for name, (questions, requests) in tasks.items():
            scores, row["computed"][name] = score(model, requests, subnet, factors, args.batch, f"{budget:.2f} {name}")
            row["tasks"][name] = rank0_first(lambda: metrics(name, questions, scores))
        row["average"] = statistics.mean(row["tasks"][name][TASKS[name].metric] for name in tasks)
    return row


def loss_table(rows: list[dict], context: int, trained) -> str:
    """Sizes and loss, a line a budget."""
    lines = [f"{'budget':>7} {'got':>6} {'dim':>5} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>14} "
             f"{'with emb.':>14} {'loss':>7} {'ppl':>8}   ({rows[0]['tokens']:,} tokens, windows of {context})"]
    size = lambda v: f"{v:g}" if isinstance(v, int) else f"{v:.0f}"  # a mean over tokens is no whole number
    listed = lambda v: size(v) if not isinstance(v, list) else size(v[0]) if len(set(v)) == 1 else (
        f"{size(min(v))}-{size(max(v))}")
    for r in rows:
        lines.append(f"{label(r, trained)} {r['got']:6.3f} {r['dim']:5d} {listed(r['n_heads']):>5} "
                     f"{listed(r['ffn_dim']):>6} {len(r['layers']):6d} {r['params']:14,} {r['params_total']:14,} "
                     f"{r['loss']:7.3f} {torch.tensor(r['loss']).exp().item():8.2f}")
    return "\n".join(lines)


def label(row: dict, trained) -> str:
    """The first column: the budget, with a star if it was trained."""
    return f"{'base':>6} " if row.get("base") else f"{row['budget']:6.2f}{'*' if row['budget'] in trained else ' '}"


def task_table(rows: list[dict], trained) -> str:
    """The metric that the paper shows of each task, +- its standard error, and their average."""
    names = list(rows[0]["tasks"])
    lines = [f"{'budget':>7} {'got':>6} {'parameters':>14}" + "".join(f" {n:>14}" for n in names) + f" {'average':>8}"]
    for r in rows:
        cells = []
        for name in names:
            found, metric = r["tasks"][name], TASKS[name].metric
            cells.append(f"{found[metric]:.4f}±{found[metric + '_stderr']:.4f}")
        lines.append(f"{label(r, trained)} {r['got']:6.3f} {r['params']:14,}" + "".join(f" {c:>14}" for c in cells)
                     + f" {r['average']:8.4f}")
    return "\n".join(lines)


def speed_table(rows: list[dict], full: dict, trained) -> str:
    """Ratios to the full model: over 1 is faster, under 1 is smaller."""
    lines = [f"{'budget':>7} {'got':>6} {'prefill':>8} {'decode':>8} {'memory':>8}   (over the full model: "
             f"{full['prefill']:,.0f} and {full['decode']:,.0f} tokens/s, {full['memory'] / 1e6:,.1f} MB; "
             f"batch {full['batch']}, {full['prompt']} + {full['new']} tokens)"]
    return "\n".join(lines + [f"{label(r, trained)} {r['got']:6.3f} {r['speed']['prefill']:8.3f} "
                              f"{r['speed']['decode']:8.3f} {r['speed']['memory']:8.3f}" for r in rows])


def plot(path: str, rows: list[dict], base: dict | None, trained, title: str) -> None:
    """Average accuracy of the tasks, or loss without tasks, against parameters."""
    from matplotlib.figure import Figure
    key, name = ("average", "average accuracy") if "average" in rows[0] else ("loss", "loss (nats)")
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot()
    rows = sorted(rows, key=lambda r: r["params"])
    axes.plot([r["params"] for r in rows], [r[key] for r in rows], color="tab:blue", linewidth=1)
    for kind, filled in (("trained", True), ("interpolated", False)):
        some = [r for r in rows if (r["budget"] in trained) == filled]
        axes.scatter([r["params"] for r in some], [r[key] for r in some], label=kind if some else None, zorder=3,
                     edgecolors="tab:blue", facecolors="tab:blue" if filled else "white")
    if base:
        axes.axhline(base[key], color="tab:gray", linestyle="--", label=f"dense, {base['params']:,} parameters")
    axes.set(xlabel="parameters without embeddings", ylabel=name, title=title)
    axes.legend()
    figure.savefig(buffer := io.BytesIO(), format=Path(path).suffix[1:], dpi=150)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


# -----------------------------------------------------------------------------
# the command line


def arguments(argv) -> argparse.Namespace:
    """The flags, checked as far as they can be before anything is loaded."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python eval.py --help lists the flags")
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budgets", type=float, nargs="+", help="default: 1.0 to 0.4 on a supernet, 1.0 on a plain Llama")
    ask.add_argument("--latency", type=float, nargs="+", help="instead: fractions of the full model's time")
    p.add_argument("--base", help="a plain Llama to compare with; same tokenizer")
    p.add_argument("--text", help="a text file to score instead of the validation shards")
    p.add_argument("--data", help="folder of shards, its val split (default: the one trained on, or data/pystdlib)")
    p.add_argument("--windows", type=int, help="validation windows at most (default: training's, or 128)")
    p.add_argument("--seq-len", type=int, help="tokens per window (default: the model's own context)")
    p.add_argument("--tasks", nargs="+", default=[], choices=[*TASKS, "all"],
                   help="benchmarks; the loss then needs --text or --data")
    p.add_argument("--task-dir", default="data/tasks", help="where the files of the tasks are, a folder a task")
    p.add_argument("--limit", type=int, help="the first rows of a task only (of each subject of mmlu)")
    p.add_argument("--batch", type=int, help=f"windows or questions per forward (default: {TOKENS} tokens' worth)")
    p.add_argument("--speed", action="store_true", help="also prefill, decode and memory, as ratios to the full model")
    p.add_argument("--plot", help="a picture to write: loss or accuracy against parameters; .png, .svg or .pdf")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = p.parse_args(argv)
    for flag in ("batch", "windows", "seq_len", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)} found; expected 1 or more")
    args.tasks = list(TASKS if "all" in args.tasks else dict.fromkeys(args.tasks))
    if args.plot and Path(args.plot).suffix not in (".png", ".svg", ".pdf"):
        fail(f"--plot {args.plot} found; expected a file that ends in .png, .svg or .pdf")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib, which is not installed: pip install matplotlib")
    return args


def load_base(args, vocab_size: int, device) -> Llama | None:
    """--base as a model; it reads the tokens of the other one, so its tokenizer must be the same."""
    if not args.base:
        return None
    base, paths = load_llama(args.base, device), [Path(folder) / TOKENIZER for folder in (args.model, args.base)]
    texts = [path.read_bytes() if path.is_file() else None for path in paths]
    if base.config.vocab_size != vocab_size or texts[0] != texts[1]:
        fail(f"--base {args.base} has another tokenizer than {args.model}; expected a dense Llama with the same one")
    return base


def deployed_at(args, model: Llama, router, flextron, flex: dict) -> tuple[list, list, list]:
    """(budgets, what runs at each, budgets that were trained). What runs is a slice and its factors, or, of a folder of
    flextron.py, a network to call in place of the model."""
    asked = args.budgets or args.latency
    if flextron:
        if args.speed:
            fail(f"--speed measures the slices of train.py's families, {args.model} is flextron.py's; for those: "
                 f"python tests/token_time.py --model {args.model}")
        budgets, unit = asked or [1.0, *flex["targets"]], flextron.unit
        unit = "params" if args.budgets else "latency" if args.latency else unit
        return (budgets, [deploy(flextron, args.model, b, unit) for b in budgets],
                flex["targets"] if unit == flextron.unit else [])
    budgets = asked or ([b for b in TABLE_BUDGETS if b >= router.space.costs.min()] if router else [1.0])
    unit = "latency" if args.latency else "params"
    return (budgets, [slice_at(args.model, model, router, b, unit) for b in budgets],
            flex["budgets"] if router and not args.latency else [])


def run(args, device) -> dict:
    """Loads, measures, prints the tables on stderr; returns what --json prints."""
    questions = {name: load_task(name, args.task_dir, args.limit) for name in args.tasks}  # before a model is loaded
    model = load_llama(args.model, device)
    router = load_router(args.model, model.config)
    flextron = load_flextron(args.model, model)
    flex = load_tensors(Path(args.model) / (FLEX if router else FLEXTRON)) if router or flextron else {}
    budgets, deployed, trained = deployed_at(args, model, router, flextron, flex)
    base = load_base(args, model.config.vocab_size, device)
    context = args.seq_len or flex.get("seq_len") or model.config.context
    window = args.seq_len or (131072 if model.config.rope_factor > 1 else model.config.context)  # as hf.py says
    needed = args.text or args.tasks
    tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, model.config.vocab_size) if needed else None
    pairs = text_windows(args.text, tokenizer, context) if args.text else []
    if not args.text and (args.data or not args.tasks):
        pairs = shard_windows(args, flex, context, model.config.vocab_size)
    tasks = encode_tasks(questions, tokenizer, window)
    if flextron:
        rows = [row_of_flextron(d, b, measured(d, b, None, None, pairs, tasks, args))
                for b, d in zip(budgets, deployed)]
        say(widths_table(deployed, rows, pairs[0][0][0].tolist() if args.text else None, tokenizer))
    else:
        rows = [row_of(model, b, *d, pairs, tasks, args) for b, d in zip(budgets, deployed)]
    result = dict(model=str(args.model), context=context, rows=rows)
    everything = list(rows)
    if base:
        result["base"] = row_of(base, 1.0, base.full, None, pairs, tasks, args) | dict(base=str(args.base))
        everything.append(result["base"])
    if pairs:
        say(loss_table(everything, context, trained))
    if tasks:
        result["window"] = window
        result["computed"] = {name: (rows[0]["computed"][name], sum(
            len(r.rows[row]) for r in requests for row, _ in r.choices)) for name, (_, requests) in tasks.items()}
        say(task_table(everything, trained))
        for name, (done, each) in result["computed"].items():
            say(f"{name}: {done:,} tokens computed a budget; one forward for every choice would take {each:,} "
                f"({each / done:.1f} times)")
    if args.speed:
        ratios, result["speed"] = rank0_first(lambda: speeds(
            model, [subnet for subnet, _ in deployed], window, args.batch or 8, device))
        for row, ratio in zip(rows, ratios):
            row["speed"] = ratio
        say(speed_table(rows, result["speed"], trained))
    if args.plot and RANK == 0:
        plot(args.plot, rows, result.get("base"), trained or [1.0], str(args.model))
    return result


def main(argv=None) -> None:
    """Prints tables on stderr, and with --json the same as one JSON line on stdout."""
    args = arguments(argv)
    result = run(args, setup(args.device))
    if args.json and RANK == 0:
        print(json.dumps(json.loads(json.dumps(result), parse_constant=lambda nan: None)))  # JSON has no NaN
    finish()


if __name__ == "__main__":
    main()
