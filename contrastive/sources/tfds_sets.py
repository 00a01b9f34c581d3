# SPDX-License-Identifier: Apache-2.0
"""Data sets of TFDS: opened, prepared, and failures explained."""

import contextlib
import difflib
import errno
import os
import re
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import numpy as np
import requests
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import download_manager

from contrastive import storage
from contrastive.sources import arrays, decoding, facts, splits
from contrastive.sources.dataset import Dataset, Request
from contrastive.sources.records import Records

# Encoded images read and shuffled together where storage has no random access; a stream holds up to
# three such groups.
_GROUP_BYTES = 1 << 30
_SECONDS_BETWEEN_LINES = 30.0
# Packages whose name differs from that of the module.
_PACKAGES = {"bs4": "beautifulsoup4", "cv2": "opencv-python", "PIL": "pillow"}
_IMAGENET_ARCHIVE = re.compile(r"ILSVRC2012_img_\w+\.tar")
_NETWORK_ERRORS = (
    requests.exceptions.RequestException,
    urllib.error.URLError,
    tfds.download.DownloadError,
    ConnectionError,
    TimeoutError,
)
_STORAGE_ERRORS = (
    PermissionError,
    NotADirectoryError,
    FileExistsError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
)
_FULL_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MISSING_FILES = (AssertionError, FileNotFoundError, tf.errors.NotFoundError)


def owns(_: Request) -> bool:
    """Accepts any name: one that is nothing else is one of TFDS."""
    return True


def load(request: Request) -> Dataset:
    """Opens a split, in memory if it is small, and prepares it if need be.

    Raises:
        ValueError: if there is no such dataset, or its folder cannot be reached, or it cannot be
            prepared.
    """
    builder = _builder(request, request.data_dir)
    if not is_prepared(request.path) and not builder.is_prepared():
        _prepare(builder, request.path)
    info = builder.info
    count = _count(request, info)
    keys, fields = _describe(request, info)
    size, channels = fields["image_size"], fields["channels"]
    if facts.fits_in_memory(size, channels, count, request.memory_limit):
        images, labels = _read_all(builder, request.split, *keys, channels)
        names = fields["class_names"]
        return arrays.in_memory(request, images, labels, names)
    if info.file_format.value != "tfrecord":
        raise ValueError(
            "TFDS datasets must be stored as 'tfrecord'. Received: "
            f"{info.name!r} stored as {info.file_format.value!r}."
        )
    shards = info.splits[request.split].file_instructions
    all_bytes = sum(value.num_bytes for value in info.splits.values())
    shard_bytes = all_bytes / info.splits.total_num_examples
    shard_bytes *= count / len(shards)
    source = Records(
        tuple(shard.filename for shard in shards),
        np.array([shard.skip for shard in shards], np.int64),
        np.array([shard.take for shard in shards], np.int64),
        *keys,
        int(np.clip(_GROUP_BYTES / max(shard_bytes, 1), 1, len(shards))),
    )
    return Dataset.of(request, source=source, num_examples=count, **fields)


def outline(request: Request) -> Dataset:
    """Outlines a split, which need not be prepared."""
    data_dir = request.data_dir
    if not storage.is_reachable(data_dir or str(tfds.core.constants.DATA_DIR)):
        data_dir = os.devnull  # not where TFDS looks if there is none
    info = _builder(request, data_dir).info
    _, fields = _describe(request, info)
    count = _count(request, info) if info.splits else 0
    return arrays.outline(request, count, **fields)


def is_prepared(path: str) -> bool:
    """Tells if a path is a folder in which TFDS has prepared a dataset.

    Raises:
        ValueError: if the file system cannot be reached.
    """
    info = os.path.join(path, "dataset_info.json")
    return storage.is_folder(path) and storage.exists(info)


def _builder(request: Request, data_dir: str | None) -> Any:
    """Returns the builder of a dataset, or of a prepared folder."""
    name = request.path
    if is_prepared(name):
        return tfds.builder_from_directory(name)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        known.append(facts.PHOTO_PATCHES)
        close = difflib.get_close_matches(name.split("/")[0], known)
        raise ValueError(
            f"There is no dataset of this name. Received: name={name!r}. "
            f"Similar names: {close}. A folder of images needs a separator in "
            f"its name: {os.path.join('.', name)!r}."
        ) from error
    except ImportError as error:
        found = map(_missing_package, _causes(error))
        reason = next(filter(None, found), str(error))
        raise ValueError(f"TFDS cannot read {name!r}: {reason}") from error
    except (RuntimeError, tf.errors.OpError) as error:
        # TFDS makes a RuntimeError of what a file system raises.
        reason = " ".join(str(error).split())
        folder = data_dir or str(tfds.core.constants.DATA_DIR)
        raise ValueError(f"TFDS cannot open {name!r} in {folder!r}: {reason}.") from error


