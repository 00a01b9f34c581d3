# SPDX-License-Identifier: Apache-2.0
"""Tests of resnet.py. As a program: BatchNorm on several replicas."""

import inspect
import itertools
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.support import processes

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import resnet

TINY = {"depth": 10, "width_multiplier": 0.125}


def _random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _count(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


# --- BatchNorm on one replica


def _batch_norm(x, gamma, beta, epsilon=resnet.BATCH_NORM_EPSILON):
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
    layer = resnet.GlobalBatchNorm(**kwargs)
    layer.build(x.shape)
    rng = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(rng.uniform(0.5, 2.0, variable.shape))
    return layer


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)])
def test_batch_norm_is_the_formula(shape, mode):
    x = _random(*shape) * 3 + 2
    layer = _layer(x, momentum=0.7)

    def call(x):
        return layer(x, training=True)

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "xla")
    outputs = call(x)
    expected, mean, variance = _batch_norm(
        x, layer.gamma.numpy(), layer.beta.numpy()
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, 0.3 * mean, rtol=1e-5)
    np.testing.assert_allclose(
        layer.moving_variance, 0.7 + 0.3 * variance, rtol=1e-5
    )


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_a_large_mean_costs_no_precision_and_is_no_nan(mode):
    x = _random(64, 8, 8, 4) + 1000
    x[..., 0] = 1000  # nothing to normalize
    layer = _layer(x)
    layer.moving_mean.assign(tf.fill([4], 1001.0))
    call = tf.function(layer, jit_compile=mode == "xla")
    expected, mean, _ = _batch_norm(x, layer.gamma.numpy(), layer.beta.numpy())
    np.testing.assert_allclose(call(x, training=True), expected, atol=1e-3)
    np.testing.assert_allclose(
        layer.moving_mean, 0.9 * 1001 + 0.1 * mean, rtol=1e-6
    )


def test_batch_norm_gradient_passes_through_the_statistics():
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
def test_frozen_batch_norm_uses_and_keeps_the_moving_statistics(frozen_by):
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
def test_batch_norm_has_only_the_weights_asked_for(center, scale):
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
    layer = resnet.GlobalBatchNorm(momentum=0.5, gamma_initializer="zeros")
    arguments = inspect.signature(resnet.GlobalBatchNorm).parameters
    assert set(arguments) - {"kwargs"} <= set(layer.get_config())
    copy = resnet.GlobalBatchNorm.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()


