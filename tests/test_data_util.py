# SPDX-License-Identifier: Apache-2.0
"""Tests of `data_util`: against the reference's numbers, and properties.

Golden numbers: `golden/augmentation.npz`, see `golden/README.md`.
"""

import functools

import numpy as np
import pytest
import tensorflow as tf

import data_util

SIZE = 32
DRAWS = 20  # views of each image behind the golden statistics
STANDARD_ERRORS = 4.5  # 99 comparisons: one in 1,500 runs fails by chance

PLAIN = {
    "crop": False,
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
}


@pytest.fixture(scope="module")
def reference(golden):
    return golden("augmentation.npz")


@pytest.fixture(scope="module")
def images(reference):
    return reference["images"]


def _keys(count, *, seed=0, epoch=0, view=0):
    return data_util.example_keys(seed, epoch, tf.range(count), view)


def _augment(images, keys, augmentation):
    augment = functools.partial(data_util.augment, augmentation=augmentation)
    return tf.function(augment, jit_compile=True)(images, keys).numpy()


def _channels_first(images):
    x = tf.image.convert_image_dtype(images, tf.float32)
    return tf.transpose(x, [0, 3, 1, 2])


# Random numbers.


def test_uniform_numbers_are_uniform():
    counts = np.histogram(
        data_util.uniform(_keys(100_000)[:, tf.newaxis], tf.range(10)),
        bins=100,
        range=(0, 1),
    )[0]
    # Chi-squared with 99 degrees of freedom: mean 99, deviation 14.
    statistic = np.sum((counts - 10_000) ** 2 / 10_000)
    assert 50 < statistic < 160


@pytest.mark.parametrize(
    "neighbour",
    [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"draw": 1}, {"shift": 1}],
)
def test_neighbouring_draws_are_independent(neighbour):
    count = 100_000
    shift, draw = neighbour.pop("shift", 0), neighbour.pop("draw", 0)
    first = data_util.uniform(_keys(count), 0).numpy()
    second = data_util.uniform(_keys(count, **neighbour), draw).numpy()
    second = np.roll(second, shift)
    assert np.mean(first == second) < 1e-3
    # 8 x 8 cells of the unit square: chi-squared, 63 degrees of freedom.
    counts = np.histogram2d(first, second, bins=8, range=[[0, 1]] * 2)[0]
    expected = count / 64
    assert 25 < np.sum((counts - expected) ** 2 / expected) < 115


def test_keys_are_a_function_of_each_part():
    parts = dict(seed=3, epoch=2, example_ids=tf.constant([5, 9]), view=1)
    keys = data_util.example_keys(**parts)
    assert keys.dtype == tf.uint32
    for name in parts:
        changed = data_util.example_keys(**(parts | {name: parts[name] + 1}))
        assert np.all(keys != changed), name
    as_tensors = {name: tf.cast(v, tf.int64) for name, v in parts.items()}
    np.testing.assert_array_equal(keys, data_util.example_keys(**as_tensors))


def test_keys_take_seeds_of_any_size():
    ids = tf.range(4)
    large = data_util.example_keys(2**40 + 7, 0, ids, 0)
    np.testing.assert_array_equal(large, data_util.example_keys(7, 0, ids, 0))


def test_draws_stay_the_same_from_version_to_version():
    # Else a resumed run would go on with other views than it began with.
    keys = data_util.example_keys(1, 2, tf.constant([3, 4]), 5)
    np.testing.assert_array_equal(keys, [2450771423, 721109436])
    np.testing.assert_allclose(data_util.uniform(keys, 6), [0.88467467, 0.89463425], atol=1e-7)


# Single operations.


@pytest.mark.parametrize("index", [1, 2, 3])
def test_crop_and_resize_is_tensorflows(reference, images, index):
    box = tf.constant(reference["resize_boxes"][index][np.newaxis], tf.int32)
    x = data_util._crop_and_resize(np.float32(images[:2] / 255), box, SIZE)
    np.testing.assert_allclose(
        tf.transpose(x, [0, 2, 3, 1]),
        reference[f"resize_bicubic_{index}"],
        atol=1e-5,
    )


