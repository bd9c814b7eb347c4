"""A gate with weights: a small perceptron, a threshold, a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels, transforms
from ..errors import OptionError
from .base import POOLINGS, Gate, choose, ordinary
from .budget import Budget
from .following import check_follow, followed

__all__ = ["LearnedGate", "largest"]

_EFFORT = 10.0  # replays per open sample that are assumed until some were counted
_INTEGRAL, _PROPORTIONAL = 0.005, 1.0  # gains of the dual variable, in units of its bound, per step
_FLOOR = 0.05  # least slope of the budget's penalty, that of a sigmoid being 0.25 at most
_SLOPE = 0.1  # of hidden units below zero: where all of ReLUs are silent, samples share one score
_LEAST = 0.01  # added to the features' variance: what hardly ever differs is not blown up
_HALF = (torch.float16, torch.bfloat16)
_BUFFERS = (
    "threshold",
    "dual",
    "integral",
    "excess",
    "effort",
    "price",
    "running_mean",
    "running_var",
    "spread",
)


class LearnedGate(Gate):
    """A small perceptron on normalised features, with a threshold, and a budget that it keeps.

    Features are layer-normalised sample by sample (means and maxima each by themselves), so that the scores
    of a fresh gate are bounded. With a budget they are then standardised by their running mean and variance
    in training: features that differ little between samples, next to large ones that differ not at all,
    would be learned from too slowly.

    With ``budget`` set, one of two controls makes the share of open samples what it allows:

    - ``"threshold"``: the threshold follows the quantile of the scores seen in training above which the
      wanted share lies. It needs nothing of the loss and can collapse neither to never nor to always. It
      starts at zero, above the scores of a fresh gate, and comes down over some ``1 / momentum`` steps, which
      opens the gate gradually.
    - ``"dual"``: the threshold stays; :meth:`penalty` is ``dual * (mean probability - share)``, and ``dual``
      follows the error of the share by proportional-integral control (Stooke et al. 2020, "Responsive safety
      in reinforcement learning by PID Lagrangian methods"): it rises while too many samples are open and may
      go below zero while too few are. It is bounded by ``dual_bound``, integrates no further at the bound,
      and its gradient on the scores has a floor, so that it can neither blow up nor die out.

    Threshold, dual variable, what they follow and the features' moments are buffers: they are in the
    checkpoint, and DistributedDataParallel gives all ranks those of the first, by whose samples they go. They
    stay in float32 where the weights are cast to float16 or bfloat16, whose rounding is coarser than their
    steps; so do the scores, the margins and what is made of them.

    Args:
        channels: of the activations.
        hidden: width of the hidden layer.
        bias: initial score; negative is closed.
        temperature: scores are divided by it; None: :attr:`usual_temperature`.
        budget: share of open samples in (0, 1), ``"1.2x"`` (mean multiply-adds relative to the plain
            network), ``"2 rows"`` (mean replays a sample), or None for a fixed threshold.
        momentum: of the running quantile and the other running means, per training step.
        learn: what the score is trained for. ``"benefit"``: how much opening lowers the loss
            (straight-through gradient). ``"difficulty"``: whether the sample is among the hardest
            share of its batch (the budget's, or half), see :func:`~twnn_plugin.gates.watch_difficulty` and,
            with a closed head, :func:`~twnn_plugin.gates.watch_closed_difficulty`.
            None: difficulty if there is a budget kept by the threshold, else benefit.
        control: ``"threshold"`` or ``"dual"``; the second needs ``auxiliary_loss`` added to the loss.
        dual_bound: largest modulus of the dual variable.
        per: ``"sample"``: one strength a sample; ``"channel"``: one for each channel of the message; a sample
            is open if any is.
        outputs: channels of the message, for ``per="channel"`` alone; None: as many as ``channels``.
        l0: weight of the expected share of open gates, the mean probability, in :meth:`penalty`.
        pooling: ``"avg"``, or ``"catavgmax"`` for the maxima over positions beside the means; see
            :class:`~twnn_plugin.gates.Gate`.
        follow: in (0, 1], the pace at which the threshold goes after the budget's share in eval mode, too:
            about ``1 / follow`` samples are remembered; see :func:`~twnn_plugin.gates.following.followed`.
            The share is met then on samples that are not like those of the training, without labels. A
            batch is decided before it moves the threshold, so that its samples do not depend on each
            other; they do depend on the batches before, and the threshold in the checkpoint moves. None:
            the threshold stands still in eval mode.

    Raises:
        OptionError: an option is out of range.
    """

    usual_temperature: ClassVar[float] = 1.0
    by_margin: ClassVar[bool] = False
    """Whether in eval mode a sample opens where its margin is positive, and only there: a glance tells."""

    def __init__(
        self,
        channels: int,
        hidden: int = 32,
        bias: float = -2.0,
        temperature: float | None = None,
        budget: float | str | None = None,
        momentum: float = 0.05,
        learn: str | None = None,
        control: str = "threshold",
        dual_bound: float = 10.0,
        per: str = "sample",
        outputs: int | None = None,
        l0: float = 0.0,
        pooling: str = "avg",
        follow: float | None = None,
    ):
        super().__init__()
        choose("learn", learn, (None, "benefit", "difficulty"))
        choose("control", control, ("threshold", "dual"))
        choose("per", per, ("sample", "channel"))
        _check_whole("channels", channels)
        _check_whole("hidden", hidden)
        _check_outputs(outputs, per)
        if not _is_number(bias):
            raise OptionError(f"A gate's bias is its initial score, a number; got {bias!r}.")
        numbers = all(map(_is_number, (dual_bound, momentum, l0)))
        if not numbers or not dual_bound > 0 or not 0 < momentum <= 1 or not l0 >= 0:
            raise OptionError(
                "A gate's dual_bound is positive, its momentum in (0, 1], and l0 at least 0; got "
                f"{dual_bound!r}, {momentum!r} and {l0!r}."
            )
        choose("pooling", pooling, POOLINGS)
        self.channels, self.outputs, self.pooling = channels, outputs or channels, pooling
        self.temperature = self.usual_temperature if temperature is None else temperature
        self.budget, self.momentum, self.learn = budget, momentum, learn
        self.control, self.dual_bound, self.per, self.l0 = control, dual_bound, per, l0
        self.follow = follow
        width = channels * (2 if pooling == "catavgmax" else 1)
        self.hidden = nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1 if per == "sample" else self.outputs)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.constant_(self.score.bias, bias)
        self.threshold: Tensor
        self.dual: Tensor
        self.integral: Tensor
        self.excess: Tensor
        self.effort: Tensor
        self.price: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.spread: Tensor
        zero = torch.zeros((), dtype=_fine(torch.get_default_dtype()))
        self.register_buffer("threshold", zero)
        self.register_buffer("dual", zero.clone())  # of the last step
        self.register_buffer("integral", zero.clone())  # its slow part
        self.register_buffer("excess", zero.clone())  # running mean of open share minus wanted share
        self.register_buffer("effort", torch.full_like(zero, _EFFORT))  # running mean of replays if open
        self.register_buffer("price", torch.ones_like(zero))  # of a replay, in passes of the plain network
        self.register_buffer("running_mean", zero.new_zeros(width))  # of the layer-normalised features
        self.register_buffer("running_var", zero.new_ones(width))
        # Of the scores about the threshold, since the gate began to follow; less than zero: nothing is known.
        self.register_buffer("spread", torch.full_like(zero, -1.0), persistent=False)
        self._penalty: Tensor | None = None
        self._seen = _Seen()
        self._glance = kernels.Glance(_LEAST, _SLOPE)

    @property
    def dtype(self) -> torch.dtype:
        return _dtype_of(self.hidden, self.threshold)

    @property
    def scores(self) -> Tensor | None:
        """(B,) scores of the last pass, without a graph; None before the first."""
        score = self._seen.score
        if isinstance(score, kernels.Told):
            score = score.tensor()
        return None if score is None else largest(self._each(score))

    @property
    def budget(self) -> float | str | None:
        """The budget as it was given."""
        return self._given

    @budget.setter
    def budget(self, given: float | str | None) -> None:
        self._budget = None if given is None else Budget.parse(given)
        self._given = given

    @property
    def follow(self) -> float | None:
        """The pace at which the threshold goes after the budget's share in eval mode; None: not at all."""
        return self._follow_rate

    @follow.setter
    def follow(self, rate: float | None) -> None:
        check_follow(rate, self._given, self.control)
        self._follow_rate = rate

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Within this, the threshold stands still in eval mode, whatever :attr:`follow` is."""
        rate, self._follow_rate = self._follow_rate, None
        try:
            yield
        finally:
            self._follow_rate = rate

    @property
    def temperature(self) -> float:
        """What scores are divided by."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise OptionError(f"A gate's temperature must be a positive number; got {value!r}.")
        self._temperature = float(value)

    def check_fits(self, channels: int, outputs: int) -> None:
        """Refuse a wormhole that the gate was not made for.

        Args:
            channels: of the state that the gate looks at.
            outputs: channels of the message.

        Raises:
            OptionError: the gate was made for others.
        """
        if self.channels != channels:
            raise OptionError(
                f"This {type(self).__name__} was made for states of {self.channels} channels, and the "
                f"wormhole's source has {channels}: make it with channels={channels}, or give its name alone "
                "or (name, options), of which a gate of the right size is made."
            )
        if self.per == "channel" and self.outputs != outputs:
            raise OptionError(
                f"This {type(self).__name__} was made for messages of {self.outputs} channels, and the "
                f"wormhole's has {outputs}: make it with outputs={outputs}, or give its name with "
                "{'per': 'channel'}, of which a gate of the right size is made."
            )

    def wanted(self) -> float | None:
        """The share of samples, in [0, 1], that the budget allows to open; None without a budget."""
        if self._budget is None:
            return None
        if self._budget.kind == "share":
            return self._budget.value
        return self._budget.share(float(self.effort), float(self.price))

    def replays(self) -> float | None:
        """The mean replays per sample that the budget allows; None without a budget, or for a share."""
        return None if self._budget is None else self._budget.replays(float(self.price))

    def counts_cost(self) -> bool:
        """Whether the budget is in multiply-adds, so that :attr:`price` matters."""
        return self._budget is not None and self._budget.kind == "cost"

    def share(self) -> float:
        wanted = self.wanted()
        return 0.5 if wanted is None else min(max(wanted, 0.02), 0.98)

    def learns_difficulty(self) -> bool:
        """Whether the score is trained for difficulty."""
        kept = self._budget is not None and self.control == "threshold"
        return self.learn == "difficulty" or (self.learn is None and kept)

    def observe(self, steps: Tensor) -> None:
        if steps.numel() and self._budget is not None:
            step = steps.float().mean().to(self.effort) - self.effort
            self.put("effort", self.effort + self.momentum * step)

    def put(self, name: str, value: float | Tensor) -> None:
        """Give one of the gate's buffers a new value.

        Not in place: graphs still need the old one, and who may have to put it back has kept it. In inference
        mode and under ``torch.func``, too, the new one is an ordinary tensor, which can be loaded into and
        trained with later; under ``vmap``, where there are many at once, the old one stays.

        Args:
            name: of the buffer, such as ``"threshold"``.
            value: a number or a tensor like the buffer; taken over in its dtype and on its device.
        """
        old: Tensor = getattr(self, name)
        new = value.to(old) if isinstance(value, Tensor) else torch.full_like(old, value)
        plain = transforms.value_of(new)
        if plain is not None:
            setattr(self, name, ordinary(plain))

    def penalty(self) -> Tensor | None:
        return self._penalty

    def margin(self, features: Tensor) -> Tensor:
        """(B,) or, per channel, (B, C) score minus threshold, over the temperature.

        In training, brings what keeps the budget up to date.
        """
        normal = self._normal(features)
        score = self._scored(normal)
        margin = (self._each(score) - self.threshold) / self.temperature
        seen = score.detach()
        self._seen.score = None if transforms.wraps(seen) else seen
        self._penalty = None
        if self.training and self._budget is not None and score.numel():
            self._know(normal)
            if self.control == "threshold":
                self._follow(largest(self._each(seen)))
            else:
                self._press(largest(margin))
        elif self._follows() and _arrives(seen):
            moved = followed(
                *(self.threshold, self.spread, largest(self._each(seen))),
                *(self.wanted() or 0.0, self._follow_rate or 0.0),
            )
            self.put("threshold", moved[0])
            self.put("spread", moved[1])
        return margin

    def _follows(self) -> bool:
        """Whether a pass in eval mode moves the threshold."""
        return self._follow_rate is not None and self._budget is not None and not self.training

    def glance(self, features: Tensor) -> Callable[[], Tensor] | None:
        if self.training or not self.by_margin or not features.numel() or transforms.many(features):
            return None
        if self._follows():  # which is in forward
            return None
        threshold, first = self.threshold, self.hidden
        dtype = _dtype_of(first, threshold)
        given = features if features.dtype == dtype else features.to(dtype)
        # By forward, since the machinery of a module's call takes longer than what these two compute.
        hidden = F.leaky_relu(first.forward(self._standard(self._normal(given))), _SLOPE)
        score = self.score.forward(hidden) if dtype == threshold.dtype else self._fine_score(hidden)
        above = score - threshold
        if not (above if above.numel() == 1 else above.amax()).item() <= 0:  # nor is NaN
            return None
        self._seen.score = score
        if self._penalty is not None:
            self._penalty = None
        return partial(self._chance, above, self.temperature)

    def look(self, out: Tensor, layout: str) -> tuple[Callable[[], Tensor] | None] | None:
        if self.training or not self.by_margin or type(self).glance is not LearnedGate.glance:
            return None
        if self._follows():
            return None
        own, buffers = self._modules, self._buffers  # a fifth of the time that the attributes take
        hidden, scorer, threshold = own.get("hidden"), own.get("score"), buffers.get("threshold")
        mean, variance = buffers.get("running_mean"), buffers.get("running_var")
        if hidden is None or scorer is None or threshold is None or mean is None or variance is None:
            return None
        told = self._glance(out, layout, hidden, scorer, threshold, mean, variance)
        if told is None:
            return None
        seen = told[0]
        if seen is None:
            return (None,)
        self._seen.score = seen
        if self._penalty is not None:
            self._penalty = None
        # By the threshold and the temperature of now, whatever becomes of them before anybody asks.
        return (partial(self._chance, seen, self._temperature),)

    def chance(self, margin: Tensor, temperature: float) -> Tensor:
        """The probabilities at some margins, with the temperature that these were made with."""
        return torch.sigmoid(margin)

    def _chance(self, found: Tensor | kernels.Told, temperature: float) -> Tensor:
        """The probabilities for scores less the threshold, or beside it, as :meth:`forward` makes them."""
        with torch.no_grad():
            above = found.tensor() - found.threshold if isinstance(found, kernels.Told) else found
            return self.chance(self._each(above) / temperature, temperature)

    def _normal(self, features: Tensor) -> Tensor:
        """The features, means and maxima each of mean zero and variance one over the channels."""
        width = self.running_mean.shape[0]
        if features.shape[1] != width:
            kinds = "means and maxima" if self.pooling == "catavgmax" else "means"
            raise OptionError(
                f"This {type(self).__name__} looks at (B, {width}) features, the {kinds} over positions of "
                f"{self.channels} channels; got {tuple(features.shape)}."
            )
        parts = features.unflatten(1, (-1, self.channels))
        return F.layer_norm(parts, parts.shape[2:]).flatten(1)

    def _standard(self, normal: Tensor) -> Tensor:
        """The same, each of mean zero and a variance of about one over the samples of the training."""
        fine = normal.to(self.running_mean.dtype)
        return F.batch_norm(fine, self.running_mean, self.running_var, eps=_LEAST).to(normal.dtype)

    @torch.no_grad()
    def _know(self, normal: Tensor) -> None:
        """Take a batch's features into their running mean and variance, for the passes to come."""
        away = normal.to(self.running_mean.dtype) - self.running_mean
        self.put("running_mean", self.running_mean + self.momentum * away.mean(dim=0))
        self.put("running_var", torch.lerp(self.running_var, away.square().mean(dim=0), self.momentum))

    def _scored(self, normal: Tensor) -> Tensor:
        """(B, 1) or, per channel, (B, C) scores."""
        hidden = F.leaky_relu(self.hidden(self._standard(normal)), _SLOPE)
        return self.score(hidden) if hidden.dtype == self.threshold.dtype else self._fine_score(hidden)

    def _fine_score(self, hidden: Tensor) -> Tensor:
        """The scores in the threshold's dtype: in that of half weights, many round to the same number."""
        weight, bias = self.score.weight, self.score.bias
        dtype = self.threshold.dtype
        return F.linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))

    def _each(self, score: Tensor) -> Tensor:
        """(B,) of (B, 1); (B, C) as it is."""
        return score.squeeze(-1) if self.per == "sample" else score

    def priced(self, probability: Tensor) -> Tensor:
        """The probabilities; in training, their mean joins the penalty with weight ``l0``."""
        if self.l0 and self.training and probability.numel():
            expected = self.l0 * torch.nan_to_num(probability).mean()
            self._penalty = expected if self._penalty is None else self._penalty + expected
        return probability

    @torch.no_grad()
    def _follow(self, score: Tensor) -> None:
        """Move the threshold towards the wanted share's quantile of this batch."""
        # The estimate with the least bias whatever the distribution (Hyndman & Fan 1996, definition 8):
        # torch's own is too low for a small share of a small batch, and what follows it opens too many.
        count = score.numel()
        place = (1 - (self.wanted() or 0.0)) * (count + 1 / 3) - 2 / 3
        target = torch.quantile(score.float(), min(max(place / max(count - 1, 1), 0.0), 1.0))
        # A NaN sample must not reach the threshold, which all samples share.
        step = torch.nan_to_num(target - self.threshold, nan=0.0, posinf=0.0, neginf=0.0)
        self.put("threshold", self.threshold + self.momentum * step.to(self.threshold.dtype))

    def _press(self, margin: Tensor) -> None:
        """Bring the dual variable up to date, and make the penalty of this step."""
        wanted = self.wanted() or 0.0
        with torch.no_grad():
            error = (margin > 0).to(self.excess.dtype).mean() - wanted
            self.put("excess", self.excess + self.momentum * (error - self.excess))
            bound = self.dual_bound
            # Clamping the integral is the anti-windup: at the bound it takes in no more of the same sign.
            self.put("integral", (self.integral + bound * _INTEGRAL * error).clamp(-bound, bound))
            self.put("dual", (self.integral + bound * _PROPORTIONAL * self.excess).clamp(-bound, bound))
        # The slope of a sigmoid dies out far from the threshold: some of the way is straight.
        reach = torch.sigmoid(margin) + _FLOOR * (margin - margin.detach())
        self._penalty = self.dual.to(margin.dtype) * (torch.nan_to_num(reach).mean() - wanted)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedGate:
        before = {name: buffer for name in _BUFFERS if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new: Tensor = getattr(self, name)
            if new.dtype != _fine(new.dtype):  # made again from the old one, which has not been rounded
                self._buffers[name] = old.to(new.device, _fine(new.dtype))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in _BUFFERS:  # with assign=True, buffers have the dtype of the checkpoint's
            value = self._buffers.get(name)
            if value is not None:
                self._buffers[name] = value.to(_fine(value.dtype))

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_penalty": None, "_seen": _Seen()}


def _arrives(score: Tensor) -> bool:
    """Whether these are scores of samples, and not of a graph that is made for others."""
    if not score.numel() or transforms.wraps(score) or transforms.exporting():
        return False
    return not torch.jit.is_tracing() and not torch.compiler.is_compiling()


@dataclass
class _Seen:
    """Of the last pass, in a place that takes less time to write to than a module."""

    score: Tensor | kernels.Told | None = None  # (B, 1) or (B, C), without a graph


def _dtype_of(layer: nn.Linear, threshold: Tensor) -> torch.dtype:
    """What a layer computes in, beside a threshold: both have one dtype, but where the weights are half."""
    weight = layer._parameters.get("weight")  # a fifth of the time that the attribute takes
    kept = getattr(layer.weight if weight is None else weight, "dtype", None)  # quantised layers have none
    return kept if kept in _HALF else threshold.dtype


def _fine(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gate's buffers beside weights of a dtype: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(rows: Tensor) -> Tensor:
    """(B,) of (B,), or the largest of each row of (B, C)."""
    return rows if rows.dim() == 1 else rows.amax(dim=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"A gate's {name} must be a whole number, at least 1; got {value!r}.")


def _check_outputs(outputs: Any, per: str) -> None:
    if outputs is None:
        return
    _check_whole("outputs", outputs)
    if per != "channel":
        raise OptionError(
            f"A gate's outputs are the channels of the message with per='channel'; got outputs={outputs!r} "
            f"with per={per!r}, where there is one strength a sample. Leave outputs out."
        )
