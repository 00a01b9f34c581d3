# SPDX-License-Identifier: Apache-2.0
"""The files at the root, and the direction of their imports.

import-linter checks the imports within the package (see pyproject.toml); it does not read single
files outside of it.
"""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).resolve().parent.parent
# What each file at the root may import of this program.
_MAY_IMPORT = {
    "run": {
        "model",
        "objective",
        "contrastive",
        "contrastive.commands",
        "contrastive.config",
    },
    "model": {"resnet", "contrastive.encoders"},
    "objective": {"contrastive.objectives"},
    "data": {
        "data_util",
        "contrastive.storage",
        "contrastive.sources",
        "contrastive.config",
    },
    "resnet": {"contrastive.encoders", "contrastive.config"},
    "data_util": {"contrastive.config"},
    "lars_optimizer": set(),
}


def _imports(path):
    """Yields the names of imported modules of this program."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from contrastive import x` imports contrastive.x.
            names = [node.module]
            if node.module == "contrastive":
                names = [f"contrastive.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first in _MAY_IMPORT:
                yield first
            elif first == "contrastive":
                yield ".".join([first, *rest[:1]])


def test_root_python_files_are_the_seven_of_the_design():
    assert {path.stem for path in _ROOT.glob("*.py")} == set(_MAY_IMPORT)


@pytest.mark.parametrize("name", _MAY_IMPORT)
def test_root_file_imports_only_what_is_below_it(name):
    assert set(_imports(_ROOT / f"{name}.py")) <= _MAY_IMPORT[name]


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
