"""Ways through timm that touch a model with wormholes: its hub, its reparameterisation, tiny batches."""

from __future__ import annotations

import huggingface_hub
import pytest
import timm
import timm.models._hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.utils import reparameterize_model

import twnn_plugin as tw


def images(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders; what was asked for."""
    asked = []

    def download(repo_id, filename, revision=None, cache_dir=None, **kwargs):
        asked.append((repo_id, filename, revision))
        path = tmp_path / repo_id / filename
        if not path.exists():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(path)

    # timm's one way to a hub: huggingface_hub.hf_hub_download, by the name it imported it under.
    known = timm.models._hub.hf_hub_download
    assert getattr(known, "func", known) is huggingface_hub.hf_hub_download
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return tmp_path, asked


def trained(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("twnn_test_resnet", num_classes=4, wormholes="layer3->layer2", **options)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model.eval()


def test_a_model_comes_back_from_a_hub(hub):
    folder, asked = hub
    options = {"gate": ["sigmoid", {"hidden": 8}], "tol": 1e-2, "message": ["verlet", {"layers": 2}]}
    model = trained(**options)
    args = {"wormholes": "layer3->layer2", **options}
    timm.models.save_for_hf(model, str(folder / "someone" / "net"), model_args=args)
    again = timm.create_model("hf-hub:someone/net@v2", pretrained=True).eval()
    assert ("someone/net", "config.json", "v2") in asked
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.wormholes[0].feedback.settings.tol == 1e-2 and again.num_classes == 4
    for net in (model, again):
        tw.configure(net, policy="always")
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
    assert tw.report(again)[0].open.all()


def test_a_plain_model_of_a_hub_gets_wormholes(hub):
    folder, asked = hub
    torch.manual_seed(1)
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    timm.models.save_for_hf(plain, str(folder / "someone" / "plain"))
    overlay = {"hf_hub_id": "someone/plain", "num_classes": 4}
    derived = timm.create_model("twnn_test_resnet", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert asked and all(repo == "someone/plain" for repo, _, _ in asked)
    with torch.no_grad():
        assert torch.equal(derived(images()), plain(images()))


def test_a_repository_that_is_not_there_is_said_by_timm(hub):
    with pytest.raises(EntryNotFoundError, match="someone/nothing"):
        timm.create_model("hf-hub:someone/nothing", pretrained=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wormhole_whose_module_was_fused_away_does_not_go_silent(inplace):
    torch.manual_seed(0)
    model = timm.create_model(
        "twnn_repvit_m0_9", num_classes=3, wormholes="stem.conv2->stem.conv1", policy="always"
    ).eval()
    x = images()
    with torch.no_grad():
        model(x)
        assert tw.report(model)[0].open.all()
        fused = reparameterize_model(model, inplace=inplace)
        for call in (fused, fused.forward_features, lambda x: fused.forward_intermediates(x, indices=[0])):
            with pytest.raises(
                tw.AttachError, match=r"'stem.conv1'.*removed or replaced.*reparameterize_model"
            ):
                call(x)
        with pytest.raises(tw.AttachError, match="removed or replaced"):
            tw.export(fused, x, steps=2)
        if not inplace:
            model(x)  # the copy was changed


def test_a_wormhole_around_what_was_fused_goes_on():
    torch.manual_seed(0)
    model = timm.create_model("twnn_repvit_m0_9", num_classes=3, policy="always", tol=1e-6).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        fused = reparameterize_model(model)
        assert torch.allclose(fused(x), expected, rtol=1e-3, atol=1e-5)
    assert tw.report(fused)[0].open.all()
    assert len(list(fused.parameters())) < len(list(model.parameters()))  # it was fused


def test_a_stage_that_was_exchanged_is_said():
    model = trained()
    model.layer3 = torch.nn.Identity()
    with pytest.raises(tw.AttachError, match=r"'layer3'.*removed or replaced"):
        model(images())


def test_statistics_of_two_values_are_not_taken_for_another_map():
    """Two samples on a map of one position: rounding is as large as the values, in float32."""
    torch.manual_seed(0)
    model = timm.create_model("twnn_efficientvim_m1", num_classes=3, policy="always").train()
    one_map = tw.spans(model)[0].group.one_map
    model(images()).sum().backward()
    assert one_map.functional is None  # nothing could be seen, so that the next pass looks again
    model(images(batch=6)).sum().backward()
    assert one_map.functional is False
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "name",
    [
        "visformer_tiny",
        "levit_128s",
        "mvitv2_tiny",
        "gcvit_xxtiny",
        "coatnet_pico_rw_224",
        "coatnet_nano_rw_224",
        "botnet26t_256",
    ],
)
def test_image_sizes_that_timm_takes_are_taken(name):
    """Of models that are made for one size, and cut no patches that know it."""
    torch.manual_seed(0)
    plain = timm.create_model(name, img_size=64, num_classes=3).eval()
    torch.manual_seed(0)
    model = timm.create_model(f"twnn_{name}", img_size=64, num_classes=3, budget="1.2x").eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images()), plain(images()))
    tw.configure(model, budget="1.5x")  # a pass is counted again
    assert "wormholes" in dict(tw.attach(plain).named_children())
