"""Data sets: where they are found, how they are cut, and that batches depend on (seed, epoch, step) alone."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from zoo.data import SPECS, Batches, hold_out, load_data, make_transform, sources
from zoo.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No test sees data sets of the machine it runs on."""
    monkeypatch.setenv("TWNN_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "debian")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def write_idx(folder: Path, counts=(60, 20), suffix=".gz", size=28):
    """Four idx files like those of MNIST; every image has the grey value of its label times ten."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.broadcast_to(labels[:, None, None] * 10, (count, size, size)).astype(np.uint8)
        for kind, array in ((f"images-idx{images.ndim}", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            opener = gzip.open if suffix else open
            with opener(folder / f"{prefix}-{kind}-ubyte{suffix}", "wb") as file:
                file.write(header + array.tobytes())


def test_digits_are_cut_into_disjoint_stratified_parts(digits):
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1295, 143, 359)
    again = load_data("digits")
    for name in ("train", "val", "test"):
        part = digits.part(name)
        assert torch.equal(part.images, again.part(name).images)
        share = part.labels.bincount() / len(part)
        assert (share - 0.1).abs().max() < 0.012
    images = torch.cat([digits.train.images, digits.val.images, digits.test.images]).float() / 255
    assert images.shape == (1797, 1, 8, 8)
    assert images.max() == 1
    assert abs(images.mean() - digits.spec.mean[0]) < 1e-3
    assert abs(images.std() - digits.spec.std[0]) < 1e-3


def test_hold_out_keeps_proportions_and_depends_on_the_seed():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2])
    kept, held = hold_out(labels, 0.1, seed=3)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(111))
    assert labels[held].bincount().tolist() == [10, 1]  # the class with one image stays in training
    assert torch.equal(held, hold_out(labels, 0.1, seed=3)[1])
    assert not torch.equal(held, hold_out(labels, 0.1, seed=4)[1])


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("below", [".", "fashion-mnist"])
def test_flat_idx_files_are_read_in_place(tmp_path, suffix, below):
    write_idx(tmp_path / "here" / below, suffix=suffix)
    data = load_data("fashion_mnist", str(tmp_path / "here"))
    assert (len(data.train), len(data.val), len(data.test)) == (50, 10, 20)
    assert torch.equal(data.train.images[:, 0, 0, 0].long(), data.train.labels * 10)


def test_debians_package_is_found_without_a_data_dir(tmp_path):
    write_idx(tmp_path / "debian")
    assert len(load_data("fashion_mnist").test) == 20
    with pytest.raises(DataError, match="elsewhere"):  # who says where, means there
        load_data("fashion_mnist", str(tmp_path / "elsewhere"))


def test_torchvisions_own_layout_is_read(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw", suffix="")
    assert len(load_data("torch/mnist", str(tmp_path)).test) == 20


def test_a_damaged_idx_file_is_named(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        load_data("mnist", str(tmp_path))
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-5]))
    with pytest.raises(DataError, match=r"promises \(60, 28, 28\)"):
        load_data("mnist", str(tmp_path))
    path.write_bytes(gzip.compress(b"not idx at all"))
    with pytest.raises(DataError, match="not an idx file"):
        load_data("mnist", str(tmp_path))


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch):
    """A small CIFAR-10 in its real format; torchvision checks MD5, so the test teaches it these sums."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(count: int) -> dict:
        labels = [i % 10 for i in range(count)]
        planes = [np.full((count, 1024), plane, np.uint8) for plane in (10, 20, 30)]
        return {"data": np.hstack(planes), "labels": labels}

    monkeypatch.setattr(CIFAR10, "train_list", [write(f"data_batch_{i}", batch(40)) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch(30))])
    name, md5 = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def test_cifar10_is_read_from_its_archive(cifar_archive):
    data = load_data("cifar10", str(cifar_archive.parent))
    assert (len(data.train), len(data.val), len(data.test)) == (180, 20, 30)
    assert data.train.images.shape[1:] == (3, 32, 32)
    assert data.train.images[0, :, 0, 0].tolist() == [10, 20, 30]  # channels stay in order


def test_a_corrupt_cifar10_is_refused(cifar_archive):
    path = cifar_archive / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"not completely.*--dataset-download"):
        load_data("cifar10", str(cifar_archive.parent))


def test_a_missing_set_says_where_and_how(tmp_path, monkeypatch):
    with pytest.raises(DataError) as caught:
        load_data("fashion_mnist")
    message = str(caught.value)
    for part in (str(tmp_path / "cache"), str(tmp_path / "debian"), "--dataset-download", "--data-dir"):
        assert part in message
    assert "\n" not in message
    assert isinstance(caught.value, FileNotFoundError)


