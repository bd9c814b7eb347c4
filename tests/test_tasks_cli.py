"""The command line on generated tasks: what a run remembers, what is refused in one line, what is kept."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import zoo.tasks.training as training
from zoo.checkpoint import LAST, load_checkpoint
from zoo.cli import main
from zoo.config import TrainConfig
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.tasks import images, mazes, prefix_sums, read_examples, recipe_for, score
from zoo.tasks.run import WEIGHTS_FILE, evaluate_task, load_model
from zoo.tasks.saved import ARGS, Saved, resumed_model, saved_settings

SHORT = ("--bits", 16, "--batch-size", 8, "--updates", 6)
UNWRITABLE = Path("/sys")


def twnn(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def refused(*args):
    """What a command says that is refused: one line."""
    result = twnn(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    return result.stderr


def figures_of(tmp_path, *args):
    file = tmp_path / "figures.json"
    result = twnn("eval", *args, "--samples", 20, "--device", "cpu", "--json", file)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


def printed_command(result):
    """The words of the command that a training ends with."""
    assert result.exit_code == 0, result.output
    return result.stdout.partition("Next: twnn ")[2].split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished training of a model with an option, and what it printed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    result = twnn("train", "--model", "twnn_prefix", *SHORT, "--model-kwargs", "width=8", "--output", run)
    return run, printed_command(result)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a training that was interrupted after 4 of 6 updates."""
    run, before = tmp_path_factory.mktemp("stopped") / "run", training._Training.update

    def interrupted(self):
        before(self)
        if self.done == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Training, "update", interrupted)
        result = twnn("train", "--model", "twnn_prefix", *SHORT, "--model-kwargs", "width=8", "--output", run)
    assert result.exit_code == 130 and "--resume auto" in result.stderr
    return run


@pytest.fixture
def interrupted_run(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "again"))


@pytest.fixture
def drawn(monkeypatch):
    """The (length, pixels) of every Pathfinder set that is drawn; the sets are small ones."""
    calls, splits = [], images.pathfinder_splits

    def few(length, pixels):
        calls.append((length, pixels))
        return splits(length, 32, 16, pixels=pixels)

    monkeypatch.setattr(images, "pathfinder_splits", few)
    return calls


PATHFINDER = ("--model", "ff_pathfinder", "--epochs", 1, "--batch-size", 16, "--device", "cpu")


def test_a_pathfinder_run_goes_on_with_its_own_images(tmp_path, drawn):
    run = tmp_path / "pf"
    size = ("--contour-length", 4, "--img-size", 48)
    result = twnn("train", *PATHFINDER, *size, "--model-kwargs", "width=8", "--output", run)
    command = printed_command(result)
    assert drawn == [(4, 48)]
    for given in (("--model", "ff_pathfinder"), (), ("--contour-length", 4)):
        again = twnn("train", *given, "--resume", run)
        assert again.exit_code == 0, again.output
        assert drawn.pop() == (4, 48)
    said = refused("train", "--resume", run, "--contour-length", 6)
    assert "was 4 and is now 6" in said
    assert "was 48 and is now 64" in refused("train", "--resume", run, "--img-size", 64)
    assert drawn == [(4, 48)]  # nothing is drawn for a run that is refused

    assert command[0] == "eval"
    figures = figures_of(tmp_path, *command[1:])
    assert (figures["size"], figures["img_size"]) == (4, 48)
    figures = figures_of(tmp_path, *command[1:], "--contour-length", 6, "--img-size", 32)
    assert (figures["size"], figures["img_size"]) == (6, 32)


def test_a_pathfinder_run_writes_down_what_was_not_given(tmp_path, drawn):
    run = tmp_path / "pf"
    assert twnn("train", *PATHFINDER, "--output", run).exit_code == 0
    config = load_checkpoint(run / LAST)["config"]
    assert (config["contour_length"], config["img_size"]) == (14, 32) and drawn == [(14, 32)]


def test_a_contour_length_needs_pathfinder():
    assert TrainConfig(dataset="pathfinder", contour_length=4).contour_length == 4
    with pytest.raises(ConfigError, match="expected dataset pathfinder"):
        TrainConfig(contour_length=4)
    with pytest.raises(ConfigError, match="2 to 14"):
        TrainConfig(dataset="pathfinder", contour_length=20)


def test_nothing_is_drawn_for_a_folder_or_device_that_cannot_be_used(tmp_path, drawn):
    assert "cannot be used here" in refused("train", *PATHFINDER, "--device", "cuda:99")
    (tmp_path / "file").touch()
    assert "--output" in refused("train", *PATHFINDER, "--output", tmp_path / "file")
    assert drawn == []


