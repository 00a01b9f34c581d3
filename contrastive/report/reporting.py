# SPDX-License-Identifier: Apache-2.0
"""What a run tells: a progress line, TensorBoard events, JSON results."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tqdm
from absl import logging
from tensorboard.backend.event_processing import (
    plugin_event_accumulator as event_accumulator,
)
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins import projector

_SECONDS_BETWEEN_LINES = 10.0
_VIEWS = "augmented_views"  # tag
_EVENT_FILE = "events.out.tfevents"  # and .SECOND.MACHINE...
_SECOND = re.compile(rf"{re.escape(_EVENT_FILE)}\.(\d+)\.")
_PIXELS_OF_A_VIEW = 96  # at least, in the grid of views
# Shown in the progress line where a step reports them, under a short name.
_HEADLINES = {
    "contrastive_loss": "loss",
    "loss": "loss",
    "contrast_accuracy": "contrast",
    "probe_top_1_accuracy": "probe",
    "top_1_accuracy": "top-1",
}


class Reporter:
    """Shows the progress of training and records its metrics.

    Every point is written against the optimizer step. After a resume, points
    of steps beyond the checkpoint are declared void, so that curves go on
    where the restored state was.

    Args:
        directory: where TensorBoard events are written.
        train_steps: optimizer steps in all.
        batch_size: images a step.
        num_examples: images an epoch.
        summary_steps: steps between TensorBoard points; 0: none.
        learning_rate: function of the step.
        preview: from a step to some of its augmented images, one float32
            `[n, s, s, c]` in [0, 1] a view.
    """

    def __init__(
        self,
        directory: str,
        *,
        train_steps: int,
        batch_size: int,
        num_examples: int,
        summary_steps: int,
        learning_rate: Callable[[int], Any],
        preview: Callable[[int], list[np.ndarray]],
    ) -> None:
        self._directory = directory
        self._train_steps = train_steps
        self._batch_size = batch_size
        self._num_examples = num_examples
        self._summary_steps = summary_steps
        self._learning_rate = learning_rate
        self._preview = preview
        self._writer = tf.summary.create_noop_writer()
        self._bar: tqdm.tqdm | None = None
        self._last_line = 0.0

    def start(self, step: int) -> None:
        """Begins, or goes on, at `step`."""
        if self._summary_steps:
            _start_session(self._directory, step)
            self._writer = tf.summary.create_file_writer(self._directory)
            with self._writer.as_default(step):
                grid = image_grid(self._preview(step))
                tf.summary.image(_VIEWS, grid[None])
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=self._train_steps,
                initial=step,
                unit="step",
                dynamic_ncols=True,
            )

    def progress(
        self,
        step: int,
        names: list[str],
        history: np.ndarray,
        seconds_a_step: float | None,
    ) -> None:
        """Shows and records the steps just done.

        The first step whose metrics are not finite is always shown and
        recorded; the steps after it are not.

        Args:
            step: optimizer steps done in all.
            names: of the metrics.
            history: float32 `[steps, metrics]` of the steps up to `step`.
            seconds_a_step: None while it is not known yet.
        """
        rate = self._batch_size / seconds_a_step if seconds_a_step else None
        first = step - len(history) + 1
        bad = np.flatnonzero(~np.isfinite(history).all(axis=1))
        last = self._train_steps
        if len(bad):
            history = history[: bad[0] + 1]
            last = step = first + int(bad[0])
        rows = [dict(zip(names, row, strict=True)) for row in history]
        self._show(step, rows[-1], rate, is_last=step == last)
        if not self._summary_steps:
            return
        # The step's own values, no means: after a resume they are the same.
        for done, metrics in enumerate(rows, start=first):
            if done % self._summary_steps == 0 or done == last:
                self._record(done, metrics, rate)

    def show_last(
        self, step: int, names: list[str], metrics: np.ndarray
    ) -> None:
        """Shows and records a step that ends the run, if that was not done.

        Args:
            step: optimizer steps done in all.
            names: of the metrics.
            metrics: float32 `[metrics]` of this step.
        """
        values = dict(zip(names, metrics, strict=True))
        self._show(step, values, None, is_last=True)
        is_recorded = step == self._train_steps or (
            not self._summary_steps or step % self._summary_steps == 0
        )
        if not is_recorded:
            self._record(step, values, None)

    def flush(self) -> None:
        """Makes sure that what was recorded is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Finishes the line and the events."""
        self._writer.close()
        if self._bar:
            self._bar.close()

    def _record(
        self, step: int, metrics: dict[str, float], rate: float | None
    ) -> None:
        with self._writer.as_default(step):
            for name, value in metrics.items():
                tf.summary.scalar(f"train/{name}", value)
            # The rate that the step from `step - 1` to `step` used.
            tf.summary.scalar(
                "train/learning_rate", self._learning_rate(step - 1)
            )
            tf.summary.scalar(
                "train/epoch", step * self._batch_size / self._num_examples
            )
            if rate:
                tf.summary.scalar("train/images_per_second", rate)

    def _show(
        self,
        step: int,
        metrics: dict[str, float],
        rate: float | None,
        is_last: bool,
    ) -> None:
        epoch = step * self._batch_size / self._num_examples
        words = [f"epoch {epoch:.2f}"]
        if rate:
            words.append(f"{rate:,.0f} images/s")
        shown = {
            short: metrics[name]
            for name, short in reversed(_HEADLINES.items())
            if name in metrics
        }
        words += [f"{name} {value:.4g}" for name, value in shown.items()]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES
        if due or is_last:
            self._last_line = now
            if rate:
                left = (self._train_steps - step) * self._batch_size / rate
                words.append(f"{duration(left)} left")
            logging.info(
                "step %d/%d, %s", step, self._train_steps, ", ".join(words)
            )


def image_grid(views: list[np.ndarray]) -> np.ndarray:
    """Returns one picture: a column for every image, a row for every view.

    Args:
        views: one float32 `[n, s, s, c]` in [0, 1] a view. Smaller views are
            padded with white; more or fewer than 3 channels show as grey.

    Returns:
        float32 `[len(views) * S, n * S, 3]`, S the largest size, or the least
        multiple of it that can be seen well.
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


