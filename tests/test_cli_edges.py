"""``python -m benchmarks`` at its edges: figures that are none, options that nothing reads, runs that are
stopped, cells that cannot be read, and tables that cannot be made.
"""

from __future__ import annotations

import importlib
import json
import re

import pytest
import torch

from benchmarks import cli
from benchmarks.cli import main
from benchmarks.harness import REGISTRY, BenchError, Benchmark, Cell, Claim, PageError, Settings, Table, run
from benchmarks.harness.run import load


class Squares(Benchmark):
    """Three cells; ``stop`` interrupts the run at one of them, ``lacking`` cannot be made."""

    question = "Does the runner run?"

    def __init__(self, name="squares", stop=None, lacking=None):
        self.name, self.stop, self.lacking, self.ran = name, stop, lacking, []

    def cells(self, settings):
        return [Cell(f"cell{k}", {"k": k}) for k in range(3)]

    def run_cell(self, cell, settings):
        if cell.key == self.stop:
            raise KeyboardInterrupt
        self.ran.append(cell.key)
        return {"square": cell.options["k"] ** 2}

    def _made(self, what):
        if self.lacking == what:
            raise ZeroDivisionError("mean of nothing")

    def tables(self, cells):
        self._made("tables")
        rows = [(c["key"], str(c["data"]["square"])) for c in cells if c["status"] == "ok"]
        return [Table("Squares", ("cell", "square"), rows)]

    def plots(self, cells, folder):
        self._made("plots")
        return []

    def claims(self, cells):
        self._made("claims")
        return [Claim("cells", "-", str(len(cells)), "-", "-", "-")]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known(monkeypatch):
    """Makes these the only benchmarks there are."""

    def only(*benchmarks):
        for name in list(REGISTRY):
            monkeypatch.delitem(REGISTRY, name)
        for benchmark in benchmarks:
            monkeypatch.setitem(REGISTRY, benchmark.name, benchmark)

    return only


