"""What a closed wormhole costs in eval mode, in operations, and that saving them changed nothing."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import twnn_plugin as tw
from twnn_plugin import kernels
from twnn_plugin.policies.base import SpanPolicy

from .families import FAMILIES
from .test_manners_rerun import Between

SYNCHRONISES = "aten._local_scalar_dense.default"  # the host waits for a value
# Means, maxima, both together, normalised twice (with views and room), two layers with a view each, relu,
# threshold, largest, look.
MOST = 16


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_of(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad(), Counting() as counting:
        model(x)
    return counting.calls


class AsTheGate(SpanPolicy):
    """The gate's opinion, by a policy that has to be asked: the long way."""

    def forward(self, view):
        return view.open


def facts(model: nn.Module) -> list[tuple[Tensor, ...]]:
    names = ("gate", "probability", "status", "steps", "residual", "fallback", "open")
    return [tuple(getattr(record, name) for name in names) for record in tw.report(model)]


def assert_same_facts(a: nn.Module, b: nn.Module) -> None:
    for mine, theirs in zip(facts(a), facts(b), strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan())
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(
    ("key", "gate", "batch"),
    [
        *(
            ("convnext", gate, batch)
            for gate in ("straight_through", "sigmoid", "hard_concrete")
            for batch in (1, 3)
        ),
        *((key, "straight_through", 3) for key in ("resnet", "vit", "swin")),
    ],
)
def test_a_closed_pass_is_the_plain_one_and_few_operations(key, gate, batch):
    family = FAMILIES[key]
    model, plain, x = family.twnn(gate=gate).eval(), family.plain().eval(), family.images(batch)
    with kernels.disabled():
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
        before, after = calls_of(plain, x), calls_of(model, x)
    # One sample needs no largest; channels that come last take two views more.
    assert len(after) - len(before) <= MOST - (batch == 1) + 2 * (key == "swin")
    assert after.count(SYNCHRONISES) - before.count(SYNCHRONISES) == 1
    assert not any(record.open.any() for record in tw.report(model))


@pytest.mark.skipif(not kernels.available(), reason=f"compiled kernels: {kernels.describe()}")
@pytest.mark.parametrize("key", ["convnext", "resnet", "vit", "swin"])
def test_by_the_kernels_a_closed_pass_is_the_plain_one_and_room_for_the_scores(key):
    family = FAMILIES[key]
    model, plain, x = family.twnn().eval(), family.plain().eval(), family.images(3)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    before, after = calls_of(plain, x), calls_of(model, x)
    assert len(after) - len(before) <= 2
    assert after.count(SYNCHRONISES) == before.count(SYNCHRONISES)
    (mine,) = tw.report(model)
    assert not mine.open.any()
    with kernels.disabled(), torch.no_grad():
        model(x)
    (record,) = tw.report(model)
    assert torch.allclose(mine.probability, record.probability, atol=1e-6)


def test_each_of_several_wormholes_costs_no_more():
    family = FAMILIES["resnet"]
    model = family.twnn(["layer4->layer3", "layer4->layer4", "layer1->layer1"]).eval()
    x = family.images()
    assert len(calls_of(model, x)) - len(calls_of(family.plain().eval(), x)) <= 3 * MOST
    assert [record.group for record in tw.report(model)] == [None, "layer4->layer3", None]
    assert all(record.evaluations == 0 for record in tw.report(model))


@pytest.mark.parametrize(
    ("gate", "policy", "most"), [("never", "gate", 1), ("straight_through", "never", MOST)]
)
def test_never_costs_no_more(gate, policy, most):
    family, x = FAMILIES["convnext"], FAMILIES["convnext"].images()
    model = family.twnn(gate=gate, policy=policy).eval()
    assert len(calls_of(model, x)) - len(calls_of(family.plain().eval(), x)) <= most
    assert not tw.report(model)[0].open.any()


def test_a_span_that_is_run_again_is_not_while_it_is_closed():
    torch.manual_seed(0)
    plain = Between().eval()
    given = {"stages": ["a", "b", "c"], "example": torch.randn(2, 3, 8, 8)}
    model = tw.attach(copy.deepcopy(plain), wormholes="c->b", **given).eval()
    assert tw.spans(model)[0].mode == "rerun"
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert len(calls_of(model, x)) - len(calls_of(plain, x)) <= MOST
    slow = copy.deepcopy(model)
    tw.configure(slow, policy=AsTheGate())
    with torch.no_grad():
        assert torch.equal(slow(x), plain(x))
    assert_same_facts(model, slow)