@pytest.mark.parametrize("size", [24, 60])
def test_crop_and_resize_takes_a_box_for_each_image(images, size):
    boxes = tf.constant([[0, 3, 20, 7], [12, 0, 20, 32]])
    x = data_util._crop_and_resize(np.float32(images[:2] / 255), boxes, size)
    for i, (top, left, height, width) in enumerate(boxes.numpy()):
        crop = images[i, top : top + height, left : left + width] / 255.0
        expected = tf.image.resize(crop, [size, size], "bicubic")
        np.testing.assert_allclose(tf.transpose(x[i], [1, 2, 0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shift", "factor"),
    [
        ("adjust_hue_-0.2", -0.2, 1.0),
        ("adjust_hue_0.1", 0.1, 1.0),
        ("adjust_saturation_0.2", 0.0, 0.2),
        ("adjust_saturation_1.8", 0.0, 1.8),
    ],
)
def test_hue_and_saturation_are_tensorflows(reference, images, name, shift, factor):
    x = _adjust_hue_and_saturation(images[:2], shift, factor)
    np.testing.assert_allclose(x, reference[name], atol=1e-5)


def _adjust_hue_and_saturation(images, shift, factor):
    amounts = (tf.fill([len(images), 1, 1, 1], x) for x in (shift, factor))
    x = data_util._adjust_hue_and_saturation(_channels_first(images), *amounts)
    return tf.transpose(x, [0, 2, 3, 1])


@pytest.mark.parametrize("shift", [-0.5, -0.35, 0.0, 0.35, 0.5])
def test_every_hue_is_shifted(shift):
    # All colours of 11 levels a channel, the corners of the cube among them.
    levels = np.linspace(0, 1, 11, dtype=np.float32)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    image = np.resize(colors, [2, SIZE, SIZE, 3])
    x = _adjust_hue_and_saturation(image, shift, 1.0)
    np.testing.assert_allclose(x, tf.image.adjust_hue(image, shift), atol=1e-5)


@pytest.mark.parametrize("mode", data_util.BRIGHTNESS_MODES)
def test_color_jitter_is_tensorflows_in_every_order(images, mode):
    count = 200
    augmentation = data_util.Augmentation(
        size=SIZE, **PLAIN | {"jitter_probability": 0.8}, brightness_mode=mode
    )
    keys = _keys(count)
    views = _augment(images[:count], keys, augmentation)

    brightness = {
        "multiplicative": ((0.2, 1.8), tf.multiply),
        "additive": ((-0.8, 0.8), tf.add),
    }
    operations = [
        (data_util._BRIGHTNESS, *brightness[mode]),
        (data_util._CONTRAST, (0.2, 1.8), tf.image.adjust_contrast),
        (data_util._SATURATION, (0.2, 1.8), tf.image.adjust_saturation),
        (data_util._HUE, (-0.2, 0.2), tf.image.adjust_hue),
    ]
    draws = [draw for draw, _, _ in operations]
    places = data_util.uniform(keys[:, tf.newaxis], data_util._ORDER + tf.constant(draws))
    orders = np.argsort(places, axis=1)
    assert len(np.unique(orders, axis=0)) == 24
    jitters = data_util.uniform(keys, data_util._JITTER) < 0.8
    expected = np.float32(images[:count] / 255)
    for i in np.flatnonzero(jitters):
        for draw, (low, high), function in (operations[j] for j in orders[i]):
            amount = data_util.uniform(keys[i], draw, low, high)
            changed = function(expected[i], amount)
            expected[i] = tf.clip_by_value(changed, 0.0, 1.0)
    difference = np.abs(views - expected)
    # A hue may magnify rounding where there is nearly no colour.
    assert np.mean(difference > 1e-4) < 1e-3
    assert difference.mean() < 1e-5


def test_grayscale_is_tensorflows(reference, images):
    augmentation = data_util.Augmentation(size=SIZE, **PLAIN | {"grayscale_probability": 1.0})
    views = _augment(images[:2], _keys(2), augmentation)
    np.testing.assert_allclose(views, reference["grayscale"], atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_gray_pixels_have_no_hue(level):
    grays = np.full([2, SIZE, SIZE, 3], level, np.float32)
    changed = _adjust_hue_and_saturation(grays, 0.3, 1.5)
    np.testing.assert_allclose(changed, grays, atol=1e-7)


@pytest.mark.parametrize(("kernel", "sigma"), [(3, 1.0), (22, 2.0)])
def test_gaussian_blur_is_simclrs(reference, kernel, sigma):
    x = _channels_first(reference["gaussian_input"])
    x = data_util._gaussian_blur(x, tf.fill([2, 1, 1, 1], sigma), kernel // 2)
    np.testing.assert_allclose(
        tf.transpose(x, [0, 2, 3, 1]),
        reference[f"gaussian_k{kernel}_s{sigma}"],
        atol=1e-5,
    )


def test_center_crop_is_simclrs(reference, images):
    x = data_util.eval_images(images[:2], SIZE, crop_proportion=0.875)
    expected = np.clip(reference["eval_crop_32"], 0.0, 1.0)
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_center_crop_of_odd_rest_leaves_more_at_the_top_left():
    images = np.random.default_rng(0).integers(0, 256, [2, 41, 41, 3], np.uint8)
    x = data_util.eval_images(images, 36, crop_proportion=0.875)
    np.testing.assert_allclose(x, images[:, 3:39, 3:39] / 255, atol=1e-6)


def test_eval_images_of_the_right_size_stay_as_they_are(images):
    x = data_util.eval_images(images, SIZE)
    np.testing.assert_allclose(x, images / 255.0, atol=1e-6)


def test_eval_images_of_another_size_are_resized(images):
    x = data_util.eval_images(images[:4], 40)
    expected = tf.image.resize(images[:4] / 255.0, [40, 40], "bicubic")
    np.testing.assert_allclose(x, np.clip(expected, 0, 1), atol=1e-5)


# Distributions.


@pytest.mark.parametrize("shape", [(32, 32), (224, 224), (375, 500)])
def test_crop_boxes_have_the_distribution_of_tensorflows(reference, shape):
    name = "{}x{}".format(*shape)
    boxes = data_util.random_crop_boxes(_keys(20_000), *shape, data_util.simclr_augmentation(SIZE))
    y, x, height, width = boxes.numpy().T
    columns = [y, x, height, width, height * width]
    for column, (thresholds, shares) in zip(columns, reference[f"boxes|{name}"], strict=True):
        ours = [np.mean(column <= threshold) for threshold in thresholds]
        # Kolmogorov-Smirnov, two samples of 20,000: 0.0195 has p = 0.001.
        assert np.max(np.abs(ours - shares)) < 0.0195
    mean, deviation = reference[f"box_area|{name}"]
    error = deviation * np.sqrt(2 / 20_000)
    assert abs(columns[-1].mean() - mean) < 4 * error
    assert np.all((y >= 0) & (y + height <= shape[0]))
    assert np.all((x >= 0) & (x + width <= shape[1]))


def test_crop_is_the_whole_image_where_no_box_is_allowed():
    augmentation = data_util.Augmentation(size=SIZE, crop_area=(0.9, 1), crop_aspect=(1, 1))
    boxes = data_util.random_crop_boxes(_keys(3), 20, 30, augmentation)
    np.testing.assert_array_equal(boxes, [[0, 0, 20, 30]] * 3)
    with pytest.raises(ValueError, match="must reach 0.1"):
        data_util.Augmentation(size=SIZE, crop_area=(0.01, 0.09))


def _statistics(x):
    """Returns statistics of views `[n, h, w, 3]`, in the golden order."""
    low, high = x.min(axis=-1), x.max(axis=-1)
    saturation = (high - low) / np.maximum(high, 1e-9)
    return np.stack(
        [
            x.mean(axis=(1, 2, 3)),
            x.std(axis=(1, 2, 3)),
            saturation.mean(axis=(1, 2)),
            np.abs(np.diff(x, axis=2)).mean(axis=(1, 2, 3)),
            np.abs(np.diff(x, axis=1)).mean(axis=(1, 2, 3)),
            (high - low).max(axis=(1, 2)) < 1e-5,
            *np.moveaxis(x.mean(axis=(1, 2)), -1, 0),
        ],
        axis=-1,
    )


def _single(**strength):
    none = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    settings = {"size": SIZE} | PLAIN | none | strength
    return data_util.Augmentation(**settings | {"jitter_probability": 1.0})


_simclr = functools.partial(data_util.simclr_augmentation, SIZE, use_blur=False)
_byol = functools.partial(data_util.byol_augmentation, SIZE, crop=False)


@pytest.mark.parametrize(
    ("name", "augmentation"),
    [
        ("simclr|train_s0.5", _simclr(strength=0.5)),
        ("simclr|train_s1.0", _simclr()),
        ("simclr|train_s0", _simclr(strength=0, grayscale_probability=0)),
        ("simclr|color_only_s1.0", _simclr(crop=False, flip_probability=0)),
        (
            "simclr|v1_train_s0.5",
            _simclr(strength=0.5, brightness_mode="additive"),
        ),
        ("simclr|op_brightness", _single(brightness=0.8)),
        ("simclr|op_contrast", _single(contrast=0.8)),
        ("simclr|op_saturation", _single(saturation=0.8)),
        ("simclr|op_hue", _single(hue=0.2)),
        ("byol|view1", _byol(view=0)),
        ("byol|view2", _byol(view=1)),
    ],
)
def test_views_have_the_statistics_of_the_reference(reference, images, name, augmentation):
    keys = data_util.example_keys(
        11,
        tf.tile(tf.range(DRAWS), [len(images)]),
        tf.repeat(tf.range(len(images)), DRAWS),
        0,
    )
    views = _augment(np.repeat(images, DRAWS, axis=0), keys, augmentation)
    ours = _statistics(views).reshape(len(images), DRAWS, -1)
    # Both averages are over the same images, so that only draws differ.
    error = np.sqrt(2 * ours.var(axis=1, ddof=1).mean(axis=0) / ours[..., 0].size)
    difference = ours.mean(axis=(0, 1)) - reference[name]
    assert np.all(np.abs(difference) <= STANDARD_ERRORS * error + 1e-5)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("flip_probability", lambda x: x[:, :, ::-1]),
        ("solarize_probability", lambda x: np.where(x < 0.5, x, 1 - x)),
        ("grayscale_probability", tf.image.rgb_to_grayscale),
    ],
)
def test_operation_happens_as_often_as_its_probability_says(images, name, changed):
    count = 2000
    settings = PLAIN | {name: 0.3}
    augmentation = data_util.Augmentation(size=SIZE, **settings)
    image = np.float32(images[:1] / 255)
    views = _augment(np.repeat(image, count, axis=0), _keys(count), augmentation)
    is_plain = np.all(np.abs(views - image) < 1e-6, axis=(1, 2, 3))
    is_changed = np.all(np.abs(views - changed(image)) < 1e-6, axis=(1, 2, 3))
    assert np.all(is_plain ^ is_changed)
    assert abs(is_changed.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count)


# Views as wholes.


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_are_float_images_in_unit_range(channels):
    images = np.random.default_rng(0).integers(0, 256, [8, 40, 50, channels], np.uint8)
    augmentation = data_util.simclr_augmentation(SIZE, solarize_probability=0.5)
    views = _augment(images, _keys(8), augmentation)
    assert views.shape == (8, SIZE, SIZE, channels)
    assert views.dtype == np.float32
    assert views.min() >= 0.0
    assert views.max() <= 1.0
    assert np.all(views.std(axis=(1, 2, 3)) > 0)


def test_one_channel_gets_brightness_and_contrast_only(images):
    augmentation = _single(saturation=0.8, hue=0.2)
    grays = images[:4, :, :, :1]
    views = _augment(grays, _keys(4), augmentation)
    np.testing.assert_allclose(views, grays / 255, atol=1e-6)
    views = _augment(grays, _keys(4), _single(brightness=0.8, contrast=0.8))
    assert np.all(np.abs(views - grays / 255).max(axis=(1, 2, 3)) > 0.01)


def test_uint8_and_float_images_give_the_same_view(images):
    augmentation = data_util.simclr_augmentation(SIZE)
    from_bytes = _augment(images[:4], _keys(4), augmentation)
    from_floats = _augment(np.float32(images[:4] / 255), _keys(4), augmentation)
    np.testing.assert_allclose(from_bytes, from_floats, atol=1e-5)


def test_plain_augmentation_is_the_identity(images):
    augmentation = data_util.Augmentation(size=SIZE, **PLAIN)
    views = _augment(images[:4], _keys(4), augmentation)
    np.testing.assert_allclose(views, images[:4] / 255, atol=1e-6)


def test_eager_graph_and_xla_agree(images):
    augmentation = data_util.byol_augmentation(SIZE, view=1)
    augment = functools.partial(data_util.augment, augmentation=augmentation)
    arguments = tf.constant(images[:64]), _keys(64)
    eager = augment(*arguments)
    # 1e-4: XLA orders sums in its own way, before a hue may magnify them.
    for jit in (False, True):
        compiled = tf.function(augment, jit_compile=jit)(*arguments)
        difference = np.abs(eager - compiled)
        assert np.mean(difference > 1e-4) < 1e-3
        assert difference.mean() < 1e-5


def test_a_view_does_not_depend_on_its_batch(images):
    augmentation = data_util.simclr_augmentation(SIZE)
    batch = _augment(images[:8], _keys(8), augmentation)
    part = _augment(images[5:7], _keys(8)[5:7], augmentation)
    np.testing.assert_allclose(batch[5:7], part, atol=1e-5)


# What is refused.


def test_images_of_another_size_are_refused_without_crop(images):
    augmentation = data_util.Augmentation(size=48, crop=False)
    with pytest.raises(ValueError, match="48 x 48 pixels.*Received: 32 x 32"):
        data_util.augment(images[:2], _keys(2), augmentation)
