# SPDX-License-Identifier: Apache-2.0
"""The index of the objectives."""

import subprocess
import sys

import pytest

import objective


def test_objective_import_does_not_load_tensorflow():
    code = "import objective, sys; print({'tensorflow', 'keras', 'numpy'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "name",
    "simclr rpc dv nwj js wpc byol relic siglip semppl barlow_twins vicreg".split(),
)
def test_objective_loss_of_each_name_is_documented(name):
    loss = getattr(objective, f"{name}_loss")
    assert "Source: " in loss.__doc__


def test_every_alias_names_an_objective():
    assert set(objective.ALIASES.values()) <= set(objective.OBJECTIVES)
