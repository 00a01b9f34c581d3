# SPDX-License-Identifier: Apache-2.0
"""Tests of `sources.py`, as `data.load` opens them, and of their reports."""

import hashlib
import os
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import data
from contrastive.sources import sources


def _picture(value, size=(12, 10), mode="RGB"):
    """Returns a picture of one colour, `value` in the first channel."""
    depth = len(Image.new(mode, (1, 1)).getbands())
    colour = (value, *(255 - value,) * (depth - 1))
    return Image.new(mode, size, colour if depth > 1 else value)


def write_pictures(root, names, **picture):
    """Writes a picture a name; the i-th has the value i."""
    for value, name in enumerate(names):
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(value, **picture).save(path)
    return str(root)


def write_records(root, num_examples, static, per_shard, hidden=()):
    """Writes a TFDS dataset of PNGs, label = id // 8, in several shards.

    Examples whose numbers are `hidden` have the label -1.
    """
    shape = (12, 12, 3) if static else (None, None, 3)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="shards",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(root),
            module_name="",
        ),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(
                    shape=shape, encoding_format="png"
                ),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
        ),
    )
    os.makedirs(root, exist_ok=True)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=per_shard)
    writer.initialize_splits(["train"])
    examples = [
        {
            "image": np.asarray(_picture(i, (12, 12))),
            "label": -1 if i in hidden else i // 8,
        }
        for i in range(num_examples)
    ]
    writer.add_examples({"train": examples})
    writer.close_all()
    return str(root)


def _evaluated(dataset, batch_size):
    """Returns the iterator over the evaluation batches of a dataset."""
    return data.eval_stream(
        dataset, batch_size=batch_size, image_size=6
    ).as_numpy_iterator()


# Folders


def test_class_folders_are_split_by_a_stable_hash(tmp_path):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(80)]
    root = write_pictures(tmp_path, names)
    train, test = data.load(root), data.load(root, "test")
    assert train.class_names == test.class_names == ("a", "b")
    held_out = [n for n in names if _hash(n) % 10 == 0]
    assert 2 < test.num_examples == len(held_out) < 20
    assert train.num_examples + test.num_examples == 80
    assert data.load(root, "all").num_examples == 80


def _hash(name):
    return int(hashlib.blake2b(name.encode(), digest_size=4).hexdigest(), 16)


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
    root = write_pictures(
        tmp_path / "x", [f"train/a/{i}.png" for i in range(3)]
    )
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
    np.testing.assert_array_equal(
        dataset.source.images[:, 0, 0, 0], [0, 1, 2, 3, 4]
    )
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


# Arrays


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
    path = _write_archive(
        tmp_path / "x.npz", 5, labels=np.arange(5), images_test=tests
    )
    assert data.load(path).num_classes == 5
    assert data.load(path, "test").num_classes == 0


def test_npz_test_images_of_another_size_are_refused(tmp_path):
    path = _write_archive(
        tmp_path / "x.npz", 5, images_test=np.zeros((2, 8, 4, 3), np.uint8)
    )
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
    with pytest.raises(sources.NoSuchSplit, match="'train'") as error:
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


# Photo patches


def test_photo_patches_are_the_same_bits_everywhere():
    train, test = (data.load("photo_patches", s) for s in ("train", "test"))
    assert train.num_examples, test.num_examples == (10_000, 2_000)
    assert np.ptp(np.bincount(train.source.labels, minlength=16)) == 0
    digests = [
        hashlib.sha256(d.source.images.tobytes()).hexdigest()[:16]
        for d in (train, test)
    ]
    assert digests == ["e3b84fb10076b65d", "ffe4e6615ba74217"]


@pytest.mark.parametrize("size", [(451, 300), (303, 384)])
def test_train_and_test_patches_share_no_pixel(size):
    boxes = {
        split: np.array(
            [
                sources._patch_box(size, split, np.random.RandomState(seed))
                for seed in range(500)
            ]
        )
        for split in ("train", "test")
    }
    seen = {split: np.zeros(size, bool) for split in boxes}
    for split, all_boxes in boxes.items():
        assert (all_boxes >= 0).all()
        assert (all_boxes[:, 2:] <= size).all()
        for left, top, right, bottom in all_boxes:
            assert right - left == bottom - top
            seen[split][left:right, top:bottom] = True
    assert not (seen["train"] & seen["test"]).any()
    assert seen["train"].mean() > 0.6
    assert seen["test"].mean() > 0.2


# TFDS


def test_slices_and_sums_of_splits_are_read(tmp_path):
    root = write_records(tmp_path, 20, static=True, per_shard=6)
    dataset = data.load(root, "train[25%:75%]+train[-2:]")
    assert not dataset.is_encoded
    np.testing.assert_array_equal(
        dataset.source.images[:, 0, 0, 0], [*range(5, 15), 18, 19]
    )
    encoded = data.load(root, "train[25%:75%]+train[-2:]", memory_limit=0)
    batch = next(_evaluated(encoded, 12))
    np.testing.assert_array_equal(
        batch["image"][:12, 0, 0, 0], dataset.source.images[:, 0, 0, 0]
    )
    np.testing.assert_array_equal(batch["id"][:12], range(12))


@pytest.mark.prepared_data
def test_cifar10_is_loaded_as_tfds_reads_it(prepared):
    dataset = prepared("cifar10", "test[:1000]")
    assert dataset.class_names[:2] == ("airplane", "automobile")
    expected = tfds.load("cifar10", split="test[:1000]", batch_size=-1)
    np.testing.assert_array_equal(dataset.source.images, expected["image"])
    np.testing.assert_array_equal(dataset.source.labels, expected["label"])


# Errors


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cifar11", "train", "no dataset of this name.*'cifar10'"),
        ("./nowhere", "train", "no such folder.*nowhere"),
        ("./nowhere.npz", "train", "No .npz archive"),
        ("photo_patches", "tset", "'tset'.*{'train': 10000, 'test': 2000}"),
        ("photo_patches", "train[:0%]", "no examples in split"),
        ("photo_patches", "all[:50%]", "no examples in split 'all"),
    ],
)
def test_unknown_name_or_split_is_explained(name, split, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, split)


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


def test_failed_preparation_names_the_folder(tmp_path, monkeypatch):
    def fail(self):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match=f"{tmp_path}.*no network.*tfds build"):
        data.load("mnist", data_dir=str(tmp_path))
