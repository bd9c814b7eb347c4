"""What the propagators share: options, stacked weights, the loop over layers."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import MapError, OptionError
from .activations import Activation, resolve

__all__ = ["Operator", "Propagator", "State", "linear"]

State = tuple[Tensor, ...]
"""The parts of a propagator's state: one, or (y, z)."""

Operator = tuple[Tensor, ...]
"""What one layer applies: its matrices or kernels, and its bias if there is one."""


class Propagator(nn.Module, ABC):
    """Layers of a residual network as the steps of an integration method (Haber & Ruthotto 2017).

    A layer advances the ordinary differential equation of the class by one step ``h``; ``layers`` of them
    go on to the time ``T = h * layers``. The weights of all layers are one parameter with the layers as
    its first axis, ``weight``, and so is ``bias``; with ``shared=True`` that axis has length 1 and every
    layer uses the same.

    Dense layers act on the last axis of (B, ..., features); with ``kernel_size`` they are convolutions
    with zero padding of (B, features, H, W). Weights are drawn from a normal distribution with standard
    deviation ``1 / sqrt(inputs of an output)``; biases start at zero.

    Args:
        features: size of the axis that is propagated, >= 1.
        layers: number of steps, >= 1.
        h: step, > 0.
        activation: a name of ``torch.nn`` such as ``"tanh"`` or ``"leaky_relu"``, or a module that works
            element by element. What is said about stability is for odd ones that do not decrease, such as
            tanh and softsign; ReLU and its kin push one way, and deep states drift off.
        kernel_size: odd size of square kernels; None for dense layers.
        shared: whether all layers share one weight and bias.
        bias: whether there is one.

    Raises:
        OptionError: an option out of range.
        UnknownNameError: an activation that does not exist.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        features: int,
        layers: int,
        h: float,
        activation: Activation,
        kernel_size: int | None,
        shared: bool,
        bias: bool,
    ):
        super().__init__()
        self.features = whole("features", features)
        self.layers = whole("layers", layers)
        self.h = number("h", h, positive=True)
        if kernel_size is not None and whole("kernel_size", kernel_size) % 2 == 0:
            raise OptionError(
                f"kernel_size must be odd, so that a kernel has a centre, or None for dense layers; got "
                f"{kernel_size!r}."
            )
        self.kernel_size = kernel_size
        for name, flag in (("shared", shared), ("bias", bias)):
            if not isinstance(flag, bool):
                raise OptionError(f"{name} must be True or False; got {flag!r}.")
        self.shared = shared
        self.activation = resolve(activation)
        self._make(bias)

    def _make(self, bias: bool) -> None:
        """Create the parameters and fill them."""
        rows, columns = self.matrix
        taps = () if self.kernel_size is None else (self.kernel_size, self.kernel_size)
        many = 1 if self.shared else self.layers
        self.weight = nn.Parameter(torch.empty(many, rows, columns, *taps))
        self.bias = nn.Parameter(torch.empty(many, self.width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights; see the class."""
        inputs = self.weight[0, 0].numel()
        nn.init.normal_(self.weight, std=1 / math.sqrt(inputs))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def width(self) -> int:
        """Features of the state, and of the output."""
        return self.features

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a layer's K."""
        return self.features, self.features

    @property
    def axis(self) -> int:
        """The axis that is propagated."""
        return -1 if self.kernel_size is None else 1

    @abstractmethod
    def operators(self) -> list[Operator]:
        """One for each layer, from the parameters as they are now."""

    @abstractmethod
    def step(self, state: State, operator: Operator) -> State:
        """One layer."""

    @abstractmethod
    def energy(self, state: Tensor, operator: Operator) -> Tensor | None:
        """(B,) what the layer's differential equation conserves or dissipates; None where there is none.

        Args:
            state: (B, ...) as :meth:`trajectory` gives it.
            operator: one of :meth:`operators`.
        """

    def parts(self, state: Tensor) -> State:
        """A state tensor in its parts."""
        return (state,)

    def join(self, state: State) -> Tensor:
        """The parts of a state as one tensor."""
        return state[0]

    def enter(self, x: Tensor) -> Tensor:
        """The state (B, ...) that an input starts from.

        Raises:
            MapError: the input has another number of features or axes.
        """
        dense = self.kernel_size is None
        wanted = f"(B, ..., {self.features})" if dense else f"(B, {self.features}, H, W)"
        fits = x.dim() >= 2 if dense else x.dim() == 4
        if not fits or x.shape[self.axis] != self.features:
            raise MapError(f"{type(self).__name__} takes {wanted}; got {tuple(x.shape)}.")
        return x

    def advance(self, state: Tensor, operator: Operator) -> Tensor:
        """One layer, from state tensor to state tensor (B, ...)."""
        return self.join(self.step(self.parts(state), operator))

    def trajectory(self, x: Tensor) -> Iterator[Tensor]:
        """The states (B, ...) before the first layer and after each: ``layers + 1`` in all."""
        state = self.parts(self.enter(x))
        yield self.join(state)
        for operator in self.operators():
            state = self.step(state, operator)
            yield self.join(state)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., features) or (B, features, H, W) to the state after the last layer."""
        state = self.parts(self.enter(x))
        for operator in self.operators():
            state = self.step(state, operator)
        return self.join(state)

    def resampled(self, layers: int) -> Self:
        """The same differential equation in another number of layers: a new module, to the same time.

        The weights, taken as values at the middles of the layers, are interpolated linearly in time, and
        ``h`` is adapted. Training a few layers first and going on with more is the multilevel
        learning of Haber & Ruthotto (2017). Shared weights stay as they are.

        Args:
            layers: of the new propagator, >= 1.

        Raises:
            OptionError: not such a number.
        """
        whole("layers", layers)
        made = copy.deepcopy(self)
        made.layers, made.h = layers, self.h * self.layers / layers
        if not self.shared:
            made.weight = nn.Parameter(_in_time(self.weight.detach(), layers))
            made.bias = None if self.bias is None else nn.Parameter(_in_time(self.bias.detach(), layers))
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the parameters; torch's own hook for it, which ``to``, ``half`` and others call.

        A stack of kernels has five axes, as many as a kernel in three dimensions, but is none: memory formats
        such as ``channels_last`` are for the kernels, which each layer is given, and leave the stack alone.
        """

        def flat(value: Tensor) -> Tensor:
            return fn(value) if value.dim() != 5 else fn(value.flatten(1)).view(value.shape)

        return super()._apply(flat, recurse)

    def extra_repr(self) -> str:
        kind = "dense" if self.kernel_size is None else f"kernel_size={self.kernel_size}"
        shared = ", shared" if self.shared else ""
        return f"{self.features}, layers={self.layers}, h={self.h:g}, {kind}{shared}"

    def _per_layer(self, *stacked: Tensor | None) -> list[Operator]:
        """Stacked tensors, those that are not None, cut into layers."""
        parts = [tensor.unbind(0) for tensor in stacked if tensor is not None]
        made = list(zip(*parts, strict=True))
        return made * self.layers if self.shared else made


def _in_time(stacked: Tensor, layers: int) -> Tensor:
    """(layers, ...) from (N, ...), interpolated linearly between the middles of N intervals."""
    flat = stacked.flatten(1).t()[None]
    made = F.interpolate(flat, size=layers, mode="linear", align_corners=False)
    return made[0].t().reshape(layers, *stacked.shape[1:]).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``K x + b``, dense on the last axis or as a convolution with zero padding."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number, at least {least}; got {value!r}.")
    return value


def number(name: str, value: Any, positive: bool = False) -> float:
    """A finite number, > 0 or >= 0."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (positive and value == 0):
        raise OptionError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}; got {value!r}.")
    return float(value)
