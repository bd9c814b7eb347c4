"""Gates: what they let in, sample by sample and channel by channel."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw

Wormhole = tw.blocks.get("wormhole")
LEARNED = ("straight_through", "sigmoid", "hard_concrete")


def features(rows=64, channels=8, seed=0):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def gate_at(name, score, **options):
    """A gate whose score is the given number for every sample."""
    gate = tw.gate(name, channels=8, **options)
    nn.init.zeros_(gate.score.weight)
    nn.init.constant_(gate.score.bias, score)
    return gate


def test_hard_concrete_has_an_exact_zero_and_an_exact_one_in_eval_mode():
    for score, expected in ((-3.0, 0.0), (-1e-3, 0.0), (1e-3, None), (2.0, None), (4.9, 1.0), (9.0, 1.0)):
        with torch.no_grad():
            out = gate_at("hard_concrete", score).eval()(features())
        assert bool(out.open.all()) == (score > 0) and bool((out.strength[0] == out.strength).all())
        if score > 0:
            stretched = 1 / (1 + math.exp(-(score + math.log(1 / 11)))) * 1.2 - 0.1
            assert float(out.strength[0]) == pytest.approx(min(stretched, 1.0), abs=1e-6)
            assert expected is None or float(out.strength[0]) == expected


def test_hard_concrete_draws_from_its_distribution_in_training():
    torch.manual_seed(0)
    gate = gate_at("hard_concrete", 2.4, l0=0.7).train()
    out = gate(features(20000))
    # Louizos et al. (2018), equation 12: P(z > 0).
    opened = 1 / (1 + math.exp(-(2.4 - math.log(11) + 2 / 3 * math.log(11))))
    assert float(out.open.float().mean()) == pytest.approx(opened, abs=0.01)
    assert float(out.probability[0]) == pytest.approx(opened, abs=1e-5)
    assert float(gate.penalty()) == pytest.approx(0.7 * opened, abs=1e-5)
    # The stretch is symmetric, so that at log alpha = 0 as many are one as are zero.
    symmetric = gate_at("hard_concrete", math.log(11)).train()(features(20000))
    ones, zeros = (symmetric.strength == 1).float().mean(), (~symmetric.open).float().mean()
    assert abs(float(ones - zeros)) < 0.01 and float(ones) > 0.1
    torch.manual_seed(3)
    a = gate(features()).strength
    torch.manual_seed(3)
    assert torch.equal(a, gate(features()).strength)
    assert not torch.equal(a, gate(features()).strength)


def test_the_penalty_of_hard_concrete_closes_it():
    torch.manual_seed(0)
    gate = tw.gate("hard_concrete", channels=8, bias=2.0, l0=1.0).train()
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(150):
        gate(features())
        optimizer.zero_grad()
        gate.penalty().backward()
        optimizer.step()
    assert not bool(gate.eval()(features()).open.any()) and gate.penalty() is None


@pytest.mark.parametrize("name", LEARNED)
def test_a_gate_for_each_channel(name):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 5, 5)
    body = nn.Sequential(nn.Conv2d(4, 7, 3, padding=1), nn.Tanh(), nn.Conv2d(7, 7, 3, padding=1))
    block = Wormhole(body, x, gate=(name, {"per": "channel", "bias": 0.0}), tol=1e-5, max_iter=100).eval()
    assert block.feedback.gate.score.out_features == 4  # the channels that the message enters
    nn.init.normal_(block.feedback.gate.score.weight, std=1.0)
    with torch.no_grad():
        z = block(x)
        out = body(x)
        opinion = block.feedback.gate(torch.cat([out.mean((2, 3)), out.amax((2, 3))], dim=1))
        assert opinion.strength.shape == (6, 4)
        assert bool((opinion.strength == 0).any()) or name == "sigmoid"
        opened = opinion.open
        assert torch.equal(opened, block.last.open)
        message = block.feedback.message(z, x.shape) * (opinion.strength * opened[:, None])[:, :, None, None]
        assert torch.allclose(body(x + message), z, atol=1e-3)
        assert torch.equal(z[~opened], body(x)[~opened])
    block.train()
    block(x).square().sum().backward()
    assert bool(block.feedback.gate.score.weight.grad.any())
    assert bool(block.feedback.message.project.weight.grad.any())


def test_a_gate_for_each_channel_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(3, 4).double()
    block = Wormhole(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double(),
        x,
        gate=("sigmoid", {"per": "channel"}),
        policy=tw.policy("always"),
        tol=1e-12,
        max_iter=200,
        scale=0.3,
    ).double()
    weight = block.feedback.gate.score.weight.detach().clone().requires_grad_()

    def value(w):
        return torch.func.functional_call(block, {"feedback.gate.score.weight": w}, (x,))

    assert torch.autograd.gradcheck(value, (weight,), atol=1e-6)


def test_a_gate_of_the_wrong_shape_is_named():
    class Wrong(tw.gates.Gate):
        def forward(self, features):
            one = torch.ones(features.shape[0], 3)
            return tw.gates.GateOutput(one, one, one[:, 0] > 0)

    block = Wormhole(nn.Linear(4, 4), torch.randn(2, 4), gate=Wrong())
    with pytest.raises(tw.OptionError, match=r"Wrong of span 'body->body' must give .* \(2, 4\)"):
        block(torch.randn(2, 4))


@pytest.mark.parametrize("name", LEARNED)
def test_threshold_and_temperature_can_be_changed_after_training(name):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    block = Wormhole(nn.Linear(6, 6), x, gate=name).eval()
    shares = []
    for threshold in (3.0, -2.0, -9.0):
        tw.configure(block, threshold=threshold, temperature=0.5)
        with torch.no_grad():
            block(x)
        shares.append(float(block.last.open.float().mean()))
    assert shares[0] == 0 and 0 < shares[1] < 1 and shares[2] == 1
    assert block.feedback.gate.temperature == 0.5
    again = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    assert float(again.feedback.gate.threshold) == -9.0
    with pytest.raises(tw.OptionError, match="positive"):
        tw.configure(block, temperature=-1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "chanel"}, "Did you mean 'channel'"),
        ({"control": "duel"}, "Did you mean 'dual'"),
        ({"budget": "1.2y"}, "multiply-adds"),
        ({"budget": "0.9x"}, "multiply-adds"),
        ({"budget": True}, "share of open samples"),
        ({"momentum": 0.0}, "momentum"),
        ({"dual_bound": -1.0}, "dual_bound"),
        ({"l0": -1.0}, "l0"),
        ({"tmperature": 1.0}, "Did you mean 'temperature'"),
        ({"hidden": "a"}, "hidden must be a whole number"),
        ({"hidden": 0}, "hidden must be a whole number"),
        ({"bias": "a"}, "bias is its initial score"),
        ({"bias": float("nan")}, "bias is its initial score"),
        ({"momentum": "a"}, "momentum"),
        ({"l0": "a"}, "l0"),
        ({"outputs": 7}, "Leave outputs out"),
        ({"per": "channel", "outputs": 0}, "outputs must be a whole number"),
    ],
)
def test_bad_options(options, message):
    for name in LEARNED:
        with pytest.raises(tw.OptionError, match=message):
            tw.gate(name, channels=8, **options)


@pytest.mark.parametrize("channels", [0, 2.0, "a", True])
def test_channels_that_are_none(channels):
    with pytest.raises(tw.OptionError, match="channels must be a whole number"):
        tw.gate("sigmoid", channels=channels)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (tw.gate("sigmoid", channels=3), "made for states of 3 channels, and the wormhole's source has 6"),
        (tw.gate("sigmoid", channels=6, per="channel"), "messages of 6 channels, and the wormhole's has 4"),
        (("sigmoid", {"per": "channel", "outputs": 7}), "messages of 7 channels, and the wormhole's has 4"),
        (3, "gate is a registered name"),
        (("sigmoid", 3), "gate is a registered name"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused_when_the_wormhole_is_built(gate, message):
    with pytest.raises(tw.OptionError, match=message):
        Wormhole(nn.Linear(4, 6), torch.randn(2, 4), gate=gate)


def test_a_gate_of_another_size_and_one_for_several_wormholes_are_refused_by_attach():
    def attached(wormholes, gate):
        model = timm.create_model("resnet10t", num_classes=5)
        return tw.attach(model, wormholes, gate=gate)

    with pytest.raises(tw.OptionError, match="made for states of 3 channels"):
        attached("layer4->layer3", tw.gate("sigmoid", channels=3))
    gate = tw.gate("sigmoid", channels=512)
    with pytest.raises(tw.OptionError, match="one SigmoidGate, and there"):
        attached(["layer4->layer3", "layer4->layer4"], gate)
    assert attached("layer4->layer3", gate).wormholes[0].feedback.gate is gate
