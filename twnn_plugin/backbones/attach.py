"""``attach``: put wormholes into a model at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import gates
from ..blocks import Aids, Feedback, SolveSettings
from ..blocks.feedback import fill_missing
from ..blocks.paths import MessagePath, path_of
from ..blocks.prices import check_prices, set_prices
from ..blocks.settings import check_names
from ..blocks.wormhole import gate_factory
from ..errors import AttachError, OptionError, UnknownNameError
from ..gates import Gate
from ..modes import evaluating
from ..policies import Policy
from ..trees import leaves, rebuild
from . import registry
from .arrange import Arrangement, arrange
from .auxiliary import add_auxiliary_loss
from .base import Backbone
from .closed_head import add_closed_head, check_closed_head, check_options
from .given import check_flag, check_uncompiled, span_policy
from .listed import ListedBackbone
from .manners import adopt, last_alone, without_checkpointing
from .rerun import Rerun
from .rerun_group import RerunGroup
from .span import AttachedSpan, ReplayedGroup, spans
from .spec import SpanSpec, listed
from .survey import run

__all__ = ["CHILD", "OPTIONS", "Holder", "attach", "spans"]

Model = TypeVar("Model", bound=nn.Module)

CHILD = "wormholes"
"""Name of the child module that holds the wormholes' parameters."""

OPTIONS = (
    *("wormholes", "gate", "budget", "policy", "scale", "message"),
    *("closed_head", "closed_weight", "fallback"),
    *SolveSettings.names(),
    *Aids.names(),
)
"""Options of :func:`attach`, and of every ``twnn_`` model besides its backbone's own."""


