"""A module on the way of a message, in wormholes attached to models and in the block."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw

from .families import FAMILIES


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def verlet(channels: int) -> nn.Module:
    return tw.blocks.get("verlet")(channels, layers=2, kernel_size=3)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("resnet", "verlet"),
        ("resnet", ("antisymmetric", {"layers": 3, "kernel_size": 3})),
        ("resnet", verlet),
        ("convnext", nn.Softsign()),
        ("vit", ("euler", {"layers": 2})),
    ],
)
def test_a_message_goes_through_it_and_teaches_it(key, message):
    family = FAMILIES[key]
    given = dict(policy="always", tol=1e-8, max_iter=80)
    torch.manual_seed(0)
    model = family.twnn(message=message, **given).double().eval()
    path = model.wormholes[0].feedback.message.path
    assert isinstance(path, nn.Module)
    out = model(family.images().double())
    assert (tw.report(model)[0].status == 0).all()
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in path.parameters())
    # The settled value is a fixed point of the span with the message through the path.
    with torch.no_grad():
        before = model(family.images().double())
        model.wormholes[0].feedback.message.path = None
        assert not torch.allclose(model(family.images().double()), before, rtol=1e-6)


def test_the_block_takes_the_same():
    torch.manual_seed(0)
    body, x = nn.Linear(6, 6), torch.randn(4, 6)
    for message in ("verlet", ("verlet", {"layers": 3}), lambda c: nn.Linear(c, c), nn.Tanh()):
        wormhole = tw.blocks.get("wormhole")(body, x, gate="always", message=message, scale=0.05)
        assert wormhole(x).shape == (4, 6) and isinstance(wormhole.feedback.message.path, nn.Module)


def test_each_wormhole_has_a_path_of_its_own():
    model = FAMILIES["resnet"].twnn(["layer4->layer3", "layer1->layer1"], message="verlet")
    first, second = (span.feedback.message.path for span in tw.spans(model))
    assert first is not second and first.features != second.features


@pytest.mark.parametrize(
    ("message", "error", "said"),
    [
        ("verlett", tw.UnknownNameError, "Did you mean 'verlet'"),
        ("fpi", tw.OptionError, "Those that do: antisymmetric, euler, verlet"),
        (("verlet", {"layerz": 3}), tw.OptionError, "Did you mean 'layers'"),
        (("verlet", 3), tw.OptionError, "name of a block"),
        (3, tw.OptionError, "name of a block"),
        (lambda channels: None, tw.OptionError, "must return a module"),
        (nn.Linear(3, 3), tw.AttachError, "layer4->layer3.*cannot take a state"),
        (nn.Flatten(), tw.AttachError, "to one of the same shape"),
        (Mixing(), tw.AttachError, "among others than alone"),
        (nn.BatchNorm2d(32), tw.OptionError, "another map"),
        (timm.layers.DropPath(0.5), tw.OptionError, "draws random numbers in training"),
        (nn.InstanceNorm2d(32, track_running_stats=True), tw.OptionError, "changes a buffer"),
    ],
)
def test_what_no_message_can_go_through_is_refused_when_it_is_attached(message, error, said):
    family = FAMILIES["resnet"]
    model = family.plain()
    keys = list(model.state_dict())
    with pytest.raises(error, match=said):
        tw.attach(model, wormholes=family.span, message=message)
    assert list(model.state_dict()) == keys and not hasattr(model, "wormholes")
    tw.attach(model, wormholes=family.span)  # nothing is lost


def test_a_refused_path_is_left_as_it_was():
    path = nn.InstanceNorm2d(32, track_running_stats=True).eval()
    before = path.running_mean.clone()
    with pytest.raises(tw.OptionError):
        FAMILIES["resnet"].twnn(message=path)
    assert torch.equal(path.running_mean, before) and not path.training


def test_one_module_is_not_shared_and_has_no_bound():
    family = FAMILIES["resnet"]
    with pytest.raises(tw.OptionError, match="there are 2 wormholes"):
        family.twnn(["layer4->layer3", "layer1->layer1"], message=nn.Tanh())
    with pytest.raises(tw.OptionError, match="contraction"):
        family.twnn(message="verlet", contraction=0.5)
    with pytest.raises(TypeError, match="Did you mean 'message'"):
        timm.create_model("twnn_test_resnet", mesage="verlet")


def test_it_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    given = dict(message=("verlet", {"layers": 3, "kernel_size": 3}), policy="always")
    model = timm.create_model("twnn_test_resnet", num_classes=4, wormholes="layer3->layer2", **given).eval()
    timm.models.save_for_hf(model, str(tmp_path), model_args={**given, "wormholes": "layer3->layer2"})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.wormholes[0].feedback.message.path.layers == 3
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and tw.report(again)[0].open.all()
