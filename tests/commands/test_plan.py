# SPDX-License-Identifier: Apache-2.0
"""--dry_run: the plan of a training, and that it writes nothing."""

import math

import pytest
import tensorflow as tf

from contrastive.commands import plan as plan_lib, session as session_lib, train
from tests.support import processes, program


def _plan(capsys, *words):
    """Returns the lines of a plan, by their first words."""
    assert program.main("--dry_run", *words) == 0
    return _lines(capsys.readouterr().out)


def _lines(text):
    return dict(line.split(":", 1) for line in text.splitlines())


def test_plan_of_data_and_a_slice_that_are_not_here_has_their_numbers(tmp_path, capsys):
    plan = _plan(
        capsys,
        "--preset=relicv2_300",
        "--dataset=imagenet2012",
        f"--data_dir={tmp_path / 'none'}",
        "--tpu_topology=v4-128",
        "--accumulate_steps=2",
        f"--model_dir={tmp_path / 'run'}",
    )
    assert "relicv2, ResNet-50 x1, imagenet2012 train, 1,281,167 images" in (plan["training"])
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


def test_plan_of_a_run_that_is_here_resumes_it(tmp_path, capsys):
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
    assert "resumes from step 2" in plan["checkpoints"]
    # The size of the checkpoint that is there, without the names in it.
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
def test_plan_of_missing_devices_lists_numbers_of_cores(strategy, capsys):
    plan = _plan(
        capsys,
        "--dataset=photo_patches",
        "--resnet_depth=10",
        "--train_batch_size=96",
        f"--strategy={strategy}",
    )
    assert plan["devices"].strip() == f"{strategy}, as many cores as there are"
    assert "48 with 2, 24 with 4, 12 with 8, 6 with 16, 3 with 32" in (plan["batch"])


def test_plan_rejects_modes_that_do_not_train(tmp_path, capsys):
    words = ["--dry_run", "--mode=probe", f"--checkpoint={tmp_path}"]
    assert program.main(*words) == 2
    assert "--dry_run plans a training, not --mode=probe" in capsys.readouterr().err


def test_plan_of_a_checkpoint_that_cannot_be_reached_has_all_else(capsys, monkeypatch):
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


def _bytes(variables):
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


@pytest.mark.parametrize(
    "words",
    [
        "--objective=simclr",
        "--objective=rpc --optimizer=adam --sk_ratio=0.0625",
        "--objective=vicreg --lineareval_while_pretraining=false",
        "--objective=relic --learnable_temperature",
        "--objective=semppl --queue_size=99 --num_large_views=3",
        "--objective=semppl --learnable_temperature --optimizer=momentum",
        "--objective=siglip --target_network=false",
        "--train_mode=finetune --checkpoint=none --fine_tune_after_block=2",
        "--train_mode=finetune --checkpoint=none --ft_proj_selector=1 --optimizer=lars",
    ],
)
def test_state_bytes_equal_the_built_state(words, tmp_path):
    resolved = program.resolve(
        *words.split(),
        "--dataset=photo_patches",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--proj_hidden_dim=24",
        "--train_batch_size=16",
        f"--model_dir={tmp_path}",
    )
    run = train.open_run(session_lib.open_session(resolved))
    config = run.config()
    state = train.create_state(run, config)
    layers = sum(_bytes(layer.variables) for layer in state.layers().values())
    optimizers = [
        _bytes(optimizer.variables) if optimizer is not None else 0
        for optimizer in state.optimizers
    ]
    assert plan_lib.state_bytes(config, run.resolved, 16) == (
        layers + optimizers[2],
        layers + sum(optimizers),
    )
