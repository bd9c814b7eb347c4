"""Restarted GMRES with Givens rotations, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..axpy import add_scaled_
from .base import check_count
from .loop import Krylov, Progress

__all__ = ["GMRES"]

_DEPENDENT = 1e-6  # a product that lies in the span of the basis to this share ends the cycle


class _Arnoldi(NamedTuple):
    """Slots belong to products: a row that started anew has zeros in those before, which do nothing."""

    v: Tensor  # (b, D) the next basis vector
    rest: Tensor  # (b,) the residual's component that the basis does not reach, with its sign
    age: Tensor  # (b,) basis vectors since the row's start
    basis: tuple[Tensor, ...]  # (b, D) each
    columns: tuple[tuple[Tensor, ...], ...]  # (b,) each: the triangular factor, column by column
    rotations: tuple[tuple[Tensor, Tensor], ...]  # (b,) each: cosine and sine
    target: tuple[Tensor, ...]  # (b,) each: the rotated right-hand side


@dataclass(frozen=True)
class GMRES(Krylov):
    """GMRES(memory): minimal residuals over a basis that is built anew every ``memory`` products.

    Saad & Schultz (1986): Arnoldi by modified Gram-Schmidt, Givens rotations and back substitution, all
    row by row. The solution is formed at the end of a cycle and then measured, which costs a product; ``gcr``
    does without and needs twice the memory.

    Args:
        memory: basis vectors before a restart, >= 1.
    """

    memory: int = 30

    def __post_init__(self) -> None:
        check_count("gmres", "memory", self.memory)

    def start(self, r: Tensor, bound: Tensor, eps: float) -> _Arnoldi:
        v, length = _unit(r)
        return _Arnoldi(v, length, torch.zeros_like(bound, dtype=torch.long), (), (), (), ())

    def query(self, state: _Arnoldi) -> Tensor:
        return state.v

    def update(
        self, state: _Arnoldi, query: Tensor, product: Tensor, active: Tensor | None
    ) -> tuple[_Arnoldi, Progress]:
        if len(state.basis) == self.memory:
            state = _without_oldest(state)
        live = torch.ones_like(state.age, dtype=torch.bool) if active is None else active
        column = live[:, None]
        v = torch.where(column, query, 0.0)
        w = torch.where(column, query - product, 0.0)
        length = torch.linalg.vector_norm(w, dim=1)
        basis = (*state.basis, v)
        h = []
        for v_i in basis:
            h_i = torch.linalg.vecdot(v_i, w)
            w = add_scaled_(w, v_i, -h_i)
            h.append(h_i)
        below = torch.linalg.vector_norm(w, dim=1)
        for i, (c, s) in enumerate(state.rotations):
            h[i], h[i + 1] = c * h[i] + s * h[i + 1], c * h[i + 1] - s * h[i]
        diagonal = torch.hypot(h[-1], below)
        sound = live & (diagonal > _DEPENDENT * length)  # else A is singular on the basis
        safe = torch.where(sound, diagonal, 1.0)
        c = torch.where(sound, h[-1] / safe, 1.0)
        s = torch.where(sound, below / safe, 0.0)
        h[-1] = safe
        target, rest = (
            torch.where(sound, c * state.rest, 0.0),
            torch.where(sound, -s * state.rest, state.rest),
        )
        going = sound & (below > _DEPENDENT * length)
        inverse = going / torch.where(going, below, 1.0)
        age = state.age + live.long()
        stuck = live & (~going | (age == self.memory))
        state = _Arnoldi(
            w * inverse[:, None],
            rest,
            age,
            basis,
            (*state.columns, tuple(h)),
            (*state.rotations, (c, s)),
            (*state.target, target),
        )
        # Not known before the solution is formed: every claim is measured.
        return state, Progress(rest.abs(), torch.full_like(rest, float("inf")), stuck)

    def correction(self, state: _Arnoldi) -> Tensor:
        d = torch.zeros_like(state.v)
        right = list(state.target)
        for j in range(len(right) - 1, -1, -1):
            column = state.columns[j]
            y = right[j] / column[j]
            for i in range(j):
                right[i] = right[i] - column[i] * y
            d = add_scaled_(d, state.basis[j], y)
        return d

    def restart(self, state: _Arnoldi, r: Tensor, rows: Tensor) -> _Arnoldi:
        keep = ~rows
        v, length = _unit(r)
        return _Arnoldi(
            torch.where(rows[:, None], v, state.v),
            torch.where(rows, length, state.rest),
            torch.where(rows, 0, state.age),
            tuple(torch.where(keep[:, None], b, 0.0) for b in state.basis),
            state.columns,
            tuple((torch.where(keep, c, 1.0), torch.where(keep, s, 0.0)) for c, s in state.rotations),
            tuple(torch.where(keep, t, 0.0) for t in state.target),
        )


def _unit(r: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(r, dim=1)
    usable = length > 0
    return r * (usable / torch.where(usable, length, 1.0))[:, None], length


def _without_oldest(state: _Arnoldi) -> _Arnoldi:
    """Without the first slot, which is empty in every row that goes on."""
    return state._replace(
        basis=state.basis[1:],
        columns=tuple(column[1:] for column in state.columns[1:]),
        rotations=state.rotations[1:],
        target=state.target[1:],
    )
