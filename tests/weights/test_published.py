# SPDX-License-Identifier: Apache-2.0
"""Encoders of other programs: the right features, or a clear refusal."""

import collections
import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import model
import resnet
from contrastive.weights import checkpoint, published
from tests.support import foreign, program
from tests.support.foreign import (
    GOLDEN,
    Reduced,
    haiku_trees,
    map_tree,
    modules,
)

SIZES = ("224", "97x65", "32")
TINY_TORCH = {
    "resnet_depth": 10,
    "width_multiplier": 0.125,
    "padding": "torch",
    "shortcuts": "needed",
}


def _images(size, golden):
    return (golden("relicv2.npz")[f"images_{size}"] / 255).astype("float32")


def _check_embeddings(path, network, golden, sizes=SIZES):
    encoder = checkpoint.load_encoder(str(path))
    for size in sizes:
        np.testing.assert_allclose(
            encoder(_images(size, golden)),
            golden("relicv2.npz")[f"{network}_{size}"],
            rtol=1e-4,
            atol=1e-4,
        )


def _networks(**fields):
    """Networks with random weights and statistics, BatchNorm's too."""
    architecture = dataclasses.replace(
        published._WITHOUT_HEADS,
        **{"stem": "imagenet", "channels": 3, **fields},
    )
    networks = model.build_networks(architecture)
    rng = np.random.default_rng(0)
    for variable in networks.encoder.variables:
        if "bn" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return networks


def _same_features(encoder, networks, size=32):
    # Of even sizes: there, all paddings differ.
    images = np.random.default_rng(1).random(
        (2, size, size + 4, networks.architecture.channels), np.float32
    )
    expected = model.encoder_of_images(networks)(images).numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-5, atol=1e-5)


# --- DeepMind's


def test_a_checkpoint_of_the_reference_program_has_its_embeddings(golden):
    _check_embeddings(GOLDEN / "tiny_pretrain.pkl", "tiny", golden)


def _pretrain(network, devices=0):
    parameters, state = haiku_trees(network)
    if devices:
        trees = [
            map_tree(lambda x: np.repeat(x[np.newaxis], devices, 0), tree)
            for tree in (parameters, state)
        ]
        parameters, state = trees
    return {
        "experiment_state": {
            "online_params": parameters,
            "online_state": state,
        },
        "step": 300_000,
        "rng": np.zeros(2, np.uint32),
    }


@pytest.mark.parametrize(
    ("devices", "protocol"), [(3, 2), (0, 2), (1, 4), (0, 5)]
)
def test_device_axes_and_protocols(tmp_path, golden, devices, protocol):
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(pickle.dumps(_pretrain("resnet18", devices), protocol))
    sizes = SIZES if (devices, protocol) == (3, 2) else SIZES[2:]
    _check_embeddings(path, "resnet18", golden, sizes)


def test_a_named_tuple_of_byol(tmp_path, golden):
    fields = (
        "online_params", "target_params", "online_state", "target_state",
        "opt_state",
    )  # fmt: skip
    state = collections.namedtuple("_ByolExperimentState", fields)  # noqa: PYI024
    content = _pretrain("resnet18")
    trees = content["experiment_state"]
    content["experiment_state"] = state(
        trees["online_params"], trees["online_params"],
        trees["online_state"], trees["online_state"], (),
    )  # fmt: skip
    path = tmp_path / "pretrain.pkl"
    with modules(byol__byol_experiment___ByolExperimentState=state):
        path.write_bytes(pickle.dumps(content, 2))
    _check_embeddings(path, "resnet18", golden, SIZES[2:])


def _never(*_):
    raise AssertionError("called")


@pytest.mark.parametrize(
    "jax_function",
    [
        "jax___src__array___reconstruct_array",
        "jax___src__device_array__reconstruct_device_array",
    ],
)
def test_flat_mappings_of_jax_arrays_with_numbered_stems(
    tmp_path, golden, jax_function
):
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

    content = _pretrain("resnet18", devices=1)
    content["experiment_state"] = {
        name: renamed(tree)
        for name, tree in content["experiment_state"].items()
    }
    path = tmp_path / "pretrain.pkl"
    with modules(
        **{jax_function: reconstruct},
        haiku___src__data_structures__FlatMapping=FlatMapping,
    ):
        path.write_bytes(pickle.dumps(content, 4))
    _check_embeddings(path, "resnet18", golden, SIZES[2:])


