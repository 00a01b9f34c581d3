# SPDX-License-Identifier: Apache-2.0
"""Contrastive objectives: pure functions of two views' projections.

Every loss takes the projections of this replica's images and a `gather` that
returns those of all replicas, and returns the mean over this replica's rows,
so that the average over replicas is the loss of the global batch.

Shapes are static: `b` and `B` must be known when a loss is traced.

All of them score pairs with the same critic, `f(x, y) = <z_x, z_y> / T`, and
for an anchor of one view use the other view of the same image as its positive
and both views of the `B - 1` other images as negatives. They differ in the
functional of the scores that they maximise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

Gather = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
_Function = Callable[[tf.Tensor], tf.Tensor]

_MASKED = -1e9  # a logit that no softmax sees; reference code's LARGE_NUM


class _Direction(NamedTuple):
    """The scores of one view's local anchors, `b` of them.

    Attributes:
        scores: float32 `[b, 2B]`: against the other view, then the same view.
        positive: float32 `[b]`, the score of the other view of the same image.
        positive_mask: bool `[b, 2B]`, True at the column of the positive.
        self_mask: bool `[b, 2B]`, True where an anchor meets itself.
    """

    scores: tf.Tensor
    positive: tf.Tensor
    positive_mask: tf.Tensor
    self_mask: tf.Tensor


def simclr_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the NT-Xent (InfoNCE, CPC) loss, summed over both directions.

    `mean_i -log(exp f_i+ / sum_j exp f_ij)` over the positive and all
    `2(B - 1)` negatives, for view 1 as anchors plus for view 2 as anchors.

    Source: Chen et al., arXiv:2002.05709, section 2.1; google-research/simclr
    tf2/objective.py, which like this sums the two directions where the paper
    averages them.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised first.
        gather: maps a local `[b, d]` to the global `[B, d]` and the global
            index of this replica's first row; None where one replica is all.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if `temperature` is not positive or B is 1.
    """
    loss = 0.0
    for scores, _, positive_mask, self_mask in _directions(
        z1, z2, temperature, hidden_norm, gather
    ):
        logits = tf.where(self_mask, _MASKED, scores)
        labels = tf.argmax(positive_mask, axis=1)
        loss += tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        )
    return loss


def rpc_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    gamma: float,
    hidden_norm: bool = False,
    gather: Gather | None = None,
    marginal_norm: str = "global",
) -> tf.Tensor:
    """Returns the negative relative predictive coding objective.

    `J = E_P[f] - alpha E_Q[f] - beta/2 E_P[f^2] - gamma/2 E_Q[f^2]`, P the
    positive pairs, Q the `2(B - 1)` negatives an anchor; loss = -J, averaged
    over the directions. Its optimum is bounded by -alpha/gamma and 1/beta.

    Source: Tsai et al., arXiv:2103.11275, equation 3;
    martinmamql/relative_predictive_coding vision/objective.py,
    `loss_type == "chi"`. That code divides the negatives' sum by
    `2b(b - 1)` with b the *local* batch while summing over global columns, so
    that alpha and gamma act `(B - 1)/(b - 1)` times stronger on several cores;
    `marginal_norm="local_replica"` reproduces it.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores; of the order of d where
            `hidden_norm` is False.
        alpha: weight of the negatives' mean score.
        beta: weight of the positives' mean squared score, >= 0.
        gamma: weight of the negatives' mean squared score, >= 0; with 0
            the objective is unbounded.
        hidden_norm: whether projections are l2-normalised first.
        gather: as in `simclr_loss`.
        marginal_norm: "global" or "local_replica", see above; equal on one
            replica.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if an argument is out of its range or B is 1.
    """
    if beta < 0 or gamma < 0:
        raise ValueError(
            "`beta` and `gamma` must not be negative. "
            f"Received: beta={beta}, gamma={gamma}."
        )
    if marginal_norm not in ("global", "local_replica"):
        raise ValueError(
            "`marginal_norm` must be 'global' or 'local_replica'. "
            f"Received: {marginal_norm!r}."
        )
    objective = 0.0
    for direction in _directions(z1, z2, temperature, hidden_norm, gather):
        batch, columns = _sizes(direction)
        images = batch if marginal_norm == "local_replica" else columns / 2
        if marginal_norm == "local_replica" and batch < 2:
            raise ValueError(
                "`marginal_norm='local_replica'` divides by the local batch "
                f"minus 1. Received: a local batch of {batch:.0f}."
            )
        positive = direction.positive
        joint = tf.reduce_mean(positive - 0.5 * beta * positive**2)
        marginal = _negatives_sum(
            direction, lambda f: alpha * f + 0.5 * gamma * f**2
        ) / (2 * batch * (images - 1))
        objective += 0.5 * (joint - marginal)
    return -objective


