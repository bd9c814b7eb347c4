"""Edges of the zoo, the policies and the selection: what a stranger's run, folder or sample may be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import twnn_plugin  # noqa: F401  (registers our models with timm)
from tests.runs import small, some_digits
from twnn_plugin.errors import OptionError
from twnn_plugin.policies.base import SelectionPolicy
from twnn_plugin.policies.selection import Selection, SelectionView
from twnn_plugin.selection import Reward, policy_loss, selection_of
from zoo.cli import main
from zoo.config import SEED_MAX, TrainConfig
from zoo.data import load_data
from zoo.distributed import pick_device
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.evalrun import _inherit
from zoo.metrics import LossSums
from zoo.runlog import METRICS, RunLog, alone
from zoo.runstate import Progress, RunState, _make_optimizer, take_step
from zoo.tasks.recipe import recipe_for
from zoo.train import train

ROOT = Path(__file__).resolve().parents[1]


def said(*args: object) -> str:
    """The one line of a refusal."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


class Linear(SelectionPolicy):
    """A policy of somebody else's, whose scores are weighted figures of the view: its graph holds these."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))
        self.counted = nn.Embedding(8, 1)

    def select(self, view: SelectionView) -> Selection:
        count = len(view.layers)
        figures = torch.stack([view.spent, view.residual.sum(dim=1), view.repeats.float()], dim=1)
        scores = (self.weight * figures).sum(dim=1) + self.weight[0] * view.spent
        layers = self.counted(view.counts).squeeze(-1) + scores[:, None]
        probability = torch.cat([torch.zeros(view.rows, 1), layers], dim=1).softmax(dim=1)
        action = torch.ones(view.rows, dtype=torch.long)  # everyone goes on, again and again
        return Selection(
            Selection.of_actions(action, count),
            log_prob=probability.gather(1, action[:, None]).squeeze(1).log(),
        )


def test_a_policys_graph_may_hold_what_it_was_shown():
    torch.manual_seed(0)
    net: Any = timm.create_model("dynalay_cnn3", num_classes=3, widths=(4, 4, 4), policy=Linear()).train()
    logits = net(torch.randn(4, 3, 8, 8))
    record = net.selection.last
    policy_loss(record, logits, torch.arange(4) % 3, Reward()).backward()
    assert len(record.decisions) == 3
    assert float(net.selection.policy.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("measure", ["accuracy", "probability", "likelihood"])
def test_a_broken_sample_teaches_an_agent_nothing_but_its_worth(measure: str):
    torch.manual_seed(0)
    net: Any = timm.create_model("dynalay_cnn3", num_classes=3, widths=(4, 4, 4)).eval()
    selection = selection_of(net)
    assert selection is not None
    selection.training = True
    selection.policy.train()
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    images[0] = torch.nan
    settings = Reward(measure=measure)
    logits = net(images)
    assert selection.last is not None
    policy_loss(selection.last, logits, labels, settings).backward()
    assert all(bool(p.grad.isfinite().all()) for p in selection.policy.parameters() if p.grad is not None)
    worth = settings.quality(logits.detach(), labels)
    assert float(worth[0]) == (settings.floor if measure == "likelihood" else 0.0)
    assert bool((worth[1:] > worth[0]).any())


def test_padding_sends_nothing_through_a_mixer():
    torch.manual_seed(0)
    options: dict[str, Any] = {"task": "classification", "vocab_size": 20, "hidden": 8, "message": "mixer"}
    options |= {"policy": "always", "scale": 1.0, "tol": 1e-6, "max_iter": 100}
    net = timm.create_model("dynalay_lstm3", num_classes=3, **options).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "bias" in name:
                parameter.normal_()
        tokens = torch.randint(1, 20, (4, 6))
        longer = torch.cat([tokens, torch.zeros(4, 9, dtype=torch.long)], dim=1)
        torch.testing.assert_close(net(longer), net(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dynalay_lstm3", {"open_head": True}),
        ("dynalay_lstm3", {"message": "mixer"}),
        ("dynalay_gru3", {"scale": 0.5}),
        ("lstm3", {"max_choices": 2}),
        ("dynalay_cnn3", {"max_choices": 2}),
    ],
)
def test_options_of_a_selection_that_there_is_none_of(model: str, options: dict[str, Any]):
    with pytest.raises((ConfigError, OptionError), match=f"{next(iter(options))}: no layer can be iterated"):
        timm.create_model(model, num_classes=5, fpi_layers=(), **options)


@pytest.mark.parametrize("model", ["dynalay_cnn3", "dynalay_lstm3"])
def test_layers_that_are_no_names(model: str):
    with pytest.raises(OptionError, match=r"fpi_layers names layers.*got 3"):
        timm.create_model(model, num_classes=5, fpi_layers=3)


def _images(folder: Path, *classes: str, count: int = 4) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name / f"{number}.png")


@pytest.mark.parametrize(
    "classes", [("Train/x", "Train/y", "Test/x", "Test/y"), ("cats/new", "cats/old", "dogs/new")]
)
def test_folders_of_one_name_are_not_one_class(tmp_path: Path, classes: tuple[str, ...]):
    _images(tmp_path, *classes)
    with pytest.raises(DataError, match="they would be one class"):
        load_data(str(tmp_path))


def test_a_folder_called_testing_is_the_test_part(tmp_path: Path):
    for part, count in (("training", 6), ("validation", 2), ("testing", 3)):
        _images(tmp_path / part, "x", "y", count=count)
    data = load_data(str(tmp_path))
    assert [len(data.part(name)) for name in ("train", "val", "test")] == [12, 4, 6]


def test_classes_that_differ_in_case_or_zeros_have_the_same_numbers_in_every_process(tmp_path: Path):
    from zoo.data.sources import _numbered

    names = ["b", "a", "A", "2", "02", "10"]
    wanted = {"02": 0, "2": 1, "10": 2, "A": 3, "a": 4, "b": 5}
    assert _numbered(names) == _numbered(reversed(names)) == wanted
    _images(tmp_path, "a", "A", "b", count=5)
    data = load_data(str(tmp_path))
    files = data.train.read.reader.samples  # type: ignore[union-attr]
    of_class = {"A": 0, "a": 1, "b": 2}
    places = data.train.indices.tolist()  # type: ignore[union-attr]
    assert data.train.labels.tolist() == [of_class[Path(files[i][0]).parent.name] for i in places]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"seed": 2**32}, "seed.*from 0 to 4294967295"),
        ({"sched": "multistep", "decay_milestones": (10, 5)}, "decay.milestones.*each later"),
        ({"sched": "multistep", "decay_milestones": (-3,)}, "decay.milestones.*from 1 on"),
        ({"min_lr": 5.0}, "min.lr.*at most the learning rate, 0.001"),
        ({"min_lr": 1e-4, "policy_lr": 1e-5}, "min.lr.*at most the learning rate, 1e-05"),
    ],
)
def test_settings_that_lead_elsewhere(settings: dict[str, Any], found: str):
    with pytest.raises(ConfigError, match=found):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"epochs": "3"}, "epochs='3'.*a whole number"),
        ({"epochs": 2.5}, "epochs=2.5.*a whole number"),
        ({"lr": "0.1"}, "lr='0.1'.*a number"),
        ({"output": Path("run")}, "output=.*text or None"),
        ({"model_ema": "yes"}, "ema='yes'.*True or False"),
        ({"decay_milestones": [1, "x"]}, "milestones=.*whole numbers"),
    ],
)
def test_settings_of_another_type_are_said_from_python_too(settings: dict[str, Any], found: str):
    with pytest.raises(ConfigError, match=found):
        TrainConfig(**settings)


def test_the_largest_seed_trains():
    result = train(small(epochs=1, seed=SEED_MAX), data=some_digits())
    assert result.updates > 0
    with pytest.raises(ConfigError, match="seed"):
        recipe_for("ff_prefix", seed=SEED_MAX + 1)


@pytest.mark.parametrize("command", [("eval", "--model", "ff_prefix"), ("demo",)], ids=["eval", "demo"])
def test_a_seed_that_is_too_large_is_one_line(command: tuple[str, ...]):
    assert "--seed" in said(*command, "--seed", 10**20)


def test_an_option_of_the_model_leaves_the_others_as_they_were_trained():
    run = TrainConfig(model="twnn_resnet6_tiny", model_kwargs={"solver": "picard", "tol": 0.3, "max_iter": 1})
    options: dict[str, Any] = {"model": None, "dataset": None, "model_kwargs": {"max_iter": 5}}
    assert _inherit(options, run)["model_kwargs"] == {"solver": "picard", "tol": 0.3, "max_iter": 5}
    assert options["model_kwargs"] == {"max_iter": 5}  # the caller's own
    other = _inherit({**options, "model": "twnn_resnet8_tiny"}, run)
    assert other["model_kwargs"] == {"max_iter": 5}


class Full:
    """A file on a full disk."""

    def write(self, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flush = close = lambda self: self.write("")


def test_a_full_disk_ends_the_records_of_a_run_in_one_line(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"No space left.*--resume auto"), RunLog(tmp_path, {}) as log:
        log._file.close()
        log._file = Full()  # type: ignore[assignment]
        log.write({"step": 1, "loss": 0.5})
    log = RunLog(tmp_path, {})
    log._file.close()
    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="No space left"):
        log.__exit__(None, None, None)
    with pytest.raises(CheckpointError, match="Is a directory"):
        (tmp_path / METRICS).unlink()
        (tmp_path / METRICS).mkdir()
        RunLog(tmp_path, {})


HOLD = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
def test_two_runs_at_once_do_not_share_a_folder(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="Another run is writing"):
            train(small(epochs=1, output=str(tmp_path)), data=some_digits())
        assert "Another run" in said("train", "--model", "ff_prefix", "--output", tmp_path, "--updates", 1)
        other.communicate(b"")
    with alone(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_language_model_of_no_use_has_an_infinite_perplexity():
    from zoo.cli import _told
    from zoo.train import TrainResult

    result = TrainResult(nn.Identity(), None, {}, 0.0, 0, 1, 1.0, Path("run"))
    assert "perplexity inf" in _told(TrainConfig(model="lstm3", dataset="kjv-small"), result)


def test_a_device_without_values_is_refused():
    with pytest.raises(ConfigError, match="'meta' cannot be used here: its tensors have no values"):
        pick_device("meta")


def test_an_optimizer_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    def lacking(*_: Any, **__: Any) -> None:
        raise AssertionError("APEX and CUDA required for fused optimizers")

    monkeypatch.setattr("timm.optim.create_optimizer_v2", lacking)
    with pytest.raises(ConfigError, match="'adamw' cannot be made here: APEX and CUDA required"):
        _make_optimizer(TrainConfig(opt="adamw"), nn.Linear(2, 2), [])


def test_an_optimizer_that_needs_second_derivatives_gets_them():
    model = nn.Linear(3, 1)
    optimizer = _make_optimizer(TrainConfig(opt="adahessian"), model, [])
    state = RunState(model, None, optimizer, None, None, LossSums(torch.device("cpu")), Progress(), None)
    before = model.weight.detach().clone()
    take_step(state, model(torch.randn(4, 3)).square().mean(), None, "norm", [])
    assert not torch.equal(model.weight, before)
