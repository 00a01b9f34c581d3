# SPDX-License-Identifier: Apache-2.0
"""The configuration of a training run, with all counts in steps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

from absl import logging

from contrastive.config import augmentation as augmentation_lib, schema
from contrastive.config.augmentation import Augmentation
from contrastive.config.resolve import Resolved

_REFERENCE_BATCH_SIZE = 256  # images


class DataSize(Protocol):
    """The sizes of a training split: images per epoch, and classes or 0."""

    @property
    def num_examples(self) -> int: ...  # noqa: D102
    @property
    def num_classes(self) -> int: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The configuration of a training loop.

    The attributes that are not listed have the names and values of flags; see
    `contrastive.config.schema`.

    Attributes:
        objective: instance of the objective's class, for pretraining.
        views: augmentations, one per view; one view for fine-tuning.
        num_large_views: number of the first views; the others are small.
        copy_target_until: up to this step the target is a copy; -1: never.
        target_update_steps: steps between two updates of the target.
        batch_size: global batch size.
        num_examples: images per epoch.
        num_classes: number of classes; 0 without labels.
        train_steps: optimizer steps in all.
        warmup_steps: steps of linear learning rate warm-up.
        peak_learning_rate: after warm-up, already scaled by the batch size.
        checkpoint_steps: steps between checkpoints; not 0.
        summary_steps: steps between TensorBoard points; 0: none.
        jit_augmentation: whether the augmentation is compiled by XLA where the step is not.
    """

    train_mode: str
    objective: Any
    views: tuple[Augmentation, ...]
    num_large_views: int = 2
    target_decay: float = 1.0
    copy_target_until: int = -1
    target_update_steps: int = 1
    batch_size: int
    accumulate_steps: int = 1
    num_examples: int
    num_classes: int = 0
    train_steps: int
    warmup_steps: int
    peak_learning_rate: float
    learning_rate_schedule: str = "cosine"
    optimizer: str
    lars_variant: str
    momentum: float
    weight_decay: float
    fine_tune_after_block: int
    checkpoint_steps: int
    checkpoint_minutes: float = 0.0
    keep_checkpoint_max: int
    summary_steps: int
    steps_per_loop: int
    jit_compile: bool
    jit_augmentation: bool
    seed: int

    @property
    def pretrains(self) -> bool:
        """Whether the objective is minimized, rather than a classifier's."""
        return self.train_mode == "pretrain"


def make_config(
    resolved: Resolved,
    data: DataSize,
    num_replicas: int,
    *,
    jit_compile: bool = False,
    jit_augmentation: bool = False,
) -> TrainConfig:
    """Returns the configuration of a training run, from completed values.

    Raises:
        ValueError: if the batch does not divide among the replicas.
    """
    pretrains = resolved["train_mode"] == "pretrain"
    batch = resolved.group(schema.Batch)
    length = resolved.group(schema.Length)
    saving = resolved.group(schema.Checkpointing)
    optimizer = resolved.group(schema.Optimizer)
    target = resolved.group(schema.Target)
    size, count = batch.train_batch_size, data.num_examples
    _check_divides(batch, num_replicas)
    train_steps = length.train_steps or num_train_steps(count, length.train_epochs, size)
    warmup_steps = num_warmup_steps(count, optimizer.warmup_epochs, size)
    if pretrains and warmup_steps >= train_steps:
        logging.warning(
            "The warm-up of %d steps is longer than training (%d steps): the "
            "learning rate stays below its peak.",
            warmup_steps,
            train_steps,
        )
    epoch_steps = max(1, round(count / size))
    return TrainConfig(
        train_mode=resolved["train_mode"],
        objective=resolved.objective() if pretrains else None,
        views=make_views(resolved),
        num_large_views=resolved["num_large_views"] if pretrains else 1,
        target_decay=target.target_decay,
        copy_target_until=target.update_gamma_after_step,
        target_update_steps=target.update_gamma_every_n_steps,
        batch_size=size,
        accumulate_steps=batch.accumulate_steps,
        num_examples=count,
        num_classes=data.num_classes,
        train_steps=train_steps,
        warmup_steps=warmup_steps,
        peak_learning_rate=scaled_learning_rate(
            optimizer.learning_rate, size, optimizer.learning_rate_scaling
        ),
        learning_rate_schedule=optimizer.learning_rate_schedule,
        optimizer=optimizer.optimizer,
        **dataclasses.asdict(resolved.group(schema.Regularization)),
        fine_tune_after_block=resolved["fine_tune_after_block"],
        checkpoint_steps=saving.checkpoint_steps or saving.checkpoint_epochs * epoch_steps,
        checkpoint_minutes=saving.checkpoint_minutes,
        keep_checkpoint_max=saving.keep_checkpoint_max,
        summary_steps=saving.train_summary_steps,
        steps_per_loop=saving.steps_per_loop,
        jit_compile=jit_compile,
        jit_augmentation=jit_augmentation,
        seed=resolved["seed"],
    )


