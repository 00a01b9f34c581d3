# SPDX-License-Identifier: Apache-2.0
"""Encoders out: formats that other programs read, each compared with ours.

An export is a directory: the files of each format, and `export.json`, which
says what they are and how far each of them, read by its own library in a
process of its own, is from the networks here.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import safetensors.numpy
import tensorflow as tf
from absl import logging

import model
import resnet
from contrastive.weights import checkpoint, published, readers

CARD = "export.json"
# Largest difference of an output, as a share of its largest absolute value.
TOLERANCE = 1e-4

_WRITING_ONNX = ("tf2onnx", "onnx")
_TENSORS = "networks.safetensors"


class CannotExport(ValueError):  # noqa: N818
    """A format cannot express the networks, or could not be written."""


def check_formats(formats: Sequence[str]) -> None:
    """Raises ValueError if a format is unknown, or there is none."""
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(
            f"Formats are {', '.join(FORMATS)}. "
            f"Received: {', '.join(unknown) or 'none'}."
        )


def write(
    networks: model.Networks,
    directory: str,
    formats: Sequence[str],
    images: np.ndarray,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Writes networks in other formats, and compares each with them.

    A format that cannot express the networks, or whose outputs differ by more
    than `TOLERANCE`, leaves no file. An export that was in the directory before
    is deleted.

    Args:
        networks: in float32, without what only pretraining uses.
        directory: local or remote; made if need be.
        formats: names from `FORMATS`.
        images: float32 `[n, s, s, c]` in [0, 1], to compare outputs on.
        about: what else `export.json` shall say.

    Returns:
        The content of `export.json`. Its "formats" hold by name either
        "refused", the reason, or "files" and what comparing them showed.

    Raises:
        ValueError: as `check_formats`.
    """
    check_formats(formats)
    _delete_export(directory)
    expected = _expected(networks, images)
    results = {}
    for name in formats:
        logging.info("Writing %s ...", name)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                FORMATS[name](networks, scratch)
                compared = _compare(name, scratch, images, expected)
            except CannotExport as error:
                results[name] = {"refused": str(error)}
            else:
                files = sorted(os.listdir(scratch))
                results[name] = {"files": files} | compared
                _copy(scratch, directory)
    card = _card(networks, images.shape[1]) | about | {"formats": results}
    with tf.io.gfile.GFile(os.path.join(directory, CARD), "w") as file:
        json.dump(card, file, indent=2)
    return card


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the "formats" of `export.json` as text, one a line."""
    lines = []
    for name, result in results.items():
        if "refused" in result:
            text = f"not written: {result['refused']}"
        else:
            text = ", ".join(result["files"]) + ": "
            text += (
                f"not compared: {result['not_compared']}"
                if "not_compared" in result
                else f"largest difference {result['largest_difference']:.1e} "
                f"({result['relative_difference']:.1e} of the largest value) "
                f"on {result['images']} images in {result['runtime']}"
            )
        lines.append(f"{name:12} {text}")
    return "\n".join(lines)


def _delete_export(directory: str) -> None:
    """Deletes what the directory's `export.json`, if any, lists, and itself."""
    tf.io.gfile.makedirs(directory)
    card = os.path.join(directory, CARD)
    if not tf.io.gfile.exists(card):
        return
    with tf.io.gfile.GFile(card) as file:
        results = json.load(file)["formats"]
    for result in results.values():
        for name in result.get("files", ()):
            path = os.path.join(directory, os.path.basename(name))
            if tf.io.gfile.isdir(path):
                tf.io.gfile.rmtree(path)
            elif tf.io.gfile.exists(path):
                tf.io.gfile.remove(path)
    tf.io.gfile.remove(card)


def _copy(source: str, target: str) -> None:
    """Copies what is in a local folder into another, local or remote."""
    for folder, _, names in os.walk(source):
        inside = os.path.relpath(folder, source)
        to = target if inside == "." else os.path.join(target, inside)
        tf.io.gfile.makedirs(to)
        for name in names:
            tf.io.gfile.copy(
                os.path.join(folder, name), os.path.join(to, name), True
            )


