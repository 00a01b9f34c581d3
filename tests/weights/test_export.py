# SPDX-License-Identifier: Apache-2.0
"""What is exported computes the same elsewhere, and says so."""

import collections
import dataclasses
import json
import pickle
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import model
import resnet
from contrastive.sources import sources
from contrastive.weights import checkpoint, export
from tests.support.replica_run import architecture, small_encoder

_MEAN, _STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
_TORCH = {"padding": "torch", "shortcuts": "needed", "width_multiplier": 1.0}


def _networks(objective="simclr", **changes):
    """Networks whose BatchNorm is not that of the start."""
    fields = dataclasses.replace(architecture(objective), **changes)
    networks = model.build_networks(fields)
    random = np.random.default_rng(0)
    for network in networks.models().values():
        for variable in network.variables:
            if variable.path.endswith(("moving_mean", "beta")):
                variable.assign(random.normal(size=variable.shape) * 0.3)
            elif variable.path.endswith(("moving_variance", "gamma")):
                variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return networks


def _save(networks, directory):
    checkpoint.write_run(
        str(directory),
        {"architecture": dataclasses.asdict(networks.architecture)},
    )
    checkpoint.TrainingCheckpoints(
        str(directory), max_to_keep=1, **networks.models()
    ).save(5)


