# SPDX-License-Identifier: Apache-2.0
"""Tests of TFDS datasets, as `data.load` opens them."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

import data
from tests.support.image_data import write_records


def _evaluated(dataset, batch_size):
    """Returns the iterator over the evaluation batches of a dataset."""
    return data.eval_stream(dataset, batch_size=batch_size, image_size=6).as_numpy_iterator()


def test_slices_and_sums_of_splits_are_read(tmp_path):
    root = write_records(tmp_path, 20, static=True, per_shard=6)
    dataset = data.load(root, "train[25%:75%]+train[-2:]")
    assert not dataset.is_encoded
    np.testing.assert_array_equal(dataset.source.images[:, 0, 0, 0], [*range(5, 15), 18, 19])
    encoded = data.load(root, "train[25%:75%]+train[-2:]", memory_limit=0)
    batch = next(_evaluated(encoded, 12))
    np.testing.assert_array_equal(batch["image"][:12, 0, 0, 0], dataset.source.images[:, 0, 0, 0])
    np.testing.assert_array_equal(batch["id"][:12], range(12))


@pytest.mark.prepared_data
def test_cifar10_is_loaded_as_tfds_reads_it(prepared):
    dataset = prepared("cifar10", "test[:1000]")
    assert dataset.class_names[:2] == ("airplane", "automobile")
    expected = tfds.load("cifar10", split="test[:1000]", batch_size=-1)
    np.testing.assert_array_equal(dataset.source.images, expected["image"])
    np.testing.assert_array_equal(dataset.source.labels, expected["label"])


def test_failed_preparation_names_the_folder(tmp_path, monkeypatch):
    def fail(self):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match=f"{tmp_path}.*no network.*tfds build"):
        data.load("mnist", data_dir=str(tmp_path))
