"""One pass: the open loop, then decisions, each followed by a sweep over what was chosen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from ..blocks import Feedback
from ..blocks.message import pool
from ..blocks.one_map import Frozen, OneMap
from ..blocks.open_loop import OpenLoop
from ..policies import Policy
from ..policies.selection import Selection, SelectionView
from .costs import Costs
from .record import Decision, SelectionRecord

__all__ = ["Sweeps"]


class Network(Protocol):
    """What a pass needs of a :class:`~twnn_plugin.selection.LayerSelection`."""

    training: bool
    policy: Policy
    iterated: tuple[str, ...]
    places: tuple[int, ...]
    layouts: tuple[str, ...]
    max_choices: int
    modules_in_order: tuple[nn.Module, ...]
    one_maps: tuple[OneMap, ...]
    open_head: nn.Module | None

    @property
    def feedbacks(self) -> list[Feedback]: ...

    def costs(self, x: Tensor, before: int = 0) -> Costs: ...


class Sweeps:
    """One forward pass of a :class:`~twnn_plugin.selection.LayerSelection`.

    Args:
        owner: whose pass.
        x: (B, ...) its input.
        before: multiply-adds that a sample took before it.
    """

    def __init__(self, owner: Network, x: Tensor, before: int = 0):
        self.owner, self.x = owner, x
        self.costs = owner.costs(x, before)
        batch, count = x.shape[0], len(owner.iterated)
        self.counts = torch.zeros(batch, count, dtype=torch.long, device=x.device)
        self.steps, self.status = torch.zeros_like(self.counts), torch.zeros_like(self.counts)
        self.residual = torch.zeros(batch, count, device=x.device)
        self.spent = torch.zeros(batch, device=x.device)
        self.last = torch.full((batch,), -1, device=x.device)
        self.repeats = torch.zeros_like(self.last)
        self.rows = [0] * len(owner.modules_in_order)
        self.evaluations, self.solved = [0] * count, [0] * count
        self.fallback = torch.zeros(batch, count, dtype=torch.bool, device=x.device)
        # On the host, as all that says who is computed.
        self.opened = torch.zeros(batch, dtype=torch.bool, device="cpu")
        self.executed = 0
        self.decisions: list[Decision] = []
        self.states: list[Tensor] = [x]
        self.frozen: list[Frozen | None] = []

    def run(self) -> Tensor:
        self._open_loop()
        self.closed = self.states[-1]
        remaining = torch.arange(self.x.shape[0], device="cpu")
        for step in range(self.owner.max_choices):
            if remaining.numel() == 0:
                break
            active = remaining.to(self.x.device)
            view = self._view(active, step)
            selection = self.owner.policy.select(view)
            selection.check(view, type(self.owner.policy).__name__)
            before, repeats = self.spent[active], self._repeat(active, selection.layers)
            layers = selection.layers.cpu()  # the one time that a decision has the host wait
            self._sweep(active, remaining, layers, selection)
            self.decisions.append(Decision(active, selection, before, self.spent[active] - before, repeats))
            remaining = remaining[layers.any(dim=1)]
        return self.states[-1]

    def _open_loop(self) -> None:
        owner = self.owner
        for module, one_map in zip(owner.modules_in_order, owner.one_maps, strict=True):
            entry = self.states[-1]
            watched = OpenLoop(one_map, entry, owner.training)
            out, frozen = watched.finish(module(entry), lambda module=module, entry=entry: module(entry))
            self.states.append(out)
            self.frozen.append(frozen)

    def _view(self, active: Tensor, step: int) -> SelectionView:
        owner, everyone = self.owner, active.numel() == self.x.shape[0]

        def pick(value: Tensor) -> Tensor:
            # Copies: the pass goes on to change these, and a policy's graph may hold what it was shown.
            return value.clone() if everyone else value[active]

        features = []
        for place, layout in zip(owner.places, owner.layouts, strict=True):
            state = self.states[place + 1].detach()
            state = state if everyone else state[active]
            features.append(pool(state.to(torch.promote_types(state.dtype, torch.float32)), layout))
        return SelectionView(
            owner.iterated,
            tuple(features),
            self.costs.prices.to(active.device),
            step,
            pick(self.counts),
            pick(self.last),
            pick(self.repeats),
            pick(self.spent),
            pick(self.residual),
            self.states[-1].detach() if everyone else self.states[-1].detach()[active],
            active,
            tuple(self.states[p].shape == self.states[p + 1].shape for p in owner.places),
            tuple(i > 0 and owner.places[i - 1] == p - 1 for i, p in enumerate(owner.places)),
        )

    def _repeat(self, active: Tensor, chosen: Tensor) -> Tensor:
        """Note the choices; how often in a row each had been made before."""
        action = torch.where(chosen.any(dim=1), chosen.to(torch.long).argmax(dim=1), -1)
        again = (action == self.last[active]) & (action >= 0)
        repeats = torch.where(again, self.repeats[active], 0)
        self.repeats[active] = repeats + (action >= 0)
        self.last[active] = action
        self.counts[active] += chosen
        return repeats

    def _sweep(self, active: Tensor, remaining: Tensor, layers: Tensor, selection: Selection) -> None:
        """Iterate what was chosen, from the first layer to the last, and compute what follows again.

        Args:
            active: (n,) rows that decided.
            remaining: the same on the host.
            layers: (n, N) what they chose, on the host.
            selection: what they chose.
        """
        owner = self.owner
        nobody = torch.zeros(self.x.shape[0], dtype=torch.bool, device="cpu")
        moved, skip = nobody, None if selection.skip is None else selection.skip.cpu()
        for place in range(len(owner.modules_in_order)):
            mine = skipped = nobody
            if place in owner.places:
                which = owner.places.index(place)
                mine = nobody.index_copy(0, remaining, layers[:, which])
                if skip is not None:
                    skipped = nobody.index_copy(0, remaining, skip[:, which] & ~layers[:, which])
                rows = torch.nonzero(mine).flatten()
                if rows.numel():
                    self._evaluate_again(place, moved & mine)
                    self._iterate(which, rows, active, selection)
            if moved is not nobody:
                rows = torch.nonzero(moved & skipped).flatten().to(self.x.device)
                if rows.numel():  # what comes in goes out
                    self._put(place + 1, rows, self.states[place][rows])
                self._evaluate_again(place, moved & ~mine & ~skipped)
            if mine is not nobody and bool(mine.any()):
                moved = moved | mine

    def _iterate(self, which: int, chose: Tensor, active: Tensor, selection: Selection) -> None:
        owner, place = self.owner, self.owner.places[which]
        feedback, rows = owner.feedbacks[which], chose.to(self.x.device)
        entry, out = self.states[place][rows], self.states[place + 1][rows]

        def replay(entry: Tensor, index: Tensor) -> Tensor:
            with self._held(place, index):
                return owner.modules_in_order[place](entry)

        value = feedback.settle(entry, out, replay, (rows,))
        if selection.weight is not None:
            weight = torch.ones_like(self.spent, dtype=selection.weight.dtype)
            weight = weight.index_copy(0, active, selection.weight)[rows]
            weight = weight.view(-1, *[1] * (value.dim() - 1)).to(value.dtype)
            value = out.detach() + weight * (value - out.detach())
        self._put(place + 1, rows, value)
        record = feedback.last
        assert record is not None
        self.steps[rows, which] += record.steps
        self.status[rows, which], self.residual[rows, which] = record.status, record.residual
        self.fallback[rows, which] = record.fallback
        self.opened[chose] |= ~record.fallback.cpu()
        self.rows[place] += record.evaluations
        self.evaluations[which] += record.evaluations
        self.solved[which] += record.evaluations * self.costs.replay[which]
        self.executed += record.evaluations * self.costs.replay[which]
        self.spent[rows] += record.steps * (self.costs.replay[which] / max(self.costs.total, 1))

    def _evaluate_again(self, place: int, which: Tensor) -> None:
        """Compute a layer, or the head, again for samples whose input has changed: (B,) bool on the host."""
        rows = torch.nonzero(which).flatten()
        if rows.numel() == 0:
            return
        module = self.owner.modules_in_order[place]
        other = self.owner.open_head if place == len(self.owner.modules_in_order) - 1 else None
        if other is not None:  # it answers for those that were really iterated
            mine = self.opened[rows]
            opened, rows = rows[mine], rows[~mine]
            if opened.numel():
                self._again(place, opened.to(self.x.device), other, nullcontext())
        if rows.numel():
            rows = rows.to(self.x.device)
            self._again(place, rows, module, self._held(place, rows))

    def _again(self, place: int, rows: Tensor, module: nn.Module, held: AbstractContextManager[None]) -> None:
        with held:
            value = module(self.states[place][rows])
        self._put(place + 1, rows, value)
        self.rows[place] += rows.numel()
        self.executed += rows.numel() * self.costs.parts[place]
        self.spent[rows] += self.costs.parts[place] / max(self.costs.total, 1)

    def _put(self, place: int, rows: Tensor, value: Tensor) -> None:
        everyone = rows.numel() == self.x.shape[0]
        state = self.states[place]
        self.states[place] = value if everyone else state.index_copy(0, rows, value.to(state.dtype))

    def _held(self, place: int, rows: Tensor) -> AbstractContextManager[None]:
        frozen = self.frozen[place]
        if frozen is None:
            return nullcontext()
        return frozen.replay(None if rows.numel() == frozen.batch else rows)

    def record(self) -> SelectionRecord:
        return SelectionRecord(
            self.owner.iterated,
            self.counts,
            self.steps,
            self.status,
            self.residual,
            self.spent,
            tuple(self.rows),
            self.executed,
            self.costs.total,
            self.closed.detach(),
            self.closed,
            self.fallback,
            tuple(self.evaluations),
            tuple(self.solved),
            self.decisions,
        )
