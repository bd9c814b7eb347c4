"""From what the user asked for to groups that are proved to work, or a refusal that says what would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import AttachError
from .base import Backbone, Stage
from .checks import check_wiring
from .plan import Ends, Plan, Refusal, plan
from .rerun import Rerun, rerun
from .rerun_group import check_rerun
from .spec import AUTO, SpanSpec, auto, listed, parse, paths_in
from .survey import Survey, grouped, survey
from .wiring import Wiring, wire

__all__ = ["Arrangement", "Grouping", "arrange"]

_VERIFIED = 3  # spans that are tried for real before one is recommended
_LOOKED_AT = 400  # and on paper


@dataclass(frozen=True)
class Grouping:
    """Wormholes that are solved together.

    Attributes:
        members: which of the arrangement's spans.
        program: their map.
        plan: the calls that it is made of.
    """

    members: tuple[int, ...]
    program: Wiring | Rerun
    plan: Plan


@dataclass(frozen=True)
class Arrangement:
    """What will be attached.

    Attributes:
        survey: what is known of the model.
        specs: the spans, in the order they were named.
        groups: the groups they make, in the order of their calls.
    """

    survey: Survey
    specs: tuple[SpanSpec, ...]
    groups: tuple[Grouping, ...]

    def example(self, member: int) -> tuple[Tensor, Tensor]:
        """The input of a span's target and the output of its source, on the meta device."""
        group = next(group for group in self.groups if member in group.members)
        place = group.members.index(member)
        calls, end, out = self.survey.flow.calls, group.plan.ends[place], group.plan.outs[place]
        shape = calls[out[0]].outputs[out[1]]
        assert shape is not None
        return (
            torch.empty(calls[end.target].inputs[group.plan.entries[place]].shape, device="meta"),
            torch.empty(shape, device="meta"),
        )


def arrange(
    model: nn.Module,
    backbone: Backbone,
    wormholes: str | Sequence[str],
    fallback: bool,
) -> Arrangement:
    """Find the spans, group them and prove each group.

    Args:
        model: the model, in eval mode, without wormholes.
        backbone: knows its stages.
        wormholes: see :func:`twnn_plugin.attach`.
        fallback: whether spans may be evaluated by running the model's forward again.

    Raises:
        AttachError: a span cannot be iterated; with the reason and the nearest span that can.
        UnknownNameError: no such stage.
    """
    stages = backbone.stages(model)
    if not stages and backbone.gathers(model):
        raise AttachError(
            f"The stages of this {type(model).__name__} are no modules of it (feature_cls='fx' makes one "
            "graph of the model), so that no wormhole can be attached to them. Make it with "
            "feature_cls='getter' or 'hook'."
        )
    seen = survey(model, backbone, stages, _named(model, wormholes, stages))
    hidden = [stage.name for stage in stages if not seen.calls_in(stage.name)]
    if len(stages) - len(hidden) < 2 and hidden and AUTO in listed(wormholes):
        # The stages end inside of blocks: these are opened, to see where.
        seen = survey(model, backbone, stages, [*_named(model, wormholes, stages), *hidden])
    paths = seen.flow.paths
    specs: list[SpanSpec] = []
    for spec in listed(wormholes):
        chosen = parse(spec, stages, paths) if spec != AUTO else _sensible(model, seen, stages, fallback)
        if chosen in specs:
            raise AttachError(f"Wormhole {str(chosen)!r} is named twice.")
        specs.append(chosen)
    ends = [seen.ends(spec.target, spec.source) for spec in specs]
    groups = []
    for members in grouped(ends):
        try:
            program, found = _prove(model, seen, [ends[i] for i in members], fallback)
        except Refusal as refusal:
            names = [specs[i] for i in members]
            explained = _explain(model, seen, stages, names, refusal)
            raise AttachError(explained + _advice(backbone.gathers(model), fallback)) from refusal
        groups.append(Grouping(tuple(members), program, found))
    _one_rerun(specs, groups)
    return Arrangement(seen, tuple(specs), tuple(groups))


