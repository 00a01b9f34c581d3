# SPDX-License-Identifier: Apache-2.0
"""An addition to each of the four tables works from the command line."""

import json
import sys

import numpy as np
import pytest

from contrastive.report import events
from tests.support import processes

_PROGRAM = "tests/support/toy_program.py"
_TRAIN = (
    "--objective=toy --toy_scale=3 --dataset=toy:64 --encoder=toy "
    "--train_batch_size=16 --train_summary_steps=1 --checkpoint_steps=2 "
    "--optimizer=adam --learning_rate=0.1 --warmup_epochs=0"
).split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The directory of a run that was resumed after two of four steps."""
    path = tmp_path_factory.mktemp("toy")
    for steps in (2, 4):
        processes.run(_PROGRAM, *_TRAIN, f"--train_steps={steps}", f"--model_dir={path}")
    return path


def test_toy_objective_state_is_trained_and_restored(directory):
    scalars = events.read_events(str(directory)).scalars
    count, scale = scalars["train/toy_count"], scalars["train/toy_scale"]
    np.testing.assert_array_equal(count[:, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(count[:, 1], [1, 2, 3, 4])
    assert scale[0, 1] == 3
    assert np.all(np.diff(scale[:, 1]) < 0)


def test_toy_hyperparameter_is_recorded(directory):
    flags = json.loads((directory / "run.json").read_text())["flags"]
    assert flags["objective"] == "toy"
    assert flags["toy_scale"] == 3
    assert flags["dataset"] == "toy:64"
    assert flags["encoder"] == "toy"


def test_toy_encoder_of_run_is_loaded(directory):
    finished = processes.run(
        sys.executable,
        "-c",
        "import tensorflow as tf; from tests.support import toy_program; "
        "from contrastive import load_encoder; "
        f"encoder = load_encoder({str(directory)!r}); "
        "print(encoder(tf.zeros([2, 16, 16, 3])).shape)",
    )
    assert finished.stdout.splitlines()[-1] == "(2, 8)"


def test_toy_command_runs_and_ignores_other_flags():
    finished = processes.run(_PROGRAM, "--mode=greet", "--seed=5", "--knn_k=3")
    assert finished.stdout == "Hello from seed 5.\n"
    assert "--knn_k has no effect" in finished.stderr


def test_toy_additions_are_in_the_help():
    finished = processes.run(_PROGRAM, "--help")
    assert "Print a greeting." in finished.stdout
    finished = processes.run(_PROGRAM, "--objective=toy", "--help")
    assert "--toy_scale" in finished.stdout
    assert "--temperature" not in finished.stdout
