"""
A folder in use: a budget in, and out comes what runs at it.

    family = open_family("out/flex")
    member = family.member(0.5)                     half of the parameters
    member = family.member(0.6, unit="latency")     six tenths of the measured time
    logits, _ = member.model(tokens, subnet=member.subnet, factors=member.factors)

A folder holds one of three things, and this is the one place that tells them apart:

    flex.pt          a supernet of train.py: its router picks the slice, its modulation gives the factors
    flextron.pt      a supernet of the flextron folder: routers in front of every layer
    neither          a plain Llama, whose only member is itself
"""
import json
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from model import Llama, LlamaConfig, SubNet
from plumbing.checkpoint import load_llama, load_tensors
from plumbing.errors import fail, note
from plumbing.files import is_there
from plumbing.latency import load_latency
from plumbing.lazy import open_lazily
from plumbing.tensors import fingerprint, load_weights, taken_apart
from router import Router
from space import Space, cost

FLEX = "flex.pt"
FLEXTRON = "flextron.pt"
# Of what kind the plain values of flex.pt and flextron.pt are, where they have them.
KINDS = dict(seq_len=int, eval_windows=int, data=str, budgets=list, targets=list, delta=float,
             near=float, mode=str, seed=int)
TABLE_BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # what tables show where nobody asked for a budget

# -----------------------------------------------------------------------------
# members


class Member(NamedTuple):
    """What runs at a budget: model(tokens, targets, subnet=subnet, factors=factors,
    cache=cache)."""
    model: Callable                       # the Llama; of a flextron folder, what is called in its place
    subnet: SubNet | None                 # None: every token takes its own width
    factors: torch.Tensor | None = None   # (n_layers, 2) of the modulation; None: all are 1


class Family:
    """A folder's Llama, and what it runs at each budget.

    model: the Llama. router, flextron: at most one of them; neither for a plain Llama. saved: what
    flex.pt or flextron.pt says besides (budgets, seq_len, data ...), {} for a plain Llama."""

    def __init__(self, folder, model: Llama):
        self.folder = Path(folder)
        self.model = model
        self.saved = {}
        self.router = None
        self.flextron = None
        self.noted = set()  # budgets that a note was printed about
        if is_there(self.folder / FLEX):
            self.saved = load_tensors(self.folder / FLEX)
            self.router = self.restored(FLEX, restore_router, model.config)
        elif is_there(self.folder / FLEXTRON):
            from flextron.deployed import restore_flextron  # another paper: imported where a folder needs it
            self.saved = load_tensors(self.folder / FLEXTRON)
            self.flextron = self.restored(FLEXTRON, restore_flextron, model)

    def restored(self, name: str, restore: Callable, beside):
        """restore(beside, saved), or fail() if the file is not of the Llama beside it."""
        if "weights" in self.saved and self.saved["weights"] != fingerprint(self.folder):
            fail(f"{self.folder / name} was saved with other weights than those beside it, as when a save is "
                 "interrupted; expected both of one save; "
                 "the run's own command with --resume writes both again")
        writer = "train.py" if name == FLEX else "flextron"
        expected = f"the {name} that {writer} wrote with the Llama beside it; take both from one folder"
        with taken_apart(self.folder / name, expected):
            for key, kind in KINDS.items():
                if type(self.saved.get(key, kind())) is not kind:
                    raise TypeError(f"{key} is no {kind.__name__}")
            if self.saved.get("targets") == []:
                raise ValueError("targets are missing")
            for budget in [*self.saved.get("budgets", []), *self.saved.get("targets", [])]:
                if isinstance(budget, bool) or not 0 < budget <= 1:
                    raise ValueError(f"{str(budget)[:40]} is no budget")
            return restore(beside, self.saved)

    def member(self, asked: float, unit: str = "params") -> Member:
        """What runs at a fraction of the full model's parameters, or (unit "latency") of its
        measured time. A budget that the folder cannot meet: fail()."""
        if self.flextron:
            from flextron.deployed import deploy
            network = deploy(self.flextron, self.folder, asked, unit)
            self.note_untrained(asked, unit)
            return Member(network, network.subnet)
        if self.router is None:
            if asked != 1:
                fail(f"{self.folder} is a plain Llama, it has no {FLEX}: its only budget is 1.0; expected a "
                     f"folder of train.py's; python train.py --llama {self.folder} makes one")
            return Member(self.model, self.model.full)
        subnet = self.router.route(asked, self.latencies(asked) if unit == "latency" else None)
        if unit == "params":
            self.note_untrained(asked)
        else:
            self.note_small(subnet)
        return Member(self.model, subnet, self.router.factors(subnet))

    def note_untrained(self, asked: float, unit: str = "params") -> None:
        """Says on stderr, once for a budget, that it is under all that were trained."""
        trained = self.trained_budgets(unit)
        if not trained or asked >= min(trained) or asked in self.noted:
            return
        self.noted.add(asked)
        program = "train.py --budgets" if self.router else "-m flextron --targets"
        budgets = " ".join(f"{b:g}" for b in sorted({*trained, round(asked, 2)}, reverse=True))
        note(f"{asked:.3g} is under {min(trained):g}, the smallest budget that {self.folder} was trained at: "
             "expect a worse model than its size could be; "
             f"to train further down: python {program} {budgets}")

    def note_small(self, subnet: SubNet) -> None:
        """note_untrained() for a slice that was found by another unit: is even the largest budget
        that buys it too small?"""
        found = cost(self.model.config, subnet)
        smallest = min(self.trained_budgets(), default=0)
        if found + self.router.space.delta <= smallest:
            self.note_untrained(found)

    def slice_member(self, asked: float, unit: str = "params") -> Member:
        """member(), as one slice; fail() where every token takes its own width."""
        member = self.member(asked, unit)
        if member.subnet is None:
            fail(f"{self.folder} has dynamic routers: every token takes its own width, and no slice is what "
                 "they choose; expected static ones (python -m flextron --router static), or --budget 1.0")
        return member

    def latencies(self, asked: float) -> torch.Tensor:
        """The time of every member of the router's space, (M,), in fractions of the full model's;
        fail() if none takes at most `asked`."""
        if self.router.mode == "penalty":
            fail(f"{self.folder} was trained with --router penalty, whose choice no latency bounds; expected "
                 "a constrained router; ask for a budget")
        latency = load_latency(self.folder, self.model, self.router.space.choices)
        return latency.costs(self.router.space, asked)

    def default_budgets(self) -> list[float]:
        """The budgets of a table where nobody asked for any: round ones, and those that were trained."""
        if self.flextron:
            return [1.0, *self.saved["targets"]]
        if self.router is None:
            return [1.0]
        smallest = min(self.router.budgets, default=0)  # what is under it comes only if it is asked for
        known = {b for b in TABLE_BUDGETS if b >= max(smallest, self.router.space.costs.min())}
        return sorted(known | set(self.router.budgets), reverse=True)

    def trained_budgets(self, unit: str = "params") -> list[float]:
        """Those that training ran, in this unit; [] for a plain Llama."""
        if self.flextron:
            return self.saved["targets"] if unit == self.flextron.unit else []
        if self.router is None or unit == "latency":
            return []
        return self.saved["budgets"]


