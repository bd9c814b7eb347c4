"""Continuous batching: what a stream gives is what the model gives batch by batch."""

from __future__ import annotations

import gc
import threading

import pytest
import timm
import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.blocks.wormhole import Wormhole

from .streams import Cell, Mixed, Two, assert_same, assert_same_facts, images, mixed_batches, one_by_one


@pytest.fixture(autouse=True)
def _no_threads_left():
    before = threading.active_count()
    yield
    gc.collect()
    assert threading.active_count() == before


def resnet(**options):
    torch.manual_seed(0)
    options = {"policy": "always", "scale": 0.1, "max_iter": 15, **options}
    return timm.create_model("twnn_resnet8_cifar", num_classes=5, **options).eval()


# The same as batch by batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "ad_fixed_point"])
@pytest.mark.parametrize("batch_size", [3, 8, 20])
def test_fix_gives_every_row_what_it_gets_in_its_own_batch(solver, batch_size):
    model, batches = Mixed(solver=solver).eval(), mixed_batches(100, 8)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    alone, model.solutions = model.solutions, []
    outputs = tw.stream(model, batches, batch_size)
    assert_same(list(outputs), expected)
    by_value = {tuple(s.value[:, 0].tolist()): s for s in model.solutions}
    assert len(by_value) == len(alone)
    for solution in alone:  # they end in another order
        mine = min(
            (s for s in model.solutions if s.value.shape == solution.value.shape),
            key=lambda s: float((s.value - solution.value).abs().max()),
        )
        assert torch.equal(mine.steps, solution.steps)
        assert torch.equal(mine.status, solution.status)
        torch.testing.assert_close(mine.residual, solution.residual, rtol=1e-2, atol=1e-7)
        assert mine.evaluations == int(solution.steps.sum())
    report = outputs.report
    assert (report.samples, report.batches, report.capacity) == (100, 13, batch_size)
    assert report.solves == 13 and report.shared > 6 and not report.alone and not report.spans
    assert report.alive == sum(int(s.steps.sum()) for s in alone)
    assert len(report.fill) == report.evaluations and sum(report.fill) == report.alive
    assert max(report.fill) <= batch_size


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_several_wormholes(solver):
    model, batches = Two(solver=solver).eval(), images(40, 8)
    expected, records = one_by_one(model, batches)
    outputs = tw.stream(model, batches, 8)
    assert_same(list(outputs), expected)
    assert_same_facts(outputs.report, records)
    assert len({tuple(r.steps.tolist()) for batch in records for r in batch}) > 4  # difficulty is mixed
    assert outputs.report.solves == 10 and outputs.report.shared > 5
    for span, name in zip(outputs.report.spans, ("first", "second"), strict=True):
        last = getattr(model, name).last
        assert span.evaluations == int(span.steps.sum())
        assert span.multiply_adds == span.evaluations * (last.multiply_adds // last.evaluations) > 0


@pytest.mark.parametrize("wormholes", ["layer3->layer3", ["layer1->layer1", "layer3->layer2"]])
def test_attached_models(wormholes):
    model = resnet(wormholes=wormholes)
    batches = images(22, 6, seed=1, side=16)
    expected, records = one_by_one(model, batches)
    steps = torch.cat([r.steps for batch in records for r in batch])
    assert steps.min() < 5 and steps.max() > 8
    outputs = tw.stream(model, batches, 6)
    assert_same(list(outputs), expected, 1e-4)
    assert_same_facts(outputs.report, records)
    assert not outputs.report.alone and outputs.report.shared > 1
    assert outputs.report.evaluations < sum(int(r.steps.max()) for batch in records for r in batch)
    # and afterwards the model is what it was
    assert torch.equal(one_by_one(model, batches)[0][1], expected[1])


def test_closed_samples_take_part_in_nothing():
    model = resnet(wormholes="layer3->layer2", policy="gate")
    batches = images(12, 4, side=16)
    expected, _ = one_by_one(model, batches)  # a fresh gate is closed
    outputs = tw.stream(model, batches)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))
    report = outputs.report
    assert (report.evaluations, report.rows, report.solves, report.alone) == (0, 0, 0, {})
    assert not report.spans[0].open.any() and report.spans[0].gate.shape == (12,)
    assert report.capacity == 4 and report.mean_fill != report.mean_fill
    # some open, some closed, per sample
    with torch.no_grad():
        model(torch.cat(batches))
        score = tw.report(model)[0].probability.logit().median()
    tw.configure(model, threshold=float(score))
    expected, records = one_by_one(model, batches)
    outputs = tw.stream(model, batches)
    assert_same(list(outputs), expected, 1e-4)
    assert_same_facts(outputs.report, records)
    assert 0 < int(outputs.report.spans[0].open.sum()) < 12
    assert outputs.report.shared > 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0), (1, 1)])
