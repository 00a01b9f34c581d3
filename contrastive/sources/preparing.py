# SPDX-License-Identifier: Apache-2.0
"""Preparation of TFDS datasets: progress lines, and failures explained."""

import contextlib
import errno
import os
import re
import sys
import threading
import time
import urllib.error
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import requests
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.download import download_manager

from contrastive import storage

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


def prepare(builder: Any, name: str) -> None:
    """Downloads and prepares a TFDS dataset, and logs the progress.

    Args:
        builder: a `tfds.core.DatasetBuilder` that is not prepared.
        name: name of the dataset, as it is given to `tfds build`.

    Raises:
        ValueError: if it fails; the message says what the user can do.
    """
    started = time.monotonic()
    is_manual = bool(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    logging.info(
        "Preparing %s: %s %s, then writing %s.",
        name,
        "reading archives in" if is_manual else "downloading to",
        _manual_dir(builder) if is_manual else _download_dir(builder),
        builder.data_dir,
    )
    on_terminal = sys.stderr.isatty()
    tfds.display_progress_bar(on_terminal)
    lines = contextlib.nullcontext() if on_terminal else _lines(builder, name)
    try:
        _require_imagenet(builder)
        # TFDS prints there, and results of this program are written there.
        with lines, contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except Exception as error:  # of any library between here and the server
        raise ValueError(_explain(builder, name, error)) from error
    logging.info(
        "Prepared %s in %.0f s: %s.",
        name,
        time.monotonic() - started,
        builder.data_dir,
    )


@contextlib.contextmanager
def _lines(builder: Any, name: str) -> Iterator[None]:
    """Logs regularly how much has been downloaded and written."""
    done, started = threading.Event(), time.monotonic()
    folders = _download_dir(builder), os.path.dirname(str(builder.data_dir))
    before = [_bytes_below(folder) for folder in folders]

    def report() -> None:
        while not done.wait(_SECONDS_BETWEEN_LINES):
            downloaded, written = (
                max(_bytes_below(folder) - size, 0) / 1e6
                for folder, size in zip(folders, before, strict=True)
            )
            sizes = (
                f"{downloaded:.0f} MB downloaded and extracted, "
                f"{written:.0f} MB written, "
            )
            logging.info(
                "Preparing %s: %s%.0f s so far.",
                name,
                "" if storage.is_remote(folders[0]) else sizes,
                time.monotonic() - started,
            )

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


def _require_imagenet(builder: Any) -> None:
    """Raises FileNotFoundError if one of ImageNet's archives is missing.

    The builder itself does without the training archive and would leave a
    dataset without the split "train", which then counts as prepared.
    """
    if builder.name != "imagenet2012":
        return
    missing = _absent_archives(builder)
    if missing:
        raise FileNotFoundError(f"Missing archives: {' and '.join(missing)}")


def explain_import(error: ImportError) -> str:
    """Returns why a builder cannot be imported, and what helps."""
    found = map(_missing_package, _causes(error))
    return next(filter(None, found), str(error))


def _explain(builder: Any, name: str, error: BaseException) -> str:
    """Returns one paragraph: why the preparation failed, and what helps."""
    causes = list(_causes(error))
    # The outermost error that is known decides: it says what was being done.
    known = (
        _explain_known(builder, name, causes[i:]) for i in range(len(causes))
    )
    reason = next(filter(None, known), "") or _other_failure(builder, error)
    paragraph = (
        f"{name!r} is not prepared in {str(builder.data_dir)!r}, and preparing "
        f"it failed: {reason}"
    )
    return " ".join(paragraph.split())


def _explain_known(
    builder: Any, name: str, causes: Sequence[BaseException]
) -> str:
    """Returns what the first error means; "" if it is none of those known."""
    error = causes[0]
    return (
        _missing_package(error)
        or _wrong_checksum(error)
        or _failed_download(builder, name, causes)
        or _failed_storage(builder, error)
        or _missing_archives(builder, error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _missing_package(error: BaseException) -> str:
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    module = error.name.split(".")[0]
    package = _PACKAGES.get(module, module)
    return (
        f"the Python package {package!r} is missing. Install it: "
        f"`pip install {package}`."
    )


def _wrong_checksum(error: BaseException) -> str:
    if not isinstance(error, download_manager.NonMatchingChecksumError):
        return ""
    found = re.search(r"Artifact (\S+), downloaded to (.+), has", str(error))
    url, path = found.groups() if found else ("a download", "the download")
    return (
        f"the checksum of {url} is not the expected one; the file was changed "
        f"or cut short. Delete {path} and start again. ({error})"
    )


def _failed_download(
    builder: Any, name: str, causes: Sequence[BaseException]
) -> str:
    error = causes[0]
    if not isinstance(error, _NETWORK_ERRORS):
        return ""
    root = str(builder.data_dir_root)
    return (
        f"the download of {_url(builder, causes)} failed: "
        f"{type(error).__name__}: {error}. Run `tfds build {name}` on a "
        f"machine with network and copy the folder {builder.name!r} to "
        f"{root!r}, or name the folder that has it as --data_dir."
    )


def _url(builder: Any, causes: Iterable[BaseException]) -> str:
    """Returns the URL that failed; where errors name none, all of them."""
    for cause in causes:
        request = getattr(cause, "request", None)
        if getattr(request, "url", None):
            return str(request.url)  # type: ignore[union-attr]
        if found := re.search(r"(https?|ftp)://[^\s'\",)]+", str(cause)):
            return found.group().rstrip(".:;")
    return " or ".join(builder.url_infos or ()) or "a file"


def _failed_storage(builder: Any, error: BaseException) -> str:
    is_full = isinstance(error, OSError) and (
        error.errno in _FULL_STORAGE
        or str(error).startswith("Not enough disk space")
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
    return _IMAGENET_ARCHIVE.findall(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)


def _absent_archives(builder: Any) -> list[str]:
    """Returns those of `_archives` that are not in the manual folder."""
    folder = _manual_dir(builder)
    return [
        name
        for name in _archives(builder)
        if not tf.io.gfile.exists(os.path.join(folder, name))
    ]


def _missing_archives(builder: Any, error: BaseException) -> str:
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not instructions or not isinstance(error, _MISSING_FILES):
        return ""
    if _archives(builder) and not _absent_archives(builder):
        return ""
    archives = " and ".join(_archives(builder))
    files = f"{archives}, as they are," if archives else "its files"
    optional = ""
    if builder.name == "imagenet2012":
        optional = (
            "ILSVRC2012_img_test.tar, whose labels are not public, is optional."
        )
    # TFDS's own message may quote the instructions, too.
    detail = "" if "instructions" in str(error) else f"({error})"
    return (
        f"{files} must be downloaded by hand and put into "
        f"{_manual_dir(builder)!r}. {optional} TFDS says: {instructions} "
        f"{detail}"
    )


def _other_failure(builder: Any, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {error}"
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        return reason
    return (
        f"{reason}. Are the files in {_manual_dir(builder)!r} complete? They "
        "were downloaded by hand."
    )
