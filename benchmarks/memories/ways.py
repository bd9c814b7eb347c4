"""What is held: solves of one convolutional cell, and whole models, each to a given depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twnn_plugin as tw
import zoo.models  # noqa: F401  (registers the models with timm)
from zoo.models.deq import Cell as DEQCell

from ..solving.candidates import Candidate, Limits, Ours, Torchdeq
from ..solving.overhead import UNREACHABLE
from ..solving.problems import Problem

__all__ = ["MODELS", "WAYS", "problem_of", "run_model", "run_way"]

WIDTH, INNER = 16, 16


def _ways() -> dict[str, Callable[[int], tuple[Candidate, int]]]:
    """By name, from a depth to a candidate and its forward iterations."""
    plain = "fixed_point_iter"

    def fixed(candidate: Candidate) -> Callable[[int], tuple[Candidate, int]]:
        return lambda depth: (candidate, depth)

    found = {f"torchdeq {b} / {b}": fixed(Torchdeq(b, b)) for b in (plain, "anderson", "broyden")}
    found["torchdeq phantom(5)"] = fixed(Torchdeq(plain, plain, grad=5))
    # torchdeq has no unrolling: a phantom gradient through all iterations but the first.
    found["torchdeq phantom(depth)"] = lambda depth: (Torchdeq(plain, plain, grad=max(1, depth - 1)), 1)
    found |= {f"{s} / implicit": fixed(Ours(s)) for s in ("picard", "anderson", "broyden")}
    found["picard / implicit(picard)"] = fixed(Ours("picard", "implicit", "picard"))
    for adjoint in ("unrolled", "checkpointed", "phantom", "one_step", "ad_fixed_point"):
        solver = "ad_fixed_point" if adjoint == "ad_fixed_point" else "picard"
        found[f"{solver} / {adjoint}"] = fixed(Ours(solver, adjoint))
    return found


WAYS = _ways()


def problem_of(batch: int, side: int, device: str, seed: int = 0) -> Problem:
    """The DEQ baselines' own cell with a state of 16 channels, in float32."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        f = DEQCell(WIDTH, INNER).to(device)
    x, cotangent = (torch.randn(batch, WIDTH, side, side, generator=draw).to(device) for _ in range(2))
    return Problem("cell", f, torch.zeros_like(x), (x,), cotangent)


def run_way(name: str, problem: Problem, depth: int, amp: bool = False) -> Callable[[], object]:
    """Forward and backward once, with so many iterations in each direction that iterates.

    Args:
        name: of :data:`WAYS`.
        problem: what is solved.
        depth: iterations.
        amp: forward under bfloat16 autocast.
    """
    candidate, steps = WAYS[name](depth)
    solve = candidate.make(problem, UNREACHABLE, Limits(steps, depth, exactly=True), UNREACHABLE)

    def once() -> None:
        x = problem.context[0].detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            value = solve(problem.f, (x,))
        torch.autograd.grad(value, [x, *problem.parameters], problem.cotangent.to(value.dtype))

    return once


def _wormhole(adjoint: str) -> Callable[[int], nn.Module]:
    def build(depth: int) -> nn.Module:
        model = timm.create_model("resnet8_tiny", in_chans=1)
        return tw.attach(
            model,
            "layer3->layer2",
            gate="always",
            policy="always",
            solver="picard",
            adjoint=adjoint,
            tol=UNREACHABLE,
            max_iter=depth,
        )

    return build


def _deq(**options: Any) -> Callable[[int], nn.Module]:
    def build(depth: int) -> nn.Module:
        given: dict[str, Any] = {"f_max_iter": depth, "b_max_iter": depth, **options}
        if options.get("grad") == 0:
            given |= {"f_solver": "simple_fixed_point_iter", "f_max_iter": 1, "grad": max(1, depth - 1)}
        shape = {"width": 24, "inner": 32}
        return timm.create_model("deq_tiny", in_chans=1, f_tol=1e-12, b_tol=1e-12, **shape, **given)

    return build


def _hamiltonian(reversible: bool) -> Callable[[int], nn.Module]:
    from zoo.models import PropagationNet

    return lambda depth: PropagationNet("hamiltonian", depth, in_chans=1, reversible=reversible)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "TWNN, implicit": _wormhole("implicit"),
    "TWNN, unrolled": _wormhole("unrolled"),
    "TWNN, checkpointed": _wormhole("checkpointed"),
    "TWNN, phantom": _wormhole("phantom"),
    "DEQ by torchdeq, implicit": _deq(),
    "DEQ by torchdeq, phantom(5)": _deq(ift=False, grad=5),
    "DEQ by torchdeq, unrolled": _deq(ift=False, grad=0),
    "Hamiltonian, states kept": _hamiltonian(False),
    "Hamiltonian, reversible": _hamiltonian(True),
}
"""From a depth (iterations, or layers a stage) to a model."""


def run_model(
    name: str, depth: int, batch: int, side: int, device: str, amp: bool = False
) -> Callable[[], object]:
    """One training pass, without the optimiser's step; ``amp``: forward under bfloat16 autocast."""
    torch.manual_seed(0)
    model = MODELS[name](depth).to(device).train()
    images: Tensor = torch.randn(batch, 1, side, side).to(device)
    labels = torch.randint(10, (batch,)).to(device)

    def once() -> None:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return once
