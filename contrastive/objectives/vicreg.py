# SPDX-License-Identifier: Apache-2.0
"""VICReg: variance-invariance-covariance regularisation."""

from __future__ import annotations

from typing import Any

from etils import epy

from contrastive.config.fields import field, group
from contrastive.objectives import common
from contrastive.objectives.barlow_twins import BarlowTwins
from contrastive.objectives.two_view import TwoViewObjective

with epy.lazy_imports():
    import tensorflow as tf


def vicreg_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    epsilon: float = 1e-4,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the VICReg loss of two views.

    The weighted sum of three terms, the last two over the global batch:

    - invariance: the mean of `(z1_ik - z2_ik)^2` over images i, dimensions k;
    - variance: the mean over views and dimensions of
      `max(0, 1 - sqrt(Var(z_k) + epsilon))`;
    - covariance: the sum over views of `sum_(k != l) Cov(z_k, z_l)^2 / d`.

    Variance and covariance are the unbiased ones, divided by `B - 1`.

    Source: Bardes et al., arXiv:2105.04906, with the conventions of facebookresearch/vicreg and
    lightly 1.6.0 (`lambda_param`, `mu_param`, `nu_param`): the invariance term is a mean over
    dimensions and the variance term a mean over views; the paper sums both.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, projections of the second view; row i is the same image as row i of
            `z1`. They are not l2-normalised.
        invariance: weight of the invariance term, >= 0.
        variance: weight of the variance term, >= 0.
        covariance: weight of the covariance term, >= 0.
        epsilon: added to variances, > 0, so that gradients are finite at 0.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar >= 0. Its mean over replicas is the loss of the global
        batch: the invariance term is the mean over this replica's rows.

    Raises:
        ValueError: if an argument is out of its range or B is 1.
    """
    common.check_not_negative(invariance=invariance, variance=variance, covariance=covariance)
    common.check_positive(epsilon=epsilon)
    gather = gather or common.single_replica
    views = tf.stack([gather(z)[0] for z in (z1, z2)])
    size, dim = views.shape[1:]
    common.check_batch(size, "Batch statistics need variation")
    distances = tf.math.squared_difference(common.prepare(z1, False), common.prepare(z2, False))
    centred = common.prepare(views, False)
    centred -= tf.reduce_mean(centred, axis=1, keepdims=True)
    covariances = tf.matmul(centred, centred, transpose_a=True) / (size - 1)
    variances = tf.linalg.diag_part(covariances)
    off_diagonal = tf.linalg.set_diag(covariances, tf.zeros_like(variances))
    hinges = tf.nn.relu(1.0 - tf.sqrt(variances + epsilon))
    return (
        invariance * tf.reduce_mean(distances)
        + variance * tf.reduce_mean(hinges)
        + covariance * tf.reduce_sum(off_diagonal**2) / dim
    )


@group("Objective")
class VICReg(TwoViewObjective):
    """Variance-invariance-covariance regularization (arXiv:2105.04906)."""

    loss_function = staticmethod(vicreg_loss)
    defaults = BarlowTwins.defaults
    small_images = BarlowTwins.small_images

    invariance: float = field(
        25.0,
        "Weight of the mean squared distance between the views.",
        minimum=0,
    )
    variance: float = field(
        25.0,
        "Weight of the hinge on the standard deviation of each dimension.",
        minimum=0,
    )
    covariance: float = field(1.0, "Weight of the squared off-diagonal covariances.", minimum=0)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `vicreg_loss`."""
        return {
            "invariance": self.invariance,
            "variance": self.variance,
            "covariance": self.covariance,
        }
