# SPDX-License-Identifier: Apache-2.0
"""--mode=export: writes a checkpoint's networks for other programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from etils import epy

from contrastive import run_record
from contrastive.commands.base import Command
from contrastive.commands.probe import check_checkpoint
from contrastive.config import schema
from contrastive.config.completion import IMAGENET_SIZE, LARGEST_SMALL_IMAGE
from contrastive.config.resolve import Resolved

with epy.lazy_imports():
    import numpy as np
    import tensorflow as tf

    from contrastive.sources import photo_patches
    from contrastive.weights import export, formats, loading


def prepare(resolved: Resolved) -> Callable[[], None]:
    """Prepares the export; returns the work."""
    check_checkpoint(resolved)
    formats.check_formats(resolved["format"])
    # Other runtimes compute in float32; a GPU would not, here.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    path, target = resolved["checkpoint"], resolved["evaluate_target"]
    networks = loading.load_networks(path, target=target)
    architecture = networks.architecture
    size = resolved.known("image_size")
    if size is None:
        is_small = architecture.stem == "cifar"
        size = LARGEST_SMALL_IMAGE if is_small else IMAGENET_SIZE
    directory = resolved["export_dir"] or os.path.join(run_record.run_directory(path), "export")
    run = run_record.read_run(path) or {}
    flags = run.get("flags", {})
    about = {
        "checkpoint": path,
        "target": target,
        **{name: flags.get(name) for name in ("objective", "train_mode")},
        "commit": run.get("commit"),
    }
    images = _images(size, architecture.channels)

    def work() -> None:
        results = export.write(networks, directory, resolved["format"], images, about)["formats"]
        sys.stdout.write(export.table(results) + "\n")
        refused = [name for name in results if "refused" in results[name]]
        if refused:
            raise formats.CannotExport(f"not written: {', '.join(refused)}.")

    return work


def _images(size: int, channels: int) -> np.ndarray:
    """Returns float32 `[n, size, size, channels]`, in [0, 1], to check with."""
    pictures = [p.resize((size, size)) for p in photo_patches.pictures()]
    images = np.stack([np.asarray(p, np.float32) / 255 for p in pictures])
    return images[..., np.arange(channels) % images.shape[-1]]


EXPORT = Command(
    help="Write the networks of --checkpoint in formats of other programs.",
    groups=(schema.Mode, schema.Start, schema.ImageSize, schema.Export),
    prepare=prepare,
)
