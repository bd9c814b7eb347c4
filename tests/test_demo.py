"""The demo from end to end, in its quick form, and that the budget moves the open share."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

import twnn_plugin as tw
from zoo.cli import main
from zoo.config import TrainConfig
from zoo.data import Batches, load_data
from zoo.demo.main import FILES
from zoo.evaluate import evaluate
from zoo.train import train


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = CliRunner().invoke(main, ["demo", "--quick", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert all((out / name).stat().st_size > 500 for name in FILES)
    assert "anderson" in result.output
    return json.loads((out / "metrics.json").read_text())


def test_three_networks_are_trained_and_tested(figures):
    plain, wormhole, deq = figures["contest"]
    assert [e["model"] for e in (plain, wormhole, deq)] == ["resnet8_cifar", "twnn_resnet8_cifar", "deq_tiny"]
    for entry in figures["contest"]:
        (run,) = entry["runs"]
        assert run["test"]["accuracy"] > 0.6  # two epochs
        assert run["updates"] == plain["runs"][0]["updates"]
    assert plain["runs"][0]["steps"] is None and deq["runs"][0]["rows"] > 359


def test_the_gate_is_neither_always_open_nor_always_closed(figures):
    share = figures["contest"][1]["runs"][0]["test"]["open_share"]
    assert 0.02 < share < 0.98
    histogram = figures["steps"]["histogram"]
    assert sum(histogram) == 359 and histogram[0] == figures["steps"]["closed"]
    assert histogram[0] == pytest.approx((1 - share) * 359, abs=1)


def test_every_registered_solver_was_tried_and_agrees(figures):
    rows = {row["solver"]: row for row in figures["solvers"]}
    assert set(rows) == set(tw.solvers.names())
    accuracies = [row["accuracy"] for row in rows.values()]
    assert max(accuracies) - min(accuracies) < 0.02
    for name, line in figures["traces"].items():
        assert line[0] > line[-1] and line[-1] < 1e-3, name


def test_the_threshold_moves_cost(figures):
    rows = [row["rows_evaluated"] for row in figures["curve"]]
    assert rows[0] == 0 and rows == sorted(rows) and rows[-1] > rows[2]


def test_the_budget_moves_the_share_in_training():
    data = load_data("digits")
    shares = []
    for budget in (0.15, 0.6):
        config = TrainConfig(
            model="twnn_resnet8_cifar",
            model_kwargs={"budget": budget},
            epochs=4,
            lr=1e-2,
            clip_grad=1.0,
            device="cpu",
        )
        model = train(config, data=data).model
        shares.append(evaluate(model, Batches(data.test, data.spec, 256), latency=False).open_share)
    assert shares[0] is not None and shares[1] is not None
    assert 0 < shares[0] < shares[1] - 0.15 < 1


def test_an_impossible_folder_is_said_before_any_work(tmp_path):
    taken = tmp_path / "file"
    taken.write_text("here")
    result = CliRunner().invoke(main, ["demo", "--quick", "--out", str(taken)])
    assert result.exit_code == 2
    assert "file" in result.output and "Traceback" not in result.output


def test_no_command_shows_the_help_as_it_is():
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2 and "Commands:\n" in result.output and "Error" not in result.output


def test_same_seed_same_model():
    data = load_data("digits")
    states = []
    for _ in range(2):
        config = TrainConfig(
            model="twnn_resnet8_cifar", model_kwargs={"budget": 0.3}, epochs=1, seed=3, device="cpu"
        )
        states.append(train(config, data=data).model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