def wpc_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the negative Wasserstein predictive coding critic difference.

    `-(E_P[f] - E_Q[f])`, the dual form of the Wasserstein distance between
    joint and product of marginals. It is one only for 1-Lipschitz critics:
    training adds `gradient_penalty` of f with respect to the images.

    Source: Ozair et al., arXiv:1903.11780 (Wasserstein dependency measure),
    the baseline "WPC" of arXiv:2103.11275, whose code leaves it empty. Chosen
    here: negatives and averaging as in `rpc_loss`, of which this is the case
    alpha 1, beta = gamma = 0, so that the two differ in the objective alone.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised first.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if `temperature` is not positive or B is 1.
    """
    return rpc_loss(
        z1,
        z2,
        temperature=temperature,
        alpha=1.0,
        beta=0.0,
        gamma=0.0,
        hidden_norm=hidden_norm,
        gather=gather,
    )


def positive_scores(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
) -> tf.Tensor:
    """Returns the critic `f(x_i, y_i)` of each positive pair.

    Args:
        z1: float `[b, d]`, projections of the first view.
        z2: float `[b, d]`, projections of the second view.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised first.

    Returns:
        float32 `[b]`.
    """
    z1, z2 = (_prepare(z, hidden_norm) for z in (z1, z2))
    return tf.reduce_sum(z1 * z2, axis=1) / temperature


def gradient_penalty(*gradients: tf.Tensor) -> tf.Tensor:
    """Returns `mean_i (|grad_i f| - 1)^2`, the penalty of a 1-Lipschitz critic.

    Source: Gulrajani et al., arXiv:1704.00028, equation 3. They evaluate it
    between samples of two distributions; here P and Q consist of the same
    images, so it is evaluated at the positive pairs, as the helper
    `add_gradients_penalty` of the RPC code evaluates it at the data.

    Args:
        *gradients: float `[b, ...]` each, the gradients of `f(x_i, y_i)` with
            respect to its inputs, here the two views of image i.

    Returns:
        float32 scalar, the mean over rows.
    """
    squares = tf.add_n(
        [
            tf.reduce_sum(tf.square(tf.cast(g, tf.float32)), [1, 2, 3])
            for g in gradients
        ]
    )
    # The square root has no finite gradient at 0.
    return tf.reduce_mean(tf.square(tf.sqrt(squares + 1e-12) - 1.0))


def js_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the negative Jensen-Shannon bound on mutual information.

    `-(E_P[-softplus(-f)] - E_Q[softplus(f)])`, averaged over the directions.

    Source: Poole et al., arXiv:1905.06922, in the conventions of
    martinmamql/relative_predictive_coding vision/objective.py,
    `loss_type == "js"`: an anchor's score with itself counts as one more
    negative of score 0 (a constant), so the mean is over `2B - 1` entries.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised first.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if `temperature` is not positive or B is 1.
    """
    return _f_divergence_loss(
        _directions(z1, z2, temperature, hidden_norm, gather),
        joint=lambda f: -tf.nn.softplus(-f),
        marginal=tf.nn.softplus,
    )


