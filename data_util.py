# SPDX-License-Identifier: Apache-2.0
"""Image operations: random numbers, crops, augmentation of whole batches.

Shapes are static, and no image has a branch of its own. Encoded files are decoded and cropped in
`contrastive/sources/decoding.py`.

Every random number is a hash of a key, which names (seed, epoch, example, view), and of the number
of the draw, so a view does not depend on the rest of its batch, on the replica, or on restarts.

Inside, images are float32 `[batch, channels, height, width]`: three channels as the innermost axis
would leave most lanes of a vector unit idle.
"""

from typing import Any

import tensorflow as tf

from contrastive.config import augmentation as _presets
from contrastive.config.augmentation import Augmentation

BRIGHTNESS_MODES, MASK_FILLS = _presets.BRIGHTNESS_MODES, _presets.MASK_FILLS
simclr_augmentation = _presets.simclr_augmentation
byol_augmentation = _presets.byol_augmentation
relic_pytorch_augmentation = _presets.relic_pytorch_augmentation

# A box is rejected in about 6 % of the attempts with SimCLR's settings (20 % for panoramas), so
# that 16 all fail for fewer than one in 10^11 views.
_CROP_ATTEMPTS = 16

# Numbers of the draws of a view. Changing one changes every later run.
_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(6)
_GRAYSCALE, _BLUR, _BLUR_SIGMA, _SOLARIZE, _MASK = range(6, 11)
_ORDER = 16  # + the number of the colour operation
_CROP = 32  # + 4 numbers an attempt; all above are drawn together
_NOISE = 128  # + the number of the value in the image


def example_keys(seed: Any, epoch: Any, example_ids: Any, view: Any) -> tf.Tensor:
    """Hashes the integers that name a view to a key, uint32 `[batch]`.

    `example_ids` are integers `[batch]` below 2^32; `seed` and `view` are scalars, and `epoch` is a
    scalar or one integer per example.
    """
    key = tf.zeros_like(_to_uint32(example_ids))
    for part in (seed, epoch, example_ids, view):
        key = _hash(key + _to_uint32(part))
    return key


def uniform(keys: tf.Tensor, draw: Any, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
    """Draws uniform float32 numbers in [low, high), as a function of the key.

    `keys` are uint32 of any shape; `draw`, the number of the draw, is an integer or a tensor that
    broadcasts with them.
    """
    # An odd constant far from 0 (2^32 / golden ratio), so that the draws of a key are not those of
    # the next one.
    bits = _hash(keys + _to_uint32(draw) * 0x9E3779B9)
    unit = tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2.0**-24
    return low + unit * (high - low)


def removes_background(keys: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """Draws, for each key, if the view loses its background: bool `[batch]`."""
    return uniform(keys, _MASK) < augmentation.mask_probability


def noise(keys: tf.Tensor, shape: Any) -> tf.Tensor:
    """Draws uint8 images of independent, uniformly distributed values.

    `keys` are those of `example_keys`, and `shape` is `[batch, h, w, c]`.
    """
    values = tf.range(tf.reduce_prod(shape[1:]))
    x = uniform(keys[:, tf.newaxis], _NOISE + values, 0.0, 256.0)
    return tf.reshape(tf.cast(x, tf.uint8), shape)


def _hash(x: tf.Tensor) -> tf.Tensor:
    # "lowbias32" of Chris Wellons' hash-prospector (public domain): bijective.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, shift))
        x *= factor
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, 16))


def _to_uint32(x: Any) -> tf.Tensor:
    """Returns integers modulo 2^32; Python's may be of any size."""
    if isinstance(x, int):
        return tf.constant(x % 2**32, tf.uint32)
    return tf.cast(x, tf.uint32)


