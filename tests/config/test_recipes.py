# SPDX-License-Identifier: Apache-2.0
"""Tests of `recipes.py`: presets are as published."""

import shlex

import pytest

import run
from contrastive import run_record
from contrastive.config import recipes
from tests.support import program


def _parse(command):
    """Resolves a command line, which may start with run.py."""
    words = shlex.split(command)
    if "run.py" in words:
        words = words[words.index("run.py") + 1 :]
    return program.resolve(*words)


# Of filipbasara0/relic's README, in the words of this program.
_RELIC_TRAIN = [
    """run.py --preset=relic_pytorch_cifar10 --gamma=0.99 --alpha=1.0
    --mixed_precision""",
    """run.py --preset=relic_pytorch_stl10 --use_siglip
    --update_gamma_after_step=1 --update_gamma_every_n_steps=1""",
]


# What the papers and their code say, written once more.
_BYOL = {
    "proj_hidden_dim": (4096,),
    "proj_out_dim": 256,
    "predictor": True,
    "target_network": True,
    "padding": "same",
    "zero_init_residual": False,
    "lars_variant": "deepmind",
    "optimizer": "lars",
    "learning_rate_scaling": "linear",
    "learning_rate_schedule": "cosine",
    "warmup_epochs": 10,
    "augmentation": "byol",
}
_RELICV2 = {
    **_BYOL,
    "num_large_views": 4,
    "num_small_views": 2,
    "temperature": 0.2,
    "contrast_weight": 0.3,
    "invariance_weight": 5,
    "num_negatives": 10,
    "mask_probability": 0.1,
    "small_crop_area": (0.05, 0.14),
    "include_same_view": True,
    "kl_grad": "sg_p",
    "kl_small": "transpose",
    "learning_rate": 0.3,
    "train_batch_size": 4096,
}
_RELIC = {
    **_BYOL,
    "include_same_view": False,
    "kl_grad": "none",
    "alpha": 1,
    "train_epochs": 1000,
    "train_batch_size": 4096,
    "weight_decay": 1.5e-6,
    "target_decay": 0.996,
}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (
            f"byol_{epochs}",
            {
                **_BYOL,
                "objective": "byol",
                "train_epochs": epochs,
                "train_batch_size": 4096,
                "learning_rate": rate,
                "weight_decay": decay,
                "target_decay": tau,
            },
        )
        for epochs, rate, decay, tau in (
            (40, 0.45, 1e-6, 0.97),
            (100, 0.45, 1e-6, 0.99),
            (300, 0.3, 1e-6, 0.99),
            (1000, 0.2, 1.5e-6, 0.996),
        )
    ]
    + [
        ("relic_1000", {**_RELIC, "temperature": 0.3, "learning_rate": 0.2}),
        (
            "relic_1000_no_target",
            {
                **_RELIC,
                "temperature": 0.1,
                "learning_rate": 0.3,
                "target_network": False,
                "target_decay": 0.0,  # reset, because there is no target
                "predictor": False,
                "proj_hidden_dim": (4096, 2048, 1024, 512),
                "proj_out_dim": 128,
            },
        ),
    ]
    + [
        (
            f"{name}_{epochs}",
            {
                **_RELICV2,
                **of_method,
                "train_epochs": epochs,
                "weight_decay": decay,
                "target_decay": tau,
            },
        )
        for epochs, decay, tau in ((300, 1e-6, 0.99), (1000, 1.5e-6, 0.996))
        for name, of_method in (
            ("relicv2", {}),
            (
                "semppl",
                {
                    "semantic_weight": 0.2,
                    "num_semantic_positives": 3,
                    "sempos_negatives": "targets",
                    "drop_same_label_negatives": False,
                },
            ),
        )
    ],
)
def test_preset_equals_its_publication(preset, expected):
    # Masks give --mask_probability its effect.
    masks = "--saliency=spectral" if "mask_probability" in expected else ""
    command = f"run.py --preset={preset} --dataset=imagenet2012 {masks}"
    resolved = _parse(command)
    assert {name: resolved[name] for name in expected} == expected


def test_preset_values_are_taken_and_the_command_line_wins():
    for preset, values in recipes.PRETRAINING.items():
        resolved = _parse(f"run.py --preset={preset} --seed=3")
        for name, value in values.items():
            if (preset, name) != ("relic_1000_no_target", "target_decay"):
                assert resolved[name] == value, (preset, name)
            assert resolved.origins[name] == f"preset {preset}"
        assert resolved["seed"] == 3
    resolved = _parse("run.py --preset=byol_300 --train_epochs=7")
    assert (resolved["train_epochs"], resolved["objective"]) == (7, "byol")


def test_relic_pytorch_presets_equal_its_options():
    cifar10 = _parse(_RELIC_TRAIN[0])
    assert cifar10["objective"] == "relic"
    assert cifar10["target_decay"] == 0.99
    assert cifar10["mixed_precision"]
    assert (cifar10["num_large_views"], cifar10["num_small_views"]) == (2, 4)
    stl10 = _parse(_RELIC_TRAIN[1])
    assert stl10["objective"] == "siglip"
    assert stl10["optimizer"] == "adam"
    assert stl10["kl_form"] == "transpose_reversed"


def test_preset_of_pretraining_in_fine_tuning_has_no_effect(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    resolved = _parse("run.py --train_mode=finetune --checkpoint=none --preset=relicv2_300")
    assert resolved["weight_decay"] == 0
    assert resolved["train_batch_size"] == 512
    assert warnings == ["--preset has no effect: it applies only in pretraining."]


def test_preset_of_evaluation_implies_fine_tuning(tmp_path, monkeypatch):
    run_record.write_run(str(tmp_path), {"flags": {}})
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    for preset, values in recipes.EVALUATION.items():
        resolved = _parse(f"run.py --preset={preset} --checkpoint={tmp_path} --momentum=0.8")
        for name, value in values.items():
            if name != "momentum":
                assert resolved[name] == value, (preset, name)
                assert resolved.origins[name] == f"preset {preset}"
        assert resolved["train_mode"] == "finetune"
        assert resolved["momentum"] == 0.8
    assert not warnings
    with pytest.raises(ValueError, match="train_mode=finetune"):
        _parse("run.py --preset=linear_eval_byol --checkpoint=none --train_mode=pretrain")


@pytest.mark.parametrize(
    ("flag", "rates", "epochs"),
    [
        ("", (0.01, 0.02, 0.05, 0.1, 0.005), (30, 50)),
        ("--learning_rate=0.2", (), (30, 50)),
        ("--train_epochs=3", (0.01, 0.02, 0.05, 0.1, 0.005), ()),
        ("--train_steps=3", (0.01, 0.02, 0.05, 0.1, 0.005), ()),
        ("--sweep_learning_rate=1,2 --learning_rate=3", (1, 2), (30, 50)),
    ],
)
def test_sweep_of_preset_given_value_is_removed(flag, rates, epochs):
    resolved = _parse(f"run.py --preset=semi_supervised_byol_1pct --checkpoint=none {flag}")
    assert resolved["sweep_learning_rate"] == rates
    assert resolved["sweep_train_epochs"] == epochs
