# SPDX-License-Identifier: Apache-2.0
"""`contrastive_metrics` of known embeddings."""

import math

import numpy as np
import tensorflow as tf

import objective


def test_contrastive_metrics_orthogonal_rows_equal_known_values():
    identity = tf.eye(4)
    metrics = objective.contrastive_metrics(identity, tf.roll(identity, 1, axis=0), temperature=1.0)
    assert metrics["contrast_accuracy"] == 0.0
    probabilities = np.exp([1, 0, 0, 0]) / np.exp([1, 0, 0, 0]).sum()
    np.testing.assert_allclose(
        metrics["contrast_entropy"],
        -(probabilities * np.log(probabilities)).sum(),
        rtol=1e-5,
    )
    np.testing.assert_allclose(metrics["effective_rank"], 4.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_similarity"], 0.0, atol=1e-6)
    np.testing.assert_allclose(metrics["positive_similarity"], 0.0, atol=1e-6)


def test_contrastive_metrics_equal_rows_indicate_collapse():
    same = tf.ones([6, 5])
    metrics = objective.contrastive_metrics(same, same, temperature=0.1)
    np.testing.assert_allclose(metrics["mean_similarity"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["effective_rank"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["feature_std"], 0.0, atol=1e-5)
    np.testing.assert_allclose(metrics["contrast_entropy"], math.log(6), rtol=1e-5)
