"""
A Flextron in use: a budget or a latency in, out comes a network that is called in place of a Llama.

    python eval.py --model out/flextron --budgets 0.6 --text notes.txt
    python sample.py --model out/flextron --latency 0.6

Static routers are deployed at a target as one SubNet, a slice that export.py can write. Dynamic
ones are deployed as they are: tokens choose, and network.py runs what they chose. The mean cost was
measured on calibration text when the folder was saved. It is counted again as the network runs.
"""
import json
import math

import torch

from flextron.network import Flextron, costs_of, parameter_cost, sizes_for, timed_sizes, total_cost
from flextron.routers import ELASTIC
from model import Llama
from plumbing.errors import fail
from plumbing.latency import check_latency, load_latency
from plumbing.tensors import load_weights
from space import n_params

BARS = "▁▂▃▄▅▆▇█"  # under a character: what its token took

# -----------------------------------------------------------------------------
# called in place of a Llama


class Deployed:
    """A Flextron at one target. evaluate() and generate() call it where they would call a Llama.

    subnet: what runs, for all tokens; None: every token takes its own width. Counts what tokens chose."""

    def __init__(self, flextron: Flextron, target: float):
        self.flextron = flextron
        self.target = target
        self.tok_embeddings = flextron.model.tok_embeddings  # where callers look for the device
        if target == 1:
            self.subnet = flextron.model.full
        elif flextron.dynamic:
            self.subnet = None
        else:
            self.subnet = flextron.route(target)
        self.picks = []   # of the last call
        self.tokens = 0   # that chose so far
        self.counts = {}  # per axis (L, K): how many of them took each size

    def __call__(self, tokens, targets=None, subnet=None, factors=None, cache=None, at=None):
        """As Llama.forward. subnet and factors are ignored: the target says what runs."""
        if self.subnet is not None:
            return self.flextron.model(tokens, targets, subnet=self.subnet, cache=cache, at=at)
        logits, loss, self.picks = self.flextron(tokens, targets, self.target, cache=cache, at=at)
        n = tokens.numel()
        self.tokens += n
        for axis, share in self.flextron.shares_of(self.picks).items():
            self.counts[axis] = self.counts.get(axis, 0) + share * n
        return logits, loss

    def shares(self) -> dict[str, torch.Tensor]:
        """Per axis (L, K): how often each size was taken so far, or, before any call, what is expected."""
        if self.tokens == 0:
            return self.flextron.shares(self.target)
        return {axis: count / self.tokens for axis, count in self.counts.items()}

    def widths(self) -> dict[str, list[float]]:
        """Per axis, the mean heads or neurons of every layer."""
        means = {}
        for axis, share in self.shares().items():
            sizes = torch.tensor(self.flextron.sizes[axis]).float()
            means[axis] = (share.float() @ sizes).tolist()
        return means

    def got(self) -> float:
        """The mean cost in the currency of the targets."""
        return total_cost(self.shares(), self.flextron.costs)


# -----------------------------------------------------------------------------
# flextron.pt


def flextron_state(flextron: Flextron, **more) -> dict:
    """All that flextron.pt needs, and `more`: tensors and plain types.

    The plain part goes through JSON: a pickle also remembers which equal objects are one object, so
    two equal runs would give two files."""
    plain = dict(
        sizes=flextron.sizes,
        dynamic=flextron.dynamic,
        unit=flextron.unit,
        seed=flextron.seed,
        calibrated=flextron.calibrated,
        **more,
    )
    plain = json.loads(json.dumps(plain))
    routers = dict(flextron.routers.state_dict())
    costs = {axis: cost.cpu() for axis, cost in flextron.costs.items()}
    return dict(routers=routers, costs=costs, **plain)


def restore_flextron(model: Llama, saved: dict) -> Flextron:
    """Inverse of flextron_state(), on the model's device."""
    if saved["unit"] not in ("params", "latency"):
        raise ValueError(f"unit is {saved['unit']!r}")
    costs = {axis: saved["costs"][axis].clone() for axis in ELASTIC}
    sizes = sizes_for(model.config, saved["sizes"])
    if sizes != saved["sizes"]:
        raise ValueError(f"sizes are {str(saved['sizes'])[:60]}, expected ascending ones, the full one last")
    flextron = Flextron(model, sizes, saved["dynamic"], costs, saved["unit"], saved["seed"])
    load_weights(flextron.routers, saved["routers"])
    flextron.calibrated = [dict(row) | dict(target=float(row["target"]), price=float(row["price"]))
                           for row in saved["calibrated"]]
    return flextron.to(model.tok_embeddings.weight.device)


