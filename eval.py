"""
Validation loss per budget, of a supernet or of any plain Llama folder.

    python eval.py                                       the table of out/flex
    python eval.py --model out/flex-0.50                 an export
    python eval.py --budgets 1.0 0.55 --text book.txt    the loss on a file, at sizes never trained
    python eval.py --json                                one JSON object as the last line of stdout
    python eval.py --model out/flextron --text book.txt  flextron.py's: mean widths per layer, what each token took

Without --text the held-out windows are those of training's table, which flex.pt remembers.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from checkpoint import TOKENIZER, load_llama, load_tensors
from data.shards import Shards
from deployed import FLEXTRON, Deployed, deploy, load_flextron, picture
from latency import load_latency
from model import Llama
from parallel import device_of
from pertoken import costs_of, parameters_of, total
from router import FLEX, load_router
from space import cost, n_params
from tokenizer import encode_document, fail, load_tokenizer
from train import TABLE_BUDGETS, evaluate


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


def mean_loss(model: Llama, pairs, subnet, factors, batch: int | None) -> tuple[float, int]:
    """(mean cross-entropy in nats, tokens scored) over pairs of windows (x, y)."""
    counts = [y.numel() for _, y in pairs]
    losses = [evaluate(model, pair, subnet, factors, batch)[0] for pair in pairs]
    return sum(l * n for l, n in zip(losses, counts)) / sum(counts), sum(counts)


def rows_of(model: Llama, router, budgets: list[float], pairs, batch: int | None, latency=None) -> list[dict]:
    """One row per budget, in the order asked. latency: of load_latency(), if it is what the budgets bound."""
    rows, config = [], model.config
    for budget in budgets:
        costs = latency and router and latency.costs(router.space, budget)
        subnet, factors = router.deploy(budget, costs) if router else (model.full, None)
        loss, tokens = mean_loss(model, pairs, subnet, factors, batch)
        one = lambda v: v[0] if len(set(v)) == 1 else list(v)
        rows.append(dict(budget=budget, got=round(cost(config, subnet), 6), params=n_params(config, subnet),
                         params_total=n_params(config, subnet, embeddings=True), dim=subnet.dim,
                         layers=list(subnet.layers), n_heads=one(subnet.n_heads), ffn_dim=one(subnet.ffn_dim),
                         loss=loss, tokens=tokens))
    return rows


def flextron_rows(networks: list[Deployed], asked: list[float], pairs, batch: int | None) -> list[dict]:
    """rows_of() for flextron.py's: got and parameters are means over tokens, heads and neurons means layer by layer."""
    rows, flextron = [], networks[0].flextron
    config, full = flextron.model.config, flextron.model.full
    costs = costs_of(config, flextron.sizes, parameters_of(config, flextron.dynamic))
    for network, budget in zip(networks, asked):
        loss, tokens = mean_loss(network, pairs, None, None, batch)
        got = total(network.shares(), costs)
        embeddings = n_params(config, full, embeddings=True) - n_params(config, full)
        params = round(got * n_params(config, full))
        widths = {kind: [round(w, 1) for w in of] for kind, of in network.widths().items()}
        rows.append(dict(budget=budget, got=round(got, 6), params=params, params_total=params + embeddings,
                         dim=config.dim, layers=list(full.layers), **widths, loss=loss, tokens=tokens))
    return rows


def print_widths(networks: list[Deployed], rows: list[dict], window: list[int] | None, tokenizer) -> None:
    """Mean widths, layer by layer; where tokens choose for themselves, what those of a window took."""
    for network, row in zip(networks, rows):
        heads, neurons = (" ".join(f"{w:g}" for w in row[kind]) for kind in ("n_heads", "ffn_dim"))
        print(f"{row['budget']:6.2f}  by layer: heads {heads} | neurons {neurons}", file=sys.stderr)
        if window and network.subnet is None:
            print(f"\nwhat tokens took at {row['budget']:g} (the text's first window; a higher bar is more of the "
                  f"network):\n\n{picture(network, window, tokenizer)}\n", file=sys.stderr)


