# SPDX-License-Identifier: Apache-2.0
"""Image operations: crops on the host, augmentation of whole batches.

`augment` turns a batch of uint8 images into one float32 view of each, inside
a compiled step: static shapes, no loop and no branch per image, nothing that
XLA cannot compile. `decode_crop` and `decode_center_crop` work on one encoded
file at a time, inside `tf.data.Dataset.map`.

Nothing here has a state. Every random number is a hash of a key, which names
(seed, epoch, example, view), and of the number of the draw: a view does not
depend on the rest of its batch, on the replica, or on restarts.

Inside, images are float32 `[batch, channels, height, width]`: three channels
as the innermost axis would leave most lanes of a vector unit idle.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

BRIGHTNESS_MODES = ("multiplicative", "additive")
MASK_FILLS = ("zero", "mean", "noise")

# A box is rejected in about 6 % of the attempts with SimCLR's settings (no
# more than 20 % for panoramas), so that 16 all fail for fewer than one in
# 10^11 views.
_CROP_ATTEMPTS = 16

# Numbers of the draws of a view. Changing one changes every later run.
(
    _FLIP,
    _JITTER,
    _BRIGHTNESS,
    _CONTRAST,
    _SATURATION,
    _HUE,
    _GRAYSCALE,
    _BLUR,
    _BLUR_SIGMA,
    _SOLARIZE,
    _MASK,
) = range(11)
_ORDER = 16  # + the number of the colour operation
_CROP = 32  # + 4 numbers an attempt; all above are drawn together
_NOISE = 128  # + the number of the value in the image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What one view of an image goes through, in this order.

    Crop and resize, flip, colour jitter (four operations in random order,
    each clipped to [0, 1]), grayscale, blur, solarize. The defaults are
    SimCLR's at colour strength 1.

    Attributes:
        size: side of the square output, in pixels.
        crop: False if the host has already cropped to `size`.
        crop_area: smallest and largest share of the image in a crop.
        crop_aspect: smallest and largest width / height of a crop.
        crop_min_covered: crops of a smaller share of the image are redrawn;
            `min_object_covered` of `tf.image.sample_distorted_bounding_box`.
        flip_probability: of a left-right flip.
        jitter_probability: of the four colour operations, together.
        brightness: b; the image is multiplied by U(max(1 - b, 0), 1 + b), or
            U(-b, b) is added to it, see `brightness_mode`.
        brightness_mode: "multiplicative" (SimCLR) or "additive" (BYOL, and
            SimCLR's first version).
        contrast: c, at most 1; distances from the mean of each channel are
            multiplied by U(1 - c, 1 + c).
        saturation: s, at most 1; HSV saturation is multiplied by
            U(1 - s, 1 + s). For three channels only, as hue and grayscale.
        hue: h, at most 0.5; HSV hue is shifted by U(-h, h) full circles.
        grayscale_probability: of the loss of all colour.
        blur_probability: of a Gaussian blur of radius `size // 20` pixels.
        blur_sigma: smallest and largest standard deviation of the Gaussian,
            in pixels.
        solarize_probability: of inverting the values of 0.5 and more.
        mask_probability: of removing the background, before all else; not
            part of `augment`, which sees no mask: see `saliency.py`.
        mask_fill: what stands in its place: "zero" (black, ReLICv2), "mean"
            (the mean of each channel of the image) or "noise" (uniform).

    Raises:
        ValueError: if a value is out of its range.
    """

    size: int
    crop: bool = True
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    crop_min_covered: float = 0.1
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.8
    brightness_mode: str = "multiplicative"
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    mask_probability: float = 0.0
    mask_fill: str = "zero"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"`size` must be positive. Received: {self.size}")
        if self.brightness_mode not in BRIGHTNESS_MODES:
            raise ValueError(
                f"`brightness_mode` must be one of {BRIGHTNESS_MODES}. "
                f"Received: {self.brightness_mode!r}"
            )
        if self.mask_fill not in MASK_FILLS:
            raise ValueError(
                f"`mask_fill` must be one of {MASK_FILLS}. "
                f"Received: {self.mask_fill!r}"
            )
        limits = {"brightness": math.inf, "hue": 0.5, "crop_area": 1.0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            limit = limits.get(field.name, 1.0)
            if field.type is float and not 0 <= value <= limit:
                raise ValueError(
                    f"`{field.name}` must be between 0 and {limit}. "
                    f"Received: {value}"
                )
        for name in ("crop_area", "crop_aspect", "blur_sigma"):
            low, high = getattr(self, name)
            limit = limits.get(name, math.inf)
            if not 0 < low <= high <= limit:
                raise ValueError(
                    f"`{name}` must hold 0 < smallest <= largest <= {limit}. "
                    f"Received: {(low, high)}"
                )
        if self.crop_area[1] < self.crop_min_covered:
            raise ValueError(
                f"`crop_area` must reach {self.crop_min_covered} "
                "(`crop_min_covered`), below which crops are drawn again. "
                f"Received: {self.crop_area}"
            )


def simclr_augmentation(
    size: int,
    *,
    strength: float = 1.0,
    use_blur: bool = True,
    **overrides: Any,
) -> Augmentation:
    """Returns SimCLR's augmentation, the same for both views.

    Source: Chen et al., arXiv:2002.05709, appendix A; google-research/simclr,
    tf2/data_util.py. Differs from it: sigma of the blur is drawn for each
    image instead of once for a batch, so that a view does not depend on the
    batch it is in.

    Args:
        size: side of the output, in pixels.
        strength: of the colour jitter, between 0 and 1.25; SimCLR takes 1 for
            ImageNet and 0.5 for CIFAR.
        use_blur: SimCLR blurs ImageNet, and does not blur CIFAR.
        **overrides: any field of `Augmentation`.
    """
    settings: dict[str, Any] = {
        "size": size,
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
        "blur_probability": 0.5 if use_blur else 0.0,
    }
    return Augmentation(**(settings | overrides))


def byol_augmentation(
    size: int, *, view: int, **overrides: Any
) -> Augmentation:
    """Returns BYOL's augmentation of one of the two views.

    Source: Grill et al., arXiv:2006.07733, table 6; deepmind-research,
    byol/utils/augmentations.py. The paper draws the logarithm of the aspect
    ratio of a crop uniformly; its code, and so do we, the ratio itself.

    Args:
        size: side of the output, in pixels.
        view: 0 for the paper's T (always blurred), 1 for T' (rarely blurred,
            sometimes solarized).
        **overrides: any field of `Augmentation`.

    Raises:
        ValueError: if `view` is neither 0 nor 1.
    """
    if view not in (0, 1):
        raise ValueError(f"`view` must be 0 or 1. Received: {view}")
    settings: dict[str, Any] = {
        "size": size,
        "brightness": 0.4,
        "brightness_mode": "additive",
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "blur_probability": (1.0, 0.1)[view],
        "solarize_probability": (0.0, 0.2)[view],
    }
    return Augmentation(**(settings | overrides))


def relic_pytorch_augmentation(
    size: int, *, solarize: bool, **overrides: Any
) -> Augmentation:
    """Returns the augmentation of filipbasara0/relic.

    Source: filipbasara0/relic, relic/aug.py. Differs from it: crops are drawn
    as SimCLR's (see `random_crop_boxes`), and contrast is of each channel.

    Args:
        size: side of the output, in pixels.
        solarize: whether views may be solarized: the large ones are.
        **overrides: any field of `Augmentation`.
    """
    settings: dict[str, Any] = {
        "size": size,
        "crop_area": (0.1, 1.0),
        "crop_min_covered": 0.0,
        "blur_probability": 1.0,
        "solarize_probability": 0.2 if solarize else 0.0,
    }
    return Augmentation(**(settings | overrides))


# Random numbers.


def example_keys(
    seed: Any, epoch: Any, example_ids: Any, view: Any
) -> tf.Tensor:
    """Returns the keys of the views of some examples.

    Args:
        seed: integer, Python's or a scalar tensor.
        epoch: integer, as `seed`, or one an example.
        example_ids: integers `[batch]`, below 2^32.
        view: integer, as `seed`.

    Returns:
        uint32 `[batch]`.
    """
    key = tf.zeros_like(_to_uint32(example_ids))
    for part in (seed, epoch, example_ids, view):
        key = _hash(key + _to_uint32(part))
    return key


def uniform(
    keys: tf.Tensor, draw: Any, low: float = 0.0, high: float = 1.0
) -> tf.Tensor:
    """Returns random numbers, a function of the key and the draw's number.

    Args:
        keys: uint32, any shape.
        draw: integer, Python's or a tensor that broadcasts with `keys`.
        low: smallest number.
        high: limit that is not reached (but for rounding).

    Returns:
        float32 in [low, high), multiples of 2^-24 before scaling.
    """
    # An odd constant far from 0 (2^32 / golden ratio), so that the draws of
    # a key are not those of the next one.
    bits = _hash(keys + _to_uint32(draw) * 0x9E3779B9)
    unit = tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2.0**-24
    return low + unit * (high - low)


def removes_background(
    keys: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Returns which views lose the background of their image.

    Args:
        keys: uint32 `[batch]` of `example_keys`.
        augmentation: gives `mask_probability`.

    Returns:
        bool `[batch]`.
    """
    return uniform(keys, _MASK) < augmentation.mask_probability


def noise(keys: tf.Tensor, shape: Any) -> tf.Tensor:
    """Returns images of independent, uniformly distributed values.

    Args:
        keys: uint32 `[batch]` of `example_keys`.
        shape: integers `[4]`: batch, height, width, channels.

    Returns:
        uint8 of this shape.
    """
    values = tf.range(tf.reduce_prod(shape[1:]))
    x = uniform(keys[:, tf.newaxis], _NOISE + values, 0.0, 256.0)
    return tf.reshape(tf.cast(x, tf.uint8), shape)


def _hash(x: tf.Tensor) -> tf.Tensor:
    """Returns a bijective hash of uint32 numbers that mixes all bits.

    Source: "lowbias32" of Chris Wellons' hash-prospector (public domain):
    murmur3's finalizer with constants found by search, which lower the bias
    of how an input bit flips an output bit.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, shift))
        x *= factor
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, 16))


