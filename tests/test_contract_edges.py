"""Edges of the public contract: plugins that nearly work, options left out, true residuals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pluggy
import pytest
import timm
import torch
import torchdeq

import twnn_plugin as tw
from tests.test_plugins import KINDS, plugin, python, write_distribution
from twnn_plugin import hookimpl, testing
from twnn_plugin.plugins import PluginHost
from twnn_plugin.registry import Registry
from twnn_plugin.solvers import StepSolver
from twnn_plugin.solvers.picard import Picard
from twnn_plugin.testing.problems import Problem


class Thing:
    """Base of what the stub registries hold."""


@pytest.fixture
def host() -> PluginHost:
    return PluginHost({kind: Registry(kind.rstrip("s"), Thing) for kind in KINDS})


@pytest.fixture
def loads():
    """Loads plugins into the package and takes them out again."""
    names = []

    def load(module, name):
        names.append(tw.register_plugin(module, name=name))

    yield load
    for name in names:
        if name in tw.plugins.loaded():
            tw.unregister_plugin(name)


# A hook that cannot do anything.


@hookimpl
async def waits(register):
    register("never", Thing)


@hookimpl
def yields(register):
    register("never", Thing)
    yield


@pytest.mark.parametrize("hook", [waits, yields])
def test_a_hook_that_would_not_run_is_refused(host, hook):
    module = plugin()
    module.twnn_register_solvers = hook
    with pytest.raises(pluggy.PluginValidationError, match="'twnn_register_solvers' of plugin 'idle' is an"):
        host.add(module, "idle", owner="idle")
    assert "idle" not in host.loaded()


def test_a_wrapper_is_no_mistake(host):
    @hookimpl(wrapper=True)
    def around(register):
        return (yield)

    module = plugin()
    module.twnn_register_solvers = around
    host.add(module, "around", owner="around")
    assert "around" in host.loaded()


def test_a_class_in_place_of_its_instance_is_told_so(host):
    class Mine:
        @hookimpl
        def twnn_register_solvers(self, register):
            register("mine", Thing)

    with pytest.raises(pluggy.PluginValidationError, match=r"give an instance, Mine\(\)"):
        host.add(Mine, "mine", owner="mine")
    host.add(Mine(), "mine", owner="mine")
    with pytest.raises(tw.DuplicateNameError, match=r"tw\.unregister_plugin\('mine'\)"):
        host.add(Mine(), "mine", owner="mine")  # a cell of a notebook that is run again


def test_the_name_of_a_plugin_is_a_string():
    with pytest.raises(tw.OptionError, match="must be a string; got 3"):
        tw.register_plugin(plugin(solvers=lambda register: register("three", Picard)), name=3)
    assert "three" not in tw.solvers.names()


def test_what_an_installed_plugin_registers_on_import_goes_with_it(tmp_path):
    write_distribution(
        tmp_path,
        "hasty",
        """
        import twnn_plugin as tw
        from twnn_plugin.solvers.picard import Picard

        tw.solvers.register("hasty", Picard)

        @tw.hookimpl
        def twnn_register_solvers(register):
            register("later", Picard)
        """,
    )
    seen = python(
        """
        import json, twnn_plugin as tw
        before = tw.solvers.names()
        tw.unregister_plugin("hasty_entry")
        print(json.dumps({"gone": sorted(set(before) - set(tw.solvers.names()))}))
        """,
        tmp_path,
    )
    assert seen["gone"] == ["hasty", "later"]


# Factories


@dataclass(frozen=True)
class Needs(StepSolver):
    share: float

    def step(self, problem, z, fz, r, state):
        return z + self.share * r, None


def test_an_option_without_a_default_is_asked_for_by_name(loads):
    loads(plugin(solvers=lambda register: register("needs", Needs)), "asking")
    with pytest.raises(tw.OptionError, match=r"'needs' \(owner 'asking'\) has options .*: share\."):
        tw.fix(lambda z: 0.5 * z, torch.ones(2, 3), solver="needs")
    assert tw.solver("needs", share=0.5) == Needs(0.5)
    with pytest.raises(tw.OptionError, match=r"Gate 'sigmoid' .* must be given: channels\."):
        tw.gate("sigmoid")


def test_a_type_error_of_the_factory_itself_stays_what_it_is():
    registry = Registry("thing", Thing)
    registry.register("odd", lambda: len(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        registry.make("odd")


def test_a_class_in_place_of_a_solver_is_told_so():
    with pytest.raises(tw.OptionError, match=r"the class Picard itself: give an instance, Picard\(\)"):
        tw.fix(lambda z: 0.5 * z, torch.ones(2, 3), solver=Picard)  # type: ignore[arg-type]
    with pytest.raises(tw.OptionError, match=r"^An adjoint is given .* as a Adjoint; got a int"):
        tw.fix(lambda z: 0.5 * z, torch.ones(2, 3), adjoint=3)  # type: ignore[arg-type]


def test_checks_are_left_out_with_reasons():
    with pytest.raises(tw.OptionError, match=r"each with the reason .* got \['options'\]"):
        testing.check_solver("picard", without=["options"])  # type: ignore[arg-type]


# torchdeq knows the solvers of plugins


def halved(name: str) -> torch.Tensor:
    layer = torchdeq.get_deq(f_solver=f"twnn.{name}", f_tol=1e-6, f_max_iter=60)
    return layer(lambda z: 0.5 * z + 1, torch.zeros(2, 3))[0][-1]


def test_torchdeq_knows_the_solver_of_a_plugin_as_soon_as_it_is_loaded(loads):
    loads(plugin(solvers=lambda register: register("late_solver", Picard)), "late")
    assert torch.allclose(halved("late_solver"), torch.full((2, 3), 2.0), atol=1e-4)
    tw.unregister_plugin("late")
    with pytest.raises(tw.UnknownNameError, match="late_solver"):
        halved("late_solver")


def test_torchdeq_knows_the_solver_of_a_plugin_that_was_imported_first(tmp_path):
    write_distribution(
        tmp_path,
        "eager",
        """
        from twnn_plugin import hookimpl
        from twnn_plugin.solvers.picard import Picard

        @hookimpl
        def twnn_register_solvers(register):
            register("eager", Picard)
        """,
    )
    seen = python(
        """
        import json, eager, torch, torchdeq, twnn_plugin as tw
        owner = tw.solvers.owner("eager")
        layer = torchdeq.get_deq(f_solver="twnn.eager", f_tol=1e-6)
        (z, *_), _ = layer(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
        print(json.dumps({"owner": owner, "off": float((z - 2).abs().max())}))
        """,
        tmp_path,
    )
    assert seen["owner"] == "eager" and seen["off"] < 1e-4


@pytest.mark.parametrize("name", ["max_iter", "tol"])
@pytest.mark.parametrize("value", ["many", None, 1 + 2j])
def test_numbers_inside_torchdeq_are_numbers(name, value):
    solve = torchdeq.solver.get_solver("twnn.anderson")
    with pytest.raises(tw.OptionError, match=f"{name} must be a finite number; got"):
        solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), **{name: value})


@pytest.mark.parametrize("make", [list, torch.tensor, np.array])
def test_the_steps_inside_torchdeq_may_be_an_array(make):
    solve = torchdeq.solver.get_solver("twnn.picard")
    _, states, _ = solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), tol=1e-6, indexing=make([1, 3]))
    assert [float(state[0, 0]) for state in states] == [1.0, 1.75]


# torchdeq writes into the dict that it is configured with


def test_what_a_caller_passes_is_not_written_to():
    specs, options = ["layer4->layer3", "layer3->layer2"], {"temperature": 0.6}
    gate = ("sigmoid", options)
    tw.attach(timm.create_model("resnet18"), wormholes=specs, gate=gate)
    timm.create_model("twnn_resnet18", wormholes=specs, gate=gate)
    assert specs == ["layer4->layer3", "layer3->layer2"]
    assert options == {"temperature": 0.6} and gate == ("sigmoid", options)
    start = {"b": torch.zeros(2, 3), "a": torch.zeros(2, 3)}
    kept = dict(start)
    solution = tw.fix(lambda z: {"a": 0.5 * z["a"] + 1, "b": 0.5 * z["b"]}, start)
    assert list(start) == ["b", "a"] and all(start[key] is kept[key] for key in start)
    assert list(solution.value) == ["b", "a"]
    assert not bool(start["a"].any())


# The conformance suite measures as ``fix`` does.


def test_the_true_residual_of_a_tuple_is_that_of_its_worst_tensor():
    big, small = torch.full((2, 3), 1e6), torch.full((2, 3), 1.0)
    problem = Problem("parts", lambda z: (z[0], 1.5 * z[1]), (big, small), (), ())
    expected = torch.full((2,), 1 / 3, dtype=torch.float64)
    for norm in ("l2", "max"):
        torch.testing.assert_close(testing.true_residual(problem, (big, small), norm=norm), expected)
    absolute = testing.true_residual(problem, (big, small), stop="abs")
    torch.testing.assert_close(absolute, torch.full((2,), 0.5 * 3**0.5, dtype=torch.float64))


def test_the_true_residual_of_a_dict_goes_by_its_keys():
    a, b = torch.ones(2, 1), torch.full((2, 1), 5.0)
    problem = Problem("keys", lambda z: {"b": z["b"], "a": 2 * z["a"]}, {"a": a, "b": b}, (), ())
    for stop, value in (("rel", 0.5), ("abs", 1.0)):
        true = testing.true_residual(problem, {"a": a, "b": b}, stop=stop)
        torch.testing.assert_close(true, torch.full((2,), value, dtype=torch.float64))
