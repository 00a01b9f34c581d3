# SPDX-License-Identifier: Apache-2.0
"""`vicreg_loss` equals lightly's numbers and the paper's formula."""

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support import two_views


def test_vicreg_loss_golden_cases_equal_lightly(golden):
    two_views.check_lightly_cases(
        golden("lightly_losses.npz"),
        "vicreg",
        objective.vicreg_loss,
        {
            "invariance": "invariance",
            "variance": "variance",
            "covariance": "covariance",
            "eps": "epsilon",
        },
    )


def _variance_and_covariance(z, epsilon):
    """Computes v(Z) and c(Z) of the paper, element by element."""
    batch, dim = z.shape
    means = [sum(z[i, k] for i in range(batch)) / batch for k in range(dim)]
    variance = covariance = 0.0
    for k in range(dim):
        for m in range(dim):
            entry = sum((z[i, k] - means[k]) * (z[i, m] - means[m]) for i in range(batch)) / (
                batch - 1
            )
            if k == m:
                variance += max(0.0, 1 - (entry + epsilon) ** 0.5) / dim
            else:
                covariance += entry**2 / dim
    return variance, covariance


@pytest.mark.parametrize(("batch", "dim"), [(2, 3), (9, 4)])
def test_vicreg_loss_equals_loops(batch, dim):
    z1, z2 = (0.7 * z for z in two_views.random_views(batch, dim))
    v1, c1 = _variance_and_covariance(z1.astype(float), 1e-3)
    v2, c2 = _variance_and_covariance(z2.astype(float), 1e-3)
    distances = [sum((z1[i, k] - z2[i, k]) ** 2 for k in range(dim)) for i in range(batch)]
    # The mean over dimensions and over views where the paper has sums.
    invariance = sum(distances) / batch / dim
    expected = 2.0 * invariance + 3.0 * (v1 + v2) / 2 + 0.5 * (c1 + c2)
    assert v1 > 0
    loss = objective.vicreg_loss(
        tf.constant(z1),
        tf.constant(z2),
        invariance=2.0,
        variance=3.0,
        covariance=0.5,
        epsilon=1e-3,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_vicreg_loss_on_four_replicas_equals_one():
    two_views.check_replicas(objective.vicreg_loss)


def test_vicreg_loss_bfloat16_is_computed_in_float32():
    two_views.check_half_precision(objective.vicreg_loss)


def test_vicreg_loss_equal_rows_has_finite_gradient():
    two_views.check_collapsed_gradient(objective.vicreg_loss)


@pytest.mark.parametrize("name", ["invariance", "variance", "covariance"])
def test_vicreg_loss_negative_weight_raises(name):
    z1, z2 = map(tf.constant, two_views.random_views(4, 3))
    with pytest.raises(ValueError, match=f"`{name}` must not be negative"):
        objective.vicreg_loss(z1, z2, **{name: -1.0})


def test_vicreg_loss_bad_argument_raises():
    z1, z2 = map(tf.constant, two_views.random_views(4, 3))
    with pytest.raises(ValueError, match=r"`epsilon` must be positive"):
        objective.vicreg_loss(z1, z2, epsilon=0.0)
    with pytest.raises(ValueError, match=r"at least 2 images.*Received: 1"):
        objective.vicreg_loss(z1[:1], z2[:1])
