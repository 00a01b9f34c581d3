# SPDX-License-Identifier: Apache-2.0
"""Pretrains image encoders and measures what they learned.

    python run.py --train_mode=pretrain --objective=rpc --dataset=cifar10
    python run.py --train_mode=finetune --mode=train_then_eval \
        --fine_tune_after_block=4 --checkpoint=runs/... --dataset=cifar10

Every flag is defined and read here; the other modules take plain arguments.
A flag left unset takes its value from the checkpoint to be fine-tuned or
evaluated, or from the objective; the log at start says which.
"""

import dataclasses
import functools
import itertools
import json
import logging as std_logging
import os
import platform
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Before TensorFlow is loaded: its start-up notes are a page, and without a GPU
# one of them is an error about that.
os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL",
    "2" if os.path.exists("/proc/driver/nvidia") else "3",
)

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags, logging

import checkpoint as checkpoint_lib
import data
import data_util
import devices
import model
import probe
import reporting
import schedules
import trainer

FLAGS = flags.FLAGS

_HERE = os.path.dirname(os.path.abspath(__file__))
_EXIT_USAGE = 2
_EXIT_DIVERGED = 3

_OBJECTIVES = (*trainer.METHODS, *trainer.ALIASES)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_IMAGENET_CROP_PROPORTION = 0.875
_IMAGENET_SIZE = 224  # pixels
_LARGEST_SMALL_IMAGE = 32  # pixels; up to here CIFAR's stem, and no crop
_SECONDS_BETWEEN_POLLS = 5
_IMAGES_IN_GRID = 16
_FROM_SCRATCH = "none"  # as --checkpoint

_FLAGS_OF_LIBRARIES = frozenset(FLAGS)


def _by_method(name: str) -> str:
    """Returns the part of a help text that lists an objective's defaults."""
    values = {
        key: method.defaults[name]
        for key, method in trainer.METHODS.items()
        if name in method.defaults
    }
    return "Unset: " + ", ".join(f"{k} {v}" for k, v in values.items()) + "."


# What to do.
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "train_then_eval", "probe"],
    "train; eval: follow --model_dir, as a second process, and evaluate each "
    "new checkpoint until training is done; train_then_eval; probe: compare "
    "--checkpoint's features with raw pixels and a random encoder.",
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
flags.DEFINE_string(
    "model_dir",
    None,
    "Where checkpoints, events and results go; a run found there goes on. "
    "Unset: runs/TRAIN_MODE-OBJECTIVE-DATASET.",
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "Run directory or checkpoint whose encoder and projection head training "
    "starts from, or which is probed; none: from scratch.",
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
    "photo_patches (built in), a TFDS name, a folder of images or an .npz.",
)
flags.DEFINE_string("data_dir", None, "Where TFDS keeps its data sets.")
flags.DEFINE_string("train_split", "train", "Split for training.")
flags.DEFINE_string(
    "eval_split",
    None,
    "Split for evaluation. Unset: test, or validation for imagenet2012.",
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
    "eval_batch_size", 256, "Images a step of evaluation.", lower_bound=1
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
    "steps_per_loop",
    0,
    "Steps between looks at the host; 0: as many as take two seconds.",
    lower_bound=0,
)

# Optimisation.
flags.DEFINE_enum(
    "optimizer", "lars", ["lars", "momentum", "adam"], "Optimizer."
)
flags.DEFINE_enum(
    "lars_variant",
    "simclr",
    ["simclr", "deepmind"],
    "Whether LARS applies the learning rate before or after momentum.",
)
flags.DEFINE_float(
    "learning_rate",
    0.3,
    "Peak learning rate before learning_rate_scaling.",
    lower_bound=0,
)
flags.DEFINE_enum(
    "learning_rate_scaling",
    "linear",
    ["linear", "sqrt", "none"],
    "Factor by the batch size B: B / 256, the root of B, or 1.",
)
flags.DEFINE_float(
    "warmup_epochs", 10, "Epochs of linear warm-up.", lower_bound=0
)
flags.DEFINE_float(
    "weight_decay",
    None,
    f"L2 of kernels. {_by_method('weight_decay')}",
    lower_bound=0,
)
flags.DEFINE_float(
    "momentum", 0.9, "Of lars and momentum.", lower_bound=0, upper_bound=1
)