def sprite(images: np.ndarray) -> np.ndarray:
    """Returns images as one picture, row by row, as square as can be.

    Args:
        images: uint8 `[n, s, s, c]`.

    Returns:
        uint8 `[rows * s, columns * s, c]`, black where there is no more.
    """
    count, size = images.shape[:2]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, *images.shape[1:]), np.uint8)
    tiles[:count] = images
    tiles = tiles.reshape(rows, columns, *images.shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * size, columns * size, -1)


def write_projector(
    directory: str,
    embeddings: np.ndarray,
    images: np.ndarray,
    columns: dict[str, Sequence[str]],
) -> None:
    """Writes what TensorBoard's projector shows of a run.

    Args:
        directory: of the run.
        embeddings: float `[n, d]`.
        images: uint8 `[n, s, s, c]`.
        columns: what is known of each image, by name.
    """
    folder = os.path.join(directory, "projector")
    tf.io.gfile.makedirs(folder)
    lines = ["\t".join(columns)] if len(columns) > 1 else []
    for row in zip(*columns.values(), strict=True):
        cells = (" ".join(cell.split()) for cell in row)
        lines.append("\t".join(cells).encode("utf-8", "replace").decode())
    files = {
        "embeddings.tsv": "".join(
            "\t".join(f"{x:.5g}" for x in row) + "\n" for row in embeddings
        ),
        "metadata.tsv": "".join(f"{line}\n" for line in lines),
        "sprite.png": tf.io.encode_png(sprite(images)).numpy(),
    }
    for name, content in files.items():
        mode = "wb" if isinstance(content, bytes) else "w"
        with tf.io.gfile.GFile(os.path.join(folder, name), mode) as file:
            file.write(content)
    config = projector.ProjectorConfig()
    # Relative, so that the directory can be moved.
    embedding = config.embeddings.add(
        tensor_name="test embeddings",
        tensor_path="projector/embeddings.tsv",
        metadata_path="projector/metadata.tsv",
    )
    embedding.sprite.image_path = "projector/sprite.png"
    embedding.sprite.single_image_dim.extend(images.shape[2:0:-1])
    projector.visualize_embeddings(directory, config)


class Events(NamedTuple):
    """What a run has recorded.

    Attributes:
        scalars: float64 `[n, 2]` of steps and values, by tag.
        views: the last picture of augmented views, a PNG; None: there is none.
        views_step: the step whose views these are.
        seconds: from the first point to the last, pauses included.
    """

    scalars: dict[str, np.ndarray]
    views: bytes | None
    views_step: int
    seconds: float


def read_events(directory: str) -> Events:
    """Returns what a run has recorded, without points declared void."""
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
            scalars[tag] = np.array(
                [
                    (p.step, float(tf.make_ndarray(p.tensor_proto)))
                    for p in points
                ]
            )
            times = [p.wall_time for p in points]
        elif tag == _VIEWS:
            views = points
    # A picture is a tensor of its width, its height and its PNG.
    png = tf.make_ndarray(views[-1].tensor_proto)[2] if views else None
    step = views[-1].step if views else 0
    return Events(scalars, png, step, times[-1] - times[0])


def write_json(directory: str, name: str, content: dict[str, Any]) -> None:
    """Writes a JSON file into a directory; whole or not at all."""
    tf.io.gfile.makedirs(directory)
    path = os.path.join(directory, name)
    with tf.io.gfile.GFile(path + ".tmp", "w") as file:
        json.dump(content, file, indent=2)
    tf.io.gfile.rename(path + ".tmp", path, overwrite=True)


def write_result(directory: str, result: dict[str, Any], step: int) -> None:
    """Writes `result.json`, `result_STEP.json` and TensorBoard's `eval` run."""
    for name in ("result.json", f"result_{step}.json"):
        write_json(directory, name, result)
    writer = tf.summary.create_file_writer(os.path.join(directory, "eval"))
    with writer.as_default(step):
        for name, value in result.items():
            if isinstance(value, float):
                tf.summary.scalar(f"eval/{name}", value)
    writer.close()


def _start_session(directory: str, step: int) -> None:
    """Tells TensorBoard that points from `step` + 1 on are new.

    At every start but the first it then forgets what an earlier session, which
    was killed, had written from there on.
    """
    tf.io.gfile.makedirs(directory)
    # TensorBoard reads files in the order of their names, which begin with the
    # second: this one must come after those of earlier sessions.
    names = tf.io.gfile.glob(os.path.join(directory, f"{_EVENT_FILE}.*"))
    seconds = {int(found[1]) for found in map(_SECOND.search, names) if found}
    while int(time.time()) in seconds:
        time.sleep(0.02)
    now = time.time()
    # A file's second is followed by the name of the machine. Without it, this
    # file comes before those that are written next.
    path = os.path.join(directory, f"{_EVENT_FILE}.{int(now):010d}..session")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    with tf.io.TFRecordWriter(path) as file:
        for event in (
            event_pb2.Event(wall_time=now, file_version="brain.Event:2"),
            event_pb2.Event(wall_time=now, step=step + 1, session_log=start),
        ):
            file.write(event.SerializeToString())


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as `h:mm:ss`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
