# SPDX-License-Identifier: Apache-2.0
"""Masks of the foreground: read or estimated, and removal of the rest.

ReLICv2 takes its masks from a network, DeepUSPS, whose weights are not published. The two estimates
here need no weights, and find about where an object is, not its outline.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import data_util
from contrastive import storage
from contrastive.sources.dataset import Dataset, some

# Masks with less or more foreground are taken to be failures.
_PLAUSIBLE_SHARES = (0.05, 0.95)
_WORKING_SIDE = 64  # pixels
# Standard deviations: of 64 pixels; of the height and the width.
_SPECTRAL_SIGMA, _FOREGROUND_SIGMA, _CENTER_SIGMA = 2.5, 4.0, 0.3
_CHUNK = 256  # examples whose masks are made by one call

# From images, uint8 `[b, h, w, c]`, and their ids to masks, uint8 `[b, h, w]`, 1 for foreground and
# 0 for background.
_MaskFunction = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def attach(dataset: Dataset, mask_dir: str | None, estimator: str | None) -> Dataset:
    """Adds masks from the files of a folder, or of an estimator.

    Raises:
        ValueError: if both or unknown ones are given, or there is no file.
    """
    if mask_dir and estimator:
        raise ValueError(
            "Masks are either read or estimated. Received: "
            f"mask_dir={mask_dir!r}, saliency={estimator!r}."
        )
    files = _find(dataset, mask_dir) if mask_dir else []
    missing = {i for i, file in enumerate(files) if not file}
    make = _reader(files) if files else _estimator(str(estimator))
    plausible = _PlausibleMasks(make, missing, log=dataset.is_encoded)
    masks: Any = plausible
    implausible = "implausible ones are counted as images are read"
    if not dataset.is_encoded:
        masks = _hold(plausible, dataset.source.images)
        implausible = f"{len(plausible.ids):,} implausible"
    note = (
        f"masks of {dataset.num_examples - len(missing):,} images "
        f"({implausible}), none of {len(missing):,}; "
        "without a plausible mask, an image stays whole"
    )
    notes = (*dataset.notes, note)
    return dataclasses.replace(dataset, masks=masks, notes=notes)


def remove_background(
    images: tf.Tensor,
    masks: tf.Tensor,
    keys: tf.Tensor,
    augmentation: data_util.Augmentation,
) -> tf.Tensor:
    """Fills the background of some images, before `data_util.augment`.

    `data_util.removes_background` chooses them by their `keys`, uint32 `[b]`. `images` are uint8
    `[b, h, w, c]`, as is the result, and `masks` uint8 `[b, h, w]`, 0 for background. Source:
    ReLICv2, arXiv:2201.05119, which multiplies by the mask: fill "zero".
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


