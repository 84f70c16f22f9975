"""
Token shards: the file format, and a loader whose only state is the step.

A shard is a header of 256 int32 (magic, version, n tokens, zeros), then n tokens, as in llm.c:

    magic 20240520, version 1    uint16    written where the vocabulary fits into 16 bits
    magic 20240801, version 7    uint32    Llama 3's 128,256 do not fit: token 128000 would become
                                           62464 in 16 bits, and nothing would complain

The loader cuts every shard into windows of T+1 tokens at stride T. Neighbours share one token, so each
token but the first is a target once. Training draws windows by counting, g = 0, 1, 2, ...

    g = step * global_batch + j         j: the row of the global batch; a rank takes a slice of j
    epoch, i = divmod(g, N)             N: windows in the split
    window = permutation(seed, epoch)[i]

So a batch is a pure function of (seed, step): resuming needs no more than the step, and the order does
not depend on the number of ranks. Evaluation reads windows(n), which draws nothing.

    python data/prepare.py              # makes data/pystdlib, a folder of shards (CPU, seconds)
"""
from hashlib import blake2b
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from plumbing.errors import fail
from plumbing.files import atomic_write

HEADER_BYTES = 256 * 4
UINT16 = (20240520, 1)  # (magic, version)
UINT32 = (20240801, 7)
FORMATS = {UINT16: np.dtype("<u2"), UINT32: np.dtype("<u4")}


# -----------------------------------------------------------------------------
# one shard


def write_shard(path: str | Path, tokens: np.ndarray, vocab_size: int) -> None:
    """Writes 1-D integer `tokens`, atomically, in the smallest format that holds vocab_size."""
    n = len(tokens)
    assert 0 < n < 2**31, f"{path}: {n} tokens do not fit the int32 header"
    assert tokens.min() >= 0, f"{path}: token ids below 0"
    assert tokens.max() < vocab_size, f"{path}: token ids past {vocab_size}"
    kind = UINT16 if vocab_size <= 2**16 else UINT32
    magic, version = kind
    header = np.zeros(256, "<i4")
    header[0] = magic
    header[1] = version
    header[2] = n
    body = np.asarray(tokens, FORMATS[kind])
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(body.tobytes())


def read_shard(path: str | Path) -> np.memmap:
    """The tokens of a shard, (n,) uint16 or uint32, mapped and not read. Not a shard: fail()."""
    mend = "make it again with `python data/prepare.py`"
    if not Path(path).is_file():
        fail(f"{path}: found no file, expected a shard: {mend}")
    header = np.fromfile(path, "<i4", count=256)
    size = Path(path).stat().st_size
    if len(header) < 256:
        fail(f"{path}: found {size} bytes, expected a header of {HEADER_BYTES} and tokens: {mend}")
    magic, version, n = header[:3].tolist()
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        known = ", ".join(map(str, FORMATS))
        fail(f"{path}: found magic {magic}, version {version}, expected one of {known}: {mend}")
    expected = HEADER_BYTES + n * dtype.itemsize
    if n < 1 or size != expected:
        fail(f"{path}: found {size} bytes, expected {expected} for the {n} tokens of its header: "
             f"{mend}")
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(n,))


# -----------------------------------------------------------------------------
# a split


class Shards:
    """The windows of one split of a data folder: {split}_000000.bin, {split}_000001.bin, ...

    len() is N, the number of windows of seq_len + 1 tokens; n_tokens counts all tokens.
    No shards, too few tokens for one window, or an id past vocab_size: fail()."""

    def __init__(self, folder: str | Path, split: str, seq_len: int, vocab_size: int,
                 seed: int = 0):
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed
        self.paths = sorted(Path(folder).glob(f"{split}_*.bin"))
        if not self.paths:
            fail(f"no {split}_*.bin in {folder}: make it, `python data/prepare.py --out {folder}`")
        self.tokens = [read_shard(path) for path in self.paths]
        self.n_tokens = sum(map(len, self.tokens))
        # first[k] is the number of shard k's first window. A last, incomplete window is dropped.
        n_windows = [(len(tokens) - 1) // seq_len for tokens in self.tokens]
        self.first = np.cumsum([0] + n_windows)
        if len(self) == 0:
            fail(f"{folder}: found {self.n_tokens} {split} tokens, expected {seq_len + 1} for one "
                 "window: take a smaller --seq-len, or give `python data/prepare.py` more text")
        self._epoch = -1  # of the permutation in _order
        self._order = None
        if self.n_tokens <= 1e9:  # above, a scan takes too long: the check of each batch must do
            for path, tokens in zip(self.paths, self.tokens):
                self._check(path, tokens)

    def __len__(self) -> int:
        return int(self.first[-1])

    def _check(self, path: Path, tokens: np.ndarray) -> None:
        """fail() if an id is past the vocabulary."""
        if tokens.max() >= self.vocab_size:
            fail(f"{path}: found token {tokens.max()}, expected ids below the vocabulary of "
                 f"{self.vocab_size}: `python data/prepare.py --tokenizer` the model's tokenizer")

    def sample(self, i: int) -> np.ndarray:
        """Window i in the order of the files: (T+1,) int64."""
        k = int(np.searchsorted(self.first, i, side="right")) - 1  # its shard
        place = i - int(self.first[k])  # its number in that shard
        at = place * self.seq_len
        window = self.tokens[k][at:at + self.seq_len + 1]
        self._check(self.paths[k], window)
        return window.astype(np.int64)

    def _stack(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows of these indices as inputs and targets: x, y, each (B, T) int64."""
        rows = np.empty((len(indices), self.seq_len + 1), np.int64)
        for row, i in zip(rows, indices):
            row[:] = self.sample(i)
        rows = torch.from_numpy(rows)  # (B, T+1)
        x = rows[:, :-1].contiguous()
        y = rows[:, 1:].contiguous()  # targets are one ahead
        return x, y

    def batch(self, step: int, global_batch: int, start: int, stop: int):
        """Rows [start, stop) of the step's global batch: x, y, each (stop - start, T) int64."""
        first = step * global_batch
        drawn = [self._drawn(first + j) for j in range(start, stop)]
        return self._stack(drawn)

    def _drawn(self, g: int) -> int:
        """The window that training draws as its g-th."""
        epoch, i = divmod(g, len(self))
        if epoch != self._epoch:  # a batch may straddle two epochs
            generator = np.random.default_rng([self.seed, epoch])
            self._order = generator.permutation(len(self))
            self._epoch = epoch
        return int(self._order[i])

    def windows(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """n windows (N at most) evenly spread over the split, always the same: x, y (n, T)."""
        n = min(n, len(self))
        spread = [k * len(self) // n for k in range(n)]
        return self._stack(spread)

    def fingerprint(self) -> str:
        """A short hash of names, lengths and tokens: has the data changed since the save?"""
        digest = blake2b(digest_size=8)
        for path, tokens in zip(self.paths, self.tokens):
            digest.update(f"{path.name} {len(tokens)}".encode())
            for block in self._blocks(tokens):
                digest.update(np.ascontiguousarray(block))
        return digest.hexdigest()

    @staticmethod
    def _blocks(tokens: np.ndarray, most: int = 100, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """All tokens of a shard in blocks; of a large one, the last block and others evenly spread."""
        n = -(-len(tokens) // size)
        for k in range(min(n, most)):
            start = (n - 1 - k * n // most if n > most else k) * size
            yield tokens[start:start + size]
