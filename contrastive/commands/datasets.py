# SPDX-License-Identifier: Apache-2.0
"""The splits of a run: training data, evaluation data, labels that are used."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

import data
from contrastive import run_record
from contrastive.config.resolve import Resolved
from contrastive.sources import labels
from contrastive.sources.splits import NoSuchSplit

# Splits that are tried in turn if none is given for evaluation.
_EVAL_SPLITS = ("test", "validation")
_LABEL_FLAGS = ("labelled_fraction", "labels_per_class", "labelled_file")
_DATA_FLAGS = ("dataset", "data_dir", "train_split", "seed")


def open_training_data(resolved: Resolved) -> data.Dataset:
    """Opens the training split, or the part of it that the flags choose.

    Raises:
        ValueError: if it does not exist, or its labels are needed and hidden.
    """
    names = ("mask_dir", "saliency") if resolved["mask_probability"] else ()
    masks = {name: resolved[name] for name in names}
    dataset = _load(resolved, resolved["train_split"], **masks)
    finetune = resolved["train_mode"] == "finetune"
    needs_labels = finetune or resolved["mode"] == "probe"
    if needs_labels and dataset.num_classes and not dataset.has_labels():
        raise ValueError(
            f"All labels of --train_split={resolved['train_split']} of "
            f"{resolved['dataset']} are hidden."
        )
    if finetune and resolved["train_on_labelled"] and resolved["checkpoint"]:
        dataset = data.subset(dataset, _ids_of_checkpoint(resolved))
        logging.info("%s", data.describe(dataset))
    return dataset


def _load(resolved: Resolved, split: str, **masks: Any) -> data.Dataset:
    return data.load(
        resolved["dataset"],
        split,
        data_dir=resolved["data_dir"],
        channels=resolved.known("channels"),
        **masks,
    )


def _ids_of_checkpoint(resolved: Resolved) -> np.ndarray:
    """Returns ids of the images whose labels the pretraining used."""
    path = resolved["checkpoint"]
    flags = (run_record.read_run(path) or {"flags": {}})["flags"]
    for name in ("dataset", "train_split"):
        here = resolved[name]
        there = flags.get(name, here)
        if there != here:
            raise ValueError(
                f"--train_on_labelled needs --{name}={there}, whose images "
                f"{path} has chosen from. Received: {here}."
            )
    return labels.read(run_record.run_directory(path))


def open_eval_data(resolved: Resolved) -> data.Dataset:
    """Opens the split for evaluation: --eval_split, or the first with labels.

    Raises:
        ValueError: if the split has no labels, or there is none to choose.
    """
    name, split = resolved["dataset"], resolved["eval_split"]
    if split:
        dataset = _load(resolved, split)
        if dataset.has_labels():
            return dataset
        found, _ = _find_eval_data(resolved)
        others = f" Split {found.split!r} has labels." if found else ""
        raise ValueError(
            f"--eval_split={split} of {name} has no labels, or all of them are hidden.{others}"
        )
    found, passed_over = _find_eval_data(resolved)
    if found is None:
        raise ValueError(
            f"{name} has no split to evaluate on: {'; '.join(passed_over)}"
            ". Name a split with labels by --eval_split."
        )
    logging.info(
        "Evaluating on split %r of %s%s.",
        found.split,
        name,
        "".join(f"; {reason}" for reason in passed_over),
    )
    return found


def _find_eval_data(
    resolved: Resolved,
) -> tuple[data.Dataset | None, list[str]]:
    """Returns the first split for evaluation that has labels.

    Also returns the reasons why the splits before it were not chosen.
    """
    reasons = []
    for split in _EVAL_SPLITS:
        try:
            dataset = _load(resolved, split)
        except NoSuchSplit as error:
            splits = ", ".join(k for k, size in error.splits.items() if size)
            reasons.append(f"there is no {split!r} among {splits}")
            continue
        if dataset.has_labels():
            return dataset, reasons
        reasons.append(
            f"labels of {split!r} are hidden" if dataset.num_classes else f"{split!r} has no labels"
        )
    return None, reasons


def choose_labelled_ids(resolved: Resolved, dataset: data.Dataset) -> np.ndarray | None:
    """Returns ids of the images whose labels pretraining may use; None: all.

    Raises:
        ValueError: if a class has too few images, or the file is wrong.
    """
    if resolved["train_mode"] == "finetune":
        return None
    is_given = any(resolved[name] is not None for name in _LABEL_FLAGS)
    if is_given and _continues(resolved, (*_LABEL_FLAGS, *_DATA_FLAGS)):
        # Reading all labels of a large data set again would take minutes.
        return labels.read(resolved["model_dir"])
    if not is_given:
        if resolved.objective_type.uses_labels:
            logging.info(
                "All labels are used: no --labelled_fraction, "
                "--labels_per_class or --labelled_file was given."
            )
        if not resolved["labelled_batch_share"]:
            return None
        ids = np.flatnonzero(dataset.labels() >= 0)
    elif resolved["labelled_file"]:
        ids = labels.from_file(dataset, resolved["labelled_file"])
    else:
        ids = labels.choose(
            dataset,
            fraction=resolved["labelled_fraction"],
            per_class=resolved["labels_per_class"],
            seed=resolved["seed"],
        )
    logging.info("Labels of %d of %d images are used.", len(ids), dataset.num_examples)
    return ids


def _continues(resolved: Resolved, names: Sequence[str]) -> bool:
    """Returns whether `model_dir` holds a run with the same flags `names`."""
    before = run_record.read_run(resolved["model_dir"])
    return before is not None and all(before["flags"].get(name) == resolved[name] for name in names)


def labelled_mask(ids: np.ndarray | None, num_examples: int) -> np.ndarray | None:
    """Returns bool `[num_examples]`, True at the ids; None for None."""
    if ids is None:
        return None
    mask = np.zeros(num_examples, bool)
    mask[ids] = True
    return mask


def held_out(dataset: data.Dataset, count: int, seed: int) -> tuple[data.Dataset, data.Dataset]:
    """Splits a training split at random into a larger and a held-out part.

    The second has `count` examples, at most a tenth of all.
    """
    order = np.random.default_rng(seed).permutation(dataset.example_ids)
    count = min(count, len(order) // 10)
    larger, smaller = order[count:], order[:count]
    return data.subset(dataset, larger), data.subset(dataset, smaller)
