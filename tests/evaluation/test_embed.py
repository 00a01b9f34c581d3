# SPDX-License-Identifier: Apache-2.0
"""Embeddings and predictions of folders: in order, named, none lost."""

import csv
import importlib.util

import keras
import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf

import data
from contrastive.evaluation import features
from contrastive.evaluation.features import Outputs

_SIZES = {
    "cat/b.jpg": (20, 30),
    "cat/a4.png": (16, 16),
    "dog/x.png": (40, 18),
    "dog/lost.jpg": None,
    "dog/y.jpg": (33, 33),
    "zebra/z.png": (17, 16),
}
_READABLE = ["cat/a4.png", "cat/b.jpg", "dog/x.png", "dog/y.jpg", "zebra/z.png"]


@pytest.fixture
def folder(tmp_path):
    """Images of unlike sizes, each of one grey; one that is no image."""
    for number, (name, size) in enumerate(_SIZES.items()):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if size is None:
            path.write_bytes(b"no image")
            continue
        image = tf.fill([*size, 3], tf.cast(40 * number, tf.uint8))
        encode = tf.io.encode_png if "png" in name else tf.io.encode_jpeg
        path.write_bytes(encode(image).numpy())
    return str(tmp_path / "images")


def _greys():
    return np.array([40, 0, 80, 160, 200]) / 255


@pytest.fixture
def images(folder):
    return data.load(folder, "all")


@pytest.fixture
def outputs(images):
    x = keras.Input((None, None, 3))
    mean = keras.Model(x, keras.layers.GlobalAveragePooling2D()(x))
    return features.compute_outputs(mean, images, 16, batch_size=2)


def test_all_of_a_folder_in_the_order_of_the_paths(images, outputs):
    assert list(images.file_names) == _READABLE
    # Whatever split each is in.
    assert data.load(images.name, "test").file_names == ("cat/a4.png",)
    assert images.unreadable == ("dog/lost.jpg",)
    np.testing.assert_allclose(outputs.values[:, 0], _greys(), atol=0.01)
    assert outputs.labels.tolist() == [0, 0, 1, 1, 2]


def test_embeddings_as_npz(images, outputs, tmp_path):
    path = str(tmp_path / "e.npz")
    assert features.write_embeddings(path, images, outputs) == 1
    with np.load(path) as found:
        assert found["name"].tolist() == _READABLE
        assert found["unreadable"].tolist() == ["dog/lost.jpg"]
        assert found["class_names"].tolist() == ["cat", "dog", "zebra"]
        assert found["label"].tolist() == [0, 0, 1, 1, 2]
        np.testing.assert_array_equal(found["embedding"], outputs.values)


def test_embeddings_as_parquet(images, outputs, tmp_path):
    path = str(tmp_path / "e.parquet")
    features.write_embeddings(path, images, outputs)
    found = pyarrow.parquet.read_table(path).to_pydict()
    assert found["name"] == _READABLE
    assert found["class"] == ["cat", "cat", "dog", "dog", "zebra"]
    np.testing.assert_array_equal(np.array(found["embedding"], np.float32), outputs.values)


def test_an_image_that_fails_later_is_missing_and_named(images, outputs):
    assert features._names(images, outputs.ids[1:]) == (
        _READABLE[1:],
        ["cat/a4.png", "dog/lost.jpg"],
    )


def test_images_without_names_have_their_ids(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    images = data.load(str(tmp_path / "x.npz"), "all")
    outputs = features.compute_outputs(None, images, 4)
    assert features._names(images, outputs.ids) == (["0", "1", "2"], [])
    path = str(tmp_path / "e.parquet")
    features.write_embeddings(path, images, outputs)
    found = pyarrow.parquet.read_table(path).to_pydict()
    assert found["label"] == [-1] * 3
    assert found["class"] == [None] * 3


def _probabilities(outputs):
    values = np.array([[0.2, 0.5, 0.3]] * 4 + [[0.1, 0.1, 0.8]], np.float32)
    return Outputs(values=values, labels=outputs.labels, ids=outputs.ids)


def test_predictions_as_csv(images, outputs, tmp_path, capsys):
    classes = ["a", 'b,"quoted"', "c"]
    path = tmp_path / "p.csv"
    args = images, _probabilities(outputs), classes
    features.write_predictions(str(path), *args, 2)
    features.write_predictions(None, *args, 2)
    assert capsys.readouterr().out == path.read_text()
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == [
        "name", "label", "class_1", "probability_1", "class_2", "probability_2",
    ]  # fmt: skip
    assert [row[0] for row in rows] == _READABLE
    assert rows[0][1:] == ["cat", classes[1], "0.500000", "c", "0.300000"]
    # Of equals, the first.
    assert rows[4][1:] == ["zebra", "c", "0.800000", "a", "0.100000"]


def test_predictions_as_npz(images, outputs, tmp_path):
    path = str(tmp_path / "p.npz")
    features.write_predictions(path, images, _probabilities(outputs), ["a", "b", "c"], 9)
    with np.load(path) as found:
        assert found["class"][0].tolist() == [1, 2, 0]
        np.testing.assert_allclose(found["probability"].sum(1), 1, atol=1e-6)
        assert found["class_names"].tolist() == ["a", "b", "c"]
        assert found["label_names"].tolist() == ["cat", "dog", "zebra"]


def test_a_file_that_cannot_be_written_is_known_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\.npz or \.parquet"):
        features.check_output("e.csv", features.EMBEDDING_FORMATS)
    features.check_output(str(tmp_path / "new/e.npz"), features.EMBEDDING_FORMATS)
    assert (tmp_path / "new").is_dir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install"):
        features.check_output("e.parquet", features.EMBEDDING_FORMATS)
