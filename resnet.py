# SPDX-License-Identifier: Apache-2.0
"""Residual networks: depth, width, stems, SK, SE, padding, global BatchNorm."""

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

BATCH_NORM_EPSILON = 1e-5  # SimCLR, BYOL and torchvision; Keras has 1e-3.
STEMS = ("imagenet", "cifar")
PADDINGS = ("fixed", "same", "torch")
SHORTCUTS = ("always", "needed")
BASE_FILTERS = (64, 64, 128, 256, 512)  # of the stem and the four groups
_holds_statistics = contextvars.ContextVar("holds_statistics", default=False)
ENDPOINTS = (
    "initial_conv",
    "initial_max_pool",
    "block_group1",
    "block_group2",
    "block_group3",
    "block_group4",
    "final_avg_pool",
)

_MIN_FILTERS = 8
_MIN_SK_FILTERS = 32
# depth: (blocks in each of the four groups, whether they are bottlenecks)
ARCHITECTURES = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
DEPTHS = tuple(ARCHITECTURES)


@keras.saving.register_keras_serializable(package="resnet")
class GlobalBatchNorm(keras.layers.Layer):
    """Batch normalization over the batches of all replicas together.

    In training, `y = (x - mean) / sqrt(variance + epsilon) * gamma + beta`
    with the mean and the biased variance of every axis but the last, over all
    replicas, whose batches must have equal sizes; and `moving = momentum *
    moving + (1 - momentum) * batch`. Outside training, or with
    `layer.trainable = False`, the moving statistics take the place of the
    batch's and stay as they are. Replicas always hold the same moving
    statistics.

    Statistics and weights are float32 under every dtype policy. It accepts
    `[N, C]` and `[N, H, W, C]` and returns the policy's compute dtype.

    Source: Ioffe and Szegedy, arXiv:1502.03167; the reference is SimCLR's use
    of Keras 2's `SyncBatchNormalization`. Differs from it in cost: one
    all-reduce a layer in place of two, and the fused kernel on one replica.

    Args:
        momentum: weight of the old value in the moving statistics, in [0, 1].
        epsilon: added to the variance, > 0.
        center: whether there is an offset, `beta`.
        scale: whether there is a factor, `gamma`.
        gamma_initializer: initializer of `gamma`.
        synchronized: if False, each replica normalizes by the statistics of
            its own batch, and the moving statistics follow their average.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.
    """

    def __init__(
        self,
        *,
        momentum: float = 0.9,
        epsilon: float = BATCH_NORM_EPSILON,
        center: bool = True,
        scale: bool = True,
        gamma_initializer: str | keras.initializers.Initializer = "ones",
        synchronized: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.synchronized = synchronized

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights; raises `ValueError` for a rank not 2 or 4."""
        if len(input_shape) not in (2, 4):
            raise ValueError(
                "Expected inputs [N, C] or [N, H, W, C]. "
                f"Received: shape {input_shape}."
            )
        add = functools.partial(
            self.add_weight, shape=input_shape[-1:], autocast=False
        )
        if self.scale:
            self.gamma = add(name="gamma", initializer=self.gamma_initializer)
        if self.center:
            self.beta = add(name="beta", initializer="zeros")
        self.moving_mean = add(
            name="moving_mean", initializer="zeros", trainable=False
        )
        self.moving_variance = add(
            name="moving_variance", initializer="ones", trainable=False
        )

    def call(
        self, inputs: tf.Tensor, training: bool | None = None
    ) -> tf.Tensor:
        """Returns the normalized inputs, in the compute dtype."""
        if not (training and self.trainable):
            return self._fused_kernel(inputs, training=False)[0]
        # Variances are computed as E[x^2] - E[x]^2 below and by XLA, which is
        # noise, even negative, where the mean is large. So the moving mean, the
        # same on all replicas, goes first. It costs 3 % of a ResNet-18 step.
        shift = tf.cast(self.moving_mean, inputs.dtype)
        inputs = inputs - shift
        # None in a cross-replica context, where there is one batch to speak of.
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            outputs, statistics = self._normalize_locally(inputs)
        elif self.synchronized:
            outputs, statistics = self._normalize_globally(inputs, replica)
        else:
            outputs, statistics = self._normalize_locally(inputs)
            statistics = replica.all_reduce(
                tf.distribute.ReduceOp.MEAN, tf.stop_gradient(statistics)
            )
        if not _holds_statistics.get():
            mean, variance = tf.unstack(statistics)
            self._move(self.moving_mean, mean + tf.cast(shift, tf.float32))
            self._move(self.moving_variance, variance)
        return outputs

    def _normalize_locally(
        self, inputs: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the outputs and `[2, C]`: mean, variance of this replica."""
        outputs, mean, variance = self._fused_kernel(inputs, training=True)
        # The kernel normalizes by the biased variance but returns the unbiased
        # one; the reference's moving variance is biased.
        count = tf.cast(tf.size(inputs) // tf.size(mean), tf.float32)
        variance *= tf.maximum(count - 1.0, 1.0) / count
        return outputs, tf.stack([mean, variance])

    def _normalize_globally(
        self, inputs: tf.Tensor, replica: tf.distribute.ReplicaContext
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the outputs and `[2, C]`: mean, variance of all replicas."""
        # E[x^2] - E[x]^2 needs one exchange, where the mean first and then the
        # deviations from it would need two.
        inputs = tf.cast(inputs, tf.float32)
        axes = list(range(inputs.shape.rank - 1))
        moments = tf.stack(
            [
                tf.reduce_mean(inputs, axes),
                tf.reduce_mean(tf.square(inputs), axes),
            ]
        )
        mean, mean_square = tf.unstack(
            replica.all_reduce(tf.distribute.ReduceOp.MEAN, moments)
        )
        variance = tf.maximum(mean_square - tf.square(mean), 0.0)
        gamma, beta = self._affine()
        factor = gamma * tf.math.rsqrt(variance + self.epsilon)
        outputs = inputs * factor + (beta - mean * factor)
        return (
            tf.cast(outputs, self.compute_dtype),
            tf.stack([mean, variance]),
        )

    def _fused_kernel(
        self, inputs: tf.Tensor, *, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the outputs and the mean and unbiased variance in use.

        Measured forward and backward on 2 CPU cores, float32 [128, 32, 32, 64]:
        12 ms, where the elementary operations take 31 ms.
        """
        gamma, beta = self._affine()
        is_flat = inputs.shape.rank == 2
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs[:, tf.newaxis, tf.newaxis] if is_flat else inputs,
            scale=gamma,
            offset=beta,
            mean=[] if training else self.moving_mean,
            variance=[] if training else self.moving_variance,
            epsilon=self.epsilon,
            is_training=training,
        )
        return outputs[:, 0, 0] if is_flat else outputs, mean, variance

    def _affine(self) -> tuple[Any, Any]:
        """Returns gamma and beta, `[C]` each."""
        return (
            self.gamma if self.scale else tf.ones_like(self.moving_mean),
            self.beta if self.center else tf.zeros_like(self.moving_mean),
        )

    def _move(self, moving: keras.Variable, batch: tf.Tensor) -> None:
        moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return super().get_config() | {
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "gamma_initializer": keras.initializers.serialize(
                self.gamma_initializer
            ),
            "synchronized": self.synchronized,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Builder:
    """Adds convolutions, blocks and stems of one kind to a functional graph.

    `names` is a layer name with a gap for the kind of layer, such as
    `block_group2_block1_{}2`.

    Attributes:
        norm: makes a normalization layer from `name` and `gamma_initializer`.
        padding: one of `PADDINGS`.
        shortcuts: one of `SHORTCUTS`.
        preactivation: see `resnet`.
        width_multiplier: factor of all numbers of filters.
        bottleneck: whether blocks are bottlenecks (1x1, 3x3, 1x1).
        sk_ratio: see `resnet`.
        se_ratio: see `resnet`.
        zero_init_residual: see `resnet`.
        differentiable_twice: see `resnet`.
    """

    norm: Callable[..., keras.layers.Layer]
    padding: str
    shortcuts: str
    preactivation: bool
    width_multiplier: float
    bottleneck: bool
    sk_ratio: float
    se_ratio: float
    zero_init_residual: bool
    differentiable_twice: bool

    def filters(self, base: float) -> int:
        return max(_MIN_FILTERS, round(base * self.width_multiplier))

    def out_filters(self, filters: int) -> int:
        return 4 * filters if self.bottleneck else filters

    def conv(
        self,
        x: keras.KerasTensor,
        filters: int,
        kernel_size: int,
        strides: int = 1,
        *,
        name: str,
        use_bias: bool = False,
    ) -> keras.KerasTensor:
        padding = "same"
        if self.padding != "same" and strides > 1 and kernel_size > 1:
            # Not "same" for even sizes, where that pads right and bottom only.
            x = keras.layers.ZeroPadding2D(
                (kernel_size - 1) // 2, name=f"{name}_pad"
            )(x)
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

    def conv_bn(
        self,
        x: keras.KerasTensor,
        filters: int,
        kernel_size: int,
        strides: int = 1,
        *,
        names: str,
        relu: bool = True,
        gamma_initializer: str = "ones",
    ) -> keras.KerasTensor:
        x = self.conv(
            x, filters, kernel_size, strides, name=names.format("conv")
        )
        return self.bn_relu(
            x, names=names, relu=relu, gamma_initializer=gamma_initializer
        )

    def bn_relu(
        self,
        x: keras.KerasTensor,
        *,
        names: str,
        relu: bool = True,
        gamma_initializer: str = "ones",
    ) -> keras.KerasTensor:
        x = self.norm(
            gamma_initializer=gamma_initializer, name=names.format("bn")
        )(x)
        return keras.layers.ReLU(name=names.format("relu"))(x) if relu else x

    def selective_kernel(
        self, x: keras.KerasTensor, filters: int, strides: int, *, names: str
    ) -> keras.KerasTensor:
        """Mixes two 3x3 convolutions by weights that depend on the image.

        Source: Li et al., arXiv:1903.06586, as in SimCLR's tf2/resnet.py.
        """
        x = self.conv_bn(x, 2 * filters, 3, strides, names=names.format("{}2"))
        first, second = keras.ops.split(x, 2, axis=-1)
        mix = keras.ops.mean(first + second, axis=(1, 2), keepdims=True)
        mix_filters = max(int(filters * self.sk_ratio), _MIN_SK_FILTERS)
        mix = self.conv_bn(mix, mix_filters, 1, names=names.format("sk_{}1"))
        mix = self.conv(mix, 2 * filters, 1, name=names.format("sk_conv2"))
        logit_first, logit_second = keras.ops.split(mix, 2, axis=-1)
        # The softmax over two is the logistic function of their difference.
        share = keras.ops.sigmoid(logit_first - logit_second)
        return first * share + second * (1.0 - share)

    def squeeze_excite(
        self, x: keras.KerasTensor, filters: int, *, names: str
    ) -> keras.KerasTensor:
        """Scales the channels by factors that depend on the image.

        Source: Hu et al., arXiv:1709.01507, as in SimCLR's tf2/resnet.py.
        """
        conv = functools.partial(self.conv, kernel_size=1, use_bias=True)
        squeezed = keras.ops.mean(x, axis=(1, 2), keepdims=True)
        squeezed = keras.ops.relu(
            conv(
                squeezed,
                max(1, int(filters * self.se_ratio)),
                name=names.format("se_conv1"),
            )
        )
        excited = conv(squeezed, x.shape[-1], name=names.format("se_conv2"))
        return x * keras.ops.sigmoid(excited)

    def shortcut(
        self, x: keras.KerasTensor, filters: int, strides: int, *, names: str
    ) -> keras.KerasTensor:
        """Projects the block's input; after a 2x2 mean, if ResNet-D.

        Source: He et al., arXiv:1812.01187, as in SimCLR's tf2/resnet.py.
        """
        if self.sk_ratio > 0:
            padding = "same"
            if self.padding != "same" and strides > 1:
                x = keras.layers.ZeroPadding2D(
                    ((0, 1), (0, 1)), name=names.format("shortcut_pad")
                )(x)
                padding = "valid"
            x = keras.layers.AveragePooling2D(
                2, strides, padding=padding, name=names.format("shortcut_pool")
            )(x)
            strides = 1
        return self.conv_bn(
            x,
            filters,
            1,
            strides,
            names=names.format("shortcut_{}"),
            relu=False,
        )

    def block(
        self,
        x: keras.KerasTensor,
        filters: int,
        strides: int,
        *,
        project: bool,
        names: str,
    ) -> keras.KerasTensor:
        """Adds a residual block: `relu(shortcut(x) + residual(x))`."""
        out_filters = self.out_filters(filters)
        shortcut = x
        if project:
            shortcut = self.shortcut(x, out_filters, strides, names=names)
        if self.bottleneck:
            x = self.conv_bn(x, filters, 1, names=names.format("{}1"))
            if self.sk_ratio > 0:
                x = self.selective_kernel(x, filters, strides, names=names)
            else:
                x = self.conv_bn(
                    x, filters, 3, strides, names=names.format("{}2")
                )
        else:
            x = self.conv_bn(x, filters, 3, strides, names=names.format("{}1"))
        x = self.conv_bn(
            x,
            out_filters,
            1 if self.bottleneck else 3,
            names=names.format("{}3" if self.bottleneck else "{}2"),
            relu=False,
            gamma_initializer="zeros" if self.zero_init_residual else "ones",
        )
        if self.se_ratio > 0:
            x = self.squeeze_excite(x, filters, names=names)
        x = keras.layers.Add(name=names.format("add"))([shortcut, x])
        return keras.layers.ReLU(name=names.format("relu"))(x)

    def preactivation_block(
        self,
        x: keras.KerasTensor,
        filters: int,
        strides: int,
        *,
        project: bool,
        names: str,
    ) -> keras.KerasTensor:
        """Adds a residual block whose convolutions follow their BatchNorm.

        Source: He et al., arXiv:1603.05027, as in haiku's `BlockV2`.
        """
        out_filters = self.out_filters(filters)
        shortcut = x
        convs = (
            [(filters, 1, 1), (filters, 3, strides), (out_filters, 1, 1)]
            if self.bottleneck
            else [(filters, 3, strides), (filters, 3, 1)]
        )
        for layer, conv in enumerate(convs, start=1):
            x = self.bn_relu(x, names=names.format(f"{{}}{layer}"))
            if layer == 1 and project:
                shortcut = self.conv(
                    x, out_filters, 1, strides,
                    name=names.format("shortcut_conv"),
                )  # fmt: skip
            x = self.conv(x, *conv, name=names.format(f"conv{layer}"))
        return keras.layers.Add(name=names.format("add"))([shortcut, x])

    def group(
        self, x: keras.KerasTensor, base_filters: int, blocks: int, index: int
    ) -> keras.KerasTensor:
        """Adds group `index`, 1 to 4; all but the first halve the size."""
        name = f"block_group{index}"
        filters = self.filters(base_filters)
        add_block = (
            self.preactivation_block if self.preactivation else self.block
        )
        for block in range(1, blocks + 1):
            strides = 2 if index > 1 and block == 1 else 1
            changes = strides > 1 or x.shape[-1] != self.out_filters(filters)
            x = add_block(
                x,
                filters,
                strides,
                project=block == 1 and (self.shortcuts == "always" or changes),
                names=f"{name}_block{block}_{{}}",
            )
        return keras.layers.Identity(name=name)(x)

    def stem(
        self, x: keras.KerasTensor, base_filters: int, kind: str
    ) -> keras.KerasTensor:
        """Adds all layers before the first block."""
        filters = self.filters(base_filters)
        kernel_size, strides = (3, 1) if kind == "cifar" else (7, 2)
        if kind == "imagenet" and self.sk_ratio > 0:
            # ResNet-D, arXiv:1812.01187
            half = self.filters(base_filters / 2)
            x = self.conv_bn(x, half, 3, 2, names="stem_{}1")
            x = self.conv_bn(x, half, 3, names="stem_{}2")
            kernel_size, strides = 3, 1
        x = self.conv(x, filters, kernel_size, strides, name="initial_conv")
        if not self.preactivation:
            x = self.bn_relu(x, names="initial_{}")
        if kind == "cifar":
            return keras.layers.Identity(name="initial_max_pool")(x)
        # "same" even where strided convolutions pad by hand, as SimCLR does.
        padding = "same"
        if self.padding == "torch":
            # Zeros are never the largest: what is pooled comes from a ReLU.
            x = keras.layers.ZeroPadding2D(1, name="initial_max_pool_pad")(x)
            padding = "valid"
        # XLA has no second gradient of max-pooling in half precision.
        dtype = "float32" if self.differentiable_twice else None
        return keras.layers.MaxPooling2D(
            3, 2, padding=padding, dtype=dtype, name="initial_max_pool"
        )(x)


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
    """Returns an encoder: a residual network without its classifier.

    Post-activation blocks (version 1) with the stride on the 3x3 convolution.

    Layer names are an interface: published weights are mapped onto them. They
    are `initial_{conv,bn}` for the stem (before which ResNet-D has
    `stem_{conv,bn}{1,2}`) and, in block b of group g, both counted from 1,
    `block_group{g}_block{b}_{layer}` with the layers `{conv,bn}{1,2,3}`,
    `shortcut_{conv,bn}`, `sk_{conv1,bn1,conv2}` and `se_{conv1,conv2}`. With
    pre-activation there is no `initial_bn` and no `shortcut_bn`, but a
    `final_bn`. The names in `ENDPOINTS` are outputs of the network's parts, see
    `endpoints`.

    Source: He et al., arXiv:1512.03385; google-research/simclr@383d414,
    tf2/resnet.py (with `padding="fixed"`), DeepMind's haiku networks of BYOL
    and ReLICv2 (with `padding="same"`), and torchvision's models/resnet.py
    (with `padding="torch"` and `shortcuts="needed"`). Differs from SimCLR's:
    depth 10, fractional widths, and no DropBlock.

    Args:
        depth: 10, 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
        width_multiplier: factor of all numbers of filters, > 0. Fractions are
            rounded, `max(8, round(base * width_multiplier))`, where base is 64
            for the first group, and a bottleneck's output is 4 times that.
        stem: "imagenet" (7x7, stride 2, then max-pool) or "cifar" (3x3).
        padding: of strided convolutions and of the max-pool. "torch" pads both
            sides equally; "same" is TensorFlow's, which pads even sizes right
            and bottom; "fixed" is the first for convolutions and the second
            for the max-pool. Each gives other features for the same weights.
        shortcuts: where the first block of a group projects its shortcut:
            "always", or where it is "needed" because the shape changes.
        preactivation: whether BatchNorm and ReLU stand before convolutions
            (version 2), where `zero_init_residual` means nothing; not with
            `sk_ratio`, `se_ratio` or `padding="torch"`.
        base_filters: numbers of filters of the stem and of the four groups,
            before `width_multiplier`.
        sk_ratio: if > 0 (SimCLR v2: 0.0625), bottlenecks have selective
            kernels, mixed by a layer of `sk_ratio` times their filters, and
            all networks get ResNet-D's shortcuts and ImageNet stem.
        se_ratio: if > 0, blocks end in squeeze-and-excitation by a layer of
            `se_ratio` times their filters.
        zero_init_residual: whether blocks start as the identity: the last
            `gamma` of their residual branch is 0.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_momentum: of the moving statistics, in [0, 1].
        channels: of the images.
        differentiable_twice: whether XLA must compile gradients of gradients,
            also in half precision.
        name: of the model.

    Returns:
        A functional model from float32 images `[N, H, W, channels]`, of any
        size, to float32 features `[N, D]`.

    Raises:
        ValueError: if an argument is outside its range.
    """
    for argument, value, allowed in (
        ("depth", depth, DEPTHS),
        ("stem", stem, STEMS),
        ("padding", padding, PADDINGS),
        ("shortcuts", shortcuts, SHORTCUTS),
    ):
        if value not in allowed:
            raise ValueError(
                f"`{argument}` must be one of {allowed}. Received: {value!r}."
            )
    if width_multiplier <= 0 or min(sk_ratio, se_ratio) < 0:
        raise ValueError(
            "`width_multiplier` must be positive, `sk_ratio` and `se_ratio` "
            f"not negative. Received: width_multiplier={width_multiplier}, "
            f"sk_ratio={sk_ratio}, se_ratio={se_ratio}."
        )
    if len(base_filters) != len(BASE_FILTERS) or min(base_filters) < 1:
        raise ValueError(
            "`base_filters` must be five positive numbers, of the stem and of "
            f"the four groups. Received: {base_filters}."
        )
    if preactivation and (sk_ratio or se_ratio or padding == "torch"):
        raise ValueError(
            "`preactivation` goes without selective kernels, squeeze-and-"
            f"excitation and torch's padding. Received: sk_ratio={sk_ratio}, "
            f"se_ratio={se_ratio}, padding={padding!r}."
        )
    blocks_per_group, bottleneck = ARCHITECTURES[depth]
    builder = _Builder(
        norm=functools.partial(
            GlobalBatchNorm,
            momentum=batch_norm_momentum,
            synchronized=global_bn,
        ),
        padding=padding,
        shortcuts=shortcuts,
        preactivation=preactivation,
        width_multiplier=width_multiplier,
        bottleneck=bottleneck,
        sk_ratio=sk_ratio,
        se_ratio=se_ratio,
        zero_init_residual=zero_init_residual,
        differentiable_twice=differentiable_twice,
    )
    images = keras.Input((None, None, channels), name=f"{name}_images")
    x = builder.stem(images, base_filters[0], stem)
    groups = zip(base_filters[1:], blocks_per_group, strict=True)
    for index, (filters, blocks) in enumerate(groups, start=1):
        x = builder.group(x, filters, blocks, index)
    if preactivation:
        x = builder.bn_relu(x, names="final_{}")
    # float32 under mixed precision too: losses and probes take it from here.
    features = keras.layers.GlobalAveragePooling2D(
        name="final_avg_pool", dtype="float32"
    )(x)
    return keras.Model(images, features, name=name)


def endpoints(model: keras.Model) -> dict[str, keras.KerasTensor]:
    """Returns the symbolic outputs of an encoder's parts, by `ENDPOINTS`.

    `initial_conv` is the stem's last convolution before BatchNorm, and
    `initial_max_pool` what the first block receives, also where the stem has
    no pooling. `keras.Model(model.input, endpoints(model))` computes them.

    Args:
        model: an encoder made by `resnet`.
    """
    return {name: model.get_layer(name).output for name in ENDPOINTS}


@contextlib.contextmanager
def hold_statistics() -> Iterator[None]:
    """What is traced in this context leaves moving statistics as they are.

    For a second pass over the same images in training mode.
    """
    token = _holds_statistics.set(True)
    try:
        yield
    finally:
        _holds_statistics.reset(token)


def recomputing(
    model: keras.Model,
) -> Callable[[tf.Tensor, bool], tf.Tensor]:
    """Returns an encoder that forgets what is inside of its blocks.

    It computes the same from images and `training`; for gradients, the stem
    and each block are computed again from their inputs: less memory, about one
    forward pass more. Source: Chen et al., arXiv:1604.06174.

    Args:
        model: an encoder made by `resnet`.

    Raises:
        ValueError: if it is another.
    """
    ends = {
        match[1]: layer.output  # the last of the block
        for layer in model.layers
        if (match := re.match(r"(initial|block_group\d_block\d+)_", layer.name))
    }
    if len(ends) < 2:
        raise ValueError(
            "Only the blocks of ResNets are computed again. Received: "
            f"{model.name!r}."
        )
    tensors = [model.input, *ends.values(), model.output]
    parts = [
        keras.Model(start, end)
        for start, end in zip(tensors, tensors[1:], strict=False)
    ]

    def call(images: tf.Tensor, training: bool) -> tf.Tensor:
        x = images
        for part in parts:
            x = _recomputing(part, training)(x)
        return x

    return call


def _recomputing(part: keras.Model, training: bool) -> Callable:
    """Returns a part, its statistics moved by the first of two calls alone."""
    calls = iter((contextlib.nullcontext(), hold_statistics()))

    def call(x: tf.Tensor) -> tf.Tensor:
        with next(calls):
            return part(x, training=training)

    return tf.recompute_grad(call)


def freeze(model: keras.Model, after_block: int) -> None:
    """Makes the first parts of an encoder constant, and the rest trainable.

    Neither weights nor BatchNorm statistics of the frozen part change, even
    if the model is called with `training=True`. Call it before the training
    step is traced: a traced `tf.function` keeps what it saw.

    Args:
        model: an encoder made by `resnet`.
        after_block: -1 freezes nothing, 0 the stem, k in 1..4 the stem and
            the block groups 1..k; 4 is the whole encoder.

    Raises:
        ValueError: if `after_block` is not in -1..4.
    """
    if after_block not in range(-1, 5):
        raise ValueError(
            f"`after_block` must be in -1..4. Received: {after_block!r}."
        )
    for layer in model.layers:
        group = re.match(r"block_group(\d)", layer.name)
        is_last = layer.name == "final_bn"
        part = int(group[1]) if group else 4 if is_last else 0
        layer.trainable = part > after_block
