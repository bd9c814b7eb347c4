"""The benchmarks ``models``, ``memory``, ``profile`` and ``gpu``, and the index page's rows of the seeds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from benchmarks import gpu as gpu_set
from benchmarks import seeds
from benchmarks.gpu import LAST_END_S, LAST_START_S, Gpu, OutOfTime
from benchmarks.harness import BenchError, Cell, Settings, find
from benchmarks.harness.run import load, rounded, run
from benchmarks.memories.report import series
from benchmarks.modelling import papers, report
from benchmarks.modelling.arms import ARMS, SCALES, Arm, arms
from benchmarks.modelling.networks import Deep, Shape
from benchmarks.modelling.train import Run, fit
from benchmarks.models import present
from benchmarks.profile import earlier, shares
from benchmarks.training.tasks import Part
from twnn_plugin.selection import selection_of

from .test_data import cifar_archive  # noqa: F401  (a fixture)

SHAPE = Shape(1, 10, 14, "small")
needs_fashion = pytest.mark.skipif(
    not present("fashion_mnist"), reason="Fashion-MNIST is not on this machine"
)


@pytest.fixture(scope="module")
def made():
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 10
    images = 0.1 * torch.randn(96, 1, 14, 14, generator=generator)
    images[torch.arange(96), 0, labels, :] += 2
    part = Part(images, labels, {})
    return {name: part for name in ("train", "val", "test", "look")}


def arm_of(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)


def scale(updates: int):
    return replace(SCALES["gpu"], updates=updates, batch=16, looks=2)


# The networks ------------------------------------------------------------------------------------------


def test_the_arms_are_what_is_compared():
    names = [arm.name for arm in arms(quick=False)]
    assert len(set(names)) == len(names)
    assert {"plain", "longer", "wider", "twnn", "dynalay", "cnn3", "hamiltonian"} <= set(names)
    assert {"deq", "deq_anderson", "deq_broyden", "deq_phantom", "deq_unrolled"} <= set(names)
    assert all(arm.source and len(arm.rates) == len(ARMS[0].rates) for arm in ARMS)  # the same effort for all


def test_deep_resnets_have_as_many_layers_as_their_names_say_and_a_stem_for_small_images():
    for layers in (36, 50):
        model = Deep(layers=layers).build(SHAPE)
        shortcuts = sum("downsample" in name for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
        convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules()) - shortcuts
        assert convolutions + 1 == layers
        assert model.conv1(torch.zeros(1, 1, 14, 14)).shape[-1] == 14  # type: ignore[operator]


@pytest.mark.parametrize("name", ["twnn", "dynalay", "deq_unrolled"])
def test_every_kind_trains_and_can_be_dialled(name, made):
    arm = arm_of(name)
    before = Run(arm, SHAPE, scale(2), made, 1e-2, 0, "cpu", False)
    weights = copy.deepcopy(before.model.state_dict())
    before.until(1.0)
    assert any(not torch.equal(weights[key], value) for key, value in before.model.state_dict().items())
    model = arm.network.in_use(before.model, SHAPE).eval()
    arm.network.ready(model, made["val"])
    with torch.no_grad():
        assert model(made["test"].images).shape == (96, 10)
        labels = []
        for label, other in arm.network.dial(model, made["val"], SHAPE):
            other(made["test"].images)
            labels.append(label)
    assert len(set(labels)) == len(labels) >= 4
    if name == "deq_unrolled":
        assert model is not before.model and int(model.last_info["nstep"].max()) > 1  # type: ignore[operator,union-attr]
    if name == "twnn":  # attached on the way, and trained from there on
        known = {id(p) for group in before.optimizer.param_groups for p in group["params"]}
        assert known == {id(p) for p in before.model.parameters()}
        assert "wormholes" in dict(before.model.named_children())
    if name == "dynalay":
        assert selection_of(model) is not None


def test_multiply_adds_and_updates_add_up(made):
    arm = replace(arm_of("plain"), share={"small": 0.5})
    one = Run(arm, SHAPE, scale(12), made, 1e-2, 0, "cpu", False)
    one.until(1.0)
    assert one.total == one.updates == 6 and [point[0] for point in one.curve] == [3, 6]
    # A forward pass, twice as much backward, less the gradient of the images, which nobody wants.
    assert 2.5 * 645_216 * 16 * 6 < one.multiply_adds < 3 * 645_216 * 16 * 6
    assert one.curve[0][4] == pytest.approx(one.multiply_adds / 2)


def test_the_best_rate_on_validation_data_goes_on(made):
    arm = replace(arm_of("plain"), rates=(1e-7, 2e-2))
    best, told = fit(arm, SHAPE, scale(40), made, 0, "cpu")
    assert told["rate"] == 2e-2 and best.updates == told["updates"] == 40
    assert told["tried"]["0.02"] >= told["tried"]["1e-07"] and told["curve"][-1][-1] > 0.3
    assert told["tried"]["0.02"] == told["curve"][0][-1]  # what was known when it was chosen
    _, same = fit(arm, SHAPE, scale(40), made, 0, "cpu")
    assert [p[-1] for p in same["curve"]] == [p[-1] for p in told["curve"]]


def test_a_gradient_that_is_not_finite_ends_the_run_in_the_open(made):
    arm = replace(arm_of("plain"), rates=(float("inf"),))
    with pytest.raises(RuntimeError, match="plain became"):
        fit(arm, SHAPE, scale(8), made, 0, "cpu")


def test_full_goes_with_models_alone():
    settings = Settings(full=True)
    with pytest.raises(BenchError, match="--full"):
        run(find("memory"), settings, out=None)
    cells = find("models").cells(settings)
    assert all(cell.options["scale"] == "full" for cell in cells)
    with pytest.raises(BenchError, match="--quick"):
        run(find("models"), Settings(full=True, quick=True), out=None)


# What is claimed -----------------------------------------------------------------------------------------


def record(name, seed, accuracy, points, share=1.0, **work):
    training = {
        "rate": 0.01,
        "updates": 10,
        "seconds": {"forward": 1.0, "backward": 2.0, "step": 0.0},
        "multiply_adds": 1e9,
        "curve": [[k, t, 0.0, 0.0, 1e6 * t, a] for k, (t, a) in enumerate(points)],
    }
    spread = {"median": work.get("ms", 1.0), "n": 1}
    timed = {f"{p}{s}": spread for p in ("forward", "backward", "total") for s in ("", "_ratio")}
    data = {
        "data": "digits, 5 images, 8x8",
        "share": share,
        "parameters": 5,
        "training": training,
        "work": {**timed, "peak_bytes": 1e6},
        "test": {"accuracy": accuracy, "nll": 1.0, "ece": 2.0, "multiply_adds": 1e6},
        "latency": {b: {**spread, "ratio": spread} for b in ("1", "256")},
        "curve": [],
    }
    options = {"kind": "model", "dataset": "digits", "arm": name, "seed": seed, "precision": "float32"}
    return {"key": f"{name}{seed}", "options": options, "status": "ok", "reason": "", "data": data}


def test_time_to_equal_accuracy_is_to_the_lower_of_the_two():
    ours = [record("twnn", s, 80, [(1, 0.5), (2, 0.8), (3, 0.9)]) for s in (0, 1)]
    theirs = [record("deq", s, 80, [(4, 0.5), (8 + s, 0.8)]) for s in (0, 1)]
    (claim,) = [c for c in find("models").claims([*ours, *theirs]) if "training time" in c.claim]
    assert (
        claim.met == "yes"
        and claim.ratio.startswith("4.2 (4.0 to 4.5) times faster")
        and "80.0 %" in claim.claim
    )
    slower = [record("deq", s, 80, [(4, 0.5), (4 + 4 * s, 0.8)]) for s in (0, 1)]
    (claim,) = [c for c in find("models").claims([*ours, *slower]) if "training time" in c.claim]
    assert claim.met == "in part"


def test_a_claim_about_networks_trained_for_less_is_not_decided():
    cells = [record("twnn", 0, 90, [(1, 0.9)]), record("resnet50", 0, 50, [(1, 0.5)], share=0.01)]
    found = report.found_on(cells, "digits")
    by_words = {claim.said: papers.judged(claim, found) for claim in papers.CLAIMS}
    *_, sentence, met = by_words["TWNN is more accurate than ResNet-50"]
    assert met == "not measured" and "10 updates alone" in sentence
    cells = [record("dynalay", s, 90 + s, [(1, 0.9)], ms=3.0) for s in (0, 1)]
    cells += [record("cnn3", s, 90.5, [(1, 0.9)], ms=2.0) for s in (0, 1)]
    found = report.found_on(cells, "digits")
    by_words = {claim.said: papers.judged(claim, found) for claim in papers.CLAIMS}
    assert by_words["DynaLay is more accurate than the three-layer CNN"][2:] == (
        "Holds here on 1 of 2 seeds.",
        "in part",
    )
    assert by_words["DynaLay's backward pass is faster than the three-layer CNN's"][3] == "no"


@needs_fashion
def test_a_quick_run_of_models_writes_everything(tmp_path):
    settings = Settings(quick=True, only=("/plain/", "/twnn/"), budget=0.1)
    folder = run(find("models"), settings, out=tmp_path / "models")
    result = load(folder)
    assert [cell["status"] for cell in result["cells"]] == ["ok", "ok"]
    plain, twnn = (cell["data"] for cell in result["cells"])
    assert plain["test"]["multiply_adds"] == 645_216 < twnn["test"]["multiply_adds"]
    assert 0 < plain["test"]["ece"] < 100 and set(plain["latency"]) == {"1", "256"}
    costs = [point["multiply_adds"] for point in twnn["curve"]]
    assert costs[0] < costs[-1] and twnn["curve"][-1]["share"] == 1.0
    page = (folder / "table.md").read_text(encoding="utf-8")
    assert ("Settings, and where they come from" in page and "Does not hold" in page) or "Holds here" in page
    assert (folder / "fashion_mnist.png").stat().st_size > 5000


def test_cifar_takes_part_where_it_is_present(cifar_archive, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TWNN_DATA_DIR", str(cifar_archive.parent))
    present.cache_clear()
    try:
        cells = find("models").cells(Settings(seeds=(0,), budget=0.01))
    finally:
        present.cache_clear()
    (cell,) = [c for c in cells if c.key == "cifar10/plain/seed0"]
    assert not any(c.options["dataset"] == "cifar100" for c in cells)
    cell.options["scale"] = "quick"
    data = find("models").run_cell(cell, Settings(quick=True, budget=0.01))
    assert data["data"] == "cifar10, 180 images, 14x14" and data["training"]["updates"] == 2
    assert data["parameters"] == 19_810 + 2 * 8 * 9  # three channels instead of one


# Memory, profile, gpu --------------------------------------------------------------------------------------


def test_memory_of_unrolling_grows_and_of_the_implicit_gradient_does_not(tmp_path):
    folder = run(find("memory"), Settings(quick=True, only=("depth/",)), out=tmp_path / "memory")
    result = load(folder)
    found = series(result["cells"], "depth")
    few, many = sorted(found["picard / unrolled"])
    grown = {name: by[many] / by[few] for name, by in found.items() if by[few] and by[many]}
    assert grown["picard / unrolled"] > 1.5 and grown["torchdeq phantom(depth)"] > 1.5
    assert grown["picard / implicit(picard)"] == pytest.approx(1, abs=0.02)
    assert all(r["reason"] == "" for c in result["cells"] for r in c["data"]["ways"].values())
    claim = result["claims"][0]
    assert claim["met"] == "yes" and claim["claim"].startswith(f"peak memory at {many} iterations")


def test_a_profile_is_numbers_and_knows_what_was_before(tmp_path):
    folder = run(
        find("profile"),
        Settings(quick=True, only=("plain, in use",)),
        out=tmp_path / "2026-01-01_profile_cpu",
    )
    (cell,) = load(folder)["cells"]
    data = cell["data"]
    assert 20 < data["operations"] < 60 and data["multiply_adds"] == 645_216 * 8
    assert (
        any("conv" in top["name"] for top in data["top"])
        and 0.5 < sum(t["share"] for t in data["top"]) <= 1.001
    )
    before = earlier(cell["key"], "cpu", tmp_path)
    assert before is not None and before["operations"] == data["operations"]
    assert earlier(cell["key"], "cuda", tmp_path) is None
    assert (folder / "result.json").stat().st_size < 10_000


def test_time_on_a_gpu_is_that_of_its_kernels_listed_by_operation():
    """torch's profiler has each kernel twice: as an event, and as the time of what launched it."""

    def event(number, name, device, begin, end):
        made = {"id": number, "name": name, "start_us": begin, "end_us": end, "device_type": device}
        return FunctionEvent(**made, thread=0, use_device="cuda", stack=[])

    kernels = [("gemm", "aten::mm", 750), ("gemm", "aten::mm", 150), ("relu", "aten::relu", 100)]
    events, now = [], 0
    for number, (kernel, operation, long) in enumerate(kernels):
        launching = event(2 * number, operation, DeviceType.CPU, 10 * number, 10 * number + 5)
        launching.append_kernel(kernel, 0, long)
        events += [launching, event(2 * number + 1, kernel, DeviceType.CUDA, 100 + now, 100 + now + long)]
        now += long
    found = EventList(events, use_device="cuda")
    found._build_tree()  # as the profiler does when it stops
    averages = found.key_averages()
    told = shares(averages, 2, "cuda")
    assert "Self CUDA time total: 1.000ms" in averages.table()
    assert told["self_ms"] == 0.5 and told["calls"] == 1.5  # of two passes
    assert [(top["name"], top["calls"], top["share"]) for top in told["top"]] == [
        ("aten::mm", 1.0, pytest.approx(0.9)),
        ("aten::relu", 0.5, pytest.approx(0.1)),
    ]


