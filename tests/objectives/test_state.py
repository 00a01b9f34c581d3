# SPDX-License-Identifier: Apache-2.0
"""The variables that objectives keep: a temperature, a queue."""

import numpy as np
import pytest
import tensorflow as tf

import objective
from contrastive.objectives.base import Training
from contrastive.objectives.state import LabelledQueue, TrainedTemperature

_TRAINING = Training(
    batch_size=4,
    num_examples=4,
    num_classes=0,
    labelled=None,
    num_large_views=2,
    embedding_dim=3,
)


def test_trained_temperature_starts_at_its_arguments():
    made = TrainedTemperature(bias=-10.0, max_scale=7.0)
    assert float(made.log_scale) == 1.0
    assert float(made.bias) == -10.0
    assert made.max_scale == 7.0
    assert [v.path for v in made.trainable_variables] == [
        "temperature/log_scale",
        "temperature/bias",
    ]


@pytest.mark.parametrize(("name", "bias"), [("relic", 0.0), ("siglip", -10.0), ("relicv2", 0.0)])
def test_build_state_of_trained_temperature_has_the_objectives_bias(name, bias):
    made = objective.OBJECTIVES[name](
        learnable_temperature=True, max_inverse_temperature=3.0
    ).build_state(_TRAINING)
    assert float(made.bias) == bias
    temperature = objective.critic_temperature(made.log_scale, made.max_scale)
    np.testing.assert_allclose(temperature, max(1 / 3, np.exp(-1)), rtol=1e-6)


def test_build_state_of_fixed_temperature_is_none():
    made = objective.OBJECTIVES["relic"]()
    assert made.build_state(_TRAINING) is None


def test_push_to_a_full_queue_drops_its_oldest_entries():
    rng = np.random.default_rng(0)
    queue = LabelledQueue(2, 7, 3)
    expected = []  # (label, id, embeddings of both views), oldest first
    for step in range(6):
        z = rng.normal(size=(2, 5, 3)).astype("f")
        labels = rng.integers(-1, 3, 5).astype("int32")
        ids = np.arange(5) + 10 * step
        embeddings, stored_labels, stored_ids = (
            np.array(x) for x in queue.push(tf.constant(z), tf.constant(labels), tf.constant(ids))
        )
        for row in range(5):
            if labels[row] >= 0:
                expected.append((labels[row], ids[row], z[:, row]))
        expected = expected[-7:]
        by_id = dict(zip(stored_ids, range(7), strict=True))
        assert set(by_id) - {-1} == {entry[1] for entry in expected}
        for label, example, embedding in expected:
            slot = by_id[example]
            assert stored_labels[slot] == label
            np.testing.assert_array_equal(embeddings[:, slot], embedding)
        np.testing.assert_array_equal(queue.ids, stored_ids)
        np.testing.assert_array_equal(queue.embeddings, embeddings)


def test_push_of_a_batch_larger_than_the_queue_raises():
    queue = LabelledQueue(1, 2, 3)
    with pytest.raises(ValueError, match="a batch of 4"):
        queue.push(tf.zeros([1, 4, 3]), tf.zeros([4], "int32"), tf.zeros([4], "int64"))
