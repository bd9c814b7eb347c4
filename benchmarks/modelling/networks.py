"""What is compared by ``models``, as kinds of networks: how each is built, trained, made ready and dialled.

A kind is not a model: all of them end in one that maps images (B, C, H, W) to logits (B, K).
"""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

import twnn_plugin as tw
import zoo.models  # noqa: F401  (registers the models with timm)
from twnn_plugin.policies.dynalay import DynaLayPolicy
from twnn_plugin.selection import Reward, closed_loss, policy_loss, selection_of

from ..training.judge import correct, percent, run_over
from ..training.loop import open_up
from ..training.tasks import Opening, Part
from ..training.unsure import Unsure, entropy

__all__ = ["Deep", "Equilibrium", "Network", "Selecting", "Shape", "Timm", "Wormhole"]


@dataclass(frozen=True)
class Shape:
    """What a network must know of the data and the scale.

    Attributes:
        channels: of an image.
        classes: labels.
        size: height and width in pixels.
        scale: name of the scale, which chooses among a network's options.
    """

    channels: int
    classes: int
    size: int
    scale: str


@dataclass(frozen=True)
class Network(ABC):
    """A kind of network.

    Attributes:
        options: of the model, by the name of the scale.
    """

    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @abstractmethod
    def build(self, shape: Shape) -> nn.Module:
        """Freshly initialised from torch's global generator."""

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        """What is minimised, a scalar; ``draw`` is for random numbers of the training."""
        return F.cross_entropy(model(images), labels)

    def begin(self, model: nn.Module, updates: int, total: int) -> bool:
        """Called before every update with how many are done and to be done; whether parameters were added."""
        return False

    def stepped(self, model: nn.Module) -> None:  # noqa: B027
        """Called after every update."""

    def in_use(self, model: nn.Module, shape: Shape) -> nn.Module:
        """The network as it is used, with the weights of the one that is trained; the same, for most."""
        return model

    def ready(self, model: nn.Module, val: Part) -> dict[str, Any]:
        """Make ready for use: what can be chosen is chosen on validation data, and told as JSON values."""
        return {}

    def dial(self, model: nn.Module, val: Part, shape: Shape) -> Iterator[tuple[str, nn.Module]]:
        """Settings of a trained network from cheap to dear, with the network so set."""
        yield from ()


@dataclass(frozen=True)
class Timm(Network):
    """A model of timm's registry.

    Attributes:
        model: its name.
    """

    model: str = ""

    def build(self, shape: Shape) -> nn.Module:
        options = self.options.get(shape.scale, {})
        return timm.create_model(self.model, in_chans=shape.channels, num_classes=shape.classes, **options)


