"""The demo in miniature, which many tests train or start from (the fixture `demo` in conftest.py)."""
import dataclasses
import functools
import json

import torch

import train
from data.shards import Shards
from data.tokenizer import TOKENIZER
from model import LlamaConfig
from plumbing.checkpoint import load_llama, save_llama
from router import Router
from space import Space
from tests.helpers import GQA, random_llama

# A few steps, sequences of 32 tokens.
TINY = ["--base-steps", "8", "--steps", "6", "--seq-len", "32", "--batch-tokens", "256",
        "--eval-windows", "8", "--calibration-windows", "8", "--eval-every", "3", "--save-every", "3",
        "--device", "cpu", "--log-every", "1"]
# in place of LlamaConfig, whose default is the demo's
SMALL_CONFIG = functools.partial(dataclasses.replace, GQA)
ODD = LlamaConfig(dim=44, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=8, ffn_dim=50, vocab_size=600,
                  context=32)
RUN = ("consolidated.00.pth", "flex.pt", "params.json")


def save_random(folder, config: LlamaConfig, data) -> None:
    """Writes a Llama of random weights, with the tokenizer of a data folder. Its first layers
    are not the best ones."""
    model = random_llama(config)
    with torch.no_grad():
        for layer, size in zip(model.layers, (0.2, 1.5, 0.4, 1.0)):
            layer.attention.wo.weight *= size
            layer.feed_forward.w2.weight *= size
    save_llama(folder, config, model.state_dict(), data / TOKENIZER)


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in RUN}


def parts(root, flags, budgets=(1.0, 0.5), **changes):
    """(model, router with random last layers, shards, args) for one train_step."""
    args = train.parse_args(["--llama", str(root / "out/base"), *flags, "--budgets", *map(str, budgets)])
    vars(args).update(dict(router_start=0.0, teach="soft") | changes)
    model = load_llama(args.llama)
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
