# SPDX-License-Identifier: Apache-2.0
"""The command line: what is documented parses, and means what it says."""

import dataclasses
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import tensorflow as tf
from absl import flags

import data_util
import model
import run
from contrastive.commands import experiment
from contrastive.config import methods
from contrastive.training import trainer
from contrastive.weights import checkpoint
from tests.support import processes, program
from tests.support.replica_run import architecture

_ROOT = pathlib.Path(run.__file__).parent

# Of google-research/simclr, tf2/README.md.
_SIMCLR_README = [
    """run.py --train_mode=pretrain --train_batch_size=512 --train_epochs=1000
    --learning_rate=1.0 --weight_decay=1e-4 --temperature=0.5
    --dataset=cifar10 --image_size=32 --eval_split=test --resnet_depth=18
    --use_blur=False --color_jitter_strength=0.5 --model_dir=/tmp/simclr_test
    --use_tpu=False""",
    """run.py --train_mode=pretrain --train_batch_size=4096 --train_epochs=100
    --temperature=0.1 --learning_rate=0.075 --learning_rate_scaling=sqrt
    --weight_decay=1e-4 --dataset=imagenet2012 --image_size=224
    --eval_split=validation --data_dir=$DATA_DIR --model_dir=$MODEL_DIR
    --use_tpu=True --tpu_name=$TPU_NAME --train_summary_steps=0""",
    "run.py --dataset=imagenet2012_subset/1pct",
    "run.py --dataset=imagenet2012_subset/10pct",
]
# Of RPC's vision/README.md (SimCLR's TF1 README has the same).
_LINEAR_EVALUATION = [
    """run.py --mode=train_then_eval --train_mode=finetune
    --fine_tune_after_block=4 --zero_init_logits_layer=True
    --variable_schema='(?!global_step|(?:.*/|^)Momentum|head)'
    --global_bn=False --optimizer=momentum --learning_rate=0.1
    --weight_decay=0.0 --train_epochs=100 --train_batch_size=512
    --warmup_epochs=0 --dataset=cifar10 --image_size=32 --eval_split=test
    --resnet_depth=18 --checkpoint=/tmp/simclr_test
    --model_dir=/tmp/simclr_test_ft --use_tpu=False""",
    """run.py --mode=train_then_eval --train_mode=finetune
    --fine_tune_after_block=4 --zero_init_logits_layer=True
    --variable_schema='(?!global_step|(?:.*/|^)Momentum|head)'
    --global_bn=False --optimizer=momentum --learning_rate=0.1
    --weight_decay=1e-6 --train_epochs=90 --train_batch_size=4096
    --warmup_epochs=0 --dataset=imagenet2012 --image_size=224
    --eval_split=validation --data_dir=$DATA_DIR --model_dir=$MODEL_DIR
    --checkpoint=$CHKPT_DIR --use_tpu=True --tpu_name=$TPU_NAME
    --train_summary_steps=0""",
]
# Of RPC's gpu_pretrain_finetune_cifar.sh, tpu_pretrain_finetune_resnet50.sh
# and tpu_pretrain_finetune_resnet128.sh, with their variables filled in.
_RPC_SCRIPTS = [
    """run.py --train_mode=pretrain --train_batch_size=512 --train_epochs=100
    --temperature=128 --learning_rate=1.0 --learning_rate_scaling=linear
    --weight_decay=1e-4 --dataset=cifar10 --image_size=32 --eval_split=test
    --model_dir=checkpoint/chi --use_tpu=False --train_summary_steps=0
    --sk_ratio 0.0 --width_multiplier 1 --resnet_depth 18 --loss_type chi
    --alpha=0.0 --beta=0.001 --gamma=1.0 --hidden_norm=False""",
    """run.py --train_mode=pretrain --train_batch_size=512 --train_epochs=100
    --temperature=0.5 --learning_rate=1.0 --learning_rate_scaling=linear
    --weight_decay=1e-4 --dataset=cifar10 --image_size=32 --eval_split=test
    --model_dir=checkpoint/nce --use_tpu=False --train_summary_steps=0
    --sk_ratio 0.0 --width_multiplier 1 --resnet_depth 18 --loss_type nce
    --hidden_norm=True""",
    """run.py --mode=train_then_eval --train_mode=finetune
    --fine_tune_after_block=0 --zero_init_logits_layer=True
    --variable_schema='(?!global_step|(?:.*/|^)Momentum|head)'
    --global_bn=True --optimizer=momentum --learning_rate=0.1
    --weight_decay=0 --train_epochs=100 --train_batch_size=512
    --warmup_epochs=0 --dataset=cifar10 --image_size=32 --eval_split=test
    --model_dir=checkpoint/chi_ft --checkpoint=checkpoint/chi --use_tpu=False
    --train_summary_steps=0 --width_multiplier 1 --resnet_depth 18
    --sk_ratio 0.0 --loss_type chi --alpha 0.0 --beta 0.001 --gamma 1.0""",
    *(
        f"""run.py --train_mode=pretrain --train_batch_size=4096
    --train_epochs=100 --temperature=32 --learning_rate=0.1
    --learning_rate_scaling=sqrt --weight_decay=1e-4 --dataset=imagenet2012
    --image_size=224 --eval_split=validation --data_dir=$DATA_DIR
    --model_dir=$MODEL_DIR --use_tpu=True --tpu_name=$TPU_NAME
    --train_summary_steps=0 --sk_ratio 0.0625 --width_multiplier {width}
    --resnet_depth {depth} --loss_type chi --alpha=0.3 --beta={beta}
    --gamma={gamma} --hidden_norm=false"""
        for width, depth, beta, gamma in (
            (1, 50, 0.01, 0.1),
            (2, 152, 0.001, 0.01),
        )
    ),
    """run.py --mode=train_then_eval --train_mode=finetune
    --fine_tune_after_block=0 --zero_init_logits_layer=True
    --variable_schema='(?!global_step|(?:.*/|^)Momentum|head)'
    --global_bn=True --optimizer=momentum --learning_rate=0.16
    --weight_decay=0 --train_epochs=90 --train_batch_size=4096
    --warmup_epochs=0 --dataset=imagenet2012 --image_size=224
    --eval_split=validation --data_dir=gs://bucket/tensorflow_datasets
    --model_dir=$MODEL_DIR --checkpoint=$CHKPT_DIR --use_tpu=True
    --tpu_name=$TPU_NAME --train_summary_steps=0 --width_multiplier 2
    --resnet_depth 152 --sk_ratio 0.0625 --loss_type chi --alpha 0.3
    --beta 0.001 --gamma 0.01""",
]


