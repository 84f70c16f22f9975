"""
Trains one Llama so that every prefix of it is a good Llama, and a router that picks the prefix for a budget.

LLaMaFlex (ICLR 2025) Sec. 3: every step runs every budget, each on its own tokens; its loss is their mean (Eq. 8 has
the sum: the same to AdamW, but not to --clip).

    python train.py                                     the demo: text of this machine, two CPU cores, minutes
    torchrun --nproc_per_node=2 train.py                the same on two processes
    torchrun --nproc_per_node=8 train.py --llama Llama-3.1-8B --data data/mytext --out out/flex-8b

The demo first trains a small dense Llama into out/base with this same loop (a dense run is an elastic run whose only
budget is 1.0). Then: rank and sort its units (importance.py), train elastically, print a table of budgets.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from plumbing.checkpoint import (
    RESUME,
    TOKENIZER,
    load_llama,
    resume_state,
    save_llama,
    save_tensors,
)
from data.prepare import prepare
from data.shards import Shards
from importance import rank, sort_
from model import Llama, LlamaConfig, SubNet
from optimizer import clip_gradients, lr_factor, make_optimizers, schedule
from plumbing.memory import plan_table
from plumbing.params import read_config
from plumbing.parallel import (
    RANK,
    WORLD,
    Stop,
    autocast,
    finish,
    mean_over_ranks,
    rank0_first,
    say,
    setup,
)
from router import FLEX, Choice, Router, restore_router, router_state
from plumbing.settings import MAY_DIFFER, OVERRIDES, parse_args
from plumbing.sharding import (
    compile_blocks,
    compiled_graphs,
    load_optimizer_state,
    model_state,
    optimizer_state,
    shard,
)
from space import AXES, Space, cost, n_params, random_generator
from plumbing.errors import fail
from data.tokenizer import load_tokenizer

TABLE_BUDGETS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]

# -----------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def evaluate(model: Llama, windows, subnet: SubNet | None = None, factors=None, batch=None) -> tuple[float, float]:
    """Mean cross-entropy in nats over windows (x, y), each (n, T), and forward tokens/s; shared among the ranks."""
    x, y = (w[RANK::WORLD] for w in windows) if dist.is_initialized() else windows
    batch = batch or max(1, 4096 // windows[0].size(1))  # the logits of 4096 tokens take 2 GB with Llama 3's vocabulary
    rounds = -(-len(windows[0]) // (batch * WORLD))  # the same on all ranks: a sharded model gathers in every forward
    device = model.tok_embeddings.weight.device
    factors = None if factors is None else factors.to(device)
    total, start = torch.zeros(1, dtype=torch.float64, device=device), time.perf_counter()
    for i in range(rounds):
        tokens, targets = (w[i * batch:(i + 1) * batch] for w in (x, y))
        n = targets.numel()
        if n == 0:  # nothing left for this rank, but the others need it
            tokens, targets = (w[:1] for w in windows)
        with autocast(device):
            loss = model(tokens.to(device), targets.to(device), subnet=subnet, factors=factors)[1]
        total += loss.double() * n
    if dist.is_initialized():
        dist.all_reduce(total)
    loss, seconds = total.item() / windows[1].numel(), time.perf_counter() - start
    return loss, windows[1].numel() / seconds


# -----------------------------------------------------------------------------
# one step


def pass_loss(wrapped, tokens, targets, teacher, kd, **slice_kwargs):
    """(loss, cross-entropy) of one micro-batch; with a teacher the loss is (1 - kd) CE + kd KL(teacher || slice)."""
    with autocast(tokens.device):
        logits, ce = wrapped(tokens, targets, **slice_kwargs)
        if teacher is None:
            return ce, ce
        with torch.no_grad():
            reference = teacher(tokens)[0].log_softmax(-1).flatten(0, 1)
    kl = F.kl_div(logits.log_softmax(-1).flatten(0, 1), reference, log_target=True, reduction="batchmean")
    return (1 - kd) * ce + kd * kl, ce


def train_step(wrapped, model, router, shards, step, args, device, teacher=None) -> dict:
    """Forward and backward of all budgets of a step; gradients are left in .grad, averaged over ranks.

    A pass runs the slice that was drawn, or, if it is soft, the full width under the gates of the router's marginals.
    Only soft passes teach the router: a gate of exactly 1 is a scale that the weights beside it are trained to make
    optimal, so its gradient says next to nothing about what leaving the unit out would cost.

    The router is not inside DDP. What it gives to the model, marginals and modulation factors, are leaves of the
    model's graph; when all budgets are done their gradients (short vectors) are averaged over the ranks and sent
    back through the router, once. The model's gradients accumulate over the budgets and are averaged once too,
    during the last pass: b = 1, because it reaches every weight.
    """
    draw = lambda *what: torch.rand((), generator=random_generator(args.seed, step, *what)).item()
    (tau, kappa, soft_prob), smallest = schedule(step, args), min(args.budgets)
    budgets = [smallest + (1 - smallest) * draw("extra", k) for k in range(args.extra_budgets)] + sorted(args.budgets)
    rows = args.batch_tokens // args.seq_len  # sequences per budget, of which this rank takes `local`
    local = rows // WORLD
    micro = min(local, args.micro_batch)
    passes, penalties, signals, leaves = [], [], [], []

    def leaf(signal):
        signals.append(signal)
        leaves.append(signal.detach().to(device).requires_grad_())
        return leaves[-1]

    for i, budget in enumerate(budgets):
        choice = router.sample(budget, step, tau, kappa, args.penalty) if router else Choice(model.full)
        soft = choice.marginals is not None and draw("soft", budget) < soft_prob
        marginals = leaf(choice.marginals) if soft else None
        modulated = choice.subnet != model.full and args.modulation != "none"
        factors = leaf(router.modulation(choice.subnet)) if modulated else None
        penalties += [] if choice.penalty is None else [choice.penalty / len(budgets)]
        first = i * rows + RANK * local
        x, y = shards.batch(step, len(budgets) * rows, first, first + local)
        mean = torch.zeros((), device=device)
        for m in range(0, local, micro):
            tokens, targets = x[m:m + micro].to(device), y[m:m + micro].to(device)
            last = i == len(budgets) - 1 and m + micro >= local
            gates = router.space.gates(marginals) if soft else None
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                loss, ce = pass_loss(wrapped, tokens, targets, teacher if budget < 1 else None, args.kd,
                                     subnet=model.full if soft else choice.subnet, gates=gates, factors=factors)
                if loss.requires_grad:  # with frozen weights the full network has nothing to learn
                    (loss * len(tokens) / local / len(budgets)).backward()
            mean += ce.detach() * len(tokens) / local
        passes.append(dict(budget=budget, subnet=choice.subnet, soft=soft, max_p=choice.max_p, loss=mean))
    gradients = [None] * len(penalties)
    if leaves:
        flat = mean_over_ranks(torch.cat([t.grad.flatten() for t in leaves])).cpu()
        gradients += [g.view_as(s) for g, s in zip(flat.split([s.numel() for s in signals]), signals)]
    if gradients:
        torch.autograd.backward(penalties + signals, gradients)
    losses = mean_over_ranks(torch.stack([p["loss"] for p in passes])).tolist()
    return dict(passes=[p | dict(loss=loss) for p, loss in zip(passes, losses)], tau=tau, kappa=kappa)


# -----------------------------------------------------------------------------
# the loop


def save(model, router, optimizers, step: int, bad: int, orders, settings: dict, args) -> None:
    """resume.pt first: it suffices alone. The raw folder and flex.pt follow from it. On a full disk the last good
    checkpoint stays."""
    state, moments = model_state(model), [optimizer_state(optimizer) for optimizer in optimizers]
    if RANK == 0:
        out = Path(args.out)
        flex = None if router is None else router_state(
            router, seq_len=args.seq_len, data=settings["data"], eval_windows=args.eval_windows)
        homes = [Path(folder) / TOKENIZER for folder in (args.llama, settings["data"]) if folder]
        try:
            save_tensors(out / RESUME, dict(model=state, flex=flex, optimizers=moments, step=step, bad=bad,
                                             orders=orders, settings=settings))
            save_llama(out, model.config, state, next((path for path in homes if path.is_file()), None))
            if flex:
                save_tensors(out / FLEX, flex)
        except OSError as error:
            fail(f"{out} at step {step} cannot be written ({error.strerror or error}); the last checkpoint there is "
                 f"whole; make room, then:  {resume_command()}")
    if dist.is_initialized():
        dist.barrier()


def resume_command() -> str:
    """The command line that goes on with this run."""
    start = ["python"] if WORLD == 1 else ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', WORLD)}"]
    if WORLD > int(os.environ.get("LOCAL_WORLD_SIZE", WORLD)):  # several machines: how they meet, torchrun does not say
        start = ["torchrun", "..."]
    return shlex.join([*start, *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def train(model, router, shards, val, orders, settings: dict, args, device, state=None, teacher=None) -> None:
    """Trains model (and router) for args.steps steps into args.out. state: what resume.pt held; orders: what sorted
    the model, kept for a resumed run. Asked to stop by a signal, it saves and leaves with status 0."""
    steps, start, bad = args.steps, 0, 0
    model.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        compile_blocks(model), compile_blocks(teacher)
    wrapped = shard(model, args.shard, device)
    optimizers = make_optimizers(model, router, args)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if state is not None:
        fresh = [{k: group[k] for k in ("peak", "start", "weight_decay")} for group in groups]
        for optimizer, moments in zip(optimizers, state["optimizers"]):
            load_optimizer_state(optimizer, moments)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, these in zip(groups, fresh):  # --override may have changed them
            group.update(these)
        start, bad = state["step"], state["bad"]
    log = open(Path(args.out) / "log.jsonl" if RANK == 0 else os.devnull, "a", encoding="utf-8", buffering=1)
    record = lambda **entry: log.write(json.dumps(entry) + "\n")
    record(argv=sys.argv, settings=settings, start=start, commit=git_commit(), torch=torch.__version__, ranks=WORLD,
           device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    bar = tqdm(total=steps, initial=start, desc=Path(args.out).name, disable=RANK > 0 or not sys.stderr.isatty())
    seconds, timed = 0.0, 0
    with Stop() as stop:
        for step in range(start, steps + 1):
            last, stopped = step == steps, mean_over_ranks(torch.tensor(float(stop.wished), device=device)).item() > 0
            if last or stopped or (step > start and step % args.save_every == 0):
                save(model, router, optimizers, step, bad, orders, settings, args)
            if stopped and not last:
                say(f"stopped at step {step} of {steps}, saved in {args.out}; go on with:  {resume_command()}")
                finish()
                raise SystemExit(0)
            if router and step > start and (last or step % args.eval_every == 0):
                deployed = {b: router.deploy(b) for b in args.budgets}
                losses = {b: evaluate(model, val, *d)[0] for b, d in deployed.items()}
                record(step=step, val=losses, got={b: cost(model.config, d[0]) for b, d in deployed.items()})
                say(f"step {step:5d}/{steps} | val  |",
                    "  ".join(f"{b:.2f}->{cost(model.config, deployed[b][0]):.3f} {v:.3f}" for b, v in losses.items()))
            if last:
                break
            # one training step
            clock = time.perf_counter()
            for group in groups:
                group["lr"] = group["peak"] * lr_factor(step, steps, args.warmup, group["start"])
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            result = train_step(wrapped, model, router, shards, step, args, device, teacher)
            norms = clip_gradients(model, router, args.clip)
            if all(map(math.isfinite, [*norms.values(), *(p["loss"] for p in result["passes"])])):
                for optimizer in optimizers:
                    optimizer.step()
                bad = 0
            else:  # the same on every rank: losses and gradients are means over them
                bad += 1
                say(f"step {step:5d}/{steps} | skipped: a loss or gradient is not finite ({bad} in a row)")
                if bad >= args.max_bad_steps:
                    fail(f"{bad} steps in a row, up to step {step}, had a loss or gradient that is not finite; the "
                         f"last checkpoint in {args.out} stays; lower the rate:  {resume_command()} --override "
                         f"{'--lr' if router else '--base-lr'} {args.lr / 2:g}")
            took = time.perf_counter() - clock
            if step - start >= 3:  # the first steps warm caches up
                seconds, timed = seconds + took, timed + 1
            # one line of log
            passes = result["passes"]
            for p in passes:
                p["got"] = round(cost(model.config, p.pop("subnet")), 4)
            bar.update()
            bar.set_postfix(loss=f"{sum(p['loss'] for p in passes) / len(passes):.3f}")
            record(step=step, lr=groups[0]["lr"], norms=norms, tau=result["tau"], kappa=result["kappa"],
                   bad=bad, seconds=round(took, 4), **{key: [p[key] for p in passes] for key in passes[0]})
            if step % args.log_every == 0 or step == steps - 1:
                say(step_line(step, result, norms, groups[0]["lr"], seconds / max(1, timed), args))
    bar.close()
    log.close()


def step_line(step: int, result: dict, norms: dict, lr: float, seconds: float, args) -> str:
    """The printed line of a step: budget asked -> got and loss of every pass (~: soft), noise, speed, time left."""
    passes, cells = result["passes"], []
    cells.append("  ".join(f"{p['budget']:.2f}->{p['got']:.3f}{'~' if p['soft'] else ' '}{p['loss']:.3f}"
                           for p in passes[::-1]))
    if len(passes) > 1:
        cells.append(f"tau {result['tau']:.2f} kappa {result['kappa']:4.1f} max p "
                     f"{max(p['max_p'] for p in passes if p['budget'] < 1):.2f}")
    cells.append(f"lr {lr:.1e} | norm {norms.get('llama', 0):.2f}")
    if seconds:
        left = timedelta(seconds=round((args.steps - step - 1) * seconds))
        cells.append(f"{1000 * seconds:.0f} ms | {len(passes) * args.batch_tokens / seconds:,.0f} tok/s | eta {left}")
    if args.compile:
        cells.append(f"{compiled_graphs()} graphs")
    return f"step {step:5d}/{args.steps} | loss | " + " | ".join(cells)


def git_commit() -> str:
    """The commit this code is at, for the log; "unknown" outside a git checkout."""
    with contextlib.suppress(OSError):  # no git on this machine
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).resolve().parent,
                               capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    return "unknown"


# -----------------------------------------------------------------------------
# the stages: data, base, elastic, table


def open_data(args) -> tuple[str, Shards, Shards]:
    """(folder, train, val). Without --data: the Python standard library, tokenised with the Llama's own tokenizer, or
    without a Llama with one trained on it."""
    own = Path(args.llama) / TOKENIZER if args.llama and (Path(args.llama) / TOKENIZER).is_file() else None

    def same_tokenizer(folder):
        theirs = Path(folder) / TOKENIZER
        return not own or not theirs.is_file() or theirs.read_bytes() == own.read_bytes()

    folder = args.data or "data/pystdlib"
    if args.data is None and own and not (Path(folder).exists() and same_tokenizer(folder)):
        folder += "-" + Path(args.llama).resolve().name
    if args.data is None:  # all ranks ask, or one that looks late would not wait
        rank0_first(lambda: None if Path(folder).exists() else str(prepare((), folder, tokenizer=own)))
    if not same_tokenizer(folder):
        fail(f"{folder} was made with another tokenizer than {own}; make data for this Llama: python data/prepare.py "
             f"--input TEXT --tokenizer {own} --out data/NAME")
    vocab_size = read_config(args.llama).vocab_size if args.llama else load_tokenizer(Path(folder) / TOKENIZER).n_vocab
    if (Path(folder) / TOKENIZER).is_file():
        load_tokenizer(Path(folder) / TOKENIZER, vocab_size)
    return (folder, Shards(folder, "train", args.seq_len, vocab_size, args.seed),
            Shards(folder, "val", args.seq_len, vocab_size, args.seed))


def make_folder(path) -> None:
    """mkdir -p, or one line about why not."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        fail(f"{path} cannot be made a folder ({error.strerror}); choose another --out")


