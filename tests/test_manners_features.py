"""Features of models with wormholes: forward_intermediates, features_only, pruning."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureListNet
from torch import nn

import twnn_plugin as tw
from twnn_plugin.backbones.manners.manners import Manners

from .families import FAMILIES

KEYS = list(FAMILIES)


class FirstHalf(type(tw.policy("always"))):
    """Opens the first half of the batch."""

    def forward(self, view):
        return torch.arange(view.open.numel()) < view.open.numel() // 2


def opened(key: str, **options) -> nn.Module:
    return FAMILIES[key].twnn(**{"policy": "always", "tol": 1e-7, "max_iter": 100, **options}).double().eval()


def at_the_solution(model: nn.Module, key: str, x: torch.Tensor, indices=None) -> list[torch.Tensor]:
    """An independent answer: the plain network whose span is given the settled signal."""
    captured = {}
    feedback = model.wormholes[0].feedback
    span = FAMILIES[key].span
    source = model.get_submodule(span.split("->")[0])
    handle = source.register_forward_hook(
        lambda m, args, out: captured.update(z=out)
    )  # the last one is the model's own
    model(x)
    handle.remove()
    plain = FAMILIES[key].plain().double().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("wormholes")})
    record = tw.report(model)[0]

    def enter(module, args):
        entry = args[0]
        gate = record.gate.to(entry.dtype).view(-1, *[1] * (entry.dim() - 1))
        return (entry + gate * feedback.message(captured["z"], entry.shape), *args[1:])

    end = dict(plain.named_modules())[span.split("->")[1]]
    end.register_forward_pre_hook(enter)
    return plain.forward_intermediates(x, indices=indices, intermediates_only=True)


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_inside_a_span_features_are_settled(key):
    model, x = opened(key), FAMILIES[key].images().double()
    final, taps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    expected = at_the_solution(model, key, x)
    assert len(taps) == len(expected)
    plain = FAMILIES[key].plain().double().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("wormholes")})
    changed = 0
    for tap, settled, open_loop in zip(
        taps, expected, plain.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        assert float((tap - settled).norm()) <= 1e-5 * float(settled.norm())
        changed += not torch.equal(tap, open_loop)
    assert changed >= 2  # at least one inside of the span, and its end


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_closed_rows_are_the_plain_ones_bit_for_bit(key):
    model = opened(key, policy=FirstHalf())
    x = FAMILIES[key].images(4).double()
    plain = FAMILIES[key].plain().double().eval()
    expected = plain.forward_intermediates(x, intermediates_only=True)
    for tap, open_loop in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(tap[2:], open_loop[2:])
    assert not torch.equal(tap[:2], open_loop[:2])
    tw.configure(model, policy="never")
    for tap, open_loop in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(tap, open_loop)
    # Rows whose solve fails keep the open-loop value, inside of the span as at its end.
    tw.configure(model, policy="always", tol=1e-14, max_iter=2)
    for tap, open_loop in zip(model.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(tap, open_loop)


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_indices_norm_and_stopping_early(key):
    model, x = opened(key), FAMILIES[key].images().double()
    every = model.forward_intermediates(x, intermediates_only=True)
    count = len(every)
    for indices in (2, [0], [count - 2], [0, count - 1], [-1], list(range(count))):
        wanted = range(count)[-indices:] if isinstance(indices, int) else [i % count for i in indices]
        for stop in (False, True):
            taps = model.forward_intermediates(x, indices=indices, stop_early=stop, intermediates_only=True)
            assert len(taps) == len(wanted)
            for tap, index in zip(taps, wanted, strict=True):
                assert torch.equal(tap, every[index]), (indices, stop)
    final, taps = model.forward_intermediates(x, indices=[count - 1], norm=True)
    assert torch.equal(final, model.forward_features(x))
    if key == "vit":  # the norm that timm applies to what is tapped, applied to what is settled
        tokens = model.forward_intermediates(
            x, indices=[1, 3], norm=True, output_fmt="NLC", intermediates_only=True
        )
        raw = model.forward_intermediates(x, indices=[1, 3], output_fmt="NLC", intermediates_only=True)
        for normed, value in zip(tokens, raw, strict=True):
            prefix = torch.zeros_like(value[:, :1])
            assert torch.allclose(normed, model.norm(torch.cat([prefix, value], 1))[:, 1:])
        prefixed = model.forward_intermediates(
            x, indices=[2], return_prefix_tokens=True, intermediates_only=True
        )
        assert prefixed[0][1].shape == (3, 1, 24)
    with pytest.raises((ValueError, AssertionError)):
        model.forward_intermediates(x, indices=[99])
    with pytest.raises(TypeError, match="indexes"):
        model.forward_intermediates(x, indexes=[0])


@pytest.mark.parametrize("key", KEYS)
def test_gradients_through_settled_features(key):
    """Against finite differences of the features, along one direction of all parameters."""
    model = opened(key, tol=1e-11, max_iter=200)
    x = FAMILIES[key].images(2).double()
    inside = len(model.forward_intermediates(x, intermediates_only=True)) - 2
    names = [n for n, p in model.named_parameters() if "gate" not in n]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the kinks of residual branches that begin at zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).double())
    along = {n: torch.randn(model.get_parameter(n).shape, generator=generator).double() for n in names}

    def loss(step: float = 0.0) -> torch.Tensor:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, direction in along.items():
                twin.get_parameter(name).add_(step * direction)
            torch.manual_seed(1)  # of drop-path
            (tap,) = twin.forward_intermediates(x, indices=[inside], intermediates_only=True)
        return tap.square().mean()

    for training in (False, True):
        model.train(training)
        model.zero_grad()
        before = {name: b.clone() for name, b in model.named_buffers()}
        torch.manual_seed(1)
        (tap,) = model.forward_intermediates(x, indices=[inside], intermediates_only=True)
        tap.square().mean().backward()
        (record,) = tw.report(model)
        assert bool((record.status == int(tw.Status.converged)).all())
        counted = [b for name, b in model.named_buffers() if "num_batches" in name]
        old = [b for name, b in before.items() if "num_batches" in name]
        assert all(int(a - b) == training for a, b in zip(counted, old, strict=True))  # counted once
        slope = sum(
            float((model.get_parameter(n).grad * along[n]).sum())
            for n in names
            if model.get_parameter(n).grad is not None
        )
        h = 1e-7  # small, so that few activations change sides
        expected = float(loss(h) - loss(-h)) / (2 * h)
        assert slope == pytest.approx(expected, rel=1e-3, abs=1e-6)


NETS = {
    "resnet": [FeatureListNet, FeatureDictNet, FeatureHookNet, FeatureGetterNet],
    "convnext": [FeatureListNet, FeatureGetterNet],
    "vit": [FeatureGetterNet],
    "swin": [FeatureListNet, FeatureGetterNet],
    "zoo": [FeatureListNet, FeatureGetterNet],
}


@pytest.mark.parametrize(("key", "cls"), [(key, cls) for key, many in NETS.items() for cls in many])
@torch.no_grad()
def test_features_only(key, cls):
    family = FAMILIES[key]
    options = {**family.options, "features_only": True, "feature_cls": cls}
    wormhole = dict(wormholes=family.span, policy="always", max_iter=100, tol=1e-7, scale=0.05)
    torch.manual_seed(0)
    plain = timm.create_model(family.name, **options).double().eval()
    net = timm.create_model(f"twnn_{family.name}", **options, **wormhole).double().eval()
    assert isinstance(net, cls)
    net.load_state_dict(plain.state_dict(), strict=True)
    assert net.feature_info.channels() == plain.feature_info.channels()
    assert net.feature_info.reduction() == plain.feature_info.reduction()
    x = family.images().double()
    found, before = _listed(net(x)), _listed(plain(x))
    (record,) = tw.report(net)
    assert bool((record.status == int(tw.Status.converged)).all()) and int(record.steps.min()) > 1
    whole = family.plain(num_classes=0).double().eval()
    whole = tw.attach(whole, **wormhole).double()
    state = {k.removeprefix("model.").removeprefix("body."): v for k, v in net.state_dict().items()}
    renamed = {_original(k, whole.state_dict()): v for k, v in state.items()}
    whole.load_state_dict({k: v for k, v in renamed.items() if k in whole.state_dict()}, strict=False)
    taps = whole.forward_intermediates(x, intermediates_only=True)[-len(found) :]
    taps = taps if key != "swin" or cls is FeatureGetterNet else [t.permute(0, 2, 3, 1) for t in taps]
    changed = 0
    for feature, other, tap in zip(found, before, taps, strict=True):
        assert feature.shape == other.shape
        assert float((feature - tap).norm()) <= 1e-5 * float(tap.norm())
        changed += not torch.equal(feature, other)
    assert changed >= 2
    tw.configure(net, policy="never")
    assert all(torch.equal(a, b) for a, b in zip(_listed(net(x)), before, strict=True))
    tw.configure(net, policy="always")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(torch.equal(a, b) for a, b in zip(_listed(twin(x)), found, strict=True))


def _listed(features) -> list[torch.Tensor]:
    return list(features.values()) if isinstance(features, dict) else list(features)


def _original(name: str, keys) -> str:
    """The name before timm flattened the model's containers."""
    return name if name in keys else name.replace("_", ".", 1)


