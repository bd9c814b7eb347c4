"""Models with wormholes in a form without a loop that depends on the data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks import Feedback, GroupReplay, SpanRecord
from ...blocks.choice import Choice
from ...blocks.one_map import Frozen
from ...blocks.record import per_row
from ...blocks.settle import note_shapes, settle
from ...errors import AttachError, OptionError
from ...solvers import Control, Outcome, Problem, WholeSolver
from ...types import Status
from ..span import settling, spans

__all__ = ["Steps", "Unrolled", "export", "unrolled"]


@dataclass(frozen=True)
class _Exactly(WholeSolver):
    """A fixed number of iterations, as a solver: for training, where all that a solve does is wanted.

    Args:
        steps: iterations.
        damping: 1 is the plain iteration.
    """

    steps: int
    damping: float

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        """Solve from (B, D) states; converged are the rows that the last step moved by at most ``tol``."""
        before = new = z
        for _ in range(self.steps):
            before, new = z, problem.evaluate(z)
            z = before + self.damping * (new - before)
        residual = _moved(before, new)
        status = torch.where(residual <= control.tol, int(Status.converged), int(Status.max_iter))
        finite = torch.isfinite(z.detach()).all(dim=1)
        status = torch.where(finite, status, int(Status.non_finite))
        return Outcome(z, status, torch.full_like(status, self.steps), residual)


class Steps:
    """Settles by a fixed number of iterations ``z <- z + damping * (F(z) - z)``, for every row alike.

    Takes the place of :func:`twnn_plugin.blocks.settle`, records included. The gate is a mask: rows of closed
    wormholes are computed and then replaced by their open-loop value, and so are rows that became NaN or
    infinite. In training, with gradients, it is a solve like any other, by these iterations and
    differentiated through them: gates learn, penalties and the closed head have what they need.

    Args:
        steps: iterations.
        damping: 1 is the plain iteration.
    """

    def __init__(self, steps: int, damping: float):
        self.steps, self.damping = steps, damping
        self.solver = _Exactly(steps, damping)

    def __call__(
        self,
        parts: Sequence[Feedback],
        entries: Sequence[Tensor],
        outs: Sequence[Tensor],
        replay: GroupReplay,
        constants: Sequence[Tensor] = (),
        frozen: Frozen | None = None,
        entry: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if parts[0].training and torch.is_grad_enabled():
            settings = parts[0].settings.changed(solver=self.solver, adjoint="unrolled")
            return settle(parts, entries, outs, replay, constants, frozen, entry, settings)
        choices = [part.choose(out) for part, out in zip(parts, outs, strict=True)]
        weights = [part.message.weight() for part in parts]
        start = entries[0] if entry is None else entry
        if not torch.compiler.is_compiling():  # nobody asks an exported program
            note_shapes(parts, entries, outs, constants, start)
        state = new = tuple(outs)
        for _ in range(self.steps):
            signals = tuple(
                part.message.scaled(part.message(z, into.shape, weight), choice.amount).to(into.dtype)
                for part, z, into, weight, choice in zip(parts, state, entries, weights, choices, strict=True)
            )
            with nullcontext() if frozen is None else frozen.replay(None):
                new = replay(start, signals, *constants)
            before = state
            state = tuple(z + self.damping * (n - z) for z, n in zip(before, new, strict=True))
        opened = choices[0].opened
        for choice in choices[1:]:
            opened = opened | choice.opened
        finite = torch.stack([torch.isfinite(z).flatten(1).all(dim=1) for z in state]).all(dim=0)
        kept = opened & finite
        self._note(parts, choices, opened, finite, [_moved(z, n) for z, n in zip(before, new, strict=True)])
        return tuple(torch.where(_aligned(kept, z), z, out) for z, out in zip(state, outs, strict=True))

    def _note(
        self,
        parts: Sequence[Feedback],
        choices: Sequence[Choice],
        opened: Tensor,
        finite: Tensor,
        moved: Sequence[Tensor],
    ) -> None:
        """Tell how far from its solution each row was at the last step."""
        residual = torch.where(opened, torch.stack(list(moved)).amax(dim=0), 0.0)
        status = torch.where(residual <= parts[0].settings.tol, int(Status.converged), int(Status.max_iter))
        status = torch.where(finite, status, int(Status.non_finite))
        for place, (part, choice) in enumerate(zip(parts, choices, strict=True)):
            record = part.last = SpanRecord(
                part.span,
                per_row(choice.amount.detach()),
                per_row(choice.probability.detach()),
                torch.where(opened, status, int(Status.converged)),
                opened.to(torch.long) * self.steps,
                residual,
                opened & ~finite,
                self.steps * opened.shape[0] if place == 0 else 0,
                group=None if place == 0 else parts[0].span,
                mode=part.mode,
            )
            if part.companion is not None:
                part.companion.note(record)  # part.last may be another thread's by now


def _aligned(rows: Tensor, value: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (value.dim() - 1))


def _moved(z: Tensor, new: Tensor) -> Tensor:
    """(B,) ``||F(z) - z|| / ||F(z)||``."""
    change, size = ((v.detach().flatten(1).float().norm(dim=1)) for v in (new - z, new))
    return change / (size + 1e-9)


class Unrolled(nn.Module):
    """A model with wormholes that takes a fixed number of steps instead of solving; see :func:`unrolled`.

    Args:
        model: the model, which is a child of this module: the weights are shared.
        steps: iterations of each span.
        damping: of the iteration.
    """

    def __init__(self, model: nn.Module, steps: int, damping: float = 1.0):
        super().__init__()
        self.model = model
        self.how = Steps(steps, damping)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, its spans iterated ``steps`` times."""
        with settling(self.model, self.how):
            return self.model(*args, **kwargs)


