# SPDX-License-Identifier: Apache-2.0
"""The protocol of objectives: what the training step asks of them.

An objective is a frozen dataclass of hyperparameters. Each hyperparameter is declared by `field`,
from which its flag is made. To add one: a new file beside this one with the loss and the dataclass,
and a line in `objective.OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

from etils import epy

from contrastive.config.fields import Values

with epy.lazy_imports():
    import keras
    import numpy as np
    import tensorflow as tf

Metrics = dict[str, "tf.Tensor"]
# Maps a tensor of this replica's rows `[b, ...]` to those of all replicas, `[B, ...]`, and the
# global index of this replica's first row.
Gather = Callable[["tf.Tensor"], tuple["tf.Tensor", "tf.Tensor"]]


class Embedded(NamedTuple):
    """The embeddings of a replica's batch.

    Attributes:
        online: float `[b, d]` per view, the large views first.
        target: float `[b, d]` per large view, of the target network; without one, those of
            `online`.
        features: float `[nL b, f]`, input of the classifier, large views only.
        penalty: float32 scalar, a part of the loss that needs the views.
    """

    online: list[tf.Tensor]
    target: list[tf.Tensor]
    features: tf.Tensor
    penalty: tf.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The facts of a training run that an objective may need.

    Attributes:
        batch_size: global batch size.
        num_examples: images per epoch.
        num_classes: number of classes; 0 without labels.
        labelled: bool `[num_examples]`, True for images whose labels may be used; None: all that
            have one.
        num_large_views: number of large views.
        embedding_dim: size of an embedding.
    """

    batch_size: int
    num_examples: int
    num_classes: int
    labelled: np.ndarray | None
    num_large_views: int
    embedding_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """The surroundings of an objective in one training step on one replica.

    Attributes:
        batch: `id` int64 `[b]`, `epoch` int32 `[b]`, `label` int32 `[b]`, -1 where there is none,
            and the images.
        gather: see `Gather`; a tensor is exchanged only once per step.
        step: int64 scalar, optimizer steps done so far.
        state: layer of `Objective.build_state`; None if it keeps nothing.
        training: facts of the run.
        draw: `draw(use, groups, count)` returns float32 `[groups, b, count]` in [0, 1): random
            numbers that depend on the seed, the epoch, the example and `use`, and not on the
            replica.
    """

    batch: Mapping[str, tf.Tensor]
    gather: Gather
    step: tf.Tensor
    state: Any
    training: Training
    draw: Callable[[int, int, int], tf.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective of pretraining with its hyperparameters.

    Attributes:
        multi_view: whether it takes any number of views and a target network; otherwise two large
            views.
        uses_labels: whether it uses labels.
        differentiates_twice: whether its loss contains gradients.
        loss_scale: size of the loss before training, relative to that of a cross-entropy; the
            self-test divides its learning rate by it.
        defaults: values of other flags (networks, views, optimizer) by name.
        small_images: values that replace those of `defaults`, and of its own fields, for images of
            up to 32 pixels.
        without_target: values that replace both without a target network.
        synonyms: other names of common flags under this objective.
    """

    multi_view: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = False
    differentiates_twice: ClassVar[bool] = False
    loss_scale: ClassVar[float] = 1.0
    defaults: ClassVar[Values] = {}
    small_images: ClassVar[Values] = {}
    without_target: ClassVar[Values] = {}
    synonyms: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def derive(cls, values: Values) -> Values:
        """Returns the fields whose default is derived from other values."""
        del values
        return {}

    @classmethod
    def check(cls, values: Values) -> None:
        """Raises ValueError if values of other flags do not suit it."""

    def build_state(self, training: Training) -> keras.layers.Layer | None:
        """Returns variables that are kept beside the networks, or None.

        They are checkpointed and replicated; trainable ones are trained by Adam. To be called in
        the scope of the strategy.
        """
        del training
        return None

    def state_bytes(self, training: Training) -> int:
        """Computes the size of the state and of its optimizer, in bytes.

        An objective that keeps a state overrides this beside `build_state`: a dry run prints it
        without TensorFlow.
        """
        del training
        return 0

    def embed(
        self,
        forward: Callable[[list[tf.Tensor]], Embedded],
        views: list[tf.Tensor],
    ) -> Embedded:
        """Returns the embeddings of views, float32 `[b, s, s, c]` each."""
        return forward(views)

    def __call__(self, embedded: Embedded, context: StepContext) -> tuple[tf.Tensor, Metrics]:
        """Returns the loss, a mean over this replica's rows, and metrics."""
        raise NotImplementedError


# What random draws of an example are used for; views are numbered from 0.
NEGATIVES, SEMANTIC_POSITIVES = 1 << 16, (1 << 16) + 1