@torch.no_grad()
def test_out_indices_are_honoured():
    family = FAMILIES["resnet"]
    options = {**family.options, "features_only": True, "out_indices": (1, 3, 4)}
    net = timm.create_model("twnn_resnet18", wormholes=family.span, **options).eval()
    assert net.feature_info.channels() == [16, 24, 32] and net.feature_info.reduction() == [4, 16, 32]
    assert [f.shape[1] for f in net(family.images())] == [16, 24, 32]
    with pytest.raises((tw.AttachError, tw.UnknownNameError), match="layer4"):
        timm.create_model("twnn_resnet18", wormholes=family.span, **{**options, "out_indices": (1, 2)})
    short = timm.create_model(
        "twnn_resnet18", wormholes="layer3->layer2", **{**options, "out_indices": (1, 2, 3)}
    )
    assert [f.shape[1] for f in short.eval()(family.images())] == [16, 16, 24]
    vit = FAMILIES["vit"]
    net = timm.create_model(
        "twnn_vit_tiny_patch16_224",
        wormholes="blocks.2->blocks.1",
        **vit.options,
        features_only=True,
        out_indices=(1, 2),
    )
    assert len(net(vit.images())) == 2 and len(net.model.blocks) == 3


def test_features_only_trains():
    family = FAMILIES["convnext"]
    net = timm.create_model(
        "twnn_convnext_atto",
        **family.options,
        features_only=True,
        wormholes=family.span,
        policy="always",
        scale=0.05,
    ).train()
    sum(f.square().mean() for f in net(family.images())).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    names = {name for name, _ in net.named_parameters()}
    assert any(name.startswith("wormholes.") for name in names)
    expected = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    net.set_grad_checkpointing(True)
    sum(f.square().mean() for f in net(family.images())).backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name


