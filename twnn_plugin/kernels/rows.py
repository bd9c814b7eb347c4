"""The rows of a solve as the compiled kernels know them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .looks import Codes, Looks, Rule, widths
from .switch import library, threads

__all__ = ["SLOTS", "Anderson", "Rows", "moving", "same", "shrunk", "spread"]

SLOTS = 64
"""The longest history of :class:`Anderson`."""


class Rows(Looks):
    """What is known of every row of a batch, and what was written down of the finished ones.

    Args:
        z: (B, D) the starting states.
        rule: when a row is finished.
        codes: what to write down.
        scale: (B,) what the tolerance is relative to instead; or None.
    """

    def __init__(self, z: Tensor, rule: Rule, codes: Codes, scale: Tensor | None = None):
        batch = z.shape[0]
        super().__init__(z, rule, codes, batch, scale)
        self._here = batch
        assert library is not None
        library.begin(batch, *self._addresses[1:4])

    def store(self, z: Tensor, fz: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The values, (count, D), of the rows that finished in the last look, and their places, (count,)."""
        assert library is not None
        _, going, _, places, status, _, _ = self._addresses
        value, stored = z.new_empty((count, self._width)), self._places.new_empty(count)
        library.store(
            len(z),
            self._width * z.element_size(),
            fz.data_ptr(),
            z.data_ptr(),
            going,
            places,
            status,
            value.data_ptr(),
            stored.data_ptr(),
            self.codes.max_iter,
            self.codes.non_finite,
        )
        return value, stored

    def compact(self, unfinished: int) -> Tensor:
        """Drop the finished rows; (b,) the others' places, ascending."""
        assert library is not None
        kept = self._places.new_empty(unfinished)
        marks, going, _, places, *_ = self._addresses
        library.compact(self._marks.element_size(), self._here, marks, going, places, kept.data_ptr())
        self._here = unfinished
        return kept

    @property
    def going(self) -> Tensor:
        """(b,) uint8 of the rows that are present.

        1 for those that are not finished, 2 for those that finished in the last look and wait for ``store``.
        """
        return self._going[: self._here]

    @property
    def places(self) -> Tensor:
        """(b,) of the rows that are present in the batch."""
        return self._places[: self._here]


def same(x: Tensor, z: Tensor) -> Tensor:
    """``x`` as the kernels read it: of the dtype of ``z``, its rows one after the other, nothing left to do.

    Raises:
        ValueError: its shape is not that of ``z``, or it is not on the CPU: nothing may be read there.
    """
    if x.shape != z.shape or not x.is_cpu:
        raise ValueError(f"The kernels need {tuple(z.shape)} on the CPU; got {tuple(x.shape)} on {x.device}.")
    if x.is_neg():  # a view that is to be negated when it is read
        x = x.resolve_neg()
    return x if x.dtype is z.dtype and x.is_contiguous() else x.to(z.dtype).contiguous()


def moving(
    fz: Tensor,
    z: Tensor,
    *,
    places: Tensor | None = None,
    status: Tensor | None = None,
    meant: int = 0,
    tol: float = 0.0,
    floor: float = 0.0,
    slack: float = 0.0,
    rounding: float = 0.0,
    relative: bool = True,
    largest: bool = False,
    parts: tuple[int, ...] = (),
) -> int:
    """How many rows of ``fz - z`` are not within ``slack * tol * (||fz|| + floor) + rounding * ||fz||``.

    Args:
        fz: (n, D) contiguous, on the CPU.
        z: (b, D), so too and of its dtype.
        places: (b,) int64 the rows of ``fz`` that are meant; None: b is n.
        status: (b,) int64, of which those that are ``meant`` are looked at; None: all are.
        meant: see ``status``.
        tol: see above.
        floor: see above.
        slack: see above.
        rounding: see above.
        relative: else the bound is ``slack * tol + rounding * ||fz||``.
        largest: as :attr:`Rule.largest`.
        parts: as :attr:`Rule.parts`.
    """
    assert library is not None
    for index in (places, status):
        fits = index is None or (index.shape == z.shape[:1] and index.dtype is torch.int64)
        if not fits or not (index is None or index.is_contiguous()):
            raise ValueError(f"The kernels need ({len(z)},) of torch.int64; got {index!r}.")
    if z.shape[1:] != fz.shape[1:] or (places is None and len(z) != len(fz)) or z.dtype is not fz.dtype:
        raise ValueError(f"The kernels need rows alike; got {fz.shape}, {fz.dtype} and {z.shape}, {z.dtype}.")
    where = widths(parts)
    return library.moving(
        z.dtype is torch.float64,
        threads(z),
        *z.shape,
        fz.data_ptr(),
        z.data_ptr(),
        0 if places is None else places.data_ptr(),
        0 if status is None else status.data_ptr(),
        meant,
        tol,
        floor,
        slack,
        rounding,
        relative,
        largest,
        where.buffer_info()[0],
        len(parts),
    )[0]


