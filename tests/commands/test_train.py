# SPDX-License-Identifier: Apache-2.0
"""Tests of `train.py`: runs that diverge or receive signals."""

import os
import signal

import numpy as np
import tensorflow as tf

from contrastive.commands import train
from contrastive.report import events
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


def test_main_after_a_divergence_has_recorded_the_steps_before_it(tmp_path, capsys, caplog):
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
    points = events.read_events(str(tmp_path)).scalars["train/loss"]
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
        raise loop.TrainingDiverged(f"a kernel after step {step}")

    monkeypatch.setattr(loop, "_check_finite_weights", check)
    words = [*_SMALL, f"--model_dir={tmp_path}", "--train_summary_steps=100"]
    words += ["--checkpoint_steps=3", "--train_steps=30"]
    assert program.main(*words) == 3
    points = events.read_events(str(tmp_path)).scalars["train/loss"]
    assert points[:, 0].tolist() == [3]
    assert "step 3/30" in caplog.text


def test_signals_of_one_run_are_not_those_of_the_next():
    with train.Signals() as first:
        os.kill(os.getpid(), signal.SIGTERM)
    with train.Signals() as second:
        pass
    assert (first.received, second.received) == (signal.SIGTERM, 0)
