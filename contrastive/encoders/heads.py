# SPDX-License-Identifier: Apache-2.0
"""Projection, prediction and classification heads."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from contrastive.config.choices import MLP_NORMS, SIMCLR_MODES
from contrastive.encoders.batch_norm import GlobalBatchNorm

# An initializer object draws the same numbers each time, so every layer gets one of its own.
_normal = functools.partial(keras.initializers.RandomNormal, stddev=0.01)


def projection_head(
    mode: str = "nonlinear",
    *,
    input_dim: int,
    out_dim: int = 128,
    num_layers: int = 3,
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    name: str = "projection",
) -> keras.Model:
    """Builds SimCLR's projection head.

    Layers have no bias, and BatchNorm follows each, without offset after the last. Hidden layers
    have as many units as the input, and ReLU at the end.

    Source: Chen et al., arXiv:2006.10029; google-research/simclr@383d414, tf2/model.py. Differs
    from it: every mode returns the list below.

    Args:
        mode: "nonlinear" (`num_layers` layers), "linear" (the last layer alone) or "none" (the
            projection is the input).
        input_dim: number of features.
        out_dim: size of the projection; ignored if `mode` is "none".
        num_layers: number of layers of the nonlinear head, >= 1.
        global_bn: whether BatchNorm statistics cover all replicas.
        batch_norm_momentum: momentum of the moving statistics, in [0, 1].
        name: name of the model and prefix of the names of its layers.

    Returns:
        A model from float32 features `[N, input_dim]` to a list of the input and the output of each
        layer; with "none", of the input twice. Element -1 is the projection, in float32 under every
        dtype policy. Element k is the input of the classifier with SimCLR's `ft_proj_selector=k`.

    Raises:
        ValueError: if `mode` is unknown or `num_layers` is not positive.
    """
    if mode not in SIMCLR_MODES:
        raise ValueError(f"`mode` must be one of {SIMCLR_MODES}. Received: {mode!r}.")
    if num_layers < 1:
        raise ValueError(f"`num_layers` must be positive. Received: {num_layers}.")
    num_hidden = num_layers - 1 if mode == "nonlinear" else 0
    norm = {"momentum": batch_norm_momentum, "synchronized": global_bn}
    return _stack(
        name,
        [input_dim] * (num_hidden + 1) + [out_dim] * (mode != "none"),
        lambda _: {"use_bias": False, "kernel_initializer": _normal()},
        lambda is_last: norm | {"center": not is_last},
    )


def mlp_head(
    *,
    input_dim: int,
    hidden_dims: Sequence[int],
    out_dim: int,
    norm: str = "hidden",
    global_bn: bool = True,
    batch_norm_momentum: float = 0.9,
    name: str = "projection",
) -> keras.Model:
    """Builds a multi-layer perceptron with ReLU between its layers.

    BYOL's projection and prediction heads have one hidden layer with bias, BatchNorm and ReLU, and
    an output layer without bias or BatchNorm. ReLIC without a target network has BatchNorm after
    every layer; relic-pytorch has no BatchNorm. `hidden_dims` are the units of each hidden layer
    and may be empty; `norm` says which layers BatchNorm follows: "none", "hidden" or "all". The
    other arguments and the result are as in `projection_head`.

    Source: Grill et al., arXiv:2006.07733, section 3.3; deepmind-research, byol/utils/networks.py
    `MLP`; Mitrovic et al., arXiv:2010.07922, table 5; filipbasara0/relic, relic/relic.py `MLPHead`.

    Raises:
        ValueError: if `norm` is unknown.
    """
    if norm not in MLP_NORMS:
        raise ValueError(f"`norm` must be one of {MLP_NORMS}. Received: {norm!r}.")

    known = ("hidden", "all")  # with BatchNorm; after the last layer only "all"
    options = {"momentum": batch_norm_momentum, "synchronized": global_bn}
    return _stack(
        name,
        [input_dim, *hidden_dims, out_dim],
        lambda is_last: {
            # BYOL's code has it, although BatchNorm makes it ineffective.
            "use_bias": norm == "hidden" and not is_last,
            "kernel_initializer": "lecun_normal",
            "dtype": "float32" if is_last else None,
        },
        lambda is_last: options if norm in known[is_last:] else None,
    )


def _stack(
    name: str,
    dims: Sequence[int],
    dense: Callable[[bool], dict[str, Any]],
    norm: Callable[[bool], dict[str, Any] | None],
) -> keras.Model:
    """Stacks layers; `dense` and `norm` map "is the last" to their options."""
    hiddens = [keras.Input(dims[:1], name=f"{name}_features")]
    for layer, units in enumerate(dims[1:], start=1):
        is_last = layer == len(dims) - 1
        kwargs = {"name": f"{name}_dense{layer}", **dense(is_last)}
        x = keras.layers.Dense(units, **kwargs)(hiddens[-1])
        if (options := norm(is_last)) is not None:
            kwargs = {"dtype": "float32" if is_last else None, **options}
            x = GlobalBatchNorm(name=f"{name}_bn{layer}", **kwargs)(x)
        if not is_last:
            x = keras.layers.ReLU(name=f"{name}_relu{layer}")(x)
        hiddens.append(x)
    if len(dims) == 1:
        hiddens *= 2  # A model with a list of one output returns a tensor.
    return keras.Model(hiddens[0], hiddens, name=name)


def classifier_head(*, input_dim: int, num_classes: int, zero_init: bool = False) -> keras.Model:
    """Builds a classifier of one linear layer with bias.

    The kernel starts at zero with `zero_init`, as in linear evaluation, or else is drawn from a
    normal distribution with a standard deviation of 0.01.

    Returns:
        A model from features `[N, input_dim]` to float32 logits
        `[N, num_classes]`.
    """
    features = keras.Input((input_dim,), name="classifier_features")
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer="zeros" if zero_init else _normal(),
        dtype="float32",
        name="classifier_dense",
    )(features)
    return keras.Model(features, logits, name="classifier")
