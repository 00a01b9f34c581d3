# SPDX-License-Identifier: Apache-2.0
"""`report.html`: one page that shows what a run has learned.

A section is a pure function of arrays and names; `page` joins sections. The
page is built as a tree of elements, so that it is balanced and whatever comes
from outside, such as names of classes and files, is escaped. It holds all it
shows: nothing is loaded from anywhere.
"""

import base64
import dataclasses
import math
import os
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import threadpoolctl
from sklearn.manifold import TSNE

from contrastive.report import reporting

_HERE = os.path.dirname(os.path.abspath(__file__))
_MAX_EXAMPLES = 1_000  # of a sample
_MAX_CLASSES = 20  # that a person can tell apart, in a map or a matrix
_QUERIES, _NEIGHBOURS = 8, 8
_PIXELS_OF_A_POINT = 48  # at most, of the picture beside the pointer
_POINTS_OF_A_CURVE = 150  # about as many as can be told apart
_CONFUSIONS = 20  # of more classes than fit a matrix
_HUES = 7  # in the style sheet, as --h0 ...
_SHAPES = (
    ("circle", {"r": "4.5"}),
    ("rect", {"x": "-4", "y": "-4", "width": "8", "height": "8"}),
    ("path", {"d": "M0-5.5 5 4H-5Z"}),
)
_CURVES = {
    "train/loss": "Loss",
    "train/contrastive_loss": "Contrastive loss",
    "train/contrast_accuracy": "Contrastive accuracy",
    "train/probe_top_1_accuracy": "Linear probe, top-1",
    "train/top_1_accuracy": "Top-1, training images",
    "train/learning_rate": "Learning rate",
    "train/effective_rank": "Effective rank",
}
_HIDDEN_CURVES = ("train/epoch",)


class Section(NamedTuple):
    """A part of the page, or the reason why it is not there."""

    title: str
    parts: Sequence[ET.Element] = ()
    missing: str = ""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some images with their embeddings.

    Attributes:
        images: uint8 `[n, s, s, 3]`.
        embeddings: float32 `[n, d]`.
        labels: int `[n]`, -1 where there is none.
        names: of the images.
        class_names: one a label; () where there are no labels.
    """

    images: np.ndarray
    embeddings: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    class_names: Sequence[str]

    def class_of(self, i: int) -> str:
        """Returns the name of an image's class; "" where it has none."""
        label = self.labels[i]
        return self.class_names[label] if label >= 0 else ""


def choose(labels: np.ndarray, limit: int = _MAX_EXAMPLES) -> np.ndarray:
    """Returns which examples to show, ascending, always the same ones.

    Args:
        labels: int `[N]`, -1 where there is none.
        limit: examples at most.

    Returns:
        int64 positions. Where there are more than 20 classes, of 20 of them.
    """
    classes = np.unique(labels[labels >= 0])
    if len(classes) > _MAX_CLASSES:
        spread = np.linspace(0, len(classes) - 1, _MAX_CLASSES).round()
        classes = classes[spread.astype(int)]
    candidates = np.arange(len(labels))
    if len(classes):
        candidates = candidates[np.isin(labels, classes)]
    order = np.random.default_rng(0).permutation(candidates)
    return np.sort(order[:limit])


def thumbnails(images: tf.Tensor, size: int) -> np.ndarray:
    """Returns images in [0, 1] as uint8 `[n, size, size, 3]`, or smaller."""
    if images.shape[-1] != 3:
        images = tf.repeat(tf.reduce_mean(images, -1, keepdims=True), 3, -1)
    if images.shape[1] > size:
        images = tf.image.resize(images, [size, size], antialias=True)
    return tf.image.convert_image_dtype(images, tf.uint8, saturate=True).numpy()


# Sections.