def _card(networks: model.Networks, image_size: int) -> dict[str, Any]:
    """Returns what users of any of the formats have to know."""
    architecture = networks.architecture
    return {
        "input": {
            "size": image_size,
            "channels": architecture.channels,
            "range": [0, 1],
            "layout": "NHWC; NCHW in torchvision",
            "mean": list(architecture.image_mean),
            "std": list(architecture.image_std),
            "normalised": "by the model; by the caller in torchvision",
        },
        "features": networks.encoder.output_shape[-1],
        "endpoints": list(_endpoints(_stock(networks)).output),
        "padding": architecture.padding,
        "batch_norm_epsilon": next(
            (
                layer.epsilon
                for layer in networks.encoder.layers
                if isinstance(layer, resnet.GlobalBatchNorm)
            ),
            None,
        ),
        "tolerance": TOLERANCE,
        "architecture": dataclasses.asdict(architecture),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        },
    }


def _expected(
    networks: model.Networks, images: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns what the networks themselves compute, by endpoint."""
    features = networks.features(images, training=False)
    outputs = {
        "final_avg_pool": features,
        **_heads(networks, networks.projection(features, training=False)),
    }
    if networks.classifier:
        outputs["logits_sup"] = networks.logits(images, training=False)
    return {name: np.asarray(output) for name, output in outputs.items()}


def _heads(networks: model.Networks, layers: Sequence[Any]) -> dict[str, Any]:
    """Returns the projection's input and layers by the names of endpoints."""
    if networks.architecture.proj_head_mode == "none":
        return {}
    hidden = [f"proj_head_{i}" for i in range(1, len(layers) - 1)]
    names = ["proj_head_input", *hidden, "proj_head_output"]
    return dict(zip(names, layers, strict=True))


def _compare(
    name: str,
    directory: str,
    images: np.ndarray,
    expected: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Returns how far a format's outputs are from those expected.

    Raises:
        CannotExport: if that is too far, or the format cannot be read.
    """
    if name == "safetensors":
        path = os.path.join(directory, _TENSORS)
        outputs = _expected(checkpoint.load_networks(path), images)
        runtime = "this program"
    else:
        packages = readers.PACKAGES[name]
        missing = _missing(packages)
        if missing:
            return {"not_compared": f"pip install {' '.join(missing)}"}
        outputs = _read(name, directory, images)
        version = importlib.metadata.version(packages[0])
        runtime = f"{packages[0]} {version}"
    common = outputs.keys() & expected.keys()
    if not common:
        raise CannotExport(
            f"there is nothing to compare: {runtime} read the outputs "
            f"{sorted(outputs)}, the networks have {sorted(expected)}"
        )
    largest, relative = 0.0, 0.0
    for output in common:
        difference = np.abs(outputs[output] - expected[output]).max()
        share = difference / max(np.abs(expected[output]).max(), 1e-30)
        if not share <= TOLERANCE:  # so that NaN is too far
            raise CannotExport(
                f"{output} in {runtime} is off by {difference:.1e}, "
                f"{share:.1e} of its largest value. Rounding is up to "
                f"{TOLERANCE:g}, unless the network was hardly trained"
            )
        largest = max(largest, float(difference))
        relative = max(relative, float(share))
    return {
        "largest_difference": largest,
        "relative_difference": relative,
        "images": len(images),
        "runtime": runtime,
    }


def _missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if not importlib.util.find_spec(name)]


def _read(
    name: str, directory: str, images: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the outputs of a format, computed in a process of its own.

    Raises:
        CannotExport: if that process fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, out = (os.path.join(scratch, f) for f in ("in.npy", "out.npz"))
        np.save(given, images)
        # -P: this program's modules cannot be imported there.
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                readers.__file__,
                name,
                directory,
                given,
                out,
            ],
            env=os.environ
            | {"CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CannotExport(
                "what was written cannot be read: "
                + (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            )
        with np.load(out) as outputs:
            return dict(outputs)


def _stock(networks: model.Networks) -> model.Networks:
    """Returns copies of networks in float32 and of Keras's own layers.

    Their BatchNorm knows no replicas, and needs nothing of this program.
    """

    def convert(layer: Any) -> Any:
        config = layer.get_config()
        if isinstance(layer, keras.layers.Layer):
            config["dtype"] = "float32"
        if isinstance(layer, resnet.GlobalBatchNorm):
            del config["synchronized"]
            return keras.layers.BatchNormalization(**config)
        return layer.__class__.from_config(config)

    copies = {}
    for name, network in networks.models().items():
        copies[name] = keras.models.clone_model(network, clone_function=convert)
        copies[name].set_weights(network.get_weights())
    return dataclasses.replace(networks, **copies)


def _endpoints(stock: model.Networks) -> keras.Model:
    """Returns a model from images in [0, 1] to all endpoints, by name."""
    architecture, encoder = stock.architecture, stock.encoder
    x = images = keras.Input((None, None, architecture.channels), name="images")
    if architecture.image_mean or architecture.image_std:
        std = np.array(architecture.image_std or [1.0])
        mean = np.array(architecture.image_mean or [0.0])
        x = keras.layers.Rescaling(
            (1 / std).tolist(), (-mean / std).tolist(), name="normalisation"
        )(x)
    parts = {"final_avg_pool": encoder.output}
    if architecture.encoder == "resnet":
        parts = resnet.endpoints(encoder)
    outputs = keras.Model(encoder.input, parts, name="encoder")(x)
    layers = stock.projection(outputs["final_avg_pool"])
    outputs |= _heads(stock, layers)
    if stock.classifier:
        outputs["logits_sup"] = stock.classifier(
            layers[architecture.ft_proj_selector]
        )
    return keras.Model(images, outputs)


def _specification(network: keras.Model) -> tf.TensorSpec:
    return tf.TensorSpec(network.input.shape, tf.float32, name="images")


class _Module(tf.Module):
    """What is saved: attributes, where `tf.Module` has properties."""

    variables: Any = ()
    trainable_variables: Any = ()


def _write_saved_model(networks: model.Networks, directory: str) -> None:
    """Writes a module that is called as SimCLR's are, and can be trained.

    Source: google-research/simclr, tf2/run.py, `build_saved_model`. Differs
    from it: gradients exist after loading, and the list of trainable variables
    is not empty then.
    """
    stock = _stock(networks)
    network = _endpoints(stock)
    images = _specification(network)

    @tf.function
    def call(inputs: tf.Tensor, trainable: bool = False) -> Any:
        return network(inputs, training=trainable)

    @tf.function(input_signature=[images])
    def serve(inputs: tf.Tensor) -> Any:
        return network(inputs, training=False)

    for trainable in (True, False):
        call.get_concrete_function(images, trainable=trainable)
    module = _Module()
    module.__call__ = call
    parts = stock.models()
    for name, part in parts.items():
        setattr(module, name, checkpoint.by_path(part))
    module.variables = [v.value for p in parts.values() for v in p.variables]
    module.trainable_variables = module.trainable_variables_list = [
        v.value for p in parts.values() for v in p.trainable_variables
    ]
    path = os.path.join(directory, "saved_model")
    tf.saved_model.save(
        module,
        path,
        signatures={"serving_default": serve},
        # For activations such as SiLU, whose gradient TensorFlow defines so.
        options=tf.saved_model.SaveOptions(experimental_custom_gradients=True),
    )
    checkpoint.write_run(
        path, {"architecture": dataclasses.asdict(networks.architecture)}
    )


def _write_keras(networks: model.Networks, directory: str) -> None:
    network = _endpoints(_stock(networks))
    for name, output in readers.KERAS_FILES.items():
        if output in network.output:
            part = keras.Model(network.input, network.output[output])
            part.save(os.path.join(directory, name))


def _write_onnx(networks: model.Networks, directory: str) -> None:
    """Writes one graph, with the features and, if there are any, the logits."""
    missing = _missing(_WRITING_ONNX)
    if missing:
        raise CannotExport(
            f"{' and '.join(missing)} is not installed: "
            "pip install -r requirements/export.txt"
        )
    import onnx

    network = _endpoints(_stock(networks))
    names = [
        name
        for name in ("final_avg_pool", "logits_sup")
        if name in network.output
    ]
    path = os.path.join(directory, readers.ONNX_FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converter, about itself
        keras.Model(
            network.input, [network.output[name] for name in names]
        ).export(
            path,
            format="onnx",
            verbose=False,
            input_signature=[_specification(network)],
        )
    # The converter keeps the order of outputs, not their names.
    proto = onnx.load(path)
    renamed = {
        output.name: name
        for output, name in zip(proto.graph.output, names, strict=True)
    }
    for output in proto.graph.output:
        output.name = renamed[output.name]
    for node in proto.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [renamed.get(tensor, tensor) for tensor in tensors]
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _write_safetensors(networks: model.Networks, directory: str) -> None:
    checkpoint.save_tensors(networks, os.path.join(directory, _TENSORS))


def _write_torchvision(networks: model.Networks, directory: str) -> None:
    """Writes a state dictionary, which `load_state_dict` takes as strict."""
    architecture = networks.architecture
    _check_torchvision(architecture)
    weights = {
        published.torchvision_name(path): published.torchvision_layout(
            value.numpy()
        )
        for path, value in checkpoint.by_path(networks.encoder).items()
    }
    sees_features = (
        architecture.ft_proj_selector == 0
        or architecture.proj_head_mode == "none"
    )
    if networks.classifier and sees_features:
        kernel, bias = networks.classifier.get_weights()
        weights |= {"fc.weight": kernel.T, "fc.bias": bias}
    elif networks.classifier:
        logging.warning(
            "torchvision has no projection head: its file is without the "
            "classifier on top of that."
        )
    weights = {k: np.ascontiguousarray(v) for k, v in weights.items()}
    layers, is_bottleneck = resnet.ARCHITECTURES[architecture.resnet_depth]
    about = {
        "block": "Bottleneck" if is_bottleneck else "BasicBlock",
        "layers": layers,
        "stem": architecture.stem,
        "mean": list(architecture.image_mean),
        "std": list(architecture.image_std),
    }
    path = os.path.join(directory, readers.TORCHVISION_FILE)
    safetensors.numpy.save_file(
        weights,
        f"{path}.safetensors",
        {"format": "pt", "torchvision": json.dumps(about)},
    )
    _save_torch(weights, f"{path}.pth")


def _check_torchvision(architecture: model.Architecture) -> None:
    """Raises CannotExport, with the reason, for what torchvision has not."""
    if architecture.encoder != "resnet":
        raise CannotExport(f"{architecture.encoder} is no ResNet")
    has_pool = architecture.stem == "imagenet"
    is_bottleneck = resnet.ARCHITECTURES[architecture.resnet_depth][1]
    reasons = {
        "torchvision has no selective kernels": architecture.sk_ratio > 0,
        "torchvision's ResNets have no squeeze-and-excitation": (
            architecture.se_ratio > 0
        ),
        "torchvision's ResNets have no pre-activation": (
            architecture.preactivation
        ),
        "torchvision's ResNets have no width_multiplier (width_per_group "
        "widens the middle of bottlenecks alone)": (
            architecture.width_multiplier != 1.0
            or tuple(architecture.base_filters) != resnet.BASE_FILTERS
        ),
        "torchvision's ResNets see 3 channels": architecture.channels != 3,
        "torchvision pads both sides equally, and the same weights would give "
        f"other features than padding={architecture.padding}; train with "
        "--padding=torch": (
            architecture.padding == "same"
            or (architecture.padding == "fixed" and has_pool)
        ),
        "torchvision has no projection in the first group's shortcut; train "
        "with --shortcuts=needed": (
            architecture.shortcuts == "always" and not is_bottleneck
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise CannotExport(reason)


def _save_torch(tensors: dict[str, np.ndarray], path: str) -> None:
    """Writes float32 arrays as `torch.save` writes a dictionary of tensors.

    Source: PyTorch's torch/serialization.py, the format of its version 1.6: an
    archive of one file a tensor, and a pickle that says which is which.
    """

    def encoded(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]  # no header, no stop

    def encoded_tensor(key: str, array: np.ndarray) -> bytes:
        strides = tuple(n // array.itemsize for n in array.strides)
        storage = (
            b"(" + encoded("storage") + b"ctorch\nFloatStorage\n"
            + encoded(key) + encoded("cpu") + encoded(array.size) + b"tQ"
        )  # fmt: skip
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + encoded(0)
            + encoded(array.shape) + encoded(strides) + encoded(False)
            + b"ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip

    items = [
        encoded(name) + encoded_tensor(str(i), array) + b"s"
        for i, (name, array) in enumerate(tensors.items())
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(
            "archive/data.pkl", b"\x80\x02}" + b"".join(items) + b"."
        )
        archive.writestr("archive/byteorder", sys.byteorder)
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/version", "3\n")


# By name, what writes it into a local folder.
FORMATS: dict[str, Callable[[model.Networks, str], None]] = {
    "saved_model": _write_saved_model,
    "keras": _write_keras,
    "torchvision": _write_torchvision,
    "onnx": _write_onnx,
    "safetensors": _write_safetensors,
}
