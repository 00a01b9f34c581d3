# SPDX-License-Identifier: Apache-2.0
"""Tests of `resolve.py`: layers of values, and flags without effect."""

import dataclasses
import shlex

import pytest

import objective
import run
from contrastive import run_record
from contrastive.config.completion import complete
from contrastive.config.fields import Derived
from contrastive.training.config import make_config
from tests.support import command_lines, program


def _parse(command):
    """Resolves a command line, which may start with run.py."""
    words = shlex.split(command)
    if "run.py" in words:
        words = words[words.index("run.py") + 1 :]
    return program.resolve(*words)


@pytest.mark.parametrize("name", objective.OBJECTIVES)
def test_resolve_unset_flags_take_defaults_of_the_objective(name):
    words = "relic --use_siglip" if name == "siglip" else name
    cls = objective.OBJECTIVES[name]
    if "mask_probability" in cls.defaults:  # Masks give it its effect.
        words += " --saliency=spectral"
    resolved = _parse(f"run.py --objective={words}")
    assert resolved["objective"] == name
    hyperparameters = {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if not isinstance(field.default, Derived)
    }
    for flag, value in (cls.defaults | hyperparameters).items():
        assert resolved[flag] == value
        assert resolved.origins[flag] == name
    if name == "siglip":
        alone = _parse("run.py --objective=siglip").values
        assert {**alone, "use_siglip": True} == resolved.values


def test_resolve_command_line_wins():
    resolved = _parse("run.py --objective=rpc --temperature=7")
    assert resolved["temperature"] == 7
    assert resolved.origins["temperature"] == "command line"


def test_resolve_checkpoint_none_is_training_from_scratch(capsys):
    resolved = _parse("run.py --train_mode=finetune --checkpoint=none")
    assert resolved["checkpoint"] is None
    assert program.main("--mode=probe", "--checkpoint=none") == 2
    assert "the run to look at" in capsys.readouterr().err


def test_resolve_fine_tuning_takes_the_architecture_of_the_checkpoint(tmp_path):
    before = {"resnet_depth": 34, "sk_ratio": 0.0625, "learning_rate": 9.0}
    run_record.write_run(str(tmp_path), {"flags": before})
    resolved = _parse(f"run.py --train_mode=finetune --checkpoint={tmp_path} --sk_ratio=0")
    assert resolved["resnet_depth"] == 34
    assert resolved.origins["resnet_depth"] == "its run"
    assert resolved["sk_ratio"] == 0
    assert resolved["learning_rate"] == 0.1  # not of the pretraining
    assert resolved.origins["learning_rate"] == "fine-tuning"


def test_resolve_flags_of_another_mode_are_named(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    _parse("run.py --knn_k=5 --top_k=2 --held_out_examples=7")
    assert sorted(warnings) == [
        "--held_out_examples has no effect: it applies only in fine-tuning.",
        "--knn_k has no effect: it applies only with --mode=probe.",
        "--top_k has no effect: it applies only with --mode=predict.",
    ]


def test_resolve_flags_without_effect_beside_others_are_named(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    _parse(
        "run.py --objective=byol --color_jitter_strength=0.5 "
        "--small_crop_area=0.1,0.2 --num_proj_layers=2 --mask_probability=0.5"
    )
    _parse("run.py --objective=relic --target_network=false --gamma=0.9")
    assert sorted(line.split()[0] for line in warnings) == [
        "--color_jitter_strength",
        "--gamma",
        "--mask_probability",
        "--num_proj_layers",
        "--small_crop_area",
    ]


def test_resolve_flag_of_another_objective_is_named(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    _parse("run.py --objective=simclr --alpha=1")
    assert warnings == [
        "--alpha has no effect: it applies only to --objective=rpc or relic or siglip."
    ]


def test_resolve_flag_without_effect_is_reset(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    words = "--dataset=photo_patches --objective=rpc --sweep_learning_rate=1,2"
    resolved = _parse(f"{words} --gradient_penalty_weight=10")
    assert sum("has no effect" in line for line in warnings) == 2
    assert not resolved["sweep_learning_rate"]
    assert "gradient_penalty_weight" not in resolved.values
    facts = command_lines.Facts(image_size=(32, 32))
    config = make_config(complete(resolved, facts), facts, 1)
    assert config.objective == objective.RPC()

    words = "--dataset=photo_patches --train_mode=finetune --checkpoint=none"
    resolved = _parse(f"{words} --accumulate_steps=3")
    assert "--accumulate_steps has no effect" in warnings[-1]
    assert resolved["accumulate_steps"] == 1
