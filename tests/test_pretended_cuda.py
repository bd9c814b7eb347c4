"""The paths of CUDA on a machine without a GPU: nothing meets a tensor of the CPU, the host waits seldom.

``test_cuda.py`` has the same on a device that is there.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import benchmarks.cli  # noqa: F401  (the benchmarks register themselves)
import twnn_plugin as tw
from benchmarks.harness import Settings, find
from tests import problems
from tests.methods import NATIVE
from tests.pretended import Pretended, pretended_cuda
from tests.test_cuda import STEP_SOLVERS, agree, moved, solve, with_a_broken_row
from twnn_plugin.solvers import Control

ADJOINTS = tw.adjoints.names()


@pytest.fixture(autouse=True)
def waits():
    torch.manual_seed(0)
    with pretended_cuda() as noted:
        yield noted


def test_it_holds_to_the_rules(waits):
    x = torch.ones(3, 2, device="cuda")
    assert x.is_cuda and x.device.type == "cuda" and (2 * x).is_cuda and x.new_zeros(2).is_cuda
    for mixed in (lambda: x + torch.ones(3, 2), lambda: x[0] * torch.ones(2), lambda: torch.ones(3) @ x):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert not waits
    assert (
        float(x.sum()) == 6 and len(torch.nonzero(x)) == 6 and x[x > 0].shape == (6,) and bool((x == 1).all())
    )
    assert len(waits) == 4


AFTERWARDS = """
import torch
from tests.pretended import pretended_cuda
with pretended_cuda(), torch.device("cpu"):
    torch.ones(2)
