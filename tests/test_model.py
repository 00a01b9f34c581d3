# SPDX-License-Identifier: Apache-2.0
"""Tests of model.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import model
import resnet

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
            for mode in model.PROJECTION_MODES
        ]
        classifier = model.classifier_head(input_dim=FEATURES, num_classes=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert heads[-1].outputs[1].dtype == "bfloat16"
    for head in heads:
        assert head(_features(), training=True)[-1].dtype == tf.float32
    assert classifier(_features()).dtype == tf.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mode": "mlp"}, "Received: 'mlp'"), ({"num_layers": 0}, "Received: 0")],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model.projection_head(input_dim=FEATURES, **arguments)
