"""``twnn eval``: from options to figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import twnn_plugin as tw

from .build import build_model, fill_in
from .checkpoint import read_weights
from .config import TrainConfig
from .data import Batches, load_data
from .distributed import pick_device
from .errors import ConfigError
from .evaluate import evaluate
from .progress import Bar

__all__ = ["evaluate_from_options", "figure_rows"]

SOLVE_OPTIONS = ("solver", "adjoint", "tol", "max_iter", "stop", "norm")
_INHERITED = ("model", "model_kwargs", "dataset", "data_dir", "img_size")


def evaluate_from_options(options: Mapping[str, Any], console: Any = None) -> tuple[str, dict[str, Any]]:
    """Build or load a model, apply the solver settings, evaluate it.

    Args:
        options: the options of ``twnn eval`` by name.
        console: for progress.

    Returns:
        A title, and the figures of :class:`~zoo.evaluate.EvalResult` with the settings beside them.

    Raises:
        ConfigError: neither a model nor a checkpoint, or solver settings for a model without wormholes.
        CheckpointError, DataError: see there.
    """
    weights, chosen, checkpoint = None, dict(options), options["checkpoint"]
    if checkpoint is not None:
        weights, saved = read_weights(Path(checkpoint), options["use_ema"])
        chosen = _inherit(options, saved)
    if chosen["model"] is None:
        raise ConfigError("Give --checkpoint, or --model to evaluate a model as it is built.")
    dataset = chosen["dataset"] or "digits"
    device = pick_device(options["device"])
    data = load_data(dataset, chosen["data_dir"], options["dataset_download"], chosen["img_size"])
    model = build_model(chosen["model"], data.spec, chosen["model_kwargs"], options["pretrained"])
    if checkpoint is not None and weights is not None:
        fill_in(model, weights, checkpoint)
    solve = {name: options[name] for name in SOLVE_OPTIONS if options[name] is not None}
    if solve:
        tw.configure(model, **solve)
    part = data.part(options["split"])
    batches = Batches(part, data.spec, options["batch_size"], workers=options["workers"])
    with Bar(console, "evaluating", len(batches)) as bar:
        result = evaluate(
            model, batches, device, amp=options["amp"], latency=options["latency"], advance=bar.advance
        )
    about = {"model": chosen["model"], "dataset": dataset, "split": options["split"], "device": str(device)}
    return f"{chosen['model']} on {dataset} ({options['split']})", {**about, **solve, **result.as_dict()}


def _inherit(options: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings that were not given, from the run that the checkpoint belongs to."""
    chosen = dict(options)
    if saved is None:
        return chosen
    config = TrainConfig.from_dict(saved)
    # The options of another model, or the folder of another data set, would make no sense.
    other_model = options["model"] not in (None, config.model)
    other_data = options["dataset"] not in (None, config.dataset)
    skipped = {"model_kwargs"} if other_model else set()
    skipped |= {"data_dir", "img_size"} if other_data else set()
    for name in _INHERITED:
        if not chosen[name] and name not in skipped:
            chosen[name] = getattr(config, name)
    return chosen


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as a table's rows; ``n/a`` where a model has none."""
    shown = (
        ("images", "samples", "{:,}"),
        ("accuracy", "accuracy", "{:.2%}"),
        ("negative log-likelihood", "nll", "{:.4f} nats"),
        ("expected calibration error", "ece", "{:.4f}"),
        ("open-gate share", "open_share", "{:.2%}"),
        ("mean steps where open", "mean_steps", "{:.2f}"),
        ("converged where open", "converged_share", "{:.2%}"),
        ("rows evaluated in solves", "rows_evaluated", "{:,}"),
        ("multiply-adds in solves", "multiply_adds", "{:,}"),
        (f"latency, batch of {figures['batch_size']}", "latency_ms", "{:.2f} ms"),
        ("latency, one image", "latency_ms_single", "{:.2f} ms"),
    )
    return [
        (label, "n/a" if figures[name] is None else form.format(figures[name])) for label, name, form in shown
    ]
