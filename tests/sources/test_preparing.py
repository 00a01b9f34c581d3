# SPDX-License-Identifier: Apache-2.0
"""TFDS's own builders prepare datasets; only the downloads are fabricated."""

import contextlib
import errno
import hashlib
import io
import json
import os
import sys
import tarfile
import time

import numpy as np
import pytest
import requests
import scipy.io
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import units
from tensorflow_datasets.core.download import checksums, downloader

import data
from contrastive.sources import tfds_sets
from contrastive.training import loop
from tests.support import program

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_SMALL = [
    "--resnet_depth=10",
    "--width_multiplier=0.125",
    "--train_batch_size=8",
    "--train_steps=2",
    "--image_size=32",
    "--eval_batch_size=8",
]


def _tar(files, mode="w"):
    """Returns a tar archive of contents by name."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def _image(number, mode="RGB", file_format="JPEG"):
    """Returns an encoded image of noise."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 256, (40, 36, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, file_format)
    return file.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """Returns a function that sets the contents of URLs of a TFDS dataset.

    The place of the network alone is taken: files are written, checked and extracted by TFDS.
    `checked` says whether the checksums are those of the contents.
    """
    contents = {}

    class Response:
        def __init__(self, url):
            self.url = url
            self.headers = {"Content-length": str(len(contents[url]))}

    @contextlib.contextmanager
    def open_url(url, **_):
        yield Response(url), iter([contents[url]])

    def set_contents(name, files, checked=True):
        contents.update(files)
        monkeypatch.setattr(downloader, "_open_url", open_url)
        for url, content in files.items() if checked else ():
            info = checksums.UrlInfo(
                size=units.Size(len(content)),
                checksum=hashlib.sha256(content).hexdigest(),
                filename=os.path.basename(url),
            )
            monkeypatch.setitem(tfds.builder_cls(name).url_infos, url, info)

    return set_contents


