"""``twnn eval``: from options to figures."""

# timm re-exports its public names without __all__, which pyright takes for private.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import twnn_plugin as tw
from twnn_plugin.selection import Reward, selection_of
from twnn_plugin.selection.protocols import CostWeighted, Learner

from .build import fill_in
from .checkpoint import read_weights, settings_of
from .config import TrainConfig
from .construct import AnyBatches, construct, find_data, plain_batches
from .distributed import World, pick_device
from .errors import ConfigError
from .evaluate import evaluate, measure
from .progress import Bar
from .selecting import reward_from

__all__ = ["evaluate_from_options", "figure_rows", "sweep_rows"]

SOLVE_OPTIONS = ("solver", "adjoint", "tol", "max_iter", "stop", "norm")
_SWEPT = ("samples", "accuracy", "nll", "perplexity", "cost", "reward", "shares")
_INHERITED = (
    *("model", "model_kwargs", "dataset", "data_dir", "img_size"),
    *("policy", "policy_kwargs", "text_level", "text_length", "vocab_size"),
)
_SEED = TrainConfig().seed  # of weights that nobody trained, and of policies that choose at random
_DATA = ("dataset", "data_dir", "dataset_download", "img_size", "text_level", "text_length", "vocab_size")


def evaluate_from_options(options: Mapping[str, Any], console: Any = None) -> tuple[str, dict[str, Any]]:
    """Build or load a model, apply the solver settings, evaluate it.

    Args:
        options: the options of ``twnn eval`` by name.
        console: for progress.

    Returns:
        A title, which says where the weights are untrained, and the figures of
        :class:`~zoo.evaluate.EvalResult` with the settings beside them.

    Raises:
        ConfigError: neither a model nor a checkpoint, solver settings for a model without wormholes, a policy
            that it cannot take, or a sweep of costs for a policy that has none.
        CheckpointError, DataError: see there.
    """
    from timm.utils import random_seed

    weights, run, checkpoint = None, None, options["checkpoint"]
    if checkpoint is not None:
        weights, saved = read_weights(Path(checkpoint), options["use_ema"])
        run = None if saved is None else settings_of(saved, Path(checkpoint))
    chosen = _inherit(options, run)
    reward = None if run is None else reward_from(run)
    dataset = chosen["dataset"] or "digits"
    if chosen["model"] is None:
        raise ConfigError("Give --checkpoint, or --model to evaluate a model as it is built.")
    device = pick_device(options["device"])
    wanted = {"dataset": dataset, **{name: chosen[name] for name in _DATA if chosen.get(name)}}
    data = find_data(TrainConfig.from_dict(wanted))
    random_seed(_SEED)
    model = construct(
        chosen["model"],
        data,
        chosen["model_kwargs"],
        options["pretrained"],
        chosen.get("policy"),
        chosen.get("policy_kwargs"),
    )
    if checkpoint is not None and weights is not None:
        fill_in(model, weights, checkpoint)
    trained = checkpoint is not None or options["pretrained"]
    source = str(checkpoint or "published") if trained else f"untrained (drawn with seed {_SEED})"
    changed = _configure(model, options, replace=run is not None)
    batches = plain_batches(data, options["split"], options["batch_size"], options["workers"], World(device))
    weighted = _cost_weighted(model, chosen["model"]) if options["cost_weights"] else None
    turns = 1 if weighted is None else 1 + len(options["cost_weights"])
    with Bar(console, "evaluating", len(batches) * turns) as bar:
        result = evaluate(
            *(model, batches, device),
            amp=options["amp"],
            latency=options["latency"],
            advance=bar.advance,
            reward=reward,
        )
        about = {"model": chosen["model"], "weights": source, "dataset": dataset, "split": options["split"]}
        figures = {**about, "device": str(device), **changed, **result.as_dict()}
        if weighted is not None:
            figures["sweep"] = _sweep(model, weighted, batches, device, options, bar.advance, reward)
    note = "" if trained else ", untrained weights"
    return f"{chosen['model']} on {dataset} ({options['split']}){note}", figures


def _configure(model: nn.Module, options: Mapping[str, Any], replace: bool) -> dict[str, Any]:
    """Apply the solver settings and, after loading weights, another policy; what was changed."""
    changed: dict[str, Any] = {name: options[name] for name in SOLVE_OPTIONS if options[name] is not None}
    given = dict(changed)
    if options["policy"] is not None and replace:
        policy = tw.policy(options["policy"], **options["policy_kwargs"])
        if isinstance(policy, Learner):
            raise ConfigError(
                f"Policy {options['policy']!r} learns, and here it would be put in untrained. Leave --policy "
                "out to evaluate the one that was trained, or name one that does not learn, such as always "
                "or random."
            )
        given["policy"] = policy
        changed["policy"] = options["policy"]
    selection = selection_of(model)
    if selection is not None:
        selection.configure(**given)
    elif given:
        tw.configure(model, **given)
    return changed


