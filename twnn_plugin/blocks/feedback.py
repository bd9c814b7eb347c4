"""The wormhole itself: message, gate, policy and the solve of one span."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..fixed_point import run
from ..gates import Gate, watch_difficulty
from ..types import PolicyView, Solution, Status
from .message import LAYOUTS, Message, layout_of, pool
from .one_map import Frozen
from .record import SpanRecord
from .settings import SolveSettings

__all__ = ["Feedback", "Replay"]

Replay = Callable[..., Tensor]
"""``replay(entry, *constants) -> output``: the span applied to rows of inputs."""


class _Choice(NamedTuple):
    """Who is iterated and how strongly: (B,) each."""

    opened: Tensor
    amount: Tensor
    probability: Tensor
    margin: Tensor | None


class Feedback(nn.Module):
    """A gated connection from a span's output back to its input.

    The span becomes the equation ``z = span(entry + gate * message(z))`` (Habiba & Pearlmutter 2021,
    figures 1 and 2), solved from its open-loop output. Where the gate is closed the open-loop output
    is the solution and nothing is computed.

    Args:
        span: name for reports.
        entry: an example of the span's input, (B, ...).
        out: an example of the span's output.
        gate: factory of the gate, called with the number of channels of ``out``.
        policy: module of a :class:`~twnn_plugin.types.PolicyView` that returns (B,) bool, who is iterated;
            None: where the gate is open.
        settings: how the equation is solved.
        channels_last: whether 4-axis activations are (B, H, W, C).
        scale: initial scale of the message.
    """

    def __init__(
        self,
        span: str,
        entry: Tensor,
        out: Tensor,
        gate: Callable[[int], Gate],
        policy: nn.Module | None = None,
        settings: SolveSettings | None = None,
        channels_last: bool = False,
        scale: float = 0.1,
    ):
        super().__init__()
        self.span = span
        self.out_layout = layout_of(out, channels_last)
        entry_layout = layout_of(entry, channels_last)
        channels = out.shape[LAYOUTS[self.out_layout]]
        self.message = Message(
            self.out_layout, entry_layout, channels, entry.shape[LAYOUTS[entry_layout]], scale
        )
        self.gate = gate(channels)
        self.policy = policy
        self.settings = settings if settings is not None else SolveSettings()
        self.last: SpanRecord | None = None
        self.shapes: tuple[Any, ...] | None = None  # of the last forward pass, for counting
        self.register_load_state_dict_pre_hook(_fill_missing)

    def forward(self, value: Any) -> Any:
        """Identity: containers that run all their children in order are not disturbed."""
        return value

    def settle(
        self,
        entry: Tensor,
        out: Tensor,
        replay: Replay,
        constants: Sequence[Tensor] = (),
        frozen: Frozen | None = None,
    ) -> Tensor:
        """The span's settled output.

        Args:
            entry: (B, ...) the span's input.
            out: (B, ...) its open-loop output.
            replay: the span, as a function of rows of (entry, *constants).
            constants: further (B, ...) inputs of the span.
            frozen: holds batch statistics and draws fixed in training; None if there are none.

        Returns:
            (B, ...) like ``out``. In eval mode, rows whose solve failed keep their open-loop value.
        """
        choice = self._choose(out)
        probes = [c.new_zeros(1, *c.shape[1:]) for c in constants]
        self.shapes = (entry.shape[1:], out.shape[1:], probes)
        learns = self.training and torch.is_grad_enabled()
        if out.shape[0] == 0 or (not learns and not bool(choice.opened.any())):
            self._note(choice, None, None)
            return out
        if learns:
            return self._settle_all(entry, out, replay, tuple(constants), frozen, choice)
        return self._settle_opened(entry, out, replay, tuple(constants), frozen, choice)

    def _choose(self, out: Tensor) -> _Choice:
        # The gate reads the activations but does not shape them: its gradient stays its own.
        dtype = next((p.dtype for p in self.gate.parameters()), torch.float32)
        features = pool(out.detach().to(torch.promote_types(out.dtype, torch.float32)), self.out_layout).to(
            dtype
        )
        # A broken sample must not reach the gate's weights: zero times NaN is NaN.
        features = torch.where(torch.isfinite(features).all(dim=1, keepdim=True), features, 0.0)
        with torch.autocast(out.device.type, enabled=False):
            opinion = self.gate(features)
        view = PolicyView(self.span, features, opinion.probability.detach(), opinion.open)
        wanted = opinion.open if self.policy is None else self.policy(view)
        if wanted.shape != opinion.open.shape or wanted.dtype != torch.bool:
            raise OptionError(
                f"Policy {type(self.policy).__name__} must return {tuple(opinion.open.shape)} booleans; it "
                f"returned {tuple(wanted.shape)} of {wanted.dtype}."
            )
        opened = wanted & (opinion.strength.detach() > 0)
        amount = torch.where(opened, opinion.strength, 0.0)
        return _Choice(opened, amount, opinion.probability, opinion.margin)

    def _settle_opened(
        self,
        entry: Tensor,
        out: Tensor,
        replay: Replay,
        constants: tuple[Tensor, ...],
        frozen: Frozen | None,
        choice: _Choice,
    ) -> Tensor:
        """Solve for the open rows alone and put the settled ones in place."""
        everyone = bool(choice.opened.all())
        rows = torch.nonzero(choice.opened).flatten()
        inputs = (entry, choice.amount, *constants)
        picked = inputs if everyone else tuple(c[rows] for c in inputs)

        def f(z: Tensor, entry: Tensor, amount: Tensor, index: Tensor, *constants: Tensor) -> Tensor:
            signal = _scaled(self.message(z, entry.shape), amount).to(entry.dtype)
            with _held(frozen, index):
                return replay(entry + signal, *constants)

        start = out if everyone else out[rows]
        context = (picked[0], picked[1], rows, *picked[2:])
        solution = run(f, start.detach(), context, self.settings.control, *self.settings.made)
        self._note(choice, solution, rows)
        settled = solution.converged
        if everyone and bool(settled.all()):
            return solution.value
        return out.index_copy(0, rows[settled], solution.value[settled])

    def _settle_all(
        self,
        entry: Tensor,
        out: Tensor,
        replay: Replay,
        constants: tuple[Tensor, ...],
        frozen: Frozen | None,
        choice: _Choice,
    ) -> Tensor:
        """Solve with gradients for every row, closed ones included, so that each gate can learn.

        Closed rows are at their solution already. In the differentiated evaluation their message
        enters with value zero and the gradient it would have at the gate's probability.
        """
        opened, probability = choice.opened, choice.probability
        weight = torch.where(opened, choice.amount, probability).detach()
        silenced = torch.where(opened, 0.0, probability).detach()
        learns_strength = choice.amount.requires_grad
        source = torch.where(opened, choice.amount, probability) if learns_strength else probability
        lever = source - source.detach()  # zero, with the gate's gradient
        if choice.margin is not None:  # the gate learns otherwise
            lever = lever.detach()

        def f(
            z: Tensor,
            entry: Tensor,
            opened: Tensor,
            weight: Tensor,
            silenced: Tensor,
            lever: Tensor,
            index: Tensor,
            *constants: Tensor,
        ) -> Tensor:
            z = torch.where(_aligned(opened, z), z, z.detach())  # closed rows do not depend on z
            message = self.message(z, entry.shape)
            fixed = message.detach()
            signal = _scaled(message, weight) - _scaled(fixed, silenced) + _scaled(fixed, lever)
            with _held(frozen, index):
                return replay(entry + signal.to(entry.dtype), *constants)

        index = torch.arange(out.shape[0], device=out.device)
        context = (entry, opened, weight, silenced, lever, index, *constants)
        settings = self.settings
        solution = run(f, out, context, settings.control, *settings.made, settled=~opened)
        self._note(choice, solution, None)
        if choice.margin is None:
            return solution.value
        share = getattr(self.gate, "budget", None) or 0.5
        return watch_difficulty(solution.value, choice.margin, share)

    def _note(self, choice: _Choice, solution: Solution | None, rows: Tensor | None) -> None:
        batch, device = choice.opened.shape[0], choice.opened.device
        status = torch.full((batch,), int(Status.converged), device=device)
        steps, residual = torch.zeros_like(status), torch.zeros(batch, device=device)
        if solution is not None:
            where = torch.arange(batch, device=device) if rows is None else rows
            status[where], steps[where] = solution.status, solution.steps
            residual[where] = solution.residual.to(residual.dtype)
        fallback = status != int(Status.converged)
        if self.training and torch.is_grad_enabled():
            fallback = torch.zeros_like(fallback)
        self.last = SpanRecord(
            self.span,
            choice.amount.detach(),
            choice.probability.detach(),
            status,
            steps,
            residual,
            fallback,
            solution.evaluations if solution is not None else 0,
            reports=solution.reports if solution is not None else [],
        )


def _aligned(rows: Tensor, value: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (value.dim() - 1))


def _scaled(value: Tensor, rows: Tensor) -> Tensor:
    return value * _aligned(rows, value).to(value.dtype)


def _held(frozen: Frozen | None, index: Tensor) -> AbstractContextManager[None]:
    if frozen is None:
        return nullcontext()
    return frozen.replay(None if index.numel() == frozen.batch else index)


def _fill_missing(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a plain backbone's checkpoint load strictly: a wormhole it knows nothing of stays as it is."""
    if any(key.startswith(prefix) for key in state):
        return
    for name, value in module.state_dict().items():
        state[prefix + name] = value
