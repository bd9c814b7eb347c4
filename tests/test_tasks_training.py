"""Training of the models for generated tasks, from Python and from the command line."""

from __future__ import annotations

import copy
import json
import signal
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file

from zoo.cli import main
from zoo.errors import ConfigError
from zoo.tasks import RECIPES, Recipe, prefix_sums, recipe_for, score, train_task
from zoo.tasks.catalog import Growing, find_task
from zoo.tasks.examples import Examples
from zoo.tasks.objectives import Batches, _run, _traced, traced_loss
from zoo.tasks.recipe import METHODS
from zoo.tasks.run import load_model

FEW = {"updates": 3, "batch_size": 8}


def twnn(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def weights(trained):
    return torch.cat([p.flatten() for p in trained.model.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_weights_and_repeats(method):
    recipe = recipe_for("twnn_prefix", **FEW, size=16, method=method, jacobian_from=0.0, graded=(2, 3))
    once, again = train_task(recipe), train_task(recipe)
    assert torch.equal(weights(once), weights(again)) and once.losses == again.losses
    other = train_task(replace(recipe, seed=1))
    assert not torch.equal(weights(once), weights(other))
    assert len(once.losses) == 3 and not once.model.training


@pytest.mark.parametrize("model", [name for name in RECIPES if name.endswith("_maze")])
def test_maze_recipes_run(model):
    trained = train_task(recipe_for(model, updates=2, batch_size=4, size=5, select=0))
    assert all(torch.isfinite(torch.tensor(trained.losses)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "model, changes",
    [
        ("twnn_prefix", {"buffer": 16, "drop": 0.2, "jacobian_from": 0.0}),
        ("rnn_prefix", {}),
        ("deq_prefix", {}),
        ("twnn_maze", {"size": 5, "select": 2, "graded": (2, 3)}),
        ("twnn_pathfinder", {"size": 3, "easier": (2,), "pixels": 64}),
    ],
)
def test_training_on_a_gpu(model, changes):
    recipe = recipe_for(model, **{**FEW, "updates": 4, **changes})
    trained = train_task(recipe, device="cuda")
    assert next(trained.model.parameters()).is_cuda
    assert all(torch.isfinite(torch.tensor(trained.losses)))
    found = score(trained.model, recipe.find_task().draw(recipe.size, 8, 0, "val"))
    assert found.right.device.type == "cpu" and len(found.steps) == 8
    states = []
    train_task(recipe, device="cuda", save=lambda state: states.append(copy.deepcopy(state)), save_every=2)
    resumed = train_task(recipe, device="cuda", state=states[0])
    assert resumed.losses[:2] == trained.losses[:2] and len(resumed.losses) == 4


def test_images_of_another_resolution():
    recipe = recipe_for("twnn_pathfinder", updates=1, batch_size=4, size=3, easier=(2,), pixels=64)
    assert recipe.find_task().draw(3, 2, 0, "val").inputs.shape == (2, 1, 64, 64)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert len(train_task(recipe).losses) == 1
    for pixels, said in ((16, "at least 32|32 to 1024"), (True, "whole number")):
        with pytest.raises(ConfigError, match=said):
            train_task(replace(recipe, pixels=pixels))
    with pytest.raises(ConfigError, match="resolution or clutter; got pixels=48"):
        recipe_for("twnn_maze", pixels=48)


def test_images_with_other_clutter():
    plain = recipe_for("twnn_pathfinder", updates=1, batch_size=4, size=3, easier=(2,))
    recipe = replace(plain, clutter=4)
    drawn, more = (one.find_task().draw(3, 2, 0, "val").inputs for one in (plain, recipe))
    assert drawn.shape == more.shape and more.sum() > 1.2 * drawn.sum()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert train_task(recipe).losses != train_task(plain).losses
    with pytest.raises(ConfigError, match="clutter must be a whole number"):
        train_task(replace(recipe, clutter=9))
    with pytest.raises(ConfigError, match="prefix_sums has no images of a chosen resolution or clutter"):
        recipe_for("twnn_prefix", clutter=3)


def test_learning_goes_down():
    trained = train_task(recipe_for("twnn_prefix", updates=60, batch_size=32, size=8, lr=5e-3, warmup=5))
    first, last = (sum(part) / 15 for part in (trained.losses[:15], trained.losses[-15:]))
    assert last < 0.85 * first


def test_the_buffer_keeps_states_and_examples_together():
    recipe = recipe_for("twnn_prefix", updates=12, batch_size=8, size=16, buffer=16, fresh=0.5, drop=0.2)
    assert len(train_task(recipe).losses) == 12
    assert not torch.equal(weights(train_task(recipe)), weights(train_task(replace(recipe, buffer=0))))


def test_selection_takes_the_best_on_validation_data():
    recipe = recipe_for("twnn_maze", updates=4, batch_size=8, size=5, select=1)
    seen = []
    trained = train_task(
        recipe,
        callback=lambda update, model: seen.append(
            torch.cat([p.flatten() for p in model.parameters()]).clone()
        ),
    )
    assert len(seen) == 4 and any(torch.equal(weights(trained), one) for one in seen)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"updates": 0}, "updates=0"),
        ({"method": "unrolld"}, "Did you mean 'unrolled'"),
        ({"noise": 1.5}, "noise=1.5"),
        ({"free": (3, 2)}, "fewest and most"),
        ({"graded": (0, 2)}, "from 1 on"),
        ({"buffer": 3}, "buffer=3"),
        ({"buffer": 640, "method": "unrolled"}, "'phantom' keeps states"),
        ({"task": "maze"}, "Did you mean 'mazes'"),
        ({"easier": (8,)}, "differ in shape"),
        ({"task": "pathfinder", "size": 4, "easier": (3, 2)}, "ascending sizes below"),
        ({"task": "pathfinder", "size": 4, "easier": (4,)}, "ascending sizes below"),
        ({"task": "pathfinder", "size": 4, "easier": (3,), "passed": 1.0}, "passed=1.0"),
        ({"passed": 0.8}, "0 without easier sizes"),
        ({"grown": 1.5}, "grown=1.5"),
        ({"beyond": -1}, "beyond=-1"),
        ({"beyond": 4, "method": "phantom"}, "beyond=4 is of the method 'unrolled'"),
        ({"late": -1}, "late=-1"),
        ({"late": 4, "method": "plain"}, "late=4 is of the method 'unrolled'"),
        ({"late": 4, "method": "unrolled"}, "late=4 needs images without dots"),
        ({"carried": 1.5}, "carried=1.5"),
        ({"carried": 0.5, "method": "implicit"}, "which the method 'implicit' has not"),
        ({"traced": -1.0}, "traced=-1.0"),
        ({"apart": True}, "traced is 0: nothing would teach them"),
        ({"traced": 1.0}, "only pathfinder's images have"),
        ({"traced": 1.0, "task": "pathfinder", "size": 4, "method": "phantom"}, "'unrolled' or 'plain'"),
    ],
)
def test_impossible_recipes(changes, said):
    with pytest.raises(ConfigError, match=said):
        Recipe(**changes)


