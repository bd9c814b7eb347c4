"""Generated tasks: deterministic, disjoint, and labelled as an independent solver labels them."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.tasks import TASKS, find_task, mazes, pathfinder, prefix_sums, read_examples, task_of_model
from zoo.tasks.catalog import passes, stream
from zoo.tasks.examples import SPLITS, fingerprints, in_split, joined
from zoo.tasks.mazes import cells_of, pixels_of
from zoo.tasks.pathfinder import _DASH, _DOT, _THICK, _contours, _marks, draw_scenes, paint

SMALL = {"prefix_sums": 32, "mazes": 9, "pathfinder": 6}


def same(a, b):
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("name", TASKS)
def test_a_set_is_a_function_of_its_arguments(name):
    draw, size = TASKS[name].draw, SMALL[name]
    first = draw(size, 12, 3, "train")
    assert len(first) == 12 and same(first, draw(size, 12, 3, "train"))
    assert not same(first, draw(size, 12, 4, "train"))
    assert not same(first, draw(size, 12, 3, "test"))
    assert set(first.difficulty) == set(TASKS[name].measures)
    assert all(value.shape == (12,) and value.isfinite().all() for value in first.difficulty.values())


@pytest.mark.parametrize("name", ["prefix_sums", "mazes"])
def test_no_example_is_in_two_splits(name):
    size = {"prefix_sums": 10, "mazes": 5}[name]  # so small that splits would meet otherwise
    sets = []
    for split in SPLITS:
        examples = TASKS[name].draw(size, 300, 0, split)
        sets.append({row.numpy().tobytes() for row in examples.inputs})
    assert all(len(s) > 10 for s in sets)
    for one, other in itertools.combinations(sets, 2):
        assert not one & other


def test_splits_share_out_everything():
    rows = np.random.default_rng(0).integers(0, 2, (8000, 20))
    shares = [in_split(rows, split) for split in SPLITS]
    assert (sum(s.astype(int) for s in shares) == 1).all()
    assert shares[0].mean() == pytest.approx(12 / 16, abs=0.02)
    assert len(np.unique(fingerprints(rows))) == len(np.unique(rows, axis=0))


def test_prefix_sums_by_counting():
    examples = prefix_sums(13, 40, 1, "test")
    assert examples.inputs.shape == (40, 1, 13) and examples.targets.shape == (40, 13)
    for bits, parities, ones, run in zip(
        examples.inputs[:, 0].int().tolist(),
        examples.targets.tolist(),
        examples.difficulty["ones"].tolist(),
        examples.difficulty["run"].tolist(),
        strict=True,
    ):
        assert set(bits) <= {0, 1} and ones == bits.count(1)
        assert parities == [bits[: n + 1].count(1) % 2 for n in range(13)]
        assert run == max(len(list(group)) for _, group in itertools.groupby(bits))


def units(image):
    """The maze in units, from an image (3, P, P): one pixel in four, without the border of one."""
    blocks = image[:, 1:-1, 1:-1]
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        assert torch.equal(blocks[:, ::2, ::2], blocks[:, dy::2, dx::2])
    assert blocks.abs().sum() == image.abs().sum()  # nothing in the border
    return blocks[:, ::2, ::2]


def shortest(grid, start, end):
    """Breadth-first search on pixels that are not black; the path's units, and how many units are free."""
    before, queue = {start: None}, deque([start])
    while queue:
        y, x = queue.popleft()
        for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if near not in before and grid[near]:
                before[near] = (y, x)
                queue.append(near)
    path, here = [], end
    while here is not None:
        path.append(here)
        here = before[here]
    return path, before


