# SPDX-License-Identifier: Apache-2.0
"""A dataset name or a folder in, resumable streams of uint8 batches out.

Every stream is a function of the position `p`: example `p` of a stream is row
`p % batch_size` of step `p // batch_size`, in epoch `p // num_examples`. What
stands there depends on (seed, epoch) alone, so resuming at a step is
arithmetic, and 1, 2 or 4 replicas see the same global batches.
"""

import collections
import concurrent.futures
import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import skimage
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

import data_util

# At most this side, in pixels, is shipped whole to the device; beyond it, two
# 224-pixel crops are the smaller parcel.
_WHOLE_IMAGE_SIDE = 128
_PHOTO_PATCHES = "photo_patches"
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
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
_FOREVER = 1 << 30  # steps
_CHUNK = 8  # examples decoded by one call
# Encoded images read and shuffled together where storage has no random access;
# a stream holds up to three such groups.
_GROUP_BYTES = 1 << 30
# What a random permutation is for: the two never share a seed.
_EXAMPLE_ORDER, _SHARD_ORDER = 0, 1


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
        shards: TFDS file instructions: `filename`, `skip`, `take` (examples).
        image_key: feature that holds the encoded image.
        label_key: feature that holds the label, "" where there is none.
        shards_per_group: shards held in memory, and shuffled, together.
    """

    shards: tuple[Any, ...]
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
        class_names: one name a label; () where there are no labels.
        channels: channels of the images that streams yield.
        image_size: `(height, width)`, or None where sizes vary.
        notes: what a user should know: images skipped, layout found, ...
        undecodable: names of images a stream failed to decode; grows while
            streams run. In their place stands a grey image with label -1
            (weight 0 in evaluation).
    """

    name: str
    split: str
    source: Arrays | Files | Records
    num_examples: int
    class_names: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    notes: tuple[str, ...] = ()
    undecodable: set[str] = dataclasses.field(default_factory=set)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where there are no labels."""
        return len(self.class_names)

    @property
    def is_encoded(self) -> bool:
        """Whether streams decode and crop on the host."""
        return not isinstance(self.source, Arrays)

    def example_name(self, example_id: int) -> str:
        """Returns a file path, or e.g. "imagenet2012 train, example 7"."""
        if isinstance(self.source, Files):
            return self.source.paths[example_id]
        return f"{self.name} {self.split}, example {example_id}"

    def report_undecodable(self, example_id: int) -> None:
        """Names, once, an image that does not decode.

        Raises:
            ValueError: if it is one of more than 1 % (at least 10) of all.
        """
        name = self.example_name(int(example_id))
        if name in self.undecodable:
            return
        self.undecodable.add(name)
        logging.warning("%s does not decode; a grey image replaces it.", name)
        if len(self.undecodable) > max(10, self.num_examples // 100):
            raise ValueError(
                f"Of {self.num_examples} images of {self.name!r}, "
                f"{len(self.undecodable)} did not decode, the last of them "
                f"{name!r}. The log has the reasons."
            )


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    channels: int | None = None,
    memory_limit: int = 4 << 30,
) -> Dataset:
    """Opens one split of a dataset; decodes it if it is small.

    Args:
        name: one of

            - "photo_patches", built in: see `_photo_patches`;
            - a TFDS name, e.g. "cifar10" or "imagenet2012_subset/1pct";
            - a folder, with a separator in its name ("./flowers"): a prepared
              TFDS folder, or JPEG, PNG, BMP and GIF images as `class/image`,
              `split/class/image`, or without labels as `image` or
              `split/image`. Without split folders, the tenth of the files
              whose path hashes so is "test", the rest "train";
            - "path.npz": uint8 `images [N, H, W, C]`, optionally integer
              `labels [N]`, -1 for none; its one split is "train".
        split: a split, or an expression of TFDS: "train[:90%]", "train+test".
        data_dir: where TFDS keeps its datasets; its own default if None.
        channels: channels to decode: 1, 3 or 4; the dataset's own if None
            (3 for a folder).
        memory_limit: bytes. Images of one size, at most 128 pixels a side,
            that fit in it are decoded now and held in memory.

    Raises:
        ValueError: if there is no such dataset, split, folder or image, or it
            cannot be prepared or decoded to `channels`.
    """
    path = os.path.expanduser(name)
    if name == _PHOTO_PATCHES:
        dataset = _photo_patches(split)
    elif path.endswith(".npz"):
        dataset = _open_npz(path, split)
    elif os.path.exists(os.path.join(path, "dataset_info.json")):
        builder = tfds.builder_from_directory(path)
        dataset = _open_tfds(builder, split, channels)
    elif os.sep in name and os.path.isdir(path):
        dataset = _open_folder(path, split, channels)
    elif name.startswith((os.sep, ".", "~")):
        raise ValueError(
            f"There is no such folder. Received: name={name!r}, that is "
            f"{os.path.abspath(path)!r}."
        )
    else:
        builder = _tfds_builder(name, data_dir)
        dataset = _open_tfds(builder, split, channels)
    if channels not in (None, dataset.channels):
        raise ValueError(
            f"{name!r} holds images of {dataset.channels} channels. Received: "
            f"channels={channels}."
        )
    dataset = dataclasses.replace(dataset, name=name, split=split)
    dataset = _in_memory(dataset, memory_limit)
    logging.info("%s", describe(dataset))
    return dataset


def describe(dataset: Dataset) -> str:
    """Returns what was found, a line, and a line for each note."""
    size = "sizes vary"
    if dataset.image_size:
        size = "{}x{} pixels".format(*dataset.image_size)
    held = {Arrays: "in memory", Files: "image files", Records: "TFRecords"}
    facts = (
        f"{dataset.name}, {dataset.split}: {dataset.num_examples:,} examples",
        f"{dataset.num_classes} classes"
        if dataset.class_names
        else "unlabelled",
        f"{size} x {dataset.channels} channels",
        held[type(dataset.source)],
    )
    notes = list(dataset.notes)
    if dataset.undecodable:
        notes.append(
            f"{len(dataset.undecodable)} images did not decode: "
            + _some(sorted(dataset.undecodable))
        )
    return "\n  ".join([", ".join(facts), *notes])


# Streams ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which rows of the global batches one input pipeline yields.

    Element `j` of pipeline `h` with `R` replicas of `b` rows each is replica
    `j % R` of step `first_step + j // R`: rows `(h R + j % R) b + [0, b)`.
    """

    batch_size: int
    num_replicas: int
    pipeline_index: int
    num_pipelines: int

    def __post_init__(self) -> None:
        if self.batch_size <= 0 or self.batch_size % self.num_replicas:
            raise ValueError(
                "`batch_size` is global and must be a positive multiple of "
                f"`num_replicas`. Received: batch_size={self.batch_size}, "
                f"num_replicas={self.num_replicas}."
            )
        if (
            self.num_replicas % self.num_pipelines
            or not 0 <= self.pipeline_index < self.num_pipelines
        ):
            raise ValueError(
                "`num_pipelines` must divide `num_replicas` and exceed "
                f"`pipeline_index`. Received: {self}."
            )

    @property
    def rows(self) -> int:
        """Rows of one element: the batch of one replica."""
        return self.batch_size // self.num_replicas

    @property
    def replicas(self) -> int:
        """Replicas this pipeline feeds: its elements a step."""
        return self.num_replicas // self.num_pipelines

    @property
    def _first_row(self) -> int:
        return self.pipeline_index * self.replicas * self.rows

    def positions(self, element: tf.Tensor) -> tf.Tensor:
        """Positions, int64 `[rows]`, of an element counted from step 0."""
        step, replica = element // self.replicas, element % self.replicas
        start = step * self.batch_size + self._first_row + replica * self.rows
        return start + tf.range(self.rows, dtype=tf.int64)

    def elements(self, steps: range) -> tf.data.Dataset:
        """Positions, int64 `[rows]`, of each element of `steps`."""
        elements = tf.data.Dataset.range(
            steps.start * self.replicas, steps.stop * self.replicas
        )
        return elements.map(self.positions)

    def holds(self, position: tf.Tensor) -> tf.Tensor:
        """Whether this pipeline yields `position`: bool, like `position`."""
        row = position % self.batch_size - self._first_row
        return (0 <= row) & (row < self.replicas * self.rows)


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
) -> tf.data.Dataset:
    """Returns shuffled batches of one replica, epoch after epoch.

    For `strategy.distribute_datasets_from_function`, which asks for the
    batch of one replica; call it outside `tf.function`. Epochs follow each
    other without a gap: a batch may span two. Each epoch is one permutation
    of the examples, seeded by (seed, epoch); of TFRecords, a permutation of
    the shards, and of the examples within each group of shards. Every host
    reads all TFRecords, in the same order, but decodes only its own rows.

    Args:
        dataset: what `load` returned.
        batch_size: global batch, images of all replicas, <= num_examples.
        seed: seed of the order and of the crops.
        first_step: the step to start at, >= 0, as in a resumed run.
        num_steps: steps to yield; endless if None.
        views: where the dataset is encoded, one crop is cut for each.
        num_replicas: replicas of all hosts together.
        pipeline_index: which host this is, in `[0, num_pipelines)`.
        num_pipelines: hosts.

    Returns:
        Dictionaries of `id` int64 `[b]`, `epoch` int32 `[b]`, `label` int32
        `[b]` (-1: none), with `b = batch_size / num_replicas`, and either
        `image` uint8 `[b, H, W, C]`, whole, or, where the dataset is encoded,
        `crops` uint8 `[b, V, S, S, C]`; a tuple of `[b, S, S, C]` where the
        views differ in size. Element `j` belongs to replica `j % R` of step
        `first_step + j // R`, of the `R` replicas of this host.

    Raises:
        ValueError: if the batch does not divide among the replicas or exceeds
            the dataset, or if an encoded dataset is given no views.
    """
    layout = _Layout(batch_size, num_replicas, pipeline_index, num_pipelines)
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
    order = _Order(dataset.num_examples, seed)
    num_steps = _FOREVER if num_steps is None else num_steps
    steps = range(first_step, first_step + num_steps)
    crop = _cropper(dataset, seed, views)
    stream = _stream(dataset, layout, order, steps, crop)
    return _keep(stream, "id", "epoch", "label", "image", "crops")


