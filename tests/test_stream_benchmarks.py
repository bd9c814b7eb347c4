"""The benchmarks of streams, stragglers and overhead: quick runs, and what the simulation must do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.cli import main
from benchmarks.harness import find
from benchmarks.harness.run import load
from benchmarks.stragglers import docs
from benchmarks.stragglers.simulate import Population, Setting, simulate

# The simulation ---------------------------------------------------------------------------------------


def population(steps, before=None, outside=1.0, cap=None):
    before = steps if before is None else before
    return Population.of({"steps": steps, "before": before, "score": before}, outside, cap)


def run(people, updates=64, **setting):
    setting = Setting(**{"ranks": 8, "batch": 16, "cost": "rows", **setting})
    return simulate(people, setting, updates, np.random.default_rng(0))


def test_equal_samples_lose_nothing():
    for cost in ("rows", "launches"):
        found = run(population([3] * 50), cost=cost)
        assert found == {"time": 4.0, "busy": 4.0, "lost": 0.0}


def test_one_process_waits_for_nobody_and_many_for_the_slowest():
    people = population([0] * 90 + [20] * 10)
    lost = [run(people, ranks=ranks)["lost"] for ranks in (1, 4, 16, 64)]
    assert lost[0] == 0 and lost == sorted(lost) and lost[-1] > 0.4
    assert run(people, batch=256)["lost"] < run(people, batch=16)["lost"]
    slow = run(people, cost="launches", batch=256)
    assert slow["time"] == pytest.approx(21) and slow["lost"] == pytest.approx(0, abs=1e-9)


def test_dealing_evens_out_and_bucketing_helps_launches():
    generator = np.random.default_rng(1)
    steps = generator.integers(0, 30, 500).tolist()
    people, blind = population(steps), population(steps, before=[0] * 500)
    plain = run(people)["time"]
    assert run(people, plan="dealt", predictor="oracle")["lost"] < 0.1 * run(people)["lost"]
    assert run(people, plan="dealt", predictor="oracle")["time"] < plain
    assert run(blind, plan="dealt", predictor="previous epoch")["time"] == pytest.approx(plain, rel=0.05)
    launches = run(people, cost="launches")["time"]
    assert run(people, cost="launches", plan="dealt", predictor="oracle")["time"] == launches
    assert run(people, cost="launches", plan="bucketed", predictor="oracle")["time"] < 0.6 * launches
    assert run(population(steps, cap=5), cost="launches")["time"] == 6.0


# The commands -------------------------------------------------------------------------------------------


def quick(name, folder):
    with pytest.raises(SystemExit) as ended:
        main([name, "--quick", "--out", str(folder), *([] if find(name).no_budget else ["--budget", "0.01"])])
    assert ended.value.code == 0
    result = load(folder)
    assert all(cell["status"] == "ok" for cell in result["cells"]), [c["reason"] for c in result["cells"]]
    assert (folder / "table.md").read_text()
    for plot in folder.glob("*.png"):
        assert 5_000 < plot.stat().st_size < 200_000
    return result


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_scaling(tmp_path):
    result = quick("scaling", tmp_path / "run")
    data = result["cells"][1]["data"]
    steps = [int(s) for s in data["steps"].split()]
    assert len(steps) == 192 and data["mean_steps"] == pytest.approx(np.mean(steps)) and data["outside"] > 0
    page = f"before\n{docs.BEGIN}old\n{docs.END}after\n"
    written = docs.insert(page, result)
    assert "old" not in written and written.startswith("before\n") and written.endswith("after\n")
    assert "Lost to stragglers" in written and docs.insert(written, result) == written
    with pytest.raises(ValueError, match="no place for the figures"):
        docs.insert("nothing", result)


def test_the_page_has_a_place_for_its_figures():
    from pathlib import Path

    page = (Path(docs.__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert page.count(docs.BEGIN) == page.count(docs.END) == 1


def test_streaming(tmp_path):
    result = quick("streaming", tmp_path / "run")
    for cell in result["cells"]:
        data = cell["data"]
        assert data["difference"] <= 1e-4 * data["scale"]
        assert data["counts"]["stream"]["evaluations"] < data["counts"]["batch by batch"]["evaluations"]
        assert data["counts"]["masked"]["rows"] > data["counts"]["batch by batch"]["rows"]
        assert data["mean_fill"]["stream"] > data["mean_fill"]["batch by batch"]
    assert [claim["met"] for claim in result["claims"]]
    assert json.dumps(result).__len__() < 300_000


def test_overhead(tmp_path):
    result = quick("overhead", tmp_path / "run")
    for cell in result["cells"]:
        data = cell["data"]
        if cell["options"]["kind"] == "closed":
            assert data["same_bits"] and data["closed"]
        else:
            assert data["difference"] < 1e-4
            assert data["reported"] == data["counted"]


def test_they_are_registered():
    assert {find(name).name for name in ("streaming", "scaling", "overhead")}
