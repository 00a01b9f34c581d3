# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a trained classifier on a split."""

from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

import data_util
import model

Batch = Mapping[str, tf.Tensor]


class NoLabelledImage(ValueError):
    """No image of the split has a label."""


def in_top(k: int, logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Computes which labels are among the k best classes, as float32 `[b]`.

    The logits are float `[b, classes]`; if there are fewer than k classes, all are used. The labels
    are int `[b]`; a negative one is treated as class 0.
    """
    k = min(k, logits.shape[-1])
    found = tf.math.in_top_k(tf.maximum(labels, 0), logits, k)
    return tf.cast(found, tf.float32)


def evaluate(
    networks: model.Networks,
    stream: Iterable[Batch],
    image_size: int,
    strategy: tf.distribute.Strategy,
    crop_proportion: float | None,
) -> tuple[dict[str, float], np.ndarray]:
    """Measures top-1/top-5 accuracy and cross-entropy of the classifier.

    The stream is one of `data.eval_stream`, possibly distributed; the other arguments are as in
    `features.compute_outputs`, but encoded images must not have a crop proportion.

    Returns:
        `top_1_accuracy`, `top_5_accuracy` in [0, 1], `loss` in nats and `num_examples`, those with
        a label; and, int64 `[num_examples, 3]`, the id, the label and the predicted class of each.

    Raises:
        NoLabelledImage: if no image has a label.
    """

    def replica_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        images = data_util.eval_images(batch["image"], image_size, crop_proportion=crop_proportion)
        return _measure(networks.logits(images, training=False), batch)

    @tf.function
    def step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        sums, rows = strategy.run(replica_step, (batch,))
        sums = strategy.reduce("SUM", sums, axis=None)
        return sums, strategy.gather(rows, axis=0)

    totals, rows = np.zeros(4), []
    for batch in stream:
        batch_sums, batch_rows = step(batch)
        totals += batch_sums.numpy()
        rows.append(batch_rows.numpy())
    *_, count = totals
    if not count:
        raise NoLabelledImage("There is no labelled image to evaluate on.")
    names = ("top_1_accuracy", "top_5_accuracy", "loss")
    measured = dict(zip(names, totals / count, strict=False))
    measured["num_examples"] = int(count)
    predictions = np.concatenate(rows)
    return measured, predictions[predictions[:, 0] >= 0]


def _measure(logits: tf.Tensor, batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the sums of a batch, and its rows; the id -1 is of no image."""
    labels = batch["label"]
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    # Padding and images that cannot be decoded have weight 0.
    weight = batch["weight"] * tf.cast(labels >= 0, tf.float32)
    columns = [in_top(k, logits, labels) for k in (1, 5)]
    columns += [loss, tf.ones_like(loss)]
    known_id = tf.where(weight > 0, batch["id"], -1)
    rows = [known_id, labels, tf.argmax(logits, -1)]
    return (
        tf.linalg.matvec(tf.stack(columns), weight),
        tf.stack([tf.cast(x, tf.int64) for x in rows], 1),
    )
