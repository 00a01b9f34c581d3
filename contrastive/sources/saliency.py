# SPDX-License-Identifier: Apache-2.0
"""What is foreground: two classical estimates, and removal of the rest.

ReLICv2 takes its masks from a network, DeepUSPS, whose weights are not
published. The estimates here need no weights, and are far coarser: they find
about where an object is, not its outline.

All functions take batches, and need no static size of the images: they run on
arrays, and one image at a time in `tf.data.Dataset.map`.
"""

from typing import Any

import tensorflow as tf

import data_util

# Masks with less or more foreground than these shares of the image are taken
# to be failures.
PLAUSIBLE_SHARES = (0.05, 0.95)

_WORKING_SIDE = 64  # pixels
# Standard deviations: of 64 pixels; of the height and the width.
_SPECTRAL_SIGMA, _FOREGROUND_SIGMA, _CENTER_SIGMA = 2.5, 4.0, 0.3


def spectral_residual(images: tf.Tensor) -> tf.Tensor:
    """Returns what deviates from the smooth log spectrum of images.

    The saliency is `|F^-1(exp(R + iP))|^2`, smoothed, where P is the phase of
    the spectrum, and R its log amplitude less the mean of that over 3 x 3
    frequencies.

    Source: Hou & Zhang, "Saliency Detection: A Spectral Residual Approach",
    CVPR 2007, and its published MATLAB code (means continued by the border
    values, Gaussian of 2.5 pixels). As there, in grey and at 64 pixels; here
    it is the shorter side that is reduced to 64, and nothing is enlarged:
    below 64 pixels, the Gaussian shrinks in proportion instead.

    Args:
        images: uint8 `[b, h, w, c]`, any number of channels.

    Returns:
        float32 `[b, h, w]`, from 0 to 1 in each image; 0 in an even one.
    """
    gray = tf.reduce_mean(tf.cast(images, tf.float32), axis=-1)
    small, side = _reduced(gray)
    spectrum = tf.signal.fft2d(tf.cast(small, tf.complex64))
    amplitude = tf.abs(spectrum)
    # 1e-3 is far below the amplitude of one grey level in one pixel. Phases
    # of less are rounding errors.
    log_amplitude = tf.math.log(tf.maximum(amplitude, 1e-3))
    padded = tf.pad(log_amplitude, [[0, 0], [1, 1], [1, 1]], "SYMMETRIC")
    mean = tf.nn.avg_pool2d(padded[..., tf.newaxis], 3, 1, "VALID")[..., 0]
    residual = tf.exp(log_amplitude - mean)
    phase = tf.where(amplitude > 1e-3, tf.math.angle(spectrum), 0.0)
    waves = tf.complex(residual * tf.cos(phase), residual * tf.sin(phase))
    energy = tf.square(tf.abs(tf.signal.ifft2d(waves)))[..., tf.newaxis]
    energy = _smoothed(energy, _gaussian(_SPECTRAL_SIGMA, side))
    energy = _resized(energy[..., 0], tf.shape(gray)[1:])
    return _normalized(energy, images)


def frequency_tuned(images: tf.Tensor) -> tf.Tensor:
    """Returns how far the colours of images are from their mean colours.

    The saliency is `|m - x|` in CIE L*a*b*, with m the mean colour of the
    image, and x the image smoothed by 5 x 5 binomial weights.

    Source: Achanta et al., "Frequency-tuned Salient Region Detection", CVPR
    2009, section 3. Images that have not three channels are compared as they
    are.

    Args:
        images: uint8 `[b, h, w, c]`, any number of channels.

    Returns:
        float32 `[b, h, w]`, from 0 to 1 in each image; 0 in an even one.
    """
    x = tf.cast(images, tf.float32) / 255.0
    if images.shape[-1] == 3:
        x = _srgb_to_lab(x)
    mean = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
    smooth = _smoothed(x, tf.constant([1.0, 4.0, 6.0, 4.0, 1.0]))
    return _normalized(tf.norm(smooth - mean, axis=-1), images)


ESTIMATORS = {
    "spectral": spectral_residual,
    "frequency_tuned": frequency_tuned,
}