def eval_stream(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int | None = None,
    crop_proportion: float = 0.875,
    num_replicas: int = 1,
    pipeline_index: int = 0,
    num_pipelines: int = 1,
) -> tf.data.Dataset:
    """Returns every example once, in order, in batches of one replica.

    Args:
        dataset: what `load` returned.
        batch_size: global batch, images of all replicas; may exceed the
            dataset.
        image_size: side, in pixels, of the centre crop of an encoded dataset.
        crop_proportion: share of the shorter side that crop covers, (0, 1].
        num_replicas: replicas of all hosts together.
        pipeline_index: which host this is, in `[0, num_pipelines)`.
        num_pipelines: hosts.

    Returns:
        Dictionaries of `image` uint8 `[b, H, W, C]` (whole where the dataset
        is in memory), `label` int32 `[b]`, `id` int64 `[b]` and `weight`
        float32 `[b]`: 0 for the padding of the last step (id and label -1)
        and for images that do not decode, else 1. Elements are laid out as
        those of `train_stream`, equally many on every host.

    Raises:
        ValueError: if the batch does not divide among the replicas, or an
            encoded dataset is given no image size.
    """
    layout = _Layout(batch_size, num_replicas, pipeline_index, num_pipelines)
    if dataset.is_encoded and not image_size:
        raise ValueError(
            f"{dataset.name!r} is cropped on the host: `image_size`, in "
            f"pixels, must be given. Received: image_size={image_size}."
        )
    order = _Order(dataset.num_examples, seed=None)
    steps = range(math.ceil(dataset.num_examples / batch_size))
    crop = _center_cropper(dataset, image_size or 0, crop_proportion)
    stream = _stream(dataset, layout, order, steps, crop)
    return _keep(stream, "id", "label", "weight", "image")


