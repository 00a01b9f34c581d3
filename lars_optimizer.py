# SPDX-License-Identifier: Apache-2.0
"""LARS: stochastic gradient descent with a learning rate for each layer."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

VARIANTS = ("simclr", "deepmind")


@keras.saving.register_keras_serializable(package="lars_optimizer")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling.

    For a weight `w` of rank 2 or more with gradient `g`:

        g <- g + l2 * w
        g <- g * eeta * |w| / |g|                (unless a norm is 0)
        simclr:    v <- momentum * v + learning_rate * g,  w <- w - v
        deepmind:  v <- momentum * v + g,  w <- w - learning_rate * v

    The two differ while the learning rate changes: SimCLR's velocity keeps the rate of the time
    when a gradient came in. Vectors and scalars (biases, and BatchNorm's gamma and beta) skip the
    first two lines.

    Source: You et al., arXiv:1708.03888; google-research/simclr@383d414, tf2/lars_optimizer.py with
    `classic_momentum=True`; DeepMind's byol/utils/optimizers.py. Differs from them: the rank, not
    the name, excludes a weight, so a classifier that must not be decayed (SimCLR's supervised head)
    takes an optimizer of its own.

    Args:
        learning_rate: float, `LearningRateSchedule` or callable.
        momentum: weight of the old velocity, in [0, 1).
        l2: weight decay, >= 0; unlike Keras's, it is scaled with the gradient.
        eeta: trust coefficient, > 0 (the papers' eta).
        nesterov: whether a step looks ahead: `momentum * v + g` (or
            `+ learning_rate * g`) in the place of `v`.
        variant: "simclr" or "deepmind".
        name: name of the optimizer.

    Raises:
        ValueError: if `variant` is unknown or a number is out of its range.
    """

    def __init__(
        self,
        learning_rate: Any,
        *,
        momentum: float = 0.9,
        l2: float = 0.0,
        eeta: float = 1e-3,
        nesterov: bool = False,
        variant: str = "simclr",
        name: str = "lars",
    ):
        if variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {VARIANTS}. Received: {variant!r}.")
        if not 0 <= momentum < 1 or l2 < 0 or eeta <= 0:
            raise ValueError(
                "`momentum` must be in [0, 1), `l2` not negative and `eeta` "
                f"positive. Received: {momentum=}, {l2=}, {eeta=}."
            )
        super().__init__(learning_rate, name=name)
        self.momentum, self.l2, self.eeta = momentum, l2, eeta
        self.nesterov, self.variant = nesterov, variant

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the velocities and decides which weights are scaled."""
        if self.built:
            return
        super().build(variables)
        self._velocities = self.add_optimizer_variables(variables, "velocity")
        self._is_scaled = [len(v.shape) > 1 for v in variables]

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        """Moves one variable, and its velocity, by one step."""
        index = self._get_variable_index(variable)
        velocity = self._velocities[index]
        learning_rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        if self._is_scaled[index]:
            gradient = gradient + self.l2 * variable
            gradient = gradient * self._trust_ratio(gradient, variable)

        rates = (learning_rate, 1.0)
        rate_in, rate_out = rates if self.variant == "simclr" else rates[::-1]
        step = rate_in * gradient
        next_velocity = self.momentum * velocity + step
        ahead = self.momentum * next_velocity + step
        step = ahead if self.nesterov else next_velocity
        self.assign(velocity, next_velocity)
        self.assign_sub(variable, rate_out * step)

    def _trust_ratio(self, gradient: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
        # `keras.ops.norm` refuses the rank 4 of convolution kernels.
        weight_norm, gradient_norm = (
            ops.sqrt(ops.sum(ops.square(ops.cast(x, "float32")))) for x in (variable, gradient)
        )
        ratio = self.eeta * weight_norm / gradient_norm
        are_positive = ops.minimum(weight_norm, gradient_norm) > 0
        return ops.cast(ops.where(are_positive, ratio, 1.0), gradient.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, and no others of Keras's."""
        own = "momentum", "l2", "eeta", "nesterov", "variant"
        base = super().get_config()
        config = {key: base[key] for key in ("name", "learning_rate")}
        return config | {key: getattr(self, key) for key in own}
