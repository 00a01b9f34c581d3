# SPDX-License-Identifier: Apache-2.0
"""A dry run says what training would be, and touches nothing."""

import sys

import pytest
import tensorflow as tf

from tests.support import processes, program


def _plan(capsys, *words):
    """Returns the lines of a plan, by their first words."""
    assert program.main("--dry_run", *words) == 0
    return _lines(capsys.readouterr().out)


def _lines(text):
    return dict(line.split(":", 1) for line in text.splitlines())


def test_a_plan_of_data_and_a_slice_that_are_not_here(tmp_path, capsys):
    plan = _plan(
        capsys,
        "--preset=relicv2_300",
        "--dataset=imagenet2012",
        f"--data_dir={tmp_path / 'none'}",
        "--tpu_topology=v4-128",
        "--accumulate_steps=2",
        f"--model_dir={tmp_path / 'run'}",
    )
    assert (
        "relicv2, ResNet-50 x1, imagenet2012 train, 1,281,167 images"
        in (plan["training"])
    )
    assert plan["devices"].strip() == "v4-128, 64 replicas"
    # 300 * 1,281,167 / 4096, and 10 epochs of it.
    assert "93,836, of them 3,127 of warm-up; 300 epochs" in plan["steps"]
    assert "4,096 images; a core: 64, in 2 parts" in plan["batch"]
    # 0.3 * 4096 / 256
    assert "4.8 at most, cosine, lars" in plan["learning rate"]
    # Four views of 224 pixels and two of 96.
    megabytes = 4096 * 3 * (4 * 224**2 + 2 * 96**2) / 1e9
    assert f"{megabytes:.3g} GB a step" in plan["input"]
    assert "300, every 313 steps" in plan["checkpoints"]
    assert "none is there yet" in plan["checkpoints"]
    assert not list(tmp_path.iterdir())


def test_a_plan_of_what_is_here(tmp_path, capsys):
    words = (
        "--dataset=photo_patches",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--train_batch_size=16",
        "--train_steps=2",
        f"--model_dir={tmp_path}",
    )
    processes.run("run.py", *words)
    plan = _plan(capsys, *words, "--train_steps=4", "--strategy=one_device")
    assert "10,000 images" in plan["training"]
    assert plan["devices"].strip() == "one_device, 1 replica"
    assert "goes on from step 2" in plan["checkpoints"]
    # What a checkpoint will be is what one is, but for the names in it.
    said = plan["sizes"].split("in every checkpoint, ")[1].split(";")[0]
    number, unit = said.split()
    expected = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    reader = tf.train.load_checkpoint(str(tmp_path))
    found = sum(
        reader.get_tensor(name).nbytes
        for name, dtype in reader.get_variable_to_dtype_map().items()
        if dtype != tf.string
    )
    assert expected == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("strategy", ["mirrored", "multi_worker"])
def test_devices_need_not_be_there(strategy, capsys):
    plan = _plan(
        capsys,
        "--dataset=photo_patches",
        "--resnet_depth=10",
        "--train_batch_size=96",
        f"--strategy={strategy}",
    )
    assert plan["devices"].strip() == f"{strategy}, as many cores as there are"
    assert (
        "48 with 2, 24 with 4, 12 with 8, 6 with 16, 3 with 32"
        in (plan["batch"])
    )


def test_what_is_no_training_has_no_plan(tmp_path, capsys):
    words = ["--dry_run", "--mode=probe", f"--checkpoint={tmp_path}"]
    assert program.main(*words) == 2
    assert "--dry_run is of training" in capsys.readouterr().err


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
def test_the_script_of_recipes(tmp_path, recipe, what, steps, linear_steps):
    pretraining, linear = _script(tmp_path, recipe)
    assert what in pretraining["training"]
    assert steps in pretraining["steps"]
    assert linear_steps in linear["steps"]
    assert "known once" in linear["sizes"]


def test_plan_of_a_checkpoint_that_cannot_be_reached_is_of_all_else(
    capsys, monkeypatch
):
    """As the second stage of a recipe where there is no network."""

    def stat(_):
        raise tf.errors.FailedPreconditionError(
            None, None, "Could not resolve host.\nwhen reading gs://b/x"
        )

    monkeypatch.setattr(tf.io.gfile, "stat", stat)
    plan = _plan(
        capsys,
        "--train_mode=finetune",
        "--mode=train_then_eval",
        "--preset=linear_eval_simclr",
        "--dataset=imagenet2012",
        "--checkpoint=gs://bucket/run",
        "--model_dir=gs://bucket/linear",
    )
    assert "classifier on gs://bucket/run, imagenet2012" in plan["training"]
    assert "it is unknown whether there is a checkpoint" in plan["checkpoints"]
    assert "Could not resolve host. when reading" in plan["checkpoints"]
    assert "known once gs://bucket/run is there" in plan["sizes"]


@pytest.mark.parametrize(
    ("code", "is_soon", "goes_on"),
    [
        (75, True, True),
        (134, False, True),
        (134, True, False),
        (3, True, False),
    ],
)
def test_the_script_starts_again_what_was_lost(
    code, is_soon, goes_on, tmp_path
):
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
