"""
Which channels, heads, neurons and layers matter, and the permutation that puts the best first.

LLaMaFlex Sec. 2.3 ranks units by accumulated activation magnitude; this is Minitron's form of it. For a unit
with activation x over the positions of S calibration windows

    A = sqrt( sum over windows ( mean over positions |x| )^2 )                 in fp32

    neurons    x = the input of w2, in every layer
    heads      x = the input of wo, L2 norm over head_dim; ranked inside their KV group, which they never leave
    channels   the outputs of all 2 n_layers + 1 norms, A summed: one order for the whole network, because the
               residual stream is one
    layers     take away, again and again, the layer whose absence changes the logits least:
               sum (full - without)^2 / sum full^2    (block influence, 1 - cos(in, out), is the cheap way)

Sorting is a change of basis by a permutation: the model computes the same function before and after. After it,
"the best k" is "the first k", and a slice of the weights is a good small model to start training from.
"""
import torch
import torch.nn.functional as F

from model import Llama, SubNet
from space import random_generator

# -----------------------------------------------------------------------------
# ranking


def accumulate(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Adds (mean over positions |x|)^2 of each window in the batch. x: (B, T, units) -> (units,) in fp32."""
    a = x.detach().float().abs().mean(1).square().sum(0)
    return a if total is None else total + a


@torch.no_grad()
def activation_scores(model: Llama, windows: torch.Tensor, batch: int = 8) -> dict[str, list[torch.Tensor]]:
    """A of every unit on calibration windows (S, T). Keys: dim, a score per norm; n_heads and ffn_dim, per layer."""
    sums, hooks = {}, []
    hd = model.config.head_dim

    def listen(module, key, of=lambda x: x):
        def hook(_module, _inputs, output):
            sums[key] = accumulate(sums.get(key), of(output))
        hooks.append(module.register_forward_hook(hook))

    for i, block in enumerate(model.layers):
        listen(block.attention_norm, ("dim", 2 * i))
        listen(block.ffn_norm, ("dim", 2 * i + 1))
        listen(block.attention.heads, ("n_heads", i), lambda x: x.float().unflatten(-1, (-1, hd)).norm(dim=-1))
        listen(block.feed_forward.neurons, ("ffn_dim", i))
    listen(model.norm, ("dim", 2 * len(model.layers)))
    try:
        for tokens in windows.split(batch):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return {axis: [sums[key].sqrt() for key in sorted(sums) if key[0] == axis]
            for axis in ("dim", "n_heads", "ffn_dim")}


@torch.no_grad()
def layers_by_logits(model: Llama, windows: torch.Tensor, batch: int = 8) -> list[int]:
    """Layers, most important first: the one whose removal moves the logits least goes last, then again among the
    rest (Nemotron Elastic's iterative criterion). n_layers^2 / 2 forward passes over windows (S, T)."""
    full, kept, removed = model.full, list(range(model.config.n_layers)), []
    while len(kept) > 1:
        damage = {i: 0.0 for i in kept}
        for tokens in windows.split(batch):
            reference = model(tokens)[0]
            for i in kept:
                rest = [j for j in kept if j != i]
                subnet = SubNet(full.dim, tuple(rest), tuple(full.n_heads[j] for j in rest),
                                tuple(full.ffn_dim[j] for j in rest))
                damage[i] += ((model(tokens, subnet=subnet)[0] - reference).square().sum()
                              / reference.square().sum()).item()
        worst = min(kept, key=damage.get)
        kept.remove(worst)
        removed.append(worst)
    return kept + removed[::-1]


@torch.no_grad()
def layers_by_influence(model: Llama, windows: torch.Tensor, batch: int = 8) -> list[int]:
    """Layers, most important first, by block influence 1 - cos(input, output), in one pass over windows (S, T)."""
    influence = torch.zeros(model.config.n_layers, dtype=torch.float64)

    def hook(block, inputs, output):
        similar = F.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        influence[block.layer] += (1 - similar).sum().double().cpu()

    hooks = [block.register_forward_hook(hook) for block in model.layers]
    try:
        for tokens in windows.split(batch):
            model(tokens)
    finally:
        for h in hooks:
            h.remove()
    return influence.argsort(descending=True, stable=True).tolist()


def rank(model: Llama, windows: torch.Tensor, depth: str = "logits", units: str = "activation", seed: int = 0) -> dict:
    """The order of all units, best first, from calibration windows (S, T) that no evaluation sees.

    Returns {"dim": (dim,), "n_heads": [(n_heads,)] per layer, group-major and inside the groups,
    "ffn_dim": [(ffn_dim,)] per layer, "layers": list}. depth: "logits" or "influence". units: "activation", or one of
    two yardsticks for it: "random" (drawn by seed) and "reversed" (worst first)."""
    T = windows.size(1)
    batch, depth_windows = max(1, 4096 // T), max(2, 2048 // T)  # few for depth: it is n_layers^2 / 2 passes
    scores = activation_scores(model, windows, batch)
    if units != "activation":
        draw = random_generator("units", seed)
        other = {"random": lambda s: torch.rand(s.shape, generator=draw), "reversed": torch.neg}[units]
        scores = {axis: [other(s) for s in of] for axis, of in scores.items()}
    best_first = lambda s: s.argsort(dim=-1, descending=True, stable=True).cpu()
    orders = {"dim": best_first(torch.stack(scores["dim"]).sum(0)),
              "ffn_dim": [best_first(s) for s in scores["ffn_dim"]], "n_heads": []}
    for block, s in zip(model.layers, scores["n_heads"]):
        s = s.unflatten(0, (block.attention.groups, -1))                  # groups, heads in a group
        orders["n_heads"].append((torch.arange(s.size(0))[:, None] * s.size(1) + best_first(s)).flatten())
    by = {"logits": layers_by_logits, "influence": layers_by_influence}[depth]
    orders["layers"] = by(model, windows[:depth_windows] if depth == "logits" else windows, batch)
    return orders


# -----------------------------------------------------------------------------
# sorting


@torch.no_grad()
def sort_(model: Llama, orders: dict) -> None:
    """Permutes the model in place so that the first k units are the best k. Its function does not change.
    Layers stay where they are: a slice names those it keeps."""
    def permute(parameter, order, axis):
        parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))

    channels = orders["dim"]
    permute(model.tok_embeddings.weight, channels, 1)
    if not model.config.tied:  # tied: one tensor, permuted once
        permute(model.output.weight, channels, 1)
    permute(model.norm.weight, channels, 0)
    for block, heads, neurons in zip(model.layers, orders["n_heads"], orders["ffn_dim"]):
        attention, mlp = block.attention, block.feed_forward
        for norm in (block.attention_norm, block.ffn_norm):
            permute(norm.weight, channels, 0)
        for reads in (attention.wq, attention.wk, attention.wv, mlp.w1, mlp.w3):  # columns read the stream
            permute(reads.weight, channels, 1)
        for writes in (attention.wo, mlp.w2):                                     # rows write it
            permute(writes.weight, channels, 0)
        rows = (heads[:, None] * attention.head_dim + torch.arange(attention.head_dim)).flatten()
        permute(attention.wq.weight, rows, 0)
        permute(attention.wo.weight, rows, 1)
        if attention.n_heads == attention.n_kv_heads:  # MHA: the KV head goes with its query head
            permute(attention.wk.weight, rows, 0)
            permute(attention.wv.weight, rows, 0)
        for inner in (mlp.w1, mlp.w3):
            permute(inner.weight, neurons, 0)
        permute(mlp.w2.weight, neurons, 1)
