"""The benchmarks: the harness measures what it says, the problems are as hard as they claim.

Nothing here depends on how long anything takes: where time matters, the clock is a fake one.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import twnn_plugin as tw
from benchmarks.cli import _without, main
from benchmarks.harness import (
    BenchError,
    Benchmark,
    Cell,
    Claim,
    Counts,
    Settings,
    Table,
    counted,
    find,
    interleave,
    peak_bytes,
    ratio_of,
    run,
    spread_of,
    timing,
)
from benchmarks.harness.run import RESULTS, load
from benchmarks.index import PAGE, render_index
from benchmarks.solvers import bench_of
from benchmarks.solving import bounds, headline
from benchmarks.solving.candidates import (
    Bare,
    Limits,
    Ours,
    Torchdeq,
    linear_solvers,
    ours,
    torchdeqs,
)
from benchmarks.solving.measure import Quality
from benchmarks.solving.problems import build, flat
from benchmarks.solving.reference import LADDER, at_most, gradient_error, reference_of
from twnn_plugin.solvers import linear

MB = 2**20


# The harness ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a candidate says so."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def takes(clock, seconds, log=None, name=""):
    def once(watch):
        if log is not None:
            log.append(name)
        clock.now += seconds / 4
        watch.lap("forward")
        clock.now += 3 * seconds / 4
        watch.lap("backward")

    return once


def test_rounds_visit_everyone_in_changing_order_and_time_each_phase(clock):
    log = []
    runs = {name: takes(clock, 1.0, log, name) for name in "abcd"}
    laps = interleave(runs, device="cpu", budget_s=0.0, min_rounds=6, seed=3, warmup=False)
    rounds = [log[k : k + 4] for k in range(0, len(log), 4)]
    assert len(rounds) == 6 and all(sorted(r) == list("abcd") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert all(lap == {"forward": 0.25, "backward": 0.75, "total": 1.0} for lap in laps["a"])
    again = []
    runs = {name: takes(clock, 1.0, again, name) for name in "abcd"}
    interleave(runs, device="cpu", budget_s=0.0, min_rounds=6, seed=3, warmup=False)
    assert again == log


def test_slow_candidates_sit_out_the_later_rounds(clock):
    runs = {"fast": takes(clock, 1.0), "slow": takes(clock, 3.0), "hopeless": takes(clock, 50.0)}
    laps = interleave(runs, device="cpu", budget_s=1e9, min_rounds=3, max_rounds=5, warmup=False)
    ran = {name: sum(lap is not None for lap in rounds) for name, rounds in laps.items()}
    assert ran == {"fast": 5, "slow": 3, "hopeless": 1}
    assert all(len(rounds) == 5 for rounds in laps.values())
    laps = interleave(
        runs, device="cpu", budget_s=1e9, min_rounds=3, max_rounds=5, warmup=False, anchors=["hopeless"]
    )
    assert all(lap is not None for rounds in laps.values() for lap in rounds)


def test_no_round_begins_after_the_budget(clock):
    laps = interleave({"a": takes(clock, 1.0)}, device="cpu", budget_s=3.5, min_rounds=2, warmup=True)
    assert len(laps["a"]) == 4


def test_statistics():
    spread = spread_of([4.0, 1.0, 3.0, 2.0, 10.0])
    assert (spread.median, spread.q1, spread.q3, spread.min, spread.n) == (3.0, 2.0, 4.0, 1.0, 5)
    # Round by round: the ratio of medians would be 1.
    assert ratio_of([2.0, 30.0, None], [1.0, 10.0, 5.0]).median == 2.5


def test_peak_memory_of_known_allocations():
    held = []

    def work():
        first = torch.zeros(4 * MB // 4)
        second = torch.zeros(2 * MB // 4)
        del first
        held.append(second)
        third = torch.zeros(1 * MB // 4)
        del third

    before = torch.zeros(8 * MB // 4)  # live already: does not count
    assert abs(peak_bytes(work, "cpu") - 6 * MB) < 4096
    del before


def test_peak_memory_sees_what_is_kept_for_the_backward_pass():
    x = torch.zeros(MB // 4, requires_grad=True)

    def work(keep):
        with torch.set_grad_enabled(keep):
            y = x
            for _ in range(10):
                y = y.exp()
        return y

    assert abs(peak_bytes(lambda: work(False), "cpu") - 2 * MB) < 4096
    assert abs(peak_bytes(lambda: work(True), "cpu") - 10 * MB) < 4096


def test_counts_of_evaluations_and_products():
    counts = Counts()
    f = counted(lambda z, x: (0.5 * z[0] + x, z[1]), counts)
    z = (torch.ones(3, 2, requires_grad=True), torch.ones(3, 2))
    first, _ = f(z, torch.ones(3, 2))
    for _ in range(4):
        torch.autograd.grad(first.sum(), z[0], retain_graph=True)
    f((torch.ones(5, 2), torch.ones(5, 2)), torch.ones(5, 2))
    assert (counts.calls, counts.rows, counts.products, counts.product_rows) == (2, 8, 4, 12)


class Toy(Benchmark):
    """Three cells, of which the second fails while ``broken``."""

    name = "toy"
    question = "Does the runner run?"
    broken = True

    def __init__(self):
        self.ran = []

    def cells(self, settings):
        return [Cell(f"cell{k}", {"k": k}) for k in range(3)]

    def run_cell(self, cell, settings):
        self.ran.append(cell.key)
        if self.broken and cell.options["k"] == 1:
            raise RuntimeError("out of luck\nand more lines")
        return {"square": cell.options["k"] ** 2}

    def tables(self, cells):
        rows = [(c["key"], str(c["data"]["square"]) if c["status"] == "ok" else c["reason"]) for c in cells]
        return [Table("Squares", ("cell", "square [of k]"), rows)]

    def claims(self, cells):
        done = sum(c["status"] == "ok" for c in cells)
        return [Claim("cells", "3", str(done), "-", "3", "yes" if done == 3 else "no")]


def test_a_failed_cell_stays_in_the_table_and_a_resumed_run_does_it_alone(tmp_path):
    toy, folder = Toy(), tmp_path / "2026-01-02_toy_cpu"
    run(toy, Settings(), out=folder, command="python -m benchmarks toy")
    result = load(folder)
    assert [c["status"] for c in result["cells"]] == ["ok", "failed", "ok"]
    assert result["cells"][1]["reason"] == "RuntimeError: out of luck"
    table = (folder / "table.md").read_text()
    assert "out of luck" in table and "| cell2 | 4 |" in table
    assert not (folder / "cells.jsonl").exists()
    origin = result["provenance"]
    assert origin["torch"] == torch.__version__.split("+")[0] or origin["torch"] == torch.__version__
    for key in ("commit", "dirty", "torchdeq", "timm", "python", "cpu", "threads", "date", "command"):
        assert key in origin
    toy.ran, toy.broken = [], False
    run(toy, Settings(), resume=folder)
    assert toy.ran == ["cell1"]
    assert [c["data"]["square"] for c in load(folder)["cells"]] == [0, 1, 4]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    toy, folder = Toy(), tmp_path / "toy"
    toy.run_cell = interrupt_at(toy.run_cell, "cell2")  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(toy, Settings(), out=folder)
    with (folder / "cells.jsonl").open("a") as lines:
        lines.write('{"key": "cell2", "sta')  # cut off in the middle of a write
    again = Toy()
    again.broken = False
    run(again, Settings(), resume=folder)
    assert again.ran == ["cell1", "cell2"]  # cell0 was done, cell1 had failed
    assert all(c["status"] == "ok" for c in load(folder)["cells"])


def test_a_recorded_command_names_no_folder():
    words = ["toy", "--out", "somewhere", "--seeds", "0,1", "--resume=elsewhere", "--only", "cell0"]
    assert _without(words, "--out", "--resume") == ["toy", "--seeds", "0,1", "--only", "cell0"]


def test_a_run_of_some_cells_can_be_given_more_of_them(tmp_path):
    toy, folder = Toy(), tmp_path / "toy"
    run(toy, Settings(only=("cell2",)), out=folder)
    run(toy, Settings(only=("cell2", "cell0"), seeds=(0, 1)), resume=folder)
    assert toy.ran == ["cell2", "cell0"]
    assert [c["key"] for c in load(folder)["cells"]] == ["cell0", "cell2"]
    changed = Toy()
    changed.cells = lambda settings: [Cell(f"cell{k}", {"k": k + 1}) for k in range(3)]  # type: ignore[method-assign]
    with pytest.raises(BenchError, match="would not keep"):
        run(changed, Settings(), resume=folder)


def interrupt_at(work, key):
    def wrapped(cell, settings):
        if cell.key == key:
            raise KeyboardInterrupt
        return work(cell, settings)

    return wrapped


def test_runs_that_cannot_be_resumed_or_written_are_refused(tmp_path):
    folder = tmp_path / "toy"
    run(Toy(), Settings(), out=folder)
    with pytest.raises(BenchError, match="already holds a result"):
        run(Toy(), Settings(), out=folder)
    with pytest.raises(BenchError, match="--budget"):
        run(Toy(), Settings(budget=2.0), resume=folder)
    with pytest.raises(BenchError, match=r"2 finished.*such as cell0"):
        run(Toy(), Settings(only=("cell1",)), resume=folder)
    with pytest.raises(BenchError, match="Nothing to resume"):
        run(Toy(), Settings(), resume=tmp_path)
    with pytest.raises(BenchError, match=r"fits no cell.*cell0, cell1"):
        run(Toy(), Settings(only=("cel9",)), out=tmp_path / "other")
    with pytest.raises(BenchError, match="--out"):
        run(Toy(), Settings(quick=True))


# The command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["solver"], "Did you mean 'solvers'"),
        (["solvers", "--qick"], "Did you mean '--quick'"),
        (["solvers", "--device", "tpu"], "'tpu'"),
        (["solvers", "--seeds", "1,x"], "whole numbers"),
        (["solvers", "--quick"], "--out"),
        (["solvers", "--resume", "no-such-folder"], "no-such-folder"),
        (["gpu", "--device", "cpu"], "CUDA"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and said in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_without_one_says_so(capsys):
    with pytest.raises(SystemExit) as error:
        main(["gpu"])
    assert error.value.code == 2 and "No CUDA device" in capsys.readouterr().err


def test_list(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--list"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("solvers", "backward", "gpu"))


# The problems and their references -----------------------------------------------------------------


@pytest.mark.parametrize("name, batch", [("c", 128), ("c_conv", 20)])
def test_difficulty_is_mixed_as_described(name, batch):
    problem = build(name, batch=batch)
    assert problem.easy is not None and problem.hard is not None
    assert abs(float(problem.easy.double().mean()) - 0.8) < 0.01
    assert abs(float(problem.hard.double().mean()) - 0.05) < 0.01
    reference = reference_of(problem, tol=1e-9)
    assert 3 < float(reference.steps[at_most(1e-3)][problem.easy].double().mean()) < 8
    assert float(reference.steps[at_most(1e-5)][problem.hard].double().mean()) > 100
    if name == "c":  # tanh is far from its ends, where every row would be easy
        assert float(reference.z.abs().max()) < 0.9


def test_problems_come_from_their_seed():
    one, same, other = build("c", 1, batch=8), build("c", 1, batch=8), build("c", 2, batch=8)
    assert torch.equal(one.context[0], same.context[0])
    assert not torch.equal(one.context[0], other.context[0])


@pytest.mark.parametrize("name", ["nonsymmetric", "two_scale"])
def test_the_reference_is_the_dense_solution(name):
    problem = build(name, batch=2)
    reference = reference_of(problem)
    x = problem.context[0].clone().requires_grad_()
    sizes = [part.shape[1] for part in (problem.z0 if isinstance(problem.z0, tuple) else (problem.z0,))]

    def f(z, x):
        state = z.split(sizes, dim=1)
        return flat(problem.f(state if len(sizes) > 1 else state[0], x))

    g, rows = flat(problem.cotangent), []
    for i in range(2):
        one = reference.z[i : i + 1].clone().requires_grad_()
        value = f(one, x[i : i + 1].detach())[0]
        transposed = torch.stack([torch.autograd.grad(v, one, retain_graph=True)[0][0] for v in value], dim=1)
        rows.append(torch.linalg.solve(torch.eye(len(transposed), dtype=torch.float64) - transposed, g[i]))
    value = f(reference.z, x)
    assert float((value - reference.z).detach().norm() / value.norm()) < 1e-10
    gradients = torch.autograd.grad(value, [x, *problem.parameters], torch.stack(rows))
    weights = torch.cat([gradient.flatten() for gradient in gradients[1:]])
    assert gradient_error(reference, weights, gradients[0]) < 1e-8
    assert gradient_error(reference, 1.5 * weights, gradients[0]) == pytest.approx(0.5)
    assert gradient_error(reference, float("nan") * weights, gradients[0]) == float("inf")


# The candidates ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return bench_of("c", 0, "cpu", batch=10)


@pytest.mark.parametrize("candidate", [*torchdeqs(), *ours(), Bare()], ids=lambda c: c.name)
def test_candidates_converge_to_the_reference(small, candidate):
    quality = small.quality(candidate, 1e-6)
    if candidate.name.startswith("newton_krylov"):
        assert quality.reason == ""
        return
    assert quality.reason == ""
    # torchdeq's Anderson, for one, stalls above so small a tolerance; its error is still small.
    assert quality.gradient_error < 2e-3 and quality.solution_error < 2e-3
    assert quality.rows > 0 and quality.product_rows > 0


def test_every_native_solver_and_linear_solver_takes_part():
    found = [c for c in ours() if isinstance(c, Ours)]
    natives = {n for n in tw.solvers.names() if not n.startswith("torchdeq.")}
    assert {c.solver for c in found} >= {n for n in natives if tw.solvers.owner(n) == "twnn_plugin"}
    assert {c.linear for c in found} - {None} == set(linear_solvers()) >= set(linear.names())


def test_failures_are_measured_and_not_believed(small):
    tight = Limits(3, 3, exactly=True)  # three evaluations are not enough
    quality = small.quality(Torchdeq("fixed_point_iter", "fixed_point_iter"), 1e-6, tight)
    assert quality.reason == "" and 0 < quality.failed_rows <= 10 and quality.residual > 1e-6
    quality = small.quality(Torchdeq("fixed_point_iter", "simple_fixed_point_iter"), 1e-3)
    assert quality.reason.startswith("TypeError")


@pytest.mark.parametrize("factor, expected", [(1.0, 1e-3), (0.05, 1e-2), (30.0, 1e-4)])
def test_the_loosest_tolerance_that_will_do(small, factor, expected):
    known = {tol: Quality(gradient_error=factor * tol) for tol in LADDER}
    found = small.loosest(Bare(), 1e-3, 1.05e-3, known)
    good = [tol for tol in LADDER if factor * tol <= 1.05e-3]
    assert found == max(good)
    if factor == 1.0:
        assert found == pytest.approx(expected)
    hopeless = {tol: Quality(gradient_error=1.0) for tol in LADDER}
    assert small.loosest(Bare(), 1e-3, 1.05e-3, hopeless) is None


# Whole runs ----------------------------------------------------------------------------------------


def test_a_quick_run_of_solvers(tmp_path):
    settings = Settings(quick=True, only=("easy",), budget=0.01)
    folder = run(find("solvers"), settings, out=tmp_path / "solvers", command="python -m benchmarks solvers")
    result = load(folder)
    assert [c["status"] for c in result["cells"]] == ["ok", "ok"]
    comparison = result["cells"][0]["data"]["comparisons"][0]
    names = {c.name for c in [*torchdeqs(True), *ours(True)]}
    for view, records in comparison["views"].items():
        assert {r["candidate"] for r in records} == names
        for record in records:
            if not record["converged"]:
                assert record["reason"]
            elif view == "equal gradient error":
                assert record["gradient_error"] <= comparison["target"]
            else:
                assert record["failed_rows"] == 0
    records = comparison["views"]["equal gradient error"]
    best = headline.fastest(records, "torchdeq", "total")
    assert best is not None and best["total_ratio"]["median"] == 1.0
    claimed = {claim["claim"] for claim in result["claims"]}
    assert "easy, small (`easy`), forward, tol 1e-03" in claimed
    assert (folder / "ratios.png").stat().st_size > 1000 and (folder / "work.png").stat().st_size > 1000
    table = (folder / "table.md").read_text()
    assert "| easy, small (`easy`), forward | 1.7x |" in table and "shows that everything works" in table
    assert all(r["calls"] >= 14 for r in result["cells"][1]["data"]["overhead"] if not r["reason"])


def test_a_quick_run_of_backward(tmp_path):
    settings = Settings(quick=True, only=("a_hard/depth5",), budget=0.01)
    folder = run(find("backward"), settings, out=tmp_path / "backward")
    ways = {r["candidate"]: r for r in load(folder)["cells"][0]["data"]["ways"]}
    assert {f"picard / {name}" for name in ("implicit", "unrolled", "phantom", "one_step")} <= set(ways)
    assert all(not r["reason"] for r in ways.values() if r["candidate"].startswith(("picard", "torchdeq")))
    # Five steps into a slow problem: the implicit gradient is nearer to the truth than the unrolled one.
    implicit, unrolled, one = (ways[f"picard / {n}"] for n in ("implicit", "unrolled", "one_step"))
    assert implicit["gradient_error"] < unrolled["gradient_error"] < one["gradient_error"]
    assert ways["torchdeq fixed_point_iter / phantom(depth)"]["gradient_error"] == pytest.approx(
        unrolled["gradient_error"], rel=0.1
    )
    assert (folder / "depth.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["solvers", "backward", "gpu"])
def test_a_run_in_which_everything_failed_is_still_written(name, tmp_path):
    benchmark = find(name)
    cells = [
        {"key": c.key, "options": c.options, "status": "failed", "reason": "no luck", "data": None}
        for c in benchmark.cells(Settings(device="cuda" if name == "gpu" else "cpu"))
    ]
    assert len({c["key"] for c in cells}) == len(cells)
    assert benchmark.tables(cells) and benchmark.plots(cells, tmp_path)
    assert all(claim.met in ("not measured", "-") for claim in benchmark.claims(cells))
    if name == "gpu":
        assert any("bf16" in c["key"] for c in cells) and any("overhead" in c["key"] for c in cells)


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([2.0, 3.0], "yes"),
        ([1.0, 3.0], "in part"),
        ([1.0], "no"),
        ([], "not measured"),
        ([None], "not measured"),
    ],
)
def test_verdicts(values, verdict):
    assert headline.met(values, 2.0) == verdict


def test_a_target_that_one_tolerance_misses_is_met_in_part_only():
    assert headline.met([3.0, None], 2.0) == "in part"
    assert headline.met([0.7], 0.75, at_least=False) == "yes"


def taken_apart(our_rows, our_ms, fewest_rows):
    """torchdeq makes 600 evaluations in 90 ms; in the bare loop one costs 0.1 ms."""

    def record(name, family, rows, ms):
        each = {"median": ms / 1e3}
        return {
            "candidate": name,
            "family": family,
            "converged": True,
            "rows": rows,
            "product_rows": rows,
            "forward": each,
            "total": each,
        }

    floor = {"rows": 500, "product_rows": 500, "reason": ""}
    floor |= {"forward": {"median": 0.05}, "backward": {"median": 0.05}}
    records = [
        record("torchdeq theirs", "torchdeq", 600, 90.0),
        record("fast", "ours", our_rows, our_ms),
        record("frugal", "ours", fewest_rows, 80.0),
    ]
    comparison = {"tol": 1e-3, "floor": floor, "views": {"equal gradient error": records}}
    options = {"kind": "problem", "problem": "c", "precision": "float32"}
    return [{"status": "ok", "options": options, "data": {"comparisons": [comparison]}}]


@pytest.mark.parametrize(
    "our_rows, our_ms, fewest_rows, why",
    [
        (100, 14.0, 100, "reached"),
        (200, 22.0, 160, "no solver of ours makes few enough"),
        (160, 20.0, 120, "frugal makes fewer"),
        (120, 18.0, 120, "it takes a price of 1.25"),
    ],
)
def test_a_ratio_is_that_of_the_evaluations_times_that_of_their_prices(our_rows, our_ms, fewest_rows, why):
    found = {b.phase: b for b in bounds.bounds(taken_apart(our_rows, our_ms, fewest_rows))}
    forward = found["forward"]
    assert forward.ratio == pytest.approx(90 / our_ms)
    assert forward.ratio == pytest.approx(forward.evaluations * forward.theirs / forward.ours)
    assert forward.evaluations == pytest.approx(600 / our_rows)
    assert forward.theirs == pytest.approx(1.5) and forward.ours == pytest.approx(our_ms / our_rows / 0.1)
    assert forward.alone == pytest.approx(9000 / our_rows / 10)
    assert why in forward.why()
    assert found["total"].theirs == pytest.approx(0.75)  # evaluations there and back


def test_autocast_reaches_the_map():
    bench = bench_of("easy", 0, "cpu", "bfloat16 autocast", 4)
    assert 1e-4 < bench.quality(Ours("picard"), 1e-2).gradient_error < 0.05
    assert bench_of("easy", 0, "cpu", batch=4).quality(Ours("picard"), 1e-6).gradient_error < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_quick_run_on_a_gpu(tmp_path):
    settings = Settings("cuda", True, only=("easy/", "depth5"), budget=0.01)
    folder = run(find("gpu"), settings, out=tmp_path / "gpu")
    assert all(c["status"] == "ok" for c in load(folder)["cells"])
    assert len(list(folder.iterdir())) <= 8


# The page ------------------------------------------------------------------------------------------


def test_the_page_is_made_from_the_committed_results():
    assert PAGE.read_text(encoding="utf-8") == render_index(), "run: python -m benchmarks index"


def test_the_page_says_what_was_not_measured():
    measured = {load(p.parent)["provenance"]["settings"]["device"] for p in RESULTS.glob("*/result.json")}
    for device, line in (("cpu", "not yet measured on a CPU"), ("cuda", "not yet measured on a GPU")):
        assert (line in PAGE.read_text(encoding="utf-8")) == (device not in measured)


def test_committed_results_are_whole_runs_of_small_files():
    for folder in {p.parent for p in RESULTS.glob("*/*")}:
        result = load(folder)
        assert not result["provenance"]["settings"]["quick"]
        assert (folder / "table.md").exists() and result["provenance"]["command"]
        files = list(folder.iterdir())
        assert len(files) <= 8 and all(f.stat().st_size < 2 * MB for f in files)


def test_the_page_follows_the_figures(tmp_path):
    first = tmp_path / "2026-01-02_toy_cpu"
    run(Toy(), Settings(), out=first, command="python -m benchmarks toy")
    page = render_index(tmp_path)
    assert "| cells | 3 | 2 | - | 3 | no |" in page and "Failed cells: cell1." in page
    assert "not yet measured on a GPU" in page and "not yet measured on a CPU" not in page
    second = tmp_path / "2026-02-03_toy_cpu"
    shutil.copytree(first, second)
    result = load(second)
    result["claims"][0]["ours"] = "17"
    (second / "result.json").write_text(json.dumps(result))
    newest = render_index(tmp_path)
    assert "| cells | 3 | 17 |" in newest and "| cells | 3 | 2 |" not in newest
