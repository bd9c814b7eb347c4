"""Steps of Broyden's method by compiled kernels; :mod:`~twnn_plugin.solvers.kelley_rows` has the methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .looks import ABSOLUTE, RELATIVE, SCALED, widths
from .switch import library, threads

__all__ = ["Kelley"]

# Columns of a row's numbers, as in rows.c: the smallest ||r||, what it must fall to and the last change,
# infinite at first; who has the row, whether it was put back, and what the tolerance is relative to. Behind
# them are those of its steps.
_BEST, _GOAL, _CHANGE, _MODE, _LOST, _SCALE, _FIELDS = 0, 1, 2, 6, 7, 8, 9


class Kelley:
    """Steps of ``broyden``, or of ``auto``, whose rows go from plain steps to Broyden's and Newton's method.

    Args:
        like: of the width and dtype of the states.
        memory: steps kept by a row.
        singular: least modulus of what a step is divided by.
        restart: growth of ``||r||`` over its smallest that ends a row's history.
        tossed: growth over its smallest that shows a method without a grip.
        patience: such evaluations after which a row gets another method.
        soon: evaluations within which plain steps must finish a row, or it gets another method.
        tol: the tolerance.
        floor: added to the size of the state where ``tol`` is relative to it.
        relative: whether it is.
        scaled: whether it is relative to a number of each row instead.
        largest: as :attr:`Rule.largest <twnn_plugin.kernels.Rule.largest>`.
        parts: as :attr:`Rule.parts <twnn_plugin.kernels.Rule.parts>`.
    """

    def __init__(
        self,
        like: Tensor,
        *,
        memory: int,
        singular: float,
        restart: float,
        tossed: float = 1.0,
        patience: int = 1,
        soon: float = 1.0,
        tol: float = 0.0,
        floor: float = 0.0,
        relative: bool = True,
        scaled: bool = False,
        largest: bool = False,
        parts: tuple[int, ...] = (),
    ):
        assert library is not None
        self.memory = memory
        self._parts = widths(parts)  # their address is among the settings
        self._settings = library.kelley_settings(
            like.dtype is torch.float64,
            like.shape[1],
            1e3 * torch.finfo(like.dtype).tiny,
            singular,
            restart,
            tossed,
            soon,
            tol,
            floor,
            memory,
            patience,
            SCALED if scaled else RELATIVE if relative else ABSOLUTE,
            largest,
            self._parts.buffer_info()[0],
            len(parts),
        )

    def numbers(self, like: Tensor, scale: Tensor | None = None) -> Tensor:
        """(b, n) numbers of rows that begin with plain steps; see :meth:`automatic`.

        Args:
            like: (b, D) of their states.
            scale: (b,) what the tolerance is relative to instead; or None.
        """
        made = self.nothing(like)
        made[:, [_BEST, _GOAL, _CHANGE]] = torch.inf
        if scale is not None:
            made[:, _SCALE] = scale
        return made

    def nothing(self, like: Tensor) -> Tensor:
        """(b, n) numbers of rows that begin, for :meth:`broyden`: zeros."""
        return like.new_zeros((like.shape[0], _FIELDS + self.memory))

    @staticmethod
    def held(numbers: Tensor, newton: int) -> Tensor:
        """(b,) bool: Newton's method, which has this number, has the row, and has had it in the last step."""
        return (numbers[:, _MODE] == newton) & (numbers[:, _LOST] == 0)

    def broyden(self, z: Tensor, fz: Tensor, r: Tensor, numbers: Tensor, slots: Sequence[Tensor]) -> Tensor:
        """(b, D) the next iterates of Broyden's method, in new memory.

        Args:
            z: (b, D) the iterates, as ``same`` makes them.
            fz: (b, D) ``f(z)``, so too.
            r: (b, D) ``f(z) - z``, contiguous. Of what follows, more rows than b may be there.
            numbers: (b, n) of each row; written to.
            slots: (b, D) each, one more than steps are kept by any row, ``memory`` at most; written to.
        """
        assert library is not None
        following = torch.empty_like(fz)
        self._call(library.broyden, z, fz, r, numbers, None, following, slots)
        return following

    def judge(self, z: Tensor, fz: Tensor, r: Tensor, numbers: Tensor, slots: Sequence[Tensor]) -> int:
        """How many rows are no longer for plain steps, this one included; arguments as :meth:`broyden`'s."""
        assert library is not None
        return self._call(library.judge, z, fz, r, numbers, None, None, slots)[0]

    def automatic(
        self, z: Tensor, fz: Tensor, r: Tensor, numbers: Tensor, back: Tensor, slots: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[int, int]]:
        """(b, D) the next iterates of ``auto``, in new memory; rows put back, and rows that are Newton's now.

        Args:
            z: as :meth:`broyden`'s.
            fz: so too.
            r: so too.
            numbers: so too.
            back: (b, D) ``f`` at the best state so far of rows without plain steps; written to.
            slots: as :meth:`broyden`'s.
        """
        assert library is not None
        following = torch.empty_like(fz)
        return following, self._call(library.automatic, z, fz, r, numbers, back, following, slots)

    def _call(
        self,
        kernel: Callable[..., Any],
        z: Tensor,
        fz: Tensor,
        r: Tensor,
        numbers: Tensor,
        back: Tensor | None,
        following: Tensor | None,
        slots: Sequence[Tensor],
    ) -> tuple[int, int]:
        return kernel(
            self._settings,
            threads(fz),
            len(fz),
            z.data_ptr(),
            fz.data_ptr(),
            r.data_ptr(),
            numbers.data_ptr(),
            0 if back is None else back.data_ptr(),
            0 if following is None else following.data_ptr(),
            *[slot.data_ptr() for slot in slots],
        )