def test_a_named_checkpoint_is_the_one_that_is_resumed(interrupted_run):
    missing = interrupted_run / "wrong-name.tar"
    for model in (("--model", "twnn_prefix"), ()):
        assert f"no checkpoint {missing}" in refused("train", *model, "--resume", missing)
    copy = interrupted_run / "copy.tar"
    (interrupted_run / LAST).rename(copy)
    result = twnn("train", "--model", "twnn_prefix", "--resume", copy)
    assert result.exit_code == 0, result.output


def test_a_run_is_resumed_without_its_model_named(interrupted_run):
    again = ("train", "--resume", "auto", "--output", interrupted_run)
    assert "other settings (updates)" in refused(*again, "--updates", 3)
    assert "a run of twnn_prefix, not of cnn3" in refused(*again, "--model", "cnn3")
    assert "a run of twnn_prefix, not of ff_maze" in refused(*again, "--model", "ff_maze")
    assert "no setting of a training on generated examples" in refused(*again, "--mixup", 0.2)
    result = twnn("train", "--resume", interrupted_run)
    assert result.exit_code == 0, result.output
    assert "16 bits" in result.stdout and "6 updates" in result.stdout
    assert "is finished" in refused("train", "--resume", interrupted_run)


def test_the_model_of_a_run(stopped, finished, tmp_path):
    assert resumed_model(None, str(stopped)) is None and resumed_model("auto", None) is None
    assert resumed_model("auto", str(tmp_path)) is None and resumed_model(str(tmp_path / "x"), None) is None
    for resume, output in ((stopped, None), (stopped / LAST, None), ("auto", stopped), (finished[0], None)):
        assert resumed_model(str(resume), output and str(output)) == "twnn_prefix"
    torch.save({"weight": torch.zeros(1)}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match="bare weights"):
        resumed_model(str(tmp_path), None)


def test_the_printed_command_evaluates_what_was_trained(finished, tmp_path):
    run, command = finished
    assert command[:3] == ["eval", "--model", "twnn_prefix"]
    figures = figures_of(tmp_path, *command[1:])
    assert figures["size"] == 16
    fewer = sum(p.numel() for p in load_model("twnn_prefix", run / WEIGHTS_FILE)[0].parameters())
    assert figures["parameters"] == fewer < sum(p.numel() for p in load_model("twnn_prefix")[0].parameters())
    assert figures_of(tmp_path, *command[1:], "--bits", 20)["size"] == 20
    assert "do not fit" in refused(*command, "--model-kwargs", "width=12")


def test_a_run_is_evaluated_on_images_with_its_own_clutter(tmp_path):
    changes = {"size": 3, "easier": (2,), "pixels": 48, "clutter": 4, "model_kwargs": {"width": 8}}
    recipe = recipe_for("twnn_pathfinder", **changes, updates=1, batch_size=4)
    trained = training.train_task(recipe).model
    safetensors.torch.save_file(trained.state_dict(), tmp_path / WEIGHTS_FILE)
    (tmp_path / ARGS).write_text(json.dumps(recipe.as_dict()))
    figures = figures_of(tmp_path, "--checkpoint", tmp_path / WEIGHTS_FILE, "--seed", 5)
    assert (figures["size"], figures["img_size"], figures["clutter"]) == (3, 48, 4)
    examples = recipe.find_task().draw(3, 20, 5, "test")
    assert figures["right"] == float(score(trained, examples).right.double().mean())


def test_a_checkpoint_says_which_model_it_is_of(finished, stopped, tmp_path):
    run, _ = finished
    for path in (run / WEIGHTS_FILE, stopped / LAST):
        assert figures_of(tmp_path, "--checkpoint", path)["model"] == "twnn_prefix"
        assert saved_settings(path) == Saved("twnn_prefix", {"width": 8}, 16)
    bare = Path(shutil.copy(run / WEIGHTS_FILE, tmp_path / "bare.safetensors"))
    assert saved_settings(bare) == Saved()
    assert "give --model too" in refused("eval", "--checkpoint", bare)
    assert "do not fit" in refused("eval", "--checkpoint", bare, "--model", "twnn_prefix")
    options = ("--model", "twnn_prefix", "--model-kwargs", "width=8")
    assert figures_of(tmp_path, "--checkpoint", bare, *options)["size"] == 32
    assert "There is no checkpoint" in refused("eval", "--checkpoint", tmp_path / WEIGHTS_FILE)
    (tmp_path / "args.json").write_text("{")
    shutil.copy(bare, tmp_path / WEIGHTS_FILE)
    assert "args.json" in refused("eval", "--checkpoint", tmp_path / WEIGHTS_FILE)


