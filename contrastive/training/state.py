# SPDX-License-Identifier: Apache-2.0
"""The state of a training run: all that changes, and all that is saved."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import model
import resnet
from contrastive.objectives.base import Training
from contrastive.training import checkpoints
from contrastive.training.config import TrainConfig
from contrastive.training.optimizers import Optimizers, build_optimizers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Networks, optimizers, the objective's variables and the step.

    Attributes:
        networks: the networks.
        optimizers: their optimizers, with all their variables.
        training: facts of the run that the objective receives; None in fine-tuning.
        objective_state: of `Objective.build_state`; None if it keeps nothing.
        step: int64 variable, optimizer steps done.
    """

    networks: model.Networks
    optimizers: Optimizers
    training: Training | None
    objective_state: keras.layers.Layer | None
    step: tf.Variable

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        networks: model.Networks,
        *,
        labelled: np.ndarray | None = None,
    ) -> TrainState:
        """Returns the state at the start of training.

        To be called in the scope of the strategy. Freezes what `fine_tune_after_block` says,
        statistics included.

        Args:
            config: the run.
            networks: with the weights that training starts from, or with those that `restore`
                replaces.
            labelled: see `Training`.
        """
        training, state = None, None
        if config.pretrains:
            training = Training(
                batch_size=config.batch_size,
                num_examples=config.num_examples,
                num_classes=config.num_classes,
                labelled=labelled,
                num_large_views=config.num_large_views,
                embedding_dim=networks.embedding_dim,
            )
            state = config.objective.build_state(training)
        if config.fine_tune_after_block >= 0:
            resnet.freeze(networks.encoder, config.fine_tune_after_block)
        if not config.pretrains and config.fine_tune_after_block == 4:
            networks.projection_to_classifier.trainable = False
        optimizers = build_optimizers(config, *_trained_variables(config, networks, state))
        step = tf.Variable(0, dtype=tf.int64, name="step")
        return cls(
            networks=networks,
            optimizers=optimizers,
            training=training,
            objective_state=state,
            step=step,
        )

    def trained_variables(self, config: TrainConfig) -> dict[str, list[tf.Variable]]:
        """Returns the variables of each of `Optimizers`, by its name."""
        groups = _trained_variables(config, self.networks, self.objective_state)
        return dict(zip(Optimizers._fields, groups, strict=True))

    def layers(self) -> dict[str, keras.layers.Layer]:
        """Returns all that has variables but the optimizers, by name."""
        found = dict(self.networks.models())
        if self.objective_state is not None:
            found["objective_state"] = self.objective_state
        return found

    def saved_objects(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, by its name there."""
        return {
            "step": self.step,
            "optimizer": self.optimizers.networks,
            "classifier_optimizer": self.optimizers.classifier,
            "objective_optimizer": self.optimizers.objective,
            **self.layers(),
        }

    def manager(
        self, directory: str, *, max_to_keep: int, saves: bool = True
    ) -> checkpoints.TrainingCheckpoints:
        """Returns the checkpoints of a directory, to save and restore this.

        `saves` says whether this process writes.
        """
        return checkpoints.TrainingCheckpoints(
            directory,
            max_to_keep=max_to_keep,
            saves=saves,
            **self.saved_objects(),
        )


def _trained_variables(
    config: TrainConfig,
    networks: model.Networks,
    state: keras.layers.Layer | None,
) -> tuple[list[tf.Variable], list[tf.Variable], list[tf.Variable]]:
    """Returns the variables of each of `Optimizers`."""
    parts: list[keras.layers.Layer | None]
    if config.pretrains:
        parts = [networks.encoder, networks.projection, networks.prediction]
    else:
        parts = [networks.encoder, networks.projection_to_classifier]
    classifier = networks.classifier
    return (
        [v for part in parts if part for v in part.trainable_variables],
        classifier.trainable_variables if classifier else [],
        state.trainable_variables if state is not None else [],
    )
