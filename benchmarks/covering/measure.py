"""Which spans of an architecture can be iterated, and whether a closed one is the plain network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin import AttachError
from twnn_plugin.backbones.base import Stage
from twnn_plugin.backbones.plan import Refusal, plan
from twnn_plugin.backbones.rerun import rerun
from twnn_plugin.backbones.span import asleep
from twnn_plugin.backbones.spec import auto
from twnn_plugin.backbones.survey import Survey, survey
from twnn_plugin.backbones.timm_adapter import TimmBackbone
from twnn_plugin.backbones.wiring import wire
from twnn_plugin.modes import evaluating
from twnn_plugin.trees import leaves

__all__ = ["KINDS", "architectures", "classify", "prove"]

KINDS = ("rule", "shorter chain", "within one stage", "fallback", "refused")
"""How a cross-stage wormhole is had: by replay of the whole span; of a part of it over two stages or more; of
one stage alone; by running the forward again; or not at all."""


def architectures() -> dict[str, list[str]]:
    """timm's own architectures by the file that they are in."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith("timm."):
            found.setdefault(module.rpartition(".")[2], []).append(name)
    return found


def classify(name: str) -> dict[str, Any]:
    """Look at an architecture on the meta device, where it has shapes and a dataflow but no values.

    Returns:
        ``kind``, one of :data:`KINDS`, for the span from the second stage's input to the last stage's output;
        ``span`` that is iterated and ``reason`` why it is not the wanted one; ``fallback``: whether the
        wanted one can be had by running the forward again; ``auto``: what ``wormholes="auto"`` is.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # of the models' own
        model = timm.create_model(name).eval()
    backbone = TimmBackbone()
    stages = backbone.stages(model)
    with evaluating(model):
        seen = survey(model, backbone, stages, ())
        if len(_called(seen, stages)) < 2:  # the stages end inside of blocks
            seen = survey(model, backbone, stages, [stage.name for stage in stages])
        names = _called(seen, stages)
        sensible = next((str(s) for s in auto(stages) if _refused(seen, s.source, s.target) is None), "")
        if len(names) < 2:
            return {
                "kind": "refused",
                "span": "",
                "reason": "fewer than two stages are known",
                "fallback": False,
            }
        return {**_cross_stage(model, seen, names), "auto": sensible}


def _called(seen: Survey, stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages if seen.calls_in(stage.name)]


def _cross_stage(model: nn.Module, seen: Survey, names: Sequence[str]) -> dict[str, Any]:
    source, target = names[-1], names[1]
    reason = _refused(seen, source, target)
    found = {"span": f"{source}->{target}", "reason": reason or "", "fallback": True}
    if reason is None:
        return {"kind": "rule", **found}
    try:
        rerun(model, seen, [seen.ends(target, source)])
    except Refusal as refusal:
        found["fallback"] = False
        found["reason"] += f" Nor by running the forward again: {refusal}"
    for kind, spans in (
        ("shorter chain", _chains(names)),
        ("within one stage", ((n, n) for n in names[::-1])),
    ):
        for a, b in spans:
            if _refused(seen, a, b) is None:
                return {"kind": kind, **found, "span": f"{a}->{b}"}
    return {"kind": "fallback" if found["fallback"] else "refused", **found}


def _chains(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Spans of two stages or more behind the first stage, the longest first."""
    for length in range(len(names) - 2, 1, -1):
        for first in range(len(names) - length, 0, -1):
            yield names[first + length - 1], names[first]


def _refused(seen: Survey, source: str, target: str) -> str | None:
    """Why a span cannot be replayed; None: it can."""
    if not (seen.calls_in(source) and seen.calls_in(target)):
        return "a stage is never called."
    try:
        wire(seen.flow, seen.other, plan(seen.flow, seen.other, [seen.ends(target, source)]))
    except Refusal as refusal:
        return str(refusal)
    return None


_TINY = 1e-3
_SCALE = 1e-2


def prove(name: str, seed: int) -> dict[str, Any]:
    """Attach the cross-stage wormhole to an architecture for real, and compare it with the plain network.

    Returns:
        ``span``: which one; ``mode``: ``"replay"`` or ``"rerun"``; ``identical``: whether the closed one's
        output is the plain network's to the bit; ``keys``: whether its state dict has the plain one's keys;
        ``moved``: by how much, relative to its norm, a message of scale 0.01 moves the output with the gate
        open; ``finite``: whether that output is; ``settled``: whether every sample did, since others keep
        the open-loop value.
    """
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    backbone = TimmBackbone()
    with evaluating(model):
        known = backbone.stages(model)
        stages = _called(survey(model, backbone, known, ()), known)
    stages = stages if len(stages) > 1 else [stage.name for stage in known]
    images = _images(model, backbone)
    images = torch.randn(2, *images.shape[1:])
    _enliven(model, images)
    before = [key for key in model.state_dict()]
    try:
        tw.attach(model, wormholes=f"{stages[-1]}->{stages[1]}", scale=_SCALE)
    except AttachError:  # where both are one module, the other stage is the first
        tw.attach(model, wormholes=f"{stages[-1]}->{stages[0]}", scale=_SCALE)
    (span,) = tw.spans(model)
    with torch.no_grad():
        with asleep(model):
            plain = _flat(model(images))
        closed = _flat(model(images))
        tw.configure(model, policy="always", tol=1e-4, max_iter=100)
        opened = _flat(model(images))
        settled = bool((tw.report(model)[0].status == tw.Status.converged).all())
    kept = [key for key in model.state_dict() if not key.startswith("wormholes.")] == before
    return {
        "span": span.span,
        "mode": span.mode,
        "identical": torch.equal(plain, closed),
        "keys": kept,
        "moved": float((opened - plain).norm() / plain.norm().clamp_min(1e-12)),
        "finite": bool(torch.isfinite(opened).all()),
        "settled": settled,
    }


def _enliven(model: nn.Module, images: Tensor) -> None:
    """Let signals through an untrained network, as a trained one does, so that a wormhole can be seen to act.

    Fresh batch normalisation divides by 1 whatever the activations are, layer scales begin near 0, and many
    classifiers at 0: after twenty layers nothing is left that the logits would show.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and float(parameter.abs().max()) <= _TINY:
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)
                elif float(parameter.min()) > 0:  # a layer scale; biases are 0
                    parameter.fill_(0.1)
    kept = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        with torch.no_grad(), asleep(model):
            model(images)
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.eval()
            norm.momentum = momentum


def _images(model: nn.Module, backbone: TimmBackbone) -> Tensor:
    """The smallest images that the model takes."""
    for images, *_ in backbone.examples(model, (2,)):
        try:
            with torch.no_grad(), asleep(model):
                model(images)
        except Exception:  # too small for it
            continue
        return images
    raise RuntimeError("The model takes no image.")


def _flat(value: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves(value) if isinstance(leaf, Tensor)])