def dense_base(args, config: LlamaConfig, data, settings: dict, state: dict | None, device) -> None:
    """The demo's starting point: a small dense Llama, trained once into args.out."""
    if state is not None and state["step"] == args.steps:
        return say(f"base: {args.out} is there, {args.steps} steps; not trained again")
    model = Llama(config).init_weights(args.seed)
    if state is not None:
        model.load_state_dict(state["model"])
    say(f"base: a dense Llama of {n_params(config, model.full):,} non-embedding parameters into {args.out}")
    train(model.to(device), None, *data, None, settings, args, device, state)


def elastic(args, router: Router, data, settings: dict, state: dict | None, device) -> None:
    """Ranks, sorts and trains the Llama in args.llama into args.out, then prints the table of budgets."""
    model = load_llama(args.llama, device)
    model.config = replace(model.config, context=max(model.config.context, args.seq_len))
    if state is None:
        if args.resume:
            say(f"{Path(args.out) / RESUME} does not exist: starting at step 0")
        windows = data[0].windows(args.calibration_windows)[0].to(device)
        say(f"ranking {model.config.dim} channels, heads, neurons and layers on {len(windows)} windows")
        with autocast(device):
            orders = rank0_first(lambda: rank(model, windows, args.depth_by, args.units_by, args.seed))
        sort_(model, orders)
        router.space.order_layers(orders["layers"])
    else:
        say(f"{args.out} is there at step {state['step']} of {args.steps}: going on from it")
        model.load_state_dict(state["model"])
        router, orders = restore_router(model.config, state["flex"]), state["orders"]
    model.requires_grad_(not args.freeze_backbone)
    teacher = load_llama(args.llama, device).requires_grad_(False) if args.kd > 0 else None  # the frozen base
    say(f"elastic: budgets {' '.join(f'{b:g}' for b in args.budgets)}, {len(router.space.members)} sub-networks of "
        f"cost {router.space.costs.min():.3f} to 1, router lr {args.router_lr:.1e}")
    train(model, router, *data, orders, settings, args, device, state, teacher)
    table(model, router, orders, data[1], args)
    say(f"\nNext:  python export.py --model {args.out} --budget 0.5\n       python eval.py --model {args.out}\n"
        f"       python sample.py --model {args.out} --budget 0.5")