def test_batch_norm_refuses_other_ranks():
    with pytest.raises(ValueError, match=r"Received: shape \(2, 3, 4\)"):
        resnet.GlobalBatchNorm().build((2, 3, 4))


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

    Per replica arrays are concatenated, moving statistics stacked, and
    gradients of the weights summed, as an optimizer does.
    """
    strategy = tf.distribute.get_strategy()
    if num_replicas > 1:
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(num_replicas)]
        )
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
                strategy.experimental_local_results(value)
                for value in (*values, *statistics)
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
                np.split(array, context.num_replicas_in_sync)[
                    context.replica_id_in_sync_group
                ]
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
def test_replicas_normalize_as_one(replicas, number, name):
    keys = [key for key in replicas[1] if key.startswith(f"{name}_True")]
    assert len(keys) == 6
    for key in keys:
        expected = np.broadcast_to(
            replicas[1][key], replicas[number][key].shape
        )
        np.testing.assert_allclose(
            replicas[number][key], expected, rtol=1e-5, atol=1e-5, err_msg=key
        )


@pytest.mark.parametrize("number", [2, 4])
def test_unsynchronized_replicas_agree_on_the_moving_statistics(
    replicas, number
):
    x = _replica_inputs()["rank4"]
    layer = _layer(x)
    parts = [
        _batch_norm(part, layer.gamma.numpy(), layer.beta.numpy())
        for part in np.split(x, number)
    ]
    outputs, means, variances = zip(*parts, strict=True)
    result = {
        key.removeprefix("rank4_False_"): value
        for key, value in replicas[number].items()
    }
    np.testing.assert_allclose(
        result["outputs"], np.concatenate(outputs), rtol=1e-5, atol=1e-5
    )
    for key, expected in (
        ("moving_mean", 0.1 * np.mean(means, axis=0)),
        ("moving_variance", 0.9 + 0.1 * np.mean(variances, axis=0)),
    ):
        np.testing.assert_array_equal(
            result[key], result[key][:1].repeat(number, 0)
        )
        np.testing.assert_allclose(result[key][0], expected, rtol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_mean_far_from_zero_costs_no_precision(replicas, number):
    x = _replica_inputs()["large"]
    layer = _layer(x)
    outputs, mean, variance = _batch_norm(
        x, layer.gamma.numpy(), layer.beta.numpy()
    )
    for key, expected, tolerance in (
        # Without the shift by the moving mean the error is about 0.1.
        ("outputs", outputs, 1e-3),
        ("moving_mean", 0.9 * 1001 + 0.1 * mean, 1e-3),
        ("moving_variance", 0.9 + 0.1 * variance, 1e-4),
    ):
        actual = replicas[number][f"large_True_{key}"]
        np.testing.assert_allclose(
            actual, np.broadcast_to(expected, actual.shape), atol=tolerance
        )


# --- Networks


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"depth": 18, "stem": "cifar"}, 11_173_056),
        ({"depth": 18}, 11_180_736),
        ({"depth": 50}, 23_508_032),
        ({"depth": 50, "sk_ratio": 0.0625}, 35_215_584),
    ],
)
def test_parameter_counts_are_the_references(arguments, count):
    assert _count(resnet.resnet(**arguments)) == count


@pytest.mark.parametrize("depth", resnet.DEPTHS)
def test_depth_is_the_number_of_layers_in_sequence(depth):
    blocks, bottleneck = resnet.ARCHITECTURES[depth]
    # The stem's convolution and a classifier count as well.
    assert depth == 2 + sum(blocks) * (3 if bottleneck else 2)


@pytest.mark.parametrize("depth", [10, 34])
def test_every_convolution_has_its_batch_norm(depth):
    model = resnet.resnet(depth, width_multiplier=0.125)
    layers = [type(layer) for layer in model.layers]
    num_convolutions = depth - 1 + 4  # a shortcut in each group
    assert layers.count(keras.layers.Conv2D) == num_convolutions
    assert layers.count(resnet.GlobalBatchNorm) == num_convolutions


def test_layer_names_follow_the_documented_rule():
    model = resnet.resnet(
        50, width_multiplier=0.125, sk_ratio=0.0625, se_ratio=0.25
    )
    names = {"initial_conv", "initial_bn"}
    names |= {f"stem_{kind}{i}" for kind in ("conv", "bn") for i in (1, 2)}
    for group, num_blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(1, num_blocks + 1):
            parts = [f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)]
            parts += ["sk_conv1", "sk_bn1", "sk_conv2", "se_conv1", "se_conv2"]
            parts += ["shortcut_conv", "shortcut_bn"] * (block == 1)
            names |= {f"block_group{group}_block{block}_{p}" for p in parts}
    assert {layer.name for layer in model.layers if layer.weights} == names


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        ({}, [(16, 20, 8), (8, 10, 8), (8, 10, 8), (1, 2, 64)]),
        (
            {"stem": "cifar"},
            [(32, 40, 8), (32, 40, 8), (32, 40, 8), (4, 5, 64)],
        ),
        (
            {"padding": "same"},
            [(16, 20, 8), (8, 10, 8), (8, 10, 8), (1, 2, 64)],
        ),
        (
            {"depth": 50, "sk_ratio": 0.0625, "se_ratio": 0.25, "channels": 1},
            [(16, 20, 8), (8, 10, 8), (8, 10, 32), (1, 2, 256)],
        ),
        (
            {"width_multiplier": 0.3, "channels": 4, "sk_ratio": 0.0625},
            [(16, 20, 19), (8, 10, 19), (8, 10, 19), (1, 2, 154)],
        ),
        (
            {"sk_ratio": 0.5, "stem": "cifar", "padding": "same"},
            [(32, 40, 8), (32, 40, 8), (32, 40, 8), (4, 5, 64)],
        ),
    ],
)
def test_variants_have_the_expected_shapes(arguments, shapes):
    arguments = TINY | arguments
    model = resnet.resnet(**arguments)
    images = _random(2, 32, 40, arguments.get("channels", 3))
    outputs = keras.Model(model.input, resnet.endpoints(model))(images)
    assert tuple(outputs) == resnet.ENDPOINTS
    names = ("initial_conv", "initial_max_pool", "block_group1", "block_group4")
    for name, shape in zip(names, shapes, strict=True):
        assert outputs[name].shape == (2, *shape), name
    np.testing.assert_allclose(
        outputs["final_avg_pool"],
        np.mean(outputs["block_group4"], axis=(1, 2)),
        rtol=1e-4,
    )


@pytest.mark.parametrize("padding", resnet.PADDINGS)
@pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
def test_any_image_size_goes_in(padding, sk_ratio):
    model = resnet.resnet(**TINY, padding=padding, sk_ratio=sk_ratio)
    for size in [(1, 1), (33, 47), (64, 31)]:
        assert model(_random(2, *size, 3)).shape == (2, 64)


@pytest.mark.parametrize(
    ("padding", "first"), [("fixed", -3), ("same", -2), ("torch", -3)]
)
def test_padding_of_the_stem(padding, first):
    model = resnet.resnet(**TINY, channels=1, padding=padding)
    # A kernel that copies the top left pixel of its 7x7 window.
    kernel = np.zeros((7, 7, 1, 8))
    kernel[0, 0] = 1
    model.get_layer("initial_conv").set_weights([kernel])
    rows, columns = np.indices((8, 8))
    image = (10 * rows + columns + 1.0).astype("float32")
    outputs = keras.Model(model.input, resnet.endpoints(model)["initial_conv"])(
        image[None, :, :, None]
    )
    expected = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            y, x = 2 * i + first, 2 * j + first
            expected[i, j] = image[y, x] if min(y, x) >= 0 else 0
    np.testing.assert_array_equal(outputs[0, :, :, 0], expected)


@pytest.mark.parametrize(
    ("padding", "first"), [("fixed", 0), ("same", 0), ("torch", -1)]
)
def test_padding_of_the_max_pool(padding, first):
    model = resnet.resnet(**TINY, padding=padding)
    pooled = keras.Model(
        model.get_layer("initial_relu").output,
        model.get_layer("initial_max_pool").output,
    )
    image = np.random.default_rng(0).random((1, 8, 8, 8), np.float32)
    outputs = pooled(image)
    for i in range(4):
        for j in range(4):
            y, x = 2 * i + first, 2 * j + first
            window = image[:, max(y, 0) : y + 3, max(x, 0) : x + 3]
            np.testing.assert_array_equal(
                outputs[:, i, j], window.max(axis=(1, 2))
            )


@pytest.mark.parametrize(
    ("padding", "corner"), [("fixed", 1 / 4), ("same", 1.0)]
)
def test_resnet_d_shortcut_pads_odd_sizes(padding, corner):
    model = resnet.resnet(**TINY, padding=padding, sk_ratio=0.1, stem="cifar")
    pool = model.get_layer("block_group2_block1_shortcut_pool")
    ones = np.ones((1, 5, 5, 8), "float32")
    start = model.get_layer("block_group1").output
    outputs = keras.Model(start, pool.output)(ones)[0, :, :, 0].numpy()
    assert outputs.shape == (3, 3)
    # "fixed" counts its zeros in the mean, as SimCLR does.
    assert outputs[0, 0] == 1
    assert outputs[2, 2] == corner


def test_paddings_differ_on_even_sizes_with_the_same_weights():
    models = [resnet.resnet(**TINY, padding=p) for p in resnet.PADDINGS]
    for model in models[1:]:
        model.set_weights(models[0].get_weights())
    images = _random(2, 32, 32, 3)
    outputs = [model(images).numpy() for model in models]
    for first, second in itertools.combinations(outputs, 2):
        assert np.abs(first - second).max() > 1e-2 * np.abs(first).max()


@pytest.mark.parametrize(
    ("depth", "shortcuts", "groups"),
    [
        (18, "always", {1, 2, 3, 4}),
        (18, "needed", {2, 3, 4}),
        (50, "needed", {1, 2, 3, 4}),
    ],
)
def test_which_groups_project_their_shortcut(depth, shortcuts, groups):
    model = resnet.resnet(depth, width_multiplier=0.125, shortcuts=shortcuts)
    found = {
        layer.name for layer in model.layers if "shortcut_conv" in layer.name
    }
    assert found == {f"block_group{g}_block1_shortcut_conv" for g in groups}


def test_preactivation_has_the_variables_of_the_reference():
    # The number of haiku's parameters, relicv2_manifest.json.
    model = resnet.resnet(18, padding="same", preactivation=True)
    assert _count(model) == 11_178_816
    names = {layer.name for layer in model.layers}
    assert "final_bn" in names
    assert not {"initial_bn", "block_group1_block1_shortcut_bn"} & names
    resnet.freeze(model, 3)
    assert model.get_layer("final_bn").trainable
    resnet.freeze(model, 4)
    assert not model.trainable_variables


def test_base_filters_are_of_the_stem_and_the_groups():
    model = resnet.resnet(
        10, base_filters=(8, 16, 24, 32, 40), width_multiplier=2
    )
    names = ["initial_conv"] + [
        f"block_group{g}_block1_conv2" for g in range(1, 5)
    ]
    filters = [model.get_layer(name).filters for name in names]
    assert filters == [16, 32, 48, 64, 80]


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_makes_blocks_the_identity(depth):
    model = resnet.resnet(depth, width_multiplier=0.125, stem="cifar")
    names = ["block1_relu", "block1_shortcut_bn", "block2_relu"]
    outputs = [model.get_layer(f"block_group2_{name}").output for name in names]
    first, shortcut, second = keras.Model(model.input, outputs)(
        _random(4, 16, 16, 3), training=True
    )
    np.testing.assert_array_equal(first, np.maximum(shortcut, 0))
    np.testing.assert_array_equal(second, first)
    assert np.any(np.asarray(first) > 0)


def test_without_zero_init_residual_branches_count():
    model = resnet.resnet(**TINY, zero_init_residual=False)
    norms = [x for x in model.layers if isinstance(x, resnet.GlobalBatchNorm)]
    for layer in norms:
        np.testing.assert_array_equal(layer.gamma, np.ones_like(layer.gamma))


def _parts(model, *tensors):
    """Evaluates symbolic tensors of a model on random images."""
    return [
        np.asarray(value)
        for value in keras.Model(model.input, list(tensors))(
            _random(2, 8, 8, 3), training=True
        )
    ]


def test_selective_kernel_is_a_softmax_over_two_streams():
    model = resnet.resnet(
        50, width_multiplier=0.125, stem="cifar", sk_ratio=0.1
    )
    name = "block_group1_block1"
    streams, squeezed, logits, mixed = _parts(
        model,
        model.get_layer(f"{name}_relu2").output,
        model.get_layer(f"{name}_sk_conv1").input,
        model.get_layer(f"{name}_sk_conv2").output,
        model.get_layer(f"{name}_conv3").input,
    )
    assert model.get_layer(f"{name}_sk_conv1").filters == 32
    streams = np.stack(np.split(streams, 2, axis=-1))
    np.testing.assert_allclose(
        squeezed, streams.sum(0).mean((1, 2), keepdims=True), rtol=1e-5
    )
    logits = np.stack(np.split(logits, 2, axis=-1))
    weights = np.exp(logits) / np.exp(logits).sum(0)
    np.testing.assert_allclose(
        mixed, (streams * weights).sum(0), rtol=1e-5, atol=1e-6
    )


def test_squeeze_excite_scales_channels():
    model = resnet.resnet(
        **TINY, stem="cifar", se_ratio=0.25, zero_init_residual=False
    )
    name = "block_group2_block1"
    reduce, expand = (model.get_layer(f"{name}_se_conv{i}") for i in (1, 2))
    assert (reduce.filters, expand.filters) == (4, 16)
    reduce.bias.assign(_random(4))
    expand.bias.assign(_random(16))
    inputs, outputs = _parts(
        model,
        model.get_layer(f"{name}_bn2").output,
        model.get_layer(f"{name}_add").input[1],
    )
    hidden = inputs.mean((1, 2)) @ reduce.kernel.numpy()[0, 0]
    hidden = np.maximum(hidden + reduce.bias.numpy(), 0)
    excited = hidden @ expand.kernel.numpy()[0, 0] + expand.bias.numpy()
    scale = 1 / (1 + np.exp(-excited))
    np.testing.assert_allclose(
        outputs, inputs * scale[:, None, None], rtol=1e-4, atol=1e-6
    )


def test_kernels_differ_and_have_the_variance_of_fan_in():
    model = resnet.resnet(18, stem="cifar")
    names = [f"block_group3_block2_conv{i}" for i in (1, 2)]
    first, second = (model.get_layer(n).kernel.numpy() for n in names)
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(first.std(), (9 * 256) ** -0.5, rtol=1e-2)


def test_features_are_float32_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = resnet.resnet(**TINY, stem="cifar")
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("block_group4").output.dtype == "bfloat16"
    assert {v.dtype for v in model.variables} == {"float32"}
    assert model(_random(2, 8, 8, 3), training=True).dtype == tf.float32


def test_momentum_and_global_bn_reach_every_layer():
    model = resnet.resnet(
        50,
        width_multiplier=0.125,
        sk_ratio=0.0625,
        global_bn=False,
        batch_norm_momentum=0.8,
    )
    norms = [x for x in model.layers if isinstance(x, resnet.GlobalBatchNorm)]
    assert {(x.momentum, x.synchronized) for x in norms} == {(0.8, False)}


def test_a_model_comes_back_from_its_config_and_weights():
    model = resnet.resnet(**TINY, sk_ratio=0.1, se_ratio=0.1)
    copy = keras.Model.from_config(model.get_config())
    copy.set_weights(model.get_weights())
    images = _random(2, 32, 32, 3)
    np.testing.assert_array_equal(copy(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, "`depth` must be one of"),
        ({"stem": "stl"}, "`stem` must be one of"),
        ({"padding": "valid"}, "Received: 'valid'"),
        ({"width_multiplier": 0}, "width_multiplier=0"),
        ({"se_ratio": -1.0}, "se_ratio=-1.0"),
        ({"shortcuts": "never"}, "`shortcuts` must be one of"),
        ({"base_filters": (64, 64)}, r"Received: \(64, 64\)"),
        ({"preactivation": True, "padding": "torch"}, "goes without"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet.resnet(**TINY | arguments)


# --- Freezing


def _group(variable):
    """Returns 0 for the stem's variables, else the number of the group."""
    name = variable.path.removeprefix("block_group")
    return int(name[0]) if name != variable.path else 0


