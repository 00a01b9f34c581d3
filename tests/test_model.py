# SPDX-License-Identifier: Apache-2.0
"""The networks, their target and the table of encoders."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import model
from contrastive.encoders import architecture as names
from tests.support import replica_run


def _architecture(**fields):
    base = replica_run.architecture("byol").without_pretraining()
    return dataclasses.replace(base, padding="same", num_classes=0, **fields)


def test_target_starts_as_copy_and_update_moves_it_by_decay():
    networks = model.build_networks(_architecture(target_network=True, predictor=True))
    targets = [networks.target_encoder, networks.target_projection]
    online = [networks.encoder, networks.projection]
    for average, network in zip(targets, online, strict=True):
        for a, b in zip(average.weights, network.weights, strict=True):
            np.testing.assert_array_equal(a, b)
        network.set_weights([w + 1.0 for w in network.get_weights()])
    before = [w.numpy() for t in targets for w in t.trainable_variables]
    networks.update_target(tf.constant(0.75))
    after = [w.numpy() for t in targets for w in t.trainable_variables]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a + 0.25, rtol=1e-5, atol=1e-6)
    # Statistics are the target's own.
    for target in targets:
        for variable in target.non_trainable_variables:
            assert set(np.unique(variable)) <= {0.0, 1.0}


def test_target_bn_average_computes_in_inference_mode():
    networks = model.build_networks(_architecture(target_network=True, target_bn="average"))
    norm, average = (
        encoder.get_layer("initial_bn") for encoder in (networks.encoder, networks.target_encoder)
    )
    norm.moving_mean.assign(norm.moving_mean + 2.0)
    images = tf.random.stateless_uniform([4, 16, 16, 3], [0, 1])
    before = networks.target_embeddings(images).numpy()
    np.testing.assert_array_equal(average.moving_mean, 0.0)
    networks.update_target(tf.constant(0.75))
    np.testing.assert_allclose(average.moving_mean, 0.5)
    after = networks.target_embeddings(images).numpy()
    assert np.abs(after - before).max() > 1e-3
    # No image of the batch has a say in another's embedding.
    alone = networks.target_embeddings(images[:1]).numpy()
    np.testing.assert_allclose(after[:1], alone, atol=1e-5)


def test_target_embeddings_have_no_gradient_and_own_statistics():
    networks = model.build_networks(_architecture(target_network=True))
    images = tf.random.stateless_uniform([4, 16, 16, 3], [0, 1])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(networks.target_embeddings(images))
    variables = networks.target_encoder.trainable_variables
    assert tape.gradient(loss, variables) == [None] * len(variables)
    norm = networks.target_encoder.get_layer("initial_bn")
    assert np.any(norm.moving_variance.numpy() != 1)
    norm = networks.encoder.get_layer("initial_bn")
    assert np.all(norm.moving_variance.numpy() == 1)


# --- The table of encoders


def _toy_encoder(architecture, *, differentiable_twice=False):
    images = keras.Input((None, None, architecture.channels))
    x = keras.layers.Conv2D(4, 3, name="toy")(images)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x))


def test_encoders_table_has_every_name():
    assert list(model.ENCODERS) == ["resnet", *names.KERAS_ENCODERS]


def test_build_networks_added_encoder_is_built(monkeypatch):
    monkeypatch.setitem(model.ENCODERS, "toy", _toy_encoder)
    networks = model.build_networks(_architecture(encoder="toy", target_network=True))
    images = tf.random.stateless_uniform([2, 8, 8, 3], [0, 1])
    assert networks.features(images, training=True).shape == (2, 4)
    assert [v.path for v in networks.target_encoder.variables] == [
        "toy/kernel",
        "toy/bias",
    ]


def test_build_encoder_unknown_name_raises_with_close_matches():
    with pytest.raises(ValueError, match="Did you mean densenet121"):
        model.build_encoder(_architecture(encoder="densenet_121"))


def test_features_images_too_small_for_encoder_raise():
    networks = model.build_networks(_architecture(encoder="mobilenet"))
    with pytest.raises(ValueError, match="at least 31 pixels"):
        networks.features(tf.zeros([2, 40, 30, 3]), training=True)


def test_build_networks_remat_of_keras_backbone_raises():
    with pytest.raises(ValueError, match="Only the blocks of ResNets"):
        model.build_networks(_architecture(encoder="mobilenet_v3_small"), rematerialize=True)
