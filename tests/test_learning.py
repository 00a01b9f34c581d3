# SPDX-License-Identifier: Apache-2.0
"""Pretraining learns: features that beat those of a random encoder."""

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoint
import data
import methods
import model
import probe
import run


def _cifar10(split):
    try:
        return data.load("cifar10", split)
    except ValueError as error:
        pytest.skip(f"CIFAR-10 is not here: {error}")


def _gain(directory, dataset, train_data, test_data, *words):
    """Pretrains; returns linear top-1 of a random encoder and the trained."""
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(
            [
                "run.py",
                f"--dataset={dataset}",
                f"--model_dir={directory}",
                "--resnet_depth=10",
                "--color_jitter_strength=0.5",
                "--use_blur=false",
                "--optimizer=adam",
                "--learning_rate_scaling=none",
                "--learning_rate=0.002",
                "--train_summary_steps=0",
                *words,
            ]
        )
        run.main(["run.py"])
    architecture = checkpoint.read_run(str(directory))["architecture"]
    random = model.build_networks(model.Architecture(**architecture))
    accuracies = probe.compare(
        {
            "random": model.encoder_of_images(random),
            "trained": checkpoint.load_encoder(str(directory)),
        },
        train_data,
        test_data,
        image_size=32,
    )
    return accuracies["random"], accuracies["trained"]


def test_pretraining_on_cifar10_beats_the_random_encoder(tmp_path):
    random, trained = _gain(
        tmp_path,
        "cifar10",
        _cifar10("train"),
        _cifar10("test"),
        "--objective=simclr",
        "--temperature=0.5",
        "--width_multiplier=0.25",
        "--train_batch_size=128",
        "--train_steps=300",
        "--warmup_epochs=0.1",
    )
    # Seen: see README. 10,000 test images: a standard error of 0.5 %.
    assert trained > random + 0.03


@pytest.mark.slow
@pytest.mark.parametrize("objective", methods.METHODS)
def test_every_objective_learns_photo_patches(objective, tmp_path):
    random, trained = _gain(
        tmp_path,
        "photo_patches",
        data.load("photo_patches", "train"),
        data.load("photo_patches", "test"),
        # `siglip` is not a flag's value.
        *(["--use_siglip"] if objective == "siglip" else []),
        f"--objective={objective.replace('siglip', 'relic')}",
        "--width_multiplier=0.25",
        "--train_batch_size=128",
        "--train_epochs=5",
        "--warmup_epochs=0.5",
    )
    assert trained > random + 0.02


def test_probe_measures_what_is_linear():
    """Two blobs are told apart; labels that mean nothing are not."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    blobs = rng.normal(size=(400, 5)) + 4 * labels[:, None]
    accuracy = probe.linear_accuracy(
        (blobs[:200], labels[:200]), (blobs[200:], labels[200:])
    )
    assert accuracy > 0.97
    noise = rng.normal(size=(400, 5))
    accuracy = probe.linear_accuracy(
        (noise[:200], labels[:200]), (noise[200:], labels[200:])
    )
    assert 0.35 < accuracy < 0.65


def test_few_labels_and_neighbours_tell_blobs_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    blobs = rng.normal(size=(600, 5)) + 8 * np.eye(5)[labels]
    train, test = (
        (blobs[rows], labels[rows]) for rows in (slice(300), slice(300, 600))
    )
    assert probe.knn_accuracy(train, test) > 0.99
    assert probe.few_label_accuracy(train, test, 5) > 0.97
    assert probe.few_label_accuracy(train, test, 1) > 0.8
    shuffled = train[0], rng.permutation(train[1])
    assert probe.knn_accuracy(shuffled, test) < 0.6
    assert probe.few_label_accuracy(shuffled, test, 5) < 0.6


def test_neighbours_vote_by_exponential_weights():
    train = np.eye(3), np.array([0, 1, 1])
    test = np.array([[1.0, 0.3, 0.3]]), np.array([0])
    # One close neighbour of class 0 against two further ones of class 1.
    assert probe.knn_accuracy(train, test, k=3, temperature=0.07) == 1.0
    assert probe.knn_accuracy(train, test, k=3, temperature=10.0) == 0.0


def test_probe_table_is_aligned():
    text = probe.table({"raw": 0.5, "a longer name": 1.0}, "data")
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "50.0 %" in text
