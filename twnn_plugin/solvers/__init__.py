"""Solvers by name: ``names()``, ``get(name)``, ``register(name, factory)``."""

from ..registry import Registry
from .base import Control, Outcome, Problem, Solver, StepSolver, WholeSolver
from .driver import solve

registry: Registry[Solver] = Registry("solver", Solver)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = [
    "Control",
    "Outcome",
    "Problem",
    "Solver",
    "StepSolver",
    "WholeSolver",
    "entries",
    "get",
    "names",
    "owner",
    "register",
    "registry",
    "solve",
]
