# SPDX-License-Identifier: Apache-2.0
"""The record of a run: `run.json` in its directory.

It holds the flags in force, the architecture and the versions of libraries. Local records are read
and written without TensorFlow.
"""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epy

from contrastive import storage

with epy.lazy_imports():
    import tensorflow as tf

RUN_FILE = "run.json"


def write_run(directory: str, run: dict[str, Any]) -> None:
    """Writes the record of a run and creates its directory if necessary."""
    content = json.dumps(run, indent=2, sort_keys=True)
    storage.write_whole(os.path.join(directory, RUN_FILE), content)


def run_directory(path: str) -> str:
    """Returns `path` if it is a directory, or else the one that contains it."""
    is_folder = _file_system(path).isdir(path)
    return path if is_folder else os.path.dirname(path) or "."


def read_run(path: str) -> dict[str, Any] | None:
    """Reads the record of a run.

    Args:
        path: a run directory, a checkpoint prefix in one, or the directory of an exported
            SavedModel, whose record holds the architecture alone.

    Returns:
        The content of `run.json`. None if there is none, and if `path` is a
        file: a run may lie beside the published weights that it started from.

    Raises:
        OSError: if a local file cannot be read.
        tf.errors.OpError: if another file system cannot be reached.
    """
    if is_file(path):
        return None
    record = os.path.join(run_directory(path), RUN_FILE)
    if not _file_system(record).exists(record):
        return None
    with storage.open_binary(record) as file:
        return json.load(file)


def is_file(path: str) -> bool:
    """Returns whether a path exists and is no directory."""
    files = _file_system(path)
    return files.exists(path) and not files.isdir(path)


# `storage.exists` would hide the class of TensorFlow's errors, which determines the exit code.
def _file_system(path: str) -> Any:
    return tf.io.gfile if storage.is_remote(path) else os.path
