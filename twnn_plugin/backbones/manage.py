"""``configure`` and ``report``: change and read the wormholes of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from .. import policies
from ..blocks import Feedback, Report, SolveSettings
from ..blocks.wormhole import Wormhole
from ..errors import AttachError, OptionError, UnknownNameError, nearest
from ..gates import LearnedGate
from .span import AttachedSpan

__all__ = ["configure", "report"]

Model = TypeVar("Model", bound=nn.Module)

_GATE_OPTIONS = ("budget", "temperature", "threshold")


def _holders(model: nn.Module) -> list[AttachedSpan | Wormhole]:
    found = [m for m in model.modules() if isinstance(m, (AttachedSpan, Wormhole))]
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
        before the first forward pass.

    Raises:
        AttachError: the model has no wormholes.
    """
    records = [h.record() if isinstance(h, AttachedSpan) else h.last for h in _holders(model)]
    return Report(record for record in records if record is not None)


def configure(model: Model, spans: str | Sequence[str] | None = None, **options: Any) -> Model:
    """Change how a model's wormholes are solved and gated; the weights stay.

    Args:
        model: a model with wormholes.
        spans: names of the spans to change, such as ``"layer4->layer3"``; None: all of them.
        **options: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm`` as in
            :func:`twnn_plugin.fix`; ``policy``; and for learned gates ``budget`` (it acts as training
            goes on), ``temperature`` and ``threshold`` (a score; higher closes more).

    Returns:
        The model itself. If any option is refused, nothing has changed.

    Raises:
        AttachError: the model has no wormholes.
        UnknownNameError: an unknown name, with the nearest one.
        OptionError: an unknown option or an impossible value.
    """
    parts = [holder.feedback for holder in _holders(model)]
    if spans is not None:
        wanted = [spans] if isinstance(spans, str) else list(spans)
        known = [part.span for part in parts]
        for name in wanted:
            if name not in known:
                raise UnknownNameError(
                    f"Unknown span {name!r}.{nearest(name, known)} Spans: {', '.join(known)}."
                )
        parts = [part for part in parts if part.span in wanted]
    known = [*SolveSettings.names(), "policy", *_GATE_OPTIONS]
    for name in options:
        if name not in known:
            raise OptionError(
                f"configure has no option {name!r}.{nearest(name, known)} Its options: {', '.join(known)}."
            )
    gate_options = {name: options.pop(name) for name in _GATE_OPTIONS if name in options}
    policy = policies.registry.resolve(options.pop("policy")) if "policy" in options else None
    changed = [part.settings.changed(**options) for part in parts]
    _check_gates(parts, gate_options)
    for part, settings in zip(parts, changed, strict=True):
        part.settings = settings
        if policy is not None:
            part.policy = policy
        _set_gate(part, gate_options)
    return model


def _check_gates(parts: Sequence[Feedback], options: dict[str, Any]) -> None:
    for part in parts:
        if options and not isinstance(part.gate, LearnedGate):
            raise OptionError(
                f"The gate of span {part.span!r}, {type(part.gate).__name__}, has no {', '.join(options)}: "
                "only learned gates have."
            )
    for name, value in options.items():
        if name == "budget" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise OptionError(f"{name} must be a number; got {value!r}.")
        if name == "budget" and not 0 < value < 1:
            raise OptionError(
                f"budget is the wanted share of open samples, in (0, 1), or None; got {value!r}."
            )
        if name == "temperature" and not value > 0:
            raise OptionError(f"temperature must be positive; got {value!r}.")


def _set_gate(part: Feedback, options: dict[str, Any]) -> None:
    gate = part.gate
    if not isinstance(gate, LearnedGate):
        return
    if "budget" in options:
        gate.budget = options["budget"]
    if "temperature" in options:
        gate.temperature = float(options["temperature"])
    if "threshold" in options:
        gate.threshold = gate.threshold.new_tensor(float(options["threshold"]))
