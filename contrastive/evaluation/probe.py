# SPDX-License-Identifier: Apache-2.0
"""Accuracies of simple classifiers on the features of frozen encoders."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import keras
import numpy as np
import tabulate
import threadpoolctl
from absl import logging
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import data
from contrastive.config import choices
from contrastive.evaluation import features as features_lib
from contrastive.evaluation.features import Outputs

_PIXELS_SIDE = 32  # at most, of raw pixels: larger ones are shrunk
# Inverse strengths of L2 regularisation, of which held-out training examples choose one; with fewer
# than `_FEW_LABELS` labels a class, it is fixed.
_INVERSE_L2 = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FEW_LABELS_INVERSE_L2 = 0.1
_FEW_LABELS = 20
_HELD_OUT_SHARE = 0.2
_SOLVER_STEPS = 300  # of L-BFGS, at most

Rows = tuple[np.ndarray, np.ndarray]  # features `[N, d]` and labels `[N]`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a probe.

    A label budget is "5" for 5 labels of each class, or "10%" for a share of all labels; other
    texts raise a ValueError.
    """

    knn_k: int = 20  # number of nearest neighbours
    knn_temperature: float = 0.07  # of their weights, > 0
    label_budgets: tuple[str, ...] = ("1", "5", "10", "1%", "10%")
    seeds: int = 5  # number of random draws for each budget
    max_train: int = 0  # training images used, drawn at random; 0: all

    def __post_init__(self) -> None:
        for budget in self.label_budgets:
            choices.check_label_budget(budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Test top-1 accuracies, in [0, 1], on one encoder's features."""

    name: str  # of the encoder, as shown
    dim: int  # size of a feature
    linear: float  # of logistic regression on all training labels
    inverse_l2: float  # C of it, chosen on held-out training images
    knn: float  # of weighted nearest neighbours
    # Of logistic regression on few labels, one for each seed, by the budget: "5 a class", "10 %".
    few_labels: Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """Results of a probe; the arrays are of the last probed encoder."""

    scores: tuple[Scores, ...]  # of the baselines, then of that encoder
    dataset: str
    train_split: str
    test_split: str
    class_names: tuple[str, ...]
    num_train: int  # number of training images
    num_labels: Mapping[str, int]  # by the budgets of `few_labels`
    knn_k: int  # as in `Options`
    knn_temperature: float
    test_ids: np.ndarray  # int64 `[N]`, ids of the test images in their split
    test_features: np.ndarray  # float32 `[N, d]`
    test_labels: np.ndarray  # int32 `[N]`
    # int32 `[N]`, by logistic regression on all training labels.
    test_predictions: np.ndarray

    def record(self) -> dict[str, Any]:
        """Returns all fields but the arrays, for a JSON file."""
        fields = {
            name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)
        }
        return fields | {
            "scores": [vars(scores) for scores in self.scores],
            "num_test": len(self.test_ids),
        }


