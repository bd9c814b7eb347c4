"""Plugins: the hooks, checks and roll-back of the host, and real distributions found by entry point."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pluggy
import pytest
import torch

import twnn_plugin as tw
from twnn_plugin import hookimpl, hookspecs, plugins
from twnn_plugin.errors import DuplicateNameError, PluginWarning
from twnn_plugin.plugins import PluginHost
from twnn_plugin.registry import Registry

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("solvers", "linear_solvers", "adjoints", "blocks", "gates", "policies", "backbones")
HOOKS = [f"twnn_register_{kind}" for kind in KINDS]


class Thing:
    """Base of what the stub registries hold."""


def plugin(name: str = "outside", **functions) -> types.ModuleType:
    """A module whose hooks are the given functions, by kind: ``solvers=lambda register: ...``."""
    module = types.ModuleType(name)
    for kind, function in functions.items():

        def hook(register, function=function):
            function(register)

        setattr(module, f"twnn_register_{kind}", hookimpl(hook))
    return module


@pytest.fixture
def registries() -> dict[str, Registry[Thing]]:
    return {kind: Registry(kind.rstrip("s"), Thing) for kind in KINDS}


@pytest.fixture
def host(registries) -> PluginHost:
    """A host with one built-in solver, `anderson`, over registries of its own."""
    host = PluginHost(registries)
    builtins = plugin("builtins", solvers=lambda register: register("anderson", Thing))
    host.add(builtins, "twnn_plugin", owner="twnn_plugin")
    return host


@pytest.fixture
def installed(monkeypatch):
    """Installs modules in this process and makes the entry points that lead to them."""

    def install(**modules) -> list[EntryPoint]:
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"{name}_package", module)
        return [EntryPoint(name, f"{name}_package", "twnn_plugin") for name in modules]

    return install


def test_a_plugin_that_fails_takes_no_other_threads_plugin_with_it(host, registries):
    second = plugin("second", gates=lambda register: register("theirs", Thing))
    other = threading.Thread(target=host.add, args=(second, "second", "second"))

    def fails(register):
        other.start()
        other.join(timeout=0.5)  # it waits for this one to be dealt with
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        host.add(plugin("first", solvers=fails), "first", "first")
    other.join()
    assert "second" in host.loaded() and registries["gates"].names() == ["theirs"]


def test_a_hook_that_waits_for_a_thread_that_registers_does_not_hang(host, monkeypatch):
    monkeypatch.setattr("twnn_plugin.plugins._PATIENCE", 0.1)
    told = []

    def second():
        with pytest.raises(RuntimeError, match="must not wait for a thread that registers"):
            host.add(plugin("second", gates=lambda register: register("theirs", Thing)), "second", "second")
        told.append(True)

    def waits(register):
        other = threading.Thread(target=second)
        other.start()
        other.join()

    host.add(plugin("first", solvers=waits), "first", "first")
    assert told == [True] and "first" in host.loaded() and "second" not in host.loaded()


# ------------------------------------------------------------------------------------------- the hooks


@pytest.fixture
def real_host():
    """A host over the package's own registries, which are put back afterwards."""
    real = {kind: getattr(tw, kind).registry for kind in KINDS}
    before = {kind: registry.snapshot() for kind, registry in real.items()}
    yield PluginHost(real)
    for kind, registry in real.items():
        registry.restore(before[kind])


def register_outside(host: PluginHost, kind: str, factory) -> None:
    host.add(plugin(**{kind: lambda register: register("outsider", factory)}), "outside", owner="outside")
    entry = getattr(tw, kind).registry.entry("outsider")
    assert (entry.owner, entry.factory) == ("outside", factory)


def test_every_hook_has_a_test():
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    specified = {name for name in vars(manager.hook) if name.startswith("twnn_register_")}
    assert specified == set(HOOKS)
    assert {name for name in globals() if name.startswith("test_hook_")} >= {f"test_hook_{n}" for n in HOOKS}


def test_every_hook_is_documented():
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for hook in HOOKS:
        assert hook in text, f"docs/plugins.md does not explain {hook}"
        assert getattr(hookspecs, hook).__doc__


