"""
Held-out text as windows: a file, or the val split of a folder of shards. What eval.py scores.

Windows of T + 1 tokens share one token with their neighbour: as inputs x and targets y, each (n,
T), every token but the first is a target once.
"""
from pathlib import Path

import torch

from data.shards import Shards
from data.tokenizer import check_same_tokenizer, encode_document
from plumbing.errors import fail
from plumbing.tensors import POINTER


def text_windows(path, tokenizer, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[BOS] + tokens of a UTF-8 file. Two pairs (x, y): the full windows (n, context), and the
    shorter rest (1, rest) if there is one."""
    path = Path(path)
    if not path.is_file():
        fail(f"--text {path} is not a file; expected a UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8")  # not read_text: it would change line ends
    except UnicodeDecodeError as error:
        fail(f"--text {path} is not UTF-8 ({error.reason} at byte {error.start}); "
             f"expected a UTF-8 text file; iconv -t UTF-8 converts it")
    if text.startswith(POINTER.decode()):
        fail(f"--text {path} is a pointer of Git LFS, not the file itself; "
             "expected text: fetch it with git lfs pull")
    tokens = torch.from_numpy(encode_document(tokenizer, text).astype("int64"))
    if len(tokens) < 2:
        fail(f"--text {path} is empty; expected at least one token of text")
    pairs = []
    n = (len(tokens) - 1) // context
    if n:
        x = tokens[:n * context].view(n, context)
        y = tokens[1:n * context + 1].view(n, context)
        pairs.append((x, y))
    rest = tokens[n * context:]
    if len(rest) > 1:
        pairs.append((rest[None, :-1], rest[None, 1:]))
    return pairs


def shard_windows(model_folder, data, n: int, context: int,
                  vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """n windows of the val split as one pair (x, y). fail() if the model in model_folder has
    another tokenizer."""
    check_same_tokenizer(model_folder, data)
    return [Shards(data, "val", context, vocab_size).windows(n)]
