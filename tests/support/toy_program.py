# SPDX-License-Identifier: Apache-2.0
"""The program with an objective, a kind of data, an encoder and a mode more.

    python tests/support/toy_program.py FLAGS

Each addition is a class or a few functions and one line in its table.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf
from absl import app

import model
import objective
import resnet
from contrastive import commands
from contrastive.commands.base import Command
from contrastive.config import schema
from contrastive.config.fields import field, group
from contrastive.objectives.base import Objective
from contrastive.sources import arrays, openers


class ToyState(keras.layers.Layer):
    """A trained scale, and the number of steps that used it."""

    def __init__(self, scale):
        super().__init__(name="toy", dtype="float32")
        self.scale = self.add_weight(name="scale", initializer=keras.initializers.Constant(scale))
        self.count = self.add_weight(name="count", initializer="zeros", trainable=False)
        self.built = True


@group("Objective")
class Toy(Objective):
    """The mean squared distance of two views, scaled by a trained factor."""

    toy_scale: float = field(2.0, "Initial scale.", positive=True)

    def build_state(self, training):  # noqa: ARG002
        """Returns the scale."""
        return ToyState(self.toy_scale)

    def __call__(self, embedded, context):
        """Returns the scaled distance."""
        z1, z2 = embedded.online
        context.state.count.assign_add(1.0)
        scale = tf.identity(context.state.scale)
        loss = scale**2 * tf.reduce_mean(tf.math.squared_difference(z1, z2))
        return loss, {
            "toy_scale": scale,
            "toy_count": tf.identity(context.state.count),
        }


class ToyData:
    """Squares of one color, as `toy:NUMBER`."""

    def owns(self, request):
        """Returns whether the name starts with `toy:`."""
        return request.name.startswith("toy:")

    def load(self, request):
        """Returns that number of images of two classes."""
        count = int(request.name.removeprefix("toy:"))
        labels = np.arange(count) % 2
        images = np.zeros([count, 16, 16, 3], np.uint8)
        images[labels == 1] = 200
        images += np.random.default_rng(0).integers(0, 50, images.shape, dtype=np.uint8)
        return arrays.in_memory(request, images, labels, ("dark", "light"))

    outline = load


def toy_encoder(architecture, *, differentiable_twice=False):
    """Returns one convolution and the mean over positions."""
    del differentiable_twice
    images = keras.Input((None, None, architecture.channels))
    x = keras.layers.Conv2D(8, 3, use_bias=False, name="initial_conv")(images)
    x = resnet.GlobalBatchNorm(name="initial_bn")(x)
    x = keras.layers.ReLU(name="initial_relu")(x)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x))


def greet(resolved):
    """Returns the work of the toy mode."""
    return functools.partial(print, f"Hello from seed {resolved['seed']}.")


objective.OBJECTIVES["toy"] = Toy
openers.OPENERS["toy"] = ToyData()
model.ENCODERS["toy"] = toy_encoder
commands.COMMANDS["greet"] = Command(
    help="Print a greeting.", groups=(schema.Mode, schema.Seed), prepare=greet
)

if __name__ == "__main__":
    import run

    app.run(run.main, flags_parser=run.parse_flags)