def _keep(stream: tf.data.Dataset, *keys: str) -> tf.data.Dataset:
    """Returns `stream` with those of `keys` it has, and prefetched."""
    stream = stream.map(lambda x: {key: x[key] for key in keys if key in x})
    options = tf.data.Options()
    options.deterministic = True
    return stream.prefetch(tf.data.AUTOTUNE).with_options(options)


def _permute(
    index: tf.Tensor, size: Any, use: int, seed: int, number: tf.Tensor
) -> tf.Tensor:
    """Returns where one permutation of `[0, size)` puts `index`.

    Not `tf.random.experimental.index_shuffle`: it runs 4 rounds of the cipher,
    and the orders of neighbouring epochs then correlate (measured: 0.76 for
    50,000 examples, 1.0 for 65,536). 16 rounds leave 0.01.

    Args:
        index: int64 scalar or `[n]`.
        size: number of things to permute, > 0.
        use: `_EXAMPLE_ORDER` or `_SHARD_ORDER`.
        seed: seed of the stream.
        number: int64 like `index` or scalar, e.g. the epoch.
    """
    parts = [
        tf.broadcast_to(tf.cast(part, tf.int64), tf.shape(index))
        for part in (use, seed, number)
    ]
    return tf.raw_ops.RandomIndexShuffle(
        index=index,
        seed=tf.stack(parts, axis=-1),
        max_index=tf.cast(size, tf.int64) - 1,
        rounds=16,
    )


