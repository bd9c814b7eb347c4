"""Solvers of the linear equation ``u = J^T u + g`` by name: ``names()``, ``get(name)``, ``register(...)``."""

from ...registry import Registry
from .base import LinearProblem, LinearSolver
from .loop import Krylov, Progress

registry: Registry[LinearSolver] = Registry("linear solver", LinearSolver)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = [
    "Krylov",
    "LinearProblem",
    "LinearSolver",
    "Progress",
    "entries",
    "get",
    "names",
    "owner",
    "register",
    "registry",
]
