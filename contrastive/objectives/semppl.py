# SPDX-License-Identifier: Apache-2.0
"""SemPPL: ReLIC with positives of the same (pseudo-)label.

Source: Bosnjak et al., arXiv:2301.05158, as implemented again
by JuergenThann/MAE-CT_SemPPL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epy

from contrastive.config.fields import Derived, Values, derived, field, group
from contrastive.objectives import common
from contrastive.objectives.base import (
    SEMANTIC_POSITIVES,
    Embedded,
    Metrics,
    StepContext,
    Training,
)
from contrastive.objectives.comparison import Comparison, Pair
from contrastive.objectives.pseudo_labels import (
    draw_semantic_positives,
    pseudo_labels,
    vote_metrics,
)
from contrastive.objectives.relic import (
    RELICV2_DEFAULTS,
    RELICV2_SMALL_IMAGES,
    ReLICv2,
)
from contrastive.objectives.relic_losses import (
    invariance as kl_terms,
    kl_divergence,
)

with epy.lazy_imports():
    import keras
    import tensorflow as tf

    from contrastive.objectives import state

SEMPOS_NEGATIVES = ("targets", "sempos")
_QUEUE_BATCHES = 20


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
    gather: common.Gather | None = None,
) -> tf.Tensor:
    """Computes the SemPPL loss: ReLIC with additional semantic positives.

    To `relic_loss`, with `invariance_weight` for alpha, each pair (a, c) adds

        w semantic_weight mean_i -log s_ac(z | i)
        + invariance_weight mean_i KL(sg[s_a'c(. | i)] || s_ac(. | i)),

    averaged over k draws of z. `s_ac` is the softmax of `p_ac` in which target z of view c of
    another image of the class of image i replaces the positive; a' is the large view after a (the
    KL is 0 if it is a itself). Rows without a z add 0. The mean is over all rows, so that the loss
    of the global batch does not depend on how rows are distributed over replicas.

    Source: see the module. The second term, the weights and k are recalled from the paper and found
    in the re-implementation, not read in the paper.

    Args (the others are those of `relic_loss`):
        semantic_positives: float `[nL, b, k, d]`, targets z for each target view, see
            `draw_semantic_positives`. They receive no gradient.
        has_positive: bool `[b]`, whether a row has semantic positives.
        invariance_weight: weight of both KL terms, >= 0.
        semantic_weight: weight of the semantic positives relative to the own positive, >= 0.
        semantic_invariance: whether to add the second term above.
        sempos_negatives: negatives of `s_ac`: "targets", those of `p_ac`; "sempos", the z of other
            images in the same draw, in place of their targets, if they have one.
        drop_same_label_negatives: whether to exclude images of the row's class from the negatives
            of all terms. The published method keeps them.
        labels: int32 `[b]`, (pseudo-)labels of the rows, -1 for none; needed only by
            `drop_same_label_negatives`.

    Returns:
        float32 scalar, the mean over this replica's rows.

    Raises:
        ValueError: as in `relic_loss`, or if the semantic positives have the wrong shape or labels
            are needed and not given.
    """
    common.check_not_negative(
        contrastive_weight=contrastive_weight,
        semantic_weight=semantic_weight,
        invariance_weight=invariance_weight,
    )
    common.check_choice("sempos_negatives", sempos_negatives, SEMPOS_NEGATIVES)
    if drop_same_label_negatives and labels is None:
        raise ValueError("`drop_same_label_negatives` needs `labels`.")
    comparison = Comparison(
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
    contrastive = comparison.contrastive()
    invariance = kl_terms(comparison, invariance_weight, kl_grad, kl_form, kl_small)
    semantic, semantic_kl = _semantic_terms(
        comparison, semantic_positives, has_positive, sempos_negatives
    )
    if semantic_weight > 0:
        contrastive += semantic_weight * semantic
    if semantic_invariance and invariance_weight > 0:
        invariance += invariance_weight * semantic_kl
    return comparison.mean(contrastive_weight * contrastive + invariance, average_pairs)


def _semantic_terms(
    comparison: Comparison,
    positives: tf.Tensor,
    has_positive: tf.Tensor,
    negatives: str,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums `-log s_ac(z | i)` and the KL of `s_ac` over pairs, `[b]` each."""
    shape = positives.shape.as_list()
    batch, _, dim = comparison.anchors.shape
    num_large = comparison.num_large
    if [*shape[:2], *shape[3:]] != [num_large, batch, dim]:
        raise ValueError(
            "`semantic_positives` must be of shape "
            f"[{num_large}, {batch}, k, {dim}]. Received: {shape}."
        )
    positives = tf.stop_gradient(common.prepare(positives, True))
    teachers = [((a + 1) % num_large, c) for a, c in comparison.pairs]
    if negatives == "sempos":
        pupil, teacher = _among_positives(comparison, positives, has_positive, teachers)
    else:
        pupil, teacher = _among_targets(comparison, positives, teachers)
    terms = (
        -common.select(pupil, comparison.is_own[:, :, None]),
        kl_divergence(teacher, pupil, "sg_p"),
    )
    nll, kl = (tf.reduce_sum(tf.reduce_mean(x, 2), 1) for x in terms)
    return tf.where(has_positive, nll, 0.0), tf.where(has_positive, kl, 0.0)


def _among_targets(
    comparison: Comparison, positives: tf.Tensor, teachers: list[Pair]
) -> list[tf.Tensor]:
    """Computes log s `[b, P, k, M]` of pairs and teachers for "targets"."""
    scores = comparison.score("bad,cbkd->back", comparison.anchors, positives)
    batch, _, num_large, count = scores.shape
    scores = tf.reshape(scores, [batch, -1, count])
    result = []
    for views, logits in (
        (comparison.pairs, comparison.logits),
        (teachers, comparison.choose(comparison.scores, teachers)),
    ):
        numbers = [a * num_large + c for a, c in views]
        own = tf.gather(scores, numbers, axis=1)[..., None]
        is_own = comparison.is_own[:, :, None]
        logits = tf.where(is_own, own, logits[:, :, None])
        result.append(tf.nn.log_softmax(logits))
    return result


def _among_positives(
    comparison: Comparison,
    positives: tf.Tensor,
    has_positive: tf.Tensor,
    teachers: list[Pair],
) -> list[tf.Tensor]:
    """Computes log s `[b, P, k, M]` of pairs and teachers for "sempos"."""
    rows = comparison.gather(tf.stack(tf.unstack(positives), 1))[0]
    has_row = comparison.gather(tf.cast(has_positive, tf.float32))[0] > 0
    targets = tf.stack(tf.unstack(comparison.targets), 1)[:, :, None]
    rows = tf.where(has_row[:, None, None, None], rows, targets)
    scores = comparison.score("bad,nckd->backn", comparison.anchors, rows)
    batch, num_online, _, count, size = scores.shape
    # Each draw of a target view is treated as a target view of its own.
    scores = tf.reshape(scores, [batch, num_online, -1, size])
    numbers = [n for n in range(len(teachers)) for _ in range(count)]
    result = []
    for pairs in (comparison.pairs, teachers):
        views = [(a, c * count + k) for a, c in pairs for k in range(count)]
        logits = comparison.choose(scores, views, numbers)
        shape = [batch, len(pairs), count, -1]
        result.append(tf.nn.log_softmax(tf.reshape(logits, shape)))
    return result


@group("Objective")
class SemPPL(ReLICv2):
    """SemPPL (Bosnjak et al., arXiv:2301.05158).

    The rows with a label enter a queue; the queue's nearest neighbours vote on the labels of the
    others, and semantic positives are drawn from it.
    """

    loss_function = staticmethod(semppl_loss)
    uses_labels = True
    defaults = {**RELICV2_DEFAULTS, "weight_decay": 1e-6}
    small_images = {
        **RELICV2_SMALL_IMAGES,
        "semantic_weight": 1.0,
        "pseudo_label_start_epoch": 2.0,
    }

    semantic_weight: float = field(
        0.2,
        "Weight of the semantic positives relative to the views.",
        minimum=0,
    )
    semantic_invariance: bool = field(True, "Use a KL term of semantic positives, too.")
    sempos_negatives: str = field(
        "targets",
        "Negatives of the semantic-positive term: other images' targets, "
        "or their semantic positives.",
        choices=SEMPOS_NEGATIVES,
    )
    drop_same_label_negatives: bool = field(
        False,
        "Remove images of the same (pseudo-)label from the negatives.",
    )
    num_semantic_positives: int = field(
        3, "Number of semantic positives sampled per image.", minimum=1
    )
    pseudo_label_start_epoch: float = field(
        0.0,
        "Epochs before pseudo-labels are used, which are wrong at first; "
        "until then, only labelled images have semantic positives. 2 for small "
        "images.",
        minimum=0,
    )
    queue_size: int = field(
        derived("20 batches"),
        "Number of labelled images in the queue.",
        minimum=1,
    )

    @classmethod
    def derive(cls, values: Values) -> Values:
        """Returns the size of the queue."""
        return {"queue_size": _QUEUE_BATCHES * values["train_batch_size"]}

    @classmethod
    def check(cls, values: Values) -> None:
        """Raises ValueError if the queue is smaller than a batch."""
        size, batch = values["queue_size"], values["train_batch_size"]
        if not isinstance(size, Derived) and size < batch:
            raise ValueError(f"--queue_size={size} is less than --train_batch_size={batch}.")

    def build_state(self, training: Training) -> keras.layers.Layer:
        """Returns the queue, and the temperature if it is trained."""
        queue = state.LabelledQueue(
            training.num_large_views, self.queue_size, training.embedding_dim
        )
        return state.LabelledState(queue, super().build_state(training))

    def state_bytes(self, training: Training) -> int:
        """Computes the size of the state and of its optimizer, in bytes."""
        embeddings = 4 * training.num_large_views * training.embedding_dim
        label, id_, position = 4, 8, 8  # int32, int64, int64
        entry = embeddings + label + id_
        temperature = super().state_bytes(training)
        return self.queue_size * entry + position + temperature

    def trained_temperature(self, context: StepContext) -> state.TrainedTemperature | None:
        """Returns the variables of the temperature in a step's state."""
        return context.state.temperature

    def arguments(self) -> dict[str, Any]:
        """Returns the weights, the options and the number of negatives."""
        return {
            "invariance_weight": self.invariance_weight,
            "contrastive_weight": self.contrast_weight,
            "num_negatives": self.num_negatives,
            "semantic_weight": self.semantic_weight,
            "semantic_invariance": self.semantic_invariance,
            "sempos_negatives": self.sempos_negatives,
            "drop_same_label_negatives": self.drop_same_label_negatives,
        }

    def batch_arguments(
        self, embedded: Embedded, context: StepContext
    ) -> tuple[dict[str, Any], Metrics]:
        """Pushes the labelled rows to the queue, and votes on the others.

        Returns:
            Arguments of `semppl_loss`, and metrics of the global batch.
        """
        labels, ids = context.batch["label"], context.batch["id"]
        gather, training = context.gather, context.training
        labelled = labels >= 0
        if training.labelled is not None:
            labelled &= tf.gather(tf.constant(training.labelled), ids)
        queue, queue_labels, queue_ids = context.state.queue.push(
            tf.stack([tf.math.l2_normalize(gather(t)[0], -1) for t in embedded.target]),
            gather(tf.where(labelled, labels, -1))[0],
            gather(ids)[0],
        )
        num_large = len(embedded.target)
        votes, agreement = pseudo_labels(
            embedded.online[:num_large],
            queue,
            queue_labels,
            queue_ids,
            ids,
            num_classes=training.num_classes,
        )
        start = int(training.num_examples * self.pseudo_label_start_epoch // training.batch_size)
        usable = tf.where(context.step >= start, votes, -1)
        known = tf.where(labelled, labels, usable)
        positives, has_positive = draw_semantic_positives(
            known,
            queue,
            queue_labels,
            queue_ids,
            ids,
            context.draw(SEMANTIC_POSITIVES, num_large, self.num_semantic_positives),
        )
        found = {
            "semantic_positives": positives,
            "has_positive": has_positive,
            "labels": known,
        }
        return found, {
            **vote_metrics(labelled, labels, votes, agreement, gather),
            "queue_fill": tf.reduce_mean(tf.cast(queue_ids >= 0, tf.float32)),
            "semantic_positive_share": tf.reduce_mean(tf.cast(has_positive, tf.float32)),
        }
