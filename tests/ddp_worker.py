"""What each of two processes does for the tests of DistributedDataParallel.

``python -m tests.ddp_worker RANK DIR``. Every scenario is run twice: by one process on the whole batch,
before the processes know of each other, and by two on a half each. The gradients and what else was seen go
into ``DIR/RANK.pt``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import twnn_plugin as tw
from twnn_plugin.blocks.wormhole import Wormhole
from twnn_plugin.policies.base import SpanPolicy

from .streams import Cell

ROWS = 8
WORLD = 2
FIRST = (True,) * 4 + (False,) * 4  # rows of the first process only
TWINS = (True, False, True, False, True, True, False, False)  # the same rows in both halves
SOME = (True, False, True, True, False, True, False, False)


class Chosen(SpanPolicy):
    """Opens the rows that it was told."""

    def __init__(self, rows: tuple[bool, ...]):
        super().__init__()
        self.rows = torch.tensor(rows)
        self.part = slice(None)

    def forward(self, view: tw.PolicyView) -> Tensor:
        return self.rows[self.part]


class CpuSyncBatchNorm(nn.SyncBatchNorm):
    """``SyncBatchNorm``, whose own forward refuses the CPU in training: the same statistics, by gloo."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)
        from torch.distributed.nn.functional import all_reduce

        axes = (0, 2, 3)
        sums = torch.stack([input.sum(axes), input.square().sum(axes)])
        count = input.numel() / input.shape[1]
        if dist.is_initialized():
            Collectives.mine += 1
            sums, count = all_reduce(sums), count * dist.get_world_size()
        mean, square = sums / count
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        shape = (1, -1, 1, 1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return input * scale.view(shape) + (self.bias - mean * scale).view(shape)


class Collectives:
    """Counts: of the layers' own collectives, and of those that this package makes."""

    mine = 0
    theirs = 0


def convert(module: nn.Module) -> nn.Module:
    """``convert_sync_batchnorm`` with the class that runs here; the layers are replaced."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for layer in converted.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = CpuSyncBatchNorm
    return converted


def wrap(model: nn.Module, options: dict[str, Any] | None) -> nn.Module:
    """FSDP, or DistributedDataParallel, which refuses to begin where it sees ``SyncBatchNorm`` on the CPU."""
    if options is None:
        return fully_shard(model)
    layers = [m for m in model.modules() if isinstance(m, CpuSyncBatchNorm)]
    for layer in layers:
        layer.__class__ = nn.BatchNorm2d
    wrapped = DistributedDataParallel(model, find_unused_parameters=False, **options)
    for layer in layers:
        layer.__class__ = CpuSyncBatchNorm
    return wrapped


def whole(value: Tensor) -> Tensor:
    """A copy of a tensor, all of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def sharded_in_parts() -> str:
    """What a pass says whose span's modules are sharded one by one."""
    model = vit(**BENEFIT)
    for block in model.blocks:
        fully_shard(block)
    try:
        model(torch.randn(2, 3, 8, 8))
    except tw.AttachError as error:
        return str(error)
    return ""


# Models -------------------------------------------------------------------------------------------------


def vit(**options: Any) -> nn.Module:
    """A tiny ViT of timm: layer norms, so that nothing but the loss joins samples."""
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 4, "num_classes": 5}
    return timm.create_model("twnn_vit_tiny_patch16_224", **small, **options)


def resnet(**options: Any) -> nn.Module:
    return timm.create_model("twnn_resnet8_cifar", widths=(4, 8, 8), num_classes=5, **options)


