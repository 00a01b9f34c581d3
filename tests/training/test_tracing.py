# SPDX-License-Identifier: Apache-2.0
"""Traces of a few steps: what differs between two of them is named."""

import numpy as np
import pytest
import tensorflow as tf

from contrastive.training import tracing


def _trace():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4))
    return {
        "metrics|1|loss": np.float32(3.0),
        "metrics|5|loss": np.float32(2.5),
        "metrics|1|entropy": np.float32(1.0),
        "gradient|1|networks/kernel": rng.normal(size=(3, 4)),
        "gradient|1|networks/bias": np.full(4, 1e-12),
        "variable|0|encoder/kernel": start,
        "variable|5|encoder/kernel": start + 0.01,
        "variable|0|encoder/moving_mean": np.zeros(4),
        "variable|1|encoder/moving_mean": np.ones(4),
        "variable|5|encoder/moving_mean": np.full(4, 2.0),
        "variable|0|objective_state/queue/embeddings": np.zeros((4, 3)),
        "variable|5|objective_state/queue/embeddings": np.ones((4, 3)),
        "variable|0|objective_state/queue/ids": np.full(4, -1),
        "variable|5|objective_state/queue/ids": np.array([7, 50_000, 123, 9]),
    }


def _differing(changed):
    one, several = _trace(), _trace()
    for key, change in changed.items():
        several[key] = change(several[key])
    found = tracing.agreements(one, several, tolerances=(0.01, 0.05))
    assert len(found) == 7
    return [row.what for row in found if not row.holds]


@pytest.mark.parametrize(
    ("key", "change", "what"),
    [
        ("metrics|1|loss", lambda x: 1.02 * x, "losses, step 1"),
        ("metrics|1|loss", lambda x: np.nan * x, "losses, step 1"),
        ("metrics|5|loss", lambda x: 1.1 * x, "losses, step 5"),
        # Summed, or averaged, once too often.
        ("gradient|1|networks/kernel", lambda x: 2 * x, "gradients, step 1"),
        (
            "variable|1|encoder/moving_mean",
            lambda x: 1.05 * x,
            "BatchNorm statistics, step 1",
        ),
        # The difference is a tenth of the movement, 0.01, and a small part of the weights.
        (
            "variable|5|encoder/kernel",
            lambda x: x + 0.001,
            "weights, step 5",
        ),
        (
            "variable|5|encoder/moving_mean",
            lambda x: 1.1 * x,
            "BatchNorm statistics, step 5",
        ),
        (
            "variable|5|objective_state/queue/embeddings",
            lambda x: 1.1 * x,
            "objective's state, step 5",
        ),
        # Ids are equal or different.
        (
            "variable|5|objective_state/queue/ids",
            lambda x: x + (x == 7),
            "objective's state, step 5",
        ),
    ],
)
def test_agreements_of_a_difference_name_its_kind(key, change, what):
    assert _differing({key: change}) == [what]


def test_agreements_of_rounding_hold():
    keys = [key for key in _trace() if not key.endswith("/ids")]
    assert not _differing({key: lambda x: x * (1 + 1e-6) for key in keys})
    # A gradient that is nothing but rounding may be any.
    assert not _differing({"gradient|1|networks/bias": lambda x: -7 * x})


class _Variable:
    """A variable with a copy on each of several replicas."""

    def __init__(self, *copies):
        self.value = [tf.constant(copy) for copy in copies]


class _Strategy:
    def experimental_local_results(self, value):
        return value


def test_check_copies_of_different_copies_raises():
    tracing._check_copies({"kernel": _Variable(1.0, 1.0)}, _Strategy())
    with pytest.raises(ValueError, match="different copies of kernel"):
        tracing._check_copies({"kernel": _Variable(1.0, 2.0)}, _Strategy())