@pytest.mark.parametrize("model", [name for name in RECIPES if name.endswith("_pathfinder")])
def test_pathfinder_recipes_run(model):
    changes = {"size": 4, "easier": (2, 3), "graded": (2, 4), "updates": 6, "batch_size": 8}
    trained = train_task(recipe_for(model, **changes))
    assert all(torch.isfinite(torch.tensor(trained.losses)))
    asked = {**changes, "model_kwargs": {"questions": 2}}
    # The first loss is taken before the weights change: what is told besides is added to it.
    told, twice, thrice = (
        train_task(recipe_for(model, **asked, traced=w)).losses[0] for w in (0.5, 1.0, 1.5)
    )
    assert told < twice and thrice - twice == pytest.approx(twice - told, rel=1e-3)
    with pytest.raises(ConfigError, match=f"2 questions at each position; {model} answers 0"):
        train_task(recipe_for(model, **changes, traced=1.0))
    here = find_task("pathfinder").draw(4, 8, 0, "train")
    plain = recipe_for(model, **{**asked, "easier": (), "passed": 0.0, "updates": 1, "traced": 1.0})
    assert len(train_task(plain, data=here).losses) == 1
    with pytest.raises(ConfigError, match="have no marks"):
        train_task(plain, data=replace(here, marks=None))
    if model == "twnn_pathfinder":
        with pytest.raises(ConfigError, match="have no images without dots: leave late out"):
            train_task(replace(plain, late=3), data=replace(here, early=None))
    with pytest.raises(ConfigError, match="leave easier out"):
        train_task(recipe_for(model, **changes), data=find_task("pathfinder").draw(4, 32, 0, "train"))


