"""Policies by name: ``names()``, ``get(name)``, ``register(name, factory)``."""

from ..registry import Registry
from .base import Policy, PolicyView

registry: Registry[Policy] = Registry("policy", Policy)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = [
    "Policy",
    "PolicyView",
    "entries",
    "get",
    "names",
    "owner",
    "register",
    "registry",
]
