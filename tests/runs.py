"""Short runs for the tests of training, and a comparison that forgives nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from zoo.config import TrainConfig
from zoo.data import DataSplits, load_data

ROOT = Path(__file__).resolve().parents[1]
# Dropout, mixing, augmentation, a moving average, a schedule: all that holds state or draws numbers.
HARD = {
    **{
        "model": "resnet8_cifar",
        "model_kwargs": {"drop_rate": 0.2},
        "epochs": 2,
        "batch_size": 64,
        "device": "cpu",
    },
    **{"mixup": 0.2, "smoothing": 0.1, "hflip": 0.5, "model_ema": True, "model_ema_decay": 0.9},
    **{"clip_grad": 1.0, "checkpoint_interval": 3, "log_interval": 1, "warmup_epochs": 1},
}


def small(**changes) -> TrainConfig:
    plain = {"model": "cnn3", "epochs": 2, "batch_size": 64, "device": "cpu", "log_interval": 2}
    return TrainConfig(**{**plain, **changes})


def assert_equal(left, right, where="state"):
    """Bitwise equality of nested dicts, lists and tensors; the clock is left out."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            if key not in ("seconds", "output", "resume"):
                assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, where=f"{where}[{number}]")
    else:
        assert left == right, where


def some_digits() -> DataSplits:
    """A quarter of the digits."""
    data = load_data("digits")
    return DataSplits(data.spec, data.train.subset(torch.arange(320)), data.val, data.test)
