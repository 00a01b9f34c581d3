# SPDX-License-Identifier: Apache-2.0
"""Tests of `labels.py`."""

import dataclasses

import numpy as np
import pytest

import data
from contrastive.sources import labels
from contrastive.sources.arrays import Arrays
from tests.support.image_data import write_pictures


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
    ids = labels.choose(dataset, fraction=fraction, seed=1)
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    chosen = np.bincount(dataset.source.labels[ids])
    assert sorted(chosen) == (counts or [80] * 5)


def test_choose_fraction_gives_the_remainder_to_larger_classes():
    dataset = _dataset([3, 9, 3])  # 8 of 15: 2, 3, 3 or 3, 3, 2 or 3, 2, 3
    choices = [labels.choose(dataset, fraction=8 / 15, seed=s) for s in range(20)]
    chosen = {tuple(np.bincount(dataset.labels()[ids])) for ids in choices}
    assert chosen == {(2, 3, 3), (3, 3, 2), (3, 2, 3)}
    dataset = _dataset([2, 9, 3])  # 8 of 14
    ids = labels.choose(dataset, fraction=8 / 14, seed=0)
    assert list(np.bincount(dataset.source.labels[ids])) == [2, 3, 3]


def test_choice_depends_on_the_seed_and_grows():
    dataset = _dataset([50] * 4)
    few, same, more, other = (
        set(labels.choose(dataset, per_class=n, seed=s))
        for n, s in ((5, 1), (5, 1), (20, 1), (5, 2))
    )
    assert few == same
    assert few < more
    assert few != other
    assert (len(few), len(more)) == (20, 80)


def test_choice_does_not_depend_on_other_examples():
    dataset = _dataset([50] * 4)
    chosen = labels.choose(dataset, per_class=20, seed=1)
    within = labels.choose(data.subset(dataset, chosen), per_class=5, seed=1)
    alone = labels.choose(dataset, per_class=5, seed=1)
    np.testing.assert_array_equal(within, alone)


def test_choice_that_cannot_be_is_explained():
    dataset = _dataset([10, 2, 3])
    with pytest.raises(ValueError, match="too few examples: b: 2 of 3"):
        labels.choose(dataset, per_class=3, seed=0)
    with pytest.raises(ValueError, match="b: 2 of 5, c: 3 of 5"):
        labels.choose(dataset, fraction=1.0, seed=0)
    unlabelled = dataclasses.replace(dataset, class_names=())
    with pytest.raises(ValueError, match="has no labels"):
        labels.choose(unlabelled, per_class=3, seed=0)
    for wrong in (
        {},
        {"fraction": 0.1, "per_class": 1},
        {"fraction": 0.1, "per_class": 0},
        {"fraction": 1.1},
        {"per_class": 0},
    ):
        with pytest.raises(ValueError, match="Either `fraction`"):
            labels.choose(dataset, **wrong, seed=0)


@pytest.fixture
def folder(tmp_path):
    names = [f"train/{'abc'[i // 4]}/{i:02}.png" for i in range(12)]
    return write_pictures(tmp_path / "folder", [*names, "train/b/00.png"])


# Files of ids or names


def _from_lines(dataset, tmp_path, *lines):
    path = tmp_path / "list.txt"
    path.write_text("\n".join([*lines, "", ""]))
    return labels.from_file(dataset, str(path)).tolist()


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_a_file_lists_ids_paths_or_names(folder, tmp_path, memory_limit):
    dataset = data.load(folder, memory_limit=memory_limit)
    lines = ("05.png", "a/02.png", "train/b/00.png")
    assert _from_lines(dataset, tmp_path, *lines) == [2, 4, 6]
    assert _from_lines(dataset, tmp_path, "11", "03", "7", "3") == [3, 7, 11]


def test_unknown_and_ambiguous_names_are_counted(folder, tmp_path):
    dataset = data.load(folder)
    lines = ["x.png", "y.png", "00.png", "01.png"]
    with pytest.raises(ValueError, match="4 ex.* 2 are not.*x.png, y.png.*1 co"):
        _from_lines(dataset, tmp_path, *lines)
    with pytest.raises(ValueError, match="2 examples.* 1 are not in .*: 13"):
        _from_lines(dataset, tmp_path, "12", "13")
    with pytest.raises(ValueError, match="No example is listed"):
        _from_lines(dataset, tmp_path)


def test_ids_are_written_and_read(tmp_path):
    ids = np.array([3, 5, 2**40])
    for written in ([1], ids):
        labels.write(str(tmp_path / "run"), written)
    assert (tmp_path / "run" / "labelled_ids.txt").read_text()[:4] == "3\n5\n"
    read = labels.read(str(tmp_path / "run"))
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, ids)
    assert len(list((tmp_path / "run").iterdir())) == 1
    with pytest.raises(ValueError, match="no such file.*labelled_ids.txt"):
        labels.read(str(tmp_path))
