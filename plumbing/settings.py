"""
train.py's command line: every flag, the defaults of the demo and of the paper, and what is refused
at once.

    python train.py --help
"""
import argparse
import os
from pathlib import Path

from model import LlamaConfig, SubNet
from plumbing.errors import LARGEST, SEEDS, Parser, check_range, fail
from plumbing.files import check_out
from plumbing.parallel import AUTOCASTS, WORLD, default_device, usual_autocast
from plumbing.params import read_config
from plumbing.sharding import SHARDINGS
from space import AXES, Space, n_params

# Llamas under SMALL non-embedding parameters get the demo's settings, others the paper's. --laptop is
# for a real Llama of some 100M parameters on a CPU: 225k tokens, somewhat over an hour of one core.
SMALL = 100e6
DEMO = dict(steps=900, batch_tokens=512, seq_len=128, lr=2e-3, eval_windows=128,
            calibration_windows=64, eval_every=300, save_every=300)
PAPER = dict(steps=28800, batch_tokens=128 * 4096, seq_len=4096, lr=4e-5, eval_windows=64,
             calibration_windows=128, eval_every=1000, save_every=1000)
LAPTOP = dict(budgets=[1.0, 0.9, 0.8, 0.6], steps=110, batch_tokens=512, seq_len=256, lr=2e-4,
              depth_by="influence", eval_windows=32, calibration_windows=32, eval_every=55,
              save_every=10, log_every=5)

MAY_BE_ZERO = {"seed", "extra_budgets", "weight_decay", "teach_prob", "kd", "penalty",
               "warmup", "router_start"}
SHARES = {"warmup", "router_start", "teach_prob", "teach_end", "kd", "tau_end"}  # between 0 and 1

# A resumed run may differ in these always, and in those of OVERRIDES with --override.
MAY_DIFFER = {"resume", "override", "laptop", "out", "shard", "activation_checkpointing", "device",
              "micro_batch", "eval_every", "save_every", "log_every", "max_bad_steps",
              "compile", "dry_run", "ranks"}
OVERRIDES = {"autocast", "steps", "base_steps", "lr", "base_lr", "router_lr", "modulation_lr",
             "clip", "weight_decay"}
OF_BASE = ("autocast", "base_steps", "base_lr", "seed", "batch_tokens", "seq_len",
           "clip", "weight_decay", "warmup")

# -----------------------------------------------------------------------------
# the flags


def parse_args(argv=None, description=__doc__) -> argparse.Namespace:
    """The command line. What has no default is derived, and printed at the start."""
    p = Parser("python train.py", description)
    add_method(p)
    add_schedule(p)
    add_machine(p)
    args = p.parse_args(argv)
    if args.laptop:
        p.set_defaults(**LAPTOP)  # a flag that is given still counts
        args = p.parse_args(argv)
    check_ranges(args)
    derive(args)
    check(args)
    return args


def add_method(p: argparse.ArgumentParser) -> None:
    """What is trained, from what, and which slices."""
    add = p.add_argument
    add("--llama", help="raw Llama folder to start from (default: train the demo's base)")
    add("--data", help="folder of shards from data/prepare.py (default: the Python standard library)")
    add("--out", default="out/flex", help="folder of the supernet; the demo's base goes beside it, in base/")
    add("--budgets", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4], help="trained in every step")
    add("--extra-budgets", type=int, default=0,
        help="more of them per step, drawn between the smallest and 1")
    add("--router", choices=["constrained", "penalty", "uniform", "random"], default="constrained",
        help="how a budget becomes a slice; uniform and random are baselines without a router")
    add("--penalty", type=float, default=1.0, help="lambda of --router penalty")
    for axis in AXES:
        add(f"--{axis.replace('_', '-')}-choices", type=int, nargs="+",
            help=f"sizes of {axis} to choose from")
    add("--depth-by", choices=["logits", "influence"], default="logits", help="how layers are ranked")
    add("--units-by", choices=["activation", "random", "reversed"], default="activation",
        help="how channels, heads and neurons are ranked; random and reversed are yardsticks")
    add("--kd", type=float,
        help="weight of the KL to the frozen base at budgets under 1 (default: 0.5 with --llama; "
             "0 for the demo, whose base is no better than the family)")
    add("--modulation", choices=["none", "scalar"], default="scalar",
        help="policy-aware modulation: none, or a factor per block and sub-block")
    add("--freeze-backbone", action="store_true", help="train router and modulation only")


