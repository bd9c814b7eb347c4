"""What a reasoning model does on a set: right answers, statuses, steps, and what the steps follow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import twnn_plugin as tw

from ..models.reasoning import ReasoningNet
from ..models.reasoning_loops import Loop
from .examples import Examples

__all__ = ["Score", "alignment", "curve", "predict", "rank_correlations", "score"]


@dataclass(frozen=True)
class Score:
    """Row by row, (N,) each.

    Attributes:
        right: every position of the answer is right.
        positions: share of the positions that are right.
        steps: evaluations of the map; zero for models that do not iterate.
        status: :class:`~twnn_plugin.Status`; converged for models that do not iterate.
        difficulty: as the examples have it.
    """

    right: Tensor
    positions: Tensor
    steps: Tensor
    status: Tensor
    difficulty: dict[str, Tensor]

    @property
    def converged(self) -> Tensor:
        """(N,) bool."""
        return self.status == int(tw.Status.converged)

    def figures(self) -> dict[str, float | int | dict[str, float | None]]:
        """Plain values for JSON."""
        steps = self.steps.double()
        wrong = self.converged & ~self.right
        return {
            "samples": len(self.right),
            "right": float(self.right.double().mean()),
            "wrong": int((~self.right).sum()),
            "positions_right": float(self.positions.double().mean()),
            "converged": float(self.converged.double().mean()),
            "not_converged": int((~self.converged).sum()),
            "converged_and_wrong": int(wrong.sum()),
            "mean_steps": float(steps.mean()),
            "least_steps": int(self.steps.min()),
            "most_steps": int(self.steps.max()),
            "rank_correlation": rank_correlations(self),
        }


def predict(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answers (B, ...), steps (B,) and statuses (B,) of one batch, without gradients."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        answers = model(inputs).argmax(dim=1)
    steps = torch.zeros(len(inputs), dtype=torch.long)
    status = torch.full((len(inputs),), int(tw.Status.converged))
    for part in model.modules():
        if isinstance(part, Loop):
            steps, status = (fact.cpu() for fact in part.solved())
    return answers, steps, status


def score(
    model: nn.Module, examples: Examples, batch_size: int = 256, advance: Callable[[int], None] | None = None
) -> Score:
    """Run a model in eval mode over a set; its mode is put back.

    Args:
        model: maps inputs to logits (B, 2, ...), on any device.
        examples: at least one, on any device.
        batch_size: rows at a time.
        advance: called with the number of rows done after each batch.
    """
    mode = model.training
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    try:
        for first in range(0, len(examples), batch_size):
            batch = examples[slice(first, first + batch_size)].to(_device(model))
            answers, steps, status = predict(model, batch.inputs)
            same = (
                (answers == batch.targets).flatten(1)
                if answers.dim() > 1
                else (answers == batch.targets)[:, None]
            )
            same = same.cpu()
            parts.append((same.all(dim=1), same.float().mean(dim=1), steps, status))
            if advance is not None:
                advance(len(batch))
    finally:
        model.train(mode)
    return Score(*(torch.cat(column) for column in zip(*parts, strict=True)), difficulty=examples.difficulty)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def rank_correlations(found: Score) -> dict[str, float | None]:
    """Spearman's rank correlation of the steps with each difficulty; None where either is constant."""
    result: dict[str, float | None] = {}
    for name, value in found.difficulty.items():
        constant = len(value) < 3 or len(found.steps.unique()) < 2 or len(value.unique()) < 2
        result[name] = None if constant else float(spearmanr(found.steps, value)[0])  # type: ignore[arg-type]
    return result


@torch.no_grad()
def curve(model: ReasoningNet, examples: Examples, most: int) -> tuple[list[float], list[float]]:
    """Share of whole answers right, and the largest change anywhere, after 1 to ``most`` steps from zero.

    Plain iteration without a stopping rule: accuracy against iterations.
    """
    model.eval()
    examples = examples.to(_device(model))
    x = model.inject(examples.inputs)
    z = model.blank(x)
    right, change = [], []
    for _ in range(most):
        new = model.step(z, x)
        change.append(float((new - z).abs().amax()))
        z = new
        same = model.read(z, x).argmax(dim=1) == examples.targets
        right.append(float(same.flatten(1).all(dim=1).double().mean()))
    return right, change


@torch.no_grad()
def alignment(model: ReasoningNet, examples: Examples, most: int, tol: float = 1e-2) -> dict[str, float]:
    """Asymptotic alignment (Anil et al. 2022): does the end depend on where the iteration began?

    Each input is iterated from zero, and from the state that another input of the batch ended in
    (their section 4). The score is the mean cosine of the two end states; 1 is path-independent.

    Args:
        model: iterates ``model.step``.
        examples: at least two.
        most: steps at most, the same for both.
        tol: stop once nothing changes by more anywhere.

    Returns:
        ``cosine``, and ``answers``: the share of examples whose answers are the same.
    """
    model.eval()
    x = model.inject(examples.inputs.to(_device(model)))
    ended = _settle(model, model.blank(x), x, most, tol)
    other = _settle(model, ended.roll(1, dims=0), x, most, tol)
    cosine = torch.cosine_similarity(ended.flatten(1).double(), other.flatten(1).double(), dim=1)
    answers = model.read(ended, x).argmax(dim=1) == model.read(other, x).argmax(dim=1)
    return {"cosine": float(cosine.mean()), "answers": float(answers.flatten(1).all(dim=1).double().mean())}


def _settle(model: ReasoningNet, z: Tensor, x: Tensor, most: int, tol: float) -> Tensor:
    for _ in range(most):
        new = model.step(z, x)
        change, z = float((new - z).abs().amax()), new
        if change <= tol:
            break
    return z
