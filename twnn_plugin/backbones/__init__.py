"""Backbone adapters by name: ``names()``, ``get(name)``, ``register(name, factory)``."""

from ..registry import Registry
from .base import Backbone, Stage

registry: Registry[Backbone] = Registry("backbone", Backbone)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = ["Backbone", "Stage", "entries", "get", "names", "owner", "register", "registry"]
