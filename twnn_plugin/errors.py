"""Errors and warnings of the package.

Every message says what was given, what was expected and what to do. Each class derives
from the built-in exception a user would catch for that kind of mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AttachError",
    "ConvergenceWarning",
    "DuplicateNameError",
    "FixedPointError",
    "MapError",
    "OptionError",
    "PluginWarning",
    "SelectionWarning",
    "TransformError",
    "UnknownNameError",
    "nearest",
]


class UnknownNameError(KeyError, ValueError):
    """A name that no registry entry, stage or option answers to."""

    def __str__(self) -> str:  # KeyError would print the repr, quotes and all
        return str(self.args[0]) if self.args else ""


class DuplicateNameError(ValueError):
    """A name that is already registered; the message names both owners."""


class OptionError(TypeError, ValueError):
    """An option that does not exist or whose value is out of range."""


class MapError(ValueError):
    """``f`` does not map a state to a state of the same structure, shape and dtype."""


class AttachError(ValueError):
    """A wormhole that cannot be put into this model; the message says why and what works."""


class FixedPointError(RuntimeError):
    """A solve failed and the caller asked for an exception (``throw=True``).

    Attributes:
        solution: the :class:`~twnn_plugin.types.Solution`, with status, steps and residual of
            every row, so that nothing is lost by the exception. ``None`` if there is none.
        rows: indices of the rows that failed.
    """

    def __init__(self, message: str, solution: object = None, rows: Sequence[int] = ()):
        super().__init__(message)
        self.solution = solution
        self.rows = tuple(rows)


class TransformError(RuntimeError):
    """A derivative or transformation that an adjoint cannot give; raised rather than give a wrong one."""


class ConvergenceWarning(RuntimeWarning):
    """Some rows of a solve, forward or adjoint, did not converge."""


class SelectionWarning(RuntimeWarning):
    """The choices of a policy have collapsed to one action."""


class PluginWarning(RuntimeWarning):
    """A third-party plugin was skipped because it is broken."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
