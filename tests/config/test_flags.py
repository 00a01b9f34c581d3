# SPDX-License-Identifier: Apache-2.0
"""Tests of `flags.py`: command lines of the programs before this one."""

import re
import shlex

import pytest

import run
from tests.support import program

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
# Of RPC's gpu_pretrain_finetune_cifar.sh, tpu_pretrain_finetune_resnet50.sh and
# tpu_pretrain_finetune_resnet128.sh, with their variables filled in.
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


def _words(command):
    """Returns the flags of a command line, which starts with run.py."""
    words = shlex.split(command)
    return words[words.index("run.py") + 1 :]


def _parse(command):
    """Resolves a command line."""
    return program.resolve(*_words(command))


@pytest.mark.parametrize("command", _SIMCLR_README + _LINEAR_EVALUATION + _RPC_SCRIPTS)
def test_command_lines_of_earlier_programs_mean_the_same(command, monkeypatch):
    warnings = []
    monkeypatch.setattr(run.logging, "warning", warnings.append)
    resolved = _parse(command)
    given = program.given(*_words(command))
    # Once for each flag that does nothing.
    silent = {"--variable_schema"} if "variable_schema" in command else set()
    if "finetune" in command and "loss_type" in command:
        silent |= {"--objective", "--alpha", "--beta", "--gamma"}
    assert {line.split()[0] for line in warnings} == silent
    assert len(warnings) == len(silent)
    for name, value in re.findall(r"--(\w+)[= ]([^\s']+)", command):
        name = {"loss_type": "objective"}.get(name, name)
        value = {"chi": "rpc", "nce": "simclr"}.get(value, value)
        parsed = {"chi": "rpc", "nce": "simclr"}.get(given[name], given[name])
        got = [parsed] if f"--{name}" in silent else [parsed, resolved[name]]
        for found in got:
            if name == "variable_schema":
                assert found == "(?!global_step|(?:.*/|^)Momentum|head)"
            elif isinstance(found, bool):
                assert found == (value.lower() == "true")
            elif isinstance(found, str):
                assert found == value
            else:
                assert float(found) == float(value)