def frozen_norms(model: nn.Module) -> nn.Module:
    """Batch normalisations that use their running statistics, as recipes for small batches do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(False)
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model


class Blocks(nn.Module):
    """Two wormhole blocks around cells whose rows contract at different rates."""

    def __init__(self, **settings: Any):
        super().__init__()
        example = torch.randn(2, 4, 6, 6)
        options = {"scale": 0.9, "tol": 1e-5, "max_iter": 40, **settings}
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = Wormhole(Cell(), example, **options)
        self.second = Wormhole([Cell(), nn.Conv2d(4, 4, 1)], example, **options)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean(dim=(2, 3)))


# Scenarios ------------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """A model, who is open in it, and how it is trained.

    Attributes:
        make: the model.
        open: rows of the whole batch that are open; None: as the gates say.
        twins: the second half of the batch is the first in another order.
        updates: passes, each with its own gradients.
        accumulate: pieces of the batch whose gradients add up, all but the last under ``no_sync``.
        options: of DistributedDataParallel; None: fully sharded as a whole (FSDP) in its place.
        sides: pixels a side.
    """

    make: Callable[[], nn.Module]
    open: tuple[bool, ...] | None = None
    twins: bool = False
    updates: int = 1
    accumulate: int = 1
    options: dict[str, Any] | None = field(default_factory=dict)
    side: int = 8


BENEFIT = {"gate": ("straight_through", {"learn": "benefit"})}
TWO = ["blocks.1->blocks.0", "blocks.3->blocks.2"]
SCENARIOS = {
    "open on one rank": Scenario(lambda: vit(**BENEFIT), FIRST),
    "open nowhere": Scenario(lambda: vit(**BENEFIT), (False,) * ROWS),
    "open everywhere": Scenario(lambda: vit(gate="sigmoid"), (True,) * ROWS),
    "several wormholes": Scenario(lambda: vit(wormholes=TWO, **BENEFIT), SOME),
    "wormhole blocks": Scenario(lambda: Blocks(gate="always"), side=6),
    "frozen batch norms": Scenario(
        lambda: frozen_norms(resnet(wormholes=["layer1->layer1", "layer3->layer2"], **BENEFIT)), SOME
    ),
    "budget": Scenario(lambda: vit(budget=0.5), TWINS, twins=True),
    "budget, gates": Scenario(lambda: vit(budget=0.5), None, twins=True, updates=4),
    "accumulation": Scenario(lambda: vit(**BENEFIT), SOME, accumulate=2),
    "static graph": Scenario(lambda: vit(**BENEFIT), SOME, updates=2, options={"static_graph": True}),
    "bucket views": Scenario(
        lambda: vit(**BENEFIT), SOME, updates=2, options={"gradient_as_bucket_view": True}
    ),
    "sharded": Scenario(lambda: vit(**BENEFIT), FIRST, options=None),
    "sharded, batch norms": Scenario(
        lambda: frozen_norms(resnet(wormholes="layer3->layer2", **BENEFIT)), SOME, options=None
    ),
    "sync before": Scenario(
        lambda: tw.attach(
            convert(timm.create_model("resnet8_cifar", widths=(4, 8, 8), num_classes=5)),
            "layer3->layer2",
            scale=0.5,
            tol=1e-5,
            **BENEFIT,
        ),
        FIRST,
        updates=2,
    ),
    "sync after": Scenario(
        lambda: convert(resnet(wormholes="layer3->layer2", scale=0.5, tol=1e-5, **BENEFIT)), FIRST, updates=2
    ),
    **{
        adjoint: Scenario(lambda adjoint=adjoint: Blocks(adjoint=adjoint, **BENEFIT), SOME, side=6)
        for adjoint in ("one_step", "phantom", "unrolled", "checkpointed", "ad_fixed_point")
    },
}


def data(scenario: Scenario) -> tuple[Tensor, Tensor]:
    """Images whose scale, and with it the number of steps, differs."""
    generator = torch.Generator().manual_seed(1)
    x = 0.3 + torch.randn(ROWS, 3, scenario.side, scenario.side, generator=generator).double()
    x = x * torch.linspace(0.2, 2.0, ROWS)[:, None, None, None]
    targets = torch.arange(ROWS) % 5
    if scenario.twins:
        order = torch.tensor([2, 0, 3, 1])
        x[4:], targets[4:] = x[:4][order], targets[:4][order]
    return x, targets


def train(scenario: Scenario, rank: int | None) -> dict[str, Any]:
    """Gradients of each update, as process ``rank`` of two, or alone (None)."""
    torch.manual_seed(0)
    model = scenario.make().double().train()  # so that rounding is far below what could go wrong
    chosen = [Chosen(scenario.open)] if scenario.open is not None else []
    for feedback in (m.feedback for m in model.modules() if hasattr(m, "feedback") and chosen):
        feedback.policy = chosen[0]
    thresholds: list[float] = []
    for module in model.modules():
        if isinstance(module, tw.gates.LearnedGate):
            module.register_forward_pre_hook(lambda m, a: thresholds.append(float(m.threshold)))
    wrapped: Any = model if rank is None else wrap(model, scenario.options)
    x, targets = data(scenario)
    Collectives.mine = Collectives.theirs = 0
    updates = []
    for _ in range(scenario.updates):
        wrapped.zero_grad(set_to_none=True)
        pieces = list(torch.arange(ROWS).view(scenario.accumulate, -1))
        for number, piece in enumerate(pieces):
            mine = piece if rank is None else piece.view(WORLD, -1)[rank]
            if chosen:
                chosen[0].part = mine
            last = number == len(pieces) - 1
            with nullcontext() if rank is None or last else wrapped.no_sync():
                loss = F.cross_entropy(wrapped(x[mine]), targets[mine]) / len(pieces)
                loss.backward()
        updates.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    return {
        "updates": updates,
        "missing": [name for name, p in model.named_parameters() if p.grad is None],
        "steps": [record.steps.tolist() for record in tw.report(model)],
        "open": [int(record.open.sum()) for record in tw.report(model)],
        "thresholds": thresholds,
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "collectives": (Collectives.mine, Collectives.theirs),
        "evaluations": sum(record.evaluations for record in tw.report(model)),
    }


def real_sync_batch_norm() -> str:
    """What torch's own layer says to a CPU."""
    try:
        nn.SyncBatchNorm(3)(torch.randn(2, 3, 4, 4))
    except ValueError as error:
        return str(error)
    return ""


