"""
A folder in use: a budget or a latency in, what runs at it out: a slice (slice_at) of train.py's family or of a plain
Llama, or (the rest of this file) flextron.py's network to call, and what its tokens took.

    python eval.py --model out/flextron --budgets 0.6 --text notes.txt
    python sample.py --model out/flextron --latency 0.6

A static router at a target is one SubNet, a plain slice that export.py can write. A dynamic one runs pertoken.py's
segments, and what it costs is known on average: measured on calibration text when it was saved, counted as it runs.
"""
import json
import math
from pathlib import Path

import torch

from plumbing.checkpoint import load_tensors
from plumbing.latency import check_latency, load_latency
from model import Llama
from flextron.network import KINDS, Flextron, costs_of, parameters_of, timed_sizes, total
from router import Router
from space import n_params
from plumbing.errors import fail

FLEXTRON = "flextron.pt"


def slice_at(folder, model: Llama, router: Router | None, asked: float, unit: str = "params") -> tuple:
    """(slice, factors) that a fraction of the full model's parameters buys, or (unit latency) of its measured time. A
    plain Llama (router None) is its own only slice."""
    if router is None and asked != 1:
        fail(f"{folder} is a plain Llama, it has no flex.pt: its only budget is 1.0; expected a folder of train.py's; "
             f"python train.py --llama {folder} makes one")
    if router is None or unit == "params":
        return router.deploy(asked) if router else (model.full, None)
    if router.mode == "penalty":
        fail(f"{folder} was trained with --router penalty, whose choice no latency bounds; expected a constrained "
             "router; ask for a budget")
    return router.deploy(asked, load_latency(folder, model, router.space.choices).costs(router.space, asked))

# -----------------------------------------------------------------------------
# called in place of a Llama


class Deployed:
    """A Flextron at one target, to be called where a Llama is: by evaluate(), by generate(). Counts what was chosen."""

    def __init__(self, flextron: Flextron, target: float):
        self.flextron, self.target, self.tok_embeddings = flextron, target, flextron.model.tok_embeddings
        self.subnet = flextron.model.full if target == 1 else None if flextron.dynamic else flextron.route(target)
        self.counts, self.tokens, self.picks = None, 0, []

    def __call__(self, tokens, targets=None, subnet=None, factors=None, cache=None):
        if self.subnet is not None:
            return self.flextron.model(tokens, targets, subnet=self.subnet, cache=cache)
        logits, loss, self.picks = self.flextron(tokens, targets, self.target, cache=cache)
        shares, n = self.flextron.shares_of(self.picks), tokens.numel()
        self.counts = {k: s * n + (self.counts[k] if self.counts else 0) for k, s in shares.items()}
        self.tokens += n
        return logits, loss

    def shares(self) -> dict[str, torch.Tensor]:
        """Per kind (L, K): what the tokens so far took."""
        done = self.subnet is None and self.tokens
        return {k: c / self.tokens for k, c in self.counts.items()} if done else self.flextron.shares(self.target)

    def widths(self) -> dict[str, list[float]]:
        """Per kind, the mean heads or neurons of every layer."""
        shares = self.shares()
        of = lambda kind: shares[kind].float() @ torch.tensor(self.flextron.sizes[kind]).float()
        return {kind: of(kind).tolist() for kind in KINDS}

    def got(self) -> float:
        """The mean cost in the currency of the targets."""
        return total(self.shares(), {kind: c.cpu() for kind, c in self.flextron.costs.items()})


def picture(deployed: Deployed, tokens: list[int], tokenizer, columns: int = 100) -> str:
    """Text with a bar under every character: how much its token took of what the tokens here took least and most."""
    with torch.no_grad():
        deployed(torch.tensor([tokens], device=deployed.tok_embeddings.weight.device))
    costs = deployed.flextron.costs
    took = sum(costs[KINDS[i % 2]][pick.choice[0]] for i, pick in enumerate(deployed.picks))     # T
    level = ((took - took.min()) / (took.max() - took.min()).clamp(min=1e-9) * 7).round().int().tolist()
    lines, text, bars = [], "", ""
    for token, k in zip(tokens, level):
        piece = tokenizer.decode_single_token_bytes(token).decode("utf-8", "replace").replace("\t", " ")
        for character in "" if piece.startswith("<|") else piece:
            if character == "\n" or len(text) == columns:
                lines, text, bars = lines + [text, bars], "", ""
            if character != "\n":
                text, bars = text + character, bars + "▁▂▃▄▅▆▇█"[k]
    pairs = [*lines, text, bars]
    return "\n".join(line for i, line in enumerate(pairs) if pairs[i - i % 2].strip())


