# SPDX-License-Identifier: Apache-2.0
"""Tests of folders of images, as `data.load` opens them."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

import data
from tests.support.image_data import write_pictures


def _hash(name):
    return int(hashlib.blake2b(name.encode(), digest_size=4).hexdigest(), 16)


def _evaluated(dataset, batch_size):
    """Returns the iterator over the evaluation batches of a dataset."""
    return data.eval_stream(dataset, batch_size=batch_size, image_size=6).as_numpy_iterator()


def test_class_folders_are_split_by_a_stable_hash(tmp_path):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(80)]
    root = write_pictures(tmp_path, names)
    train, test = data.load(root), data.load(root, "test")
    assert train.class_names == test.class_names == ("a", "b")
    held_out = [n for n in names if _hash(n) % 10 == 0]
    assert 2 < test.num_examples == len(held_out) < 20
    assert train.num_examples + test.num_examples == 80
    assert data.load(root, "all").num_examples == 80


@pytest.mark.parametrize("prefix", ["", "train/", "Training/"])
def test_flat_folder_is_unlabelled(tmp_path, prefix):
    root = write_pictures(tmp_path, [f"{prefix}{i}.png" for i in range(30)])
    dataset = data.load(root)
    assert dataset.num_classes == 0
    assert set(dataset.source.labels) == {-1}
    assert "unlabelled" in data.describe(dataset)


def test_class_index_is_the_same_in_every_split(tmp_path):
    names = ["train/a/0.png", "train/b/1.png", "val/b/2.png", "val/b/s/3.png"]
    root = write_pictures(tmp_path, names)
    dataset = data.load(root, "validation")
    assert dataset.class_names == ("a", "b")
    assert list(dataset.source.labels) == [1, 1]
    assert "without examples in this split: a" in data.describe(dataset)


def test_report_names_what_was_skipped_and_counts_classes(tmp_path):
    root = write_pictures(tmp_path / "x", [f"train/a/{i}.png" for i in range(3)])
    folder = tmp_path / "x" / "train" / "a"
    whole = (folder / "0.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cut.png")
    os.truncate(folder / "cut.png", 60_000)  # of 68 kB: the header is whole
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255  # both ends are whole
    (folder / "damaged.png").write_bytes(damaged)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.bmp").write_text("no image")
    (folder / "appended.png").write_bytes(whole + b"a few bytes more")
    (folder / "picture.webp").write_bytes(b"")
    (folder / ".hidden.png").write_bytes(b"")
    dataset = data.load(root)
    report = data.describe(dataset)
    assert dataset.num_examples == 4
    assert "4 unreadable, skipped: " in report
    for name in ("cut.png", "damaged.png", "empty.jpg", "text.bmp"):
        assert name in report
    assert "'.webp': 1" in report
    assert "a: 4" in report
    assert "'a' is the only folder" in report


def test_small_images_of_one_size_are_held_in_memory(tmp_path):
    names = [f"train/{i}.png" for i in range(5)]
    root = write_pictures(tmp_path / "small", names, size=(12, 10))
    dataset = data.load(root)
    assert not dataset.is_encoded
    assert dataset.image_size == (10, 12)
    np.testing.assert_array_equal(dataset.source.images[:, 0, 0, 0], [0, 1, 2, 3, 4])
    assert data.load(root, memory_limit=5 * 360 - 1).is_encoded
    root = write_pictures(tmp_path / "large", names, size=(129, 10))
    assert data.load(root).is_encoded


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("L", 1), ("L", 3), ("RGB", 1), ("RGBA", 4), ("RGB", 4), ("I;16", 1)],
)
@pytest.mark.parametrize("size", [(12, 10), (150, 150)])
def test_channels_are_those_asked_for(tmp_path, mode, channels, size):
    os.mkdir(tmp_path / "train")
    picture = Image.new(mode, size, 0x2000 if mode == "I;16" else None)
    picture.save(tmp_path / "train" / "0.png")
    dataset = data.load(str(tmp_path), channels=channels)
    batch = next(_evaluated(dataset, 1))
    assert batch["weight"][0] == 1
    assert batch["image"].shape[-1] == channels
    assert not dataset.undecodable
    if mode == "I;16":
        assert batch["image"][0, 0, 0, 0] == 0x20
        assert "16 bits" in data.describe(dataset)


def test_dropped_alpha_is_said(tmp_path):
    root = write_pictures(tmp_path, ["train/0.png"], mode="RGBA")
    assert "alpha channel" in data.describe(data.load(root))
    assert "alpha channel" not in data.describe(data.load(root, channels=4))


def test_jpeg_gif_and_bmp_are_read(tmp_path):
    names = [f"train/{i}.{e}" for i, e in enumerate(("jpg", "gif", "bmp"))]
    dataset = data.load(write_pictures(tmp_path, names))
    assert dataset.num_examples == 3
    assert not dataset.undecodable
    with pytest.raises(ValueError, match="each format decodes to.*JPEG"):
        data.load(str(tmp_path), channels=4)


def test_folder_without_images_says_what_it_holds(tmp_path):
    (tmp_path / "a.webp").write_bytes(b"")
    with pytest.raises(ValueError, match="no images.*'.webp': 1"):
        data.load(str(tmp_path))


def test_folder_of_broken_images_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="can be decoded: train.a.png"):
        data.load(str(tmp_path))


def test_folder_too_small_to_hold_out_a_test_split_is_refused(tmp_path):
    root = write_pictures(tmp_path, ["a/0.png"])
    with pytest.raises(ValueError, match="no examples in split 'test'"):
        data.load(root, "test")
