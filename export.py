"""
Writes the slice a budget buys as a plain Llama folder: no router, no modulation, no trace of the supernet.

    python export.py --budget 0.5                        out/flex -> out/flex-0.50, in Meta's layout
    python export.py --budget 0.5 --format hf            out/flex -> out/flex-0.50-hf, for transformers, vLLM, lm-eval
    python export.py --memory 6GB --context 8192         the best slice whose weights and KV cache fit
    python export.py --latency 0.6                       a slice that takes 0.6 of the full model's time, measured here
    python export.py --budget 0.8 0.6 0.4 --dry-run      the sizes, and nothing written

What there is to do after training: ask the router for the SubNet, cut its prefix out of every tensor, and multiply the
modulation's factors into the rows of wo and w2 (a factor on a linear layer's output is a factor on its weight).
The result is what the supernet computes at that budget, and a Llama folder like the one training started from.
"""
import argparse
import re
import signal
import sys
from pathlib import Path

import torch

import plumbing.hf as hf
from plumbing.checkpoint import RESUME, TOKENIZER, WEIGHTS, load_llama, save_llama
from plumbing.files import new_folder
from flextron.deployed import FLEXTRON, open_flextron
from plumbing.family import slice_at
from plumbing.latency import TABLE, load_latency
from model import Llama, LlamaConfig, SubNet
from plumbing.params import PARAMS
from router import Router, load_router
from space import cost, n_params
from plumbing.errors import fail
from data.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = {"llama": {PARAMS, WEIGHTS, TOKENIZER},
        "hf": {"config.json", "generation_config.json", "model*.safetensors*", "tokenizer*.json"}}

# -----------------------------------------------------------------------------
# what a slice weighs


def weight_bytes(config: LlamaConfig, subnet: SubNet, dtype: torch.dtype) -> int:
    """Bytes of all weights of a slice, embeddings included."""
    return n_params(config, subnet, embeddings=True) * dtype.itemsize


def cache_bytes(config: LlamaConfig, subnet: SubNet, dtype: torch.dtype, context: int) -> int:
    """Bytes of the keys and values of `context` tokens, batch 1."""
    return 2 * sum(subnet.config(config).per_layer("n_kv_heads")) * config.head_dim * context * dtype.itemsize


def amount(text: str) -> float:
    """4.0B -> 4e9; 6GB -> 6e9, 6GiB -> 6 * 2^30."""
    found = re.fullmatch(r"([\d.]+) ?([KMGBT]?)(iB|B)?", text.strip(), re.I)
    try:
        power = " KMGT".replace("G", "B").index((found[2].upper() or " ").replace("G", "B"))
        return float(found[1]) * (1024 if (found[3] or "").lower() == "ib" else 1000) ** power
    except (TypeError, ValueError):
        fail(f"{text} found; expected a number with a unit, such as --params 4.0B, or --memory 6GB or 6GiB")


def largest(router: Router, size, limit: float, what: str) -> float:
    """The budget whose slice is the largest with size(slice) <= limit; the router is asked at every thousandth."""
    budgets = [b for b in (i / 1000 for i in range(1000, 0, -1)) if b >= router.space.costs.min()]
    slices = {b: router.route(b) for b in budgets}
    fitting = [b for b in budgets if size(slices[b]) <= limit]
    if not fitting:
        fail(f"no sub-network fits into {limit:,.0f} {what}; the smallest takes "
             f"{min(map(size, slices.values())):,}; ask for more")
    return max(fitting, key=lambda b: cost(router.space.config, slices[b]))


# -----------------------------------------------------------------------------
# cutting it out


