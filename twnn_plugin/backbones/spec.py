"""Wormholes as users write them: ``"layer4->layer3"``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AttachError, UnknownNameError, nearest
from .base import Stage

__all__ = ["SpanSpec", "parse"]


@dataclass(frozen=True)
class SpanSpec:
    """A wormhole from the output of ``source`` to the input of ``target`` (paths of modules)."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}->{self.target}"


def parse(wormholes: str | Sequence[str], stages: Sequence[Stage], paths: Sequence[str]) -> list[SpanSpec]:
    """The spans that a ``wormholes`` option names, checked.

    Args:
        wormholes: ``"source->target"``, a list of them, or ``"auto"``. An end is a stage's or a
            module's path, or a stage's index (negative from the end).
        stages: the model's stages.
        paths: the paths of all modules that a span can be made of, in the order they are called.

    Raises:
        AttachError: not of that form, or the span goes forward.
        UnknownNameError: no such stage.
    """
    specs = [wormholes] if isinstance(wormholes, str) else list(wormholes)
    if not specs or not all(isinstance(spec, str) for spec in specs):
        raise AttachError(
            f"wormholes takes 'source->target', a list of such strings, or 'auto'; got {wormholes!r}."
        )
    return [_auto(stages) if spec.strip() == "auto" else _parse(spec, stages, paths) for spec in specs]


def _auto(stages: Sequence[Stage]) -> SpanSpec:
    # The last two stages of a pyramid; of an isotropic network the last third.
    if len(stages) < 2:
        raise AttachError("wormholes='auto' needs a model with at least two stages; name a span instead.")
    isotropic = len({stage.reduction for stage in stages}) == 1
    back = max(1, len(stages) // 3 - 1) if isotropic else 1
    return SpanSpec(stages[-1].name, stages[-1 - back].name)


def _parse(spec: str, stages: Sequence[Stage], paths: Sequence[str]) -> SpanSpec:
    ends = [end.strip() for end in spec.split("->")]
    if len(ends) != 2 or not all(ends):
        raise AttachError(
            f"A wormhole is written 'source->target', such as {str(_example(stages))!r}; got {spec!r}."
        )
    source, target = (_end(end, stages, paths) for end in ends)
    if _last(source, paths) < _last(target, paths) or _first(source, paths) < _first(target, paths):
        raise AttachError(
            f"A wormhole goes back: its source comes after its target, or is the same stage. {spec!r} goes "
            f"forward; did you mean '{target}->{source}'?"
        )
    return SpanSpec(source, target)


def _example(stages: Sequence[Stage]) -> SpanSpec | str:
    return _auto(stages) if len(stages) > 1 else "layer4->layer3"


def _inside(end: str, path: str) -> bool:
    return path == end or path.startswith(end + ".")


def _first(end: str, paths: Sequence[str]) -> int:
    return next(i for i, path in enumerate(paths) if _inside(end, path))


def _last(end: str, paths: Sequence[str]) -> int:
    return max(i for i, path in enumerate(paths) if _inside(end, path))


def _end(end: str, stages: Sequence[Stage], paths: Sequence[str]) -> str:
    names = [stage.name for stage in stages]
    if end.lstrip("-").isdigit():
        index = int(end)
        if not -len(names) <= index < len(names):
            raise UnknownNameError(
                f"There is no stage {end}; this model has {len(names)}: {', '.join(names)}."
            )
        return names[index]
    if any(_inside(end, path) for path in paths):
        return end
    known = list(dict.fromkeys([*names, *paths]))
    shown = ", ".join(names if len(names) <= 16 else [*names[:15], "..."])
    raise UnknownNameError(f"Unknown stage {end!r}.{nearest(end, known)} Stages: {shown}.")
