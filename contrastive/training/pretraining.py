# SPDX-License-Identifier: Apache-2.0
"""The pretraining step: views, embeddings, the objective, the update."""

import functools

import tensorflow as tf

import data_util
import model
from contrastive.objectives.base import Embedded, Gather, Metrics, StepContext
from contrastive.training import gradient_cache, schedules
from contrastive.training.config import TrainConfig
from contrastive.training.finetuning import classification
from contrastive.training.optimizers import decay_loss
from contrastive.training.replicas import (
    ReplicaGather,
    apply_gradients,
    replica_share,
)
from contrastive.training.state import TrainState
from contrastive.training.views import Batch, Step, ViewMaker


def pretraining_step(config: TrainConfig, state: TrainState, make_views: ViewMaker) -> Step:
    """Returns the step that minimizes the objective, for every replica.

    The step updates the variables of `state`.
    """
    networks = state.networks
    groups = state.trained_variables(config)
    trained = list(groups.values())

    def embed(batch: Batch, with_target: bool) -> Embedded:
        forward = functools.partial(_forward, config, networks, with_target)
        return config.objective.embed(forward, make_views(batch))

    loss = functools.partial(_loss, config, state, groups)

    def gradients(batch: Batch) -> tuple[list[list[tf.Tensor]], Metrics]:
        if config.accumulate_steps > 1:
            return gradient_cache.gradients(
                embed,
                loss,
                batch,
                trained,
                has_target=networks.has_target,
                count=config.accumulate_steps,
            )
        with tf.GradientTape() as tape:
            value, metrics = loss(batch, embed(batch, networks.has_target))
            share = replica_share(value)
        return tape.gradient(share, trained), metrics

    def step(batch: Batch) -> Metrics:
        found, metrics = gradients(batch)
        done = tf.identity(state.optimizers.networks.iterations)
        apply_gradients(state.optimizers, trained, found)
        if networks.has_target:
            metrics["target_decay"] = schedules.ema_decay(
                done,
                config.train_steps,
                config.target_decay,
                copy_until=config.copy_target_until,
                every=config.target_update_steps,
            )
            networks.update_target(metrics["target_decay"])
        return metrics

    return step


def _loss(
    config: TrainConfig,
    state: TrainState,
    groups: dict[str, list[tf.Variable]],
    batch: Batch,
    embedded: Embedded,
) -> tuple[tf.Tensor, Metrics]:
    """Returns the minimized loss and the metrics."""
    gather, classifier = ReplicaGather(), state.networks.classifier
    value, metrics = config.objective(embedded, _context(config, state, batch, gather))
    metrics["contrastive_loss"] = value
    value = embedded.penalty + value
    if config.optimizer != "lars":
        value += decay_loss(config, groups["networks"])
    metrics["loss"] = value
    if classifier:
        labels = tf.tile(batch["label"], [config.num_large_views])
        logits = classifier(tf.stop_gradient(embedded.features))
        probe = classification(logits, labels, gather)
        metrics |= {f"probe_{k}": v for k, v in probe.items()}
        value += probe["loss"] + decay_loss(config, groups["classifier"])
    return value, metrics


def _forward(
    config: TrainConfig,
    networks: model.Networks,
    with_target: bool,
    views: list[tf.Tensor],
) -> Embedded:
    """Returns embeddings of views; without the target's, online ones instead.

    One forward pass per size, so that BatchNorm's statistics cover all views of that size.
    """
    num_large = config.num_large_views
    large, small = tf.concat(views[:num_large], 0), views[num_large:]
    embedding, layers = networks.embeddings(large)
    online = target = tf.split(embedding, num_large)
    if with_target:
        target = tf.split(networks.target_embeddings(large), num_large)
    if small:
        embedding, _ = networks.embeddings(tf.concat(small, 0))
        online = online + tf.split(embedding, len(small))
    features = layers[networks.architecture.ft_proj_selector]
    return Embedded(online, target, features, tf.zeros([]))


def _context(config: TrainConfig, state: TrainState, batch: Batch, gather: Gather) -> StepContext:
    training = state.training
    if training is None:
        raise ValueError("This state was made for fine-tuning.")

    def draw(use: int, groups: int, count: int) -> tf.Tensor:
        keys = data_util.example_keys(config.seed, batch["epoch"], batch["id"], use)
        numbers = tf.reshape(tf.range(groups * count), [groups, 1, count])
        return data_util.uniform(keys[:, tf.newaxis], numbers)

    return StepContext(
        batch=batch,
        gather=gather,
        step=tf.cast(state.optimizers.networks.iterations, tf.int64),
        state=state.objective_state,
        training=training,
        draw=draw,
    )
