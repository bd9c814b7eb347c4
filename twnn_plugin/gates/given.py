"""What users give as a gate, looked at before anything is made of it."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from .base import Gate

__all__ = ["check_gate", "check_one_budget"]


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


def check_one_budget(options: dict[str, Any], budget: float | str) -> None:
    """Raise :class:`OptionError` if a gate's options have a budget beside the one for all wormholes."""
    if options.get("budget") is not None:
        raise OptionError(
            f"There are two budgets, budget={budget!r} and the gate's option budget={options['budget']!r}: "
            "leave one of them out."
        )


def _is_name(key: Any) -> bool:
    return isinstance(key, str)
