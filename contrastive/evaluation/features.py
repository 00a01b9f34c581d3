# SPDX-License-Identifier: Apache-2.0
"""What a network gives for every image of a split, kept on disk."""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data
import data_util
from contrastive import storage
from contrastive.sources.sources import Arrays, Files

_SECONDS_BETWEEN_LINES = 10.0
# Part of every key: to be raised when what is computed changes.
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """What a network gives for the images of a split, in their order.

    Attributes:
        values: float32 `[N, d]`.
        labels: int32 `[N]`, -1 where there is none.
        ids: int64 `[N]`, of the examples; one that did not decode is missing.
    """

    values: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def labelled(self) -> "Outputs":
        """Returns those with a label."""
        keep = self.labels >= 0
        return Outputs(
            values=self.values[keep], labels=self.labels[keep],
            ids=self.ids[keep],
        )  # fmt: skip


def compute_outputs(
    network: keras.Model | None,
    dataset: data.Dataset,
    image_size: int,
    *,
    crop_proportion: float | None = None,
    batch_size: int = 256,
    strategy: tf.distribute.Strategy | None = None,
    jit_compile: bool = False,
) -> Outputs:
    """Returns a network's outputs for all images of a split, in order.

    Args:
        network: from float32 images `[n, s, s, c]` in [0, 1] to `[n, d]`, made
            in the strategy's scope; None for the pixels themselves.
        dataset: what `data.load` returned, or a subset of it.
        image_size: side of the images that the network sees, pixels.
        crop_proportion: central share of an image that it sees; None: all, or
            of images that vary in size the largest square.
        batch_size: images a step, all replicas.
        strategy: where it runs; None: here.
        jit_compile: whether it is compiled by XLA.
    """
    strategy = strategy or tf.distribute.get_strategy()
    on_device = None if dataset.is_encoded else crop_proportion

    @functools.partial(tf.function, jit_compile=jit_compile)
    def forward(images: tf.Tensor) -> tf.Tensor:
        images = data_util.eval_images(
            images, image_size, crop_proportion=on_device
        )
        if network is None:
            return tf.reshape(images, [images.shape[0], -1])
        return tf.cast(network(images, training=False), tf.float32)

    def replica_step(batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        names = ("label", "id", "weight")
        return {
            "value": forward(batch["image"]),
            **{name: batch[name] for name in names},
        }

    @tf.function
    def step(batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        columns = strategy.run(replica_step, (batch,))
        # One by one: a dictionary is too much for several machines.
        return {k: strategy.gather(v, axis=0) for k, v in columns.items()}

    stream = strategy.distribute_datasets_from_function(
        lambda context: data.eval_stream(
            dataset,
            batch_size=batch_size,
            image_size=image_size,
            crop_proportion=crop_proportion,
            num_replicas=context.num_replicas_in_sync,
            pipeline_index=context.input_pipeline_id,
            num_pipelines=context.num_input_pipelines,
        )
    )
    batches, started, last_line = [], time.monotonic(), time.monotonic()
    for batch in stream:
        batches.append({k: v.numpy() for k, v in step(batch).items()})
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line, done = now, len(batches) * batch_size
            logging.info(
                "%s %s: %d/%d images, %.0f images/s", dataset.name,
                dataset.split, done, dataset.num_examples,
                done / (now - started),
            )  # fmt: skip
    whole = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    keep = whole["weight"] > 0
    return Outputs(
        values=whole["value"][keep],
        labels=whole["label"][keep],
        ids=whole["id"][keep],
    )


def fingerprint(item: keras.Model | data.Dataset | None) -> str:
    """Returns a hash of what determines a network, or a split's images.

    Of a network, its layers and weights, so that it is the same whatever file
    it was read from. Of files, their names, sizes and dates.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(item, keras.Model):
        # Keras numbers layers without a name as they come.
        digest.update(re.sub(r'_\d+"', '"', item.to_json()).encode())
        for variable in item.variables:
            digest.update(variable.numpy().tobytes())
    elif item is not None:
        source = item.source
        facts = [item.name, item.split, item.channels, item.num_examples]
        digest.update(item.example_ids.tobytes())
        if isinstance(source, Arrays):
            facts.append(source.images.shape)
            digest.update(source.images.tobytes())
            digest.update(source.labels.tobytes())
        elif isinstance(source, Files):
            paths = [source.paths[row] for row in item.example_ids]
            # A bucket answers each request after tens of milliseconds.
            with storage.pool(item.name) as threads:
                found = threads.map(tf.io.gfile.stat, paths)
                for path, file in zip(paths, found, strict=True):
                    facts += [path, file.length, file.mtime_nsec]
            digest.update(source.labels.tobytes())
        else:
            facts += [source.filenames, source.skips.tolist()]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def cached(
    directory: str | None,
    key: Mapping[str, Any],
    make: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns `make()`, or what it returned when it was last called.

    Args:
        directory: where results are kept, one file each; None: nowhere.
        key: what the result depends on, for JSON.
        make: returns arrays by name.
    """
    if directory is None:
        return make()
    text = json.dumps({"version": _VERSION, **key}, sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    path = os.path.join(directory, f"{name}.npz")
    try:
        with tf.io.gfile.GFile(path, "rb") as file, np.load(file) as stored:
            return {k: stored[k] for k in stored.files if k != "key"}
    except tf.errors.NotFoundError:
        pass
    except Exception as error:  # of zip, NumPy or the file system: damaged
        logging.warning("%s cannot be read (%s); made again.", path, error)
    made = make()
    try:
        tf.io.gfile.makedirs(directory)
        write_npz(path, {"key": np.array(text), **made})
    except (OSError, tf.errors.OpError) as error:
        logging.warning("%s cannot be written: %s", path, error)
    return made


def write_npz(path: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays to an archive; whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    unfinished = f"{path}.{os.getpid()}.tmp"  # another may write the same
    with tf.io.gfile.GFile(unfinished, "wb") as file:
        file.write(content.getvalue())
    tf.io.gfile.rename(unfinished, path, overwrite=True)
