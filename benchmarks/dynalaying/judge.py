"""Measuring a trained DynaLay network: its layers, its agent, and those that the agent must beat.

Each choice is tried once on every image (:func:`twnn_plugin.selection.study`), so that policies which decide
once are compared on the very same outcomes; the agent that was chosen is then run for real, and what it cost
is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.policies import Policy
from twnn_plugin.selection import LayerSelection, Study, selection_of, study

from .tasks import Part, Task
from .train import percent, predict, teach

__all__ = ["judge"]

_POINTS = 25  # of a curve over thresholds
_WEIGHTS = (-1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Seen:
    """A part of the data and what was seen of it.

    Attributes:
        part: images and labels.
        study: what each choice comes to.
        right: (n, N + 1) float, 1 where a choice gives the right answer.
        cost: (n, N + 1) after the open-loop pass, as a share of it.
        entropy: (n,) of the prediction with nothing iterated.
    """

    part: Part
    study: Study
    right: Tensor
    cost: Tensor
    entropy: Tensor

    def figures(self, choices: Tensor) -> dict[str, Any]:
        """Accuracy, mean probability of the truth, mean cost and shares of (n,) choices."""
        right, cost = self.study.judged(choices, self.part.labels)
        shares = F.one_hot(choices, self.right.shape[1]).double().mean(dim=0)
        rows = torch.arange(len(choices))
        truth = self.study.outcomes.logits[rows, choices].softmax(dim=1)[rows, self.part.labels]
        return {
            "accuracy": percent(right),
            "probability": percent(truth),
            "cost": float(cost.mean()),
            "shares": shares.tolist(),
        }


def judge(model: nn.Module, task: Task, data: dict[str, Part], seed: int) -> dict[str, Any]:
    """Teach agents, choose among them on validation images, and compare on test images.

    Args:
        model: trained.
        task: says with which tolerances and prices.
        data: the task's parts.
        seed: of the agents.
    """
    selection = selection_of(model)
    assert selection is not None
    tolerance, tried = _tolerance(model, selection, task, data)
    teaching, choosing, test = (_seen(model, data[name]) for name in ("teach", "choose", "test"))
    best = int(choosing.right[:, 1:].mean(dim=0).argmax()) + 1
    agents, points = _agents(selection, task, teaching, choosing, seed)
    always = 1 + float(choosing.cost[:, best].mean())
    frugal = _pick(points, task.recipe.budget)
    thrifty: Any = agents[frugal["agent"]]["policy"]
    spare = test.figures(_with_weight(thrifty, frugal["cost_weight"], test))
    picked = _pick(points, task.recipe.part * always)
    agent: Any = agents[picked["agent"]]["policy"]
    agent.cost_weight = picked["cost_weight"]
    found = test.figures(test.study.choices(agent))
    selection.configure(policy=agent)
    return {
        "tolerance": tolerance,
        "tolerances": tried,
        "best_layer": best,
        "settled": _settled(selection, model, data["choose"]),
        "test": {
            "layers": [
                {"accuracy": percent(test.right[:, a]), "cost": float(test.cost[:, a].mean())}
                for a in range(test.right.shape[1])
            ],
            "sweep": _run(model, selection, tw.policy("always"), data["test"]),
            "oracle": _oracle(test),
            "agent": {**found, **_difficulty(test, agent)},
            "frugal": spare,
            "agent_run": _run(model, selection, agent, data["test"]),
            "random": _random(test, found),
            "entropy": _entropy_at(
                choosing, test, best, choosing.figures(choosing.study.choices(agent))["cost"]
            ),
            "halting": _halting(selection, task, teaching, choosing, test, best, found["cost"], seed),
        },
        "chosen": picked,
        "chosen_frugal": frugal,
        "betas": [{k: v for k, v in entry.items() if k != "policy"} for entry in agents],
        "sweep": [
            {"cost_weight": weight, **test.figures(_with_weight(agent, weight, test))} for weight in _WEIGHTS
        ],
        "entropy_curve": _entropy_curve(test, best),
        "parameters": {
            "model": sum(p.numel() for p in model.parameters()) - _size(agent),
            "agent": _size(agent),
        },
    }


def _size(policy: Policy) -> int:
    return sum(p.numel() for p in policy.parameters())


def _tolerance(
    model: nn.Module, selection: LayerSelection, task: Task, data: dict[str, Part]
) -> tuple[float, list[dict[str, float]]]:
    """The tolerance at which the best layer is best on the images that choose; dearer ones must earn it."""
    tried = []
    for tol in task.recipe.tolerances:
        selection.configure(tol=tol, max_iter=task.recipe.max_iter)
        seen = _seen(model, data["choose"])
        place = int(seen.right[:, 1:].mean(dim=0).argmax()) + 1
        tried.append(
            {"tol": tol, "accuracy": percent(seen.right[:, place]), "cost": float(seen.cost[:, place].mean())}
        )
    top = max(entry["accuracy"] for entry in tried)
    good = [entry for entry in tried if entry["accuracy"] >= top - 0.15]
    best = min(good, key=lambda entry: entry["cost"])
    selection.configure(tol=best["tol"], max_iter=task.recipe.max_iter)
    return best["tol"], tried


def _seen(model: nn.Module, part: Part) -> Seen:
    found = study(model, part.images)
    return Seen(
        part, found, found.outcomes.right(part.labels).float(), found.outcomes.cost, found.view.entropy
    )


def _agents(
    selection: LayerSelection, task: Task, teaching: Seen, choosing: Seen, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """An agent for each price; what each comes to at other prices, on the images that choose."""
    agents: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for place, beta in enumerate(task.recipe.betas):
        torch.manual_seed(seed + 100)
        policy: Any = tw.policy("dynalay", hidden=64, epsilon=0.0, nop_bias=0.0)
        policy.bind(selection.iterated, selection.widths)
        rewards = teach(policy, teaching.study, teaching.part.labels, task.recipe, beta, seed)
        agents.append({"beta": beta, "policy": policy, "reward": rewards})
        for weight in _WEIGHTS:
            figures = choosing.figures(_with_weight(policy, weight, choosing))
            points.append({"agent": place, "beta": beta, "cost_weight": weight, **figures})
            if weight == 0:
                agents[-1] |= figures
    return agents, points


def _pick(points: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """The best point whose multiply-adds are within the budget, relative to the open-loop pass.

    The best has the highest mean probability of the truth, which a few thousand images tell apart better than
    the accuracy.
    """
    within = [point for point in points if 1 + point["cost"] <= budget]
    return max(within or [min(points, key=lambda p: p["cost"])], key=lambda p: (p["probability"], -p["cost"]))


def _with_weight(policy: Any, weight: float, seen: Seen) -> Tensor:
    before, policy.cost_weight = policy.cost_weight, weight
    try:
        return seen.study.choices(policy)
    finally:
        policy.cost_weight = before


def _oracle(seen: Seen) -> dict[str, float]:
    """For each image the cheapest choice that is right."""
    price = torch.where(seen.right > 0, seen.cost, torch.inf)
    some = seen.right.amax(dim=1) > 0
    spent = torch.where(some, price.amin(dim=1), 0.0)
    return {"accuracy": percent(some.float()), "cost": float(spent.mean())}


def _random(seen: Seen, agent: dict[str, Any]) -> dict[str, float]:
    """Layers drawn as often as the agent picks them, whatever the image: the exact expectation over draws.

    Where the images that the agent picks cost more or less than others, the share that is iterated is changed
    until the mean cost is the agent's.
    """
    shares = torch.tensor(agent["shares"][1:], dtype=torch.float32)
    if not float(shares.sum()):
        return {"accuracy": percent(seen.right[:, 0]), "cost": 0.0}
    shares = shares / shares.sum()
    cost = float((seen.cost[:, 1:] @ shares).mean())
    share = min(1.0, agent["cost"] / max(cost, 1e-9))
    right = (1 - share) * seen.right[:, 0] + share * (seen.right[:, 1:] @ shares)
    return {"accuracy": percent(right), "cost": share * cost}


def _by_entropy(seen: Seen, layer: int, threshold: float) -> Tensor:
    return torch.where(seen.entropy > threshold, layer, 0)


def _entropy_at(choosing: Seen, test: Seen, layer: int, cost: float) -> dict[str, Any]:
    """The entropy threshold that costs as much as the agent on the images that choose."""
    order = choosing.entropy.sort(descending=True)
    spent = choosing.cost[order.indices, layer].cumsum(dim=0) / len(order.indices)
    count = int((spent <= cost).sum())
    threshold = float(order.values[count]) if count < len(order.values) else -1.0
    return {"threshold": threshold, **test.figures(_by_entropy(test, layer, threshold))}


def _entropy_curve(seen: Seen, layer: int) -> list[dict[str, Any]]:
    thresholds = torch.quantile(seen.entropy, torch.linspace(0.4, 1, _POINTS)).tolist()
    return [seen.figures(_by_entropy(seen, layer, threshold)) for threshold in thresholds]


def _halting(
    selection: LayerSelection,
    task: Task,
    teaching: Seen,
    choosing: Seen,
    test: Seen,
    layer: int,
    cost: float,
    seed: int,
) -> dict[str, Any]:
    """PonderNet-like halting on the best layer, at the price with which it spends no more than the agent."""
    best: dict[str, Any] | None = None
    for beta in task.recipe.betas:
        torch.manual_seed(seed + 200)
        policy: Any = tw.policy("halting", order=(selection.iterated[layer - 1],), epsilon=0.0)
        policy.bind(selection.iterated, selection.widths)
        teach(policy, teaching.study, teaching.part.labels, task.recipe, beta, seed)
        for weight in _WEIGHTS:
            figures = choosing.figures(_with_weight(policy, weight, choosing))
            if figures["cost"] <= max(cost, 1e-9) and (best is None or figures["accuracy"] > best["val"]):
                on_test = test.figures(_with_weight(policy, weight, test))
                best = {"val": figures["accuracy"], "beta": beta, **on_test}
    return best or {"val": math.nan, "beta": math.nan, **test.figures(test.study.choices(tw.policy("never")))}


def _difficulty(seen: Seen, agent: Any) -> dict[str, float]:
    """Rank correlation between an image's loss with nothing iterated and what the agent spends on it."""
    closed = seen.study.outcomes.logits[:, 0]
    loss = F.cross_entropy(closed, seen.part.labels, reduction="none")
    choices = seen.study.choices(agent)
    spent = seen.cost.gather(1, choices[:, None]).squeeze(1)
    opened = choices > 0

    def mean(values: Tensor) -> float:
        return float(values.mean()) if values.numel() else math.nan

    rank = math.nan
    if len(set(spent.tolist())) > 1:
        tested: Any = spearmanr(loss.numpy(), spent.numpy())
        rank = float(tested.statistic)
    return {"rank": rank, "loss_iterated": mean(loss[opened]), "loss_nop": mean(loss[~opened])}


