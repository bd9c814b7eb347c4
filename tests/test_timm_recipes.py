"""What timm's users do with their models, done with wormholes in them."""

from __future__ import annotations

import threading

import pytest
import timm
import timm.optim
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import twnn_plugin as tw
from twnn_plugin.gates import Gate
from twnn_plugin.policies import Policy

from .families import FAMILIES


def _resnet(**options):
    return FAMILIES["resnet"].twnn(**{"policy": "always", **options})


def _images(batch=3):
    return FAMILIES["resnet"].images(batch)


def _longer(**options):
    """A model whose third stage has two blocks."""
    return _resnet(wormholes="layer4->layer3", **options).eval()


# What changes a model after its wormholes were attached.


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.layer3.append(nn.Conv2d(24, 24, 1)),
        lambda m: m.layer3.insert(1, nn.Conv2d(24, 24, 1)),
        lambda m: m.layer4.insert(0, nn.Conv2d(24, 24, 1)),
        lambda m: setattr(m, "layer3", nn.Sequential(m.layer3, nn.Conv2d(24, 24, 1))),
    ],
    ids=["behind", "between", "before", "around"],
)
def test_a_module_that_is_put_into_a_span_is_told(change):
    model = _longer()
    change(model)
    with pytest.raises(tw.AttachError, match="after its wormhole was attached"):
        model(_images())


def test_a_new_container_in_the_middle_of_a_span_is_told():
    model = _resnet(wormholes="layer4->layer2").eval()
    model.layer3 = nn.Sequential(model.layer3, nn.Conv2d(24, 24, 1))
    with pytest.raises(tw.AttachError, match=r"'layer3'.*after its wormhole was attached"):
        model(_images())


def test_modules_may_be_put_before_a_span_and_behind_it():
    model = _longer()
    model.layer2.append(nn.Conv2d(16, 16, 1))
    model.layer4.append(nn.Conv2d(32, 32, 1))
    x = _images()
    settled = model.forward_features(x)
    tw.configure(model, policy="never")
    plain = model.layer4(model.layer3(_before(model, x)))
    assert torch.equal(model.forward_features(x), plain)
    assert not torch.equal(settled, plain)


def _before(model: nn.Module, x: Tensor) -> Tensor:
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    return model.layer2(model.layer1(x))


@pytest.mark.parametrize("last", [2, 3])
def test_a_pruned_transformer_goes_on_working(last):
    family = FAMILIES["vit"]
    model = family.twnn("blocks.2->blocks.1", policy="always").eval()
    x = family.images()
    wanted = model.forward_intermediates(x, indices=[last], intermediates_only=True)
    model.prune_intermediate_layers([last])
    found = model.forward_intermediates(x, indices=[last], intermediates_only=True)
    assert torch.equal(found[0], wanted[0])
    assert model(x).shape[0] == len(x)
    assert tw.report(model)[0].open.all()
    model.blocks[1] = nn.Sequential(model.blocks[1], nn.Identity())  # looked after as before
    with pytest.raises(tw.AttachError, match=r"'blocks\.1'.*after its wormhole was attached"):
        model(x)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_solved():
    family = FAMILIES["vit"]
    model = family.twnn(policy="always").eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = family.images()
    torch.testing.assert_close(quantised(x), model(x), rtol=0.2, atol=0.1)
    assert (tw.report(quantised)[0].steps > 1).all()


# Checkpointing that is not ours.


