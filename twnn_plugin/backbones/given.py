"""What users give to ``attach`` and ``configure``, looked at before anything is made of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import policies
from ..errors import AttachError, OptionError
from ..policies import Policy
from ..policies.base import SelectionPolicy

__all__ = ["check_flag", "check_uncompiled", "span_policy"]


def span_policy(given: str | Policy) -> Policy:
    """The policy for wormholes that a name or an instance stands for.

    Raises:
        UnknownNameError: no such policy.
        OptionError: it is none, or one that picks among layers.
    """
    policy = policies.registry.resolve(given)
    if isinstance(policy, SelectionPolicy):
        raise OptionError(
            f"Policy {type(policy).__name__} picks among the layers of a network, and has no answer for a "
            "single wormhole. Create the model as 'dynalay_<name>' (timm.create_model('dynalay_resnet18', "
            "policy=...)), or build a twnn_plugin.selection.LayerSelection over its layers; with wormholes "
            "use 'gate', 'always', 'never' or 'random'."
        )
    return policy


def check_flag(name: str, given: Any) -> None:
    """Raise :class:`OptionError` unless an option that is switched on or off is True or False."""
    if not isinstance(given, bool):
        raise OptionError(f"{name} is True or False; got {given!r}.")


def check_uncompiled(model: nn.Module) -> None:
    """Raise :class:`AttachError` if a model is compiled: its code runs without the hooks that come later."""
    # torch has no public question for either: what torch.compile(model) returns holds the model under this
    # name, and model.compile() leaves its code under that one.
    if "_orig_mod" in dict(model.named_children()) or getattr(model, "_compiled_call_impl", None) is not None:
        raise AttachError(
            f"This {type(model).__name__} is compiled already, and what is compiled knows nothing of "
            "wormholes that come later. Attach them to the plain model and compile it then: "
            "torch.compile(tw.attach(model, ...))."
        )
