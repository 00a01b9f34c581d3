# SPDX-License-Identifier: Apache-2.0
"""Names and sizes of encoders."""

import inspect
import sys

import keras
import pytest

import model
from contrastive.encoders import architecture as names
from tests.support import processes


def test_keras_encoders_are_backbones_of_installed_keras():
    backbones = {
        name for name, value in vars(keras.applications).items() if inspect.isfunction(value)
    }
    # NASNet's graph depends on the size of the images.
    backbones -= {"NASNetLarge", "NASNetMobile"}
    assert set(names.KERAS_ENCODERS.values()) == backbones
    assert len(names.KERAS_ENCODERS) == len(backbones)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("efficientnet_v2_s", "EfficientNetV2S"),
        ("resnet50", "ResNet50"),
        ("resnet50_v2", "ResNet50V2"),
        ("mobilenet_v3_small", "MobileNetV3Small"),
        ("convnext_tiny", "ConvNeXtTiny"),
        ("convnext_xlarge", "ConvNeXtXLarge"),
        ("densenet121", "DenseNet121"),
        ("inception_resnet_v2", "InceptionResNetV2"),
        ("vgg16", "VGG16"),
    ],
)
def test_keras_encoders_name_is_snake_case(name, expected):
    assert names.KERAS_ENCODERS[name] == expected
    assert name in model.ENCODERS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet_50", "Did you mean resnet50"),
        ("EfficientNet_V2_S", "Did you mean efficientnet_v2_s"),
        ("qqq", "The encoders are resnet, convnext_base"),
    ],
)
def test_check_encoder_unknown_name_raises_with_hint(name, hint):
    with pytest.raises(ValueError, match=hint) as raised:
        names.check_encoder(name, model.ENCODERS)
    assert f"Received: {name!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("encoder", "size"),
    [("vgg16", 31), ("inception_resnet_v2", 74), ("mobilenet", 16)],
)
def test_check_image_size_too_small_raises(encoder, size):
    with pytest.raises(ValueError, match=f"Received: {size}"):
        names.check_image_size(encoder, size)


@pytest.mark.parametrize("encoder", ["resnet", "resnet50", "toy"])
def test_check_image_size_without_minimum_accepts_one_pixel(encoder):
    names.check_image_size(encoder, 1)


def test_check_encoder_added_name_is_accepted():
    names.check_encoder("toy", [*model.ENCODERS, "toy"])


_LIGHT = (
    "contrastive.encoders.architecture",
    "contrastive.devices.selection",
    "contrastive.commands.sizes",
)
_HEAVY = ("tensorflow", "keras", "numpy", "tensorflow_datasets", "sklearn")


def test_light_modules_import_no_tensorflow():
    program = (
        f"import sys, {', '.join(_LIGHT)}; "
        f"print([name for name in {_HEAVY} if name in sys.modules])"
    )
    found = processes.run(sys.executable, "-c", program).stdout
    assert found.strip() == "[]"
