# SPDX-License-Identifier: Apache-2.0
"""Gradients that are accumulated over parts of a batch."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import data
import objective as objective_lib
import resnet
from contrastive.training import loop
from contrastive.training.state import TrainState
from tests.support import replica_run

# A penalty, a trained temperature, a queue and small views, and statistics of the batch; the others
# are slow tests.
_FAST = ("wpc", "siglip", "semppl", "barlow_twins", "vicreg")


def _two_steps(objective, parts):
    """Returns metrics of two steps and how far every variable moved.

    BatchNorm is frozen: then no row of a batch depends on another one before the loss, and
    gradients by parts are those of the whole batch.
    """
    networks = replica_run.build_networks(objective)
    for part in networks.models().values():
        for layer in getattr(part, "layers", ()):
            if isinstance(layer, resnet.GlobalBatchNorm):
                layer.trainable = False
    config = dataclasses.replace(
        replica_run.config(objective, "momentum"),
        peak_learning_rate=1e-2,
        accumulate_steps=parts,
    )
    state = TrainState.create(config, networks, labelled=replica_run.labelled())
    compiled = loop.CompiledLoop(
        tf.distribute.get_strategy(), loop.build_step(config, state), False
    )

    def values():
        return {
            f"{name}/{v.path}": v.numpy()
            for name, part in state.layers().items()
            for v in part.variables
        }

    before = values()
    stream = data.train_stream(
        replica_run.few_photo_patches(),
        batch_size=config.batch_size,
        seed=config.seed,
        views=config.views,
    )
    metrics = compiled(iter(stream), 2)
    return metrics, {k: v - before[k] for k, v in values().items()}


@pytest.mark.parametrize(
    "objective",
    [
        name if name in _FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in objective_lib.OBJECTIVES
    ],
)
def test_gradients_of_two_parts_equal_those_of_the_whole_batch(objective):
    (one, moved), (two, moved_in_parts) = (_two_steps(objective, parts) for parts in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    assert sum(np.any(change) for change in moved.values()) > 5
    for path, change in moved.items():
        error = np.linalg.norm(moved_in_parts[path] - change)
        assert error <= 1e-2 * np.linalg.norm(change) + 5e-9, path
