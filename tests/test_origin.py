"""Weights of a wormhole are those of its span, and of no other."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import twnn_plugin  # noqa: F401 - registers the models
from twnn_plugin.sequence import RecurrentStack


def vit(wormholes):
    return timm.create_model("twnn_vit_tiny_patch16_224", img_size=32, num_classes=3, wormholes=wormholes)


def test_weights_of_another_span_of_the_same_shapes_are_refused_and_nothing_of_them_is_loaded():
    saved, model = vit("blocks.11->blocks.8").state_dict(), vit("blocks.11->blocks.4")
    before = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("wormholes.")}
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"'blocks.11->blocks.8', and this one is 'blocks.11->blocks.4'"
        ):
            model.load_state_dict(saved, strict=strict)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_wormholes_in_another_order_are_refused():
    spans = ("blocks.3->blocks.1", "blocks.9->blocks.7")
    with pytest.raises(RuntimeError, match="in their order"):
        vit(spans[::-1]).load_state_dict(vit(spans).state_dict())


def test_weights_without_a_name_are_taken():
    saved, model = vit("blocks.11->blocks.8").state_dict(), vit("blocks.11->blocks.4")
    unnamed = {key: value for key, value in saved.items() if not key.endswith("_extra_state")}
    assert len(unnamed) == len(saved) - 1
    model.load_state_dict(unnamed)
    key = "wormholes.0.feedback.message.project.weight"
    assert torch.equal(model.state_dict()[key], saved[key])


def test_the_name_goes_through_files(tmp_path):
    saved, model = vit("blocks.11->blocks.8").state_dict(), vit("blocks.11->blocks.4")
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    save_file(saved, tmp_path / "model.safetensors")
    for loaded in (torch.load(file, weights_only=True), load_file(tmp_path / "model.safetensors")):
        vit("blocks.11->blocks.8").load_state_dict(loaded)
        with pytest.raises(RuntimeError, match="not loaded"):
            model.load_state_dict(loaded)


def test_a_wormhole_through_time_knows_its_layers():
    def made(span):
        return RecurrentStack("gru", 4, 4, num_layers=3, wormholes=span)

    saved = made("layer1->layer0").state_dict()
    made("layer1->layer0").load_state_dict(saved)
    with pytest.raises(RuntimeError, match="not loaded"):
        made("layer2->layer0").load_state_dict(saved)


@pytest.mark.parametrize("cast", [torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double])
def test_the_name_survives_casts_and_averages(cast):
    model = vit("blocks.11->blocks.8")
    saved = {key: cast(value) for key, value in model.state_dict().items()}
    model.load_state_dict({key: (value + value) / 2 for key, value in saved.items()})
    with pytest.raises(RuntimeError, match="not loaded"):
        vit("blocks.11->blocks.4").load_state_dict(saved)
    key = "wormholes.0.feedback._extra_state"
    vit("blocks.11->blocks.4").load_state_dict({**saved, key: saved[key] + 0.5})  # no name any more


@pytest.mark.parametrize(
    ("name", "span", "features"),
    [
        ("convnext_atto", "stages.3->stages.2", {}),
        ("convnext_atto", "stages.3->stages.2", {"feature_cls": "getter"}),
        ("resnet10t", "layer4->layer3", {"feature_cls": "getter"}),
        ("resnet10t", "layer4->layer3", {"feature_cls": "hook"}),
    ],
)
def test_weights_of_a_whole_model_are_those_of_its_features(tmp_path, name, span, features):
    model = timm.create_model(f"twnn_{name}", num_classes=3, wormholes=span)
    timm.models.save_for_hf(model, tmp_path, model_args={"wormholes": span})
    made = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, **features)
    (scale,) = (value for key, value in made.named_parameters() if key.endswith("message.scale"))
    assert torch.equal(scale, model.wormholes[0].feedback.message.scale)
