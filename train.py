"""
Trains one Llama so that a slice of it is a good Llama at every budget, and the router that picks
the slice.

LLaMaFlex (ICLR 2025) Sec. 3: every step runs every budget, each on its own tokens. The loss of a
step is the mean over budgets. (Eq. 8 has the sum. AdamW does not care about the factor, --clip
does.)

    python train.py                           the demo: text of this machine, two CPU cores, minutes
    torchrun --nproc_per_node=2 train.py      the same on two processes
    torchrun --nproc_per_node=8 train.py --llama Llama-3.1-8B --data data/mytext --out out/flex-8b \
        --shard fsdp --activation-checkpointing

The demo first trains a small dense Llama into out/base, with the same loop: a dense run is an
elastic run whose only budget is 1. Then the units are ranked and sorted (importance.py), the family
is trained, and a table of budgets is printed. What is not the method (flags, log, checkpoints,
signals) is in plumbing/.

The settings of the method (all flags: plumbing/settings.py), for the demo and, in brackets, for
models over 100M parameters: the paper's where it states them.

    budgets    1 .8 .6 .4             in every step
    steps      900 (28,800)           of 512 (524,288) tokens per budget
    lr         2e-3 (4e-5)            the Llama's
    router_lr  6.6e-4 (8.2e-5)        falls with the 0.6th power of the steps; the paper has 4e-2
    mod. lr    1e-3 (1e-3)            the modulation's
    tau        1 -> .056              how soft the router's choice is, with --teach soft
    kappa      1 -> 10                its logits against the noise
    kd         0; with --llama .5     share of the loss under b = 1 in which the base is the teacher
    teach      1                      share of passes that teach the router, from .12 to .45 of the
                                      steps
"""
import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

from data.prepare import open_data
from importance import rank, sort_
from model import Llama, LlamaConfig, SubNet
from plumbing.checkpoint import RESUME
from plumbing.duration import say_duration
from plumbing.errors import run_main
from plumbing.family import FLEX, restore_router, router_state
from plumbing.locks import one_writer
from plumbing.memory import plan_table
from plumbing.parallel import (
    RANK,
    WORLD,
    autocast,
    autocast_is,
    default_device,
    finish,
    mean_over_ranks,
    rank0_first,
    same_on_all_ranks,
    say,
    setup,
)
from plumbing.params import read_config
from plumbing.progress import log_step, show_family, validate
from plumbing.rows import whole
from plumbing.run import Run, first_tokenizer, write_checkpoint
from plumbing.settings import (
    OVERRIDES,
    args_of_base,
    base_folder,
    parse_args,
    settings_of,
    settings_of_base,
    space_of,
)
from plumbing.sharding import (
    adamw,
    compile_blocks,
    gathered,
    gradients_meet,
    load_model_state,
    load_on_ranks,
    load_optimizer_state,
    model_state,
    optimizer_state,
    shard,
    whole_weights,
)
from plumbing.state import of_a_run, resume_state
from plumbing.tensors import fingerprint
from router import Choice, Router, lesson
from space import n_params, random_generator

# -----------------------------------------------------------------------------
# schedules: how noise and rates change over a run


def lr_factor(step: int, steps: int, warmup: float, start: float = 0.0) -> float:
    """The learning rate at a step, as a share of its peak: nothing before `start`, a linear
    warm-up, then a cosine to a tenth. start and warmup are shares of the steps."""
    begin = round(start * steps)
    up = max(1, round(warmup * steps))
    if step < begin + up:
        return max(0, step + 1 - begin) / up
    done = step - begin - up
    left = max(1, steps - begin - up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done / left))


