# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a classifier."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import data
from contrastive.evaluation import classifier
from tests.support import replica_run


def test_evaluate_does_not_count_images_without_a_label():
    networks = replica_run.build_networks("simclr")
    dataset = replica_run.few_photo_patches()
    source = dataset.source

    def measure(labels):
        changed = dataclasses.replace(dataset, source=data.Arrays(source.images, labels))
        stream = data.eval_stream(changed, batch_size=16)
        strategy = tf.distribute.get_strategy()
        return classifier.evaluate(networks, stream, 32, strategy, None)

    _, all_rows = measure(source.labels)
    is_odd = np.arange(40) % 2 == 1
    measured, rows = measure(np.where(is_odd, source.labels, -1))
    assert measured["num_examples"] == 20
    np.testing.assert_array_equal(rows, all_rows[is_odd])
    accuracy = np.mean(rows[:, 1] == rows[:, 2])
    assert measured["top_1_accuracy"] == pytest.approx(accuracy)
    with pytest.raises(classifier.NoLabelledImage, match="no labelled image"):
        measure(np.full(40, -1))
