# SPDX-License-Identifier: Apache-2.0
"""From a batch to its augmented views."""

import dataclasses
from collections.abc import Callable, Mapping

import tensorflow as tf

import data_util
from contrastive.config.augmentation import Augmentation
from contrastive.objectives.base import Metrics
from contrastive.sources import masks
from contrastive.training.config import TrainConfig

Batch = Mapping[str, tf.Tensor]
ViewMaker = Callable[[Batch], list[tf.Tensor]]
Step = Callable[[Batch], Metrics]


def make_views(
    batch: Batch,
    augmentations: tuple[Augmentation, ...],
    seed: int,
    augment: Callable[..., tf.Tensor] = data_util.augment,
) -> list[tf.Tensor]:
    """Returns the augmented views of every image.

    Args:
        batch: of `data.train_stream`: `id` int64 `[b]`, `epoch` int32 `[b]`, and `image` uint8 `[b,
            h, w, c]`, or, where the host has cropped already, `crops`, uint8 `[b, views, s, s, c]`
            or one `[b, s, s, c]` per view; with images, `mask`, uint8 `[b, h, w]`, if an
            augmentation has a `mask_probability`.
        augmentations: one per view.
        seed: seed of all draws.
        augment: `data_util.augment`, possibly compiled.

    Returns:
        List of float32 `[b, size, size, c]` in [0, 1].
    """
    views = []
    for index, augmentation in enumerate(augmentations):
        keys = data_util.example_keys(seed, batch["epoch"], batch["id"], index)
        if "image" in batch:
            images = batch["image"]
            if augmentation.mask_probability:
                images = masks.remove_background(images, batch["mask"], keys, augmentation)
        else:
            crops = batch["crops"]
            same_size = not isinstance(crops, tuple)
            images = crops[:, index] if same_size else crops[index]
            augmentation = dataclasses.replace(augmentation, crop=False)
        views.append(augment(images, keys, augmentation))
    return views


def view_maker(config: TrainConfig) -> ViewMaker:
    """Returns `make_views` for a run, compiled by XLA if it is asked for."""
    augment = data_util.augment
    if config.jit_augmentation and not config.jit_compile:
        augment = tf.function(augment, jit_compile=True)
    return lambda batch: make_views(batch, config.views, config.seed, augment)