def _own_readme():
    """The commands in the code blocks of README.md."""
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", (_ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "python run.py" in line]


def _own_script(name, **environment):
    """The commands that a script runs, by letting `echo` run them."""
    variables = {"PYTHON": "echo", **environment}
    finished = processes.run("bash", name, "--seed=7", environment=variables)
    return finished.stdout.splitlines()


def _parse(command):
    """Returns the settings and their sources for a command line."""
    words = shlex.split(command)
    if "run.py" in words:
        words = words[words.index("run.py") + 1 :]
    return program.resolve(*words)


@pytest.mark.parametrize(
    "command", _SIMCLR_README + _LINEAR_EVALUATION + _RPC_SCRIPTS
)
def test_commands_of_the_programs_before_this_one(command, monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    settings, _ = _parse(command)
    for name, value in re.findall(r"--(\w+)[= ]([^\s']+)", command):
        name = {"loss_type": "objective"}.get(name, name)
        value = {"chi": "rpc", "nce": "simclr"}.get(value, value)
        got = getattr(settings, name)
        if name == "variable_schema":
            assert got == "(?!global_step|(?:.*/|^)Momentum|head)"
        elif isinstance(got, bool):
            assert got == (value.lower() == "true")
        elif isinstance(got, str):
            assert got == value
        else:
            assert float(got) == float(value)
    # Once for each flag that does nothing.
    silent = {"--variable_schema"} if "variable_schema" in command else set()
    if "finetune" in command and "loss_type" in command:
        silent |= {"--objective", "--alpha", "--beta", "--gamma"}
    assert {line.split()[0] for line in warnings} == silent
    assert len(warnings) == len(silent)


def test_own_readme_commands_parse(monkeypatch):
    # Evaluation waits for the run it follows; here there is none.
    monkeypatch.setattr(run, "_wait_for_run", lambda *_: None)
    commands = _own_readme()
    assert len(commands) >= 5
    for command in commands:
        command = command.split("python ")[1]
        _parse(command)


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        ("gpu_pretrain_finetune_cifar.sh", {"TRAIN_STEPS": "20"}),
        ("gpu_pretrain_finetune_cifar.sh", {"OBJECTIVE": "nwj"}),
        ("tpu_pretrain_imagenet.sh", {"STORAGE_BUCKET": "/bucket"}),
    ],
)
def test_own_scripts_parse(script, environment):
    commands = _own_script(script, **environment)
    assert len(commands) == 2
    for command, mode in zip(commands, ["pretrain", "finetune"], strict=True):
        settings, _ = _parse(f"run.py {command.split('run.py')[1]}")
        assert settings.train_mode == mode
        assert settings.seed == 7
        if "TRAIN_STEPS" in environment:
            assert settings.train_steps == 20