def test_examples_grow_and_half_of_a_batch_is_of_sizes_before():
    task, drawn = find_task("pathfinder"), []

    def draw(size, count, seed, split):
        drawn.append((size, seed))
        return Examples(torch.full((count, 1, 2, 2), float(size)), torch.zeros(count), {})

    def batches():
        return Growing(replace(task, draw=draw), (2, 3, 5), updates=100, batch_size=10, seed=3)

    made, sizes, shown = batches(), [], []
    for _ in range(100):
        batch = next(made)
        sizes.append(made.size)
        shown.append(batch.inputs[:, 0, 0, 0].tolist())
    assert [sizes.count(s) for s in (2, 3, 5)] == [28, 42, 30]  # 2 : 3 of 70 %, then the last one
    assert sizes == sorted(sizes)
    for size, batch in zip(sizes, shown, strict=True):
        assert batch[:5] == [size] * 5 and len(set(batch[5:])) == 1 and batch[5] <= size
    assert {batch[5] for batch in shown[70:]} == {2, 3, 5}
    assert len(drawn) == len(set(drawn))  # never the same examples twice
    again = batches()
    assert [next(again).inputs[-1, 0, 0, 0].item() for _ in range(100)] == [batch[-1] for batch in shown]


def test_contours_grow_when_the_present_length_is_read_well():
    task = find_task("pathfinder")

    def batches():
        return Growing(task, (2, 3, 4), updates=9, batch_size=8, seed=3, passed=0.5)

    def answer(made, good):
        right = torch.zeros(8, dtype=torch.bool)
        right[:4] = good  # those of the present size; what else is right does not matter
        right[4:] = not good
        made.tell(right)
        return made.size

    made, sizes = batches(), []
    for _ in range(30):
        next(made)
        sizes.append(answer(made, False))
    assert set(sizes) == {2} and made.passes == []
    while made.size < 4:
        next(made)
        sizes.append(answer(made, True))
    # 1 - 0.97^n > 0.5 at 23, and from 0.6 of it at 12 more.
    assert sizes == [2] * (30 + 23) + [3] * 12 + [4] and made.passes == [53, 65]
    answer(made, True)
    assert made.passes == [53, 65]  # there is no larger size
    again = batches()
    again.passes = [53, 65]
    for _ in range(65):
        next(again)
    assert torch.equal(next(again).inputs, joined_after(batches(), made.passes, 65).inputs)


def joined_after(made, passes, count):
    """The batch that comes after ``count`` others, of a run whose sizes were passed where they were."""
    for _ in range(count):
        next(made)
        if made._taken in passes:
            made.passes.append(made._taken)
    return next(made)


def test_resume_goes_on_with_the_contours_that_were_reached():
    recipe = recipe_for(
        "ff_pathfinder",
        updates=40,
        batch_size=8,
        size=4,
        easier=(2, 3),
        passed=0.2,
        model_kwargs={"width": 4},
    )
    states = []
    whole = train_task(recipe, save=lambda state: states.append(copy.deepcopy(state)), save_every=10)
    reached = [state["batches"]["passes"] for state in states]
    assert reached[-1] and reached == sorted(reached)  # some length was passed on the way
    for state in states[:2]:
        resumed = train_task(recipe, state=state)
        assert resumed.losses == whole.losses and torch.equal(weights(resumed), weights(whole))


def test_unknown_settings_and_models():
    with pytest.raises(ConfigError, match="Did you mean 'updates'"):
        recipe_for("twnn_prefix", update=1)
    with pytest.raises(ConfigError, match="Did you mean 'twnn_prefix'"):
        recipe_for("twnn_prefx")
    with pytest.raises(TypeError, match="ff_prefix has none"):
        train_task(recipe_for("ff_prefix", method="phantom", **FEW))
    plain = recipe_for("deq_prefix", graded=(1, 9))
    assert Recipe.from_dict(json.loads(json.dumps(plain.as_dict()))) == plain