@pytest.mark.parametrize("size", [3, 9, 33])
def test_mazes_by_breadth_first_search(size):
    examples = mazes(size, 25, 2, "train")
    cells, pixels = cells_of(size), pixels_of(size)
    assert examples.inputs.shape == (25, 3, pixels, pixels)
    for number in range(25):
        maze = units(examples.inputs[number])
        label = units(examples.targets[number][None])[0]
        free = maze.sum(dim=0) > 0
        assert free.shape == (2 * cells + 1,) * 2 == (size + 2,) * 2
        (start,) = torch.nonzero((maze[1] == 1) & (maze[0] == 0)).tolist()
        (end,) = torch.nonzero((maze[0] == 1) & (maze[1] == 0)).tolist()
        path, reached = shortest(free.numpy(), tuple(start), tuple(end))
        wanted = torch.zeros_like(label)
        wanted[tuple(torch.tensor(path).T)] = 1
        assert torch.equal(label, wanted)
        # A perfect maze is a tree: everything is reached, and cells joined by as many openings less one.
        assert len(reached) == int(free.sum()) == 2 * cells**2 - 1
        assert examples.difficulty["path"][number] == (len(path) - 1) / 2
        away = [distances(free.numpy(), [place]) for place in (path[0], path[-1])]
        assert examples.difficulty["reach"][number] == max(max(a.values()) for a in away) / 2
        assert examples.difficulty["dead_end"][number] == max(distances(free.numpy(), path).values()) / 2


def distances(grid, sources):
    """Units from the nearest of the sources."""
    far, queue = dict.fromkeys(sources, 0), deque(sources)
    while queue:
        y, x = queue.popleft()
        for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if near not in far and grid[near]:
                far[near] = far[y, x] + 1
                queue.append(near)
    return far


def test_published_sizes():
    assert [cells_of(size) for size in (9, 13, 33, 59, 201)] == [5, 7, 17, 30, 101]
    assert pixels_of(9) == 24 and pixels_of(13) == 32


