"""
What a training step costs, side by side in one process: elastic against dense, dense against a plain loop.

    python bench_train.py                    a random Llama of dim 512 on this machine
    python bench_train.py --compile          the same with compiled blocks
    python bench_train.py --device cuda --dim 2048 --layers 16 --heads 32 --kv-heads 8 --ffn-dim 8192 --seq-len 2048

    plain       a loop in the manner of nanoGPT around a Llama written for nothing else (below)
    dense       train.py's step with budget 1.0 alone, clip and AdamW included
    elastic     train.py's step with budgets 1.0 .8 .6 .4, router and modulation included, all passes sliced
    soft .25    the same with a quarter of the passes soft, at full width

All run in turn in every round, so a busy machine slows them alike; a row is the median over rounds of its tokens/s over
the dense step's in the same round.
"""
import argparse
import json
import statistics
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from bench.slices import add_shape, shape_of
from plumbing.latency import seconds
from model import Llama, LlamaConfig, SubNet, apply_rope, rope_frequencies
from optimizer import clip_gradients, make_optimizers
from plumbing.parallel import autocast, device_of
from router import Router
from plumbing.settings import parse_args
from plumbing.sharding import compile_blocks, compiled_graphs
from space import Space, cost, n_params, train_flops
from plumbing.errors import fail

# bf16 without sparsity, for MFU: NVIDIA's data sheets, FLOP/s
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}

# -----------------------------------------------------------------------------
# the plain loop


class PlainBlock(nn.Module):
    """What a block is when it need not be anything else."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.c, q, kv = c, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.wq, self.wk, self.wv = (nn.Linear(c.dim, out, bias=False) for out in (q, kv, kv))
        self.wo = nn.Linear(q, c.dim, bias=False)
        self.w1, self.w3, self.w2 = (nn.Linear(*shape, bias=False) for shape in
                                     ((c.dim, c.ffn_dim), (c.dim, c.ffn_dim), (c.ffn_dim, c.dim)))
        self.norm1, self.norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, cos, sin):
        """x: (B, T, dim), and so is what comes out."""
        B, T, _ = x.shape
        h = self.norm1(x)
        q, k, v = (w(h).view(B, T, -1, self.c.head_dim) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                           enable_gqa=True)
        x = x + self.wo(y.transpose(1, 2).reshape(B, T, -1))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class PlainLlama(nn.Module):
    """The same function and the same number of parameters as Llama, without slices, gates or modulation."""

    def __init__(self, c: LlamaConfig, length: int):
        super().__init__()
        self.embed, self.out = nn.Embedding(c.vocab_size, c.dim), nn.Linear(c.dim, c.vocab_size, bias=False)
        self.blocks, self.norm = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layers)), nn.RMSNorm(c.dim, c.norm_eps)
        angle = torch.outer(torch.arange(length).float(), rope_frequencies(c))[:, None]
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens, targets):
        """(B, T) ids -> mean cross-entropy in nats."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.out(self.norm(x)).float().flatten(0, 1), targets.flatten())


