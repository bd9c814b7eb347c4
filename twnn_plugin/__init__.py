"""Wormhole networks for timm: fixed points with their derivatives, per sample.

The names here are the public interface; see the README for a tour.
"""

from __future__ import annotations

from importlib import import_module

from . import adjoints, backbones, blocks, gates, plugins, policies, solvers
from .backbones.attach import attach
from .backbones.manage import configure, report
from .backbones.models import register_wormhole_models
from .blocks import Report, SpanRecord
from .errors import (
    AttachError,
    ConvergenceWarning,
    DuplicateNameError,
    FixedPointError,
    MapError,
    OptionError,
    PluginWarning,
    UnknownNameError,
)
from .fixed_point import fix
from .hookspecs import hookimpl
from .plugins import register_plugin
from .solvers import torchdeq_bridge
from .types import AdjointReport, Iteration, PolicyView, Solution, Status

__version__ = "0.1.0"

__all__ = [
    "AdjointReport",
    "AttachError",
    "ConvergenceWarning",
    "DuplicateNameError",
    "FixedPointError",
    "Iteration",
    "MapError",
    "OptionError",
    "PluginWarning",
    "PolicyView",
    "Report",
    "Solution",
    "SpanRecord",
    "Status",
    "UnknownNameError",
    "__version__",
    "adjoint",
    "adjoints",
    "attach",
    "backbones",
    "blocks",
    "configure",
    "fix",
    "gate",
    "gates",
    "hookimpl",
    "plugins",
    "policies",
    "policy",
    "register_plugin",
    "register_wormhole_models",
    "report",
    "solver",
    "solvers",
]

solver = solvers.registry.make
"""``tw.solver("anderson", memory=6)``: a solver with options."""

adjoint = adjoints.registry.make
"""``tw.adjoint("implicit", solver="picard")``: an adjoint with options."""

gate = gates.registry.make
"""``tw.gate("sigmoid", channels=512)``: a gate with options."""

policy = policies.registry.make
"""``tw.policy("random", p=0.3)``: a policy with options."""

plugins.load()
torchdeq_bridge.register_with_torchdeq()
register_wormhole_models()
# By name, because the zoo stands above this package; it registers its models when it is imported.
import_module("zoo.plugin")
