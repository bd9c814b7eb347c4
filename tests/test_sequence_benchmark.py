"""The benchmark ``sequences``: equal size, equal compute, and tables and claims made of the cells alone."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.harness import Settings, find
from benchmarks.harness.run import run
from benchmarks.sequences import LONG, Sequences
from benchmarks.sequencing.models import CONTESTANTS, build, parameters, reach, sized
from benchmarks.sequencing.tasks import make_task
from benchmarks.sequencing.train import Recipe, contest, cost, layer_cost

pytestmark = pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")


@pytest.fixture(scope="module")
def task():
    return make_task("adding", 30, 0, 16)


def test_contestants_are_no_larger_than_the_gru(task):
    wanted = parameters(build("GRU", task, 32))
    for name in CONTESTANTS:
        assert 0.9 * wanted < parameters(sized(name, task, 32)) <= wanted, name


def test_the_cost_is_what_ran(task):
    x, y = task.val
    each = {}
    for name in ("GRU", "GRU, wormhole through time", "GRU, wormhole from the end"):
        torch.manual_seed(0)
        model = build(name, task, 8).train()
        passes = [0.0]
        layer = model.stack.layers[0]
        layer.register_forward_hook(
            lambda m, a, out, p=passes: p.__setitem__(0, p[0] + len(a[0]) * a[0].shape[1])
        )
        task.loss(model(x), y).backward()
        plain = layer_cost(model, task.length)
        each[name] = (cost(model, task, len(x)) / (3.0 * len(x) * plain), passes[0] / (len(x) * task.length))
    assert each["GRU"] == (1.0, 1.0)
    through, passes = each["GRU, wormhole through time"]
    assert passes == 1.0 and 1.0 < through < 1.3  # one pass, and the messages
    end, passes = each["GRU, wormhole from the end"]
    assert passes > 2 and end > 1.5


def test_all_stop_at_the_same_compute(task):
    recipe = Recipe(hidden=8, updates=12, batch=4, looks=4, held=16)
    found = {name: contest(name, task, recipe, 0, (1e-2,)) for name in ("GRU", "GRU, wormhole from the end")}
    assert found["GRU"]["updates"] == 12
    assert found["GRU, wormhole from the end"]["updates"] < 12
    for data in found.values():
        assert 1.0 <= data["curve"][-1][0] < 1.5 and data["test_loss"] > 0


def test_the_best_rate_on_validation_data_is_trained_on(task):
    recipe = Recipe(hidden=8, updates=10, batch=4, looks=10, held=16)
    data = contest("GRU", task, recipe, 0, (1e-6, 3e-2))
    assert set(data["tried"]) == {"1e-06", "0.03"}
    assert data["rate"] == float(min(data["tried"], key=data["tried"].get))
    assert contest("GRU", task, recipe, 0, (1e-6, 3e-2)) == data  # one seed, one result


def test_the_reach_makes_hops_and_windows_equal():
    assert [reach(n) for n in (1, 64, 100, 1000)] == [1, 8, 10, 32]


def test_cells_are_the_grid():
    cells = find("sequences").cells(Settings(seeds=(0, 1)))
    assert len({cell.key for cell in cells}) == len(cells) == 2 * (3 + sum(len(names) for *_, names in LONG))


def test_a_quick_run_writes_everything(tmp_path):
    folder = run(
        Sequences(),
        Settings(quick=True, only=("adding/20", "sine/ad_fixed_point")),
        out=tmp_path / "out",
        command="python -m benchmarks sequences --quick",
    )
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert [cell["status"] for cell in result["cells"]] == ["ok"] * 4
    names = [claim["claim"] for claim in result["claims"]]
    assert any(name.startswith("Sine wave") for name in names) and any("adding 20" in name for name in names)
    assert all(claim["met"] == "no" for claim in result["claims"] if claim["claim"].startswith("Sine"))
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert "| adding 20 | GRU, wormhole from the end |" in page and "ad_fixed_point" in page
    assert (folder / "figure7.png").stat().st_size > 5000 and (folder / "long_range.png").exists()


def test_claims_compare_with_the_better_of_the_two(task):
    def cell(name, seed, score):
        data = {"test_score": score, "test_loss": 0.1}
        options = {"kind": "contest", "task": "adding", "length": 9, "name": name, "seed": seed}
        return {"status": "ok", "options": options, "data": data}

    ours = "GRU, wormhole through time"
    cells = [cell("GRU", 0, 0.5), cell("GRU", 1, 0.6), cell("LSTM", 0, 0.7), cell("LSTM", 1, 0.72)]
    (claim,) = Sequences().claims([*cells, cell(ours, 0, 0.8), cell(ours, 1, 0.9)])
    assert claim.met == "yes" and claim.peer.startswith("LSTM: 71.0") and claim.ratio == "+14.0 points"
    (claim,) = Sequences().claims([*cells, cell(ours, 0, 0.71), cell(ours, 1, 0.9)])
    assert claim.met == "in part"
    (claim,) = Sequences().claims([*cells, cell(ours, 0, 0.4), cell(ours, 1, 0.5)])
    assert claim.met == "no"
