# SPDX-License-Identifier: Apache-2.0
"""ReLIC and ReLICv2, with a softmax or a sigmoid loss, and their KL term."""

from __future__ import annotations

import math
from collections.abc import Sequence

from etils import epy

from contrastive.objectives import common
from contrastive.objectives.comparison import Comparison, Pair

with epy.lazy_imports():
    import tensorflow as tf

KL_GRADS = ("sg_p", "entropy_only", "none")
KL_FORMS = ("swap", "transpose", "transpose_reversed")
KL_SMALLS = ("transpose", "shared_target", "off")


def relic_loss(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    *,
    temperature: float | tf.Tensor,
    alpha: float,
    kl_grad: str = "none",
    kl_form: str = "swap",
    kl_small: str = "transpose",
    include_same_view: bool = False,
    num_negatives: int = 0,
    draws: tf.Tensor | None = None,
    contrastive_weight: float = 1.0,
    average_pairs: bool = False,
    bias: float | tf.Tensor = 0.0,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the ReLIC loss: contrastive, and invariant to the view.

    `sum_(a,c) mean_i -w log p_ac(i | i) + alpha KL_ac(i)`, where `p_ac(. | i)` is the softmax of
    the scores of online view a of image i with target view c of image i (the positive) and of its
    negatives.

    `kl_form` is the KL divergence between two distributions over these images:

    - "swap": `KL(p_ac || p_ca)`. A small view has no target; `kl_small` selects its term:
      "transpose" as below; "shared_target":
      `KL(p_kc || p_ac)`, where k is the large view after c; "off": no term.
    - "transpose": `KL(p_ac || q_ac)`, where q_ac is the softmax of the scores of target view c of
      image i with online view a of the images. Small views have this term too, unless `kl_small` is
      "off".
    - "transpose_reversed": `KL(q_ac || p_ac)`, likewise.

    `kl_grad` selects where the gradient of `KL(p || q)` is stopped: "none": nowhere; "sg_p": at p;
    "entropy_only": at the first term of
    `E_p log p - E_p log q` (then "swap" of a = c, whose value is 0, has the gradient of p's
    entropy).

    Source: Mitrovic et al., arXiv:2010.07922, equation 3 (two large views, "swap", "none"); Tomasev
    et al., arXiv:2201.05119 (ReLICv2: large and small views, same views included, sampled
    negatives, averaged pairs). Neither specifies where gradients are stopped or how small views
    enter the KL term. "transpose_reversed", a bias and a learnt temperature: filipbasara0/relic
    relic/relic.py.

    Args:
        online: nL + nS tensors, float `[b, d]`: this replica's predictions of the large, then the
            small views; row i is the same image in all.
        target: nL tensors, float `[b, d]`: targets of the large views. They receive a gradient, so
            detach the outputs of a target network; without a target network, pass the large views
            of `online`.
        temperature: T > 0, divides the scores; a scalar tensor if learnt.
        alpha: weight of the KL term, >= 0.
        kl_grad: "none", "sg_p" or "entropy_only".
        kl_form: "swap", "transpose" or "transpose_reversed".
        kl_small: "transpose", "shared_target" or "off".
        include_same_view: whether pairs (a, a) count too.
        num_negatives: number of negatives sampled for each row and pair; 0 or at least B - 1 for
            all other images of the global batch.
        draws: float32 `[num_pairs, b, num_negatives]` in [0, 1), uniform numbers for
            `sample_negatives`, which should not depend on the replica that has an image. Ignored if
            all images are used.
        contrastive_weight: w >= 0.
        average_pairs: whether to average over pairs instead of summing.
        bias: added to the scores; without effect on a softmax.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if an argument is out of its range, views or draws are missing or of the wrong
            shape, or B is 1.
    """
    common.check_not_negative(contrastive_weight=contrastive_weight, alpha=alpha)
    comparison = Comparison(
        online,
        target,
        include_same_view=include_same_view,
        temperature=temperature,
        bias=bias,
        num_negatives=num_negatives,
        draws=draws,
        gather=gather,
    )
    return comparison.mean(
        contrastive_weight * comparison.contrastive()
        + invariance(comparison, alpha, kl_grad, kl_form, kl_small),
        average_pairs,
    )


def siglip_loss(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    *,
    temperature: float | tf.Tensor,
    bias: float | tf.Tensor = 0.0,
    alpha: float = 0.0,
    kl_grad: str = "none",
    kl_form: str = "transpose_reversed",
    kl_small: str = "transpose",
    include_same_view: bool = False,
    contrastive_weight: float = 1.0,
    average_pairs: bool = False,
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the pairwise sigmoid loss with the invariance term of ReLIC.

    `relic_loss` with another contrastive term, which classifies each of the B targets by itself:
    `mean_i sum_j softplus(-y_ij (f_ij + bias))`, where y_ij is 1 if j = i, else -1.

    Source: Zhai et al., arXiv:2303.15343, algorithm 1; filipbasara0/relic@a465a48 relic/relic.py,
    `use_siglip`, where the sum over targets is not divided by B. Other versions of that code weigh
    positives by 10 and negatives by 0.1; this has no such weights.

    Arguments and errors are those of `relic_loss`, except that negatives are not sampled and
    `bias`, a scalar tensor if learnt, has an effect. The paper initialises it to -10, because most
    pairs are negative. Returns a float32 scalar, the mean over this replica's rows.
    """
    common.check_not_negative(contrastive_weight=contrastive_weight, alpha=alpha)
    comparison = Comparison(
        online,
        target,
        include_same_view=include_same_view,
        temperature=temperature,
        bias=bias,
        gather=gather,
    )
    logits = comparison.logits
    signed = tf.where(comparison.is_own, logits, -logits)
    sigmoid = tf.reduce_sum(tf.nn.softplus(-signed), axis=[1, 2])
    return comparison.mean(
        contrastive_weight * sigmoid + invariance(comparison, alpha, kl_grad, kl_form, kl_small),
        average_pairs,
    )


def critic_temperature(log_scale: tf.Tensor, max_scale: float) -> tf.Tensor:
    """Computes the temperature `1 / min(exp(log_scale), max_scale)`.

    Where the scale is clamped, its gradient is exactly 0.

    Source: filipbasara0/relic@a465a48 relic/relic.py, where `log_scale` is `tau` and `max_scale` is
    `max_tau`.

    Args:
        log_scale: float scalar, the logarithm of the inverse temperature.
        max_scale: the largest inverse temperature, > 0.

    Returns:
        float32 scalar.

    Raises:
        ValueError: if `max_scale` is not positive.
    """
    common.check_positive(max_scale=max_scale)
    # Clamped before the exponential, whose overflow would give 0 * inf.
    clamped = tf.minimum(tf.cast(log_scale, tf.float32), math.log(max_scale))
    return tf.exp(-clamped)


def invariance(
    comparison: Comparison,
    weight: float,
    kl_grad: str,
    kl_form: str,
    kl_small: str,
) -> tf.Tensor | float:
    """Computes `weight sum_ac KL_ac(i)` of `relic_loss`, float32 `[b]`."""
    common.check_choice("kl_grad", kl_grad, KL_GRADS)
    common.check_choice("kl_form", kl_form, KL_FORMS)
    common.check_choice("kl_small", kl_small, KL_SMALLS)
    if kl_form != "swap" and kl_small != "off":
        kl_small = kl_form
    # The KL divergence of equal distributions is 0, and so is its gradient.
    skip_same = kl_form == "swap" and kl_grad != "entropy_only"
    numbers: dict[str, list[int]] = {kl_form: [], kl_small: []}
    for number, (a, c) in enumerate(comparison.pairs):
        if a != c or not skip_same:
            form = kl_form if a < comparison.num_large else kl_small
            numbers[form].append(number)
    loss = 0.0
    for form, chosen in numbers.items():
        if weight > 0 and form != "off" and chosen:
            log_p = tf.gather(comparison.log_p, chosen, axis=1)
            pairs = [comparison.pairs[number] for number in chosen]
            logits = comparison.choose(*_COMPARED[form](comparison, pairs), chosen)
            log_q = tf.nn.log_softmax(logits)
            if form in ("shared_target", "transpose_reversed"):
                log_p, log_q = log_q, log_p
            divergence = kl_divergence(log_p, log_q, kl_grad)
            loss += weight * tf.reduce_sum(divergence, axis=1)
    return loss


def kl_divergence(log_p: tf.Tensor, log_q: tf.Tensor, gradient: str) -> tf.Tensor:
    """Computes `KL(p || q)` over the last axis, with a `kl_grad`."""
    if gradient == "sg_p":
        log_p = tf.stop_gradient(log_p)
    p = tf.exp(log_p)
    first = p * log_p
    if gradient == "entropy_only":
        first = tf.stop_gradient(first)
    return tf.reduce_sum(first - p * log_q, axis=-1)


# A form of KL_ac compares p_ac with a distribution over the same candidates. Each function below
# returns scores [b, V, W, B], and which of their views to take for each pair (a, c).

_Scored = tuple["tf.Tensor", list[Pair]]


def _swap(comparison: Comparison, pairs: list[Pair]) -> _Scored:
    return comparison.scores, [(c, a) for a, c in pairs]


def _shared_target(comparison: Comparison, pairs: list[Pair]) -> _Scored:
    num_large = comparison.num_large
    return comparison.scores, [((c + 1) % num_large, c) for _, c in pairs]


def _transpose(comparison: Comparison, pairs: list[Pair]) -> _Scored:
    first = pairs[0][0]  # All later online views are in these pairs, too.
    scores = comparison.transposed_scores(first)
    return scores, [(c, a - first) for a, c in pairs]


_COMPARED = {
    "swap": _swap,
    "shared_target": _shared_target,
    "transpose": _transpose,
    "transpose_reversed": _transpose,
}
