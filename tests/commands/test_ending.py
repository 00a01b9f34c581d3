# SPDX-License-Identifier: Apache-2.0
"""How a run ends: exit codes and messages by what happened."""

import errno
import io
import json
import logging
import os
import shutil
import signal
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging as absl_logging
from PIL import Image

import run
from contrastive.commands import experiment, selftest
from contrastive.devices import cloud_tpu
from contrastive.report import reporting
from contrastive.sources import sources
from contrastive.training import trainer
from contrastive.weights import checkpoint
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
        raise sources.UndecodableImages("Of 9 images, 9 did not decode.")

    dataset = tf.data.Dataset.range(1).map(
        lambda i: tf.numpy_function(report, [i], tf.int64)
    )
    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        next(iter(dataset))
    return raised.value


def _main(error, *words, monkeypatch):
    """Returns the exit code where the prepared work raises an error."""

    def work():
        raise error

    def prepare(settings, _):
        # `experiment.Run` has resolved the strategy before the work begins.
        settings.strategy = settings.strategy.replace("auto", "one_device")
        return work

    monkeypatch.setattr(run, "_prepare", prepare)
    return program.main(*words)


def _of_tensorflow(kind, message="First line.\n\nA stack of calls."):
    return kind(None, None, message)


@pytest.mark.parametrize(
    ("make_error", "strategy", "code", "message"),
    [
        (lambda: trainer.TrainingDiverged("loss"), "auto", 3, "stopped: loss"),
        (
            lambda: trainer.Interrupted("Saved.", signal.SIGINT),
            "auto",
            130,
            "Interrupted. Saved.",
        ),
        (lambda: trainer.HostsDisagree("Steps."), "auto", 2, "Error: Steps."),
        (lambda: trainer.NoLabelledImage("None."), "auto", 2, "Error: None."),
        (lambda: selftest.ProcessFailed("Code 9."), "auto", 2, "Code 9."),
        (lambda: checkpoint.CannotRestore("Other."), "auto", 2, "Other."),
        (lambda: OSError(28, "No space left"), "auto", 2, "No space left"),
        (
            lambda: _of_tensorflow(tf.errors.PermissionDeniedError),
            "auto",
            2,
            "Error: First line.",
        ),
        (
            lambda: _of_tensorflow(tf.errors.ResourceExhaustedError),
            "auto",
            2,
            "--accumulate_steps",
        ),
        (_stream_error, "auto", 2, "Error: Of 9 images, 9 did not decode."),
        (lambda: cloud_tpu.AwayError("Preempted."), "auto", 75, "Lost the TPU"),
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
        (lambda: TimeoutError(110, "Timed out"), "auto", 75, "not answer"),
        (lambda: OSError(errno.ESTALE, "Stale"), "auto", 75, "not answer"),
        # Here is no other machine that could be lost.
        (
            lambda: _of_tensorflow(tf.errors.UnavailableError),
            "auto",
            75,
            "A file system or server does not answer",
        ),
    ],
)
def test_main_error_in_the_work_ends_with_its_code_and_one_paragraph(
    make_error, strategy, code, message, capsys, monkeypatch
):
    words = (f"--strategy={strategy}", "--dataset=photo_patches")
    assert _main(make_error(), *words, monkeypatch=monkeypatch) == code
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
def test_main_error_before_the_work_ends_with_its_code(
    error, strategy, code, monkeypatch
):
    def prepare(settings, _):
        settings.strategy = strategy
        raise error

    monkeypatch.setattr(run, "_prepare", prepare)
    assert program.main("--dataset=photo_patches") == code


def test_predictions_to_a_closed_pipe_end_without_a_traceback():
    code = "import run\nrun._prepare = lambda *_: print_much\n"
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
        _main(error, "--dataset=photo_patches", monkeypatch=monkeypatch)
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


