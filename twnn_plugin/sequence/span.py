"""One temporal wormhole: message, gate, policy and settings, and what they chose and did last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import SolveSettings, SpanRecord
from ..blocks.origin import Origin
from ..errors import OptionError
from ..gates import Budget, Gate, LearnedGate, watch_difficulty
from ..policies import Policy
from ..types import PolicyView, Solution, Status
from .message import TokenMessage
from .spec import TemporalSpec

__all__ = ["SCOPES", "Choice", "TemporalSpan", "check_budget"]

SCOPES = ("sequence", "step", "state")
"""What a gate looks at and decides for: a whole sequence, a time step, a sequence by its past."""


class Choice(NamedTuple):
    """Who receives a message, and how much of it.

    Attributes:
        opened: (B, L) bool.
        amount: (B, L) factor on the message; 0 where closed.
        probability: (B, L) what the gate learns through.
        margin: (N,) for gates that learn from difficulty, one a decision; else None.
        decided: (B, L) bool: the valid steps.
    """

    opened: Tensor
    amount: Tensor
    probability: Tensor
    margin: Tensor | None
    decided: Tensor

    @property
    def rows(self) -> Tensor:
        """(B,) bool: sequences that are iterated."""
        return self.opened.any(dim=1)


class _Asked(NamedTuple):
    """What the gate was asked once: in a pass over windows it is asked in each.

    Attributes:
        scores: (N,) of a learned gate, one a decision; else None.
        opened: (N,) bool: the decisions for which the message enters.
        penalty: the gate's own part of the loss; None: it has none.
    """

    scores: Tensor | None
    opened: Tensor
    penalty: Tensor | None


class TemporalSpan(Origin):
    """A gated connection from a recurrent layer's outputs back to an earlier layer's inputs.

    Args:
        spec: which layers, which time.
        source: features of the source's outputs.
        target: features of the target's inputs.
        gate: factory of the gate, called with ``source`` and ``target``.
        policy: who is iterated: sees one row a decision, sequences or time steps, as ``scope`` says.
        settings: how the equation is solved.
        scope: one of :data:`SCOPES`.
        scale: initial scale of the message.

    Raises:
        OptionError: a gate for each channel, or a budget that the scope excludes.
    """

    def __init__(
        self,
        spec: TemporalSpec,
        source: int,
        target: int,
        gate: Callable[[int, int], Gate],
        policy: Policy | None,
        settings: SolveSettings,
        scope: str,
        scale: float,
    ):
        super().__init__()
        self.spec, self.span, self.scope = spec, str(spec), scope
        self.message = TokenMessage(source, target, scale)
        self.gate = gate(source, target)
        self.policy = policy
        self.settings = settings
        self.check_gate()
        self.last: SpanRecord | None = None
        self._amounts: tuple[Tensor, Tensor, Tensor] | None = (
            None  # sums over steps: factor, probability, steps
        )
        self._asked: list[_Asked] = []
        self.register_load_state_dict_pre_hook(_keep_own)

    @property
    def feedback(self) -> TemporalSpan:
        """Itself: what ``tw.configure`` changes."""
        return self

    def check_gate(self) -> None:
        """Raise :class:`OptionError` if the gate has an option that temporal wormholes cannot follow."""
        gate = self.gate
        if gate.pooling != "avg":
            raise OptionError(
                f"The gate of {self.span!r} has pooling={gate.pooling!r}, and what a temporal wormhole's "
                "gate sees has no positions to take maxima over. Leave the gate's option pooling out."
            )
        if not isinstance(gate, LearnedGate):
            return
        if gate.per != "sample":
            raise OptionError(
                f"The gate of {self.span!r} has per={gate.per!r}, and a temporal wormhole takes one strength "
                "a decision. Leave the gate's option per at 'sample'."
            )
        if gate.budget is not None:
            check_budget(gate.budget, self.scope)

    def auxiliary_loss(self) -> Tensor | None:
        """The penalty of its gate in the last pass in training; None: nothing.

        Of several windows the mean, each with the weight of its decisions.
        """
        terms = [(a.penalty, a.opened.numel()) for a in self._asked if a.penalty is not None]
        if not terms or not self.training:
            return None
        whole = max(sum(count for _, count in terms), 1)
        weighted = [penalty * (count / whole) for penalty, count in terms]
        return sum(weighted[1:], weighted[0])

    def decisions(self) -> tuple[Tensor, Tensor]:
        """(N,) scores of a learned gate in the last pass, and (N,) bool, where the message entered.

        One a decision, window after window; (0,) before the first pass, and scores of a gate that has none.
        """
        scores = [asked.scores for asked in self._asked if asked.scores is not None]
        opened = [asked.opened for asked in self._asked] or [torch.empty(0, dtype=torch.bool, device="cpu")]
        return torch.cat(scores) if scores else torch.empty(0, device="cpu"), torch.cat(opened)

    def choose(self, out: Tensor, valid: Tensor, before: Tensor) -> Choice:
        """Ask the gate and the policy.

        Args:
            out: (B, L, H) the source's open-loop outputs.
            valid: (B, L) bool.
            before: (B, H) the source's state before the first step.
        """
        features = self._features(out.detach(), valid, before.detach())
        with torch.autocast(out.device.type, enabled=False):
            opinion = self.gate(features)
        view = PolicyView(self.span, features, opinion.probability.detach(), opinion.open)
        wanted = opinion.open if self.policy is None else self.policy(view)
        if wanted.shape != opinion.open.shape or wanted.dtype != torch.bool:
            raise OptionError(
                f"Policy {type(self.policy).__name__} must return {tuple(opinion.open.shape)} booleans; it "
                f"returned {tuple(wanted.shape)} of {wanted.dtype}."
            )
        if opinion.strength.dim() != 1:
            raise OptionError(
                f"The gate of {self.span!r} gives {tuple(opinion.strength.shape)} strengths: a temporal "
                "wormhole takes one a decision. Leave the gate's option per at 'sample'."
            )
        opened = wanted & (opinion.strength.detach() > 0)
        scores = self.gate.scores if isinstance(self.gate, LearnedGate) else None
        self._asked.append(_Asked(scores, opened, self.gate.penalty()))
        amount = torch.where(opened, opinion.strength, 0.0)
        opened = self._spread(opened, valid, False)
        amount = self._spread(amount, valid, 0.0)
        probability = self._spread(opinion.probability, valid, 0.0)
        return Choice(opened, amount, probability, opinion.margin, valid)

    def _features(self, out: Tensor, valid: Tensor, before: Tensor) -> Tensor:
        """(N, H) what the gate and the policy see, one row a decision."""
        dtype = next((p.dtype for p in self.gate.parameters()), torch.float32)
        if self.scope == "state":
            found = before
        elif self.scope == "step":
            found = out[valid]
        else:
            total = torch.where(valid[..., None], out, 0.0).sum(dim=1)
            found = total / valid.sum(dim=1, keepdim=True).clamp_min(1)
        found = found.to(dtype)
        # A broken sample must not reach the gate's weights: zero times NaN is NaN.
        return torch.where(torch.isfinite(found).all(dim=1, keepdim=True), found, 0.0)

    def _spread(self, decisions: Tensor, valid: Tensor, closed: float | bool) -> Tensor:
        """(N,) decisions as (B, L), ``closed`` at padded steps."""
        empty = decisions.new_full(valid.shape, closed)
        if self.scope == "step":
            return empty.masked_scatter(valid, decisions)
        return torch.where(valid, decisions[:, None], empty)

    def taught(self, out: Tensor, choice: Choice) -> Tensor:
        """``out`` unchanged; in the backward pass a gate with a margin learns which rows are hard."""
        if choice.margin is None or not choice.margin.numel():
            return out
        share = self.gate.share()
        if self.scope != "step":
            return watch_difficulty(out, choice.margin, share)
        steps = watch_difficulty(out[choice.decided], choice.margin, share)
        return out.masked_scatter(choice.decided[..., None], steps)

    def begin(self) -> None:
        """Forget the last forward pass."""
        self.last, self._amounts, self._asked = None, None, []

    def note_explicit(self, choice: Choice, rows: Tensor, each: int) -> None:
        """Add a pass whose messages were known beforehand: one step for each of the sequences ``rows``.

        ``each``: its multiply-adds for one sequence; 0 where another wormhole counts the pass.
        """
        steps = rows.long()
        residual = torch.zeros(rows.shape, device=rows.device)
        status = torch.full_like(steps, int(Status.converged))
        solution = Solution(None, status, steps, residual, int(steps.sum()) if each else 0)
        self.note(choice, solution, torch.arange(rows.numel(), device=rows.device), False, each)

    def note(
        self, choice: Choice, solution: Solution | None, rows: Tensor, falls_back: bool, each: int
    ) -> None:
        """Add a solve to the record of this forward pass.

        Args:
            choice: what was chosen.
            solution: of the sequences ``rows``, or None where nothing was solved.
            rows: (b,) indices.
            falls_back: whether sequences that failed keep their open-loop values.
            each: multiply-adds of one evaluation for one sequence.
        """
        batch, device = choice.opened.shape[0], choice.opened.device
        status = torch.full((batch,), int(Status.converged), device=device)
        steps, residual = torch.zeros_like(status), torch.zeros(batch, device=device)
        evaluations, reports = 0, []
        if solution is not None:
            status[rows], steps[rows] = solution.status, solution.steps
            residual[rows] = solution.residual.to(residual.dtype)
            evaluations, reports = solution.evaluations, solution.reports
        work = evaluations * each
        old = self.last
        if old is not None:  # a further window of the same sequences
            status = torch.where(old.status != int(Status.converged), old.status, status)
            steps, residual = steps + old.steps, torch.maximum(residual, old.residual)
            evaluations += old.evaluations
            work += old.multiply_adds
            reports = reports or old.reports
        new = (choice.amount.detach().sum(1), choice.probability.detach().sum(1), choice.decided.sum(1))
        if self._amounts is not None:
            new = tuple(a + b for a, b in zip(self._amounts, new, strict=True))
        self._amounts = (new[0], new[1], new[2])
        count = new[2].clamp_min(1)
        failed = (status != int(Status.converged)) & falls_back
        self.last = SpanRecord(
            self.span,
            new[0] / count,
            new[1] / count,
            status,
            steps,
            residual,
            failed,
            evaluations,
            work,
            reports=reports,
        )

    # Copies and pickles hold no activations.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_asked": []}


def check_budget(budget: float | str, scope: str) -> None:
    """Raise :class:`OptionError` unless ``budget`` is one that gates of this scope can keep."""
    if Budget.parse(budget).kind != "share" and scope == "step":
        raise OptionError(
            f"budget={budget!r} counts work, and where one step is open a whole sequence is iterated: with "
            "gate_over='step' give the share of steps."
        )


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Let a plain stack's checkpoint load strictly: a wormhole it knows nothing of stays as it is."""
    if any(key.startswith(prefix) for key in state):
        return
    for name, value in module.state_dict().items():
        state[prefix + name] = value
