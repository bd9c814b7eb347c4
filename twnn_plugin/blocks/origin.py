"""Weights of a wormhole know which span they were trained in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Origin"]

_KEY = "_extra_state"  # where torch keeps what get_extra_state returns


class Origin(nn.Module):
    """A wormhole whose state dict has the name of its span, and that takes no weights of another one.

    Spans of the same shapes are many (any two blocks of a transformer), and a message or a gate that was
    trained in one of them means nothing in another. The name is the module's extra state: a uint8 tensor of
    its letters, so that every file format takes it.

    Attributes:
        span: the name.
    """

    span: str

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_check)

    def get_extra_state(self) -> Tensor:
        """(n,) uint8: the name of the span in UTF-8."""
        return torch.tensor(list(self.span.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Nothing: the name was compared before anything was loaded."""


def _check(
    module: Origin,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Refuse the weights of another span; those of a checkpoint that has no name are taken as they are."""
    if not any(key.startswith(prefix) for key in state):  # a checkpoint that knows of no wormhole
        return
    name = state.setdefault(prefix + _KEY, module.get_extra_state())
    found = _decoded(name)
    if found is None or _of_whole_model(found) == _of_whole_model(module.span):
        return
    errors.append(
        f"{prefix[:-1] or 'These'} are weights of the wormhole {found!r}, and this one is {module.span!r}: "
        "they were not loaded. Make the model with the wormholes of the checkpoint, in their order; or, to "
        f"start from the weights of another span, leave {prefix + _KEY!r} out of the state dict."
    )
    for key, own in module.state_dict().items():
        state[prefix + key] = own


def _decoded(name: Any) -> str | None:
    """The name in a state dict, whatever dtype it was cast to or averaged in; None: it is none any more."""
    if not isinstance(name, Tensor) or name.is_meta:
        return None
    letters = name.detach().flatten().tolist()
    if not all(float(letter).is_integer() and 0 <= letter < 256 for letter in letters):
        return None
    return bytes(map(int, letters)).decode(errors="replace")


def _of_whole_model(span: str) -> str:
    """The span without what timm's wrappers make of its paths where features alone are wanted."""
    ends = [end.removeprefix("model.").removeprefix("body.") for end in span.split("->")]
    return "->".join(ends).replace("_", ".")