def _named(model: nn.Module, wormholes: str | Sequence[str], stages: Sequence[Stage]) -> list[str]:
    """The modules that the specs name as their ends, by path, by stage index or by reduction."""
    names = [stage.name for stage in stages]
    known = {name for name, _ in model.named_modules()}
    found = []
    for end in paths_in(wormholes):
        index = int(end) if end.lstrip("-").isdigit() else len(names)
        if -len(names) <= index < len(names):
            found.append(names[index])
        found += [stage.name for stage in stages if end == f"/{stage.reduction}"]
        found += [end] if end in known else []
    return found


def _prove(
    model: nn.Module, seen: Survey, ends: Sequence[Ends], fallback: bool
) -> tuple[Wiring | Rerun, Plan]:
    """A map for these wormholes that is proved on the model; the general rule first."""
    known = tuple(ends)
    if known not in seen.proved:  # a proof takes some passes through the model
        seen.proved[known] = _proof(model, seen, ends, fallback)
    return seen.proved[known]


def _proof(
    model: nn.Module, seen: Survey, ends: Sequence[Ends], fallback: bool
) -> tuple[Wiring | Rerun, Plan]:
    try:
        found = plan(seen.flow, seen.other, ends)
        wiring = wire(seen.flow, seen.other, found)
        if not _on_meta(model):
            check_wiring(model, seen, wiring)
        return wiring, found
    except Refusal as refusal:
        if not fallback:
            raise
        first = refusal
    try:
        again = rerun(model, seen, ends)
        if not _on_meta(model):
            check_rerun(model, seen, again)
    except Refusal as second:
        raise Refusal(f"{first} Nor does running the model's forward again help: {second}") from second
    return again, again.plan


def _on_meta(model: nn.Module) -> bool:
    """Whether there are no values to check with."""
    return any(p.device.type == "meta" for p in model.parameters())


def _works(model: nn.Module, seen: Survey, spec: SpanSpec, fallback: bool = False) -> bool:
    try:
        _prove(model, seen, [seen.ends(spec.target, spec.source)], fallback)
    except Refusal:
        return False
    return True


def _on_paper(seen: Survey, specs: Sequence[SpanSpec]) -> Iterator[SpanSpec]:
    """Those that the flow of the pass has nothing against."""
    for spec in specs[:_LOOKED_AT]:
        if not (seen.calls_in(spec.source) and seen.calls_in(spec.target)):
            continue
        try:
            wire(seen.flow, seen.other, plan(seen.flow, seen.other, [seen.ends(spec.target, spec.source)]))
        except (Refusal, ValueError):
            continue
        yield spec


def _first_that_works(model: nn.Module, seen: Survey, specs: Sequence[SpanSpec]) -> SpanSpec | None:
    promising = itertools.islice(_on_paper(seen, specs), _VERIFIED)
    return next((spec for spec in promising if _works(model, seen, spec)), None)


def _sensible(model: nn.Module, seen: Survey, stages: Sequence[Stage], fallback: bool) -> SpanSpec:
    wanted = [spec for spec in auto(stages) if seen.calls_in(spec.source) and seen.calls_in(spec.target)]
    if not wanted:
        raise AttachError(
            "wormholes='auto' needs a model with stages that its forward calls; name a span instead, of "
            f"these modules: {', '.join(seen.flow.paths[:24])}."
        )
    # Some models declare for a stage the activation that ends it: alone it computes nothing that is learnt.
    learning = [spec for spec in wanted if _learns(seen, spec)]
    behind = [spec for spec in learning if spec.source != stages[0].name]  # the stem is no more than that
    wanted = list(dict.fromkeys([*behind, *_of_blocks(model, seen, stages), *learning, *wanted]))
    found = _first_that_works(model, seen, wanted)
    if found is None and fallback and _works(model, seen, wanted[0], fallback=True):
        found = wanted[0]
    return wanted[0] if found is None else found


