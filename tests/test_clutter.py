"""Composed images: deterministic, from disjoint sources, and the mark is level with what is asked for."""

from __future__ import annotations

import pytest
import torch

from zoo.data import ArraySplit, Clutter, compose, compose_splits, load_data
from zoo.data.clutter import RECIPES
from zoo.data.specs import SPECS
from zoo.errors import ConfigError, DataError

BARE = Clutter(debris=(0, 0), covers=(0, 0))
SMALL = {"train": 40, "val": 30, "test": 20}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def stamps(size=8):
    """Ten items that tell their class by their brightness, which no other has."""
    images = torch.arange(10).mul(10).add(100).to(torch.uint8).view(10, 1, 1, 1).expand(10, 1, size, size)
    return ArraySplit(images.contiguous(), torch.arange(10))


def test_images_are_a_function_of_the_seed(digits):
    first, again, other = (compose(digits.train, Clutter(), 50, seed) for seed in (7, 7, 8))
    assert first.images.shape == (50, 1, 20, 20) and first.images.dtype == torch.uint8
    for name in ("images", "labels", "items", "debris", "hidden", "distance"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.images, other.images)


def test_the_mark_is_level_with_the_item_that_is_asked_for():
    made = compose(stamps(), BARE, 300, seed=0)
    for image, label, items, distance in zip(
        made.images[:, 0], made.labels, made.items, made.distance, strict=True
    ):
        rows = torch.nonzero(image[:, 0] == 255).flatten()
        assert len(rows) == 3
        middle = image[int(rows[1])].int()
        value = 100 + 10 * int(label)
        assert set(middle.tolist()) == {0, 255, value}  # the other item is in another band
        assert int(torch.nonzero(middle == value)[0]) == 3 + int(distance)
        rest = image.int()[:, 3:]
        assert len(set(rest[rest > 0].tolist())) <= int(items)
    assert set(made.items.tolist()) == {1, 2}
    assert set(made.distance.tolist()) == set(range(10))  # anywhere between the mark and the right margin


def test_covers_hide_what_hidden_says():
    bare = compose(stamps(), BARE, 400, seed=3)
    assert bare.hidden.max() == 0
    made = compose(stamps(), Clutter(debris=(0, 0), covers=(1, 1)), 400, seed=3)
    for image, label, hidden in zip(made.images[:, 0], made.labels, made.hidden, strict=True):
        left = int((image == 100 + 10 * label).sum())
        if left <= 64:  # two items of one class are told apart by their place alone
            assert left / 64 == pytest.approx(1 - float(hidden), abs=1e-6)
    assert 0.1 < float((made.hidden > 0).float().mean()) < 0.9
    assert float(made.hidden.max()) == pytest.approx(16 / 64)  # a whole block


def test_debris_adds_ink_of_the_same_source(digits):
    few, many = (compose(digits.train, Clutter(debris=d, covers=(0, 0)), 200, 1) for d in ((0, 0), (6, 6)))
    assert many.debris.eq(6).all() and few.debris.eq(0).all()
    assert many.images.float().mean() > 1.15 * few.images.float().mean()


def test_parts_are_composed_of_their_own_part_alone():
    sources = [ArraySplit(torch.full((3, 1, 8, 8), value, dtype=torch.uint8), torch.arange(3))
               for value in (50, 100, 150)]  # fmt: skip
    from zoo.data import DataSplits

    made = compose_splits(SPECS["cued_digits"], DataSplits(SPECS["digits"], *sources), Clutter(), SMALL)
    for name, value in (("train", 50), ("val", 100), ("test", 150)):
        part = made.part(name)
        assert len(part) == SMALL[name]
        assert set(part.images.unique().tolist()) == {0, value, 255}  # type: ignore[attr-defined]


def test_the_data_set_by_name():
    data = load_data("cued_digits")
    assert (len(data.train), len(data.val), len(data.test)) == (20_000, 4_000, 8_000)
    assert data.spec.num_classes == 10 and set(data.train.labels.tolist()) == set(range(10))
    values = data.train.images.float() / 255
    assert abs(float(values.mean()) - data.spec.mean[0]) < 1e-3
    assert abs(float(values.std()) - data.spec.std[0]) < 1e-3
    part = data.val.subset(torch.tensor([5, 3]))
    assert torch.equal(part.distance, data.val.distance[[5, 3]])
    assert torch.equal(part.images, data.val.images[[5, 3]])
    assert RECIPES["cued_digits"].canvas == data.spec.img_size


@pytest.mark.parametrize(
    "options, words",
    [
        ({"items": (2, 1)}, "items"),
        ({"items": (1, 3)}, "2 bands"),
        ({"debris": (-1, 2)}, "debris"),
        ({"bands": 0}, "bands"),
        ({"piece": 20}, "piece"),
        ({"mark": 0}, "mark"),
    ],
)
def test_an_impossible_recipe_says_what_is_wrong(options, words):
    with pytest.raises(ConfigError, match=words):
        Clutter(**options)


def test_sources_that_do_not_fit_are_refused(digits):
    with pytest.raises(ConfigError, match="10x17"):
        compose(stamps(size=11), Clutter(), 5, 0)
    with pytest.raises(ConfigError, match="3 channel"):
        compose(ArraySplit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long()), BARE, 5, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        compose(digits.train, Clutter(), 0, 0)


def test_a_source_without_images_is_refused():
    empty = ArraySplit(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0).long())
    with pytest.raises(DataError, match="no images"):
        compose(empty, BARE, 5, 0)
