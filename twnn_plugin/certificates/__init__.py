"""How far a solution and its gradient can be trusted, row by row."""

from .certify import Certificate, certify
from .gradient import GradientError, gradient_error
from .spectrum import Estimate, contraction_rate, observed_rate, spectral_radius

__all__ = [
    "Certificate",
    "Estimate",
    "GradientError",
    "certify",
    "contraction_rate",
    "gradient_error",
    "observed_rate",
    "spectral_radius",
]