@pytest.mark.parametrize("after_block", [-1, 0, 1, 2, 3, 4])
def test_frozen_parts_do_not_change_by_a_bit(after_block):
    model = resnet.resnet(**TINY, stem="cifar", zero_init_residual=False)
    resnet.freeze(model, after_block)
    readout = keras.layers.Dense(1)
    readout.build((None, 64))
    variables = model.trainable_variables + readout.trainable_variables
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1)
    optimizer.build(variables)
    before = [v.numpy() for v in model.variables]

    @tf.function
    def step(images):
        with tf.GradientTape() as tape:
            outputs = readout(model(images, training=True))
            loss = tf.reduce_mean(tf.square(outputs - images[:, :1, 0, 0]))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, variables), variables, strict=True)
        )

    for _ in range(3):
        step(_random(4, 16, 16, 3) * 2)
    for variable, value in zip(model.variables, before, strict=True):
        changed = not np.array_equal(variable, value)
        assert changed == (_group(variable) > after_block), variable.path


def test_freeze_can_be_taken_back_and_checks_its_argument():
    model = resnet.resnet(**TINY)
    everything = len(model.trainable_variables)
    resnet.freeze(model, 4)
    assert not model.trainable_variables
    resnet.freeze(model, -1)
    assert len(model.trainable_variables) == everything
    with pytest.raises(ValueError, match="Received: 5"):
        resnet.freeze(model, 5)


