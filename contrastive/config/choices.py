# SPDX-License-Identifier: Apache-2.0
"""Values that the flags and several modules choose from."""

import re

# Strategies of `contrastive.devices`.
STRATEGIES = ("tpu", "mirrored", "multi_worker", "one_device")

# Arguments of `resnet.resnet`.
STEMS = ("imagenet", "cifar")
PADDINGS = ("fixed", "same", "torch")
SHORTCUTS = ("always", "needed")
DEPTHS = (10, 18, 34, 50, 101, 152, 200)
BASE_FILTERS = (64, 64, 128, 256, 512)  # of the stem and the four groups

# Arguments of the heads and of the target network.
SIMCLR_MODES = ("none", "linear", "nonlinear")
PROJECTION_MODES = (*SIMCLR_MODES, "mlp")
MLP_NORMS = ("none", "hidden", "all")
TARGET_BNS = ("batch", "average")

# Fields of `contrastive.config.augmentation.Augmentation`, and the estimators of
# `contrastive.sources.masks`.
BRIGHTNESS_MODES = ("multiplicative", "additive")
MASK_FILLS = ("zero", "mean", "noise")
SALIENCY_ESTIMATORS = ("spectral", "frequency_tuned")

# Formats of `contrastive.weights.export`.
FORMATS = ("saved_model", "keras", "torchvision", "onnx", "safetensors")


def check_label_budget(budget: str) -> None:
    """Raises ValueError unless a text is a number of labels or a percentage."""
    is_count = re.fullmatch("[1-9][0-9]*", budget)
    share = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)%", budget)
    if not is_count and not (share and 0 < float(share[1]) <= 100):
        raise ValueError(
            "A label budget is a number of labels of each class, such as 5, or "
            f"a share of all labels, such as 10%. Received: {budget!r}."
        )
