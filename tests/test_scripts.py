# SPDX-License-Identifier: Apache-2.0
"""The scripts at the root."""

import sys

import pytest

from tests.support import processes


def _lines(text):
    return dict(line.split(":", 1) for line in text.splitlines())


def _script(tmp_path, recipe):
    """Returns the plans of both stages of the script."""
    result = processes.run(
        "bash",
        "tpu_pretrain_imagenet.sh",
        "--dry_run",
        environment={
            "RECIPE": recipe,
            "TPU_NAME": "local",
            "STORAGE_BUCKET": f"{tmp_path}/bucket",
            "PYTHON": sys.executable,
        },
    )
    first, second = result.stdout.split("training:")[1:]
    assert not list(tmp_path.iterdir())
    return _lines(f"training:{first}"), _lines(f"training:{second}")


@pytest.mark.parametrize(
    ("recipe", "what", "steps", "linear_steps"),
    [
        (
            "rpc_imagenet_r50",
            "rpc, ResNet-50 x1, selective kernels",
            "31,279",
            "28,151",
        ),
        pytest.param(
            "rpc_imagenet_r152",
            "rpc, ResNet-152 x2, selective kernels",
            "31,279",
            "28,151",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "relicv2_1000",
            "relicv2, ResNet-50 x1",
            "312,785",
            "125,114",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "semppl_300",
            "semppl, ResNet-50 x1",
            "93,836",
            "125,114",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tpu_script_of_each_recipe_plans_both_stages(tmp_path, recipe, what, steps, linear_steps):
    pretraining, linear = _script(tmp_path, recipe)
    assert what in pretraining["training"]
    assert steps in pretraining["steps"]
    assert linear_steps in linear["steps"]
    assert "known once" in linear["sizes"]


@pytest.mark.parametrize(
    ("code", "is_soon", "goes_on"),
    [
        (75, True, True),
        (134, False, True),
        (134, True, False),
        (3, True, False),
    ],
)
def test_tpu_script_restarts_only_a_program_that_was_lost(code, is_soon, goes_on, tmp_path):
    """With a program that is lost twice in place of Python."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
[ "$(wc -l < {tmp_path}/calls)" -gt 2 ] || exit {code}
"""
    )
    python.chmod(0o755)
    processes.run(
        "bash",
        "tpu_pretrain_imagenet.sh",
        "--seed=3",
        code=0 if goes_on else code,
        environment={
            "STORAGE_BUCKET": "my-bucket",
            "PYTHON": python,
            "RESTART_SECONDS": "0",
            "ABORT_SECONDS": "600" if is_soon else "0",
            "BEFORE_RESTART": f"echo again >> {tmp_path}/restarts",
        },
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    if not goes_on:  # diverged or unusable: the same would happen again
        assert len(calls) == 1
        return
    assert (tmp_path / "restarts").read_text() == "again\n" * 2
    assert len(set(calls[:3])) == 1
    assert "--train_mode=pretrain" in calls[0]
    assert "--model_dir=gs://my-bucket/rpc_imagenet_r50" in calls[0]
    assert "--checkpoint=gs://my-bucket/rpc_imagenet_r50" in calls[3]
    assert all("--seed=3" in call for call in calls)
