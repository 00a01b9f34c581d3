# SPDX-License-Identifier: Apache-2.0
"""Inputs of the losses of two views, and checks that they share."""

import functools
import json

import numpy as np
import tensorflow as tf


def random_views(batch, dim, seed=0):
    rng = np.random.default_rng(seed)
    z1 = rng.normal(size=(batch, dim)).astype(np.float32)
    z2 = (z1 + 0.5 * rng.normal(size=(batch, dim))).astype(np.float32)
    return z1, z2


def known_gather(views, replica):
    """The `gather` of one of several replicas, whose views are all known."""

    def gather(z):
        column = [v is z for v in views[replica]].index(True)
        return (
            tf.concat([pair[column] for pair in views], 0),
            replica * z.shape[0],
        )

    return gather


def _values_and_gradients(function, *tensors):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return value, tape.gradient(value, tensors)


def check_lightly_cases(numbers, name, loss, arguments):
    """Compares values and gradients with all 24 cases of a loss of lightly.

    `arguments` maps the names of lightly's arguments to those of `loss`.
    """
    cases = json.loads(str(numbers["cases_json"]))
    cases = [case for case in cases if case["name"] == name]
    assert len(cases) == 24
    for case in cases:
        key = f"{case['id']:04d}"
        options = {mine: case[theirs] for theirs, mine in arguments.items()}
        value, gradients = _values_and_gradients(
            functools.partial(loss, **options),
            *(tf.constant(numbers[f"z{view}_{key}"]) for view in (0, 1)),
        )
        np.testing.assert_allclose(value, numbers[f"loss_{key}"], rtol=1e-5, err_msg=case)
        for view, gradient in enumerate(gradients):
            expected = numbers[f"g{view}_{key}"]
            np.testing.assert_allclose(
                gradient,
                expected,
                rtol=1e-4,
                atol=2e-6 * np.abs(expected).max(),
                err_msg=case,
            )


def check_replicas(loss):
    """Compares four replicas of two images with one replica of eight."""
    z1, z2 = map(tf.constant, random_views(8, 5))

    def shared(z1, z2):
        views = list(zip(tf.split(z1, 4), tf.split(z2, 4), strict=True))
        losses = [loss(*views[r], gather=known_gather(views, r)) for r in range(4)]
        return tf.add_n(losses) / 4

    mean, gradients = _values_and_gradients(shared, z1, z2)
    alone, expected = _values_and_gradients(loss, z1, z2)
    np.testing.assert_allclose(mean, alone, rtol=1e-5)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def check_half_precision(loss):
    """Compares bfloat16 inputs with the same inputs cast to float32."""
    half = [tf.cast(z, tf.bfloat16) for z in random_views(4, 3)]
    value = loss(*half)
    assert value.dtype == tf.float32
    exact = loss(*(tf.cast(z, tf.float32) for z in half))
    np.testing.assert_array_equal(value, exact)


def check_collapsed_gradient(loss):
    """Checks that value and gradients are finite if all rows are equal."""
    same = tf.ones([6, 5])
    value, gradients = _values_and_gradients(loss, same, same)
    for array in (value, *gradients):
        assert np.all(np.isfinite(array))
