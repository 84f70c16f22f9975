"""What several tests share: random, asymmetric Llamas of many shapes, slices of them, and a
demo in miniature."""
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import export as exporting
from data.tokenizer import save_tokenizer, train_bpe
from model import Gates, Llama, LlamaConfig, SubNet
from plumbing.checkpoint import save_llama, save_tensors
from plumbing.family import FLEX, open_family, router_state
from plumbing.params import params_json
from plumbing.sizes import default_folder
from router import Router
from space import Space, kv_groups

GQA = LlamaConfig(dim=48, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=8, ffn_dim=80, vocab_size=97,
                  context=32)
MHA = dataclasses.replace(GQA, n_heads=6, n_kv_heads=6)
SHAPES = {"gqa": GQA, "mha": MHA, "tied": dataclasses.replace(GQA, tied=True),
          "scaled rope": dataclasses.replace(GQA, rope_factor=8.0),
          "wide heads": dataclasses.replace(GQA, head_dim=16, n_kv_heads=4)}  # dim != n_heads * head_dim


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """Weights of size 1/sqrt(fan in) and norms far from one: all-ones norms would hide a missing multiply."""
    model, generator = Llama(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = torch.randn(p.shape, generator=generator)
            p.copy_(r.abs() + 0.3 if p.dim() == 1 else r / p.size(1) ** 0.5 if "embed" not in name else r)
    return model


def tokens_for(config: LlamaConfig, batch: int = 3, length: int = 17, seed: int = 1) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def subnets(config: LlamaConfig) -> dict[str, SubNet]:
    """A slice on each axis alone, on all together, and one with another shape in every layer."""
    L, H, F, D = range(config.n_layers), config.n_heads, config.ffn_dim, config.dim
    heads = H // 2
    step = config.n_kv_heads if H > config.n_kv_heads else 1
    return {"full": SubNet.full(config), "width": SubNet.uniform(D - 16, L, H, F),
            "heads": SubNet.uniform(D, L, heads, F),
            "neurons": SubNet.uniform(D, L, H, F - 37), "depth": SubNet.uniform(D, [0, 2, 3], H, F),
            "all": SubNet.uniform(D - 9, [0, 1, 3], heads, F - 30),
            "per layer": SubNet(D - 20, (0, 2, 3), (H, step, H - step), (F, 13, F - 5))}


def hard_gates(config: LlamaConfig, subnet: SubNet) -> Gates:
    """The slice as ones and zeros on the full network, unit by unit, the slow and obvious way."""
    dim = torch.tensor([float(i < subnet.dim) for i in range(config.dim)])
    heads, ffn = torch.zeros(config.n_layers, config.n_heads), torch.zeros(config.n_layers, config.ffn_dim)
    layers, kv = torch.zeros(config.n_layers), config.n_kv_heads
    group = config.n_heads // kv
    for layer, n_heads, ffn_dim in zip(subnet.layers, subnet.n_heads, subnet.ffn_dim):
        layers[layer] = 1
        for h in range(config.n_heads):
            rank = h % group if group > 1 else h       # place inside the KV group; MHA: place among all
            heads[layer, h] = float(rank < (n_heads // kv if group > 1 else n_heads))
        for f in range(config.ffn_dim):
            ffn[layer, f] = float(f < ffn_dim)
    return Gates(dim, heads, ffn, layers)


def odd_choices(config: LlamaConfig) -> dict[str, list[int]]:
    """A handful of sizes per axis, some of them odd: the costs of the members are all over the place."""
    groups = kv_groups(config)
    return {"dim": [23, 32, 40, config.dim],
            "n_heads": list(range(groups, config.n_heads + 1, groups)),
            "ffn_dim": [20, 33, 60, config.ffn_dim],
            "n_layers": [2, 3, config.n_layers]}


def random_router(config: LlamaConfig, mode: str = "constrained", seed: int = 0, choices=None) -> Router:
    """A router as after a long training: every tensor random, layers in an order of their own."""
    order = [2, 0, 3, 1, *range(4, config.n_layers)]
    space = Space(config, choices or odd_choices(config), order)
    router = Router(space, mode, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in router.named_parameters():
            if name == "modulation.out":
                size = 0.1
            elif p.dim() > 1:
                size = 1 / p.size(-1) ** 0.5
            else:
                size = 1
            p.copy_(torch.randn(p.shape, generator=generator) * size)
    return router


def make_supernet(folder, config: LlamaConfig, seed: int = 0) -> tuple[Llama, Router]:
    """A supernet's folder as train.py leaves it, of random weights; its vocabulary (560) is that of its
    tokenizer."""
    text = "the cat sat on the mat and the dog ate the cake; def main(argv): return [line for line in argv]\n"
    config = dataclasses.replace(config, vocab_size=560)
    save_tokenizer(Path(folder) / "tokenizer.model", train_bpe([text * 3], config.vocab_size))
    model = random_llama(config, seed)
    save_llama(folder, config, model.state_dict())
    router = random_router(config, seed=seed)
    router.budgets = [0.5, 1.0]
    save_tensors(Path(folder) / FLEX, router_state(router, seq_len=16))
    return model, router


WHOLE = dataclasses.replace(GQA, n_heads=8, n_kv_heads=4, vocab_size=96)


def cut_into(folder, n: int, llama2: bool, config: LlamaConfig = WHOLE, seed: int = 0, dtype=torch.float32):
    """A random Llama in n shards, cut as Meta's model-parallel code does. Returns the whole one."""
    model = random_llama(config, seed)
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_json(config)))
    for i in range(n):
        part = {}
        for name, w in model.state_dict().items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) or (llama2 and "tok_emb" in name) else 0
            part[name] = (w if "norm" in name else w.chunk(n, axis)[i].clone()).to(dtype)
        save_tensors(folder / f"consolidated.{i:02d}.pth",
                     part | ({"rope.freqs": torch.ones(4)} if llama2 else {}))
    return model


def deployed(router: Router, budget: float) -> tuple[SubNet, torch.Tensor | None]:
    """What runs at a budget: the slice and its factors."""
    subnet = router.route(budget)
    return subnet, router.factors(subnet)


def export_at(folder, budget: float = 1.0, out=None, dtype: torch.dtype | None = None,
              format: str = "llama") -> tuple[Path, SubNet]:
    """An export as the command line makes it: (where, the slice)."""
    family = open_family(folder, dtype=None)
    member = family.slice_member(budget)
    out = Path(out or default_folder(folder, budget, "params", format))
    exporting.export(family, member, out, dtype or family.model.norm.weight.dtype, format)
    return out, member.subnet


@contextlib.contextmanager
def one_line_error(capsys, *words: str):
    """What is inside must end as a user's mistake does: status 2, one line on stderr with these
    words, nothing on stdout. Yields a list that holds the line afterwards."""
    said = []
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield said
    out, err = capsys.readouterr()
    said.append(err)
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), err


def files_of(folder) -> dict[str, bytes]:
    """Every file under a folder (and hidden ones) with its content: has anything changed?"""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def close(a, b, tolerance: float = 1e-5) -> bool:
    """Relative to the size of b, in the maximum norm."""
    return ((a - b).abs().max() / b.abs().max()).item() < tolerance