def _cifar10(per_file):
    """Returns the archive of CIFAR-10 with so many images in each file."""
    random = np.random.default_rng(0)
    names = ["test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6))]
    rows = {}
    for name in names:
        row = random.integers(0, 256, (per_file, 3073), np.uint8)
        row[:, 0] = np.arange(per_file) % 10
        rows[name] = row
    files = {f"cifar-10-batches-bin/{name}": row.tobytes() for name, row in rows.items()}
    labels = "\n".join(f"class {i}" for i in range(10)) + "\n"
    files["cifar-10-batches-bin/batches.meta.txt"] = labels.encode()
    return _tar(files, "w:gz"), rows


def test_cifar10_is_prepared_and_trained_on(serve, tmp_path, log, capsys):
    archive, rows = _cifar10(10)
    serve("cifar10", {_CIFAR10_URL: archive})
    code = program.main(
        *_SMALL,
        "--dataset=cifar10",
        f"--data_dir={tmp_path}",
        f"--model_dir={tmp_path}/run",
    )
    assert code == 0
    assert (tmp_path / "run" / "ckpt-2.index").exists()
    assert (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").exists()
    test = data.load("cifar10", "test", data_dir=str(tmp_path))
    assert test.class_names == tuple(f"class {i}" for i in range(10))
    expected = rows["test_batch.bin"][:, 1:].reshape(-1, 3, 32, 32)
    expected = {image.tobytes() for image in expected.transpose(0, 2, 3, 1)}
    assert {image.tobytes() for image in test.source.images} == expected
    started = next(i for i, line in enumerate(log) if "Preparing" in line)
    assert log[started] == (
        f"Preparing cifar10: downloading to {tmp_path}/downloads, then writing "
        f"{tmp_path}/cifar10/3.0.2."
    )
    ended = next(line for line in log if line.startswith("Prepared cifar10 in"))
    assert ended.endswith(f" s: {tmp_path}/cifar10/3.0.2.")
    # Standard output is for results, and TFDS prints there.
    assert "Downloading" not in capsys.readouterr().out


def _write_imagenet(folder, test=False):
    """Writes archives of ImageNet; of each synset, 6 images."""
    os.makedirs(folder)
    # TFDS converts two files by their names: one is CMYK, one is a PNG.
    synsets = {"n01739381": "1309", "n02105855": "2933"}
    archives = {}
    for synset, special in synsets.items():
        files = {f"{synset}_{i}.JPEG": _image(i) for i in range(5)}
        files[f"{synset}_{special}.JPEG"] = (
            _image(9, "CMYK") if synset == "n01739381" else _image(9, file_format="PNG")
        )
        archives[f"{synset}.tar"] = _tar(files)
    images = {part: [_image(i) for i in range(4)] for part in ("val", "test")}
    contents = {"train": _tar(archives)}
    for part in ("val", "test") if test else ("val",):
        contents[part] = _tar(
            {f"ILSVRC2012_{part}_{i + 1:08}.JPEG": image for i, image in enumerate(images[part])}
        )
    for part, content in contents.items():
        path = os.path.join(folder, f"ILSVRC2012_img_{part}.tar")
        with open(path, "wb") as file:
            file.write(content)


@pytest.fixture
def imagenet(tmp_path):
    """Returns a data folder with ImageNet's archives, test images too."""
    _write_imagenet(tmp_path / "downloads" / "manual", test=True)
    return tmp_path


def test_imagenet_with_hidden_test_labels_is_evaluated_on_validation(imagenet, log):
    code = program.main(
        *_SMALL,
        "--mode=train_then_eval",
        "--dataset=imagenet2012",
        f"--data_dir={imagenet}",
        f"--model_dir={imagenet}/run",
    )
    assert code == 0
    result = json.loads((imagenet / "run" / "result.json").read_text())
    assert result["split"] == "validation"
    assert result["num_examples"] == 4
    manual = imagenet / "downloads" / "manual"
    assert any(f"reading archives in {manual}, then" in line for line in log)
    assert ("Evaluating on split 'validation' of imagenet2012; labels of 'test' are hidden.") in log
    train = data.load("imagenet2012", data_dir=str(imagenet))
    assert train.num_examples == 12
    names = train.names()
    labels = [train.class_names[label] for label in train.labels()]
    assert [name.split("_")[0] for name in names] == labels
    stream = data.eval_stream(train, batch_size=12, image_size=32)
    assert next(stream.as_numpy_iterator())["weight"].sum() == 12


def test_split_with_hidden_labels_is_refused_before_training(imagenet, capsys, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("training started"))
    code = program.main(
        *_SMALL,
        "--mode=train_then_eval",
        "--dataset=imagenet2012",
        "--eval_split=test",
        f"--data_dir={imagenet}",
        f"--model_dir={imagenet}/other",
    )
    assert code == 2
    error = capsys.readouterr().err
    assert "Error: --eval_split=test of imagenet2012" in error
    assert "Split 'validation' has labels." in error


def test_training_on_a_split_with_hidden_labels_is_refused(imagenet, capsys):
    code = program.main(
        *_SMALL,
        "--train_mode=finetune",
        "--checkpoint=none",
        "--dataset=imagenet2012",
        "--train_split=test",
        f"--data_dir={imagenet}",
        f"--model_dir={imagenet}/other",
    )
    assert code == 2
    error = capsys.readouterr().err
    assert "All labels of --train_split=test of imagenet2012 are hidden" in error


def test_imagenet_without_test_archive_has_two_splits(tmp_path):
    _write_imagenet(tmp_path / "downloads" / "manual")
    options = {"data_dir": str(tmp_path)}
    assert data.load("imagenet2012", "validation", **options).num_examples == 4
    with pytest.raises(ValueError, match="'test'.*'train': 12, 'validation'"):
        data.load("imagenet2012", "test", **options)


# Progress


def test_progress_is_logged_where_there_is_no_terminal(serve, tmp_path, log, monkeypatch):
    monkeypatch.setattr(tfds_sets, "_SECONDS_BETWEEN_LINES", 0.01)
    archive, _ = _cifar10(100)
    serve("cifar10", {_CIFAR10_URL: archive})
    # The archive and what is in it; 600 images of 3 kB each.
    size = " 4 MB downloaded and extracted, "
    builder_class = tfds.core.DatasetBuilder
    download_and_prepare = builder_class.download_and_prepare

    def prepare_until_reported(*arguments):
        download_and_prepare(*arguments)
        for _ in range(10_000):  # a line every 0.01 s
            if any(size in line for line in log):
                return
            time.sleep(0.01)

    monkeypatch.setattr(builder_class, "download_and_prepare", prepare_until_reported)
    data.load("cifar10", data_dir=str(tmp_path))
    lines = [line for line in log if "extracted" in line]
    assert all(line.startswith("Preparing cifar10: ") for line in lines)
    assert any(size in line for line in lines)
    assert lines[-1].endswith(" s so far.")


def test_bars_are_shown_on_a_terminal(serve, tmp_path, log, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tfds_sets, "_SECONDS_BETWEEN_LINES", 0.02)
    archive, _ = _cifar10(10)
    serve("cifar10", {_CIFAR10_URL: archive})
    data.load("cifar10", data_dir=str(tmp_path))
    for part in ("Dl Completed", "Dl Size", "Extraction", "Generating"):
        assert part in terminal.getvalue()
    assert not any("extracted" in line for line in log)


# Failures


def _failure(name, tmp_path):
    """Returns the message of a preparation that fails, one paragraph."""
    with pytest.raises(ValueError, match="is not prepared in") as error:
        data.load(name, data_dir=str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"'{name}' is not prepared in '{tmp_path}/")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("present", [None, "train", "val"])
def test_missing_imagenet_archives_are_named_with_their_folder(tmp_path, present):
    folder = tmp_path / "downloads" / "manual"
    if present:
        folder.mkdir(parents=True)
        (folder / f"ILSVRC2012_img_{present}.tar").write_bytes(_tar({}))
    message = _failure("imagenet2012", tmp_path)
    assert (
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as they are, "
        f"must be downloaded by hand and put into '{folder}'"
    ) in message
    assert "ILSVRC2012_img_test.tar" in message
    assert "is optional" in message
    assert "image-net.org" in message
    assert "tfds build" not in message


def test_cut_imagenet_archive_is_reported_with_its_folder(tmp_path):
    folder = tmp_path / "downloads" / "manual"
    _write_imagenet(folder)
    os.truncate(folder / "ILSVRC2012_img_train.tar", 8000)
    message = _failure("imagenet2012", tmp_path)
    assert "failed: ReadError: " in message
    assert f"Are the files in '{folder}' complete?" in message
    assert not (tmp_path / "imagenet2012" / "5.1.0").exists()


def test_missing_manual_files_are_described_by_their_builder(tmp_path):
    message = _failure("imagenet2012_real", tmp_path)
    folder = tmp_path / "downloads" / "manual"
    assert "ILSVRC2012_img_val.tar, as they are, must be" in message
    assert f"'{folder}'" in message
    assert "optional" not in message
    message = _failure("resisc45", tmp_path)
    assert "its files must be downloaded by hand" in message
    assert message.count("please extract it to the manual_dir") == 1


def test_missing_package_is_named(serve, tmp_path, monkeypatch):
    """The flowers' labels are files of Matlab, which SciPy reads."""

    def mat(**arrays):
        file = io.BytesIO()
        scipy.io.savemat(file, arrays)
        return file.getvalue()

    url = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    files = {
        f"{url}102flowers.tgz": _tar({"jpg/image_00001.jpg": _image(0)}),
        f"{url}imagelabels.mat": mat(labels=[[1]]),
        f"{url}setid.mat": mat(trnid=[[1]], tstid=[[1]], valid=[[1]]),
    }
    serve("oxford_flowers102", files)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "scipy", None)
        message = _failure("oxford_flowers102", tmp_path)
    assert "package 'scipy' is missing. Install it: `pip install scipy`" in (message)
    assert "tfds build" not in message
    dataset = data.load("oxford_flowers102", data_dir=str(tmp_path))
    assert dataset.num_examples == 1


def test_wrong_checksum_names_the_file_to_delete(serve, tmp_path):
    archive, _ = _cifar10(1)
    serve("cifar10", {_CIFAR10_URL: archive}, checked=False)
    message = _failure("cifar10", tmp_path)
    assert f"the checksum of {_CIFAR10_URL} is not the expected" in message
    path = message.split("Delete ")[1].split(" and start")[0]
    assert path.startswith(str(tmp_path / "downloads"))
    with open(path, "rb") as file:
        assert file.read() == archive
    assert "tfds build" not in message


def test_failed_request_names_the_url_and_tfds_build(tmp_path, monkeypatch):
    """Nothing listens on port 9 of this machine."""
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    url = "http://127.0.0.1:9/cifar-10-binary.tar.gz"
    cls = tfds.builder_cls("cifar10")
    info = cls._cifar_info.fget(cls)._replace(url=url)
    monkeypatch.setattr(cls, "_cifar_info", info)
    message = _failure("cifar10", tmp_path)
    assert f"the download of {url} failed: ConnectionError" in message
    assert "`tfds build cifar10` on a machine with network" in message
    assert f"copy the folder 'cifar10' to '{tmp_path}'" in message


@pytest.mark.parametrize(
    "error",
    [
        tfds.download.DownloadError("Failed to get url https://a.b/c. HTTP 404"),
        requests.exceptions.ReadTimeout("https://a.b/c: timed out"),
        ConnectionResetError("by peer, https://a.b/c"),
    ],
)
def test_network_failure_names_its_url(tmp_path, monkeypatch, error):
    _fail_with(monkeypatch, error)
    message = _failure("mnist", tmp_path)
    assert "the download of https://a.b/c failed: " in message
    assert "`tfds build mnist` on a machine with network" in message


def _raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        # The package is there; a part of it is not.
        (ImportError("cannot import name 'foo'", name="numpy"), "'foo'"),
        (
            _raised_from(OSError(errno.ENOSPC, "No space left"), ConnectionError("cut")),
            "files cannot be written",
        ),
        (
            _raised_from(RuntimeError("preparing"), ModuleNotFoundError(name="scipy")),
            "package 'scipy' is missing",
        ),
    ],
)
def test_failure_is_explained_by_the_outermost_known_error(tmp_path, monkeypatch, error, reason):
    _fail_with(monkeypatch, error)
    assert reason in _failure("mnist", tmp_path).split("failed: ")[1]