def results(
    rows: Mapping[str, Mapping[str, Sequence[float]]], *, caption: str
) -> Section:
    """Returns a table of shares in %; the best of each column stands out.

    Args:
        rows: by name, draws in [0, 1] by the name of their column. Of several
            draws, their mean and standard deviation are shown.
        caption: what was measured.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    best = {
        name: max(np.mean(row[name]) for row in rows.values() if name in row)
        for name in columns
    }

    def cell(row: Mapping[str, Sequence[float]], name: str) -> ET.Element:
        if name not in row:
            return _e("td", "–", class_="number")
        mean, spread = np.mean(row[name]), 100 * np.std(row[name])
        return _e(
            "td",
            _e("b" if mean == best[name] else "span", f"{100 * mean:.1f}"),
            _e("small", f" ± {spread:.1f}" if len(row[name]) > 1 else ""),
            _e("i", style=f"--share:{mean:.3f}"),
            class_="number bar",
        )

    heading = [_e("th", name, scope="col", class_="number") for name in columns]
    body = [
        [_e("th", name, scope="row"), *(cell(row, c) for c in columns)]
        for name, row in rows.items()
    ]
    return Section(
        "Results", [_table(caption, [_e("td"), *heading], body, "results")]
    )


def curves(title: str, scalars: Mapping[str, np.ndarray]) -> Section:
    """Returns a small chart of every metric, the important ones first.

    Args:
        title: of the section.
        scalars: float `[n, 2]` of steps and values, by TensorBoard tag.
    """
    charts: dict[str, ET.Element] = {}
    drawn: list[np.ndarray] = []
    for tag in dict.fromkeys([*_CURVES, *scalars]):
        points = scalars.get(tag, np.zeros((0, 2)))
        points = points[np.isfinite(points).all(axis=1)]
        # Without a penalty, the loss is the contrastive loss: once is enough.
        is_new = not any(
            points.shape == other.shape and np.allclose(points, other, 1e-3)
            for other in drawn
        )
        if len(points) > 1 and tag not in _HIDDEN_CURVES and is_new:
            drawn.append(points)
            name = tag.rpartition("/")[2].replace("_", " ").capitalize()
            charts[tag] = _chart(_CURVES.get(tag, name), points)
    if not charts:
        return Section(
            title, missing="TensorBoard's events have no curve of it"
        )
    first = [chart for tag, chart in charts.items() if tag in _CURVES]
    others = [chart for tag, chart in charts.items() if tag not in _CURVES]
    text = "Against the optimizer step; the number is the last value."
    parts = [_e("p", text), _e("div", *first, class_="charts")]
    if others:
        more = _e("summary", f"{len(others)} more curves")
        parts.append(_e("details", more, _e("div", *others, class_="charts")))
    return Section(title, parts)


def views(png: bytes | None, step: int) -> Section:
    """Returns the picture of augmented views, as the model saw them."""
    title = "Augmented views"
    if not png:
        return Section(
            title, missing="TensorBoard's events have no picture of them"
        )
    text = (
        "Training images as the model saw them: a column for every image, a "
        f"row for every view, at step {step:,}."
    )
    picture = _e("img", src=_data_uri("png", png), alt=text)
    return Section(
        title,
        [_e("p", text), _e("div", picture, class_="wide", tabindex="0")],
    )


def embedding_map(sample: Sample) -> Section:
    """Returns a 2-D map of a sample's embeddings, coloured by class."""
    title = "Map of embeddings"
    points = project(sample.embeddings)
    if points is None:
        return Section(
            title, missing="fewer than 10 images, or all embeddings are equal"
        )
    points = _fit(points, 640, 480)
    shown = [int(label) for label in np.unique(sample.labels) if label >= 0]
    marks = {label: _mark(i) for i, label in enumerate(shown)}
    text = (
        f"t-SNE of {len(points):,} test images by cosine distance"
        + (f", coloured by {len(shown)} classes" if shown else "")
        + ". Near means alike; axes and distances between groups have no "
        "meaning."
    )
    if len(shown) < len(sample.class_names):
        text += (
            f" All are of {len(shown)} of {len(sample.class_names)} classes."
        )
    plot = _e(
        "svg",
        *(
            _e(
                "use",
                _e("title", _caption(sample, i)),
                href=f"#{shape}",
                class_=hue,
                x=f"{x:.1f}",
                y=f"{y:.1f}",
                data_class=str(sample.labels[i]),
            )
            for i, (x, y) in enumerate(points)
            for hue, shape in [marks.get(int(sample.labels[i]), _mark(0))]
        ),
        viewBox="0 0 640 480",
        role="img",
        aria_label=text,
    )
    counts = np.bincount(sample.labels[sample.labels >= 0])
    legend = [
        _e(
            "li",
            _e(
                "button",
                _swatch(*marks[label]),
                _e("span", sample.class_names[label]),
                _e("small", f"{counts[label]}"),
                type="button",
                aria_pressed="false",
                data_class=str(label),
            ),
        )
        for label in shown
    ]
    tip = _e("div", _thumb(), _e("span"), class_="tip", hidden="")
    parts = [plot]
    if legend:
        heading = "Classes; press to see them alone"
        parts.append(_e("ul", *legend, class_="legend", aria_label=heading))
    small = thumbnails(sample.images / np.float32(255), _PIXELS_OF_A_POINT)
    div = _e("div", *parts, tip, id="map", class_="map", style=_sprite(small))
    return Section(title, [_e("p", text), _shapes(), div])


