# SPDX-License-Identifier: Apache-2.0
"""Tests of keras_backbones.py. As a program: a step on several replicas."""

import contextlib
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support import processes

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import resnet
from contrastive.encoders import architecture as names, keras_backbones

_SMALL = ["mobilenet_v3_small", "mobilenet"]
# Every family that is built in another way, in its smallest form.
_FAMILIES = [
    *_SMALL,
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "convnext_tiny",
            "densenet121",
            "efficientnet_b0",
            "efficientnet_v2_b0",
            "efficientnet_v2_s",
            "inception_resnet_v2",
            "inception_v3",
            "mobilenet_v2",
            "mobilenet_v3_large",
            "resnet50",
            "resnet50_v2",
            "vgg16",
            "xception",
        )
    ),
]


def _images(number=4, size=96, channels=3):
    shape = (number, size, size, channels)
    return np.random.default_rng(0).random(shape).astype("float32")


def _randomize(encoder):
    rng = np.random.default_rng(1)
    encoder.set_weights(
        [(w * rng.uniform(0.8, 1.2, w.shape)).astype("float32") for w in encoder.get_weights()]
    )


@pytest.mark.parametrize("name", _FAMILIES)
def test_keras_backbone_inference_equals_model_of_keras(name):
    encoder = keras_backbones.keras_backbone(name)
    _randomize(encoder)
    build = getattr(keras.applications, names.KERAS_ENCODERS[name])
    expected = build(include_top=False, weights=None, input_shape=(96, 96, 3), pooling="avg")
    images = _images()
    expected = _without_preprocessing(expected)
    expected.set_weights(encoder.get_weights())
    np.testing.assert_allclose(
        encoder(images, training=False),
        expected(images, training=False),
        rtol=1e-4,
        atol=1e-6,
    )


def _without_preprocessing(network):
    """Drops the first layers, if they expect pixels in [0, 255]."""
    start = network.input
    for layer in network.layers:
        if type(layer).__name__ in ("Rescaling", "Normalization"):
            start = layer.output
    return keras.Model(start, network.output)


@pytest.mark.parametrize("name", _FAMILIES)
def test_keras_backbone_is_deterministic_with_global_batch_norm(name):
    encoder = keras_backbones.keras_backbone(name, global_bn=False, batch_norm_momentum=0.7)
    kinds = {type(layer).__name__ for layer in encoder.layers}
    assert not kinds & {
        "BatchNormalization",
        "Dropout",
        "StochasticDepth",
        "Rescaling",
        "Normalization",
    }
    norms = [x for x in encoder.layers if isinstance(x, resnet.GlobalBatchNorm)]
    assert {(x.momentum, x.synchronized) for x in norms} <= {(0.7, False)}
    assert encoder.layers[-1].dtype == "float32"
    images, state = _images(), encoder.get_weights()
    first = encoder(images, training=True)
    encoder.set_weights(state)
    np.testing.assert_array_equal(first, encoder(images, training=True))
    assert np.isfinite(first).all()
    assert first.shape == (4, encoder.output_shape[-1])


@pytest.mark.parametrize("name", _FAMILIES)
def test_keras_backbone_weights_reload_by_path(name):
    encoder = keras_backbones.keras_backbone(name)
    keras.layers.Conv2D(1, 1).build((None, 1, 1, 1))  # takes the name "conv2d"
    copy = keras_backbones.keras_backbone(name)
    _randomize(encoder)
    values = {v.path: v.numpy() for v in encoder.variables}
    assert len(values) == len(encoder.variables)
    assert [v.path for v in copy.variables] == list(values)
    for variable in copy.variables:
        variable.assign(values[variable.path])
    images = _images()
    np.testing.assert_array_equal(copy(images), encoder(images))


def _smallest_size(name):
    """Finds the smallest images that `names` allows."""
    for size in range(1, 100):
        with contextlib.suppress(ValueError):
            names.check_image_size(name, size)
            return size
    raise AssertionError


