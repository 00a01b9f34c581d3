# SPDX-License-Identifier: Apache-2.0
"""Tests of the settings of views; `test_data_util` tests their effect."""

import math

import pytest

import data_util
from contrastive.config import augmentation

SIZE = 32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "`size` must be positive"),
        ({"hue": 0.6}, "`hue` must be between 0 and 0.5"),
        ({"contrast": 1.2}, "`contrast` must be between 0 and 1"),
        ({"hue": math.nan}, "`hue` must be between 0 and 0.5"),
        ({"flip_probability": -0.1}, "`flip_probability`.*Received: -0.1"),
        ({"crop_area": (0.5, 0.2)}, "`crop_area` must hold"),
        ({"blur_sigma": (0.0, 2.0)}, "`blur_sigma` must hold"),
        ({"brightness_mode": "both"}, "`brightness_mode` must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        augmentation.Augmentation(**({"size": SIZE} | setting))


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="`view` must be 0 or 1. Received: 2"):
        augmentation.byol_augmentation(SIZE, view=2)


def test_data_util_has_the_settings_under_the_same_names():
    for name in ("Augmentation", "simclr_augmentation", "byol_augmentation"):
        assert getattr(data_util, name) is getattr(augmentation, name)