@dataclass(frozen=True)
class Deep(Network):
    """ResNet-36 or ResNet-50 with a stem for small images: 3x3, stride 1, no pooling.

    The first paper names both and defines neither. ResNet-50 is He et al.'s; ResNet-36 is their ResNet-34
    with one block more in the third stage, which is the one that deeper ResNets lengthen.

    Attributes:
        layers: 36 or 50.
    """

    layers: int = 50

    def build(self, shape: Shape) -> nn.Module:
        block: Any  # timm's annotation asks for an instance
        block, depths = (Bottleneck, (3, 4, 6, 3)) if self.layers == 50 else (BasicBlock, (3, 4, 7, 3))
        model = ResNet(block, depths, num_classes=shape.classes, in_chans=shape.channels)
        model.conv1 = nn.Conv2d(shape.channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model


SHARES = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
"""Shares of open samples that the gate's threshold is moved to, quantiles of validation scores."""


@dataclass(frozen=True)
class Wormhole(Timm):
    """A wormhole over part of a plain model: the recipe of the benchmark ``wormholes`` (docs/training.md).

    In use, the entropy of the closed head's answer decides who is iterated.

    Attributes:
        opening: how it is trained and used.
    """

    opening: Opening = field(default_factory=lambda: Opening("layer3->layer2", (1, 2)))

    def begin(self, model: nn.Module, updates: int, total: int) -> bool:
        if _attached(model) or updates < min(round(self.opening.begins * total), total - 1):
            return False
        open_up(model, self.opening)
        model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        return True

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        if not _attached(model):
            return super().loss(model, images, labels, draw)
        draws = self.opening.draws
        tw.configure(model, max_iter=draws[int(torch.randint(len(draws), (1,), generator=draw))])
        loss = F.cross_entropy(model(images), labels)
        beside = tw.closed_loss(model, F.cross_entropy, labels)
        return loss if beside is None else loss + beside

    def in_use(self, model: nn.Module, shape: Shape) -> nn.Module:
        return tw.configure(model, max_iter=max(self.opening.draws)) if _attached(model) else model

    def ready(self, model: nn.Module, val: Part) -> dict[str, Any]:
        threshold = _threshold(_closed_entropies(model, val), self.opening.share)
        tw.configure(model, max_iter=self.opening.max_iter, policy="always")
        tried: list[tuple[float, float]] = []
        for tol in self.opening.tolerances:
            tw.configure(model, tol=tol)
            tried.append((percent(correct(run_over(model, val).logits, val)), tol))
        # The best on validation data; among those within a tenth of a point of it, the cheapest.
        tol = max(t for accuracy, t in tried if accuracy >= max(tried)[0] - 0.1)
        tw.configure(model, tol=tol, policy=self._unsure(model, threshold))
        return {"tol": tol, "share": self.opening.share, "threshold": threshold}

    def dial(self, model: nn.Module, val: Part, shape: Shape) -> Iterator[tuple[str, nn.Module]]:
        scores = _closed_entropies(model, val)
        yield "closed", model
        unsure = self._unsure(model, math.inf)
        tw.configure(model, policy=unsure)
        for share in SHARES:
            unsure.threshold = _threshold(scores, share)
            yield f"{100 * share:.0f} % open", model

    def _unsure(self, model: nn.Module, threshold: float) -> Unsure:
        return Unsure(model, self.opening.span.partition("->")[0], threshold)


def _attached(model: nn.Module) -> bool:
    return any(name == "wormholes" for name, _ in model.named_children())


def _closed_entropies(model: nn.Module, val: Part) -> Tensor:
    """(N,) in nats, of the closed network's answers; leaves it closed."""
    tw.configure(model, policy="never")
    return entropy(run_over(model, val).logits)


def _threshold(scores: Tensor, share: float) -> float:
    """What this share of the scores exceeds."""
    return -1.0 if share >= 1 else float(torch.quantile(scores, 1 - share))


@dataclass(frozen=True)
class Selecting(Timm):
    """DynaLay: a policy picks layers to iterate, sample by sample.

    Attributes:
        warmup: share of the training in which all choices are at random, so that every path learns.
        closed_weight: of the loss of the prediction before any choice.
        penalties: cost weights that the trained agent is used with; below 0 iterating is rewarded.
        reward: of the agent.
    """

    warmup: float = 0.3
    reward: Reward = field(
        default_factory=lambda: Reward(
            alpha=1.0, beta=0.02, measure="likelihood", weight=1.0, entropy=1e-3, floor=-3.0
        )
    )
    closed_weight: float = 0.5
    penalties: tuple[float, ...] = (0.1, 0.0, -1.0, -3.0, -10.0, -30.0)

    def begin(self, model: nn.Module, updates: int, total: int) -> bool:
        self._agent(model).explore(1.0 if updates < self.warmup * total else None)
        return False

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        logits = model(images)
        selection = selection_of(model)
        assert selection is not None and selection.last is not None
        loss = F.cross_entropy(logits, labels) + closed_loss(selection.last, labels, self.closed_weight)
        extra = selection.auxiliary_loss()
        loss = loss if extra is None else loss + extra
        return loss + policy_loss(selection.last, logits, labels, self.reward)

    def stepped(self, model: nn.Module) -> None:
        self._agent(model).stepped()

    def dial(self, model: nn.Module, val: Part, shape: Shape) -> Iterator[tuple[str, nn.Module]]:
        agent = self._agent(model)
        own = agent.cost_weight
        for penalty in self.penalties:
            agent.cost_weight = penalty
            yield f"penalty {penalty:g}", model
        agent.cost_weight = own

    @staticmethod
    def _agent(model: nn.Module) -> DynaLayPolicy:
        selection = selection_of(model)
        assert selection is not None and isinstance(selection.policy, DynaLayPolicy)
        return selection.policy


@dataclass(frozen=True)
class Equilibrium(Timm):
    """A torchdeq equilibrium model.

    Attributes:
        solve: options of the solves and of the gradient, on every scale.
        used: options that differ after training, when there is no gradient; None: none do.
    """

    solve: Mapping[str, Any] = field(default_factory=dict)
    used: Mapping[str, Any] | None = None

    def build(self, shape: Shape) -> nn.Module:
        return self._build(shape, {})

    def in_use(self, model: nn.Module, shape: Shape) -> nn.Module:
        return model if self.used is None else self._copy(model, shape, dict(self.used))

    def dial(self, model: nn.Module, val: Part, shape: Shape) -> Iterator[tuple[str, nn.Module]]:
        for evaluations in (2, 4, 8, 16):
            used = {**(self.used or {}), "f_max_iter": evaluations}
            yield f"{evaluations} evaluations", self._copy(model, shape, used)

    def _build(self, shape: Shape, other: dict[str, Any]) -> nn.Module:
        options = {**self.options.get(shape.scale, {}), **self.solve, **other}
        return timm.create_model(self.model, in_chans=shape.channels, num_classes=shape.classes, **options)

    def _copy(self, model: nn.Module, shape: Shape, other: dict[str, Any]) -> nn.Module:
        """The same weights, solved otherwise."""
        with torch.random.fork_rng(devices=[]):
            made = self._build(shape, other)
        made.load_state_dict(model.state_dict())
        return made.to(next(model.parameters()).device).eval()
