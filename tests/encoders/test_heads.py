# SPDX-License-Identifier: Apache-2.0
"""Tests of heads.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from contrastive.config import choices
from contrastive.encoders import heads
from contrastive.encoders.batch_norm import GlobalBatchNorm

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
def test_projection_head_equals_formula_of_simclr(mode, num_layers, widths, training):
    head = heads.projection_head(mode, input_dim=FEATURES, out_dim=4, num_layers=num_layers)
    _randomize(head)
    x = _features()
    expected = _projection(head, x, training)
    hiddens = head(x, training=training)
    assert [h.shape[1] for h in hiddens] == widths
    for hidden, value in zip(hiddens, expected, strict=True):
        np.testing.assert_allclose(hidden, value, rtol=1e-4, atol=1e-4)


def test_projection_head_none_returns_features():
    head = heads.projection_head("none", input_dim=FEATURES)
    assert not head.weights
    x = _features()
    hiddens = head(x, training=True)
    assert isinstance(hiddens, list)
    np.testing.assert_array_equal(hiddens[0], x)
    np.testing.assert_array_equal(hiddens[-1], x)


def test_projection_head_has_weights_of_reference():
    head = heads.projection_head(input_dim=64)
    assert head.built
    # Two layers of 64 x 64 with gamma and beta, one of 64 x 128 with gamma.
    count = sum(int(np.prod(v.shape)) for v in head.trainable_variables)
    assert count == 2 * (64 * 64 + 2 * 64) + 64 * 128 + 128
    kernels = [v.numpy() for v in head.weights if v.name == "kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    for kernel in kernels:
        np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.05)


def test_projection_head_batch_norm_arguments_reach_every_layer():
    head = heads.projection_head(input_dim=FEATURES, global_bn=False, batch_norm_momentum=0.8)
    norms = [x for x in head.layers if isinstance(x, GlobalBatchNorm)]
    assert [(x.momentum, x.synchronized, x.center) for x in norms] == [
        (0.8, False, True),
        (0.8, False, True),
        (0.8, False, False),
    ]


def test_heads_variable_paths_are_unique():
    built = [
        heads.projection_head(input_dim=FEATURES),
        heads.projection_head(input_dim=FEATURES, name="projection_target"),
        heads.classifier_head(input_dim=FEATURES, num_classes=2),
    ]
    paths = [v.path for head in built for v in head.variables]
    assert len(paths) == len(set(paths))


def test_classifier_head_is_linear():
    head = heads.classifier_head(input_dim=FEATURES, num_classes=3)
    kernel, bias = head.weights
    assert np.all(bias.numpy() == 0)
    assert 0 < np.abs(kernel.numpy()).max() < 0.05
    _randomize(head)
    x = _features()
    np.testing.assert_allclose(head(x), x @ kernel + bias, rtol=1e-5, atol=1e-5)


def test_classifier_head_zero_init_logits_are_zero():
    head = heads.classifier_head(input_dim=FEATURES, num_classes=3, zero_init=True)
    np.testing.assert_array_equal(head(_features()), np.zeros((16, 3)))


def test_heads_mixed_precision_outputs_are_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        built = [heads.projection_head(mode, input_dim=FEATURES) for mode in choices.SIMCLR_MODES]
        mlp = heads.mlp_head(input_dim=FEATURES, hidden_dims=(4,), out_dim=2, norm="all")
        classifier = heads.classifier_head(input_dim=FEATURES, num_classes=2)
    finally:
        keras.config.set_dtype_policy("float32")
    assert built[-1].outputs[1].dtype == "bfloat16"
    for head in (*built, mlp):
        assert head(_features(), training=True)[-1].dtype == tf.float32
    assert classifier(_features()).dtype == tf.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"mode": "mlp"}, "Received: 'mlp'"), ({"num_layers": 0}, "Received: 0")],
)
def test_projection_head_argument_out_of_range_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        heads.projection_head(input_dim=FEATURES, **arguments)


@pytest.mark.parametrize(
    ("norm", "norms", "biases"),
    [("none", 0, 0), ("hidden", 2, 2), ("all", 3, 0)],
)
def test_mlp_head_has_layers_of_its_norm(norm, norms, biases):
    head = heads.mlp_head(input_dim=FEATURES, hidden_dims=(5, 7), out_dim=3, norm=norm)
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
