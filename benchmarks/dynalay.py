"""``dynalay``: the experiments of Mathur & Plis (2023) on the data at hand, and what its agent is worth.

Table 1 and figures 2 to 7 of the paper, their figures beside ours. Every cell is one training run with one
seed; the baselines are the three-layer CNN trained as long, torchdeq's DEQ with implicit, phantom and
unrolled gradients, and, on DynaLay's own network, iterating always, at random, by entropy and by halting, at
equal cost. Figure 7 is an LSTM on text.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import twnn_plugin as tw
from zoo.errors import DataError

from .dynalaying import pictures, report
from .dynalaying.claims import claims
from .dynalaying.judge import judge
from .dynalaying.tasks import DEQ_WAYS, LAYERS, QUICK, TASKS, Task, deq, dynalay, parts, plain
from .dynalaying.text import QUICK_TEXTS, TEXTS, VARIANTS, TextTask, run_text
from .dynalaying.train import backward_times, fit, forward_cost, percent, predict, updates_beside
from .harness import RECIPE, Benchmark, Cell, Claim, Settings, Table, fingerprint, register

__all__ = ["DynaLay"]

ARMS = ("dynalay", "longer", *(f"deq-{way}" for way in DEQ_WAYS), "cold", "model0", "model1", "model2")


class DynaLay(Benchmark):
    """An agent that picks layers to iterate, against those that need none."""

    name = "dynalay"
    question = (
        "Is an agent that picks, per sample, which layers are iterated worth its while, and at which cost?"
    )
    cpu_only = "trains tiny networks, for which a GPU has nothing to do"
    no_budget = "trains for a fixed number of epochs"

    def cells(self, settings: Settings) -> list[Cell]:
        tasks = QUICK if settings.quick else _present(TASKS)
        texts = QUICK_TEXTS if settings.quick else TEXTS
        return [
            Cell(
                f"{name}/{arm}/seed{seed}",
                {"task": name, "arm": arm, "seed": seed, RECIPE: _recipe(names[name], arm)},
            )
            for names, arms in ((tasks, ARMS), (texts, VARIANTS))
            for name in names
            for seed in settings.seeds
            for arm in arms
        ]

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        arm, seed = cell.options["arm"], cell.options["seed"]
        texts = QUICK_TEXTS if settings.quick else TEXTS
        if cell.options["task"] in texts:
            return run_text(texts[cell.options["task"]], arm, seed)
        task = (QUICK if settings.quick else TASKS)[cell.options["task"]]
        data = parts(task)
        torch.manual_seed(seed)
        size = f"{task.img_size}x{task.img_size}"
        used = f"{task.name}, {len(data['train'].labels)} training images, {size}"
        common = {"recipe": asdict(task.recipe), "data": used}
        if arm in ("dynalay", "cold", "model1", "model2"):
            return {**common, **_dynalay(task, data, arm, seed)}
        way = arm.removeprefix("deq-") if arm.startswith("deq-") else None
        if way is not None:
            task = replace(task, recipe=replace(task.recipe, lr=task.recipe.deq_lr))
        model = plain(task) if way is None else deq(task, way)
        factor = {"longer": task.recipe.longer, "model0": 1.0}.get(
            arm, task.recipe.deq_epochs / task.recipe.epochs
        )
        found = fit(model, task, data, seed, factor)
        beside: dict[str, Any] = {}
        if way is None:
            times = backward_times(model, data["train"])
        else:
            times, ours = updates_beside(model, dynalay(task), task.recipe, data)
            beside = {"dynalay_times": ours}
            trained, model = model, deq(task, way, in_use=True)
            model.load_state_dict(trained.state_dict())
        right = (predict(model, data["test"]).argmax(dim=1) == data["test"].labels).float()
        return {
            **common,
            **found,
            "test": percent(right),
            "forward": forward_cost(model, data["test"].images[:1]),
            "times": times,
            **beside,
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        made = report.tables(cells)
        missed = [claim for claim in claims(cells) if claim.met in ("no", "in part")]
        return [*made, _missed(missed)] if missed else made

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return pictures.plots(cells, folder)

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return claims(cells)


def _recipe(task: Task | TextTask, arm: str) -> str:
    """A hash of all that says how an arm is trained."""
    ways = VARIANTS.get(arm, DEQ_WAYS.get(arm.removeprefix("deq-")))
    return fingerprint(replace(task, title=""), ways)


def _missed(found: list[Claim]) -> Table:
    """Figures that were to be reached or that the paper has, and were not found."""
    return Table(
        "What was not reached, and by how much",
        ("claim", "to reach", "measured", "against", "ours", "met?"),
        [(c.claim, c.target, c.ratio, c.peer, c.ours, c.met) for c in found],
        ("What was tried for them, and what it brought, is told in docs/dynalay.md.",),
    )


def _present(tasks: dict[str, Task]) -> dict[str, Task]:
    """Those whose data are there; Fashion-MNIST is asked for in any case."""
    found = {}
    for name, task in tasks.items():
        if name != "fashion_mnist":
            try:
                parts(task)
            except DataError:
                continue
        found[name] = task
    return found


def _dynalay(task: Task, data: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """Train DynaLay's main model, teach its agent, compare."""
    layers = {"model1": LAYERS[:1], "model2": LAYERS[:2]}.get(arm, LAYERS)
    model = dynalay(task, layers)
    recipe = task.recipe
    if arm == "cold":  # figure 4: without the warm-up
        task = replace(task, recipe=replace(recipe, warm=0.0))
    found = fit(model, task, data, seed)
    judged = judge(model, task, data, seed)
    tw.configure(model, adjoint="implicit", max_iter=recipe.max_iter)
    return {**found, **judged, "times": backward_times(model, data["train"])}


register(DynaLay())
