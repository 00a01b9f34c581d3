#!/usr/bin/env bash
# Pretraining on ImageNet on a Cloud TPU slice, then a linear classifier. Run it
# again to go on.
#
# Set these, as for SimCLR:
#   export TPU_NAME=...                    local on a TPU VM
#   export STORAGE_BUCKET=gs://...
#   export DATA_DIR=... MODEL_DIR=...      unset: in that bucket
#   RECIPE=relicv2_300 bash tpu_pretrain_imagenet.sh [flags for both stages]
# RECIPE is a --preset of run.py: rpc_imagenet_r50 (ResNet-50 with selective
# kernels), rpc_imagenet_r152 (ResNet-152 2x), relicv2_300, relicv2_1000,
# semppl_300, semppl_1000, simclr_imagenet, ... With --dry_run, it prints what
# both stages would be, and touches no TPU.
#
# A TPU that is lost on the way, to preemption for instance, is asked for again,
# every RESTART_SECONDS. Set BEFORE_RESTART to a command that makes a new one, if
# it does not come back.
set -euo pipefail

: "${RECIPE:=rpc_imagenet_r50}"
: "${TPU_NAME:=local}"
: "${TPU_ZONE:=}" # unset: that of this machine
: "${GCP_PROJECT:=}"
: "${STORAGE_BUCKET:?must be set, e.g. to gs://my-bucket}"
[[ $STORAGE_BUCKET == */* ]] || STORAGE_BUCKET=gs://$STORAGE_BUCKET
: "${DATA_DIR:=$STORAGE_BUCKET/tensorflow_datasets}"
: "${MODEL_DIR:=$STORAGE_BUCKET/$RECIPE}"
: "${LINEAR_DIR:=$MODEL_DIR-linear}"
: "${RESTARTS:=100}"
: "${RESTART_SECONDS:=60}"
: "${BEFORE_RESTART:=true}"
: "${ABORT_SECONDS:=600}"
# Unset ones are the recipe's.
: "${BATCH_SIZE:=}"
: "${TRAIN_EPOCHS:=}"
: "${LINEAR_EPOCHS:=}"
# ReLICv2 and SemPPL: masks, and where there are none, an estimator or "".
: "${MASK_DIR:=}"
: "${SALIENCY=spectral}"
: "${LABELLED_FRACTION:=0.1}" # SemPPL

here=$(cd "$(dirname "$0")" && pwd)
: "${PYTHON:=$([[ -x $here/.venv/bin/python ]] && echo "$here/.venv/bin/python" || echo python3)}"

recipe=("--preset=$RECIPE")
case $RECIPE in
  rpc_imagenet_* | simclr_imagenet) evaluation=linear_eval_simclr ;;
  byol_* | relic_1000*) evaluation=linear_eval_byol ;;
  relicv2_* | semppl_*)
    evaluation=linear_eval_deepmind
    if [[ -n $MASK_DIR ]]; then
      recipe+=("--mask_dir=$MASK_DIR")
    elif [[ -n $SALIENCY ]]; then
      recipe+=("--saliency=$SALIENCY")
    fi
    ;;
  *)
    echo "RECIPE must be a preset of pretraining on ImageNet, not $RECIPE." >&2
    exit 2
    ;;
esac
if [[ $RECIPE == semppl_* ]]; then
  recipe+=("--labelled_fraction=$LABELLED_FRACTION")
fi

# Runs run.py, again after a lost TPU (exit code 75), or a runtime that aborted
# (134) when it had worked for some time.
run() {
  local code started tries=0
  while true; do
    code=0
    started=$SECONDS
    "$PYTHON" "$here/run.py" \
      --use_tpu \
      --tpu_name="$TPU_NAME" \
      ${TPU_ZONE:+--tpu_zone="$TPU_ZONE"} \
      ${GCP_PROJECT:+--gcp_project="$GCP_PROJECT"} \
      --dataset=imagenet2012 \
      --image_size=224 \
      --eval_split=validation \
      --data_dir="$DATA_DIR" \
      "$@" || code=$?
    case $code in
      75) ;;
      134) ((SECONDS - started >= ABORT_SECONDS)) || return "$code" ;;
      *) return "$code" ;;
    esac
    ((tries < RESTARTS)) || return "$code"
    tries=$((tries + 1))
    echo "Restart $tries of at most $RESTARTS in $RESTART_SECONDS s ..." >&2
    sleep "$RESTART_SECONDS"
    bash -c "$BEFORE_RESTART"
  done
}

run \
  --train_mode=pretrain \
  "${recipe[@]}" \
  ${BATCH_SIZE:+--train_batch_size="$BATCH_SIZE"} \
  ${TRAIN_EPOCHS:+--train_epochs="$TRAIN_EPOCHS"} \
  --model_dir="$MODEL_DIR" \
  "$@"

run \
  --train_mode=finetune \
  --mode=train_then_eval \
  --preset="$evaluation" \
  ${LINEAR_EPOCHS:+--train_epochs="$LINEAR_EPOCHS"} \
  --checkpoint="$MODEL_DIR" \
  --model_dir="$LINEAR_DIR" \
  "$@"