def test_the_gpu_set_has_the_newer_benchmarks_in_both_precisions_and_ends_in_time(monkeypatch):
    gpu = Gpu()
    with pytest.raises(BenchError, match="--quick"):
        gpu.check(Settings())
    cells = gpu.cells(Settings("cuda"))
    assert len({cell.key for cell in cells}) == len(cells)
    for kind in ("problem", "depth", "model", "memory", "shipped"):
        precisions = {c.options["precision"] for c in cells if c.options["kind"] == kind}
        assert precisions == {"float32", "bfloat16 autocast"}, kind
    gpu._begin = -1e9
    with pytest.raises(OutOfTime, match="--resume"):
        gpu.run_cell(cells[0], Settings("cuda"))


@pytest.fixture
def clock(monkeypatch):
    """Time passes only in cells, as long as the test says by their keys."""

    class Owner:
        now, takes = 1000.0, {}

        def monotonic(self):
            return self.now

        def run_cell(self, cell, settings):
            self.now += self.takes[cell.key]
            return {}

    fake = Owner()
    monkeypatch.setattr(gpu_set, "time", fake)
    monkeypatch.setattr(gpu_set, "find", lambda name: fake)
    return fake


def done_of(gpu, clock, device, *takes):
    """Which of these cells, kind and seconds, are run."""
    ran = []
    for number, (kind, seconds) in enumerate(takes):
        clock.takes[str(number)] = seconds
        try:
            gpu.run_cell(Cell(str(number), {"kind": kind}), Settings(device))
            ran.append(number)
        except OutOfTime as error:
            assert "--resume runs it" in str(error)
    return ran