class _Block(nn.Module):
    """A block that computes itself again in the backward pass."""

    def __init__(self, reentrant: bool | None, norm: bool = False, drop: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.drop(torch.tanh(self.norm(self.conv(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)  # type: ignore[return-value]


class _Net(nn.Module):
    def __init__(self, stem: _Block, *blocks: _Block):
        super().__init__()
        self.conv, self.stem = nn.Conv2d(3, 4, 3, padding=1), stem
        self.one, self.two = blocks
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(self.conv(x)))).mean((2, 3)))


def _net(stem: bool | None = None, reentrant: bool | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    net = _Net(_Block(stem, norm=True, drop=0.3), *(_Block(reentrant, **options) for _ in range(2)))
    example = torch.randn(3, 3, 6, 6)
    return tw.attach(
        net,
        stages=["one", "two"],
        example=example,
        wormholes="two->one",
        policy="always",
        adjoint="unrolled",
    )


@pytest.mark.parametrize("options", [{"drop": 0.3}, {"norm": True}], ids=["dropout", "batch_norm"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_blocks_that_are_computed_again_without_what_is_held_fixed_are_refused(reentrant, options):
    net = _net(reentrant=reentrant, **options)
    with pytest.raises(tw.AttachError, match="set_grad_checkpointing"):
        net(torch.randn(3, 3, 6, 6))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_blocks_that_hold_nothing_may_be_computed_again(reentrant):
    x = torch.randn(3, 3, 6, 6)
    grads = []
    for how in (None, reentrant):
        net = _net(reentrant=how)
        torch.manual_seed(1)
        net(x).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_what_lies_before_a_span_may_be_computed_again(stem):
    net = _net(stem=stem, norm=True, drop=0.3)
    net(torch.randn(3, 3, 6, 6)).sum().backward()
    assert net.stem.conv.weight.grad is not None


def test_the_first_training_pass_may_be_computed_again_as_a_whole():
    whole, plain = _resnet(), _resnet()
    checkpoint(whole, _images(), use_reentrant=False).sum().backward()
    plain(_images()).sum().backward()
    for a, b in zip(whole.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# Two threads.


def test_two_threads_that_train_one_model_are_told():
    model = _resnet(max_iter=40, tol=1e-12)
    inside, done = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def halt(module, args, output):
        if threading.current_thread() is not threading.main_thread() and tw.spans(model)[0].group.replaying:
            inside.set()
            done.wait(60)

    model.layer4[0].bn1.register_forward_hook(halt)

    def train():
        try:
            model(_images()).sum().backward()
        except BaseException as error:
            errors.append(error)

    other = threading.Thread(target=train)
    other.start()
    assert inside.wait(60)
    try:
        with pytest.raises(tw.AttachError, match="Two threads train one model"):
            model(_images())
    finally:
        done.set()
        other.join()
    assert not errors
    model(_images()).sum().backward()  # alone again


# Compilers and exporters.


@pytest.mark.parametrize("cls", ["list", "getter"])
def test_features_compile(cls):
    net = timm.create_model(
        "twnn_resnet18",
        features_only=True,
        feature_cls=cls,
        out_indices=(3, 4),
        layers=(1, 1, 1, 1),
        channels=(8, 8, 12, 16),
        wormholes="layer4->layer3",
        policy="always",
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    found = torch.compile(net, backend="eager")(x)
    for a, b in zip(found, net(x), strict=True):
        torch.testing.assert_close(a, b)


def test_intermediates_compile():
    model, x = _resnet().eval(), _images()
    torch._dynamo.reset()
    last, found = torch.compile(model.forward_intermediates, backend="eager")(x)
    plain_last, plain = model.forward_intermediates(x)
    for a, b in zip([last, *found], [plain_last, *plain], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "tool",
    [
        lambda m, x: torch.export.export(m, (x,)),
        lambda m, x: torch.jit.trace(m, x),
        lambda m, x: torch.fx.symbolic_trace(m),
    ],
    ids=["export", "trace", "fx"],
)
@pytest.mark.filterwarnings("ignore")
def test_tools_that_cannot_follow_a_solve_name_what_can(tool):
    model, x = _resnet().eval(), _images()
    with pytest.raises(tw.AttachError, match=r"span 'layer4->layer3'.*tw\.export.*tw\.unrolled"):
        tool(model, x)
    assert model(x).shape == (3, 5)
    assert tw.report(model)[0].open.all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"fallback": True}])
def test_a_closed_example_is_not_traced_either(options):
    model, x = _resnet(policy="gate", gate="straight_through", **options).eval(), _images()
    tw.configure(model, threshold=1e9)
    model(x)
    assert not tw.report(model)[0].open.any()
    with pytest.raises(tw.AttachError, match=r"torch\.jit\.trace cannot follow"):
        torch.jit.trace(model, x)  # of another image the gate may open


@pytest.mark.filterwarnings("ignore")
def test_a_gate_that_never_opens_is_traced():
    model, x = _resnet(policy="gate", gate="never").eval(), _images()
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_not_scripted():
    with pytest.raises(tw.AttachError, match=r"torch\.jit\.script cannot follow"):
        torch.jit.script(_resnet().eval())


@pytest.mark.filterwarnings("ignore")
def test_the_unrolled_form_is_traced_and_checked():
    module = tw.unrolled(_resnet().eval(), steps=2)
    traced = torch.jit.trace(module, _images())  # which traces twice and compares
    torch.testing.assert_close(traced(_images(5)), module(_images(5)))


def test_features_that_are_one_graph_are_refused_with_advice():
    pytest.importorskip("torchvision")
    with pytest.raises(tw.AttachError, match="feature_cls='getter'"):
        timm.create_model("twnn_resnet10t", features_only=True, feature_cls="fx", wormholes="layer4->layer3")


# The meta device.


def test_models_of_all_kinds_are_made_without_values_and_take_weights():
    options = {"closed_head": True, "budget": "1.5x", "policy": "gate"}
    source = _resnet(**options).eval()
    with torch.device("meta"):
        model = FAMILIES["resnet"].plain()
        tw.attach(model, wormholes="layer4->layer3", scale=0.05, max_iter=60, **options)
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model.eval()(_images()), source(_images()))
    gates = [m.wormholes[0].feedback.gate for m in (model, source)]
    assert gates[0].price == gates[1].price != 1


def test_a_plain_checkpoint_does_not_hide_that_wormholes_have_no_values():
    with torch.device("meta"):
        model = _resnet()
    with pytest.raises(RuntimeError, match=r"Missing key.*wormholes\.0\.feedback"):
        model.load_state_dict(FAMILIES["resnet"].plain().state_dict(), assign=True)


# Layer decay.


@pytest.mark.parametrize("key", ["resnet", "vit"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_layer_decay_is_the_plain_models_with_and_without_a_classifier(key, num_classes):
    family = FAMILIES[key]
    plain = family.plain(num_classes=num_classes)
    model = tw.attach(family.plain(num_classes=num_classes), wormholes=family.span)
    ours, theirs = _rates(model), _rates(plain)
    assert {name: ours[name] for name in theirs} == theirs
    assert {rate for name, rate in ours.items() if name not in theirs} == {1.0}
    model.reset_classifier(3)  # the groups are those of the model as it is
    plain.reset_classifier(3)
    ours, theirs = _rates(model), _rates(plain)
    assert {name: ours[name] for name in theirs} == theirs


def _rates(model: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


# Other inputs than when the wormhole was attached.


def _patches(batch: int, cut: int = 0) -> dict[str, Tensor]:
    """What NaFlex models are given: patches, their places, and which of them are there."""
    places = torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(batch, -1, -1)
    valid = torch.ones(batch, 9, dtype=torch.bool)
    if cut:
        valid[-1, -cut:] = False
    torch.manual_seed(0)
    return {"patches": torch.randn(batch, 9, 768), "patch_coord": places, "patch_valid": valid}


def _naflex(**options) -> nn.Module:
    torch.manual_seed(0)
    plain = timm.create_model("naflexvit_base_patch16_gap", depth=3, embed_dim=24, num_heads=2, num_classes=5)
    return tw.attach(plain, wormholes="blocks.1->blocks.1", scale=0.05, policy="always", **options).eval()


def test_a_mask_that_was_not_there_is_told():
    model = _naflex()
    assert model(torch.randn(3, 3, 48, 48)).shape == (3, 5)
    with pytest.raises(tw.AttachError, match=r"perhaps a mask.*example"):
        model(_patches(3, cut=4))


def test_a_naflex_model_takes_patches_and_images():
    model = _naflex(example=(_patches(2),))
    given = _patches(3, cut=4)
    answer = model(given)
    alone = model({key: value[2:] for key, value in given.items()})
    torch.testing.assert_close(answer[2:], alone)  # its own mask goes with each sample
    images = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


class _Windows(nn.Module):
    """Attends to a bias that has a row for each window of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        cut = x.unflatten(1, (-1, 4)).flatten(0, 1)
        return x + 0.3 * torch.tanh(self.mix(cut) + bias).unflatten(0, (len(x), -1)).flatten(1, 2)


class _Windowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bias = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.two, self.head = _Windows(), _Windows(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(x).unflatten(1, (-1, 4)).flatten(0, 1)
        x = self.stem(x)
        return self.head(self.two(self.one(x, bias), bias).mean(1))


def test_windows_of_longer_inputs_stay_with_their_samples():
    torch.manual_seed(0)
    model = tw.attach(
        _Windowed(),
        stages=["one", "two"],
        example=torch.randn(2, 8, 4),
        wormholes="two->one",
        policy=tw.policy("random", p=0.5),
    ).eval()
    assert tw.spans(model)[0].mode == "replay"
    tw.configure(model, policy="always", tol=1e-6)
    x = torch.randn(4, 16, 4)
    alone = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-3, atol=1e-4)


# What hands on what it is given.


class _Ends(nn.Module):
    """Goes on with a tensor operation behind a layer that does nothing in eval mode."""

    def __init__(self, last: nn.Module, around: bool):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.last, self.head, self.around = nn.Tanh(), last, nn.Linear(4, 2), around

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(self.stem(x)))
        z = self.last(y)
        return self.head(((0.5 * z + y) if self.around else 0.5 * z).mean((2, 3)))


@pytest.mark.parametrize("last", [nn.Dropout(0.2), nn.Identity()], ids=["dropout", "identity"])
@pytest.mark.parametrize(("around", "mode"), [(False, "replay"), (True, "rerun")])
def test_a_stage_that_ends_in_what_hands_on_its_input_is_replayed(last, around, mode):
    torch.manual_seed(0)
    net = _Ends(last, around)
    stages = ["conv", "act", "last"]
    x = torch.randn(2, 3, 6, 6)
    tw.attach(net, stages=stages, example=x, wormholes="last->conv", policy="always")
    assert tw.spans(net)[0].mode == mode
    with torch.device("meta"):
        empty = _Ends(last, around)
    tw.attach(empty, stages=stages, example=x.to("meta"), wormholes="last->conv")
    assert tw.spans(empty)[0].mode == "rerun"  # without values nothing tells who goes by it


# Gates and policies of one's own that return something else ----------------------------------------------


class Careless(Gate):
    def forward(self, features):
        return features.mean(dim=1)


class Says(Policy):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, view):
        return self.answer(view)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": Careless()}, "Careless of span .* must return a GateOutput; it returned a Tensor"),
        ({"policy": Says(lambda view: None)}, r"must return \(2,\) booleans; it returned a NoneType"),
        (
            {"policy": Says(lambda view: view.open.float())},
            r"\(2,\) booleans; .* of torch.float32",
        ),
    ],
)
def test_what_gates_and_policies_return_is_looked_at(options, message):
    model = timm.create_model("twnn_resnet8_cifar", num_classes=3, **options).eval()
    with pytest.raises(tw.OptionError, match=message):
        model(torch.randn(2, 3, 32, 32))
