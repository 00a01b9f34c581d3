# SPDX-License-Identifier: Apache-2.0
"""Barlow Twins: redundancy reduction between two views."""

from __future__ import annotations

from typing import Any

from etils import epy

from contrastive.config.fields import field, group
from contrastive.objectives import common
from contrastive.objectives.two_view import TwoViewObjective

with epy.lazy_imports():
    import tensorflow as tf


def barlow_twins_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    redundancy_weight: float = 5e-3,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the distance of the views' cross-correlation to the identity.

    `sum_k (1 - C_kk)^2 + redundancy_weight sum_k sum_(l != k) C_kl^2`, where C_kl is the
    correlation over the global batch between dimension k of view 1 and dimension l of view 2.

    Source: Zbontar et al., arXiv:2103.03230, with the conventions of lightly 1.6.0 (`lambda_param`)
    and facebookresearch/barlowtwins (whose weight is 0.0051): unlike in the paper, 1e-5 is added to
    the variances. On several replicas, lightly standardises each local batch by itself; this takes
    mean and variance over the global batch.

    Args:
        z1: float `[b, d]`, this replica's projections of the first view.
        z2: float `[b, d]`, projections of the second view; row i is the same image as row i of
            `z1`. They are not l2-normalised.
        redundancy_weight: weight of the off-diagonal correlations, >= 0.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar >= 0, the loss of the global batch on every replica.

    Raises:
        ValueError: if `redundancy_weight` is negative or B is 1.
    """
    common.check_not_negative(redundancy_weight=redundancy_weight)
    gather = gather or common.single_replica
    (all1, _), (all2, _) = gather(z1), gather(z2)
    size = all1.shape[0]
    common.check_batch(size, "Batch statistics need variation")
    correlation = tf.matmul(_standardise(all1), _standardise(all2), transpose_a=True) / size
    diagonal = tf.linalg.diag_part(correlation)
    off_diagonal = tf.linalg.set_diag(correlation, tf.zeros_like(diagonal))
    invariance = tf.reduce_sum((diagonal - 1.0) ** 2)
    return invariance + redundancy_weight * tf.reduce_sum(off_diagonal**2)


def _standardise(z: tf.Tensor) -> tf.Tensor:
    """Scales each column of float `[B, d]` to mean 0 and variance 1."""
    centred = common.prepare(z, False)
    centred -= tf.reduce_mean(centred, axis=0)
    variance = tf.reduce_mean(centred**2, axis=0)
    return centred * tf.math.rsqrt(variance + 1e-5)


@group("Objective")
class BarlowTwins(TwoViewObjective):
    """Barlow Twins (Zbontar et al., arXiv:2103.03230)."""

    # It sums over the dimensions of the projection, some hundreds.
    loss_scale = 100.0
    loss_function = staticmethod(barlow_twins_loss)
    defaults = {
        "augmentation": "byol",
        "proj_head_mode": "mlp",
        "proj_hidden_dim": (2048, 2048),
        "proj_out_dim": 2048,
        "weight_decay": 1e-6,
    }
    # Nothing is published for small images: a head in proportion to the encoder, and no blur, as in
    # SimCLR's recipe for CIFAR-10.
    small_images = {
        "proj_hidden_dim": (512, 512),
        "proj_out_dim": 512,
        "blur_probability": 0.0,
    }

    redundancy_weight: float = field(
        5e-3, "Weight of the squared off-diagonal correlations.", minimum=0
    )

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `barlow_twins_loss`."""
        return {"redundancy_weight": self.redundancy_weight}
