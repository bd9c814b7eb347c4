"""What a layer or a policy may say of itself, beside what it must."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from ..policies import Policy

__all__ = ["CostWeighted", "Follower", "Learner", "Separable"]


@runtime_checkable
class Separable(Protocol):
    """A head that answers by a model which it is a part of, and so cannot be copied without it."""

    def separate(self) -> nn.Module:
        """The same head with weights of its own, without a second copy of the model's other weights."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A policy that learns by training, and explores meanwhile."""

    def stepped(self) -> None:
        """Called once for each training step in which the policy learns: a schedule moves on."""
        ...

    def explore(self, share: float | None) -> None:
        """Make this share of choices at random in training, 1 all; None: what the policy's schedule says."""
        ...


@runtime_checkable
class Follower(Protocol):
    """A policy that can leave its choices in training to another one."""

    def follow(self, guide: Policy | None) -> None:
        """Let ``guide`` choose in training; None: no longer."""
        ...


@runtime_checkable
class CostWeighted(Protocol):
    """A policy whose choices can be made dearer after training.

    Attributes:
        cost_weight: subtracted from the scores per unit of price; a higher one means less iterating.
    """

    cost_weight: float
