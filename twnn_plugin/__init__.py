"""Wormhole networks for timm: fixed points with their derivatives, per sample.

The names here are the public interface; see the README for a tour.
"""

from __future__ import annotations

from importlib import import_module

from . import adjoints, backbones, blocks, constraints, gates, observe, plugins, policies, solvers
from .backbones.attach import attach
from .backbones.auxiliary import freeze_backbone
from .backbones.calibrate import calibrate
from .backbones.closed_head import closed_logits, closed_loss
from .backbones.manage import configure, report
from .backbones.manners import export, unrolled
from .backbones.models import register_wormhole_models
from .backbones.span import spans
from .blocks import Report, SpanRecord
from .blocks.propagation import StabilityReport, smoothness, stability
from .certificates import (
    Certificate,
    certify,
    contraction_rate,
    gradient_error,
    observed_rate,
    spectral_radius,
)
from .constraints import contractive, orthogonal
from .errors import (
    AttachError,
    ConvergenceWarning,
    DuplicateNameError,
    FixedPointError,
    MapError,
    OptionError,
    PluginWarning,
    TransformError,
    UnknownNameError,
)
from .fixed_point import fix
from .hookspecs import hookimpl
from .observe import Progress, Trace
from .plugins import register_plugin, unregister_plugin
from .regularise import jacobian_frobenius, spectral_penalty
from .solvers import linear as linear_solvers
from .solvers import torchdeq_bridge
from .streaming import Stream, StreamReport, stream
from .types import AdjointReport, Iteration, PolicyView, Solution, Status

__version__ = "0.1.0"

__all__ = [
    "AdjointReport",
    "AttachError",
    "Certificate",
    "ConvergenceWarning",
    "DuplicateNameError",
    "FixedPointError",
    "Iteration",
    "MapError",
    "OptionError",
    "PluginWarning",
    "PolicyView",
    "Progress",
    "Report",
    "Solution",
    "SpanRecord",
    "StabilityReport",
    "Status",
    "Stream",
    "StreamReport",
    "Trace",
    "TransformError",
    "UnknownNameError",
    "__version__",
    "adjoint",
    "adjoints",
    "attach",
    "backbones",
    "blocks",
    "calibrate",
    "certify",
    "closed_logits",
    "closed_loss",
    "configure",
    "constraints",
    "contraction_rate",
    "contractive",
    "export",
    "fix",
    "freeze_backbone",
    "gate",
    "gates",
    "gradient_error",
    "hookimpl",
    "jacobian_frobenius",
    "linear_solver",
    "linear_solvers",
    "observe",
    "observed_rate",
    "orthogonal",
    "plugins",
    "policies",
    "policy",
    "register_plugin",
    "register_wormhole_models",
    "report",
    "smoothness",
    "solver",
    "solvers",
    "spans",
    "spectral_penalty",
    "spectral_radius",
    "stability",
    "stream",
    "unregister_plugin",
    "unrolled",
]

solver = solvers.registry.make
"""``tw.solver("anderson", memory=6)``: a solver with options."""

linear_solver = linear_solvers.registry.make
"""``tw.linear_solver("gcr", memory=10)``: a solver of an adjoint's equation, with options."""

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
