"""Adjoints by name: ``names()``, ``get(name)``, ``register(name, factory)``."""

from ..registry import Registry
from .base import Adjoint
from .equation import Call

registry: Registry[Adjoint] = Registry("adjoint", Adjoint)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = ["Adjoint", "Call", "entries", "get", "names", "owner", "register", "registry"]
