"""
What a step of Flextron's training does, in each of its three stages (flextron.py has the loop and the command line).

    elastic   the full model and random SubNets, sliced                                    (elastic_step)
    routers   the Llama is frozen; they follow a surrogate of its loss                     (surrogate_step)
              or the loss itself, through gates                                            (gates_step)
    joint     the full model and every target, through gates; both learn                   (gates_step)

The surrogate S is a small network that learns what the routers' outputs do to the loss, from pairs seen, so that
routers can follow its gradient without one backward pass through the language model. They trust it while its error, on
pairs it has not learned from yet, is under a threshold; then it is thrown away.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SubNet
from plumbing.parallel import autocast
from flextron.network import KINDS, Flextron, Noise
from space import random_generator

# -----------------------------------------------------------------------------
# the surrogate


class Surrogate:
    """S: the routers' soft choices, (rows, 2 n_layers * K) -> excess loss in nats, (rows,). A row is a token if the
    routers are dynamic, else a sequence. `error`: of the mean over a batch not yet learned, averaged over steps."""
    KEEP, ROUNDS, BATCH = 4096, 8, 256  # pairs remembered; updates per step; pairs in each

    def __init__(self, width: int, seed: int):
        self.net = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1))
        self.seed, self.error, generator = seed, None, random_generator("surrogate", seed)
        with torch.no_grad():
            for p in self.net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * p.size(-1) ** -0.5 if p.dim() == 2 else p * 0)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        self.x, self.y = torch.zeros(0, width), torch.zeros(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, 0]

    def observe(self, x: torch.Tensor, y: torch.Tensor, step: int) -> None:
        """Judges S by new pairs, then learns from them and from those remembered."""
        with torch.no_grad():
            error = (self(x).mean() - y.mean()).abs().item()
        self.error = error if self.error is None else 0.9 * self.error + 0.1 * error
        self.x, self.y = torch.cat((self.x, x))[-self.KEEP:], torch.cat((self.y, y))[-self.KEEP:]
        generator = random_generator(self.seed, step, "pairs", len(self.y))
        for _ in range(self.ROUNDS):
            rows = torch.randint(len(self.y), (self.BATCH,), generator=generator)
            self.optimizer.zero_grad()
            F.mse_loss(self(self.x[rows]), self.y[rows]).backward()
            self.optimizer.step()

    def state(self) -> dict:
        return dict(net=self.net.state_dict(), optimizer=self.optimizer.state_dict(), x=self.x, y=self.y,
                    error=self.error)

    def load(self, state: dict) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.x, self.y, self.error = state["x"], state["y"], state["error"]


# -----------------------------------------------------------------------------
# one step of each stage; gradients are left in .grad


def stage_of(step: int, args) -> str:
    """elastic, routers or joint."""
    return "elastic" if step < args.elastic_steps else (
        "routers" if step < args.elastic_steps + args.router_steps else "joint")


def batches(shards, step: int, i: int, args, device):
    """The tokens of a step's i-th pass, (x, y, share of the pass) micro-batch by micro-batch."""
    rows, passes = args.batch_tokens // args.seq_len, 1 + max(args.samples, len(args.targets))
    x, y = shards.batch(step, passes * rows, i * rows, (i + 1) * rows)
    for m in range(0, rows, args.micro_batch):
        part = x[m:m + args.micro_batch]
        yield part.to(device), y[m:m + args.micro_batch].to(device), len(part) / rows


def noise_of(step: int, target: float, part: int, args) -> Noise:
    """tau falls geometrically 1 -> tau_end, kappa rises 1 -> kappa_end from the routers' first step to the last one."""
    t = (step - args.elastic_steps) / max(1, args.router_steps + args.joint_steps - 1)
    return Noise(args.tau_end ** t, 1 + (args.kappa_end - 1) * t, (args.seed, step, target, part))


def random_subnet(flextron: Flextron, *seed) -> SubNet:
    """Sizes drawn layer by layer: a function of `seed`."""
    L, generator = flextron.model.config.n_layers, random_generator(*seed)
    pick = lambda sizes: [sizes[k] for k in torch.randint(len(sizes), (L,), generator=generator).tolist()]
    return SubNet(flextron.model.config.dim, range(L), *(pick(flextron.sizes[kind]) for kind in KINDS))


