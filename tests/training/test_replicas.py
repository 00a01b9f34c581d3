# SPDX-License-Identifier: Apache-2.0
"""Several replicas are the same computation as one, for every objective."""

import numpy as np
import pytest

import objective
from contrastive.commands import selftest
from contrastive.training import tracing
from tests.support import cluster, processes

_CASES = [f"{name}:momentum" for name in objective.OBJECTIVES]
_CASES_OF_FOUR = ["rpc:lars", "semppl:momentum"]
_SLOW_CASES_OF_FOUR = [
    f"{name}:momentum"
    for name in (
        "dv",
        "byol",
        "relic",
        "siglip",
        "relicv2",
        "barlow_twins",
        "vicreg",
    )
]


def _start(num_replicas, folder, cases, name=None, **environment):
    path = folder / f"{name or num_replicas}.npz"
    process = processes.Process(
        "tests/support/replica_run.py",
        num_replicas,
        path,
        *cases,
        environment=environment,
    )
    return process, path


def _finish(process, path):
    process.finish()
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs on 1, 2 and 4 replicas, one after the other."""
    folder = tmp_path_factory.mktemp("replicas")
    cases = {
        1: sorted({*_CASES, *_CASES_OF_FOUR}),
        2: _CASES,
        4: _CASES_OF_FOUR,
    }
    return {n: _finish(*_start(n, folder, cases[n])) for n in cases}


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return _finish(*_start(4, folder, _SLOW_CASES_OF_FOUR))


def test_evaluate_on_two_replicas_predicts_as_one_device(runs):
    one, two = (runs[i]["predictions"] for i in (1, 2))
    assert one.shape == (40, 3)
    np.testing.assert_array_equal(one[:, 0], np.arange(40))
    assert len(np.unique(one[:, 2])) > 1
    np.testing.assert_array_equal(two[np.argsort(two[:, 0])], one)


def _of_case(trace, case):
    return {
        key.removeprefix(f"{case}|"): value
        for key, value in trace.items()
        if key.startswith(f"{case}|")
    }


def _check_equal(several, one):
    """Compares metrics, gradients, weights, statistics and objectives' states.

    The first step agrees to rounding; later steps amplify it, where one of the few units crosses
    the kink of its ReLU.
    """
    assert several.keys() == one.keys()
    assert len(one) > 20
    for key, expected in one.items():
        what, step, _ = key.split("|")
        if what == "metrics":
            share = {"1": 1e-4, "2": 1e-3, "3": 1e-2}[step]
            error = np.abs(several[key] - expected)
            assert error <= share * np.abs(expected) + 1e-4, key
        if what == "variable" and step == "0":
            np.testing.assert_array_equal(several[key], expected, key)
    found = tracing.agreements(one, several, tolerances=(0.005, 0.025))
    kinds = {
        "losses, step 1",
        "gradients, step 1",
        "BatchNorm statistics, step 1",
        "losses, step 3",
        "weights, step 3",
        "BatchNorm statistics, step 3",
    }
    if any("|objective_state/" in key for key in one):
        kinds.add("objective's state, step 3")
    assert {row.what for row in found if row.holds} == kinds, selftest.table(found)


@pytest.mark.parametrize(
    ("num_replicas", "case"),
    [(2, case) for case in _CASES] + [(4, case) for case in _CASES_OF_FOUR],
)
def test_trace_on_replicas_equals_one_device(runs, num_replicas, case):
    _check_equal(*(_of_case(runs[n], case) for n in (num_replicas, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("case", _SLOW_CASES_OF_FOUR)
def test_trace_on_four_replicas_equals_one_device(runs, slow_run, case):
    _check_equal(_of_case(slow_run, case), _of_case(runs[1], case))


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, ["relic:momentum"]),
        pytest.param(2, _CASES, marks=pytest.mark.slow),
        pytest.param(4, _CASES_OF_FOUR + _SLOW_CASES_OF_FOUR, marks=pytest.mark.slow),
    ],
)
def test_trace_on_workers_equals_one_device(runs, tmp_path, count, cases):
    """The workers are processes that communicate over gRPC."""
    started = [
        _start(count, tmp_path, cases, f"worker{i}", TF_CONFIG=config)
        for i, config in enumerate(cluster.tf_configs(count))
    ]
    traces = [_finish(*each) for each in started]
    for case in cases:
        for trace in traces:
            _check_equal(_of_case(trace, case), _of_case(runs[1], case))


def test_trace_of_every_objective_moves_kernels(runs):
    """Otherwise the comparison of replicas would compare nothing."""
    for case in _CASES:
        one = _of_case(runs[1], case)
        kernels = [k for k in one if k.startswith("variable|1") and
                   k.endswith("kernel")]  # fmt: skip
        assert kernels
        for key in kernels:
            last = one[key.replace("|1|", "|3|")]
            assert np.abs(last - one[key]).max() > 0, key
