"""Observation: callbacks, observer plugins, what is recorded, and that it costs nothing unasked."""

from __future__ import annotations

import gc
import io
import warnings
import weakref

import pluggy
import pytest
import torch
from torch import Tensor

import twnn_plugin as tw
from tests import problems
from twnn_plugin import hookimpl, hookspecs, observe
from twnn_plugin.errors import DuplicateNameError, OptionError, PluginWarning, UnknownNameError
from twnn_plugin.observe import Progress, SolveInfo, Trace
from twnn_plugin.plugins import PluginHost, loaded, register_plugin, unregister_plugin
from twnn_plugin.registry import Registry

OBSERVERS = ("twnn_observe_iteration", "twnn_observe_solve")


@pytest.fixture(autouse=True)
def no_listeners_left():
    before = set(loaded())
    assert observe.listeners() == ()
    yield
    for name in set(loaded()) - before:
        unregister_plugin(name)
    assert observe.listeners() == ()


def solve(problem: problems.Problem, **options) -> tw.Solution:
    return tw.fix(problem.f, problem.z0, *problem.context, **{"tol": 1e-6, "max_iter": 500, **options})


class Both:
    """Hears everything."""

    def __init__(self):
        self.iterations: list[tuple] = []
        self.solutions: list[tuple] = []

    @hookimpl
    def twnn_observe_iteration(self, iteration, info):
        self.iterations.append((iteration, info))

    @hookimpl
    def twnn_observe_solve(self, solution, info):
        self.solutions.append((solution, info))


# ------------------------------------------------------------------------------------------- the hooks


def test_the_observer_hooks_are_specified_and_documented():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    assert {name for name in vars(manager.hook) if name.startswith("twnn_observe_")} == set(OBSERVERS)
    assert all(getattr(hookspecs, name).__doc__ for name in OBSERVERS)


def test_hook_twnn_observe_iteration():
    seen = []

    class Watcher:
        @hookimpl
        def twnn_observe_iteration(self, iteration):  # an implementation may leave arguments out
            seen.append(iteration)

    assert register_plugin(Watcher(), "watcher") == "watcher"
    expected: list[tw.Iteration] = []
    problem = problems.mixed()
    solution = solve(problem, callback=expected.append)
    assert [one.step for one in seen] == [one.step for one in expected] == list(range(1, len(seen) + 1))
    assert all(a is b for a, b in zip(seen, expected, strict=True))
    assert len(seen) == int(solution.steps.max())


def test_hook_twnn_observe_solve():
    seen = []

    class Watcher:
        @hookimpl
        def twnn_observe_solve(self, solution, info):
            seen.append((solution, info))

    register_plugin(Watcher())
    problem = problems.vector()
    first = solve(problem, solver="picard", stop="abs", coupled=True)
    second = solve(problem, adjoint="one_step")
    assert [one for one, _ in seen] == [first, second]
    infos = [info for _, info in seen]
    assert infos[1].number > infos[0].number
    assert (infos[0].rows, infos[0].size, infos[0].dtype) == (6, 8, torch.float64)
    assert (infos[0].solver, infos[0].stop, infos[0].coupled) == ("Picard", "abs", True)
    assert (infos[1].adjoint, infos[1].tol, infos[1].max_iter) == ("OneStep", 1e-6, 500)


def test_both_hooks_agree_and_unregistering_ends_it():
    both, problem = Both(), problems.vector()
    register_plugin(both, "both")
    solution = solve(problem)
    unregister_plugin("both")
    solve(problem)
    assert len(both.solutions) == 1 and both.solutions[0][0] is solution
    assert len(both.iterations) == int(solution.steps.max())
    assert len({info for _, info in both.iterations} | {both.solutions[0][1]}) == 1
    assert "both" not in loaded()
    register_plugin(both, "both")  # the name and the object are free again


def test_nobody_listening_costs_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("called although nobody listens")

    monkeypatch.setattr(observe, "watch", refuse)
    monkeypatch.setattr(observe, "SolveInfo", refuse)
    assert solve(problems.vector()).converged.all()

    monkeypatch.undo()
    # Who hears of whole solves only puts no callback into the loop.
    register_plugin(Both(), "both")
    (listener,) = observe.listeners()
    only_solves = observe.Listener("solves", solve=listener.solve)
    assert observe.Watch(some_info(), (only_solves,)).callback is None
    assert observe.Watch(some_info(), (listener,)).callback is not None


