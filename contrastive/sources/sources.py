# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: TFDS, folders of images, arrays, photo patches."""

import collections
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import skimage
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from contrastive import storage
from contrastive.sources import preparing

ALL = "all"  # TFDS's name for every split
# At most this side, in pixels, is shipped whole to the device; beyond it, two
# 224-pixel crops are the smaller parcel.
_WHOLE_IMAGE_SIDE = 128
# Channel counts to which TensorFlow decodes each format.
_DECODED_CHANNELS = {"JPEG": (1, 3), "PNG": (1, 3, 4), "BMP": (3,), "GIF": (3,)}
# Last bytes of a file that was written to its end; BMP has none.
_TRAILERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
_SPLIT_ALIASES = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "testing": "test",
}
_SPLITS = ("train", "validation", "test", "unlabelled", "unlabeled")
# Encoded images read and shuffled together where storage has no random access;
# a stream holds up to three such groups.
_GROUP_BYTES = 1 << 30
# Images of one size that need no more bytes are held in memory.
MEMORY_LIMIT = 4 << 30
# What reading a file that is no .npz archive, or a damaged one, raises.
_BAD_ARCHIVE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    tf.errors.OpError,
)
# What a dataset is taken for as far as it is not known.
_IMAGENET_EXAMPLES, _IMAGENET_CLASSES = 1_281_167, 1000


class UndecodableImages(ValueError):
    """Too many images of a dataset do not decode."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Examples held in memory.

    Attributes:
        images: uint8 `[N, H, W, C]`.
        labels: int32 `[N]`, -1 where there is none.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Files:
    """Examples that are encoded image files.

    Attributes:
        paths: one file an example.
        labels: int32 `[N]`, -1 where there is none.
    """

    paths: tuple[str, ...]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Records:
    """Examples in TFRecord shards, which can only be read from their start.

    Attributes:
        filenames: one a shard.
        skips: int64 `[shards]`, examples at the start that do not belong.
        takes: int64 `[shards]`, examples after those that do.
        image_key: feature that holds the encoded image.
        label_key: feature that holds the label, "" where there is none.
        shards_per_group: shards held in memory, and shuffled, together.
    """

    filenames: tuple[str, ...]
    skips: np.ndarray
    takes: np.ndarray
    image_key: str
    label_key: str
    shards_per_group: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One split of one dataset.

    Attributes:
        name: dataset name or path, as it was asked for.
        split: split, as it was asked for, e.g. "train[:90%]".
        source: where the examples are. The id of an example is its number in
            this split, in `[0, num_examples)`, whatever the storage.
        num_examples: examples, > 0.
        ids: int64 `[num_examples]`, ascending, where these are only some of
            the examples of `source`; None: all. They keep their ids.
        file_names: of each example of `source`, relative to the folder; ()
            where the source is no folder of images.
        masks: what is foreground, 1, and background, 0; None: not known. Of
            arrays, uint8 `[N, H, W]`; else a function of images, uint8
            `[b, h, w, c]`, and their ids, that returns uint8 `[b, h, w]`.
        class_names: one name a label; () where there are no labels.
        channels: channels of the images that streams yield.
        image_size: `(height, width)`, or None where sizes vary.
        notes: what a user should know: images skipped, layout found, ...
        unreadable: file names of images left out, which cannot be decoded.
        undecodable: names of images a stream failed to decode; grows while
            streams run. In their place stands a grey image of label -1 and
            weight 0.
    """

    name: str
    split: str
    source: Arrays | Files | Records
    num_examples: int
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    ids: np.ndarray | None = None
    file_names: tuple[str, ...] = ()
    masks: Any = None
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    undecodable: set[str] = dataclasses.field(default_factory=set)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where there are no labels."""
        return len(self.class_names)

    @property
    def example_ids(self) -> np.ndarray:
        """Ids of the examples, int64 `[num_examples]`, ascending."""
        return np.arange(self.num_examples) if self.ids is None else self.ids

    @property
    def is_encoded(self) -> bool:
        """Whether streams decode and crop on the host."""
        return not isinstance(self.source, Arrays)

    def report_undecodable(self, example_id: int) -> None:
        """Names, once, an image that does not decode.

        Raises:
            UndecodableImages: if it is one of more than 1 % (at least 10) of
                all. Inside a stream, TensorFlow makes an error of its own of
                it: see `data.undecodable_images_message`.
        """
        name = f"{self.name} {self.split}, example {example_id}"
        if isinstance(self.source, Files):
            name = self.source.paths[example_id]
        if name in self.undecodable:
            return
        self.undecodable.add(name)
        logging.warning("%s does not decode; a grey image replaces it.", name)
        if len(self.undecodable) > max(10, self.num_examples // 100):
            raise UndecodableImages(
                f"Of {self.num_examples} images of {self.name!r}, "
                f"{len(self.undecodable)} did not decode, the last of them "
                f"{name!r}. The log has the reasons."
            )


class NoSuchSplit(ValueError):
    """A split does not exist, or has no examples.

    Attributes:
        splits: number of examples of each split there is, by name.
    """

    def __init__(self, message: str, splits: Mapping[str, int]) -> None:
        super().__init__(message)
        self.splits = dict(splits)


def some(names: Sequence[str], shown: int = 5) -> str:
    """Returns the first few of `names`, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def find_masks(dataset: Dataset, mask_dir: str) -> list[str]:
    """Returns the file of each example's mask, by id; "" where there is none.

    Args:
        dataset: all of a split.
        mask_dir: folder of PNG files. That of `dogs/rex.jpg`, in a folder of
            images, is `dogs/rex.png`. Otherwise, and where that is missing,
            it is `{id}.png`.

    Raises:
        ValueError: if not one is there.
    """
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


