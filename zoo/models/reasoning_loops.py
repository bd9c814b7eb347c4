"""How the reasoning models come to their states: our wormhole, torchdeq's solver, or no recall at all."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deq import check_deq, solve_deq
from .reasoning_cells import Beside, RecallCell

__all__ = [
    "LOOPS",
    "SETTINGS",
    "Loop",
    "NoRecallLoop",
    "TorchdeqLoop",
    "WormholeLoop",
    "loop_options",
    "make_loop",
]

SETTINGS: dict[str, Any] = {"solver": "picard", "tol": 1e-2, "max_iter": 5000, "norm": "max"}
"""How these models are solved unless one says otherwise: a front that travels is no linear convergence."""


class Loop(nn.Module, ABC):
    """A cell and how it is iterated."""

    @abstractmethod
    def first(self, x: Tensor) -> Tensor:
        """Where the iteration starts: (B, width, H, W)."""

    @abstractmethod
    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Input (B, inputs, H, W) to the state that the iteration ends in."""

    @abstractmethod
    def solved(self) -> tuple[Tensor, Tensor]:
        """Steps and :class:`~twnn_plugin.Status` of each row of the last forward pass, (B,) each."""


class WormholeLoop(Loop):
    """A wormhole around the cell, always open, whose message is the state itself.

    Args:
        body: the cell.
        inputs: channels of its input.
        **settings: options of the solve in place of :data:`SETTINGS`; the adjoint is otherwise the phantom
            gradient of four steps. Besides, ``policy``, by name or an instance, and ``jacobian``.
    """

    def __init__(self, body: RecallCell, inputs: int, **settings: Any):
        super().__init__()
        # Here rather than above: importing twnn_plugin imports this module.
        import twnn_plugin as tw
        from twnn_plugin.backbones.given import span_policy
        from twnn_plugin.blocks.wormhole import Wormhole

        if settings.get("policy") is not None:
            settings["policy"] = span_policy(settings["policy"])
        phantom = tw.adjoint("phantom", steps=4, damping=1.0)
        self.width = body.width
        example = torch.zeros(1, body.width + inputs, 8, 8)
        self.wormhole = Wormhole(body, example, gate="always", **{**SETTINGS, "adjoint": phantom, **settings})
        self.wormhole.feedback.add_module("message", Beside(body.width + inputs))

    def first(self, x: Tensor) -> Tensor:
        """Zeros."""
        return _zeros(x, self.width)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return self.wormhole.body(torch.cat([z, x], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.wormhole(torch.cat([self.first(x), x], dim=1))

    def solved(self) -> tuple[Tensor, Tensor]:
        record = self.wormhole.last
        assert record is not None, "solved() tells of a forward pass that there has been"
        return record.steps, record.status


class TorchdeqLoop(Loop):
    """The same equation in the hands of ``torchdeq.get_deq``; the baseline.

    Args:
        body: the cell.
        f_solver: torchdeq's name of the forward solver, or ``"twnn.<name>"`` for one of ours.
        b_solver: that of the backward solve.
        f_max_iter: evaluations in the forward solve at most.
        b_max_iter: likewise backward.
        f_tol: tolerance of the forward solve.
        b_tol: likewise backward.
        f_stop_mode: ``"rel"`` or ``"abs"``; torchdeq's residual is the mean over all positions.
        b_stop_mode: likewise backward.
        ift: the implicit gradient; else the phantom gradient.
        grad: steps of the phantom gradient.

    Raises:
        OptionError: a solver or a stop mode is unknown, or cannot be the backward solver.
    """

    def __init__(
        self,
        body: RecallCell,
        *,
        f_solver: str = "fixed_point_iter",
        b_solver: str = "fixed_point_iter",
        f_max_iter: int = 40,
        b_max_iter: int = 40,
        f_tol: float = 1e-3,
        b_tol: float = 1e-3,
        f_stop_mode: str = "rel",
        b_stop_mode: str = "rel",
        ift: bool = True,
        grad: int = 1,
    ):
        super().__init__()
        import torchdeq

        check_deq(f_solver, b_solver, ift, f_stop_mode, b_stop_mode)
        self.body = body
        self.f_tol, self.f_stop_mode = f_tol, f_stop_mode
        self.deq = torchdeq.get_deq(
            f_solver=f_solver,
            b_solver=b_solver,
            f_max_iter=f_max_iter,
            b_max_iter=b_max_iter,
            f_tol=f_tol,
            b_tol=b_tol,
            f_stop_mode=f_stop_mode,
            b_stop_mode=b_stop_mode,
            ift=ift,
            grad=grad,
        )
        self.last_info: dict[str, Tensor] = {}

    def first(self, x: Tensor) -> Tensor:
        """Zeros."""
        return _zeros(x, self.body.width)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return self.body(torch.cat([z, x], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        state, self.last_info = solve_deq(self.deq, lambda z: self.step(z, x), self.first(x))
        return state

    def solved(self) -> tuple[Tensor, Tensor]:
        from twnn_plugin import Status

        done = self.last_info[f"{self.f_stop_mode}_lowest"] <= self.f_tol
        status = torch.where(done, int(Status.converged), int(Status.max_iter))
        return self.last_info["nstep"].long(), status


class NoRecallLoop(Loop):
    """The input is seen once, as the state that the iteration starts from (Schwarzschild et al. 2021).

    Args:
        body: a cell of a state alone.
        inputs: channels of the input.
        tol: stop once no entry changes by more, relative to the rms state.
        max_iter: steps at most.
    """

    def __init__(self, body: RecallCell, inputs: int, tol: float = 1e-2, max_iter: int = 1000):
        super().__init__()
        self.body, self.tol, self.max_iter = body, tol, max_iter
        self.project = nn.Conv2d(inputs, body.width, 1)
        self.last: tuple[Tensor, Tensor] | None = None

    def first(self, x: Tensor) -> Tensor:
        """(B, width, H, W), made of the input."""
        return F.relu(self.project(x))

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map; the input has no part in it."""
        return self.body(z)

    def forward(self, x: Tensor) -> Tensor:
        import twnn_plugin as tw

        with warnings.catch_warnings():  # what failed is told by solved()
            warnings.simplefilter("ignore", tw.ConvergenceWarning)
            solution = tw.fix(
                lambda z, x: self.step(z, x),
                self.first(x),
                x,
                solver="picard",
                adjoint="unrolled",  # the input is reached through all steps alone
                tol=self.tol,
                max_iter=self.max_iter,
                norm="max",
            )
        self.last = solution.steps, solution.status
        assert isinstance(solution.value, Tensor)
        return solution.value

    def solved(self) -> tuple[Tensor, Tensor]:
        assert self.last is not None, "solved() tells of a forward pass that there has been"
        return self.last


def _zeros(x: Tensor, width: int) -> Tensor:
    return x.new_zeros(x.shape[0], width, *x.shape[2:])


LOOPS = ("wormhole", "torchdeq", "no_recall")


def loop_options(kind: str) -> list[str]:
    """The options of one of the :data:`LOOPS`.

    Of a wormhole's those that are left to choose: its gate is open, and its message the state as it is.

    Raises:
        OptionError: there is no such loop.
    """
    # Here rather than above: importing twnn_plugin imports this module.
    from twnn_plugin.blocks import SolveSettings
    from twnn_plugin.blocks.settings import option_names
    from twnn_plugin.errors import OptionError, nearest

    if kind not in LOOPS:
        raise OptionError(f"loop must be one of {LOOPS}; got {kind!r}.{nearest(str(kind), LOOPS)}")
    if kind == "wormhole":
        return [*SolveSettings.names(), "policy", "jacobian"]
    return option_names(TorchdeqLoop if kind == "torchdeq" else NoRecallLoop, "body", "inputs")


def make_loop(kind: str, width: int, inputs: int, options: dict[str, Any], **cell: Any) -> Loop:
    """A loop of one of the :data:`LOOPS`.

    Args:
        kind: which.
        width: channels of the state.
        inputs: channels of the input.
        options: of the loop.
        **cell: options of :class:`~zoo.models.reasoning_cells.RecallCell`.

    Raises:
        OptionError: an option that the loop does not have, or an impossible value.
    """
    from twnn_plugin.blocks.settings import check_names  # importing twnn_plugin imports this module

    check_names(f"The loop {kind!r}", options, loop_options(kind))
    if kind == "wormhole":
        return WormholeLoop(RecallCell(width, inputs, **cell), inputs, **options)
    if kind == "torchdeq":
        return TorchdeqLoop(RecallCell(width, inputs, **cell), **options)
    return NoRecallLoop(RecallCell(width, 0, **{**cell, "added": False}), inputs, **options)
