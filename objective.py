# SPDX-License-Identifier: Apache-2.0
"""Objectives of pretraining: pure functions of views' projections.

Every loss takes the projections of this replica's images and a `gather` that
returns those of all replicas, and returns the mean over this replica's rows,
so that the average over replicas is the loss of the global batch.

Shapes are static: `b` and `B` must be known when a loss is traced.

All but `byol_loss` score pairs with the same critic,
`f(x, y) = <z_x, z_y> / T`. Those of two views (`simclr_loss`, `rpc_loss`,
`wpc_loss`, `js_loss`, `nwj_loss`, `dv_loss`) use for an anchor of one view the
other view of the same image as its positive and both views of the `B - 1`
other images as negatives; they differ in the functional of the scores.

Those of many views (`byol_loss`, `relic_loss`, `siglip_loss`, `semppl_loss`)
take sequences of tensors, one a view: `online` has the nL large views, then
the nS small ones; `target` the nL large ones in the same order. They go over
pairs (a, c) of online view a and target view c, in the order of a, then of c.
An anchor of view a has target view c of its own image as its positive, and
target view c of other images, all or sampled ones, as negatives.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

Gather = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
_Function = Callable[[tf.Tensor], tf.Tensor]

_MASKED = -1e9  # a logit that no softmax sees; reference code's LARGE_NUM

KL_GRADS = ("sg_p", "entropy_only", "none")
KL_FORMS = ("swap", "transpose", "transpose_reversed")
KL_SMALLS = ("transpose", "shared_target", "off")
SEMPOS_NEGATIVES = ("targets", "sempos")

_Pair = tuple[int, int]  # an online and a target view


class _TwoViews(NamedTuple):
    """The scores of the `b` local anchors of either view.

    Attributes:
        scores: float32 `[2, b, 2B]`, of the anchors of views 1 and 2: against
            the other view, then the same view.
        positive: float32 `[2, b]`, the score of the same image's other view.
        positive_mask: bool `[b, 2B]`, True at the column of the positive.
        self_mask: bool `[b, 2B]`, True where an anchor meets itself.
        batch: b, as a float.
        columns: 2B, as a float.
    """

    scores: tf.Tensor
    positive: tf.Tensor
    positive_mask: tf.Tensor
    self_mask: tf.Tensor
    batch: float
    columns: float


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
    views = _two_views(z1, z2, temperature, hidden_norm, gather)
    logits = tf.where(views.self_mask, _MASKED, views.scores)
    log_sums = tf.reduce_logsumexp(logits, axis=2)
    return tf.reduce_sum(log_sums - views.positive) / views.batch


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
    _check_not_negative(beta=beta, gamma=gamma)
    _check_choice("marginal_norm", marginal_norm, ("global", "local_replica"))
    views = _two_views(z1, z2, temperature, hidden_norm, gather)
    images = views.columns / 2
    if marginal_norm == "local_replica":
        images = views.batch
        if images < 2:
            raise ValueError(
                "`marginal_norm='local_replica'` divides by the local batch "
                f"minus 1. Received: a local batch of {images:.0f}."
            )
    joint = tf.reduce_mean(views.positive - 0.5 * beta * views.positive**2)
    marginal = _negatives_sum(views, lambda f: alpha * f + 0.5 * gamma * f**2)
    return marginal / (4 * views.batch * (images - 1)) - joint


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

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar,
    the mean over this replica's rows.
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
        *gradients: float `[b, h, w, c]` each, the gradients of `f(x_i, y_i)`
            with respect to its inputs, here the two views of image i.

    Returns:
        float32 scalar, the mean over rows.
    """
    squares = sum(
        tf.reduce_sum(tf.square(tf.cast(g, tf.float32)), [1, 2, 3])
        for g in gradients
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

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar,
    the mean over this replica's rows.
    """
    return _f_divergence_loss(
        _two_views(z1, z2, temperature, hidden_norm, gather),
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

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar,
    the mean over this replica's rows.
    """
    return _f_divergence_loss(
        _two_views(z1, z2, temperature, hidden_norm, gather),
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

    Arguments and errors are those of `simclr_loss`; returns a float32 scalar,
    whose mean over replicas is the global batch's loss.
    """
    gather = gather or _single_replica
    views = _two_views(z1, z2, temperature, hidden_norm, gather)
    scores = tf.where(views.positive_mask, 0.0, views.scores)
    scores = tf.where(views.self_mask, _MASKED, scores)
    rows, _ = gather(tf.transpose(tf.reduce_logsumexp(scores, axis=2)))
    log_means = tf.reduce_logsumexp(rows, axis=0) - math.log(
        (views.columns - 1.0) * views.columns / 2
    )
    return tf.reduce_mean(log_means) - tf.reduce_mean(views.positive)


def byol_loss(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    *,
    gather: Gather | None = None,  # noqa: ARG001
) -> tf.Tensor:
    """Returns the distance of predictions to the other views' targets.

    The sum over pairs (a, c) of different views of `mean_i |o_i - t_i|^2`,
    where o and t are l2-normalised.

    Source: Grill et al., arXiv:2006.07733, equation 2 and its symmetric
    counterpart; deepmind-research/byol byol_experiment.py, whose sum over two
    views this extends to any number.

    Args:
        online: nL + nS tensors, float `[b, d]`: this replica's predictions of
            the large, then the small views; row i is the same image in all.
        target: nL tensors, float `[b, d]`: projections of the large views by
            the target network. They receive no gradient.
        gather: unused, since no row meets another; for a signature like those
            of the other losses.

    Returns:
        float32 scalar in `[0, 4 * pairs]`, the mean over this replica's rows.

    Raises:
        ValueError: if views are missing or differ in shape.
    """
    pairs = _check_views(online, target, include_same_view=False)
    anchors = _prepare(tf.stack(online), True)
    targets = tf.stop_gradient(_prepare(tf.stack(target), True))
    squares = tf.math.squared_difference(
        tf.gather(anchors, [a for a, _ in pairs]),
        tf.gather(targets, [c for _, c in pairs]),
    )
    return tf.reduce_sum(squares) / online[0].shape[0]


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
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the ReLIC loss: contrastive, and invariant to the view.

    With `p_ac(. | i)` the softmax, over image i (the positive) and its
    negatives, of the scores of online view a of image i with target view c:

        sum_(a,c) mean_i -w log p_ac(i | i) + alpha KL_ac(i)

    `kl_form` says which two distributions over the same images KL_ac compares:

    - "swap": `KL(p_ac || p_ca)`. For a small view, which has no target,
      `kl_small` says it: "transpose" as below; "shared_target":
      `KL(p_kc || p_ac)`, k the large view after c; "off": none.
    - "transpose": `KL(p_ac || q_ac)`, q_ac from the scores of target view c of
      image i with online view a of the images. Also for small views, unless
      `kl_small` is "off".
    - "transpose_reversed": `KL(q_ac || p_ac)`. Likewise.

    And `kl_grad` through what the gradient of `KL(p || q)` passes: "none" (of
    it is stopped), "sg_p" (q alone), "entropy_only" (not through the first
    term of `E_p log p - E_p log q`, but through both factors of the second;
    then "swap" of a = c, whose value is 0, has the gradient of p's entropy).

    Source: Mitrovic et al., arXiv:2010.07922, equation 3 (two large views,
    "swap", "none"); Tomasev et al., arXiv:2201.05119 (ReLICv2: large and small
    views, same views included, sampled negatives, averaged pairs). Neither
    says how gradients are stopped in practice or how small views enter KL.
    "transpose_reversed", a bias and a learnt temperature:
    filipbasara0/relic relic/relic.py.

    Args:
        online: nL + nS tensors, float `[b, d]`: this replica's predictions of
            the large, then the small views; row i is the same image in all.
        target: nL tensors, float `[b, d]`: targets of the large views. They
            receive a gradient: who does not want it passes detached ones, who
            has no target network passes the large views of `online`.
        temperature: T > 0, divides the scores; a scalar tensor if learnt.
        alpha: weight of KL, >= 0.
        kl_grad: "none", "sg_p" or "entropy_only".
        kl_form: "swap", "transpose" or "transpose_reversed".
        kl_small: "transpose", "shared_target" or "off".
        include_same_view: whether pairs (a, a) count too.
        num_negatives: negatives of a row, sampled for each pair; 0 or at least
            B - 1 for all other images of the global batch.
        draws: float32 `[num_pairs, b, num_negatives]` in [0, 1), uniform
            numbers that choose the negatives, see `sample_negatives`; those of
            an image should not depend on the replica that has it. Ignored
            where all images are used.
        contrastive_weight: w >= 0.
        average_pairs: whether to average over pairs instead of summing.
        bias: added to the scores; without effect on a softmax.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: if an argument is out of its range, views or draws are
            missing or of the wrong shape, or B is 1.
    """
    _check_not_negative(contrastive_weight=contrastive_weight, alpha=alpha)
    comparison = _Comparison(
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
        contrastive_weight * comparison.negative_log_likelihood()
        + comparison.invariance(alpha, kl_grad, kl_form, kl_small),
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
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the pairwise sigmoid loss with the invariance term of ReLIC.

    `relic_loss` with another contrastive term: each of the B targets is told
    apart by itself,

        mean_i sum_j softplus(-y_ij (f_ij + bias)), y_ij 1 if j = i, else -1.

    Source: Zhai et al., arXiv:2303.15343, algorithm 1;
    filipbasara0/relic@a465a48 relic/relic.py, `use_siglip`: the sum over
    targets is not divided by B. Other versions of that code weigh positives
    by 10 and negatives by 0.1; this has no such weights.

    Args:
        online: as in `relic_loss`.
        target: as in `relic_loss`.
        temperature: T > 0, divides the scores; a scalar tensor if learnt.
        bias: added to the scores; a scalar tensor if learnt. The paper starts
            it at -10, so that the many negatives do not dominate at first.
        alpha: weight of KL, >= 0.
        kl_grad: as in `relic_loss`.
        kl_form: as in `relic_loss`.
        kl_small: as in `relic_loss`.
        include_same_view: whether pairs (a, a) count too.
        contrastive_weight: weight of the sigmoid loss, >= 0.
        average_pairs: whether to average over pairs instead of summing.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: as in `relic_loss`.
    """
    _check_not_negative(contrastive_weight=contrastive_weight, alpha=alpha)
    comparison = _Comparison(
        online,
        target,
        include_same_view=include_same_view,
        temperature=temperature,
        bias=bias,
        gather=gather,
    )
    return comparison.mean(
        contrastive_weight * comparison.sigmoid_loss()
        + comparison.invariance(alpha, kl_grad, kl_form, kl_small),
        average_pairs,
    )


def semppl_loss(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    semantic_positives: tf.Tensor,
    has_positive: tf.Tensor,
    *,
    temperature: float | tf.Tensor,
    invariance_weight: float,
    semantic_weight: float = 0.2,
    semantic_invariance: bool = True,
    sempos_negatives: str = "targets",
    drop_same_label_negatives: bool = False,
    labels: tf.Tensor | None = None,
    kl_grad: str = "sg_p",
    kl_form: str = "swap",
    kl_small: str = "transpose",
    include_same_view: bool = True,
    num_negatives: int = 0,
    draws: tf.Tensor | None = None,
    contrastive_weight: float = 1.0,
    average_pairs: bool = True,
    bias: float | tf.Tensor = 0.0,
    gather: Gather | None = None,
) -> tf.Tensor:
    """Returns the SemPPL loss: ReLIC with positives of the same (pseudo-)label.

    `relic_loss`, to which each pair (a, c) adds, with `s_ac` the softmax of
    `p_ac` where the positive is not target view c of image i but a target z of
    view c of another image of its class, with the same negatives:

        w semantic_weight mean_i -log s_ac(z | i)
        + invariance_weight mean_i KL(sg[s_a'c(. | i)] || s_ac(. | i)),

    a' the large view after a (nothing where it is a itself), averaged over k
    draws of z. Rows without a z add 0, and the mean is over all rows, not over
    those with one: otherwise the loss of the global batch would depend on how
    they are spread over replicas.

    Source: Bosnjak et al., arXiv:2301.05158. The second term, the weights and
    k are as remembered from the paper and found in the re-implementation
    JuergenThann/MAE-CT_SemPPL, not read in it.

    Args:
        online: as in `relic_loss`.
        target: as in `relic_loss`.
        semantic_positives: float `[nL, b, k, d]`, targets z for each target
            view, see `draw_semantic_positives`. They receive no gradient.
        has_positive: bool `[b]`, whether a row has them.
        temperature: T > 0, divides the scores; a scalar tensor if learnt.
        invariance_weight: weight of both KL terms, >= 0.
        semantic_weight: weight of semantic against own positives, >= 0.
        semantic_invariance: whether the second term above counts.
        sempos_negatives: what the negatives of `s_ac` are: "targets", as of
            `p_ac`; "sempos", other images' z of the same draw, in place of
            their targets, where they have one.
        drop_same_label_negatives: whether images of the row's class are no
            negatives, in any term. The published method keeps them.
        labels: int32 `[b]`, (pseudo-)labels of the rows, -1 for none; only
            needed for the above.
        kl_grad: as in `relic_loss`, for its KL.
        kl_form: as in `relic_loss`.
        kl_small: as in `relic_loss`.
        include_same_view: whether pairs (a, a) count too.
        num_negatives: as in `relic_loss`.
        draws: as in `relic_loss`.
        contrastive_weight: w >= 0.
        average_pairs: whether to average over pairs instead of summing.
        bias: as in `relic_loss`.
        gather: as in `simclr_loss`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: as in `relic_loss`, or if the semantic positives are of the
            wrong shape, or labels are needed and not given.
    """
    _check_not_negative(
        contrastive_weight=contrastive_weight,
        semantic_weight=semantic_weight,
        invariance_weight=invariance_weight,
    )
    _check_choice("sempos_negatives", sempos_negatives, SEMPOS_NEGATIVES)
    if drop_same_label_negatives and labels is None:
        raise ValueError("`drop_same_label_negatives` needs `labels`.")
    comparison = _Comparison(
        online,
        target,
        include_same_view=include_same_view,
        temperature=temperature,
        bias=bias,
        num_negatives=num_negatives,
        draws=draws,
        labels=labels if drop_same_label_negatives else None,
        gather=gather,
    )
    contrastive = comparison.negative_log_likelihood()
    invariance = comparison.invariance(
        invariance_weight, kl_grad, kl_form, kl_small
    )
    semantic, semantic_kl = comparison.semantic(
        semantic_positives, has_positive, sempos_negatives == "sempos"
    )
    if semantic_weight > 0:
        contrastive += semantic_weight * semantic
    if semantic_invariance and invariance_weight > 0:
        invariance += invariance_weight * semantic_kl
    return comparison.mean(
        contrastive_weight * contrastive + invariance, average_pairs
    )


def critic_temperature(log_scale: tf.Tensor, max_scale: float) -> tf.Tensor:
    """Returns the temperature `1 / min(exp(log_scale), max_scale)`.

    Where the scale is clamped its gradient is exactly 0.

    Source: filipbasara0/relic@a465a48 relic/relic.py, where `log_scale` is
    `tau` and `max_scale` is `max_tau`.

    Args:
        log_scale: float scalar, the logarithm of the inverse temperature.
        max_scale: the largest inverse temperature, > 0.

    Returns:
        float32 scalar.

    Raises:
        ValueError: if `max_scale` is not positive.
    """
    _check_positive(max_scale=max_scale)
    # Clamped before the exponential, whose overflow would give 0 * inf.
    clamped = tf.minimum(tf.cast(log_scale, tf.float32), math.log(max_scale))
    return tf.exp(-clamped)


def num_pairs(num_online: int, num_target: int, include_same_view: bool) -> int:
    """Returns how many pairs of views the losses of many views go over.

    Args:
        num_online: nL + nS, the number of online views.
        num_target: nL, the number of target views.
        include_same_view: whether pairs (a, a) count too.

    Returns:
        The first size of `draws`.
    """
    return len(_view_pairs(num_online, num_target, include_same_view))


def sample_negatives(
    draws: tf.Tensor, batch_size: int, offset: int | tf.Tensor
) -> tf.Tensor:
    """Returns other images for each row, drawn without replacement.

    All subsets of n out of the B - 1 other images are equally likely (their
    order is not random), but for rounding: numbers of 23 bits, as tf.random
    makes them, prefer some images to others by a share of at most `B / 2^23`.

    Source: Floyd's algorithm, in Bentley, "Programming pearls: a sample of
    brilliance", Communications of the ACM 30 (9), 1987.

    Args:
        draws: float32 `[..., b, n]` in [0, 1), independent and uniform.
        batch_size: B, images of the global batch.
        offset: global index of this replica's first row.

    Returns:
        int32 `[..., b, n]`, global indices, never the row's own.

    Raises:
        ValueError: if n is greater than B - 1.
    """
    count = draws.shape[-1]
    if count > batch_size - 1:
        raise ValueError(
            f"There are {batch_size - 1} other images in the batch. "
            f"Received: draws of {count}."
        )
    lasts = tf.range(batch_size - 1 - count, batch_size - 1)
    candidates = _uniform_integer(draws, lasts + 1)
    others = candidates[..., :0]
    for i in range(count):
        candidate = candidates[..., i, None]
        is_taken = tf.reduce_any(tf.equal(candidate, others), -1, keepdims=True)
        chosen = tf.where(is_taken, lasts[i], candidate)
        others = tf.concat([others, chosen], -1)
    own = tf.range(draws.shape[-2])[:, None] + offset
    return others + tf.cast(others >= own, tf.int32)


def pseudo_labels(
    online: Sequence[tf.Tensor],
    queue: tf.Tensor,
    queue_labels: tf.Tensor,
    queue_ids: tf.Tensor,
    ids: tf.Tensor,
    *,
    num_classes: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the class that most nearest neighbours of each image have.

    Each of the nL large views finds its nearest neighbour by cosine in each of
    nL queues of labelled images' targets: `nL^2` votes. Of classes with equal
    votes the smallest wins. No gradient.

    Source: Bosnjak et al., arXiv:2301.05158, as found in the re-implementation
    JuergenThann/MAE-CT_SemPPL.

    Args:
        online: nL tensors, float `[b, d]`: predictions of the large views.
        queue: float `[nL, C, d]`, targets of C labelled images, by large view.
        queue_labels: int32 `[C]`, their classes in [0, num_classes).
        queue_ids: int64 `[C]`, their example ids; -1 for an empty slot.
        ids: int64 `[b]`, example ids of the rows; an image is not its own
            neighbour.
        num_classes: number of classes.

    Returns:
        A tuple of int32 `[b]`, the labels, -1 where the queue has no other
        image; and float32 `[b]`, the share of votes for them in [0, 1], 0
        where there is none.

    Raises:
        ValueError: if the number of views and of queues differ.
    """
    if len(online) != queue.shape[0]:
        raise ValueError(
            "Each large view needs its queue. Received: "
            f"{len(online)} views, {queue.shape[0]} queues."
        )
    is_other = _is_other(queue_ids, ids)
    queries = _prepare(tf.stack(online, 1), True)
    nearest = []
    for entries in tf.unstack(_prepare(queue, True)):  # or memory is scarce
        similarity = tf.einsum("bad,nd->ban", queries, entries)
        similarity = tf.where(is_other[:, None], similarity, _MASKED)
        nearest.append(tf.argmax(similarity, axis=2))
    votes = tf.gather(queue_labels, tf.concat(nearest, 1))
    is_same = tf.equal(votes[:, :, None], votes[:, None])
    shares = tf.reduce_mean(tf.cast(is_same, tf.float32), axis=2)
    share = tf.reduce_max(shares, axis=1)
    # tf.argmax does not promise which of several maxima it returns.
    label = tf.reduce_min(
        tf.where(tf.equal(shares, share[:, None]), votes, num_classes), axis=1
    )
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
    """Returns targets of labelled images of each row's class, from the queue.

    Draw u takes entry `floor(u m)` of the row's m matches, in the order of
    their slots: entries of the row's class, but not of the row's own image.
    Draws are with replacement. No gradient.

    Source: Bosnjak et al., arXiv:2301.05158, as found in the re-implementation
    JuergenThann/MAE-CT_SemPPL, which does not exclude the own image.

    Args:
        labels: int32 `[b]`, (pseudo-)labels of the rows, -1 for none.
        queue: float `[nL, C, d]`, as in `pseudo_labels`.
        queue_labels: int32 `[C]`, as in `pseudo_labels`.
        queue_ids: int64 `[C]`, as in `pseudo_labels`.
        ids: int64 `[b]`, example ids of the rows.
        draws: float32 `[nL, b, k]` in [0, 1), independent and uniform.

    Returns:
        A tuple of float32 `[nL, b, k, d]`, the drawn entries of each queue,
        zeros for rows without a match; and bool `[b]`, whether there is one.
    """
    matches = tf.logical_and(
        tf.equal(queue_labels, labels[:, None]), _is_other(queue_ids, ids)
    )
    matches = tf.logical_and(matches, labels[:, None] >= 0)
    ranks = tf.cumsum(tf.cast(matches, tf.int32), axis=1)  # from 1 on
    count = ranks[:, -1]
    slots = tf.searchsorted(
        tf.broadcast_to(ranks, [draws.shape[0], *ranks.shape]),
        1 + _uniform_integer(draws, count[:, None]),
    )
    # Rows without a match find the slot after the last.
    slots = tf.minimum(slots, queue.shape[1] - 1)
    positives = tf.gather(
        tf.cast(queue, tf.float32), slots, axis=1, batch_dims=1
    )
    has_positive = count > 0
    positives = tf.where(has_positive[:, None, None], positives, 0.0)
    return tf.stop_gradient(positives), has_positive


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
    views: _TwoViews, joint: _Function, marginal: _Function
) -> tf.Tensor:
    """Returns `-(E_P[joint(f)] - E_Q[marginal(f)])`, self pairs scoring 0."""
    anchors = 2 * views.batch
    negatives = _negatives_sum(views, marginal) + anchors * marginal(0.0)
    negatives /= anchors * (views.columns - 1.0)
    return negatives - tf.reduce_mean(joint(views.positive))


def _negatives_sum(views: _TwoViews, function: _Function) -> tf.Tensor:
    """Returns the sum of `function` over the scores of all negative pairs."""
    excluded = tf.logical_or(views.positive_mask, views.self_mask)
    # Masked before, so that no overflow of `function` at a positive can turn
    # into 0 * inf, in the value or in the gradient.
    scores = tf.where(excluded, 0.0, views.scores)
    return tf.reduce_sum(tf.where(excluded, 0.0, function(scores)))


def _two_views(
    z1: tf.Tensor,
    z2: tf.Tensor,
    temperature: float,
    hidden_norm: bool,
    gather: Gather | None,
) -> _TwoViews:
    """Returns the scores with view 1 and with view 2 as anchors."""
    _check_positive(temperature=temperature)
    gather = gather or _single_replica
    (all1, offset), (all2, _) = gather(z1), gather(z2)
    batch, size = z1.shape[0], all1.shape[0]
    _check_batch(size)
    scores = _scores(
        tf.stack([z1, z2]),
        tf.stack([tf.concat([all2, all1], 0), tf.concat([all1, all2], 0)]),
        temperature,
        hidden_norm,
    )
    own = tf.range(batch)[:, None] + offset
    positive_mask = tf.equal(own, tf.range(2 * size))
    self_mask = tf.equal(own + size, tf.range(2 * size))
    positive = _select(scores, positive_mask)
    return _TwoViews(
        scores, positive, positive_mask, self_mask, float(batch), 2.0 * size
    )


def _scores(
    anchors: tf.Tensor,
    candidates: tf.Tensor,
    temperature: float,
    hidden_norm: bool,
) -> tf.Tensor:
    """Returns float32 `[..., b, n]`, the critic of anchors and candidates."""
    return (
        tf.matmul(
            _prepare(anchors, hidden_norm),
            _prepare(candidates, hidden_norm),
            transpose_b=True,
        )
        / temperature
    )


class _Comparison:
    """Online views of local rows against target views of global candidates.

    Pairs of views are on axis 1, all at once. Online view a and target view c
    are number `a nL + c` of all pairs, some of which a loss may leave out.

    Attributes:
        pairs: the P pairs (a, c) of views that a loss goes over.
        num_large: nL, the number of large views.
        logits: float32 `[b, P, M]`, scores of the candidates of each pair; M
            is B, or 1 + n with sampled negatives.
        log_p: float32 `[b, P, M]`, their `log p_ac`.
        is_own: bool `[b, 1, M]` or `[1, 1, M]`, True where a row's candidate
            is its own image.
    """

    def __init__(
        self,
        online: Sequence[tf.Tensor],
        target: Sequence[tf.Tensor],
        *,
        include_same_view: bool,
        temperature: float | tf.Tensor,
        gather: Gather | None,
        bias: float | tf.Tensor = 0.0,
        num_negatives: int = 0,
        draws: tf.Tensor | None = None,
        labels: tf.Tensor | None = None,
    ) -> None:
        self.pairs = _check_views(online, target, include_same_view)
        _check_not_negative(num_negatives=num_negatives)
        if isinstance(temperature, (int, float)):
            _check_positive(temperature=temperature)
        self.num_large = len(target)
        self._temperature = tf.cast(temperature, tf.float32)
        self._bias = tf.cast(bias, tf.float32)
        self._gather = gather or _single_replica
        self._online, self._target = online, target
        candidates, offsets = zip(*map(self._gather, target), strict=True)
        batch, size = online[0].shape[0], candidates[0].shape[0]
        _check_batch(size)
        self._anchors = _prepare(tf.stack(online, 1), True)
        self._candidates = _prepare(tf.stack(candidates), True)
        self._scores = self._critic(
            "bad,cnd->bacn", self._anchors, self._candidates
        )
        own = tf.range(batch)[:, None, None] + offsets[0]
        self._columns = None  # of the scores, `[b, P, M]`
        self.is_own = tf.equal(own, tf.range(size))
        self._is_dropped = None  # of the candidates, `[b, 1, B]`
        if labels is not None:
            rows = labels[:, None, None]
            is_same = tf.equal(rows, self._gather(labels)[0]) & (rows >= 0)
            self._is_dropped = is_same & ~self.is_own
        if 0 < num_negatives < size - 1:
            expected = [len(self.pairs), batch, num_negatives]
            if draws is None or draws.shape.as_list() != expected:
                raise ValueError(
                    f"`num_negatives={num_negatives}` needs `draws` of shape "
                    f"{expected}. Received: {getattr(draws, 'shape', None)}."
                )
            others = sample_negatives(draws, size, offsets[0])
            # Not tf.transpose, for which oneDNN complains about int32.
            others = tf.stack(tf.unstack(others), 1)
            own = tf.broadcast_to(own, [*others.shape[:2], 1])
            self._columns = tf.concat([own, others], 2)
            self.is_own = tf.equal(tf.range(1 + num_negatives), 0)[None, None]
        self._numbers = [a * self.num_large + c for a, c in self.pairs]
        self.logits = self._choose(self._scores, self._numbers)
        self.log_p = tf.nn.log_softmax(self.logits)

    def mean(self, loss: tf.Tensor, average_pairs: bool) -> tf.Tensor:
        """Returns the mean over rows of the sum or mean over pairs."""
        mean = tf.reduce_mean(loss)
        return mean / len(self.pairs) if average_pairs else mean

    def negative_log_likelihood(self) -> tf.Tensor:
        """Returns `sum_ac -log p_ac(i | i)`, `[b]`."""
        return -tf.reduce_sum(_select(self.log_p, self.is_own), axis=1)

    def sigmoid_loss(self) -> tf.Tensor:
        """Returns the sum over pairs and candidates of their loss, `[b]`."""
        signed = tf.where(self.is_own, self.logits, -self.logits)
        return tf.reduce_sum(tf.nn.softplus(-signed), axis=[1, 2])

    def invariance(
        self, weight: float, kl_grad: str, kl_form: str, kl_small: str
    ) -> tf.Tensor | float:
        """Returns `weight sum_ac KL_ac(i)`, `[b]`."""
        _check_choice("kl_grad", kl_grad, KL_GRADS)
        _check_choice("kl_form", kl_form, KL_FORMS)
        _check_choice("kl_small", kl_small, KL_SMALLS)
        if kl_form != "swap" and kl_small != "off":
            kl_small = kl_form
        # KL of equal distributions is 0, and so is its gradient.
        skip_same = kl_form == "swap" and kl_grad != "entropy_only"
        loss = 0.0
        for form in dict.fromkeys((kl_form, kl_small)):
            chosen = [
                i
                for i, (a, c) in enumerate(self.pairs)
                if form == (kl_form if a < self.num_large else kl_small)
                and not (a == c and skip_same)
            ]
            if weight == 0 or form == "off" or not chosen:
                continue
            first = tf.gather(self.log_p, chosen, axis=1)
            second = tf.nn.log_softmax(self._compared(form, chosen))
            if form in ("shared_target", "transpose_reversed"):
                first, second = second, first
            divergence = _kl_divergence(first, second, kl_grad)
            loss += weight * tf.reduce_sum(divergence, axis=1)
        return loss

    def semantic(
        self,
        positives: tf.Tensor,
        has_positive: tf.Tensor,
        among_positives: bool,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the two sums over pairs in `semppl_loss`, `[b]` each.

        Of positives z, `[nL, b, k, d]`; 0 for rows without one. Where
        `among_positives`, other images' z stand for their targets.
        """
        shape = positives.shape.as_list()
        batch, _, dim = self._anchors.shape
        if [*shape[:2], *shape[3:]] != [self.num_large, batch, dim]:
            raise ValueError(
                "`semantic_positives` must be of shape "
                f"[{self.num_large}, {batch}, k, {dim}]. Received: {shape}."
            )
        positives = tf.stop_gradient(_prepare(positives, True))
        is_own, draws = self.is_own[:, :, None], range(shape[2])
        if among_positives:
            rows = self._gather(tf.stack(tf.unstack(positives), 1))[0]
            has_row = self._gather(tf.cast(has_positive, tf.float32))[0] > 0
            rows = tf.where(
                has_row[:, None, None, None],
                rows,
                tf.stack(tf.unstack(self._candidates), 1)[:, :, None],
            )
            scores = self._critic("bad,nckd->backn", self._anchors, rows)
        else:
            scores = self._critic("bad,cbkd->back", self._anchors, positives)

        def log_s(numbers: list[int], logits: tf.Tensor) -> tf.Tensor:
            if among_positives:
                logits = self._choose(
                    scores,
                    [n * len(draws) + draw for n in numbers for draw in draws],
                    [pair for pair in range(len(numbers)) for _ in draws],
                )
                shape = [batch, len(numbers), len(draws), -1]
                return tf.nn.log_softmax(tf.reshape(logits, shape))
            own = tf.gather(scores, numbers, axis=1)[..., None]
            return tf.nn.log_softmax(
                tf.where(is_own, own, logits[:, :, None])  # [b, P, k, M]
            )

        teachers = [
            (a + 1) % self.num_large * self.num_large + c for a, c in self.pairs
        ]
        pupil = log_s(self._numbers, self.logits)
        teacher = log_s(teachers, self._choose(self._scores, teachers))
        terms = -_select(pupil, is_own), _kl_divergence(teacher, pupil, "sg_p")
        nll, kl = (tf.reduce_sum(tf.reduce_mean(x, 2), 1) for x in terms)
        return (
            tf.where(has_positive, nll, 0.0),
            tf.where(has_positive, kl, 0.0),
        )

    def _compared(self, form: str, chosen: list[int]) -> tf.Tensor:
        """Returns `[b, n, M]`, the logits that KL compares chosen pairs with.

        Over the same candidates: "swap", of online view c and target view a;
        "shared_target", of the online view after c and target view c; else
        of target view c of the row and online view a of the candidates.
        """
        pairs = [self.pairs[i] for i in chosen]
        scores, count = self._scores, self.num_large
        if form == "swap":
            numbers = [c * count + a for a, c in pairs]
        elif form == "shared_target":
            numbers = [(c + 1) % count * count + c for _, c in pairs]
        else:
            first = pairs[0][0]  # the views from it on are all in pairs
            views = [self._gather(z)[0] for z in self._online[first:]]
            scores = self._critic(
                "bcd,and->bcan",
                _prepare(tf.stack(self._target, 1), True),
                _prepare(tf.stack(views), True),
            )
            numbers = [c * len(views) + a - first for a, c in pairs]
        return self._choose(scores, numbers, chosen)

    def _critic(
        self, equation: str, anchors: tf.Tensor, others: tf.Tensor
    ) -> tf.Tensor:
        """Returns scores `[b, V, n]` of V pairs of views."""
        cosine = tf.einsum(equation, anchors, others)
        cosine = tf.reshape(cosine, [anchors.shape[0], -1, cosine.shape[-1]])
        return cosine / self._temperature + self._bias

    def _choose(
        self,
        scores: tf.Tensor,
        numbers: list[int],
        chosen: list[int] | None = None,
    ) -> tf.Tensor:
        """Returns `[b, n, M]`: n of the scores `[b, V, B]`, by their numbers.

        Of the candidates of the n `chosen` pairs, by default of all pairs.
        """
        if self._is_dropped is not None:
            scores = tf.where(self._is_dropped, _MASKED, scores)
        if self._columns is None:
            return tf.gather(scores, numbers, axis=1)
        columns = self._columns
        if chosen is not None:
            columns = tf.gather(columns, chosen, axis=1)
        columns += scores.shape[2] * tf.constant(numbers)[:, None]
        scores = tf.reshape(scores, [scores.shape[0], -1])
        return tf.gather(scores, columns, axis=1, batch_dims=1)


def _kl_divergence(
    log_p: tf.Tensor, log_q: tf.Tensor, gradient: str
) -> tf.Tensor:
    """Returns `KL(p || q)` over the last axis; see `relic_loss`'s `kl_grad`."""
    if gradient == "sg_p":
        log_p = tf.stop_gradient(log_p)
    p = tf.exp(log_p)
    first = p * log_p
    if gradient == "entropy_only":
        first = tf.stop_gradient(first)
    return tf.reduce_sum(first - p * log_q, axis=-1)


def _select(values: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Returns the values at the one True of each row of the mask."""
    return tf.reduce_sum(tf.where(mask, values, 0.0), axis=-1)


def _view_pairs(
    num_online: int, num_target: int, include_same_view: bool
) -> list[_Pair]:
    """Returns the pairs of views, in the order of `draws`."""
    return [
        (a, c)
        for a in range(num_online)
        for c in range(num_target)
        if include_same_view or a != c
    ]


def _uniform_integer(draws: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """Returns int32 in `[0, count)` from uniform numbers in [0, 1)."""
    # Not even the float32 next to 1 gives a product that rounds up to `count`.
    return tf.cast(draws * tf.cast(count, tf.float32), tf.int32)


def _is_other(queue_ids: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """Returns bool `[b, C]`: the slot holds an image, not the row's own."""
    return tf.logical_and(
        tf.not_equal(queue_ids, ids[:, None]), tf.not_equal(queue_ids, -1)
    )


def _check_views(
    online: Sequence[tf.Tensor],
    target: Sequence[tf.Tensor],
    include_same_view: bool,
) -> list[_Pair]:
    """Returns the pairs of views; raises if views do not fit together."""
    if not 1 <= len(target) <= len(online):
        raise ValueError(
            "Each target view needs its online view, and at least one. "
            f"Received: {len(online)} online, {len(target)} target views."
        )
    shapes = [tuple(z.shape) for z in (*online, *target)]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"All views must be of the same shape. Received: {shapes}."
        )
    pairs = _view_pairs(len(online), len(target), include_same_view)
    if not pairs:
        raise ValueError(
            "A single view has no other view to be compared with. "
            f"Received: include_same_view={include_same_view}."
        )
    return pairs


def _check_batch(size: int) -> None:
    """Raises if the global batch is of one image."""
    if size == 1:
        raise ValueError(
            "A contrastive loss needs negatives: at least 2 images in the "
            "global batch. Received: 1."
        )


def _check_not_negative(**values: float) -> None:
    """Raises if one of the named values is negative."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(
                f"`{name}` must not be negative. Received: {value}."
            )


def _check_positive(**values: float) -> None:
    """Raises if one of the named values is not positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be positive. Received: {value}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises if a named value is not one of its choices."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {value!r}."
        )


def _prepare(z: tf.Tensor, hidden_norm: bool) -> tf.Tensor:
    """Returns projections as the critic sees them, in float32."""
    z = tf.cast(z, tf.float32)
    return tf.math.l2_normalize(z, axis=-1) if hidden_norm else z


def _single_replica(z: tf.Tensor) -> tuple[tf.Tensor, int]:
    """The `gather` of a program that runs on one device."""
    return z, 0