def standardize(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales features to mean 0 and variance 1 over `train`."""
    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(test)


def linear_predictions(
    train: Rows, test_features: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Fits multinomial logistic regression and predicts the test labels.

    The strength of L2 regularisation is the one, of five, with the highest accuracy on a fifth of
    the training examples when fitted to the others; of equals, the strongest. The classifier is
    then fitted to all. With fewer than 20 labels a class, the strength is fixed. The features
    should be of about unit variance; the seed chooses the held-out examples. Returns labels `[M]`,
    and the inverse strength, scikit-learn's `C`.
    """
    classifier = _fit_linear(train, seed)
    return classifier.predict(test_features), classifier.C


def _fit_linear(train: Rows, seed: int) -> LogisticRegression:
    features, labels = train
    classifier = LogisticRegression(C=_FEW_LABELS_INVERSE_L2, max_iter=_SOLVER_STEPS)
    if len(labels) < _FEW_LABELS * len(np.unique(labels)):
        return classifier.fit(features, labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    split = int(len(order) * _HELD_OUT_SHARE)
    search = GridSearchCV(classifier, {"C": _INVERSE_L2}, cv=[(order[split:], order[:split])])
    with joblib.parallel_config("threading", n_jobs=-1):
        return search.fit(features, labels).best_estimator_


def choose_labels(labels: np.ndarray, budget: str, seed: int) -> np.ndarray:
    """Draws the rows of a label budget, at random.

    The budget is one of `Options`, and the labels are `[N]`. At least one label of each class is
    drawn, and all labels of a class that has fewer.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    number = float(budget.removesuffix("%"))
    chosen = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        count = number / 100 * len(rows) if "%" in budget else number
        chosen.append(rows[: max(round(count), 1)])
    return np.concatenate(chosen)


def _budget_name(budget: str) -> str:
    return budget.replace("%", " %") if "%" in budget else f"{budget} a class"


def knn_accuracy(train: Rows, test: Rows, k: int = 20, temperature: float = 0.07) -> float:
    """Measures the test accuracy of weighted nearest neighbours, by cosine.

    The weight of a neighbour's vote is `exp(cosine / temperature)`, with a temperature > 0. If
    there are fewer than k training examples, all vote.

    Source: Wu et al., arXiv:1805.01978, section 3.4.
    """
    classifier = KNeighborsClassifier(
        min(k, len(train[1])),
        metric="cosine",
        weights=lambda distance: np.exp((1.0 - distance) / temperature),
    )
    return float(classifier.fit(*train).score(*test))


def _judge(train: Outputs, test: Outputs, options: Options) -> dict[str, np.ndarray]:
    """Computes the fields of `Scores`, as JSON, and test predictions."""
    # The mean and the variance of all training images need no labels.
    features, test_features = standardize(train.values, test.values)

    # All labels first: that takes longest.
    tasks = [(np.arange(len(features)), 0)]
    tasks += [
        (choose_labels(train.labels, budget, seed), seed)
        for budget in options.label_budgets
        for seed in range(options.seeds)
    ]

    def fit(rows: np.ndarray, seed: int) -> LogisticRegression:
        return _fit_linear((features[rows], train.labels[rows]), seed)

    with (
        warnings.catch_warnings(),
        # One thread a fit: its many small products take longer on several.
        threadpoolctl.threadpool_limits(1, "blas"),
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifiers = list(pool.map(fit, *zip(*tasks, strict=True)))
    stopped = sum(c.n_iter_.max() >= _SOLVER_STEPS for c in classifiers)
    if stopped:
        logging.warning(
            f"{stopped} of {len(classifiers)} fits of logistic regression did "
            f"not converge in {_SOLVER_STEPS} L-BFGS steps; their accuracies "
            "are estimates."
        )
    predictions = [c.predict(test_features) for c in classifiers]
    accuracies = [float(np.mean(p == test.labels)) for p in predictions]
    draws = np.reshape(accuracies[1:], (-1, options.seeds)).tolist()
    budgets = map(_budget_name, options.label_budgets)
    rows, test_rows = ((x.values, x.labels) for x in (train, test))
    knn = knn_accuracy(rows, test_rows, options.knn_k, options.knn_temperature)
    scores = {
        "dim": train.values.shape[1],
        "linear": accuracies[0],
        "inverse_l2": classifiers[0].C,
        "knn": knn,
        "few_labels": dict(zip(budgets, draws, strict=True)),
    }
    as_text = np.array(json.dumps(scores))
    return {"scores": as_text, "predictions": predictions[0]}


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
    """Measures the accuracies that simple classifiers reach on features.

    The encoders are by the name to report; None stands for raw pixels. Images have sides of
    `image_size` pixels, and those of both splits have the same classes; otherwise `check_classes`
    raises a ValueError. Features and scores are kept in the directory `cache`, if any. The other
    arguments are those of `features.compute_outputs`.
    """
    check_classes(train_data, test_data)
    if 0 < options.max_train < train_data.num_examples:
        order = np.random.default_rng(0).permutation(train_data.example_ids)
        train_data = data.subset(train_data, order[: options.max_train])
    splits = [(split, split.fingerprint()) for split in (train_data, test_data)]
    scores = []
    for name, encoder in encoders.items():
        train, test, judged = _measure_one(encoder, splits, image_size, options, cache, forward)
        scores.append(Scores(name=name, **json.loads(str(judged["scores"]))))
        logging.info("%s: linear top-1 %.1f %%", name, 100 * scores[-1].linear)
    num_labels = {
        _budget_name(budget): len(choose_labels(train.labels, budget, 0))
        for budget in options.label_budgets
    }
    return Results(
        scores=tuple(scores),
        dataset=train_data.name,
        train_split=train_data.split,
        test_split=test_data.split,
        class_names=train_data.class_names,
        num_train=len(train.labels),
        num_labels=num_labels,
        knn_k=options.knn_k,
        knn_temperature=options.knn_temperature,
        test_ids=test.ids,
        test_features=test.values,
        test_labels=test.labels,
        test_predictions=judged["predictions"],
    )


def _measure_one(
    encoder: keras.Model | None,
    splits: Sequence[tuple[data.Dataset, str]],
    image_size: int,
    options: Options,
    cache: str | None,
    forward: Mapping[str, Any],
) -> tuple[Outputs, Outputs, dict[str, np.ndarray]]:
    """Returns train and test outputs and `_judge`'s result, perhaps cached."""
    size = image_size if encoder else min(image_size, _PIXELS_SIDE)
    key = {
        "encoder": features_lib.network_fingerprint(encoder),
        "image_size": size,
        "crop": forward.get("crop_proportion"),
    }

    def outputs(split: data.Dataset, fingerprint: str) -> Outputs:
        def make() -> dict[str, np.ndarray]:
            compute = features_lib.compute_outputs
            return vars(compute(encoder, split, size, **forward))

        # Pixels in memory are as quick to have again.
        where = cache if encoder or split.is_encoded else None
        arrays = features_lib.cached(where, key | {"data": fingerprint}, make)
        return Outputs(**arrays).labelled()

    train, test = (outputs(*split) for split in splits)
    key |= {
        "data": [fingerprint for _, fingerprint in splits],
        "options": dataclasses.asdict(options),
        "solver_steps": _SOLVER_STEPS,
    }
    judge = functools.partial(_judge, train, test, options)
    return train, test, features_lib.cached(cache, key, judge)


def check_classes(train_data: data.Dataset, test_data: data.Dataset) -> None:
    """Raises a ValueError unless the splits share two classes or more."""
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
    """Formats the accuracies, in %, as a table with a line for each encoder.

    Draws of few labels are shown as their mean and standard deviation.
    """
    header = ["top-1, %", "size", "linear", f"{results.knn_k}-NN"]
    header += results.num_labels
    rows = [
        [scores.name, f"{scores.dim:,}"]
        + [f"{100 * share:.1f}" for share in (scores.linear, scores.knn)]
        + [
            f"{100 * np.mean(draws):.1f} ± {100 * np.std(draws):.1f}"
            for draws in scores.few_labels.values()
        ]
        for scores in results.scores
    ]
    align = ["left"] + ["right"] * (len(header) - 1)
    lines = tabulate.tabulate(rows, header, "simple", disable_numparse=True, colalign=align)
    count = f"{results.num_train:,} training, {len(results.test_ids):,} test"
    return f"{results.dataset}, {count} images\n{lines}"
