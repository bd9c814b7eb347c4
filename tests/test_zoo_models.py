"""The zoo's own timm models: manners, shapes, and the torchdeq baseline."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import timm
import timm.optim
import timm.utils
import torch

import twnn_plugin as tw
from zoo.models import NAMES

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")

DEQS = [name for name in NAMES if name.startswith("deq_")]
TINY = {"width": 16, "inner": 16}


def images(batch=2, channels=3, size=16):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def deq(**options):
    torch.manual_seed(0)
    return timm.create_model("deq_tiny", **TINY, **options)


def test_names_are_registered():
    assert set(NAMES) <= set(timm.list_models())
    assert {*DEQS, "deq_maze", "deq_prefix"} == set(timm.list_models("deq_*"))


@pytest.mark.parametrize("name", NAMES)
def test_timm_manners(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.1).eval()
    x = images(channels=1)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    assert model(x).shape == (2, 7)
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.get_classifier().out_features == 7
    assert model.pretrained_cfg["architecture"] == name
    model.get_submodule(model.pretrained_cfg["first_conv"])
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_feature_info_is_true(name):
    model = timm.create_model(name).eval()
    x = images()
    final, features = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    taken = timm.create_model(name, features_only=True).eval()(x)
    for info, feature, other in zip(model.feature_info, features, taken, strict=True):
        size = x.shape[-1] // info["reduction"]
        assert feature.shape == other.shape == (2, info["num_chs"], size, size)
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)
    torch.testing.assert_close(last[0], features[-1])
    with pytest.raises(ValueError, match="intermediate features"):
        model.forward_intermediates(x, indices=[9])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_and_grouped(name):
    model = timm.create_model(name).train()
    model(images(4)).logsumexp(1).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) > 1


@pytest.mark.parametrize("name", ["cnn3", "resnet8_cifar", "deq_tiny"])
def test_gradient_checkpointing_changes_no_gradient(name):
    torch.manual_seed(0)
    plain = timm.create_model(name).train()
    checked = copy.deepcopy(plain)
    checked.set_grad_checkpointing()
    for model in (plain, checked):
        model(images(4)).square().sum().backward()
    for a, b in zip(plain.parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "thousands"),
    [("cnn3", 95), ("resnet8_cifar", 78), ("resnet20_cifar", 272), ("resnet38_cifar", 564), ("deq_tiny", 78)],
)
def test_sizes_are_as_documented(name, thousands):
    model = timm.create_model(name, num_classes=10)
    assert round(sum(p.numel() for p in model.parameters()) / 1000) == thousands


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_raises_with_its_name(name):
    with pytest.raises(TypeError, match="f_max_itr"):
        timm.create_model(name, f_max_itr=3)


def test_a_resnet_needs_a_block():
    with pytest.raises(ValueError, match="depth"):
        type(timm.create_model("resnet8_cifar"))(depth=0)


@pytest.mark.parametrize(
    "solver", ["anderson", "broyden", "fixed_point_iter", "twnn.anderson", "twnn.picard"]
)
@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_deq_under_every_solver(solver, core):
    """All solvers find the same equilibrium and the same implicit gradient."""
    results = []
    for f_solver in ("twnn.picard", solver):
        tight = {"f_tol": 1e-6, "b_tol": 1e-6, "f_max_iter": 150, "b_max_iter": 150, "core": core}
        model = deq(f_solver=f_solver, b_solver=f_solver, **tight).train()
        logits = model(images())
        logits.square().sum().backward()
        results.append((logits.detach(), model.layer1.cell.conv1.weight_v.grad))
        assert model.last_info["nstep"].shape == model.last_info["rel_lowest"].shape == (2,)
        assert (model.last_info["rel_lowest"] < 1e-4).all()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-3, atol=1e-4)
    assert (results[1][1] - results[0][1]).norm() < 1e-2 * results[0][1].norm()


def test_deq_simple_iteration_and_phantom_gradient():
    model = deq(f_solver="simple_fixed_point_iter", ift=False, grad=3, tau=0.7).train()
    model(images()).sum().backward()
    assert model.layer1.cell.conv2.weight_v.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_solver": "andersen"}, "Unknown f_solver 'andersen'. Did you mean 'anderson'"),
        ({"b_solver": "twnn.nothing"}, "Unknown b_solver"),
        ({"b_solver": "simple_fixed_point_iter"}, "ift=False"),
        ({"core": "slices"}, "core must be"),
        ({"f_stop_mode": "relative"}, "f_stop_mode"),
    ],
)
def test_deq_refuses_bad_options(options, message):
    with pytest.raises(tw.errors.OptionError, match=message):
        deq(**options)


def test_deq_copies_pickles_and_loads():
    model = deq().train()
    model(images()).sum().backward()
    expected = model.eval()(images())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(images()), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = deq().eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(fresh(images()), expected)
    timm.utils.ModelEmaV3(model).update(model)


def test_deq_learns_a_batch():
    torch.manual_seed(0)
    model = timm.create_model("deq_tiny", in_chans=1, width=16, inner=16, f_max_iter=12, b_max_iter=12)
    x, y = images(16, 1, 8), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("first", ["zoo.models", "zoo.plugin", "twnn_plugin"])
def test_any_import_registers_the_models(first):
    code = f"import {first}, timm; assert {NAMES!r} == tuple(n for n in {NAMES!r} if timm.is_model(n))"
    subprocess.run([sys.executable, "-c", code], check=True)
