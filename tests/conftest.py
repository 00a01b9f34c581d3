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

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fixed_seed():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def golden():
    """Returns a loader of `.npz` files of reference numbers, by name.

    The compact part lives in `tests/golden`; the rest is read from
    `../shared/golden` where that exists, and its tests skip elsewhere.
    """

    def load(name):
        for folder in (
            _ROOT / "tests" / "golden",
            _ROOT.parent / "shared" / "golden",
        ):
            if (folder / name).exists():
                return np.load(folder / name)
        pytest.skip(f"{name} is neither in tests/golden nor ../shared/golden")

    return load
