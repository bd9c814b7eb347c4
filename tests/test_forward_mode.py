"""Forward and reverse derivatives of models in training mode are transposes of each other.

What a gate reads does not carry its gradient, what a closed row would receive carries the gate's: both modes
must keep to that, though the tensors of a transform say of themselves that they need no gradient.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch.func import functional_call, jvp

import twnn_plugin as tw
import zoo.models  # noqa: F401  (registers the models with timm)
from twnn_plugin.gates.hard_concrete import HardConcreteGate

GATES = [
    "sigmoid",
    "straight_through",
    "hard_concrete",
    ("sigmoid", {"per": "channel"}),
    ("straight_through", {"learn": "benefit", "budget": 0.5}),
]


def made(gate, **options):
    torch.manual_seed(0)
    model = timm.create_model(
        "twnn_resnet8_tiny",
        in_chans=1,
        num_classes=5,
        wormholes="layer3->layer2",
        gate=gate,
        solver="picard",
        tol=1e-12,
        max_iter=300,
        **options,
    )
    model.double().train()
    x = torch.randn(6, 1, 14, 14, dtype=torch.float64)
    gate = tw.spans(model)[0].feedback.gate
    torch.nn.init.normal_(gate.score.weight, std=0.5)
    with torch.no_grad():
        model(x)
    # Some rows are open, others are closed; hard_concrete opens there for 6 % of its draws alone.
    shift = 3.0 if isinstance(gate, HardConcreteGate) else 0.0
    tw.configure(model, threshold=float(gate.scores.median()) - shift)
    return model, x


def directions(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in tensors.items()}


@pytest.mark.parametrize("adjoint", ["implicit", "unrolled", "ad_fixed_point"])
@pytest.mark.parametrize("gate", GATES)
def test_forward_and_reverse_agree(gate, adjoint):
    model, x = made(gate, adjoint=adjoint)
    values = {"x": x, **{name: p.detach() for name, p in model.named_parameters()}}
    u = directions(values, 1)
    before = copy.deepcopy(model.state_dict())

    def f(values):
        torch.manual_seed(1)  # hard_concrete draws
        weights = {name: value for name, value in values.items() if name != "x"}
        return functional_call(model, weights, (values["x"],))

    y, slope = jvp(f, (values,), (u,))
    model.load_state_dict(before)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    out = f(leaves)
    opened = tw.report(model)[0].open
    assert bool(opened.any()) and not bool(opened.all())
    torch.testing.assert_close(y, out.detach())
    v = directions({"y": y}, 2)["y"]
    grads = torch.autograd.grad((out * v).sum(), list(leaves.values()), allow_unused=True)
    by_gate = 0.0
    total = torch.zeros((), dtype=torch.float64)
    for (name, direction), g in zip(u.items(), grads, strict=True):
        if g is not None:
            total = total + (g * direction).sum()
            by_gate += float(g.abs().sum()) if ".gate." in name else 0.0
    assert by_gate > 0  # what the gate learns is in it
    torch.testing.assert_close((slope * v).sum(), total, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("closed_head", [False, True])
def test_a_gate_that_is_taught_difficulty_lets_forward_mode_pass(closed_head):
    """What it is taught is no derivative of the output, and so is not in the output's tangent."""
    options = {"closed_head": True} if closed_head else {}
    model, x = made(("straight_through", {"budget": 0.5}), adjoint="implicit", **options)
    u = directions({"x": x}, 1)["x"]
    y, slope = jvp(model, (x,), (u,))
    leaf = x.clone().requires_grad_()
    v = directions({"y": y}, 2)["y"]
    (grad,) = torch.autograd.grad((model(leaf) * v).sum(), leaf)
    torch.testing.assert_close((slope * v).sum(), (grad * u).sum(), rtol=1e-7, atol=1e-9)


def test_the_record_of_a_pass_under_a_transform_outlasts_it():
    model, x = made("sigmoid", adjoint="implicit")
    torch.func.grad(lambda x: model(x).sum())(x)
    (record,) = copy.deepcopy(tw.report(model))
    assert type(record.steps) is torch.Tensor and not record.gate.requires_grad
    assert bool(record.open.any()) and int(record.steps.max()) > 1
    model(x)
    assert torch.equal(record.steps, tw.report(model)[0].steps)


def test_a_model_whose_agent_picks_layers():
    torch.manual_seed(0)
    model = timm.create_model("dynalay_resnet8_tiny", in_chans=1, num_classes=4, tol=1e-11, max_iter=300)
    model.double().train()
    x = torch.randn(3, 1, 14, 14, dtype=torch.float64)

    def f(x):
        torch.manual_seed(1)  # the agent draws
        return model(x)

    u = directions({"x": x}, 1)["x"]
    y, slope = jvp(f, (x,), (u,))
    v = directions({"y": y}, 2)["y"]
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((f(leaf) * v).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: (f(x) * v).sum())(x), grad)
    torch.testing.assert_close((slope * v).sum(), (grad * u).sum(), rtol=1e-7, atol=1e-9)
