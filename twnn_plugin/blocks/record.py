"""What happened at one span in the last forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import transforms
from ..types import AdjointReport, Status

__all__ = ["Report", "Rest", "SpanRecord", "per_row"]


@dataclass
class SpanRecord:
    """One span's last forward pass.

    Attributes:
        span: its name, such as ``"layer4->layer3"``.
        gate: (B,) the factor on the message that was in force; 0 is closed.
        probability: (B,) what the gate thought, before threshold and policy.
        status: (B,) integers of :class:`~twnn_plugin.types.Status`; closed rows are converged.
        steps: (B,) replays of the span spent on the row by the solver; 0 for closed rows.
        residual: (B,) last measured residual; 0 for closed rows.
        fallback: (B,) bool, true where the solve failed and the open-loop value was used instead.
        evaluations: rows replayed in all, those of the differentiated evaluation included.
        multiply_adds: multiply-adds executed by these replays (the open-loop pass not counted).
        adjoint: how the backward solve ended, once it ran; rows that nothing was solved for are converged.
        group: for wormholes that are solved together with others, the span whose record has the group's
            evaluations and multiply-adds; None: this one has its own.
        mode: how the span is evaluated: ``"replay"``, or ``"rerun"`` where the model's forward is run again;
            empty where there is no such choice.
        solved: (b,) places of the rows that were handed to the solve; None: all were.
    """

    span: str
    gate: Tensor
    probability: Tensor
    status: Tensor
    steps: Tensor
    residual: Tensor
    fallback: Tensor
    evaluations: int
    multiply_adds: int = 0
    reports: list[AdjointReport] = field(default_factory=list, repr=False)
    group: str | None = None
    mode: str = ""
    solved: Tensor | None = field(default=None, repr=False)

    def outlasting(self) -> SpanRecord | None:
        """Itself, with the plain values of what ``torch.func`` has wrapped; None under ``vmap``.

        What a transform has made means nothing once it is done, and could not be copied or saved.
        """
        plain: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if transforms.wraps(value):
                found = transforms.value_of(value)
                if found is None:
                    return None
                plain[name] = found
        return replace(self, **plain) if plain else self

    @property
    def adjoint(self) -> AdjointReport | None:
        if not self.reports or self.solved is None:
            return self.reports[-1] if self.reports else None
        found, rows = self.reports[-1], self.solved
        status = torch.full_like(self.status, int(Status.converged)).index_copy(0, rows, found.status)
        steps = torch.zeros_like(self.steps).index_copy(0, rows, found.steps)
        residual = found.residual.new_zeros(status.shape).index_copy(0, rows, found.residual)
        return replace(found, status=status, steps=steps, residual=residual)

    @property
    def open(self) -> Tensor:
        """(B,) bool: rows that were iterated."""
        return self.gate > 0


class Rest(NamedTuple):
    """A pass in which no row was open; its record is made when somebody asks for it.

    Attributes:
        span: as in the record.
        probability: gives the gate's (B,) or (B, C) probabilities.
        group: as in the record.
        mode: as in the record.
    """

    span: str
    probability: Callable[[], Tensor]
    group: str | None
    mode: str

    def record(self) -> SpanRecord:
        """The record."""
        probability = per_row(self.probability())
        zeros = torch.zeros_like(probability)
        status = torch.full(zeros.shape, int(Status.converged), device=zeros.device)
        residual = torch.zeros(zeros.shape, device=zeros.device)
        steps, fallback = torch.zeros_like(status), torch.zeros_like(status, dtype=torch.bool)
        return SpanRecord(
            self.span,
            zeros,
            probability,
            status,
            steps,
            residual,
            fallback,
            evaluations=0,
            group=self.group,
            mode=self.mode,
            solved=status.new_zeros(0),
        )


def per_row(amount: Tensor) -> Tensor:
    """(B,) of (B,) or, of gates that look at each channel, the mean of (B, C)."""
    return amount if amount.dim() == 1 else amount.mean(dim=1)


class Report(list[SpanRecord]):
    """Records of all spans; prints as a table."""

    def __str__(self) -> str:
        head = ("span", "mode", "rows", "open", "converged", "steps mean/max", "evaluations", "multiply-adds")
        rows = [head, *(self._row(record) for record in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    @staticmethod
    def _row(record: SpanRecord) -> tuple[str, ...]:
        opened = record.open
        count = int(opened.sum())
        total = max(opened.numel(), 1)
        if count:
            good = int((record.status[opened] == int(Status.converged)).sum())
            steps = record.steps[opened].to(torch.float32)
            shown = (f"{good}/{count}", f"{float(steps.mean()):.1f}/{int(steps.max())}")
        else:
            shown = ("-", "-")
        return (
            record.span,
            record.mode or "-",
            str(opened.numel()),
            f"{100 * count / total:.1f} %",
            *shown,
            str(record.evaluations),
            f"{record.multiply_adds:,}",
        )
