# SPDX-License-Identifier: Apache-2.0
"""The settings of an augmented view and their presets; without TensorFlow."""

import dataclasses
import math
from typing import Any

from contrastive.config.choices import BRIGHTNESS_MODES, MASK_FILLS

# Largest valid value of each other number, 1, and of each pair of numbers.
_LIMITS = {"brightness": math.inf, "hue": 0.5}
_PAIRS = {"crop_area": 1.0, "crop_aspect": math.inf, "blur_sigma": math.inf}
_CHOICES = {"brightness_mode": BRIGHTNESS_MODES, "mask_fill": MASK_FILLS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Settings of one view; the operations run in this order.

    Crop and resize, flip, colour jitter (four operations in random order, each clipped to [0, 1]),
    grayscale, blur, solarize. Saturation, hue and grayscale are for three channels only. The
    defaults are SimCLR's at colour strength 1. U is the uniform distribution.

    Raises:
        ValueError: if a value is out of its range.
    """

    size: int  # side of the square output, in pixels
    crop: bool = True  # False if the host has already cropped to `size`
    # Smallest and largest share of the image in a crop, and width / height.
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    # `min_object_covered` of `tf.image.sample_distorted_bounding_box`: crops of a smaller share are
    # drawn again.
    crop_min_covered: float = 0.1
    flip_probability: float = 0.5  # of a left-right flip
    jitter_probability: float = 0.8  # of the four colour operations together
    # b: the image is multiplied by U(max(1 - b, 0), 1 + b) (SimCLR), or U(-b, b) is added to it
    # (BYOL, SimCLR's first version).
    brightness: float = 0.8
    brightness_mode: str = "multiplicative"  # or "additive"
    # c, at most 1: multiplies distances from the mean of each channel by U(1 - c, 1 + c).
    contrast: float = 0.8
    saturation: float = 0.8  # s <= 1: multiplies HSV's by U(1 - s, 1 + s)
    hue: float = 0.2  # h <= 0.5: shifts HSV's by U(-h, h) full circles
    grayscale_probability: float = 0.2
    blur_probability: float = 0.5  # of a Gaussian of radius `size // 20` pixels
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its limits, in pixels
    solarize_probability: float = 0.0  # of inverting values of 0.5 and more
    # Of removing the background before all else, see `sources/masks.py`.
    mask_probability: float = 0.0
    # "zero" (black, ReLICv2), "mean" (of each channel) or "noise" (uniform).
    mask_fill: str = "zero"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"`size` must be positive. Received: {self.size}")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            limit = _PAIRS.get(name) or _LIMITS.get(name, 1.0)
            demand = ""
            if name in _CHOICES and value not in _CHOICES[name]:
                demand, value = f"be one of {_CHOICES[name]}", repr(value)
            elif name in _PAIRS and not 0 < value[0] <= value[1] <= limit:
                demand = f"hold 0 < smallest <= largest <= {limit}"
            elif isinstance(field.default, float) and not 0 <= value <= limit:
                demand = f"be between 0 and {limit}"
            if demand:
                raise ValueError(f"`{name}` must {demand}. Received: {value}")
        if self.crop_area[1] < self.crop_min_covered:
            raise ValueError(
                f"`crop_area` must reach {self.crop_min_covered} "
                "(`crop_min_covered`), below which crops are drawn again. "
                f"Received: {self.crop_area}"
            )


def simclr_augmentation(
    size: int, *, strength: float = 1.0, use_blur: bool = True, **overrides: Any
) -> Augmentation:
    """Makes SimCLR's augmentation, the same for both views.

    The `strength` of the colour jitter, between 0 and 1.25, is 1 for ImageNet and 0.5 for CIFAR,
    which SimCLR does not blur either. `size` and `overrides` are fields of `Augmentation`.

    Source: Chen et al., arXiv:2002.05709, appendix A; google-research/simclr, tf2/data_util.py.
    Differs from it: sigma of the blur is drawn for each image instead of once for a batch, so that
    a view does not depend on the batch it is in.
    """
    settings: dict[str, Any] = {
        "size": size,
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
        "blur_probability": 0.5 if use_blur else 0.0,
    }
    return Augmentation(**(settings | overrides))


def byol_augmentation(size: int, *, view: int, **overrides: Any) -> Augmentation:
    """Makes BYOL's augmentation of one of the two views.

    `view` is 0 for the paper's T (always blurred) and 1 for T' (rarely blurred, sometimes
    solarized); `size` and `overrides` are fields of `Augmentation`.

    Source: Grill et al., arXiv:2006.07733, table 6; deepmind-research, byol/utils/augmentations.py.
    The paper draws the logarithm of the aspect ratio of a crop uniformly; its code, and so do we,
    the ratio itself.

    Raises:
        ValueError: if `view` is neither 0 nor 1.
    """
    if view not in (0, 1):
        raise ValueError(f"`view` must be 0 or 1. Received: {view}")
    base = Augmentation(
        size=size,
        brightness=0.4,
        brightness_mode="additive",
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        blur_probability=(1.0, 0.1)[view],
        solarize_probability=(0.0, 0.2)[view],
    )
    return dataclasses.replace(base, **overrides)


def relic_pytorch_augmentation(size: int, *, solarize: bool, **overrides: Any) -> Augmentation:
    """Makes the augmentation of filipbasara0/relic; large views `solarize`.

    `size` and `overrides` are fields of `Augmentation`.

    Source: filipbasara0/relic, relic/aug.py. Differs from it: crops are drawn as SimCLR's (see
    `data_util.random_crop_boxes`), and contrast is of each channel.
    """
    base = Augmentation(
        size=size,
        crop_area=(0.1, 1.0),
        crop_min_covered=0.0,
        blur_probability=1.0,
        solarize_probability=0.2 if solarize else 0.0,
    )
    return dataclasses.replace(base, **overrides)