def _preactivation(images, parameters, state, prefix):
    """ResNet version 2 with a basic block a group, from its formula."""

    def tensor(tree, module, name):
        return tree[f"{prefix}/~/{module}"][name]

    def conv(x, module, strides=1):
        kernel = tensor(parameters, module, "w")
        return tf.nn.conv2d(x, kernel, strides, "SAME")

    def bn_relu(x, module):
        mean, variance = (
            tensor(state, f"{module}/~/{kind}_ema", "average")
            for kind in ("mean", "var")
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


def test_preactivation(tmp_path, golden):
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(pickle.dumps(_pretrain("tiny_v2"), 2))
    images = _images("97x65", golden)
    normalized = (images - model.IMAGENET_MEAN) / model.IMAGENET_STD
    expected = _preactivation(
        tf.cast(normalized, tf.float32), *haiku_trees("tiny_v2"), "tiny_res_net"
    )
    encoder = checkpoint.load_encoder(str(path))
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_the_target_network_is_read_when_it_is_meant(tmp_path):
    path = str(GOLDEN / "tiny_pretrain.pkl")
    online = checkpoint.read_published(path)
    target = checkpoint.read_published(path, target=True)
    kernel = "block_group1_block1_conv1/kernel"
    assert online.weights[kernel].shape == target.weights[kernel].shape
    assert any("target_params" in name for name in online.unread)
    assert any("online_params" in name for name in target.unread)
    without = tmp_path / "pretrain.pkl"
    without.write_bytes(pickle.dumps(_pretrain("tiny_v2"), 2))
    with pytest.raises(ValueError, match="0 target networks"):
        checkpoint.read_published(str(without), target=True)


def _changed(change):
    content = _pretrain("tiny_v2")
    change(content["experiment_state"]["online_params"])
    return {
        f"experiment_state/{tree}/{module}/{name}": np.asarray(array)
        for tree, tensors in content["experiment_state"].items()
        for module, arrays in tensors.items()
        for name, array in arrays.items()
    }


_BLOCK = "tiny_res_net/~/block_group_1/~/block_0/~"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update({f"{_BLOCK}/sk_conv": {"w": np.ones((1, 2))}}),
            rf"(?s)selective kernels.*{_BLOCK}/sk_conv/w \(1, 2\)",
        ),
        (
            lambda p: p.pop(f"{_BLOCK}/conv_1"),
            r"block_group2_block1_conv2/kernel: none in the file, \(3, 3, 8, 8",
        ),
        (
            lambda p: p[f"{_BLOCK}/conv_1"].update(w=np.ones((3, 3, 8, 9))),
            r"\(3, 3, 8, 9\) in the file, \(3, 3, 8, 8\) here",
        ),
        (
            lambda p: p.update(
                {f"{_BLOCK[:-3]}1/~/conv_0": {"w": np.ones((3, 3, 8, 8))}}
            ),
            r"\(1, 2, 1, 1\) basic blocks are no ResNet",
        ),
        (
            lambda p: p.update(
                {"other/~/initial_conv": p["tiny_res_net/~/initial_conv"]}
            ),
            "2 online networks that may be meant",
        ),
    ],
)
def test_what_does_not_fit_is_listed(change, message):
    with pytest.raises(ValueError, match=message):
        published.identify(_changed(change))


def test_tensors_of_nothing_known_are_listed():
    tensors = {f"x{i:02}": np.ones(i) for i in range(30)}
    with pytest.raises(ValueError, match=r"(?s)x00 \(0,\).*and 10 more"):
        published.identify(tensors)


def test_a_network_larger_than_its_file_is_refused_before_it_is_made():
    tensors = _changed(lambda _: None)
    huge = np.broadcast_to(np.float32(0), (3, 3, 64, 10**6))
    tensors[
        "experiment_state/online_params/tiny_res_net/~/block_group_0/~/block_0/"
        "~/conv_0/w"
    ] = huge
    with pytest.raises(ValueError, match="do not fit"):
        published.identify(tensors)


# --- torch's


def _state_dict(encoder):
    """The state dictionary that torchvision would save, and its classifier."""
    tensors = {
        published.torchvision_name(v.path): published.torchvision_layout(
            v.numpy()
        )
        for v in encoder.variables
    }
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.int64(7)
        for name in tensors
        if name.endswith("running_mean")
    }
    classes = np.zeros((10, encoder.output_shape[-1]), np.float32)
    return tensors | counters | {"fc.weight": classes, "fc.bias": classes[:, 0]}


def test_names_are_torchvisions():
    encoder = resnet.resnet(50, width_multiplier=0.125)
    names = {published.torchvision_name(v.path) for v in encoder.variables}
    assert len(names) == len(encoder.variables)
    # As torchvision.models.resnet50().state_dict() has them.
    assert {
        "conv1.weight", "bn1.running_var", "layer1.0.conv1.weight",
        "layer1.0.downsample.0.weight", "layer1.0.downsample.1.running_mean",
        "layer3.5.bn3.bias", "layer4.2.conv3.weight",
    } <= names  # fmt: skip
    with pytest.raises(ValueError, match="no block_group1_block1_sk_conv1"):
        published.torchvision_name("block_group1_block1_sk_conv1/kernel")


