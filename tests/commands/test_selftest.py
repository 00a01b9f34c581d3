# SPDX-License-Identifier: Apache-2.0
"""--mode=selftest: finds out whether several devices compute as one."""

import numpy as np
import pytest

import objective as objective_lib
from contrastive.commands import selftest
from contrastive.training import tracing
from tests.support import program


def test_table_of_a_difference_names_the_worst_tensor():
    found = [
        tracing.Agreement("losses, step 1", 3, 1e-6, "loss", 0.01),
        tracing.Agreement("weights, step 5", 9, np.nan, "encoder/kernel", 0.1),
    ]
    _, first, second = selftest.table(found).splitlines()
    assert first.split() == "losses, step 1 3 1e-06 0.01 agree".split()
    assert second.endswith("nan        0.1  DIFFER, most encoder/kernel")


def _selftest(*words):
    return program.main(
        "--mode=selftest",
        "--cpu_replicas=2",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        *words,
    )


def test_selftest_of_two_devices_prints_agreement(capfd):
    assert _selftest("--objective=simclr", "--train_batch_size=8") == 0
    out = capfd.readouterr().out
    assert "simclr, resnet 10, batch 8: MirroredStrategy of 2 replicas" in out
    assert "They are the same computation." in out
    assert out.count("agree\n") == 6


@pytest.mark.slow
def test_selftest_of_statistics_per_replica_exits_with_1(capfd):
    assert _selftest("--global_bn=false") == 1
    out = capfd.readouterr().out
    assert "DIFFER, most" in out
    assert "do not train on these devices" in out


def test_selftest_of_a_failing_process_prints_one_line(capfd):
    assert _selftest("--train_batch_size=9") == 2
    error = capfd.readouterr().err
    assert "--train_batch_size=9 does not divide among 2 replicas" in error
    assert "The steps on all devices ended with exit code" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    # At SigLIP's initial bias, the gradients of so few images cancel: what is left of some is
    # rounding. `test_replicas.py` covers it.
    [name for name in objective_lib.OBJECTIVES if name != "siglip"],
)
def test_selftest_of_every_objective_prints_agreement(objective, capfd):
    code = _selftest(f"--objective={objective}")
    assert code == 0, capfd.readouterr().out
