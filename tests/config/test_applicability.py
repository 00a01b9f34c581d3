# SPDX-License-Identifier: Apache-2.0
"""Every flag has an effect, or is said to have none, or is refused."""

import functools

import pytest

from contrastive.config import schema
from tests.support import command_lines, program
from tests.support.command_lines import FLAGS, TABLES

# Flags beside which others gain or lose their effect. Those that are refused or idle under an
# objective are left out there.
_SURROUNDINGS = {
    "alone": {},
    "many views": {
        "target_network": True,
        "predictor": True,
        "proj_head_mode": "mlp",
        "num_small_views": 1,
        "saliency": "spectral",
        "mask_probability": 0.5,
        "learnable_temperature": True,
        "checkpoint": "runs/x",
        "checkpoint_steps": 5,
        "labels_per_class": 2,
        "labelled_batch_share": 0.5,
        "sweep_learning_rate": (1.0, 2.0),
        "ft_proj_selector": 1,
        "tpu_name": "name",
    },
    "another optimizer": {
        "optimizer": "adam",
        "train_steps": 10,
        "checkpoint_minutes": 1.0,
        "use_tpu": False,
        "augmentation": "byol",
        "target_network": False,
        "preactivation": True,
        "proj_head_mode": "none",
        "lineareval_while_pretraining": False,
        "sym_aug": True,
        "mask_dir": "masks",
        "channels": 1,
    },
    "another encoder": {
        "encoder": "convnext_tiny",
        "dry_run": True,
        "optimizer": "momentum",
        "sweep_train_epochs": (1, 2),
        "jitter_probability": 0.0,
        "blur_probability": 0.0,
        "solarize_probability": 0.0,
        "use_tpu": True,
    },
}
_TASKS_WITH_SURROUNDINGS = ("rpc", "wpc", "relic", "semppl", "finetune")
_CASES = [
    *((mode, task, "alone") for mode, task in command_lines.cases()),
    *(
        ("train", task, name)
        for task in _TASKS_WITH_SURROUNDINGS
        for name in list(_SURROUNDINGS)[1:]
    ),
]
# Groups whose fields all reach the configuration of the training loop.
_OF_THE_LOOP = (
    schema.Batch,
    schema.Length,
    schema.Checkpointing,
    schema.Optimizer,
    schema.Regularization,
    schema.Views,
    schema.AugmentationOverrides,
)


def _surrounded(given, surroundings):
    """Adds those of the surroundings that have an effect."""
    for name, value in surroundings.items():
        candidate = {**given, name: value}
        try:
            resolved, _ = command_lines.completed(candidate)
        except ValueError:
            continue
        if not resolved.without_effect:
            given = candidate
    return given


def _must_change_the_loop(name, mode):
    return mode in ("train", "train_then_eval", "check_tpu") and (
        FLAGS[name].owners or FLAGS[name].item.group in _OF_THE_LOOP
    )


def _problem(name, given, before):
    """Returns what is wrong with a flag beside others; None if nothing is."""
    value = command_lines.sample(name, before)
    try:
        resolved, after = command_lines.completed({**given, name: value})
        is_same = command_lines.received(after) == command_lines.received(before)
        if is_same is False and _must_change_the_loop(name, given["mode"]):
            is_same = command_lines.trained(after) == command_lines.trained(before)
    except ValueError:
        return None  # It is refused.
    lines = [
        line for line in resolved.without_effect if line.startswith(f"--{name} has no effect: ")
    ]
    if len(lines) > 1:
        return f"--{name}={value} is named {len(lines)} times"
    if lines and not is_same:
        return f"--{name}={value} has an effect, and is said to have none"
    if not lines and is_same:
        return f"--{name}={value} has no effect, and nobody says so"
    return None


