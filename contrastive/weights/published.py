# SPDX-License-Identifier: Apache-2.0
"""Published encoders: their family, architecture and weights."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

import model
import resnet
from contrastive.weights.families import (
    Found,
    Tensors,
    haiku,
    simclr,
    split_path,
    torchvision,
)

# In this order, each looks for its encoder among the tensors of a file. The second argument says
# whether the target network is meant.
FAMILIES: tuple[Callable[[Tensors, bool], Found | None], ...] = (
    haiku.find,
    torchvision.find,
    simclr.find,
)

_MAX_LISTED = 20  # tensors in an error
_MAX_LOGGED = 3
_NO_HEADS = {"proj_head_mode": "none", "ft_proj_selector": 0, "num_classes": 0}
# Fields that no tensor of an encoder shows, and that the heads alone use.
_NOT_SHOWN = _NO_HEADS | {
    "zero_init_residual": True,
    "global_bn": True,
    "batch_norm_decay": 0.9,
    "image_mean": (),
    "image_std": (),
    "proj_out_dim": 128,
    "num_proj_layers": 3,
    "zero_init_logits_layer": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """The weights and the architecture of an encoder, without heads.

    The fields are those of `families.Found`.

    Raises:
        ValueError: if an encoder of the architecture has variables of other names or shapes than
            the weights.
    """

    source: str
    architecture: model.Architecture
    weights: dict[str, np.ndarray]
    unread: tuple[str, ...]

    def __post_init__(self) -> None:
        # A damaged file may declare any size; in a graph, it takes no memory.
        with tf.Graph().as_default():
            self._check(model.build_encoder(self.architecture))

    def assign_to(self, encoder: Any) -> None:
        """Assigns the weights; ValueError if the encoder is another one."""
        self._check(encoder)
        for variable in encoder.variables:
            variable.assign(self.weights[variable.path])
        names = [*self.unread[:_MAX_LOGGED], f"{len(self.unread)} in all"]
        logging.info(
            "Loaded %d tensors of %s. Not read, as of other networks: %s.",
            len(self.weights),
            self.source,
            ", ".join(names) if self.unread else "none",
        )

    def _check(self, encoder: Any) -> None:
        """Raises ValueError unless variables and weights match."""
        shapes = {v.path: v.shape for v in encoder.variables}
        own = {path: array.shape for path, array in self.weights.items()}
        problems = [
            f"{path}: {own.get(path, 'none')} in the file, {shapes.get(path, 'none')} here"
            for path in sorted({*shapes, *own})
            if own.get(path) != shapes.get(path)
        ]
        if problems:
            raise ValueError(
                f"{len(problems)} tensors of {self.source} do not fit:" + _first(problems, "...")
            )


def identify(tensors: Tensors, *, target: bool = False, **architecture: Any) -> Published:
    """Finds the encoder among named tensors.

    `FAMILIES` are DeepMind's haiku networks (BYOL, ReLICv2, SemPPL), ResNets with torchvision's
    names (also timm's and relic-pytorch's), and those of SimCLR and RPC.

    Args:
        tensors: by their names in a file; nested names are joined by "/".
        target: whether the target network, a moving average, is meant.
        **architecture: fields of `model.Architecture` that replace those found.

    Raises:
        ValueError: if there is no known encoder, or its tensors and our variables do not match; the
            message lists the tensors.
    """
    families = (find(tensors, target) for find in FAMILIES)
    found = next(filter(None, families), None)
    if found is None:
        raise ValueError(
            "These tensors are of no ResNet of DeepMind's haiku, torchvision, "
            "timm, relic-pytorch, SimCLR or RPC:" + _listing(tensors, tensors)
        )
    if found.unplaced:
        raise ValueError(
            f"Tensors of {found.source} have no place in this program's "
            "networks. (SemPPL's selective kernels are not read: no published "
            "code says what their tensors do.)" + _listing(found.unplaced, tensors)
        )
    record = _infer_architecture(found.weights) | found.conventions
    return Published(
        source=found.source,
        architecture=model.Architecture.from_record(record, **architecture),
        weights=found.weights,
        unread=tuple(sorted(found.unread)),
    )


def of_export(tensors: Tensors, record: Mapping[str, Any], **architecture: Any) -> Published:
    """Returns the encoder in an export of this program.

    The tensors are named `NETWORK/PATH`. `record` is the architecture that was exported, and
    `architecture` are fields that replace those of the record.

    Raises:
        ValueError: if the tensors do not have that architecture.
    """
    fields = architecture | _NO_HEADS
    own = [name for name in tensors if name.startswith("encoder/")]
    return Published(
        source="this program",
        architecture=model.Architecture.from_record(record, **fields).without_pretraining(),
        weights={n.removeprefix("encoder/"): tensors[n] for n in own},
        unread=tuple(name for name in tensors if name not in own),
    )


def _infer_architecture(weights: Tensors) -> dict[str, Any]:
    """Returns the fields of `model.Architecture` that the weights show."""

    def shape(layer: str) -> tuple[int, ...]:
        path = f"{layer}/kernel"
        own = weights[path].shape if path in weights else ()
        if len(own) != 4 or not all(own):
            raise ValueError(f"There is no kernel {path}, but {own}.")
        return own

    def ratio(layer: str) -> float:
        layer = f"block_group4_block1_{layer}"
        has_layer = f"{layer}/kernel" in weights
        return shape(layer)[-1] / filters[-1] if has_layer else 0.0

    depth = _infer_depth(weights)
    stem = shape("initial_conv")
    firsts = [shape(f"block_group{g}_block1_conv1") for g in "1234"]
    filters = tuple(own[-1] for own in (stem, *firsts))
    width = filters[0] / resnet.BASE_FILTERS[0]
    is_scaled = filters == tuple(n * width for n in resnet.BASE_FILTERS)
    is_resnet_d = "stem_conv1/kernel" in weights
    return _NOT_SHOWN | {
        "resnet_depth": depth,
        "width_multiplier": width if is_scaled else 1.0,
        "base_filters": resnet.BASE_FILTERS if is_scaled else filters,
        "stem": "imagenet" if is_resnet_d or stem[0] == 7 else "cifar",
        "preactivation": "final_bn/gamma" in weights,
        # Basic blocks have no selective kernels; any ratio means ResNet-D.
        "sk_ratio": ratio("sk_conv1") or (0.0625 if is_resnet_d else 0.0),
        "se_ratio": ratio("se_conv1"),
        "channels": shape("stem_conv1" if is_resnet_d else "initial_conv")[2],
    }


def _infer_depth(weights: Iterable[str]) -> int:
    """Returns the depth of the ResNet that has variables of these paths."""
    blocks: collections.Counter[str] = collections.Counter()
    for path in weights:
        group, block, _, _ = split_path(path)
        if group:
            blocks[group] = max(blocks[group], block + 1)
    counts = tuple(blocks[group] for group in "1234")
    is_bottleneck = "block_group1_block1_conv3/kernel" in weights
    for depth, kind in resnet.ARCHITECTURES.items():
        if kind == (counts, is_bottleneck):
            return depth
    raise ValueError(
        f"Groups of {counts} {'bottleneck' if is_bottleneck else 'basic'} "
        f"blocks are no ResNet of {', '.join(map(str, resnet.DEPTHS))}."
    )


def _listing(names: Iterable[str], tensors: Tensors) -> str:
    """Returns the names and shapes of the first tensors, one per line."""
    lines = [f"{name} {tensors[name].shape}" for name in sorted(names)]
    return _first(lines, f"and {len(lines) - _MAX_LISTED} more")


def _first(lines: list[str], more: str) -> str:
    last = [more] if len(lines) > _MAX_LISTED else []
    return "\n  ".join(["", *lines[:_MAX_LISTED], *last])
