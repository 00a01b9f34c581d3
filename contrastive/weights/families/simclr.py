# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of SimCLR, and of RPC, which is a fork of it.

The layers of the TensorFlow 1 code are numbered in their order of construction, those of the
TensorFlow 2 code are in lists. In both cases, the order shows which layer is which.

Source: google-research/simclr@383d414, resnet.py and tf2/resnet.py.
"""

import collections
import re
from collections.abc import Iterable, Iterator

import numpy as np

from contrastive.weights import families

_SCOPE = re.compile(r"(.*?(?:base_model|resnet_model)/).*")
_VARIABLE = re.compile(r"(.+)/(kernel|bias|gamma|beta|moving_\w+)")
_TF1_LAYER = re.compile(r"(conv2d|batch_normalization)(?:_(\d+))?")
# Objects of the TensorFlow 2 code that were constructed before their siblings, although not in
# alphabetical order.
_TF2_FIRST = (
    "initial_conv_relu_max_pool",
    "projection_layers",
    "shortcut_layers",
    "conv2d_fixed_padding",
    "se_reduce",
)


def find(tensors: families.Tensors, target: bool) -> families.Found | None:
    """Finds the encoder; raises ValueError if it has no equivalent here."""
    scopes = {match[1] for match in map(_SCOPE.fullmatch, tensors) if match}
    if not scopes:
        return None
    if target:
        raise ValueError("SimCLR and RPC have no target network.")
    prefix = families.only(sorted(scopes), scopes, "online")
    layers: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    unplaced, unread = [], []
    for name, tensor in tensors.items():
        match = _VARIABLE.fullmatch(name.removeprefix(prefix))
        if not name.startswith(prefix):
            unread.append(name)
        elif match:
            layers[match[1]][match[2]] = tensor
        elif not _VARIABLE.fullmatch(name.rpartition("/")[0]):
            unplaced.append(name)  # others are an optimizer's slots
    is_tf1 = prefix.endswith("base_model/")
    order = sorted(layers, key=_tf1_position if is_tf1 else _tf2_position)
    weights = _name_in_order([layers[name] for name in order])
    has_bottlenecks = "block_group1_block1_conv3/kernel" in weights
    if is_tf1 and "stem_conv1/kernel" in weights and not has_bottlenecks:
        raise ValueError(
            "ResNet-18 and ResNet-34 with --sk_ratio are another network in "
            "SimCLR's TensorFlow 1 code: its blocks pool their residual "
            "branch, too."
        )
    return families.Found(
        source=f"SimCLR, TensorFlow {1 if is_tf1 else 2}",
        weights=weights,
        unplaced=unplaced,
        unread=unread,
        conventions={"padding": "fixed"},
    )


def _tf1_position(layer: str) -> tuple[str, int]:
    match = _TF1_LAYER.fullmatch(layer)
    if not match:
        raise ValueError(f"SimCLR's TensorFlow 1 code has no layer {layer!r}.")
    return match[1], int(match[2] or 0)


def _tf2_position(layer: str) -> list[tuple[bool, int, str]]:
    return [
        (part not in _TF2_FIRST, int(part) if part.isdigit() else 0, part)
        for part in layer.split("/")
    ]


def _name_in_order(
    layers: list[dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Returns the weights of layers in order of construction, by our paths."""
    # The kernel sizes show the kind of the blocks: 3-3, 1-3-1, and with selective kernels
    # 1-3-(1-1)-1. The projection of a block's shortcut comes first. How convolutions and BatchNorms
    # are interleaved does not matter.
    convs = [layer for layer in layers if "kernel" in layer]
    norms = [layer for layer in layers if "kernel" not in layer]
    sizes = "".join(
        "e" if "bias" in layer else f"{(*layer['kernel'].shape, 0)[0]}" for layer in convs
    )
    for block in ("33", "131", "13111"):
        one = f"(1?)({block})((?:ee)?)"
        # The lookahead: the first block has a projection.
        match = re.fullmatch(f"(7|3|333)(?=1{block})((?:{one})+)", sizes)
        if not match:
            continue
        names = list(_our_layers(match[1], re.findall(one, match[2])))
        # Convolutions first: sorting keeps the order within each kind.
        names.sort(key=lambda name: "bn" in name)
        if len(names) != len(layers):
            break
        return {
            f"{name}/{weight}": array
            for name, layer in zip(names, convs + norms, strict=True)
            for weight, array in layer.items()
        }
    raise ValueError(
        f"SimCLR has no network of convolutions of the sizes {sizes:.400} and "
        f"{len(norms)} BatchNorms."
    )


def _our_layers(stem: str, blocks: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Yields the names of our layers in SimCLR's order of construction."""
    # Given are the kernel sizes of the stem and, for each block, those of its shortcut, its
    # residual branch and its squeeze-and-excitation.
    if stem == "333":
        yield from ("stem_conv1", "stem_bn1", "stem_conv2", "stem_bn2")
    yield from ("initial_conv", "initial_bn")
    group = block = 0
    for shortcut, convs, excitation in blocks:
        group, block = (group + 1, 1) if shortcut else (group, block + 1)
        layers = ["shortcut_conv", "shortcut_bn"] if shortcut else []
        for conv in (1, 2, 3)[: 2 if convs == "33" else 3]:
            if conv == 3 and convs == "13111":
                layers += ["sk_conv1", "sk_bn1", "sk_conv2"]
            layers += [f"conv{conv}", f"bn{conv}"]
        layers += ["se_conv1", "se_conv2"] if excitation else []
        yield from (f"block_group{group}_block{block}_{x}" for x in layers)