def test_reports_of_batches_with_and_without_open_samples_join(order):
    model = timm.create_model("twnn_resnet8_cifar", num_classes=5, scale=1.0)
    x = images(8, 8, side=32)[0]
    tw.calibrate(model, [x], budget=0.5)
    model.eval()
    with torch.no_grad():
        model(x)
    opened = tw.report(model)[0].open
    batches = [[x[opened][:2], x[~opened][:2]][k] for k in order]
    stream = tw.stream(model, batches, 4)
    list(stream)
    (record,) = stream.report.spans
    assert record.open.tolist() == [k == 0 for k in order for _ in range(2)]
    # Those that were open are those that were solved for, by their places in the stream.
    assert torch.arange(4)[slice(None) if record.solved is None else record.solved].tolist() == [
        place for place, open_ in enumerate(record.open.tolist()) if open_
    ]


def test_a_closed_head_answers_for_the_same_samples():
    model = resnet(wormholes=["layer1->layer1", "layer3->layer2"], policy="gate", closed_head=True)
    with torch.no_grad():
        for parameter in model.closed_head.parameters():
            parameter.add_(1.0)  # so that it shows whose answer it is
    batches = images(20, 4, side=16)
    with torch.no_grad():
        model(torch.cat(batches))
        for record in tw.report(model):
            score = float(record.probability.logit().median())
            tw.configure(model, spans=record.span, threshold=score)
    expected, records = one_by_one(model, batches)
    settled = torch.cat([(batch[0].open | batch[1].open) for batch in records])
    assert 0 < int(settled.sum()) < 20
    outputs = tw.stream(model, batches)
    assert_same(list(outputs), expected, 1e-4)
    assert outputs.report.shared > 2


def test_failed_rows_are_the_same_and_do_not_spread():
    model, batches = Two(max_iter=12, scale=4.0).eval(), images(24, 6)
    batches[1][2] = float("nan")
    batches[2][0] *= 1e20
    expected, records = one_by_one(model, batches)
    outputs = tw.stream(model, batches, 6)
    assert_same(list(outputs), expected)
    assert_same_facts(outputs.report, records)
    seen = {int(s) for span in outputs.report.spans for s in span.status}
    assert {int(tw.Status.converged), int(tw.Status.max_iter), int(tw.Status.non_finite)} <= seen


class Astray(nn.Module):
    """Rows that settle, are slow, grow, or rock to and fro by a rounding error, by their first column."""

    def forward(self, x):
        kind, x = x[:, :1], x[:, 1:]

        def f(z, x, kind):
            z_next = torch.where(kind == 1, 0.99 * z + x, 0.1 * z + x)
            z_next = torch.where(kind == 2, 3 * z + x, z_next)
            return torch.where(kind == 3, 2 * x - z, z_next)

        start = torch.where(kind == 3, x * (1 + 1e-6), 0.0)
        solution = tw.fix(f, start, x, kind, solver="picard", tol=1e-7, max_iter=100)
        return solution.status, solution.steps


