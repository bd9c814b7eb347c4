"""What a policy may skip, what padding must not change, what the closed loss is smoothed like."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import twnn_plugin as tw
from twnn_plugin.selection import LayerSelection, closed_loss, selection_of
from twnn_plugin.sequence import RecurrentStack
from zoo.objective import Objective


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh())


@pytest.mark.parametrize(
    ("iterated", "expected"),
    [(("s1", "s2"), ["s3", "s4"]), (("s1", "s3"), ["s2", "s3", "s4"])],
    ids=["the stage after it is one of them", "the stage after it is none of them"],
)
def test_the_controller_skips_the_stage_after_it_or_none(iterated, expected):
    torch.manual_seed(0)
    layers = {f"s{i}": layer() for i in range(1, 5)}
    policy = tw.policy("twnn_controller")
    model = LayerSelection(
        layers, nn.Linear(6, 3), torch.randn(2, 6), policy, iterated=iterated, max_choices=1
    ).eval()
    with torch.no_grad():
        policy.score.weight.zero_()
        # Of: forward; back to either; back to either and skip what follows. The second choice is back to s1.
        policy.score.bias.copy_(torch.tensor([0.0, 1.0, -9.0, 9.0, -9.0]))
    x, calls = torch.randn(2, 6), []
    model(x)
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(x)
    first, then = calls[:4], calls[4:]
    assert first == ["s1", "s2", "s3", "s4"]
    assert [name for name in then if name != "s1"] == expected


@pytest.mark.parametrize("name", ["dynalay_lstm3", "dynalay_gru3"])
def test_the_answer_on_a_document_does_not_depend_on_its_padding(name):
    torch.manual_seed(0)
    model = timm.create_model(
        name, num_classes=3, vocab_size=20, task="classification", hidden=8, policy="always", scale=1.0
    )
    model.double().eval()
    tokens = torch.randint(1, 20, (2, 4))
    with torch.no_grad():
        short = model(tokens)
        long = model(torch.cat([tokens, tokens.new_zeros(2, 300)], dim=1))
    torch.testing.assert_close(long, short, rtol=1e-12, atol=1e-12)


def test_the_closed_loss_is_smoothed_like_the_other_one():
    torch.manual_seed(0)
    model = timm.create_model("dynalay_cnn3", num_classes=5, policy="never").train()
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    total, _, _ = Objective(model, smoothing=0.3, closed_weight=0.5)(images, targets)
    closed = selection_of(model).last.closed
    alone, _, _ = Objective(model, smoothing=0.3)(images, targets)
    smoothed = F.cross_entropy(closed, targets, label_smoothing=0.3)
    torch.testing.assert_close(total - alone, 0.5 * smoothed)
    with pytest.raises(tw.OptionError, match="smoothing"):
        closed_loss(selection_of(model).last, targets, smoothing=1.5)


def test_no_sequences_have_no_lengths():
    stack = RecurrentStack("gru", 3, 4, num_layers=2, wormholes="layer1->layer0").eval()
    out, _ = stack(torch.zeros(0, 6, 3), lengths=[])
    assert out.shape == (0, 6, 4)