@pytest.mark.skipif(not UNWRITABLE.is_dir(), reason="no folder that nobody can write to")
@pytest.mark.parametrize("model", ["twnn_prefix", "ff_pathfinder"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_training(model, monkeypatch, drawn):
    monkeypatch.setattr("zoo.tasks.run.train_task", lambda *args, **rest: pytest.fail("trained"))
    assert f"Cannot write to the folder {UNWRITABLE}" in refused(
        "train", "--model", model, "--output", UNWRITABLE
    )
    assert drawn == []


def test_results_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zoo.tasks.run.save_weights", full)
    said = refused("train", "--model", "twnn_prefix", *SHORT, "--output", tmp_path / "run")
    assert "training is done" in said and "No space left" in said


def test_figures_that_cannot_be_written_are_printed_first(tmp_path):
    (tmp_path / "x.json").symlink_to(tmp_path / "none" / "x.json")
    flags = ("--samples", 4, "--json", tmp_path / "x.json")
    result = twnn("eval", "--model", "twnn_prefix", *flags)
    assert result.exit_code == 2 and "entirely right" in result.stdout
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert "x.json" in result.stderr


@pytest.fixture
def files(tmp_path):
    """Prefix sums of 24 bits and mazes of 9 units as the benchmark's files."""
    folder = tmp_path / "prefix_sums_data"
    folder.mkdir()
    strings = prefix_sums(24, 40)
    torch.save(strings.inputs[:, 0], folder / "24_data.pth")
    torch.save(strings.targets.float(), folder / "24_targets.pth")
    pictures = mazes(9, 4)
    for part in ("train", "test"):
        folder = tmp_path / f"maze_data_{part}_9"
        folder.mkdir()
        np.save(folder / "inputs.npy", pictures.inputs.numpy())
        np.save(folder / "solutions.npy", pictures.targets.numpy())
    return tmp_path


def rewrite(path, change):
    if path.suffix == ".npy":
        np.save(path, change(np.load(path)))
    else:
        torch.save(change(torch.load(path)), path)


def two(values):
    values[0, 0] = 2
    return values


def not_a_number(values):
    values[0, 0] = float("nan")
    return values


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("prefix_sums_data/24_data.pth", two, "0 and 1 alone; 1 of 960 values are others, such as 2"),
        ("prefix_sums_data/24_targets.pth", two, "24_targets.pth should hold 0 and 1 alone"),
        ("prefix_sums_data/24_targets.pth", not_a_number, "such as nan"),
        ("prefix_sums_data/24_data.pth", lambda t: t.to(torch.complex64), "a plain tensor of numbers"),
        ("prefix_sums_data/24_data.pth", lambda t: {"data": t}, "it holds a dict"),
        ("maze_data_test_9/solutions.npy", two, "solutions.npy should hold 0 and 1 alone"),
        ("maze_data_test_9/solutions.npy", lambda a: a.astype(str), "an array of numbers; it holds an array"),
        ("maze_data_test_9/inputs.npy", not_a_number, "some are not finite"),
    ],
)
def test_files_with_other_values(files, name, change, said):
    rewrite(files / name, change)
    task, size = ("mazes", 9) if "maze" in name else ("prefix_sums", 24)
    with pytest.raises(DataError, match=said):
        read_examples(task, files, size, "test")


@pytest.mark.parametrize("text", ["hello world, this is text\n", "", "1 2 3\n"])
def test_text_in_place_of_a_tensor(files, text):
    (files / "prefix_sums_data" / "24_data.pth").write_text(text)
    said = refused("eval", "--model", "twnn_prefix", "--bits", 24, "--data-dir", files)
    assert "24_data.pth cannot be read as a tensor" in said


def test_other_byte_orders_and_types_are_read(files):
    plain = read_examples("mazes", files, 9, "test")
    rewrite(files / "maze_data_test_9" / "inputs.npy", lambda a: a.astype(">f8"))
    rewrite(files / "maze_data_test_9" / "solutions.npy", lambda a: a.astype(bool))
    read = read_examples("mazes", files, 9, "test")
    assert torch.equal(read.inputs, plain.inputs) and torch.equal(read.targets, plain.targets)


