# SPDX-License-Identifier: Apache-2.0
"""The page of a report: its sections, and the template that shows them.

A section is a pure function of arrays and names that computes the content of a macro in
`template.html`. The template escapes every text. The page holds all that it shows: nothing is
loaded from anywhere.
"""

import base64
import dataclasses
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tensorflow as tf
import threadpoolctl
from sklearn.manifold import TSNE

MAX_CLASSES = 20  # that a person can tell apart, in a map or a matrix
_QUERIES, _NEIGHBOURS = 8, 8
_PIXELS_OF_A_POINT = 48  # at most, of the picture beside the pointer
_POINTS_OF_A_CURVE = 150  # about as many as can be told apart
_CONFUSIONS = 20  # of more classes than fit a matrix
_CURVES = {
    "train/loss": "Loss",
    "train/contrastive_loss": "Contrastive loss",
    "train/contrast_accuracy": "Contrastive accuracy",
    "train/probe_top_1_accuracy": "Linear probe, top-1",
    "train/top_1_accuracy": "Top-1, training images",
    "train/learning_rate": "Learning rate",
    "train/effective_rank": "Effective rank",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some images with their embeddings."""

    images: np.ndarray  # uint8 `[n, s, s, 3]`
    embeddings: np.ndarray  # float32 `[n, d]`
    labels: np.ndarray  # int `[n]`, -1 where there is none
    names: Sequence[str]  # one name an image
    class_names: Sequence[str]  # one name a label; () where there are none

    def class_of(self, i: int) -> str:
        """Returns the name of an image's class; "" where it has none."""
        label = self.labels[i]
        return self.class_names[label] if label >= 0 else ""

    def caption(self, i: int) -> str:
        """Returns the name of an image, after that of its class."""
        name = self.class_of(i)
        return f"{name}: {self.names[i]}" if name else self.names[i]


class Section(NamedTuple):
    """A part of the page, or the reason why it is not there."""

    title: str
    macro: str = ""  # of the template, which shows the content
    content: Mapping[str, Any] = {}  # arguments of the macro
    missing: str = ""  # why there is no such section; "" if there is one


def results(rows: Mapping[str, Mapping[str, Sequence[float]]], *, caption: str) -> Section:
    """Makes a table of shares in %, with the best of each column in bold.

    The rows are draws in [0, 1], by the name of the row and of the column; several draws are shown
    as their mean and standard deviation.
    """
    cells = {
        name: {column: np.asarray(draws) for column, draws in row.items()}
        for name, row in rows.items()
    }
    best: dict[str, float] = {}
    for row in cells.values():
        for column, draws in row.items():
            best[column] = max(best.get(column, 0.0), draws.mean())
    content = {"caption": caption, "rows": cells, "best": best}
    return Section("Results", "results", content)


def curves(title: str, scalars: Mapping[str, np.ndarray]) -> Section:
    """Makes a section of small charts, the important metrics first.

    The scalars are float `[n, 2]` of steps and values, by TensorBoard tag.
    """
    drawn: dict[str, np.ndarray] = {}
    for tag in dict.fromkeys([*_CURVES, *scalars]):
        points = scalars.get(tag, np.zeros((0, 2)))
        points = points[np.isfinite(points).all(axis=1)]
        # Without a penalty, the loss is the contrastive loss: once is enough.
        is_new = not any(
            points.shape == other.shape and np.allclose(points, other, 1e-3)
            for other in drawn.values()
        )
        if len(points) > 1 and tag != "train/epoch" and is_new:
            drawn[tag] = points
    if not drawn:
        return Section(title, missing="TensorBoard's events have no curve of it")
    charts = [_chart(tag, points) for tag, points in drawn.items()]
    return Section(title, "curves", {"charts": charts})


def views(png: bytes | None, step: int) -> Section:
    """Shows the picture of augmented views, as the model saw them."""
    title = "Augmented views"
    if not png:
        return Section(title, missing="TensorBoard's events have no picture of them")
    return Section(title, "views", {"uri": _uri("png", png), "step": step})


def embedding_map(sample: Sample) -> Section:
    """Draws a 2-D map of a sample's embeddings, coloured by class."""
    title = "Map of embeddings"
    points = project(sample.embeddings)
    if points is None:
        return Section(title, missing="fewer than 10 images, or all embeddings are equal")
    if np.ptp(points[:, 0]) < np.ptp(points[:, 1]):
        points = points[:, ::-1]  # wider than high, as is the box
    low, high = points.min(0), points.max(0)
    box = np.array([640, 480])
    scale = ((box - 24) / np.maximum(high - low, 1e-12)).min()
    points = (points - (low + high) / 2) * scale + box / 2
    known = sample.labels[sample.labels >= 0]
    labels, counts = np.unique(known, return_counts=True)
    images = sample.images / np.float32(255)
    shrunk = thumbnails(images, _PIXELS_OF_A_POINT)
    content = {
        "sample": sample,
        "points": points,
        "labels": labels.tolist(),
        "counts": counts,
        "pictures": _sprite(shrunk.numpy()),
    }
    return Section(title, "map", content)


def neighbours(sample: Sample) -> Section:
    """Shows some images of a sample, each with its nearest neighbours."""
    title = "Nearest neighbours"
    labels, n, k = sample.labels, len(sample.labels), _NEIGHBOURS
    if n <= k:
        return Section(title, missing=f"only {n} images")
    nearest, cosines = nearest_neighbours(sample.embeddings, k)
    known = labels >= 0
    agree = labels[nearest] == labels[:, None]
    marks = np.where(agree, "right", "wrong")
    marks[~known[nearest] | ~known[:, None]] = ""
    # The first image of each class, spread over the classes.
    queries = np.unique(labels, return_index=True)[1]
    if not known.any():
        queries = np.arange(n)
    spread = np.linspace(0, len(queries) - 1, min(_QUERIES, len(queries)))
    queries = queries[spread.round().astype(int)]
    used = np.unique([*queries, *nearest[queries].ravel()])
    content = {
        "sample": sample,
        "k": k,
        "agreement": agree[known].mean() if known.any() else None,
        "queries": queries,
        "nearest": nearest,
        "cosines": cosines,
        "marks": marks,
        "places": {i: place for place, i in enumerate(used)},
        "pictures": _sprite(sample.images[used]),
    }
    return Section(title, "neighbours", content)


def confusion(
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
    *,
    of: str,
) -> Section:
    """Makes a matrix of classes, or a list of the most frequent errors.

    Labels and predictions are int `[n]`; images whose label is -1 are ignored. `of` names the
    classifier.
    """
    title = "Confusion"
    known = labels >= 0
    if not known.any():
        return Section(title, missing="the test images have no labels")
    labels, predictions = labels[known], predictions[known]
    pairs, counts = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    totals = np.bincount(labels, minlength=len(class_names))
    shares = counts / totals[pairs[0]]
    note = f"{of}, {len(labels):,} test images."
    if len(class_names) <= MAX_CLASSES:
        matrix = np.zeros((len(class_names), len(class_names)))
        matrix[pairs[0], pairs[1]] = shares
        content = {"names": class_names, "shares": matrix, "totals": totals}
        return Section(title, "matrix", {"note": note, **content})
    wrong = np.flatnonzero(pairs[0] != pairs[1])
    wrong = wrong[np.lexsort((-shares[wrong], -counts[wrong]))][:_CONFUSIONS]
    rows = [(*(class_names[label] for label in pairs[:, i]), counts[i], shares[i]) for i in wrong]
    return Section(title, "errors", {"note": note, "rows": rows})


def reproduction(command: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Section:
    """Lists the commands, in their order, with their versions and flags.

    `command` is the last one, as in `sys.argv`; `runs` are `run.json` of the runs before it, the
    newest first. If the first of them has this very command, it is not shown twice.
    """
    steps: list[tuple[str, Mapping[str, Any] | None]] = [
        (_command(run["command"]), run) for run in reversed(runs)
    ]
    if not runs or list(runs[0]["command"]) != list(command):
        steps.append((_command(command), None))
    return Section("How to reproduce it", "reproduction", {"steps": steps})


def _command(arguments: Sequence[str]) -> str:
    words = [os.path.basename(arguments[0]), *arguments[1:]]
    return "python " + " \\\n  ".join(map(shlex.quote, words))


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Renders the page; the same arguments give the same text.

    The facts are shown under the title. Missing sections are listed at the end.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = templates.get_template("template.html").render(
        title=title, facts=facts, sections=sections
    )
    # File names may hold bytes that are no text.
    return text.encode("utf-8", "replace").decode()


def project(embeddings: np.ndarray) -> np.ndarray | None:
    """Computes a t-SNE, float `[n, 2]`, of `[n, d]` by cosine distance.

    None if there are fewer than 10 embeddings, or they do not differ.
    """
    unit = _normalized(embeddings)
    if len(unit) < 10 or np.ptp(unit, axis=0).max() < 1e-6:
        return None
    perplexity = min(30.0, (len(unit) - 1) / 3)
    # Its threads wait for each other actively: where others use the machine, many are ten times
    # slower than one.
    with threadpoolctl.threadpool_limits(1):
        return TSNE(perplexity=perplexity, random_state=0).fit_transform(unit)


def nearest_neighbours(embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the k most similar others of each embedding, by cosine.

    For float `[n, d]`, n > k, these are the int `[n, k]` positions, nearest first, and the float
    `[n, k]` cosines.
    """
    unit = _normalized(embeddings)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)


def _normalized(embeddings: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.maximum(length, 1e-12)


def thumbnails(images: tf.Tensor, size: int) -> tf.Tensor:
    """Shrinks images to at most `size` pixels; other channels become grey.

    From float `[n, s, s, c]` in [0, 1] to uint8 `[n, t, t, 3]`, where t
    is the smaller of s and `size`.
    """
    if images.shape[-1] != 3:
        images = tf.repeat(tf.reduce_mean(images, -1, keepdims=True), 3, -1)
    if images.shape[1] > size:
        images = tf.image.resize(images, [size, size], antialias=True)
    return tf.image.convert_image_dtype(images, tf.uint8, saturate=True)


def sprite(images: np.ndarray) -> np.ndarray:
    """Arranges images in one picture, row by row, as square as possible.

    From uint8 `[n, s, s, c]` to `[rows * s, columns * s, c]`, where `columns` is the square root of
    n, rounded up; black where there is no image left.
    """
    count, size = images.shape[:2]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, *images.shape[1:]), np.uint8)
    tiles[:count] = images
    tiles = tiles.reshape(rows, columns, *images.shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * size, columns * size, -1)


def _ticks(low: float, high: float, count: int) -> np.ndarray:
    """Returns at most about `count` round numbers in [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min(
        (f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= count),
        default=10,
    )
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def _chart(tag: str, points: np.ndarray) -> dict[str, Any]:
    """Computes a line chart of steps and values, for the macro `chart`."""
    name = tag.rpartition("/")[2].replace("_", " ").capitalize()
    name = _CURVES.get(tag, name)
    # Averages as many neighbouring points as keeps their number low.
    parts = np.array_split(points, min(len(points), _POINTS_OF_A_CURVE))
    line = np.stack([part.mean(0) for part in parts])
    is_share = name.startswith(("Top-", "Linear probe")) or "accuracy" in name
    low, high = line[:, 1].min(), line[:, 1].max()
    if is_share or (low >= 0 and low < 0.3 * high):
        low = 0.0
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    (first, first_value), (last, last_value) = points[0], points[-1]

    def x(steps: np.ndarray) -> np.ndarray:
        return 46 + (steps - first) / ((last - first) or 1) * (308 - 46)

    def y(values: np.ndarray) -> np.ndarray:
        return 148 - (values - low) / (high - low) * (148 - 8)

    def number(value: float) -> str:
        return f"{100 * value:.3g} %" if is_share else f"{value:.4g}"

    steps = _ticks(first, last, 4) if last > first else points[:1, 0]
    values = _ticks(low, high, 5)
    return {
        "name": name,
        "is_important": tag in _CURVES,
        "is_share": is_share,
        "last": number(last_value),
        "text": f"{name}: {number(first_value)} at step {first:,.0f}, "
        f"{number(last_value)} at step {last:,.0f}",
        "rows": np.column_stack([y(values), values]),
        "columns": np.column_stack([x(steps), steps]),
        "line": np.column_stack([x(line[:, 0]), y(line[:, 1])]),
    }


def _sprite(images: np.ndarray) -> dict[str, Any]:
    """Returns the picture of which the macro `thumb` shows a part."""
    picture = sprite(images)
    jpeg = tf.io.encode_jpeg(picture, quality=90).numpy()
    rows, columns = (side // images.shape[1] for side in picture.shape[:2])
    return {"uri": _uri("jpeg", jpeg), "columns": columns, "rows": rows}


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