def test_a_failed_download_gives_its_reason(tmp_path, monkeypatch):
    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"download failed \(no route to host\)"):
        load_data("cifar10", str(tmp_path), download=True)


def test_unknown_and_contradicting_names(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'cifar10'"):
        load_data("cifar11")
    with pytest.raises(ConfigError, match="--data-dir"):
        load_data("folder")
    with pytest.raises(ConfigError, match="contradicts"):
        load_data(str(tmp_path), data_dir="elsewhere")
    with pytest.raises(DataError, match="no image folder"):
        load_data(str(tmp_path / "missing"))


def write_images(folder: Path, count: int, classes=("ant", "bee")):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 10), (100 * number, i, 0)).save(folder / name / f"{i}.png")


def test_image_folder_without_parts(tmp_path):
    write_images(tmp_path / "set", 20)
    data = load_data(str(tmp_path / "set"), img_size=8)
    assert data.spec.num_classes == 2
    assert (len(data.train), len(data.val), len(data.test)) == (28, 4, 8)
    images, labels = next(iter(Batches(data.test, data.spec, 4)))
    assert images.shape == (4, 3, 8, 8)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"train": 20, "val": 5, "test": 7}, (40, 10, 14)),
        ({"train": 20, "val": 5}, (36, 4, 10)),  # the only other part is kept for the test
        ({"train": 20, "test": 7}, (36, 4, 14)),
    ],
)
def test_image_folder_with_parts(tmp_path, parts, sizes):
    for name, count in parts.items():
        write_images(tmp_path / name, count)
    data = load_data("folder", str(tmp_path), img_size=8)
    assert (len(data.train), len(data.val), len(data.test)) == sizes


def test_a_test_folder_keeps_the_class_numbers_of_training(tmp_path):
    write_images(tmp_path / "train", 10, ("ant", "bee", "cow"))
    write_images(tmp_path / "test", 2, ("cow",))
    assert load_data(str(tmp_path)).test.labels.tolist() == [2, 2]


def test_an_empty_image_folder(tmp_path):
    with pytest.raises(DataError, match="image folder"):
        load_data(str(tmp_path))


def batches(data, **options) -> Batches:
    return Batches(data.train, data.spec, 32, shuffle=True, drop_last=True, **options)


def same(left, right) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(left, right, strict=True)
    )


AUGMENT = {"hflip": 0.5, "color_jitter": None, "re_prob": 0.5, "train_crop_mode": "rkrr"}


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_a_function_of_seed_and_epoch(digits, augment):
    transform = make_transform(digits.spec, **AUGMENT) if augment else None
    first = list(batches(digits, seed=5, transform=transform).epoch(3))
    torch.rand(7), np.random.rand(3), random.random()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = batches(digits, seed=5, transform=transform)
    assert same(first, again.epoch(3))
    assert same(first[11:], again.epoch(3, start=11))
    assert not same(first, again.epoch(4))
    assert not same(first, batches(digits, seed=6, transform=transform).epoch(3))
    # nor is the global random state touched, which dropout depends on
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_workers_do_not_change_the_batches(digits):
    transform = make_transform(digits.spec, **AUGMENT)
    small = Batches(digits.val, digits.spec, 32, shuffle=True, transform=transform)
    parallel = Batches(digits.val, digits.spec, 32, shuffle=True, transform=transform, workers=2)
    assert same(small.epoch(1), parallel.epoch(1))


def test_an_epoch_sees_every_row_once(digits):
    loader = Batches(digits.val, digits.spec, 32, shuffle=True)
    assert sorted(torch.cat(loader.order(2)).tolist()) == list(range(len(digits.val)))
    whole = batches(digits)
    assert [len(y) for _, y in whole.epoch(0)] == [32] * len(whole)


def test_processes_share_an_epoch(digits):
    parts = [batches(digits, rank=rank, world_size=3) for rank in range(3)]
    orders = [torch.cat(part.order(1)).tolist() for part in parts]
    assert len({len(order) for order in orders}) == 1
    seen = [row for order in orders for row in order]
    assert len(set(seen)) == len(seen) == 1295 - 1295 % 96


def test_fast_path_agrees_with_timms_transform(digits):
    plain = next(iter(Batches(digits.test, digits.spec, 16)))[0]
    through_timm = next(iter(Batches(digits.test, digits.spec, 16, transform=make_transform(digits.spec))))[0]
    torch.testing.assert_close(plain, through_timm, atol=1e-6, rtol=0)


def test_images_are_delivered_at_the_size_asked_for():
    data = load_data("digits", img_size=16)
    assert data.spec.input_size == (1, 16, 16)
    assert next(iter(Batches(data.val, data.spec, 4)))[0].shape == (4, 1, 16, 16)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_the_table_is_consistent(spec):
    assert len(spec.mean) == len(spec.std) == spec.in_chans
