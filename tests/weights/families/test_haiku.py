# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DeepMind's programs give the embeddings of those programs."""

import collections
import pickle

import numpy as np
import pytest
import tensorflow as tf

import model
from contrastive.weights import loading
from tests.support.encoders import SIZES, check_embeddings, golden_images
from tests.support.foreign import (
    GOLDEN,
    Reduced,
    haiku_trees,
    modules,
    pretrain,
)


def test_find_checkpoint_of_reference_program_gives_its_embeddings(golden):
    check_embeddings(GOLDEN / "tiny_pretrain.pkl", "tiny", golden)


@pytest.mark.parametrize(("devices", "protocol"), [(3, 2), (0, 2), (1, 4), (0, 5)])
def test_find_device_axes_and_protocols_give_the_embeddings(tmp_path, golden, devices, protocol):
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(pickle.dumps(pretrain("resnet18", devices), protocol))
    sizes = SIZES if (devices, protocol) == (3, 2) else SIZES[2:]
    check_embeddings(path, "resnet18", golden, sizes)


def test_find_named_tuple_of_byol_gives_the_embeddings(tmp_path, golden):
    fields = (
        "online_params", "target_params", "online_state", "target_state",
        "opt_state",
    )  # fmt: skip
    state = collections.namedtuple("_ByolExperimentState", fields)  # noqa: PYI024
    content = pretrain("resnet18")
    trees = content["experiment_state"]
    content["experiment_state"] = state(
        trees["online_params"], trees["online_params"],
        trees["online_state"], trees["online_state"], (),
    )  # fmt: skip
    path = tmp_path / "pretrain.pkl"
    with modules(byol__byol_experiment___ByolExperimentState=state):
        path.write_bytes(pickle.dumps(content, 2))
    check_embeddings(path, "resnet18", golden, SIZES[2:])


def _never(*_):
    raise AssertionError("called")


@pytest.mark.parametrize(
    "jax_function",
    [
        "jax___src__array___reconstruct_array",
        "jax___src__device_array__reconstruct_device_array",
    ],
)
def test_find_flat_mappings_of_jax_arrays_give_the_embeddings(tmp_path, golden, jax_function):
    def reconstruct(*_):
        _never()

    class FlatMapping:
        def __init__(self, mapping):
            self.mapping = mapping

        def __reduce__(self):
            return FlatMapping, (self.mapping,)

    def renamed(tree):
        return FlatMapping(
            {
                module.replace("/initial_conv", "/initial_conv_1"): FlatMapping(
                    {
                        name: Reduced(
                            reconstruct,
                            *np.asarray(array).__reduce__(),
                            {"weak_type": False, "named_shape": {}},
                        )
                        for name, array in tensors.items()
                    }
                )
                for module, tensors in tree.items()
            }
        )

    content = pretrain("resnet18", devices=1)
    content["experiment_state"] = {
        name: renamed(tree) for name, tree in content["experiment_state"].items()
    }
    path = tmp_path / "pretrain.pkl"
    with modules(
        **{jax_function: reconstruct},
        haiku___src__data_structures__FlatMapping=FlatMapping,
    ):
        path.write_bytes(pickle.dumps(content, 4))
    check_embeddings(path, "resnet18", golden, SIZES[2:])


def _preactivation(images, parameters, state, prefix):
    """ResNet version 2 with a basic block a group, from its formula."""

    def tensor(tree, module, name):
        return tree[f"{prefix}/~/{module}"][name]

    def conv(x, module, strides=1):
        kernel = tensor(parameters, module, "w")
        return tf.nn.conv2d(x, kernel, strides, "SAME")

    def bn_relu(x, module):
        mean, variance = (
            tensor(state, f"{module}/~/{kind}_ema", "average") for kind in ("mean", "var")
        )
        x = (x - mean) / np.sqrt(variance + 1e-5)
        x = x * tensor(parameters, module, "scale")
        return tf.nn.relu(x + tensor(parameters, module, "offset"))

    x = tf.nn.max_pool2d(conv(images, "initial_conv", 2), 3, 2, "SAME")
    for group in range(4):
        block, strides = f"block_group_{group}/~/block_0/~", 1 + (group > 0)
        y = bn_relu(x, f"{block}/batchnorm_0")
        shortcut = conv(y, f"{block}/shortcut_conv", strides)
        y = conv(y, f"{block}/conv_0", strides)
        y = bn_relu(y, f"{block}/batchnorm_1")
        x = shortcut + conv(y, f"{block}/conv_1")
    return tf.reduce_mean(bn_relu(x, "final_batchnorm"), (1, 2))


def test_find_preactivation_gives_features_of_its_formula(tmp_path, golden):
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(pickle.dumps(pretrain("tiny_v2"), 2))
    images = golden_images("97x65", golden)
    normalized = (images - model.IMAGENET_MEAN) / model.IMAGENET_STD
    expected = _preactivation(
        tf.cast(normalized, tf.float32), *haiku_trees("tiny_v2"), "tiny_res_net"
    )
    encoder = loading.load_encoder(str(path))
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_read_published_target_gives_other_weights(tmp_path):
    path = str(GOLDEN / "tiny_pretrain.pkl")
    online = loading.read_published(path)
    target = loading.read_published(path, target=True)
    kernel = "block_group1_block1_conv1/kernel"
    assert online.weights[kernel].shape == target.weights[kernel].shape
    assert any("target_params" in name for name in online.unread)
    assert any("online_params" in name for name in target.unread)
    without = tmp_path / "pretrain.pkl"
    without.write_bytes(pickle.dumps(pretrain("tiny_v2"), 2))
    with pytest.raises(ValueError, match="0 target networks"):
        loading.read_published(str(without), target=True)
