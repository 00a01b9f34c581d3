# SPDX-License-Identifier: Apache-2.0
"""The examples whose labels may be used: chosen, read and written.

A run writes the ids to its folder, for an evaluation on the same labels.
"""

import collections
import os

import numpy as np
import tensorflow as tf

import data_util
from contrastive import storage
from contrastive.sources.dataset import Dataset, some

_FILE = "labelled_ids.txt"


def choose(
    dataset: Dataset,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    seed: int,
) -> np.ndarray:
    """Chooses equally many examples of each class at random.

    An example is chosen by a hash of the seed and its id alone, so that with the same seed a
    smaller choice per class is part of a larger one. Returns int64 ids, ascending.

    Args:
        dataset: a dataset of `data.load`, or a subset of it.
        fraction: share of the examples that have a label, in (0, 1]. The counts of two classes
            differ by 1 at most, and are at least 1.
        per_class: examples of each class, at least 1; instead of `fraction`.
        seed: random seed.

    Raises:
        ValueError: if there are no labels, or a class has too few examples; if not one of
            `fraction` and `per_class` is given, in its range.
    """
    is_fraction = fraction is not None and 0 < fraction <= 1
    is_count = per_class is not None and per_class >= 1
    if is_fraction == is_count or None not in (fraction, per_class):
        raise ValueError(
            "Either `fraction`, in (0, 1], or `per_class`, at least 1, must be "
            f"given. Received: fraction={fraction}, per_class={per_class}."
        )
    labels, ids = dataset.labels(), dataset.example_ids
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
    short = [
        f"{dataset.class_names[i]}: {available[i]} of {counts[i]}"
        for i in np.flatnonzero(available < counts)
    ]
    if short:
        raise ValueError(
            f"Classes of {dataset.name!r}, {dataset.split!r}, have too few examples: {some(short)}."
        )
    order = np.lexsort((ids, _random_numbers(ids, seed, 0)))
    of_class = [order[labels[order] == i] for i in range(num_classes)]
    chosen = [rows[:n] for rows, n in zip(of_class, counts, strict=True)]
    return np.sort(ids[np.concatenate(chosen)])


def _random_numbers(numbers: np.ndarray, seed: int, use: int) -> np.ndarray:
    """Hashes each number to a random uint32."""
    # Views have small numbers: these keys are not theirs.
    return data_util.example_keys(seed, 0, numbers, 2**31 + use).numpy()


def from_file(dataset: Dataset, path: str) -> np.ndarray:
    """Reads a text file that lists examples; returns their ids, ascending.

    The file has one id or one name per line. A name is the path of an image file, or its last
    parts, as in SimCLR's `imagenet_subsets/1percent.txt`.

    Raises:
        ValueError: if the file lists nothing, or an example that is not in the dataset, or a name
            that several examples bear.
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
    names = dataset.names()
    for example_id, name in zip(dataset.example_ids, names, strict=True):
        parts = name.split(os.sep)
        endings = (os.sep.join(parts[i:]) for i in range(len(parts)))
        for ending in filter(wanted.__contains__, endings):
            found[ending].append(int(example_id))
    return found


def write(directory: str, ids: np.ndarray) -> None:
    """Writes ids, one a line, to `labelled_ids.txt`; whole or not at all."""
    lines = "".join(f"{i}\n" for i in ids)
    storage.write_whole(os.path.join(directory, _FILE), lines)


def read(directory: str) -> np.ndarray:
    """Reads the ids, int64, that `write` wrote to a folder.

    Raises:
        ValueError: if there are none.
    """
    path = os.path.join(directory, _FILE)
    if not tf.io.gfile.exists(path):
        raise ValueError(f"There is no such file. Received: {path!r}.")
    with tf.io.gfile.GFile(path) as file:
        return np.array([int(line) for line in file], np.int64)
