"""The hooks a plugin may implement.

A plugin is any object, usually a module, with functions marked by :data:`hookimpl`::

    import twnn_plugin

    @twnn_plugin.hookimpl
    def twnn_register_solvers(register):
        register("damped", Damped)

Each ``twnn_register_`` hook is called once, when the plugin is loaded, and gets one argument: a
:class:`Register`. The ``twnn_observe_`` hooks are called while solves run; an implementation may leave
out the arguments it has no use for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pluggy

__all__ = [
    "PROJECT",
    "Register",
    "hookimpl",
    "twnn_observe_iteration",
    "twnn_observe_solve",
    "twnn_register_adjoints",
    "twnn_register_backbones",
    "twnn_register_blocks",
    "twnn_register_gates",
    "twnn_register_linear_solvers",
    "twnn_register_policies",
    "twnn_register_solvers",
]

PROJECT = "twnn_plugin"
"""The project's name in pluggy, and the entry-point group that plugins are found by."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook whose name it bears."""


class Register(Protocol):
    """Registers a factory under a name; who owns the name is known already."""

    def __call__(self, name: str, factory: Callable[..., Any], replace: bool = False) -> object:
        """Register ``factory`` as ``name``.

        Args:
            name: what users type: a non-empty string without white space.
            factory: class or function that makes the object from keyword options. The first line
                of its docstring is shown in listings.
            replace: allow taking over a name. An installed plugin can take over a built-in's name
                but not another plugin's.

        Raises:
            DuplicateNameError: the name is taken; the message names both owners.
        """
        ...


@hookspec
def twnn_register_solvers(register: Register) -> None:
    """Register ways to solve ``z = f(z)``.

    Factories return a :class:`twnn_plugin.solvers.Solver`: derive from ``StepSolver`` and give one
    step, or from ``WholeSolver`` to run a loop of your own. Used as ``tw.fix(..., solver=name)``.
    """


@hookspec
def twnn_register_linear_solvers(register: Register) -> None:
    """Register ways to solve the linear equation ``u = J^T u + g`` of an adjoint.

    Factories return a :class:`twnn_plugin.solvers.linear.LinearSolver`. Used as
    ``tw.adjoint("implicit", solver=name)``.
    """


@hookspec
def twnn_register_adjoints(register: Register) -> None:
    """Register ways to differentiate a solve.

    Factories return a :class:`twnn_plugin.adjoints.Adjoint`. Used as ``tw.fix(..., adjoint=name)``.
    """


@hookspec
def twnn_register_blocks(register: Register) -> None:
    """Register modules to build networks with.

    Factories return a :class:`torch.nn.Module`. Used as ``tw.blocks.get(name)(...)``.
    """


@hookspec
def twnn_register_gates(register: Register) -> None:
    """Register gates: how much of a wormhole's message enters, per sample.

    Factories take ``channels`` and return a :class:`twnn_plugin.gates.Gate`. Used as ``gate=name`` of
    a wormhole.
    """


@hookspec
def twnn_register_policies(register: Register) -> None:
    """Register policies: which samples iterate a span.

    Factories return a :class:`twnn_plugin.policies.Policy`. Used as ``policy=name`` of a model and as
    ``tw.policy(name, ...)``.
    """


@hookspec
def twnn_register_backbones(register: Register) -> None:
    """Register adapters that show a model as a chain of named stages.

    Factories return a :class:`twnn_plugin.backbones.Backbone`. ``tw.attach`` uses the first, in the
    order of the names, that claims the model.
    """


@hookspec
def twnn_observe_iteration(iteration: Any, info: Any) -> None:
    """Watch a solve while it runs: called whenever a solver reports, as ``fix``'s callback is.

    Only look: the tensors are the solver's own. What an implementation raises becomes one
    :class:`~twnn_plugin.errors.PluginWarning`, never the end of the solve.

    Args:
        iteration: a :class:`twnn_plugin.types.Iteration`: step, rows, residuals, states.
        info: a :class:`twnn_plugin.observe.SolveInfo`: which solve this is, and its settings.
    """


@hookspec
def twnn_observe_solve(solution: Any, info: Any) -> None:
    """Hear of every solve once, after its forward pass; failures are treated as above.

    Args:
        solution: a :class:`twnn_plugin.types.Solution`. Its value carries the autograd graph: keep a
            detached copy only. ``solution.adjoint`` is filled in when the backward solve has run.
        info: a :class:`twnn_plugin.observe.SolveInfo`.
    """