# -----------------------------------------------------------------------------
# a budget in, a network out


def deploy(flextron: Flextron, folder, asked: float, unit: str = "params") -> Deployed:
    """The network at a fraction of the full model's parameters (a budget) or, unit "latency", of its time.

    folder: where the table of latencies is, or will be. A fraction that cannot be met: fail()."""
    config = flextron.model.config
    if unit == "latency":
        cost_of = load_latency(folder, flextron.model, timed_sizes(config, flextron.sizes))
    else:
        cost_of = parameter_cost(config, flextron.dynamic)
    costs = costs_of(config, flextron.sizes, cost_of)
    least = total_cost(flextron.shares(flextron.smallest()), costs)
    if unit == "latency":
        check_latency(asked, least)
    elif not 0 < asked <= 1 or asked < least - 1e-6:
        enough = min(1, math.ceil(100 * least) / 100)
        fail(f"budget {asked:g} found, expected a fraction of the full model between {least:.3f}, the "
             f"smallest that {folder} was trained for, and 1; try --budget {enough:g}")
    target = flextron.target_for(asked, costs, unit)
    return Deployed(flextron, target)


# -----------------------------------------------------------------------------
# what eval.py shows: a row, widths layer by layer, a picture of what tokens took


def row_of_flextron(network: Deployed, budget: float, measured: dict) -> dict:
    """A row of eval.py's, and what was measured.

    got and params are means over the tokens that were measured, heads and neurons means of every
    layer."""
    flextron = network.flextron
    config = flextron.model.config
    full = flextron.model.full
    costs = costs_of(config, flextron.sizes, parameter_cost(config, flextron.dynamic))
    got = total_cost(network.shares(), costs)
    params = round(got * n_params(config, full))
    embeddings = n_params(config, full, embeddings=True) - n_params(config, full)
    row = dict(
        budget=budget,
        got=round(got, 6),
        params=params,
        params_total=params + embeddings,
        dim=config.dim,
        layers=list(full.layers),
    )
    for axis, widths in network.widths().items():
        row[axis] = [round(width, 1) for width in widths]
    return row | measured


def widths_table(networks: list[Deployed], rows: list[dict], window: list[int] | None,
                 tokenizer) -> str:
    """Mean widths, layer by layer. Where tokens choose for themselves: also what those of a window took."""
    lines = []
    for network, row in zip(networks, rows):
        heads = " ".join(f"{width:g}" for width in row["n_heads"])
        neurons = " ".join(f"{width:g}" for width in row["ffn_dim"])
        lines.append(f"{row['budget']:6.2f}  by layer: heads {heads} | neurons {neurons}")
        if window and network.subnet is None:
            drawn = picture(network, window, tokenizer)
            lines.append(f"\nwhat tokens took at {row['budget']:g} (the text's first window; a higher bar "
                         f"is more of the network):\n\n{drawn}\n")
    return "\n".join(lines)


def picture(network: Deployed, tokens: list[int], tokenizer, columns: int = 100) -> str:
    """Text with a bar under every character: the cost of its token, between the least and the most here."""
    took = costs_of_tokens(network, tokens)
    spread = (took.max() - took.min()).clamp(min=1e-9)
    heights = (took - took.min()) / spread * (len(BARS) - 1)
    heights = heights.round().int().tolist()
    lines = []  # pairs of text and the bars under it
    text = ""
    bars = ""
    for token, height in zip(tokens, heights):
        for character in printed(token, tokenizer):
            if character == "\n" or len(text) == columns:
                lines.append((text, bars))
                text = ""
                bars = ""
            if character != "\n":
                text += character
                bars += BARS[height]
    lines.append((text, bars))
    return "\n".join(f"{text}\n{bars}" for text, bars in lines if text.strip())


@torch.no_grad()
def costs_of_tokens(network: Deployed, tokens: list[int]) -> torch.Tensor:
    """(T,) what each token's choices save, all layers together (<= 0)."""
    device = network.tok_embeddings.weight.device
    network(torch.tensor([tokens], device=device))
    took = 0
    for pick in network.picks:
        took = took + network.flextron.costs[pick.axis][pick.choice[0]]
    return took


def printed(token: int, tokenizer) -> str:
    """A token as text; nothing for a special one, a blank for a tab."""
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", "replace")
    return "" if text.startswith("<|") else text.replace("\t", " ")
