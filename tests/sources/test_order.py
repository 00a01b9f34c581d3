# SPDX-License-Identifier: Apache-2.0
"""Tests of the permutations of `order.py`; streams test the rest."""

import numpy as np
import pytest
import tensorflow as tf

from contrastive.sources import order


@pytest.mark.parametrize("size", [1, 2, 23, 1000, 4096])
def test_permutation_has_each_index_once(size):
    index = tf.range(size, dtype=tf.int64)
    permuted = order.permute(index, size, 0, 1, tf.constant(2, tf.int64))
    np.testing.assert_array_equal(np.sort(permuted), index)


def test_permutations_of_neighbouring_epochs_and_seeds_do_not_correlate():
    # 4,096 = 2^12, where the public `index_shuffle` correlates most.
    index = tf.range(4096, dtype=tf.int64)
    orders = [index] + [
        order.permute(index, 4096, use, seed, tf.constant(epoch, tf.int64))
        for use in (0, 1)
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    ]
    correlation = np.corrcoef(np.stack(orders)) - np.eye(len(orders))
    assert np.abs(correlation).max() < 5 / 4096**0.5