def table(model, router, orders: dict, val, args) -> None:
    """The family: what each budget got, and its loss before (the same slice of the sorted base) and after training, as
    read back from the folders."""
    model = load_llama(args.out, model.tok_embeddings.weight.device)
    config, rows, smallest = model.config, [], router.space.costs.min()
    evaluate(model, [w[:16] for w in val])  # warms up: the first row's speed counts too
    for b in sorted({b for b in TABLE_BUDGETS if b >= smallest} | set(args.budgets), reverse=True):
        subnet, factors = router.deploy(b)
        rows.append([b, subnet, *evaluate(model, val, subnet, factors)])
    model.load_state_dict(load_llama(args.llama, dtype=None).state_dict())  # as the file has it: a map, not a copy
    sort_(model, orders)
    say(f"\n{'budget':>7} {'got':>6} {'dim':>5} {'heads':>5} {'ffn':>6} {'layers':>6} {'parameters':>14} "
        f"{'before':>7} {'after':>7} {'tok/s':>9}   (* trained; loss in nats on {val[1].numel():,} held-out tokens)")
    for b, subnet, loss, speed in rows:
        before = evaluate(model, val, subnet)[0]
        say(f"{b:6.2f}{'*' if b in args.budgets else ' '} {cost(config, subnet):6.3f} {subnet.dim:5d} "
            f"{subnet.n_heads[0]:5d} {subnet.ffn_dim[0]:6d} {len(subnet.layers):6d} {n_params(config, subnet):14,} "
            f"{before:7.3f} {loss:7.3f} {speed:9,.0f}")


