"""
Tensors of which every rank has some rows, as FSDP2 (sharding.py) splits them. A tensor that is not
split is taken as it is, so the same code serves one process.

A split tensor is a DTensor. To import that class takes seconds, and who has one has imported it: it
is known here by its methods.
"""
import torch

from plumbing.parallel import RANK, WORLD

ALL = slice(0, None)


def is_split(t: torch.Tensor) -> bool:
    """Has every rank some rows of it?"""
    return hasattr(t, "full_tensor")


def whole(t: torch.Tensor) -> torch.Tensor:
    """A tensor put together from the rows of all ranks, on all of them. All ranks must ask."""
    return t.full_tensor() if is_split(t) else t


def own_rows(t: torch.Tensor) -> slice:
    """The rows of the whole tensor that this rank has: equally many on all ranks, fewer on the last
    ones where they do not divide."""
    if not is_split(t):
        return slice(0, len(t))
    each = -(-len(t) // WORLD)
    start = min(len(t), RANK * each)
    rows = slice(start, min(len(t), start + each))
    found = len(t.to_local())
    assert rows.stop - rows.start == found, f"rows {rows} expected on rank {RANK}, {found} are there"
    return rows


def local(t: torch.Tensor) -> torch.Tensor:
    """The rows that this rank has: a tensor on the same memory."""
    return t.to_local() if is_split(t) else t


def merged(parts: list[torch.Tensor], axis: int | None, rows: slice = ALL) -> torch.Tensor:
    """Rows of the tensor that was cut into parts along an axis, 0 or 1; None: any part is all of it."""
    if axis is None:
        return parts[0][rows]
    if axis == 1:
        return torch.cat([part[rows] for part in parts], dim=1)
    start, stop, _ = rows.indices(sum(len(part) for part in parts))
    found = []
    before = 0  # rows of the parts so far
    for part in parts:
        found.append(part[max(0, start - before):max(0, stop - before)])
        before += len(part)
    return torch.cat(found)


class Rows:
    """A tensor in parts, each with some of its rows. It has the tensor's shape, and gives its rows."""

    def __init__(self, parts: list[torch.Tensor]):
        self.parts = parts
        self.dtype = parts[0].dtype
        self.shape = torch.Size([sum(len(part) for part in parts), *parts[0].shape[1:]])

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return merged(self.parts, 0, rows)


def joined(parts: list[torch.Tensor]) -> "torch.Tensor | Rows":
    """The tensor that is in parts. A number is the same in all of them."""
    if len(parts) == 1 or parts[0].dim() == 0:
        return parts[0]
    return Rows(parts)


def own_part(t: "torch.Tensor | Rows", like: torch.Tensor) -> torch.Tensor:
    """What this rank has of a whole tensor that is split as another one of its shape. ValueError: it
    has another shape, or another dtype, which torch would round without a word."""
    for found, expected in ((tuple(t.shape), tuple(like.shape)), (t.dtype, like.dtype)):
        if found != expected:
            raise ValueError(f"{found} in place of {expected}")
    return t[own_rows(like)] if like.dim() else t
