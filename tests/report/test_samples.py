# SPDX-License-Identifier: Apache-2.0
"""The sample of a report: chosen images, their map and their neighbours."""

import numpy as np
import pytest

import data
from contrastive.evaluation import features
from contrastive.report import content, page
from tests.support.report_page import make_sample


def test_choice_is_of_few_classes_and_always_the_same():
    labels = np.repeat(np.arange(-1, 100), 50)
    chosen = content.choose(labels, limit=200)
    np.testing.assert_array_equal(chosen, np.unique(chosen))
    assert len(chosen) == 200
    classes = np.unique(labels[chosen])
    assert len(classes) == 20
    assert (classes.min(), classes.max()) == (0, 99)
    np.testing.assert_array_equal(chosen, content.choose(labels, limit=200))
    assert len(content.choose(np.full(7, -1))) == 7


def test_neighbours_are_those_of_the_greatest_cosine():
    random = np.random.default_rng(0)
    x = random.normal(size=(20, 4)) * random.uniform(1, 9, (20, 1))
    nearest, cosines = page.nearest_neighbours(x, 3)
    for i in range(20):
        of_i = [
            -np.inf if i == j else x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            for j in range(20)
        ]
        np.testing.assert_array_equal(nearest[i], np.argsort(of_i)[:-4:-1])
        np.testing.assert_allclose(cosines[i], np.sort(of_i)[:-4:-1])


def test_map_keeps_classes_together():
    sample = make_sample(count=90)
    points = page.project(sample.embeddings)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(1)
    assert (sample.labels[nearest] == sample.labels).mean() > 0.95


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_sample_is_of_the_chosen_images(tmp_path, channels):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (9, 6, 6, channels), np.uint8)
    path = str(tmp_path / "some.npz")
    np.savez(path, images=images, labels=np.arange(9) % 2)
    dataset = data.load(path, "all", channels=channels)
    outputs = features.compute_outputs(None, data.subset(dataset, [2, 3, 7]), 6)
    sample = content.take(dataset, outputs, 6)
    np.testing.assert_array_equal(sample.embeddings, outputs.values)
    np.testing.assert_allclose(
        sample.images.mean((1, 2, 3)) / 255,
        outputs.values.mean(1),
        atol=3e-3,
    )
    np.testing.assert_array_equal(sample.labels, [0, 1, 1])
    assert sample.names == ["example 2", "example 3", "example 7"]
    assert sample.class_of(1) == "1"
    if channels == 3:
        np.testing.assert_array_equal(sample.images, images[[2, 3, 7]])
    assert sample.images.shape == (3, 6, 6, 3)


def test_large_images_are_shown_small():
    images = np.full((1, 200, 200, 3), 200, np.uint8)
    dataset = data.Dataset(
        name="large",
        split="test",
        source=data.Arrays(images, np.array([-1])),
        num_examples=1,
        class_names=(),
        channels=3,
        image_size=(200, 200),
        file_names=("a/b.png",),
    )
    outputs = features.Outputs(values=np.ones((1, 4)), labels=np.array([-1]), ids=np.array([0]))
    sample = content.take(dataset, outputs, 200)
    np.testing.assert_array_equal(sample.images, np.full((1, 96, 96, 3), 200, np.uint8))
    assert sample.names == ["a/b.png"]
    assert sample.class_of(0) == ""