def _select(split: str, sizes: dict[str, int], name: str) -> np.ndarray:
    """Returns the numbers of the examples a split expression asks for.

    They count through the splits of `sizes`, laid end to end.

    Raises:
        NoSuchSplit: if there are none.
    """
    infos = {
        key: tfds.core.SplitInfo(
            name=key, shard_lengths=[size], num_bytes=0, filename_template=None
        )
        for key, size in sizes.items()
    }
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    unknown = None
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:  # "all[:50%]"
        parts, unknown = [], error
    rows = [
        starts[part.splitname]
        + np.arange(sizes[part.splitname])[part.from_ : part.to]
        for part in parts
    ]
    if not sum(map(len, rows)):
        raise NoSuchSplit(
            f"There are no examples in split {split!r} of {name!r}. Its "
            f"splits are {sizes} (examples); parts such as 'train[:90%]' and "
            "sums such as 'train+test' are understood.",
            sizes,
        ) from unknown
    return np.concatenate(rows)


def _is_held_out(name: str) -> bool:
    """Returns whether an example is one of the tenth that is split "test".

    A hash of the name alone decides, so that examples that are added later
    move no other from one split to the other.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def _fits_in_memory(
    size: tuple[int, int] | None, channels: int, count: int, memory_limit: int
) -> bool:
    """Whether `count` images are of one small size, and within the limit."""
    return (
        size is not None
        and max(size) <= _WHOLE_IMAGE_SIDE
        and count * math.prod(size) * channels <= memory_limit
    )


def _decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes an image whole, of a GIF the first frame; 0 channels: its own."""
    return tf.io.decode_image(encoded, channels, expand_animations=False)


def _from_arrays(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    notes: Sequence[str] = (),
    file_names: Sequence[str] = (),
) -> Dataset:
    """Returns a dataset of arrays, uint8 `[N, H, W, C]` and integer `[N]`."""
    num_examples, height, width, channels = images.shape
    return Dataset(
        name=name,
        split=split,
        source=Arrays(images, labels.astype(np.int32)),
        num_examples=num_examples,
        class_names=tuple(class_names) if labels.max() >= 0 else (),
        channels=channels,
        image_size=(height, width),
        file_names=tuple(file_names),
        notes=tuple(notes),
    )


