"""Keeping a stated open share on samples as they arrive, without labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["check_follow", "followed"]

_LEAST = 1e-3  # spread: where all scores lie at the threshold, it must be able to leave them


def check_follow(rate: Any, budget: Any, control: str) -> None:
    """Raise :class:`~twnn_plugin.errors.OptionError` unless a gate can follow at this rate.

    Args:
        rate: of a gate; None: it need not.
        budget: its budget.
        control: what keeps that.
    """
    if rate is None:
        return
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise OptionError(
            "A gate's follow is the pace in (0, 1] at which its threshold goes after the wanted share in "
            f"eval mode, such as 0.01 to remember about a hundred samples, or None; got {rate!r}."
        )
    if budget is None or control != "threshold":
        raise OptionError(
            f"A gate with follow={rate!r} goes after the share of a budget that its threshold keeps: give a "
            f'budget, and control="threshold"; got budget={budget!r}, control={control!r}.'
        )


@torch.no_grad()
def followed(
    threshold: Tensor, spread: Tensor, score: Tensor, wanted: float, rate: float
) -> tuple[Tensor, Tensor]:
    """The threshold after some samples were decided by it: higher if too many were open, else lower.

    The feedback of Gibbs & Candes 2021 ("Adaptive conformal inference under distribution shift", equation 2):
    ``threshold += step * (open share - wanted)``. As the threshold only falls while something is closed and
    only rises while something is open, it stays among the scores, and so the mean error of n passes of equal
    size and step is at most ``(range of the scores + step) / (step * n)``, whatever the samples are (their
    proposition 4.1). A quantile of the last batch would need large ones, and is biased where they are small.

    Args:
        threshold: (), by which the samples were decided.
        spread: (), root mean square of earlier scores less the threshold; negative: there were none. It
            is the unit of the step, so that ``rate`` means the same for every gate, and bounds it for
            large batches, which would overshoot otherwise.
        score: (B,); rows that are not finite count for nothing.
        wanted: share of open samples in [0, 1].
        rate: in (0, 1], the step for one sample, in spreads.

    Returns:
        The threshold and the spread for the samples to come.
    """
    fine = score.to(threshold.dtype)
    finite = fine.isfinite()
    count = finite.sum()
    away = torch.where(finite, fine - threshold, 0.0)
    some = count.clamp(min=1)
    square = (away * away).sum() / some
    # Of earlier samples: a unit of these ones would weigh their errors by what they are.
    unit = torch.where(spread < 0, square.sqrt(), spread).clamp(min=_LEAST)
    reach = -torch.expm1(count * math.log1p(-rate)) if rate < 1 else (count > 0).to(threshold.dtype)
    share = (away > 0).sum() / some
    moved = threshold + torch.where(count > 0, unit * reach * (share - wanted), 0.0)
    known = torch.where(spread < 0, square, spread * spread)
    renewed = torch.lerp(known, square, reach.to(square)).sqrt()
    return moved, torch.where(count > 0, renewed, spread)
