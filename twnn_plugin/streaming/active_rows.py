"""What a pool asks of whoever keeps what is known of the rows that are being solved for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from ..solvers.base import Outcome
from .request import Owner, Request

__all__ = ["ActiveRows", "Evaluate", "Following"]

Evaluate = Callable[[Tensor], Tensor]
"""The function, of (b, D) iterates."""
Following = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The next iterates from the present ones, their values and residuals, (b, D) each."""


class ActiveRows(ABC):
    """The b rows in an active batch, and the rules of :class:`~twnn_plugin.solvers.book.Book` for each."""

    @property
    @abstractmethod
    def z(self) -> Tensor:
        """(b, D) the iterates."""

    @abstractmethod
    def extend(self, z: Tensor, owners: Sequence[Owner]) -> None:
        """Let rows in, after the others: (n, D) their starting states, and whose they are."""

    @abstractmethod
    def replace(self, places: Sequence[int], index: Tensor, z: Tensor, owners: Sequence[Owner]) -> None:
        """Let rows in, in the places of others, which are given as numbers and as a tensor (n,)."""

    @abstractmethod
    def keep(self, places: Sequence[int], index: Tensor) -> None:
        """Go on with the rows in these places alone, which ascend."""

    @abstractmethod
    def advance(
        self, evaluate: Evaluate, following: Following, seats: Sequence[Owner | None], open_rows: int
    ) -> tuple[list[int], list[int]]:
        """Evaluate the rows up to the next look at them.

        Args:
            evaluate: the function.
            following: the solver's step.
            seats: whose the row in each place is; None: it is done, and nobody waits for it.
            open_rows: how many somebody waits for.

        Returns:
            The places of rows that are done now, ascending, and for each evaluation the rows in it that
            were not.
        """

    @abstractmethod
    def outcome(self, request: Request) -> Outcome:
        """What came of a request, all of whose rows are done; to be asked once."""
