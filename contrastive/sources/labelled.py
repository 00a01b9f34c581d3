# SPDX-License-Identifier: Apache-2.0
"""Which examples have labels that may be used: chosen, read and written.

SemPPL trains on few labels, and semi-supervised evaluation on as few: the same
ones. So a run writes the ids it chose to its folder.
"""

import collections
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import data_util
from contrastive.sources.sources import Dataset, Records, some

_FILE = "labelled_ids.txt"
_FILE_NAME = "file_name"  # of TFDS, where examples come from image files
# Records at the start of each shard that `has_labels` reads at most.
_RECORDS_LOOKED_AT = 48


def choose(
    dataset: Dataset,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    seed: int,
) -> np.ndarray:
    """Chooses equally many examples of each class at random.

    An example is chosen by a hash of the seed and its id, so that the choice
    does not depend on anything else: with the same seed, of two choices of so
    many per class, the smaller is part of the larger.

    Args:
        dataset: what `data.load` returned, or a subset of it.
        fraction: share of the examples that have a label, in (0, 1]. The
            counts of two classes differ by 1 at most, and are at least 1.
        per_class: examples of each class; instead of `fraction`.
        seed: of the choice.

    Returns:
        int64 ids, ascending.

    Raises:
        ValueError: if there are no labels, or a class has too few examples;
            if not one of `fraction` and `per_class` is given, in its range.
    """
    is_fraction = fraction is not None and 0 < fraction <= 1
    is_count = per_class is not None and per_class >= 1
    if is_fraction == is_count or None not in (fraction, per_class):
        raise ValueError(
            "Either `fraction`, in (0, 1], or `per_class`, at least 1, must be "
            f"given. Received: fraction={fraction}, per_class={per_class}."
        )
    labels, ids = labels_of(dataset), dataset.example_ids
    num_classes = dataset.num_classes
    if not num_classes:
        raise ValueError(f"{dataset.name!r}, {dataset.split!r}, has no labels.")
    available = np.bincount(labels[labels >= 0], minlength=num_classes)
    if per_class is not None:
        counts = np.full(num_classes, per_class)
    else:
        total = max(round((fraction or 0) * available.sum()), num_classes)
        counts = np.full(num_classes, total // num_classes)
        # What is left over goes to random classes that have an example more.
        numbers = _random_numbers(np.arange(num_classes), seed, 1)
        order = np.lexsort((numbers, available <= counts))
        counts[order[: total % num_classes]] += 1
    if (available < counts).any():
        short = [
            f"{name}: {has} of {wants}"
            for name, has, wants in zip(
                dataset.class_names, available, counts, strict=True
            )
            if has < wants
        ]
        raise ValueError(
            f"Classes of {dataset.name!r}, {dataset.split!r}, have too few "
            f"examples: {some(short)}."
        )
    order = np.lexsort((ids, _random_numbers(ids, seed, 0)))
    chosen = [
        ids[order[labels[order] == label][:count]]
        for label, count in enumerate(counts)
    ]
    return np.sort(np.concatenate(chosen))


def _random_numbers(numbers: np.ndarray, seed: int, use: int) -> np.ndarray:
    """Returns a random uint32 for each number."""
    # Views have small numbers: these keys are not theirs.
    return data_util.example_keys(seed, 0, numbers, 2**31 + use).numpy()


def from_file(dataset: Dataset, path: str) -> np.ndarray:
    """Returns the ids that a text file lists.

    Args:
        dataset: what `data.load` returned, or a subset of it.
        path: of a file with one example a line: ids, or names. A name is the
            path of an image file, or its last parts, as in SimCLR's
            `imagenet_subsets/1percent.txt`: `n02088466_7379.JPEG`.

    Returns:
        int64 ids, ascending.

    Raises:
        ValueError: if the file lists nothing, or an example that is not in the
            dataset, or a name that several examples bear.
    """
    with tf.io.gfile.GFile(path) as file:
        lines = {line.strip() for line in file} - {""}
    if not lines:
        raise ValueError(f"No example is listed. Received: {path!r}.")
    if all(line.isdecimal() for line in lines):
        known = {str(i): [i] for i in dataset.example_ids}
        lines = {str(int(line)) for line in lines}
    else:
        known = _named(dataset, lines)
    unknown = sorted(lines - known.keys())
    ambiguous = sorted(line for line in lines if len(known.get(line, ())) > 1)
    if unknown or ambiguous:
        raise ValueError(
            f"Of {len(lines)} examples listed in {path!r}, {len(unknown)} are "
            f"not in {dataset.name!r}, {dataset.split!r}: {some(unknown)}. "
            f"{len(ambiguous)} could be several of it: {some(ambiguous)}."
        )
    return np.unique([known[line][0] for line in lines])


def _named(dataset: Dataset, wanted: set[str]) -> dict[str, list[int]]:
    """Returns the ids of the examples that bear each wanted name."""
    found = collections.defaultdict(list)
    for example_id, name in zip(
        dataset.example_ids, names_of(dataset), strict=True
    ):
        parts = name.split(os.sep)
        for start in range(len(parts)):
            ending = os.sep.join(parts[start:])
            if ending in wanted:
                found[ending].append(int(example_id))
    return found


def labels_of(dataset: Dataset) -> np.ndarray:
    """Returns labels, int32 `[num_examples]`, in the order of the ids.

    Reads TFRecords once from start to end. -1 where there is no label.
    """
    source = dataset.source
    if not isinstance(source, Records):
        return source.labels[dataset.example_ids]
    if not source.label_key:
        return np.full(dataset.num_examples, -1, np.int32)
    labels = _read_feature(source, source.label_key, np.int64(-1))
    return labels.astype(np.int32)[dataset.example_ids]


def has_labels(dataset: Dataset) -> bool:
    """Returns whether any example of a split, or of a subset, has a label.

    The labels of some public test sets are all -1, although the names of the
    classes are known. Of TFRecords, at most the first 48 examples of each
    shard are read: a shard belongs to one split.
    """
    source = dataset.source
    if not dataset.num_classes:
        return False
    if not isinstance(source, Records):
        return bool((labels_of(dataset) >= 0).any())
    if not source.label_key:
        return False
    is_chosen = np.ones(source.takes.sum(), bool)
    if dataset.ids is not None:
        is_chosen = np.isin(np.arange(len(is_chosen)), dataset.ids)
    spec = {source.label_key: tf.io.FixedLenFeature([], tf.int64, -1)}
    first_ids = np.cumsum(source.takes) - source.takes

    def read(
        filename: Any, skip: Any, take: Any, first_id: Any
    ) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(filename).skip(skip).take(take)
        records = records.enumerate(first_id)
        records = records.filter(lambda i, _: tf.gather(is_chosen, i))
        return records.take(_RECORDS_LOOKED_AT).map(
            lambda _, x: tf.io.parse_single_example(x, spec)[source.label_key]
        )

    shards = (list(source.filenames), source.skips, source.takes, first_ids)
    labels = tf.data.Dataset.from_tensor_slices(shards).flat_map(read)
    return any(label >= 0 for label in labels.as_numpy_iterator())


def names_of(dataset: Dataset) -> Sequence[str]:
    """Returns the file names of examples, in the order of the ids.

    Of a folder of images, paths relative to it. Of TFRecords, the feature
    `file_name` of TFDS; reads them once from start to end.

    Raises:
        ValueError: if the examples have no names.
    """
    names: Sequence[str] = dataset.file_names
    if isinstance(dataset.source, Records):
        feature = _read_feature(dataset.source, _FILE_NAME, b"")
        names = [name.decode() for name in feature] if all(feature) else ()
    if not names:
        raise ValueError(
            f"The examples of {dataset.name!r} have no file names; list their "
            "ids."
        )
    return [names[i] for i in dataset.example_ids]


def _read_feature(source: Records, key: str, default: Any) -> np.ndarray:
    """Returns a scalar feature of all records, in storage order."""
    spec = {key: tf.io.FixedLenFeature([], tf.constant(default).dtype, default)}

    def read(filename: Any, skip: Any, take: Any) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(filename, buffer_size=8 << 20)
        records = records.skip(skip).take(take).batch(1024)
        return records.map(lambda x: tf.io.parse_example(x, spec)[key])

    shards = (list(source.filenames), source.skips, source.takes)
    batches = tf.data.Dataset.from_tensor_slices(shards).interleave(
        read,
        # Several shards are read at once, and given one after the other.
        cycle_length=min(16, len(source.filenames)),
        block_length=math.ceil(source.takes.max() / 1024),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return np.concatenate(list(batches.as_numpy_iterator()))


def write(directory: str, ids: np.ndarray) -> None:
    """Writes ids, one a line, to `labelled_ids.txt`; whole or not at all."""
    path = os.path.join(directory, _FILE)
    tf.io.gfile.makedirs(directory)
    with tf.io.gfile.GFile(f"{path}.new", "w") as file:
        file.write("".join(f"{i}\n" for i in ids))
    tf.io.gfile.rename(f"{path}.new", path, overwrite=True)


def read(directory: str) -> np.ndarray:
    """Returns the ids that `write` wrote to a folder, int64.

    Raises:
        ValueError: if there are none.
    """
    path = os.path.join(directory, _FILE)
    if not tf.io.gfile.exists(path):
        raise ValueError(f"There is no such file. Received: {path!r}.")
    with tf.io.gfile.GFile(path) as file:
        return np.array([int(line) for line in file], np.int64)
