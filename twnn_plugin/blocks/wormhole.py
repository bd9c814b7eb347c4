"""The wormhole-gated block: any module whose output can be fed back to its input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import gates
from ..errors import MapError, OptionError
from ..gates import Gate, LearnedGate
from ..gates.base import POOLINGS, choose
from .aids import Aids
from .count import multiply_adds
from .feedback import Feedback
from .one_map import OneMap
from .open_loop import OpenLoop
from .paths import MessagePath, path_of
from .prices import set_prices
from .record import SpanRecord
from .settings import SolveSettings, check_names, option_names

__all__ = ["Wormhole", "block_options"]


class Wormhole(nn.Module):
    """A module, or a chain of modules, with a gated connection from its output to its input.

    ``z = body(x + gate * message(z))``, solved for z from the plain output ``body(x)``; equations 3
    and 7 of Habiba & Pearlmutter (2021). With a closed gate it is the body.

    Args:
        body: a module of one tensor, or a sequence of such modules.
        example: an input (B, ...) of the body, to learn the shapes from; its values do not matter.
        gate: registered name, ``(name, options)`` or a gate made for the output's channels.
        policy: who is iterated, a module such as ``tw.policy("random", p=0.3)`` and not its name; None: where
            the gate is open.
        channels_last: whether 4-axis activations are (B, H, W, C).
        scale: initial scale of the message.
        message: what the state goes through before it is normalised and projected, to one of the same shape:
            a module, a registered block such as ``"verlet"`` or ``("verlet", {"layers": 10})``, or a function
            that makes a module for a number of channels; None: nothing. It must treat samples one by one, and
            neither draw random numbers nor use batch statistics.
        **settings: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm``, as in
            :func:`twnn_plugin.fix`; and ``contraction``, ``opening``, ``jacobian``, see
            :class:`~twnn_plugin.blocks.aids.Aids`.

    Raises:
        MapError: the body does not map a tensor to a tensor of the same batch size.
        OptionError: an unknown or impossible option.
    """

    def __init__(
        self,
        body: nn.Module | Sequence[nn.Module],
        example: Tensor,
        gate: str | tuple[str, dict[str, Any]] | Gate = "straight_through",
        policy: nn.Module | None = None,
        channels_last: bool = False,
        scale: float = 0.1,
        message: MessagePath | None = None,
        **settings: Any,
    ):
        super().__init__()
        check_names("A wormhole", settings, block_options())
        _check_policy(policy)
        aids, settings = Aids.split(settings)
        self.body = body if isinstance(body, nn.Module) else nn.Sequential(*body)
        out = _probe(self.body, example)
        self.one_map = OneMap([self.body])
        self.feedback = Feedback(
            "body->body",
            example,
            out,
            gate_factory(gate),
            policy,
            SolveSettings().changed(**settings),
            channels_last,
            scale,
            aids,
            path_of(message, out, channels_last),
        )
        self.example = example.new_empty(0).new_zeros(()).expand(1, *example.shape[1:])
        set_prices(self, [self.feedback], lambda: self(self.example))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) input to the settled output of the body."""
        watched = OpenLoop(self.one_map, x, self.training)
        out, frozen = watched.finish(self.body(x), lambda: self.body(x))
        return self.feedback.settle(x, out, self.body, (), frozen)

    def auxiliary_loss(self) -> Tensor:
        """The penalties of the last training pass, a scalar; zero if there are none."""
        penalty = self.feedback.auxiliary_loss()
        return self.feedback.message.scale.new_zeros(()) if penalty is None else penalty

    @property
    def last(self) -> SpanRecord | None:
        """The record of the last forward pass, multiply-adds counted."""
        record = self.feedback.last
        if record is not None and record.evaluations and not record.multiply_adds:
            record.multiply_adds = record.evaluations * multiply_adds(self.feedback, self.body, [self.body])
        return record


def block_options(*without: str) -> list[str]:
    """The options of a :class:`Wormhole`, but for ``without``."""
    known = [*option_names(Wormhole, "body", "example"), *SolveSettings.names(), *Aids.names()]
    return [name for name in known if name not in without]


def _check_policy(policy: Any) -> None:
    """Refuse what cannot be asked; names stand for policies where there are policies, which is not here."""
    if policy is not None and (isinstance(policy, type) or not callable(policy)):
        raise OptionError(
            "The policy of a block is made beforehand, policy=tw.policy('random', p=0.3), or None: whoever's "
            f"gate is open; got {policy!r}."
        )


def gate_factory(gate: str | tuple[str, dict[str, Any]] | Gate) -> Callable[..., Gate]:
    """``make(channels, outputs, positions=False)``, which makes the gate of a wormhole.

    Of the numbers of channels of state and message, and whether the state has positions.

    Raises:
        UnknownNameError: no such gate.
        OptionError: that is no gate, or its options have channels. From the function: an impossible option, a
            gate made for other channels, or a gate, rather than the name of one, for a second wormhole.
    """
    gates.check_gate(gate)
    if isinstance(gate, Gate):
        return _once(gate)
    name, options = (gate, {}) if isinstance(gate, str) else gate
    if "channels" in options:
        raise OptionError(
            f"A wormhole's gate has the channels of its source: leave channels out of gate {name!r}; "
            f"got channels={options['channels']!r}."
        )
    gates.registry.entry(name)  # an unknown name is said now, not in the middle of the construction

    def make(channels: int, outputs: int, positions: bool = False) -> Gate:
        each: dict[str, Any] = {"outputs": outputs} if options.get("per") == "channel" else {}
        if positions and "pooling" in inspect.signature(gates.get(name)).parameters:
            each["pooling"] = "catavgmax"
        return _fitting(
            gates.registry.make(name, channels=channels, **{**each, **options}), channels, outputs
        )

    return make


def _once(gate: Gate) -> Callable[..., Gate]:
    """A factory that gives this gate to one wormhole: budget, threshold and penalty are one wormhole's."""
    given: list[Gate] = []

    def give(channels: int, outputs: int, positions: bool = False) -> Gate:
        if given:
            raise OptionError(
                f"gate is one {type(gate).__name__}, and there is more than one wormhole, each with a "
                "threshold, a budget and a penalty of its own: give the name of a gate or (name, options), "
                "such as ('sigmoid', {'budget': 0.3})."
            )
        given.append(gate)
        return _fitting(gate, channels, outputs)

    return give


def _fitting(gate: Gate, channels: int, outputs: int) -> Gate:
    choose("pooling", gate.pooling, POOLINGS)
    if isinstance(gate, LearnedGate):
        gate.check_fits(channels, outputs)
    return gate


def _probe(body: nn.Module, example: Tensor) -> Tensor:
    modes = [(module, module.training) for module in body.modules()]
    body.eval()
    try:
        with torch.no_grad():
            out = body(example)
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != example.shape[0]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise MapError(
            f"A wormhole's body must return one tensor with the {example.shape[0]} rows it was given; it "
            f"returned {got}."
        )
    return out
