# SPDX-License-Identifier: Apache-2.0
"""Pictures and lines that a run shows."""

import json

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.plugins.projector import projector_plugin

from contrastive.report import reporting


def test_grid_has_a_column_an_image_and_a_row_a_view():
    large = np.arange(2 * 96 * 96 * 3).reshape(2, 96, 96, 3) / 55296
    small = np.zeros((2, 48, 48, 3))
    grid = reporting.image_grid([large, small])
    assert grid.shape == (192, 192, 3)
    np.testing.assert_array_equal(grid[:96, :96], large[0])
    np.testing.assert_array_equal(grid[:96, 96:], large[1])
    # The small view is in the middle of a white margin.
    np.testing.assert_array_equal(grid[120:168, 24:72], small[0])
    np.testing.assert_array_equal(grid[96, :], 1.0)


def test_grid_enlarges_small_images():
    view = np.arange(40 * 40 * 3).reshape(1, 40, 40, 3) / 4800
    grid = reporting.image_grid([view])
    assert grid.shape == (120, 120, 3)
    for row in range(3):
        np.testing.assert_array_equal(grid[row::3, 1::3], view[0])


def test_grid_shows_other_channels_as_grey():
    view = np.stack([np.zeros((1, 96, 96)), np.ones((1, 96, 96))], axis=-1)
    np.testing.assert_array_equal(
        reporting.image_grid([view]), np.full((96, 96, 3), 0.5)
    )


def test_results_are_kept_by_step(tmp_path):
    for step in (1, 2):
        reporting.write_result(str(tmp_path), {"accuracy": step / 4}, step)
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "accuracy": 0.5
    }
    assert (tmp_path / "result_1.json").exists()
    assert list((tmp_path / "eval").glob("events*"))


def test_lines_in_a_log(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(
        reporting.logging, "info", lambda *words: lines.append(words)
    )
    reporter = reporting.Reporter(
        str(tmp_path),
        train_steps=4,
        batch_size=10,
        num_examples=20,
        summary_steps=0,
        learning_rate=lambda _: 0.0,
        preview=lambda _: [],
    )
    reporter.start(0)
    history = np.array([[1.5, 0.25]], np.float32)
    reporter.progress(4, ["loss", "probe_top_1_accuracy"], history, 0.5)
    reporter.close()
    (words,) = lines
    assert words[0] % words[1:] == (
        "step 4/4, epoch 2.00, 20 images/s, probe 0.25, loss 1.5, 0:00:00 left"
    )
    assert not list(tmp_path.iterdir())


def _record(directory, first, last, loss):
    """Records steps from `first` + 1 to `last`, as a run does."""
    reporter = reporting.Reporter(
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
    events = reporting.read_events(str(tmp_path))
    losses = [1.5] * 4 + [0.5] * 4
    np.testing.assert_array_equal(
        events.scalars["train/loss"], [*zip(range(1, 9), losses, strict=True)]
    )
    assert events.views_step == 4
    picture = tf.io.decode_png(events.views).numpy()
    np.testing.assert_array_equal(picture, np.full((96, 192, 3), 127))
    assert 0 < events.seconds < 60


def test_a_directory_without_events_has_none(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        events = reporting.read_events(str(directory))
        assert events == ({}, None, 0, 0.0)


@pytest.mark.parametrize("count", [1, 5, 9, 10])
def test_sprite_has_the_images_row_by_row(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3))
    picture = reporting.sprite(images.astype(np.uint8))
    columns = picture.shape[1] // 4
    assert picture.shape[0] // 4 in (columns, columns - 1)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(tile, image)


def test_projector_is_what_tensorboard_reads(tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(5, 3))
    reporting.write_projector(
        str(tmp_path),
        embeddings,
        np.zeros((5, 8, 8, 3), np.uint8),
        {"class": ["a", "b\tc\n", "d", "\udcff", "f"], "image": list("12345")},
    )
    got = projector_plugin._read_tensor_tsv_file(
        str(tmp_path / "projector" / "embeddings.tsv")
    )
    np.testing.assert_allclose(got, embeddings, rtol=1e-4)
    lines = (tmp_path / "projector" / "metadata.tsv").read_text().splitlines()
    assert lines == ["class\timage", "a\t1", "b c\t2", "d\t3", "?\t4", "f\t5"]
    config = (tmp_path / "projector_config.pbtxt").read_text()
    for name in ("embeddings.tsv", "metadata.tsv", "sprite.png"):
        assert f'"projector/{name}"' in config
    assert config.count("single_image_dim: 8") == 2