@pytest.mark.parametrize(("mode", "task", "surroundings"), _CASES, ids=lambda x: x or "any")
def test_flag_has_an_effect_or_is_named_or_is_refused(mode, task, surroundings):
    given = _surrounded(command_lines.base(mode, task), _SURROUNDINGS[surroundings])
    resolved, before = command_lines.completed(given)
    assert not resolved.without_effect
    problems = [_problem(name, given, before) for name in FLAGS if name not in given]
    assert list(filter(None, problems)) == []


def test_preset_in_a_mode_that_does_not_train_changes_nothing():
    for preset in TABLES.presets:
        for mode in TABLES.commands:
            given = command_lines.base(mode, "")
            if command_lines.reads_objective(mode):
                continue
            _, before = command_lines.completed(given)
            resolved, after = command_lines.completed({**given, "preset": preset})
            assert len(resolved.without_effect) == 1
            assert command_lines.received(after) == command_lines.received(before)


def _help(*words, capsys):
    """Returns the names of the flags that the help shows."""
    with pytest.raises(SystemExit) as ended:
        program.parse(*words, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    entries = [line.strip() for line in text.splitlines() if line[:4] == "  --"]
    return [entry[2:].removeprefix("[no]").split("=")[0] for entry in entries]


def test_help_shows_every_flag_once(capsys):
    shown = _help(capsys=capsys)
    assert sorted(shown) == sorted(FLAGS)


@functools.cache
def _values(mode, task, surroundings):
    """Returns flags of a command line, and their completed values."""
    given = _surrounded(command_lines.base(mode, task), _SURROUNDINGS[surroundings])
    return given, command_lines.completed(given)[1]


def _is_effective(name, mode, task):
    """Returns whether a flag has an effect in some surroundings of a task."""
    for surroundings in _SURROUNDINGS:
        given, before = _values(mode, task, surroundings)
        if name in given:
            return True
        value = command_lines.sample(name, before)
        try:
            resolved, _ = command_lines.completed({**given, name: value})
        except ValueError:
            continue
        if not any(f"--{name} " in line for line in resolved.without_effect):
            return True
    return False


@pytest.mark.parametrize(
    ("words", "mode", "tasks"),
    [
        *((f"--mode={x}", x, [""]) for x in ("eval", "probe", "export")),
        *((f"--mode={x}", x, [""]) for x in ("embed", "predict")),
        ("--mode=train", "train", ["relic", "semppl", "finetune"]),
        ("--mode=check_tpu", "check_tpu", ["rpc", "finetune"]),
        *((f"--objective={x}", "train", [x]) for x in TABLES.objectives),
        ("--train_mode=finetune", "train", ["finetune"]),
        ("--mode=selftest --objective=relic", "selftest", ["relic"]),
    ],
)
def test_help_shows_all_flags_that_can_have_an_effect_and_no_group_unread(
    words, mode, tasks, capsys
):
    shown = _help(*words.split(), capsys=capsys)
    assert len(shown) == len(set(shown))
    groups = TABLES.commands[mode].groups
    for name, flag in FLAGS.items():
        group = schema.ObjectiveChoice if flag.owners else flag.item.group
        if group not in groups:
            assert name not in shown
        elif name not in shown:
            assert not any(_is_effective(name, mode, task) for task in tasks)


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        ("--train_mode=finetune", "temperature augmentation target_decay"),
        ("--objective=simclr", "target_decay sweep_learning_rate alpha knn_k"),
        ("--objective=byol", "temperature fine_tune_after_block num_negatives"),
        ("--mode=predict", "evaluate_target temperature learning_rate"),
        ("--mode=eval", "checkpoint train_epochs temperature"),
    ],
)
def test_help_hides_flags_that_cannot_have_an_effect(words, hidden, capsys):
    assert not set(hidden.split()) & set(_help(words, capsys=capsys))


def test_help_with_objective_shows_its_hyperparameters_and_defaults(capsys):
    with pytest.raises(SystemExit):
        program.parse("--objective=rpc", "--help")
    text = capsys.readouterr().out
    entry = text[text.index("  --temperature=NUMBER") :].split("\n  --")[0]
    assert entry.rstrip().endswith("Default: 128.")
