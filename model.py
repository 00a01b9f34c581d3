# SPDX-License-Identifier: Apache-2.0
"""The networks: an encoder with its heads and target network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

from etils import epy

from contrastive.encoders import architecture as encoders
from contrastive.encoders.architecture import Architecture

with epy.lazy_imports():
    import keras
    import tensorflow as tf

    import resnet
    from contrastive.encoders import heads, keras_backbones, remat

# Published encoders expect images in [0, 1] to be normalised by these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks of a run.

    Heads map to the list of the outputs of all their layers.

    Attributes:
        architecture: the description that they were built from.
        encoder: normalised images to features.
        projection: features to projections.
        projection_to_classifier: the part of `projection` from the features to the input of the
            classifier; it shares variables with `projection`.
        prediction: projections to predictions; None if there is no predictor.
        target_encoder: moving average of `encoder`, with BatchNorm statistics of its own; None if
            there is no target network.
        target_projection: moving average of `projection`; or None.
        classifier: features to logits; None if there are no classes.
        rematerialized_encoder: `encoder` for training in less memory, see `remat.rematerialized`;
            or None.
    """

    architecture: Architecture
    encoder: keras.Model
    projection: keras.Model
    projection_to_classifier: keras.Model
    prediction: keras.Model | None = None
    target_encoder: keras.Model | None = None
    target_projection: keras.Model | None = None
    classifier: keras.Model | None = None
    rematerialized_encoder: Callable[[tf.Tensor, bool], tf.Tensor] | None = None

    def features(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Computes features `[n, d]` of float32 `[n, h, w, c]` in [0, 1]."""
        images = self._normalized(images)
        if self.rematerialized_encoder and training:
            return self.rematerialized_encoder(images, training)
        return self.encoder(images, training=training)

    def embeddings(self, images: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Computes the embeddings of images as in `features`, in training.

        Returns:
            Predictions, or else projections, float32 `[n, d]`;
            and the list of the outputs of the projection's layers.
        """
        features = self.features(images, training=True)
        layers = self.projection(features, training=True)
        if self.prediction:
            return self.prediction(layers[-1], training=True)[-1], layers
        return layers[-1], layers

    def target_embeddings(self, images: tf.Tensor) -> tf.Tensor:
        """Computes projections `[n, d]` of the target, without a gradient.

        BatchNorm is in training mode, as in BYOL's code, unless `target_bn` is "average". Raises
        `ValueError` if there is no target network.
        """
        if self.target_encoder is None or self.target_projection is None:
            raise ValueError("There is no target network.")
        training = self.architecture.target_bn == "batch"
        images = self._normalized(images)
        features = self.target_encoder(images, training=training)
        projection = self.target_projection(features, training=training)[-1]
        return tf.stop_gradient(projection)

    @property
    def embedding_dim(self) -> int:
        """Size of an embedding."""
        return self.projection.outputs[-1].shape[-1]

    @property
    def has_target(self) -> bool:
        """Whether there is a target network."""
        return self.target_encoder is not None

    def reset_target(self) -> None:
        """Copies the online networks to the target, if there is one."""
        for target, online in self._targets():
            target.set_weights(online.get_weights())

    def update_target(self, decay: tf.Tensor) -> None:
        """Moves the target's weights to `decay * target + (1 - decay) * w`."""
        moves_all = self.architecture.target_bn == "average"
        which = "variables" if moves_all else "trainable_variables"
        for models in self._targets():
            variables = (getattr(network, which) for network in models)
            for target, online in zip(*variables, strict=True):
                target.assign(decay * target + (1.0 - decay) * online)

    def _targets(self) -> list[tuple[keras.Model, keras.Model]]:
        """Pairs each target network with its online network."""
        targets = self.target_encoder, self.target_projection
        pairs = zip(targets, (self.encoder, self.projection), strict=True)
        return list(pairs) if self.has_target else []

    def logits(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Computes logits `[n, num_classes]` of images as in `features`.

        Raises `ValueError` if there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("There are no classes. Received: num_classes=0.")
        x = self.features(images, training)
        x = self.projection_to_classifier(x, training=training)
        return self.classifier(x)

    def models(self) -> dict[str, keras.layers.Layer]:
        """Collects the networks that exist, by their names in a checkpoint."""
        names = (
            "encoder", "projection", "prediction", "target_encoder",
            "target_projection", "classifier",
        )  # fmt: skip
        networks = {name: getattr(self, name) for name in names}
        return {name: x for name, x in networks.items() if x is not None}

    def _normalized(self, images: tf.Tensor) -> tf.Tensor:
        if size := min(filter(None, images.shape[1:3]), default=None):
            encoders.check_image_size(self.architecture.encoder, size)
        if self.architecture.image_mean:
            images = images - tf.constant(self.architecture.image_mean)
        if self.architecture.image_std:
            images = images / tf.constant(self.architecture.image_std)
        return images


def build_networks(
    architecture: Architecture,
    *,
    rematerialize: bool = False,
    differentiable_twice: bool = False,
) -> Networks:
    """Builds networks with random weights; the target copies the online ones.

    With `rematerialize`, the backward pass computes the activations of the encoder's blocks again
    instead of keeping them. `differentiable_twice` is for a loss that contains gradients, as WPC's.

    Raises:
        ValueError: if a field of `architecture` is out of its range, or `rematerialize` is given
            for an encoder without blocks.
    """
    encoder = build_encoder(architecture, differentiable_twice=differentiable_twice)
    features, out_dim = encoder.output_shape[-1], architecture.proj_out_dim
    head = architecture.proj_head_mode
    build_head = functools.partial(_build_head, architecture)
    projection = build_head(head, features, out_dim)
    layers, selector = projection.outputs, architecture.ft_proj_selector
    if not -len(layers) <= selector < len(layers):
        raise ValueError(
            f"`ft_proj_selector` must be in -1..{len(layers) - 1} for this "
            f"projection head. Received: {selector}."
        )
    parts: dict[str, Any] = {}
    if architecture.predictor:
        size = layers[-1].shape[-1]
        parts["prediction"] = build_head("mlp", size, size, "prediction")
    if architecture.target_network:
        parts["target_encoder"] = build_encoder(architecture)
        parts["target_projection"] = build_head(head, features, out_dim)
    if architecture.num_classes:
        parts["classifier"] = heads.classifier_head(
            input_dim=layers[selector].shape[-1],
            num_classes=architecture.num_classes,
            zero_init=architecture.zero_init_logits_layer,
        )
    if rematerialize:
        parts["rematerialized_encoder"] = remat.rematerialized(encoder)
    networks = Networks(
        architecture=architecture,
        encoder=encoder,
        projection=projection,
        projection_to_classifier=keras.Model(
            projection.input, layers[selector], name="projection_to_classifier"
        ),
        **parts,
    )
    networks.reset_target()
    return networks


def _build_head(
    architecture: Architecture,
    mode: str,
    input_dim: int,
    out_dim: int,
    name: str = "projection",
) -> keras.Model:
    options = _batch_norm(architecture) | {"name": name}
    options |= {"input_dim": input_dim, "out_dim": out_dim}
    if mode != "mlp":
        num_layers = architecture.num_proj_layers
        return heads.projection_head(mode, num_layers=num_layers, **options)
    dims, norm = architecture.proj_hidden_dim, architecture.proj_bn
    return heads.mlp_head(hidden_dims=dims, norm=norm, **options)


def _batch_norm(architecture: Architecture) -> dict[str, Any]:
    return {
        "global_bn": architecture.global_bn,
        "batch_norm_momentum": architecture.batch_norm_decay,
    }


class EncoderBuilder(Protocol):
    """A function that builds an encoder with random weights.

    The model maps float32 images `[N, H, W, channels]`, which have been normalised, to float32
    features `[N, D]`. Its BatchNorm layers are `resnet.GlobalBatchNorm`, and the paths of its
    variables are unique and do not depend on what was built before. With `differentiable_twice`,
    XLA must be able to compile gradients of gradients.
    """

    def __call__(
        self, architecture: Architecture, *, differentiable_twice: bool = False
    ) -> keras.Model:
        """Builds an encoder; raises `ValueError` for a field out of range."""


_RESNET_FIELDS = (
    "width_multiplier", "stem", "padding", "shortcuts", "preactivation",
    "base_filters", "sk_ratio", "se_ratio", "zero_init_residual",
)  # fmt: skip


def _resnet(architecture: Architecture, **options: Any) -> keras.Model:
    fields = {name: getattr(architecture, name) for name in _RESNET_FIELDS}
    fields |= {"channels": architecture.channels, **_batch_norm(architecture)}
    return resnet.resnet(architecture.resnet_depth, **fields, **options)


def _keras_backbone(architecture: Architecture, **options: Any) -> keras.Model:
    fields = {"channels": architecture.channels, **_batch_norm(architecture)}
    build = keras_backbones.keras_backbone
    return build(architecture.encoder, **fields, **options)


# To add an encoder, add its builder here.
ENCODERS: dict[str, EncoderBuilder] = {
    "resnet": _resnet,
    **dict.fromkeys(encoders.KERAS_ENCODERS, _keras_backbone),
}


def build_encoder(architecture: Architecture, *, differentiable_twice: bool = False) -> keras.Model:
    """Builds the encoder alone, as an `EncoderBuilder` does."""
    encoders.check_encoder(architecture.encoder, ENCODERS)
    return ENCODERS[architecture.encoder](architecture, differentiable_twice=differentiable_twice)


def encoder_of_images(networks: Networks) -> keras.Model:
    """Builds a model that computes `Networks.features` in inference mode."""
    images = keras.Input((None, None, networks.architecture.channels))
    return keras.Model(images, networks.features(images, training=False))