def test_builtins_implement_every_hook():
    from twnn_plugin import builtins

    assert all(hasattr(builtins, hook) for hook in HOOKS)
    for kind in KINDS:
        owned = [entry for entry in getattr(tw, kind).entries() if entry.owner == "twnn_plugin"]
        assert owned, f"no built-in {kind}"
        assert all(entry.summary for entry in owned)


def test_hook_twnn_register_solvers(real_host):
    @dataclass(frozen=True)
    class Newton(tw.solvers.StepSolver):
        """Newton's method for maps whose rows are elementwise affine."""

        slope: float = 0.0

        def step(self, problem, z, fz, r, state):
            return z + r / (1 - self.slope), None

    register_outside(real_host, "solvers", Newton)
    solution = tw.fix(
        lambda z: 0.9 * z + 1, torch.zeros(3, 2), solver=tw.solver("outsider", slope=0.9), tol=1e-6
    )
    assert solution.converged.all()
    assert solution.steps.tolist() == [2, 2, 2]
    torch.testing.assert_close(solution.value, torch.full((3, 2), 10.0))


def test_hook_twnn_register_linear_solvers(real_host):
    @dataclass(frozen=True)
    class Inverse(tw.linear_solvers.LinearSolver):
        """Solves ``u = a u + g`` for a number a, from one product."""

        def solve(self, problem, rhs, control):
            u = rhs / (1 - problem.product(rhs) / rhs)
            converged = torch.zeros(rhs.shape[0], dtype=torch.long)
            return tw.solvers.Outcome(u, converged, converged + 1, torch.zeros(rhs.shape[0]))

    register_outside(real_host, "linear_solvers", Inverse)
    x = torch.ones(3, 2, requires_grad=True)
    adjoint = tw.adjoint("implicit", solver="outsider")
    solution = tw.fix(lambda z, x: 0.9 * z + x, torch.zeros(3, 2), x, adjoint=adjoint, tol=1e-6)
    solution.value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3, 2), 10.0))
    assert solution.adjoint.evaluations == 3


def test_hook_twnn_register_adjoints(real_host):
    ran = []

    class Counting(tw.adjoints.get("unrolled")):
        """Unrolled, counting its solves."""

        def run(self, call, reports):
            ran.append(call)
            return super().run(call, reports)

    register_outside(real_host, "adjoints", Counting)
    x = torch.ones(2, 1, requires_grad=True)
    solution = tw.fix(lambda z, x: 0.5 * z + x, torch.zeros(2, 1), x, adjoint="outsider", tol=1e-6)
    solution.value.sum().backward()
    assert len(ran) == 1
    assert x.grad is not None


def test_hook_twnn_register_blocks(real_host):
    class Doubled(torch.nn.Module):
        """Runs a module twice."""

        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(self.module(x))

    register_outside(real_host, "blocks", Doubled)
    block = tw.blocks.registry.make("outsider", module=torch.nn.Tanh())
    assert torch.equal(block(torch.ones(1)), torch.ones(1).tanh().tanh())


def test_hook_twnn_register_gates(real_host):
    class FirstFeature(tw.gates.Gate):
        """Opens where the first feature is positive."""

        def __init__(self, channels: int):
            super().__init__()

        def forward(self, features):
            probability = features[:, 0].sigmoid()
            return tw.gates.GateOutput(probability, probability, probability > 0.5)

    register_outside(real_host, "gates", FirstFeature)
    gate = tw.gates.registry.make("outsider", channels=2)
    assert gate(torch.tensor([[1.0, 0.0], [-1.0, 5.0]])).open.tolist() == [True, False]


def test_hook_twnn_register_policies(real_host):
    class Opposite(tw.policies.Policy):
        """Does what the gate would not."""

        def forward(self, view):
            return ~view.open

    register_outside(real_host, "policies", Opposite)
    shown = torch.tensor([True, False])
    view = tw.policies.PolicyView("b->a", torch.zeros(2, 3), torch.tensor([0.9, 0.1]), shown)
    assert tw.policies.registry.make("outsider")(view).tolist() == [False, True]


