# SPDX-License-Identifier: Apache-2.0
"""Tests of the estimates of the foreground in `masks.py`."""

import numpy as np
import pytest
import skimage
import tensorflow as tf

from contrastive.config import choices
from contrastive.sources import masks as saliency


def _square(channels, size=(48, 40)):
    """Returns a bright, textured square, left of the middle, of dark images."""
    random = np.random.default_rng(0)
    images = random.integers(20, 40, (2, *size, channels))
    images[:, 8:26, 4:20] = random.integers(150, 255, (2, 18, 16, channels))
    inside = np.zeros(size, bool)
    inside[8:26, 4:20] = True
    return images.astype(np.uint8), inside


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", saliency.ESTIMATORS)
def test_foreground_is_the_object(name, channels):
    images, inside = _square(channels)
    estimate = saliency.ESTIMATORS[name](images).numpy()
    assert estimate.dtype == np.float32
    np.testing.assert_allclose(estimate.min((1, 2)), 0)
    np.testing.assert_allclose(estimate.max((1, 2)), 1)
    masks = saliency.foreground(estimate).numpy()
    assert masks.dtype == np.uint8
    for mask in masks:
        # The square is 15 % of the image.
        assert mask[inside].mean() > 0.95
        assert mask.mean() < 0.35


@pytest.mark.parametrize("name", saliency.ESTIMATORS)
def test_an_even_image_has_no_foreground(name):
    images = np.full((2, 32, 32, 3), [[[[3]]], [[[201]]]], np.uint8)
    estimate = saliency.ESTIMATORS[name](images)
    np.testing.assert_array_equal(estimate, 0)
    np.testing.assert_array_equal(saliency.foreground(estimate), 0)


@pytest.mark.parametrize("name", saliency.ESTIMATORS)
def test_one_image_in_a_pipeline_is_as_in_a_batch(name):
    images, _ = _square(3, (150, 90))

    def masks(images):
        return saliency.foreground(saliency.ESTIMATORS[name](images))

    stream = tf.data.Dataset.from_generator(
        lambda: images,
        output_signature=tf.TensorSpec((None, None, 3), tf.uint8),
    ).map(lambda image: masks(image[tf.newaxis])[0])
    found = np.stack(list(stream.as_numpy_iterator()))
    np.testing.assert_array_equal(found, masks(images))


def test_spectral_residual_is_the_published_algorithm():
    """Against NumPy, line by line as the authors' MATLAB code."""
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 1), np.uint8)
    spectrum = np.fft.fft2(image[0, :, :, 0].astype(np.float64))
    log_amplitude = np.log(np.abs(spectrum))
    padded = np.pad(log_amplitude, 1, "edge")
    mean = np.mean([padded[i : i + 64, j : j + 64] for i in range(3) for j in range(3)], 0)
    residual = log_amplitude - mean
    energy = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum))))
    weights = np.exp(-0.5 * (np.arange(-12, 13) / 2.5) ** 2)
    padded = np.pad(energy**2, 12, "edge")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, weights, "same")
    expected = padded[12:-12, 12:-12]
    expected = (expected - expected.min()) / np.ptp(expected)
    actual = saliency.spectral_residual(image)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_colours_are_those_of_lab():
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3)) / 255
    np.testing.assert_allclose(
        saliency._srgb_to_lab(tf.constant(image, tf.float32)),
        skimage.color.rgb2lab(image),
        atol=0.05,
    )


def test_estimators_are_those_of_the_configuration():
    assert tuple(saliency.ESTIMATORS) == choices.SALIENCY_ESTIMATORS
