"""``wormholes="auto"`` takes a span that computes something, whatever a model declares for its stages."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import twnn_plugin as tw


class Declared(nn.Module):
    """As timm's VGG: what is declared for a stage is the activation, or the pooling, that ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 16, 16)}
        layers: list[nn.Module] = []
        for before, after in ((3, 8), (8, 8), (8, 8)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.feature_info = [
            {"num_chs": 8, "reduction": 1, "module": "features.1"},
            {"num_chs": 8, "reduction": 2, "module": "features.4"},
            {"num_chs": 8, "reduction": 4, "module": "features.7"},
            {"num_chs": 8, "reduction": 8, "module": "features.8"},
        ]
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Blocks(Declared):
    """As timm's NASNet: the stages end within blocks, the last one with an activation of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.cell_0, self.cell_1 = (nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))
        self.act = nn.ReLU()
        del self.features
        names = ("stem", "cell_0.0", "act")
        self.feature_info = [{"num_chs": 8, "reduction": 2, "module": name} for name in names]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.cell_0(x)
        x = x + self.cell_1(x)
        return self.head(self.act(x).mean((2, 3)))


def span_of(model: nn.Module) -> str:
    tw.attach(model, wormholes="auto")
    return str(model.wormholes[0].feedback.span)


def test_a_stage_that_is_an_activation_alone_is_not_iterated_by_itself():
    model = Declared()
    assert span_of(model) == "features.7->features.4"
    tw.configure(model, policy="always", max_iter=5)
    model.eval()(torch.randn(2, 3, 16, 16))
    assert tw.report(model)[0].multiply_adds > 0


def test_blocks_of_the_model_take_the_place_of_stages_that_compute_nothing():
    assert span_of(Blocks()) == "cell_1->cell_1"  # what is added between cells is no module's


@pytest.mark.parametrize("name, span", [("legacy_xception", "conv4->conv3"), ("resnet10t", "layer4->layer3")])
def test_timms_own(name, span):
    assert span_of(timm.create_model(name)) == span
