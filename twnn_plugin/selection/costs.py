"""What each part of a network costs, and what its activations look like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import Feedback
from ..blocks.count import counting
from ..errors import MapError
from ..modes import evaluating

__all__ = ["Costs", "count", "probe"]


class Costs:
    """Multiply-adds for one sample.

    Args:
        parts: of each layer and, last, the head.
        messages: of each connection.
        places: of the layers that can be iterated, among the parts.
        before: of what comes before the parts, a stem.

    Attributes:
        total: of the open-loop pass, with what comes before the parts.
        again: for each layer that can be iterated, of what is computed again after it.
        replay: for each, of one evaluation of it with its message.
        prices: (N,) one evaluation and what follows, as a share of the total.
    """

    def __init__(self, parts: Sequence[int], messages: Sequence[int], places: Sequence[int], before: int = 0):
        self.parts, self.messages, self.total = tuple(parts), tuple(messages), before + sum(parts)
        self.again = tuple(sum(parts[place + 1 :]) for place in places)
        self.replay = tuple(parts[place] + message for place, message in zip(places, messages, strict=True))
        whole = max(self.total, 1)
        prices = [(r + a) / whole for r, a in zip(self.replay, self.again, strict=True)]
        self.prices = torch.tensor(prices, device="cpu")


def probe(modules: Sequence[nn.Module], names: Sequence[str], example: Tensor) -> list[Tensor]:
    """The activations from the input to the logits, in eval mode.

    Raises:
        MapError: a layer does not map a tensor to a tensor of the same batch size, of floating point.
    """
    values = [example]
    with evaluating(*modules):
        for name, module in zip((*names, "head"), modules, strict=True):
            out = module(values[-1])
            if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != example.shape[0]:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise MapError(
                    f"Layer {name!r} must return one tensor with the {example.shape[0]} rows it was "
                    f"given; it returned {got}."
                )
            if not out.is_floating_point():
                raise MapError(
                    f"Layer {name!r} must return floating point numbers, which can be iterated and "
                    f"differentiated; it returned {out.dtype}. Convert them in the layer."
                )
            values.append(out)
    return values


def count(
    modules: Sequence[nn.Module],
    feedbacks: Sequence[Feedback],
    places: Sequence[int],
    x: Tensor,
    before: int = 0,
) -> Costs:
    """Multiply-adds of each part for one sample of the shape of those in ``x`` (B, ...).

    Args:
        modules: the layers and, last, the head.
        feedbacks: the connections of those that can be iterated.
        places: of these, among the modules.
        x: (B, ...) what the first layer is given.
        before: multiply-adds of what comes before it.
    """
    parts: list[int] = []
    messages: list[int] = []
    states = [x.detach().new_zeros(1, *x.shape[1:])]
    with evaluating(*modules):
        for module in modules:
            with counting() as counter:
                states.append(module(states[-1]))
            parts.append(counter.get_total_flops() // 2)
        for place, feedback in zip(places, feedbacks, strict=True):
            # Beforehand, as in a solve: a constrained weight is worked out once, and does not count.
            weight = feedback.message.weight()
            with counting() as counter:
                feedback.message(states[place + 1], states[place].shape, weight)
            messages.append(counter.get_total_flops() // 2)
    return Costs(parts, messages, places, before)
