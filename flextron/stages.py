"""
What a step of Flextron's training does in each of its three stages. The loop is in __main__.py.

    elastic   the full model and random SubNets, sliced                                    elastic_step
    routers   the Llama is frozen. Routers follow the loss itself, through gates,          gates_step
              or a surrogate of the loss                                                   surrogate_step
    joint     the full model and every target, through gates. Llama and routers learn      gates_step

The surrogate S (the paper's) is a small network. It learns from pairs: what the routers put out, and
the language model's loss that followed. Routers can then follow S's gradient without a backward pass
through the language model. They trust S while its error, on pairs that it has not learned from yet,
is under a threshold. Then S is thrown away.

The steps leave gradients in .grad, and return what to log.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from flextron.network import Flextron
from flextron.routers import ELASTIC, Noise
from model import SubNet, losses_in_chunks
from plumbing.parallel import autocast
from plumbing.sharding import load_optimizer_state
from plumbing.tensors import load_weights
from space import random_generator

# -----------------------------------------------------------------------------
# the surrogate


class Surrogate:
    """S: the routers' soft choices (rows, 2 n_layers * K) -> excess loss in nats (rows,).

    A row is a token if routers are dynamic, a sequence if they are static. The excess is over the
    full model's loss on the same tokens: the loss itself moves from batch to batch by more than a
    router can change. error: of the mean over a batch not yet learned from, averaged over steps;
    None before the first step."""
    KEEP = 4096  # pairs remembered
    ROUNDS = 8   # updates per step
    BATCH = 256  # pairs in each

    def __init__(self, width: int, seed: int):
        self.net = nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 1))
        self.seed = seed
        self.error = None
        generator = random_generator("surrogate", seed)
        with torch.no_grad():
            for p in self.net.parameters():
                if p.dim() == 2:
                    random = torch.randn(p.shape, generator=generator)
                    p.copy_(random * p.size(-1) ** -0.5)
                else:
                    p.zero_()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        self.x = torch.zeros(0, width)
        self.y = torch.zeros(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, width) -> (rows,)."""
        return self.net(x)[:, 0]

    def observe(self, x: torch.Tensor, y: torch.Tensor, step: int) -> None:
        """Judges S by new pairs, then lets it learn from them and from those remembered.

        x: (rows, width), y: (rows,)."""
        # the error of this batch, and its running mean
        with torch.no_grad():
            predicted = self(x).mean()
            error = (predicted - y.mean()).abs().item()
        if self.error is None:
            self.error = error
        else:
            self.error = 0.9 * self.error + 0.1 * error
        # a few updates on pairs drawn from all that are remembered
        self.x = torch.cat((self.x, x))[-self.KEEP:]
        self.y = torch.cat((self.y, y))[-self.KEEP:]
        generator = random_generator(self.seed, step, "pairs", len(self.y))
        for _ in range(self.ROUNDS):
            rows = torch.randint(len(self.y), (self.BATCH,), generator=generator)
            loss = F.mse_loss(self(self.x[rows]), self.y[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict:
        """For resume.pt."""
        return dict(
            net=self.net.state_dict(),
            optimizer=self.optimizer.state_dict(),
            x=self.x,
            y=self.y,
            error=self.error,
        )

    def load(self, state: dict) -> None:
        """Inverse of state()."""
        load_weights(self.net, state["net"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.x = state["x"]
        self.y = state["y"]
        self.error = state["error"]


# -----------------------------------------------------------------------------
# what all stages share


def stage_of(step: int, args) -> str:
    """elastic, routers or joint."""
    if step < args.elastic_steps:
        return "elastic"
    if step < args.elastic_steps + args.router_steps:
        return "routers"
    return "joint"


def batches(shards, step: int, i: int, args, device):
    """The tokens of a step's i-th pass: (x, y, share of the pass) of every micro-batch."""
    rows = args.batch_tokens // args.seq_len
    passes = 1 + max(args.samples, len(args.targets))  # of any stage: a step's tokens are its own
    x, y = shards.batch(step, passes * rows, i * rows, (i + 1) * rows)
    for first in range(0, rows, args.micro_batch):
        part = slice(first, first + args.micro_batch)
        share = len(x[part]) / rows
        yield x[part].to(device), y[part].to(device), share


def noise_of(step: int, target: float, part: int, args) -> Noise:
    """The noise of a step's micro-batch `part` at a target.

    From the routers' first step to the last one tau falls geometrically 1 -> tau_end, and kappa rises
    linearly 1 -> kappa_end."""
    steps = args.router_steps + args.joint_steps
    t = (step - args.elastic_steps) / max(1, steps - 1)
    kappa = 1 + (args.kappa_end - 1) * t
    return Noise(args.tau_end ** t, kappa, (args.seed, step, target, part))


# -----------------------------------------------------------------------------
# one step of each stage


def train_step(flextron: Flextron, surrogate: Surrogate, shards, step: int, args, device) -> dict:
    """A step of the stage that `step` is in.

    Returns what to log: `loss` of its passes, `cost` of its targets if routers ran, and `updated`: are
    the routers to move?"""
    stage = stage_of(step, args)
    flextron.model.requires_grad_(stage != "routers")
    if stage == "elastic":
        return elastic_step(flextron, shards, step, args, device)
    if stage == "routers" and args.teach == "surrogate":
        return surrogate_step(flextron, surrogate, shards, step, args, device)
    return gates_step(flextron, shards, step, args, device, joint=stage == "joint")


def random_subnet(flextron: Flextron, *seed) -> SubNet:
    """Sizes drawn layer by layer: a function of `seed`."""
    config = flextron.model.config
    generator = random_generator(*seed)
    drawn = {}
    for axis in ELASTIC:
        sizes = flextron.sizes[axis]
        choice = torch.randint(len(sizes), (config.n_layers,), generator=generator)
        drawn[axis] = [sizes[k] for k in choice.tolist()]
    return SubNet(config.dim, range(config.n_layers), **drawn)


def elastic_step(flextron: Flextron, shards, step: int, args, device) -> dict:
    """The full model and random SubNets, really sliced, each on its own tokens: Eq. 5, as a mean."""
    passes = 1 + args.samples
    losses = [0.0] * passes
    for i in range(passes):
        if i == 0:
            subnet = flextron.model.full
        else:
            subnet = random_subnet(flextron, args.seed, step, i)
        for x, y, share in batches(shards, step, i, args, device):
            with autocast(device):
                loss = flextron.model(x, y, subnet=subnet)[1]
            (loss * share / passes).backward()
            losses[i] += loss.item() * share
    return dict(loss=losses, updated=False)


def gates_step(flextron: Flextron, shards, step: int, args, device, joint: bool) -> dict:
    """Every target through gates on the full width. Joint: the full model too, since it learns.

    The loss of a target is cross-entropy + penalty * |E[cost] / target - 1| (the paper's latency loss)."""
    targets = [*args.targets, 1.0] if joint else args.targets
    losses = dict.fromkeys(targets, 0.0)
    costs = dict.fromkeys(args.targets, 0.0)
    for i, target in enumerate(targets):
        for part, (x, y, share) in enumerate(batches(shards, step, i, args, device)):
            with autocast(device):
                if target == 1:
                    loss = flextron.model(x, y)[1]
                    off_target = 0.0
                else:
                    noise = noise_of(step, target, part, args)
                    _, loss, picks = flextron(x, y, target, noise, masked=True)
                    mean = flextron.mean_cost(picks)
                    off_target = (mean / target - 1).abs()
                    costs[target] += mean.item() * share
            total = loss + args.penalty * off_target
            (total * share / len(targets)).backward()
            losses[target] += loss.item() * share
    return dict(loss=list(losses.values()), cost=list(costs.values()), updated=True)


def surrogate_step(flextron: Flextron, surrogate: Surrogate, shards, step: int, args, device) -> dict:
    """Runs what the routers draw, shows S the pairs, and sends S's gradient to the routers if S is good.

    A pair costs a forward of what was chosen, a forward of the full model, and no backward."""
    losses = dict.fromkeys(args.targets, 0.0)
    costs = dict.fromkeys(args.targets, 0.0)
    off_target = 0.0
    pairs = []  # of every micro-batch: soft choices, excess losses, share
    for i, target in enumerate(args.targets):
        for part, (x, y, share) in enumerate(batches(shards, step, i, args, device)):
            # the forward of what was chosen, and the full model's; no weight wants a gradient
            noise = noise_of(step, target, part, args)
            with autocast(device):
                states, picks = flextron.states(x, target, noise)
                output = flextron.model.output.weight
                full = flextron.model.states(x)
                # B, T
                excess = losses_in_chunks(states.detach(), output, y) - losses_in_chunks(full, output, y)
            # rows for S: of tokens, or of whole sequences
            soft = torch.cat([pick.soft for pick in picks], dim=-1)                # B, T or 1, 2L * K
            rows = excess
            if not flextron.dynamic:
                rows = excess.mean(1, keepdim=True)                                # B, 1
            pairs.append((soft.flatten(0, 1).cpu(), rows.flatten().cpu(), share))
            # the distance of the routers' cost from the target
            mean = flextron.mean_cost(picks)
            off_target = off_target + (mean / target - 1).abs() * share
            losses[target] += excess.mean().item() * share
            costs[target] += mean.item() * share

    # S is judged by the new pairs, and learns from them
    for soft, rows, _ in pairs:
        surrogate.observe(soft.detach(), rows, step)
    trusted = surrogate.error < args.threshold

    # the routers descend what S predicts, and the distance from the targets
    if trusted:
        predicted = 0.0
        for soft, _, share in pairs:
            predicted = predicted + surrogate(soft).mean() * share
        total = predicted + args.penalty * off_target.cpu()
        (total / len(args.targets)).backward()
    return dict(
        loss=list(losses.values()),
        cost=list(costs.values()),
        error=surrogate.error,
        updated=trusted,
    )
