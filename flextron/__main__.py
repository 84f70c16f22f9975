"""
Flextron (ICML 2024): one Llama whose MLPs and heads are elastic, with a router in front of each of them.

    python -m flextron                                        from out/base into out/flextron, static routers
    python -m flextron --router dynamic --out out/dynamic     every token takes its own width
    python -m flextron --cost latency                         targets are fractions of the measured time
    python -m flextron --llama out/flex --elastic-steps 0     routers for a family that train.py made elastic
    python eval.py --model out/dynamic --text notes.txt       what each token took

Training has three stages, each on text of its own:

    elastic   the full model and a few SubNets, each layer's sizes drawn at random. The loss is their
              mean (Eq. 5 has the sum)
    routers   the Llama is frozen, the routers learn
    joint     the full model and every target, drawn by the routers. Llama and routers learn together

A target t is a bound on the mean cost. The loss has lambda * |E[cost] / t - 1| (the latency loss), with
E over what a router draws from. In use the cost is held to the target by a price (network.py).

Two teachers for the routers of the second stage (--teach):

    gates      the gradient of the loss itself, through straight-through gates on the full width.
               This is LLaMaFlex's way. It costs more a step and was better in our runs (README.md),
               so it is the default
    surrogate  the paper's way. A small network S learns from pairs how the loss follows from what the
               routers put out. Routers descend S + the latency loss, only while S's error on new
               pairs is under --threshold

Unknown in the paper, and chosen here: threshold, number of sizes, noise, learning rates.
"""
import argparse
import os
from pathlib import Path

import torch
import torch.nn as nn

from data.prepare import open_data
from eval import evaluate
from flextron.deployed import Deployed, flextron_state, restore_flextron
from flextron.network import Flextron, costs_of, parameter_cost, sizes_for, timed_sizes
from flextron.routers import ELASTIC
from flextron.stages import Surrogate, stage_of, train_step
from importance import rank, sort_
from model import Llama, SubNet
from plumbing.checkpoint import RESUME, load_llama
from plumbing.errors import SEEDS, Parser, check_at_least_one, check_range, fail, run_main
from plumbing.family import FLEX, FLEXTRON
from plumbing.files import check_out
from plumbing.latency import load_latency
from plumbing.locks import one_writer
from plumbing.parallel import WORLD, default_device, say, setup
from plumbing.params import read_config
from plumbing.run import Run, first_tokenizer, write_checkpoint
from plumbing.settings import SMALL
from plumbing.sharding import load_optimizer_state
from plumbing.state import of_a_run, resume_state
from plumbing.tensors import fingerprint as of_weights
from plumbing.tensors import load_weights
from space import n_params
from train import lr_factor

# A resumed run may differ in these always, and in those of OVERRIDES with --override.
MAY_DIFFER = {"resume", "override", "out", "log_every", "save_every", "max_bad_steps", "device"}
OVERRIDES = {"lr", "router_lr", "clip"}

# -----------------------------------------------------------------------------
# optimizers


def total_steps(args: argparse.Namespace) -> int:
    """Of all three stages."""
    return args.elastic_steps + args.router_steps + args.joint_steps


def make_optimizers(flextron: Flextron, args: argparse.Namespace) -> tuple:
    """AdamW for the Llama, whose matrices are decayed, and AdamW for the routers."""
    matrices = [p for p in flextron.model.parameters() if p.dim() == 2]
    norms = [p for p in flextron.model.parameters() if p.dim() != 2]
    llama = [
        dict(params=matrices, weight_decay=args.weight_decay),
        dict(params=norms, weight_decay=0.0),
    ]
    routers = [dict(params=list(flextron.routers.parameters()), weight_decay=0.0)]
    for_llama = torch.optim.AdamW(llama, lr=args.lr, betas=(0.9, 0.95))
    for_routers = torch.optim.AdamW(routers, lr=args.router_lr, betas=(0.9, 0.95))
    return for_llama, for_routers


