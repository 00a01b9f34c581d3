# SPDX-License-Identifier: Apache-2.0
"""State dictionaries of torch give the features of their networks."""

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import model
import resnet
from contrastive.weights import loading, published
from contrastive.weights.families import torchvision
from tests.support import foreign
from tests.support.encoders import (
    TINY_TORCH,
    check_features,
    random_networks,
    state_dict_of,
)


def test_name_equals_torchvisions():
    encoder = resnet.resnet(50, width_multiplier=0.125)
    names = {torchvision.name(v.path) for v in encoder.variables}
    assert len(names) == len(encoder.variables)
    # As torchvision.models.resnet50().state_dict() has them.
    assert {
        "conv1.weight", "bn1.running_var", "layer1.0.conv1.weight",
        "layer1.0.downsample.0.weight", "layer1.0.downsample.1.running_mean",
        "layer3.5.bn3.bias", "layer4.2.conv3.weight",
    } <= names  # fmt: skip
    with pytest.raises(ValueError, match="no block_group1_block1_sk_conv1"):
        torchvision.name("block_group1_block1_sk_conv1/kernel")


@pytest.mark.parametrize("depth", [18, 50])
def test_find_state_dict_of_torchvision_gives_the_features(tmp_path, depth):
    networks = random_networks(
        **TINY_TORCH | {"resnet_depth": depth},
        image_mean=model.IMAGENET_MEAN,
        image_std=model.IMAGENET_STD,
    )
    path = str(tmp_path / "weights.pth")
    state_dict = state_dict_of(networks.encoder)
    foreign.write_torch(path, state_dict)
    check_features(loading.load_encoder(path), networks)
    path = str(tmp_path / "weights.safetensors")
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state_dict.items()}, path)
    check_features(loading.load_encoder(path), networks)


def test_find_half_precision_within_other_modules_gives_the_features(tmp_path):
    networks = random_networks(
        **TINY_TORCH,
        image_mean=model.IMAGENET_MEAN,
        image_std=model.IMAGENET_STD,
    )
    for variable in networks.encoder.variables:
        variable.assign(tf.cast(tf.cast(variable, "bfloat16"), "float32"))
    tensors = state_dict_of(networks.encoder)
    small = {
        name: array.astype(tf.bfloat16.as_numpy_dtype) if array.dtype == np.float32 else array
        for name, array in tensors.items()
    }
    content = {
        "state_dict": {
            **{f"module.encoder_q.{k}": v for k, v in small.items()},
            **{f"module.encoder_k.{k}": v * 0 for k, v in small.items()},
            "module.queue": np.zeros((2, 3), np.float32),
        },
        "epoch": np.int64(3),
    }
    path = str(tmp_path / "moco.pth.tar")
    foreign.write_torch(path, content, {"bfloat16": "BFloat16Storage"})
    check_features(loading.load_encoder(path), networks)
    target = loading.read_published(path, target=True)
    assert not target.weights["initial_conv/kernel"].any()


def _children(state_dict):
    """The same by the names of a torch.nn.Sequential of the children."""
    numbers = {"conv1": 0, "bn1": 1} | {f"layer{g}": g + 3 for g in range(1, 5)}
    parts = {name: name.partition(".") for name in state_dict}
    return {
        f"{numbers[child]}.{rest}": state_dict[name]
        for name, (child, _, rest) in parts.items()
        if child in numbers
    }


def test_find_relic_pytorch_gives_the_features(tmp_path):
    """Its encoder.pth and relic_model.pth, of the adapted CIFAR stem."""
    online = random_networks(**TINY_TORCH, stem="cifar")
    encoder = _children(state_dict_of(online.encoder))
    path = str(tmp_path / "encoder.pth")
    foreign.write_torch(path, encoder)
    check_features(loading.load_encoder(path), online, size=16)
    head = np.zeros((8, 64), np.float32)
    model_path = str(tmp_path / "relic_model.pth")
    foreign.write_torch(
        model_path,
        {
            "t_prime": np.zeros(1, np.float32),
            **{f"online_encoder.0.{k}": v for k, v in encoder.items()},
            "online_encoder.1.block.0.weight": head,
            **{f"target_encoder.0.{k}": v + 1 for k, v in encoder.items()},
            "target_encoder.1.block.0.weight": head,
        },
    )
    check_features(loading.load_encoder(model_path), online, size=16)
    target = loading.read_published(model_path, target=True)
    np.testing.assert_allclose(
        target.weights["initial_conv/kernel"],
        online.encoder.get_layer("initial_conv").kernel + 1,
    )


@pytest.mark.parametrize(
    "name",
    [
        "conv1.0.weight",
        "layer1.0.se.fc1.weight",
        "layer2.0.downsample.2.weight",
    ],
)
def test_identify_other_tensors_beside_torchvisions_raises(name):
    tensors = state_dict_of(random_networks(**TINY_TORCH).encoder)
    tensors[name] = np.ones((3, 4, 5, 6), np.float32)
    with pytest.raises(ValueError, match=rf"(?s){name} \(3, 4, 5, 6\)"):
        published.identify(tensors)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_find_file_of_torchvision_gives_its_features(tmp_path, name):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    network = getattr(models, name)().eval()
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_mean", "bn1.bias")):
            tensor.normal_(0, 0.3)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    path = str(tmp_path / f"{name}.pth")
    torch.save(network.state_dict(), path)
    network.fc = torch.nn.Identity()
    images = np.random.default_rng(0).random((2, 64, 97, 3), np.float32)
    normalized = (images - model.IMAGENET_MEAN) / model.IMAGENET_STD
    with torch.inference_mode():
        expected = network(
            torch.tensor(normalized.transpose(0, 3, 1, 2), dtype=torch.float32)
        ).numpy()
    encoder = loading.load_encoder(path)
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-4, atol=1e-4)
