# SPDX-License-Identifier: Apache-2.0
"""Types, checks and array operations that several losses share."""

from __future__ import annotations

from collections.abc import Callable

from etils import epy

with epy.lazy_imports():
    import tensorflow as tf

# Maps a local [b, ...] to the global [B, ...] and to the global index of this replica's first row.
Gather = Callable[["tf.Tensor"], tuple["tf.Tensor", "int | tf.Tensor"]]

MASKED = -1e9  # A logit without weight in a softmax, as in the reference codes.


def single_replica(z: tf.Tensor) -> tuple[tf.Tensor, int]:
    """Gathers from one replica: the `gather` of a program on one device."""
    return z, 0


def prepare(z: tf.Tensor, hidden_norm: bool) -> tf.Tensor:
    """Casts projections to float32 and, if asked, l2-normalises the rows."""
    z = tf.cast(z, tf.float32)
    return tf.math.l2_normalize(z, axis=-1) if hidden_norm else z


def select(values: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Selects the value at the only True of each row of the mask."""
    return tf.reduce_sum(tf.where(mask, values, 0.0), axis=-1)


def uniform_integer(draws: tf.Tensor, count: int | tf.Tensor) -> tf.Tensor:
    """Converts uniform numbers in [0, 1) to int32 in `[0, count)`."""
    # Even for the largest float32 below 1, the product is not rounded up to `count`.
    return tf.cast(draws * tf.cast(count, tf.float32), tf.int32)


def check_batch(size: int, reason: str = "A contrastive loss needs negatives") -> None:
    """Raises a ValueError if the global batch has fewer than 2 images."""
    if size < 2:
        raise ValueError(f"{reason}: at least 2 images in the global batch. Received: {size}.")


def check_not_negative(**values: float) -> None:
    """Raises a ValueError if one of the named values is negative."""
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative. Received: {value}.")


def check_positive(**values: float) -> None:
    """Raises a ValueError if one of the named values is not positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be positive. Received: {value}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ValueError if a value is not one of its choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {value!r}.")