def test_train_then_eval(tmp_path):
    run, file = tmp_path / "run", tmp_path / "figures.json"
    command = ("train", "--model", "twnn_prefix", "--bits", 16, "--updates", 4, "--output", run, "--seed", 3)
    result = twnn(*command)
    assert result.exit_code == 0, result.output
    assert {path.name for path in run.iterdir()} == {
        "args.json",
        "metrics.jsonl",
        "model.safetensors",
        "validation.json",
    }
    args = json.loads((run / "args.json").read_text())
    assert args["seed"] == 3 and args["size"] == 16 and args["updates"] == 4
    again = twnn(*command)
    assert again.exit_code == 2 and "already holds a run" in again.stderr
    flags = (
        "--model",
        "twnn_prefix",
        "--checkpoint",
        run / "model.safetensors",
        "--bits",
        20,
        "--samples",
        30,
    )
    result = twnn("eval", *flags, "--seed", 1, "--max-iter", 2, "--tol", 1e-9, "--json", file)
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert figures["samples"] == 30 and figures["size"] == 20 and figures["most_steps"] == 2
    assert figures["not_converged"] == 30
    model, _ = load_model("twnn_prefix", run / "model.safetensors")
    model(prefix_sums(8, 2).inputs)


def test_eval_with_the_weights_that_ship(tmp_path):
    file = tmp_path / "figures.json"
    result = twnn("eval", "--model", "twnn_prefix", "--bits", 512, "--samples", 20, "--json", file)
    assert result.exit_code == 0, result.output
    assert "shipped weights" in result.stdout and "512 bits" in result.stdout
    figures = json.loads(file.read_text())
    assert figures["right"] == 1 and figures["converged"] == 1 and figures["mean_steps"] > 60
    found = score(load_model("twnn_prefix")[0], prefix_sums(512, 20, 0, "test"))
    assert figures["mean_steps"] == pytest.approx(float(found.steps.double().mean()))


