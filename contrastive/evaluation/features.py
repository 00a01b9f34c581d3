# SPDX-License-Identifier: Apache-2.0
"""Outputs of a network for every image of a split: cache and files."""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data
import data_util
from contrastive import storage

EMBEDDING_FORMATS = (".npz", ".parquet")
PREDICTION_FORMATS = (".csv", ".npz")
_SECONDS_BETWEEN_LINES = 10.0
# Part of every key of the cache; to be raised when the computation changes.
_VERSION = 1

Batch = Mapping[str, tf.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """Outputs of a network for the images of a split, in their order."""

    values: np.ndarray  # float32 `[N, d]`
    labels: np.ndarray  # int32 `[N]`, -1 where there is none
    ids: np.ndarray  # int64 `[N]`, example ids without undecodable images

    def labelled(self) -> "Outputs":
        """Returns the outputs of the images that have a label."""
        return self.rows(self.labels >= 0)

    def rows(self, chosen: np.ndarray) -> "Outputs":
        """Returns the outputs of some images: a bool mask or positions."""
        return Outputs(**{k: v[chosen] for k, v in vars(self).items()})


def compute_outputs(
    network: keras.Model | Callable[..., tf.Tensor] | None,
    dataset: data.Dataset,
    image_size: int,
    *,
    crop_proportion: float | None = None,
    batch_size: int = 256,
    strategy: tf.distribute.Strategy | None = None,
    jit_compile: bool = False,
) -> Outputs:
    """Computes a network's outputs for all images of a split, in order.

    Args:
        network: from float32 images `[n, s, s, c]` in [0, 1] to `[n, d]`, made in the strategy's
            scope; None for the pixels themselves.
        dataset: a result of `data.load`, or a subset of it.
        image_size: side of the network's input images, pixels.
        crop_proportion: central share of an image that the network is given; None: all, or the
            largest square of images that vary in size.
        batch_size: global batch size.
        strategy: where the network runs; None: the current strategy.
        jit_compile: whether XLA compiles the network.
    """
    strategy = strategy or tf.distribute.get_strategy()
    on_device = None if dataset.is_encoded else crop_proportion

    @functools.partial(tf.function, jit_compile=jit_compile)
    def forward(images: tf.Tensor) -> tf.Tensor:
        images = data_util.eval_images(images, image_size, crop_proportion=on_device)
        if network is None:
            return tf.reshape(images, [images.shape[0], -1])
        return tf.cast(network(images, training=False), tf.float32)

    def replica_step(batch: Batch) -> list[tf.Tensor]:
        names = ("label", "id", "weight")
        return [forward(batch["image"]), *(batch[name] for name in names)]

    @tf.function
    def step(batch: Batch) -> list[tf.Tensor]:
        columns = strategy.run(replica_step, (batch,))
        # One by one: several machines cannot gather all at once.
        return [strategy.gather(column, axis=0) for column in columns]

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
    batches: list[list[np.ndarray]] = []
    started = last_line = time.monotonic()
    for count, batch in enumerate(stream):
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES:
            last_line, done = now, count * batch_size
            split = f"{dataset.name} {dataset.split}"
            progress = f"{done}/{dataset.num_examples} images"
            rate = done / (now - started)
            logging.info("%s: %s, %.0f images/s", split, progress, rate)
        batches.append([column.numpy() for column in step(batch)])
    values, labels, ids, weight = map(np.concatenate, zip(*batches, strict=True))
    return Outputs(values=values, labels=labels, ids=ids).rows(weight > 0)


def network_fingerprint(network: keras.Model | None) -> str:
    """Computes a hash of a network's layers and weights; None: the pixels.

    It is the same whatever file the network was read from.
    """
    digest = hashlib.blake2b(digest_size=16)
    if network is not None:
        # Keras numbers layers without a name as they come.
        digest.update(re.sub(r'_\d+"', '"', network.to_json()).encode())
        for variable in network.variables:
            digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


def cached(
    directory: str | None,
    key: Mapping[str, Any],
    make: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns `make()`, or its result from the last call with the same key.

    The directory (None: nowhere) keeps a file of arrays for each key, which holds everything that
    the result depends on, for JSON.
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
        write_npz(path, {"key": np.array(text), **made})
    except (OSError, tf.errors.OpError) as error:
        logging.warning("%s cannot be written: %s", path, error)
    return made


def write_npz(path: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays to an .npz archive, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    storage.write_whole(path, content.getvalue())


def check_output(path: str, formats: Sequence[str]) -> None:
    """Checks that a file can be written, and makes its folder.

    Raises:
        ValueError: if the extension of the path is none of `formats`, or a library is missing.
    """
    extension = os.path.splitext(path)[1]
    if extension not in formats:
        raise ValueError(
            f"The file to write must end in {' or '.join(formats)}. Received: {path!r}."
        )
    if extension == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise ValueError("Parquet files need pyarrow: pip install -r requirements.txt")
    storage.make_folder(os.path.dirname(path) or os.curdir)


def write_embeddings(path: str, dataset: data.Dataset, outputs: Outputs) -> int:
    """Writes an embedding for each image that could be read, in their order.

    Both formats hold `name` (of the file in its folder, or the example's id), `id`, `label` (-1:
    none), and `embedding`, float32. An .npz file also holds `class_names` and `unreadable`, the
    names of missing images; a Parquet file has a column `class` instead.

    The path ends in one of `EMBEDDING_FORMATS`. Returns the number of images without an embedding.
    """
    columns, missing = _columns(dataset, outputs)
    if path.endswith(".npz"):
        class_names = np.array(dataset.class_names, str)
        columns |= {"embedding": outputs.values, "class_names": class_names}
        write_npz(path, columns | {"unreadable": np.array(missing, str)})
        return len(missing)
    import pyarrow
    import pyarrow.parquet

    columns["class"] = _class_names(dataset, outputs)
    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(outputs.values.reshape(-1)), outputs.values.shape[1]
    )
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), content)
    storage.write_whole(path, content.getvalue())
    return len(missing)


