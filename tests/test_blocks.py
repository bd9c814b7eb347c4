"""The wormhole-gated block without timm, gates and policies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import twnn_plugin as tw

Wormhole = tw.blocks.get("wormhole")


def conv_body(norm: type[nn.Module] = nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    )


def images(batch: int = 5):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 6, 8, 8)])
def test_closed_is_the_body_and_open_is_its_fixed_point(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    body = nn.Conv2d(6, 6, 3, padding=1) if len(shape) == 4 else nn.Linear(6, 6)
    block = Wormhole(body, x, tol=1e-6, max_iter=100).eval()
    with torch.no_grad():
        assert torch.equal(block(x), body(x))
        block.feedback.policy = tw.policy("always")
        z = block(x)
        again = body(x + block.feedback.message(z, x.shape))
        assert torch.allclose(z, again, atol=1e-4) and not torch.equal(z, body(x))


def test_a_chain_of_modules_and_its_record():
    parts = [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)]
    x = torch.randn(4, 6)
    block = Wormhole(parts, x, policy=tw.policy("always"), tol=1e-5).eval()
    with torch.no_grad():
        block(x)
    assert block.last is not None and bool(block.last.open.all())
    assert block.last.multiply_adds == block.last.evaluations * (6 * 12 + 12 * 3 + 3 * 6)
    assert tw.report(block)[0].span == "body->body"


def test_batch_statistics_stand_still_and_are_counted_once():
    body, x = conv_body(), images()
    block = Wormhole(body, x, policy=tw.policy("always"), tol=1e-5, max_iter=60).train()
    before = body[1].num_batches_tracked.clone()
    block(x).sum().backward()
    assert int(body[1].num_batches_tracked - before) == 1
    assert bool((block.last.status == int(tw.Status.converged)).all()) and block.last.evaluations > 10
    # The running mean is that of the one open-loop pass.
    mean = body[0](x).mean((0, 2, 3))
    assert torch.allclose(body[1].running_mean, 0.1 * mean, atol=1e-5)


def test_fpi_is_an_open_self_loop():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    layer = tw.blocks.get("fpi")(nn.Linear(6, 6), x, tol=1e-6, max_iter=50).eval()
    with torch.no_grad():
        layer(x)
    assert bool((layer.last.gate == 1).all()) and bool((layer.last.status == 0).all())


def test_bad_bodies():
    x = torch.randn(4, 6)
    with pytest.raises(tw.MapError, match="4 rows"):
        Wormhole(nn.Flatten(0), x)
    with pytest.raises(tw.OptionError, match="Did you mean 'solver'"):
        Wormhole(nn.Linear(6, 6), x, sover="picard")
    with pytest.raises(ValueError, match="scale"):
        Wormhole(nn.Linear(6, 6), x, scale=0.0)
    with pytest.raises(tw.UnknownNameError, match="always"):
        Wormhole(nn.Linear(6, 6), x, gate="alway")


def test_budget_is_a_setting_that_moves_the_open_share():
    shares = {}
    for budget in (0.2, 0.6):
        torch.manual_seed(0)
        gate = tw.gate("straight_through", channels=8, budget=budget).train()
        for _ in range(150):
            gate(torch.randn(64, 8))
        shares[budget] = float(gate.eval()(torch.randn(2000, 8)).open.float().mean())
    assert abs(shares[0.2] - 0.2) < 0.06 and abs(shares[0.6] - 0.6) < 0.06


def test_a_gate_with_a_budget_learns_from_the_loss_which_samples_are_hard():
    torch.manual_seed(0)
    gate = tw.gate("straight_through", channels=8, budget=0.25).train()
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(300):
        features = torch.randn(64, 8)
        out = torch.zeros(64, 3, requires_grad=True)
        steep = torch.exp(2 * features[:, 0])
        watched = tw.gates.watch_difficulty(out, gate(features).margin, 0.25)
        optimizer.zero_grad()
        (steep[:, None] * watched).mean().backward()
        optimizer.step()
    features = torch.randn(2000, 8)
    opened, hard = gate.eval()(features).open, features[:, 0] > 0.67  # a quarter of the samples
    assert abs(float(opened.float().mean()) - 0.25) < 0.06
    assert float((opened == hard).float().mean()) > 0.8  # chance: 0.62


def test_watching_difficulty_changes_neither_value_nor_gradient():
    out = torch.randn(6, 3, requires_grad=True)
    margin = torch.zeros(6, requires_grad=True)
    weight = torch.tensor([1.0, 0.1, 0.1, 9.0, 0.1, float("nan")])[:, None]
    watched = tw.gates.watch_difficulty(out, margin, 0.34)
    assert torch.equal(watched, out)
    a, b = torch.autograd.grad((watched * weight)[:5].sum(), (out, margin))
    assert torch.equal(a[:5], weight[:5].expand(5, 3))
    # The two steepest samples are pushed up, all others down; the scale is the mean gradient norm.
    assert torch.equal(b < 0, torch.tensor([True, False, False, True, False, False]))
    assert torch.allclose(b.abs(), b.abs()[0].expand(6)) and abs(float(b[1]) - 0.5 * 3**0.5 * 10.3 / 6) < 1e-5


@pytest.mark.parametrize("learn", ["benefit", "difficulty"])
def test_what_a_gate_learns_is_a_setting(learn):
    x = images()
    block = Wormhole(
        conv_body(nn.Identity), x, gate=("straight_through", {"learn": learn}), max_iter=60
    ).train()
    block(x).square().sum().backward()
    assert bool(block.feedback.gate.score.weight.grad.any())
    with pytest.raises(ValueError, match="benefit"):
        tw.gate("sigmoid", channels=8, learn="benefits")


def test_gates():
    features = torch.randn(16, 8)
    for name in ("straight_through", "sigmoid", "never"):
        assert not bool(tw.gate(name, channels=8)(features).open.any()), name  # fresh gates are closed
    assert bool(tw.gate("always")(features).open.all())
    gate = tw.gate("sigmoid", channels=8)
    gate.threshold.fill_(-10)
    out = gate(features)
    assert bool(out.open.all()) and torch.equal(out.strength, out.probability)
    hard = tw.gate("straight_through", channels=8)
    assert torch.equal(hard(features).strength, torch.ones(16))
    nan = hard(torch.full((2, 8), torch.nan))
    assert not bool(nan.open.any())
    with pytest.raises(ValueError, match="budget"):
        tw.gate("sigmoid", channels=8, budget=0.0)
    with pytest.raises(ValueError, match="temperature"):
        tw.gate("sigmoid", channels=8, temperature=0)


@pytest.mark.parametrize("name", ["straight_through", "sigmoid"])
def test_gate_and_message_learn_while_closed_and_while_open(name):
    x = images()
    for policy in ("never", "always"):
        block = Wormhole(conv_body(nn.Identity), x, gate=name, policy=tw.policy(policy), max_iter=60).train()
        block(x).square().sum().backward()
        for part in (block.feedback.gate.score.weight, block.feedback.message.project.weight):
            assert part.grad is not None and bool(part.grad.any()), policy


def test_never_gate_wins_over_the_policy():
    x = images()
    block = Wormhole(conv_body(nn.Identity), x, gate="never", policy=tw.policy("always")).eval()
    with torch.no_grad():
        assert torch.equal(block(x), block.body(x))
    assert not bool(block.last.open.any())


def test_policies():
    view = tw.PolicyView("s", torch.zeros(1000, 2), torch.zeros(1000), torch.arange(1000) % 3 == 0)
    assert torch.equal(tw.policy("gate")(view), view.open)
    assert bool(tw.policy("always")(view).all()) and not bool(tw.policy("never")(view).any())
    torch.manual_seed(0)
    assert abs(float(tw.policy("random", p=0.3)(view).float().mean()) - 0.3) < 0.05
    with pytest.raises(tw.OptionError, match=r"\[0, 1\]"):
        tw.policy("random", p=1.5)


def test_a_policy_of_the_wrong_shape_is_named():
    class Wrong(type(tw.policy("always"))):
        def forward(self, view):
            return torch.ones(view.open.shape)

    x = images()
    with pytest.raises(tw.OptionError, match="Wrong must return"):
        Wormhole(conv_body(), x, policy=Wrong()).eval()(x)


def test_configure_changes_all_or_nothing():
    x = images()
    block = Wormhole(conv_body(), x)
    tw.configure(
        block, solver=tw.solver("anderson", memory=2), tol=1e-2, threshold=-5.0, temperature=0.5, budget=0.3
    )
    assert block.feedback.settings.tol == 1e-2 and float(block.feedback.gate.threshold) == -5
    assert block.feedback.gate.budget == 0.3 and block.feedback.gate.temperature == 0.5
    with pytest.raises(tw.OptionError):
        tw.configure(block, tol=1e-1, budget=2.0)
    assert block.feedback.settings.tol == 1e-2
    fixed = Wormhole(conv_body(), x, gate="always")
    with pytest.raises(tw.OptionError, match="learned gates"):
        tw.configure(fixed, threshold=0.0)


def test_gradients_through_message_gate_and_body_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh()).double()
    block = Wormhole(body, x, gate="sigmoid", policy=tw.policy("always"), tol=1e-12, max_iter=200, scale=0.3)
    block = block.double().train()
    weight = block.feedback.gate.score.weight

    def value(x, w, *rest):
        del rest
        return torch.func.functional_call(block, {"feedback.gate.score.weight": w}, (x,))

    # The gate reads detached activations by design, so x is held and the weights are checked.
    held = x.detach()
    inputs = (weight.detach().clone().requires_grad_(),)
    assert torch.autograd.gradcheck(lambda w: value(held, w), inputs, atol=1e-6)
    message = block.feedback.message.project.weight.detach().clone().requires_grad_()

    def of_message(m):
        return torch.func.functional_call(block, {"feedback.message.project.weight": m}, (held,))

    assert torch.autograd.gradcheck(of_message, (message,), atol=1e-6)
