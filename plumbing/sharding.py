"""
One Llama over many ranks, on PyTorch's own engines: what each keeps, how its gradients meet, what a
checkpoint holds.

    --shard    weights   gradients   optimizer       bytes per parameter on each of N GPUs
    ddp           4          4           8           every rank has everything; one reduction per step
    zero1         4          4          8/N          Adam's moments are split (ZeroRedundancyOptimizer)
    fsdp         4/N        4/N         8/N          so are weights and gradients (FSDP2), gathered
                                                     block by block, in bf16 where autocast is

Under fsdp no rank has memory for a whole copy: the Llama is split before it has any memory, and a rank
reads its own rows from the files. In a checkpoint every rank writes what it has (state.py:
save_state), and reads what it needs: so a run can go on with another number of ranks or another
--shard. The raw folder beside it is the same in all three: rank 0 writes it tensor by tensor.

    torchrun --nproc_per_node=8 train.py --shard fsdp
"""
import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model import Llama
from plumbing.checkpoint import fill_llama_, load_llama, open_shards
from plumbing.parallel import RANK, WORLD, autocast
from plumbing.params import read_config
from plumbing.rows import is_split, local, own_part, whole

SHARDINGS = ("ddp", "zero1", "fsdp")


def shard(model: Llama, kind: str, device: torch.device):
    """The module to call in training. fsdp splits the model in place and returns it, also one that is
    split already; its gradients are reduced after every pass (a skipped block is skipped on all
    ranks), those of DDP once a step."""
    if WORLD == 1 or isinstance(model, FSDPModule):
        return model
    if kind == "fsdp":
        return split_(model, device)
    if not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def gathered_dtype(device: torch.device) -> torch.dtype:
    """What fsdp gathers weights in: the dtype that autocast would make of them for a matrix product."""
    with autocast(device):
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
    return torch.float32


def split_(model: Llama, device: torch.device) -> Llama:
    """FSDP2 in place: every rank keeps its rows of every tensor, in fp32, as AdamW wants them. They
    are gathered in autocast's dtype, half the bytes in bf16, and gradients are added up in fp32.

    Matrix products are those of autocast without sharding. Two things differ, or would. Norms are
    rounded to bf16 on their way. And the residual stream begins with rows of the embeddings: it
    stays in fp32, as without sharding, because the embeddings' output is put back into it."""
    mesh = init_device_mesh(device.type, (WORLD,))
    dtype = gathered_dtype(device)
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        # Inputs stay as they are: positions, gates and factors are in fp32 for a reason.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        model.tok_embeddings.register_forward_hook(lambda module, inputs, x: x.float())
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def load_on_ranks(folder, kind: str, device: torch.device) -> Llama:
    """A raw Llama folder as a model in fp32, whole on every rank. Under fsdp a rank has memory for its
    own rows alone, and reads no others."""
    if kind != "fsdp" or WORLD == 1:
        return load_llama(folder, device)
    config = open_shards(folder, read_config(folder))[2]
    with torch.device("meta"):
        model = Llama(config)
    split_(model, device).to_empty(device=device)
    model.tie()  # to_empty makes two tensors of one
    fill_llama_(model, folder)
    return model


@contextlib.contextmanager
def gathered(model: Llama | None):
    """Inside, what lies outside the blocks (embeddings, last norm, output) is whole on every rank, so
    that not only model() may be called, but states(), norm() and the like. Blocks gather themselves."""
    if not isinstance(model, FSDPModule):
        yield
        return
    device = model.tok_embeddings.weight.device
    with torch.no_grad(), autocast(device):  # FSDP2 takes the module that runs first for the whole model
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


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


# -----------------------------------------------------------------------------
# what a checkpoint holds: parts of tensors, which any other number of ranks puts together or cuts again


def model_state(model: Llama) -> dict:
    """This rank's part of the state dict, on the CPU: its rows under fsdp; else everything on rank 0,
    and nothing on the others."""
    weights = model.state_dict()
    return {name: local(t.detach()).cpu() for name, t in weights.items() if RANK == 0 or is_split(t)}


def whole_weights(model: Llama):
    """Yields (name, tensor) of the state dict, one by one, whole. All ranks must ask."""
    for name, t in model.state_dict().items():
        yield name, whole(t.detach())


def load_model_state(model: Llama, state: dict) -> None:
    """Inverse of model_state(). state: that of all ranks, whole tensors or Rows of them."""
    weights = model.state_dict()
    if weights.keys() != state.keys():
        raise KeyError(*(weights.keys() ^ state.keys()))
    for name, t in weights.items():
        local(t).copy_(own_part(state[name], t))


def inner(optimizer):
    """The optimizer that has this rank's moments: that of zero1 is inside of another."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def parameters_of(optimizer) -> list[torch.Tensor]:
    """All parameters, group after group, as a state dict numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(optimizer) -> dict:
    """As AdamW would give it, but with this rank's part of the moments alone, on the CPU: its rows under
    fsdp, those of its parameters under zero1; else everything on rank 0, and nothing on the others."""
    moments = inner(optimizer).state
    state = {}
    for i, p in enumerate(parameters_of(optimizer)):
        has_part = RANK == 0 or is_split(p) or inner(optimizer) is not optimizer
        if has_part and p in moments:
            state[i] = {name: local(t).cpu() for name, t in moments[p].items()}
    groups = []
    numbers = iter(range(len(parameters_of(optimizer))))
    for group in optimizer.param_groups:
        groups.append(group | dict(params=[next(numbers) for _ in group["params"]]))
    return dict(state=state, param_groups=groups)


def load_optimizer_state(optimizer, state: dict) -> None:
    """Inverse of optimizer_state(). state: that of all ranks, whole tensors or Rows of them.

    Rates, decay and the like stay those that the optimizer was made with: a resumed run may have
    changed them."""
    found = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if found != expected:
        raise ValueError(f"groups of {found} parameters in place of {expected}")
    mine = set(parameters_of(inner(optimizer)))
    for i, p in enumerate(parameters_of(optimizer)):
        if p in mine and i in state["state"]:
            moments = state["state"][i]
            inner(optimizer).state[p] = {name: split_like(t, p) for name, t in moments.items()}


def split_like(t, p: torch.Tensor) -> torch.Tensor:
    """A whole tensor, or Rows of one, split over the ranks as a parameter of its shape is: a rank reads
    its own rows. A step counter stays whole."""
    if t.shape == () and t.dtype == p.dtype:
        return t.to(p.device)
    part = own_part(t, p).clone().to(p.device)
    if not is_split(p):
        return part
    return DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
