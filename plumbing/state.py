"""
The state of a run: resume.pt, from which it goes on bit for bit.

Where every rank has a part of its own, as under --shard fsdp, each writes its part, and reads what
it needs of all of them, however many wrote. resume.pt is the part of rank 0, and decides: it names
the folder with the others, which are there before it. So one rename replaces the whole state.
(torch.distributed.checkpoint cuts tensors in the same way. Its loader runs what a pickle asks for.)
"""
import errno
import json
import shutil
from pathlib import Path

import torch

from plumbing.checkpoint import RESUME, save_tensors
from plumbing.errors import fail
from plumbing.files import is_there
from plumbing.parallel import RANK, WORLD, rank0_first, sum_over_ranks
from plumbing.params import PARAMS
from plumbing.rows import joined
from plumbing.tensors import another_kind, load_tensors, taken_apart

LOG = "log.jsonl"
PATHS = ("llama", "data")
PARTS = ("resume-a", "resume-b")  # folders of parts; a save takes the one that is not in use


def save_state(folder, state: dict) -> None:
    """Writes the state of a run. All ranks call it, each with its part of state["model"] and
    state["optimizers"], which may be nothing. OSError, on all of them, if a disk is full."""
    folder = Path(folder)
    used = None
    has_part = bool(state["model"]) or any(moments["state"] for moments in state["optimizers"])
    if sum_over_ranks(torch.tensor(float(RANK > 0 and has_part))):
        used = rank0_first(lambda: free_parts(folder))
        save_part(folder, used, state)
        state = state | dict(parts=dict(folder=used, ranks=WORLD))
    if RANK == 0:
        save_tensors(folder / RESUME, state)
        for name in set(PARTS) - {used}:
            shutil.rmtree(folder / name, ignore_errors=True)


def save_part(folder, name: str, state: dict) -> None:
    """Writes this rank's part of the state, if it is not that of rank 0."""
    failed = None
    try:
        if RANK > 0:
            part = {key: state[key] for key in ("step", "model", "optimizers")}
            save_tensors(part_path(folder, name, RANK), part)
    except OSError as error:
        failed = error
    if sum_over_ranks(torch.tensor(float(failed is not None))):
        raise failed or OSError(errno.EIO, "another rank could not write its part")


def part_path(folder, name: str, rank: int) -> Path:
    """The file with a rank's part of the state."""
    return Path(folder) / name / f"rank-{rank:03d}.pt"


def free_parts(folder) -> str:
    """The name of the folder of parts that no state uses, which is emptied."""
    path = Path(folder) / RESUME
    in_use = None
    if path.exists():
        in_use = load_tensors(path).get("parts", {}).get("folder")
    free = PARTS[1] if in_use == PARTS[0] else PARTS[0]
    shutil.rmtree(Path(folder) / free, ignore_errors=True)
    return free


def with_all_parts(folder, state: dict) -> dict:
    """The state of rank 0 together with those of the other ranks; tensors in parts are rows.py's
    Rows."""
    if "parts" not in state:
        return state
    name = state["parts"]["folder"]
    if name not in PARTS:
        raise ValueError(f"parts in {str(name)[:40]}")
    parts = [state]
    for rank in range(1, state["parts"]["ranks"]):
        path = part_path(folder, name, rank)
        part = load_tensors(path)
        if part["step"] != state["step"]:
            fail(f"{path} is of step {part['step']}, {RESUME} of {state['step']}; "
                 f"expected the parts of one save; copy {folder} again, or delete it and start again")
        parts.append(part)
    optimizers = []
    for i, moments in enumerate(state["optimizers"]):
        optimizers.append(
            moments | dict(state=joined_all([part["optimizers"][i]["state"] for part in parts])))
    return state | dict(model=joined_all([part["model"] for part in parts]), optimizers=optimizers)


def joined_all(parts: list[dict]) -> dict:
    """One dictionary of tensors, or of dictionaries of tensors. Each part has some rows of a tensor, or
    lacks it."""
    found = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if key in part]
        found[key] = joined_all(values) if isinstance(values[0], dict) else joined(values)
    return found


def of_a_run(path):
    """taken_apart() for a resume.pt."""
    return taken_apart(path, "the state of this run; copy it again, or delete it and start again")


def check_free(folder, mend: str) -> None:
    """fail() for a folder without a state that holds a Llama: the new one would replace it. A run
    leaves a log, and writes its state first: without one, someone has deleted it. And where a folder
    or a pipe has a file's name: its first save would fail."""
    folder = Path(folder)
    for path in folder.glob("*.*"):
        if path.suffix in (".pt", ".pth", ".json", ".model"):
            is_there(path)
    from_elsewhere = another_kind(folder)
    if not from_elsewhere and (folder / PARAMS).exists():
        from_elsewhere = "a Llama that no run has written"
        if (folder / LOG).exists():
            from_elsewhere = f"a run without its {RESUME}, so no run can go on from it"
    if from_elsewhere:
        fail(f"{folder} is {from_elsewhere}; expected a new folder, or one of an earlier run; {mend}")


def resume_state(folder, settings: dict, steps: int, resume: bool, override=(),
                 mend="choose another --out", may_override=()):
    """What resume.pt in `folder` holds, None without one.

    A run is left alone, fail(), if its settings differ in more than `override`, if it has gone
    further than `steps`, or if it stopped before its last step and is not to be resumed. mend: what
    else the user can do; may_override: the settings that --override lets differ, where there is one."""
    path = Path(folder) / RESUME
    if not is_there(path):
        check_free(folder, mend)
        return None
    state = load_tensors(path)
    now = json.loads(json.dumps(settings))
    with of_a_run(path):
        then = state["settings"]
        json.dumps(then)  # plain values
        if type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"step is {str(state['step'])[:40]}")
        differ = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    # A folder that was moved is the same folder: what counts are the fingerprints beside the paths.
    differ = [key for key in differ if key not in PATHS]
    if not set(differ) <= set(override):
        changes = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in differ)
        if set(differ) <= set(may_override):
            mend = f"go on with these by --resume --override, {mend}"
        fail(f"{folder} holds a run with other settings: {changes}; {mend}, or delete it")
    if state["step"] > steps:
        fail(f"{folder} is at step {state['step']} already, {steps} were asked for; ask for more, or {mend}")
    if state["step"] < steps and not resume:
        fail(f"{folder} holds a run that stopped at step {state['step']} of {steps}; "
             "go on with --resume, or delete it")
    with of_a_run(path):
        return with_all_parts(folder, state)