def neighbours(sample: Sample) -> Section:
    """Returns some images of a sample, each with those most like it."""
    title = "Nearest neighbours"
    n = len(sample.embeddings)
    if n <= _NEIGHBOURS:
        return Section(title, missing=f"only {n} images")
    nearest, cosines = nearest_neighbours(sample.embeddings, _NEIGHBOURS)
    known = sample.labels >= 0
    agree = sample.labels[nearest] == sample.labels[:, None]
    text = (
        f"Each image's {_NEIGHBOURS} nearest, by cosine of the embeddings, "
        f"among the same {n:,} test images."
    )
    if known.any():
        share = 100 * agree[known].mean()
        text += (
            f" Of all neighbours, {share:.1f} % are of the image's class; ✓ and"
            " ✗ mark those below, one image a class, not picked by hand."
        )
    _, firsts = np.unique(sample.labels, return_index=True)
    if not known.any():
        firsts = np.arange(n)
    spread = np.linspace(0, len(firsts) - 1, min(_QUERIES, len(firsts)))
    queries = firsts[spread.round().astype(int)]
    used = np.unique([*queries, *nearest[queries].ravel()])
    place = {int(i): position for position, i in enumerate(used)}

    def item(i: int, note: str, kind: str) -> ET.Element:
        thumb = _thumb(f"{_caption(sample, i)}{note}", place[i], len(used))
        if kind:
            thumb.append(_e("b", "✓" if kind == "right" else "✗"))
        name = sample.class_of(i) or os.path.basename(sample.names[i])
        return _e(
            "li",
            thumb,
            _e("span", name, title=_caption(sample, i)),
            class_=kind,
        )

    def row(query: int) -> ET.Element:
        found = []
        for i, cosine, agrees in zip(
            nearest[query], cosines[query], agree[query], strict=True
        ):
            kind = "right" if agrees else "wrong"
            if not (known[query] and known[i]):
                kind = ""
            note = f", cosine {cosine:.2f}{kind and f', {kind}'}"
            found.append(item(int(i), note, kind))
        return _e("ol", item(query, ", query", ""), *found, class_="query")

    rows = [row(int(query)) for query in queries]
    style = _sprite(sample.images[used])
    return Section(title, [_e("p", text), _e("div", *rows, style=style)])


def confusion(
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
    *,
    of: str,
) -> Section:
    """Returns what was taken for what.

    Args:
        labels: int `[n]`, true classes; rows of -1 are passed over.
        predictions: int `[n]`.
        class_names: one a class.
        of: what predicted.
    """
    title = "Confusion"
    known = labels >= 0
    if not known.any():
        return Section(title, missing="the test images have no labels")
    pairs, counts = np.unique(
        np.stack([labels[known], predictions[known]]),
        axis=1,
        return_counts=True,
    )
    totals = np.bincount(labels[known], minlength=len(class_names))
    shares = counts / totals[pairs[0]]
    note = f"{of}, {known.sum():,} test images."
    if len(class_names) <= _MAX_CLASSES:
        matrix = np.zeros((len(class_names), len(class_names)))
        matrix[pairs[0], pairs[1]] = shares
        return Section(title, [_matrix(matrix, totals, class_names, note)])
    wrong = np.flatnonzero(pairs[0] != pairs[1])
    wrong = wrong[np.lexsort((-shares[wrong], -counts[wrong]))][:_CONFUSIONS]
    rows = [
        [
            _e("th", class_names[pairs[0, i]], scope="row"),
            _e("td", class_names[pairs[1, i]]),
            _e("td", f"{counts[i]:,}", class_="number"),
            _e("td", f"{100 * shares[i]:.0f} %", class_="number"),
        ]
        for i in wrong
    ]
    heading = [
        _e("th", "class", scope="col"),
        _e("th", "taken for", scope="col"),
        _e("th", "images", scope="col", class_="number"),
        _e("th", "of its class", scope="col", class_="number"),
    ]
    return Section(
        title, [_table(f"The most frequent errors. {note}", heading, rows)]
    )


