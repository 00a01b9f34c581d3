# SPDX-License-Identifier: Apache-2.0
"""Examples in TFRecord shards, which can only be read from their start."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from contrastive.sources.dataset import Source
from contrastive.sources.order import EXAMPLE_ORDER, SHARD_ORDER, Plan, permute

_FOREVER = 1 << 30  # groups of shards
_FILE_NAME = "file_name"  # of TFDS, where examples come from image files
# Records of a shard in which `has_label` looks: all or no labels are hidden.
_RECORDS_LOOKED_AT = 48


@dataclasses.dataclass(frozen=True)
class Records(Source):
    """Examples in TFRecord shards, which can only be read from their start.

    Of each shard, int64 `[shards]`, `skips` examples at the start do not belong to the split, and
    the `takes` after those do.
    """

    filenames: tuple[str, ...]
    skips: np.ndarray
    takes: np.ndarray
    image_key: str  # the feature that holds the encoded image
    label_key: str  # "" where there is no label
    shards_per_group: int  # held in memory, and shuffled, together

    kind = "TFRecords"
    has_random_access = False

    def read(self, plan: Plan, masks: np.ndarray | None) -> tf.data.Dataset:
        """See `Source`; rows hold the serialized `record`.

        Every epoch is a permutation of the shards, cut into groups. A resumed stream reads the
        group it stopped in and none before it. Of a subset, shards without any of its examples are
        not read.
        """
        del masks
        columns, lengths, is_chosen = self._shards(plan)
        count, width = len(lengths), self.shards_per_group
        groups_per_epoch = math.ceil(count / width)

        def locate(group: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            epoch = group // groups_per_epoch
            first = group % groups_per_epoch * width
            shards = tf.range(count, dtype=tf.int64)
            shards = permute(shards, count, SHARD_ORDER, plan.seed, epoch)
            sizes = tf.gather(lengths, shards)
            start = epoch * plan.num_examples + tf.reduce_sum(sizes[:first])
            stop = start + tf.reduce_sum(sizes[first : first + width])
            return start, stop, shards[first : first + width]

        def read(start: tf.Tensor, stop: tf.Tensor, shards: tf.Tensor) -> tuple:
            chosen = tuple(tf.gather(column, shards) for column in columns)
            longest = int(self.takes.max())
            examples = _read_shards(chosen, _read_shard, width, longest)
            if plan.ids is not None:
                examples = examples.filter(lambda i, _: is_chosen[i])
            group = examples.batch(stop - start).get_single_element()
            return start, stop, *group

        def rows(
            start: tf.Tensor, stop: tf.Tensor, ids: tf.Tensor, records: Any
        ) -> tf.data.Dataset:
            def row(position: tf.Tensor) -> dict[str, tf.Tensor]:
                i, size = position - start, stop - start
                i = permute(i, size, EXAMPLE_ORDER, plan.seed, start)
                epoch = tf.cast(position // plan.num_examples, tf.int32)
                return {"id": ids[i], "epoch": epoch, "record": records[i]}

            first = tf.maximum(start, plan.start)
            return plan.positions(first, tf.minimum(stop, plan.end)).map(row)

        epoch = plan.start // plan.num_examples
        groups = tf.data.Dataset.range(epoch * groups_per_epoch, _FOREVER)
        groups = groups.map(locate).filter(lambda _, end, __: end > plan.start)
        groups = groups.take_while(lambda start, _, __: start < plan.end)
        return groups.map(read).prefetch(1).flat_map(rows)

    def open_row(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """See `Source`."""
        features = {self.image_key: tf.io.FixedLenFeature([], tf.string)}
        if self.label_key:
            features[self.label_key] = tf.io.FixedLenFeature([], tf.int64)
        example = tf.io.parse_single_example(row["record"], features)
        label = example.get(self.label_key, -1)
        return example[self.image_key], tf.cast(label, tf.int32)

    def read_labels(self) -> np.ndarray:
        """See `Source`; reads all records."""
        if not self.label_key:
            return np.full(self.takes.sum(), -1, np.int32)
        return self._read_feature(self.label_key, np.int64(-1)).astype(np.int32)

    def has_label(self, ids: np.ndarray) -> bool:
        """See `Source`; looks at the first 48 of `ids` in each shard."""
        if not self.label_key:
            return False
        is_chosen = np.isin(np.arange(self.takes.sum()), ids)
        spec = {self.label_key: tf.io.FixedLenFeature([], tf.int64, -1)}

        def read(*shard: tf.Tensor) -> tf.data.Dataset:
            records = _read_shard(*shard)
            records = records.filter(lambda i, _: tf.gather(is_chosen, i))
            return records.take(_RECORDS_LOOKED_AT).map(
                lambda _, x: tf.io.parse_single_example(x, spec)[self.label_key]
            )

        shards = tf.data.Dataset.from_tensor_slices(self._columns())
        return any(label >= 0 for label in shards.flat_map(read))

    def read_names(self) -> Sequence[str]:
        """See `Source`; reads all records."""
        names = self._read_feature(_FILE_NAME, b"")
        return [name.decode() for name in names] if all(names) else ()

    def identity(self, ids: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
        """See `Source`; the names of the shards and the places in them."""
        del ids
        return [self.filenames, self.skips.tolist()], []

    def _columns(self) -> tuple[Any, ...]:
        """Returns the arguments of `_read_shard`, for each shard."""
        first_ids = np.cumsum(self.takes) - self.takes
        return list(self.filenames), self.skips, self.takes, first_ids

    def _shards(self, plan: Plan) -> tuple[list, np.ndarray, tf.Tensor]:
        """Returns columns and lengths of a plan's shards, and its examples."""
        columns, lengths = self._columns(), self.takes
        is_chosen = np.ones(lengths.sum(), bool)
        if plan.ids is not None:
            is_chosen = np.isin(np.arange(lengths.sum()), plan.ids)
            lengths = np.add.reduceat(is_chosen.astype(np.int64), columns[-1])
        kept = [np.asarray(column)[lengths > 0] for column in columns]
        return kept, lengths[lengths > 0], tf.constant(is_chosen)

    def _read_feature(self, key: str, default: Any) -> np.ndarray:
        """Reads a scalar feature of all records, in storage order."""
        dtype = tf.constant(default).dtype
        spec = {key: tf.io.FixedLenFeature([], dtype, default)}

        def read(*shard: tf.Tensor) -> tf.data.Dataset:
            records = _read_shard(*shard).batch(1024)
            return records.map(lambda _, x: tf.io.parse_example(x, spec)[key])

        width = min(16, len(self.filenames))
        longest = math.ceil(self.takes.max() / 1024)
        batches = _read_shards(self._columns(), read, width, longest)
        return np.concatenate(list(batches.as_numpy_iterator()))


def _read_shards(columns: tuple, read: Callable, width: int, longest: int) -> tf.data.Dataset:
    """Reads `width` shards in parallel; delivers one after the other."""
    return tf.data.Dataset.from_tensor_slices(columns).interleave(
        read, width, block_length=longest, num_parallel_calls=tf.data.AUTOTUNE
    )


def _read_shard(
    filename: tf.Tensor, skip: tf.Tensor, take: tf.Tensor, first_id: tf.Tensor
) -> tf.data.Dataset:
    """Yields the ids and the serialized examples of a shard."""
    records = tf.data.TFRecordDataset(filename, buffer_size=8 << 20)
    return records.skip(skip).take(take).enumerate(first_id)