def main(argv=None) -> None:
    """data -> base -> rank, sort -> train -> table."""
    args = parse_args(argv, __doc__)
    if args.dry_run:
        return print(plan_table(args))
    device = setup(args.device)
    say("settings: " + " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None))
    folder, shards, val = open_data(args)
    data, data_id = (shards, val.windows(args.eval_windows)), dict(data=folder, fingerprint=shards.fingerprint())
    settings = {k: v for k, v in vars(args).items() if k not in MAY_DIFFER} | data_id
    override = OVERRIDES if args.override else ()
    state = resume_state(args.out, settings, args.steps, args.resume, override)
    config = LlamaConfig(vocab_size=shards.vocab_size, context=args.seq_len) if args.demo else read_config(args.llama)
    asked = {axis: getattr(args, f"{axis}_choices") for axis in AXES}
    try:
        space = Space(config, {axis: sizes for axis, sizes in asked.items() if sizes})
    except ValueError as error:
        fail(str(error))
    for budget in args.budgets:
        space.feasible(budget)
    args.llama = args.llama or str(Path(args.out).parent / "base")
    if Path(args.llama).resolve() == Path(args.out).resolve():
        fail(f"--out {args.out} is the Llama that training starts from; choose another --out")
    if args.demo:
        dense = argparse.Namespace(**vars(args) | dict(out=args.llama, steps=args.base_steps, lr=args.base_lr,
                                                       budgets=[1.0], extra_budgets=0))
        base = {k: getattr(args, k) for k in ("base_steps", "base_lr", "seed", "batch_tokens", "seq_len", "clip",
                                              "weight_decay", "warmup")} | data_id
        mend = f"give --out in another parent folder, start from it as it is with --llama {args.llama}"
        state_of_base = resume_state(args.llama, base, args.base_steps, args.resume, override, mend)
        make_folder(args.out), make_folder(args.llama)
        dense_base(dense, config, data, base, state_of_base, device)
    make_folder(args.out)
    router = Router(space, args.router, args.seed, args.budgets, args.modulation == "channel")
    elastic(args, router, data, settings, state, device)
    finish()


if __name__ == "__main__":
    main()
