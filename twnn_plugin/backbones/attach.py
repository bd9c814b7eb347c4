"""``attach``: put wormholes into a model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from .. import gates, policies
from ..blocks import Feedback, SolveSettings
from ..blocks.wormhole import gate_factory
from ..errors import AttachError, OptionError, UnknownNameError
from ..gates import Gate
from ..policies import Policy
from . import registry
from .base import Backbone
from .checks import check_span
from .span import AttachedSpan
from .spec import SpanSpec, parse
from .trace import CallRecord, candidates, evaluating, trace
from .wiring import wire

__all__ = ["CHILD", "OPTIONS", "attach", "spans"]

Model = TypeVar("Model", bound=nn.Module)

CHILD = "wormholes"
"""Name of the child module that holds the wormholes' parameters."""

OPTIONS = ("wormholes", "gate", "budget", "policy", "scale", *SolveSettings.names())
"""Options of :func:`attach`, and of every ``twnn_`` model besides its backbone's own."""

_BATCHES = (2, 3)  # two sizes tell what depends on the batch


def attach(
    model: Model,
    wormholes: str | Sequence[str] = "auto",
    gate: str | tuple[str, dict[str, Any]] | Gate = "straight_through",
    budget: float | None = None,
    policy: str | Policy = "gate",
    scale: float = 0.1,
    **settings: Any,
) -> Model:
    """Attach wormholes to a model, in place. They are closed until training (or you) open them.

    The model is traced and each span is checked: that its modules can be replayed on other inputs, and
    that nothing inside it is used elsewhere. Hooks do the rest; no module moves, the backbone's
    keys in the state dict stay, its plain checkpoints still load.

    Args:
        model: a model that a registered backbone adapter knows, such as any timm model with
            ``feature_info``.
        wormholes: ``"source->target"``, a list of them, or ``"auto"``. Both ends are stages (or
            modules), by path or by stage index; the connection goes from the source's output back to
            the target's input, and everything in between is iterated. ``"layer3->layer3"`` is a self-loop.
        gate: registered name, or ``(name, options)``.
        budget: wanted share of open samples, for learned gates.
        policy: registered name or instance: who is iterated.
        scale: initial scale of the message.
        **settings: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm``, as in
            :func:`twnn_plugin.fix`; by default tol=1e-3 and max_iter=30.

    Returns:
        The model itself.

    Raises:
        AttachError: no adapter knows the model, it has wormholes already, the span goes forward, overlaps
            another, or cannot be iterated; the message has the reason.
        UnknownNameError: an unknown stage, gate, policy, solver or adjoint, with the nearest name.
        OptionError: an unknown option or an impossible value.

    Example:
        >>> import timm, twnn_plugin as tw
        >>> model = tw.attach(timm.create_model("resnet18"), wormholes="layer4->layer3")
    """
    solve_settings = SolveSettings().changed(**settings)
    make_gate = gate_factory(_budgeted(gate, budget))
    chosen = policies.registry.resolve(policy)
    if hasattr(model, CHILD):
        raise AttachError(
            f"This {type(model).__name__} has wormholes already. List them all in one call of attach; change "
            "their settings with tw.configure."
        )
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        refuse_checkpointing()
    backbone = find_backbone(model)
    stages = backbone.stages(model)
    with evaluating(model):
        examples = [backbone.example(model, batch) for batch in _BATCHES]
        nodes = candidates(model, [stage.name for stage in stages])
        calls, result = trace(model, nodes, examples[0])
        other, _ = trace(model, nodes, examples[1])
        specs = parse(wormholes, stages, list(dict.fromkeys(call.path for call in calls)))
        found = [_span_calls(spec, calls, other) for spec in specs]
        _refuse_overlap(specs, [mine for mine, _ in found])
        parts = []
        for spec, (mine, twins) in zip(specs, found, strict=True):
            wiring = wire(mine, twins, _BATCHES)
            check_span(str(spec), model, examples[0], wiring, mine, result)
            feedback = _feedback(
                spec, mine, make_gate, chosen, solve_settings, backbone.channels_last(model), scale
            )
            parts.append((feedback, wiring))
    # Hooks go in only now that every span has passed: a refusal leaves the model as it was.
    holder = _Holder(AttachedSpan(feedback, wiring) for feedback, wiring in parts)
    model.add_module(CHILD, holder.train(model.training))
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing = refuse_checkpointing  # pyright: ignore[reportArgumentType]
    return model