def _to_uint32(x: Any) -> tf.Tensor:
    """Returns integers modulo 2^32; Python's may be of any size."""
    if isinstance(x, int):
        return tf.constant(x % 2**32, tf.uint32)
    return tf.cast(x, tf.uint32)


# A view.


def augment(
    images: tf.Tensor, keys: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Returns one random view of every image.

    Compile it with `tf.function(jit_compile=True)`, also where the step around
    it is not compiled: unfused, it takes several times as long on a CPU. Crops
    and grayscale are matrix products: TPUs, and GPUs with TF32, round what goes
    into them to bfloat16 or TF32.

    Args:
        images: uint8, or float32 in [0, 1], `[batch, height, width,
            channels]`; height and width are `augmentation.size` if
            `augmentation.crop` is False.
        keys: uint32 `[batch]` of `example_keys`.
        augmentation: what is done; saturation, hue and grayscale are skipped
            unless there are three channels.

    Returns:
        float32 `[batch, size, size, channels]` in [0, 1].

    Raises:
        ValueError: if the images have another size than the one promised.
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
            f"Without `crop`, images must be {size} x {size} pixels. "
            f"Received: {height} x {width}"
        )
    x = _color_jitter(x, draws, augmentation)
    # The blur, a sum of pixels, commutes with the loss of colour, a sum of
    # channels.
    x = _random_blur(x, draws, augmentation)
    x = _random_gray(x, draws, augmentation)
    if augmentation.solarize_probability > 0:
        solarizes = draws[:, _SOLARIZE] < augmentation.solarize_probability
        x = tf.where(solarizes & (x >= 0.5), 1.0 - x, x)
    return x


