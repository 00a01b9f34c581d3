# SPDX-License-Identifier: Apache-2.0
"""Encoders whose activations are computed again in the backward pass."""

import contextlib
import itertools
import re
from collections.abc import Callable

import keras
import tensorflow as tf

from contrastive.encoders.batch_norm import hold_statistics


def rematerialized(
    encoder: keras.Model,
) -> Callable[[tf.Tensor, bool], tf.Tensor]:
    """Builds a function that computes an encoder in less memory.

    The forward pass keeps only the outputs of the stem and of each block. The backward pass
    computes the activations in between again, which takes about as long as one more forward pass.
    Moving statistics are updated once, in the forward pass. Source: Chen et al., arXiv:1604.06174.

    Returns:
        A function from float32 images `[N, H, W, C]` and `training` to the outputs of `encoder`,
        whose variables it shares. It may be called, traced and differentiated any number of times.

    Raises:
        ValueError: if the encoder has no blocks.
    """
    ends = {
        match[1]: layer.output  # the last one of each block remains
        for layer in encoder.layers
        if (match := re.match(r"(initial|block_group\d_block\d+)_", layer.name))
    }
    if len(ends) < 2:
        raise ValueError(
            "Only the blocks of ResNets can be computed again in the backward "
            f"pass. Received: {encoder.name!r}."
        )
    tensors = [encoder.input, *ends.values(), encoder.output]
    parts = [keras.Model(*pair) for pair in itertools.pairwise(tensors)]

    def call(images: tf.Tensor, training: bool) -> tf.Tensor:
        x = images
        for part in parts:
            x = _call_and_forget(part, x, training)
        return x

    return call


def _call_and_forget(part: keras.Model, inputs: tf.Tensor, training: bool) -> tf.Tensor:
    """Calls a model and keeps none of its activations for the gradient."""
    is_forward = True

    def call(x: tf.Tensor) -> tf.Tensor:
        with contextlib.nullcontext() if is_forward else hold_statistics():
            return part(x, training=training)

    outputs = tf.recompute_grad(call)(inputs)
    # From now on, `call` is only called to compute gradients.
    is_forward = False
    return outputs
