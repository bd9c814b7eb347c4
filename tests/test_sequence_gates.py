"""Gates of recurrent stacks: penalties that reach the loss, calibrated thresholds, refused options."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.sequence import RecurrentStack
from zoo.models import SequenceModel
from zoo.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")

PLAIN = {"solver": "picard", "adjoint": "ad_fixed_point", "tol": 1e-2, "max_iter": 3}


def sequences(batch=8, length=12, features=3, seed=0):
    return torch.randn(batch, length, features, generator=torch.Generator().manual_seed(seed))


def stack(wormholes="auto", layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return RecurrentStack("gru", 3, 8, layers, wormholes=wormholes, **options)


def images(batch=64, seed=0):
    return torch.randn(batch, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def reader(**options):
    torch.manual_seed(0)
    options = {"num_classes": 2, "in_chans": 1, "img_size": 6, "hidden": 8, **PLAIN, **options}
    return timm.create_model("twnn_gru_rows", **options)


def scattered(model, std=1.0):
    """The model with gates whose scores differ between decisions."""
    for span in model.modules():
        if isinstance(span, tw.sequence.TemporalSpan):
            nn.init.normal_(span.gate.score.weight, std=std)
    return model


def share(span):
    return float(span.decisions()[1].float().mean())


# Penalties


def test_without_penalties_there_is_nothing_to_add():
    assert stack().spans[0].decisions()[1].shape == (0,) and float(stack().auxiliary_loss()) == 0.0
    for model in (stack(()), stack(), stack(budget=0.3), stack(gate="always")):
        model.train()(sequences())
        assert model.auxiliary_loss().shape == () and float(model.auxiliary_loss()) == 0.0
    assert float(reader(wormholes=()).auxiliary_loss()) == 0.0


@pytest.mark.parametrize(
    "wormhole", ["layer1->layer0", "layer1[t-20]->layer0"]
)  # solved, and known beforehand
def test_the_auxiliary_loss_is_the_sum_of_the_gates_penalties(wormhole):
    gate = ("sigmoid", {"control": "dual", "l0": 0.5})
    model = stack([wormhole, "layer0[t-20]->layer0"], gate=gate, budget=0.3).train()
    model(sequences())
    loss = model.auxiliary_loss()
    assert torch.equal(loss, model.spans[0].gate.penalty() + model.spans[1].gate.penalty())
    assert float(loss.detach()) != 0.0
    loss.backward()
    assert all(bool(span.gate.score.bias.grad) for span in model.spans)
    copy.deepcopy(model), pickle.dumps(model)  # which hold no graph
    model.eval()(sequences())
    assert float(model.auxiliary_loss()) == 0.0


@pytest.mark.parametrize("over", ["sequence", "step"])
def test_with_windows_all_of_them_count(over):
    gate = ("sigmoid", {"l0": 0.5})
    model = scattered(stack("layer1[t-1]->layer0", gate=gate, gate_over=over, window=4, tol=1e-5)).train()
    lengths = [12, 12, 12, 12, 7, 7, 3, 0] if over == "step" else None
    model(sequences(), lengths=lengths)
    loss = model.auxiliary_loss()
    (span,) = model.spans
    assert span.decisions()[0].numel() == (65 if over == "step" else 24)
    expected = 0.5 * torch.sigmoid(span.decisions()[0]).mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_the_models_hand_it_on():
    gate = ("sigmoid", {"control": "dual"})
    model = SequenceModel(3, 2, 8, 2, wormholes="auto", gate=gate, budget=0.3).train()
    model(sequences())
    assert float(model.auxiliary_loss().detach()) != 0.0
    assert torch.equal(model.auxiliary_loss(), model.stack.auxiliary_loss())
    model = reader(gate=gate, budget=0.3).train()
    _, extra, _ = Objective(model)(images(), torch.zeros(64, dtype=torch.long))
    assert float(extra.detach()) != 0.0 and torch.equal(extra, model.auxiliary_loss())


@pytest.mark.parametrize(
    ("gate", "over", "window", "budget"),
    [("sigmoid", "sequence", None, 0.3), ("straight_through", "step", 3, 0.6)],
)
def test_the_open_share_approaches_the_budget_of_a_dual_variable(gate, over, window, budget):
    options = {"gate": (gate, {"control": "dual"}), "gate_over": over, "window": window}
    model = reader(wormholes="layer1[t-1]->layer0", budget=budget, **options).train()
    objective, steps = Objective(model), 300
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    (span,) = model.stack.spans
    for step in range(steps):
        x = images(seed=step)
        loss, _, _ = objective(x, (x.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        assert step or share(span) == 0  # a fresh gate is closed
    with torch.no_grad():
        model.eval()(images(1000, seed=steps))
    assert share(span) == pytest.approx(budget, abs=0.1)


# Thresholds from recorded scores


@pytest.mark.parametrize("options", [{}, {"gate_over": "step"}, {"gate_over": "sequence", "window": 4}])
@pytest.mark.parametrize("given", [0.25, 0.6])
def test_calibration_opens_that_share_of_the_decisions(options, given):
    model = scattered(stack("layer1[t-1]->layer0", scale=0.3, **options))
    batches = list(sequences(256).split(64))
    assert tw.calibrate(model, [(part, None) for part in batches], budget=given) is model
    assert model.training
    shares = []
    for part in batches:
        with torch.no_grad():
            model.eval()(part)
        shares.append(share(model.spans[0]))
    assert sum(shares) / 4 == pytest.approx(given, abs=0.01)
    assert model.spans[0].gate.budget == given


@pytest.mark.parametrize("given", ["1.8x", "2 rows"])
@pytest.mark.parametrize("wormholes", ["auto", ["layer1->layer0", "layer0[t-1]->layer0"]])
def test_calibration_meets_budgets_in_work(given, wormholes):
    model = scattered(stack(wormholes, scale=0.3)).eval()
    batches = list(sequences(256).split(64))
    tw.calibrate(model, batches, budget=given)
    spent = 0
    with torch.no_grad():
        for part in batches:
            model(part, keep_state=False)
            spent += sum(record.evaluations for record in model.records())
    assert spent / 256 == pytest.approx(model.spans[0].gate.replays(), rel=0.1)


def test_calibration_of_a_model_and_its_limits():
    model = scattered(reader()).eval()
    tw.calibrate(model, [images()], budget=0.25)
    model(images())
    assert share(model.stack.spans[0]) == pytest.approx(0.25, abs=0.02)
    gate = model.stack.spans[0].gate
    threshold, record = gate.threshold, model.stack.spans[0].last
    for batches, reason in (
        ([], "no batch"),
        ([{"x": images()}], "tensor, or a tuple or list that begins with one; got a dict"),
        ([({"x": images()}, None)], "tensor, or a tuple or list"),
        ([()], "tensor, or a tuple or list"),
        (3, "an iterable of batches; got a int"),
        ([images(0)], "without a single sample"),
    ):
        with pytest.raises(tw.OptionError, match=reason):
            tw.calibrate(model, batches, budget=0.5)
        assert gate.budget == 0.25 and torch.equal(gate.threshold, threshold)
    assert model.stack.spans[0].last is record
    with pytest.raises(tw.OptionError, match="share of steps"):
        tw.calibrate(stack(gate_over="step"), [sequences()], budget="2 rows")
    for model in (stack(gate_over="step"), stack(gate_over="step", budget=0.2)):
        before = model.spans[0].gate.budget
        with pytest.raises(tw.errors.OptionError, match="with gate_over='step' give the share of steps"):
            tw.configure(model, budget="2 rows")
        assert model.spans[0].gate.budget == before
        assert tw.configure(model, budget=0.4).spans[0].gate.budget == 0.4
        assert tw.configure(model, budget=None).spans[0].gate.budget is None
    assert tw.configure(stack(), budget="2 rows").spans[0].gate.budget == "2 rows"
    with pytest.raises(tw.OptionError, match="gone through only once"):
        tw.calibrate(stack(window=4), iter([sequences()]), budget=0.5)
    tw.calibrate(stack(), iter([sequences()]), budget=0.5)
    with pytest.raises(tw.AttachError, match="learned gate"):
        tw.calibrate(stack(gate="always"), [sequences()], budget=0.5)


def test_a_quantile_of_many_is_torchs_of_few():
    from twnn_plugin.backbones.calibrate import _quantile

    values = torch.randn(101)
    for at in (0.0, 0.137, 0.5, 1.0):
        torch.testing.assert_close(_quantile(values, at), torch.quantile(values, at))
    assert float(_quantile(torch.rand(1 << 25), 0.25)) == pytest.approx(0.25, abs=0.01)


# Options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gate": ("sigmoid", {"per": "channel"})}, "one strength a decision"),
        ({"gate": tw.gate("sigmoid", channels=8, per="channel", outputs=3)}, "one strength a decision"),
        ({"gate": tw.gate("sigmoid", channels=3)}, "made for states of 3 channels"),
        ({"gate": ("sigmoid", {"budget": "2 rows"}), "gate_over": "step"}, "share of steps"),
        ({"gate": 3}, "gate is a registered name"),
        ({"gate": ("sigmoid",)}, "gate is a registered name"),
        ({"wormholes": None}, "wormholes takes a string"),
        ({"wormholes": 3}, "wormholes takes a string"),
        ({"bidirectional": "x"}, "bidirectional is True or False"),
        ({"causal": "no"}, "causal is True or False"),
        ({"bias": 1}, "bias is True or False"),
        ({"wormholes": (), "budget": 5}, "budget"),
        ({"wormholes": (), "gate": 3}, "gate is a registered name"),
        ({"jacobian": 0.1}, "no option 'jacobian'"),
    ],
)
def test_impossible_options_are_refused(options, reason):
    with pytest.raises(tw.OptionError, match=reason):
        stack(**options)


def test_a_gate_is_one_wormholes():
    gate = tw.gate("sigmoid", channels=8)
    with pytest.raises(tw.OptionError, match="one SigmoidGate, and there is more than one wormhole"):
        stack(["layer1->layer0", "layer0->layer0"], gate=gate)
    assert stack(gate=gate).spans[0].gate is gate
