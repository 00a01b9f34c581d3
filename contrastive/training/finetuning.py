# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning step: a classifier on an encoder, frozen as far as asked."""

import tensorflow as tf

from contrastive.evaluation.classifier import in_top
from contrastive.objectives.base import Gather, Metrics
from contrastive.training.config import TrainConfig
from contrastive.training.optimizers import decay_loss
from contrastive.training.replicas import (
    ReplicaGather,
    apply_gradients,
    replica_share,
)
from contrastive.training.state import TrainState
from contrastive.training.views import Batch, Step, ViewMaker


def finetuning_step(config: TrainConfig, state: TrainState, make_views: ViewMaker) -> Step:
    """Returns the step that trains the classifier, for every replica.

    `make_views` makes one view; the step updates the variables of `state`.
    """
    groups = state.trained_variables(config)
    trained = list(groups.values())
    decayed = groups["classifier"]
    if config.optimizer != "lars":  # which decays what it trains by itself
        decayed = groups["networks"] + decayed

    def step(batch: Batch) -> Metrics:
        (images,) = make_views(batch)
        with tf.GradientTape() as tape:
            logits = state.networks.logits(images, training=True)
            metrics = classification(logits, batch["label"], ReplicaGather())
            loss = metrics["loss"] + decay_loss(config, decayed)
            share = replica_share(loss)
        gradients = tape.gradient(share, trained)
        apply_gradients(state.optimizers, trained, gradients)
        return metrics | {"loss": loss}

    return step


def classification(logits: tf.Tensor, labels: tf.Tensor, gather: Gather) -> Metrics:
    """Returns the mean cross-entropy and top-1/top-5 accuracy.

    Rows without a label (-1) are ignored.

    Args:
        logits: float32 `[b, classes]`.
        labels: int32 `[b]`.
        gather: see `contrastive.objectives.base.Gather`.
    """
    weight = tf.cast(labels >= 0, tf.float32)
    loss = weight * tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
    # A mean over replicas of each one's own share would depend on how labelled rows are spread over
    # them; of the loss, it is the mean over all rows.
    labelled = tf.reduce_mean(gather(tf.reduce_sum(weight)[tf.newaxis])[0])
    labelled = tf.maximum(labelled, 1e-6)
    return {"loss": tf.reduce_mean(loss)} | {
        f"top_{k}_accuracy": tf.reduce_sum(weight * in_top(k, logits, labels)) / labelled
        for k in (1, 5)
    }
