"""Points in the plane, and ``python -m benchmarks propagation``."""

from __future__ import annotations

import pytest
import timm
import torch

import twnn_plugin as tw
from benchmarks import propagation  # noqa: F401  (it registers itself)
from benchmarks.harness import Settings, find, run
from benchmarks.harness.run import load
from benchmarks.propagating.fused import propagate
from benchmarks.propagating.learn import GRID, regions
from benchmarks.propagating.nets import KINDS, Setting, build, chain_of, settings_of, train
from benchmarks.propagating.phase import figure2, figure3, packed, unpacked
from zoo.data.planar import PLANAR, peaks, planar, planar_label
from zoo.errors import ConfigError

# The sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANAR)
def test_labels_are_those_of_the_definition_and_classes_are_balanced(name):
    data = planar(name, train=200, val=100, test=1000)
    assert data.train.points.shape == (200, 2) and data.train.points.dtype == torch.float32
    for part in (data.train, data.val, data.test):
        assert torch.equal(planar_label(name, part.points), part.labels)
        count = part.labels.bincount()
        assert len(count) == data.classes and int(count.max() - count.min()) <= 1
        assert float(part.points.abs().max()) <= data.box
    assert planar_label(name, torch.tensor([[50.0, 0.0]])).tolist() == [1 + 1 if name == "peaks" else -1]


@pytest.mark.parametrize("name", PLANAR)
def test_draws_are_repeatable_and_parts_disjoint(name):
    data, again, other = (planar(name, train=100, val=100, test=100, seed=s) for s in (0, 0, 1))
    assert torch.equal(data.test.points, again.test.points)
    parts = [data.train, data.val, data.test, other.train, other.val, other.test]
    points = torch.cat([part.points for part in parts])
    assert len(points.unique(dim=0)) == len(points)


def test_peaks_is_the_function_of_that_name():
    # Its value at the origin is 3/e - 1/(3e), and its extremes on [-3, 3]^2 are known.
    zero = torch.zeros((), dtype=torch.float64)
    assert float(peaks(zero, zero)) == pytest.approx((3 - 1 / 3) / torch.e, abs=1e-12)
    axis = torch.linspace(-3, 3, 601, dtype=torch.float64)
    value = peaks(axis[:, None], axis)
    assert float(value.max()) == pytest.approx(8.1, abs=0.02)
    assert float(value.min()) == pytest.approx(-6.55, abs=0.02)


def test_sets_refuse_bad_arguments():
    with pytest.raises(ConfigError, match="Did you mean 'swiss_roll'"):
        planar("swissroll")
    with pytest.raises(ConfigError, match="train must be"):
        planar("peaks", train=0)
    with pytest.raises(ConfigError, match="seed must be"):
        planar("peaks", seed=-1)


# The poster -----------------------------------------------------------------------------------------


def test_figure_2_as_the_poster_describes_it():
    """K+ grows, K- collapses, K0 and the antisymmetric forms keep distances, in either convention."""
    records = figure2()
    assert len(records) == 14
    for r in records:
        end, least, most = r["distance_end"][-1], r["distance_least"][-1], r["distance_most"][-1]
        if r["operator"].startswith("K+") and r["panel"] in "b-":
            assert min(end) > 2
        elif r["panel"] in "c-":
            assert max(end) < 0.5
        else:
            assert least >= 0.5 and most <= 2
        assert len(unpacked(r["paths"][0])) == 2 * 22
    # K+ = 2 I - 2 E: 0.1 (1, 1) K+ = (0.2, 0), so that the first layer adds (h tanh 0.2, 0) in rows.
    first = next(r for r in records if r["panel"] == "b" and r["convention"] == "Y K")
    step = unpacked(first["paths"][0])[2:4]
    assert step == pytest.approx([0.1 + 0.1 * torch.tanh(torch.tensor(0.2)).item(), 0.1], abs=1e-4)


def test_figure_3_is_bounded_and_keeps_its_energy():
    for r in figure3():
        assert r["numbers"][-1] == 1000
        assert r["size"][-1] < 1.2 and r["drift"][-1] < 0.05 and r["undone"] < 1e-9
        assert r["size"][-1] < 1.05 * r["size"][0]  # the first 20 layers say what the 1000 will
        assert r["radius"] == pytest.approx(1, abs=1e-6)


# Learning -------------------------------------------------------------------------------------------


