# SPDX-License-Identifier: Apache-2.0
"""A probe's numbers are those of a plain script, and are computed once."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import data
from contrastive.evaluation import features, probe

_OPTIONS = probe.Options(knn_k=3, knn_temperature=0.2, label_budgets=("2", "50%"), seeds=2)


def _blobs(count, spread=4.0, classes=3):
    rng = np.random.default_rng(count)
    labels = rng.integers(0, classes, count)
    return rng.normal(size=(count, 5)) + spread * np.eye(5)[labels], labels


def _dataset(folder, split, count):
    """Images of 8 pixels, one hue a class, that a linear model confuses."""
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 160, (count, 8, 8, 3))
    images[np.arange(count), :, :, labels] += 12
    path = folder / f"{split}.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return data.load(str(path), "all")


def _encoder(seed=0):
    images = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(6, 3, 2, kernel_initializer=keras.initializers.GlorotNormal(seed))(
        images
    )
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(x))


@pytest.fixture
def splits(tmp_path):
    return _dataset(tmp_path, "a", 150), _dataset(tmp_path, "b", 90)


def _plain_script(train, test):
    """Linear accuracy, C, predictions, kNN and budgets, in scikit-learn."""
    (x, y), (x_test, y_test) = train, test
    scaler = StandardScaler().fit(x)
    scaled, scaled_test = scaler.transform(x), scaler.transform(x_test)

    def fit(rows, c):
        return LogisticRegression(C=c).fit(scaled[rows], y[rows])

    def linear(rows, seed):
        rows = rows[np.random.default_rng(seed).permutation(len(rows))]
        held_out, rest = rows[: len(rows) // 5], rows[len(rows) // 5 :]
        c = 0.1
        if len(rows) >= 60:
            grid = [0.0001, 0.001, 0.01, 0.1, 1.0]
            scores = [fit(rest, c).score(scaled[held_out], y[held_out]) for c in grid]
            c = grid[int(np.argmax(scores))]
        return fit(rows, c).predict(scaled_test), c

    def draw(seed, count_of):
        order = np.random.default_rng(seed).permutation(len(y))
        return np.concatenate(
            [[i for i in order if y[i] == c][: count_of(np.sum(y == c))] for c in range(3)]
        )

    votes = np.zeros((len(x_test), 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for row, z in enumerate(x_test):
        cosine = unit @ (z / np.linalg.norm(z))
        for i in np.argsort(-cosine)[:3]:
            votes[row, y[i]] += np.exp(cosine[i] / 0.2)
    predictions, c = linear(np.arange(len(y)), 0)
    return {
        "linear": np.mean(predictions == y_test),
        "inverse_l2": c,
        "knn": np.mean(votes.argmax(1) == y_test),
        "few_labels": {
            name: [np.mean(linear(draw(seed, count_of), seed)[0] == y_test) for seed in range(2)]
            for name, count_of in {
                "2 a class": lambda _: 2,
                "50 %": lambda n: round(n / 2),
            }.items()
        },
    }, predictions


def test_numbers_equal_a_plain_script_on_the_same_features(splits):
    encoder = _encoder()
    results = probe.measure({"raw pixels": None, "encoder": encoder}, *splits, 8, _OPTIONS)
    for scores, network in zip(results.scores, (None, encoder), strict=True):
        rows = []
        for split in splits:
            x = split.source.images.astype(np.float32) / 255
            x = x.reshape(len(x), -1) if network is None else network(x).numpy()
            rows.append((x, split.source.labels))
        expected, predictions = _plain_script(*rows)
        got = dataclasses.asdict(scores)
        assert got.pop("name") == ("encoder" if network else "raw pixels")
        assert got.pop("dim") == rows[0][0].shape[1]
        assert got == expected
        assert 0.3 < expected["linear"] < 1  # neither trivial nor hopeless
    np.testing.assert_array_equal(results.test_predictions, predictions)
    np.testing.assert_allclose(results.test_features, rows[1][0], atol=1e-6)
    np.testing.assert_array_equal(results.test_labels, rows[1][1])
    assert results.num_labels["2 a class"] == 6
    assert json.loads(json.dumps(results.record()))["num_test"] == 90


def test_a_second_probe_computes_nothing(splits, tmp_path, monkeypatch):
    def measure(encoder, train, test):
        return probe.measure(
            {"raw pixels": None, "encoder": encoder},
            train,
            test,
            8,
            _OPTIONS,
            cache=str(tmp_path / "features"),
        )

    first = measure(_encoder(), *splits)
    compute, computed = features.compute_outputs, []

    def counted(network, split, *args, **kwargs):
        if network is not None:  # pixels in memory are not kept
            computed.append(split.name)
        return compute(network, split, *args, **kwargs)

    monkeypatch.setattr(features, "compute_outputs", counted)
    monkeypatch.setattr(probe, "_fit_linear", lambda *_: pytest.fail("fitted again"))
    second = measure(_encoder(), *splits)
    assert not computed
    assert second.scores == first.scores
    for name in ("ids", "features", "labels", "predictions"):
        np.testing.assert_array_equal(
            getattr(second, f"test_{name}"), getattr(first, f"test_{name}")
        )
    monkeypatch.undo()
    monkeypatch.setattr(features, "compute_outputs", counted)
    assert measure(_encoder(seed=1), *splits).scores[1] != first.scores[1]
    assert len(computed) == 2
    # The same name, other images.
    measure(_encoder(), _dataset(tmp_path, "a", 151), splits[1])
    assert len(computed) == 3


def test_a_damaged_file_is_made_again(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        got = features.cached(str(tmp_path), {"a": 1}, make)
        assert got["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    features.cached(str(tmp_path), {"a": 1}, make)
    features.cached(str(tmp_path), {"a": 2}, make)
    features.cached(None, {"a": 1}, make)
    assert len(calls) == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_directory_that_cannot_be_written_costs_only_the_next_time():
    got = features.cached("/proc/nowhere", {}, lambda: {"x": np.ones(1)})
    assert got["x"] == 1


def test_outputs_stand_in_order_whatever_the_batch(splits):
    whole = features.compute_outputs(_encoder(), splits[0], 8)
    parts = features.compute_outputs(_encoder(), splits[0], 8, batch_size=32)
    np.testing.assert_array_equal(whole.ids, np.arange(150))
    np.testing.assert_array_equal(parts.ids, whole.ids)
    np.testing.assert_array_equal(parts.labels, splits[0].source.labels)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-6)


def test_a_network_is_known_by_what_it_computes(splits):
    def built(strides=2, scale=1.0):
        images = keras.Input((None, None, 3))
        ones = keras.initializers.Ones()
        layer = keras.layers.Conv2D(4, 3, strides, kernel_initializer=ones)
        network = keras.Model(images, layer(images))
        layer.kernel.assign(scale * layer.kernel)
        return features.network_fingerprint(network)

    # Keras calls the second layer conv2d_1.
    assert built() == built()
    assert built() != built(scale=2.0)
    assert built() != built(strides=1)
    assert splits[0].fingerprint() != splits[1].fingerprint()
    part = data.subset(splits[0], range(100))
    assert part.fingerprint() != splits[0].fingerprint()


def test_test_labels_choose_nothing(splits):
    def measure(test):
        return probe.measure({"pixels": None}, splits[0], test, 8, _OPTIONS)

    source = splits[1].source
    other = dataclasses.replace(source, labels=source.labels[::-1].copy())
    one = measure(splits[1])
    two = measure(dataclasses.replace(splits[1], source=other))
    np.testing.assert_array_equal(one.test_predictions, two.test_predictions)
    assert one.scores[0].inverse_l2 == two.scores[0].inverse_l2
    assert one.scores[0].linear > two.scores[0].linear


def test_probe_measures_what_is_linear():
    train, test = _blobs(300), _blobs(200)
    found, _ = probe.linear_predictions(train, test[0])
    assert np.mean(found == test[1]) > 0.97
    noise = np.random.default_rng(0).normal(size=(500, 5))
    found, _ = probe.linear_predictions((noise[:300], train[1]), noise[300:])
    assert 0.2 < np.mean(found == test[1]) < 0.5


def test_neighbours_vote_by_exponential_weights():
    train = np.eye(3), np.array([0, 1, 1])
    test = np.array([[1.0, 0.3, 0.3]]), np.array([0])
    # One close neighbour of class 0 against two further ones of class 1.
    assert probe.knn_accuracy(train, test, k=3, temperature=0.07) == 1.0
    assert probe.knn_accuracy(train, test, k=3, temperature=10.0) == 0.0
    assert probe.knn_accuracy(train, test, k=300, temperature=10.0) == 0.0


def test_budgets_are_of_each_class():
    labels = np.repeat([0, 1, 2], [3, 30, 300])
    for budget, expected in {
        "5": [3, 5, 5],
        "10%": [1, 3, 30],
        "100%": [3, 30, 300],
        "0.1%": [1, 1, 1],
    }.items():
        rows = probe.choose_labels(labels, budget, seed=0)
        assert np.bincount(labels[rows]).tolist() == expected
        assert len(set(rows)) == len(rows)
    one, other = (probe.choose_labels(labels, "5", seed) for seed in (0, 1))
    assert set(one) != set(other)


@pytest.mark.parametrize("budget", ["0", "-1", "0%", "101%", "x", "1.5", ""])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="label budget"):
        probe.Options(label_budgets=(budget,))


def test_classes_must_be_the_same(splits, tmp_path):
    np.savez(
        tmp_path / "c.npz",
        images=np.zeros((4, 8, 8, 3), np.uint8),
        labels=np.zeros(4, int),
    )
    other = data.load(str(tmp_path / "c.npz"), "all")
    with pytest.raises(ValueError, match="two classes"):
        probe.check_classes(other, splits[1])
    with pytest.raises(ValueError, match="1 classes"):
        probe.check_classes(splits[0], other)


def test_only_so_many_training_images_are_used(splits):
    options = dataclasses.replace(_OPTIONS, max_train=100)
    results = probe.measure({"pixels": None}, *splits, 8, options)
    assert results.num_train == 100
    assert len(results.test_ids) == 90


def test_table_is_aligned(splits):
    results = probe.measure({"pixels": None}, *splits, 8, _OPTIONS)
    title, *lines = probe.table(results).splitlines()
    assert title.endswith("150 training, 90 test images")
    assert len({len(line) for line in lines}) == 1
    (scores,) = results.scores
    assert f"{100 * scores.linear:.1f}" in lines[2]
    mean = 100 * np.mean(scores.few_labels["2 a class"])
    assert f"{mean:.1f} ±" in lines[2]
