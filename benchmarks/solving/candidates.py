"""Everything that is compared: torchdeq's solvers, ours, and a bare loop of f.

A candidate is given a problem, a tolerance (forward and backward alike) and iteration limits, and makes a
function that solves once and returns the state with its gradient attached.

Settings of torchdeq (0.1.0). Its own defaults (``torchdeq.utils.arg_utils``) are kept, ``core="sliced"``,
``tau=1``, Anderson's ``m=6, lam=1e-4``, Broyden without line search, except where they would put it at a
disadvantage: ``ift=True`` (the default is a one-step gradient), both stop modes ``"rel"`` (the default
``"abs"`` means another accuracy for every problem), one tolerance forward and backward (the default 1e-6
backward would do work that the comparison does not ask for), and iteration limits of at least its default
40, and twice what plain iteration needs at that tolerance. Not more: torchdeq stacks statistics for every
iteration that was allowed, so that a larger limit costs it time. ``simple_fixed_point_iter`` has no
stopping rule; it is told the number of plain iterations that the tolerance takes, which no user knows.

Ours get the same tolerance and limits; no adjoint starts from an earlier solution (``warm_start``), which
here would be the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import twnn_plugin as tw
from twnn_plugin.adjoints.implicit import Implicit
from twnn_plugin.solvers import linear

from .problems import Problem
from .reference import Reference

__all__ = ["Bare", "Candidate", "Limits", "Ours", "Torchdeq", "linear_solvers", "ours", "torchdeqs"]

Solve = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
"""``solve(f, context)``: the state, with its gradient attached where gradients are wanted."""

TORCHDEQ_PAIRS = (
    ("fixed_point_iter", "fixed_point_iter"),
    ("fixed_point_iter", "anderson"),
    ("fixed_point_iter", "broyden"),
    ("simple_fixed_point_iter", "fixed_point_iter"),
    ("anderson", "fixed_point_iter"),
    ("anderson", "anderson"),
    ("broyden", "fixed_point_iter"),
    ("broyden", "broyden"),
)
"""torchdeq's forward solvers, each with plain iteration and with its own method backward.

``simple_fixed_point_iter`` raises a TypeError as a backward solver with ``ift=True``.
"""
STEPPED = ("anderson", "picard")
"""Solvers of fixed points that are tried on the adjoint's linear equation, beside its own."""


@dataclass(frozen=True)
class Limits:
    """Iterations that plain iteration needs at a tolerance, and what is allowed.

    Attributes:
        steps: evaluations of plain iteration, forward.
        products: vector-Jacobian products of plain iteration, backward.
        exactly: allow as many evaluations as plain iteration needs and no more.
    """

    steps: int
    products: int

    @staticmethod
    def at(reference: Reference, tol: float) -> Limits:
        """The limits at a tolerance."""
        return Limits(reference.max_steps(tol), reference.max_products(tol))

    exactly: bool = False

    @property
    def forward(self) -> int:
        """Evaluations allowed."""
        return self.steps if self.exactly else max(40, 2 * self.steps)

    @property
    def backward(self) -> int:
        """Vector-Jacobian products allowed."""
        return max(40, 2 * self.products)


class Candidate(ABC):
    """One way to solve and differentiate."""

    family: str
    name: str

    @abstractmethod
    def make(self, problem: Problem, tol: float, limits: Limits, backward_tol: float | None = None) -> Solve:
        """A function that solves the problem once.

        Args:
            problem: what to solve.
            tol: tolerance, forward and backward.
            limits: how many iterations are allowed.
            backward_tol: tolerance of the backward solve, where it differs.
        """


@dataclass(frozen=True)
class Torchdeq(Candidate):
    """``torchdeq.get_deq`` with ``ift=True``, or with a phantom gradient of ``grad`` steps."""

    forward: str
    backward: str
    grad: int = 0
    family = "torchdeq"

    @property
    def name(self) -> str:  # type: ignore[override]
        backward = f"phantom({self.grad})" if self.grad else self.backward
        return f"torchdeq {self.forward} / {backward}"

    def make(self, problem: Problem, tol: float, limits: Limits, backward_tol: float | None = None) -> Solve:
        from torchdeq import get_deq

        simple = self.forward == "simple_fixed_point_iter"
        gradient = {"grad": self.grad} if self.grad else {"ift": True}
        deq = get_deq(
            f_solver=self.forward,
            b_solver=self.backward,
            f_tol=tol,
            b_tol=backward_tol or tol,
            f_max_iter=limits.steps if simple else limits.forward,
            b_max_iter=limits.backward,
            f_stop_mode="rel",
            b_stop_mode="rel",
            **gradient,
        ).train()
        parts = isinstance(problem.z0, tuple)

        def solve(f: Callable[..., Any], context: tuple[Any, ...]) -> Any:
            if parts:
                states, _ = deq(lambda *z: f(z, *context), problem.z0)
                return tuple(states[-1])
            states, _ = deq(lambda z: f(z, *context), problem.z0)
            return states[-1]

        return solve