def test_gpu_script_is_the_recipe_of_the_rpc_paper():
    pretrain, _ = _own_script("gpu_pretrain_finetune_cifar.sh")
    settings, _ = _parse(f"run.py {pretrain.split('run.py')[1]}")
    expected = {
        "temperature": 128,
        "alpha": 0,
        "beta": 0.001,
        "gamma": 1,
        "hidden_norm": False,
        "learning_rate": 1.0,
        "weight_decay": 1e-4,
        "train_batch_size": 512,
        "resnet_depth": 18,
        "warmup_epochs": 10,
        "optimizer": "lars",
    }
    assert {k: getattr(settings, k) for k in expected} == expected


@pytest.mark.parametrize("objective", methods.METHODS)
def test_unset_flags_take_the_objective_s_defaults(objective):
    flag = "relic --use_siglip" if objective == "siglip" else objective
    settings, sources = _parse(f"run.py --objective={flag}")
    method = methods.METHODS[objective]
    for name, value in method.defaults.items():
        assert getattr(settings, name) == value
        assert sources[name] == objective


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
    "small_crop_area": ["0.05", "0.14"],
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
def test_presets_are_as_published(preset, expected):
    settings, _ = _parse(f"run.py --preset={preset} --dataset=imagenet2012")
    assert {name: getattr(settings, name) for name in expected} == expected


def test_presets_are_of_flags_and_the_command_line_wins():
    for preset, values in methods.PRESETS.items():
        settings, sources = _parse(f"run.py --preset={preset} --seed=3")
        for name, value in values.items():
            assert getattr(settings, name) == value, (preset, name)
            assert sources[name] == f"preset {preset}"
        assert settings.seed == 3
    settings, _ = _parse("run.py --preset=byol_300 --train_epochs=7")
    assert (settings.train_epochs, settings.objective) == (7, "byol")


def test_relic_train_s_options_have_a_flag():
    cifar10, _ = _parse(_RELIC_TRAIN[0])
    assert cifar10.objective == "relic"
    assert cifar10.target_decay == 0.99
    assert cifar10.mixed_precision
    assert (cifar10.num_large_views, cifar10.num_small_views) == (2, 4)
    stl10, _ = _parse(_RELIC_TRAIN[1])
    assert stl10.objective == "siglip"
    assert stl10.optimizer == "adam"
    assert stl10.kl_form == "transpose_reversed"


def test_relic_without_a_target_is_the_paper_s_first_variant():
    settings, _ = _parse("run.py --objective=relic --target_network=false")
    assert settings.proj_hidden_dim == (4096, 2048, 1024, 512)
    assert settings.proj_out_dim == 128
    assert settings.temperature == 0.1
    assert not settings.predictor
    architecture = experiment.make_architecture(_sized(settings), 10)
    assert not architecture.target_network
    assert not architecture.predictor


def _sized(settings):
    """What the data says."""
    settings.image_size = settings.image_size or 32
    settings.small_image_size = settings.small_image_size or 16
    settings.channels, settings.stem = 3, "cifar"
    settings.queue_size = settings.queue_size or 64
    return settings


