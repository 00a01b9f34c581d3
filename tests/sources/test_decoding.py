# SPDX-License-Identifier: Apache-2.0
"""Tests of the crops of `decoding.py`; streams test the rest."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import data_util
from contrastive.sources import decoding

SIZE = 32


def _picture(height=60, width=80):
    y, x = np.mgrid[:height, :width]
    picture = np.stack([2 * y, 2 * x, y + x], axis=-1)
    return picture.astype(np.uint8)


ENCODERS = {
    "jpeg": functools.partial(tf.io.encode_jpeg, quality=100),
    "png": tf.io.encode_png,
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_decoded_crop_is_the_box_of_its_key(encoder):
    augmentation = data_util.simclr_augmentation(SIZE)
    encoded = ENCODERS[encoder](_picture())
    keys = data_util.example_keys(0, 0, tf.range(6), 0)
    boxes = data_util.random_crop_boxes(keys, 60, 80, augmentation)
    crops = (
        tf.data.Dataset.from_tensor_slices(keys)
        .map(lambda key: decoding.decode_crop(encoded, key, augmentation))
        .batch(6)
        .get_single_element()
    )
    assert crops.dtype == tf.uint8
    for crop, (y, x, h, w) in zip(crops, boxes.numpy(), strict=True):
        part = _picture()[y : y + h, x : x + w]
        expected = tf.image.resize(part, [SIZE, SIZE], "bicubic")
        # JPEG itself is off by a few levels, most at the borders of chroma.
        assert np.abs(np.float32(crop) - expected).mean() < 2.0


@pytest.mark.parametrize("channels", [1, 3])
def test_decoded_center_crop_is_that_of_eval_images(channels):
    picture = _picture()[..., :channels]
    crop = decoding.decode_center_crop(tf.io.encode_png(picture), SIZE, channels=channels)
    expected = data_util.eval_images(picture[np.newaxis], SIZE, crop_proportion=0.875)
    assert crop.shape == (SIZE, SIZE, channels)
    np.testing.assert_allclose(crop / 255, expected[0], atol=0.51 / 255)
