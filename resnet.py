# SPDX-License-Identifier: Apache-2.0
"""Residual networks: depth, width, stems, SK, SE, padding, global BatchNorm."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras

from contrastive.config.choices import (
    BASE_FILTERS,
    DEPTHS,
    PADDINGS,
    SHORTCUTS,
    STEMS,
)
from contrastive.encoders.architecture import (
    ARCHITECTURES,
    BOTTLENECK_EXPANSION,
    scaled_filters,
    selective_kernel_filters,
    squeeze_filters,
)
from contrastive.encoders.batch_norm import (
    GlobalBatchNorm,
    hold_statistics as hold_statistics,
)

_GROUPS = tuple(f"block_group{index}" for index in range(1, 5))
ENDPOINTS = ("initial_conv", "initial_max_pool", *_GROUPS, "final_avg_pool")
_Tensor: TypeAlias = keras.KerasTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Builder:
    """Adds the convolutions, blocks and stem of a network to its graph.

    Arguments called `names` are layer names with a placeholder for the kind of the layer, such as
    `block_group2_block1_{}2`. Attributes are those of `resnet`, and `norm`, which creates a
    normalization layer.
    """

    norm: Callable[..., keras.layers.Layer]
    depth: int
    width_multiplier: float
    stem: str
    padding: str
    shortcuts: str
    preactivation: bool
    base_filters: Sequence[int]
    sk_ratio: float
    se_ratio: float
    zero_init_residual: bool
    differentiable_twice: bool

    def __post_init__(self) -> None:
        for name, value, known in (
            ("depth", self.depth, DEPTHS),
            ("stem", self.stem, STEMS),
            ("padding", self.padding, PADDINGS),
            ("shortcuts", self.shortcuts, SHORTCUTS),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {known}. Received: {value!r}.")
        sk_ratio, se_ratio = self.sk_ratio, self.se_ratio
        if self.width_multiplier <= 0 or min(sk_ratio, se_ratio) < 0:
            raise ValueError(
                "`width_multiplier` must be positive, `sk_ratio` and `se_ratio`"
                " not negative. Received: width_multiplier="
                f"{self.width_multiplier}, {sk_ratio=}, {se_ratio=}."
            )
        sizes = self.base_filters
        if len(sizes) != len(BASE_FILTERS) or min(sizes) < 1:
            raise ValueError(
                "`base_filters` must be five positive numbers, of the stem and "
                f"of the four groups. Received: {sizes}."
            )
        is_torch = self.padding == "torch"
        if self.preactivation and (sk_ratio or se_ratio or is_torch):
            raise ValueError(
                "`preactivation` goes without selective kernels, squeeze-and-"
                f"excitation and torch's padding. Received: {sk_ratio=}, "
                f"{se_ratio=}, padding={self.padding!r}."
            )

    @property
    def bottleneck(self) -> bool:
        return ARCHITECTURES[self.depth][1]

    def filters(self, base: float) -> int:
        return scaled_filters(base, self.width_multiplier)

    def out_filters(self, filters: int) -> int:
        return filters * (BOTTLENECK_EXPANSION if self.bottleneck else 1)

    def convs(self, filters: int, strides: int) -> list[tuple[int, int, int]]:
        """Lists filters, kernel size and stride of a block's convolutions."""
        if not self.bottleneck:
            return [(filters, 3, strides), (filters, 3, 1)]
        last = (self.out_filters(filters), 1, 1)
        return [(filters, 1, 1), (filters, 3, strides), last]

    def conv(
        self,
        x: _Tensor,
        filters: int,
        kernel_size: int,
        strides: int = 1,
        *,
        name: str,
        use_bias: bool = False,
    ) -> _Tensor:
        padding = "same"
        if self.padding != "same" and strides > 1 and kernel_size > 1:
            # "same" would pad even sizes at the right and bottom only.
            width = (kernel_size - 1) // 2
            x = keras.layers.ZeroPadding2D(width, name=f"{name}_pad")(x)
            padding = "valid"
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            strides,
            padding=padding,
            use_bias=use_bias,
            kernel_initializer=keras.initializers.VarianceScaling(),
            name=name,
        )(x)

    def conv_bn(self, x: _Tensor, *conv: int, names: str, **options: Any) -> _Tensor:
        x = self.conv(x, *conv, name=names.format("conv"))
        return self.bn_relu(x, names=names, **options)

    def bn_relu(self, x: _Tensor, *, names: str, relu: bool = True, gamma: str = "ones") -> _Tensor:
        x = self.norm(gamma_initializer=gamma, name=names.format("bn"))(x)
        return keras.layers.ReLU(name=names.format("relu"))(x) if relu else x

    def selective_kernel(self, x: _Tensor, filters: int, strides: int, *, names: str) -> _Tensor:
        """Mixes two convolutions (arXiv:1903.06586; SimCLR's resnet.py)."""
        x = self.conv_bn(x, 2 * filters, 3, strides, names=names.format("{}2"))
        first, second = keras.ops.split(x, 2, axis=-1)
        mix = keras.ops.mean(first + second, axis=(1, 2), keepdims=True)
        mix_filters = selective_kernel_filters(filters, self.sk_ratio)
        mix = self.conv_bn(mix, mix_filters, 1, names=names.format("sk_{}1"))
        mix = self.conv(mix, 2 * filters, 1, name=names.format("sk_conv2"))
        logit_first, logit_second = keras.ops.split(mix, 2, axis=-1)
        # The softmax over two is the logistic function of their difference.
        share = keras.ops.sigmoid(logit_first - logit_second)
        return first * share + second * (1.0 - share)

    def squeeze_excite(self, x: _Tensor, filters: int, *, names: str) -> _Tensor:
        """Scales channels by image (arXiv:1709.01507; SimCLR's resnet.py)."""
        conv = functools.partial(self.conv, kernel_size=1, use_bias=True)
        inner = squeeze_filters(filters, self.se_ratio)
        scale = keras.ops.mean(x, axis=(1, 2), keepdims=True)
        scale = conv(scale, inner, name=names.format("se_conv1"))
        scale = keras.ops.relu(scale)
        scale = conv(scale, x.shape[-1], name=names.format("se_conv2"))
        return x * keras.ops.sigmoid(scale)

    def shortcut(self, x: _Tensor, filters: int, strides: int, *, names: str) -> _Tensor:
        """Projects a block's input; ResNet-D (arXiv:1812.01187) averages it."""
        if self.sk_ratio > 0:
            padding, name = "same", names.format("shortcut_pad")
            if self.padding != "same" and strides > 1:
                x = keras.layers.ZeroPadding2D(((0, 1), (0, 1)), name=name)(x)
                padding = "valid"
            x = keras.layers.AveragePooling2D(
                2, strides, padding=padding, name=names.format("shortcut_pool")
            )(x)
            strides = 1
        names = names.format("shortcut_{}")
        return self.conv_bn(x, filters, 1, strides, names=names, relu=False)

    def block(self, x: _Tensor, filters: int, strides: int, project: bool, names: str) -> _Tensor:
        """Adds a residual block: `relu(shortcut(x) + residual(x))`."""
        out_filters = self.out_filters(filters)
        shortcut = x
        if project:
            shortcut = self.shortcut(x, out_filters, strides, names=names)
        *convs, last = self.convs(filters, strides)
        for layer, conv in enumerate(convs, start=1):
            if self.bottleneck and layer == 2 and self.sk_ratio > 0:
                x = self.selective_kernel(x, filters, strides, names=names)
            else:
                x = self.conv_bn(x, *conv, names=names.format(f"{{}}{layer}"))
        name = names.format(f"{{}}{len(convs) + 1}")
        gamma = "zeros" if self.zero_init_residual else "ones"
        x = self.conv_bn(x, *last, names=name, relu=False, gamma=gamma)
        if self.se_ratio > 0:
            x = self.squeeze_excite(x, filters, names=names)
        x = keras.layers.Add(name=names.format("add"))([shortcut, x])
        return keras.layers.ReLU(name=names.format("relu"))(x)

    def preactivation_block(
        self, x: _Tensor, filters: int, strides: int, project: bool, names: str
    ) -> _Tensor:
        """Adds a block of version 2 (arXiv:1603.05027; haiku's `BlockV2`)."""
        shortcut = x
        for layer, conv in enumerate(self.convs(filters, strides), start=1):
            x = self.bn_relu(x, names=names.format(f"{{}}{layer}"))
            if layer == 1 and project:
                size, name = (1, strides), names.format("shortcut_conv")
                out_filters = self.out_filters(filters)
                shortcut = self.conv(x, out_filters, *size, name=name)
            x = self.conv(x, *conv, name=names.format(f"conv{layer}"))
        return keras.layers.Add(name=names.format("add"))([shortcut, x])

    def group(self, x: _Tensor, index: int) -> _Tensor:
        """Adds group `index`, 1 to 4; groups 2 to 4 halve the image size."""
        name = f"block_group{index}"
        filters = self.filters(self.base_filters[index])
        for block in range(1, ARCHITECTURES[self.depth][0][index - 1] + 1):
            strides = 2 if index > 1 and block == 1 else 1
            changes = strides > 1 or x.shape[-1] != self.out_filters(filters)
            project = block == 1 and (self.shortcuts == "always" or changes)
            add = self.preactivation_block if self.preactivation else self.block
            x = add(x, filters, strides, project, f"{name}_block{block}_{{}}")
        return keras.layers.Identity(name=name)(x)

    def add_stem(self, x: _Tensor) -> _Tensor:
        """Adds the layers before the first block."""
        base = self.base_filters[0]
        conv = (3, 1) if self.stem == "cifar" else (7, 2)  # size, stride
        if self.stem == "imagenet" and self.sk_ratio > 0:
            # ResNet-D, arXiv:1812.01187
            half, conv = self.filters(base / 2), (3, 1)
            x = self.conv_bn(x, half, 3, 2, names="stem_{}1")
            x = self.conv_bn(x, half, 3, names="stem_{}2")
        x = self.conv(x, self.filters(base), *conv, name="initial_conv")
        if not self.preactivation:
            x = self.bn_relu(x, names="initial_{}")
        if self.stem == "cifar":
            return keras.layers.Identity(name="initial_max_pool")(x)
        # With "fixed" convolutions, SimCLR pads its max-pool like "same".
        padding, name = "same", "initial_max_pool"
        if self.padding == "torch":
            # The inputs come from a ReLU, so zeros never exceed the maximum.
            x = keras.layers.ZeroPadding2D(1, name=f"{name}_pad")(x)
            padding = "valid"
        # XLA cannot compute second derivatives of max-pooling in bfloat16.
        dtype = "float32" if self.differentiable_twice else None
        return keras.layers.MaxPooling2D(3, 2, padding, dtype=dtype, name=name)(x)


