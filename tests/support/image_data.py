# SPDX-License-Identifier: Apache-2.0
"""Folders of images and TFDS datasets that tests write."""

import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def _picture(value, size=(12, 10), mode="RGB"):
    """Returns a picture of one colour, `value` in the first channel."""
    depth = len(Image.new(mode, (1, 1)).getbands())
    colour = (value, *(255 - value,) * (depth - 1))
    return Image.new(mode, size, colour if depth > 1 else value)


def write_pictures(root, names, **picture):
    """Writes a picture a name; the i-th has the value i."""
    for value, name in enumerate(names):
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture(value, **picture).save(path)
    return str(root)


def write_records(root, num_examples, static, per_shard, hidden=()):
    """Writes a TFDS dataset of PNGs, label = id // 8, in several shards.

    Examples whose numbers are `hidden` have the label -1.
    """
    shape = (12, 12, 3) if static else (None, None, 3)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="shards",
            version=tfds.core.Version("1.0.0"),
            data_dir=str(root),
            module_name="",
        ),
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
            }
        ),
    )
    os.makedirs(root, exist_ok=True)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=per_shard)
    writer.initialize_splits(["train"])
    examples = [
        {
            "image": np.asarray(_picture(i, (12, 12))),
            "label": -1 if i in hidden else i // 8,
        }
        for i in range(num_examples)
    ]
    writer.add_examples({"train": examples})
    writer.close_all()
    return str(root)