def test_hook_twnn_register_backbones(real_host):
    class Renamed(tw.backbones.get("timm")):
        """The timm adapter under another name."""

    register_outside(real_host, "backbones", Renamed)
    assert issubclass(tw.backbones.get("outsider"), tw.backbones.registry.base)


def test_a_hook_is_called_once_and_only_for_its_own_plugin(host):
    calls = []
    first = plugin("first", solvers=lambda register: calls.append("first"))
    second = plugin("second", solvers=lambda register: calls.append("second"))
    host.add(first, "first", owner="a")
    host.add(second, "second", owner="b")
    assert calls == ["first", "second"]


def test_a_plugin_may_be_an_object_with_methods(host, registries):
    class Outside:
        @hookimpl
        def twnn_register_gates(self, register):
            register("half", Thing)

    host.add(Outside(), "object", owner="me")
    assert registries["gates"].owner("half") == "me"


# -------------------------------------------------------------------------------- checks and roll-back


def state_of(host, registries):
    return host.loaded(), {kind: registry.snapshot() for kind, registry in registries.items()}


def broken(register):
    register("first", Thing)
    raise RuntimeError("out of cheese")


def no_marker(register):
    """A hook that nobody marked."""


def misspelled():
    module = types.ModuleType("broken")
    module.twnn_register_solverz = hookimpl(lambda register: register("first", Thing))
    return module


def unmarked():
    module = plugin("broken", gates=lambda register: register("first", Thing))
    module.twnn_register_solvers = no_marker
    return module


def wrong_signature():
    module = types.ModuleType("broken")
    module.twnn_register_solvers = hookimpl(lambda register, colour: None)
    return module


class Panic(BaseException):
    """As extension modules raise it: no ``Exception``."""


def panicking(register):
    raise Panic("of an extension")