def attach(
    model: Model,
    wormholes: str | Sequence[str] = "auto",
    gate: str | tuple[str, dict[str, Any]] | Gate = "straight_through",
    budget: float | str | None = None,
    policy: str | Policy = "gate",
    scale: float = 0.1,
    message: MessagePath | None = None,
    closed_head: bool | str = False,
    closed_weight: float | None = None,
    fallback: bool = True,
    stages: Sequence[str | nn.Module] | None = None,
    example: Any = None,
    **settings: Any,
) -> Model:
    """Attach wormholes to a model, in place. They are closed until training (or you) open them.

    The model is traced, on the meta device where it runs there, and each span is proved on the model: that
    its modules can be replayed on other inputs, sample by sample, and that nothing inside it is used
    elsewhere. Hooks do the rest; no module moves, the backbone's keys in the state dict stay, its plain
    checkpoints still load. A model on the meta device has no values; of it the dataflow alone is looked at.

    Args:
        model: a model that a registered backbone adapter knows, such as any timm model with
            ``feature_info``.
        wormholes: ``"source->target"``, a list of them, or ``"auto"``. Both ends are stages (or modules), by
            path, by stage index (``"-1->2"``) or by reduction (``"/32->/16"``: as a source the last stage
            with it, as a target the first); the connection goes from the source's output back to the target's
            input, and everything in between is iterated. ``"layer3->layer3"`` is a self-loop. Wormholes whose
            spans overlap are solved as one equation. ``"auto"``: the last two stages of a pyramid, the last
            third of an isotropic network, or the nearest span to it that can be replayed.
        gate: registered name, or ``(name, options)``; for a single wormhole, a gate.
        budget: for learned gates, the wanted share of open samples, such as 0.3, the wanted mean
            multiply-adds relative to the plain network, such as ``"1.2x"`` (all wormholes together), or the
            wanted mean replays a sample of each wormhole, such as ``"2 rows"``.
        policy: registered name or instance: who is iterated.
        scale: initial scale of the message.
        message: what a state goes through on its way back, before it is normalised and projected, to one of
            the same shape: a registered block that propagates, such as ``"verlet"`` or
            ``("verlet", {"layers": 8})``, made for the state's channels; a function that makes a module for a
            number of channels; or, for a single wormhole, a module. It must treat samples one by one, and
            neither draw random numbers nor use batch statistics. None: nothing.
        closed_head: whether samples that are not iterated are answered by a classifier of their own, which
            starts as a copy; a path names the classifier of a model that has no ``get_classifier``. See
            :func:`twnn_plugin.closed_loss`.
        closed_weight: of the closed logits' loss; None: 0.5.
        fallback: whether a span that cannot be replayed module by module, because the model computes
            something in between, may be evaluated by running the model's forward again, which is right but
            slower. ``twnn_plugin.spans(model)`` says which mode each span is in. False: it is refused.
        stages: for any module: its stages from the input to the output, by path or as modules. None: those
            that the adapter of its library knows.
        example: an input of the model, (B, ...): a tensor, a tuple of arguments or a dict of keyword
            arguments, all tensors in it with a row for each sample. None: the adapter knows one.
        **settings: ``solver``, ``adjoint``, ``tol``, ``max_iter``, ``stop``, ``norm``, as in
            :func:`twnn_plugin.fix`, by default tol=1e-3 and max_iter=30; and ``contraction``, ``opening`` and
            ``jacobian``, which help training, see :class:`~twnn_plugin.blocks.Aids`.

    Returns:
        The model itself.

    Raises:
        AttachError: no adapter knows the model, it is compiled or has wormholes already, a span goes forward,
            is named twice, or cannot be iterated; the message has the reason and the nearest span that works.
        UnknownNameError: an unknown stage, gate, policy, block, solver or adjoint, with the nearest name.
        OptionError: an unknown option or an impossible value.

    Example:
        >>> import timm, twnn_plugin as tw
        >>> model = tw.attach(timm.create_model("resnet18"), wormholes="layer4->layer3")
    """
    check_names("attach", settings, (*OPTIONS, "stages", "example"))
    aids, settings = Aids.split(settings)
    solve_settings = SolveSettings().changed(**settings)
    gates.check_gate(gate)
    make_gate = gate_factory(_budgeted(gate, budget))
    chosen = span_policy(policy)
    check_flag("fallback", fallback)
    check_options(closed_head, closed_weight)
    if isinstance(model, nn.Module):
        check_uncompiled(model)
    if hasattr(model, CHILD):
        raise AttachError(
            f"This {type(model).__name__} has wormholes already. List them all in one call of attach; change "
            "their settings with tw.configure."
        )
    backbone = _backbone(model, stages, example)
    layout, gathers = backbone.channels_last(model), backbone.gathers(model)
    if gathers:  # timm's features_only
        wormholes, fallback = _renamed(backbone, model, wormholes), False
    with without_checkpointing(model) as checkpoint, evaluating(model), last_alone(model, gathers):
        found = arrange(model, backbone, wormholes, fallback)
        first = found.survey.examples[0]
        if len(found.specs) > 1:
            _check_unshared(message, gate, len(found.specs))
        build = _Builder(model, first, layout, make_gate, chosen, solve_settings, scale, aids, message)
        feedbacks = [build(spec, *found.example(i)) for i, spec in enumerate(found.specs)]
        if closed_head:
            _check_closed(model, found, closed_head, first)
        check_prices(model, feedbacks, lambda: run(model, first))
    # Hooks go in only now that every span has passed: a refusal leaves the model as it was.
    holder = Holder(
        _spans(found, feedbacks), backbone.given if isinstance(backbone, ListedBackbone) else None
    )
    model.add_module(CHILD, holder.train(model.training))
    if closed_head:
        add_closed_head(model, feedbacks, closed_head, 0.5 if closed_weight is None else closed_weight)
    add_auxiliary_loss(model, feedbacks)
    set_prices(model, feedbacks, lambda: run(model, first))
    adopt(model, CHILD, [stage.name for stage in backbone.stages(model)], checkpoint, gathers)
    return model


def _renamed(backbone: Backbone, model: nn.Module, wormholes: str | Sequence[str]) -> list[str]:
    """The specs with the paths that their ends have in a rebuilt model."""
    specs = [[end.strip() for end in spec.split("->")] for spec in listed(wormholes)]
    return ["->".join(backbone.path(model, end) for end in ends) for ends in specs]


def _check_closed(model: nn.Module, found: Arrangement, where: bool | str, first: Any) -> None:
    """Refuse a closed head where the closed network's features are not those that the model has at hand."""
    if any(isinstance(group.program, Rerun) or group.program.rest for group in found.groups):
        raise AttachError(
            "A closed head goes with spans that are replayed and give one tensor to the rest of the model. "
            "Choose another span, or leave closed_head out."
        )
    for group in found.groups:
        check_closed_head(model, where, first, run(model, first), group.program.modules()[-1])


def _backbone(model: nn.Module, stages: Sequence[Any] | None, example: Any) -> Backbone:
    if stages is None and example is None:
        return find_backbone(model)
    return ListedBackbone(model, stages, example, known_backbone(model))


