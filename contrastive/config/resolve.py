# SPDX-License-Identifier: Apache-2.0
"""Resolution: from the flags that were given to a typed configuration.

Every function is pure. A value is taken from the first of these that has it: the command line, the
run that is continued or evaluated, the preset, the objective (or fine-tuning), the field's default.
What depends on the data is derived by `complete`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from contrastive.config import conditions, recipes, schema
from contrastive.config.fields import Derived, Values, build, fields_of
from contrastive.config.tables import Flag, Tables

COMMAND_LINE, RUN, DEFAULT = "command line", "its run", "default"
FINE_TUNING = "fine-tuning"
FROM_SCRATCH = "none"  # as --checkpoint
# SimCLR's linear evaluation on CIFAR-10.
_FINE_TUNING_DEFAULTS = {
    "optimizer": "momentum",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """Values of all fields and where they come from, by name.

    Attributes:
        values: a `Derived` stands for one that depends on what is not known.
        origins: where each value comes from.
        objective_type: class of the objective's hyperparameters.
        without_effect: a line for every given flag that has no effect.
    """

    values: Values
    origins: Mapping[str, str]
    objective_type: Any
    without_effect: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def known(self, name: str) -> Any:
        """Returns a value; None if it is still to be derived."""
        value = self.values[name]
        return None if isinstance(value, Derived) else value

    def group(self, cls: type[T]) -> T:
        """Returns a group of the schema, filled.

        Raises:
            ValueError: if a value is out of its bounds.
            TypeError: if a value is still to be derived.
        """
        return build(cls, self.values)

    def objective(self) -> Any:
        """Returns the objective with its hyperparameters."""
        return build(self.objective_type, self.values)

    def is_default(self, name: str) -> bool:
        """Returns whether nobody has asked for a value."""
        return self.origins[name] in (DEFAULT, self.values["objective"])

    def replace(self, origin: str, **values: Any) -> Resolved:
        """Returns a copy with other values and their origin."""
        return dataclasses.replace(
            self,
            values={**self.values, **values},
            origins={**self.origins, **dict.fromkeys(values, origin)},
        )

    def derived(self, **values: Any) -> Resolved:
        """Returns a copy in which those that are to be derived have values."""
        is_open = {k: isinstance(self.values[k], Derived) for k in values}
        return self.replace(DEFAULT, **{k: v for k, v in values.items() if is_open[k]})

    def flags(self) -> dict[str, Any]:
        """Returns all values that are known, as `run.json` keeps them."""
        return {k: v for k, v in self.values.items() if self.known(k) is v}

    def by_origin(self) -> dict[str, list[str]]:
        """Returns `name=value` of all values but defaults, by their origin."""
        found: dict[str, list[str]] = {}
        for name, origin in self.origins.items():
            if origin != DEFAULT and name in self.values:
                text = f"{name}={self.values[name]}"
                found.setdefault(origin, []).append(text)
        return found


def resolve(given: Values, tables: Tables, inherited: Values) -> Resolved:
    """Resolves the flags of a command line.

    A flag without effect is named, and the result is that without the flag.

    Args:
        given: values on the command line by name.
        tables: of the program.
        inherited: values of the run that is continued or evaluated.

    Raises:
        ValueError: if flags contradict each other or a value is out of bounds.
    """
    resolved = _resolve_layers(given, tables, inherited)
    reasons = _idle_values(resolved, given, tables)
    idle = [name for name in reasons if name in given and name != "mode"]
    if not idle:
        return _without_idle_values(resolved, reasons, tables)
    others = {name: given[name] for name in given if name not in idle}
    lines = [f"--{name} has no effect: {reasons[name]}." for name in idle]
    resolved = resolve(others, tables, inherited)
    return dataclasses.replace(resolved, without_effect=(*lines, *resolved.without_effect))


def _resolve_layers(given: Values, tables: Tables, inherited: Values) -> Resolved:
    """Takes each value from the first layer that has it, and checks them."""
    layers: dict[str, Values] = {COMMAND_LINE: given, RUN: inherited}
    fields = {name: flag.item for name, flag in tables.flags().items() if not flag.owners}

    def pick(name: str) -> tuple[Any, str]:
        for origin, layer in layers.items():
            if layer.get(name) is not None:
                return layer[name], origin
        return fields[name].default, DEFAULT

    preset = given.get("preset")
    if preset in recipes.EVALUATION:
        layers[f"preset {preset}"] = recipes.EVALUATION[preset]
    train_mode, _ = pick("train_mode")
    if preset in recipes.PRETRAINING and train_mode == "pretrain":
        layers[f"preset {preset}"] = recipes.PRETRAINING[preset]
    objective = canonical_name(pick("objective")[0], pick("use_siglip")[0], tables.aliases)
    cls = tables.objectives[objective]
    target_network, origin = pick("target_network")
    if train_mode == "finetune":
        layers[FINE_TUNING] = _FINE_TUNING_DEFAULTS
    else:
        with_target = target_network or origin == DEFAULT
        more = {} if with_target else cls.without_target
        layers[objective] = {**cls.defaults, **more}
    picked = {name: pick(name) for name in fields}
    fields = fields_of(cls)
    for name in fields:
        value, origin = pick(name)
        picked[name] = value, objective if origin == DEFAULT else origin
    values = {name: value for name, (value, _) in picked.items()}
    resolved = Resolved(
        values={**values, "objective": objective},
        origins={name: origin for name, (_, origin) in picked.items()},
        objective_type=cls,
    )
    if resolved["mode"] != "probe":
        name = resolved["dataset"].rstrip("/").rpartition("/")[2]
        directory = f"runs/{train_mode}-{objective}-{name}"
        resolved = resolved.derived(model_dir=directory)
    resolved = _synonyms_replaced(resolved, given)
    if resolved["checkpoint"] == FROM_SCRATCH:
        origin = resolved.origins["checkpoint"]
        resolved = resolved.replace(origin, checkpoint=None)
    _check(resolved, given.get("checkpoint"))
    return _without_idle_sweeps(resolved)


def canonical_name(objective: str, use_siglip: bool, aliases: Mapping[str, str]) -> str:
    """Returns the name of an objective in the table."""
    name = aliases.get(objective, objective)
    if use_siglip and name not in ("relic", "siglip"):
        raise ValueError("--use_siglip is a loss of --objective=relic.")
    return "siglip" if use_siglip else name


def _synonyms_replaced(resolved: Resolved, given: Values) -> Resolved:
    """Applies the objective's other names of flags."""
    for name, meant in resolved.objective_type.synonyms.items():
        if name in given and meant in given:
            raise ValueError(f"--{name} and --{meant} mean the same here.")
        if name in given:
            item = fields_of(schema.Target)[meant]
            try:
                item.check(given[name])
            except ValueError as error:
                raise ValueError(f"--{name}={given[name]:g} {error}") from None
            resolved = resolved.replace(f"--{name}", **{meant: given[name]})
    return resolved


