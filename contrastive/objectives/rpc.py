# SPDX-License-Identifier: Apache-2.0
"""Relative and Wasserstein predictive coding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etils import epy

from contrastive.config.fields import field, group, redeclared
from contrastive.objectives import common, two_view
from contrastive.objectives.base import Embedded, Metrics, StepContext
from contrastive.objectives.two_view import CriticObjective

with epy.lazy_imports():
    import tensorflow as tf


def rpc_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    gamma: float,
    hidden_norm: bool = False,
    gather: common.Gather | None = None,
    marginal_norm: str = "global",
) -> tf.Tensor:
    """Computes the negative relative predictive coding objective -J.

    `J = E_P[f] - alpha E_Q[f] - beta/2 E_P[f^2] - gamma/2 E_Q[f^2]`, where P are the positive pairs
    and Q the `2(B - 1)` negatives of each anchor, averaged over both directions. The optimal f lies
    between -alpha/gamma and 1/beta.

    Source: Tsai et al., arXiv:2103.11275, equation 3; martinmamql/relative_predictive_coding
    vision/objective.py,
    `loss_type == "chi"`. That code sums over the negatives of the global batch and divides by `2b(b
    - 1)`, where b is the local batch size, so that alpha and gamma act `(B - 1)/(b - 1)` times
    stronger on several replicas; `marginal_norm="local_replica"` reproduces this.

    Args:
        z1: as in `simclr_loss`.
        z2: as in `simclr_loss`.
        temperature: T > 0; scores are divided by it. Use a value of the order of d if `hidden_norm`
            is False.
        alpha: weight of the mean score of the negatives.
        beta: weight of the mean squared score of the positives, >= 0.
        gamma: weight of the mean squared score of the negatives, >= 0; the objective is unbounded
            if it is 0.
        hidden_norm: whether projections are l2-normalised first.
        gather: as in `simclr_loss`.
        marginal_norm: "global", or "local_replica" as described above; equal on a single replica.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if an argument is out of its range, B is 1, or b is 1 with
            `marginal_norm="local_replica"`.
    """
    common.check_not_negative(beta=beta, gamma=gamma)
    common.check_choice("marginal_norm", marginal_norm, ("global", "local_replica"))
    views = two_view.score_two_views(z1, z2, temperature, hidden_norm, gather)
    images = views.columns / 2
    if marginal_norm == "local_replica":
        images = views.batch
        if images < 2:
            raise ValueError(
                "`marginal_norm='local_replica'` divides by the local batch "
                f"minus 1. Received: a local batch of {images:.0f}."
            )
    joint = tf.reduce_mean(views.positive - 0.5 * beta * views.positive**2)
    marginal = views.negatives_sum(lambda f: alpha * f + 0.5 * gamma * f**2)
    return marginal / (4 * views.batch * (images - 1)) - joint


def wpc_loss(
    z1: tf.Tensor,
    z2: tf.Tensor,
    *,
    temperature: float,
    hidden_norm: bool = True,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the negative Wasserstein predictive coding objective.

    `-(E_P[f] - E_Q[f])` is the dual form of the Wasserstein distance between the joint distribution
    and the product of the marginals if f is 1-Lipschitz. Training therefore adds the
    `gradient_penalty` of f with respect to the images.

    Source: Ozair et al., arXiv:1903.11780 (Wasserstein dependency measure). The paper
    arXiv:2103.11275 has it as the baseline "WPC", but its code does not implement it. The choices
    made here are the negatives and averages of `rpc_loss`, which equals this loss for alpha 1, beta
    0 and gamma 0.

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar, the mean over this
    replica's rows.
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


def gradient_penalty(*gradients: tf.Tensor) -> tf.Tensor:
    """Computes `mean_i (|grad_i f| - 1)^2`, which is 0 for |grad_i f| = 1.

    Source: Gulrajani et al., arXiv:1704.00028, equation 3. They evaluate it between samples of two
    distributions. P and Q consist of the same images, so this evaluates it at the positive pairs,
    like the helper `add_gradients_penalty` of the RPC code, which evaluates it at the data.

    Args:
        *gradients: float `[b, h, w, c]` each, the gradients of `f(x_i, y_i)` with respect to its
            inputs, the two views of image i.

    Returns:
        float32 scalar, the mean over rows.
    """
    squares = sum(tf.reduce_sum(tf.square(tf.cast(g, tf.float32)), [1, 2, 3]) for g in gradients)
    # The square root has no finite gradient at 0.
    return tf.reduce_mean(tf.square(tf.sqrt(squares + 1e-12) - 1.0))


@group("Objective")
class RPC(CriticObjective):
    """Relative predictive coding (Tsai et al., arXiv:2103.11275).

    Source of the defaults: martinmamql/relative_predictive_coding,
    vision/gpu_pretrain_finetune_cifar.sh.
    """

    loss_function = staticmethod(rpc_loss)
    temperature: float = redeclared(CriticObjective, "temperature", 128.0)
    hidden_norm: bool = redeclared(CriticObjective, "hidden_norm", False)
    alpha: float = field(0.0, "Weight of the mean score of negatives.")
    beta: float = field(0.001, "Weight of the mean squared score of positives.", minimum=0)
    gamma: float = field(1.0, "Weight of the mean squared score of negatives.", minimum=0)
    rpc_marginal_norm: str = field(
        "global",
        "The mean over negatives divides by the global batch size, or by "
        "that of the replica, as in the reference code.",
        choices=("global", "local_replica"),
    )

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `rpc_loss`."""
        return {
            **self.critic(),
            "alpha": self.alpha,
            "beta": self.beta,
            "gamma": self.gamma,
            "marginal_norm": self.rpc_marginal_norm,
        }


@group("Objective")
class WPC(CriticObjective):
    """Wasserstein predictive coding (Ozair et al., arXiv:1903.11780)."""

    loss_function = staticmethod(wpc_loss)
    differentiates_twice = True
    # Both terms then have the same size: the critic is bounded by
    # 1 / temperature, and its gradient is about 10 at the start. With 10, the weight of Gulrajani
    # et al. (arXiv:1704.00028), whose critic has no bound, the encoder becomes smooth and learns
    # little else.
    gradient_penalty_weight: float = field(
        0.01, "Weight of the penalty of the critic's gradient.", minimum=0
    )

    def embed(
        self,
        forward: Callable[[list[tf.Tensor]], Embedded],
        views: list[tf.Tensor],
    ) -> Embedded:
        """Returns embeddings and the penalty of the critic's gradient."""
        if not self.gradient_penalty_weight:
            return forward(views)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(views)
            embedded = forward(views)
            scores = two_view.positive_scores(
                *embedded.online,
                temperature=self.temperature,
                hidden_norm=self.hidden_norm,
            )
        penalty = gradient_penalty(*tape.gradient(scores, views))
        return embedded._replace(penalty=self.gradient_penalty_weight * penalty)

    def __call__(self, embedded: Embedded, context: StepContext) -> tuple[tf.Tensor, Metrics]:
        """Returns the loss and the metrics, the unweighted penalty included."""
        loss, metrics = super().__call__(embedded, context)
        if self.gradient_penalty_weight:
            unweighted = embedded.penalty / self.gradient_penalty_weight
            metrics["gradient_penalty"] = unweighted
        return loss, metrics
