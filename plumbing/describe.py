"""
A look at a raw Llama folder, or at a params.json alone: family, shape, parameters, slices.

    python -m plumbing.describe Llama-3.1-8B

It also finds flipped bits, by the checksums in the weights' files. A download can be checked beside
it:  cd Llama-3.1-8B && md5sum -c checklist.chk
"""
from pathlib import Path

from data.tokenizer import TOKENIZER, check_tokenizer, is_sentencepiece
from model import LlamaConfig, SubNet
from plumbing.checkpoint import open_shards
from plumbing.errors import Parser, run_main
from plumbing.parallel import bar
from plumbing.params import PARAMS, published_name, published_tying, read_config
from plumbing.tables import spread
from plumbing.tensors import check_intact, shard_paths
from space import Space, n_params


def describe(folder) -> dict[str, str]:
    """What a folder, or a params.json alone, holds: a line per fact."""
    folder = Path(folder)
    if folder.name == PARAMS:
        folder = folder.parent
    c = read_config(folder)
    paths = shard_paths(folder) if any(folder.glob("consolidated.*.pth")) else []
    dtype = "no weights here"
    if paths:
        for path in bar(paths, "checking", unit="file"):
            check_intact(path, path.stat().st_mtime_ns)
        shards, _, c = open_shards(folder, c)
        dtype = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in shards[0].values()}))
    else:
        c = published_tying(c)
    full = SubNet.full(c)
    scaled = "not scaled" if c.rope_factor == 1 else f"scaled by {c.rope_factor:g}"
    return {
        "family": family_of(c, bool(paths)),
        "shape": f"dim {c.dim}, {c.n_layers} layers, {sizes(c.n_heads)} heads of {c.head_dim}, "
                 f"{sizes(c.n_kv_heads)} KV heads, ffn {sizes(c.ffn_dim)}, vocabulary {c.vocab_size:,}",
        "parameters": f"{n_params(c, full):,} without embeddings, "
                      f"{n_params(c, full, embeddings=True):,} in all",
        "dtype": dtype,
        "shards": str(len(paths)),
        "tied": "yes" if c.tied else "no",
        "RoPE": f"theta {c.rope_theta:g}, {scaled}",
        "tokenizer": tokenizer_kind(folder / TOKENIZER),
        "sub-networks": slices_of(c),
    }


def family_of(c: LlamaConfig, has_weights: bool) -> str:
    """The published model of this shape; a doubt is said."""
    name = published_name(c)
    if not has_weights and c.norm_eps == 1e-6 and name in ("Llama 1 7B", "Llama 1 13B"):
        return f"{name}, or an early Llama 2 chat model: the weights would tell"
    return name


def sizes(value: int | tuple[int, ...]) -> str:
    """A size, or the range of those of the layers."""
    return spread(value).replace("-", " to ")


def tokenizer_kind(path: Path) -> str:
    """none, SentencePiece (Llama 1, 2) or tiktoken (Llama 3, ours). Damaged: fail()."""
    if not path.is_file():
        return "none"
    check_tokenizer(path)
    return "SentencePiece" if is_sentencepiece(path) else "tiktoken"


def slices_of(config: LlamaConfig) -> str:
    """How many sub-networks the default sizes make, and what they cost."""
    try:
        costs = Space(config).costs
    except ValueError as error:
        return f"none: {error}"
    return f"{len(costs):,} of cost {costs.min():.3f} to {costs.max():.3f}"


def main(argv=None) -> None:
    """Prints what a folder holds."""
    p = Parser("python -m plumbing.describe", __doc__)
    p.add_argument("folder", nargs="?", default="out/base", help="raw Llama folder, or a params.json")
    args = p.parse_args(argv)
    for key, value in describe(args.folder).items():
        print(f"{key:12} {value}")


if __name__ == "__main__":
    run_main(main)