def _without_idle_sweeps(resolved: Resolved) -> Resolved:
    """Removes sweeps of a preset over values that the command line gives."""
    for name, single in (
        ("sweep_learning_rate", ("learning_rate",)),
        ("sweep_train_epochs", ("train_epochs", "train_steps")),
    ):
        is_given = any(resolved.origins[x] == COMMAND_LINE for x in single)
        if is_given and resolved.origins[name] != COMMAND_LINE:
            resolved = resolved.replace(DEFAULT, **{name: ()})
    return resolved


def conditions_view(resolved: Resolved) -> Values:
    """Returns the values that conditions are evaluated on."""
    return {**resolved.values, "objective_type": resolved.objective_type}


def reason_without_effect(
    flag: Flag,
    view: Values,
    tables: Tables,
    decided: tuple[str, ...] | None = None,
) -> str | None:
    """Returns why a flag has no effect beside the others; None if it has.

    Args:
        flag: the flag.
        view: of `conditions_view`.
        tables: of the program.
        decided: fields whose values are settled; conditions that depend on others are taken to
            hold. None: all are settled.
    """
    item = flag.item
    if item.group is schema.Ignored:
        return item.info.help.removeprefix("Ignored: ").rstrip(".")
    group = schema.ObjectiveChoice if flag.owners else item.group
    readers = tables.modes_that_read(group)
    if view["mode"] not in readers:
        return f"it applies only with --mode={' or '.join(readers)}"
    is_recipe = flag.name == "preset" and view["preset"] in recipes.PRETRAINING
    if view["train_mode"] != "pretrain" and (flag.owners or is_recipe):
        return "it applies only in pretraining"
    own = flag.field_of(view["objective"])
    if own is None:
        return f"it applies only to --objective={' or '.join(flag.owners)}"
    for condition in own.info.applies:
        is_open = decided is not None and not set(condition.on) <= set(decided)
        if not is_open and not condition.holds(view):
            return f"it applies only {condition.text}"
    return None


