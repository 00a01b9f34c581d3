# SPDX-License-Identifier: Apache-2.0
"""Pretrains image encoders and measures what they learned.

    python run.py --train_mode=pretrain --objective=rpc --dataset=cifar10
    python run.py --train_mode=finetune --mode=train_then_eval \
        --fine_tune_after_block=4 --checkpoint=runs/... --dataset=cifar10

Every flag is defined and read here; the other modules take plain arguments.
A flag left unset takes its value from the checkpoint to be fine-tuned or
evaluated, or from the objective; the log at start says which.
"""

import errno
import functools
import itertools
import logging as std_logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

# Before TensorFlow is loaded: its start-up notes are a page, and without a GPU
# one of them is an error about that.
os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL",
    "2" if os.path.exists("/proc/driver/nvidia") else "3",
)

# Steps of the self-test run in other processes; this one must not hold the TPU,
# which TensorFlow takes as it is imported.
if "mode selftest" in " ".join(sys.argv).replace("=", " "):
    os.environ["TPU_LOAD_LIBRARY"] = "0"

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import data
import data_util
import model
import objective
import resnet
from contrastive import storage
from contrastive.commands import check_tpu, experiment, plan, selftest
from contrastive.commands.experiment import Run, Settings
from contrastive.config import methods
from contrastive.devices import devices, tpu_slices
from contrastive.evaluation import embed, features, probe
from contrastive.report import reporting, run_report
from contrastive.sources import saliency
from contrastive.sources import sources as sources_lib
from contrastive.training import trainer
from contrastive.weights import checkpoint as checkpoint_lib
from contrastive.weights import export

FLAGS = flags.FLAGS

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.join(_HERE, "contrastive", "")
_EXIT_USAGE = 2
_EXIT_DIVERGED = 3
_EXIT_DIFFERS = 1
_EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
_EXIT_NOT_FITTING = 4

# What a file system raises for a path that a user gave.
_FILE_ERRORS = (
    OSError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.AlreadyExistsError,
    tf.errors.DataLossError,
)
# Text of TensorFlow's errors when a bucket cannot be reached; their classes
# vary, and some become the text of other errors.
_NO_CONNECTION = "libcurl code"
# Errors of a connection, or of a disk on another machine, that may pass.
_NO_ANSWER = (ConnectionError, TimeoutError)
_PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.EHOSTDOWN, errno.ENETDOWN)
# Errors of user input that only show while the prepared work is done. Others
# are defects of this program, and end with a traceback.
_INPUT_ERRORS_OF_WORK = (
    *_FILE_ERRORS,
    trainer.HostsDisagree,
    trainer.NoLabelledImage,
    selftest.ProcessFailed,
    checkpoint_lib.CannotRestore,
)

# `siglip` is `relic --use_siglip`.
_OBJECTIVES = tuple(
    name for name in (*methods.METHODS, *methods.ALIASES) if name != "siglip"
)
_SECONDS_BETWEEN_POLLS = 5
# Files of a run that its trainer writes again and again.
_SIGNS_OF_LIFE = ("run.json", "checkpoint", "events.*")
_IMAGES_IN_GRID = 16
_FROM_SCRATCH = "none"  # as --checkpoint
_NOWHERE = "none"  # as --feature_cache

_WHERE_TO_LOOK = (
    "They differ: do not train on these devices. With --global_bn=false or "
    "--rpc_marginal_norm=local_replica that is so by definition."
)

_FLAGS_OF_LIBRARIES = frozenset(FLAGS)


def _by_method(name: str) -> str:
    """Returns the part of a help text that lists an objective's defaults."""
    objectives: dict[Any, list[str]] = {}
    for key, method in methods.METHODS.items():
        if name in method.defaults:
            objectives.setdefault(method.defaults[name], []).append(key)
    return "Unset: " + "; ".join(
        f"{value} for {', '.join(keys)}" for value, keys in objectives.items()
    )


# What to do.
flags.DEFINE_enum(
    "mode",
    "train",
    [
        "train",
        "eval",
        "train_then_eval",
        "probe",
        "embed",
        "predict",
        "export",
        "selftest",
        "check_tpu",
    ],
    "train; eval: follow --model_dir, as a second process, and evaluate each "
    "new checkpoint until training is done; train_then_eval; probe: compare "
    "--checkpoint's features with raw pixels and a random encoder; embed: "
    "write its features of --input; predict: the classes it sees there; "
    "export: write its networks in formats that other programs read; "
    "selftest: compare a few steps on all devices with the same on one; "
    "check_tpu: have the training step compiled for --tpu_topology, no TPU "
    "needed.",
)
flags.DEFINE_enum(
    "train_mode",
    "pretrain",
    ["pretrain", "finetune"],
    "Pretraining without labels, or training of a classifier on --checkpoint.",
)
flags.DEFINE_enum(
    "objective",
    "rpc",
    _OBJECTIVES,
    "Objective of pretraining. chi is rpc, nce is simclr.",
)
flags.DEFINE_alias("loss_type", "objective")
flags.DEFINE_enum(
    "preset",
    None,
    sorted({**methods.PRESETS, **methods.EVALUATION_PRESETS}),
    "Published recipe of pretraining, or of evaluation, which then is the "
    "train_mode; flags on the command line win.",
)
flags.DEFINE_string(
    "model_dir",
    None,
    "Where checkpoints, events and results go; a run found there goes on. "
    "Unset: runs/TRAIN_MODE-OBJECTIVE-DATASET; of a probe, --checkpoint's.",
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "Run directory or checkpoint whose encoder and projection head training "
    "starts from, or which is probed, embeds, predicts or is exported; or "
    "other programs' weights, see README; none: from scratch.",
)
flags.DEFINE_list("format", list(export.FORMATS), "What to export to.")
flags.DEFINE_string(
    "export_dir", None, "Where exports go. Unset: export beside the checkpoint."
)
flags.DEFINE_bool(
    "dry_run",
    False,
    "Print what training would be, steps, rates, sizes; no device, nor the "
    "data, need be there.",
)
flags.DEFINE_integer(
    "seed",
    0,
    "Of initial weights, data order, crops and augmentation.",
    lower_bound=0,
)
flags.DEFINE_bool(
    "deterministic",
    None,
    "Bit-reproducible operations. Unset: on CPUs, where it costs little.",
)

# Data.
flags.DEFINE_string(
    "dataset",
    "imagenet2012",
    "Dataset: photo_patches (built in), a TFDS name, a folder of images or an "
    ".npz archive; folders and archives may be in a bucket (gs://...).",
)
flags.DEFINE_string(
    "data_dir",
    None,
    "Folder where TFDS keeps its datasets; a dataset that is not there is "
    "downloaded and prepared.",
)
flags.DEFINE_string("train_split", "train", "Split for training.")
flags.DEFINE_string(
    "eval_split",
    None,
    "Split for evaluation. Unset: the first of test and validation that exists "
    "and has labels.",
)
flags.DEFINE_integer(
    "image_size",
    None,
    "Side of the images that the encoder sees, pixels. Unset: the data set's, "
    "or 224 where images vary.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "channels",
    None,
    "Channels of an image. Unset: the data set's, or 3.",
    lower_bound=1,
)
flags.DEFINE_enum(
    "normalize",
    "none",
    ["none", "imagenet"],
    "Whether ImageNet's mean and standard deviation are taken out of images.",
)

