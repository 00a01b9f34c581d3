# SPDX-License-Identifier: Apache-2.0
"""Several replicas are the same computation as one, for every objective."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import methods

_TESTS = pathlib.Path(__file__).resolve().parent
_CASES = [f"{name}:momentum" for name in methods.METHODS]
_CASES_OF_FOUR = ["rpc:lars", "semppl:momentum"]
_SLOW_CASES_OF_FOUR = [
    f"{name}:momentum" for name in ("dv", "byol", "relic", "relicv2")
]


def _start(num_replicas, folder, cases):
    path = folder / f"{num_replicas}.npz"
    process = subprocess.Popen(
        [sys.executable, _TESTS / "replica_run.py", str(num_replicas), path]
        + cases,
        env={**os.environ, "PYTHONPATH": str(_TESTS.parent)},
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, path


def _finish(process, path):
    _, log = process.communicate(timeout=500)
    assert process.returncode == 0, log[-3000:]
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs on 1 and 2 replicas side by side, then that on 4."""
    folder = tmp_path_factory.mktemp("replicas")
    pair = [
        _start(1, folder, sorted({*_CASES, *_CASES_OF_FOUR})),
        _start(2, folder, _CASES),
    ]
    one, two = (_finish(*started) for started in pair)
    return {1: one, 2: two, 4: _finish(*_start(4, folder, _CASES_OF_FOUR))}


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return _finish(*_start(4, folder, _SLOW_CASES_OF_FOUR))


def test_replicas_predict_as_one_device(runs):
    one, two = (runs[i]["predictions"] for i in (1, 2))
    assert one.shape == (40, 3)
    np.testing.assert_array_equal(one[:, 0], np.arange(40))
    assert len(np.unique(one[:, 2])) > 1
    np.testing.assert_array_equal(two[np.argsort(two[:, 0])], one)


@pytest.mark.parametrize(
    ("num_replicas", "case"),
    [(2, case) for case in _CASES] + [(4, case) for case in _CASES_OF_FOUR],
)
def test_replicas_equal_one_device(runs, num_replicas, case):
    _assert_equal(runs[num_replicas], runs[1], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", _SLOW_CASES_OF_FOUR)
def test_four_replicas_equal_one_device(runs, slow_run, case):
    _assert_equal(slow_run, runs[1], case)


def _assert_equal(several, one, case):
    """Compares metrics, weights and statistics: of step 1 to rounding.

    Momentum's first step is the gradient times the learning rate. Later steps
    amplify rounding, where a unit of the few here crosses its ReLU's kink.
    """
    compared = 0
    for key in several:
        if key.endswith("|names") or not key.startswith(f"{case}|"):
            continue
        _, what, step = key.split("|")
        error, expected = several[key] - one[key], one[key]
        if what == "metrics":
            share = {"1": 1e-4, "2": 1e-3, "3": 1e-2}[step]
            assert (np.abs(error) <= share * np.abs(expected) + 1e-4).all(), key
        else:
            # Relative to how far the variable has moved since the start.
            share = {"0": 0.0, "1": 5e-3, "3": 2e-2}[step]
            moved = np.linalg.norm(expected - one[f"{case}|{what}|0"])
            # A bias before BatchNorm moves by rounding alone.
            rounding = 1e-7 * np.linalg.norm(expected) + 5e-9
            assert np.linalg.norm(error) <= share * moved + rounding, key
        compared += 1
    assert compared > 20


def test_weights_moved(runs):
    """Otherwise the comparison above would compare nothing."""
    one = runs[1]
    for case in _CASES:
        keys = [k for k in one if k.startswith(f"{case}|") and "kernel|1" in k]
        assert keys
        for key in keys:
            last = one[key.removesuffix("1") + "3"]
            assert np.abs(last - one[key]).max() > 0, key
