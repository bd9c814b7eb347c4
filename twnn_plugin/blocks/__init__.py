"""Blocks by name: ``names()``, ``get(name)``, ``register(name, factory)``."""

from torch import nn

from ..registry import Registry
from .aids import Aids
from .feedback import Feedback
from .record import Report, SpanRecord
from .settings import SolveSettings
from .settle import GroupReplay, settle

registry: Registry[nn.Module] = Registry("block", nn.Module)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = [
    "Aids",
    "Feedback",
    "GroupReplay",
    "Report",
    "SolveSettings",
    "SpanRecord",
    "entries",
    "get",
    "names",
    "owner",
    "register",
    "registry",
    "settle",
]
