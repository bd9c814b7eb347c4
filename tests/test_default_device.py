"""Whatever torch makes tensors on by default, things are computed where the model and its inputs are.

The default is the meta device here, on which nothing can be computed, in place of the accelerator of somebody
who says ``torch.set_default_device("cuda")`` and keeps a part on the CPU.
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import twnn_plugin as tw
from twnn_plugin.selection import selection_of
from twnn_plugin.sequence import RecurrentStack

META = torch.device("meta")


def images(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "always", "scale": 0.1},
        {"gate": "straight_through", "budget": 0.5, "closed_head": True},
        {"gate": "hard_concrete", "budget": "1.5x"},
        {"policy": "random", "wormholes": ["layer2->layer1", "layer3->layer3"]},
    ],
    ids=str,
)
def test_wormholes(options):
    torch.manual_seed(0)
    net = timm.create_model("twnn_resnet8_cifar", num_classes=5, max_iter=5, **options).eval()
    x, labels = images(), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(1)
    expected = net(x)
    with META:
        torch.manual_seed(1)
        torch.testing.assert_close(net(x), expected)
        assert str(tw.report(net))
        if "policy" not in options:
            tw.calibrate(net, [(x, labels)], budget=0.5)
        outputs = list(tw.stream(net, [x[:2], x[2:]]))
        assert all(output.device.type == "cpu" for output in outputs)
        net.train()
        (F.cross_entropy(net(x), labels) + net.auxiliary_loss()).backward()
    assert {p.grad.device.type for p in net.parameters() if p.grad is not None} == {"cpu"}


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"])
def test_attaching(name):
    options = {"img_size": 32} if "vit" in name else {}
    net = timm.create_model(name, num_classes=5, **options).eval()
    expected = net(images())
    with META:
        tw.attach(net, policy="never")
        torch.testing.assert_close(net(images()), expected)
    assert {p.device.type for p in net.parameters()} == {"cpu"}


@pytest.mark.parametrize("policy", ["dynalay", "entropy", "always", "random"])
def test_layer_selection(policy):
    torch.manual_seed(0)
    net = timm.create_model("dynalay_cnn3", num_classes=5, policy=policy).eval()
    torch.manual_seed(1)
    expected = net(images())
    with META:
        torch.manual_seed(1)
        torch.testing.assert_close(net(images()), expected)
        assert set(selection_of(net).last.shares()) >= {"nop"}


@pytest.mark.parametrize("wormhole", ["layer1->layer0", "layer1[t-1]->layer0", "layer1[end]->layer0"])
def test_recurrent_layers(wormhole):
    torch.manual_seed(0)
    net = RecurrentStack("gru", 3, 6, 2, wormholes=wormhole, solver="picard").eval()
    x = torch.randn(2, 7, 3)
    expected = net(x)[0]
    with META:
        found = net(x)[0]
        torch.testing.assert_close(found, expected)
        assert str(tw.report(net))
        net.train()
        net(x)[0].sum().backward()


@pytest.mark.parametrize("kind", ["verlet", "antisymmetric", "euler"])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_propagation(kind, activation):
    layers = tw.blocks.get(kind)(4, layers=3, h=0.1, activation=activation)
    x = torch.randn(2, 4)
    expected = layers(x)
    with META:
        torch.testing.assert_close(layers(x), expected)
        figures = str(tw.stability(layers, x))
    assert figures == str(tw.stability(layers, x))


@pytest.mark.parametrize("solver", tw.solvers.names())
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled", "ad_fixed_point", "phantom"])
def test_solvers_and_adjoints(solver, adjoint):
    weight = (0.5 * torch.eye(3)).requires_grad_()
    x = torch.randn(4, 3)
    with META:
        solution = tw.fix(
            lambda z, x: torch.tanh(z @ weight + x), torch.zeros_like(x), x, solver=solver, adjoint=adjoint
        )
        solution.value.sum().backward()
        assert solution.converged.all()
    assert weight.grad.device.type == "cpu" and weight.grad.abs().sum() > 0
