"""The demo in miniature, which many tests train or start from (the fixture `demo` in conftest.py)."""
import json

import torch

import train
from data.shards import Shards
from plumbing.checkpoint import load_llama
from router import Router
from space import Space

# A demo in miniature: the project's own source as text, a few steps, sequences of 32 tokens.
TINY = ["--base-steps", "8", "--steps", "6", "--seq-len", "32", "--batch-tokens", "256", "--eval-windows", "8",
        "--calibration-windows", "8", "--eval-every", "3", "--save-every", "3", "--device", "cpu", "--log-every", "1"]
RUN = ("consolidated.00.pth", "flex.pt", "params.json")


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in RUN}


def parts(root, flags, budgets=(1.0, 0.5), **changes):
    """(model, router with random last layers, shards, args) for one train_step."""
    args = train.parse_args(flags + ["--llama", str(root / "out/base"), "--budgets", *map(str, budgets)])
    vars(args).update(dict(router_start=0.0) | changes)
    model = load_llama(root / "out/base")
    router = Router(Space(model.config), args.router)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in router.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model, router, Shards(root / "data", "train", 32, model.config.vocab_size, 0), args


def gradients(model, router):
    return {n: p.grad.clone() for m in (model, router) for n, p in m.named_parameters() if p.grad is not None}


def log(folder, key: str) -> list:
    """What log.jsonl says of the last run of every step."""
    return list({r["step"]: r[key] for r in map(json.loads, open(folder / "log.jsonl")) if key in r}.values())
