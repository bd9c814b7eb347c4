"""Spans of every kind: overlapping, folded, leaking, rerun, of any module; and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.backbones.models import register_wormhole_models


def images(size: int = 32, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Four stages; what lies between them and what comes out is up to ``kind``."""

    def __init__(self, kind: str = "chain"):
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.a, self.b, self.c, self.d = (
            nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.Tanh()) for _ in range(4)
        )
        self.drop = nn.Dropout(0.3)
        self.embedding = nn.Parameter(0.1 * torch.randn(1, 6, 1, 1))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        a = self.a(x)
        if self.kind == "between":
            a = torch.relu(a) + self.embedding
        b = self.b(a)
        c = self.drop(self.c(b)) if self.kind == "dropout" else self.c(b)
        d = self.d(c)
        if self.kind == "leak":
            d = d + 0.5 * b
        return self.head(d.mean((2, 3)))


STAGES = ["a", "b", "c", "d"]


def net(kind: str, wormholes, **options) -> nn.Module:
    torch.manual_seed(0)
    model = Net(kind)
    return tw.attach(model, wormholes=wormholes, stages=STAGES, example=images(), **options)


SPECS = [
    ("chain", ["d->b"]),
    ("chain", ["d->b", "c->c"]),  # nested
    ("chain", ["c->a", "d->b"]),  # overlapping
    ("chain", ["d->c", "c->b", "b->a"]),  # chained
    ("chain", ["d->b", "d->c"]),  # one source
    ("chain", ["d->a", "b->a"]),  # one target
    ("chain", ["b->a", "d->c"]),  # apart
    ("between", ["d->a"]),
    ("leak", ["c->a"]),
    ("leak", ["d->a", "b->b"]),
]


@pytest.mark.parametrize(("kind", "wormholes"), SPECS)
def test_closed_is_plain_and_open_is_the_fixed_point_written_out(kind, wormholes):
    model = net(kind, wormholes, scale=0.05).double().eval()
    torch.manual_seed(0)
    plain = Net(kind).double().eval()
    x = images().double()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert {span.mode for span in tw.spans(model)} == {"replay" if kind == "chain" else "rerun"}
        tw.configure(model, policy="always", tol=1e-9, max_iter=100, solver="anderson")
        logits = model(x)
        assert all(bool((record.status == 0).all()) for record in tw.report(model))
        expected = by_hand(model, wormholes, x)
        assert not torch.allclose(expected, plain(x), rtol=1e-4)
    assert torch.allclose(logits, expected, rtol=1e-6, atol=1e-7)


def by_hand(model, wormholes, x):
    """Run the network again and again, each message made of the last run's outputs."""
    parts = [span.feedback for span in tw.spans(model)]
    states: dict[str, torch.Tensor] = {}

    def stage(name, value):
        for part, spec in zip(parts, wormholes, strict=True):
            source, target = spec.split("->")
            if target == name and source in states:
                value = value + part.message(states[source], value.shape)
        new[name] = nn.Sequential.forward(getattr(model, name), value)
        return new[name]

    with tw.backbones.span.asleep(model):
        for _ in range(200):
            new: dict[str, torch.Tensor] = {}
            a = stage("a", model.stem(x))
            if model.kind == "between":
                a = torch.relu(a) + model.embedding
            b = stage("b", a)
            d = stage("d", stage("c", b))
            if model.kind == "leak":
                d = d + 0.5 * b
            states = new
        return model.head(d.mean((2, 3)))


GRADIENTS = [("chain", ["c->a", "d->b"]), ("between", ["d->a"]), ("leak", ["c->a"]), ("dropout", ["d->b"])]


@pytest.mark.parametrize(("kind", "wormholes"), GRADIENTS)
def test_implicit_gradients_are_those_of_the_unrolled_solve(kind, wormholes):
    model = net(kind, wormholes, scale=0.1, policy="always", gate="always").double().train()
    x = images().double()

    def gradients(**options):
        twin = copy.deepcopy(model)
        tw.configure(twin, tol=1e-12, max_iter=200, **options)
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        twin(inputs).square().sum().backward()
        found = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        statistics = {name: b for name, b in twin.named_buffers() if "running" in name}
        return {**found, "x": inputs.grad}, statistics

    implicit, counted = gradients()
    unrolled, _ = gradients(adjoint="unrolled", solver="picard")
    assert implicit.keys() == unrolled.keys()
    for name, value in unrolled.items():
        assert float((implicit[name] - value).norm()) <= 1e-6 * float(value.norm()) + 1e-10, name
    torch.manual_seed(0)
    plain = Net(kind).double().train()
    torch.manual_seed(1)
    plain(x)
    for name in ("stem", "a.1.running_mean", "a.1.num_batches_tracked"):  # counted once, as without wormholes
        if name in dict(plain.named_buffers()):
            assert torch.allclose(
                counted.get(name, dict(plain.named_buffers())[name]), dict(plain.named_buffers())[name]
            )


