# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of SimCLR and RPC give the features of their networks."""

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from contrastive.weights import loading, published
from tests.support.encoders import check_features, random_networks

# The convolutions and BatchNorms of a network of one basic block a group, in the order in which
# SimCLR's TensorFlow 1 code makes, and so numbers, them.
_TF1_CONVS = {
    "base_model/conv2d": "initial_conv",
    "base_model/conv2d_1": "block_group1_block1_shortcut_conv",
    "base_model/conv2d_2": "block_group1_block1_conv1",
    "base_model/conv2d_3": "block_group1_block1_conv2",
    "base_model/conv2d_4": "block_group2_block1_shortcut_conv",
    "base_model/conv2d_5": "block_group2_block1_conv1",
    "base_model/conv2d_6": "block_group2_block1_conv2",
    "base_model/conv2d_7": "block_group3_block1_shortcut_conv",
    "base_model/conv2d_8": "block_group3_block1_conv1",
    "base_model/conv2d_9": "block_group3_block1_conv2",
    "base_model/conv2d_10": "block_group4_block1_shortcut_conv",
    "base_model/conv2d_11": "block_group4_block1_conv1",
    "base_model/conv2d_12": "block_group4_block1_conv2",
}


_TF1_NAMES = _TF1_CONVS | {
    name.replace("conv2d", "batch_normalization"): ours.replace("conv", "bn")
    for name, ours in _TF1_CONVS.items()
}


def _write_tf1(prefix, tensors):
    """Writes a checkpoint of plain names, as TensorFlow 1 does."""
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(array) for array in tensors.values()],
    )


def _layers(encoder):
    """An encoder's weights by layer."""
    layers = collections.defaultdict(dict)
    for variable in encoder.variables:
        layer, weight = variable.path.split("/")
        layers[layer][weight] = variable.numpy()
    return layers


def _tf1_tensors(encoder, names):
    layers = _layers(encoder)
    assert set(names.values()) == set(layers)
    return {
        f"{name}/{weight}": array
        for name, ours in names.items()
        for weight, array in layers[ours].items()
    }


def test_find_tf1_checkpoint_of_rpc_gives_the_features(tmp_path):
    """With what else there is: heads, momenta, a copy made by its penalty."""
    networks = random_networks(
        resnet_depth=10, width_multiplier=0.125, padding="fixed", stem="cifar"
    )
    tensors = _tf1_tensors(networks.encoder, _TF1_NAMES)
    momenta = {f"{k}/Momentum": v * 0 for k, v in tensors.items()}
    copies = {k.removeprefix("base_model/"): v * 0 for k, v in tensors.items()}
    head = {"head_contrastive/nl_0/dense/kernel": np.zeros((4, 4), np.float32)}
    path = str(tmp_path / "model.ckpt-100")
    _write_tf1(
        path,
        {**copies, **momenta, **tensors, **head, "global_step": np.int64(100)},
    )
    check_features(loading.load_encoder(path), networks)
    found = loading.read_published(path)
    assert found.source == "SimCLR, TensorFlow 1"
    assert "head_contrastive/nl_0/dense/kernel" in found.unread


class _Construction:
    """Follows SimCLR's TensorFlow 1 code, and counts what it makes."""

    def __init__(self, sk, se, blocks, bottleneck):
        self.names, self._counts = {}, collections.Counter()
        if sk:
            self.conv_bn("stem_{}1")
            self.conv_bn("stem_{}2")
        self.conv_bn("initial_{}")
        for group, count in enumerate(blocks, 1):
            for block in range(1, count + 1):
                prefix = f"block_group{group}_block{block}_"
                if block == 1:
                    self.conv_bn(prefix + "shortcut_{}")
                self.conv_bn(prefix + "{}1")
                self.conv_bn(prefix + "{}2")
                if bottleneck and sk:
                    self.conv_bn(prefix + "sk_{}1")
                    self.make("conv2d", prefix + "sk_conv2")
                if bottleneck:
                    self.conv_bn(prefix + "{}3")
                if se:
                    self.make("conv2d", prefix + "se_conv1")
                    self.make("conv2d", prefix + "se_conv2")

    def make(self, kind, ours):
        number = self._counts[kind]
        self._counts[kind] += 1
        self.names[f"base_model/{kind}{f'_{number}' * (number > 0)}"] = ours

    def conv_bn(self, names):
        self.make("conv2d", names.format("conv"))
        self.make("batch_normalization", names.format("bn"))


@pytest.mark.parametrize(
    ("depth", "sk", "se", "blocks"),
    [
        (34, 0, 0, (3, 4, 6, 3)),
        (50, 0, 0, (3, 4, 6, 3)),
        (50, 0.0625, 0.25, (3, 4, 6, 3)),
    ],
)
def test_find_tf1_numbers_follow_order_of_construction(depth, sk, se, blocks):
    networks = random_networks(
        resnet_depth=depth, width_multiplier=0.125, padding="fixed",
        sk_ratio=sk, se_ratio=se,
    )  # fmt: skip
    names = _Construction(sk, se, blocks, bottleneck=depth >= 50).names
    tensors = _tf1_tensors(networks.encoder, names)
    found = published.identify(tensors)
    # 32 channels at least mix selective kernels: of so narrow ones, half.
    assert found.architecture == dataclasses.replace(
        networks.architecture, sk_ratio=0.5 if sk else 0.0
    )
    for variable in networks.encoder.variables:
        assert (
            found.weights[variable.path]
            is tensors[
                {v: k for k, v in names.items()}[variable.path.split("/")[0]]
                + "/"
                + variable.path.split("/")[1]
            ]
        )