def test_pathfinder_is_trained_like_images(tmp_path, monkeypatch):
    from zoo.tasks import images as module

    splits = module.pathfinder_splits
    monkeypatch.setattr(module, "pathfinder_splits", lambda n, pixels: splits(n, 64, 16, pixels=pixels))
    output = tmp_path / "run"
    flags = ("--epochs", 1, "--batch-size", 16, "--contour-length", 6, "--device", "cpu", "--output", output)
    result = twnn("train", "--model", "twnn_pathfinder", *flags)
    assert result.exit_code == 0, result.output
    seen = ("eval", "--checkpoint", output / "best.pth.tar", "--contour-length", 6, "--samples", 40)
    file = tmp_path / "figures.json"
    larger = twnn(*seen, "--img-size", 64, "--amp", "--device", "cpu", "--json", file)
    assert larger.exit_code == 0, larger.output
    figures = json.loads(file.read_text())
    assert figures["img_size"] == 64 and figures["amp"] is True and figures["device"] == "cpu"
    result = twnn(*seen)
    assert result.exit_code == 0, result.output
    assert "pathfinder, 6 dashes" in result.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("train", "--model", "twnn_prefix", "--epochs", 2), "--updates instead of --epochs"),
        (("train", "--model", "twnn_prefix", "--mixup", 0.2), "--mixup is no setting"),
        (("train", "--model", "twnn_prefix", "--maze-size", 9), "--maze-size is for mazes"),
        (("train", "--model", "twnn_prefix", "--dataset", "mnist"), "trained on prefix_sums"),
        (("train", "--model", "twnn_maze", "--maze-size", 10), "odd number"),
        (("train", "--model", "twnn_prefix", "--data-dir", "{tmp}"), "len_32"),
        (("train", "--model", "cnn3", "--bits", 9), "--bits is for"),
        (("train", "--model", "twnn_pathfinder", "--updates", 9), "--epochs, not --updates"),
        (("eval", "--model", "ff_prefix"), "No weights of ff_prefix ship"),
        (("eval", "--model", "cnn3", "--bits", 9), "--bits is for"),
        (("eval", "--model", "twnn_maze", "--bits", 9), "--bits is for prefix_sums"),
        (("eval", "--model", "twnn_prefix", "--solver", "picrad"), "Did you mean 'picard'"),
        (("eval", "--model", "twnn_prefix", "--no-latency"), "--no-latency does not apply to twnn_prefix"),
        (("eval", "--model", "twnn_prefix", "--workers", 2), "--workers does not apply"),
        (("eval", "--model", "twnn_prefix", "--device", "cuda:99"), "'cuda:99' cannot be used here"),
        (("train", "--model", "ff_prefix", "--device", "gpu", "--output", "{tmp}/d"), "cannot be used here"),
        (("eval", "--model", "twnn_prefix", "--checkpoint", "{tmp}/none"), "none"),
        (("eval", "--model", "twnn_prefix", "--data-dir", "{tmp}"), "len_32"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    result = twnn(*(str(arg).replace("{tmp}", str(tmp_path)) for arg in args))
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not list(tmp_path.glob("output/*/*"))


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {"buffer": 16, "fresh": 0.5, "drop": 0.2, "jacobian_from": 0.0},
        {"method": "progressive", "graded": (2, 4), "carried": 0.5},
        {"model": "twnn_maze", "size": 5, "select": 2},
        {"model": "twnn_pathfinder", "size": 4, "easier": (2, 3), "graded": (2, 4)},
        {
            "model": "twnn_pathfinder",
            "size": 4,
            "easier": (2, 3),
            "graded": (2, 4),
            "traced": 1.0,
            "model_kwargs": {"questions": 2},
        },
        {
            "model": "twnn_pathfinder",
            "size": 4,
            "easier": (2, 3),
            "graded": (2, 4),
            "carried": 0.5,
            "beyond": 5,
            "late": 5,
        },
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(changes, tmp_path):
    changes = {"model": "twnn_prefix", "updates": 9, "batch_size": 8, "size": 16, **changes}
    recipe = recipe_for(changes.pop("model"), **changes)
    whole, path = train_task(recipe), tmp_path / "state.pth"

    def keep(state):
        torch.save(state, path)
        raise Stop

    with pytest.raises(Stop):
        train_task(recipe, save=keep, save_every=5)
    torch.manual_seed(77)
    state = torch.load(path, weights_only=True)
    assert state["updates"] == 5
    seen = []
    resumed = train_task(recipe, state=state, callback=lambda done, _: seen.append(done))
    assert seen == [6, 7, 8, 9]
    assert torch.equal(weights(whole), weights(resumed)) and whole.losses == resumed.losses
    with pytest.raises(ConfigError, match=r"other settings \(lr\)"):
        train_task(replace(recipe, lr=1e-4), state=state)


def test_resume_from_the_command_line(tmp_path, monkeypatch):
    import zoo.tasks.training as training

    words = ["train", "--model", "twnn_prefix", "--bits", 16, "--batch-size", 8, "--updates", 6]
    plain = twnn(*words, "--output", tmp_path / "plain")
    assert plain.exit_code == 0, plain.output
    before = training._Training.update

    def interrupted(self):
        before(self)
        if self.done == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "update", interrupted)
        stopped = twnn(*words, "--output", tmp_path / "run")
    assert stopped.exit_code == 130 and (tmp_path / "run" / "last.pth.tar").exists()
    again = twnn(*words, "--output", tmp_path / "run")
    assert again.exit_code == 2 and "--resume auto" in again.output
    other = twnn(*words, "--output", tmp_path / "run", "--resume", "auto", "--seed", 5)
    assert other.exit_code == 2 and "other settings (seed)" in other.output
    nothing = twnn("train", "--model", "twnn_prefix", "--resume", tmp_path / "plain")
    assert nothing.exit_code == 2 and "There is no checkpoint" in nothing.output
    resumed = twnn("train", "--model", "twnn_prefix", "--resume", tmp_path / "run")
    assert resumed.exit_code == 0, resumed.output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "run"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "run" / "last.pth.tar").exists()


def test_two_questions_are_answered_where_a_dash_is():
    marks = torch.full((1, 1, 8, 8), -1, dtype=torch.int8)
    # Of 4x4 positions (0, 0), (0, 2) and (3, 3) have a dash: without a dot, with one, and an end without.
    marks[..., :2, :2], marks[..., :2, 4:6], marks[..., 6:, 6:] = 0, 1, 2
    answers = torch.randn(1, 2, 4, 4)
    there = answers[0, :, [0, 0, 3], [0, 2, 3]]
    right = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    said = torch.where(right == 1, there.sigmoid(), 1 - there.sigmoid())
    torch.testing.assert_close(traced_loss(answers, marks), -said.log().sum() / 3)
    known = torch.full((1, 2, 4, 4), 30.0)  # of the ground nothing is asked
    known[0, :, [0, 0, 3], [0, 2, 3]] = torch.where(right == 1, 30.0, -30.0)
    assert float(traced_loss(known, marks)) < 1e-6
    assert float(traced_loss(-known, marks)) > 50
    assert torch.isfinite(traced_loss(answers, torch.full_like(marks, -1)))


