# SPDX-License-Identifier: Apache-2.0
"""Pictures made of several images."""

import numpy as np
import pytest

from contrastive.report import events, page


def test_grid_has_a_column_an_image_and_a_row_a_view():
    large = np.arange(2 * 96 * 96 * 3).reshape(2, 96, 96, 3) / 55296
    small = np.zeros((2, 48, 48, 3))
    grid = events.image_grid([large, small])
    assert grid.shape == (192, 192, 3)
    np.testing.assert_array_equal(grid[:96, :96], large[0])
    np.testing.assert_array_equal(grid[:96, 96:], large[1])
    # The small view is in the middle of a white margin.
    np.testing.assert_array_equal(grid[120:168, 24:72], small[0])
    np.testing.assert_array_equal(grid[96, :], 1.0)


def test_grid_enlarges_small_images():
    view = np.arange(40 * 40 * 3).reshape(1, 40, 40, 3) / 4800
    grid = events.image_grid([view])
    assert grid.shape == (120, 120, 3)
    for row in range(3):
        np.testing.assert_array_equal(grid[row::3, 1::3], view[0])


def test_grid_shows_other_channels_as_grey():
    view = np.stack([np.zeros((1, 96, 96)), np.ones((1, 96, 96))], axis=-1)
    np.testing.assert_array_equal(events.image_grid([view]), np.full((96, 96, 3), 0.5))


@pytest.mark.parametrize("count", [1, 5, 9, 10])
def test_sprite_has_the_images_row_by_row(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3))
    picture = page.sprite(images.astype(np.uint8))
    columns = picture.shape[1] // 4
    assert picture.shape[0] // 4 in (columns, columns - 1)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        tile = picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(tile, image)
