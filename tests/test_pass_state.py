"""Passes that do not meet: threads, halted passes, hooks that come later, calls by hand."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable

import pytest
import timm
import torch
import torch._dynamo
from torch import Tensor, nn

import twnn_plugin as tw

from .families import FAMILIES
from .test_manners_rerun import attached as run_again
from .test_manners_rerun import images as small

RESNET = FAMILIES["resnet"]


def opened(**options) -> nn.Module:
    return RESNET.twnn(**{"policy": "always", "tol": 1e-9, "max_iter": 100, **options}).double().eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return RESNET.images(batch, seed=seed).double()


def half_open(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """The model, its gate open for half of all samples."""
    scores = []
    for batch in batches:
        with torch.no_grad():
            model(batch)
        scores.append(torch.logit(tw.report(model)[0].probability.double()))
    tw.configure(model, threshold=float(torch.cat(scores).median()))
    return model


def rows(out) -> list[Tensor]:
    return list(out) if isinstance(out, (list, tuple)) else [out]


# Threads.


@pytest.fixture
def restless():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(jobs: list[Callable[[], None]]) -> None:
    """Run jobs in threads; the first error is raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def assert_threads_agree(model: nn.Module, inputs: list[Tensor], times: int = 5) -> None:
    with torch.no_grad():
        expected = [rows(model(x)) for x in inputs]

    def job(x: Tensor, wanted: list[Tensor]) -> None:
        for _ in range(times):
            with torch.no_grad():
                for a, b in zip(rows(model(x)), wanted, strict=True):
                    assert a.shape == b.shape and torch.allclose(a, b, atol=1e-7)

    at_once([lambda x=x, e=e: job(x, e) for x, e in zip(inputs, expected, strict=True)])


def test_two_threads_inside_of_one_span_each_get_their_own_answer():
    model, met = opened(), threading.Barrier(2)
    waited = threading.local()

    def meet(module, args, output):  # in the open-loop pass, when both have entered
        if not getattr(waited, "done", False) and threading.current_thread() is not threading.main_thread():
            waited.done = True
            met.wait(20)

    model.layer3[0].conv1.register_forward_hook(meet)
    assert_threads_agree(model, [images(2), images(3, seed=1)], times=1)
    assert tw.spans(model)[0].mode == "replay"


@pytest.mark.parametrize("kind", ["closed head", "several", "again", "features", "dropout"])
def test_a_model_in_eval_mode_may_be_used_by_several_threads(kind, restless):
    x = [images(3, seed=seed) for seed in range(3)]
    if kind == "again":
        assert_threads_agree(run_again().eval(), [small(n) for n in (2, 3, 4)], times=10)
    elif kind == "features":
        options = {"features_only": True, "out_indices": (2, 3, 4), "policy": "always", "tol": 1e-9}
        torch.manual_seed(0)
        net = timm.create_model("twnn_resnet18", **RESNET.options, wormholes="layer4->layer3", **options)
        assert_threads_agree(net.double().eval(), x, times=3)
    elif kind == "several":
        assert_threads_agree(opened(wormholes=["layer4->layer3", "layer3->layer2", "layer1->layer1"]), x)
    elif kind == "dropout":  # noise in eval mode is watched, and a mask of ones is the same for everyone
        model = opened()
        model.layer3[0].add_module("drop", nn.Dropout(0.0))
        model.layer3[0].drop.train()
        assert_threads_agree(model, x)
    else:
        model = half_open(opened(policy="gate", closed_head=True), x)
        with torch.no_grad():
            model.closed_head.heads[0].weight.mul_(-3)
        assert_threads_agree(model, x, times=10)


def test_the_unrolled_form_in_one_thread_is_nothing_to_another(restless):
    model = opened()
    short, x = tw.unrolled(model, 1), images()
    with torch.no_grad():
        solved, stepped = model(x), short(x)
    assert not torch.allclose(solved, stepped)

    def job(net: nn.Module, expected: Tensor) -> None:
        for _ in range(5):
            with torch.no_grad():
                assert torch.allclose(net(x), expected, atol=1e-7)

    at_once([lambda: job(model, solved), lambda: job(short, stepped)])


