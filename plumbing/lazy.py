"""
A raw Llama folder as a model without memory, for what cuts and writes and runs nothing, as export.py
does: a layer's weights are read when its slice is asked for, and let go when the next one's is.

    model = open_lazily("out/flex")
    for name, weight in model.slices(subnet).items():    in the file's dtype, views of one layer at a time
        ...
"""
from typing import Iterator

import torch

from model import Block, Llama, SubNet
from plumbing.checkpoint import check_finite, open_shards, read_tensors
from plumbing.params import read_config


class LazyLlama(Llama):
    """A Llama on the meta device that knows its folder."""

    def slices(self, subnet: SubNet) -> "LazySlices":
        """In place of a dictionary of views: an object with its items()."""
        return LazySlices(self, subnet)

    def read(self, *prefixes: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin so, whole. One that is not finite: fail()."""
        axes = {name: axis for name, axis in self.axes.items() if name.startswith(prefixes)}
        state = {}
        for name, weight in read_tensors(self.folder, axes, self.config):
            check_finite(weight, name, self.folder)
            state[name] = weight
        return state


class LazySlices:
    """The state dict of a slice as a Llama of its own, of which a layer exists at a time."""

    def __init__(self, model: LazyLlama, subnet: SubNet):
        self.model = model
        self.subnet = subnet

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), in the order of Llama.slices. Tied: without the output."""
        model = self.model
        dim = self.subnet.dim
        for prefix in ("tok_embeddings.", "norm.", "output."):
            for name, weight in model.read(prefix).items():
                yield name, weight[..., :dim]
        kept = zip(self.subnet.layers, self.subnet.n_heads, self.subnet.ffn_dim)
        for new, (old, n_heads, ffn_dim) in enumerate(kept):
            prefix = f"layers.{old}."
            state = {name.removeprefix(prefix): weight for name, weight in model.read(prefix).items()}
            with torch.device("meta"):
                block = Block(model.config, old)
            block.load_state_dict(state, assign=True)
            for name, weight in block.slices(dim, n_heads, ffn_dim).items():
                yield f"layers.{new}.{name}", weight


def open_lazily(folder) -> LazyLlama:
    """A raw Llama folder as a model that has the shapes and dtypes of its tensors, and reads them when
    they are asked for."""
    shards, axes, config = open_shards(folder, read_config(folder))
    with torch.device("meta"):
        model = LazyLlama(config)
        state = {name: t.to(shards[0][name].dtype) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie()
    model.folder = folder
    model.axes = axes
    return model
