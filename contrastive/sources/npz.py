# SPDX-License-Identifier: Apache-2.0
"""NumPy archives (.npz) of images and labels."""

import io
import zipfile
import zlib

import numpy as np
import tensorflow as tf

from contrastive import storage
from contrastive.sources import arrays, splits
from contrastive.sources.dataset import Dataset, Request

# Raised by reading a file that is no .npz archive, or a damaged one.
_BAD_ARCHIVE = (
    *(OSError, ValueError, TypeError, EOFError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, tf.errors.OpError),
)


def owns(request: Request) -> bool:
    """Tells if the name is that of an archive, local or in a bucket."""
    return request.name.endswith(".npz")


def load(request: Request) -> Dataset:
    """Opens a split of an archive of `images` and, optionally, `labels`.

    `data.load` describes the arrays and the splits.
    """
    path = request.path
    found = _read(path)
    images, labels = _part(path, found, "")
    if "labels_test" in found and "images_test" not in found:
        raise ValueError(
            f"{path!r} holds `labels_test` without `images_test`. Received: {sorted(found)}."
        )
    notes: tuple[str, ...] = ()
    if "images_test" in found:
        test_images, test_labels = _part(path, found, "_test")
        if test_images.shape[1:] != images.shape[1:]:
            raise ValueError(
                "`images` and `images_test` must be of one size. Received: "
                f"{path!r} with {images.shape[1:]} and {test_images.shape[1:]}."
            )
        is_test = np.repeat([False, True], [len(images), len(test_images)])
        images = np.concatenate([images, test_images])
        labels = np.concatenate([labels, test_labels])
    else:
        numbers = map(str, range(len(images)))
        is_test = np.array([*map(splits.is_held_out, numbers)], bool)
        by = "a tenth, chosen by a hash of the index, is 'test'"
        notes = (f"no `images_test`: {by}",)
    sizes = {"train": int((~is_test).sum()), "test": int(is_test.sum())}
    order = np.argsort(is_test, kind="stable")
    rows = order[splits.select(request.split, sizes, path)]
    if request.split == splits.ALL:
        rows.sort()
    class_names = map(str, range(int(labels.max()) + 1))
    return arrays.in_memory(request, images[rows], labels[rows], class_names, notes=notes)


def outline(request: Request) -> Dataset:
    """Opens an archive if it can be reached."""
    reachable = storage.is_reachable(request.path)
    return load(request) if reachable else arrays.unknown(request)


def _read(path: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an archive."""
    try:
        with storage.open_binary(path) as file:
            # NumPy reads a bucket in small pieces, a request each.
            is_remote = storage.is_remote(path)
            content = io.BytesIO(file.read()) if is_remote else file
            with np.load(content) as archive:
                return dict(archive)
    except _BAD_ARCHIVE as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"No .npz archive can be read here. Received: {path!r} ({reason})."
        ) from error


def _part(path: str, found: dict[str, np.ndarray], suffix: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns checked images and labels of one part of an archive."""
    images = found.get(f"images{suffix}", np.zeros(()))
    labels = found.get(f"labels{suffix}", np.full(images.shape[:1], -1))
    if (
        images.ndim != 4
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)
    ):
        shapes = {key: (x.dtype.name, x.shape) for key, x in found.items()}
        raise ValueError(
            f"An .npz archive must hold `images{suffix}`, uint8 [N, H, W, C], "
            f"and may hold `labels{suffix}`, integers [N]. Received: {path!r} "
            f"with {shapes}."
        )
    if labels.size and labels.min() < -1:
        raise ValueError(
            f"`labels{suffix}` must be class numbers from 0 on, or -1 for an "
            f"image without a label. Received: {labels.min()} is the smallest "
            f"label in {path!r}."
        )
    return images, labels.astype(np.int64)
