"""What ``twnn`` refuses: one line that names what was typed, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

import twnn_plugin  # noqa: F401  (registers our models with timm)
from tests.runs import small, some_digits
from zoo.checkpoint import LAST, load_checkpoint, settings_of
from zoo.cli import main
from zoo.config import TrainConfig
from zoo.errors import CheckpointError, ConfigError
from zoo.listing import rows
from zoo.runlog import prepare_folder
from zoo.train import train

ROOT = Path(__file__).resolve().parents[1]
NO_FILES = Path("/proc")  # where nobody can make a file, not even root


def twnn(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def said(result) -> str:
    """The one line of a refusal."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    train(small(output=str(output), epochs=1), data=some_digits())
    return torch.load(output / LAST, weights_only=True)


@pytest.mark.skipif(not NO_FILES.is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("args", "option"),
    [
        (("train", "--device", "cpu", "--output", NO_FILES), "--output"),
        (("demo", "--quick", "--out", NO_FILES), "--out"),
    ],
    ids=["train", "demo"],
)
def test_a_folder_that_takes_no_files_is_said_before_any_work(monkeypatch, args, option):
    def work(*args, **options):
        raise AssertionError("no work before the folder is known to be good")

    monkeypatch.setattr("zoo.train.find_data", work)
    monkeypatch.setattr("zoo.demo.main.load_data", work)
    assert f"Cannot write to the folder {NO_FILES}: " in said(twnn(*args))
    assert f"Choose another {option}." in said(twnn(*args))


def test_the_probe_leaves_nothing(tmp_path, monkeypatch):
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []

    def full(handle, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.runlog.os.write", full)
    with pytest.raises(ConfigError, match=r"c: No space left on device. Choose another --output"):
        prepare_folder(tmp_path / "b" / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_made_halfway_is_removed(tmp_path):
    with pytest.raises(ConfigError, match="File name too long"):
        prepare_folder(tmp_path / "a" / "b" / ("c" * 300))
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_probes_its_folder_too(tmp_path, monkeypatch):
    digits = some_digits()
    config = small(output=str(tmp_path / "run"), epochs=1)
    train(config, data=digits)

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zoo.runlog.tempfile.mkstemp", refuse)
    with pytest.raises(ConfigError, match="run: Permission denied"):
        train(small(resume=str(tmp_path / "run"), epochs=1), data=digits)


@pytest.mark.parametrize(
    "args",
    [
        ("--device", "nowhere"),
        ("--device", "cpu", "--model", "resnt18"),
        ("--device", "cpu", "--dataset", "mnist", "--data-dir", "{tmp}/none"),
        ("--device", "cpu", "--aa", "foo"),
    ],
    ids=lambda args: args[-2][2:],
)
def test_a_refused_run_leaves_no_folder(tmp_path, args):
    filled = [arg.replace("{tmp}", str(tmp_path)) for arg in args]
    said(twnn("train", "--output", tmp_path / "runs" / "new", *filled))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    said(twnn("train", "--output", tmp_path / "mine", *filled))
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_every_model_of_ours_is_listed():
    listed = {name: owner for name, owner, _ in rows("models")}
    assert {"antisymmetric_20", "euler_50", "gru_rows", "lstm_pixels", "resnet6_tiny", "cnn3"} <= set(listed)
    for name in timm.list_models():
        ours = timm.model_entrypoint(name).__module__.startswith(("zoo.", "twnn_plugin."))
        assert (name in listed) == ours, name
    assert "resnet18" not in listed


@pytest.mark.parametrize("policy", ["foo", "rand-m-1"])
def test_an_augmentation_policy_that_timm_cannot_read(policy):
    assert f"--aa '{policy}' is no policy" in said(twnn("train", "--device", "cpu", "--aa", policy))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_models_that_cannot_be_fetched(tmp_path, monkeypatch, command):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for name in ("hf-hub:nobody/no-such-model", "local-dir:/nope", f"local-dir:{tmp_path / 'bare'}"):
        message = said(twnn(command, "--device", "cpu", "--model", name))
        assert name in message and "cannot be read or fetched" in message


def saved_as(path: Path, state: dict) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("weights", [[1, 2], "text", {}, {"weight": 1}], ids=lambda w: type(w).__name__)
def test_a_checkpoint_whose_weights_are_none(tmp_path, checkpoint, weights):
    path = saved_as(tmp_path / LAST, {**checkpoint, "state_dict": weights})
    for args in (("eval", "--checkpoint"), ("train", "--resume"), ("train", "--initial-checkpoint")):
        message = said(twnn(*args, path, *(("--output", tmp_path / "new") if "initial" in args[1] else ())))
        assert LAST in message
    with pytest.raises(CheckpointError, match="state dict"):
        train(small(initial_checkpoint=str(path)), data=some_digits())


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": "many"},
        {"lr": None},
        {"lr": -1.0},
        {"model": 5},
        {"model_kwargs": [1]},
        {"decay_milestones": 5},
        {"amp": "no"},
        {"no_such_setting": 1},
    ],
    ids=lambda changes: "_".join(f"{name}_{value}" for name, value in changes.items()),
)
def test_a_checkpoint_with_impossible_settings(tmp_path, checkpoint, changes):
    name = next(iter(changes))
    named = rf"{LAST} are not those of a run: .*({name}|--{name.replace('_', '-')})"
    config = {**checkpoint["config"], **changes}
    path = saved_as(tmp_path / LAST, {**checkpoint, "config": config})
    with pytest.raises(CheckpointError, match=named):
        train(small(resume=str(path)), data=some_digits())
    with pytest.raises(CheckpointError, match=named):
        settings_of(config, path)


