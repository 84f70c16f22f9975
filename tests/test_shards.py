"""data/shards.py against plain lists: each window once an epoch, in an order of (seed, step)."""
import numpy as np
import pytest
import torch

from data.shards import Shards, read_shard, write_shard
from test_tokenizer import one_line

T, VOCAB = 8, 1000


@pytest.fixture
def folder(tmp_path):
    """Three shards of awkward lengths; tokens are random, no two windows are alike."""
    rng = np.random.default_rng(0)
    for k, n in enumerate((96, 41, 23)):
        write_shard(tmp_path / f"train_{k:06d}.bin", rng.integers(0, VOCAB, n), VOCAB)
    return tmp_path


def plain_windows(folder) -> list[list[int]]:
    """The definition: T+1 tokens at stride T inside each shard, in the order of the names."""
    windows = []
    for path in sorted(folder.glob("train_*.bin")):
        tokens = read_shard(path).tolist()
        windows += [tokens[i:i + T + 1] for i in range(0, len(tokens) - T, T)]
    return windows


def rows(x, y) -> list[list[int]]:
    assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    return torch.cat([x, y[:, -1:]], 1).tolist()


def test_every_window_once_an_epoch(folder):
    """Catches: windows lost, repeated or across shards, also where a batch straddles epochs."""
    shards, windows = Shards(folder, "train", T, VOCAB), plain_windows(folder)
    assert len(shards) == len(windows) == 11 + 5 + 2
    assert [shards.sample(i).tolist() for i in range(len(shards))] == windows
    drawn = [row for step in range(18) for row in rows(*shards.batch(step, 5, 0, 5))]
    epochs = [drawn[i:i + 18] for i in range(0, 90, 18)]
    assert all(sorted(epoch) == sorted(windows) for epoch in epochs)
    assert epochs[0] != epochs[1] != windows


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_order_does_not_depend_on_the_number_of_ranks(folder, ranks):
    """Catches: each rank drawing its own stream, so that 8 GPUs train on other text than 1."""
    one, many = Shards(folder, "train", T, VOCAB), [Shards(folder, "train", T, VOCAB) for _ in range(ranks)]
    for step in range(5):
        cuts = [6 * r // ranks for r in range(ranks + 1)]
        parts = [shards.batch(step, 6, a, b) for shards, a, b in zip(many, cuts, cuts[1:])]
        whole = one.batch(step, 6, 0, 6)
        assert all(torch.equal(torch.cat(part), w) for part, w in zip(zip(*parts), whole))


def test_a_batch_is_a_function_of_seed_and_step(folder):
    """Catches: hidden state (a resumed run replays or skips batches), a seed that is ignored."""
    fresh, used = Shards(folder, "train", T, VOCAB), Shards(folder, "train", T, VOCAB)
    for step in (9, 2, 3, 0):
        used.batch(step, 5, 0, 5)
        np.random.seed(step)
        torch.manual_seed(step)
        used.windows(3)
    assert torch.equal(fresh.batch(7, 5, 0, 5)[0], used.batch(7, 5, 0, 5)[0])
    other = Shards(folder, "train", T, VOCAB, seed=1)
    assert not torch.equal(fresh.batch(0, 18, 0, 18)[0], other.batch(0, 18, 0, 18)[0])


def test_windows_are_fixed_spread_and_in_order(folder):
    """Catches: evaluation that draws at random, or only reads the beginning of the split."""
    shards, windows = Shards(folder, "train", T, VOCAB, seed=5), plain_windows(folder)
    assert rows(*shards.windows(6)) == windows[::3]
    assert rows(*shards.windows(10**9)) == windows
    assert shards.batch(0, 4, 2, 2)[0].shape == (0, T)          # a rank without rows


@pytest.mark.parametrize("vocab, dtype, magic", [(65536, np.uint16, 20240520),
                                                 (65537, np.uint32, 20240801),
                                                 (128256, np.uint32, 20240801)])
def test_both_formats(tmp_path, vocab, dtype, magic):
    """Catches: token 128000 stored in 16 bits as 62464, or a header other tools cannot read."""
    tokens = np.array([0, vocab - 1, 7, 62464])
    write_shard(tmp_path / "val_000000.bin", tokens, vocab)
    data = (tmp_path / "val_000000.bin").read_bytes()
    assert np.frombuffer(data[:12], "<i4").tolist() == [magic, 1 if magic == 20240520 else 7, 4]
    assert len(data) == 1024 + 4 * np.dtype(dtype).itemsize
    back = read_shard(tmp_path / "val_000000.bin")
    assert back.dtype == dtype and back.tolist() == tokens.tolist()
    assert Shards(tmp_path, "val", 3, vocab).batch(0, 1, 0, 1)[1].tolist() == [tokens[1:].tolist()]


def test_ids_out_of_range_are_not_written(tmp_path):
    """Catches: ids that wrap around in uint16."""
    for bad in ([70000], [-1]):
        with pytest.raises(AssertionError):
            write_shard(tmp_path / "x.bin", np.array(bad), 1000)
    assert not list(tmp_path.iterdir())


def spoil(folder, how):
    path = folder / "train_000001.bin"
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[:-2])
    elif how == "header":
        path.write_bytes(data[:100])
    elif how == "magic":
        path.write_bytes(b"\0\0\0\0" + data[4:])
    elif how == "empty":
        path.write_bytes(data[:8] + b"\0\0\0\0" + data[12:1024])
    else:
        for file in folder.iterdir():
            file.unlink()