def test_find_tf1_basic_blocks_with_sk_raises():
    encoder = random_networks(
        resnet_depth=18, width_multiplier=0.125, padding="fixed", sk_ratio=0.1
    ).encoder
    names = _Construction(True, False, (2, 2, 2, 2), bottleneck=False).names
    with pytest.raises(ValueError, match="pool their residual branch"):
        published.identify(_tf1_tensors(encoder, names))


def test_find_order_of_no_network_raises():
    tensors = {
        f"base_model/conv2d_{i}/kernel": np.ones((size, size, 4, 4))
        for i, size in enumerate([7, 1, 3, 3, 3])
    }
    with pytest.raises(ValueError, match="sizes 71333 and 0 BatchNorms"):
        published.identify(tensors)


def _module(**children):
    module = tf.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


class _Tf2Objects:
    """The objects of SimCLR's TensorFlow 2 encoder, with our weights."""

    def __init__(self, encoder, blocks, bottleneck, sk, se):
        self.layers, self.sk, self.se = _layers(encoder), sk, se
        stem = ["initial_conv", None, "initial_bn", None]
        if "stem_conv1" in self.layers:
            stem = ["stem_conv1", "stem_bn1", "stem_conv2", "stem_bn2", *stem]
        add_block = self.bottleneck if bottleneck else self.basic
        groups = [
            _module(
                layers=[
                    add_block(
                        f"block_group{group}_block{i}_",
                        self.shortcut(group, i) if i == 1 else [],
                    )
                    for i in range(1, count + 1)
                ]
            )
            for group, count in enumerate(blocks, 1)
        ]
        self.encoder = _module(
            initial_conv_relu_max_pool=[self.layer(name) for name in stem],
            block_groups=groups,
        )
        assert not self.layers

    def variables(self, name):
        weights = self.layers.pop(name).items()
        return _module(**{k: tf.Variable(v, name=k) for k, v in weights})

    def layer(self, name):
        """Conv2dFixedPadding, BatchNormRelu, or one without variables."""
        if name is None:
            return _module()
        kind = "conv2d" if "conv" in name else "bn"
        return _module(**{kind: self.variables(name)})

    def shortcut(self, group, block):
        prefix = f"block_group{group}_block{block}_shortcut_"
        pools = [None] * ((1 + (group > 1)) if self.sk else 0)
        names = [*pools, f"{prefix}conv", f"{prefix}bn"]
        return [self.layer(name) for name in names]

    def excitation(self, prefix):
        return _module(
            se_expand=self.variables(f"{prefix}se_conv2"),
            se_reduce=self.variables(f"{prefix}se_conv1"),
        )

    def basic(self, prefix, shortcut):
        names = ("conv1", "bn1", "conv2", "bn2")
        block = _module(
            conv2d_bn_layers=[self.layer(prefix + name) for name in names],
            shortcut_layers=shortcut,
        )
        if self.se:
            block.se_layer = self.excitation(prefix)
        return block

    def bottleneck(self, prefix, shortcut):
        def layers(*names):
            return [self.layer(name and prefix + name) for name in names]

        middle = [self.selective(prefix)] if self.sk else layers("conv2", "bn2")
        return _module(
            conv_relu_dropblock_layers=[
                *layers("conv1", "bn1", None),
                *middle,
                *layers(None, "conv3", "bn3", None),
                *([self.excitation(prefix)] if self.se else []),
            ],
            projection_layers=shortcut,
        )

    def selective(self, prefix):
        return _module(
            conv2d_fixed_padding=self.layer(f"{prefix}conv2"),
            batch_norm_relu=self.layer(f"{prefix}bn2"),
            conv2d_0=self.variables(f"{prefix}sk_conv1"),
            batch_norm_relu_1=self.layer(f"{prefix}sk_bn1"),
            conv2d_1=self.variables(f"{prefix}sk_conv2"),
        )


@pytest.mark.parametrize(
    ("depth", "sk", "se", "stem", "as_saved_model"),
    [
        (18, 0, 0.25, "cifar", True),
        (34, 0.0625, 0, "imagenet", False),
        (50, 0.5, 0.25, "imagenet", False),
    ],
)
def test_find_tf2_checkpoints_and_saved_models_give_the_features(
    tmp_path, depth, sk, se, stem, as_saved_model
):
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    networks = random_networks(
        resnet_depth=depth, width_multiplier=0.125, padding="fixed",
        sk_ratio=sk, se_ratio=se, stem=stem,
    )  # fmt: skip
    encoder = _Tf2Objects(networks.encoder, blocks, depth >= 50, sk, se).encoder
    head = _module(kernel=tf.Variable(tf.zeros((4, 4))))
    simclr = _module(resnet_model=encoder, _projection_head=head)
    path = str(tmp_path / "model")
    if as_saved_model:
        exported = _module(model=simclr)
        exported.trainable_variables_list = list(simclr.trainable_variables)
        tf.saved_model.save(exported, path)
    else:
        step = tf.Variable(5, dtype=tf.int64)
        saved = tf.train.Checkpoint(model=simclr, global_step=step)
        path = saved.write(f"{path}-5")
    check_features(loading.load_encoder(path), networks)


def test_find_tf2_variable_without_a_place_lists_it(tmp_path):
    network = random_networks(resnet_depth=10, width_multiplier=0.125, padding="fixed").encoder
    encoder = _Tf2Objects(network, (1,) * 4, False, 0, 0).encoder
    encoder.surprise = tf.Variable(tf.zeros(3))
    path = tf.train.Checkpoint(model=_module(resnet_model=encoder)).write(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"(?s)surprise\S* \(3,\)"):
        loading.load_encoder(path)