def augment(images: tf.Tensor, keys: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """Makes one random view of every image.

    Compile it with `tf.function(jit_compile=True)` even if the step around it is not compiled:
    unfused, it takes several times as long on a CPU. Crops and grayscale are matrix products, whose
    inputs TPUs round to bfloat16, and GPUs to TF32 where that is enabled. Saturation, hue and
    grayscale are skipped unless there are three channels.

    Images are uint8, or float32 in [0, 1], `[batch, height, width, channels]`, and keys those of
    `example_keys`. The views are float32 `[batch, size, size, channels]` in [0, 1].

    Raises:
        ValueError: if `augmentation.crop` is False and the images are not of `augmentation.size`.
    """
    x = tf.image.convert_image_dtype(images, tf.float32)
    draws = uniform(keys[:, tf.newaxis], tf.range(_CROP))
    draws = draws[:, :, tf.newaxis, tf.newaxis, tf.newaxis]
    flips = draws[:, _FLIP] < augmentation.flip_probability
    size = augmentation.size
    _, height, width, _ = x.shape
    if augmentation.crop:
        boxes = random_crop_boxes(keys, height, width, augmentation)
        x = _crop_and_resize(x, boxes, size, flips)
    elif (height, width) == (size, size):
        x = tf.where(flips, tf.reverse(x, [2]), x)
        x = tf.transpose(x, [0, 3, 1, 2])
    else:
        raise ValueError(
            f"Without `crop`, images must be {size} x {size} pixels. Received: {height} x {width}"
        )
    x = _color_jitter(x, draws, augmentation)
    # The blur, a sum of pixels, commutes with grayscale, a sum of channels.
    radius = size // 20
    if augmentation.blur_probability > 0 and radius > 0:
        blurs = draws[:, _BLUR] < augmentation.blur_probability
        low, high = augmentation.blur_sigma
        sigma = low + draws[:, _BLUR_SIGMA] * (high - low)
        # Rounding may exceed 1 by a last digit.
        blurred = tf.minimum(_gaussian_blur(x, sigma, radius), 1.0)
        x = tf.where(blurs, blurred, x)
    x = _random_gray(x, draws, augmentation)
    if augmentation.solarize_probability > 0:
        solarizes = draws[:, _SOLARIZE] < augmentation.solarize_probability
        x = tf.where(solarizes & (x >= 0.5), 1.0 - x, x)
    return x


def eval_images(images: tf.Tensor, size: int, *, crop_proportion: float | None = None) -> tf.Tensor:
    """Crops and resizes images for evaluation, without anything random.

    `crop_proportion` is the side of the central square, relative to the shorter side of the image
    (SimCLR: 0.875); None keeps the whole image. Images and results are as for `augment`.

    Source: google-research/simclr, tf2/data_util.py, `preprocess_for_eval`.
    """
    x = tf.image.convert_image_dtype(images, tf.float32)
    _, height, width, _ = x.shape
    if crop_proportion is None and (height, width) == (size, size):
        return x
    box = tf.constant([0, 0, height, width])
    if crop_proportion is not None:
        box = center_box(height, width, crop_proportion)
    x = _crop_and_resize(x, box[tf.newaxis], size)
    return tf.transpose(tf.clip_by_value(x, 0.0, 1.0), [0, 2, 3, 1])


def random_crop_boxes(
    keys: tf.Tensor, height: Any, width: Any, augmentation: Augmentation
) -> tf.Tensor:
    """Draws a crop box for each key: int32 `[batch, 4]`, y, x, height, width.

    Has the distribution of `tf.image.sample_distorted_bounding_box` for one box around the whole
    image, as SimCLR and BYOL call it: the aspect ratio is uniform, then the height is uniform among
    the integers that the limits of the area allow, then the place. A box of too small or too large
    an area is drawn again; if all attempts fail, the whole image is returned. `height` and `width`
    of the image, in pixels, are integers or scalar tensors.

    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc, including that the
    last row and column are out of reach unless the box is as high or wide as the image.
    """
    full_height = tf.cast(height, tf.float32)
    full_width = tf.cast(width, tf.float32)
    full_area = full_height * full_width
    min_area, max_area = (s * full_area for s in augmentation.crop_area)
    draws = _CROP + 4 * tf.range(_CROP_ATTEMPTS)
    keys = keys[:, tf.newaxis]

    aspect = uniform(keys, draws, *augmentation.crop_aspect)
    lowest = tf.round(tf.sqrt(min_area / aspect))
    highest = tf.round(tf.sqrt(max_area / aspect))
    is_wide = tf.round(highest * aspect) > full_width
    highest = tf.where(is_wide, tf.floor((full_width + 0.5) / aspect), highest)
    highest = tf.minimum(highest, full_height)
    lowest = tf.minimum(lowest, highest)

    choices = highest - lowest + 1.0
    height = lowest + tf.floor(uniform(keys, draws + 1) * choices)
    # Rounding may have missed the limits by a row.
    height += tf.cast(height * tf.round(height * aspect) < min_area, tf.float32)
    height -= tf.cast(height * tf.round(height * aspect) > max_area, tf.float32)
    width = tf.round(height * aspect)
    area = height * width
    covered = augmentation.crop_min_covered * full_area
    is_valid = (area >= tf.maximum(min_area, 1.0)) & (area >= covered)
    is_valid &= (height <= full_height) & (width <= full_width)
    is_valid &= area <= max_area
    y = tf.floor(uniform(keys, draws + 2) * (full_height - height))
    x = tf.floor(uniform(keys, draws + 3) * (full_width - width))

    boxes = tf.stack([y, x, height, width], axis=-1)
    first = tf.argmax(is_valid, axis=1, output_type=tf.int32)
    boxes = tf.gather(boxes, first, axis=1, batch_dims=1)
    found = tf.reduce_any(is_valid, axis=1, keepdims=True)
    whole = tf.stack([0.0, 0.0, full_height, full_width])
    return tf.cast(tf.where(found, boxes, whole), tf.int32)


def _crop_and_resize(x: tf.Tensor, boxes: tf.Tensor, size: int, flips: Any = False) -> tf.Tensor:
    """Crops and resizes as `tf.image.resize(..., "bicubic")`; channels first.

    Separable resampling is a product with a matrix from each side; the crop is in the matrices, so
    that shapes do not depend on the boxes.
    """
    top, left, height, width = tf.unstack(tf.cast(boxes, tf.float32), axis=1)
    rows = _resampling_matrix(top, height, x.shape[1], size)
    columns = _resampling_matrix(left, width, x.shape[2], size)
    flips = tf.reshape(flips, [-1, 1, 1])
    columns = tf.where(flips, tf.reverse(columns, [1]), columns)

    # One product an image, not one a channel.
    _, full_height, full_width, channels = x.shape
    x = tf.matmul(rows, tf.reshape(x, [-1, full_height, full_width * channels]))
    x = tf.reshape(x, [-1, size, full_width, channels])
    x = tf.transpose(x, [0, 3, 1, 2])
    x = tf.reshape(x, [-1, channels * size, full_width])
    x = tf.matmul(x, columns, transpose_b=True)
    return tf.reshape(x, [-1, channels, size, size])


def _resampling_matrix(
    start: tf.Tensor, length: tf.Tensor, full_length: int, size: int
) -> tf.Tensor:
    """Returns `[batch, size, full_length]`, which resamples part of an axis."""
    # Half-pixel centres, and weights of 0 outside of the part, as in
    # tensorflow/core/kernels/image/resize_bicubic_op.cc.
    start = start[:, tf.newaxis, tf.newaxis]
    length = length[:, tf.newaxis, tf.newaxis]
    centre = tf.range(size, dtype=tf.float32)[:, tf.newaxis] + 0.5
    centre = centre * (length / size) - 0.5
    # TensorFlow reads its weights from a table of 1024 places a pixel.
    centre = start + tf.round(centre * 1024.0) / 1024.0
    pixel = tf.range(full_length, dtype=tf.float32)
    d = tf.abs(pixel - centre)  # Keys' cubic convolution with a = -0.5
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    weights = tf.where(d < 1.0, near, tf.where(d < 2.0, far, 0.0))
    inside = (pixel >= start) & (pixel < start + length)
    weights = tf.where(inside, weights, 0.0)
    return weights / tf.reduce_sum(weights, axis=-1, keepdims=True)


def center_box(height: Any, width: Any, proportion: float) -> tf.Tensor:
    """Returns SimCLR's central square crop, int32 `[4]`: y, x, h, w."""
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.cast(tf.round(proportion * shorter), tf.int32)
    y, x = (height - side + 1) // 2, (width - side + 1) // 2
    return tf.stack([y, x, side, side])


def _color_jitter(x: tf.Tensor, draws: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """Applies four colour operations in random order; the result is in [0, 1].

    Brightness and contrast are affine; hue and saturation commute. So every order alternates hue
    and saturation with an affine operation; one that is not due gets a neutral amount.
    """
    b, c = augmentation.brightness, augmentation.contrast
    s, h = augmentation.saturation, augmentation.hue
    jitters = draws[:, _JITTER] < augmentation.jitter_probability

    def amount(draw: int, low: float, high: float, none: float) -> tf.Tensor:
        return tf.where(jitters, low + draws[:, draw] * (high - low), none)

    scale, offset = 1.0, 0.0
    if augmentation.brightness_mode == "additive":
        offset = amount(_BRIGHTNESS, -b, b, 0.0)
    else:
        scale = amount(_BRIGHTNESS, max(1.0 - b, 0.0), 1.0 + b, 1.0)
    contrast = amount(_CONTRAST, 1.0 - c, 1.0 + c, 1.0)
    saturation = amount(_SATURATION, 1.0 - s, 1.0 + s, 1.0)
    hue = amount(_HUE, -h, h, 0.0)

    brightness_order = draws[:, _ORDER + _BRIGHTNESS]
    contrast_order = draws[:, _ORDER + _CONTRAST]
    brightness_first = brightness_order < contrast_order

    # Counts the operations of brightness and contrast that go before.
    def turn(draw: int) -> tf.Tensor:
        order = draws[:, _ORDER + draw]
        is_later = (order > brightness_order, order > contrast_order)
        return tf.add_n([tf.cast(later, tf.int32) for later in is_later])

    def hue_and_saturation(x: tf.Tensor, now: int) -> tf.Tensor:
        if x.shape[1] != 3 or s == h == 0:
            return x
        shift = tf.where(turn(_HUE) == now, hue, 0.0)
        factor = tf.where(turn(_SATURATION) == now, saturation, 1.0)
        return _adjust_hue_and_saturation(x, shift, factor)

    # Bicubic resampling overshoots [0, 1]. SimCLR leaves that to the clip after the first
    # operation.
    x = hue_and_saturation(tf.clip_by_value(x, 0.0, 1.0), 0)
    for now, is_brightness in ((1, brightness_first), (2, ~brightness_first)):
        mean = tf.reduce_mean(x, axis=[2, 3], keepdims=True)
        factor = tf.where(is_brightness, scale, contrast)
        x = factor * x + tf.where(is_brightness, offset, mean - contrast * mean)
        x = hue_and_saturation(tf.clip_by_value(x, 0.0, 1.0), now)
    return x


def _adjust_hue_and_saturation(x: tf.Tensor, shift: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Shifts the hue, in full circles, and scales the HSV saturation."""
    # XLA sees through slices of a stack, and would compute each plane again wherever it is used; it
    # does not see through slices of a reshaped stack.
    _, _, height, width = x.shape
    x = tf.reshape(x, [-1, 3 * height * width])
    red, green, blue = tf.split(x, 3, axis=1)
    shift, factor = shift[:, 0, 0], factor[:, 0, 0]

    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    # Hue in sixths of the circle: an offset for the largest channel, and a position between the
    # other two.
    red_is_max, green_is_max = red >= value, green >= value
    offset = tf.where(red_is_max, 0.0, tf.where(green_is_max, 2.0, 4.0))
    difference = tf.where(green_is_max, blue - red, red - green)
    difference = tf.where(red_is_max, green - blue, difference)
    # A chroma of 0 has a difference of 0.
    hue = offset + 6.0 * shift + difference / tf.maximum(chroma, 1e-20)

    # How far each channel is below the value, relative to the chroma: 0 up to a sixth from its own
    # hue, 1 from two sixths on. Exact for -4 <= hue <= 8, without that `hue` would have to be
    # wrapped to [0, 6).
    chroma = tf.minimum(factor * chroma, value)
    depths = (
        tf.abs(tf.abs(hue - 3.0) - 3.0) - 1.0,
        2.0 - tf.abs(tf.abs(hue - 2.0) - 3.0),
        tf.abs(tf.abs(hue - 1.0) - 3.0) - 1.0,
    )
    x = tf.stack([value - chroma * tf.clip_by_value(d, 0.0, 1.0) for d in depths], axis=1)
    return tf.reshape(x, [-1, 3, height, width])


def _gaussian_blur(x: tf.Tensor, sigma: tf.Tensor, radius: int) -> tf.Tensor:
    """Blurs images, padded with black; `radius` is less than half their size.

    Products with a symmetric band matrix: at 224 pixels, they take two thirds of the time of 46
    shifted sums.
    """
    pixel = tf.range(x.shape[3], dtype=tf.float32)
    distance = tf.abs(pixel - pixel[:, tf.newaxis])
    weights = tf.exp(-0.5 * tf.square(distance / sigma))
    weights = tf.where(distance <= radius, weights, 0.0)
    # Near the border, a part of the Gaussian is outside of the matrix.
    total = tf.reduce_sum(weights, axis=-1, keepdims=True)
    weights /= tf.reduce_max(total, axis=-2, keepdims=True)
    return tf.matmul(tf.matmul(weights, x), weights)


def _random_gray(x: tf.Tensor, draws: tf.Tensor, augmentation: Augmentation) -> tf.Tensor:
    """Removes the colour of some images; moves channels to the last axis.

    A product with a matrix does both, and lets XLA compute the colours once.
    """
    _, channels, height, width = x.shape
    matrix = tf.eye(channels, batch_shape=[1])
    if channels == 3:
        fades = draws[:, _GRAYSCALE, 0] < augmentation.grayscale_probability
        # The weights of `tf.image.rgb_to_grayscale`.
        luma = tf.constant([[0.2989], [0.5870], [0.1140]])
        matrix = tf.where(fades, luma, matrix)
    x = tf.reshape(x, [-1, channels, height * width])
    x = tf.matmul(x, matrix, transpose_a=True)
    return tf.reshape(x, [-1, height, width, channels])