def row_of_flextron(network: Deployed, budget: float, measured: dict) -> dict:
    """A row of eval.py's: got and parameters are means over the tokens of what was measured, heads and neurons means
    layer by layer."""
    flextron = network.flextron
    config, full = flextron.model.config, flextron.model.full
    got = total(network.shares(), costs_of(config, flextron.sizes, parameters_of(config, flextron.dynamic)))
    params = round(got * n_params(config, full))
    embeddings = n_params(config, full, embeddings=True) - n_params(config, full)
    widths = {kind: [round(w, 1) for w in of] for kind, of in network.widths().items()}
    return dict(budget=budget, got=round(got, 6), params=params, params_total=params + embeddings, dim=config.dim,
                layers=list(full.layers), **widths, **measured)


def widths_table(networks: list[Deployed], rows: list[dict], window: list[int] | None, tokenizer) -> str:
    """Mean widths, layer by layer; where tokens choose for themselves, what those of a window took."""
    lines = []
    for network, row in zip(networks, rows):
        heads, neurons = (" ".join(f"{w:g}" for w in row[kind]) for kind in ("n_heads", "ffn_dim"))
        lines.append(f"{row['budget']:6.2f}  by layer: heads {heads} | neurons {neurons}")
        if window and network.subnet is None:
            lines.append(f"\nwhat tokens took at {row['budget']:g} (the text's first window; a higher bar is more of "
                         f"the network):\n\n{picture(network, window, tokenizer)}\n")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# the folder


def flextron_state(flextron: Flextron, **more) -> dict:
    """All that flextron.pt needs, and `more`: tensors and plain types. The plain part goes through JSON: a pickle also
    remembers which equal objects are one object."""
    plain = dict(sizes=flextron.sizes, dynamic=flextron.dynamic, unit=flextron.unit, seed=flextron.seed,
                 calibrated=flextron.calibrated, **more)
    return dict(routers=dict(flextron.routers.state_dict()), costs={k: c.cpu() for k, c in flextron.costs.items()},
                **json.loads(json.dumps(plain)))


def restore_flextron(model: Llama, state: dict) -> Flextron:
    """Inverse of flextron_state(), on the model's device."""
    costs = {kind: state["costs"][kind].clone() for kind in KINDS}
    flextron = Flextron(model, state["sizes"], state["dynamic"], costs, state["unit"], state["seed"])
    flextron.routers.load_state_dict(state["routers"], strict=True)
    flextron.calibrated = state["calibrated"]
    return flextron.to(model.tok_embeddings.weight.device)


def load_flextron(folder, model: Llama) -> Flextron | None:
    """The routers of a folder that flextron.py wrote, around its Llama; None for another folder."""
    path = Path(folder) / FLEXTRON
    if not path.exists():
        return None
    try:
        return restore_flextron(model, load_tensors(path))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        fail(f"{path} does not fit the Llama beside it ({type(error).__name__}: {str(error).splitlines()[0][:100]}); "
             "expected the flextron.pt that flextron.py wrote with it; take both from one folder")


def deploy(flextron: Flextron, folder, asked: float, unit: str = "params") -> Deployed:
    """At a budget (unit params) or a latency, either a fraction of the full model's."""
    if unit == "latency":
        latency = load_latency(folder, flextron.model, timed_sizes(flextron.model.config, flextron.sizes))
        costs = costs_of(flextron.model.config, flextron.sizes, latency)
    else:
        costs = costs_of(flextron.model.config, flextron.sizes, parameters_of(flextron.model.config, flextron.dynamic))
    least = total(flextron.shares(flextron.smallest()), costs)
    if unit == "latency":
        check_latency(asked, least)
    elif not 0 < asked <= 1 or asked < least - 1e-6:
        fail(f"budget {asked:g} found, expected a fraction of the full model between {least:.3f}, the smallest that "
             f"{folder} was trained for, and 1; try --budget {min(1, math.ceil(100 * least) / 100):g}")
    return Deployed(flextron, flextron.target_for(asked, costs, unit))


def open_flextron(folder, model: Llama, asked: float, unit: str = "params") -> Deployed | None:
    """deploy() of what a folder holds beside its model; None if it is not Flextron's."""
    flextron = load_flextron(folder, model)
    return flextron and deploy(flextron, folder, asked, unit)
