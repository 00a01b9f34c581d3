# SPDX-License-Identifier: Apache-2.0
"""What a frozen encoder has learned, beside baselines that have not."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import threadpoolctl
from absl import logging
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import data
from contrastive.evaluation import features as features_lib
from contrastive.evaluation.features import Outputs

_PIXELS_SIDE = 32  # at most, of raw pixels: larger ones are shrunk
# Inverse strengths of L2, from which held-out training examples choose; with
# fewer labels a class than the last number, there is too little to choose by.
_INVERSE_L2 = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FEW_LABELS_INVERSE_L2 = 0.1
_FEW_LABELS = 20
_HELD_OUT_SHARE = 0.2
_SOLVER_STEPS = 100

Rows = tuple[np.ndarray, np.ndarray]  # features `[N, d]` and labels `[N]`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How features are judged.

    Attributes:
        knn_k: neighbours that vote.
        knn_temperature: of their weights, > 0.
        label_budgets: "5" labels of each class, or "10%" of the labels.
        seeds: draws of each budget's labels.
        max_train: training images used, drawn at random; 0: all.

    Raises:
        ValueError: if a budget is neither.
    """

    knn_k: int = 20
    knn_temperature: float = 0.07
    label_budgets: tuple[str, ...] = ("1", "5", "10", "1%", "10%")
    seeds: int = 5
    max_train: int = 0

    def __post_init__(self) -> None:
        for budget in self.label_budgets:
            is_count = re.fullmatch("[1-9][0-9]*", budget)
            share = re.fullmatch("([0-9.]+)%", budget)
            if not is_count and not (share and 0 < float(share[1]) <= 100):
                raise ValueError(
                    "A label budget is a number of labels of each class, such "
                    "as 5, or a share of all labels, such as 10%. Received: "
                    f"{budget!r}."
                )


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
    few_labels: Mapping[str, Sequence[float]]


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

    def record(self) -> dict[str, Any]:
        """Returns all but the arrays, for a JSON file."""
        names = [f.name for f in dataclasses.fields(self)]
        arrays = [
            name
            for name in names
            if isinstance(getattr(self, name), np.ndarray)
        ]
        return {
            **{
                name: getattr(self, name)
                for name in names
                if name not in arrays
            },
            "scores": [dataclasses.asdict(scores) for scores in self.scores],
            "num_test": len(self.test_ids),
        }


