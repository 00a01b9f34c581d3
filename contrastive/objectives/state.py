# SPDX-License-Identifier: Apache-2.0
"""The variables that objectives keep beside the networks."""

import functools

import keras
import tensorflow as tf


class TrainedTemperature(keras.layers.Layer):
    """The variables of a trained temperature and bias.

    Source: filipbasara0/relic, relic/relic.py: logits are cosines times `min(exp(log_scale),
    max_scale)` plus `bias`.

    Args:
        bias: initial bias.
        max_scale: largest inverse temperature, > 0.
    """

    def __init__(self, bias: float = 0.0, max_scale: float = 5.0) -> None:
        super().__init__(name="temperature", dtype="float32")
        self.max_scale = max_scale
        self.log_scale = self.add_weight(name="log_scale", initializer="ones")
        self.bias = self.add_weight(name="bias", initializer=keras.initializers.Constant(bias))
        self.built = True


class LabelledQueue(keras.layers.Layer):
    """SemPPL's first-in-first-out queue of labelled images' target projections.

    It holds the projections of every large view of the same images. All replicas hold the same
    values: the rows of the global batch are pushed.

    Source: Bosnjak et al., arXiv:2301.05158, section 2.

    Args:
        num_views: number of large views.
        size: number of entries.
        dim: size of a projection.

    Attributes:
        embeddings: float32 `[num_views, size, dim]`.
        labels: int32 `[size]`.
        ids: int64 `[size]`, example ids; -1 where there is no entry yet.
        position: int64, where the next entry goes.
    """

    def __init__(self, num_views: int, size: int, dim: int) -> None:
        super().__init__(name="queue", dtype="float32")
        add = functools.partial(self.add_weight, trainable=False)
        shape = (num_views, size, dim)
        self.embeddings = add(
            name="embeddings",
            shape=shape,
            autocast=False,
            initializer="zeros",
        )
        self.labels = add(name="labels", shape=(size,), dtype="int32")
        self.ids = add(
            name="ids",
            shape=(size,),
            dtype="int64",
            initializer=keras.initializers.Constant(-1),
        )
        self.position = add(name="position", shape=(), dtype="int64", initializer="zeros")
        self.built = True

    def push(
        self, embeddings: tf.Tensor, labels: tf.Tensor, ids: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Enters the rows that have a label, in their order.

        Args:
            embeddings: float32 `[num_views, B, dim]`.
            labels: int32 `[B]`; -1: not entered.
            ids: int64 `[B]`.

        Returns:
            The new `embeddings`, `labels` and `ids` of the queue.

        Raises:
            ValueError: if a batch may be larger than the queue.
        """
        size, batch = self.labels.shape[0], labels.shape[0]
        if batch > size:
            raise ValueError(
                "The queue must hold a batch. Received: a queue of "
                f"{size} entries, a batch of {batch}."
            )
        # Shapes are static: each entry asks which row, if any, is its next.
        entered = labels >= 0
        rows = tf.argsort(tf.where(entered, 0, 1), stable=True)
        count = tf.reduce_sum(tf.cast(entered, tf.int64))
        rank = (tf.range(size, dtype=tf.int64) - self.position) % size
        row = tf.gather(rows, tf.minimum(rank, batch - 1))
        is_new = rank < count
        new = (
            tf.where(
                is_new[:, tf.newaxis],
                tf.gather(embeddings, row, axis=1),
                self.embeddings.value,
            ),
            tf.where(is_new, tf.gather(labels, row), self.labels.value),
            tf.where(is_new, tf.gather(ids, row), self.ids.value),
        )
        for variable, value in zip((self.embeddings, self.labels, self.ids), new, strict=True):
            variable.assign(value)
        self.position.assign((self.position + count) % size)
        return new


class LabelledState(keras.layers.Layer):
    """The variables that SemPPL keeps beside the networks.

    Args:
        queue: of labelled images.
        temperature: trained temperature; None if it is fixed.
    """

    def __init__(self, queue: LabelledQueue, temperature: TrainedTemperature | None) -> None:
        super().__init__(name="labelled_state", dtype="float32")
        self.queue = queue
        self.temperature = temperature
        self.built = True