def main(argv=None) -> None:
    """Prints a table on stderr, and with --json the same as one JSON line on stdout."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python eval.py --help lists the flags")
    p.add_argument("--model", default="out/flex", help="a supernet or any plain Llama folder")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budgets", type=float, nargs="+", help="default: 1.0 to 0.4 on a supernet, 1.0 on a plain Llama")
    ask.add_argument("--latency", type=float, nargs="+", help="instead: fractions of the full model's time")
    p.add_argument("--text", help="a text file to score instead of the validation shards")
    p.add_argument("--data", help="folder of shards, its val split (default: the one trained on, or data/pystdlib)")
    p.add_argument("--windows", type=int, help="validation windows at most (default: training's, or 128)")
    p.add_argument("--seq-len", type=int, help="tokens per window (default: the model's own context)")
    p.add_argument("--batch", type=int, help="windows per forward (default: 4096 tokens' worth)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = p.parse_args(argv)
    for flag in ("batch", "windows", "seq_len"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            fail(f"--{flag.replace('_', '-')} {getattr(args, flag)} found; expected 1 or more")
    model = load_llama(args.model, device_of(args.device))
    router = load_router(args.model, model.config)
    flextron = load_flextron(args.model, model)
    if router is None and flextron is None and any(b != 1 for b in args.budgets or args.latency or [1.0]):
        fail(f"{args.model} is a plain Llama: its only budget is 1.0; expected a folder made by train.py for others")
    flex = load_tensors(Path(args.model) / (FLEX if router else FLEXTRON)) if router or flextron else {}
    context = args.seq_len or flex.get("seq_len") or model.config.context
    smallest = router.space.costs.min() if router else 1.0
    budgets = args.budgets or args.latency or [b for b in TABLE_BUDGETS if b >= smallest]
    if flextron:
        budgets = args.budgets or args.latency or [1.0, *flex["targets"]]
        unit = "params" if args.budgets else "latency" if args.latency else flextron.unit
        networks = [deploy(flextron, args.model, b, unit) for b in budgets]
    if args.text:
        tokenizer = load_tokenizer(Path(args.model) / TOKENIZER, model.config.vocab_size)
        pairs = text_windows(args.text, tokenizer, context)
    else:
        data, own = args.data or flex.get("data", "data/pystdlib"), Path(args.model) / TOKENIZER
        theirs = Path(data) / TOKENIZER
        if own.is_file() and theirs.is_file() and own.read_bytes() != theirs.read_bytes():
            fail(f"{data} was made with another tokenizer than {own}; name the model's own data with --data")
        shards = Shards(data, "val", context, model.config.vocab_size)
        pairs = [shards.windows(args.windows or flex.get("eval_windows", 128))]
    if flextron:
        rows = flextron_rows(networks, budgets, pairs, args.batch)
    else:
        latency = load_latency(args.model, model, router.space.choices) if args.latency and router else None
        rows = rows_of(model, router, budgets, pairs, args.batch, latency)
    print(f"{'budget':>7} {'got':>6} {'dim':>5} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>14} "
          f"{'with emb.':>14} {'loss':>7} {'ppl':>8}   ({rows[0]['tokens']:,} tokens, windows of {context})",
          file=sys.stderr)
    for r in rows:
        star = "*" if r["budget"] in flex.get("targets", flex.get("budgets", [])) else " "
        listed = lambda v: v if isinstance(v, int) else f"{min(v)}-{max(v)}"
        print(f"{r['budget']:6.2f}{star} {r['got']:6.3f} {r['dim']:5d} {listed(r['n_heads']):>5} "
              f"{listed(r['ffn_dim']):>6} {len(r['layers']):6d} {r['params']:14,} {r['params_total']:14,} "
              f"{r['loss']:7.3f} {torch.tensor(r['loss']).exp().item():8.2f}", file=sys.stderr)
    if flextron:
        print_widths(networks, rows, pairs[0][0][0].tolist() if args.text else None, args.text and tokenizer)
    if args.json:
        print(json.dumps(dict(model=str(args.model), context=context, rows=rows)))


if __name__ == "__main__":
    main()
