"""What helps training: penalties, a closed head, gradual opening, a frozen backbone; every gradient."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import twnn_plugin as tw
from zoo.objective import Objective

Wormhole = tw.blocks.get("wormhole")


def images(batch=6, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def model(name="resnet8_cifar", wormholes="auto", **options):
    torch.manual_seed(0)
    options = {"scale": 0.02, "max_iter": 60, **options}
    return timm.create_model(f"twnn_{name}", num_classes=5, wormholes=wormholes, **options)


class FirstHalf(tw.policies.Policy):
    """Opens the first half of the batch."""

    def forward(self, view):
        return torch.arange(view.open.numel()) < view.open.numel() // 2


def test_without_options_there_is_nothing_to_add_and_nothing_is_kept():
    twnn = model(policy="always").train()
    twnn(images())
    assert float(twnn.auxiliary_loss()) == 0.0
    assert all(part.feedback.pending is None for part in twnn.wormholes)


def test_the_jacobian_penalty_is_that_of_the_solved_map_over_the_open_rows():
    torch.manual_seed(0)
    x = torch.randn(8, 5).double()
    body = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    block = Wormhole(body, x, policy=FirstHalf(), scale=0.5, tol=1e-10, max_iter=200, jacobian=0.3).double()
    z = block.train()(x)
    torch.manual_seed(7)
    penalty = block.auxiliary_loss()
    part = block.feedback
    torch.manual_seed(7)
    expected = 0.3 * tw.jacobian_frobenius(
        lambda z, x: body(x + part.message(z, x.shape)), z[:4].detach(), x[:4]
    )
    assert (
        float(penalty.detach()) == pytest.approx(float(expected.detach()), rel=1e-10) and float(penalty) > 0
    )
    weights = [body[0].weight, part.message.project.weight, part.message.scale]
    found = torch.autograd.grad(penalty, weights)
    for a, b in zip(found, torch.autograd.grad(expected, weights), strict=True):
        assert torch.allclose(a, b, rtol=1e-8) and bool(a.any())
    assert float(block.auxiliary_loss()) == 0.0  # once a pass
    with torch.no_grad():
        block.eval()(x)
    assert float(block.auxiliary_loss()) == 0.0
    copy.deepcopy(block.train()), pickle.dumps(block)


def test_the_jacobian_penalty_makes_a_span_contract():
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    block = Wormhole(body, x, gate="always", scale=1.0, max_iter=60, jacobian=1.0).train()
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    figures = []
    for _ in range(60):
        block(x)
        loss = block.auxiliary_loss()
        figures.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert figures[-1] < 0.2 * figures[0]


def test_the_penalty_goes_with_batch_statistics_dropout_autocast_and_groups():
    twnn = model("resnet18", ["layer4->layer3", "layer4->layer4"], policy="always", jacobian=0.1, tol=1e-2)
    twnn.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = twnn(images(4))
    (out.float().square().mean() + twnn.auxiliary_loss()).backward()
    for part in twnn.wormholes:
        grad = part.feedback.message.project.weight.grad
        assert bool(torch.isfinite(grad).all()) and bool(grad.any())
    vit = model("vit_tiny_patch16_224", "blocks.11->blocks.10", policy="always", jacobian=0.1, drop_rate=0.1,
                attn_drop_rate=0.1, img_size=32, patch_size=8)  # fmt: skip
    (vit.train()(images(3)).square().mean() + vit.auxiliary_loss()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in vit.parameters() if p.grad is not None)


OPTIONS = [
    {},
    {"closed_head": True},
    {"jacobian": 0.1},
    {"contraction": 0.9},
    {"opening": 5},
    {"budget": 0.3},
    {"gate": ("straight_through", {"budget": 0.3, "control": "dual"})},
    {"gate": ("hard_concrete", {"l0": 0.1})},
    {"gate": ("sigmoid", {"per": "channel"})},
    {"gate": "never", "closed_head": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("policy", ["never", "always", "gate"])
def test_every_parameter_gets_a_gradient_on_every_step(options, policy):
    objective = Objective(model(policy=policy, **options)).train()
    total, _, _ = objective(images(), torch.arange(6) % 5)
    total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


def test_every_parameter_gets_a_gradient_where_there_is_no_row_or_no_finite_one():
    twnn = model(policy="always").train()
    part = twnn.wormholes[0].feedback
    for x in (torch.zeros(0, 3, 32, 32), torch.full((2, 3, 32, 32), float("nan"))):
        twnn.zero_grad()
        for module in twnn.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        twnn(x).sum().backward()
        assert all(p.grad is not None and not bool(p.grad.any()) for p in part.message.parameters())


def test_a_fresh_closed_head_is_the_plain_network_bit_by_bit():
    torch.manual_seed(0)
    plain = timm.create_model("resnet8_cifar", num_classes=5)
    twnn = model(closed_head=True)
    twnn.load_state_dict(plain.state_dict(), strict=True)  # a plain checkpoint loads, into both heads
    x = images()
    with torch.no_grad():
        expected = plain.eval()(x)
        assert torch.equal(twnn.eval()(x), expected)
        assert torch.equal(twnn.forward_head(twnn.forward_features(x)), expected)
    assert tw.closed_logits(twnn) is None
    plain.train(), twnn.train()
    logits = twnn(x)
    assert torch.allclose(logits, plain(x), rtol=1e-5, atol=1e-6)
    assert torch.allclose(tw.closed_logits(twnn), logits, rtol=1e-5, atol=1e-6)
    for key, value in plain.named_buffers():
        assert torch.allclose(value.float(), dict(twnn.named_buffers())[key].float(), rtol=1e-4), key


def test_closed_samples_are_answered_by_the_closed_head_and_open_ones_by_the_open_head():
    twnn = model(closed_head=True, policy=FirstHalf(), tol=1e-3)
    with torch.no_grad():
        twnn.closed_head.heads[0].bias.add_(100.0)
    x = images()
    for mode in (False, True):
        twnn.train(mode)
        with torch.set_grad_enabled(mode):
            logits = twnn(x)
        assert bool((logits[3:] > 50).all()) and bool((logits[:3] < 50).all())
    assert bool((tw.closed_logits(twnn) > 50).all())  # of all samples, the open ones included
    # What did not settle was answered by open-loop features, so by their head.
    tw.configure(twnn, policy="always", tol=1e-9, max_iter=2)
    with torch.no_grad():
        assert bool((twnn.eval()(x) > 50).all()) and bool(tw.report(twnn)[0].fallback.all())
        with pytest.raises(tw.AttachError, match="right after forward_features"):
            twnn.forward_head(twnn.forward_features(x)[:2])


def test_the_closed_loss_reaches_the_trunk_by_the_open_loop_path():
    twnn, x, y = (
        model(closed_head=True, policy="always", closed_weight=0.25).train(),
        images(),
        torch.arange(6) % 5,
    )
    plain = timm.create_model("resnet8_cifar", num_classes=5)
    plain.load_state_dict(
        {k: v for k, v in twnn.state_dict().items() if "wormholes" not in k and "closed" not in k}
    )
    twnn(x)
    loss = tw.closed_loss(twnn, F.cross_entropy, y)
    expected = 0.25 * F.cross_entropy(plain.train()(x), y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    expected.backward()
    for key, parameter in plain.named_parameters():
        mine = dict(twnn.named_parameters())[key.replace(*_head(twnn, key))]
        assert torch.allclose(mine.grad, parameter.grad, rtol=1e-3, atol=1e-5), key
    twnn.zero_grad()
    total, extra, _ = Objective(twnn)(x, y)
    assert float(extra.detach()) == pytest.approx(float(expected.detach()), rel=1e-4) and float(
        total
    ) > float(extra)
    tw.configure(twnn, closed_weight=0.0)
    assert twnn.closed_head.weight == 0.0


def _head(twnn, key):
    path = twnn.closed_head.paths[0]
    return (path, "closed_head.heads.0") if key.startswith(path + ".") else (key, key)


def test_a_closed_head_with_several_wormholes_and_a_span_that_ends_early():
    twnn = model(
        "resnet18", ["layer2->layer2", "layer4->layer4"], closed_head=True, policy=FirstHalf()
    ).train()
    logits = twnn(images())
    closed = tw.closed_logits(twnn)
    assert logits.shape == closed.shape == (6, 5)
    tw.configure(twnn, policy="never")
    frozen = copy.deepcopy(twnn).train()
    expected = frozen(images())
    # Batch statistics of the stages between see both versions, so close, not equal.
    assert torch.allclose(closed, expected, atol=0.1) and not torch.allclose(
        logits[:3], closed[:3], atol=1e-4
    )
    assert all(int(m.num_batches_tracked) == 1 for m in twnn.modules() if isinstance(m, nn.BatchNorm2d))


def test_reset_classifier_copies_and_pickles_with_a_closed_head():
    twnn = model(closed_head=True).train()
    twnn.reset_classifier(7)
    twnn(images())
    assert tw.closed_logits(twnn).shape == (6, 7)
    again = pickle.loads(pickle.dumps(copy.deepcopy(twnn)))
    again.load_state_dict(twnn.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(images()), twnn.eval()(images()))


def test_impossible_closed_heads_leave_the_model_as_it_was():
    for options, error, message in (
        ({"closed_head": "fcc"}, tw.OptionError, "Did you mean 'fc'"),
        ({"closed_head": True, "closed_weight": -1.0}, tw.OptionError, "closed_weight"),
        ({"closed_head": True, "num_classes": 0}, tw.AttachError, "no classifier"),
    ):
        plain = timm.create_model("resnet18", num_classes=options.pop("num_classes", 5))
        keys = list(plain.state_dict())
        with pytest.raises(error, match=message):
            tw.attach(plain, "layer4->layer3", **options)
        assert list(plain.state_dict()) == keys
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    with pytest.raises(tw.OptionError, match="no closed head"):
        tw.configure(model(), closed_weight=0.1)


def test_the_message_rises_over_the_opening_steps_and_the_step_is_saved():
    twnn, x = model(opening=4, policy="always").train(), images(2)
    strengths = []
    for _ in range(6):
        twnn(x)
        strengths.append(float(tw.report(twnn)[0].gate[0]))
    assert strengths == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    fresh = model(opening=4, policy="always")
    fresh(x)
    fresh.train()(x)
    twin = model(opening=4, policy="always")
    twin.load_state_dict(fresh.state_dict())
    with torch.no_grad():  # in eval mode as strong as training has made it, and no further
        twin.eval()(x), twin(x)
    assert float(tw.report(twin)[0].gate[0]) == 0.75
    tw.configure(twin, opening=0)
    with torch.no_grad():
        twin(x)
    assert float(tw.report(twin)[0].gate[0]) == 1.0


def test_wormholes_can_be_trained_alone():
    twnn = tw.freeze_backbone(model(policy="always", closed_head=True))
    plain = {k: v.clone() for k, v in twnn.state_dict().items() if "wormholes" not in k}
    optimizer = torch.optim.Adam([p for p in twnn.parameters() if p.requires_grad], lr=1e-2)
    x, y = images(), torch.arange(6) % 5
    losses = []
    for _ in range(8):
        loss, _, _ = Objective(twnn.train())(x, y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, twnn.state_dict()[k]) for k, v in plain.items())  # statistics included
    share = sum(p.numel() for p in twnn.parameters() if p.requires_grad) / sum(
        p.numel() for p in twnn.parameters()
    )
    assert share < 0.2
    again = pickle.loads(pickle.dumps(copy.deepcopy(twnn))).train()
    assert not any(m.training for m in again.modules() if isinstance(m, nn.BatchNorm2d))
    tw.freeze_backbone(again, False)
    assert all(p.requires_grad for p in again.parameters())
    assert all(m.training for m in again.modules() if isinstance(m, nn.BatchNorm2d))
    headed = tw.freeze_backbone(model(), head=True)
    names = {n.split(".")[0] for n, p in headed.named_parameters() if p.requires_grad}
    assert "wormholes" in names and len(names) == 2
    with pytest.raises(tw.AttachError, match="no wormholes"):
        tw.freeze_backbone(timm.create_model("resnet8_cifar"))
