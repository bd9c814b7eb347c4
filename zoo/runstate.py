"""Everything that changes while a run trains, and its way into a checkpoint and back."""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twnn_plugin.errors import nearest

from .build import fill_in
from .config import TrainConfig
from .errors import CheckpointError, ConfigError
from .metrics import LossSums
from .selecting import Selecting, make_selecting

__all__ = ["Progress", "RunState", "make_run_state", "take_step"]


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: the epoch that is running, from 0.
        step_in_epoch: updates of it that are done.
        updates: updates in all.
        best_metric: best validation accuracy so far (of language models 1 / perplexity), -1 before the first.
        best_epoch: its epoch, -1 before the first.
        seconds: time spent training, over all interruptions.
        lines: lines of ``metrics.jsonl`` that belong to this state.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    updates: int = 0
    best_metric: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0
    lines: int = 0


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds, except random numbers."""

    model: nn.Module
    ema: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    sums: LossSums
    progress: Progress
    selecting: Selecting | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors only, so that ``torch.load(weights_only=True)`` reads them."""
        return {
            **vars(self.progress),
            "state_dict": self.model.state_dict(),
            "state_dict_ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            **({} if self.selecting is None else {"selecting": self.selecting.state_dict()}),
        }

    def load(self, state: Mapping[str, Any], path: Path, rank: int = 0) -> None:
        """Take over a checkpoint's state as process ``rank``; ``path`` is named in errors."""
        fill_in(self.model, state["state_dict"], path)
        try:
            if self.ema is not None:
                self.ema.module.load_state_dict(state["state_dict_ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler is not None and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.sums.sums.copy_(state["sums"][rank])
            if self.selecting is not None:
                self.selecting.load_state_dict(state["selecting"])
                self.selecting.sums.sums.copy_(state["selection_sums"][rank])
            self.progress = _progress(state, self.progress)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not hold the state of this run: {error!r}.") from error

    def finite(self) -> bool:
        """Whether every weight is a finite number."""
        norms = [p.detach().float().abs().amax() for p in self.model.parameters() if p.numel()]
        return bool(torch.isfinite(torch.stack(norms)).all())


def _progress(state: Mapping[str, Any], like: Progress) -> Progress:
    for name in ("epoch", "step_in_epoch", "updates", "lines"):
        if type(state[name]) is not int or state[name] < 0:
            raise ValueError(f"{name} is {state[name]!r}")
    return Progress(**{name: state[name] for name in vars(like)})


def make_run_state(config: TrainConfig, model: nn.Module, device: torch.device, steps: int) -> RunState:
    """Optimizer, schedule, moving average and scaler for ``model``, all from timm.

    Args:
        config: their settings.
        model: already on ``device``.
        device: where training happens.
        steps: updates an epoch.
    """
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    selecting = make_selecting(config, model, device)
    optimizer = _make_optimizer(config, model, [] if selecting is None else selecting.agent)
    if selecting is not None:
        selecting.guard(optimizer)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_milestones=list(config.decay_milestones),
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        step_on_epochs=not config.sched_on_updates,
        updates_per_epoch=steps,
    )
    ema = None
    if config.model_ema:
        ema = ModelEmaV3(model, config.model_ema_decay, use_warmup=config.model_ema_warmup)
    needs_scaler = config.amp and device.type == "cuda" and config.amp_dtype == "float16"
    scaler = NativeScaler(device=device.type) if needs_scaler else None
    return RunState(model, ema, optimizer, scheduler, scaler, LossSums(device), Progress(), selecting)


def _make_optimizer(
    config: TrainConfig, model: nn.Module, agent: list[nn.Parameter]
) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers

    try:
        chosen = get_optimizer_class(config.opt, bind_defaults=False)
    except ValueError:
        known = [str(name) for name in list_optimizers()]
        raise ConfigError(
            f"Unknown optimizer {config.opt!r}.{nearest(config.opt, known)} See timm.optim.list_optimizers()."
        ) from None
    options: dict[str, Any] = {} if config.opt_eps is None else {"eps": config.opt_eps}
    if options and "eps" not in inspect.signature(chosen).parameters:
        raise ConfigError(
            f"The optimizer {config.opt!r} has no epsilon; leave --opt-eps={config.opt_eps} out."
        )
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            param_group_fn=_groups_with(agent, config) if agent else None,
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"The optimizer {config.opt!r} refuses these settings: {error}.") from None
    except (AssertionError, ImportError) as error:  # of a package that timm's name stands for
        reason = str(error) or "what it is made of is not installed"
        raise ConfigError(f"The optimizer {config.opt!r} cannot be made here: {reason}.") from None


def _groups_with(agent: list[nn.Parameter], config: TrainConfig) -> Callable[[nn.Module], list[Any]]:
    """timm's groups, and one for an agent, which has a learning rate of its own and no weight decay.

    The schedule moves each group from its own rate.
    """
    from timm.optim import param_groups_weight_decay

    mine = {id(parameter) for parameter in agent}

    def groups(model: nn.Module) -> list[Any]:
        spared: Any = getattr(model, "no_weight_decay", set)()  # a method of some timm models
        made: list[dict[str, Any]] = param_groups_weight_decay(
            model, config.weight_decay, no_weight_decay_list=spared
        )
        kept = [{**g, "params": [p for p in g["params"] if id(p) not in mine]} for g in made]
        rate = config.lr if config.policy_lr is None else config.policy_lr
        own = {"params": [p for p in agent if p.requires_grad], "weight_decay": 0.0, "lr": rate}
        return [*(g for g in kept if g["params"]), own]

    return groups


def take_step(
    state: RunState, loss: Tensor, clip_grad: float | None, clip_mode: str, parameters: list[nn.Parameter]
) -> None:
    """Backward, clip and update; gradients are cleared afterwards."""
    from timm.utils import dispatch_clip_grad

    if state.scaler is not None:
        state.scaler(
            loss,
            state.optimizer,
            clip_grad=clip_grad,
            clip_mode=clip_mode,
            parameters=parameters,
            create_graph=getattr(state.optimizer, "is_second_order", False),
        )
    else:
        loss.backward(create_graph=getattr(state.optimizer, "is_second_order", False))
        if clip_grad is not None:
            dispatch_clip_grad(parameters, clip_grad, mode=clip_mode)
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
