# SPDX-License-Identifier: Apache-2.0
"""Tests do not change each other's process."""

import logging
import os
import signal
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from absl import flags, logging as absl_logging

import run
from contrastive.commands import session
from contrastive.devices import strategies
from tests.support import process_state


def _filter(_):
    return True


_CHANGES = {
    "op determinism": tf.config.experimental.enable_op_determinism,
    "TF32": lambda: tf.config.experimental.enable_tensor_float_32_execution(False),
    "optimizer options": lambda: tf.config.optimizer.set_experimental_options(
        {"arithmetic_optimization": False}
    ),
    "eager functions": lambda: tf.config.run_functions_eagerly(True),
    "dtype policy": lambda: keras.config.set_dtype_policy("mixed_bfloat16"),
    "floatx": lambda: keras.config.set_floatx("bfloat16"),
    "image data format": lambda: keras.config.set_image_data_format("channels_first"),
    "progress bars of TFDS": lambda: tfds.display_progress_bar(False),
    "strategies made": lambda: strategies._made.append("tpu"),
    "flags": lambda: flags.FLAGS(["run.py", "--seed=5"]),
    "environment": lambda: os.environ.update(A_VARIABLE_OF_A_TEST="1"),
    "working directory": lambda: os.chdir("/"),
    "module path": lambda: sys.path.append("/nowhere"),
    "signal handlers": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "log verbosity": lambda: absl_logging.set_verbosity(absl_logging.DEBUG),
    "log levels": lambda: logging.getLogger("tensorflow").setLevel(3),
    "log handlers": lambda: logging.getLogger("absl").addHandler(logging.NullHandler()),
    "log filters": lambda: absl_logging.get_absl_handler().addFilter(_filter),
    "log format": lambda: absl_logging.get_absl_handler().setFormatter(logging.Formatter("")),
}


@pytest.mark.parametrize("name", _CHANGES)
def test_restore_after_a_change_returns_to_the_snapshot(name):
    before = process_state.snapshot()
    _CHANGES[name]()
    changed = process_state.snapshot()
    assert changed[name] != before[name]
    assert process_state.restore(before) == []
    assert process_state.snapshot() == before


def test_restore_after_random_draws_returns_to_the_seed():
    state = process_state.snapshot()
    draws = []
    for _ in range(2):
        process_state.restore(state)
        draws.append([np.random.rand(), tf.random.uniform([]).numpy()])
    assert draws[0] == draws[1]


def test_restore_of_logical_devices_names_what_it_cannot_restore():
    state = process_state.snapshot()
    assert process_state.restore(state | {"logical CPUs": 7}) == ["logical CPUs"]


def test_restore_after_a_run_returns_to_the_snapshot():
    """The program changes the log, the seeds and TensorFlow's numerics."""
    before = process_state.snapshot()
    flags.FLAGS(["run.py", "--dataset=photo_patches", "--mixed_precision"])
    session.open_session(run.resolve_flags())
    run.set_up_log()
    changed = process_state.snapshot()
    differing = {name for name in before if before[name] != changed[name]}
    assert {
        "op determinism",
        "dtype policy",
        "log format",
        "strategies made",
    } <= differing
    assert process_state.restore(before) == []
    assert process_state.snapshot() == before