@pytest.mark.parametrize("apart", [False, True])
def test_the_classifier_of_traced_contours_teaches_itself_alone_where_that_is_asked(apart):
    model = timm.create_model("ff_pathfinder", questions=2)
    batch, recipe = (
        find_task("pathfinder").draw(4, 8, 0, "train"),
        recipe_for("ff_pathfinder", traced=0.5, apart=apart),
    )
    batches = Batches(
        replace(recipe, easier=(), passed=0.0), find_task("pathfinder"), None, torch.device("cpu")
    )
    _traced(recipe, model, batches, batch, model.forward_features(batch.inputs)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    answers = model.answers(model.forward_features(batch.inputs))
    (0.5 * traced_loss(answers, batch.marks)).backward(retain_graph=True)
    if apart:
        answers = answers.detach()
    F.cross_entropy(model.classify(answers), batch.targets).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)
        assert p.grad.abs().sum() > 0


class Latch(torch.nn.Module):
    """``z' = max(z, w z + x)``: what Iterated needs, and a gradient that can be written down."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def step(self, z, x):
        return torch.maximum(z, self.w * z + x)


@pytest.mark.parametrize("carried", [0.0, 0.25, 1.0])
def test_a_share_of_the_gradient_is_carried_and_all_of_it_by_what_was_left(carried):
    model, x = Latch(), torch.tensor([[[[1.0, -2.0]]]], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[[[0.0, 0.5]]]], dtype=torch.float64, requires_grad=True)
    recipe = recipe_for("twnn_maze", carried=carried)
    end = _run(model, z, x, 3, recipe)
    exact = _run(model, z, x, 3, recipe_for("twnn_maze"))
    assert torch.equal(end, exact)  # the value is not touched
    # The first entry is written at every step, 1 -> 2.5 -> 4.75; the second one stays 0.5 throughout.
    assert end.flatten().tolist() == [4.75, 0.5]
    to_z, to_x, to_w = torch.autograd.grad(end.sum(), (z, x, model.w))
    through = carried * 1.5
    assert to_z.flatten().tolist() == [through**3, 1.0]
    assert to_x.flatten().tolist() == [1 + through + through**2, 0.0]
    assert float(to_w) == 2.5 + through * 1.0


def test_steps_without_gradient_come_before_every_second_update(monkeypatch):
    import zoo.tasks.objectives as objectives

    taken = []

    def noted(model, z, x, steps, recipe):
        taken.append((torch.is_grad_enabled(), steps))
        return _run(model, z, x, steps, recipe)

    monkeypatch.setattr(objectives, "_run", noted)
    recipe = recipe_for("twnn_maze", updates=40, batch_size=2, size=5, select=0, graded=(2, 3), beyond=6)
    train_task(recipe)
    free = [steps for graded, steps in taken if not graded]
    assert 10 <= len(free) <= 30 and set(free) <= set(range(7)) and len(set(free)) > 3
    assert [graded for graded, _ in taken].count(True) == 40
    taken.clear()
    train_task(replace(recipe, beyond=0, updates=8))
    assert [graded for graded, _ in taken] == [True] * 8


def test_dots_come_late_and_what_is_beyond_only_once_examples_are_grown(monkeypatch):
    import zoo.tasks.objectives as objectives

    taken = []

    def noted(model, z, x, steps, recipe):
        taken.append((torch.is_grad_enabled(), steps, x.detach()))
        return _run(model, z, x, steps, recipe)

    monkeypatch.setattr(objectives, "_run", noted)
    drawn = {"size": 4, "easier": (2, 3), "passed": 0.0, "updates": 30, "batch_size": 2, "graded": (1, 1)}
    seen = []
    train_task(
        recipe_for("twnn_pathfinder", **drawn, late=5, beyond=7, grown=0.5),
        callback=lambda done, model: seen.append(taken.copy()) or taken.clear(),
    )
    later = [calls for calls in seen if len(calls) > 1]
    assert 8 <= len(later) <= 22 and all(calls[-1][0] for calls in seen)
    for calls in later:
        assert not calls[0][0] and calls[0][1] <= 5
        assert not torch.equal(calls[0][2], calls[-1][2])  # the dots are not there yet
    for calls in later:
        for free, steps, x in calls[1:-1]:
            assert not free and steps <= 7 and torch.equal(x, calls[-1][2])
    assert all(len(calls) <= 2 for calls in seen[:15])
    assert {len(calls) for calls in seen[16:]} == {1, 3}
