# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's events and projector."""

import json

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.plugins.projector import projector_plugin

from contrastive.report import content, events


def test_results_are_kept_by_step(tmp_path):
    for step in (1, 2):
        events.write_result(str(tmp_path), {"accuracy": step / 4}, step)
    assert json.loads((tmp_path / "result.json").read_text()) == {"accuracy": 0.5}
    assert (tmp_path / "result_1.json").exists()
    assert list((tmp_path / "eval").glob("events*"))


def _record(directory, first, last, loss):
    """Records steps from `first` + 1 to `last`, as a run does."""
    reporter = events.Reporter(
        str(directory),
        train_steps=10,
        batch_size=10,
        num_examples=20,
        summary_steps=1,
        learning_rate=lambda step: step / 8,
        preview=lambda step: [np.full((2, 96, 96, 3), step / 8)],
    )
    reporter.start(first)
    history = np.full((last - first, 1), loss, np.float32)
    reporter.progress(last, ["loss"], history, 0.5)
    reporter.close()


@pytest.mark.parametrize("others", [0, 10])
def test_events_are_read_without_what_a_resume_made_void(tmp_path, others):
    # Their number is part of the names of those that follow in the process.
    for _ in range(others):
        tf.summary.create_file_writer(str(tmp_path / "others")).close()
    _record(tmp_path, 0, 6, 1.5)
    _record(tmp_path, 4, 8, 0.5)  # goes on from a checkpoint at step 4
    found = events.read_events(str(tmp_path))
    losses = [1.5] * 4 + [0.5] * 4
    np.testing.assert_array_equal(
        found.scalars["train/loss"], [*zip(range(1, 9), losses, strict=True)]
    )
    assert found.views_step == 4
    picture = tf.io.decode_png(found.views).numpy()
    np.testing.assert_array_equal(picture, np.full((96, 192, 3), 127))
    assert 0 < found.seconds < 60


def test_a_directory_without_events_has_none(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        found = events.read_events(str(directory))
        assert found == ({}, None, 0, 0.0)


def test_projector_is_what_tensorboard_reads(tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(5, 3))
    content.write_projector(
        str(tmp_path),
        embeddings,
        np.zeros((5, 8, 8, 3), np.uint8),
        {"class": ["a", "b\tc\n", "d", "\udcff", "f"], "image": list("12345")},
    )
    got = projector_plugin._read_tensor_tsv_file(str(tmp_path / "projector" / "embeddings.tsv"))
    np.testing.assert_allclose(got, embeddings, rtol=1e-4)
    lines = (tmp_path / "projector" / "metadata.tsv").read_text().splitlines()
    assert lines == ["class\timage", "a\t1", "b c\t2", "d\t3", "?\t4", "f\t5"]
    config = (tmp_path / "projector_config.pbtxt").read_text()
    for name in ("embeddings.tsv", "metadata.tsv", "sprite.png"):
        assert f'"projector/{name}"' in config
    assert config.count("single_image_dim: 8") == 2