def test_a_gpu_cell_that_might_end_too_late_is_not_begun(clock):
    long = ("model", 80.0)
    filled = LAST_END_S - 2 * 80.0
    cells = (("depth", filled), long, ("depth", 5.0), ("memory", 1.0), long, long, ("memory", 1.0))
    gpu = Gpu()
    # The second depth cell might take as long as the first, and the third model would end after the others.
    assert done_of(gpu, clock, "cuda", *cells) == [0, 1, 3, 6]
    assert clock.now - 1000.0 < LAST_END_S < 480
    gpu.check(Settings("cuda"))  # another run, of another eight minutes
    assert done_of(gpu, clock, "cuda", ("depth", 1.0), long) == [0, 1]
    assert done_of(Gpu(), clock, "cpu", *cells) == list(range(len(cells)))


def test_a_gpu_cell_of_a_new_kind_is_not_begun_after_the_last_start(clock):
    assert done_of(Gpu(), clock, "cuda", ("depth", LAST_START_S + 1), ("memory", 0.0)) == [0]
    assert done_of(Gpu(), clock, "cuda", ("depth", LAST_START_S - 1), ("memory", 0.0)) == [0, 1]


def test_a_quick_gpu_set_on_a_cpu_writes_at_most_eight_small_files(tmp_path):
    only = ("depth/3", "twnn_prefix")
    settings = Settings(quick=True, only=only, budget=0.01)
    folder = run(find("gpu"), settings, out=tmp_path / "gpu")
    result = load(folder)
    assert all(cell["status"] == "ok" for cell in result["cells"]) and len(result["cells"]) == 4
    assert len(list(folder.iterdir())) <= 8
    assert "bfloat16 autocast" in (folder / "table.md").read_text(encoding="utf-8")


