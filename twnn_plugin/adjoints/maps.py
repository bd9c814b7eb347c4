"""Maps of explicit arguments, and the maps whose fixed points are the derivatives of theirs.

Every map here is ``z -> h(z, *inputs)`` on (b, D) matrices and depends on nothing else, so that its
derivatives are maps of the same kind: ``fix`` is closed under differentiation.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Joint", "Linear", "Map", "Primal", "Pushed", "Transposed", "pull_inputs", "push_inputs"]

Pull = Callable[[Tensor], Tensor]


class Map(ABC):
    """``z -> h(z, *inputs)``.

    Attributes:
        per_row: for each input, whether it has one row per row of ``z`` (and is gathered with it).
        can_leave: whether rows may leave the batch.
        parts: widths of the parts of the state that must all settle; () for one.
    """

    per_row: tuple[bool, ...]
    can_leave: bool
    parts: tuple[int, ...] = ()

    @abstractmethod
    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor: ...

    def aligned(self, mapped: Sequence[bool]) -> list[bool]:
        """``mapped`` with every input that must differ between instances because another one does."""
        return list(mapped)

    @abstractmethod
    def stack(self, count: int, mapped: Sequence[bool]) -> Map:
        """The map of ``count`` instances at once, whose rows are those of all of them.

        Args:
            count: instances, N; a state has N * b rows.
            mapped: for each input, whether it differs between instances, aligned. An input with rows has
                N * b of them in any case; one without gets a leading axis of size N if it differs.
        """


class Primal(Map):
    """The map that the user gave.

    Args:
        function: of (z, *inputs).
        per_row: see :class:`Map`.
        can_leave: see :class:`Map`.
        coupled: whether rows influence each other.
        context: entered for each evaluation (the autocast state of the call).
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        per_row: Sequence[bool],
        can_leave: bool,
        coupled: bool = False,
        context: Callable[[], Any] = contextlib.nullcontext,
    ):
        self.function = function
        self.per_row = tuple(per_row)
        self.can_leave = can_leave
        self.coupled = coupled
        self.context = context

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        with self.context():
            return self.function(z, *inputs)

    def stack(self, count: int, mapped: Sequence[bool]) -> Map:
        shared = any(m for m, rows in zip(mapped, self.per_row, strict=True) if not rows)
        # Rows that hear of each other, or that close over what belongs to one of them, are known to be rows
        # of the function only in the batch that they were given in.
        if shared or self.coupled or not self.can_leave:
            return _Stacked(self, count, mapped)
        return self  # what all instances share is the same: they are further rows


class _Stacked(Map):
    """Instances that differ in what their rows share, evaluated by ``vmap``; no row leaves."""

    can_leave = False

    def __init__(self, base: Map, count: int, mapped: Sequence[bool]):
        self.base = base
        self.count = count
        self.per_row = base.per_row
        self.dims = tuple(0 if rows or m else None for rows, m in zip(base.per_row, mapped, strict=True))

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.count, rows.shape[0] // self.count))

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        split = [self._split(x) if rows else x for x, rows in zip(inputs, self.per_row, strict=True)]
        return torch.func.vmap(self.base, (0, *self.dims))(self._split(z), *split).flatten(0, 1)

    def stack(self, count: int, mapped: Sequence[bool]) -> Map:
        return _Stacked(self, count, mapped)


class Linear(Map):
    """``u -> A u + g`` with A a derivative of ``base`` at z; inputs (z, *inputs of base, g)."""

    def __init__(self, base: Map):
        self.base = base
        self.per_row = (True, *base.per_row, True)
        self.can_leave = base.can_leave

    @abstractmethod
    def product(self, inputs: Sequence[Tensor]) -> Pull:
        """``u -> A u``; what all products share is computed once."""

    def __call__(self, u: Tensor, *inputs: Tensor) -> Tensor:
        return self.product(inputs)(u) + inputs[-1]

    def aligned(self, mapped: Sequence[bool]) -> list[bool]:
        return [mapped[0], *self.base.aligned(mapped[1:-1]), mapped[-1]]

    def stack(self, count: int, mapped: Sequence[bool]) -> Map:
        return type(self)(self.base.stack(count, mapped[1:-1]))