def test_a_closed_block_costs_no_more():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    wormhole = tw.blocks.get("wormhole")(copy.deepcopy(body), torch.zeros(2, 4, 6, 6)).eval()
    x = torch.randn(3, 4, 6, 6)
    assert len(calls_of(wormhole, x)) - len(calls_of(body.eval(), x)) <= MOST
    with torch.no_grad():
        assert torch.equal(wormhole(x), body(x)) and wormhole.last.mode == "replay"


@pytest.mark.parametrize(
    "gate", ["straight_through", ("sigmoid", {"per": "channel"}), "hard_concrete", "never"]
)
@pytest.mark.parametrize("threshold", [-3.0, -2.0, 0.0])
def test_a_glance_says_what_a_long_look_says(gate, threshold):
    family, x = FAMILIES["resnet"], FAMILIES["resnet"].images(5)
    x[1] = float("nan")
    fast = family.twnn(gate=gate).eval()
    if gate != "never":
        tw.configure(fast, threshold=threshold, temperature=1.5)
    slow = copy.deepcopy(fast)
    tw.configure(slow, policy=AsTheGate())
    for given in (x, x[2:], x[:0]):
        with torch.no_grad():
            out, expected = fast(given), slow(given)
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        assert_same_facts(fast, slow)
        if gate != "never" and len(given):
            assert torch.equal(*(m.wormholes[0].feedback.gate.scores for m in (fast, slow)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes_and_under_autocast(dtype):
    family = FAMILIES["convnext"]
    fast, x = family.twnn().eval(), family.images()
    fast, x = (fast.double(), x.double()) if dtype == torch.float64 else (fast, x)
    slow = copy.deepcopy(fast)
    tw.configure(slow, policy=AsTheGate())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(fast(x), slow(x))  # with gradients wanted, too
    assert_same_facts(fast, slow)


def test_the_record_is_that_of_its_pass_however_late_it_is_read():
    family, x = FAMILIES["vit"], FAMILIES["vit"].images()
    model = family.twnn().eval()
    with torch.no_grad():
        model(x)
        expected = tw.report(model)[0].probability.clone()
        model(x)
        early, packed = copy.deepcopy(model), pickle.dumps(model)  # these have made theirs
        model(x)
    tw.configure(model, threshold=-50.0, temperature=9.0)
    with torch.no_grad():
        for parameter in model.wormholes.parameters():
            parameter.zero_()
    for other in (model, early, pickle.loads(packed)):
        record = tw.report(other)[0]
        assert torch.equal(record.probability, expected) and not record.open.any()
        assert tw.report(other)[0] is record  # made once
    with torch.no_grad():
        model(x)  # open now
    assert tw.report(model)[0].open.all() and tw.report(model)[0].evaluations


def test_no_normalisation_is_listened_to_in_eval_mode():
    family, x = FAMILIES["resnet"], FAMILIES["resnet"].images(4).double()
    model = family.twnn(policy="always", tol=1e-8).double()
    twin, (one_map,) = copy.deepcopy(model), [span.group.one_map for span in tw.spans(model)]
    assert not one_map.hooks
    out = model.train()(x)
    assert len(one_map.hooks) == len(one_map.norms) > 0
    with torch.no_grad():
        model.eval()(x)
    assert not one_map.hooks
    out.square().sum().backward()  # of the pass before
    twin.train()(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name
    model.zero_grad(), twin.zero_grad()
    with torch.no_grad():
        twin.eval()(x)
    for net in (model, twin):
        net.train()(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c), name


def test_a_part_that_is_computed_again_after_an_eval_pass_is_listened_to():
    family, x = FAMILIES["resnet"], FAMILIES["resnet"].images(4).double()
    gradients = []
    for between in (False, True):
        model = family.twnn(policy="always", tol=1e-8, jacobian=0.1).double().train()
        model.set_grad_checkpointing(True)
        torch.manual_seed(0)
        out = model(x)
        if between:
            with torch.no_grad():
                model.eval()(x)
            model.train()
        torch.manual_seed(1)
        loss = out.square().sum()
        if not between:  # the penalty is that of the last pass
            loss = loss + 0 * model.auxiliary_loss()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*gradients, strict=True))


def test_dropout_that_is_on_in_eval_mode_is_seen():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 6))
    wormhole = tw.blocks.get("wormhole")(
        body, torch.zeros(2, 6), gate="always", solver="picard", scale=0.3, max_iter=60, tol=1e-5
    ).eval()
    wormhole.body[1].train()  # as for estimates of uncertainty
    x = torch.randn(4, 6)
    with torch.no_grad():
        wormhole(x)
    assert (wormhole.last.status == 0).all()  # one mask for the whole solve: there is a fixed point


