"""Small dense networks of any depth, and how they are trained and tuned.

All are alike but for the layers in the middle: a linear map of the point to eight features, N layers with
tanh, a linear classifier. Each kind gets four settings to choose from on validation data, with the first
seed; the other seeds take the choice. Adam on all training points, a one-cycle schedule, gradients cut off
at norm 1; steps whose gradient is not finite are left out and counted.

- ``resnet``: ``y + tanh(K y + b)``, each K drawn by itself with variance 1/8 (Glorot's for a square layer);
  four learning rates.
- ``resnet, scaled``: the same with K divided by ``sqrt(N)``, an initialisation for depth; the same rates.
- ``euler``, ``antisymmetric``, ``hamiltonian``: step ``T / N``; all layers start alike, from one draw (in the
  published code of Haber & Ruthotto 2017 all start alike too, from a fixed matrix); two times T, two rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import twnn_plugin as tw
from twnn_plugin.blocks.propagation import Propagator
from zoo.data.planar import PlanarSet, PlanarSplits

from .fused import propagate

__all__ = ["KINDS", "Setting", "Trained", "accuracy", "build", "chain_of", "settings_of", "train"]

KINDS = ("resnet", "resnet, scaled", "euler", "antisymmetric", "hamiltonian")
WIDTH = 8
_BLOCKS = {"antisymmetric": "antisymmetric", "hamiltonian": "verlet"}
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Setting:
    """What is tuned: the learning rate, and the time T of those that have one."""

    lr: float
    time: float | None = None

    def __str__(self) -> str:
        return f"lr {self.lr:g}" + ("" if self.time is None else f", T {self.time:g}")


def settings_of(kind: str) -> tuple[Setting, ...]:
    """The four settings of a kind."""
    if kind.startswith("resnet"):
        return tuple(Setting(lr) for lr in _RATES)
    return tuple(Setting(lr, time) for time in (10.0, 20.0) for lr in (0.03, 0.1))


def build(kind: str, depth: int, setting: Setting, classes: int, seed: int) -> nn.Sequential:
    """Lift, ``depth`` layers, classifier; the same seed gives the same weights."""
    torch.manual_seed(seed)
    lift, head = nn.Linear(2, WIDTH), nn.Linear(WIDTH, classes)
    h = 1.0 if setting.time is None else setting.time / depth
    chain = tw.blocks.get(_BLOCKS.get(kind, "euler"))(WIDTH, depth, h)
    with torch.no_grad():
        if kind == "resnet, scaled":
            chain.weight /= math.sqrt(depth)
        elif setting.time is not None:
            chain.weight.copy_(chain.weight[:1].clone().expand_as(chain.weight))
    return nn.Sequential(lift, chain, head)


def chain_of(net: nn.Sequential) -> Propagator:
    """The layers in the middle."""
    chain = net[1]
    assert isinstance(chain, Propagator)
    return chain


@dataclass(frozen=True)
class Trained:
    """A trained network and how it went.

    Attributes:
        net: the network.
        loss: last training loss.
        val: validation accuracy.
        val_loss: validation loss.
        skipped: steps whose gradient was not finite.
    """

    net: nn.Sequential
    loss: float
    val: float
    val_loss: float
    skipped: int

    def rank(self) -> tuple[float, float]:
        """Larger is better: accuracy, then loss, on validation data."""
        return self.val, -self.val_loss if math.isfinite(self.val_loss) else -math.inf


def train(
    kind: str, depth: int, setting: Setting, data: PlanarSplits, seed: int, steps: int, smooth: float = 0.0
) -> Trained:
    """Train a network from scratch.

    Args:
        kind: one of :data:`KINDS`.
        depth: layers.
        setting: learning rate and time.
        data: the set.
        seed: of the weights.
        steps: of Adam, each on all training points.
        smooth: factor of :func:`twnn_plugin.smoothness` in the loss.
    """
    net = build(kind, depth, setting, data.classes, seed)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=setting.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.lr, total_steps=max(steps, 2), pct_start=0.2
    )
    skipped, loss = 0, torch.tensor(math.nan)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = net[2](propagate(chain_of(net), net[0](data.train.points)))
        loss = F.cross_entropy(logits, data.train.labels)
        (loss + smooth * tw.smoothness(net) if smooth else loss).backward()
        if bool(nn.utils.clip_grad_norm_(parameters, 1.0).isfinite()):
            optimizer.step()
        else:
            skipped += 1
        schedule.step()
    val, val_loss = accuracy(net, data.val)
    return Trained(net, float(loss.detach()), val, val_loss, skipped)


@torch.no_grad()
def accuracy(net: nn.Module, part: PlanarSet) -> tuple[float, float]:
    """Share of points that are classified right, and the loss."""
    logits: Tensor = net(part.points)
    right = (logits.argmax(dim=1) == part.labels) & logits.isfinite().all(dim=1)
    return float(right.double().mean()), float(F.cross_entropy(logits, part.labels))


def describe(trained: Trained) -> dict[str, Any]:
    """JSON values of a run."""
    return {"val": trained.val, "loss": trained.loss, "skipped": trained.skipped}
