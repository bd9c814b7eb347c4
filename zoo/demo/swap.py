"""One trained network under every solver by name, and what its gate's threshold buys."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

import twnn_plugin as tw
from twnn_plugin.solvers import Control, Outcome, Problem, Solver, WholeSolver, solve

from ..data import Batches
from ..evaluate import evaluate

__all__ = ["TRACE_TOL", "Samples", "difficulty", "every_solver", "samples", "threshold_curve", "traces"]

TRACE_TOL = 1e-6
_TRACE_STEPS = 30


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Put solver settings, policy and threshold of every wormhole back."""
    parts = [m for m in model.modules() if isinstance(m, tw.blocks.Feedback)]
    before = [(part.settings, part.policy, getattr(part.gate, "threshold", None)) for part in parts]
    try:
        yield
    finally:
        for part, (settings, policy, threshold) in zip(parts, before, strict=True):
            part.settings, part.policy = settings, policy
            if threshold is not None:
                part.gate.threshold = threshold


def every_solver(model: nn.Module, batches: Batches, repeats: int = 3) -> list[dict[str, Any]]:
    """Evaluate the network with each registered solver in its wormhole.

    The forward passes over the test set are timed in turn, so that a slow spell of the machine meets
    all solvers alike.
    """
    rows = []
    seconds: dict[str, list[float]] = {name: [] for name in tw.solvers.names()}
    with _as_it_was(model):
        for name in seconds:
            tw.configure(model, solver=name)
            figures = evaluate(model, batches, latency=False)
            rows.append({"solver": name, "owner": tw.solvers.owner(name), **figures.as_dict()})
        for _ in range(repeats):
            for name, times in seconds.items():
                tw.configure(model, solver=name)
                start = time.perf_counter()
                with torch.no_grad():
                    for images, _ in batches:
                        model(images)
                times.append(time.perf_counter() - start)
    for row in rows:
        row["seconds"] = statistics.median(seconds[row["solver"]])
    return rows


@dataclass(frozen=True)
class _Traced(WholeSolver):
    """Any solver, with the residual of every evaluation written down for the rows it was given."""

    inner: Solver
    trace: list[Tensor] = field(default_factory=list)

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        watched = _Watched(problem, self.trace)
        return solve(self.inner, watched, z, control)


class _Watched:
    """A problem whose rows all stay, so that a curve is about the same samples from end to end."""

    can_leave = False

    def __init__(self, problem: Problem, trace: list[Tensor]):
        self.problem, self.trace = problem, trace
        self.size, self.leave_share, self.evaluations = problem.size, problem.leave_share, 0

    def evaluate(self, z: Tensor) -> Tensor:
        fz = self.problem.evaluate(z)
        self.evaluations = self.problem.evaluations
        change = torch.linalg.vector_norm(fz - z, dim=1)
        self.trace.append((change / torch.linalg.vector_norm(fz, dim=1)).detach())
        return fz

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("rows stay")


def traces(model: nn.Module, images: Tensor) -> dict[str, list[float]]:
    """Median residual over the open samples at each evaluation of the span, for each solver.

    Args:
        model: with one wormhole, in eval mode.
        images: (B, C, H, W).
    """
    found = {}
    with _as_it_was(model), torch.no_grad():
        for name in tw.solvers.names():
            solver = _Traced(tw.solver(name))
            tw.configure(model, solver=solver, tol=TRACE_TOL, max_iter=_TRACE_STEPS)
            model(images)
            found[name] = [float(residual.median()) for residual in solver.trace]
    return found


@dataclass(frozen=True)
class Samples:
    """Per test image, (N,) each: steps (0: the gate stayed closed), gate probability, rightness."""

    images: Tensor
    labels: Tensor
    steps: Tensor
    probability: Tensor
    correct: Tensor


def samples(model: nn.Module, batches: Batches) -> Samples:
    """What the wormhole did with each test image."""
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for images, labels in batches:
            logits = model(images)
            (record,) = tw.report(model)
            parts.append((images, labels, record.steps, record.probability, logits.argmax(1) == labels))
    return Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def difficulty(found: Samples, plain: nn.Module) -> dict[str, float]:
    """Whether hard images were iterated longer, hardness being the plain network's loss on them.

    Returns:
        Spearman's rank correlation of steps and hardness over the test images, and the mean hardness of
        the images that were iterated and of those that were not (cross-entropy, nats).
    """
    with torch.no_grad():
        hardness = F.cross_entropy(plain(found.images), found.labels, reduction="none")
    opened = found.steps > 0
    correlation: Any = spearmanr(found.steps, hardness)
    return {
        "rank_correlation": float(correlation[0]),
        "loss_iterated": float(hardness[opened].mean()),
        "loss_not_iterated": float(hardness[~opened].mean()),
    }


def threshold_curve(model: nn.Module, validation: Batches, test: Batches) -> list[dict[str, Any]]:
    """Accuracy against cost on the test set as the gate's threshold moves.

    The thresholds are quantiles of the gate's scores on the validation set.
    """
    part = next(m for m in model.modules() if isinstance(m, tw.blocks.Feedback))
    gate = part.gate
    assert isinstance(gate, tw.gates.LearnedGate)
    with torch.no_grad():
        seen = samples(model, validation).probability.double()
    scores = torch.logit(seen, eps=1e-12) * gate.temperature + gate.threshold
    rows = []
    with _as_it_was(model):
        for wanted in (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0):
            threshold = float(torch.quantile(scores, 1 - wanted))
            edge = {0.0: "never", 1.0: "always"}.get(wanted)
            if edge is None:
                tw.configure(model, policy="gate", threshold=threshold)
            else:
                tw.configure(model, policy=edge)
            figures = evaluate(model, test, latency=False)
            rows.append({"wanted_share": wanted, **figures.as_dict()})
    return rows