if __name__ == "__main__":
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]),
    )
    np.savez(sys.argv[2], **_run_replicas(int(sys.argv[1])))


@pytest.mark.parametrize("jit_compile", [False, True])
def test_recomputing_changes_neither_gradients_nor_statistics(jit_compile):
    images = tf.random.stateless_uniform([8, 16, 16, 3], [0, 1])
    found = []
    for recompute in (False, True):
        keras.utils.set_random_seed(0)
        network = resnet.resnet(10, width_multiplier=0.125, stem="cifar")
        call = network
        if recompute:
            call = resnet.recomputing(network)

        @tf.function(jit_compile=jit_compile)
        def step(images, call=call, network=network):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(call(images, training=True) ** 2)
            return loss, tape.gradient(loss, network.trainable_variables)

        loss, gradients = step(images)
        found.append([loss, *gradients, *network.non_trainable_variables])
        with resnet.hold_statistics():
            before = [v.numpy() for v in network.non_trainable_variables]
            network(images, training=True)
            for a, b in zip(
                before, network.non_trainable_variables, strict=True
            ):
                np.testing.assert_array_equal(a, b)
    assert len(found[0]) > 50
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


_PEAK = """
import resource, sys
import tensorflow as tf
import resnet

network = resnet.resnet(34, stem="cifar")
call = network if sys.argv[1] == "kept" else resnet.recomputing(network)


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
def test_recomputing_takes_less_memory():
    kept, recomputed = (
        int(processes.run(sys.executable, "-c", _PEAK, which).stdout)
        for which in ("kept", "recomputed")
    )
    assert recomputed < 0.6 * kept


def test_an_encoder_without_blocks_cannot_be_computed_again():
    images = keras.Input((8, 8, 3))
    network = keras.Model(images, keras.layers.Flatten()(images))
    with pytest.raises(ValueError, match="Only the blocks of ResNets"):
        resnet.recomputing(network)


def test_gradients_of_gradients_compile_in_half_precision():
    """Those of WPC's penalty, on TPUs and GPUs."""
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        encoder = resnet.resnet(
            10, width_multiplier=0.125, differentiable_twice=True
        )
    finally:
        keras.mixed_precision.set_global_policy("float32")

    @tf.function(jit_compile=True)
    def second(images):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(images)
                scores = tf.reduce_sum(encoder(images, training=True) ** 2)
            norm = tf.reduce_sum(inner.gradient(scores, images) ** 2)
        return outer.gradient(norm, encoder.trainable_variables[0])

    gradient = second(tf.random.normal([2, 32, 32, 3])).numpy()
    assert np.isfinite(gradient).all()
    assert gradient.any()
