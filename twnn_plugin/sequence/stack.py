"""Stacks of GRUs or LSTMs with wormholes back through layers and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import policies
from ..blocks import SolveSettings, SpanRecord
from ..blocks.settings import check_names, option_names
from ..blocks.wormhole import gate_factory
from ..errors import AttachError, MapError, OptionError, nearest
from ..gates import Gate, LearnedGate, check_gate, check_one_budget
from ..policies import Policy
from .layer import CELLS, LayerState, RecurrentLayer
from .message import valid_steps
from .settle import Group, Pass, groups_of
from .span import SCOPES, TemporalSpan, check_budget
from .spec import END, TemporalSpec, parse
from .state import StackState, moved_on, state_before

__all__ = ["RecurrentStack", "further_options"]

_SHAPE = ("cell", "input_size", "hidden_size", "num_layers")


class RecurrentStack(nn.Module):
    """``nn.GRU`` or ``nn.LSTM`` of several layers, with wormholes from later layers or steps to earlier ones.

    A wormhole ``"layer2->layer0"`` makes the layers in between one equation over the whole sequence: at each
    step, layer 0's input gets ``gate * message(layer 2's output)``. ``"layer2[t-1]->layer0"`` reads the
    step before, ``"layer2[end]->layer0"`` the end of the sequence, for a second look at all of it. Closed,
    the stack is torch's, bit for bit. The equations are in docs/sequences.md; after Habiba & Pearlmutter
    (2021), figure 2 and equation 3.

    Args:
        cell: ``"gru"`` or ``"lstm"``.
        input_size: features of a time step.
        hidden_size: width of each layer.
        num_layers: how many.
        dropout: probability, between layers, as in ``nn.GRU``; drawn once for a whole solve.
        bidirectional: each layer reads from both ends.
        bias: whether layers have biases.
        wormholes: a spec, a list of them, or ``"auto"`` (last layer to first); () for none.
        gate: registered name, ``(name, options)`` or, for a single wormhole, a gate; with ``control="dual"``
            or ``l0`` add :meth:`auxiliary_loss` to the loss. One strength a decision, not ``per="channel"``.
        budget: for learned gates the wanted share of open decisions; or, unless these are steps, the mean
            multiply-adds relative to the plain stack, ``"1.5x"``, or the mean evaluations, ``"2 rows"``.
        policy: registered name or instance: who is iterated, one row a decision.
        gate_over: what a decision is made for and by: ``"sequence"``: a sequence by the mean of its open-loop
            outputs; ``"step"``: each time step by its own; ``"state"``: a sequence by the state it begins
            with. None: ``"step"`` if causal, else ``"sequence"``.
        causal: refuse whatever would let an output depend on later inputs: wormholes from the end,
            both directions, gates over sequences, open-loop values in place of failed solves. The norm is
            ``"max"`` by default then, so that the tolerance holds at every step.
        window: solve this many time steps at a time, one window after the other, with the state carried
            over: 1 solves at every time step. None: all at once.
        scale: initial scale of messages.
        **settings: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm``, as in
            :func:`twnn_plugin.fix`; by default tol=1e-3 and max_iter=30.

    Raises:
        AttachError: a wormhole that goes forward, or is not causal where that is asked for.
        OptionError: an unknown option or an impossible value.
        UnknownNameError: an unknown layer, gate, policy, solver or adjoint, with the nearest name.

    Example:
        >>> import torch, twnn_plugin as tw
        >>> stack = RecurrentStack("gru", 8, 32, num_layers=2, wormholes="layer1->layer0")
        >>> out, state = stack(torch.randn(4, 50, 8))
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        bidirectional: bool = False,
        bias: bool = True,
        *,
        wormholes: str | Sequence[str] = (),
        gate: str | tuple[str, dict[str, Any]] | Gate = "straight_through",
        budget: float | str | None = None,
        policy: str | Policy = "gate",
        gate_over: str | None = None,
        causal: bool = False,
        window: int | None = None,
        scale: float = 0.1,
        **settings: Any,
    ):
        super().__init__()
        check_names("A recurrent stack", settings, [*_SHAPE, *further_options()])
        _check(cell, num_layers, dropout, window, input_size, hidden_size)
        _check_flags(bidirectional=bidirectional, bias=bias, causal=causal)
        check_gate(gate)
        self.cell, self.hidden_size, self.input_size = cell, hidden_size, input_size
        self.dropout, self.bidirectional = float(dropout), bidirectional
        self.causal, self.window = causal, window
        width = hidden_size * (2 if bidirectional else 1)
        self.layers = nn.ModuleList(
            RecurrentLayer(cell, width if k else input_size, hidden_size, bidirectional, bias)
            for k in range(num_layers)
        )
        scope = _scope(gate_over, causal)
        specs = parse(wormholes, num_layers)
        _check_time(specs, causal, bidirectional, window)
        given = {"norm": "max", **settings} if causal else settings
        solve = SolveSettings().changed(**given)
        make = gate_factory(_with_budget(gate, budget, scope))
        chosen = policies.registry.resolve(policy)
        spans = (
            TemporalSpan(spec, width, self._inputs(spec.target), make, chosen, solve, scope, scale)
            for spec in specs
        )
        self.wormholes = nn.ModuleList(spans)
        self._groups = groups_of(self.spans, self._layers())
        self._set_prices()

    @classmethod
    def from_torch(cls, rnn: nn.GRU | nn.LSTM, **options: Any) -> RecurrentStack:
        """A stack with copies of the weights of an ``nn.GRU`` or ``nn.LSTM``.

        Args:
            rnn: the module; batch first or not, the stack is batch first.
            **options: the wormholes', as in the constructor.

        Raises:
            MapError: an LSTM with projections (``proj_size``), or another module.
        """
        cells = {kind: name for name, kind in CELLS.items()}
        if type(rnn) not in cells or rnn.proj_size:
            raise MapError(f"from_torch takes an nn.GRU, or an nn.LSTM without proj_size; got {rnn}.")
        shape = (rnn.input_size, rnn.hidden_size, rnn.num_layers, rnn.dropout, rnn.bidirectional, rnn.bias)
        stack = cls(cells[type(rnn)], *shape, **options)
        weights = rnn.state_dict()
        for k, layer in enumerate(stack._layers()):
            names = {name: name.replace("_l0", f"_l{k}") for name in layer.rnn.state_dict()}
            layer.rnn.load_state_dict({name: weights[old] for name, old in names.items()})
        weight = next(rnn.parameters())
        return stack.to(weight.device, weight.dtype).train(rnn.training)

    @property
    def spans(self) -> list[TemporalSpan]:
        """The wormholes, in the order they were named."""
        return [span for span in self.wormholes if isinstance(span, TemporalSpan)]

    @property
    def groups(self) -> list[tuple[TemporalSpan, ...]]:
        """The wormholes that are solved together: most often each alone."""
        return [group.spans for group in self._groups]

    @property
    def output_size(self) -> int:
        """Features of a time step of the output."""
        return self._layers()[-1].outputs

    def forward(
        self,
        x: Tensor,
        state: StackState | Tensor | tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, StackState | None]:
        """Run the sequences.

        Args:
            x: (B, L, input_size).
            state: what the call before returned, or torch's h_0 or (h_0, c_0); None: zeros.
            lengths: (B,) valid steps of each sequence, 0 to L; what is padded has no influence.
            keep_state: whether the state after each sequence's last valid step is wanted. Where
                something was iterated it costs one more evaluation.

        Returns:
            (B, L, output_size), zero at padded steps, and the state, or None without ``keep_state``.

        Raises:
            MapError: shapes that do not fit.
        """
        self._check_input(x)
        sizes = self._lengths(lengths, x)
        if sizes is not None:
            x = torch.where(valid_steps(x, sizes)[..., None], x, 0.0)
        before = state_before(state, x, self._layers(), [span.spec for span in self.spans])
        masks = self._masks(x)
        for span in self.spans:
            span.begin()
        if self.window is None or x.shape[1] <= self.window:
            out, after = self._run(x, Pass(before.layers, before.tails, masks, sizes), keep_state)
        else:
            out, after = self._windows(x, before, masks, sizes, keep_state)
        return out, after if keep_state else None

    def auxiliary_loss(self) -> Tensor:
        """What the wormholes add to the loss of the last training pass, a scalar; zero if there is nothing.

        The penalties of their gates: budgets kept by a dual variable, ``l0``.
        """
        found = [term for span in self.spans if (term := span.auxiliary_loss()) is not None]
        return sum(found, next(self.parameters()).new_zeros(()))

    def records(self) -> list[SpanRecord]:
        """What happened at each wormhole in the last forward pass; ``tw.report`` prints it."""
        return [span.last for span in self.spans if span.last is not None]

    def _windows(
        self,
        x: Tensor,
        state: StackState,
        masks: tuple[Tensor | None, ...],
        lengths: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, StackState]:
        assert self.window is not None
        outs = []
        for begin in range(0, x.shape[1], self.window):
            end = min(begin + self.window, x.shape[1])
            part = x[:, begin:end]
            here = None if lengths is None else (lengths - begin).clamp(0, end - begin)
            mask = tuple(None if m is None else m[:, begin:end] for m in masks)
            given = Pass(state.layers, state.tails, mask, here)
            out, state = self._run(part, given, keep or end < x.shape[1])
            outs.append(out)
        return torch.cat(outs, dim=1), state

    def _run(self, x: Tensor, given: Pass, keep: bool) -> tuple[Tensor, StackState]:
        """All layers on one window: groups are solved, the layers between them just run."""
        starts = {group.first: group for group in self._groups}
        states: dict[int, LayerState] = {}
        tails = list(given.tails)
        layers = self._layers()
        k = 0
        while k < len(layers):
            group = starts.get(k)
            if group is None:
                x, states[k] = layers[k](x, given.states[k], given.lengths, keep)
                last = k
            else:
                x, inside = self._run_group(group, x, given, keep, tails)
                states.update(inside)
                last = group.last
            mask = given.masks[last]
            x = x if mask is None else x * mask
            k = last + 1
        return x, StackState(tuple(states[i] for i in range(len(layers))), tuple(tails))

    def _run_group(
        self, group: Group, x: Tensor, given: Pass, keep: bool, tails: list[Tensor]
    ) -> tuple[Tensor, dict[int, LayerState]]:
        if group.explicit(x):
            settled, states = group.run_explicit(x, given, keep, self.training)
            self._move_tails(group, settled, given, tails)
            return settled[group.last], states
        outs, states = group.plain(x, given, keep)
        settled, choices = group.settle(x, given, outs, self.training, self.causal)
        iterated = torch.stack([choice.rows for choice in choices]).any(dim=0)
        if keep and bool(iterated.any()):
            # The states at the fixed point are those of one more pass, with the settled messages.
            _, found = group.plain(x, given, True, group.signals(settled, given, choices))
            where = iterated[:, None, None]
            states = {
                k: tuple(torch.where(where, new, old) for new, old in zip(found[k], states[k], strict=True))
                for k in states
            }
        self._move_tails(group, settled, given, tails)
        return settled[group.last], states

    @staticmethod
    def _move_tails(group: Group, settled: dict[int, Tensor], given: Pass, tails: list[Tensor]) -> None:
        for span, place in zip(group.spans, group.places, strict=True):
            tails[place] = moved_on(tails[place], settled[span.spec.source], given.lengths)

    def _masks(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """The dropout after each layer but the last, as factors."""
        last = len(self.layers) - 1
        if not self.training or self.dropout == 0:
            return (None,) * (last + 1)
        shapes = [(x.shape[0], x.shape[1], layer.outputs) for layer in self._layers()[:-1]]
        return (*(F.dropout(x.new_ones(shape), self.dropout) for shape in shapes), None)

    def _lengths(self, lengths: Tensor | Sequence[int] | None, x: Tensor) -> Tensor | None:
        if lengths is None:
            return None
        sizes = torch.as_tensor(lengths, device=x.device)
        if x.shape[0] == 0 and sizes.shape == (0,):  # of which torch makes floats, and nothing is packed
            return None
        fits = sizes.shape == (x.shape[0],) and not (sizes.is_floating_point() or sizes.dtype == torch.bool)
        if not fits or (sizes.numel() and not 0 <= int(sizes.min()) <= int(sizes.max()) <= x.shape[1]):
            raise MapError(
                f"lengths must be {x.shape[0]} whole numbers from 0 to {x.shape[1]}, one a sequence; got "
                f"{tuple(sizes.shape)} of {sizes.dtype}: {sizes.flatten()[:8].tolist()}."
            )
        return sizes.long()

    def _set_prices(self) -> None:
        """Tell learned gates what an evaluation costs, for budgets in multiply-adds."""
        plain = sum(layer.multiply_adds(1) for layer in self._layers())
        for group in self._groups:
            for span in group.spans:
                if isinstance(span.gate, LearnedGate):  # the groups share the budget evenly
                    span.gate.price.fill_(group.multiply_adds(1) / plain * len(self._groups))

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.input_size:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise MapError(f"A stack takes sequences (B, L, {self.input_size}), batch first; got {got}.")
        if not x.shape[1]:
            raise MapError("The sequences have no time step. Give at least one; lengths of 0 are fine.")

    def _inputs(self, layer: int) -> int:
        return self._layers()[layer].inputs

    def _layers(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]


def further_options() -> list[str]:
    """The options of a stack beside its cell and sizes, for models that hand on what their users give."""
    return [*option_names(RecurrentStack, *_SHAPE), *SolveSettings.names()]


def _check(cell: str, layers: int, dropout: float, window: int | None, *sizes: int) -> None:
    if cell not in CELLS:
        raise OptionError(f"Unknown cell {cell!r}.{nearest(str(cell), CELLS)} Cells: {', '.join(CELLS)}.")
    for name, value in (("num_layers", layers), ("input_size", sizes[0]), ("hidden_size", sizes[1])):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number, at least 1; got {value!r}.")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise OptionError(f"dropout must be in [0, 1); got {dropout!r}.")
    if dropout and layers == 1:
        raise OptionError("dropout is between layers, and there is one layer only. Leave it at 0.")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise OptionError(
            f"window must be a whole number of time steps, at least 1, or None; got {window!r}."
        )


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise OptionError(f"{name} is True or False; got {value!r}.")


def _check_time(specs: Sequence[TemporalSpec], causal: bool, both: bool, window: int | None) -> None:
    wanted = "causal=True" if causal else "a window"
    if both and (causal or window is not None):
        raise AttachError(
            f"bidirectional=True and {wanted} exclude each other: one direction comes from the end."
        )
    for spec in specs:
        if spec.delay == END and (causal or window is not None):
            raise AttachError(
                f"Wormhole {str(spec)!r} reads the end of the sequence, which {wanted} excludes."
            )


def _scope(gate_over: str | None, causal: bool) -> str:
    if gate_over is None:
        return "step" if causal else "sequence"
    if gate_over not in SCOPES:
        known = ", ".join(map(repr, SCOPES))
        raise OptionError(
            f"gate_over must be one of {known}; got {gate_over!r}.{nearest(str(gate_over), SCOPES)}"
        )
    if causal and gate_over == "sequence":
        raise OptionError(
            "gate_over='sequence' looks at the whole sequence: with causal=True use 'step' or 'state'."
        )
    return gate_over


def _with_budget(gate: Any, budget: float | str | None, scope: str) -> Any:
    if budget is None:
        return gate
    check_budget(budget, scope)
    if isinstance(gate, Gate):
        raise OptionError("budget goes with a gate given by name; set gate.budget on the instance instead.")
    name, options = (gate, {}) if isinstance(gate, str) else gate
    check_one_budget(options, budget)
    return name, {**options, "budget": budget}
