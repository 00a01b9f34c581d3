#!/usr/bin/env bash
# RPC with ResNet-50 and selective kernels on ImageNet on a Cloud TPU slice:
# pretraining, then a linear classifier. Run it again to go on.
#
# The values are those of the RPC paper's code (vision/
# tpu_pretrain_finetune_resnet50.sh). Set these, as for SimCLR:
#   export TPU_NAME=...                    local on a TPU VM
#   export STORAGE_BUCKET=gs://...
#   bash tpu_pretrain_imagenet.sh [flags of run.py for both stages]
# For ResNet-152 2x: RESNET_DEPTH=152 WIDTH_MULTIPLIER=2 BETA=0.001 GAMMA=0.01
set -euo pipefail

: "${TPU_NAME:=local}"
: "${STORAGE_BUCKET:?must be set, e.g. to gs://my-bucket}"
: "${DATA_DIR:=$STORAGE_BUCKET/tensorflow_datasets}"
: "${MODEL_DIR:=$STORAGE_BUCKET/rpc-imagenet2012}"
: "${BATCH_SIZE:=4096}"
: "${TRAIN_EPOCHS:=100}"
: "${RESNET_DEPTH:=50}"
: "${WIDTH_MULTIPLIER:=1}"
: "${SK_RATIO:=0.0625}"
: "${TEMPERATURE:=32}"
: "${ALPHA:=0.3}"
: "${BETA:=0.01}"
: "${GAMMA:=0.1}"
: "${LINEAR_EPOCHS:=90}"

here=$(cd "$(dirname "$0")" && pwd)
: "${PYTHON:=$([[ -x $here/.venv/bin/python ]] && echo "$here/.venv/bin/python" || echo python3)}"
common=(
  --use_tpu
  --tpu_name="$TPU_NAME"
  --dataset=imagenet2012
  --image_size=224
  --eval_split=validation
  --data_dir="$DATA_DIR"
  --train_batch_size="$BATCH_SIZE"
)

"$PYTHON" "$here/run.py" \
  "${common[@]}" \
  --train_mode=pretrain \
  --objective=rpc \
  --temperature="$TEMPERATURE" \
  --alpha="$ALPHA" \
  --beta="$BETA" \
  --gamma="$GAMMA" \
  --train_epochs="$TRAIN_EPOCHS" \
  --learning_rate=0.1 \
  --learning_rate_scaling=sqrt \
  --weight_decay=1e-4 \
  --resnet_depth="$RESNET_DEPTH" \
  --width_multiplier="$WIDTH_MULTIPLIER" \
  --sk_ratio="$SK_RATIO" \
  --model_dir="$MODEL_DIR" \
  "$@"

"$PYTHON" "$here/run.py" \
  "${common[@]}" \
  --train_mode=finetune \
  --mode=train_then_eval \
  --fine_tune_after_block=4 \
  --zero_init_logits_layer \
  --optimizer=momentum \
  --learning_rate=0.1 \
  --weight_decay=1e-6 \
  --train_epochs="$LINEAR_EPOCHS" \
  --warmup_epochs=0 \
  --checkpoint="$MODEL_DIR" \
  --model_dir="$MODEL_DIR-linear" \
  "$@"