@pytest.mark.filterwarnings("ignore::twnn_plugin.ConvergenceWarning")
def test_rows_that_go_astray():
    model, kinds = Astray().eval(), torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0]).repeat(6)[:, None]
    x = 0.5 + torch.rand(30, 3, generator=torch.Generator().manual_seed(0))
    batches = list(torch.cat([kinds, x], dim=1).split(4))
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    for mine, theirs in zip(tw.stream(model, batches, 7), expected, strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    statuses = {tw.Status(int(s)) for status, _ in expected for s in status}
    assert statuses == {
        tw.Status.converged,
        tw.Status.max_iter,
        tw.Status.diverged,
        tw.Status.stagnated,
    }


def test_looks_that_are_far_apart_change_nothing():
    batches = mixed_batches(60, 8)
    model, lazy = Mixed().eval(), Mixed(check_every=4).eval()
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    outputs = tw.stream(lazy, batches)
    assert_same(list(outputs), expected)
    steps = sum(int(s.steps.sum()) for s in model.solutions)
    assert sum(int(s.steps.sum()) for s in lazy.solutions) == steps
    assert outputs.report.alive == steps < outputs.report.rows
    assert outputs.report.evaluations % 4 == 0


# What it is for ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::twnn_plugin.ConvergenceWarning")
def test_the_active_batch_stays_full():
    model, batches = Mixed(solver="picard", tol=1e-6).eval(), mixed_batches(400, 8)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    slowest = sum(int(s.steps.max()) for s in model.solutions)
    row_steps = sum(int(s.steps.sum()) for s in model.solutions)
    outputs = tw.stream(model, batches, 8, in_flight=12)
    list(outputs)
    report = outputs.report
    assert row_steps / (8 * slowest) < 0.4  # batch by batch the places are mostly empty
    assert report.mean_fill > 0.8
    assert report.evaluations < 0.5 * slowest
    assert report.rows < 1.1 * row_steps
    assert 2 < report.peak_in_flight <= 12
    # with one batch at a time it is what rows that leave make of it
    one = tw.stream(model, batches, 8, in_flight=1)
    list(one)
    assert one.report.peak_in_flight == 1 and one.report.evaluations == slowest


@pytest.mark.filterwarnings("ignore::twnn_plugin.ConvergenceWarning")
def test_memory_is_bounded():
    taken, given = [], []

    def source():
        for batch in mixed_batches(200, 4):
            taken.append(1)
            assert len(taken) - len(given) <= 5
            yield batch

    model = Mixed(tol=1e-6, solver="picard").eval()
    for _ in tw.stream(model, source(), 4, in_flight=5):
        given.append(1)
        assert len(taken) - len(given) < 5
    assert len(given) == 50


def test_a_stream_without_end_keeps_no_records():
    model, batches = Two().eval(), images(16, 4)
    outputs = tw.stream(model, batches, records=False)
    list(outputs)
    report = outputs.report
    assert not report.spans and not report.fill
    assert report.evaluations and 0 < report.mean_fill <= 1


# Solves that cannot be shared ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "newton_krylov", "torchdeq.anderson", "torchdeq.broyden"])
def test_solvers_with_loops_of_their_own(solver):
    model, batches = Mixed(solver=solver, tol=1e-3).eval(), mixed_batches(24, 8)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    outputs = tw.stream(model, batches)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))
    (reason,) = outputs.report.alone
    assert "its own loop" in reason and outputs.report.alone[reason] == 3
    assert outputs.report.solves == 0 and reason in str(outputs.report)


def test_coupled_rows_and_watched_solves_are_left_alone():
    batches = mixed_batches(16, 8)
    seen = []
    for options, reason in (({"coupled": True}, "coupled"), ({"callback": seen.append}, "callback")):
        model = Mixed(**options).eval()
        outputs = tw.stream(model, batches)
        mine = list(outputs)
        with torch.no_grad():
            assert all(torch.equal(y, model(batch)) for y, batch in zip(mine, batches, strict=True))
        assert [reason in why for why in outputs.report.alone] == [True]
    assert seen


