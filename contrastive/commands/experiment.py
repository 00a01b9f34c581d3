# SPDX-License-Identifier: Apache-2.0
"""What the flags describe: data, devices, networks, views, schedule.

Takes the flags in force as one object, their names as attributes; only
`run.py` reads them from the command line.
"""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

import data
import data_util
import model
from contrastive.config import methods
from contrastive.devices import devices
from contrastive.report import reporting
from contrastive.sources import labelled
from contrastive.sources.sources import NoSuchSplit
from contrastive.training import schedules, trainer
from contrastive.weights import checkpoint as checkpoint_lib

Settings = types.SimpleNamespace  # the flags in force, by name

_HERE = os.path.dirname(os.path.abspath(__file__))
_IMAGENET_CROP_PROPORTION = 0.875
_IMAGENET_SIZE = 224  # pixels
_LARGEST_SMALL_IMAGE = 32  # pixels; up to here CIFAR's stem, and no crop
_QUEUE_BATCHES = 20
# Modes that build what training needs.
TRAINING_MODES = ("train", "train_then_eval", "selftest", "check_tpu")
# Splits that are tried in turn if none is given for evaluation.
_EVAL_SPLITS = ("test", "validation")
_DATA_FLAGS = ("dataset", "data_dir", "train_split", "seed")
# Flags that replace the value of an augmentation's preset.
AUGMENTATION_OVERRIDES = tuple(
    field.name
    for field in dataclasses.fields(data_util.Augmentation)
    if field.name
    not in ("size", "crop", "crop_min_covered", "mask_probability", "mask_fill")
)


