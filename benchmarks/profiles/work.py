"""What is profiled: one pass of each main model, in use and in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

import twnn_plugin as tw
import zoo.models  # noqa: F401  (registers the models with timm)
from twnn_plugin.sequence import RecurrentStack

from ..solving.problems import build

__all__ = ["WORK"]

Pass = Callable[[], object]
SPAN = "layer3->layer2"
DEQ = {"width": 24, "inner": 32, "downsample": 1}


def _classifier(make: Callable[[], nn.Module], train: bool) -> Callable[[int, int, str], Pass]:
    def prepare(batch: int, side: int, device: str) -> Pass:
        model = make().to(device).train(train)
        images = torch.randn(batch, 1, side, side).to(device)
        labels = torch.randint(10, (batch,)).to(device)

        def once() -> None:
            if not train:
                with torch.no_grad():
                    model(images)
                return
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()

        return once

    return prepare


def _plain(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, in_chans=1, num_classes=10, **options)


def _wormhole(policy: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: tw.attach(_plain("resnet8_tiny")(), SPAN, policy=policy, max_iter=8, **options)


def _fix(adjoint: str) -> Callable[[int, int, str], Pass]:
    def prepare(batch: int, side: int, device: str) -> Pass:
        problem = build("c", batch=batch).to(torch.float32, device)

        def once() -> None:
            x = problem.context[0].detach().requires_grad_()
            found = tw.fix(
                problem.f, problem.z0, x, *problem.context[1:], adjoint=adjoint, tol=1e-3, max_iter=200
            )
            torch.autograd.grad(found.value, [x, *problem.parameters], problem.cotangent)

        return once

    return prepare


def _recurrent(batch: int, side: int, device: str) -> Pass:
    options: dict[str, Any] = {"wormholes": "layer0[t-10]->layer0", "gate": "always", "gate_over": "state"}
    stack = RecurrentStack("gru", 8, 32, window=10, **options).to(device)
    x = torch.randn(batch, 100, 8).to(device)

    def once() -> None:
        stack.zero_grad()
        stack(x)[0].sum().backward()

    return once


WORK: dict[str, Callable[[int, int, str], Pass]] = {
    "plain, in use": _classifier(_plain("resnet8_tiny"), False),
    "plain, training": _classifier(_plain("resnet8_tiny"), True),
    "TWNN closed, in use": _classifier(_wormhole("never"), False),
    "TWNN open, in use": _classifier(_wormhole("always"), False),
    "TWNN, training": _classifier(_wormhole("always", adjoint="implicit"), True),
    "TWNN unrolled, training": _classifier(_wormhole("always", solver="picard", adjoint="unrolled"), True),
    "DynaLay, in use": _classifier(_plain("dynalay_cnn3", policy="random"), False),
    "DynaLay, training": _classifier(_plain("dynalay_cnn3", policy="random"), True),
    "DEQ by torchdeq, training": _classifier(_plain("deq_tiny", **DEQ), True),
    "DEQ, our solver, training": _classifier(
        _plain("deq_tiny", f_solver="twnn.anderson", b_solver="twnn.anderson", **DEQ), True
    ),
    "Hamiltonian, training": _classifier(_plain("hamiltonian_20"), True),
    "fix, forward and backward": _fix("implicit"),
    "GRU with a wormhole through time, training": _recurrent,
}
"""By name, from batch, side and device to a pass."""