@pytest.mark.parametrize("depth", [18, 50])
def test_a_state_dict_of_torchvision(tmp_path, depth):
    networks = _networks(
        **TINY_TORCH | {"resnet_depth": depth},
        image_mean=model.IMAGENET_MEAN,
        image_std=model.IMAGENET_STD,
    )
    path = str(tmp_path / "weights.pth")
    state_dict = _state_dict(networks.encoder)
    foreign.write_torch(path, state_dict)
    _same_features(checkpoint.load_encoder(path), networks)
    path = str(tmp_path / "weights.safetensors")
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v) for k, v in state_dict.items()}, path
    )
    _same_features(checkpoint.load_encoder(path), networks)


def test_a_state_dict_in_half_precision_within_other_modules(tmp_path):
    networks = _networks(
        **TINY_TORCH,
        image_mean=model.IMAGENET_MEAN,
        image_std=model.IMAGENET_STD,
    )
    for variable in networks.encoder.variables:
        variable.assign(tf.cast(tf.cast(variable, "bfloat16"), "float32"))
    tensors = _state_dict(networks.encoder)
    small = {
        name: array.astype(tf.bfloat16.as_numpy_dtype)
        if array.dtype == np.float32
        else array
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
    _same_features(checkpoint.load_encoder(path), networks)
    target = checkpoint.read_published(path, target=True)
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


def test_relic_pytorch(tmp_path):
    """Its encoder.pth and relic_model.pth, of the adapted CIFAR stem."""
    online = _networks(**TINY_TORCH, stem="cifar")
    encoder = _children(_state_dict(online.encoder))
    path = str(tmp_path / "encoder.pth")
    foreign.write_torch(path, encoder)
    _same_features(checkpoint.load_encoder(path), online, size=16)
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
    _same_features(checkpoint.load_encoder(model_path), online, size=16)
    target = checkpoint.read_published(model_path, target=True)
    np.testing.assert_allclose(
        target.weights["initial_conv/kernel"],
        online.encoder.get_layer("initial_conv").kernel + 1,
    )


def test_an_export_has_the_normalisation_of_its_card(tmp_path):
    networks = _networks(**TINY_TORCH, image_mean=(0.5,) * 3)
    path = str(tmp_path / "torchvision.pth")
    foreign.write_torch(path, _state_dict(networks.encoder))
    card = dataclasses.asdict(networks.architecture)
    checkpoint.write_run(str(tmp_path), {"architecture": card})
    shutil.move(tmp_path / "run.json", tmp_path / "export.json")
    _same_features(checkpoint.load_encoder(path), networks)


@pytest.mark.parametrize(
    "name",
    [
        "conv1.0.weight",
        "layer1.0.se.fc1.weight",
        "layer2.0.downsample.2.weight",
    ],
)
def test_networks_that_only_look_like_torchvisions_are_refused(name):
    tensors = _state_dict(_networks(**TINY_TORCH).encoder)
    tensors[name] = np.ones((3, 4, 5, 6), np.float32)
    with pytest.raises(ValueError, match=rf"(?s){name} \(3, 4, 5, 6\)"):
        published.identify(tensors)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_those_of_torchvision(tmp_path, name):
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
    encoder = checkpoint.load_encoder(path)
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-4, atol=1e-4)


# --- SimCLR's and RPC's

# The convolutions and BatchNorms of a network of one basic block a group, in
# the order in which SimCLR's TensorFlow 1 code makes, and so numbers, them.
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


