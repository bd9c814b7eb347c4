"""The models that iterate until they are done: shapes, recall, settings, statuses, weights that ship."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch

import twnn_plugin as tw
from zoo.models import REASONING
from zoo.models.reasoning import WEIGHTS, PrefixNet
from zoo.models.reasoning_cells import Patches, RecallCell
from zoo.tasks import TASKS, alignment, curve, mazes, prefix_sums, score, task_of_model
from zoo.tasks.run import load_model

SHIPPED = ("twnn_prefix", "twnn_maze")
INPUTS = {"prefix_sums": (3, 1, 20), "mazes": (3, 3, 24, 24), "pathfinder": (3, 1, 32, 32)}


def fresh(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def inputs_of(name):
    shape = INPUTS[task_of_model(name).name]
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).round()


@pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", REASONING)
def test_shapes_and_gradients(name):
    x = inputs_of(name)
    model = fresh(name)
    places = () if name.endswith("pathfinder") else (x.shape[-1],) if x.dim() == 3 else x.shape[-2:]
    assert model(x).shape == (3, 2, *places)
    model.train()(x).logsumexp(1).mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert name in timm.list_models("*")


@pytest.mark.parametrize("task", ["prefix", "maze", "pathfinder"])
def test_baselines_have_as_many_parameters(task):
    sizes = {n: sum(p.numel() for p in fresh(n).parameters()) for n in REASONING if n.endswith(task)}
    ours = sizes[f"twnn_{task}"]
    assert all(abs(size - ours) < 0.12 * ours for size in sizes.values()), sizes
    assert ours <= {"prefix": 20_000, "maze": 25_000, "pathfinder": 40_000}[task]


@pytest.mark.parametrize("name", ["twnn_prefix", "twnn_maze", "twnn_pathfinder"])
def test_configure_and_report(name):
    model, x = fresh(name), inputs_of(name)
    model(x)
    (record,) = tw.report(model)
    assert record.steps.shape == (3,) and record.status.tolist() == [int(tw.Status.converged)] * 3
    tw.configure(model, tol=1e-12, max_iter=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tw.ConvergenceWarning)
        model(x)
    (record,) = tw.report(model)
    assert record.steps.tolist() == [2] * 3 and bool(record.fallback.all())
    with pytest.raises(tw.errors.OptionError, match="tol"):
        tw.configure(model, tolerance=1)


def test_the_model_solves_the_equation_of_its_steps():
    model, bits = fresh("twnn_prefix"), inputs_of("twnn_prefix")
    tw.configure(model, tol=1e-6)
    logits = model(bits)
    x = model.inject(bits)
    z = model.blank(x)
    for _ in range(200):
        z = model.step(z, x)
    torch.testing.assert_close(model.read(z, x), logits, atol=1e-4, rtol=1e-4)
    (record,) = tw.report(model)
    assert torch.equal(model.solved()[0], record.steps)


def test_the_input_enters_at_every_step_and_without_recall_at_none():
    bits = inputs_of("twnn_prefix")
    for name, recalled in (("twnn_prefix", True), ("rnn_prefix", False)):
        model = fresh(name)
        x, other = model.inject(bits), model.inject(1 - bits)
        z = torch.randn_like(model.blank(x))
        assert torch.equal(model.step(z, x), model.step(z, other)) != recalled


def test_samples_do_not_influence_each_other():
    model, bits = fresh("twnn_prefix"), inputs_of("twnn_prefix")
    together = model(bits)
    steps = model.solved()[0]
    for row in range(3):
        torch.testing.assert_close(model(bits[row : row + 1])[0], together[row])
        assert int(model.solved()[0]) == int(steps[row])


def test_a_latching_cell_never_lets_go_and_always_ends():
    torch.manual_seed(1)
    cell = RecallCell(8, 3, blocks=1, latching=True)
    for p in cell.parameters():
        p.data.mul_(5)  # a tanh cell with such weights never settles
    x, z = torch.randn(2, 3, 9, 9), torch.zeros(2, 8, 9, 9)
    for _ in range(400):
        before, z = z, cell(torch.cat([z, x], dim=1))
        assert (z >= before).all() and z.max() <= 1
    assert torch.equal(z, before)


@pytest.mark.parametrize("name", ["twnn_pathfinder", "ff_pathfinder"])
def test_questions_are_answered_between_features_and_pooling(name):
    model, plain = (timm.create_model(name, questions=n).eval() for n in (3, 0))
    part = {k: v for k, v in model.state_dict().items() if not k.startswith(("answers.", "fc."))}
    missing, more = plain.load_state_dict(part, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not more
    images = torch.rand(2, 1, 32, 32)
    features = model.forward_features(images)
    torch.testing.assert_close(features, plain.forward_features(images))
    best = model.answers(features).amax(dim=(2, 3))
    assert best.shape == (2, 3) and model.head_hidden_size == 3
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), best)
    torch.testing.assert_close(model(images), model.fc(best))
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images).shape == (2, 3)
    for wrong in (-1, True, 1.5):
        with pytest.raises(tw.errors.OptionError, match="questions must be a whole number"):
            timm.create_model(name, questions=wrong)


def test_patches_cover_every_pixel_that_matters():
    patches = Patches(3)
    image = mazes(9, 2).inputs
    tokens = patches.cut(image) + 0.5
    assert tokens.shape == (2, 108, 5, 5)
    counted = patches.join(patches.cut(torch.ones_like(image)) + 0.5)
    torch.testing.assert_close(patches.join(tokens), image * counted)
    assert (counted[:, :, 1:-1, 1:-1] >= 1).all()
    model = fresh("twnn_maze")
    assert model(torch.rand(2, 3, 25, 31)).shape == (2, 2, 25, 31)
    assert model(torch.rand(1, 3, 5, 5)).shape == (1, 2, 5, 5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: timm.create_model("twnn_prefix", num_classes=3), "num_classes is 2"),
        (lambda: timm.create_model("twnn_maze", in_chans=1), "in_chans 3"),
        (lambda: PrefixNet(loop="wormhol"), "Did you mean 'wormhole'"),
        (lambda: timm.create_model("deq_prefix", tol=1), "tol"),
        (lambda: timm.create_model("twnn_prefix", solver="picrad"), "Did you mean 'picard'"),
        (lambda: timm.create_model("twnn_prefix")(torch.ones(2, 8)), r"\(B, 1, n\)"),
        (lambda: timm.create_model("twnn_prefix")(torch.ones(2, 1, 8, dtype=torch.long)), "int64"),
        (lambda: timm.create_model("ff_maze")(torch.ones(2, 1, 8, 8)), r"\(B, 3, H, W\)"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises((ValueError, KeyError), match=said):
        make()


@pytest.mark.filterwarnings("ignore::twnn_plugin.errors.ConvergenceWarning")
@pytest.mark.parametrize("name", REASONING)
def test_a_saved_model_comes_back_from_its_folder(name, tmp_path):
    options = {} if name.startswith("ff_") else {"width": 12}
    model, x = fresh(name, **options), inputs_of(name)
    timm.models.save_for_hf(model, str(tmp_path))
    torch.manual_seed(1)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.num_features == model.num_features and torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_ship_with_a_card(name):
    file = WEIGHTS / f"{name}.safetensors"
    assert file.stat().st_size < 5e6
    card = (WEIGHTS / f"{name}.md").read_text(encoding="utf-8")
    for said in ("Data", "seed", "twnn train --model " + name, "right"):
        assert said in card, said
    loaded, _ = load_model(name)
    again = timm.create_model(name, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(fresh(name).parameters()), next(again.parameters()))


def test_shipped_prefix_weights_read_longer_strings():
    model, _ = load_model("twnn_prefix")
    means = []
    for bits in (32, 128, 512):
        found = score(model, prefix_sums(bits, 6, 5, "test"))
        assert bool(found.right.all()) and bool(found.converged.all())
        means.append(float(found.steps.float().mean()))
    assert means[1] > 2.5 * means[0] and means[2] > 2.5 * means[1]  # steps grow with the length


def test_shipped_maze_weights_solve_larger_mazes_and_think_longer_about_deep_ones():
    model, _ = load_model("twnn_maze")
    examples = mazes(33, 24, 5, "test")
    found = score(model, examples)
    assert bool(found.right.all()) and bool(found.converged.all())
    rank = found.figures()["rank_correlation"]["dead_end"]
    assert rank is not None and rank > 0.8
    small = score(model, mazes(9, 24, 5, "test"))
    assert bool(small.right.all()) and found.steps.float().mean() > 2 * small.steps.float().mean()


def test_score_counts_failures_as_failures():
    model = fresh("twnn_prefix")
    tw.configure(model, tol=1e-12, max_iter=3)
    found = score(model, prefix_sums(8, 6), batch_size=4)
    assert not found.converged.any() and found.steps.tolist() == [3] * 6
    figures = found.figures()
    assert figures["converged"] == 0 and figures["not_converged"] == 6
    assert figures["rank_correlation"]["ones"] is None  # all took the same number
    assert figures["wrong"] == int((~found.right).sum())


def test_curve_and_alignment():
    model, _ = load_model("twnn_prefix")
    examples = prefix_sums(64, 16, 0, "test")
    right, change = curve(model, examples, 40)
    assert len(right) == len(change) == 40
    assert right[0] == 0 and right[-1] == 1 and change[-1] < 1e-2 < change[0]
    # A fresh cell contracts: where it began is forgotten. A latching one keeps what was written.
    aligned = alignment(fresh("twnn_prefix"), examples, 60)
    assert aligned["cosine"] > 0.9999 and aligned["answers"] == 1
    kept = alignment(load_model("twnn_maze")[0], mazes(9, 16, 0, "test"), 200)
    assert kept["cosine"] < 0.999


def test_every_task_has_its_models():
    for task in TASKS.values():
        assert {f"twnn{task.models}", f"ff{task.models}"} <= set(REASONING)
