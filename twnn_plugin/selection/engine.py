"""The forward pass of a network whose layers are iterated by choice: rows are grouped by what they chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..blocks import Feedback, SolveSettings
from ..blocks.anchor import anchored
from ..blocks.message import pool
from ..blocks.one_map import Frozen, OneMap
from ..blocks.open_loop import OpenLoop
from ..blocks.wormhole import gate_factory
from ..errors import MapError, OptionError, UnknownNameError, nearest
from ..policies import Policy
from ..policies.selection import Selection, SelectionView
from .record import Decision, SelectionRecord

__all__ = ["LayerSelection"]


class LayerSelection(nn.Module):
    """Layers in a row and a head, of which a policy picks layers to iterate, sample by sample.

    DynaLay (Mathur & Plis 2023). After the open-loop pass the policy looks at the activations of all layers.
    Each sample picks a layer, which is iterated to its fixed point ``z = layer(h + message(z))`` (a
    fixed-point-iterative layer, the self-loop wormhole), and the layers after it are computed again; or it
    picks none (NOP) and is done. Then it decides again. Samples are grouped by their choice: no layer is
    evaluated for a sample that did not choose it or a layer before it.

    The layers and the head belong to the caller's model; the connections and the policy to this module.

    Args:
        layers: modules of one tensor by name, in the order in which they are called.
        head: module from the last layer's output to logits (b, K, ...).
        example: (B, ...) an input of the first layer, to learn the shapes from.
        policy: who iterates what.
        iterated: names of the layers that can be iterated; None: all.
        max_choices: decisions a sample may make before it is cut off, >= 1.
        scale: initial scale of the connections.
        channels_last: whether 4-axis activations are (B, H, W, C).
        settings: how a layer is solved for; None: tol=1e-3, max_iter=30.

    Raises:
        OptionError: an impossible option.
        UnknownNameError: ``iterated`` names no layer.
        MapError: a layer does not map a tensor to a tensor of the same batch size.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        head: nn.Module,
        example: Tensor,
        policy: Policy,
        iterated: Sequence[str] | None = None,
        max_choices: int = 3,
        scale: float = 0.1,
        channels_last: bool = False,
        settings: SolveSettings | None = None,
    ):
        super().__init__()
        names = tuple(layers)
        chosen = names if iterated is None else tuple(iterated)
        for name in chosen:
            if name not in names:
                raise UnknownNameError(
                    f"Unknown layer {name!r}.{nearest(name, list(names))} Layers: {', '.join(names)}."
                )
        if not names or len(set(chosen)) != len(chosen):
            raise OptionError(f"A selection needs layers, each named once; got {chosen!r} of {names!r}.")
        if isinstance(max_choices, bool) or not isinstance(max_choices, int) or max_choices < 1:
            raise OptionError(f"max_choices must be a whole number >= 1; got {max_choices!r}.")
        # In a tuple, so that they do not become children of this module.
        self.modules_in_order = (*(layers[name] for name in names), head)
        self.names, self.max_choices = names, max_choices
        self.iterated = tuple(name for name in names if name in chosen)
        self.places = tuple(names.index(name) for name in self.iterated)
        self.one_maps = tuple(OneMap([module]) for module in self.modules_in_order)
        self.connections = nn.ModuleList()
        shapes = _probe(self.modules_in_order, names, example)
        for name, place in zip(self.iterated, self.places, strict=True):
            entry, out = shapes[place], shapes[place + 1]
            solve = settings if settings is not None else SolveSettings()
            gate = gate_factory("always")  # who is iterated is the policy's business
            made = Feedback(f"{name}->{name}", entry, out, gate, None, solve, channels_last, scale)
            self.connections.append(made.to(example.device, example.dtype))
        self.layouts = tuple(c.out_layout for c in self.feedbacks)
        widths = [
            pool(shapes[p + 1], layout).shape[1] for p, layout in zip(self.places, self.layouts, strict=True)
        ]
        policy.bind(self.iterated, widths)
        self.policy = policy.to(example.device)
        self.last: SelectionRecord | None = None
        self._costs: dict[torch.Size, _Costs] = {}

    @property
    def feedbacks(self) -> list[Feedback]:
        """The connections, one for each layer that can be iterated."""
        return [c for c in self.connections if isinstance(c, Feedback)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) inputs of the first layer to (B, K, ...) logits; ``last`` tells what was done."""
        work = _Pass(self, x)
        logits = work.run()
        self.last = work.record()
        if self.training and torch.is_grad_enabled():
            logits = anchored(logits, self.parameters())
        return logits

    def costs(self, x: Tensor) -> _Costs:
        """Multiply-adds of each part for one sample of this shape."""
        key = x.shape[1:]
        if key not in self._costs:
            self._costs[key] = _count(self, x)
        return self._costs[key]

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "last": None}


class _Costs:
    """Multiply-adds for one sample: each layer and the head, and each connection."""

    def __init__(self, parts: Sequence[int], messages: Sequence[int], places: Sequence[int]):
        self.parts, self.messages, self.total = tuple(parts), tuple(messages), sum(parts)
        self.again = tuple(
            sum(parts[place + 1 :]) for place in places
        )  # what is computed again after a layer
        self.replay = tuple(parts[place] + message for place, message in zip(places, messages, strict=True))
        whole = max(self.total, 1)
        self.prices = torch.tensor([(r + a) / whole for r, a in zip(self.replay, self.again, strict=True)])


class _Pass:
    """One forward pass."""

    def __init__(self, owner: LayerSelection, x: Tensor):
        self.owner, self.x = owner, x
        self.learns = owner.training and torch.is_grad_enabled()
        self.costs = owner.costs(x)
        batch, count = x.shape[0], len(owner.iterated)
        self.counts = torch.zeros(batch, count, dtype=torch.long, device=x.device)
        self.steps, self.status = torch.zeros_like(self.counts), torch.zeros_like(self.counts)
        self.residual = torch.zeros(batch, count, device=x.device)
        self.spent = torch.zeros(batch, device=x.device)
        self.last = torch.full((batch,), -1, device=x.device)
        self.repeats = torch.zeros_like(self.last)
        self.rows = [0] * len(owner.modules_in_order)
        self.executed = 0
        self.decisions: list[Decision] = []
        self.states: list[Tensor] = [x]
        self.frozen: list[Frozen | None] = []

    def run(self) -> Tensor:
        self._open_loop()
        self.first = self.states[-1].detach()
        active = torch.arange(self.x.shape[0], device=self.x.device)
        for step in range(self.owner.max_choices):
            if active.numel() == 0:
                break
            view = self._view(active, step)
            selection = self.owner.policy.select(view)
            selection.check(view, type(self.owner.policy).__name__)
            goes = selection.layers.any(dim=1)
            before, repeats = self.spent[active], self._repeat(active, selection.layers)
            self._sweep(active, selection)
            self.decisions.append(Decision(active, selection, before, self.spent[active] - before, repeats))
            active = active[goes]
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
            return value if everyone else value[active]

        features = []
        for place, layout in zip(owner.places, owner.layouts, strict=True):
            state = pick(self.states[place + 1].detach())
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
            pick(self.states[-1].detach()),
            active,
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

    def _sweep(self, active: Tensor, selection: Selection) -> None:
        """Iterate what was chosen, from the first layer to the last, and compute what follows again."""
        owner = self.owner
        moved = torch.zeros(self.x.shape[0], dtype=torch.bool, device=self.x.device)
        for place in range(len(owner.modules_in_order)):
            mine = torch.zeros_like(moved)
            if place in owner.places:
                which = owner.places.index(place)
                mine[active] = selection.layers[:, which]
                rows = torch.nonzero(mine).flatten()
                if rows.numel():
                    self._evaluate_again(place, torch.nonzero(moved & mine).flatten())
                    self._iterate(which, rows, active, selection)
            self._evaluate_again(place, torch.nonzero(moved & ~mine).flatten())
            moved |= mine

    def _iterate(self, which: int, rows: Tensor, active: Tensor, selection: Selection) -> None:
        owner, place = self.owner, self.owner.places[which]
        feedback = owner.feedbacks[which]
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
        self.rows[place] += record.evaluations
        self.executed += record.evaluations * self.costs.replay[which]
        self.spent[rows] += record.steps * (self.costs.replay[which] / max(self.costs.total, 1))

    def _evaluate_again(self, place: int, rows: Tensor) -> None:
        """Compute a layer again for samples whose input has changed."""
        if rows.numel() == 0:
            return
        with self._held(place, rows):
            value = self.owner.modules_in_order[place](self.states[place][rows])
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
            self.first,
            self.decisions,
        )


def _probe(modules: Sequence[nn.Module], names: Sequence[str], example: Tensor) -> list[Tensor]:
    """The activations from the input to the logits, in eval mode."""
    modes = [(module, module.training) for part in modules for module in part.modules()]
    values = [example]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            for name, module in zip((*names, "head"), modules, strict=True):
                out = module(values[-1])
                if not isinstance(out, Tensor) or out.dim() == 0 or out.shape[0] != example.shape[0]:
                    got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                    raise MapError(
                        f"Layer {name!r} must return one tensor with the {example.shape[0]} rows it was "
                        f"given; it returned {got}."
                    )
                values.append(out)
    finally:
        for module, mode in modes:
            module.training = mode
    return values


def _count(owner: LayerSelection, x: Tensor) -> _Costs:
    modules = owner.modules_in_order
    modes = [(module, module.training) for part in modules for module in part.modules()]
    parts, states = [], [x.detach().new_zeros(1, *x.shape[1:])]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            for module in modules:
                with FlopCounterMode(display=False) as counter:
                    states.append(module(states[-1]))
                parts.append(counter.get_total_flops() // 2)
            messages = []
            for place, feedback in zip(owner.places, owner.feedbacks, strict=True):
                with FlopCounterMode(display=False) as counter:
                    feedback.message(states[place + 1], states[place].shape)
                messages.append(counter.get_total_flops() // 2)
    finally:
        for module, mode in modes:
            module.training = mode
    return _Costs(parts, messages, owner.places)
