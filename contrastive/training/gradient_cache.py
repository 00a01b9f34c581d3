# SPDX-License-Identifier: Apache-2.0
"""Gradients of a batch that is embedded in parts.

The rows are embedded in K parts, whose activations are not kept. The loss of all embeddings gives
gradients with respect to these; a second pass over the parts takes them on to the weights. This is
the gradient of the loss of the whole batch, except that BatchNorm's statistics are those of each
part.

Source: Gao et al., arXiv:2101.06983 (GradCache).
"""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

import resnet
from contrastive.objectives.base import Embedded, Metrics
from contrastive.training.replicas import replica_share
from contrastive.training.views import Batch


def gradients(
    embed: Callable[[Batch, bool], Embedded],
    loss: Callable[[Batch, Embedded], tuple[tf.Tensor, Metrics]],
    batch: Batch,
    groups: list[list[tf.Variable]],
    *,
    has_target: bool,
    count: int,
) -> tuple[list[list[tf.Tensor]], Metrics]:
    """Returns gradients of the loss by group of variables, and the metrics.

    Args:
        embed: from a batch, and whether to use the target network, to its embeddings.
        loss: from a batch and its embeddings to the loss and the metrics.
        batch: rows of this replica.
        groups: variables to differentiate by.
        has_target: whether there is a target network.
        count: K, number of parts.
    """
    parts: list[Embedded] = []
    for index in range(count):
        rows = _rows(batch, index, count, after=parts)
        parts.append(embed(rows, has_target))
    whole = _joined(parts)
    with tf.GradientTape() as tape:
        tape.watch(whole.online)
        if not has_target:
            whole = whole._replace(target=whole.online[: len(whole.target)])
        value, metrics = loss(batch, whole)
        share = replica_share(value)
    found, of_online = tape.gradient(share, (groups, whole.online))
    for index in range(count):
        rows = _rows(batch, index, count, after=found)
        with resnet.hold_statistics(), tf.GradientTape() as tape:
            online, _, _, penalty = embed(rows, False)
            parts_of_online = _rows(of_online, index, count)
            pairs = zip(online, parts_of_online, strict=True)
            share = replica_share(penalty / count) + tf.add_n(
                [tf.reduce_sum(z * gradient) for z, gradient in pairs]
            )
        more = tape.gradient(share, groups)
        found = tf.nest.map_structure(_sum, found, more)
    return found, metrics


def _rows(batch: Any, index: int, count: int, after: Any = ()) -> Any:
    """Returns every `count`-th row of all tensors, from `index` on.

    These are the same images however many replicas there are. They are not computed before `after`:
    parts in parallel would all be in memory.
    """
    done = [x for x in tf.nest.flatten(after) if x is not None]
    with tf.control_dependencies(done):
        return tf.nest.map_structure(lambda x: tf.identity(x[index::count]), batch)


def _sum(x: tf.Tensor | None, y: tf.Tensor | None) -> tf.Tensor | None:
    """Returns the sum of two gradients; None means unconnected to the loss."""
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _joined(parts: list[Embedded]) -> Embedded:
    """Returns the embeddings of all rows; the inverse of `_rows`."""

    def joined(views: Iterable[list[tf.Tensor]]) -> list[tf.Tensor]:
        return [
            tf.reshape(tf.stack(view, 1), [-1, view[0].shape[-1]])
            for view in zip(*views, strict=True)
        ]

    num_large = len(parts[0].target)
    return Embedded(
        joined(part.online for part in parts),
        joined(part.target for part in parts),
        tf.concat(joined(tf.split(part.features, num_large) for part in parts), 0),
        tf.add_n([part.penalty for part in parts]) / len(parts),
    )
