"""timm's tools on models with wormholes: optimisers, averages, checkpoints, layouts, sizes, dtypes."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import timm
import timm.data
import timm.optim
import timm.utils
import torch
from torch import nn

import twnn_plugin as tw

from .families import FAMILIES

KEYS = list(FAMILIES)


def opened(key: str, **options) -> nn.Module:
    """A model whose wormhole is open, in eval mode."""
    return FAMILIES[key].twnn(policy="always", **options).eval()


def converged(model: nn.Module) -> bool:
    return all(
        bool((r.status == int(tw.Status.converged)).all())
        and bool((r.gate > 0).all())
        and int(r.steps.min()) > 1
        for r in tw.report(model)
    )


@torch.no_grad()
def test_heads_and_features():
    for key in KEYS:
        model, x = opened(key), FAMILIES[key].images()
        features = model.forward_features(x)
        assert converged(model)
        assert torch.equal(model.forward_head(features), model(x)), key
        assert model.get_classifier().out_features == 5
        model.reset_classifier(7)
        assert model(x).shape == (3, 7) and model.get_classifier().out_features == 7
        model.reset_classifier(0)
        assert model(x).shape == (3, model.num_features)
        assert torch.equal(model.forward_features(x), features), key


@pytest.mark.parametrize("key", KEYS)
def test_created_without_classifier_and_with_other_channels(key):
    family = FAMILIES[key]
    for options in ({"num_classes": 0}, {"in_chans": 1}, {"in_chans": 5}):
        torch.manual_seed(0)
        options = {"num_classes": 5, **family.options, **options}
        plain = timm.create_model(family.name, **options).eval()
        model = timm.create_model(f"twnn_{family.name}", wormholes=family.span, **options).eval()
        model.load_state_dict(plain.state_dict(), strict=True)
        x = torch.randn(2, options.get("in_chans", 3), family.size, family.size)
        with torch.no_grad():
            assert torch.equal(plain(x), model(x))
            tw.configure(model, policy="always")
            assert model(x).shape == plain(x).shape and int(tw.report(model)[0].steps.min()) > 0


SIZES = {"resnet": (96, (48, 80)), "convnext": (96, (64, 96)), "zoo": (48, (24, 40))}


@pytest.mark.parametrize("key", SIZES)
@torch.no_grad()
def test_other_image_sizes_at_run_time(key):
    """Trained at one size, used at others: larger, and not square."""
    family, model = FAMILIES[key], opened(key)
    plain = family.plain().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "wormholes" not in k})
    for size in SIZES[key]:
        x = family.images(size=(size, size) if isinstance(size, int) else size)
        tw.configure(model, policy="always")
        assert not torch.equal(model(x), plain(x)) and converged(model)
        tw.configure(model, policy="never")
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("key", ["vit", "swin"])
@torch.no_grad()
def test_set_input_size(key):
    family = FAMILIES[key]
    for size in ((96, 96), (64, 128)):
        model, plain = opened(key), family.plain().eval()
        for each in (model, plain):
            each.set_input_size(size)
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "wormholes" not in k})
        x = family.images(size=size)
        assert not torch.equal(model(x), plain(x)) and converged(model)
        tw.configure(model, policy="never")
        assert torch.equal(model(x), plain(x))


@torch.no_grad()
def test_dynamic_image_size_of_a_vit():
    options = {**FAMILIES["vit"].options, "dynamic_img_size": True, "num_classes": 5}
    model = timm.create_model(
        "twnn_vit_tiny_patch16_224", policy="always", max_iter=60, scale=0.05, **options
    )
    for size in ((32, 32), (64, 64), (48, 96)):
        assert model.eval()(FAMILIES["vit"].images(size=size)).shape == (3, 5) and converged(model)


@pytest.mark.parametrize("key", KEYS)
def test_channels_last(key):
    family = FAMILIES[key]
    model, x = opened(key, tol=1e-5), family.images()
    with torch.no_grad():
        expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=1e-3, atol=1e-4) and converged(model)
    model.train()(x).square().sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("key", KEYS)
def test_other_dtypes(key, dtype):
    family = FAMILIES[key]
    model = opened(key, tol=2e-2 if dtype != torch.float64 else 1e-9)
    x = family.images()
    with torch.no_grad():
        expected = model(x)
        out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and converged(model) and tw.report(model)[0].multiply_adds > 0
    assert torch.allclose(out.float(), expected, rtol=0.1, atol=0.1)
    out = model.train()(x.to(dtype))
    out.float().square().mean().backward()
    assert out.dtype == dtype
    assert all(
        p.grad is None or (p.grad.dtype == dtype and bool(p.grad.isfinite().all()))
        for p in model.parameters()
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("key", KEYS)
def test_autocast(key, training):
    family = FAMILIES[key]
    model = opened(key, tol=2e-2).train(training)
    x = family.images()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert torch.allclose(out.float(), expected, rtol=0.1, atol=0.1)
    record = tw.report(model)[0]
    assert bool((record.status == int(tw.Status.converged)).all())
    out.float().square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("key", KEYS)
def test_copies_pickles_and_the_whole_model_in_a_file(key, tmp_path):
    model, x = opened(key), FAMILIES[key].images()
    torch.save(model, tmp_path / "whole.pt")
    with torch.no_grad():
        expected = model(x)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        twins.append(torch.load(tmp_path / "whole.pt", weights_only=False))
        for twin in twins:
            assert torch.equal(twin(x), expected)
            for parameter in twin.parameters():  # nothing is shared with the original
                parameter.zero_()
            assert twin.set_grad_checkpointing.__self__.model is twin
            assert twin.wormholes[0].group is not model.wormholes[0].group
        assert torch.equal(model(x), expected)


def test_state_dict_keys_and_plain_checkpoints():
    for key in KEYS:
        family = FAMILIES[key]
        plain, model = family.plain(), family.twnn()
        mine = [name for name in model.state_dict() if name.startswith("wormholes.")]
        assert [name for name in model.state_dict() if name not in mine] == list(plain.state_dict())
        model.load_state_dict(plain.state_dict(), strict=True)
        with pytest.raises(RuntimeError, match="Missing key"):
            broken = {k: v for k, v in model.state_dict().items() if k != mine[0]}
            model.load_state_dict(broken, strict=True)


def test_checkpoints_of_timm(tmp_path):
    model, x = opened("resnet"), FAMILIES["resnet"].images()
    with torch.no_grad():
        expected = model(x)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3)
    ema = timm.utils.ModelEmaV3(model)
    saver = timm.utils.CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0, metric=1.0)
    for use_ema in (False, True):
        again = opened("resnet", scale=0.3)
        for parameter in again.parameters():
            parameter.data.zero_()
        timm.models.load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=use_ema)
        with torch.no_grad():
            assert torch.equal(again(x), expected)
    # A checkpoint of the plain network loads, too, strictly.
    torch.save(FAMILIES["resnet"].plain().state_dict(), tmp_path / "plain.pt")
    timm.models.load_checkpoint(again, str(tmp_path / "plain.pt"), strict=True)


def test_moving_average():
    model, x = opened("vit"), FAMILIES["vit"].images()
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    scale = model.wormholes[0].feedback.message.scale
    with torch.no_grad():
        scale.fill_(1.0)
        before = ema.module.wormholes[0].feedback.message.scale.clone()
        ema.update(model)
        assert torch.allclose(ema.module.wormholes[0].feedback.message.scale, (before + 1.0) / 2)
        assert torch.isfinite(ema.module(x)).all() and converged(ema.module)
    assert timm.utils.unwrap_model(ema) is ema.module


def test_save_to_and_load_from_a_folder(tmp_path):
    family = FAMILIES["resnet"]
    options = {**family.options, "wormholes": family.span, "policy": "always", "max_iter": 60, "scale": 0.05}
    model = timm.create_model("twnn_resnet18", num_classes=5, **options).eval()
    timm.models.save_for_hf(model, str(tmp_path), model_args=options)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "twnn_resnet18" and config["num_classes"] == 5
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = family.images()
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and converged(again)


def test_data_configuration():
    for key in KEYS:
        family = FAMILIES[key]
        expected = timm.data.resolve_model_data_config(family.plain())
        assert timm.data.resolve_model_data_config(family.twnn()) == expected


@pytest.mark.parametrize("key", KEYS)
def test_layer_decay(key):
    """Wormholes are new, like a head: they learn at the full rate, and nothing changes for the backbone."""
    family = FAMILIES[key]
    plain, model = family.plain(), family.twnn(gate=("straight_through", {"budget": 0.3}))

    def scales(net):
        groups = timm.optim.param_groups_layer_decay(net, weight_decay=0.05, layer_decay=0.5)
        names = {id(p): name for name, p in net.named_parameters()}
        return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    before, after = scales(plain), scales(model)
    assert set(after) == {name for name, _ in model.named_parameters()}
    for name, (scale, decay) in after.items():
        if name in before:
            assert (scale, decay) == before[name], name
        else:
            parameter = model.get_parameter(name)
            assert scale == 1.0 and (decay == 0.0) == (parameter.dim() <= 1), name
    assert min(scale for scale, _ in before.values()) < 0.5


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_optimizers(opt):
    for key in KEYS:
        model = FAMILIES[key].twnn(policy="always").train()
        optimizer = timm.optim.create_optimizer_v2(
            model, opt=opt, lr=1e-2, weight_decay=0.05, layer_decay=0.7
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(FAMILIES[key].images()).square().sum().backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {n for n in before if n.startswith("wormholes.0.feedback.message")} <= moved, key


def test_no_weight_decay():
    for key in KEYS:
        plain, model = FAMILIES[key].plain(), FAMILIES[key].twnn()
        own = set(plain.no_weight_decay()) if hasattr(plain, "no_weight_decay") else set()
        mine = model.no_weight_decay() - own
        assert own <= model.no_weight_decay() and all(name.startswith("wormholes.") for name in mine)
        ends = {name.rpartition("feedback.")[2] for name in mine}
        assert {"message.scale", "message.norm.weight", "message.norm.bias", "gate.score.bias"} <= ends
        assert "gate.hidden.weight" not in ends and "message.project.weight" not in ends


def test_freeze_and_train_the_wormholes_alone():
    for key in KEYS:
        model = FAMILIES[key].twnn(policy="always")
        names = [name for name, _ in model.named_children() if name != "wormholes"]
        timm.utils.freeze(model, names)
        for parameter in model.parameters(recurse=False):  # a class token, say
            parameter.requires_grad_(False)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable and all(name.startswith("wormholes.") for name in trainable)
        model.train()(FAMILIES[key].images()).square().sum().backward()
        (record,) = tw.report(model)
        assert record.adjoint is not None
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("wormholes."), name
        assert bool(model.wormholes[0].feedback.message.scale.grad.any())


def test_the_module_tree_is_sane():
    for key in KEYS:
        plain, model = FAMILIES[key].plain(), FAMILIES[key].twnn()
        tree = dict(model.named_modules())
        assert [name for name in tree if not name.startswith("wormholes")] == [
            n for n, _ in plain.named_modules()
        ]
        assert len(tree) == len({id(module) for module in tree.values()})  # no module is held twice
        assert "layer" in repr(model) or "block" in repr(model)
        own = sum(p.numel() for p in model.wormholes.parameters())
        assert sum(p.numel() for p in model.parameters()) == own + sum(p.numel() for p in plain.parameters())


@torch.no_grad()
def test_reparameterized_for_inference():
    """timm fuses a block's branches in place; the wormhole's hooks see the fused blocks."""
    torch.manual_seed(0)
    model = timm.create_model("mobileone_s0", num_classes=5).eval()
    model = tw.attach(model, wormholes="stages.2->stages.1", policy="always", scale=0.5, max_iter=60)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    assert converged(model)
    fused = timm.utils.reparameterize_model(model)
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(fused(x), expected, rtol=1e-2, atol=1e-3) and converged(fused)
