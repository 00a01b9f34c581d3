# SPDX-License-Identifier: Apache-2.0
"""Derivation of the values that depend on the training data."""

from __future__ import annotations

from typing import Protocol

from contrastive.config import schema
from contrastive.config.fields import fields_of
from contrastive.config.resolve import Resolved

LARGEST_SMALL_IMAGE = 32  # pixels; up to here CIFAR's stem, and no crop
IMAGENET_SIZE = 224  # pixels
_IMAGENET_CROP_PROPORTION = 0.875


class DataFacts(Protocol):
    """The attributes of the training data that the configuration reads.

    As those of `data.Dataset`; the height and width are None if they vary.
    """

    @property
    def num_classes(self) -> int: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def image_size(self) -> tuple[int, int] | None: ...  # noqa: D102


def complete(resolved: Resolved, data: DataFacts) -> Resolved:
    """Derives the values that depend on the training split `data`.

    Raises:
        ValueError: if values do not suit the data.
    """
    size, mode = data.image_size, resolved["mode"]
    trains = mode in ("train", "train_then_eval", "selftest", "check_tpu")
    resolved = resolved.derived(image_size=min(size) if size else IMAGENET_SIZE)
    image_size = resolved["image_size"]
    if trains and size and image_size > min(size):
        raise ValueError(
            f"--image_size={image_size} exceeds the images of "
            f"{resolved['dataset']}, which are {size[0]}x{size[1]}."
        )
    origin = resolved.origins["channels"]
    resolved = resolved.replace(origin, channels=data.channels)
    if resolved["normalize"] == "imagenet" and data.channels != 3:
        raise ValueError(
            f"--normalize=imagenet is for 3 channels. Received images of {data.channels}."
        )
    is_small = image_size <= LARGEST_SMALL_IMAGE
    resolved = resolved.derived(stem="cifar" if is_small else "imagenet")
    if resolved["train_mode"] == "pretrain":
        resolved = _objective_completed(resolved, is_small)
        name = resolved["objective"]
        uses_labels = resolved.objective_type.uses_labels
        needs = f"--objective={name} needs some labels"
    else:
        uses_labels, needs = trains, "Fine-tuning needs labels"
    if uses_labels and not data.num_classes:
        where = f"{resolved['dataset']} {resolved['train_split']}"
        raise ValueError(f"{needs}; {where} has none.")
    return resolved


def _objective_completed(resolved: Resolved, is_small: bool) -> Resolved:
    """Derives the values of views and of the objective."""
    if is_small:
        resolved = _small_images_applied(resolved)
    # ReLICv2's 96 of 224; a small image would lose too much.
    share = 1 / 2 if is_small else 96 / 224
    small = int(resolved["image_size"] * share)
    resolved = resolved.derived(small_image_size=small)
    found = resolved.objective_type.derive(resolved.values)
    resolved = resolved.derived(**found)
    resolved.objective_type.check(resolved.values)
    return resolved


def _small_images_applied(resolved: Resolved) -> Resolved:
    """Takes the objective's values for small images unless others are asked."""
    cls, kept = resolved.objective_type, set()
    if not resolved["target_network"]:
        kept.update(cls.without_target)
    # An augmentation that is asked for is taken as it is.
    if resolved["sym_aug"] or not resolved.is_default("augmentation"):
        kept.update(fields_of(schema.AugmentationOverrides))
    values = {
        name: value
        for name, value in cls.small_images.items()
        if resolved.is_default(name) and name not in kept
    }
    origin = f"{resolved['objective']}, small images"
    return resolved.replace(origin, **values)


def eval_crop(image_size: int) -> float | None:
    """Returns the central share of an image that evaluation uses; None: all."""
    is_small = image_size <= LARGEST_SMALL_IMAGE
    return None if is_small else _IMAGENET_CROP_PROPORTION