def refuse_checkpointing(enable: bool = True) -> None:
    """In place of ``set_grad_checkpointing`` of a model with wormholes."""
    if enable:
        raise AttachError(
            "Gradient checkpointing and wormholes cannot be combined: recomputing a span would solve "
            "it again. Leave it off; the implicit adjoint keeps one evaluation of the span, however long it "
            "iterates."
        )


def _feedback(
    spec: SpanSpec,
    calls: Sequence[CallRecord],
    gate: Any,
    policy: Policy,
    settings: SolveSettings,
    channels_last: bool,
    scale: float,
) -> Feedback:
    entry, out = calls[0].inputs()[0], calls[-1].output
    try:
        feedback = Feedback(str(spec), entry, out, gate, policy, settings, channels_last, scale)
    except (OptionError, UnknownNameError):
        raise
    except ValueError as error:
        raise AttachError(f"Wormhole {str(spec)!r} cannot be built: {error}") from error
    return feedback.to(entry.device, entry.dtype)


class _Holder(nn.ModuleList):
    """The wormholes of a model; as a step in a chain it does nothing."""

    def forward(self, value: Any) -> Any:
        return value


def spans(model: nn.Module) -> list[AttachedSpan]:
    """The attached spans of a model, in the order they were named."""
    return [module for module in model.modules() if isinstance(module, AttachedSpan)]


def find_backbone(model: nn.Module) -> Backbone:
    """The registered adapter that knows a model."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach takes an nn.Module; got a {type(model).__name__}.")
    for name in registry.names():
        adapter = registry.make(name)
        if adapter.claims(model):
            return adapter
    raise AttachError(
        f"No backbone adapter knows {type(model).__name__}. "
        f"There are {', '.join(registry.names())}. Register one of your own (docs/plugins.md), or wrap "
        "a module directly with tw.blocks.get('wormhole')."
    )


def _budgeted(gate: Any, budget: float | None) -> Any:
    if budget is None:
        return gate
    if isinstance(gate, Gate):
        raise OptionError("budget goes with a gate given by name; set gate.budget on the instance instead.")
    name, options = (gate, {}) if isinstance(gate, str) else gate
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
        raise OptionError(f"budget is the wanted share of open samples, in (0, 1); got {budget!r}.")
    gates.registry.entry(name)
    return name, {**options, "budget": float(budget)}


def _span_calls(
    spec: SpanSpec, calls: Sequence[CallRecord], other: Sequence[CallRecord]
) -> tuple[list[CallRecord], list[CallRecord]]:
    def inside(end: str, path: str) -> bool:
        return path == end or path.startswith(end + ".")

    begins = [i for i, call in enumerate(calls) if inside(spec.target, call.path)]
    ends = [i for i, call in enumerate(calls) if inside(spec.source, call.path)]
    if not begins or not ends:
        missing = spec.target if not begins else spec.source
        raise UnknownNameError(f"Stage {missing!r} is never called by the model's forward.")
    part = slice(begins[0], ends[-1] + 1)
    if len(other) != len(calls):
        raise AttachError("The model calls other modules for another batch size; it cannot be replayed.")
    return list(calls[part]), list(other[part])


def _refuse_overlap(specs: Sequence[SpanSpec], found: Sequence[Sequence[CallRecord]]) -> None:
    owners: dict[int, SpanSpec] = {}
    for spec, calls in zip(specs, found, strict=True):
        for call in calls:
            taken = owners.setdefault(id(call), spec)
            if taken is not spec:
                raise AttachError(
                    f"Wormholes {str(taken)!r} and {str(spec)!r} share {call.path!r}. Nested and overlapping "
                    "spans are not supported; choose spans that follow each other."
                )
