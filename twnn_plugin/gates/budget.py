"""What a user may spend on wormholes, and the share of samples that this allows to open."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import OptionError

__all__ = ["Budget"]

_WRITTEN = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(x|rows?)\s*")


@dataclass(frozen=True)
class Budget:
    """A share of samples, a number of replays, or a number of multiply-adds.

    Attributes:
        kind: ``"share"``, ``"rows"`` or ``"cost"``.
        value: the share of samples, in (0, 1); the mean number of replays per sample, > 0; or the mean
            multiply-adds relative to the plain network's, > 1.
    """

    kind: str
    value: float

    @staticmethod
    def parse(given: float | str) -> Budget:
        """A budget as users write it: ``0.3`` (of the samples), ``"2 rows"`` (a sample) or ``"1.2x"``.

        Raises:
            OptionError: none of these, or out of range.
        """
        if isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < 1:
            return Budget("share", float(given))
        match = _WRITTEN.fullmatch(given) if isinstance(given, str) else None
        if match is not None:
            value, kind = float(match[1]), "cost" if match[2] == "x" else "rows"
            if value > (1 if kind == "cost" else 0):
                return Budget(kind, value)
        raise OptionError(
            "budget is the wanted share of open samples, in (0, 1), or the mean multiply-adds relative to "
            f"the plain network, such as '1.2x', or the mean replays a sample, such as '2 rows'; got "
            f"{given!r}."
        )

    def share(self, effort: float, price: float) -> float:
        """The share of samples, in [0, 1], that may open.

        Args:
            effort: replays that an open sample takes.
            price: multiply-adds of a replay relative to those of the plain network.
        """
        spent = self.replays(price)
        return self.value if spent is None else min(spent / max(effort, 1e-9), 1.0)

    def replays(self, price: float) -> float | None:
        """The mean replays per sample that may be spent; None: the budget is a share.

        Args:
            price: see :meth:`share`.
        """
        if self.kind == "share":
            return None
        return self.value if self.kind == "rows" else (self.value - 1) / max(price, 1e-9)
