# SPDX-License-Identifier: Apache-2.0
"""Examples in memory or in image files, and datasets without examples."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from contrastive import storage
from contrastive.sources import facts
from contrastive.sources.dataset import Dataset, Request, Source
from contrastive.sources.order import Plan


@dataclasses.dataclass(frozen=True)
class Arrays(Source):
    """Images, uint8 `[N, H, W, C]`, and labels, int32 `[N]`, -1 for none."""

    images: np.ndarray
    labels: np.ndarray

    kind = "in memory"
    is_encoded = False

    def read(self, plan: Plan, masks: np.ndarray | None) -> tf.data.Dataset:
        """See `Source`; a batch is one gather by index."""
        held = {"image": tf.constant(self.images)}
        if masks is not None:
            held["mask"] = tf.constant(masks)
        labels = tf.constant(self.labels)

        def batch(first: tf.Tensor) -> dict[str, tf.Tensor]:
            positions = first + tf.range(plan.rows, dtype=tf.int64)
            ids, epochs = plan.locate(positions)
            valid = positions < plan.end
            return {
                "id": tf.where(valid, ids, -1),
                "epoch": tf.where(valid, epochs, -1),
                "label": tf.where(valid, tf.gather(labels, ids), -1),
                "weight": tf.cast(valid, tf.float32),
                **{key: tf.gather(array, ids) for key, array in held.items()},
            }

        return plan.positions(plan.start, plan.stop, plan.rows).map(batch)

    def identity(self, ids: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
        """See `Source`; all images and labels, whatever the ids."""
        del ids
        return [self.images.shape], [self.images, self.labels]


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Paths of image files, and labels, int32 `[N]`, -1 for none."""

    paths: tuple[str, ...]
    labels: np.ndarray

    kind = "image files"

    def read(self, plan: Plan, masks: np.ndarray | None) -> tf.data.Dataset:
        """See `Source`; rows hold `label` and `path`."""
        del masks
        paths, labels = tf.constant(self.paths), tf.constant(self.labels)

        def row(position: tf.Tensor) -> dict[str, tf.Tensor]:
            i, epoch = plan.locate(position)
            known = {"id": i, "epoch": epoch}
            return {**known, "label": labels[i], "path": paths[i]}

        return plan.positions(plan.start, plan.end).map(row)

    def open_row(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """See `Source`."""
        return tf.io.read_file(row["path"]), row["label"]

    def path(self, example_id: int) -> str:
        """See `Source`."""
        return self.paths[example_id]

    def identity(self, ids: np.ndarray) -> tuple[list[Any], list[np.ndarray]]:
        """See `Source`; names, sizes and dates of the files."""
        paths = [self.paths[row] for row in ids]
        # A bucket answers each request after tens of milliseconds.
        with storage.pool(paths[0]) as threads:
            found = zip(paths, threads.map(tf.io.gfile.stat, paths), strict=True)
            values = [(p, f.length, f.mtime_nsec) for p, f in found]
        return list(itertools.chain(*values)), [self.labels]


def in_memory(
    request: Request,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Iterable[str],
    **fields: Any,
) -> Dataset:
    """Makes a dataset of images, uint8 `[N, H, W, C]`, and integers `[N]`.

    `fields` are further fields of `Dataset`.
    """
    return Dataset.of(
        request,
        source=Arrays(images, labels.astype(np.int32)),
        num_examples=len(images),
        class_names=class_names if labels.max() >= 0 else (),
        channels=images.shape[-1],
        image_size=images.shape[1:3],
        **fields,
    )


def outline(request: Request, num_examples: int, **fields: Any) -> Dataset:
    """Makes a dataset without examples, for the shapes of its batches.

    `num_examples` is 0 where it is unknown; `fields` are those of `Dataset`.
    """
    size, channels = fields["image_size"], fields["channels"]
    source: Source = Files((), np.zeros([0], np.int32))
    if facts.fits_in_memory(size, channels, num_examples):
        images = np.zeros([0, *size, channels], np.uint8)
        source = Arrays(images, source.labels)
    if not num_examples:
        num_examples = facts.IMAGENET_EXAMPLES
        fields["notes"] = (facts.NOT_HERE,)
    return Dataset.of(request, source=source, num_examples=num_examples, **fields)


def unknown(request: Request) -> Dataset:
    """Makes an outline of ImageNet, in place of a dataset that is not here."""
    names, channels = map(str, range(facts.IMAGENET_CLASSES)), request.channels
    fields = {"class_names": names, "channels": channels or 3}
    return outline(request, 0, **fields, image_size=None)