def some_info() -> SolveInfo:
    return SolveInfo(1, 1, 1, torch.float32, torch.device("cpu"), "A", "B", 1e-3, 5, "rel", "l2", False)


def test_watching_changes_no_result():
    problem = problems.mixed()
    plain = solve(problem)
    register_plugin(Both(), "both")
    watched = solve(problem)
    assert torch.equal(plain.value, watched.value) and torch.equal(plain.steps, watched.steps)
    assert plain.evaluations == watched.evaluations


class Broken:
    """Fails in both hooks."""

    @hookimpl
    def twnn_observe_iteration(self, iteration, info):
        raise ZeroDivisionError("first step")

    @hookimpl
    def twnn_observe_solve(self, solution, info):
        raise KeyError("last step")


def test_a_broken_observer_costs_one_warning_and_no_solve():
    problem, both = problems.vector(), Both()
    expected = solve(problem)
    register_plugin(Broken(), "broken")
    register_plugin(both, "both")
    with pytest.warns(PluginWarning) as caught:
        first, second = solve(problem), solve(problem)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "'broken' raised ZeroDivisionError: first step" in text
    assert "tw.unregister_plugin('broken')" in text
    assert torch.equal(first.value, expected.value) and torch.equal(second.value, expected.value)
    assert len(both.solutions) == 2  # the others hear everything
    unregister_plugin("broken")
    register_plugin(Broken(), "broken")
    with pytest.warns(PluginWarning, match="'broken'"):  # a new plugin, a new warning
        solve(problem)


def test_the_callers_own_callback_may_end_the_solve():
    class Enough(Exception):
        pass

    def stop(iteration: tw.Iteration) -> None:
        if iteration.step == 3:
            raise Enough

    both = Both()
    register_plugin(both, "both")
    with pytest.raises(Enough):
        solve(problems.vector(), callback=stop)
    assert [one.step for one, _ in both.iterations] == [1, 2]
    assert both.solutions == []


