"""
A training run beside its method: log.jsonl, checkpoints, signals, steps that went bad, the clock.

train.py and the flextron folder have loops of their own around it:

    with Run(args.out, steps, device, ...) as run:
        for step in range(run.start, steps + 1):
            run.checkpoint(step, save)             saves where it is due; leaves here if a signal asked for it
            if step == steps:
                break
            run.start_clock()
            ...                                    gradients
            if run.finite(step, losses, norms):
                ...                                optimizers step
            run.log_step(step, text, mean, loss=losses)    a record in log.jsonl, now and then a line
"""
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.checkpoint import TOKENIZER, save_llama, save_tensors
from plumbing.errors import fail, note
from plumbing.files import is_there
from plumbing.locks import without_waiting
from plumbing.parallel import RANK, WORLD, Stop, finish, mean_over_ranks, rank0_first, say, sum_over_ranks
from plumbing.state import LOG, save_state
from plumbing.tensors import fingerprint

WARM_UP = 3  # first steps that the average time leaves out: caches are cold

# -----------------------------------------------------------------------------
# what the log and the messages say of a run


def git_commit() -> str:
    """The commit this code is at; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError):  # no git on this machine
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root,
                               capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    return "unknown"


def resume_command() -> str:
    """The command line that goes on with this run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    start = ["python"]
    if WORLD > 1:
        start = ["torchrun", f"--nproc_per_node={local}"]
    if WORLD > local:  # several machines: torchrun does not say how they met
        start = ["torchrun", "..."]
    program = [sys.argv[0]]
    if Path(program[0]).name == "__main__.py":  # it was started as python -m folder
        program = ["-m", Path(program[0]).resolve().parent.name]
    resume = [] if "--resume" in sys.argv else ["--resume"]
    return shlex.join([*start, *program, *sys.argv[1:], *resume])


# -----------------------------------------------------------------------------
# a checkpoint


class NotFinite(Exception):
    """Weights that no later run could go on from."""


def write_checkpoint(out, resume: dict, weights, config, tokenizer: Path | None, name: str,
                     routers: dict | None) -> None:
    """Writes the state, then what it implies: the raw Llama folder and, if there are routers, the file
    `name`. All ranks call it.

    The state (resume.pt) comes first because it suffices alone. resume["model"] is this rank's part of
    the Llama's state dict; weights: an iterator over all of it, (name, whole tensor). OSError if the
    disk is full, NotFinite if a weight is no number: the last good state stays."""
    names = rank0_first(lambda: list(resume["model"]))
    spoilt = torch.zeros(len(names))  # ranks with a part that is no number
    for i, weight in enumerate(resume["model"].values()):
        spoilt[i] = not weight.isfinite().all()
    spoilt = [name for name, ranks in zip(names, sum_over_ranks(spoilt)) if ranks]
    if spoilt:
        raise NotFinite(f"{len(spoilt)} tensors, such as {spoilt[0]}, hold NaN or infinity")
    save_state(out, resume)
    if RANK > 0:
        for _ in weights:  # all ranks put a tensor together, one writes it
            pass
        return
    save_llama(out, config, weights, tokenizer)
    if routers is not None:
        save_tensors(Path(out) / name, routers | dict(weights=fingerprint(out)))  # whose routers they are


def first_tokenizer(*folders) -> Path | None:
    """The tokenizer.model of the first of the folders that has one."""
    paths = [Path(folder) / TOKENIZER for folder in folders if folder]
    return next((path for path in paths if is_there(path)), None)


# -----------------------------------------------------------------------------
# the run