def test_empty_sets_are_refused(files):
    for name in ("24_data.pth", "24_targets.pth"):
        rewrite(files / "prefix_sums_data" / name, lambda t: t[:0])
    for name in ("inputs.npy", "solutions.npy"):
        rewrite(files / "maze_data_test_9" / name, lambda a: a[:0])
        rewrite(files / "maze_data_train_9" / name, lambda a: a[:1])
    for command, model in (("eval", "twnn_prefix"), ("eval", "twnn_maze"), ("train", "ff_prefix")):
        size = ("--bits", 24) if model.endswith("prefix") else ("--maze-size", 9)
        assert "hold 0 example(s)" in refused(command, "--model", model, *size, "--data-dir", files)
    with pytest.raises(DataError, match=r"1 example\(s\), and so none for the split 'train'"):
        read_examples("mazes", files, 9, "train")


def test_a_training_on_files_is_validated_on_their_held_out_examples(files, tmp_path):
    run = tmp_path / "run"
    flags = ("--bits", 24, "--data-dir", files, "--updates", 2, "--batch-size", 8, "--output", run)
    result = twnn("train", "--model", "twnn_prefix", *flags)
    assert result.exit_code == 0, result.output
    assert f"of 8 validation examples from {files} entirely right" in result.stdout
    validation = json.loads((run / "validation.json").read_text())
    assert validation["samples"] == 8 and validation["data"] == str(files)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train", "--model", "twn_prefix"), "Did you mean 'twnn_prefix'"),
        (("train", "--model", "twnn_prefx", "--updates", 2), "Did you mean 'twnn_prefix'"),
        (("train", "--model", "twn_pathfinder"), "Did you mean 'twnn_pathfinder'"),
        (("eval", "--model", "twn_prefix"), "Did you mean 'twnn_prefix'"),
        (("eval", "--model", "twnn_mase", "--maze-size", 9), "Did you mean 'twnn_maze'"),
    ],
)
def test_a_misspelled_model_gets_the_nearest(args, said, drawn):
    assert said in refused(*args)
    assert drawn == []


def test_a_model_without_a_recipe_is_told_from_a_misspelled_one(monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean 'twnn_maze'"):
        recipe_for("twnn_maze.untrained")
    monkeypatch.setattr("timm.is_model", lambda name: name == "my_prefix")
    with pytest.raises(ConfigError, match="Its task, prefix_sums, is trained otherwise"):
        recipe_for("my_prefix")


def test_options_that_would_do_nothing_in_eval(files, finished, tmp_path):
    flags = ("--model", "twnn_prefix", "--bits", 24, "--data-dir", files)
    assert "--seed 5 chooses among generated" in refused("eval", *flags, "--seed", 5)
    assert "seed" not in figures_of(tmp_path, *flags)
    assert figures_of(tmp_path, *flags[:4], "--seed", 5)["seed"] == 5
    both = ("--pretrained", "--checkpoint", finished[0] / WEIGHTS_FILE)
    assert "leave one of the two out" in refused("eval", *flags[:2], *both)
    assert figures_of(tmp_path, *flags[:2], "--pretrained")["weights"] == "shipped weights"
    assert "No weights of ff_prefix ship" in refused("eval", "--model", "ff_prefix", "--pretrained")


@pytest.mark.parametrize(
    ("args", "where", "resumable"),
    [
        (("demo", "--out", "{tmp}"), "zoo.demo.run", False),
        (("eval", "--model", "cnn3"), "zoo.evalrun.evaluate_from_options", False),
        (("eval", "--model", "twnn_prefix"), "zoo.tasks.run.evaluate_task", False),
        (("train", "--model", "twnn_prefix", "--output", "{tmp}"), "zoo.tasks.run.train_task", True),
        (("train", "--model", "cnn3", "--output", "{tmp}"), "zoo.train.train", True),
    ],
)
def test_only_a_training_can_be_resumed(args, where, resumable, monkeypatch, tmp_path):
    def interrupted(*args, **rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    result = twnn(*(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert result.exit_code == 130 and "Interrupted." in result.stderr
    assert ("--resume" in result.stderr) is resumable


def test_backbones_are_listed():
    assert "timm" in twnn("list", "backbones").stdout
    assert "Backbones" in twnn("list").stdout


def test_evaluation_from_python_needs_no_checkpoint():
    unset = dict.fromkeys(
        ("checkpoint", "dataset", "img_size", "data_dir", "seed", "bits", "maze_size", "contour_length")
    )
    solve = dict.fromkeys(("solver", "adjoint", "tol", "max_iter", "stop", "norm"))
    plain = {"model": "twnn_prefix", "pretrained": False, "split": "test", "batch_size": 8, "amp": False}
    options = {**unset, **solve, **plain, "device": "cpu", "samples": 3, "model_kwargs": {}}
    title, figures = evaluate_task(options)
    assert "32 bits" in title and figures["samples"] == 3
