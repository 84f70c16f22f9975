"""
What a training step costs, side by side in one process: elastic against dense, dense against a
plain loop.

    python -m bench.steps                 a random Llama of dim 512 on this machine
    python -m bench.steps --compile       the same with compiled blocks
    python -m bench.steps --device cuda --dim 2048 --heads 32 --kv-heads 8 --ffn-dim 8192

    plain       a loop in the manner of nanoGPT around a Llama written for nothing else (below)
    dense       train.py's step with budget 1.0 alone, clip and AdamW included
    elastic     train.py's step with budgets 1.0 .8 .6 .4, router and modulation included,
                all passes sliced
    soft .25    the same with a quarter of the passes soft, at full width

All run in turn in every round, so a busy machine slows them alike. A row is the median over the
rounds of its tokens/s over the dense step's in the same round.
"""
import argparse
import json
import statistics
import sys
from typing import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from bench.slices import add_shape, shape_of
from model import Llama, LlamaConfig, SubNet, apply_rope, rope_frequencies
from plumbing.duration import train_flops
from plumbing.errors import Parser, run_main
from plumbing.latency import seconds
from plumbing.parallel import AUTOCASTS, autocast, autocast_is, device_of
from plumbing.settings import parse_args
from plumbing.sharding import compile_blocks, compiled_graphs
from router import Router
from space import Space, cost, n_params

# bf16 without sparsity, for MFU: NVIDIA's data sheets, FLOP/s
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}
BUDGETS = [1.0, 0.8, 0.6, 0.4]
PASSES = {"plain": 1, "dense": 1, "elastic": len(BUDGETS), "soft .25": len(BUDGETS)}  # of each step
WARM_UP = 2  # rounds that do not count

# -----------------------------------------------------------------------------
# the plain loop


class PlainBlock(nn.Module):
    """What a block is when it need not be anything else."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.norm1 = nn.RMSNorm(c.dim, c.norm_eps)
        self.norm2 = nn.RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, cos, sin):
        """x: (B, T, dim), and so is what comes out."""
        B, T, _ = x.shape
        h = self.norm1(x)
        q = self.wq(h).view(B, T, -1, self.head_dim)               # B, T, n_heads, head_dim
        k = self.wk(h).view(B, T, -1, self.head_dim)               # B, T, n_kv, head_dim
        v = self.wv(h).view(B, T, -1, self.head_dim)
        q = apply_rope(q, cos, sin).transpose(1, 2)                # B, n_heads, T, head_dim
        k = apply_rope(k, cos, sin).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).reshape(B, T, -1)                    # B, T, n_heads * head_dim
        x = x + self.wo(y)                                         # B, T, dim
        h = self.norm2(x)
        h = F.silu(self.w1(h)) * self.w3(h)                        # B, T, ffn_dim
        return x + self.w2(h)


class PlainLlama(nn.Module):
    """The same function and the same number of parameters as Llama, without slices, gates or
    modulation."""

    def __init__(self, c: LlamaConfig, length: int):
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.dim)
        self.out = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        position = torch.arange(length).float()
        angle = torch.outer(position, rope_frequencies(c))[:, None]  # length, 1, head_dim/2
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens, targets):
        """(B, T) ids -> mean cross-entropy in nats."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.out(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_step(config: LlamaConfig, shards, args, device) -> Callable[[int], float]:
    """A function that makes one step of the plain loop on the tokens of one budget, and returns its
    loss."""
    torch.manual_seed(0)
    model = PlainLlama(config, args.seq_len).to(device)
    if args.compile:
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    rows = args.batch_tokens // args.seq_len

    def step(i: int) -> float:
        """Step i; its loss."""
        optimizer.zero_grad(set_to_none=True)
        x, y = shards.batch(i, rows, 0, rows)
        for first in range(0, rows, args.micro_batch):
            tokens = x[first:first + args.micro_batch].to(device)
            targets = y[first:first + args.micro_batch].to(device)
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
        self.vocab_size = vocab_size
        self.seq_len = seq_len

    def batch(self, step, rows, first, last):
        """Windows first..last of a step's batch, as Shards.batch: (x, y), each (last - first,
        seq_len)."""
        generator = torch.Generator().manual_seed(step * rows + first)
        shape = (last - first, self.seq_len + 1)
        tokens = torch.randint(self.vocab_size, shape, generator=generator)
        x = tokens[:, :-1]
        y = tokens[:, 1:]
        return x, y


