"""What helps a wormhole to be trained: options beside those of the solve."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import OptionError

__all__ = ["Aids"]


@dataclass(frozen=True)
class Aids:
    """Options of a wormhole that matter in training.

    Attributes:
        contraction: a bound on the Lipschitz constant of the message, > 0, that holds at every moment; None:
            the message is group-normalised and has none.
        opening: passes in training over which the message rises linearly to its full strength; 0: at once.
        jacobian: weight of the penalty on the Jacobian of the solved map in ``auxiliary_loss``; 0: none.
    """

    contraction: float | None = None
    opening: int = 0
    jacobian: float = 0.0

    def __post_init__(self) -> None:
        if self.contraction is not None and not _number(self.contraction, least=0.0, strict=True):
            raise OptionError(f"contraction is a Lipschitz constant, > 0, or None; got {self.contraction!r}.")
        if isinstance(self.opening, bool) or not isinstance(self.opening, int) or self.opening < 0:
            raise OptionError(f"opening is a number of training steps, at least 0; got {self.opening!r}.")
        if not _number(self.jacobian, least=0.0):
            raise OptionError(f"jacobian is the weight of a penalty, at least 0; got {self.jacobian!r}.")

    @classmethod
    def names(cls) -> list[str]:
        """The options there are."""
        return [f.name for f in fields(cls)]

    @classmethod
    def split(cls, options: dict[str, Any]) -> tuple[Aids, dict[str, Any]]:
        """These options, and the rest."""
        mine = {name: value for name, value in options.items() if name in cls.names()}
        return cls(**mine), {name: value for name, value in options.items() if name not in mine}

    def changed(self, **options: Any) -> Aids:
        """A copy with some options changed."""
        return replace(self, **options)


def _number(value: Any, least: float, strict: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return False
    return value > least if strict else value >= least
