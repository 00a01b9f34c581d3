# SPDX-License-Identifier: Apache-2.0
"""Sizes of networks and optimizers, computed without TensorFlow."""

from collections.abc import Sequence
from typing import NamedTuple

from contrastive.encoders import architecture as encoders
from contrastive.encoders.architecture import Architecture

_SLOTS = {"lars": 1, "momentum": 1, "adam": 2}  # of each trained number
# Units and sizes of the layers of a head; the first layer is its input.
_Head = tuple[list[int], list["Sizes"]]


class Sizes(NamedTuple):
    """Counts of float32 numbers in trained variables and moving statistics."""

    trainable: int = 0
    fixed: int = 0


def network_sizes(architecture: Architecture) -> dict[str, Sizes] | None:
    """Computes the sizes of the networks that `model.build_networks` builds.

    Returns:
        Sizes by network, named as in `model.Networks.models`, where a target network counts like
        its online network; None if the size of the encoder is only known once it has been built.
    """
    if architecture.encoder != "resnet":
        return None
    features, parts = _resnet(architecture)
    widths, layers = _projection(architecture, features)
    online = {"encoder": _sum(parts), "projection": _sum(layers)}
    sizes = dict(online)
    if architecture.predictor:
        layers = _mlp(architecture, widths[-1], widths[-1])[1]
        sizes["prediction"] = _sum(layers)
    if architecture.target_network:
        sizes |= {f"target_{name}": size for name, size in online.items()}
    if architecture.num_classes:
        inputs = widths[architecture.ft_proj_selector]
        sizes["classifier"] = Sizes((inputs + 1) * architecture.num_classes)
    return sizes


def trained_numbers(
    architecture: Architecture,
    *,
    finetune: bool = False,
    fine_tune_after_block: int = -1,
) -> tuple[int, int] | None:
    """Computes how many numbers each of the two optimizers trains.

    With `finetune`, a classifier is trained, and the encoder is frozen as by `resnet.freeze`;
    otherwise the encoder is pretrained. Returns the counts of the networks and of the classifier,
    or None as `network_sizes` does.
    """
    if (sizes := network_sizes(architecture)) is None:
        return None
    features, parts = _resnet(architecture)
    count = _sum(parts[fine_tune_after_block + 1 :]).trainable
    if not finetune:
        count += sizes["projection"].trainable
        count += sizes.get("prediction", Sizes()).trainable
    elif fine_tune_after_block < 4:
        layers = _projection(architecture, features)[1]
        end = architecture.ft_proj_selector % len(layers) + 1
        count += _sum(layers[:end]).trainable
    return count, sizes.get("classifier", Sizes()).trainable


def optimizer_numbers(optimizer: str, trained: int, *, momentum: float = 0.9) -> int:
    """Counts the float32 numbers that "lars", "momentum" or "adam" keeps.

    "momentum" keeps nothing of the numbers that it trains if `momentum` is 0.
    """
    slots = _SLOTS[optimizer] if optimizer != "momentum" or momentum else 0
    return 2 + slots * trained  # the int64 step is as large as two float32


def embedding_dim(architecture: Architecture) -> int:
    """Computes the size of an embedding of a ResNet with its heads."""
    return _projection(architecture, _resnet(architecture)[0])[0][-1]


def _sum(sizes: Sequence[Sizes]) -> Sizes:
    return Sizes(sum(s.trainable for s in sizes), sum(s.fixed for s in sizes))


def _conv(kernel: int, inputs: int, outputs: int, norm: int = 0) -> Sizes:
    """Computes the size of a convolution and a BatchNorm of `norm` channels."""
    return Sizes(kernel**2 * inputs * outputs + 2 * norm, 2 * norm)


def _resnet(a: Architecture) -> tuple[int, list[Sizes]]:
    """Computes the number of features, and sizes of the stem and the groups."""
    blocks = encoders.ARCHITECTURES[a.resnet_depth][0]
    channels = encoders.scaled_filters(a.base_filters[0], a.width_multiplier)
    parts = [_stem(a, channels)]
    for group, count in enumerate(blocks, start=1):
        parts.append(Sizes())
        for block in range(count):
            channels, layers = _block(a, channels, group, is_first=block == 0)
            parts[-1] = _sum([parts[-1], *layers])
    if a.preactivation:  # the last BatchNorm
        parts[-1] = _sum([parts[-1], Sizes(2 * channels, 2 * channels)])
    return channels, parts


def _stem(a: Architecture, outputs: int) -> Sizes:
    norm = 0 if a.preactivation else outputs
    if a.stem == "cifar" or a.sk_ratio == 0:
        return _conv(3 if a.stem == "cifar" else 7, a.channels, outputs, norm)
    half = encoders.scaled_filters(a.base_filters[0] / 2, a.width_multiplier)
    convs = (a.channels, half, half), (half, half, half), (half, outputs, norm)
    return _sum([_conv(3, *conv) for conv in convs])


def _block(a: Architecture, inputs: int, group: int, *, is_first: bool) -> tuple[int, list[Sizes]]:
    """Computes the output channels and the sizes of the layers of a block."""
    bottleneck = encoders.ARCHITECTURES[a.resnet_depth][1]
    f = encoders.scaled_filters(a.base_filters[group], a.width_multiplier)
    outputs = f * encoders.BOTTLENECK_EXPANSION if bottleneck else f
    basic = [(3, inputs, f), (3, f, outputs)]
    convs = [(1, inputs, f), (3, f, f), (1, f, outputs)] if bottleneck else basic
    layers = []
    if bottleneck and a.sk_ratio > 0:
        mix = encoders.selective_kernel_filters(f, a.sk_ratio)
        convs[1] = (3, f, 2 * f)
        layers = [_conv(1, f, mix, mix), _conv(1, mix, 2 * f)]
    if is_first and (a.shortcuts == "always" or group > 1 or inputs != outputs):
        norm = 0 if a.preactivation else outputs
        layers.append(_conv(1, inputs, outputs, norm))
    if a.se_ratio > 0:
        squeezed = encoders.squeeze_filters(f, a.se_ratio)
        layers.append(Sizes((2 * outputs + 1) * squeezed + outputs))
    norms = 1 if a.preactivation else 2  # BatchNorm of the inputs or outputs
    layers += [_conv(*conv, norm=conv[norms]) for conv in convs]
    return outputs, layers


def _projection(a: Architecture, features: int) -> _Head:
    if a.proj_head_mode == "mlp":
        return _mlp(a, features, a.proj_out_dim)
    if a.proj_head_mode == "none":
        return [features] * 2, [Sizes()] * 2
    hidden = a.num_proj_layers - 1 if a.proj_head_mode == "nonlinear" else 0
    return _head(features, [(features, 2)] * hidden + [(a.proj_out_dim, 1)])


def _mlp(a: Architecture, features: int, outputs: int) -> _Head:
    hidden, last = {"none": (0, 0), "hidden": (3, 0), "all": (2, 2)}[a.proj_bn]
    layers = [(units, hidden) for units in a.proj_hidden_dim]
    return _head(features, [*layers, (outputs, last)])


def _head(features: int, layers: Sequence[tuple[int, int]]) -> _Head:
    """Computes a head; a layer has units, and 0 to 3 of bias, gamma, beta."""
    widths, sizes = [features], [Sizes()]
    for units, vectors in layers:
        trainable = (widths[-1] + vectors) * units
        sizes.append(Sizes(trainable, 2 * units if vectors else 0))
        widths.append(units)
    return widths, sizes