def open_npz(path: str, split: str) -> Dataset:
    """Opens a split of an archive of `images` and, optionally, `labels`.

    If it holds `images_test` and, optionally, `labels_test`, these are split
    "test" and the others "train". Otherwise a tenth of the images, chosen by a
    hash of their index, is "test".
    """
    try:
        with storage.open_binary(path) as file:
            # NumPy reads a bucket in small pieces, a request each.
            is_remote = storage.is_remote(path)
            content = io.BytesIO(file.read()) if is_remote else file
            with np.load(content) as archive:
                arrays = dict(archive)
    except _BAD_ARCHIVE as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"No .npz archive can be read here. Received: {path!r} ({reason})."
        ) from error
    images, labels = _npz_part(path, arrays, "")
    if "labels_test" in arrays and "images_test" not in arrays:
        raise ValueError(
            f"{path!r} holds `labels_test` without `images_test`. Received: "
            f"{sorted(arrays)}."
        )
    notes = []
    if "images_test" in arrays:
        test_images, test_labels = _npz_part(path, arrays, "_test")
        if test_images.shape[1:] != images.shape[1:]:
            raise ValueError(
                "`images` and `images_test` must be of one size. Received: "
                f"{path!r} with {images.shape[1:]} and {test_images.shape[1:]}."
            )
        sizes = {"train": len(images), "test": len(test_images)}
        order = np.arange(sum(sizes.values()))
        images = np.concatenate([images, test_images])
        labels = np.concatenate([labels, test_labels])
    else:
        numbers = range(len(images))
        held_out = np.array([_is_held_out(str(i)) for i in numbers], bool)
        num_test = int(held_out.sum())
        sizes = {"train": len(images) - num_test, "test": num_test}
        order = np.argsort(held_out, kind="stable")
        notes.append(
            "no `images_test`: a tenth, chosen by a hash of the index, is "
            "'test'"
        )
    rows = order[_select(split, sizes, path)]
    if split == ALL:
        rows.sort()
    class_names = [str(label) for label in range(int(labels.max()) + 1)]
    return _from_arrays(
        path, split, images[rows], labels[rows], class_names, notes
    )


