"""Checks of the policies' options: what is no number is refused when the policy is made, not in a pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from ..errors import OptionError

__all__ = ["check_number", "is_number"]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(
    policy: str,
    option: str,
    value: Any,
    expected: str = "a finite number",
    holds: Callable[[float], bool] | None = None,
) -> None:
    """Refuse an option that is no finite number, or another one than was expected.

    Args:
        policy: as it is registered.
        option: whose value it is.
        value: as the user gave it.
        expected: for the message.
        holds: what it must satisfy besides; None: nothing.

    Raises:
        OptionError: it is not what was expected.
    """
    if not is_number(value) or (holds is not None and not holds(value)):
        raise OptionError(f"Option {option} of policy {policy!r} must be {expected}; got {value!r}.")