def test_main_with_many_undecodable_images_ends_with_their_number(
    tmp_path, capsys
):
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
def test_main_with_a_batch_of_one_image_ends_before_training(
    objective, tmp_path, capsys
):
    words = [*_SMALL, f"--objective={objective}", f"--model_dir={tmp_path}"]
    assert program.main(*words, "--train_batch_size=1") == 2
    assert "--train_batch_size must be at least 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_main_after_a_divergence_has_recorded_the_steps_before_it(
    tmp_path, capsys, caplog
):
    code = program.main(
        f"--model_dir={tmp_path}",
        *_SMALL,
        "--warmup_epochs=0",
        "--checkpoint_steps=1",
        "--train_summary_steps=100",
        "--train_steps=30",
        "--optimizer=momentum",
        "--learning_rate=1e30",
    )
    assert code == 3
    error = capsys.readouterr().err
    assert "Training stopped" in error
    assert "learning rate" in error
    step = int(error.split(" at step ")[1].split(".")[0])
    # The step is no multiple of 100: its point is there because it diverged.
    points = reporting.read_events(str(tmp_path)).scalars["train/loss"]
    assert points[-1, 0] == step
    assert f"step {step}/30" in caplog.text
    # Whatever was saved is finite.
    latest = tf.train.latest_checkpoint(str(tmp_path))
    if latest:
        reader = tf.train.load_checkpoint(latest)
        for name, dtype in reader.get_variable_to_dtype_map().items():
            if dtype.is_floating:
                assert np.isfinite(reader.get_tensor(name)).all()


def test_main_after_weights_that_are_not_finite_has_recorded_their_step(
    tmp_path, monkeypatch, caplog
):
    def check(_, step):
        raise trainer.TrainingDiverged(f"a kernel after step {step}")

    monkeypatch.setattr(trainer, "_check_finite_weights", check)
    words = [*_SMALL, f"--model_dir={tmp_path}", "--train_summary_steps=100"]
    words += ["--checkpoint_steps=3", "--train_steps=30"]
    assert program.main(*words) == 3
    points = reporting.read_events(str(tmp_path)).scalars["train/loss"]
    assert points[:, 0].tolist() == [3]
    assert "step 3/30" in caplog.text


def test_sweep_after_a_signal_starts_no_other_trial(tmp_path, monkeypatch):
    started = []

    def train(config, *_):
        started.append(config.peak_learning_rate)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "train", train)
    code = program.main(
        "--train_mode=finetune",
        "--checkpoint=none",
        *_SMALL[:-1],
        f"--model_dir={tmp_path}",
        "--sweep_learning_rate=1,2,3",
    )
    assert code == 128 + signal.SIGTERM
    assert len(started) == 1


def _check_sweep_is_refused(message, directory, flag, capsys, monkeypatch):
    monkeypatch.setattr(
        trainer, "train", lambda *_: pytest.fail("training started")
    )
    words = ["--train_mode=finetune", "--checkpoint=none", *_SMALL[:-1]]
    assert program.main(*words, f"--model_dir={directory}", flag) == 2
    assert message in capsys.readouterr().err


def test_sweep_in_the_directory_of_another_run_is_refused_before_training(
    half_trained, capsys, monkeypatch
):
    _check_sweep_is_refused(
        "holds a run of other networks",
        half_trained,
        "--sweep_learning_rate=1,2",
        capsys,
        monkeypatch,
    )


def test_sweep_of_negative_epochs_is_refused_before_training(
    tmp_path, capsys, monkeypatch
):
    _check_sweep_is_refused(
        "must not be negative. Received: -5",
        tmp_path,
        "--sweep_train_epochs=1,-5",
        capsys,
        monkeypatch,
    )


@pytest.mark.parametrize(
    ("level", "folder", "is_shown"),
    [
        (logging.INFO, "tensorflow_datasets", False),
        (logging.WARNING, "tensorflow_datasets", False),
        (logging.ERROR, "tensorflow_datasets", True),
        (logging.INFO, os.path.dirname(run.__file__), True),
    ],
)
def test_log_shows_errors_alone_of_libraries(level, folder, is_shown):
    run._set_up_log()
    record = logging.LogRecord("absl", level, f"{folder}/x.py", 1, "", (), None)
    handler = absl_logging.get_absl_handler()
    assert bool(handler.filter(record)) == is_shown


def test_signals_of_one_run_are_not_those_of_the_next():
    with run._Signals() as first:
        os.kill(os.getpid(), signal.SIGTERM)
    with run._Signals() as second:
        pass
    assert (first.received, second.received) == (signal.SIGTERM, 0)


