# SPDX-License-Identifier: Apache-2.0
"""Relative and Wasserstein predictive coding beyond what test_two_view has."""

import math

import numpy as np
import tensorflow as tf

import objective
from tests.support.two_views import known_gather, random_views

_T = 0.7


def test_rpc_loss_marginal_norm_local_replica_divides_by_local_batch():
    """It divides a global sum of negatives by the local count of images."""
    z1, z2 = map(tf.constant, random_views(8, 5))
    views = list(zip(tf.split(z1, 2), tf.split(z2, 2), strict=True))

    def loss(alpha, marginal_norm):
        return objective.rpc_loss(
            *views[0], temperature=_T, alpha=alpha, beta=0.0, gamma=0.0,
            gather=known_gather(views, 0), marginal_norm=marginal_norm,
        )  # fmt: skip

    joint = loss(0.0, "global")
    np.testing.assert_allclose(joint, loss(0.0, "local_replica"))
    np.testing.assert_allclose(
        loss(1.0, "local_replica") - joint,
        (loss(1.0, "global") - joint) * (8 - 1) / (4 - 1),
        rtol=1e-4,
    )


def test_gradient_penalty_unit_gradient_is_zero():
    unit = tf.constant(np.full((2, 3, 3, 1), 1 / math.sqrt(18), np.float32))
    assert objective.gradient_penalty(unit, unit) < 1e-9
    np.testing.assert_allclose(objective.gradient_penalty(2 * unit, 2 * unit), 1.0, rtol=1e-5)
