"""
Speed and memory of each size as it is deployed: a Llama of its own, which reads a prompt and then
writes token by token.

A figure is a ratio to the full model, and the full model is measured in the same run. All sizes
take turns in every round, so a busy machine slows them alike. The median over the rounds needs no
quiet machine to repeat.

    python eval.py --speed          the table of out/flex
"""
import statistics
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from export import fold
from model import KVCache, Llama, SubNet
from plumbing.latency import seconds
from plumbing.tables import row_label

ROUNDS = 7
PREFILL = 0  # places in what one_turn() returns
DECODE = 1

# -----------------------------------------------------------------------------
# memory


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive at a time, and the most of them so far: what torch.cuda
    counts for itself, on the CPU. A model's weights count, and all that is made under it. What a
    kernel allocates inside does not show."""

    def __init__(self, weights=()):
        super().__init__()
        self.alive = {}  # address of a storage -> its bytes
        for weight in weights:
            storage = weight.untyped_storage()
            self.alive[storage.data_ptr()] = storage.nbytes()
        self.now = sum(self.alive.values())
        self.most = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        """A storage counts once for all its views, until the last of them is gone."""
        key = storage.data_ptr()
        size = storage.nbytes()
        if size and key not in self.alive:
            self.alive[key] = size
            weakref.finalize(storage, self.drop, key)
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, key):
        """A storage is gone."""
        self.now -= self.alive.pop(key)


def peak_memory(native: Llama, run, device) -> int:
    """Bytes of the weights, and at most of what else is allocated while run() runs."""
    if device.type == "cpu":
        with Peak(native.parameters()) as peak:
            run()
        return peak.most
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    made = torch.cuda.max_memory_allocated() - before
    return made + sum(weight.nbytes for weight in native.parameters())


# -----------------------------------------------------------------------------
# speed


def native_llama(model: Llama, subnet: SubNet, device, dtype: torch.dtype | None = None) -> Llama:
    """The slice as a Llama of its own, as it is deployed. dtype None: bf16 on CUDA, fp32 on the
    CPU."""
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Llama.from_state(subnet.config(model.config), fold(model, subnet, dtype=dtype))


def one_turn(native: Llama, tokens: torch.Tensor, prompt: int, device) -> tuple[float, float]:
    """Seconds to read the first `prompt` of tokens (batch, T) into a KV cache, and to go on one by
    one to the end."""
    length = tokens.size(1)
    cache = KVCache(length)

    def read():
        native(tokens[:, :prompt], cache=cache)

    def write():
        for i in range(prompt, length):
            native(tokens[:, i:i + 1], cache=cache)

    return seconds(read, device), seconds(write, device)


@torch.no_grad()
def speeds(model: Llama, subnets: list[SubNet], window: int, batch: int,
           device) -> tuple[list[dict], dict]:
    """Each subnet beside the full model.

    Returns (rows, full). A row holds the ratios prefill and decode (tokens/s) and memory (weights,
    KV cache, activations) to the full model. full holds the full model's own tokens/s and bytes,
    and how many tokens were read and written. Prompt and new tokens fit into `window`."""
    new = max(1, min(32, window // 4))
    prompt = max(1, min(512, window) - new)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, prompt + new), generator=generator)
    tokens = tokens.to(device)
    sizes = list(dict.fromkeys([model.full, *subnets]))

    def warm(subnet: SubNet) -> Llama:
        # Slices are cut out one at a time: all sizes together may not fit.
        native = native_llama(model, subnet, device)
        native(tokens[:, :1])
        return native

    def turn(native: Llama) -> tuple[float, float]:
        return one_turn(native, tokens, prompt, device)

    # 1. Memory, once for each size.
    memory = {}
    for subnet in sizes:
        native = warm(subnet)
        memory[subnet] = peak_memory(native, lambda: turn(native), device)

    # 2. Time, in rounds.
    rounds = []
    for _ in tqdm(range(ROUNDS), "speed", leave=False, disable=None):
        rounds.append({subnet: turn(warm(subnet)) for subnet in sizes})

    # 3. Ratios inside a round, then the median over the rounds.
    def ratio(subnet: SubNet, part: int) -> float:
        return statistics.median(r[model.full][part] / r[subnet][part] for r in rounds)

    rows = []
    for subnet in subnets:
        rows.append(dict(
            prefill=ratio(subnet, PREFILL),
            decode=ratio(subnet, DECODE),
            memory=memory[subnet] / memory[model.full]))
    read = statistics.median(r[model.full][PREFILL] for r in rounds)
    wrote = statistics.median(r[model.full][DECODE] for r in rounds)
    full = dict(
        prefill=batch * prompt / read,
        decode=batch * new / wrote,
        memory=memory[model.full],
        prompt=prompt,
        new=new,
        batch=batch)
    return rows, full


def speed_table(rows: list[dict], full: dict, trained) -> str:
    """eval.py's rows with their "speed", a line each. Over 1 is faster, under 1 is smaller."""
    lines = [f"{'budget':>7} {'got':>6} {'prefill':>8} {'decode':>8} {'memory':>8}   "
             f"(over the full model: {full['prefill']:,.0f} and {full['decode']:,.0f} tokens/s, "
             f"{full['memory'] / 1e6:,.1f} MB; batch {full['batch']}, "
             f"{full['prompt']} + {full['new']} tokens)"]
    for row in rows:
        speed = row["speed"]
        lines.append(f"{row_label(row, trained)} {row['got']:6.3f} {speed['prefill']:8.3f} "
                     f"{speed['decode']:8.3f} {speed['memory']:8.3f}")
    return "\n".join(lines)
