"""Passes that are made again in the backward pass, differentiated twice, by hand, or under torch.func."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import twnn_plugin as tw
from twnn_plugin.blocks.feedback import Feedback


def model(name: str = "twnn_resnet8_cifar", **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **{"max_iter": 8, **options})


def images(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def feedback(m: nn.Module) -> Feedback:
    return next(part for part in m.modules() if isinstance(part, Feedback))


def gradients(m: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.parameters()]


# The whole model in torch.utils.checkpoint --------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"opening": 20, "policy": "always"},
        {"budget": 0.3, "gate": "straight_through"},
        {"budget": 0.3, "gate": ("sigmoid", {"control": "dual"})},
    ],
)
def test_what_moves_with_every_pass_is_not_computed_again(options, reentrant):
    m = model(**options).train()
    out = checkpoint(m, images().requires_grad_(), use_reentrant=reentrant)
    moved = (int(feedback(m).opening_step), float(getattr(feedback(m).gate, "threshold", 0.0)))
    with pytest.raises(tw.AttachError, match="made again in the backward pass"):
        out.sum().backward()
    assert (int(feedback(m).opening_step), float(getattr(feedback(m).gate, "threshold", 0.0))) == moved


@pytest.mark.parametrize("name", ["twnn_test_vit", "twnn_resnet8_cifar"])
@pytest.mark.parametrize("options", [{"policy": "always"}, {"opening": 1, "policy": "always"}])
@pytest.mark.parametrize("adjoint", ["implicit", "ad_fixed_point"])
def test_a_model_that_rests_is_computed_again_once(name, options, adjoint):
    if name == "twnn_test_vit":
        options = {**options, "img_size": 32}
    plain = model(name, adjoint=adjoint, **options).train()
    again = copy.deepcopy(plain)
    for m in (plain, again):
        if "opening" in options:
            m(images())  # it has risen
    passes = []
    next(again.children()).register_forward_pre_hook(lambda *_: passes.append(0))
    F.cross_entropy(plain(images()), torch.arange(4)).backward()
    F.cross_entropy(checkpoint(again, images(), use_reentrant=False), torch.arange(4)).backward()
    assert len(passes) == 2  # forward and backward, whatever the number of products
    for mine, theirs in zip(gradients(again), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_penalty_on_the_jacobian_goes_with_checkpointed_attention():
    found = []
    for checkpointing in (False, True):
        m = model("twnn_test_vit", img_size=32, policy="always", jacobian=0.1).train()
        m.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)  # of the probes
        (m(images()).sum() + m.auxiliary_loss()).backward()
        found.append(gradients(m))
    for with_it, without in zip(*found, strict=True):
        assert torch.equal(with_it, without)


# Twice, and by torch.func -------------------------------------------------------------------------------


def test_a_gate_that_learns_difficulty_can_be_differentiated_twice():
    x = images().double().requires_grad_()
    found = []
    for budget in (0.5, None):  # it teaches the gate, and the network nothing
        m = model(budget=budget, policy="always", tol=1e-9, max_iter=60).double().train()
        (first,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        found.append([p.grad for name, p in m.named_parameters() if "feedback" not in name])
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without)


def test_torch_func_gives_the_gradients_of_backward_where_a_gate_learns_difficulty():
    m = model("twnn_test_convnext", budget=0.5).train()  # torch.func refuses the counters of BatchNorm
    before = {name: value.clone() for name, value in m.state_dict().items()}
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    buffers = {name: b.clone() for name, b in m.named_buffers()}

    def loss(parameters):
        return torch.func.functional_call(m, (parameters, buffers), (images(),)).square().sum()

    found = torch.func.grad(loss)(parameters)
    m.load_state_dict(before)
    m(images()).square().sum().backward()
    for name, p in m.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["vmap of the unrolled form", "grad of the unrolled form", "grad"])
def test_nothing_of_torch_func_stays_in_the_model(how, tmp_path):
    m = model(policy="always").eval()
    form = m if how == "grad" else tw.unrolled(m, 2)
    if "vmap" in how:
        torch.vmap(lambda one: form(one[None])[0])(images())
    else:
        torch.func.grad(lambda x: form(x).sum())(images())
    tw.report(m)
    copy.deepcopy(m)
    torch.save(m, tmp_path / "model.pt")
    m(images())
    assert tw.report(m)


def test_the_report_of_the_unrolled_form_alone():
    """Nothing was solved in this model before, so that nothing else has told what an evaluation is given."""
    m, again = (model(policy="always").eval() for _ in range(2))
    with torch.no_grad():
        tw.unrolled(m, 2)(images())
        again(images())
    (record,), (solved,) = tw.report(m), tw.report(again)
    rows = len(images())
    assert record.steps.tolist() == [2] * rows and record.evaluations == 2 * rows
    assert record.multiply_adds * solved.evaluations == solved.multiply_adds * record.evaluations > 0


# Closed heads -------------------------------------------------------------------------------------------


def test_stages_called_by_hand_have_no_closed_logits_and_say_so():
    m = model(closed_head=True, policy="always").train()
    m(images())
    m.forward_head(m.forward_features(images() + 1))
    for ask in (tw.closed_logits, lambda m: tw.closed_loss(m, F.cross_entropy, torch.arange(4))):
        with pytest.raises(tw.AttachError, match=r"by forward_features\(\) and forward_head\(\)"):
            ask(m)
    m(images())
    assert tw.closed_logits(m).shape == (4, 5)
    m.eval().forward_head(m.forward_features(images()))
    assert tw.closed_logits(m) is None


def test_several_closed_heads_are_weighed_together_and_asked_one_by_one():
    two = nn.ModuleList([model(closed_head=True, policy="always") for _ in range(2)]).train()
    for m in two:
        m(images())
    with pytest.raises(tw.AttachError, match="2 models with closed heads"):
        tw.closed_loss(two, F.cross_entropy, torch.arange(4))
    tw.configure(two, closed_weight=0.1)
    assert [m.closed_head.weight for m in two] == [0.1, 0.1]


# Two groups that listen to one normalisation ------------------------------------------------------------


def test_a_wormhole_block_with_batch_norm_in_a_span_is_refused_in_training():
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())
    block = tw.blocks.get("wormhole")(body, torch.randn(2, 8, 8, 8), gate="always")
    m = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(8, 8, 3, padding=1), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    tw.attach(m, wormholes="2->1", stages=["0", "1", "2"], example=x, policy="always")
    m.eval()(x)
    with pytest.raises(tw.AttachError, match="within the span of another"):
        m.train()(x)


def test_models_that_share_a_trunk_train_as_if_each_had_its_own():
    first = model(policy="always")
    second, own = (timm.create_model("resnet8_cifar", num_classes=5) for _ in range(2))
    for name in ("layer1", "layer2"):
        setattr(second, name, getattr(first, name))
    for m in (second, own):
        tw.attach(m, wormholes="layer3->layer2", policy="always", max_iter=8)
    own.load_state_dict(second.state_dict())
    first.train()
    for m in (second, own):
        m.train()(images()).square().sum().backward()
    for shared, alone in zip(gradients(second), gradients(own), strict=True):
        assert torch.equal(shared, alone)
    for shared, alone in zip(second.buffers(), own.buffers(), strict=True):
        assert torch.equal(shared, alone)
    first(images()).square().sum().backward()
