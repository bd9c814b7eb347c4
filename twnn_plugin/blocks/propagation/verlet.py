"""Verlet steps of a Hamiltonian system: reversible, volume-preserving, bounded."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...errors import MapError, OptionError
from .activations import Activation, antiderivative
from .base import Operator, Propagator, State, linear, whole
from .reversible import run_reversibly

__all__ = ["Verlet"]


class Verlet(Propagator):
    """Verlet (leapfrog) steps of a Hamiltonian system in two parts of the state, y and z.

    ``z <- z - h act(K^T y + c)``, then ``y <- y + h act(K z + b)``, with the new z: the forward propagation
    of Haber & Ruthotto (2017) and Gonzalez & Mang (2018), for ``dy/dt = act(K z + b)``,
    ``dz/dt = -act(K^T y + c)``. They write one bias for both, which K must be square for; here each has
    its own. z is staggered: it lives half a step before y.

    Layers are undone by :meth:`inverse`, exactly but for rounding, and preserve volume for any weights and
    any ``h``. Without activation equal layers are bounded if and only if ``h ||K|| < 2``; with one whose
    slope is at most 1 that is the condition at rest. With ``reversible=True`` the backward pass works the
    states out again from the output instead of keeping them, for one more evaluation of each layer: a
    thousand layers take the activations of one. Such a backward pass cannot be differentiated.

    Args:
        features: size of the input; the first ``split`` are y, the others z.
        layers: see :class:`~twnn_plugin.blocks.propagation.Propagator`, as for all not named here.
        h: step.
        activation: name or module.
        kernel_size: odd, for convolutions; None for dense layers.
        shared: one weight for all layers.
        bias: whether there is one.
        split: features of y, by default half, the larger half of an odd number.
        augment: instead of splitting the input, take it as y and this many zeros as z. The output is the
            whole state, of ``features + augment``.
        reversible: keep no states for the backward pass.

    Raises:
        OptionError: an option out of range, or ``reversible`` with an activation that has parameters, or
            that draws random numbers.
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
        *,
        split: int | None = None,
        augment: int = 0,
        reversible: bool = False,
    ):
        self.augment = whole("augment", augment, least=0)
        self.split = _split(whole("features", features), split, augment)
        super().__init__(features, layers, h, activation, kernel_size, shared, bias)
        if not isinstance(reversible, bool):
            raise OptionError(f"reversible must be True or False; got {reversible!r}.")
        if reversible and next(self.activation.parameters(), None) is not None:
            raise OptionError(
                f"reversible=True takes an activation without parameters; {type(self.activation).__name__} "
                "has some, and they would get no gradient."
            )
        if reversible and _draws(self.activation):
            raise OptionError(
                "reversible=True takes an activation without random numbers; "
                f"{type(self.activation).__name__} draws some in training, and would draw others when the "
                "states are worked out again."
            )
        self.reversible = reversible

    @property
    def width(self) -> int:
        return self.features + self.augment

    @property
    def matrix(self) -> tuple[int, int]:
        return self.split, self.width - self.split

    def enter(self, x: Tensor) -> Tensor:
        x = super().enter(x)
        if not self.augment:
            return x
        shape = list(x.shape)
        shape[self.axis] = self.augment
        return torch.cat([x, x.new_zeros(shape)], dim=self.axis)

    def parts(self, state: Tensor) -> State:
        """(y, z)."""
        y, z = state.split([self.split, self.width - self.split], dim=self.axis)
        return y, z

    def join(self, state: State) -> Tensor:
        return torch.cat(state, dim=self.axis)

    def operators(self) -> list[Operator]:
        """(K, K^T) or (K, K^T, b, c) of each layer."""
        transposed = self.weight.transpose(1, 2)
        if self.kernel_size is not None:
            transposed = transposed.flip(3, 4)  # the kernel of the transposed convolution
        b, c = (None, None) if self.bias is None else self.bias.split(list(self.matrix), dim=1)
        return self._per_layer(self.weight, transposed, b, c)

    def step(self, state: State, operator: Operator) -> State:
        y, z = state
        z = torch.sub(z, self.activation(self._at_z(y, operator)), alpha=self.h)
        y = torch.add(y, self.activation(self._at_y(z, operator)), alpha=self.h)
        return y, z

    def unstep(self, state: State, operator: Operator) -> State:
        """The state that :meth:`step` came from."""
        y, z = state
        y = torch.sub(y, self.activation(self._at_y(z, operator)), alpha=self.h)
        z = torch.add(z, self.activation(self._at_z(y, operator)), alpha=self.h)
        return y, z

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., features) or (B, features, H, W) to the last state, y and z side by side."""
        if not self.reversible:
            return super().forward(x)
        state = self.enter(x)
        if state.dtype in (torch.float16, torch.bfloat16):
            raise MapError(
                f"reversible=True takes states in float32 or float64, got {state.dtype}: in lower precision "
                "the states worked out in the backward pass would not be those of the forward pass."
            )
        return self.join(run_reversibly(self, self.parts(state)))

    def inverse(self, out: Tensor) -> Tensor:
        """The start that an output came from, exact but for rounding.

        Args:
            out: (B, ...) the whole state after the last layer.

        Returns:
            (B, ...) the state before the first: the input, and with ``augment`` z after it.

        Raises:
            MapError: not the shape of an output.
        """
        for state in self.backwards(out):
            out = state
        return out

    def backwards(self, out: Tensor) -> Iterator[Tensor]:
        """The states from the last, ``out``, to the first: :meth:`trajectory` from its end."""
        if out.dim() < 2 or out.shape[self.axis] != self.width:
            raise MapError(
                f"The state of this {type(self).__name__} has {self.width} features on axis {self.axis}; got "
                f"{tuple(out.shape)}."
            )
        state = self.parts(out)
        yield out
        for operator in reversed(self.operators()):
            state = self.unstep(state, operator)
            yield self.join(state)

    def energy(self, state: Tensor, operator: Operator) -> Tensor:
        """(B,) ``sum F(K z + b) + sum F(K^T y + c)`` with ``F' = act``, at the time of y.

        The differential equation conserves it. z is first brought to the time of y by half a step, or the
        energy would swing with ``h``; so taken it does with ``h^2``.
        """
        y, z = self.parts(state)
        forces = self._at_z(y, operator)
        z = torch.sub(z, self.activation(forces), alpha=self.h / 2)
        parts = (forces, self._at_y(z, operator))
        return sum(antiderivative(self.activation, v).flatten(1).sum(dim=1) for v in parts)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        how = f"augment={self.augment}" if self.augment else f"split={self.split}"
        return f"{super().extra_repr()}, {how}{', reversible' if self.reversible else ''}"

    def _at_y(self, z: Tensor, operator: Operator) -> Tensor:
        return linear(z, operator[0], operator[2] if len(operator) > 2 else None)

    def _at_z(self, y: Tensor, operator: Operator) -> Tensor:
        return linear(y, operator[1], operator[3] if len(operator) > 2 else None)


def _draws(activation: nn.Module) -> bool:
    """Whether an activation draws random numbers in training; seen on a copy."""
    tried = copy.deepcopy(activation).train()
    probe = torch.linspace(-2, 2, 16, device="cpu").reshape(2, 8)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        tried(probe)
        return not torch.equal(before, torch.get_rng_state())


def _split(features: int, split: int | None, augment: int) -> int:
    """How many features are y."""
    if augment:
        if split is not None:
            raise OptionError(
                "split and augment exclude each other: with augment all of the input is y, and z are zeros."
            )
        return features
    if features < 2:
        raise OptionError("Verlet splits its features into y and z: it needs at least 2, or augment=1.")
    if split is None:
        return features - features // 2
    if whole("split", split) >= features:
        raise OptionError(f"split must leave z at least one of the {features} features; got {split!r}.")
    return split