def run_zoo() -> dict[str, Tensor]:
    """Weights of ``twnn train`` after an epoch, whatever the number of processes."""
    from zoo.config import TrainConfig
    from zoo.train import train as zoo_train

    from .runs import some_digits

    world = dist.get_world_size() if dist.is_initialized() else 1
    kwargs = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 4}
    kwargs |= {"policy": "always", "tol": 1e-5}
    config = TrainConfig(
        model="twnn_vit_tiny_patch16_224",
        model_kwargs=kwargs,
        epochs=1,
        batch_size=64 // world,
        opt="sgd",
        lr=0.05,
        device="cpu",
        log_interval=0,
    )
    result = zoo_train(config, data=some_digits())
    metrics = {k: torch.tensor(v) for k, v in result.metrics.items() if isinstance(v, float)}
    return {
        **copy.deepcopy(dict(result.model.state_dict())),
        **{f"metric {k}": v for k, v in metrics.items()},
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    single = {} if rank else {name: train(scenario, None) for name, scenario in SCENARIOS.items()}
    zoo_single = {} if rank else run_zoo()
    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        Collectives.theirs += sys._getframe(1).f_globals["__name__"] == "twnn_plugin.blocks.moments"
        return original(*args, **kwargs)

    dist.all_reduce = counted
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        both = {name: train(scenario, rank) for name, scenario in SCENARIOS.items()}
        refusal, in_parts = real_sync_batch_norm(), sharded_in_parts()
        zoo = run_zoo()
    finally:
        dist.destroy_process_group()
    torch.save(
        {
            **{"single": single, "both": both, "refusal": refusal, "in parts": in_parts},
            **{"zoo": zoo, "zoo single": zoo_single},
        },
        folder / f"{rank}.pt",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
