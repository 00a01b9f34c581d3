# SPDX-License-Identifier: Apache-2.0
"""Checkpoints survive damage, and refuse what does not fit."""

import dataclasses
import json
import os

import numpy as np
import pytest
import tensorflow as tf

import model
from contrastive.commands import experiment
from contrastive.weights import checkpoint
from tests.support.replica_run import architecture


def _saved(directory, steps=(1, 2, 3)):
    """Checkpoints of a variable that holds the step."""
    variable = tf.Variable(np.zeros(1000, np.float32))
    checkpoints = checkpoint.TrainingCheckpoints(
        str(directory), max_to_keep=2, variable=variable
    )
    for step in steps:
        variable.assign(np.full(1000, step, np.float32))
        checkpoints.save(step)
    return checkpoints, variable


def test_restores_the_newest_and_keeps_as_many_as_told(tmp_path):
    checkpoints, variable = _saved(tmp_path)
    variable.assign(np.zeros(1000, np.float32))
    assert checkpoints.restore_latest() == 3
    assert variable.numpy()[0] == 3
    files = {name for name in os.listdir(tmp_path) if name.endswith("index")}
    assert files == {"ckpt-2.index", "ckpt-3.index"}


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path, suffix
):
    checkpoints, variable = _saved(tmp_path)
    path = tmp_path / f"ckpt-3.{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert checkpoints.restore_latest() == 2
    assert variable.numpy()[0] == 2


def test_a_flipped_bit_is_noticed(tmp_path):
    checkpoints, _ = _saved(tmp_path)
    path = tmp_path / "ckpt-3.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert checkpoints.restore_latest() == 2


@pytest.mark.parametrize(
    "kind", [tf.errors.UnavailableError, tf.errors.FailedPreconditionError]
)
def test_restore_latest_without_a_device_or_network_raises_its_error(
    tmp_path, monkeypatch, kind
):
    """The checkpoint may be whole: an older one must not take its place."""
    checkpoints, _ = _saved(tmp_path)

    def restore(*_):
        raise kind(None, None, "Socket closed")

    monkeypatch.setattr(tf.train.Checkpoint, "restore", restore)
    with pytest.raises(kind, match="Socket closed"):
        checkpoints.restore_latest()


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints, _ = _saved(tmp_path)
    for path in tmp_path.glob("ckpt-*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 2 checkpoints"):
        checkpoints.restore_latest()


def test_no_checkpoint_is_step_0(tmp_path):
    checkpoints, _ = _saved(tmp_path, steps=())
    assert checkpoints.latest is None
    assert checkpoints.restore_latest() == 0


def test_a_checkpoint_of_other_objects_is_refused(tmp_path):
    _saved(tmp_path)
    other = checkpoint.TrainingCheckpoints(
        str(tmp_path), max_to_keep=2, another=tf.Variable(1.0)
    )
    with pytest.raises(ValueError, match="of another run"):
        other.restore_latest()


def _run_directory(directory, **changes):
    fields = dataclasses.replace(architecture("simclr"), **changes)
    networks = model.build_networks(fields)
    checkpoint.write_run(
        str(directory), {"architecture": dataclasses.asdict(fields)}
    )
    checkpoint.TrainingCheckpoints(
        str(directory), max_to_keep=1, **networks.models()
    ).save(5)
    return networks


def test_load_encoder_gives_the_features_of_the_run(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    networks = _run_directory(tmp_path, image_mean=mean, image_std=std)
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    expected = networks.encoder((images - mean) / std, training=False)
    encoder = checkpoint.load_encoder(str(tmp_path))
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-5, atol=1e-6)


def test_networks_that_do_not_fit_are_refused(tmp_path):
    _run_directory(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        checkpoint.load_encoder(str(tmp_path), resnet_depth=18)


def test_missing_checkpoints_say_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.latest_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="neither such a directory"):
        checkpoint.latest_checkpoint(str(tmp_path / "nowhere"))


def test_the_step_is_read_without_the_networks(tmp_path):
    _saved(tmp_path)
    path = checkpoint.latest_checkpoint(str(tmp_path))
    assert checkpoint.checkpoint_step(path) == 3


def test_run_json_round_trip_and_absence(tmp_path):
    assert checkpoint.read_run(str(tmp_path)) is None
    checkpoint.write_run(str(tmp_path / "a"), {"x": [1, 2]})
    assert checkpoint.read_run(str(tmp_path / "a")) == {"x": [1, 2]}
    assert checkpoint.read_run(str(tmp_path / "a" / "ckpt-1")) == {"x": [1, 2]}
    # A run may start from a file in its own directory.
    (tmp_path / "a" / "pretrain.pkl").write_bytes(b"")
    assert checkpoint.read_run(str(tmp_path / "a" / "pretrain.pkl")) is None


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="No checkpoint at"):
        checkpoint.load_encoder(str(tmp_path / "typo"))
    _saved(tmp_path)
    with pytest.raises(ValueError, match="no run.json beside"):
        checkpoint.load_encoder(str(tmp_path))


def test_a_run_of_an_older_version_may_go_on():
    now = json.loads(json.dumps(dataclasses.asdict(architecture("simclr"))))
    older = {
        k: v for k, v in now.items() if k not in ("shortcuts", "base_filters")
    }
    flags = {"flags": {"train_mode": "pretrain"}}
    experiment._compare_runs(
        "runs/x", {"architecture": older} | flags, {"architecture": now} | flags
    )
    other = {"architecture": older | {"padding": "same"}} | flags
    with pytest.raises(ValueError, match="padding: same there"):
        experiment._compare_runs("runs/x", other, {"architecture": now} | flags)
