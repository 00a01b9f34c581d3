# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels and semantic positives from a queue of labelled images.

Source of all functions: Bosnjak et al., arXiv:2301.05158, as implemented again by
JuergenThann/MAE-CT_SemPPL.
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epy

from contrastive.objectives import common
from contrastive.objectives.base import Metrics

with epy.lazy_imports():
    import tensorflow as tf


def pseudo_labels(
    online: Sequence[tf.Tensor],
    queue: tf.Tensor,
    queue_labels: tf.Tensor,
    queue_ids: tf.Tensor,
    ids: tf.Tensor,
    *,
    num_classes: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Predicts the class of each image by a vote of its nearest neighbours.

    Each of the nL large views finds its nearest neighbour by cosine in each of nL queues of targets
    of labelled images, which gives `nL^2` votes. Among classes with equally many votes the smallest
    wins. There is no gradient.

    Args:
        online: nL tensors, float `[b, d]`: predictions of the large views.
        queue: float `[nL, C, d]`, targets of C labelled images, by large view.
        queue_labels: int32 `[C]`, their classes in [0, num_classes).
        queue_ids: int64 `[C]`, their example ids; -1 for an empty slot.
        ids: int64 `[b]`, example ids of the rows; an image is not its own neighbour.
        num_classes: number of classes.

    Returns:
        A tuple of int32 `[b]`, the labels, -1 if the queue has no other image; and float32 `[b]`,
        the share of votes for them in [0, 1], 0 if there are none.

    Raises:
        ValueError: if the number of views and of queues differ.
    """
    if len(online) != queue.shape[0]:
        raise ValueError(
            "Each large view needs its queue. Received: "
            f"{len(online)} views, {queue.shape[0]} queues."
        )
    is_other = _is_other(queue_ids, ids)
    queries = common.prepare(tf.stack(online, 1), True)
    nearest = []
    # One queue at a time saves memory.
    for entries in tf.unstack(common.prepare(queue, True)):
        similarity = tf.einsum("bad,nd->ban", queries, entries)
        similarity = tf.where(is_other[:, None], similarity, common.MASKED)
        nearest.append(tf.argmax(similarity, axis=2))
    votes = tf.gather(queue_labels, tf.concat(nearest, 1))
    is_same = tf.equal(votes[:, :, None], votes[:, None])
    shares = tf.reduce_mean(tf.cast(is_same, tf.float32), axis=2)
    share = tf.reduce_max(shares, axis=1)
    # tf.argmax does not promise which of several maxima it returns.
    label = tf.reduce_min(tf.where(tf.equal(shares, share[:, None]), votes, num_classes), axis=1)
    has_neighbour = tf.reduce_any(is_other, axis=1)
    return (
        tf.where(has_neighbour, label, -1),
        tf.stop_gradient(tf.where(has_neighbour, share, 0.0)),
    )


def draw_semantic_positives(
    labels: tf.Tensor,
    queue: tf.Tensor,
    queue_labels: tf.Tensor,
    queue_ids: tf.Tensor,
    ids: tf.Tensor,
    draws: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws targets of labelled images of each row's class from the queue.

    Draw u takes entry `floor(u m)` of the row's m matches in the order of their slots: the entries
    of the row's class, without the row's own image (which the re-implementation does not exclude).
    Draws are with replacement. There is no gradient.

    Args:
        labels: int32 `[b]`, (pseudo-)labels of the rows, -1 for none.
        queue: float `[nL, C, d]`, as in `pseudo_labels`.
        queue_labels: int32 `[C]`, as in `pseudo_labels`.
        queue_ids: int64 `[C]`, as in `pseudo_labels`.
        ids: int64 `[b]`, example ids of the rows.
        draws: float32 `[nL, b, k]` in [0, 1), independent and uniform.

    Returns:
        A tuple of float32 `[nL, b, k, d]`, the drawn entries of each queue, zeros for rows without
        a match; and bool `[b]`, whether there is one.
    """
    matches = tf.logical_and(tf.equal(queue_labels, labels[:, None]), _is_other(queue_ids, ids))
    matches = tf.logical_and(matches, labels[:, None] >= 0)
    ranks = tf.cumsum(tf.cast(matches, tf.int32), axis=1)  # Starting at 1.
    count = ranks[:, -1]
    slots = tf.searchsorted(
        tf.broadcast_to(ranks, [draws.shape[0], *ranks.shape]),
        1 + common.uniform_integer(draws, count[:, None]),
    )
    # For rows without a match, the slot after the last one is found.
    slots = tf.minimum(slots, queue.shape[1] - 1)
    positives = tf.gather(tf.cast(queue, tf.float32), slots, axis=1, batch_dims=1)
    has_positive = count > 0
    positives = tf.where(has_positive[:, None, None], positives, 0.0)
    return tf.stop_gradient(positives), has_positive


def _is_other(queue_ids: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """Computes whether a slot holds another image than the row's, `[b, C]`."""
    return tf.logical_and(tf.not_equal(queue_ids, ids[:, None]), tf.not_equal(queue_ids, -1))


def vote_metrics(
    labelled: tf.Tensor,
    labels: tf.Tensor,
    votes: tf.Tensor,
    agreement: tf.Tensor,
    gather: common.Gather,
) -> Metrics:
    """Computes the share and the accuracy of the votes in the global batch."""
    voted = ~labelled & (votes >= 0)
    judged = voted & (labels >= 0)
    # Counts of the global batch: means of the replicas' shares would differ.
    columns = (
        ~labelled,
        voted,
        tf.where(voted, agreement, 0.0),
        judged,
        judged & (votes == labels),
    )
    counts = gather(tf.stack([tf.cast(column, tf.float32) for column in columns], axis=1))[0]
    unlabelled, votes_cast, agreed, votes_judged, right = tf.unstack(tf.reduce_sum(counts, axis=0))
    return {
        "pseudo_label_accuracy": tf.math.divide_no_nan(right, votes_judged),
        "vote_share": tf.math.divide_no_nan(votes_cast, unlabelled),
        "vote_agreement": tf.math.divide_no_nan(agreed, votes_cast),
    }