def _images(count=16):
    pictures = [p.resize((32, 32)) for p in sources.pictures()[:count]]
    return np.stack([np.asarray(p, np.float32) / 255 for p in pictures])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with all heads, exported; returns the folder and the card."""
    folder = tmp_path_factory.mktemp("run")
    networks = _networks(
        image_mean=_MEAN, image_std=_STD, num_classes=7, num_proj_layers=3
    )
    _save(networks, folder)
    formats = ["saved_model", "keras", "safetensors", "torchvision"]
    card = export.write(
        checkpoint.load_networks(str(folder)),
        str(folder / "export"),
        formats,
        _images(),
        {"objective": "simclr"},
    )
    return folder, card


def test_each_format_is_compared_on_pictures(exported):
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
def test_load_encoder_reads_exports_bit_for_bit(exported, name):
    folder, _ = exported
    ours = checkpoint.load_encoder(str(folder))
    read = checkpoint.load_encoder(str(folder / "export" / name))
    for variable, copy in zip(ours.weights, read.weights, strict=True):
        np.testing.assert_array_equal(variable, copy)
    np.testing.assert_array_equal(ours(_images()), read(_images()))


def test_load_encoder_reads_the_keras_file(exported):
    folder, _ = exported
    ours = checkpoint.load_encoder(str(folder))
    read = checkpoint.load_encoder(str(folder / "export" / "encoder.keras"))
    np.testing.assert_allclose(
        ours(_images()), read(_images()), rtol=1e-5, atol=1e-5
    )


def test_the_keras_file_names_nothing_of_this_program(exported):
    folder, _ = exported
    with zipfile.ZipFile(folder / "export" / "encoder.keras") as archive:
        config = json.loads(archive.read("config.json"))

    def modules(node):
        if isinstance(node, dict):
            yield node.get("module")
            node = node.values()
        if not isinstance(node, str) and isinstance(
            node, collections.abc.Iterable
        ):
            for child in node:
                yield from modules(child)

    named = {module.split(".")[0] for module in modules(config) if module}
    assert named <= {"keras", "builtins"}


def test_a_saved_model_has_the_endpoints_of_simclr(exported):
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


def test_a_saved_model_can_be_trained(exported):
    folder, _ = exported
    module = tf.saved_model.load(str(folder / "export" / "saved_model"))
    networks = checkpoint.load_networks(str(folder))
    expected = sum(
        len(network.trainable_variables)
        for network in networks.models().values()
    )
    assert len(module.trainable_variables) == expected
    assert len(module.trainable_variables_list) == expected
    before = {key: v.numpy() for key, v in module.encoder.items()}
    module(tf.constant(_images()))
    for key, variable in module.encoder.items():
        np.testing.assert_array_equal(before[key], variable)
    for gradient in _gradients(module, tf.constant(_images())):
        assert gradient is not None
        assert np.abs(gradient).max() > 0
    moved = {
        key
        for key, variable in module.encoder.items()
        if np.any(before[key] != variable)
    }
    assert moved == {key for key in before if "moving" in key}


def test_activations_with_gradients_of_their_own_can_be_trained(
    tmp_path, monkeypatch
):
    def build(fields, **_):
        encoder = small_encoder(fields)
        x = keras.layers.Activation("silu")(encoder.layers[-2].output)
        return keras.Model(
            encoder.input,
            keras.layers.GlobalAveragePooling2D(name="final_avg_pool")(x),
        )

    monkeypatch.setattr(model, "build_encoder", build)
    networks = _networks(encoder="efficientnet_v2_s", num_classes=0)
    export.FORMATS["saved_model"](networks, str(tmp_path))
    module = tf.saved_model.load(str(tmp_path / "saved_model"))
    for gradient in _gradients(module, tf.constant(_images())):
        assert np.abs(gradient).max() > 0


def test_an_onnx_graph_names_what_it_gives(tmp_path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    networks = _networks(image_mean=_MEAN, image_std=_STD, num_classes=7)
    card = export.write(networks, str(tmp_path), ["onnx"], _images(), {})
    assert card["formats"]["onnx"]["relative_difference"] < 1e-5
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["images"]
    for count in (1, 3):  # any number of images
        features, logits = session.run(
            ["final_avg_pool", "logits_sup"], {"images": _images(count)}
        )
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
def test_what_torchvision_has_not_is_not_written(tmp_path, changes, reason):
    networks = _networks(**(_TORCH | changes))
    with pytest.raises(export.CannotExport, match=reason):
        export.FORMATS["torchvision"](networks, str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_torchvision_computes_the_same(tmp_path, stem):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    networks = _networks(
        **_TORCH, stem=stem, image_mean=_MEAN, image_std=_STD, num_classes=7
    )
    card = export.write(networks, str(tmp_path), ["torchvision"], _images(), {})
    assert card["formats"]["torchvision"]["relative_difference"] < 1e-5


class _Tensors(pickle.Unpickler):
    """Reads the pickle in a file of torch, without it."""

    def find_class(self, module, name):
        return {
            "torch FloatStorage": "float32",
            "torch._utils _rebuild_tensor_v2": self.tensor,
            "collections OrderedDict": collections.OrderedDict,
        }[f"{module} {name}"]

    def persistent_load(self, pid):
        kind, dtype, key, device, size = pid
        assert (kind, device) == ("storage", "cpu")
        content = self.archive.read(f"archive/data/{key}")
        assert len(content) == 4 * size
        return np.frombuffer(content, dtype)

    @staticmethod
    def tensor(storage, offset, shape, strides, requires_grad, hooks):
        assert (offset, requires_grad, hooks) == (0, False, {})
        return np.lib.stride_tricks.as_strided(
            storage, shape, [4 * n for n in strides]
        )


def test_both_files_for_torchvision_hold_its_names_and_layout(tmp_path):
    networks = _networks(**_TORCH, num_classes=7)
    export.FORMATS["torchvision"](networks, str(tmp_path))
    with zipfile.ZipFile(tmp_path / "torchvision.pth") as archive:
        unpickler = _Tensors(archive.open("archive/data.pkl"))
        unpickler.archive = archive
        weights = unpickler.load()
    same = export.safetensors.numpy.load_file(
        tmp_path / "torchvision.safetensors"
    )
    assert set(same) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, same[name])
    convolution = networks.encoder.get_layer("block_group2_block1_conv1")
    np.testing.assert_array_equal(
        weights["layer2.0.conv1.weight"],
        convolution.kernel.numpy().transpose(3, 2, 0, 1),
    )
    assert weights["layer2.0.downsample.1.running_var"].shape == (128,)
    assert weights["fc.weight"].shape == (7, 512)


def test_what_differs_is_not_left_behind(tmp_path, monkeypatch):
    networks = _networks(num_classes=0)
    expected = np.asarray(networks.features(_images(), training=False))
    for wrong in (1.001 * expected, np.nan * expected):
        monkeypatch.setattr(
            export, "_read", lambda *_, wrong=wrong: {"final_avg_pool": wrong}
        )
        card = export.write(networks, str(tmp_path), ["keras"], _images(), {})
        assert "is off by" in card["formats"]["keras"]["refused"]
        assert [path.name for path in tmp_path.iterdir()] == [export.CARD]


def test_write_of_outputs_with_other_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_read", lambda *_: {"another": np.zeros(3)})
    networks = _networks(num_classes=0)
    card = export.write(networks, str(tmp_path), ["keras"], _images(), {})
    assert "nothing to compare" in card["formats"]["keras"]["refused"]
    assert [path.name for path in tmp_path.iterdir()] == [export.CARD]


def test_write_of_an_encoder_without_batchnorm_has_no_epsilon(tmp_path):
    networks = _networks(encoder="efficientnet_v2_s", num_classes=0)
    images = keras.Input((None, None, 3))
    features = keras.layers.GlobalAveragePooling2D()(
        keras.layers.Conv2D(networks.encoder.output_shape[-1], 3)(images)
    )
    networks = dataclasses.replace(
        networks, encoder=keras.Model(images, features)
    )
    card = export.write(networks, str(tmp_path), ["keras"], _images(2), {})
    assert card["batch_norm_epsilon"] is None
    assert "refused" not in card["formats"]["keras"]


def test_an_export_replaces_the_one_before(tmp_path):
    networks = _networks(num_classes=0)
    (tmp_path / "notes.txt").write_text("of the user")
    for formats in (["safetensors"], ["torchvision"]):
        card = export.write(networks, str(tmp_path), formats, _images(2), {})
    assert "refused" in card["formats"]["torchvision"]
    assert {path.name for path in tmp_path.iterdir()} == {
        export.CARD,
        "notes.txt",
    }
    assert "not written: torchvision" in export.table(card["formats"])


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_missing", list)
    networks = _networks(**_TORCH)
    card = export.write(
        networks, str(tmp_path), ["onnx", "torchvision"], _images(2), {}
    )
    assert "requirements/export.txt" in card["formats"]["onnx"]["refused"]
    reason = card["formats"]["torchvision"]["not_compared"]
    assert reason == "pip install torch torchvision safetensors"
    assert (tmp_path / "torchvision.pth").exists()


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"saved_model, .*Received: tflite"):
        export.write(_networks(), str(tmp_path), ["tflite"], _images(2), {})


def test_copies_compute_in_float32_whatever_the_policy():
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        networks = _networks(sk_ratio=0.0625, resnet_depth=50)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    copies = export._stock(networks)
    for copy in copies.models().values():
        assert {layer.compute_dtype for layer in copy.layers} == {"float32"}
        assert not any(
            isinstance(layer, resnet.GlobalBatchNorm) for layer in copy.layers
        )


def test_the_target_is_read_with_its_own_weights(tmp_path):
    networks = _networks("byol", num_classes=7)
    _save(networks, tmp_path)
    target = checkpoint.load_networks(str(tmp_path), target=True)
    for name in ("encoder", "projection"):
        for variable, copy in zip(
            getattr(networks, f"target_{name}").variables,
            getattr(target, name).variables,
            strict=True,
        ):
            np.testing.assert_array_equal(variable, copy)
    assert target.classifier is None
    path = str(tmp_path / "networks.safetensors")
    checkpoint.save_tensors(target, path)
    read = checkpoint.load_networks(path)
    np.testing.assert_array_equal(
        target.features(_images(2), training=False),
        read.features(_images(2), training=False),
    )


def test_a_run_without_a_target_says_so(tmp_path):
    _save(_networks(), tmp_path)
    with pytest.raises(ValueError, match="no target network"):
        checkpoint.load_networks(str(tmp_path), target=True)


def test_an_export_without_a_tensor_is_refused(tmp_path):
    networks = _networks()
    path = str(tmp_path / "networks.safetensors")
    checkpoint.save_tensors(networks, path)
    tensors = export.safetensors.numpy.load_file(path)
    del tensors["projection/projection_dense1/kernel"]
    fields = json.dumps(dataclasses.asdict(networks.architecture))
    metadata = {"architecture": fields}
    export.safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"dense1/kernel is .*, none in the"):
        checkpoint.load_networks(path)
    assert checkpoint.load_encoder(path).count_params()
    with pytest.raises(ValueError, match="no target network"):
        checkpoint.load_encoder(path, target=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_depth": 50, "sk_ratio": 0.0625, "se_ratio": 0.25},
        {"encoder": "efficientnet_v2_s"},
    ],
)
def test_larger_networks_in_all_formats_that_can(tmp_path, changes):
    pytest.importorskip("tf2onnx")
    formats = ["saved_model", "keras", "onnx", "safetensors"]
    networks = _networks(**changes)
    for variable in networks.encoder.variables:
        # With large residual branches, a fresh EfficientNet amplifies rounding.
        if variable.path.endswith("project_bn/gamma"):
            variable.assign(0.1 * variable)
    card = export.write(networks, str(tmp_path), formats, _images(), {})
    assert set(card["formats"]) == set(formats)
    for result in card["formats"].values():
        assert result["relative_difference"] < export.TOLERANCE