@dataclasses.dataclass(frozen=True)
class _Order:
    """Which example stands at which position.

    Attributes:
        num_examples: examples in an epoch.
        seed: seed of the permutations; None for one epoch in storage order.
    """

    num_examples: int
    seed: int | None

    def has(self, position: tf.Tensor) -> tf.Tensor:
        """Whether an example, and no padding, is there: bool."""
        return tf.logical_or(
            self.seed is not None, position < self.num_examples
        )

    def locate(self, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the epochs and ids, int64, at positions of any shape."""
        epoch = position // self.num_examples
        index = position % self.num_examples
        if self.seed is None:
            return epoch, index
        return epoch, _permute(
            index, self.num_examples, _EXAMPLE_ORDER, self.seed, epoch
        )


def _stream(
    dataset: Dataset,
    layout: _Layout,
    order: _Order,
    steps: range,
    crop: Callable[[tf.Tensor, dict], dict],
) -> tf.data.Dataset:
    """Returns batches of all that a stream may hold.

    Args:
        dataset: where the examples are.
        layout: which rows of a step to yield.
        order: the order of the examples; without a seed, what follows the
            first epoch is padding.
        steps: the steps to yield.
        crop: for encoded datasets: an encoded image, and the row it belongs
            to (`id` int64, `epoch` int32), to a dictionary of uint8 images.
    """
    if isinstance(dataset.source, Arrays):
        return layout.elements(steps).map(_array_lookup(dataset.source, order))
    stop = steps.stop * layout.batch_size
    end = stop if order.seed is not None else dataset.num_examples
    if isinstance(dataset.source, Files):
        rows = _file_rows(layout, order, steps)
    else:
        groups = _Groups(dataset.source, order)
        rows = groups.rows(layout, steps.start * layout.batch_size, end)
    images = _decoded(dataset, rows, crop)
    padding = tf.data.Dataset.range(end, stop).filter(layout.holds)
    padding = padding.map(lambda _: _blank(images.element_spec, -1, -1))
    images = images.concatenate(padding)
    return images.batch(layout.rows, drop_remainder=True)


def _array_lookup(
    source: Arrays, order: _Order
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the map of positions `[b]` to a batch."""
    # The streams hold these tensors by reference. On the host, whatever the
    # device of the caller: only the batches travel.
    with tf.device("CPU:0"):
        images, labels = tf.constant(source.images), tf.constant(source.labels)

    def lookup(positions: tf.Tensor) -> dict[str, tf.Tensor]:
        epoch, ids = order.locate(positions)
        valid = order.has(positions)
        return {
            "id": tf.where(valid, ids, -1),
            "epoch": tf.cast(epoch, tf.int32),
            "label": tf.where(valid, tf.gather(labels, ids), -1),
            "weight": tf.cast(valid, tf.float32),
            "image": tf.gather(images, ids),
        }

    return lookup


def _file_rows(layout: _Layout, order: _Order, steps: range) -> tf.data.Dataset:
    """Yields `id` and `epoch` of the positions of `steps`, one by one."""

    def row(position: tf.Tensor) -> dict[str, tf.Tensor]:
        epoch, example_id = order.locate(position)
        return {"id": example_id, "epoch": tf.cast(epoch, tf.int32)}

    positions = layout.elements(steps).unbatch()
    return positions.filter(order.has).map(row)


class _Groups:
    """Reads TFRecord shards in groups, each shuffled as a whole.

    Every epoch is a permutation of the shards, cut into groups of
    `shards_per_group`. Where a group starts follows from the lengths of the
    shards, so a resumed stream opens the group it stopped in and no other.

    Args:
        records: the shards.
        order: the order of the examples.
    """

    def __init__(self, records: Records, order: _Order) -> None:
        self._order = order
        self._shards_per_group = records.shards_per_group
        self._filenames = [shard.filename for shard in records.shards]
        self._skips = np.array([s.skip for s in records.shards], np.int64)
        self._takes = np.array([s.take for s in records.shards], np.int64)
        self._per_epoch = math.ceil(
            len(records.shards) / records.shards_per_group
        )

    def _shards(self, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the order of the shards and the first offset of each."""
        count = len(self._filenames)
        shards = tf.range(count, dtype=tf.int64)
        if self._order.seed is not None:
            shards = _permute(
                shards, count, _SHARD_ORDER, self._order.seed, epoch
            )
        takes = tf.gather(self._takes, shards)
        return shards, tf.cumsum(takes, exclusive=True)

    def _group_at(self, position: int) -> int:
        """Returns the number, over all epochs, of the group of a position."""
        epoch, offset = divmod(position, self._order.num_examples)
        _, starts = self._shards(tf.constant(epoch, tf.int64))
        group_starts = starts.numpy()[:: self._shards_per_group]
        group = np.searchsorted(group_starts, offset, side="right") - 1
        return epoch * self._per_epoch + int(group)

    def _load(self, group: tf.Tensor) -> dict[str, tf.Tensor]:
        """Reads a group: `ids` int64 `[n]`, `records` string `[n]`."""
        epoch = group // self._per_epoch
        first = group % self._per_epoch * self._shards_per_group
        order, starts = self._shards(epoch)
        shards = order[first : first + self._shards_per_group]
        columns = (
            self._filenames,
            self._skips,
            self._takes,
            np.cumsum(self._takes) - self._takes,
        )
        slices = tuple(tf.gather(column, shards) for column in columns)
        # A block is a shard: read in parallel, delivered one after the other.
        examples = tf.data.Dataset.from_tensor_slices(slices).interleave(
            _read_shard,
            cycle_length=self._shards_per_group,
            block_length=int(self._takes.max()),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        size = tf.reduce_sum(tf.gather(self._takes, shards))
        ids, records = examples.batch(size).get_single_element()
        return {
            "group": group,
            "epoch": epoch,
            "start": epoch * self._order.num_examples + starts[first],
            "ids": ids,
            "records": records,
        }

    def records(self) -> tf.data.Dataset:
        """Yields the serialized examples of one epoch, one by one."""
        groups = tf.data.Dataset.range(self._per_epoch).map(self._load)
        return groups.flat_map(
            lambda group: tf.data.Dataset.from_tensor_slices(group["records"])
        )

    def rows(self, layout: _Layout, start: int, end: int) -> tf.data.Dataset:
        """Yields `id`, `epoch` and `record` of positions `[start, end)`."""

        def group_rows(group: dict[str, tf.Tensor]) -> tf.data.Dataset:
            size = tf.size(group["ids"], tf.int64)

            def row(position: tf.Tensor) -> dict[str, tf.Tensor]:
                i = position - group["start"]
                if self._order.seed is not None:
                    seed, number = self._order.seed, group["group"]
                    i = _permute(i, size, _EXAMPLE_ORDER, seed, number)
                return {
                    "id": group["ids"][i],
                    "epoch": tf.cast(group["epoch"], tf.int32),
                    "record": group["records"][i],
                }

            positions = tf.data.Dataset.range(
                tf.maximum(group["start"], start),
                tf.minimum(group["start"] + size, end),
            )
            return positions.filter(layout.holds).map(row)

        groups = tf.data.Dataset.range(
            self._group_at(start), self._group_at(end - 1) + 1
        )
        return groups.map(self._load).prefetch(1).flat_map(group_rows)


def _read_shard(
    filename: tf.Tensor, skip: tf.Tensor, take: tf.Tensor, first_id: tf.Tensor
) -> tf.data.Dataset:
    """Yields the ids and the serialized examples of a shard."""
    records = tf.data.TFRecordDataset(filename, buffer_size=8 << 20)
    return records.skip(skip).take(take).enumerate(first_id)


def _opener(
    dataset: Dataset,
) -> Callable[[dict], tuple[tf.Tensor, tf.Tensor]]:
    """Returns the map of a row to the encoded image and the label, int32."""
    source = dataset.source
    if isinstance(source, Records):
        return lambda row: _parse(row["record"], source)
    if not isinstance(source, Files):
        raise TypeError(f"{dataset.name!r} is not encoded.")
    with tf.device("CPU:0"):
        paths, labels = tf.constant(source.paths), tf.constant(source.labels)
    return lambda row: (tf.io.read_file(paths[row["id"]]), labels[row["id"]])


def _parse(record: tf.Tensor, source: Records) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the encoded image and the label of a serialized example."""
    spec = {source.image_key: tf.io.FixedLenFeature([], tf.string)}
    if source.label_key:
        spec[source.label_key] = tf.io.FixedLenFeature([], tf.int64)
    example = tf.io.parse_single_example(record, spec)
    label = example.get(source.label_key, -1)
    return example[source.image_key], tf.cast(label, tf.int32)


def _decoded(
    dataset: Dataset,
    rows: tf.data.Dataset,
    crop: Callable[[tf.Tensor, dict], dict],
) -> tf.data.Dataset:
    """Decodes rows in parallel and in order; none is ever missing.

    An image that does not decode must neither end the run at epoch 7 nor
    shift the stream, so it is replaced by a grey one, and named in the log.
    Errors can only be caught around a data set; one for each example costs
    0.3 ms, so chunks are tried whole, and a chunk that fails row by row.
    """
    open_row = _opener(dataset)

    # One trace for the three places of its use; tracing is what starting costs.
    @tf.function(input_signature=[rows.element_spec], autograph=False)
    def decode(row: dict) -> dict:
        encoded, label = open_row(row)
        return {
            "id": row["id"],
            "epoch": row["epoch"],
            "label": label,
            "weight": 1.0,
            **crop(encoded, row),
        }

    spec = rows.map(decode).element_spec

    def substitute(row: dict) -> dict:
        report = tf.numpy_function(dataset.report_undecodable, [row["id"]], [])
        with tf.control_dependencies([report]):
            return _blank(spec, row["id"], row["epoch"])

    def decode_or_substitute(row: dict) -> tf.data.Dataset:
        rows = tf.data.Dataset.from_tensors(row)
        decoded = rows.map(decode).ignore_errors(log_warning=True)
        return decoded.concatenate(rows.map(substitute)).take(1)

    def decode_chunk(chunk: dict) -> tf.data.Dataset:
        decoded = tf.data.Dataset.from_tensors(chunk).map(
            lambda rows: tf.map_fn(decode, rows, fn_output_signature=spec)
        )
        one_by_one = tf.data.Dataset.from_tensor_slices(chunk).flat_map(
            decode_or_substitute
        )
        return (
            decoded.ignore_errors()
            .concatenate(one_by_one.batch(_CHUNK))
            .take(1)
        )

    # Chunks that are done wait for their turn, so one a core leaves cores idle:
    # measured on 2 cores, 440 images/s instead of 700.
    chunks = rows.batch(_CHUNK).interleave(
        decode_chunk,
        cycle_length=2 * (os.cpu_count() or 1),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return chunks.unbatch()


def _blank(spec: dict, example_id: Any, epoch: Any) -> dict:
    """Returns an example without label or weight, its images grey."""
    images = {key: spec[key] for key in spec if key in ("image", "crops")}
    grey = tf.nest.map_structure(
        lambda image: tf.fill(image.shape, tf.cast(128, image.dtype)), images
    )
    return {
        "id": tf.cast(example_id, tf.int64),
        "epoch": tf.cast(epoch, tf.int32),
        "label": -1,
        "weight": 0.0,
        **grey,
    }


def _cropper(
    dataset: Dataset, seed: int, views: Sequence[data_util.Augmentation]
) -> Callable[[tf.Tensor, dict], dict]:
    """Returns the map of an encoded image to its random `crops`."""

    def crop(encoded: tf.Tensor, row: dict) -> dict:
        crops = []
        for index, view in enumerate(views):
            ids = row["id"][tf.newaxis]
            keys = data_util.example_keys(seed, row["epoch"], ids, index)
            crops.append(
                data_util.decode_crop(encoded, keys[0], view, dataset.channels)
            )
        same_size = len({view.size for view in views}) == 1
        return {"crops": tf.stack(crops) if same_size else tuple(crops)}

    return crop


def _center_cropper(
    dataset: Dataset, image_size: int, crop_proportion: float
) -> Callable[[tf.Tensor, dict], dict]:
    """Returns the map of an encoded image to its central `image`."""

    def crop(encoded: tf.Tensor, _: dict) -> dict:
        image = data_util.decode_center_crop(
            encoded, image_size, crop_proportion, dataset.channels
        )
        return {"image": image}

    return crop


# Sources ----------------------------------------------------------------------


def _some(names: Sequence[str], shown: int = 5) -> str:
    """Returns the first few of `names`, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def _select(split: str, sizes: dict[str, int], name: str) -> np.ndarray:
    """Returns the numbers of the examples a split expression asks for.

    Args:
        split: as TFDS writes it: "train", "train[:90%]", "train+test".
        sizes: number of examples of each split, laid end to end.
        name: the dataset, for the error.

    Raises:
        ValueError: if there is no such split, or it is empty.
    """
    infos = tfds.core.SplitDict(
        [
            tfds.core.SplitInfo(
                name=key,
                shard_lengths=[size],
                num_bytes=0,
                filename_template=None,
            )
            for key, size in sizes.items()
        ]
    )
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except ValueError as error:
        raise _no_split(name, split, sizes) from error
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    chosen = [
        starts[part.splitname]
        + np.arange(sizes[part.splitname])[part.from_ : part.to]
        for part in parts
    ]
    if not sum(map(len, chosen)):
        raise _no_split(name, split, sizes)
    return np.concatenate(chosen)


def _no_split(name: str, split: str, sizes: dict[str, int]) -> ValueError:
    return ValueError(
        f"There are no examples in split {split!r} of {name!r}. Its splits "
        f"are {sizes} (examples); parts such as 'train[:90%]' and sums such as "
        "'train+test' are understood."
    )


# TFDS


def _tfds_builder(name: str, data_dir: str | None) -> Any:
    """Returns the builder of a dataset, prepared; local data are preferred.

    Raises:
        ValueError: if the name is unknown, or preparing it fails.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = [
            _PHOTO_PATCHES,
            *tfds.list_builders(with_community_datasets=False),
        ]
        close = difflib.get_close_matches(name.split("/")[0], known)
        raise ValueError(
            f"There is no dataset of this name. Received: name={name!r}. "
            f"Similar names: {close}. A folder of images needs a separator in "
            f"its name: {os.path.join('.', name)!r}."
        ) from error
    if builder.is_prepared():
        return builder
    try:
        builder.download_and_prepare()
    except Exception as error:  # of any library between here and the server
        raise ValueError(
            f"{name!r} is not prepared in {str(builder.data_dir)!r}, and "
            f"preparing it failed: {type(error).__name__}: {error}. Run `tfds "
            f"build {name}` on a machine with network and copy the folder "
            "there, or name the folder that has it as `data_dir`."
        ) from error
    return builder


def _open_tfds(builder: Any, split: str, channels: int | None) -> Dataset:
    """Opens a split of a prepared TFDS dataset."""
    info = builder.info
    if info.file_format.value != "tfrecord":
        raise ValueError(
            "TFDS datasets must be stored as 'tfrecord'. Received: "
            f"{info.name!r} stored as {info.file_format.value!r}."
        )
    sizes = {key: value.num_examples for key, value in info.splits.items()}
    num_examples = len(_select(split, sizes, info.name))
    image_key = _feature_key(info, tfds.features.Image, "image")
    label_key = _feature_key(info, tfds.features.ClassLabel, "label")
    if not image_key:
        raise ValueError(
            "A dataset needs a feature `image`, or one image feature. "
            f"Received: {info.name!r} with features {list(info.features)}."
        )
    shards = tuple(info.splits[split].file_instructions)
    all_bytes = sum(value.num_bytes for value in info.splits.values())
    shard_bytes = all_bytes / sum(sizes.values()) * num_examples / len(shards)
    shards_per_group = int(_GROUP_BYTES / max(shard_bytes, 1))
    shards_per_group = min(max(shards_per_group, 1), len(shards))
    *image_size, depth = info.features[image_key].shape
    return Dataset(
        name=info.name,
        split=split,
        source=Records(shards, image_key, label_key, shards_per_group),
        num_examples=num_examples,
        class_names=tuple(info.features[label_key].names) if label_key else (),
        channels=channels or depth or 3,
        image_size=None if None in image_size else tuple(image_size),
    )


def _feature_key(info: Any, kind: type, default: str) -> str:
    """Returns the feature named `default`, or the only one of its kind."""
    keys = [k for k, value in info.features.items() if isinstance(value, kind)]
    if default in keys:
        return default
    return keys[0] if len(keys) == 1 else ""


# Arrays


def _in_memory(dataset: Dataset, memory_limit: int) -> Dataset:
    """Returns `dataset`, decoded if its images are of one size and small."""
    size, count = dataset.image_size, dataset.num_examples
    if not dataset.is_encoded or size is None or max(size) > _WHOLE_IMAGE_SIDE:
        return dataset
    shape = (*size, dataset.channels)
    if count * math.prod(shape) > memory_limit:
        return dataset
    images = np.empty((count, *shape), np.uint8)
    labels = np.empty(count, np.int32)
    done = 0
    for batch in _decoded_whole(dataset, shape).as_numpy_iterator():
        rows = slice(done, done + len(batch["label"]))
        images[rows], labels[rows] = batch["image"], batch["label"]
        done = rows.stop
    return dataclasses.replace(
        dataset,
        source=Arrays(images, labels),
        class_names=dataset.class_names if labels.max() >= 0 else (),
    )


def _decoded_whole(dataset: Dataset, shape: tuple[int, ...]) -> tf.data.Dataset:
    """Yields batches of `image` uint8 `[b, *shape]` and `label`, in order."""
    source = dataset.source
    order = _Order(dataset.num_examples, seed=None)

    def crop(encoded: tf.Tensor, _: dict) -> dict:
        image = tf.io.decode_image(encoded, shape[-1], expand_animations=False)
        return {"image": tf.ensure_shape(image, shape)}

    if not isinstance(source, Records):
        layout = _Layout(1, 1, 0, 1)
        rows = _file_rows(layout, order, range(order.num_examples))
        return _decoded(dataset, rows, crop).batch(_CHUNK)

    # What TFDS has prepared decodes, so it is spared the cost of `_decoded`:
    # 50,000 CIFAR images take 2 s instead of 6 s.
    def decode(record: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded, label = _parse(record, source)
        return {"label": label, **crop(encoded, {})}

    spec = {
        "label": tf.TensorSpec([], tf.int32),
        "image": tf.TensorSpec(shape, tf.uint8),
    }
    return (
        _Groups(source, order)
        .records()
        .batch(256)
        .map(
            lambda batch: tf.map_fn(decode, batch, fn_output_signature=spec),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    )


def _open_npz(path: str, split: str) -> Dataset:
    """Opens an archive of `images` and, optionally, `labels`."""
    try:
        with np.load(path) as archive:
            arrays = dict(archive)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No .npz archive can be read here. Received: {path!r} ({error})."
        ) from error
    images = arrays.get("images", np.zeros(()))
    labels = arrays.get("labels", np.full(images.shape[:1], -1))
    if (
        images.ndim != 4
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)
    ):
        found = {key: (x.dtype.name, x.shape) for key, x in arrays.items()}
        raise ValueError(
            "An .npz archive must hold `images`, uint8 [N, H, W, C], and may "
            f"hold `labels`, integers [N]. Received: {path!r} with {found}."
        )
    rows = _select(split, {"train": len(images)}, path)
    class_names = tuple(map(str, range(int(labels.max()) + 1)))
    return _from_arrays(path, images[rows], labels[rows], class_names)


def _from_arrays(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
) -> Dataset:
    """Returns a dataset of arrays, uint8 `[N, H, W, C]` and integer `[N]`."""
    num_examples, height, width, channels = images.shape
    return Dataset(
        name=name,
        split="",
        source=Arrays(images, labels.astype(np.int32)),
        num_examples=num_examples,
        class_names=class_names,
        channels=channels,
        image_size=(height, width),
    )


# Folders


def _image_files(root: str) -> tuple[list[str], collections.Counter]:
    """Returns sorted image paths below `root`, and a count of other files.

    Hidden files and folders are left out; links are followed.
    """
    images: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if name[0] == ".":
                continue
            if extension in _EXTENSIONS:
                path = os.path.join(folder, name)
                images.append(os.path.relpath(path, root))
            else:
                others[extension or "no extension"] += 1
    return sorted(images), others


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the first and last bytes of an image file say.

    Attributes:
        format: "JPEG", "PNG", ...; by content, not by extension.
        mode: Pillow's, e.g. "RGB" or "I;16".
        size: `(height, width)` in pixels.
    """

    format: str
    mode: str
    size: tuple[int, int]


def _header(path: str) -> _Header | None:
    """Returns the header of an image; None if TensorFlow cannot decode it.

    A file without the last bytes of its format may be cut short, or merely
    have something appended: it is decoded whole to find out.
    """
    try:
        with Image.open(path) as image:
            header = _Header(str(image.format), image.mode, image.size[::-1])
        if header.format not in _DECODED_CHANNELS:
            return None
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            tail = file.read()
        trailer = _TRAILERS.get(header.format)
        if trailer is None or not tail.endswith(trailer):
            tf.io.decode_image(tf.io.read_file(path), expand_animations=False)
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
        tf.errors.InvalidArgumentError,
    ):
        return None
    return header


def _open_folder(root: str, split: str, channels: int | None) -> Dataset:
    """Opens a split of a folder of images."""
    files, others = _image_files(root)
    if not files:
        raise ValueError(
            f"There are no images {_EXTENSIONS} in {os.path.abspath(root)!r} "
            f"or below. Other files: {dict(others)}."
        )
    splits, depth, notes = _folder_splits(files)
    sizes = {key: len(names) for key, names in splits.items()}
    in_order = [name for names in splits.values() for name in names]
    chosen = [in_order[row] for row in _select(split, sizes, root)]
    headers, unreadable = _readable(root, chosen)
    if not headers:
        raise ValueError(
            f"None of the images of split {split!r} of {root!r} can be "
            f"decoded: {_some(unreadable)}."
        )
    channels = channels or 3
    class_names = sorted({_class_of(name, depth) for name in files} - {""})
    labels = np.array(
        [
            class_names.index(_class_of(name, depth))
            if _class_of(name, depth)
            else -1
            for name in headers
        ],
        np.int32,
    )
    notes += _class_notes(labels, class_names)
    notes += _channel_notes(list(headers.values()), channels)
    if unreadable:
        count = len(unreadable)
        notes.append(f"{count} unreadable, skipped: {_some(unreadable)}")
        logging.warning("%s: %s", root, notes[-1])
    if others:
        notes.append(f"not images, skipped: {dict(others.most_common())}")
    image_sizes = {header.size for header in headers.values()}
    paths = tuple(os.path.join(root, name) for name in headers)
    return Dataset(
        name=root,
        split=split,
        source=Files(paths, labels),
        num_examples=len(paths),
        class_names=tuple(class_names) if labels.max() >= 0 else (),
        channels=channels,
        image_size=image_sizes.pop() if len(image_sizes) == 1 else None,
        notes=tuple(notes),
    )


def _readable(
    root: str, names: list[str]
) -> tuple[dict[str, _Header], list[str]]:
    """Returns the headers of the images, by name, and the unreadable names."""
    paths = [os.path.join(root, name) for name in names]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(names, pool.map(_header, paths), strict=True))
    headers = {name: header for name, header in found.items() if header}
    return headers, [name for name in names if name not in headers]


def _folder_splits(
    files: list[str],
) -> tuple[dict[str, list[str]], int, list[str]]:
    """Returns the files of each split, depth of the class folders, and notes.

    The top folders are splits if one is called "train", or all bear names of
    splits. Otherwise "test" is the tenth of the files whose path hashes so:
    files added later move no other from one split to the other.
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
            notes.append(f"images outside them, skipped: {_some(outside)}")
        return dict(splits), 1, notes
    for name in files:
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        held_out = int.from_bytes(digest, "big") % 10 == 0
        splits["test" if held_out else "train"].append(name)
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
    if not class_names or labels.max() < 0:
        return ["no class folders: the images are unlabelled"]
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    per_class = [
        f"{name}: {count}"
        for name, count in zip(class_names, counts, strict=True)
    ]
    notes = [f"examples per class: {_some(per_class, 20)}"]
    if len(class_names) == 1:
        notes.append(
            f"WARNING: {class_names[0]!r} is the only folder, so there is one "
            "class; name that folder itself if it is not meant as a class"
        )
        logging.warning("%s", notes[-1])
    if not counts.all():
        empty = [
            n for n, count in zip(class_names, counts, strict=True) if not count
        ]
        notes.append(f"classes without examples in this split: {_some(empty)}")
    if (labels < 0).any():
        notes.append(
            f"{np.sum(labels < 0)} images outside the class folders: unlabelled"
        )
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

# In the wheel of scikit-image 0.26; a class is named without the extension.
_PICTURES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_PATCHES = {"train": 10_000, "test": 2_000}
_PATCH_SIZE = 32
_PATCH_SIDES = (32, 96)  # of the source, in pixels
_PATCH_GAP = 16  # pixels between the regions of train and test


def _photo_patches(split: str) -> Dataset:
    """Cuts 32x32 RGB patches out of the 16 pictures of scikit-image's wheel.

    The class is the picture. Across its longer side, each picture is cut in
    three: test patches come from the middle 28 %, train patches from both
    sides, with a gap between: no pixel is shared. A patch is a square of 32
    to 96 pixels (log-uniform) at a random place, downsampled by box filter.
    10,000 train and 2,000 test patches, the same bits in every run: the seed
    is fixed. Logistic regression on raw pixels reaches 45.0 % on test.
    """
    rows = _select(split, _PATCHES, _PHOTO_PATCHES)
    parts = [_cut_patches(part) for part in _PATCHES]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    names = tuple(os.path.splitext(picture)[0] for picture in _PICTURES)
    return _from_arrays(_PHOTO_PATCHES, images[rows], labels[rows], names)


def _cut_patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[N, 32, 32, 3]` and labels `[N]`, classes in turn."""
    folder = os.path.join(os.path.dirname(skimage.__file__), "data")
    pictures = []
    for name in _PICTURES:
        with Image.open(os.path.join(folder, name)) as picture:
            pictures.append(picture.convert("RGB"))
    # Of NumPy's generators, the one whose draws are promised never to change.
    random = np.random.RandomState(list(_PATCHES).index(split))
    labels = np.arange(_PATCHES[split]) % len(_PICTURES)
    patches = []
    for label in labels:
        box = _patch_box(pictures[label].size, split, random)
        patch = pictures[label].crop(box)
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
