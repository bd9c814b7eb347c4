"""Training of any timm model, ours included: killed at any moment, it resumes to the same bits.

What makes that true: batches are a function of (seed, epoch, step), a checkpoint holds every other
state including random numbers, it is written whole or not at all, and lines of ``metrics.jsonl``
that it does not know of are dropped. On a GPU it also needs deterministic kernels
(``TrainConfig.deterministic``).
"""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import BEST, LAST, restore_rng, rng_state, save_checkpoint
from .config import TrainConfig
from .construct import AnyBatches, AnyData, find_data, plain_batches
from .data.text import TextSplits
from .distributed import World, world
from .errors import CheckpointError, ConfigError, TrainingError
from .evaluate import autocast, measure
from .interrupt import Interruption
from .objective import Objective
from .prepare import (
    check_parts,
    kernels,
    make_mixup,
    prepare_model,
    resume_path,
    starting_point,
    train_batches,
)
from .progress import Bar
from .runlog import RunLog, alone, output_folder
from .runstate import RunState, make_run_state, take_step

__all__ = ["TrainConfig", "TrainResult", "resume_path", "train"]

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        model: with its final weights, in eval mode, on the device of the run.
        ema: the moving average of the model, or ``None``.
        metrics: the last epoch's record, as in ``metrics.jsonl``; empty if nothing was left to train.
        best_metric: best validation accuracy; of language models the best 1 / perplexity.
        best_epoch: the epoch that reached it, from 0.
        updates: optimizer updates in all.
        seconds: time spent training, over all interruptions.
        output: the run's folder, or ``None``.
    """

    model: nn.Module
    ema: nn.Module | None
    metrics: Record
    best_metric: float
    best_epoch: int
    updates: int
    seconds: float
    output: Path | None

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the best epoch, if the run wrote any."""
        return None if self.output is None else self.output / BEST


