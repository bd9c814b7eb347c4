"""The user states what may be spent, and gets it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import twnn_plugin as tw

Wormhole = tw.blocks.get("wormhole")


def train(gate, steps, benefit, seed=0):
    """A gate alone, against a stand-in for the loss: opening a sample lowers it by its benefit."""
    torch.manual_seed(seed)
    gate.train()
    optimizer = torch.optim.Adam(gate.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        features = torch.randn(64, 16)
        opinion = gate(features)
        loss = -(benefit(features) * opinion.probability).mean()
        penalty = gate.penalty()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return gate.eval()(torch.randn(8000, 16)).open.float().mean().item()


BENEFITS = {
    "mixed": lambda x: x[:, 0] + 0.5 * torch.randn(64),
    "none": lambda x: 0.1 * x[:, 0] - 0.1,  # left alone the gate would close
    "great": lambda x: 3 * x[:, 0] + 1.5,  # left alone it would open for most
}


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("name", ["straight_through", "hard_concrete"])
def test_the_threshold_keeps_the_share_within_two_points(name, budget):
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        found.append(train(tw.gate(name, channels=16, budget=budget), 400, BENEFITS["mixed"], seed) - budget)
    # The threshold is a mean over some 20 batches of 64: a single one is off by 1.5 points as a rule.
    assert abs(sum(found)) / len(found) < 0.02


@pytest.mark.parametrize(("budget", "benefit"), [(0.1, "great"), (0.6, "none")])
def test_the_dual_variable_keeps_the_share_within_three_points(budget, benefit):
    torch.manual_seed(0)
    gate = tw.gate("straight_through", channels=16, budget=budget, control="dual")
    assert abs(train(gate, 1500, BENEFITS[benefit]) - budget) < 0.03
    dual = float(gate.dual)
    assert abs(dual) < gate.dual_bound and (dual > 0) == (benefit != "none")


def test_the_dual_variable_winds_up_to_its_bound_and_no_further_and_comes_back():
    gate = tw.gate("straight_through", channels=16, budget=0.3, control="dual").train()
    nn.init.constant_(gate.score.bias, 5.0)
    for _ in range(1000):  # open whatever it costs, for the weights do not move
        gate(torch.randn(64, 16))
    assert float(gate.dual) == gate.dual_bound and float(gate.integral) == gate.dual_bound
    nn.init.constant_(gate.score.bias, -5.0)
    steps = 0
    while float(gate.dual) > 0:
        gate(torch.randn(64, 16))
        steps += 1
    assert steps < 700  # a thousand steps of windup would take two thousand to undo
    far = gate.penalty()
    gate.zero_grad()
    far.backward()  # and it can still be felt far from the threshold
    assert float(gate.score.bias.grad.abs()) > 0.04 * float(gate.dual.abs())


def test_what_keeps_the_budget_is_in_the_checkpoint():
    torch.manual_seed(0)
    gate = tw.gate("straight_through", channels=16, budget=0.3, control="dual").train()
    for _ in range(20):
        gate(torch.randn(64, 16))
    twin = tw.gate("straight_through", channels=16, budget=0.3, control="dual").train()
    twin.load_state_dict(gate.state_dict())
    x = torch.randn(64, 16)
    gate(x), twin(x)
    assert float(gate.dual) == float(twin.dual) != 0 and torch.equal(gate.penalty(), twin.penalty())


def test_a_budget_in_multiply_adds_knows_what_a_replay_costs():
    torch.manual_seed(0)
    model = timm.create_model("twnn_resnet18", num_classes=5, wormholes="layer4->layer3", budget="1.2x")
    gate = model.wormholes[0].feedback.gate
    assert tw.report(model) == []
    x, plain = torch.randn(2, 3, 64, 64), timm.create_model("resnet18", num_classes=5).eval()
    counts = []
    for part in (plain, nn.Sequential(plain.layer3, plain.layer4)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(x if part is plain else torch.zeros(2, 128, 8, 8))
        counts.append(counter.get_total_flops() / 2)
    message = 2 * 512 * 128 * 2 * 2
    assert float(gate.price) == pytest.approx((counts[1] + message) / counts[0], rel=1e-6)
    gate.effort.fill_(4.0)
    assert gate.wanted() == pytest.approx(0.2 / (4 * float(gate.price)))
    tw.configure(model, budget="2 rows")
    assert gate.wanted() == pytest.approx(2 / 4) and gate.share() == gate.wanted()
    tw.configure(model, budget=0.25)
    assert gate.wanted() == 0.25


def test_several_wormholes_share_a_budget_in_multiply_adds():
    model = timm.create_model(
        "twnn_resnet18", num_classes=5, wormholes=["layer4->layer4", "layer2->layer2"], budget="1.2x"
    )
    alone = timm.create_model("twnn_resnet18", num_classes=5, wormholes="layer4->layer4", budget="1.2x")
    price = [float(part.feedback.gate.price) for part in (*model.wormholes, *alone.wormholes)]
    assert price[0] == pytest.approx(2 * price[2])


def test_calibration_meets_shares_and_costs_on_the_data_at_hand():
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    body = nn.Sequential(tw.contractive(nn.Linear(8, 8), 0.95), nn.Tanh())
    block = Wormhole(
        body, x, gate=("straight_through", {"budget": 0.3}), contraction=0.9, scale=0.9, tol=1e-4
    )
    nn.init.normal_(block.feedback.gate.score.weight, std=1.0)
    batches = list(x.split(100))

    def measured():
        opened, spent = 0, 0
        for part in batches:
            with torch.no_grad():
                block.eval()(part)
            opened, spent = opened + int(block.last.open.sum()), spent + block.last.evaluations
        return opened / 400, spent / 400

    tw.calibrate(block, batches)
    assert measured()[0] == pytest.approx(0.3, abs=0.005)
    tw.calibrate(block, [(part, None) for part in batches], budget="2.5 rows")
    assert measured()[1] == pytest.approx(2.5, rel=0.05)
    tw.calibrate(block, batches, budget="1.8x")
    price = float(block.feedback.gate.price)
    assert price == pytest.approx(2.0)  # the message costs what the body does
    assert 1 + price * measured()[1] == pytest.approx(1.8, rel=0.05)
    with pytest.raises(tw.OptionError, match="no batch"):
        tw.calibrate(block, [])
    with pytest.raises(tw.AttachError, match="learned gate"):
        tw.calibrate(Wormhole(body, x, gate="always"), batches)
    with pytest.raises(tw.OptionError, match="no budget"):
        tw.calibrate(Wormhole(body, x), batches)