def add_schedule(p: argparse.ArgumentParser) -> None:
    """How long, how much a step, and at which rates."""
    add = p.add_argument
    add("--laptop", action="store_true",
        help="with --llama: settings for a Llama of some 100M parameters on a CPU, "
             f"somewhat over an hour of one core: {' '.join(f'{k}={v}' for k, v in LAPTOP.items())}")
    add("--steps", type=int, help="elastic steps (demo 900, paper 28800)")
    add("--base-steps", type=int, default=2400, help="steps of the demo's dense stage")
    add("--batch-tokens", type=int, help="global batch in tokens, per budget and step")
    add("--micro-batch", type=int, help="sequences per forward and rank (default: 8192 tokens)")
    add("--seq-len", type=int, help="tokens per sequence (demo 128, paper 4096)")
    add("--lr", type=float, help="Llama's learning rate (demo 2e-3, paper 4e-5)")
    add("--base-lr", type=float, default=3e-3, help="learning rate of the demo's dense stage")
    add("--router-lr", type=float,
        help="default: 1e-3 * (450 / steps)^0.6, see router_rate; the paper's is 4e-2")
    add("--modulation-lr", type=float, default=1e-3)
    add("--warmup", type=float, default=0.1, help="of the learning rates, share of the steps")
    add("--router-start", type=float, default=0.12,
        help="share of the steps before the router learns: until then slices are drawn from all that fit")
    add("--weight-decay", type=float, default=0.1, help="on the Llama's matrices")
    add("--clip", type=float, default=1.0, help="gradient norm, for Llama, router and modulation apart")
    add("--teach", choices=["pairs", "soft"], help="how the loss teaches the router: pairs, two slices read "
        "the same tokens; soft, the full width under gates of a Gumbel-softmax, as in the paper (default: "
        "pairs, with --router penalty soft)")
    add("--teach-prob", type=float, default=1.0,
        help="share of passes that teach the router (of soft ones: when it starts)")
    add("--teach-end", type=float, help="share of the steps at which the last of them run (default: 0.45; "
        "--router penalty 1, because its penalty pulls at the router to the end)")
    add("--tau-end", type=float, default=0.0561, help="temperature at the last step (starts at 1)")
    add("--kappa-end", type=float, default=10.0, help="logit scale at the last step (starts at 1)")
    add("--calibration-windows", type=int, help="training windows that rank the units")
    add("--seed", type=int, default=0, help="of weights, data order and noise")


def add_machine(p: argparse.ArgumentParser) -> None:
    """What a run leaves behind, and what it runs on."""
    add = p.add_argument
    add("--eval-windows", type=int, help="validation windows")
    add("--eval-every", type=int, help="steps between evaluations of the trained budgets")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--log-every", type=int, default=10, help="steps between printed lines")
    add("--device", choices=["cpu", "cuda"], default=default_device())
    add("--autocast", choices=AUTOCASTS,
        help="what the matrix products of every forward run in (default: bfloat16 on CUDA; "
             "float32 on the CPU, where bfloat16 is faster only with avx512_bf16 or amx)")
    add("--shard", choices=SHARDINGS, default="ddp",
        help="what torchrun's processes share (plumbing/sharding.py)")
    add("--activation-checkpointing", action="store_true",
        help="recompute blocks in backward: less memory, more time")
    add("--compile", action="store_true", help="torch.compile every block; CPUs need a C++ compiler")
    add("--dry-run", action="store_true",
        help="print what the run will take on every GPU, from params.json, and stop")
    add("--ranks", type=int, default=WORLD, help="of --dry-run: how many processes torchrun will start")
    add("--resume", action="store_true", help="go on from --out's resume.pt")
    add("--override", action="store_true", help=f"and let these differ: {', '.join(sorted(OVERRIDES))}")
    add("--max-bad-steps", type=int, default=10,
        help="steps in a row whose loss or gradient is not finite (they are skipped) before the run stops")


# -----------------------------------------------------------------------------
# what follows from them, and what is refused


def router_rate(steps: int) -> float:
    """The router's learning rate in a run of so many steps.

    Adam moves a logit by about its rate in every step, whether the gradient is a signal or noise.
    Noise is a random walk: it goes as far as the root of the number of steps. A signal goes straight,
    as far as their number. A rate that falls with the 0.6th power of the steps keeps the walk in
    bounds, while the signal's reach grows: from 450 to 28,800 steps noise alone decides no choice in
    the first half of the steps in which the router learns, and a signal of its size has decided at
    their end (tests/test_router_rate.py). The paper's 4e-2 at 28,800 steps is certain of some choice
    within 6 % of those steps, by noise."""
    return 1e-3 * (450 / max(1, steps)) ** 0.6