@pytest.mark.parametrize("name", _FAMILIES)
def test_keras_backbone_smallest_allowed_images_have_finite_features(name):
    encoder = keras_backbones.keras_backbone(name)
    features = encoder(_images(1, _smallest_size(name)))
    assert np.isfinite(features).all()
    assert np.any(features)


def test_keras_backbone_any_channels_and_size_are_accepted():
    encoder = keras_backbones.keras_backbone("mobilenet_v3_small", channels=5)
    for size in (31, 40, 64):
        assert encoder(_images(1, size, channels=5)).shape == (1, 576)


def test_keras_backbone_mixed_precision_features_are_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        encoder = keras_backbones.keras_backbone("mobilenet_v3_small")
    finally:
        keras.config.set_dtype_policy("float32")
    assert encoder.layers[-2].compute_dtype == "bfloat16"
    assert {v.dtype for v in encoder.variables} == {"float32"}
    features = encoder(_images(), training=True)
    assert features.dtype == tf.float32
    assert np.isfinite(features).all()


def test_keras_backbone_differentiable_twice_pools_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        encoder = keras_backbones.keras_backbone("vgg16", differentiable_twice=True)
    finally:
        keras.config.set_dtype_policy("float32")
    pools = [
        layer.compute_dtype
        for layer in encoder.layers
        if isinstance(layer, keras.layers.MaxPooling2D)
    ]
    assert pools == ["float32"] * 5


def _step(encoder, images):
    """Computes gradients of a scalar function of the features."""
    with tf.GradientTape() as tape:
        features = encoder(images, training=True)
        loss = tf.reduce_sum(features * tf.linspace(-1.0, 1.0, 576))
    return tape.gradient(loss, encoder.trainable_variables)


@pytest.mark.parametrize("after_block", [-1, 4])
def test_freeze_keras_backbone_training_changes_all_or_nothing(after_block):
    encoder = keras_backbones.keras_backbone("mobilenet_v3_small")
    resnet.freeze(encoder, after_block)
    before = encoder.get_weights()
    variables = encoder.trainable_variables
    for variable, gradient in zip(variables, _step(encoder, _images()), strict=True):
        assert np.isfinite(gradient).all(), variable.path
        variable.assign_sub(1e-3 * gradient + 1e-5)
    changed = [not np.array_equal(a, b) for a, b in zip(before, encoder.get_weights(), strict=True)]
    assert set(changed) == {after_block == -1}


# --- A step on several replicas, in a process of its own


def _run_replicas(num_replicas):
    """Computes gradients and moving statistics of one step, by path."""
    strategy = tf.distribute.get_strategy()
    if num_replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])
    keras.utils.set_random_seed(0)
    with strategy.scope():
        encoder = keras_backbones.keras_backbone("mobilenet_v3_small")
    parts = np.split(_images(16, 64), num_replicas)
    shards = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )
    gradients = tf.function(lambda images: strategy.run(_step, (encoder, images)))(shards)
    results = {
        variable.path: np.sum(strategy.experimental_local_results(gradient), axis=0)
        for variable, gradient in zip(encoder.trainable_variables, gradients, strict=True)
    }
    return results | {v.path: v.numpy() for v in encoder.non_trainable_variables}


def test_keras_backbone_two_replicas_equal_one(tmp_path):
    path = tmp_path / "replicas.npz"
    processes.run(__file__, 2, path)
    expected, found = _run_replicas(1), np.load(path)
    assert set(found) == set(expected)
    # Gradients of parameters before a BatchNorm may be zero but for rounding.
    scale = max(np.abs(value).max() for name, value in expected.items() if "moving" not in name)
    for name, value in expected.items():
        atol = 1e-6 if "moving" in name else 1e-5 * scale
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=atol, err_msg=name)


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]),
    )
    np.savez(sys.argv[2], **_run_replicas(int(sys.argv[1])))