def train(
    config: TrainConfig,
    *,
    data: AnyData | None = None,
    model: nn.Module | None = None,
    callback: Callable[[Record], None] | None = None,
    console: Any = None,
) -> TrainResult:
    """Train ``config.model`` on ``config.dataset``.

    The global random state is seeded from ``config.seed``. Under ``torchrun`` every process calls
    this, and the first one writes.

    Args:
        config: the settings.
        data: a data set at hand, instead of the one that ``config`` names.
        model: a model at hand, instead of the one that ``config`` names; trained in place.
        callback: called with every record that goes to ``metrics.jsonl``, on the first process.
        console: a ``rich`` console for progress; silent without one, or if it is no terminal.

    Returns:
        The trained model and its figures. Choices (``best``) were made on validation data.

    Raises:
        ConfigError: a setting is impossible, or the folder cannot be written to.
        DataError: the data set is not there, damaged, or has nothing to train on or to validate with.
        CheckpointError: ``resume`` names a file that is missing, corrupt, or of another run.
        TrainingError: the weights or the loss are not finite any more.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    start, config = starting_point(config)
    with ExitStack() as stack:
        if config.output is not None:
            stack.enter_context(output_folder(Path(config.output)))
        data = data or find_data(config)
        check_parts(data)
        here = stack.enter_context(world(config.device))
        if config.output is not None and here.is_primary:
            stack.enter_context(alone(Path(config.output)))
        stack.enter_context(kernels(config.deterministic, here.device))
        interruption = stack.enter_context(Interruption())
        run = _Run(config, here, data, prepare_model(config, data, model, here), interruption)
        run.begin(start, stack, callback, console)
        return run.finish()


class _Run:
    """One run on one process: the loop over epochs and updates."""

    def __init__(
        self, config: TrainConfig, here: World, data: AnyData, model: nn.Module, interruption: Interruption
    ):
        self.config, self.here, self.interruption = config, here, interruption
        self.batches: AnyBatches = train_batches(config, data, here)
        self.language = isinstance(data, TextSplits) and data.spec.task == "language"
        rows = len(data.train)
        if rows < config.batch_size * here.size and (here.size > 1 or config.mixup or config.cutmix):
            raise ConfigError(
                f"One update needs {config.batch_size} x {here.size} rows, but {data.spec.name!r} "
                f"has {rows} to train on. Take a smaller --batch-size."
            )
        self.val = plain_batches(data, "val", config.batch_size, config.workers, here)
        self.mixup = make_mixup(config, data.spec.num_classes)
        self.state: RunState = make_run_state(config, model, here.device, len(self.batches))
        self.selecting = self.state.selecting
        self.output = Path(config.output) if config.output is not None else None
        self.log: RunLog | None = None
        self.metrics: Record = {}

    def begin(
        self,
        start: tuple[dict[str, Any], Path] | None,
        stack: ExitStack,
        callback: Callable[[Record], None] | None,
        console: Any,
    ) -> None:
        """Take over a checkpoint, wrap for several processes, open the log and the progress bar."""
        if start is not None:
            self._resume(*start)
        self.core = Objective(self.state.model, self.config.smoothing, self.config.closed_weight)
        objective: nn.Module = self.core
        if self.here.size > 1:
            ids = [self.here.device.index] if self.here.device.type == "cuda" else None
            # A wormhole gets gradients also where it opens for no row: nothing has to be looked for.
            objective = nn.parallel.DistributedDataParallel(objective, device_ids=ids)
        self.objective = objective
        self.parameters = [p for p in self.state.model.parameters() if p.requires_grad]
        self.callback = callback if self.here.is_primary else None
        if self.output is not None and self.here.is_primary:
            progress = self.state.progress
            self.log = stack.enter_context(
                RunLog(self.output, self.config.as_dict(), progress.lines, progress.updates)
            )
        total = self.config.epochs * len(self.batches)
        self.bar = stack.enter_context(Bar(console if self.here.is_primary else None, "training", total))

    def _resume(self, state: dict[str, Any], path: Path) -> None:
        if len(state["rng"]) != self.here.size:
            raise CheckpointError(
                f"{path} belongs to a run of {len(state['rng'])} process(es); this one has {self.here.size}. "
                "Start torchrun with the same number."
            )
        self.state.load(state, path, self.here.rank)
        try:
            restore_rng(state["rng"][self.here.rank], self.here.device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not hold the random state of a run: {error!r}.") from error

    def finish(self) -> TrainResult:
        """Train to the end."""
        state, progress = self.state, self.state.progress
        self.bar.advance(progress.updates)
        while progress.epoch < self.config.epochs:
            self._epoch()
        if self.selecting is not None:
            self.selecting.end()
        return TrainResult(
            state.model.eval(),
            None if state.ema is None else state.ema.module,
            self.metrics,
            progress.best_metric,
            progress.best_epoch,
            progress.updates,
            progress.seconds,
            self.output,
        )

    def _epoch(self) -> None:
        progress, every = self.state.progress, self.config.checkpoint_interval
        self.state.model.train()
        if self.selecting is not None:
            self.selecting.begin(progress.epoch, self.state.model)
            self.core.reward = self.selecting.reward if self.selecting.teaches(progress.epoch) else None
        self._clock = time.perf_counter()
        for images, labels in self.batches.epoch(progress.epoch, progress.step_in_epoch):
            images, labels = (x.to(self.here.device, non_blocking=True) for x in (images, labels))
            loss = self._update(images, labels)
            if self.config.log_interval and progress.updates % self.config.log_interval == 0:
                self._log({"kind": "update", "epoch": progress.epoch, "step": progress.updates, **loss()})
            self.bar.advance(1)
            if self.here.any(self.interruption.wanted):
                self._save(LAST)
                raise KeyboardInterrupt
            if every and progress.updates % every == 0:
                self._save(LAST)
        self._end_of_epoch()

    def _update(self, images: Tensor, labels: Tensor) -> Callable[[], Record]:
        """One update; returns what reads its loss, since reading makes the device wait."""
        state, config = self.state, self.config
        targets: Tensor = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        with autocast(self.here.device, config.amp, config.amp_dtype):
            loss, extra, logits = self.objective(images, targets)
        rate = state.optimizer.param_groups[0]["lr"]
        state.sums.update(loss, extra, *_rows(logits, labels))
        take_step(state, loss, config.clip_grad, config.clip_mode, self.parameters)
        progress = state.progress
        chosen = self.selecting and self.selecting.update(logits, labels, progress.epoch)
        progress.updates += 1
        progress.step_in_epoch += 1
        if state.ema is not None:
            state.ema.update(state.model, step=progress.updates)
        if state.scheduler is not None:
            state.scheduler.step_update(progress.updates)
        return lambda: {"lr": rate, "loss": loss.item(), **self._choices(chosen)}

    def _choices(self, sums: Tensor | None) -> Record:
        """What was chosen, from sums of one batch or of many; also said beside the progress bar."""
        if self.selecting is None or sums is None:
            return {}
        figures = self.selecting.sums.figures(sums)
        phase = self.selecting.phase(self.state.progress.epoch)
        self.bar.describe(
            f"epoch {self.state.progress.epoch + 1} ({phase}), reward {figures['reward']:.3f}, "
            f"nop {100 * figures['share_nop']:.0f} %, cost {figures['cost']:.2f}"
        )
        return dict(figures)

    def _end_of_epoch(self) -> None:
        """Validate, record, and save."""
        state, progress = self.state, self.state.progress
        self._check_finite()
        record: Record = {"kind": "epoch", "epoch": progress.epoch, "step": progress.updates}
        record["lr"] = state.optimizer.param_groups[0]["lr"]
        record |= state.sums.means(self.here.add_up(state.sums.sums))
        if self.selecting is not None:
            record["phase"] = self.selecting.phase(progress.epoch)
            chosen = self._choices(self.here.add_up(self.selecting.sums.sums))
            record |= {f"train_{name}": value for name, value in chosen.items()}
        record |= self._validate(state.model, "val")
        if state.ema is not None:
            record |= self._validate(state.ema.module, "val_ema")
        name = "val" if state.ema is None else "val_ema"
        metric = 1 / record[f"{name}_perplexity"] if self.language else record[f"{name}_accuracy"]
        self.metrics = record
        self._log(record, seconds=progress.seconds + time.perf_counter() - self._clock)
        counts = self.selecting is None or self.selecting.counts(progress.epoch)
        improved = counts and metric > progress.best_metric
        if improved:
            progress.best_metric, progress.best_epoch = metric, progress.epoch
        progress.epoch += 1
        progress.step_in_epoch = 0
        state.sums.sums.zero_()
        if self.selecting is not None:
            self.selecting.sums.sums.zero_()
        if state.scheduler is not None:
            state.scheduler.step(progress.epoch)
        # The best first: killed in between, the run repeats the epoch and writes the same best again.
        for name in (BEST, LAST) if improved else (LAST,):
            self._save(name)
        if self.here.any(self.interruption.wanted):
            raise KeyboardInterrupt

    def _validate(self, model: nn.Module, prefix: str) -> Record:
        if self.here.size > 1:
            from timm.utils import distribute_bn

            distribute_bn(model, self.here.size)  # the first process's statistics, which are the saved ones
        self.bar.describe(f"epoch {self.state.progress.epoch + 1}, validating")
        measured = measure(
            model,
            self.val,
            self.here.device,
            amp=self.config.amp,
            amp_dtype=self.config.amp_dtype,
            reward=self.selecting and self.selecting.reward,
        )
        measured.reduce(self.here.add_up)
        figures = measured.result()
        record: Record = {"accuracy": figures.accuracy, "nll": figures.nll, "ece": figures.ece}
        if figures.open_share is not None:
            record |= {"open_share": figures.open_share, "mean_steps": figures.mean_steps}
        if self.language:
            record["perplexity"] = figures.perplexity
        if measured.choices is not None and self.selecting is not None:
            record |= measured.choices.figures()
            if prefix == "val":
                warning = self.selecting.check(measured.choices, self.state.progress.epoch)
                record |= {} if warning is None else {"warning": warning}
        best = max(self.state.progress.best_metric, 0.0)
        shown = f"perplexity {1 / best:.1f}" if self.language and best else f"{100 * best:.1f} %"
        self.bar.describe(f"epoch {self.state.progress.epoch + 1}, best {shown}")
        return {f"{prefix}_{name}": value for name, value in record.items()}

    def _log(self, record: Record, **timings: float) -> None:
        if self.log is not None:
            self.log.write(record, **timings)
            self.state.progress.lines = self.log.lines
        if self.callback is not None:
            self.callback(record)

    def _check_finite(self) -> None:
        """Stop before broken weights replace the good ones of the last checkpoint."""
        progress = self.state.progress
        # With a scaler an overflow skips its update, so that a loss of inf does no harm.
        loss_ok = self.state.scaler is not None or bool(torch.isfinite(self.state.sums.sums).all())
        if self.here.any(not (loss_ok and self.state.finite())):
            raise TrainingError(
                f"The {'weights' if loss_ok else 'loss'} became NaN or infinite by update {progress.updates} "
                f"(epoch {progress.epoch}). Lower --lr {self.config.lr}, or clip gradients (--clip-grad). "
                "The last checkpoint is untouched."
            )

    def _save(self, name: str) -> None:
        """Write a checkpoint; every process takes part, since each has random numbers of its own."""
        now = time.perf_counter()
        self.state.progress.seconds += now - self._clock
        self._clock = now
        if self.output is None:
            return
        self._check_finite()
        rng = self.here.gather(rng_state(self.here.device))
        sums = self.here.gather(self.state.sums.sums.cpu())
        chosen = self.selecting and self.here.gather(self.selecting.sums.sums.cpu())
        if self.here.is_primary and self.log is not None:
            self.log.sync()
            state = {**self.state.state_dict(), "sums": sums, "rng": rng, "config": self.config.as_dict()}
            if chosen is not None:
                state["selection_sums"] = chosen
            save_checkpoint(state, self.output / name)
        self.here.barrier()


def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K) and labels (n,); each step of a language model is a row."""
    return (logits, labels) if labels.dim() == 1 else (logits.transpose(1, 2).flatten(0, 1), labels.flatten())
