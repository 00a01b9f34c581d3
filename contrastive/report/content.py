# SPDX-License-Identifier: Apache-2.0
"""The report of a run: reads its content and its images, writes the files."""

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging
from tensorboard.plugins import projector

import data
from contrastive import run_record, storage
from contrastive.evaluation import features, probe
from contrastive.report import events, page

_PIXELS_OF_AN_IMAGE = 96  # at most, as shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The encoder that a report is about, and its test images."""

    model_dir: str  # directory where the report is written
    dataset: data.Dataset  # the split on which the encoder was evaluated
    dataset_name: str  # as given by the user
    image_size: int  # side of the encoder's input images, pixels
    crop_proportion: float | None  # central share that it is given; None: all
    trained: str  # run directory or checkpoint of the encoder
    command: Sequence[str]  # that writes the report, as in `sys.argv`


def write_classifier_report(
    subject: Subject,
    measured: Mapping[str, float],
    predictions: np.ndarray,
    outputs: features.Outputs,
) -> None:
    """Writes the report of a trained classifier.

    `measured` and `predictions` are the results of `classifier.evaluate`, and `outputs` are of the
    encoder, for the images of `choose`.
    """
    _, labels, predicted = predictions.T
    counts = np.bincount(labels[labels >= 0], minlength=1)
    most_frequent = counts.max() / max(counts.sum(), 1)
    rows = {
        "the most frequent class": {"top-1": [most_frequent]},
        "this classifier": {f"top-{k}": [measured[f"top_{k}_accuracy"]] for k in (1, 5)},
    }
    caption = f"Accuracy on {measured['num_examples']:,} test images, %."
    names = subject.dataset.class_names
    _write(
        subject,
        page.results(rows, caption=caption),
        outputs,
        page.confusion(labels, predicted, names, of="The classifier"),
    )


def write_probe_report(subject: Subject, results: probe.Results) -> None:
    """Writes the report of a probe, of whose encoders `subject` is the last."""
    test = features.Outputs(
        values=results.test_features,
        labels=results.test_labels,
        ids=results.test_ids,
    )
    knn = f"{results.knn_k}-NN"
    budgets = {name: f"{name}, {count:,} labels" for name, count in results.num_labels.items()}
    rows = {
        scores.name: {"linear": [scores.linear], knn: [scores.knn]}
        | {budgets[k]: draws for k, draws in scores.few_labels.items()}
        for scores in results.scores
    }
    caption = (
        f"Top-1 accuracy on {len(test.labels):,} images of {results.dataset}, "
        f"{results.test_split}, %. Linear: logistic regression on "
        f"{results.num_train:,} labels of {results.train_split}; the others, "
        "on fewer labels, are means over draws ± their standard deviation. "
        f"{knn}: weighted nearest neighbours."
    )
    confusion = page.confusion(
        test.labels,
        results.test_predictions,
        results.class_names,
        of="Logistic regression on the encoder's features",
    )
    table = page.results(rows, caption=caption)
    _write(subject, table, test.rows(choose(test.labels)), confusion)


