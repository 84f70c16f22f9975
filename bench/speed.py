"""
Speed and memory of each size as it is deployed: a Llama of its own, prompt first, then token by token with a KV cache.

The full model is measured in the same run, and all sizes take turns in every round, so a busy machine slows them alike.
A figure is the median over the rounds of (the full model's time / this one's), which needs no quiet machine to repeat.

Try it:  python eval.py --speed
"""
import statistics
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from plumbing.latency import seconds
from model import KVCache, Llama, SubNet

ROUNDS = 7

# -----------------------------------------------------------------------------
# memory


class Peak(TorchDispatchMode):
    """Bytes of tensors that are alive at a time: `most` is what torch.cuda counts for itself, on the CPU. Counts a
    model's weights, and what is made under it; what a kernel allocates inside does not show."""

    def __init__(self, weights=()):
        super().__init__()
        self.alive = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}
        self.now = self.most = sum(self.alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        """A storage, once for all its views, until the last of them is gone."""
        key, size = storage.data_ptr(), storage.nbytes()
        if size and key not in self.alive:
            self.alive[key] = size
            weakref.finalize(storage, self.drop, key)
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, key):
        self.now -= self.alive.pop(key)


def peak_memory(native: Llama, run, device) -> int:
    """Bytes of the weights and of what is allocated besides while run() runs, at most."""
    if device.type == "cpu":
        with Peak(native.parameters()) as peak:
            run()
        return peak.most
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before + sum(w.nbytes for w in native.parameters())


# -----------------------------------------------------------------------------
# speed


def slim(model: Llama, subnet: SubNet, device, dtype: torch.dtype | None = None) -> Llama:
    """The slice as a Llama of its own, as it is deployed: in bf16 on CUDA (or in dtype)."""
    with torch.device("meta"):
        native = Llama(subnet.config(model.config))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    native.load_state_dict({name: w.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
                            for name, w in model.slices(subnet).items()}, assign=True)
    native.tie()
    return native


@torch.no_grad()
def speeds(model: Llama, subnets: list[SubNet], window: int, batch: int, device) -> tuple[list[dict], dict]:
    """-> for each subnet the tokens/s of prefill and decode and the peak memory (weights, KV cache, activations) as
    ratios to the full model's; and the full model's own: tokens/s, bytes, the tokens of the prompt and the new ones."""
    new = max(1, min(32, window // 4))
    prompt = max(1, min(512, window) - new)
    tokens = torch.randint(model.config.vocab_size, (batch, prompt + new),
                           generator=torch.Generator().manual_seed(0)).to(device)

    def turn(native: Llama) -> tuple[float, float]:
        cache = KVCache(prompt + new)
        return (seconds(lambda: native(tokens[:, :prompt], cache=cache), device),
                seconds(lambda: [native(tokens[:, i:i + 1], cache=cache) for i in range(prompt, prompt + new)], device))

    def warm(subnet: SubNet) -> Llama:  # one at a time: all sizes together may not fit
        native = slim(model, subnet, device)
        native(tokens[:, :1])
        return native

    sizes, memory, rounds = list(dict.fromkeys([model.full, *subnets])), {}, []
    for subnet in sizes:
        native = warm(subnet)
        memory[subnet] = peak_memory(native, lambda: turn(native), device)
    for _ in tqdm(range(ROUNDS), "speed", leave=False, disable=None):
        rounds.append({subnet: turn(warm(subnet)) for subnet in sizes})
    ratio = lambda subnet, part: statistics.median(r[model.full][part] / r[subnet][part] for r in rounds)
    took = [statistics.median(r[model.full][part] for r in rounds) for part in (0, 1)]
    return ([dict(prefill=ratio(s, 0), decode=ratio(s, 1), memory=memory[s] / memory[model.full]) for s in subnets],
            dict(prefill=batch * prompt / took[0], decode=batch * new / took[1], memory=memory[model.full],
                 prompt=prompt, new=new, batch=batch))
