# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs: whose they are, and where they go in ours.

A network of `resnet.resnet` names its variables by paths such as
`block_group1_block2_conv3/kernel`. Here is what the same tensors are called
elsewhere.
"""

import re

import numpy as np

_PATH = re.compile(r"(?:block_group(\d)_block(\d+)_)?(\w+)/(\w+)")
_TORCH_LAYERS = {
    "initial_conv": "conv1",
    "initial_bn": "bn1",
    "shortcut_conv": "downsample.0",
    "shortcut_bn": "downsample.1",
} | {f"{kind}{i}": f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)}
_TORCH_WEIGHTS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def torchvision_name(path: str) -> str:
    """Returns what a variable of an encoder is called in torchvision.

    Kernels are `[h, w, in, out]` here and `[out, in, h, w]` there, see
    `torchvision_layout`. timm's names are the same.

    Source: torchvision's models/resnet.py.

    Args:
        path: of a variable of `resnet.resnet`.

    Raises:
        ValueError: if torchvision's networks have no such layer.
    """
    match = _PATH.fullmatch(path)
    if not match or match[3] not in _TORCH_LAYERS:
        raise ValueError(f"torchvision's ResNets have no {path}.")
    group, block, layer, weight = match.groups()
    name = f"{_TORCH_LAYERS[layer]}.{_TORCH_WEIGHTS[weight]}"
    return f"layer{group}.{int(block) - 1}.{name}" if group else name


def torchvision_layout(array: np.ndarray) -> np.ndarray:
    """Returns a variable of an encoder with its axes in torchvision's order."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