def test_a_pass_that_is_given_a_mask_is_still_refused():
    vit = FAMILIES["vit"]
    model = vit.twnn().eval()

    class Masked(nn.Module):
        def __init__(self, vit):
            super().__init__()
            self.vit = vit

        def forward(self, x):
            tokens = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(x))))
            for block in self.vit.blocks:
                tokens = block(tokens, torch.zeros(1, 1, 1, tokens.shape[1]))
            return tokens

    with pytest.raises(tw.AttachError, match="other arguments"), torch.no_grad():
        Masked(model)(vit.images())


def test_the_report_says_how_each_span_is_evaluated():
    text = str(tw.report(_passed(timm.create_model("twnn_test_resnet", wormholes="layer3->layer2"))))
    assert "mode" in text.splitlines()[0] and "replay" in text.splitlines()[2]
    given = {"stages": ["a", "b", "c"], "example": torch.randn(2, 3, 8, 8)}
    again = tw.attach(Between(), wormholes="c->b", policy="always", **given)
    again(torch.randn(2, 3, 8, 8))
    assert [record.mode for record in tw.report(again)] == ["rerun"] and "rerun" in str(tw.report(again))


def _passed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 64, 64))
    return model


@pytest.mark.parametrize("gate", ["straight_through", "sigmoid", "hard_concrete", "always", "never"])
def test_forward_derivatives_of_a_model_in_eval_mode(gate):
    """A gate's kernel reads memory, which the tensors of a transform do not have."""
    model = FAMILIES["resnet"].twnn(gate=gate, tol=1e-12, max_iter=300).double().eval()
    single = tw.configure(copy.deepcopy(model).float(), tol=1e-5)
    x = FAMILIES["resnet"].images(2).double()
    towards = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    value, slope = torch.func.jvp(model, (x,), (towards,))
    torch.testing.assert_close(value, model(x))
    with torch.no_grad():
        step = 1e-4
        expected = (model(x + step * towards) - model(x - step * towards)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
    rough = torch.func.jvp(single, (x.float(),), (towards.float(),))[1]  # in what the kernel would take
    torch.testing.assert_close(rough.double(), slope, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["straight_through", "always"])
def test_vmap_is_refused_and_says_what_to_do(gate, training):
    vit = FAMILIES["vit"]
    model = vit.twnn(gate=gate).train(training)
    x = torch.stack([vit.images(2), vit.images(2, seed=1)])
    with pytest.raises(tw.TransformError, match=r"vmap cannot map over wormhole .* tw.unrolled"):
        torch.func.vmap(model, randomness="different")(x)
    model.eval()
    fixed = tw.unrolled(model, 2)
    torch.testing.assert_close(torch.func.vmap(fixed)(x), torch.stack([fixed(part) for part in x]))


@pytest.mark.parametrize("open_", [False, True])
def test_a_pass_keeps_no_activations_that_a_replay_does_not_need(open_: bool):
    model = timm.create_model(
        "twnn_vit_tiny_patch16_224", img_size=64, wormholes="blocks.11->blocks.8"
    ).eval()
    tw.configure(model, policy="always" if open_ else "gate")
    given, seen = [], []

    def note(module, args):
        given.append(weakref.ref(args[0]))

    def look(module, args):
        seen.append([ref() is not None for ref in given])
        given.clear()

    for place in (8, 9, 10):
        model.blocks[place].register_forward_pre_hook(note)
    model.blocks[11].mlp.register_forward_pre_hook(look)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert len(seen) > 1 if open_ else len(seen) == 1
    assert seen[0] == [True, False, False]  # the input of the span, and nothing of what came of it