# Evaluation of a run in another process.


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    """A run with a checkpoint of 2 steps, of which 4 were asked for."""
    directory = tmp_path_factory.mktemp("half") / "run"
    words = [f"--model_dir={directory}", *_SMALL, "--train_summary_steps=0"]
    assert program.main(*words, "--train_steps=2") == 0
    record = json.loads((directory / "run.json").read_text())
    record["train_steps"] = 4
    (directory / "run.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def evaluated(monkeypatch):
    """Steps that were evaluated; nothing is computed, and polls are fast."""
    steps = []
    monkeypatch.setattr(run, "_SECONDS_BETWEEN_POLLS", 0.01)
    monkeypatch.setattr(
        experiment.Run, "evaluate", lambda _, step: steps.append(step)
    )
    return steps


@pytest.fixture
def write_checkpoint(monkeypatch):
    """Returns a function that writes a later checkpoint of `half_trained`.

    It holds the weights of step 2; its name alone says of which step it is.
    """
    monkeypatch.setattr(
        checkpoint,
        "checkpoint_step",
        lambda path: int(path.rpartition("-")[2]),
    )

    def write(directory, step):
        for name in ("index", "data-00000-of-00001"):
            shutil.copy(
                directory / f"ckpt-2.{name}", directory / f"ckpt-{step}.{name}"
            )
        state = (directory / "checkpoint").read_text()
        (directory / "checkpoint").write_text(
            state.replace("ckpt-2", f"ckpt-{step}")
        )

    return write


def test_eval_of_a_file_is_refused(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    assert program.main("--mode=eval", f"--model_dir={path}") == 2
    assert f"{path} is a file" in capsys.readouterr().err


def test_eval_of_a_run_that_never_starts_ends_after_the_timeout(
    tmp_path, capsys, caplog, evaluated
):
    words = ["--mode=eval", f"--model_dir={tmp_path}"]
    assert program.main(*words, "--eval_timeout_minutes=0.001") == 75
    assert f"Waiting for a trainer to write run.json in {tmp_path}" in (
        caplog.text
    )
    assert "No trainer wrote run.json" in capsys.readouterr().err
    assert not evaluated


def test_eval_of_a_run_whose_trainer_died_ends_after_its_checkpoints(
    half_trained, tmp_path, capsys, caplog, evaluated
):
    directory = tmp_path / "run"
    shutil.copytree(half_trained, directory)
    for path in directory.iterdir():
        os.utime(path, (1e9, 1e9))
    assert program.main("--mode=eval", f"--model_dir={directory}") == 75
    assert evaluated == [2]
    assert f"Waiting for checkpoints in {directory}" in caplog.text
    error = capsys.readouterr().err
    assert f"The trainer of {directory} is gone" in error
    assert "--eval_timeout_minutes=120" in error


def test_eval_of_a_run_that_lives_goes_on_to_its_last_checkpoint(
    half_trained, tmp_path, monkeypatch, evaluated, write_checkpoint
):
    directory = tmp_path / "run"
    shutil.copytree(half_trained, directory)
    checks = []

    def check(*arguments):
        checks.append(check_trainer(*arguments))
        if len(checks) == 3:  # the run is shortened while it is followed
            record = json.loads((directory / "run.json").read_text())
            record["train_steps"] = 3
            (directory / "run.json").write_text(json.dumps(record))
            write_checkpoint(directory, 3)

    check_trainer = run._check_trainer_lives
    monkeypatch.setattr(run, "_check_trainer_lives", check)
    assert program.main("--mode=eval", f"--model_dir={directory}") == 0
    assert evaluated == [2, 3]


def test_eval_slower_than_the_timeout_evaluates_the_checkpoint_of_meanwhile(
    half_trained, tmp_path, monkeypatch, evaluated, write_checkpoint
):
    directory = tmp_path / "run"
    shutil.copytree(half_trained, directory)

    def evaluate(_, step):
        """The trainer writes its last checkpoint meanwhile, and ends."""
        evaluated.append(step)
        if step == 2:
            write_checkpoint(directory, 4)
        for path in directory.iterdir():
            os.utime(path, (1e9, 1e9))

    monkeypatch.setattr(experiment.Run, "evaluate", evaluate)
    assert program.main("--mode=eval", f"--model_dir={directory}") == 0
    assert evaluated == [2, 4]


def test_eval_of_a_run_that_is_deleted_meanwhile_ends(
    half_trained, tmp_path, capsys, monkeypatch, evaluated
):
    directory = tmp_path / "run"
    shutil.copytree(half_trained, directory)
    monkeypatch.setattr(
        experiment.Run, "evaluate", lambda *_: shutil.rmtree(directory)
    )
    assert program.main("--mode=eval", f"--model_dir={directory}") == 75
    assert "is gone" in capsys.readouterr().err
