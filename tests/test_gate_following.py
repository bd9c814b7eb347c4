"""A gate whose threshold goes after the wanted share in eval mode, on samples as they arrive."""

import copy

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.gates.following import followed

KINDS = ["straight_through", "sigmoid", "hard_concrete"]


def gate(kind="straight_through", **options):
    torch.manual_seed(0)
    made = tw.gates.get(kind)(channels=6, **{"budget": 0.25, "follow": 0.02, **options})
    nn.init.normal_(made.score.weight, std=0.5)
    return made.eval()


def arrive(made, batches, size, shift=0.0):
    """The open share of samples whose features are not like those of any training."""
    torch.manual_seed(1)
    with torch.no_grad():
        opened = [made(torch.randn(size, made.hidden.in_features) + shift).open for _ in range(batches)]
    return torch.cat(opened).float()


def images(size=8):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def model(**options):
    torch.manual_seed(0)
    made = timm.create_model("twnn_resnet10t", num_classes=4, **options)
    nn.init.normal_(tw.spans(made)[0].feedback.gate.score.weight, std=0.5)
    return made.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batches", "size"), [(2000, 1), (300, 8), (60, 64), (20, 512)])
def test_the_share_is_met_whatever_the_size_of_the_batches(kind, batches, size):
    opened = arrive(gate(kind), batches, size)
    assert opened[len(opened) // 4 :].mean() == pytest.approx(0.25, abs=0.02)


def test_without_it_the_threshold_stands_still():
    made = gate(follow=None)
    before = made.threshold.clone()
    assert arrive(made, 10, 8).mean() == 0
    assert torch.equal(made.threshold, before)


def test_it_goes_after_samples_that_change():
    torch.manual_seed(3)
    threshold, spread, opened = torch.zeros(()), torch.tensor(-1.0), []
    for done in range(4000):
        score = torch.randn(2) * (1.0 if done < 2000 else 3.0) + (0.0 if done < 2000 else 5.0)
        opened.append((score > threshold).float())
        threshold, spread = followed(threshold, spread, score, 0.3, 0.02)
    first, second = torch.cat(opened).view(2, -1)
    assert first[400:].mean() == pytest.approx(0.3, abs=0.02)
    assert second[400:].mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("wanted", [0.0, 1.0])
def test_it_stays_among_the_scores(wanted):
    threshold, spread = torch.zeros(()), torch.tensor(-1.0)
    for _ in range(3000):
        threshold, spread = followed(threshold, spread, torch.linspace(-1, 1, 4), wanted, 0.05)
    assert threshold.abs() < 2.5


def test_equal_scores_can_be_left():
    threshold, spread, opened = torch.zeros(()), torch.tensor(-1.0), 0.0
    for _ in range(4000):
        opened += float(threshold < 0)
        threshold, spread = followed(threshold, spread, torch.zeros(1), 0.25, 0.02)
    assert opened / 4000 == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_count_for_nothing(bad):
    known = torch.tensor(0.1), torch.tensor(0.7)
    rows = torch.tensor([0.5, -1.0, 0.3])
    expected = followed(*known, rows, 0.25, 0.1)
    found = followed(*known, torch.cat([rows, torch.tensor([bad])]), 0.25, 0.1)
    assert torch.allclose(torch.stack(found), torch.stack(expected))
    nothing = followed(*known, torch.tensor([bad]), 0.25, 0.1)
    assert torch.equal(torch.stack(nothing), torch.stack(known))


def test_a_batch_is_decided_before_it_moves_the_threshold():
    made = gate()
    x = torch.randn(16, made.hidden.in_features)
    with torch.no_grad():
        made(x)
        other = copy.deepcopy(made)
        whole, part = made(x).open, other(x[:4]).open
    assert torch.equal(whole[:4], part)
    assert not torch.equal(made.threshold, other.threshold)


def test_in_a_model_the_share_is_met_and_training_and_calibration_do_as_ever():
    made = model(budget=0.5, gate=("straight_through", {"follow": 0.05}))
    the_gate = tw.spans(made)[0].feedback.gate
    assert float(the_gate.threshold) == 0  # attaching has looked at no sample that arrives
    x, opened = images(16), []
    with torch.no_grad():
        for _ in range(60):
            made(x)
            opened.append(tw.report(made)[0].open.float().mean())
    assert torch.stack(opened[20:]).mean() == pytest.approx(0.5, abs=0.02)
    tw.calibrate(made, [x], budget=0.25)
    calibrated = the_gate.threshold.clone()
    assert the_gate.follow == 0.05
    tw.configure(made, follow=None)
    with torch.no_grad():
        made(x)
    assert tw.report(made)[0].open.float().mean() == 0.25
    assert torch.equal(the_gate.threshold, calibrated)


def test_closed_passes_bring_it_down_too():
    made = model(budget=0.5)
    x = images(4)
    with torch.no_grad():
        made(x)
        before = tw.spans(made)[0].feedback.gate.threshold.clone()
        tw.configure(made, follow=0.05)
        made(x)
    assert not tw.report(made)[0].open.any()
    assert tw.spans(made)[0].feedback.gate.threshold < before


def test_its_state_is_no_part_of_the_checkpoint_but_for_the_threshold():
    plain, made = model(budget=0.5), model(budget=0.5, gate=("straight_through", {"follow": 0.05}))
    assert made.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(made.state_dict())


def test_transforms_and_graphs_leave_the_threshold():
    made = gate()
    x = torch.randn(4, made.hidden.in_features)
    before = made.threshold.clone()
    torch.func.vmap(lambda row: made(row[None]).strength)(x)
    torch.func.jacrev(lambda rows: made(rows).probability)(x)
    assert torch.equal(made.threshold, before)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan"), True, "fast"])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(tw.OptionError, match=r"follow is the pace in \(0, 1\]"):
        gate(follow=rate)
    made = model(budget=0.5)
    with pytest.raises(tw.OptionError, match="follow"):
        tw.configure(made, follow=rate, temperature=3.0)
    assert tw.spans(made)[0].feedback.gate.temperature != 3.0


@pytest.mark.parametrize("options", [{"budget": None}, {"control": "dual"}])
def test_without_a_share_to_keep_it_is_refused(options):
    with pytest.raises(tw.OptionError, match="give a budget"):
        gate(**options)


def test_a_budget_is_not_taken_from_a_gate_that_follows():
    made = model(budget=0.5)
    tw.configure(made, follow=0.05)
    with pytest.raises(tw.OptionError, match="give a budget"):
        tw.configure(made, budget=None)
    tw.configure(made, budget=None, follow=None)
    assert tw.spans(made)[0].feedback.gate.budget is None