@pytest.mark.parametrize("kind", ["chain", "between", "leak"])
def test_copies_and_pickles_keep_their_spans_and_have_their_own(kind):
    model = net(kind, "d->a" if kind != "leak" else "c->a", policy="always", scale=0.3).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        tw.configure(copied, policy="never")
        assert not torch.equal(copied(x), expected) and torch.equal(model(x), expected)
        nn.init.zeros_(copied.a[0].weight)  # a copy runs its own modules
        assert torch.equal(model(x), expected)


def test_groups_are_what_overlaps():
    model = net("chain", ["d->c", "b->a", "c->c"])
    groups = [span.group for span in tw.spans(model)]
    assert groups[0] is groups[2] and groups[1] is not groups[0]
    assert [part.span for part in groups[0].parts] == ["d->c", "c->c"]
    assert [span.span for span in tw.spans(model)] == ["d->c", "b->a", "c->c"]


def test_rows_leave_where_the_forward_is_run_again():
    model = net("between", "d->a", policy=tw.policy("random", p=0.5), scale=0.3).eval()
    x = images(batch=8)
    with torch.no_grad():
        torch.manual_seed(0)
        some = model(x)
        (record,) = tw.report(model)
        tw.configure(model, policy="always")
        everyone = model(x)
        tw.configure(model, policy="never")
        nobody = model(x)
    assert 0 < int(record.open.sum()) < 8
    assert torch.equal(some[~record.open], nobody[~record.open])
    assert torch.allclose(some[record.open], everyone[record.open], rtol=1e-2, atol=1e-3)
    assert record.multiply_adds > 0


def test_what_is_used_elsewhere_is_settled_too():
    # efficientvim's heads read every stage; wherever the span is left, they must see it settled.
    torch.manual_seed(0)
    model = timm.create_model("efficientvim_m1", num_classes=4).eval()
    for parameter in model.parameters():  # fresh layer scales hide nearly everything
        if parameter.dim() <= 1:
            parameter.data.normal_(1.0, 0.1)
    tw.attach(model, wormholes="1->1", scale=0.5)
    x = images(64, batch=2)
    with torch.no_grad():
        plain = model.forward_features(x)
        tw.configure(model, policy="always", tol=1e-5, max_iter=60)
        settled = model.forward_features(x)
    assert torch.equal(plain[0], settled[0])  # before the span
    assert not torch.allclose(plain[2], settled[2])


