"""Temporal wormholes as users write them: ``"layer2->layer0"``, ``"layer1[t-1]->layer0"`` and the like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import AttachError, OptionError, UnknownNameError, nearest

__all__ = ["END", "TemporalSpec", "parse"]

END = -1
"""The delay of a wormhole that reads the end of the sequence."""

_FORM = re.compile(r"^\s*([\w-]+)\s*(?:\[([^\]]*)\])?\s*->\s*([\w-]+)\s*$")
_TIME = re.compile(r"^t(?:\s*-\s*(\d+))?$")
_EXAMPLES = "'layer1->layer0', 'layer1[t-1]->layer0' or 'layer1[end]->layer0'"


@dataclass(frozen=True)
class TemporalSpec:
    """A wormhole from the output of one recurrent layer back to the input of an earlier one.

    Attributes:
        source: index of the layer that is read.
        target: index of the layer whose input receives the message, at most ``source``.
        delay: time steps between the output that is read and the input that receives it: 0 within the
            time step, d >= 1 from d steps before, :data:`END` from the last step to all of them.
    """

    source: int
    target: int
    delay: int = 0

    def __str__(self) -> str:
        when = {0: "", END: "[end]"}.get(self.delay, f"[t-{self.delay}]")
        return f"layer{self.source}{when}->layer{self.target}"


def parse(wormholes: str | Sequence[str], layers: int) -> tuple[TemporalSpec, ...]:
    """The wormholes that an option names, checked.

    Args:
        wormholes: ``"source->target"``, a list of them, or ``"auto"``, from the last layer to the first.
            An end is ``"layer<k>"`` or the number k (negative from the end); after the source, in
            brackets, the time that is read: ``[t]`` (the default), ``[t-d]`` or ``[end]``.
        layers: how many layers there are.

    Raises:
        AttachError: not of that form, a wormhole that goes forward, or one named twice.
        OptionError: neither a string nor a list.
        UnknownNameError: no such layer.
    """
    if not isinstance(wormholes, Iterable):
        raise OptionError(
            f"wormholes takes a string such as {_EXAMPLES}, a list of them, or 'auto', and () for none; got "
            f"{wormholes!r}."
        )
    given = [wormholes] if isinstance(wormholes, str) else list(wormholes)
    if not all(isinstance(spec, str) for spec in given):
        raise AttachError(f"wormholes takes strings such as {_EXAMPLES}, or 'auto'; got {wormholes!r}.")
    specs = tuple(_parse(spec, layers) for spec in given)
    for index, spec in enumerate(specs):
        if spec in specs[:index]:
            raise AttachError(f"Wormhole {str(spec)!r} is named twice.")
    return specs


def _parse(text: str, layers: int) -> TemporalSpec:
    if text.strip() == "auto":
        return TemporalSpec(layers - 1, 0)
    found = _FORM.match(text)
    if found is None:
        raise AttachError(f"A temporal wormhole is written {_EXAMPLES}; got {text!r}.")
    source, target = _layer(found[1], layers), _layer(found[3], layers)
    if source < target:
        raise AttachError(
            f"A wormhole goes back: its source comes after its target, or is the same layer. {text!r} goes "
            f"forward; did you mean 'layer{target}->layer{source}'?"
        )
    return TemporalSpec(source, target, _delay(found[2], text))


def _delay(text: str | None, whole: str) -> int:
    if text is None:
        return 0
    when = text.strip()
    if when == "end":
        return END
    found = _TIME.match(when)
    if found is None:
        raise AttachError(
            f"The time that a wormhole reads is [t], [t-1], [t-2], ... or [end]; got [{text}] in {whole!r}. "
            "A later time than t is reached by [end] alone."
        )
    return int(found[1] or 0)


def _layer(name: str, layers: int) -> int:
    known = [f"layer{k}" for k in range(layers)]
    if name.lstrip("-").isdigit():
        index = int(name)
        if -layers <= index < layers:
            return index % layers
    elif name in known:
        return known.index(name)
    raise UnknownNameError(f"Unknown layer {name!r}.{nearest(name, known)} Layers: {', '.join(known)}.")