def test_a_pass_that_breaks_off_in_one_thread_is_nothing_to_another():
    for model, x in ((opened(), images()), (run_again().eval(), small())):
        with torch.no_grad():
            expected = model(x)
        end = tw.spans(model)[0].group.program.modules()[-1]
        handle = end.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            at_once([lambda model=model, x=x: model(x)])
        handle.remove()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert not tw.spans(model)[0].group.busy()


def _fail(module, args):
    raise ZeroDivisionError


def test_the_closed_head_wants_the_pass_of_its_own_thread():
    model, x = opened(closed_head=True), images()
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), model(x))
        with pytest.raises(tw.AttachError, match="of this thread"):
            at_once([lambda: model.forward_head(features)])


def test_copies_and_pickles_begin_with_no_pass():
    model, x = opened(), images()
    model.layer3[0](torch.zeros(1, 16, 8, 8).double())  # enters, and is left there
    assert tw.spans(model)[0].open_loop is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tw.spans(other)[0].open_loop is None
        with torch.no_grad():
            assert torch.equal(other(x), model(x))


# Streams.


@pytest.mark.parametrize("in_flight", [2, 4])
def test_a_stream_of_features_is_what_the_net_returns(in_flight):
    torch.manual_seed(0)
    options = {**RESNET.options, "features_only": True, "out_indices": (2, 3, 4)}
    net = timm.create_model("twnn_resnet18", **options, wormholes="layer4->layer3").eval()
    batches = [RESNET.images(4, seed=seed) for seed in range(5)]
    net = half_open(net, batches)
    with torch.no_grad():
        expected = [net(batch) for batch in batches]
    for found, wanted in zip(tw.stream(net, batches, 8, in_flight=in_flight), expected, strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, wanted, strict=True))