def eval_images(
    images: tf.Tensor, size: int, *, crop_proportion: float | None = None
) -> tf.Tensor:
    """Returns images as they are evaluated: without anything random.

    Source: google-research/simclr, tf2/data_util.py, `preprocess_for_eval`.

    Args:
        images: uint8, or float32 in [0, 1], `[batch, height, width,
            channels]`.
        size: side of the output, in pixels.
        crop_proportion: side of the central square that is kept, relative to
            the shorter side of the image (SimCLR: 0.875); None keeps all of
            the image, whatever its aspect ratio.

    Returns:
        float32 `[batch, size, size, channels]` in [0, 1].
    """
    x = tf.image.convert_image_dtype(images, tf.float32)
    _, height, width, _ = x.shape
    if crop_proportion is not None:
        box = _center_box(height, width, crop_proportion)
    elif (height, width) != (size, size):
        box = tf.constant([0, 0, height, width])
    else:
        return x
    x = _crop_and_resize(x, box[tf.newaxis], size)
    return tf.transpose(tf.clip_by_value(x, 0.0, 1.0), [0, 2, 3, 1])


# Crop, resize, flip.


def random_crop_boxes(
    keys: tf.Tensor, height: Any, width: Any, augmentation: Augmentation
) -> tf.Tensor:
    """Returns a random crop box for each key.

    Has the distribution of `tf.image.sample_distorted_bounding_box` for one
    box around the whole image, as SimCLR and BYOL call it: the aspect ratio
    is uniform, then the height is uniform among the integers that the limits
    of the area allow, then the place. A box of too small or too large an area
    is drawn again; if all attempts fail, the whole image is returned.

    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc,
    including that the last row and column are out of reach unless the box is
    as high or wide as the image.

    Args:
        keys: uint32 `[batch]`.
        height: of the image in pixels, Python integer or scalar tensor.
        width: as `height`.
        augmentation: gives the limits of area and aspect ratio.

    Returns:
        int32 `[batch, 4]`: y, x, height, width in pixels.
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

    height = lowest + tf.floor(
        uniform(keys, draws + 1) * (highest - lowest + 1.0)
    )
    # Rounding may have missed the limits by a row.
    height += tf.cast(height * tf.round(height * aspect) < min_area, tf.float32)
    height -= tf.cast(height * tf.round(height * aspect) > max_area, tf.float32)
    width = tf.round(height * aspect)
    area = height * width
    is_valid = (
        (area >= tf.maximum(min_area, 1.0))
        & (area >= augmentation.crop_min_covered * full_area)
        & (area <= max_area)
        & (height <= full_height)
        & (width <= full_width)
    )
    y = tf.floor(uniform(keys, draws + 2) * (full_height - height))
    x = tf.floor(uniform(keys, draws + 3) * (full_width - width))

    boxes = tf.stack([y, x, height, width], axis=-1)
    first = tf.argmax(is_valid, axis=1, output_type=tf.int32)
    boxes = tf.gather(boxes, first, axis=1, batch_dims=1)
    found = tf.reduce_any(is_valid, axis=1, keepdims=True)
    whole = tf.stack([0.0, 0.0, full_height, full_width])
    return tf.cast(tf.where(found, boxes, whole), tf.int32)


def _crop_and_resize(
    x: tf.Tensor, boxes: tf.Tensor, size: int, flips: Any = False
) -> tf.Tensor:
    """Returns crops, resized as by `tf.image.resize(..., "bicubic")`.

    Separable resampling is a product with a matrix from each side; the crop
    is in the matrices, so that shapes do not depend on the boxes.

    Args:
        x: float32 `[batch, height, width, channels]`.
        boxes: int32 `[batch, 4]` or `[1, 4]`: y, x, height, width in pixels.
        size: side of the output, in pixels.
        flips: bool or bool `[batch, 1, 1, 1]`, which crops to mirror.

    Returns:
        float32 `[batch, channels, size, size]`; may exceed the range of `x`.
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
    """Returns matrices that resample a part of an axis to `size` points.

    Half-pixel centres, Keys' cubic convolution with a = -0.5, weights outside
    of the part set to 0 and the rest normalized to a sum of 1.

    Source: tensorflow/core/kernels/image/resize_bicubic_op.cc.

    `start` and `length` of the part are float32 `[batch]`, in pixels; the
    result is float32 `[batch, size, full_length]`.
    """
    start = start[:, tf.newaxis, tf.newaxis]
    length = length[:, tf.newaxis, tf.newaxis]
    centre = tf.range(size, dtype=tf.float32)[:, tf.newaxis] + 0.5
    centre = centre * (length / size) - 0.5
    # TensorFlow reads its weights from a table of 1024 places a pixel.
    centre = start + tf.round(centre * 1024.0) / 1024.0
    pixel = tf.range(full_length, dtype=tf.float32)
    weights = _cubic_kernel(tf.abs(pixel - centre))
    inside = (pixel >= start) & (pixel < start + length)
    weights = tf.where(inside, weights, 0.0)
    return weights / tf.reduce_sum(weights, axis=-1, keepdims=True)