@torch.no_grad()
def test_pruning():
    family = FAMILIES["resnet"]
    model = family.twnn("layer3->layer2", policy="always").eval()
    x = family.images()
    expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    keys = list(model.state_dict())
    with pytest.raises(tw.AttachError, match=r"'layer3.*part of span 'layer3->layer2'"):
        model.prune_intermediate_layers([1, 2])
    assert list(model.state_dict()) == keys  # a refusal changes nothing
    assert model.prune_intermediate_layers([1, 3]) == [1, 3]
    assert len(model.state_dict()) < len(keys)
    pruned = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, expected, strict=True))


def test_a_pass_that_ends_inside_of_a_span_is_told(monkeypatch):
    """Never an open-loop value where a settled one was asked for."""
    model, x = opened("resnet"), FAMILIES["resnet"].images().double()
    expected = model.forward_intermediates(x, indices=[3], stop_early=True, intermediates_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(Manners, "_inside", lambda *_: False)  # as if feature_info did not tell
        with pytest.raises(tw.AttachError, match=r"ended inside of span 'layer4->layer3'"):
            model.forward_intermediates(x, indices=[3], stop_early=True)
    after = model.forward_intermediates(x, indices=[3], stop_early=True, intermediates_only=True)
    assert torch.equal(after[0], expected[0])
