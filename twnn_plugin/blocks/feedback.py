"""The wormhole itself: message, gate, policy and settings of one feedback connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import transforms
from ..errors import AttachError, OptionError
from ..gates import FollowsGate, Gate, GateOutput
from ..gates.base import ordinary
from ..regularise import jacobian_frobenius
from ..types import PolicyView
from .aids import Aids
from .choice import Choice, Pending
from .companion import Companion
from .message import LAYOUTS, Message, layout_of, maxima, pool
from .one_map import Frozen
from .origin import Origin
from .path import check_path
from .record import Rest, SpanRecord
from .settings import SolveSettings
from .settle import at_rest, settle

__all__ = ["Feedback", "Replay", "fill_missing"]

Replay = Callable[..., Tensor]
"""``replay(entry, *constants) -> output``: the span applied to rows of inputs."""


class Feedback(Origin):
    """A gated connection from a span's output back to its input.

    The span becomes the equation ``z = span(entry + gate * message(z))`` (Habiba & Pearlmutter 2021,
    figures 1 and 2), solved from its open-loop output. Where the gate is closed the open-loop output
    is the solution and nothing is computed.

    Args:
        span: name for reports.
        entry: an example of the span's input, (B, ...).
        out: an example of the span's output.
        gate: factory of the gate, called with the numbers of channels of ``out`` and ``entry``, and whether
            ``out`` has positions.
        policy: module of a :class:`~twnn_plugin.types.PolicyView` that returns (B,) bool, who is iterated;
            None: where the gate is open.
        settings: how the equation is solved.
        channels_last: whether 4-axis activations are (B, H, W, C).
        scale: initial scale of the message.
        aids: what helps training.
        path: a module on the message's way, from a state (b, ...) like ``out`` to one of the same shape, such
            as a propagator; see :func:`~twnn_plugin.blocks.path.check_path`.
    """

    def __init__(
        self,
        span: str,
        entry: Tensor,
        out: Tensor,
        gate: Callable[[int, int, bool], Gate],
        policy: nn.Module | None = None,
        settings: SolveSettings | None = None,
        channels_last: bool = False,
        scale: float = 0.1,
        aids: Aids | None = None,
        path: nn.Module | None = None,
    ):
        super().__init__()
        self.span = span
        self.mode = "replay"  # what it is attached to may know better
        self.out_layout = layout_of(out, channels_last)
        entry_layout = layout_of(entry, channels_last)
        channels = out.shape[LAYOUTS[self.out_layout]]
        outputs = entry.shape[LAYOUTS[entry_layout]]
        self.aids = aids if aids is not None else Aids()
        contraction = self.aids.contraction
        if path is not None:
            check_path(path, out, contraction)
        self.message = Message(self.out_layout, entry_layout, channels, outputs, scale, contraction, path)
        self.gate = gate(channels, outputs, self.out_layout != "NC")
        self.policy = policy
        self.settings = settings if settings is not None else SolveSettings()
        self.opening_step: Tensor
        self.register_buffer("opening_step", torch.zeros((), dtype=torch.long))
        self.companion: Companion | None = None
        self._latest = _Latest()
        self.shapes: tuple[Any, ...] | None = None  # of the last forward pass, for counting
        self.pending: Pending | None = None
        self.alone = True  # not one of several, which a checkpoint has together or not at all
        self.register_load_state_dict_pre_hook(_fill_own)

    def forward(self, value: Any) -> Any:
        """Identity: containers that run all their children in order are not disturbed."""
        return value

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks each module for this; else it stops at some annotation that it cannot read.
        raise AttachError(
            f"torch.jit.script cannot follow wormhole {self.span!r}: its equation is solved in Python. "
            "tw.export(model, images) exports the form with a fixed number of steps, and torch.compile takes "
            "the model as it is."
        )

    @property
    def last(self) -> SpanRecord | None:
        """The record of the last pass; None before the first. One in which nothing opened is made here."""
        record = self._latest.record
        if isinstance(record, Rest):
            record = self._latest.record = record.record()
        return record

    @last.setter
    def last(self, record: SpanRecord | None) -> None:
        self._latest.record = None if record is None else record.outlasting()

    def settle(
        self,
        entry: Tensor,
        out: Tensor,
        replay: Replay,
        constants: Sequence[Tensor] = (),
        frozen: Frozen | None = None,
    ) -> Tensor:
        """The span's settled output: the group of one of :func:`~twnn_plugin.blocks.settle.settle`.

        Args:
            entry: (B, ...) the span's input.
            out: (B, ...) its open-loop output.
            replay: the span, as a function of rows of (entry, *constants).
            constants: further (B, ...) inputs of the span.
            frozen: holds batch statistics and draws fixed in training; None if there are none.

        Returns:
            (B, ...) like ``out``. In eval mode, rows whose solve failed keep their open-loop value.
        """

        def one(entry: Tensor, signals: tuple[Tensor], *constants: Tensor) -> tuple[Tensor]:
            return (replay(entry + signals[0], *constants),)

        if frozen is None and at_rest((self,), (out,)):
            return out
        return settle((self,), (entry,), (out,), one, constants, frozen)[0]

    def choose(self, out: Tensor) -> Choice:
        """Who is iterated, from the (B, ...) open-loop output of the source.

        Raises:
            OptionError: the policy did not return (B,) booleans.
        """
        if self.training:
            self._check_first()
        features = self._features(out).to(self.gate.dtype)
        # A broken sample must not reach the gate's weights: zero times NaN is NaN.
        features = torch.nan_to_num(features, nan=0.0, posinf=0.0, neginf=0.0)
        with torch.autocast(out.device.type, enabled=False):
            opinion = self.gate(features)
        self._check_opinion(opinion, features.shape[0])
        each = opinion.strength.dim() > 1
        probability = opinion.probability.detach()
        means = features[:, : out.shape[LAYOUTS[self.out_layout]]]
        view = PolicyView(self.span, means, probability.amax(dim=1) if each else probability, opinion.open)
        wanted = opinion.open if self.policy is None else self.policy(view)
        if not isinstance(wanted, Tensor) or wanted.shape != opinion.open.shape or wanted.dtype != torch.bool:
            if isinstance(wanted, Tensor):
                returned = f"{tuple(wanted.shape)} of {wanted.dtype}"
            else:
                returned = f"a {type(wanted).__name__}"
            raise OptionError(
                f"Policy {type(self.policy).__name__} must return {tuple(opinion.open.shape)} booleans; it "
                f"returned {returned}."
            )
        some = opinion.strength.detach() > 0
        opened = wanted & (some.any(dim=1) if each else some)
        amount = torch.where(opened[:, None] if each else opened, opinion.strength, 0.0)
        if self.aids.opening:
            amount = amount * self.rise()
        return Choice(opened, amount, opinion.probability, opinion.margin)

    def _check_first(self) -> None:
        """Refuse a pass that is made again, in the backward pass, where the one before has changed it."""
        # As torch.utils.checkpoint asks; there is no public question.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
            return
        rising = self.aids.opening and int(self.opening_step) < self.aids.opening
        if rising or getattr(self.gate, "budget", None) is not None:
            moved = "opening" if rising else "budget"
            raise AttachError(
                f"This pass through wormhole {self.span!r} is made again in the backward pass "
                f"(torch.utils.checkpoint around the model), and what {moved}= changes with every pass is "
                "not as it was. Save memory by model.set_grad_checkpointing(), or checkpoint what lies "
                "outside of the spans."
            )

    def glance(self, out: Tensor) -> Callable[[], Tensor] | None:
        """In eval mode, what gives the probabilities if no row of ``out`` would open; None: call ``choose``.

        With the gate's own :meth:`~twnn_plugin.gates.Gate.glance`, where the policy leaves it to the gate.
        """
        own = self._modules  # a fifth of the time that the attributes take
        policy = own.get("policy")
        if policy is None:
            policy = self.policy
        if self.training or not (policy is None or isinstance(policy, FollowsGate)):
            return None
        if torch.is_grad_enabled():  # which costs less to ask than to set
            with torch.no_grad():
                return self.glance(out)
        gate: Gate = own["gate"]  # type: ignore[assignment]
        told = gate.look(out, self.out_layout)
        if told is not None:
            return told[0]
        if torch.is_autocast_enabled(out.device.type):
            with torch.autocast(out.device.type, enabled=False):
                return gate.glance(self._features(out))
        return gate.glance(self._features(out))

    def rested(self, probability: Callable[[], Tensor], group: str | None) -> None:
        """Called in place of :meth:`solved` after a pass in which no row was open."""
        self._latest.record = Rest(self.span, probability, group, self.mode)
        if self.pending is not None:
            self.pending = None

    def _features(self, out: Tensor) -> Tensor:
        """(B, C) what the gate looks at, or (B, 2 C) if it looks at maxima, too, in float32 or float64."""
        # The gate reads the activations but does not shape them: its gradient stays its own.
        # Traced with gradients and checked without: both must be the same graph.
        apart = out.requires_grad or transforms.active() or torch.jit.is_tracing()
        given = out.detach() if apart else out
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        means = pool(given, self.out_layout, dtype)
        if self.gate.pooling == "avg":
            return means
        return torch.cat([means, maxima(given, self.out_layout, dtype)], 1)

    def _check_opinion(self, opinion: GateOutput, rows: int) -> None:
        if not isinstance(opinion, GateOutput):
            raise OptionError(
                f"Gate {type(self.gate).__name__} of span {self.span!r} must return a GateOutput; it "
                f"returned a {type(opinion).__name__}."
            )
        fits = [(rows,), (rows, self.message.scale.numel())]
        strength, probability = tuple(opinion.strength.shape), tuple(opinion.probability.shape)
        if strength not in fits or probability != strength or tuple(opinion.open.shape) != (rows,):
            raise OptionError(
                f"Gate {type(self.gate).__name__} of span {self.span!r} must give strength and probability "
                f"of shape {fits[0]} or, for each channel of the message, {fits[1]}, and open of shape "
                f"{fits[0]}; it gave {strength}, {probability} and {tuple(opinion.open.shape)}."
            )

    def rise(self) -> Tensor:
        """The message's strength as of the training steps so far, a scalar in (0, 1]."""
        return ((self.opening_step + 1) / max(self.aids.opening, 1)).clamp(max=1.0)

    def solved(self, training: bool) -> None:
        """Called after each pass, with ``last`` set."""
        if not training:
            return
        if self.aids.opening:
            self.opening_step = ordinary(self.opening_step + 1)
        if self.last is not None:
            self.gate.observe(self.last.steps[self.last.open])

    def auxiliary_loss(self) -> Tensor | None:
        """What this wormhole adds to the loss of the last pass in training; None: nothing.

        The gate's penalty, and ``jacobian`` times the Jacobian regularisation of Bai et al. (2021) of the
        solved map, at its solution and over the open rows. It can be taken once a pass, under any autocast.
        """
        terms = [self.gate.penalty(), self._jacobian_penalty()] if self.training else []
        found = [term for term in terms if term is not None]
        return sum(found[1:], found[0]) if found else None

    def _jacobian_penalty(self) -> Tensor | None:
        if self.pending is None or not self.aids.jacobian:
            return None
        pending, self.pending = self.pending, None  # it holds a whole pass
        rows = torch.nonzero(pending.rows).flatten()
        if rows.numel() == 0:
            return None
        state, context = pending.taken(rows)
        with torch.autocast(rows.device.type, pending.autocast, enabled=pending.autocast is not None):
            return self.aids.jacobian * jacobian_frobenius(pending.f, state, *context)

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pending": None, "_latest": _Latest(self.last)}


@dataclass
class _Latest:
    """A wormhole's last record, in a place that takes less time to write to than a module."""

    record: SpanRecord | Rest | None = None


def _fill_own(module: Feedback, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    if module.alone:
        fill_missing(module, state, prefix)


def fill_missing(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a plain backbone's checkpoint load strictly: wormholes it knows nothing of stay as they are.

    Those on the meta device have no values to stay with, so that they are missing.
    """
    if any(key.startswith(prefix) for key in state):
        return
    own = module.state_dict()
    if any(value.is_meta for value in own.values()):
        return
    for name, value in own.items():
        state[prefix + name] = value
