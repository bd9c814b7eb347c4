"""The loop of every Krylov method: measured residuals, rows that leave, statuses."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...trees import rebuild
from ...types import Status
from ..base import Control, Outcome
from .base import LinearProblem, LinearSolver
from .ledger import Ledger

__all__ = ["ROUNDING", "Krylov", "Progress"]

ROUNDING = 4.0
"""Roundings of one product, in eps: long sums, added pairwise."""

_GROWTH = 1e6  # a residual this many times the first one (and g) is divergence
_CLAIM = 0.5  # a second claim must find at most this share of what the first one found ...
_CYCLE = 0.999  # ... and a new start after getting stuck at most this


class Progress(NamedTuple):
    """What one product brought, row by row.

    Attributes:
        size: (b,) norm of the residual as the method updates it.
        drift: (b,) bound on how far rounding has carried it from the true one.
        stuck: (b,) bool of the rows that the method cannot improve without a new start from their
            measured residual.
    """

    size: Tensor
    drift: Tensor
    stuck: Tensor


class Krylov(LinearSolver):
    """A method given by what it does with one product; the loop is here.

    Every row makes use of every product: it is either the method's own or it measures the row's
    residual anew. The latter happens at the start, when a row is stuck, and before a row is called
    converged whose updated residual rounding may have carried away from the true one (the residual gap
    of Greenbaum 1997 and van der Vorst & Ye 2000); the method starts anew from what was measured.

    States are nestings of tuples of tensors whose first axis is the batch; all rows are independent.
    """

    @abstractmethod
    def start(self, r: Tensor, bound: Tensor, eps: float) -> Any:
        """The method's state at the present solution.

        Args:
            r: (b, D) its residuals.
            bound: (b,) norms at which the rows are done.
            eps: relative rounding error of a product.
        """

    @abstractmethod
    def query(self, state: Any) -> Tensor:
        """(b, D) the vectors whose products with ``J^T`` are wanted next."""

    @abstractmethod
    def update(
        self, state: Any, query: Tensor, product: Tensor, active: Tensor | None
    ) -> tuple[Any, Progress]:
        """Take in the products.

        Args:
            state: the method's own.
            query: (b, D) what was multiplied.
            product: (b, D) ``J^T query``.
            active: (b,) bool of the rows whose product is the method's; None: all. The others' state
                must come out finite; nothing else is asked of it.
        """

    @abstractmethod
    def correction(self, state: Any) -> Tensor:
        """(b, D) what the method adds to the solution at which its row last started."""

    @abstractmethod
    def restart(self, state: Any, r: Tensor, rows: Tensor) -> Any:
        """The state with the rows of the (b,) mask ``rows`` started anew from the residuals ``r``."""

    def rescue(self, state: Any, r: Tensor, rows: Tensor) -> tuple[Any, Tensor]:
        """Another try, from the residuals ``r``, for the rows of a mask that stagnate.

        Returns:
            The state, and the (b,) mask of the rows that go on.
        """
        return state, torch.zeros_like(rows)

    @torch.no_grad()
    def solve(self, problem: LinearProblem, rhs: Tensor, control: Control) -> Outcome:
        if rhs.numel() == 0:
            empty = rhs.new_zeros(rhs.shape[0])
            return Outcome(rhs, empty.long(), empty.long(), empty)
        if not control.coupled:
            return _Run(self, problem, rhs, control.scale, control).outcome()
        # Coupled rows are one system: only then do inner products make sense.
        whole = rhs.reshape(1, -1)
        scale = None if control.scale is None else torch.linalg.vector_norm(control.scale)[None]
        joined = _Run(self, _Joined(problem, rhs.shape), whole, scale, control).outcome()
        batch = rhs.shape[0]
        return Outcome(
            joined.value.reshape(rhs.shape),
            joined.status.expand(batch).clone(),
            joined.steps.expand(batch).clone(),
            joined.residual.expand(batch).clone(),
        )


class _Joined:
    """A batch of coupled rows as one row (a ``LinearProblem``)."""

    can_leave = False
    leave_share = 0.0

    def __init__(self, problem: LinearProblem, shape: torch.Size):
        self.problem, self.shape, self.size, self.eps = problem, shape, 1, problem.eps
        self.evaluations = problem.evaluations

    def product(self, u: Tensor) -> Tensor:
        product = self.problem.product(u.view(self.shape)).reshape(1, -1)
        self.evaluations = self.problem.evaluations
        return product

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("coupled rows cannot leave")


class _Run:
    """One solve."""

    def __init__(
        self, method: Krylov, problem: LinearProblem, rhs: Tensor, scale: Tensor | None, control: Control
    ):
        self.method, self.problem, self.max_iter = method, problem, control.max_iter
        # The problem is linear: rows of size one can neither overflow nor underflow in a norm. Powers of
        # two leave every rounding as it is.
        largest = rhs.abs().amax(dim=1)
        sound = torch.isfinite(largest) & (largest > 0)
        exponent = torch.frexp(torch.where(sound, largest, 1.0)).exponent
        unit = torch.ldexp(torch.ones_like(largest), exponent - 1)
        g = torch.where(sound[:, None], rhs / unit[:, None], 0.0)
        norm = torch.linalg.vector_norm(g, dim=1) if scale is None else scale / unit
        self.book = Ledger(rhs, unit, norm)
        self.g, self.u, self.bound = g, g, control.tol * norm
        self.first = torch.full_like(norm, float("inf"))  # the residual of u = g
        self.measured = torch.full_like(norm, float("inf"))  # the residual when it last was
        self.claimed = torch.zeros_like(sound)  # rows whose next measurement tests a claim
        self.blur: Tensor | None = None  # (b,) rounding error of what was measured last; None: nothing was
        self.checking: Tensor | None = None  # (b,) rows whose next product measures; None: no row
        if not bool(sound.all()):
            code = torch.where(torch.isfinite(rhs).all(dim=1), int(Status.converged), int(Status.non_finite))
            size = torch.where(code == int(Status.converged), 0.0, float("nan")).to(norm)
            self.book.finish(~sound, 0, code, size, rhs / unit[:, None])
        self._solve()

    def outcome(self) -> Outcome:
        return self.book.outcome()

    def _solve(self) -> None:
        book, method = self.book, self.method
        if book.unfinished == 0:
            return
        self._let_go()
        r = self.problem.product(self.g)  # u = g: the product is the residual
        state = method.start(r, self.bound, self.problem.eps)
        size = torch.linalg.vector_norm(r, dim=1)
        self.first = size
        nothing = torch.zeros_like(size)
        progress = Progress(size, nothing, nothing.bool())
        failed = progress.stuck
        for k in range(1, self.max_iter + 1):
            if k > 1:
                state, progress, failed = self._advance(state)
            code, leaving = self._judge(progress, failed)
            if leaving is not None:
                book.finish(leaving, k, code, *self._best(progress.size, state))
                if book.unfinished == 0:
                    return
            if k == self.max_iter:
                book.exhaust(k, *self._best(progress.size, state))
                return
            self._plan(state, progress)
            if leaving is not None:
                state = self._let_go(state)

    def _value(self, state: Any) -> Tensor:
        return self.u + self.method.correction(state)

    def _best(self, size: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """Residuals and solutions; those of u = g in rows that are worse off."""
        better = size <= self.first
        value = torch.where(better[:, None], self._value(state), self.g)
        return torch.where(better, size, self.first), value

    def _advance(self, state: Any) -> tuple[Any, Progress, Tensor]:
        """One product: the method's, or a measurement; the rows whose measurement shows no progress."""
        method, check = self.method, self.checking
        query = method.query(state)
        if check is not None:
            query = torch.where(check[:, None], self.u, query)
        if self.book.alive is not None:  # whatever becomes of a finished row, it is multiplied as zero
            query = torch.where(self.book.alive[:, None], query, 0.0)
        product = self.problem.product(query)
        active = None if check is None else ~check
        state, progress = method.update(state, query, product, active)
        drift = progress.drift if self.blur is None else progress.drift + self.blur
        if check is None:
            return state, progress._replace(drift=drift), torch.zeros_like(progress.stuck)
        r = self.g + product - self.u
        size = torch.linalg.vector_norm(r, dim=1)
        allowed = torch.where(self.claimed, _CLAIM, _CYCLE) * self.measured
        failed = check & (size > allowed) & (size > self.bound)
        self.measured = torch.where(check, size, self.measured)
        # Of a long solution the product and the difference are rounded more coarsely than those to come.
        blur = ROUNDING * self.problem.eps * torch.linalg.vector_norm(self.u, dim=1)
        self.blur = torch.where(check, blur, 0.0 if self.blur is None else self.blur)
        state = method.restart(state, r, check)
        if bool(failed.any()):
            # A claim that fails twice is the rounding floor: no method gets below it.
            state, more = method.rescue(state, r, failed & ~self.claimed)
            failed = failed & ~more
        return (
            state,
            Progress(
                torch.where(check, size, progress.size),
                torch.where(check, 0.0, drift),
                progress.stuck & ~check,
            ),
            failed,
        )

    def _judge(self, progress: Progress, failed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Statuses (b,), and the rows that finish now, or None."""
        finite = torch.isfinite(progress.size)
        converged = progress.size + progress.drift <= self.bound
        leaving = converged | ~(progress.size < _GROWTH * (1 + self.first)) | failed
        code = torch.where(failed, int(Status.stagnated), int(Status.diverged))
        code = torch.where(finite, code, int(Status.non_finite))
        code = torch.where(converged, int(Status.converged), code)
        if self.book.alive is not None:
            leaving = leaving & self.book.alive
        return code, leaving if bool(leaving.any()) else None

    def _plan(self, state: Any, progress: Progress) -> None:
        """Whose next product is a measurement: claims that are not sure, and rows that are stuck."""
        claimed = progress.size <= self.bound
        check = claimed | progress.stuck
        if self.book.alive is not None:
            check = check & self.book.alive
        if not bool(check.any()):
            self.checking = None
            return
        self.checking, self.claimed = check, claimed
        self.u = torch.where(check[:, None], self._value(state), self.u)

    def _let_go(self, state: Any = None) -> Any:
        """Drop finished rows from the batch when enough places are free."""
        problem, book = self.problem, self.book
        if not problem.can_leave or book.unfinished >= problem.leave_share * problem.size:
            return state
        keep = book.compact()
        kept = ("g", "u", "bound", "first", "measured", "claimed", "checking", "blur")
        for name in kept:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[keep])
        problem.keep(keep)
        return rebuild(state, lambda leaf: leaf[keep] if isinstance(leaf, Tensor) else leaf)
