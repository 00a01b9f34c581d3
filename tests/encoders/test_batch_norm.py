# SPDX-License-Identifier: Apache-2.0
"""Tests of batch_norm.py. As a program: BatchNorm on several replicas."""

import inspect
import pathlib
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.support import processes

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from contrastive.encoders import batch_norm


def _random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


# --- BatchNorm on one replica


def _batch_norm(x, gamma, beta, epsilon=batch_norm.BATCH_NORM_EPSILON):
    """Returns float64 outputs, mean and biased variance of all but axis -1."""
    x = x.astype("float64")
    axes = tuple(range(x.ndim - 1))
    mean, variance = x.mean(axes), x.var(axes)
    return (
        (x - mean) / np.sqrt(variance + epsilon) * gamma + beta,
        mean,
        variance,
    )


def _layer(x, **kwargs):
    """Returns a built layer with weights other than their initial values."""
    layer = batch_norm.GlobalBatchNorm(**kwargs)
    layer.build(x.shape)
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.uniform(0.5, 2.0, variable.shape))
    return layer


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)])
def test_batch_norm_training_equals_formula(shape, mode):
    x = _random(*shape) * 3 + 2
    layer = _layer(x, momentum=0.7)

    def call(x):
        return layer(x, training=True)

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "xla")
    outputs = call(x)
    expected, mean, variance = _batch_norm(x, layer.gamma.numpy(), layer.beta.numpy())
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.3 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.7 + 0.3 * variance, rtol=1e-5)


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_batch_norm_large_mean_keeps_precision(mode):
    x = _random(64, 8, 8, 4) + 1000
    x[..., 0] = 1000  # nothing to normalize
    layer = _layer(x)
    layer.moving_mean.assign(tf.fill([4], 1001.0))
    call = tf.function(layer, jit_compile=mode == "xla")
    expected, mean, _ = _batch_norm(x, layer.gamma.numpy(), layer.beta.numpy())
    np.testing.assert_allclose(call(x, training=True), expected, atol=1e-3)
    np.testing.assert_allclose(layer.moving_mean, 0.9 * 1001 + 0.1 * mean, rtol=1e-6)


def test_batch_norm_gradient_includes_statistics():
    x = _random(2, 3, 3, 4)
    weights = _random(2, 3, 3, 4)[::-1].copy()
    layer = _layer(x)

    def loss(x):
        y, _, _ = _batch_norm(x, layer.gamma.numpy(), layer.beta.numpy())
        return (y * weights).sum()

    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = tf.reduce_sum(layer(inputs, training=True) * weights)
    gradient = tape.gradient(value, inputs).numpy()
    for index in [(0, 0, 0, 0), (1, 2, 1, 3)]:
        delta = np.zeros_like(x, dtype="float64")
        delta[index] = 1e-4
        numeric = (loss(x + delta) - loss(x - delta)) / 2e-4
        np.testing.assert_allclose(gradient[index], numeric, rtol=1e-4)


@pytest.mark.parametrize("frozen_by", ["training=False", "trainable=False"])
def test_batch_norm_frozen_uses_and_keeps_moving_statistics(frozen_by):
    x = _random(4, 3, 3, 5)
    layer = _layer(x)
    layer.moving_mean.assign([1.0, 2, 3, 4, 5])
    layer.moving_variance.assign([5.0, 4, 3, 2, 1])
    before = [v.numpy() for v in layer.variables]
    layer.trainable = frozen_by != "trainable=False"
    outputs = layer(x, training=frozen_by != "training=False")
    gamma, beta, mean, variance = before
    expected = (x - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_batch_norm_center_and_scale_decide_weights(center, scale):
    x = _random(8, 3)
    layer = _layer(x, center=center, scale=scale)
    names = ["gamma"] * scale + ["beta"] * center
    assert [v.name for v in layer.trainable_variables] == names
    expected, _, _ = _batch_norm(
        x,
        layer.gamma.numpy() if scale else 1.0,
        layer.beta.numpy() if center else 0.0,
    )
    outputs = layer(x, training=True)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    x = _random(16, 4, 4, 3) + 5
    layer = _layer(x, dtype="mixed_bfloat16")
    outputs = layer(x, training=True)
    assert outputs.dtype == tf.bfloat16
    assert {v.dtype for v in layer.variables} == {"float32"}
    rounded = tf.cast(tf.cast(x, tf.bfloat16), tf.float32).numpy()
    _, mean, _ = _batch_norm(rounded, 1.0, 0.0)
    # A mean kept in bfloat16 would be off by up to 2e-3 of its value.
    np.testing.assert_allclose(layer.moving_mean, 0.1 * mean, rtol=1e-5)


def test_batch_norm_config_has_every_argument():
    layer = batch_norm.GlobalBatchNorm(momentum=0.5, gamma_initializer="zeros")
    arguments = inspect.signature(batch_norm.GlobalBatchNorm).parameters
    assert set(arguments) - {"kwargs"} <= set(layer.get_config())
    copy = batch_norm.GlobalBatchNorm.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()


def test_batch_norm_rank_three_raises():
    with pytest.raises(ValueError, match=r"Received: shape \(2, 3, 4\)"):
        batch_norm.GlobalBatchNorm().build((2, 3, 4))


# --- BatchNorm on several replicas, each number in a process of its own


def _replica_inputs():
    """Returns what every number of replicas normalizes together, by name."""
    x = _random(8, 3, 3, 5) * [1, 2, 3, 4, 5] + [0, 1, 2, 3, 4]
    return {
        "rank4": x.astype("float32"),
        "rank2": x[:, 0, 0].astype("float32"),
        "large": (x + 1000).astype("float32"),
    }


def _run_replicas(num_replicas):
    """Returns outputs, gradients and moving statistics of one step, by name.

    Per replica arrays are concatenated, moving statistics stacked, and gradients of the weights
    summed, as an optimizer does.
    """
    strategy = tf.distribute.get_strategy()
    if num_replicas > 1:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(num_replicas)])
    results = {}
    for synchronized in (True, False):
        for name, x in _replica_inputs().items():
            with strategy.scope():
                layer = _layer(x, synchronized=synchronized)
            # As after some training; the batch's own means are 1000 to 1004.
            if name == "large":
                layer.moving_mean.assign(tf.fill([5], 1001.0))
            step = _replica_step(strategy, layer)
            values = step(*_shards(strategy, x))
            statistics = [layer.moving_mean.value, layer.moving_variance.value]
            y, dx, dgamma, dbeta, mean, variance = (
                strategy.experimental_local_results(value) for value in (*values, *statistics)
            )
            results |= {
                f"{name}_{synchronized}_{key}": value
                for key, value in {
                    "outputs": np.concatenate(y),
                    "dx": np.concatenate(dx),
                    "dgamma": np.sum(dgamma, axis=0),
                    "dbeta": np.sum(dbeta, axis=0),
                    "moving_mean": np.stack(mean),
                    "moving_variance": np.stack(variance),
                }.items()
            }
    return results