@pytest.mark.parametrize(("length", "clutter"), [(6, None), (14, None), (2, 4), (14, 6)])
def test_pathfinder_contours_are_apart_and_joined(length, clutter):
    scene = draw_scenes(length, 30, np.random.default_rng(5), clutter)
    contour = _contours(length, clutter)
    assert np.bincount(contour).tolist() == [length] * 2 + [clutter or length // 3] * 4
    gap = np.linalg.norm(scene.centre[:, :, None] - scene.centre[:, None], axis=-1)
    other = contour[:, None] != contour[None]
    following = (np.arange(len(contour) - 1), np.arange(1, len(contour)))
    joined = contour[1:] == contour[:-1]
    # Linking dashes that are closer than any two of different contours gives back the contours.
    limit = (gap[:, following[0], following[1]][:, joined].max() + gap[:, other].min()) / 2
    assert gap[:, following[0], following[1]][:, joined].max() < gap[:, other].min()
    for links, dots in zip(gap < limit, scene.dots, strict=True):
        seen, queue = {int(dots[0])}, [int(dots[0])]
        while queue:
            for near in np.flatnonzero(links[queue.pop()]).tolist():
                if near not in seen:
                    seen.add(near)
                    queue.append(near)
        assert seen == set(np.flatnonzero(contour == contour[dots[0]]).tolist())
        assert (int(dots[1]) in seen) == (contour[dots[0]] == contour[dots[1]])
        assert all(dot % length in (0, length - 1) and dot < 2 * length for dot in dots.tolist())


def test_pathfinder_paints_what_was_drawn():
    scene = draw_scenes(9, 4, np.random.default_rng(1))
    for pixels in (32, 64):
        image = paint(scene, pixels)
        assert image.shape == (len(scene.dots), 1, pixels, pixels)
        assert image.min() == 0 and image.max() == 1
        for number, centres in enumerate(scene.centre):
            place = (centres * pixels).astype(int)
            assert (image[number, 0][place[:, 1], place[:, 0]] > 0.2).all()
    examples = pathfinder(6, 400, 0, "train")
    assert 0.4 < examples.targets.float().mean() < 0.6


def test_early_images_lack_the_dots_alone():
    scene = draw_scenes(6, 8, np.random.default_rng(3))
    whole, bare = paint(scene, 64), paint(scene, 64, np.ones(scene.angle.shape, dtype=bool))
    at = (torch.arange(64) + 0.5) / 64
    y, x = torch.meshgrid(at, at, indexing="ij")
    for number, dots in enumerate(scene.dots):
        dx, dy = (torch.from_numpy(scene.centre[number, dots, axis])[:, None, None] for axis in (0, 1))
        near = torch.hypot(x - dx, y - dy).amin(dim=0) < _DOT + 1 / 64
        assert torch.equal(whole[number, 0][~near], bare[number, 0][~near])
        assert (whole[number, 0][near] > bare[number, 0][near]).sum() > 8
    examples = pathfinder(6, 5, 0, "train")
    assert examples.early.shape == examples.inputs.shape and (examples.early <= examples.inputs).all()
    assert not torch.equal(examples.early, examples.inputs)
    assert torch.equal(examples[1:3].early, examples.early[1:3])
    both = joined(examples, examples[:2])
    assert (
        torch.equal(both.early[5:], examples.early[:2])
        and joined(both, replace(both, early=None)).early is None
    )


@pytest.mark.parametrize("pixels", [32, 45, 64])
def test_no_pixel_is_left_out_by_painting_around_each_dash(pixels):
    """Held against the distance of every pixel from every dash and dot."""
    scene = draw_scenes(9, 6, np.random.default_rng(2))
    at = (np.arange(pixels) + 0.5) / pixels
    x, y = np.meshgrid(at, at)
    for number, image in enumerate(paint(scene, pixels)[:, 0]):
        nearest = np.full((pixels, pixels), np.inf)
        for (cx, cy), angle in zip(scene.centre[number], scene.angle[number], strict=True):
            along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
            across = (x - cx) * np.sin(angle) - (y - cy) * np.cos(angle)
            beyond = np.maximum(np.abs(along) - _DASH / 2, 0)
            nearest = np.minimum(nearest, np.hypot(beyond, across) - _THICK)
        for dot in scene.dots[number]:
            cx, cy = scene.centre[number, dot]
            nearest = np.minimum(nearest, np.hypot(x - cx, y - cy) - _DOT)
        expected = torch.from_numpy(np.clip(0.5 - nearest * pixels, 0, 1)).float()
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


def test_clutter_is_a_third_of_a_contour_unless_one_says_otherwise():
    plain, same, more = (pathfinder(14, 8, 3, "test", clutter=clutter) for clutter in (None, 4, 5))
    assert torch.equal(plain.inputs, same.inputs) and torch.equal(plain.targets, same.targets)
    assert not torch.equal(plain.inputs, more.inputs)
    assert pathfinder(2, 4, clutter=6).inputs.mean() > pathfinder(2, 4).inputs.mean()


def test_marks_say_which_contours_have_a_dot_and_where_they_end_without():
    examples = pathfinder(6, 60, 0, "train", pixels=64)
    marks = examples.marks
    assert marks is not None and marks.shape == examples.inputs.shape and marks.dtype == torch.int8
    assert (examples.inputs[marks >= 0] > 0.5).all()
    there = torch.stack([(marks == k).flatten(1).any(dim=1) for k in range(3)])
    assert there[:2].all() and torch.equal(there[2], examples.targets == 0)
    scene = draw_scenes(6, 8, np.random.default_rng(3))
    for number, found in enumerate(_marks(scene, 6, 64)[:, 0]):
        dots = scene.dots[number].tolist()
        dotted = {dot // 6 for dot in dots}
        for dash, (centre, contour) in enumerate(zip(scene.centre[number], scene.contour, strict=True)):
            column, row = (centre * 64).astype(int)
            end = contour in dotted and dash % 6 in (0, 5) and dash not in dots
            assert found[row, column] in (-1, 2 if end else int(contour in dotted))
    part = examples[torch.tensor([3, 4])].to("cpu")
    assert torch.equal(part.marks, marks[3:5]) and mazes(9, 1).marks is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prefix_sums(0, 1), "bits"),
        (lambda: prefix_sums(8, -1), "count"),
        (lambda: prefix_sums(8, 1, -1), "seed"),
        (lambda: prefix_sums(8, 1, 0, "tset"), "Did you mean 'test'"),
        (lambda: mazes(10, 1), "odd number"),
        (lambda: mazes(3, 300, 0, "val"), "none is in the split 'val'"),
        (lambda: pathfinder(20, 1), "length"),
        (lambda: pathfinder(6, 1, pixels=8), "pixels"),
        (lambda: pathfinder(6, 1, clutter=1), "clutter must be a whole number, 2 to 6"),
        (lambda: find_task("mazes").painted(clutter=3), "no images of a chosen resolution or clutter"),
        (lambda: find_task("maze"), "Did you mean 'mazes'"),
    ],
)
def test_bad_arguments(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_streams_do_not_repeat_and_passes_do():
    task = TASKS["prefix_sums"]
    batches = list(itertools.islice(stream(task, 32, 1024, 0), 5))
    rows = torch.cat([batch.inputs for batch in batches]).flatten(1)
    assert rows.shape == (5120, 32) and len(rows.unique(dim=0)) > 5110
    assert same(batches[0], next(iter(stream(task, 32, 1024, 0))))
    few = prefix_sums(20, 10)
    seen = torch.cat([b.inputs for b in itertools.islice(passes(few, 5, 0), 4)])
    assert len(seen.unique(dim=0)) == 10
    with pytest.raises(ConfigError, match="11 is more than the 10"):
        next(passes(few, 11, 0))


def test_models_know_their_task():
    assert task_of_model("twnn_maze.size9") is TASKS["mazes"]
    assert task_of_model("ff_prefix") is TASKS["prefix_sums"] and task_of_model("resnet18") is None


@pytest.fixture
def benchmark_files(tmp_path):
    """The layout of the benchmark's package (easy-to-hard-data 1.0.0), with sets of ours."""
    strings = prefix_sums(24, 10)
    folder = tmp_path / "prefix_sums_data"
    folder.mkdir()
    torch.save(strings.inputs[:, 0], folder / "24_data.pth")
    torch.save(strings.targets.float(), folder / "24_targets.pth")
    pictures = mazes(9, 10)
    for part in ("train", "test"):
        folder = tmp_path / f"maze_data_{part}_9"
        folder.mkdir()
        np.save(folder / "inputs.npy", pictures.inputs.double().numpy())
        np.save(folder / "solutions.npy", pictures.targets.double().numpy())
    return tmp_path, strings, pictures


def test_the_benchmarks_own_files_are_read(benchmark_files):
    root, strings, pictures = benchmark_files
    assert same(read_examples("prefix_sums", root, 24, "test"), strings)
    folder = root / "prefix_sums_data"
    assert same(read_examples("prefix_sums", folder, 24, "test"), strings)
    older = folder / "len_24"  # where they lay before
    older.mkdir()
    for name in ("24_data.pth", "24_targets.pth"):
        (folder / name).rename(older / name)
    for given in (root, folder, older):
        assert same(read_examples("prefix_sums", given, 24, "test"), strings)
    read = read_examples("mazes", root, 9, "test")
    assert same(read, pictures)
    assert torch.equal(read.difficulty["path"], pictures.difficulty["path"])
    assert [len(read_examples("mazes", root, 9, split)) for split in ("train", "val")] == [8, 2]


def test_missing_and_broken_files_are_named(benchmark_files):
    root, *_ = benchmark_files
    with pytest.raises(DataError, match=r"no prefix_sums_data/25_data\.pth or .*len_25"):
        read_examples("prefix_sums", root, 25, "test")
    with pytest.raises(ConfigError, match="pathfinder"):
        read_examples("pathfinder", root, 9, "test")
    file = root / "maze_data_test_9" / "inputs.npy"
    np.save(file, np.zeros((3, 3, 20, 20)))
    with pytest.raises(DataError, match=r"\(M, 3, 24, 24\)"):
        read_examples("mazes", root, 9, "test")
    file.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"inputs\.npy cannot be read"):
        read_examples("mazes", root, 9, "test")