def resnet(
    depth: int,
    *,
    width_multiplier: float = 1.0,
    stem: str = "imagenet",
    padding: str = "fixed",
    shortcuts: str = "always",
    preactivation: bool = False,
    base_filters: Sequence[int] = BASE_FILTERS,
    sk_ratio: float = 0.0,
    se_ratio: float = 0.0,
    zero_init_residual: bool = True,
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    channels: int = 3,
    differentiable_twice: bool = False,
    name: str = "encoder",
) -> keras.Model:
    """Builds a residual network without its classifier.

    Blocks have the stride on the 3x3 convolution and, by default, ReLU after the addition (version
    1).

    Published weights are mapped onto the names of layers. The stem has `initial_{conv,bn}`, and
    with ResNet-D `stem_{conv,bn}{1,2}` before these. Block b of group g, both counted from 1, has
    `block_group{g}_block{b}_{layer}` with the layers `{conv,bn}{1,2,3}`, `shortcut_{conv,bn}`,
    `sk_{conv1,bn1,conv2}` and `se_{conv1,conv2}`. With pre-activation there is a `final_bn`, but no
    `initial_bn` or `shortcut_bn`.

    Source: He et al., arXiv:1512.03385; google-research/simclr@383d414, tf2/resnet.py (with
    `padding="fixed"`), DeepMind's haiku networks of BYOL and ReLICv2 (with `padding="same"`), and
    torchvision's models/resnet.py (with `padding="torch"` and `shortcuts="needed"`). Differs from
    SimCLR's: depth 10, fractional widths, and no DropBlock.

    Args:
        depth: 10, 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
        width_multiplier: factor of every number of filters, > 0. The product is rounded and at
            least 8; a bottleneck outputs 4 times as many.
        stem: "imagenet" (7x7, stride 2, then max-pool) or "cifar" (3x3).
        padding: padding of strided convolutions and of the max-pool, which changes features.
            "torch" pads both sides equally, "same" even sizes at the right and bottom, and "fixed"
            convolutions like the first and the max-pool like the second.
        shortcuts: whether the first block of a group projects its shortcut "always", or only if
            "needed" because the shape changes.
        preactivation: whether BatchNorm and ReLU precede convolutions (version 2).
            `zero_init_residual` then has no effect. Not supported with `sk_ratio`, `se_ratio` or
            `padding="torch"`.
        base_filters: filters of the stem and of the four groups.
        sk_ratio: if > 0 (SimCLR v2: 0.0625), bottlenecks have selective kernels, mixed by a layer
            with `sk_ratio` times their filters, and networks of any depth get ResNet-D's shortcuts
            and ImageNet stem.
        se_ratio: if > 0, blocks end in squeeze-and-excitation by a layer with `se_ratio` times
            their filters.
        zero_init_residual: whether the last `gamma` of each residual branch starts at 0, so that
            blocks start as the identity.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_momentum: momentum of the moving statistics, in [0, 1].
        channels: number of channels of the images.
        differentiable_twice: whether XLA can compile gradients of gradients, also in bfloat16.
        name: name of the model.

    Returns:
        A functional model from float32 images `[N, H, W, channels]`, of any height and width, to
        float32 features `[N, D]`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    builder = _Builder(
        norm=functools.partial(
            GlobalBatchNorm,
            momentum=batch_norm_momentum,
            synchronized=global_bn,
        ),
        depth=depth,
        width_multiplier=width_multiplier,
        stem=stem,
        padding=padding,
        shortcuts=shortcuts,
        preactivation=preactivation,
        base_filters=base_filters,
        sk_ratio=sk_ratio,
        se_ratio=se_ratio,
        zero_init_residual=zero_init_residual,
        differentiable_twice=differentiable_twice,
    )
    images = keras.Input((None, None, channels), name=f"{name}_images")
    x = builder.add_stem(images)
    for index in range(1, 5):
        x = builder.group(x, index)
    if preactivation:
        x = builder.bn_relu(x, names="final_{}")
    # Losses and probes need float32 features under mixed precision, too.
    features = keras.layers.GlobalAveragePooling2D(name="final_avg_pool", dtype="float32")(x)
    return keras.Model(images, features, name=name)


def endpoints(model: keras.Model) -> dict[str, keras.KerasTensor]:
    """Finds the symbolic outputs of the parts of a `resnet`, by `ENDPOINTS`.

    `initial_conv` is the stem's last convolution before BatchNorm, and `initial_max_pool` the input
    of the first block, even without pooling.
    """
    return {name: model.get_layer(name).output for name in ENDPOINTS}


def freeze(model: keras.Model, after_block: int) -> None:
    """Freezes the first parts of an encoder and makes the rest trainable.

    Neither the weights nor the BatchNorm statistics of the frozen part change, even with
    `training=True`. A `tf.function` traced before does not notice it. -1 freezes nothing, 0 the
    stem, k in 1..4 the stem and the block groups 1..k; 4 is the whole encoder. -1 and 4 apply to
    any encoder.

    Raises:
        ValueError: if `after_block` is not in -1..4.
    """
    if after_block not in range(-1, 5):
        raise ValueError(f"`after_block` must be in -1..4. Received: {after_block!r}.")
    for layer in model.layers:
        group = re.match(r"block_group(\d)", layer.name)
        last = 4 if layer.name == "final_bn" else 0
        layer.trainable = (int(group[1]) if group else last) > after_block