def _npz_part(
    path: str, arrays: dict[str, np.ndarray], suffix: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns checked images and labels of one part of an archive."""
    images = arrays.get(f"images{suffix}", np.zeros(()))
    labels = arrays.get(f"labels{suffix}", np.full(images.shape[:1], -1))
    if (
        images.ndim != 4
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)
    ):
        found = {key: (x.dtype.name, x.shape) for key, x in arrays.items()}
        raise ValueError(
            f"An .npz archive must hold `images{suffix}`, uint8 [N, H, W, C], "
            f"and may hold `labels{suffix}`, integers [N]. Received: {path!r} "
            f"with {found}."
        )
    if labels.size and labels.min() < -1:
        raise ValueError(
            f"`labels{suffix}` must be class numbers from 0 on, or -1 for an "
            f"image without a label. Received: {labels.min()} is the smallest "
            f"label in {path!r}."
        )
    return images, labels.astype(np.int64)


# TFDS


def is_tfds_folder(path: str) -> bool:
    """Whether TFDS has prepared a dataset there."""
    return storage.exists(os.path.join(path, "dataset_info.json"))


def default_data_dir() -> str:
    """Returns the folder where TFDS keeps its datasets if none is given."""
    return str(tfds.core.constants.DATA_DIR)


def tfds_builder(
    name: str, data_dir: str | None, *, prepare: bool = True
) -> Any:
    """Returns the builder of a dataset, or of a folder, prepared if asked.

    Raises:
        ValueError: if there is no such dataset, or its folder cannot be
            reached, or it cannot be prepared.
    """
    if is_tfds_folder(name):
        return tfds.builder_from_directory(name)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        known.append(PHOTO_PATCHES)
        close = difflib.get_close_matches(name.split("/")[0], known)
        raise ValueError(
            f"There is no dataset of this name. Received: name={name!r}. "
            f"Similar names: {close}. A folder of images needs a separator in "
            f"its name: {os.path.join('.', name)!r}."
        ) from error
    except ImportError as error:
        raise ValueError(
            f"TFDS cannot read {name!r}: {preparing.explain_import(error)}"
        ) from error
    except (RuntimeError, tf.errors.OpError) as error:
        # TFDS makes a RuntimeError of what a file system raises.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"TFDS cannot open {name!r} in {data_dir or default_data_dir()!r}: "
            f"{reason}."
        ) from error
    if prepare and not builder.is_prepared():
        preparing.prepare(builder, name)
    return builder


def open_tfds(
    builder: Any, split: str, channels: int | None, memory_limit: int
) -> Dataset:
    """Opens a split of a prepared TFDS dataset."""
    info = builder.info
    sizes = {key: value.num_examples for key, value in info.splits.items()}
    count = len(_select(split, sizes, info.name))
    image_key, label_key = _image_and_label(info)
    class_names = info.features[label_key].names if label_key else ()
    size, channels = _image_shape(info, image_key, channels)
    if _fits_in_memory(size, channels, count, memory_limit):
        images, labels = _read_tfds(
            builder, split, image_key, label_key, channels
        )
        return _from_arrays(info.name, split, images, labels, class_names)
    if info.file_format.value != "tfrecord":
        raise ValueError(
            "TFDS datasets must be stored as 'tfrecord'. Received: "
            f"{info.name!r} stored as {info.file_format.value!r}."
        )
    shards = info.splits[split].file_instructions
    all_bytes = sum(value.num_bytes for value in info.splits.values())
    shard_bytes = all_bytes / sum(sizes.values()) * count / len(shards)
    source = Records(
        tuple(shard.filename for shard in shards),
        np.array([shard.skip for shard in shards], np.int64),
        np.array([shard.take for shard in shards], np.int64),
        image_key,
        label_key,
        int(np.clip(_GROUP_BYTES / max(shard_bytes, 1), 1, len(shards))),
    )
    return Dataset(
        name=info.name,
        split=split,
        source=source,
        num_examples=count,
        class_names=tuple(class_names),
        channels=channels,
        image_size=size,
    )


def outline_tfds(builder: Any, split: str, channels: int | None) -> Dataset:
    """Returns a split without its examples; it need not be prepared."""
    info = builder.info
    sizes = {key: value.num_examples for key, value in info.splits.items()}
    image_key, label_key = _image_and_label(info)
    size, channels = _image_shape(info, image_key, channels)
    return _outline(
        info.name,
        split,
        num_examples=len(_select(split, sizes, info.name)) if sizes else 0,
        class_names=info.features[label_key].names if label_key else (),
        channels=channels,
        image_size=size,
    )


def outline_unknown(name: str, split: str, channels: int | None) -> Dataset:
    """Returns ImageNet, without its examples, in place of what is not here."""
    return _outline(
        name,
        split,
        num_examples=0,
        class_names=map(str, range(_IMAGENET_CLASSES)),
        channels=channels or 3,
        image_size=None,
    )


def _outline(
    name: str,
    split: str,
    *,
    num_examples: int,
    class_names: Iterable[str],
    channels: int,
    image_size: tuple[int, int] | None,
) -> Dataset:
    """Returns a dataset without examples; 0 of them stands for not known."""
    source: Arrays | Files = Files((), np.zeros([0], np.int32))
    if image_size and _fits_in_memory(
        image_size, channels, num_examples, MEMORY_LIMIT
    ):
        images = np.zeros([0, *image_size, channels], np.uint8)
        source = Arrays(images, source.labels)
    return Dataset(
        name=name,
        split=split,
        source=source,
        num_examples=num_examples or _IMAGENET_EXAMPLES,
        class_names=tuple(class_names),
        channels=channels,
        image_size=image_size,
        notes=()
        if num_examples
        else ("not here: what is not known of it is taken from ImageNet",),
    )


def _image_and_label(info: Any) -> tuple[str, str]:
    """Returns the keys of both features; "" where there are no labels."""
    image_key = _feature_key(info, tfds.features.Image, "image")
    if not image_key:
        raise ValueError(
            "A dataset needs a feature `image`, or one image feature. "
            f"Received: {info.name!r} with features {list(info.features)}."
        )
    return image_key, _feature_key(info, tfds.features.ClassLabel, "label")


def _image_shape(
    info: Any, image_key: str, channels: int | None
) -> tuple[tuple[int, int] | None, int]:
    """Returns height and width, None where sizes vary, and channels."""
    height, width, depth = info.features[image_key].shape
    size = (height, width) if height and width else None
    return size, channels or depth or 3


def _feature_key(info: Any, kind: type, default: str) -> str:
    """Returns the feature named `default`, or the only one of its kind."""
    keys = [k for k, value in info.features.items() if isinstance(value, kind)]
    if default in keys:
        return default
    return keys[0] if len(keys) == 1 else ""


def _read_tfds(
    builder: Any, split: str, image_key: str, label_key: str, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of a split, in storage order."""
    keys = {image_key, label_key} - {""}
    decode = tfds.decode.make_decoder()(lambda x, _: _decode(x, channels))
    features = builder.as_dataset(
        split,
        batch_size=-1,
        decoders=tfds.decode.PartialDecoding(keys, {image_key: decode()}),
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    images = features[image_key].numpy()
    if not label_key:
        return images, np.full(len(images), -1)
    return images, features[label_key].numpy()


# Folders


class _Header(NamedTuple):
    """What an image file says of itself."""

    format: str  # "JPEG", "PNG", ...; by content, not by extension
    mode: str  # of Pillow, e.g. "RGB" or "I;16"
    size: tuple[int, int]  # height and width, pixels


def open_folder(
    root: str, split: str, channels: int | None, memory_limit: int
) -> Dataset:
    """Opens a split of a folder of images."""
    files, others = _image_files(root)
    if not files:
        raise ValueError(
            f"There are no images {storage.IMAGE_EXTENSIONS} in "
            f"{storage.full_path(root)!r} or below. Other files: "
            f"{dict(others)}."
        )
    splits, depth, notes = _folder_splits(files)
    sizes = {key: len(names) for key, names in splits.items()}
    in_order = [name for names in splits.values() for name in names]
    names = [in_order[row] for row in _select(split, sizes, root)]
    if split == ALL:
        names.sort()
    channels = channels or 3
    paths = [os.path.join(root, name) for name in names]
    with storage.pool(root) as threads:
        found = list(threads.map(_header, paths, itertools.repeat(channels)))
    headers = {n: h for n, h in zip(names, found, strict=True) if h}
    unreadable = [name for name in names if name not in headers]
    if not headers:
        raise ValueError(
            f"None of the images of split {split!r} of {root!r} can be "
            f"decoded: {some(unreadable)}."
        )
    class_names = sorted({_class_of(name, depth) for name in files} - {""})
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.array(
        [numbers.get(_class_of(name, depth), -1) for name in headers], np.int32
    )
    notes += _class_notes(labels, class_names)
    notes += _channel_notes(list(headers.values()), channels)
    if unreadable:
        notes.append(
            f"{len(unreadable)} unreadable, skipped: {some(unreadable)}"
        )
        logging.warning("%s: %s", root, notes[-1])
    if others:
        notes.append(f"not images, skipped: {dict(others.most_common())}")
    paths = [os.path.join(root, name) for name in headers]
    image_sizes = {header.size for header in headers.values()}
    size = image_sizes.pop() if len(image_sizes) == 1 else None
    if _fits_in_memory(size, channels, len(paths), memory_limit):
        with storage.pool(root) as threads:
            decoded = threads.map(
                lambda path: _decode(tf.io.read_file(path), channels), paths
            )
            images = np.stack(list(decoded))
        dataset = _from_arrays(
            root, split, images, labels, class_names, notes, list(headers)
        )
        return dataclasses.replace(dataset, unreadable=tuple(unreadable))
    return Dataset(
        name=root,
        split=split,
        source=Files(tuple(paths), labels),
        num_examples=len(paths),
        class_names=tuple(class_names) if labels.max() >= 0 else (),
        channels=channels,
        image_size=size,
        file_names=tuple(headers),
        notes=tuple(notes),
        unreadable=tuple(unreadable),
    )


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
    return sorted(images), others


def _header(path: str, channels: int) -> _Header | None:
    """Returns the header of an image; None if TensorFlow cannot decode it.

    A large file that ends as its format does is taken to be whole. One that
    does not may be cut short, or merely have something appended: it is decoded
    to find out.
    """
    try:
        with storage.open_binary(path) as file:
            with Image.open(file) as image:
                header = _Header(
                    str(image.format), image.mode, image.size[::-1]
                )
            allowed = _DECODED_CHANNELS.get(header.format)
            if allowed is None:
                return None
            file.seek(-8, os.SEEK_END)
            tail = file.read()
        is_small = max(header.size) <= _WHOLE_IMAGE_SIDE
        trailer = _TRAILERS.get(header.format)
        if is_small or trailer is None or not tail.endswith(trailer):
            _decode(
                tf.io.read_file(path), channels if channels in allowed else 0
            )
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
        tf.errors.InvalidArgumentError,
        tf.errors.NotFoundError,
        tf.errors.OutOfRangeError,  # the end of a remote file
        tf.errors.PermissionDeniedError,
    ):
        return None
    return header


def _folder_splits(
    files: list[str],
) -> tuple[dict[str, list[str]], int, list[str]]:
    """Returns the files of each split, depth of the class folders, and notes.

    The top folders are splits if one is called "train", or all bear names of
    splits. Otherwise a tenth of the files, chosen by a hash of the path, is
    "test".
    """
    tops = {name.split(os.sep)[0] for name in files if os.sep in name}
    canonical = {
        top: _SPLIT_ALIASES.get(top.lower(), top.lower()) for top in tops
    }
    names = set(canonical.values())
    splits = collections.defaultdict(list)
    if "train" in names or (names and names <= set(_SPLITS)):
        outside = [name for name in files if os.sep not in name]
        for name in files:
            if os.sep in name:
                splits[canonical[name.split(os.sep)[0]]].append(name)
        notes = [f"split folders: {sorted(tops)}"]
        if outside:
            notes.append(f"images outside them, skipped: {some(outside)}")
        return dict(splits), 1, notes
    for name in files:
        splits["test" if _is_held_out(name) else "train"].append(name)
    return (
        {"train": splits["train"], "test": splits["test"]},
        0,
        ["no split folders: a tenth, chosen by a hash of the path, is 'test'"],
    )


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


def _channel_notes(headers: list[_Header], channels: int) -> list[str]:
    """Returns what decoding to `channels` loses or adds.

    Raises:
        ValueError: if TensorFlow cannot decode all to `channels`.
    """
    formats = collections.Counter(header.format for header in headers)
    refused = {
        f: _DECODED_CHANNELS[f]
        for f in formats
        if channels not in _DECODED_CHANNELS[f]
    }
    if refused:
        raise ValueError(
            f"`channels` must be one that each format decodes to: {refused}. "
            f"Received: channels={channels}, images {dict(formats)}."
        )
    modes = collections.Counter(header.mode for header in headers)
    notes = [f"formats: {dict(formats)}, modes: {dict(modes)}"]
    alpha = sum(modes[mode] for mode in ("RGBA", "LA", "PA"))
    if alpha and channels < 4:
        notes.append(
            f"{alpha} images have an alpha channel, which is dropped; "
            "channels=4 keeps it"
        )
    deep = sum(count for mode, count in modes.items() if mode.startswith("I"))
    if deep:
        notes.append(f"{deep} images of 16 bits are reduced to 8")
    return notes


# Patches of photographs

PHOTO_PATCHES = "photo_patches"
# In the wheel of scikit-image 0.26; a class is named without the extension.
_PICTURES = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png "
    "coffee.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png "
    "moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()
_PATCHES = {"train": 10_000, "test": 2_000}
_PATCH_SIZE = 32
_PATCH_SIDES = (32, 96)  # of the source, in pixels
_PATCH_GAP = 16  # pixels between the regions of train and test


def photo_patches(split: str) -> Dataset:
    """Cuts 32x32 RGB patches out of the 16 pictures of scikit-image's wheel.

    The class is the picture. Across its longer side, each picture is cut in
    three: test patches come from the middle 28 %, train patches from both
    sides, with a gap between: no pixel is shared. A patch is a square of 32
    to 96 pixels (log-uniform) at a random place, downsampled by box filter.
    10,000 train and 2,000 test patches, the same bits in every run: the seed
    is fixed. Logistic regression on raw pixels reaches 45.0 % on test.
    """
    rows = _select(split, _PATCHES, PHOTO_PATCHES)
    parts = [_cut_patches(part) for part in _PATCHES]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    names = tuple(os.path.splitext(picture)[0] for picture in _PICTURES)
    return _from_arrays(PHOTO_PATCHES, split, images[rows], labels[rows], names)


def pictures() -> list[Image.Image]:
    """Returns the 16 photographs and micrographs themselves, in RGB."""
    folder = os.path.join(os.path.dirname(skimage.__file__), "data")
    opened = []
    for name in _PICTURES:
        with Image.open(os.path.join(folder, name)) as picture:
            opened.append(picture.convert("RGB"))
    return opened


@functools.cache
def _cut_patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[N, 32, 32, 3]` and labels `[N]`, classes in turn."""
    originals = pictures()
    # Of NumPy's generators, the one whose draws are promised never to change.
    random = np.random.RandomState(list(_PATCHES).index(split))
    labels = np.arange(_PATCHES[split]) % len(_PICTURES)
    patches = []
    for label in labels:
        box = _patch_box(originals[label].size, split, random)
        patch = originals[label].crop(box)
        patch = patch.resize((_PATCH_SIZE, _PATCH_SIZE), Image.Resampling.BOX)
        patches.append(np.asarray(patch))
    return np.stack(patches), labels


def _patch_box(
    size: tuple[int, int], split: str, random: np.random.RandomState
) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of a patch, in pixels."""
    length, breadth = max(size), min(size)
    first, last = int(0.36 * length), int(0.64 * length)
    start, stop = first, last
    if split == "train":
        sides = (0, first - _PATCH_GAP), (last + _PATCH_GAP, length)
        start, stop = sides[random.randint(2)]
    smallest, largest = _PATCH_SIDES
    side = int(smallest * (largest / smallest) ** random.random_sample())
    along = start + random.randint(stop - start - side + 1)
    across = random.randint(breadth - side + 1)
    left, top = (along, across) if size[0] == length else (across, along)
    return left, top, left + side, top + side