def fold(model: Llama, subnet: SubNet, factors: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> dict:
    """State dict of the slice as a Llama of its own, factors (n_layers, 2[, dim]) multiplied into wo and w2 in fp32 and
    rounded to dtype once."""
    scale = {}
    if factors is not None:
        for new, old in enumerate(subnet.layers):
            rows = [f[:subnet.dim, None] if f.dim() else f for f in factors[old]]
            scale[f"layers.{new}.attention.wo.weight"], scale[f"layers.{new}.feed_forward.w2.weight"] = rows
    state = {}
    for name, w in model.slices(subnet).items():
        if not (model.config.tied and name == "output.weight"):
            w = w.detach().float() * scale[name] if name in scale else w.detach()
            state[name] = w.to(dtype).clone(memory_format=torch.contiguous_format)  # views leave their source behind
    if model.config.tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def choose(folder, model: Llama, router: Router | None, asked: float, unit: str = "params") -> tuple:
    """slice_at(), and the same of flextron.py's static routers."""
    if network := open_flextron(folder, model, asked, unit):
        if network.subnet is None:
            fail(f"{folder} has dynamic routers: every token takes its own width, and no slice is what they choose; "
                 "expected static ones (python flextron.py --router static), or --budget 1.0")
        return network.subnet, None
    return slice_at(folder, model, router, asked, unit)


def load(folder, dtype: torch.dtype | None) -> tuple[Llama, Router | None, torch.dtype]:
    """(model, router, dtype to write): weights stay in the file's dtype until they are folded."""
    model = load_llama(folder, dtype=None)
    return model, load_router(folder, model.config), dtype or model.norm.weight.dtype


def export(folder, budget: float = 1.0, out=None, dtype: torch.dtype | None = None, kind: str = "llama",
           loaded=None, unit: str = "params") -> tuple[Path, SubNet, LlamaConfig]:
    """Writes the slice of the supernet in `folder` at `budget` (unit latency: a fraction of its time) into `out`
    (default: folder-0.50, folder-0.50-hf, folder-latency-0.50), in dtype (default: the supernet's). A plain Llama is
    its own only slice. Returns where, the slice, and the shape it was cut from."""
    model, router, dtype = loaded or load(folder, dtype)
    subnet, factors = choose(folder, model, router, budget, unit)
    name = "latency-" * (unit == "latency") + (f"{budget:.2f}" if budget == round(budget, 2) else f"{budget:g}")
    stem = Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()  # . and .. have no name
    out = Path(out or f"{stem}-{name}{'-hf' if kind == 'hf' else ''}")
    ours = not (out / PARAMS).exists() or '"ffn_dim"' in (out / PARAMS).read_text()
    if (out / RESUME).exists() or not ours or out.resolve() == Path(folder).resolve():
        fail(f"{out} is a training run or a Llama from elsewhere; expected a new folder or an earlier export; choose "
             "another --out")
    config, tokenizer = subnet.config(model.config), Path(folder) / TOKENIZER
    if kind == "hf":
        hf.model_config(config, dtype, 0, 0)  # what cannot be written is refused before anything is
        foreign = not tokenizer.is_file() or tokenizer.read_bytes()[:1] == b"\n"
        enc = None if foreign else load_tokenizer(tokenizer, config.vocab_size)
        if foreign:
            print(f"note: {tokenizer} is missing or a SentencePiece model; {out} gets no tokenizer: copy that of the "
                  "original Hugging Face model into it", file=sys.stderr)
    with new_folder(out, may_replace=OURS[kind]) as temporary:
        state = fold(model, subnet, factors, dtype)
        if kind == "hf":
            hf.save_hf(temporary, config, state, enc)
        else:
            save_llama(temporary, config, state, tokenizer)
    return out, subnet, model.config


def spread(sizes: tuple[int, ...]) -> str:
    """A size, or the range of those of the layers."""
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)}-{max(sizes)}"


def sizes_table(full: LlamaConfig, rows: list[tuple[float, SubNet]], dtype: torch.dtype, context: int) -> str:
    """What slices would be: a line per budget."""
    lines = [f"{'budget':>7} {'got':>6} {'dim':>6} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>15} "
             f"{'with embeddings':>16} {'weights, GB':>12} {f'KV of {context:,} tokens, GB':>27}"]
    for b, s in rows:
        lines.append(f"{b:7.3f} {cost(full, s):6.3f} {s.dim:6d} {spread(s.n_heads):>5} {spread(s.ffn_dim):>6} "
                     f"{len(s.layers):6d} "
                     f"{n_params(full, s):15,} {n_params(full, s, embeddings=True):16,} "
                     f"{weight_bytes(full, s, dtype) / 1e9:12.3f} {cache_bytes(full, s, dtype, context) / 1e9:27.3f}")
    return "\n".join(lines)


