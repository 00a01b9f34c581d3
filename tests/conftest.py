# SPDX-License-Identifier: Apache-2.0
"""What every test shares: quiet TensorFlow, its own state, golden numbers."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# No test asks a proxy, nor depends on what users of the scripts have exported.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
for _name in (
    "ABORT_SECONDS BATCH_SIZE BEFORE_RESTART DATA_DIR DATASET GCP_PROJECT "
    "LABELLED_FRACTION LINEAR_DIR LINEAR_EPOCHS MASK_DIR MODEL_DIR OBJECTIVE "
    "PYTHON RECIPE RESTARTS RESTART_SECONDS SALIENCY STORAGE_BUCKET TF_CONFIG "
    "TPU_NAME TPU_ZONE TRAIN_EPOCHS TRAIN_STEPS"
).split():
    os.environ.pop(_name, None)

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging

import data
from tests.support import process_state, processes

_GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
_AT_START = process_state.snapshot()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Gives fixtures that outlive a test the state of the start, too.

    Otherwise what they compute would depend on the test that uses them first.
    """
    if fixturedef.scope == "function":
        return (yield)
    _restore("before a fixture")
    result = yield
    _restore(f"by the fixture {fixturedef.argname}")
    return result


@pytest.fixture(autouse=True)
def _own_process_state():
    """Restores what a test has changed in its process, the seeds included.

    A test that changes what cannot be restored fails: it belongs into a process of its own.
    """
    _restore("before a test")
    yield
    processes.end_all()
    _restore("by this test")


def _restore(when):
    remaining = process_state.restore(_AT_START)
    if remaining:
        pytest.fail(
            f"State of the process was changed {when} and cannot be restored: "
            f"{', '.join(remaining)}. Run the code in a process of its own.",
            pytrace=False,
        )


@pytest.fixture(scope="session")
def golden():
    """Returns a function that loads an `.npz` file of `tests/golden`."""
    return lambda name: np.load(_GOLDEN / name)


@pytest.fixture
def prepared():
    """Returns a function that loads a split of a prepared TFDS dataset.

    A test is skipped where the dataset is not prepared, which would take a download of gigabytes.
    """

    def load(name, split):
        builder = tfds.builder(name)
        if not builder.is_prepared():
            pytest.skip(f"{name} is not prepared in {builder.data_dir}")
        return data.load(name, split)

    return load


@pytest.fixture
def log(monkeypatch):
    """Returns the lines that are logged, a list that grows."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    return lines
