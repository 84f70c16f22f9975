"""
What turns gradients into steps: who learns at which rate, how noise and rates change over a run.

Three parts train, each with a learning rate and a gradient clip of its own: the Llama (4e-5 for real models), the
router and the modulation (4e-2 at the paper's length: they are small and start from nothing).

    rate     0 .. warm-up .. cosine to a tenth        tau   1 -> 0.056, geometrically: softness of the choice
    soft     share of passes that teach the router    kappa 1 -> 10, linearly: logits against noise
"""
import math

import torch

from model import Llama
from router import Router
from plumbing.sharding import adamw, whole


def lr_factor(step: int, steps: int, warmup: float, start: float = 0.0) -> float:
    """Nothing before `start`, a linear warm-up, then a cosine to a tenth; start and warmup are shares of the steps."""
    begin, up = round(start * steps), max(1, round(warmup * steps))
    if step < begin + up:
        return max(0, step + 1 - begin) / up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - begin - up) / max(1, steps - begin - up)))


def schedule(step: int, args) -> tuple[float, float, float]:
    """(tau, kappa, soft): tau falls geometrically 1 -> tau_end, kappa rises linearly 1 -> kappa_end. The share of soft
    passes, which teach the router and cost the full width, falls linearly from soft_prob at router_start to 0 at
    soft_end: before, the router does not learn; after, it has decided."""
    t = step / max(1, args.steps - 1)
    left = (args.soft_end - t) / max(1e-9, args.soft_end - args.router_start)
    soft = args.soft_prob * max(0.0, left) if t >= args.router_start else 0.0
    return args.tau_end ** t, 1 + (args.kappa_end - 1) * t, soft


def parts(model: Llama, router: Router | None) -> dict[str, list]:
    """The parameters that train, in three parts, each with a learning rate and a gradient clip of its own."""
    named = [] if router is None else list(router.named_parameters())
    return dict(llama=[p for p in model.parameters() if p.requires_grad],
                router=[p for name, p in named if not name.startswith("modulation")],
                modulation=[p for name, p in named if name.startswith("modulation")])


def make_optimizers(model: Llama, router: Router | None, args) -> list:
    """AdamW for the Llama, whose matrices are decayed and whose state may be sharded, and one for router and
    modulation. `peak` is a group's learning rate after its warm-up, which begins at `start`."""
    groups, rates = {}, dict(llama=args.lr, router=args.router_lr, modulation=args.modulation_lr)
    for name, parameters in parts(model, router).items():
        for decayed in (True, False):
            chosen = [p for p in parameters if (name == "llama" and p.dim() == 2) == decayed]
            group = dict(params=chosen, peak=rates[name], start=args.router_start if name == "router" else 0.0,
                         weight_decay=args.weight_decay if decayed else 0.0)
            groups.setdefault(name == "llama", []).extend([group] if chosen else [])
    return [adamw(of, args.shard if llama else "ddp", lr=args.lr, betas=(0.9, 0.95), fused=True)
            for llama, of in groups.items() if of]


def clip_gradients(model: Llama, router: Router | None, clip: float) -> dict[str, float]:
    """Clips each part's gradient; returns their norms before."""
    return {name: whole(torch.nn.utils.clip_grad_norm_(parameters, clip)).item()
            for name, parameters in parts(model, router).items() if parameters}