def test_a_stream_of_a_model_that_is_run_again():
    model = run_again().eval()
    batches = [small(n) for n in (2, 3, 4, 2)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    for found, wanted in zip(tw.stream(model, batches, 4, in_flight=3), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-7)


# Hooks that come after the wormholes.


def half(module, args, output):
    return output * 0.5


def half_in_place(module, args, output):
    output.mul_(0.5)


def half_given(module, args):
    return (args[0] * 0.5,)


def test_what_a_hook_inside_of_a_span_does_is_done_in_replays():
    late, early, x = opened(), RESNET.plain(), images()
    late.layer3[1].register_forward_hook(half)
    late.layer4[0].register_forward_hook(lambda module, args, output: None)
    early.layer3[1].register_forward_hook(half)
    early = tw.attach(early, RESNET.span, scale=0.05, policy="always", tol=1e-9, max_iter=100)
    early = early.double().eval()
    early.load_state_dict(late.state_dict())
    with torch.no_grad():
        assert torch.allclose(late(x), early(x), atol=1e-8)
        assert not torch.allclose(late(x), opened()(x), atol=1e-4)


@pytest.mark.parametrize(
    ("where", "hook", "ahead", "message"),
    [
        ("layer4.0", half, False, "'layer4.0', where span"),
        ("layer4.0", half_in_place, False, "'layer4.0', where span"),
        ("layer3", half, False, "'layer3', inside of span .* returns"),
        ("layer3", half_in_place, False, "'layer3', inside of span .* returns"),
        ("layer4", half_given, True, "'layer4', inside of span .* is given"),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_a_hook_that_replays_would_not_follow_is_refused(where, hook, ahead, message, copied):
    model, x = opened(), images()
    with torch.no_grad():
        expected = model(x)
    model = copy.deepcopy(model) if copied else model
    module = model.get_submodule(where)
    handle = (module.register_forward_pre_hook if ahead else module.register_forward_hook)(hook)
    for _ in range(2):
        with pytest.raises(tw.AttachError, match=message), torch.no_grad():
            model(x)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_hooks_that_only_look_see_what_they_saw():
    model, x, seen = opened(), images(), {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(name, []).append(output)

    with torch.no_grad():
        expected, features = model(x), model.forward_features(x)
    for name in ("layer4.0", "layer4", "layer3", "layer3.1"):
        model.get_submodule(name).register_forward_hook(note(name))
    model.layer4.register_forward_pre_hook(lambda module, args: seen.setdefault("given", []).append(args[0]))
    for _ in range(2):
        seen.clear()
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert torch.equal(seen["layer4.0"][-1], features) and torch.equal(seen["layer4"][0], features)
        assert len(seen["layer3"]) == 1 and torch.equal(seen["layer3"][0], seen["given"][0])
        assert len(seen["layer3.1"]) > 2  # the open-loop pass and every replay
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_hooks_behind_a_span_and_before_it_are_those_of_the_plain_model():
    model, x = opened(), images()
    with torch.no_grad():
        closed = copy.deepcopy(model)
        model.layer4.register_forward_hook(half)
        assert torch.allclose(model.forward_features(x), closed.forward_features(x) * 0.5)
        other = opened()
        other.layer3.register_forward_pre_hook(half_given)
        early = opened()
        early.layer2.register_forward_hook(half)
        assert torch.allclose(other(x), early(x)) and not torch.allclose(other(x), closed(x))


def test_a_hook_that_is_put_first_acts_once_in_a_replay():
    model, x = opened(), images()
    twin = copy.deepcopy(model)
    model.layer3[0].register_forward_pre_hook(half_given, prepend=True)
    twin.layer3[0].register_forward_pre_hook(half_given)  # behind ours: once, too
    with torch.no_grad():
        assert torch.allclose(model(x), twin(x), atol=1e-8)


def test_an_inner_source_is_seen_behind_later_hooks():
    model, x, outs = opened(wormholes=["layer4->layer2", "layer3->layer2"]), images(), []
    (group,) = {span.group for span in tw.spans(model)}
    model.layer3[1].register_forward_hook(half)
    own = group.solve

    def solve(entries, found, *rest, **options):
        outs.extend(found)
        return own(entries, found, *rest, **options)

    group.solve = solve
    plain = RESNET.plain().double().eval()
    with torch.no_grad():
        model(x)
        shallow = plain.layer2(plain.layer1(plain.maxpool(plain.act1(plain.bn1(plain.conv1(x))))))
        assert torch.allclose(outs[1], plain.layer3(shallow) * 0.5)


def test_a_compiled_model_wants_hooks_to_be_seen_to_first():
    x = FAMILIES["zoo"].images()
    for seen_to in (False, True):
        torch._dynamo.reset()
        model = FAMILIES["zoo"].twnn(policy="always", tol=1e-5).eval()
        with torch.no_grad():
            expected = model(x)
        model.layer3[0].register_forward_hook(lambda module, args, output: None)
        if seen_to:
            with torch.no_grad():
                model(x)
                assert torch.allclose(torch.compile(model, backend="eager")(x), expected, atol=1e-4)
        else:
            with torch.no_grad(), pytest.raises(tw.AttachError, match="a compiled model cannot"):
                torch.compile(model, backend="eager")(x)


# Stages called by hand.


@torch.no_grad()
def test_stages_called_by_hand_are_no_pass_unless_one_is_given_what_the_other_returned():
    model, x = opened(), images()
    plain = RESNET.plain().double().eval()
    expected = model.forward_features(x)
    entry = plain.layer2(plain.layer1(plain.maxpool(plain.act1(plain.bn1(plain.conv1(x))))))
    assert torch.allclose(model.layer4(model.layer3(entry)), expected, atol=1e-9)
    assert not torch.allclose(plain.layer4(plain.layer3(entry)), expected)
    for other in (torch.randn(2, 24, 4, 4), torch.randn(3, 24, 4, 4), torch.randn(2, 24, 6, 6)):
        model.layer3(entry)  # a look, which ends inside of the span
        with pytest.raises(tw.AttachError, match="called by hand"):
            model.layer4(other.double())
        assert torch.equal(model.layer4(other.double()), plain.layer4(other.double()))
    model.layer3(entry)
    assert torch.equal(model.forward_features(x), expected) and bool(model(x).isfinite().all())


@torch.no_grad()
def test_a_pass_of_the_model_is_not_made_twice_to_see_that_it_is_one():
    model, calls = opened(policy="never"), []
    model(images())
    model.layer3[0].register_forward_hook(lambda *_: calls.append(1))
    tw.configure(model, policy="always", max_iter=1)
    for run in (model, model.forward_features, model.forward_intermediates):
        calls.clear()
        run(images())
        assert len(calls) == (2 if run is not model.forward_intermediates else len(calls))
    calls.clear()
    model.layer4(model.layer3(torch.randn(2, 16, 8, 8).double()))
    assert len(calls) == 3
