"""Evaluation of a classifier: how right, how calibrated, how much work, how fast."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from twnn_plugin.selection import Reward, selection_of

from .errors import DataError
from .metrics import ClassificationSums, WormholeSums
from .selecting import SelectionSums, rewards_of

__all__ = ["EvalResult", "Measured", "autocast", "evaluate", "measure"]

Batch = tuple[Tensor, Tensor]

_ROWS = 1024


@dataclass(frozen=True)
class EvalResult:
    """The figures of one evaluation; those about wormholes are ``None`` for a model without any.

    Attributes:
        samples: images seen.
        accuracy: share classified correctly.
        nll: mean negative log-likelihood, in nats.
        ece: expected calibration error over 15 bins of confidence.
        open_share: share of (image, span) pairs whose gate was open.
        mean_steps: mean iterations of the open pairs; ``None`` if none was open.
        converged_share: share of the open pairs that converged; ``None`` if none was open.
        rows_evaluated: evaluations of spans inside solves, counted in rows, summed over the data.
        multiply_adds: multiply-adds of these evaluations.
        perplexity: of a language model, ``exp(nll)``; its samples are tokens.
        cost: where a policy picks layers, what was computed after the open-loop pass, as a share of the
            network's multiply-adds.
        reward: mean reward of its choices, if a reward was given.
        shares: how often each choice was made, ``"nop"`` among them.
        batch_size: the batch size of ``latency_ms``.
        latency_ms: median time of a forward pass at ``batch_size``, in milliseconds; ``None`` if not timed.
        latency_ms_single: the same for one image.
    """

    samples: int
    accuracy: float
    nll: float
    ece: float
    open_share: float | None = None
    mean_steps: float | None = None
    converged_share: float | None = None
    rows_evaluated: int | None = None
    multiply_adds: int | None = None
    perplexity: float | None = None
    cost: float | None = None
    reward: float | None = None
    shares: dict[str, float] | None = None
    batch_size: int = 0
    latency_ms: float | None = None
    latency_ms_single: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """Sums over a data set; they add up across processes."""

    classes: ClassificationSums
    wormholes: WormholeSums
    choices: SelectionSums | None = None
    rewarded: bool = False
    language: bool = False

    def reduce(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over all processes."""
        self.classes.sums = add_up(self.classes.sums)
        self.wormholes.sums = add_up(self.wormholes.sums)
        if self.choices is not None:
            self.choices.sums = add_up(self.choices.sums)

    def result(self) -> EvalResult:
        """The figures; latency is not among them."""
        return EvalResult(
            samples=self.classes.count,
            accuracy=self.classes.accuracy,
            nll=self.classes.nll,
            ece=self.classes.ece,
            perplexity=_perplexity(self.classes.nll) if self.language else None,
            **self.wormholes.figures(),
            **self._chosen(),
        )

    def _chosen(self) -> dict[str, Any]:
        if self.choices is None:
            return {}
        figures = self.choices.figures()
        reward, cost = figures.pop("reward"), figures.pop("cost")
        shares = {name.removeprefix("share_"): share for name, share in figures.items()}
        return {"cost": cost, "reward": reward if self.rewarded else None, "shares": shares}


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def autocast(device: torch.device, amp: bool, amp_dtype: str = "float16") -> AbstractContextManager[Any]:
    """Mixed precision on ``device``; on a CPU it is bfloat16, which needs no loss scaling."""
    if not amp:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if device.type == "cpu" else getattr(torch, amp_dtype))


def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    amp: bool = False,
    amp_dtype: str = "float16",
    advance: Callable[[], None] = lambda: None,
    reward: Reward | None = None,
) -> Measured:
    """Run ``model`` in eval mode over ``batches`` and add up what it does; its mode is put back.

    Args:
        model: on ``device``.
        batches: images (B, C, H, W) and labels (B,); or (B, T) tokens, and labels or (B, T) next tokens.
        device: where the model is.
        amp: mixed precision.
        amp_dtype: its type, on a GPU.
        advance: called after each batch, for progress bars.
        reward: of choices among layers, for models that have them.
    """
    selection = selection_of(model)
    chosen = None if selection is None else SelectionSums(selection.iterated)
    measured = Measured(ClassificationSums(), WormholeSums(), chosen, reward is not None)
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            with torch.no_grad(), autocast(device, amp, amp_dtype):
                logits = model(images.to(device, non_blocking=True))
            if labels.dim() == 2:
                measured = replace(measured, language=True)
            _add_classes(measured.classes, logits, labels)
            measured.wormholes.update(model)
            if selection is not None and selection.last is not None and chosen is not None:
                earned = reward and rewards_of(selection.last, logits, labels.to(device), reward)
                chosen.update(selection.last, earned)
            advance()
    finally:
        model.train(was_training)
    return measured


def _add_classes(sums: ClassificationSums, logits: Tensor, labels: Tensor) -> None:
    """Add a batch; of a language model in pieces, since a vocabulary is long."""
    if labels.dim() == 1:
        sums.update(logits, labels)
        return
    flat = logits.transpose(1, 2).flatten(0, 1)
    for rows, wanted in zip(flat.split(_ROWS), labels.flatten().split(_ROWS), strict=True):
        sums.update(rows, wanted)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str = "cpu",
    *,
    amp: bool = False,
    amp_dtype: str = "float16",
    latency: bool = True,
    advance: Callable[[], None] = lambda: None,
    reward: Reward | None = None,
) -> EvalResult:
    """Evaluate ``model``, wormholes included.

    Args:
        model: maps images (B, C, H, W) to logits (B, K); moved to ``device``, weights untouched.
        batches: a re-iterable of images and labels (B,), such as :class:`~zoo.data.Batches`.
        device: where to run.
        amp: mixed precision.
        amp_dtype: its type, on a GPU.
        latency: time forward passes as well, after the figures are taken.
        advance: called after each batch, for progress bars.
        reward: of choices among layers, for models that have them.

    Raises:
        DataError: there is no image.
    """
    device = torch.device(device)
    model.to(device)
    measured = measure(model, batches, device, amp=amp, amp_dtype=amp_dtype, advance=advance, reward=reward)
    if not measured.classes.count:
        raise DataError("There are no images to evaluate; choose another data set or split.")
    figures = measured.result().as_dict()
    if latency:
        images = next(iter(batches))[0].to(device)
        with autocast(device, amp, amp_dtype):
            figures["batch_size"] = len(images)
            figures["latency_ms"] = median_latency(model, images)
            figures["latency_ms_single"] = median_latency(model, images[:1])
    return EvalResult(**figures)


def median_latency(model: nn.Module, images: Tensor, warmup: int = 2, repeats: int = 9) -> float:
    """Median time of ``model(images)`` in eval mode, in milliseconds, after ``warmup`` calls."""
    was_training = model.training
    model.eval()
    times = []
    try:
        with torch.no_grad():
            for turn in range(warmup + repeats):
                _wait(images.device)
                start = time.perf_counter()
                model(images)
                _wait(images.device)
                if turn >= warmup:
                    times.append(1e3 * (time.perf_counter() - start))
    finally:
        model.train(was_training)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    """Let the device finish; kernels of a GPU run on after the call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