def test_maps_that_differ_from_pass_to_pass_do_not_mix():
    class Shifted(nn.Module):
        def forward(self, x):
            shift = x[0, :-1].mean()  # of the batch, not of the row: legal, but another map each time
            solution = tw.fix(
                lambda z, x, rate: rate * torch.tanh(z + x) + shift,
                torch.zeros_like(x[:, 1:]),
                x[:, 1:],
                0.9 * torch.sigmoid(x[:, :1]),
            )
            return solution.value

    model, batches = Shifted().eval(), mixed_batches(40, 8)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    outputs = tw.stream(model, batches)
    assert_same(list(outputs), expected)
    assert outputs.report.solves == 5 and outputs.report.shared == 0


def test_a_wormhole_inside_another():
    torch.manual_seed(0)
    example = torch.randn(2, 4, 6, 6)
    inner = Wormhole(Cell(), example, gate="always", scale=0.5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), Wormhole([inner, nn.Conv2d(4, 4, 1)], example, gate="always")
    ).eval()
    batches = images(20, 5)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    assert_same(list(tw.stream(model, batches)), expected, 1e-4)


# Items ------------------------------------------------------------------------------------------


def test_what_a_data_loader_gives():
    model = resnet(wormholes="layer3->layer3")
    data = torch.utils.data.TensorDataset(torch.cat(images(10, 10, side=16)), torch.arange(10))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    with torch.no_grad():
        expected = [model(x) for x, _ in loader]
    got = list(tw.stream(model, loader))
    assert_same([logits for logits, _ in got], expected, 1e-4)
    assert [target.tolist() for _, target in got] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    got = list(tw.stream(model, ([x, "name", y] for x, y in loader)))
    assert [(name, len(y)) for _, name, y in got] == [("name", 4), ("name", 4), ("name", 2)]


def test_samples_instead_of_batches():
    model = Two().eval()
    small, large = torch.cat(images(7, 7)), torch.cat(images(3, 3, side=8))
    samples = [*small[:5], *large, *small[5:]]
    with torch.no_grad():
        expected = [model(sample[None])[0] for sample in samples]
    outputs = tw.stream(model, samples, 3, batched=False)
    assert_same(list(outputs), expected)
    assert outputs.report.batches == 4  # 3, 2, 3 of the other size, 2
    got = list(tw.stream(model, ((s, i) for i, s in enumerate(samples)), 3, batched=False))
    assert [i for _, i in got] == list(range(10))
    assert_same([y for y, _ in got], expected)


def test_structured_outputs_and_empty_streams():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            y = self.two(x)
            return {"y": y, "max": (y.amax(dim=1), "note")}

    model, samples = Pair().eval(), torch.cat(images(5, 5))
    got = list(tw.stream(model, samples, 2, batched=False))
    assert got[3]["y"].shape == (5,) and got[3]["max"][0].dim() == 0 and got[3]["max"][1] == "note"
    empty = tw.stream(model, [])
    assert list(empty) == [] and empty.report.samples == 0
    assert next(tw.stream(model, [samples[:0]]))["y"].shape == (0, 5)


# Modes ------------------------------------------------------------------------------------------


def test_modes_of_the_caller_reach_every_thread():
    model, batches = Two().eval(), images(12, 4)
    assert not any(y.requires_grad for y in tw.stream(model, batches))
    with torch.inference_mode():
        inferred = list(tw.stream(model, batches))
    assert all(y.is_inference() for y in inferred)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected = [model(batch) for batch in batches]
        outputs = tw.stream(model, batches)
        halves = list(outputs)
    assert all(y.dtype == torch.bfloat16 for y in halves)
    assert_same([y.float() for y in halves], [y.float() for y in expected], 0.05)
    assert outputs.report.solves == 6 and outputs.report.shared > 1
    for outside in tw.stream(model, batches):  # nothing leaks to the consumer between two outputs
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert (outside * nn.Parameter(torch.ones(()))).requires_grad


