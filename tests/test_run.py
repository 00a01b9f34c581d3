# SPDX-License-Identifier: Apache-2.0
"""The program: documented commands, errors, help, and its log."""

import logging
import os
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags, logging as absl_logging

import run
from contrastive.commands import evaluate
from contrastive.training import loop
from tests.support import processes, program

_ROOT = pathlib.Path(run.__file__).parent


def _own_readme():
    """The commands in the code blocks of README.md."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (_ROOT / "README.md").read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "python run.py" in line]


def _own_script(name, **environment):
    """The commands that a script runs, by letting `echo` run them."""
    variables = {"PYTHON": "echo", **environment}
    finished = processes.run("bash", name, "--seed=7", environment=variables)
    return finished.stdout.splitlines()


def _parse(command):
    """Resolves a command line, which may start with run.py."""
    words = shlex.split(command)
    if "run.py" in words:
        words = words[words.index("run.py") + 1 :]
    return program.resolve(*words)


def test_readme_commands_are_accepted(monkeypatch):
    # Evaluation waits for the run it follows; here there is none.
    monkeypatch.setattr(evaluate, "_wait_for_run", lambda *_: {"flags": {}})
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
def test_script_commands_are_accepted(script, environment):
    commands = _own_script(script, **environment)
    assert len(commands) == 2
    for command, mode in zip(commands, ["pretrain", "finetune"], strict=True):
        resolved = _parse(f"run.py {command.split('run.py')[1]}")
        assert resolved["train_mode"] == mode
        assert resolved["seed"] == 7
        if "TRAIN_STEPS" in environment:
            assert resolved["train_steps"] == 20


def test_gpu_script_equals_the_recipe_of_the_rpc_paper():
    pretrain, _ = _own_script("gpu_pretrain_finetune_cifar.sh")
    resolved = _parse(f"run.py {pretrain.split('run.py')[1]}")
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
    assert {k: resolved[k] for k in expected} == expected


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
            "--train_mode=finetune --dataset=photo_patches --checkpoint=/nowhere",
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
            "--dataset=photo_patches --objective=relic --gamma=0.9 --target_decay=0.8",
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
            "--dataset=photo_patches --objective=semppl --labels_per_class=100000",
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
def test_main_wrong_input_is_one_error_before_any_compute(
    words, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("training started"))
    small = ["--resnet_depth=10", "--width_multiplier=0.125"]
    if "--model_dir" not in words:
        small.append(f"--model_dir={tmp_path}")
    assert program.main(*small, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "word", ["--train_batch_size=-1", "--train_steps=-5", "--temprature=1",
             "--momentum=1.5", "--learning_rate=-1"]
)  # fmt: skip
def test_parse_malformed_flag_raises(word):
    with pytest.raises(flags.Error, match=word.split("=")[0].strip("-")):
        program.resolve(word)


@pytest.mark.parametrize(
    ("level", "folder", "is_shown"),
    [
        (logging.INFO, "tensorflow_datasets", False),
        (logging.WARNING, "tensorflow_datasets", False),
        (logging.ERROR, "tensorflow_datasets", True),
        (logging.INFO, os.path.dirname(run.__file__), True),
        (logging.INFO, os.path.dirname(run.__file__) + "/contrastive", True),
        (logging.INFO, os.path.dirname(run.__file__) + "/.venv/lib", False),
    ],
)
def test_log_of_libraries_shows_errors_alone(level, folder, is_shown):
    run.set_up_log()
    record = logging.LogRecord("absl", level, f"{folder}/x.py", 1, "", (), None)
    handler = absl_logging.get_absl_handler()
    assert bool(handler.filter(record)) == is_shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--mode=probe --help", 0),
        ("--temprature=1", 2),
        ("--temperature=nan", 2),
        ("--dry_run --dataset=photo_patches", 0),
        ("--dry_run --dataset=cifar10", 0),
    ],
)
def test_run_quick_command_lines_import_no_tensorflow(words, code):
    finished = processes.run(
        sys.executable, "-X", "importtime", "run.py", *words.split(), code=code
    )
    imported = {
        line.rpartition("|")[2].strip()
        for line in finished.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "absl.flags" in imported
    banned = {"tensorflow", "keras", "tensorflow_datasets"}
    assert not {name.partition(".")[0] for name in imported} & banned


def test_run_help_and_plan_go_to_standard_output(tmp_path):
    finished = processes.run("run.py", "--help")
    assert "--learning_rate=NUMBER" in finished.stdout
    assert finished.stderr == ""
    plan = processes.run("run.py", "--dry_run", "--dataset=cifar10", f"--model_dir={tmp_path}")
    assert plan.stdout.startswith("training:")
