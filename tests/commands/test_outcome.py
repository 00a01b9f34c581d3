# SPDX-License-Identifier: Apache-2.0
"""Tests of `outcome.py`: exit codes and messages by the error."""

import errno
import io
import signal
import sys
import zlib

import pytest
import tensorflow as tf
from PIL import Image

import run
from contrastive.commands import selftest
from contrastive.devices import cloud_tpu, strategies
from contrastive.evaluation import classifier
from contrastive.sources import dataset as dataset_lib
from contrastive.training import checkpoints, loop
from tests.support import processes, program

_SMALL = [
    "--dataset=photo_patches",
    "--resnet_depth=10",
    "--width_multiplier=0.125",
    "--image_size=16",
    "--train_batch_size=32",
    "--objective=simclr",
]


_NO_HOST = "Error: libcurl code 6 meaning 'Could not resolve hostname'"


def _stream_error():
    """The error of a stream whose images do not decode."""

    def report(_):
        raise dataset_lib.UndecodableImages("Of 9 images, 9 did not decode.")

    dataset = tf.data.Dataset.range(1).map(lambda i: tf.numpy_function(report, [i], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        next(iter(dataset))
    return raised.value


def _main(error, strategy, monkeypatch):
    """Returns the exit code if the work under a strategy raises an error."""

    def work():
        raise error

    monkeypatch.setattr(run, "prepare", lambda: work)
    monkeypatch.setattr(strategies, "last_made", lambda: strategy)
    return program.main("--dataset=photo_patches")


def _of_tensorflow(kind, message="First line.\n\nA stack of calls."):
    return kind(None, None, message)


@pytest.mark.parametrize(
    ("make_error", "strategy", "code", "message"),
    [
        (
            lambda: loop.TrainingDiverged("loss"),
            "one_device",
            3,
            "stopped: loss",
        ),
        (
            lambda: loop.Interrupted("Saved.", signal.SIGINT),
            "one_device",
            130,
            "Interrupted. Saved.",
        ),
        (
            lambda: loop.HostsDisagree("Steps."),
            "one_device",
            2,
            "Error: Steps.",
        ),
        (
            lambda: classifier.NoLabelledImage("None."),
            "one_device",
            2,
            "Error: None.",
        ),
        (lambda: selftest.ProcessFailed("Code 9."), "one_device", 2, "Code 9."),
        (
            lambda: checkpoints.CannotRestore("Other."),
            "one_device",
            2,
            "Other.",
        ),
        (
            lambda: OSError(28, "No space left"),
            "one_device",
            2,
            "No space left",
        ),
        (
            lambda: _of_tensorflow(tf.errors.PermissionDeniedError),
            "one_device",
            2,
            "Error: First line.",
        ),
        (
            lambda: _of_tensorflow(tf.errors.ResourceExhaustedError),
            "one_device",
            2,
            "--accumulate_steps",
        ),
        (
            _stream_error,
            "one_device",
            2,
            "Error: Of 9 images, 9 did not decode.",
        ),
        (
            lambda: cloud_tpu.AwayError("Preempted."),
            "one_device",
            75,
            "Lost the TPU",
        ),
        (
            lambda: _of_tensorflow(tf.errors.UnavailableError),
            "multi_worker",
            75,
            "Lost the TPU or another machine",
        ),
        (
            lambda: _of_tensorflow(tf.errors.FailedPreconditionError),
            "tpu",
            75,
            "Lost the TPU or another machine",
        ),
        # A bucket, wherever the devices are.
        (
            lambda: _of_tensorflow(tf.errors.FailedPreconditionError, _NO_HOST),
            "tpu",
            75,
            f"A file system or server does not answer: {_NO_HOST}",
        ),
        (
            lambda: TimeoutError(110, "Timed out"),
            "one_device",
            75,
            "not answer",
        ),
        (
            lambda: OSError(errno.ESTALE, "Stale"),
            "one_device",
            75,
            "not answer",
        ),
        # Here is no other machine that could be lost.
        (
            lambda: _of_tensorflow(tf.errors.UnavailableError),
            "one_device",
            75,
            "A file system or server does not answer",
        ),
    ],
)
def test_main_error_in_the_work_ends_with_its_code_and_one_paragraph(
    make_error, strategy, code, message, capsys, monkeypatch
):
    assert _main(make_error(), strategy, monkeypatch) == code
    written = capsys.readouterr().err
    assert message in written
    assert "A stack of calls." not in written
    assert "Traceback" not in written


@pytest.mark.parametrize(
    ("error", "strategy", "code"),
    [
        (ValueError("wrong"), "one_device", 2),
        (_of_tensorflow(tf.errors.NotFoundError), "tpu", 2),
        (_of_tensorflow(tf.errors.UnavailableError), "tpu", 75),
        (_of_tensorflow(tf.errors.UnavailableError), "one_device", 2),
        (cloud_tpu.AwayError("away"), "tpu", 75),
        # Of a bucket, whatever it was made of on the way.
        (ValueError(f"'gs://a' cannot be read: {_NO_HOST}"), "one_device", 75),
        (
            _of_tensorflow(tf.errors.FailedPreconditionError, _NO_HOST),
            "tpu",
            75,
        ),
    ],
)
def test_main_error_before_the_work_ends_with_its_code(error, strategy, code, monkeypatch):
    def prepare():
        raise error

    monkeypatch.setattr(run, "prepare", prepare)
    monkeypatch.setattr(strategies, "last_made", lambda: strategy)
    assert program.main("--dataset=photo_patches") == code


def test_predictions_to_a_closed_pipe_end_without_a_traceback():
    code = "import run\nrun.prepare = lambda: print_much\n"
    code += "def print_much():\n    for _ in range(100_000): print('x' * 100)\n"
    code += "from absl import app\napp.run(run.main)"
    script = f'"{sys.executable}" -c "$1" --dataset=photo_patches | head -n 1'
    finished = processes.run(
        "bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}", "bash", code,
        code=128 + signal.SIGPIPE,
    )  # fmt: skip
    assert finished.stdout == "x" * 100 + "\n"
    assert "BrokenPipe" not in finished.stderr


@pytest.mark.parametrize(
    "error",
    [
        _of_tensorflow(tf.errors.FailedPreconditionError),
        _of_tensorflow(tf.errors.InvalidArgumentError),
        ValueError("a shape does not fit"),
        KeyError("name"),
    ],
)
def test_main_defect_in_the_work_keeps_its_traceback(error, monkeypatch):
    with pytest.raises(type(error)) as raised:
        _main(error, "one_device", monkeypatch)
    assert raised.value is error


def _png_with_damaged_pixels(path, size):
    """Writes a PNG whose header and end are whole, and whose pixels are not."""
    content = io.BytesIO()
    Image.new("RGB", size, "gray").save(content, "PNG")
    data = bytearray(content.getvalue())
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    body = slice(start + 4, start + 4 + length)
    data[body] = bytes(length)
    checksum = zlib.crc32(data[start : body.stop])
    data[body.stop : body.stop + 4] = checksum.to_bytes(4, "big")
    path.write_bytes(data)


def test_main_with_many_undecodable_images_ends_with_their_number(tmp_path, capsys):
    """More than 1 % of them, which shows only while they are read."""
    for index in range(24):
        path = tmp_path / "images" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        size = (200 + index, 200)
        if index % 2:
            _png_with_damaged_pixels(path, size)
        else:
            Image.new("RGB", size, "gray").save(path)
    code = program.main(
        *_SMALL,
        f"--dataset={tmp_path / 'images'}",
        "--train_split=all",
        "--train_batch_size=8",
        "--train_steps=9",
        f"--model_dir={tmp_path / 'run'}",
    )
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: Of 24 images of ")
    assert "11 did not decode" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("objective", ["simclr", "relic"])
def test_main_with_a_batch_of_one_image_ends_before_training(objective, tmp_path, capsys):
    words = [*_SMALL, f"--objective={objective}", f"--model_dir={tmp_path}"]
    assert program.main(*words, "--train_batch_size=1") == 2
    assert "--train_batch_size must be at least 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
