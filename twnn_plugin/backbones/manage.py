"""``configure`` and ``report``: change and read the wormholes of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from .. import policies
from ..blocks import Aids, Feedback, Report, SolveSettings
from ..blocks.wormhole import Wormhole
from ..errors import AttachError, OptionError, UnknownNameError, nearest
from ..gates import Budget, LearnedGate
from ..gates.following import check_follow
from ..selection import LayerSelection, selection_of
from ..sequence import TemporalSpan, check_budget
from .closed_head import ClosedHead, check_weight, closed_heads
from .given import span_policy
from .pricing import renew_prices, unchanged_on_error
from .span import AttachedSpan

__all__ = ["configure", "report"]

Model = TypeVar("Model", bound=nn.Module)

_GATE_OPTIONS = ("budget", "temperature", "threshold", "follow")
_AIDS = ("jacobian", "opening")  # the contraction is built in


def _holders(model: nn.Module) -> list[AttachedSpan | Wormhole | TemporalSpan]:
    found = [m for m in model.modules() if isinstance(m, (AttachedSpan, Wormhole, TemporalSpan))]
    if not found:
        raise AttachError(
            f"This {type(model).__name__} has no wormholes. Create it as 'twnn_<name>', or attach some with "
            "tw.attach(model, wormholes='source->target')."
        )
    return found


def report(model: nn.Module) -> Report:
    """What happened at each span in the last forward pass.

    Returns:
        A list of :class:`~twnn_plugin.blocks.SpanRecord`, one a span, which prints as a table; empty
        before the first forward pass. For a model whose policy picks among layers, a
        :class:`~twnn_plugin.selection.SelectionReport`: one a layer.

    Raises:
        AttachError: the model has no wormholes.
    """
    selection = selection_of(model)
    if selection is not None:
        return selection.report()
    records = [h.record() if isinstance(h, AttachedSpan) else h.last for h in _holders(model)]
    return Report(record for record in records if record is not None)


def configure(model: Model, spans: str | Sequence[str] | None = None, **options: Any) -> Model:
    """Change how a model's wormholes are solved and gated; the weights stay.

    Args:
        model: a model with wormholes.
        spans: names of the spans to change, such as ``"layer4->layer3"``; None: all of them.
        **options: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm`` as in
            :func:`twnn_plugin.fix`; ``policy``; for learned gates ``budget`` (it acts as training
            goes on, or through :func:`twnn_plugin.calibrate`), ``temperature``, ``threshold`` (a score;
            higher closes more) and ``follow`` (the pace at which the threshold goes after the budget's share
            in eval mode, see :class:`~twnn_plugin.gates.learned.LearnedGate`); ``jacobian`` and
            ``opening``, see :class:`~twnn_plugin.blocks.Aids`; and ``closed_weight``.
            Wormholes that are solved together share the solve's settings and
            ``jacobian``: naming one of them changes all. Of a model whose policy picks among layers: the
            solves' settings, ``policy`` and ``max_choices``.

    Returns:
        The model itself. If any option is refused, nothing has changed.

    Raises:
        AttachError: the model has no wormholes.
        UnknownNameError: an unknown name, with the nearest one.
        OptionError: an unknown option or an impossible value, or spans that are no names, or none at all.
    """
    selection = selection_of(model)
    if selection is not None:
        _configure_selection(selection, spans, options)
        return model
    parts: list[Feedback | TemporalSpan] = [holder.feedback for holder in _holders(model)]
    if spans is not None:
        wanted = _named(spans, [part.span for part in parts])
        parts = [part for part in parts if part.span in wanted]
    known = [*SolveSettings.names(), "policy", *_GATE_OPTIONS, *_AIDS, "closed_weight"]
    for name in options:
        if name not in known:
            raise OptionError(
                f"configure has no option {name!r}.{nearest(name, known)} Its options: {', '.join(known)}."
            )
    gate_options = {name: options.pop(name) for name in _GATE_OPTIONS if name in options}
    policy = span_policy(options.pop("policy")) if "policy" in options else None
    aids = {name: options.pop(name) for name in _AIDS if name in options}
    heads = _closed_heads(model, options)
    weight = options.pop("closed_weight", None)
    solved = _with_groups(model, parts)
    changed = [part.settings.changed(**options) for part in solved]
    helped = _changed_aids(solved if "jacobian" in aids else parts, aids)
    _check_gates(parts, gate_options)
    with unchanged_on_error(model):
        for part in parts:
            _set_gate(part, gate_options)
        if "budget" in gate_options:
            renew_prices(model)
    for part, settings in zip(solved, changed, strict=True):
        part.settings = settings
    if policy is not None:
        for part in parts:
            part.policy = policy.train(part.training)
    for part, changed_aids in helped:
        part.aids = changed_aids
    for head in heads:
        head.weight = float(weight)
    return model


def _named(spans: Any, known: Sequence[str]) -> list[str]:
    """The names of the spans to change."""
    wanted = [spans] if isinstance(spans, str) else list(spans) if isinstance(spans, Iterable) else []
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise OptionError(
            f"spans is the name of a span, such as {known[0]!r}, or several in a list, or None for all of "
            f"them; got {spans!r}."
        )
    for name in wanted:
        if name not in known:
            raise UnknownNameError(f"Unknown span {name!r}.{nearest(name, known)} Spans: {', '.join(known)}.")
    return wanted


def _configure_selection(
    selection: LayerSelection, spans: str | Sequence[str] | None, options: dict[str, Any]
) -> None:
    """The same for a model whose policy picks among layers."""
    if spans is not None:
        raise OptionError("The layers of a selection share their settings: leave spans out.")
    known = [*SolveSettings.names(), "policy", "max_choices"]
    for name in options:
        if name not in known:
            raise OptionError(
                f"A selection among layers has no option {name!r}.{nearest(name, known)} Its options: "
                f"{', '.join(known)}."
            )
    policy = options.pop("policy", None)
    made = None if policy is None else policies.registry.resolve(policy)
    selection.configure(made, **options)


def _with_groups(model: nn.Module, parts: Sequence[Feedback | TemporalSpan]) -> list[Feedback | TemporalSpan]:
    """Wormholes and all others that are solved together with one of them."""
    found = {id(part): part for part in parts}
    for span in (m for m in model.modules() if isinstance(m, AttachedSpan)):
        if id(span.feedback) in found:
            found.update({id(part): part for part in span.group.parts})
    return list(found.values())


def _changed_aids(
    parts: Sequence[Feedback | TemporalSpan], options: dict[str, Any]
) -> list[tuple[Feedback, Aids]]:
    """Each wormhole's training aids with some options changed."""
    if not options:
        return []
    for part in parts:
        if not isinstance(part, Feedback):
            raise OptionError(f"Span {part.span!r} has no {', '.join(options)}.")
    return [(part, part.aids.changed(**options)) for part in parts if isinstance(part, Feedback)]


