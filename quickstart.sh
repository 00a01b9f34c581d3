#!/usr/bin/env bash
# From nothing to a measured encoder: makes .venv, pretrains a small network on
# the built-in data set (photo_patches), trains a linear classifier on it and
# compares it with raw pixels and a random encoder. Minutes on two CPU cores.
#   bash quickstart.sh [flags of run.py for pretraining, e.g. --objective=rpc]
set -euo pipefail
cd "$(dirname "$0")"
: "${MODEL_DIR:=runs/quickstart}"
bash make_venv.sh requirements.txt

# Colour tells many of the pictures apart, so little of it is jittered away.
echo "1/3 Pretraining without labels ..." >&2
.venv/bin/python run.py \
  --train_mode=pretrain \
  --objective=simclr \
  --dataset=photo_patches \
  --resnet_depth=10 \
  --width_multiplier=0.25 \
  --train_batch_size=128 \
  --train_epochs=5 \
  --warmup_epochs=0.5 \
  --optimizer=adam \
  --learning_rate=0.002 \
  --learning_rate_scaling=none \
  --temperature=0.5 \
  --color_jitter_strength=0.2 \
  --grayscale_probability=0 \
  --use_blur=false \
  --model_dir="$MODEL_DIR" \
  "$@"

echo "2/3 Training a linear classifier on the frozen encoder ..." >&2
.venv/bin/python run.py \
  --train_mode=finetune \
  --mode=train_then_eval \
  --fine_tune_after_block=4 \
  --zero_init_logits_layer \
  --dataset=photo_patches \
  --train_batch_size=256 \
  --train_epochs=10 \
  --checkpoint="$MODEL_DIR" \
  --model_dir="$MODEL_DIR-linear"

echo "3/3 Comparing features ..." >&2
.venv/bin/python run.py \
  --mode=probe \
  --probe_max_train=5000 \
  --label_budgets=1,5 \
  --checkpoint="$MODEL_DIR"

echo "Curves: .venv/bin/tensorboard --logdir $(dirname "$MODEL_DIR")
Report, to open in a browser: $MODEL_DIR/report.html
Report of the linear classifier: $MODEL_DIR-linear/report.html" >&2