def schedule(step: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """(tau, kappa, share of passes that teach the router) at a step.

    tau     1 -> tau_end, geometrically: the choice gets harder
    kappa   1 -> kappa_end, linearly: the logits outgrow the noise
    teach   0 until router_start, then teach_prob until teach_end. Soft passes are dear, and get
            fewer on the way, down to 0. Pairs end by themselves, when both draws are one slice

    Before router_start the router does not learn: what is best before training is not what is best
    after. After teach_end the loss does not reach it any more: it has decided, and the Llama trains
    on its choices. (A penalty, if there is one, still reaches it.)"""
    t = step / max(1, args.steps - 1)  # 0 at the first step, 1 at the last
    tau = args.tau_end ** t
    kappa = 1 + (args.kappa_end - 1) * t
    teach_share = 0.0
    if args.router_start <= t < args.teach_end:
        teach_share = args.teach_prob
        if args.teach == "soft":
            teach_share *= (args.teach_end - t) / (args.teach_end - args.router_start)
    return tau, kappa, teach_share


# -----------------------------------------------------------------------------
# optimizers: the Llama, the router and the modulation each have a rate, and are clipped apart


def parts(model: Llama, router: Router | None) -> dict[str, list[nn.Parameter]]:
    """The parameters that train, in three parts. A dense run has no router."""
    found = dict(llama=[], router=[], modulation=[])
    found["llama"] = [p for p in model.parameters() if p.requires_grad]
    if router is not None:
        for name, p in router.named_parameters():
            part = "modulation" if name.startswith("modulation") else "router"
            found[part].append(p)
    return found


def make_optimizers(model: Llama, router: Router | None, args: argparse.Namespace) -> list:
    """One AdamW for the Llama, whose moments may be sharded, and one for router and modulation.

    Only the Llama's matrices are decayed. `peak` is a group's rate after its warm-up, which begins
    at `start`."""
    part = parts(model, router)
    matrices = [p for p in part["llama"] if p.dim() == 2]
    norms = [p for p in part["llama"] if p.dim() != 2]
    llama = [
        dict(params=matrices, peak=args.lr, start=0.0, weight_decay=args.weight_decay),
        dict(params=norms, peak=args.lr, start=0.0, weight_decay=0.0),
    ]
    small = [
        dict(params=part["router"], peak=args.router_lr, start=args.router_start, weight_decay=0.0),
        dict(params=part["modulation"], peak=args.modulation_lr, start=0.0, weight_decay=0.0),
    ]
    optimizers = []
    for groups, sharding in ((llama, args.shard), (small, "ddp")):
        groups = [group for group in groups if group["params"]]
        if groups:
            optimizers.append(adamw(groups, sharding, lr=args.lr, betas=(0.9, 0.95), fused=True))
    return optimizers


def set_rates(optimizers: list, step: int, args: argparse.Namespace) -> float:
    """Gives every group its learning rate of this step; returns the first one, for the log."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group["peak"] * lr_factor(step, args.steps, args.warmup, group["start"])
    return groups[0]["lr"]


def clip_gradients(model: Llama, router: Router | None, clip: float) -> dict[str, float]:
    """Clips the gradient of each part to norm `clip`; returns the norms before."""
    norms = {}
    for name, parameters in parts(model, router).items():
        if parameters:
            norms[name] = whole(nn.utils.clip_grad_norm_(parameters, clip)).item()
    return norms


# -----------------------------------------------------------------------------
# one step


class Handover:
    """What the router gives to the model in one step, and the way back for its gradients.

    The router stays outside DDP. So the model never sees the router's graph: it gets leaves, copies
    of the router's signals that have no history and collect a gradient. The signals are short
    vectors, modulation factors and, in a soft pass, marginals. After the last pass every leaf holds
    the gradient of the step's loss. backward() averages these gradients over the ranks and sends them
    through the router, once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.signals = []  # on the router's graph
        self.leaves = []   # on the model's

    def give(self, signal: torch.Tensor) -> torch.Tensor:
        """The signal's leaf, on the model's device."""
        leaf = signal.detach().to(self.device).requires_grad_()
        self.signals.append(signal)
        self.leaves.append(leaf)
        return leaf

    def backward(self, penalties: list[torch.Tensor]) -> None:
        """Adds to the router's .grad what the leaves collected, and the gradient of the penalties and
        lessons (scalars)."""
        ends = list(penalties)
        gradients = [None] * len(penalties)  # None: the gradient of a scalar by itself, 1
        if self.leaves:
            flat = torch.cat([leaf.grad.flatten() for leaf in self.leaves])
            flat = mean_over_ranks(flat).cpu()
            pieces = flat.split([signal.numel() for signal in self.signals])
            ends += self.signals
            gradients += [piece.view_as(signal) for piece, signal in zip(pieces, self.signals)]
        if ends:
            torch.autograd.backward(ends, gradients)


def uniform_draw(*parts) -> float:
    """A number in [0, 1), a function of its arguments (seed, step ...) alone: the same on all
    ranks."""
    return torch.rand((), generator=random_generator(*parts)).item()


def budgets_of_step(step: int, args: argparse.Namespace) -> list[float]:
    """The budgets of a step, in the order of its passes: extra ones at random, then the trained
    ones, b = 1 last. b = 1 reaches every weight, so gradients can synchronise in its backward."""
    smallest = min(args.budgets)
    extra = []
    for k in range(args.extra_budgets):
        extra.append(smallest + (1 - smallest) * uniform_draw(args.seed, step, "extra", k))
    return extra + sorted(args.budgets)


def pass_loss(wrapped, tokens, targets, teacher, kd: float, **slice_kwargs):
    """(loss, cross-entropy) of one micro-batch; with a teacher the loss is (1 - kd) CE + kd
    KL(teacher || slice)."""
    with autocast(tokens.device):
        if teacher is None:
            ce = wrapped(tokens, targets, **slice_kwargs)[1]
            return ce, ce
        with torch.no_grad():
            reference = (teacher.states(tokens), teacher.output.weight)
        ce, kl = wrapped(tokens, targets, reference=reference, **slice_kwargs)[1]
    return (1 - kd) * ce + kd * kl, ce


def run_pass(wrapped, x, y, args, device, n_budgets: int, meet: bool, marginals=None, space=None,
             teacher=None, **slice_kwargs) -> torch.Tensor:
    """Forward and backward of one budget's tokens x, targets y, each (local, T). Returns the mean
    cross-entropy, ().

    The gradient is that of the mean over the step's n_budgets budgets. meet: gradients meet those
    of the other ranks at the end. marginals: of a soft pass, with the space that makes gates of
    them."""
    local = len(x)
    micro = min(local, args.micro_batch)  # sequences per forward
    mean_loss = torch.zeros((), device=device)
    for m in range(0, local, micro):
        tokens = x[m:m + micro].to(device)
        targets = y[m:m + micro].to(device)
        # Gates are made anew: a backward frees the graph from them to the marginals.
        gates = None if marginals is None else space.gates(marginals)
        last = m + micro >= local
        with gradients_meet(wrapped, meet and last):
            loss, ce = pass_loss(wrapped, tokens, targets, teacher, args.kd, gates=gates,
                                 **slice_kwargs)
            if loss.requires_grad:  # with frozen weights the full network has nothing to learn
                (loss * len(tokens) / local / n_budgets).backward()
        mean_loss += ce.detach() * len(tokens) / local
    return mean_loss


@torch.no_grad()
def loss_of_other(model, router, other: SubNet, x, y, args, device) -> torch.Tensor:
    """The mean cross-entropy of the second slice of a pair on a pass' tokens x, targets y, each
    (local, T): ()."""
    factors = None
    if args.modulation != "none":
        factors = router.modulation(other).to(device)
    mean_loss = torch.zeros((), device=device)
    for tokens, targets in zip(x.split(args.micro_batch), y.split(args.micro_batch)):
        with autocast(device):
            loss = model(tokens.to(device), targets.to(device), subnet=other, factors=factors)[1]
        mean_loss += loss * len(tokens) / len(x)
    return mean_loss


def teach_router(handover: Handover, passes: list[dict], pairs: list, penalties: list) -> None:
    """The end of a step: losses become means over the ranks, and the router gets the gradients of
    soft passes (handover), of pairs, and of penalties.

    passes: a row each, see train_step. pairs: (number of the pass, Choice, loss of its other
    slice)."""
    losses = [p["loss"] for p in passes] + [other_loss for _, _, other_loss in pairs]
    losses = mean_over_ranks(torch.stack(losses)).tolist()
    for p, loss in zip(passes, losses):
        p["loss"] = loss
    for (i, choice, _), other_loss in zip(pairs, losses[len(passes):]):
        passes[i]["other"] = choice.other
        penalties.append(lesson(choice, passes[i]["loss"], other_loss) / len(passes))
    handover.backward(penalties)


def how_it_teaches(choice: Choice, budget: float, step: int, share: float, args) -> tuple[bool, bool]:
    """Is a pass one that teaches the router: (softly, as a pair)? The same on all ranks.

    share: of the passes that do."""
    if choice.marginals is None or uniform_draw(args.seed, step, "teach", budget) >= share:
        return False, False
    if args.teach == "soft":
        return True, False
    return False, choice.other != choice.subnet


def train_step(wrapped, model, router, shards, step, args, device, teacher=None) -> dict:
    """Forward and backward of all budgets of a step. Leaves gradients in .grad, averaged over the
    ranks.

    wrapped: the model as it is called (DDP's, or the model itself). teacher: a frozen Llama for
    --kd, or None. Returns tau, kappa, and a row per pass: budget, subnet, soft, max_p, loss
    (cross-entropy over all ranks), other (the second slice of a pair that was compared, or None)."""
    tau, kappa, teach_share = schedule(step, args)
    budgets = budgets_of_step(step, args)
    n = len(budgets)
    sequences = args.batch_tokens // args.seq_len  # per budget, over all ranks
    local = sequences // WORLD                     # this rank's share of them
    handover = Handover(device)
    passes = []
    pairs = []

    # 1. The router draws a slice for every budget: the same one on all ranks.
    if router is None:
        choices = [Choice(model.full)] * n
    else:
        choices = [router.sample(budget, step, tau, kappa, args.penalty) for budget in budgets]
    same_on_all_ranks(str([(choice.subnet, choice.other) for choice in choices]), step)
    penalties = [choice.penalty / n for choice in choices if choice.penalty is not None]

    for i, (budget, choice) in enumerate(zip(budgets, choices)):
        # 2. A pass runs the slice, and trains the Llama at the slice's cost. Some passes teach the
        #    router too (router.py: sample), in pairs: another slice reads the same tokens, forward
        #    only. Or soft: the full width runs under gates made of the router's marginals.
        soft, pair = how_it_teaches(choice, budget, step, teach_share, args)
        runs = choice.subnet
        given = {}
        if soft:
            runs = model.full
            given = dict(marginals=handover.give(choice.marginals), space=router.space)

        # 3. The modulation tells every block which slice was drawn, in a soft pass too.
        factors = None
        if choice.subnet != model.full and args.modulation != "none":
            factors = handover.give(router.modulation(choice.subnet))

        # 4. The pass, on the budget's own tokens. The batch of the step has n * sequences rows,
        #    budget after budget; this rank takes `local` of them. Gradients add up over all passes.
        #    Under ddp and zero1 they meet those of the other ranks in the last pass, under fsdp in
        #    every one.
        first = i * sequences + RANK * local
        x, y = shards.batch(step, n * sequences, first, first + local)
        loss = run_pass(wrapped, x, y, args, device, n, meet=i == n - 1, subnet=runs,
                        factors=factors, teacher=teacher if budget < 1 else None, **given)
        passes.append(dict(budget=budget, subnet=choice.subnet, soft=soft, max_p=choice.max_p,
                           loss=loss, other=None))

        # 5. In a pair the other slice reads the same tokens.
        if pair:
            other_loss = loss_of_other(model, router, choice.other, x, y, args, device)
            pairs.append((i, choice, other_loss))

    # 6. The router gets its gradients back.
    teach_router(handover, passes, pairs, penalties)
    return dict(passes=passes, tau=tau, kappa=kappa)


# -----------------------------------------------------------------------------
# the loop


def go_on(optimizers: list, state: dict, args) -> int:
    """Gives the optimizers what resume.pt holds of them. Returns the step that comes next."""
    with of_a_run(Path(args.out) / RESUME):
        for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer_state(optimizer, moments)
    start = state["step"]
    if start > 0:
        set_rates(optimizers, start - 1, args)  # as they were saved: those of the last step
    return start


def train(model, router, data, orders, settings: dict, args, device, tokenizer, state=None,
          teacher=None) -> None:
    """Trains model (and router) for args.steps steps into args.out.

    data: (train Shards, validation windows). orders: what sorted the model, kept for a resumed run.
    tokenizer: the path of one to put beside the weights, or None. state: what resume.pt held, or
    None.
    """
    shards, val = data
    model.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        compile_blocks(model)
        compile_blocks(teacher)
    wrapped = shard(model, args.shard, device)
    optimizers = make_optimizers(model, router, args)
    start = 0 if state is None else go_on(optimizers, state, args)

    def save(step: int) -> None:
        """Every rank writes its part of the state, the first one all the rest."""
        moments = [optimizer_state(optimizer) for optimizer in optimizers]
        flex = None
        if router is not None:
            flex = router_state(router, seq_len=args.seq_len, data=settings["data"],
                                eval_windows=args.eval_windows)
        resume = dict(model=model_state(model), flex=flex, optimizers=moments, step=step,
                      orders=orders, settings=settings)
        write_checkpoint(args.out, resume, whole_weights(model), model.config, tokenizer, FLEX, flex)

    slower = f"--override {'--base-lr' if router is None else '--lr'} {args.lr / 2:g}"
    tokens = args.batch_tokens * (len(args.budgets) + args.extra_budgets)
    with Run(args.out, args.steps, device, settings, start=start,
             save_every=args.save_every, log_every=args.log_every,
             max_bad_steps=args.max_bad_steps, slower=slower, tokens=tokens) as run, gathered(teacher):
        for step in range(start, args.steps + 1):
            run.checkpoint(step, save)
            if router is not None and run.due(step, args.eval_every):
                validate(run, step, model, router, val, args)
            if step == args.steps:
                break

            # one training step: rates, gradients, clip, step
            run.start_clock()
            lr = set_rates(optimizers, step, args)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            result = train_step(wrapped, model, router, shards, step, args, device, teacher)
            norms = clip_gradients(model, router, args.clip)
            losses = [p["loss"] for p in result["passes"]]
            if run.finite(step, losses, list(norms.values())):
                for optimizer in optimizers:
                    optimizer.step()
            log_step(run, step, model.config, result, norms, lr)


# -----------------------------------------------------------------------------
# the stages: base, family, table


def train_base(args, config: LlamaConfig, data, settings: dict, state, device, tokenizer) -> None:
    """The demo's starting point: a small dense Llama, trained once into args.out."""
    model = Llama(config).init_weights(args.seed)
    if state is not None:
        with of_a_run(Path(args.out) / RESUME):
            load_model_state(model, state["model"])
    if state is not None and state["step"] == args.steps:  # only its files are written again
        say(f"base: {args.out} is there, {args.steps} steps; not trained again")
    else:
        n = n_params(config, model.full)
        say(f"base: a dense Llama of {n:,} non-embedding parameters into {args.out}")
    train(model.to(device), None, data, None, settings, args, device, tokenizer, state)


def train_family(args, base: str, router: Router, data, settings: dict, state, device, tokenizer) -> dict:
    """Ranks, sorts and trains the Llama in `base` into args.out. Returns the orders that sorted it."""
    model = load_on_ranks(base, args.shard, device)
    model.requires_grad_(not args.freeze_backbone)
    model.config = replace(model.config, context=max(model.config.context, args.seq_len))
    if state is None:
        # Rank the units on training windows, sort them, and tell the router in which order layers
        # are kept.
        if args.resume:
            say(f"{Path(args.out) / RESUME} does not exist: starting at step 0")
        windows = data[0].windows(args.calibration_windows)[0].to(device)
        say(f"ranking {model.config.dim} channels, heads, neurons and layers on {len(windows)} "
            "windows")
        with autocast(device), gathered(model):
            orders = rank(model, windows, args.depth_by, args.units_by, args.seed)
        orders = rank0_first(lambda: orders)  # the same to the bit
        sort_(model, orders)
        router.space.order_layers(orders["layers"])
    else:
        # The weights in resume.pt are sorted already.
        say(f"{args.out} is there at step {state['step']} of {args.steps}: going on from it")
        with of_a_run(Path(args.out) / RESUME):
            load_model_state(model, state["model"])
            router = restore_router(model.config, state["flex"])
            orders = state["orders"]
    teacher = None
    if args.kd > 0 and len(args.budgets) > 1:
        teacher = load_on_ranks(base, args.shard, device).requires_grad_(False)  # the frozen base
    space = router.space
    asked = " ".join(f"{b:g}" for b in args.budgets)
    say(f"elastic: budgets {asked}, {len(space.members)} slices of cost "
        f"{space.costs.min():.3f} to 1, router lr {args.router_lr:.1e}")
    train(model, router, data, orders, settings, args, device, tokenizer, state, teacher)
    return orders


def dry_run(args) -> None:
    """What a run will take: memory on every rank and, if this machine is what it will run on, time."""
    config = LlamaConfig() if args.llama is None else read_config(args.llama)
    space_of(args, config)  # a run that would be refused has no plan
    print(plan_table(args))
    if args.ranks == WORLD and args.device == default_device():
        say_duration(config, args, torch.device(args.device))


def run_stages(args, base: str, device) -> None:
    """data -> base -> rank, sort -> train -> table."""
    folder, shards, val = open_data(args)
    data = (shards, val.windows(args.eval_windows))
    identity = dict(data=folder, fingerprint=shards.fingerprint(), val_fingerprint=val.fingerprint())
    if args.llama:
        identity["llama_fingerprint"] = fingerprint(args.llama)
    override = OVERRIDES if args.override else ()

    # A run that cannot go on is refused here, before the demo's base is trained.
    settings = settings_of(args, identity)
    state = resume_state(args.out, settings, args.steps, args.resume, override, may_override=OVERRIDES)
    if args.llama is None:
        config = LlamaConfig(vocab_size=shards.vocab_size, context=args.seq_len)
    else:
        config = read_config(args.llama)
    space = space_of(args, config)
    say_duration(config, args, device, 0 if state is None else state["step"])

    if args.llama is None:
        mend = f"give --out in another parent folder, start from it as it is with --llama {base}"
        base_settings = settings_of_base(args, identity)
        base_state = resume_state(base, base_settings, args.base_steps, args.resume, override, mend,
                                  OVERRIDES)
        train_base(args_of_base(args, base), config, data, base_settings, base_state, device,
                   first_tokenizer(folder))
    router = Router(space, args.router, args.seed, args.budgets)
    orders = train_family(args, base, router, data, settings, state, device, first_tokenizer(base, folder))
    del state, router  # the table has room for what training held
    show_family(args, base, orders, data[1], device)


def main(argv=None) -> None:
    """The command line."""
    args = parse_args(argv, __doc__)
    if args.dry_run:
        with autocast_is(args.autocast):
            dry_run(args)
        return
    device = setup(args.device)
    say("settings: " + " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
    base = base_folder(args)
    with autocast_is(args.autocast), one_writer(args.out, *([] if args.llama else [base])):
        run_stages(args, base, device)
    finish()


if __name__ == "__main__":
    run_main(main, "every checkpoint is whole: go on with --resume")
