#!/usr/bin/env bash
# RPC on CIFAR-10 on one GPU (or several, or a CPU): pretraining, then
# fine-tuning and evaluation. Run it again to go on after an interruption.
#
# The values are those of the RPC paper's code (vision/
# gpu_pretrain_finetune_cifar.sh). Override them from the environment, or add
# flags of run.py, which go to both stages:
#   OBJECTIVE=simclr TEMPERATURE=0.5 bash gpu_pretrain_finetune_cifar.sh
#   TRAIN_STEPS=20 bash gpu_pretrain_finetune_cifar.sh --resnet_depth=10
# For a linear probe instead of the paper's fine-tuning of all but the stem:
#   FINE_TUNE_AFTER_BLOCK=4 bash gpu_pretrain_finetune_cifar.sh
set -euo pipefail

: "${DATASET:=cifar10}"
: "${OBJECTIVE:=rpc}"
: "${BATCH_SIZE:=512}"
: "${LEARNING_RATE:=1.0}"
: "${LEARNING_RATE_SCALING:=linear}"
: "${WEIGHT_DECAY:=1e-4}"
: "${RESNET_DEPTH:=18}"
: "${WIDTH_MULTIPLIER:=1}"
: "${SK_RATIO:=0.0}"
: "${TRAIN_EPOCHS:=100}"
: "${TRAIN_STEPS:=0}" # 0: as many as TRAIN_EPOCHS need
# Of the objective: unset ones take its own defaults (rpc: temperature 128,
# alpha 0, beta 0.001, gamma 1, no hidden_norm; the others: temperature 0.5).
: "${TEMPERATURE:=}"
: "${ALPHA:=}"
: "${BETA:=}"
: "${GAMMA:=}"

: "${FINE_TUNE_AFTER_BLOCK:=0}"
: "${FINE_TUNE_LEARNING_RATE:=0.1}"
: "${FINE_TUNE_EPOCHS:=100}"
: "${FINE_TUNE_STEPS:=$TRAIN_STEPS}"

here=$(cd "$(dirname "$0")" && pwd)
: "${MODEL_DIR:=$here/runs/$OBJECTIVE-$DATASET}"
: "${PYTHON:=$([[ -x $here/.venv/bin/python ]] && echo "$here/.venv/bin/python" || echo python3)}"

"$PYTHON" "$here/run.py" \
  --train_mode=pretrain \
  --objective="$OBJECTIVE" \
  --dataset="$DATASET" \
  --train_batch_size="$BATCH_SIZE" \
  --train_epochs="$TRAIN_EPOCHS" \
  --train_steps="$TRAIN_STEPS" \
  --learning_rate="$LEARNING_RATE" \
  --learning_rate_scaling="$LEARNING_RATE_SCALING" \
  --weight_decay="$WEIGHT_DECAY" \
  --resnet_depth="$RESNET_DEPTH" \
  --width_multiplier="$WIDTH_MULTIPLIER" \
  --sk_ratio="$SK_RATIO" \
  ${TEMPERATURE:+--temperature="$TEMPERATURE"} \
  ${ALPHA:+--alpha="$ALPHA"} \
  ${BETA:+--beta="$BETA"} \
  ${GAMMA:+--gamma="$GAMMA"} \
  --model_dir="$MODEL_DIR" \
  "$@"

"$PYTHON" "$here/run.py" \
  --train_mode=finetune \
  --mode=train_then_eval \
  --fine_tune_after_block="$FINE_TUNE_AFTER_BLOCK" \
  --zero_init_logits_layer \
  --dataset="$DATASET" \
  --optimizer=momentum \
  --train_batch_size="$BATCH_SIZE" \
  --train_epochs="$FINE_TUNE_EPOCHS" \
  --train_steps="$FINE_TUNE_STEPS" \
  --learning_rate="$FINE_TUNE_LEARNING_RATE" \
  --weight_decay=0 \
  --warmup_epochs=0 \
  --checkpoint="$MODEL_DIR" \
  --model_dir="$MODEL_DIR-finetune-after-block-$FINE_TUNE_AFTER_BLOCK" \
  "$@"