def _shards(strategy, x):
    """Returns the inputs and the weights of the loss, split over replicas."""
    return [
        strategy.experimental_distribute_values_from_function(
            lambda context, array=array: tf.constant(
                np.split(array, context.num_replicas_in_sync)[context.replica_id_in_sync_group]
            )
        )
        for array in (x, np.random.default_rng(2).normal(size=x.shape))
    ]


def _replica_step(strategy, layer):
    def replica_step(x, weights):
        variables = layer.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * tf.cast(weights, tf.float32))
        dx, *dweights = tape.gradient(loss, [x, *(v.value for v in variables)])
        return y, dx, *dweights

    return tf.function(lambda *args: strategy.run(replica_step, args))


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """Returns the results of 1, 2 and 4 replicas, by their number."""
    folder = tmp_path_factory.mktemp("replicas")
    results = {1: _run_replicas(1)}
    for number in (2, 4):
        path = folder / f"{number}.npz"
        processes.run(__file__, number, path)
        results[number] = np.load(path)
    return results


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("name", ["rank4", "rank2"])
def test_batch_norm_replicas_equal_one_device(replicas, number, name):
    keys = [key for key in replicas[1] if key.startswith(f"{name}_True")]
    assert len(keys) == 6
    for key in keys:
        expected = np.broadcast_to(replicas[1][key], replicas[number][key].shape)
        np.testing.assert_allclose(
            replicas[number][key], expected, rtol=1e-5, atol=1e-5, err_msg=key
        )


@pytest.mark.parametrize("number", [2, 4])
def test_batch_norm_unsynchronized_replicas_average_moving_statistics(replicas, number):
    x = _replica_inputs()["rank4"]
    layer = _layer(x)
    parts = [
        _batch_norm(part, layer.gamma.numpy(), layer.beta.numpy()) for part in np.split(x, number)
    ]
    outputs, means, variances = zip(*parts, strict=True)
    result = {key.removeprefix("rank4_False_"): value for key, value in replicas[number].items()}
    np.testing.assert_allclose(result["outputs"], np.concatenate(outputs), rtol=1e-5, atol=1e-5)
    for key, expected in (
        ("moving_mean", 0.1 * np.mean(means, axis=0)),
        ("moving_variance", 0.9 + 0.1 * np.mean(variances, axis=0)),
    ):
        np.testing.assert_array_equal(result[key], result[key][:1].repeat(number, 0))
        np.testing.assert_allclose(result[key][0], expected, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_batch_norm_replicas_large_mean_keep_precision(replicas, number):
    x = _replica_inputs()["large"]
    layer = _layer(x)
    outputs, mean, variance = _batch_norm(x, layer.gamma.numpy(), layer.beta.numpy())
    for key, expected, tolerance in (
        # Without the shift by the moving mean the error is about 0.1.
        ("outputs", outputs, 1e-3),
        ("moving_mean", 0.9 * 1001 + 0.1 * mean, 1e-3),
        ("moving_variance", 0.9 + 0.1 * variance, 1e-4),
    ):
        actual = replicas[number][f"large_True_{key}"]
        np.testing.assert_allclose(actual, np.broadcast_to(expected, actual.shape), atol=tolerance)


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]),
    )
    np.savez(sys.argv[2], **_run_replicas(int(sys.argv[1])))
