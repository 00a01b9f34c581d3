# SPDX-License-Identifier: Apache-2.0
"""The progress of training on the terminal, and TensorBoard's events."""

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging
from tensorboard.backend.event_processing import (
    plugin_event_accumulator as event_accumulator,
)

from contrastive import storage

_SECONDS_BETWEEN_LINES = 10.0
_PIXELS_OF_A_VIEW = 96  # at least, in the grid of views
_VIEWS = "augmented_views"  # tag
# TensorBoard's files are named so, followed by .SECOND.MACHINE.
_EVENT_FILE = "events.out.tfevents"
_SECOND = re.compile(rf"{re.escape(_EVENT_FILE)}\.(\d+)\.")
# Shown in the progress line where a step reports them, under a short name.
_HEADLINES = {
    "contrastive_loss": "loss",
    "loss": "loss",
    "contrast_accuracy": "contrast",
    "probe_top_1_accuracy": "probe",
    "top_1_accuracy": "top-1",
}


@dataclasses.dataclass
class Reporter:
    """Shows the progress of training and records its metrics.

    Every point is written against the optimizer step. After a resume, points of steps after the
    checkpoint are purged, so that curves continue at the restored step.
    """

    directory: str  # where TensorBoard events are written
    _: dataclasses.KW_ONLY
    train_steps: int  # optimizer steps of the whole run
    batch_size: int  # global
    num_examples: int  # images an epoch
    summary_steps: int  # steps between TensorBoard points; 0: none
    learning_rate: Callable[[int], Any]  # function of the step
    # Augmented images of a step, one float32 `[n, s, s, c]` in [0, 1] a view.
    preview: Callable[[int], list[np.ndarray]]

    def __post_init__(self) -> None:
        self._writer: tf.summary.SummaryWriter | None = None
        self._recorded = 0  # the last recorded step
        self._bar: tqdm.tqdm | None = None
        self._last_line = 0.0

    def start(self, step: int) -> None:
        """Starts or resumes at `step`."""
        self._recorded = step
        if self.summary_steps:
            _purge_events(self.directory, step + 1)
            self._writer = tf.summary.create_file_writer(self.directory)
            with self._writer.as_default(step):
                grid = image_grid(self.preview(step))
                tf.summary.image(_VIEWS, grid[None])
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=self.train_steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
            )

    def progress(
        self,
        step: int,
        names: Sequence[str],
        history: np.ndarray,
        seconds_a_step: float | None,
        last: int | None = None,
    ) -> None:
        """Shows and records the last steps, up to `step`.

        Their metrics are `history`, float32 `[steps, len(names)]`. Step `last` (None: the last of
        the run) and the first step whose metrics are not finite are always shown and recorded, the
        steps after it are not. The duration of a step is None if it is not known yet.
        """
        rate = self.batch_size / seconds_a_step if seconds_a_step else None
        last = self.train_steps if last is None else last
        bad = np.flatnonzero(~np.isfinite(history).all(axis=1))
        if len(bad):
            last = step = step - len(history) + 1 + int(bad[0])
            history = history[: bad[0] + 1]
        rows = [dict(zip(names, row, strict=True)) for row in history]
        self._show(step, rows[-1], rate, is_last=step == last)
        if self._writer is None:
            return
        # The step's own values, no means: after a resume they are the same.
        for done, metrics in enumerate(rows, start=step - len(rows) + 1):
            is_due = done % self.summary_steps == 0 or done == last
            if done > self._recorded and is_due:
                self._recorded = done
                with self._writer.as_default(done):
                    self._record(done, metrics, rate)

    def show_last(self, step: int, names: Sequence[str], metrics: np.ndarray) -> None:
        """Shows a step that ends the run, and records it unless it is already.

        The arguments are as in `progress`; the metrics are `[metrics]`.
        """
        self.progress(step, names, metrics[None], None, last=step)

    def flush(self) -> None:
        """Makes sure that the recorded metrics are on disk."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Closes the bar and the events."""
        for open_one in filter(None, (self._writer, self._bar)):
            open_one.close()

    def _record(self, step: int, metrics: Mapping[str, float], rate: float | None) -> None:
        scalars = dict(metrics)
        # The rate that the step from `step - 1` to `step` used.
        scalars["learning_rate"] = self.learning_rate(step - 1)
        scalars["epoch"] = step * self.batch_size / self.num_examples
        if rate:
            scalars["images_per_second"] = rate
        for name, value in scalars.items():
            tf.summary.scalar(f"train/{name}", value)

    def _show(
        self,
        step: int,
        metrics: Mapping[str, float],
        rate: float | None,
        is_last: bool,
    ) -> None:
        epoch = step * self.batch_size / self.num_examples
        words = [f"epoch {epoch:.2f}"]
        if rate:
            words.append(f"{rate:,.0f} images/s")
        shown = {
            short: metrics[name] for name, short in reversed(_HEADLINES.items()) if name in metrics
        }
        words += [f"{name} {value:.4g}" for name, value in shown.items()]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if is_last or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            if rate:
                left = (self.train_steps - step) * self.batch_size / rate
                words.append(f"{duration(left)} left")
            logging.info("step %d/%d, %s", step, self.train_steps, ", ".join(words))


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as `h:mm:ss`."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def image_grid(views: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges views in one picture: an image a column, a view a row.

    A view is float32 `[n, s, s, c]` in [0, 1]. Smaller views are padded with white; more or fewer
    than 3 channels show as grey. The result is float32 `[len(views) * S, n * S, 3]`, where S is the
    largest `s`, or its least multiple that is 96 pixels or more.
    """
    size = max(view.shape[1] for view in views)
    rows = []
    for view in views:
        if view.shape[-1] != 3:
            view = np.repeat(view.mean(-1, keepdims=True), 3, axis=-1)
        margin = size - view.shape[1]
        pad = (margin // 2, margin - margin // 2)
        view = np.pad(view, ((0, 0), pad, pad, (0, 0)), constant_values=1.0)
        rows.append(np.concatenate(view, axis=1))
    zoom = math.ceil(_PIXELS_OF_A_VIEW / size)
    return np.concatenate(rows).repeat(zoom, 0).repeat(zoom, 1)


def _purge_events(directory: str, step: int) -> None:
    """Makes TensorBoard and `read_events` ignore earlier points from `step` on.

    `tf.summary` has no way to do so; TensorFlow 1's writer has.
    """
    tf.io.gfile.makedirs(directory)
    # TensorBoard reads files in the order of their names, which begin with the second: this one
    # must come after those of earlier sessions. It comes before those that `tf.summary` writes
    # next, whose names are longer.
    names = tf.io.gfile.glob(os.path.join(directory, f"{_EVENT_FILE}.*"))
    seconds = {int(found[1]) for found in map(_SECOND.search, names) if found}
    while int(time.time()) in seconds:
        time.sleep(0.02)
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    with (
        tf.Graph().as_default(),  # the writer refuses eager execution
        tf.compat.v1.summary.FileWriter(directory) as writer,
    ):
        writer.add_session_log(start, step)


class Events(NamedTuple):
    """The recorded events of a run."""

    scalars: dict[str, np.ndarray]  # float64 `[n, 2]`: steps, values; by tag
    views: bytes | None  # the last picture of augmented views, a PNG, if any
    views_step: int  # the step of that picture
    seconds: float  # from the first point to the last, pauses included


def read_events(directory: str) -> Events:
    """Reads the events of a run, without purged points.

    Without event files in the directory, the result is empty.
    """
    if not tf.io.gfile.glob(os.path.join(directory, "events.*")):
        return Events({}, None, 0, 0.0)
    events = event_accumulator.EventAccumulator(
        directory, size_guidance={event_accumulator.TENSORS: 0}
    )
    events.Reload()
    scalars, views, times = {}, [], [0.0]
    for tag in events.Tags()["tensors"]:
        kind = events.SummaryMetadata(tag).plugin_data.plugin_name
        points = events.Tensors(tag)
        if kind == "scalars":
            values = [float(tf.make_ndarray(p.tensor_proto)) for p in points]
            scalars[tag] = np.column_stack([[p.step for p in points], values])
            times = [p.wall_time for p in points]
        elif tag == _VIEWS:
            views = points
    # A picture is a tensor of its width, its height and its PNG.
    png = tf.make_ndarray(views[-1].tensor_proto)[2] if views else None
    step = views[-1].step if views else 0
    return Events(scalars, png, step, times[-1] - times[0])


def write_result(directory: str, result: Mapping[str, Any], step: int) -> None:
    """Writes the result of an evaluation of a run after `step` steps.

    The files are `result.json`, `result_STEP.json` and TensorBoard's events in the folder `eval`,
    which hold the floats of the result.
    """
    for name in ("result.json", f"result_{step}.json"):
        storage.write_json(os.path.join(directory, name), result)
    writer = tf.summary.create_file_writer(os.path.join(directory, "eval"))
    with writer.as_default(step):
        for name, value in result.items():
            if isinstance(value, float):
                tf.summary.scalar(f"eval/{name}", value)
    writer.close()