def ended(capsys, *arguments):
    """Exit code and the words on stderr."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    return error.value.code, " ".join(capsys.readouterr().err.split())


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and lines[0].startswith("Error: ")
    return lines[0]


# Options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["nan", "inf", "1e999"])
def test_a_budget_is_a_finite_number(budget, known, tmp_path, capsys):
    squares = Squares()
    known(squares)
    said = refused(capsys, "squares", "--budget", budget, "--out", tmp_path / "out")
    assert "--budget" in said and "a finite number" in said
    assert squares.ran == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given", [["--seeds", "0"], ["--quick"], ["--list"], ["--budget", "1"], ["--only", "a", "--out", "x"]]
)
def test_the_page_of_all_results_takes_no_options(given, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(cli, "write_index", lambda: written.append(1) or "page")
    said = refused(capsys, "index", *given)
    assert "'index' takes no options" in said and all(word in said for word in given if word[0] == "-")
    assert written == []
    with pytest.raises(SystemExit) as error:
        main(["index"])
    assert not error.value.code and written == [1]


# Runs that are stopped -----------------------------------------------------------------------------


def test_a_stopped_run_says_how_it_goes_on(known, tmp_path, capsys):
    known(Squares(stop="cell1"))
    code, said = ended(capsys, "squares", "--out", tmp_path / "out")
    assert code == 130 and f"go on with --resume {tmp_path / 'out'} and the same other options" in said
    again = Squares()
    known(again)
    code, _ = ended(capsys, "squares", "--resume", tmp_path / "out")
    assert code == 0 and again.ran == ["cell1", "cell2"]


def test_all_go_on_in_the_folder_that_they_were_stopped_in(known, tmp_path, capsys):
    known(Squares("a"), Squares("b", stop="cell1"), Squares("c"))
    code, said = ended(capsys, "all", "--quick", "--out", tmp_path)
    assert code == 130 and f"go on with 'all', --resume {tmp_path} and the same other options" in said
    assert not (tmp_path / "c").exists()
    again = [Squares(name) for name in "abc"]
    known(*again)
    code, _ = ended(capsys, "all", "--quick", "--resume", tmp_path)
    assert code == 0
    assert [one.ran for one in again] == [[], ["cell1", "cell2"], ["cell0", "cell1", "cell2"]]
    for name in "abc":
        assert [c["data"]["square"] for c in load(tmp_path / name)["cells"]] == [0, 1, 4]
        assert not (tmp_path / name / "cells.jsonl").exists()


def test_all_go_on_with_the_settings_that_they_were_begun_with_or_not_at_all(known, tmp_path, capsys):
    """Without --quick, what was not begun would take hours before the others say that they cannot go on."""
    known(Squares("a", stop="cell1"), Squares("b"))
    ended(capsys, "all", "--quick", "--out", tmp_path)
    again = [Squares("a"), Squares("b")]
    known(*again)
    assert "was run with --quick True, not False" in refused(capsys, "all", "--resume", tmp_path)
    assert not any(one.ran for one in again)
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert "Nothing to resume" in refused(capsys, "all", "--quick", "--resume", tmp_path)


def test_all_in_dated_folders_say_which_of_them_goes_on_alone(known, tmp_path, capsys, monkeypatch):
    runner = importlib.import_module("benchmarks.harness.run")  # the package has a function of that name
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    known(Squares("a"), Squares("b", stop="cell1"), Squares("c"), Squares("d"))
    code, said = ended(capsys, "all")
    assert code == 130 and said.endswith("with 'b' in place of 'all'; not begun: c, d.")
    (folder,) = re.findall(r"--resume (\S+_b_cpu) ", said)
    again = Squares("b")
    known(again)
    code, _ = ended(capsys, "b", "--resume", folder)
    assert code == 0 and again.ran == ["cell1", "cell2"]


# Cells that cannot be read -------------------------------------------------------------------------


def with_data(file, data):
    """Put these data into the second cell of a result or a journal; the new text."""
    text = file.read_text()
    parts = [json.loads(part) for part in (text.splitlines() if file.suffix == ".jsonl" else [text])]
    cells = parts[1:] if file.suffix == ".jsonl" else parts[0]["cells"]
    cells[1]["data"] = data
    file.write_text("".join(json.dumps(part) + "\n" for part in parts))
    return file.read_text()


@pytest.mark.parametrize("data", [None, {}, {"squares": 1}, [1]])
@pytest.mark.parametrize("file", ["result.json", "cells.jsonl"])
def test_a_kept_cell_that_cannot_be_read_is_named_before_anything_is_measured(file, data, tmp_path):
    folder = tmp_path / "out"
    if file == "result.json":
        run(Squares(), Settings(), out=folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(Squares(stop="cell2"), Settings(), out=folder)
    damaged = with_data(folder / file, data)
    again = Squares()
    with pytest.raises(BenchError, match=rf"{file} is damaged.*its cell cell1 cannot be read") as error:
        run(again, Settings(), resume=folder)
    assert again.ran == [] and "\n" not in str(error.value)
    assert (folder / file).read_text() == damaged


# Tables that cannot be made ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tables", "claims", "plots"])
def test_what_cannot_be_made_of_the_cells_does_not_lose_them(what, known, tmp_path, capsys):
    folder = tmp_path / "out"
    with pytest.raises(PageError, match=rf"Not made: {what} \(ZeroDivisionError: mean of nothing\)"):
        run(Squares(lacking=what), Settings(), out=folder)
    result = load(folder)
    assert [c["data"]["square"] for c in result["cells"]] == [0, 1, 4]
    assert bool(result["claims"]) == (what != "claims")
    assert ("| cell2 | 4 |" in (folder / "table.md").read_text()) == (what != "tables")
    assert not (folder / "cells.jsonl").exists()
    known(Squares(lacking=what))
    code, said = ended(capsys, "squares", "--out", tmp_path / "other")
    assert code == 1 and f"Error: Not made: {what}" in said
    mended = Squares()
    run(mended, Settings(), resume=folder)
    assert mended.ran == [] and load(folder)["claims"]
    assert "| cell2 | 4 |" in (folder / "table.md").read_text()