class Run:
    """What every mode needs: settings, data, devices, networks.

    Attributes:
        settings: the flags in force; what depends on the data, such as
            image_size, channels and stem, is resolved.
        strategy: where steps run.
        is_chief: whether this process writes files; of several machines, one.
        train_data: the training split.
    """

    def __init__(
        self,
        settings: Settings,
        sources: dict[str, str],
        *,
        first_alone: bool = False,
    ) -> None:
        """`first_alone`: whether only the first of the devices is used."""
        self.settings = settings
        self._sources = sources
        settings.model_dir = settings.model_dir or os.path.join(
            "runs",
            f"{settings.train_mode}-{settings.objective}-"
            + os.path.basename(settings.dataset.rstrip("/")),
        )
        self._choose_strategy()
        self._set_numerics()
        self.strategy = self._make_strategy(first_alone)
        self.is_chief = devices.is_chief(self.strategy)
        if settings.jit_compile is None:
            alone = self.strategy.num_replicas_in_sync == 1
            settings.jit_compile = alone and devices.has_gpu()
        self.train_data = self._load_train_data()
        self._settle()
        self._log_settings()

    @property
    def _is_imagined(self) -> bool:
        """Whether nothing is trained: neither devices nor data are used."""
        return self.settings.dry_run or self.settings.mode == "check_tpu"

    def _choose_strategy(self) -> None:
        """Resolves what the flags say of devices."""
        settings = self.settings
        if self._is_imagined and settings.tpu_topology:
            settings.strategy, settings.use_tpu = "tpu", True
            return
        gpus = tf.config.list_physical_devices("GPU")
        settings.strategy = devices.choose_strategy(
            settings.strategy,
            use_tpu=settings.use_tpu,
            tpu_named=bool(settings.master or settings.tpu_name),
            num_gpus=len(gpus),
            cpu_replicas=settings.cpu_replicas,
            must_exist=not settings.dry_run,
        )
        settings.use_tpu = settings.strategy == "tpu"
        if settings.use_tpu and settings.cpu_replicas > 1:
            raise ValueError("--cpu_replicas is for runs without a TPU.")
        several = settings.strategy == "multi_worker"
        trains = settings.mode in ("train", "train_then_eval", "selftest")
        sweeps = settings.sweep_learning_rate or settings.sweep_train_epochs
        if several and (sweeps or not trains):
            raise ValueError(
                "Several machines train; "
                f"{'a sweep' if sweeps else f'--mode={settings.mode}'} is of "
                "one: --strategy=mirrored or one_device."
            )

    def _make_strategy(self, first_alone: bool) -> tf.distribute.Strategy:
        settings = self.settings
        if self._is_imagined:
            return devices.host_only()
        return devices.make_strategy(
            settings.strategy,
            tpu_name=settings.master or settings.tpu_name,
            tpu_zone=settings.tpu_zone,
            gcp_project=settings.gcp_project,
            tpu_wait_minutes=settings.tpu_wait_minutes,
            cpu_replicas=settings.cpu_replicas,
            first_alone=first_alone,
        )

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
        keras.utils.set_random_seed(settings.seed)
        if settings.mixed_precision:
            keras.mixed_precision.set_global_policy("mixed_bfloat16")

    def _load(self, split: str, **masks: Any) -> data.Dataset:
        return data.load(
            self.settings.dataset,
            split,
            data_dir=self.settings.data_dir,
            channels=self.settings.channels,
            **masks,
        )

    def _log_settings(self) -> None:
        """Logs the flags in force by where they come from."""
        groups: dict[str, list[str]] = {}
        for name, source in self._sources.items():
            value = getattr(self.settings, name)
            if source != "default":
                groups.setdefault(source, []).append(f"{name}={value}")
        for source, flags in groups.items():
            logging.info("Flags from %s: %s", source, " ".join(flags))

    @functools.cached_property
    def architecture(self) -> model.Architecture:
        """What the networks are built from."""
        return make_architecture(self.settings, self.train_data.num_classes)

    @functools.cached_property
    def networks(self) -> model.Networks:
        """With fresh weights, made in the strategy's scope."""
        settings = self.settings
        method = methods.METHODS[settings.objective]

        def build() -> model.Networks:
            # Whatever was built before, as in a sweep.
            keras.utils.set_random_seed(settings.seed)
            return model.build_networks(
                self.architecture,
                remat=settings.remat,
                differentiable_twice=method.has_gradient_penalty,
            )

        with self.strategy.scope():
            networks = build()
        if isinstance(self.strategy, tf.distribute.TPUStrategy):
            # A TPU draws other random numbers than a CPU from the same seed.
            with tf.device("CPU:0"):
                drawn = build().models()
            for name, network in networks.models().items():
                network.set_weights(drawn[name].get_weights())
        return networks

    @property
    def eval_crop(self) -> float | None:
        """The central share of an image that evaluation sees; None: all."""
        is_small = self.settings.image_size <= _LARGEST_SMALL_IMAGE
        return None if is_small else _IMAGENET_CROP_PROPORTION

    @functools.cached_property
    def eval_data(self) -> data.Dataset:
        """Split for evaluation: --eval_split, or the first that has labels.

        Raises:
            ValueError: if the split has no labels, or there is none to choose.
        """
        name, split = self.settings.dataset, self.settings.eval_split
        if split:
            dataset = self._load(split)
            if labelled.has_labels(dataset):
                return dataset
            found, _ = self._find_eval_data()
            others = f" Split {found.split!r} has labels." if found else ""
            raise ValueError(
                f"--eval_split={split} of {name} has no labels, or all of them "
                f"are hidden.{others}"
            )
        found, passed_over = self._find_eval_data()
        if found is None:
            raise ValueError(
                f"{name} has no split to evaluate on: {'; '.join(passed_over)}"
                ". Name a split with labels by --eval_split."
            )
        logging.info(
            "Evaluating on split %r of %s%s.",
            found.split,
            name,
            "".join(f"; {reason}" for reason in passed_over),
        )
        return found

    def _find_eval_data(self) -> tuple[data.Dataset | None, list[str]]:
        """Returns the first split for evaluation that has labels.

        Also returns the reasons why the other splits were not chosen.
        """
        reasons = []
        for split in _EVAL_SPLITS:
            try:
                dataset = self._load(split)
            except NoSuchSplit as error:
                splits = ", ".join(
                    k for k, size in error.splits.items() if size
                )
                reasons.append(f"there is no {split!r} among {splits}")
                continue
            if labelled.has_labels(dataset):
                return dataset, reasons
            reasons.append(
                f"labels of {split!r} are hidden"
                if dataset.num_classes
                else f"{split!r} has no labels"
            )
        return None, reasons

    @functools.cached_property
    def labelled_ids(self) -> np.ndarray | None:
        """Ids of the images whose labels pretraining may see; None: all.

        Raises:
            ValueError: if more than one flag chooses them, or none is there.
        """
        settings = self.settings
        flags = ("labelled_fraction", "labels_per_class", "labelled_file")
        given = [name for name in flags if getattr(settings, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"--{' and --'.join(given)} both choose labelled images."
            )
        if settings.train_mode == "finetune":
            return None
        if self._is_imagined:  # it matters not which
            some = given or settings.labelled_batch_share
            return np.arange(1) if some else None
        if given and self._continues((*flags, *_DATA_FLAGS)):
            # Reading all labels of a large dataset again would take minutes.
            return labelled.read(settings.model_dir)
        if not given:
            if settings.objective == "semppl":
                logging.info(
                    "All labels are seen: no --labelled_fraction, "
                    "--labels_per_class or --labelled_file was given."
                )
            if not settings.labelled_batch_share:
                return None
            ids = np.flatnonzero(labelled.labels_of(self.train_data) >= 0)
        elif settings.labelled_file:
            ids = labelled.from_file(self.train_data, settings.labelled_file)
        else:
            ids = labelled.choose(
                self.train_data,
                fraction=settings.labelled_fraction,
                per_class=settings.labels_per_class,
                seed=settings.seed,
            )
        logging.info(
            "Labels of %d of %d images are seen.",
            len(ids),
            self.train_data.num_examples,
        )
        return ids

    def _continues(self, names: Sequence[str]) -> bool:
        """Returns whether `model_dir` holds a run of the same flags `names`."""
        before = checkpoint_lib.read_run(self.settings.model_dir)
        return before is not None and all(
            before["flags"].get(name) == getattr(self.settings, name)
            for name in names
        )

    def _load_train_data(self) -> data.Dataset:
        """Loads the training split, or what the flags make of it."""
        settings = self.settings
        finetune = settings.train_mode == "finetune"
        masked = not finetune and settings.mask_probability
        if self._is_imagined:
            dataset = data.outline(
                settings.dataset,
                settings.train_split,
                data_dir=settings.data_dir,
                channels=settings.channels,
            )
        else:
            dataset = self._load(
                settings.train_split,
                mask_dir=settings.mask_dir if masked else None,
                saliency=settings.saliency if masked else None,
            )
        if settings.objective == "semppl" and not dataset.num_classes:
            raise ValueError(
                f"SemPPL needs some labels; {settings.dataset} "
                f"{settings.train_split} has none."
            )
        needs_labels = finetune or settings.mode == "probe"
        if needs_labels and dataset.num_classes and not self._is_imagined:
            if not labelled.has_labels(dataset):
                raise ValueError(
                    f"All labels of --train_split={settings.train_split} of "
                    f"{settings.dataset} are hidden."
                )
        if finetune and settings.train_on_labelled and settings.checkpoint:
            dataset = data.subset(dataset, self._ids_of_checkpoint())
            logging.info("%s", data.describe(dataset))
        return dataset

    def _ids_of_checkpoint(self) -> np.ndarray:
        """Returns ids of the images whose labels the pretraining saw."""
        settings = self.settings
        run = checkpoint_lib.read_run(settings.checkpoint) or {"flags": {}}
        for name in ("dataset", "train_split"):
            here = getattr(settings, name)
            there = run["flags"].get(name, here)
            if there != here:
                raise ValueError(
                    f"--train_on_labelled needs --{name}={there}, whose images "
                    f"{settings.checkpoint} has chosen from. Received: {here}."
                )
        return labelled.read(checkpoint_lib.run_directory(settings.checkpoint))

    def _settle(self) -> None:
        """Takes what flags leave open from the data."""
        settings, size = self.settings, self.train_data.image_size
        if settings.image_size is None:
            settings.image_size = min(size) if size else _IMAGENET_SIZE
        trains = settings.mode in TRAINING_MODES
        if trains and size and settings.image_size > min(size):
            raise ValueError(
                f"--image_size={settings.image_size} exceeds the images of "
                f"{settings.dataset}, which are {size[0]}x{size[1]}."
            )
        settings.channels = self.train_data.channels
        is_small = settings.image_size <= _LARGEST_SMALL_IMAGE
        if settings.stem is None:
            settings.stem = "cifar" if is_small else "imagenet"
        if is_small and settings.train_mode == "pretrain":
            self._settle_small_images()
        if settings.small_image_size is None:
            # ReLICv2's 96 of 224; of a small image that would be little.
            share = 1 / 2 if is_small else 96 / 224
            settings.small_image_size = int(settings.image_size * share)
        self._settle_queue()

    def _settle_small_images(self) -> None:
        """Takes the method's values for them, where no others are asked for."""
        settings = self.settings
        method = methods.METHODS[settings.objective]
        unasked = (settings.objective, "default")
        kept: set[str] = set()
        if not settings.target_network:
            kept.update(method.without_target)
        # An augmentation that is asked for is taken as it is.
        if settings.sym_aug or self._sources["augmentation"] not in unasked:
            kept.update(AUGMENTATION_OVERRIDES)
        for name, value in method.small_images.items():
            if self._sources[name] in unasked and name not in kept:
                setattr(settings, name, value)
                self._sources[name] = f"{settings.objective}, small images"

    def _settle_queue(self) -> None:
        """Makes the queue as long as it is to be for the batch."""
        settings = self.settings
        if self._sources["queue_size"] == "default":
            settings.queue_size = _QUEUE_BATCHES * settings.train_batch_size
        is_short = settings.queue_size < settings.train_batch_size
        if settings.objective == "semppl" and is_short:
            raise ValueError(
                f"--queue_size={settings.queue_size} is less than "
                f"--train_batch_size={settings.train_batch_size}."
            )

    def choose(self, source: str, **flags: Any) -> None:
        """Gives flags values that were found, and says where."""
        vars(self.settings).update(flags)
        self._sources |= dict.fromkeys(flags, source)

    def with_batch(self, train_batch_size: int) -> "Run":
        """Returns the run with another batch, and networks of its own.

        Raises:
            ValueError: if SemPPL's queue does not hold such a batch.
        """
        other = copy.copy(self)
        other.settings = Settings(**vars(self.settings))
        other.settings.train_batch_size = train_batch_size
        other._settle_queue()
        for name in ("architecture", "networks"):
            vars(other).pop(name, None)
        return other

    def held_out(self, model_dir: str, **flags: Any) -> "Run":
        """Returns a run that is evaluated on images held out of training.

        Args:
            model_dir: of that run.
            **flags: values that it has otherwise.
        """
        other = copy.copy(self)
        other.settings = Settings(**vars(self.settings) | flags)
        other.settings.model_dir = model_dir
        train_data, count = self.train_data, self.settings.held_out_examples
        order = np.random.default_rng(self.settings.seed).permutation(
            train_data.example_ids
        )
        # At most a tenth, where there are few.
        count = min(count, len(order) // 10)
        vars(other).pop("networks", None)
        other.train_data = data.subset(train_data, order[count:])
        other.eval_data = data.subset(train_data, order[:count])
        return other

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

    @property
    def _eval_batch_size(self) -> int:
        """Images a step of evaluation, which divide among the replicas."""
        count = self.strategy.num_replicas_in_sync
        return math.ceil(self.settings.eval_batch_size / count) * count

    def forward_options(self) -> dict[str, Any]:
        """Returns how `features.compute_outputs` is to run."""
        return {
            "crop_proportion": self.eval_crop,
            "batch_size": self._eval_batch_size,
            "strategy": self.strategy,
            "jit_compile": self.settings.jit_compile,
        }

    def evaluate(self, step: int) -> tuple[dict[str, float], np.ndarray]:
        """Evaluates the networks, writes the result and returns it.

        Returns:
            What `trainer.evaluate` returns.
        """
        settings, dataset, crop = self.settings, self.eval_data, self.eval_crop
        stream = self.distributed(
            functools.partial(
                data.eval_stream,
                dataset,
                batch_size=self._eval_batch_size,
                image_size=settings.image_size,
                crop_proportion=crop,
            )
        )
        if settings.eval_steps:
            stream = itertools.islice(stream, settings.eval_steps)
        measured, predictions = trainer.evaluate(
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
        if self.is_chief:
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
        return measured, predictions

    def record(
        self, config: trainer.TrainConfig, *, reports_flags: bool = True
    ) -> dict[str, Any]:
        """Returns what `run.json` is to say.

        Args:
            config: of the training.
            reports_flags: whether flags that differ from those of the run in
                the directory are logged.

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
            "class_names": self.train_data.class_names,
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
            _compare_runs(settings.model_dir, before, now, reports_flags)
        return now

    def write(self, record: dict[str, Any]) -> None:
        """Writes `run.json` and the ids of the labelled images."""
        if not self.is_chief:
            return
        # First the ids: where there is a `run.json`, they are there.
        if self.labelled_ids is not None:
            labelled.write(self.settings.model_dir, self.labelled_ids)
        checkpoint_lib.write_run(self.settings.model_dir, record)


def _compare_runs(
    directory: str,
    before: dict[str, Any],
    now: dict[str, Any],
    reports_flags: bool = True,
) -> None:
    """Refuses to go on with other networks; reports other flags, if asked."""

    def differing(part: str) -> list[str]:
        return [
            f"{name}: {before[part][name]} there, {value} here"
            for name, value in now[part].items()
            # A run of an earlier version has fewer flags and fields.
            if name in before[part] and before[part][name] != value
        ]

    # Fields that runs of older versions do not name have their defaults.
    old = dataclasses.asdict(model.Architecture(**before["architecture"]))
    before = before | {"architecture": json.loads(json.dumps(old))}
    networks = differing("architecture")
    # Where weights come from is no flag to change on the way.
    for name in ("train_mode", "checkpoint"):
        there, here = (part["flags"].get(name) for part in (before, now))
        if os.path.normpath(there or "") != os.path.normpath(here or ""):
            networks.append(f"{name}: {there} there, {here} here")
    if networks:
        raise ValueError(
            f"{directory} holds a run of other networks ({'; '.join(networks)})"
            ". Choose another --model_dir, or the same flags."
        )
    for line in differing("flags") if reports_flags else ():
        logging.warning("Going on with another flag than before: %s", line)


def make_architecture(
    settings: Settings, num_classes: int
) -> model.Architecture:
    """Returns the networks that the flags describe."""
    finetune = settings.train_mode == "finetune"
    pretrains = not finetune and settings.mode in TRAINING_MODES
    needs_classifier = finetune or settings.lineareval_while_pretraining
    if finetune and not num_classes:
        raise ValueError(
            f"Fine-tuning needs labels; {settings.dataset} "
            f"{settings.train_split} has none."
        )
    normalize = settings.normalize == "imagenet"
    if normalize and settings.channels != len(model.IMAGENET_MEAN):
        raise ValueError(
            "--normalize=imagenet is of 3 channels. "
            f"Received images of {settings.channels}."
        )
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(model.Architecture)
        if hasattr(settings, field.name)
    }
    values |= {
        "num_classes": num_classes if needs_classifier else 0,
        "image_mean": model.IMAGENET_MEAN if normalize else (),
        "image_std": model.IMAGENET_STD if normalize else (),
    }
    if finetune and settings.ft_proj_selector == 0:
        values["proj_head_mode"] = "none"
    method = methods.METHODS[settings.objective]
    if not pretrains or not method.multi_view:
        # Neither built nor restored where it would not be used.
        values |= {"predictor": False, "target_network": False}
    if not pretrains or not method.can_learn_temperature:
        values["learnable_temperature"] = False
    if pretrains and settings.objective == "siglip":
        # So that the many negatives do not dominate at first.
        values["critic_bias"] = -10.0
    if pretrains and settings.objective == "semppl":
        values["queue_shape"] = settings.num_large_views, settings.queue_size
    return model.Architecture(**values)


def encoder_flags(architecture: model.Architecture) -> dict[str, Any]:
    """Returns the flags that make an encoder like another program's."""
    names = (
        "encoder", "resnet_depth", "width_multiplier", "stem", "padding",
        "shortcuts", "preactivation", "base_filters", "sk_ratio", "se_ratio",
        "channels",
    )  # fmt: skip
    return {name: getattr(architecture, name) for name in names} | {
        "normalize": "imagenet" if architecture.image_mean else "none"
    }


def usual_image_size(architecture: model.Architecture) -> int:
    """Returns the side, in pixels, of the images that a stem is made for."""
    is_small = architecture.stem == "cifar"
    return _LARGEST_SMALL_IMAGE if is_small else _IMAGENET_SIZE


def make_views(settings: Settings) -> tuple[data_util.Augmentation, ...]:
    """Returns the augmentation of each view that the flags describe.

    The large views come first.
    """
    if settings.train_mode == "finetune":
        # Crop and flip alone, as SimCLR and BYOL do.
        return (
            data_util.simclr_augmentation(
                settings.image_size,
                jitter_probability=0.0,
                grayscale_probability=0.0,
                blur_probability=0.0,
            ),
        )
    overrides = {
        name: getattr(settings, name)
        for name in AUGMENTATION_OVERRIDES
        if getattr(settings, name) is not None
    }
    for name, value in overrides.items():
        if isinstance(value, (list, tuple)):  # a smallest and a largest
            overrides[name] = tuple(float(x) for x in value)
    if settings.sym_aug:
        # The mean of BYOL's two: equal in accuracy (its table 17).
        symmetric = {"blur_probability": 0.5, "solarize_probability": 0.2}
        overrides = symmetric | overrides
    large = {
        "mask_probability": _mask_probability(settings),
        "mask_fill": settings.mask_fill,
    } | overrides
    small = overrides | {
        "crop_area": tuple(float(x) for x in settings.small_crop_area),
        "crop_min_covered": 0.0,
    }
    return (
        *(
            _make_view(settings, view % 2, large)
            for view in range(settings.num_large_views)
        ),
        *(
            _make_view(settings, 1, small, is_small=True)
            for _ in range(settings.num_small_views)
        ),
    )


def _make_view(
    settings: Settings,
    side: int,
    overrides: dict[str, Any],
    is_small: bool = False,
) -> data_util.Augmentation:
    """Returns a view; `side` 0 or 1, where they differ."""
    size = settings.small_image_size if is_small else settings.image_size
    if settings.augmentation == "byol":
        return data_util.byol_augmentation(size, view=side, **overrides)
    if settings.augmentation == "relic_pytorch":
        return data_util.relic_pytorch_augmentation(
            size, solarize=not is_small, **overrides
        )
    return data_util.simclr_augmentation(
        size,
        strength=settings.color_jitter_strength,
        use_blur=settings.use_blur,
        **overrides,
    )


def _mask_probability(settings: Settings) -> float:
    """Returns it, 0 where there is no source of masks."""
    if settings.mask_dir or settings.saliency:
        return settings.mask_probability
    return 0.0


def make_train_config(
    settings: Settings,
    dataset: data.Dataset,
    num_replicas: int,
    labelled_ids: np.ndarray | None = None,
) -> trainer.TrainConfig:
    """Returns what the training loop needs, with all counts in steps."""
    num_examples = dataset.num_examples
    is_labelled = None
    if labelled_ids is not None:
        is_labelled = np.zeros(num_examples, bool)
        is_labelled[labelled_ids] = True
    batch_size = settings.train_batch_size
    if settings.train_mode == "pretrain" and batch_size < 2:
        raise ValueError(
            "Pretraining compares the images of a batch with each other, so "
            f"--train_batch_size must be at least 2. Received: {batch_size}."
        )
    parts = settings.accumulate_steps
    if batch_size % (num_replicas * parts):
        raise ValueError(
            f"--train_batch_size={batch_size} does not divide among "
            f"{num_replicas} replicas"
            + (f" and --accumulate_steps={parts}." if parts > 1 else ".")
        )
    epoch_steps = max(1, round(num_examples / batch_size))
    train_steps = settings.train_steps or schedules.train_steps(
        num_examples, settings.train_epochs, batch_size
    )
    if train_steps < 0:
        raise ValueError(
            "The number of epochs must not be negative. Received: "
            f"{settings.train_epochs}."
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
    method = methods.METHODS[settings.objective]
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(trainer.TrainConfig)
        if hasattr(settings, field.name)
    }
    values |= {
        "hyperparameters": {
            argument: getattr(settings, flag)
            for argument, flag in method.arguments.items()
        },
        "gradient_penalty_weight": settings.gradient_penalty_weight
        if method.has_gradient_penalty
        else 0.0,
        "views": make_views(settings),
        "copy_target_until": settings.update_gamma_after_step,
        "target_update_steps": settings.update_gamma_every_n_steps,
        "num_classes": dataset.num_classes,
        "pseudo_label_start": schedules.warmup_steps(
            num_examples, settings.pseudo_label_start_epoch, batch_size
        ),
        "labelled": is_labelled,
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
        # Compiled by XLA, convolutions are slower on a CPU, chains of pointwise
        # operations several times faster.
        "jit_augmentation": not devices.has_gpu() and not settings.use_tpu,
    }
    return trainer.TrainConfig(**values)


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
