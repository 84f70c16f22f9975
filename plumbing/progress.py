"""
What train.py shows of a family while it trains, and when it is done: losses per step, validation,
the table of budgets.

    step   300/450 | loss | 1.00->1.000 3.217  0.80->0.750~3.290 ... | tau 0.15 kappa 7.0 max p 0.99
                   | lr 4.1e-04 ...
    step   300/450 | val  | 1.00->1.000 3.150  0.80->0.750 3.163 ...

A cell is the budget asked for, the share of the parameters that its slice has, and the loss; ~
marks a pass that taught the router.
"""
import argparse

from eval import evaluate
from importance import sort_
from model import Llama, LlamaConfig
from plumbing.checkpoint import fill_llama_
from plumbing.family import Family
from plumbing.parallel import say
from plumbing.run import Run
from plumbing.sharding import compiled_graphs, load_on_ranks
from plumbing.tables import before_after_table
from router import Router
from space import cost, n_params


def validate(run: Run, step: int, model: Llama, router: Router, val, args: argparse.Namespace) -> None:
    """The validation loss of every trained budget, to the log and the screen."""
    losses = {}
    got = {}
    for budget in args.budgets:
        subnet = router.route(budget)
        losses[budget] = evaluate(model, val, subnet, router.factors(subnet))[0]
        got[budget] = cost(model.config, subnet)
    run.record(step=step, val=losses, got=got)
    cells = [f"{budget:.2f}->{got[budget]:.3f} {loss:.3f}" for budget, loss in losses.items()]
    run.say(step, "val  | " + "  ".join(cells))


def log_step(run: Run, step: int, config: LlamaConfig, result: dict, norms: dict, lr: float) -> None:
    """A line of log.jsonl and, now and then, of the screen: budget asked -> got and loss of every
    pass (~: it taught the router).

    result: what train_step() returned. norms: of the gradients, before they were clipped."""
    passes = result["passes"]
    for p in passes:
        subnet = p.pop("subnet")
        p["got"] = round(cost(config, subnet), 4)
        # as in every layer
        p["sizes"] = [subnet.dim, subnet.n_heads[0], subnet.ffn_dim[0], len(subnet.layers)]
        if p["other"] is not None:
            p["other"] = round(cost(config, p["other"]), 4)
    cells = []
    for p in reversed(passes):
        taught = "~" if p["soft"] or p["other"] is not None else " "
        cells.append(f"{p['budget']:.2f}->{p['got']:.3f}{taught}{p['loss']:.3f}")
    text = "loss | " + "  ".join(cells)
    if len(passes) > 1:
        max_p = max(p["max_p"] for p in passes if p["budget"] < 1)
        text += f" | tau {result['tau']:.2f} kappa {result['kappa']:4.1f} max p {max_p:.2f}"
    text += f" | lr {lr:.1e} | norm {norms.get('llama', 0):.2f}"
    if compiled_graphs():
        text += f" | {compiled_graphs()} graphs"
    mean = sum(p["loss"] for p in passes) / len(passes)
    columns = {key: [p[key] for p in passes] for key in passes[0]}
    run.log_step(step, text, mean, lr=lr, norms=norms, tau=result["tau"], kappa=result["kappa"], **columns)


def show_family(args, base: str, orders: dict, val, device) -> None:
    """The family as read back from its folder: what each budget got, and its loss before (the same
    slice of the sorted base) and after training."""
    model = load_on_ranks(args.out, args.shard, device)
    family = Family(args.out, model)
    evaluate(model, [w[:16] for w in val])  # warms up: the first row's speed counts too
    rows = []
    for budget in family.default_budgets():
        member = family.member(budget)
        loss, speed = evaluate(model, val, member.subnet, member.factors)
        rows.append(dict(budget=budget, subnet=member.subnet, loss=loss, speed=speed))

    fill_llama_(model, base)
    sort_(model, orders)
    for row in rows:
        subnet = row.pop("subnet")
        row["before"] = evaluate(model, val, subnet)[0]
        row |= dict(got=cost(model.config, subnet), params=n_params(model.config, subnet), dim=subnet.dim,
                    n_heads=subnet.n_heads, ffn_dim=subnet.ffn_dim, layers=subnet.layers)
    say("\n" + before_after_table(rows, args.budgets, val[1].numel()))
    budget = max(0.5, min(args.budgets))
    say(f"\nNext:  python export.py --model {args.out} --budget {budget:g}\n"
        f"       python eval.py --model {args.out}\n"
        f"       python sample.py --model {args.out} --budget {budget:g}")
