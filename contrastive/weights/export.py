# SPDX-License-Identifier: Apache-2.0
"""Export of networks for other programs, each format compared with ours.

An export is a directory with the files of each format and `export.json`, which describes them and
says how far the outputs of each format, computed by its own library in a separate process, are from
those of the networks.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tabulate
import tensorflow as tf
from absl import logging

import model
import resnet
from contrastive import run_record, storage
from contrastive.training import checkpoints
from contrastive.weights import loading, verify
from contrastive.weights.families import torchvision
from contrastive.weights.formats import LOADED_BY, CannotExport, check_formats

CARD = loading.CARD
# Largest difference of an output, relative to its largest absolute value.
TOLERANCE = 1e-4


def write(
    networks: model.Networks,
    directory: str,
    formats: Sequence[str],
    images: np.ndarray,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Writes networks in other formats, and compares each with them.

    A format that cannot express the networks, or whose outputs differ by more than `TOLERANCE`,
    leaves no file. An earlier export in the directory is deleted.

    Args:
        networks: in float32, without the parts that only pretraining uses.
        directory: local or remote; created if necessary.
        formats: names from `formats.FORMATS`.
        images: float32 `[N, S, S, C]` in [0, 1], to compare outputs on.
        about: further fields for `export.json`.

    Returns:
        The content of `export.json`. Its "formats" hold by name either "refused", the reason, or
        "files", "loaded_by" and the differences.

    Raises:
        ValueError: as `check_formats`.
    """
    check_formats(formats)
    tf.io.gfile.makedirs(directory)
    _delete_export(directory)
    expected = _outputs(networks, images)
    results: dict[str, dict[str, Any]] = {}
    for name in formats:
        logging.info("Writing %s ...", name)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                WRITERS[name](networks, scratch)
                compared = _compare(name, scratch, images, expected)
            except CannotExport as error:
                results[name] = {"refused": str(error)}
                continue
            files = sorted(os.listdir(scratch))
            results[name] = {"files": files, "loaded_by": LOADED_BY[name]}
            results[name] |= compared
            for folder, _, names in os.walk(scratch):
                to = os.path.join(directory, folder[len(scratch) + 1 :])
                tf.io.gfile.makedirs(to)
                for file in names:
                    source = os.path.join(folder, file)
                    tf.io.gfile.copy(source, os.path.join(to, file), True)
    card = _card(networks, images.shape[1]) | about | {"formats": results}
    storage.write_json(os.path.join(directory, CARD), card)
    return card


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the "formats" of `export.json` as text, one per line."""
    rows = [(name, _describe(result)) for name, result in results.items()]
    return tabulate.tabulate(rows, tablefmt="plain", disable_numparse=True)


def _describe(result: dict[str, Any]) -> str:
    if "refused" in result:
        return f"not written: {result['refused']}"
    files = ", ".join(result["files"])
    if "not_compared" in result:
        return f"{files}: not compared: {result['not_compared']}"
    return (
        f"{files}: largest difference {result['largest_difference']:.1e} "
        f"({result['relative_difference']:.1e} of the largest value) "
        f"on {result['images']} images in {result['runtime']}"
    )


def _delete_export(directory: str) -> None:
    """Deletes the files of an earlier export, which its `export.json` lists."""
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


def _card(networks: model.Networks, image_size: int) -> dict[str, Any]:
    """Returns the facts that users of any of the formats need."""
    architecture, encoder = networks.architecture, networks.encoder
    norms = [x for x in encoder.layers if isinstance(x, resnet.GlobalBatchNorm)]
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
        "features": encoder.output_shape[-1],
        "endpoints": list(_endpoints(copy_with_keras_layers(networks)).output),
        "padding": architecture.padding,
        "batch_norm_epsilon": norms[0].epsilon if norms else None,
        "tolerance": TOLERANCE,
        "architecture": dataclasses.asdict(architecture),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
        },
    }


def _outputs(networks: model.Networks, images: np.ndarray) -> verify.Outputs:
    """Computes the outputs of the networks themselves by endpoint."""
    features = networks.features(images, training=False)
    layers = networks.projection(features, training=False)
    outputs = _name_projection(networks, layers) | {"final_avg_pool": features}
    if networks.classifier:
        outputs["logits_sup"] = networks.logits(images, training=False)
    return {name: np.asarray(output) for name, output in outputs.items()}


def _compare(
    name: str, directory: str, images: np.ndarray, expected: verify.Outputs
) -> dict[str, Any]:
    """Returns how far outputs are from those expected, or CannotExport."""
    if name == "safetensors":
        path = os.path.join(directory, verify.TENSORS_FILE)
        outputs = _outputs(loading.load_networks(path), images)
        runtime = "this program"
    else:
        packages = verify.PACKAGES[name]
        if absent := missing(packages):
            return {"not_compared": f"pip install {' '.join(absent)}"}
        outputs = _read(name, directory, images)
        runtime = f"{packages[0]} {importlib.metadata.version(packages[0])}"
    largest = relative = -1.0
    for output in sorted(outputs.keys() & expected.keys()):
        difference = np.abs(outputs[output] - expected[output]).max()
        share = difference / max(np.abs(expected[output]).max(), 1e-30)
        if not share <= TOLERANCE:  # true of NaN, too
            raise CannotExport(
                f"{output} in {runtime} is off by {difference:.1e}, "
                f"{share:.1e} of its largest value. Rounding is up to "
                f"{TOLERANCE:g}, unless the network was hardly trained"
            )
        largest = max(largest, float(difference))
        relative = max(relative, float(share))
    if largest < 0:
        raise CannotExport(
            f"there is nothing to compare: {runtime} read the outputs "
            f"{sorted(outputs)}, the networks have {sorted(expected)}"
        )
    return {
        "largest_difference": largest,
        "relative_difference": relative,
        "images": len(images),
        "runtime": runtime,
    }


def _read(name: str, directory: str, images: np.ndarray) -> verify.Outputs:
    """Computes the outputs of a format in a separate process."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = (os.path.join(scratch, f) for f in ("in.npy", "out.npz"))
        np.save(given, images)
        # -P: this program's modules cannot be imported there.
        command = [sys.executable, "-P", verify.__file__, name, directory]
        done = subprocess.run(
            [*command, given, out],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": "tensorflow"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CannotExport(
                "the written files cannot be read: "
                + (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            )
        with np.load(out) as outputs:
            return dict(outputs)


def copy_with_keras_layers(networks: model.Networks) -> model.Networks:
    """Copies networks in float32, with unsynchronised layers of Keras alone."""

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


def missing(packages: Sequence[str]) -> list[str]:
    """Returns the packages that are not installed."""
    return [name for name in packages if not importlib.util.find_spec(name)]


def _endpoints(networks: model.Networks) -> keras.Model:
    """Returns a model of Keras layers from images in [0, 1] to endpoints."""
    architecture, encoder = networks.architecture, networks.encoder
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
    layers = networks.projection(outputs["final_avg_pool"])
    outputs |= _name_projection(networks, layers)
    if networks.classifier:
        chosen = layers[architecture.ft_proj_selector]
        outputs["logits_sup"] = networks.classifier(chosen)
    return keras.Model(images, outputs)


def _name_projection(networks: model.Networks, layers: Any) -> dict[str, Any]:
    """Returns the input and the layers of the projection by endpoint."""
    if networks.architecture.proj_head_mode == "none":
        return {}
    hidden = [f"proj_head_{i}" for i in range(1, len(layers) - 1)]
    names = ["proj_head_input", *hidden, "proj_head_output"]
    return dict(zip(names, layers, strict=True))


class _Module(tf.Module):
    """The saved object; its attributes replace properties of `tf.Module`."""

    variables: Any = ()
    trainable_variables: Any = ()


def _write_saved_model(networks: model.Networks, directory: str) -> None:
    # Source: google-research/simclr, tf2/run.py, `build_saved_model`. Differs from it: gradients
    # exist after loading, and the list of trainable variables is not empty then.
    stock = copy_with_keras_layers(networks)
    network = _endpoints(stock)
    images = tf.TensorSpec(network.input.shape, tf.float32, name="images")

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
        setattr(module, name, checkpoints.by_path(part))
    module.variables = [v.value for p in parts.values() for v in p.variables]
    module.trainable_variables = module.trainable_variables_list = [
        v.value for p in parts.values() for v in p.trainable_variables
    ]
    path = os.path.join(directory, "saved_model")
    # TensorFlow defines the gradients of activations such as SiLU so.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
    signatures = {"serving_default": serve}
    tf.saved_model.save(module, path, signatures, options)
    run_record.write_run(path, {"architecture": dataclasses.asdict(networks.architecture)})


def _write_keras(networks: model.Networks, directory: str) -> None:
    network = _endpoints(copy_with_keras_layers(networks))
    for name, output in verify.KERAS_FILES.items():
        if output in network.output:
            part = keras.Model(network.input, network.output[output])
            part.save(os.path.join(directory, name))


def _write_onnx(networks: model.Networks, directory: str) -> None:
    if absent := missing(("tf2onnx", "onnx")):
        raise CannotExport(
            f"{' and '.join(absent)} is not installed: pip install -r requirements/export.txt"
        )
    import onnx

    network = _endpoints(copy_with_keras_layers(networks))
    names = [n for n in verify.KERAS_FILES.values() if n in network.output]
    outputs = {name: network.output[name] for name in names}
    images = tf.TensorSpec(network.input.shape, tf.float32, name="images")
    path = os.path.join(directory, verify.ONNX_FILE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's, about itself
        keras.Model(network.input, outputs).export(
            path, format="onnx", verbose=False, input_signature=[images]
        )
    onnx.checker.check_model(path)


# A function for each of `formats.FORMATS` that writes into a local folder.
WRITERS: dict[str, Callable[[model.Networks, str], None]] = {
    "saved_model": _write_saved_model,
    "keras": _write_keras,
    "torchvision": torchvision.write,
    "onnx": _write_onnx,
    "safetensors": lambda networks, directory: loading.save_tensors(
        networks, os.path.join(directory, verify.TENSORS_FILE)
    ),
}
