# SPDX-License-Identifier: Apache-2.0
"""Tests of resnet.py."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import resnet

TINY = {"depth": 10, "width_multiplier": 0.125}


def _random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _count(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


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
def test_resnet_parameter_count_equals_reference(arguments, count):
    assert _count(resnet.resnet(**arguments)) == count


@pytest.mark.parametrize("depth", resnet.DEPTHS)
def test_architectures_depth_equals_number_of_layers_in_sequence(depth):
    blocks, bottleneck = resnet.ARCHITECTURES[depth]
    # The stem's convolution and a classifier count as well.
    assert depth == 2 + sum(blocks) * (3 if bottleneck else 2)


@pytest.mark.parametrize("depth", [10, 34])
def test_resnet_has_one_batch_norm_per_convolution(depth):
    model = resnet.resnet(depth, width_multiplier=0.125)
    layers = [type(layer) for layer in model.layers]
    num_convolutions = depth - 1 + 4  # a shortcut in each group
    assert layers.count(keras.layers.Conv2D) == num_convolutions
    assert layers.count(resnet.GlobalBatchNorm) == num_convolutions


def test_resnet_layer_names_follow_documented_rule():
    model = resnet.resnet(50, width_multiplier=0.125, sk_ratio=0.0625, se_ratio=0.25)
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
def test_endpoints_of_variants_have_expected_shapes(arguments, shapes):
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
def test_resnet_accepts_any_image_size(padding, sk_ratio):
    model = resnet.resnet(**TINY, padding=padding, sk_ratio=sk_ratio)
    for size in [(1, 1), (33, 47), (64, 31)]:
        assert model(_random(2, *size, 3)).shape == (2, 64)


@pytest.mark.parametrize(("padding", "first"), [("fixed", -3), ("same", -2), ("torch", -3)])
def test_resnet_stem_padding_starts_windows_at_expected_pixel(padding, first):
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


@pytest.mark.parametrize(("padding", "first"), [("fixed", 0), ("same", 0), ("torch", -1)])
def test_resnet_max_pool_padding_starts_windows_at_expected_pixel(padding, first):
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
            np.testing.assert_array_equal(outputs[:, i, j], window.max(axis=(1, 2)))


@pytest.mark.parametrize(("padding", "corner"), [("fixed", 1 / 4), ("same", 1.0)])
def test_resnet_d_shortcut_odd_size_is_padded(padding, corner):
    model = resnet.resnet(**TINY, padding=padding, sk_ratio=0.1, stem="cifar")
    pool = model.get_layer("block_group2_block1_shortcut_pool")
    ones = np.ones((1, 5, 5, 8), "float32")
    start = model.get_layer("block_group1").output
    outputs = keras.Model(start, pool.output)(ones)[0, :, :, 0].numpy()
    assert outputs.shape == (3, 3)
    # "fixed" counts its zeros in the mean, as SimCLR does.
    assert outputs[0, 0] == 1
    assert outputs[2, 2] == corner


def test_paddings_even_size_same_weights_give_different_features():
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
def test_shortcuts_project_in_expected_groups(depth, shortcuts, groups):
    model = resnet.resnet(depth, width_multiplier=0.125, shortcuts=shortcuts)
    found = {layer.name for layer in model.layers if "shortcut_conv" in layer.name}
    assert found == {f"block_group{g}_block1_shortcut_conv" for g in groups}


def test_preactivation_has_variables_of_reference():
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


def test_base_filters_set_filters_of_stem_and_groups():
    model = resnet.resnet(10, base_filters=(8, 16, 24, 32, 40), width_multiplier=2)
    names = ["initial_conv"] + [f"block_group{g}_block1_conv2" for g in range(1, 5)]
    filters = [model.get_layer(name).filters for name in names]
    assert filters == [16, 32, 48, 64, 80]


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_blocks_start_as_identity(depth):
    model = resnet.resnet(depth, width_multiplier=0.125, stem="cifar")
    names = ["block1_relu", "block1_shortcut_bn", "block2_relu"]
    outputs = [model.get_layer(f"block_group2_{name}").output for name in names]
    first, shortcut, second = keras.Model(model.input, outputs)(
        _random(4, 16, 16, 3), training=True
    )
    np.testing.assert_array_equal(first, np.maximum(shortcut, 0))
    np.testing.assert_array_equal(second, first)
    assert np.any(np.asarray(first) > 0)


def test_without_zero_init_residual_all_gammas_are_one():
    model = resnet.resnet(**TINY, zero_init_residual=False)
    norms = [x for x in model.layers if isinstance(x, resnet.GlobalBatchNorm)]
    for layer in norms:
        np.testing.assert_array_equal(layer.gamma, np.ones_like(layer.gamma))


def _parts(model, *tensors):
    """Evaluates symbolic tensors of a model on random images."""
    return [
        np.asarray(value)
        for value in keras.Model(model.input, list(tensors))(_random(2, 8, 8, 3), training=True)
    ]


def test_selective_kernel_mixes_streams_by_softmax():
    model = resnet.resnet(50, width_multiplier=0.125, stem="cifar", sk_ratio=0.1)
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
    np.testing.assert_allclose(squeezed, streams.sum(0).mean((1, 2), keepdims=True), rtol=1e-5)
    logits = np.stack(np.split(logits, 2, axis=-1))
    weights = np.exp(logits) / np.exp(logits).sum(0)
    np.testing.assert_allclose(mixed, (streams * weights).sum(0), rtol=1e-5, atol=1e-6)


def test_squeeze_excite_scales_channels_by_sigmoid():
    model = resnet.resnet(**TINY, stem="cifar", se_ratio=0.25, zero_init_residual=False)
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
    np.testing.assert_allclose(outputs, inputs * scale[:, None, None], rtol=1e-4, atol=1e-6)


def test_initial_kernels_differ_and_have_fan_in_variance():
    model = resnet.resnet(18, stem="cifar")
    names = [f"block_group3_block2_conv{i}" for i in (1, 2)]
    first, second = (model.get_layer(n).kernel.numpy() for n in names)
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(first.std(), (9 * 256) ** -0.5, rtol=1e-2)


def test_resnet_mixed_precision_features_are_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = resnet.resnet(**TINY, stem="cifar")
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("block_group4").output.dtype == "bfloat16"
    assert {v.dtype for v in model.variables} == {"float32"}
    assert model(_random(2, 8, 8, 3), training=True).dtype == tf.float32


def test_batch_norm_arguments_reach_every_layer():
    model = resnet.resnet(
        50,
        width_multiplier=0.125,
        sk_ratio=0.0625,
        global_bn=False,
        batch_norm_momentum=0.8,
    )
    norms = [x for x in model.layers if isinstance(x, resnet.GlobalBatchNorm)]
    assert {(x.momentum, x.synchronized) for x in norms} == {(0.8, False)}


def test_resnet_from_config_with_weights_computes_same_features():
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
def test_resnet_argument_out_of_range_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet.resnet(**TINY | arguments)


# --- Freezing


def _group(variable):
    """Returns 0 for the stem's variables, else the number of the group."""
    name = variable.path.removeprefix("block_group")
    return int(name[0]) if name != variable.path else 0


@pytest.mark.parametrize("after_block", [-1, 0, 1, 2, 3, 4])
def test_freeze_training_changes_only_later_parts(after_block):
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
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for _ in range(3):
        step(_random(4, 16, 16, 3) * 2)
    for variable, value in zip(model.variables, before, strict=True):
        changed = not np.array_equal(variable, value)
        assert changed == (_group(variable) > after_block), variable.path


def test_freeze_minus_one_unfreezes_and_five_raises():
    model = resnet.resnet(**TINY)
    everything = len(model.trainable_variables)
    resnet.freeze(model, 4)
    assert not model.trainable_variables
    resnet.freeze(model, -1)
    assert len(model.trainable_variables) == everything
    with pytest.raises(ValueError, match="Received: 5"):
        resnet.freeze(model, 5)


def test_differentiable_twice_bfloat16_second_gradient_compiles():
    """Those of WPC's penalty, on TPUs and GPUs."""
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        encoder = resnet.resnet(10, width_multiplier=0.125, differentiable_twice=True)
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
