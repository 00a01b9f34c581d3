# SPDX-License-Identifier: Apache-2.0
"""What every test shares: quiet TensorFlow, fixed seeds, golden numbers."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import pytest

_GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"


@pytest.fixture(autouse=True)
def _fixed_seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def golden():
    """Returns a function that loads an `.npz` file of `tests/golden`."""
    return lambda name: np.load(_GOLDEN / name)
