"""``dynalay_`` models saved and loaded again: by timm's folders, by files, with other options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.selection import LayerSelection, selection_of

NAME = "dynalay_resnet8_cifar"
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": (NAME, {}),
    "vit": ("dynalay_vit_tiny_patch16_224", {"img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 2}),
    "cnn3": ("dynalay_cnn3", {"widths": (4, 6, 8)}),
}


def _trained(key: str = "resnet", **options: Any) -> Any:
    """Every weight, that of the two heads included, is another than at the start."""
    name, own = NETS[key]
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **own, **options)
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return net.eval()


def _selection(model: nn.Module) -> LayerSelection:
    found = selection_of(model)
    assert found is not None
    return found


def _images(channels: int = 3) -> Tensor:
    return torch.randn(6, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def _from_file(path: Path, net: nn.Module, name: str = NAME, **options: Any) -> Any:
    torch.save(net.state_dict(), path)
    torch.manual_seed(1)
    overlay = {"file": str(path), "num_classes": 5}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": 5, **options}
    ).eval()


@pytest.mark.parametrize("options", [{}, {"open_head": True, "message": "mixer", "fpi_layers": [2]}])
@pytest.mark.parametrize("key", NETS)
def test_a_folder(key: str, options: dict[str, Any], tmp_path: Path) -> None:
    if "fpi_layers" in options:
        options = {**options, "fpi_layers": [_selection(_trained(key)).iterated[2]]}
    net = _trained(key, **options)
    timm.models.save_for_hf(net, str(tmp_path), safe_serialization="both")
    torch.manual_seed(1)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert _same(again, net) and _selection(again).iterated == _selection(net).iterated
    for policy in (None, "always"):
        if policy is not None:
            tw.configure(again, policy=policy)
            tw.configure(net, policy=policy)
        assert torch.equal(again(_images()), net(_images()))
    assert again.pretrained_cfg["architecture"] == NETS[key][0]
    assert again.pretrained_cfg["source"] == "local-dir"
    kept = [again.pretrained_cfg, getattr(again, "backbone", again).pretrained_cfg]
    assert not any(config.get("state_dict") for config in kept)  # weights in a description


def test_a_file_and_a_state_in_memory(tmp_path: Path) -> None:
    net = _trained(open_head=True)
    again = _from_file(tmp_path / "net.pth", net, open_head=True)
    assert _same(again, net) and torch.equal(again(_images()), net(_images()))
    overlay = {"state_dict": net.state_dict(), "num_classes": 5}
    again = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, open_head=True
    )
    assert _same(again, net)


def test_a_plain_backbones_file_leaves_the_selection_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = timm.create_model("resnet8_cifar", num_classes=5).eval()
    again = _from_file(tmp_path / "plain.pth", plain, policy="never")
    assert _same(again.backbone, plain) and torch.equal(again(_images()), plain(_images()))
    timm.models.save_for_hf(_trained(fpi_layers=()), str(tmp_path / "none"))
    none = timm.create_model(f"local-dir:{tmp_path / 'none'}", pretrained=True)
    assert selection_of(none) is None


@pytest.mark.parametrize("key", NETS)
@pytest.mark.parametrize("classes", [3, 0])
def test_another_number_of_classes(key: str, classes: int, tmp_path: Path) -> None:
    net = _trained(key, open_head=True)
    timm.models.save_for_hf(net, str(tmp_path))
    torch.manual_seed(1)
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes).eval()
    assert again(_images()).shape == (6, classes or net.num_features)
    saved, loaded = net.state_dict(), again.state_dict()
    fitting = [name for name, value in loaded.items() if saved[name].shape == value.shape]
    assert all(torch.equal(loaded[name], saved[name]) for name in fitting)
    fresh = set(loaded) - set(fitting)
    assert len(fresh) == (4 if classes else 0)  # weights and biases of two classifiers


def test_a_classifier_of_text_with_other_labels(tmp_path: Path) -> None:
    options = {"task": "classification", "vocab_size": 9, "hidden": 8, "open_head": True}
    net = timm.create_model("dynalay_lstm3", num_classes=5, **options)
    timm.models.save_for_hf(net, str(tmp_path))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert again(torch.ones(2, 4, dtype=torch.long)).shape == (2, 3)
    mine, theirs = again.state_dict(), net.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine if ".fc." not in key)


def test_other_channels(tmp_path: Path) -> None:
    net = _trained()
    timm.models.save_for_hf(net, str(tmp_path))
    again: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    assert again(_images(1)).shape == (6, 5)
    assert torch.equal(again.backbone.layer2[0].conv1.weight, net.backbone.layer2[0].conv1.weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fpi_layers": "layer3"}, "Unexpected key"),
        ({"fpi_layers": ()}, "fpi_layers is empty"),
        ({"policy": "never"}, "policy.body"),
        ({}, "open_head"),
        ({"open_head": True, "message": "mixer"}, "Missing key"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(tw.AttachError, match=rf"saved selection does not fit.*{said}.*model_args"):
        _from_file(tmp_path / "net.pth", _trained(open_head=True), **options)


def test_an_open_head_comes_and_goes(tmp_path: Path) -> None:
    with_head, without = _trained(open_head=True), _trained()
    closed = _from_file(tmp_path / "net.pth", with_head, open_head=False)
    assert _selection(closed).open_head is None and _same(closed.backbone, with_head.backbone)
    opened = _from_file(tmp_path / "plain.pth", without, open_head=True)
    head = _selection(opened).open_head
    assert head is not None  # a copy of the other one
    assert any(torch.equal(p, without.backbone.fc.weight) for p in head.parameters())
