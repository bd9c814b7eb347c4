"""Checkpoints: whole or absent, checked, and never overwritten by mistake."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo.checkpoint
from zoo.checkpoint import LAST, load_checkpoint, read_weights, restore_rng, rng_state, save_checkpoint
from zoo.errors import CheckpointError, ConfigError
from zoo.train import train

from .runs import small, some_digits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return some_digits()


@pytest.fixture
def finished(tmp_path, digits):
    config = small(output=str(tmp_path / "run"), epochs=1)
    train(config, data=digits)
    return config


@pytest.mark.parametrize(
    "changes",
    [{"model": "resnet8_cifar"}, {"dataset": "mnist"}, {"batch_size": 32}, {"seed": 7}],
    ids=lambda changes: next(iter(changes)),
)
def test_resuming_with_other_settings_is_refused(finished, digits, changes):
    name, value = next(iter(changes.items()))
    option = "--" + name.replace("_", "-")
    with pytest.raises(CheckpointError, match=f"{option} was .* and is now {value!r}"):
        train(replace(finished, resume="auto", **changes), data=digits)


def test_settings_that_do_not_matter_may_change(finished, digits):
    train(replace(finished, resume="auto", workers=1, checkpoint_interval=9), data=digits)


def test_a_run_is_not_overwritten(finished, digits):
    before = (Path(finished.output) / LAST).read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(finished, data=digits)
    with pytest.raises(ConfigError, match="its own folder"):
        train(replace(finished, resume=str(Path(finished.output) / LAST), output="elsewhere"), data=digits)
    assert (Path(finished.output) / LAST).read_bytes() == before


def damage_half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def damage_middle(raw: bytes) -> bytes:
    middle = len(raw) // 2
    return raw[:middle] + bytes(64) + raw[middle + 64 :]


@pytest.mark.parametrize(
    "damage", [damage_half, damage_middle, lambda raw: b"", lambda raw: b"no checkpoint"]
)
def test_a_corrupt_checkpoint_is_named_and_kept(finished, digits, damage):
    folder = Path(finished.output)
    (folder / LAST).write_bytes(damage((folder / LAST).read_bytes()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=LAST):
        train(replace(finished, resume="auto"), data=digits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"format": 1, "trap": Trap()}, tmp_path / "evil.pth.tar")
    with pytest.raises(CheckpointError, match="weights only"):
        load_checkpoint(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "sprung").exists()


def test_bare_weights_cannot_be_resumed_but_can_be_started_from(tmp_path, digits, finished):
    weights, _ = read_weights(Path(finished.output) / LAST)
    torch.save(weights, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="--initial-checkpoint"):
        train(small(resume=str(tmp_path / "bare.pth")), data=digits)
    frozen = small(
        epochs=1, lr=1e-30, warmup_lr=0.0, initial_checkpoint=str(tmp_path / "bare.pth"), weight_decay=0.0
    )
    result = train(frozen, data=digits)
    for name, value in result.model.named_parameters():
        assert torch.equal(value, weights[name])
    with pytest.raises(CheckpointError, match="do not fit"):
        train(replace(frozen, model="resnet8_cifar"), data=digits)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / LAST
    save_checkpoint({"value": 1}, path)

    def full(state, file):
        file.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zoo.checkpoint.torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint({"value": 2}, path)
    assert torch.load(path)["value"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_random_state_comes_back(tmp_path):
    import random

    def draw():
        return [torch.rand(3).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)]

    np.random.randn()  # NumPy keeps every second normal number for later
    random.gauss(0, 1)
    torch.save(rng_state(CPU), tmp_path / "rng")
    expected = draw()
    draw()
    restore_rng(torch.load(tmp_path / "rng", weights_only=True), CPU)
    assert draw() == expected
