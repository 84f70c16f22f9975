"""Token shards: the file format, and a loader whose only state is the step.

A shard is a header of 256 int32 (magic, version, n tokens, zeros) and then n tokens, as in llm.c:

    magic 20240520, version 1    uint16    written where the vocabulary fits into 16 bits
    magic 20240801, version 7    uint32    Llama 3's 128,256 do not fit: token 128000 would become
                                           62464 in 16 bits, and nothing would complain

The loader cuts every shard into windows of T+1 tokens at stride T: neighbours share one token, so
each token but the first is a target once. Training draws windows by counting, g = 0, 1, 2, ...

    g = step * global_batch + j         j: the row of the global batch; a rank takes a slice of j
    epoch, i = divmod(g, N)             N: windows in the split
    window = permutation(seed, epoch)[i]

so a batch is a pure function of (seed, step): resuming needs no more than the step, and the order
does not depend on the number of ranks. Evaluation reads windows(n), which draws nothing.

    python data/prepare.py           # makes data/pystdlib, a folder of shards (CPU, seconds)
"""
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from plumbing.files import atomic_write
from plumbing.errors import fail

HEADER = 256 * 4                                            # bytes
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}

# ------------------------------------------------------- one shard

def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Writes 1-D integer `tokens`, atomically, in the smallest format that holds vocab_size."""
    assert 0 < len(tokens) < 2**31, f"{path}: {len(tokens)} tokens do not fit the int32 header"
    assert 0 <= tokens.min() and tokens.max() < vocab_size, f"{path}: token ids past {vocab_size}"
    magic, version = (20240520, 1) if vocab_size <= 2**16 else (20240801, 7)
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens, FORMATS[magic, version]).tobytes())


def read_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard, (n,) uint16 or uint32, mapped and not read. Not a shard: fail()."""
    mend = "make it again with `python data/prepare.py`"
    header, size = np.fromfile(path, "<i4", count=256), Path(path).stat().st_size
    if len(header) < 256:
        fail(f"{path}: found {size} bytes, expected a header of {HEADER} and tokens: {mend}")
    magic, version, n = header[:3].tolist()
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        fail(f"{path}: found magic {magic}, version {version}, expected one of "
             f"{', '.join(map(str, FORMATS))}: {mend}")
    if n < 1 or size != HEADER + n * dtype.itemsize:
        fail(f"{path}: found {size} bytes, expected {HEADER + n * dtype.itemsize} for the {n} "
             f"tokens of its header: {mend}")
    return np.memmap(path, dtype, mode="r", offset=HEADER, shape=(n,))

# ------------------------------------------------------- a split

class Shards:
    """The windows of one split of a data folder: {split}_000000.bin, {split}_000001.bin, ...

    len() is N; n_tokens counts all tokens. Every id is checked against vocab_size."""

    def __init__(self, folder: str | Path, split: str, seq_len: int, vocab_size: int, seed=0):
        self.paths = sorted(Path(folder).glob(f"{split}_*.bin"))
        if not self.paths:
            fail(f"no {split}_*.bin in {folder}: make it, `python data/prepare.py --out {folder}`")
        self.seq_len, self.vocab_size, self.seed = seq_len, vocab_size, seed
        self.tokens = [read_shard(path) for path in self.paths]
        self.n_tokens = sum(map(len, self.tokens))
        # A shard's first window number; its last, incomplete window is dropped.
        self.first = np.cumsum([0] + [(len(t) - 1) // seq_len for t in self.tokens])
        if len(self) == 0:
            fail(f"{folder}: found {self.n_tokens} {split} tokens, expected {seq_len + 1} for one "
                 "window: take a smaller --seq-len, or give `python data/prepare.py` more text")
        self._epoch, self._order = -1, None
        if self.n_tokens <= 1e9:                            # beyond, each batch's check must do
            for path, tokens in zip(self.paths, self.tokens):
                self._check(path, tokens)

    def __len__(self) -> int:
        return int(self.first[-1])

    def _check(self, path: Path, tokens: np.ndarray) -> None:
        if tokens.max() >= self.vocab_size:
            fail(f"{path}: found token {tokens.max()}, expected ids below the vocabulary of "
                 f"{self.vocab_size}: `python data/prepare.py --tokenizer` the model's tokenizer")

    def sample(self, i: int) -> np.ndarray:
        """Window i in the order of the files: (T+1,) int64."""
        k = int(np.searchsorted(self.first, i, side="right")) - 1
        at = (i - int(self.first[k])) * self.seq_len
        window = self.tokens[k][at:at + self.seq_len + 1]
        self._check(self.paths[k], window)
        return window.astype(np.int64)

    def _stack(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.empty((len(indices), self.seq_len + 1), np.int64)
        for row, i in zip(rows, indices):
            row[:] = self.sample(i)
        rows = torch.from_numpy(rows)                       # (B, T+1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()     # targets are one ahead

    def batch(self, step: int, global_batch: int, start: int, stop: int):
        """Rows [start, stop) of the step's global batch: x, y, each (stop - start, T) int64."""
        return self._stack([self._index(step * global_batch + j) for j in range(start, stop)])

    def _index(self, g: int) -> int:
        epoch, i = divmod(g, len(self))
        if epoch != self._epoch:                            # a batch may straddle two epochs
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._epoch, self._order = epoch, order
        return int(self._order[i])

    def windows(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """n windows (N at most) evenly spread over the split, always the same: x, y (n, T)."""
        n = min(n, len(self))
        return self._stack([k * len(self) // n for k in range(n)])

    def fingerprint(self) -> str:
        """A short hash of names, lengths and end tokens: has the data changed since the save?"""
        rows = [(path.name, path.stat().st_size, len(t), int(t[0]), int(t[-1]))
                for path, t in zip(self.paths, self.tokens)]
        return blake2b(repr(rows).encode(), digest_size=8).hexdigest()
