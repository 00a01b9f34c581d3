# SPDX-License-Identifier: Apache-2.0
"""Photo patches, the data set that needs no download."""

import functools
import os

import numpy as np
import skimage
from PIL import Image

from contrastive.sources import arrays, splits
from contrastive.sources.dataset import Dataset, Request
from contrastive.sources.facts import PATCH_SIZE, PATCHES, PHOTO_PATCHES

# In the wheel of scikit-image 0.26; a class is named without the extension.
_PICTURES = (
    "astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png "
    "coffee.png coins.png grass.png gravel.png hubble_deep_field.jpg ihc.png "
    "moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()
_SOURCE_SIDES = (32, 96)  # sides of a patch in its picture, in pixels
_GAP = 16  # pixels between the regions of train and test


def owns(request: Request) -> bool:
    """Tells if the built-in data set is meant."""
    return request.name == PHOTO_PATCHES


def load(request: Request) -> Dataset:
    """Cuts 32x32 RGB patches out of the 16 pictures of scikit-image's wheel.

    The class is the picture. Of its longer side, test patches come from the middle 28 %, train
    patches from both sides, with a gap between: no pixel is shared. A patch is a square of 32 to 96
    pixels (log-uniform) at a random place, downsampled by box filter. 10,000 train and 2,000 test
    patches, of a fixed seed. Logistic regression on raw pixels reaches 45.0 % on test.
    """
    rows = splits.select(request.split, PATCHES, PHOTO_PATCHES)
    parts = [_cut_patches(part) for part in PATCHES]
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    names = [os.path.splitext(picture)[0] for picture in _PICTURES]
    return arrays.in_memory(request, images[rows], labels[rows], names)


outline = load


def pictures() -> list[Image.Image]:
    """Opens the 16 photographs and micrographs themselves, in RGB."""
    folder = os.path.join(os.path.dirname(skimage.__file__), "data")
    opened = []
    for name in _PICTURES:
        with Image.open(os.path.join(folder, name)) as picture:
            opened.append(picture.convert("RGB"))
    return opened


@functools.cache
def _cut_patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[N, 32, 32, 3]` and labels `[N]`, classes in turn."""
    originals = pictures()
    # The generator of NumPy whose draws are promised never to change.
    random = np.random.RandomState(list(PATCHES).index(split))
    labels = np.arange(PATCHES[split]) % len(_PICTURES)
    size = PATCH_SIZE, PATCH_SIZE
    patches = []
    for picture in (originals[label] for label in labels):
        patch = picture.crop(_patch_box(picture.size, split, random))
        patches.append(np.asarray(patch.resize(size, Image.Resampling.BOX)))
    return np.stack(patches), labels


def _patch_box(
    size: tuple[int, int], split: str, random: np.random.RandomState
) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of a patch, in pixels."""
    length, breadth = max(size), min(size)
    first, last = int(0.36 * length), int(0.64 * length)
    start, stop = first, last
    if split == "train":
        sides = (0, first - _GAP), (last + _GAP, length)
        start, stop = sides[random.randint(2)]
    smallest, largest = _SOURCE_SIDES
    side = int(smallest * (largest / smallest) ** random.random_sample())
    along = start + random.randint(stop - start - side + 1)
    across = random.randint(breadth - side + 1)
    left, top = (along, across) if size[0] == length else (across, along)
    return left, top, left + side, top + side