def spread(pieces: Sequence[tuple[Tensor, Tensor]], batch: int) -> Tensor:
    """(batch, D) of rows that are in pieces: (n, D) values and (n,) places, every place once."""
    assert library is not None
    whole = pieces[0][0].new_empty((batch, pieces[0][0].shape[1]))
    for value, places in pieces:
        width = value.shape[1] * value.element_size()
        library.spread(len(value), width, value.data_ptr(), places.data_ptr(), whole.data_ptr())
    return whole


def shrunk(arrays: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
    """Some rows of each array, at its front; behind them may be others, which mean nothing.

    Args:
        arrays: (b, ...) contiguous each, on the CPU, in memory that nobody else uses.
        kept: (n,) int64 places, ascending.
    """
    assert library is not None
    count, found, moved = len(kept), [], []
    for x in arrays:
        if 2 * count <= len(x):  # half of the memory and more is given back
            x = x.index_select(0, kept)
        elif x.numel():
            moved += (x.data_ptr(), x.stride(0) * x.element_size())
        found.append(x)
    if moved:
        library.shrink(kept.data_ptr(), count, *moved)
    return found


class Anderson:
    """Steps of Anderson acceleration; :mod:`~twnn_plugin.solvers.anderson_rows` says what it keeps.

    Args:
        like: of the width and dtype of the states.
        parts: the widths of parts that may differ in units; () for a state that is one.
        most: m, slots that there will be.
        start: plain steps before differences are taken.
        damping: share of the residual that is added.
        restart: growth of ``||r||`` over its smallest that ends a row's history.
        noise: share of ``||r||`` below which a difference is noise.
        blurred: share of ``||f(z)||`` below which it is.
    """

    def __init__(
        self,
        like: Tensor,
        *,
        parts: tuple[int, ...],
        most: int,
        start: int,
        damping: float,
        restart: float,
        noise: float,
        blurred: float,
    ):
        assert library is not None
        self._parts = widths(parts)  # their address is among the settings
        where, wide = self._parts.buffer_info()[0], like.dtype is torch.float64
        self._settings = library.anderson_settings(
            wide, like.shape[1], damping, restart, noise, blurred, most, start, where, len(parts)
        )

    def step(
        self,
        fz: Tensor,
        r: Tensor,
        before: Tensor,
        last: Tensor,
        slots: Sequence[Tensor],
        numbers: Tensor,
        newest: int,
    ) -> Tensor:
        """(b, D) the next iterates, in new memory.

        Args:
            fz: (b, D) ``f(z)``, as ``same`` makes it of ``r``.
            r: (b, D) ``f(z) - z``, contiguous; in units afterwards, as the next step's ``last``.
            before: (b, D) ``fz`` of the step before. Of this and what follows, more rows than b may be there.
            last: (b, D) the residual of the step before, as this function left it; neither it nor ``before``
                is read in rows that take no difference yet.
            slots: (b, 2, D) each, ``SLOTS`` at most: the pairs q, p; written to.
            numbers: (b, 2 m + 3 + n) gamma and weight of each of the m slots, the smallest ``||r||``, its
                blur, the steps made, and the unit of each of n parts; written to.
            newest: the slot that this step's difference takes.
        """
        assert library is not None
        following = torch.empty_like(fz)
        library.anderson(
            self._settings,
            threads(fz),
            len(fz),
            newest,
            fz.data_ptr(),
            r.data_ptr(),
            before.data_ptr(),
            last.data_ptr(),
            numbers.data_ptr(),
            following.data_ptr(),
            *[slot.data_ptr() for slot in slots],
        )
        return following