def test_known_cases_are_refused_by_rule_with_the_nearest_span_and_work_with_the_fallback():
    for name, wormholes in (("convit_tiny", "11->1"), ("visformer_tiny", "-1->-2")):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).eval()
        keys, hooks = list(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
        with pytest.raises(
            tw.AttachError, match=r"outside of its modules.*The nearest span that works: '(.*)'."
        ) as error:
            tw.attach(model, wormholes=wormholes, fallback=False)
        assert list(model.state_dict()) == keys
        assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
        nearest = str(error.value).split("nearest span that works: '")[1].split("'")[0]
        assert (
            tw.spans(tw.attach(copy.deepcopy(model), wormholes=nearest, fallback=False))[0].mode == "replay"
        )
        assert tw.spans(tw.attach(model, wormholes=wormholes))[0].mode == "rerun"


def test_a_span_that_mixes_samples_is_refused():
    class Mixing(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    model = nn.Sequential(nn.Linear(4, 4), Mixing(), nn.Linear(4, 4))
    with pytest.raises(tw.AttachError, match="alone than among others"):
        tw.attach(model, wormholes="1->1", stages=["0", "1", "2"], example=torch.randn(3, 4))


def test_ends_by_index_by_reduction_and_by_module():
    spans = {}
    for wormholes in ("4->3", "-1->-2", "/32->/16", "layer4->layer3", " layer4 -> layer3 "):
        model = tw.attach(timm.create_model("resnet18", num_classes=2), wormholes=wormholes)
        spans[wormholes] = tw.spans(model)[0].span
    assert set(spans.values()) == {"layer4->layer3"}
    vit = tw.attach(timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=4), wormholes="/16->/16")
    assert tw.spans(vit)[0].span == "blocks.3->blocks.0"  # of stages of one reduction the last, and the first
    deep = tw.attach(
        timm.create_model("convnext_atto", num_classes=2), wormholes="stages.2.blocks.3->stages.2.blocks.1"
    )
    assert tw.spans(deep)[0].mode == "replay"


def test_any_module_with_stages():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
            self.head = nn.Linear(8, 3)

        def forward(self, tokens, mask=None):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=mask)
            return self.head(x.mean(1))

    torch.manual_seed(0)
    torch.backends.mha.set_fastpath_enabled(False)  # with hooks torch leaves it, and rounds otherwise
    model, tokens = Encoder().eval(), torch.randint(0, 11, (4, 5))
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, 3:] = True
    with torch.no_grad():
        plain = model(tokens, mask)
    stages = [model.layers[0], "layers.1", model.layers[2]]
    tw.attach(model, stages=stages, example={"tokens": tokens, "mask": mask}, scale=0.3)
    assert tw.spans(model)[0].span == "layers.2->layers.1"
    with torch.no_grad():
        assert torch.equal(model(tokens, mask), plain)
        tw.configure(model, policy=tw.policy("random", p=0.5), tol=1e-5)
        torch.manual_seed(1)
        assert not torch.equal(model(tokens, mask), plain)  # rows leave with their rows of the mask
    with pytest.raises(tw.AttachError, match=r"stages=.*example"):
        tw.attach(Encoder())
    with pytest.raises(tw.AttachError, match=r"example|input"):
        tw.attach(Encoder(), stages=["layers.0", "layers.1"])
    with pytest.raises(tw.UnknownNameError, match=r"Did you mean 'layers.0'"):
        tw.attach(Encoder(), stages=["layer.0"], example=tokens)
    with pytest.raises(tw.UnknownNameError, match="no module of this"):
        tw.attach(Encoder(), stages=[nn.Linear(2, 2)], example=tokens)
    with pytest.raises(tw.AttachError, match="at least one sample"):
        tw.attach(Encoder(), stages=["layers.0"], example="tokens")
    with pytest.raises(tw.AttachError, match="runs with no example"):
        tw.attach(Encoder(), stages=["layers.0", "layers.1"], example=torch.randn(2, 3))


def test_a_stage_called_by_a_number_comes_before_an_index():
    def chain():
        return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    given = {"stages": ["0", "2"], "example": torch.zeros(2, 3)}
    named = tw.attach(chain(), wormholes="2->0", **given)
    counted = tw.attach(chain(), wormholes="-1->0", **given)
    assert tw.spans(named)[0].span == tw.spans(counted)[0].span == "2->0"


def test_arguments_that_were_not_there_when_attaching_are_not_ignored():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=3, img_size=32)
    tw.attach(model.eval(), wormholes="2->1", policy="always")
    with torch.no_grad():
        model(images())
        with pytest.raises(tw.AttachError, match="other arguments"):
            model.forward_features(images(), attn_mask=torch.ones(5, 5, dtype=torch.bool))
        model(images())


def test_a_model_on_the_meta_device_can_be_attached_to():
    with torch.device("meta"):
        model = timm.create_model("resnet50", num_classes=3)
    tw.attach(model, wormholes="layer4->layer3")
    assert all(p.device.type == "meta" for p in model.parameters())
    assert tw.spans(model)[0].feedback.message.project.weight.shape == (512, 2048)


def test_every_architecture_has_a_name_and_nothing_is_built():
    plain = [
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")
    ]
    assert {f"twnn_{name}" for name in plain} <= set(timm.list_models("twnn_*"))
    assert len(plain) > 1300 and register_wormhole_models() == []
    tags = [tag for tag in timm.list_pretrained("resnet18.*")]
    assert [f"twnn_{tag}" for tag in tags] == timm.list_pretrained("twnn_resnet18.*")
    for name in ("resnet18.a1_in1k", "vit_base_patch16_224.augreg_in21k", "convnext_tiny"):
        mine, theirs = (timm.models.get_pretrained_cfg(prefix + name) for prefix in ("twnn_", ""))
        assert (mine.hf_hub_id, mine.url, mine.num_classes) == (
            theirs.hf_hub_id,
            theirs.url,
            theirs.num_classes,
        )
        assert timm.models.is_model_pretrained(f"twnn_{name}")
    assert (
        "default_cfgs" in tw.backbones.models.__all__ and "twnn_resnet18" not in tw.backbones.models.__all__
    )


