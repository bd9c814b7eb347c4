"""What a gate looks at, and by what it learns which samples are hard."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.policies import Policy

from .families import FAMILIES

Wormhole = tw.blocks.get("wormhole")


def wormhole(gate="straight_through", channels=6, **options):
    torch.manual_seed(0)
    return Wormhole(
        nn.Conv2d(channels, channels, 3, padding=1), torch.randn(2, channels, 4, 4), gate, **options
    )


class Seeing(Policy):
    """Keeps the features that it is shown."""

    def forward(self, view):
        self.features = view.features
        return view.open


def test_a_gate_sees_means_and_maxima_and_a_policy_the_means():
    policy = Seeing()
    block = wormhole(policy=policy).eval()
    seen = []
    block.feedback.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(3, 6, 5, 4)
    with torch.no_grad():
        block(x)
        out = block.body(x)
    assert torch.equal(seen[0], torch.cat([out.mean((2, 3)), out.amax((2, 3))], dim=1))
    assert torch.equal(policy.features, out.mean((2, 3)))


@pytest.mark.parametrize(("gate", "width"), [("sigmoid", 12), (("sigmoid", {"pooling": "avg"}), 6)])
def test_maxima_can_be_left_out(gate, width):
    gate = wormhole(gate).feedback.gate
    assert gate.hidden.in_features == width == len(gate.running_mean)
    assert gate.pooling == ("catavgmax" if width == 12 else "avg")


def test_what_has_no_positions_has_no_maxima():
    block = Wormhole(nn.Linear(6, 6), torch.randn(2, 6))
    assert block.feedback.gate.pooling == "avg" and block.feedback.gate.hidden.in_features == 6


def test_a_gate_of_other_features_says_what_it_wants():
    gate = tw.gate("sigmoid", channels=6, pooling="catavgmax")
    with pytest.raises(tw.OptionError, match=r"\(B, 12\) features, the means and maxima .* got \(3, 6\)"):
        gate(torch.randn(3, 6))
    with pytest.raises(tw.OptionError, match="pooling is one of 'avg', 'catavgmax'; got 'max'"):
        tw.gate("sigmoid", channels=6, pooling="max")


def test_a_third_partys_gate_without_the_option_gets_means():
    class Plain(tw.gates.LearnedGate):
        def __init__(self, channels):
            super().__init__(channels)

        def forward(self, features):
            margin = self.margin(features)
            return tw.gates.GateOutput(torch.sigmoid(margin), torch.sigmoid(margin), margin > 0)

    class Plugin:
        @tw.hookimpl
        def twnn_register_gates(self, register):
            register("plain_for_test", Plain)

    tw.register_plugin(Plugin(), name="plain for test")
    try:
        block = wormhole("plain_for_test").eval()
    finally:
        tw.unregister_plugin("plain for test")
    assert block(torch.randn(3, 6, 4, 4)).shape == (3, 6, 4, 4)
    assert block.feedback.gate.hidden.in_features == 6


def test_features_are_standardised_by_the_passes_before_where_there_is_a_budget():
    torch.manual_seed(0)
    x = 3 + torch.randn(64, 8)
    gate = tw.gate("sigmoid", channels=8, budget=0.3, momentum=0.5).train()
    normal = nn.functional.layer_norm(x, (8,))
    first = gate(x)
    twin = tw.gate("sigmoid", channels=8).train()
    twin.load_state_dict(
        {**gate.state_dict(), **{n: b for n, b in twin.state_dict().items() if "running" in n}}
    )
    assert torch.equal(gate.scores, largest_score(twin, x))  # its own batch does not count yet
    assert torch.allclose(gate.running_mean, normal.mean(0) / 2)
    assert torch.allclose(gate.running_var, 0.5 + normal.square().mean(0) / 2)
    before = [gate.running_mean.clone(), gate.running_var.clone()]
    gate.eval()(x)
    assert torch.equal(gate.running_mean, before[0]) and torch.equal(gate.running_var, before[1])
    assert not torch.equal(gate.scores, first.probability)
    twin(x)
    assert not twin.running_mean.any() and bool((twin.running_var == 1).all())  # no budget, no moments


def largest_score(gate, x):
    gate.eval()(x)
    return gate.scores


def test_an_empty_batch_and_a_feature_that_never_changes_leave_the_moments_finite():
    gate = tw.gate("sigmoid", channels=4, budget=0.3, momentum=1.0).train()
    gate(torch.empty(0, 4))
    assert not gate.running_mean.any()
    for _ in range(3):
        gate(torch.ones(5, 4))
    found = gate.eval()(torch.randn(5, 4))
    assert bool(torch.isfinite(found.probability).all())


def test_no_two_samples_have_one_score_because_units_are_silent():
    """With ReLUs, samples for which all units are silent would share a score, which no threshold divides."""
    torch.manual_seed(0)
    gate = tw.gate("straight_through", channels=8).eval()
    nn.init.constant_(gate.hidden.bias, -9.0)  # all of them
    nn.init.normal_(gate.score.weight)
    gate(torch.randn(500, 8))
    assert gate.scores.unique().numel() > 450


def test_a_threshold_follows_the_share_even_of_few_samples():
    """The interpolated quantile of 16 samples leaves 13 % above it in the mean where 10 % are wanted."""
    torch.manual_seed(0)
    gate = tw.gate("straight_through", channels=8, budget=0.1, momentum=0.005).train()
    nn.init.normal_(gate.score.weight)
    with torch.no_grad():
        for _ in range(3000):
            gate(torch.randn(16, 8))
        share = float(gate.eval()(torch.randn(20000, 8)).open.float().mean())
    assert abs(share - 0.1) < 0.01


def test_one_sample_a_batch_moves_the_threshold_towards_its_score():
    gate = tw.gate("straight_through", channels=8, budget=0.3, momentum=1.0).train()
    gate(torch.randn(1, 8))
    assert torch.equal(gate.threshold, gate.scores[0])


# ------------------------------------------------------------------------------------------ what is learned


def test_watching_the_closed_network_changes_neither_values_nor_gradients():
    out, closed = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    margin = torch.zeros(4, requires_grad=True)
    opened, beside = tw.gates.watch_closed_difficulty(out, closed, margin, 0.5)
    assert torch.equal(opened, out) and torch.equal(beside, closed)
    here = torch.tensor([9.0, 8.0, 1.0, 1.0])[:, None]
    there = torch.tensor([1.0, 5.0, 0.1, 7.0])[:, None]
    a, b, taught = torch.autograd.grad((opened * here + beside * there).sum(), (out, closed, margin))
    assert torch.equal(a, here.expand(4, 3)) and torch.equal(b, there.expand(4, 3))
    assert (taught < 0).tolist() == [
        False,
        True,
        False,
        True,
    ]  # the two that the closed network finds hardest
    assert torch.allclose(taught.abs(), torch.full((4,), 0.5 * 3**0.5 * 13.1 / 4))


def test_where_nothing_is_asked_of_the_closed_network_the_settled_value_tells():
    out, closed = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    margin = torch.zeros(4, requires_grad=True)
    for weight in (0.0, None):
        opened, beside = tw.gates.watch_closed_difficulty(out, closed, margin, 0.5)
        loss = (opened * torch.tensor([9.0, 1.0, 8.0, 1.0])[:, None]).sum()
        loss = loss if weight is None else loss + weight * beside.sum()
        (taught,) = torch.autograd.grad(loss, margin)
        assert (taught < 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("spans", ["layer4->layer3", ["layer2->layer2", "layer4->layer4"]])
def test_with_a_closed_head_the_gate_learns_what_the_closed_network_gets_wrong(spans):
    torch.manual_seed(0)
    family = FAMILIES["resnet"]
    model = family.twnn(spans, closed_head=True, budget=0.5, policy="always", max_iter=2).train()
    labels = torch.randint(0, 5, (6,))
    weights = torch.tensor([1.0, 0.01, 1.0, 0.01, 0.01, 1.0])  # of the samples, in the closed network's loss
    margins = []

    def keep(module, args, found):
        found.margin.retain_grad()
        margins.append(found.margin)

    for span in model.wormholes:
        span.feedback.gate.register_forward_hook(keep)
    entropy = nn.functional.cross_entropy
    loss = entropy(model(family.images(6)), labels)
    closed = tw.closed_loss(
        model, lambda logits, y: (weights * entropy(logits, y, reduction="none")).sum(), labels
    )
    (loss + closed).backward()
    assert len(margins) == (1 if isinstance(spans, str) else 2)
    for margin in margins:
        assert (margin.grad < 0).tolist() == (weights == 1).tolist()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("control", ["threshold", "dual"])
def test_what_is_followed_under_torch_func_is_kept_as_plain_numbers(control):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    gate = ("sigmoid", {"budget": 0.5, "control": control})
    blocks = [Wormhole(copy.deepcopy(body), torch.randn(2, 6), gate).train() for _ in range(2)]
    blocks[1].load_state_dict(blocks[0].state_dict())
    x = torch.randn(5, 6)
    for block, transform in zip(blocks, (lambda f: f, torch.func.grad), strict=True):
        transform(lambda p, block=block: torch.func.functional_call(block, p, (x,)).square().sum())(
            dict(block.named_parameters())
        )
        assert torch.isfinite(copy.deepcopy(block)(x)).all()
    gates = [block.feedback.gate for block in blocks]
    torch.testing.assert_close(*(dict(gate.named_buffers()) for gate in gates))
    assert bool(gates[0].running_mean.any())


def test_a_third_partys_gate_says_in_known_words_what_it_looks_at():
    gate = tw.gate("sigmoid", channels=6)
    gate.pooling = "avgmax"
    with pytest.raises(tw.OptionError, match="pooling is one of 'avg', 'catavgmax'; got 'avgmax'"):
        wormhole(gate)