def _check_divides(batch: schema.Batch, num_replicas: int) -> None:
    """Raises ValueError unless the batch divides among replicas and parts."""
    size, parts = batch.train_batch_size, batch.accumulate_steps
    if size % (num_replicas * parts):
        raise ValueError(
            f"--train_batch_size={size} does not divide among "
            f"{num_replicas} replicas" + (f" and --accumulate_steps={parts}." if parts > 1 else ".")
        )


def make_views(resolved: Resolved) -> tuple[Augmentation, ...]:
    """Returns the augmentation of each view; the large views come first."""
    size = resolved["image_size"]
    if resolved["train_mode"] == "finetune":
        # Crop and flip alone, as SimCLR and BYOL do.
        names = ("jitter", "grayscale", "blur")
        none: dict[str, Any] = {f"{name}_probability": 0.0 for name in names}
        return (augmentation_lib.simclr_augmentation(size, **none),)
    views = resolved.group(schema.Views)
    backgrounds = resolved.group(schema.Backgrounds)
    asked = dataclasses.asdict(resolved.group(schema.AugmentationOverrides))
    overrides = {k: v for k, v in asked.items() if v is not None}
    if views.sym_aug:
        # Between BYOL's two views, which are equally accurate (its table 17).
        symmetric = {"blur_probability": 0.5, "solarize_probability": 0.2}
        overrides = symmetric | overrides
    large = {
        "mask_probability": backgrounds.mask_probability,
        "mask_fill": backgrounds.mask_fill,
    } | overrides
    small = overrides | {
        "crop_area": views.small_crop_area,
        "crop_min_covered": 0.0,
    }
    many = range(views.num_large_views), range(views.num_small_views)
    return (
        *(_make_view(views, size, i % 2, large) for i in many[0]),
        *(_make_view(views, views.small_image_size, 1, small, is_small=True) for _ in many[1]),
    )


def _make_view(
    views: schema.Views,
    size: int,
    side: int,
    overrides: dict[str, Any],
    is_small: bool = False,
) -> Augmentation:
    """Returns the augmentation of a view; `side` is 0 or 1 in turn."""
    if views.augmentation == "byol":
        return augmentation_lib.byol_augmentation(size, view=side, **overrides)
    if views.augmentation == "relic_pytorch":
        return augmentation_lib.relic_pytorch_augmentation(size, solarize=not is_small, **overrides)
    return augmentation_lib.simclr_augmentation(
        size,
        strength=views.color_jitter_strength,
        use_blur=views.use_blur,
        **overrides,
    )


def scaled_learning_rate(base: float, batch_size: int, scaling: str = "linear") -> float:
    """Returns the peak learning rate for a batch size.

    Source: Goyal et al., arXiv:1706.02677 (linear); google-research/simclr, tf2/model.py (both).
    Note that sqrt counts images, not batches of 256.

    `scaling` is "linear" (`base * batch_size / 256`), "sqrt"
    (`base * sqrt(batch_size)`) or "none" (`base`), with a global batch size in images.

    Raises:
        ValueError: if `scaling` is unknown.
    """
    factors = {
        "linear": batch_size / _REFERENCE_BATCH_SIZE,
        "sqrt": math.sqrt(batch_size),
        "none": 1.0,
    }
    if scaling not in factors:
        raise ValueError(f"`scaling` must be one of {tuple(factors)}. Received: {scaling!r}.")
    return base * factors[scaling]


def num_train_steps(num_examples: int, epochs: int, batch_size: int) -> int:
    """Returns SimCLR's number of training steps: the whole batches plus one."""
    return num_examples * epochs // batch_size + 1


def num_warmup_steps(num_examples: int, epochs: float, batch_size: int) -> int:
    """Returns the number of whole batches in some epochs."""
    return int(num_examples * epochs // batch_size)