def _write(
    subject: Subject,
    table: page.Section,
    outputs: features.Outputs,
    confusion: page.Section,
) -> None:
    """Writes `report.html` and the projector's files to `model_dir`."""
    sample = take(subject.dataset, outputs, subject.image_size, subject.crop_proportion)
    lineage = dict(_lineage(subject.trained))
    runs = list(lineage.values())
    history, seconds = _history(lineage)
    title, facts = _summary(subject, runs)
    if seconds:
        facts["First to last step"] = events.duration(seconds)
    facts["Features"] = f"{sample.embeddings.shape[1]:,}"
    facts["Written"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    sections = [
        table,
        *history,
        page.embedding_map(sample),
        page.neighbours(sample),
        confusion,
        page.reproduction(subject.command, runs),
    ]
    classes = [sample.class_of(i) for i in range(len(sample.labels))]
    write_projector(
        subject.model_dir,
        sample.embeddings,
        sample.images,
        {"class": classes, "image": sample.names},
    )
    path = os.path.join(subject.model_dir, "report.html")
    storage.write_whole(path, page.render(title, facts, sections))
    logging.info("Report: %s", path)


def _history(
    lineage: Mapping[str, Mapping[str, Any]],
) -> tuple[list[page.Section], float]:
    """Returns the curves of runs, their augmented views, and their seconds."""
    curves, views, seconds = [], page.views(None, 0), 0.0
    for directory, run in reversed(list(lineage.items())):
        recorded = events.read_events(directory)
        pretrains = run["flags"]["train_mode"] == "pretrain"
        title = "Pretraining" if pretrains else "Fine-tuning"
        curves.append(page.curves(title, recorded.scalars))
        seconds += recorded.seconds
        if pretrains or views.missing:
            views = page.views(recorded.views, recorded.views_step)
    return [*(curves or [page.curves("Training", {})]), views], seconds


def _summary(subject: Subject, runs: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """Returns the title of the page, and the facts that stand below it."""
    split = subject.dataset.split
    facts = {"Evaluated on": f"{subject.dataset_name}, {split}"}
    if not runs:
        return os.path.basename(subject.trained.rstrip("/")), facts
    first, architecture = runs[-1]["flags"], runs[0]["architecture"]
    title = f"{first['objective']} on {first['dataset']}"
    if first["train_mode"] == "finetune":  # of another program's weights
        weights = os.path.basename(first["checkpoint"] or "no weights")
        title = f"{weights}, fine-tuned on {first['dataset']}"
    encoder = architecture["encoder"]
    if encoder == "resnet":
        width = architecture["width_multiplier"]
        encoder = f"ResNet-{architecture['resnet_depth']} x{width:g}"
    steps = [f"{run['train_steps']:,}" for run in reversed(runs)]
    return title, facts | {"Encoder": encoder, "Steps": " + ".join(steps)}


def _lineage(path: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a run's directory and `run.json`, then those it started from."""
    seen = set()
    while path and path not in seen:
        seen.add(path)
        found = run_record.read_run(path)
        if not found or "flags" not in found:  # of an export
            return
        yield run_record.run_directory(path), found
        path = found["flags"].get("checkpoint")


def choose(labels: np.ndarray, limit: int = 1_000) -> np.ndarray:
    """Chooses the examples to show, the same ones at every call.

    The labels are int `[N]`, -1 where there is none. The result is at most `limit` int64 positions,
    ascending. If there are more than 20 classes, the examples are of 20 of them.
    """
    classes = np.unique(labels[labels >= 0])
    count = min(page.MAX_CLASSES, len(classes))
    spread = np.linspace(0, len(classes) - 1, count)
    classes = classes[spread.round().astype(int)]
    candidates = np.arange(len(labels))
    if len(classes):
        candidates = candidates[np.isin(labels, classes)]
    order = np.random.default_rng(0).permutation(candidates)
    return np.sort(order[:limit])


def take(
    dataset: data.Dataset,
    outputs: features.Outputs,
    image_size: int,
    crop_proportion: float | None = None,
) -> page.Sample:
    """Reads the images that belong to an encoder's outputs.

    The other arguments are those of `features.compute_outputs` that gave the outputs; images are
    shown with at most 96 pixels a side.
    """
    size = min(image_size, _PIXELS_OF_AN_IMAGE)

    def shrink(images: tf.Tensor, **_: bool) -> tf.Tensor:
        return page.thumbnails(images, size)

    chosen = data.subset(dataset, outputs.ids)
    shown = features.compute_outputs(shrink, chosen, image_size, crop_proportion=crop_proportion)
    shown = shown.rows(np.searchsorted(shown.ids, outputs.ids))
    names = dataset.file_names
    return page.Sample(
        images=shown.values.astype(np.uint8),
        embeddings=outputs.values,
        labels=outputs.labels,
        names=[names[i] if names else f"example {i}" for i in outputs.ids],
        class_names=dataset.class_names,
    )


def write_projector(
    directory: str,
    embeddings: np.ndarray,
    images: np.ndarray,
    columns: Mapping[str, Sequence[str]],
) -> None:
    """Writes the files that TensorBoard's projector shows.

    The embeddings are float `[n, d]`, the images uint8 `[n, s, s, c]`, and the columns texts that
    describe each image, by the name of the column.
    """

    def table(rows: Iterable[Iterable[str]]) -> bytes:
        lines = ("\t".join(" ".join(cell.split()) for cell in r) for r in rows)
        # File names may hold bytes that are no text.
        return "".join(f"{x}\n" for x in lines).encode("utf-8", "replace")

    # TensorBoard expects names only above several columns.
    header = [columns] if len(columns) > 1 else []
    files = {
        "embeddings.tsv": table(map("{:.5g}".format, x) for x in embeddings),
        "metadata.tsv": table([*header, *zip(*columns.values(), strict=True)]),
        "sprite.png": tf.io.encode_png(page.sprite(images)).numpy(),
    }
    for name, content in files.items():
        storage.write_whole(f"{directory}/projector/{name}", content)
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
