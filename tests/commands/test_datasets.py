# SPDX-License-Identifier: Apache-2.0
"""Tests of `datasets.py`: the split that a run is evaluated on."""

import json

import numpy as np
import pytest

from contrastive.commands import datasets
from contrastive.sources import splits
from tests.support import program
from tests.support.image_data import write_pictures, write_records


def _eval_data(dataset, eval_split=None):
    """Returns what a run of a dataset is evaluated on."""
    words = [f"--dataset={dataset}", "--mode=train_then_eval", "--channels=3"]
    if eval_split:
        words.append(f"--eval_split={eval_split}")
    return datasets.open_eval_data(program.resolve(*words))


def _write_archive(path, **labels):
    """Writes 12 images for each array of labels, `labels` or `labels_test`."""
    images = {key.replace("labels", "images"): np.zeros((12, 4, 4, 3), np.uint8) for key in labels}
    np.savez(path, **images, **labels)
    return path


def test_eval_data_is_split_test_where_it_has_labels(log):
    assert _eval_data("photo_patches").split == "test"
    assert log[-1] == "Evaluating on split 'test' of photo_patches."


def test_eval_data_is_validation_where_there_is_no_test(tmp_path, log):
    root = write_pictures(tmp_path, ["train/a/0.png", "val/a/1.png"])
    assert _eval_data(root).split == "validation"
    assert log[-1] == (
        f"Evaluating on split 'validation' of {root}; there is no 'test' among train, validation."
    )


def test_eval_data_is_validation_where_labels_of_test_are_hidden(tmp_path, log):
    names = ["train/a/0.png", "val/a/1.png", "test/2.png"]
    root = write_pictures(tmp_path, names)
    assert _eval_data(root).split == "validation"
    assert log[-1].endswith("; 'test' has no labels.")


def test_eval_data_given_is_loaded(tmp_path, log):
    dataset = _eval_data("photo_patches", "train[:5%]+test")
    assert dataset.split == "train[:5%]+test"
    assert dataset.num_examples == 2500
    assert not any("Evaluating" in line for line in log)


def test_eval_data_without_any_split_names_the_flag_and_the_splits(tmp_path):
    root = write_pictures(tmp_path, ["train/a/0.png", "train/b/1.png"])
    with pytest.raises(ValueError, match="no 'test' among train; there is no "):
        _eval_data(root)
    with pytest.raises(ValueError, match="--eval_split"):
        _eval_data(root)
    records = write_records(tmp_path / "records", 8, False, 4)
    with pytest.raises(ValueError, match="no 'test' among train;.*eval_split"):
        _eval_data(records)


def test_eval_data_of_archive_with_hidden_test_labels_is_refused(tmp_path):
    path = _write_archive(
        tmp_path / "x.npz",
        labels=np.arange(12) % 3,
        labels_test=np.full(12, -1),
    )
    with pytest.raises(ValueError, match="'test' has no labels.*--eval_split"):
        _eval_data(path)
    with pytest.raises(ValueError, match="--eval_split=test of .* no labels"):
        _eval_data(path, "test")


def test_eval_data_of_unlabelled_images_is_refused(tmp_path):
    root = write_pictures(tmp_path, [f"{i}.png" for i in range(30)])
    with pytest.raises(ValueError, match="'test' has no labels"):
        _eval_data(root)


def test_eval_data_that_cannot_be_decoded_is_an_error(tmp_path):
    """It is not passed over for another split."""
    root = write_pictures(tmp_path, ["train/a/0.png", "val/a/1.png"])
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match="None of the images of split 'test'"):
        _eval_data(root)


def test_eval_data_given_that_does_not_exist_raises_no_such_split():
    with pytest.raises(splits.NoSuchSplit, match="'tset'"):
        _eval_data("photo_patches", "tset")


def test_archive_is_trained_on_and_evaluated_on_its_test_split(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(60) % 3)
    code = program.main(
        "--mode=train_then_eval",
        f"--dataset={tmp_path}/x.npz",
        f"--model_dir={tmp_path}/run",
        "--resnet_depth=10",
        "--width_multiplier=0.125",
        "--train_batch_size=8",
        "--train_steps=2",
    )
    assert code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["split"] == "test"
    held_out = [i for i in range(60) if splits.is_held_out(str(i))]
    assert result["num_examples"] == len(held_out) > 3
