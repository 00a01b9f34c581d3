# SPDX-License-Identifier: Apache-2.0
"""The program of one of several replicas, lowered without devices.

It is executed by jax on four devices of the CPU.
"""

import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf

import data
import data_util
from contrastive.commands import networks
from contrastive.config.completion import complete
from contrastive.devices import lowering
from contrastive.sources import splits
from contrastive.training import loop
from contrastive.training.config import make_config
from contrastive.training.state import TrainState
from tests.support import processes, tpu_steps


def _encoded(folder):
    folder.mkdir()
    for index, size in enumerate([(40, 30), (30, 50), (64, 64), (20, 90)]):
        image = tf.zeros([*size, 3], tf.uint8)
        path = os.path.join(folder, f"{index}.png")
        tf.io.write_file(path, tf.io.encode_png(image))
    return data.load(str(folder), splits.ALL)


def test_batch_spec_equals_that_of_the_stream(tmp_path):
    view = data_util.simclr_augmentation(16)
    small = data_util.simclr_augmentation(8)
    masked = dataclasses.replace(view, mask_probability=0.5)
    in_memory = data.load("photo_patches", "test")
    masks = np.ones(in_memory.source.images.shape[:3], np.uint8)
    encoded = _encoded(tmp_path / "images")
    for dataset, views in [
        (in_memory, (view, small)),
        (dataclasses.replace(in_memory, masks=masks), (masked, view)),
        (encoded, (view, view)),
        (encoded, (view, view, small)),
    ]:
        stream = data.train_stream(dataset, batch_size=4, num_replicas=2, seed=0, views=views)
        assert lowering.batch_spec(dataset, 2, views) == stream.element_spec


def _execute(step, batch, folder):
    """Runs a step, lowered for 4 replicas, on all of them.

    Args:
        step: of a batch of one replica.
        batch: arrays of all rows, by name.
        folder: to work in.

    Returns:
        Array `[4, m]`, each replica's metrics; the variables; and, as arrays `[4, ...]`, what the
        step makes of them.
    """
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    spec = {
        name: tf.TensorSpec([len(rows) // 4, *rows.shape[1:]], rows.dtype)
        for name, rows in batch.items()
    }
    program = lowering.replica_program(step, spec, strategy, 4)
    module = lowering.lower(program, spec, strategy)
    concrete = program.get_concrete_function(*tf.nest.flatten(spec))
    captured = concrete.captured_inputs
    variables = {id(v.handle): v for v in concrete.variables}
    held = [variables[id(x)] for x in captured if id(x) in variables]
    assert len(held) == len(captured)
    (folder / "program").write_bytes(module)
    np.savez(folder / "split.npz", *tf.nest.flatten(batch))
    np.savez(folder / "same.npz", *[v.numpy() for v in held])
    processes.run("tests/support/execute_replicas.py", folder)
    with np.load(folder / "results.npz") as file:
        metrics, *changed = file.values()
    return metrics, held, changed


@tpu_steps.needs_compiler
def test_replica_program_collectives_equal_sums_and_gathers(tmp_path):
    def step(batch):
        replica = tf.distribute.get_replica_context()
        index = tf.cast(replica.replica_id_in_sync_group, tf.float32)
        x = batch["x"]
        with tf.GradientTape() as tape:
            tape.watch(x)
            rows = replica.all_gather(x, axis=0)
            # Every replica has another function of all rows.
            loss = (1.0 + index) * tf.reduce_sum(rows**2)
        ids = replica.all_gather(batch["id"] + 2**40, axis=0)
        return {
            "mean": replica.all_reduce("MEAN", tf.reduce_sum(x)),
            "rows": tf.reduce_sum(rows[:, 0] * tf.range(8.0)),
            "gradient": tf.reduce_sum(tape.gradient(loss, x)),
            "ids": tf.reduce_sum(ids - 2**40),
            "replica": index,
        }

    x = np.arange(8, dtype=np.float32)[:, np.newaxis] ** 2
    ids = np.arange(8) * 3
    metrics, _, _ = _execute(step, {"x": x, "id": ids}, tmp_path)
    expected = np.stack(
        [
            np.full(4, x.sum() / 4),
            np.full(4, x[:, 0] @ np.arange(8)),
            # Every replica's loss sees the rows of all.
            (1 + 2 + 3 + 4) * 2 * x.reshape(4, 2).sum(1),
            np.full(4, ids.sum()),
            np.arange(4),
        ],
        axis=1,
    )
    np.testing.assert_allclose(metrics, expected, rtol=1e-6)


@tpu_steps.needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["simclr", "semppl"])
def test_replica_program_of_four_replicas_equals_one_device(objective, tmp_path):
    """Metrics are equal, and every variable after a step."""
    check = tpu_steps.open_step(
        f"--objective={objective} --train_batch_size=16 "
        "--tpu_topology=v5e:2x2 --proj_hidden_dim=32 --optimizer=momentum "
        "--train_steps=10 --warmup_epochs=0 --learning_rate=0.1",
        tmp_path,
    )
    strategy = check.session.strategy
    resolved = complete(check.session.resolved, check.dataset)
    config = make_config(resolved, check.dataset, 1)
    built = networks.build_networks(resolved, networks.make_architecture(resolved, 10), strategy)
    with strategy.scope():
        state = TrainState.create(config, built)
    step = loop.build_step(config, state)
    patches = data.load("photo_patches", "test").source
    batch = {
        "id": np.arange(16),
        "epoch": np.zeros(16, np.int32),
        "image": patches.images[::100][:16],
        "label": patches.labels[::100][:16] % 10,
        "weight": np.ones(16, np.float32),
    }
    metrics, held, after = _execute(step, batch, tmp_path)
    one = strategy.run(
        tf.function(step, autograph=False),
        [tf.nest.map_structure(tf.constant, batch)],
    )
    np.testing.assert_allclose(
        metrics.mean(0), [float(v) for v in one.values()], rtol=1e-3, atol=1e-4
    )
    for variable, copies in zip(held, after, strict=True):
        for copy in copies:
            np.testing.assert_allclose(
                copy, variable.numpy(), rtol=1e-3, atol=1e-4,
                err_msg=variable.name,
            )  # fmt: skip