def test_a_saved_model_comes_back_from_its_folder_wormholes_and_all(tmp_path):
    torch.manual_seed(0)
    options = dict(
        wormholes=["layer3->layer2", "layer1->layer1"], gate=("sigmoid", {"budget": 0.4}), tol=1e-2
    )
    model = timm.create_model("twnn_test_resnet", num_classes=7, **(options | {"wormholes": "auto"}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    timm.models.save_for_hf(model, str(tmp_path / "twnn"))
    again = timm.create_model(f"local-dir:{tmp_path / 'twnn'}", pretrained=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.num_classes == 7 and again.pretrained_cfg["architecture"] == "twnn_test_resnet"
    assert again.wormholes[0].feedback.settings.tol == 1e-2 and "state_dict" not in again.pretrained_cfg
    other = timm.create_model(f"local-dir:{tmp_path / 'twnn'}", pretrained=True, num_classes=3, in_chans=1)
    mine, theirs = (m.wormholes[0].feedback.message.project.weight for m in (other, model))
    assert torch.equal(mine, theirs) and other.num_classes == 3
    with pytest.raises(tw.AttachError, match="do not fit"):
        timm.create_model(f"local-dir:{tmp_path / 'twnn'}", pretrained=True, wormholes=options["wormholes"])
    # A plain model's folder gives its weights to a model with wormholes, too.
    plain = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(plain, str(tmp_path / "plain"))
    source = dict(file=str(tmp_path / "plain" / "pytorch_model.bin"), num_classes=7)
    derived = timm.create_model("twnn_test_resnet", pretrained=True, pretrained_cfg_overlay=source)
    assert all(torch.equal(value, derived.state_dict()[key]) for key, value in plain.state_dict().items())


class _Stage(nn.Module):
    """Two streams; it makes its first output of the one, or of the other."""

    def __init__(self, uses: str):
        super().__init__()
        self.uses, self.mix = uses, nn.Linear(6, 6)

    def forward(self, a, b):
        return self.mix(a if self.uses == "first" else b), b


class _Streams(nn.Module):
    def __init__(self, *uses: str):
        super().__init__()
        self.a, self.b, self.c = (_Stage(use) for use in uses)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.c(*self.b(*self.a(x, x + 1)))[0])


@pytest.mark.parametrize(
    ("uses", "said"),
    [
        (("first", "second", "first"), "not used on the way"),
        (("first", "first", "second"), "does not depend"),
    ],
)
@pytest.mark.parametrize("fallback", [False, True])
def test_a_wormhole_that_could_change_nothing_is_refused(uses, said, fallback):
    model = _Streams(*uses)
    with pytest.raises(tw.AttachError, match=said):
        tw.attach(model, "b->b", stages=["a", "b", "c"], example=torch.randn(2, 6), fallback=fallback)
    assert not hasattr(model, "wormholes")


def test_a_stream_that_a_stage_only_passes_on_is_no_way_back():
    # coat's parallel blocks hand on their first of four maps, and use the others.
    torch.manual_seed(0)
    model = timm.create_model("coat_tiny", num_classes=2, img_size=64)
    with pytest.raises(tw.AttachError, match=r"not used on the way.*The nearest span that works"):
        tw.attach(model, "parallel_blocks->parallel_blocks", example=images(64, batch=2))


def test_a_rerun_behind_a_replay_is_refused_when_it_is_attached():
    model = timm.create_model("convit_tiny", num_classes=5, img_size=32)
    with pytest.raises(tw.AttachError, match=r"'blocks.10->blocks.9' needs .* 'blocks.2->blocks.1' would be"):
        tw.attach(model, wormholes=["blocks.10->blocks.9", "blocks.2->blocks.1"])
    assert tw.spans(tw.attach(model, wormholes="blocks.10->blocks.9"))[0].mode == "rerun"