def _run(model: nn.Module, selection: LayerSelection, policy: Policy, part: Part) -> dict[str, float]:
    """A policy, for real: accuracy, what was executed, and what failed to settle."""
    before = selection.policy
    selection.configure(policy=policy)
    policy.eval()
    right, spent, lost, batch = [], 0, 0, 500
    for start in range(0, len(part.labels), batch):
        few = part.rows(torch.arange(start, min(start + batch, len(part.labels))))
        right.append((predict(model, few).argmax(dim=1) == few.labels).float())
        record = selection.last
        assert record is not None
        spent += record.multiply_adds
        lost += int(record.fallback.any(dim=1).sum())
    selection.configure(policy=before)
    total = len(part.labels)
    assert selection.last is not None
    return {
        "accuracy": percent(torch.cat(right)),
        "cost": spent / total / max(selection.last.open_loop, 1),
        "fallback": lost / total,
        "open_loop": selection.last.open_loop,
    }


def _settled(selection: LayerSelection, model: nn.Module, part: Part) -> list[float]:
    """For each layer the share of images for which it settles."""
    shares = []
    for place in range(len(selection.iterated)):
        weights = [float(i == place) for i in range(len(selection.iterated))]
        _run(
            model,
            selection,
            tw.policy("random", p=1.0, weights=weights),
            part.rows(torch.arange(min(500, len(part.labels)))),
        )
        assert selection.last is not None
        shares.append(1 - float(selection.last.fallback[:, place].float().mean()))
    return shares
