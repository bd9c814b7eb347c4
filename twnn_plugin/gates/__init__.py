"""Gates by name: ``names()``, ``get(name)``, ``register(name, factory)``."""

from ..registry import Registry
from .base import FollowsGate, Gate, GateOutput
from .budget import Budget
from .difficulty import watch_closed_difficulty, watch_difficulty
from .given import check_gate, check_one_budget
from .learned import LearnedGate

registry: Registry[Gate] = Registry("gate", Gate)
names, get, register, owner, entries = (
    registry.names,
    registry.get,
    registry.register,
    registry.owner,
    registry.entries,
)

__all__ = [
    "Budget",
    "FollowsGate",
    "Gate",
    "GateOutput",
    "LearnedGate",
    "check_gate",
    "check_one_budget",
    "entries",
    "get",
    "names",
    "owner",
    "register",
    "registry",
    "watch_closed_difficulty",
    "watch_difficulty",
]