def test_views_alternate_and_only_large_ones_lose_their_background():
    settings, _ = _parse(
        "run.py --objective=relicv2 --saliency=spectral --num_large_views=3"
    )
    views = experiment.make_views(_sized(settings))
    assert [view.size for view in views] == [32, 32, 32, 16, 16]
    assert [view.blur_probability for view in views] == [1, 0.1, 1, 0.1, 0.1]
    assert [v.mask_probability for v in views] == [0.1, 0.1, 0.1, 0, 0]
    # As large as they are said to be; no crop is redrawn for being small.
    boxes = data_util.random_crop_boxes(
        data_util.example_keys(0, 0, tf.range(1000), 3), 375, 500, views[3]
    )
    areas = tf.reduce_prod(boxes[:, 2:], axis=1).numpy() / (375 * 500)
    assert views[3].crop_area == (0.05, 0.14)
    np.testing.assert_allclose(np.quantile(areas, [0, 0.5, 1]),
                               [0.05, 0.089, 0.14], atol=0.004)  # fmt: skip
    # Nothing to remove it by.
    settings, _ = _parse("run.py --objective=relicv2")
    for view in experiment.make_views(_sized(settings)):
        assert view.mask_probability == 0


@pytest.mark.parametrize(
    ("words", "blur"),
    [
        ("--objective=relic", 0),
        ("--objective=relic --blur_probability=0.3", 0.3),
        # Another augmentation keeps what it is.
        ("--preset=relic_pytorch_cifar10", 1),
        ("--objective=byol --augmentation=simclr", 0.5),
        ("--objective=byol --sym_aug", 0.5),
    ],
)
def test_small_images_are_blurred_where_that_is_asked_for(words, blur):
    settings, sources = _parse(f"run.py {words} --dataset=photo_patches")
    settings = experiment.Run(settings, sources).settings
    assert settings.image_size == 32
    for view in experiment.make_views(settings):
        assert view.blur_probability == blur


