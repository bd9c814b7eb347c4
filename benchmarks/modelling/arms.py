"""The networks of ``models`` with their settings and where these come from, and the scales of a run.

Every network is given the same optimiser (AdamW on one cycle), batches, images, updates (but for those that
are trained longer, or shorter, on purpose) and the same search: three learning rates around the one that its
source recommends, for the same share of the training, the best on validation data goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm

from ..training.tasks import Opening
from .networks import Deep, Equilibrium, Network, Selecting, Timm, Wormhole

__all__ = ["ARMS", "SCALES", "Arm", "Scale", "arms"]


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    Attributes:
        name: picks the networks' options.
        img_size: height and width in pixels; None: the set's own.
        rows: training images; None: all.
        epochs: passes over them.
        batch: images an update.
        looks: how often validation accuracy is written down.
        updates: in all, in place of epochs.
    """

    name: str
    img_size: int | None
    rows: int | None
    epochs: float
    batch: int = 64
    looks: int = 12
    updates: int | None = None


SCALES = {
    "quick": Scale("small", 14, 1024, 1.0, looks=2),
    "small": Scale("small", 14, 20_000, 5.0),
    "gpu": Scale("small", 14, 20_000, 0.0, looks=4, updates=200),
    "full": Scale("full", None, None, 30.0, batch=128, looks=30),
}

RATES, SLOW_RATES = (5e-3, 1e-2, 2e-2), (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Arm:
    """One network of the comparison.

    Attributes:
        name: in keys.
        title: in tables.
        network: what it is.
        source: where its settings come from, one line.
        rates: learning rates that it tries.
        share: of the scale's training, by the scale's name; 1 where not named.
    """

    name: str
    title: str
    network: Network
    source: str
    rates: tuple[float, ...] = RATES
    share: dict[str, float] | None = None

    def share_of(self, scale: str) -> float:
        """Of the scale's updates."""
        return (self.share or {}).get(scale, 1.0)


_BACKBONE = {"small": {"widths": (8, 16, 32)}, "full": {"widths": (16, 32, 64), "depth": 3}}
_WIDER = {"small": {"widths": (12, 24, 48)}, "full": {"widths": (24, 48, 96), "depth": 3}}
_HAMILTONIAN = {"small": {"widths": (8, 16, 32)}, "full": {"widths": (16, 32, 64)}}
_CNN = {"small": {"widths": (8, 16, 32)}}
_DEQ = {
    "small": {"width": 24, "inner": 32, "downsample": 1},
    "full": {"width": 96, "inner": 128, "downsample": 1},
}
_CELL = (
    "cell of the deep-implicit-layers tutorial with the plain backbone's number of parameters, weight norm "
    "and 24 evaluations as torchdeq's own CIFAR models have; relative residual 1e-3"
)
_THIRD = {"small": 1 / 3}


def _deq(
    name: str,
    title: str,
    source: str,
    share: dict[str, float] | None = None,
    used: dict[str, Any] | None = None,
    **solve: Any,
) -> Arm:
    network = Equilibrium(model="deq_tiny", options=_DEQ, solve=solve, used=used)
    return Arm(name, title, network, f"{_CELL}; {source}", share=share)


ARMS: tuple[Arm, ...] = (
    Arm(
        "plain",
        "plain backbone",
        Timm(model="resnet8_tiny", options=_BACKBONE),
        "recipe and rates of the benchmark 'wormholes', searched for this network (docs/training.md)",
    ),
    Arm(
        "longer",
        "plain, trained twice as long",
        Timm(model="resnet8_tiny", options=_BACKBONE),
        "as the plain backbone",
        share={"small": 2.0, "full": 2.0},
    ),
    Arm(
        "wider",
        "plain, 1.5 times as wide",
        Timm(model="resnet8_tiny", options=_WIDER),
        "as the plain backbone",
    ),
    Arm(
        "twnn",
        "TWNN (wormhole layer3->layer2)",
        Wormhole(
            model="resnet8_tiny",
            options=_BACKBONE,
            opening=Opening("layer3->layer2", (1, 2), begins=0.7, closed_weight=0.1, share=0.15),
        ),
        "first recipe for Fashion-MNIST in docs/training.md, plain for the first 70 % of the training, then "
        "with the wormhole: in so few updates two paths that learn from different images learn too little",
    ),
    Arm(
        "dynalay",
        "DynaLay (dynalay_cnn3)",
        Selecting(model="dynalay_cnn3", options=_CNN),
        "the paper's joint training, after 30 % of random choices; the paper's reward (0.5, 0.3, 0.2) never "
        "iterates, so likelihood and a price of 0.02 are taken",
        share={"small": 0.5},
    ),
    Arm(
        "cnn3",
        "three-layer CNN",
        Timm(model="cnn3", options=_CNN),
        "the paper gives no widths: those of the benchmark 'dynalay' (at full scale 32, 64, 128)",
    ),
    Arm(
        "hamiltonian",
        "Hamiltonian ResNet",
        Timm(model="hamiltonian_20", options=_HAMILTONIAN),
        "layout of Chang et al. (2018); end time as in the benchmark 'propagation'",
    ),
    _deq(
        "deq",
        "DEQ, torchdeq, implicit",
        "solver and rate that did best in the search told at zoo.models.deq.deq_tiny",
        f_solver="fixed_point_iter",
        b_solver="fixed_point_iter",
    ),
    _deq(
        "deq_anderson",
        "DEQ, torchdeq Anderson, implicit",
        "torchdeq's Anderson with its own memory and mixing, both ways",
        _THIRD,
        f_solver="anderson",
        b_solver="anderson",
    ),
    _deq(
        "deq_broyden",
        "DEQ, torchdeq Broyden, implicit",
        "torchdeq's Broyden without line search, both ways",
        _THIRD,
        f_solver="broyden",
        b_solver="broyden",
    ),
    _deq(
        "deq_phantom",
        "DEQ, torchdeq, phantom",
        "5 undamped steps, the middle of what the phantom gradient's authors try (Geng et al. 2021)",
        _THIRD,
        ift=False,
        grad=5,
    ),
    _deq(
        "deq_unrolled",
        "DEQ, torchdeq, unrolled",
        "all 24 evaluations with their graph: torchdeq's phantom gradient after none",
        _THIRD,
        {"f_max_iter": 24},
        ift=False,
        grad=23,
        f_solver="simple_fixed_point_iter",
        f_max_iter=1,
    ),
    _deq(
        "deq_ours",
        "the same DEQ, our solver in torchdeq",
        "twnn.anderson in torchdeq's own machinery, both ways",
        _THIRD,
        f_solver="twnn.anderson",
        b_solver="twnn.anderson",
    ),
    Arm(
        "resnet36",
        "ResNet-36",
        Deep(layers=36),
        "rates around the first paper's 0.001 (table 2)",
        SLOW_RATES,
        {"small": 0.011},
    ),
    Arm(
        "resnet50",
        "ResNet-50",
        Deep(layers=50),
        "rates around the first paper's 0.001 (table 2)",
        SLOW_RATES,
        {"small": 0.011},
    ),
)
_QUICK = ("plain", "twnn", "deq")


def arms(quick: bool) -> tuple[Arm, ...]:
    """Those that this checkout can build, in the order of the tables."""
    there = (arm for arm in ARMS if not isinstance(arm.network, Timm) or timm.is_model(arm.network.model))
    return tuple(arm for arm in there if not quick or arm.name in _QUICK)
