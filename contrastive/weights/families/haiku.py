# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of DeepMind's BYOL, ReLICv2 and SemPPL, made with haiku."""

import re

import numpy as np

import model
from contrastive.weights import families

_LAYERS = {
    "initial_conv": "initial_conv",
    "initial_bn": "initial_batchnorm",
    "final_bn": "final_batchnorm",
    "shortcut_conv": "shortcut_conv",
    "shortcut_bn": "shortcut_batchnorm",
    **{f"conv{i}": f"conv_{i - 1}" for i in (1, 2, 3)},
    **{f"bn{i}": f"batchnorm_{i - 1}" for i in (1, 2, 3)},
}
_WEIGHTS = {
    "kernel": "w",
    "gamma": "scale",
    "beta": "offset",
    "moving_mean": "~/mean_ema/average",
    "moving_variance": "~/var_ema/average",
}
_STEM = re.compile(r"((?:.*/)?(online|target)_params/(?:.+/)?)initial_conv(?:_\d+)?/w")
_STEM_NUMBER = r"^(initial_conv|initial_batchnorm|final_batchnorm)_\d+/"


def find(tensors: families.Tensors, target: bool) -> families.Found | None:
    """Finds the encoder of a checkpoint, a tree of `module/name`."""
    stems = {m[1]: m for m in map(_STEM.fullmatch, tensors) if m}
    if not stems:
        return None
    wanted = "target" if target else "online"
    prefix = families.only([p for p, match in stems.items() if match[2] == wanted], stems, wanted)
    # After training on several devices, the first axis may be that of devices.
    has_devices = tensors[stems[prefix][0]].ndim == 5
    state = f"{wanted}_state/".join(prefix.rsplit(f"{wanted}_params/", 1))
    paths = families.paths_by_name(_name, _LAYERS)

    def layout(path: str, array: np.ndarray) -> np.ndarray:
        if has_devices and array.ndim and len(array):
            array = array[0]
        return array if path.endswith("kernel") else array.reshape(-1)

    return families.sort_tensors(
        tensors,
        (prefix, state),
        lambda name: paths.get(re.sub(_STEM_NUMBER, r"\1/", name)),
        layout,
        source="DeepMind's haiku",
        conventions={
            "padding": "same",
            "image_mean": model.IMAGENET_MEAN,
            "image_std": model.IMAGENET_STD,
        },
    )


def _name(path: str) -> str:
    # Source: google-deepmind/relicv2, utils/networks.py; haiku nets/resnet.py.
    group, block, layer, weight = families.split_path(path)
    folder = f"block_group_{int(group) - 1}/~/block_{block}/~/" if group else ""
    return f"{folder}{_LAYERS[layer]}/{_WEIGHTS[weight]}"
