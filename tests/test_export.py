"""The unrolled form, and what torch.export makes of it."""

from __future__ import annotations

import copy

import pytest
import torch

import twnn_plugin as tw
from twnn_plugin.backbones.span import asleep

from .families import FAMILIES

KEYS = list(FAMILIES)


class FirstHalf(type(tw.policy("always"))):
    """Opens the first half of the batch."""

    def forward(self, view):
        return torch.arange(view.open.shape[0]) < view.open.shape[0] // 2


def opened(key: str, **options):
    return FAMILIES[key].twnn(**{"policy": "always", "tol": 1e-9, "max_iter": 100, **options}).double().eval()


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_it_tends_to_the_solved_model_as_steps_grow(key):
    model, x = opened(key), FAMILIES[key].images().double()
    solved = model(x)
    errors = [float((tw.unrolled(model, steps)(x) - solved).norm()) for steps in (1, 3, 30)]
    assert errors[0] > 2 * errors[1] > 0 and errors[2] < 1e-6 * errors[0]
    damped = tw.unrolled(model, 60, damping=0.5)(x)
    assert float((damped - solved).norm()) < 1e-5 * errors[0]
    assert torch.equal(model(x), solved)  # the model itself still solves


@torch.no_grad()
def test_the_steps_are_what_they_are_said_to_be():
    """One undamped step by hand, and a damped one half of the way."""
    model = opened("resnet", scale=0.5)
    x, feedback = FAMILIES["resnet"].images().double(), model.wormholes[0].feedback
    seen = {}
    model.layer3.register_forward_pre_hook(lambda m, args: seen.update(entry=args[0]))
    model.layer4.register_forward_hook(lambda m, args, out: seen.update(out=out))
    tw.configure(model, policy="never")
    model(x)
    entry, out = seen["entry"], seen["out"]
    with asleep(model):
        expected = model.layer4(model.layer3(entry + feedback.message(out, entry.shape)))
    tw.configure(model, policy="always")
    tw.unrolled(model, 1)(x)
    assert torch.allclose(seen["out"], expected, rtol=1e-10)
    tw.unrolled(model, 1, damping=0.5)(x)
    assert torch.allclose(seen["out"], (expected + out) / 2, rtol=1e-10)


@torch.no_grad()
def test_closed_rows_are_the_plain_network():
    for key in KEYS:
        model = opened(key, policy=FirstHalf())
        plain, x = FAMILIES[key].plain().double().eval(), FAMILIES[key].images(4).double()
        out, expected = tw.unrolled(model, 3)(x), plain(x)
        assert torch.equal(out[2:], expected[2:]) and not torch.allclose(out[:2], expected[:2])


@torch.no_grad()
def test_a_row_that_breaks_keeps_its_open_loop_value():
    model = opened("convnext")
    model.wormholes[0].feedback.message.scale.fill_(1e308)
    x = FAMILIES["convnext"].images().double()
    assert torch.equal(tw.unrolled(model, 3)(x), FAMILIES["convnext"].plain().double().eval()(x))


def test_weights_are_shared_and_gradients_are_those_of_the_steps():
    model = opened("zoo", adjoint="unrolled", solver="picard", max_iter=4, tol=1e-30)
    short = tw.unrolled(model, 4)
    assert {id(p) for p in short.parameters()} == {id(p) for p in model.parameters()}
    x = FAMILIES["zoo"].images().double()
    short(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert bool(found["wormholes.0.feedback.message.scale"].any())
    assert all(bool(g.isfinite().all()) for g in found.values())
    short.train()
    assert model.training
    short(x).square().sum().backward()  # batch statistics stand still in training, too
    assert int(model.layer3[0].bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("key", ["resnet", "vit", "swin"])
def test_exported_programs_compute_the_same_for_any_batch(key, tmp_path):
    family, model = FAMILIES[key], opened(key, policy="gate", gate="straight_through").float()
    tw.configure(model, threshold=-10.0, tol=1e-4)  # the gate decides, and decides to open
    keys, hooks = list(model.state_dict()), sum(len(m._forward_hooks) for m in model.modules())
    program = tw.export(model, family.images(2), steps=3)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    module = tw.unrolled(model, 3)
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = family.images(batch, seed=batch)
            assert torch.allclose(loaded(x), module(x), rtol=1e-5, atol=1e-5), batch
        assert not torch.allclose(loaded(x), family.plain().eval()(x))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any(word in name for name in names for word in ("cond", "while", "local_scalar", "nonzero"))
    # The model is as it was.
    assert list(model.state_dict()) == keys
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    with torch.no_grad():
        model(x)
    assert bool((tw.report(model)[0].status == int(tw.Status.converged)).all())
    assert copy.deepcopy(model) is not None


def test_the_gate_of_a_program_decides_row_by_row():
    model, x = opened("resnet", policy="gate").float(), FAMILIES["resnet"].images(8)
    gate = model.wormholes[0].feedback.gate
    with torch.no_grad():
        model(x)
        score = torch.logit(tw.report(model)[0].probability.double())
        tw.configure(model, threshold=float(score.median()))
        program = tw.export(model, x[:2], steps=4).module()
        out, plain = program(x), FAMILIES["resnet"].plain().eval()(x)
        model(x)
    opened_rows = tw.report(model)[0].open
    assert 0 < int(opened_rows.sum()) < 8 and gate is not None
    same = torch.tensor([bool(torch.allclose(a, b, atol=1e-6)) for a, b in zip(out, plain, strict=True)])
    assert torch.equal(same, ~opened_rows)


def test_several_wormholes_that_overlap():
    model = opened("resnet", wormholes=["layer4->layer3", "layer3->layer2", "layer1->layer1"])
    x = FAMILIES["resnet"].images().double()
    with torch.no_grad():
        solved = model(x)
        assert float((tw.unrolled(model, 40)(x) - solved).norm()) < 1e-6 * float(solved.norm())
        program = tw.export(model.float(), x.float(), steps=2).module()
        assert torch.allclose(program(x.float()), tw.unrolled(model, 2)(x.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: tw.unrolled(m, 0), tw.OptionError, "at least 1"),
        (lambda m, x: tw.unrolled(m, 2.5), tw.OptionError, "whole number"),
        (lambda m, x: tw.unrolled(m, 3, damping=0), tw.OptionError, r"\(0, 1\]"),
        (lambda m, x: tw.export(m, x[:1]), tw.OptionError, "two rows"),
        (lambda m, x: tw.export(copy.deepcopy(m).train(), x), tw.OptionError, "eval mode"),
        (lambda m, x: tw.unrolled(torch.nn.Linear(2, 2)), tw.AttachError, "no wormholes"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(FAMILIES["zoo"].twnn().eval(), FAMILIES["zoo"].images())
