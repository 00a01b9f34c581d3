# SPDX-License-Identifier: Apache-2.0
"""Imports go one way, and every file of the layout is there."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_MAY_IMPORT = {
    "objective": set(),
    "resnet": set(),
    "data_util": set(),
    "lars_optimizer": set(),
    "schedules": set(),
    "reporting": set(),
    "cloud_tpu": set(),
    "devices": {"cloud_tpu"},
    "storage": set(),
    "preparing": {"storage"},
    "sources": {"preparing", "storage"},
    "saliency": {"data_util"},
    "labelled": {"data_util", "sources"},
    "data": {"data_util", "saliency", "sources", "storage"},
    "report": {"reporting"},
    "model": {"resnet"},
    "unpickling": set(),
    "published": {"model", "resnet"},
    "checkpoint": {"model", "published", "resnet", "storage", "unpickling"},
    "features": {"data", "data_util", "sources", "storage"},
    "probe": {"data", "features"},
    "embed": {"data", "features", "labelled"},
    "readers": set(),
    "export": {"checkpoint", "model", "published", "readers", "resnet"},
    "methods": {"objective"},
    "trainer": {
        "checkpoint",
        "data_util",
        "devices",
        "lars_optimizer",
        "methods",
        "model",
        "objective",
        "reporting",
        "resnet",
        "saliency",
        "schedules",
    },
    "experiment": {
        "checkpoint",
        "data",
        "data_util",
        "devices",
        "labelled",
        "methods",
        "model",
        "reporting",
        "schedules",
        "sources",
        "trainer",
    },
    "plan": {
        "checkpoint",
        "devices",
        "experiment",
        "storage",
        "tpu_slices",
        "trainer",
    },
    "selftest": {"data", "devices", "experiment", "model", "trainer"},
    "tpu_compiler": set(),
    "tpu_slices": set(),
    "check_tpu": {
        "data",
        "data_util",
        "experiment",
        "methods",
        "tpu_compiler",
        "tpu_slices",
        "trainer",
    },
    "run_report": {
        "checkpoint",
        "data",
        "data_util",
        "experiment",
        "features",
        "model",
        "probe",
        "report",
        "reporting",
    },
    "run": {
        "check_tpu",
        "checkpoint",
        "data",
        "data_util",
        "devices",
        "embed",
        "experiment",
        "export",
        "features",
        "methods",
        "model",
        "objective",
        "plan",
        "probe",
        "reporting",
        "resnet",
        "run_report",
        "saliency",
        "selftest",
        "sources",
        "storage",
        "tpu_slices",
        "trainer",
    },
}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_module_is_in_the_table():
    assert {path.stem for path in _ROOT.glob("*.py")} == set(_MAY_IMPORT)


@pytest.mark.parametrize("name", _MAY_IMPORT)
def test_modules_import_only_what_is_below_them(name):
    local = set(_imports(_ROOT / f"{name}.py")) & set(_MAY_IMPORT)
    assert local <= _MAY_IMPORT[name]


def test_arrows_have_no_circle():
    done = set()
    while done != set(_MAY_IMPORT):
        ready = {k for k, v in _MAY_IMPORT.items() if v <= done} - done
        assert ready, "a circle of imports"
        done |= ready


@pytest.mark.parametrize(
    "name",
    [
        "gpu_pretrain_finetune_cifar.sh",
        "tpu_pretrain_imagenet.sh",
        "quickstart.sh",
        "run_tests.sh",
        "requirements.txt",
        "README.md",
    ],
)
def test_files_that_users_know_are_there(name):
    assert (_ROOT / name).is_file()
