# SPDX-License-Identifier: Apache-2.0
"""From the values of the flags to networks with fresh weights."""

from __future__ import annotations

import dataclasses

from etils import epy

import model
from contrastive.config import schema
from contrastive.config.resolve import Resolved

with epy.lazy_imports():
    import keras
    import tensorflow as tf


def make_architecture(resolved: Resolved, num_classes: int) -> model.Architecture:
    """Returns the architecture that completed values describe.

    `num_classes` is the number of the training data's; 0 without labels.
    """
    finetune = resolved["train_mode"] == "finetune"
    heads = resolved.group(schema.Heads)
    if finetune and heads.ft_proj_selector == 0:
        heads = dataclasses.replace(heads, proj_head_mode="none")
    has_classifier = finetune or resolved["lineareval_while_pretraining"]
    normalize = resolved["normalize"] == "imagenet"
    return model.Architecture(
        **dataclasses.asdict(resolved.group(schema.Encoder)),
        **dataclasses.asdict(resolved.group(schema.ResNet)),
        **dataclasses.asdict(heads),
        channels=resolved["channels"],
        image_mean=model.IMAGENET_MEAN if normalize else (),
        image_std=model.IMAGENET_STD if normalize else (),
        target_network=resolved["target_network"],
        target_bn=resolved["target_bn"],
        num_classes=num_classes if has_classifier else 0,
    )


def build_networks(
    resolved: Resolved,
    architecture: model.Architecture,
    strategy: tf.distribute.Strategy,
) -> model.Networks:
    """Returns networks with fresh weights, made in the strategy's scope."""
    pretrains = resolved["train_mode"] == "pretrain"

    def build() -> model.Networks:
        # The same weights whatever was built before, as in a sweep.
        keras.utils.set_random_seed(resolved["seed"])
        return model.build_networks(
            architecture,
            rematerialize=resolved["remat"],
            differentiable_twice=pretrains and resolved.objective_type.differentiates_twice,
        )

    with strategy.scope():
        networks = build()
    if isinstance(strategy, tf.distribute.TPUStrategy):
        # A TPU draws other random numbers than a CPU from the same seed.
        with tf.device("CPU:0"):
            drawn = build().models()
        for name, network in networks.models().items():
            network.set_weights(drawn[name].get_weights())
    return networks


def architecture_flags(architecture: model.Architecture) -> dict[str, object]:
    """Returns the flags that make an encoder like another program's."""
    names = (
        "encoder", "resnet_depth", "width_multiplier", "stem", "padding",
        "shortcuts", "preactivation", "base_filters", "sk_ratio", "se_ratio",
        "channels",
    )  # fmt: skip
    return {name: getattr(architecture, name) for name in names} | {
        "normalize": "imagenet" if architecture.image_mean else "none"
    }
