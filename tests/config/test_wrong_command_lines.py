# SPDX-License-Identifier: Apache-2.0
"""Wrong command lines end with one line that names the flag, in an instant."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.support import processes
from tests.support.command_lines import FLAGS

_MODES_OF_FINE_TUNING = "--train_mode=finetune --checkpoint=none"


def _words(name, text):
    """Returns a command line with a value of one flag, which names the flag."""
    return f"--{name}={text}", f"--{name}"


def _malformed():
    """Yields values that no number, choice or truth value has."""
    for name, flag in FLAGS.items():
        item = flag.item
        if item.kind is bool:
            yield _words(name, "maybe")
        elif flag.choices:
            yield _words(name, "nonsense")
            yield _words(name, "")
        elif item.kind in (int, float):
            yield _words(name, "abc")
            if not item.is_tuple or item.info.length:
                yield _words(name, "")
            yield _words(name, "nan")
            yield _words(name, "inf")
            yield _words(name, "1;2")
        if item.kind is int:
            yield _words(name, "1.5")
        if item.is_tuple and item.kind is not str:
            yield _words(name, "1,b")
            yield _words(name, "1,nan")
        if item.info.length:
            yield _words(name, ",".join(["0.5"] * (item.info.length + 1)))


def _out_of_bounds():
    """Yields numbers beyond the bounds of their flags."""
    for name, flag in FLAGS.items():
        item = flag.item
        if item.kind not in (int, float):
            continue
        infos = [x.info for x in flag.owners.values() or [item]]
        count = item.info.length or 1
        step = 1 if item.kind is int else 0.001
        if all(info.positive for info in infos):
            yield _words(name, ",".join(["0"] * count))
            yield _words(name, ",".join(["-1"] * count))
        elif all(info.minimum is not None for info in infos):
            low = item.kind(min(info.minimum for info in infos)) - step
            yield _words(name, ",".join([str(low)] * count))
        if all(info.maximum is not None for info in infos):
            high = item.kind(max(info.maximum for info in infos)) + step
            yield _words(name, ",".join([str(high)] * count))


_LISTS = [
    ("--crop_area=a", "--crop_area"),
    ("--crop_area=0.5,0.1", "--crop_area"),
    ("--crop_area=0.01,0.05 --dry_run --dataset=photo_patches", "crop_area"),
    ("--crop_area=0,0.5", "--crop_area"),
    ("--crop_area=0.5", "--crop_area"),
    ("--small_crop_area=0.2,0.1", "--small_crop_area"),
    ("--small_crop_area=0.1,2", "--small_crop_area"),
    ("--crop_aspect=2,1", "--crop_aspect"),
    ("--crop_aspect=1", "--crop_aspect"),
    ("--blur_sigma=2,1", "--blur_sigma"),
    ("--blur_sigma=0,1", "--blur_sigma"),
    ("--proj_hidden_dim=abc", "--proj_hidden_dim"),
    ("--proj_hidden_dim=512,0", "--proj_hidden_dim"),
    ("--proj_hidden_dim=512,,x", "--proj_hidden_dim"),
    ("--base_filters=64,64", "--base_filters"),
    ("--base_filters=64,64,128,256,0", "--base_filters"),
    ("--sweep_learning_rate=0.1,-1", "--sweep_learning_rate"),
    ("--sweep_train_epochs=1,-5", "--sweep_train_epochs"),
    ("--label_budgets=x", "--label_budgets"),
    ("--label_budgets=0", "--label_budgets"),
    ("--label_budgets=1,200%", "--label_budgets"),
    ("--format=tflite", "--format"),
    ("--format=onnx,tflite", "--format"),
    ("--format=", "--format"),
]
_NAMES = [
    ("--temprature=1", "temprature"),
    ("--learning-rate=1", "learning-rate"),
    ("--lr=1", "lr"),
    ("--nonsense", "nonsense"),
    ("--nouse_blurr", "nouse_blurr"),
    ("--LEARNING_RATE=1", "LEARNING_RATE"),
    ("train", "not a flag: train"),
    ("dataset=cifar10", "not a flag: dataset=cifar10"),
    ("--seed=1 extra words", "not a flag: extra words"),
    ("--seed 1 2", "not a flag: 2"),
    ("--remat false", "not a flag: false"),
    ("--learning_rate", "learning_rate"),
    ("--dataset", "dataset"),
    ("--nolearning_rate", "nolearning_rate"),
    ("--mode=trian --help", "--mode"),
    ("--objective=simclr2 --help", "--objective"),
    ("--resnet_depth=19", "--resnet_depth"),
    ("--resnet_depth=-50", "--resnet_depth"),
    ("--width_multiplier=nan", "--width_multiplier"),
    ("--width_multiplier=0", "--width_multiplier"),
    ("--width_multiplier=-1", "--width_multiplier"),
    ("--learning_rate=1e999", "--learning_rate"),
    ("--seed=0x1g", "--seed"),
    ("--train_steps=1_000_", "--train_steps"),
    ("--learning_rate=0,3", "--learning_rate"),
]
_PLAN = "--dry_run --dataset=photo_patches"
_CONTRADICTIONS = [
    ("--labelled_fraction=0.1 --labels_per_class=2 --objective=semppl",
     "--labelled_fraction and --labels_per_class"),
    ("--labelled_file=x --labels_per_class=2 --objective=semppl",
     "--labels_per_class and --labelled_file"),
    ("--objective=relicv2 --mask_dir=x --saliency=spectral "
     "--mask_probability=0.5", "--mask_dir and --saliency"),
    ("--objective=relic --gamma=0.9 --target_decay=0.8",
     "--gamma and --target_decay"),
    ("--objective=relic --gamma=2", "--gamma"),
    ("--objective=siglip --gamma=-1", "--gamma"),
    ("--objective=rpc --gamma=-1", "--gamma"),
    ("--objective=rpc --use_siglip", "--use_siglip"),
    ("--objective=semppl --use_siglip", "--use_siglip"),
    ("--objective=rpc --num_small_views=1", "--num_small_views=1"),
    ("--objective=simclr --num_large_views=3", "--num_large_views=3"),
    ("--objective=byol --num_large_views=1", "--num_large_views=1"),
    ("--objective=wpc --remat", "--remat"),
    ("--train_batch_size=1", "--train_batch_size"),
    ("--objective=semppl --queue_size=9", "--queue_size"),
    ("--fine_tune_after_block=2", "--fine_tune_after_block"),
    ("--train_mode=finetune", "--checkpoint"),
    ("--train_mode=finetune --checkpoint=/nowhere", "/nowhere"),
    (f"{_MODES_OF_FINE_TUNING} --encoder=convnext_tiny "
     "--fine_tune_after_block=2", "--fine_tune_after_block"),
    ("--preset=linear_eval_byol --train_mode=pretrain", "--preset"),
    ("--mode=selftest --train_mode=finetune --checkpoint=none",
     "--mode=selftest"),
    ("--mode=probe", "--checkpoint"),
    ("--mode=probe --checkpoint=none", "--checkpoint"),
    ("--mode=probe --checkpoint=", "--checkpoint"),
    ("--mode=export", "--checkpoint"),
    ("--mode=embed", "--checkpoint"),
    ("--mode=embed --checkpoint=none --input=x", "--checkpoint"),
    ("--mode=predict", "--checkpoint"),
    ("--mode=eval", "--model_dir"),
    ("--mode=eval --model_dir=README.md", "--model_dir"),
    ("--mode=check_tpu", "--tpu_topology"),
    ("--mode=check_tpu --tpu_topology=v99-8", "--tpu_topology"),
    (f"{_PLAN} --tpu_topology=v5e:3x5", "--tpu_topology"),
    *((f"--mode={mode} --dry_run", "--dry_run")
      for mode in ("eval --model_dir=x", "probe", "embed", "export",
                   "predict", "selftest", "check_tpu")
      if not mode.startswith("eval")),
    (f"{_PLAN} --image_size=64", "--image_size"),
    (f"{_PLAN} --train_batch_size=513 --tpu_topology=v5e:2x2",
     "--train_batch_size"),
    (f"{_PLAN} --train_batch_size=510 --accumulate_steps=4",
     "--accumulate_steps"),
    (f"{_PLAN} --color_jitter_strength=2", "--color_jitter_strength"),
    (f"{_PLAN} --contrast=1.5", "--contrast"),
]  # fmt: skip
_LINES = list(
    dict.fromkeys(
        [
            *_malformed(),
            *_out_of_bounds(),
            *_LISTS,
            *_NAMES,
            *_CONTRADICTIONS,
        ]
    )
)


@pytest.fixture(scope="module")
def results():
    """What the command lines end with, tried in one process."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.try_command_lines"],
        cwd=processes.ROOT,
        input=json.dumps([shlex.split(line) for line, _ in _LINES]),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(_LINES, json.loads(finished.stdout), strict=True))


def test_wrong_command_lines_are_many():
    assert len(_LINES) > 400


@pytest.mark.parametrize("line", _LINES, ids=lambda line: line[0])
def test_wrong_command_line_is_one_error_that_names_the_flag(line, results):
    found = results[line]
    assert not found["defect"]
    assert found["code"] == 2
    error, *table = found["stderr"].splitlines()
    # A table of the slices that there are may follow.
    assert not table or line[1] == "--tpu_topology"
    assert error.startswith("Error: ")
    assert line[1] in error


def test_correct_command_lines_are_not_errors():
    """So that the errors above are those of the flags."""
    lines = [["--help"], ["--mode=probe", "--help"]]
    lines += [shlex.split(_PLAN), ["--dry_run", "--dataset=cifar10"]]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.support.try_command_lines"],
        cwd=processes.ROOT,
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    for found in json.loads(finished.stdout):
        assert found == {"code": 0, "stderr": "", "defect": ""}