@pytest.mark.parametrize("how, said", [
    ("cut", "found 1104 bytes, expected 1106"), ("header", "found 100 bytes"),
    ("magic", "found magic 0"), ("empty", "0 tokens"), ("missing", "no train_*.bin")])
def test_broken_shards(folder, capsys, how, said):
    """Catches: a shard cut by a full disk that trains on, or ends in a traceback."""
    spoil(folder, how)
    with pytest.raises(SystemExit) as stop:
        Shards(folder, "train", T, VOCAB)
    line = one_line(capsys)
    assert stop.value.code == 2 and said in line and "python data/prepare.py" in line
    assert ("train_000001.bin" in line) == (how != "missing")


def test_missing_folder_and_too_little_text(folder, capsys):
    """Catches: N = 0 windows and a division by zero later."""
    for path, seq_len, said in ((folder / "no", T, "no train_*.bin"), (folder, 500, "--seq-len")):
        with pytest.raises(SystemExit) as stop:
            Shards(path, "train", seq_len, VOCAB)
        assert stop.value.code == 2 and said in one_line(capsys)


def test_ids_past_the_vocabulary(folder, capsys):
    """Catches: shards of another tokenizer, which index past the embedding on the GPU."""
    top = max(max(w) for w in plain_windows(folder))
    with pytest.raises(SystemExit) as stop:
        Shards(folder, "train", T, top)
    assert stop.value.code == 2 and f"found token {top}" in one_line(capsys)
    shards = Shards(folder, "train", T, VOCAB)
    shards.vocab_size = top                                     # past the scan: a batch checks too
    with pytest.raises(SystemExit) as stop:
        shards.batch(0, 18, 0, 18)
    assert stop.value.code == 2 and f"found token {top}" in one_line(capsys)


def test_fingerprint(folder):
    """Catches: a resume on other data that goes unnoticed; a fingerprint that changes by itself."""
    first = Shards(folder, "train", T, VOCAB).fingerprint()
    assert Shards(folder, "train", T, VOCAB, seed=3).fingerprint() == first
    tokens = read_shard(folder / "train_000002.bin").copy()
    for place in (0, len(tokens) // 2, -1):
        other = tokens.copy()
        other[place] = (other[place] + 1) % VOCAB
        write_shard(folder / "train_000002.bin", other, VOCAB)
        assert Shards(folder, "train", T, VOCAB).fingerprint() != first, place
    write_shard(folder / "train_000002.bin", tokens, VOCAB)
    assert Shards(folder, "train", T, VOCAB).fingerprint() == first


@pytest.mark.parametrize("n", [1, 10, 11, 99, 100, 101, 999, 1001, 5000])
def test_a_large_shard_is_looked_at_here_and_there(n):
    """Catches blocks that overlap, or leave out an end, and a shard of a hundred gigabytes that is
    read whole."""
    tokens = np.arange(n)
    blocks = [block.tolist() for block in Shards._blocks(tokens, most=10, size=10)]
    seen = sorted(token for block in blocks for token in block)
    assert len(seen) == len(set(seen)) and len(blocks) == min(10, -(-n // 10)) and n - 1 in seen
    assert seen == tokens.tolist() or n > 100
    assert n <= 100 or min(seen) < 0.15 * n, "the beginning is far away"