class Run:
    """One run into a folder. start: the step it begins at.

    settings: what a resumed run compares, for the log. slower: the flag with a lower rate that
    mends a diverged run. tokens: what a step trains on, for the printed speed."""

    def __init__(self, out, steps: int, device: torch.device, settings: dict, start: int = 0,
                 save_every: int = 150, log_every: int = 10, max_bad_steps: int = 10, slower: str = "",
                 tokens: int = 0):
        self.out = Path(out)
        self.steps = steps
        self.device = device
        self.settings = settings
        self.start = start
        self.saved = start  # the step of the last checkpoint
        self.bad = 0        # steps in a row that were not finite
        self.save_every = save_every
        self.log_every = log_every
        self.max_bad_steps = max_bad_steps
        self.slower = slower
        self.tokens = tokens
        self.seconds = 0.0  # of the steps that are timed
        self.timed = 0

    def __enter__(self) -> "Run":
        path = self.out / LOG if RANK == 0 else os.devnull
        # A line at a time: nothing is lost in a crash.
        self.log = open(path, "a", encoding="utf-8", buffering=1, opener=without_waiting)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.record(argv=sys.argv, settings=self.settings, start=self.start, commit=git_commit(),
                    torch=torch.__version__, ranks=WORLD, device=name)
        hidden = RANK > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=self.start, desc=self.out.name, disable=hidden)
        self.stop = Stop().__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.stop.__exit__(*error)
        self.bar.close()
        self.close_log()

    def record(self, **entry) -> None:
        """Appends a line to log.jsonl. A disk that is full costs the log, not the run."""
        try:
            self.log.write(json.dumps(entry) + "\n")
        except OSError as error:
            note(f"{self.out / LOG} cannot be written ({error.strerror or error}): "
                 "the run goes on without it")
            self.close_log()
            self.log = open(os.devnull, "a")

    def close_log(self) -> None:
        """Closes the log; what it could not write is lost, and was said."""
        with contextlib.suppress(OSError):
            self.log.close()

    def say(self, step: int, text: str) -> None:
        """Prints a line that begins with the step."""
        say(f"step {step:5d}/{self.steps} | {text}")

    # ---- between two steps

    def due(self, step: int, every: int) -> bool:
        """Is it time for what happens every so many steps, and at the end?"""
        return step > self.start and (step == self.steps or step % every == 0)

    def checkpoint(self, step: int, save) -> None:
        """Calls save(step) where a checkpoint is due: every save_every steps, at the end, and when
        a signal came.

        A good checkpoint is replaced by a good one only: after bad steps nothing is saved, and a
        run that ends with them ends with fail(). After a signal the program ends here, with the
        status that shells give it, 130 or 143: what a script has behind it must not follow. A disk
        that is full ends it with fail()."""
        last = step == self.steps
        stopped = self.asked_to_stop()
        if last or stopped or self.due(step, self.save_every):
            spoilt = self.try_to_save(step, save)
            if spoilt and last:
                fail(f"{self.out} is not saved at its last step: {spoilt}; {self.kept()}; lower the rate:  "
                     f"{resume_command()} {self.slower}")
            if spoilt:
                self.say(step, f"not saved: {spoilt}; {self.kept()}")
            if dist.is_initialized():
                dist.barrier()
        if stopped:  # at the last step too: a base has a family behind it
            where = f"saved in {self.out}" if self.saved == step else self.kept()
            say(f"stopped at step {step} of {self.steps}, {where}; go on with:  {resume_command()}")
            finish()
            raise SystemExit(128 + self.stop.number)

    def try_to_save(self, step: int, save) -> str:
        """Saves, or says why that would replace a good state by a bad one. A full disk: fail()."""
        if self.bad:
            return f"the last {self.bad} steps were not finite"
        try:
            save(step)
        except NotFinite as error:
            return str(error)
        except OSError as error:
            fail(f"{self.out} at step {step} cannot be written ({error.strerror or error}); {self.kept()}; "
                 f"make room, then:  {resume_command()}")
        self.saved = step
        return ""

    def kept(self) -> str:
        """What --resume would go on from."""
        if self.saved == 0:
            return f"no checkpoint was written to {self.out}"
        return f"the checkpoint of step {self.saved} in {self.out} stays"

    def asked_to_stop(self) -> bool:
        """Did SIGTERM or SIGINT reach any of the ranks?"""
        wished = torch.tensor(float(self.stop.wished), device=self.device)
        return mean_over_ranks(wished).item() > 0

    # ---- one step

    def start_clock(self) -> None:
        """A step begins: evaluation and saving are not in its time."""
        self.clock = time.perf_counter()

    def finite(self, step: int, losses: list[float], norms: list[float]) -> bool:
        """May the optimizers step? A loss or gradient norm that is not finite makes a bad step,
        which is skipped.

        All ranks answer alike: losses and gradients are means over them. Too many bad steps in a
        row: fail()."""
        if all(map(math.isfinite, [*norms, *losses])):
            self.bad = 0
            return True
        self.bad += 1
        self.say(step, f"skipped: a loss or gradient is not finite ({self.bad} in a row)")
        if self.bad >= self.max_bad_steps:
            fail(f"{self.bad} steps in a row, up to step {step}, had a loss or gradient that is not finite; "
                 f"{self.kept()}; lower the rate:  {resume_command()} {self.slower}")
        return False

    def log_step(self, step: int, text: str, mean: float, **entry) -> None:
        """A step is done: writes its record, prints its line every log_every steps. mean: the
        progress bar's loss."""
        took = time.perf_counter() - self.clock
        if step - self.start >= WARM_UP:
            self.seconds += took
            self.timed += 1
        self.bar.update()
        self.bar.set_postfix(loss=f"{mean:.3f}")
        self.record(step=step, bad=self.bad, seconds=round(took, 4), **entry)
        if step % self.log_every == 0 or step == self.steps - 1:
            self.say(step, " | ".join([text, *self.speed(step)]))

    def speed(self, step: int) -> list[str]:
        """Milliseconds a step, tokens a second and time left, as cells of a line; none of them in
        the warm-up."""
        if not self.timed:
            return []
        mean = self.seconds / self.timed
        left = timedelta(seconds=round((self.steps - step - 1) * mean))
        cells = [f"{1000 * mean:.0f} ms"]
        if self.tokens:
            cells.append(f"{self.tokens / mean:,.0f} tok/s")
        return [*cells, f"eta {left}"]
