"""What was chosen in the last forward pass, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..blocks import Report, SpanRecord
from ..policies.selection import Selection

__all__ = ["Decision", "SelectionRecord", "SelectionReport"]


@dataclass
class Decision:
    """One decision of the samples that still had one.

    Attributes:
        index: (b,) their places in the batch.
        selection: what the policy answered, with its graph in training.
        spent: (b,) what they had spent before it, as a share of the network's cost.
        price: (b,) what it cost.
        repeats: (b,) how often in a row they had made the choice they made, this one not counted.
    """

    index: Tensor
    selection: Selection
    spent: Tensor
    price: Tensor
    repeats: Tensor


@dataclass
class SelectionRecord:
    """One forward pass of a network with a selection policy.

    Attributes:
        layers: names of the N layers that can be iterated.
        counts: (B, N) how often each sample iterated each layer.
        steps: (B, N) evaluations of the layer that the sample's solves took.
        status: (B, N) integers of :class:`~twnn_plugin.types.Status` of its last solve; converged where
            there was none.
        residual: (B, N) likewise; 0 where there was none.
        spent: (B,) multiply-adds spent after the open-loop pass, as a share of the network's: solver steps
            times the layer's cost, and the layers that were computed again.
        rows: for each layer and, last, the head: rows evaluated after the open-loop pass, those of
            differentiated evaluations included.
        multiply_adds: executed after the open-loop pass, all rows together.
        open_loop: multiply-adds of the network for one sample.
        first: (B, K) the open-loop prediction.
        closed: the same with its graph in training, for the loss of the closed path.
        fallback: (B, N) bool, true where a solve failed and the layer's open-loop output was kept.
        evaluations: for each of the N, rows evaluated by its solves.
        solved: for each, multiply-adds executed by these.
        decisions: one after the other.
    """

    layers: tuple[str, ...]
    counts: Tensor
    steps: Tensor
    status: Tensor
    residual: Tensor
    spent: Tensor
    rows: tuple[int, ...]
    multiply_adds: int
    open_loop: int
    first: Tensor
    closed: Tensor = field(repr=False)
    fallback: Tensor
    evaluations: tuple[int, ...]
    solved: tuple[int, ...]
    decisions: list[Decision] = field(default_factory=list, repr=False)

    @property
    def iterated(self) -> Tensor:
        """(B,) bool: samples that iterated any layer."""
        return self.counts.sum(dim=1) > 0

    def shares(self) -> dict[str, float]:
        """How often each choice was made among all, ``"nop"`` first; they sum to 1 if one layer is picked."""
        total = sum(d.index.numel() for d in self.decisions)
        picked = torch.zeros(len(self.layers), device="cpu")
        nop = 0
        for decision in self.decisions:
            chosen = decision.selection.layers
            picked += chosen.sum(dim=0).cpu()
            nop += int((~chosen.any(dim=1)).sum())
        shares = (picked / max(total, 1)).tolist()
        return {"nop": nop / max(total, 1), **dict(zip(self.layers, shares, strict=True))}

    def __str__(self) -> str:
        shares = self.shares()
        head = ("choice", "share", "samples", "steps mean/max", "rows")
        lines = [("nop", f"{100 * shares['nop']:.1f} %", "", "", "")]
        for place, name in enumerate(self.layers):
            mine = self.counts[:, place] > 0
            steps = self.steps[mine, place].float()
            shown = f"{float(steps.mean()):.1f}/{int(steps.max())}" if steps.numel() else "-"
            lines.append(
                (name, f"{100 * shares[name]:.1f} %", str(int(mine.sum())), shown, str(self.rows[place]))
            )
        widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
        table = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *lines)
        ]
        lost = int(self.fallback.any(dim=1).sum())
        if lost:
            table.append(f"samples that kept an open-loop value, as a solve failed: {lost}")
        batch = max(self.counts.shape[0], 1)
        extra = self.multiply_adds / batch / max(self.open_loop, 1)
        table.append(f"multiply-adds a sample: {1 + extra:.2f} times the open-loop pass")
        return "\n".join([table[0], "-" * len(table[0]), *table[1:]])

    def spans(self) -> list[SpanRecord]:
        """The same as one record for each layer's self-loop."""
        opened = self.counts.to(torch.float32)
        return [
            SpanRecord(
                f"{name}->{name}",
                opened[:, place].clamp(max=1),
                opened[:, place].clamp(max=1),
                self.status[:, place],
                self.steps[:, place],
                self.residual[:, place],
                self.fallback[:, place],
                self.evaluations[place],
                self.solved[place],
            )
            for place, name in enumerate(self.layers)
        ]


class SelectionReport(Report):
    """One :class:`~twnn_plugin.blocks.SpanRecord` for each layer that can be iterated; empty before a pass.

    Attributes:
        selection: the whole record, with every decision; None before a pass.
    """

    def __init__(self, selection: SelectionRecord | None):
        super().__init__([] if selection is None else selection.spans())
        self.selection = selection

    def __str__(self) -> str:
        return super().__str__() if self.selection is None else str(self.selection)
