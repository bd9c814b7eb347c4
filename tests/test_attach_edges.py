"""The rims of attach, configure and calibrate: odd orders of calls, impossible options, files, devices."""

from __future__ import annotations

import copy
import pickle
from typing import ClassVar

import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import flop_registry

import twnn_plugin as tw

IMAGES, LABELS = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(4)
OVERLAPPING = ["layer4->layer3", "layer3->layer2"]


def made(name="resnet10t", **options):
    torch.manual_seed(0)
    return timm.create_model(f"twnn_{name}", **{"num_classes": 5, **options})


class Plain(nn.Module):
    """A model that no adapter knows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x))).mean((2, 3)))


class Between(Plain):
    """The same with a computation between its stages."""

    def forward(self, x):
        return self.head(self.b(1.1 * self.a(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("name", ["convnext_atto", "regnetx_002", "resnet10t"])
def test_checkpointing_answers_once_though_the_classifier_lies_inside_of_a_head(name):
    found = []
    for checkpoint in (False, True):
        model = made(name, closed_head=True, policy="always", max_iter=3).train()
        model.set_grad_checkpointing(checkpoint)
        torch.manual_seed(1)
        loss = F.cross_entropy(model(IMAGES), LABELS) + tw.closed_loss(model, F.cross_entropy, LABELS)
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_saved_closed_head_is_loaded_from_a_folder_and_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"num_classes": 6, "closed_head": True}
    model = made(**options)
    with torch.no_grad():
        model.closed_head.heads[0].weight.add_(1.0)
    timm.models.save_for_hf(model, "saved", model_args=options)
    torch.save(model.state_dict(), "saved.pth")
    overlay = {"file": "saved.pth", "num_classes": 6}
    folder = timm.create_model("local-dir:saved", pretrained=True)
    file = timm.create_model("twnn_resnet10t", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    for again in (folder, file):
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    other = timm.create_model("local-dir:saved", pretrained=True, num_classes=3)
    assert torch.equal(other.closed_head.heads[0].weight, other.fc.weight) and len(other.fc.weight) == 3
    without = timm.create_model("local-dir:saved", pretrained=True, closed_head=False)
    assert torch.equal(without.fc.weight, model.fc.weight) and not hasattr(without, "closed_head")


def test_a_trained_closed_head_is_not_lost_unasked(tmp_path):
    model = made(closed_head=True)
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    source = {
        "pretrained": True,
        "num_classes": 5,
        "pretrained_cfg_overlay": {"file": str(tmp_path / "saved.pth"), "num_classes": 5},
    }
    with pytest.raises(tw.AttachError, match="Pass closed_head=True"):
        timm.create_model("twnn_resnet10t", **source)
    without = timm.create_model("twnn_resnet10t", closed_head=False, **source)  # said, not forgotten
    assert torch.equal(without.fc.weight, model.fc.weight) and not hasattr(without, "closed_head")


@pytest.mark.parametrize("given", [2, "", None, ["fc"], 1.0])
def test_a_closed_head_is_on_or_off_or_a_path(given):
    model = timm.create_model("resnet10t", num_classes=5)
    with pytest.raises(tw.OptionError, match="closed_head is True, False, or the path"):
        tw.attach(model, closed_head=given)
    assert not hasattr(model, "wormholes")


@pytest.mark.parametrize("weight", ["nonsense", -1.0, True, float("nan")])
@pytest.mark.parametrize("closed_head", [False, True])
def test_the_weight_of_a_closed_head_is_looked_at_without_one_too(closed_head, weight):
    with pytest.raises(tw.OptionError, match="closed_weight is the weight of a loss"):
        made(closed_head=closed_head, closed_weight=weight)


def test_a_gate_is_not_shared_between_wormholes():
    gate = tw.gates.registry.make("sigmoid", channels=512)
    model = timm.create_model("resnet10t", num_classes=5)
    spans = ["layer4->layer4", "layer2->layer2"]
    with pytest.raises(tw.OptionError, match=r"gate is one SigmoidGate.*2 wormholes.*\(name, options\)"):
        tw.attach(model, spans, gate=gate)
    assert not hasattr(model, "wormholes")
    assert tw.attach(model, spans[:1], gate=gate).wormholes[0].feedback.gate is gate


@pytest.mark.parametrize("training", [False, True])
def test_a_policy_that_comes_later_is_in_the_mode_of_its_wormhole(training):
    model = made(wormholes=["layer4->layer4", "layer2->layer2"]).train(training)
    tw.configure(model, policy="always")
    assert all(module.training is training for module in model.modules())
    if not training:
        assert len(next(tw.stream(model, [IMAGES]))) == 4


@pytest.mark.parametrize("policy", ["halting", "dynalay"])
def test_a_policy_that_picks_among_layers_is_refused_later_too(policy):
    model = made().eval()
    with pytest.raises(tw.OptionError, match="picks among the layers"):
        tw.configure(model, policy=policy)
    assert model(IMAGES).shape == (4, 5)


def test_a_budget_in_multiply_adds_may_come_later_where_an_example_was_given():
    model = tw.attach(Plain(), stages=["a", "b"], example=IMAGES, budget=0.3)
    early = tw.attach(Plain(), stages=["a", "b"], example=IMAGES, budget="1.3x")
    price = float(early.wormholes[0].feedback.gate.price)
    feedback = model.wormholes[0].feedback
    tw.configure(nn.Sequential(model), budget="1.3x", tol=0.5)  # the whole that it is a part of will do
    assert float(feedback.gate.price) == pytest.approx(price) and feedback.settings.tol == 0.5
    feedback.gate.price.fill_(1.0)
    tw.calibrate(model.double(), [IMAGES.double()], budget="1.5x")
    assert float(feedback.gate.price) == pytest.approx(price) and feedback.gate.budget == "1.5x"


def test_a_refused_budget_leaves_everything_as_it_was():
    model = tw.attach(Plain(), stages=["a", "b"], example=IMAGES, budget=0.3)
    model.wormholes.example = None  # as if the adapter that knew one were gone
    gate, settings = model.wormholes[0].feedback.gate, model.wormholes[0].feedback.settings
    for change in (
        lambda: tw.configure(model, budget="1.3x", tol=0.5, temperature=2.0, policy="always"),
        lambda: tw.calibrate(model, [IMAGES], budget="1.3x"),
    ):
        with pytest.raises(tw.OptionError, match="No input is known that this Plain runs with"):
            change()
        assert (gate.budget, gate.temperature, float(gate.price)) == (0.3, 1.0, 1.0)
        assert model.wormholes[0].feedback.settings == settings


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("poolformer_s12", {}),
        ("poolformer_s12", {"closed_head": True}),
        ("mobilenetv3_small_050", {"features_only": True}),
    ],
)
def test_layer_decay_without_a_group_matcher_leaves_the_backbones_groups_alone(name, options):
    def scales(model):
        optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.75)
        by_id = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        return {path: by_id[id(p)] for path, p in model.named_parameters()}

    plain = scales(timm.create_model(name, **{k: v for k, v in options.items() if k != "closed_head"}))
    model = timm.create_model(f"twnn_{name}", **options)
    found = scales(model)
    assert all(found[path] == scale for path, scale in plain.items())
    assert {scale for path, scale in found.items() if path not in plain} == {1.0}
    assert timm.models.group_modules(model, model.group_matcher(coarse=True))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_already_is_refused(in_place):
    model = timm.create_model("resnet10t", num_classes=5).eval()
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    with pytest.raises(tw.AttachError, match=r"compiled already.*compile it then"):
        tw.attach(compiled, "layer4->layer3")
    assert not hasattr(model, "wormholes")


@pytest.mark.parametrize("budget", ["1.5x", "2 rows"])
def test_calibration_meets_the_budgets_of_overlapping_wormholes_together(budget):
    torch.manual_seed(2)
    batches = list(torch.randn(128, 3, 32, 32).split(32))
    model = made(wormholes=OVERLAPPING, scale=0.3, max_iter=8).eval()
    tw.calibrate(model, batches, budget=budget)
    spent, paying = 0, 0
    with torch.no_grad():
        for batch in batches:
            model(batch)
            first, second = tw.report(model)
            spent, paying = spent + first.evaluations, paying + int((first.open | second.open).sum())
    allowed = 128 * model.wormholes[0].feedback.gate.replays()
    assert abs(spent - allowed) <= max(0.03 * allowed, 1.5 * spent / paying)  # as near as whole samples come


@pytest.mark.parametrize("options", [{"layers": 2}, {"layers": 2, "kernel_size": 3, "shared": True}])
def test_propagated_messages_go_with_channels_last(options):
    model = made(message=("verlet", options), policy="always", max_iter=3).eval()
    path = model.wormholes[0].feedback.message.path
    before, weight, shape = model(IMAGES), path.weight, path.weight.shape
    model.to(memory_format=torch.channels_last)
    assert model.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert path.weight is weight and weight.shape == shape and weight.is_contiguous()
    after = model(IMAGES.to(memory_format=torch.channels_last))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert model.double().wormholes[0].feedback.message.path.weight.dtype == torch.float64


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_a_classifier_that_goes_takes_the_closed_head_with_it_until_there_is_another(name):
    model = made(name, closed_head=True, policy="always", max_iter=3).train()
    model.reset_classifier(0)
    assert model(IMAGES).shape == (4, model.num_features)
    assert tw.closed_logits(model) is None and tw.closed_loss(model, F.cross_entropy, LABELS) is None
    assert not [key for key in model.state_dict() if key.startswith("closed_head.")]
    model.load_state_dict(model.state_dict())
    model.reset_classifier(7)
    assert model(IMAGES).shape == (4, 7) and tw.closed_logits(model).shape == (4, 7)
    assert torch.equal(model.closed_head.heads[0].weight, model.get_classifier().weight)


def test_a_named_classifier_is_followed_by_its_name():
    model = made(closed_head="fc", policy="always", max_iter=3).train()
    model.reset_classifier(0)
    model.reset_classifier(7)
    assert model(IMAGES).shape == (4, 7) and tw.closed_logits(model).shape == (4, 7)


def test_models_are_made_on_the_meta_device():
    with torch.device("meta"):
        model = made()
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("scale", ["much", True, float("nan"), 0])
def test_a_scale_that_is_none_is_named(scale):
    with pytest.raises(tw.AttachError, match="scale must be a finite number, not zero"):
        made(scale=scale)


def test_calibration_without_a_sample_or_with_a_generator_says_so_and_changes_nothing():
    model = made(budget=0.3).eval()
    gate = model.wormholes[0].feedback.gate
    for batches, budget, reason in (
        ([IMAGES[:0]], 0.4, "without a single sample"),
        ((batch for batch in [IMAGES]), "1.3x", "a generator can be gone through only once"),
        ((batch for batch in [IMAGES]), "2 rows", "a generator can be gone through only once"),
    ):
        with pytest.raises(tw.OptionError, match=reason):
            tw.calibrate(model, batches, budget=budget)
        assert gate.budget == 0.3 and float(gate.threshold) == 0.0 and float(gate.price) == 1.0
    tw.calibrate(model, (batch for batch in [IMAGES]), budget=0.4)  # once is enough for a share
    assert float(gate.threshold) != 0.0


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        *[
            ({"gate": gate}, "gate is a registered name")
            for gate in (5, ("sigmoid",), ("sigmoid", "x"), ("sigmoid", {1: 2}))
        ],
        ({"gate": ("sigmoid",), "budget": 0.3}, "gate is a registered name"),
        ({"fallback": "no"}, "fallback is True or False; got 'no'"),
    ],
)
def test_impossible_options_are_option_errors(option, reason):
    with pytest.raises(tw.OptionError, match=reason):
        made(**option)


def test_the_advice_for_features_only_nets_is_one_that_works():
    options = {"features_only": True, "fallback": True}
    with pytest.raises(tw.AttachError, match="let out_indices reach the span's end") as caught:
        made("hrnet_w18_small", out_indices=(0,), **options)
    assert "fallback=True" not in str(caught.value)
    assert tw.spans(made("hrnet_w18_small", out_indices=(0, 1), **options))


def test_the_image_size_is_found_where_the_first_convolution_is():
    model = made("mixer_s32_224", img_size=64).eval()
    assert model(IMAGES).shape == (4, 5)


def test_a_model_that_runs_with_nothing_is_refused_in_one_sentence_with_advice():
    class Never(Plain):
        pretrained_cfg: ClassVar[dict] = {}

        def forward(self, x):
            raise ValueError("Not today.")

    with pytest.raises(tw.AttachError, match=r"Not today\. Make the plain model and give attach an input"):
        tw.attach(Never(), "b->a", stages=["a", "b"])


@pytest.mark.parametrize("fallback", [False, True])
def test_a_model_that_runs_on_the_meta_device_alone_is_refused(fallback):
    class Picky(Plain):
        def forward(self, x):
            if not x.is_meta:
                raise IndexError("not these images")
            return super().forward(x)

    with pytest.raises(tw.AttachError, match=r"runs with no example input.*not these images"):
        tw.attach(Picky(), "b->a", stages=["a", "b"], example=torch.randn(2, 3, 16, 16), fallback=fallback)


def test_attention_is_counted_on_every_device():
    ops = torch.ops.aten
    query, key, value = (torch.randn(2, 3, rows, width) for rows, width in ((17, 8), (19, 8), (19, 4)))
    forward = [ops._scaled_dot_product_flash_attention_for_cpu, ops._scaled_dot_product_flash_attention]
    here, there = (flop_registry[op](query, key, value, out_val=query) for op in forward)
    assert here == there == 2 * 2 * 3 * 17 * 19 * (8 + 4)
    backward = [
        ops._scaled_dot_product_flash_attention_for_cpu_backward,
        ops._scaled_dot_product_flash_attention_backward,
    ]
    gradient = torch.randn(2, 3, 17, 4)
    here, there = (flop_registry[op](gradient, query, key, value, out_val=query) for op in backward)
    assert here == there > 0


def test_what_a_model_keeps_in_eval_mode_is_not_that_of_the_passes_of_attach():
    torch.manual_seed(0)
    plain = timm.create_model("levit_128s", img_size=32, num_classes=5).eval()
    model = tw.attach(copy.deepcopy(plain))
    weights = {name: torch.randn_like(w) if "biases" in name else w for name, w in plain.state_dict().items()}
    for each in (plain, model):
        each.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(model(IMAGES[..., :32, :32]), plain(IMAGES[..., :32, :32]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_siglip_224", {"embed_dim": 24, "depth": 4, "num_heads": 2}),
        ("cait_xxs24_224", {"embed_dim": 24, "depth": 4, "num_heads": 2}),
    ],
)
def test_multiply_adds_are_counted_where_a_module_is_given_a_view_of_a_weight(name, options):
    torch.manual_seed(0)
    plain = timm.create_model(name, img_size=32, num_classes=5, **options)
    model = tw.attach(copy.deepcopy(plain), budget="1.2x")
    assert 0 < float(tw.spans(model)[0].feedback.gate.price) < 1
    if "siglip" in name:
        picked = timm.create_model(f"dynalay_{name}", img_size=32, policy="always", **options).eval()
        picked(IMAGES[..., :32, :32])


def test_a_budget_that_cannot_be_counted_leaves_the_model_as_it_was():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x):
            return torch.tanh(x * self.weight)

    model = nn.Sequential(Scaled(), Scaled())
    with pytest.raises(tw.OptionError, match="cannot be counted"):
        tw.attach(model, wormholes="1->0", stages=["0", "1"], example=IMAGES, budget="1.2x")
    assert not hasattr(model, "wormholes") and not any(m._forward_pre_hooks for m in model.modules())
    tw.attach(model, wormholes="1->0", stages=["0", "1"], example=IMAGES, budget=0.3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("mode", ["replay", "rerun"])
def test_a_copy_reports_the_multiply_adds_of_the_last_pass(copied, mode):
    if mode == "replay":
        model = made(wormholes=OVERLAPPING, policy="always").eval()
    else:
        model = tw.attach(
            *(Between(), "b->a"), stages=["stem", "a", "b"], example=IMAGES, policy="always"
        ).eval()
    with torch.no_grad():
        model(IMAGES)
    assert {span.mode for span in tw.spans(model)} == {mode}
    counts = [(record.evaluations, record.multiply_adds) for record in tw.report(copied(model))]
    assert counts == [(record.evaluations, record.multiply_adds) for record in tw.report(model)]
    assert counts[0][1] > 0