def test_a_tf1_checkpoint_of_rpc(tmp_path):
    """With what else there is: heads, momenta, a copy made by its penalty."""
    networks = _networks(
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
    _same_features(checkpoint.load_encoder(path), networks)
    found = checkpoint.read_published(path)
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
def test_tf1_numbers_in_order_of_construction(depth, sk, se, blocks):
    networks = _networks(
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


def test_basic_blocks_with_sk_differ_in_tf1():
    encoder = _networks(
        resnet_depth=18, width_multiplier=0.125, padding="fixed", sk_ratio=0.1
    ).encoder
    names = _Construction(True, False, (2, 2, 2, 2), bottleneck=False).names
    with pytest.raises(ValueError, match="pool their residual branch"):
        published.identify(_tf1_tensors(encoder, names))


def test_an_order_that_is_no_network_is_refused():
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
def test_tf2_checkpoints_and_saved_models(
    tmp_path, depth, sk, se, stem, as_saved_model
):
    blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
    networks = _networks(
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
    _same_features(checkpoint.load_encoder(path), networks)


def test_a_tf2_variable_without_a_home_is_listed(tmp_path):
    network = _networks(
        resnet_depth=10, width_multiplier=0.125, padding="fixed"
    ).encoder
    encoder = _Tf2Objects(network, (1,) * 4, False, 0, 0).encoder
    encoder.surprise = tf.Variable(tf.zeros(3))
    path = tf.train.Checkpoint(model=_module(resnet_model=encoder)).write(
        str(tmp_path / "model")
    )
    with pytest.raises(ValueError, match=r"(?s)surprise\S* \(3,\)"):
        checkpoint.load_encoder(path)


# --- this program's, and the command line


def test_an_export_of_this_program(tmp_path):
    networks = _networks(
        resnet_depth=10, width_multiplier=0.125, padding="same", channels=2,
        stem="cifar", image_std=(0.5, 0.25), num_classes=3,
    )  # fmt: skip
    path = str(tmp_path / "networks.safetensors")
    safetensors.numpy.save_file(
        {
            f"{name}/{v.path}": v.numpy()
            for name, network in networks.models().items()
            for v in network.variables
        },
        path,
        {"architecture": _json(networks.architecture)},
    )
    _same_features(checkpoint.load_encoder(path), networks)


def _json(architecture):
    return json.dumps(dataclasses.asdict(architecture))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"text", b"\x08" + b"\0" * 7 + b"{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="neither a pickle|Cannot read"):
            checkpoint.load_encoder(str(path))


def test_flags_follow_the_file():
    path = str(GOLDEN / "tiny_pretrain.pkl")
    settings, sources = program.resolve(
        "--train_mode=finetune",
        f"--checkpoint={path}",
        "--width_multiplier=1.5",
    )
    assert settings.resnet_depth == 10
    assert settings.padding == "same"
    assert settings.normalize == "imagenet"
    assert settings.base_filters == (64, 8, 8, 8, 8)
    assert sources["padding"] == "its run"
    assert settings.width_multiplier == 1.5


def test_training_starts_from_the_file_and_its_heads_are_not_there():
    path = str(GOLDEN / "tiny_pretrain.pkl")
    found = checkpoint.read_published(path)
    networks = model.build_networks(
        dataclasses.replace(found.architecture, num_classes=4)
    )
    checkpoint.restore_pretrained(path, networks)
    for variable in networks.encoder.variables:
        np.testing.assert_array_equal(variable, found.weights[variable.path])
    networks = model.build_networks(
        dataclasses.replace(
            found.architecture, proj_head_mode="linear", ft_proj_selector=1
        )
    )
    with pytest.raises(ValueError, match="no projection head"):
        checkpoint.restore_pretrained(path, networks)
    other = model.build_networks(
        dataclasses.replace(found.architecture, stem="cifar")
    )
    with pytest.raises(ValueError, match="initial_conv/kernel"):
        checkpoint.restore_pretrained(path, other)


def test_main_parses_a_published_file_once_until_it_changes(
    tmp_path, monkeypatch
):
    """First for its architecture, then for its weights."""
    path = tmp_path / "encoder.pkl"
    shutil.copy(GOLDEN / "tiny_pretrain.pkl", path)
    parsed, read_pickle = [], checkpoint.unpickling.read_pickle

    def count(path):
        parsed.append(path)
        return read_pickle(path)

    monkeypatch.setattr(checkpoint.unpickling, "read_pickle", count)
    words = [
        "--train_mode=finetune",
        "--dataset=photo_patches",
        f"--checkpoint={path}",
        "--train_batch_size=8",
        "--train_steps=1",
    ]
    assert program.main(*words, f"--model_dir={tmp_path / 'run'}") == 0
    assert len(parsed) == 1
    checkpoint.read_published(str(path))
    checkpoint.read_published(str(path))
    assert len(parsed) == 2
    path.write_bytes((GOLDEN / "tiny_pretrain.pkl").read_bytes() + b"\0")
    checkpoint.read_published(str(path))
    assert len(parsed) == 3


def test_a_run_beside_a_published_file_does_not_hide_it(tmp_path, golden):
    """As when a model is fine-tuned in the directory of its checkpoint."""
    shutil.copy(GOLDEN / "tiny_pretrain.pkl", tmp_path)
    checkpoint.write_run(str(tmp_path), {"architecture": {}, "flags": {}})
    _check_embeddings(tmp_path / "tiny_pretrain.pkl", "tiny", golden, SIZES[2:])
    assert checkpoint.read_published(str(tmp_path)) is None