def foreground(saliency: tf.Tensor) -> tf.Tensor:
    """Returns the region around the middle that is more salient than the mean.

    The saliency is smoothed (4 pixels, at the resolution of
    `spectral_residual`) and weighted by a Gaussian around the middle of the
    image (0.3 of the height and width); foreground is what then exceeds its
    mean.

    Not the thresholds of the papers, 3 times the mean (Hou & Zhang) and twice
    the mean (Achanta et al., of segments): these are for pointing at an object,
    and leave some 5 % of the pixels, mostly edges, eyes and highlights. Half of
    the masks of CIFAR-10 would be implausible. Here about 37 % of the pixels
    are foreground, and no mask of 1,000 is implausible.

    Args:
        saliency: float32 `[b, h, w]`.

    Returns:
        uint8 `[b, h, w]`, 1 for foreground, else 0.
    """
    small, side = _reduced(saliency)
    weights = _gaussian(_FOREGROUND_SIGMA, side)
    smooth = _smoothed(small[..., tf.newaxis], weights)[..., 0]
    height, width = _centered(tf.shape(small)[1]), _centered(tf.shape(small)[2])
    smooth *= height[:, tf.newaxis] * width
    smooth = _resized(smooth, tf.shape(saliency)[1:])
    mean = tf.reduce_mean(smooth, axis=[1, 2], keepdims=True)
    return tf.cast(smooth > mean, tf.uint8)


# Masks.


def is_plausible(masks: tf.Tensor) -> tf.Tensor:
    """Returns whether the share of foreground is neither tiny nor nearly all.

    Args:
        masks: uint8 `[b, h, w]`, 0 or 1.

    Returns:
        bool `[b]`, see `PLAUSIBLE_SHARES`.
    """
    low, high = PLAUSIBLE_SHARES
    share = tf.reduce_mean(tf.cast(masks, tf.float32), axis=[1, 2])
    return (share > low) & (share < high)


def whole_if_implausible(masks: tf.Tensor) -> tf.Tensor:
    """Returns masks, of 1 alone where they are not plausible.

    Args:
        masks: uint8 `[b, h, w]`, 0 or 1.
    """
    use = is_plausible(masks)[:, tf.newaxis, tf.newaxis]
    return tf.where(use, masks, tf.ones_like(masks))


def decode_mask(encoded: tf.Tensor, size: Any) -> tf.Tensor:
    """Returns a mask from an encoded image, 128 and more being foreground.

    Args:
        encoded: string scalar, PNG; of several channels, the first counts.
        size: int `[2]`, height and width, in pixels, of the image it belongs
            to. A mask of another size is enlarged or reduced, without blur.

    Returns:
        uint8 `[height, width]`, 0 or 1.
    """
    # Channels as they are: converting colour to grey would need weights, and
    # a mask drawn in opaque red is none.
    mask = tf.io.decode_png(encoded)[..., :1]
    nearest = tf.image.ResizeMethod.NEAREST_NEIGHBOR
    mask = tf.image.resize(mask, size, nearest)
    return tf.cast(mask[..., 0] >= 128, tf.uint8)


def remove_background(
    images: tf.Tensor,
    masks: tf.Tensor,
    keys: tf.Tensor,
    augmentation: data_util.Augmentation,
) -> tf.Tensor:
    """Returns images, the background of some of them filled.

    To be called before `data_util.augment`. Each view draws for itself, by
    `data_util.removes_background`. Source: ReLICv2, arXiv:2201.05119, which
    multiplies by the mask: fill "zero".

    Args:
        images: uint8 `[b, h, w, c]`.
        masks: uint8 `[b, h, w]`, 0 where an image is background.
        keys: uint32 `[b]` of `data_util.example_keys`.
        augmentation: gives `mask_probability` and `mask_fill`.

    Returns:
        uint8 `[b, h, w, c]`.
    """
    removes = data_util.removes_background(keys, augmentation)
    fill = tf.zeros_like(images)
    if augmentation.mask_fill == "mean":
        mean = tf.cast(images, tf.float32)
        mean = tf.reduce_mean(mean, axis=[1, 2], keepdims=True)
        fill += tf.cast(tf.round(mean), tf.uint8)
    elif augmentation.mask_fill == "noise":
        fill = data_util.noise(keys, tf.shape(images))
    filled = (masks == 0) & removes[:, tf.newaxis, tf.newaxis]
    return tf.where(filled[..., tf.newaxis], fill, images)