def open_family(folder, device="cpu", dtype: torch.dtype | None = torch.float32) -> Family:
    """The family in a folder, its Llama loaded as load_llama() does (dtype None: as in the
    file)."""
    return Family(folder, load_llama(folder, device, dtype))


def open_to_cut(folder) -> Family:
    """The family in a folder, for what cuts a member out and runs nothing: its weights are read layer
    by layer when they are asked for, as in the file. Those of flextron, whose routers are made for a
    model that runs, at once."""
    if (Path(folder) / FLEXTRON).exists():
        return open_family(folder, dtype=None)
    return Family(folder, open_lazily(folder))


# -----------------------------------------------------------------------------
# flex.pt


def router_state(router: Router, **more) -> dict:
    """All that flex.pt needs to route again, and `more`: tensors and plain types.

    The plain part goes through JSON: a pickle also remembers which equal objects are one object, so
    two equal runs would give two files."""
    space = router.space
    plain = dict(choices=space.choices, layer_order=space.layer_order, delta=space.delta, near=space.near,
                 mode=router.mode, seed=router.seed, budgets=router.budgets, **more)
    return dict(router=dict(router.state_dict()), **json.loads(json.dumps(plain)))


def restore_router(config: LlamaConfig, saved: dict) -> Router:
    """Inverse of router_state()."""
    near = saved.get("near", saved["delta"])  # a family that was trained before there was one
    space = Space(config, saved["choices"], saved["layer_order"], saved["delta"], near)
    if space.choices != saved["choices"]:  # an axis that is missing would get the default's
        raise ValueError(f"choices are {str(saved['choices'])[:60]}, "
                         "expected all axes, ascending, the full size last")
    router = Router(space, saved["mode"], saved["seed"], saved["budgets"])
    load_weights(router, saved["router"])
    return router
