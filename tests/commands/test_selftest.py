# SPDX-License-Identifier: Apache-2.0
"""The self-test sees what goes wrong on several devices."""

import numpy as np
import pytest

from contrastive.commands import selftest
from tests.support import program


def _trace():
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4))
    return {
        "metrics|1|loss": np.float32(3.0),
        "metrics|5|loss": np.float32(2.5),
        "metrics|1|entropy": np.float32(1.0),
        "gradient|1|networks/kernel": rng.normal(size=(3, 4)),
        "gradient|1|networks/bias": np.full(4, 1e-12),
        "variable|0|encoder/kernel": start,
        "variable|5|encoder/kernel": start + 0.01,
        "variable|0|encoder/moving_mean": np.zeros(4),
        "variable|1|encoder/moving_mean": np.ones(4),
        "variable|5|encoder/moving_mean": np.full(4, 2.0),
        "variable|0|queue/embeddings": np.zeros((4, 3)),
        "variable|5|queue/embeddings": np.ones((4, 3)),
        "variable|0|queue/ids": np.full(4, -1),
        "variable|5|queue/ids": np.array([7, 50_000, 123, 9]),
    }


def _differing(changed):
    one, several = _trace(), _trace()
    for key, change in changed.items():
        several[key] = change(several[key])
    found = selftest.agreements(one, several, tolerances=(0.01, 0.05))
    assert len(found) == 7
    return [row.what for row in found if not row.holds]


@pytest.mark.parametrize(
    ("key", "change", "what"),
    [
        ("metrics|1|loss", lambda x: 1.02 * x, "losses, step 1"),
        ("metrics|1|loss", lambda x: np.nan * x, "losses, step 1"),
        ("metrics|5|loss", lambda x: 1.1 * x, "losses, step 5"),
        # Summed, or averaged, once too often.
        ("gradient|1|networks/kernel", lambda x: 2 * x, "gradients, step 1"),
        (
            "variable|1|encoder/moving_mean",
            lambda x: 1.05 * x,
            "BatchNorm statistics, step 1",
        ),
        # Of the movement, 0.01; of the weights, far less.
        (
            "variable|5|encoder/kernel",
            lambda x: x + 0.001,
            "weights, step 5",
        ),
        (
            "variable|5|encoder/moving_mean",
            lambda x: 1.1 * x,
            "BatchNorm statistics, step 5",
        ),
        (
            "variable|5|queue/embeddings",
            lambda x: 1.1 * x,
            "queue, step 5",
        ),
        # No id is nearly right.
        ("variable|5|queue/ids", lambda x: x + (x == 7), "queue, step 5"),
    ],
)
def test_what_differs_is_named(key, change, what):
    assert _differing({key: change}) == [what]


def test_rounding_agrees():
    keys = [key for key in _trace() if not key.endswith("/ids")]
    assert not _differing({key: lambda x: x * (1 + 1e-6) for key in keys})
    # A gradient that is nothing but rounding may be any.
    assert not _differing({"gradient|1|networks/bias": lambda x: -7 * x})


def _selftest(*words):
    return program.main(
        "--mode=selftest",
        "--cpu_replicas=2",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        *words,
    )


def test_two_devices_are_one(capfd):
    assert _selftest("--objective=simclr", "--train_batch_size=8") == 0
    out = capfd.readouterr().out
    assert "simclr, resnet 10, batch 8: MirroredStrategy of 2 replicas" in out
    assert "They are the same computation." in out
    assert out.count("agree\n") == 6


@pytest.mark.slow
def test_statistics_of_each_replica_are_found_out(capfd):
    assert _selftest("--global_bn=false") == 1
    out = capfd.readouterr().out
    assert "DIFFER, most" in out
    assert "do not train on these devices" in out


def test_what_fails_in_a_process_is_one_line(capfd):
    assert _selftest("--train_batch_size=9") == 2
    error = capfd.readouterr().err
    assert "--train_batch_size=9 does not divide among 2 replicas" in error
    assert "The steps on all devices ended with exit code" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    "rpc simclr dv nwj js wpc byol relic relicv2 semppl".split(),
)
def test_every_objective_has_one(objective, capfd):
    code = _selftest(f"--objective={objective}")
    assert code == 0, capfd.readouterr().out
