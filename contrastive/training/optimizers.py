# SPDX-License-Identifier: Apache-2.0
"""Optimizers of the networks, the classifier and the objective's state."""

import functools
from typing import NamedTuple

import keras
import tensorflow as tf

import lars_optimizer
from contrastive.training import schedules
from contrastive.training.config import TrainConfig

_OBJECTIVE_RATE = 1e-3


class Optimizers(NamedTuple):
    """One optimizer each for the networks, the classifier and the objective.

    The classifier has its own so that LARS's rules (decay and trust ratio by rank) need no
    exception by name: SimCLR trains its head without either. The objective's variables, such as a
    trained temperature, are scalars, for which a learning rate that grows with the batch would be
    too high: they have Adam.
    """

    networks: keras.optimizers.Optimizer
    classifier: keras.optimizers.Optimizer
    objective: keras.optimizers.Optimizer | None


def learning_rate_schedule(config: TrainConfig) -> schedules.WarmupCosine:
    """Returns the learning rate as a function of the step, from 0."""
    return schedules.WarmupCosine(
        config.peak_learning_rate,
        config.warmup_steps,
        # Training may end within the warm-up, as in a trial of a few steps.
        max(config.train_steps, config.warmup_steps),
        decay=config.learning_rate_schedule == "cosine",
    )


def build_optimizers(
    config: TrainConfig,
    networks: list[tf.Variable],
    classifier: list[tf.Variable],
    objective: list[tf.Variable],
) -> Optimizers:
    """Returns the optimizers of three lists of variables, with their own.

    To be called in the scope of the strategy.

    Raises:
        ValueError: if the optimizer is unknown.
    """
    schedule = learning_rate_schedule(config)

    sgd = functools.partial(keras.optimizers.SGD, schedule, momentum=config.momentum)
    adam = functools.partial(keras.optimizers.Adam, schedule)
    lars = functools.partial(
        lars_optimizer.LARS,
        schedule,
        momentum=config.momentum,
        l2=config.weight_decay,
        variant=config.lars_variant,
    )
    nesterov = functools.partial(sgd, nesterov=True)
    pairs = {
        "lars": (lars, sgd),
        "momentum": (nesterov, nesterov),
        "adam": (adam, adam),
    }
    if config.optimizer not in pairs:
        raise ValueError(
            f"`optimizer` must be one of {', '.join(pairs)}. Received: {config.optimizer!r}."
        )
    of_objective = None
    if objective:
        of_objective = keras.optimizers.Adam(_OBJECTIVE_RATE)
        of_objective.build(objective)
    of_networks, of_classifier = pairs[config.optimizer]
    made = Optimizers(of_networks(), of_classifier(), of_objective)
    made.networks.build(networks)
    made.classifier.build(classifier)
    return made


def decay_loss(config: TrainConfig, variables: list[tf.Variable]) -> tf.Tensor:
    """Returns the L2 loss of kernels; BatchNorm and biases are spared."""
    kernels = [v for v in variables if len(v.shape) > 1]
    if not config.weight_decay or not kernels:
        return tf.zeros([])
    return config.weight_decay * tf.add_n([tf.nn.l2_loss(v) for v in kernels])