def unrolled(model: nn.Module, steps: int = 5, damping: float = 1.0) -> Unrolled:
    """A form of a model with wormholes in which every span takes exactly ``steps`` iterations.

    For ``torch.export``, ``torch.compile(fullgraph=True)`` and devices without a host that could watch a
    solve: no branch depends on a value. Every row is iterated and the gate decides, as a mask, which ones
    are used, so that closed rows are the plain network to the bit. As the steps grow, the outputs tend
    to the solved ones wherever the plain (damped) iteration converges; nothing looks whether it does, so
    compare with :func:`twnn_plugin.report` of the solved model first.

    In train mode it trains as the model does (gates, ``opening``, ``budget``, ``jacobian``, the closed
    head), with the gradients of the iterations. Closed rows are then not iterated, and a compiled graph is
    left for it, as it is for a solve.

    Args:
        model: a model with wormholes; it stays usable as it is, and shares its weights.
        steps: iterations of each span, >= 1.
        damping: in (0, 1]; below 1 where the plain iteration would oscillate.

    Returns:
        A module with the model's signature, in the model's mode (train or eval).

    Raises:
        AttachError: the model has no wormholes.
        OptionError: ``steps`` or ``damping`` is out of range.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps is a whole number of iterations, at least 1; got {steps!r}.")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping <= 1:
        raise OptionError(f"damping is a number in (0, 1]; got {damping!r}.")
    if not spans(model):
        raise AttachError(
            f"This {type(model).__name__} has no wormholes to unroll. Attach some with tw.attach, or give "
            "torch.export the model itself."
        )
    return Unrolled(model, steps, float(damping)).train(model.training)


def export(
    model: nn.Module, example: Tensor, steps: int = 5, damping: float = 1.0
) -> torch.export.ExportedProgram:
    """Export a model with wormholes for inference, with ``torch.export``, for any batch size.

    Args:
        model: a model with wormholes, in eval mode.
        example: (B, ...) an input with B >= 2; all its sizes but the batch are fixed in the program.
        steps: see :func:`unrolled`.
        damping: likewise.

    Returns:
        The program; save it with ``torch.export.save``, run it with ``program.module()(images)``.

    Raises:
        AttachError: the model has no wormholes, or one whose span has mode ``"rerun"`` or has lost a module.
        OptionError: it is in training mode, the example has fewer than two rows, or an option is out of
            range.
    """
    module = unrolled(model, steps, damping)
    if model.training:
        raise OptionError("export takes a model in eval mode; call model.eval() first.")
    for span in spans(model):
        if span.group.look is not None:
            span.group.look()
        if span.mode == "rerun":
            raise AttachError(
                f"Span {span.span!r} is evaluated by running the model's forward again, which torch.export "
                "cannot follow. Choose a span whose modules can be replayed: attach with fallback=False."
            )
    if example.dim() == 0 or example.shape[0] < 2:
        raise OptionError(
            "The example needs at least two rows, or the program would be fixed to its batch size; got shape "
            f"{tuple(example.shape)}."
        )
    shapes = {"args": ({0: torch.export.Dim("batch", min=1)},)}
    with torch.no_grad(), _untouched(model):
        return torch.export.export(module, (example,), dynamic_shapes=shapes)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Within this, wormholes may note what they like (records, scores): tracing leaves no values there."""
    kept = [(part, dict(vars(part))) for span in spans(model) for part in span.modules()]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assigned during export", UserWarning)
            yield
    finally:
        for part, before in kept:
            vars(part).update(before)
