# SPDX-License-Identifier: Apache-2.0
"""Bounds on mutual information: Jensen-Shannon, NWJ and Donsker-Varadhan.

P are the positive pairs, Q the negative pairs. The formulas are those of Poole et al.,
arXiv:1905.06922, with the conventions of martinmamql/relative_predictive_coding
vision/objective.py. All losses are averaged over both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from etils import epy

from contrastive.config.fields import group
from contrastive.objectives import common, two_view
from contrastive.objectives.two_view import CriticObjective

with epy.lazy_imports():
    import tensorflow as tf


def js_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the negative Jensen-Shannon bound on mutual information.

    `-(E_P[-softplus(-f)] - E_Q[softplus(f)])`

    Source: see the module; `loss_type == "js"`. As there, an anchor's score with itself counts as
    one more negative of score 0 (a constant), so that the mean is over `2B - 1` entries per anchor.

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar, the mean over this
    replica's rows.
    """
    return _f_divergence_loss(
        two_view.score_two_views(z1, z2, temperature, hidden_norm, gather),
        joint=lambda f: -tf.nn.softplus(-f),
        marginal=tf.nn.softplus,
    )


def nwj_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the negative Nguyen-Wainwright-Jordan bound.

    `-(E_P[f] - E_Q[exp(f - 1)])`, which is unbounded in f; training with it collapsed in the RPC
    paper.

    Source: see the module; `loss_type == "nwj"`. As there, an anchor's score with itself counts as
    one more negative of score 0 (a constant), so that the mean is over `2B - 1` entries per anchor.

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar, the mean over this
    replica's rows.
    """
    return _f_divergence_loss(
        two_view.score_two_views(z1, z2, temperature, hidden_norm, gather),
        joint=lambda f: f,
        marginal=lambda f: tf.exp(f - 1.0),
    )


def dv_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the negative Donsker-Varadhan bound on mutual information.

    `-(E_P[f] - log E_Q[exp f])`. The mean inside the logarithm is over the global batch, to which
    all replicas contribute their rows.

    Source: see the module; `loss_type == "dv"`. As there, positives enter the log-sum-exp with
    score 0, and the mean is over `(2B - 1)B` entries.

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar, whose mean over
    replicas is the loss of the global batch.
    """
    gather = gather or common.single_replica
    views = two_view.score_two_views(z1, z2, temperature, hidden_norm, gather)
    scores = tf.where(views.positive_mask, 0.0, views.scores)
    scores = tf.where(views.self_mask, common.MASKED, scores)
    rows, _ = gather(tf.transpose(tf.reduce_logsumexp(scores, axis=2)))
    log_means = tf.reduce_logsumexp(rows, axis=0) - math.log(
        (views.columns - 1.0) * views.columns / 2
    )
    return tf.reduce_mean(log_means) - tf.reduce_mean(views.positive)


def _f_divergence_loss(
    views: two_view.TwoViewScores,
    joint: Callable[[tf.Tensor], tf.Tensor],
    marginal: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """Computes `-(E_P[joint(f)] - E_Q[marginal(f)])`, self pairs scoring 0."""
    anchors = 2 * views.batch
    negatives = views.negatives_sum(marginal) + anchors * marginal(0.0)
    negatives /= anchors * (views.columns - 1.0)
    return negatives - tf.reduce_mean(joint(views.positive))


@group("Objective")
class DV(CriticObjective):
    """The Donsker-Varadhan bound on mutual information."""

    loss_function = staticmethod(dv_loss)


@group("Objective")
class NWJ(CriticObjective):
    """The Nguyen-Wainwright-Jordan bound on mutual information."""

    loss_function = staticmethod(nwj_loss)


@group("Objective")
class JS(CriticObjective):
    """The Jensen-Shannon bound on mutual information."""

    loss_function = staticmethod(js_loss)