def set_rates(for_llama, for_routers, step: int, args: argparse.Namespace) -> None:
    """The learning rates of a step. Those of the routers begin to rise where the elastic stage ends."""
    steps = total_steps(args)
    begin = args.elastic_steps / max(1, steps)
    for group in for_llama.param_groups:
        group["lr"] = args.lr * lr_factor(step, steps, args.warmup)
    for group in for_routers.param_groups:
        group["lr"] = args.router_lr * lr_factor(step, steps, args.warmup, begin)


# -----------------------------------------------------------------------------
# the loop


class Trained:
    """All that training changes: the Llama and its routers, their optimizers, the surrogate.

    start, updates: of a new run 0, of a resumed one what resume.pt held. updates: how many steps
    moved the routers."""

    def __init__(self, flextron: Flextron, args: argparse.Namespace, state: dict | None):
        self.flextron = flextron
        self.for_llama, self.for_routers = make_optimizers(flextron, args)
        sizes = sum(len(flextron.sizes[axis]) for axis in ELASTIC)
        self.surrogate = Surrogate(flextron.model.config.n_layers * sizes, args.seed)
        self.start = 0
        self.updates = 0
        if state is not None:
            with of_a_run(Path(args.out) / RESUME):
                load_optimizer_state(self.for_llama, state["optimizers"][0])
                load_optimizer_state(self.for_routers, state["optimizers"][1])
                self.surrogate.load(state["surrogate"])
                self.updates = state["updates"] + 0
            self.start = state["step"]
            if self.start > 0:  # the rates that were saved, those of the last step
                set_rates(self.for_llama, self.for_routers, self.start - 1, args)

    def save(self, step: int, settings: dict, args: argparse.Namespace) -> None:
        """Writes resume.pt, the Llama and flextron.pt into args.out."""
        model = self.flextron.model
        routers = flextron_state(self.flextron, targets=args.targets, seq_len=args.seq_len,
                                 data=settings["data"], eval_windows=args.eval_windows)
        resume = dict(
            model={name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
            flextron=routers,
            optimizers=[self.for_llama.state_dict(), self.for_routers.state_dict()],
            surrogate=self.surrogate.state(),
            step=step,
            updates=self.updates,
            settings=settings,
        )
        tokenizer = first_tokenizer(args.llama, settings["data"])
        weights = resume["model"].items()
        write_checkpoint(args.out, resume, weights, model.config, tokenizer, FLEXTRON, routers)


def train(flextron: Flextron, shards, val, settings: dict, args, device, state=None) -> None:
    """All stages, into args.out. val: held-out windows (x, y). state: what resume.pt held, or None."""
    steps = total_steps(args)
    model = flextron.model
    trained = Trained(flextron, args, state)
    # Prices are measured on about 2,048 tokens of training text.
    calibration = shards.windows(args.calibration_windows)[0]
    calibration = calibration[:max(1, 2048 // args.seq_len)].to(device)

    def save(step: int) -> None:
        # A price holds for the routers as they are now: measure it again.
        if step == steps:
            flextron.calibrate(calibration, finer(args.targets))
        elif step > args.elastic_steps:
            flextron.calibrate(calibration, args.targets)
        trained.save(step, settings, args)

    slower = f"--override --lr {args.lr / 2:g} --router-lr {args.router_lr / 2:g}"
    with Run(args.out, steps, device, settings, trained.start, args.save_every, args.log_every,
             args.max_bad_steps, slower) as run:
        for step in range(trained.start, steps + 1):
            run.checkpoint(step, save)
            # validation, once there are routers that have learned something
            if step > args.elastic_steps and (step == steps or step % args.save_every == 0):
                validate(run, step, flextron, val, args)
            if step == steps:
                break

            # one training step: rates, gradients, clip, step
            run.start_clock()
            set_rates(trained.for_llama, trained.for_routers, step, args)
            trained.for_llama.zero_grad(set_to_none=True)
            trained.for_routers.zero_grad(set_to_none=True)
            result = train_step(flextron, trained.surrogate, shards, step, args, device)
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip).item()
            router_norm = nn.utils.clip_grad_norm_(flextron.routers.parameters(), args.clip).item()
            # Frozen weights do not move, nor do routers that wait for the surrogate.
            stage = stage_of(step, args)
            if run.finite(step, result["loss"], [norm, router_norm]):
                if stage != "routers":
                    trained.for_llama.step()
                if result["updated"]:
                    trained.for_routers.step()
                    trained.updates += 1
            mean = sum(result["loss"]) / len(result["loss"])
            run.log_step(step, step_line(stage, result, args.targets), mean, stage=stage,
                         norms=[norm, router_norm], router_updates=trained.updates, **result)


def finer(targets: list[float]) -> list[float]:
    """The targets, halfway between neighbours, and halfway to 1: where prices are measured at the end."""
    ends = sorted({*targets, 1.0})
    halfway = [(a + b) / 2 for a, b in zip(ends, ends[1:])]
    return ends[:-1] + halfway


def step_line(stage: str, result: dict, targets: list[float]) -> str:
    """The printed line of a step: losses, and with routers the expected cost at every target."""
    losses = " ".join(f"{loss:.3f}" for loss in result["loss"])
    cells = [f"{stage:7}", f"loss {losses}"]
    if "cost" in result:
        costs = " ".join(f"{t:.2f}->{cost:.3f}" for t, cost in zip(targets, result["cost"]))
        cells.append(f"cost {costs}")
    if "error" in result:
        waiting = "" if result["updated"] else ", routers wait"
        cells.append(f"S's error {result['error']:.3f}{waiting}")
    return " | ".join(cells)


def validate(run: Run, step: int, flextron: Flextron, val, args: argparse.Namespace) -> None:
    """The validation loss and the cost at every target, to the log and the screen."""
    losses = {}
    got = {}
    for target in [*args.targets, 1.0]:
        losses[target], got[target] = loss_at(flextron, val, target)
    run.record(step=step, val=losses, got=got)
    cells = [f"{target:.2f}->{got[target]:.3f} {loss:.3f}" for target, loss in losses.items()]
    run.say(step, "val  | " + "  ".join(cells))


def loss_at(flextron: Flextron, val, target: float) -> tuple[float, float]:
    """(held-out loss in nats, mean cost) of what is deployed at a target."""
    network = Deployed(flextron, target)
    loss = evaluate(network, val)[0]
    return loss, network.got()


# -----------------------------------------------------------------------------
# the flags


def parse_args(argv=None) -> argparse.Namespace:
    """The command line. What can be refused is refused here, before anything is trained."""
    p = Parser("python -m flextron", __doc__)
    add_method(p)
    add_schedule(p)
    add_machine(p)
    args = p.parse_args(argv)
    check(args)
    derive(args)
    return args


def add_method(p: argparse.ArgumentParser) -> None:
    """What is trained, from what, and how it is told what to cost."""
    add = p.add_argument
    add("--llama", default="out/base",
        help="raw Llama folder; one that train.py or flextron sorted stays as it is")
    add("--data", help="folder of shards from data/prepare.py (default: the Python standard library)")
    add("--out", default="out/flextron", help="folder of the Llama and its routers")
    add("--router", choices=["static", "dynamic"], default="static",
        help="sizes per layer, or per layer and token")
    add("--cost", choices=["params", "latency"], default="params",
        help="what a target is a fraction of")
    add("--teach", choices=["gates", "surrogate"], default="gates",
        help="the routers, while the Llama is frozen")
    add("--targets", type=float, nargs="+", default=[0.8, 0.6, 0.4],
        help="fractions of the full model's cost")
    add("--n-heads-choices", type=int, nargs="+", help="numbers of query heads to choose from")
    add("--ffn-dim-choices", type=int, nargs="+", help="numbers of neurons to choose from")
    add("--penalty", type=float, default=1.0, help="lambda of the latency loss")
    add("--threshold", type=float, default=0.05, help="nats: routers follow S while its error is smaller")


def add_schedule(p: argparse.ArgumentParser) -> None:
    """How long, how much a step, and at which rates."""
    add = p.add_argument
    add("--elastic-steps", type=int, default=225, help="of random SubNets")
    add("--router-steps", type=int, default=75, help="with the Llama frozen")
    add("--joint-steps", type=int, default=150, help="of Llama and routers together")
    add("--samples", type=int, default=3, help="random SubNets per elastic step, beside the full model")
    add("--batch-tokens", type=int, default=1024, help="per pass")
    add("--micro-batch", type=int, help="sequences per forward (default: 8192 tokens)")
    add("--seq-len", type=int, default=128, help="tokens per sequence")
    add("--lr", type=float, help="Llama's (default: 1e-3, from 100M parameters on 4e-5)")
    add("--router-lr", type=float, default=1e-2, help="routers' learning rate")
    add("--warmup", type=float, default=0.1, help="of the learning rates, share of the steps")
    add("--weight-decay", type=float, default=0.1, help="on the Llama's matrices")
    add("--clip", type=float, default=1.0, help="gradient norm, for Llama and routers apart")
    add("--tau-end", type=float, default=0.0561, help="temperature at the last step (starts at 1)")
    add("--kappa-end", type=float, default=10.0, help="logit scale at the last step (starts at 1)")
    add("--calibration-windows", type=int, default=64,
        help="training windows that rank units and set prices")
    add("--seed", type=int, default=0, help="of data order, SubNets, routers and noise")


def add_machine(p: argparse.ArgumentParser) -> None:
    """What a run leaves behind, and what it runs on."""
    add = p.add_argument
    add("--eval-windows", type=int, default=128, help="validation windows")
    add("--save-every", type=int, default=150, help="steps between checkpoints")
    add("--log-every", type=int, default=10, help="steps between printed lines")
    add("--device", choices=["cpu", "cuda"], default=default_device())
    add("--resume", action="store_true", help="go on from --out's resume.pt")
    add("--override", action="store_true", help=f"and let these differ: {', '.join(sorted(OVERRIDES))}")
    add("--max-bad-steps", type=int, default=10,
        help="steps in a row whose loss or gradient is not finite (they are skipped) before the run stops")


def check(args: argparse.Namespace) -> None:
    """Ranges, and what does not go together: fail()."""
    if WORLD > 1:
        fail(f"{WORLD} processes found; flextron runs in one: start it with python -m flextron, not torchrun")
    if not all(0 < target < 1 for target in args.targets):
        found = " ".join(str(target) for target in args.targets)
        fail(f"--targets {found} found; expected fractions between 0 and 1 (1 is always trained); "
             "try --targets 0.8 0.6 0.4")
    check_at_least_one(args, "batch_tokens", "micro_batch", "seq_len", "calibration_windows",
                       "eval_windows", "save_every", "log_every", "max_bad_steps")
    check_range(args, 0, "seed", highest=SEEDS)
    check_range(args, 0, "elastic_steps", "router_steps", "joint_steps", "samples",
                "weight_decay", "penalty", "warmup")
    check_range(args, 1e-12, "lr", "router_lr", "clip", "threshold", "tau_end", "kappa_end")
    if args.override and not args.resume:
        fail("--override found without --resume; expected both: it says what may differ when a run goes on")
    if args.batch_tokens % args.seq_len:
        fail(f"--batch-tokens {args.batch_tokens} found; expected whole sequences of "
             f"--seq-len {args.seq_len}")
    check_out(args.out, Llama=args.llama, data=args.data)


def derive(args: argparse.Namespace) -> None:
    """Fills in what was not given, and writes targets and paths in one way: a resumed run compares them."""
    config = read_config(args.llama)
    if args.micro_batch is None:
        args.micro_batch = max(1, 8192 // args.seq_len)
    if args.lr is None:
        small = n_params(config, SubNet.full(config)) < SMALL
        args.lr = 1e-3 if small else 4e-5
    args.targets = sorted(set(args.targets), reverse=True)
    args.llama = os.path.normpath(args.llama)
    if args.data is not None:
        args.data = os.path.normpath(args.data)


def settings_of(args: argparse.Namespace, folder: str, fingerprint: str, val_fingerprint: str) -> dict:
    """What a resumed run must agree on; the folder of the shards and their fingerprints included."""
    kept = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    return kept | dict(data=folder, fingerprint=fingerprint, val_fingerprint=val_fingerprint,
                       llama_fingerprint=of_weights(args.llama))


# -----------------------------------------------------------------------------
# the stages: data, ranking, training, table


def asked_sizes(args: argparse.Namespace) -> dict[str, list[int]]:
    """The sizes to choose from, per axis; fail() if some do not fit the Llama."""
    asked = dict(n_heads=args.n_heads_choices, ffn_dim=args.ffn_dim_choices)
    given = {axis: sizes for axis, sizes in asked.items() if sizes}
    try:
        return sizes_for(read_config(args.llama), given)
    except ValueError as error:
        fail(str(error))


def new_flextron(model: Llama, sizes: dict, shards, args: argparse.Namespace, device) -> Flextron:
    """A Llama made ready: units ranked and sorted, costs known, routers as they start."""
    if not any((Path(args.llama) / name).exists() for name in (FLEX, FLEXTRON)):
        say(f"ranking heads and neurons on {args.calibration_windows} windows")
        windows = shards.windows(args.calibration_windows)[0].to(device)
        sort_(model, rank(model, windows, "influence"))
    dynamic = args.router == "dynamic"
    if args.cost == "latency":
        cost_of = load_latency(args.out, model, timed_sizes(model.config, sizes))
    else:
        cost_of = parameter_cost(model.config, dynamic)
    costs = costs_of(model.config, sizes, cost_of)
    return Flextron(model, sizes, dynamic, costs, args.cost, args.seed).to(device)


def check_targets(flextron: Flextron, args: argparse.Namespace) -> None:
    """fail() if a target is under the cost of the smallest SubNet."""
    least = flextron.least_cost()
    if min(args.targets) < least:
        fail(f"--targets {min(args.targets):g} found; the smallest sizes cost {least:.4f} of the full "
             "model; ask for more, or give smaller ones with --ffn-dim-choices and --n-heads-choices")


def describe(flextron: Flextron, args: argparse.Namespace) -> str:
    """One line: which routers, what they choose from, and what it costs."""
    parameters = sum(p.numel() for p in flextron.routers.parameters())
    heads = " ".join(map(str, flextron.sizes["n_heads"]))
    neurons = " ".join(map(str, flextron.sizes["ffn_dim"]))
    least = flextron.least_cost()
    return (f"{args.router} routers of {parameters:,} parameters choose among heads {heads} and neurons "
            f"{neurons}; cost ({args.cost}) from {least:.3f} to 1")


def show_targets(flextron: Flextron, val, args: argparse.Namespace) -> None:
    """The table at the end, and what to do next."""
    tokens = val[1].numel()
    say(f"\n{'target':>6} {'got':>6} {'loss':>7}   (nats on {tokens:,} held-out tokens)")
    for target in [1.0, *args.targets]:
        loss, got = loss_at(flextron, val, target)
        say(f"{target:6.2f} {got:6.3f} {loss:7.3f}")
    say(f"\nNext:  python eval.py --model {args.out}\n"
        f"       python sample.py --model {args.out} --budget 0.6")


def run_stages(args, device) -> None:
    """data -> rank, sort -> costs -> the three stages -> table."""
    sizes = asked_sizes(args)
    folder, shards, val = open_data(args)
    settings = settings_of(args, folder, shards.fingerprint(), val.fingerprint())
    val = val.windows(args.eval_windows)
    steps = total_steps(args)
    override = OVERRIDES if args.override else ()
    state = resume_state(args.out, settings, steps, args.resume, override)

    # A Llama with routers: as resume.pt has them, or made ready.
    model = load_llama(args.llama, device)
    if state is None:
        if args.resume:
            say(f"{Path(args.out) / RESUME} does not exist: starting at step 0")
        flextron = new_flextron(model, sizes, shards, args, device)
    else:
        say(f"{args.out} is there at step {state['step']} of {steps}: going on from it")
        with of_a_run(Path(args.out) / RESUME):
            load_weights(model, state["model"])
            flextron = restore_flextron(model, state["flextron"])
    check_targets(flextron, args)
    say(describe(flextron, args))

    train(flextron, shards, val, settings, args, device, state)
    show_targets(flextron, val, args)


def main(argv=None) -> None:
    """The command line."""
    args = parse_args(argv)
    device = setup(args.device)
    say("settings: " + " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
    with one_writer(args.out):
        run_stages(args, device)


if __name__ == "__main__":
    run_main(main, "every checkpoint is whole: go on with --resume")
