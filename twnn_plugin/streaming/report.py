"""What happened in a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..blocks import Report, SpanRecord

__all__ = ["StreamReport", "joined"]


@dataclass
class StreamReport:
    """A stream so far; complete when its last output was taken.

    Attributes:
        batches: passes that have ended.
        samples: samples in them.
        capacity: rows that the active batch of a solve holds at most; 0 before the first batch.
        peak_in_flight: passes that were under way, or waited for their turn to be put out, at most.
        evaluations: evaluations of the functions that were solved for, each for many rows at once.
        rows: rows in these evaluations, those included that were done and had not left yet.
        alive: of these rows those that were not done.
        fill: rows that were not done, at each evaluation; empty if ``records=False`` was said.
        solves: solves whose rows could share a batch with those of other passes.
        shared: of these, those for which others were there. Few of many: the map is another one in each
            pass, or ``in_flight`` is 1.
        alone: further solves, made on the spot in a batch of their own, by the reason why.
        spans: a record for each wormhole, over all samples in their order; empty if the model has none or
            ``records=False`` was said.
    """

    batches: int = 0
    samples: int = 0
    capacity: int = 0
    peak_in_flight: int = 0
    evaluations: int = 0
    rows: int = 0
    alive: int = 0
    fill: list[int] = field(default_factory=list, repr=False)
    solves: int = 0
    shared: int = 0
    alone: dict[str, int] = field(default_factory=dict)
    spans: Report = field(default_factory=Report, repr=False)

    @property
    def mean_fill(self) -> float:
        """Mean share of the active batch's places with a row that was not done; NaN without evaluations."""
        places = self.capacity * self.evaluations
        return self.alive / places if places else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{self.samples} samples in {self.batches} batches, up to {self.peak_in_flight} in flight; "
            f"{self.solves} solves, {self.shared} of them in company, took {self.evaluations} evaluations of "
            f"{self.rows} rows",
        ]
        if self.evaluations:
            lines.append(f"mean fill {100 * self.mean_fill:.1f} % of {self.capacity} rows")
        lines += [f"{count} solves alone: {reason}" for reason, count in self.alone.items()]
        return "\n".join([*lines, str(self.spans)] if self.spans else lines)


def joined(records: Sequence[SpanRecord]) -> SpanRecord:
    """The records of one span in several batches as one."""
    columns: dict[str, Any] = {}
    for entry in fields(SpanRecord):
        values = [getattr(record, entry.name) for record in records]
        if isinstance(values[0], Tensor) and entry.name != "solved":
            columns[entry.name] = torch.cat(values)
    columns["solved"] = _solved(records)
    evaluations = sum(record.evaluations for record in records)
    counted = next((r for r in records if r.evaluations and r.multiply_adds), None)
    each = counted.multiply_adds // counted.evaluations if counted is not None else 0
    return replace(
        records[0], **columns, evaluations=evaluations, multiply_adds=evaluations * each, reports=[]
    )


def _solved(records: Sequence[SpanRecord]) -> Tensor | None:
    """The places of the rows that were handed to a solve, counted from the first batch's first row."""
    if all(record.solved is None for record in records):
        return None
    places, before = [], 0
    for record in records:
        rows = record.gate.shape[0]
        own = torch.arange(rows, device=record.gate.device) if record.solved is None else record.solved
        places.append(own + before)
        before += rows
    return torch.cat(places)
