# SPDX-License-Identifier: Apache-2.0
"""Command lines of every mode and objective, and other values for flags."""

import dataclasses

import run
from contrastive.config import schema
from contrastive.config.completion import complete
from contrastive.config.fields import fields_of
from contrastive.config.resolve import resolve
from contrastive.training.config import make_config, make_views

TABLES = run.TABLES
FLAGS = TABLES.flags()

# Values for flags whose value cannot be made up from their declaration.
_SAMPLES = {
    "preset": "byol_300",
    "encoder": "efficientnet_v2_s",
    "queue_size": 4096,
    "image_size": 48,
    "small_image_size": 40,
    "num_large_views": 3,
    "resnet_depth": 18,
    "base_filters": (32, 64, 128, 256, 512),
    "crop_area": (0.2, 0.9),
    "small_crop_area": (0.2, 0.3),
    "crop_aspect": (0.9, 1.1),
    "blur_sigma": (0.3, 1.0),
    "label_budgets": ("2",),
    "format": ("onnx",),
    "learning_rate_scaling": "sqrt",
    "contrast": 0.125,
    "saturation": 0.125,
    "color_jitter_strength": 0.125,
}
_NUMBERS = (2, 3, 0.25, 0.75, 0.125, 0)


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts of a training split."""

    num_classes: int = 10
    channels: int = 3
    image_size: tuple[int, int] = (64, 64)
    num_examples: int = 5000


def reads_objective(mode):
    """Returns whether a mode reads the objective's hyperparameters."""
    return schema.ObjectiveChoice in TABLES.commands[mode].groups


def base(mode, task):
    """Returns the flags of a short command line that is accepted.

    Args:
        mode: name of a mode.
        task: name of an objective, "finetune", or "" for a mode that trains nothing.
    """
    given = {"mode": mode}
    if mode == "check_tpu":
        given["tpu_topology"] = "v5e:2x2"
    if mode == "eval":
        given["model_dir"] = "runs/x"
    elif task == "finetune":
        given |= {"train_mode": "finetune", "checkpoint": "none"}
    elif task:
        given["objective"] = task
    else:
        given["checkpoint"] = "runs/x"
    return given


def cases():
    """Returns all pairs of a mode and a task; see `base`."""
    found = []
    for mode in TABLES.commands:
        if not reads_objective(mode):
            found.append((mode, ""))
            continue
        found += [(mode, name) for name in TABLES.objectives]
        if mode != "selftest":
            found.append((mode, "finetune"))
    return found


def completed(given):
    """Returns the resolved and the completed values of a command line."""
    resolved = resolve(given, TABLES, {})
    channels = resolved.known("channels") or Facts.channels
    return resolved, complete(resolved, Facts(channels=channels))


def received(values):
    """Returns all that a command receives, by name.

    These are the fields of the groups that it reads, and the objective's hyperparameters if it
    pretrains.
    """
    groups = TABLES.commands[values["mode"]].groups
    found = {name: values.known(name) for group in groups for name in fields_of(group)}
    if schema.ObjectiveChoice in groups and values["train_mode"] == "pretrain":
        found["hyperparameters"] = values.objective()
    return found


def trained(values):
    """Returns what determines a training step and how often it is done."""
    return make_config(values, Facts(channels=values["channels"]), 1)


def sample(name, values):
    """Returns a value of a flag that differs from the one in force."""
    flag, now = FLAGS[name], values.values.get(name)
    if name in fields_of(schema.AugmentationOverrides) and now is None:
        if values["train_mode"] == "pretrain":
            now = getattr(make_views(values)[0], name)
    if name in _SAMPLES:
        return _SAMPLES[name]
    item = flag.field_of(values["objective"]) or flag.item
    if item.kind is bool:
        return now is not True
    if flag.choices:
        return next(choice for choice in flag.choices if choice != now)
    if item.kind is str:
        return ("x",) if item.is_tuple else "x"
    for number in _NUMBERS:
        value = item.kind(number)
        value = (value,) if item.is_tuple else value
        if value != now and _is_accepted(item, value):
            return value
    raise AssertionError(f"no other value for --{name}")


def _is_accepted(item, value):
    try:
        item.check(value)
    except ValueError:
        return False
    return True
