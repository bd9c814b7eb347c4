"""The rows of an active batch, which come and go one by one, as the compiled kernels know them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .looks import Codes, Looks, Rule
from .switch import library

__all__ = ["Guests"]


class Guests(Looks):
    """What is known of the rows that are present, and of those that are finished until it is asked for.

    Where something is written down comes in blocks, one for each batch that rows come from.

    Args:
        like: a tensor of the dtype of the states, (b, D).
        rule: when a row is finished.
        codes: what to write down.
        capacity: rows that can be present at a time.

    Attributes:
        values: (places, D), by place.
    """

    def __init__(self, like: Tensor, rule: Rule, codes: Codes, capacity: int):
        super().__init__(like, rule, codes, capacity)
        self.values = like.new_empty((capacity, like.shape[1]))
        self._blocks: dict[int, int] = {}  # where each begins, and how long it is

    # Blocks.

    def reserve(self, count: int) -> int:
        """Where a block of ``count`` places begins that is nobody else's until it is collected."""
        begin = 0
        for taken in sorted(self._blocks):
            if taken - begin >= count:
                break
            begin = taken + self._blocks[taken]
        self._blocks[begin] = count
        if begin + count > self.status.shape[0]:
            self._grow(max(begin + count, 2 * self.status.shape[0]))
        return begin

    def collect(self, begin: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, status, steps and residuals of a block, whose places are free from now on."""
        count = self._blocks.pop(begin)
        columns = (self.values, self.status, self.steps, self.residual)
        value, status, steps, residual = (c.narrow(0, begin, count).clone() for c in columns)
        return value, status, steps, residual

    def _grow(self, count: int) -> None:
        for name in ("values", "status", "steps", "residual"):
            old = getattr(self, name)
            new = old.new_empty((count, *old.shape[1:]))
            new[: old.shape[0]] = old
            setattr(self, name, new)
        self._find()

    # Rows.

    def enter(self, rows: Sequence[int], places: Sequence[int]) -> None:
        """Let rows in.

        Args:
            rows: which they are in the active batch: in the place of one that has left, or after the others.
            places: where it is to be written down what becomes of each.
        """
        assert library is not None
        if max(rows) >= self._going.shape[0] or max(places) >= self.status.shape[0]:
            raise ValueError(f"There is no room for rows {rows!r} with places {places!r}.")
        _, going, born, to, *_ = self._addresses
        library.enter(going, born, to, self.now, list(rows), list(places))
        self._here = max(self._here, max(rows) + 1)

    def leave(self, z: Tensor, fz: Tensor) -> list[int]:
        """The rows that finished in the last look, ascending; their values are written down.

        Args:
            z: (b, D) the iterates, as the look had them.
            fz: (b, D) ``f(z)``, so too.
        """
        assert library is not None
        _, going, _, places, status, _, _ = self._addresses
        return library.leave(
            z.shape[0],
            self._width * z.element_size(),
            fz.data_ptr(),
            z.data_ptr(),
            going,
            places,
            status,
            self.values.data_ptr(),
            self.codes.max_iter,
            self.codes.non_finite,
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these (n,) rows alone, which ascend."""
        assert library is not None
        marks, going, born, places, *_ = self._addresses
        count, wide = rows.shape[0], self._born.element_size()
        width = self._marks.stride(0) * self._marks.element_size()
        library.shrink(rows.data_ptr(), count, marks, width, going, 1, born, wide, places, wide)
        self._here = count
