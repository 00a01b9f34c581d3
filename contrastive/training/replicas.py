# SPDX-License-Identifier: Apache-2.0
"""Exchange between replicas in a step: gathered rows, the share of the loss."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from contrastive.training.optimizers import Optimizers


class ReplicaGather:
    """The `gather` of the objectives, by the replica context.

    A tensor is gathered once however many objectives and metrics ask for it. The gradient of a
    gathered row flows back to the replica that owns it.
    """

    def __init__(self) -> None:
        self._context = tf.distribute.get_replica_context()
        self._gathered: dict[Any, tf.Tensor] = {}

    def __call__(self, z: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the rows of all replicas, and the index of our first one."""
        num_replicas = self._context.num_replicas_in_sync
        if num_replicas == 1:
            return z, 0
        if z.ref() not in self._gathered:
            rows = self._context.all_gather(z, axis=0)
            rows.set_shape([num_replicas * z.shape[0], *z.shape[1:]])
            self._gathered[z.ref()] = rows
        replica = tf.cast(self._context.replica_id_in_sync_group, tf.int32)
        return self._gathered[z.ref()], replica * z.shape[0]


def replica_share(*losses: tf.Tensor) -> tf.Tensor:
    """Returns this replica's part of the global mean loss.

    Keras sums gradients over replicas: this is the one place that divides.
    """
    context = tf.distribute.get_replica_context()
    return tf.add_n(losses) / context.num_replicas_in_sync


def apply_gradients(
    optimizers: Optimizers,
    variables: Iterable[list[tf.Variable]],
    gradients: Iterable[list[tf.Tensor | None]],
) -> None:
    """Lets every optimizer update its variables, if it has any.

    Variables and their gradients are lists by optimizer, in its order.
    """
    for optimizer, group, gradient in zip(optimizers, variables, gradients, strict=True):
        if optimizer is not None and group:
            optimizer.apply_gradients(zip(gradient, group, strict=True))
