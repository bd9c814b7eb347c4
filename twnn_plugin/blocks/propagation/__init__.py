"""Stable forward propagation: residual layers as steps of an integration method, and a report on them."""

from .activations import NAMES as ACTIVATIONS
from .base import Operator, Propagator, State
from .euler import Antisymmetric, Euler
from .smoothness import smoothness
from .stability import StabilityReport, stability
from .verlet import Verlet

__all__ = [
    "ACTIVATIONS",
    "Antisymmetric",
    "Euler",
    "Operator",
    "Propagator",
    "StabilityReport",
    "State",
    "Verlet",
    "smoothness",
    "stability",
]
