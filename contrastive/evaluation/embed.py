# SPDX-License-Identifier: Apache-2.0
"""Embeddings and predictions for images of one's own, as files."""

import csv
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
import tensorflow as tf

import data
from contrastive.evaluation.features import Outputs, write_npz
from contrastive.sources import labelled

EMBEDDING_FORMATS = (".npz", ".parquet")
PREDICTION_FORMATS = (".csv", ".npz")


def check_output(path: str, formats: Sequence[str]) -> None:
    """Raises ValueError unless `path` can be written in one of the formats."""
    extension = os.path.splitext(path)[1]
    if extension not in formats:
        raise ValueError(
            f"The file to write must end in {' or '.join(formats)}. "
            f"Received: {path!r}."
        )
    if extension == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise ValueError(
            "Parquet files need pyarrow: pip install -r requirements.txt"
        )
    tf.io.gfile.makedirs(os.path.dirname(path) or ".")


def write_embeddings(path: str, dataset: data.Dataset, outputs: Outputs) -> int:
    """Writes an embedding for each image that could be read, in their order.

    Both formats hold `name` (of the file in its folder, or the example's id),
    `id`, `label` (-1: none), and `embedding`, float32. An .npz also has
    `class_names` and `unreadable`, the names of what is missing; Parquet has
    instead a column `class`.

    Args:
        path: in one of `EMBEDDING_FORMATS`.
        dataset: the images.
        outputs: of an encoder, for them.

    Returns:
        The number of images without an embedding.
    """
    names, missing = _names(dataset, outputs.ids)
    columns: dict[str, Any] = {
        "name": names,
        "id": outputs.ids,
        "label": outputs.labels,
    }
    if path.endswith(".npz"):
        columns |= {
            "embedding": outputs.values,
            "class_names": np.array(dataset.class_names, str),
            "unreadable": np.array(missing, str),
        }
        write_npz(path, columns)
    else:
        columns["class"] = _class_names(dataset.class_names, outputs.labels)
        _write_parquet(path, columns, outputs.values)
    return len(missing)


def write_predictions(
    path: str | None,
    dataset: data.Dataset,
    outputs: Outputs,
    class_names: Sequence[str],
    top_k: int,
) -> int:
    """Writes the most probable classes of each image, in their order.

    A CSV file has the columns `name`, `label` (where images have any),
    `class_1`, `probability_1`, `class_2`, ...; an .npz the arrays `name`, `id`,
    `label`, `class` and `probability` `[N, k]`, `class_names`, `unreadable`.
    Labels are the images' own: their names are not the classifier's but, in an
    .npz, `label_names`.

    Args:
        path: in one of `PREDICTION_FORMATS`; None: CSV to standard output.
        dataset: the images.
        outputs: probabilities of each class.
        class_names: of the classifier.
        top_k: classes an image, at most all.

    Returns:
        The number of images without a prediction.
    """
    names, missing = _names(dataset, outputs.ids)
    best = np.argsort(-outputs.values, axis=1, kind="stable")[:, :top_k]
    probabilities = np.take_along_axis(outputs.values, best, axis=1)
    if path and path.endswith(".npz"):
        columns = {
            "name": names,
            "id": outputs.ids,
            "label": outputs.labels,
            "class": best,
            "probability": probabilities,
            "class_names": np.array(class_names, str),
            "label_names": np.array(dataset.class_names, str),
            "unreadable": np.array(missing, str),
        }
        write_npz(path, columns)
        return len(missing)
    labels = _class_names(dataset.class_names, outputs.labels)
    header = ["name", *(["label"] if dataset.class_names else [])]
    for rank in range(1, best.shape[1] + 1):
        header += [f"class_{rank}", f"probability_{rank}"]

    def write(file: TextIO) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row, name in enumerate(names):
            cells = [name, *([labels[row]] if dataset.class_names else [])]
            for label, share in zip(best[row], probabilities[row], strict=True):
                cells += [class_names[label], f"{share:.6f}"]
            writer.writerow(cells)

    if path:
        with tf.io.gfile.GFile(path, "w") as file:
            write(file)
    else:
        write(sys.stdout)
    return len(missing)


def _names(
    dataset: data.Dataset, ids: np.ndarray
) -> tuple[list[str], list[str]]:
    """Returns the names of these examples, and of those that are not there."""
    try:
        names = list(labelled.names_of(dataset))
    except ValueError:  # there are none
        names = [str(i) for i in dataset.example_ids]
    by_id = dict(zip(dataset.example_ids.tolist(), names, strict=True))
    found = [by_id.pop(i) for i in ids.tolist()]
    return found, sorted([*by_id.values(), *dataset.unreadable])


def _class_names(
    class_names: Sequence[str], labels: np.ndarray
) -> list[str | None]:
    return [class_names[i] if i >= 0 else None for i in labels]


def _write_parquet(
    path: str, columns: dict[str, Any], embeddings: np.ndarray
) -> None:
    import pyarrow
    import pyarrow.parquet

    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(embeddings.reshape(-1)), embeddings.shape[1]
    )
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), content)
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(content.getvalue())
