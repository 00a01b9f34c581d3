# SPDX-License-Identifier: Apache-2.0
"""A dataset name or a folder in, resumable streams of uint8 batches out.

What stands at a position of a stream depends on the seed and the epoch alone (see
`contrastive/sources/order.py`), so resuming at a step is arithmetic, and 1, 2 or 4 replicas see the
same global batches.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from absl import logging

import data_util
from contrastive.sources import arrays, decoding, facts, masks, openers
from contrastive.sources.arrays import Arrays as Arrays
from contrastive.sources.dataset import Dataset, Request, some
from contrastive.sources.order import Plan

_FOREVER = 1 << 30  # steps


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    channels: int | None = None,
    memory_limit: int = facts.MEMORY_LIMIT,
    mask_dir: str | None = None,
    saliency: str | None = None,
) -> Dataset:
    """Opens one split of a dataset; decodes it if it is small.

    Args:
        name: a name of a kind in `contrastive.sources.openers.OPENERS`:

            - "photo_patches", built in: see `sources/photo_patches.py`;
            - a TFDS name, e.g. "cifar10" or "imagenet2012_subset/1pct";
            - a folder, with a separator in its name, also in a bucket: a prepared TFDS folder, or
              JPEG, PNG, BMP and GIF images as `class/image`, `split/class/image`, or without labels
              as `image` or `split/image`;
            - "path.npz", also in a bucket: uint8 `images [N, H, W, C]` and optional integer `labels
              [N]`, -1 for none; `images_test` and the optional `labels_test` are split "test", the
              others "train".

            Without test images or split folders, a tenth, chosen by a hash of index or path, is
            "test", the rest "train".
        split: a split, or an expression of TFDS: "train[:90%]", "train+test"; "all" is every split,
            of a folder in the order of the paths.
        data_dir: where TFDS keeps its datasets; its own default if None.
        channels: channels to decode: 1, 3 or 4; the dataset's own if None (3 for a folder).
        memory_limit: bytes. Images of one size, at most 128 pixels a side, that fit in it are
            decoded now and held in memory.
        mask_dir: folder of masks, for the removal of backgrounds: PNG, of which 128 and more is
            foreground, named as in `sources/masks.py`. Images without a mask, or with an
            implausible one, stay whole. For a file that is no PNG, TensorFlow raises an error if
            images are in memory; else the image counts as one that does not decode.
        saliency: name in `masks.ESTIMATORS`, which estimates masks.

    Raises:
        NoSuchSplit: a ValueError, if the split does not exist or is empty.
        ValueError: if there is no such dataset, folder, image, estimator or mask, or it cannot be
            reached, prepared or decoded to `channels`.
    """
    request = Request(name, split, data_dir, channels, memory_limit)
    dataset = openers.opener_of(request).load(request)
    if mask_dir or saliency:
        dataset = masks.attach(dataset, mask_dir, saliency)
    return _checked(dataset, channels)


def outline(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    channels: int | None = None,
) -> Dataset:
    """Opens a split as far as it is here, for the shapes of its batches.

    Nothing is downloaded: folders and archives that can be reached are opened as `load` does it; of
    TFDS datasets, features and, where they have been prepared, sizes are known; all else is taken
    from ImageNet. The arguments are as for `load`.

    Raises:
        ValueError: if there is no TFDS dataset of this name, or what is here cannot be opened.
    """
    request = Request(name, split, data_dir, channels)
    try:
        open_outline = openers.opener_of(request).outline
    except ValueError:  # the file system does not answer
        open_outline = arrays.unknown
    return _checked(open_outline(request), channels)


def _checked(dataset: Dataset, channels: int | None) -> Dataset:
    """Checks the channels of a dataset, and logs the facts about it."""
    if channels not in (None, dataset.channels):
        raise ValueError(
            f"{dataset.name!r} holds images of {dataset.channels} channels. "
            f"Received: channels={channels}."
        )
    logging.info("%s", describe(dataset))
    return dataset


def describe(dataset: Dataset) -> str:
    """Says the facts about a dataset in a line, and one for each note."""
    size, lost = dataset.image_size, sorted(dataset.undecodable)
    classes = dataset.num_classes
    labels = f"{classes} classes" if classes else "unlabelled"
    pixels = f"{size[0]}x{size[1]} pixels" if size else "sizes vary"
    line = (
        f"{dataset.name}, {dataset.split}: {dataset.num_examples:,} examples, "
        f"{labels}, {pixels} x {dataset.channels} channels, "
        f"{dataset.source.kind}"
    )
    failed = [f"{len(lost)} did not decode: {some(lost)}"] if lost else []
    return "\n  ".join([line, *dataset.notes, *failed])


def undecodable_images_message(error: Exception) -> str | None:
    """Finds the message of `UndecodableImages` in TensorFlow's error, or None.

    Of an exception of a Python function in a stream, TensorFlow makes an error whose text has the
    name of the class, the message and a traceback.
    """
    text = getattr(error, "message", "")
    found = re.search(r"\bUndecodableImages: (.+)", text)
    return found[1] if found else None


def subset(dataset: Dataset, ids: Sequence[int] | np.ndarray) -> Dataset:
    """Selects some examples, which keep their ids; repeated ids count once.

    Of TFRecords, streams read every shard that holds one of them, whole.

    Raises:
        ValueError: if there are no ids, or some are none of the dataset's.
    """
    chosen = np.unique(np.asarray(ids, np.int64))
    _check_ids(dataset, "ids", chosen)
    note = f"{len(chosen):,} of {dataset.num_examples:,} examples"
    return dataclasses.replace(
        dataset,
        ids=chosen,
        num_examples=len(chosen),
        notes=(*dataset.notes, note),
        undecodable=set(),
    )


def _check_ids(dataset: Dataset, name: str, ids: np.ndarray) -> None:
    """Raises a ValueError unless `ids` are some of those of the dataset."""
    unknown = np.setdiff1d(ids, dataset.example_ids)
    if len(unknown) or not len(ids):
        raise ValueError(
            f"`{name}` must be ids of examples of {dataset.name!r}, "
            f"{dataset.split!r}, and at least one. Received: {len(ids)} ids, "
            f"{len(unknown)} unknown: {some(list(map(str, unknown)))}."
        )


def train_stream(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    num_steps: int | None = None,
    views: Sequence[data_util.Augmentation] = (),
    num_replicas: int = 1,
    pipeline_index: int = 0,
    num_pipelines: int = 1,
    labelled_ids: Sequence[int] | np.ndarray | None = None,
    labelled_per_batch: int = 0,
) -> tf.data.Dataset:
    """Yields shuffled batches of one replica, epoch after epoch.

    For `strategy.distribute_datasets_from_function`. Epochs follow each other without a gap: a
    batch may span two. Each epoch is one permutation of the examples, seeded by (seed, epoch); of
    TFRecords, a permutation of the shards, and of the examples within each group of shards. Every
    host reads all TFRecords, in the same order, but decodes only its own rows.

    `batch_size`, at most `num_examples`, is global, `num_replicas` counts all hosts' replicas, and
    `pipeline_index` is this host's of `num_pipelines`. A resumed run starts at `first_step`;
    without `num_steps`, a stream is endless. `seed` is that of the order and of the crops, of which
    one is cut for each of the `views` where the dataset is encoded. Of `labelled_ids`, every global
    batch holds `labelled_per_batch`, evenly spread over its rows; they and the other examples are
    shuffled, and have epochs, separately.

    Returns:
        Dictionaries, with `b = batch_size / num_replicas`, of

        - `id` int64, `epoch` int32, `label` int32 `[b]` (-1: none);
        - `weight` float32 `[b]`: 0 for an image that did not decode, else 1;
        - `image` uint8 `[b, H, W, C]`, whole; or, where the dataset is encoded, `crops` uint8 `[b,
          V, S, S, C]`, or a tuple of
          `[b, S, S, C]` where the views differ in size;
        - `mask` uint8 `[b, H, W]`, 0 for background, beside `image`, if some view has a
          `mask_probability`. Crops have lost their background.

        Element `j` belongs to replica `j % R` of step `first_step + j // R`, of the `R` replicas of
        this host.

    Raises:
        ValueError: if the batch does not divide among the replicas; if it, or its labelled part,
            exceeds the examples; if an encoded dataset is given no views, or a view is to be masked
            and the dataset has no masks; if labelled examples are asked for of TFRecords.
    """
    if batch_size > dataset.num_examples:
        raise ValueError(
            "`batch_size` exceeds the dataset, so that an image would be its "
            f"own negative. Received: batch_size={batch_size}, but "
            f"{dataset.name!r} has {dataset.num_examples} examples."
        )
    if dataset.is_encoded and not views:
        raise ValueError(
            f"{dataset.name!r} is decoded and cropped on the host: `views` "
            "must name an augmentation for each crop. Received: views=()."
        )
    is_masked = any(view.mask_probability for view in views)
    if is_masked and dataset.masks is None:
        raise ValueError(
            "A view with a `mask_probability` needs masks: `mask_dir` or "
            f"`saliency` of `load`. Received: {dataset.name!r}, without."
        )
    layout = batch_size, num_replicas, pipeline_index, num_pipelines
    steps = seed, first_step, _FOREVER if num_steps is None else num_steps
    plan = Plan(dataset.num_examples, *layout, *steps, dataset.ids)
    if labelled_ids is not None or labelled_per_batch:
        plan = _with_labelled(dataset, plan, labelled_ids, labelled_per_batch)
    crop = _random_crops(dataset, seed, views)
    stream = _stream(dataset, plan, crop, is_masked)
    if num_steps is not None:
        return stream
    # Otherwise, several hosts ask each other at every step whether it ends, and do not know the
    # size of a batch.
    endless = tf.data.INFINITE_CARDINALITY
    return stream.apply(tf.data.experimental.assert_cardinality(endless))


def _random_crops(
    dataset: Dataset, seed: int, views: Sequence[data_util.Augmentation]
) -> Callable[[tf.Tensor, dict], dict]:
    def crop(encoded: tf.Tensor, row: dict[str, tf.Tensor]) -> dict:
        ids, crops = row["id"][tf.newaxis], []
        for index, view in enumerate(views):
            keys = data_util.example_keys(seed, row["epoch"], ids, index)
            args = [encoded, keys[0], view, dataset.channels]
            if view.mask_probability:
                args.append(masks.background_remover(dataset, ids, keys, view))
            crops.append(decoding.decode_crop(*args))
        same_size = len({view.size for view in views}) == 1
        return {"crops": tf.stack(crops) if same_size else tuple(crops)}

    return crop


def _with_labelled(
    dataset: Dataset,
    plan: Plan,
    labelled_ids: Sequence[int] | np.ndarray | None,
    labelled_per_batch: int,
) -> Plan:
    if not dataset.source.has_random_access:
        raise ValueError(
            f"{dataset.source.kind} are read from their start, so labelled "
            f"examples cannot be drawn from them. Received: {dataset.name!r}; "
            "a folder of image files can be used."
        )
    given = [] if labelled_ids is None else labelled_ids
    labelled = np.unique(np.asarray(given, np.int64))
    _check_ids(dataset, "labelled_ids", labelled)
    unlabelled = np.setdiff1d(dataset.example_ids, labelled)
    others = plan.batch_size - labelled_per_batch
    enough_labelled = 0 < labelled_per_batch <= len(labelled)
    if not enough_labelled or not 0 < others <= len(unlabelled):
        raise ValueError(
            "`labelled_per_batch` must be positive, less than `batch_size`, "
            "and there must be as many labelled, and other, examples as in a "
            f"batch. Received: labelled_per_batch={labelled_per_batch}, "
            f"batch_size={plan.batch_size}, of {len(labelled)} labelled and "
            f"{len(unlabelled)} other examples."
        )
    return dataclasses.replace(
        plan,
        ids=unlabelled,
        labelled_ids=labelled,
        labelled_per_batch=labelled_per_batch,
    )


def eval_stream(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int | None = None,
    crop_proportion: float | None = None,
    num_replicas: int = 1,
    pipeline_index: int = 0,
    num_pipelines: int = 1,
) -> tf.data.Dataset:
    """Yields every example once, in order, in batches of one replica.

    The arguments are as for `train_stream`, but the batch may exceed the dataset. An encoded image
    is cropped at its centre: `image_size` is the side of the crop in pixels, and `crop_proportion`,
    in (0, 1], the share of the shorter side that it covers.

    Returns:
        Dictionaries as those of `train_stream`, always with `image`, equally many on every host.
        Padding of the last step has weight 0, and -1 for id, epoch and label.

    Raises:
        ValueError: if the batch does not divide among the replicas, or an encoded dataset is given
            no image size.
    """
    if dataset.is_encoded and not image_size:
        raise ValueError(
            f"{dataset.name!r} is cropped on the host: `image_size`, in "
            f"pixels, must be given. Received: image_size={image_size}."
        )

    how = image_size or 0, crop_proportion or 1.0, dataset.channels

    def crop(encoded: tf.Tensor, _: dict[str, tf.Tensor]) -> dict:
        return {"image": decoding.decode_center_crop(encoded, *how)}

    layout = batch_size, num_replicas, pipeline_index, num_pipelines
    plan = Plan(dataset.num_examples, *layout, ids=dataset.ids)
    return _stream(dataset, plan, crop, is_masked=False)


def _stream(
    dataset: Dataset,
    plan: Plan,
    crop: Callable[[tf.Tensor, dict], dict],
    is_masked: bool,
) -> tf.data.Dataset:
    """Yields the batches of `plan`; `crop` is as for `decoded_rows`."""
    # Streams hold the data by reference, on the host whatever the device of the caller: only the
    # batches travel.
    with tf.device("CPU:0"):
        if not dataset.is_encoded:
            held = dataset.masks if is_masked else None
            batches = dataset.source.read(plan, held)
        else:
            examples = decoding.decoded_rows(dataset, plan, crop)
            batches = examples.batch(plan.rows, drop_remainder=True)
    return batches.prefetch(tf.data.AUTOTUNE)
