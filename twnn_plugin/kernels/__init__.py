"""Compiled passes over the rows of a batch, for solves on the CPU.

What a solver does between two evaluations of ``f`` takes little arithmetic and many calls of operators: on
small states the calls are the time, on large ones each of them is a pass over memory. Here both are one pass,
written in C and built when the package is installed. Without a C compiler the package installs all the same,
and the solvers use operations of torch, with the same results up to rounding; ``TWNN_KERNELS=0`` in the
environment, or :func:`disabled`, makes them do so.
"""

from .gate import Glance, Told
from .guests import Guests
from .kelley import Kelley
from .looks import Codes, Rule, widths
from .rows import SLOTS, Anderson, Rows, moving, same, shrunk, spread
from .switch import available, describe, disabled, reads, takes

__all__ = [
    "SLOTS",
    "Anderson",
    "Codes",
    "Glance",
    "Guests",
    "Kelley",
    "Rows",
    "Rule",
    "Told",
    "available",
    "describe",
    "disabled",
    "moving",
    "reads",
    "same",
    "shrunk",
    "spread",
    "takes",
    "widths",
]