def nwj_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the negative Nguyen-Wainwright-Jordan bound.

    `-(E_P[f] - E_Q[exp(f - 1)])`, averaged over the directions.

    Source: Poole et al., arXiv:1905.06922, in the conventions of
    martinmamql/relative_predictive_coding vision/objective.py,
    `loss_type == "nwj"`: an anchor's score with itself counts as one more
    negative of score 0 (a constant), so the mean is over `2B - 1` entries.
    Unbounded in f: the paper's own run with it collapsed.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised first.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if `temperature` is not positive or B is 1.
    """
    return _f_divergence_loss(
        _directions(z1, z2, temperature, hidden_norm, gather),
        joint=lambda f: f,
        marginal=lambda f: tf.exp(f - 1.0),
    )


def dv_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the negative Donsker-Varadhan bound on mutual information.

    `-(E_P[f] - log E_Q[exp f])`, averaged over the directions. The logarithm
    is of a mean over the whole global batch: rows of all replicas enter it,
    each once.

    Source: Poole et al., arXiv:1905.06922, in the conventions of
    martinmamql/relative_predictive_coding vision/objective.py,
    `loss_type == "dv"`: positives enter the log-sum-exp with score 0, and the
    mean is over `(2B - 1)B` entries.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised first.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar; its mean over replicas is the global batch's loss.

    Raises:
        ValueError: if `temperature` is not positive or B is 1.
    """
    gather = gather or _single_replica
    objective = 0.0
    for direction in _directions(z1, z2, temperature, hidden_norm, gather):
        _, columns = _sizes(direction)
        scores = tf.where(direction.positive_mask, 0.0, direction.scores)
        scores = tf.where(direction.self_mask, _MASKED, scores)
        rows, _ = gather(tf.reduce_logsumexp(scores, axis=1, keepdims=True))
        log_mean = tf.reduce_logsumexp(rows) - math.log(
            (columns - 1.0) * columns / 2
        )
        objective += 0.5 * (tf.reduce_mean(direction.positive) - log_mean)
    return -objective


def contrastive_metrics(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: Gather | None = None,
) -> dict[str, tf.Tensor]:
    """Returns how well view 1 finds its image among the global view 2.

    Source: google-research/simclr tf2/metrics.py,
    `update_pretrain_metrics_train`; similarity and effective rank (the
    participation ratio `(sum l)^2 / sum l^2` of the eigenvalues l of the
    uncentred covariance) tell a collapse of the embedding.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, of the second view; row i is the same image.
        temperature: T > 0, divides the scores.
        hidden_norm: whether projections are l2-normalised before scoring.
        gather: as in `simclr_loss`.

    Returns:
        Dict of float32 scalars, means over this replica's rows or over the
        global batch: `contrast_accuracy` in [0, 1]; `contrast_entropy` in
        nats, at most log B; `positive_similarity` and `mean_similarity` (of
        different images), cosines; `feature_std`, the standard deviation of a
        coordinate of the unit-length embedding times sqrt(d), 1 if isotropic;
        `effective_rank` in [1, d].
    """
    candidates, offset = (gather or _single_replica)(z2)
    logits = _scores(z1, candidates, temperature, hidden_norm)
    labels = tf.range(z1.shape[0]) + offset
    hits = tf.equal(tf.argmax(logits, axis=1, output_type=tf.int32), labels)
    log_probability = tf.nn.log_softmax(logits)
    entropy = -tf.reduce_sum(tf.exp(log_probability) * log_probability, axis=1)
    return {
        "contrast_accuracy": tf.reduce_mean(tf.cast(hits, tf.float32)),
        "contrast_entropy": tf.reduce_mean(entropy),
        "positive_similarity": tf.reduce_mean(
            positive_scores(z1, z2, temperature=1.0)
        ),
        **_embedding_health(_prepare(candidates, True)),
    }