def test_autocast_of_a_part_of_the_model():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            half = self.two.stem(x)
            with torch.autocast("cpu", torch.bfloat16):
                half = self.two.first(half)
            return self.two.second(half.float()).sum(dim=(1, 2, 3))

    model, batches = Partly().eval(), images(12, 4)
    model.two.first.feedback.settings = model.two.first.feedback.settings.changed(tol=3e-2)
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    outputs = tw.stream(model, batches)
    assert_same(list(outputs), expected, 0.05)
    assert outputs.report.solves == 6 and outputs.report.shared > 1


def test_passes_in_different_modes_do_not_mix():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=round(float(x[0, 0, 0, 0])) % 2 == 1):
                return self.two.first(self.two.stem(x).float()).float().sum(dim=(1, 2, 3))

    model, batches = Sometimes().eval(), marked(7)[1:]  # the first under autocast
    expected = one_by_one(model, batches)[0]
    got = list(tw.stream(model, batches))
    assert_same(got[1::2], expected[1::2])  # to the rounding of float32


# Ends, happy and other -------------------------------------------------------------------------------------


class Fragile(nn.Module):
    """Raises before or behind its wormholes for batches that begin with a certain number."""

    def __init__(self, before=None, behind=None):
        super().__init__()
        self.two, self.before, self.behind = Two(), before, behind

    def forward(self, x):
        mark = round(float(x[0, 0, 0, 0]))
        if mark == self.before:
            raise ValueError("no such image")
        y = self.two(x)
        if mark == self.behind:
            raise KeyError("lost")
        return y


def marked(count):
    batches = images(4 * count, 4)
    for number, batch in enumerate(batches):
        batch[0, 0, 0, 0] = number
    return batches


@pytest.mark.parametrize("options, error", [({"before": 3}, ValueError), ({"behind": 3}, KeyError)])
def test_an_error_comes_in_its_turn(options, error):
    model, batches = Fragile(**options).eval(), marked(8)
    outputs, got = tw.stream(model, batches), []
    with pytest.raises(error):
        for y in outputs:
            got.append(y)
    assert len(got) == 3
    with pytest.raises(StopIteration):
        next(outputs)
    model.before = model.behind = None
    expected, _ = one_by_one(model.two, batches)
    assert_same(got, expected[:3])
    assert_same(list(tw.stream(model, batches)), expected)


def test_an_error_of_the_iterable_comes_in_its_turn():
    def source():
        yield from images(12, 4)
        raise OSError("disk full")

    got = []
    with pytest.raises(OSError, match="disk full"):
        for y in tw.stream(Two().eval(), source()):
            got.append(y)
    assert len(got) == 3
    with pytest.raises(tw.OptionError, match="begins with one; got a dict"):
        list(tw.stream(Two().eval(), [{"image": 1}]))


def test_an_error_in_a_shared_evaluation():
    class Breaking(Cell):
        def forward(self, x):
            if self.armed and x.shape[0] > 4:
                raise RuntimeError("too many")
            return super().forward(x)

    model = Two().eval()
    model.first.body = body = Breaking().eval()
    body.armed = False
    batches = images(24, 4)
    expected, _ = one_by_one(model, batches)
    body.armed = True
    with pytest.raises(RuntimeError, match="too many"):
        list(tw.stream(model, batches, 8))
    assert_same(list(tw.stream(model, batches, 4)), expected)


class Writing(nn.Module):
    """``z = 0.9 z + x``, computed where it must not be."""

    def __init__(self, where):
        super().__init__()
        self.where, self.buffer = where, torch.empty(4, 3)

    def forward(self, x):
        def f(z, x):
            if self.where == "state":
                return z.mul_(0.9).add_(x)
            if self.where == "context":
                return x.add_(z, alpha=0.9)
            return torch.add(x, z, alpha=0.9, out=self.buffer)

        return tw.fix(f, torch.zeros_like(x), x, solver="picard").value


