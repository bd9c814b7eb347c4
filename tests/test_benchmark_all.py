"""``python -m benchmarks all``, and every benchmark's whole ``--quick`` run."""

import pytest
import torch
from rich.console import Console

from benchmarks import everything
from benchmarks.cli import main
from benchmarks.harness import REGISTRY, BenchError, Benchmark, Cell, Claim, Settings, run
from benchmarks.harness.run import load

ELSEWHERE = {"propagation", "scaling", "streaming", "wormholes"}  # whole in tests of their own
NAMES = sorted(set(REGISTRY) - ELSEWHERE - {"gpu"})


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_quick_run(name, tmp_path):
    folder = run(REGISTRY[name], Settings(quick=True, budget=0.01), out=tmp_path / name, command="x")
    result = load(folder)
    assert {cell["key"] for cell in result["cells"]} == {
        cell.key for cell in REGISTRY[name].cells(Settings(quick=True))
    }
    assert [cell["reason"] for cell in result["cells"] if cell["status"] != "ok"] == []
    assert result["claims"] and (folder / "table.md").stat().st_size > 200
    assert not (folder / "cells.jsonl").exists()


class Small(Benchmark):
    question = "Does it work?"

    def __init__(self, name, wrong: bool | None = False, scales=False):
        self.name, self.wrong, self.scales = name, wrong, scales

    def cells(self, settings):
        return [Cell("one", {"full": settings.full}), Cell("two", {"full": settings.full})]

    def run_cell(self, cell, settings):
        if self.wrong and cell.key == "two":
            raise ValueError("two does not work")
        return {"full": settings.full}

    def tables(self, cells):
        return []

    def plots(self, cells, folder):
        return []

    def claims(self, cells):
        if self.wrong is None:
            raise KeyError("claims")
        return [Claim("it works", "-", "-", "-", "-", "yes")]


@pytest.fixture
def few(monkeypatch):
    found = {
        b.name: b for b in (Small("good", scales=True), Small("cell", True), Small("end", None), Small("gpu"))
    }
    monkeypatch.setattr(everything, "REGISTRY", found)
    return found


def test_all_runs_each_and_one_that_fails_does_not_lose_the_others(few, tmp_path, capsys):
    console = Console(width=200, force_terminal=False)
    failed = everything.run_all(
        Settings(quick=True), tmp_path, lambda name: f"python -m benchmarks {name} --quick", console
    )
    assert failed == 2
    said = capsys.readouterr().out
    assert "two: ValueError: two does not work" in said and "KeyError" in said
    assert not (tmp_path / "gpu").exists()
    good = load(tmp_path / "good")
    assert good["provenance"]["command"] == "python -m benchmarks good --quick"
    assert [cell["status"] for cell in load(tmp_path / "cell")["cells"]] == ["ok", "failed"]
    assert (tmp_path / "end" / "cells.jsonl").exists()  # what was measured is kept
    with pytest.raises(BenchError, match="already holds a result of cell, good"):
        everything.run_all(Settings(quick=True), tmp_path, str, console)


def test_full_is_for_those_that_have_two_scales(few, tmp_path):
    del few["cell"], few["end"]
    few["small"] = Small("small")
    assert everything.run_all(Settings(full=True), tmp_path, str, Console(quiet=True)) == 0
    assert {n: load(tmp_path / n)["cells"][0]["data"]["full"] for n in ("good", "small")} == {
        "good": True,
        "small": False,
    }


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--quick"], "--out"),
        (["--only", "a", "--out", "x"], "say which"),
        (["--device", "cuda", "--out", "x"], "'gpu'"),
        (["--resume", "."], "say which"),
        (["--quick", "--full", "--out", "x"], "--full does not go with --quick"),
    ],
)
def test_what_all_cannot_do_is_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(["all", *arguments])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("name", sorted(name for name, b in REGISTRY.items() if b.cpu_only))
def test_a_device_that_would_be_ignored_is_refused(name, tmp_path):
    with pytest.raises(BenchError, match=f"{name} .*leave --device away"):
        run(REGISTRY[name], Settings(device="cuda", quick=True), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
