# SPDX-License-Identifier: Apache-2.0
"""The files that users look for at the root, and no others."""

import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_root_python_files_are_the_seven_of_the_design():
    assert {path.name for path in _ROOT.glob("*.py")} == {
        "run.py",
        "model.py",
        "resnet.py",
        "objective.py",
        "data.py",
        "data_util.py",
        "lars_optimizer.py",
    }


@pytest.mark.parametrize(
    "name",
    [
        "gpu_pretrain_finetune_cifar.sh",
        "tpu_pretrain_imagenet.sh",
        "quickstart.sh",
        "run_tests.sh",
        "requirements.txt",
        "README.md",
        "LICENSE",
    ],
)
def test_root_has_file(name):
    assert (_ROOT / name).is_file()
