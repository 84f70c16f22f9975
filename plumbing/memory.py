"""
What a run will take on every GPU, told from params.json, whether the weights are there or not.

    python train.py --llama Llama-3.1-8B --dry-run --ranks 8 --device cuda

Weights, gradients and AdamW's moments are arithmetic (sharding.py: 16 bytes a parameter, and who
keeps which). What the forward keeps for its backward is found out: the forward runs on fake
tensors, which have shapes and no memory, and all that autograd saves is added up. The plan is for
the worst moment, when the backward of a pass at full width begins while gradients and moments are
there. What CUDA and NCCL take for themselves comes on top.
"""
import argparse
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import LOSS_TOKENS, Llama, LlamaConfig, SubNet
from plumbing.checkpoint import open_shards
from plumbing.errors import fail
from plumbing.params import published_tying, read_config
from plumbing.sharding import SHARDINGS
from space import Space, n_params

# -----------------------------------------------------------------------------
# activations


def kept_by_forward(model: Llama, batch: int, seq_len: int, bf16: bool, soft: bool) -> int:
    """Bytes that autograd keeps of one forward on fake tensors, weights apart; soft: under
    gates."""
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        kept[storage._cdata] = storage  # held, or another could get its address
        return t

    tokens = torch.zeros(batch, seq_len, dtype=torch.long)
    space = Space(model.config) if soft else None
    gates = space.gates(torch.ones(space.onehot.size(1)).requires_grad_()) if soft else None
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
          torch.autocast("cpu", torch.bfloat16, bf16)):
        model(tokens, tokens, gates=gates)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def activation_bytes(config: LlamaConfig, batch: int, seq_len: int, bf16: bool,
                     checkpointing: bool, soft: bool) -> int:
    """Bytes kept for the backward of the full network, (batch, seq_len) tokens. With checkpointing:
    the blocks' inputs, and all of the one block that is being recomputed."""
    with FakeTensorMode():
        model = Llama(config)
        if not checkpointing:
            return kept_by_forward(model, batch, seq_len, bf16, soft)

        # One block, kept whole and kept as its input alone: the difference is what recomputing it
        # takes.
        full = model.full
        model.full = SubNet(config.dim, (0,), config.per_layer("n_heads")[:1],
                            config.per_layer("ffn_dim")[:1])
        one_block = kept_by_forward(model, batch, seq_len, bf16, soft)
        model.activation_checkpointing = True
        one_block -= kept_by_forward(model, batch, seq_len, bf16, soft)
        model.full = full
        return kept_by_forward(model, batch, seq_len, bf16, soft) + one_block


# -----------------------------------------------------------------------------
# the plan


def largest_block(config: LlamaConfig) -> int:
    """Parameters of the largest layer."""
    sizes = []
    for i, (heads, ffn) in enumerate(zip(config.per_layer("n_heads"), config.per_layer("ffn_dim"))):
        sizes.append(n_params(config, SubNet.uniform(config.dim, [i], heads, ffn)))
    return max(sizes)


def plan(config: LlamaConfig, args: argparse.Namespace, ranks: int, bf16: bool) -> list[dict]:
    """A row per --shard: bytes on every rank."""
    full = SubNet.full(config)
    n = n_params(config, full, embeddings=True)
    block = largest_block(config)
    outside = n - n_params(config, full) + config.dim  # embeddings, output, last norm
    gathered = 2 if bf16 else 4  # bytes of a number that fsdp has gathered
    batch = min(args.micro_batch, args.batch_tokens // args.seq_len // ranks)
    tokens = batch * args.seq_len
    logits = 4 * min(tokens, LOSS_TOKENS) * config.vocab_size  # of a chunk
    soft = args.teach == "soft" and args.teach_prob > 0 and len(args.budgets) > 1
    activations = activation_bytes(config, batch, args.seq_len, bf16, args.activation_checkpointing, soft)
    # Two gradients of the softmax. Its output is among what is kept, if there is one chunk only; if
    # there are several, they are made again one by one.
    activations += (2 if tokens <= LOSS_TOKENS else 3) * logits
    distils = args.kd > 0 and len(args.budgets) > 1
    rows = []
    for kind in SHARDINGS:
        split = ranks if kind == "fsdp" else 1
        moments = 1 if kind == "ddp" else ranks
        row = dict(weights=4 * n // split, gradients=4 * n // split, optimizer=8 * n // moments,
                   activations=activations, teacher=0)
        if distils:
            row["teacher"] = 4 * n // split + 3 * logits + 4 * tokens * config.dim
        if split > 1:
            # FSDP2 gathers what is outside the blocks for a whole pass, and two blocks at a time. A
            # gradient is whole before its sum over the ranks, which is made in fp32.
            row["weights"] += gathered * (2 * block + outside)
            row["gradients"] += gathered * (block + outside) + 4 * block
            if distils:  # its blocks are gathered when those of the student are not
                row["teacher"] += gathered * outside
        rows.append(dict(shard=kind, **row, total=sum(row.values())))
    return rows


def plan_table(args: argparse.Namespace) -> str:
    """plan() to read, in GB (1e9 bytes)."""
    if args.llama is None:
        config = LlamaConfig(context=args.seq_len)
    else:
        config = read_config(args.llama)
        if any(Path(args.llama).glob("consolidated.*.pth")):  # the weights know whether they are tied
            config = open_shards(args.llama, config)[2]
        config = published_tying(config)
    if args.batch_tokens % (args.seq_len * args.ranks):
        fail(f"--batch-tokens {args.batch_tokens} found; expected whole sequences of --seq-len "
             f"{args.seq_len}, equally many for each of {args.ranks} ranks; "
             f"try --batch-tokens {args.seq_len * 8 * args.ranks}")
    bf16 = args.autocast == "bfloat16"
    sequences = args.batch_tokens // args.seq_len // args.ranks
    micro = min(args.micro_batch, sequences)
    rows = plan(config, args, args.ranks, bf16)
    keys = [key for key in rows[0] if key != "shard"]
    n = n_params(config, SubNet.full(config), embeddings=True)
    lines = [f"GB on each of {args.ranks} ranks; {n:,} parameters; "
             f"{micro} x {args.seq_len} tokens a pass, {-(-sequences // micro)} passes per budget and step; "
             f"{'bf16 autocast' if bf16 else 'fp32'}, activation checkpointing "
             f"{'on' if args.activation_checkpointing else 'off'}",
             f"{'--shard':>8}" + "".join(f"{key:>13}" for key in keys)]
    for row in rows:
        lines.append(f"{row['shard']:>8}" + "".join(f"{row[key] / 1e9:13.2f}" for key in keys))
    return "\n".join(lines)
