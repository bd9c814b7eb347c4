"""The training benchmark: its counts, its gates, what it chooses on, and its report."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twnn_plugin as tw
from benchmarks.harness import Settings, run
from benchmarks.harness.run import load
from benchmarks.training import report
from benchmarks.training.judge import (
    GATES,
    Pass,
    correct,
    judge_wormhole,
    percent,
    random_gate,
    run_gated,
    run_over,
)
from benchmarks.training.loop import BACKWARD, fit, forward_cost, open_up
from benchmarks.training.tasks import QUICK, TASKS, Part, build, parts
from benchmarks.training.unsure import Unsure, entropy
from benchmarks.wormholes import Wormholes

TASK = replace(QUICK["cued_digits"], rows=128)


@pytest.fixture(scope="module")
def made():
    return parts(TASK.dataset, TASK.img_size, TASK.rows, True)


@pytest.fixture(scope="module")
def trained(made):
    arm = TASK.arm("wormhole")
    arm = replace(arm, opening=replace(arm.opening, draws=(2,)))
    return fit(TASK, arm, made["train"], 0), arm.opening


def test_costs_are_those_of_the_convolutions(made):
    stem, layer1 = 9 * 8 * 400, 2 * 9 * 8 * 8 * 400
    layer2 = (9 * 8 * 16 + 9 * 16 * 16 + 8 * 16) * 100
    model = build(TASK, TASK.arm("plain")).train()
    assert forward_cost(model, made["train"].images[:1]) == stem + layer1 + layer2 + 16 * 10
    assert model.training


def test_training_is_counted(made, trained):
    rows = len(made["train"].labels) // TASK.recipe.batch * TASK.recipe.batch
    model, spent = fit(TASK, TASK.arm("plain"), made["train"], 0)
    cost = forward_cost(model, made["train"].images[:1])
    assert spent == (1 + BACKWARD) * cost * rows
    (opened, spent), _ = trained
    tw.configure(opened, policy="always", tol=1e-12, max_iter=2)
    seen = run_over(opened, Part(*[value[:10] for value in (made["val"].images, made["val"].labels)], {}))
    assert spent == (1 + BACKWARD) * rows * (cost + seen.extra)


def test_a_run_is_a_function_of_its_seed(made, trained):
    (first, _), opening = trained
    arm = replace(TASK.arm("wormhole"), opening=opening)
    again, _ = fit(TASK, arm, made["train"], 0)
    other, _ = fit(TASK, arm, made["train"], 1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.stem.conv.weight, other.stem.conv.weight)


def test_a_wormhole_that_begins_late_continues_the_plain_run(made):
    arm = TASK.arm("wormhole")
    late = replace(arm, opening=replace(arm.opening, begins=0.5, draws=(1,)))
    model, spent = fit(TASK, late, made["train"], 0)
    plain = fit(TASK, TASK.arm("plain"), made["train"], 0)[1]
    full = fit(TASK, replace(late, opening=replace(late.opening, begins=0.0)), made["train"], 0)[1]
    assert spent - plain == pytest.approx((full - plain) / 2)
    assert hasattr(model, "wormholes")


def test_each_path_is_taught_by_the_samples_that_it_answers_for(made):
    task = TASKS["fashion_mnist"]
    torch.manual_seed(0)
    model, opening = build(task, task.arm("wormhole")), replace(task.arm("wormhole").opening, taught=0.25)
    unsure = open_up(model, opening)
    assert unsure is not None
    with torch.no_grad():
        model.closed_head.heads[0].weight.add_(torch.randn_like(model.closed_head.heads[0].weight))
    images, labels = torch.randn(16, 1, 14, 14), torch.zeros(16, dtype=torch.long)
    answers = model.train()(images)
    (record,) = tw.report(model)
    closed, opened = tw.closed_logits(model), record.open
    assert opened.sum() == 4 and record.evaluations == 4 * max(opening.draws)
    assert entropy(closed)[opened].min() > entropy(closed)[~opened].max()
    assert torch.equal(answers[~opened], closed[~opened])
    assert not torch.equal(answers[opened], closed[opened])
    # The closed head learns nothing from the samples that are iterated, the open one nothing from the others.
    losses = F.cross_entropy(answers, labels, reduction="none")
    heads = model.fc.weight, model.closed_head.heads[0].weight
    mine, others = torch.autograd.grad(losses[opened].sum(), heads, retain_graph=True, materialize_grads=True)
    assert mine.any() and not others.any()
    mine, others = torch.autograd.grad(losses[~opened].sum(), heads, materialize_grads=True)
    assert others.any() and not mine.any()


def test_a_share_that_is_taught_costs_that_share(made):
    arm = TASK.arm("wormhole")
    some = replace(arm, opening=replace(arm.opening, draws=(1,), taught=0.25))
    model, spent = fit(TASK, some, made["train"], 0)
    every = fit(TASK, replace(some, opening=replace(some.opening, taught=1.0)), made["train"], 0)[1]
    plain = fit(TASK, TASK.arm("plain"), made["train"], 0)[1]
    assert spent - plain == pytest.approx((every - plain) / 4)
    assert not any(isinstance(module, Unsure) for module in model.modules())


def test_the_entropy_gate_opens_the_unsure_and_no_others(made):
    torch.manual_seed(0)
    task = TASKS["cued_digits"]
    model, opening = build(task, task.arm("wormhole")), task.arm("wormhole").opening
    open_up(model, opening)
    with torch.no_grad():
        for parameter in model.closed_head.parameters():
            parameter.add_(torch.randn_like(parameter))
    val = made["val"]
    unsure = Unsure(model, "layer2")
    tw.configure(model, policy="never")
    closed = run_over(model, val)
    assert closed.extra == 0 and not closed.opened.any()
    tw.configure(model, policy="always", tol=0.5, max_iter=12)
    opened = run_over(model, val)
    assert opened.opened.all() and opened.extra > 0
    unsure.threshold = float(entropy(closed.logits).quantile(0.7))
    tw.configure(model, policy=unsure)
    gated = run_over(model, val)
    assert torch.equal(gated.opened, entropy(closed.logits) > unsure.threshold)
    assert float(gated.opened.float().mean()) == pytest.approx(0.3, abs=0.01)
    expected = torch.where((gated.opened & opened.settled)[:, None], opened.logits, closed.logits)
    torch.testing.assert_close(gated.logits, expected, rtol=1e-4, atol=1e-5)
    assert 0 < gated.extra < opened.extra


def test_within_a_budget_the_share_is_chosen_on_validation_images(made, trained):
    (model, _), opening = trained
    cost = forward_cost(build(TASK, TASK.arm("plain")), made["train"].images[:1])
    both = {"val": made["val"], "test": made["val"]}
    chosen = []
    for most in (1.0, 1.5, 9.0):
        found = judge_wormhole(deepcopy(model), replace(opening, most=most), both, cost)
        gated, curve = found["gated"], found["gates"]["entropy"]["curve"]
        assert gated["wanted"] in opening.shares
        within = [p["accuracy"] for p in curve if p["cost"] <= most * cost] or [0.0]
        point = next(p for p in curve if p["wanted"] == gated["wanted"])
        assert point["accuracy"] >= max(within) - 0.1
        assert point["cost"] <= most * cost or gated["wanted"] == min(opening.shares)
        chosen.append(gated["wanted"])
    assert chosen[0] == min(opening.shares)


def test_nothing_is_chosen_on_the_test_part(made, trained):
    (model, _), opening = trained
    cost = forward_cost(build(TASK, TASK.arm("plain")), made["train"].images[:1])
    copy = deepcopy(model)  # calibrating moves the gate's threshold
    found = judge_wormhole(model, opening, made, cost)
    wrong = replace(made["test"], labels=(made["test"].labels + 1) % 10)
    other = judge_wormhole(copy, opening, {**made, "test": wrong}, cost)
    assert found["test"] != other["test"]
    for name in ("tol", "gate", "val", "tolerances"):
        assert found[name] == other[name]
    for kind in found["gates"]:
        assert found["gates"][kind]["threshold"] == other["gates"][kind]["threshold"]
    best = max(accuracy for accuracy, _ in found["tolerances"].values())
    good = [float(t) for t, (accuracy, _) in found["tolerances"].items() if accuracy >= best - 0.1]
    assert found["tol"] == max(good)
    # The curves, put together from two passes, agree with the passes that are really made.
    for kind in GATES:
        points = {point["wanted"]: point for point in found["gates"][kind]["curve"]}
        point, threshold = points[opening.share], found["gates"][kind]["threshold"]
        tw.configure(model, tol=found["tol"], max_iter=opening.max_iter)
        unsure = Unsure(model, "layer2")
        gated = run_gated(model, unsure, kind, threshold, opening, (made["val"], made["test"]), cost)
        assert gated["accuracy"] == pytest.approx(point["accuracy"])
        assert gated["share"] == pytest.approx(point["share"], abs=1e-3)
        assert abs(gated["followed"] - gated["wanted"]) < 0.15  # over a hundred images or so
        assert abs(gated["arriving"] - gated["wanted"]) < 0.15
        assert cost < gated["cost"] <= found["open_cost"]
        if kind == found["gate"]:
            assert {**gated, "random": point["random"]} == pytest.approx(found["gated"], abs=1e-3)
    assert sum(found["steps"]["histogram"]) == len(made["test"].labels)


def test_a_random_gate_is_taken_at_its_expected_accuracy():
    part = Part(torch.zeros(4, 1, 1, 1), torch.tensor([0, 0, 0, 1]), {})
    zeros, ones = (nn.functional.one_hot(torch.full((4,), k), 10).float() for k in (0, 1))
    some = torch.ones(4)
    opened = Pass(zeros, some > 0, some, some > 0, some, 0.0)
    assert (percent(correct(zeros, part)), percent(correct(ones, part))) == (75.0, 25.0)
    assert random_gate(0.2, ones, opened, part) == pytest.approx(0.2 * 75 + 0.8 * 25, abs=1e-3)


def test_a_quick_run_writes_everything(tmp_path):
    folder = run(Wormholes(), Settings(quick=True), out=tmp_path / "out", command="x")
    result = load(folder)
    assert [cell["status"] for cell in result["cells"]] == ["ok", "ok"]
    assert (folder / "result.json").stat().st_size < 100_000
    for name in ("cued_digits_cost.png", "cued_digits_steps.png", "cued_digits_samples.png"):
        assert 1000 < (folder / name).stat().st_size < 200_000
    page = (folder / "table.md").read_text()
    for words in (
        "plain backbone",
        "with a wormhole, closed",
        "with a wormhole, gated",
        "learned",
        "entropy",
    ):
        assert words in page
    assert all(claim["met"] in ("not measured", "yes", "no", "-") for claim in result["claims"])


def cell(arm, seed, accuracy, **more):
    options = {"task": "cued_digits", "arm": arm, "seed": seed}
    data = {"test": {"accuracy": accuracy}, "cost": 100, "training": 300, "parameters": 9, **more}
    return {"key": f"{arm}{seed}", "options": options, "status": "ok", "reason": "", "data": data}


def wormhole(seed, gated, random=80.0, share=0.5, followed=0.5, arriving=0.5):
    point = {"wanted": 0.5, "share": share, "accuracy": gated, "random": random, "cost": 150}
    return cell(
        "wormhole",
        seed,
        None,
        test={"closed": 80.0, "open": 96.0},
        open_cost=300,
        gates={"entropy": {"val_accuracy": 1.0, "curve": [point]}},
        gated={
            **{"wanted": 0.5, "share": share, "followed": followed, "arriving": arriving},
            **{"accuracy": gated, "random": random, "cost": 150},
        },
        tol=0.1,
        steps={
            "mean": 3.0,
            "settled": 1.0,
            "fixed_point": 1.0,
            "fixed_point_steps": 5.0,
            "fixed_point_accuracy": 96.0,
            "rank_correlation": {"distance": 0.5, "items": None},
        },
    )


@pytest.mark.parametrize(
    "gains, verdict",
    [
        ([6.0, 6.2, 5.8], "yes"),
        ([4.0, 0.0, 2.0], "in part"),
        ([0.2, 0.1, 0.3], "no"),
        ([6.0], "not measured"),
    ],
)
def test_claims_follow_the_figures(gains, verdict):
    cells = [cell("plain", seed, 85.0 + seed) for seed in range(len(gains))]
    cells += [wormhole(seed, 85.0 + seed + gain) for seed, gain in enumerate(gains)]
    claim = report.claims(cells)[0]
    assert claim.met == verdict
    assert f"{sum(gains) / len(gains):+.2f}" in claim.ratio and "1.50x" in claim.ours


def test_a_missed_share_is_told():
    cells = [wormhole(0, 90.0, share=0.515), wormhole(1, 90.0, share=0.47, followed=0.481, arriving=0.479)]
    off, followed, arriving = (c for c in report.claims(cells) if "open share" in c.claim)
    assert off.met == "no" and "-3.0" in off.ratio
    assert followed.met == "yes" and "-1.9" in followed.ratio
    assert arriving.met == "no" and "-2.1" in arriving.ratio


def test_halves_of_a_part_have_each_image_once(made):
    halves = [made["test"].every(2, first) for first in (0, 1)]
    for name in ("images", "labels"):
        whole, both = getattr(made["test"], name), [getattr(half, name) for half in halves]
        assert torch.equal(torch.cat(both), torch.cat([whole[0::2], whole[1::2]]))
    for name, value in made["test"].difficulty.items():
        assert torch.equal(halves[1].difficulty[name], value[1::2])


def test_intervals_are_students():
    middle, half = report.interval([1.0, 2.0, 3.0])
    assert middle == 2 and half == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-6)
    assert math.isnan(report.interval([1.0])[1])
    assert report.paired({0: 3.0, 2: 5.0}, {0: 1.0, 1: 9.0, 2: 2.0}) == [2.0, 3.0]


def test_failed_cells_leave_a_report(tmp_path):
    benchmark = Wormholes()
    cells = [
        {"key": c.key, "options": c.options, "status": "failed", "reason": "no luck", "data": None}
        for c in benchmark.cells(Settings(seeds=(0, 1)))
    ]
    assert len({c["key"] for c in cells}) == len(cells)
    assert benchmark.tables(cells)
    assert all(claim.met == "not measured" for claim in benchmark.claims(cells))
    half = [*cells, cell("plain", 7, 85.0)]
    assert "85.00" in str(benchmark.tables(half)[0].rows)
    benchmark.plots([c for c in half if c["options"]["task"] != "cued_digits"], tmp_path)


@pytest.mark.parametrize("follows", [True, False])
def test_the_entropy_gate_goes_after_a_share_where_it_is_told_to(made, trained, follows):
    model = deepcopy(trained[0][0]).eval()
    unsure = Unsure(model, "layer2", threshold=0.0)  # all are open, at first
    unsure.following = (0.25, 0.05) if follows else None
    tw.configure(model, policy=unsure)
    for _ in range(30):
        opened = run_over(model, made["val"]).opened.float().mean()
    assert (unsure.threshold > 0) is follows
    assert float(opened) == (pytest.approx(0.25, abs=0.1) if follows else 1.0)