def write_predictions(
    path: str | None,
    dataset: data.Dataset,
    outputs: Outputs,
    class_names: Sequence[str],
    top_k: int,
) -> int:
    """Writes the most probable classes of each image, in their order.

    A CSV file has the columns `name`, `label` (where images have any), `class_1`, `probability_1`,
    `class_2`, ...; an .npz the arrays `name`, `id`, `label`, `class` and `probability` `[N, k]`,
    `class_names`, `unreadable`. Labels are those of the images; in an .npz, `label_names` are their
    names, which may differ from those of the classifier's classes.

    The path ends in one of `PREDICTION_FORMATS`; None: CSV on standard output. `outputs` are
    probabilities of the classifier's classes, of which at most `top_k` are written. Returns the
    number of images without a prediction.
    """
    columns, missing = _columns(dataset, outputs)
    best = np.argsort(-outputs.values, axis=1, kind="stable")[:, :top_k]
    probabilities = np.take_along_axis(outputs.values, best, axis=1)
    if path and path.endswith(".npz"):
        columns |= {
            "class": best,
            "probability": probabilities,
            "class_names": np.array(class_names, str),
            "label_names": np.array(dataset.class_names, str),
            "unreadable": np.array(missing, str),
        }
        write_npz(path, columns)
        return len(missing)
    columns = {"name": columns["name"]}
    if dataset.class_names:
        columns["label"] = _class_names(dataset, outputs)
    ranks = zip(best.T, probabilities.T, strict=True)
    for rank, (labels, shares) in enumerate(ranks, 1):
        columns[f"class_{rank}"] = [class_names[i] for i in labels]
        columns[f"probability_{rank}"] = [f"{share:.6f}" for share in shares]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *zip(*columns.values(), strict=True)])
    if path:
        storage.write_whole(path, text.getvalue())
    else:
        sys.stdout.write(text.getvalue())
    return len(missing)


def _names(dataset: data.Dataset, ids: np.ndarray) -> tuple[list[str], list[str]]:
    """Returns the names of the examples `ids`, and of all missing ones."""
    try:
        names = list(dataset.names())
    except ValueError:  # the images have no names
        names = list(map(str, dataset.example_ids))
    by_id = dict(zip(dataset.example_ids.tolist(), names, strict=True))
    found = [by_id.pop(i) for i in ids.tolist()]
    return found, sorted([*by_id.values(), *dataset.unreadable])


def _columns(dataset: data.Dataset, outputs: Outputs) -> tuple[dict[str, Any], list[str]]:
    names, missing = _names(dataset, outputs.ids)
    columns = {"name": names, "id": outputs.ids, "label": outputs.labels}
    return columns, missing


def _class_names(dataset: data.Dataset, outputs: Outputs) -> list[str | None]:
    names = dataset.class_names
    return [names[i] if i >= 0 else None for i in outputs.labels]
