# SPDX-License-Identifier: Apache-2.0
"""Families of published encoders: a file each, listed in `published.FAMILIES`.

Each file has a function `find(tensors, target)` that returns the encoder of its family among the
tensors of a file, or None if there is none. The paths of our variables are such as
`block_group1_block2_conv3/kernel`.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]

_BN_WEIGHTS = ("gamma", "beta", "moving_mean", "moving_variance")
_PATH = re.compile(r"(?:block_group(\d)_block(\d+)_)?(\w+)/(\w+)")
_MOST_BLOCKS = 36  # of a group
# Tensors of an encoder that have no use here: the step counters of BatchNorm, and haiku's averages
# before they are corrected by the counters.
_UNUSED = re.compile(r".*(num_batches_tracked|_ema/hidden|_ema/counter)")
_HEADS = re.compile(r"(fc|head|classifier|logits|projector|projection)[./].+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The tensors of an encoder in a file.

    Attributes:
        source: the program whose names the tensors have.
        weights: arrays by the paths of our variables, in their layout.
        unplaced: names of tensors of the encoder that have no variable here.
        unread: names of the tensors of other networks.
        conventions: fields of `model.Architecture` that no tensor shows.
    """

    source: str
    weights: dict[str, np.ndarray]
    unplaced: list[str]
    unread: list[str]
    conventions: dict[str, Any]


def split_path(path: str) -> tuple[str | None, int, str, str]:
    """Splits a variable's path into group, block (from 0), layer and weight.

    Raises:
        ValueError: if it is not a path of a ResNet.
    """
    if not (match := _PATH.fullmatch(path)):
        raise ValueError(f"Not a variable of a ResNet: {path!r}.")
    group, block, layer, weight = match.groups()
    return group, int(block or 1) - 1, layer, weight


def paths_by_name(name: Callable[[str], str], layers: Iterable[str]) -> dict[str, str]:
    """Returns our path for each name that a function of paths can give."""
    blocks = itertools.product((1, 2, 3, 4), range(1, _MOST_BLOCKS + 1))
    prefixes = [f"block_group{group}_block{block}_" for group, block in blocks]
    return {
        name(path): path
        for layer in layers
        for prefix in ([""] if re.match("initial|final", layer) else prefixes)
        for weight in (("kernel",) if "conv" in layer else _BN_WEIGHTS)
        for path in [f"{prefix}{layer}/{weight}"]
    }


def sort_tensors(
    tensors: Tensors,
    prefixes: tuple[str, ...],
    path_of: Callable[[str], str | None],
    layout: Callable[[str, np.ndarray], np.ndarray],
    **facts: Any,
) -> Found:
    """Finds our variable for each tensor.

    Args:
        tensors: by their names in a file, in its layout.
        prefixes: the names of the encoder's tensors start with one of them.
        path_of: gives our path for the rest of such a name, or None.
        layout: converts the tensor of one of our paths to our layout.
        **facts: the fields `source` and `conventions` of the result.
    """
    weights, unplaced, unread = {}, [], []
    for name, tensor in tensors.items():
        prefix = next(filter(name.startswith, prefixes), None)
        local = name.removeprefix(prefix or "")
        path = None if prefix is None else path_of(local)
        if path and path not in weights:
            weights[path] = layout(path, tensor)
        elif prefix is None or _HEADS.fullmatch(local):
            unread.append(name)
        elif not _UNUSED.fullmatch(local):
            unplaced.append(name)
    return Found(weights=weights, unplaced=unplaced, unread=unread, **facts)


def only(found: list[str], encoders: Iterable[str], wanted: str) -> str:
    """Returns the only element of `found`, or raises ValueError."""
    if len(found) != 1:
        raise ValueError(
            f"The file has {len(found)} {wanted} networks that may be meant, "
            f"of the encoders {', '.join(map(repr, sorted(encoders)))}."
        )
    return found[0]