def background_remover(
    dataset: Dataset,
    ids: tf.Tensor,
    keys: tf.Tensor,
    view: data_util.Augmentation,
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Makes a function that removes the background of a decoded image.

    `ids` int64 and `keys` uint32, `[1]`, are those of the example.
    """

    def remove(image: tf.Tensor) -> tf.Tensor:
        images = tf.ensure_shape(image, [None, None, dataset.channels])
        images = images[tf.newaxis]
        masks = dataset.masks(images, ids)
        return remove_background(images, masks, keys, view)[0]

    return remove


def is_plausible(masks: tf.Tensor) -> tf.Tensor:
    """Tells, bool `[b]`, if 5 to 95 % of an image are foreground."""
    low, high = _PLAUSIBLE_SHARES
    share = tf.reduce_mean(tf.cast(masks, tf.float32), axis=[1, 2])
    return (share > low) & (share < high)


def whole_if_implausible(masks: tf.Tensor) -> tf.Tensor:
    """Replaces masks, uint8 `[b, h, w]`, by 1 where they are not plausible."""
    use = is_plausible(masks)[:, tf.newaxis, tf.newaxis]
    return tf.where(use, masks, tf.ones_like(masks))


# The mask of `dogs/rex.jpg`, in a folder of images, is `dogs/rex.png`. Otherwise, and where that is
# missing, it is `{id}.png`.
def _find(dataset: Dataset, mask_dir: str) -> list[str]:
    """Returns the file of the mask of each id; "" where there is none."""
    found = set(storage.file_names(mask_dir))
    files = []
    for example_id in range(dataset.num_examples):
        names = [f"{example_id}.png"]
        if dataset.file_names:
            stem, _ = os.path.splitext(dataset.file_names[example_id])
            names.insert(0, f"{stem}.png")
        name = next(filter(found.__contains__, names), None)
        files.append(os.path.join(mask_dir, name) if name else "")
    if not any(files):
        raise ValueError(
            f"There are no masks of {dataset.name!r}, {dataset.split!r}, in "
            f"{storage.full_path(mask_dir)!r}; the last one looked for is "
            f"{' or '.join(names)}. Files there: {some(sorted(found))}."
        )
    return files


def _reader(files: Sequence[str]) -> _MaskFunction:
    """Returns a function that reads masks, whole where the file is ""."""
    # On the host, held by reference: there may be millions.
    with tf.device("CPU:0"):
        all_files = tf.constant(files)

    def read(images: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
        size = tf.shape(images)[1:3]

        def decode(file: tf.Tensor) -> tf.Tensor:
            # The first channel counts: making colour grey would need weights.
            mask = tf.io.decode_png(tf.io.read_file(file))[..., :1]
            nearest = tf.image.ResizeMethod.NEAREST_NEIGHBOR
            mask = tf.image.resize(mask, size, nearest)
            return tf.cast(mask[..., 0] >= 128, tf.uint8)

        def read_one(file: tf.Tensor) -> tf.Tensor:
            whole = tf.ones(size, tf.uint8)
            return tf.cond(file == "", lambda: whole, lambda: decode(file))

        spec = tf.TensorSpec((None, None), tf.uint8)
        chosen = tf.gather(all_files, ids)
        return tf.map_fn(read_one, chosen, fn_output_signature=spec)

    return read


def _estimator(name: str) -> _MaskFunction:
    if name not in ESTIMATORS:
        raise ValueError(f"`saliency` must be one of {', '.join(ESTIMATORS)}. Received: {name!r}.")
    return lambda images, _: foreground(ESTIMATORS[name](images))


class _PlausibleMasks:
    """A function that makes masks, whole where not plausible: see `ids`."""

    def __init__(self, make: _MaskFunction, missing: set[int], *, log: bool) -> None:
        self.ids: set[int] = set()  # without those in `missing`
        self._make, self._missing, self._log = make, missing, log

    def __call__(self, images: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
        masks = self._make(images, ids)
        failed = tf.boolean_mask(ids, ~is_plausible(masks))
        report = tf.cond(
            tf.size(failed) > 0,
            lambda: tf.numpy_function(self._report, [failed], tf.bool),
            lambda: True,
        )
        with tf.control_dependencies([report]):
            return whole_if_implausible(masks)

    def _report(self, ids: np.ndarray) -> bool:
        for example_id in sorted(set(ids.tolist()) - self._missing - self.ids):
            self.ids.add(example_id)
            count = len(self.ids)
            if self._log and count == 10 ** (len(str(count)) - 1):
                logging.info(
                    f"Implausible masks so far: {count}, the last of example "
                    f"{example_id}; these images stay whole."
                )
        return True


def _hold(masks: _MaskFunction, images: np.ndarray) -> np.ndarray:
    held = np.empty(images.shape[:3], np.uint8)
    make = tf.function(masks, autograph=False, reduce_retracing=True)
    with tf.device("CPU:0"):
        for start in range(0, len(images), _CHUNK):
            part = tf.constant(images[start : start + _CHUNK])
            ids = tf.range(start, start + len(part))
            held[start : start + _CHUNK] = make(part, ids)
    return held


def spectral_residual(images: tf.Tensor) -> tf.Tensor:
    """Estimates saliency by deviations from the smooth log spectrum.

    The saliency is `|F^-1(exp(R + iP))|^2`, smoothed, where P is the phase of the spectrum, and R
    its log amplitude less the mean of that over 3 x 3 frequencies. Images are uint8 `[b, h, w, c]`;
    the result is float32
    `[b, h, w]`, from 0 to 1 in each image, and 0 in an even one.

    Source: Hou & Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007, and its
    MATLAB code (means continued by the border values, Gaussian of 2.5 pixels). As there, in grey
    and at 64 pixels, but of the shorter side; below 64 pixels, the Gaussian shrinks in proportion.
    """
    gray = tf.reduce_mean(tf.cast(images, tf.float32), axis=-1)
    small, side = _reduced(gray)
    spectrum = tf.signal.fft2d(tf.cast(small, tf.complex64))
    amplitude = tf.abs(spectrum)
    # Phases of less than 1e-3, far below a grey level, are rounding errors.
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
    """Estimates saliency by the distance of colours from the mean colour.

    The saliency is `|m - x|` in CIE L*a*b*, with m the mean colour of the image, and x the image
    smoothed by 5 x 5 binomial weights; without three channels, as they are. Shapes and ranges are
    those of `spectral_residual`.
    Source: Achanta et al., "Frequency-tuned Salient Region Detection", CVPR 2009, section 3.
    """
    x = tf.cast(images, tf.float32) / 255.0
    if images.shape[-1] == 3:
        x = _srgb_to_lab(x)
    mean = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
    smooth = _smoothed(x, tf.constant([1.0, 4.0, 6.0, 4.0, 1.0]))
    return _normalized(tf.norm(smooth - mean, axis=-1), images)


ESTIMATORS = dict(spectral=spectral_residual, frequency_tuned=frequency_tuned)


def foreground(saliency: tf.Tensor) -> tf.Tensor:
    """Finds the region around the middle that is more salient than the mean.

    The saliency, float32 `[b, h, w]`, is smoothed (4 pixels, at the resolution of
    `spectral_residual`) and weighted by a Gaussian around the middle of the image (0.3 of the
    height and width); foreground, 1 in the uint8 result, is where it then exceeds its mean.

    The thresholds of the papers, 3 times the mean (Hou & Zhang) and twice the mean (Achanta et al.,
    of segments), leave some 5 % of the pixels, mostly edges, and half of the masks of CIFAR-10
    implausible. Here about 37 % are foreground, and no mask of 1,000 is implausible.
    """
    small, side = _reduced(saliency)
    weights = _gaussian(_FOREGROUND_SIGMA, side)
    smooth = _smoothed(small[..., tf.newaxis], weights)[..., 0]
    height, width = _centered(tf.shape(small)[1]), _centered(tf.shape(small)[2])
    smooth *= height[:, tf.newaxis] * width
    smooth = _resized(smooth, tf.shape(saliency)[1:])
    mean = tf.reduce_mean(smooth, axis=[1, 2], keepdims=True)
    return tf.cast(smooth > mean, tf.uint8)


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
    """Smooths `[b, h, w, c]` both ways, by weights `[odd]`, of any sum."""
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
    # The saliency of an even image is made of rounding errors.
    varies = tf.reduce_any(images != images[:, :1, :1], axis=-1)
    varies = tf.reduce_any(varies, axis=[1, 2], keepdims=True)
    scaled = tf.math.divide_no_nan(saliency - low, high - low)
    return tf.where(varies, scaled, 0.0)


def _srgb_to_lab(x: tf.Tensor) -> tf.Tensor:
    """Returns sRGB in [0, 1] as CIE L*a*b* under D65; channels last."""
    linear = tf.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    # Rows of IEC 61966-2-1, each divided by its white point's X, Y and Z.
    to_x = [0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047]
    to_y = [0.212671, 0.715160, 0.072169]
    to_z = [0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883]
    to_xyz = tf.constant([to_x, to_y, to_z])
    xyz = tf.tensordot(linear, to_xyz, [[-1], [1]])
    root, line = tf.maximum(xyz, 1e-9) ** (1 / 3), xyz * (29 / 6) ** 2 / 3
    root = tf.where(xyz > (6 / 29) ** 3, root, line + 4 / 29)
    x, y, z = tf.unstack(root, axis=-1)
    return tf.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
