# SPDX-License-Identifier: Apache-2.0
"""Tests of model.py."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import model
import resnet
from tests.support import replica_run

FEATURES = 6


def _features(num=16):
    return np.random.default_rng(0).normal(size=(num, FEATURES)).astype("f")


def _randomize(head):
    """Gives every weight, and statistic, a value of its own."""
    rng = np.random.default_rng(1)
    head.set_weights([rng.uniform(0.5, 2.0, w.shape) for w in head.weights])


def _projection(head, x, training):
    """Returns the hidden representations in NumPy, float64."""
    hiddens = [x.astype("float64")]
    num_layers = sum(isinstance(y, keras.layers.Dense) for y in head.layers)
    for i in range(1, num_layers + 1):
        norm = head.get_layer(f"projection_bn{i}")
        x = hiddens[-1] @ head.get_layer(f"projection_dense{i}").kernel.numpy()
        mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy()
        if training:
            mean, variance = x.mean(0), x.var(0)
        x = (x - mean) / np.sqrt(variance + 1e-5) * norm.gamma.numpy()
        if i < num_layers:
            x = np.maximum(x + norm.beta.numpy(), 0)
        hiddens.append(x)
    return hiddens


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mode", "num_layers", "widths"),
    [
        ("linear", 3, [FEATURES, 4]),
        ("nonlinear", 1, [FEATURES, 4]),
        ("nonlinear", 2, [FEATURES, FEATURES, 4]),
        ("nonlinear", 3, [FEATURES, FEATURES, FEATURES, 4]),
    ],
)
def test_projection_is_simclrs(mode, num_layers, widths, training):
    head = model.projection_head(
        mode, input_dim=FEATURES, out_dim=4, num_layers=num_layers
    )
    _randomize(head)
    x = _features()
    expected = _projection(head, x, training)
    hiddens = head(x, training=training)
    assert [h.shape[1] for h in hiddens] == widths
    for hidden, value in zip(hiddens, expected, strict=True):
        np.testing.assert_allclose(hidden, value, rtol=1e-4, atol=1e-4)


def test_without_projection_the_features_are_the_projection():
    head = model.projection_head("none", input_dim=FEATURES)
    assert not head.weights
    x = _features()
    hiddens = head(x, training=True)
    assert isinstance(hiddens, list)
    np.testing.assert_array_equal(hiddens[0], x)
    np.testing.assert_array_equal(hiddens[-1], x)


def test_heads_are_built_with_the_weights_of_the_reference():
    head = model.projection_head(input_dim=64)
    assert head.built
    # Two layers of 64 x 64 with gamma and beta, one of 64 x 128 with gamma.
    count = sum(int(np.prod(v.shape)) for v in head.trainable_variables)
    assert count == 2 * (64 * 64 + 2 * 64) + 64 * 128 + 128
    kernels = [v.numpy() for v in head.weights if v.name == "kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    for kernel in kernels:
        np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.05)


def test_batch_norm_arguments_reach_every_layer():
    head = model.projection_head(
        input_dim=FEATURES, global_bn=False, batch_norm_momentum=0.8
    )
    norms = [x for x in head.layers if isinstance(x, resnet.GlobalBatchNorm)]
    assert [(x.momentum, x.synchronized, x.center) for x in norms] == [
        (0.8, False, True),
        (0.8, False, True),
        (0.8, False, False),
    ]


def test_variable_paths_of_two_heads_do_not_collide():
    heads = [
        model.projection_head(input_dim=FEATURES),
        model.projection_head(input_dim=FEATURES, name="projection_target"),
        model.classifier_head(input_dim=FEATURES, num_classes=2),
    ]
    paths = [v.path for head in heads for v in head.variables]
    assert len(paths) == len(set(paths))


def test_classifier_is_linear():
    head = model.classifier_head(input_dim=FEATURES, num_classes=3)
    kernel, bias = head.weights
    assert np.all(bias.numpy() == 0)
    assert 0 < np.abs(kernel.numpy()).max() < 0.05
    _randomize(head)
    x = _features()
    np.testing.assert_allclose(head(x), x @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_a_zero_classifier_has_no_preference():
    head = model.classifier_head(
        input_dim=FEATURES, num_classes=3, zero_init=True
    )
    np.testing.assert_array_equal(head(_features()), np.zeros((16, 3)))


def test_outputs_are_float32_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        heads = [
            model.projection_head(mode, input_dim=FEATURES)
            for mode in model.SIMCLR_MODES
        ]
        mlp = model.mlp_head(
            input_dim=FEATURES, hidden_dims=(4,), out_dim=2, norm="all"
        )
        classifier = model.classifier_head(input_dim=FEATURES, num_classes=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert heads[-1].outputs[1].dtype == "bfloat16"
    for head in (*heads, mlp):
        assert head(_features(), training=True)[-1].dtype == tf.float32
    assert classifier(_features()).dtype == tf.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mode": "mlp"}, "Received: 'mlp'"), ({"num_layers": 0}, "Received: 0")],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model.projection_head(input_dim=FEATURES, **arguments)


@pytest.mark.parametrize(
    ("norm", "norms", "biases"),
    [("none", 0, 0), ("hidden", 2, 2), ("all", 3, 0)],
)
def test_mlp_has_the_layers_of_its_norm(norm, norms, biases):
    head = model.mlp_head(
        input_dim=FEATURES, hidden_dims=(5, 7), out_dim=3, norm=norm
    )
    names = [v.name for v in head.weights]
    assert names.count("gamma") == norms
    assert names.count("bias") == biases
    kernels = [v.shape for v in head.weights if v.name == "kernel"]
    assert kernels == [(FEATURES, 5), (5, 7), (7, 3)]
    hiddens = head(_features(), training=True)
    assert [h.shape[1] for h in hiddens] == [FEATURES, 5, 7, 3]
    # ReLU after every layer but the last.
    assert min(float(tf.reduce_min(h)) for h in hiddens[1:-1]) == 0
    assert float(tf.reduce_min(hiddens[-1])) < 0


def _architecture(**fields):
    base = replica_run.architecture("byol").without_pretraining()
    return dataclasses.replace(base, padding="same", num_classes=0, **fields)


def test_the_target_starts_as_a_copy_and_follows_by_its_decay():
    networks = model.build_networks(
        _architecture(target_network=True, predictor=True)
    )
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


def test_a_target_of_averaged_statistics_is_in_inference_mode():
    networks = model.build_networks(
        _architecture(target_network=True, target_bn="average")
    )
    norm, average = (
        encoder.get_layer("initial_bn")
        for encoder in (networks.encoder, networks.target_encoder)
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


def test_target_embeddings_have_no_gradient_and_statistics_of_their_own():
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


def test_queue_is_first_in_first_out():
    rng = np.random.default_rng(0)
    queue = model.LabelledQueue(2, 7, 3)
    expected = []  # (label, id, embeddings of both views), oldest first
    for step in range(6):
        z = rng.normal(size=(2, 5, 3)).astype("f")
        labels = rng.integers(-1, 3, 5).astype("int32")
        ids = np.arange(5) + 10 * step
        embeddings, stored_labels, stored_ids = (
            np.array(x)
            for x in queue.push(
                tf.constant(z), tf.constant(labels), tf.constant(ids)
            )
        )
        for row in range(5):
            if labels[row] >= 0:
                expected.append((labels[row], ids[row], z[:, row]))
        expected = expected[-7:]
        by_id = dict(zip(stored_ids, range(7), strict=True))
        assert set(by_id) - {-1} == {entry[1] for entry in expected}
        for label, example, embedding in expected:
            slot = by_id[example]
            assert stored_labels[slot] == label
            np.testing.assert_array_equal(embeddings[:, slot], embedding)
        np.testing.assert_array_equal(queue.ids, stored_ids)
        np.testing.assert_array_equal(queue.embeddings, embeddings)


def test_a_queue_smaller_than_a_batch_is_refused():
    queue = model.LabelledQueue(1, 2, 3)
    with pytest.raises(ValueError, match="a batch of 4"):
        queue.push(
            tf.zeros([1, 4, 3]), tf.zeros([4], "int32"), tf.zeros([4], "int64")
        )


@pytest.mark.slow
def test_efficientnet_has_global_batch_norm_and_nothing_random():
    network = model.build_encoder(_architecture(encoder="efficientnet_v2_s"))
    kinds = {type(layer) for layer in network.layers}
    assert resnet.GlobalBatchNorm in kinds
    assert not kinds & {keras.layers.BatchNormalization, keras.layers.Dropout}
    # Keras's own, without its classifier.
    assert network.count_params() == 20_331_360
    images = tf.random.stateless_uniform([8, 96, 96, 3], [0, 1])
    state = network.get_weights()
    first = network(images, training=True)
    network.set_weights(state)
    second = network(images, training=True)
    assert first.shape == (8, 1280)
    np.testing.assert_array_equal(first, second)
