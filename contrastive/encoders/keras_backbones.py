# SPDX-License-Identifier: Apache-2.0
"""Backbones of `keras.applications` with BatchNorm over all replicas."""

import collections
import functools
import inspect
import re
import warnings
from typing import Any

import keras

from contrastive.encoders.architecture import KERAS_ENCODERS
from contrastive.encoders.batch_norm import GlobalBatchNorm

# Random draws must depend on the example, not on the replica; and images are normalised before they
# enter an encoder.
_REMOVED = (
    keras.layers.Dropout, keras.layers.Rescaling, keras.layers.Normalization,
)  # fmt: skip


def keras_backbone(
    name: str,
    *,
    channels: int = 3,
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    differentiable_twice: bool = False,
) -> keras.Model:
    """Builds a backbone of `keras.applications` with random weights.

    Differs from Keras's model: each BatchNormalization is a `GlobalBatchNorm`; there is no dropout,
    stochastic depth or preprocessing of images; and the paths of the variables are the same in
    every process.

    `name` is one of `architecture.KERAS_ENCODERS`, or else a `KeyError`. The other arguments and
    the result are as in `resnet.resnet`, but images must be as large as
    `architecture.check_image_size` says.
    """
    build = getattr(keras.applications, KERAS_ENCODERS[name])
    options = {"include_top": False, "weights": None, "pooling": "avg"}
    if "include_preprocessing" in inspect.signature(build).parameters:
        options["include_preprocessing"] = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This model usually expects")
        network = build(input_shape=(None, None, channels), **options)
    new_names = _new_names(network)
    kind = keras.layers.GlobalAveragePooling2D
    *_, pooling = (x for x in network.layers if isinstance(x, kind))

    def convert(layer: Any) -> Any:
        config = layer.get_config()
        config["name"] = new_names.get(layer, config["name"])
        if layer is pooling:
            return keras.layers.GlobalAveragePooling2D(name="final_avg_pool", dtype="float32")
        if isinstance(layer, keras.layers.BatchNormalization):
            return GlobalBatchNorm(
                momentum=batch_norm_momentum,
                epsilon=layer.epsilon,
                center=layer.center,
                scale=layer.scale,
                synchronized=global_bn,
                name=config["name"],
            )
        if isinstance(layer, _REMOVED):
            return keras.layers.Identity(name=config["name"])
        if layer is network.layers[-1] or (
            # XLA cannot compute its second derivatives in bfloat16.
            differentiable_twice and isinstance(layer, keras.layers.MaxPool2D)
        ):
            config["dtype"] = "float32"
        copy = layer.__class__.from_config(config)
        if type(layer).__name__ == "LayerScale":
            # ConvNeXt's layer does not name its weight.
            copy.add_weight = functools.partial(copy.add_weight, name="gamma")
        return copy

    return keras.models.clone_model(
        network,
        clone_function=convert,
        # Without the keyword arguments of Keras's BatchNormalization.
        call_function=lambda layer, *inputs, **_: layer(*inputs),
    )


def _new_names(network: keras.Model) -> dict[keras.layers.Layer, str]:
    """Finds names for layers that Keras named by their number so far."""
    found: dict[keras.layers.Layer, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for layer in network.layers:
        kind = re.sub(r"_\d+$", "", layer.name)
        is_automatic = kind.replace("_", "") == type(layer).__name__.lower()
        if layer.weights and is_automatic:
            counts[kind] += 1
            found[layer] = f"{kind}_{counts[kind]}"
    return found