def test_bad_settings_are_one_line_of_a_command(tmp_path, checkpoint):
    path = saved_as(tmp_path / LAST, {**checkpoint, "config": {**checkpoint["config"], "epochs": "many"}})
    for args in (("eval", "--checkpoint"), ("train", "--resume")):
        assert "--epochs='many' is not possible: expected a whole number" in said(twnn(*args, path))


def test_settings_that_are_no_dict(tmp_path, checkpoint):
    path = saved_as(tmp_path / LAST, {**checkpoint, "config": [1]})
    with pytest.raises(CheckpointError, match="settings by name; got a list"):
        load_checkpoint(path)


def test_settings_survive_json():
    config = small(lr=1, clip_grad=1, model_kwargs={"drop_rate": 0.1}, decay_milestones=(1, 2))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_untrained_weights_are_called_so_and_are_the_same_every_time(tmp_path):
    outputs = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        result = twnn("eval", "--model", "cnn3", "--device", "cpu", "--no-latency", "--json", file)
        assert result.exit_code == 0
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    title = outputs[0].splitlines()[0]
    assert title.rstrip() == "cnn3 on digits (test), untrained weights"
    assert json.loads(file.read_text())["weights"].startswith("untrained")


def test_trained_weights_are_not_called_untrained(tmp_path, checkpoint):
    path = saved_as(tmp_path / LAST, checkpoint)
    file = tmp_path / "figures.json"
    result = twnn("eval", "--checkpoint", path, "--device", "cpu", "--json", file)
    assert "untrained" not in result.stdout
    assert json.loads(file.read_text())["weights"] == str(path)
    assert "latency, batch of 64" in result.stdout


def test_what_was_not_timed_has_no_row():
    assert "latency" not in twnn("eval", "--model", "cnn3", "--device", "cpu", "--no-latency").stdout


def test_the_help_of_output_names_its_default(tmp_path, monkeypatch):
    words = " ".join(re.sub(r"[│|]", " ", twnn("train", "--help").stdout).split())
    assert "output/MODEL-DATASET" in words
    assert "without one nothing is written" not in words
    monkeypatch.chdir(tmp_path)
    assert twnn("train", "--model", "cnn3", "--epochs", "1", "--device", "cpu").exit_code == 0
    assert (tmp_path / "output" / "cnn3-digits" / LAST).is_file()
    assert "--resume auto" in said(twnn("train", "--model", "cnn3", "--epochs", "1", "--device", "cpu"))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--batch-size", "0"), "--batch-size=0"),
        (("--warmup-epochs", "30"), "--warmup-epochs=30 leaves nothing of --epochs=20"),
        (("--batch-size", "33", "--mixup", "0.1"), "--batch-size=33"),
        (("--opt", "sgd", "--opt-eps", "0.1"), "--opt-eps"),
        (("--model", "vit_tiny_patch16_224"), "--img-size"),
        (("--text-length", "3"), "--text-length"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_options_are_named_as_they_are_typed(tmp_path, args, named):
    assert named in said(twnn("train", "--device", "cpu", "--output", tmp_path / "run", *args))
    assert os.listdir(tmp_path) == []


def test_what_is_imported_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[ ]", name)[0].lower() for name in project["dependencies"]}
    text = "\n".join(path.read_text() for path in (ROOT / "zoo").rglob("*.py"))
    for module, package in (("safetensors", "safetensors"), ("PIL", "pillow"), ("timm", "timm")):
        assert re.search(rf"^\s*(from|import) {module}\b", text, re.M)
        assert package in declared