@pytest.mark.parametrize("where", ["state", "context", "one buffer"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_maps_that_write_where_they_must_not_are_refused_as_in_batches(where, mode):
    if where == "context" and mode is torch.inference_mode:
        pytest.skip("tensors of inference mode do not tell that they were written to")
    model, batches = Writing(where).eval(), list(torch.randn(12, 3).split(4))
    with mode(), pytest.raises(tw.MapError, match="f writes to"):
        model(batches[0])
    with mode(), pytest.raises(tw.MapError, match="f writes to"):
        list(tw.stream(model, batches))


def test_a_map_that_leaves_the_device_is_refused_as_in_batches():
    class Leaving(nn.Module):
        def forward(self, x):
            return tw.fix(lambda z, x: (0.5 * z + x).to("meta"), torch.zeros_like(x), x).value

    with pytest.raises(tw.MapError, match="on the device of z0"):
        list(tw.stream(Leaving().eval(), torch.randn(3, 4, 3)))


def test_early_ends_leave_no_thread_and_a_model_that_works():
    model, batches = resnet(wormholes=["layer1->layer1", "layer3->layer2"]), images(24, 4, side=16)
    expected, _ = one_by_one(model, batches)
    before = threading.active_count()
    outputs = tw.stream(model, batches)
    first = next(outputs)
    assert threading.active_count() > before
    outputs.close()
    assert threading.active_count() == before
    assert_same([first], expected[:1], 1e-4)
    with pytest.raises(StopIteration):
        next(outputs)
    for _ in tw.stream(model, batches):  # left by break, and dropped
        break
    assert threading.active_count() == before
    with tw.stream(model, batches) as held:
        next(held)
    assert threading.active_count() == before
    tw.stream(model, batches)  # never begun
    assert_same(one_by_one(model, batches)[0], expected, 0)


def test_an_interrupt_while_a_pass_runs(monkeypatch):
    model, batches = Two().eval(), images(24, 4)
    from twnn_plugin.streaming.lanes import Lane

    hear, calls = Lane._hear, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt  # as Ctrl-C in the middle of waiting
        hear(self)

    monkeypatch.setattr(Lane, "_hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(tw.stream(model, batches))
    monkeypatch.setattr(Lane, "_hear", hear)
    assert_same(list(tw.stream(model, batches)), one_by_one(model, batches)[0])


def test_the_model_may_be_used_between_two_outputs():
    model, batches = Two().eval(), images(32, 4)
    expected, records = one_by_one(model, batches)
    outputs = tw.stream(model, batches)
    for number, y in enumerate(outputs):
        assert_same([y], [expected[number]])
        with torch.no_grad():
            assert_same([model(batches[-1])], [expected[-1]], 0)
    assert_same_facts(outputs.report, records)


def test_two_streams_of_one_model():
    model, batches = Two().eval(), images(24, 4)
    expected, records = one_by_one(model, batches)
    one, other = tw.stream(model, batches), tw.stream(model, batches[::-1])
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_same([a, b], [expected[number], expected[-1 - number]])
    assert_same_facts(one.report, records)


# Refusals ------------------------------------------------------------------------------------------


def test_training_mode_is_refused():
    model = Two()
    with pytest.raises(tw.OptionError, match=r"it is in training mode.*model.eval\(\)"):
        tw.stream(model, [])
    model.eval().first.train()
    with pytest.raises(tw.OptionError, match="its module 'first' is in training mode"):
        tw.stream(model, [])
    outputs = tw.stream(model.eval(), images(80, 4), in_flight=2)
    next(outputs)
    model.train()
    with pytest.raises(tw.OptionError, match="put into training mode"):
        list(outputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1; got 0"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batched": False}, "batch_size must be a whole number, at least 1; got None"),
        ({"in_flight": 0}, "in_flight must be"),
        ({"iterable": 3}, "iterable of batches; got a int"),
        ({"model": "resnet18"}, "takes an nn.Module; got a str"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(tw.OptionError, match=message):
        tw.stream(**{"model": Two().eval(), "iterable": [], **options})