def _spans(found: Arrangement, feedbacks: Sequence[Feedback]) -> list[AttachedSpan]:
    spans: dict[int, AttachedSpan] = {}
    for group in found.groups:
        parts = [feedbacks[i] for i in group.members]
        program = group.program
        made = RerunGroup(parts, program) if isinstance(program, Rerun) else ReplayedGroup(parts, program)
        spans.update({i: AttachedSpan(feedbacks[i], made) for i in group.members})
    return [spans[i] for i in range(len(feedbacks))]


@dataclass(frozen=True)
class _Builder:
    """Makes the wormholes of a model: what :func:`attach` was told about all of them."""

    model: nn.Module
    example: Any
    channels_last: bool
    gate: Callable[[int, int, bool], Gate]
    policy: Policy
    settings: SolveSettings
    scale: float
    aids: Aids
    message: MessagePath | None

    def __call__(self, spec: SpanSpec, entry: Tensor, out: Tensor) -> Feedback:
        """One of them, from examples of its target's input and its source's output."""
        try:
            path = path_of(self.message, out, self.channels_last)
            with torch.device("cpu"):  # the same weights for a seed on any device
                feedback = Feedback(
                    *(str(spec), entry, out, self.gate, self.policy, self.settings),
                    *(self.channels_last, self.scale, self.aids, path),
                )
        except (OptionError, UnknownNameError):
            raise
        except ValueError as error:
            raise AttachError(f"Wormhole {str(spec)!r} cannot be built: {error}") from error
        tensors = (*self.model.parameters(), *self.model.buffers(), *leaves(self.example))
        like = next(t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
        return feedback.to(like.device, like.dtype)


class Holder(nn.ModuleList):
    """The wormholes of a model; as a step in a chain it does nothing.

    Args:
        spans: the wormholes.
        example: the input that ``attach`` was given; its first sample is kept, to count work with later.
            None: the model's adapter knows one.
    """

    def __init__(self, spans: Sequence[AttachedSpan], example: Any = None):
        super().__init__(spans)
        self.example = rebuild(example, _first)
        for part in self.modules():
            if isinstance(part, Feedback):
                part.alone = False
        self.register_load_state_dict_pre_hook(fill_missing)

    def forward(self, value: Any) -> Any:
        return value


def _first(leaf: Any) -> Any:
    return leaf.detach()[:1].clone() if isinstance(leaf, Tensor) else leaf


def find_backbone(model: nn.Module) -> Backbone:
    """The registered adapter that knows a model."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach takes an nn.Module; got a {type(model).__name__}.")
    known = known_backbone(model)
    if known is not None:
        return known
    raise AttachError(
        f"No backbone adapter knows {type(model).__name__}; there are {', '.join(registry.names())}. Name "
        "its stages, from the input to the output, and give an input: tw.attach(model, stages=['encoder.0', "
        "'encoder.1'], example=x). Or register an adapter of your own (docs/plugins.md), or wrap a module "
        "directly with tw.blocks.get('wormhole')."
    )


def known_backbone(model: nn.Module) -> Backbone | None:
    """The first registered adapter that knows a model, in the order of their names."""
    made = (registry.make(name) for name in registry.names())
    return next((adapter for adapter in made if adapter.claims(model)), None)


def _check_unshared(message: Any, gate: Any, wormholes: int) -> None:
    """Refuse modules that several wormholes would share."""
    if isinstance(message, nn.Module):
        raise OptionError(
            f"message is one module, and there are {wormholes} wormholes, each with weights of its own: give "
            "the name of a block, (name, options), or a function that makes a module for a number of "
            "channels."
        )
    if isinstance(gate, Gate):
        raise OptionError(
            f"gate is one {type(gate).__name__}, and there are {wormholes} wormholes, each with a threshold, "
            "a budget and a penalty of its own: give the name of a gate or (name, options), such as "
            "('sigmoid', {'budget': 0.3})."
        )


def _budgeted(gate: Any, budget: float | str | None) -> Any:
    if budget is None:
        return gate
    if isinstance(gate, Gate):
        raise OptionError("budget goes with a gate given by name; set gate.budget on the instance instead.")
    name, options = (gate, {}) if isinstance(gate, str) else gate
    gates.Budget.parse(budget)
    gates.registry.entry(name)
    gates.check_one_budget(options, budget)
    return name, {**options, "budget": budget}
