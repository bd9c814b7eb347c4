"""The built-ins, registered through the same hooks as anybody else's plugin."""

from __future__ import annotations

from .adjoints.ad_fixed_point import ADFixedPoint as ADFixedPointAdjoint
from .adjoints.checkpointed import Checkpointed
from .adjoints.implicit import Implicit
from .adjoints.one_step import OneStep
from .adjoints.phantom import Phantom
from .adjoints.unrolled import Unrolled
from .backbones.timm_adapter import TimmBackbone
from .blocks.fpi import FPI
from .blocks.propagation import Antisymmetric, Euler, Verlet
from .blocks.wormhole import Wormhole
from .gates.constant import AlwaysGate, NeverGate
from .gates.hard_concrete import HardConcreteGate
from .gates.sigmoid import SigmoidGate
from .gates.straight_through import StraightThroughGate
from .hookspecs import Register, hookimpl
from .policies.constant import AlwaysPolicy, NeverPolicy
from .policies.controller import ControllerPolicy
from .policies.dynalay import DynaLayPolicy
from .policies.entropy import EntropyPolicy
from .policies.gate import GatePolicy
from .policies.halting import HaltingPolicy
from .policies.oracle import OraclePolicy
from .policies.random import RandomPolicy
from .solvers import torchdeq_bridge
from .solvers.ad_fixed_point import ADFixedPoint as ADFixedPointSolver
from .solvers.anderson import Anderson
from .solvers.auto import Auto
from .solvers.broyden import Broyden
from .solvers.linear.auto import Auto as AutoLinear
from .solvers.linear.bicgstab import BiCGSTAB
from .solvers.linear.gcr import GCR
from .solvers.linear.gmres import GMRES
from .solvers.linear.neumann import Neumann
from .solvers.newton_krylov import NewtonKrylov
from .solvers.picard import Picard

__all__ = [
    "twnn_register_adjoints",
    "twnn_register_backbones",
    "twnn_register_blocks",
    "twnn_register_gates",
    "twnn_register_linear_solvers",
    "twnn_register_policies",
    "twnn_register_solvers",
]


@hookimpl
def twnn_register_solvers(register: Register) -> None:
    """Native solvers, and torchdeq's through the bridge."""
    register("picard", Picard)
    register("anderson", Anderson)
    register("broyden", Broyden)
    register("newton_krylov", NewtonKrylov)
    register("auto", Auto)
    register("ad_fixed_point", ADFixedPointSolver)
    for name, factory in torchdeq_bridge.SOLVERS.items():
        register(name, factory)


@hookimpl
def twnn_register_linear_solvers(register: Register) -> None:
    """Krylov methods, the plain series, and a choice between them row by row."""
    register("gcr", GCR)
    register("gmres", GMRES)
    register("bicgstab", BiCGSTAB)
    register("neumann", Neumann)
    register("auto", AutoLinear)


@hookimpl
def twnn_register_adjoints(register: Register) -> None:
    """Exact at the fixed point, through the loop, and approximations."""
    register("implicit", Implicit)
    register("ad_fixed_point", ADFixedPointAdjoint)
    register("unrolled", Unrolled)
    register("checkpointed", Checkpointed)
    register("one_step", OneStep)
    register("phantom", Phantom)


@hookimpl
def twnn_register_blocks(register: Register) -> None:
    """Modules usable without timm."""
    register("wormhole", Wormhole)
    register("fpi", FPI)
    register("euler", Euler)
    register("antisymmetric", Antisymmetric)
    register("verlet", Verlet)


@hookimpl
def twnn_register_gates(register: Register) -> None:
    """Learned gates and constant ones."""
    register("straight_through", StraightThroughGate)
    register("sigmoid", SigmoidGate)
    register("hard_concrete", HardConcreteGate)
    register("always", AlwaysGate)
    register("never", NeverGate)


@hookimpl
def twnn_register_policies(register: Register) -> None:
    """The gate's own decision and baselines for it."""
    register("gate", GatePolicy)
    register("always", AlwaysPolicy)
    register("never", NeverPolicy)
    register("random", RandomPolicy)
    register("dynalay", DynaLayPolicy)
    register("entropy", EntropyPolicy)
    register("halting", HaltingPolicy)
    register("oracle", OraclePolicy)
    register("twnn_controller", ControllerPolicy)


@hookimpl
def twnn_register_backbones(register: Register) -> None:
    """Adapters of model libraries."""
    register("timm", TimmBackbone)
