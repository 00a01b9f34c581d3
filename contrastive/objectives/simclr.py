# SPDX-License-Identifier: Apache-2.0
"""SimCLR: the NT-Xent loss."""

from __future__ import annotations

from etils import epy

from contrastive.config.fields import group, redeclared
from contrastive.objectives import common, two_view
from contrastive.objectives.two_view import CriticObjective

with epy.lazy_imports():
    import tensorflow as tf


def simclr_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the NT-Xent (InfoNCE) loss, summed over both directions.

    `mean_i -log(exp f_i+ / sum_j exp f_ij)`, where j goes over the positive and the `2(B - 1)`
    negatives. The loss with view 1 as anchors and the loss with view 2 as anchors are added.

    Source: Chen et al., arXiv:2002.05709, section 2.1. Like google-research/simclr
    tf2/objective.py, this sums the two directions; the paper averages them.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, projections of the second view; row i is the same image as row i of
            `z1`.
        temperature: T > 0; scores are divided by it.
        hidden_norm: whether projections are l2-normalised first.
        gather: maps a local `[b, d]` to the global `[B, d]` and the global index of this replica's
            first row; None on a single replica.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if `temperature` is not positive or B is 1.
    """
    views = two_view.score_two_views(z1, z2, temperature, hidden_norm, gather)
    logits = tf.where(views.self_mask, common.MASKED, views.scores)
    log_sums = tf.reduce_logsumexp(logits, axis=2)
    return tf.reduce_sum(log_sums - views.positive) / views.batch


@group("Objective")
class SimCLR(CriticObjective):
    """SimCLR (Chen et al., arXiv:2002.05709).

    Source of the defaults: google-research/simclr, tf2/run.py.
    """

    loss_function = staticmethod(simclr_loss)
    defaults = {"weight_decay": 1e-6}
    temperature: float = redeclared(CriticObjective, "temperature", 0.1)