def _embedding_health(unit: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns collapse indicators of unit vectors, float32 `[B, d]`."""
    size, dim = (float(n) for n in unit.shape)
    total = tf.reduce_sum(unit, axis=0)
    covariance = tf.matmul(unit, unit, transpose_a=True) / size
    return {
        # The sum over pairs of different images of their cosine.
        "mean_similarity": (tf.reduce_sum(total**2) - size)
        / (size * max(size - 1.0, 1.0)),
        "feature_std": dim**0.5
        * tf.reduce_mean(tf.math.reduce_std(unit, axis=0)),
        "effective_rank": tf.linalg.trace(covariance) ** 2
        / tf.maximum(tf.reduce_sum(covariance**2), 1e-12),
    }


def _f_divergence_loss(
    directions: list[_Direction], joint: _Function, marginal: _Function
) -> tf.Tensor:
    """Returns `-(E_P[joint(f)] - E_Q[marginal(f)])`, self pairs scoring 0."""
    objective = 0.0
    for direction in directions:
        batch, columns = _sizes(direction)
        negatives = _negatives_sum(direction, marginal) + batch * marginal(0.0)
        objective += 0.5 * (
            tf.reduce_mean(joint(direction.positive))
            - negatives / (batch * (columns - 1.0))
        )
    return -objective


def _negatives_sum(direction: _Direction, function: _Function) -> tf.Tensor:
    """Returns the sum of `function` over the scores of all negative pairs."""
    excluded = tf.logical_or(direction.positive_mask, direction.self_mask)
    # Masked before, so that no overflow of `function` at a positive can turn
    # into 0 * inf, in the value or in the gradient.
    scores = tf.where(excluded, 0.0, direction.scores)
    return tf.reduce_sum(tf.where(excluded, 0.0, function(scores)))


def _directions(
    z1: tf.Tensor,
    z2: tf.Tensor,
    temperature: float,
    hidden_norm: bool,
    gather: Gather | None,
) -> list[_Direction]:
    """Returns the scores with view 1 and with view 2 as anchors."""
    if temperature <= 0:
        raise ValueError(
            f"`temperature` must be positive. Received: {temperature}."
        )
    gather = gather or _single_replica
    (all1, offset), (all2, _) = gather(z1), gather(z2)
    if all1.shape[0] == 1:
        raise ValueError(
            "A contrastive loss needs negatives: at least 2 images in the "
            "global batch. Received: 1."
        )
    own = tf.equal(
        tf.range(z1.shape[0])[:, None] + offset, tf.range(all1.shape[0])
    )
    none = tf.zeros_like(own)
    directions = []
    for anchors, same, other in ((z1, all1, all2), (z2, all2, all1)):
        scores = _scores(
            anchors, tf.concat([other, same], 0), temperature, hidden_norm
        )
        positive_mask = tf.concat([own, none], 1)
        directions.append(
            _Direction(
                scores=scores,
                positive=tf.reduce_sum(
                    tf.where(positive_mask, scores, 0.0), axis=1
                ),
                positive_mask=positive_mask,
                self_mask=tf.concat([none, own], 1),
            )
        )
    return directions


def _scores(
    anchors: tf.Tensor,
    candidates: tf.Tensor,
    temperature: float,
    hidden_norm: bool,
) -> tf.Tensor:
    """Returns float32 `[b, n]`, the critic of each anchor and candidate."""
    return (
        tf.matmul(
            _prepare(anchors, hidden_norm),
            _prepare(candidates, hidden_norm),
            transpose_b=True,
        )
        / temperature
    )


def _prepare(z: tf.Tensor, hidden_norm: bool) -> tf.Tensor:
    """Returns projections as the critic sees them, in float32."""
    z = tf.cast(z, tf.float32)
    return tf.math.l2_normalize(z, axis=-1) if hidden_norm else z


def _sizes(direction: _Direction) -> tuple[float, float]:
    """Returns the local batch b and the number of columns 2B, as floats."""
    batch, columns = direction.scores.shape
    return float(batch), float(columns)


def _single_replica(z: tf.Tensor) -> tuple[tf.Tensor, int]:
    """The `gather` of a program that runs on one device."""
    return z, 0