# Objective.
flags.DEFINE_float(
    "temperature", None, f"Divides scores. {_by_method('temperature')}"
)
flags.DEFINE_bool(
    "hidden_norm",
    None,
    f"Whether projections are l2-normalised. {_by_method('hidden_norm')}",
)
flags.DEFINE_float(
    "alpha", None, f"RPC: weight of negatives' scores. {_by_method('alpha')}"
)
flags.DEFINE_float(
    "beta", None, f"RPC: of positives' squared scores. {_by_method('beta')}"
)
flags.DEFINE_float(
    "gamma", None, f"RPC: of negatives' squared scores. {_by_method('gamma')}"
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
    f"Of the critic's gradient. {_by_method('gradient_penalty_weight')}",
    lower_bound=0,
)
flags.DEFINE_bool(
    "lineareval_while_pretraining",
    True,
    "Whether a linear classifier is trained beside, behind a stop-gradient.",
)

# Networks.
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
    ["fixed", "same"],
    "Of strided convolutions: symmetric (SimCLR) or TensorFlow's SAME.",
)
flags.DEFINE_float(
    "sk_ratio", 0.0, "Selective kernels if > 0; try 0.0625.", lower_bound=0
)
flags.DEFINE_float(
    "se_ratio", 0.0, "Squeeze and excitation if > 0.", lower_bound=0
)
flags.DEFINE_bool(
    "zero_init_residual", True, "Whether residual blocks start as identities."
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
    ["none", "linear", "nonlinear"],
    "Projection head.",
)
flags.DEFINE_integer(
    "proj_out_dim", 128, "Size of the projection.", lower_bound=1
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

# Augmentation. None: the preset's value.
flags.DEFINE_enum(
    "augmentation",
    "simclr",
    ["simclr", "byol"],
    "Preset of the views: SimCLR's, or BYOL's asymmetric pair.",
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
_AUGMENTATION_RANGES = ("crop_area", "crop_aspect", "blur_sigma")
_AUGMENTATION_OVERRIDES = (
    *_AUGMENTATION_FLOATS,
    *_AUGMENTATION_RANGES,
    "brightness_mode",
)
for _name, _help in _AUGMENTATION_FLOATS.items():
    flags.DEFINE_float(_name, None, _help)
flags.DEFINE_enum(
    "brightness_mode",
    None,
    data_util.BRIGHTNESS_MODES,
    "Whether brightness jitter multiplies or adds.",
)

# Devices.
flags.DEFINE_bool("use_tpu", False, "Whether to run on a TPU.")
flags.DEFINE_string("tpu_name", None, "Cloud TPU's name, local or grpc://...")
flags.DEFINE_string("tpu_zone", None, "Its zone. Unset: from the metadata.")
flags.DEFINE_string("gcp_project", None, "Its project. Unset: as above.")
flags.DEFINE_string("master", None, "Address of the TPU, instead of its name.")
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
    "augmentation",
    "color_jitter_strength",
    "use_blur",
)
_OF_FINETUNING = ("fine_tune_after_block", "zero_init_logits_layer")
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
    "resnet_depth",
    "width_multiplier",
    "stem",
    "padding",
    "sk_ratio",
    "se_ratio",
    "global_bn",
    "batch_norm_decay",
    "proj_head_mode",
    "proj_out_dim",
    "num_proj_layers",
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


Settings = types.SimpleNamespace  # the flags in force, by name


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
    modes = {
        "train": _train,
        "train_then_eval": _train,
        "eval": _follow,
        "probe": _probe,
    }
    try:
        run = Run(*resolve_flags())
        work = modes[run.settings.mode](run)
    except (ValueError, OSError, tf.errors.OpError) as error:
        _exit(_EXIT_USAGE, f"Error: {_one_paragraph(error)}")
    try:
        work()
    except trainer.TrainingDiverged as error:
        _exit(_EXIT_DIVERGED, f"Training stopped: {error}")
    except trainer.Interrupted as error:
        _exit(128 + _Signals.received, f"Interrupted. {error}")


def _set_up_log() -> None:
    """Logs this program's lines with the time of day, not TensorFlow's."""
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s"))
    handler.addFilter(
        lambda record: (
            record.levelno > std_logging.INFO
            or os.path.dirname(record.pathname) == _HERE
        )
    )


def _exit(code: int, message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.exit(code)


def _one_paragraph(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    return message.split("\n\n")[0]


def resolve_flags() -> tuple[Settings, dict[str, str]]:
    """Returns the flags' values in force and where each comes from.

    The command line comes first, then the run that this one evaluates or
    starts from, then what fine-tuning or the objective prefers, then the
    flag's own default.

    Raises:
        ValueError: if flags contradict each other.
    """
    inherited = _inherited_values()
    settings, sources = Settings(), {}

    def resolve(name: str, layers: dict[str, Mapping[str, Any]]) -> None:
        value, sources[name] = FLAGS[name].value, "default"
        if FLAGS[name].present:
            sources[name] = "command line"
        else:
            for layer, values in layers.items():
                if values.get(name) is not None:
                    value, sources[name] = values[name], layer
                    break
        setattr(settings, name, value)

    layers: dict[str, Mapping[str, Any]] = {"its run": inherited}
    for name in ("train_mode", "objective"):
        resolve(name, layers)
    objective = trainer.ALIASES.get(settings.objective, settings.objective)
    if settings.train_mode == "finetune":
        layers["fine-tuning"] = _FINETUNE_DEFAULTS
    else:
        layers[objective] = trainer.METHODS[objective].defaults
    for name in _OWN_FLAGS:
        resolve(name, layers)
    settings.objective = objective
    _check(settings)
    if settings.checkpoint == _FROM_SCRATCH:
        settings.checkpoint = None
    for line in _without_effect(settings, sources):
        logging.warning(line)
    return settings, sources


def _inherited_values() -> dict[str, Any]:
    """Returns flags of the run that this one evaluates or starts from."""
    names: Sequence[str]
    if FLAGS.mode == "eval":
        if not FLAGS.model_dir:
            raise ValueError("--mode=eval needs --model_dir.")
        names, path = _INHERITED_BY_EVAL, FLAGS.model_dir
        _wait_for_run(path)
    elif FLAGS.mode == "probe":
        names, path = _INHERITED_BY_EVAL, FLAGS.checkpoint
    else:
        names, path = _INHERITED, FLAGS.checkpoint
    run = checkpoint_lib.read_run(path) if path else None
    values = run["flags"] if run else {}
    return {name: values[name] for name in names if name in values}


def _wait_for_run(directory: str) -> None:
    if checkpoint_lib.read_run(directory) is None:
        logging.info("Waiting for a run in %s ...", directory)
    while checkpoint_lib.read_run(directory) is None:
        time.sleep(_SECONDS_BETWEEN_POLLS)


def _check(settings: Settings) -> None:
    """Raises ValueError for flags that contradict each other."""
    finetune = settings.train_mode == "finetune"
    if not finetune and settings.fine_tune_after_block != -1:
        raise ValueError(
            "--fine_tune_after_block freezes layers, which pretraining does "
            "not support. Received: --train_mode=pretrain "
            f"--fine_tune_after_block={settings.fine_tune_after_block}."
        )
    needs_checkpoint = settings.mode == "probe" or (
        finetune and settings.mode != "eval"
    )
    if needs_checkpoint and not settings.checkpoint:
        raise ValueError(
            "--checkpoint must name the pretrained run; to train from scratch, "
            "give --checkpoint=none."
            if finetune
            else "--mode=probe needs --checkpoint, the run to look at."
        )
    if settings.use_tpu and settings.cpu_replicas > 1:
        raise ValueError("--cpu_replicas is for runs without a TPU.")


def _without_effect(settings: Settings, sources: dict[str, str]) -> list[str]:
    """Returns a line for every given flag that does nothing in this run."""
    method = trainer.METHODS[settings.objective]
    of_methods = {
        name for row in trainer.METHODS.values() for name in row.defaults
    } - {"weight_decay"}
    reasons = dict(_WITHOUT_MEANING)
    if settings.train_mode == "finetune":
        for name in (*of_methods, *_OF_PRETRAINING, *_AUGMENTATION_OVERRIDES):
            reasons[name] = "it is of pretraining"
    else:
        for name in _OF_FINETUNING:
            reasons[name] = "it is of fine-tuning"
        for name in of_methods - set(method.defaults):
            reasons[name] = f"the objective {settings.objective} has none"
    return [
        f"--{name} has no effect: {reason}."
        for name, reason in reasons.items()
        if sources.get(name) == "command line"
    ]


class Run:
    """What every mode needs: settings, data, devices, networks.

    Attributes:
        settings: the flags in force; image_size, channels, stem and model_dir
            are resolved.
        strategy: where steps run.
        train_data: the training split.
        architecture: of the networks.
        networks: made in the strategy's scope.
    """

    def __init__(self, settings: Settings, sources: dict[str, str]) -> None:
        self.settings = settings
        self._sources = sources
        settings.model_dir = settings.model_dir or os.path.join(
            "runs",
            f"{settings.train_mode}-{settings.objective}-"
            + os.path.basename(settings.dataset.rstrip("/")),
        )
        self._set_numerics()
        self.strategy = devices.make_strategy(
            use_tpu=settings.use_tpu,
            tpu_name=settings.master or settings.tpu_name,
            tpu_zone=settings.tpu_zone,
            gcp_project=settings.gcp_project,
            cpu_replicas=settings.cpu_replicas,
        )
        if settings.jit_compile is None:
            alone = self.strategy.num_replicas_in_sync == 1
            settings.jit_compile = alone and devices.has_gpu()
        self.train_data = self._load(settings.train_split)
        self._settle_sizes()
        self.architecture = make_architecture(
            settings, self.train_data.num_classes
        )
        with self.strategy.scope():
            self.networks = model.build_networks(self.architecture)

    def _set_numerics(self) -> None:
        """Sets TensorFlow up; before anything else is done with it."""
        settings = self.settings
        on_cpu = not devices.has_gpu() and not settings.use_tpu
        if settings.deterministic is None:
            settings.deterministic = on_cpu
        if settings.deterministic:
            tf.config.experimental.enable_op_determinism()
            # Sums that it rewrites come out different from one call to the
            # next on several threads (TensorFlow 2.20 on a CPU).
            tf.config.optimizer.set_experimental_options(
                {"arithmetic_optimization": False}
            )
        # Compiled by XLA, convolutions are slower on a CPU, chains of pointwise
        # operations several times faster.
        settings.jit_augmentation = on_cpu
        keras.utils.set_random_seed(settings.seed)
        if settings.mixed_precision:
            keras.mixed_precision.set_global_policy("mixed_bfloat16")

    def _load(self, split: str) -> data.Dataset:
        return data.load(
            self.settings.dataset,
            split,
            data_dir=self.settings.data_dir,
            channels=self.settings.channels,
        )

    @functools.cached_property
    def eval_data(self) -> data.Dataset:
        """The split for evaluation: test or validation if none was named."""
        if self.settings.eval_split:
            return self._load(self.settings.eval_split)
        try:
            return self._load("test")
        except ValueError:
            return self._load("validation")

    def _settle_sizes(self) -> None:
        """Takes what flags leave open from the data."""
        settings, size = self.settings, self.train_data.image_size
        if settings.image_size is None:
            settings.image_size = min(size) if size else _IMAGENET_SIZE
        if size and settings.image_size > min(size):
            raise ValueError(
                f"--image_size={settings.image_size} exceeds the images of "
                f"{settings.dataset}, which are {size[0]}x{size[1]}."
            )
        settings.channels = self.train_data.channels
        if settings.stem is None:
            small = settings.image_size <= _LARGEST_SMALL_IMAGE
            settings.stem = "cifar" if small else "imagenet"

    def distributed(
        self, make_stream: Callable[..., tf.data.Dataset]
    ) -> tf.data.Dataset:
        """Returns `make_stream`'s batches, one part of each a replica."""
        return self.strategy.distribute_datasets_from_function(
            lambda context: make_stream(
                num_replicas=context.num_replicas_in_sync,
                pipeline_index=context.input_pipeline_id,
                num_pipelines=context.num_input_pipelines,
            )
        )

    def evaluate(self, step: int) -> None:
        """Evaluates the networks and writes the result."""
        settings, dataset = self.settings, self.eval_data
        crop = (
            None
            if settings.image_size <= _LARGEST_SMALL_IMAGE
            else _IMAGENET_CROP_PROPORTION
        )
        stream = self.distributed(
            functools.partial(
                data.eval_stream,
                dataset,
                batch_size=settings.eval_batch_size,
                image_size=settings.image_size,
                crop_proportion=crop or 1.0,
            )
        )
        if settings.eval_steps:
            stream = itertools.islice(stream, settings.eval_steps)
        measured = trainer.evaluate(
            self.networks,
            stream,
            settings.image_size,
            self.strategy,
            None if dataset.is_encoded else crop,
        )
        result = measured | {
            "global_step": step,
            "dataset": settings.dataset,
            "split": dataset.split,
            "train_mode": settings.train_mode,
        }
        reporting.write_result(settings.model_dir, result, step)
        logging.info(
            "Step %d, %s %s: top-1 %.2f %%, top-5 %.2f %% of %d images.",
            step,
            settings.dataset,
            dataset.split,
            100 * measured["top_1_accuracy"],
            100 * measured["top_5_accuracy"],
            measured["num_examples"],
        )

    def write(self, config: trainer.TrainConfig) -> None:
        """Writes `run.json`, after a look at what is in the directory.

        Raises:
            ValueError: if the directory holds a run of other networks.
        """
        settings, architecture = self.settings, self.architecture
        before = checkpoint_lib.read_run(settings.model_dir)
        now = {
            "flags": vars(settings),
            "sources": self._sources,
            "architecture": dataclasses.asdict(architecture),
            "train_steps": config.train_steps,
            "command": sys.argv,
            "commit": _commit(),
            "devices": list(self.strategy.extended.worker_devices),
            "versions": {
                "python": platform.python_version(),
                "tensorflow": tf.__version__,
                "keras": keras.__version__,
            },
        }
        now = json.loads(json.dumps(now))  # tuples become lists, as when read
        if before and tf.train.latest_checkpoint(settings.model_dir):
            _compare_runs(settings.model_dir, before, now)
        checkpoint_lib.write_run(settings.model_dir, now)


def _compare_runs(
    directory: str, before: dict[str, Any], now: dict[str, Any]
) -> None:
    """Refuses to go on with other networks; reports other flags."""

    def differing(part: str) -> list[str]:
        return [
            f"{name}: {before[part].get(name)} there, {value} here"
            for name, value in now[part].items()
            if before[part].get(name) != value
        ]

    networks = differing("architecture")
    if before["flags"]["train_mode"] != now["flags"]["train_mode"]:
        networks.append("train_mode")
    if networks:
        raise ValueError(
            f"{directory} holds a run of other networks ({'; '.join(networks)})"
            ". Choose another --model_dir, or the same flags."
        )
    for line in differing("flags"):
        logging.warning("Going on with another flag than before: %s", line)


def make_architecture(
    settings: Settings, num_classes: int
) -> model.Architecture:
    """Returns the networks that the flags describe."""
    needs_classifier = (
        settings.train_mode == "finetune"
        or settings.lineareval_while_pretraining
    )
    if settings.train_mode == "finetune" and not num_classes:
        raise ValueError(
            f"Fine-tuning needs labels; {settings.dataset} "
            f"{settings.train_split} has none."
        )
    normalize = settings.normalize == "imagenet"
    if normalize and settings.channels != len(_IMAGENET_MEAN):
        raise ValueError(
            "--normalize=imagenet is of 3 channels. "
            f"Received images of {settings.channels}."
        )
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(model.Architecture)
        if hasattr(settings, field.name)
    }
    return model.Architecture(
        **values,
        num_classes=num_classes if needs_classifier else 0,
        image_mean=_IMAGENET_MEAN if normalize else (),
        image_std=_IMAGENET_STD if normalize else (),
    )


def make_views(settings: Settings) -> tuple[data_util.Augmentation, ...]:
    """Returns the augmentation of each view that the flags describe."""
    size = settings.image_size
    if settings.train_mode == "finetune":
        # Crop and flip alone, as SimCLR and BYOL do.
        return (
            data_util.simclr_augmentation(
                size,
                jitter_probability=0.0,
                grayscale_probability=0.0,
                blur_probability=0.0,
            ),
        )
    overrides = {
        name: getattr(settings, name)
        for name in _AUGMENTATION_OVERRIDES
        if getattr(settings, name) is not None
    }
    for name in set(overrides) & set(_AUGMENTATION_RANGES):
        overrides[name] = tuple(float(x) for x in overrides[name])
    if settings.augmentation == "byol":
        return tuple(
            data_util.byol_augmentation(size, view=view, **overrides)
            for view in (0, 1)
        )
    view = data_util.simclr_augmentation(
        size,
        strength=settings.color_jitter_strength,
        use_blur=settings.use_blur,
        **overrides,
    )
    return (view, view)


def make_train_config(
    settings: Settings, num_examples: int, num_replicas: int
) -> trainer.TrainConfig:
    """Returns what the training loop needs, with all counts in steps."""
    batch_size = settings.train_batch_size
    if batch_size % num_replicas:
        raise ValueError(
            f"--train_batch_size={batch_size} does not divide among "
            f"{num_replicas} replicas."
        )
    epoch_steps = max(1, round(num_examples / batch_size))
    train_steps = settings.train_steps or schedules.train_steps(
        num_examples, settings.train_epochs, batch_size
    )
    warmup_steps = schedules.warmup_steps(
        num_examples, settings.warmup_epochs, batch_size
    )
    if settings.train_mode == "pretrain" and warmup_steps >= train_steps:
        logging.warning(
            "The warm-up of %d steps is longer than training (%d steps): the "
            "learning rate stays below its peak.",
            warmup_steps,
            train_steps,
        )
    method = trainer.METHODS[settings.objective]
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(trainer.TrainConfig)
        if hasattr(settings, field.name)
    }
    values |= {
        "hyperparameters": {
            argument: getattr(settings, flag)
            for argument, flag in method.hyperparameters.items()
        },
        "gradient_penalty_weight": settings.gradient_penalty_weight or 0.0,
        "views": make_views(settings),
        "batch_size": batch_size,
        "num_examples": num_examples,
        "train_steps": train_steps,
        "warmup_steps": warmup_steps,
        "peak_learning_rate": schedules.scaled_learning_rate(
            settings.learning_rate, batch_size, settings.learning_rate_scaling
        ),
        "checkpoint_steps": settings.checkpoint_steps
        or settings.checkpoint_epochs * epoch_steps,
        "summary_steps": settings.train_summary_steps,
    }
    return trainer.TrainConfig(**values)


def _train(run: Run) -> Callable[[], None]:
    """Prepares training; returns the work, which evaluates too if asked."""
    settings = run.settings
    config = make_train_config(
        settings, run.train_data.num_examples, run.strategy.num_replicas_in_sync
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
            optimizer=optimizers.networks,
            classifier_optimizer=optimizers.classifier,
            **run.networks.models(),
        )
    run.write(config)
    if settings.checkpoint and not checkpoints.latest:
        checkpoint_lib.restore_networks(
            settings.checkpoint,
            encoder=run.networks.encoder,
            projection=run.networks.projection,
        )
    make_stream = functools.partial(
        data.train_stream,
        run.train_data,
        batch_size=config.batch_size,
        seed=config.seed,
        views=config.views,
    )
    reporter = reporting.Reporter(
        settings.model_dir,
        train_steps=config.train_steps,
        batch_size=config.batch_size,
        num_examples=config.num_examples,
        summary_steps=config.summary_steps,
        learning_rate=trainer.learning_rate_schedule(config),
        preview=lambda step: _sample_views(make_stream, config, step),
    )

    # Before any compute: this looks at all arguments.
    make_stream(num_replicas=run.strategy.num_replicas_in_sync)

    def work() -> None:
        signals = _Signals()
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
            lambda: bool(signals.received),
        )
        if evaluates:
            run.evaluate(config.train_steps)

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
        return (checkpoint_lib.read_run(directory) or {})["train_steps"]

    def work() -> None:
        for path in tf.train.checkpoints_iterator(
            directory, min_interval_secs=_SECONDS_BETWEEN_POLLS
        ):
            try:
                checkpoint_lib.restore_networks(path, **run.networks.models())
                step = checkpoint_lib.checkpoint_step(path)
            except tf.errors.NotFoundError:
                logging.info("%s is gone already; waiting for the next.", path)
                continue
            run.evaluate(step)
            if step >= train_steps():
                return

    return work


def _check_classes(run: Run) -> None:
    if not run.networks.classifier:
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
    encoders = {
        "raw pixels": None,
        "random encoder": model.encoder_of_images(run.networks),
        "pretrained encoder": checkpoint_lib.load_encoder(settings.checkpoint),
    }
    test_data = run.eval_data

    def work() -> None:
        accuracies = probe.compare(
            encoders, run.train_data, test_data, settings.image_size
        )
        heading = f"{settings.dataset}, {test_data.num_examples} test images"
        sys.stdout.write(probe.table(accuracies, heading) + "\n")

    return work


class _Signals:
    """Remembers a request to stop, for the loop to answer between calls."""

    received = 0

    def __init__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: Any) -> None:
        if _Signals.received:  # the second time is meant
            signal.default_int_handler(number, None)
        _Signals.received = number
        logging.warning("Signal %d: saving after this call ...", number)


def _commit() -> str | None:
    """Returns the commit of this program's own repository, if it has one."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=_HERE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    app.run(main)
