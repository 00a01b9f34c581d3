# SPDX-License-Identifier: Apache-2.0
"""Decoding of image files: crops, in parallel, with a substitute for failures.

The other image operations are in `data_util.py`.
"""

import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import data_util
from contrastive.sources.dataset import Dataset
from contrastive.sources.order import Plan

_CHUNK = 8  # examples decoded by one call


def decode_crop(
    encoded: tf.Tensor,
    key: tf.Tensor,
    augmentation: data_util.Augmentation,
    channels: int = 3,
    remove_background: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
    """Decodes a random crop and resizes it: uint8 `[size, size, channels]`.

    All else is left to `data_util.augment` with `crop=False`. `encoded` is a string scalar: JPEG,
    of which only the crop is decoded, or PNG, BMP or GIF (its first frame); `key` is a uint32
    scalar of `data_util.example_keys`. `remove_background` turns the whole image, uint8 `[height,
    width, channels]`, into another, where `data_util.removes_background(key)` holds.
    """

    def random_box(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        keys = key[tf.newaxis]
        return data_util.random_crop_boxes(keys, height, width, augmentation)[0]

    args = encoded, random_box, augmentation.size, channels
    if remove_background is None:
        return _decode_box(*args)
    return tf.cond(
        data_util.removes_background(key, augmentation),
        lambda: _decode_box(*args, remove_background),
        lambda: _decode_box(*args),
    )


def decode_center_crop(
    encoded: tf.Tensor,
    size: int,
    crop_proportion: float = 0.875,
    channels: int = 3,
) -> tf.Tensor:
    """Decodes the central square as `decode_crop` does a random one.

    `crop_proportion` is its side relative to the shorter side of the image.
    """

    def center_box(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return data_util.center_box(height, width, crop_proportion)

    return _decode_box(encoded, center_box, size, channels)


def _decode_box(
    encoded: tf.Tensor,
    choose_box: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    size: int,
    channels: int,
    edit: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
    """Decodes and resizes `choose_box(height, width)`, after `edit`."""

    def decode_part() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(encoded)
        box = choose_box(shape[0], shape[1])
        return tf.io.decode_and_crop_jpeg(encoded, box, channels=channels)

    def decode_whole() -> tf.Tensor:
        image = decode(encoded, channels)
        if edit is not None:
            image = edit(image)
        shape = tf.shape(image)
        box = choose_box(shape[0], shape[1])
        return tf.image.crop_to_bounding_box(image, *tf.unstack(box))

    image = (
        tf.cond(tf.io.is_jpeg(encoded), decode_part, decode_whole)
        if edit is None
        else decode_whole()
    )
    image = tf.image.resize(image, [size, size], tf.image.ResizeMethod.BICUBIC)
    image = tf.saturate_cast(tf.round(image), tf.uint8)
    return tf.ensure_shape(image, [size, size, channels])


def decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes an image whole, of a GIF the first frame; 0 channels: its own."""
    return tf.io.decode_image(encoded, channels, expand_animations=False)


def decoded_rows(
    dataset: Dataset, plan: Plan, crop: Callable[[tf.Tensor, dict], dict]
) -> tf.data.Dataset:
    """Decodes the rows of an encoded dataset, in order; none is ever missing.

    An image that does not decode must neither end the run nor shift the stream, so a grey one
    replaces it, and the log names it. Errors can only be caught around a data set; one for each
    example costs 0.3 ms, so chunks are tried whole, and a chunk that fails row by row.

    Padding follows the last position of `plan`. `crop` turns an encoded image and its row (`id`
    int64, `epoch` int32) into a dictionary of uint8 images, to which `id`, `epoch`, `label` and
    `weight` are added.
    """
    rows = dataset.source.read(plan, None)

    # One trace for the three places of its use; tracing is what starting costs.
    @tf.function(input_signature=[rows.element_spec], autograph=False)
    def decode_row(row: dict[str, tf.Tensor]) -> dict:
        encoded, label = dataset.source.open_row(row)
        example = {"id": row["id"], "epoch": row["epoch"], "label": label}
        return {**example, "weight": 1.0, **crop(encoded, row)}

    spec = rows.map(decode_row).element_spec

    def substitute(row: dict[str, tf.Tensor]) -> dict:
        report = tf.numpy_function(dataset.report_undecodable, [row["id"]], [])
        with tf.control_dependencies([report]):
            return _blank(spec, tf.identity(row["id"]), row["epoch"])

    def try_row(row: dict[str, tf.Tensor]) -> tf.data.Dataset:
        rows = tf.data.Dataset.from_tensors(row)
        decoded = rows.map(decode_row).ignore_errors(log_warning=True)
        return decoded.concatenate(rows.map(substitute)).take(1)

    def try_chunk(chunk: dict[str, tf.Tensor]) -> tf.data.Dataset:
        whole = tf.data.Dataset.from_tensors(chunk).map(
            lambda rows: tf.map_fn(decode_row, rows, fn_output_signature=spec)
        )
        rows = tf.data.Dataset.from_tensor_slices(chunk).flat_map(try_row)
        return whole.ignore_errors().concatenate(rows.batch(_CHUNK)).take(1)

    # Chunks that are done wait for their turn, so one a core leaves cores idle: measured on 2
    # cores, 440 images/s instead of 700.
    chunks = rows.batch(_CHUNK).interleave(
        try_chunk,
        cycle_length=2 * (os.cpu_count() or 1),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    padding = plan.positions(plan.end, plan.stop)
    padding = padding.map(lambda p: _blank(spec, -tf.ones_like(p), -1))
    return chunks.unbatch().concatenate(padding)


def _blank(spec: dict, example_id: tf.Tensor, epoch: Any) -> dict:
    """Returns an example of `spec` without label or weight, its images grey."""
    grey = tf.nest.map_structure(lambda x: tf.fill(x.shape, tf.cast(128, x.dtype)), spec)
    known = {"id": example_id, "epoch": epoch, "label": -1, "weight": 0.0}
    return {**grey, **known}
