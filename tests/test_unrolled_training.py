"""The unrolled form in training: all that the model learns from, by iterations that are counted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F

import twnn_plugin as tw

from .families import FAMILIES
from .test_manners_rerun import attached as run_again
from .test_manners_rerun import images as small

ZOO = FAMILIES["zoo"]
TARGETS = torch.arange(3)


def made(**options) -> nn.Module:
    """Solved by four plain steps that are differentiated through, as the unrolled form of four is."""
    steps = {"solver": "picard", "max_iter": 4, "tol": 1e-300, "adjoint": "unrolled", "scale": 0.1}
    return ZOO.twnn(**{**steps, **options}).double().train()


def trained(model: nn.Module, run: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a training step after another one."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run(x), TARGETS) + model.auxiliary_loss()
        closed = tw.closed_loss(model, F.cross_entropy, TARGETS)
        (loss if closed is None else loss + closed).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "sigmoid", "policy": "always", "opening": 10, "jacobian": 0.5},
        {"gate": ("sigmoid", {"per": "channel"}), "closed_head": True, "contraction": 0.9},
        {"gate": ("hard_concrete", {"l0": 0.1, "bias": 0.0}), "budget": 0.5},
        {"wormholes": ["layer3->layer2", "layer3->layer3"], "policy": "always", "jacobian": 0.5},
    ],
)
def test_it_trains_as_the_model_that_is_solved_by_these_steps(options):
    model, x = made(**options), ZOO.images(3, size=(16, 16)).double()
    twin = copy.deepcopy(model)
    mine, theirs = trained(model, tw.unrolled(model, 4), x), trained(twin, twin, x)
    assert mine.keys() == theirs.keys() == {name for name, _ in model.named_parameters()}
    for name, grad in mine.items():
        assert torch.allclose(grad, theirs[name], rtol=1e-6, atol=1e-10), name
    names = [name for name in mine if name.startswith("wormholes")]
    assert names and any(bool(mine[name].any()) for name in names)
    for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-9), name
    a, b = model.wormholes[0].feedback.gate, twin.wormholes[0].feedback.gate
    assert a.effort == pytest.approx(b.effort) if hasattr(a, "effort") else True


def test_a_closed_gate_learns():
    model, x = made(), ZOO.images(3, size=(16, 16)).double()
    F.cross_entropy(tw.unrolled(model, 3)(x), TARGETS).backward()
    assert not tw.report(model)[0].open.any()
    for name in ("gate.score.weight", "message.project.weight", "message.scale"):
        assert bool(model.wormholes[0].feedback.get_parameter(name).grad.any()), name


def test_the_steps_in_training_are_those_in_eval_mode():
    for damping in (1.0, 0.5):
        model = FAMILIES["vit"].twnn(policy="always", tol=1e-9).double()
        run, x = tw.unrolled(model, 3, damping), FAMILIES["vit"].images().double()
        out = run.train()(x)
        record = tw.report(model)[0]
        assert (record.steps == 3).all() and (record.status == int(tw.Status.max_iter)).all()
        with torch.no_grad():
            assert torch.allclose(run.eval()(x), out, atol=1e-10)
        assert torch.allclose(tw.report(model)[0].residual.double(), record.residual.double(), rtol=1e-4)


def test_a_closed_head_is_told_who_is_open():
    model, x = made(closed_head=True, policy="always").eval(), ZOO.images(3, size=(16, 16)).double()
    with torch.no_grad():
        model.closed_head.heads[0].weight.mul_(-3)
        tw.configure(model, tol=1e-9, max_iter=100)
        assert torch.allclose(tw.unrolled(model, 60)(x), model(x), atol=1e-6)
        tw.configure(model, policy="never")
        assert torch.equal(tw.unrolled(model, 4)(x), model(x))


def test_a_span_that_is_run_again_trains():
    model = run_again().train()
    tw.configure(model, solver="picard", max_iter=4, tol=1e-300, adjoint="unrolled")
    twin, x = copy.deepcopy(model), small()
    tw.unrolled(model, 4)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-10), name


def test_compiled_training_is_the_same():
    torch._dynamo.reset()
    model, x = made(gate="sigmoid", policy="always").float(), ZOO.images(3, size=(16, 16))
    twin = copy.deepcopy(model)
    torch.compile(tw.unrolled(model, 2), backend="eager")(x).square().sum().backward()
    tw.unrolled(twin, 2)(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.allclose(p.grad, q[1].grad, atol=1e-5), name