def elastic_step(flextron: Flextron, shards, step: int, args, device) -> dict:
    """Eq. 5: the full model and random SubNets, really sliced, each on its own tokens."""
    losses = {}
    for i in range(1 + args.samples):
        subnet = random_subnet(flextron, args.seed, step, i) if i else flextron.model.full
        for x, y, share in batches(shards, step, i, args, device):
            with autocast(device):
                loss = flextron.model(x, y, subnet=subnet)[1]
            (loss * share / (1 + args.samples)).backward()
            losses[i] = losses.get(i, 0.0) + loss.item() * share
    return dict(loss=list(losses.values()), updated=False)


def gates_step(flextron: Flextron, shards, step: int, args, device, joint: bool) -> dict:
    """Every target through gates on the full width, and, if the Llama learns too, the full model."""
    losses, costs = {}, {}
    for i, target in enumerate([*args.targets, 1.0] if joint else args.targets):
        for m, (x, y, share) in enumerate(batches(shards, step, i, args, device)):
            with autocast(device):
                if target == 1:
                    loss, penalty = flextron.model(x, y)[1], 0.0
                else:
                    _, loss, picks = flextron(x, y, target, noise_of(step, target, m, args), masked=True)
                    mean = flextron.mean_cost(picks)
                    penalty = (mean / target - 1).abs()
                    costs[target] = costs.get(target, 0.0) + mean.item() * share
            ((loss + args.penalty * penalty) * share / (len(args.targets) + joint)).backward()
            losses[target] = losses.get(target, 0.0) + loss.item() * share
    return dict(loss=list(losses.values()), cost=list(costs.values()), updated=True)


def surrogate_step(flextron: Flextron, surrogate: Surrogate, shards, step: int, args, device) -> dict:
    """Runs what the routers draw, no more, shows S the pairs, and sends S's gradient to the routers if S is good."""
    losses, costs, pairs, penalties = {}, {}, [], []
    each = lambda logits, y: F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    for i, target in enumerate(args.targets):
        for m, (x, y, share) in enumerate(batches(shards, step, i, args, device)):
            with autocast(device):
                logits, _, picks = flextron(x, y, target, noise_of(step, target, m, args))  # no weight wants a gradient
                excess = each(logits.detach(), y) - each(flextron.model(x)[0], y)           # B, T
            soft = torch.cat([pick.soft for pick in picks], dim=-1)                         # B, T or 1, 2L * K
            rows = excess if flextron.dynamic else excess.mean(1, keepdim=True)
            pairs.append((soft.flatten(0, 1).cpu(), rows.flatten().cpu(), share))
            mean = flextron.mean_cost(picks)
            penalties.append((mean / target - 1).abs() * share)
            losses[target] = losses.get(target, 0.0) + excess.mean().item() * share
            costs[target] = costs.get(target, 0.0) + mean.item() * share
    for soft, rows, _ in pairs:
        surrogate.observe(soft.detach(), rows, step)
    updated = surrogate.error < args.threshold
    if updated:
        predicted = sum(surrogate(soft).mean() * share for soft, _, share in pairs)
        ((predicted + args.penalty * sum(penalties).cpu()) / len(args.targets)).backward()
    return dict(loss=list(losses.values()), cost=list(costs.values()), error=surrogate.error, updated=updated)


def train_step(flextron: Flextron, surrogate: Surrogate, shards, step: int, args, device) -> dict:
    """A step of the stage that `step` is in. Returns what to log: the losses of its passes, and `updated`, whether the
    routers are to move."""
    stage = stage_of(step, args)
    flextron.model.requires_grad_(stage != "routers")
    if stage == "elastic":
        return elastic_step(flextron, shards, step, args, device)
    if stage == "routers" and args.teach == "surrogate":
        return surrogate_step(flextron, surrogate, shards, step, args, device)
    return gates_step(flextron, shards, step, args, device, stage == "joint")
