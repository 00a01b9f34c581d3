# SPDX-License-Identifier: Apache-2.0
"""Tests of remat.py."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import resnet
from contrastive.encoders import batch_norm, remat
from tests.support import processes


def _encoder():
    keras.utils.set_random_seed(0)
    return resnet.resnet(10, width_multiplier=0.125, stem="cifar")


def _images(size=16):
    return tf.random.stateless_uniform([8, size, size, 3], [0, 1])


def _gradients(encoder, call, images):
    """Computes the loss, its gradients, and the moving statistics after it."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call(images, training=True) ** 2)
    return loss, *tape.gradient(loss, encoder.trainable_variables)


def _assert_close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_rematerialized_gradients_and_statistics_equal_encoder(jit_compile):
    found = []
    for is_rematerialized in (False, True):
        encoder = _encoder()
        call = encoder
        if is_rematerialized:
            call = remat.rematerialized(encoder)

        @tf.function(jit_compile=jit_compile)
        def step(images, call=call, encoder=encoder):
            return _gradients(encoder, call, images)

        results = step(_images())
        found.append([*results, *encoder.non_trainable_variables])
    assert len(found[0]) > 50
    _assert_close(found[1], found[0])


def test_rematerialized_traced_four_times_updates_statistics_once_each():
    found = []
    for is_rematerialized in (False, True):
        encoder = _encoder()
        call = remat.rematerialized(encoder) if is_rematerialized else encoder
        step = tf.function(
            lambda images, call=call, encoder=encoder: _gradients(encoder, call, images)
        )
        results = []
        for size in (8, 12, 16, 20, 8):  # four traces, and one of them again
            results += [*step(_images(size)), *encoder.non_trainable_variables]
            results = [np.array(value) for value in results]
        # Eager calls and gradients that are computed twice count as well.
        images = _images()
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum(call(images, training=True) ** 2)
        for _ in range(2):
            results += tape.gradient(loss, encoder.trainable_variables)
        found.append([*results, *encoder.non_trainable_variables])
    _assert_close(found[1], found[0])


def test_rematerialized_in_hold_statistics_keeps_statistics():
    encoder = _encoder()
    call = remat.rematerialized(encoder)
    before = [v.numpy() for v in encoder.non_trainable_variables]
    with batch_norm.hold_statistics():
        _gradients(encoder, call, _images())
    for a, b in zip(before, encoder.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(a, b)


_PEAK = """
import resource, sys
import tensorflow as tf
import resnet
from contrastive.encoders import remat

network = resnet.resnet(34, stem="cifar")
call = network if sys.argv[1] == "kept" else remat.rematerialized(network)


@tf.function
def step(images):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call(images, training=True))
    return tape.gradient(loss, network.trainable_variables)


start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(tf.ones([128, 32, 32, 3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@pytest.mark.slow
def test_rematerialized_needs_less_memory():
    kept, recomputed = (
        int(processes.run(sys.executable, "-c", _PEAK, which).stdout)
        for which in ("kept", "recomputed")
    )
    assert recomputed < 0.6 * kept


def test_rematerialized_encoder_without_blocks_raises():
    images = keras.Input((8, 8, 3))
    network = keras.Model(images, keras.layers.Flatten()(images))
    with pytest.raises(ValueError, match="Only the blocks of ResNets"):
        remat.rematerialized(network)