def derive(args: argparse.Namespace) -> None:
    """Fills in what was not given, and writes budgets and paths in one way only: a resumed run compares
    them."""
    config = LlamaConfig() if args.llama is None else read_config(args.llama)
    small = n_params(config, SubNet.full(config)) < SMALL
    derived = dict(DEMO if small else PAPER)
    steps = args.steps if args.steps is not None else derived["steps"]
    seq_len = args.seq_len if args.seq_len is not None else derived["seq_len"]
    derived["micro_batch"] = max(1, 8192 // max(1, seq_len))
    derived["router_lr"] = router_rate(steps)
    derived["kd"] = 0.0 if args.llama is None else 0.5
    derived["autocast"] = usual_autocast(args.device)
    derived["teach"] = "soft" if args.router == "penalty" else "pairs"
    derived["teach_end"] = 1.0 if args.router == "penalty" else 0.45
    for name, value in derived.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.budgets = sorted(set(args.budgets), reverse=True)
    if args.data is not None:
        args.data = os.path.normpath(args.data)
    if args.llama is not None:
        args.llama = os.path.normpath(args.llama)


def check(args: argparse.Namespace) -> None:
    """What can be refused is refused here, before anything is trained: fail()."""
    if args.laptop and args.llama is None:
        fail("--laptop found, without --llama; expected a Llama to start from: python train.py --laptop "
             "--llama out/llama --data data/mytext (the demo, python train.py, is small as it is)")
    if args.override and not args.resume:
        fail("--override found without --resume; expected both: it says what may differ when a run goes on")
    if args.ranks != WORLD and not args.dry_run:
        fail(f"--ranks {args.ranks} found without --dry-run, which it belongs to; a run takes its processes "
             f"from torchrun: torchrun --nproc_per_node={args.ranks} train.py ...")
    several = len(args.budgets) > 1
    if several and args.teach_prob > 0 and args.teach_end <= args.router_start:
        fail(f"--teach-end {args.teach_end:g} found, --router-start is {args.router_start:g}; expected a "
             "larger one: the router learns between the two")
    if any(not 0 < b <= 1 for b in args.budgets) or 1.0 not in args.budgets:
        fail(f"--budgets {' '.join(map(str, args.budgets))} found; expected fractions in (0, 1] and 1.0, the "
             "full model, among them; try --budgets 1.0 0.8 0.6 0.4")
    if args.extra_budgets and not several:
        fail(f"--extra-budgets {args.extra_budgets} found, --budgets is 1; expected a smaller one too: extra "
             "budgets are drawn between the smallest and 1; try --budgets 1.0 0.5")
    if args.batch_tokens % (args.seq_len * WORLD):
        fail(f"--batch-tokens {args.batch_tokens} found; expected whole sequences of --seq-len "
             f"{args.seq_len}, equally many for each of {WORLD} processes; "
             f"try --batch-tokens {args.seq_len * 8 * WORLD}")


def check_ranges(args: argparse.Namespace) -> None:
    """Every number is in its range, or fail()."""
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        lowest = 1 if type(value) is int else 1e-12
        if name in MAY_BE_ZERO:
            lowest = 0
        highest = LARGEST
        if name in SHARES:
            highest = 1
        elif name == "seed":
            highest = SEEDS
        check_range(args, lowest, name, highest=highest)


# -----------------------------------------------------------------------------
# what train.py asks of its flags


def base_folder(args: argparse.Namespace) -> str:
    """The Llama that training starts from: --llama, or the demo's base beside --out. fail() if it
    is --out itself, or the text."""
    base = args.llama or str(Path(args.out).parent / "base")
    check_out(args.out, Llama=base, data=args.data)
    if not args.llama:
        check_out(base, data=args.data)
    return base


def args_of_base(args: argparse.Namespace, folder: str) -> argparse.Namespace:
    """The flags of the demo's dense stage: an elastic run into `folder` whose only budget is 1."""
    changed = dict(out=folder, steps=args.base_steps, lr=args.base_lr, budgets=[1.0], extra_budgets=0)
    return argparse.Namespace(**(vars(args) | changed))


def settings_of(args: argparse.Namespace, identity: dict) -> dict:
    """What a resumed run must agree on; identity: the folder of the shards, and the fingerprints of
    the shards and of --llama."""
    kept = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
    return kept | identity


def settings_of_base(args: argparse.Namespace, identity: dict) -> dict:
    """The same for the demo's dense stage."""
    return {name: getattr(args, name) for name in OF_BASE} | identity


def space_of(args: argparse.Namespace, config: LlamaConfig) -> Space:
    """The sizes to choose from; fail() if some do not fit, or if a budget buys none of their
    combinations."""
    asked = {axis: getattr(args, f"{axis}_choices") for axis in AXES}
    try:
        space = Space(config, {axis: sizes for axis, sizes in asked.items() if sizes})
    except ValueError as error:
        fail(str(error))
    for budget in args.budgets:
        space.feasible(budget)
    return space