# Schedule.
flags.DEFINE_integer(
    "train_batch_size", 512, "Images a step, all replicas.", lower_bound=1
)
flags.DEFINE_integer("train_epochs", 100, "Epochs to train for.", lower_bound=0)
flags.DEFINE_integer(
    "train_steps",
    0,
    "Steps to train for; if not 0, instead of train_epochs.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "eval_batch_size",
    256,
    "Images a step of evaluation; more, if they do not divide among replicas.",
    lower_bound=1,
)
flags.DEFINE_float(
    "eval_timeout_minutes",
    120.0,
    "Minutes that --mode=eval waits for a sign of life of the trainer: for its "
    "run to start, and later for a new checkpoint or event. 0 waits for ever.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "eval_steps", 0, "Steps of evaluation; 0: all images.", lower_bound=0
)
flags.DEFINE_integer(
    "checkpoint_epochs", 1, "Epochs between checkpoints.", lower_bound=1
)
flags.DEFINE_integer(
    "checkpoint_steps",
    0,
    "Steps between checkpoints; if not 0, instead of checkpoint_epochs.",
    lower_bound=0,
)
flags.DEFINE_float(
    "checkpoint_minutes",
    0.0,
    "Minutes between checkpoints; if not 0, instead of checkpoint_steps.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "keep_checkpoint_max", 5, "Older checkpoints are deleted.", lower_bound=1
)
flags.DEFINE_integer(
    "train_summary_steps",
    10,
    "Steps between TensorBoard points; 0: none.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "accumulate_steps",
    1,
    "Pretraining: parts of the batch that are embedded one after another, "
    "twice each, so that a large batch needs the memory of a part. The loss is "
    "that of the whole batch, BatchNorm's statistics are those of a part.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "steps_per_loop",
    0,
    "Steps between looks at the host; 0: as many as take two seconds.",
    lower_bound=0,
)

# Optimisation.
flags.DEFINE_enum(
    "optimizer",
    "lars",
    ["lars", "momentum", "adam"],
    "LARS, SGD with Nesterov's momentum, or Adam.",
)
flags.DEFINE_enum(
    "lars_variant",
    "simclr",
    ["simclr", "deepmind"],
    "Whether LARS applies the learning rate before or after momentum. "
    f"{_by_method('lars_variant')}.",
)
flags.DEFINE_float(
    "learning_rate",
    0.3,
    f"Peak, before learning_rate_scaling. {_by_method('learning_rate')}.",
    lower_bound=0,
)
flags.DEFINE_enum(
    "learning_rate_scaling",
    "linear",
    ["linear", "sqrt", "none"],
    "Factor by the batch size B: B / 256, the root of B, or 1.",
)
flags.DEFINE_enum(
    "learning_rate_schedule",
    "cosine",
    ["cosine", "constant"],
    "After the warm-up.",
)
flags.DEFINE_float(
    "warmup_epochs", 10, "Epochs of linear warm-up.", lower_bound=0
)
flags.DEFINE_float(
    "weight_decay",
    None,
    f"L2 of kernels. {_by_method('weight_decay')}.",
    lower_bound=0,
)
flags.DEFINE_float(
    "momentum", 0.9, "Of lars and momentum.", lower_bound=0, upper_bound=1
)

# Objective.
flags.DEFINE_float(
    "temperature", None, f"Divides scores. {_by_method('temperature')}."
)
flags.DEFINE_bool(
    "learnable_temperature",
    False,
    "ReLIC: whether temperature and bias are trained, as in relic-pytorch. "
    f"{_by_method('learnable_temperature')}.",
)
flags.DEFINE_float(
    "max_inverse_temperature",
    5.0,
    "Largest inverse of a trained temperature.",
    lower_bound=0.01,
)
flags.DEFINE_bool(
    "hidden_norm",
    None,
    f"Whether projections are l2-normalised. {_by_method('hidden_norm')}.",
)
flags.DEFINE_float(
    "alpha",
    None,
    "RPC: weight of negatives' scores. ReLIC: of the invariance term. "
    f"{_by_method('alpha')}.",
)
flags.DEFINE_float(
    "beta", None, f"RPC: of positives' squared scores. {_by_method('beta')}."
)
flags.DEFINE_float(
    "gamma",
    None,
    f"RPC: of negatives' squared scores. {_by_method('gamma')}. ReLIC: another "
    "name of --target_decay.",
)
flags.DEFINE_enum(
    "rpc_marginal_norm",
    "global",
    ["global", "local_replica"],
    "RPC: whether the mean over negatives divides by the global batch, or, as "
    "in the reference code, by the replica's.",
)
flags.DEFINE_float(
    "gradient_penalty_weight",
    None,
    f"WPC: of the critic's gradient. {_by_method('gradient_penalty_weight')}.",
    lower_bound=0,
)
flags.DEFINE_float(
    "contrast_weight",
    None,
    "ReLICv2, SemPPL: of the contrastive terms. "
    f"{_by_method('contrast_weight')}.",
    lower_bound=0,
)
flags.DEFINE_float(
    "invariance_weight",
    None,
    f"ReLICv2, SemPPL: of the KL terms. {_by_method('invariance_weight')}.",
    lower_bound=0,
)
flags.DEFINE_float(
    "semantic_weight",
    None,
    "SemPPL: of the semantic positives, relative to the views. "
    f"{_by_method('semantic_weight')}.",
    lower_bound=0,
)
flags.DEFINE_bool(
    "semantic_invariance",
    None,
    "SemPPL: whether there is a KL term of semantic positives, too. "
    f"{_by_method('semantic_invariance')}.",
)
flags.DEFINE_enum(
    "sempos_negatives",
    None,
    objective.SEMPOS_NEGATIVES,
    "SemPPL: what a semantic positive is told apart from: other images' "
    "targets, or their semantic positives. "
    f"{_by_method('sempos_negatives')}.",
)
flags.DEFINE_bool(
    "drop_same_label_negatives",
    None,
    "SemPPL: whether images of the same (pseudo-)label are no negatives. "
    f"{_by_method('drop_same_label_negatives')}.",
)
flags.DEFINE_integer(
    "num_semantic_positives",
    0,
    f"SemPPL: draws an image. {_by_method('num_semantic_positives')}.",
    lower_bound=0,
)
flags.DEFINE_float(
    "pseudo_label_start_epoch",
    0.0,
    "SemPPL: epochs before pseudo-labels count, which are wrong at first; "
    "until then, labelled images alone have semantic positives. 2 where images "
    "are small.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "queue_size",
    None,
    "SemPPL: labelled images in the queue. Unset: 20 batches.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "num_negatives",
    None,
    "ReLIC family: negatives sampled from the global batch for each image and "
    "pair of views, some tens at most; 0: all. "
    f"{_by_method('num_negatives')}.",
    lower_bound=0,
)
flags.DEFINE_bool(
    "include_same_view",
    None,
    "ReLIC family: whether a view is compared with its own target. "
    f"{_by_method('include_same_view')}.",
)
flags.DEFINE_bool(
    "average_pairs",
    None,
    "ReLIC family: mean over pairs of views, not sum. "
    f"{_by_method('average_pairs')}.",
)
flags.DEFINE_enum(
    "kl_form",
    None,
    objective.KL_FORMS,
    "ReLIC family: what a distribution over images is compared with: that of "
    "the swapped views, or of the columns; reversed as in relic-pytorch. "
    f"{_by_method('kl_form')}.",
)
flags.DEFINE_enum(
    "kl_grad",
    None,
    objective.KL_GRADS,
    "ReLIC family: what of KL's first argument has no gradient: all of it, its "
    f"entropy (ReLICv2's equation), nothing. {_by_method('kl_grad')}.",
)
flags.DEFINE_enum(
    "kl_small",
    None,
    objective.KL_SMALLS,
    f"ReLIC family: KL of small views. {_by_method('kl_small')}.",
)
flags.DEFINE_bool("use_siglip", False, "ReLIC: SigLIP's pairwise sigmoid loss.")
flags.DEFINE_bool(
    "lineareval_while_pretraining",
    True,
    "Whether a linear classifier is trained beside, behind a stop-gradient.",
)

