# SPDX-License-Identifier: Apache-2.0
"""Checkpoints survive damage, and refuse networks that do not fit."""

import os

import numpy as np
import pytest
import tensorflow as tf

from contrastive.training import checkpoints
from tests.support.encoders import new_step


def _saved(directory, steps=(1, 2, 3)):
    """Checkpoints of a variable that holds the step."""
    variable = tf.Variable(np.zeros(1000, np.float32))
    saved = checkpoints.TrainingCheckpoints(
        str(directory), step=new_step(), max_to_keep=2, variable=variable
    )
    for step in steps:
        variable.assign(np.full(1000, step, np.float32))
        saved.save(step)
    return saved, variable


def test_restore_latest_restores_newest_and_keeps_max_to_keep(tmp_path):
    saved, variable = _saved(tmp_path)
    variable.assign(np.zeros(1000, np.float32))
    assert saved.restore_latest() == 3
    assert variable.numpy()[0] == 3
    files = {name for name in os.listdir(tmp_path) if name.endswith("index")}
    assert files == {"ckpt-2.index", "ckpt-3.index"}


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
def test_restore_latest_truncated_newest_restores_the_one_before(tmp_path, suffix):
    saved, variable = _saved(tmp_path)
    path = tmp_path / f"ckpt-3.{suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert saved.restore_latest() == 2
    assert variable.numpy()[0] == 2


def test_restore_latest_flipped_bit_restores_the_one_before(tmp_path):
    saved, _ = _saved(tmp_path)
    path = tmp_path / "ckpt-3.data-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert saved.restore_latest() == 2


@pytest.mark.parametrize("kind", [tf.errors.UnavailableError, tf.errors.FailedPreconditionError])
def test_restore_latest_without_a_device_or_network_raises_its_error(tmp_path, monkeypatch, kind):
    """The checkpoint may be whole: an older one must not take its place."""
    saved, _ = _saved(tmp_path)

    def restore(*_):
        raise kind(None, None, "Socket closed")

    monkeypatch.setattr(tf.train.Checkpoint, "restore", restore)
    with pytest.raises(kind, match="Socket closed"):
        saved.restore_latest()


def test_restore_latest_nothing_readable_raises(tmp_path):
    saved, _ = _saved(tmp_path)
    for path in tmp_path.glob("ckpt-*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 2 checkpoints"):
        saved.restore_latest()


def test_restore_latest_no_checkpoint_returns_0(tmp_path):
    saved, _ = _saved(tmp_path, steps=())
    assert saved.latest is None
    assert saved.restore_latest() == 0


def test_restore_latest_other_objects_raises(tmp_path):
    _saved(tmp_path)
    other = checkpoints.TrainingCheckpoints(
        str(tmp_path), step=new_step(), max_to_keep=2, another=tf.Variable(1.0)
    )
    with pytest.raises(ValueError, match="of another run"):
        other.restore_latest()


def test_latest_checkpoint_missing_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoints.latest_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="neither such a directory"):
        checkpoints.latest_checkpoint(str(tmp_path / "nowhere"))


def test_checkpoint_step_reads_step_without_networks(tmp_path):
    _saved(tmp_path)
    path = checkpoints.latest_checkpoint(str(tmp_path))
    assert checkpoints.checkpoint_step(path) == 3
