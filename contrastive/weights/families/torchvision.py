# SPDX-License-Identifier: Apache-2.0
"""ResNets with the names of torchvision, which timm and relic-pytorch share."""

import importlib.util
import json
import os
import re
from typing import Any

import numpy as np
import safetensors.numpy
from absl import logging

import model
import resnet
from contrastive.training import checkpoints
from contrastive.weights import families, verify
from contrastive.weights.formats import CannotExport

_LAYERS = {
    "initial_conv": "conv1",
    "initial_bn": "bn1",
    "shortcut_conv": "downsample.0",
    "shortcut_bn": "downsample.1",
    **{name: name for i in (1, 2, 3) for name in (f"conv{i}", f"bn{i}")},
}
_WEIGHTS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# relic-pytorch's encoder is a torch.nn.Sequential of a ResNet's children.
_CHILDREN = {"0": "conv1", "1": "bn1"} | {str(group + 3): f"layer{group}" for group in (1, 2, 3, 4)}
_FIRST_BLOCK = re.compile(r"(.*?)(layer1|4)\.0\.conv1\.weight")
_TARGET = re.compile(r"target|teacher|momentum|_ema|encoder_k")


def find(tensors: families.Tensors, target: bool) -> families.Found | None:
    """Finds the encoder of a state dictionary, also within other modules."""
    prefixes = {}
    for match in filter(None, map(_FIRST_BLOCK.fullmatch, tensors)):
        is_sequence = match[2] == "4"
        stem = f"{match[1]}{'0' if is_sequence else 'conv1'}.weight"
        if stem in tensors and tensors[stem].ndim == 4:
            prefixes[match[1]] = is_sequence
    if not prefixes:
        return None
    prefix = families.only(
        [p for p in prefixes if bool(_TARGET.search(p)) == target],
        prefixes,
        "target" if target else "online",
    )
    is_sequence = prefixes[prefix]
    paths = families.paths_by_name(name, _LAYERS)

    def path_of(local: str) -> str | None:
        child, dot, rest = local.partition(".")
        if is_sequence:
            child = _CHILDREN.get(child, child)
        return paths.get(child + dot + rest)

    return families.sort_tensors(
        tensors,
        (prefix,),
        path_of,
        lambda _, x: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x,
        source="relic-pytorch" if is_sequence else "torchvision",
        conventions={
            "padding": "torch",
            "shortcuts": "needed",
            # relic-pytorch does not normalise images.
            "image_mean": () if is_sequence else model.IMAGENET_MEAN,
            "image_std": () if is_sequence else model.IMAGENET_STD,
        },
    )


def name(path: str) -> str:
    """Returns torchvision's name of the variable of `resnet.resnet` at `path`.

    Raises ValueError if there is none. Source: torchvision's models/resnet.py.
    """
    group, block, layer, weight = families.split_path(path)
    if layer not in _LAYERS:
        raise ValueError(f"torchvision's ResNets have no {path}.")
    local = f"{_LAYERS[layer]}.{_WEIGHTS[weight]}"
    return f"layer{group}.{block}.{local}" if group else local


def layout(array: np.ndarray) -> np.ndarray:
    """Transposes a kernel `[h, w, in, out]`, and no other, for torch."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def write(networks: model.Networks, directory: str) -> None:
    """Writes a state dictionary that fits `load_state_dict(strict=True)`.

    It is a `.safetensors` file and, if torch is installed, also a `.pth` file.

    Raises:
        CannotExport: if torchvision has no such network.
    """
    architecture = networks.architecture
    _check_exportable(architecture)
    weights = {
        name(path): layout(value.numpy())
        for path, value in checkpoints.by_path(networks.encoder).items()
    }
    has_projection = architecture.proj_head_mode != "none"
    if networks.classifier and architecture.ft_proj_selector and has_projection:
        logging.warning(
            "torchvision has no projection head: its file is without the classifier on top of that."
        )
    elif networks.classifier:
        kernel, bias = networks.classifier.get_weights()
        weights |= {"fc.weight": kernel.T, "fc.bias": bias}
    weights = {k: np.ascontiguousarray(v) for k, v in weights.items()}
    layers, is_bottleneck = resnet.ARCHITECTURES[architecture.resnet_depth]
    about = {
        "block": "Bottleneck" if is_bottleneck else "BasicBlock",
        "layers": layers,
        "stem": architecture.stem,
        "mean": list(architecture.image_mean),
        "std": list(architecture.image_std),
    }
    path = os.path.join(directory, verify.TORCHVISION_FILE)
    safetensors.numpy.save_file(weights, path, {"format": "pt", "torchvision": json.dumps(about)})
    if _has_torch():
        import torch

        tensors = {k: torch.from_numpy(v) for k, v in weights.items()}
        torch.save(tensors, os.path.join(directory, verify.TORCH_FILE))


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _check_exportable(net: model.Architecture) -> None:
    if net.encoder != "resnet":
        raise CannotExport(f"{net.encoder} is no ResNet")
    has_pool = net.stem == "imagenet"
    is_bottleneck = resnet.ARCHITECTURES[net.resnet_depth][1]
    reasons: dict[str, Any] = {
        "torchvision has no selective kernels": net.sk_ratio,
        "torchvision's ResNets have no squeeze-and-excitation": net.se_ratio,
        "torchvision's ResNets have no pre-activation": net.preactivation,
        "torchvision's ResNets have no width_multiplier (width_per_group "
        "widens the middle of bottlenecks alone)": (
            net.width_multiplier != 1.0 or tuple(net.base_filters) != resnet.BASE_FILTERS
        ),
        "torchvision's ResNets see 3 channels": net.channels != 3,
        "torchvision pads both sides equally, and the same weights would give "
        f"other features than padding={net.padding}; train with "
        "--padding=torch": (net.padding == "same" or (net.padding == "fixed" and has_pool)),
        "torchvision has no projection in the first group's shortcut; train "
        "with --shortcuts=needed": (net.shortcuts == "always" and not is_bottleneck),
    }
    for reason, applies in reasons.items():
        if applies:
            raise CannotExport(reason)
