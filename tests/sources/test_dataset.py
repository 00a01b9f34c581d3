# SPDX-License-Identifier: Apache-2.0
"""Tests of `dataset.py`: labels and names of each kind of source."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

import data
from contrastive.sources import arrays, dataset as dataset_lib, records
from tests.support.image_data import write_pictures, write_records


@pytest.fixture
def folder(tmp_path):
    names = [f"train/{'abc'[i // 4]}/{i:02}.png" for i in range(12)]
    return write_pictures(tmp_path / "folder", [*names, "train/b/00.png"])


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_names_and_labels_of_a_folder(folder, memory_limit):
    dataset = data.load(folder, memory_limit=memory_limit)
    assert dataset.is_encoded == (memory_limit == 0)
    labels = [0] * 4 + [1] * 5 + [2] * 4
    np.testing.assert_array_equal(dataset.labels(), labels)
    some = data.subset(dataset, [4, 0])
    assert some.names() == ["train/a/00.png", "train/b/00.png"]
    np.testing.assert_array_equal(some.labels(), [0, 1])


def test_labels_of_records(tmp_path):
    root = write_records(tmp_path, 23, static=False, per_shard=4)
    dataset = data.load(root, "train[2:]")
    expected = np.arange(2, 23) // 8
    actual = dataset.labels()
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)
    with pytest.raises(ValueError, match="no file names"):
        dataset.names()


@pytest.mark.prepared_data
def test_names_of_imagenet(prepared):
    dataset = prepared("imagenet2012", "train")
    names = dataset.names()
    expected = tfds.load(
        "imagenet2012",
        split="train",
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    expected = list(expected.as_numpy_iterator())
    assert names == [example["file_name"].decode() for example in expected]
    labels = [example["label"] for example in expected]
    np.testing.assert_array_equal(dataset.labels(), labels)


@pytest.mark.parametrize(
    ("split", "ids", "expected"),
    [
        ("train", None, True),
        ("train[12:20]", None, False),
        ("train[11:20]", None, True),
        ("train[:4]+train[8:9]", None, True),
        ("train", [13, 14, 19], False),
        ("train", [13, 14, 20], True),
        ("train[12:]", [0, 1], False),
    ],
)
def test_has_labels_honours_shards_slices_and_subsets(tmp_path, split, ids, expected):
    """Shards of 4 records; labels of examples 12 to 19 are hidden."""
    root = write_records(tmp_path, 24, False, 4, hidden=range(12, 20))
    dataset = data.load(root, split)
    assert dataset.is_encoded
    if ids is not None:
        dataset = data.subset(dataset, ids)
    assert dataset.has_labels() is expected


def test_has_labels_reads_the_start_of_each_shard_only(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_RECORDS_LOOKED_AT", 3)
    for last, expected in ((2, True), (3, False)):
        hidden = set(range(24)) - {8 + last}
        root = write_records(tmp_path / str(last), 24, False, 8, hidden=hidden)
        assert data.load(root).has_labels() is expected


def test_has_labels_is_false_without_a_label_feature(tmp_path):
    root = write_records(tmp_path, 8, False, 4)
    dataset = data.load(root)
    source = dataclasses.replace(dataset.source, label_key="")
    assert not dataclasses.replace(dataset, source=source).has_labels()


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_has_labels_of_images_outside_class_folders_is_false(tmp_path, memory_limit):
    names = ["train/a/0.png", "train/1.png", "test/2.png"]
    root = write_pictures(tmp_path, names)
    train = data.load(root, memory_limit=memory_limit)
    assert train.has_labels()
    outside = int(np.flatnonzero(train.labels() < 0)[0])
    assert not data.subset(train, [outside]).has_labels()
    test = data.load(root, "test", memory_limit=memory_limit)
    assert not test.has_labels()


# Fingerprints


def test_fingerprint_of_images_in_memory_stays_the_same():
    """A cache of features of an earlier version is found again."""
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    request = dataset_lib.Request(name="d", split="test")
    dataset = arrays.in_memory(request, images, np.arange(5) % 2, "ab")
    assert dataset.fingerprint() == "2ba24adffb38bb1001c547f371c7b7c0"
    other = arrays.in_memory(request, images, np.arange(5) % 3, "abc")
    few = data.subset(dataset, [0, 2])
    assert len({d.fingerprint() for d in (dataset, other, few)}) == 3


def test_fingerprint_of_files_changes_with_a_file(folder):
    dataset = data.load(folder, memory_limit=0)
    before = dataset.fingerprint()
    assert data.load(folder, memory_limit=0).fingerprint() == before
    with open(dataset.source.paths[1], "ab") as file:
        file.write(b"more")
    assert dataset.fingerprint() != before


def test_fingerprint_of_records_depends_on_the_split(tmp_path):
    root = write_records(tmp_path, 23, static=False, per_shard=4)
    first, second = (data.load(root, s) for s in ("train[:9]", "train[9:18]"))
    assert first.fingerprint() != second.fingerprint()
    assert first.fingerprint() == data.load(root, "train[:9]").fingerprint()