def _learns(seen: Survey, spec: SpanSpec) -> bool:
    """Whether a module that the span calls has parameters."""
    ends = seen.ends(spec.target, spec.source)
    calls = seen.flow.calls[ends.target : ends.source + 1]
    return any(next(seen.nodes[call.path].parameters(), None) is not None for call in calls)


def _of_blocks(model: nn.Module, seen: Survey, stages: Sequence[Stage]) -> list[SpanSpec]:
    """Spans of the model's own blocks behind its stem, the last first: two that follow each other, or one."""
    first, last = seen.calls_in(stages[0].name), seen.calls_in(stages[-1].name)
    if not first or not last:
        return []
    names = []
    for name, child in model.named_children():
        calls = seen.calls_in(name)
        if calls and first[-1] < calls[0] and calls[-1] <= last[-1] and any(child.children()):
            names.append(name)
    pairs = [(i, j) for i in range(len(names) - 1, -1, -1) for j in range(max(0, i - 1), i + 1)]
    return [spec for i, j in pairs if _learns(seen, spec := SpanSpec(names[i], names[j]))]


def _near(spec: SpanSpec, names: Sequence[str]) -> list[SpanSpec]:
    """Spans between these names, nearest to ``spec`` first; of equals the longest, then the latest."""
    if spec.source not in names or spec.target not in names:
        return []
    i, j = names.index(spec.source), names.index(spec.target)
    pairs = [(a, b) for a in range(len(names)) for b in range(a + 1) if (a, b) != (i, j)]
    pairs.sort(key=lambda p: (abs(p[0] - i) + abs(p[1] - j), p[1] - p[0], abs(p[0] - i)))
    return [SpanSpec(names[a], names[b]) for a, b in pairs]


def _explain(
    model: nn.Module,
    seen: Survey,
    stages: Sequence[Stage],
    specs: Sequence[SpanSpec],
    refusal: Refusal,
) -> str:
    """What a refusal says."""
    names = [str(spec) for spec in specs]
    subject = (
        f"Span {names[0]!r} cannot be iterated"
        if len(specs) == 1
        else (f"Spans {', '.join(map(repr, names))}, which overlap, cannot be iterated together")
    )
    message = f"{subject}: {refusal}"
    if len(specs) == 1:
        staged = [stage.name for stage in stages if seen.calls_in(stage.name)]
        found = None
        for known in (staged, seen.flow.paths):
            found = found or _first_that_works(model, seen, _near(specs[0], known))
        if found is not None:
            message += f" The nearest span that works: {str(found)!r}."
    return message


def _advice(gathers: bool, fallback: bool) -> str:
    """What else may help where a span was refused."""
    if gathers:  # it has no fallback, whatever is asked for
        return (
            " In a net made with features_only=True the features that it returns must depend on the span, "
            "and spans that cannot be replayed have no fallback: let out_indices reach the span's end, or "
            "attach the wormhole to the whole model."
        )
    if fallback:
        return ""
    return " fallback=True may iterate it as it is, by running the model's forward again, which is slower."


def _one_rerun(specs: Sequence[SpanSpec], groups: Sequence[Grouping]) -> None:
    rerun_groups = [group for group in groups if isinstance(group.program, Rerun)]
    if len(rerun_groups) > 1:
        first, second = (str(specs[group.members[0]]) for group in rerun_groups[:2])
        raise AttachError(
            f"Wormholes {first!r} and {second!r} both need the model's forward to be run again, which only "
            "one group of wormholes of a model can have. Let them overlap, or leave one out."
        )
    for late in rerun_groups:
        early = next((group for group in groups if group.plan.last < late.plan.first), None)
        if early is not None:
            before, behind = (str(specs[group.members[0]]) for group in (early, late))
            raise AttachError(
                f"Wormhole {behind!r} needs the model's forward to be run again, from its beginning, where "
                f"{before!r} would be settled anew in each run. Let them overlap, or leave one out."
            )
