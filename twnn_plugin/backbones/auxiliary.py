"""What wormholes add to the loss, and training them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import (
    _NormBase,
)  # the documented common base of layers with running statistics

from ..blocks import Feedback
from ..errors import AttachError

__all__ = ["AuxiliaryLoss", "add_auxiliary_loss", "freeze_backbone"]

Model = TypeVar("Model", bound=nn.Module)


class AuxiliaryLoss:
    """``model.auxiliary_loss``: the penalties of all wormholes for the last training pass.

    Args:
        parts: the wormholes.
        before: what the model called by that name before.
    """

    def __init__(self, parts: Sequence[Feedback], before: Callable[[], Tensor | None] | None = None):
        self.parts, self.before = tuple(parts), before

    def __call__(self) -> Tensor:
        """A scalar: budgets kept by a dual variable, ``l0``, Jacobian penalties; zero if there are none."""
        terms = [part.auxiliary_loss() for part in self.parts]
        terms.append(self.before() if self.before is not None else None)
        found = [term for term in terms if term is not None]
        zero = self.parts[0].message.scale.new_zeros(())
        return sum(found, zero)


def add_auxiliary_loss(model: nn.Module, parts: Sequence[Feedback]) -> None:
    """Give a model ``auxiliary_loss()``."""
    before: Any = getattr(model, "auxiliary_loss", None)
    model.auxiliary_loss = AuxiliaryLoss(parts, before)  # pyright: ignore[reportArgumentType]


class _StaysInEval:
    """In place of ``train`` of a frozen layer with running statistics."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        self.module.training = False
        return self.module


def freeze_backbone(model: Model, frozen: bool = True, head: bool = False) -> Model:
    """Train the wormholes alone: few parameters, and the closed network stays what it is.

    All parameters but the wormholes' stop requiring gradients, and the backbone's layers with running
    statistics stay in eval mode whatever ``model.train()`` says. Make the optimiser afterwards, or let it
    skip parameters without gradients.

    Args:
        model: a model with wormholes.
        frozen: False: undo it; all parameters of the backbone require gradients again.
        head: leave the classifier trainable (``get_classifier``). A closed head is frozen with the backbone.

    Returns:
        The model itself.

    Raises:
        AttachError: the model has no wormholes, or ``head`` is set and it has no ``get_classifier``.
    """
    parts = [m for m in model.modules() if isinstance(m, Feedback)]
    if not parts:
        raise AttachError(f"This {type(model).__name__} has no wormholes to train.")
    mine = {id(p) for part in parts for p in part.parameters()}
    if head and frozen:
        find: Any = getattr(model, "get_classifier", None)
        if find is None:
            raise AttachError(
                f"This {type(model).__name__} has no get_classifier: call freeze_backbone without head and "
                "set requires_grad of the head's parameters yourself."
            )
        found = find()
        heads = found if isinstance(found, (tuple, list)) else (found,)
        mine |= {id(p) for module in heads for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in mine:
            parameter.requires_grad_(not frozen)
    inside = {id(m) for part in parts for m in part.modules()}
    for module in model.modules():
        if isinstance(module, _NormBase) and id(module) not in inside:
            _hold(module, frozen, model.training)
    return model


def _hold(module: nn.Module, frozen: bool, training: bool) -> None:
    if frozen:
        module.train = _StaysInEval(module)  # pyright: ignore[reportAttributeAccessIssue]
        module.eval()
    elif isinstance(module.__dict__.get("train"), _StaysInEval):
        del module.train
        module.train(training)
