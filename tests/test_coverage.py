"""One architecture of every timm model file: it takes a wormhole, and closed it is the plain network.

Small ones are built and run; of the others, shapes and dataflow are looked at on the meta device, and
``python -m benchmarks coverage`` runs them for real.
"""

from __future__ import annotations

import pytest
import timm
import torch

import twnn_plugin as tw
from benchmarks.covering.measure import architectures, classify
from benchmarks.covering.representatives import REPRESENTATIVES
from twnn_plugin.backbones.timm_adapter import TimmBackbone
from twnn_plugin.trees import leaves

REAL = {  # files whose smallest architecture takes a second or less
    "byobnet",
    "convit",
    "convnext",
    "cpubone",
    "cspnet",
    "dla",
    "edgenext",
    "efficientnet",
    "efficientvim",
    "efficientvit_mit",
    "fasternet",
    "fastvit",
    "hardcorenas",
    "hgnet",
    "hrnet",
    "inception_next",
    "mambaout",
    "maxxvit",
    "metaformer",
    "mobilenetv3",
    "mobilevit",
    "nfnet",
    "pvt_v2",
    "regnet",
    "resnest",
    "resnet",
    "resnetv2",
    "senet",
    "shvit",
    "sknet",
    "starnet",
    "visformer",
    "vision_transformer",
    "vision_transformer_relpos",
    "vovnet",
}
STILL = 1e-4  # a fresh network's layer scales can hide a message in rounding
"""Relative changes of the output below this say nothing of it."""


def test_every_model_file_has_its_representative():
    found = architectures()
    assert set(REPRESENTATIVES) == set(found)
    assert all(name in found[file] for file, name in REPRESENTATIVES.items())
    assert set(REPRESENTATIVES) >= REAL


def flat(value) -> torch.Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves(value) if isinstance(leaf, torch.Tensor)])


def images_for(model: torch.nn.Module, backbone: TimmBackbone, batch: int) -> torch.Tensor:
    for images, *_ in backbone.examples(model, (batch,)):
        try:
            with torch.no_grad():
                model(images)
        except Exception:
            continue
        return images
    raise AssertionError("no image fits")


@pytest.mark.parametrize("file", sorted(REAL))
def test_a_representative_takes_a_wormhole(file):
    torch.manual_seed(0)
    model = timm.create_model(REPRESENTATIVES[file]).eval()
    backbone = TimmBackbone()
    images = images_for(model, backbone, 4)
    with torch.no_grad():
        plain = flat(model(images[:2]))
    checkpoint = {key: value.clone() for key, value in model.state_dict().items()}
    stages = [stage.name for stage in backbone.stages(model)]
    tw.attach(model, wormholes=f"{stages[-1]}->{stages[1]}", scale=1e-3)

    # Closed it is the plain network, and the plain network's checkpoint is its own.
    assert [key for key in model.state_dict() if not key.startswith("wormholes.")] == list(checkpoint)
    model.load_state_dict(checkpoint, strict=True)
    with torch.no_grad():
        assert torch.equal(flat(model(images[:2])), plain)
        # Open, a small message moves it a little, and finitely.
        tw.configure(model, policy="always", tol=1e-6, max_iter=60)
        opened = flat(model(images[:2]))
    (record,) = tw.report(model)
    moved = float((opened - plain).norm() / plain.norm().clamp_min(1e-12))
    assert bool(record.open.all()) and bool(torch.isfinite(opened).all())
    assert moved < 0.2
    if not bool(record.fallback.any()):
        assert int(record.steps.max()) > 1 or moved < STILL

    # In training every part of the wormhole has a gradient, though it is closed.
    tw.configure(model, policy="gate", tol=1e-3, max_iter=30)
    flat(model.train()(images)).square().sum().backward()
    parameters = dict(model.wormholes.named_parameters())
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters.values())


@pytest.mark.parametrize("file", sorted(set(REPRESENTATIVES) - REAL))
def test_a_representative_takes_a_wormhole_on_the_meta_device(file):
    found = classify(REPRESENTATIVES[file])
    assert found["kind"] == "rule" or (found["fallback"] and found["reason"])
    assert found["auto"]
