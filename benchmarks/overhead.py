"""``overhead``: what a wormhole costs where it is closed, and what one replay costs where it is open.

``closed``: the forward of a timm model in eval mode with a closed wormhole against the plain one, in seconds
and, which no machine's mood changes, in operations and in the times that the host waits for a value; the
logits must be the same bits. Each architecture at its own size of image and at a small one, where fixed
costs show, one image at a time and many; a second plain model in the same rounds shows what is chance.
``open``: one replay of the span against its modules called one by one, one evaluation of the solved map (the
replay with its message) likewise, and the multiply-adds that ``tw.report`` says against a count in the
layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw

from .harness import (
    Benchmark,
    Cell,
    Claim,
    Settings,
    Stopwatch,
    Table,
    interleave,
    ratio_of,
    register,
    spread_of,
)
from .wormhole_cost import pages
from .wormhole_cost.operations import operations
from .wormhole_cost.spans import Span, counted_multiply_adds, span_of

__all__ = ["Overhead"]

SMALL = 64
MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": SMALL},
    "mobilenetv3_small_100": {},
}
"""Architectures, and their options for images of ``SMALL`` pixels a side."""
BATCHES = (1, 32)


class Overhead(Benchmark):
    """Closed wormholes against the plain forward; open ones against the modules of their span."""

    name = "overhead"
    question = "What does a closed wormhole cost, and what does a replay cost beside its span?"
    one_seed = "draws its weights and images once"

    def cells(self, settings: Settings) -> list[Cell]:
        found = [
            Cell(
                f"{kind}/{model}/{side}px/batch{batch}",
                {"kind": kind, "model": model, "side": side, "batch": batch, "seed": settings.seeds[0]},
            )
            for kind in ("closed", "open")
            for model in MODELS
            for side in (SMALL, _usual(model))
            for batch in BATCHES
        ]
        return (
            [c for c in found if c.options["side"] == SMALL and c.options["batch"] == 1]
            if settings.quick
            else found
        )

    def run_cell(self, cell: Cell, settings: Settings) -> dict[str, Any]:
        options = cell.options
        torch.manual_seed(options["seed"])
        small = MODELS[options["model"]] if options["side"] == SMALL else {}
        model = timm.create_model(options["model"], num_classes=10, **small).eval().to(settings.device)
        images = torch.randn(options["batch"], 3, options["side"], options["side"]).to(settings.device)
        plain, attached = _twin(model), tw.attach(_twin(model), "auto").eval().to(settings.device)
        budget = (0.5 if settings.quick else 15.0) * settings.budget
        measure = self._closed if options["kind"] == "closed" else self._open
        return measure(plain, attached, images, settings, budget)

    @staticmethod
    def _closed(
        plain: nn.Module, attached: nn.Module, images: Tensor, settings: Settings, budget: float
    ) -> dict[str, Any]:
        with torch.no_grad():
            same = torch.equal(plain(images), attached(images))
        closed = not bool(tw.report(attached)[0].open.any())
        counted = {"plain": operations(plain, images), "closed": operations(attached, images)}
        twin = _twin(plain)
        runs = {
            "plain": lambda: plain(images),
            "closed": lambda: attached(images),
            "twin": lambda: twin(images),
        }
        return {
            "same_bits": same,
            "closed": closed,
            "operations": {name: calls for name, (calls, _) in counted.items()},
            "waits": {name: waits for name, (_, waits) in counted.items()},
            **_against("plain", runs, settings, budget),
        }

    @staticmethod
    def _open(
        plain: nn.Module, attached: nn.Module, images: Tensor, settings: Settings, budget: float
    ) -> dict[str, Any]:
        tw.configure(attached, policy="always", max_iter=5)
        with torch.no_grad():
            span: Span = span_of(plain, attached, images)
            difference = float((span.direct() - span.replay()).abs().max())
            counted = counted_multiply_adds(plain, attached, span)
        (record,) = tw.report(attached)
        each, left = divmod(record.multiply_adds, record.evaluations)  # floats are rounded in the file
        runs = {"modules": span.direct, "replay": span.replay, "evaluation": span.evaluate}
        return {
            "span": record.span,
            "difference": difference,
            "reported": each if not left else record.multiply_adds / record.evaluations,
            "counted": counted,
            **_against("modules", runs, settings, budget),
        }

    def tables(self, cells: list[dict[str, Any]]) -> list[Table]:
        return [pages.closed(cells), pages.opened(cells)]

    def plots(self, cells: list[dict[str, Any]], folder: Path) -> list[Path]:
        return [pages.plot(cells, folder / "overhead.png")]

    def claims(self, cells: list[dict[str, Any]]) -> list[Claim]:
        return pages.claims(cells)


def _twin(model: nn.Module) -> nn.Module:
    """A copy of a model that has the same weights at the same place.

    Candidates that each have weights of their own drive each other's out of the caches, and what was copied
    lies otherwise in memory than what was not: both pass for a cost of the wormhole.
    """
    return copy.deepcopy(model, {id(kept): kept for kept in (*model.parameters(), *model.buffers())})


def _usual(model: str) -> int:
    """The side of the images that an architecture is made for."""
    config = timm.get_pretrained_cfg(model)
    assert config is not None
    return config.input_size[-1]


def _against(
    base: str, runs: dict[str, Callable[[], Any]], settings: Settings, budget: float
) -> dict[str, Any]:
    """Seconds of each, and ratios to the base, round by round.

    A round takes each candidate several times, so that a round is some 20 ms and the clock's grain does not
    show.
    """
    repeats = _repeats(runs[base], settings.device)

    def timed(run: Callable[[], Any]) -> Callable[[Stopwatch], None]:
        def once(watch: Stopwatch) -> None:
            with torch.no_grad():
                for _ in range(repeats):
                    run()
            watch.lap("forward")

        return once

    laps = interleave(
        {name: timed(run) for name, run in runs.items()},
        device=settings.device,
        budget_s=budget,
        min_rounds=5,
        max_rounds=5 if settings.quick else 200,
    )
    seconds = {name: [lap["total"] / repeats if lap else None for lap in one] for name, one in laps.items()}
    return {
        "seconds": {n: spread_of([s for s in one if s is not None]).as_json() for n, one in seconds.items()},
        "ratios": {n: ratio_of(seconds[n], seconds[base]).as_json() for n in seconds if n != base},
    }


def _repeats(run: Callable[[], Any], device: str) -> int:
    watch = Stopwatch(device)
    with torch.no_grad():
        run()
        watch.start()
        run()
    watch.lap("once")
    return max(1, int(0.02 / max(watch.laps()["total"], 1e-6)))


register(Overhead())
