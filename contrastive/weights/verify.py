# SPDX-License-Identifier: Apache-2.0
"""Computes the outputs of exports as their users do, without this program.

    python verify.py FORMAT DIRECTORY IMAGES.npy OUTPUTS.npz

Each function imports only the library of its format. `export.py` compares the outputs with those of
the networks that were exported.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

# The libraries that read each format. The first one computes the outputs.
PACKAGES = {
    "saved_model": ("tensorflow",),
    "keras": ("keras",),
    "onnx": ("onnxruntime",),
    "torchvision": ("torch", "torchvision", "safetensors"),
}
# Each Keras model, and its endpoint.
KERAS_FILES = {
    "encoder.keras": "final_avg_pool",
    "classifier.keras": "logits_sup",
}
ONNX_FILE = "model.onnx"
TENSORS_FILE = "networks.safetensors"
TORCHVISION_FILE = "torchvision.safetensors"
TORCH_FILE = "torchvision.pth"
Outputs = dict[str, np.ndarray]


def read_saved_model(directory: str, images: np.ndarray) -> Outputs:
    """Calls the module as SimCLR's are called."""
    import tensorflow as tf

    module = tf.saved_model.load(os.path.join(directory, "saved_model"))
    outputs = module(tf.constant(images), trainable=False)
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def read_keras(directory: str, images: np.ndarray) -> Outputs:
    """Calls the models, which consist of Keras's own layers."""
    import keras

    outputs = {}
    for name, output in KERAS_FILES.items():
        path = os.path.join(directory, name)
        if os.path.exists(path):
            model = keras.saving.load_model(path)
            outputs[output] = keras.ops.convert_to_numpy(model(images))
    return outputs


def read_onnx(directory: str, images: np.ndarray) -> Outputs:
    """Runs the graph on the whole batch, and on one image."""
    import onnxruntime

    path = os.path.join(directory, ONNX_FILE)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    session.run(names, {"images": images[:1]})
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def read_torchvision(directory: str, images: np.ndarray) -> Outputs:
    """Loads the files strictly; images are normalised and made NCHW here."""
    import safetensors.torch
    import torch
    from torchvision.models import resnet

    path = os.path.join(directory, TORCHVISION_FILE)
    weights = safetensors.torch.load_file(path)
    torch_path = os.path.join(directory, TORCH_FILE)
    if os.path.exists(torch_path):
        same = torch.load(torch_path, weights_only=True)
        torch.testing.assert_close(same, weights, rtol=0, atol=0)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["torchvision"])
    network = resnet.ResNet(getattr(resnet, about["block"]), about["layers"])
    if about["stem"] == "cifar":
        network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = torch.nn.Identity()
    classifier: torch.nn.Module = torch.nn.Identity()
    if "fc.weight" in weights:
        classifier = torch.nn.Linear(*reversed(weights["fc.weight"].shape))
    network.fc = classifier
    network.load_state_dict(weights, strict=True)
    network.fc = torch.nn.Identity()
    if about["mean"]:
        images = images - np.float32(about["mean"])
    if about["std"]:
        images = images / np.float32(about["std"])
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        features = network.eval()(batch)
        outputs = {"final_avg_pool": features.numpy()}
        if "fc.weight" in weights:
            outputs["logits_sup"] = classifier(features).numpy()
    return outputs


_READERS: dict[str, Callable[[str, np.ndarray], Outputs]] = {
    "saved_model": read_saved_model,
    "keras": read_keras,
    "onnx": read_onnx,
    "torchvision": read_torchvision,
}


def main(file_format: str, directory: str, images: str, outputs: str) -> None:
    """Writes the outputs of an export for the images in a file."""
    values: Any = _READERS[file_format](directory, np.load(images))
    np.savez(outputs, **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
