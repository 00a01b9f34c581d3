# SPDX-License-Identifier: Apache-2.0
"""Tests of `completion.py`: values and views for small images."""

import numpy as np
import pytest
import tensorflow as tf

import data_util
from contrastive.config.completion import complete
from contrastive.training.config import make_views
from tests.support import command_lines, program


def _completed(*words):
    """Resolves a command line and completes it for images of 32 pixels."""
    facts = command_lines.Facts(image_size=(32, 32))
    return complete(program.resolve(*words), facts)


def _views(*words):
    """Returns views of 32 and 16 pixels, as a preset has them."""
    resolved = program.resolve(*words)
    return make_views(resolved.replace("test", image_size=32, small_image_size=16))


def test_views_alternate_and_only_large_ones_lose_their_background():
    words = ("--objective=relicv2", "--saliency=spectral")
    views = _views(*words, "--num_large_views=3")
    assert [view.size for view in views] == [32, 32, 32, 16, 16]
    assert [view.blur_probability for view in views] == [1, 0.1, 1, 0.1, 0.1]
    assert [v.mask_probability for v in views] == [0.1, 0.1, 0.1, 0, 0]
    # As large as they are said to be; no crop is redrawn for being small.
    boxes = data_util.random_crop_boxes(
        data_util.example_keys(0, 0, tf.range(1000), 3), 375, 500, views[3]
    )
    areas = tf.reduce_prod(boxes[:, 2:], axis=1).numpy() / (375 * 500)
    assert views[3].crop_area == (0.05, 0.14)
    np.testing.assert_allclose(np.quantile(areas, [0, 0.5, 1]),
                               [0.05, 0.089, 0.14], atol=0.004)  # fmt: skip
    # Nothing to remove it by.
    for view in _views("--objective=relicv2"):
        assert view.mask_probability == 0


@pytest.mark.parametrize(
    ("words", "blur"),
    [
        ("--objective=relic", 0),
        ("--objective=relic --blur_probability=0.3", 0.3),
        # Another augmentation keeps what it is.
        ("--preset=relic_pytorch_cifar10", 1),
        ("--objective=byol --augmentation=simclr", 0.5),
        ("--objective=byol --sym_aug", 0.5),
    ],
)
def test_complete_small_images_are_blurred_only_if_asked(words, blur):
    resolved = _completed(*words.split(), "--dataset=photo_patches")
    assert resolved["image_size"] == 32
    for view in make_views(resolved):
        assert view.blur_probability == blur


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("", (512,)), ("--target_network=false", (4096, 2048, 1024, 512))],
)
def test_complete_small_images_have_defaults_of_their_own(flag, expected):
    words = ("--objective=relic", "--dataset=photo_patches", *flag.split())
    resolved = _completed(*words)
    assert resolved["proj_hidden_dim"] == expected
    assert resolved["target_decay"] == 0.99
    views = make_views(resolved)
    assert [view.blur_probability for view in views] == [0, 0]
