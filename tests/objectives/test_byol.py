# SPDX-License-Identifier: Apache-2.0
"""`byol_loss` equals references and its formula."""

import numpy as np
import pytest
import tensorflow as tf

import objective
from tests.support import ref_losses
from tests.support.many_views import (
    assert_same,
    make_pairs,
    make_views,
    unit,
    values_and_gradients,
)


def test_byol_loss_two_views_equals_numpy_reference():
    online, target = make_views(2, 0)
    np.testing.assert_allclose(
        objective.byol_loss(online, target),
        ref_losses.byol(*(z.numpy().astype(float) for z in (*online, *target))),
        rtol=1e-5,
    )


@pytest.mark.parametrize(("num_large", "num_small"), [(2, 0), (1, 1), (2, 2), (3, 1)])
def test_byol_loss_any_views_equals_loops(num_large, num_small):
    online, target = make_views(num_large, num_small)

    def loops(*views):
        o, t = views[: len(online)], views[len(online) :]
        loss = 0.0
        for a, c in make_pairs(len(o), len(t), same=False):
            for i in range(5):
                target_row = tf.stop_gradient(unit(t[c])[i])
                loss += tf.reduce_sum((unit(o[a])[i] - target_row) ** 2) / 5
        return loss

    def loss(*views):
        return objective.byol_loss(views[: len(online)], views[len(online) :])

    got = values_and_gradients(loss, *online, *target)
    assert_same(got, values_and_gradients(loops, *online, *target))
    assert got[1][len(online) :] == (None,) * num_large