# The page ------------------------------------------------------------------------------------------------


def test_seed_rows_without_a_result_say_so_and_with_one_take_its_figures():
    page = seeds.section({})
    assert page.count(seeds.NOT_YET) == len(seeds.ROWS) == 11
    claim = {"claim": "figure 3, layers", "ours": "61.7 %", "ratio": "seeds 3", "met": "yes"}
    cell = {"data": {"data": "fashion_mnist, 9 images"}, "options": {}}
    result = {"claims": [claim], "cells": [cell, cell]}
    page = seeds.section({"dynalay": ("2026-01-01_dynalay_cpu", result)})
    (line,) = [line for line in page.splitlines() if "61.7 %" in line]
    assert "| fashion_mnist, 9 images |" in line and "not reproduced: other data; on these: holds |" in line
    cell["data"] = {"data": "cifar10, 9 images"}
    assert "| reproduced |" in seeds.section({"dynalay": ("x", result)})
    claim["met"] = "no"
    assert "| not reproduced |" in seeds.section({"dynalay": ("x", result)})


def test_results_are_rounded_and_a_line_a_cell():
    assert rounded({"a": [1 / 3, 2, True, None, "x"], "b": (1e-9 / 7,)}) == {
        "a": [0.333333, 2, True, None, "x"],
        "b": [1.42857e-10],
    }
    assert json.loads(json.dumps(rounded(12345678.9))) == 12345700.0
