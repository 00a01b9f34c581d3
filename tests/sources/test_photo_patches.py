# SPDX-License-Identifier: Apache-2.0
"""Tests of the patches of photographs."""

import hashlib

import numpy as np
import pytest

import data
from contrastive.sources import photo_patches


def test_photo_patches_are_the_same_bits_everywhere():
    train, test = (data.load("photo_patches", s) for s in ("train", "test"))
    assert train.num_examples, test.num_examples == (10_000, 2_000)
    assert np.ptp(np.bincount(train.source.labels, minlength=16)) == 0
    digests = [hashlib.sha256(d.source.images.tobytes()).hexdigest()[:16] for d in (train, test)]
    assert digests == ["e3b84fb10076b65d", "ffe4e6615ba74217"]


@pytest.mark.parametrize("size", [(451, 300), (303, 384)])
def test_train_and_test_patches_share_no_pixel(size):
    boxes = {
        split: np.array(
            [
                photo_patches._patch_box(size, split, np.random.RandomState(seed))
                for seed in range(500)
            ]
        )
        for split in ("train", "test")
    }
    seen = {split: np.zeros(size, bool) for split in boxes}
    for split, all_boxes in boxes.items():
        assert (all_boxes >= 0).all()
        assert (all_boxes[:, 2:] <= size).all()
        for left, top, right, bottom in all_boxes:
            assert right - left == bottom - top
            seen[split][left:right, top:bottom] = True
    assert not (seen["train"] & seen["test"]).any()
    assert seen["train"].mean() > 0.6
    assert seen["test"].mean() > 0.2
