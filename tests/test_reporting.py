# SPDX-License-Identifier: Apache-2.0
"""Pictures and lines that a run shows."""

import json

import numpy as np

import reporting


def test_grid_has_a_row_an_image_and_a_column_a_view():
    large = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3) / 96
    small = np.zeros((2, 2, 2, 3))
    grid = reporting.image_grid([large, small])
    assert grid.shape == (8, 8, 3)
    np.testing.assert_array_equal(grid[:4, :4], large[0])
    np.testing.assert_array_equal(grid[4:, :4], large[1])
    # The small view is in the middle of a white margin.
    np.testing.assert_array_equal(grid[1:3, 5:7], small[0])
    np.testing.assert_array_equal(grid[0, 4:], 1.0)


def test_grid_shows_other_channels_as_grey():
    view = np.stack([np.zeros((1, 2, 2)), np.ones((1, 2, 2))], axis=-1)
    np.testing.assert_array_equal(
        reporting.image_grid([view]), np.full((2, 2, 3), 0.5)
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
