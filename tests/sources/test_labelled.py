# SPDX-License-Identifier: Apache-2.0
"""Tests of `labelled.py`."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

import data
from contrastive.sources import labelled
from contrastive.sources.sources import Arrays
from tests.sources.test_sources import write_pictures, write_records


def _dataset(counts):
    """Returns arrays with so many examples of each class, and 5 without."""
    labels = np.repeat([-1, *range(len(counts))], [5, *counts])
    labels = np.random.default_rng(0).permutation(labels).astype(np.int32)
    return data.Dataset(
        name="d",
        split="train",
        source=Arrays(np.zeros((len(labels), 4, 4, 1), np.uint8), labels),
        num_examples=len(labels),
        class_names=tuple("abcdefgh"[: len(counts)]),
        channels=1,
        image_size=(4, 4),
    )


# Choice


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.01, [1] * 5), (0.1, [8] * 5), (0.13, [10, 10, 10, 11, 11]), (1, None)],
)
def test_fraction_takes_equally_many_of_each_class(fraction, counts):
    dataset = _dataset([80] * 5)
    ids = labelled.choose(dataset, fraction=fraction, seed=1)
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    chosen = np.bincount(dataset.source.labels[ids])
    assert sorted(chosen) == (counts or [80] * 5)


def test_what_is_left_over_goes_where_there_is_more():
    dataset = _dataset([3, 9, 3])  # 8 of 15: 2, 3, 3 or 3, 3, 2 or 3, 2, 3
    labels = dataset.source.labels
    chosen = {
        tuple(
            np.bincount(
                labels[labelled.choose(dataset, fraction=8 / 15, seed=s)]
            )
        )
        for s in range(20)
    }
    assert chosen == {(2, 3, 3), (3, 3, 2), (3, 2, 3)}
    dataset = _dataset([2, 9, 3])  # 8 of 14
    ids = labelled.choose(dataset, fraction=8 / 14, seed=0)
    assert list(np.bincount(dataset.source.labels[ids])) == [2, 3, 3]


def test_choice_depends_on_the_seed_and_grows():
    dataset = _dataset([50] * 4)
    few, same, more, other = (
        set(labelled.choose(dataset, per_class=n, seed=s))
        for n, s in ((5, 1), (5, 1), (20, 1), (5, 2))
    )
    assert few == same
    assert few < more
    assert few != other
    assert (len(few), len(more)) == (20, 80)


def test_choice_does_not_depend_on_other_examples():
    dataset = _dataset([50] * 4)
    chosen = labelled.choose(dataset, per_class=20, seed=1)
    within = labelled.choose(data.subset(dataset, chosen), per_class=5, seed=1)
    alone = labelled.choose(dataset, per_class=5, seed=1)
    np.testing.assert_array_equal(within, alone)


def test_choice_that_cannot_be_is_explained():
    dataset = _dataset([10, 2, 3])
    with pytest.raises(ValueError, match="too few examples: b: 2 of 3"):
        labelled.choose(dataset, per_class=3, seed=0)
    with pytest.raises(ValueError, match="b: 2 of 5, c: 3 of 5"):
        labelled.choose(dataset, fraction=1.0, seed=0)
    unlabelled = dataclasses.replace(dataset, class_names=())
    with pytest.raises(ValueError, match="has no labels"):
        labelled.choose(unlabelled, per_class=3, seed=0)
    for wrong in (
        {},
        {"fraction": 0.1, "per_class": 1},
        {"fraction": 0.1, "per_class": 0},
        {"fraction": 1.1},
        {"per_class": 0},
    ):
        with pytest.raises(ValueError, match="Either `fraction`"):
            labelled.choose(dataset, **wrong, seed=0)


# Labels and names


@pytest.fixture
def folder(tmp_path):
    names = [f"train/{'abc'[i // 4]}/{i:02}.png" for i in range(12)]
    return write_pictures(tmp_path / "folder", [*names, "train/b/00.png"])


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_names_and_labels_of_a_folder(folder, memory_limit):
    dataset = data.load(folder, memory_limit=memory_limit)
    assert dataset.is_encoded == (memory_limit == 0)
    labels = [0] * 4 + [1] * 5 + [2] * 4
    np.testing.assert_array_equal(labelled.labels_of(dataset), labels)
    some = data.subset(dataset, [4, 0])
    assert labelled.names_of(some) == ["train/a/00.png", "train/b/00.png"]
    np.testing.assert_array_equal(labelled.labels_of(some), [0, 1])


def test_labels_of_records(tmp_path):
    root = write_records(tmp_path, 23, static=False, per_shard=4)
    dataset = data.load(root, "train[2:]")
    expected = np.arange(2, 23) // 8
    actual = labelled.labels_of(dataset)
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)
    with pytest.raises(ValueError, match="no file names"):
        labelled.names_of(dataset)


@pytest.mark.prepared_data
def test_names_of_imagenet(prepared):
    dataset = prepared("imagenet2012", "train")
    names = labelled.names_of(dataset)
    expected = tfds.load(
        "imagenet2012",
        split="train",
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    expected = list(expected.as_numpy_iterator())
    assert names == [example["file_name"].decode() for example in expected]
    labels = [example["label"] for example in expected]
    np.testing.assert_array_equal(labelled.labels_of(dataset), labels)


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
def test_has_labels_honours_shards_slices_and_subsets(
    tmp_path, split, ids, expected
):
    """Shards of 4 records; labels of examples 12 to 19 are hidden."""
    root = write_records(tmp_path, 24, False, 4, hidden=range(12, 20))
    dataset = data.load(root, split)
    assert dataset.is_encoded
    if ids is not None:
        dataset = data.subset(dataset, ids)
    assert labelled.has_labels(dataset) is expected


def test_has_labels_reads_the_start_of_each_shard_only(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "_RECORDS_LOOKED_AT", 3)
    for last, expected in ((2, True), (3, False)):
        hidden = set(range(24)) - {8 + last}
        root = write_records(tmp_path / str(last), 24, False, 8, hidden=hidden)
        assert labelled.has_labels(data.load(root)) is expected


def test_has_labels_is_false_without_a_label_feature(tmp_path):
    root = write_records(tmp_path, 8, False, 4)
    dataset = data.load(root)
    source = dataclasses.replace(dataset.source, label_key="")
    assert not labelled.has_labels(dataclasses.replace(dataset, source=source))


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_has_labels_of_images_outside_class_folders_is_false(
    tmp_path, memory_limit
):
    names = ["train/a/0.png", "train/1.png", "test/2.png"]
    root = write_pictures(tmp_path, names)
    train = data.load(root, memory_limit=memory_limit)
    assert labelled.has_labels(train)
    outside = int(np.flatnonzero(labelled.labels_of(train) < 0)[0])
    assert not labelled.has_labels(data.subset(train, [outside]))
    test = data.load(root, "test", memory_limit=memory_limit)
    assert not labelled.has_labels(test)


# Files of ids or names


def _from_lines(dataset, tmp_path, *lines):
    path = tmp_path / "list.txt"
    path.write_text("\n".join([*lines, "", ""]))
    return labelled.from_file(dataset, str(path)).tolist()


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_a_file_lists_ids_paths_or_names(folder, tmp_path, memory_limit):
    dataset = data.load(folder, memory_limit=memory_limit)
    lines = ("05.png", "a/02.png", "train/b/00.png")
    assert _from_lines(dataset, tmp_path, *lines) == [2, 4, 6]
    assert _from_lines(dataset, tmp_path, "11", "03", "7", "3") == [3, 7, 11]


def test_unknown_and_ambiguous_names_are_counted(folder, tmp_path):
    dataset = data.load(folder)
    lines = ["x.png", "y.png", "00.png", "01.png"]
    with pytest.raises(
        ValueError, match="4 ex.* 2 are not.*x.png, y.png.*1 co"
    ):
        _from_lines(dataset, tmp_path, *lines)
    with pytest.raises(ValueError, match="2 examples.* 1 are not in .*: 13"):
        _from_lines(dataset, tmp_path, "12", "13")
    with pytest.raises(ValueError, match="No example is listed"):
        _from_lines(dataset, tmp_path)


def test_ids_are_written_and_read(tmp_path):
    ids = np.array([3, 5, 2**40])
    for written in ([1], ids):
        labelled.write(str(tmp_path / "run"), written)
    assert (tmp_path / "run" / "labelled_ids.txt").read_text()[:4] == "3\n5\n"
    read = labelled.read(str(tmp_path / "run"))
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, ids)
    assert len(list((tmp_path / "run").iterdir())) == 1
    with pytest.raises(ValueError, match="no such file.*labelled_ids.txt"):
        labelled.read(str(tmp_path))
