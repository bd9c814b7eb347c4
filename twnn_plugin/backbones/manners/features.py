"""Models that return the outputs of their stages: timm's ``features_only``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["last_alone"]


class _Last:
    """Stands for the ``forward`` of such a model and returns the last feature alone."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        features = type(self.model).forward(self.model, *args, **kwargs)
        return (list(features.values()) if isinstance(features, dict) else features)[-1]


@contextmanager
def last_alone(model: nn.Module, gathers: bool) -> Iterator[None]:
    """Within this, a model that gathers features returns the last one alone.

    What else it returns from inside of a span is not used elsewhere, as far as the span is concerned: it is
    gathered settled.

    Args:
        model: the model.
        gathers: whether it is one; else nothing happens.
    """
    if not gathers:
        yield
        return
    setattr(model, "forward", _Last(model))  # noqa: B010 - for this instance alone
    try:
        yield
    finally:
        delattr(model, "forward")
