# SPDX-License-Identifier: Apache-2.0
"""Scores of two views, metrics of embeddings, and objectives of two views.

The critic of two embeddings is `f(x, y) = <z_x, z_y> / T`. The positive of an anchor is the other
view of the same image; its negatives are both views of the `B - 1` other images of the global
batch. The losses of two views differ only in the function of these scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from etils import epy

from contrastive.config.fields import field, group
from contrastive.objectives import common
from contrastive.objectives.base import (
    Embedded,
    Metrics,
    Objective,
    StepContext,
)

with epy.lazy_imports():
    import tensorflow as tf


class TwoViewScores(NamedTuple):
    """The scores of the `b` local anchors of both views.

    Attributes:
        scores: float32 `[2, b, 2B]`, the scores of the anchors of views 1 and 2 with all images,
            first in the other view, then in the same view.
        positive: float32 `[2, b]`, the scores of the positives.
        positive_mask: bool `[b, 2B]`, True at the column of the positive.
        self_mask: bool `[b, 2B]`, True at the column of the anchor itself.
        batch: b, as a float.
        columns: 2B, as a float.
    """

    scores: tf.Tensor
    positive: tf.Tensor
    positive_mask: tf.Tensor
    self_mask: tf.Tensor
    batch: float
    columns: float

    def negatives_sum(self, function: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
        """Sums `function` over the scores of all negative pairs."""
        excluded = tf.logical_or(self.positive_mask, self.self_mask)
        # Scores are masked before `function` too, because an overflow at a positive would turn into
        # 0 * inf in the gradient.
        scores = tf.where(excluded, 0.0, self.scores)
        return tf.reduce_sum(tf.where(excluded, 0.0, function(scores)))


def score_two_views(
    z1: tf.Tensor,
    z2: tf.Tensor,
    temperature: float,
    hidden_norm: bool,
    gather: common.Gather | None,
) -> TwoViewScores:
    """Computes the scores with view 1 and with view 2 as anchors.

    Arguments and errors are those of `simclr_loss`.
    """
    common.check_positive(temperature=temperature)
    gather = gather or common.single_replica
    (all1, offset), (all2, _) = gather(z1), gather(z2)
    batch, size = z1.shape[0], all1.shape[0]
    common.check_batch(size)
    scores = score(
        tf.stack([z1, z2]),
        tf.stack([tf.concat([all2, all1], 0), tf.concat([all1, all2], 0)]),
        temperature,
        hidden_norm,
    )
    own = tf.range(batch)[:, None] + offset
    positive_mask = tf.equal(own, tf.range(2 * size))
    self_mask = tf.equal(own + size, tf.range(2 * size))
    positive = common.select(scores, positive_mask)
    return TwoViewScores(scores, positive, positive_mask, self_mask, float(batch), 2.0 * size)


def score(
    anchors: tf.Tensor,
    candidates: tf.Tensor,
    temperature: float,
    hidden_norm: bool,
) -> tf.Tensor:
    """Computes f of anchors `[..., b, d]` and candidates `[..., n, d]`."""
    cosines = tf.matmul(
        common.prepare(anchors, hidden_norm),
        common.prepare(candidates, hidden_norm),
        transpose_b=True,
    )
    return cosines / temperature


def positive_scores(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
) -> tf.Tensor:
    """Computes the critic `f(x_i, y_i)` of each positive pair.

    Arguments are those of `simclr_loss`; returns float32 `[b]`.
    """
    z1, z2 = (common.prepare(z, hidden_norm) for z in (z1, z2))
    return tf.reduce_sum(z1 * z2, axis=1) / temperature


def contrastive_metrics(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: common.Gather | None = None,
) -> dict[str, tf.Tensor]:
    """Measures how well view 1 finds its image among the global view 2.

    Source: google-research/simclr tf2/metrics.py, `update_pretrain_metrics_train`. The similarities
    and the effective rank (the participation ratio `(sum l)^2 / sum l^2` of the eigenvalues l of
    the uncentred covariance) show whether the embedding collapses.

    Args:
        z1: as in `simclr_loss`.
        z2: as in `simclr_loss`.
        temperature: T > 0; scores are divided by it.
        hidden_norm: whether projections are l2-normalised before scoring.
        gather: as in `simclr_loss`.

    Returns:
        Dict of float32 scalars, means over this replica's rows or over the global batch:
        `contrast_accuracy` in [0, 1]; `contrast_entropy` in nats, at most log B;
        `positive_similarity` and `mean_similarity` (of different images), cosines; `feature_std`,
        the standard deviation of a coordinate of the unit-length embedding times sqrt(d), 1 if
        isotropic; `effective_rank` in [1, d].
    """
    candidates, offset = (gather or common.single_replica)(z2)
    logits = score(z1, candidates, temperature, hidden_norm)
    labels = tf.range(z1.shape[0]) + offset
    hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
    log_probability = tf.nn.log_softmax(logits)
    entropy = -tf.reduce_sum(tf.exp(log_probability) * log_probability, axis=1)
    return {
        "contrast_accuracy": tf.reduce_mean(tf.cast(hits, tf.float32)),
        "contrast_entropy": tf.reduce_mean(entropy),
        "positive_similarity": tf.reduce_mean(positive_scores(z1, z2, temperature=1.0)),
        **_embedding_health(common.prepare(candidates, True)),
    }


def _embedding_health(unit: tf.Tensor) -> dict[str, tf.Tensor]:
    """Computes indicators of collapse of unit vectors, float32 `[B, d]`."""
    size, dim = (float(n) for n in unit.shape)
    total = tf.reduce_sum(unit, axis=0)
    covariance = tf.matmul(unit, unit, transpose_a=True) / size
    return {
        # The sum of the cosines over all pairs of different images.
        "mean_similarity": (tf.reduce_sum(total**2) - size) / (size * max(size - 1.0, 1.0)),
        "feature_std": dim**0.5 * tf.reduce_mean(tf.math.reduce_std(unit, axis=0)),
        "effective_rank": tf.linalg.trace(covariance) ** 2
        / tf.maximum(tf.reduce_sum(covariance**2), 1e-12),
    }


@group("Objective")
class TwoViewObjective(Objective):
    """An objective of two views whose loss is a function of projections.

    Attributes:
        loss_function: a static method, such as `vicreg_loss`.
    """

    loss_function: ClassVar[Callable[..., Any]]

    def arguments(self) -> dict[str, Any]:
        """Returns the keyword arguments of `loss_function` but `gather`."""
        return {}

    def critic(self) -> dict[str, Any]:
        """Returns how metrics score pairs: by default by their cosine."""
        return {"temperature": 1.0, "hidden_norm": True}

    def __call__(self, embedded: Embedded, context: StepContext) -> tuple[tf.Tensor, Metrics]:
        """Returns the loss and its metrics."""
        gather = context.gather
        loss = self.loss_function(*embedded.online, gather=gather, **self.arguments())
        return loss, contrastive_metrics(*embedded.online, gather=gather, **self.critic())


@group("Objective")
class CriticObjective(TwoViewObjective):
    """An objective of the scores `<z1, z2> / temperature` of pairs."""

    defaults = {"weight_decay": 1e-4}

    temperature: float = field(0.5, "Softmax temperature; scores are divided by it.", positive=True)
    hidden_norm: bool = field(True, "Normalize projections to unit length.")

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of the critic."""
        return self.critic()

    def critic(self) -> dict[str, Any]:
        """Returns how pairs are scored."""
        return {
            "temperature": self.temperature,
            "hidden_norm": self.hidden_norm,
        }
