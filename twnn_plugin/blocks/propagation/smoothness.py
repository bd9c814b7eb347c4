"""Weights that change little from layer to layer, so that they are those of a differential equation."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import OptionError
from .base import Propagator

__all__ = ["smoothness"]


def smoothness(module: nn.Module) -> Tensor:
    """``sum_j ||K_(j+1) - K_j||^2 / (2 h)``, the same for biases, of all propagators in a module.

    The regulariser of Haber & Ruthotto (2017): the discrete ``1/2 integral |dK/dt|^2``, which keeps its size
    when the layers get more and ``h`` smaller. Add it to the loss with a small factor. Layers with shared
    weights add nothing.

    Args:
        module: a propagator, or a module that holds some at any depth.

    Returns:
        A scalar with a gradient.

    Raises:
        OptionError: there is no propagator with a weight for each of several layers.
    """
    found = [m for m in module.modules() if isinstance(m, Propagator) and m.weight.shape[0] > 1]
    if not found:
        raise OptionError(
            f"This {type(module).__name__} holds no propagator with a weight for each of several layers: "
            "there is nothing to smooth."
        )
    terms = [
        (parameter[1:] - parameter[:-1]).square().sum() / (2 * m.h)
        for m in found
        for parameter in (m.weight, m.bias)
        if parameter is not None
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
