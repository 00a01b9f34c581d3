# SPDX-License-Identifier: Apache-2.0
"""What a frozen encoder has learned, beside baselines that have not."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import data
import data_util

_BATCH_SIZE = 256
# Inverse strengths of L2, from which held-out training examples choose.
_INVERSE_L2 = (1e-3, 1e-2, 1e-1)
_FEW_LABELS_INVERSE_L2 = 0.1
_HELD_OUT_SHARE = 0.2
_MAX_TRAIN_EXAMPLES = 5_000
# More steps change the accuracies by less than 1 % here, and overfit pixels.
_SOLVER_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Test top-1 accuracies, in [0, 1], on one encoder's features.

    Attributes:
        name: of the encoder, for people.
        dim: size of a feature.
        linear: of logistic regression on all training labels.
        inverse_l2: of that regression, chosen on held-out training images.
        knn: of weighted nearest neighbours.
        few_labels: of logistic regression on few labels, one for each seed, by
            the budget: "5 a class", "10 %".
    """

    name: str
    dim: int
    linear: float
    inverse_l2: float
    knn: float
    few_labels: Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """What a probe has found.

    Attributes:
        scores: of the baselines, then of the encoder that was asked about.
        dataset: its name.
        train_split: the split that features and labels were learned from.
        test_split: the split that accuracies are of.
        class_names: one a label.
        num_train: training images used.
        num_labels: labels of each budget of `few_labels`.
        knn_k: neighbours.
        knn_temperature: of their weights.
        test_ids: int64 `[N]`, ids of the test images in their split.
        test_features: float32 `[N, d]`, of the encoder asked about.
        test_labels: int32 `[N]`.
        test_predictions: int32 `[N]`, of the logistic regression on all
            training labels of the encoder asked about.
    """

    scores: tuple[Scores, ...]
    dataset: str
    train_split: str
    test_split: str
    class_names: tuple[str, ...]
    num_train: int
    num_labels: Mapping[str, int]
    knn_k: int
    knn_temperature: float
    test_ids: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    test_predictions: np.ndarray


def compute_features(
    encoder: keras.Model | None, dataset: data.Dataset, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of all labelled images of a split, in order.

    Args:
        encoder: from float32 images `[n, s, s, c]` in [0, 1] to features;
            None for the pixels themselves.
        dataset: with labels.
        image_size: side of the images, pixels.

    Returns:
        float32 `[N, d]` features and int `[N]` labels.
    """

    @tf.function
    def compute(images: tf.Tensor) -> tf.Tensor:
        images = data_util.eval_images(images, image_size)
        if encoder is None:
            return tf.reshape(images, [images.shape[0], -1])
        return tf.cast(encoder(images, training=False), tf.float32)

    features, labels = [], []
    for batch in data.eval_stream(
        dataset, batch_size=_BATCH_SIZE, image_size=image_size
    ):
        keep = (batch["weight"].numpy() > 0) & (batch["label"].numpy() >= 0)
        features.append(compute(batch["image"]).numpy()[keep])
        labels.append(batch["label"].numpy()[keep])
    return np.concatenate(features), np.concatenate(labels)


def linear_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int = 0,
) -> float:
    """Returns the test top-1 accuracy of multinomial logistic regression.

    Features are standardised; the strength of L2 is chosen on held-out
    training examples, never on test. More than 5,000 training examples are
    sub-sampled.

    Args:
        train: features `[N, d]` and labels `[N]`.
        test: the same.
        seed: of the choice of training and held-out examples.

    Returns:
        Accuracy in [0, 1].
    """
    order = np.random.default_rng(seed).permutation(len(train[0]))
    order = order[:_MAX_TRAIN_EXAMPLES]
    split = int(len(order) * _HELD_OUT_SHARE)
    held_out, rest = order[:split], order[split:]

    def fit(rows: np.ndarray, inverse_l2: float) -> Pipeline:
        classifier = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=inverse_l2, max_iter=_SOLVER_STEPS),
        )
        return _fit(classifier, train[0][rows], train[1][rows])

    def held_out_accuracy(inverse_l2: float) -> float:
        return fit(rest, inverse_l2).score(
            train[0][held_out], train[1][held_out]
        )

    best = max(_INVERSE_L2, key=held_out_accuracy)
    return float(fit(order, best).score(*test))


def few_label_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    labels_per_class: int,
    seeds: int = 5,
) -> float:
    """Returns the mean test accuracy with a few labels of each class.

    Logistic regression on standardised features, with a fixed L2 strength:
    there are no labels to choose it by. The scale of the features is that of
    all training images, which needs no labels.

    Args:
        train: features `[N, d]` and labels `[N]`.
        test: the same.
        labels_per_class: training labels, > 0.
        seeds: draws of training labels to average over.

    Returns:
        Accuracy in [0, 1].
    """
    scaler = StandardScaler().fit(train[0])
    test_features = scaler.transform(test[0])
    accuracies = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(train[0]))
        rows = np.concatenate(
            [
                order[train[1][order] == label][:labels_per_class]
                for label in np.unique(train[1])
            ]
        )
        classifier = LogisticRegression(
            C=_FEW_LABELS_INVERSE_L2, max_iter=_SOLVER_STEPS
        )
        features = scaler.transform(train[0][rows])
        _fit(classifier, features, train[1][rows])
        accuracies.append(classifier.score(test_features, test[1]))
    return float(np.mean(accuracies))


def _fit(classifier: Any, features: np.ndarray, labels: np.ndarray) -> Any:
    """Returns the classifier, fitted in as many steps as it may take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(features, labels)


def knn_accuracy(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Returns the test accuracy of weighted nearest neighbours.

    By cosine; a neighbour's vote weighs `exp(cosine / temperature)`.

    Source: Wu et al., arXiv:1805.01978, section 3.4.

    Args:
        train: features `[N, d]` and labels `[N]`.
        test: the same.
        k: neighbours, at most N.
        temperature: of the weights, > 0.

    Returns:
        Accuracy in [0, 1].
    """
    classifier = KNeighborsClassifier(
        k,
        metric="cosine",
        weights=lambda distance: np.exp((1.0 - distance) / temperature),
    )
    return float(classifier.fit(*train).score(*test))


def compare(
    encoders: dict[str, keras.Model | None],
    train_data: data.Dataset,
    test_data: data.Dataset,
    image_size: int,
) -> dict[str, float]:
    """Returns the linear top-1 accuracy on each encoder's features.

    Args:
        encoders: by the name to report; None stands for raw pixels.
        train_data: with labels.
        test_data: with the same classes.
        image_size: side of the images, pixels.

    Returns:
        Accuracies in [0, 1], in the order of `encoders`.
    """
    accuracies = {}
    for name, encoder in encoders.items():
        train, test = (
            compute_features(encoder, split, image_size)
            for split in (train_data, test_data)
        )
        accuracies[name] = linear_accuracy(train, test)
        logging.info("%s: linear top-1 %.1f %%", name, 100 * accuracies[name])
    return accuracies


def table(accuracies: dict[str, float], heading: str) -> str:
    """Returns accuracies as aligned text, one a line."""
    width = max(map(len, [heading, *accuracies]))
    rows = [f"{heading:{width}}  linear top-1", "-" * (width + 14)]
    rows += [f"{k:{width}}  {100 * v:10.1f} %" for k, v in accuracies.items()]
    return "\n".join(rows)
