# SPDX-License-Identifier: Apache-2.0
"""Files and folders on this machine or in a bucket (gs://...).

Local paths use Python's own functions, which are faster than TensorFlow's. Paths with a scheme use
`tf.io.gfile`; the first of them imports TensorFlow.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from etils import epy
from google.protobuf import text_encoding

with epy.lazy_imports():
    import tensorflow as tf

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# A request to a bucket takes tens of milliseconds, almost all of it waiting.
_REMOTE_THREADS = 64
# A line of TensorFlow's `checkpoint` file, a protocol buffer in text format.
_NEWEST_CHECKPOINT = re.compile(r'^\s*model_checkpoint_path:\s*"((?:[^"\\]|\\.)*)"', re.MULTILINE)


def is_remote(path: str) -> bool:
    """Returns whether a path names a file system other than the local one."""
    return "://" in path


def full_path(path: str) -> str:
    """Returns the absolute path; a path with a scheme is one already."""
    return path if is_remote(path) else os.path.abspath(path)


def pool(path: str) -> concurrent.futures.ThreadPoolExecutor:
    """Returns a pool of threads that is suited to reading files of a folder."""
    return concurrent.futures.ThreadPoolExecutor(_REMOTE_THREADS if is_remote(path) else None)


def exists(path: str) -> bool:
    """Returns whether a file or folder exists.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    if not is_remote(path):
        return os.path.exists(path)
    return _remote_stat(path) is not None


def is_folder(path: str) -> bool:
    """Returns whether a folder exists; raises as `exists`."""
    if not is_remote(path):
        return os.path.isdir(path)
    found = _remote_stat(path)
    return found is not None and found.is_directory


def is_reachable(path: str) -> bool:
    """Returns whether a file or folder exists and its file system answers."""
    with contextlib.suppress(ValueError):
        return exists(path)
    return False


def why_unreachable(path: str) -> str | None:
    """Returns why a file system does not answer for a path; None if it does."""
    try:
        exists(path)
    except ValueError as error:
        return str(error)
    return None


def _remote_stat(path: str) -> Any:
    """Returns the statistics of a remote path; None if it does not exist."""
    try:
        return tf.io.gfile.stat(path)
    except tf.errors.NotFoundError:
        return None
    except tf.errors.OpError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: str, error: tf.errors.OpError) -> ValueError:
    reason = " ".join(error.message.split()) or type(error).__name__
    return ValueError(f"{path!r} cannot be read: {reason}.")


def open_binary(path: str) -> BinaryIO:
    """Opens a file for reading; of a remote one, only parts are fetched."""
    return tf.io.gfile.GFile(path, "rb") if is_remote(path) else open(path, "rb")


def make_folder(path: str) -> None:
    """Makes a folder, and those above it, unless they exist."""
    if is_remote(path):
        tf.io.gfile.makedirs(path)
    else:
        os.makedirs(path, exist_ok=True)


def write_whole(path: str, content: str | bytes) -> None:
    """Writes a file, whole or not at all, and makes the folder it is in.

    The content goes to a temporary file of a unique name in the same folder, which then replaces
    `path`. Readers never find a part of it, and several processes may write the same path. Text is
    written as UTF-8.

    Raises:
        OSError: if the local file system refuses.
        tf.errors.OpError: if a remote one does.
    """
    if isinstance(content, str):
        content = content.encode()
    unfinished = f"{path}.{uuid.uuid4().hex}.tmp"
    make_folder(os.path.dirname(path) or os.curdir)
    if is_remote(path):
        with tf.io.gfile.GFile(unfinished, "wb") as file:
            file.write(content)
        tf.io.gfile.rename(unfinished, path, overwrite=True)
        return
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all; see `write_whole`."""
    write_whole(path, json.dumps(content, indent=2))


def latest_checkpoint(directory: str) -> str | None:
    """Returns the prefix (path without ".index") of the newest checkpoint.

    Equal to `tf.train.latest_checkpoint`, but a local directory is read without TensorFlow. None if
    the directory has no file `checkpoint`, or not the checkpoint that this file names.
    """
    if is_remote(directory):
        return tf.train.latest_checkpoint(directory)
    try:
        state = os.path.join(directory, "checkpoint")
        with open(state, encoding="utf-8") as file:
            found = _NEWEST_CHECKPOINT.search(file.read())
    except (OSError, UnicodeDecodeError):
        return None
    if not found:
        return None
    path = os.path.join(directory, text_encoding.CUnescape(found[1]).decode())
    is_there = os.path.exists(f"{path}.index") or os.path.exists(path)
    return path if is_there else None


def file_names(root: str) -> Iterator[str]:
    """Yields the paths of all files below a folder, relative to it.

    Hidden files and folders are left out; local symbolic links are followed.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    walk = _walk_remote if is_remote(root) else _walk_local
    for folder, names in walk(root):
        for name in names:
            if not name.startswith("."):
                yield os.path.join(folder, name)


def _walk_local(root: str) -> Iterator[tuple[str, Iterable[str]]]:
    """Yields each folder, relative to `root`, and the names of its files."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        relative = os.path.relpath(folder, root)
        yield "" if relative == os.curdir else relative, names


def _walk_remote(root: str) -> Iterator[tuple[str, Iterable[str]]]:
    """Yields what `_walk_local` does, with one request per folder.

    `tf.io.gfile.walk` makes one per file, one after the other; here, all folders of a level are
    requested at once.
    """

    def listing(folder: str) -> tuple[str, list[str], list[str]]:
        path = os.path.join(root, folder) if folder else root
        try:
            found = tf.io.gfile.listdir(path)
        except tf.errors.NotFoundError:
            found = []
        except tf.errors.OpError as error:
            raise _unreachable(path, error) from error
        folders = [name for name in found if is_subfolder(path, name)]
        below = [
            os.path.join(folder, name.rstrip("/"))
            for name in folders
            if name.strip("/") and name[0] != "."
        ]
        return folder, sorted({*found} - {*folders, ""}), below

    def is_subfolder(path: str, name: str) -> bool:
        # Google's buckets mark subfolders so; other systems have to be asked.
        if name.endswith("/") or root.startswith("gs://"):
            return name.endswith("/")
        is_image = name.lower().endswith(IMAGE_EXTENSIONS)
        return not is_image and tf.io.gfile.isdir(os.path.join(path, name))

    level = [""]
    with pool(root) as threads:
        while level:
            listings, level = threads.map(listing, level), []
            for folder, names, below in listings:
                yield folder, names
                level += below