# Parts of the estimates. Maps are float32 `[b, h, w]`.


def _reduced(maps: tf.Tensor) -> tf.Tensor:
    """Returns maps of at most 64 pixels, and the pixels: the shorter side."""
    size = tf.cast(tf.shape(maps)[1:], tf.float32)
    scale = tf.minimum(1.0, _WORKING_SIDE / tf.reduce_min(size))
    small = tf.cast(tf.round(scale * size), tf.int32)
    return _resized(maps, small), tf.reduce_min(small)


def _resized(maps: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Returns maps of another size, averaged where that is smaller."""
    return tf.image.resize(maps[..., tf.newaxis], size, antialias=True)[..., 0]


def _gaussian(sigma: float, side: tf.Tensor) -> tf.Tensor:
    """Returns weights for `_smoothed`; `sigma` is in pixels of 64."""
    sigma *= tf.cast(side, tf.float32) / _WORKING_SIDE
    distance = tf.range(-12.0, 13.0)
    return tf.exp(-0.5 * tf.square(distance / sigma))


def _centered(length: tf.Tensor) -> tf.Tensor:
    """Returns the weights of pixels around the middle, float32 `[length]`."""
    length = tf.cast(length, tf.float32)
    place = (tf.range(length) + 0.5) / length - 0.5
    return tf.exp(-0.5 * tf.square(place / _CENTER_SIGMA))


def _smoothed(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Returns `[b, h, w, c]`, smoothed both ways; its border goes on outside.

    `weights` is float32 `[odd]`, of any sum.
    """
    weights /= tf.reduce_sum(weights)
    # One kernel for all channels: they are put into the batch.
    shape = tf.shape(x)
    x = tf.transpose(x, [0, 3, 1, 2])
    x = tf.reshape(x, [-1, shape[1], shape[2], 1])
    for axis, kernel in ((1, [-1, 1, 1, 1]), (2, [1, -1, 1, 1])):
        radius, length = weights.shape[0] // 2, shape[axis]
        rows = tf.range(-radius, length + radius)
        x = tf.gather(x, tf.clip_by_value(rows, 0, length - 1), axis=axis)
        x = tf.nn.conv2d(x, tf.reshape(weights, kernel), 1, "VALID")
    x = tf.reshape(x, [shape[0], shape[3], shape[1], shape[2]])
    return tf.transpose(x, [0, 2, 3, 1])


def _normalized(saliency: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
    """Returns `[b, h, w]`, scaled to [0, 1]; 0 where an image is even."""
    low = tf.reduce_min(saliency, axis=[1, 2], keepdims=True)
    high = tf.reduce_max(saliency, axis=[1, 2], keepdims=True)
    # Of an even image, the saliency is made of rounding errors.
    varies = tf.reduce_any(images != images[:, :1, :1], axis=-1)
    varies = tf.reduce_any(varies, axis=[1, 2], keepdims=True)
    scaled = tf.math.divide_no_nan(saliency - low, high - low)
    return tf.where(varies, scaled, 0.0)


def _srgb_to_lab(x: tf.Tensor) -> tf.Tensor:
    """Returns sRGB in [0, 1] as CIE L*a*b* under D65; channels last."""
    linear = tf.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    # Rows of IEC 61966-2-1, each divided by its white point's X, Y and Z.
    to_xyz = tf.constant(
        [
            [0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047],
            [0.212671, 0.715160, 0.072169],
            [0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883],
        ]
    )
    xyz = tf.tensordot(linear, to_xyz, [[-1], [1]])
    root = tf.where(
        xyz > (6 / 29) ** 3,
        tf.maximum(xyz, 1e-9) ** (1 / 3),
        xyz * (29 / 6) ** 2 / 3 + 4 / 29,
    )
    x, y, z = tf.unstack(root, axis=-1)
    return tf.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
