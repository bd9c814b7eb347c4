"""``python -m benchmarks reasoning``: a quick run writes what it should, and the shipped weights answer."""

from __future__ import annotations

import json

import benchmarks.cli  # noqa: F401  (registers the benchmarks)
from benchmarks.harness import Settings, find, run


def test_a_quick_run_writes_everything(tmp_path):
    settings = Settings(quick=True, only=("twnn_prefix/", "train/ff_prefix", "train/twnn_prefix"))
    folder = run(find("reasoning"), settings, out=tmp_path / "out", command="x")
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    cells = {cell["key"]: cell for cell in result["cells"]}
    assert {cell["status"] for cell in cells.values()} == {"ok"}, cells
    shipped = [cell["data"] for key, cell in cells.items() if key.startswith("twnn_prefix/size")]
    assert len(shipped) == 2
    for data in shipped:
        assert data["right"] == 1.0 and data["converged"] == 1.0
        assert 0 < data["least_steps"] <= data["mean_steps"] <= data["most_steps"]
    assert shipped[0]["mean_steps"] < shipped[1]["mean_steps"]  # 32 bits and 64: steps grow with the length
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "ff_prefix" in table and "twnn_prefix" in table
    assert (folder / "steps.png").stat().st_size > 0


def test_one_seed_trains_nothing_and_several_train_every_model():
    one = {cell.key for cell in find("reasoning").cells(Settings(seeds=(0,)))}
    assert not any(key.startswith("train/") for key in one)
    several = [cell.key for cell in find("reasoning").cells(Settings(seeds=(0, 1)))]
    trained = {key for key in several if key.startswith("train/")}
    assert len(several) == len(set(several)) and set(several) == one | trained
    for seed in (0, 1):
        assert {f"train/{kind}_prefix/seed{seed}" for kind in ("twnn", "ff", "rnn", "deq")} <= trained
