# SPDX-License-Identifier: Apache-2.0
"""Exports compute the outputs of the networks in other programs."""

import collections
import dataclasses
import json
import zipfile

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import model
import resnet
from contrastive.sources import photo_patches
from contrastive.weights import export, loading
from contrastive.weights.families import torchvision
from contrastive.weights.formats import CannotExport
from tests.support.encoders import objective_networks, save_run
from tests.support.replica_run import small_encoder

_MEAN, _STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
_TORCH = {"padding": "torch", "shortcuts": "needed", "width_multiplier": 1.0}


def _images(count=16):
    pictures = [p.resize((32, 32)) for p in photo_patches.pictures()[:count]]
    return np.stack([np.asarray(p, np.float32) / 255 for p in pictures])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with all heads, exported; returns the folder and the card."""
    folder = tmp_path_factory.mktemp("run")
    networks = objective_networks(
        image_mean=_MEAN, image_std=_STD, num_classes=7, num_proj_layers=3
    )
    save_run(networks, folder)
    formats = ["saved_model", "keras", "safetensors", "torchvision"]
    card = export.write(
        loading.load_networks(str(folder)),
        str(folder / "export"),
        formats,
        _images(),
        {"objective": "simclr"},
    )
    return folder, card


def test_write_compares_each_format_on_pictures(exported):
    folder, card = exported
    written = (folder / "export" / export.CARD).read_text()
    assert json.loads(written) == json.loads(json.dumps(card))
    results = card["formats"]
    for name in ("saved_model", "keras", "safetensors"):
        assert results[name]["relative_difference"] < 1e-5
        assert results[name]["images"] == 16
        for file in results[name]["files"]:
            assert (folder / "export" / file).exists()
    assert results["saved_model"]["runtime"] == f"tensorflow {tf.__version__}"
    assert results["safetensors"]["largest_difference"] == 0
    assert results["keras"]["files"] == ["classifier.keras", "encoder.keras"]
    assert card["input"]["mean"] == list(_MEAN)
    assert card["objective"] == "simclr"


@pytest.mark.parametrize("name", ["saved_model", "networks.safetensors"])
def test_load_encoder_export_is_bit_identical(exported, name):
    folder, _ = exported
    ours = loading.load_encoder(str(folder))
    read = loading.load_encoder(str(folder / "export" / name))
    for variable, copy in zip(ours.weights, read.weights, strict=True):
        np.testing.assert_array_equal(variable, copy)
    np.testing.assert_array_equal(ours(_images()), read(_images()))


def test_load_encoder_keras_file_gives_the_features(exported):
    folder, _ = exported
    ours = loading.load_encoder(str(folder))
    read = loading.load_encoder(str(folder / "export" / "encoder.keras"))
    np.testing.assert_allclose(ours(_images()), read(_images()), rtol=1e-5, atol=1e-5)


def test_write_keras_names_only_modules_of_keras(exported):
    folder, _ = exported
    with zipfile.ZipFile(folder / "export" / "encoder.keras") as archive:
        config = json.loads(archive.read("config.json"))

    def modules(node):
        if isinstance(node, dict):
            yield node.get("module")
            node = node.values()
        if not isinstance(node, str) and isinstance(node, collections.abc.Iterable):
            for child in node:
                yield from modules(child)

    named = {module.split(".")[0] for module in modules(config) if module}
    assert named <= {"keras", "builtins"}


def test_write_saved_model_has_endpoints_of_simclr(exported):
    folder, card = exported
    module = tf.saved_model.load(str(folder / "export" / "saved_model"))
    outputs = module(tf.constant(_images(2)), trainable=False)
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {
        "initial_conv": (2, 32, 32, 8),
        "initial_max_pool": (2, 32, 32, 8),
        "block_group1": (2, 32, 32, 8),
        "block_group2": (2, 16, 16, 16),
        "block_group3": (2, 8, 8, 32),
        "block_group4": (2, 4, 4, 64),
        "final_avg_pool": (2, 64),
        "proj_head_input": (2, 64),
        "proj_head_1": (2, 64),
        "proj_head_2": (2, 64),
        "proj_head_output": (2, 8),
        "logits_sup": (2, 7),
    }
    assert set(card["endpoints"]) == set(shapes)
    served = module.signatures["serving_default"](tf.constant(_images(2)))
    for name, value in outputs.items():
        np.testing.assert_allclose(served[name], value, rtol=1e-4, atol=1e-5)


def _gradients(module, images):
    with tf.GradientTape() as tape:
        outputs = module(images, trainable=True)
        loss = sum(tf.reduce_sum(outputs[k] ** 2) for k in _trained(outputs))
    return tape.gradient(loss, module.trainable_variables)


def _trained(outputs):
    heads = {"proj_head_output", "logits_sup"} & set(outputs)
    return heads or {"final_avg_pool"}


def test_write_saved_model_can_be_trained(exported):
    folder, _ = exported
    module = tf.saved_model.load(str(folder / "export" / "saved_model"))
    networks = loading.load_networks(str(folder))
    expected = sum(len(network.trainable_variables) for network in networks.models().values())
    assert len(module.trainable_variables) == expected
    assert len(module.trainable_variables_list) == expected
    before = {key: v.numpy() for key, v in module.encoder.items()}
    module(tf.constant(_images()))
    for key, variable in module.encoder.items():
        np.testing.assert_array_equal(before[key], variable)
    for gradient in _gradients(module, tf.constant(_images())):
        assert gradient is not None
        assert np.abs(gradient).max() > 0
    moved = {key for key, variable in module.encoder.items() if np.any(before[key] != variable)}
    assert moved == {key for key in before if "moving" in key}


def test_write_saved_model_custom_gradients_can_be_trained(tmp_path, monkeypatch):
    def build(fields, **_):
        encoder = small_encoder(fields)
        x = keras.layers.Activation("silu")(encoder.layers[-2].output)
        return keras.Model(
            encoder.input,
            keras.layers.GlobalAveragePooling2D(name="final_avg_pool")(x),
        )

    monkeypatch.setattr(model, "build_encoder", build)
    networks = objective_networks(encoder="efficientnet_v2_s", num_classes=0)
    export.WRITERS["saved_model"](networks, str(tmp_path))
    module = tf.saved_model.load(str(tmp_path / "saved_model"))
    for gradient in _gradients(module, tf.constant(_images())):
        assert np.abs(gradient).max() > 0


def test_write_onnx_names_inputs_and_outputs(tmp_path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    networks = objective_networks(image_mean=_MEAN, image_std=_STD, num_classes=7)
    card = export.write(networks, str(tmp_path), ["onnx"], _images(), {})
    assert card["formats"]["onnx"]["relative_difference"] < 1e-5
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["images"]
    for count in (1, 3):  # any number of images
        features, logits = session.run(["final_avg_pool", "logits_sup"], {"images": _images(count)})
        assert features.shape == (count, 64)
        assert logits.shape == (count, 7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sk_ratio": 0.0625}, "selective kernels"),
        ({"se_ratio": 0.25}, "squeeze-and-excitation"),
        ({"preactivation": True, "padding": "same"}, "pre-activation"),
        ({"width_multiplier": 0.5}, "no width_multiplier"),
        ({"base_filters": (32, 64, 128, 256, 512)}, "no width_multiplier"),
        ({"channels": 4}, "3 channels"),
        ({"padding": "same"}, "padding=same.*--padding=torch"),
        ({"padding": "fixed", "stem": "imagenet"}, "padding=fixed"),
        ({"shortcuts": "always"}, "--shortcuts=needed"),
    ],
)
def test_write_torchvision_unknown_architecture_is_refused(tmp_path, changes, reason):
    networks = objective_networks(**(_TORCH | changes))
    with pytest.raises(CannotExport, match=reason):
        export.WRITERS["torchvision"](networks, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_write_torchvision_computes_the_same(tmp_path, stem):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    networks = objective_networks(
        **_TORCH, stem=stem, image_mean=_MEAN, image_std=_STD, num_classes=7
    )
    card = export.write(networks, str(tmp_path), ["torchvision"], _images(), {})
    assert card["formats"]["torchvision"]["relative_difference"] < 1e-5


def test_write_torchvision_without_torch_writes_safetensors_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision, "_has_torch", lambda: False)
    networks = objective_networks(**_TORCH, num_classes=7)
    export.WRITERS["torchvision"](networks, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["torchvision.safetensors"]
    weights = safetensors.numpy.load_file(tmp_path / "torchvision.safetensors")
    for layer, theirs in (
        ("initial_conv", "conv1"),
        ("block_group1_block1_conv1", "layer1.0.conv1"),
        ("block_group2_block1_conv1", "layer2.0.conv1"),
        ("block_group4_block1_shortcut_conv", "layer4.0.downsample.0"),
    ):
        np.testing.assert_array_equal(
            weights[f"{theirs}.weight"],
            networks.encoder.get_layer(layer).kernel.numpy().transpose(3, 2, 0, 1),
        )
    kernel, bias = networks.classifier.get_weights()
    np.testing.assert_array_equal(weights["fc.weight"], kernel.T)
    np.testing.assert_array_equal(weights["fc.bias"], bias)
    assert weights["layer2.0.downsample.1.running_var"].shape == (128,)
    assert weights["fc.weight"].shape == (7, 512)


def test_write_torchvision_with_torch_writes_equal_pth(tmp_path):
    torch = pytest.importorskip("torch")
    export.WRITERS["torchvision"](objective_networks(**_TORCH, num_classes=7), str(tmp_path))
    weights = torch.load(tmp_path / "torchvision.pth", weights_only=True)
    same = safetensors.numpy.load_file(tmp_path / "torchvision.safetensors")
    assert set(weights) == set(same)
    for name, value in weights.items():
        np.testing.assert_array_equal(value.numpy(), same[name])


def test_write_output_that_differs_leaves_no_file(tmp_path, monkeypatch):
    networks = objective_networks(num_classes=0)
    expected = np.asarray(networks.features(_images(), training=False))
    for wrong in (1.001 * expected, np.nan * expected):
        monkeypatch.setattr(export, "_read", lambda *_, wrong=wrong: {"final_avg_pool": wrong})
        card = export.write(networks, str(tmp_path), ["keras"], _images(), {})
        assert "is off by" in card["formats"]["keras"]["refused"]
        assert [path.name for path in tmp_path.iterdir()] == [export.CARD]


def test_write_outputs_with_other_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_read", lambda *_: {"another": np.zeros(3)})
    networks = objective_networks(num_classes=0)
    card = export.write(networks, str(tmp_path), ["keras"], _images(), {})
    assert "nothing to compare" in card["formats"]["keras"]["refused"]
    assert [path.name for path in tmp_path.iterdir()] == [export.CARD]


def test_write_encoder_without_batch_norm_has_no_epsilon(tmp_path):
    networks = objective_networks(encoder="efficientnet_v2_s", num_classes=0)
    images = keras.Input((None, None, 3))
    features = keras.layers.GlobalAveragePooling2D()(
        keras.layers.Conv2D(networks.encoder.output_shape[-1], 3)(images)
    )
    networks = dataclasses.replace(networks, encoder=keras.Model(images, features))
    card = export.write(networks, str(tmp_path), ["keras"], _images(2), {})
    assert card["batch_norm_epsilon"] is None
    assert "refused" not in card["formats"]["keras"]


def test_write_replaces_earlier_export(tmp_path):
    networks = objective_networks(num_classes=0)
    (tmp_path / "notes.txt").write_text("of the user")
    for formats in (["safetensors"], ["torchvision"]):
        card = export.write(networks, str(tmp_path), formats, _images(2), {})
    assert "refused" in card["formats"]["torchvision"]
    assert {path.name for path in tmp_path.iterdir()} == {
        export.CARD,
        "notes.txt",
    }
    assert "not written: torchvision" in export.table(card["formats"])


def test_write_missing_packages_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "missing", list)
    networks = objective_networks(**_TORCH)
    card = export.write(networks, str(tmp_path), ["onnx", "torchvision"], _images(2), {})
    assert "requirements/export.txt" in card["formats"]["onnx"]["refused"]
    reason = card["formats"]["torchvision"]["not_compared"]
    assert reason == "pip install torch torchvision safetensors"
    assert (tmp_path / "torchvision.safetensors").exists()


def test_write_unknown_format_raises(tmp_path):
    with pytest.raises(ValueError, match=r"saved_model, .*Received: tflite"):
        export.write(objective_networks(), str(tmp_path), ["tflite"], _images(2), {})


def test_copy_with_keras_layers_mixed_precision_is_float32():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        networks = objective_networks(sk_ratio=0.0625, resnet_depth=50)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    copies = export.copy_with_keras_layers(networks)
    for copy in copies.models().values():
        assert {layer.compute_dtype for layer in copy.layers} == {"float32"}
        assert not any(isinstance(layer, resnet.GlobalBatchNorm) for layer in copy.layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_depth": 50, "sk_ratio": 0.0625, "se_ratio": 0.25},
        {"encoder": "efficientnet_v2_s"},
    ],
)
def test_write_larger_networks_all_formats_agree(tmp_path, changes):
    pytest.importorskip("tf2onnx")
    formats = ["saved_model", "keras", "onnx", "safetensors"]
    networks = objective_networks(**changes)
    for variable in networks.encoder.variables:
        # With large residual branches, a fresh EfficientNet amplifies rounding.
        if variable.path.endswith("project_bn/gamma"):
            variable.assign(0.1 * variable)
    card = export.write(networks, str(tmp_path), formats, _images(), {})
    assert set(card["formats"]) == set(formats)
    for result in card["formats"].values():
        assert result["relative_difference"] < export.TOLERANCE