def test_failure_beside_an_optional_import_is_not_blamed_on_it(tmp_path, monkeypatch):
    error = RuntimeError("the file is corrupt")
    error.__context__ = ModuleNotFoundError(name="optional")
    _fail_with(monkeypatch, error)
    message = _failure("mnist", tmp_path)
    assert message.endswith("RuntimeError: the file is corrupt")


def test_archive_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "downloads" / "manual"
    _write_imagenet(folder)
    path = str(folder / "ILSVRC2012_img_train.tar")
    error = PermissionError(errno.EACCES, "Permission denied", path)
    _fail_with(monkeypatch, error)
    assert f"'{path}' cannot be read" in _failure("imagenet2012", tmp_path)


def _fail_with(monkeypatch, error):
    """Lets every preparation fail with an error."""

    def fail(self):
        raise error

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Not enough disk space. Needed: 162 GiB"),
        PermissionError(errno.EACCES, "Permission denied"),
        tf.errors.PermissionDeniedError(None, None, "403"),
        tf.errors.ResourceExhaustedError(None, None, "No space left"),
    ],
)
def test_failed_writing_names_the_folder(tmp_path, monkeypatch, error):
    _fail_with(monkeypatch, error)
    message = _failure("mnist", tmp_path)
    assert f"files cannot be written below '{tmp_path}': " in message
    assert "--data_dir" in message
    assert "tfds build" not in message


def test_file_in_the_place_of_the_data_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = _failure("mnist", tmp_path / "file")
    assert f"files cannot be written below '{tmp_path}/file': " in message


def test_other_failure_is_quoted(tmp_path, monkeypatch):
    _fail_with(monkeypatch, RuntimeError("a\n\nb"))
    message = _failure("mnist", tmp_path)
    assert message.endswith("preparing it failed: RuntimeError: a b")
    assert "tfds build" not in message


def test_missing_package_of_a_builder_is_named_before_anything(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'bs4'", name="bs4.element")

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(ValueError, match="`pip install beautifulsoup4`"):
        data.load("cifar10", data_dir=str(tmp_path))
