"""The ``dynalay`` benchmark: what it says of policies agrees with what the network does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.dynalay import ARMS, DynaLay
from benchmarks.dynalaying import judge, report, tasks, train
from benchmarks.harness import Settings
from benchmarks.harness.run import RESULTS, load
from twnn_plugin.selection import selection_of


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """Two finished cells of a quick run."""
    bench, settings = DynaLay(), Settings(quick=True)
    chosen = [cell for cell in bench.cells(settings) if cell.options["arm"] in ("dynalay", "longer")]
    made = []
    for cell in chosen:
        data = bench.run_cell(cell, settings)
        made.append({"key": cell.key, "options": cell.options, "status": "ok", "reason": "", "data": data})
    return made


def test_the_policies_are_compared_on_what_the_network_does(cells: list[dict[str, Any]]) -> None:
    data = next(cell["data"] for cell in cells if cell["options"]["arm"] == "dynalay")
    test = data["test"]
    assert test["agent"]["accuracy"] == test["agent_run"]["accuracy"]
    # A few rows are evaluated once more than the steps that they report; what is executed is what counts.
    expected, executed = test["agent"]["cost"], test["agent_run"]["cost"]
    assert expected * (1 - 1e-3) - 1e-6 <= executed <= expected * 1.05 + 1e-6
    accuracies = [layer["accuracy"] for layer in test["layers"]]
    assert test["oracle"]["accuracy"] >= max(accuracies)
    assert test["random"]["cost"] == pytest.approx(test["agent"]["cost"], rel=1e-3, abs=1e-6)
    assert min(accuracies) - 1e-3 <= test["random"]["accuracy"] <= max(accuracies) + 1e-3
    shares = [point["shares"][0] for point in data["sweep"]]
    assert shares == sorted(shares)  # a higher price turns choices into NOP alone
    assert 1 + data["chosen_frugal"]["cost"] <= 1.3 or data["chosen_frugal"]["cost"] == 0


def test_tables_plots_and_claims_are_made_of_the_cells(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    bench = DynaLay()
    text = "\n".join(str(row) for table in bench.tables(cells) for row in table.rows)
    longer = next(cell["data"] for cell in cells if cell["options"]["arm"] == "longer")
    assert f"{longer['test']:.2f}" in text
    claims = bench.claims(cells)
    assert {"figure 2", "figure 3", "figure 5", "table 1"} <= {claim.claim.split(",")[0] for claim in claims}
    for path in bench.plots(cells, tmp_path):
        assert path.stat().st_size > 1000
    for cell in cells:
        cell_without = [{**c, "status": "failed", "data": None} if c is cell else c for c in cells]
        assert isinstance(bench.claims(cell_without), list)  # a failed cell loses its own lines alone


@pytest.fixture(scope="module")
def committed() -> list[dict[str, Any]]:
    """The cells of the newest result."""
    return load(max(RESULTS.glob("*_dynalay_cpu")))["cells"]


def without(cells: list[dict[str, Any]], lost: set[str]) -> list[dict[str, Any]]:
    """The same cells, some of them failed."""
    return [{**c, "status": "failed", "reason": "x", "data": None} if c["key"] in lost else c for c in cells]


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.startswith("deq-")])
def test_networks_without_a_seed_in_common_are_timed_and_not_judged(arm: str, committed: Any) -> None:
    """The DEQ's own cells time DynaLay beside it; for its accuracy one of DynaLay's own is needed."""
    task = "fashion_mnist"
    kept = {f"{task}/dynalay/seed0", f"{task}/{arm}/seed1", f"{task}/{arm}/seed2"}
    lost = {c["key"] for c in committed if c["key"].startswith(f"{task}/")} - kept
    claims = [
        c for c in DynaLay().claims(without(committed, lost)) if c.claim.startswith("table 1, backward")
    ]
    found = [c for c in claims if report.TITLES[arm] in c.claim and c.claim.endswith("side by side")]
    (claim,) = (c for c in found if "not measured with the same seed" in c.ratio)
    assert "times as fast" in claim.ratio and claim.met == "not measured"


def test_no_pattern_of_failed_cells_costs_the_others_their_lines(committed: Any) -> None:
    bench, rng = DynaLay(), random.Random(0)
    keys = [cell["key"] for cell in committed]
    patterns = [
        {key for key in keys if rng.random() < share} for share in (0.3, 0.6, 0.8, 0.9) for _ in range(25)
    ]
    for lost in (*patterns, set(keys)):
        cells = without(committed, lost)
        text = "\n".join(str(row) for table in bench.tables(cells) for row in table.rows)
        assert isinstance(bench.claims(cells), list) and (text or len(lost) == len(keys))


def test_an_lstm_is_iterated_in_the_layers_that_a_cell_names(tmp_path: Path) -> None:
    bench, settings = DynaLay(), Settings(quick=True)
    made = []
    for cell in bench.cells(settings):
        if cell.options["task"] == "kjv-small-books":
            data = bench.run_cell(cell, settings)
            made.append(
                {"key": cell.key, "options": cell.options, "status": "ok", "reason": "", "data": data}
            )
    cost = {cell["options"]["arm"]: cell["data"]["cost"] for cell in made}
    assert cost["none"] == 1.0 and min(cost[f"layer{k}"] for k in (1, 2, 3)) > 1.0
    assert cost["layer1"] > cost["layer3"]  # what follows the layer is computed again
    table, *missed = bench.tables(made)
    assert [row[0] for row in table.rows] == ["none", "layer1", "layer2", "layer3", "all"]
    (claim,) = bench.claims(made)
    assert claim.claim.startswith("figure 7") and claim.met in ("yes", "no")
    assert [row[0] for table in missed for row in table.rows] == [claim.claim] * (claim.met == "no")
    assert [path.name for path in bench.plots(made, tmp_path)] == ["texts.png"]


def test_random_is_the_expectation_over_draws() -> None:
    right = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    cost = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    seen: Any = type("S", (), {"right": right, "cost": cost})()
    found = judge._random(seen, {"shares": [0.5, 0.25, 0.25], "cost": 0.75})
    # Half iterate: layer 1 and layer 2 alike, at 1.5 on average; right with 1/2, 1/2 and 1.
    assert found["cost"] == pytest.approx(0.75)
    assert found["accuracy"] == pytest.approx(100 * (0.5 * 0.5 + 0.5 * 0.75))


def test_the_least_certain_half_of_a_batch_is_trained_to_iterate() -> None:
    task = tasks.QUICK["fashion_mnist"]
    data, model = tasks.parts(task), tasks.dynalay(task)
    fitting = train._Fit(model, task.recipe, data, seed=0, factor=1.0)
    batch = data["train"].rows(torch.arange(40))
    fitting.explore(0)
    fitting.loss(batch)
    selection = selection_of(model)
    assert selection is not None and selection.last is not None
    assert not bool(selection.last.iterated.any())  # the warm-up
    fitting.explore(fitting.warm)
    fitting.loss(batch)
    opened = selection.last.iterated
    probability = selection.last.closed.softmax(dim=1)
    entropy = -(probability * probability.log()).sum(dim=1)
    assert int(opened.sum()) == 20 and float(entropy[opened].min()) >= float(entropy[~opened].max())


def test_the_agent_is_picked_by_the_probability_of_the_truth_within_the_budget() -> None:
    points: list[dict[str, Any]] = [
        {"name": "cheap", "accuracy": 90.0, "probability": 80.0, "cost": 0.1},
        {"name": "likelier", "accuracy": 89.0, "probability": 81.0, "cost": 0.3},
        {"name": "dear", "accuracy": 92.0, "probability": 85.0, "cost": 0.4},
    ]
    assert [judge._pick(points, budget)["name"] for budget in (1.05, 1.2, 1.35, 2.0)] == [
        *("cheap", "cheap", "likelier", "dear")
    ]


def test_differences_are_taken_seed_by_seed() -> None:
    assert report.spread([1.0, 3.0]) == "2.00 (1.00 to 3.00)"
    assert report.spread([float("nan")]) == "-"
