"""Data that are damaged, mislabelled or too few: one line that names them, before or instead of training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import small, some_digits
from zoo.data import Batches, DataSplits, hold_out, load_data, make_transform, sources
from zoo.errors import DataError
from zoo.train import train


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No test sees data sets of the machine it runs on."""
    monkeypatch.setenv("TWNN_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")


def write_images(folder: Path, classes: str, count: int) -> Path:
    """Images of which every pixel is ten times the place of the class in the alphabet."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            grey = 10 * (ord(name) - ord("a"))
            Image.new("RGB", (12, 10), (grey, grey, grey)).save(folder / name / f"{number}.png")
    return folder


def write_idx(folder: Path, counts=(60, 20), classes=10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        labels = (np.arange(count) % classes).astype(np.uint8)
        images = np.zeros((count, 28, 28), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"no picture"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": cut_in_half,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_picture_is_named_and_takes_no_other_ones_place(tmp_path, damage, workers):
    folder = write_images(tmp_path / "set", "abc", 10)
    data = load_data(str(folder), img_size=8)
    DAMAGES[damage](folder / "a" / "7.png")
    seen = 0
    with pytest.raises(DataError) as caught:
        for part in (data.train, data.val, data.test):  # wherever the cut has put it
            for _, labels in Batches(part, data.spec, 1, workers=workers):
                seen += len(labels)
    message = str(caught.value)
    assert str(Path("a") / "7.png") in message and "\n" not in message and "Traceback" not in message
    assert seen < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_each_picture_has_its_own_label(tmp_path, workers):
    data = load_data(str(write_images(tmp_path / "set", "abc", 10)), img_size=8)
    transform = make_transform(data.spec, color_jitter=None, hflip=0.5, scale=(1.0, 1.0))
    batches = Batches(data.train, data.spec, 4, transform=transform, shuffle=True, workers=workers)
    mean, std = (torch.tensor(value)[:, None, None] for value in (data.spec.mean, data.spec.std))
    for images, labels in batches.epoch(1):
        grey = ((images * std + mean) * 25.5).mean((1, 2, 3)).round().long()
        assert torch.equal(grey, labels)


def test_training_stops_at_a_damaged_picture(tmp_path):
    folder = write_images(tmp_path / "set", "abc", 10)
    for path in (folder / "a").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a.*png cannot be read.*remove it"):
        train(small(dataset=str(folder), img_size=32, batch_size=4, epochs=1))


@pytest.mark.parametrize("part", ["val", "test"])
def test_unknown_classes_of_a_part_are_listed(tmp_path, part):
    write_images(tmp_path / "train", "abc", 4)
    for name in ("val", "test"):
        write_images(tmp_path / name, "abde" if name == part else "abc", 2)
    with pytest.raises(DataError, match=rf"{part} has classes .*not have: d, e\. Known: a, b, c\."):
        load_data(str(tmp_path))


def test_a_part_keeps_the_numbers_of_training(tmp_path):
    write_images(tmp_path / "train", "abc", 4)
    write_images(tmp_path / "val", "ac", 2)
    write_images(tmp_path / "test", "c", 1)
    data = load_data(str(tmp_path))
    assert data.val.labels.tolist() == [0, 0, 2, 2]
    assert data.test.labels.tolist() == [2]


def test_images_outside_any_class_are_refused(tmp_path):
    write_images(tmp_path, "ab", 4)
    shutil.copy(tmp_path / "a" / "0.png", tmp_path / "stray.png")
    with pytest.raises(DataError, match="outside the subfolder of any class"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_cut_are_refused_before_training(tmp_path, count):
    folder = write_images(tmp_path / "set", "ab", count)
    with pytest.raises(DataError, match=r"'folder' cannot be cut into .*two of them.*Add images"):
        load_data(str(folder))
    with pytest.raises(DataError, match="cannot be cut"):
        train(small(dataset=str(folder), output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2]])
def test_nothing_can_be_held_out(labels):
    with pytest.raises(DataError, match=f"held out of {len(labels)} row"):
        hold_out(torch.tensor(labels, dtype=torch.int64), 0.1, seed=0)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_refuses_an_empty_part(tmp_path, part):
    digits = some_digits()
    parts = {name: digits.part(name) for name in ("train", "val", "test")}
    parts[part] = parts[part].subset(torch.arange(0))
    with pytest.raises(DataError, match=r"ing part|validation part"):
        train(small(output=str(tmp_path / "run")), data=DataSplits(digits.spec, **parts))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", [".", "MNIST/raw"])
def test_labels_that_the_set_cannot_have(tmp_path, below):
    write_idx(tmp_path / below, classes=12)
    with pytest.raises(DataError, match=r"labels of 'mnist' go from 0 to 11.*10 classes, 0 to 9"):
        load_data("mnist", str(tmp_path))


@pytest.mark.parametrize(("counts", "part"), [((0, 0), "training"), ((0, 20), "training"), ((60, 0), "test")])
def test_an_empty_idx_set(tmp_path, counts, part):
    write_idx(tmp_path, counts)
    with pytest.raises(DataError, match=f"{part} part of 'mnist' is empty"):
        load_data("mnist", str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_files_in_torchvisions_layout(tmp_path, file, damage):
    folder = write_idx(tmp_path / "MNIST" / "raw")
    DAMAGES[damage](folder / file)
    with pytest.raises(DataError) as caught:
        load_data("mnist", str(tmp_path))
    message = str(caught.value)
    assert str(tmp_path) in message and "--dataset-download" in message and "\n" not in message
