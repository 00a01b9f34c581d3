# SPDX-License-Identifier: Apache-2.0
"""The networks: projection and classifier heads, joined with an encoder."""

import dataclasses
import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

import resnet

PROJECTION_MODES = ("none", "linear", "nonlinear")

# Not one instance for all: an initializer draws the same numbers every time.
_normal = functools.partial(keras.initializers.RandomNormal, stddev=0.01)


def projection_head(
    mode: str = "nonlinear",
    *,
    input_dim: int,
    out_dim: int = 128,
    num_layers: int = 3,
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    name: str = "projection",
) -> keras.Model:
    """Returns SimCLR's projection head.

    Hidden layers are as wide as the input, without bias, followed by BatchNorm
    and ReLU. The last layer has `out_dim` units and BatchNorm without offset.

    Source: Chen et al., arXiv:2006.10029; google-research/simclr@383d414,
    tf2/model.py. Differs from it: every mode returns the list below.

    Args:
        mode: "nonlinear" (`num_layers` layers), "linear" (the last one alone)
            or "none" (the input is the projection).
        input_dim: number of features.
        out_dim: size of the projection; not used if `mode` is "none".
        num_layers: number of layers of the nonlinear head, >= 1.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_momentum: of the moving statistics, in [0, 1].
        name: of the model, and the first part of its layers' names.

    Returns:
        A built model from float32 features `[N, input_dim]` to a list: the
        input, then the output of each layer (for "none", the input again).
        Element -1 is the projection, in float32 under every dtype policy;
        element k is where SimCLR's `ft_proj_selector=k` puts its classifier.

    Raises:
        ValueError: if `mode` is unknown or there is no layer.
    """
    if mode not in PROJECTION_MODES:
        raise ValueError(
            f"`mode` must be one of {PROJECTION_MODES}. Received: {mode!r}."
        )
    if num_layers < 1:
        raise ValueError(
            f"`num_layers` must be positive. Received: {num_layers}."
        )
    num_layers = {"none": 0, "linear": 1, "nonlinear": num_layers}[mode]
    hiddens = [keras.Input((input_dim,), name=f"{name}_features")]
    for layer in range(1, num_layers + 1):
        is_last = layer == num_layers
        x = keras.layers.Dense(
            out_dim if is_last else input_dim,
            use_bias=False,
            kernel_initializer=_normal(),
            name=f"{name}_dense{layer}",
        )(hiddens[-1])
        x = resnet.GlobalBatchNorm(
            momentum=batch_norm_momentum,
            center=not is_last,
            synchronized=global_bn,
            dtype="float32" if is_last else None,
            name=f"{name}_bn{layer}",
        )(x)
        if not is_last:
            x = keras.layers.ReLU(name=f"{name}_relu{layer}")(x)
        hiddens.append(x)
    if mode == "none":
        hiddens *= 2  # Keras would return a bare tensor for a list of one.
    return keras.Model(hiddens[0], hiddens, name=name)


