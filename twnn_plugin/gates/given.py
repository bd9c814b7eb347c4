"""What users give as a gate, looked at before anything is made of it."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from .base import Gate

__all__ = ["check_gate"]


def check_gate(given: Any) -> None:
    """Raise :class:`OptionError` unless ``given`` has the form of a gate: a name, (name, options), a gate."""
    pair = isinstance(given, (tuple, list)) and len(given) == 2
    if isinstance(given, (str, Gate)) or (
        pair and isinstance(given[0], str) and isinstance(given[1], dict) and all(map(_is_name, given[1]))
    ):
        return
    raise OptionError(
        "gate is a registered name such as 'sigmoid', a name with a dict of its options such as "
        f"('sigmoid', {{'temperature': 0.5}}), or a gate; got {given!r}."
    )


def _is_name(key: Any) -> bool:
    return isinstance(key, str)
