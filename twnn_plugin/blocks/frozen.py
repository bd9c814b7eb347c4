"""Holding batch statistics and random draws fixed in replays of a span."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import AttachError
from .attention import attention, multihead
from .draws import random_state, same
from .recomputing import Lookout

__all__ = ["PRESENT", "Frozen", "Moments", "Place"]

Moments = tuple[Tensor, Tensor]
"""Biased variance and mean of each channel, (C,)."""

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_SHIFTING = {F.alpha_dropout, F.feature_alpha_dropout}
_DROPPED = -1.7580993408473766  # what alpha dropout sets a unit to: minus scale times alpha of SELU
_FRESH = {torch.rand_like, torch.randn_like, torch.bernoulli}
_SIZED = {torch.rand, torch.randn}
_FILLING = {
    torch.Tensor.bernoulli_,
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.exponential_,
}


class _Present(threading.local):
    """What is watched and what is held fixed in this thread, outermost first."""

    def __init__(self) -> None:
        self.watching: weakref.WeakSet[Any] = weakref.WeakSet()
        self.held: list[Frozen] = []
        self.recomputing = 0  # blocks of our own gradient checkpointing that are being evaluated


PRESENT = _Present()


class Place(NamedTuple):
    """How far a replay has come: draws and functional normalisations met, uses of each layer; its rows.

    ``recorded``: it is no replay but the recorded pass itself, whose moments are worked out.
    """

    cursor: int
    met: int
    used: dict[int, int]
    rows: Tensor | None
    recorded: bool = False


class Frozen(TorchFunctionMode):
    """Intercepts normalisation and random draws in replays of a span.

    Args:
        statistics: for the identity of each normalisation, the moments that it used in each of its calls.
        held: modules that are in eval mode within replays: the normalisations that are in training mode,
            which would count a batch or ask other processes, and parametrisations that iterate in
            training (spectral normalisation).
        entry: (B, ...) the span's input in the recorded pass.
        listen: called when a replay begins: lets :meth:`enter_layer` hear of the normalisations.
        holders: where each thread notes itself for as long as the modules are in eval mode for it.
    """

    def __init__(
        self,
        statistics: Mapping[int, Sequence[Moments]],
        held: Iterable[nn.Module],
        entry: Tensor,
        listen: Callable[[], None],
        holders: list[int],
    ):
        super().__init__()
        self._listen, self._holders = listen, holders
        self.statistics, self.batch, self.device = dict(statistics), entry.shape[0], entry.device
        self.modules = tuple(held)
        self._modes: list[list[bool]] = []
        self.checked = False
        self.recording = False
        self.draws: list[Tensor] = []
        self.functional: list[Moments] = []
        """Moments of normalisations that no layer made: calls of ``F.batch_norm``."""
        self.spared = False
        """Whether running statistics that are not a batch's were kept from being counted again."""
        self.lookout: Lookout | None = None  # who looks at the places where something is held
        self.current: int | None = None
        self.entered: dict[int, int] = {}
        self._go_to(Place(0, 0, {}, None))

    def _go_to(self, place: Place) -> None:
        self.cursor, self.met, self.used, self.rows, self.recorded = place
        self.current = None

    def place(self) -> Place:
        """Where the present replay is."""
        if self.recording:
            return Place(len(self.draws), len(self.functional), dict(self.used), None, recorded=True)
        return Place(self.cursor, self.met, dict(self.used), self.rows, self.recorded)

    def enter_layer(self, norm: nn.Module) -> None:
        """A normalisation is about to run."""
        if id(norm) in self.statistics:
            self.current = id(norm)
            self.entered[id(norm)] = self.entered.get(id(norm), 0) + 1

    def is_heard_by(self, listen: Callable[[], None]) -> bool:
        """Whether it was made with this; another group may listen to the same normalisations."""
        return self._listen == listen

    def __enter__(self) -> Frozen:
        self._listen()
        PRESENT.held.append(self)
        self._holders.append(threading.get_ident())
        self._modes.append([module.training for module in self.modules])
        for module in self.modules:
            module.training = False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        PRESENT.held.remove(self)
        for module, mode in zip(self.modules, self._modes.pop(), strict=True):
            module.training = mode
        self._holders.remove(threading.get_ident())
        super().__exit__(*error)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within this, draws and the moments of functional normalisations are made and kept."""
        self.recording, self.draws, self.functional = True, [], []
        self._go_to(Place(0, 0, {}, None))
        try:
            with self:
                yield
        finally:
            self.recording = False

    @contextmanager
    def replay(self, rows: Tensor | None) -> Iterator[None]:
        """Within this, what was kept is used again, for the given rows of the recorded batch."""
        self._go_to(Place(0, 0, {}, rows))
        before = None if self.checked else random_state(self.device)
        self.entered = {}
        with self:
            yield
        if before is None:
            return
        if not same(before, random_state(self.device)):
            raise AttachError(
                "A module of this span draws random numbers in a way that cannot be held fixed while the "
                "span is iterated (dropout, drop-path, attention dropout and torch.rand and the like can). "
                "Choose another span, or switch that module off."
            )
        if any(self.used.get(norm, 0) < count for norm, count in self.entered.items()):
            raise AttachError(
                "A BatchNorm layer of this span normalises in a way of its own, not by F.batch_norm, so that "
                "its statistics cannot be held fixed while the span is iterated. Choose another span, or put "
                "that layer into eval mode."
            )
        self.checked = True

    @contextmanager
    def shaken(self, amount: float) -> Iterator[None]:
        """Within this, the moments are off by some ``amount`` of their size, as rounding might have it."""
        generator, kept = torch.Generator("cpu").manual_seed(0), (self.statistics, self.functional)

        def off(moments: Moments) -> Moments:
            var, mean = moments
            one, two = (torch.randn(var.shape, generator=generator, device="cpu").to(var) for _ in range(2))
            return var * (1 + amount * one), mean + amount * two * (mean.abs() + var.sqrt())

        self.statistics = {norm: [off(m) for m in calls] for norm, calls in self.statistics.items()}
        self.functional = [off(m) for m in self.functional]
        try:
            yield
        finally:
            self.statistics, self.functional = kept

    @contextmanager
    def repeated(self, place: Place) -> Iterator[None]:
        """Within this, the part of a replay that begins at ``place`` is computed once more."""
        before, recording = self.place(), self.recording
        if recording:
            before = Place(self.cursor, self.met, self.used, self.rows)
        self._go_to(place._replace(used=dict(place.used)))
        self.recording = False
        try:
            with self:
                yield
        finally:
            self._go_to(before)
            self.recording = recording

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.instance_norm:
            return self._instance_norm(*args, **kwargs)
        if func in _DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func in _SHIFTING:
            return self._shifting_dropout(func, *args, **kwargs)
        if func is F.rrelu:
            return self._rrelu(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attention(self._mask, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            return multihead(self._mask, *args, **kwargs)
        if func in _FILLING:
            made = self._draw(args[0].shape, lambda: func(*args, **kwargs).clone())
            return args[0].copy_(made)
        if func in _FRESH:
            return self._draw(args[0].shape, lambda: func(*args, **kwargs)).clone()
        if func in _SIZED:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], (tuple, list)) else args)
            return self._draw(torch.Size(size), lambda: func(*args, **kwargs)).clone()
        return func(*args, **kwargs)

    def _look(self) -> None:
        if self.lookout is not None and not PRESENT.recomputing:
            self.lookout.look()

    def _draw(self, shape: torch.Size, make: Callable[[], Tensor]) -> Tensor:
        """What was drawn at this place in the recorded pass, for the rows at hand."""
        self._look()
        if self.recording:
            drawn = make()
            self.draws.append(drawn)
            return drawn
        if self.cursor >= len(self.draws):
            raise AttachError("A replay of this span draws more random numbers than the recorded pass did.")
        drawn = self.draws[self.cursor]
        self.cursor += 1
        if self.rows is None or drawn.shape[:1] == shape[:1]:  # all rows, or one draw for the whole batch
            return drawn
        rows = self.rows.numel()
        if drawn.shape[0] % self.batch or shape[0] * self.batch != drawn.shape[0] * rows:
            raise AttachError(
                "A module of this span draws random numbers that cannot be split by samples: "
                f"{tuple(drawn.shape)} for {self.batch} samples, {tuple(shape)} for {rows}. Choose another "
                "span, or switch that module off."
            )
        share = drawn.shape[0] // self.batch  # windows or heads folded into the batch
        return drawn.view(self.batch, share, *drawn.shape[1:])[self.rows].flatten(0, 1)

    def _mask(self, like: Tensor, p: float) -> Tensor:
        """A dropout mask, scaled, of the shape of ``like``."""
        return self._draw(like.shape, lambda: F.dropout(torch.ones_like(like), p, True))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        moments = self._moments(input, training)
        if moments is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        var, mean = moments
        scale = torch.rsqrt(var + eps)
        scale = scale if weight is None else scale * weight
        shift = -mean * scale
        shift = shift if bias is None else shift + bias
        shape = [1, -1] + [1] * (input.dim() - 2)
        return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)

    def _moments(self, input: Tensor, training: bool) -> Moments | None:
        """The moments that the call at hand used in the open-loop pass; None: running statistics."""
        layer, self.current = self.current, None
        if layer is not None or training:
            self._look()
        if layer is not None:
            calls, count = self.statistics[layer], self.used.get(layer, 0)
            self.used[layer] = count + 1
            return calls[min(count, len(calls) - 1)]
        if not training:
            return None
        if self.recording or self.recorded:  # or made again by gradient checkpointing, which compares the two
            wide = input.to(torch.promote_types(input.dtype, torch.float32))
            axes = [0, *range(2, input.dim())]
            moments = torch.var_mean(wide, dim=axes, correction=0)
            if self.recording:
                self.functional.append(moments)
            return moments
        if self.met >= len(self.functional):
            raise AttachError("A replay of this span normalises batches that the recorded pass did not.")
        self.met += 1
        return self.functional[self.met - 1]

    def _instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if use_input_stats:  # each sample by its own statistics; the running ones have been counted
            self.spared = self.spared or running_mean is not None
            running_mean = running_var = None
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    def _dropout(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0:
            return func(input, p, training, inplace)
        return input * self._draw(input.shape, lambda: func(torch.ones_like(input), p, True))

    def _shifting_dropout(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = False,
        inplace: bool = False,
    ) -> Tensor:
        """Alpha dropout (Klambauer et al. 2017): a factor and a shift for each unit, or for each channel."""
        if not training or p == 0:
            return func(input, p, training, inplace)

        def make() -> Tensor:
            whole = func is F.alpha_dropout
            like = input if whole else input.flatten(2)[..., :1] if input.dim() > 2 else input
            kept = (F.dropout(torch.ones_like(like), p, True) > 0).to(input.dtype)
            kept = kept if whole else kept.view(*kept.shape[:2], *[1] * (input.dim() - 2)).expand_as(input)
            factor = (1 - p + _DROPPED**2 * p * (1 - p)) ** -0.5
            return torch.stack([factor * kept, factor * _DROPPED * ((1 - kept) - p)], dim=1)

        factor, shift = self._draw(input.shape, make).unbind(dim=1)
        return input * factor + shift

    def _rrelu(
        self,
        input: Tensor,
        lower: float = 1.0 / 8,
        upper: float = 1.0 / 3,
        training: bool = False,
        inplace: bool = False,
    ) -> Tensor:
        if not training:
            return F.rrelu(input, lower, upper, training, inplace)
        slope = self._draw(input.shape, lambda: torch.empty_like(input).uniform_(lower, upper))
        return torch.where(input >= 0, input, input * slope)
