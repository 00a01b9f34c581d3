# SPDX-License-Identifier: Apache-2.0
"""Facts about data sets that are known without TensorFlow and TFDS.

Importing them takes seconds, which a dry run should not.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

from contrastive.sources import splits

PHOTO_PATCHES = "photo_patches"
PATCHES = {"train": 10_000, "test": 2_000}  # patches in each split
PATCH_SIZE = 32  # pixels
PATCH_CLASSES = 16

# Images of one size that need no more bytes are held in memory.
MEMORY_LIMIT = 4 << 30
# At most this side, in pixels, is shipped whole to the device; beyond it, two 224-pixel crops are
# the smaller parcel.
WHOLE_IMAGE_SIDE = 128
# What a dataset is taken for as far as it is not known.
IMAGENET_EXAMPLES, IMAGENET_CLASSES = 1_281_167, 1000
NOT_HERE = "not here: what is not known of it is taken from ImageNet"

# The version that TFDS 4.9.10 reads, number of classes, and image size, or None where sizes vary;
# all have three channels.
_TFDS = {
    "caltech101": ("3.0.2", 102, None),
    "cifar10": ("3.0.2", 10, (32, 32)),
    "cifar100": ("3.0.2", 100, (32, 32)),
    "food101": ("2.0.0", 101, None),
    "imagenet2012": ("5.1.0", 1000, None),
    "imagenet2012_subset/1pct": ("5.0.0", 1000, None),
    "imagenet2012_subset/10pct": ("5.0.0", 1000, None),
    "oxford_flowers102": ("2.1.1", 102, None),
    "oxford_iiit_pet": ("4.0.0", 37, None),
    "stl10": ("1.0.0", 10, (96, 96)),
    "svhn_cropped": ("3.1.0", 10, (32, 32)),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a split; the attributes are those of `Dataset`."""

    name: str
    split: str
    num_examples: int
    num_classes: int
    channels: int
    image_size: tuple[int, int] | None
    is_encoded: bool
    notes: tuple[str, ...] = ()


def known_facts(
    name: str,
    split: str,
    data_dir: str | None = None,
    channels: int | None = None,
) -> Facts | None:
    """Finds the facts that `data.outline`, with these arguments, would find.

    Known are photo patches, TFDS data sets that are prepared on this machine, and a few others of
    TFDS. None means that only `data.outline` can tell, or raises an error.
    """
    try:
        found = _find(name, split, data_dir, channels)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found is None:
        return None
    count, num_classes, channels, size = found
    is_encoded = not fits_in_memory(size, channels, count)
    notes = () if count else (NOT_HERE,)
    count = count or IMAGENET_EXAMPLES
    return Facts(name, split, count, num_classes, channels, size, is_encoded, notes)


def _find(
    name: str, split: str, data_dir: str | None, channels: int | None
) -> tuple[int, int, int, tuple[int, int] | None] | None:
    """Returns numbers of examples (0: unknown), classes, channels; the size."""
    if name == PHOTO_PATCHES and channels in (None, 3):
        count = len(splits.select(split, PATCHES, name))
        return count, PATCH_CLASSES, 3, (PATCH_SIZE, PATCH_SIZE)
    if folder := _prepared_folder(name, data_dir):
        return _prepared(folder, name, split, channels)
    if name not in _TFDS or os.path.isdir(name):
        return None
    _, num_classes, image_size = _TFDS[name]
    return 0, num_classes, channels or 3, image_size


def fits_in_memory(
    size: tuple[int, int] | None,
    channels: int,
    count: int,
    memory_limit: int = MEMORY_LIMIT,
) -> bool:
    """Tells if `count` images are small, and of one size (not None).

    The limit is in bytes.
    """
    return (
        size is not None
        and max(size) <= WHOLE_IMAGE_SIDE
        and count * math.prod(size) * channels <= memory_limit
    )


def _prepared_folder(name: str, data_dir: str | None) -> pathlib.Path | None:
    """Returns the local folder in which TFDS has prepared a dataset."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR")
    root = root or os.path.expanduser("~/tensorflow_datasets")
    path = pathlib.Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path if (path / "dataset_info.json").exists() else None
    if "://" in root:
        raise ValueError(f"{root!r} is not on this machine.")
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:[\d.]+)?", name):
        return None
    dataset, _, version = name.partition(":")
    version = version or _TFDS.get(dataset, ("*",))[0]
    found = pathlib.Path(root, dataset).glob(f"{version}/dataset_info.json")
    folders = [path.parent for path in found]
    return folders[0] if len(folders) == 1 else None


def _prepared(
    folder: pathlib.Path, name: str, split: str, channels: int | None
) -> tuple[int, int, int, tuple[int, int] | None] | None:
    """Reads the two files that TFDS writes beside the examples."""
    info = json.loads((folder / "dataset_info.json").read_text())
    content = json.loads((folder / "features.json").read_text())
    features = content["featuresDict"]["features"]
    image = _feature(features, "Image", "image")
    if image is None:
        return None
    label = _feature(features, "ClassLabel", "label")
    shape = map(int, image["image"]["shape"]["dimensions"])
    height, width, depth = (n if n > 0 else None for n in shape)
    image_size = (height, width) if height and width else None
    shards = {part["name"]: list(map(int, part.get("shardLengths", ()))) for part in info["splits"]}
    count = sum(len(part) for _, part in splits.ranges(split, shards, name))
    num_classes = int(label["classLabel"]["numClasses"]) if label else 0
    return count, num_classes, channels or depth or 3, image_size


def _feature(features: dict[str, Any], kind: str, default: str) -> Any:
    """Returns the feature named `default`, or the only one of its kind."""
    found = {
        key: feature
        for key, feature in features.items()
        if feature["pythonClassName"].endswith(kind)
    }
    only = next(iter(found.values())) if len(found) == 1 else None
    return found.get(default, only)