@dataclass(frozen=True)
class Ours(Candidate):
    """``twnn_plugin.fix`` with a registered solver and adjoint."""

    solver: str
    adjoint: str = "implicit"
    linear: str | None = None
    family = "ours"

    @property
    def name(self) -> str:  # type: ignore[override]
        backward = self.adjoint if self.linear is None else f"{self.adjoint}({self.linear})"
        return f"{self.solver} / {backward}"

    def make(self, problem: Problem, tol: float, limits: Limits, backward_tol: float | None = None) -> Solve:
        options: dict[str, Any] = {}
        if self.adjoint == "implicit":
            options = {"max_iter": limits.backward, "tol": backward_tol or tol}
            if self.linear is not None:
                options["solver"] = self.linear
        adjoint = tw.adjoint(self.adjoint, **options)
        solver = tw.solvers.registry.resolve(self.solver)

        def solve(f: Callable[..., Any], context: tuple[Any, ...]) -> Any:
            return tw.fix(
                f,
                problem.z0,
                *context,
                solver=solver,
                adjoint=adjoint,
                tol=tol,
                max_iter=limits.forward,
            ).value

        return solve


@dataclass(frozen=True)
class Bare(Candidate):
    """The floor: plain iteration told how many evaluations and products to make, and nothing else.

    No test, no bookkeeping, no row leaves; backward, one graph of one evaluation serves all products.
    """

    family = "floor"
    name = "bare loop of f"

    def make(self, problem: Problem, tol: float, limits: Limits, backward_tol: float | None = None) -> Solve:
        parts = isinstance(problem.z0, tuple)

        def solve(f: Callable[..., Any], context: tuple[Any, ...]) -> Any:
            z = problem.z0
            with torch.no_grad():
                for _ in range(limits.steps):
                    z = f(z, *context)
            if not torch.is_grad_enabled():
                return z
            leaves = tuple(part.detach().requires_grad_() for part in (z if parts else (z,)))
            out = f(leaves if parts else leaves[0], *context)
            outs = out if parts else (out,)
            attached = _Bare.apply(leaves, outs, limits.products, *outs)
            return attached if parts else attached[0]

        return solve


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaves: Any, outs: Any, products: int, *values: Any) -> Any:
        ctx.leaves, ctx.outs, ctx.products = leaves, outs, products
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        u = g
        for _ in range(ctx.products):
            products = torch.autograd.grad(ctx.outs, ctx.leaves, u, retain_graph=True)
            u = tuple(a + b for a, b in zip(products, g, strict=True))
        return None, None, None, *u


def linear_solvers() -> list[str]:
    """The names under which ``implicit`` knows a solver of its linear equation, without the default one."""
    return [name for name in (*linear.names(), *STEPPED) if name != Implicit.default_solver]


def _natives() -> list[str]:
    return [
        name for name in tw.solvers.names() if tw.solvers.owner(name) == "twnn_plugin" and "." not in name
    ]


def ours(quick: bool = False, few: bool = False) -> list[Candidate]:
    """Every native solver with the default adjoint, then the adjoint's solvers by name with a fast one.

    A solver whose name is also an adjoint's goes with that adjoint: they are made for each other.

    Args:
        quick: one linear solver.
        few: the default linear solver and two others, where a solve is expensive; the benchmark
            ``backward`` has them all.
    """
    natives = _natives()
    found: list[Candidate] = [
        Ours(name, name if name in tw.adjoints.names() else "implicit") for name in natives
    ]
    forward = "auto" if "auto" in natives else "anderson"
    others = linear_solvers()
    if few:
        others = [name for name in others if name in ("auto", "gcr")]
    found += [Ours(forward, "implicit", name) for name in (others[:1] if quick else others)]
    return [*found, Ours("picard", "implicit", "picard")]


def torchdeqs(quick: bool = False) -> list[Candidate]:
    """torchdeq's solvers in sensible pairs."""
    pairs = TORCHDEQ_PAIRS[0:1] + TORCHDEQ_PAIRS[5:8:2] if quick else TORCHDEQ_PAIRS
    return [Torchdeq(*pair) for pair in pairs]
