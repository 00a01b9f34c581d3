# SPDX-License-Identifier: Apache-2.0
"""Conditions under which fields have an effect."""

from __future__ import annotations

import os

from contrastive.config.fields import Condition, Values

TRAINING_MODES = ("train", "train_then_eval")


def modes(*names: str) -> Condition:
    """Holds with one of the modes."""
    return flag("mode", *names)


def flag(name: str, *allowed: object) -> Condition:
    """Holds if a flag has one of the allowed values."""
    values = " or ".join(str(x).lower() if isinstance(x, bool) else str(x) for x in allowed)
    return Condition(f"with --{name}={values}", lambda v: v[name] in allowed, (name,))


def given(*names: str) -> Condition:
    """Holds if one of the flags has a value that is neither 0 nor empty."""
    return Condition(
        f"with {' or '.join(f'--{name}' for name in names)}",
        lambda v: any(v[name] for name in names),
        names,
    )


def without(*names: str) -> Condition:
    """Holds if none of the flags has a value, other than 0 or empty."""
    return Condition(
        f"without {' and '.join(f'--{name}' for name in names)}",
        lambda v: not any(v[name] for name in names),
        names,
    )


def unset(*names: str) -> Condition:
    """Holds if none of the flags has a value; 0 is one."""
    return Condition(
        f"without {' and '.join(f'--{name}' for name in names)}",
        lambda v: all(v[name] is None for name in names),
        names,
    )


def _not_all_set(*names: str) -> Condition:
    """Holds if one of the flags has no value; 0 is one."""
    return Condition(
        f"unless {', '.join(f'--{name}' for name in names)} are all given",
        lambda v: any(v[name] is None for name in names),
        names,
    )


def _not_zero(name: str) -> Condition:
    """Holds unless a flag is 0; None is not."""
    return Condition(f"without --{name}=0", lambda v: v[name] != 0, (name,))


def sweeps(values: Values) -> bool:
    """Returns whether several trainings are compared before the last one."""
    return bool(
        values["mode"] in TRAINING_MODES
        and values["train_mode"] == "finetune"
        and (values["sweep_learning_rate"] or values["sweep_train_epochs"])
    )


_SWEEP = ("mode", "train_mode", "sweep_learning_rate", "sweep_train_epochs")

PRETRAINING = Condition("in pretraining", lambda v: v["train_mode"] == "pretrain", ("train_mode",))
FINE_TUNING = Condition("in fine-tuning", lambda v: v["train_mode"] == "finetune", ("train_mode",))
MULTI_VIEW = Condition(
    "to objectives of any number of views",
    lambda v: v["objective_type"].multi_view,
    ("objective",),
)
TARGET = flag("target_network", True)
RESNET = flag("encoder", "resnet")
MASKS = given("mask_dir", "saliency")
LABELS = Condition(
    "to objectives that use labels, or with --labelled_batch_share",
    lambda v: v["objective_type"].uses_labels or v["labelled_batch_share"] > 0,
    ("objective", "labelled_batch_share"),
)
FORWARD = ("eval", "probe", "embed", "predict")
EVALUATES = Condition(
    "with --mode=train_then_eval or in a sweep",
    lambda v: v["mode"] in ("train_then_eval", *FORWARD) or sweeps(v),
    _SWEEP,
)
MEASURES = Condition(
    "with --mode=train_then_eval or eval, or in a sweep",
    lambda v: v["mode"] in ("train_then_eval", "eval") or sweeps(v),
    _SWEEP,
)
SWEEPS = Condition("in a sweep", sweeps, _SWEEP)
# The learning rate or the epochs of a sweep replace a single value.
NO_RATE_SWEEP = Condition(
    "without --sweep_learning_rate",
    lambda v: not (sweeps(v) and v["sweep_learning_rate"]),
    _SWEEP,
)
NO_EPOCHS_SWEEP = Condition(
    "without --sweep_train_epochs",
    lambda v: not (sweeps(v) and v["sweep_train_epochs"]),
    _SWEEP,
)
CLASSIFIER = Condition(
    "in fine-tuning, or with --lineareval_while_pretraining",
    lambda v: v["train_mode"] == "finetune" or v["lineareval_while_pretraining"],
    ("train_mode", "lineareval_while_pretraining"),
)
COLOR = Condition(
    "to images of 3 channels",
    lambda v: not isinstance(v["channels"], int) or v["channels"] == 3,
    ("channels",),
)
JITTER = _not_zero("jitter_probability")
BRIGHTNESS = _not_zero("brightness")
SOME_JITTER = _not_all_set("brightness", "contrast", "saturation", "hue")
SOME_SYMMETRY = _not_all_set("blur_probability", "solarize_probability")


def _may_blur(values: Values) -> bool:
    if values["blur_probability"] is not None:
        return bool(values["blur_probability"])
    is_simclr = values["augmentation"] == "simclr"
    return values["sym_aug"] or values["use_blur"] or not is_simclr


BLUR = Condition(
    "to augmentations that blur",
    _may_blur,
    ("blur_probability", "sym_aug", "use_blur", "augmentation"),
)
PROJECTION = Condition(
    "in pretraining, or with --ft_proj_selector",
    lambda v: v["train_mode"] == "pretrain" or v["ft_proj_selector"] != 0,
    ("train_mode", "ft_proj_selector"),
)
MLP = Condition(
    "with --proj_head_mode=mlp or --predictor",
    lambda v: v["proj_head_mode"] == "mlp" or v["predictor"],
    ("proj_head_mode", "predictor"),
)
# The self-test trains with LARS, whatever the optimizer.
MOMENTUM = Condition(
    "with --optimizer=lars or momentum",
    lambda v: v["mode"] == "selftest" or v["optimizer"] != "adam",
    ("mode", "optimizer"),
)
LARS = Condition(
    "with --optimizer=lars",
    lambda v: v["mode"] == "selftest" or v["optimizer"] == "lars",
    ("mode", "optimizer"),
)
TOPOLOGY = Condition(
    "with --mode=check_tpu or --dry_run",
    lambda v: v["mode"] == "check_tpu" or v["dry_run"],
    ("mode", "dry_run"),
)


def _tpu_is_named(values: Values) -> bool:
    return bool(values["tpu_name"] or values["master"])


MAY_USE_TPU = Condition(
    "without --use_tpu=false", lambda v: v["use_tpu"] is not False, ("use_tpu",)
)
# --use_tpu, or a TPU's name, says where a run is to be.
STRATEGY = Condition(
    "without --use_tpu, --tpu_name and --master",
    lambda v: (
        v["strategy"] in ("auto", "tpu")
        if v["use_tpu"] or (v["use_tpu"] is None and _tpu_is_named(v))
        else v["use_tpu"] is None or v["strategy"] != "tpu"
    ),
    ("strategy", "use_tpu", "tpu_name", "master"),
)
NAMED_TPU = Condition(
    "to a TPU that is named by --tpu_name, --master or TPU_NAME",
    lambda v: v["use_tpu"] is not False and (_tpu_is_named(v) or bool(os.environ.get("TPU_NAME"))),
    ("use_tpu", "tpu_name", "master"),
)