# Target network.
flags.DEFINE_bool(
    "target_network",
    False,
    "Whether online embeddings are compared with those of a moving average of "
    f"the networks. {_by_method('target_network')}.",
)
flags.DEFINE_float(
    "target_decay",
    None,
    "Of that average, at the start; a cosine raises it to 1. "
    f"{_by_method('target_decay')}.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    "target_bn",
    "batch",
    model.TARGET_BNS,
    "The target's BatchNorm: by statistics of the batch, as in BYOL's code, or "
    "by the moving average of the online network's.",
)
flags.DEFINE_integer(
    "update_gamma_after_step",
    -1,
    "Up to this step the target is a copy; -1: never.",
    lower_bound=-1,
)
flags.DEFINE_integer(
    "update_gamma_every_n_steps",
    1,
    "Steps from one update of the target to the next.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "evaluate_target",
    False,
    "Whether a checkpoint's target network is fine-tuned, probed or exported, "
    "not the online one.",
)

# Labels that pretraining may see (SemPPL); unset: all that there are.
flags.DEFINE_float(
    "labelled_fraction",
    None,
    "Share of the training images, as many of each class.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_integer(
    "labels_per_class", None, "Images of each class.", lower_bound=1
)
flags.DEFINE_string(
    "labelled_file", None, "Text file of example ids or file names, one a line."
)
flags.DEFINE_float(
    "labelled_batch_share",
    0.0,
    "Share of each batch drawn from the labelled images; 0: as they come.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_bool(
    "train_on_labelled",
    False,
    "Fine-tuning: on the images whose labels the pretraining saw, alone.",
)

# Networks.
flags.DEFINE_enum("encoder", "resnet", model.ENCODERS, "Kind of encoder.")
flags.DEFINE_integer("resnet_depth", 50, "10, 18, 34, 50, 101, 152 or 200.")
flags.DEFINE_float("width_multiplier", 1.0, "Of all numbers of channels.")
flags.DEFINE_enum(
    "stem",
    None,
    ["cifar", "imagenet"],
    "3x3 stride 1, or 7x7 stride 2 and max-pool. Unset: cifar up to 32 pixels.",
)
flags.DEFINE_enum(
    "padding",
    "fixed",
    resnet.PADDINGS,
    "Of strided convolutions and the max-pool: symmetric and SAME (fixed, "
    "SimCLR's), TensorFlow's SAME (same, BYOL's), symmetric (torch). "
    f"{_by_method('padding')}.",
)
flags.DEFINE_enum(
    "shortcuts",
    "always",
    resnet.SHORTCUTS,
    "Where the first block of a group projects its shortcut: always, or where "
    "its shape changes, as in torchvision.",
)
flags.DEFINE_bool(
    "preactivation",
    False,
    "Whether BatchNorm and ReLU stand before convolutions (ResNet version 2).",
)
flags.DEFINE_list(
    "base_filters",
    [str(n) for n in resnet.BASE_FILTERS],
    "Channels of the stem and the four groups, before width_multiplier.",
)
flags.DEFINE_float(
    "sk_ratio", 0.0, "Selective kernels if > 0; try 0.0625.", lower_bound=0
)
flags.DEFINE_float(
    "se_ratio", 0.0, "Squeeze and excitation if > 0.", lower_bound=0
)
flags.DEFINE_bool(
    "remat",
    False,
    "Whether gradients compute a ResNet's blocks again instead of keeping all "
    "that is inside of them: less memory, about one forward pass more.",
)
flags.DEFINE_bool(
    "zero_init_residual",
    True,
    "Whether residual blocks start as identities. "
    f"{_by_method('zero_init_residual')}.",
)
flags.DEFINE_bool(
    "global_bn", True, "Whether BatchNorm statistics cover all replicas."
)
flags.DEFINE_float(
    "batch_norm_decay",
    0.9,
    "Of BatchNorm's moving statistics.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    "proj_head_mode",
    "nonlinear",
    model.PROJECTION_MODES,
    "Projection head: SimCLR's nonlinear, or an mlp such as BYOL's. "
    f"{_by_method('proj_head_mode')}.",
)
flags.DEFINE_integer(
    "proj_out_dim",
    128,
    f"Size of the projection. {_by_method('proj_out_dim')}.",
    lower_bound=1,
)
flags.DEFINE_list(
    "proj_hidden_dim",
    ["512"],
    "Units of each hidden layer of the mlp head, and of the predictor. "
    f"{_by_method('proj_hidden_dim')}.",
)
flags.DEFINE_enum(
    "proj_bn",
    "hidden",
    model.MLP_NORMS,
    f"After which layers of the mlp BatchNorm stands. {_by_method('proj_bn')}.",
)
flags.DEFINE_bool(
    "predictor",
    False,
    "Whether a prediction head follows the projection. "
    f"{_by_method('predictor')}.",
)
flags.DEFINE_integer(
    "num_proj_layers", 3, "Of the nonlinear head.", lower_bound=1
)
flags.DEFINE_integer(
    "ft_proj_selector",
    0,
    "Layer of the projection head that the classifier sees: 0 the encoder's "
    "output, -1 the projection.",
    lower_bound=-1,
)

# Fine-tuning.
flags.DEFINE_integer(
    "fine_tune_after_block",
    -1,
    "Block after which layers are trained: -1 all, 0 after the stem, 4 the "
    "classifier alone. The others are frozen, statistics included.",
    lower_bound=-1,
    upper_bound=4,
)
flags.DEFINE_bool(
    "zero_init_logits_layer", False, "Whether the classifier starts at zero."
)
flags.DEFINE_list(
    "sweep_learning_rate",
    [],
    "Learning rates to choose from: each is trained on part of the training "
    "images and evaluated on the others; the best is trained on all.",
)
flags.DEFINE_list(
    "sweep_train_epochs", [], "Epochs to choose from, with each learning rate."
)
flags.DEFINE_integer(
    "held_out_examples",
    10_009,
    "Training images that decide a sweep, at most a tenth of all.",
    lower_bound=1,
)

# Probing.
flags.DEFINE_integer(
    "knn_k", 20, "Nearest neighbours that vote.", lower_bound=1
)
flags.DEFINE_float(
    "knn_temperature",
    0.07,
    "A vote weighs exp(cosine / knn_temperature).",
    lower_bound=0.01,
)
flags.DEFINE_list(
    "label_budgets",
    ["1", "5", "10", "1%", "10%"],
    "Few labels to learn from: so many of each class, or a share of all.",
)
flags.DEFINE_integer(
    "probe_seeds", 5, "Draws of each budget's labels.", lower_bound=1
)
flags.DEFINE_integer(
    "probe_max_train",
    50_000,
    "Training images used, drawn at random; 0: all.",
    lower_bound=0,
)
flags.DEFINE_string(
    "feature_cache",
    None,
    "Where features are kept for the next probe; none: nowhere. Unset: "
    "MODEL_DIR/features.",
)

# Embedding and predicting.
flags.DEFINE_string("input", None, "Images, as --dataset.")
flags.DEFINE_string("input_split", "all", "Split of --input.")
flags.DEFINE_string(
    "output",
    None,
    "File to write: embed: .npz or .parquet; predict: .csv or .npz; unset: to "
    "standard output.",
)
flags.DEFINE_integer(
    "top_k", 5, "Most probable classes of an image.", lower_bound=1
)

