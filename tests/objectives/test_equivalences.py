# SPDX-License-Identifier: Apache-2.0
"""Objectives that are equal for some values of their hyperparameters."""

import numpy as np
import tensorflow as tf

from contrastive.objectives.base import Embedded, StepContext, Training
from contrastive.training.replicas import ReplicaGather
from tests.support import replica_run

_ROWS, _DIM, _VIEWS = 16, 8, 2
_TRAINING = Training(
    batch_size=_ROWS,
    num_examples=_ROWS,
    num_classes=3,
    labelled=None,
    num_large_views=_VIEWS,
    embedding_dim=_DIM,
)


def _draw(use, groups, count):
    draws = np.random.default_rng(use).random((groups, _ROWS, count))
    return tf.constant(draws, tf.float32)


def _loss(name, *, labelled=False, **hyperparameters):
    """Computes an objective of two large views; all images are of one class.

    Without labels, SemPPL's queue stays empty and no row has a positive.
    """
    objective = replica_run.make_objective(name, **hyperparameters)
    rng = np.random.default_rng(0)
    online, target = (
        [tf.constant(rng.normal(size=(_ROWS, _DIM)), tf.float32) for _ in range(_VIEWS)]
        for _ in range(2)
    )
    context = StepContext(
        batch={
            "id": tf.range(_ROWS, dtype=tf.int64),
            "epoch": tf.zeros([_ROWS], tf.int32),
            "label": tf.fill([_ROWS], 0 if labelled else -1),
        },
        gather=ReplicaGather(),
        step=tf.constant(0, tf.int64),
        state=objective.build_state(_TRAINING),
        training=_TRAINING,
        draw=_draw,
    )
    features = tf.zeros([_VIEWS * _ROWS, _DIM])
    loss, _ = objective(Embedded(online, target, features, tf.zeros([])), context)
    return float(loss)


def test_relicv2_with_relics_terms_equals_relic():
    relic = _loss("relic", alpha=0.0, temperature=0.2)
    relicv2 = _loss(
        "relicv2",
        invariance_weight=0.0,
        contrast_weight=1.0,
        num_negatives=0,
        include_same_view=False,
        average_pairs=False,
    )
    np.testing.assert_allclose(relicv2, relic, rtol=1e-6)


def test_semppl_with_an_empty_queue_equals_relicv2():
    np.testing.assert_allclose(_loss("semppl"), _loss("relicv2"), rtol=1e-6)


def test_semppl_without_its_own_terms_equals_relicv2():
    off = {"semantic_weight": 0.0, "semantic_invariance": False}
    np.testing.assert_allclose(_loss("semppl", labelled=True, **off), _loss("relicv2"), rtol=1e-6)


def test_semppl_with_positives_differs_from_an_empty_queue():
    assert _loss("semppl", labelled=True) != _loss("semppl")