def report(out: Path, full: LlamaConfig, subnet: SubNet, kind: str, asked: str) -> None:
    """What was written."""
    print(f"{out}: dim {subnet.dim}, {spread(subnet.n_heads)} heads of {full.head_dim}, ffn {spread(subnet.ffn_dim)}, "
          f"layers {len(subnet.layers)} of {full.n_layers} ({' '.join(map(str, subnet.layers))})\n"
          f"{asked}got {cost(full, subnet):.3f} of the non-embedding parameters: {n_params(full, subnet):,}\n"
          f"{n_params(full, subnet, embeddings=True):,} parameters with embeddings, "
          f"{sum(f.stat().st_size for f in out.iterdir()):,} bytes")
    if kind == "llama" and len({*subnet.n_heads}) + len({*subnet.ffn_dim}) > 2:
        print("note: layers of several shapes; nanoFlex loads this folder, no other program that we know does",
              file=sys.stderr)
    elif kind == "llama" and subnet.dim != subnet.n_heads[0] * full.head_dim:
        print(f"note: {subnet.n_heads[0]} heads of {full.head_dim} do not make {subnet.dim} channels; nanoFlex "
              "loads this folder, Meta's own code takes heads of another size; --format hf is read everywhere",
              file=sys.stderr)


def main(argv=None) -> None:
    """Exports the budgets asked for and says what they got."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python export.py --help lists the flags")
    ask = p.add_mutually_exclusive_group()
    ask.add_argument("--budget", type=float, nargs="+", help="fractions of the full model's non-embedding parameters")
    ask.add_argument("--latency", type=float, nargs="+", help="instead: fractions of the full model's time, by "
                     "latency.json; without one, the CPU's (for a GPU, python latency.py --device cuda first)")
    ask.add_argument("--params", help="instead: at most so many parameters, embeddings included, such as 4.0B")
    ask.add_argument("--memory", help="instead: at most so much for weights and KV cache, such as 6GB")
    p.add_argument("--context", type=int, help="tokens in the KV cache, batch 1 (default: the model's window)")
    p.add_argument("--model", default="out/flex", help="folder of a supernet (or a plain Llama, to convert it)")
    p.add_argument("--out", help="folder to write (default: the model's name and the budget)")
    p.add_argument("--format", choices=list(OURS), default="llama", help="Meta's layout, or Hugging Face's")
    p.add_argument("--dtype", choices=list(DTYPES), help="default: the supernet's")
    p.add_argument("--dry-run", action="store_true", help="print the sizes, write nothing")
    args = p.parse_args(argv)
    model, router, dtype = loaded = load(args.model, DTYPES.get(args.dtype))
    full, context = model.config, model.config.context if args.context is None else args.context
    flextron, unit = (Path(args.model) / FLEXTRON).exists(), "latency" if args.latency else "params"
    if context < 1:
        fail(f"--context {context} found; expected 1 or more tokens")
    budgets = args.budget or args.latency or ([1.0] if router is None and not flextron else None)
    if router and (args.params or args.memory):
        size, what = (lambda s: n_params(full, s, embeddings=True)), "parameters"
        if args.memory:
            size = lambda s: weight_bytes(full, s, dtype) + cache_bytes(full, s, dtype, context)
            what = f"bytes of weights ({str(dtype)[6:]}) and KV cache ({context:,} tokens)"
        budgets = [largest(router, size, amount(args.params or args.memory), what)]
    elif args.params or args.memory:
        fail(f"{args.model} has no flex.pt, so no sizes to find one among; expected a supernet's folder, made by "
             "train.py, or --budget or --latency where flextron.py made it")
    if not budgets and not args.dry_run:
        fail("no size asked for; expected --budget 0.5, --latency 0.6, --params 4B or --memory 6GB; see --dry-run")
    if len(budgets or ()) > 1 and args.out:
        fail(f"--out {args.out} is one folder for {len(budgets)} budgets; leave --out out: each gets one of its own")
    if args.dry_run:
        if not budgets:
            smallest = router.space.costs.min() if router else 1.0
            budgets = [b for b in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3) if b >= smallest]
        rows = [(b, choose(args.model, model, router, b, unit)[0]) for b in budgets]
        return print(sizes_table(full, rows, dtype, context))
    for budget in budgets:  # what cannot be had is refused before anything is written
        choose(args.model, model, router, budget, unit)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for budget in budgets:
        try:
            out, subnet, _ = export(args.model, budget, args.out, dtype, args.format, loaded, unit)
        except OSError as error:
            fail(f"the export at budget {budget:g} could not be written ({error.strerror or error}); nothing of it was "
                 "kept; make room, or choose another --out")
        except KeyboardInterrupt:
            fail(f"interrupted at budget {budget:g}; nothing of it was kept; run the same command again")
        if unit == "latency":
            print(f"asked for {budget:.3f} of the full model's time, {load_latency(args.model, model)(subnet):.3f} by "
                  f"{Path(args.model) / TABLE}")
        report(out, full, subnet, args.format, f"asked {budget:.3f}, " * (unit == "params"))


if __name__ == "__main__":
    main()
