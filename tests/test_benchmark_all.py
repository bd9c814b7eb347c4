"""``python -m benchmarks all``, and every benchmark's whole ``--quick`` run."""

import inspect
import sys

import pytest
import torch
from rich.console import Console

from benchmarks import everything
from benchmarks.cli import _own, main
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
    settings = everything.own_settings(REGISTRY[name], Settings(quick=True, budget=0.01))
    folder = run(REGISTRY[name], settings, out=tmp_path / name, command="x")
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
    assert len(load(tmp_path / "end")["cells"]) == 2  # what was measured is kept
    with pytest.raises(BenchError, match="already holds a result of cell, end, good"):
        everything.run_all(Settings(quick=True), tmp_path, str, console)
    for name in ("cell", "end", "good"):
        (tmp_path / name / "result.json").unlink()
    (tmp_path / "end" / "cells.jsonl").touch()
    with pytest.raises(BenchError, match="already holds an interrupted run of end"):
        everything.run_all(Settings(quick=True), tmp_path, str, console)


def test_full_is_for_those_that_have_two_scales(few, tmp_path):
    del few["cell"], few["end"]
    few["small"] = Small("small")
    assert everything.run_all(Settings(full=True), tmp_path, str, Console(quiet=True)) == 0
    assert {n: load(tmp_path / n)["cells"][0]["data"]["full"] for n in ("good", "small")} == {
        "good": True,
        "small": False,
    }


def test_what_one_of_them_has_no_use_for_is_not_handed_on_to_it(few, tmp_path):
    few["good"].one_seed = few["good"].no_budget = "does without"
    del few["cell"], few["end"]
    few["more"] = Small("more")
    given = Settings(seeds=(3, 4), budget=2.0)
    assert everything.run_all(given, tmp_path, str, Console(quiet=True)) == 0
    used = {n: load(tmp_path / n)["provenance"]["settings"] for n in ("good", "more")}
    assert {n: (s["seeds"], s["budget"]) for n, s in used.items()} == {
        "good": ([3], 1.0),
        "more": ([3, 4], 2.0),
    }


def test_the_command_that_is_recorded_is_one_that_the_benchmark_takes():
    words = ["memory", "--full", "--seeds", "3,4", "--budget=2", "--threads", "2"]
    given = Settings(full=True, seeds=(3, 4), budget=2.0)
    own = everything.own_settings(REGISTRY["memory"], given)
    assert _own(words, given, own) == ["memory", "--threads", "2", "--seeds", "3"]
    assert _own(words, given, given) == words


@pytest.mark.parametrize("name", sorted(name for name, b in REGISTRY.items() if b.one_seed or b.no_budget))
def test_options_that_would_be_ignored_are_refused(name, tmp_path):
    """More seeds than one, or more timing, where nothing reads them: they would be recorded all the same."""
    benchmark = REGISTRY[name]
    assert bool(benchmark.one_seed) == (name in ("coverage", "memory", "overhead", "profile"))
    if benchmark.one_seed:
        with pytest.raises(BenchError, match=f"{name} .*one seed"):
            run(benchmark, Settings(quick=True, seeds=(0, 1)), out=tmp_path / "out")
    if benchmark.no_budget:
        with pytest.raises(BenchError, match=f"{name} .*leave --budget away"):
            run(benchmark, Settings(quick=True, budget=2.0), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_budget_is_refused_where_nothing_reads_it(name):
    """What is in the module reads it, but for ``gpu``, which hands it on to others."""
    module = inspect.getsource(sys.modules[type(REGISTRY[name]).__module__])
    assert bool(REGISTRY[name].no_budget) == ("settings.budget" not in module)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--quick"], "--out"),
        (["--quick", "--out", "/proc/x"], "/proc/x cannot hold results"),
        (["--only", "a", "--out", "x"], "say which"),
        (["--device", "cuda", "--out", "x"], "'gpu'"),
        (["--resume", "."], "Nothing to resume in ."),
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