def classifier_head(
    *,
    input_dim: int,
    num_classes: int,
    zero_init: bool = False,
    name: str = "classifier",
) -> keras.Model:
    """Returns one linear layer with bias.

    Args:
        input_dim: number of features.
        num_classes: number of logits.
        zero_init: whether the kernel starts at zero, as in linear evaluation,
            or from a normal distribution of standard deviation 0.01.
        name: of the model, and the first part of its layer's name.

    Returns:
        A built model from features `[N, input_dim]` to float32 logits
        `[N, num_classes]`.
    """
    features = keras.Input((input_dim,), name=f"{name}_features")
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer="zeros" if zero_init else _normal(),
        dtype="float32",
        name=f"{name}_dense",
    )(features)
    return keras.Model(features, logits, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What determines the variables and the function of the networks.

    It is written to `run.json`, so that a checkpoint can be read without
    repeating the flags it was trained with. The encoder's fields are arguments
    of `resnet.resnet`, the others of the heads here, named as their flags.

    Attributes:
        resnet_depth: 10, 18, 34, 50, 101, 152 or 200.
        width_multiplier: of all numbers of channels, > 0.
        stem: "imagenet" or "cifar".
        padding: "fixed" or "same".
        sk_ratio: selective kernels and ResNet-D if > 0.
        se_ratio: squeeze and excitation if > 0.
        zero_init_residual: whether residual blocks start as identities.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_decay: momentum of the moving statistics.
        channels: of an image.
        image_mean: subtracted from images in [0, 1], one a channel; or ().
        image_std: images are then divided by it; or ().
        proj_head_mode: "none", "linear" or "nonlinear".
        proj_out_dim: size of the projection.
        num_proj_layers: of the nonlinear head.
        ft_proj_selector: the layer of the projection head that the classifier
            sees: 0 is the encoder's output, -1 the projection.
        num_classes: of the classifier; 0 for none.
        zero_init_logits_layer: whether the classifier starts at zero.
    """

    resnet_depth: int
    width_multiplier: float
    stem: str
    padding: str
    sk_ratio: float
    se_ratio: float
    zero_init_residual: bool
    global_bn: bool
    batch_norm_decay: float
    channels: int
    image_mean: Sequence[float]
    image_std: Sequence[float]
    proj_head_mode: str
    proj_out_dim: int
    num_proj_layers: int
    ft_proj_selector: int
    num_classes: int
    zero_init_logits_layer: bool


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks of a run, joined.

    Attributes:
        architecture: what they were built from.
        encoder: images, normalised, to features.
        projection: features to the list of all layers' outputs.
        projection_to_classifier: its part from the features to the layer that
            the classifier sees; shares variables with `projection`.
        classifier: to logits; None where there are no classes.
    """

    architecture: Architecture
    encoder: keras.Model
    projection: keras.Model
    projection_to_classifier: keras.Model
    classifier: keras.Model | None

    def features(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Returns `[n, d]` features of float32 `[n, h, w, c]` in [0, 1]."""
        if self.architecture.image_mean:
            images = images - tf.constant(self.architecture.image_mean)
        if self.architecture.image_std:
            images = images / tf.constant(self.architecture.image_std)
        return self.encoder(images, training=training)

    def logits(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        """Returns float32 `[n, num_classes]` of images as in `features`.

        Raises:
            ValueError: if there is no classifier.
        """
        if self.classifier is None:
            raise ValueError("There are no classes. Received: num_classes=0.")
        features = self.features(images, training)
        return self.classifier(
            self.projection_to_classifier(features, training=training)
        )

    def models(self) -> dict[str, keras.Model]:
        """Returns the models by their names in a checkpoint."""
        models = {"encoder": self.encoder, "projection": self.projection}
        if self.classifier:
            models["classifier"] = self.classifier
        return models


def build_networks(architecture: Architecture) -> Networks:
    """Returns networks with fresh weights.

    Raises:
        ValueError: if a field of `architecture` is out of its range.
    """
    encoder = resnet.resnet(
        architecture.resnet_depth,
        width_multiplier=architecture.width_multiplier,
        stem=architecture.stem,
        padding=architecture.padding,
        sk_ratio=architecture.sk_ratio,
        se_ratio=architecture.se_ratio,
        zero_init_residual=architecture.zero_init_residual,
        global_bn=architecture.global_bn,
        batch_norm_momentum=architecture.batch_norm_decay,
        channels=architecture.channels,
    )
    projection = projection_head(
        architecture.proj_head_mode,
        input_dim=encoder.output_shape[-1],
        out_dim=architecture.proj_out_dim,
        num_layers=architecture.num_proj_layers,
        global_bn=architecture.global_bn,
        batch_norm_momentum=architecture.batch_norm_decay,
    )
    layers, selector = projection.outputs, architecture.ft_proj_selector
    if not -len(layers) <= selector < len(layers):
        raise ValueError(
            f"`ft_proj_selector` must be in -1..{len(layers) - 1} for this "
            f"projection head. Received: {selector}."
        )
    projection_to_classifier = keras.Model(
        projection.input, layers[selector], name="projection_to_classifier"
    )
    classifier = None
    if architecture.num_classes:
        classifier = classifier_head(
            input_dim=layers[selector].shape[-1],
            num_classes=architecture.num_classes,
            zero_init=architecture.zero_init_logits_layer,
        )
    return Networks(
        architecture,
        encoder,
        projection,
        projection_to_classifier,
        classifier,
    )


def encoder_of_images(networks: Networks) -> keras.Model:
    """Returns the encoder with the run's normalisation inside.

    Returns:
        keras.Model from float32 images `[n, h, w, c]` in [0, 1] to float32
        features `[n, d]`, in inference mode.
    """
    images = keras.Input((None, None, networks.architecture.channels))
    return keras.Model(images, networks.features(images, training=False))