def _idle_values(resolved: Resolved, given: Values, tables: Tables) -> dict[str, str]:
    """Returns the names of values without effect, and why they have none."""
    view, flags = conditions_view(resolved), tables.flags()
    # An objective may have another name for a flag.
    meant = {k: v for k, v in resolved.objective_type.synonyms.items() if k in given}
    reasons = {
        name: reason_without_effect(flags[meant.get(name, name)], view, tables) for name in flags
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _without_idle_values(resolved: Resolved, names: Iterable[str], tables: Tables) -> Resolved:
    """Resets values that have no effect to the defaults of their fields."""
    # The first of these decide about others; a plan shows the learning rate and the epochs that a
    # sweep replaces.
    kept = {"mode", "train_mode", "objective", "preset"}
    if conditions.sweeps(resolved.values):
        kept |= {"learning_rate", "train_epochs"}
    flags, reset = tables.flags(), {}
    for name in names:
        own = flags[name].field_of(resolved["objective"])
        if own and name not in kept and not isinstance(own.default, Derived):
            reset[name] = own.default
    return dataclasses.replace(resolved, values={**resolved.values, **reset})


def _check(resolved: Resolved, checkpoint: str | None) -> None:
    """Raises ValueError for values that contradict each other."""
    values, preset = resolved.values, resolved["preset"]
    finetune = values["train_mode"] == "finetune"
    mode, given = values["mode"], values["checkpoint"]
    trains = mode in ("train", "train_then_eval", "check_tpu", "selftest")
    if preset in recipes.EVALUATION and not finetune:
        raise ValueError(f"--preset={preset} is for --train_mode=finetune.")
    if values["dry_run"] and mode not in ("train", "train_then_eval"):
        raise ValueError(f"--dry_run plans a training, not --mode={mode}.")
    if mode == "selftest" and finetune:
        raise ValueError("--mode=selftest is for --train_mode=pretrain.")
    if not trains:
        return
    if not finetune and values["fine_tune_after_block"] != -1:
        raise ValueError(
            "--fine_tune_after_block freezes layers, which pretraining does "
            "not support. Received: --train_mode=pretrain "
            f"--fine_tune_after_block={values['fine_tune_after_block']}."
        )
    if finetune and not given and checkpoint != FROM_SCRATCH:
        raise ValueError(
            "--checkpoint must name the pretrained run; to train from scratch, "
            "give --checkpoint=none."
        )
    partly = values["fine_tune_after_block"] not in (-1, 4)
    if finetune and partly and values["encoder"] != "resnet":
        raise ValueError(
            f"Fine-tuning of {values['encoder']} trains all layers "
            "(--fine_tune_after_block=-1) or the classifier alone (4)."
        )
    if not finetune:
        _check_pretraining(resolved)


def _check_pretraining(resolved: Resolved) -> None:
    """Raises ValueError for values that do not suit the objective."""
    values, cls = resolved.values, resolved.objective_type
    name = values["objective"]
    if values["train_batch_size"] < 2:
        raise ValueError(
            "Pretraining compares the images of a batch with each other, so "
            "--train_batch_size must be at least 2. Received: "
            f"{values['train_batch_size']}."
        )
    if values["remat"] and cls.differentiates_twice:
        raise ValueError(
            f"--remat is not for --objective={name}, whose loss has gradients "
            "in it: TensorFlow recomputes nothing for gradients of gradients."
        )
    views = values["num_large_views"], values["num_small_views"]
    if sum(views) < 2 if cls.multi_view else views != (2, 0):
        raise ValueError(
            f"The objective {name} compares "
            f"{'two views or more' if cls.multi_view else 'two large views'}. "
            f"Received: --num_large_views={views[0]} "
            f"--num_small_views={views[1]}."
        )
    chosen = [
        flag
        for flag in ("labelled_fraction", "labels_per_class", "labelled_file")
        if values[flag] is not None
    ]
    if len(chosen) > 1:
        raise ValueError(f"--{' and --'.join(chosen)} both choose labelled images.")
    if values["mask_dir"] and values["saliency"]:
        raise ValueError("--mask_dir and --saliency both make masks; give one of them.")
    cls.check(values)
