"""Training: what it learns, what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from zoo.checkpoint import BEST, LAST, load_checkpoint, read_weights
from zoo.config import TrainConfig
from zoo.data import load_data
from zoo.errors import ConfigError, TrainingError
from zoo.train import train

from .runs import assert_equal, small, some_digits


@pytest.fixture(scope="module")
def digits():
    return some_digits()


def test_a_run_writes_its_files(tmp_path, digits):
    records = []
    config = small(output=str(tmp_path / "run"))
    result = train(config, data=digits, callback=records.append)
    output = tmp_path / "run"
    assert TrainConfig.from_dict(json.loads((output / "args.json").read_text())) == config
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert lines == records
    assert [line["step"] for line in lines if line["kind"] == "update"] == [2, 4, 6, 8, 10]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1]
    assert result.best_metric == max(line["val_accuracy"] for line in epochs)
    assert list(output.glob("events.out.tfevents.*"))
    assert not list(output.glob(".*.tmp"))
    assert_equal(dict(read_weights(output / LAST)[0]), dict(result.model.state_dict()))
    assert result.best_checkpoint == output / BEST
    assert load_checkpoint(output / BEST)["best_epoch"] == result.best_epoch


def test_training_learns(digits):
    whole = load_data("digits")
    result = train(small(model="resnet8_cifar", epochs=6, lr=3e-3), data=whole)
    assert result.best_metric > 0.8  # chance is 0.1
    assert result.output is None


def test_the_same_seed_gives_the_same_weights(digits):
    first, second, other = (train(small(epochs=1, seed=seed), data=digits) for seed in (1, 1, 2))
    assert_equal(dict(first.model.state_dict()), dict(second.model.state_dict()))
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))


def test_best_is_chosen_by_the_moving_average_if_there_is_one(tmp_path, digits):
    config = small(model_ema=True, model_ema_decay=0.5, output=str(tmp_path / "run"))
    result = train(config, data=digits)
    assert result.ema is not None
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.best_metric == max(e["val_ema_accuracy"] for e in epochs if e["kind"] == "epoch")
    assert_equal(dict(read_weights(tmp_path / "run" / LAST)[0]), dict(result.ema.state_dict()))
    assert_equal(
        dict(read_weights(tmp_path / "run" / LAST, use_ema=False)[0]), dict(result.model.state_dict())
    )


class Priced(nn.Module):
    """A linear model that asks for an auxiliary loss of 3 |b|^2."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)
        nn.init.constant_(self.head.bias, 1.0)

    def forward(self, images):
        return self.head(images.flatten(1))

    def auxiliary_loss(self):
        return 3 * self.head.bias.square().sum()


def test_a_models_auxiliary_loss_is_added(digits):
    config = small(
        epochs=1, batch_size=320, opt="momentum", momentum=0.0, weight_decay=0.0, sched="none", lr=0.01
    )
    records = []
    model = Priced()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(replace(config, log_interval=1), data=digits, model=model, callback=records.append)
    assert records[-1]["train_auxiliary_loss"] == pytest.approx(30)
    assert records[0]["loss"] == pytest.approx(records[-1]["train_loss"])
    assert records[0]["loss"] > 30
    # the bias moved by -lr (6 b + the gradient of the cross-entropy, which sums to zero over classes)
    moved = model.head.bias - start["head.bias"]
    assert moved.sum().item() == pytest.approx(-0.01 * 60, rel=1e-5)


@pytest.mark.parametrize("changes", [{"amp": True}, {"sched": "step", "decay_epochs": 1}, {"aa": "rand-m3"}])
def test_options_take_part(digits, changes):
    plain = train(small(epochs=2), data=digits)
    changed = train(small(epochs=2, **changes), data=digits)
    assert not torch.equal(next(plain.model.parameters()), next(changed.model.parameters()))
    assert np.isfinite(changed.metrics["train_loss"])


def test_broken_weights_do_not_replace_good_ones(tmp_path, digits):
    config = small(
        output=str(tmp_path / "run"), epochs=1, lr=1e30, sched="none", opt="sgd", checkpoint_interval=1
    )
    with pytest.raises(TrainingError, match="Lower --lr"):
        train(config, data=digits)
    if (tmp_path / "run" / LAST).exists():
        weights, _ = read_weights(tmp_path / "run" / LAST)
        assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0.*at least 1"),
        ({"lr": -1.0}, "lr=-1.0.*positive"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"sched": "cosin"}, "one of cosine"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"mixup": 0.2, "batch_size": 33}, "even"),
        ({"warmup_epochs": 5}, "take fewer"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnt18"}, "Did you mean 'resnet18'"),
        ({"model_kwargs": {"no_such_option": 1}}, "no_such_option"),
        ({"opt": "sgd", "momentum": 0.0}, "refuses these settings: Nesterov"),
        ({"opt": "adamm"}, "Unknown optimizer 'adamm'.*Did you mean"),
        ({"device": "nowhere"}, "device 'nowhere'"),
        ({"model": "vit_tiny_patch16_224"}, r"\(1, 8, 8\)"),
        ({"resume": "auto"}, "folder of --output"),
    ],
)
def test_impossible_runs(digits, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(small(**changes), data=digits)
