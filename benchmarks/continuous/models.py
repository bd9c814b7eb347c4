"""Models in eval mode and streams of inputs: 80 % easy samples, 15 % medium, 5 % hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.blocks import Feedback
from twnn_plugin.solvers import Control, Outcome, Problem, Solver, StepSolver, WholeSolver
from twnn_plugin.solvers import solve as drive

from ..solving.maps import MixedVector
from ..solving.problems import build

__all__ = ["MODELS", "Masked", "Workload", "build_workload"]

SHARES = (0.80, 0.15, 0.05)


@dataclass(frozen=True)
class Masked(WholeSolver):
    """A step solver whose finished rows stay in the batch: they are evaluated to the end and ignored."""

    method: StepSolver

    def solve(self, problem: Problem, z: Tensor, control: Control) -> Outcome:
        problem.can_leave = False
        return drive(self.method, problem, z, control)


class Solved(nn.Module):
    """A map of :mod:`benchmarks.solving.problems` behind ``fix``; its context comes as one matrix."""

    def __init__(self, name: str, seed: int, tol: float, max_iter: int):
        super().__init__()
        problem = build(name, seed, batch=64).to(torch.float32, "cpu")
        self.f = problem.f
        self.shapes = [tuple(c.shape[1:]) for c in problem.context]
        self.solver: Solver = tw.solver("anderson")
        self.tol, self.max_iter = tol, max_iter
        self.steps: list[Tensor] = []

    def forward(self, packed: Tensor) -> Tensor:
        sizes = [int(torch.Size(shape).numel()) for shape in self.shapes]
        context = [
            c.unflatten(1, shape) if len(shape) > 1 else c for c, shape in self._columns(packed, sizes)
        ]
        solution = tw.fix(
            self.f,
            torch.zeros_like(context[0]),
            *context,
            solver=self.solver,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self.steps.append(solution.steps)
        return solution.value.flatten(1).mean(dim=1)

    def _columns(self, packed: Tensor, sizes: list[int]) -> list[tuple[Tensor, tuple[int, ...]]]:
        return list(zip(packed.split(sizes, dim=1), self.shapes, strict=True))


@dataclass
class Workload:
    """A model and its inputs.

    Attributes:
        model: in eval mode.
        samples: (N, ...) inputs in random order.
        set_solver: changes how it solves.
        steps: of each sample, (N,).
        probe: a module that each evaluation of the solved map calls once.
        outside: how often a pass calls it besides.
    """

    model: nn.Module
    samples: Tensor
    set_solver: Callable[[Solver], Any]
    steps: Tensor
    probe: nn.Module
    outside: int


def _rates(count: int, generator: torch.Generator) -> Tensor:
    """Contraction rates: 0.05 to 0.3, 0.5 to 0.8, and 0.97 to 0.985, shuffled."""
    hard, medium = max(1, round(SHARES[2] * count)), round(SHARES[1] * count)
    low = torch.cat(
        [torch.full((n,), r) for n, r in ((count - hard - medium, 0.05), (medium, 0.5), (hard, 0.97))]
    )
    high = torch.cat(
        [torch.full((n,), r) for n, r in ((count - hard - medium, 0.3), (medium, 0.8), (hard, 0.985))]
    )
    rate = low + (high - low) * torch.rand(count, generator=generator)
    return rate[torch.randperm(count, generator=generator)]


def _solved(name: str, count: int, seed: int) -> Workload:
    model = Solved(name, seed, tol=1e-3, max_iter=100).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    scale = 0.1 if isinstance(model.f, MixedVector) else 1.0
    x = scale * torch.randn(count, int(torch.Size(model.shapes[0]).numel()), generator=generator)
    samples = torch.cat([x, _rates(count, generator)[:, None]], dim=1)

    def set_solver(solver: Solver) -> None:
        model.solver = solver

    with torch.no_grad():
        for batch in samples.split(256):
            model(batch)
    return Workload(model, samples, set_solver, torch.cat(model.steps), model.f, 0)


def _attached(count: int, seed: int) -> Workload:
    """A ViT of timm with a wormhole, opened for all; inputs are picked by the steps that they take."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "twnn_vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        depth=6,
        num_classes=10,
        wormholes="blocks.4->blocks.3",
        policy="always",
        scale=0.6,
        max_iter=60,
    ).eval()
    (feedback,) = (m for m in model.modules() if isinstance(m, Feedback))
    generator = torch.Generator().manual_seed(seed + 1)
    pool = 4 * count
    images = torch.randn(pool, 3, 32, 32, generator=generator)
    images = images * torch.rand(pool, 1, 1, 1, generator=generator) * 3
    steps = []
    with torch.no_grad():
        for batch in images.split(256):
            model(batch)
            assert feedback.last is not None
            steps.append(feedback.last.steps)
    all_steps = torch.cat(steps)
    order = torch.argsort(all_steps, stable=True)
    hard, medium = max(1, round(SHARES[2] * count)), round(SHARES[1] * count)
    middle = int(0.9 * pool) - medium
    picked = torch.cat(
        [order[: count - hard - medium], order[middle : middle + medium], order[pool - hard :]]
    )
    picked = picked[torch.randperm(picked.numel(), generator=generator)]

    def set_solver(solver: Solver) -> None:
        tw.configure(model, solver=solver)

    return Workload(model, images[picked], set_solver, all_steps[picked], model.get_submodule("blocks.3"), 1)


MODELS: dict[str, Callable[[int, int], Workload]] = {
    "vector": lambda count, seed: _solved("c", count, seed),
    "conv": lambda count, seed: _solved("c_conv", count, seed),
    "vit": _attached,
}
"""Makers of workloads, of (samples, seed)."""


def build_workload(name: str, count: int, seed: int, device: str) -> Workload:
    """A workload on a device."""
    work = MODELS[name](count, seed)
    work.model.to(device)
    work.samples = work.samples.to(device)
    return work
