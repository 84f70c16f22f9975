"""
One process, or as many as torchrun started: who we are, which device is ours, and what the ranks
tell each other.

    python train.py                                   RANK 0 of 1, nothing is initialised
    torchrun --nproc_per_node=8 train.py              eight ranks, NCCL on GPUs, gloo on CPUs
"""
import contextlib
import os
import signal
import sys
import zlib
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.errors import fail

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

AUTOCASTS = ("float32", "bfloat16")
_chosen = None  # the one of them that a flag chose for this program; None: the usual one of the device


def default_device() -> str:
    """cuda where this torch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(kind: str) -> torch.device:
    """This rank's device of a kind: cpu or cuda."""
    if kind == "cpu":
        return torch.device("cpu")
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    # every rank finds out, the first one says so
    wanted = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if wanted > gpus:
        fail(f"--device cuda needs {wanted} GPUs, but this torch sees {gpus}; "
             "use --device cpu, or fewer processes")
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", local)


def setup(kind: str) -> torch.device:
    """Joins the process group if torchrun started us, and returns this rank's device."""
    device = device_of(kind)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=1))
    return device


def usual_autocast(kind: str) -> str:
    """What the matrix products of a forward run in on cpu or cuda, when no flag says it: bfloat16 on
    CUDA, float32 on the CPU, where few processors multiply bf16 faster."""
    return "bfloat16" if kind == "cuda" else "float32"


@contextlib.contextmanager
def autocast_is(chosen: str | None):
    """Inside, every autocast() of this program is the chosen one of AUTOCASTS; None: the usual one."""
    global _chosen
    before = _chosen
    _chosen = chosen
    try:
        yield
    finally:
        _chosen = before


def autocast(device: torch.device):
    """Around a forward, without its backward: bf16 products, or nothing, for fp32."""
    if (_chosen or usual_autocast(device.type)) == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """In place, the mean over ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= WORLD
    return tensor


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """In place, the sum over ranks. The tensor may be on the CPU, where NCCL does not reach."""
    if dist.is_initialized():
        total = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(total)
        tensor.copy_(total)
    return tensor


def share(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's share of rows (n, ...), and how many rows of it count.

    All ranks get as many, because a sharded model gathers its weights in every forward. So a rank
    for which no row is left gets one that does not count."""
    mine = rows[RANK::WORLD]
    count = len(mine)
    if count * WORLD < len(rows):
        mine = torch.cat([mine, rows[:1]])
    return mine, count


def same_on_all_ranks(drawn: str, step: int) -> None:
    """fail() on all ranks if this text is not the same everywhere: ranks that run different slices
    wait for one another, for ever under fsdp. One number from each rank."""
    if not dist.is_initialized():
        return
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([zlib.crc32(drawn.encode())], dtype=torch.int64, device=device)
    found = [torch.zeros_like(mine) for _ in range(WORLD)]
    dist.all_gather(found, mine)
    others = [rank for rank, number in enumerate(found) if number.item() != found[0].item()]
    if others:
        fail(f"at step {step} the ranks {' '.join(map(str, others))} drew other slices than rank 0: their "
             "routers, seeds or flags differ; "
             "start all ranks with one command, on machines of one kind, and go on with --resume")


def rank0_first(work):
    """Runs work() on rank 0 while the others wait, and gives its (plain) result to all."""
    result = [work() if RANK == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def say(*parts) -> None:
    """One line of progress on stderr, from rank 0, that a progress bar survives."""
    if RANK == 0:
        tqdm.write(" ".join(map(str, parts)), file=sys.stderr)


def bar(work=None, name: str = "", total: int | None = None, unit: str = "it") -> tqdm:
    """A bar with the time left, around an iterable, or to update(): on rank 0, on a terminal, of
    work that takes over a second. It goes when it is full."""
    hidden = None if RANK == 0 else True  # None: hidden unless stderr is a terminal
    return tqdm(work, name, total, unit=unit, delay=1, leave=False, disable=hidden)


def finish() -> None:
    """Leaves the process group, all ranks together: a rank that goes first can abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Stop:
    """SIGTERM and SIGINT as a wish: the step is finished and saved first. A second one ends the
    process at once."""

    def __init__(self):
        self.wished = False
        self.number = signal.SIGTERM  # of the signal; another rank may have got it

    def __enter__(self):
        self.before = {number: signal.signal(number, self.wish) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def wish(self, number, frame):
        self.wished = True
        self.number = number
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
