# SPDX-License-Identifier: Apache-2.0
"""Tests of NumPy archives, as `data.load` opens them."""

import hashlib

import numpy as np
import pytest

import data
from contrastive.sources.splits import NoSuchSplit


def _hash(name):
    return int(hashlib.blake2b(name.encode(), digest_size=4).hexdigest(), 16)


def test_npz_may_have_any_channels_and_no_labels(tmp_path):
    path = str(tmp_path / "x.npz")
    images = np.zeros((10, 4, 4, 6), np.uint8)
    np.savez(path, images=images, images_test=images)
    dataset = data.load(path, "train[:50%]")
    assert (dataset.num_examples, dataset.channels) == (5, 6)
    assert dataset.num_classes == 0
    with pytest.raises(ValueError, match="6 channels.*channels=3"):
        data.load(path, channels=3)


def _write_archive(path, num_images, **arrays):
    """Writes an archive of images whose first value is their number."""
    images = np.zeros((num_images, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(num_images)
    np.savez(path, images=images, **arrays)
    return str(path)


def _first_values(dataset):
    return dataset.source.images[:, 0, 0, 0].tolist()


def test_npz_without_test_images_is_split_by_a_hash_of_the_number(tmp_path):
    labels = np.arange(200) % 7 - 1
    path = _write_archive(tmp_path / "x.npz", 200, labels=labels)
    train, test = data.load(path), data.load(path, "test")
    held_out = [i for i in range(200) if _hash(str(i)) % 10 == 0]
    assert 10 < len(held_out) < 30
    assert _first_values(test) == held_out
    assert _first_values(train) == sorted({*range(200)} - {*held_out})
    assert _first_values(data.load(path, "all")) == list(range(200))
    np.testing.assert_array_equal(test.source.labels, labels[held_out])
    assert train.class_names == test.class_names == tuple("012345")
    assert "a tenth, chosen by a hash" in data.describe(test)
    longer = _write_archive(tmp_path / "y.npz", 210, labels=np.zeros(210, int))
    assert _first_values(data.load(longer, "test"))[: len(held_out)] == held_out


def test_npz_with_test_images_has_them_as_split_test(tmp_path):
    tests = np.full((2, 4, 4, 3), 9, np.uint8)
    path = _write_archive(
        tmp_path / "x.npz",
        5,
        labels=np.arange(5),
        images_test=tests,
        labels_test=np.array([7, -1]),
    )
    train, test = data.load(path), data.load(path, "test")
    assert _first_values(train) == [0, 1, 2, 3, 4]
    assert _first_values(test) == [9, 9]
    assert test.source.labels.tolist() == [7, -1]
    assert train.class_names == test.class_names == tuple("01234567")
    assert _first_values(data.load(path, "all")) == [0, 1, 2, 3, 4, 9, 9]
    assert "hash" not in data.describe(test)


def test_npz_with_unlabelled_test_images_has_labels_in_train_only(tmp_path):
    tests = np.zeros((2, 4, 4, 3), np.uint8)
    path = _write_archive(tmp_path / "x.npz", 5, labels=np.arange(5), images_test=tests)
    assert data.load(path).num_classes == 5
    assert data.load(path, "test").num_classes == 0


def test_npz_test_images_of_another_size_are_refused(tmp_path):
    path = _write_archive(tmp_path / "x.npz", 5, images_test=np.zeros((2, 8, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="of one size.*4, 4, 3.*8, 4, 3"):
        data.load(path)


@pytest.mark.parametrize("suffix", ["", "_test"])
def test_npz_label_below_minus_one_is_refused(tmp_path, suffix):
    path = str(tmp_path / "x.npz")
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.array([0, -5, -1])
    arrays = {"images": images, f"images{suffix}": images}
    np.savez(path, **arrays, **{f"labels{suffix}": labels})
    with pytest.raises(ValueError, match=f"`labels{suffix}`.* -1 .*: -5 is "):
        data.load(path, "all")


def test_npz_too_small_for_a_split_raises_no_such_split(tmp_path):
    path = _write_archive(tmp_path / "x.npz", 1)
    with pytest.raises(NoSuchSplit, match="'train'") as error:
        data.load(path, "train")
    assert error.value.splits == {"train": 0, "test": 1}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
def test_damaged_npz_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match="No .npz archive can be read"):
        data.load(str(tmp_path / "x.npz"))


def test_npz_whose_compressed_images_are_damaged_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez_compressed(path, images=images // 64)
    content = bytearray(path.read_bytes())
    start = content.index(b"images.npy") + 60
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match="No .npz archive can be read"):
        data.load(str(path))


def test_npz_test_labels_without_test_images_are_refused(tmp_path):
    path = str(tmp_path / "x.npz")
    images = np.zeros((5, 4, 4, 3), np.uint8)
    np.savez(path, images=images, labels_test=np.arange(5))
    with pytest.raises(ValueError, match="without `images_test`"):
        data.load(path)


def test_npy_under_the_name_of_an_archive_is_refused(tmp_path):
    with open(tmp_path / "x.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="No .npz archive can be read"):
        data.load(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros(3)},
        {"images": np.zeros((3, 4, 4, 3), np.float32)},
        {"images": np.zeros((3, 4, 4), np.uint8)},
        {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.zeros(3)},
        {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.arange(2)},
    ],
)
def test_npz_of_other_arrays_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match="must hold `images`, uint8"):
        data.load(str(tmp_path / "x.npz"))
