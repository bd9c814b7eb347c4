"""What a CUDA device's short float32 products change, and what nobody waits for; on pretended CUDA."""

from __future__ import annotations

import importlib

import pytest
import torch

import twnn_plugin as tw
from benchmarks.harness.bench import Settings
from twnn_plugin.adjoints.equation import Equation
from twnn_plugin.solvers.anderson import Anderson
from twnn_plugin.solvers.base import Control
from twnn_plugin.solvers.graphs import Graphs, Rerun
from twnn_plugin.solvers.masked import drive_masked
from twnn_plugin.solvers.precision import TENSOR_FLOAT, cut_short
from twnn_plugin.state import Layout

from .pretended import pretended_cuda
from .problems import mixed


@pytest.fixture(params=[True, False], ids=["TensorFloat-32", "float32"])
def allowed(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.param)
    return request.param


def test_only_float32_on_cuda_is_cut_short(allowed):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert cut_short(cuda, (torch.float32,)) is allowed
    assert cut_short(cuda, (torch.float64, torch.float32)) is allowed
    assert not cut_short(cuda, (torch.float64,)) and not cut_short(cpu, (torch.float32,))


@pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")
def test_rows_that_move_by_more_than_rounding_are_not_called_converged(allowed):
    """Rows that influence each other without saying so settle one by one, and move when they meet again."""
    generator = torch.Generator().manual_seed(0)
    w = 0.1 * torch.randn(16, 16, generator=generator)
    x = torch.randn(32, 16, generator=generator) * torch.where(torch.arange(32) < 24, 0.05, 1.0)[:, None]
    rate = torch.where(torch.arange(32) < 24, 0.2, 0.9)[:, None]
    with pretended_cuda():
        w, x, rate = w.cuda().requires_grad_(), x.cuda(), rate.cuda()

        def f(z, x, rate):
            return torch.tanh(rate * z + z @ w + x + 0.3 * z.mean(0, keepdim=True))

        solution = tw.fix(f, torch.zeros_like(x), x, rate, tol=1e-4, max_iter=200)
        z = solution.value.detach()
        fz = f(z, x, rate).detach()
        off = ((fz - z).norm(dim=1) / fz.norm(dim=1)).cpu()
        converged = solution.status.cpu() == int(tw.Status.converged)
    assert not bool(converged.any()) or float(off[converged].max()) < 4 * TENSOR_FLOAT + 1e-3
    if not allowed:
        assert not bool((off[converged] > 1e-3).any())


def test_no_tensor_is_printed_to_tell_graphs_apart(monkeypatch):
    """On CUDA that would wait for the device several times."""

    def printed(*_, **__):
        raise AssertionError("a tensor was printed")

    p = mixed(batch=8)

    layout, z = Layout.of(p.z0)
    monkeypatch.setattr(torch.Tensor, "__repr__", printed)
    with torch.no_grad():
        made = Equation(p.f, layout, p.context, len(z))
        outcome = drive_masked(Anderson(), made, z, Control(1e-8, 300), 5, Graphs(Rerun))
    assert bool((outcome.status == int(tw.Status.converged)).all())


def test_a_copy_without_a_history_says_of_which_commit_it_is(monkeypatch):
    origins = importlib.import_module("benchmarks.harness.provenance")  # not its function
    monkeypatch.setattr(origins, "_git", lambda *_: "")
    monkeypatch.delenv(origins.COMMIT, raising=False)
    settings = Settings("cpu", True, (0,), 1, (), 1.0)
    assert origins.provenance(settings, "")["commit"] == "unknown"
    monkeypatch.setenv(origins.COMMIT, "abc123")
    assert origins.provenance(settings, "")["commit"] == "abc123"
