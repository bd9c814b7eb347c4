"""Explicit Euler: the residual network with a step, plain and with antisymmetric weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activations import Activation, antiderivative
from .base import Operator, Propagator, State, linear, number

__all__ = ["Antisymmetric", "Euler"]


class Euler(Propagator):
    """Explicit Euler steps of a residual network: ``y <- y + h act(K y + b)``.

    Equation 2 of Gonzalez & Mang (2018), after Haber & Ruthotto (2017), who write features as rows: their
    ``Y K`` is ``K^T y`` here. With ``h = 1`` this is the plain residual network. Nothing keeps it stable: it
    grows where ``act' K`` has eigenvalues with positive real part, forgets where they are negative, and
    expands rotations slightly, by ``sqrt(1 + (h w)^2)`` a layer at frequency w.

    Args:
        features: see :class:`~twnn_plugin.blocks.propagation.Propagator`, as for all the others.
        layers: number of steps.
        h: step.
        activation: name or module.
        kernel_size: odd, for convolutions; None for dense layers.
        shared: one weight for all layers.
        bias: whether there is one.
    """

    def __init__(
        self,
        features: int,
        layers: int = 1,
        h: float = 0.1,
        activation: Activation = "tanh",
        kernel_size: int | None = None,
        shared: bool = False,
        bias: bool = True,
    ):
        super().__init__(features, layers, h, activation, kernel_size, shared, bias)

    def operators(self) -> list[Operator]:
        return self._per_layer(self.weight, self.bias)

    def step(self, state: State, operator: Operator) -> State:
        return (euler_step(state[0], operator, self.activation, self.h),)

    def energy(self, state: Tensor, operator: Operator) -> None:
        """None: nothing is conserved for a general K."""


class Antisymmetric(Propagator):
    """Explicit Euler steps with antisymmetric weights: ``y <- y + h act((K - K^T - gamma I) y + b)``.

    Haber & Ruthotto (2017); Chang et al. (2019), "AntisymmetricRNN", for recurrent networks. The poster of
    Gonzalez & Mang (2018) prints ``K + K^T - gamma I``, which is symmetric and does not do what its text
    says; the sign is a misprint. Both Haber & Ruthotto and the poster have a factor 1/2 on the bracket:
    halve ``weight`` and ``gamma`` for it.

    The eigenvalues of ``K - K^T - gamma I`` have the real part ``-gamma``, and for an activation that does
    not decrease ``act' A`` has none with a positive one: the differential equation neither
    grows nor, with ``gamma = 0``, forgets. Explicit Euler still expands a rotation of frequency w by
    ``sqrt((1 - h gamma)^2 + (h w)^2)`` a layer, at slope 1; ``gamma`` of about ``h w^2 / 2`` makes up for it.

    For convolutions K^T is the transposed convolution with the same kernel. As its kernel is that of K with
    channels swapped and both axes reversed, ``K - K^T`` is applied as one convolution.

    Args:
        features: see :class:`~twnn_plugin.blocks.propagation.Propagator`, as for all the others.
        layers: number of steps.
        h: step.
        gamma: damping, >= 0.
        activation: name or module.
        kernel_size: odd, for convolutions; None for dense layers.
        shared: one weight for all layers.
        bias: whether there is one.
    """

    def __init__(
        self,
        features: int,
        layers: int = 1,
        h: float = 0.1,
        gamma: float = 0.0,
        activation: Activation = "tanh",
        kernel_size: int | None = None,
        shared: bool = False,
        bias: bool = True,
    ):
        super().__init__(features, layers, h, activation, kernel_size, shared, bias)
        self.gamma = number("gamma", gamma)

    def matrices(self) -> Tensor:
        """(layers or 1, features, features[, k, k]) ``K - K^T - gamma I``."""
        transposed = self.weight.transpose(1, 2)
        if self.kernel_size is not None:
            transposed = transposed.flip(3, 4)
        a = self.weight - transposed
        if not self.gamma:
            return a
        eye = torch.eye(self.features, dtype=a.dtype, device=a.device)
        if self.kernel_size is not None:
            centre = (self.kernel_size // 2,) * 4
            eye = nn.functional.pad(eye[:, :, None, None], centre)
        return a - self.gamma * eye

    def operators(self) -> list[Operator]:
        return self._per_layer(self.matrices(), self.bias)

    def step(self, state: State, operator: Operator) -> State:
        return (euler_step(state[0], operator, self.activation, self.h),)

    def energy(self, state: Tensor, operator: Operator) -> Tensor:
        """(B,) ``sum F(A y + b)`` with ``F' = act``, of which ``d/dt = -gamma |act(A y + b)|^2``."""
        return antiderivative(self.activation, linear(state, *_both(operator))).flatten(1).sum(dim=1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma:g}"


def euler_step(y: Tensor, operator: Operator, activation: nn.Module, h: float) -> Tensor:
    """``y + h act(A y + b)``."""
    return torch.add(y, activation(linear(y, *_both(operator))), alpha=h)


def _both(operator: Operator) -> tuple[Tensor, Tensor | None]:
    return (operator[0], operator[1]) if len(operator) == 2 else (operator[0], None)
