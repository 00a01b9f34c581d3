# SPDX-License-Identifier: Apache-2.0
"""Folders of images: `class/image`, `split/class/image`, `split/image`."""

import collections
import itertools
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging
from PIL import Image

from contrastive import storage
from contrastive.sources import arrays, decoding, facts, splits, tfds_sets
from contrastive.sources.dataset import Dataset, Request, some

_ALIASES = {"training": "train", "testing": "test"}
_ALIASES |= dict.fromkeys(("val", "valid"), "validation")
_SPLITS = {"train", "validation", "test", "unlabelled", "unlabeled"}
# Channel counts to which TensorFlow decodes each format.
_DECODED_CHANNELS = {"JPEG": (1, 3), "PNG": (1, 3, 4), "BMP": (3,), "GIF": (3,)}
# Last bytes of a file that was written to its end; BMP has none.
_TRAILERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_BAD_IMAGE = (
    OSError,
    SyntaxError,
    Image.DecompressionBombError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,  # the end of a remote file
    tf.errors.PermissionDeniedError,
)


def owns(request: Request) -> bool:
    """Tells if the name is that of a folder that TFDS has not made.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    name, path = request.name, request.path
    if tfds_sets.is_prepared(path):
        return False
    is_path = name.startswith((os.sep, ".", "~")) or storage.is_remote(name)
    return is_path or os.sep in path and storage.is_folder(path)


def load(request: Request) -> Dataset:
    """Opens a split of a folder of images."""
    root, split = request.path, request.split
    if not storage.is_folder(root):
        raise ValueError(
            f"There is no such folder. Received: name={request.name!r}, that "
            f"is {storage.full_path(root)!r}."
        )
    files, others = _image_files(root)
    parts, depth, notes = _splits(files)
    sizes = {key: len(names) for key, names in parts.items()}
    in_order = list(itertools.chain(*parts.values()))
    names = [in_order[row] for row in splits.select(split, sizes, root)]
    if split == splits.ALL:
        names.sort()
    channels = request.channels or 3
    headers, unreadable = _headers(root, names, channels, split)
    class_names = sorted({_class_of(name, depth) for name in files} - {""})
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array([numbers.get(_class_of(name, depth), -1) for name in headers], np.int32)
    notes += _class_notes(labels, class_names)
    notes += _channel_notes(headers.values(), channels)
    if unreadable:
        count = len(unreadable)
        notes.append(f"{count} unreadable, skipped: {some(unreadable)}")
        logging.warning("%s: %s", root, notes[-1])
    if others:
        notes.append(f"not images, skipped: {dict(others.most_common())}")
    paths = tuple(os.path.join(root, name) for name in headers)
    image_sizes = {header.size for header in headers.values()}
    size = image_sizes.pop() if len(image_sizes) == 1 else None
    fields: dict[str, Any] = {
        "file_names": tuple(headers),
        "notes": tuple(notes),
        "unreadable": tuple(unreadable),
    }
    limit = request.memory_limit
    if facts.fits_in_memory(size, channels, len(paths), limit):
        with storage.pool(root) as threads:
            images = np.stack(list(threads.map(_decoder(channels), paths)))
        return arrays.in_memory(request, images, labels, class_names, **fields)
    return Dataset.of(
        request,
        source=arrays.Files(paths, labels),
        num_examples=len(paths),
        class_names=class_names if labels.max() >= 0 else (),
        channels=channels,
        image_size=size,
        **fields,
    )


def outline(request: Request) -> Dataset:
    """Opens a folder if it can be reached."""
    reachable = storage.is_reachable(request.path)
    return load(request) if reachable else arrays.unknown(request)


def _decoder(channels: int) -> Any:
    return lambda path: decoding.decode(tf.io.read_file(path), channels)


def _image_files(root: str) -> tuple[list[str], collections.Counter]:
    """Returns sorted image paths below `root`, and a count of other files."""
    images: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    for name in storage.file_names(root):
        extension = os.path.splitext(name)[1].lower()
        if extension in storage.IMAGE_EXTENSIONS:
            images.append(name)
        else:
            others[extension or "no extension"] += 1
    if not images:
        raise ValueError(
            f"There are no images {storage.IMAGE_EXTENSIONS} in "
            f"{storage.full_path(root)!r} or below. Other files: "
            f"{dict(others)}."
        )
    return sorted(images), others


def _splits(
    files: Sequence[str],
) -> tuple[dict[str, list[str]], int, list[str]]:
    """Returns the files of each split, depth of the class folders, and notes.

    The top folders are splits if one is called "train", or all bear names of splits. Otherwise a
    hash of the path decides.
    """
    parts = collections.defaultdict(list)
    tops = {name.split(os.sep)[0] for name in files if os.sep in name}
    canonical = {t: _ALIASES.get(t.lower(), t.lower()) for t in tops}
    names = set(canonical.values())
    if "train" in names or (names and names <= _SPLITS):
        outside = [name for name in files if os.sep not in name]
        for name in files:
            if os.sep in name:
                parts[canonical[name.split(os.sep)[0]]].append(name)
        notes = [f"split folders: {sorted(tops)}"]
        if outside:
            notes.append(f"images outside them, skipped: {some(outside)}")
        return parts, 1, notes
    parts.update(train=[], test=[])
    for name in files:
        parts["test" if splits.is_held_out(name) else "train"].append(name)
    note = "no split folders: a tenth, chosen by a hash of the path, is 'test'"
    return parts, 0, [note]


def _class_of(name: str, depth: int) -> str:
    """Returns the class folder in a relative path; "" where there is none."""
    parts = name.split(os.sep)[depth:]
    return parts[0] if len(parts) > 1 else ""


def _class_notes(labels: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """Returns the counts per class, and what is odd about them."""
    outside = int(np.sum(labels < 0))
    if outside == len(labels):
        return ["no class folders: the images are unlabelled"]
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    of_class = dict(zip(class_names, counts, strict=True))
    per_class = [f"{name}: {count}" for name, count in of_class.items()]
    notes = [f"examples per class: {some(per_class, 20)}"]
    if len(class_names) == 1:
        notes.append(
            f"WARNING: {class_names[0]!r} is the only folder, so there is one "
            "class; name that folder itself if it is not meant as a class"
        )
        logging.warning("%s", notes[-1])
    empty = [name for name, count in of_class.items() if not count]
    if empty:
        notes.append(f"classes without examples in this split: {some(empty)}")
    if outside:
        notes.append(f"{outside} images outside the class folders: unlabelled")
    return notes


class _Header(NamedTuple):
    format: str  # "JPEG", "PNG", ...; by content, not by extension
    mode: str  # of Pillow, e.g. "RGB" or "I;16"
    size: tuple[int, int]  # height and width, pixels


def _read_header(path: str, channels: int) -> _Header | None:
    """Reads the header of an image; None if TensorFlow cannot decode it."""
    try:
        with storage.open_binary(path) as file:
            with Image.open(file) as image:
                header = _Header(str(image.format), image.mode, image.size[::-1])
            allowed = _DECODED_CHANNELS.get(header.format)
            if allowed is None:
                return None
            file.seek(-8, os.SEEK_END)
            tail = file.read()
        is_small = max(header.size) <= facts.WHOLE_IMAGE_SIDE
        trailer = _TRAILERS.get(header.format)
        # A large file that ends as its format does is taken to be whole. One that does not may be
        # cut short, or merely have something appended.
        if is_small or trailer is None or not tail.endswith(trailer):
            _decoder(channels if channels in allowed else 0)(path)
    except _BAD_IMAGE:
        return None
    return header


def _headers(
    root: str, names: Sequence[str], channels: int, split: str
) -> tuple[dict[str, _Header], list[str]]:
    """Reads headers; returns them by name, and the unreadable files."""
    paths = [os.path.join(root, name) for name in names]
    with storage.pool(root) as threads:
        found = threads.map(_read_header, paths, itertools.repeat(channels))
        headers = {n: h for n, h in zip(names, found, strict=True) if h}
    unreadable = [name for name in names if name not in headers]
    if not headers:
        raise ValueError(
            f"None of the images of split {split!r} of {root!r} can be decoded: {some(unreadable)}."
        )
    return headers, unreadable


def _channel_notes(headers: Collection[_Header], channels: int) -> list[str]:
    """Says what decoding to `channels` loses or adds."""
    formats = collections.Counter(header.format for header in headers)
    allowed = {f: _DECODED_CHANNELS[f] for f in formats}
    refused = {f: a for f, a in allowed.items() if channels not in a}
    if refused:
        raise ValueError(
            f"`channels` must be one that each format decodes to: {refused}. "
            f"Received: channels={channels}, images {dict(formats)}."
        )
    modes = collections.Counter(header.mode for header in headers)
    notes = [f"formats: {dict(formats)}, modes: {dict(modes)}"]
    alpha = sum(modes[mode] for mode in ("RGBA", "LA", "PA"))
    if alpha and channels < 4:
        notes.append(f"{alpha} images have an alpha channel, which is dropped; channels=4 keeps it")
    deep = sum(count for mode, count in modes.items() if mode.startswith("I"))
    if deep:
        notes.append(f"{deep} images of 16 bits are reduced to 8")
    return notes