def standardize(
    train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features of mean 0 and variance 1 in `train`."""
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(test)


def linear_predictions(
    train: Rows, test_features: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Returns what multinomial logistic regression predicts.

    L2's strength is the one, of five, that classifies a fifth of the training
    examples best when it is fitted to the others; of equals, the strongest. It
    is then fitted to all. With fewer than 20 labels a class it is not chosen.

    Args:
        train: features of about unit variance, and labels.
        test_features: `[M, d]`.
        seed: of the choice of held-out examples.

    Returns:
        Labels `[M]`, and the inverse strength, scikit-learn's `C`.
    """
    features, labels = train
    order = np.random.default_rng(seed).permutation(len(labels))
    split = int(len(order) * _HELD_OUT_SHARE)
    held_out, rest = order[:split], order[split:]

    def fit(rows: np.ndarray, inverse_l2: float) -> LogisticRegression:
        classifier = LogisticRegression(C=inverse_l2, max_iter=_SOLVER_STEPS)
        return classifier.fit(features[rows], labels[rows])

    def held_out_accuracy(inverse_l2: float) -> float:
        classifier = fit(rest, inverse_l2)
        return classifier.score(features[held_out], labels[held_out])

    best = _FEW_LABELS_INVERSE_L2
    if len(labels) >= _FEW_LABELS * len(np.unique(labels)):
        best = max(_INVERSE_L2, key=held_out_accuracy)
    return fit(order, best).predict(test_features), best


def choose_labels(labels: np.ndarray, budget: str, seed: int) -> np.ndarray:
    """Returns rows of so many labels of each class, at random.

    Args:
        labels: `[N]`.
        budget: as in `Options`; of a class with fewer, all; at least 1.
        seed: of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        share = float(budget.removesuffix("%")) / 100
        count = round(share * len(rows)) if "%" in budget else int(budget)
        chosen.append(rows[: max(count, 1)])
    return np.concatenate(chosen)


def _budget_name(budget: str) -> str:
    """Returns a budget for people."""
    number = budget.removesuffix("%")
    return f"{number} a class" if number == budget else f"{number} %"


def knn_accuracy(
    train: Rows, test: Rows, k: int = 20, temperature: float = 0.07
) -> float:
    """Returns the test accuracy of weighted nearest neighbours.

    By cosine; a neighbour's vote weighs `exp(cosine / temperature)`.

    Source: Wu et al., arXiv:1805.01978, section 3.4.

    Args:
        train: features and labels.
        test: the same.
        k: neighbours; all, if there are not as many.
        temperature: of the weights, > 0.

    Returns:
        Accuracy in [0, 1].
    """
    classifier = KNeighborsClassifier(
        min(k, len(train[1])),
        metric="cosine",
        weights=lambda distance: np.exp((1.0 - distance) / temperature),
    )
    return float(classifier.fit(*train).score(*test))


def _judge(
    train: Outputs, test: Outputs, options: Options
) -> dict[str, np.ndarray]:
    """Returns the fields of `Scores` but its name, as JSON; predictions.

    For logistic regression, features are standardised by the mean and the
    variance of all training images, which takes no labels.
    """
    features, test_features = standardize(train.values, test.values)

    def predict(rows: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
        few = features[rows], train.labels[rows]
        return linear_predictions(few, test_features, seed)

    # All labels first: that takes longest.
    tasks = [(np.arange(len(features)), 0)]
    tasks += [
        (choose_labels(train.labels, budget, seed), seed)
        for budget in options.label_budgets
        for seed in range(options.seeds)
    ]
    with (
        warnings.catch_warnings(),
        # One thread a fit: its many small products take longer on several.
        threadpoolctl.threadpool_limits(1, "blas"),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = list(pool.map(predict, *zip(*tasks, strict=True)))
    accuracies = [float(np.mean(found == test.labels)) for found, _ in fitted]
    draws = np.reshape(accuracies[1:], (-1, options.seeds)).tolist()
    predictions, inverse_l2 = fitted[0]
    scores = {
        "dim": train.values.shape[1],
        "linear": accuracies[0],
        "inverse_l2": inverse_l2,
        "knn": knn_accuracy(
            (train.values, train.labels),
            (test.values, test.labels),
            options.knn_k,
            options.knn_temperature,
        ),
        "few_labels": dict(
            zip(map(_budget_name, options.label_budgets), draws, strict=True)
        ),
    }
    return {
        "scores": np.array(json.dumps(scores)),
        "predictions": predictions,
    }


def measure(
    encoders: Mapping[str, keras.Model | None],
    train_data: data.Dataset,
    test_data: data.Dataset,
    image_size: int,
    options: Options,
    *,
    cache: str | None = None,
    **forward: Any,
) -> Results:
    """Returns what each encoder's features are worth.

    Args:
        encoders: by the name to report; None stands for raw pixels. The last
            is the one that is asked about.
        train_data: with labels.
        test_data: with the same classes.
        image_size: side of the images, pixels.
        options: how features are judged.
        cache: directory where features and scores are kept; None: nowhere.
        **forward: other arguments of `features.compute_outputs`.

    Raises:
        ValueError: if there are not two classes to tell apart, or they differ
            between the splits.
    """
    check_classes(train_data, test_data)
    if 0 < options.max_train < train_data.num_examples:
        order = np.random.default_rng(0).permutation(train_data.example_ids)
        train_data = data.subset(train_data, order[: options.max_train])
    splits = [(s, features_lib.fingerprint(s)) for s in (train_data, test_data)]
    scores = []
    for name, encoder in encoders.items():
        size = image_size if encoder else min(image_size, _PIXELS_SIDE)
        key = {
            "encoder": features_lib.fingerprint(encoder),
            "image_size": size,
            "crop": forward.get("crop_proportion"),
        }

        def outputs(
            split: data.Dataset, encoder: Any = encoder, size: int = size
        ) -> dict[str, np.ndarray]:
            return vars(
                features_lib.compute_outputs(encoder, split, size, **forward)
            )

        train, test = (
            Outputs(
                **features_lib.cached(
                    # Pixels in memory are as quick to have again.
                    cache if encoder or split.is_encoded else None,
                    key | {"data": identity},
                    functools.partial(outputs, split),
                )
            ).labelled()
            for split, identity in splits
        )
        judged = features_lib.cached(
            cache,
            key
            | {"data": [identity for _, identity in splits]}
            | {"options": dataclasses.asdict(options)},
            functools.partial(_judge, train, test, options),
        )
        scores.append(Scores(name=name, **json.loads(str(judged["scores"]))))
        logging.info("%s: linear top-1 %.1f %%", name, 100 * scores[-1].linear)
    return Results(
        scores=tuple(scores),
        dataset=train_data.name,
        train_split=train_data.split,
        test_split=test_data.split,
        class_names=train_data.class_names,
        num_train=len(train.labels),
        num_labels={
            _budget_name(budget): len(choose_labels(train.labels, budget, 0))
            for budget in options.label_budgets
        },
        knn_k=options.knn_k,
        knn_temperature=options.knn_temperature,
        test_ids=test.ids,
        test_features=test.values,
        test_labels=test.labels,
        test_predictions=judged["predictions"],
    )


def check_classes(train_data: data.Dataset, test_data: data.Dataset) -> None:
    """Raises ValueError unless the splits have the same two classes or more."""
    if train_data.num_classes < 2:
        raise ValueError(
            "A probe needs labels of two classes or more. Received: "
            f"{train_data.name!r}, {train_data.split!r}, with "
            f"{train_data.num_classes}."
        )
    if train_data.class_names != test_data.class_names:
        raise ValueError(
            f"{test_data.split!r} has {test_data.num_classes} classes, "
            f"{train_data.split!r} {train_data.num_classes}, or others."
        )


def table(results: Results) -> str:
    """Returns accuracies in %, aligned, a line for each encoder.

    Of draws of few labels, the mean and the standard deviation.
    """
    header = ["top-1, %", "size", "linear", f"{results.knn_k}-NN"]
    header += list(results.num_labels)
    rows: list[Sequence[str]] = [header]
    for scores in results.scores:
        draws = [100 * np.array(d) for d in scores.few_labels.values()]
        rows.append(
            [
                scores.name,
                f"{scores.dim:,}",
                f"{100 * scores.linear:.1f}",
                f"{100 * scores.knn:.1f}",
                *(f"{d.mean():.1f} ± {d.std():.1f}" for d in draws),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [
                cell.rjust(w)
                for cell, w in zip(row[1:], widths[1:], strict=True)
            ]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    count = f"{results.num_train:,} training, {len(results.test_ids):,} test"
    return "\n".join([f"{results.dataset}, {count} images", *lines])