class Transposed(Linear):
    """``u -> J^T u + g`` with J of ``base`` at z.

    Equation 8 of Habiba & Pearlmutter (2021): the reverse transform of fix is a fix.
    """

    def product(self, inputs: Sequence[Tensor]) -> Pull:
        z, rest = inputs[0], inputs[1:-1]
        _, pull = _vjp(lambda z: self.base(z, *rest), z)
        return lambda u: pull(u)[0]


class Pushed(Linear):
    """``v -> J v + r`` with J of ``base`` at z.

    J v is made of two reverse passes, since forward mode does not nest inside forward mode.
    """

    def product(self, inputs: Sequence[Tensor]) -> Pull:
        z, rest = inputs[0], inputs[1:-1]
        _, push = _vjp(lambda u: _vjp(lambda z: self.base(z, *rest), z)[1](u)[0], torch.zeros_like(z))
        return lambda v: push(v)[0]


class Joint(Map):
    """``(z, v) -> (h(z), J v + sum of dh/dx t)``: primal and tangent together.

    The forward transform of Habiba & Pearlmutter (2021), equation 8. Inputs: those of ``base``, then the
    tangents t of the inputs in ``moving``.

    Args:
        base: the primal map.
        sizes: widths of the parts of its state that must each settle.
        moving: positions of the inputs that have tangents.
    """

    def __init__(self, base: Map, sizes: Sequence[int], moving: Sequence[int]):
        self.base = base
        self.sizes, self.width = tuple(sizes), sum(sizes)
        self.moving = tuple(moving)
        self.per_row = (*base.per_row, *(base.per_row[i] for i in self.moving))
        self.can_leave = base.can_leave
        self.parts = (*self.sizes, *self.sizes)

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        primal, tangent = z.split(self.width, dim=1)
        split = len(self.base.per_row)
        given, tangents = inputs[:split], inputs[split:]

        zero = torch.zeros_like(primal)
        _, push = _vjp(lambda u: _vjp(lambda z: self.base(z, *given), primal)[1](u)[0], zero)
        driven = push_inputs(self.base, primal, given, self.moving, tangents)
        return torch.cat([self.base(primal, *given), push(tangent)[0] + driven], dim=1)

    def aligned(self, mapped: Sequence[bool]) -> list[bool]:
        split = len(self.base.per_row)
        differs = list(mapped)
        for place, i in enumerate(self.moving, start=split):
            differs[i] = differs[i] or differs[place]
        differs[:split] = self.base.aligned(differs[:split])
        for place, i in enumerate(self.moving, start=split):
            differs[place] = differs[i]
        return differs

    def stack(self, count: int, mapped: Sequence[bool]) -> Map:
        return Joint(self.base.stack(count, mapped[: len(self.base.per_row)]), self.sizes, self.moving)


def _vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    out = torch.func.vjp(function, *primals)
    return out[0], out[1]


def pull_inputs(
    h: Map, z: Tensor, inputs: Sequence[Tensor], wanted: Sequence[int], u: Tensor
) -> list[Tensor]:
    """``(dh/dx)^T u`` for the inputs at the positions ``wanted``."""
    if not wanted:
        return []
    _, pull = _vjp(lambda *some: h(z, *_replaced(inputs, wanted, some)), *(inputs[i] for i in wanted))
    return list(pull(u))


def push_inputs(
    h: Map, z: Tensor, inputs: Sequence[Tensor], moving: Sequence[int], tangents: Sequence[Tensor]
) -> Tensor:
    """The sum of ``dh/dx t`` over the inputs at the positions ``moving``."""

    def moved(*some: Tensor) -> Tensor:
        return h(z, *_replaced(inputs, moving, some))

    chosen = [inputs[i] for i in moving]
    _, push = _vjp(lambda u: _vjp(moved, *chosen)[1](u), torch.zeros_like(z))
    return push(tuple(tangents))[0]


def _replaced(inputs: Sequence[Tensor], places: Sequence[int], others: Sequence[Tensor]) -> list[Tensor]:
    out = list(inputs)
    for place, other in zip(places, others, strict=True):
        out[place] = other
    return out