# Augmentation. None: the preset's value.
flags.DEFINE_enum(
    "augmentation",
    "simclr",
    ["simclr", "byol", "relic_pytorch"],
    "Preset of the views: SimCLR's, BYOL's two alternating, or relic-pytorch's."
    f" {_by_method('augmentation')}.",
)
flags.DEFINE_integer(
    "num_large_views",
    2,
    f"Of an image. {_by_method('num_large_views')}.",
    lower_bound=1,
)
flags.DEFINE_integer(
    "num_small_views",
    0,
    f"Of an image, without a target. {_by_method('num_small_views')}.",
    lower_bound=0,
)
flags.DEFINE_integer(
    "small_image_size",
    None,
    "Side of a small view, pixels. Unset: 96/224 of image_size, or half of it "
    "up to 32 pixels.",
    lower_bound=1,
)
flags.DEFINE_list(
    "small_crop_area", ["0.05", "0.14"], "As crop_area, of a small view."
)
flags.DEFINE_bool(
    "sym_aug", False, "Blur 0.5 and solarize 0.2 for all views, BYOL's mean."
)
flags.DEFINE_string(
    "mask_dir",
    None,
    "Folder of foreground masks, ID.png or the image's path with .png.",
)
flags.DEFINE_enum(
    "saliency",
    None,
    sorted(saliency.ESTIMATORS),
    "Estimator of foregrounds where there is no mask_dir.",
)
flags.DEFINE_float(
    "mask_probability",
    0.0,
    "Of a large view without its background, where there are masks. "
    f"{_by_method('mask_probability')}.",
    lower_bound=0,
    upper_bound=1,
)
flags.DEFINE_enum(
    "mask_fill", "zero", data_util.MASK_FILLS, "In the background's place."
)
flags.DEFINE_float(
    "color_jitter_strength",
    1.0,
    "SimCLR's strength of all colour jitter.",
    lower_bound=0,
)
flags.DEFINE_bool("use_blur", True, "SimCLR's blur, or not.")
flags.DEFINE_list("crop_area", None, "Least and largest share of a crop.")
flags.DEFINE_list("crop_aspect", None, "Least and largest width / height.")
flags.DEFINE_list("blur_sigma", None, "Least and largest, pixels.")
_AUGMENTATION_FLOATS = {
    "flip_probability": "Of a mirror image.",
    "jitter_probability": "Of colour jitter.",
    "brightness": "Largest relative (or additive) change.",
    "contrast": "Largest relative change.",
    "saturation": "Largest relative change.",
    "hue": "Largest shift, share of the circle.",
    "grayscale_probability": "Of a grey image.",
    "blur_probability": "Of blur.",
    "solarize_probability": "Of inverted highlights.",
}
for _name, _help in _AUGMENTATION_FLOATS.items():
    flags.DEFINE_float(_name, None, _help)
flags.DEFINE_enum(
    "brightness_mode",
    None,
    data_util.BRIGHTNESS_MODES,
    "Whether brightness jitter multiplies or adds.",
)

# Devices.
flags.DEFINE_enum(
    "strategy",
    "auto",
    ["auto", *devices.STRATEGIES],
    "Devices: a TPU; several GPUs of this machine; several machines, which "
    "TF_CONFIG names; one device. auto: the first of these that is there.",
)
flags.DEFINE_bool(
    "use_tpu", None, "Whether to run on a TPU. Unset: as --strategy says."
)
flags.DEFINE_string(
    "tpu_name",
    None,
    "Cloud TPU's name, local or grpc://... Unset: the environment variable "
    "TPU_NAME, or local.",
)
flags.DEFINE_string("tpu_zone", None, "Its zone. Unset: from the metadata.")
flags.DEFINE_string("gcp_project", None, "Its project. Unset: as above.")
flags.DEFINE_string("master", None, "Address of the TPU, instead of its name.")
flags.DEFINE_float(
    "tpu_wait_minutes",
    20.0,
    "How long to wait for a named TPU to be ready.",
    lower_bound=0,
)
flags.DEFINE_string(
    "tpu_topology",
    None,
    "check_tpu, dry_run: slice by the name it is rented as, or chip and "
    "topology: v5litepod-32, v5e:4x8.",
)
flags.DEFINE_bool(
    "find_batch",
    False,
    "check_tpu: whether to look for the largest batch that fits.",
)
flags.DEFINE_integer(
    "cpu_replicas",
    1,
    "Without accelerators: logical CPU devices, to try the path of several "
    "replicas.",
    lower_bound=1,
)
flags.DEFINE_bool(
    "jit_compile", None, "Compile the step by XLA. Unset: on one GPU."
)
flags.DEFINE_bool(
    "mixed_precision", False, "bfloat16 activations, float32 weights."
)

# Flags of the programs whose command lines work here, and why they do nothing.
_WITHOUT_MEANING = {
    "variable_schema": "the encoder and projection head are restored as "
    "objects, the classifier and the optimizer are new",
    "eval_name": "results of evaluation go to MODEL_DIR/eval",
    "keep_hub_module_max": "evaluation exports no module",
    "cache_dataset": "data that fits in memory is always held there",
}
flags.DEFINE_string("variable_schema", None, "No effect; see README.")
flags.DEFINE_string("eval_name", None, "No effect; see README.")
flags.DEFINE_integer("keep_hub_module_max", None, "No effect; see README.")
flags.DEFINE_bool("cache_dataset", None, "No effect; see README.")

_OWN_FLAGS = tuple(
    name for name in FLAGS if name not in {*_FLAGS_OF_LIBRARIES, "loss_type"}
)
_OF_PRETRAINING = (
    "objective",
    "rpc_marginal_norm",
    "lineareval_while_pretraining",
    "accumulate_steps",
    "augmentation",
    "color_jitter_strength",
    "use_blur",
    "sym_aug",
    "mask_dir",
    "saliency",
    "mask_probability",
    "mask_fill",
    "labelled_fraction",
    "labels_per_class",
    "labelled_file",
    "labelled_batch_share",
)
# What only methods with one projection a view can do.
_OF_MULTI_VIEW = (
    "num_large_views",
    "num_small_views",
    "small_image_size",
    "small_crop_area",
    "predictor",
    "target_network",
    "target_decay",
    "target_bn",
    "update_gamma_after_step",
    "update_gamma_every_n_steps",
)
_OF_SEMPPL = (
    "queue_size",
    "num_semantic_positives",
    "pseudo_label_start_epoch",
)
_OF_FINETUNING = (
    "fine_tune_after_block",
    "train_on_labelled",
    "sweep_learning_rate",
    "sweep_train_epochs",
    "held_out_examples",
)
_OF_MODES = {
    ("probe",): (
        "knn_k",
        "knn_temperature",
        "label_budgets",
        "probe_seeds",
        "probe_max_train",
        "feature_cache",
    ),
    ("embed", "predict"): ("input", "input_split", "output"),
    ("predict",): ("top_k",),
    ("eval",): ("eval_timeout_minutes",),
    ("check_tpu",): ("tpu_topology", "find_batch"),
    ("export",): ("format", "export_dir"),
}
_MEANT_BY_EXPORT = {
    *_OF_MODES["export",],
    "mode",
    "checkpoint",
    "image_size",
    "evaluate_target",
}
# SimCLR's linear evaluation on CIFAR-10.
_FINETUNE_DEFAULTS = {
    "optimizer": "momentum",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "warmup_epochs": 0.0,
}
# What evaluation and fine-tuning take over from the run they start from.
_INHERITED = (
    "normalize",
    "channels",
    "image_size",
    "encoder",
    "resnet_depth",
    "width_multiplier",
    "stem",
    "padding",
    "shortcuts",
    "preactivation",
    "base_filters",
    "sk_ratio",
    "se_ratio",
    "global_bn",
    "batch_norm_decay",
    "proj_head_mode",
    "proj_out_dim",
    "num_proj_layers",
    "proj_hidden_dim",
    "proj_bn",
)
_INHERITED_BY_EVAL = (
    *_INHERITED,
    "train_mode",
    "objective",
    "dataset",
    "data_dir",
    "train_split",
    "eval_split",
    "ft_proj_selector",
    "lineareval_while_pretraining",
)