def plain_step(config: LlamaConfig, shards, args, device):
    """A function that makes one step of the plain loop on the tokens of one budget."""
    torch.manual_seed(0)
    model = PlainLlama(config, args.seq_len).to(device)
    for block in model.blocks if args.compile else ():
        block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = args.batch_tokens // args.seq_len

    def step(i: int) -> float:
        """Step i; its loss."""
        optimizer.zero_grad(set_to_none=True)
        x, y = shards.batch(i, rows, 0, rows)
        for m in range(0, rows, args.micro_batch):
            tokens, targets = (t[m:m + args.micro_batch].to(device) for t in (x, y))
            with autocast(device):
                loss = model(tokens, targets)
            (loss * len(tokens) / rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()
    return step


# -----------------------------------------------------------------------------
# train.py's step


class RandomTokens:
    """In place of data.shards.Shards: the bench reads no files."""

    def __init__(self, vocab_size: int, seq_len: int):
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def batch(self, step, rows, first, last):
        """Windows first..last of a step's batch, as Shards.batch: (x, y), each (last - first, seq_len)."""
        generator = torch.Generator().manual_seed(step * rows + first)
        tokens = torch.randint(self.vocab_size, (last - first, self.seq_len + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]


def our_step(config: LlamaConfig, shards, args, device, budgets, soft: float):
    """A function that makes one whole step of train.py's, as its loop does."""
    # The share of soft passes stays what it is, and the router learns from the start.
    args = argparse.Namespace(**vars(args) | dict(budgets=budgets, soft_prob=soft, soft_end=1e9, router_start=0.0))
    model = Llama(config).init_weights().to(device)
    router = Router(Space(config), budgets=budgets) if len(budgets) > 1 else None
    if args.compile:
        compile_blocks(model)
    optimizers, got = make_optimizers(model, router, args), []

    def step(i: int) -> float:
        """Step i; the loss at budget 1."""
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        result = train.train_step(model, model, router, shards, i, args, device)
        clip_gradients(model, router, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        got.append(statistics.mean(1.0 if p["soft"] else cost(config, p["subnet"]) for p in result["passes"]))
        return result["passes"][-1]["loss"]
    step.got = got
    return step


# -----------------------------------------------------------------------------
# the table


def mfu(config: LlamaConfig, seq_len: int, tokens_per_second: float, name: str, share: float = 1.0) -> float | None:
    """What part of the GPU's bf16 peak a step uses whose passes run a share of the blocks. None on a device whose peak
    is not known here."""
    peak = next((peak for gpu, peak in PEAK.items() if gpu in name), None)
    return peak and train_flops(config, seq_len, share) * tokens_per_second / peak


def main(argv=None) -> None:
    """Prints the table on stderr, with --json also one JSON line on stdout."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; python bench_train.py --help lists the flags")
    add_shape(p)
    p.add_argument("--micro-batch", type=int, default=4, help="sequences per forward")
    p.add_argument("--compile", action="store_true", help="compile the blocks, also the plain loop's")
    args = p.parse_args(argv)
    config, device = shape_of(args), device_of(args.device)
    flags = parse_args(["--batch-tokens", str(args.batch * args.seq_len), "--seq-len", str(args.seq_len), "--device",
                        args.device, "--micro-batch", str(args.micro_batch), *["--compile"] * args.compile])
    tokens, budgets = RandomTokens(config.vocab_size, args.seq_len), [1.0, 0.8, 0.6, 0.4]
    given = (config, tokens, flags, device)
    steps = {"plain": plain_step(*given), "dense": our_step(*given, [1.0], 0.0),
             "elastic": our_step(*given, budgets, 0.0), "soft .25": our_step(*given, budgets, 0.25)}
    passes = {name: 1 if name in ("plain", "dense") else len(budgets) for name in steps}
    speed = {name: [] for name in steps}
    for r in range(args.rounds + 2):  # two to warm up
        for name, step in steps.items():
            speed[name].append(passes[name] * flags.batch_tokens / seconds(lambda: step(r), device))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; {args.batch} x {args.seq_len} tokens per budget and step, dim "
          f"{config.dim}, {n_params(config, SubNet.full(config)):,} parameters", file=sys.stderr)
    print(f"{'step':>9} {'tok/s over dense':>17} {'mean cost of its passes':>24} {'MFU':>6}", file=sys.stderr)
    rows = []
    for step, run in steps.items():
        ratios = [a / b for a, b in zip(speed[step][2:], speed["dense"][2:])]
        got = statistics.mean(getattr(run, "got", [1.0])[2:] or [1.0])
        used = mfu(config, args.seq_len, statistics.median(speed[step][2:]), name, got)
        rows.append(dict(step=step, ratio=statistics.median(ratios), low=min(ratios), high=max(ratios), cost=got,
                         mfu=used))
        print(f"{step:>9} {rows[-1]['ratio']:17.3f} {got:24.3f} {f'{used:.1%}' if used else '-':>6}   "
              f"({min(ratios):.3f} to {max(ratios):.3f})", file=sys.stderr)
    if args.compile:
        print(f"{compiled_graphs()} graphs", file=sys.stderr)
    if args.json:
        print(json.dumps(dict(device=name, rows=rows)))


if __name__ == "__main__":
    main()