class OurStep:
    """Makes whole steps of train.py's, as its loop does. costs: the mean cost of each step's passes
    so far. losses: of the last step, budget by budget."""

    def __init__(self, model: Llama, shards, args, device, budgets: list, soft: float):
        """soft: the share of soft passes. It stays what it is, and the router learns from the
        start. model: on the device; the steps train it."""
        fixed = dict(budgets=budgets, teach="soft", teach_prob=soft, teach_end=1e9, router_start=0.0)
        self.args = argparse.Namespace(**vars(args) | fixed)
        self.shards = shards
        self.device = device
        self.model = model
        self.model.activation_checkpointing = args.activation_checkpointing
        self.router = None
        if len(budgets) > 1:
            self.router = Router(Space(model.config), budgets=budgets)
        if args.compile:
            compile_blocks(self.model)
        self.optimizers = train.make_optimizers(self.model, self.router, self.args)
        self.costs = []
        self.losses = []

    def __call__(self, i: int) -> float:
        """Step i; the loss at budget 1."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        result = train.train_step(self.model, self.model, self.router, self.shards, i, self.args,
                                  self.device)
        train.clip_gradients(self.model, self.router, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        passes = result["passes"]
        self.costs.append(statistics.mean(self.cost_of(one) for one in passes))
        self.losses = [one["loss"] for one in passes]
        return self.losses[-1]

    def cost_of(self, one: dict) -> float:
        """The cost of a pass. A soft pass runs at full width."""
        if one["soft"]:
            return 1.0
        return cost(self.model.config, one["subnet"])


# -----------------------------------------------------------------------------
# the table


def mfu(config: LlamaConfig, seq_len: int, tokens_per_second: float, name: str,
        share: float = 1.0) -> float | None:
    """What part of the GPU's bf16 peak a step uses whose passes run a share of the blocks. None on
    a device whose peak is not known here."""
    for gpu, peak in PEAK.items():
        if gpu in name:
            return train_flops(config, seq_len, share) * tokens_per_second / peak
    return None


def fresh_llama(config: LlamaConfig, device: torch.device) -> Llama:
    """Random weights, made where they are used: init_weights() takes long for a billion of them."""
    torch.manual_seed(0)
    with device:
        model = Llama(config)
    nn.init.normal_(model.tok_embeddings.weight, std=0.02)
    return model


def make_step(name: str, config: LlamaConfig, flags, device):
    """One of PASSES, with a Llama of its own."""
    shards = RandomTokens(config.vocab_size, flags.seq_len)
    if name == "plain":
        return plain_step(config, shards, flags, device)
    model = fresh_llama(config, device)
    budgets = [1.0] if name == "dense" else BUDGETS
    soft = 0.25 if name == "soft .25" else 0.0
    return OurStep(model, shards, flags, device, budgets, soft)


def time_steps(steps: dict, flags, device, rounds: int) -> tuple[dict, dict]:
    """(tokens/s of every counted round, mean cost of the counted passes), by the name of the step.
    steps: name -> a step that was not made yet; they take turns."""
    speeds = {name: [] for name in steps}
    for r in range(rounds + WARM_UP):
        for name, step in steps.items():
            took = seconds(lambda: step(r), device)
            if r >= WARM_UP:
                speeds[name].append(PASSES[name] * flags.batch_tokens / took)

    costs = {}
    for name, step in steps.items():
        costs[name] = statistics.mean(step.costs[-rounds:]) if name != "plain" else 1.0
    return speeds, costs


def measure_steps(config: LlamaConfig, flags, device, rounds: int) -> tuple[dict, dict]:
    """time_steps() of all PASSES, in turns."""
    steps = {name: make_step(name, config, flags, device) for name in PASSES}
    return time_steps(steps, flags, device, rounds)


def flags_of(args: argparse.Namespace, *more: str) -> argparse.Namespace:
    """train.py's own flags, for its step."""
    words = ["--batch-tokens", str(args.batch * args.seq_len)]
    words += ["--seq-len", str(args.seq_len)]
    words += ["--micro-batch", str(args.micro_batch)]
    words += ["--device", args.device]
    return parse_args([*words, *more])


def main(argv=None) -> None:
    """Prints the table on stderr, with --json also one JSON line on stdout."""
    p = Parser("python -m bench.steps", __doc__)
    add_shape(p)
    p.add_argument("--micro-batch", type=int, default=4, help="sequences per forward")
    p.add_argument("--compile", action="store_true", help="compile the blocks, the plain ones too")
    p.add_argument("--autocast", choices=AUTOCASTS, help="as train.py's")
    args = p.parse_args(argv)
    config = shape_of(args)
    device = device_of(args.device)
    flags = flags_of(args, *(["--compile"] if args.compile else []))
    with autocast_is(args.autocast):
        speeds, costs = measure_steps(config, flags, device, args.rounds)

    name = f"cpu, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; {args.batch} x {args.seq_len} tokens per budget and "
          f"step, dim {config.dim}, {n_params(config, SubNet.full(config)):,} parameters",
          file=sys.stderr)
    print("     step  tok/s over dense  mean cost of its passes    MFU", file=sys.stderr)
    rows = []
    for step, speed in speeds.items():
        ratios = [ours / dense for ours, dense in zip(speed, speeds["dense"])]
        low = min(ratios)
        middle = statistics.median(ratios)
        high = max(ratios)
        share = costs[step]
        used = mfu(config, args.seq_len, statistics.median(speed), name, share)
        percent = f"{used:.1%}" if used else "-"
        print(f"{step:>9} {middle:17.3f} {share:24.3f} {percent:>6}   "
              f"({low:.3f} to {high:.3f})", file=sys.stderr)
        rows.append(dict(step=step, ratio=middle, low=low, high=high, cost=share, mfu=used))
    if args.compile:
        print(f"{compiled_graphs()} graphs", file=sys.stderr)
    if args.json:
        print(json.dumps(dict(device=name, rows=rows)))


if __name__ == "__main__":
    run_main(main)
