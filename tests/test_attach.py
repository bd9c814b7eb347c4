"""Wormholes on timm models: closed is plain, open settles, and nothing of timm's manners is lost."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw

FAMILIES = [
    ("resnet18", "layer4->layer3", 64),
    ("resnet18", "layer3->layer3", 64),
    ("resnet26d", "layer4.1->layer4.0", 64),
    ("convnext_atto", "stages.3->stages.2", 64),
    ("convnextv2_atto", "auto", 64),
    ("vit_tiny_patch16_224", "blocks.11->blocks.8", 224),
    ("deit3_small_patch16_224", "auto", 224),
    ("resnet8_cifar", "layer3->layer2", 32),
]


def images(size: int, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pair(name: str, wormholes, **options):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5)
    twnn = timm.create_model(f"twnn_{name}", num_classes=5, wormholes=wormholes, **options)
    twnn.load_state_dict(plain.state_dict(), strict=True)  # a plain checkpoint loads strictly
    return plain, twnn


@pytest.mark.parametrize(("name", "wormholes", "size"), FAMILIES)
def test_freshly_attached_is_the_plain_backbone(name, wormholes, size):
    plain, twnn = pair(name, wormholes)
    x = images(size)
    plain.eval(), twnn.eval()
    with torch.no_grad():
        assert torch.equal(plain(x), twnn(x))
    plain.train(), twnn.train()
    a, b = plain(x), twnn(x)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    (a**2).sum().backward()
    (b**2).sum().backward()
    expected = {key: p.grad for key, p in plain.named_parameters()}
    for key, parameter in twnn.named_parameters():
        if key in expected:
            assert torch.allclose(
                parameter.grad, expected[key], rtol=1e-3, atol=1e-4 * float(b.detach().abs().max())
            )
        else:  # gate and message learn from the first step on
            assert parameter.grad is not None and bool(parameter.grad.any()), key
    for key, value in plain.named_buffers():  # running statistics are counted once
        assert torch.allclose(value.float(), dict(twnn.named_buffers())[key].float()), key


@pytest.mark.parametrize(("name", "wormholes", "size"), FAMILIES)
def test_open_wormholes_settle_at_a_fixed_point(name, wormholes, size):
    _, twnn = pair(name, wormholes, policy="always", tol=1e-4, max_iter=100, scale=0.02)
    twnn.eval()
    x = images(size)
    with torch.no_grad():
        logits = twnn(x)
    (record,) = tw.report(twnn)
    assert bool((record.status == int(tw.Status.converged)).all()) and bool((record.gate == 1).all())
    assert bool((record.residual <= 1e-4).all()) and int(record.steps.min()) > 1
    assert record.evaluations >= int(record.steps.sum())
    tw.configure(twnn, policy="never")
    with torch.no_grad():
        assert not torch.equal(logits, twnn(x))


def test_a_sample_does_not_depend_on_its_batch_mates():
    _, twnn = pair("resnet18", "layer4->layer3", policy="always", max_iter=100, scale=0.05)
    twnn.eval()
    x = images(64, batch=6)
    with torch.no_grad():
        together = twnn(x)
        for row in range(6):
            alone = twnn(x[row : row + 1])[0]
            assert float((together[row] - alone).norm() / alone.norm()) < 1e-5


@pytest.mark.parametrize("policy", ["always", "gate"])
def test_a_nan_sample_changes_no_other_output_nor_weight_gradient(policy):
    _, twnn = pair("convnext_atto", "auto", policy=policy, scale=0.05)
    x = images(64, batch=4)
    good = torch.tensor([True, True, False, True])

    def run(x):
        twnn.zero_grad()
        logits = twnn(x)
        (logits[good] ** 2).sum().backward()
        gradients = {n: p.grad.clone() for n, p in twnn.named_parameters() if "wormholes" in n}
        return logits.detach(), gradients

    # Only what lies behind the span's entry can be kept clean: the backbone's own backward pass
    # multiplies zero by NaN before it. So the wormhole's own weights are looked at.
    clean, expected = run(x)
    x = x.clone()
    x[2] = float("nan")
    broken, gradients = run(x)
    (record,) = tw.report(twnn)
    assert policy == "gate" or record.status[2] == tw.Status.non_finite
    assert torch.allclose(clean[good], broken[good], rtol=1e-5, atol=1e-6)
    for key, value in gradients.items():
        assert torch.allclose(value, expected[key], rtol=1e-3, atol=1e-5), key


class FirstHalf(type(tw.policy("always"))):
    """Opens the first half of the batch."""

    def forward(self, view):
        return torch.arange(view.open.numel()) < view.open.numel() // 2


@pytest.mark.parametrize("policy", [tw.policy("always"), FirstHalf()], ids=["all", "half"])
def test_implicit_gradient_of_a_span_is_that_of_the_unrolled_one(policy):
    _, twnn = pair("resnet18", "layer4->layer3", policy=policy, scale=0.01)
    twnn = twnn.double().train()  # batch statistics included
    x = images(64, batch=4).double()

    def gradients(**options):
        model = copy.deepcopy(twnn)
        tw.configure(model, tol=1e-11, max_iter=100, **options)
        inputs = x.clone().requires_grad_()
        (model(inputs) ** 2).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {**found, "x": inputs.grad}

    implicit, unrolled = gradients(), gradients(adjoint="unrolled", solver="picard")
    assert implicit.keys() == unrolled.keys()
    for key, value in unrolled.items():
        assert float((implicit[key] - value).norm()) <= 1e-6 * float(value.norm()) + 1e-12, key


def test_closed_rows_cost_no_product_in_the_backward_solve():
    _, twnn = pair("convnext_atto", "auto", policy="always", scale=0.05, tol=1e-6, max_iter=60)
    x = images(64, batch=8)
    gradients = {}
    for name, policy in (("some", FirstHalf()), ("none", "never")):
        model = copy.deepcopy(twnn).train()
        tw.configure(model, policy=policy)
        model(x).square().mean().backward()
        report = tw.report(model)[0].adjoint
        assert report is not None and bool((report.status == 0).all())
        gradients[name] = report
    some, none = gradients["some"], gradients["none"]
    assert none.evaluations == 0 and not bool(none.steps.any())
    assert not bool(some.steps[4:].any()) and bool((some.steps[:4] > 1).all())
    assert some.evaluations <= 4 * int(some.steps.max())


def test_rows_that_fail_fall_back_to_the_open_loop_value_in_eval():
    plain, twnn = pair("resnet18", "layer4->layer3", policy="always", tol=1e-7, max_iter=2)
    plain.eval(), twnn.eval()
    x = images(64)
    with torch.no_grad():
        assert torch.equal(plain(x), twnn(x))
    (record,) = tw.report(twnn)
    assert bool(record.fallback.all()) and bool((record.status == int(tw.Status.max_iter)).all())


def test_dropout_and_drop_path_stand_still_while_iterating():
    options = dict(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2)
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)
    twnn = timm.create_model("twnn_vit_tiny_patch16_224", num_classes=5, policy="never", **options)
    twnn.load_state_dict(plain.state_dict())
    x = images(224, batch=4)
    torch.manual_seed(3)
    expected = plain.train()(x)
    torch.manual_seed(3)
    assert torch.allclose(expected, twnn.train()(x), atol=1e-5)
    tw.configure(twnn, policy=tw.policy("random", p=0.5), max_iter=50)
    torch.manual_seed(1)
    twnn(x).sum().backward()
    (record,) = tw.report(twnn)
    # It converges, which it could not if each replay drew new masks; rows have left the batch.
    assert 0 < int(record.open.sum()) < 4
    assert bool((record.status == int(tw.Status.converged)).all())
    assert record.adjoint is not None and bool((record.adjoint.status == 0).all())


def test_mixed_precision_training():
    _, twnn = pair("resnet18", "layer4->layer3", policy="always", tol=1e-2, scale=0.02)
    twnn.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = twnn(images(64)).square().mean()
    loss.backward()
    (record,) = tw.report(twnn)
    assert bool((record.status == int(tw.Status.converged)).all()) and record.multiply_adds > 0
    assert record.adjoint is not None and bool((record.adjoint.status == 0).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in twnn.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    _, twnn = pair("convnext_atto", "auto", policy="always", tol=1e-2, scale=0.02)
    twnn = twnn.to(dtype).eval()
    with torch.no_grad():
        assert twnn(images(64).to(dtype)).dtype == dtype
    (record,) = tw.report(twnn)
    assert bool((record.status == int(tw.Status.converged)).all()) and record.multiply_adds > 0


def test_intermediates_end_in_the_settled_value():
    _, twnn = pair("resnet18", "layer4->layer3", policy="always")
    twnn.eval()
    with torch.no_grad():
        final, taps = twnn.forward_intermediates(images(64))
        assert torch.equal(final, taps[-1]) and torch.equal(final, twnn.forward_features(images(64)))


def test_several_wormholes_in_one_model():
    plain, twnn = pair("resnet18", ["layer4->layer3", "layer2->layer1"])
    x = images(64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), twnn.eval()(x))
        tw.configure(twnn, spans="layer2->layer1", policy="always")
        twnn(x)
    first, second = tw.report(twnn)
    assert (first.span, second.span) == ("layer4->layer3", "layer2->layer1")
    assert not bool(first.open.any()) and bool(second.open.all())


def test_copies_pickles_and_checkpoints(tmp_path):
    _, twnn = pair("resnet18", "layer4->layer3", policy="always")
    twnn.eval()
    x = images(64)
    with torch.no_grad():
        expected = twnn(x)
        assert torch.equal(copy.deepcopy(twnn)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(twnn))(x), expected)
        torch.save(twnn.state_dict(), tmp_path / "weights.pt")
        again = timm.create_model("twnn_resnet18", num_classes=5, wormholes="layer4->layer3", policy="always")
        timm.models.load_checkpoint(again, str(tmp_path / "weights.pt"))
        assert torch.equal(again.eval()(x), expected)
    copied = copy.deepcopy(twnn)
    tw.configure(copied, policy="never")
    assert type(twnn.wormholes[0].feedback.policy) is not type(copied.wormholes[0].feedback.policy)


def test_timm_manners():
    _, twnn = pair("resnet18", "layer4->layer3")
    x = images(64)
    twnn.eval()
    with torch.no_grad():
        features = twnn.forward_features(x)
        assert torch.equal(twnn.forward_head(features), twnn(x))
        twnn.reset_classifier(7)
        assert twnn(x).shape == (3, 7)
    assert twnn.pretrained_cfg["architecture"] == "twnn_resnet18"
    assert {"twnn_resnet18", "twnn_convnext_tiny", "twnn_vit_base_patch16_224"} <= set(
        timm.list_models("twnn_*")
    )
    grey = timm.create_model("twnn_resnet18", in_chans=1, num_classes=3)
    assert grey.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 3)


def test_tags_resolve_to_the_backbones_weights():
    tags = timm.models.get_arch_pretrained_cfgs("resnet18")
    for name, config in tags.items():
        derived = timm.models.get_pretrained_cfg(f"twnn_{name}")
        assert derived.hf_hub_id == config.hf_hub_id and derived.architecture == "twnn_resnet18"


def test_attach_on_a_model_at_hand_and_swap_by_name():
    torch.manual_seed(0)
    model = tw.attach(
        timm.create_model("resnet18", num_classes=5), wormholes="layer4->layer3", policy="always"
    )
    model.eval()
    x = images(64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = {}
    for name in tw.solvers.names():
        tw.configure(model, solver=name, adjoint="implicit", tol=1e-4, max_iter=60)
        with torch.no_grad():
            outputs[name] = model(x)
        assert bool((tw.report(model)[0].status == int(tw.Status.converged)).all()), name
    reference = outputs["picard"]
    for name, value in outputs.items():
        assert float((value - reference).norm() / reference.norm()) < 1e-2, name
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_every_solver_trains_a_span_with_every_adjoint():
    torch.manual_seed(0)
    model = tw.attach(timm.create_model("resnet8_cifar", num_classes=5), policy="always", scale=0.05)
    x = images(32, batch=4)
    for solver in tw.solvers.names():
        for adjoint in tw.adjoints.names():
            tw.configure(model, solver=solver, adjoint=adjoint, tol=1e-3, max_iter=40)
            model.zero_grad()
            model.train()(x).square().sum().backward()
            weight = model.wormholes[0].feedback.message.project.weight
            assert weight.grad is not None and bool(weight.grad.any()), (solver, adjoint)


def test_report_counts_and_prints():
    _, twnn = pair("resnet18", "layer4->layer3", policy="always", max_iter=60)
    assert tw.report(twnn) == []
    twnn.eval()
    with torch.no_grad():
        twnn(images(64))
    report = tw.report(twnn)
    span = [twnn.layer3, twnn.layer4]
    assert report[0].multiply_adds % report[0].evaluations == 0
    each = report[0].multiply_adds // report[0].evaluations
    message = 512 * 128 * 2 * 2  # a 1x1 convolution on layer4's 2x2 positions
    assert each == _multiply_adds(span, torch.zeros(1, 128, 8, 8)) + message
    assert "layer4->layer3" in str(report) and "100.0 %" in str(report)


def _multiply_adds(modules, x):
    """An independent count: hooks on the convolutions."""
    total = 0

    def count(module, args, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    handles = [
        m.register_forward_hook(count) for part in modules for m in part.modules() if isinstance(m, nn.Conv2d)
    ]
    with torch.no_grad():
        for part in modules:
            for block in part:  # the blocks themselves: the wormhole's hooks stay out of it
                x = block.forward(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"wormholes": "layer3->layer4"}, tw.AttachError, "did you mean 'layer4->layer3'"),
        ({"wormholes": "layer4>layer3"}, tw.AttachError, "source->target"),
        ({"wormholes": "layer5->layer3"}, tw.UnknownNameError, "Did you mean 'layer"),
        ({"wormholes": "9->1"}, tw.UnknownNameError, "no stage 9"),
        ({"wormholes": []}, tw.AttachError, "source->target"),
        ({"wormholes": ["layer4->layer3", "3 -> 4", "auto"]}, tw.AttachError, "goes forward"),
        ({"wormholes": ["layer4->layer3", "4->3"]}, tw.AttachError, "named twice"),
        ({"wormholes": "/64->/16"}, tw.UnknownNameError, "/8, /16, /32"),
        ({"wormholes": 3}, tw.AttachError, "a list of such strings"),
        ({"solver": "andersn"}, tw.UnknownNameError, "anderson"),
        ({"gate": "sigmoidd"}, tw.UnknownNameError, "Did you mean 'sigmoid'"),
        ({"policy": "alwys"}, tw.UnknownNameError, "Did you mean 'always'"),
        ({"tol": 0.0}, tw.OptionError, "positive"),
        ({"max_iter": 0}, tw.OptionError, "at least 1"),
        ({"budget": 1.5}, tw.OptionError, "share of open samples"),
        ({"budget": 0.5, "gate": "always"}, tw.OptionError, "no option 'budget'"),
        ({"maxiter": 3}, tw.OptionError, "Did you mean 'max_iter'"),
    ],
)
def test_bad_wormholes_leave_the_model_as_it_was(options, error, message):
    model = timm.create_model("resnet18", num_classes=2)
    keys, hooks = list(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(error, match=message):
        tw.attach(model, **options)
    assert list(model.state_dict()) == keys
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks


def test_more_bad_input():
    with pytest.raises(tw.AttachError, match="No backbone adapter"):
        tw.attach(nn.Linear(3, 3))
    model = tw.attach(timm.create_model("resnet18", num_classes=2))
    with pytest.raises(tw.AttachError, match="already"):
        tw.attach(model)
    with pytest.raises(tw.AttachError, match="no wormholes"):
        tw.report(timm.create_model("resnet18", num_classes=2))
    with pytest.raises(tw.OptionError, match="Did you mean 'solver'"):
        tw.configure(model, solvr="picard")
    with pytest.raises(tw.UnknownNameError, match="Unknown span"):
        tw.configure(model, spans="layer4->layer2", tol=1e-2)
    with pytest.raises(TypeError, match="Did you mean 'wormholes'"):
        timm.create_model("twnn_resnet18", wormhole="layer4->layer3")


def test_a_span_whose_inside_is_used_elsewhere_is_refused():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 2)
            self.feature_info = [dict(module="a", reduction=1), dict(module="b", reduction=1)]
            self.pretrained_cfg = dict(input_size=(3, 8, 8), first_conv="a")

        def forward(self, x):
            a = self.a(x)
            b = self.b(a)
            return self.head(torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1))

    with pytest.raises(tw.AttachError, match=r"activations from inside it.*nearest span that works: 'b->b'"):
        tw.attach(Leaky(), wormholes="b->a", fallback=False)
    fine = tw.attach(Leaky(), wormholes="b->b")
    assert fine(torch.randn(2, 3, 8, 8)).shape == (2, 2)


@pytest.mark.parametrize("wormholes", ["layer1->act1", "bn1->conv1"])
def test_activations_in_place_at_the_ends_of_a_span_do_no_harm(wormholes):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2).eval()
    x = images(64)
    with torch.no_grad():
        plain = model(x)
    tw.attach(model, wormholes=wormholes, scale=0.01)
    with torch.no_grad():
        assert torch.equal(model(x), plain)
        tw.configure(model, policy="always", tol=1e-5, max_iter=100)
        logits = model(x)
        (record,) = tw.report(model)
        assert bool((record.status == 0).all())
        expected = _own_fixed_point(model, model.wormholes[0], wormholes, x)
    assert float((expected - logits).norm() / logits.norm()) < 1e-3
    assert not torch.equal(plain, logits)
    model.train()(x).square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def _own_fixed_point(model, span, wormholes, x):
    """The logits by plain iteration of the model's own layers, written out."""
    message = span.feedback.message
    first = model.conv1(x) if wormholes == "layer1->act1" else x

    def step(z):
        start = first if wormholes == "bn1->conv1" else model.bn1.forward(first.clone())
        if z is not None:
            start = start + message(z, start.shape)
        if wormholes == "bn1->conv1":
            return model.bn1.forward(model.conv1.forward(start))
        y = model.maxpool.forward(torch.relu(start))
        for block in model.layer1:
            y = block.forward(y)
        return y

    z = None
    for _ in range(60):
        z = step(z)
    if wormholes == "bn1->conv1":
        z = model.maxpool(torch.relu(z))
        for block in model.layer1:
            z = block(z)
    for stage in (model.layer2, model.layer3, model.layer4):
        z = stage(z)
    return model.forward_head(z)


