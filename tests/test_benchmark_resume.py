"""Benchmarks that are interrupted, gone on with, damaged or told where they cannot write.

A run that is gone on with loses nothing that was measured, says of each cell where it comes from, and keeps
no cell that was trained by another recipe.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import dataclass, replace

import pytest

from benchmarks import reasoning
from benchmarks.cli import main
from benchmarks.harness import (
    RECIPE,
    REGISTRY,
    BenchError,
    Benchmark,
    Cell,
    Claim,
    Settings,
    Table,
    find,
    fingerprint,
    run,
)
from benchmarks.harness.journal import begin_journal
from benchmarks.harness.provenance import STAMPED
from benchmarks.harness.run import RESULTS, load, page_of
from benchmarks.index import render_index
from zoo.tasks import RECIPES


class Toy(Benchmark):
    """Three cells; ``stop`` interrupts the run at one of them, ``broken`` has it fail."""

    name = "toy"
    question = "Does the runner run?"

    def __init__(self, stop=None, broken=None, recipe=None):
        self.stop, self.broken, self.recipe, self.ran = stop, broken, recipe, []

    def cells(self, settings):
        more = {} if self.recipe is None else {RECIPE: fingerprint(self.recipe)}
        return [Cell(f"cell{k}", {"k": k, **more}) for k in range(3)]

    def run_cell(self, cell, settings):
        if cell.key == self.stop:
            raise KeyboardInterrupt
        if cell.key == self.broken:
            raise RuntimeError("out of luck")
        self.ran.append(cell.key)
        return {"k": cell.options["k"], "recipe": self.recipe}

    def tables(self, cells):
        return [Table("Cells", ("cell",), [(c["key"],) for c in cells])]

    def claims(self, cells):
        return [Claim("cells", "-", str(len(cells)), "-", "-", "-")]


def interrupted(folder, **options):
    with pytest.raises(KeyboardInterrupt):
        run(Toy(stop="cell2", **options), Settings(), out=folder)
    return folder / "cells.jsonl"


@pytest.fixture
def commits(monkeypatch):
    """The commit and day of the runs that follow, as the test says."""
    now = {"commit": "a" * 40, "date": "2026-01-01T00:00:00+00:00", "dirty": False}
    # The package has functions of the same names as these modules.
    runner, stamps = (importlib.import_module(f"benchmarks.harness.{name}") for name in ("run", "provenance"))
    monkeypatch.setattr(runner, "provenance", lambda s, c: {**origin(s, c), **now})
    monkeypatch.setattr(stamps, "_now", lambda: now["date"])
    return now


def origin(settings, command):
    known = dict.fromkeys(STAMPED, "1.0") | {"gpu": None, "threads": 1, "command": command}
    return {**known, "settings": settings.as_json()}


# Nothing that was measured is lost -----------------------------------------------------------------


def test_a_new_run_does_not_write_over_an_interrupted_one(tmp_path):
    journal = interrupted(tmp_path / "toy")
    before = journal.read_text()
    with pytest.raises(BenchError, match=r"finished cells of an interrupted run. Go on with --resume .*toy"):
        run(Toy(), Settings(), out=tmp_path / "toy")
    assert journal.read_text() == before
    again = Toy()
    run(again, Settings(), resume=tmp_path / "toy")
    assert again.ran == ["cell2"]


def test_a_crash_while_a_run_is_taken_up_loses_no_cell(tmp_path, monkeypatch):
    journal = interrupted(tmp_path / "toy")
    before = journal.read_text()

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", crash)
        with pytest.raises(KeyboardInterrupt):
            run(Toy(), Settings(), resume=tmp_path / "toy")
    assert journal.read_text() == before

    def some():
        yield {"key": "cell0"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_journal(tmp_path / "toy", {}, some())
    assert journal.read_text() == before
    again = Toy()
    run(again, Settings(), resume=tmp_path / "toy")
    assert again.ran == ["cell2"]
    assert sorted(file.name for file in (tmp_path / "toy").iterdir()) == ["result.json", "table.md"]


# Where cells come from -----------------------------------------------------------------------------


def test_each_cell_keeps_the_commit_day_and_versions_that_measured_it(tmp_path, commits):
    interrupted(tmp_path / "2026-01-01_toy_cpu")
    commits.update(commit="b" * 40, date="2026-01-02T00:00:00+00:00", dirty=True)
    folder = run(Toy(broken="cell2"), Settings(), resume=tmp_path / "2026-01-01_toy_cpu")
    cells = load(folder)["cells"]
    found = [(c["origin"]["commit"][0], c["origin"]["date"][:10], c["origin"]["dirty"]) for c in cells]
    assert found == [("a", "2026-01-01", False)] * 2 + [("b", "2026-01-02", True)]
    assert all(set(c["origin"]) == {"date", *STAMPED} for c in cells)
    commits.update(commit="c" * 40, date="2026-01-03T00:00:00+00:00", dirty=False, torch="2.0")
    run(Toy(), Settings(), resume=folder)  # the failed cell again; its commit is gone
    assert [c["origin"]["commit"][0] for c in load(folder)["cells"]] == ["a", "a", "c"]
    code = "commits aaaaaaaaaaaa, cccccccccccc (2 and 1 cells)"
    assert code in (folder / "table.md").read_text()
    assert "2026-01-01T00:00:00+00:00 to 2026-01-03T00:00:00+00:00;" in (folder / "table.md").read_text()
    page = render_index(tmp_path)
    assert f"2026-01-01 to 2026-01-03, {code}" in page and "torch 1.0 and 2.0, torchdeq 1.0," in page


def test_cells_of_old_files_take_the_commit_of_the_run_that_they_are_found_in(tmp_path, commits):
    folder = run(Toy(broken="cell2"), Settings(), out=tmp_path / "toy")
    result = load(folder)
    for cell in result["cells"]:
        del cell["origin"]
    (folder / "result.json").write_text(json.dumps(result))
    assert "commit aaaaaaaaaaaa," in render_index(tmp_path)
    commits["commit"] = "b" * 40
    with pytest.raises(KeyboardInterrupt):
        run(Toy(stop="cell2"), Settings(), resume=folder)
    commits["commit"] = "c" * 40
    run(Toy(), Settings(), resume=folder)
    assert [c["origin"]["commit"][0] for c in load(folder)["cells"]] == ["a", "a", "c"]


def test_where_nobody_knows_the_commit_of_a_cell_none_is_named(tmp_path, commits):
    journal = interrupted(tmp_path / "toy")
    head, *cells = map(json.loads, journal.read_text().splitlines())
    del head["provenance"]
    for cell in cells:
        del cell["origin"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (head, *cells)))
    with pytest.raises(KeyboardInterrupt):
        run(Toy(stop="cell2"), Settings(), resume=tmp_path / "toy")
    run(Toy(), Settings(), resume=tmp_path / "toy")
    assert [c["origin"] and c["origin"]["commit"] for c in load(tmp_path / "toy")["cells"]] == [
        None,
        None,
        "a" * 40,
    ]
    assert "commits aaaaaaaaaaaa, unknown (1 and 2 cells)" in (tmp_path / "toy" / "table.md").read_text()


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in RESULTS.glob("*/result.json")), ids=lambda f: f.name
)
def test_committed_tables_are_made_of_the_committed_figures(folder):
    result = load(folder)
    benchmark = find(result["benchmark"])
    tables = benchmark.tables(result["cells"])
    page = page_of(benchmark, result["provenance"], tables, result["cells"])
    assert (folder / "table.md").read_text(encoding="utf-8") == page


# Recipes -------------------------------------------------------------------------------------------


def test_cells_of_another_recipe_are_measured_again(tmp_path, capsys):
    folder = run(Toy(recipe={"lr": 1.0}), Settings(), out=tmp_path / "toy")
    same = Toy(recipe={"lr": 1.0})
    run(same, Settings(), resume=folder)
    assert same.ran == []
    other = Toy(recipe={"lr": 2.0}, stop="cell1")
    with pytest.raises(KeyboardInterrupt):
        run(other, Settings(), resume=folder)
    assert other.ran == ["cell0"]
    said = " ".join(capsys.readouterr().err.split())
    assert "3 finished cell(s) were trained by another recipe" in said and "cell0, cell1, cell2" in said
    rest = Toy(recipe={"lr": 2.0})
    run(rest, Settings(), resume=folder)
    assert rest.ran == ["cell1", "cell2"]
    assert [c["data"]["recipe"]["lr"] for c in load(folder)["cells"]] == [2.0] * 3


def test_cells_that_do_not_say_by_which_recipe_are_shown_but_not_gone_on_with(tmp_path):
    folder = run(Toy(), Settings(), out=tmp_path / "2026-01-01_toy_cpu")
    assert "| cells | - | 3 |" in render_index(tmp_path)
    toy = Toy(recipe={"lr": 1.0})
    run(toy, Settings(), resume=folder)
    assert toy.ran == ["cell0", "cell1", "cell2"]


def test_a_fingerprint_changes_with_any_setting():
    @dataclass(frozen=True)
    class Setting:
        lr: float = 1.0
        sizes: tuple[int, ...] = (1, 2)

    one = fingerprint(Setting(), {"a": 1})
    assert one == fingerprint(Setting(), {"a": 1}) and len(one) == 12
    assert len({one, fingerprint(Setting(lr=2.0), {"a": 1}), fingerprint(Setting(), {"a": 2})}) == 3
    with pytest.raises(TypeError, match="has no fingerprint"):
        fingerprint(object())


def test_a_changed_recipe_changes_the_cells_of_reasoning(monkeypatch):
    settings = Settings(seeds=(0, 1), full=True)

    def cells():
        return {c.key: c.options.get(RECIPE) for c in find("reasoning").cells(settings)}

    before = cells()
    trained = {key for key in before if key.startswith("train/")}
    assert {key for key, recipe in before.items() if recipe} == trained
    assert len({before[key] for key in trained}) == len(trained)
    monkeypatch.setitem(RECIPES, "twnn_prefix", replace(RECIPES["twnn_prefix"], lr=0.5))
    monkeypatch.setitem(reasoning.RETRAINED, "maze", {9: 10})  # and what is tested on
    changed = {key for key, recipe in cells().items() if recipe != before[key]}
    models = ("twnn_prefix", *(f"{kind}_maze" for kind in reasoning.KINDS))
    assert changed == {f"train/{model}/seed{seed}" for model in models for seed in (0, 1)}


TRAINED = {
    "dynalay": lambda o: True,
    "models": lambda o: True,
    "propagation": lambda o: o["kind"] in ("learn", "smooth"),
    "reasoning": lambda o: o["kind"] == "retrained",
    "scaling": lambda o: True,
    "sequences": lambda o: True,
    "wormholes": lambda o: True,
}


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_every_trained_cell_says_by_which_recipe(name):
    for cell in find(name).cells(Settings(quick=True, seeds=(0, 1))):
        assert (RECIPE in cell.options) == TRAINED[name](cell.options), cell.key


def test_seeds_that_are_trained_within_a_cell_are_in_its_recipe():
    """They are in no key, so that more of them would otherwise be left out of a resumed run."""
    one, two = (find("propagation").cells(Settings(seeds=seeds)) for seeds in ((0,), (0, 1)))
    learnt = [(a.options, b.options) for a, b in zip(one, two, strict=True) if RECIPE in a.options]
    assert learnt and all(a[RECIPE] != b[RECIPE] for a, b in learnt)


def test_a_run_of_one_seed_is_not_gone_on_with_by_another(tmp_path):
    toy = Toy()
    toy.one_seed = "draws once"
    run(toy, Settings(), out=tmp_path / "toy")
    with pytest.raises(BenchError, match=r"run with --seeds \[0\], not \[1\]"):
        run(toy, Settings(seeds=(1,)), resume=tmp_path / "toy")


# What is damaged, and where nothing can be written -------------------------------------------------


def damaged(text):
    return lambda file: file.write_text(text)


def edited(change):
    def edit(file):
        result = json.loads(file.read_text())
        change(result)
        file.write_text(json.dumps(result))

    return edit


def in_the_middle(file):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], lines[1][:20] + "\n", lines[2]]))


@pytest.mark.parametrize(
    "name, damage, said",
    [
        ("cells.jsonl", in_the_middle, r"line 2 cannot be read.*measures its cell again"),
        ("cells.jsonl", damaged("[1, 2]\n{}\n"), "line 1 cannot be read"),
        ("cells.jsonl", damaged("{}\n"), "does not say of which benchmark"),
        ("cells.jsonl", damaged('{"benchmark": "toy", "settings": {}}\n{"key": 3}\n'), "its cell 1 is none"),
        ("result.json", damaged('{"benchmark": "to'), "result.json is damaged"),
        ("result.json", damaged("[]"), "it lacks benchmark"),
        ("result.json", damaged("\x00\x00"), "result.json is damaged"),
        ("result.json", edited(lambda r: r.pop("provenance")), "it lacks provenance"),
        ("result.json", edited(lambda r: r["provenance"].pop("settings")), "benchmark and settings"),
        ("result.json", edited(lambda r: r["cells"][1].pop("status")), "its cell 2 is none"),
    ],
)
def test_damaged_files_are_named_in_one_line(name, damage, said, tmp_path):
    if name == "cells.jsonl":
        interrupted(tmp_path / "toy")
    else:
        run(Toy(), Settings(), out=tmp_path / "toy")
    damage(tmp_path / "toy" / name)
    before = (tmp_path / "toy" / name).read_bytes()
    toy = Toy()
    with pytest.raises(BenchError, match=said):
        run(toy, Settings(), resume=tmp_path / "toy")
    assert toy.ran == [] and (tmp_path / "toy" / name).read_bytes() == before


def test_a_result_stands_in_for_a_damaged_journal(tmp_path):
    folder = run(Toy(broken="cell2"), Settings(), out=tmp_path / "toy")
    with pytest.raises(KeyboardInterrupt):
        run(Toy(stop="cell2"), Settings(), resume=folder)
    in_the_middle(folder / "cells.jsonl")
    with pytest.raises(BenchError, match=r"Without cells.jsonl, --resume goes on from result.json"):
        run(Toy(), Settings(), resume=folder)


@pytest.mark.parametrize("left", ['{"key": "cell2", "opt', '{"key": "cell2"}', "\x00\x00\n"])
def test_a_last_line_that_was_cut_off_is_left_out_with_a_word(left, tmp_path, capsys):
    journal = interrupted(tmp_path / "toy")
    with journal.open("a") as lines:
        lines.write(left)
    toy = Toy()
    run(toy, Settings(), resume=tmp_path / "toy")
    assert toy.ran == ["cell2"]
    assert "the last line was cut off" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_was_interrupted_at_its_first_line_starts_anew(tmp_path):
    journal = interrupted(tmp_path / "toy")
    journal.write_text('{"benchm')
    toy = Toy()
    run(toy, Settings(), resume=tmp_path / "toy")
    assert toy.ran == ["cell0", "cell1", "cell2"]


def test_where_nothing_can_be_written_nothing_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "file" / "sub", tmp_path / "file"]
    places += [place for place in map(type(tmp_path), ("/proc/x", "/sys")) if place.parent.exists()]
    for place in places:
        toy = Toy()
        with pytest.raises(BenchError, match="cannot hold results") as error:
            run(toy, Settings(), out=place)
        assert toy.ran == [] and "\n" not in str(error.value)


# The command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken, code", [("cell1", 1), (None, 0)])
def test_failed_cells_are_in_the_exit_code(broken, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(REGISTRY, "toy", Toy(broken=broken))
    with pytest.raises(SystemExit) as error:
        main(["toy", "--out", str(tmp_path / "toy")])
    assert error.value.code == code
    said = capsys.readouterr().err
    assert ("1 of 3 cells failed; --resume" in said) == bool(code)


# The page ------------------------------------------------------------------------------------------


def test_what_the_page_says_of_memory_is_what_was_measured():
    """It says: the share is reached, and the growth."""
    page = render_index()
    (told,) = (part for part in page.split("\n- ") if part.startswith("*Memory.*"))
    assert "stays within the share" in told and "within the growth" in told
    folder = max(RESULTS.glob("*_memory_cpu"))
    claims = {c["claim"]: c["met"] for c in load(folder)["claims"] if c["met"] in ("yes", "no")}
    assert claims == {
        "peak memory at 200 iterations over 5, picard / implicit(picard)": "yes",
        "peak memory at 200 iterations, picard / implicit(picard) over "
        "torchdeq fixed_point_iter / fixed_point_iter": "yes",
    }