def main(argv: Sequence[str]) -> None:
    """Runs what the flags ask for; exits with 2 if they ask for nonsense."""
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {' '.join(argv[1:])}")
    _set_up_log()
    logging.info(
        "Python %s, TensorFlow %s, Keras %s",
        platform.python_version(),
        tf.__version__,
        keras.__version__,
    )
    settings = Settings()
    try:
        settings, origins = resolve_flags()
        work = _prepare(settings, origins)
    except (ValueError, OSError, tf.errors.OpError, _TrainerIsGone) as error:
        _exit(
            *_lost(error, settings)
            or (_EXIT_USAGE, f"Error: {_one_paragraph(error)}")
        )
    # Their networks hold the weights now.
    checkpoint_lib.forget_published()
    try:
        work()
    except BrokenPipeError:
        # The reader of standard output, such as `head`, has read enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        outcome = _outcome(error, settings)
        if not outcome:
            raise
        _exit(*outcome)


def _prepare(settings: Settings, origins: dict[str, str]) -> Callable[[], None]:
    """Returns what the flags ask for, which they and the data have passed."""
    if settings.mode == "export":
        return _export(settings)
    if settings.mode == "selftest":
        return functools.partial(_selftest, settings, origins)
    run = Run(settings, origins)
    if settings.dry_run:
        return functools.partial(print, plan.describe(run), end="")
    trains = settings.mode in ("train", "train_then_eval")
    if trains and (settings.sweep_learning_rate or settings.sweep_train_epochs):
        return _sweep(run)
    modes = {
        "train": _train,
        "train_then_eval": _train,
        "eval": _follow,
        "probe": _probe,
        "embed": _embed,
        "predict": _embed,
        "check_tpu": _check_tpu,
    }
    return modes[settings.mode](run)


def _set_up_log() -> None:
    """Logs this program's lines with the time of day, not the libraries'.

    Of libraries, errors alone are logged: their warnings are about how this
    program calls them, which its users cannot change.
    """
    tf.get_logger().setLevel("WARNING")
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(
        lambda record: (
            record.levelno > std_logging.WARNING
            or os.path.dirname(record.pathname) == _HERE
            or record.pathname.startswith(_PACKAGE)
        )
    )


