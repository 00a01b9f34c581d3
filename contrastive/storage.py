# SPDX-License-Identifier: Apache-2.0
"""Reading of files and folders on this machine or in a bucket (gs://...).

Local paths go through Python's own functions, which are faster than
TensorFlow's; paths with a scheme go through `tf.io.gfile`.
"""

import concurrent.futures
import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import tensorflow as tf

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# A request to a bucket takes tens of milliseconds, almost all of it waiting.
_REMOTE_THREADS = 64


def is_remote(path: str) -> bool:
    """Returns whether a path names a file system other than the local one."""
    return "://" in path


def full_path(path: str) -> str:
    """Returns the absolute path; a path with a scheme is one already."""
    return path if is_remote(path) else os.path.abspath(path)


def pool(path: str) -> concurrent.futures.ThreadPoolExecutor:
    """Returns a pool of threads that is suited to reading files of a folder."""
    return concurrent.futures.ThreadPoolExecutor(
        _REMOTE_THREADS if is_remote(path) else None
    )


def exists(path: str) -> bool:
    """Returns whether a file or folder exists.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    if not is_remote(path):
        return os.path.exists(path)
    return _remote_stat(path) is not None


def is_folder(path: str) -> bool:
    """Returns whether a folder exists.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    if not is_remote(path):
        return os.path.isdir(path)
    found = _remote_stat(path)
    return found is not None and found.is_directory


def is_reachable(path: str) -> bool:
    """Returns whether a file or folder exists and its file system answers."""
    try:
        return exists(path)
    except ValueError:
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
    if is_remote(path):
        return tf.io.gfile.GFile(path, "rb")
    return open(path, "rb")


def file_names(root: str) -> Iterator[str]:
    """Yields the paths of all files below a folder, relative to it.

    Hidden files and folders are left out; local symbolic links are followed.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    walk = _walk_remote(root) if is_remote(root) else _walk_local(root)
    for folder, names in walk:
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
    """Yields what `_walk_local` yields.

    `tf.io.gfile.walk` makes a request for each file, one after the other.
    This makes one for each folder, all folders of a level at once.
    """

    def listing(folder: str) -> tuple[list[str], list[str]]:
        path = os.path.join(root, folder) if folder else root
        try:
            found = tf.io.gfile.listdir(path)
        except tf.errors.NotFoundError:
            found = []
        except tf.errors.OpError as error:
            raise _unreachable(path, error) from error
        subfolders = [name for name in found if is_subfolder(path, name)]
        files = sorted({*found} - {*subfolders, ""})
        return [name.rstrip("/") for name in subfolders], files

    def is_subfolder(path: str, name: str) -> bool:
        # Google's buckets mark subfolders so; other systems have to be asked.
        if name.endswith("/") or root.startswith("gs://"):
            return name.endswith("/")
        _, extension = os.path.splitext(name)
        is_image = extension.lower() in IMAGE_EXTENSIONS
        return not is_image and tf.io.gfile.isdir(os.path.join(path, name))

    level = [""]
    with pool(root) as threads:
        while level:
            below = []
            listings = threads.map(listing, level)
            for folder, (subfolders, names) in zip(
                level, listings, strict=True
            ):
                yield folder, names
                below += [
                    os.path.join(folder, name)
                    for name in subfolders
                    if name and name[0] != "."
                ]
            level = below
