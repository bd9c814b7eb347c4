"""Wormholes that share layers, solved as one equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adjoints.held import Reaching
from ..fixed_point import run
from ..types import Solution
from .layer import LayerState, RecurrentLayer
from .message import read, valid_steps
from .span import Choice, TemporalSpan

__all__ = ["Group", "Pass", "groups_of"]


@dataclass(frozen=True)
class Pass:
    """What a pass through some layers is given beside its input, all of it row by row.

    Attributes:
        states: of each layer, before the first step.
        tails: (B, d, H) of each wormhole: the outputs before the first step that a delay of d reads.
        masks: (B, L, H) of each layer: the factors of the dropout after it, drawn once; None without.
        lengths: (B,) valid steps; None: all are.
    """

    states: tuple[LayerState, ...]
    tails: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    lengths: Tensor | None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Pass:
        """With ``change`` applied to every tensor."""
        return Pass(
            tuple(tuple(change(part) for part in state) for state in self.states),
            tuple(change(tail) for tail in self.tails),
            tuple(None if mask is None else change(mask) for mask in self.masks),
            None if self.lengths is None else change(self.lengths),
        )

    def flat(self) -> list[Tensor]:
        """Every tensor, in the order in which :meth:`mapped` visits them."""
        found: list[Tensor] = []
        self.mapped(lambda tensor: found.append(tensor) or tensor)
        return found

    def refilled(self, tensors: Sequence[Tensor]) -> Pass:
        """The same with other tensors, in the order of :meth:`flat`."""
        fed = iter(tensors)
        return self.mapped(lambda _: next(fed))


@dataclass(frozen=True)
class _Levers:
    """(B, L) each: how messages enter an evaluation, see :meth:`Group._signal`."""

    opened: Tensor
    amount: Tensor
    lever: Tensor
    silent: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        return self.opened, self.amount, self.lever, self.silent


class Group(Reaching):
    """Wormholes over layers ``first`` to ``last``, with one state: the outputs of their sources.

    For wormholes w with source s(w), target t(w) and operator in time S(w) (see :func:`read`)::

        u_k = input_k + sum over w with t(w) = k of  g_w * M_w(S(w) z_s(w))
        z_k = layer_k(u_k),  first <= k <= last

    solved for all z_s(w) together, which has the fixed points that nested solves would have.

    Args:
        spans: the wormholes.
        places: their indices among all of the stack's.
        layers: all layers of the stack.
    """

    def __init__(
        self, spans: Sequence[TemporalSpan], places: Sequence[int], layers: Sequence[RecurrentLayer]
    ):
        self.spans, self.places, self.layers = tuple(spans), tuple(places), tuple(layers)
        self.first = min(span.spec.target for span in spans)
        self.last = max(span.spec.source for span in spans)
        self.sources = sorted({span.spec.source for span in spans})

    def reached(self) -> tuple[nn.Module, ...]:
        """What the equation's map uses."""
        return (*self.spans, *self.layers)

    def multiply_adds(self, length: int) -> int:
        """Multiply-adds of one evaluation for one sequence."""
        inside = range(self.first, self.last + 1)
        messages = sum(
            span.message.multiply_adds(1 if span.spec.delay < 0 else length) for span in self.spans
        )
        return sum(self.layers[k].multiply_adds(length) for k in inside) + messages

    def plain(
        self, x: Tensor, given: Pass, keep: bool, signals: dict[int, Tensor] | None = None
    ) -> tuple[dict[int, Tensor], dict[int, LayerState]]:
        """Outputs and final states of the group's layers.

        Args:
            x: (B, L, C) input of the first.
            given: states, masks and lengths.
            keep: whether the final states are wanted.
            signals: what is added to the inputs of layers.
        """
        outs: dict[int, Tensor] = {}
        states: dict[int, LayerState] = {}
        for k in range(self.first, self.last + 1):
            if signals and k in signals:
                x = x + signals[k].to(x.dtype)
            outs[k], states[k] = self.layers[k](x, given.states[k], given.lengths, keep)
            mask = given.masks[k]
            x = outs[k] if mask is None else outs[k] * mask
        return outs, states

    def settle(
        self, x: Tensor, given: Pass, outs: dict[int, Tensor], training: bool, causal: bool
    ) -> tuple[dict[int, Tensor], list[Choice]]:
        """The settled outputs of the sources.

        Args:
            x: (B, L, C) input of the first layer.
            given: what else the pass was given.
            outs: the open-loop outputs.
            training: whether gates learn: every sequence is solved for then, with gradients.
            causal: whether a sequence whose solve failed keeps its newest iterate in eval mode, too: that it
                failed may be the fault of its later steps, of which the earlier ones must not know.

        Returns:
            For each source (B, L, H), and what each wormhole chose. In eval mode sequences whose solve
            failed keep their open-loop outputs and count as closed, but not if ``causal``.
        """
        valid = valid_steps(x, given.lengths)
        choices = [
            span.choose(outs[span.spec.source], valid, self._before(span, given)) for span in self.spans
        ]
        opened = torch.stack([choice.rows for choice in choices]).any(dim=0)
        learns = training and torch.is_grad_enabled()
        falls_back = not learns and not causal
        if not x.shape[0] or not x.shape[1] or (not learns and not bool(opened.any())):
            for span, choice in zip(self.spans, choices, strict=True):
                span.note(choice, None, opened.nonzero().flatten(), falls_back, 0)
            return {k: outs[k] for k in self.sources}, choices
        rows = torch.arange(x.shape[0], device=x.device) if learns else opened.nonzero().flatten()
        solution = self._solve(x, given, outs, choices, rows, ~opened if learns else None)
        for index, (span, choice) in enumerate(zip(self.spans, choices, strict=True)):
            shared = solution if index == 0 else replace(solution, evaluations=0)
            span.note(choice, shared, rows, falls_back, self.multiply_adds(x.shape[1]))
            self._point(span, index)
            if learns:
                span.gate.observe(solution.steps[choice.rows])
        settled = self._values(solution, valid[rows])
        if learns:
            return self._teach(settled, choices), choices
        good = solution.converged if falls_back else torch.ones_like(solution.converged)
        kept = torch.zeros_like(opened)
        kept[rows] = good
        placed = {k: outs[k].index_copy(0, rows[good], settled[k][good]) for k in self.sources}
        return placed, [_closed(choice, ~kept) for choice in choices]

    def explicit(self, x: Tensor) -> bool:
        """Whether every message comes from before ``x``: then there is nothing to solve, one pass does it."""
        return all(span.spec.delay >= x.shape[1] for span in self.spans)

    def run_explicit(
        self, x: Tensor, given: Pass, keep: bool, training: bool
    ) -> tuple[dict[int, Tensor], dict[int, LayerState]]:
        """As :meth:`settle` where :meth:`explicit` holds; the outputs of all layers and their states."""
        valid = valid_steps(x, given.lengths)
        looks = any(span.scope != "state" for span in self.spans)
        open_loop, states = self.plain(x, given, keep) if looks else ({}, {})
        choices = [
            span.choose(open_loop.get(span.spec.source, x), valid, self._before(span, given))
            for span in self.spans
        ]
        opened = torch.stack([choice.rows for choice in choices]).any(dim=0)
        learns = training and torch.is_grad_enabled()
        levers = [_levers(choice, learns) for choice in choices]
        signals: dict[int, Tensor] = {}
        if learns or bool(opened.any()):
            simple = not learns or all(bool((c.opened | ~c.decided).all()) for c in choices)
            for span, place, lever in zip(self.spans, self.places, levers, strict=True):
                what = given.tails[place][:, : x.shape[1]]
                _add(signals, span.spec.target, self._signal(span, what, lever, simple))
        if signals or not looks:
            outs, states = self.plain(x, given, keep, signals)
        else:
            outs = open_loop
        for index, (span, choice) in enumerate(zip(self.spans, choices, strict=True)):
            span.note_explicit(choice, opened, 0 if index else self.multiply_adds(x.shape[1]))
            self._point(span, index)
        return self._teach(outs, choices) if learns else outs, states

    def signals(
        self, settled: dict[int, Tensor], given: Pass, choices: Sequence[Choice]
    ) -> dict[int, Tensor]:
        """What the wormholes add to the layers' inputs at the settled outputs."""
        found: dict[int, Tensor] = {}
        for span, place, choice in zip(self.spans, self.places, choices, strict=True):
            message = span.message(self._read(span, place, settled, given))
            _add(found, span.spec.target, message * choice.amount[..., None].to(message.dtype))
        return found

    def _solve(
        self,
        x: Tensor,
        given: Pass,
        outs: dict[int, Tensor],
        choices: Sequence[Choice],
        rows: Tensor,
        closed: Tensor | None,
    ) -> Solution:
        """Solve for the sequences ``rows``; in training ``closed`` are at their solution already."""
        everyone = rows.numel() == x.shape[0]
        given = given if everyone else given.mapped(lambda tensor: tensor[rows])
        levers = [_levers(choice, closed is not None) for choice in choices]
        simple = closed is None or all(bool((c.opened | ~c.decided).all()) for c in choices)
        context = [x, *(part for lever in levers for part in lever.flat())]
        context = context if everyone else [tensor[rows] for tensor in context]
        head = len(context)

        def f(z: Tensor | tuple[Tensor, ...], *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
            here = given.refilled(tensors[head:])
            parts = z if isinstance(z, tuple) else (z,)
            state = dict(zip(self.sources, parts, strict=True))
            signals: dict[int, Tensor] = {}
            for index, (span, place) in enumerate(zip(self.spans, self.places, strict=True)):
                lever = _Levers(*tensors[1 + 4 * index : 5 + 4 * index])
                what = self._read(span, place, state, here)
                _add(signals, span.spec.target, self._signal(span, what, lever, simple))
            results, _ = self.plain(tensors[0], here, False, signals)
            return self._state(results, tensors[0], here.lengths)

        start = self._state(
            {k: outs[k] if everyone else outs[k][rows] for k in self.sources}, x, given.lengths
        )
        settings = self.spans[0].settings
        if closed is None:
            start = tuple(p.detach() for p in start) if isinstance(start, tuple) else start.detach()
        return run(f, start, (*context, *given.flat()), settings.control, *settings.made, settled=closed)

    def _signal(self, span: TemporalSpan, what: Tensor, lever: _Levers, simple: bool) -> Tensor:
        """(b, L, C) what a wormhole adds.

        Where it is closed its value is zero, it does not depend on the state, and its message and gate
        get the gradients they would have if it were open by the gate's probability.
        """
        message = span.message(what)
        dtype = message.dtype
        amount, pull = lever.amount[..., None].to(dtype), lever.lever[..., None].to(dtype)
        signal = message * amount + message.detach() * pull
        if simple:
            return signal
        apart = span.message(what.detach())
        silent = (apart - apart.detach()) * lever.silent[..., None].to(dtype) + apart.detach() * pull
        return torch.where(lever.opened[..., None], signal, silent)

    def _read(self, span: TemporalSpan, place: int, state: dict[int, Tensor], given: Pass) -> Tensor:
        source = span.spec.source
        directions = self.layers[source].directions
        return read(state[source], given.tails[place], given.lengths, span.spec.delay, directions)

    def _before(self, span: TemporalSpan, given: Pass) -> Tensor:
        return given.states[span.spec.source][0].flatten(1)

    def _state(
        self, outs: dict[int, Tensor], x: Tensor, lengths: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        """The solver's state: the outputs of the sources.

        The norm ``"max"`` measures a change against the rms of the whole row, so that padded steps must
        have the rms of the valid ones, or a row's residual would depend on how far it is padded.
        """
        parts = [outs[k] for k in self.sources]
        if lengths is not None and self.spans[0].settings.norm == "max":
            valid = valid_steps(x, lengths)
            parts = [_filled(part, valid) for part in parts]
        return parts[0] if len(parts) == 1 else tuple(parts)

    def _point(self, span: TemporalSpan, index: int) -> None:
        """Let the records of all but the first say where the group's work is counted."""
        if index and span.last is not None:
            span.last.group = self.spans[0].span

    def _values(self, solution: Solution, valid: Tensor) -> dict[int, Tensor]:
        parts = solution.value if isinstance(solution.value, tuple) else (solution.value,)
        if not bool(valid.all()):
            parts = tuple(torch.where(valid[..., None], part, 0.0) for part in parts)
        return dict(zip(self.sources, parts, strict=True))

    def _teach(self, settled: dict[int, Tensor], choices: Sequence[Choice]) -> dict[int, Tensor]:
        for span, choice in zip(self.spans, choices, strict=True):
            settled[span.spec.source] = span.taught(settled[span.spec.source], choice)
        return settled


def groups_of(spans: Sequence[TemporalSpan], layers: Sequence[RecurrentLayer]) -> list[Group]:
    """Wormholes grouped by the layers they share, in the order of the layers."""
    order = sorted(range(len(spans)), key=lambda i: spans[i].spec.target)
    groups: list[list[int]] = []
    end = -1
    for index in order:
        if groups and spans[index].spec.target <= end:
            groups[-1].append(index)
        else:
            groups.append([index])
        end = max(end, spans[index].spec.source)
    return [Group([spans[i] for i in sorted(group)], sorted(group), layers) for group in groups]


def _levers(choice: Choice, learns: bool) -> _Levers:
    amount = choice.amount
    zero = torch.zeros_like(choice.probability)
    if not learns:
        return _Levers(choice.opened, amount, zero, zero)
    source = torch.where(choice.opened, amount, choice.probability)
    if not amount.requires_grad:  # open or closed: the gate learns through its probability alone
        source = choice.probability
    lever = source - source.detach()  # zero, with the gate's gradient
    if choice.margin is not None:  # the gate learns otherwise
        lever = lever.detach()
    silent = torch.where(choice.opened, 0.0, choice.probability).detach()
    return _Levers(choice.opened, amount.detach(), lever, silent)


def _closed(choice: Choice, rows: Tensor) -> Choice:
    """The choice with the sequences ``rows`` closed."""
    opened = choice.opened & ~rows[:, None]
    return choice._replace(opened=opened, amount=torch.where(opened, choice.amount, 0.0))


def _add(signals: dict[int, Tensor], target: int, signal: Tensor) -> None:
    signals[target] = signals[target] + signal if target in signals else signal


def _filled(part: Tensor, valid: Tensor) -> Tensor:
    inside = torch.where(valid[..., None], part.detach(), 0.0)
    count = valid.sum(dim=1).clamp_min(1) * part.shape[2]
    rms = (inside.square().sum(dim=(1, 2)) / count).sqrt()
    return torch.where(valid[..., None], part, rms[:, None, None])