def _exit(code: int, message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    sys.exit(code)


class _TrainerIsGone(Exception):
    """The run that is followed shows no sign of life."""


def _outcome(error: Exception, settings: Settings) -> tuple[int, str] | None:
    """Returns exit code and message for an error in the prepared work.

    Returns None for a defect of this program.
    """
    if isinstance(error, trainer.TrainingDiverged):
        return _EXIT_DIVERGED, f"Training stopped: {error}"
    if isinstance(error, trainer.Interrupted):
        return 128 + error.signal_number, f"Interrupted. {error}"
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return _EXIT_USAGE, (
            f"Error: a device or a disk is full: {_one_paragraph(error)} If it "
            "is the memory of a device: a smaller --train_batch_size, "
            "--accumulate_steps, --mixed_precision or --remat needs less."
        )
    if lost := _lost(error, settings):
        return lost
    if isinstance(error, _INPUT_ERRORS_OF_WORK):
        return _EXIT_USAGE, f"Error: {_one_paragraph(error)}"
    message = data.undecodable_images_message(error)
    if message:
        return _EXIT_USAGE, f"Error: {message}"
    if isinstance(error, devices.LOST):
        return _EXIT_TRY_AGAIN, _no_answer(error)
    return None


def _no_answer(error: Exception) -> str:
    return (
        f"A file system or server does not answer: {_one_paragraph(error)}\n"
        "The same command resumes from the last checkpoint."
    )


def _lost(error: Exception, settings: Settings) -> tuple[int, str] | None:
    """Returns exit code and message where another machine has been lost."""
    if isinstance(error, _TrainerIsGone):
        return _EXIT_TRY_AGAIN, str(error)
    if (
        isinstance(error, _NO_ANSWER)
        or getattr(error, "errno", None) in _PASSING_ERRORS
        or _NO_CONNECTION in str(error)
    ):
        return _EXIT_TRY_AGAIN, _no_answer(error)
    strategy = getattr(settings, "strategy", None)
    if not devices.is_lost(error, strategy):
        return None
    return _EXIT_TRY_AGAIN, (
        "Lost the TPU or another machine, perhaps to preemption: "
        f"{_one_paragraph(error)}\nThe same command, on all machines, goes on "
        "from the last checkpoint."
    )


def _one_paragraph(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    return message.split("\n\n")[0]


def resolve_flags() -> tuple[Settings, dict[str, str]]:
    """Returns the flags' values in force and where each comes from.

    The command line comes first, then the run that this one evaluates or
    starts from, then the preset, then what fine-tuning or the objective
    prefers, then the flag's own default.

    Raises:
        ValueError: if flags contradict each other.
    """
    settings, sources = Settings(), {}

    def resolve(name: str, layers: Mapping[str, methods.Values]) -> None:
        value, sources[name] = FLAGS[name].value, "default"
        if FLAGS[name].present:
            sources[name] = "command line"
        else:
            for layer, values in layers.items():
                if values.get(name) is not None:
                    value, sources[name] = values[name], layer
                    break
        setattr(settings, name, value)

    layers: dict[str, methods.Values] = {"its run": _inherited_values()}
    of_preset = f"preset {FLAGS.preset}"
    if FLAGS.preset in methods.EVALUATION_PRESETS:
        layers[of_preset] = methods.EVALUATION_PRESETS[FLAGS.preset]
    resolve("train_mode", layers)
    if FLAGS.preset in methods.PRESETS and settings.train_mode == "pretrain":
        layers[of_preset] = methods.PRESETS[FLAGS.preset]
    for name in ("objective", "target_network", "use_siglip"):
        resolve(name, layers)
    row = methods.canonical_name(settings.objective, settings.use_siglip)
    of_method = methods.METHODS[row].values(
        target_network=sources["target_network"] == "default"
        or settings.target_network
    )
    layers |= (
        {"fine-tuning": _FINETUNE_DEFAULTS}
        if settings.train_mode == "finetune"
        else {row: of_method}
    )
    for name in _OWN_FLAGS:
        resolve(name, layers)
    settings.objective = row
    _check(settings)
    _tidy(settings, sources)
    for line in _without_effect(settings, sources):
        logging.warning(line)
    return settings, sources


def _tidy(settings: Settings, sources: dict[str, str]) -> None:
    """Replaces what flags cannot say by what is meant."""
    _take_renamed(settings, sources)
    for name in ("proj_hidden_dim", "base_filters"):
        numbers = tuple(int(n) for n in getattr(settings, name))
        setattr(settings, name, numbers)
    if settings.train_mode == "finetune":
        settings.accumulate_steps, settings.labelled_batch_share = 1, 0.0
    else:
        settings.sweep_learning_rate = settings.sweep_train_epochs = ()
    if settings.checkpoint == _FROM_SCRATCH:
        settings.checkpoint = None
    # A value given on the command line is not to be searched for.
    for name, of_one in (
        ("sweep_learning_rate", ("learning_rate",)),
        ("sweep_train_epochs", ("train_epochs", "train_steps")),
    ):
        given = any(sources[flag] == "command line" for flag in of_one)
        values = getattr(settings, name)
        if given and sources[name] != "command line":
            values = ()
        number = float if name == "sweep_learning_rate" else int
        setattr(settings, name, tuple(number(value) for value in values))
    if settings.mode == "probe" and not settings.model_dir:
        settings.model_dir = checkpoint_lib.run_directory(settings.checkpoint)
    if settings.mode in ("embed", "predict"):
        settings.dataset = settings.input
        settings.train_split = settings.input_split


def _take_renamed(settings: Settings, sources: dict[str, str]) -> None:
    """Gives flags that a method has another name for their values."""
    for name, meant in methods.METHODS[settings.objective].renamed.items():
        if sources[name] == "command line" == sources[meant]:
            raise ValueError(f"--{name} and --{meant} mean the same here.")
        if sources[name] == "command line":
            setattr(settings, meant, getattr(settings, name))
            sources[meant] = f"--{name}"
    settings.target_decay = settings.target_decay or 0.0
    if not 0 <= settings.target_decay <= 1:
        raise ValueError(
            "--target_decay, for ReLIC also --gamma, must be between 0 and 1. "
            f"Received: {settings.target_decay}."
        )


def _inherited_values() -> dict[str, Any]:
    """Returns flags of the run that this one evaluates or starts from."""
    names: Sequence[str]
    if FLAGS.mode == "eval":
        if not FLAGS.model_dir:
            raise ValueError("--mode=eval needs --model_dir.")
        names, path = _INHERITED_BY_EVAL, FLAGS.model_dir
        _wait_for_run(path, FLAGS.eval_timeout_minutes)
    elif FLAGS.mode in ("probe", "export"):
        names, path = _INHERITED_BY_EVAL, FLAGS.checkpoint
    else:
        names, path = _INHERITED, FLAGS.checkpoint
    values: dict[str, Any] = {}
    if not path or path == _FROM_SCRATCH:
        return values
    # A dry run says so, and plans without it.
    if not (FLAGS.dry_run and storage.why_unreachable(path)):
        foreign = checkpoint_lib.read_published(
            path, target=FLAGS.evaluate_target
        )
        run = checkpoint_lib.read_run(path)
        if foreign:
            values = experiment.encoder_flags(foreign.architecture)
        elif run and "flags" in run:
            values = run["flags"]
        elif run:  # an export
            architecture = model.Architecture(**run["architecture"])
            values = run["architecture"] | experiment.encoder_flags(
                architecture
            )
    return {name: values[name] for name in names if name in values}


def _wait_for_run(directory: str, timeout_minutes: float) -> None:
    """Waits until a trainer has written its `run.json`.

    Raises:
        ValueError: if the path is a file.
        _TrainerIsGone: if that takes longer than the timeout, if not 0.
    """
    if tf.io.gfile.exists(directory) and not tf.io.gfile.isdir(directory):
        raise ValueError(
            f"--model_dir={directory} is a file; --mode=eval needs the "
            "directory of a run."
        )
    if checkpoint_lib.read_run(directory) is None:
        logging.info(
            "Waiting for a trainer to write run.json in %s "
            "(--eval_timeout_minutes=%g) ...",
            directory,
            timeout_minutes,
        )
    started = time.monotonic()
    while checkpoint_lib.read_run(directory) is None:
        waited = (time.monotonic() - started) / 60
        if timeout_minutes and waited > timeout_minutes:
            raise _TrainerIsGone(
                f"No trainer wrote run.json in {directory} within "
                f"{timeout_minutes:g} minutes (--eval_timeout_minutes)."
            )
        time.sleep(_SECONDS_BETWEEN_POLLS)


def _check_trainer_lives(directory: str, timeout_minutes: float) -> None:
    """Raises _TrainerIsGone if a run's files are older than the timeout."""
    written = [
        tf.io.gfile.stat(path).mtime_nsec / 1e9
        for pattern in _SIGNS_OF_LIFE
        for path in tf.io.gfile.glob(os.path.join(directory, pattern))
    ]
    minutes = (time.time() - max(written, default=0.0)) / 60
    if timeout_minutes and minutes > timeout_minutes:
        raise _TrainerIsGone(
            f"The trainer of {directory} is gone: it wrote there last "
            f"{minutes:,.0f} minutes ago, which is longer than "
            f"--eval_timeout_minutes={timeout_minutes:g}. Start training again "
            "with its command, then this evaluation."
        )


def _check(settings: Settings) -> None:
    """Raises ValueError for flags that contradict each other."""
    finetune = settings.train_mode == "finetune"
    if settings.preset in methods.EVALUATION_PRESETS and not finetune:
        raise ValueError(
            f"--preset={settings.preset} is of --train_mode=finetune."
        )
    if not finetune and settings.fine_tune_after_block != -1:
        raise ValueError(
            "--fine_tune_after_block freezes layers, which pretraining does "
            "not support. Received: --train_mode=pretrain "
            f"--fine_tune_after_block={settings.fine_tune_after_block}."
        )
    _check_inputs(settings)
    method = methods.METHODS[settings.objective]
    if settings.remat and method.has_gradient_penalty:
        raise ValueError(
            f"--remat is not for --objective={settings.objective}, whose loss "
            "has gradients in it: TensorFlow computes nothing again for "
            "gradients of gradients."
        )
    if settings.use_siglip and settings.objective != "siglip":
        raise ValueError("--use_siglip is a loss of --objective=relic.")
    views = settings.num_large_views, settings.num_small_views
    multi_view = methods.METHODS[settings.objective].multi_view
    if not finetune and (sum(views) < 2 if multi_view else views != (2, 0)):
        raise ValueError(
            f"The objective {settings.objective} compares "
            f"{'two views or more' if multi_view else 'two large views'}. "
            f"Received: --num_large_views={views[0]} "
            f"--num_small_views={views[1]}."
        )
    partly = settings.fine_tune_after_block not in (-1, 4)
    if finetune and settings.encoder != "resnet" and partly:
        raise ValueError(
            f"Of {settings.encoder}, fine-tuning trains all "
            "(--fine_tune_after_block=-1) or the classifier alone (4)."
        )


def _check_inputs(settings: Settings) -> None:
    """Raises ValueError where a mode lacks what it is to read or write."""
    if settings.dry_run and settings.mode not in ("train", "train_then_eval"):
        raise ValueError(
            f"--dry_run is of training, not --mode={settings.mode}."
        )
    if settings.mode == "selftest" and settings.train_mode != "pretrain":
        raise ValueError("--mode=selftest is of --train_mode=pretrain.")
    reads = settings.mode in ("probe", "embed", "predict", "export")
    given = settings.checkpoint
    if reads and given in (None, "", _FROM_SCRATCH):
        raise ValueError(
            f"--mode={settings.mode} needs --checkpoint, the run to look at."
        )
    finetune = settings.train_mode == "finetune"
    if finetune and not given and settings.mode != "eval":
        raise ValueError(
            "--checkpoint must name the pretrained run; to train from scratch, "
            "give --checkpoint=none."
        )
    if settings.mode in ("embed", "predict") and not settings.input:
        raise ValueError(f"--mode={settings.mode} needs --input, the images.")
    if settings.mode == "check_tpu" and not settings.tpu_topology:
        raise ValueError(
            "--mode=check_tpu needs --tpu_topology, such as v5litepod-32."
        )
    if settings.mode == "embed" and not settings.output:
        raise ValueError("--mode=embed needs --output, the file to write.")


def _without_effect(settings: Settings, sources: dict[str, str]) -> list[str]:
    """Returns a line for every given flag that does nothing in this run."""
    if settings.mode == "export":
        return [
            f"--{name} has no effect: an export takes all from the checkpoint."
            for name in _OWN_FLAGS
            if sources[name] == "command line" and name not in _MEANT_BY_EXPORT
        ]
    method = methods.METHODS[settings.objective]
    of_methods = {
        flag for row in methods.METHODS.values() for flag in _of_method(row)
    }
    reasons = dict(_WITHOUT_MEANING)
    for modes, names in _OF_MODES.items():
        if settings.mode not in modes:
            of = f"it is of --mode={' and '.join(modes)}"
            reasons |= dict.fromkeys(names, of)
    if settings.dry_run:
        del reasons["tpu_topology"]
    if settings.train_mode == "finetune":
        for name in (
            *of_methods,
            *_OF_PRETRAINING,
            *experiment.AUGMENTATION_OVERRIDES,
        ):
            reasons[name] = "it is of pretraining"
        if settings.preset in methods.PRESETS:
            reasons["preset"] = "it is of pretraining"
    else:
        for name in _OF_FINETUNING:
            reasons[name] = "it is of fine-tuning"
        reasons |= _idle(settings)
        for name in of_methods - _of_method(method):
            reasons[name] = f"the objective {settings.objective} has none"
    return [
        f"--{name} has no effect: {reason}."
        for name, reason in reasons.items()
        if sources.get(name) == "command line"
    ]


def _idle(settings: Settings) -> dict[str, str]:
    """Returns why flags do nothing beside the others' values."""
    method = methods.METHODS[settings.objective]
    rules = [
        (
            settings.augmentation != "simclr",
            f"--augmentation={settings.augmentation} has strengths of its own",
            ("color_jitter_strength", "use_blur"),
        ),
        (
            not (settings.mask_dir or settings.saliency),
            "there are no masks without --mask_dir or --saliency",
            ("mask_probability", "mask_fill"),
        ),
        (
            not settings.mask_probability,
            "--mask_probability is 0",
            ("mask_dir", "saliency"),
        ),
        (
            settings.learnable_temperature and method.can_learn_temperature,
            "it is trained, and starts at that of relic-pytorch",
            ("temperature",),
        ),
        (
            not settings.learnable_temperature,
            "the temperature is not trained",
            ("max_inverse_temperature",),
        ),
        (
            not settings.target_network,
            "there is no target network",
            (
                "target_decay",
                "target_bn",
                "gamma",
                "update_gamma_after_step",
                "update_gamma_every_n_steps",
            )
            if method.multi_view
            else (),
        ),
        (
            not settings.num_small_views,
            "there are no small views",
            ("small_image_size", "small_crop_area", "kl_small"),
        ),
        (
            settings.proj_head_mode != "nonlinear",
            f"the head is {settings.proj_head_mode}",
            ("num_proj_layers",),
        ),
        (
            settings.proj_head_mode != "mlp" and not settings.predictor,
            f"the head is {settings.proj_head_mode}",
            ("proj_hidden_dim", "proj_bn"),
        ),
    ]
    return {
        name: reason
        for is_so, reason, names in rules
        if is_so
        for name in names
    }


def _of_method(method: methods.Method) -> set[str]:
    """Returns the flags that mean something for this method and not for all."""
    names = {*method.arguments.values(), *method.renamed}
    if method.has_gradient_penalty:
        names.add("gradient_penalty_weight")
    if method.multi_view:
        names.update(_OF_MULTI_VIEW)
    if method.can_learn_temperature:
        names.update(("learnable_temperature", "max_inverse_temperature"))
    if "num_semantic_positives" in method.defaults:
        names.update(_OF_SEMPPL)
    return names


def _train(run: Run, *, is_trial: bool = False) -> Callable[[], None]:
    """Prepares training; returns the work, which evaluates too if asked.

    A trial of a sweep is followed by others, which a signal stops as well.
    """
    settings = run.settings
    config = experiment.make_train_config(
        settings,
        run.train_data,
        run.strategy.num_replicas_in_sync,
        labelled_ids=run.labelled_ids,
    )
    evaluates = settings.mode == "train_then_eval"
    if evaluates:
        _check_classes(run)
    trainer.freeze(config, run.networks)
    with run.strategy.scope():
        optimizers = trainer.build_optimizers(config, run.networks)
        checkpoints = checkpoint_lib.TrainingCheckpoints(
            settings.model_dir,
            max_to_keep=config.keep_checkpoint_max,
            saves=run.is_chief,
            optimizer=optimizers.networks,
            classifier_optimizer=optimizers.classifier,
            critic_optimizer=optimizers.critic,
            **run.networks.models(),
        )
    record = run.record(config)
    # Before anything is written over: this may find that they do not fit.
    checkpoints.restore_latest()
    run.write(record)
    if settings.checkpoint and not checkpoints.latest:
        checkpoint_lib.restore_pretrained(
            settings.checkpoint,
            run.networks,
            target=settings.evaluate_target,
        )
        run.networks.reset_target()
    labelled_per_batch = round(
        settings.labelled_batch_share * config.batch_size
    )
    make_stream = functools.partial(
        data.train_stream,
        run.train_data,
        batch_size=config.batch_size,
        seed=config.seed,
        views=config.views,
        labelled_ids=run.labelled_ids if labelled_per_batch else None,
        labelled_per_batch=labelled_per_batch,
    )
    reporter = reporting.Reporter(
        settings.model_dir,
        train_steps=config.train_steps,
        batch_size=config.batch_size,
        num_examples=config.num_examples,
        summary_steps=config.summary_steps if run.is_chief else 0,
        learning_rate=trainer.learning_rate_schedule(config),
        preview=lambda step: _sample_views(make_stream, config, step),
    )

    # Before any compute: this looks at all arguments.
    make_stream(num_replicas=run.strategy.num_replicas_in_sync)

    def work() -> None:
        with _Signals() as signals:
            trainer.train(
                config,
                run.networks,
                optimizers,
                lambda step: run.distributed(
                    functools.partial(make_stream, first_step=step)
                ),
                run.strategy,
                checkpoints,
                reporter,
                lambda: signals.received,
            )
        if signals.received and (evaluates or is_trial):
            raise trainer.Interrupted(
                "Trained, not evaluated.", signals.received
            )
        if evaluates:
            run_report.of_classifier(run, *run.evaluate(config.train_steps))

    return work


def _selftest(settings: Settings, origins: dict[str, str]) -> None:
    """Compares all devices with one; exits with 1 where they differ."""
    if origins["dataset"] == "default":
        settings.dataset = sources_lib.PHOTO_PATCHES
    found = selftest.compare(settings, origins)
    agree = all(row.holds for row in found.agreements)
    sys.stdout.write(
        f"{settings.objective}, {settings.encoder} {settings.resnet_depth}, "
        f"batch {found.batch_size}: {found.devices} beside one device.\n"
        f"{selftest.table(found.agreements)}\n"
        f"{'They are the same computation.' if agree else _WHERE_TO_LOOK}\n"
    )
    sys.exit(0 if agree else _EXIT_DIFFERS)


def _sweep(run: Run) -> Callable[[], None]:
    """Prepares a choice of flags on held-out images, then training on all."""
    settings = run.settings
    rates = settings.sweep_learning_rate or (settings.learning_rate,)
    epochs = settings.sweep_train_epochs or (settings.train_epochs,)
    trials = {
        f"rate_{rate:g}-epochs_{count}": {
            "learning_rate": rate,
            "train_epochs": count,
        }
        for rate, count in itertools.product(rates, epochs)
    }

    def prepare(name: str) -> tuple[Run, Callable[[], None]]:
        directory = os.path.join(settings.model_dir, "sweep", name)
        trial = run.held_out(directory, mode="train", **trials[name])
        return trial, _train(trial, is_trial=True)

    def try_one(name: str) -> float:
        trial, train = prepare(name)
        logging.info("Sweep: %s", name)
        try:
            train()
        except trainer.TrainingDiverged as error:
            logging.warning("%s", error)
            return 0.0
        newest = checkpoint_lib.latest_checkpoint(trial.settings.model_dir)
        measured, _ = trial.evaluate(checkpoint_lib.checkpoint_step(newest))
        return measured["top_1_accuracy"]

    def work() -> None:
        accuracies = {name: try_one(name) for name in trials}
        best = max(accuracies, key=lambda name: accuracies[name])
        logging.info("Sweep: held-out top-1 %s; %s.", accuracies, best)
        reporting.write_json(
            settings.model_dir,
            "sweep.json",
            {"held_out_top_1_accuracy": accuracies, "chosen": trials[best]},
        )
        run.choose("sweep", **trials[best])
        _train(run)()

    # Before any compute: this looks at everything.
    if settings.mode == "train_then_eval":
        _check_classes(run)
    for values in trials.values():
        config = experiment.make_train_config(
            Settings(**vars(settings) | values),
            run.train_data,
            run.strategy.num_replicas_in_sync,
        )
    run.record(config, reports_flags=False)
    prepare(next(iter(trials)))
    return work


def _sample_views(
    make_stream: Callable[..., tf.data.Dataset],
    config: trainer.TrainConfig,
    step: int,
) -> list[np.ndarray]:
    """Returns the views of the first images of a step's batch."""
    batch = next(iter(make_stream(first_step=step, num_steps=1)))
    views = trainer.make_views(batch, config.views, config.seed)
    return [view[:_IMAGES_IN_GRID].numpy() for view in views]


def _follow(run: Run) -> Callable[[], None]:
    """Prepares the evaluation of each checkpoint of a run to its last."""
    _check_classes(run)
    directory = run.settings.model_dir

    def train_steps() -> int:
        # Read again each time: the run may have been prolonged.
        record = checkpoint_lib.read_run(directory)
        if record is None:
            raise _TrainerIsGone(f"The run.json of {directory} is gone.")
        return record["train_steps"]

    timeout_minutes = run.settings.eval_timeout_minutes

    evaluated: list[str] = []

    def wait() -> bool:
        train_steps()  # raises where the run was deleted
        if tf.train.latest_checkpoint(directory) in (None, *evaluated):
            _check_trainer_lives(directory, timeout_minutes)
        return False  # there may be more checkpoints

    def work() -> None:
        logging.info(
            "Waiting for checkpoints in %s (--eval_timeout_minutes=%g) ...",
            directory,
            timeout_minutes,
        )
        for path in tf.train.checkpoints_iterator(
            directory,
            min_interval_secs=_SECONDS_BETWEEN_POLLS,
            timeout=_SECONDS_BETWEEN_POLLS,
            timeout_fn=wait,
        ):
            try:
                checkpoint_lib.restore_networks(path, **run.networks.models())
                step = checkpoint_lib.checkpoint_step(path)
            except (tf.errors.NotFoundError, ValueError):
                if tf.io.gfile.exists(f"{path}.index"):
                    raise
                logging.info("%s is gone already; waiting for the next.", path)
                continue
            evaluated.append(path)
            run.evaluate(step)
            if step >= train_steps():
                return

    return work


def _check_classes(run: Run) -> None:
    if not run.architecture.num_classes:
        raise ValueError(
            "There is no classifier to evaluate: the data has no labels, or "
            "--lineareval_while_pretraining=false."
        )
    classes = run.eval_data.num_classes
    if classes != run.architecture.num_classes:
        raise ValueError(
            f"{run.eval_data.split} has {classes} classes, "
            f"{run.train_data.split} {run.architecture.num_classes}."
        )


def _probe(run: Run) -> Callable[[], None]:
    """Prepares the comparison of features with simple baselines."""
    settings = run.settings
    options = probe.Options(
        knn_k=settings.knn_k,
        knn_temperature=settings.knn_temperature,
        label_budgets=tuple(settings.label_budgets),
        seeds=settings.probe_seeds,
        max_train=settings.probe_max_train,
    )
    cache = settings.feature_cache or os.path.join(
        settings.model_dir, "features"
    )
    with run.strategy.scope():
        encoders = {
            "raw pixels": None,
            "random encoder": model.encoder_of_images(run.networks),
            "pretrained encoder": checkpoint_lib.load_encoder(
                settings.checkpoint, target=settings.evaluate_target
            ),
        }
    probe.check_classes(run.train_data, run.eval_data)

    def work() -> None:
        results = probe.measure(
            encoders,
            run.train_data,
            run.eval_data,
            settings.image_size,
            options,
            cache=None if cache == _NOWHERE else cache,
            **run.forward_options(),
        )
        sys.stdout.write(probe.table(results) + "\n")
        reporting.write_json(
            settings.model_dir,
            "probe.json",
            results.record()
            | {"checkpoint": settings.checkpoint, "flags": vars(settings)},
        )
        run_report.of_probe(run, results)

    return work


def _embed(run: Run) -> Callable[[], None]:
    """Prepares embeddings of, or predictions for, the input's images."""
    settings = run.settings
    predicts = settings.mode == "predict"
    if settings.output:
        embed.check_output(
            settings.output,
            embed.PREDICTION_FORMATS if predicts else embed.EMBEDDING_FORMATS,
        )
    with run.strategy.scope():
        if predicts:
            network, classes = checkpoint_lib.load_classifier(
                settings.checkpoint
            )
        else:
            network = checkpoint_lib.load_encoder(
                settings.checkpoint, target=settings.evaluate_target
            )

    def work() -> None:
        outputs = features.compute_outputs(
            network,
            run.train_data,
            settings.image_size,
            **run.forward_options(),
        )
        images = run.train_data
        if predicts:
            missing = embed.write_predictions(
                settings.output, images, outputs, classes, settings.top_k
            )
        else:
            missing = embed.write_embeddings(settings.output, images, outputs)
        logging.info(
            "%d images written to %s, %d unreadable.",
            len(outputs.ids),
            settings.output or "standard output",
            missing,
        )

    return work


def _export(settings: Settings) -> Callable[[], None]:
    """Prepares writing a checkpoint's networks for other programs."""
    export.check_formats(settings.format)
    # Other runtimes compute in float32; a GPU would not, here.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    path = settings.checkpoint
    networks = checkpoint_lib.load_networks(
        path, target=settings.evaluate_target
    )
    size = settings.image_size or experiment.usual_image_size(
        networks.architecture
    )
    channels = networks.architecture.channels
    pictures = [p.resize((size, size)) for p in sources_lib.pictures()]
    images = np.stack([np.asarray(p, np.float32) / 255 for p in pictures])
    images = images[..., np.arange(channels) % images.shape[-1]]
    directory = settings.export_dir or os.path.join(
        checkpoint_lib.run_directory(path), "export"
    )
    run = checkpoint_lib.read_run(path) or {}
    about = {
        "checkpoint": path,
        "target": settings.evaluate_target,
        "objective": run.get("flags", {}).get("objective"),
        "train_mode": run.get("flags", {}).get("train_mode"),
        "commit": run.get("commit"),
    }

    def work() -> None:
        results = export.write(
            networks, directory, settings.format, images, about
        )["formats"]
        sys.stdout.write(export.table(results) + "\n")
        refused = [name for name in results if "refused" in results[name]]
        if refused:
            _exit(_EXIT_USAGE, f"Error: not written: {', '.join(refused)}.")

    return work


def _check_tpu(run: Run) -> Callable[[], None]:
    """Prepares the compilation of the training step for a TPU."""
    where = tpu_slices.find_slice(run.settings.tpu_topology)
    check_tpu.require_compiler()
    check_tpu.train_config(run, where)  # before any compute

    def work() -> None:
        findings = check_tpu.check(
            run, where, find_batch=run.settings.find_batch
        )
        sys.stdout.write(check_tpu.report(findings))
        if findings.compiled.crashed:
            sys.exit(1)
        if not findings.compiled.fits:
            sys.exit(_EXIT_NOT_FITTING)

    return work


class _Signals:
    """Remembers a request to stop, for the loop to answer between calls.

    Attributes:
        received: number of the signal that was received; 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "_Signals":
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received:  # the second time is meant
            signal.default_int_handler(number, None)
        self.received = number
        logging.warning("Signal %d: saving after this call ...", number)


if __name__ == "__main__":
    app.run(main)
