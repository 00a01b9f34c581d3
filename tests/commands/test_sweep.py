# SPDX-License-Identifier: Apache-2.0
"""Tests of `sweep.py`: signals, and sweeps that are refused."""

import os
import signal

import pytest

from contrastive.training import loop
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
    """A run with a checkpoint of 2 steps."""
    directory = tmp_path_factory.mktemp("half") / "run"
    words = [f"--model_dir={directory}", *_SMALL, "--train_summary_steps=0"]
    assert program.main(*words, "--train_steps=2") == 0
    return directory


def test_sweep_after_a_signal_starts_no_other_trial(tmp_path, monkeypatch):
    started = []

    def train(config, *_):
        started.append(config.peak_learning_rate)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train", train)
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
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("training started"))
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


def test_sweep_of_negative_epochs_is_refused_before_training(tmp_path, capsys, monkeypatch):
    _check_sweep_is_refused(
        "--sweep_train_epochs=1,-5: must be at least 0.",
        tmp_path,
        "--sweep_train_epochs=1,-5",
        capsys,
        monkeypatch,
    )
