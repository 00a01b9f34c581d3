# SPDX-License-Identifier: Apache-2.0
"""What the report of a run shows: gathered here, drawn by `report.py`."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

import data
import data_util
import model
from contrastive.commands.experiment import Run
from contrastive.evaluation import features, probe
from contrastive.report import report, reporting
from contrastive.weights import checkpoint

_BATCH_SIZE = 256
_PIXELS_OF_AN_IMAGE = 96  # at most, as shown


def of_classifier(
    run: Run, measured: dict[str, float], predictions: np.ndarray
) -> None:
    """Writes the report of a trained classifier."""
    ids, labels, predicted = predictions.T
    counts = np.bincount(labels[labels >= 0], minlength=1)
    with run.strategy.scope():
        encoder = model.encoder_of_images(run.networks)
    outputs = features.compute_outputs(
        encoder,
        data.subset(run.eval_data, ids[report.choose(labels)]),
        run.settings.image_size,
        **run.forward_options(),
    )
    if not run.is_chief:
        return
    table = report.results(
        {
            "the most frequent class": {
                "top-1": [counts.max() / max(counts.sum(), 1)]
            },
            "this classifier": {
                "top-1": [measured["top_1_accuracy"]],
                "top-5": [measured["top_5_accuracy"]],
            },
        },
        caption=f"Accuracy on {measured['num_examples']:,} test images, %.",
    )
    confusion = report.confusion(
        labels,
        predicted,
        run.eval_data.class_names,
        of="The classifier",
    )
    _write(run, table, outputs, confusion, run.settings.model_dir)


def of_probe(run: Run, found: probe.Results) -> None:
    """Writes the report of a probe."""
    chosen = report.choose(found.test_labels)
    outputs = features.Outputs(
        values=found.test_features[chosen],
        labels=found.test_labels[chosen],
        ids=found.test_ids[chosen],
    )
    budgets = {
        name: f"{name}, {count:,} labels"
        for name, count in found.num_labels.items()
    }
    table = report.results(
        {
            scores.name: {
                "linear": [scores.linear],
                f"{found.knn_k}-NN": [scores.knn],
            }
            | {budgets[k]: draws for k, draws in scores.few_labels.items()}
            for scores in found.scores
        },
        caption=f"Top-1 accuracy on {len(found.test_labels):,} images of "
        f"{found.dataset}, {found.test_split}, %. Linear: logistic regression "
        f"on {found.num_train:,} labels of {found.train_split}; the others, on "
        "fewer labels, are means over draws ± their standard deviation. "
        f"{found.knn_k}-NN: weighted nearest neighbours.",
    )
    confusion = report.confusion(
        found.test_labels,
        found.test_predictions,
        found.class_names,
        of="Logistic regression on the encoder's features",
    )
    _write(run, table, outputs, confusion, run.settings.checkpoint)


def take_sample(
    dataset: data.Dataset,
    outputs: features.Outputs,
    image_size: int,
    crop_proportion: float | None = None,
) -> report.Sample:
    """Returns images of a split beside what an encoder makes of them.

    Args:
        dataset: the split.
        outputs: of the encoder, for those of its examples that are wanted.
        image_size: side of the images that the encoder sees, pixels.
        crop_proportion: central share of an image that it sees; None: all.
    """
    size = min(image_size, _PIXELS_OF_AN_IMAGE)
    on_device = None if dataset.is_encoded else crop_proportion
    thumbnails: dict[int, np.ndarray] = {}
    for batch in data.eval_stream(
        data.subset(dataset, outputs.ids),
        batch_size=_BATCH_SIZE,
        image_size=image_size,
        crop_proportion=crop_proportion,
    ):
        images = data_util.eval_images(
            batch["image"], image_size, crop_proportion=on_device
        )
        pairs = zip(
            batch["id"].numpy(), report.thumbnails(images, size), strict=True
        )
        thumbnails.update(pairs)
    names = dataset.file_names
    return report.Sample(
        images=np.stack([thumbnails[i] for i in outputs.ids]),
        embeddings=outputs.values,
        labels=outputs.labels,
        names=[names[i] if names else f"example {i}" for i in outputs.ids],
        class_names=dataset.class_names,
    )


def _write(
    run: Run,
    table: report.Section,
    outputs: features.Outputs,
    confusion: report.Section,
    trained: str,
) -> None:
    """Writes `report.html` and the projector's files to `model_dir`.

    Args:
        run: which evaluates.
        table: of results.
        outputs: of the encoder, for the test images to show.
        confusion: its section.
        trained: run directory or checkpoint whose encoder this is about.
    """
    settings = run.settings
    sample = take_sample(
        run.eval_data, outputs, settings.image_size, run.eval_crop
    )
    lineage = dict(_lineage(trained))
    runs = list(lineage.values())
    curves, views, seconds = [], report.views(None, 0), 0.0
    for directory, one in reversed(lineage.items()):
        events = reporting.read_events(directory)
        pretrains = one["flags"]["train_mode"] == "pretrain"
        title = "Pretraining" if pretrains else "Fine-tuning"
        curves.append(report.curves(title, events.scalars))
        seconds += events.seconds
        if pretrains or not views.parts:
            views = report.views(events.views, events.views_step)
    if not runs:
        curves = [report.curves("Training", {})]
    title = os.path.basename(trained.rstrip("/"))
    facts = {"Evaluated on": f"{settings.dataset}, {run.eval_data.split}"}
    if runs:
        first = runs[-1]["flags"]
        title = f"{first['objective']} on {first['dataset']}"
        if first["train_mode"] == "finetune":  # of another program's weights
            weights = os.path.basename(first["checkpoint"] or "no weights")
            title = f"{weights}, fine-tuned on {first['dataset']}"
        steps = [f"{one['train_steps']:,}" for one in reversed(runs)]
        facts |= {
            "Encoder": _encoder_name(**runs[0]["architecture"]),
            "Steps": " + ".join(steps),
        }
    if seconds:
        facts["First to last step"] = reporting.duration(seconds)
    facts |= {
        "Features": f"{sample.embeddings.shape[1]:,}",
        "Written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    text = report.page(
        title,
        facts,
        [
            table,
            *curves,
            views,
            report.embedding_map(sample),
            report.neighbours(sample),
            confusion,
            report.reproduction(sys.argv, runs),
        ],
    )
    reporting.write_projector(
        settings.model_dir,
        sample.embeddings,
        sample.images,
        {
            "class": [sample.class_of(i) for i in range(len(sample.labels))],
            "image": sample.names,
        },
    )
    logging.info("Report: %s", report.write(settings.model_dir, text))


def _encoder_name(
    encoder: str, resnet_depth: int, width_multiplier: float, **_: Any
) -> str:
    if encoder != "resnet":
        return encoder
    return f"ResNet-{resnet_depth} x{width_multiplier:g}"


def _lineage(path: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a run's directory and `run.json`, then those it started from."""
    seen = set()
    while path and path not in seen:
        seen.add(path)
        found = checkpoint.read_run(path)
        if not found or "flags" not in found:  # of an export
            return
        yield checkpoint.run_directory(path), found
        path = found["flags"].get("checkpoint")
