# SPDX-License-Identifier: Apache-2.0
"""Pictures and lines that a run shows."""

import json

import numpy as np

import reporting


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
    reporter.end()
    (words,) = lines
    assert words[0] % words[1:] == (
        "step 4/4, epoch 2.00, 20 images/s, probe 0.25, loss 1.5, 0:00:00 left"
    )
    assert not list(tmp_path.iterdir())
