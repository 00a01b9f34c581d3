# SPDX-License-Identifier: Apache-2.0
"""Tests of `evaluate.py`: evaluation beside a training run."""

import json
import os
import shutil

import pytest

from contrastive.commands import evaluate, session
from contrastive.training import checkpoints
from tests.support import program

_SMALL = [
    "--dataset=photo_patches",
    "--resnet_depth=10",
    "--width_multiplier=0.125",
    "--image_size=16",
    "--train_batch_size=32",
    "--objective=simclr",
]


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
    monkeypatch.setattr(evaluate, "_SECONDS_BETWEEN_POLLS", 0.01)
    monkeypatch.setattr(session, "evaluate", lambda *arguments: steps.append(arguments[3]))
    return steps


@pytest.fixture
def write_checkpoint(monkeypatch):
    """Returns a function that writes a later checkpoint of `half_trained`.

    It holds the weights of step 2; its name alone says of which step it is.
    """
    monkeypatch.setattr(
        checkpoints,
        "checkpoint_step",
        lambda path: int(path.rpartition("-")[2]),
    )

    def write(directory, step):
        for name in ("index", "data-00000-of-00001"):
            shutil.copy(directory / f"ckpt-2.{name}", directory / f"ckpt-{step}.{name}")
        state = (directory / "checkpoint").read_text()
        (directory / "checkpoint").write_text(state.replace("ckpt-2", f"ckpt-{step}"))

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
    assert f"Waiting for a trainer to write run.json in {tmp_path}" in (caplog.text)
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

    check_trainer = evaluate.check_trainer_lives
    monkeypatch.setattr(evaluate, "check_trainer_lives", check)
    assert program.main("--mode=eval", f"--model_dir={directory}") == 0
    assert evaluated == [2, 3]


def test_eval_slower_than_the_timeout_evaluates_the_checkpoint_of_meanwhile(
    half_trained, tmp_path, monkeypatch, evaluated, write_checkpoint
):
    directory = tmp_path / "run"
    shutil.copytree(half_trained, directory)

    def evaluate_slowly(*arguments):
        """The trainer writes its last checkpoint meanwhile, and ends."""
        step = arguments[3]
        evaluated.append(step)
        if step == 2:
            write_checkpoint(directory, 4)
        for path in directory.iterdir():
            os.utime(path, (1e9, 1e9))

    monkeypatch.setattr(session, "evaluate", evaluate_slowly)
    assert program.main("--mode=eval", f"--model_dir={directory}") == 0
    assert evaluated == [2, 4]


def test_eval_of_a_run_that_is_deleted_meanwhile_ends(
    half_trained, tmp_path, capsys, monkeypatch, evaluated
):
    directory = tmp_path / "run"
    shutil.copytree(half_trained, directory)
    monkeypatch.setattr(session, "evaluate", lambda *_: shutil.rmtree(directory))
    assert program.main("--mode=eval", f"--model_dir={directory}") == 75
    assert "is gone" in capsys.readouterr().err