with torch.device("meta"):
    assert torch.empty(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
"""


def test_nothing_stays_behind():
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", AFTERWARDS], check=True, timeout=300, cwd=root)


def test_gradients_cross_between_devices():
    here = torch.ones(3, requires_grad=True)
    (here.to("cuda") * 2).square().sum().cpu().backward()
    assert torch.equal(here.grad, torch.full((3,), 8.0)) and not isinstance(here.grad, Pretended)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("solver", NATIVE)
def test_solutions_and_gradients_are_those_of_the_cpu(solver, adjoint):
    found = []
    for device in ("cpu", "cuda"):
        f, z0, context, w = moved(problems.mixed(), device)
        solution = tw.fix(f, z0, *context, solver=solver, adjoint=adjoint, tol=1e-9, max_iter=600)
        everything = (solution.value, solution.status, solution.steps, solution.residual)
        assert all(part.is_cuda == (device == "cuda") for part in everything)
        (gradient,) = torch.autograd.grad(solution.value.square().sum(), w)
        assert gradient.is_cuda == (device == "cuda")
        found.append((solution.value.detach().cpu(), gradient.cpu()))
    for here, there in zip(*found, strict=True):
        assert problems.relative(there, here) < 1e-6


@pytest.mark.parametrize("name", tw.linear_solvers.names())
def test_linear_solvers(name):
    gradients = []
    for device in ("cpu", "cuda"):
        f, z0, context, w = moved(problems.mixed(), device)
        adjoint = tw.adjoint("implicit", solver=name)
        solution = tw.fix(f, z0, *context, adjoint=adjoint, tol=1e-9, max_iter=600)
        gradients.append(torch.autograd.grad(solution.value.square().sum(), w)[0].cpu())
    assert problems.relative(gradients[1], gradients[0]) < 1e-6


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_the_host_waits_once_in_a_few_evaluations(solver, waits):
    f, z0, context, _ = moved(problems.mixed(batch=32), "cuda")
    waits.clear()
    outcome, _ = solve(solver, f, z0, context, Control(1e-9, 500, check_every=5))
    assert 0 < len(waits) <= math.ceil(int(outcome.steps.max()) / 5) + 1


@pytest.mark.parametrize("solver", STEP_SOLVERS)
def test_broken_rows_are_those_of_the_cpu(solver):
    here, there = with_a_broken_row(solver)
    agree(here, there)
    assert there.status[3] == tw.Status.non_finite


def test_states_of_several_parts_under_autocast():
    _, _, (x, _), w = moved(problems.mixed(), "cuda")
    x, w = x.float(), w.detach().float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        start = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        found = tw.fix(
            lambda z, x: {"a": torch.tanh(z["b"] @ w / 2 + x), "b": z["a"] / 2}, start, x, tol=1e-2
        )
    found.value["a"].float().sum().backward()
    assert bool(found.converged.all()) and w.grad.is_cuda


def test_certificates():
    f, z0, context, _ = moved(problems.mixed(), "cuda")
    solution = tw.fix(f, z0, *context, tol=1e-9, max_iter=600)
    assert tw.certify(f, solution, *context).residual.is_cuda
    z = solution.value.detach()
    radius, rate = tw.spectral_radius(f, z, *context), tw.contraction_rate(f, z, *context)
    assert radius.value.is_cuda and rate.value.is_cuda
    assert tw.jacobian_frobenius(f, z, *context).is_cuda


def both(make, images, train):
    """The logits on the CPU and on CUDA; in training those, and the gradients, pair by pair."""
    logits, gradients = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = make().to(device).train(train)
        torch.manual_seed(1)
        out = model(images.to(device))
        assert out.is_cuda == (device == "cuda")
        logits.append(out.detach().cpu())
        if train:
            extra = model.auxiliary_loss()
            loss = out.square().mean()
            (loss if extra is None else loss + extra).backward()
            gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    return [tuple(logits), *zip(*gradients, strict=True)] if train else [tuple(logits)]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "options", [{"gate": "sigmoid"}, {"policy": "always"}, {"budget": 0.5, "closed_head": True}]
)
@pytest.mark.parametrize("name", ["twnn_resnet18", "twnn_vit_tiny_patch16_224"])
def test_wormhole_networks(name, options, train):
    size = {"img_size": 32} if "vit" in name else {}
    images = torch.randn(4, 3, 32, 32)
    pairs = both(lambda: timm.create_model(name, num_classes=5, **size, **options), images, train)
    assert all(torch.allclose(here, there, rtol=1e-4, atol=1e-6) for here, there in pairs)


@pytest.mark.parametrize("policy", ["dynalay", "halting", "entropy", "always", "twnn_controller"])
def test_layer_selection(policy):
    images = torch.randn(4, 3, 32, 32, device="cuda")
    model = timm.create_model("dynalay_resnet18", num_classes=5, policy=policy).to("cuda")
    model.train()(images).square().mean().backward()
    with torch.no_grad():
        assert model.eval()(images).is_cuda


def test_streams_and_calibration():
    images = torch.randn(6, 3, 32, 32, device="cuda")
    model = timm.create_model("twnn_resnet18", num_classes=5, tol=1e-2, max_iter=10).to("cuda").eval()
    tw.calibrate(model, list(images.split(3)), budget=0.5)
    tw.configure(model, policy="always")
    streamed = torch.cat(list(tw.stream(model, list(images.split(1)), batch_size=3)))
    with torch.no_grad():
        assert torch.allclose(streamed.cpu(), model(images).cpu(), atol=1e-4)


CELLS = {
    "gpu": ("plain/seed0", "twnn", "depth/3", "prefix", "overhead"),
    "wormholes": ("wormhole",),
    "dynalay": ("fashion_mnist/dynalay",),
}
"""Of each benchmark those whose keys hold one of these: they take seconds."""


def cells():
    settings = Settings("cuda", True, (0,), 1, (), 0.05)
    return [
        pytest.param(find(name), cell, settings, id=f"{name}/{cell.key}")
        for name, parts in CELLS.items()
        for cell in find(name).cells(settings)
        if any(part in cell.key for part in parts)
    ]


@pytest.mark.parametrize(("benchmark_", "cell", "settings"), cells())
def test_benchmarks_run(benchmark_, cell, settings):
    benchmark_.check(settings)
    assert benchmark_.run_cell(cell, settings)
