# SPDX-License-Identifier: Apache-2.0
"""The networks' description, names and numbers, without TensorFlow."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from contrastive.config.choices import BASE_FILTERS

# depth: (blocks in each of the four groups, whether they are bottlenecks)
ARCHITECTURES = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
BOTTLENECK_EXPANSION = 4  # output filters of a bottleneck / inner filters

# Without NASNet, whose graph depends on the size of the images.
_KERAS_APPLICATIONS = """
ConvNeXtBase ConvNeXtLarge ConvNeXtSmall ConvNeXtTiny ConvNeXtXLarge
DenseNet121 DenseNet169 DenseNet201
EfficientNetB0 EfficientNetB1 EfficientNetB2 EfficientNetB3 EfficientNetB4
EfficientNetB5 EfficientNetB6 EfficientNetB7 EfficientNetV2B0 EfficientNetV2B1
EfficientNetV2B2 EfficientNetV2B3 EfficientNetV2L EfficientNetV2M
EfficientNetV2S InceptionResNetV2 InceptionV3
MobileNet MobileNetV2 MobileNetV3Large MobileNetV3Small
ResNet101 ResNet101V2 ResNet152 ResNet152V2 ResNet50 ResNet50V2
VGG16 VGG19 Xception
""".split()
# One word each in snake_case, e.g. efficientnet_v2_s, convnext_tiny, vgg16.
_WORDS = ("ConvNeXt", "DenseNet", "EfficientNet", "MobileNet", "ResNet", "VGG",
          "XLarge")  # fmt: skip


def _snake_case(name: str) -> str:
    for word in _WORDS:
        name = name.replace(word, word.capitalize())
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


# The backbones of `keras.applications`: name of the encoder to Keras's name.
KERAS_ENCODERS = {_snake_case(name): name for name in _KERAS_APPLICATIONS}
# Smallest images, in pixels, for which some pixels are left at the end.
_MINIMUM_IMAGE_SIZES = {
    "convnext": 32, "densenet": 29, "efficientnet_b": 32, "inception": 75,
    "mobilenet": 31, "vgg": 32, "xception": 7,
}  # fmt: skip


def check_encoder(name: str, known: Iterable[str]) -> None:
    """Raises `ValueError`, with similar names, for an unknown encoder."""
    known = list(known)
    if name in known:
        return
    hint = f"The encoders are {', '.join(known)}."
    if close := difflib.get_close_matches(name, known, n=3):
        hint = f"Did you mean {' or '.join(close)}?"
    raise ValueError(
        f"`encoder` must be resnet or a backbone of keras.applications. Received: {name!r}. {hint}"
    )


def check_image_size(encoder: str, size: int) -> None:
    """Raises `ValueError` if the smaller side, in pixels, is too small."""
    for prefix, minimum in _MINIMUM_IMAGE_SIZES.items():
        if encoder.startswith(prefix) and size < minimum:
            raise ValueError(
                f"The encoder {encoder} needs images, and views, of at least "
                f"{minimum} pixels a side. Received: {size}."
            )


def scaled_filters(base: float, width_multiplier: float) -> int:
    """Computes the number of filters of a layer of a ResNet."""
    return max(8, round(base * width_multiplier))


def selective_kernel_filters(filters: int, sk_ratio: float) -> int:
    """Computes the filters of the layer that mixes selective kernels."""
    return max(int(filters * sk_ratio), 32)


def squeeze_filters(filters: int, se_ratio: float) -> int:
    """Computes the filters of the first layer of squeeze-and-excitation."""
    return max(1, int(filters * se_ratio))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The description that determines the networks and their variables.

    It is written to `run.json`, so that a checkpoint can be read without repeating the flags of its
    training. Fields are the flags of the same names, whose help describes them, and those below.
    Only the encoder "resnet" uses the fields from `resnet_depth` to `zero_init_residual`, which are
    arguments of `resnet.resnet`. Arguments of the heads are those of `encoders.heads`.

    Attributes:
        batch_norm_decay: momentum of the moving statistics, in [0, 1].
        image_mean: subtracted from images in [0, 1], one number a channel; () for none.
        image_std: divisor of the images after that; () for none.
        target_bn: BatchNorm of the target network: "batch" uses the statistics of its batch,
            "average" those averaged with the weights.
        ft_proj_selector: layer of the projection head that is the input of the classifier; 0 is the
            encoder's output, -1 the projection.
        num_classes: number of classes of the classifier; 0 for no classifier.
    """

    encoder: str = "resnet"
    resnet_depth: int
    width_multiplier: float
    stem: str
    padding: str
    shortcuts: str = "always"
    preactivation: bool = False
    base_filters: Sequence[int] = BASE_FILTERS
    sk_ratio: float
    se_ratio: float
    zero_init_residual: bool
    global_bn: bool
    batch_norm_decay: float
    channels: int
    image_mean: Sequence[float]
    image_std: Sequence[float]
    proj_head_mode: str
    proj_out_dim: int
    num_proj_layers: int
    proj_hidden_dim: Sequence[int] = ()
    proj_bn: str = "hidden"
    predictor: bool = False
    target_network: bool = False
    target_bn: str = "batch"
    ft_proj_selector: int
    num_classes: int
    zero_init_logits_layer: bool

    @classmethod
    def from_record(cls, record: Mapping[str, Any], **changes: Any) -> "Architecture":
        """Builds the architecture that `run.json` of any version describes.

        Lists become tuples, missing fields get their defaults, and names of other versions are
        ignored. Changes replace values of the record.

        Raises:
            ValueError: if a field without a default is missing, or a change names no field.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        if unknown := sorted(changes.keys() - defaults):
            raise ValueError(f"Networks have no {', '.join(unknown)}.")
        values = {name: record.get(name, defaults[name]) for name in defaults}
        values |= changes
        missing = [n for n, v in values.items() if v is dataclasses.MISSING]
        if missing:
            raise ValueError(f"The description of the networks lacks {', '.join(missing)}.")
        lists = {n: tuple(v) for n, v in values.items() if isinstance(v, list)}
        return cls(**values | lists)

    def without_pretraining(self) -> "Architecture":
        """Copies the description without the parts for pretraining alone."""
        return dataclasses.replace(self, predictor=False, target_network=False)
