"""The command ``twnn``: what it prints, what it writes, and one line with exit code 2 on bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import twnn_plugin as tw
from zoo.checkpoint import LAST, load_checkpoint
from zoo.cli import main
from zoo.config import TrainConfig
from zoo.options import expand_model_kwargs, parse_model_kwargs

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--epochs", "1", "--device", "cpu")


def twnn(*args: object):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = twnn("train", "--model", "twnn_resnet8_cifar", "--output", folder, *QUICK)
    assert result.exit_code == 0, result.output
    assert "best validation accuracy" in result.output
    return folder


@pytest.mark.parametrize("command", [(), ("demo",), ("list",), ("train",), ("eval",)])
def test_every_command_has_help(command):
    result = twnn(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: twnn" in result.output


def test_every_setting_is_an_option_with_help():
    text = twnn("train", "--help").output
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text, name


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom zoo.cli import main\n"
        "for args in ([], ['train']):\n"
        "    try:\n        main([*args, '--help'])\n"
        "    except SystemExit as done:\n        assert not done.code\n"
        "assert not {'torch', 'timm', 'numpy', 'rich'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("trian",), "trian"),
        (("train", "--modle", "x"), "--modle"),
        (("train", "--epochs", "many"), "many"),
        (("train", "--epochs", "0"), "epochs=0"),
        (("train", "--model", "resnt18"), "Did you mean 'resnet18'"),
        (("train", "--dataset", "digit"), "Did you mean 'digits'"),
        (("train", "--dataset", "mnist", "--data-dir", "{tmp}/none"), "{tmp}/none"),
        (("train", "--model", "cnn3", "--model-kwargs", "nonsense"), "NAME=VALUE"),
        (("train", "--model", "cnn3", "--model-kwargs", "nonsense=1"), "nonsense"),
        (("train", "--resume", "{tmp}/none.pth.tar"), "none.pth.tar"),
        (("train", "--decay-milestones", "3,x"), "whole numbers"),
        (("eval",), "--checkpoint"),
        (("eval", "--checkpoint", "{tmp}/none.pth.tar"), "none.pth.tar"),
        (("eval", "--model", "cnn3", "--json", "{tmp}/none/x.json"), "does not exist"),
        (("eval", "--model", "cnn3", "--solver", "picard"), "no wormholes"),
        (("list", "solver"), "solvers"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    result = twnn(*(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert said.replace("{tmp}", str(tmp_path)) in result.stderr
    assert result.stdout == ""


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("zoo.listing.rows", broken)
    assert isinstance(twnn("list", "gates").exception, ZeroDivisionError)


@pytest.mark.parametrize("kind", ["solvers", "linear_solvers", "adjoints", "blocks", "gates", "policies"])
def test_list_shows_every_entry_with_owner_and_line(kind):
    result = twnn("list", kind)
    assert result.exit_code == 0
    for entry in getattr(tw, kind).registry.entries():
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"│ {entry.name} "))
        assert entry.owner in line
        assert entry.summary[:20] in line


def test_list_says_whether_solvers_are_compiled():
    assert twnn("list", "solvers").stdout.splitlines()[-1].endswith(f"CPU: {tw.kernels.describe()}.")


def test_list_models():
    lines = twnn("list", "models").stdout.splitlines()
    for name in ("twnn_resnet18", "cnn3", "resnet8_cifar"):
        assert any(f" {name} " in line for line in lines), name


def test_train_then_eval(run_folder, tmp_path):
    file = tmp_path / "figures.json"
    result = twnn("eval", "--checkpoint", run_folder / "best.pth.tar", "--device", "cpu", "--json", file)
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert figures["model"] == "twnn_resnet8_cifar"
    assert figures["samples"] == 359
    assert 0 <= figures["open_share"] <= 1
    assert "open-gate share" in result.stdout
    assert f"{100 * figures['accuracy']:.2f}%" in result.stdout


def test_eval_applies_the_solver_settings(run_folder, monkeypatch):
    seen = {}
    configure = tw.configure
    monkeypatch.setattr(
        tw, "configure", lambda model, **options: seen.update(options) or configure(model, **options)
    )
    settings = {
        "solver": "picard",
        "adjoint": "unrolled",
        "tol": 1e-2,
        "max_iter": 7,
        "stop": "abs",
        "norm": "max",
    }
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), value)]
    result = twnn("eval", "--checkpoint", run_folder / LAST, "--device", "cpu", "--no-latency", *flags)
    assert result.exit_code == 0, result.output
    assert seen == settings


def test_eval_refuses_an_unknown_solver(run_folder):
    result = twnn("eval", "--checkpoint", run_folder / LAST, "--solver", "andersen")
    assert result.exit_code == 2
    assert "Did you mean 'anderson'" in result.stderr


def test_resume_takes_the_settings_that_are_not_given(run_folder):
    before = (run_folder / "metrics.jsonl").read_bytes()
    result = twnn("train", "--resume", run_folder)
    assert result.exit_code == 0, result.output
    assert load_checkpoint(run_folder / LAST)["config"]["epochs"] == 1
    assert (run_folder / "metrics.jsonl").read_bytes() == before
    refused = twnn("train", "--resume", run_folder, "--batch-size", "32")
    assert refused.exit_code == 2
    assert "--batch-size was 64 and is now 32" in refused.stderr


def test_a_corrupt_checkpoint(run_folder, tmp_path):
    path = tmp_path / "half.pth.tar"
    whole = (run_folder / LAST).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for command in (("eval", "--checkpoint", path), ("train", "--resume", path)):
        result = twnn(*command)
        assert result.exit_code == 2
        assert "half.pth.tar is not a readable checkpoint" in result.stderr
        assert result.stderr.count("\n") == 1
    path.write_text("hello")
    assert "its bytes are not those of a checkpoint" in twnn("eval", "--checkpoint", path).stderr


def test_weights_alone_need_a_model(run_folder, tmp_path):
    torch.save(torch.load(run_folder / LAST)["state_dict"], tmp_path / "bare.pth")
    assert twnn("eval", "--checkpoint", tmp_path / "bare.pth").exit_code == 2
    flags = ("--model", "twnn_resnet8_cifar", "--no-latency", "--device", "cpu")
    assert twnn("eval", "--checkpoint", tmp_path / "bare.pth", *flags).exit_code == 0


def test_a_run_is_not_overwritten(run_folder):
    result = twnn("train", "--model", "cnn3", "--output", run_folder, *QUICK)
    assert result.exit_code == 2
    assert "already holds a run" in result.stderr


def test_ctrl_c_is_130(monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.train.train", interrupted)
    result = twnn("train", "--model", "cnn3", "--output", tmp_path)
    assert result.exit_code == 130
    assert "--resume auto" in result.stderr


def test_demo_is_called_with_its_options(monkeypatch, tmp_path):
    calls = []
    stand_in = types.ModuleType("zoo.demo")
    stand_in.run = lambda *args: calls.append(args)
    monkeypatch.setitem(sys.modules, "zoo.demo", stand_in)
    assert twnn("demo", "--out", tmp_path, "--quick", "--seed", "3").exit_code == 0
    assert [call[:3] for call in calls] == [(tmp_path, 3, True)]


def test_model_kwargs_as_timm_writes_them():
    args = ["--model", "x", "--model-kwargs", "a=1", "b=layer4->layer3", "--epochs", "2"]
    expected = [
        "--model",
        "x",
        "--model-kwargs",
        "a=1",
        "--model-kwargs",
        "b=layer4->layer3",
        "--epochs",
        "2",
    ]
    assert expand_model_kwargs(args) == expected
    parsed = parse_model_kwargs(["a=1", "b=layer4->layer3", "c=[1, 2]", "d=None", "e="])
    assert parsed == {"a": 1, "b": "layer4->layer3", "c": [1, 2], "d": None, "e": ""}
