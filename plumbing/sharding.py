"""
One Llama over many ranks, on PyTorch's own engines: what each keeps, how its gradients meet, what a
checkpoint holds.

    --shard    weights   gradients   optimizer       bytes per parameter on each of N GPUs, all in fp32
    ddp           4          4           8           every rank has everything; one reduction per step
    zero1         4          4          8/N          Adam's moments are split (ZeroRedundancyOptimizer)
    fsdp         4/N        4/N         8/N          so are weights and gradients (FSDP2), gathered block by block

A checkpoint is the same in all three, and the same as that of one process: whole tensors, written
by rank 0. So a run can go on with another number of ranks or another --shard.

    torchrun --nproc_per_node=8 train.py --shard fsdp
"""
import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model import Llama
from plumbing.parallel import RANK, WORLD

SHARDINGS = ("ddp", "zero1", "fsdp")


def shard(model: Llama, kind: str, device: torch.device):
    """The module to call in training. fsdp splits the model in place and returns it; its gradients
    are reduced after every pass (a skipped block is skipped on all ranks), those of DDP once a
    step."""
    if WORLD == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    if kind == "fsdp":
        mesh = init_device_mesh(device.type, (WORLD,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def gradients_meet(wrapped, now: bool):
    """Around a forward and backward: do its gradients meet those of the other ranks now, or only
    add up? The choice is DDP's; fsdp reduces after every pass, and one process has nobody to
    meet."""
    if isinstance(wrapped, DistributedDataParallel) and not now:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def compile_blocks(model: Llama | None, backend: str = "inductor") -> None:
    """torch.compile for the forward of every block, in place, before shard(). All blocks share one
    code. The first size that runs is compiled as it is; a size that changes becomes a symbol: so a
    few graphs serve every slice (where it is all of an axis they are graphs of their own), those
    with gates or factors, and those without gradient."""
    torch._dynamo.config.recompile_limit = 64    # beyond, blocks would run uncompiled
    torch._dynamo.config.optimize_ddp = False    # it cuts graphs at DDP's buckets; ours are small already
    if model is None:
        return
    for block in model.layers:
        block.forward = torch.compile(block.forward, backend=backend)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made so far in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def adamw(groups: list[dict], kind: str, **settings):
    """AdamW over groups, its moments split over the ranks if kind is zero1."""
    if kind == "zero1" and WORLD > 1:
        return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, **settings)
    return torch.optim.AdamW(groups, **settings)


def whole(t: torch.Tensor) -> torch.Tensor:
    """A tensor of which every rank has a part, put together on all of them. All ranks must ask."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def model_state(model: Llama) -> dict:
    """The state dict with whole tensors on the CPU of rank 0, {} elsewhere. All ranks must ask."""
    state = {}
    for name, t in model.state_dict().items():
        t = whole(t.detach())
        if RANK == 0:
            state[name] = t.cpu()
    return state


def optimizer_state(optimizer) -> dict:
    """As AdamW alone would give it, on rank 0; {} elsewhere. All ranks must ask."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if RANK == 0 else {}
    state = optimizer.state_dict()
    moments = {}
    for i, tensors in state["state"].items():
        for name, t in tensors.items():
            t = whole(t)  # one at a time: all of them at once would be 8 bytes a parameter on every GPU
            if RANK == 0:
                moments.setdefault(i, {})[name] = t.cpu()
    return state | dict(state=moments) if RANK == 0 else {}


def load_optimizer_state(optimizer, state: dict) -> None:
    """Inverse of optimizer_state(), with the whole state on every rank. Rates, decay and the like
    stay those that the optimizer was made with: a resumed run may have changed them."""
    made_with = []
    for group in optimizer.param_groups:
        made_with.append({name: value for name, value in group.items() if name != "params"})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for i, tensors in state["state"].items():
        for name, t in tensors.items():
            if t.dtype != params[i].dtype:  # torch would round it without a word
                raise ValueError(f"{name} is {t.dtype}, expected {params[i].dtype}")
        moments[i] = {name: split_like(t, params[i]) for name, t in tensors.items()}
    optimizer.load_state_dict(state | dict(state=moments))
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        for p, tensors in optimizer.optim.state.items():
            # It leaves AdamW's step on the CPU; fused AdamW wants it beside p.
            tensors["step"] = tensors["step"].to(p.device)
        optimizer.state.clear()  # and a second copy of all moments here
    for group, settings in zip(optimizer.param_groups, made_with):
        group.update(settings)


def split_like(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor of moments, split over the ranks as its parameter is; a step counter stays
    whole."""
    if isinstance(p, DTensor) and t.shape == p.shape:
        return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)
    return t
