# SPDX-License-Identifier: Apache-2.0
"""Datasets without examples."""

import pytest
import tensorflow as tf

import data
from contrastive.sources import splits


@pytest.mark.parametrize(
    ("name", "is_encoded", "size", "classes"),
    [
        ("cifar10", False, (32, 32), 10),
        ("stl10", False, (96, 96), 10),
        ("imagenet2012", True, None, 1000),
        ("imagenet2012_subset/1pct", True, None, 1000),
        ("gs://bucket/photos", True, None, 1000),
        ("/not/here", True, None, 1000),
        ("/not/here.npz", True, None, 1000),
    ],
)
def test_outline_of_data_that_is_not_here_has_its_facts(name, is_encoded, size, classes, tmp_path):
    dataset = data.outline(name, data_dir=str(tmp_path))
    assert (dataset.is_encoded, dataset.image_size) == (is_encoded, size)
    assert (dataset.num_classes, dataset.channels) == (classes, 3)
    assert dataset.num_examples > 1e6
    assert "not here" in dataset.notes[0]
    remote = data.outline(name, data_dir="gs://bucket/data", channels=1)
    assert remote.channels == 1
    assert not list(tmp_path.iterdir())


def test_outline_of_data_that_is_here_opens_it(tmp_path):
    assert data.outline("photo_patches", "test").num_examples == 2000
    (tmp_path / "images").mkdir()
    for index in range(4):
        image = tf.io.encode_png(tf.zeros([40 + index, 30, 3], tf.uint8))
        tf.io.write_file(str(tmp_path / f"images/{index}.png"), image)
    folder = data.outline(str(tmp_path / "images"), splits.ALL)
    assert (folder.num_examples, folder.is_encoded) == (4, True)


def test_outline_of_a_misspelt_dataset_raises():
    with pytest.raises(ValueError, match="cifar10"):
        data.outline("cifar01")