def test_what_has_no_effect_is_said_and_has_none(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    words = "--dataset=photo_patches --objective=rpc --sweep_learning_rate=1,2"
    settings, sources = _parse(f"{words} --gradient_penalty_weight=10")
    assert sum("has no effect" in line for line in warnings) == 2
    assert not settings.sweep_learning_rate
    prepared = experiment.Run(settings, sources)
    config = experiment.make_train_config(
        prepared.settings, prepared.train_data, 1
    )
    assert config.gradient_penalty_weight == 0

    words = "--dataset=photo_patches --train_mode=finetune --checkpoint=none"
    settings, _ = _parse(f"{words} --accumulate_steps=3")
    assert "--accumulate_steps has no effect" in warnings[-1]
    assert settings.accumulate_steps == 1


def test_from_scratch_is_said_by_none():
    settings, _ = _parse("run.py --train_mode=finetune --checkpoint=none")
    assert settings.checkpoint is None
    with pytest.raises(ValueError, match="the run to look at"):
        _parse("run.py --mode=probe --checkpoint=none")


def test_a_preset_is_of_pretraining(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    settings, _ = _parse(
        "run.py --train_mode=finetune --checkpoint=none --preset=relicv2_300"
    )
    assert settings.weight_decay == 0
    assert settings.train_batch_size == 512
    assert warnings == ["--preset has no effect: it is of pretraining."]


def test_a_preset_of_evaluation_says_what_is_trained(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    for preset, values in methods.EVALUATION_PRESETS.items():
        settings, sources = _parse(
            f"run.py --preset={preset} --checkpoint=none --momentum=0.8"
        )
        for name, value in values.items():
            if name != "momentum":
                assert getattr(settings, name) == value, (preset, name)
                assert sources[name] == f"preset {preset}"
        assert settings.train_mode == "finetune"
        assert settings.momentum == 0.8
    assert not warnings
    with pytest.raises(ValueError, match="train_mode=finetune"):
        _parse(
            "run.py --preset=linear_eval_byol --checkpoint=none "
            "--train_mode=pretrain"
        )


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
def test_what_is_given_is_not_searched_for(flag, rates, epochs):
    settings, _ = _parse(
        f"run.py --preset=semi_supervised_byol_1pct --checkpoint=none {flag}"
    )
    assert settings.sweep_learning_rate == rates
    assert settings.sweep_train_epochs == epochs


def test_flags_of_another_mode_are_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    _parse("run.py --knn_k=5 --top_k=2 --held_out_examples=7")
    assert warnings == [
        "--knn_k has no effect: it is of --mode=probe.",
        "--top_k has no effect: it is of --mode=predict.",
        "--held_out_examples has no effect: it is of fine-tuning.",
    ]


def test_flags_that_idle_beside_others_are_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    _parse(
        "run.py --objective=byol --color_jitter_strength=0.5 "
        "--small_crop_area=0.1,0.2 --num_proj_layers=2 --mask_probability=0.5"
    )
    _parse("run.py --objective=relic --target_network=false --gamma=0.9")
    assert [line.split()[0] for line in warnings] == [
        "--color_jitter_strength",
        "--mask_probability",
        "--small_crop_area",
        "--num_proj_layers",
        "--gamma",
    ]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("", (512,)), ("--target_network=false", (4096, 2048, 1024, 512))],
)
def test_small_images_have_defaults_of_their_own(flag, expected, tmp_path):
    settings, sources = _parse(
        f"run.py --objective=relic --dataset=photo_patches {flag} "
        f"--resnet_depth=10 --width_multiplier=0.125 --model_dir={tmp_path}"
    )
    program = experiment.Run(settings, sources)
    assert program.settings.proj_hidden_dim == expected
    assert program.settings.target_decay == 0.99
    views = experiment.make_views(program.settings)
    assert [view.blur_probability for view in views] == [0, 0]


def test_a_learnt_temperature_is_of_losses_that_have_one():
    cases = {"simclr": False, "byol": False, "relicv2": True, "semppl": True}
    for objective, expected in cases.items():
        settings, _ = _parse(
            f"run.py --objective={objective} --learnable_temperature"
        )
        architecture = experiment.make_architecture(_sized(settings), 10)
        assert architecture.learnable_temperature == expected


def test_two_views_have_neither_target_nor_predictor():
    settings, _ = _parse("run.py --target_network --predictor")
    architecture = experiment.make_architecture(_sized(settings), 10)
    assert not architecture.target_network
    assert not architecture.predictor


def test_only_semppl_has_a_queue():
    for objective in ("semppl", "relicv2"):
        settings, _ = _parse(f"run.py --objective={objective}")
        architecture = experiment.make_architecture(_sized(settings), 10)
        expected = (4, 64) if objective == "semppl" else ()
        assert architecture.queue_shape == expected


def test_the_command_line_wins():
    settings, sources = _parse("run.py --objective=rpc --temperature=7")
    assert settings.temperature == 7
    assert sources["temperature"] == "command line"


def test_fine_tuning_takes_the_architecture_from_the_checkpoint(tmp_path):
    before = {"resnet_depth": 34, "sk_ratio": 0.0625, "learning_rate": 9.0}
    checkpoint.write_run(str(tmp_path), {"flags": before})
    settings, sources = _parse(
        f"run.py --train_mode=finetune --checkpoint={tmp_path} --sk_ratio=0"
    )
    assert settings.resnet_depth == 34
    assert sources["resnet_depth"] == "its run"
    assert settings.sk_ratio == 0
    assert settings.learning_rate == 0.1  # not of the pretraining
    assert sources["learning_rate"] == "fine-tuning"


def test_a_flag_of_another_objective_is_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    _parse("run.py --objective=simclr --alpha=1")
    assert warnings == ["--alpha has no effect: the objective simclr has none."]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset=cifar1", "cifar10"),
        ("--dataset=photo_patches --train_split=trian", "train"),
        ("--dataset=photo_patches --image_size=64", "exceeds the images"),
        ("--dataset=photo_patches --train_batch_size=20000", "10000"),
        ("--dataset=/nowhere/at/all", "/nowhere/at/all"),
        ("--dataset=photo_patches --fine_tune_after_block=2", "pretrain"),
        ("--train_mode=finetune --dataset=photo_patches", "--checkpoint"),
        (
            "--train_mode=finetune --dataset=photo_patches "
            "--checkpoint=/nowhere",
            "/nowhere",
        ),
        ("--mode=probe --dataset=photo_patches", "--checkpoint"),
        ("--mode=export", "--checkpoint"),
        ("--mode=export --checkpoint=/nowhere", "/nowhere"),
        ("--mode=export --checkpoint=. --format=tflite", "saved_model"),
        ("--dataset=photo_patches --resnet_depth=19", "19"),
        ("--dataset=photo_patches --width_multiplier=-1", "-1"),
        ("--dataset=photo_patches --crop_area=0.5,0.1", "crop_area"),
        ("--dataset=photo_patches --ft_proj_selector=9", "9"),
        ("--dataset=photo_patches --model_dir=/proc/x", "/proc/x"),
        ("--dataset=photo_patches --use_tpu", "No TPU"),
        ("--dataset=photo_patches --objective=wpc --remat", "--remat is not"),
        ("--dataset=photo_patches --temperature=0", "temperature"),
        ("--dataset=photo_patches --num_small_views=1", "two large views"),
        (
            "--dataset=photo_patches --objective=byol --num_large_views=1",
            "two views",
        ),
        (
            "--dataset=photo_patches --objective=relic --gamma=0.9 "
            "--target_decay=0.8",
            "mean the same",
        ),
        ("--dataset=photo_patches --objective=relic --gamma=2", "--gamma"),
        ("--dataset=photo_patches --crop_area=0.01,0.05", "crop_area"),
        (
            "--dataset=photo_patches --objective=rpc --use_siglip",
            "--objective=relic",
        ),
        (
            "--dataset=photo_patches --objective=semppl --queue_size=9",
            "queue",
        ),
        (
            "--dataset=photo_patches --objective=semppl "
            "--labels_per_class=5 --labelled_fraction=0.1",
            "both choose",
        ),
        (
            "--dataset=photo_patches --objective=semppl "
            "--labels_per_class=100000",
            "100000",
        ),
        (
            "--dataset=photo_patches --objective=relicv2 --mask_dir=/nowhere",
            "/nowhere",
        ),
        (
            "--dataset=photo_patches --objective=relicv2 --temperature=-1",
            "temperature",
        ),
    ],
)
def test_bad_input_is_one_error_before_any_compute(
    words, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        trainer, "train", lambda *_: pytest.fail("training started")
    )
    small = ["--resnet_depth=10", "--width_multiplier=0.125"]
    if "--model_dir" not in words:
        small.append(f"--model_dir={tmp_path}")
    assert program.main(*small, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert "Traceback" not in error


def test_an_export_says_what_it_did_and_what_not(tmp_path, capsys):
    networks = model.build_networks(
        dataclasses.replace(architecture("simclr"), channels=1)
    )
    path = tmp_path / "networks.safetensors"
    checkpoint.save_tensors(networks, str(path))
    command = (
        f"--mode=export --checkpoint={path} --export_dir={tmp_path / 'out'} "
        "--format=safetensors,torchvision --seed=1"
    )
    assert program.main(*command.split()) == 2
    output = capsys.readouterr()
    assert "networks.safetensors: largest difference 0.0e+00" in output.out
    assert "torchvision  not written: " in output.out
    assert "Error: not written: torchvision." in output.err
    card = json.loads((tmp_path / "out" / "export.json").read_text())
    assert card["input"]["channels"] == 1
    assert card["input"]["size"] == 32


@pytest.mark.parametrize(
    "word", ["--train_batch_size=-1", "--train_steps=-5", "--temprature=1",
             "--momentum=1.5", "--learning_rate=-1"]
)  # fmt: skip
def test_malformed_flags_are_refused(word):
    with pytest.raises(flags.Error, match=word.split("=")[0].strip("-")):
        program.resolve(word)


def test_a_tpu_starts_from_the_weights_of_a_cpu(tmp_path, monkeypatch):
    """Its random numbers are others; here, ones stand for them."""

    def weights():
        settings, sources = _parse(
            "run.py --dataset=photo_patches --resnet_depth=10 "
            "--width_multiplier=0.125 --objective=byol"
        )
        networks = experiment.Run(settings, sources).networks
        return {
            name: part.get_weights() for name, part in networks.models().items()
        }

    expected, build = weights(), model.build_networks

    def build_on(*args, **more):
        networks = build(*args, **more)
        if tf.distribute.in_cross_replica_context():  # in the strategy's scope
            for part in networks.models().values():
                part.set_weights([np.ones_like(x) for x in part.get_weights()])
        return networks

    monkeypatch.setattr(model, "build_networks", build_on)
    strategy = tf.distribute.OneDeviceStrategy
    monkeypatch.setattr(tf.distribute, "TPUStrategy", strategy)
    found = weights()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        for one, other in zip(found[name], values, strict=True):
            np.testing.assert_array_equal(one, other)