BROKEN = {
    "raises": (lambda: plugin("broken", solvers=broken), RuntimeError, "out of cheese"),
    "second hook raises": (
        lambda: plugin("broken", adjoints=broken, gates=lambda register: register("half", Thing)),
        RuntimeError,
        "out of cheese",
    ),
    "misspelled hook": (misspelled, pluggy.PluginValidationError, "Did you mean 'twnn_register_solvers'"),
    "hook without marker": (unmarked, pluggy.PluginValidationError, "twnn_plugin.hookimpl"),
    "wrong signature": (wrong_signature, pluggy.PluginValidationError, "colour"),
    "no hook": (lambda: types.ModuleType("broken"), TypeError, "implements no hook"),
    "unhashable": (lambda: types.SimpleNamespace(), TypeError, "cannot be hashed"),
    "taken name": (
        lambda: plugin(
            "broken", solvers=lambda register: (register("first", Thing), register("anderson", Thing))
        ),
        DuplicateNameError,
        "Solver 'anderson' of 'them' is already registered by 'twnn_plugin'",
    ),
    "bad name": (
        lambda: plugin("broken", solvers=lambda register: register("two words", Thing)),
        ValueError,
        "without white space",
    ),
    "factory that is none": (
        lambda: plugin("broken", solvers=lambda register: register("first", 3)),
        TypeError,
        "must be callable",
    ),
    "misspelled option": (
        lambda: plugin("broken", solvers=lambda register: register("anderson", Thing, replce=True)),
        TypeError,
        "replce",
    ),
    "panic": (
        lambda: plugin("broken", solvers=panicking),
        Panic,
        "of an extension",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_raises_and_leaves_nothing_behind(host, registries, case):
    make, error, message = BROKEN[case]
    before = state_of(host, registries)
    with pytest.raises(error) as caught:
        host.add(make(), "broken", owner="them")
    assert message in str(caught.value)
    assert state_of(host, registries) == before
    # The name is free again, and the failure stops nobody else.
    host.add(plugin(solvers=lambda register: register("first", Thing)), "broken", owner="them")
    assert registries["solvers"].owner("first") == "them"


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_installed_plugin_is_reported_and_skipped(host, registries, installed, case):
    make, _, message = BROKEN[case]
    before = state_of(host, registries)
    with pytest.warns(PluginWarning) as caught:
        host.add_entry_points(installed(them=make()))
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("Plugin 'them' of 'them_package' was skipped.")
    assert message.replace("'them'", "'them_package'") in text
    assert "TWNN_DISABLE_PLUGINS=1" in text
    assert set(host.failures()) == {"them"}
    assert state_of(host, registries) == before


def test_misspelling_in_one_plugin_is_not_blamed_on_the_next(host, registries, installed):
    good = plugin(solvers=lambda register: register("first", Thing))
    with pytest.warns(PluginWarning, match="'amiss'"):
        host.add_entry_points(installed(amiss=misspelled(), good=good))
    assert set(host.failures()) == {"amiss"}
    assert registries["solvers"].owner("first") == "good_package"


def test_what_a_broken_plugin_registers_on_import_goes_too(host, registries, tmp_path, monkeypatch):
    (tmp_path / "sideways.py").write_text(
        "import outlet\noutlet.register('first', dict)\nraise OSError('no')\n"
    )
    outlet = types.ModuleType("outlet")
    outlet.register = registries["solvers"].register
    monkeypatch.setitem(sys.modules, "outlet", outlet)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(PluginWarning, match="OSError: no"):
        host.add_entry_points([EntryPoint("sideways", "sideways", "twnn_plugin")])
    assert registries["solvers"].names() == ["anderson"]


def test_a_plugin_that_exits_does_not_end_the_program(host, tmp_path, monkeypatch):
    (tmp_path / "quitter.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(PluginWarning, match="SystemExit: 3"):
        host.add_entry_points([EntryPoint("quitter", "quitter", "twnn_plugin")])


@pytest.mark.parametrize("value", ["no_such_module_anywhere", "json:no_such_attribute", "not a reference"])
def test_an_entry_point_that_leads_nowhere_is_reported(host, value):
    with pytest.warns(PluginWarning, match="'lost'"):
        host.add_entry_points([EntryPoint("lost", value, "twnn_plugin")])
    assert set(host.failures()) == {"lost"}


def test_interrupt_is_not_swallowed(host, registries, installed):
    def interrupt(register):
        register("first", Thing)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host.add_entry_points(installed(them=plugin(solvers=interrupt)))
    assert registries["solvers"].names() == ["anderson"]


def test_warnings_as_errors_still_load_the_others(host, registries, installed):
    points = installed(amiss=misspelled(), good=plugin(solvers=lambda register: register("first", Thing)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PluginWarning)
        with pytest.raises(PluginWarning):
            host.add_entry_points(points)
    assert registries["solvers"].names() == ["anderson", "first"]


@pytest.mark.parametrize("reverse", [False, True])
def test_two_plugins_with_one_name(host, registries, installed, reverse):
    points = installed(
        alpha=plugin("alpha", solvers=lambda register: register("same", Thing)),
        beta=plugin("beta", solvers=lambda register: register("same", Thing)),
    )
    with pytest.warns(PluginWarning) as caught:
        host.add_entry_points(reversed(points) if reverse else points)
    assert "'same' of 'beta_package' is already registered by 'alpha_package'" in str(caught[0].message)
    assert registries["solvers"].owner("same") == "alpha_package"


def test_an_installed_plugin_may_replace_a_builtin_but_not_another_plugin(host, registries, installed):
    def take(name):
        return lambda register: register(name, Thing, replace=True)

    with pytest.warns(PluginWarning) as caught:
        host.add_entry_points(
            installed(alpha=plugin("a", solvers=take("anderson")), beta=plugin("b", solvers=take("anderson")))
        )
    assert len(caught) == 1
    assert "cannot replace another's" in str(caught[0].message)
    assert registries["solvers"].owner("anderson") == "alpha_package"


def test_equal_entry_point_names_of_two_distributions_are_told_apart(host, monkeypatch):
    points = []
    for package in ("north", "south"):
        module = plugin(package, solvers=lambda register, name=package: register(name, Thing))
        monkeypatch.setitem(sys.modules, package, module)
        points.append(EntryPoint("solvers", package, "twnn_plugin"))
    host.add_entry_points([*points, points[0]])
    assert host.loaded() == {
        "twnn_plugin": "twnn_plugin",
        "solvers (north)": "north",
        "solvers (south)": "south",
    }


def test_one_object_is_not_loaded_twice(host, registries):
    module = plugin(solvers=lambda register: register("first", Thing))
    host.add(module, "one", owner="me")
    with pytest.raises(DuplicateNameError, match="same object as plugin 'one'"):
        host.add(module, "two", owner="me")
    with pytest.raises(DuplicateNameError, match="'one' is already loaded"):
        host.add(plugin(gates=lambda register: register("half", Thing)), "one", owner="me")
    assert registries["solvers"].names() == ["anderson", "first"]
    assert host.loaded()["one"] == "me"


def test_loading_again_changes_nothing():
    before = {kind: getattr(tw, kind).registry.snapshot() for kind in KINDS}, plugins.loaded()
    plugins.load()
    plugins.load(disable_external=False)
    assert ({kind: getattr(tw, kind).registry.snapshot() for kind in KINDS}, plugins.loaded()) == before


# ------------------------------------------------------------------------------- real distributions


def python(code: str, *paths: Path, **environment: str) -> dict:
    """Run code in a fresh interpreter that sees the given folders; what it prints as JSON."""
    base = {k: v for k, v in os.environ.items() if k not in ("TWNN_DISABLE_PLUGINS", "PYTHONWARNINGS")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**base, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), **environment},
        cwd=paths[0],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def write_distribution(site: Path, name: str, source: str) -> None:
    """What installing a distribution of one module leaves in a site folder."""
    module = name.replace("-", "_")
    info = site / f"{module}-1.5.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[twnn_plugin]\n{module}_entry = {module}\n")


def test_the_example_of_the_documentation_runs(tmp_path):
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    python("\n".join([*blocks, "print('{}')"]), tmp_path, TWNN_DISABLE_PLUGINS="1")


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The folder that pip installed the example distribution into."""
    scratch = tmp_path_factory.mktemp("example")
    source = shutil.copytree(ROOT / "tests" / "thirdparty", scratch / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(scratch / "site"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return scratch / "site"


@pytest.fixture
def troubled(tmp_path) -> Path:
    """A site folder with four distributions, three of them broken, each in its own way."""
    site = tmp_path / "site"
    hook = "from twnn_plugin import hookimpl\nfrom twnn_plugin.solvers.picard import Picard\n"
    write_distribution(site, "bad-import", "import no_such_module_anywhere\n")
    write_distribution(
        site,
        "bad-hook",
        hook + "@hookimpl\ndef twnn_register_solverz(register):\n    register('x', Picard)\n",
    )
    write_distribution(
        site,
        "bad-name",
        hook
        + "@hookimpl\ndef twnn_register_solvers(register):\n"
        + "    register('half_done', Picard)\n    register('anderson', Picard)\n",
    )
    write_distribution(
        site,
        "sound",
        hook + "@hookimpl\ndef twnn_register_solvers(register):\n    register('fine', Picard)\n",
    )
    return site


REPORT = """
    import json, warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import twnn_plugin as tw
    import torch
    from twnn_plugin import plugins
    names = tw.solvers.names()
    works = bool(tw.fix(lambda z: z / 2, torch.ones(2, 3), solver="anderson").converged.all())
    print(json.dumps({
        "solvers": {name: tw.solvers.owner(name) for name in names},
        "warnings": [str(w.message) for w in caught if w.category is tw.PluginWarning],
        "loaded": plugins.loaded(), "failures": plugins.failures(), "works": works,
    }))
"""


def test_broken_distributions_are_reported_by_name_and_skipped(troubled):
    seen = python(REPORT, troubled)
    assert seen["works"]
    assert set(seen["failures"]) == {"bad_import_entry", "bad_hook_entry", "bad_name_entry"}
    assert "No module named 'no_such_module_anywhere'" in seen["failures"]["bad_import_entry"]
    assert "Did you mean 'twnn_register_solvers'?" in seen["failures"]["bad_hook_entry"]
    refused = "Solver 'anderson' of 'bad-name' is already registered by 'twnn_plugin'"
    assert refused in seen["failures"]["bad_name_entry"]
    assert len(seen["warnings"]) == 3
    for name in ("bad-hook", "bad-import", "bad-name"):
        assert sum(f"{name} 1.5" in text for text in seen["warnings"]) == 1
    assert seen["solvers"]["fine"] == "sound"
    assert seen["loaded"]["sound_entry"] == "sound 1.5"
    assert seen["solvers"]["anderson"] == "twnn_plugin"
    assert "half_done" not in seen["solvers"]
    assert "x" not in seen["solvers"]


@pytest.mark.parametrize("value", ["1", "true"])
def test_disabled_by_the_environment(troubled, value):
    seen = python(REPORT, troubled, TWNN_DISABLE_PLUGINS=value)
    assert seen["works"]
    assert set(seen["loaded"]) == {"twnn_plugin"}
    assert set(seen["solvers"].values()) == {"twnn_plugin"}
    assert not seen["warnings"]
    assert not seen["failures"]


def test_an_installed_solver_is_used_by_name(example):
    seen = python(
        """
        import json, torch, twnn_plugin as tw
        from twnn_plugin import plugins
        torch.manual_seed(0)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        f = lambda z, x: 0.8 * torch.cos(z) + x
        start = torch.zeros(4, 3, dtype=torch.float64)
        theirs = tw.fix(f, start, x, solver=tw.solver("aitken", first=0.5), tol=1e-10, max_iter=500)
        ours = tw.fix(f, start, x, solver="picard", tol=1e-10, max_iter=500)
        (gradient,) = torch.autograd.grad(theirs.value.sum(), x)
        print(json.dumps({
            "loaded": plugins.loaded()["example"], "failures": plugins.failures(),
            "owners": [tw.solvers.owner("aitken"), tw.policies.owner("even_rows")],
            "converged": theirs.converged.tolist(),
            "distance": float((theirs.value - ours.value).abs().max()),
            "gradient error": float((gradient - 1 / (1 + 0.8 * theirs.value.sin())).abs().max()),
        }))
        """,
        example,
        PYTHONWARNINGS="error::RuntimeWarning",
    )
    assert seen["loaded"] == "twnn-example-plugin 0.3.0"
    assert seen["failures"] == {}
    assert seen["owners"] == ["twnn-example-plugin", "twnn-example-plugin"]
    assert seen["converged"] == [True] * 4
    assert seen["distance"] < 1e-8
    assert seen["gradient error"] < 1e-6


def test_an_installed_policy_is_used_by_name_in_a_model(example):
    seen = python(
        """
        import json, timm, torch, twnn_plugin as tw
        torch.manual_seed(0)
        model = timm.create_model(
            "twnn_resnet18", num_classes=10, wormholes="layer4->layer3", gate="always",
            policy="even_rows", solver="aitken",
        ).eval()
        with torch.no_grad():
            logits = model(torch.randn(4, 3, 64, 64))
        (record,) = tw.report(model)
        print(json.dumps({
            "shape": list(logits.shape), "open": record.open.tolist(), "steps": record.steps.tolist(),
        }))
        """,
        example,
    )
    assert seen["shape"] == [4, 10]
    assert seen["open"] == [True, False, True, False]
    assert [count > 0 for count in seen["steps"]] == seen["open"]


def test_a_plugin_that_is_imported_before_the_package_is_loaded_at_the_first_lookup(example):
    seen = python(
        """
        import json, twnn_example_plugin.solver
        import twnn_plugin as tw
        print(json.dumps({"owner": tw.solvers.owner("aitken"), "failures": tw.plugins.failures()}))
        """,
        example,
        PYTHONWARNINGS="error::RuntimeWarning",
    )
    assert seen["owner"] == "twnn-example-plugin"
    assert seen["failures"] == {}
