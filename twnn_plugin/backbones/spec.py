"""Wormholes as users write them: ``"layer4->layer3"``, ``"3->2"``, ``"/32->/16"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AttachError, UnknownNameError, nearest
from .base import Stage

__all__ = ["AUTO", "SpanSpec", "auto", "listed", "parse", "paths_in"]

AUTO = "auto"


@dataclass(frozen=True)
class SpanSpec:
    """A wormhole from the output of ``source`` to the input of ``target`` (paths of modules)."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}->{self.target}"


def listed(wormholes: str | Sequence[str]) -> list[str]:
    """The specs of a ``wormholes`` option, each a string.

    Raises:
        AttachError: it is something else.
    """
    specs = [wormholes] if isinstance(wormholes, str) else wormholes
    if not isinstance(specs, Sequence) or not specs or not all(isinstance(spec, str) for spec in specs):
        raise AttachError(
            f"wormholes takes 'source->target', a list of such strings, or 'auto'; got {wormholes!r}."
        )
    return [spec.strip() for spec in specs]


def paths_in(wormholes: str | Sequence[str]) -> list[str]:
    """The ends of the specs, as they are written."""
    return [end.strip() for spec in listed(wormholes) for end in spec.split("->")]


def auto(stages: Sequence[Stage]) -> list[SpanSpec]:
    """What ``"auto"`` may mean for a model, the best first.

    Of a pyramid the last two stages; of an isotropic network the last third. Where this cannot be
    iterated, shorter spans with the same end, and then spans that end earlier.
    """
    names = [stage.name for stage in stages]
    if len(names) < 2:
        return [SpanSpec(name, name) for name in names]
    isotropic = len({stage.reduction for stage in stages}) == 1
    back = max(1, len(names) // 3 - 1) if isotropic else 1
    ends = range(len(names) - 1, -1, -1)
    return [SpanSpec(names[i], names[j]) for i in ends for j in range(max(0, i - back), i + 1)]


def parse(spec: str, stages: Sequence[Stage], paths: Sequence[str]) -> SpanSpec:
    """The span that a spec names, checked.

    Args:
        spec: ``"source->target"``. An end is a stage's or a module's path; a stage's index, negative from the
            end; or ``"/16"``, the stages with this reduction: as a source the last of them, as a target the
            first.
        stages: the model's stages.
        paths: the paths of all modules that a span can be made of, in the order they are called.

    Raises:
        AttachError: not of that form, or the span goes forward.
        UnknownNameError: no such stage.
    """
    ends = [end.strip() for end in spec.split("->")]
    if len(ends) != 2 or not all(ends):
        raise AttachError(
            f"A wormhole is written 'source->target', such as {_example(stages)!r}; got {spec!r}."
        )
    source, target = _end(ends[0], stages, paths, last=True), _end(ends[1], stages, paths, last=False)
    if _last(source, paths) < _last(target, paths) or _first(source, paths) < _first(target, paths):
        raise AttachError(
            f"A wormhole goes back: its source comes after its target, or is the same stage. {spec!r} goes "
            f"forward; did you mean '{target}->{source}'?"
        )
    return SpanSpec(source, target)


def _example(stages: Sequence[Stage]) -> str:
    return str(auto(stages)[0]) if stages else "layer4->layer3"


def _inside(end: str, path: str) -> bool:
    return path == end or path.startswith(end + ".")


def _first(end: str, paths: Sequence[str]) -> int:
    return next(i for i, path in enumerate(paths) if _inside(end, path))


def _last(end: str, paths: Sequence[str]) -> int:
    return max(i for i, path in enumerate(paths) if _inside(end, path))


def _end(end: str, stages: Sequence[Stage], paths: Sequence[str], last: bool) -> str:
    names = [stage.name for stage in stages]
    if end.startswith("/"):
        return _reduced(end, stages, last)
    # The modules of a Sequential are called "0", "1", ...: a stage of that name comes before an index.
    if end.lstrip("-").isdigit() and end not in names:
        index = int(end)
        if not -len(names) <= index < len(names):
            raise UnknownNameError(
                f"There is no stage {end}; this model has {len(names)}: {', '.join(names)}."
            )
        end = names[index]
    if any(_inside(end, path) for path in paths):
        return end
    if end in names:
        raise UnknownNameError(f"Stage {end!r} is never called by the model's forward.")
    known = list(dict.fromkeys([*names, *paths]))
    shown = ", ".join(names if len(names) <= 16 else [*names[:15], "..."])
    raise UnknownNameError(f"Unknown stage {end!r}.{nearest(end, known)} Stages: {shown}.")


def _reduced(end: str, stages: Sequence[Stage], last: bool) -> str:
    known = list(dict.fromkeys(stage.reduction for stage in stages if stage.reduction is not None))
    found = [stage.name for stage in stages if end == f"/{stage.reduction}"]
    if not found:
        there = ", ".join(f"/{reduction}" for reduction in known) or "none is known"
        raise UnknownNameError(f"There is no stage with the reduction {end!r}; those of this model: {there}.")
    return found[-1 if last else 0]
