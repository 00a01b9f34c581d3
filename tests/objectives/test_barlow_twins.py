# SPDX-License-Identifier: Apache-2.0
"""`barlow_twins_loss` equals lightly's numbers and the paper's formula."""

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support import two_views


def test_barlow_twins_loss_golden_cases_equal_lightly(golden):
    two_views.check_lightly_cases(
        golden("lightly_losses.npz"),
        "barlow_twins",
        objective.barlow_twins_loss,
        {"lambda_param": "redundancy_weight"},
    )


@pytest.mark.parametrize(("batch", "dim"), [(2, 3), (9, 4)])
def test_barlow_twins_loss_equals_loops(batch, dim):
    # Large inputs, for which the 1e-5 added to variances has no effect.
    z1, z2 = (1000 * z for z in two_views.random_views(batch, dim))
    a, b = (z.astype(float) - z.astype(float).mean(0) for z in (z1, z2))
    expected = 0.0
    for k in range(dim):
        for m in range(dim):
            products = sum(a[i, k] * b[i, m] for i in range(batch))
            squares = sum(a[i, k] ** 2 for i in range(batch))
            squares *= sum(b[i, m] ** 2 for i in range(batch))
            correlation = products / squares**0.5
            if k == m:
                expected += (1 - correlation) ** 2
            else:
                expected += 0.02 * correlation**2
    loss = objective.barlow_twins_loss(tf.constant(z1), tf.constant(z2), redundancy_weight=0.02)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_barlow_twins_loss_on_four_replicas_equals_one():
    two_views.check_replicas(objective.barlow_twins_loss)


def test_barlow_twins_loss_bfloat16_is_computed_in_float32():
    two_views.check_half_precision(objective.barlow_twins_loss)


def test_barlow_twins_loss_equal_rows_has_finite_gradient():
    two_views.check_collapsed_gradient(objective.barlow_twins_loss)


def test_barlow_twins_loss_bad_argument_raises():
    z1, z2 = map(tf.constant, two_views.random_views(4, 3))
    with pytest.raises(ValueError, match=r"`redundancy_weight` must not"):
        objective.barlow_twins_loss(z1, z2, redundancy_weight=-1.0)
    with pytest.raises(ValueError, match=r"at least 2 images.*Received: 1"):
        objective.barlow_twins_loss(z1[:1], z2[:1])
