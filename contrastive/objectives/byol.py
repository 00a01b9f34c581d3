# SPDX-License-Identifier: Apache-2.0
"""BYOL: predictions of the target network's projections."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epy

from contrastive.config.fields import group
from contrastive.objectives import common, comparison
from contrastive.objectives.base import (
    Embedded,
    Metrics,
    Objective,
    StepContext,
)
from contrastive.objectives.two_view import contrastive_metrics

with epy.lazy_imports():
    import tensorflow as tf

# BYOL's networks and optimizer, which ReLIC (with a target network), ReLICv2 and SemPPL share.
# Source: deepmind-research, byol/configs/byol.py; Grill et al., arXiv:2006.07733, appendix F, for
# its residual blocks' gammas of 1.
BYOL_DEFAULTS = {
    "augmentation": "byol",
    "padding": "same",
    "zero_init_residual": False,
    "proj_head_mode": "mlp",
    "proj_hidden_dim": (4096,),
    "proj_out_dim": 256,
    "proj_bn": "hidden",
    "predictor": True,
    "target_network": True,
    "target_decay": 0.996,
    "lars_variant": "deepmind",
    "weight_decay": 1.5e-6,
}
# Nothing is published for small images. The choices made here are a head in proportion to the
# encoder, a target that follows within a hundred epochs, and no blur, as in SimCLR's recipe for
# CIFAR-10.
BYOL_SMALL_IMAGES = {
    "proj_hidden_dim": (512,),
    "target_decay": 0.99,
    "weight_decay": 1e-6,
    "blur_probability": 0.0,
}


def byol_loss(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    *,
    gather: common.Gather | None = None,  # noqa: ARG001
) -> tf.Tensor:
    """Computes the distance of predictions to the targets of other views.

    The sum over pairs (a, c) of different views of `mean_i |o_i - t_i|^2`, where o and t are the
    l2-normalised online view a and target view c.

    Source: Grill et al., arXiv:2006.07733, equation 2 and its symmetric counterpart;
    deepmind-research/byol byol_experiment.py, whose sum over two views this extends to any number.

    Args:
        online: as in `relic_loss`.
        target: as in `relic_loss`, but without gradient.
        gather: unused, because rows do not interact; all losses accept it.

    Returns:
        float32 scalar in `[0, 4 * pairs]`, the mean over this replica's rows.

    Raises:
        ValueError: if views are missing or differ in shape.
    """
    pairs = comparison.check_views(online, target, include_same_view=False)
    anchors = common.prepare(tf.stack(online), True)
    targets = tf.stop_gradient(common.prepare(tf.stack(target), True))
    squares = tf.math.squared_difference(
        tf.gather(anchors, [a for a, _ in pairs]),
        tf.gather(targets, [c for _, c in pairs]),
    )
    return tf.reduce_sum(squares) / online[0].shape[0]


@group("Objective")
class BYOL(Objective):
    """Bootstrap your own latent (Grill et al., arXiv:2006.07733)."""

    multi_view = True
    defaults = BYOL_DEFAULTS
    small_images = BYOL_SMALL_IMAGES

    def __call__(self, embedded: Embedded, context: StepContext) -> tuple[tf.Tensor, Metrics]:
        """Returns `byol_loss` and metrics of the cosines."""
        loss = byol_loss(embedded.online, embedded.target)
        return loss, contrastive_metrics(
            embedded.online[0],
            # The second view if there is one; the first is the anchor.
            embedded.target[:2][-1],
            temperature=1.0,
            gather=context.gather,
        )