def test_networks_differ_in_their_layers_alone():
    for kind in KINDS:
        assert len(settings_of(kind)) == 4
        net = build(kind, 16, settings_of(kind)[0], 3, seed=1)
        same = build("resnet", 16, Setting(1.0), 3, seed=1)
        assert torch.equal(net[0].weight, same[0].weight) and torch.equal(net[2].weight, same[2].weight)
    plain, scaled = (build(kind, 16, Setting(1.0), 2, 0) for kind in ("resnet", "resnet, scaled"))
    torch.testing.assert_close(4 * chain_of(scaled).weight, chain_of(plain).weight)
    stable = chain_of(build("antisymmetric", 16, Setting(1.0, 8.0), 2, 0)).weight
    assert torch.equal(stable, stable[:1].expand_as(stable))
    assert chain_of(build("hamiltonian", 16, Setting(1.0, 8.0), 2, 0)).h == 0.5


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_training_learns_and_counts_what_it_skips():
    data = planar("circles", train=200, val=200, test=200)
    run_ = train("hamiltonian", 8, Setting(0.1, 10.0), data, seed=0, steps=60)
    assert run_.val > 0.9 and run_.skipped == 0
    broken = data.train.points.clone()
    broken[0] = torch.nan
    bad = type(data)(**{**data.__dict__, "train": type(data.train)(broken, data.train.labels)})
    assert train("hamiltonian", 8, Setting(0.1, 10.0), bad, seed=0, steps=3).skipped == 3
    grid = regions(run_.net, data)
    assert len(grid) == GRID and set("".join(grid)) == {"0", "1"}
    # The centre is of class 0.
    assert grid[GRID // 2][GRID // 2] == "0"


@pytest.mark.parametrize(
    ("name", "options"),
    [("euler", {}), ("antisymmetric", {"gamma": 0.3}), ("verlet", {"split": 3}), ("verlet", {"augment": 2})],
)
def test_the_fused_loop_has_the_value_and_the_gradients_of_the_propagator(name, options):
    torch.manual_seed(0)
    chain = tw.blocks.registry.make(name, features=5, layers=12, h=0.3, **options).double()
    torch.nn.init.normal_(chain.bias)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for run_ in (chain, lambda x: propagate(chain, x)):
        out = run_(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *chain.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_paths_survive_packing():
    assert unpacked(packed(torch.tensor([0.1, -20.0, 100.0, 0.12341, 0.0]))) == [0.1, -20, 100, 0.1234, 0]


def test_a_quick_run(tmp_path):
    settings = Settings(quick=True, seeds=(0, 1))
    folder = run(find("propagation"), settings, out=tmp_path / "run")
    result = load(folder)
    assert all(cell["status"] == "ok" for cell in result["cells"])
    assert [c["met"] for c in result["claims"]] == ["yes"] * 9
    plots = {p.name for p in folder.glob("*.png")}
    assert plots == {"figure2.png", "figure3.png", "depth.png", "gradients.png", "regions.png"}
    assert all((folder / name).stat().st_size > 1000 for name in plots)
    text = (folder / "table.md").read_text()
    for title in ("Figure 2", "Figure 3", "Test accuracy", "Signals and gradients", "Smooth weights"):
        assert f"## {title}" in text
    learned = [c["data"] for c in result["cells"] if c["options"]["kind"] == "learn"]
    assert len(learned) == 2 * len(KINDS)
    assert all(d["gradient_end"]["spread"] is not None and len(d["runs"]) == 2 for d in learned)


def test_a_run_in_which_everything_failed_is_still_written(tmp_path):
    benchmark = find("propagation")
    cells = [
        {"key": c.key, "options": c.options, "status": "failed", "reason": "no luck", "data": None}
        for c in benchmark.cells(Settings())
    ]
    assert len({c["key"] for c in cells}) == len(cells)
    assert benchmark.tables(cells) == [] and benchmark.plots(cells, tmp_path) == []
    claims = benchmark.claims(cells)
    assert len(claims) == 2 + 6 and all(claim.met == "not measured" for claim in claims)


# The image networks ---------------------------------------------------------------------------------


def images(batch=2, size=16):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(**options):
    from zoo.models import PropagationNet

    torch.manual_seed(0)
    return PropagationNet(**{"widths": (4, 6, 8), **options})


def test_image_networks_go_on_for_the_same_time_whatever_their_depth():
    for kind, block in (("euler", "Euler"), ("antisymmetric", "Antisymmetric"), ("hamiltonian", "Verlet")):
        for depth in (2, 8):
            body = network(kind=kind, depth=depth, time=4.0).layer2.body
            assert type(body).__name__ == block and body.layers * body.h == pytest.approx(4)


def test_a_reversible_network_has_the_gradients_of_the_plain_one():
    grads = []
    for reversible in (False, True):
        net = network(depth=4, reversible=reversible, act_layer="silu").double()
        net(images().double()).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


def test_a_stage_keeps_apart_what_differs():
    report = tw.stability(network(depth=6).layer1, torch.randn(4, 4, 8, 8), rows=1)
    assert report.layers == ("Verlet",) * 6
    assert float(report.distance.amin()) > 0.5 and float(report.distance.amax()) < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hamiltonean"}, "Did you mean 'hamiltonian'"),
        ({"depth": 0}, "depth must be"),
        ({"time": 0.0}, "time must be"),
        ({"act_layer": "tahn"}, "act_layer must be"),
        ({"gamma": 0.1}, "gamma damps antisymmetric"),
        ({"kind": "euler", "reversible": True}, "Only hamiltonian"),
        ({"widths": (16, 32)}, r"three stages.*got \(16, 32\)"),
        ({"widths": (16, 32, 0)}, "at least 1"),
        ({"widths": (16, 32, 64.0)}, "whole numbers"),
        ({"widths": 16}, "three stages"),
    ],
)
def test_image_networks_refuse_bad_options(options, message):
    with pytest.raises(tw.OptionError, match=message):
        network(**options)


def test_registered_image_networks_take_a_depth_and_no_other_kind():
    model = timm.create_model("hamiltonian_20", depth=4, widths=[4, 6, 8])
    assert [stage.body.layers for stage in (model.layer1, model.layer2, model.layer3)] == [4, 4, 4]
    assert type(timm.create_model("euler_20", kind="euler").layer1.body).__name__ == "Euler"
    with pytest.raises(tw.OptionError, match=r"of the kind 'hamiltonian'.*euler_20, antisymmetric_20"):
        timm.create_model("hamiltonian_20", kind="euler")
