# SPDX-License-Identifier: Apache-2.0
"""Log lines, and the steps that are recorded."""

import numpy as np
import pytest

from contrastive.report import events


def test_lines_in_a_log(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(events.logging, "info", lambda *words: lines.append(words))
    reporter = events.Reporter(
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


def _reporter(directory):
    return events.Reporter(
        str(directory),
        train_steps=10,
        batch_size=10,
        num_examples=20,
        summary_steps=4,
        learning_rate=lambda step: step / 8,
        preview=lambda _: [np.zeros((2, 96, 96, 3))],
    )


def _recorded_steps(directory):
    points = events.read_events(str(directory)).scalars["train/loss"]
    return points[:, 0].tolist()


@pytest.mark.parametrize(("last", "expected"), [(7, [4, 7]), (8, [4, 8]), (10, [4, 8, 10])])
def test_show_last_records_a_step_only_once(tmp_path, last, expected):
    reporter = _reporter(tmp_path)
    reporter.start(0)
    history = np.ones((last, 1), np.float32)
    reporter.progress(last, ["loss"], history, 0.5)
    reporter.show_last(last, ["loss"], history[-1])
    reporter.close()
    assert _recorded_steps(tmp_path) == expected


def test_progress_records_up_to_the_first_step_that_is_not_finite(tmp_path):
    reporter = _reporter(tmp_path)
    reporter.start(0)
    history = np.ones((9, 1), np.float32)
    history[5:] = np.nan
    reporter.progress(9, ["loss"], history, 0.5)
    reporter.close()
    assert _recorded_steps(tmp_path) == [4, 6]
