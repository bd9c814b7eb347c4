"""A model's calls, as attaching sees them: two passes with two batch sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttachError
from ..trees import leaves, rebuild
from .base import Backbone, Stage
from .flow import Flow, follow
from .plan import Ends, Refusal
from .shadow import shadow
from .trace import candidates

__all__ = ["Survey", "grouped", "run", "run_for_real", "survey"]

BATCHES = (2, 3)
"""Samples in the two passes: two sizes tell what depends on the batch."""


@dataclass(frozen=True)
class Survey:
    """What attaching knows of a model.

    Attributes:
        nodes: the modules whose calls are looked at, by path.
        flow: a pass with two samples.
        other: a pass with three.
        examples: the inputs of the two passes, on the model's device.
        proved: by the ends of wormholes, what was proved of them; whoever proves something keeps it here.
    """

    nodes: Mapping[str, nn.Module]
    flow: Flow
    other: Flow
    examples: tuple[Any, Any]
    proved: dict[tuple[Ends, ...], Any] = field(default_factory=dict, compare=False)

    def ends(self, target: str, source: str) -> Ends:
        """The calls of a span: from the first inside ``target`` to the last inside ``source``."""
        return Ends(self.calls_in(target)[0], self.calls_in(source)[-1])

    def calls_in(self, path: str) -> list[int]:
        """The calls of a module, or of those inside of it."""
        calls = self.flow.calls
        return [i for i, c in enumerate(calls) if c.path == path or c.path.startswith(path + ".")]


def run(model: nn.Module, example: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def run_for_real(model: nn.Module, example: Any) -> Any:
    """:func:`run`, of a model of which a copy has run with an example's shapes.

    Raises:
        AttachError: the model itself does not run with it.
    """
    try:
        return run(model, example)
    except Refusal:  # of what watches the pass
        raise
    except Exception as error:
        raise _runs_with_nothing(model, [_reason(error)]) from error


def survey(model: nn.Module, backbone: Backbone, stages: Sequence[Stage], ends: Sequence[str]) -> Survey:
    """Look at two passes of a model, on the meta device if it runs there, else for real.

    Args:
        model: the model.
        backbone: knows its inputs.
        stages: its stages.
        ends: paths that spans were named with; what holds them is opened, to see its children.

    Raises:
        AttachError: the model runs with no example.
    """
    paths = [stage.name for stage in stages]
    errors: list[str] = []
    proved = not any(parameter.is_meta for parameter in model.parameters())
    for inputs in backbone.examples(model, BATCHES):
        for stand_in in _stand_ins(model):
            nodes = candidates(stand_in, paths, ends)
            device = None if stand_in is model else "meta"
            try:
                flows = [_follow(stand_in, nodes, value, device, proved) for value in inputs]
            except Exception as error:  # whatever the model trips over: a size, a device
                errors.append(_reason(error))
                continue
            real = {path: model.get_submodule(path) for path in nodes}
            for call in (call for flow in flows for call in flow.calls):
                call.module = real[call.path]
            return Survey(real, flows[0], flows[1], (inputs[0], inputs[1]))
    raise _runs_with_nothing(model, errors)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _runs_with_nothing(model: nn.Module, errors: Sequence[str]) -> AttachError:
    reasons = "; ".join(dict.fromkeys(errors)) or "the backbone adapter has none"
    return AttachError(
        f"This {type(model).__name__} runs with no example input, so that nothing is known of its stages: "
        f"{reasons}. Make the plain model and give attach an input that it runs with: "
        "tw.attach(model, example=x)."
    )


def _stand_ins(model: nn.Module) -> Iterator[nn.Module]:
    real = any(value.device.type != "meta" for value in (*model.parameters(), *model.buffers()))
    if not real and any(True for _ in model.parameters()):
        yield model
        return
    try:
        copied = shadow(model)
    except Exception:  # something in it cannot be copied; it is looked at itself then
        yield model
        return
    yield copied
    yield model


def _follow(
    model: nn.Module, nodes: Mapping[str, nn.Module], value: Any, device: str | None, proved: bool
) -> Flow:
    def moved(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) and device else leaf

    given = rebuild(value, moved)
    batch = next(leaf.shape[0] for leaf in leaves(value) if isinstance(leaf, Tensor))
    with torch.device(device) if device else torch.device(torch.get_default_device()):
        return follow(lambda: run(model, given), model, nodes, batch, proved)


def grouped(ends: Sequence[Ends]) -> list[list[int]]:
    """Which wormholes are solved together: those whose calls overlap, directly or by way of others.

    Returns:
        Lists of positions in ``ends``, the groups in the order of their calls.
    """
    groups: list[tuple[int, int, list[int]]] = []
    for place in sorted(range(len(ends)), key=lambda i: (ends[i].target, ends[i].source)):
        end = ends[place]
        if groups and end.target <= groups[-1][1]:
            first, last, members = groups[-1]
            groups[-1] = (first, max(last, end.source), [*members, place])
        else:
            groups.append((end.target, end.source, [place]))
    return [sorted(members) for _, _, members in groups]