def _closed_heads(model: nn.Module, options: dict[str, Any]) -> list[ClosedHead]:
    """The closed heads, if their weight is to be changed."""
    if "closed_weight" not in options:
        return []
    check_weight(options["closed_weight"])
    heads = closed_heads(model)
    if not heads:
        raise OptionError("This model has no closed head to weigh: attach with closed_head=True.")
    return heads


def _check_gates(parts: Sequence[Feedback | TemporalSpan], options: dict[str, Any]) -> None:
    for part in parts:
        if options and not isinstance(part.gate, LearnedGate):
            raise OptionError(
                f"The gate of span {part.span!r}, {type(part.gate).__name__}, has no {', '.join(options)}: "
                "only learned gates have."
            )
    for name, value in options.items():
        if name == "budget":
            if value is not None:
                for part in parts:
                    _check_budget(part, value)
            continue
        if name == "follow" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OptionError(f"{name} must be a number; got {value!r}.")
        if name == "temperature" and not value > 0:
            raise OptionError(f"temperature must be positive; got {value!r}.")
    for part in parts:
        gate = part.gate
        if isinstance(gate, LearnedGate):
            check_follow(options.get("follow", gate.follow), options.get("budget", gate.budget), gate.control)


def _check_budget(part: Feedback | TemporalSpan, budget: float | str) -> None:
    if isinstance(part, TemporalSpan):
        check_budget(budget, part.scope)
    else:
        Budget.parse(budget)


def _set_gate(part: Feedback | TemporalSpan, options: dict[str, Any]) -> None:
    gate = part.gate
    if not isinstance(gate, LearnedGate):
        return
    if "budget" in options:
        gate.budget = options["budget"]
    if "temperature" in options:
        gate.temperature = float(options["temperature"])
    if "follow" in options:
        gate.follow = options["follow"]
    if "threshold" in options:
        gate.put("threshold", float(options["threshold"]))