def test_a_span_with_a_computation_between_its_modules_is_refused():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.feature_info = [dict(module="a", reduction=1), dict(module="b", reduction=1)]
            self.pretrained_cfg = dict(input_size=(3, 8, 8), first_conv="a")

        def forward(self, x):
            return self.b(torch.relu(self.a(x))).mean((1, 2, 3))

    with pytest.raises(tw.AttachError, match=r"between 'a' and 'b'.*nearest span that works"):
        tw.attach(Between(), wormholes="b->a", fallback=False)


def test_empty_batch_passes_through():
    _, twnn = pair("resnet18", "layer4->layer3", policy="always")
    with torch.no_grad():
        assert twnn.eval()(torch.zeros(0, 3, 64, 64)).shape == (0, 5)


def test_a_failed_pass_leaves_no_trace():
    _, twnn = pair("resnet18", "layer4->layer3", policy="always", max_iter=60)
    twnn.eval()
    x = images(64)
    with torch.no_grad():
        expected = twnn(x)
        handle = twnn.layer4[0].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))
        )
        with pytest.raises(RuntimeError, match="boom"):
            twnn(x)
        handle.remove()
        assert torch.equal(twnn(x), expected)


def test_a_checkpoint_has_all_wormholes_or_none():
    torch.manual_seed(0)
    one = timm.create_model("twnn_resnet10t", num_classes=5, wormholes="layer4->layer3")
    both = timm.create_model("twnn_resnet10t", num_classes=5, wormholes=["layer4->layer3", "layer2->layer2"])
    with pytest.raises(RuntimeError, match=r"Missing key.*wormholes\.1\."):
        both.load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*wormholes\.1\."):
        one.load_state_dict(both.state_dict())
    plain = timm.create_model("resnet10t", num_classes=5)
    before = {name: value.clone() for name, value in both.wormholes.state_dict().items()}
    both.load_state_dict(plain.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in both.wormholes.state_dict().items())
    assert torch.equal(both.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
