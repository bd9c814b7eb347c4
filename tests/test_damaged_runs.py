"""Checkpoints whose parts are damaged, or of another version: one line that says so, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from zoo.checkpoint import LAST
from zoo.cli import main
from zoo.errors import CheckpointError
from zoo.tasks import recipe_for, train_task
from zoo.train import train

from .runs import small, some_digits


@pytest.fixture(scope="module")
def digits():
    return some_digits()


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    config = small(output=str(tmp_path_factory.mktemp("run") / "run"), epochs=1)
    train(config, data=digits)
    return config, torch.load(f"{config.output}/{LAST}", weights_only=True)


@pytest.mark.parametrize(
    "damage",
    [{"rng": [{}]}, {"rng": [""]}, {"sums": []}, {"epoch": -1}, {"epoch": "x"}, {"updates": 1.5}],
    ids=str,
)
def test_a_part_of_a_run_is_damaged(run, digits, damage, tmp_path):
    config, state = run
    torch.save({**state, **damage}, tmp_path / LAST)
    changed = type(config)(**{**config.as_dict(), "output": str(tmp_path), "resume": "auto"})
    with pytest.raises(CheckpointError, match=LAST):
        train(changed, data=digits)


@pytest.fixture(scope="module")
def interrupted():
    kept = []
    train_task(recipe_for("twnn_prefix", updates=4, batch_size=8, size=16), save=kept.append, save_every=2)
    return kept[0]


DAMAGE = {
    "a setting of another version": lambda s: {"recipe": {**s["recipe"], "bogus": 1}},
    "a setting of another type": lambda s: {"recipe": {**s["recipe"], "updates": "many"}},
    "no optimizer": lambda s: {"optimizer": {}},
    "no random state": lambda s: {"rng": {}},
    "another generator": lambda s: {"random": "{}"},
    "other weights": lambda s: {"state_dict": {k: v.flatten() for k, v in s["state_dict"].items()}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_part_of_a_training_of_a_task_is_damaged(interrupted, damage, tmp_path):
    from zoo.checkpoint import save_checkpoint

    save_checkpoint({**interrupted, "data": "", **DAMAGE[damage](interrupted)}, tmp_path / LAST)
    before = (tmp_path / LAST).read_bytes()
    words = ["train", "--model", "twnn_prefix", "--bits", "16", "--output", str(tmp_path), "--resume", "auto"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and str(tmp_path) in result.output, result.output
    assert isinstance(result.exception, SystemExit)
    assert (tmp_path / LAST).read_bytes() == before