def reproduction(
    command: Sequence[str], runs: Sequence[Mapping[str, Any]]
) -> Section:
    """Returns the commands, in their order, and what they ran with.

    Args:
        command: the last one, as in `sys.argv`.
        runs: `run.json` of the runs it is made from, the newest first. One
            that has this very command is not shown twice.
    """
    parts = []
    for run in reversed(runs):
        parts.append(_command(run["command"]))
        parts.append(_run_details(run))
    if not runs or list(runs[0]["command"]) != list(command):
        parts.append(_command(command))
    return Section("How to reproduce it", parts)


def page(
    title: str, facts: Mapping[str, str], sections: Sequence[Section]
) -> str:
    """Returns the page, the same for the same arguments.

    Args:
        title: heading.
        facts: what stands under it, by name.
        sections: in their order.
    """
    body, links = [], []
    for i, section in enumerate(sections):
        if section.missing:
            continue
        name = f"section-{i}"
        links.append(_e("a", section.title, href=f"#{name}"))
        heading = _e("h2", section.title)
        body.append(_e("section", heading, *section.parts, id=name))
    missing = [
        _e("li", f"{section.title}: {section.missing}.")
        for section in sections
        if section.missing
    ]
    if missing:
        heading = _e("h2", "Left out")
        body.append(_e("section", heading, _e("ul", *missing), id="left-out"))
    pairs = [
        _e("div", _e("dt", name), _e("dd", value))
        for name, value in facts.items()
    ]
    root = _e(
        "html",
        _e(
            "head",
            _e("meta", charset="utf-8"),
            # Whatever this page might hold, it can load nothing.
            _e(
                "meta",
                http_equiv="Content-Security-Policy",
                content="default-src 'none'; img-src data:; style-src "
                "'unsafe-inline'; script-src 'unsafe-inline'",
            ),
            _e(
                "meta",
                name="viewport",
                content="width=device-width, initial-scale=1",
            ),
            _e("meta", name="color-scheme", content="light dark"),
            _e("title", title),
            _e("style", _read("report.css")),
        ),
        _e(
            "body",
            _e("header", _e("h1", title), _e("dl", *pairs)),
            _e("nav", *links, aria_label="Sections"),
            _e("main", *body),
            _e("script", _read("report.js")),
        ),
        lang="en",
    )
    text = ET.tostring(root, encoding="unicode", method="html")
    # File names may hold bytes that are no text.
    text = text.encode("utf-8", "replace").decode()
    return f"<!DOCTYPE html>\n{text}\n"


def write(directory: str, text: str) -> str:
    """Writes the page to `report.html`, whole or not at all.

    Returns:
        Its path.
    """
    tf.io.gfile.makedirs(directory)
    path = os.path.join(directory, "report.html")
    with tf.io.gfile.GFile(f"{path}.tmp", "w") as file:
        file.write(text)
    tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)
    return path


# Arithmetic.


def project(embeddings: np.ndarray) -> np.ndarray | None:
    """Returns a t-SNE of embeddings by cosine distance, float `[n, 2]`.

    None where there are fewer than 10, or they do not differ.
    """
    unit = _normalized(embeddings)
    if len(unit) < 10 or np.ptp(unit, axis=0).max() < 1e-6:
        return None
    perplexity = min(30.0, (len(unit) - 1) / 3)
    # Its threads wait for each other actively: where others use the machine,
    # many are ten times slower than one.
    with threadpoolctl.threadpool_limits(1):
        tsne = TSNE(perplexity=perplexity, random_state=0)
        return tsne.fit_transform(unit)