def _cost_weighted(model: nn.Module, name: str) -> CostWeighted:
    """The model's policy, if the cost can be changed after training."""
    selection = selection_of(model)
    if selection is None:
        raise ConfigError(
            f"--cost-weights sweeps what iterating costs an agent, and {name} has no layers that a policy "
            "picks. Take a checkpoint of a dynalay_ model."
        )
    if not isinstance(selection.policy, CostWeighted):
        kind = type(selection.policy).__name__
        raise ConfigError(
            f"--cost-weights needs a policy with a cost weight, such as dynalay; {kind} has none, so that it "
            "would choose alike at every weight. Its own options decide how much it iterates "
            "(--policy-kwargs)."
        )
    return selection.policy


def _sweep(
    model: nn.Module,
    policy: CostWeighted,
    batches: AnyBatches,
    device: torch.device,
    options: Mapping[str, Any],
    advance: Callable[[], None],
    reward: Reward | None,
) -> list[dict[str, Any]]:
    """Figures at each cost weight; the model stays as it is, and the policy's own cost weight is put back."""
    before, rows = policy.cost_weight, []
    try:
        for weight in options["cost_weights"]:
            policy.cost_weight = weight
            measured = measure(model, batches, device, amp=options["amp"], advance=advance, reward=reward)
            figures = measured.result().as_dict()
            rows.append({"cost_weight": weight, **{name: figures[name] for name in _SWEPT}})
    finally:
        policy.cost_weight = before
    return rows


def sweep_rows(figures: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table of the sweep; both empty if there was none."""
    rows = figures.get("sweep") or []
    if not rows:
        return (), []
    choices = list(rows[0]["shares"])
    language = rows[0]["perplexity"] is not None
    head = ("cost weight", "accuracy", "perplexity" if language else "nll", "multiply-adds", *choices)
    table = [
        (
            f"{row['cost_weight']:g}",
            f"{row['accuracy']:.2%}",
            f"{row['perplexity']:.2f}" if language else f"{row['nll']:.4f}",
            f"{1 + row['cost']:.3f}x",
            *(f"{row['shares'][name]:.1%}" for name in choices),
        )
        for row in rows
    ]
    return head, table


def _inherit(options: Mapping[str, Any], config: TrainConfig | None) -> dict[str, Any]:
    """Settings that were not given, and options of its model, from the run that the checkpoint is of."""
    chosen = dict(options)
    if config is None:
        return chosen
    # The options of another model, or the folder of another data set, would make no sense.
    other_model = options["model"] not in (None, config.model)
    other_data = options["dataset"] not in (None, config.dataset)
    skipped = {"model_kwargs"} if other_model else set()
    skipped |= {"data_dir", "img_size"} if other_data else set()
    if other_data:
        skipped |= {"text_level", "text_length", "vocab_size"}
    for name in _INHERITED:
        # Another policy takes the place of the one that was trained once the weights are loaded.
        mine = name in ("policy", "policy_kwargs") and not other_model
        if (mine or not chosen.get(name)) and name not in skipped:
            chosen[name] = getattr(config, name)
    if not other_model:  # one option of the model more does not undo those that it was trained with
        chosen["model_kwargs"] = {**config.model_kwargs, **(options["model_kwargs"] or {})}
    return chosen


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as a table's rows; ``n/a`` where a model has none, no row where nothing was measured."""
    shown = (
        ("images", "samples", "{:,}"),
        ("accuracy", "accuracy", "{:.2%}"),
        ("perplexity", "perplexity", "{:.2f}"),
        ("negative log-likelihood", "nll", "{:.4f} nats"),
        ("expected calibration error", "ece", "{:.4f}"),
        ("open-gate share", "open_share", "{:.2%}"),
        ("mean steps where open", "mean_steps", "{:.2f}"),
        ("converged where open", "converged_share", "{:.2%}"),
        ("rows evaluated in solves", "rows_evaluated", "{:,}"),
        ("multiply-adds in solves", "multiply_adds", "{:,}"),
        ("multiply-adds after the open-loop pass, of the network's", "cost", "{:.2%}"),
        ("reward", "reward", "{:.4f}"),
        (f"latency, batch of {figures['batch_size']}", "latency_ms", "{:.2f} ms"),
        ("latency, one image", "latency_ms_single", "{:.2f} ms"),
    )
    special = ("perplexity", "cost", "reward", "latency_ms", "latency_ms_single")
    rows = [
        (label, "n/a" if figures[name] is None else form.format(figures[name]))
        for label, name, form in shown
        if figures[name] is not None or name not in special
    ]
    if figures["perplexity"] is not None:
        rows[0] = ("tokens", rows[0][1])
    shares = figures["shares"] or {}
    if "weights" in figures:
        rows.insert(0, ("weights", figures["weights"]))
    rows += [(f"share of {name} among choices", f"{share:.2%}") for name, share in shares.items()]
    return rows
