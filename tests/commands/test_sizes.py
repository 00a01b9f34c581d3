# SPDX-License-Identifier: Apache-2.0
"""Sizes of networks and optimizers equal those that are built."""

import dataclasses
import math

import pytest
import tensorflow as tf

import model
from contrastive.commands import sizes
from contrastive.config import choices
from contrastive.training.state import TrainState
from tests.support import replica_run

_BYOL = {
    "proj_head_mode": "mlp",
    "proj_hidden_dim": (24,),
    "predictor": True,
    "target_network": True,
}
_NARROW = (8, 12, 16, 20, 24)
_ARCHITECTURES = [
    {},
    *({"resnet_depth": depth, "width_multiplier": 0.125}
      for depth in choices.DEPTHS),
    {"resnet_depth": 10, "width_multiplier": 0.3, "stem": "imagenet"},
    {"resnet_depth": 18, "width_multiplier": 1.5, "channels": 1},
    {"resnet_depth": 10, "width_multiplier": 0.01, "base_filters": _NARROW},
    {"resnet_depth": 50, "base_filters": _NARROW, "stem": "imagenet"},
    {"resnet_depth": 18, "base_filters": (64, 16, 16, 32, 32)},
    {"resnet_depth": 18, "shortcuts": "needed"},
    {"resnet_depth": 50, "shortcuts": "needed", "padding": "torch"},
    {"resnet_depth": 18, "sk_ratio": 0.0625, "stem": "imagenet"},
    {"resnet_depth": 50, "sk_ratio": 0.0625, "stem": "imagenet"},
    {"resnet_depth": 50, "sk_ratio": 0.9, "width_multiplier": 0.5},
    {"resnet_depth": 18, "se_ratio": 0.25, "channels": 4},
    {"resnet_depth": 50, "se_ratio": 0.01, "sk_ratio": 0.0625},
    {"resnet_depth": 18, "preactivation": True, "padding": "same"},
    {"resnet_depth": 50, "preactivation": True, "padding": "same"},
    {"resnet_depth": 18, "preactivation": True, "padding": "same",
     "stem": "imagenet", "shortcuts": "needed"},
    {"global_bn": False, "zero_init_residual": True, "image_mean": (0.5,) * 3},
    {"proj_head_mode": "none", "num_classes": 7},
    {"proj_head_mode": "linear", "ft_proj_selector": -1},
    {"num_proj_layers": 1, "ft_proj_selector": 1},
    {"num_proj_layers": 4, "ft_proj_selector": 2, "num_classes": 0},
    {"num_proj_layers": 3, "predictor": True, "proj_hidden_dim": (5,)},
    _BYOL,
    _BYOL | {"proj_bn": "all", "ft_proj_selector": 1, "target_bn": "average"},
    _BYOL | {"proj_bn": "none", "ft_proj_selector": -2},
    _BYOL | {"proj_hidden_dim": (9, 5), "predictor": False},
    _BYOL | {"proj_hidden_dim": (), "proj_bn": "all"},
]  # fmt: skip


def _architecture(**fields):
    return dataclasses.replace(replica_run.architecture("simclr"), **fields)


def _count(variables):
    return sum(math.prod(v.shape) for v in variables)


def _count_built(networks):
    return {
        name: sizes.Sizes(
            _count(network.trainable_variables),
            _count(network.non_trainable_variables),
        )
        for name, network in networks.models().items()
    }


@pytest.mark.parametrize("fields", _ARCHITECTURES, ids=str)
def test_network_sizes_equal_built_networks(fields):
    architecture = _architecture(**fields)
    expected = _count_built(model.build_networks(architecture))
    assert sizes.network_sizes(architecture) == expected


def test_network_sizes_of_keras_backbone_are_none():
    architecture = _architecture(encoder="resnet50")
    assert sizes.network_sizes(architecture) is None
    assert sizes.trained_numbers(architecture) is None


@pytest.mark.parametrize("train_mode", ["pretrain", "finetune"])
@pytest.mark.parametrize("after_block", [-1, 0, 2, 4])
@pytest.mark.parametrize("selector", [0, 1, -1])
def test_trained_numbers_equal_trained_variables(train_mode, after_block, selector):
    fields = _BYOL | {"ft_proj_selector": selector, "preactivation": True}
    architecture = _architecture(**fields, padding="same")
    networks = model.build_networks(architecture)
    config = dataclasses.replace(
        replica_run.config("simclr", "momentum"),
        train_mode=train_mode,
        fine_tune_after_block=after_block,
    )
    state = TrainState.create(config, networks)
    expected = state.trained_variables(config)
    found = sizes.trained_numbers(
        architecture,
        finetune=train_mode == "finetune",
        fine_tune_after_block=after_block,
    )
    assert found == (
        _count(expected["networks"]),
        _count(expected["classifier"]),
    )


@pytest.mark.parametrize("optimizer", ["lars", "momentum", "adam"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizer_numbers_equal_built_optimizers(optimizer, momentum):
    architecture = _architecture()
    networks = model.build_networks(architecture)
    config = dataclasses.replace(replica_run.config("simclr", optimizer), momentum=momentum)
    built = TrainState.create(config, networks).optimizers
    kinds = (optimizer, "momentum" if optimizer == "lars" else optimizer)
    trained = sizes.trained_numbers(architecture)
    for made, kind, count in zip(built[:2], kinds, trained, strict=True):
        num_bytes = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in made.variables)
        found = sizes.optimizer_numbers(kind, count, momentum=momentum)
        assert 4 * found == num_bytes