def _cubic_kernel(d: tf.Tensor) -> tf.Tensor:
    """Returns Keys' kernel with a = -0.5 at the distances d >= 0."""
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return tf.where(d < 1.0, near, tf.where(d < 2.0, far, 0.0))


def _center_box(height: Any, width: Any, proportion: float) -> tf.Tensor:
    """Returns SimCLR's central square crop, int32 `[4]`: y, x, h, w."""
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.cast(tf.round(proportion * shorter), tf.int32)
    y, x = (height - side + 1) // 2, (width - side + 1) // 2
    return tf.stack([y, x, side, side])


# Colour and blur.


def _color_jitter(
    x: tf.Tensor, draws: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Returns `x` in [0, 1], after four colour operations in random order.

    Brightness and contrast are affine; hue and saturation commute. So every
    order is hue and saturation, affine, hue and saturation, affine, hue and
    saturation, where what does not happen to an image gets an amount that
    changes nothing.
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

    def turn(draw: int) -> tf.Tensor:
        """Returns how many of brightness and contrast go before."""
        order = draws[:, _ORDER + draw]
        is_later = (order > brightness_order, order > contrast_order)
        return tf.add_n([tf.cast(later, tf.int32) for later in is_later])

    def hue_and_saturation(x: tf.Tensor, now: int) -> tf.Tensor:
        if x.shape[1] != 3 or s == h == 0:
            return x
        return _adjust_hue_and_saturation(
            x,
            tf.where(turn(_HUE) == now, hue, 0.0),
            tf.where(turn(_SATURATION) == now, saturation, 1.0),
        )

    # Bicubic resampling overshoots [0, 1]. SimCLR leaves that to the clip after
    # the first operation.
    x = hue_and_saturation(tf.clip_by_value(x, 0.0, 1.0), 0)
    for now, is_brightness in ((1, brightness_first), (2, ~brightness_first)):
        mean = tf.reduce_mean(x, axis=[2, 3], keepdims=True)
        factor = tf.where(is_brightness, scale, contrast)
        x = factor * x + tf.where(is_brightness, offset, mean - contrast * mean)
        x = hue_and_saturation(tf.clip_by_value(x, 0.0, 1.0), now)
    return x


def _adjust_hue_and_saturation(
    x: tf.Tensor, shift: tf.Tensor, factor: tf.Tensor
) -> tf.Tensor:
    """As `tf.image.adjust_hue` and `adjust_saturation`, in either order.

    `x` is `[batch, 3, height, width]` in [0, 1], and so is the result; hue is
    shifted by full circles, at most half of one; HSV saturation is scaled, to
    at most 1. `shift` and `factor` are `[batch, 1, 1, 1]`.
    """
    # XLA sees through slices of a stack, and would compute each plane again
    # wherever it is used; it does not see through slices of a reshaped stack.
    _, _, height, width = x.shape
    x = tf.reshape(x, [-1, 3 * height * width])
    red, green, blue = tf.split(x, 3, axis=1)
    shift, factor = shift[:, 0, 0], factor[:, 0, 0]

    value = tf.maximum(tf.maximum(red, green), blue)
    chroma = value - tf.minimum(tf.minimum(red, green), blue)
    # Hue in sixths of the circle: an offset for the largest channel, and a
    # position between the other two.
    red_is_max, green_is_max = red >= value, green >= value
    offset = tf.where(red_is_max, 0.0, tf.where(green_is_max, 2.0, 4.0))
    difference = tf.where(green_is_max, blue - red, red - green)
    difference = tf.where(red_is_max, green - blue, difference)
    # A chroma of 0 has a difference of 0.
    hue = offset + 6.0 * shift + difference / tf.maximum(chroma, 1e-20)

    # How far each channel is below the value, relative to the chroma: 0 up to
    # a sixth from its own hue, 1 from two sixths on. Exact for -4 <= hue <= 8,
    # without that `hue` would have to be wrapped to [0, 6).
    chroma = tf.minimum(factor * chroma, value)
    depths = (
        tf.abs(tf.abs(hue - 3.0) - 3.0) - 1.0,
        2.0 - tf.abs(tf.abs(hue - 2.0) - 3.0),
        tf.abs(tf.abs(hue - 1.0) - 3.0) - 1.0,
    )
    x = tf.stack(
        [value - chroma * tf.clip_by_value(d, 0.0, 1.0) for d in depths], axis=1
    )
    return tf.reshape(x, [-1, 3, height, width])


def _gaussian_blur(x: tf.Tensor, sigma: tf.Tensor, radius: int) -> tf.Tensor:
    """Returns blurred `[batch, channels, size, size]`; around it is black.

    `sigma`, float32 `[batch, 1, 1, 1]`, and `radius` below `size / 2`, where
    the Gaussian is cut off, are in pixels; the weights have a sum of 1.
    """
    # Products with a symmetric band matrix: at 224 pixels, they take two thirds
    # of the time of 46 shifted sums.
    pixel = tf.range(x.shape[3], dtype=tf.float32)
    distance = tf.abs(pixel - pixel[:, tf.newaxis])
    weights = tf.exp(-0.5 * tf.square(distance / sigma))
    weights = tf.where(distance <= radius, weights, 0.0)
    # Near the border, a part of the Gaussian is outside of the matrix.
    total = tf.reduce_sum(weights, axis=-1, keepdims=True)
    weights /= tf.reduce_max(total, axis=-2, keepdims=True)
    return tf.matmul(tf.matmul(weights, x), weights)


def _random_blur(
    x: tf.Tensor, draws: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Returns `x` in [0, 1], some images blurred."""
    radius = augmentation.size // 20
    if augmentation.blur_probability == 0 or radius == 0:
        return x
    blurs = draws[:, _BLUR] < augmentation.blur_probability
    low, high = augmentation.blur_sigma
    sigma = low + draws[:, _BLUR_SIGMA] * (high - low)
    blurred = _gaussian_blur(x, sigma, radius)
    # Rounding may exceed 1 by a last digit.
    return tf.where(blurs, tf.minimum(blurred, 1.0), x)


def _random_gray(
    x: tf.Tensor, draws: tf.Tensor, augmentation: Augmentation
) -> tf.Tensor:
    """Returns `[batch, height, width, channels]`, some images without colour.

    A product with a matrix even where all of them keep it: that also moves
    channels last, and XLA does not compute the colours again for each of them.
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


# Encoded files, one at a time, on the host.


def decode_crop(
    encoded: tf.Tensor,
    key: tf.Tensor,
    augmentation: Augmentation,
    channels: int = 3,
    remove_background: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
    """Returns a random crop of an encoded image, resized; nothing else.

    What follows (flip, colour, blur) is for `augment` with `crop=False`.

    Args:
        encoded: string scalar: JPEG, of which only the crop is decoded, or
            PNG, BMP or GIF (its first frame).
        key: uint32 scalar of `example_keys`.
        augmentation: gives the limits of the crop and the size.
        channels: 1 or 3.
        remove_background: function of the whole image, uint8 `[height, width,
            channels]`, that returns another; called, before the crop, where
            `removes_background(key)` holds.

    Returns:
        uint8 `[size, size, channels]`.
    """

    def random_box(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        keys = key[tf.newaxis]
        return random_crop_boxes(keys, height, width, augmentation)[0]

    def decode(edit: Callable | None = None) -> tf.Tensor:
        return _decode_box(encoded, random_box, channels, edit)

    if remove_background is None:
        image = decode()
    else:
        image = tf.cond(
            removes_background(key, augmentation),
            lambda: decode(remove_background),
            decode,
        )
    return _resize_bytes(image, augmentation.size, channels)


def decode_center_crop(
    encoded: tf.Tensor,
    size: int,
    crop_proportion: float = 0.875,
    channels: int = 3,
) -> tf.Tensor:
    """Returns the central square of an encoded image, resized.

    Args:
        encoded: string scalar, as in `decode_crop`.
        size: side of the output, in pixels.
        crop_proportion: side of the square, relative to the shorter side.
        channels: 1 or 3.

    Returns:
        uint8 `[size, size, channels]`.
    """

    def center_box(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return _center_box(height, width, crop_proportion)

    image = _decode_box(encoded, center_box, channels)
    return _resize_bytes(image, size, channels)


def _decode_box(
    encoded: tf.Tensor,
    choose_box: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    channels: int,
    edit: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
    """Decodes the part of an image that `choose_box(height, width)` names.

    `edit`, if any, maps the whole image to another before that.
    """

    def decode_part() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(encoded)
        box = choose_box(shape[0], shape[1])
        return tf.io.decode_and_crop_jpeg(encoded, box, channels=channels)

    def decode_whole() -> tf.Tensor:
        image = tf.io.decode_image(encoded, channels, expand_animations=False)
        if edit is not None:
            image = edit(image)
        shape = tf.shape(image)
        box = choose_box(shape[0], shape[1])
        return tf.image.crop_to_bounding_box(image, *tf.unstack(box))

    if edit is not None:
        return decode_whole()
    return tf.cond(tf.io.is_jpeg(encoded), decode_part, decode_whole)


def _resize_bytes(image: tf.Tensor, size: int, channels: int) -> tf.Tensor:
    """Returns uint8 `[size, size, channels]`, by bicubic resampling."""
    image = tf.image.resize(image, [size, size], tf.image.ResizeMethod.BICUBIC)
    image = tf.saturate_cast(tf.round(image), tf.uint8)
    return tf.ensure_shape(image, [size, size, channels])
