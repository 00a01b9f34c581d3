# SPDX-License-Identifier: Apache-2.0
"""The encoder and its heads."""

from __future__ import annotations

from contrastive.config import choices, conditions as when
from contrastive.config.fields import derived, field, group


@group("Networks", inherit="networks")
class Encoder:
    """The encoder.

    Attributes:
        encoder: Encoder: resnet, or a backbone of keras.applications by name.
        batch_norm_decay: Decay of BatchNorm's moving statistics.
        global_bn: Compute BatchNorm statistics over all replicas.
    """

    encoder: str = field("resnet", table="encoders")
    batch_norm_decay: float = field(0.9, minimum=0, maximum=1)
    global_bn: bool = field(True)


@group("Networks", applies=(when.RESNET,), inherit="networks")
class ResNet:
    """The ResNet, if that is the encoder.

    Attributes:
        stem: First layers of a ResNet: a 3x3 convolution of stride 1 (cifar), or 7x7 of stride 2
            and max-pooling (imagenet).
        resnet_depth: Number of layers of a ResNet.
        width_multiplier: Width multiplier applied to every layer.
        padding: Padding of strided convolutions and the max-pooling: symmetric for convolutions and
            TensorFlow's SAME for the pooling (fixed, as SimCLR), SAME for both (same, as BYOL), or
            symmetric for both (torch).
        shortcuts: The first block of a group projects its shortcut always, or only where its shape
            changes (needed, as torchvision).
        preactivation: Place BatchNorm and ReLU before the convolutions (ResNet version 2).
        base_filters: Numbers of channels of the stem and the four groups, before
            --width_multiplier.
        sk_ratio: Ratio of selective kernels; 0 uses none, SimCLR v2 uses 0.0625.
        se_ratio: Ratio of squeeze-and-excitation; 0 uses none.
        zero_init_residual: Initialize residual blocks as the identity: the last BatchNorm scale of
            a block is 0.
    """

    stem: str = field(
        derived("cifar for images of up to 32 pixels, else imagenet"),
        choices=choices.STEMS,
    )
    resnet_depth: int = field(50, choices=tuple(map(str, choices.DEPTHS)))
    width_multiplier: float = field(1.0, positive=True)
    padding: str = field("fixed", choices=choices.PADDINGS)
    shortcuts: str = field("always", choices=choices.SHORTCUTS)
    preactivation: bool = field(False)
    base_filters: tuple[int, ...] = field(
        choices.BASE_FILTERS, minimum=1, length=len(choices.BASE_FILTERS)
    )
    sk_ratio: float = field(0.0, minimum=0)
    se_ratio: float = field(0.0, minimum=0)
    zero_init_residual: bool = field(
        True, inherit="never", applies=when.flag("preactivation", False)
    )


@group("Networks")
class Recomputation:
    """The memory of the encoder.

    Attributes:
        remat: Recompute the blocks of a ResNet in the backward pass instead of keeping their
            activations: less memory, about one more forward pass.
    """

    remat: bool = field(False)


@group("Networks", inherit="networks")
class Heads:
    """The heads on the encoder.

    Attributes:
        proj_head_mode: Projection head: none, SimCLR's linear or nonlinear head, or an mlp as in
            BYOL.
        proj_out_dim: Number of dimensions of the projection.
        proj_hidden_dim: Numbers of units of the hidden layers of the mlp head and of the predictor.
        proj_bn: Layers of the mlp head and of the predictor that are followed by BatchNorm.
        num_proj_layers: Number of layers of the nonlinear head.
        predictor: Put a prediction head on the projection of the online network.
        ft_proj_selector: Layer of the projection head that the classifier receives: 0 is the
            encoder's output, -1 the projection.
        zero_init_logits_layer: Initialize the classifier with zeros.
    """

    proj_head_mode: str = field(
        "nonlinear", choices=choices.PROJECTION_MODES, applies=when.PROJECTION
    )
    proj_out_dim: int = field(
        128,
        minimum=1,
        applies=(
            when.PROJECTION,
            when.flag("proj_head_mode", "linear", "nonlinear", "mlp"),
        ),
    )
    proj_hidden_dim: tuple[int, ...] = field((512,), minimum=1, applies=(when.PROJECTION, when.MLP))
    proj_bn: str = field("hidden", choices=choices.MLP_NORMS, applies=(when.PROJECTION, when.MLP))
    num_proj_layers: int = field(
        3,
        minimum=1,
        applies=(when.PROJECTION, when.flag("proj_head_mode", "nonlinear")),
    )
    predictor: bool = field(False, inherit="never", applies=(when.PRETRAINING, when.MULTI_VIEW))
    ft_proj_selector: int = field(0, inherit="never", minimum=-1, applies=when.CLASSIFIER)
    zero_init_logits_layer: bool = field(False, inherit="never", applies=when.CLASSIFIER)


@group("Networks")
class OnlineClassifier:
    """Train a linear classifier beside pretraining, behind a stop-gradient."""

    lineareval_while_pretraining: bool = field(True, applies=when.PRETRAINING)