def _count(request: Request, info: Any) -> int:
    """Returns the number of examples of a split."""
    shards = {key: value.shard_lengths for key, value in info.splits.items()}
    parts = splits.ranges(request.split, shards, info.name)
    return sum(len(part) for _, part in parts)


def _describe(request: Request, info: Any) -> tuple[tuple[str, str], dict[str, Any]]:
    """Returns the keys of image and label, and some fields of `Dataset`."""
    image_key = _feature_key(info, tfds.features.Image, "image")
    if not image_key:
        raise ValueError(
            "A dataset needs a feature `image`, or one image feature. "
            f"Received: {info.name!r} with features {list(info.features)}."
        )
    label_key = _feature_key(info, tfds.features.ClassLabel, "label")
    height, width, depth = info.features[image_key].shape
    return (image_key, label_key), {
        "class_names": info.features[label_key].names if label_key else (),
        "channels": request.channels or depth or 3,
        "image_size": (height, width) if height and width else None,
    }


def _feature_key(info: Any, kind: type, default: str) -> str:
    """Returns the feature named `default`, or the only one of its kind."""
    keys = [k for k, value in info.features.items() if isinstance(value, kind)]
    if default in keys:
        return default
    return keys[0] if len(keys) == 1 else ""


def _read_all(
    builder: Any, split: str, image_key: str, label_key: str, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the images and labels of a split, in storage order."""
    keys = {image_key, label_key} - {""}
    decode = tfds.decode.make_decoder()(lambda x, _: decoding.decode(x, channels))
    features = builder.as_dataset(
        split,
        batch_size=-1,
        decoders=tfds.decode.PartialDecoding(keys, {image_key: decode()}),
        read_config=tfds.ReadConfig(interleave_cycle_length=1),
    )
    images = features[image_key].numpy()
    if not label_key:
        return images, np.full(len(images), -1)
    return images, features[label_key].numpy()


def _prepare(builder: Any, name: str) -> None:
    """Downloads and prepares a dataset; logs the progress."""
    started = time.monotonic()
    source = f"downloading to {_download_dir(builder)}"
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        source = f"reading archives in {_manual_dir(builder)}"
    target = builder.data_dir
    logging.info("Preparing %s: %s, then writing %s.", name, source, target)
    on_terminal = sys.stderr.isatty()
    tfds.display_progress_bar(on_terminal)
    lines = contextlib.nullcontext() if on_terminal else _lines(builder, name)
    try:
        # The builder does without the training archive and would leave a dataset without the split
        # "train", which then counts as prepared.
        missing = " and ".join(_absent_archives(builder))
        if builder.name == "imagenet2012" and missing:
            raise FileNotFoundError(f"Missing archives: {missing}")
        # TFDS prints there, and results of this program are written there.
        with lines, contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except Exception as error:  # of any library between here and the server
        raise ValueError(_explain(builder, name, error)) from error
    seconds = time.monotonic() - started
    logging.info("Prepared %s in %.0f s: %s.", name, seconds, builder.data_dir)


@contextlib.contextmanager
def _lines(builder: Any, name: str) -> Iterator[None]:
    """Logs regularly how much has been downloaded and written."""
    done, started = threading.Event(), time.monotonic()
    folders = _download_dir(builder), os.path.dirname(str(builder.data_dir))
    before = [_bytes_below(folder) for folder in folders]
    actions = "downloaded and extracted", "written"

    def report() -> None:
        while not done.wait(_SECONDS_BETWEEN_LINES):
            sizes = ""
            if not storage.is_remote(folders[0]):
                for parts in zip(folders, before, actions, strict=True):
                    size = max(_bytes_below(parts[0]) - parts[1], 0) / 1e6
                    sizes += f"{size:.0f} MB {parts[2]}, "
            seconds = time.monotonic() - started
            logging.info("Preparing %s: %s%.0f s so far.", name, sizes, seconds)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _bytes_below(folder: str) -> int:
    """Returns the size of all files below a local folder."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            # Files are moved and deleted meanwhile.
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def _download_dir(builder: Any) -> str:
    return os.path.join(str(builder.data_dir_root), "downloads")


def _manual_dir(builder: Any) -> str:
    return os.path.join(_download_dir(builder), "manual")


def _explain(builder: Any, name: str, error: BaseException) -> str:
    # The outermost error that is known decides: it says what was being done.
    reasons = (_reason(builder, name, cause) for cause in _causes(error))
    reason = next(filter(None, reasons), None)
    if reason is None:
        reason = f"{type(error).__name__}: {error}"
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            reason += f". Are the files in {_manual_dir(builder)!r} complete? "
            reason += "They were downloaded by hand."
    where = f"{name!r} is not prepared in {str(builder.data_dir)!r}"
    return " ".join(f"{where}, and preparing it failed: {reason}".split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _missing_package(error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    module = error.name.split(".")[0]
    package = _PACKAGES.get(module, module)
    return f"the Python package {package!r} is missing. Install it: `pip install {package}`."


def _reason(builder: Any, name: str, error: BaseException) -> str:
    """Returns what an error means, and what helps; "" if it is unknown."""
    root, text = str(builder.data_dir_root), f"{type(error).__name__}: {error}"
    if isinstance(error, download_manager.NonMatchingChecksumError):
        found = re.search(r"Artifact (\S+), downloaded to (.+), has", str(error))
        url, path = found.groups() if found else ("a download", "the download")
        return (
            f"the checksum of {url} is not the expected one; the file was "
            f"changed or cut short. Delete {path} and start again. ({error})"
        )
    if isinstance(error, _NETWORK_ERRORS):
        return (
            f"the download of {_url(builder, error)} failed: {text}. Run "
            f"`tfds build {name}` on a machine with network and copy the "
            f"folder {builder.name!r} to {root!r}, or name the folder that has "
            "it as --data_dir."
        )
    is_full = isinstance(error, OSError) and (
        error.errno in _FULL_STORAGE or str(error).startswith("Not enough disk space")
    )
    if is_full or isinstance(error, _STORAGE_ERRORS):
        path = str(getattr(error, "filename", None) or "")
        if path.startswith(_manual_dir(builder)):
            return f"{path!r} cannot be read: {text}."
        return (
            f"files cannot be written below {root!r}: {text}. Make room or "
            "give write permission there, or name another folder as --data_dir."
        )
    return _missing_package(error) or _missing_archives(builder, error)


def _url(builder: Any, error: BaseException) -> str:
    """Returns the URL that failed; where errors name none, all of them."""
    for cause in _causes(error):
        request = getattr(cause, "request", None)
        if getattr(request, "url", None):
            return str(request.url)  # type: ignore[union-attr]
        if found := re.search(r"(https?|ftp)://[^\s'\",)]+", str(cause)):
            return found.group().rstrip(".:;")
    return " or ".join(builder.url_infos or ()) or "a file"


def _failed_storage(builder: Any, error: BaseException) -> str:
    is_full = isinstance(error, OSError) and (
        error.errno in _FULL_STORAGE or str(error).startswith("Not enough disk space")
    )
    if not is_full and not isinstance(error, _STORAGE_ERRORS):
        return ""
    path = str(getattr(error, "filename", None) or "")
    if path.startswith(_manual_dir(builder)):
        return f"{path!r} cannot be read: {type(error).__name__}: {error}."
    return (
        f"files cannot be written below {str(builder.data_dir_root)!r}: "
        f"{type(error).__name__}: {error}. Make room or give write permission "
        "there, or name another folder as --data_dir."
    )


def _archives(builder: Any) -> list[str]:
    """Returns the archives of ImageNet that the builder's text names."""
    text = builder.MANUAL_DOWNLOAD_INSTRUCTIONS or ""
    return _IMAGENET_ARCHIVE.findall(text)


def _absent_archives(builder: Any) -> list[str]:
    """Returns those of `_archives` that are not in the manual folder."""
    folder, exists = _manual_dir(builder), tf.io.gfile.exists
    names = _archives(builder)
    return [n for n in names if not exists(os.path.join(folder, n))]


def _missing_archives(builder: Any, error: BaseException) -> str:
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not instructions or not isinstance(error, _MISSING_FILES):
        return ""
    archives = " and ".join(_archives(builder))
    if archives and not _absent_archives(builder):
        return ""
    files = f"{archives}, as they are," if archives else "its files"
    optional = "ILSVRC2012_img_test.tar, whose labels are hidden, is optional."
    if builder.name != "imagenet2012":
        optional = ""
    # TFDS's own message may quote the instructions, too.
    detail = "" if "instructions" in str(error) else f"({error})"
    return (
        f"{files} must be downloaded by hand and put into "
        f"{_manual_dir(builder)!r}. {optional} TFDS says: {instructions} "
        f"{detail}"
    )
