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

    The compact part lives in `tests/golden`; `complete=True` reads the whole
    from `../shared/golden`, and skips where that does not exist.
    """

    def load(name, complete=False):
        folders = [_ROOT.parent / "shared" / "golden"]
        if not complete:
            folders.insert(0, _ROOT / "tests" / "golden")
        for folder in folders:
            if (folder / name).exists():
                return np.load(folder / name)
        pytest.skip(f"{name} is not in {' or '.join(map(str, folders))}")

    return load
