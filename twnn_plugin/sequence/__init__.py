"""Sequence models with wormholes through layers and time."""

from .layer import LayerOutputs, RecurrentLayer
from .message import TokenMessage
from .span import TemporalSpan, check_budget
from .spec import TemporalSpec
from .stack import RecurrentStack
from .state import StackState

__all__ = [
    "LayerOutputs",
    "RecurrentLayer",
    "RecurrentStack",
    "StackState",
    "TemporalSpan",
    "TemporalSpec",
    "TokenMessage",
    "check_budget",
]