def nearest_neighbours(
    embeddings: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k most similar others of each, by cosine, nearest first.

    Args:
        embeddings: float `[n, d]`, n > k.
        k: neighbours.

    Returns:
        int `[n, k]` positions, and float `[n, k]` cosines.
    """
    unit = _normalized(embeddings)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return nearest, np.take_along_axis(cosines, nearest, axis=1)


def _normalized(embeddings: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.maximum(length, 1e-12)


def _fit(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Returns points scaled alike in x and y, centred, with a margin.

    On their side, if they are higher than wide.
    """
    if np.ptp(points[:, 0]) < np.ptp(points[:, 1]):
        points = points[:, ::-1]
    low, high = points.min(0), points.max(0)
    box = np.array([width, height])
    scale = ((box - 24) / np.maximum(high - low, 1e-12)).min()
    return (points - (low + high) / 2) * scale + box / 2


def _thinned(points: np.ndarray) -> np.ndarray:
    """Returns means of as many neighbouring points as keeps the number low."""
    parts = min(len(points), _POINTS_OF_A_CURVE)
    return np.stack([part.mean(0) for part in np.array_split(points, parts)])


def _ticks(low: float, high: float, count: int) -> np.ndarray:
    """Returns at most about `count` round numbers in [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min(
        (f for f in (1, 2, 5, 10) if (high - low) / (f * step) <= count),
        default=10,
    )
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


# Elements.


def _e(tag: str, *children: ET.Element | str, **attributes: str) -> ET.Element:
    """Returns an element; `_` in the name of an attribute stands for `-`."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    element = ET.Element(
        tag, {names[name]: value for name, value in attributes.items()}
    )
    for child in children:
        if isinstance(child, ET.Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def _read(name: str) -> str:
    """Returns a file from beside this one."""
    with open(os.path.join(_HERE, name), encoding="utf-8") as file:
        return file.read()


def _table(
    caption: str,
    heading: Sequence[ET.Element],
    rows: Sequence[Sequence[ET.Element]],
    class_: str = "",
) -> ET.Element:
    table = _e(
        "table",
        _e("caption", _e("span", caption)),
        _e("thead", _e("tr", *heading)),
        _e("tbody", *(_e("tr", *row) for row in rows)),
        class_=class_,
    )
    return _e("div", table, class_="wide", tabindex="0")


def _matrix(
    shares: np.ndarray,
    totals: np.ndarray,
    class_names: Sequence[str],
    note: str,
) -> ET.Element:
    def cell(i: int, j: int) -> ET.Element:
        share = shares[i, j]
        return _e(
            "td",
            f"{100 * share:.0f}" if share else "",
            class_="right" if i == j else "",
            style=f"--share:{share:.3f}",
            title=f"{class_names[i]} taken for {class_names[j]}: "
            f"{100 * share:.1f} % of {totals[i]}",
        )

    indices = range(len(class_names))
    corner = _e("td", "true \\ taken for", class_="corner")
    heading = [_e("th", _e("span", name), scope="col") for name in class_names]
    rows = [
        [
            _e("th", class_names[i], scope="row"),
            *(cell(i, j) for j in indices),
            _e("td", f"{totals[i]:,}", class_="total"),
        ]
        for i in indices
    ]
    caption = f"Per cent of the images of a row's class. {note}"
    images = _e("th", _e("span", "images"), scope="col")
    return _table(caption, [corner, *heading, images], rows, "matrix")


def _chart(name: str, points: np.ndarray) -> ET.Element:
    """Returns a line chart of steps and values."""
    width, height, left, right, top, bottom = 320, 170, 46, 12, 8, 22
    line = _thinned(points)
    is_share = name.startswith(("Top-", "Linear probe")) or "accuracy" in name
    low, high = line[:, 1].min(), line[:, 1].max()
    if is_share or (low >= 0 and low < 0.3 * high):
        low = 0.0
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    first, last = points[0, 0], points[-1, 0]

    def x(step: float) -> float:
        share = (step - first) / ((last - first) or 1)
        return left + share * (width - left - right)

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return height - bottom - share * (height - top - bottom)

    def number(value: float) -> str:
        return f"{100 * value:.3g} %" if is_share else f"{value:.4g}"

    grid = []
    for value in _ticks(low, high, 5):
        at = f"{y(value):.1f}"
        text = f"{100 * value:g}%" if is_share else f"{value:g}"
        grid.append(
            _e("line", x1=str(left), x2=str(width - right), y1=at, y2=at)
        )
        grid.append(
            _e("text", text, x=str(left - 6), y=at, dy=".35em", class_="end")
        )
    for step in _ticks(first, last, 4) if last > first else [first]:
        text = f"{step / 1000:g}k" if step >= 10_000 else f"{step:g}"
        grid.append(_e("text", text, x=f"{x(step):.1f}", y=str(height - 6)))
    path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
    values = points[:, 1]
    text = (
        f"{name}: {number(values[0])} at step {points[0, 0]:,.0f}, "
        f"{number(values[-1])} at step {points[-1, 0]:,.0f}"
    )
    return _e(
        "figure",
        _e("figcaption", name, _e("b", number(values[-1]))),
        _e(
            "svg",
            *grid,
            _e("polyline", points=path),
            viewBox=f"0 0 {width} {height}",
            role="img",
            aria_label=text,
        ),
    )


def _mark(i: int) -> tuple[str, str]:
    """Returns the names of hue and shape of the i-th class."""
    return f"hue{i % _HUES}", f"shape{i // _HUES % len(_SHAPES)}"


def _shapes() -> ET.Element:
    symbols = [
        _e("g", ET.Element(tag, attributes), id=f"shape{i}")
        for i, (tag, attributes) in enumerate(_SHAPES)
    ]
    return _e(
        "svg", _e("defs", *symbols), width="0", height="0", aria_hidden="true"
    )


def _swatch(hue: str, shape: str) -> ET.Element:
    mark = _e("use", href=f"#{shape}", class_=hue)
    return _e("svg", mark, viewBox="-7 -7 14 14", aria_hidden="true")


def _caption(sample: Sample, i: int) -> str:
    name = sample.class_of(i)
    return f"{name}: {sample.names[i]}" if name else sample.names[i]


def _sprite(images: np.ndarray) -> str:
    """Returns the style under which `_thumb` shows these images."""
    jpeg = tf.io.encode_jpeg(reporting.sprite(images), quality=90).numpy()
    columns = math.ceil(math.sqrt(len(images)))
    return (
        f"--sprite:url({_data_uri('jpeg', jpeg)});--columns:{columns};"
        f"--rows:{math.ceil(len(images) / columns)}"
    )


def _thumb(text: str = "", place: int = 0, count: int = 1) -> ET.Element:
    """Returns one picture of the sprite of `count`."""
    row, column = divmod(place, math.ceil(math.sqrt(count)))
    role = {"role": "img", "aria_label": text} if text else {}
    style = f"--column:{column};--row:{row}"
    return _e("span", class_="thumb", style=style, **role)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _command(arguments: Sequence[str]) -> ET.Element:
    program = os.path.basename(arguments[0])
    words = [shlex.quote(word) for word in (program, *arguments[1:])]
    return _e("pre", " \\\n  ".join([f"python {words[0]}", *words[1:]]))


def _run_details(run: Mapping[str, Any]) -> ET.Element:
    rows = [
        [
            _e("th", f"--{name}", scope="row"),
            _e("td", str(run["flags"][name])),
            _e("td", source),
        ]
        for name, source in sorted(run["sources"].items())
        if source != "default"
    ]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(run["versions"].items()))
    devices = ", ".join(run["devices"])
    commit = f"commit {run['commit']}, " if run.get("commit") else ""
    heading = [_e("th", h, scope="col") for h in ("flag", "value", "from")]
    return _e(
        "details",
        _e("summary", f"Versions, and {len(rows)} flags that are no defaults"),
        _e("p", f"{commit}{versions}; {devices}."),
        _table("Flags that are no defaults", heading, rows),
    )