def test_an_interrupt_is_not_swallowed():
    class Interrupted:
        @hookimpl
        def twnn_observe_iteration(self, iteration):
            raise KeyboardInterrupt

    register_plugin(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        solve(problems.vector())


@pytest.mark.parametrize("case", ["misspelled", "unmarked", "wrong argument"])
def test_a_faulty_observer_is_refused_with_a_reason(case):
    class Plugin:
        pass

    if case == "misspelled":
        Plugin.twnn_observe_iterations = hookimpl(lambda self, iteration: None)
        message = "Did you mean 'twnn_observe_iteration'"
    elif case == "unmarked":
        Plugin.twnn_observe_solve = lambda self, solution: None
        message = "is not marked as a hook"
    else:
        Plugin.twnn_observe_solve = hookimpl(lambda self, result: None)
        message = "result"
    with pytest.raises(pluggy.PluginValidationError, match=message):
        register_plugin(Plugin(), "faulty")
    assert "faulty" not in loaded() and observe.listeners() == ()


# ------------------------------------------------------------------------------------ taking plugins out


class Thing:
    """Base of what the stub registry holds."""


def registering(name: str, replace: bool = False) -> object:
    class Plugin:
        @hookimpl
        def twnn_register_solvers(self, register):
            register(name, Thing, replace=replace)

    return Plugin()


@pytest.fixture
def host() -> tuple[PluginHost, Registry]:
    registry = Registry("solver", Thing)
    host = PluginHost({"solvers": registry})
    host.add(registering("plain"), "twnn_plugin", owner="twnn_plugin")
    return host, registry


def test_a_plugin_takes_its_names_with_it_and_gives_back_what_it_took(host):
    host, registry = host
    host.add(registering("own"), "one", owner="one")
    host.add(registering("plain", replace=True), "two", owner="two")
    assert registry.owner("plain") == "two"
    host.remove("one")
    host.remove("two")
    assert registry.names() == ["plain"] and registry.owner("plain") == "twnn_plugin"
    assert host.loaded() == {"twnn_plugin": "twnn_plugin"}


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_plugins_that_replaced_one_another_may_go_in_any_order(host, order):
    host, registry = host
    host.add(registering("plain", replace=True), "one", owner="one")
    host.add(registering("plain", replace=True), "two", owner="two")
    host.remove(order[0])
    assert registry.owner("plain") == order[1]
    host.remove(order[1])
    assert registry.owner("plain") == "twnn_plugin"


def test_what_the_user_registered_since_is_left_alone(host):
    host, registry = host
    host.add(registering("own"), "one", owner="one")
    registry.register("own", Thing, replace=True, owner="user")
    host.remove("one")
    assert registry.owner("own") == "user"


def test_what_cannot_be_taken_out_is_refused(host):
    host, _ = host
    host.add(registering("own"), "mine", owner="mine")
    with pytest.raises(UnknownNameError, match="Did you mean 'mine'"):
        host.remove("mind")
    with pytest.raises(OptionError, match="built-ins"):
        host.remove("twnn_plugin")
    with pytest.raises(UnknownNameError, match="Loaded: none"):
        unregister_plugin("nobody")


def test_a_plugin_that_fails_to_load_does_not_listen():
    class Half(Both):
        @hookimpl
        def twnn_register_solvers(self, register):
            register("anderson", dict)

    with pytest.raises(DuplicateNameError):
        register_plugin(Half(), "half")
    assert observe.listeners() == ()


# ----------------------------------------------------------------------------------------- trace, progress


def test_a_trace_holds_every_rows_residuals_until_it_is_done():
    problem, trace = problems.mixed(), Trace(iterates=True)
    solution = solve(problem, callback=trace, solver="picard")
    table = trace.residual
    batch, count = problem.z0.shape[0], int(solution.steps.max())
    assert table.shape == (batch, count)
    assert trace.newest.steps.tolist() == list(range(1, count + 1))
    known = ~table.isnan()
    assert known.sum(dim=1).tolist() == solution.steps.tolist()
    for row in range(batch):
        last = int(solution.steps[row]) - 1
        assert known[row, : last + 1].all() and not known[row, last + 1 :].any()
        assert float(table[row, last]) == float(solution.residual[row])
    # The iterates are those of plain iteration.
    states = trace.newest.iterates
    assert states.shape == (batch, count, 8)
    z = problem.z0
    with torch.no_grad():
        for k in range(5):
            here = known[:, k]
            torch.testing.assert_close(states[here, k], z[here])
            z = problem.f(z, *problem.context)


def test_a_trace_as_a_callback_starts_anew_with_each_solve():
    problem, trace = problems.vector(), Trace(keep=2)
    counts = [int(solve(problem, callback=trace, tol=tol).steps.max()) for tol in (1e-2, 1e-4, 1e-6)]
    assert [one.residual.shape[1] for one in trace.solves] == counts[1:]
    trace.clear()
    assert trace.residual.shape == (0, 0)


def test_a_trace_as_a_plugin_hears_every_solve_with_its_outcome():
    problem, trace = problems.vector(), Trace(keep=5)
    register_plugin(trace, "trace")
    solution = solve(problem)
    assert trace.newest.info is not None and trace.newest.info.solver == "Anderson"
    assert trace.newest.residual.shape == (6, int(solution.steps.max()))
    kept = trace.newest.solution
    assert kept is not None and torch.equal(kept.status, solution.status)
    assert not kept.value.requires_grad and solution.value.requires_grad
    unregister_plugin("trace")
    register_plugin(trace, "again")  # a used trace may be registered again


def test_nested_solves_are_told_apart():
    trace = Trace(keep=50)
    register_plugin(trace, "trace")
    w = 0.1 * torch.eye(3)

    def outer(z: Tensor, x: Tensor) -> Tensor:
        inner = tw.fix(lambda y, z: torch.tanh(y @ w + z), torch.zeros(2, 3), z, tol=1e-5)
        return 0.5 * inner.value + x

    with torch.no_grad():
        tw.fix(outer, torch.zeros(2, 3), torch.ones(2, 3), tol=1e-4)
    outermost = next(one for one in trace.solves if one.info is not None and one.info.tol == 1e-4)
    assert outermost.steps.tolist() == list(range(1, len(outermost.steps) + 1))
    inner = [one for one in trace.solves if one is not outermost]
    assert len(inner) == len(outermost.steps)
    for one in trace.solves:
        assert one.solution is not None and one.residual.shape[1] == int(one.solution.steps.max())


def test_a_trace_keeps_no_graph_alive():
    """A tensor that only the graph holds must go when the solution does."""
    problem, trace, kept = problems.vector(), Trace(iterates=True), []
    register_plugin(trace, "trace")

    def f(z: Tensor, x: Tensor) -> Tensor:
        scale = torch.ones(1, dtype=torch.float64)
        kept.append(weakref.ref(scale))
        return problem.f(z, x) * scale

    solution = tw.fix(f, problem.z0, *problem.context)
    assert any(one() is not None for one in kept)
    del solution
    gc.collect()
    assert all(one() is None for one in kept)
    assert trace.newest.solution is not None


def test_a_trace_of_an_empty_batch():
    trace = Trace()
    register_plugin(trace, "trace")
    tw.fix(lambda z: 0.5 * z, torch.zeros(0, 3))
    assert trace.residual.shape == (0, 0)
    assert trace.newest.solution is not None


def test_iterates_that_were_not_recorded_are_not_made_up():
    trace = Trace()
    solve(problems.vector(), callback=trace)
    with pytest.raises(OptionError, match=r"Trace\(iterates=True\)"):
        _ = trace.newest.iterates


def test_progress_writes_a_line_when_one_is_due():
    stream = io.StringIO()
    solution = solve(problems.mixed(), callback=Progress(every=5, stream=stream), solver="picard")
    lines = stream.getvalue().splitlines()
    count = int(solution.steps.max())
    assert [int(line.split()[1].rstrip(":")) for line in lines] == [1, *range(5, count + 1, 5)]
    assert lines[0].startswith("step 1: 12 rows left, residual median ")


def test_progress_as_a_plugin_tells_solves_and_their_ends(capsys):
    register_plugin(Progress(every=1000), "progress")
    solution = solve(problems.vector())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("(tol 1.0e-06)")
    assert lines[1].endswith(f"done: 6/6 rows converged, {solution.evaluations} rows evaluated")


def test_progress_that_cannot_write_does_not_end_a_solve():
    stream = io.StringIO()
    stream.close()
    register_plugin(Progress(stream=stream), "progress")
    with pytest.warns(PluginWarning, match="closed file"):
        assert solve(problems.vector()).converged.all()


@pytest.mark.parametrize(
    "make", [lambda: Trace(keep=0), lambda: Trace(keep=True), lambda: Progress(every=0.5)]
)
def test_bad_options_are_refused(make):
    with pytest.raises(OptionError, match="whole number, at least 1"):
        make()


def test_solves_inside_models_are_heard_with_the_rows_of_their_batch():
    import timm

    trace = Trace()
    register_plugin(trace, "trace")
    torch.manual_seed(3)
    gate = ("straight_through", {"bias": 2.0})  # it learns from its message, so that closed rows take part
    model = timm.create_model(
        "twnn_resnet18", num_classes=5, wormholes="layer4->layer3", gate=gate, policy="random"
    )
    gaps = 0
    for training in (True, True, True, True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.train(training)(torch.randn(6, 3, 64, 64))
        (record,) = tw.report(model)
        if not bool(record.open.any()):
            continue
        info = trace.newest.info
        assert info is not None and info.rows in (6, int(record.open.sum()))
        expected = record.steps if info.rows == 6 else record.steps[record.open]
        assert (~trace.residual.isnan()).sum(dim=1).tolist() == expected.tolist()
        # A closed row in front of an open one, and the whole batch handed over: there a row's place in
        # the solve is not its place in the batch.
        gaps += int(info.rows == 6 and not bool(record.open.int().diff().le(0).all()))
    assert gaps


def test_whoever_watches_iterates_sees_each_of_them_whatever_check_every_says():
    trace = tw.Trace()
    tw.register_plugin(trace, "every one")
    try:
        x = torch.ones(3, 2)
        solution = tw.fix(lambda z, x: 0.5 * z + x, 0 * x, x, tol=1e-4, check_every=5)
    finally:
        tw.unregister_plugin("every one")
    assert trace.newest.steps.tolist() == list(range(1, int(solution.steps.max()) + 1))
